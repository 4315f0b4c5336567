"""ImageReward (arXiv 2304.05977): BLIP's image-grounded text encoder and a head, named as in the published file.

A ViT reads the picture, a BERT reads the prompt and looks at the ViT's output in every layer (arXiv 2201.12086), and
the hidden state of the first token goes through five linear layers. The names are those of BLIP's own code, not of
transformers' copy of it: `blip.visual_encoder.blocks.0.attn.qkv`, `blip.text_encoder.encoder.layer.0.attention`,
`mlp.layers.0`. LAION's aesthetic predictor has the same head, so it is here too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpref.models.attention import attention
from jaxpref.models.clip import layer_norm
from jaxpref.models.config import check_types, without_nulls
from jaxpref.models.preference import CLIP_MEAN, CLIP_STD
from jaxpref.models.resnet import dense

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BLIPVisionConfig:
  """Config of BLIP's ViT; the defaults are ViT-L/16 for 224 pixels, ImageReward's."""

  image_size: int = 224
  patch_size: int = 16
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  layer_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class BLIPTextConfig:
  """Config of BLIP's BERT, with the keys of its med_config.json; the ids of two tokens are BLIP's: [DEC] and [ENC]."""

  vocab_size: int = 30524
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 512
  layer_norm_eps: float = 1e-12
  pad_token_id: int = 0


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
  """An ImageReward folder's config.json.

  Attributes:
    text_length: number of tokens that a prompt is padded and cut to.
    reward_mean, reward_std: mean and deviation of the rewards that the published model gives its training data.
    image_mean, image_std: per channel, for images in [0, 1].
  """

  vision_config: BLIPVisionConfig = BLIPVisionConfig()
  text_config: BLIPTextConfig = BLIPTextConfig()
  text_length: int = 35
  reward_mean: float = 0.16717362830052426
  reward_std: float = 1.0333394966054072
  image_mean: tuple[float, ...] = CLIP_MEAN
  image_std: tuple[float, ...] = CLIP_STD

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "ImageRewardConfig":
    """Reads the dict of a config.json.

    Raises:
      ValueError: it belongs to another model, or asks for something that is not implemented.
    """
    if config.get("model_type") != "imagereward":
      raise ValueError(
        f"ImageReward config: model_type is {config.get('model_type')!r}, expected 'imagereward'; point to a folder "
        "that scripts/assets/convert_scorer.py wrote."
      )
    text = config.get("text_config") or {}
    if (text.get("hidden_act") or "gelu") != "gelu":
      raise ValueError(
        f"ImageReward config: text_config.hidden_act is {text['hidden_act']!r}, expected 'gelu'; take the published "
        "model's med_config.json."
      )

    def fields(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
      known = {f.name for f in dataclasses.fields(kind)}
      given = without_nulls(kind, values).items()
      check_types(kind, dict(given))
      return {k: tuple(v) if isinstance(v, list) else v for k, v in given if k in known}

    towers = {
      "vision_config": BLIPVisionConfig(**fields(BLIPVisionConfig, config.get("vision_config") or {})),
      "text_config": BLIPTextConfig(**fields(BLIPTextConfig, text)),
    }
    return cls(**(fields(cls, config) | towers))

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json."""
    fields = dataclasses.asdict(self)
    return {"model_type": "imagereward"} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


class ViTAttention(nn.Module):
  """Self-attention whose queries, keys and values are one layer."""

  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, length, width = x.shape
    qkv = dense(3 * width, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.num_heads, -1), 2, 0)
    return dense(width, dtype=self.dtype, name="proj")(attention(q, k, v).reshape(x.shape))


class MLP(nn.Module):
  """Two dense layers with the exact GELU between."""

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = jax.nn.gelu(dense(self.width, dtype=self.dtype, name="fc1")(x), approximate=False)
    return dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class ViTBlock(nn.Module):
  """Pre-norm block of the vision transformer."""

  config: BLIPVisionConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    h = layer_norm(c.layer_norm_eps, "norm1")(x).astype(self.dtype)
    x = x + ViTAttention(c.num_attention_heads, self.dtype, name="attn")(h)
    h = layer_norm(c.layer_norm_eps, "norm2")(x).astype(self.dtype)
    return x + MLP(c.intermediate_size, self.dtype, name="mlp")(h)


class VisionTransformer(nn.Module):
  """`visual_encoder`: patches and a class token -> their hidden states after the last norm."""

  config: BLIPVisionConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, pixels: Array) -> Array:
    """Maps normalised f32[B, S, S, 3] to [B, 1 + patches, D]."""
    c = self.config
    width, patch = c.hidden_size, (c.patch_size, c.patch_size)
    tokens = (c.image_size // c.patch_size) ** 2 + 1
    embed = nn.Conv(width, patch, strides=patch, padding="VALID", dtype=self.dtype, name="patch_embed.proj")
    x = embed(pixels.astype(self.dtype)).reshape(pixels.shape[0], -1, width)
    init = nn.initializers.normal(0.02)
    cls_token = self.param("cls_token", init, (1, 1, width)).astype(self.dtype)
    positions = self.param("pos_embed", init, (1, tokens, width)).astype(self.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls_token, (x.shape[0], 1, width)), x], axis=1) + positions
    for i in range(c.num_hidden_layers):
      x = ViTBlock(c, self.dtype, name=f"blocks.{i}")(x)
    return layer_norm(c.layer_norm_eps, "norm")(x).astype(self.dtype)


class BertAttention(nn.Module):
  """Attention to `context`, its projection, and the norm of the sum with the input (post-norm)."""

  config: BLIPTextConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
    c = self.config
    heads = lambda y: y.reshape(*y.shape[:2], c.num_attention_heads, -1)
    q = heads(dense(c.hidden_size, dtype=self.dtype, name="self.query")(x))
    k = heads(dense(c.hidden_size, dtype=self.dtype, name="self.key")(context))
    v = heads(dense(c.hidden_size, dtype=self.dtype, name="self.value")(context))
    out = dense(c.hidden_size, dtype=self.dtype, name="output.dense")(attention(q, k, v, mask).reshape(x.shape))
    return layer_norm(c.layer_norm_eps, "output.LayerNorm")(out + x).astype(self.dtype)


class BertLayer(nn.Module):
  """Attention to the text, attention to the image, and a feed-forward layer, each added and then normalised."""

  config: BLIPTextConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, image: Array, mask: Array) -> Array:
    c = self.config
    x = BertAttention(c, self.dtype, name="attention")(x, x, mask)
    x = BertAttention(c, self.dtype, name="crossattention")(x, image, None)
    h = dense(c.intermediate_size, dtype=self.dtype, name="intermediate.dense")(x)
    h = dense(c.hidden_size, dtype=self.dtype, name="output.dense")(jax.nn.gelu(h, approximate=False))
    return layer_norm(c.layer_norm_eps, "output.LayerNorm")(h + x).astype(self.dtype)


class TextEncoder(nn.Module):
  """`text_encoder`: BERT without token types and pooler, with attention to the image in every layer."""

  config: BLIPTextConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Array, image: Array) -> Array:
    """Maps i32[B, L], padded with `pad_token_id`, and the image's hidden states [B, S, E] to [B, L, D]."""
    c = self.config
    embed = lambda size, name: nn.Embed(size, c.hidden_size, dtype=self.dtype, name=f"embeddings.{name}")
    x = embed(c.vocab_size, "word_embeddings")(input_ids)
    positions = embed(c.max_position_embeddings, "position_embeddings")(jnp.arange(input_ids.shape[1])[None])
    x = layer_norm(c.layer_norm_eps, "embeddings.LayerNorm")(x + positions).astype(self.dtype)
    mask = (input_ids != c.pad_token_id)[:, None, None, :]
    for i in range(c.num_hidden_layers):
      x = BertLayer(c, self.dtype, name=f"encoder.layer.{i}")(x, image, mask)
    return x


class RewardHead(nn.Module):
  """Five linear layers without activations: torch's Sequential, whose other entries are dropouts."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, D] to f32[B]."""
    x = x.astype(jnp.float32)
    for index, width in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True):
      x = nn.Dense(width, dtype=jnp.float32, name=f"layers.{index}")(x)
    return x[:, 0]


class BLIP(nn.Module):
  """`blip`: the two encoders."""

  config: ImageRewardConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Array, pixels: Array) -> Array:
    """Returns [B, L, D], the hidden states of the prompts' tokens in view of their images."""
    image = VisionTransformer(self.config.vision_config, self.dtype, name="visual_encoder")(pixels)
    return TextEncoder(self.config.text_config, self.dtype, name="text_encoder")(input_ids, image)


class ImageReward(nn.Module):
  """The reward of images under their prompts, standardised as the published code does."""

  config: ImageRewardConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Array, pixels: Array) -> Array:
    """Returns rewards f32[B].

    Args:
      input_ids: i32[B, L], [CLS] first, padded with `pad_token_id`.
      pixels: f32[B, S, S, 3], normalised with CLIP's mean and standard deviation.
    """
    c = self.config
    first = BLIP(c, self.dtype, name="blip")(input_ids, pixels)[:, 0]
    reward = RewardHead(name="mlp")(first)
    return (reward - c.reward_mean) / c.reward_std
