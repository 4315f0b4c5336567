"""The encoder of T5 (arXiv 1910.10683) and T5 1.1, computed and named as transformers' T5EncoderModel.

All blocks are one scanned module (`models.stacks`). The bias of relative positions belongs to block 0 in files; all
blocks share it. There is no mask: diffusion models condition on the embeddings of the padding, too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models.attention import attention
from jaxpref.models.config import check_types
from jaxpref.models.resnet import dense
from jaxpref.models.stacks import stack_name

Dtype = Any

_FEED_FORWARDS = ("relu", "gated-gelu")
# Keys of a T5 config.json that are no sizes, with the value that is implemented.
_FIXED: dict[str, Any] = {"model_type": "t5", "is_decoder": False}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Fields of a transformers `T5Config`, with its defaults; those of the decoder are ignored.

  `feed_forward_proj` is "relu" (T5) or "gated-gelu" (T5 1.1), where gelu is the tanh form.
  """

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  initializer_factor: float = 1.0
  feed_forward_proj: str = "relu"
  pad_token_id: int = 0
  eos_token_id: int = 1

  def __post_init__(self):
    if self.feed_forward_proj not in _FEED_FORWARDS:
      raise ValueError(
        f"T5Config: feed_forward_proj={self.feed_forward_proj!r} is not implemented, expected one of"
        f" {', '.join(_FEED_FORWARDS)}; choose a T5 or T5 1.1 model."
      )
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    for field in sizes:
      if type(getattr(self, field)) is not int or getattr(self, field) < 1:
        raise ValueError(f"T5Config: {field}={getattr(self, field)!r}, expected a positive integer.")
    buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
    if buckets < 4 or buckets % 2 or distance <= buckets // 4:
      raise ValueError(
        f"T5Config: relative_attention_num_buckets={buckets} and relative_attention_max_distance={distance}, expected"
        " an even number of buckets of at least 4 and a distance above a quarter of it."
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
    """Reads the dict of a config.json; raises ValueError for another network than a T5 encoder."""
    for key, value in _FIXED.items():
      if config.get(key) not in (None, value):
        raise ValueError(f"T5Config: {key}={config[key]!r} is not implemented, expected {value!r}.")
    known = {field.name for field in dataclasses.fields(cls)}
    given = {key: value for key, value in config.items() if key in known and value is not None}
    check_types(cls, given)
    return cls(**given)

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json; the caller adds `architectures`."""
    # transformers takes `tie_word_embeddings` false for the mark of T5 1.1.
    return {
      "model_type": "t5",
      "is_encoder_decoder": False,
      "use_cache": False,
      "tie_word_embeddings": self.feed_forward_proj == "relu",
      **dataclasses.asdict(self),
    }


def init_std(config: T5Config, name: str) -> float:
  """Returns the standard deviation at initialisation of the layer or embedding `name`, as in transformers."""
  stds = {
    "shared": 1.0,
    "q": (config.d_model * config.d_kv) ** -0.5,
    "k": config.d_model**-0.5,
    "v": config.d_model**-0.5,
    "o": (config.num_heads * config.d_kv) ** -0.5,
    "relative_attention_bias": config.d_model**-0.5,
    "wi": config.d_model**-0.5,
    "wi_0": config.d_model**-0.5,
    "wi_1": config.d_model**-0.5,
    "wo": config.d_ff**-0.5,
  }
  return config.initializer_factor * stds[name]


def _init(config: T5Config, name: str) -> nn.initializers.Initializer:
  return nn.initializers.normal(init_std(config, name))


def relative_buckets(length: int, *, num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns i32[length, length], the bucket of each key's position relative to each query's.

  Half of the buckets are for keys behind the query. In each half the first ones are exact, the others logarithmic up
  to `max_distance`.
  """
  relative = np.arange(length)[None, :] - np.arange(length)[:, None]
  half, exact = num_buckets // 2, num_buckets // 4
  distance = np.abs(relative)
  # In float32, as in transformers: at powers of the base the rounding decides.
  logarithm = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  far = exact + (logarithm / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
  return (bucket + half * (relative > 0)).astype(np.int32)


class _Norm(nn.Module):
  """RMSNorm in float32, returned in the dtype of the computation."""

  epsilon: float
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
    return (y * scale[None, None]).astype(self.dtype)


class T5Attention(nn.Module):
  """Self-attention with a bias of relative positions and without a scale of the logits."""

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:  # [B, L, D], f32[1, H, L, L] -> [B, L, D]
    c = self.config

    def heads(name):
      y = dense(
        c.num_heads * c.d_kv, use_bias=False, dtype=self.dtype, name=name, kernel_init=_init(c, name), tensor_axis=1
      )(x)
      return y.reshape(*y.shape[:2], c.num_heads, c.d_kv)

    y = attention(heads("q"), heads("k"), heads("v"), bias=bias, scale=1.0)
    y = y.reshape(*y.shape[:2], c.num_heads * c.d_kv)
    return dense(c.d_model, use_bias=False, dtype=self.dtype, name="o", kernel_init=_init(c, "o"), tensor_axis=0)(y)


class T5FeedForward(nn.Module):
  """Two dense layers with relu between, or with gelu of one times another (T5 1.1)."""

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config

    def wide(name):
      init = _init(c, name)
      return dense(c.d_ff, use_bias=False, dtype=self.dtype, name=name, kernel_init=init, tensor_axis=1)(x)

    y = nn.relu(wide("wi")) if c.feed_forward_proj == "relu" else nn.gelu(wide("wi_0"), approximate=True) * wide("wi_1")
    return dense(c.d_model, use_bias=False, dtype=self.dtype, name="wo", kernel_init=_init(c, "wo"), tensor_axis=0)(y)


class T5Block(nn.Module):
  """Self-attention and feed-forward, each normalised first and added to its input."""

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    norm = lambda name: _Norm(self.config.layer_norm_epsilon, self.dtype, name=name)
    x = x + T5Attention(self.config, self.dtype, name="layer.0.SelfAttention")(norm("layer.0.layer_norm")(x), bias)
    feed_forward = T5FeedForward(self.config, self.dtype, name="layer.1.DenseReluDense")
    return x + feed_forward(norm("layer.1.layer_norm")(x))


class T5Stack(nn.Module):
  """The blocks and the final norm."""

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    buckets = relative_buckets(
      x.shape[1], num_buckets=c.relative_attention_num_buckets, max_distance=c.relative_attention_max_distance
    )
    bias_LxLxH = nn.Embed(
      c.relative_attention_num_buckets,
      c.num_heads,
      embedding_init=_init(c, "relative_attention_bias"),
      name="block.0.layer.0.SelfAttention.relative_attention_bias",
    )(jnp.asarray(buckets))
    bias = bias_LxLxH.transpose(2, 0, 1)[None].astype(jnp.float32)
    stack = nn.scan(
      lambda block, x, bias: (block(x, bias), None),
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.num_layers,
    )
    x, _ = stack(T5Block(c, self.dtype, name=stack_name("block", range(c.num_layers))), x, bias)
    return _Norm(c.layer_norm_epsilon, self.dtype, name="final_layer_norm")(x)


class T5EncoderModel(nn.Module):
  """Text encoder of a diffusion pipeline.

  Attributes:
    config: sizes and feed-forward.
    dtype: compute dtype; parameters are float32, norms, logits and softmax run in float32. Published models overflow
      in float16.
  """

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: jax.Array) -> jax.Array:
    """Encodes token ids i32[B, L] of any length to [B, L, d_model], after the final norm."""
    c = self.config
    embed = nn.Embed(c.vocab_size, c.d_model, embedding_init=_init(c, "shared"), dtype=self.dtype, name="shared")
    return T5Stack(c, self.dtype, name="encoder")(embed(input_ids))
