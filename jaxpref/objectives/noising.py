"""What the methods share: latents and conditioning of a batch, noise, and a network's errors on it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref import diffusion, reference
from jaxpref.models.base import Cond, Model, guided
from jaxpref.objectives.base import Batch, Weights, named_key


def latents(model: Model, weights: Any, images: Batch, key: jax.Array) -> jax.Array:
  """Returns latents f32[B,h,w,C] of `pixels`, or drawn the same way from precomputed `moments` [B,h,w,2C]."""
  if "moments" not in images:
    return model.encode_images(weights, images["pixels"], key)
  mean, logvar = jnp.split(images["moments"].astype(jnp.float32), 2, axis=-1)
  return model.draw_latents(mean, logvar, key)


def text(model: Model, weights: Any, batch: Batch) -> Cond:
  """Returns the conditioning on `input_ids`, or the precomputed output of the text encoders."""
  stored = model.restored_text(batch)
  return model.encode_text(weights, batch["input_ids"]) if stored is None else stored


def errors(model: Model, weights: Any, x_t: jax.Array, t: jax.Array, cond: Cond, target: jax.Array) -> jax.Array:
  """Returns `error` f32[B] of the network at x_t f32[B,h,w,C] and t [B]."""
  return error(model, model.predict(weights, x_t, t, cond), target, t)


def error(model: Model, pred: jax.Array, target: jax.Array, t: jax.Array) -> jax.Array:
  """Returns f32[B], squared errors of predictions [B,h,w,C] at t [B]: means over h, w, C, weighed by the process."""
  found, process = diffusion.squared_error(pred, target), model.process
  weight = process.loss_weight(t) if isinstance(process, diffusion.Weighing) else None
  return found if weight is None else weight * found


def training_times(model: Model, key: jax.Array, size: int) -> jax.Array:
  """Returns [size] times of the model's process, drawn with the step's key; uniform unless it says otherwise."""
  return model.process.sample_times(named_key(key, "t"), size)


uniform_timesteps = training_times  # what methods of one's own may still call it

MAX_SAMPLES = 8  # samples on which a step measures the divergence of a moving reference


class Preferred(NamedTuple):
  """Samples that a moving reference must not denoise worse than the pre-trained model.

  Attributes:
    x0: f32[B,h,w,C] their latents.
    cond: their conditioning.
    valid: bool[B] which of them count; ties, for example, have no preferred sample.
  """

  x0: jax.Array
  cond: Cond
  valid: jax.Array


def first_samples(batch: Batch) -> dict[str, jax.Array]:
  """Returns the first `MAX_SAMPLES` rows of a batch."""
  return {k: v[:MAX_SAMPLES] for k, v in batch.items()}


def divergence(model: Model, w: Weights, preferred: Preferred, key: jax.Array) -> jax.Array:
  """Returns D = E[err_ref(x_t) - err_base(x_t)] over preferred samples, times and noise (2505.18736, Section 4).

  It is positive if the reference denoises preferred samples worse than the pre-trained model. Means are over H, W, C
  and samples. It takes two UNet forward passes per sample.

  Returns:
    f32[]; NaN if no sample counts.
  """
  x0 = preferred.x0
  t = training_times(model, key, x0.shape[0])
  noise = jax.random.normal(named_key(key, "noise"), x0.shape)
  x_t = model.process.add_noise(x0, noise, t)
  target = model.process.target(x0, noise, t)
  err_ref = errors(model, w.reference, x_t, t, preferred.cond, target)
  found = reference.divergence(err_ref, errors(model, w.base, x_t, t, preferred.cond, target), preferred.valid)
  return jnp.where(jnp.any(preferred.valid), found, jnp.nan)


def divergence_of_samples(model: Model, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
  """Returns `divergence` on the samples `latents` f32[B,h,w,C] of an online method."""
  few = first_samples(batch)
  preferred = Preferred(few["latents"], text(model, w.base, few), jnp.ones(few["latents"].shape[:1], bool))
  return divergence(model, w, preferred, key)


def decode_prediction(
  model: Model,
  weights: Any,
  x_t: jax.Array,
  t: jax.Array,
  input_ids: jax.Array,
  guidance_scale: float,
  sizes: jax.Array | None = None,
  *,
  size: int = 0,
) -> jax.Array:
  """Returns images f32[N,H,W,3] of the guided x0-prediction at x_t f32[N,h,w,C]; prompts are repeated to N rows.

  Sizes f32[N,6] condition both the prompt's and the unconditional prediction, as in diffusers' SDXL pipeline; `size` is
  an argument of `Model.decode`.
  """
  cond = model.encode_text(weights, input_ids)
  times = x_t.shape[0] // input_ids.shape[0]
  cond = model.sized(jax.tree.map(lambda c: jnp.concatenate([c] * times), cond), sizes)
  uncond = model.sized(model.encode_empty(weights, 1), sizes)
  predict = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
  return model.decode(weights, model.process.to_x0(predict(x_t, t, cond), x_t, t), size=size)
