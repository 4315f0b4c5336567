"""How far a job is: tqdm's bar on a terminal, and now and then a line elsewhere.

Modules import `tqdm` from here instead of from tqdm. A job that takes less than `SECONDS` says nothing outside a
terminal, so that logs hold lines, and no carriage returns.
"""

import contextlib
import os
import sys
from typing import Any, TextIO

import tqdm as tqdm_lib

SECONDS = 30.0  # between two lines


class _Lines:
  """A file that gets a line for each state of a bar; the last state, which a bar writes twice, once."""

  def __init__(self, file: TextIO):
    self._file, self._last = file, ""

  def write(self, text: str) -> None:
    line = text.replace("\r", "").strip()
    if line and line != self._last:
      self._file.write(f"{line}\n")
      self._last = line

  def flush(self) -> None:
    self._file.flush()


def _width() -> int:
  """Returns the columns of the terminal; 0 where it does not know, as under some programs that run others."""
  with contextlib.suppress(OSError, ValueError):
    return os.get_terminal_size(sys.stderr.fileno()).columns
  return 0


class tqdm(tqdm_lib.tqdm):
  """A bar as wide as the terminal, also after its window changed; a line every `SECONDS` where stderr is none."""

  def __init__(self, iterable: Any = None, **options: Any):
    if sys.stderr.isatty():
      options = ({"dynamic_ncols": True} if _width() else {"ncols": 80}) | options
    else:
      total = options.get("total", len(iterable) if hasattr(iterable, "__len__") else None)
      done = "{n_fmt}{unit}, {elapsed} so far" if total is None else "{n_fmt} of {total_fmt}{unit}, {remaining} left"
      # With a delay, however short, nothing is said before the first line is due.
      delay = max(options.get("delay", 0.0), 0.001)
      lines = {"file": _Lines(sys.stderr), "mininterval": SECONDS, "maxinterval": 0, "miniters": 1, "delay": delay}
      options = {"unit": ""} | options | lines | {"bar_format": "{desc}: " + done + "{postfix}"}
    super().__init__(iterable, **options)

  def begin(self) -> None:
    """Shows the bar; what is to be done begins now, so that the time before does not count."""
    self.unpause()
    if not self.disable and sys.stderr.isatty():
      self.refresh()
