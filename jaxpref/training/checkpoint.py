"""Checkpoints the whole training state and the data iterator through Orbax, and identifies work folders.

A folder `checkpoints/STEP` appears whole, by a rename, or not at all. Besides the arrays it holds a record: the data
iterator's state and, for each array, name, type, shape and a fingerprint of its content. A checkpoint is damaged if its
record or arrays are not what was saved; `Checkpointer.restore` then uses the one before it.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpref.data import lease
from jaxpref.devices import sharding
from jaxpref.recipes import places
from jaxpref.recipes.messages import listed

FORMAT = 1  # format of the record

# Full memory, and storage that does not answer or denies access: its content may be intact.
_NOT_DAMAGE = (MemoryError, PermissionError, TimeoutError, jax.errors.JaxRuntimeError)
_UNREACHABLE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class DamagedError(Exception):
  """Raised for a checkpoint that is not what was saved; the message says where it differs."""


class Checkpointer:
  """Saves asynchronously, keeps the last `keep` checkpoints, restores onto the shardings of an abstract state.

  A failed save raises an OSError of one sentence, in `save` or, as it continues in the background, in the next call of
  `save`, `wait` or `close`. An older checkpoint is deleted only after the new one is complete.
  """

  def __init__(self, workdir: str | os.PathLike, *, keep: int):
    for name in ("absl", "asyncio"):
      logging.getLogger(name).addFilter(_no_traceback)
    self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
    self._saving: int | None = None  # the last step whose saving began
    self._failed = False
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=True,
      cleanup_tmp_directories=True,  # what a killed process left half-written
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "data"))

  def latest_step(self) -> int | None:
    """Returns the last checkpoint's step, or None; after `wait`, the last complete one's."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
    """Starts saving; returns once the arrays are copied to the host.

    Raises:
      FloatingPointError: the state holds NaN or infinity; it is not saved.
      OSError: this checkpoint, or the one before, cannot be written.
    """
    self.wait()
    if self._manager.latest_step() == step:
      return
    leaves, finite = _check(state)
    if not finite:
      raise FloatingPointError(f"the state of step {step} is not finite; it was not saved.")
    record = {"format": FORMAT, "data": dict(data), "leaves": leaves}
    record["checksum"] = _checksum(record)
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(record))
    self._saving = step
    try:
      self._manager.save(step, args=args)
    except Exception as error:  # of many types, all from writing
      raise self._failure(error) from error

  def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
    """Returns the last good checkpoint: (step, state, data).

    Later damaged ones are moved to `checkpoints_damaged`, with a message on stderr, so that their steps can be saved
    again. Nothing is moved if no checkpoint is good.

    Args:
      abstract_state: a pytree of ShapeDtypeStructs with shardings.
    Raises:
      ValueError: a checkpoint belongs to another state, or none is good.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state, data = _read(self._folder / str(step), abstract_state)
      except DamagedError as error:
        damaged[step] = str(error)
        continue
      self._set_aside(damaged, good=step)
      return step, state, data
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items()) or "there is none"
    raise ValueError(
      f"no checkpoint in {self._folder} can be used ({reasons}); put back a copy of one, or choose another --workdir "
      "to start again."
    )

  def _set_aside(self, damaged: Mapping[int, str], *, good: int) -> None:
    """Moves damaged checkpoints away; process 0 does it."""
    if not damaged:
      return
    if jax.process_index() == 0:
      aside = self._folder.with_name("checkpoints_damaged")
      aside.mkdir(exist_ok=True)
      for step, reason in damaged.items():
        names = [str(step), *(f"{step}-{n}" for n in range(2, 10_000))]
        target = aside / next(name for name in names if not (aside / name).exists())
        (self._folder / str(step)).rename(target)
        print(
          f"checkpoint {self._folder / str(step)} is damaged ({reason}); it was moved to {target}, and step {good} is "
          "used instead.",
          file=sys.stderr,
        )
    multihost_utils.sync_global_devices("damaged checkpoints are moved")
    self._manager.reload()

  def wait(self) -> None:
    """Returns once the save in progress is on disk.

    Raises:
      OSError: the checkpoint cannot be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(error) from error

  def close(self) -> None:
    """Waits like `wait`, then closes. Does not raise a failure again that was raised before."""
    reported = self._failed
    try:
      self.wait()
      self._manager.close()
    except Exception as error:
      if not reported:
        raise error if isinstance(error, OSError) else self._failure(error) from error

  def _failure(self, error: Exception) -> OSError:
    self._failed = True
    self._manager.reload()  # it forgets a failed step, and those to be deleted after it
    last = self._manager.latest_step()
    good = f"the last good one is step {last}" if last is not None else "there is no earlier one"
    return OSError(
      f"the checkpoint of step {self._saving} could not be saved in {self._folder} ({_reason(error)}); {good}: free "
      "space or make the folder writable, and run the same command again."
    )


def _no_traceback(record: logging.LogRecord) -> bool:
  """Returns a filter of log records: Orbax also logs what it raises, with a traceback, which is for --verbosity=1.

  If several writes fail, it raises one; asyncio logs the others when their tasks are collected.
  """
  of_orbax = "orbax" in record.pathname or (record.name == "asyncio" and "orbax" in record.getMessage())
  return not (of_orbax and record.levelno >= logging.ERROR and absl_logging.get_verbosity() <= 0)


@functools.cache  # once
def _quiet_reads() -> None:
  """Silences, from here on, tracebacks of reads that are pending when another one fails.

  TensorStore reports them to an event loop that is closed by then, and Orbax's coroutines are dropped with an error.
  """
  excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

  def on_exception(kind: Any, error: Any, traceback: Any) -> None:
    if str(error) != "Event loop is closed":
      excepthook(kind, error, traceback)

  def on_unraisable(found: Any) -> None:
    code = getattr(found.object, "cr_code", None)
    if str(found.exc_value) != "Event loop is closed" and (code is None or "orbax" not in code.co_filename):
      unraisablehook(found)

  sys.excepthook, sys.unraisablehook = on_exception, on_unraisable


def _reason(error: BaseException) -> str:
  """Returns the first line of an error, or of its cause, without the files that TensorStore names."""
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  line = re.sub(r" \[\w+(\[\d+\])?='.*", "", next(iter(str(error).splitlines()), "")).rpartition('": ')[2]
  return (line if len(line) <= 200 else f"{line[:200]} ...") or type(error).__name__


# ---- The record: what was saved ------------------------------------------------------------------------------------


def _mix(x: jax.Array) -> jax.Array:
  """Permutes u32 so that each bit of x changes about half of the result's bits (MurmurHash3's finaliser)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _fingerprint(piece: jax.Array, start: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
  """Returns u32[]: the sum, modulo 2^32, of all words of a piece, each mixed with its place in the whole array.

  Such a sum has no order, so the sum over the pieces is the same however an array is split over devices. A change of
  bits or of their order goes unseen with probability 2^-32.

  Args:
    piece: a piece of the array.
    start: u32[] for each axis, where the piece begins.
    shape: shape of the whole array.
  """
  axes = piece.ndim
  if jnp.issubdtype(piece.dtype, jax.dtypes.prng_key):
    piece = jax.random.key_data(piece)
  if piece.dtype == jnp.bool_:
    piece = piece.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(piece.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(piece, word).astype(jnp.uint32)
  more = words.shape[axes:]  # a last axis of the two words in 8 bytes, or of a key's words
  place = jnp.ones((), jnp.uint32)
  for axis, (size, begin) in enumerate(zip((*shape, *more), [*start, *(jnp.uint32(0) for _ in more)], strict=True)):
    place = place * jnp.uint32(size % 2**32) + begin + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  return jnp.sum(_mix(words ^ place * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32)


# One array at a time: a network has hundreds, but few shapes, and compiling takes longer than calling.
@functools.partial(jax.jit, static_argnames=("mesh", "spec"))
def _check_array(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> tuple[jax.Array, jax.Array]:
  """Returns (u32[mesh] fingerprint, bool[mesh] whether all numbers are finite) of each device's piece, in one pass.

  Devices do not communicate here. Copies of a piece count once: the other copies' fingerprint is 0.
  """
  split = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in (*spec, *(None,) * (x.ndim - len(spec)))]

  def check(piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    start = []
    for size, axes in zip(piece.shape, split, strict=True):
      number = jnp.uint32(0)
      for axis in axes:
        number = number * jnp.uint32(mesh.shape[axis]) + jax.lax.axis_index(axis).astype(jnp.uint32)
      start.append(number * jnp.uint32(size))
    first = jnp.ones((), bool)
    for axis in set(mesh.axis_names) - {axis for axes in split for axis in axes}:
      first &= jax.lax.axis_index(axis) == 0
    finite = jnp.all(jnp.isfinite(piece)) if jnp.issubdtype(piece.dtype, jnp.inexact) else jnp.ones((), bool)
    word = jnp.where(first, _fingerprint(piece, start, x.shape), jnp.uint32(0))
    return word.reshape((1,) * len(mesh.axis_names)), finite.reshape((1,) * len(mesh.axis_names))

  every = PartitionSpec(*mesh.axis_names)
  return jax.shard_map(check, mesh=mesh, in_specs=spec, out_specs=(every, every), check_vma=False)(x)


def _check(tree: Any) -> tuple[dict[str, list[Any]], bool]:
  """Returns ({name: [type, shape, fingerprint]} of all arrays, whether all are finite); the same in all processes."""
  found = []
  for leaf in jax.tree.leaves(tree):
    x = jnp.asarray(leaf)
    where = x.sharding
    if not isinstance(where, NamedSharding):
      where = NamedSharding(Mesh(sorted(x.devices(), key=lambda d: d.id), ("all",)), PartitionSpec())
      x = jax.device_put(x, where)
    found.append([[s.data for s in result.addressable_shards] for result in _check_array(x, where.mesh, where.spec)])
  own = jax.device_get(found)
  words = np.array([np.sum(pieces, dtype=np.uint32) for pieces, _ in own], np.uint32)
  finite = np.array([np.all(pieces) for _, pieces in own], bool)
  if jax.process_count() > 1:
    words, finite = multihost_utils.process_allgather((words, finite))
    words = np.sum(words, axis=0, dtype=np.uint32)
  described = _describe(tree)
  return {name: [*described[name], int(w)] for name, w in zip(described, words, strict=True)}, bool(np.all(finite))


def _describe(tree: Any) -> dict[str, list[Any]]:
  """Returns {name: [type, shape]} of each array, in the order of the leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.path_name(path): [str(x.dtype), list(x.shape)] for path, x in leaves}


def _checksum(record: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _read_record(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
  """Returns (state of the data iterator, leaves) of a checkpoint.

  Raises:
    DamagedError: the checkpoint is not what was saved.
    ValueError: a later version of this package wrote it.
  """
  try:
    record = ocp.JsonCheckpointHandler().restore(folder / "data")
    if not isinstance(record, dict) or "checksum" not in record:
      raise ValueError(f"{folder / 'data'} holds no record")
    checksum = record.pop("checksum")
  except Exception as error:
    raise _damage("its record", error) from error
  if checksum != _checksum(record):
    raise DamagedError("its record has another checksum")
  if record["format"] > FORMAT:
    raise ValueError(
      f"checkpoint {folder} cannot be restored: its format is {record['format']}, this version reads up to {FORMAT}; "
      "use the version of jaxpref that wrote it, or choose another --workdir."
    )
  return record["data"], record["leaves"]


def _read(folder: pathlib.Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
  """Returns (state, state of the data iterator) of a checkpoint, the same in all processes, or raises in all.

  Raises:
    DamagedError: the checkpoint is not what was saved.
    ValueError: it belongs to another state.
  """
  state: Any = None
  data: dict[str, Any] = {}
  leaves: dict[str, list[Any]] = {}
  damage = ""
  try:
    data, leaves = _read_record(folder)
    _refuse_another_state(folder, leaves, _describe(abstract_state))
    state = _read_state(folder, abstract_state)
  except DamagedError as error:
    damage = str(error)
  read = np.ravel(multihost_utils.process_allgather(np.asarray(not damage)))
  if not np.all(read):
    raise DamagedError(damage or f"process {int(np.argmin(read))} cannot read its part")
  _compare(state, leaves)
  return state, data


def _read_state(folder: pathlib.Path, abstract_state: Any) -> Any:
  """Returns the arrays; without a Checkpointer, in which processes wait for one another."""
  _quiet_reads()
  try:
    return ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))
  except Exception as error:  # of many types
    raise _damage("its arrays", error) from error


def _damage(what: str, error: Exception) -> DamagedError:
  """Returns the error for something unreadable; raises an OSError if its storage cannot be reached."""
  reason = _reason(error)
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, _NOT_DAMAGE) or any(word in str(cause) for word in _UNREACHABLE):
      raise OSError(f"{what} cannot be reached ({reason})") from error
    cause = cause.__cause__
  return DamagedError(f"{what} cannot be read: {reason}")


def _refuse_another_state(folder: pathlib.Path, saved: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> None:
  there = {name: leaf[:2] for name, leaf in saved.items()}
  differ = [name for name in [*now, *(there.keys() - now.keys())] if there.get(name) != now.get(name)]
  if differ:
    found, expected = (f"{of[differ[0]][0]}{of[differ[0]][1]}" if differ[0] in of else "missing" for of in (there, now))
    raise ValueError(
      f"checkpoint {folder} cannot be restored: {differ[0]} is {found} there and {expected} now"
      f"{f' (and {len(differ) - 1} more arrays differ)' if differ[1:] else ''}; it is of another config or version, so "
      "choose another --workdir."
    )


def _compare(tree: Any, leaves: Mapping[str, list[Any]]) -> None:
  """Raises DamagedError if an array of `tree` is not the one of its name in `leaves`."""
  found, _ = _check(tree)
  differ = [name for name in found if found[name] != leaves[name]]
  if differ:
    more = f", and those of {len(differ) - 1} more arrays" if differ[1:] else ""
    raise DamagedError(f"the numbers of {differ[0]}{more} are not those that were saved")


# ---- Reading without a run ----------------------------------------------------------------------------------------


def load_state(workdir: str | os.PathLike, step: int, abstract_state: Any) -> Any:
  """Returns the whole state of one checkpoint, onto the shardings of an abstract one; moves and writes nothing.

  Raises:
    ValueError: the checkpoint does not exist, is damaged, or belongs to another state.
  """
  folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step)
  if not folder.is_dir():
    raise ValueError(f"{folder} does not exist: the checkpoint was deleted as others followed, and is needed here.")
  try:
    return _read(folder, abstract_state)[0]
  except DamagedError as error:
    raise ValueError(f"checkpoint {folder} is damaged: {error}.") from error


def load_params(workdir: str | os.PathLike, step: int | None = None) -> tuple[Any, int]:
  """Returns the trained parameters of a checkpoint, without the rest of the state, and its step.

  Args:
    workdir: folder of the run, which may still be training.
    step: step of the checkpoint; None for the last one.
  Returns:
    A tree of numpy arrays, and the step.
  Raises:
    FileNotFoundError: there is no checkpoint of that step, or none at all.
    ValueError: the checkpoint is damaged; an earlier step is never exported silently.
  """
  folder = pathlib.Path(workdir).absolute() / "checkpoints"
  steps = _saved_steps(folder)
  if not steps:
    raise FileNotFoundError(f"{folder} holds no checkpoint yet; wait for the first one, or choose another run.")
  step = steps[-1] if step is None else step
  if step not in steps:
    raise FileNotFoundError(f"{folder} has no checkpoint of step {step}, only of {listed(map(str, steps))}.")
  _quiet_reads()
  try:
    _, leaves = _read_record(folder / str(step))
    state, reader = folder / str(step) / "state", ocp.PyTreeCheckpointHandler()
    found = reader.metadata(state).tree["params"]
    params = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found)}
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params)
    args = ocp.args.PyTreeRestore(item=params, restore_args=numpy, partial_restore=True)
    params = reader.restore(state, args=args)
    _compare(params, leaves)
    return params["params"], step
  except Exception as error:
    raise ValueError(
      f"checkpoint {folder / str(step)} cannot be read ({_reason(error)}); choose another step."
    ) from error


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns ShapeDtypeStructs with shardings, which say how to restore."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _saved_steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints in a folder, without opening them."""
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def check_workdir(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  may_change: tuple[str, ...] = (),
  usual: Mapping[str, Any] | None = None,
) -> None:
  """Checks that a work folder is new or was made with the same config; writes nothing.

  Args:
    config: nested mapping of JSON values.
    may_change: dotted names, or prefixes ending in a dot, that may differ on resume.
    usual: nested defaults, for fields that the folder's config does not have yet.
  Raises:
    ValueError: the folder belongs to another config, or holds other files.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / "config.json"
  new = _flatten(json.loads(json.dumps(config)))
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"work folder {workdir} is a file; choose another --workdir.")
  if path.exists():
    try:
      old = _flatten(json.loads(json.dumps(usual or {}))) | _flatten(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise ValueError(f"{path} is not valid JSON ({error}); choose another --workdir.") from error
    differ = [
      key
      for key in sorted(old.keys() | new.keys())
      if not (places.same(old.get(key), new.get(key)) or key.startswith(may_change))
    ]
    if differ:
      key = differ[0]
      remedy = "choose another --workdir, or set the old value to resume"
      if not _saved_steps(workdir / "checkpoints"):
        remedy = "it has no checkpoint yet: remove it, or choose another --workdir"
      raise ValueError(
        f"work folder {workdir} belongs to another config: config.{key} is {old.get(key)!r} there and "
        f"{new.get(key)!r} now{f' (and {len(differ) - 1} more fields differ)' if differ[1:] else ''}; {remedy}."
      )
  elif workdir.exists() and not all(lease.is_lock(path.name) for path in workdir.iterdir()):
    raise ValueError(
      f"work folder {workdir} is not empty and holds no config.json of an earlier run; choose another --workdir."
    )


def check_num_steps(workdir: str | os.PathLike, num_steps: int) -> None:
  """Checks that a run is not beyond the step that it should reach; writes nothing.

  Raises:
    ValueError: it is beyond that step.
  """
  workdir = pathlib.Path(workdir)
  steps = _saved_steps(workdir / "checkpoints")
  if steps and steps[-1] > num_steps:
    raise ValueError(
      f"the run in {workdir} is at step {steps[-1]}, and config.num_steps is {num_steps}; set --config.num_steps to at "
      f"least {steps[-1]}, or choose another --workdir (python -m jaxpref.export {workdir} exports what is there)."
    )


def num_steps_before(workdir: str | os.PathLike) -> int | None:
  """Returns the `num_steps` with which a work folder was last claimed; None if it never was."""
  try:
    found = json.loads((pathlib.Path(workdir) / "config.json").read_text()).get("num_steps")
  except (OSError, ValueError, AttributeError):
    return None
  return found if isinstance(found, int) else None


def claim_workdir(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  may_change: tuple[str, ...] = (),
  usual: Mapping[str, Any] | None = None,
) -> None:
  """Writes `config.json` into a work folder that `check_workdir` finds new or its own; takes the same arguments."""
  check_workdir(workdir, config, may_change=may_change, usual=usual)
  path = pathlib.Path(workdir) / "config.json"
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    part.replace(path)


def note_own_code(workdir: str | os.PathLike, versions: Mapping[str, str]) -> list[str]:
  """Records the versions of the user's own modules beside a run, in `own_code.json`; called by process 0.

  Args:
    versions: versions by package.module:Name.

  Returns:
    The modules of which the run had another version before.
  """
  path = pathlib.Path(workdir) / "own_code.json"
  before: dict[str, str] = {}
  with contextlib.suppress(OSError, ValueError):
    before = dict(json.loads(path.read_text()))
  if versions and before != versions:
    path.write_text(json.dumps(dict(versions), indent=2, sort_keys=True) + "\n")
  return [spec for spec, found in versions.items() if before.get(spec, found) != found]


def digest(tree: Any) -> str:
  """Returns a SHA-256 over all leaves of a pytree: equal digests mean bit-identical states."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    total.update(jax.tree_util.keystr(path).encode())
    total.update(jax.device_get(leaf).tobytes())
  return total.hexdigest()
