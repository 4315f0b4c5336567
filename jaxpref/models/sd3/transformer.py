"""The denoising transformer of Stable Diffusion 3 and 3.5 (MMDiT, arXiv 2403.03206; diffusers' SD3Transformer2DModel).

Channels are last. Image and text are two streams of tokens, each with its own weights, that attend to all tokens
together. Consecutive blocks of one kind are one scanned module (`models.stacks`): the blocks with a second attention
over the image alone (the first 13 of SD3.5-M), the plain ones, and the last, which ends the text's stream.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models.attention import attention
from jaxpref.models.config import ModelConfig
from jaxpref.models.resnet import dense, flat_dot_general
from jaxpref.models.stacks import stack_name
from jaxpref.models.unet import TimestepEmbedding, timestep_embedding

Dtype = Any

REMAT = ("none", "attention", "block", "full")
EPSILON = 1e-6  # in each normalisation; not in the config
TIME_WIDTH = 256  # of the sinusoidal embedding of the time; not in the config
# The layers that reinforcement learning on Stable Diffusion 3 adapts: both streams of the joint attention.
LORA_TARGETS = r"\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"


@dataclasses.dataclass(frozen=True)
class SD3TransformerConfig(ModelConfig):
  """Fields of the transformer/config.json of a Stable Diffusion 3 folder."""

  CLASS_NAME: ClassVar[str] = "SD3Transformer2DModel"

  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  num_layers: int = 18
  attention_head_dim: int = 64
  num_attention_heads: int = 18
  joint_attention_dim: int = 4096
  caption_projection_dim: int = 1152
  pooled_projection_dim: int = 2048
  out_channels: int | None = 16
  pos_embed_max_size: int | None = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: str | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int or field.name == "pos_embed_max_size":
        self._require(type(value) is int and value > 0, field.name, "a positive integer")
    self._require(self.out_channels is None or self.out_channels > 0, "out_channels", "a positive integer or null")
    self._require(self.width % 4 == 0, "attention_head_dim", "a width of all heads together that 4 divides")
    self._require(
      self.caption_projection_dim == self.width,
      "caption_projection_dim",
      f"{self.width}, num_attention_heads x attention_head_dim",
    )
    dual = self.dual_attention_layers
    self._require(
      isinstance(dual, tuple) and set(dual) <= set(range(self.num_layers)),
      "dual_attention_layers",
      f"a list of numbers of blocks from 0 to {self.num_layers - 1}",
    )
    self._require(self.qk_norm in (None, "rms_norm"), "qk_norm", "null or rms_norm")

  @property
  def width(self) -> int:
    """Channels of a token inside of the network."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def predicted_channels(self) -> int:
    """Channels of the prediction."""
    return self.in_channels if self.out_channels is None else self.out_channels

  def stacks(self) -> list[range]:
    """Returns the numbers of the blocks in runs of consecutive ones of the same kind."""
    kind = lambda i: (i in self.dual_attention_layers, i == self.num_layers - 1)
    runs = [list(run) for _, run in itertools.groupby(range(self.num_layers), kind)]
    return [range(run[0], run[-1] + 1) for run in runs]


def position_table(config: SD3TransformerConfig) -> np.ndarray:
  """Returns f32[pos_embed_max_size, width / 2], the sinusoids of one coordinate of patches, as diffusers makes them.

  A patch's embedding is that of its column beside that of its row.
  """
  size, half = config.pos_embed_max_size, config.width // 2
  assert size is not None
  base = config.sample_size // config.patch_size
  positions = np.arange(size, dtype=np.float32) / np.float32(size / base)
  angles = positions[:, None].astype(np.float64) / 10000 ** (np.arange(half // 2) / (half / 2))
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def constant_shapes(config: SD3TransformerConfig) -> dict[str, Any]:
  """Returns the tree of ShapeDtypeStructs of what files hold beside the parameters: the table of positions.

  It is never trained. Given as the collection "constants", it replaces the computed table.
  """
  assert config.pos_embed_max_size is not None
  shape = (1, config.pos_embed_max_size**2, config.width)
  return {"pos_embed": {"pos_embed": jax.ShapeDtypeStruct(shape, jnp.float32)}}


def _patch_product(x, kernel, *unused_args, **unused_kwargs) -> jax.Array:
  """Computes the convolution of patches side by side as a matrix product: [B,h,w,I], [p,p,I,O] -> [B,h/p,w/p,O]."""
  batch, height, width, channels = x.shape
  size = kernel.shape[0]
  x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(batch, height // size, width // size, size * size * channels)
  return flat_dot_general(x, kernel.reshape(-1, kernel.shape[-1]), (((3,), (0,)), ((), ())))


class PatchEmbed(nn.Module):
  """Projects patches and adds their positions, cut from the centre of a square of pos_embed_max_size patches."""

  config: SD3TransformerConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, sample: jax.Array) -> jax.Array:  # [B, h, w, C] -> [B, h/p * w/p, width]
    c = self.config
    most, patch = c.pos_embed_max_size, (c.patch_size, c.patch_size)
    assert most is not None
    proj = nn.Conv(c.width, patch, patch, "VALID", dtype=self.dtype, conv_general_dilated=_patch_product, name="proj")
    x = proj(sample)
    height, width = x.shape[1:3]
    if max(height, width) > most:
      raise ValueError(
        f"SD3Transformer2DModel: a sample of {height} x {width} patches, expected at most {most} on a side"
        " (pos_embed_max_size); choose smaller images."
      )
    rows, columns = ((most - n) // 2 for n in (height, width))
    if self.has_variable("constants", "pos_embed"):
      table = self.get_variable("constants", "pos_embed").reshape(most, most, c.width)
      positions = jax.lax.stop_gradient(table[rows : rows + height, columns : columns + width])
    else:
      table = position_table(c)
      shape = (height, width, c.width // 2)
      parts = (table[columns : columns + width][None, :, :], table[rows : rows + height][:, None, :])
      positions = jnp.concatenate([jnp.broadcast_to(part, shape) for part in parts], axis=-1)
    x = x.astype(jnp.float32) + positions.astype(jnp.float32)[None]
    return x.reshape(x.shape[0], height * width, c.width).astype(self.dtype)


class TimeTextEmbedding(nn.Module):
  """What modulates each block: the sum of embeddings of the time and of the pooled text."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, timesteps: jax.Array, pooled: jax.Array) -> jax.Array:  # [B], [B, P] -> [B, width]
    sinusoid = timestep_embedding(timesteps, TIME_WIDTH, flip_sin_to_cos=True, freq_shift=0)
    time = TimestepEmbedding(self.width, dtype=self.dtype, name="timestep_embedder")(sinusoid)
    return time + TimestepEmbedding(self.width, dtype=self.dtype, name="text_embedder")(pooled)


def _norm(x: jax.Array, dtype: Dtype) -> jax.Array:
  """Returns the layer normalisation without parameters; statistics are float32."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)).astype(dtype)


class Modulation(nn.Module):
  """Maps the conditioning [B, C] to `chunks` vectors [B, 1, C], `Linear(SiLU(temb))`."""

  chunks: int
  dtype: Dtype = jnp.float32
  tensor_axis: int | None = 1

  @nn.compact
  def __call__(self, temb: jax.Array) -> list[jax.Array]:
    features = self.chunks * temb.shape[-1]
    y = dense(features, dtype=self.dtype, name="linear", tensor_axis=self.tensor_axis)(nn.silu(temb))
    return jnp.split(y[:, None, :], self.chunks, axis=-1)


def _modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  return x * (1 + scale) + shift


class JointAttention(nn.Module):
  """Multi-head attention over the image's tokens and, if they are given, the text's behind them.

  Attributes:
    num_heads: heads.
    qk_norm: whether queries and keys are normalised (RMSNorm over each head).
    context_pre_only: whether the text's output is not needed.
  """

  num_heads: int
  qk_norm: bool = False
  context_pre_only: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """Maps x [B, L, C] and context [B, S, C] to outputs of the same shapes; None for a text without one."""
    channels = x.shape[-1]

    def heads(tokens, name, norm=None):
      y = dense(channels, dtype=self.dtype, name=name, tensor_axis=1)(tokens)
      y = y.reshape(*y.shape[:2], self.num_heads, channels // self.num_heads)
      return nn.RMSNorm(EPSILON, dtype=self.dtype, name=norm)(y) if norm and self.qk_norm else y

    qkv = [heads(x, "to_q", "norm_q"), heads(x, "to_k", "norm_k"), heads(x, "to_v")]
    if context is not None:
      added = [
        heads(context, "add_q_proj", "norm_added_q"),
        heads(context, "add_k_proj", "norm_added_k"),
        heads(context, "add_v_proj"),
      ]
      qkv = [jnp.concatenate(pair, axis=1) for pair in zip(qkv, added, strict=True)]
    y = attention(*qkv)
    y = y.reshape(*y.shape[:2], channels)
    out = dense(channels, dtype=self.dtype, name="to_out.0", tensor_axis=0)(y[:, : x.shape[1]])
    if context is None or self.context_pre_only:
      return out, None
    return out, dense(channels, dtype=self.dtype, name="to_add_out", tensor_axis=0)(y[:, x.shape[1] :])


class _GELU(nn.Module):
  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.gelu(dense(self.width, dtype=self.dtype, name="proj", tensor_axis=1)(x), approximate=True)


class FeedForward(nn.Module):
  """Two dense layers, four times as wide between, with the tanh form of GELU (net.1 is diffusers' dropout)."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = _GELU(4 * x.shape[-1], dtype=self.dtype, name="net.0")(x)
    return dense(x.shape[-1], dtype=self.dtype, name="net.2", tensor_axis=0)(y)


class JointTransformerBlock(nn.Module):
  """Joint attention and a feed-forward for each stream, modulated by the conditioning (AdaLN-Zero).

  Attributes:
    num_heads: heads of each attention.
    qk_norm: see `JointAttention`.
    dual: whether the image also attends to itself alone.
    last: whether the text's stream ends here.
    remat_attention: whether the backward pass recomputes the inside of each attention.
  """

  num_heads: int
  qk_norm: bool
  dual: bool
  last: bool
  dtype: Dtype = jnp.float32
  remat_attention: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array, temb: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps x [B, L, C], context [B, S, C] and temb [B, C] to the next x and context; the last keeps the context."""
    kind = nn.remat(JointAttention) if self.remat_attention else JointAttention
    attend = functools.partial(kind, self.num_heads, self.qk_norm, dtype=self.dtype)
    norm = functools.partial(_norm, dtype=self.dtype)

    modulation = Modulation(9 if self.dual else 6, self.dtype, name="norm1")(temb)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = modulation
    of_context = Modulation(2 if self.last else 6, self.dtype, name="norm1_context")(temb)
    # The last block's two are in the other order: scale, then shift.
    c_shift, c_scale, *c_rest = of_context[::-1] if self.last else of_context

    normed = norm(x)
    y, c_y = attend(context_pre_only=self.last, name="attn")(
      _modulated(normed, shift, scale), _modulated(norm(context), c_shift, c_scale)
    )
    x = x + gate * y
    if self.dual:
      shift_2, scale_2, gate_2 = second
      x = x + gate_2 * attend(name="attn2")(_modulated(normed, shift_2, scale_2))[0]
    x = x + gate_mlp * FeedForward(self.dtype, name="ff")(_modulated(norm(x), shift_mlp, scale_mlp))
    if self.last:
      return x, context
    c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_rest
    context = context + c_gate * c_y
    y = FeedForward(self.dtype, name="ff_context")(_modulated(norm(context), c_shift_mlp, c_scale_mlp))
    return x, context + c_gate_mlp * y


class SD3Transformer2DModel(nn.Module):
  """Predicts the velocity (noise - image) from noisy latents, time and text.

  Attributes:
    config: the architecture.
    dtype: compute dtype; parameters, statistics of normalisations, softmax and output are float32.
    remat: what a backward pass recomputes instead of keeping it from the forward pass. "none": nothing. "attention":
      the inside of each attention (projections, logits). "block": the inside of each block, so only their inputs are
      kept. "full": all of a run of blocks of one kind, so only its input is kept (and, while its backward pass runs,
      what "block" keeps of it).
  """

  config: SD3TransformerConfig
  dtype: Dtype = jnp.float32
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    sample: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array,
  ) -> jax.Array:
    """Applies the network.

    Args:
      sample: [B, h, w, in_channels] noisy latents; patch_size divides h and w.
      timesteps: [B], 1000 sigma, from 0 (image) to 1000 (noise).
      encoder_hidden_states: [B, S, joint_attention_dim] tokens of the text.
      pooled_projections: [B, pooled_projection_dim].

    Returns:
      f32[B, h, w, out_channels], the velocity.

    Raises:
      ValueError: an input does not fit the config, or `remat` is unknown.
    """
    c = self.config
    if self.remat not in REMAT:
      raise ValueError(f"SD3Transformer2DModel: remat={self.remat!r}, expected one of {', '.join(REMAT)}.")
    self._check_inputs(sample, encoder_hidden_states, pooled_projections)
    x = PatchEmbed(c, self.dtype, name="pos_embed")(sample)
    temb = TimeTextEmbedding(c.width, self.dtype, name="time_text_embed")(timesteps, pooled_projections)
    context = dense(c.width, dtype=self.dtype, name="context_embedder")(encoder_hidden_states)
    for layers in c.stacks():
      x, context = self._run(layers, x, context, temb)
    scale, shift = Modulation(2, self.dtype, tensor_axis=None, name="norm_out")(temb)
    x = _modulated(_norm(x, self.dtype), shift, scale)
    x = dense(c.patch_size**2 * c.predicted_channels, dtype=self.dtype, name="proj_out")(x)
    return self._unpatched(x, sample.shape).astype(jnp.float32)

  def _run(self, layers: range, x: jax.Array, context: jax.Array, temb: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Applies blocks of one kind, one after the other."""
    c = self.config
    kind = nn.remat(JointTransformerBlock) if self.remat in ("block", "full") else JointTransformerBlock
    make = functools.partial(
      kind,
      c.num_attention_heads,
      c.qk_norm is not None,
      layers[0] in c.dual_attention_layers,
      layers[-1] == c.num_layers - 1,
      dtype=self.dtype,
      remat_attention=self.remat == "attention",
    )
    if len(layers) == 1:
      return make(name=f"transformer_blocks.{layers[0]}")(x, context, temb)
    # One body, compiled once; its parameters have a leading axis of blocks.
    stack = nn.scan(
      lambda block, streams, temb: (block(*streams, temb), None),
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=len(layers),
    )
    apply = lambda block, streams, temb: stack(block, streams, temb)[0]
    if self.remat == "full":
      apply = nn.remat(apply)
    return apply(make(name=stack_name("transformer_blocks", layers)), (x, context), temb)

  def _unpatched(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size, channels = self.config.patch_size, self.config.predicted_channels
    batch, height, width, _ = shape
    x = x.reshape(batch, height // size, width // size, size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, channels)

  def _check_inputs(self, sample, encoder_hidden_states, pooled_projections) -> None:
    c = self.config
    if sample.ndim != 4 or sample.shape[-1] != c.in_channels or any(n % c.patch_size for n in sample.shape[1:3]):
      raise ValueError(
        f"SD3Transformer2DModel: sample has the shape {sample.shape}, expected [B, h, w, {c.in_channels}] (channels"
        f" last) with h and w that {c.patch_size} divides (patch_size)."
      )
    for name, array, expected in (
      ("encoder_hidden_states", encoder_hidden_states, ("B", "S", c.joint_attention_dim)),
      ("pooled_projections", pooled_projections, ("B", c.pooled_projection_dim)),
    ):
      if array.ndim != len(expected) or array.shape[-1] != expected[-1]:
        shape = ", ".join(map(str, expected))
        raise ValueError(
          f"SD3Transformer2DModel: {name} has the shape {array.shape}, expected [{shape}]; use the text encoders of"
          " this folder."
        )


def split_constants(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits the content of a file into parameters and constants (see `constant_shapes`)."""
  inner = dict(tree["pos_embed"])
  table = inner.pop("pos_embed")
  return {**tree, "pos_embed": inner}, {"pos_embed": {"pos_embed": table}}


def join_constants(params: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the content of a file, the inverse of `split_constants`."""
  return {**params, "pos_embed": {**params["pos_embed"], **constants["pos_embed"]}}
