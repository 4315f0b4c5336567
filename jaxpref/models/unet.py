"""The denoising UNet of Stable Diffusion 1, 2 and XL (diffusers' UNet2DConditionModel), in NHWC."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models.attention import Transformer2DModel
from jaxpref.models.config import ModelConfig
from jaxpref.models.resnet import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, conv3x3, dense
from jaxpref.recipes.sizes import is_size

Dtype = Any

REMAT = ("none", "attention", "block", "full")


@dataclasses.dataclass(frozen=True)
class UNetConfig(ModelConfig):
  """Fields of the unet/config.json of a diffusers folder.

  `attention_head_dim` is, despite its name, the number of heads (of each level): diffusers kept the misnomer for its
  published configs. A number instead of a tuple means "the same at each level".
  """

  CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"
  CHECKED: ClassVar[Collection[str]] = ("sample_size",)
  FIXED: ClassVar[Mapping[str, Any]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),  # of an unsupported embedding type
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
  }

  sample_size: int | tuple[int, int] | None = None
  in_channels: int = 4
  out_channels: int = 4
  down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
  mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
  up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int | tuple[int, ...] = 2
  transformer_layers_per_block: int | tuple = 1  # a level's entry may be a tuple, one per layer
  reverse_transformer_layers_per_block: tuple | None = None  # for the way up, if asymmetric
  attention_head_dim: int | tuple[int, ...] = 8
  cross_attention_dim: int | tuple[int, ...] = 1280
  use_linear_projection: bool = False
  upcast_attention: bool | None = False  # kept, not used: logits and softmax are always float32
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  time_embedding_dim: int | None = None
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None

  def __post_init__(self):
    levels = len(self.block_out_channels)
    expected = "the side of square latents, or [height, width]"
    self._require(self.sample_size is None or is_size(self.sample_size), "sample_size", expected)
    for key, known in (
      ("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
      ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D")),
    ):
      types = getattr(self, key)
      self._require(len(types) == levels, key, f"{levels} block types (len(block_out_channels))")
      self._require(set(types) <= set(known), key, f"only {' and '.join(known)}")
    self._require(
      self.mid_block_type in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
      "mid_block_type",
      "UNetMidBlock2DCrossAttn, UNetMidBlock2D or null",
    )
    for key in (
      "layers_per_block",
      "transformer_layers_per_block",
      "attention_head_dim",
      "cross_attention_dim",
    ):
      value = getattr(self, key)
      ok = isinstance(value, int) or isinstance(value, tuple) and len(value) == levels
      self._require(ok, key, f"a number or a list of {levels}, one per level")
    self._require(len(set(self.per_level("cross_attention_dim"))) == 1, "cross_attention_dim", "one width")
    for channels, heads in zip(self.block_out_channels, self.per_level("attention_head_dim"), strict=True):
      self._require(channels % heads == 0, "attention_head_dim", f"numbers of heads that divide {channels}")
    self._require(self.addition_embed_type in (None, "text_time"), "addition_embed_type", "null or text_time")

  def per_level(self, key: str) -> tuple:
    """Returns the field `key` as a tuple with an entry for each level, finest first."""
    value = getattr(self, key)
    return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def timestep_embedding(timesteps: jax.Array, width: int, *, flip_sin_to_cos: bool, freq_shift: float) -> jax.Array:
  """Returns the sinusoidal embedding, sin and cos of t / 10000^(i / (width / 2 - freq_shift)).

  Args:
    timesteps: [B], any real numbers.
    width: even width of the embedding.
    flip_sin_to_cos: whether the cosines come first.
    freq_shift: see the formula.

  Returns:
    f32[B, width].
  """
  half = width // 2
  exponents = -math.log(10_000) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32)
  angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponents)[None]
  parts = (jnp.cos(angles), jnp.sin(angles))
  return jnp.concatenate(parts if flip_sin_to_cos else parts[::-1], axis=-1)


class TimestepEmbedding(nn.Module):
  """Two Dense layers with a silu between."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.silu(dense(self.width, dtype=self.dtype, name="linear_1")(x))
    return dense(self.width, dtype=self.dtype, name="linear_2")(x)


class _Block(nn.Module):
  """What the blocks of the way down, the middle and the way up share: how to make a layer.

  Attributes:
    config: config of the whole network.
    channels: channels of the block's output.
    num_heads: heads of its attention, if it has any.
    depths: transformer blocks of each attention layer, or () for a block without attention.
    remat: "none", "attention" or "block": see `UNet2DConditionModel`.
  """

  config: UNetConfig
  channels: int
  num_heads: int
  depths: tuple[int, ...]
  dtype: Dtype = jnp.float32
  remat: str = "none"

  def resnet(self, i: int) -> ResnetBlock2D:
    c = self.config
    make = nn.remat(ResnetBlock2D) if self.remat == "block" else ResnetBlock2D
    return make(self.channels, c.norm_num_groups, c.norm_eps, dtype=self.dtype, name=f"resnets.{i}")

  def transformer(self, i: int) -> Transformer2DModel:
    c = self.config
    return Transformer2DModel(
      self.num_heads,
      self.depths[i],
      c.use_linear_projection,
      c.norm_num_groups,
      dtype=self.dtype,
      remat=self.remat,
      name=f"attentions.{i}",
    )


class DownBlock(_Block):
  """DownBlock2D and, with depths, CrossAttnDownBlock2D."""

  num_layers: int = 1
  downsample: bool = True

  @nn.compact
  def __call__(self, x, temb, context) -> tuple[jax.Array, list[jax.Array]]:
    """Maps x[B, h, w, C_in], temb[B, T] and context[B, S, E] to the output and all skips of the level."""
    skips = []
    for i in range(self.num_layers):
      x = self.resnet(i)(x, temb)
      if self.depths:
        x = self.transformer(i)(x, context)
      skips.append(x)
    if self.downsample:
      x = Downsample2D(pad_before=1, dtype=self.dtype, name="downsamplers.0")(x)
      skips.append(x)
    return x, skips


class MidBlock(_Block):
  """UNetMidBlock2D and, with depths, UNetMidBlock2DCrossAttn."""

  @nn.compact
  def __call__(self, x, temb, context) -> jax.Array:
    """Maps x[B, h, w, C], temb[B, T] and context[B, S, E] to [B, h, w, C]."""
    x = self.resnet(0)(x, temb)
    for i in range(len(self.depths)):
      x = self.transformer(i)(x, context)
      x = self.resnet(i + 1)(x, temb)
    return x


class UpBlock(_Block):
  """UpBlock2D and, with depths, CrossAttnUpBlock2D."""

  upsample: bool = True

  @nn.compact
  def __call__(self, x, skips, temb, context, size) -> jax.Array:
    """Consumes `skips` from its end, one per layer; `size` is the height and width to return."""
    for i, skip in enumerate(reversed(skips)):
      x = self.resnet(i)(jnp.concatenate([x, skip], axis=-1), temb)
      if self.depths:
        x = self.transformer(i)(x, context)
    if self.upsample:
      x = Upsample2D(dtype=self.dtype, name="upsamplers.0")(x, size)
    return x


class UNet2DConditionModel(nn.Module):
  """Predicts noise (or v, or the image) from noisy latents, time and text.

  Attributes:
    config: the architecture.
    dtype: compute dtype; parameters, statistics of normalisations, softmax and output are float32.
    remat: what a backward pass recomputes instead of keeping it from the forward pass; one name, or a tuple with one
      for each level, finest first. "none": nothing. "attention": the inside of each attention (projections, logits).
      "block": the inside of each residual and transformer block, so only their inputs are kept. "full": all of a level,
      so only its input and its skips are kept (and, while its backward pass runs, what "block" keeps of this level).
  """

  config: UNetConfig
  dtype: Dtype = jnp.float32
  remat: str | tuple[str, ...] = "none"

  @nn.compact
  def __call__(
    self,
    sample: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    added_cond_kwargs: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array:
    """Applies the network.

    Args:
      sample: [B, h, w, in_channels] noisy latents, any h and w.
      timesteps: i32[B].
      encoder_hidden_states: [B, L, cross_attention_dim] from the text encoder(s).
      added_cond_kwargs: for SDXL (addition_embed_type "text_time"): "text_embeds" [B, P], pooled text, and "time_ids"
        [B, N], original size, crop and target size.

    Returns:
      f32[B, h, w, out_channels].

    Raises:
      ValueError: an input does not fit the config.
    """
    c, depths = self.config, self._depths()
    x, skips, temb, context = self._way_down(sample, timesteps, encoder_hidden_states, added_cond_kwargs)
    last = len(c.block_out_channels) - 1

    for i, block_type in enumerate(c.up_block_types):
      level = last - i
      num_layers = c.per_level("layers_per_block")[level] + 1
      skips, level_skips = skips[:-num_layers], skips[-num_layers:]
      block = self._level_block(
        UpBlock,
        level,
        depths["up"][i] if block_type == "CrossAttnUpBlock2D" else (),
        upsample=level > 0,
        name=f"up_blocks.{i}",
      )
      size = skips[-1].shape[1:3] if skips else None  # odd sizes return to those of the way down
      x = block(x, level_skips, temb, context, size)

    x = GroupNorm(c.norm_num_groups, c.norm_eps, dtype=self.dtype, name="conv_norm_out")(x)
    x = conv3x3(c.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))
    return x.astype(jnp.float32)

  def _level_block(self, block_class: type[_Block], level: int, *args: Any, **kwargs: Any) -> Any:
    """Returns a block of a level, under its `remat`."""
    c, remat = self.config, self._remat_of_levels()[level]
    static = (5,) if block_class is UpBlock else ()  # `size`; 0 is `self`
    wrapped = nn.remat(block_class, static_argnums=static) if remat == "full" else block_class
    inner = "block" if remat == "full" else remat
    heads = c.per_level("attention_head_dim")[level]
    return wrapped(c, c.block_out_channels[level], heads, *args, dtype=self.dtype, remat=inner, **kwargs)

  def _way_down(
    self,
    sample: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    added_cond_kwargs: Mapping[str, jax.Array] | None,
  ) -> tuple[jax.Array, list[jax.Array], jax.Array, jax.Array]:
    """Applies down and middle blocks; returns their output, all skips, and what the way up is conditioned on."""
    c, depths = self.config, self._depths()
    self._check_inputs(sample, encoder_hidden_states)
    context = encoder_hidden_states.astype(self.dtype)
    temb = self._time_embedding(timesteps, added_cond_kwargs)
    last = len(c.block_out_channels) - 1
    x = conv3x3(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(sample)
    skips = [x]
    for i, block_type in enumerate(c.down_block_types):
      block = self._level_block(
        DownBlock,
        i,
        depths["down"][i] if block_type == "CrossAttnDownBlock2D" else (),
        num_layers=c.per_level("layers_per_block")[i],
        downsample=i < last,
        name=f"down_blocks.{i}",
      )
      x, level_skips = block(x, temb, context)
      skips += level_skips

    if c.mid_block_type is not None:
      mid_depths = depths["mid"] if c.mid_block_type == "UNetMidBlock2DCrossAttn" else ()
      x = self._level_block(MidBlock, last, mid_depths, name="mid_block")(x, temb, context)
    return x, skips, temb, context

  def _remat_of_levels(self) -> tuple[str, ...]:
    """Returns one of REMAT for each level, finest first; raises ValueError for any other."""
    levels = len(self.config.block_out_channels)
    remat = (self.remat,) * levels if isinstance(self.remat, str) else self.remat
    if len(remat) != levels or not set(remat) <= set(REMAT):
      raise ValueError(
        f"UNet2DConditionModel: remat={self.remat!r}, expected one of {', '.join(REMAT)}, or a tuple of {levels} of"
        " them, one for each level."
      )
    return remat

  def _depths(self) -> dict[str, Any]:
    """Returns the number of transformer blocks of each attention layer: way down, middle and way up."""
    c = self.config
    down = c.per_level("transformer_layers_per_block")
    up = c.reverse_transformer_layers_per_block or down[::-1]
    layers = c.per_level("layers_per_block")

    def per_layer(depth, num_layers):
      return depth if isinstance(depth, tuple) else (depth,) * num_layers

    return {
      "down": [per_layer(d, n) for d, n in zip(down, layers, strict=True)],
      "mid": per_layer(down[-1], 1)[:1],
      "up": [per_layer(d, n + 1) for d, n in zip(up, layers[::-1], strict=True)],
    }

  def _time_embedding(self, timesteps, added_cond_kwargs) -> jax.Array:
    """Returns [B, T] of the timestep and, for SDXL, of the pooled text and the sizes."""
    c = self.config
    sinusoid: dict[str, Any] = dict(flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
    width = c.time_embedding_dim or 4 * c.block_out_channels[0]
    t_emb = timestep_embedding(timesteps, c.block_out_channels[0], **sinusoid)
    temb = TimestepEmbedding(width, dtype=self.dtype, name="time_embedding")(t_emb)
    if c.addition_embed_type is None:
      return temb
    if added_cond_kwargs is None or not {"text_embeds", "time_ids"} <= set(added_cond_kwargs):
      found = sorted(added_cond_kwargs or ())
      raise ValueError(
        f"UNet2DConditionModel: added_cond_kwargs has the keys {found}, but addition_embed_type"
        " text_time expects text_embeds and time_ids."
      )
    text_embeds, time_ids = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
    ids_emb = timestep_embedding(time_ids.reshape(-1), c.addition_time_embed_dim or 0, **sinusoid)
    add = jnp.concatenate([text_embeds.astype(jnp.float32), ids_emb.reshape(time_ids.shape[0], -1)], axis=-1)
    if add.shape[-1] != c.projection_class_embeddings_input_dim:
      raise ValueError(
        f"UNet2DConditionModel: text_embeds {text_embeds.shape} and {time_ids.shape[-1]} time_ids"
        f" of {c.addition_time_embed_dim} make {add.shape[-1]} numbers, but"
        f" projection_class_embeddings_input_dim is {c.projection_class_embeddings_input_dim}."
      )
    return temb + TimestepEmbedding(width, dtype=self.dtype, name="add_embedding")(add)

  def _check_inputs(self, sample, encoder_hidden_states) -> None:
    c = self.config
    if sample.ndim != 4 or sample.shape[-1] != c.in_channels:
      raise ValueError(
        f"UNet2DConditionModel: sample has the shape {sample.shape}, expected [B, h, w,"
        f" {c.in_channels}] (channels last)."
      )
    width = c.per_level("cross_attention_dim")[0]
    if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != width:
      raise ValueError(
        f"UNet2DConditionModel: encoder_hidden_states has the shape {encoder_hidden_states.shape},"
        f" expected [B, L, {width}] (cross_attention_dim); use the text encoder of this folder."
      )


class UNetEncoder(UNet2DConditionModel):
  """The way down and the middle of `UNet2DConditionModel`, with parameters of the same names.

  Attributes: see `UNet2DConditionModel`.
  """

  @nn.compact
  def __call__(  # type: ignore[override]
    self,
    sample: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    added_cond_kwargs: Mapping[str, jax.Array] | None = None,
  ) -> tuple[list[jax.Array], jax.Array]:
    """Returns features: means over height and width.

    Args: see `UNet2DConditionModel`.

    Returns:
      For each level, finest first, f32[B, C] of its last layer's output before it is halved; and f32[B, C] of the
      middle.

    Raises:
      ValueError: an input does not fit the config.
    """
    x, skips, _, _ = self._way_down(sample, timesteps, encoder_hidden_states, added_cond_kwargs)
    pooled = lambda x: jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    found, place = [], 0  # of conv_in's
    for level, layers in enumerate(self.config.per_level("layers_per_block")):
      found.append(pooled(skips[place + layers]))
      place += layers + (level < len(self.config.block_out_channels) - 1)
    return found, pooled(x)


def encoder_params(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters of a `UNet2DConditionModel` that its `UNetEncoder` has."""
  return {k: v for k, v in params.items() if not k.startswith(("up_blocks.", "conv_norm_out", "conv_out"))}
