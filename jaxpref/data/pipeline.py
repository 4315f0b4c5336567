"""Batches of pairs, of images and of prompts, and what a row of each holds. `batching` decides their order."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data import batching, emoji, records
from jaxpref.recipes.sizes import Size, sides

# ---- Pairs -------------------------------------------------------------------------------------------------------


def _pixels(image: np.ndarray, flip: bool) -> np.ndarray:
  """Returns u8[H, W, 3], mirrored or not; the model makes floats of it, so that a batch stays small."""
  if not flip:
    return image
  mirrored = np.empty_like(image)
  for channel in range(3):  # three times as fast as all at once
    mirrored[..., channel] = image[:, ::-1, channel]
  return mirrored


def _pair_fields(record: Mapping[str, Any], index: int) -> dict[str, Any]:
  count = int(record.get("num_example_per_prompt", 1))
  return {
    "caption": records.text(records.field(record, index, "caption")),
    "num_example_per_prompt": count,
    "weight": float(record.get("weight", 1 / count)),
  }


@dataclasses.dataclass(frozen=True)
class _PairRow:
  reader: records.Reader
  image_size: Size
  labels: np.ndarray
  weights: np.ndarray | None

  def __call__(self, position: int, dropped: bool, flipped: bool, place: records.Place | None = None) -> dict[str, Any]:
    record = self.reader.read(position, place)
    position = record["position"]
    row: dict[str, Any] = {
      "record": np.int32(self.reader.kept[position]),
      "caption": "" if dropped else record["caption"],
      "label_0": self.labels[position],
      "num_example_per_prompt": np.int32(record["num_example_per_prompt"]),
      "weight": np.float32(record["weight"]) if self.weights is None else self.weights[position],
      "skipped": record["skipped"],
    }
    for n in ("0", "1"):
      framing = record["framing"][f"image_{n}"]
      row[f"pixels_{n}"] = _pixels(record[f"image_{n}"], flipped)
      row[f"sizes_{n}"] = records.sizes(framing, self.image_size, flip=flipped)
    return row


def _labels_of(source: records.Source, kept: np.ndarray, given: Sequence[float] | np.ndarray | None) -> np.ndarray:
  """Returns f32[M] in [0, 1]: the labels given, else those of the source's index, else of its records."""
  index: Any = getattr(source, "index", None)
  if given is not None:
    labels = _of_kept("labels", given, kept)
  elif hasattr(index, "label_0"):
    labels = np.asarray(index.label_0, np.float32)[kept]
  else:
    labels = _read_labels(source, kept)
  wrong = np.flatnonzero(~((labels >= 0) & (labels <= 1)))
  if len(wrong):
    raise ValueError(f"the label of record {kept[wrong[0]]} is {labels[wrong[0]]}; expected a number from 0 to 1.")
  return labels


def _read_labels(source: records.Source, kept: np.ndarray) -> np.ndarray:
  """Returns f32[M] from the records themselves, reading all of them; errors in them show before training."""
  labels = np.empty(len(kept), np.float32)
  for position, index in enumerate(kept.tolist()):
    record = source[index]
    labels[position] = records.label_of(record, index)
    records.field(record, index, "caption")
    for image in ("image_0", "image_1"):
      records.original_size(record, index, image)
  return labels


def _of_kept(name: str, values: Sequence[float] | np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Returns f32[M]: a value for each kept record."""
  values = np.asarray(values, np.float32)
  if values.shape != kept.shape:
    raise ValueError(f"{name} has {values.size} values for a source of {len(kept)} records (those in kept).")
  return values


# Many parameters: public, and one call opens the data of a run; all but the first five have defaults.
def pair_batches(
  source: records.Source,
  *,
  batch_size: int,
  image_size: Size,
  tokenize: batching.Tokenize,
  seed: int,
  caption_dropout: float = 0.0,
  drop_ties: bool = False,
  flip: bool = False,
  random_crop: bool = False,
  kept: Sequence[int] | np.ndarray | None = None,
  labels: Sequence[float] | np.ndarray | None = None,
  weights: Sequence[float] | np.ndarray | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  num_workers: int = 0,
) -> batching.Batches:
  """Returns batches of preference pairs.

  Opening reads no record if the labels are given or the source has them as `source.index.label_0`; else it reads all.

  Args:
    source: records with caption, image_0, image_1 (image files' bytes or u8[H, W, 3]), label_0 (1: image_0 is
      preferred, 0: image_1, 0.5: tie) and optionally num_example_per_prompt, weight, id, and original_size_0 and
      original_size_1: [height, width] of an image that is stored smaller than it was, for SDXL's size conditioning.
    batch_size: pairs in a batch, over all processes.
    image_size: size of the images: side of squares, or (height, width); others are cropped to this shape and resampled,
      see `records.decode`.
    tokenize: captions -> i32[n, L]; called for those of a batch that are not cached.
    seed: seed of order, dropout, flips and crops.
    caption_dropout: share of pairs whose caption is replaced by the empty one.
    drop_ties: leave out the pairs with label 0.5.
    flip: mirror half of the pairs, both images of a pair together.
    random_crop: crop to a part drawn for each pair and epoch, at the same place in both images (in the same share of
      what is left out, if their sizes differ); else to the central part.
    kept: i64[M], the records to use; None: all.
    labels: f32[M] for the kept records: the probability that image_0 is preferred, instead of label_0.
    weights: f32[M] for the kept records, instead of weight.
    process_index: number of this process.
    process_count: number of processes that share each batch.
    num_threads: threads that prepare batches ahead; 0: batches are prepared on demand.
    num_workers: processes that prepare batches ahead, instead of threads; 0: none. They get a pickled source.

  Returns:
    Batches of input_ids i32[B, L], pixels_0 and pixels_1 u8[B, H, W, 3], sizes_0 and sizes_1 f32[B, 6] (see
    `records.sizes`), label_0 f32[B], num_example_per_prompt i32[B], weight f32[B] (1 / num_example_per_prompt unless
    given), and record i32[B], the place of the pair in the source. B = batch_size / process_count.

  Raises:
    ValueError: a label is out of range, a field is missing, an original size is invalid, or there are too few records.
  """
  chosen = np.arange(len(source)) if kept is None else np.asarray(kept, np.int64)
  if chosen.ndim != 1 or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(source)):
    raise ValueError(f"kept has shape {list(chosen.shape)}; expected places in a source of {len(source)} records.")
  label = _labels_of(source, chosen, labels)
  weight = None if weights is None else _of_kept("weights", weights, chosen)
  if drop_ties:
    decided = label != 0.5
    chosen, label = chosen[decided], label[decided]
    weight = None if weight is None else weight[decided]
  reader = records.Reader(
    source,
    image_size,
    image_fields=("image_0", "image_1"),
    convert=_pair_fields,
    kept=chosen,
    decided=label != 0.5,
  )
  return batching.open_batches(
    len(reader),
    _PairRow(reader, image_size, label, weight),
    what="pair source" + (" without its ties" if drop_ties else ""),
    caption_dropout=caption_dropout,
    flip=flip,
    random_crop=random_crop,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
    num_threads=num_threads,
    num_workers=num_workers,
    tokenize=tokenize,
    reader=reader,
  )


# ---- Images ------------------------------------------------------------------------------------------------------


def emoji_images(
  image_size: Size,
  *,
  subset: str = "core",
  split: str | None = "train",
  styles: Sequence[str] = emoji.STYLES,
) -> list[dict[str, Any]]:
  """Returns the embedded images as a source: one record for each emoji and style.

  Args:
    image_size: side of the images, or (height, width), to which the squares are cropped as by `records.decode`.
    subset, split: which emoji.
    styles: which drawings; each is a record.

  Returns:
    Records with image u8[H, W, 3], caption, style (index into `emoji.STYLES`), class_id and id.
  """
  chosen = emoji.load_index(subset, split)
  class_ids = [e.class_id for e in chosen]
  source = []
  for style in styles:
    tiles = _tiles(style, image_size, class_ids)
    for e, tile in zip(chosen, tiles, strict=True):
      source.append(
        {
          "id": f"{e.id}/{style}",
          "image": tile,
          "caption": e.caption,
          "style": emoji.STYLES.index(style),
          "class_id": e.class_id,
        }
      )
  return source


def _tiles(style: str, image_size: Size, class_ids: Sequence[int]) -> np.ndarray:
  """Returns the tiles of a style, u8[N, H, W, 3]."""
  height, width = sides(image_size)
  if height == width:
    return emoji.load_tiles(style, height, class_ids=class_ids)
  tiles = emoji.load_tiles(style, class_ids=class_ids)
  return np.stack([records.decode(tile, image_size)[0] for tile in tiles])


def _image_fields(record: Mapping[str, Any], index: int, *, with_captions: bool) -> dict[str, Any]:
  found: dict[str, Any] = {"style": int(record.get("style", -1)), "class_id": int(record.get("class_id", -1))}
  if with_captions:
    found["caption"] = records.text(records.field(record, index, "caption"))
  return found | {"label": record["label"]} if "label" in record else found


@dataclasses.dataclass(frozen=True)
class _ImageRow:
  reader: records.Reader
  image_size: Size
  with_captions: bool

  def __call__(self, position: int, dropped: bool, flipped: bool, place: records.Place | None = None) -> dict[str, Any]:
    record = self.reader.read(position, place)
    row: dict[str, Any] = {
      "record": np.int32(record["position"]),
      "pixels": _pixels(record["image"], flipped),
      "sizes": records.sizes(record["framing"]["image"], self.image_size, flip=flipped),
      "style": np.int32(record["style"]),
      "class_id": np.int32(record["class_id"]),
      "skipped": record["skipped"],
    }
    if self.with_captions:
      row["caption"] = "" if dropped else record["caption"]
    return row | {"label": np.float32(record["label"])} if "label" in record else row


# Many parameters: public, for the same reason as `pair_batches`.
def image_batches(
  source: records.Source | None = None,
  *,
  batch_size: int,
  image_size: Size,
  tokenize: batching.Tokenize | None = None,
  seed: int,
  subset: str = "core",
  split: str | None = "train",
  styles: Sequence[str] = emoji.STYLES,
  caption_dropout: float = 0.0,
  flip: bool = False,
  random_crop: bool = False,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  num_workers: int = 0,
) -> batching.Batches:
  """Returns batches of single images with captions, for pre-training and for Diffusion-KTO.

  Args:
    source: records with image and caption, and optionally label (1: liked, 0: disliked; in all records or none), style
      and class_id (integers), id, and original_size: [height, width] of an image that is stored smaller than it was;
      None: the embedded emoji. No record is read before its turn.
    batch_size: images in a batch, over all processes.
    image_size: size of the images: side of squares, or (height, width).
    tokenize: captions -> i32[n, L]; None: no input_ids.
    seed: seed of order, dropout, flips and crops.
    subset: subset of the emoji, "core" or "all".
    split: split of the emoji; None: all three.
    styles: styles of the emoji; each drawing is a record.
    caption_dropout: share of images whose caption is replaced by the empty one.
    flip: mirror half of the images.
    random_crop: crop to a part drawn for each image and epoch; else to the central part.
    process_index: number of this process.
    process_count: number of processes that share each batch.
    num_threads: threads that prepare batches ahead.
    num_workers: processes that prepare batches ahead, instead of threads; 0: none.

  Returns:
    Batches of pixels u8[B, H, W, 3], sizes f32[B, 6] (see `records.sizes`), style i32[B] and class_id i32[B] (-1 if
    the source has none), label f32[B] if the source has it, input_ids i32[B, L], and record i32[B], the place of the
    image in the source.

  Raises:
    ValueError: a field is missing, or there are too few records for a batch.
  """
  if source is None:
    source = emoji_images(image_size, subset=subset, split=split, styles=styles)

  with_captions = tokenize is not None
  reader = records.Reader(
    source,
    image_size,
    image_fields=("image",),
    convert=functools.partial(_image_fields, with_captions=with_captions),
  )
  return batching.open_batches(
    len(reader),
    _ImageRow(reader, image_size, with_captions),
    what="image source",
    caption_dropout=caption_dropout,
    flip=flip,
    random_crop=random_crop,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
    num_threads=num_threads,
    num_workers=num_workers,
    tokenize=tokenize,
    reader=reader,
  )


# ---- Prompts -----------------------------------------------------------------------------------------------------


def prompt_batches(
  prompts: Sequence[str] | None = None,
  *,
  batch_size: int,
  tokenize: batching.Tokenize,
  tokenizers: Mapping[str, batching.Tokenize] | None = None,
  seed: int,
  subset: str = "core",
  split: str | None = "train",
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 1,
) -> batching.Batches:
  """Returns batches of prompts alone, for online methods.

  Args:
    prompts: prompts to draw from; None: the captions of the embedded emoji.
    batch_size: prompts in a batch, over all processes.
    tokenize: prompts -> i32[n, L]; called for those of a batch that are not cached.
    tokenizers: further ones, by the field of the batch that they fill.
    seed: seed of the order.
    subset: subset of the emoji, "core" or "all".
    split: split of the emoji; None: all three.
    process_index: number of this process.
    process_count: number of processes that share each batch.
    num_threads: threads that prepare batches ahead.

  Returns:
    Batches of input_ids i32[B, L] and record i32[B], the place in `prompts`.

  Raises:
    ValueError: there are fewer prompts than a batch holds.
  """
  prompts = emoji.prompts(split, subset) if prompts is None else list(prompts)

  def load(position: int, dropped: bool, flipped: bool) -> dict[str, Any]:
    del dropped, flipped
    return {"caption": prompts[position], "record": np.int32(position)}

  return batching.open_batches(
    len(prompts),
    load,
    what="prompt list",
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
    num_threads=num_threads,
    tokenize=tokenize,
    tokenizers=tokenizers,
  )
