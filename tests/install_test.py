"""The losses alone: what `pip install --no-deps .` must be enough for, where jax and numpy are installed."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLE = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)[0]
# jax and numpy, what jax itself needs, and the package.
ALLOWED = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "jaxpref")
BLOCKED = f"""
import importlib.abc, os, sys
import jax, numpy  # with whatever they find
for name in list(sys.modules):
  if name.split(".")[0] not in {ALLOWED} and name.split(".")[0] not in sys.stdlib_module_names | {{"__main__"}}:
    del sys.modules[name]

class Blocker(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.split(".")[0] not in {ALLOWED} and name.split(".")[0] not in sys.stdlib_module_names:
      raise ModuleNotFoundError(f"blocked: {{name}}")

sys.meta_path.insert(0, Blocker())
"""
IMPORTS = "from jaxpref import losses, diffusion, reference\nfrom jaxpref.diffusion import samplers\n"


def run(program, python=sys.executable, cwd=ROOT):
  done = subprocess.run([python, "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
  return done.returncode, done.stdout, done.stderr


def test_losses_run_where_jax_and_numpy_alone_can_be_imported():
  code, said, errors = run(BLOCKED + IMPORTS + EXAMPLE)
  assert (code, said) == (0, "0.693\n"), errors


def test_other_imports_are_blocked_in_that_test():
  code, _, errors = run(BLOCKED + "import flax\n")
  assert code == 1 and "blocked: flax" in errors
  code, _, errors = run(BLOCKED + "import jaxpref.training.loop\n")
  assert code == 1 and "blocked: " in errors


@pytest.mark.slow
def test_losses_run_in_an_environment_with_jax_and_numpy_alone(tmp_path):
  subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
  python = str(tmp_path / "venv" / "bin" / "python")
  lock = ROOT / "scripts" / "locks" / f"python{sys.version_info.major}.{sys.version_info.minor}.txt"
  constraint = ["--constraint", str(lock)] if lock.is_file() else []
  pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
  subprocess.run([*pip, *constraint, "jax", "numpy"], check=True)
  subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
  code, said, errors = run(IMPORTS + EXAMPLE, python, tmp_path)
  assert (code, said) == (0, "0.693\n"), errors
  listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout.lower()
  assert "flax" not in listed and "optax" not in listed and "jaxpref" in listed
