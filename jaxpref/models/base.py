"""The interface `Model`, through which methods and samplers use a text-to-image model of any family; and guidance.

Every function takes `weights`, a dict of parameter trees by component. The trainer passes those of the policy, the
reference or the pre-trained model (`objectives.base.Weights`), so one set of functions serves all three.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxpref.diffusion import Process
from jaxpref.recipes.sizes import Size

Weights = Mapping[str, Any]
Cond = dict[str, Any]
# (x f32[B,h,w,C], t [B], cond) -> the network's prediction f32[B,h,w,C]
PredictFn = Callable[[jax.Array, jax.Array, Cond], jax.Array]


class Model(Protocol):
  """A text-to-image model as the few pure functions that objectives and rollouts need.

  Conditioning is a tree of arrays with one row for each prompt; only the model looks into it.
  """

  @property
  def process(self) -> Process: ...

  @property
  def denoiser(self) -> str:
    """The component that is trained, such as "unet" or "transformer"; an adapter of it is `DENOISER_lora`."""
    ...

  @property
  def image_size(self) -> Size:
    """Size of the images in pixels: the side of squares, or (height, width)."""
    ...

  @property
  def unit(self) -> int:
    """Pixels in a side of one latent; sizes are multiples of it."""
    ...

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, C) of one sample's latents."""
    ...

  def latent_shape_for(self, height: int, width: int) -> tuple[int, int, int]:
    """Returns (h, w, C) of the latents of images of this size in pixels; raises ValueError for an impossible size."""
    ...

  def at_size(self, height: int, width: int) -> "Model":
    """Returns the model with another `image_size`, in pixels; only `config.image_size` uses it."""
    ...

  def predict(self, weights: Weights, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """Returns the network's output f32[B,h,w,C] at x f32[B,h,w,C], times t [B]."""
    ...

  def encode_text(self, weights: Weights, input_ids: jax.Array) -> Cond:
    """Returns the conditioning on prompts i32[B,L], for images of the model's own size."""
    ...

  def encode_negative(self, weights: Weights, input_ids: jax.Array) -> Cond:
    """Returns the conditioning on negative prompts i32[B,L]."""
    ...

  def encode_empty(self, weights: Weights, batch_size: int) -> Cond:
    """Returns the conditioning without a negative prompt (`weights["empty_ids"]` i32[1,L]), repeated."""
    ...

  def sized(self, cond: Cond, sizes: jax.Array | None) -> Cond:
    """Returns the conditioning at given sizes; unchanged without sizes, and in a model that does not use them.

    Args:
      sizes: f32[B,6] or [1,6]: original height and width, top and left of the crop, target height and width, in pixels.
    """
    ...

  def stored_text(self, cond: Cond) -> dict[str, jax.Array]:
    """Returns the part of the conditioning that depends on the prompt alone, as fields of a batch [B,...]."""
    ...

  def restored_text(self, batch: Mapping[str, jax.Array]) -> Cond | None:
    """Returns the conditioning from fields that `stored_text` made; None for a batch without them."""
    ...

  def encode_images(self, weights: Weights, images: jax.Array, key: jax.Array) -> jax.Array:
    """Draws scaled latents f32[B,h,w,C] from the posterior of images [B,H,W,3], u8 or f32 in [-1, 1]."""
    ...

  def encode_moments(self, weights: Weights, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log variance f32[B,h,w,C] of the posterior of images."""
    ...

  def draw_latents(self, mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
    """Draws scaled latents f32[B,h,w,C] from the posterior with these moments; needs no weights."""
    ...

  def decode(self, weights: Weights, latents: jax.Array, *, size: int = 0) -> jax.Array:
    """Decodes scaled latents to images f32[B,H,W,3], about [-1, 1], with a shorter side of `size` pixels unless 0."""
    ...


def repeat_cond(cond: Cond, times: int) -> Cond:
  """Repeats each row `times` times: [B, ...] -> [B * times, ...], rows of one prompt side by side."""
  return jax.tree.map(lambda c: jnp.repeat(c, times, axis=0), cond)


def is_guided(guidance_scale: float) -> bool:
  """Returns whether a scale guides at all, that is, exceeds 1. Up to 1 only the prompt counts, as in diffusers.

  Raises:
    ValueError: the scale is negative, infinite or not a number.
  """
  if not 0.0 <= guidance_scale < math.inf:
    raise ValueError(f"guidance_scale={guidance_scale}; expected a number of at least 0 (up to 1: no guidance).")
  return guidance_scale > 1.0


def guided(eps_fn: PredictFn, uncond: Cond, guidance_scale: float, *, guidance_rescale: float = 0.0) -> PredictFn:
  """Returns classifier-free guidance, uncond + scale (cond - uncond), as one call on a doubled batch.

  Args:
    eps_fn: the unguided prediction.
    uncond: conditioning on the empty or a negative prompt: one row [1, ...], or as many rows as cond.
    guidance_scale: 1 and below switch guidance off and save half of the work.
    guidance_rescale: in [0, 1], how far each sample's standard deviation is brought back to that of the unguided
      prediction, against overexposure (arXiv 2305.08891, Section 3.4, Eq. 15 and 16; 0.7 there).

  Raises:
    ValueError: see `is_guided`.
  """
  if not is_guided(guidance_scale):
    return eps_fn

  def both(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    rows = jax.tree.map(lambda u, c: jnp.concatenate([jnp.broadcast_to(u, c.shape).astype(c.dtype), c]), uncond, cond)
    pred = eps_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), rows)
    pred_uncond, pred_cond = jnp.split(pred, 2)
    pred = pred_uncond + guidance_scale * (pred_cond - pred_uncond)
    if guidance_rescale > 0.0:
      std_cond, std = (jnp.std(p, axis=(1, 2, 3), keepdims=True) for p in (pred_cond, pred))
      pred = pred * (1.0 - guidance_rescale + guidance_rescale * std_cond / std)
    return pred

  return both
