"""Attention and the transformer of the UNet's cross-attention blocks, named as in diffusers."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models.resnet import GroupNorm, conv1x1, dense

Dtype = Any


# Logits of one example, in bytes, above which attention takes the queries in pieces.
MAX_LOGITS = 48 * 2**20


Implementation = Literal["xla", "chunked", "cudnn"]


def choose(length: int, keys: int, heads: int, width: int, dtype: Dtype, *, masked: bool = False) -> Implementation:
  """Returns the implementation that `attention` chooses.

  It depends on the size of an example's logits, whatever the batch: "xla" up to MAX_LOGITS. Beyond it and without a
  mask, "cudnn" on a GPU that can (half precision, heads of at most 128 and a multiple of 8), else "chunked".
  """
  if masked or _logits(length, keys, heads) <= MAX_LOGITS:
    return "xla"
  half = dtype in (jnp.bfloat16, jnp.float16) and width <= 128 and width % 8 == 0
  return "cudnn" if half and (cuda_capability() or 0.0) >= 8.0 else "chunked"


def _logits(length: int, keys: int, heads: int) -> int:
  """Returns the bytes of an example's logits."""
  return 4 * length * keys * heads


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None = None,
  *,
  bias: jax.Array | None = None,
  scale: float | None = None,
  implementation: Implementation | None = None,
) -> jax.Array:
  """Returns softmax(scale q k^T + bias) v. All attention of all networks passes here.

  Args:
    q: [B, L, H, D].
    k: [B, S, H, D].
    v: [B, S, H, D].
    mask: bool, broadcastable to [B, H, L, S]; True where a query may look. None: everywhere.
    bias: added to the logits, broadcastable to [B, H, L, S]; None for 0.
    scale: factor on the products; None for 1 / sqrt(D).
    implementation: "xla" and "cudnn" are those of `jax.nn.dot_product_attention`; "chunked" never holds the logits of
      more than a piece of the queries, not even in the backward pass. Logits and softmax are float32 in all of them.
      None uses what `choose` returns.

  Returns:
    [B, L, H, D] in the dtype of q.
  """
  _, length, heads, width = q.shape
  if implementation is None:
    implementation = choose(length, k.shape[1], heads, width, q.dtype, masked=mask is not None or bias is not None)
  if implementation == "chunked":
    assert mask is None and bias is None and scale is None
    return _chunked_attention(q, k, v, chunks=-(-_logits(length, k.shape[1], heads) // MAX_LOGITS))
  return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation=implementation)


@functools.cache
def cuda_capability() -> float | None:
  """Returns the compute capability of this machine's NVIDIA GPUs; None if there are none."""
  if jax.default_backend() != "gpu":
    return None
  capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # AMD's GPUs have a name here
  return float(capability) if capability.replace(".", "", 1).isdigit() else None


def _chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, chunks: int) -> jax.Array:
  """Returns `attention` with the queries in at least `chunks` equal pieces, one after the other."""
  batch, length, heads, width = q.shape
  size = -(-length // chunks)
  size = next((s for s in range(size, size // 2, -1) if length % s == 0), size)  # otherwise the last piece is padded
  pad = -length % size
  pieces = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(batch, -1, size, heads, width).swapaxes(0, 1)
  # Their gradients are sums over the pieces, computed in float32.
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)

  @jax.checkpoint
  def attend(piece):
    return jax.nn.dot_product_attention(piece, k.astype(q.dtype), v.astype(q.dtype), implementation="xla")

  y = jax.lax.map(attend, pieces).swapaxes(0, 1).reshape(batch, length + pad, heads, width)
  return y[:, :length]


class Attention(nn.Module):
  """Multi-head attention whose projections are Dense layers, so that LoRA can attach to each."""

  num_heads: int
  qkv_bias: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    """Applies the layer.

    Args:
      x: [B, L, C].
      context: [B, S, E] to attend to, or None for self-attention.

    Returns:
      [B, L, C].
    """
    return self._attend(x, x if context is None else context)

  def _attend(self, x, context):
    channels = x.shape[-1]

    def heads(name, x):
      y = dense(channels, use_bias=self.qkv_bias, dtype=self.dtype, name=name, tensor_axis=1)(x)
      return y.reshape(*y.shape[:2], self.num_heads, channels // self.num_heads)

    y_BxLxHxD = attention(heads("to_q", x), heads("to_k", context), heads("to_v", context))
    return dense(channels, dtype=self.dtype, name="to_out.0", tensor_axis=0)(y_BxLxHxD.reshape(x.shape))


class SpatialAttention(Attention):
  """Self-attention over the positions of a normalised feature map, added to it (VAE)."""

  num_groups: int = 32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, C] -> [B, h, w, C]
    y = GroupNorm(self.num_groups, self.epsilon, dtype=self.dtype, name="group_norm")(x)
    y = y.reshape(x.shape[0], -1, x.shape[-1])
    return x + self._attend(y, y).reshape(x.shape)


class GEGLU(nn.Module):
  """x W_1 * gelu(x W_2) (arXiv 2002.05202), both products in one layer; gelu is exact."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = dense(2 * self.width, dtype=self.dtype, name="proj", tensor_axis=1)(x)
    return _geglu(y)


def _gated(x: jax.Array, gate: jax.Array) -> jax.Array:
  # With erf, as in torch: `nn.gelu` uses erfc, whose gradient is several times slower on a CPU.
  return x * gate * (0.5 + 0.5 * jax.lax.erf(gate * 0.5**0.5))


@jax.custom_vjp
def _geglu(y: jax.Array) -> jax.Array:
  """Maps [..., 2 C] to [..., C]. The gradient is that of jax.grad, but written only once: see `_geglu_backward`."""
  return _gated(*jnp.split(y, 2, axis=-1))


def _geglu_backward(y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  _, gradient = jax.vjp(_gated, *jnp.split(y, 2, axis=-1))
  # Without the barrier XLA writes both halves, and then again as one array for each of the two products that follow.
  return (jax.lax.optimization_barrier(jnp.concatenate(gradient(g), axis=-1)),)


_geglu.defvjp(lambda y: (_geglu(y), y), _geglu_backward)


class FeedForward(nn.Module):
  """GEGLU of four times the width and a projection back (net.1 is diffusers' dropout)."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net.0")(x)
    return dense(x.shape[-1], dtype=self.dtype, name="net.2", tensor_axis=0)(y)


class BasicTransformerBlock(nn.Module):
  """Self-attention, cross-attention and feed-forward, each normalised first and added to its input."""

  num_heads: int
  dtype: Dtype = jnp.float32
  remat_attention: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """Maps [B, L, C] and context [B, S, E] to [B, L, C]."""

    def norm(name):  # Flax computes the statistics in float32 whatever the dtype.
      return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=name)

    attend = nn.remat(Attention) if self.remat_attention else Attention
    x = x + attend(self.num_heads, dtype=self.dtype, name="attn1")(norm("norm1")(x))
    x = x + attend(self.num_heads, dtype=self.dtype, name="attn2")(norm("norm2")(x), context)
    return x + FeedForward(dtype=self.dtype, name="ff")(norm("norm3")(x))


class Transformer2DModel(nn.Module):
  """A stack of transformer blocks over the positions of a feature map.

  Attributes:
    num_heads: heads of each attention.
    depth: number of blocks.
    linear_projection: whether the projections in and out are Dense layers (SD 2, SDXL) or 1x1 convolutions (SD 1); the
      function is the same, the shape of the parameters differs.
    num_groups: groups of the normalisation.
    remat: what the backward pass recomputes instead of keeping: "none", "attention" (the inside of each attention) or
      "block" (the inside of each transformer block).
  """

  num_heads: int
  depth: int
  linear_projection: bool
  num_groups: int
  dtype: Dtype = jnp.float32
  remat: str = "none"

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """Maps [B, h, w, C] and context [B, S, E] to [B, h, w, C]."""
    batch, height, width, channels = x.shape

    def projection(name, y):
      if self.linear_projection:
        return dense(channels, dtype=self.dtype, name=name)(y)
      return conv1x1(channels, dtype=self.dtype, name=name)(y)

    y = GroupNorm(self.num_groups, 1e-6, dtype=self.dtype, name="norm")(x)
    y = projection("proj_in", y).reshape(batch, height * width, channels)
    block = nn.remat(BasicTransformerBlock) if self.remat == "block" else BasicTransformerBlock
    arguments = dict(remat_attention=self.remat == "attention", dtype=self.dtype)
    if self.depth == 1:
      y = block(self.num_heads, **arguments, name="transformer_blocks.0")(y, context)
    elif self.depth > 1:  # One body, compiled once; its parameters have a leading axis of blocks.
      stack = nn.scan(
        lambda block, y, context: (block(y, context), None),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=self.depth,
      )
      y, _ = stack(block(self.num_heads, **arguments, name="transformer_blocks"), y, context)
    return x + projection("proj_out", y.reshape(x.shape))
