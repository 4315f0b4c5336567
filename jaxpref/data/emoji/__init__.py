"""The embedded images: emoji drawn in three styles, with captions, groups and fixed splits.

Each emoji is one row: the same characters and caption, drawn by Twemoji (flat), Noto (shaded) and
OpenMoji (outlined), 64x64 on white, with equal margins. `scripts/assets/build_emoji.py` made the files
beside this module; NOTICE names their authors and licences.

  records = load_index(subset="core", split="train")
  tiles = load_tiles("noto", 32)                        # u8[N, 32, 32, 3], row = class_id
  pixels = tiles[[record.class_id for record in records]]
"""

import dataclasses
import functools
import importlib.resources
import io
import json
import zipfile
from collections.abc import Sequence

import numpy as np

from jaxpref.data import paths

STYLES = ("twemoji", "noto", "openmoji")
SPLITS = ("train", "validation", "test")
SUBSETS = ("core", "all")
TILE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Emoji:
  """One emoji in its three drawings.

  Attributes:
    id: its code points in hexadecimal, joined by "-", without variation selectors.
    class_id: its row in `load_tiles`; the core subset is 0 .. n-1.
    characters: the emoji itself.
    caption: lower-case ASCII words, unique.
    group: smileys, animals, food, travel, activities, objects (the core), people, symbols or flags.
    core: whether it belongs to the core subset.
    split: train, validation or test.
  """

  id: str
  class_id: int
  characters: str
  caption: str
  group: str
  core: bool
  split: str


def _file(name: str):
  return importlib.resources.files(__package__).joinpath(name)


@functools.cache
def _index() -> tuple[Emoji, ...]:
  lines = paths.lines(_file("index.jsonl").read_text(encoding="utf-8"))
  return tuple(Emoji(**json.loads(line)) for line in lines)


def _check(name: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    raise ValueError(f"{name} of the emoji data must be one of {', '.join(known)}, not {value!r}.")


def load_index(subset: str = "all", split: str | None = None) -> list[Emoji]:
  """Returns the emoji of a subset and a split, in order of class id.

  Args:
    subset: "core" (about 1,000 animals, foods, objects, smileys, activities, places) or "all".
    split: "train", "validation" or "test" (80/10/10 by emoji); None: all three.

  Raises:
    ValueError: unknown subset or split.
  """
  _check("subset", subset, SUBSETS)
  if split is not None:
    _check("split", split, SPLITS)
  return [e for e in _index() if (subset == "all" or e.core) and (split is None or e.split == split)]


def captions(split: str | None = None, subset: str = "all") -> list[str]:
  """Returns the captions of a split, in order of class id: unique lower-case ASCII."""
  return [e.caption for e in load_index(subset, split)]


prompts = captions
"""The captions, meant as prompts."""


def num_classes(subset: str = "all") -> int:
  """Returns how many class ids a subset has over all splits; they start at 0."""
  return len(load_index(subset))


@functools.cache
def _encoded(style: str) -> tuple[bytes, ...]:
  with _file(f"{style}.zip").open("rb") as f, zipfile.ZipFile(f) as archive:
    return tuple(archive.read(f"{e.id}.webp") for e in _index())


def encoded_tile(style: str, class_id: int) -> bytes:
  """Returns one tile as it is stored: a lossless 64x64 WebP file."""
  _check("style", style, STYLES)
  return _encoded(style)[class_id]


def load_tiles(style: str, image_size: int = TILE_SIZE, *, class_ids: Sequence[int] | None = None) -> np.ndarray:
  """Decodes the tiles of one style.

  Args:
    style: "twemoji", "noto" or "openmoji".
    image_size: side in pixels; resampled from 64 with antialiasing (Lanczos).
    class_ids: the rows to load, in this order; None: all, so that the row is the class id.

  Returns:
    u8[N, image_size, image_size, 3].

  Raises:
    ValueError: unknown style.
  """
  from PIL import Image

  _check("style", style, STYLES)
  encoded = _encoded(style)
  rows = range(len(encoded)) if class_ids is None else class_ids
  tiles = np.empty((len(rows), image_size, image_size, 3), np.uint8)
  for i, row in enumerate(rows):
    image = Image.open(io.BytesIO(encoded[row])).convert("RGB")
    if image.size != (image_size, image_size):
      image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    tiles[i] = np.asarray(image)
  return tiles
