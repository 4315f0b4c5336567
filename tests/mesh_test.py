"""The same training on any mesh and any number of processes: losses and parameters of six steps of every objective."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxpref.devices import sharding
from jaxpref.training import checkpoint, metrics
from tests import QUICK_FLAGS, mesh_run, rows_run

TOLERANCE = 1e-5
ONE = (1, 1, 1)
REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def on_one_device(folder):
  """on_one_device(objective) -> what a run on one device leaves."""
  found = {}

  def run(objective):
    if objective not in found:
      mesh_run.run(folder, ONE, [objective])
      found[objective] = left_by(mesh_run.workdir(folder, objective, ONE))
    return found[objective]

  return run


NOT_REPRODUCIBLE = {"time", "images_per_second", "data_wait_share", "step_seconds"}


def left_by(workdir):
  """(rows of metrics, parameters after the last step)."""
  rows = [
    {k: v for k, v in row.items() if k not in NOT_REPRODUCIBLE and not k.startswith(("host_", "slowest_"))}
    for row in metrics.read(workdir / "metrics.jsonl")
  ]
  return rows, checkpoint.load_params(workdir, mesh_run.STEPS)[0]


def assert_same(found, expected, objective):
  rows, expected_rows = found[0], expected[0]
  assert [row["step"] for row in rows] == list(range(1, mesh_run.STEPS + 1))
  for row, other in zip(rows, expected_rows, strict=True):
    assert row.keys() == other.keys()
    # Rows have six digits. The loss of grpo is a mean of advantages, which are of size 1 and cancel.
    atol = TOLERANCE if objective == "grpo" else 0
    np.testing.assert_allclose(row["loss"], other["loss"], rtol=TOLERANCE, atol=atol)
    if objective == "spo":  # the same pairs
      for key in ("valid_pairs", "updates"):
        assert row[key] == other[key]
    if objective in ("spo", "grpo"):
      for key in ("reward", "score_gap"):
        np.testing.assert_allclose(row[key], other[key], rtol=1e-4, err_msg=key)
  worst = {}

  def compare(path, a, b):
    """Relative to the array, or to the way that so many steps of Adam can go where it started from 0."""
    way = mesh_run.LEARNING_RATE * rows[-1]["optimizer_updates"] * np.sqrt(b.size)
    worst[jax.tree_util.keystr(path)] = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), way))

  jax.tree_util.tree_map_with_path(compare, found[1], expected[1])
  # A bias of CLIP's keys changes no attention weight: its gradient is rounding, which Adam makes steps of.
  worst = {name: value for name, value in worst.items() if "['k_proj']['bias']" not in name}
  name = max(worst, key=lambda k: worst[k])
  assert worst[name] <= TOLERANCE, (name, worst[name])


# In every run of the tests, training/step_test.py has meshes of stubs, devices/sharding_test.py and models/ those of
# networks, and the test below the rows of several processes.
@pytest.mark.slow
@pytest.mark.parametrize("objective", mesh_run.OBJECTIVES)
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=lambda mesh: "x".join(map(str, mesh)))
def test_a_mesh_changes_nothing(folder, on_one_device, objective, mesh):
  expected = on_one_device(objective)
  mesh_run.run(folder, mesh, [objective])
  assert_same(left_by(mesh_run.workdir(folder, objective, mesh)), expected, objective)


def start(arguments, processes, folder):
  """Runs `python -m ARGUMENTS PORT NUM_PROCESSES PROCESS_ID` as so many processes; what each has printed."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = dict(os.environ, XLA_FLAGS=QUICK_FLAGS, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
  logs = [folder / f"{arguments[0]}_{processes}_{i}.log" for i in range(processes)]
  running = []
  for i, log in enumerate(logs):
    command = [sys.executable, "-m", *arguments, str(port), str(processes), str(i)]
    with log.open("w") as file, log.with_suffix(".out").open("w") as out:
      running.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=out, stderr=file))
  try:
    codes = [process.wait(timeout=1500) for process in running]
  finally:
    for process in running:
      process.kill()
  assert codes == [0] * processes, logs[int(np.argmax(np.abs(codes)))].read_text()[-3000:]
  return [log.with_suffix(".out").read_text() for log in logs]


@pytest.mark.parametrize(
  "sizes", [(2, 1, 2), pytest.param((4, 1, 1), marks=pytest.mark.slow)], ids=lambda sizes: "x".join(map(str, sizes))
)
def test_four_processes_hold_the_rows_of_one(sizes, tmp_path, monkeypatch):
  """Those whose devices share a row, which `tensor` spreads over them, read the same one."""
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
  rows = np.asarray(rows_run.batch_of((1, 1, 1))["record"])
  found = [json.loads(text) for text in start(["tests.rows_run", ",".join(map(str, sizes))], 4, tmp_path)]
  number = rows.size // (sizes[0] * sizes[1])
  for process, pieces in enumerate(found):
    ((place, records),) = pieces
    assert place == process // sizes[2] * number
    np.testing.assert_array_equal(records, rows[place : place + number])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "objectives"),
  [
    ((1, 2, 1), ("spm",)),  # compiles fastest
    ((1, 2, 1), ("dpo", "tdpo", "spo", "grpo")),
    ((2, 1, 2), mesh_run.OBJECTIVES),
  ],
  ids=lambda value: "x".join(map(str, value)),
)
def test_the_number_of_processes_changes_nothing(folder, on_one_device, mesh, objectives):
  """One device each, so that parameters as well as batches are spread over processes."""
  expected = {objective: on_one_device(objective) for objective in objectives}
  processes = int(np.prod(mesh))
  start(["tests.mesh_run", str(folder), ",".join(map(str, mesh)), ",".join(objectives)], processes, folder)
  for objective in objectives:
    workdir = folder / f"{objective}_{'x'.join(map(str, mesh))}_{processes}"
    assert_same(left_by(workdir), expected[objective], objective)
