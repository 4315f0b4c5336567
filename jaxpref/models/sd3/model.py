"""Stable Diffusion 3 and 3.5 behind the interface `models.base.Model`.

Their components are `transformer`, `vae`, `text_encoder`, `text_encoder_2`, `text_encoder_3`, and `transformer_lora` if
an adapter is trained. `transformer_constants` may hold the table of positions of the model's files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxpref.diffusion import FlowSchedule, Process, RectifiedFlow, mu_of_tokens
from jaxpref.models import lora
from jaxpref.models.base import Cond, Weights
from jaxpref.models.clip import CLIPTextModel
from jaxpref.models.latent_space import LatentSpace
from jaxpref.models.sd3.transformer import SD3Transformer2DModel
from jaxpref.models.t5 import T5EncoderModel
from jaxpref.models.vae import AutoencoderKL

# Fields of a batch: the prompt's tokens of both CLIPs side by side, those of T5, and the pooled text.
CLIP_FIELD, T5_FIELD, POOLED_FIELD = "clip_hidden_states", "t5_hidden_states", "pooled_projections"


def flow_of(schedule: FlowSchedule, tokens: int) -> RectifiedFlow:
  """Returns the process of a schedule, for images of so many tokens if its shift is dynamic."""
  return RectifiedFlow(schedule, mu=mu_of_tokens(schedule, tokens) if schedule.use_dynamic_shifting else None)


@dataclasses.dataclass(frozen=True)
class StableDiffusion3(LatentSpace):
  """Stable Diffusion 3 or 3.5, as modules without parameters.

  Attributes:
    text_encoder, text_encoder_2: CLIP's text towers, both with a projection.
    text_encoder_3: T5, or None: its tokens are then zeros, as in diffusers.
    max_sequence_length: tokens of T5, also if it is None.
    lora_scale: alpha / rank of the adapter in `weights["transformer_lora"]`, if there is one.
    clip_skip: layers of the CLIPs to leave out at the end besides the last one; None for none.
    vae_slicing: images that the VAE encodes or decodes at a time, on all devices together; None for the whole batch.
    size: height and width of the images in pixels; None for those of the transformer's `sample_size`.
  """

  transformer: SD3Transformer2DModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  text_encoder_2: CLIPTextModel
  process: Process
  text_encoder_3: T5EncoderModel | None = None
  max_sequence_length: int = 256
  lora_scale: float = 1.0
  clip_skip: int | None = None
  vae_slicing: int | None = None
  size: tuple[int, int] | None = None
  denoiser = "transformer"
  # Published T5 weights overflow in float16; all other precomputed fields are stored in it.
  stored_dtypes: ClassVar[Mapping[str, Any]] = {T5_FIELD: jnp.bfloat16}

  def __post_init__(self):
    c = self.transformer.config
    clips = (self.text_encoder, self.text_encoder_2)
    if not all(clip.with_projection for clip in clips):
      raise ValueError("text_encoder and text_encoder_2 need a projection: CLIPTextModelWithProjection in diffusers.")
    pooled = sum(clip.config.projection_dim for clip in clips)
    width = sum(clip.config.hidden_size for clip in clips)
    if pooled != c.pooled_projection_dim:
      raise ValueError(
        f"the text encoders' projections have {pooled} numbers together, expected pooled_projection_dim ="
        f" {c.pooled_projection_dim} of the transformer; take all components from the same model."
      )
    if width > c.joint_attention_dim:
      raise ValueError(
        f"the CLIPs' tokens have {width} numbers together, expected at most joint_attention_dim ="
        f" {c.joint_attention_dim} of the transformer; take all components from the same model."
      )
    if self.text_encoder_3 is not None and self.text_encoder_3.config.d_model != c.joint_attention_dim:
      raise ValueError(
        f"text_encoder_3 has d_model={self.text_encoder_3.config.d_model}, expected joint_attention_dim ="
        f" {c.joint_attention_dim} of the transformer; take all components from the same model."
      )
    if self.vae.config.latent_channels != c.in_channels or c.predicted_channels != c.in_channels:
      raise ValueError(
        f"the transformer maps {c.in_channels} channels to {c.predicted_channels}, expected latent_channels ="
        f" {self.vae.config.latent_channels} of the VAE; take all components from the same model."
      )
    depth = min(clip.config.num_hidden_layers for clip in clips)
    if self.clip_skip is not None and not 0 <= self.clip_skip <= depth - 1:
      raise ValueError(f"clip_skip={self.clip_skip}, expected 0 to {depth - 1} for text encoders of {depth} layers.")
    if self.max_sequence_length < 1:
      raise ValueError(f"max_sequence_length={self.max_sequence_length}, expected a positive number of T5's tokens.")

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, C) of one sample's latents."""
    if self.size is not None:
      return self.latent_shape_for(*self.size)
    c = self.transformer.config
    return (c.sample_size, c.sample_size, c.in_channels)

  def at_size(self, height: int, width: int) -> "StableDiffusion3":
    """Returns the model with images of another size in pixels; raises ValueError as `latent_shape_for`."""
    rows, columns, _ = self.latent_shape_for(height, width)
    process, patch = self.process, self.transformer.config.patch_size
    if isinstance(process, RectifiedFlow) and process.schedule.use_dynamic_shifting:
      mu = mu_of_tokens(process.schedule, rows * columns // patch**2)
      process = dataclasses.replace(process, mu=mu)
    return dataclasses.replace(self, size=(height, width), process=process)

  def latent_shape_for(self, height: int, width: int) -> tuple[int, int, int]:
    """Returns (h, w, C) of the latents of images of another size in pixels than the model's own.

    Raises:
      ValueError: the VAE and the patches do not divide it, or it has more positions than the transformer knows.
    """
    c = self.transformer.config
    patch = self.unit * c.patch_size
    if height < patch or width < patch or height % patch or width % patch:
      raise ValueError(
        f"images of {height} x {width} pixels, expected multiples of {patch} (what the VAE halves, in patches of"
        f" {c.patch_size} x {c.patch_size})."
      )
    most = (c.pos_embed_max_size or 0) * patch
    if max(height, width) > most:
      raise ValueError(
        f"images of {height} x {width} pixels, expected at most {most} on a side (pos_embed_max_size ="
        f" {c.pos_embed_max_size} patches)."
      )
    return (height // self.unit, width // self.unit, c.in_channels)

  def predict(self, weights: Weights, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """Returns the velocity f32[B,h,w,C] at x f32[B,h,w,C] and t [B], 1000 sigma from 0 to 1000."""
    args = (x, t, cond["encoder_hidden_states"], cond["pooled_projections"])
    module: Any = self.transformer
    if "transformer_constants" in weights:
      module = _WithConstants(self.transformer, weights["transformer_constants"])
    if "transformer_lora" in weights:
      adapter = weights["transformer_lora"]
      return lora.apply(module, weights["transformer"], adapter, *args, scale=self.lora_scale)
    return module.apply({"params": weights["transformer"]}, *args)

  def encode_text(self, weights: Weights, input_ids: jax.Array) -> Cond:
    """Returns the conditioning on prompts.

    Args:
      input_ids: i32[B, L + L + max_sequence_length], the ids of both CLIPs and of T5 side by side; without T5
        i32[B, L + L]. L is the CLIPs' `max_position_embeddings`.

    Returns:
      `encoder_hidden_states` [B, L + max_sequence_length, joint_attention_dim] and `pooled_projections` [B, P].

    Raises:
      ValueError: the ids have another length.
    """
    return self._assembled(self._encode(weights, input_ids, self.clip_skip))

  def encode_negative(self, weights: Weights, input_ids: jax.Array) -> Cond:
    """Returns the conditioning on negative prompts (see `encode_text`), with all layers whatever `clip_skip` is."""
    return self._assembled(self._encode(weights, input_ids, None))

  def encode_empty(self, weights: Weights, batch_size: int) -> Cond:
    """Returns the conditioning on the empty prompt (`weights["empty_ids"]` i32[1, L]), computed once and repeated."""
    cond = self.encode_negative(weights, weights["empty_ids"])
    return jax.tree.map(lambda c: jnp.broadcast_to(c, (batch_size, *c.shape[1:])), cond)

  def sized(self, cond: Cond, sizes: jax.Array | None) -> Cond:
    """Returns the conditioning unchanged: these models do not see sizes."""
    del sizes
    return cond

  def stored_text(self, cond: Cond) -> dict[str, jax.Array]:
    """Returns the tokens of both CLIPs [B, L, D] without their padding, those of T5 unless zero, and pooled [B, P]."""
    hidden = cond["encoder_hidden_states"]
    clips = (self.text_encoder.config, self.text_encoder_2.config)
    width = sum(c.hidden_size for c in clips)
    split = hidden.shape[1] - self.max_sequence_length
    fields = {CLIP_FIELD: hidden[:, :split, :width], POOLED_FIELD: cond["pooled_projections"]}
    if self.text_encoder_3 is not None:
      fields[T5_FIELD] = hidden[:, split:]
    return fields

  def restored_text(self, batch: Mapping[str, jax.Array]) -> Cond | None:
    """Returns the conditioning from fields that `stored_text` made; None for a batch without them."""
    if CLIP_FIELD not in batch:
      return None
    return self._assembled({k: batch[k] for k in (CLIP_FIELD, T5_FIELD, POOLED_FIELD) if k in batch})

  def _encode(self, weights: Weights, input_ids: jax.Array, clip_skip: int | None) -> dict[str, jax.Array]:
    """Returns the fields of `stored_text`."""
    clips = (self.text_encoder, self.text_encoder_2)
    lengths = [clip.config.max_position_embeddings for clip in clips]
    if self.text_encoder_3 is not None:
      lengths.append(self.max_sequence_length)
    if input_ids.shape[1] != sum(lengths):
      raise ValueError(
        f"input_ids have the shape {input_ids.shape}, expected [B, {' + '.join(map(str, lengths))}]: the ids of each"
        " text encoder side by side."
      )
    starts = [lengths[0], lengths[0] + lengths[1]][: len(lengths) - 1]
    ids, ids_2, *ids_3 = jnp.split(input_ids, starts, axis=1)
    outs = [
      clip.apply({"params": weights[name]}, tokens)
      for clip, name, tokens in zip(clips, ("text_encoder", "text_encoder_2"), (ids, ids_2), strict=True)
    ]
    layer = -((clip_skip or 0) + 2)
    fields = {
      CLIP_FIELD: jnp.concatenate([out["hidden_states"][layer] for out in outs], axis=-1),
      POOLED_FIELD: jnp.concatenate([out["text_embeds"] for out in outs], axis=-1),
    }
    if self.text_encoder_3 is not None:
      fields[T5_FIELD] = self.text_encoder_3.apply({"params": weights["text_encoder_3"]}, ids_3[0])
    return fields

  def _assembled(self, fields: Mapping[str, jax.Array]) -> Cond:
    """Returns the conditioning: the CLIPs' tokens padded with zeros to T5's width, then T5's or zeros.

    All of it has the dtype of the computation: stored fields do not agree in theirs.
    """
    fields = {name: value.astype(self.transformer.dtype) for name, value in fields.items()}
    clip = fields[CLIP_FIELD]
    width = self.transformer.config.joint_attention_dim
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
    t5 = fields.get(T5_FIELD)
    if t5 is None:
      t5 = jnp.zeros((clip.shape[0], self.max_sequence_length, width), clip.dtype)
    hidden = jnp.concatenate([clip, t5], axis=1)
    return {"encoder_hidden_states": hidden, "pooled_projections": fields[POOLED_FIELD]}


@dataclasses.dataclass(frozen=True)
class _WithConstants:
  """A network with its constants, to `apply` to parameters."""

  module: SD3Transformer2DModel
  constants: Any

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    return self.module.apply({**variables, "constants": self.constants}, *args, **kwargs)
