"""Watches a run while it trains: bad steps, spikes of the loss, where the time goes, and its metrics."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from jaxpref.data import batching
from jaxpref.devices import distributed
from jaxpref.devices.progress import tqdm
from jaxpref.training import metrics, monitor


class Seen(NamedTuple):
  """A step, its metrics on the devices, and its batch."""

  done: int
  values: Any
  batch: Any


class Watch:
  """Reads the metrics of each step one step late, so that dispatch stays asynchronous.

  Attributes:
    bad: number, loss and gradient norm of the steps without an update since the last one with an update.
    bar: progress bar, if one is shown.
    on_failed: called with the last of more than `max_bad_steps` bad steps, after which training stops.
  """

  # Many parameters: what is watched, and the numbers behind its metrics.
  def __init__(
    self,
    *,
    first_step: int,
    num_steps: int,
    every: int,
    max_bad_steps: int,
    images_per_step: int,
    schedule: optax.Schedule,
    batches: batching.Batches,
    writer: metrics.Writer,
    goodput: monitor.Goodput,
    losses: monitor.LossMonitor,
    say: Callable[[str], None],
  ):
    """Starts watching: metrics are written `every` so many steps; `say` prints a line."""
    self._num_steps, self._every, self._max_bad_steps = num_steps, every, max_bad_steps
    self._images_per_step, self._schedule, self._batches = images_per_step, schedule, batches
    self._writer, self._goodput, self._losses, self._say = writer, goodput, losses, say
    self._pending: Seen | None = None
    self._since, self._since_step = time.perf_counter(), first_step
    self._on_devices = 0.0  # seconds since then that this process waited for the devices, and so for others
    self.bad: list[dict[str, float]] = []
    self.bar: tqdm | None = None
    self.on_failed: Callable[[Seen], None] = lambda seen: None

  def start_clock(self) -> None:
    """Starts the clock as the first step begins."""
    self._since = time.perf_counter()

  def dispatched(self, seconds: float) -> None:
    """Counts the seconds that dispatching a step took, in which this process waited for the devices."""
    self._on_devices += seconds

  def not_training(self, seconds: float) -> None:
    """Leaves out the seconds of something that is not part of a step."""
    self._since += seconds

  def step(self, done: int, values: Any, batch: Any) -> None:
    """Takes a pending step and reads the one before it. After a bad step each is read at once, so that none follows."""
    self.settle()
    self._pending = Seen(done, values, batch)
    if self.bad:
      self.settle()

  def settle(self) -> None:
    """Reads the step that is still pending."""
    seen, self._pending = self._pending, None
    if seen is not None:
      self._read(seen)

  def _read(self, seen: Seen) -> None:
    started = time.perf_counter()
    scalars = metrics.to_scalars({k: seen.values[k] for k in ("loss", "grad_norm", "skipped_updates")})
    updates = float(seen.values.get("updates", 1.0))
    self._on_devices += time.perf_counter() - started
    if self.bar is not None:
      self.bar.set_postfix(loss=f"{scalars['loss']:.4f}", refresh=False)
    self._judge(seen.done, scalars, updates)
    if self.bad or seen.done % self._every == 0 or seen.done in (1, self._num_steps):  # whether resumed or not
      self._write(seen, scalars)
    if len(self.bad) > self._max_bad_steps:
      self.on_failed(seen)

  def _judge(self, done: int, scalars: dict[str, float], updates: float) -> None:
    """Reports what is wrong with a step, and counts bad ones in a row."""
    if scalars["skipped_updates"] and scalars["skipped_updates"] == updates:
      self.bad.append({"step": done, **scalars})
      self._say(
        f"step {done}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}; its update was skipped "
        f"({len(self.bad)} in a row; after more than {self._max_bad_steps} training stops)."
      )
      return
    self.bad.clear()
    if scalars["skipped_updates"]:
      skipped = f"{scalars['skipped_updates']:.0f} of {updates:.0f} updates"
      self._say(f"step {done}: {skipped} were not finite and were skipped.")
    if (spike := self._losses.see(scalars["loss"])) is not None:
      above = f"{spike:.1f} standard deviations above its running mean"
      self._say(f"step {done}: loss {scalars['loss']:.4g} is {above}.")

  def _write(self, seen: Seen, scalars: dict[str, float]) -> None:
    """Writes all metrics of a step, with means over the steps since the last time."""
    now, steps = time.perf_counter(), seen.done - self._since_step
    seconds = now - self._since
    scalars = scalars | metrics.to_scalars(seen.values) | self._losses.metrics()
    waited = self._goodput.since_last("input wait")
    own = waited + self._goodput.since_last("step") - self._on_devices  # this process's own time
    scalars |= distributed.host_metrics(own / steps, seconds / steps)
    scalars["images_per_second"] = steps * self._images_per_step / seconds
    scalars["data_wait_share"] = waited / seconds
    scalars["learning_rate"] = float(self._schedule(max(scalars["optimizer_updates"] - 1, 0)))  # at the last update
    scalars["skipped_records"] = float(self._batches.num_skipped())
    self._on_devices = time.perf_counter() - now  # all of this also waits for the devices
    self._since, self._since_step = now, seen.done
    self._writer.write(seen.done, scalars)
