"""Reads one record: its fields and its images; skips those that cannot be read.

A source is any sequence of dicts (`len` and `[i]`). Images are the bytes of an image file or u8[H, W, 3] arrays;
strings may be bytes, as in tfds.
"""

import io
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from jaxpref.data import paths, samples
from jaxpref.recipes.messages import listed
from jaxpref.recipes.sizes import Size, sides

logger = logging.getLogger(__name__)
LABELS = (0.0, 0.5, 1.0)
# Decoded images are kept if all of them fit, so that small datasets are decoded once, not every epoch.
CACHE_BYTES = 512 * 2**20
# After this many unreadable records in a row the whole source counts as unreadable.
MAX_SKIPS_IN_A_ROW = 1000


class Source(Protocol):
  """A random-access sequence of records."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def open_folder(folder: str | os.PathLike, split: str) -> Source:
  """Opens one split of a tfds dataset whose folder has ArrayRecord files; needs no TensorFlow.

  Args:
    folder: the folder with dataset_info.json and features.json.
    split: such as "train" or "validation[:500]".

  Returns:
    A source whose images are the bytes of their files.

  Raises:
    FileNotFoundError: the dataset or some of its files are missing.
    ValueError: the split does not exist, or the files have another format.
  """
  import tensorflow_datasets as tfds

  place = paths.open_path(folder)
  paths.check_array_record(place)
  if not (place / "dataset_info.json").is_file():
    raise FileNotFoundError(
      f"{folder} holds no dataset_info.json; expected the folder of a tfds dataset, which ends in "
      "its version, such as 1.0.0."
    )
  try:
    builder = tfds.builder_from_directory(os.fspath(place))
  except Exception as error:  # readers of JSON raise many types
    raise ValueError(
      f"{folder} holds a dataset_info.json or features.json that cannot be read ({' '.join(str(error).split())}); "
      "prepare the dataset again."
    ) from error
  file_format = builder.info.file_format
  if file_format is None or file_format.value != "array_record":
    raise ValueError(
      f"{folder} holds files of format {file_format and file_format.value}; expected array_record: "
      'prepare the dataset again with file_format="array_record".'
    )
  name = split.split("[")[0]
  if name not in builder.info.splits:
    raise ValueError(f"{folder} has no split {name!r}, only {listed(builder.info.splits)}.")
  images = [k for k, f in builder.info.features.items() if isinstance(f, tfds.features.Image)]
  there = paths.names(place)
  files = builder.info.splits[name].filepaths
  if any(path.parent != builder.data_path for path in files):
    raise ValueError(f"{folder}/dataset_info.json names files that are not in its folder ({files[0]}); correct it.")
  missing = [path.name for path in files if path.name not in there]
  if missing:
    raise FileNotFoundError(
      f"{folder} lacks {len(missing)} of the {len(files)} files of {name!r}, such as {missing[0]}; copy or prepare the "
      "dataset again."
    )
  return _Shards(builder.as_data_source(split, decoders=dict.fromkeys(images, tfds.decode.SkipDecoding())))


class _Shards:
  """The records of a tfds dataset; an error in one of its files is reported in one sentence."""

  def __init__(self, data: Any):
    self._data = data
    self.dataset_info = data.dataset_info

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    try:
      return self._data[index]
    except RuntimeError as error:  # ArrayRecord's only error
      raise OSError(
        f"record {index} of {self.dataset_info.full_name} cannot be read ({error}); copy or prepare that file of the "
        "dataset again."
      ) from error


class Unusable(Exception):
  """Raised for a record that cannot be used and is skipped; `clause` says why, after its name."""

  clause = ""


class UnreadableImage(Unusable):
  """Raised if the image of a record cannot be decoded."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.clause = f"whose image cannot be read ({reason})"


class SameImages(Unusable):
  """Raised if the two images of a pair with a winner are the same."""

  clause = "whose two images are the same file, so that neither is better"


def text(value: str | bytes) -> str:
  """Returns a string, whether the source gives it as text or as bytes."""
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def name_of(record: Mapping[str, Any], index: int) -> str:
  """Returns how messages name a record: its id, or its place."""
  return repr(text(record["id"])) if "id" in record else f"number {index}"


def field(record: Mapping[str, Any], index: int, key: str) -> Any:
  """Returns a field that every record must have.

  Raises:
    ValueError: the field is missing.
  """
  try:
    return record[key]
  except KeyError:
    raise ValueError(
      f"record {name_of(record, index)} has no field {key!r}, only {listed(sorted(record))}; "
      "rename or add it in the source."
    ) from None


def label_of(record: Mapping[str, Any], index: int) -> float:
  """Returns `label_0`: 1 if image_0 is preferred, 0 if image_1 is, 0.5 for a tie.

  Raises:
    ValueError: the label has any other value.
  """
  value = field(record, index, "label_0")
  try:
    label = float(value)
  except (TypeError, ValueError):
    label = float("nan")
  if label not in LABELS:
    raise ValueError(
      f"record {name_of(record, index)} has label_0 = {value!r}; expected 1 (image_0 is "
      "preferred), 0 (image_1 is) or 0.5 (a tie); correct or remove the record."
    )
  return label


class Framing(NamedTuple):
  """An image's original size and its crop: the size conditioning of SDXL (arXiv 2307.01952, Section 2.2).

  Attributes:
    height, width: of the original, before any resizing, in pixels.
    top, left, right: what the crop leaves out above, to the left and to the right, in pixels of the image resized to
      just cover the crop; to the nearest pixel.
  """

  height: int
  width: int
  top: int
  left: int
  right: int


# Where a crop lies in an image: the shares of the rows above it and of the columns to its left among all that it leaves
# out, both in [0, 1).
Place = tuple[float, float]


def framing_of(height: int, width: int, image_size: Size, place: Place | None = None) -> Framing:
  """Returns the framing of an image of this height and width in pixels, cropped for `image_size`; see `decode`."""
  top, left, rows, columns = _crop(height, width, image_size, place)
  down, right = (n / old for n, old in zip(sides(image_size), (rows, columns), strict=True))
  return Framing(height, width, round(top * down), round(left * right), round((width - columns - left) * right))


def sizes(framing: Framing, image_size: Size, *, flip: bool = False) -> np.ndarray:
  """Returns SDXL's f32[6]: original height, width, crop top, left, target height, width, in the order of diffusers.

  As in diffusers' train_text_to_image_sdxl.py, original height and width are those before the resize, and the crop is
  in pixels of the resized image. A mirrored image gets those of the same crop in the mirrored original: what lay to the
  right of it now lies to the left (diffusers mirrors the resized image before it crops). A crop leaves out the same on
  both sides up to rounding, so mirroring changes `left` by at most a pixel if images are not enlarged.

  Args:
    framing: framing of the image.
    image_size: the target size: side of a square, or (height, width).
    flip: whether the crop was mirrored.
  """
  left = framing.right if flip else framing.left
  return np.asarray([framing.height, framing.width, framing.top, left, *sides(image_size)], np.float32)


def original_size(record: Mapping[str, Any], index: int, image_field: str) -> tuple[int, int] | None:
  """Returns an image's height and width before it was stored, from an optional field: `original_size_0` for `image_0`.

  Raises:
    ValueError: the field holds anything but two positive numbers.
  """
  key = f"original_size{image_field.removeprefix('image')}"
  value = record.get(key)
  if value is None:
    return None
  try:
    height, width = (int(v) for v in value)
    valid = height > 0 and width > 0
  except (TypeError, ValueError, OverflowError):  # not two values, nan, infinity
    valid = False
  if not valid:
    raise ValueError(
      f"record {name_of(record, index)} has {key} = {value!r}; expected [height, width] in pixels, both positive; "
      "correct or remove the field."
    )
  return height, width


def _crop(height: int, width: int, image_size: Size, place: Place | None) -> tuple[int, int, int, int]:
  """Returns top, left, height and width of the largest part of an image that has the shape of `image_size`.

  It is as high or as wide as the image; the other side is rounded. It is central (None), or at a place. All are whole
  pixels, and all places are equally likely.
  """
  high, wide = sides(image_size)
  rows, columns = min(height, _rounded(width * high, wide)), min(width, _rounded(height * wide, high))
  if place is None:
    return (height - rows) // 2, (width - columns) // 2, rows, columns
  return int(place[0] * (height - rows + 1)), int(place[1] * (width - columns + 1)), rows, columns


def _rounded(pixels: int, by: int) -> int:
  """Returns pixels / by to the nearest whole number, and at least 1."""
  return max(1, (2 * pixels + by) // (2 * by))


# How EXIF's orientation turns a picture upright; viewers do so, and people judged what they showed.
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def _orientation(picture: Image.Image) -> int:
  try:
    return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
  except Exception:  # damaged EXIF data; the picture may be intact
    return 1


def open_image(image: bytes | np.ndarray) -> Image.Image:
  """Returns an RGB picture of an image file's bytes, or of u8[H, W, 3].

  Transparency becomes white, EXIF's orientation is applied, and an animation gives its first frame; samples of more
  than 8 bits are scaled by what the file declares.

  Raises:
    UnreadableImage: the bytes are corrupt or truncated, it is unknown which sample is white, or the array is of another
      kind.
  """
  return _open(image)[0]


def _open(image: bytes | np.ndarray, at_least: Size | None = None) -> tuple[Image.Image, tuple[int, int], int]:
  """Returns the picture; its height and width in the file, upright; and by how much the decoder made it smaller.

  That is 1, or 2 or 4 with `at_least`, the size that the upright picture must still cover.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise UnreadableImage(f"expected u8[H, W, 3], found {image.dtype}{list(image.shape)}")
    return Image.fromarray(image), image.shape[:2], 1
  try:
    picture: Image.Image = Image.open(io.BytesIO(image))
    width, height = picture.size
    reduced = 1
    if at_least and picture.format == "JPEG":
      upright = (width, height) if _orientation(picture) >= 5 else (height, width)
      times = min(old // new for old, new in zip(upright, sides(at_least), strict=True))
      reduced = next((n for n in (4, 2) if times >= n), 1)
      picture.draft(None, (width // reduced, height // reduced))  # type: ignore[arg-type]
    raw = samples.raw_mode(picture)
    picture.load()
    orientation = _orientation(picture)
    picture = samples.with_8_bits(picture, raw)
    if orientation in _UPRIGHT:
      picture = picture.transpose(_UPRIGHT[orientation])
      width, height = (height, width) if orientation >= 5 else (width, height)
    if picture.has_transparency_data:
      picture = picture.convert("RGBA")
      white = Image.new("RGBA", picture.size, "white")
      picture = Image.alpha_composite(white, picture)
    if picture.mode != "RGB":
      picture = picture.convert("RGB")
    return picture, (height, width), reduced
  except UnidentifiedImageError as error:
    raise UnreadableImage(f"{len(image)} bytes in no known image format") from error
  except Exception as error:  # Pillow's decoders raise many types on damaged files.
    raise UnreadableImage(str(error) or type(error).__name__) from error


def decode(image: bytes | np.ndarray, image_size: Size, place: Place | None = None) -> tuple[np.ndarray, Framing]:
  """Decodes, crops to a part as high or as wide as the image, and resamples with antialiasing (Lanczos).

  JPEG files at least 2 (4) times as large as needed are decoded at a half (a quarter) of their size, which the format
  allows, and resampled from there: at twice the size that takes a fifth of the time. Compared with resampling the
  whole, pixels differ by 36 to 43 dB (PSNR) and contours are as sharp; the antialiased bilinear filter of many training
  scripts differs by 33 to 35 dB and is half as sharp.

  Args:
    image: an image file's bytes (transparency becomes white), or u8[H, W, 3].
    image_size: size of the result in pixels: side of a square, or (height, width), whose shape the part has. The part's
      sides are whole pixels, so its shape differs by at most half a pixel of the image.
    place: where the part lies; None: in the middle.

  Returns:
    u8[height, width, 3]; and the original size of the image, and where the part lies in it.

  Raises:
    UnreadableImage: the bytes are corrupt or truncated.
  """
  picture, (height, width), reduced = _open(image, at_least=image_size)
  high, wide = sides(image_size)
  if picture.size != (wide, high):
    top, left, rows, columns = _crop(height, width, image_size, place)
    box = (left / reduced, top / reduced, (left + columns) / reduced, (top + rows) / reduced)
    picture = picture.resize((wide, high), Image.Resampling.LANCZOS, box=box)
  elif isinstance(image, np.ndarray):
    return image, framing_of(height, width, image_size)
  return np.asarray(picture), framing_of(height, width, image_size, place)


class Skip(NamedTuple):
  """A skipped record: its place in the source, its name, and why, as a clause."""

  place: int
  name: str
  reason: str


def _refuse_same(record: Mapping[str, Any], fields: Sequence[str]) -> None:
  """Raises SameImages if the images are files with the same bytes."""
  first, second = (record.get(name) for name in fields)
  if isinstance(first, bytes) and isinstance(second, bytes) and first and first == second:
    raise SameImages


class Reader:
  """Reads records with decoded images; skips those that cannot be read.

  An unreadable record is replaced by the next readable one, so that batches, and the state of an iterator over them,
  are the same on every process and in every run. A warning names each unreadable record once. Several threads may use
  a reader. It may be pickled, for worker processes, if its source may: copies keep no decoded images and give no
  warnings; the original does, at `note`.
  """

  def __init__(
    self,
    source: Source,
    image_size: Size,
    *,
    image_fields: Sequence[str],
    convert: Callable[[Mapping[str, Any], int], dict[str, Any]],
    kept: Sequence[int] | np.ndarray | None = None,
    decided: np.ndarray | None = None,
  ):
    """Opens a source; reads nothing.

    Args:
      source: the records.
      image_size: size of the decoded images, see `decode`.
      image_fields: the fields that hold images.
      convert: (record, index) -> the other fields wanted.
      kept: indices of the records to use; None: all.
      decided: bool[M], the pairs of `kept` that have a winner. They are skipped if both images have the same bytes, a
        check that costs nothing while reading; sources that know it earlier make a tie of such a pair.
    """
    self.source = source
    self._decided = decided
    self._image_size = image_size
    self._image_fields = tuple(image_fields)
    self._convert = convert
    self.kept = np.arange(len(source)) if kept is None else np.asarray(kept, np.int64)
    self._skipped: dict[int, Skip] = {}
    self._warns = True
    self._lock = threading.Lock()
    size = len(self.kept) * len(self._image_fields) * math.prod(sides(image_size)) * 3
    self._cache: dict[int, dict[str, Any]] | None = {} if size <= CACHE_BYTES else None

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_cache": None, "_warns": False}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ |= state
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self.kept)

  @property
  def skipped(self) -> dict[int, str]:
    """The unreadable records met so far: index in the source -> name."""
    with self._lock:
      return {skip.place: skip.name for skip in self._skipped.values()}

  def note(self, skip: Skip) -> None:
    """Remembers an unreadable record that this reader or a copy of it has met; warns once."""
    with self._lock:
      if skip.place in self._skipped:
        return
      self._skipped[skip.place] = skip
      count = len(self._skipped)
    if self._warns:
      logger.warning(
        "skipped record %s, %s; %d of %d records skipped so far",
        skip.name,
        skip.reason,
        count,
        len(self),
      )

  def __getitem__(self, position: int) -> dict[str, Any]:
    """Returns `read` with the crops in the middle."""
    return self.read(position)

  def read(self, position: int, place: Place | None = None) -> dict[str, Any]:
    """Returns the record at a position of `kept`, or the next readable one.

    Args:
      position: in `kept`.
      place: where the crops lie in all of its images, see `decode`; None: in the middle.

    Returns:
      Images u8[H, W, 3]; the converted fields; `framing`, a dict with a `Framing` for each image field, whose size is
      the record's `original_size` of the image if it has one, else that of the stored image; `position`, that of the
      record read; and `skipped`, a list of `Skip` for the records skipped.

    Raises:
      ValueError: no record can be read, or a record's other fields are wrong.
    """
    skipped: list[Skip] = []
    tries = min(len(self), MAX_SKIPS_IN_A_ROW)
    for candidate in range(position, position + tries):
      candidate %= len(self)
      index = int(self.kept[candidate])
      if index in self._skipped:
        skipped.append(self._skipped[index])
        continue
      out = self._cache.get(index) if self._cache is not None and place is None else None
      if out is None:
        record = self.source[index]
        try:
          if self._decided is not None and self._decided[candidate]:
            _refuse_same(record, self._image_fields)
          out = self._decode(record, index, place)
        except Unusable as error:
          skipped.append(Skip(index, name_of(record, index), error.clause))
          self.note(skipped[-1])
          continue
        out |= self._convert(record, index)
        if self._cache is not None and place is None:
          self._cache[index] = out
      return out | {"position": candidate, "skipped": skipped}
    raise ValueError(
      f"none of {tries} records in a row has readable images (the first is {skipped[0].name}, {skipped[0].reason}); "
      "check that the image fields hold whole image files."
    )

  def _decode(self, record: Mapping[str, Any], index: int, place: Place | None) -> dict[str, Any]:
    out: dict[str, Any] = {"framing": {}}
    for key in self._image_fields:
      out[key], framing = decode(field(record, index, key), self._image_size, place)
      original = original_size(record, index, key)
      if original is not None:
        framing = framing._replace(height=original[0], width=original[1])
      out["framing"][key] = framing
    return out
