"""Opens preference data of every kind as a source: `len(source)`, `source[i]`, `source.index`.

  kind          what lies at the path                                          a record
  tfds          a tfds dataset as ArrayRecord files, such as Pick-a-Pic's       pair
  pairs_file    pairs.jsonl or pairs.csv beside a folder of images              pair
  rankings      HPDv2's train.json or test.json beside a folder of images       pair
  unpaired_file images.jsonl or images.csv, each image liked or disliked        unpaired
  prompts       prompts in any form of `prompt_sets`; see `read_prompts`        (a string)

A pair is a dict of caption, image_0, image_1 (the bytes of image files, untouched), label_0 (1: image_0 is preferred,
0: image_1, 0.5: a tie; for a pairs_file also a probability), num_example_per_prompt, id, and if the source has them
original_size_0 and original_size_1 ([height, width]), noise_0 and noise_1 ([seed, number]). An unpaired record is a
dict of caption, image, label (1: liked, 0: disliked) and id.

Opening reads the index (`jaxpref.data.index`) or the columns of the file; images are read at `source[i]`. A path may be
in a bucket, such as gs://bucket/folder (`jaxpref.data.paths`).
"""

import csv
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from jaxpref.data import emoji_pairs, paths, prompt_sets, records
from jaxpref.data import index as index_lib
from jaxpref.data.files import (
  PAIRS_NAME,
  PROGRESS_AFTER,
  FileImages,
  FilePairs,
  open_pairs_file,
  open_rankings,
  open_unpaired_file,
)
from jaxpref.data.index import Index, Selection
from jaxpref.devices.progress import tqdm
from jaxpref.recipes.messages import listed

Path = str | os.PathLike
# Records, or files, to check whether what was made from a dataset earlier still fits it.
SPOT_CHECKS = 8


class Source(records.Source, Protocol):
  """A random-access sequence of records, with an index of all of them."""

  @property
  def index(self) -> Index: ...


# ---- tfds ------------------------------------------------------------------------------------------------------


class Indexed:
  """Unchanged records with an index, such as a split of a tfds dataset."""

  def __init__(self, data: records.Source, index: Index):
    self._data = data
    self.index = index

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, i: int) -> Mapping[str, Any]:
    return self._data[int(i)]


def open_tfds(folder: Path, split: str = "train") -> Indexed:
  """Opens one split of a tfds dataset of pairs: our Pick-a-Pic, or any with the fields of a pair.

  The index is read from a file beside the dataset or from the cache folder; if neither has one that fits, all records
  are read once to make it.

  Args:
    folder: the folder with dataset_info.json, or one above it that holds no second dataset.
    split: such as "train" or "train[:1000]".

  Raises:
    FileNotFoundError: the dataset does not exist.
    ValueError: the split does not exist, there are several datasets, the files have another format, or a field is
      missing or wrong.
  """
  from tensorflow_datasets import core

  place = find_dataset(folder)
  data = records.open_folder(place, split)
  splits = data.dataset_info.splits  # type: ignore[attr-defined]
  (piece,) = core.ReadInstruction.from_spec(split).to_absolute(splits)
  name = piece.splitname
  whole = data if split == name else records.open_folder(place, name)
  index = index_lib.load_or_build(
    [place / index_name(name), _cached_index(place, name)],
    lambda: index_of_records(whole, progress=f"index of {name} of {place}"),
    num_records=len(whole),
    fingerprint=fingerprint(splits[name]),
    agrees=lambda index: _agrees(index, whole),
  )
  if split != name:
    index = index.take(np.arange(piece.from_ or 0, len(whole) if piece.to is None else piece.to))
  return Indexed(data, index)


def find_dataset(folder: Path) -> Any:
  """Returns the folder of the one tfds dataset in or under a folder.

  Raises:
    FileNotFoundError: there is no dataset.
    ValueError: there are several.
  """
  place = paths.open_path(folder)
  paths.check_array_record(place)
  file = "dataset_info.json"
  if (place / file).exists():
    return place
  # A dataset lies in NAME/VERSION or NAME/CONFIG/VERSION of its data folder; an unfinished one has this in its name.
  patterns = ("/".join(["*"] * depth + [file]) for depth in (1, 2, 3))
  parents = (path.parent for pattern in patterns for path in place.glob(pattern))
  found = sorted(os.fspath(parent) for parent in parents if not parent.name.startswith("incomplete."))
  if not found:
    raise FileNotFoundError(
      f"{folder} holds no {file}, nor does a folder in it; expected a tfds dataset, whose folder ends in its version, "
      "such as 1.0.0."
    )
  if len(found) > 1:
    raise ValueError(f"{folder} holds several datasets, {listed(found)}; give the folder of one of them.")
  return paths.open_path(found[0])


def splits_of(folder: Path) -> list[str]:
  """Returns the splits of a tfds dataset."""
  import tensorflow_datasets as tfds

  return list(tfds.builder_from_directory(find_dataset(folder)).info.splits)


def index_name(split: str) -> str:
  """Returns the name of the file with a split's index, beside its data."""
  return f"index-{split}.npz"


def fingerprint(split_info: Any) -> str:
  """Returns a fingerprint of a split from its tfds SplitInfo: records and bytes of its files, and the ends of some.

  The end of an ArrayRecord file has the places of its records, which a changed record nearly always moves.
  """
  value: list[Any] = [split_info.name, [int(n) for n in split_info.shard_lengths], int(split_info.num_bytes)]
  files = split_info.filepaths
  value += [hashlib.sha256(paths.end_of(paths.open_path(os.fspath(files[i])))).hexdigest() for i in _some(len(files))]
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _some(count: int) -> list[int]:
  """Returns at most SPOT_CHECKS of the numbers below `count`, evenly spread."""
  return sorted({int(i) for i in np.linspace(0, count - 1, min(SPOT_CHECKS, count))})


def content_fingerprint(source: Any) -> str:
  """Returns a fingerprint of what a source with an index holds, for things made from it and kept elsewhere.

  It covers the prompts, labels and images of all records as the index has them, and the bytes of the images of some
  records: a picture may have changed under its old name.
  """
  digest = hashlib.sha256(index_lib.fingerprint(source.index).encode())
  for place in _some(len(source)):
    record = source[place]
    for name in ("image", "image_0", "image_1"):
      if name in record:
        image = record[name]
        digest.update(hashlib.sha256(image if isinstance(image, bytes) else np.asarray(image).tobytes()).digest())
  return digest.hexdigest()[:16]


def _cached_index(folder: Any, split: str) -> pathlib.Path:
  digest = hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:16]
  return emoji_pairs.default_data_dir() / "indexes" / f"{digest}-{split}.npz"


def index_of_records(source: records.Source, *, progress: str = "index") -> Index:
  """Returns the index of pairs in records, reading all of them.

  Raises:
    ValueError: a record has no caption or label, or a wrong one.
  """
  captions: list[str] = []
  columns: dict[str, list[Any]] = {"label_0": []}
  optional: dict[str, Callable[[Any], Any]] = {
    "num_example_per_prompt": int,
    "score_0": float,
    "score_1": float,
    "has_label": bool,
    "image_0_uid": records.text,
    "image_1_uid": records.text,
  }
  for i in tqdm(range(len(source)), desc=progress, unit=" records", delay=PROGRESS_AFTER):
    record = source[i]
    if i == 0:
      optional = {name: kind for name, kind in optional.items() if name in record}
      columns |= {name: [] for name in optional}
    columns["label_0"].append(records.label_of(record, i))
    for image in ("image_0", "image_1"):
      records.original_size(record, i, image)  # raises its error before training
    captions.append(records.text(records.field(record, i, "caption")))
    for name, kind in optional.items():
      columns[name].append(kind(records.field(record, i, name)))
  return index_lib.make_index(captions, **columns)


def _agrees(index: Index, source: records.Source) -> bool:
  places = _some(len(source))
  found = [source[i] for i in places]
  captions = [records.text(records.field(record, i, "caption")) for i, record in zip(places, found, strict=True)]
  labels = [records.label_of(record, i) for i, record in zip(places, found, strict=True)]
  return bool(
    np.array_equal(index.prompt[places], index_lib.prompt_ids(captions))
    and np.array_equal(index.label_0[places], np.asarray(labels, np.float32))
  )


# ---- Prompts ---------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str]:
  """Reads all prompts of a file of any kind in `prompt_sets`, in order.

  Raises:
    FileNotFoundError, ValueError: the file does not exist or has none of these forms.
  """
  return [prompt.text for prompt in prompt_sets.read_all(path)]


# ---- Sources from sources ----------------------------------------------------------------------------------------


class Selected:
  """The pairs of a source that `select` has chosen, as a source.

  A record has the label and weight of the selection (`label_0`, `weight`), and the winning image of another record if
  the selection says so.
  """

  def __init__(self, source: Source, selection: Selection):
    self._source = source
    self._selection = selection
    index = source.index.take(selection.kept)
    arrays = index.arrays() | {"label_0": selection.label}
    # An image that replaced another one is the same image there and here.
    swapped = selection.winner != selection.kept
    if swapped.any() and index.image_0 is not None and index.image_1 is not None:
      others = source.index.take(selection.winner).arrays()
      best = np.where(others["label_0"] > 0.5, others["image_0"], others["image_1"])
      first = index.label_0 > 0.5
      arrays["image_0"] = np.where(swapped & first, best, index.image_0)
      arrays["image_1"] = np.where(swapped & ~first, best, index.image_1)
      arrays = {name: value for name, value in arrays.items() if not name.startswith("score")}  # scores of other images
    self.index = Index(**arrays)

  def __len__(self) -> int:
    return len(self._selection.kept)

  def __getitem__(self, i: int) -> dict[str, Any]:
    kept, label, weight, winner = (values[i] for values in self._selection)
    record = dict(self._source[int(kept)])
    if winner != kept:
      place, best = (_winning_side(self._source.index, k) for k in (kept, winner))
      other = self._source[int(winner)]
      record[f"image_{place}"] = other[f"image_{best}"]
      for field in ("original_size", "noise"):
        record.pop(f"{field}_{place}", None)
        if f"{field}_{best}" in other:
          record[f"{field}_{place}"] = other[f"{field}_{best}"]
    return record | {"label_0": float(label), "weight": float(weight)}


def _winning_side(index: Index, record: int) -> int:
  return 0 if index.label_0[record] > 0.5 else 1


class Unpaired:
  """The images of a source of pairs, each on its own, liked or disliked."""

  def __init__(self, source: Source, record: np.ndarray, side: np.ndarray, index: Index):
    self._source = source
    self._record = record
    self._side = side
    self.index = index

  def __len__(self) -> int:
    return len(self._record)

  def __getitem__(self, i: int) -> dict[str, Any]:
    number, side = int(self._record[i]), int(self._side[i])
    pair = self._source[number]
    record = {
      "id": f"{records.text(pair['id']) if 'id' in pair else number}/{side}",
      "caption": records.text(pair["caption"]),
      "image": pair[f"image_{side}"],
      "label": np.float32(self.index.label_0[i]),
    }
    size = pair.get(f"original_size_{side}")
    return record if size is None else record | {"original_size": size}


def unpaired(source: Source) -> Unpaired:
  """Returns the images of pairs as liked and disliked ones, for Diffusion-KTO (arXiv 2404.04465), without ties.

  If the source knows which images are the same, each image of a prompt occurs once, and is liked if it ever won, as in
  the authors' training (policy gt_label_wi_l of github.com/jacklishufan/diffusion-kto). Otherwise each pair gives its
  winner as liked and its loser as disliked.
  """
  index = source.index
  decided = np.flatnonzero(index.label_0 != 0.5)
  record = np.repeat(decided, 2)
  side = np.tile([0, 1], len(decided))
  label = np.where(side == 0, index.label_0[record] > 0.5, index.label_0[record] < 0.5).astype(np.float32)
  image = None
  if index.image_0 is not None and index.image_1 is not None:
    image = np.where(side == 0, index.image_0[record], index.image_1[record])
    # The best label of each image comes first, then the first record with that label.
    order = np.lexsort((np.arange(len(record)), -label, image, index.prompt[record]))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(image[order]) != 0) | (np.diff(index.prompt[record][order]) != 0)
    chosen = np.sort(order[new])
    record, side, label, image = record[chosen], side[chosen], label[chosen], image[chosen]
  prompt = index.prompt[record]
  words = None if index.caption_words is None else index.caption_words[record]
  counts = index_lib.counts_per_prompt(prompt)
  return Unpaired(source, record, side, Index(label, prompt, counts, image_0=image, caption_words=words))


# ---- By name ---------------------------------------------------------------------------------------------------

PAIR_KINDS = ("tfds", "pairs_file", "rankings")
KINDS = (*PAIR_KINDS, "unpaired_file", "prompts")


def detect_kind(path: Path) -> str:
  """Returns which of KINDS a path looks like.

  Raises:
    FileNotFoundError, ValueError: the path does not exist, or looks like none of them.
  """
  place = paths.open_path(path)
  if place.is_dir():
    if (place / PAIRS_NAME).is_file():
      return "pairs_file"
    return "prompts" if prompt_sets.is_hpdv2_folder(place) else "tfds"
  if not place.is_file():
    raise FileNotFoundError(f"there is no file or folder {path}.")
  if place.suffix in (".txt", ".tsv", ".parquet"):
    return "prompts"
  with paths.open_text(place) as stream:
    if place.suffix in (".jsonl", ".csv"):
      return _kind_of_columns(_columns(place.suffix, next((line for line in stream if line.strip()), "")))
    if place.suffix == ".json":
      start = stream.read(2**16)
      return "rankings" if "image_path" in start or "file_path" in start else "prompts"
  endings = ", ".join(prompt_sets.ENDINGS)
  raise ValueError(f"{path} is none of {', '.join(KINDS)}; expected a folder, or a file that ends in {endings}.")


def _columns(suffix: str, first: str) -> set[str]:
  """Returns the names in the first line of a file, in lower case; empty if it has no such line."""
  try:
    names = json.loads(first) if suffix == ".jsonl" else next(csv.reader([first]), [])
  except (json.JSONDecodeError, csv.Error):
    names = []
  return {str(name).strip().lower() for name in names} if isinstance(names, dict | list) else set()


def _kind_of_columns(names: set[str]) -> str:
  """Returns the kind of a file with a column of images or labels, even a misspelt one, which its reader reports."""
  if {"image_0", "image_1", "label_0", "preferred", "score_0", "score_1"} & names:
    return "pairs_file"
  if {"image", "label"} & names or not set(prompt_sets.TEXT_COLUMNS) & names:
    return "unpaired_file"
  return "prompts"


def open_source(
  kind: str, path: Path, *, split: str = "train", images: Path | None = None, pairs: str = "all"
) -> Indexed | FilePairs | FileImages:
  """Opens a source of one of KINDS except prompts; see the function of each kind for the arguments."""
  if kind == "tfds":
    return open_tfds(path, split)
  if kind == "pairs_file":
    return open_pairs_file(path)
  if kind == "rankings":
    return open_rankings(path, images=images, pairs=pairs)
  if kind == "unpaired_file":
    return open_unpaired_file(path)
  raise ValueError(f"kind={kind!r}; expected one of {', '.join(KINDS[:-1])}.")


def look_for(kind: str, path: Path, *, images: Path | None = None) -> None:
  """Checks that a source of one of KINDS exists, without reading it; prompts are read, as they are small.

  Args:
    images: see `open_rankings`.

  Raises:
    FileNotFoundError, ValueError, OSError: it does not, in the words of the function that opens it.
  """
  if kind == "tfds":
    find_dataset(path)
  elif kind == "prompts":
    read_prompts(path)
  elif not paths.open_path(path).is_file() or (images and not paths.open_path(images).is_dir()):
    open_source(kind, path, images=images)
