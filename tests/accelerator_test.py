"""The proof on an accelerator sees numbers that are wrong, keeps what it has, and runs where few packages are."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxpref.models import attention, presets
from jaxpref.models.unet import UNet2DConditionModel
from jaxpref.models.vae import AutoencoderKL
from scripts.bench import accelerator, accelerator_proof, accelerator_results
from tests import QUICK_FLAGS

ROOT = accelerator.ROOT
EXPECTED = json.loads(accelerator_proof.EXPECTED.read_text())


# ---- Numbers of a CPU ------------------------------------------------------------------------------------------------


def differences(name, found):
  return accelerator_proof.differences(found, EXPECTED["objectives"][name], accelerator_proof.decided(name))


def perturbed(name, step, **factors):
  steps = [dict(metrics) for metrics in EXPECTED["objectives"][name]]
  for metric, factor in factors.items():
    steps[step][metric] *= factor
  return steps


def test_every_objective_has_three_steps_of_a_cpu():
  assert EXPECTED["objectives"].keys() == accelerator_proof.OBJECTIVES.keys()
  assert all(len(steps) == accelerator_proof.STEPS for steps in EXPECTED["objectives"].values())
  assert len(EXPECTED["sample"]) == 2 * len(accelerator_proof.PROMPTS)


@pytest.mark.parametrize("name", accelerator_proof.OBJECTIVES)
def test_rounding_passes_and_perturbed_numbers_fail(name):
  assert not differences(name, EXPECTED["objectives"][name])
  for metric in ("grad_norm",) if name in ("grpo", "ddpo") else ("loss", "grad_norm"):  # their losses are about zero
    sizes = [abs(metrics[metric]) for metrics in EXPECTED["objectives"][name]]
    step = sizes.index(max(sizes))
    assert not differences(name, perturbed(name, step, **{metric: 1.0 + 1e-4}))
    (said,) = differences(name, perturbed(name, step, **{metric: 1.05}))
    assert said.startswith(f"step {step + 1}: {metric} is ")
    (said,) = differences(name, perturbed(name, step, **{metric: float("nan")}))
    assert f"{metric} is nan, on the CPU" in said


def test_the_first_step_is_compared_more_closely_than_those_that_follow():
  assert differences("dpo", perturbed("dpo", 0, grad_norm=1.003))
  assert not differences("dpo", perturbed("dpo", 2, grad_norm=1.003))


def test_margins_are_compared_at_their_own_size():
  assert abs(EXPECTED["objectives"]["dpo"][1]["margin"]) < 1e-3  # far below any number of the loss
  assert differences("dpo", perturbed("dpo", 1, margin=1.1))


def test_a_share_may_be_off_by_one_row():
  steps = perturbed("spo", 0)
  rows = accelerator_proof.decided("spo")
  steps[0]["valid_pairs"] += 1 / rows
  assert not differences("spo", steps)
  steps[0]["valid_pairs"] += 1 / rows
  assert differences("spo", steps)[0].startswith("step 1: valid_pairs is ")


def test_a_metric_that_is_missing_is_wrong():
  steps = perturbed("dpo", 0)
  del steps[1]["margin"]
  assert differences("dpo", steps)[0].startswith("step 2: margin is nan, on the CPU ")


# ---- Attention -------------------------------------------------------------------------------------------------------


def called_sizes(preset, monkeypatch):
  """Sizes of all attention that UNet and VAE of a preset call on images of their own size, by tracing them."""
  seen = set()

  def record(q, k, v, mask=None, *, implementation=None):
    seen.add((q.shape[1], k.shape[1], q.shape[2], q.shape[3]))
    return q

  monkeypatch.setattr(attention, "attention", record)
  unet, vae = UNet2DConditionModel(preset.unet), AutoencoderKL(preset.vae)
  x, t, cond, added = presets.example_inputs(unet)
  cond = jnp.zeros((1, accelerator_proof.TOKENS, cond.shape[2]))
  jax.eval_shape(unet.init, jax.random.key(0), x, t, cond, added)
  side = preset.unet.sample_size * preset.vae.downscale
  jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
  return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15-miniature", "sdxl-miniature"])
def test_attention_has_the_sizes_that_the_networks_call(name, monkeypatch):
  assert set(accelerator_proof.attention_sizes([name])) == called_sizes(presets.get_preset(name), monkeypatch)


def attention_rows(size, ways):
  case = accelerator_proof.Attention(size)
  program, arguments = case.compile(None)
  expected = program(*arguments)

  class Compiling:
    def __init__(self, way):
      self.way = way

    def result(self):
      return case.compile(self.way)

  return [accelerator_proof.attention_row(way, Compiling(way), expected) for way in ways]


@pytest.mark.parametrize("size", [(64, 64, 2, 8), (64, 16, 2, 8)])
def test_right_wrong_and_failing_attention(size, monkeypatch):
  right = attention_rows(size, ["xla", "chunked"])
  assert not accelerator_proof.attention_wrong(right) and all(0 < row["forward"] for row in right)
  compute = attention.attention

  def wrong(q, k, v, *, implementation):
    if implementation == "cudnn":
      raise RuntimeError("no engine for this size\nand more")
    return compute(q, k, v, implementation=implementation) * (1.0 if implementation == "chunked" else 1.05)

  monkeypatch.setattr(attention, "attention", wrong)
  off, failed = attention_rows(size, ["xla", "cudnn"])
  assert failed["error"] == "RuntimeError: no engine for this size"
  said = accelerator_proof.attention_wrong([off, failed])
  assert said and all(text.startswith("xla: ") for text in said)  # what is not chosen may fail
  assert accelerator_proof.attention_wrong([failed]) == [f"cudnn is chosen and fails: {failed['error']}"]
  assert "cudnn fails: RuntimeError" in accelerator_proof.attention_said([off, failed])


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_results_keep_what_is_done_and_try_the_rest_again(tmp_path):
  results = accelerator_results.Results(tmp_path, "proof", "smoke")
  results.add("right", {"wrong": []}, "as on the CPU")
  results.add("off", {"wrong": ["loss is 2"]}, "three steps")
  with results.attempt("broken"):
    raise ValueError("no memory\nand more")
  with pytest.raises(SystemExit, match="error: proof: off, broken, missing failed; see "):
    results.finish(["right", "off", "broken", "missing"])
  again = accelerator_results.Results(tmp_path, "proof", "smoke")
  assert not again.complete
  assert [name for name in ("right", "off", "broken", "missing") if again.done(name)] == ["right"]
  assert (tmp_path / "results.txt").read_text().splitlines() == [
    "proof right: as on the CPU", "proof off: three steps WRONG: loss is 2", "proof broken: ValueError: no memory",
  ]  # fmt: skip
  for name in ("off", "broken"):
    again.add(name, {}, "now")
  again.finish(["right", "off", "broken"])
  assert accelerator_results.Results(tmp_path, "proof", "smoke").complete
  with pytest.raises(SystemExit, match="has results of size smoke; name another folder for full"):
    accelerator_results.Results(tmp_path, "proof", "full")


def test_fewer_steps_than_before_an_interruption_do_not_replace_what_was_timed(tmp_path):
  results = accelerator_results.Results(tmp_path, "dpo-lora-sdxl", "smoke")
  accelerator.keep_partial(results, "steps", {"seconds": [1.0, 2.0]})
  accelerator.keep_partial(results, "steps", {"seconds": [3.0]})
  assert results.items["steps"] == {"seconds": [1.0, 2.0], "partial": True} and not results.done("steps")


def test_bad_arguments_end_in_a_sentence(tmp_path, capsys):
  with pytest.raises(SystemExit):
    accelerator.main(["--summary", "--out", str(tmp_path)])
  assert "--summary: there is no " in capsys.readouterr().err
  with pytest.raises(SystemExit):
    accelerator.main([])
  assert "name a part: proof, dpo-lora-sdxl" in capsys.readouterr().err
  done = shell(tmp_path, "prof")
  assert done.returncode == 2 and "error: there is no part prof; expected some of proof dpo-lora-sdxl " in done.stderr


# ---- The shell script ------------------------------------------------------------------------------------------------


def shell(folder, *parts, **environment):
  command = ["bash", str(ROOT / "scripts" / "bench" / "accelerator.sh"), *parts]
  environment = os.environ | {"OUT": str(folder / "out"), "PYTHON": sys.executable} | environment
  return subprocess.run(command, env=environment, capture_output=True, text=True)


# Stands in for Python: one part fails, another hangs.
STUB = """#!/bin/sh
part=$2
echo "$@" >>"$(dirname "$0")/calls.txt"
case $part in
  proof) echo broken >&2; exit 3 ;;
  dpo-lora-sdxl) exec sleep 60 ;;
esac
"""


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path):
  (tmp_path / "python").write_text(STUB)
  (tmp_path / "python").chmod(0o755)
  done = shell(tmp_path, PYTHON=str(tmp_path / "python"), LIMIT="2", SIZE="smoke")
  assert done.returncode == 1
  assert "dpo-lora-sdxl: stopped after 2 s" in done.stderr
  assert "error: proof dpo-lora-sdxl failed or ran out of time; run the same command again to continue." in done.stderr
  calls = (tmp_path / "calls.txt").read_text().splitlines()
  assert [line.split()[1] for line in calls] == list(accelerator.PARTS)
  assert calls[0].endswith("--size smoke --limit 2")


@pytest.mark.slow
def test_all_parts_together_have_a_limit(tmp_path):
  (tmp_path / "python").write_text(STUB)
  (tmp_path / "python").chmod(0o755)
  done = shell(tmp_path, "dpo-lora-sdxl", "torch", PYTHON=str(tmp_path / "python"), TOTAL="2")
  assert done.returncode == 1 and "torch: no time is left" in done.stderr
  assert len((tmp_path / "calls.txt").read_text().splitlines()) == 1


# ---- A rehearsal -----------------------------------------------------------------------------------------------------

# By the names that are imported: packages of the machine, with what other versions of them need, and those that
# docs/results/benchmarks.md says to carry.
THERE = """
  absl accelerate aiofiles annotated_types anyio attr attrs certifi charset_normalizer chex click cloudpickle
  contourpy cycler dateutil einops etils filelock flatbuffers flax fontTools fsspec google grpc h11 hf_xet httpcore
  httpcore2 httpx httpx2 huggingface_hub humanize idna jax jaxlib jinja2 kiwisolver markdown markdown_it markupsafe
  matplotlib mdurl ml_dtypes mpl_toolkits mpmath msgpack networkx numpy opt_einsum optax orbax packaging peft PIL
  pkg_resources portalocker prometheus_client psutil pygments pylab pyparsing pytest regex requests rich safetensors
  scipy setuptools shellingham simplejson six sniffio sympy tensorstore threadpoolctl tokenizers toolz torch torchgen
  tqdm transformers treescope triton truststore typer typing_extensions urllib3 uvloop wadler_lindig wrapt xxhash yaml
  zipp
""".split()
CARRIED = ("ml_collections", "grain", "portpicker", "array_record", "diffusers", "importlib_metadata", "lazy_importer")
BLOCK = f"""
import sys

THERE = {{*{[*THERE, *CARRIED]!r}, "jaxpref", "scripts", "configs", "tests", "sitecustomize", *sys.stdlib_module_names}}

class Filter:
  def __init__(self, finder):
    self.finder = finder

  def find_spec(self, name, path=None, target=None):
    top = name.partition(".")[0]
    if name == "flax.nnx" or (path is None and not top.startswith("_") and top not in THERE):
      return None
    return self.finder.find_spec(name, path, target)

  def __getattr__(self, name):
    return getattr(self.finder, name)

sys.meta_path[:] = map(Filter, sys.meta_path)
"""


def copy_of_the_tree(folder):
  """What git keeps, or all but what it ignores where there is no git; returns the bytes."""
  listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
  names = listed.stdout.splitlines()
  if listed.returncode:
    tops = [p for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ("runs", "build", "dist")]
    files = [f for top in tops for f in ([top] if top.is_file() else top.rglob("*")) if f.is_file()]
    names = [str(f.relative_to(ROOT)) for f in files if "__pycache__" not in f.parts]
  for name in names:
    if (ROOT / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(ROOT / name, folder / name)
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_rehearsal_at_smoke_size_where_few_packages_are(tmp_path):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  tree = tmp_path / "tree"
  assert copy_of_the_tree(tree) < 50e6  # of 64, the rest for the wheels
  (tmp_path / "block").mkdir()
  (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  environment |= {"PYTHON": sys.executable, "SIZE": "smoke", "LIMIT": "3000", "JAX_PLATFORMS": "cpu"}
  environment |= {"XLA_FLAGS": QUICK_FLAGS, "PYTHONPATH": str(tmp_path / "block")}
  environment |= {"OUT": str(tmp_path / "out"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}

  def run():
    command = ["bash", "scripts/bench/accelerator.sh"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)

  probe = [sys.executable, "-c", "import tensorflow_datasets"]
  assert b"ModuleNotFoundError" in subprocess.run(probe, env=environment, capture_output=True).stderr
  done = run()
  print(done.stdout)
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
  assert results.keys() == set(accelerator.PARTS) and all(part["complete"] for part in results.values())
  items = results["proof"]["items"]
  assert {"device", "sample", "resume", *accelerator_proof.OBJECTIVES} < items.keys()
  assert (tmp_path / "out" / "sample.png").stat().st_size > 1000
  for part in accelerator.TIMINGS:
    row = results[part]["items"]["steps"]
    assert len(row["seconds"]) == accelerator.TIMED_STEPS and row["compiled_bytes"] > 0 and row["tflop_a_step"] > 0
  summary = (tmp_path / "out" / "summary.md").read_text()
  assert summary.count("| dpo-lora smoke") == 2 and "| spo-lora smoke |" in summary  # speeds, and beside PyTorch
  lines = (tmp_path / "out" / "results.txt").read_text()
  assert "WRONG" not in lines and len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) <= 8

  done = run()
  assert done.returncode == 0, done.stderr
  assert done.stdout.count(": done before") == len(accelerator.PARTS)
  assert (tmp_path / "out" / "results.txt").read_text() == lines
