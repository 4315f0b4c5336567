"""Convolutional blocks that the UNet and the VAE share: NHWC, named as in diffusers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.devices.sharding import apply_gathered

Dtype = Any


class GroupNorm(nn.Module):
  """Group normalisation over all axes but the first and the channels, statistics in float32.

  Sums over positions are taken channel by channel and only then joined to groups, so that no
  array is ever reshaped to [..., groups, channels / groups]: several times faster on a CPU.

  For half-precision inputs the variance is E[x^2] - E[x]^2, computed in one pass: a GPU then reads x twice and writes
  the result, where it otherwise also writes x - E[x] in float32 and reads that twice (docs/results/benchmarks.md). The
  cancellation loses less than rounding x to half precision has already lost.
  """

  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, ..., C] -> [B, ..., C]
    batch, channels = x.shape[0], x.shape[-1]
    if channels % self.num_groups:
      raise ValueError(
        f"GroupNorm at {'.'.join(self.path)}: {channels} channels cannot be divided in"
        f" {self.num_groups} groups; choose norm_num_groups that divides every channel count."
      )
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    positions = tuple(range(1, x.ndim - 1))
    broadcast = (batch,) + (1,) * len(positions) + (channels,)

    def group_mean(x_BxC):
      size = channels // self.num_groups
      mean_BxG = x_BxC.reshape(batch, self.num_groups, size).mean(-1)
      return jnp.repeat(mean_BxG, size, axis=-1)

    one_pass, x = x.dtype != jnp.float32, x.astype(jnp.float32)
    mean_BxC = group_mean(x.mean(positions))
    if one_pass:
      var_BxC = jnp.maximum(group_mean(jnp.square(x).mean(positions)) - jnp.square(mean_BxC), 0.0)
    else:
      x = x - mean_BxC.reshape(broadcast)
      var_BxC = group_mean(jnp.square(x).mean(positions))
    gain_BxC = jax.lax.rsqrt(var_BxC + self.epsilon) * scale[None]
    if one_pass:
      shift_BxC = bias[None] - mean_BxC * gain_BxC
      y = x * gain_BxC.reshape(broadcast) + shift_BxC.reshape(broadcast)
    else:
      y = x * gain_BxC.reshape(broadcast) + bias.reshape((1,) * (x.ndim - 1) + (channels,))
    return y.astype(self.dtype)


def flat_dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, *, tensor_axis=None, **kwargs) -> jax.Array:
  """Computes `jax.lax.dot_general` of a Dense layer with all leading axes of x merged into one.

  The numbers are the same. But the gradient of the kernel then contracts one axis instead of several, which XLA turns
  into one matrix product instead of transposed copies: the backward pass of a layer on [B, L, C] takes a third of the
  time on a CPU.
  """
  assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers

  def product(x, kernel):
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kwargs)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])

  return apply_gathered(product, x, kernel, tensor_axis)


def dense(features: int, *, dtype: Dtype, name: str, tensor_axis: int | None = None, **kwargs: Any) -> nn.Dense:
  """Returns a Dense layer on the last of any number of axes (see `flat_dot_general`).

  Args:
    tensor_axis: the kernel's axis that `sharding.DEFAULT_RULES` split over `tensor`: 1, the features out, for layers
      that open an attention or a feed-forward; 0, the features in, for layers that close it; None for others.
    **kwargs: other arguments of `nn.Dense`.
  """
  product = functools.partial(flat_dot_general, tensor_axis=tensor_axis)
  return nn.Dense(features, dtype=dtype, dot_general=product, name=name, **kwargs)


def _product_1x1(x, kernel, *unused_args, **unused_kwargs) -> jax.Array:
  return flat_dot_general(x, kernel[0, 0], (((x.ndim - 1,), (0,)), ((), ())))


def conv1x1(channels: int, *, dtype: Dtype, name: str | None = None) -> nn.Conv:
  """Returns the 1x1 convolution, computed as a matrix product (see `flat_dot_general`)."""
  return nn.Conv(channels, (1, 1), dtype=dtype, conv_general_dilated=_product_1x1, name=name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, pad: tuple[int, int]) -> jax.Array:
  """Returns the convolution x [B,H,W,I] * kernel [3,3,I,O], with the same stride and padding in height and width.

  It has its own gradient, because XLA rewrites convolutions for its fast path on CPUs only outside loops and branches:
  inside, as in SPO's loop over updates, the gradient as `jax.grad` writes it takes ten times as long.
  """
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=_NHWC)


def _conv_forward(x, kernel, stride, pad):
  return _conv(x, kernel, stride, pad), (x, kernel)


def _conv_backward(stride, pad, residuals, g):
  def plain(x, kernel, g):
    def conv(x, kernel):
      return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=_NHWC)

    (dx,) = jax.linear_transpose(lambda x: conv(x, kernel), x)(g)
    (dkernel,) = jax.linear_transpose(lambda kernel: conv(x, kernel), kernel)(g)
    return dx, dkernel

  def canonical(x, kernel, g):
    """Computes the same two convolutions, in NHWC and HWIO by explicit transposition."""
    size, before, last = kernel.shape[0], pad[0], [(n - 1) * stride for n in g.shape[1:3]]
    dx = jax.lax.conv_general_dilated(
      g,
      kernel[::-1, ::-1].swapaxes(2, 3),
      (1, 1),
      [(size - 1 - before, n - 1 - end + before) for n, end in zip(x.shape[1:3], last, strict=True)],
      lhs_dilation=(stride, stride),
      dimension_numbers=_NHWC,
    )
    dkernel_IxHxWxO = jax.lax.conv_general_dilated(
      x.transpose(3, 1, 2, 0),
      g.transpose(1, 2, 0, 3),
      (1, 1),
      [(before, size + end - n - before) for n, end in zip(x.shape[1:3], last, strict=True)],
      rhs_dilation=(stride, stride),
      dimension_numbers=_NHWC,
    )
    return dx, dkernel_IxHxWxO.transpose(1, 2, 0, 3)

  return jax.lax.platform_dependent(*residuals, g, cpu=canonical, default=plain)


_conv.defvjp(_conv_forward, _conv_backward)
_NHWC = ("NHWC", "HWIO", "NHWC")


def _conv_of_layer(x, kernel, strides, padding, **unused_kwargs) -> jax.Array:
  product = functools.partial(_conv, stride=strides[0], pad=tuple(padding[0]))
  return apply_gathered(product, x, kernel)


def conv3x3(channels: int, *, dtype: Dtype, name: str) -> nn.Conv:
  """Returns the 3x3 convolution that keeps the size."""
  return nn.Conv(
    channels, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, conv_general_dilated=_conv_of_layer, name=name
  )


class ResnetBlock2D(nn.Module):
  """norm, silu, conv (+ time), norm, silu, conv, plus the input (by a 1x1 conv if it is wider)."""

  channels: int
  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
    """Applies the block.

    Args:
      x: [B, h, w, C_in].
      temb: [B, T] time embedding before its activation, or None (VAE).

    Returns:
      [B, h, w, channels].
    """
    norm = dict(num_groups=self.num_groups, epsilon=self.epsilon, dtype=self.dtype)
    h = nn.silu(GroupNorm(**norm, name="norm1")(x))
    h = conv3x3(self.channels, dtype=self.dtype, name="conv1")(h)
    if temb is not None:
      time_BxC = dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))
      h = h + time_BxC[:, None, None, :]
    h = nn.silu(GroupNorm(**norm, name="norm2")(h))
    h = conv3x3(self.channels, dtype=self.dtype, name="conv2")(h)
    if x.shape[-1] != self.channels:
      x = conv1x1(self.channels, dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class Downsample2D(nn.Module):
  """Halves height and width by a strided 3x3 convolution.

  Attributes:
    pad_before: 1 in the UNet (symmetric); 0 in the VAE, which only pads below and to the right.
  """

  pad_before: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    pad = (self.pad_before, 1)
    conv = nn.Conv(
      x.shape[-1], (3, 3), (2, 2), (pad, pad), dtype=self.dtype, conv_general_dilated=_conv_of_layer, name="conv"
    )
    return conv(x)


class Upsample2D(nn.Module):
  """Doubles height and width (nearest neighbour), then a 3x3 convolution."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Applies the layer.

    Args:
      x: [B, h, w, C].
      size: height and width to return, if not the double: 2h or 2h - 1 and 2w or 2w - 1. Cropping is then exactly
        torch's nearest resize, whose source index is floor(i h / (2h - 1)).

    Returns:
      [B, size[0], size[1], C].
    """
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    if size is not None:
      x = x[:, : size[0], : size[1]]
    return conv3x3(channels, dtype=self.dtype, name="conv")(x)
