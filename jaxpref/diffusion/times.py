"""Timestep-aware training (arXiv 2505.18736): draws timesteps, and weighs them."""

import math

import jax
import jax.numpy as jnp

from jaxpref.diffusion.gaussian import MIN_COEFFICIENT, Schedule

# 1/sqrt(SNR) of Stable Diffusion's scaled-linear schedule ends at an SNR just above this.
STABLE_DIFFUSION_MIN_SNR = 4.6e-3


def sample_timesteps(
  key: jax.Array,
  batch: int,
  *,
  num_train_timesteps: int,
  gamma: float = 1.0,
  num_bins: int = 20,
) -> jax.Array:
  """Draws timesteps from Cat(gamma^i) over bins, i = 0 the noisiest (arXiv 2505.18736).

  The time axis is cut into num_bins equal bins from the noisy end; bin i has probability
  proportional to gamma^i, and t is uniform inside the bin. gamma = 1 is the uniform distribution
  for any num_bins, even one that does not divide T.

  Args:
    key: PRNG key.
    batch: number of timesteps.
    num_train_timesteps: T.
    gamma: decay from bin to bin, in (0, 1]; the paper uses 0.9 and also tries 0.8.
    num_bins: number of bins, which the paper does not state. With one bin per timestep, gamma = 0.9
      would leave nearly all mass on 30 of 1000; with 20 bins, as many as sampling steps, the
      cleanest bin is drawn 0.14 times as often as the noisiest.
  Returns:
    i32[batch] in [0, T).
  Raises:
    ValueError: gamma or num_bins is out of range.
  """
  from_noise = bins_from_noise(key, batch, num_train_timesteps=num_train_timesteps, gamma=gamma, num_bins=num_bins)
  steps_from_noise = jnp.floor(from_noise * (num_train_timesteps / num_bins)).astype(jnp.int32)
  return num_train_timesteps - 1 - jnp.clip(steps_from_noise, 0, num_train_timesteps - 1)


def bins_from_noise(key: jax.Array, batch: int, *, num_train_timesteps: int, gamma: float, num_bins: int) -> jax.Array:
  """Draws f32[batch] places in [0, num_bins] on an axis of bins from the noisy end; see `sample_timesteps`."""
  if gamma <= 0:
    raise ValueError(f"gamma is {gamma}, expected a positive decay, e.g. 0.9, or 1 for uniform.")
  if not 1 <= num_bins <= num_train_timesteps:
    raise ValueError(f"num_bins is {num_bins}, expected between 1 and num_train_timesteps {num_train_timesteps}.")
  key_bin, key_inside = jax.random.split(key)
  logits = jnp.arange(num_bins, dtype=jnp.float32) * math.log(gamma)
  i = jax.random.categorical(key_bin, logits, shape=(batch,)).astype(jnp.float32)
  return i + jax.random.uniform(key_inside, (batch,), jnp.float32)


def timestep_reward_scale(schedule: Schedule, t: jax.Array, *, min_snr: float = STABLE_DIFFUSION_MIN_SNR) -> jax.Array:
  """Returns lambda(t) = 1 + minmax_t(1 / sqrt(SNR(t))), the reward scale of arXiv 2505.18736.

  Minimum and maximum are those of the whole schedule, so lambda does not depend on the batch.
  Pass it as `weight` to any pair loss.

  Args:
    schedule: the noise schedule.
    t: i32[B].
    min_snr: floor of the SNR, used only by a schedule that reaches zero SNR, where the ratio is
      infinite and its min-max undefined (the largest finite ratio instead would leave lambda at 1
      for all but the last few steps). The default is where Stable Diffusion's schedule ends: the
      noisier steps share lambda 2, the others keep the shape that the paper used.
  Returns:
    f32[B] in [1, 2], largest at the noisiest step.
  """
  abars = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
  ratios = abars / jnp.maximum(1.0 - abars, MIN_COEFFICIENT**2)
  floor = jnp.where(jnp.min(ratios) > 0, 0.0, min_snr)
  inverse = jax.lax.rsqrt(jnp.maximum(ratios, floor))
  low, high = jnp.min(inverse), jnp.max(inverse)
  return 1.0 + (inverse[t] - low) / (high - low)
