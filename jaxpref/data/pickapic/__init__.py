"""`pickapic`: Pick-a-Pic (arXiv 2305.01569), v1 or v2, from its published parquet files.

The files are those of yuvalkirstain/pickapic_v1 and pickapic_v2 on the Hugging Face hub, such as
data/train-00000-of-00645-b66ac786bf6fb553.parquet, in a local folder or a bucket.

  python -m jaxpref.data.pickapic --parquet=FOLDER --out=DATASETS

Each parquet file becomes an ArrayRecord file with the same records in the same order and the images unchanged. One row
group of a parquet file is in memory at a time, about twice. The index (`jaxpref.data.index`) is made first, from the
columns without images, so that errors in the files are found before hours of copying.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxpref.data import index as index_lib
from jaxpref.data import paths, records
from jaxpref.data.files import PROGRESS_AFTER
from jaxpref.devices.progress import tqdm
from jaxpref.recipes.messages import listed
from jaxpref.recipes.sections import check_count

logger = logging.getLogger(__name__)
VERSIONS = ("v1", "v2")
TEXTS = ("caption", "image_0_uid", "image_1_uid", "model_0", "model_1")
NUMBERS = ("num_example_per_prompt", "ranking_id", "user_id")
FLAGS = ("are_different", "has_label")
IMAGES = {"image_0": "jpg_0", "image_1": "jpg_1"}  # field -> column
# The columns to read; the others are URLs, dates and what follows from these.
COLUMNS = (*TEXTS, *NUMBERS, *FLAGS, *IMAGES.values(), "label_0")
INDEX_COLUMNS = ("caption", "label_0", "has_label", "num_example_per_prompt", "image_0_uid", "image_1_uid")
MADE_OF = "parquet_files.json"  # beside the dataset: `describe_files` of its origin
ROWS_AT_A_TIME = 16  # rows with two images of about 150 KB
_NAME = re.compile(r"(?P<split>[a-z_]+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")


def find_shards(folder: Any) -> dict[str, list[str]]:
  """Returns the parquet files of a folder or its `data` folder, by split, in order.

  Some of the files suffice; a warning says how many there are.

  Raises:
    FileNotFoundError: there are no files with the published names.
  """
  folder = paths.open_path(folder)
  found: dict[str, dict[int, str]] = {}
  counts: dict[str, int] = {}
  for place in (folder, folder / "data"):
    for file in sorted(place.iterdir()) if place.is_dir() else ():
      match = _NAME.fullmatch(file.name)
      if match:
        split = match["split"]
        found.setdefault(split, {})[int(match["number"])] = os.fspath(file)
        counts[split] = int(match["count"])
  if not found:
    raise FileNotFoundError(
      f"{folder} holds no files such as train-00000-of-00645-b66ac786bf6fb553.parquet, nor does a folder data in it; "
      "expected the files of yuvalkirstain/pickapic_v1 or pickapic_v2."
    )
  for split, files in found.items():
    if len(files) < counts[split]:
      logger.warning("%s has %d of the %d files of the split %s", folder, len(files), counts[split], split)
  order = sorted(found, key=lambda split: (split != "train", split))
  return {split: [file for _, file in sorted(found[split].items())] for split in order}


def describe_files(folder: Any) -> dict[str, list[dict[str, Any]]]:
  """Returns what distinguishes a folder's parquet files, by split: name, bytes, and a hash of the end.

  The end has the sizes, places and ranges of all columns, so no file need be read as a whole.
  """
  described: dict[str, list[dict[str, Any]]] = {}
  for split, files in find_shards(folder).items():
    for file in tqdm(files, desc=f"looking at the files of {split}", unit=" files", delay=PROGRESS_AFTER):
      place = paths.open_path(file)
      digest = hashlib.sha256(paths.end_of(place)).hexdigest()
      described.setdefault(split, []).append({"file": place.name, "bytes": paths.size(place), "end_sha256": digest})
  return described


def check_made_of(dataset: Any, parquet: Any) -> None:
  """Raises for an existing dataset that was not made from these parquet files.

  Raises:
    ValueError: it was made from other files, or does not say from which.
  """
  remedy = "delete that folder to make it again, or choose another one."
  note = dataset / MADE_OF
  try:
    made = json.loads(paths.read(note).decode("utf-8"))
  except FileNotFoundError:
    raise ValueError(f"{dataset} exists and has no {MADE_OF}, which says from what it was made; {remedy}") from None
  except ValueError as error:
    raise ValueError(f"{note} cannot be read ({error}); {remedy}") from error
  now = describe_files(parquet)
  if made == now:
    return
  count = lambda described: ", ".join(f"{len(files)} of {split}" for split, files in described.items())
  raise ValueError(
    f"{dataset} was made from other parquet files than {parquet} has now (then {count(made)}, now {count(now)}, and "
    f"not the same ones); {remedy}"
  )


@contextlib.contextmanager
def _open(file: str) -> Iterator[Any]:
  import pyarrow
  import pyarrow.parquet as pq

  try:
    with paths.open_path(file).open("rb") as stream:
      # Buffered and not ahead of time, so that a column is read as its pages are needed.
      yield pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
  except FileNotFoundError:
    raise
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}); download it again.") from error


def num_rows(files: Sequence[str]) -> list[int]:
  """Returns the rows of each file, from its end."""
  rows = []
  for file in tqdm(files, desc="counting rows", unit=" files", delay=PROGRESS_AFTER):
    with _open(file) as parquet:
      missing = [name for name in COLUMNS if name not in parquet.schema_arrow.names]
      if missing:
        raise ValueError(
          f"{file} has no column {', '.join(missing)}, only {listed(parquet.schema_arrow.names)}; expected the "
          "columns of Pick-a-Pic v1 or v2."
        )
      rows.append(parquet.metadata.num_rows)
  return rows


def read_index(files: Sequence[str], *, progress: str = "reading labels") -> index_lib.Index:
  """Returns the index of the records of some files, without reading their images.

  Raises:
    ValueError: a column is missing or a label is invalid; names file and row.
  """
  parts = []
  for file in tqdm(files, desc=progress, unit=" files", delay=PROGRESS_AFTER):
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_COLUMNS}
    with _open(file) as parquet:
      for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=list(INDEX_COLUMNS))
        for name, values in columns.items():
          values += table.column(name).to_pylist()
    captions = [caption or "" for caption in columns.pop("caption")]
    columns["num_example_per_prompt"] = [count or 1 for count in columns["num_example_per_prompt"]]
    judged = zip(columns["label_0"], columns["has_label"], strict=True)
    columns["label_0"] = [_label(label, has_label, file, row) for row, (label, has_label) in enumerate(judged)]
    for name in ("image_0_uid", "image_1_uid"):
      columns[name] = [uid or f"{file}:{row}:{name}" for row, uid in enumerate(columns[name])]
    parts.append(index_lib.make_index(captions, **columns))
  return index_lib.concatenate(parts)


def _label(label: float | None, has_label: bool, file: str, row: int) -> float:
  if label in records.LABELS:
    return float(label)
  if not has_label:
    return 0.5
  raise ValueError(f"{file}, row {row}: label_0 = {label!r}; expected 0, 0.5 or 1: download the file again.")


def read_shard(file: str, split: str, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the records of a file.

  Args:
    file: the parquet file.
    split: its split.
    start: rows of the split before this file.

  Yields:
    The record's place in the split; and the record, with its images as files.
  """
  row = 0
  with _open(file) as parquet:
    for group in range(parquet.num_row_groups):
      for batch in parquet.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=list(COLUMNS)):
        for fields in batch.to_pylist():
          record = {
            "id": f"{split}/{start + row}",
            "label_0": _label(fields["label_0"], fields["has_label"], file, row),
            # A missing image becomes an empty file: the record keeps its place, and training skips it.
            **{name: io.BytesIO(fields[column] or b"") for name, column in IMAGES.items()},
            **{name: fields[name] or "" for name in TEXTS},
            **{name: fields[name] or 0 for name in NUMBERS},
            **{name: bool(fields[name]) for name in FLAGS},
          }
          yield start + row, record
          row += 1


def prepare(parquet: Any, out: Any, *, version: str = "v2", workers: int = 1) -> str:
  """Writes the dataset and the index of each split, with progress; keeps a finished dataset of the same files.

  Args:
    parquet: folder with the published files, or some of them.
    out: folder of datasets.
    version: "v1" or "v2".
    workers: number of processes, each of which writes a file at a time.

  Returns:
    The folder of the dataset.

  Raises:
    FileNotFoundError, ValueError: files are missing or do not have the published form, or the existing dataset was made
      from others.
  """
  if version not in VERSIONS:
    raise ValueError(f"version={version!r}; expected one of {', '.join(VERSIONS)}.")
  check_count(workers, "workers")
  import tensorflow_datasets as tfds

  from jaxpref.data.pickapic.pickapic_dataset_builder import Builder

  place, out = paths.open_path(parquet), paths.open_path(out)
  paths.check_array_record(out)
  if not place.is_dir() or not any(place.iterdir()):
    raise FileNotFoundError(f"{place} is not a folder, or an empty one; expected the parquet files of Pick-a-Pic.")
  find_shards(place)  # the builder makes folders before it looks
  builder = Builder(config=version, data_dir=os.fspath(out))
  builder.workers = workers
  # Otherwise the library announces a download of unknown size.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=os.fspath(parquet)))
  return str(builder.data_dir)
