"""Reads prompts for all commands, in their published formats, and writes the folders of GenEval's own scorer.

  kind     file                                                            category
  text     .txt, or a name without an ending: one prompt per line           none
  json     a list of strings, or of objects with a caption or a prompt     the object's, if it has one
  table    .csv, .jsonl or .parquet with a column caption or prompt, and   the row's, if it has one
           optionally category and id, such as Pick-a-Pic's test_unique
  parti    PartiPrompts.tsv: Prompt, Category, Challenge, Note             Category
  hpdv2    HPDv2's benchmark: a folder of anime.json, concept-art.json,    the name of the file
           paintings.json and photo.json, or one of these
  geneval  evaluation_metadata.jsonl: objects with tag, include, prompt    tag

The kind follows from the name and the content; a file of none of these kinds raises. Lines end as `paths.lines` says. A
path may be in a bucket.
"""

import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxpref.data import paths
from jaxpref.recipes.messages import listed

Path = str | os.PathLike
logger = logging.getLogger(__name__)

KINDS = ("text", "json", "table", "parti", "hpdv2", "geneval")
STYLES = ("anime", "concept-art", "paintings", "photo")  # HPDv2's benchmark
TEXT_COLUMNS = ("caption", "prompt")
PARTI_COLUMNS = ("Prompt", "Category", "Challenge", "Note")
GENEVAL_FIELDS = ("tag", "include", "prompt")
TEXT_ENDINGS = ("", ".txt", ".text")  # endings of files with one prompt per line
ENDINGS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")  # a word with one of these endings names a file


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt of a set.

  Attributes:
    text: what to draw.
    category: group of prompts in the results; empty if the set has none.
    id: the set's name for it; empty if the set has none.
    extra: what else the set says of it: the other columns, or GenEval's whole object.
  """

  text: str
  category: str = ""
  id: str = ""
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read(path: Path, *, kind: str | None = None) -> list[Prompt]:
  """Reads the prompts to compare models by: as `read_all`, but repeated prompts only once.

  Prompts are the unit of intervals and tests, and a repeated one would count as another. All of GenEval's stay, as its
  own scorer numbers them. A warning counts the repeated ones.
  """
  prompts, kind = _read(path, kind)
  repeated = repeats(prompts)
  if repeated:
    first = next(iter(repeated))
    what = "each is kept and counts by itself" if kind == "geneval" else "each is used once"
    logger.warning(
      "%s: %d prompts are repeated, such as %r (%d times); %s.",
      paths.open_path(path), len(repeated), first, repeated[first], what,
    )  # fmt: skip
  if kind == "geneval":
    return prompts
  firsts: dict[str, Prompt] = {}
  for prompt in prompts:
    firsts.setdefault(prompt.text, prompt)
  return list(firsts.values())


def read_all(path: Path, *, kind: str | None = None) -> list[Prompt]:
  """Reads all prompts of a file, or of HPDv2's folder, in order, with repeated ones.

  Args:
    path: the file or folder.
    kind: one of KINDS; None: detected from name and content.

  Raises:
    FileNotFoundError: the path does not exist, or a file of HPDv2 is missing.
    ValueError: the file is not of that kind, or of none; names the line.
  """
  return _read(path, kind)[0]


def given(words: Sequence[str], *, option: str) -> list[str]:
  """Returns the prompts that a command line gives: the words themselves, or those of one file that they name.

  Args:
    words: prompts, or the name of one file or of HPDv2's folder.
    option: option of the command, for messages.

  Raises:
    FileNotFoundError, ValueError: as `read_all`; or one of several words names a file.
  """
  files = [word for word in words if _names_a_file(word)]
  if files and len(words) > 1:
    raise ValueError(
      f"{option} has {len(words)} prompts, and {files[0]!r} is the name of a file; give only one file of prompts, or "
      "end this word with a space to draw it."
    )
  if files and (not pathlib.Path(files[0]).is_dir() or is_hpdv2_folder(files[0])):
    return [prompt.text for prompt in read_all(files[0])]
  return [check_prompt(word, option=option) for word in words]


def check_prompt(word: str, *, option: str) -> str:
  """Returns a prompt given on a command line.

  Raises:
    ValueError: it is the name of a file or the path of a folder, whose prompts may be meant.
  """
  if _names_a_file(word):
    raise ValueError(
      f"{option}={word!r} names a file or a folder, expected the words of a prompt; give a file of prompts as "
      "--prompts, or end these words with a space to draw them."
    )
  return word


def _names_a_file(word: str) -> bool:
  """Returns whether a word names something that exists, or looks like the name of a file."""
  if paths.is_remote(word) and not any(c.isspace() for c in word):
    return True
  if pathlib.PurePath(word).suffix.lower() in ENDINGS:
    return True
  try:
    place = pathlib.Path(word).expanduser()
    # A bare word is a prompt even if a folder, perhaps of pictures, has that name; a path is not.
    return place.is_file() or (place.is_dir() and (len(place.parts) > 1 or is_hpdv2_folder(place)))
  except (OSError, RuntimeError, ValueError):  # a name that is too long, of an unknown user, or with a zero byte
    return False


def _read(path: Path, kind: str | None) -> tuple[list[Prompt], str]:
  """Returns the prompts and their kind."""
  if kind is not None and kind not in KINDS:
    raise ValueError(f"kind={kind!r} of prompts; expected one of {', '.join(KINDS)}.")
  if not os.fspath(path):
    raise ValueError(f"the name of the file of prompts is empty; expected one of the kinds {', '.join(KINDS)}.")
  place = paths.open_path(path)
  if place.is_dir():
    if kind not in (None, "hpdv2"):
      raise ValueError(f"{place} is a folder; expected a file of kind {kind}.")
    prompts, kind = _read_hpdv2_folder(place), "hpdv2"
  elif place.is_file() and place.name.lower().endswith(".parquet"):
    if kind not in (None, "table"):
      raise ValueError(f"{place} is a Parquet file; expected a file of kind {kind}.")
    prompts, kind = _read_parquet(place), "table"
  elif place.is_file():
    text = _decoded(place)
    kind = kind or detect_kind(place, text)
    prompts = _READERS[kind](place, text)
  else:
    raise FileNotFoundError(f"there is no file of prompts {path}; expected one of the kinds {', '.join(KINDS)}.")
  if not prompts:
    raise ValueError(f"{place} has no prompts; expected at least one.")
  return prompts, kind


def repeats(prompts: Sequence[Prompt]) -> dict[str, int]:
  """Returns {text: count} of the prompts that are repeated."""
  return {text: n for text, n in Counter(p.text for p in prompts).items() if n > 1}


def detect_kind(place: Any, text: str) -> str:
  """Returns which of KINDS a file is, from its name and content.

  Raises:
    ValueError: it looks like none of them.
  """
  suffix = pathlib.PurePosixPath(place.name).suffix.lower()
  first = next((line for line in paths.lines(text) if line.strip()), "").strip()
  if suffix == ".json" or (suffix != ".jsonl" and (re.match(r'\[\s*("|\{|$)', first) or first == "{")):
    return "hpdv2" if pathlib.PurePosixPath(place.name).stem in STYLES else "json"
  if suffix == ".jsonl" or re.match(r'\{\s*"', first):
    return "geneval" if '"tag"' in first and '"include"' in first else "table"
  if suffix == ".tsv" or ("\t" in first and _is_header(first.split("\t"))):
    return "parti"
  if suffix == ".csv" or _is_header(re.split("[,;]", first)):
    return "table"
  if suffix not in TEXT_ENDINGS or first.startswith(("<?xml", "<!DOCTYPE", "---")):
    raise ValueError(
      f"{place} has no known form of prompts; expected {', '.join(ENDINGS)}: convert it, or name it .txt if it has "
      "only one prompt per line."
    )
  return "text"


def _is_header(cells: Sequence[str]) -> bool:
  """Returns whether the cells of a first line are names of columns, one of them the prompts'."""
  return any(cell.strip().strip('"').lower() in TEXT_COLUMNS for cell in cells)


def _decoded(place: Any) -> str:
  try:
    text = paths.read(place).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{place} is not UTF-8 text ({error}); expected a text file of prompts, or convert it.") from error
  if "\0" in text:
    raise ValueError(f"{place} is not a text; expected one of the kinds {', '.join(KINDS)}.")
  return text


def _prompt(fields: Mapping[str, Any], where: str, number: int, columns: Sequence[str]) -> Prompt:
  """Returns a row or an object as a prompt; names of fields in any case."""
  names = {str(name).strip().lower(): name for name in fields}
  column = next((names[c] for c in columns if c in names), None)
  if column is None:
    found = listed(map(str, fields)) or "nothing"
    raise ValueError(f"{where} {number}: found {found}; expected a field {' or '.join(columns)}.")
  text = fields[column]
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f"{where} {number}: {column} = {text!r}; expected a text that is not empty.")
  if not paths.is_whole_text(text):
    raise ValueError(f"{where} {number}: {column} = {text!r} has half of a character; expected text that is UTF-8.")
  known = {key: names[key] for key in ("category", "id") if key in names}
  given = {key: str(fields[name]) for key, name in known.items() if fields[name] is not None}
  extra = {name: value for name, value in fields.items() if name not in (column, *known.values())}
  return Prompt(text, **given, extra=extra)


# ---- Kinds -----------------------------------------------------------------------------------------------------


def _read_text(place: Any, text: str) -> list[Prompt]:
  return [Prompt(line) for line in paths.lines(text) if line.strip()]


def _read_json(place: Any, text: str) -> list[Prompt]:
  rows = _json_list(place, text)
  return [
    _prompt({"prompt": row} if isinstance(row, str) else row, f"{place}, entry", i, TEXT_COLUMNS)
    for i, row in enumerate(rows, 1)
  ]


def _json_list(place: Any, text: str) -> list[Any]:
  try:
    rows = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"{place} is not JSON ({error}); expected a list of prompts.") from error
  if not isinstance(rows, list):
    raise ValueError(f"{place}: found a JSON {type(rows).__name__}; expected a list of strings or objects.")
  for i, row in enumerate(rows, 1):
    if not isinstance(row, str | dict):
      raise ValueError(f"{place}, entry {i}: {row!r}; expected a string, or an object with a caption or a prompt.")
  return rows


def _read_hpdv2(place: Any, text: str) -> list[Prompt]:
  style = place.stem
  rows = _json_list(place, text)
  wrong = next((i for i, row in enumerate(rows, 1) if not isinstance(row, str)), None)
  if wrong is not None:
    raise ValueError(f"{place}, entry {wrong}: {rows[wrong - 1]!r}; expected HPDv2's list of strings.")
  return [
    dataclasses.replace(prompt, category=style, id=f"{style}/{i:05}")
    for i, prompt in enumerate(_read_json(place, text))
  ]


def is_hpdv2_folder(folder: Path) -> bool:
  """Returns whether a folder has all files of HPDv2's benchmark."""
  return {f"{style}.json" for style in STYLES} <= paths.names(paths.open_path(folder))


def _read_hpdv2_folder(folder: Any) -> list[Prompt]:
  missing = [f"{style}.json" for style in STYLES if not (folder / f"{style}.json").is_file()]
  if missing:
    raise FileNotFoundError(
      f"{folder} has no {', '.join(missing)}; expected the four files of HPDv2's benchmark, or give the path of a file."
    )
  files = [folder / f"{style}.json" for style in STYLES]
  return [prompt for file in files for prompt in _read_hpdv2(file, _decoded(file))]


def _read_parti(place: Any, text: str) -> list[Prompt]:
  """Reads the cells between tabs unchanged: the published file has quotes in prompts and does not quote cells."""
  lines = ((number, line.split("\t")) for number, line in enumerate(paths.lines(text), 1) if line.strip())
  _, header = next(lines, (0, []))
  header = [name.strip() for name in header]
  missing = [name for name in PARTI_COLUMNS[:2] if name not in header]
  if missing:
    raise ValueError(
      f"{place}: no column {' or '.join(missing)} in {header}; expected PartiPrompts' {', '.join(PARTI_COLUMNS)}, "
      "separated by tabs."
    )
  prompts = []
  for number, cells in lines:
    if len(cells) > len(header):
      raise ValueError(f"{place}, line {number}: {len(cells)} cells; expected {len(header)}, separated by tabs.")
    fields = dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))
    prompts.append(_prompt(fields, f"{place}, line", number, ("prompt",)))
  return prompts


def _read_geneval(place: Any, text: str) -> list[Prompt]:
  prompts: list[Prompt] = []
  for number, row in _json_lines(place, text):
    missing = [name for name in GENEVAL_FIELDS if name not in row]
    if missing:
      raise ValueError(
        f"{place}, line {number}: no {', '.join(missing)}; expected {', '.join(GENEVAL_FIELDS)} in each of GenEval's "
        "objects."
      )
    prompt = _prompt(row, f"{place}, line", number, ("prompt",))
    prompts.append(Prompt(prompt.text, str(row["tag"]), f"{len(prompts):05}", row))
  return prompts


def _read_table(place: Any, text: str) -> list[Prompt]:
  first = next((line for line in paths.lines(text) if line.strip()), "")
  is_csv = place.suffix.lower() == ".csv" or _is_header(re.split("[,;]", first))
  rows = _csv_rows(place, text) if is_csv else _json_lines(place, text)
  return [_prompt(row, f"{place}, line", number, TEXT_COLUMNS) for number, row in rows]


def _read_parquet(place: Any) -> list[Prompt]:
  """Reads only the columns of text: others may hold pictures."""
  import pyarrow
  import pyarrow.parquet

  try:
    with place.open("rb") as stream:
      file = pyarrow.parquet.ParquetFile(stream)
      names = list(file.schema_arrow.names)
      wanted = [name for name in names if name.strip().lower() in (*TEXT_COLUMNS, "category", "id")]
      if not any(name.strip().lower() in TEXT_COLUMNS for name in wanted):
        raise ValueError(f"{place}: found {listed(names)}; expected a column {' or '.join(TEXT_COLUMNS)}.")
      rows = file.read(columns=wanted).to_pylist()
  except pyarrow.ArrowInvalid as error:
    raise ValueError(f"{place} is not a Parquet file ({error}); download it again.") from error
  return [_prompt(row, f"{place}, row", i, TEXT_COLUMNS) for i, row in enumerate(rows, 1)]


def _json_lines(place: Any, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
  for number, line in enumerate(paths.lines(text), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"{place}, line {number}: not JSON ({error}); expected one object per line.") from error
    if not isinstance(row, dict):
      raise ValueError(f"{place}, line {number}: found {row!r}; expected one object per line.")
    yield number, row


def _csv_rows(place: Any, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
  reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
  try:
    for row in reader:
      if None in row:
        raise ValueError(
          f"{place}, line {reader.line_num}: more cells than the header has; quote the texts that hold commas."
        )
      if any(isinstance(cell, str) and cell.strip() for cell in row.values()):
        yield reader.line_num, row
  except csv.Error as error:
    raise ValueError(f"{place}, line {reader.line_num}: not CSV ({error}); expected commas and quotes.") from error


_READERS: dict[str, Callable[[Any, str], list[Prompt]]] = {
  "text": _read_text,
  "json": _read_json,
  "table": _read_table,
  "parti": _read_parti,
  "hpdv2": _read_hpdv2,
  "geneval": _read_geneval,
}


# ---- GenEval ---------------------------------------------------------------------------------------------------


def check_geneval(prompts: Sequence[Prompt]) -> None:
  """Raises for prompts that GenEval's scorer could not read.

  Raises:
    ValueError: the prompts are of another kind.
  """
  for i, prompt in enumerate(prompts):
    missing = [name for name in GENEVAL_FIELDS if name not in prompt.extra]
    if missing:
      raise ValueError(
        f"prompt {i}, {prompt.text!r}, has no {', '.join(missing)}; GenEval's scorer needs the prompts of its own "
        "evaluation_metadata.jsonl."
      )


def geneval_layout(folder: Path, prompts: Sequence[Prompt], image_of: Callable[[int], Iterable[Path]]) -> None:
  """Writes the folders that evaluate_images.py of github.com/djghosh13/geneval reads.

  FOLDER/00000/metadata.jsonl has the object of the first prompt, FOLDER/00000/samples/0000.png and so on its pictures.

  Args:
    folder: created if missing; may have the same prompts already, which are written again.
    prompts: all prompts of kind geneval: the numbers of the folders are theirs.
    image_of: number of a prompt -> the files of its pictures; files that are not PNG are converted.

  Raises:
    ValueError: the prompts are of another kind, or the folder has other pictures.
    FileNotFoundError: a picture is missing.
    CannotBeWritten: see `paths`.
  """
  check_geneval(prompts)
  place = pathlib.Path(folder)
  files = [[pathlib.Path(file) for file in image_of(i)] for i in range(len(prompts))]
  absent = [str(file) for of_prompt in files for file in of_prompt if not file.is_file()]
  if absent:
    raise FileNotFoundError(f"the picture {absent[0]} does not exist ({len(absent)} are missing); draw them first.")
  _refuse_others(place, [len(of_prompt) for of_prompt in files])
  with paths.cannot_be_written(place):
    for i, (prompt, sources) in enumerate(zip(prompts, files, strict=True)):
      samples = place / f"{i:05}" / "samples"
      samples.mkdir(parents=True, exist_ok=True)
      paths.write(samples.parent / "metadata.jsonl", (json.dumps(dict(prompt.extra)) + "\n").encode())
      for s, source in enumerate(sources):
        _write_png(source, samples / f"{s:04}.png")


def _refuse_others(place: pathlib.Path, counts: Sequence[int]) -> None:
  """Raises for other files: GenEval's scorer reads every numbered folder and picture, so none may be left over."""
  for entry in sorted(paths.names(place)):
    if not re.fullmatch("[0-9]+", entry):
      continue
    known = {f"{s:04}.png" for s in range(counts[int(entry)])} if int(entry) < len(counts) else set()
    others = sorted(name for name in paths.names(place / entry / "samples") - known if name.endswith(".png"))
    if others or not known or entry != f"{int(entry):05}":
      found = f"{entry}/samples/{others[0]}" if others else entry
      raise ValueError(f"{place} has {found}, which is none of these pictures; empty it, or choose another folder.")


def _write_png(source: pathlib.Path, target: pathlib.Path) -> None:
  with paths.part_of(target) as part:
    if source.suffix.lower() == ".png":
      shutil.copyfile(source, part)
    else:
      from PIL import Image

      with Image.open(source) as image:
        image.convert("RGB").save(part, "PNG")
    part.replace(target)
