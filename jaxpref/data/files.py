"""Preference data whose images are files: a .jsonl or .csv file with a row for each pair or image, or rankings.

The content of the file is in memory; images are read when they are asked for. Whether they exist is checked first, by
listing each folder once. An error in a file is reported in one sentence with its name and the line. The file and the
images may lie in a bucket (`paths`).
"""

import array
import csv
import dataclasses
import difflib
import hashlib
import json
import math
import os
import pathlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from jaxpref.data import index as index_lib
from jaxpref.data import paths
from jaxpref.data.index import Index
from jaxpref.devices.progress import tqdm

Path = str | os.PathLike
PROGRESS_AFTER = 3.0  # seconds


# ---- A row for each pair or image --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _LineIds:
  """Ids that the rows give, else the name of the file and the line."""

  file: str
  lines: np.ndarray
  given: Sequence[str | None]

  def __getitem__(self, i: int) -> str:
    return self.given[i] or f"{self.file}:{self.lines[i]}"


@dataclasses.dataclass(frozen=True)
class _RankingIds:
  """Ids made of the name of the file, the entry, and the places of the two images in it."""

  file: str
  entry: np.ndarray
  place_0: np.ndarray
  place_1: np.ndarray

  def __getitem__(self, i: int) -> str:
    return f"{self.file}:{self.entry[i]}:{self.place_0[i]}-{self.place_1[i]}"


class FilePairs:
  """Pairs whose images are files; the rows are in memory, the images are not."""

  def __init__(
    self,
    folder: Any,
    captions: Sequence[str],
    files: Sequence[str],
    images: Sequence[np.ndarray],
    ids: _LineIds | _RankingIds,
    index: Index,
    optional: Mapping[str, Mapping[int, list[int]]] | None = None,
  ):
    """Opens pairs without reading images.

    Args:
      files: paths relative to the folder.
      images: numbers of the files of image_0 and image_1.
      optional: fields that only some records have, by name and number of the record.
    """
    self._folder = folder
    self._captions = captions
    self._files = files
    self._images = images
    self._ids = ids
    self._optional = optional or {}
    self.index = index

  def __len__(self) -> int:
    return len(self.index)

  def __getitem__(self, i: int) -> dict[str, Any]:
    i = range(len(self))[i]
    index = self.index
    record = {
      "id": self._ids[i],
      "caption": self._captions[i],
      "image_0": paths.read(self._folder / self._files[self._images[0][i]]),
      "image_1": paths.read(self._folder / self._files[self._images[1][i]]),
      "label_0": float(index.label_0[i]),
      "num_example_per_prompt": int(index.num_example_per_prompt[i]),
    }
    return record | {name: values[i] for name, values in self._optional.items() if i in values}

  def names(self, i: int) -> tuple[str, str, str]:
    """Returns the caption and the paths of image_0 and image_1, relative to the folder; reads no image."""
    first, second = (self._files[of_side[i]] for of_side in self._images)
    return self._captions[i], first, second


class FileImages:
  """Single images, liked or disliked, that are files."""

  def __init__(
    self,
    folder: Any,
    captions: Sequence[str],
    files: Sequence[str],
    images: np.ndarray,
    ids: _LineIds,
    index: Index,
  ):
    self._folder = folder
    self._captions = captions
    self._files = files
    self._images = images
    self._ids = ids
    self.index = index

  def __len__(self) -> int:
    return len(self.index)

  def __getitem__(self, i: int) -> dict[str, Any]:
    i = range(len(self))[i]
    return {
      "id": self._ids[i],
      "caption": self._captions[i],
      "image": paths.read(self._folder / self._files[self._images[i]]),
      "label": np.float32(self.index.label_0[i]),
    }


PAIR_COLUMNS = (
  *("caption", "image_0", "image_1", "label_0", "preferred", "score_0", "score_1", "id"),
  *("num_example_per_prompt", "original_size_0", "original_size_1", "noise_0", "noise_1"),
)
PAIRS_NAME = "pairs.jsonl"  # in a folder of pairs
UNPAIRED_COLUMNS = ("caption", "image", "label", "id")


def open_pairs_file(file: Path, *, labelled: bool = True) -> FilePairs:
  """Opens pairs listed in a .jsonl or .csv file, or in pairs.jsonl of a folder.

  Columns: caption; image_0 and image_1, paths relative to the file; and the winner: label_0 (1, 0, 0.5, or between them
  the probability that image_0 is preferred), preferred (0 or 1, the better image, or "tie"), or the higher
  of score_0 and score_1. Optional: id, score_0 and score_1 (see `Index`), num_example_per_prompt, original_size_0 and
  original_size_1 ([height, width] or HEIGHTxWIDTH), and for drawn images noise_0 and noise_1 ([seed, number] or
  SEED:NUMBER), whose noise is `evaluation.drawing.prior_noise(seed, [number], ...)`. Fields may be empty in some rows,
  except the scores, which all rows have or none.

  Args:
    file: the file, or its folder.
    labelled: whether a row must say which image is better; without it, a row that does not say so is a tie.

  Raises:
    FileNotFoundError: the file or an image is missing.
    ValueError: a row has another form; names file and line.
  """
  place = paths.open_path(file)
  if place.suffix not in (".jsonl", ".csv") and (place / PAIRS_NAME).is_file():
    place = place / PAIRS_NAME
  elif place.suffix not in (".jsonl", ".csv") and place.is_dir():
    raise FileNotFoundError(
      f"the folder {place} has no {PAIRS_NAME}; finish it by the command that began it, or name a .jsonl or .csv file."
    )
  table = _Table(place, PAIR_COLUMNS, required=("caption", "image_0", "image_1"))
  labels, published = array.array("f"), array.array("i")
  scores: tuple[array.array, array.array] = array.array("f"), array.array("f")
  images = array.array("q"), array.array("q")
  optional: dict[str, dict[int, list[int]]] = {}
  for row in table.rows():
    i = len(labels)
    score = [row.number(name) for name in ("score_0", "score_1")]
    if (score[0] is None) != (score[1] is None) or (i and (score[0] is None) != (not scores[0])):
      row.refuse("score_0 and score_1 are given in a part of the rows or columns", "give both in all rows, or none")
    says = labelled or score[0] is not None or "label_0" in row or "preferred" in row
    labels.append(_pair_label(row, score) if says else 0.5)
    for side, name in enumerate(("image_0", "image_1")):
      images[side].append(table.file_number(row, name))
      if score[side] is not None:
        scores[side].append(score[side])
      for field, value in ((f"original_size_{side}", _size), (f"noise_{side}", _noise)):
        if (found := value(row, field)) is not None:
          optional.setdefault(field, {})[i] = found
    published.append(_count(row))
  image_ids = table.check_files()
  numbers = [np.asarray(of_side) for of_side in images]
  return FilePairs(
    table.file.parent,
    table.captions,
    list(table.files),
    numbers,
    table.ids(),
    index_lib.make_index(
      table.captions,
      label_0=np.asarray(labels),
      num_example_per_prompt=np.asarray(published) if min(published) > 0 else None,
      score_0=np.asarray(scores[0]) if scores[0] else None,
      score_1=np.asarray(scores[1]) if scores[1] else None,
      image_0=image_ids[numbers[0]],
      image_1=image_ids[numbers[1]],
    ),
    optional,
  )


def open_unpaired_file(file: Path) -> FileImages:
  """Opens images, each liked or disliked, that a .jsonl or .csv file lists.

  Columns: caption; image, a path relative to the file; label (true or 1: liked, false or 0: disliked); optionally id.

  Raises:
    FileNotFoundError: the file or an image is missing.
    ValueError: a row has another form; names file and line.
  """
  table = _Table(file, UNPAIRED_COLUMNS, required=("caption", "image", "label"))
  labels, images = array.array("f"), array.array("q")
  known = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
  for row in table.rows():
    value = str(row["label"]).lower()
    if value not in known:
      row.refuse(f"label = {row['label']!r}", "expected true or 1 (liked), false or 0 (disliked)")
    labels.append(known[value])
    images.append(table.file_number(row, "image"))
  numbers = np.asarray(images)
  image_ids = table.check_files()
  index = index_lib.make_index(table.captions, label_0=np.asarray(labels), image_0=image_ids[numbers])
  return FileImages(table.file.parent, table.captions, list(table.files), numbers, table.ids(), index)


class _Row(dict):
  """The non-empty fields of a row, and its place."""

  def __init__(self, fields: Mapping[str, Any], file: Any, line: int):
    super().__init__({name: value for name, value in fields.items() if value is not None and value != ""})
    self.file = file
    self.line = line

  def refuse(self, problem: str, remedy: str) -> NoReturn:
    raise ValueError(f"{self.file}, line {self.line}: {problem}; {remedy}.")

  def number(self, name: str) -> float | None:
    if name not in self:
      return None
    try:
      value = float(self[name])
    except (TypeError, ValueError):
      value = math.nan
    if not math.isfinite(value):
      self.refuse(f"{name} = {self[name]!r}", "expected a number")
    return value


class _Table:
  """A .jsonl or .csv file with a row for each record: captions, ids, and the image files it names.

  Attributes:
    file: the file.
    captions: those of the rows read so far; equal ones are one string in memory.
    files: path, without ./ and // -> its number; in the order of the numbers.
  """

  def __init__(self, file: Path, columns: Sequence[str], required: Sequence[str]):
    self.file = paths.open_path(file)
    size = paths.size(self.file)
    if (size is not None or self.file.is_dir()) and self.file.suffix not in (".jsonl", ".csv"):
      remedy = "it is a folder: name the file in it" if self.file.is_dir() else "rename or convert it"
      raise ValueError(f"{self.file} is not a .jsonl or .csv file; {remedy}.")
    if size is None or self.file.is_dir():
      raise FileNotFoundError(f"there is no file {self.file}; expected .jsonl or .csv with {', '.join(required)}.")
    self._size = size
    self._columns = columns
    self._required = required
    self.captions: list[str] = []
    self.files: dict[str, int] = {}
    self._ids: list[str | None] = []
    self._lines = array.array("q")
    self._named_in: list[tuple[int, str]] = []  # the line and column that first name each file
    self._same: dict[str, str] = {}

  def ids(self) -> _LineIds:
    """The ids of the rows read so far."""
    return _LineIds(self.file.name, np.asarray(self._lines), self._ids)

  def rows(self) -> Iterator[_Row]:
    """Yields all rows, checked for unknown and missing columns and empty captions."""
    parse = self._json_rows if self.file.suffix == ".jsonl" else self._csv_rows
    with (
      paths.open_text(self.file) as stream,
      tqdm(total=self._size, desc=f"reading {self.file}", unit="B", unit_scale=True, delay=PROGRESS_AFTER) as bar,
    ):
      try:
        for row in parse(_counted(stream, bar.update)):
          caption = row["caption"]
          if not isinstance(caption, str) or not caption.strip():
            row.refuse(f"caption = {caption!r}", "expected a text that is not empty")
          self.captions.append(self._same.setdefault(caption, caption))
          self._ids.append(str(row["id"]) if "id" in row else None)
          self._lines.append(row.line)
          yield row
      except UnicodeDecodeError as error:
        raise ValueError(f"{self.file} is not UTF-8 ({error}); convert it.") from error
    if not self.captions:
      raise ValueError(f"{self.file} has no rows; expected at least one with {', '.join(self._required)}.")

  def _json_rows(self, stream: Iterable[str]) -> Iterator[_Row]:
    for line, text in enumerate(stream, 1):
      if not text.strip():
        continue
      try:
        fields = json.loads(text)
      except json.JSONDecodeError as error:
        raise ValueError(f"{self.file}, line {line}: not JSON ({error}); expected one object per line.") from error
      if not isinstance(fields, dict):
        raise ValueError(f"{self.file}, line {line}: found a {type(fields).__name__}; expected one object per line.")
      row = _Row(fields, self.file, line)
      self._check_columns(fields, row, row)
      yield row

  def _csv_rows(self, stream: Iterable[str]) -> Iterator[_Row]:
    reader = csv.DictReader(stream, strict=True)
    try:
      header = reader.fieldnames or ()
      self._check_columns(header, header, _Row({}, self.file, 1))
      for fields in reader:
        row = _Row(fields, self.file, reader.line_num)
        if None in fields:
          row.refuse("more cells than the header has", "quote texts that hold commas")
        self._check_columns((), row, row)
        yield row
    except csv.Error as error:
      line = reader.reader.line_num
      raise ValueError(f"{self.file}, line {line}: not CSV ({error}); expected commas and quotes.") from error

  def _check_columns(self, given: Iterable[str], filled: Iterable[str], row: _Row) -> None:
    """Raises for unknown columns among those given, and for required ones that are not filled."""
    for name in given:
      if name not in self._columns:
        near = difflib.get_close_matches(str(name), self._columns, n=1)
        hint = f"did you mean {near[0]!r}? E" if near else "e"
        row.refuse(f"unknown column {name!r}", f"{hint}xpected {', '.join(self._columns)}")
    for name in self._required:
      if name not in filled:
        row.refuse(f"no {name}, or an empty one", f"expected {', '.join(self._required)} in every row")

  def file_number(self, row: _Row, column: str) -> int:
    """Returns the number of the image file that a column of a row names."""
    name = row[column]
    if not isinstance(name, str) or _leaves_folder(name):
      row.refuse(f"{column} = {name!r}", "expected the path of an image file, relative to this file's folder and in it")
    number = self.files.setdefault(posixpath.normpath(name), len(self.files))
    if number == len(self._named_in):
      self._named_in.append((row.line, column))
    return number

  def check_files(self) -> np.ndarray:
    """Returns `find_files` of all files; raises if image files do not exist."""
    files = list(self.files)
    image_ids, missing = find_files(self.file.parent, files)
    if missing:
      line, column = self._named_in[missing[0]]
      raise FileNotFoundError(
        f"{self.file}, line {line}: {column} = {files[missing[0]]!r} does not exist in {self.file.parent}"
        f"{_others(missing, files)}; correct the paths, which are relative to this file."
      )
    return image_ids


def _others(missing: Sequence[int], files: Sequence[str]) -> str:
  return f" ({len(missing)} of {len(files)} files are missing)" if len(missing) > 1 else ""


def _counted(stream: Iterable[str], progress: Callable[[int], Any]) -> Iterator[str]:
  for text in stream:
    progress(len(text))
    yield text


def _leaves_folder(name: str) -> bool:
  """Returns whether a path in a file may lead out of the folder that it is relative to."""
  path = pathlib.PurePosixPath(name)
  return path.is_absolute() or ".." in path.parts or "://" in name or "\0" in name


def find_files(folder: Any, files: Sequence[str]) -> tuple[np.ndarray, list[int]]:
  """Looks for files relative to a folder, by listing each folder once; opens no file.

  Returns:
    i64[n], an id for each file: a hash of the first name it has here, so two names of one file share it. And the
    numbers of the files that do not exist.
  """
  listed: dict[str, dict[str, int | None]] = {}
  first: dict[int, bytes] = {}
  missing: list[int] = []
  ids: list[bytes] = []
  for number, file in enumerate(tqdm(files, desc=f"looking for images in {folder}", delay=PROGRESS_AFTER)):
    parent, name = os.path.split(file)
    if parent not in listed:
      listed[parent] = paths.identities(folder / parent)
    own = hashlib.blake2b(file.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    if name not in listed[parent]:
      missing.append(number)
    elif (identity := listed[parent][name]) is not None:
      own = first.setdefault(identity, own)
    ids.append(own)
  return np.frombuffer(b"".join(ids), "<i8").astype(np.int64), missing


def _pair_label(row: _Row, score: Sequence[float | None]) -> float:
  if "label_0" in row and "preferred" in row:
    row.refuse("both label_0 and preferred", "give one of them")
  if "label_0" in row:
    try:
      label = math.nan if isinstance(row["label_0"], bool) else float(row["label_0"])
    except (TypeError, ValueError):
      label = math.nan
    if not 0.0 <= label <= 1.0:
      row.refuse(
        f"label_0 = {row['label_0']!r}",
        "expected 1 (image_0 is preferred), 0 (image_1 is), 0.5 (a tie) or a probability between them",
      )
    return label
  if "preferred" in row:
    known = {"0": 1.0, "1": 0.0, "tie": 0.5}
    value = row["preferred"]
    if isinstance(value, bool) or str(value) not in known:
      row.refuse(f"preferred = {value!r}", "expected 0 (image_0), 1 (image_1) or tie")
    return known[str(value)]
  if score[0] is None or score[1] is None:
    row.refuse(
      "no label_0, no preferred and no scores",
      "say which image is better, or label drawn pictures by a reward: python -m jaxpref.pairs "
      f"--out={row.file.parent} --label=REWARD",
    )
  return 0.5 if score[0] == score[1] else float(score[0] > score[1])


def _size(row: _Row, name: str) -> list[int] | None:
  if name not in row:
    return None
  value = row[name].lower().split("x") if isinstance(row[name], str) else row[name]
  try:
    height, width = (int(side) for side in value)
  except (TypeError, ValueError):
    height = width = 0
  if height < 1 or width < 1:
    row.refuse(f"{name} = {row[name]!r}", "expected [height, width] or HEIGHTxWIDTH in pixels")
  return [height, width]


def _noise(row: _Row, name: str) -> list[int] | None:
  if name not in row:
    return None
  value = row[name].split(":") if isinstance(row[name], str) else row[name]
  try:
    seed, number = (int(part) for part in value)
  except (TypeError, ValueError):
    seed = number = -1
  if seed < 0 or number < 0:
    row.refuse(f"{name} = {row[name]!r}", "expected [seed, number] or SEED:NUMBER")
  return [seed, number]


def _count(row: _Row) -> int:
  """Returns num_example_per_prompt of a row; 0 if it is not given."""
  value = row.number("num_example_per_prompt")
  if value is None:
    return 0
  if value < 1 or value != int(value):
    row.refuse(f"num_example_per_prompt = {row['num_example_per_prompt']!r}", "expected a positive integer")
  return int(value)


# ---- Rankings --------------------------------------------------------------------------------------------------


def open_rankings(file: Path, *, images: Path | None = None, pairs: str = "all") -> FilePairs:
  """Opens rankings in the form of HPDv2 (arXiv 2306.09341), each expanded to pairs.

  The file is a JSON list of objects with prompt, image_path (or file_path: a list of names), and either
  human_preference (train.json: 1 for the preferred image, 0 for others) or rank (test.json: 1 is best). Equal ranks are
  a tie. If more than two images are ranked, those with human_preference 0 were not compared with each other and make no
  pair.

  Args:
    file: such as HPDv2/train.json.
    images: folder of the images; None: the one named like the file without .json, as published, else the file's own.
    pairs: "all" pairs of a ranking, or "winner": a best image with each other one.

  Raises:
    FileNotFoundError: the file or an image is missing.
    ValueError: an entry has another form; names file and entry.
  """
  if pairs not in ("all", "winner"):
    raise ValueError(f"pairs={pairs!r}; expected 'all' or 'winner'.")
  place = paths.open_path(file)
  entries = _json_list(place, "rankings in the form of HPDv2's train.json")
  folder = paths.open_path(images) if images else place.with_suffix("")
  if not images and not folder.is_dir():
    folder = place.parent

  captions: list[str] = []
  files: dict[str, int] = {}
  columns = {name: array.array("q") for name in ("entry", "image_0", "image_1", "place_0", "place_1")}
  labels = array.array("f")
  entry_of_file: list[int] = []
  for number, entry in enumerate(tqdm(entries, desc=f"reading {file}", unit=" rankings", delay=PROGRESS_AFTER)):
    caption, listed, badness, judged = _ranking(place, number, entry)
    numbers = []
    for name in listed:
      numbers.append(files.setdefault(posixpath.normpath(name), len(files)))
      if numbers[-1] == len(entry_of_file):
        entry_of_file.append(number)
    best = min(badness)
    for i in range(len(listed)):
      for j in range(i + 1, len(listed)):
        if pairs == "winner" and best not in (badness[i], badness[j]):
          continue
        if not judged and badness[i] == badness[j] == 1:
          continue
        values = (number, numbers[i], numbers[j], i, j)
        for column, value in zip(columns.values(), values, strict=True):
          column.append(value)
        labels.append(0.5 if badness[i] == badness[j] else float(badness[i] < badness[j]))
        captions.append(caption)
  names = list(files)
  image_ids, missing = find_files(folder, names)
  if missing:
    raise FileNotFoundError(
      f"{file}, entry {entry_of_file[missing[0]]}: {names[missing[0]]!r} does not exist in {folder}"
      f"{_others(missing, names)}; say where the images are."
    )
  if not labels:
    raise ValueError(f"{file} gives no pair; expected rankings of at least two images.")
  images_of_pairs = [np.asarray(columns[name]) for name in ("image_0", "image_1")]
  return FilePairs(
    folder,
    captions,
    names,
    images_of_pairs,
    _RankingIds(place.name, *(np.asarray(columns[name]) for name in ("entry", "place_0", "place_1"))),
    index_lib.make_index(
      captions,
      label_0=np.asarray(labels),
      image_0=image_ids[images_of_pairs[0]],
      image_1=image_ids[images_of_pairs[1]],
    ),
  )


def _ranking(file: Any, number: int, entry: Any) -> tuple[str, list[str], list[float], bool]:
  """Returns caption, image names, how bad each image is (lower is better), and whether all were compared."""

  def refuse(problem: str, remedy: str) -> NoReturn:
    raise ValueError(f"{file}, entry {number}: {problem}; {remedy}.")

  if not isinstance(entry, dict):
    refuse(f"{type(entry).__name__}", "expected an object with prompt, image_path, and human_preference or rank")
  caption = entry.get("prompt")
  if not isinstance(caption, str) or not caption.strip():
    refuse(f"prompt = {caption!r}", "expected a text that is not empty")
  if not paths.is_whole_text(caption):
    refuse(f"prompt = {caption!r} has half of a character", "expected text that is UTF-8")
  names = entry.get("image_path", entry.get("file_path"))
  if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
    refuse(f"image_path = {names!r}", "expected a list of at least two file names")
  outside = next((name for name in names if _leaves_folder(name)), None)
  if outside is not None:
    refuse(f"image_path has {outside!r}", "expected paths relative to the folder of the images and in it")
  field = "rank" if "rank" in entry else "human_preference"
  values: Any = entry.get(field)
  numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
  if not numbers or len(values) != len(names):
    refuse(f"{field} = {values!r}", f"expected a number for each of the {len(names)} images")
  if field == "rank":
    return caption, names, [float(v) for v in values], True
  if not set(values) <= {0, 1}:
    refuse(f"human_preference = {values!r}", "expected 1 for the preferred image and 0 for the others")
  return caption, names, [1.0 - v for v in values], len(names) == 2


def _json_list(file: Any, what: str) -> list[Any]:
  if not file.is_file():
    raise FileNotFoundError(f"there is no file {file}; expected {what}.")
  try:
    entries = json.loads(paths.read(file).decode("utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{file} is not valid JSON ({error}); expected {what}.") from error
  if not isinstance(entries, list) or not entries:
    raise ValueError(f"{file} does not hold a list, or an empty one; expected {what}.")
  return entries
