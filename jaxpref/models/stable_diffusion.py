"""Stable Diffusion 1.x, 2.x and SDXL behind the interface `models.base.Model`.

Their components are `unet`, `vae`, `text_encoder`, `text_encoder_2`, and `unet_lora` if an adapter is trained.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpref.diffusion import Process
from jaxpref.models import lora
from jaxpref.models.base import Cond, Weights
from jaxpref.models.clip import CLIPTextModel, layer_norm
from jaxpref.models.latent_space import LatentSpace
from jaxpref.models.unet import UNet2DConditionModel
from jaxpref.models.vae import AutoencoderKL
from jaxpref.recipes.sizes import sides


@dataclasses.dataclass(frozen=True)
class StableDiffusion(LatentSpace):
  """Stable Diffusion 1.x / 2.x or SDXL, as modules without parameters.

  Attributes:
    lora_scale: alpha / rank of the adapter in `weights["unet_lora"]`, if there is one.
    zero_empty_prompt: condition on zeros without a negative prompt (`force_zeros_for_empty_prompt` of SDXL).
    clip_skip: text encoder layers to leave out at the end, as diffusers counts them: None for what the UNet was trained
      with, 1 for "the layer before that".
    vae_slicing: images that the VAE encodes or decodes at a time, on all devices together; None for the whole batch. At
      1024 x 1024 pixels an image temporarily takes gigabytes.
    size: height and width of the images in pixels; None for those of the UNet's `sample_size`.
  """

  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  process: Process
  text_encoder_2: CLIPTextModel | None = None
  lora_scale: float = 1.0
  zero_empty_prompt: bool = False
  clip_skip: int | None = None
  vae_slicing: int | None = None
  size: tuple[int, int] | None = None
  denoiser = "unet"

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, C) of one sample's latents."""
    if self.size is not None:
      return self.latent_shape_for(*self.size)
    size = self.unet.config.sample_size
    if size is None:
      raise ValueError(
        "unet config: sample_size=None, expected the side of square latents, or [height, width]; set it."
      )
    return (*sides(size), self.unet.config.in_channels)

  def at_size(self, height: int, width: int) -> "StableDiffusion":
    """Returns the model with images of another size in pixels; raises ValueError as `latent_shape_for`."""
    self.latent_shape_for(height, width)
    return dataclasses.replace(self, size=(height, width))

  def latent_shape_for(self, height: int, width: int) -> tuple[int, int, int]:
    """Returns (h, w, C) of the latents of images of another size in pixels than the model's own."""
    unit = self.unit
    if height < unit or width < unit or height % unit or width % unit:
      raise ValueError(f"images of {height} x {width} pixels, expected multiples of {unit} (what the VAE halves).")
    return (height // unit, width // unit, self.unet.config.in_channels)

  def predict(self, weights: Weights, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """Returns the UNet's output f32[B,h,w,C] at x f32[B,h,w,C], t i32[B]."""
    args = (x, t, cond["encoder_hidden_states"], cond.get("added_cond_kwargs"))
    if "unet_lora" in weights:
      return lora.apply(self.unet, weights["unet"], weights["unet_lora"], *args, scale=self.lora_scale)
    return self.unet.apply({"params": weights["unet"]}, *args)

  def encode_text(self, weights: Weights, input_ids: jax.Array, time_ids: jax.Array | None = None) -> Cond:
    """Returns the UNet's conditioning on prompts.

    Args:
      input_ids: i32[B, L], or i32[B, 2 L] for two text encoders (the ids of both side by side).
      time_ids: f32[B, 6] or [1, 6], for SDXL only: original height and width, top and left of the crop, target height
        and width, in pixels (arXiv 2307.01952, Section 2.2); by default the model's own size, uncropped.
    Returns:
      `encoder_hidden_states` f32[B,L,D], and for SDXL `added_cond_kwargs` with `text_embeds` f32[B,P] and
      `time_ids` f32[B,6].
    """
    return self._encode(weights, input_ids, time_ids, self.clip_skip)

  def encode_negative(self, weights: Weights, input_ids: jax.Array, time_ids: jax.Array | None = None) -> Cond:
    """Returns the conditioning on negative prompts; see `encode_text` for the arguments.

    As in diffusers, a given prompt is encoded even if it is empty, and with all layers whatever `clip_skip` is.
    """
    return self._encode(weights, input_ids, time_ids, None)

  def encode_empty(self, weights: Weights, batch_size: int, time_ids: jax.Array | None = None) -> Cond:
    """Returns the conditioning without a negative prompt, computed once and repeated.

    It is that of the empty prompt (`weights["empty_ids"]` i32[1, L]), or zeros (`zero_empty_prompt`).

    Args:
      time_ids: f32[1, 6], see `encode_text`.
    """
    cond = self.encode_negative(weights, weights["empty_ids"], time_ids)
    if self.zero_empty_prompt:
      cond["encoder_hidden_states"] = jnp.zeros_like(cond["encoder_hidden_states"])
      added = cond["added_cond_kwargs"]
      cond["added_cond_kwargs"] = {**added, "text_embeds": jnp.zeros_like(added["text_embeds"])}
    return jax.tree.map(lambda c: jnp.broadcast_to(c, (batch_size, *c.shape[1:])), cond)

  def _encode(self, weights: Weights, input_ids: jax.Array, time_ids: jax.Array | None, clip_skip: int | None) -> Cond:
    depths = [e.config.num_hidden_layers for e in (self.text_encoder, self.text_encoder_2) if e is not None]
    most = min(depths) - (0 if self.text_encoder_2 is None else 1)
    if clip_skip is not None and not 0 <= clip_skip <= most:
      raise ValueError(f"clip_skip={clip_skip}, expected 0 to {most} for text encoders of {min(depths)} layers.")
    if self.text_encoder_2 is None:
      if time_ids is not None:
        raise ValueError("time_ids were given to a model that is not conditioned on sizes; only SDXL is.")
      params = weights["text_encoder"]
      out = self.text_encoder.apply({"params": params}, input_ids)
      if clip_skip is None:
        return {"encoder_hidden_states": out["last_hidden_state"]}
      hidden = out["hidden_states"][-(clip_skip + 1)]
      norm = layer_norm(self.text_encoder.config.layer_norm_eps, "final_layer_norm")
      normed = norm.apply({"params": params["text_model"]["final_layer_norm"]}, hidden)
      return {"encoder_hidden_states": normed.astype(hidden.dtype)}
    ids, ids_2 = jnp.split(input_ids, 2, axis=1)
    first = self.text_encoder.apply({"params": weights["text_encoder"]}, ids)
    second = self.text_encoder_2.apply({"params": weights["text_encoder_2"]}, ids_2)
    layer = -((clip_skip or 0) + 2)
    if time_ids is None:
      size = sides(self.image_size)
      time_ids = jnp.asarray([[*size, 0.0, 0.0, *size]], jnp.float32)
    return {
      "encoder_hidden_states": jnp.concatenate([e["hidden_states"][layer] for e in (first, second)], axis=-1),
      "added_cond_kwargs": {
        "text_embeds": second["text_embeds"],
        "time_ids": jnp.broadcast_to(time_ids, (input_ids.shape[0], 6)),
      },
    }

  def sized(self, cond: Cond, sizes: jax.Array | None) -> Cond:
    """Returns SDXL's conditioning at given `time_ids`; leaves that of Stable Diffusion 1.x and 2.x unchanged.

    The text encoders do not see them, so images of any size share one encoding of their prompt.
    """
    if sizes is None or "added_cond_kwargs" not in cond:
      return cond
    rows = len(cond["encoder_hidden_states"])
    added = {**cond["added_cond_kwargs"], "time_ids": sizes if len(sizes) > 1 else jnp.broadcast_to(sizes, (rows, 6))}
    return {**cond, "added_cond_kwargs": added}

  def stored_text(self, cond: Cond) -> dict[str, jax.Array]:
    """Returns encoder_hidden_states [B, L, D] and, for SDXL, text_embeds [B, E]."""
    fields = {"encoder_hidden_states": cond["encoder_hidden_states"]}
    if "added_cond_kwargs" in cond:
      fields["text_embeds"] = cond["added_cond_kwargs"]["text_embeds"]
    return fields

  def restored_text(self, batch: Mapping[str, jax.Array]) -> Cond | None:
    """Returns the conditioning from fields that `stored_text` made; None for a batch without them."""
    if "encoder_hidden_states" not in batch:
      return None
    cond: Cond = {"encoder_hidden_states": batch["encoder_hidden_states"]}
    if "text_embeds" in batch:
      cond["added_cond_kwargs"] = {"text_embeds": batch["text_embeds"]}
    return cond
