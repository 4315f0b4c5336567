"""What the command says of a compiled step."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest

from configs import dpo_sd15, spm_sd15
from jaxpref import compile
from jaxpref.devices import chips, sharding
from jaxpref.planning import plan
from tests import conftest

GIB = chips.GIB


def small(recipe, **fields):
  config = recipe.get_config("smoke")
  config.update(model="random:one-level", **fields)
  return plan.without_weights(config)


@pytest.fixture(scope="module")
def reports():
  """Of the same step on one device and on four."""
  config = small(spm_sd15, batch_size=4, accumulation=1)
  meshes = (sharding.make_mesh(devices=jax.devices()[:n]) for n in (1, 4))
  return [compile.compile_step(config, mesh) for mesh in meshes]


@pytest.mark.slow
def test_the_report_of_a_compiled_step(reports):
  report = reports[0]
  assert report["temporaries"] > 0
  assert report["peak"] >= sum(report["arguments"].values())
  assert report["flop"] > 1e6 and report["collectives"] == {}
  assert report["memory_bytes"] > sum(report["arguments"].values())
  shown = compile.table(report, chips.CHIPS["v5e"])
  assert "| peak |" in shown and "| of | 16.00 |" in shown and "seconds at its peak" in shown


@pytest.mark.slow
def test_splitting_the_batch_splits_operations_and_sums_gradients(reports):
  one, four = reports
  assert four["flop"] == pytest.approx(one["flop"] / 4)
  assert four["arguments"]["trained"] == one["arguments"]["trained"]
  # All gradients are summed over the four devices: each sends 2 x 3/4 of them, and then a few numbers.
  sent = four["collectives"]["all-reduce"]["bytes"]
  assert 1.5 * one["arguments"]["trained"] <= sent <= 1.1 * 1.5 * one["arguments"]["trained"]


REPORT = {
  "arguments": {"trained": 2 * GIB, "batch": GIB},
  "temporaries": 5 * GIB,
  "output": 0,
  "peak": 8 * GIB,
  "flop": 197e12,
  "memory_bytes": 819e9 / 2,
  "collectives": {"all-reduce": {"bytes": 50e9, "count": 3.0}},
}


def test_the_longest_of_the_resources_bounds_the_step():
  chip = chips.CHIPS["v5e"]
  seconds = compile.least_seconds(REPORT, chip)
  assert seconds == {"compute": 1.0, "memory": 0.5, "interconnect": 0.25}
  assert chips.bound(seconds) == "compute" and compile.fits(REPORT, chip)
  assert not compile.fits(REPORT | {"peak": 17 * GIB}, chip)
  assert not compile.fits({"peak": 8 * GIB, "refused": True}, chip)
  shown = compile.table(REPORT, chip)
  assert "| operations | 197 TFLOP | 1 |" in shown and "| by 3 all-reduce | 46.57 GiB | |" in shown


def test_what_a_refused_program_would_take():
  used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded by 5.75G."
  assert compile._refused_bytes(used, GIB) == 21.5 * GIB
  temporaries = "the total memory required for HLO temporaries (18.96G) exceeds available HBM (15.75G). HLO module: x."
  assert compile._refused_bytes(temporaries, GIB) == 19.96 * GIB
  assert compile._refused_bytes("INTERNAL: something else", GIB) is None


def test_advice_is_the_nearest_change_by_estimate():
  devices = jax.devices()[:4]
  config = small(dpo_sd15, batch_size=16, accumulation=1)
  mesh = sharding.make_mesh(devices=devices)
  arguments = plan.argument_bytes(*plan.abstract_inputs(config, mesh)[1:])
  report = {"arguments": arguments, "peak": 1.5 * GIB}
  chip = chips.Chip(1e12, GIB, 1e9, 1e9, ())
  advice = compile.advise(config, devices, report, chip, search=False, compiler_options={})
  assert "estimate" in advice and "--config.accumulation=2 (about 0.8 GiB)" in advice
  tiny = chips.Chip(1e12, 2**20, 1e9, 1e9, ())
  assert "use more chips" in compile.advise(config, devices, report, tiny, search=False, compiler_options={})


def test_search_compiles_until_it_fits(monkeypatch):
  devices = jax.devices()[:2]
  config = small(dpo_sd15, batch_size=8, accumulation=1)
  tried = []

  def pretend(config, mesh, *, compiler_options):
    tried.append((config.accumulation, mesh.shape["fsdp"]))
    return {"peak": (2 if len(tried) < 3 else 0.5) * GIB}

  monkeypatch.setattr(compile, "compile_step", pretend)
  chip = chips.Chip(1e12, GIB, 1e9, 1e9, ())
  report = {"arguments": {"trained": 0, "batch": 0}, "peak": 1.5 * GIB}
  advice = compile.advise(config, devices, report, chip, search=True, compiler_options={})
  assert tried == [(2, 1), (4, 1), (2, 2)]  # by the estimate, one micro-batch fits on no number of devices
  assert advice == "it fits with --config.accumulation=2 --config.mesh.fsdp=2: 0.50 GiB"


def without_drivers(text):
  """The lines but those that `import jax` writes, from C++, where JAX's plug-in for CUDA is installed and no driver."""
  of_plugin = re.compile("Could not find cuda drivers|log messages before absl::InitializeLog")
  return [line for line in text.splitlines() if not of_plugin.search(line)]


@pytest.mark.compiler("libtpu")
@pytest.mark.parametrize("recipe", ["dpo_sd15.py:smoke", "dpo_sd35_tiny.py"])
def test_the_command_compiles_for_chips_that_are_not_there(recipe, tmp_path):
  out = tmp_path / "report.json"
  command = [sys.executable, "-m", "jaxpref.compile", f"--config=configs/{recipe}", "--topology=v5e:2x2"]
  done = subprocess.run(
    [*command, "--config.batch_size=8", "--config.mesh.fsdp=4", f"--out={out}"],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert without_drivers(done.stderr) == ["compiling a step of dpo for 4 x TPU v5 lite ..."], "the compiler's own noise"
  assert "\nfits: 0." in done.stdout and "a step takes at least" in done.stdout
  report = json.loads(out.read_text())
  assert report["peak"] < 2**30 and report["fits"]
  assert sum(c["bytes"] for c in report["collectives"].values()) > report["arguments"]["trained"]


@pytest.mark.compiler("libtpu")
def test_both_programs_of_a_reward_on_the_host_compile_for_chips_that_are_not_there(tmp_path):
  out, root = tmp_path / "report.json", pathlib.Path(__file__).parents[1]
  (tmp_path / "mine.py").write_text("def light(images, prompts):\n  return [i.mean() for i in images]\n")
  command = [sys.executable, "-m", "jaxpref.compile", "--config=configs/grpo_tiny.py", "--topology=v5e:2x2"]
  model = ["--config.model=random:one-level", "--config.grpo.num_inference_steps=2", "--config.grpo.minibatch=8"]
  done = subprocess.run(
    [*command, *model, "--config.reward=preference_model:1,mine:light:0.1", f"--out={out}"],
    cwd=root,
    env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  report = json.loads(out.read_text())
  peaks = [program["peak"] for program in report["programs"].values()]
  assert len(peaks) == 2 and report["peak"] == max(peaks) and report["fits"]
  assert report["rewards"]["mine:light"] == {"host": True} and "| mine:light | on the host |" in done.stdout


@pytest.mark.compiler("libtpu")
@pytest.mark.parametrize(
  "name, chips_expected",
  [("v5e:1x1", 1), ("v6e:1x1", 1), ("v5e:4x4", 16), ("v5e:16x16", 256), ("v4:2x2x1", 4), ("v5p:2x2x2", 8)],
)
def test_topologies_have_a_device_for_each_chip(name, chips_expected, monkeypatch):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  assert len(compile.topology_devices(name)) == chips_expected


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v99:1x1", r"expected one of v4, v5e, v5p, v6e, a100-40.*rtx4090, with a shape: v5e:4x4, or h200:8"),
    ("v5e-16", "a shape: v5e:4x4, or h200:8"),
    ("v5e:3x3", "; expected a shape like 1x1, .*4x4, 4x8.*, and libtpu"),
    ("h200:0", "expected h200 and a number of GPUs of one server, such as 8: h200:8"),
    ("h200:2x4", "expected h200 and a number of GPUs"),
  ],
)
def test_a_wrong_topology_is_one_sentence(name, message):
  with pytest.raises(ValueError, match=f"--topology={name}.*{message}"):
    compile.topology_devices(name)


@pytest.mark.compiler("jax_plugins.xla_cuda12")
def test_the_command_compiles_for_gpus_that_are_not_there(tmp_path):
  out = tmp_path / "report.json"
  command = [sys.executable, "-m", "jaxpref.compile", "--config=configs/spm_sd15.py:smoke", "--topology=rtx4090:2"]
  done = subprocess.run(
    [*command, "--config.batch_size=4", "--config.accumulation=1", f"--out={out}"],
    cwd=pathlib.Path(__file__).parents[1],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "2 x NVIDIA GeForce RTX 4090" in done.stderr
  assert f"of the {chips.CHIPS['rtx4090'].usable / GIB:.4g} GiB of a chip" in done.stdout
  report = json.loads(out.read_text())
  # The gradients, which are of bfloat16 for kernels.
  assert report["collectives"]["all-reduce"]["bytes"] >= report["arguments"]["trained"] / 2


@pytest.mark.parametrize(("asked_for", "outcome"), [(False, pytest.skip.Exception), (True, pytest.fail.Exception)])
def test_a_compiler_that_is_missing_skips_its_tests_unless_all_are_asked_for(asked_for, outcome):
  marker = pytest.mark.compiler("jax_plugins.none").mark
  item = types.SimpleNamespace(
    iter_markers=lambda name: [marker], config=types.SimpleNamespace(getoption=lambda name: asked_for)
  )
  with pytest.raises(outcome, match="needs jax_plugins.none"):
    conftest.pytest_runtest_setup(item)
