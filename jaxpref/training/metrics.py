"""Metrics: weighted means that add up exactly, and their files.

Inside a step a metric is a pair (sum, count) of arrays. Pairs of micro-batches are added and divided once at the
end, so a mean is never a mean of means. A pair of vectors is a mean per bin (e.g. reward by timestep).
"""

import importlib.util
import inspect
import json
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def to_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Converts to host floats: a vector becomes name_00, name_01, ...; leaves out empty means (NaN) except `loss`."""
  flat: dict[str, float] = {}
  for name, value in jax.device_get(dict(metrics)).items():
    value = np.asarray(value)
    entries = [(name, value)] if value.ndim == 0 else [(f"{name}_{i:02d}", v) for i, v in enumerate(value)]
    flat |= {k: float(v) for k, v in entries if k in ("loss", "grad_norm") or not np.isnan(v)}
  return flat


def check_wandb(project: str) -> None:
  """Raises ValueError if `Writer` could not start a run of a project, because wandb or its API key is missing.

  Without a key wandb would ask for one at the terminal and wait.
  """
  if not project:
    return
  if importlib.util.find_spec("wandb") is None:
    raise ValueError(
      f"config.logging.wandb_project={project!r}, but wandb is not installed; pip install 'jaxpref[wandb]'."
    )
  if jax.process_index() == 0 and not _wandb_can_start():
    raise ValueError(
      f"config.logging.wandb_project={project!r}, but wandb has no API key; run wandb login, set WANDB_API_KEY, or set "
      "WANDB_MODE=offline and upload the run later with wandb sync."
    )


def _wandb_can_start() -> bool:
  """Returns whether wandb needs no API key or has one; asks neither the user nor the network."""
  import wandb

  if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):  # from WANDB_MODE, or from wandb offline
    return True
  if "prompt" in inspect.signature(wandb.login).parameters:
    return bool(wandb.login(prompt=False, verify=False))
  return bool(wandb.api.api_key)  # in versions that would ask


class Writer:
  """Appends to `metrics.jsonl` and TensorBoard event files, and to Weights & Biases if asked.

  If a disk is full, says so once and stops writing: training continues, and may still save a checkpoint.
  """

  def __init__(self, workdir: str | os.PathLike, *, first_step: int, wandb_project: str = "", config: Any = None):
    self._path: pathlib.Path | None = None
    self._board: Any = None
    self._flushed = time.monotonic()
    self._failed = False
    self._wandb: Any = None
    if jax.process_index() != 0:
      return
    # Slow to import. Not the package's SummaryWriter: its thread dies on a full disk, and its queue then blocks.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import SessionLog

    self._path = path = pathlib.Path(workdir) / "metrics.jsonl"
    kept = [row for row in read(path) if row["step"] <= first_step]  # later rows will be written again
    part = path.with_suffix(".jsonl.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in kept))
    part.replace(path)
    board = pathlib.Path(workdir) / "tensorboard"
    board.mkdir(exist_ok=True)
    self._board = EventsWriter(str(board / "events"))
    self._add_event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides later events
    if wandb_project:
      import wandb

      file = path.with_name("wandb_run.txt")  # so that a continued run continues its curves
      name = file.read_text().strip() if file.is_file() else secrets.token_hex(4)
      file.write_text(f"{name}\n")
      try:
        self._wandb = wandb.init(id=name, project=wandb_project, dir=str(workdir), config=config, resume="allow")
      except Exception as error:  # several types: the key is refused, the network is down
        raise ValueError(
          f"config.logging.wandb_project={wandb_project!r}: wandb cannot start a run ({error}); fix that, or set "
          "WANDB_MODE=offline and upload the run later with wandb sync."
        ) from error

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one row of host floats, without those that are not finite, which JSON cannot hold."""
    if self._path is None:
      return
    scalars = {k: v for k, v in scalars.items() if np.isfinite(v)}
    row = {"step": step, "time": round(time.time(), 3), **{k: float(f"{v:.6g}") for k, v in scalars.items()}}
    from tensorboardX import summary

    try:
      _append(self._path, json.dumps(row) + "\n")
      for name, value in scalars.items():
        self._add_event(step=step, summary=summary.scalar(name, value))
    except OSError as error:
      self._fail(error)
    if self._wandb is not None:
      self._wandb.log(dict(scalars), step=step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a picture u8[H, W, 3]."""
    if self._board is None:
      return
    from tensorboardX import summary

    try:
      self._add_event(step=step, summary=summary.image(name, image, dataformats="HWC"))
    except OSError as error:
      self._fail(error)

  def close(self) -> None:
    if self._board is not None:
      try:
        self._board.close()
      except OSError as error:
        self._fail(error)

  def _add_event(self, **fields: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    if self._board is not None:
      self._board.write_event(Event(wall_time=time.time(), **fields))
      if time.monotonic() - self._flushed > 10.0:
        self._board.flush()
        self._flushed = time.monotonic()

  def _fail(self, error: OSError) -> None:
    self._board = None  # its file may end in half an event
    if not self._failed:
      print(
        f"{self._path} and the curves of TensorBoard cannot be written ({error.strerror or error}); training continues "
        "without them.",
        file=sys.stderr,
      )
    self._failed = True


def _append(path: pathlib.Path, line: str) -> None:
  """Appends a whole line, or nothing."""
  size = path.stat().st_size
  try:
    with path.open("a") as file:
      file.write(line)
  except OSError:
    os.truncate(path, size)
    raise


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the rows of a metrics.jsonl, without a half-written last line; [] if there is none."""
  path = pathlib.Path(path)
  rows: list[dict[str, Any]] = []
  if path.exists():
    for line in path.read_text().split("\n"):
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows
