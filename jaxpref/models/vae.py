"""The autoencoder of Stable Diffusion (diffusers' AutoencoderKL), in NHWC."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models.attention import SpatialAttention
from jaxpref.models.config import ModelConfig
from jaxpref.models.resnet import (
  Downsample2D,
  GroupNorm,
  ResnetBlock2D,
  Upsample2D,
  conv1x1,
  conv3x3,
)

Dtype = Any
EPSILON = 1e-6  # in each normalisation; not in the config


@dataclasses.dataclass(frozen=True)
class VAEConfig(ModelConfig):
  """Fields of the vae/config.json of a diffusers folder."""

  CLASS_NAME: ClassVar[str] = "AutoencoderKL"
  FIXED: ClassVar[Mapping[str, Any]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
  }

  sample_size: int | tuple[int, int] = 32
  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  force_upcast: bool = True  # kept, not used: the caller chooses the compute dtype
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  def __post_init__(self):
    levels = len(self.block_out_channels)
    for key, known in (
      ("down_block_types", "DownEncoderBlock2D"),
      ("up_block_types", "UpDecoderBlock2D"),
    ):
      self._require(getattr(self, key) == (known,) * levels, key, f"{levels} times {known}")

  @property
  def downscale(self) -> int:
    """Pixels of the image, in height and width, in one position of the latents."""
    return 2 ** (len(self.block_out_channels) - 1)


def scale_latents(config: VAEConfig, latents: jax.Array) -> jax.Array:
  """Scales the output of `encode` to what the UNet is trained on (about unit variance)."""
  return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(config: VAEConfig, latents: jax.Array) -> jax.Array:
  """Scales what the UNet is trained on to the input of `decode`: the inverse of `scale_latents`."""
  return latents / config.scaling_factor + (config.shift_factor or 0.0)


def to_float(images: jax.Array) -> jax.Array:
  """Converts u8[..., 3] to f32[..., 3] in [-1, 1]; floating-point images pass unchanged."""
  if jnp.issubdtype(images.dtype, jnp.floating):
    return images
  # A table makes the numbers the same on every device: compilers divide in different ways.
  levels = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
  return jnp.asarray(levels)[images.astype(jnp.int32)]


def to_uint8(images: jax.Array) -> jax.Array:
  """Converts f32[..., 3] in [-1, 1] to u8, rounded and clipped as in diffusers."""
  return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


class _Block(nn.Module):
  """What the blocks share: how to make a residual block.

  Attributes:
    config: config of the whole network.
    channels: channels of the block's output.
  """

  config: VAEConfig
  channels: int
  dtype: Dtype = jnp.float32

  def resnet(self, i: int) -> ResnetBlock2D:
    groups = self.config.norm_num_groups
    return ResnetBlock2D(self.channels, groups, EPSILON, dtype=self.dtype, name=f"resnets.{i}")


class DownEncoderBlock2D(_Block):
  """Residual blocks, then a layer that halves the size."""

  downsample: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C_in] -> [B, H / 2, W / 2, C]
    for i in range(self.config.layers_per_block):
      x = self.resnet(i)(x)
    if self.downsample:
      x = Downsample2D(pad_before=0, dtype=self.dtype, name="downsamplers.0")(x)
    return x


class UpDecoderBlock2D(_Block):
  """Residual blocks, one more than in the encoder, then a layer that doubles the size."""

  upsample: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, C_in] -> [B, 2h, 2w, C]
    for i in range(self.config.layers_per_block + 1):
      x = self.resnet(i)(x)
    if self.upsample:
      x = Upsample2D(dtype=self.dtype, name="upsamplers.0")(x)
    return x


class MidBlock(_Block):
  """Two residual blocks with single-head self-attention over all positions between them."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, C] -> [B, h, w, C]
    x = self.resnet(0)(x)
    if self.config.mid_block_add_attention:
      groups = self.config.norm_num_groups
      x = SpatialAttention(1, True, self.dtype, groups, EPSILON, name="attentions.0")(x)
    return self.resnet(1)(x)


class Encoder(nn.Module):
  """Images to the moments of the latents, before quant_conv."""

  config: VAEConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, 3] -> [B, h, w, 2 latent_channels]
    c = self.config
    x = conv3x3(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
    for i, channels in enumerate(c.block_out_channels):
      downsample = i < len(c.block_out_channels) - 1
      x = DownEncoderBlock2D(c, channels, self.dtype, downsample, name=f"down_blocks.{i}")(x)
    x = MidBlock(c, c.block_out_channels[-1], self.dtype, name="mid_block")(x)
    x = GroupNorm(c.norm_num_groups, EPSILON, dtype=self.dtype, name="conv_norm_out")(x)
    return conv3x3(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))


class Decoder(nn.Module):
  """Latents to images, after post_quant_conv."""

  config: VAEConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, latent_channels] -> [B, H, W, 3]
    c = self.config
    x = conv3x3(c.block_out_channels[-1], dtype=self.dtype, name="conv_in")(x)
    x = MidBlock(c, c.block_out_channels[-1], self.dtype, name="mid_block")(x)
    for i, channels in enumerate(c.block_out_channels[::-1]):
      upsample = i < len(c.block_out_channels) - 1
      x = UpDecoderBlock2D(c, channels, self.dtype, upsample, name=f"up_blocks.{i}")(x)
    x = GroupNorm(c.norm_num_groups, EPSILON, dtype=self.dtype, name="conv_norm_out")(x)
    return conv3x3(c.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))


class AutoencoderKL(nn.Module):
  """The variational autoencoder; `apply(variables, x, method="encode")` or "decode".

  Attributes:
    config: the architecture.
    dtype: compute dtype; parameters, statistics of normalisations, softmax and outputs are float32.
  """

  config: VAEConfig
  dtype: Dtype = jnp.float32

  def setup(self):
    c = self.config
    self.encoder = Encoder(c, self.dtype)
    self.decoder = Decoder(c, self.dtype)
    if c.use_quant_conv:
      self.quant_conv = conv1x1(2 * c.latent_channels, dtype=self.dtype)
    if c.use_post_quant_conv:
      self.post_quant_conv = conv1x1(c.latent_channels, dtype=self.dtype)

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log variance of the normal distribution of an image's latents.

    Args:
      x: [B, H, W, in_channels] in [-1, 1].

    Returns:
      Mean and log variance (clamped to [-30, 20]), f32[B, h, w, latent_channels] each, not scaled
      by `scaling_factor`; h = H / 2^(levels - 1), rounded down at each level.

    Raises:
      ValueError: the input has another number of channels.
    """
    self._check_channels("image", x, self.config.in_channels)
    moments = self.encoder(x)
    if self.config.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: jax.Array) -> jax.Array:
    """Returns the image of latents.

    Args:
      z: [B, h, w, latent_channels], not scaled by `scaling_factor`.

    Returns:
      f32[B, H, W, out_channels], in [-1, 1] except for overshoot: clip before showing.

    Raises:
      ValueError: the input has another number of channels.
    """
    self._check_channels("latents", z, self.config.latent_channels)
    if self.config.use_post_quant_conv:
      z = self.post_quant_conv(z)
    return self.decoder(z).astype(jnp.float32)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the reconstruction from the mean, [B, H, W, in_channels] -> [B, H, W, out_channels]."""
    return self.decode(self.encode(x)[0])

  def _check_channels(self, what: str, x: jax.Array, channels: int) -> None:
    if x.ndim != 4 or x.shape[-1] != channels:
      raise ValueError(
        f"AutoencoderKL: {what} of the shape {x.shape}, expected [B, height, width, {channels}] (channels last)."
      )
