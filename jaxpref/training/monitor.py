"""Monitors a run: alarms on the loss, where the time goes, profiles, and the record of a step that went wrong."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxpref.devices import sharding
from jaxpref.devices.progress import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# The loss


class LossMonitor:
  """Running mean and spread of the loss, and two alarms: a single loss far above it, and a mean that has risen.

  Both are exponential averages over about `1 / (1 - DECAY)` steps, without bias at the start. A loss counts at most as
  `SPIKE` standard deviations above the mean, so that one outlier does not hide the next.
  """

  DECAY = 0.98
  WARMUP = 50  # steps before the first possible alarm
  SPIKE = 6.0  # standard deviations

  def __init__(self) -> None:
    self._state: dict[str, float] = {
      "count": 0, "sum": 0.0, "sum_squares": 0.0, "lowest": math.inf, "spikes": 0,
    }  # fmt: skip

  def get_state(self) -> dict[str, Any]:
    """Returns JSON values, for the checkpoint."""
    return {**self._state, "lowest": None if math.isinf(self._state["lowest"]) else self._state["lowest"]}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues where `get_state` was called."""
    self._state |= dict(state) | {"lowest": math.inf if state["lowest"] is None else state["lowest"]}

  def _mean_and_deviation(self) -> tuple[float, float]:
    s = self._state
    weight = 1.0 - self.DECAY ** s["count"]
    mean = s["sum"] / weight
    return mean, math.sqrt(max(s["sum_squares"] / weight - mean * mean, 0.0))

  def see(self, loss: float) -> float | None:
    """Counts the finite loss of a step; returns how many deviations it lies above the mean, if that is a spike."""
    s, spike = self._state, None
    if s["count"] >= self.WARMUP:
      mean, deviation = self._mean_and_deviation()
      if loss > mean + self.SPIKE * deviation:
        spike = (loss - mean) / max(deviation, 1e-12)
        s["spikes"] += 1
        loss = mean + self.SPIKE * deviation
    s["count"] += 1
    s["sum"] = self.DECAY * s["sum"] + (1.0 - self.DECAY) * loss
    s["sum_squares"] = self.DECAY * s["sum_squares"] + (1.0 - self.DECAY) * loss * loss
    if s["count"] >= self.WARMUP:
      s["lowest"] = min(s["lowest"], self._mean_and_deviation()[0])
    return spike

  def metrics(self) -> dict[str, float]:
    """Returns `loss_mean`; `loss_spikes` so far; `diverging`, 1 while the mean is a deviation above its minimum."""
    if not self._state["count"]:
      return {}
    mean, deviation = self._mean_and_deviation()
    risen = mean - self._state["lowest"]
    diverging = self._state["count"] >= self.WARMUP and risen > deviation
    return {"loss_mean": mean, "loss_spikes": float(self._state["spikes"]), "diverging": float(diverging)}


# ---------------------------------------------------------------------------------------------------------------------
# Time


class Goodput:
  """Accounts the wall time of a run: it is always in one phase, and `step` is the productive one."""

  def __init__(self, phase: str):
    self._seconds: dict[str, float] = {}
    self._asked: dict[str, float] = {}
    self._phase, self._since = phase, time.perf_counter()

  def switch(self, phase: str) -> str:
    """Begins a phase, and returns the one before it."""
    now, before = time.perf_counter(), self._phase
    self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
    self._phase, self._since = phase, now
    return before

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Switches to another phase inside the block."""
    before = self.switch(name)
    try:
      yield
    finally:
      self.switch(before)

  def since_last(self, phase: str) -> float:
    """Returns the seconds of a phase since the last call for it."""
    now = self.seconds().get(phase, 0.0)
    before, self._asked[phase] = self._asked.get(phase, 0.0), now
    return now - before

  def seconds(self) -> dict[str, float]:
    """Returns seconds by phase; they sum to the time since the beginning."""
    self.switch(self._phase)
    return dict(self._seconds)

  def __str__(self) -> str:
    seconds = self.seconds()
    total = max(sum(seconds.values()), 1e-9)
    parts = [f"{name} {value:.1f} s" for name, value in seconds.items() if value >= 0.05]
    return f"goodput {seconds.get('step', 0.0) / total:.0%} of {total:.1f} s: {', '.join(parts)}"


@contextlib.contextmanager
def ticking(message: str, *, every: float = 1.0, after: float = 2.0) -> Iterator[None]:
  """Says what is going on, and on a terminal for how long, until the block ends; then how long it took."""
  if jax.process_index() != 0:
    yield
    return
  started, ended = time.perf_counter(), threading.Event()
  shown = message[: shutil.get_terminal_size().columns - 12]  # a longer line would not be written over
  terminal = sys.stderr.isatty()
  tqdm.write(f"{message} ...", file=sys.stderr)

  def tick() -> None:
    if ended.wait(after):
      return
    while True:
      sys.stderr.write(f"\r{shown}: {time.perf_counter() - started:.0f} s ")
      sys.stderr.flush()
      if ended.wait(every):
        return

  thread = threading.Thread(target=tick, daemon=True) if terminal else None
  if thread:
    thread.start()
  try:
    yield
  finally:
    ended.set()
    if thread:
      thread.join()
      sys.stderr.write("\r" + " " * (len(shown) + 11) + "\r")
  tqdm.write(f"{message}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Profiles


class Profiler:
  """A trace of some steps, and memory profiles when asked for by SIGUSR1."""

  def __init__(self, folder: pathlib.Path, start: int, stop: int):
    """Traces from the step `start` up to, not including, `stop`; equal numbers trace nothing."""
    self._folder = folder
    self._start, self._stop = start, stop
    self._tracing = False
    self._asked = False
    self._before: Any = None
    with contextlib.suppress(ValueError, AttributeError):  # not the main thread, or no such signal
      self._before = signal.signal(signal.SIGUSR1, self._ask)

  def _ask(self, *_: Any) -> None:
    self._asked = True

  def before_step(self, step: int, state: Any) -> str | None:
    """Starts and ends the trace, writes a requested memory profile; returns what to print.

    Args:
      state: state after the steps before, which must be done if there is anything to do.
    """
    said = None
    if self._tracing and step >= self._stop:
      jax.block_until_ready(state)
      said = self._end_trace()
    if self._start <= step < self._stop and not self._tracing:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder / "profile"))
      self._tracing = True
    if self._asked:
      self._asked = False
      jax.block_until_ready(state)
      path = self._folder / f"memory_before_step_{step:06d}.prof"
      jax.profiler.save_device_memory_profile(str(path))
      said = f"memory profile in {path} (open it with pprof)"
    return said

  def _end_trace(self) -> str:
    self._tracing = False
    jax.profiler.stop_trace()
    return f"profile in {self._folder / 'profile'} (tensorboard --logdir {self._folder}, with the xprof plugin)"

  def close(self) -> str | None:
    """Ends a running trace and stops listening; returns what to print."""
    if self._before is not None:
      signal.signal(signal.SIGUSR1, self._before)
      self._before = None
    return self._end_trace() if self._tracing else None


# ---------------------------------------------------------------------------------------------------------------------
# Steps that went wrong


def bad_step_folder(workdir: str | os.PathLike, step: int) -> pathlib.Path:
  """Returns the folder for the record of a step that went wrong."""
  return pathlib.Path(workdir) / f"bad_step_{step:06d}"


def write_bad_step(
  folder: pathlib.Path,
  batch: Mapping[str, jax.Array],
  *,
  step: int,
  metrics: Mapping[str, jax.Array],
  timesteps: jax.Array | None,
  names: Callable[[list[int]], list[str]],
  in_a_row: list[dict[str, float]],
) -> None:
  """Writes the batch of a step, each part in its own file, and a report on the step.

  Args:
    folder: `bad_step_folder`.
    batch: batch on the devices, as the step got it; `record` says which records its rows are.
    step: number of the step.
    metrics: metrics of the step, also those by bin of time.
    timesteps: [B] drawn for the rows; None if none are drawn.
    names: names of records, from their places.
    in_a_row: number, loss and gradient norm of this step and the non-finite ones before it.
  """
  folder.mkdir(parents=True, exist_ok=True)
  # NumPy has no bfloat16 of its own
  rows = {k: v.astype(np.float32) if v.dtype.name == "bfloat16" else v for k, v in _local_rows(batch).items()}
  first = next(iter(batch.values()))
  mesh = first.sharding.mesh if isinstance(first.sharding, NamedSharding) else None
  part, num_parts = sharding.batch_part(mesh) if isinstance(mesh, Mesh) else (0, 1)
  if any(shard.replica_id == 0 for shard in first.addressable_shards):  # not copies of other processes' rows
    with (folder / f"batch_{part:05d}.npz").open("wb") as file:
      np.savez(file, **rows)  # type: ignore[arg-type]
  places = multihost_utils.process_allgather(batch["record"], tiled=True).tolist() if "record" in batch else []
  if jax.process_index():
    return
  report = {
    "step": step,
    "num_parts": num_parts,
    "in_a_row": in_a_row,
    "metrics": jax.tree.map(lambda x: np.asarray(x).tolist(), dict(metrics)),
    "records": names(places),
    "timesteps": None if timesteps is None else timesteps.tolist(),
  }
  (folder / "report.json").write_text(json.dumps(_without_nan(report), indent=2) + "\n")


def read_bad_step(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns the whole batch, joined from its parts, and the report.

  Raises:
    FileNotFoundError: the folder does not hold one.
    ValueError: a file is missing or damaged.
  """
  folder = pathlib.Path(folder)
  path = folder / "report.json"
  if not path.is_file():
    raise FileNotFoundError(f"{folder} holds no report.json; expected a folder bad_step_... that training wrote.")
  try:
    report = json.loads(path.read_text())
    parts = []
    for part in range(report["num_parts"]):
      with np.load(folder / f"batch_{part:05d}.npz", allow_pickle=False) as file:
        parts.append(dict(file))
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"{folder} cannot be read ({error}); it needs report.json and all parts of the batch.") from error
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, report


def _local_rows(batch: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
  """Returns the rows on this process's devices, each once and in order."""
  found = {}
  for name, value in batch.items():
    pieces = {shard.index[0].start or 0: shard.data for shard in value.addressable_shards}
    found[name] = np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])
  return found


def _without_nan(value: Any) -> Any:
  """Replaces NaN and infinity by strings, as JSON cannot hold them."""
  if isinstance(value, Mapping):
    return {k: _without_nan(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_without_nan(v) for v in value]
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value
