"""What the sources promise: what each module may import, also proved by importing, and how large a function may be."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "jaxpref"

# Imports go down. A folder, or a file beside the folders, imports no other of its floor; but commands may import one
# another. A new one is entered here by whoever adds it.
FLOORS = [
  ["losses", "diffusion", "reference", "recipes"],
  ["config"],
  ["devices", "arguments"],
  ["data"],
  ["models"],
  ["files"],
  ["rewards", "evaluation"],
  ["objectives", "voting"],
  ["training"],
  ["planning"],
  ["__main__", "main", "evaluate", "sample", "export", "score", "pairs", "vote", "blind", "taste", "precompute",
   "compile", "replay", "describe", "show"],
]  # fmt: skip
COMMANDS = FLOORS[-1]
PURE = ["losses", "diffusion", "reference"]
# Plumbing knows no networks and no losses; metrics and checkpoints are about arrays.
PLUMBING = [
  "recipes", "config", "arguments", "devices", "data", "training.optim", "training.checkpoint", "training.metrics",
  "training.monitor", "training.run_page", "planning.flops", "planning.hlo", "evaluation.statistics",
  "evaluation.comparison", "evaluation.page", "evaluation.pictures",
]  # fmt: skip
SLOW = {
  "torch",
  "transformers",
  "diffusers",
  "tensorflow_datasets",
  "matplotlib",
  "tensorflow",
  "scipy",
  "jinja2",
  "starlette",
  "uvicorn",
}
# Of a function. A larger one says why, in "# Long: ..." or "# Many parameters: ..." directly above it.
MAX_LINES, MAX_PARAMETERS = 60, 10


def module_name(path):
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(p for p in parts if p != "__init__")


SOURCES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"}


def top(name):
  """The folder that a module lies in, or the file beside the folders that it is."""
  return name.split(".")[0]


def floor(name):
  """The floor of a module of the package, None if it is not in the table."""
  return next((number for number, tops in enumerate(FLOORS) if top(name) in tops), None)


def is_plumbing(name):
  return any(f"{name}.".startswith(f"{part}.") for part in PLUMBING)


def imports_of(tree, name, is_package):
  """(imported module, whether at module level) of every import statement, names made absolute."""
  package = ["jaxpref", *name.split(".")]
  package = package if is_package else package[:-1]
  deferred = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    at_top = id(node) not in deferred
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, at_top
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      module = ".".join([*base, *([node.module] if node.module else [])])
      yield module, at_top
      for alias in node.names:  # `from jaxpref import losses` imports jaxpref.losses
        yield f"{module}.{alias.name}", at_top


def imports(name):
  path = SOURCES[name]
  return imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py")


def own(module):
  """The module of this package that an imported name is or lies in, or None."""
  parts = module.split(".")
  if parts[0] != "jaxpref":
    return None
  for end in range(len(parts), 1, -1):
    if ".".join(parts[1:end]) in SOURCES:
      return ".".join(parts[1:end])
  return None


modules = pytest.mark.parametrize("name", SOURCES)


def test_every_folder_has_a_floor():
  tops = [name for names in FLOORS for name in names]
  assert sorted(tops) == sorted({top(name) for name in SOURCES}), "enter what is new in FLOORS of this test"


@modules
def test_imports_go_down(name):
  here = floor(name)
  for module, _ in imports(name):
    target = own(module)
    assert target is not None or module.split(".")[0] != "jaxpref" or module == "jaxpref", f"there is no {module}"
    if target is not None and top(target) != top(name):
      assert floor(target) < here or (top(name) in COMMANDS and top(target) in COMMANDS), f"{name} imports {target}"


@pytest.mark.parametrize("name", [n for n in SOURCES if is_plumbing(n)])
def test_plumbing_imports_neither_networks_nor_losses(name):
  targets = {own(module) for module, _ in imports(name)} - {None}
  empty = {t for t in targets if not any(imports(t))}  # the folder that something is imported from
  bad = {t for t in targets - empty if not is_plumbing(t) and top(t) not in ("diffusion", "reference")}
  assert not bad, f"{name} imports {bad}"


@modules
def test_slow_imports_are_inside_functions(name):
  at_top = {module.split(".")[0] for module, immediate in imports(name) if immediate}
  allowed = set()
  if name.split(".")[0] == "data":
    at_top.discard("grain")
    if name.endswith("_dataset_builder"):
      allowed = {"tensorflow_datasets"}  # a builder is a subclass of theirs
  bad = (at_top & (SLOW | {"grain"})) - allowed
  assert not bad, f"{name} imports {bad} at module level; import inside the function that needs it"


@pytest.mark.parametrize("name", [n for n in SOURCES if top(n) in PURE])
def test_pure_modules_import_only_jax_numpy_and_the_standard_library(name):
  allowed = {"jax", "numpy", "chex"} | set(sys.stdlib_module_names)
  of_others = {module for module, _ in imports(name) if own(module) is None or top(own(module)) != top(name)}
  assert {module.split(".")[0] for module in of_others} <= allowed


def test_only_models_and_files_know_what_a_family_is_made_of():
  """Its network, SDXL's sizes and two text encoders; but for what precomputed folders call a field, and examples."""
  words = re.compile(r"\bunet\b|time_ids|text_encoder_2|added_cond|encoder_hidden_states")
  allowed = {"data.latents", "objectives.pretraining", "devices.sharding"}
  for name, path in SOURCES.items():
    if top(name) not in ("models", "files") and name not in allowed:
      found = [line for line in path.read_text().splitlines() if words.search(line)]
      assert not found, (name, found)


def test_names_of_methods_are_compared_in_the_config_and_the_catalog_alone():
  names = re.compile(r"""objective (==|!=|in) |== ["'](spo|grpo|tdpo|kto|spm)["']""")
  for name, path in SOURCES.items():
    if top(name) not in ("config", "recipes") and name != "objectives.catalog":
      found = [line for line in path.read_text().splitlines() if names.search(line.partition("#")[0])]
      assert not found, (name, found)


def test_the_package_itself_imports_nothing():
  """But for what a command needs before it imports anything: how it ends at Ctrl-C."""
  tree = ast.parse((PACKAGE / "__init__.py").read_text())
  assert [n.names[0].name for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)] == ["sys"]
  code = "import sys; import jaxpref; print([name for name in sys.modules if name.startswith('jaxpref.')])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
  assert done.stdout == "[]\n"


def test_the_checker_sees_every_way_to_import():
  """A check of the check: it finds imports of each form, and tells deferred from immediate."""
  source = """
import torch.nn
from jaxpref import losses as l
from jaxpref.models.unet import UNet2DConditionModel
from . import metrics
if True:
  import matplotlib
class A:
  import transformers
  def f(self):
    import grain
"""
  found = dict(imports_of(ast.parse(source), "data.emoji", is_package=False))
  assert found["torch.nn"] and found["matplotlib"] and found["transformers"]
  assert found["grain"] is False
  assert {"jaxpref.losses", "jaxpref.models.unet", "jaxpref.data.metrics"} <= set(found)
  assert own("jaxpref.losses.dpo_loss") == "losses" and own("jax.numpy") is None
  assert floor("models.unet") == 4 and floor("losses") == 0 and floor("nonsense") is None
  assert is_plumbing("data.index") and is_plumbing("training.metrics") and not is_plumbing("training.step")


def size_of(function):
  """Lines of a function without its docstring and decorators, and parameters without self and cls."""
  lines = function.end_lineno - function.lineno + 1
  if ast.get_docstring(function) is not None:
    lines -= function.body[0].end_lineno - function.body[0].lineno + 1
  a = function.args
  names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg is not None]
  return lines, len(names) - (names[:1] in (["self"], ["cls"]))


def wrong_sizes(source):
  """A sentence on each function that is too large without a reason above it, and on each reason without need."""
  lines = source.splitlines()
  # Line number -> what kind of reason stands there; those that are needed are taken out.
  reasons = {
    number: found[1]
    for number, line in enumerate(lines, 1)
    if (found := re.match(r"\s*# (Long|Many parameters): \S", line))
  }
  wrong = []
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    above = min(part.lineno for part in (node, *node.decorator_list)) - 1
    own = {}
    while above in reasons:
      own[reasons[above]] = above
      above -= 1
    for kind, size, most in zip(("Long", "Many parameters"), size_of(node), (MAX_LINES, MAX_PARAMETERS), strict=True):
      if size > most and kind in own:
        del reasons[own[kind]]
      elif size > most:
        unit = "lines" if kind == "Long" else "parameters"
        wrong.append(
          f"{node.name} has {size} {unit}, more than {most}: split it, or say why in '# {kind}: ...' above it"
        )
  return wrong + [
    f"line {number}: '# {kind}: ...' is above no function that needs it" for number, kind in reasons.items()
  ]


@modules
def test_a_large_function_says_why(name):
  assert not wrong_sizes(SOURCES[name].read_text())


def test_the_checker_counts_lines_and_parameters():
  """A check of the check: at the limits, in classes and functions, and for reasons that are not needed."""
  body = lambda count, indent="  ": "".join(f"{indent}x = {i}\n" for i in range(count))
  doc = '  """One.\n\n  Two.\n  """\n'
  parameters = lambda count: ", ".join(f"p{i}" for i in range(count))
  assert not wrong_sizes(f"def f():\n{doc}{body(59)}")
  assert wrong_sizes(f"def f():\n{doc}{body(60)}")[0].startswith("f has 61 lines")
  assert not wrong_sizes(f"# Long: an algorithm.\n@decorated\ndef f():\n{body(60)}")
  assert len(wrong_sizes(f"# Long: an algorithm.\n\ndef f():\n{body(60)}")) == 2  # not directly above
  assert len(wrong_sizes(f"# Long:\ndef f():\n{body(60)}")) == 1  # no reason
  assert len(wrong_sizes(f"# Long: no more.\ndef f():\n{body(59)}")) == 1
  assert len(wrong_sizes("x = 1  # Long: of nothing.\n# Many parameters: of nothing.\n")) == 1
  assert not wrong_sizes(f"class A:\n  def f(self, {parameters(10)}):\n    pass\n")
  assert not wrong_sizes(f"def f({parameters(6)}, *, a, b, c, d):\n  pass\n")
  both = f"def f({parameters(11)}):\n{body(60)}"
  assert len(wrong_sizes(both)) == 2 and len(wrong_sizes(f"# Long: an algorithm.\n{both}")) == 1
  assert not wrong_sizes(f"# Long: an algorithm.\n# Many parameters: its numbers.\n{both}")
  inner = f"def f():\n  # Many parameters: its numbers.\n  def g({parameters(9)}, *args, **kwargs):\n    pass\n"
  assert not wrong_sizes(inner)
  assert wrong_sizes(inner.replace("# Many parameters: its numbers.", "pass"))[0].startswith("g has 11 parameters")


@pytest.mark.parametrize("name", PURE)
def test_importing_a_pure_module_loads_nothing_else(name):
  """In a fresh interpreter: no network library, no config library, no sibling."""
  forbidden = ["flax", "optax", "ml_collections", "absl.flags", "orbax", "grain", *sorted(SLOW)]
  forbidden += [f"jaxpref.{other}" for other in PURE if other != name]
  code = (
    f"import sys; from jaxpref import {name}; "
    f"print([m for m in {forbidden!r} if m in sys.modules], *sorted(m for m in sys.modules if m.startswith('jaxpref')))"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
  assert result.returncode == 0, result.stderr
  bad, package, *loaded = result.stdout.split()
  assert (bad, package) == ("[]", "jaxpref")
  assert f"jaxpref.{name}" in loaded and set(loaded) <= {f"jaxpref.{other}" for other in SOURCES if top(other) == name}
