"""Rounds of pairs: each is a folder of its own, `round_0`, `round_1` and so on, inside the folder of a taste."""

import pathlib
import re

from jaxpref.data.files import PAIRS_NAME

PATTERN = re.compile(r"round_(0|[1-9]\d*)")


def folder_of(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Returns the folder of a round."""
  return folder / f"round_{number}"


def numbers(folder: pathlib.Path) -> list[int]:
  """Returns the numbers of the rounds that were begun, in order."""
  if not folder.is_dir():
    return []
  found = (PATTERN.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
  return sorted(int(match[1]) for match in found if match is not None)


def drawn(folder: pathlib.Path) -> list[int]:
  """Returns the numbers of the rounds whose pairs are all drawn, in order."""
  return [number for number in numbers(folder) if (folder_of(folder, number) / PAIRS_NAME).is_file()]


def next_number(folder: pathlib.Path) -> int:
  """Returns the number of the round to draw: the last one if its pairs are not all drawn yet, else a new one."""
  begun = numbers(folder)
  if not begun:
    return 0
  return begun[-1] + (begun[-1] in drawn(folder))


def newest_run(folder: pathlib.Path) -> pathlib.Path:
  """Returns the run in a folder of runs whose model was exported last.

  Raises:
    FileNotFoundError: no run in it has an exported model.
  """
  models = [path for path in folder.glob("*/export/model_index.json") if path.is_file()]
  if not models:
    raise FileNotFoundError(f"{folder} holds no finished run, which has export/; name a run or a model.")
  return max(models, key=lambda path: path.stat().st_mtime_ns).parents[1]
