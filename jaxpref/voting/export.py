"""Writes labelled pairs as data to train on: a folder with pairs.jsonl and its images, or a tfds dataset."""

import contextlib
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxpref.data import paths, records
from jaxpref.data.files import PAIRS_NAME
from jaxpref.devices.progress import tqdm
from jaxpref.voting import choices
from jaxpref.voting.catalog import Catalog, Pair
from jaxpref.voting.judgements import Judgement, by_pair

UNPAIRED_NAME = "images.jsonl"
FORMATS = ("pairs_file", "tfds")
ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}


def check_folder(folder: pathlib.Path) -> None:
  """Raises ValueError for a place to export to that is no new or empty folder."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"--export={folder} exists and is not empty; name a new folder.")


def write_folder(
  folder: pathlib.Path, catalog: Catalog, labels: Mapping[int, float | None], found: list[Judgement]
) -> dict[str, int]:
  """Writes pairs.jsonl and images/; and images.jsonl, a source of single images that are liked or not.

  Args:
    folder: a new one.
    catalog: of the pairs.
    labels: label_0 by number of the pair, None where both images are bad: such pairs are left out of pairs.jsonl.
    found: the judgements that the labels were made of; an image that lost every vote, or was called bad, is disliked.

  Returns:
    The numbers of `pairs` written, of `ties` among them, and of pairs left out as `bad`.
  """
  liked: dict[tuple[str, str], bool] = {}
  verdicts = by_pair(found)
  rows: list[dict[str, Any]] = []
  with paths.cannot_be_written(folder):
    (folder / "images").mkdir(parents=True, exist_ok=True)
  for number in tqdm(sorted(labels), desc=f"writing {folder}", unit=" pairs"):
    pair, label = catalog.read(number), labels[number]
    names = [_write_image(folder, image) for image in pair.images]
    said = verdicts.get(number, [])
    for name, winner in zip(names, (choices.FIRST, choices.SECOND), strict=True):
      if winner in said:
        liked[pair.caption, name] = True
      elif label != 0.5:
        liked.setdefault((pair.caption, name), False)
    if label is not None:
      rows.append({"caption": pair.caption, "image_0": names[0], "image_1": names[1], "label_0": label, **pair.extra})
  if not rows:
    raise ValueError("no judged pair has a better image, so there is nothing to train on; vote on more pairs.")
  _write_rows(folder / PAIRS_NAME, rows)
  _write_rows(folder / UNPAIRED_NAME, [{"caption": c, "image": n, "label": int(v)} for (c, n), v in liked.items()])
  return counts(labels)


def counts(labels: Mapping[int, float | None]) -> dict[str, int]:
  """Returns the numbers of `pairs` with a label, of `ties` among them, and of pairs of two `bad` images."""
  values = list(labels.values())
  return {"pairs": len(values) - values.count(None), "ties": values.count(0.5), "bad": values.count(None)}


def _write_image(folder: pathlib.Path, image: bytes) -> str:
  """Writes an image once, under a name of its content, and returns its path in the folder."""
  ending = next((ending for start, ending in ENDINGS.items() if image.startswith(start)), ".png")
  name = f"images/{hashlib.sha256(image).hexdigest()[:20]}{ending}"
  if not (folder / name).exists():
    paths.write(folder / name, image)
  return name


def _write_rows(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  paths.write(file, "".join(_line(row) + "\n" for row in rows).encode())


def _line(row: dict[str, Any]) -> str:
  """Returns a row as JSON that is readable, unless it has halves of characters, which UTF-8 cannot hold."""
  text = json.dumps(row, ensure_ascii=False)
  return json.dumps(row) if any("\ud800" <= c <= "\udfff" for c in text) else text


# ---- tfds ----------------------------------------------------------------------------------------------------------


def write_tfds(folder: pathlib.Path, catalog: Catalog, labels: Mapping[int, float | None]) -> dict[str, int]:
  """Writes a tfds dataset `taste` with one split, train; see `write_folder`.

  Raises:
    ValueError: a label is a share, which the datasets' readers do not take; or there is nothing to write.
  """
  if any(label not in (None, *records.LABELS) for label in labels.values()):
    raise ValueError("a tfds dataset has no soft labels; use --export_format=pairs_file, or --labels=majority.")
  numbers = [number for number, label in sorted(labels.items()) if label is not None]
  if not numbers:
    raise ValueError("no judged pair has a better image, so there is nothing to train on; vote on more pairs.")
  import tensorflow_datasets as tfds

  builder = _builder()(data_dir=folder)
  builder.catalog, builder.labels = catalog, {number: float(labels[number] or 0.0) for number in numbers}
  tfds.display_progress_bar(False)
  try:
    with contextlib.redirect_stdout(io.StringIO()), paths.cannot_be_written(folder):
      builder.download_and_prepare(file_format="array_record")
  finally:
    tfds.display_progress_bar(True)
  return counts(labels)


@functools.cache  # tfds takes each name once
def _builder() -> Any:
  """Returns the class of the dataset's builder, whose instances need `catalog`, and `labels` by number of the pair."""
  import tensorflow_datasets as tfds

  class Taste(tfds.core.GeneratorBasedBuilder):
    """Pairs of images that people voted on."""

    VERSION = tfds.core.Version("1.0.0")
    name = "taste"
    pkg_dir_path = pathlib.Path(__file__).parent
    catalog: Catalog
    labels: Mapping[int, float]

    def _info(self) -> Any:
      image = {"shape": (None, None, 3), "encoding_format": "png"}
      return tfds.core.DatasetInfo(
        builder=self,
        description="Pairs of images that people voted on.",
        features=tfds.features.FeaturesDict(
          {
            "id": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "image_0": tfds.features.Image(**image),
            "image_1": tfds.features.Image(**image),
            "label_0": tfds.features.Scalar(np.float32),
          }
        ),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager  # nothing is downloaded
      return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
      for key, (number, label) in enumerate(self.labels.items()):
        yield key, {"id": self.catalog.keys[number], "label_0": label} | _images(self.catalog.read(number))

  return Taste


def _images(pair: Pair) -> dict[str, Any]:
  """Returns the caption and the images as PNG files, which the dataset declares."""
  found: dict[str, Any] = {"caption": pair.caption}
  for side, image in enumerate(pair.images):
    stream = io.BytesIO(image)
    if not image.startswith(b"\x89PNG"):
      stream = io.BytesIO()
      records.open_image(image).save(stream, "PNG")
      stream.seek(0)
    found[f"image_{side}"] = stream
  return found
