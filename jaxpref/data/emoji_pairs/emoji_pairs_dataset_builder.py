"""The tensorflow_datasets builder of `emoji_pairs`; needs no TensorFlow."""

import dataclasses
import functools
import io
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxpref.data import emoji, emoji_pairs


@dataclasses.dataclass
class EmojiPairsConfig(tfds.core.BuilderConfig):
  """Which style wins, and which emoji are used.

  Attributes:
    preferred_style: "twemoji", "noto" or "openmoji".
    subset: "core" (about 1,000 emoji) or "all".
  """

  preferred_style: str = "openmoji"
  subset: str = "core"


@functools.lru_cache(maxsize=16)  # Each tile is in two or three of its emoji's four pairs.
def _png(encoded: bytes) -> bytes:
  """Converts WebP bytes to a PNG file, which the image feature declares."""
  file = io.BytesIO()
  Image.open(io.BytesIO(encoded)).convert("RGB").save(file, "PNG")
  return file.getvalue()


class Builder(tfds.core.GeneratorBasedBuilder):
  """Emoji in three styles as preference pairs with a programmatic label."""

  VERSION = tfds.core.Version("1.1.0")
  RELEASE_NOTES = {
    "1.0.0": "Three styles, 1,826 emoji (core: 1,021).",
    "1.1.0": "One more pair for every emoji, in which another emoji of the same style loses.",
  }
  # "openmoji_core" comes first and is the default.
  BUILDER_CONFIGS = [
    EmojiPairsConfig(
      name=f"{style}_{subset}",
      description=f"{style} is preferred; {subset} emoji.",
      preferred_style=style,
      subset=subset,
    )
    for style in ("openmoji", "noto", "twemoji")
    for subset in emoji.SUBSETS
  ]
  on_record: Callable[[], object] | None = None  # Called after each record, to show progress.

  def _info(self) -> tfds.core.DatasetInfo:
    side = emoji.TILE_SIZE
    image = {"shape": (side, side, 3), "encoding_format": "png"}
    return self.dataset_info_from_configs(
      description=(
        "Emoji with their captions, drawn in three styles, as pairs in the form of Pick-a-Pic. The "
        "label is programmatic: images of one style count as preferred, and the emoji of the "
        "caption over another one. Splits are by emoji."
      ),
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "caption": tfds.features.Text(),
          "image_0": tfds.features.Image(**image),
          "image_1": tfds.features.Image(**image),
          "label_0": tfds.features.Scalar(np.float32),
          "num_example_per_prompt": tfds.features.Scalar(np.int32),
          "style_0": tfds.features.Text(),
          "style_1": tfds.features.Text(),
          "group": tfds.features.Text(),
        }
      ),
      license="Twemoji CC-BY 4.0; Noto Color Emoji OFL 1.1 / Apache-2.0; OpenMoji CC-BY-SA 4.0",
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded: the images are in the package.
    return {split: self._generate_examples(split) for split in emoji.SPLITS}

  def _generate_examples(self, split):
    config = self.builder_config
    pairs = emoji_pairs.records(preferred_style=config.preferred_style, subset=config.subset, split=split)
    for key, record in enumerate(pairs):
      images = {name: io.BytesIO(_png(record[name])) for name in ("image_0", "image_1")}
      yield key, record | images
      if self.on_record is not None:
        self.on_record()
