"""The loop: what it writes, what it survives, and that a killed run ends as one that was not."""

import dataclasses
import gzip
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import distributed as distributed_runtime

from jaxpref import config, reference
from jaxpref import main as main_lib
from jaxpref.data import batching, lease
from jaxpref.training import build, checkpoint, loop, metrics, monitor, programs, step, validation
from tests.toy_objective import Toy


class Batches:
  """Numbered batches with a state, as the data pipeline gives."""

  def __init__(self, poisoned=(), jump=()):
    self.next, self.poisoned, self.jump = 0, poisoned, jump

  def __next__(self):
    self.next += 1
    value = math.nan if self.next in self.poisoned else float(self.next) * (1e3 if self.next in self.jump else 1)
    return {"x": np.full(8, value, np.float32), "record": np.arange(8 * self.next, 8 * self.next + 8, dtype=np.int32)}

  def get_state(self):
    return {"next_batch": self.next}

  def set_state(self, state):
    self.next = state["next_batch"]

  def num_skipped(self):
    return 0

  def names(self, places):
    return [f"record {place}" for place in places]

  def close(self):
    pass


def toy_config(**overrides):
  c = config.default()
  c.update(objective="dpo", num_steps=6, batch_size=8)
  c.optimizer.learning_rate = 0.1
  c.logging.every = 1
  c.checkpoint.every = 2
  c.update_from_flattened_dict(overrides)
  return c


def toy_loss(w, batch, key):
  """Random, so that a replayed or skipped draw shows."""
  target = jnp.mean(batch["x"]) + jax.random.normal(key, (4,)) + w.policy["offset"]
  error = (w.policy["w"] - target) ** 2 + 0.1 * (w.policy["w"] - w.reference["w"]) ** 2
  return jnp.sum(error), jnp.float32(4), {"error": (jnp.sum(error), jnp.float32(4))}


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(config, batches, folder=, loss=) -> results; exported parameters are written as numbers."""

  def go(config, batches=None, folder="run", loss=toy_loss, **options):
    experiment = build.Experiment(
      params={"w": jnp.zeros(4)},
      frozen={"offset": jnp.ones(())},
      objective=Toy(loss, lambda w, batch, key: jnp.sum(w.reference["w"]) * 1e-6),
      batches=lambda: batches or Batches(),
      export=lambda params, where: where.write_text(json.dumps(params["w"].tolist())),
      has_reference=True,
      images_per_step=8,
    )
    monkeypatch.setattr(build, "build", lambda config, sharding, **kwargs: experiment)
    return loop.run(config, str(tmp_path / folder), **options)

  go.folder = tmp_path
  return go


NOT_REPRODUCIBLE = ("time", "images_per_second", "data_wait_share")


def rows(folder):
  found = metrics.read(folder / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in NOT_REPRODUCIBLE} for row in found]


def states(folder):
  """Digest of every kept checkpoint's arrays and its data state."""
  found = {}
  for path in sorted((folder / "checkpoints").iterdir()):
    if path.name.isdigit():
      import orbax.checkpoint as ocp

      state = ocp.StandardCheckpointer().restore(path / "state")
      data = json.loads((path / "data" / "metadata").read_text())["data"]
      found[int(path.name)] = (checkpoint.digest(state), data)
  return found


@pytest.fixture
def sigint_is_heard():
  """In the background of a script it is ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_is_heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_an_interrupted_run_ends_like_one_that_was_not(run, monkeypatch, capsys, number, code):
  """Stopped between two checkpoints by a signal; the rows are logged every other step. Batches were drawn ahead."""
  options = {"num_steps": 9, "logging.every": 2, "reference.mode": "update", "reference.tau": 3}
  run(toy_config(**options), folder="whole")

  taken, take = [], batching.Prefetched.__next__

  def terminate_in_step_5(prefetched):
    taken.append(take(prefetched))
    if len(taken) == 5:
      while batches.next < 7:  # the two that come after the batch of step 5
        time.sleep(0.01)
      os.kill(os.getpid(), number)
      time.sleep(0.3)
    return taken[-1]

  before, batches = signal.getsignal(number), Batches()
  with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
    patch.setattr(batching.Prefetched, "__next__", terminate_in_step_5)
    run(toy_config(**options), batches)
  assert stopped.value.code == code and batches.next == 7
  assert signal.getsignal(number) == before
  cause = {0: "a signal", 130: "Ctrl-C"}[code]
  assert f"stopped at step 5 by {cause}; the same command resumes." in capsys.readouterr().err
  step, (_, data_state) = max(states(run.folder / "run").items())
  assert step == 5 and data_state["batches"] == {"next_batch": 5}  # between the checkpoints of 4 and 6
  run(toy_config(**options))
  assert rows(run.folder / "run") == rows(run.folder / "whole")
  assert [r["step"] for r in rows(run.folder / "run")] == [1, 2, 4, 6, 8, 9]
  last = [max(states(run.folder / f).items()) for f in ("run", "whole")]
  assert last[0] == last[1] and last[0][0] == 9
  exported = [(run.folder / f / "export").read_text() for f in ("run", "whole")]
  assert exported[0] == exported[1]


class Service:
  """Of the processes of a run: what they tell each other."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value):
    if key in self.values:
      raise RuntimeError("ALREADY_EXISTS")
    self.values[key] = value

  def key_value_try_get(self, key):
    if key not in self.values:
      raise RuntimeError("NOT_FOUND")
    return self.values[key]


@pytest.fixture
def stops(monkeypatch):
  """What two processes of a run ask whether to stop, and the SIGTERMs that JAX has seen; its sync point is step 7."""
  terminated = []
  before = signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
  monkeypatch.setattr(distributed_runtime.global_state, "client", Service())
  monkeypatch.setattr(distributed_runtime.global_state, "process_id", 0)
  monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
  reached = lambda step: bool(terminated) and step == 7
  monkeypatch.setattr(loop.multihost_utils, "reached_preemption_sync_point", reached)
  yield loop._Stop(), loop._Stop(), terminated
  signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("pressed", [(0,), (1,), (0, 1)])
def test_ctrl_c_at_some_processes_stops_all_at_one_step_with_one_code(stops, capsys, pressed):
  *both, _ = stops
  for i in pressed:
    both[i].interrupted()
  assert [[stop(done) for done in (5, 6, 7)] for stop in both] == [[False, False, True]] * 2
  assert [(stop.code, stop.cause) for stop in both] == [(130, "Ctrl-C")] * 2
  assert capsys.readouterr().err.count("stopping: this step is finished and saved first") == 1


def test_processes_that_are_terminated_stop_with_code_0(stops):
  *both, terminated = stops
  terminated.append(1)
  assert all(stop(7) for stop in both)
  assert [(stop.code, stop.cause) for stop in both] == [(0, "a signal")] * 2


@pytest.mark.parametrize("pressed", [(0,), (1,), (0, 1)])
def test_processes_agree_on_a_ctrl_c_that_comes_while_the_last_step_is_saved(stops, pressed):
  *both, terminated = stops
  assert not any(stop(done) for done in (7, 8) for stop in both)
  for i in pressed:
    both[i].interrupted()
  assert all(stop.too_late() for stop in both)
  terminated.clear()
  for stop in both:
    stop.close()
    stop.interrupted()
  assert not terminated  # it would end the process


def test_a_finished_run_is_not_trained_again(run):
  run(toy_config())
  before = states(run.folder / "run")
  batches = Batches()
  run(toy_config(), batches)
  assert batches.next == 6 and states(run.folder / "run") == before
  run(toy_config(num_steps=8), batches)  # more steps continue it
  assert max(states(run.folder / "run")) == 8
  assert [r["step"] for r in rows(run.folder / "run")] == list(range(1, 9))


def files(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_fewer_steps_than_a_run_has_made_are_refused_before_anything_is_written(run):
  run(toy_config())
  before, batches = files(run.folder / "run"), Batches()
  with pytest.raises(ValueError, match=r"run is at step 6, and config.num_steps is 4; set .* least 6, or"):
    run(toy_config(num_steps=4), batches)
  assert files(run.folder / "run") == before and batches.next == 0
  assert json.loads(before[pathlib.Path("config.json")])["num_steps"] == 6


def test_the_results_of_an_earlier_end_do_not_pass_for_those_of_a_run_that_goes_on(run, capsys):
  """Whoever finds export/ takes the run for finished: jaxpref.sample, and the scripts that start a job again."""
  folder, aside = run.folder / "run", run.folder / "run" / "results_of_step_6"
  run(toy_config())
  (folder / "results.json").write_text("{}")
  exported = (folder / "export").read_bytes()
  with pytest.raises(loop.NonFiniteError):
    run(toy_config(num_steps=12, max_bad_steps=1), Batches(poisoned=[9, 10]))
  assert not (folder / "export").exists() and not (folder / "results.json").exists()
  assert (aside / "export").read_bytes() == exported and (aside / "results.json").exists()
  assert f"the results of step 6 are now in {aside}" in capsys.readouterr().err
  run(toy_config(num_steps=12))
  assert (folder / "export").read_bytes() != exported == (aside / "export").read_bytes()
  run(toy_config(num_steps=12))  # at its end: everything stays
  assert sorted(p.name for p in folder.glob("results_of_step_*")) == ["results_of_step_6"]


def test_a_run_that_cannot_be_continued_keeps_its_config_and_its_results(run):
  run(toy_config())
  for saved in (run.folder / "run" / "checkpoints").iterdir():
    (saved / "data" / "metadata").write_text("{}")
  before = files(run.folder / "run")
  with pytest.raises(ValueError, match="no checkpoint in .* can be used"):
    run(toy_config(num_steps=12))
  assert files(run.folder / "run") == before


def test_a_second_start_is_refused_and_changes_nothing(run):
  """In the middle of a step of the first one, from another thread, as from another process."""
  refused = []

  class Meddling(Batches):
    def __next__(self):
      if self.next == 3:
        metrics_before = (run.folder / "run" / "metrics.jsonl").read_bytes()
        with pytest.raises(lease.Occupied, match="is being written by another thread"):
          loop.run(toy_config(), str(run.folder / "run"))
        assert (run.folder / "run" / "metrics.jsonl").read_bytes().startswith(metrics_before)
        refused.append(self.next)
      return super().__next__()

  run(toy_config(), Meddling())
  assert refused == [3]
  assert [r["step"] for r in rows(run.folder / "run")] == list(range(1, 7))
  assert not list((run.folder / "run").glob("*lock*"))


def test_a_run_whose_folder_was_taken_over_stops_without_saving(run):
  class TakenOver(Batches):
    def __next__(self):
      if self.next == 3:
        lock = run.folder / "run" / lease.NAME
        other = dataclasses.replace(lease.Writer.here(), host="gpu012", token="another")
        lock.with_name("part").write_bytes(other.encode())
        lock.with_name("part").replace(lock)
        held = lease._held[str(lock)]
        held._renewed -= lease.EXPIRE_SECONDS
        deadline = time.monotonic() + 60
        while not held._lost and time.monotonic() < deadline:
          time.sleep(0.01)
      return super().__next__()

  with pytest.raises(lease.Occupied, match="was taken over by process .* on host gpu012"):
    run(toy_config(**{"checkpoint.every": 5}), TakenOver())
  assert states(run.folder / "run") == {}
  assert (run.folder / "run" / lease.NAME).exists()  # it is the other one's


def test_steps_that_are_not_finite_are_left_out_and_counted(run, capsys):
  """Their number follows from the config alone, whatever is logged and when the run is interrupted."""
  options = {"num_steps": 8, "logging.every": 4, "max_bad_steps": 2}
  options |= {"optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 10}
  run(toy_config(**options), Batches(poisoned=(3, 5, 6)), folder="whole")
  said = capsys.readouterr().err
  assert "step 5: loss nan" in said and "(2 in a row; after more than 2 training stops)" in said
  found = rows(run.folder / "whole")
  assert [r["step"] for r in found] == [1, 3, 4, 5, 6, 8]
  assert [r["skipped_updates"] for r in found] == [0, 1, 0, 1, 1, 0]
  assert ["loss" in r for r in found] == [True, False, True, False, False, True]
  # The learning rate follows the updates that were made, and a row has that of the last one.
  assert [r["optimizer_updates"] for r in found] == [1, 2, 3, 3, 3, 5]
  np.testing.assert_allclose([r["learning_rate"] for r in found], [0, 1e-3, 2e-3, 2e-3, 2e-3, 4e-3], rtol=1e-5)
  run(toy_config(**options | {"num_steps": 5}), Batches(poisoned=(3, 5, 6)))
  run(toy_config(**options), Batches(poisoned=(3, 5, 6)))
  assert rows(run.folder / "run") == found  # step 5 was the last for a while
  assert states(run.folder / "run")[8] == states(run.folder / "whole")[8]


def test_too_many_steps_that_are_not_finite_stop_the_run(run):
  options = {"checkpoint.every": 10, "max_bad_steps": 2, "num_steps": 12}
  with pytest.raises(loop.NonFiniteError) as error:
    run(toy_config(**options), Batches(poisoned=range(5, 9)))
  folder = run.folder / "run" / "bad_step_000007"
  assert re.match(
    r"step 7: loss or gradient was not finite in 3 steps in a row, so the parameters are those of step 4; .*"
    rf"python -m jaxpref.replay {folder}.*learning_rate",
    str(error.value),
  )
  batch, report = monitor.read_bad_step(folder)
  np.testing.assert_array_equal(batch["record"], range(56, 64))
  assert np.isnan(batch["x"]).all()
  assert report["step"] == 7 and [r["step"] for r in report["in_a_row"]] == [5, 6, 7]
  assert report["records"] == [f"record {i}" for i in range(56, 64)]
  assert report["metrics"]["loss"] == report["in_a_row"][2]["loss"] == "nan"
  assert not (run.folder / "run" / "export").exists()
  # What was trained until then is kept: the checkpoint is that of step 4 but for the count of steps.
  assert list(states(run.folder / "run")) == [7]
  # The same command goes on with the batches that follow, and stops when they are no better.
  batches = Batches(poisoned=range(5, 9))
  run(toy_config(**options), batches)
  assert [r["step"] for r in rows(run.folder / "run")] == list(range(1, 13))
  assert rows(run.folder / "run")[7]["skipped_updates"] == 1  # step 8


def test_alarms_are_metrics_and_outlive_an_interruption(run, capsys):
  options = {"num_steps": 70, "logging.every": 10, "checkpoint.every": 100}
  run(toy_config(**options), Batches(jump=(60, 64)), folder="whole")
  assert "step 60: loss" in (said := capsys.readouterr().err)
  assert "standard deviations above its running mean" in said
  assert [r["loss_spikes"] for r in rows(run.folder / "whole")][-2:] == [1, 2]
  run(toy_config(**options | {"num_steps": 62}), Batches(jump=(60, 64)))
  run(toy_config(**options), Batches(jump=(60, 64)))
  assert rows(run.folder / "run")[-1] == rows(run.folder / "whole")[-1]


def test_nothing_is_compiled_after_the_first_checkpoint(run):
  """See tests/cost_test.py for what the step itself does not do."""
  batches, compiled = Batches(), []

  def listen(event, seconds, **kwargs):
    del seconds, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(batches.next)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    run(toy_config(num_steps=40, **{"checkpoint.every": 5, "logging.every": 3}), batches)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  during = [n for n in compiled if n < 40]  # batches are drawn a few steps ahead; after the last comes the export
  assert during and max(during) < 12


def test_steps_are_profiled_and_memory_on_request(run, monkeypatch, capsys):
  """SIGUSR1 in step 5."""
  taken, take = [], batching.Prefetched.__next__

  def ask_in_step_5(prefetched):
    taken.append(take(prefetched))
    if len(taken) == 5:
      os.kill(os.getpid(), signal.SIGUSR1)
    return taken[-1]

  before = signal.getsignal(signal.SIGUSR1)
  monkeypatch.setattr(batching.Prefetched, "__next__", ask_in_step_5)
  run(toy_config(profile_steps="2:4"))
  assert signal.getsignal(signal.SIGUSR1) == before
  (trace,) = (run.folder / "run" / "profile").rglob("*.xplane.pb")
  assert trace.parent.parent.name == "profile" and trace.parent.parent.parent.name == "plugins"
  (memory,) = (run.folder / "run").glob("memory_before_step_*.prof")
  assert gzip.decompress(memory.read_bytes()) and memory.name == "memory_before_step_000005.prof"
  said = capsys.readouterr().err
  assert "tensorboard --logdir" in said and str(memory) in said
  (goodput,) = re.findall(r"^goodput \d+% of ([\d.]+) s: (.*)$", said, re.MULTILINE)
  parts = [float(part.split()[-2]) for part in goodput[1].split(", ")]  # those of less than 0.05 s are left out
  assert parts and abs(sum(parts) - float(goodput[0])) < 0.5


def test_parameters_that_are_not_finite_are_never_saved(run):
  """An absurd learning rate: loss and gradient of the step itself are still finite."""
  c = toy_config(**{"optimizer.learning_rate": 1e30, "optimizer.name": "sgd", "num_steps": 1})
  c.optimizer.clip_norm = 1e20

  def loss(w, batch, key):
    del batch, key
    return 1e18 * jnp.sum(w.policy["w"] + 1), jnp.float32(1), {}

  with pytest.raises(loop.NonFiniteError, match=r"step 1: .*not finite.*No checkpoint yet"):
    run(c, loss=loss)
  assert states(run.folder / "run") == {}


def test_the_first_loss_of_an_absurd_learning_rate(run):
  c = toy_config(**{"optimizer.learning_rate": 1e30, "optimizer.name": "sgd", "max_bad_steps": 2})
  c.optimizer.clip_norm = 0.0
  with pytest.raises(loop.NonFiniteError, match=r"not finite"):
    run(c)


def test_metrics_are_those_of_the_step(run):
  c = toy_config(**{"reference.mode": "update", "reference.tau": 2, "optimizer.warmup_steps": 4})
  run(c)
  found = metrics.read(run.folder / "run" / "metrics.jsonl")
  for row in found:
    assert {"loss", "grad_norm", "error", "divergence", "images_per_second", "time"} <= set(row)
    assert row["reference_updates"] == row["step"] // 2
    # The rate that the step's update was made with: a warm-up starts from 0.
    np.testing.assert_allclose(row["learning_rate"], 0.1 * min(1, (row["step"] - 1) / 4), rtol=1e-5)


def test_nothing_is_written_before_the_config_is_known_to_work(run):
  for options, message in (
    ({"optimizer.name": "adamx"}, "optimizer.name='adamx'"),
    ({"optimizer.schedule": "linear", "optimizer.warmup_steps": 6}, "warmup_steps=6"),
    ({"batch_size": 12}, "batch_size=12 cannot be split evenly over data=8"),
    ({"mesh.data": 3}, "does not cover 8 devices"),
  ):
    with pytest.raises(ValueError, match=message):
      run(toy_config(**options))
  assert list(run.folder.iterdir()) == []


def test_held_out_batches_are_averaged_by_what_they_count():
  """The trained parameters on batches of the mesh, each with a key of its own; not a mean of means."""
  drawn = []

  class HeldOut(Batches):
    batch_size = 8

    def close(self):
      drawn.append(self.next)

  def loss(w, batch, key):
    count = jnp.sum(batch["x"])  # 8, 16, 24: the later the more
    found = {"accuracy": (w.policy["w"] * w.policy["factor"] * count * batch["x"][0], count)}
    return jnp.nan, jnp.nan, found | {"noise": (jax.random.normal(key), 1.0)}

  experiment = build.Experiment(
    params=None,
    frozen=None,
    batches=lambda: None,
    export=lambda *_: None,
    objective=Toy(loss),
    held_out=HeldOut,
  )
  mesh = loop.sharding.make_mesh(devices=jax.devices()[:2])
  state = step.initial_state({"w": jnp.float32(3)}, {}, ())
  found = validation.held_out_metrics(experiment, mesh, {"factor": jnp.float32(2)}, state, least=20)
  assert set(found) == {"validation_accuracy", "validation_noise"} and drawn == [3]
  np.testing.assert_allclose(found["validation_accuracy"], 6 * (1 + 4 + 9) / (1 + 2 + 3), rtol=1e-6)
  noise = np.mean([jax.random.normal(jax.random.key(i)) for i in range(3)])
  np.testing.assert_allclose(found["validation_noise"], noise, rtol=1e-5)


def test_a_loss_whose_mean_rises_is_said_to_diverge():
  noise = np.random.default_rng(0).normal(0.0, 0.1, 400)
  for slope, expected in ((0.005, 1.0), (0.0, 0.0), (-0.002, 0.0)):
    alarm = monitor.LossMonitor()
    for step_number, jitter in enumerate(noise):
      alarm.see(2.0 + slope * max(0, step_number - 200) + float(jitter))
      if step_number == 199:
        assert alarm.metrics()["diverging"] == 0
        again = monitor.LossMonitor()  # as a run that continues
        again.set_state(json.loads(json.dumps(alarm.get_state())))
        alarm = again
    assert alarm.metrics()["diverging"] == expected


@pytest.mark.parametrize("kept", ["moved", "frozen", "read"])
def test_the_base_model_is_what_training_started_from(tmp_path, monkeypatch, capsys, kept):
  """Wherever its weights are; pictures have the brightness of the weights, and the judge likes bright ones."""

  class Drawer:
    mesh = loop.sharding.make_mesh(devices=jax.devices()[:1])

    def draw(self, weights, captions, *, seeds_per_prompt, progress):
      return np.full((len(captions), seeds_per_prompt, 2, 2, 3), int(weights["w"]), np.uint8)

  def score(judge, params, images, classes, **kwargs):
    brightness = images.mean(axis=(2, 3, 4))
    return {"style_log_prob": brightness, "preferred": brightness > 100.0, "correct": brightness < 220.0}

  monkeypatch.setattr(validation.judging, "score", score)
  base, aligned = {"w": jnp.float32(10)}, {"w": jnp.float32(200)}
  c = config.default()
  c.reference.mode = "update" if kept == "moved" else "frozen"
  reference = {"moved": {"w": jnp.float32(150)}, "frozen": base, "read": {}}[kept]
  (tmp_path / "metrics.jsonl").write_text("")
  experiment = build.Experiment(
    params=None,
    frozen=None,
    batches=lambda: None,
    export=lambda *_: None,
    objective=Toy(None),
    judge=object(),
    has_reference=kept != "read",
    read_base=lambda: base,
  )
  state = step.initial_state(aligned, reference, ())
  found = validation.compare_with_base(c, experiment, Drawer(), base if kept == "moved" else {}, state, tmp_path)
  assert found["base"]["preferred_share"]["mean"] == 0 and found["aligned"]["preferred_share"]["mean"] == 1
  assert found["win_rate"] == 1 and found["base"]["caption_accuracy"]["mean"] == 1
  assert (tmp_path / "before_after.png").is_file()
  assert (tmp_path / "table.md").read_text() == f"{found['table']}\n\n{found['in_words']}\n"
  # Without matplotlib all is there but for curves.png.
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  (tmp_path / "table.md").unlink()
  validation.compare_with_base(c, experiment, Drawer(), base if kept == "moved" else {}, state, tmp_path)
  assert (tmp_path / "table.md").is_file() and "curves.png is left out" in capsys.readouterr().err


def test_the_end_says_what_happened_and_where_the_page_is(run, capsys, monkeypatch):
  run(toy_config(), command="python -m jaxpref.main --config=a.py")
  folder = run.folder / "run"
  goodput, words, where = capsys.readouterr().err.splitlines()[-3:]
  assert goodput.startswith("goodput ") and re.fullmatch(r"From step 1 to 6 the loss went from \S+ to \S+\.", words)
  assert where == f"page: {folder / 'index.html'}"
  content = (folder / "index.html").read_text()
  assert "6 steps, finished" in content and "python -m jaxpref.main --config=a.py" in content

  def full(folder):
    raise OSError(28, "No space left on device")

  # A disk that is full now does not take away that the run has ended.
  monkeypatch.setattr(loop.run_page, "make", full)
  run(toy_config(num_steps=8))
  assert "index.html cannot be written" in capsys.readouterr().err
  assert "6 steps" in (folder / "results_of_step_6" / "index.html").read_text() and (folder / "export").exists()


def test_the_end_names_the_command_that_comes_next():
  kinds = {"draws": {"evaluable": True}, "SPO": {"trains": "SPO"}, "LPO": {"trains": "LPO"}, "other": {}}
  said = {}
  for name, fields in kinds.items():
    of = build.Experiment(params=None, frozen=None, batches=list, export=lambda *_: None, objective=None, **fields)
    said[name] = loop._next(of, pathlib.Path("my runs/a"), 3.5)
  assert said["draws"].startswith("python -m jaxpref.sample --model='my runs/a' --guidance_scale=3.5 --prompt=")
  for method in ("SPO", "LPO"):
    assert said[method].startswith(f"{method} trains on it with --config.preference_model='my runs/a/export' (")
    assert (pathlib.Path(__file__).parents[2] / said[method].split("(")[1].rstrip(")")).is_file()
  assert said["other"] == ""


def test_numbers_without_a_table_have_four_digits():
  assert loop._numbers({"table": "| a |", "x": 0.1}) == "| a |"
  assert json.loads(loop._numbers({"accuracy": 0.20312499, "pairs": 3})) == {"accuracy": 0.2031, "pairs": 3}


@pytest.mark.parametrize("delta", [1e9, 0.0])
def test_the_fields_of_the_reference_arrive(delta, monkeypatch):
  """A proposal by alpha and rho, accepted below delta, and else what on_diverge says."""
  c = config.default()
  c.reference.update(mode="update", alpha=0.25, rho=0.1, tau=3, delta=delta, on_diverge="reinit")
  ref, params, init = ({"w": jnp.full(2, value)} for value in (1.0, 5.0, 0.5))
  seen = []
  experiment = build.Experiment(
    params=None,
    frozen=None,
    batches=lambda: None,
    export=lambda *_: None,
    objective=Toy(None, lambda w, *_: seen.append(w) or jnp.sum(w.reference["w"])),
    has_reference=True,
  )
  given = []
  monkeypatch.setattr(step, "make_halves", lambda *args, **options: given.append(options["moving"]))
  stats = reference.ReferenceStats.zeros()

  def move(step_number, policy, stats):
    given.clear()
    programs.make_halves(c, experiment, None, loop.sharding.make_mesh(devices=jax.devices()[:1]))
    state = dataclasses.replace(step.initial_state(policy, ref, ()), step=jnp.int32(step_number), ref_stats=stats)
    with jax.disable_jit():
      return given[0].move(experiment.objective, state, init, {}, jax.random.key(0))

  still, _ = move(2, params, stats)
  moved, after = move(3, params, stats)
  proposed = reference.propose(ref, params, init, alpha=0.25, rho=0.1)
  np.testing.assert_array_equal(still["w"], ref["w"])
  np.testing.assert_allclose(seen[-1].reference["w"], proposed["w"])
  assert seen[-1].base is init
  np.testing.assert_allclose(moved["w"], proposed["w"] if delta > 0 else init["w"])
  assert after.accepted == (delta > 0) and after.resets == (delta == 0)
  # The mean of D that the gate reads: after 4, half as much of the past and so on, or the last one alone.
  high = {"w": jnp.full(2, 9.0)}
  for decay in (0.5, 0.0):
    c.reference.update(delta=1e9, decay=decay)
    stats = reference.ReferenceStats.zeros()
    for policy in (params, high):
      _, stats = move(3, policy, stats)
    proposals = [reference.propose(ref, policy, init, alpha=0.25, rho=0.1) for policy in (params, high)]
    first, last = (float(jnp.sum(p["w"])) for p in proposals)
    np.testing.assert_allclose(stats.divergence, (first * decay + last) / (1 + decay), rtol=1e-6)


def test_a_run_whose_learning_rate_decays_keeps_its_length():
  constant, decaying = config.default(), config.default()
  decaying.optimizer.schedule = "cosine"
  assert "num_steps" in loop.may_change(constant)
  assert "num_steps" not in loop.may_change(decaying) and "logging." in loop.may_change(decaying)


def test_compiled_steps_are_kept_and_virtual_devices_have_threads():
  found = {"XDG_CACHE_HOME": "/caches", "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --other"}
  main_lib.set_defaults(found)
  assert found["JAX_COMPILATION_CACHE_DIR"] == "/caches/jaxpref/compiled" and found["NPROC"] == "32"
  assert found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
  assert found["XLA_CLIENT_MEM_FRACTION"] == "0.92"
  chosen = {"JAX_COMPILATION_CACHE_DIR": "/mine", "NPROC": "3", "XLA_FLAGS": found["XLA_FLAGS"]}
  chosen["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.5"
  main_lib.set_defaults(chosen)
  assert "XLA_CLIENT_MEM_FRACTION" not in chosen  # JAX refuses both
  assert chosen["JAX_COMPILATION_CACHE_DIR"] == "/mine" and chosen["NPROC"] == "3"
  alone: dict[str, str] = {}
  main_lib.set_defaults(alone)
  assert "NPROC" not in alone and alone["JAX_COMPILATION_CACHE_DIR"].endswith(".cache/jaxpref/compiled")


def test_other_threads_may_train(run):
  """Signals can be handled in the main thread only."""
  errors = []

  def target():
    try:
      run(toy_config(num_steps=1))
    except BaseException as error:
      errors.append(error)

  thread = threading.Thread(target=target)
  thread.start()
  thread.join()
  assert not errors and (run.folder / "run" / "export").exists()
