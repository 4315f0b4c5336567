"""Discrete-time Gaussian diffusion: noise schedules and prediction types.

    x_t = alpha_t x_0 + sigma_t eps,   alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)

`alpha_sigma` gives the two coefficients at a timestep. Noise, targets and conversions between predictions are written
in terms of them, samplers and weights in terms of abar. All arithmetic is float32 whatever the input dtype: one bf16
ulp of a squared error moves a Diffusion-DPO logit by more than 1 at beta = 5000.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion import arrays

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# Denominators are floored here. Far below every alpha_t a schedule reaches on its way down (the
# cosine schedule ends at 4.9e-5), so it acts only where alpha_t is exactly 0: zero terminal SNR.
MIN_COEFFICIENT = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A noise schedule and the conventions of the network trained with it: a pytree of two arrays.

  Attributes:
    alphas_cumprod: f32[T] abar_t, decreasing in t.
    final_alpha_cumprod: f32[] the abar at "t = -1": 1, or abar_0 (`set_alpha_to_one`).
    prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample" (static).
    timestep_spacing: "leading", "trailing" or "linspace" (static).
    steps_offset: number added to the timesteps of the "leading" spacing (static).
  """

  alphas_cumprod: jax.Array | np.ndarray
  final_alpha_cumprod: jax.Array | np.ndarray
  prediction_type: str = "epsilon"
  timestep_spacing: str = "leading"
  steps_offset: int = 0

  @property
  def num_train_timesteps(self) -> int:
    return self.alphas_cumprod.shape[0]


jax.tree_util.register_dataclass(
  Schedule,
  data_fields=["alphas_cumprod", "final_alpha_cumprod"],
  meta_fields=["prediction_type", "timestep_spacing", "steps_offset"],
)


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
  """Builds the schedule that a diffusers `scheduler_config.json` describes.

  Reads what `DDIMScheduler.from_config` would read, with its defaults for absent keys, whichever scheduler class wrote
  the file. It holds numpy arrays, so nothing touches a device.

  Args:
    config: the parsed JSON. Used: num_train_timesteps, beta_start, beta_end, beta_schedule,
      trained_betas, rescale_betas_zero_snr, snr_shift_scale, set_alpha_to_one, prediction_type,
      timestep_spacing, steps_offset; null means the default. Classes and keys of another process (flow matching, EDM)
      and clipping or thresholding of x_0 raise; keys that only choose a sampler are ignored.
  Returns:
    The `Schedule`.
  Raises:
    ValueError: names a value that is unknown or not implemented.
  References:
    Zero terminal SNR: Lin et al., arXiv 2305.08891, Algorithm 1.

  >>> schedule = schedule_from_config(
  ...   {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
  >>> print(schedule.num_train_timesteps, round(float(schedule.alphas_cumprod[-1]), 5))
  1000 0.00466
  """
  config = {key: value for key, value in config.items() if value is not None}
  _check_process(config)
  num_train_timesteps = int(config.get("num_train_timesteps", 1000))
  beta_start, beta_end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
  beta_schedule = config.get("beta_schedule", "linear")
  prediction_type = config.get("prediction_type", "epsilon")
  timestep_spacing = config.get("timestep_spacing", "leading")
  arrays.check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
  arrays.check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
  for key in ("clip_sample", "thresholding"):
    if config.get(key):
      raise ValueError(
        f"scheduler config: {key} is true, but changing the predicted x_0 is not implemented "
        f"(latent diffusion does not use it); set it to false."
      )

  if "trained_betas" in config:
    betas = np.asarray(config["trained_betas"], np.float32)
    if betas.shape != (num_train_timesteps,):
      raise ValueError(
        f"scheduler config: trained_betas has shape {betas.shape}, expected "
        f"({num_train_timesteps},); set num_train_timesteps to its length."
      )
  else:
    arrays.check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
    if beta_schedule == "linear":
      betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float32)
    elif beta_schedule == "scaled_linear":
      betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float32)
      betas = betas**2
    else:
      betas = _squared_cosine_betas(num_train_timesteps)
  shift = config.get("snr_shift_scale", 1.0)  # CogVideoX: SNR / shift, before the terminal SNR is set to 0
  # The product is accumulated in float64 and rounded once, as torch.cumprod does on the CPU.
  alphas_cumprod = np.cumprod(np.float32(1.0) - betas, dtype=np.float64).astype(np.float32)
  if shift != 1.0:
    alphas_cumprod = (alphas_cumprod / (shift + (1.0 - shift) * alphas_cumprod)).astype(np.float32)
  if config.get("rescale_betas_zero_snr"):
    rescaled = _rescale_zero_terminal_snr(alphas_cumprod)
    if shift == 1.0:  # as in diffusers, which converts back to betas here
      alphas = np.concatenate([rescaled[:1], rescaled[1:] / rescaled[:-1]])
      betas = (np.float32(1.0) - alphas).astype(np.float32)
      rescaled = np.cumprod(np.float32(1.0) - betas, dtype=np.float64)
    alphas_cumprod = rescaled.astype(np.float32)
  to_one = config.get("set_alpha_to_one", True)
  return Schedule(
    alphas_cumprod=alphas_cumprod,
    final_alpha_cumprod=np.asarray(1.0 if to_one else alphas_cumprod[0], np.float32),
    prediction_type=prediction_type,
    timestep_spacing=timestep_spacing,
    steps_offset=int(config.get("steps_offset", 0)),
  )


def _squared_cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> np.ndarray:
  def alpha_bar(u):
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

  steps = [i / num_train_timesteps for i in range(num_train_timesteps + 1)]
  pairs = zip(steps[:-1], steps[1:], strict=True)
  return np.asarray([min(1 - alpha_bar(u1) / alpha_bar(u0), max_beta) for u0, u1 in pairs], np.float32)


def _rescale_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(abar) so that it ends at 0 and starts where it did (2305.08891)."""
  sqrt_bar = np.sqrt(alphas_cumprod)
  first, last = sqrt_bar[0], sqrt_bar[-1]
  return ((sqrt_bar - last) * (first / (first - last))) ** 2


# Classes of diffusers whose process has discrete betas; they differ in how they sample from it.
_DISCRETE_BETAS = frozenset(
  "CogVideoXDDIM CogVideoXDPM DDIMInverse DDIMParallel DDIM DDPMParallel DDPM DEISMultistep DPMSolverMultistepInverse "
  "DPMSolverMultistep DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete "
  "KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM RePaint SASolver TCD UnCLIP UniPCMultistep".split()
)


def _check_process(config: Mapping[str, Any]) -> None:
  """Raises for a config of another process than the forward process of discrete betas.

  Raises:
    ValueError: names the class or the key.
  """
  name = config.get("_class_name", "DDIMScheduler")
  if name.removeprefix("Flax").removesuffix("Scheduler") not in _DISCRETE_BETAS:
    raise ValueError(
      f"scheduler config: _class_name is {name}, expected a scheduler of diffusers with discrete betas, such as "
      "DDIMScheduler, PNDMScheduler or EulerDiscreteScheduler; flow matching and EDM are other processes."
    )
  if config.get("use_flow_sigmas"):
    raise ValueError(
      "scheduler config: use_flow_sigmas is true, expected false; flow matching is another process than discrete betas."
    )
  if config.get("timestep_type", "discrete") != "discrete":
    raise ValueError(
      f"scheduler config: timestep_type is {config['timestep_type']!r}, expected 'discrete'; a network that is given "
      "log sigma as its time (EDM) was trained with another process."
    )


# ---------------------------------------------------------------------------------------------
# The forward process and the prediction types


def alpha_sigma(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the coefficients of signal and noise at t.

  Args:
    schedule: the noise schedule.
    t: i32[...] timesteps in [0, T).
  Returns:
    (alpha_t, sigma_t), f32 of t's shape: sqrt(abar_t) and sqrt(1 - abar_t).
  """
  abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t]
  return jnp.sqrt(abar), jnp.sqrt(1.0 - abar)


def snr(schedule: Schedule, t: jax.Array) -> jax.Array:
  """Returns the signal-to-noise ratio abar_t / (1 - abar_t), f32 of t's shape; 0 at zero terminal SNR."""
  abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t]
  return abar / jnp.maximum(1.0 - abar, MIN_COEFFICIENT**2)


def add_noise(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """Diffuses x_0 to time t: alpha_t x_0 + sigma_t noise (arXiv 2006.11239, Eq. 4).

  Args:
    schedule: the noise schedule.
    x0: [B, ...] clean samples.
    noise: [B, ...] standard normal.
    t: i32[B].
  Returns:
    f32[B, ...] x_t.
  Raises:
    ValueError: shapes that disagree.
  """
  arrays.check_batch(t=t, x0=x0, noise=noise)
  alpha, sigma = alpha_sigma(schedule, t)
  return arrays.expand(alpha, x0) * arrays.f32(x0) + arrays.expand(sigma, x0) * arrays.f32(noise)


def training_target(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """Returns what the network must predict: noise, x_0, or v = alpha_t noise - sigma_t x_0 (2202.00512).

  Args:
    schedule: its prediction_type decides.
    x0: [B, ...] clean samples.
    noise: [B, ...] the noise that was added.
    t: i32[B].
  Returns:
    f32[B, ...] the regression target.
  Raises:
    ValueError: shapes that disagree.
  """
  arrays.check_batch(t=t, x0=x0, noise=noise)
  if schedule.prediction_type == "epsilon":
    return arrays.f32(noise)
  if schedule.prediction_type == "sample":
    return arrays.f32(x0)
  return get_velocity(schedule, x0, noise, t)


def get_velocity(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """Returns v = alpha_t noise - sigma_t x_0 (Salimans and Ho, arXiv 2202.00512, Section 4), f32[B, ...]."""
  arrays.check_batch(t=t, x0=x0, noise=noise)
  alpha, sigma = alpha_sigma(schedule, t)
  return arrays.expand(alpha, x0) * arrays.f32(noise) - arrays.expand(sigma, x0) * arrays.f32(x0)


def convert_prediction(
  schedule: Schedule,
  pred: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
  *,
  target: str,
  source: str | None = None,
) -> jax.Array:
  """Rewrites a prediction about x_t as one of another type.

  Where alpha_t is 0 (zero terminal SNR) an epsilon prediction says nothing about x_0 or v; its
  denominator is floored at 1e-6, so that the result is huge but finite. v and sample predictions
  are exact there, which is why such schedules are trained with them.

  Args:
    schedule: the noise schedule.
    pred: [B, ...] the prediction.
    x_t: [B, ...] the noisy sample it is about.
    t: i32[B].
    target: "epsilon", "v_prediction" or "sample": the type to return.
    source: the type of `pred`; the schedule's prediction_type by default.
  Returns:
    f32[B, ...].
  Raises:
    ValueError: shapes that disagree, or an unknown type.
  """
  arrays.check_batch(t=t, x_t=x_t, pred=pred)
  source = schedule.prediction_type if source is None else source
  arrays.check_choice("source", source, PREDICTION_TYPES)
  arrays.check_choice("target", target, PREDICTION_TYPES)
  pred, x_t = arrays.f32(pred), arrays.f32(x_t)
  if source == target:
    return pred
  alpha, sigma = (arrays.expand(c, x_t) for c in alpha_sigma(schedule, t))
  safe_alpha = jnp.maximum(alpha, MIN_COEFFICIENT)
  safe_sigma = jnp.maximum(sigma, MIN_COEFFICIENT)
  match source, target:
    case "epsilon", "sample":
      return (x_t - sigma * pred) / safe_alpha
    case "epsilon", "v_prediction":
      return (pred - sigma * x_t) / safe_alpha
    case "sample", "epsilon":
      return (x_t - alpha * pred) / safe_sigma
    case "sample", "v_prediction":
      return (alpha * x_t - pred) / safe_sigma
    case "v_prediction", "epsilon":
      return alpha * pred + sigma * x_t
    case _:  # v_prediction -> sample
      return alpha * x_t - sigma * pred


def to_x0(schedule: Schedule, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
  """Returns the network's output as a prediction of x_0, f32[B, ...]; see `convert_prediction`."""
  return convert_prediction(schedule, pred, x_t, t, target="sample")


def to_epsilon(schedule: Schedule, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
  """Returns the network's output as a prediction of the noise, f32[B, ...]; see `convert_prediction`."""
  return convert_prediction(schedule, pred, x_t, t, target="epsilon")


def to_velocity(schedule: Schedule, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
  """Returns the network's output as a prediction of v, f32[B, ...]; see `convert_prediction`."""
  return convert_prediction(schedule, pred, x_t, t, target="v_prediction")


def squared_error(pred: jax.Array, target: jax.Array) -> jax.Array:
  """Returns the squared error, averaged over everything but the batch, in float32.

  Args:
    pred: [B, ...] the network's output.
    target: [B, ...] from `training_target`.
  Returns:
    f32[B] mean over H, W, C: the `err` that the losses take.
  Raises:
    ValueError: shapes that disagree.
  """
  arrays.check_same_shape(pred=pred, target=target)
  return jnp.mean(jnp.square(arrays.f32(pred) - arrays.f32(target)), axis=tuple(range(1, pred.ndim)))
