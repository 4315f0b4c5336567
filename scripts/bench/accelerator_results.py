"""What the parts of scripts/bench/accelerator.py found, in files that are whole at any time."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Results:
  """What a part found so far, in results.json beside those of other parts."""

  def __init__(self, folder: pathlib.Path, part: str, size: str):
    self.folder, self.part, self.size = folder, part, size
    self._file = folder / "results.json"
    self._all: dict[str, Any] = {"size": size, "parts": {}}
    if self._file.is_file():
      self._all = json.loads(self._file.read_text())
    if self._all["size"] != size:
      raise SystemExit(f"error: {self._file} has results of size {self._all['size']}; name another folder for {size}.")
    self._part = self._all["parts"].setdefault(part, {"complete": False, "items": {}})

  @property
  def complete(self) -> bool:
    return self._part["complete"]

  @property
  def items(self) -> dict[str, Any]:
    return self._part["items"]

  def of(self, part: str) -> dict[str, Any]:
    """Returns the items of another part."""
    return self._all["parts"].get(part, {"items": {}})["items"]

  def done(self, name: str) -> bool:
    item = self.items.get(name, {"error": "not there"})
    return not any(item.get(mark) for mark in ("error", "wrong", "partial"))

  def keep(self, name: str, item: Mapping[str, Any]) -> None:
    """Writes an item; the file is whole at any time."""
    self.items[name] = dict(item)
    self._write()

  def add(self, name: str, item: Mapping[str, Any], said: str) -> None:
    """Writes an item, and a line of text on it."""
    self.keep(name, item)
    wrong = item.get("wrong") or []
    line = f"{self.part} {name}: {item['error'] if 'error' in item else said}"
    line += f" WRONG: {'; '.join(wrong)}" if wrong else ""
    print(line, flush=True)
    with (self.folder / "results.txt").open("a") as log:
      log.write(line + "\n")

  @contextlib.contextmanager
  def attempt(self, name: str) -> Iterator[None]:
    """Records what goes wrong inside as the item's error; the part continues."""
    try:
      yield
    except Exception as error:  # of any kind: one item must not take the others with it
      self.add(name, {"error": sentence(error)}, "")

  def finish(self, names: Sequence[str]) -> None:
    """Marks the part as complete if all these items are done.

    Raises:
      SystemExit: some are not.
    """
    missing = [name for name in names if not self.done(name)]
    self._part["complete"] = not missing
    self._write()
    if missing:
      raise SystemExit(f"error: {self.part}: {', '.join(missing)} failed; see {self.folder / 'results.txt'}.")

  def _write(self) -> None:
    partial = self._file.with_suffix(".partial")
    partial.write_text(json.dumps(self._all, indent=1) + "\n")
    partial.replace(self._file)


def sentence(error: BaseException) -> str:
  """Returns the first line of an error, with its type."""
  return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def clocked(function: Callable[[], Any]) -> tuple[Any, float]:
  """Returns what a function returns, and its seconds."""
  started = time.perf_counter()
  return function(), time.perf_counter() - started
