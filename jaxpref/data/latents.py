"""Training data as the frozen networks see it: moments of latents and encoded prompts, computed once.

`python -m jaxpref.precompute` makes such a folder. This module reads and writes its files and knows no network:

  plan.json                            config fields, data, sizes and weights that decide its content; written first
  rows-00000-of-00004.array_record     the rows of the data, in its order, `rows_per_file` in each file
  prompts-00000-of-00001.array_record  each different prompt once, in the order of the keys
  *.array_record.json                  for a finished file: records, bytes, sha256, skipped (unreadable records)
  prompts.safetensors                  prompt i64[P], the keys, ascending; input_ids i32[P, L], the prompts
  manifest.json                        the plan, the files and the versions that wrote them; written last

The files are ArrayRecord (group_size 1; uncompressed: compression would save 6 % and slow down reading several times).
Each record is a safetensors file in memory, that is arrays by name:

  row     moments f16[h, w, 2C], or moments_0 and moments_1: mean and log variance of the VAE's posterior side by side,
          before any draw and unscaled; prompt i64[], the key of its prompt; the fields of the data's batches unchanged,
          such as label_0 f32[], and sizes_0 f32[6] as time_ids_0; and, if the plan says flip, all of them again for the
          mirrored images, as flipped/moments_0 and so on
  prompt  what the model stores of it (`Model.stored_text`), and its key, prompt i64[]: encoder_hidden_states f16[L, D]
          of the text encoders and text_embeds f16[E] (SDXL); or clip_hidden_states f16[L, D], t5_hidden_states
          bf16[L, D] and pooled_projections f16[P] (Stable Diffusion 3)

The last record of a file of rows is not a row: it has input_ids i32[n, L], the different prompts of the file.

float16 changes the loss of Diffusion-DPO by at most 3e-4 of its value at beta 5000, bfloat16 by up to 8e-4.

A folder may lie in a bucket (gs://). Its ArrayRecord files are then written locally, one at a time, and copied.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxpref.data import batching, lease, paths
from jaxpref.recipes import places

FORMAT = 1
PLAN, MANIFEST, PROMPTS = "plan.json", "manifest.json", "prompts.safetensors"
DTYPE = np.float16  # dtype of moments and encoded prompts; T5's overflow in it
FLIPPED = "flipped/"
SIZES = ("sizes", "time_ids")  # a field of batches, and its name in the files
# ArrayRecord files that a process keeps open. Opening one again takes 0.05 ms, reading a row of SDXL's 0.12 ms.
MAX_OPEN_FILES = 64

Path = str | os.PathLike
Record = Mapping[str, np.ndarray]


class DamagedFile(ValueError):
  """Raised for a file that is missing or is not what was written."""

  def __init__(self, file: Path, problem: str, remedy: str = ""):
    super().__init__(
      f"{file} is damaged ({problem}); "
      + (remedy or "delete it and run the same python -m jaxpref.precompute again; it makes only what is missing.")
    )


def prompt_key(input_ids: np.ndarray) -> int:
  """Returns an i64 hash of the token ids of one prompt."""
  digest = hashlib.blake2b(np.ascontiguousarray(input_ids, "<i4").tobytes(), digest_size=8).digest()
  return int.from_bytes(digest, "little", signed=True)


def file_name(kind: str, number: int, count: int) -> str:
  """Returns the name of a file of `kind` rows or prompts."""
  return f"{kind}-{number:05d}-of-{count:05d}.array_record"


# ---- Writing ---------------------------------------------------------------------------------------------------


def start(folder: Any, plan: Mapping[str, Any], *, process_index: int = 0, process_count: int = 1) -> None:
  """Makes a folder for what a plan describes, or continues one; removes this process's unfinished files.

  Args:
    folder: as `paths.open_path` returns it.
    plan: JSON values; `config` and `weights` are dicts.

  Raises:
    ValueError: the folder is for another plan, or holds other files.
    OSError: the folder cannot be written.
  """
  check_plan(folder, plan)
  with paths.cannot_be_written(folder):
    folder.mkdir(parents=True, exist_ok=True)
  for name in paths.names(folder):
    owner = name.removesuffix(paths.PART).rpartition(".")[2]
    if name.endswith(paths.PART) and owner.isdigit() and int(owner) % process_count == process_index:
      (folder / name).unlink()
  if PLAN not in paths.names(folder):
    _write_json(folder / PLAN, plan, process_index)


def check_plan(folder: Any, plan: Mapping[str, Any]) -> None:
  """Raises for a folder whose content does not fit the plan; writes nothing.

  Raises:
    ValueError: one sentence that names the field that differs.
  """
  paths.check_array_record(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--out={folder} is a file; name a folder.")
  names = paths.names(folder)
  if not {PLAN, MANIFEST} & names:
    if any(not name.endswith(paths.PART) and not lease.is_lock(name) for name in names):
      raise ValueError(f"--out={folder} is not empty and has no {PLAN} of an earlier run; choose another folder.")
    return
  old = _flat(_read_plan(folder, names))
  for field, value in _flat(json.loads(json.dumps(plan))).items():
    if not places.same(old.get(field), value):
      if field.startswith("weights."):
        raise ValueError(
          f"--out={folder} was begun with other weights of the {field.removeprefix('weights.')}, though of the same "
          "name; choose another folder, or put the old weights back to continue."
        )
      if field == "data":
        raise ValueError(
          f"--out={folder} was begun with other data than config.data.path has now (records, labels or images); choose "
          "another folder, or put the old data back to continue."
        )
      raise ValueError(
        f"--out={folder} was begun with {field}={old.get(field)!r}, now it is {value!r}; choose another folder, or "
        "set the old value to continue."
      )


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
  nested = {f"{name}.{k}": v for name in ("config", "weights") for k, v in plan.get(name, {}).items()}
  return {k: v for k, v in plan.items() if k not in ("config", "weights")} | nested


def _read_plan(folder: Any, names: set[str]) -> dict[str, Any]:
  """Returns the plan of a folder; for a complete folder that of its manifest, which has all of it."""
  if MANIFEST in names:
    return _read_json(folder / MANIFEST, *MANIFEST_FIELDS)
  # Without it nobody can tell what the existing files hold.
  remedy = f"delete the folder {folder} and run python -m jaxpref.precompute again."
  return _read_json(folder / PLAN, "format", "config", remedy=remedy)


def write_file(
  folder: Any,
  name: str,
  records: Iterable[Record],
  *,
  skipped: Callable[[], Iterable[str]] = tuple,
  process_index: int = 0,
) -> None:
  """Writes one file of records; the file exists whole or not at all.

  Args:
    folder: as `paths.open_path` returns it.
    name: name of the file.
    records: made while they are written.
    skipped: called at the end: names of the records of the data that were unreadable.
    process_index: number of the process that writes; no other process may have it.

  Raises:
    OSError: the file cannot be written.
  """
  from array_record.python import array_record_module

  count = 0
  with paths.part_of(folder / name, tag=process_index) as part:
    with paths.cannot_be_written(part):
      writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1,uncompressed")
    for record in records:
      encoded = safetensors.numpy.save(
        {k.replace(SIZES[0], SIZES[1]): np.asarray(v, order="C") for k, v in record.items()}
      )
      with paths.cannot_be_written(part):
        writer.write(encoded)
      count += 1
    with paths.cannot_be_written(part):
      writer.close()
    found = {"records": count, "bytes": part.stat().st_size, "sha256": _sha256(part), "skipped": sorted(skipped())}
    paths.move(part, folder / name)
  _write_json(folder / f"{name}.json", found, process_index)


def finished(folder: Any, name: str) -> dict[str, Any] | None:
  """Returns what `write_file` noted of a file that exists in its full size, else None."""
  if paths.size(folder / f"{name}.json") is None:
    return None
  found = _read_json(folder / f"{name}.json", "bytes", "sha256", "skipped")
  return found if found["bytes"] == paths.size(folder / name) else None


def different_prompts(folder: Any, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the prompts of finished files of rows: keys i64[P], ascending, and input_ids i32[P, L]."""
  prompts: dict[int, np.ndarray] = {}
  for name in names:
    reader = _Reader(folder / name)
    for ids in _decode(folder / name, reader.read(len(reader) - 1))["input_ids"]:
      prompts[prompt_key(ids)] = ids
  keys = sorted(prompts)
  return np.asarray(keys, np.int64), np.stack([prompts[key] for key in keys]).astype(np.int32)


def write_prompts(folder: Any, keys: np.ndarray, input_ids: np.ndarray, *, process_index: int = 0) -> None:
  """Writes the table of prompts."""
  paths.write(folder / PROMPTS, safetensors.numpy.save({"prompt": keys, "input_ids": input_ids}), tag=process_index)


def write_manifest(
  folder: Any, names: Mapping[str, Sequence[str]], versions: Mapping[str, str], *, process_index: int = 0
) -> None:
  """Declares a folder complete.

  Args:
    folder: as `paths.open_path` returns it.
    names: the finished files of "rows" and of "prompts", in order.
    versions: versions of the software, to record.
  """
  files: dict[str, Any] = {name: _read_json(folder / f"{name}.json") for kind in names.values() for name in kind}
  skipped = sorted({record for file in files.values() for record in file.pop("skipped")})
  files[PROMPTS] = {"bytes": paths.size(folder / PROMPTS), "sha256": _sha256(folder / PROMPTS)}
  plan = _read_plan(folder, {PLAN})
  manifest = {**plan, **names, "files": files, "skipped": skipped, "versions": versions}
  _write_json(folder / MANIFEST, manifest, process_index)


def _write_json(path: Any, value: Any, process_index: int) -> None:
  paths.write(path, (json.dumps(value, indent=2) + "\n").encode(), tag=process_index)


def _sha256(path: Any) -> str:
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while piece := file.read(2**20):
      digest.update(piece)
  return digest.hexdigest()


# ---- Reading ---------------------------------------------------------------------------------------------------


# Fields that a manifest must have.
MANIFEST_FIELDS = ("format", "kind", "config", "rows_per_file", "num_rows", "empty_prompt", "rows", "prompts", "files")


def _read_json(path: Any, *fields: str, remedy: str = "") -> dict[str, Any]:
  """Returns a JSON object that must have some fields."""
  try:
    value = json.loads(paths.read(path).decode("utf-8"))
  except ValueError as error:
    raise DamagedFile(path, str(error), remedy) from error
  missing = [field for field in fields if not isinstance(value, dict) or field not in value]
  if missing:
    raise DamagedFile(path, f"no {', '.join(missing)}", remedy)
  return value


# The names of types in safetensors; its own reader for numpy knows no bfloat16.
_TYPES: dict[str, Any] = {f"{kind}{8 * n}": f"{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)}
_TYPES |= {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BOOL": np.bool_, "BF16": ml_dtypes.bfloat16}


def _decode(file: Path, record: bytes) -> dict[str, np.ndarray]:
  try:
    views = safetensors.deserialize(record)
  except safetensors.SafetensorError as error:
    raise DamagedFile(file, str(error)) from error
  return {name: np.frombuffer(view["data"], _TYPES[view["dtype"]]).reshape(view["shape"]) for name, view in views}


class _Reader:
  """One ArrayRecord file, read by the place of a record."""

  def __init__(self, file: Any):
    from array_record.python import array_record_module

    self._file = file
    try:
      self._reader = array_record_module.ArrayRecordReader(os.fspath(file), "readahead_buffer_size:0")
      if not self._reader.ok():
        self._reader.close()  # says why
    except RuntimeError as error:
      raise DamagedFile(file, str(error)) from error

  def __len__(self) -> int:
    return self._reader.num_records()

  def read(self, place: int) -> bytes:
    try:
      return self._reader.read([place])[0]
    except (RuntimeError, IndexError) as error:
      raise DamagedFile(self._file, str(error)) from error


class _Records:
  """The records of several files as one sequence; may be pickled.

  Files are opened when needed, and only the last ones used stay open: a dataset may have thousands.
  """

  def __init__(self, folder: Any, names: Sequence[str], records_per_file: int):
    self._folder = folder
    self._names = list(names)
    self._records_per_file = records_per_file
    self._readers: collections.OrderedDict[str, _Reader] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__init__(state["_folder"], state["_names"], state["_records_per_file"])  # type: ignore[misc]

  def file(self, index: int) -> Any:
    return self._folder / self._names[index // self._records_per_file]

  def _reader(self, file: Any) -> _Reader:
    with self._lock:
      reader = self._readers.get(file.name)
      if reader is not None:
        self._readers.move_to_end(file.name)
        return reader
    reader = _Reader(file)  # outside the lock: it may take a while, and several threads read
    with self._lock:
      reader = self._readers.setdefault(file.name, reader)
      if len(self._readers) > MAX_OPEN_FILES:
        self._readers.popitem(last=False)  # closed once no thread reads from it
    return reader

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    file = self.file(index)
    return _decode(file, self._reader(file).read(index % self._records_per_file))


@dataclasses.dataclass(frozen=True, eq=False)
class Precomputed:
  """An opened folder.

  Attributes:
    folder: its place.
    manifest: its manifest.
    rows, prompts: their records.
    keys: i64[P], keys of the prompts, ascending.
    input_ids: i32[P, L], tokens of the prompts.
  """

  folder: Any
  manifest: Mapping[str, Any]
  rows: _Records
  prompts: _Records
  keys: np.ndarray
  input_ids: np.ndarray

  def row(
    self, index: int, dropped: bool = False, flipped: bool = False, *, tokens: bool = False
  ) -> dict[str, np.ndarray]:
    """Returns a row of a batch: its moments and other fields, and its encoded prompt.

    Args:
      index: number of the row.
      dropped: whether its prompt is replaced by the empty one.
      flipped: whether its images are mirrored.
      tokens: returns input_ids i32[L] of its prompt instead.
    """
    record = self.rows[index]
    prefix = FLIPPED if flipped else ""
    of_side = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(FLIPPED) == flipped}
    row = {k.replace(SIZES[1], SIZES[0]): v for k, v in of_side.items()}
    key = int(row.pop("prompt"))
    key = self.manifest["empty_prompt"] if dropped else key
    return row | ({"input_ids": self.input_ids[self._place(key)]} if tokens else self.prompt(key))

  def prompt(self, key: int) -> dict[str, np.ndarray]:
    """Returns the encoded prompt with a key."""
    place = self._place(key)
    record = self.prompts[place]
    if int(record.pop("prompt")) != key:
      raise DamagedFile(self.prompts.file(place), "its prompts differ from those of the table")
    return record

  def _place(self, key: int) -> int:
    """Returns the place of a prompt's key in the table."""
    place = int(np.searchsorted(self.keys, key))
    if place == len(self.keys) or self.keys[place] != key:
      raise DamagedFile(self.folder / PROMPTS, f"it lacks the prompt {key}")
    return place


def open_folder(folder: Path) -> Precomputed:
  """Opens a complete folder; checks the sizes of its files, and reads none of the rows.

  Raises:
    FileNotFoundError: the folder does not exist or is unfinished.
    ValueError: a file is missing or has another size, or the folder has another version.
    OSError: its bucket cannot be reached.
  """
  place = paths.open_path(folder)
  paths.check_array_record(place)
  names = paths.names(place)
  if MANIFEST not in names:
    problem = "is not finished" if PLAN in names else "has no precomputed data"
    raise FileNotFoundError(
      f"{place} {problem} (no {MANIFEST}); run python -m jaxpref.precompute --config=RECIPE --out={place}."
    )
  manifest = _read_manifest(place)
  for name, expected in manifest["files"].items():
    if problem := _wrong_size(place / name, expected["bytes"]):
      raise DamagedFile(place / name, problem)
  table = _decode(place / PROMPTS, paths.read(place / PROMPTS))
  rows, prompts = (_Records(place, manifest[kind], manifest["rows_per_file"]) for kind in ("rows", "prompts"))
  return Precomputed(place, manifest, rows, prompts, table["prompt"], table["input_ids"])


def _read_manifest(folder: Any) -> dict[str, Any]:
  file = folder / MANIFEST
  manifest = _read_json(file, "format")
  if manifest["format"] != FORMAT:
    raise ValueError(f"{file} has format {manifest['format']}, expected {FORMAT}; make it again with this version.")
  manifest = _read_json(file, *MANIFEST_FIELDS)
  for name in (*manifest["rows"], *manifest["prompts"], *manifest["files"]):
    if not isinstance(name, str) or pathlib.PurePosixPath(name).name != name:
      raise DamagedFile(file, f"{name!r} is not a file of this folder")
  return manifest


def _wrong_size(file: Any, expected: int) -> str:
  found = paths.size(file)
  if found is None:
    return "it is missing"
  return "" if found == expected else f"it has {found} bytes, expected {expected}"


def damaged_files(folder: Path) -> Iterator[tuple[str, DamagedFile | None]]:
  """Reads all files of a complete folder; yields the name of each, and what is wrong with it, or None.

  Raises:
    FileNotFoundError: the folder is not complete.
  """
  place = paths.open_path(folder)
  if MANIFEST not in paths.names(place):
    raise FileNotFoundError(f"{folder} has no {MANIFEST}, so there is nothing to compare with; finish it first.")
  for name, expected in _read_manifest(place)["files"].items():
    problem = _wrong_size(place / name, expected["bytes"])
    if not problem and _sha256(place / name) != expected["sha256"]:
      problem = "its content has changed since it was written"
    yield name, DamagedFile(place / name, problem) if problem else None


def batches(
  data: Precomputed,
  *,
  batch_size: int,
  seed: int,
  caption_dropout: float = 0.0,
  flip: bool = False,
  tokens: bool = False,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  num_workers: int = 0,
) -> batching.Batches:
  """Returns batches of the rows, with the order, dropped captions and mirrored images of training without them.

  Args:
    data: an opened folder.
    batch_size, seed, process_index, process_count, num_threads, num_workers: see `pipeline.pair_batches`.
    caption_dropout: share of rows whose prompt is replaced by the empty one.
    flip: mirror half of the rows; the folder must have been made with flip.
    tokens: keeps input_ids i32[B, L], for methods that encode prompts themselves.

  Returns:
    The batches of the pipeline with `moments` f16[B, h, w, 2C] (or moments_0 and moments_1) instead of pixels, and the
    fields of the encoded prompt instead of input_ids.

  Raises:
    ValueError: there are too few rows for a batch.
  """
  return batching.open_batches(
    data.manifest["num_rows"],
    functools.partial(data.row, tokens=tokens),
    what=f"precomputed data in {data.folder}",
    caption_dropout=caption_dropout,
    flip=flip,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
    num_threads=num_threads,
    num_workers=num_workers,
  )
