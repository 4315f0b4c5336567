"""Runs that are killed, whose disk is full, checkpoints are damaged or mesh changes, as a user sees them."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxpref.devices import sharding
from jaxpref.training import build, checkpoint, loop, metrics
from scripts.launch import chaos
from tests import QUICK_FLAGS, mesh_run, toy_run

REPOSITORY = pathlib.Path(__file__).parents[1]
CHAOS = [sys.executable, str(REPOSITORY / "scripts" / "launch" / "chaos.py")]
ENVIRONMENT = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=QUICK_FLAGS, PYTHONPATH=str(REPOSITORY))


def run_toy(folder, *, largest_file=None, **fields):
  """(status, stderr) of `tests.toy_run`: six steps, saved every two. The largest file may be limited, in kB."""
  fields = {"num_steps": 6, "batch_size": 8, "checkpoint.every": 2, "logging.every": 1, "sample.every": 0} | fields
  overrides = [f"--config.{k}={v}" for k, v in fields.items()]
  recipe = f"--config={REPOSITORY / 'configs' / 'dpo_tiny.py'}"
  command = [sys.executable, "-m", "tests.toy_run", recipe, *overrides, f"--workdir={folder}"]
  if largest_file:
    command = ["bash", "-c", f'ulimit -f {largest_file} && exec "$@"', "bash", *command]
  done = subprocess.run(command, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
  assert "Traceback" not in done.stderr, done.stderr
  return done.returncode, done.stderr


def steps(folder):
  return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def losses(folder):
  return [(row["step"], row["loss"]) for row in metrics.read(folder / "metrics.jsonl")]


def end(folder):
  """What has to be equal in the end."""
  return losses(folder), checkpoint.digest(checkpoint.load_params(folder)[0]), (folder / "export").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  folder = tmp_path_factory.mktemp("toy") / "alone"
  status, said = run_toy(folder)
  assert status == 0, said
  assert steps(folder) == [4, 6] and [step for step, _ in losses(folder)] == list(range(1, 7))
  return folder


def flip(step):
  """One bit of the numbers of a checkpoint."""
  path = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(bytes(content))


def files(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow  # training/checkpoint_test.py has its kinds in one process
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(alone, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(alone, folder)
  flip(folder / "checkpoints" / "6")
  status, said = run_toy(folder)
  assert status == 0 and f"resuming {folder} at step 4" in said
  assert f"checkpoint {folder}/checkpoints/6 is damaged (the numbers of " in said
  assert end(folder) == end(alone)  # steps 5 and 6 were done again
  assert [p.name for p in (folder / "checkpoints_damaged").iterdir()] == ["6"]

  for step in steps(folder):
    flip(folder / "checkpoints" / str(step))
  before = files(folder)
  status, said = run_toy(folder)
  assert status == 1
  errors = [line for line in said.splitlines() if line.startswith("error:")]
  assert len(errors) == 1 and said.endswith(errors[0] + "\n")
  assert f"no checkpoint in {folder}/checkpoints can be used (step 6: the numbers of " in errors[0]
  assert "; step 4: the numbers of " in errors[0] and "choose another --workdir" in errors[0]
  assert files(folder) == before


@pytest.mark.slow
def test_a_full_disk(alone, tmp_path):
  """As if: no file may be larger than 200 kB, so that the numbers cannot be written and all else can."""
  folder = tmp_path / "run"
  status, said = run_toy(folder, num_steps=2)
  assert status == 0, said
  status, said = run_toy(folder, largest_file=200, **{"checkpoint.keep": 1})
  assert status == 1
  errors = [line for line in said.splitlines() if line.startswith("error:")]
  assert len(errors) == 1, said
  assert f"the checkpoint of step 4 could not be saved in {folder}/checkpoints (" in errors[0]
  assert "File too large); the last good one is step 2: free space" in errors[0]
  assert steps(folder) == [2]
  status, said = run_toy(folder)  # the same command, with space
  assert status == 0 and f"resuming {folder} at step 2" in said
  assert end(folder) == end(alone)
  assert not list((folder / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("objective", ["toy", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_resumed_run_may_change_its_mesh(tmp_path, monkeypatch, objective):
  """On one device to its end; and half of it, then the rest on 2 x 2 x 2 devices, over which arrays are split."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
  )
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 2**11)
  if objective == "toy":
    monkeypatch.setattr(build, "build", toy_run.toy)

  def run(mesh, folder):
    c = mesh_run.recipe("dpo", mesh)
    c.checkpoint.update(every=mesh_run.STEPS // 2, keep=2)
    loop.run(c, str(folder))

  one, changed = tmp_path / "one", tmp_path / "changed"
  run((1, 1, 1), one)
  shutil.copytree(one, changed)
  shutil.rmtree(changed / "checkpoints" / str(mesh_run.STEPS))
  run((2, 2, 2), changed)
  found, expected = losses(changed), losses(one)
  assert [step for step, _ in found] == list(range(1, mesh_run.STEPS + 1))
  np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], rtol=1e-5)

  def compare(path, a, b):
    """Relative to the array, or to the way that so many steps of Adam can go where it started from 0."""
    if "['k_proj']['bias']" not in jax.tree_util.keystr(path):  # has no effect: its gradient is rounding
      way = mesh_run.STEPS * mesh_run.LEARNING_RATE * np.sqrt(b.size)
      assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), way), path

  (found, step), (expected, _) = checkpoint.load_params(changed), checkpoint.load_params(one)
  assert step == mesh_run.STEPS
  jax.tree_util.tree_map_with_path(compare, found, expected)


def test_the_comparison_sees_what_differs():
  def left(**changes):
    whole = {"state": {"params/a": np.float32([1, 2]), "b": np.float32([0])}, "data": {"batches": {"next_batch": 3}}}
    whole["metrics"] = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    return whole | {"export": {"x": "hash"}} | changes

  def passed(**changes):
    return tuple(chaos.compare(left(**changes), left(), exact=exact)["passed"] for exact in (True, False))

  assert passed() == (True, True)
  assert passed(state={"params/a": np.float32([1, 2.00001]), "b": np.float32([0])}) == (False, True)
  assert passed(state={"params/a": np.float32([1, 2]), "b": np.float32([-0.0])}) == (False, True)
  assert passed(state={"params/a": np.float32([1, 2.001]), "b": np.float32([0])}) == (False, False)
  assert passed(state={"params/a": np.float32([1, 2])}) == (False, False)
  assert passed(export={"x": "other"}) == (False, True)
  assert passed(data={"batches": {"next_batch": 4}}) == (False, False)
  rows = left()["metrics"]
  assert passed(metrics=[rows[0], rows[1] | {"loss": 0.2501}]) == (False, False)
  assert passed(metrics=[rows[0], rows[0], rows[1]]) == (False, False)
  assert passed(metrics=rows[:1]) == (False, False)


def run_chaos(tmp_path, *arguments):
  """The report of scripts/launch/chaos.py."""
  out = tmp_path / "chaos"
  done = subprocess.run(
    [*CHAOS, *arguments, f"--out={out}"], env=ENVIRONMENT, capture_output=True, text=True, timeout=3000
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "Passed" in out.with_suffix(".md").read_text()
  return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_left_alone(tmp_path):
  report = run_chaos(tmp_path, "--kills=3")
  assert report["passed"] and all(report["equal"].values()) and report["every_step_once"]
  assert len(report["kills"]) == 3 and report["kills"][-1]["hit"] == "evaluation"
  assert report["signals"] == {"SIGKILL": 2, "SIGTERM": 1}


@pytest.mark.slow  # training/command_test.py kills a run once
@pytest.mark.parametrize("kills", [10, 25])
def test_kills_of_a_run_that_compiles_in_no_time(tmp_path, kills):
  report = run_chaos(tmp_path, f"--kills={kills}", "--program=tests.toy_run")
  assert report["passed"] and all(report["equal"].values()) and report["every_step_once"]
  assert len(report["kills"]) == kills and report["num_steps"] == 4 * kills
  signals = {10: {"SIGKILL": 9, "SIGTERM": 1}, 25: {"SIGKILL": 22, "SIGTERM": 3}}[kills]
  assert report["hits"]["save"] >= kills // 5 and report["signals"] == signals


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--kills=25"], ["--kills=8", "--mesh_changes"]])
def test_a_run_survives_many_kills_bit_by_bit(tmp_path, arguments):
  report = run_chaos(tmp_path, *arguments)
  assert report["passed"] and report["hits"]["save"] >= 2
