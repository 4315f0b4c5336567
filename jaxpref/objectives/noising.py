"""What the methods share: latents and conditioning of a batch, noise, and the errors of a network on it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref import diffusion, reference
from jaxpref.models.text_to_image import Cond, TextToImage, guided
from jaxpref.objectives.base import Batch, Weights, named_key


def latents(model: TextToImage, weights: Any, images: Batch, key: jax.Array) -> jax.Array:
  """Latents f32[B,h,w,C] of `pixels`, or drawn alike from their `moments` [B,h,w,2C], which were computed before."""
  if "moments" not in images:
    return model.encode_images(weights, images["pixels"], key)
  mean, logvar = jnp.split(images["moments"].astype(jnp.float32), 2, axis=-1)
  return model.draw_latents(mean, logvar, key)


def text(model: TextToImage, weights: Any, batch: Batch) -> Cond:
  """The conditioning on `input_ids`, or what the text encoders made of them before."""
  if "encoder_hidden_states" not in batch:
    return model.encode_text(weights, batch["input_ids"])
  cond: Cond = {"encoder_hidden_states": batch["encoder_hidden_states"]}
  if "text_embeds" in batch:
    cond["added_cond_kwargs"] = {"text_embeds": batch["text_embeds"]}
  return cond


def with_time_ids(cond: Cond, time_ids: jax.Array | None) -> Cond:
  """The conditioning at sizes and crops f32[B, 6] of one's own; unchanged without them, or where none is known (SD1.5).

  The text encoders know nothing of them, so that images of any size share one encoding of their prompt.
  """
  if time_ids is None or "added_cond_kwargs" not in cond:
    return cond
  return {**cond, "added_cond_kwargs": {**cond["added_cond_kwargs"], "time_ids": time_ids}}


def errors(model: TextToImage, weights: Any, x_t: jax.Array, t: jax.Array, cond: Cond, target: jax.Array):
  return diffusion.squared_error(model.predict(weights, x_t, t, cond), target)


def uniform_timesteps(model: TextToImage, key: jax.Array, size: int) -> jax.Array:
  """[size] uniform times of the model's process, by the step's key."""
  return model.process.sample_times(named_key(key, "t"), size)


MAX_SAMPLES = 8  # on which the divergence of a moving reference is measured in a step


class Preferred(NamedTuple):
  """Samples that a moving reference must not denoise worse than the pre-trained model.

  Attributes:
    x0: f32[B,h,w,C] their latents.
    cond: their conditioning.
    valid: bool[B] which of them count; ties, say, have no preferred sample.
  """

  x0: jax.Array
  cond: Cond
  valid: jax.Array


def first_samples(batch: Batch) -> dict[str, jax.Array]:
  """The first `MAX_SAMPLES` rows of a batch."""
  return {k: v[:MAX_SAMPLES] for k, v in batch.items()}


def divergence(model: TextToImage, w: Weights, preferred: Preferred, key: jax.Array) -> jax.Array:
  """D = E[err_ref(x_t) - err_base(x_t)] over preferred samples, uniform t and noise (arXiv 2505.18736, Section 4).

  Positive when the reference denoises preferred samples worse than the pre-trained model. Mean over H, W, C and
  samples. Two UNet forward passes a sample.

  Returns:
    f32[]; NaN where no sample counts.
  """
  x0 = preferred.x0
  t = uniform_timesteps(model, key, x0.shape[0])
  noise = jax.random.normal(named_key(key, "noise"), x0.shape)
  x_t = model.process.add_noise(x0, noise, t)
  target = model.process.target(x0, noise, t)
  err_ref = errors(model, w.reference, x_t, t, preferred.cond, target)
  found = reference.divergence(err_ref, errors(model, w.base, x_t, t, preferred.cond, target), preferred.valid)
  return jnp.where(jnp.any(preferred.valid), found, jnp.nan)


def divergence_of_samples(model: TextToImage, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
  """`divergence` on the samples `latents` f32[B,h,w,C] of an online method."""
  few = first_samples(batch)
  preferred = Preferred(few["latents"], text(model, w.base, few), jnp.ones(few["latents"].shape[:1], bool))
  return divergence(model, w, preferred, key)


def decode_prediction(
  model: TextToImage,
  weights: Any,
  x_t: jax.Array,
  t: jax.Array,
  input_ids: jax.Array,
  guidance_scale: float,
  time_ids: jax.Array | None = None,
  *,
  size: int = 0,
) -> jax.Array:
  """Images f32[N,H,W,3] of the guided x0-prediction at x_t f32[N,h,w,C]; prompts repeat to N rows; size: of `decode`.

  SDXL's time_ids f32[N,6] condition both the prompt's and the unconditional prediction, as diffusers' pipeline does.
  """
  cond = model.encode_text(weights, input_ids)
  times = x_t.shape[0] // input_ids.shape[0]
  cond = with_time_ids(jax.tree.map(lambda c: jnp.concatenate([c] * times), cond), time_ids)
  uncond = with_time_ids(model.encode_empty(weights, 1), time_ids)
  predict = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
  return model.decode(weights, model.process.to_x0(predict(x_t, t, cond), x_t, t), size=size)
