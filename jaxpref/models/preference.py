"""Models that judge pictures: SPO's step-aware preference model, and an independent classifier."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpref.models.clip import CLIPConfig, CLIPModel, normalize
from jaxpref.models.config import check_types, without_nulls
from jaxpref.models.resnet import GroupNorm, conv3x3

Array = jax.Array

# Mean and standard deviation per channel of OpenAI's CLIP images, in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Returns the cubic convolution kernel with parameter a."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(size_in: int, size_out: int, *, antialias: bool) -> np.ndarray:
  """Returns f32[size_out, size_in], the matrix of a bicubic resize with half-pixel centres.

  Without antialiasing it is torch's: a = -0.75, and the outermost pixels repeat. With it, PIL's:
  a = -0.5, a kernel as wide as the output's pixels, cut off at the borders and made to sum to 1.
  (jax.image.resize mixes the two: a = -0.5, cut off, whether antialiased or not.)
  """
  position = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
  if antialias:
    width = max(size_in / size_out, 1.0)
    matrix = _cubic((position[:, None] - np.arange(size_in)[None]) / width, a=-0.5)
    return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
  base = np.floor(position).astype(int)
  matrix = np.zeros((size_out, size_in))
  for offset in (-1, 0, 1, 2):
    index = np.clip(base + offset, 0, size_in - 1)
    np.add.at(matrix, (np.arange(size_out), index), _cubic(position - base - offset, a=-0.75))
  return matrix.astype(np.float32)


def preprocess(
  images: Array,
  size: int,
  *,
  antialias: bool = False,
  mean: Sequence[float] = CLIP_MEAN,
  std: Sequence[float] = CLIP_STD,
) -> Array:
  """Prepares images for a CLIP vision tower; differentiable, for use inside jit.

  Resizes the shorter side to `size` (bicubic), crops the centre, clips to [0, 1] and normalises.

  - `antialias=False` is what SPO's reference implementation does to decoded pictures when it scores
    them (`StepAwarePreferenceModel.get_preference_score`, torch's `interpolate`): for step-aware
    preference models. (When it trains them it also clips before the resize.)
  - `antialias=True` is what transformers' `CLIPImageProcessor` does to image files (PIL): for
    PickScore and other CLIP scores. Like PIL it clips and rounds to 8 bits after each direction
    (the gradient passes over the rounding). What remains is one of 255 levels where float32 and
    PIL's integers round differently: measured, 0.01 % of a photograph's values, 0.5 % of a tile's.

  Args:
    images: f32[B, H, W, 3] in [-1, 1] (overshoot is clipped, after the resize).
    size: height and width that the tower expects.
    antialias: which of the two; they also round sizes and offsets differently unless the image is
      a square.
    mean: mean per channel of images in [0, 1].
    std: standard deviation per channel of images in [0, 1].

  Returns:
    f32[B, size, size, 3].
  """
  images = images.astype(jnp.float32)
  height, width = images.shape[1:3]
  scale = size / min(height, width)
  if antialias:
    height_out, width_out = (size * n // min(height, width) for n in (height, width))
    top, left = (height_out - size) // 2, (width_out - size) // 2
  else:
    height_out, width_out = int(height * scale + 0.5), int(width * scale + 0.5)
    top, left = round((height_out - size) / 2), round((width_out - size) / 2)

  def resize(images, equation, size_in, size_out):
    if size_in == size_out:
      return images
    matrix = bicubic_matrix(size_in, size_out, antialias=antialias)
    images = jnp.einsum(equation, matrix, images, precision=jax.lax.Precision.HIGHEST)
    if not antialias:
      return images
    images = jnp.clip(images, -1.0, 1.0)
    rounded = jnp.floor((images + 1.0) * 127.5 + 0.5) / 127.5 - 1.0
    return images + jax.lax.stop_gradient(rounded - images)

  images = resize(images, "ow,bhwc->bhoc", width, width_out)
  images = resize(images, "oh,bhwc->bowc", height, height_out)
  images = images[:, top : top + size, left : left + size]
  images = jnp.clip(images / 2 + 0.5, 0.0, 1.0)
  mean_C, std_C = (np.asarray(v, np.float32)[None, None, None] for v in (mean, std))
  return (images - mean_C) / std_C


@dataclasses.dataclass(frozen=True)
class StepAwareCLIPConfig(CLIPConfig):
  """A CLIP config with what the time condition and the preprocessing need."""

  MODEL_TYPES: ClassVar[tuple[str, ...]] = ("step_aware_clip", "clip")

  frequency_embedding_size: int = 256
  image_mean: tuple[float, ...] = CLIP_MEAN
  image_std: tuple[float, ...] = CLIP_STD

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> Self:
    """Reads a config.json: that of a step-aware model, or of a plain CLIP (PickScore) to start from.

    Files of transformers 4 may have each tower twice; transformers then uses `text_config_dict` and
    `vision_config_dict`.
    """
    towers = ("text_config", "vision_config")
    twice = {k: config[f"{k}_dict"] for k in towers if config.get(f"{k}_dict") is not None}
    known = super().from_dict({**config, **twice})
    config = without_nulls(cls, config)
    check_types(cls, config)
    extra: dict[str, Any] = {k: tuple(config[k]) for k in ("image_mean", "image_std") if k in config}
    if "frequency_embedding_size" in config:
      extra["frequency_embedding_size"] = config["frequency_embedding_size"]
    return dataclasses.replace(known, **extra)

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json."""
    return super().to_dict() | {
      "model_type": "step_aware_clip",
      "frequency_embedding_size": self.frequency_embedding_size,
      "image_mean": list(self.image_mean),
      "image_std": list(self.image_std),
    }


class TimestepEmbedder(nn.Module):
  """Sinusoids of the time (cosines first, periods up to 10,000) through Dense, SiLU, Dense."""

  features: int
  frequency_embedding_size: int = 256

  @nn.compact
  def __call__(self, t: Array) -> Array:
    """Maps t [B], any real numbers, to f32[B, features]."""
    half = self.frequency_embedding_size // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    init = nn.initializers.normal(0.02)
    x = nn.silu(nn.Dense(self.features, kernel_init=init, name="mlp.0")(x))
    return nn.Dense(self.features, kernel_init=init, name="mlp.2")(x)


class StepAwareCLIPModel(CLIPModel):
  """CLIP whose image side knows the diffusion time: SPO's preference model (arXiv 2406.04314).

  AdaLN: in each vision block the normalised input of attention and MLP becomes
  h (1 + scale) + shift and their outputs are multiplied by a gate, all three linear in SiLU of
  the time embedding; the pooled output gets a scale and a shift. At initialisation scale = shift
  = 0 and gate = 1 whatever the time, so with CLIP's weights the scores are CLIP's, exactly.
  Parameters are those of `CLIPModel` plus `t_embedder` and `adaLN_modulation`.
  """

  config: StepAwareCLIPConfig
  dtype: Any = jnp.float32
  time_conditioned: ClassVar[bool] = True

  def setup(self):
    super().setup()
    self.t_embedder = TimestepEmbedder(self.config.vision_config.hidden_size, self.config.frequency_embedding_size)

  def image_embeds(self, pixel_values: Array, t: Array) -> Array:
    """Returns unit vectors f32[B, P] of images.

    Args:
      pixel_values: f32[B, H, W, 3], CLIP-normalised (see `preprocess`).
      t: i32[B] diffusion time of the sample whose x0-prediction the image is; 0 for real images.
    """
    return normalize(self.image_features(pixel_values, self.t_embedder(t)))

  def text_embeds(self, input_ids: Array) -> Array:
    """Returns unit vectors f32[B, P] of prompts i32[B, L]; they do not depend on the time."""
    return normalize(self.text_features(input_ids))

  def score(self, image_embeds: Array, text_embeds: Array) -> Array:
    """Returns f32[B]: exp(logit_scale) cos(image, text), row by row, for unit vectors [B, P]."""
    return jnp.exp(self.logit_scale.astype(jnp.float32)) * jnp.sum(image_embeds * text_embeds, axis=-1)

  def __call__(self, input_ids: Array, pixel_values: Array, t: Array) -> Array:  # type: ignore[override]
    """Scores images at times t under their prompts, f32[B]."""
    return self.score(self.image_embeds(pixel_values, t), self.text_embeds(input_ids))


def from_clip(step_aware_params: Mapping[str, Any], clip_params: Mapping[str, Any]) -> dict:
  """Returns freshly initialised step-aware parameters with CLIP's weights in all places that CLIP has.

  Args:
    step_aware_params: those of `StepAwareCLIPModel.init`; provides the time embedding and AdaLN.
    clip_params: those of `CLIPModel` with the same towers.

  Returns:
    A new tree of the structure of `step_aware_params`.

  Raises:
    ValueError: a CLIP parameter has no place of its shape.
  """

  def merge(ours, theirs, path):
    out = dict(ours)
    for name, value in theirs.items():
      where = (*path, name)
      if isinstance(value, Mapping) and isinstance(ours.get(name), Mapping):
        out[name] = merge(ours[name], value, where)
      elif not isinstance(value, Mapping) and getattr(ours.get(name), "shape", None) == value.shape:
        out[name] = value
      else:
        raise ValueError(
          f"step-aware CLIP: {'.'.join(where)} of the CLIP parameters has no place of its shape; "
          "use the same text_config, vision_config and projection_dim for both."
        )
    return out

  return merge(step_aware_params, clip_params, ())


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
  """A `Judge` folder's config.json.

  Attributes:
    num_styles: number of picture styles told apart.
    num_classes: number of captions told apart.
    image_size: height and width the judge is trained on (it accepts others).
    channels: width of each level; each level after the first halves the picture.
    blocks_per_level: residual blocks.
    norm_num_groups: groups of every GroupNorm.
    styles: names of the styles, in the order of the logits (may be empty).
    classes: captions, in the order of the logits (may be empty).
  """

  num_styles: int = 3
  num_classes: int = 1000
  image_size: int = 32
  channels: tuple[int, ...] = (32, 64, 128)
  blocks_per_level: int = 1
  norm_num_groups: int = 8
  styles: tuple[str, ...] = ()
  classes: tuple[str, ...] = ()

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "JudgeConfig":
    """Reads the dict of a config.json."""
    if config.get("model_type") != "judge":
      raise ValueError(
        f"judge config: model_type is {config.get('model_type')!r}, expected 'judge'; point to a "
        "folder that save_judge wrote."
      )
    known = {f.name for f in dataclasses.fields(cls)}
    given = without_nulls(cls, config).items()
    check_types(cls, dict(given))
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given if k in known}
    return cls(**fields)

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json."""
    fields = dataclasses.asdict(self)
    return {"model_type": "judge"} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


class JudgeBlock(nn.Module):
  """Pre-activation residual block, the first convolution strided where the level halves."""

  channels: int
  stride: int
  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = dict(num_groups=self.num_groups, epsilon=1e-5, dtype=self.dtype)
    stride = (self.stride, self.stride)
    h = nn.silu(GroupNorm(**norm, name="norm1")(x))
    if x.shape[-1] != self.channels or self.stride != 1:
      x = nn.Conv(self.channels, (1, 1), stride, dtype=self.dtype, name="conv_shortcut")(h)
    pad = ((1, 1), (1, 1))
    h = nn.Conv(self.channels, (3, 3), stride, pad, dtype=self.dtype, name="conv1")(h)
    h = nn.silu(GroupNorm(**norm, name="norm2")(h))
    return x + conv3x3(self.channels, dtype=self.dtype, name="conv2")(h)


class Judge(nn.Module):
  """A small ResNet that names a picture's style and its caption; for evaluation only.

  It deliberately has another architecture than the preference model: the model that one optimises
  against must not measure the gain.
  """

  config: JudgeConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, Array]:
    """Classifies pictures.

    Args:
      images: f32[B, H, W, 3] in [-1, 1].

    Returns:
      Logits f32[B, num_styles] and f32[B, num_classes].
    """
    c = self.config
    x = conv3x3(c.channels[0], dtype=self.dtype, name="conv_in")(images)
    i = 0
    for level, channels in enumerate(c.channels):
      for block in range(c.blocks_per_level):
        stride = 2 if level and not block else 1
        x = JudgeBlock(channels, stride, c.norm_num_groups, self.dtype, name=f"blocks.{i}")(x)
        i += 1
    x = nn.silu(GroupNorm(c.norm_num_groups, 1e-5, dtype=self.dtype, name="norm_out")(x))
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    style_logits = nn.Dense(c.num_styles, dtype=jnp.float32, name="style_head")(x)
    class_logits = nn.Dense(c.num_classes, dtype=jnp.float32, name="class_head")(x)
    return style_logits, class_logits


# Scale, and shift down and to the right as shares of the side, for each view that a judge takes of a picture.
JUDGE_VIEWS = ((0.9, 0.03, -0.02), (0.95, -0.04, 0.03), (1.03, 0.02, 0.04), (1.08, -0.03, -0.03))


def ask_judge(judge: Judge, params: Any, images: Array) -> tuple[Array, Array]:
  """Returns a judge's answer on pictures f32[B, H, W, 3] in [-1, 1] on a white ground: means over `JUDGE_VIEWS`.

  It was trained on resampled pictures and mistakes sharp ones for outlined ones; four views cost four calls.

  Returns:
    Logarithms of mean probabilities of styles f32[B, num_styles], mean logits of captions f32[B, num_classes].
  """

  def view(scale: float, down: float, right: float) -> tuple[Array, Array]:
    size = jnp.asarray(images.shape[1:3], jnp.float32)
    offset = jnp.asarray((down, right)) * size + (1.0 - scale) * size / 2
    place = lambda x: jax.image.scale_and_translate(  # noqa: E731
      x, x.shape, (0, 1), jnp.full(2, scale), offset, method="linear", antialias=False
    )
    style, classes = judge.apply({"params": params}, 1.0 - jax.vmap(place)(1.0 - images))  # it pads with 0: white
    return jax.nn.log_softmax(style), classes

  styles, classes = (jnp.stack(x) for x in zip(*(view(*v) for v in JUDGE_VIEWS), strict=True))
  return jax.nn.logsumexp(styles, axis=0) - math.log(len(JUDGE_VIEWS)), jnp.mean(classes, axis=0)
