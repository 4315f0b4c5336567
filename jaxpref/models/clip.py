"""CLIP text and vision towers (arXiv 2103.00020), named and computed as in transformers.

Parameters carry the torch names: `{"text_model": {"encoder": {"layers.0": {"self_attn": ...}}}}`
is `text_model.encoder.layers.0.self_attn...` in a safetensors file. The vision blocks can take a
time condition (`time_conditioned=True`), which `jaxpref.models.preference` uses; without it they
are plain CLIP.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpref.models.attention import attention
from jaxpref.models.config import check_types
from jaxpref.models.resnet import dense

Array = jax.Array

# Activations that a CLIP config.json may name. "gelu" is the exact one.
_ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def _read_config(cls: type, config: Mapping[str, Any], model_types: tuple[str, ...]) -> dict:
  """Returns the fields of `cls` found in a config.json dict; raises for what this module does not implement."""
  name = cls.__name__
  model_type = config.get("model_type") or model_types[0]
  if model_type not in model_types:
    raise ValueError(
      f"{name}: model_type {model_type!r} is not supported, expected one of {model_types}; "
      "point to a CLIP model folder."
    )
  if config.get("attention_dropout"):
    raise ValueError(
      f"{name}: attention_dropout {config['attention_dropout']} is not supported, expected 0; "
      "set it to 0.0 in config.json."
    )
  known = {f.name for f in dataclasses.fields(cls)}
  given = {k: v for k, v in config.items() if k in known and v is not None}
  check_types(cls, given)
  return given


def _check_tower(config: Any) -> None:
  name = type(config).__name__
  if config.hidden_act not in _ACTIVATIONS:
    raise ValueError(
      f"{name}: hidden_act {config.hidden_act!r} is not supported, expected one of "
      f"{sorted(_ACTIVATIONS)}; convert the model or add the activation."
    )
  if config.hidden_size % config.num_attention_heads:
    raise ValueError(
      f"{name}: hidden_size {config.hidden_size} does not divide into num_attention_heads "
      f"{config.num_attention_heads} heads; choose a multiple."
    )


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Fields of a transformers `CLIPTextConfig`, with its defaults."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  initializer_range: float = 0.02
  initializer_factor: float = 1.0
  pad_token_id: int = 1
  bos_token_id: int = 49406
  eos_token_id: int = 49407

  def __post_init__(self):
    _check_tower(self)
    if not isinstance(self.eos_token_id, int):
      raise ValueError(
        f"CLIPTextConfig: eos_token_id {self.eos_token_id!r} is not supported, expected one "
        "integer; put the end-of-text token's id there."
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
    """Reads the dict of a text_encoder/config.json (or of CLIP's `text_config`)."""
    return cls(**_read_config(cls, config, ("clip_text_model", "clip")))

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json; the caller adds `architectures`."""
    return {
      "model_type": "clip_text_model",
      "attention_dropout": 0.0,
      **dataclasses.asdict(self),
    }


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """Fields of a transformers `CLIPVisionConfig`, with its defaults."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  initializer_range: float = 0.02
  initializer_factor: float = 1.0

  def __post_init__(self):
    _check_tower(self)
    for field in ("image_size", "patch_size"):
      if not isinstance(getattr(self, field), int):
        raise ValueError(
          f"CLIPVisionConfig: {field} {getattr(self, field)!r} is not supported, expected one "
          "integer; only square images and patches are implemented."
        )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "CLIPVisionConfig":
    """Reads the dict of a vision config.json (or of CLIP's `vision_config`)."""
    return cls(**_read_config(cls, config, ("clip_vision_model", "clip")))

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json; the caller adds `architectures`."""
    return {
      "model_type": "clip_vision_model",
      "attention_dropout": 0.0,
      **dataclasses.asdict(self),
    }


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Fields of a transformers `CLIPConfig`, with its defaults."""

  MODEL_TYPES: ClassVar[tuple[str, ...]] = ("clip",)

  text_config: CLIPTextConfig = CLIPTextConfig()
  vision_config: CLIPVisionConfig = CLIPVisionConfig()
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> Self:
    """Reads the dict of a CLIP config.json."""
    fields = _read_config(cls, config, cls.MODEL_TYPES)
    fields["text_config"] = CLIPTextConfig.from_dict(config.get("text_config") or {})
    fields["vision_config"] = CLIPVisionConfig.from_dict(config.get("vision_config") or {})
    return cls(**fields)

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json."""
    return {
      "model_type": "clip",
      "projection_dim": self.projection_dim,
      "logit_scale_init_value": self.logit_scale_init_value,
      "text_config": self.text_config.to_dict(),
      "vision_config": self.vision_config.to_dict(),
    }


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
  """Returns a LayerNorm computed in float32 with the two-pass variance, as in torch."""
  return nn.LayerNorm(epsilon=eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def init_std(config: CLIPTextConfig | CLIPVisionConfig, name: str) -> float:
  """Returns the standard deviation at initialisation of the tower's layer or embedding `name`.

  As in transformers, layers at the entrance of a residual branch shrink with depth.
  """
  width, depth = config.hidden_size**-0.5, (2 * config.num_hidden_layers) ** -0.5
  stds = {
    "q_proj": width * depth,
    "k_proj": width * depth,
    "v_proj": width * depth,
    "out_proj": width,
    "fc1": (2 * config.hidden_size) ** -0.5,
    "fc2": width * depth,
    "text_projection": width,
    "visual_projection": width,
    "class_embedding": width,
    "patch_embedding": config.initializer_range,
    "token_embedding": 0.02,
    "position_embedding": 0.02,
  }
  return config.initializer_factor * stds[name]


def _init(config: CLIPTextConfig | CLIPVisionConfig, name: str) -> nn.initializers.Initializer:
  return nn.initializers.normal(init_std(config, name))


def _dense(
  config: CLIPTextConfig | CLIPVisionConfig,
  features: int,
  dtype: Any,
  name: str,
  **kwargs: Any,
) -> nn.Dense:
  return dense(features, dtype=dtype, name=name, kernel_init=_init(config, name), **kwargs)


class CLIPAttention(nn.Module):
  """Multi-head self-attention of one block."""

  config: CLIPTextConfig | CLIPVisionConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    c = self.config
    batch, length, width = x.shape
    heads = (batch, length, c.num_attention_heads, width // c.num_attention_heads)
    q = _dense(c, width, self.dtype, "q_proj", tensor_axis=1)(x).reshape(heads)
    k = _dense(c, width, self.dtype, "k_proj", tensor_axis=1)(x).reshape(heads)
    v = _dense(c, width, self.dtype, "v_proj", tensor_axis=1)(x).reshape(heads)
    out = attention(q, k, v, mask).reshape(x.shape)
    return _dense(c, width, self.dtype, "out_proj", tensor_axis=0)(out)


class CLIPMLP(nn.Module):
  """Two dense layers with CLIP's activation between."""

  config: CLIPTextConfig | CLIPVisionConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    x = _dense(c, c.intermediate_size, self.dtype, "fc1", tensor_axis=1)(x)
    x = _ACTIVATIONS[c.hidden_act](x)
    return _dense(c, c.hidden_size, self.dtype, "fc2", tensor_axis=0)(x)


class AdaLN(nn.Module):
  """Maps a time condition to `chunks` modulation vectors, `Linear(SiLU(time_cond))` (METHODS 3).

  The kernel starts at zero and the bias at `init_values`, so that at initialisation the output
  does not depend on the time. Named like torch's Sequential(SiLU, Linear): the layer is index 1.
  """

  init_values: tuple[float, ...]

  @nn.compact
  def __call__(self, time_cond: Array) -> list[Array]:
    """Maps time_cond f32[B, D] to one f32[B, 1, D] for each of `init_values`."""
    width = time_cond.shape[-1]

    def bias_init(key, shape, dtype):
      del key
      return jnp.repeat(jnp.asarray(self.init_values, dtype), width).reshape(shape)

    out = nn.Dense(
      len(self.init_values) * width,
      dtype=jnp.float32,
      name="1",
      kernel_init=nn.initializers.zeros,
      bias_init=bias_init,
    )(jax.nn.silu(time_cond.astype(jnp.float32)))
    return [jnp.expand_dims(chunk, 1) for chunk in jnp.split(out, len(self.init_values), axis=-1)]


class CLIPEncoderLayer(nn.Module):
  """Pre-norm transformer block, optionally modulated by a time condition (AdaLN)."""

  config: CLIPTextConfig | CLIPVisionConfig
  dtype: Any = jnp.float32
  time_conditioned: bool = False

  @nn.compact
  def __call__(self, x: Array, mask: Array | None, time_cond: Array | None) -> Array:
    eps = self.config.layer_norm_eps
    if self.time_conditioned:
      # shift, scale, gate of the attention branch, then of the MLP branch.
      modulation = AdaLN((0.0, 0.0, 1.0, 0.0, 0.0, 1.0), name="adaLN_modulation")(time_cond)
      shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

    h = layer_norm(eps, "layer_norm1")(x)
    if self.time_conditioned:
      h = h * (1 + scale_attn) + shift_attn
    h = CLIPAttention(self.config, self.dtype, name="self_attn")(h.astype(self.dtype), mask)
    if self.time_conditioned:
      h = (h * gate_attn).astype(self.dtype)
    x = x + h

    h = layer_norm(eps, "layer_norm2")(x)
    if self.time_conditioned:
      h = h * (1 + scale_mlp) + shift_mlp
    h = CLIPMLP(self.config, self.dtype, name="mlp")(h.astype(self.dtype))
    if self.time_conditioned:
      h = (h * gate_mlp).astype(self.dtype)
    return x + h


class CLIPEncoder(nn.Module):
  """The stack of blocks; returns every hidden state, the input first."""

  config: CLIPTextConfig | CLIPVisionConfig
  dtype: Any = jnp.float32
  time_conditioned: bool = False

  @nn.compact
  def __call__(self, x: Array, mask: Array | None = None, time_cond: Array | None = None) -> tuple[Array, ...]:
    hidden_states = [x]
    for i in range(self.config.num_hidden_layers):
      x = CLIPEncoderLayer(self.config, self.dtype, self.time_conditioned, name=f"layers.{i}")(x, mask, time_cond)
      hidden_states.append(x)
    return tuple(hidden_states)


class CLIPTextEmbeddings(nn.Module):
  """Token plus learned position embedding."""

  config: CLIPTextConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Array) -> Array:
    c = self.config
    length = input_ids.shape[1]
    if length > c.max_position_embeddings:
      raise ValueError(
        f"CLIP text: input_ids have length {length}, expected at most max_position_embeddings = "
        f"{c.max_position_embeddings}; truncate them when tokenizing."
      )
    tokens = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=_init(c, "token_embedding"),
      dtype=self.dtype,
      name="token_embedding",
    )(input_ids)
    positions = nn.Embed(
      c.max_position_embeddings,
      c.hidden_size,
      dtype=self.dtype,
      embedding_init=_init(c, "position_embedding"),
      name="position_embedding",
    )(jnp.arange(length)[None])
    return tokens + jnp.broadcast_to(positions, tokens.shape)


class CLIPTextTransformer(nn.Module):
  """The `text_model` of CLIP."""

  config: CLIPTextConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Array) -> dict[str, Any]:
    c = self.config
    length = input_ids.shape[1]
    x = CLIPTextEmbeddings(c, self.dtype, name="embeddings")(input_ids)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    hidden_states = CLIPEncoder(c, self.dtype, name="encoder")(x, causal)
    last = layer_norm(c.layer_norm_eps, "final_layer_norm")(hidden_states[-1]).astype(self.dtype)
    if c.eos_token_id == 2:
      # Old config.json files (SD1.5's among them) say 2 where the tokenizer says 49407; then the end
      # of the text is the first occurrence of the largest id.
      end = jnp.argmax(input_ids, axis=-1)
    else:
      end = jnp.argmax(input_ids == c.eos_token_id, axis=-1)
    pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
    return {"last_hidden_state": last, "hidden_states": hidden_states, "pooler_output": pooled}


class CLIPTextModel(nn.Module):
  """Text encoder of a diffusion pipeline (`CLIPTextModel[WithProjection]`).

  Attributes:
    config: sizes and activation.
    with_projection: adds `text_projection` and the output `text_embeds` (SDXL's second encoder).
    dtype: compute dtype; parameters are float32, norms and softmax run in float32.
  """

  config: CLIPTextConfig
  with_projection: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Array) -> dict[str, Any]:
    """Encodes token ids.

    Args:
      input_ids: i32[B, L], each row with an end-of-text token.
    Returns:
      `last_hidden_state` [B, L, D] after the final norm; `hidden_states`, a tuple of the input
      embedding and every block's output (before the final norm; SDXL conditions on `[-2]`);
      `pooler_output` [B, D], the last hidden state at the end of the text; with a projection also
      `text_embeds` [B, P].
    """
    out = CLIPTextTransformer(self.config, self.dtype, name="text_model")(input_ids)
    if self.with_projection:
      c = self.config
      out["text_embeds"] = _dense(c, c.projection_dim, self.dtype, "text_projection", use_bias=False)(
        out["pooler_output"]
      )
    return out


class CLIPVisionEmbeddings(nn.Module):
  """Patches, class token and learned positions."""

  config: CLIPVisionConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, pixel_values: Array) -> Array:
    c = self.config
    batch, *shape = pixel_values.shape
    if tuple(shape) != (c.image_size, c.image_size, c.num_channels):
      raise ValueError(
        f"CLIP vision: pixel_values have shape {tuple(shape)} per image, expected "
        f"{(c.image_size, c.image_size, c.num_channels)} (NHWC); resize them first, e.g. with "
        "jaxpref.models.preference.preprocess."
      )
    patch = (c.patch_size, c.patch_size)
    x = nn.Conv(
      c.hidden_size,
      patch,
      strides=patch,
      padding="VALID",
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_init(c, "patch_embedding"),
      name="patch_embedding",
    )(pixel_values.astype(self.dtype))
    x = x.reshape(batch, -1, c.hidden_size)
    class_embedding = self.param("class_embedding", _init(c, "class_embedding"), (c.hidden_size,))
    token = jnp.broadcast_to(class_embedding.astype(self.dtype)[None, None], (batch, 1, c.hidden_size))
    x = jnp.concatenate([token, x], axis=1)
    positions = nn.Embed(
      x.shape[1],
      c.hidden_size,
      dtype=self.dtype,
      embedding_init=_init(c, "position_embedding"),
      name="position_embedding",
    )(jnp.arange(x.shape[1])[None])
    return x + jnp.broadcast_to(positions, x.shape)


class CLIPVisionTransformer(nn.Module):
  """The `vision_model` of CLIP, optionally time-conditioned."""

  config: CLIPVisionConfig
  dtype: Any = jnp.float32
  time_conditioned: bool = False

  @nn.compact
  def __call__(self, pixel_values: Array, time_cond: Array | None = None) -> dict[str, Any]:
    eps = self.config.layer_norm_eps
    x = CLIPVisionEmbeddings(self.config, self.dtype, name="embeddings")(pixel_values)
    x = layer_norm(eps, "pre_layrnorm")(x).astype(self.dtype)  # (sic) the name in every file
    hidden_states = CLIPEncoder(self.config, self.dtype, self.time_conditioned, name="encoder")(x, None, time_cond)
    last = hidden_states[-1]
    pooled = layer_norm(eps, "post_layernorm")(last[:, 0])
    if self.time_conditioned:
      shift, scale = AdaLN((0.0, 0.0), name="adaLN_modulation")(time_cond)
      pooled = pooled * (1 + scale[:, 0]) + shift[:, 0]
    return {
      "last_hidden_state": last,
      "hidden_states": hidden_states,
      "pooler_output": pooled.astype(self.dtype),
    }


class CLIPVisionModel(nn.Module):
  """Vision tower (`CLIPVisionModel[WithProjection]`).

  Attributes:
    config: sizes and activation.
    with_projection: adds `visual_projection` and the output `image_embeds`.
    dtype: compute dtype; parameters are float32, norms and softmax run in float32.
  """

  config: CLIPVisionConfig
  with_projection: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, pixel_values: Array) -> dict[str, Any]:
    """Encodes images.

    Args:
      pixel_values: f32[B, H, W, 3], CLIP-normalised, H = W = `config.image_size`.
    Returns:
      `last_hidden_state` [B, 1 + patches, D] (no final norm), `hidden_states`, `pooler_output`
      [B, D] (class token after the final norm); with a projection also `image_embeds` [B, P].
    """
    out = CLIPVisionTransformer(self.config, self.dtype, name="vision_model")(pixel_values)
    if self.with_projection:
      c = self.config
      out["image_embeds"] = _dense(c, c.projection_dim, self.dtype, "visual_projection", use_bias=False)(
        out["pooler_output"]
      )
    return out


def normalize(x: Array) -> Array:
  """Returns x / ||x|| over the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class CLIPModel(nn.Module):
  """Text and vision towers with their projections and the temperature (`CLIPModel`).

  Attributes:
    config: both towers and the width of the shared space.
    dtype: compute dtype; parameters, norms, softmax and similarities are float32.
  """

  config: CLIPConfig
  dtype: Any = jnp.float32
  # True in a subclass: the vision blocks and the pooled output take a time condition [B, D_vision].
  time_conditioned: ClassVar[bool] = False

  def setup(self):
    c = self.config
    self.text_model = CLIPTextTransformer(c.text_config, self.dtype)
    self.vision_model = CLIPVisionTransformer(c.vision_config, self.dtype, self.time_conditioned)
    self.text_projection = nn.Dense(
      c.projection_dim,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_init(c.text_config, "text_projection"),
    )
    self.visual_projection = nn.Dense(
      c.projection_dim,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_init(c.vision_config, "visual_projection"),
    )
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(c.logit_scale_init_value), ())

  def text_features(self, input_ids: Array) -> Array:
    """Maps i32[B, L] to [B, P], projected and not normalised."""
    return self.text_projection(self.text_model(input_ids)["pooler_output"])

  def image_features(self, pixel_values: Array, time_cond: Array | None = None) -> Array:
    """Maps CLIP-normalised f32[B, H, W, 3] to [B, P], projected and not normalised."""
    return self.visual_projection(self.vision_model(pixel_values, time_cond)["pooler_output"])

  def __call__(self, input_ids: Array, pixel_values: Array) -> tuple[Array, Array, Array]:
    """Embeds both sides; all similarities are exp(logit_scale) image_embeds @ text_embeds.T.

    Args:
      input_ids: i32[B_text, L].
      pixel_values: f32[B_image, H, W, 3], CLIP-normalised.
    Returns:
      `image_embeds` f32[B_image, P] and `text_embeds` f32[B_text, P], unit length, and the
      parameter `logit_scale` f32[] (the logarithm of the scale).
    """
    image_embeds = normalize(self.image_features(pixel_values))
    return image_embeds, normalize(self.text_features(input_ids)), self.logit_scale
