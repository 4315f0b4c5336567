"""Endless, shuffled, resumable batches, through Grain.

Every epoch visits every record once, in an order that follows from (seed, epoch). Batch i of the run holds the same
rows in the same order whatever the number of processes; process p of P gets the p-th of P equal parts. All randomness
of a row follows from (seed, epoch, record). A state is therefore one number, the same on all processes, and resuming is
exact.

  batches = pipeline.pair_batches(source, batch_size=32, image_size=64, tokenize=tokenize, seed=0)
  batch = next(batches)          # numpy arrays
  state = batches.get_state()    # JSON; set_state continues after the batch just taken

Threads decode images ahead of time, or worker processes of this process, each of which makes every n-th batch. Neither
changes what a batch holds. Captions are tokenized in this process, so only the source must be picklable for the
workers. scripts/bench/bench_data.py measures what costs how much.
"""

import atexit
import dataclasses
import multiprocessing
import os
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxpref.data import records

Tokenize = Callable[[list[str]], np.ndarray]
Batch = dict[str, np.ndarray]
# (position, whether the caption is dropped, whether images are mirrored) -> a row of a batch; with random crops also
# where the crops lie, a `records.Place`. The field `caption` of a row becomes `input_ids`, and `skipped` is noted.
Row = Callable[..., Mapping[str, Any]]

CAPTIONS_KEPT = 100_000  # captions whose token ids are cached
# A worker outlives a SIGTERM to the whole job by this long, so that training can finish its step and save.
GRACE_SECONDS = 30.0


class Batches(Iterator[Batch]):
  """An endless iterator over batches, with a state.

  Attributes:
    num_records: records in an epoch, of all processes together.
    batch_size: rows of a batch over all processes.
  """

  def __init__(
    self,
    open_at: Callable[[int], grain.DatasetIterator],
    *,
    num_records: int,
    batch_size: int,
    seed: int,
    load: Row,
    tokenize: Tokenize | None = None,
    tokenizers: Mapping[str, Tokenize] | None = None,
    reader: records.Reader | None = None,
  ):
    """Takes in `open_at(i)` an iterator over the stacked rows of batch i and those after it, see `stack`."""
    self._open_at = open_at
    self._opened: list[grain.DatasetIterator] = []  # at most one
    weakref.finalize(self, _close, self._opened)  # also when the program ends
    self._next_batch = 0
    self._load = load
    every = {**({} if tokenize is None else {"input_ids": tokenize}), **(tokenizers or {})}
    self._ids = {field: _Captions(of_field) for field, of_field in every.items()}
    self._reader = reader
    self._seed = seed
    self.num_records = num_records
    self.batch_size = batch_size

  def __next__(self) -> Batch:
    """Returns the next batch of this process; raises ValueError for unusable data."""
    if not self._opened:
      self._opened.append(self._open_at(self._next_batch))
    batch = self._finish(next(self._opened[0]))
    self._next_batch += 1
    return batch

  def rows(self, positions: Sequence[int], *, flipped: bool = False, num_threads: int = 0) -> Iterator[Batch]:
    """Yields single rows, without shuffling and drawing; independent of where the iterator stands.

    Args:
      positions: positions among the records used.
      flipped: whether images are mirrored.
      num_threads: threads that prepare rows ahead; 0: none.
    """

    def load(i: int) -> dict[str, Any]:
      return stack([self._load(positions[i], False, flipped)])

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    for stacked in grain.MapDataset.range(len(positions)).map(load).to_iter_dataset(options):
      yield {name: values[0] for name, values in self._finish(stacked).items()}

  def _finish(self, stacked: dict[str, Any]) -> Batch:
    captions, skipped = stacked.pop("caption", None), stacked.pop("skipped", ())
    if self._reader is not None:
      for skip in skipped:
        self._reader.note(skip)
    if captions is not None:
      stacked |= {field: ids(captions) for field, ids in self._ids.items()}
    return stacked

  @property
  def skipped(self) -> list[str]:
    """Names of the records this process skipped because an image could not be read."""
    return [] if self._reader is None else list(self._reader.skipped.values())

  def num_skipped(self) -> int:
    """Returns how many records this process has skipped, as a metric."""
    return len(self.skipped)

  def names(self, places: Sequence[int]) -> list[str]:
    """Returns what the source calls the records at some places (`record` of a batch), else the places themselves."""
    if self._reader is None:
      return [str(place) for place in places]
    return [records.name_of(self._reader.source[place], place) for place in places]

  def get_state(self) -> dict[str, int]:
    """Returns where the iterator stands, as JSON values; the same on every process."""
    return {
      "next_batch": self._next_batch,
      "batch_size": self.batch_size,
      "num_records": self.num_records,
      "seed": self._seed,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues where `get_state` was called, on any number of processes and workers.

    Raises:
      ValueError: the state belongs to other data.
    """
    now = self.get_state()
    for key in ("batch_size", "num_records", "seed"):
      if state[key] != now[key]:
        raise ValueError(
          f"the saved data position is for {key} = {state[key]}, and this run has {now[key]}; "
          "resume with the old value, or start in a new work folder."
        )
    self.close()
    self._next_batch = int(state["next_batch"])

  def close(self) -> None:
    """Stops the background threads and processes; `next` starts them again."""
    _close(self._opened)


def _close(opened: list[grain.DatasetIterator]) -> None:
  while opened:
    opened.pop().close()


class Prefetched(Iterator[tuple[Any, dict[str, int]]]):
  """Batches on the devices, ahead of time: a thread reads and moves the next ones while a step runs.

  Each batch comes with the state after it, to save once it has been trained on: the iterator itself is ahead.
  """

  def __init__(self, batches: Any, put: Callable[[Any], Any], *, count: int, depth: int = 2):
    """Starts the thread.

    Args:
      batches: iterator with `get_state` and `close`; only the thread uses it from now on.
      put: moves a batch to the devices.
      count: number of batches that will be taken.
      depth: largest number of batches that wait on the devices.
    """
    self._batches = batches
    self._ready: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue()
    self._free = threading.Semaphore(depth)
    self._stopping = False

    def work() -> None:
      try:
        for _ in range(count):
          self._free.acquire()
          if self._stopping:
            return
          batch = put(next(batches))
          self._ready.put((batch, batches.get_state(), None))
      except BaseException as error:  # raised where the batch is asked for
        self._ready.put((None, None, error))

    self._left = count
    self._thread = threading.Thread(target=work, name="jaxpref-prefetch", daemon=True)
    self._thread.start()

  def __next__(self) -> tuple[Any, dict[str, int]]:
    """Returns the next batch and the state after it; raises what the iterator raised."""
    if not self._left:
      raise StopIteration
    batch, state, error = self._ready.get()
    if error is not None:
      self._left = 0
      raise error
    self._left -= 1
    self._free.release()
    return batch, state

  def close(self) -> None:
    """Stops the thread once it has finished the batch at hand, and closes the iterator."""
    self._stopping = True
    self._free.release()
    self._thread.join()
    self._batches.close()


class _Captions:
  """Token ids of captions; caches those of the last `CAPTIONS_KEPT` different captions."""

  def __init__(self, tokenize: Tokenize):
    self._tokenize = tokenize
    self._ids: dict[str, np.ndarray] = {}
    self([""])  # raises its errors before training

  def __call__(self, captions: Sequence[str]) -> np.ndarray:
    """i32[n, L]."""
    found = {caption: self._ids[caption] for caption in captions if caption in self._ids}
    missing = [caption for caption in dict.fromkeys(captions) if caption not in found]
    if missing:
      new = dict(zip(missing, self._call(missing), strict=True))
      found |= new
      self._ids |= new
      while len(self._ids) > CAPTIONS_KEPT:
        del self._ids[next(iter(self._ids))]  # the oldest
    return np.stack([found[caption] for caption in captions])

  def _call(self, captions: list[str]) -> np.ndarray:
    ids = np.asarray(self._tokenize(captions))
    if ids.ndim != 2 or len(ids) != len(captions) or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f"tokenize returned {ids.dtype}{list(ids.shape)} for {len(captions)} captions; expected "
        f"integers [{len(captions)}, L], padded to one length L."
      )
    return ids.astype(np.int32)


# ---- Order, sharding and workers ---------------------------------------------------------------------------------


def _check_sizes(what: str, num_records: int, batch_size: int, process_index: int, process_count: int) -> None:
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index is {process_index}; expected 0 to {process_count - 1}, for {process_count} processes."
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} cannot be shared by {process_count} processes; choose a positive "
      f"multiple of {process_count}."
    )
  if not num_records:
    raise ValueError(
      f"the {what} has no usable records: all are ties, or left out by other fields of config.data; use other data, or "
      "leave out less."
    )
  if num_records < batch_size:
    raise ValueError(
      f"the {what} has {num_records} usable records, fewer than the batch_size of {batch_size}; "
      "lower batch_size or use more data."
    )


@dataclasses.dataclass(frozen=True)
class _DrawnRow:
  """Draws what is random about a row from (seed, epoch, record), and makes the row."""

  load: Row
  num_records: int
  seed: int
  caption_dropout: float
  flip: bool
  random_crop: bool

  def __call__(self, index: int, record: int) -> Mapping[str, Any]:
    """Makes row `index`, which counts on from epoch to epoch."""
    draws = np.random.default_rng([self.seed, 1, index // self.num_records, record]).random(4)
    dropped, flipped = bool(draws[0] < self.caption_dropout), bool(draws[1] < (0.5 if self.flip else 0.0))
    place = ((draws[2], draws[3]),) if self.random_crop else ()
    return {"record": np.int32(record), **self.load(record, dropped, flipped, *place)}


def stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Stacks rows into arrays [B, ...] by field; captions stay a list, and skipped records become one list."""
  stacked: dict[str, Any] = {}
  for key in rows[0]:
    values = [row[key] for row in rows]
    if key == "skipped":
      stacked[key] = [skip for skips in values for skip in skips]
    else:
      stacked[key] = values if key == "caption" else np.stack(values)
  return stacked


def _start_worker(index: int, count: int) -> None:
  """Makes a worker end with the process that started it, and not before."""
  del index, count

  def end_soon(*_: Any) -> None:
    timer = threading.Timer(GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()

  def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, end_soon)
  atexit.register(os._exit, 0)  # unloading the libraries takes a second
  threading.Thread(target=end_with_parent, daemon=True).start()


# Many parameters: every kind of data opens its batches here, and passes only what it has.
def open_batches(
  num_records: int,
  load: Row,
  *,
  what: str,
  caption_dropout: float = 0.0,
  flip: bool = False,
  random_crop: bool = False,
  batch_size: int,
  seed: int,
  process_index: int,
  process_count: int,
  num_threads: int,
  num_workers: int = 0,
  tokenize: Tokenize | None = None,
  tokenizers: Mapping[str, Tokenize] | None = None,
  reader: records.Reader | None = None,
) -> Batches:
  """Returns batches: shuffles, draws what is random about a row, shards, stacks and prefetches.

  Args:
    num_records: records in an epoch.
    load: makes a row.
    what: name of the data, for messages.
    caption_dropout, flip, random_crop: what to draw for a row.
    batch_size: rows over all processes.
    num_threads, num_workers: threads or processes that make rows ahead of time; threads only if there are no processes.
    tokenize: captions of a batch -> i32[n, L], its input_ids.
    tokenizers: further ones, by the field that they fill.
    reader: reader of the source; it knows which records were unreadable, and the names of records.

  Raises:
    ValueError: the processes cannot share the batch, or it is larger than an epoch.
  """
  _check_sizes(what, num_records, batch_size, process_index, process_count)
  rows = batch_size // process_count
  shuffle_seed = int(np.random.SeedSequence([seed, 0]).generate_state(1)[0])
  dataset = (
    grain.MapDataset.range(num_records)
    # Before the shuffle, where index = epoch * num_records + record.
    .map_with_index(_DrawnRow(load, num_records, seed, caption_dropout, flip, random_crop))
    .shuffle(shuffle_seed)
    .repeat()  # Every epoch has a new shuffle.
    .batch(rows, drop_remainder=True, batch_fn=stack)
  )

  def open_at(batch: int) -> grain.DatasetIterator:
    own = dataset[batch * process_count + process_index :: process_count]
    if not num_workers:
      return iter(own.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)))
    if not flags.FLAGS.is_parsed():  # Outside a program with flags: Grain reads a flag of its own.
      flags.FLAGS.mark_as_parsed()
    alone = own.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # Pipes: shared memory costs as much, containers have little of it, and killed runs leave it behind.
    no_shared_memory = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
    return iter(
      grain.experimental.WithOptionsIterDataset(alone, no_shared_memory).mp_prefetch(
        options, worker_init_fn=_start_worker
      )
    )

  return Batches(
    open_at,
    num_records=num_records,
    batch_size=batch_size,
    seed=seed,
    load=load,
    tokenize=tokenize,
    tokenizers=tokenizers,
    reader=reader,
  )
