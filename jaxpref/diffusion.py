"""Discrete-time Gaussian diffusion: noise schedules, prediction types, samplers, timestep sampling.

    x_t = alpha_t x_0 + sigma_t eps,   alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)

`alpha_sigma` gives the two coefficients at a timestep; noise, targets and conversions between predictions are written
in terms of them, samplers and weights in terms of abar. All arithmetic is float32 whatever the input dtype: one bf16
ulp of a squared error moves a Diffusion-DPO logit by more than 1 at beta = 5000.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# Denominators are floored here. Far below every alpha_t a schedule reaches on its way down (the
# cosine schedule ends at 4.9e-5), so it acts only where alpha_t is exactly 0: zero terminal SNR.
_MIN_COEFFICIENT = 1e-6
# 1/sqrt(SNR) of the scaled-linear schedule of Stable Diffusion ends at an SNR just above this.
_STABLE_DIFFUSION_MIN_SNR = 4.6e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A noise schedule and the conventions of the network trained with it; a pytree of two arrays.

  Attributes:
    alphas_cumprod: f32[T] abar_t, decreasing in t.
    final_alpha_cumprod: f32[] the abar that stands at "t = -1": 1, or abar_0 (`set_alpha_to_one`).
    prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample" (static).
    timestep_spacing: "leading", "trailing" or "linspace" (static).
    steps_offset: added to the timesteps of the "leading" spacing (static).
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

  Reads what `DDIMScheduler.from_config` would, with its defaults for absent keys, whichever
  scheduler class wrote the file. Holds numpy arrays, so that nothing touches a device.

  Args:
    config: the parsed JSON. Used: num_train_timesteps, beta_start, beta_end, beta_schedule,
      trained_betas, rescale_betas_zero_snr, snr_shift_scale, set_alpha_to_one, prediction_type,
      timestep_spacing, steps_offset; null stands for the default. Classes and keys of another process (flow matching,
      EDM) and clipping or thresholding of x_0 are refused; keys that only choose a sampler are ignored.
  Returns:
    The `Schedule`.
  Raises:
    ValueError: a value that is unknown or not implemented, by name.
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
  _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
  _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
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
    _check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
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
    if shift == 1.0:  # as diffusers, which turns back to betas here
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
  return np.asarray([min(1 - alpha_bar(u1) / alpha_bar(u0), max_beta) for u0, u1 in pairs],
                    np.float32)


def _rescale_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(abar) so that it ends at 0 and starts where it did (2305.08891)."""
  sqrt_bar = np.sqrt(alphas_cumprod)
  first, last = sqrt_bar[0], sqrt_bar[-1]
  return ((sqrt_bar - last) * (first / (first - last))) ** 2


# Classes of diffusers whose process is discrete betas; they differ in how they sample from it.
_DISCRETE_BETAS = frozenset(
  "CogVideoXDDIM CogVideoXDPM DDIMInverse DDIMParallel DDIM DDPMParallel DDPM DEISMultistep DPMSolverMultistepInverse "
  "DPMSolverMultistep DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete "
  "KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM RePaint SASolver TCD UnCLIP UniPCMultistep".split()
)


def _check_process(config: Mapping[str, Any]) -> None:
  """Refuses what describes another process than the forward process of discrete betas.

  Raises:
    ValueError: a class or a key, by name.
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
  """Coefficients of signal and noise at t.

  Args:
    schedule: the noise schedule.
    t: i32[...] timesteps in [0, T).
  Returns:
    (alpha_t, sigma_t), f32 of t's shape: sqrt(abar_t) and sqrt(1 - abar_t).
  """
  abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t]
  return jnp.sqrt(abar), jnp.sqrt(1.0 - abar)


def snr(schedule: Schedule, t: jax.Array) -> jax.Array:
  """Signal-to-noise ratio abar_t / (1 - abar_t), f32 of t's shape; 0 at zero terminal SNR."""
  abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t]
  return abar / jnp.maximum(1.0 - abar, _MIN_COEFFICIENT**2)


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
  _check_batch(t=t, x0=x0, noise=noise)
  alpha, sigma = alpha_sigma(schedule, t)
  return _expand(alpha, x0) * _f32(x0) + _expand(sigma, x0) * _f32(noise)


def training_target(
  schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
  """What the network must predict: noise, x_0, or v = alpha_t noise - sigma_t x_0 (2202.00512).

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
  _check_batch(t=t, x0=x0, noise=noise)
  if schedule.prediction_type == "epsilon":
    return _f32(noise)
  if schedule.prediction_type == "sample":
    return _f32(x0)
  return get_velocity(schedule, x0, noise, t)


def get_velocity(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """v = alpha_t noise - sigma_t x_0 (Salimans and Ho, arXiv 2202.00512, Section 4), f32[B, ...]."""
  _check_batch(t=t, x0=x0, noise=noise)
  alpha, sigma = alpha_sigma(schedule, t)
  return _expand(alpha, x0) * _f32(noise) - _expand(sigma, x0) * _f32(x0)


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
  _check_batch(t=t, x_t=x_t, pred=pred)
  source = schedule.prediction_type if source is None else source
  _check_choice("source", source, PREDICTION_TYPES)
  _check_choice("target", target, PREDICTION_TYPES)
  pred, x_t = _f32(pred), _f32(x_t)
  if source == target:
    return pred
  alpha, sigma = (_expand(c, x_t) for c in alpha_sigma(schedule, t))
  safe_alpha = jnp.maximum(alpha, _MIN_COEFFICIENT)
  safe_sigma = jnp.maximum(sigma, _MIN_COEFFICIENT)
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
  """The network's output as a prediction of x_0, f32[B, ...]; see `convert_prediction`."""
  return convert_prediction(schedule, pred, x_t, t, target="sample")


def to_epsilon(schedule: Schedule, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
  """The network's output as a prediction of the noise, f32[B, ...]; see `convert_prediction`."""
  return convert_prediction(schedule, pred, x_t, t, target="epsilon")


def to_velocity(schedule: Schedule, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
  """The network's output as a prediction of v, f32[B, ...]; see `convert_prediction`."""
  return convert_prediction(schedule, pred, x_t, t, target="v_prediction")


def squared_error(pred: jax.Array, target: jax.Array) -> jax.Array:
  """Squared error, averaged over everything but the batch, in float32.

  Args:
    pred: [B, ...] the network's output.
    target: [B, ...] from `training_target`.
  Returns:
    f32[B] mean over H, W, C: the `err` that the losses take.
  Raises:
    ValueError: shapes that disagree.
  """
  _check_same_shape(pred=pred, target=target)
  return jnp.mean(jnp.square(_f32(pred) - _f32(target)), axis=tuple(range(1, pred.ndim)))


# ---------------------------------------------------------------------------------------------
# DDIM


def ddim_timesteps(schedule: Schedule, num_steps: int) -> np.ndarray:
  """The timesteps of a DDIM sampler, as diffusers' `DDIMScheduler.set_timesteps` spaces them.

  Args:
    schedule: gives the spacing, the offset and T.
    num_steps: number of sampling steps, at most T.
  Returns:
    i32[num_steps] numpy array, descending.
  Raises:
    ValueError: more steps than the schedule has, or an offset that leaves it.
  References:
    Spacings: arXiv 2305.08891, Table 2.

  >>> schedule = schedule_from_config({"steps_offset": 1})
  >>> ddim_timesteps(schedule, 5)
  array([801, 601, 401, 201,   1], dtype=int32)
  """
  total = schedule.num_train_timesteps
  if not 1 <= num_steps <= total:
    raise ValueError(
      f"num_steps is {num_steps}, expected between 1 and the schedule's {total} timesteps."
    )
  _check_choice("timestep_spacing", schedule.timestep_spacing, TIMESTEP_SPACINGS)
  timesteps: np.ndarray
  if schedule.timestep_spacing == "linspace":
    timesteps = np.linspace(0, total - 1, num_steps).round()[::-1]
  elif schedule.timestep_spacing == "leading":
    timesteps = np.arange(num_steps)[::-1] * (total // num_steps) + schedule.steps_offset
  else:
    # num_steps values, also where rounding of the step makes diffusers' own arange return one
    # more (whose timestep would be -1).
    timesteps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
  if timesteps[0] >= total:
    raise ValueError(
      f"{num_steps} steps with steps_offset {schedule.steps_offset} start at timestep "
      f"{int(timesteps[0])}, outside the schedule's {total}; use fewer steps."
    )
  return timesteps.astype(np.int32)


def ddim_prev_timesteps(
  schedule: Schedule, num_steps: int, *, clamp_last: bool = False
) -> np.ndarray:
  """Where each step of `ddim_timesteps` goes: t - T // num_steps, as diffusers has it.

  Args:
    schedule: as for `ddim_timesteps`.
    num_steps: number of sampling steps.
    clamp_last: False leaves the last step's target negative, which stands for
      `final_alpha_cumprod`; with abar = 1 there the last transition has std 0 and no density. True
      clamps it to 0 (abar_0), as SPO's reference implementation does, so that std stays positive
      and the last transition can be trained on.
  Returns:
    i32[num_steps] numpy array.
  Raises:
    ValueError: with `clamp_last`, steps that end at timestep 0, from where the last one goes nowhere.

  >>> schedule = schedule_from_config({"steps_offset": 1})
  >>> ddim_prev_timesteps(schedule, 5)
  array([ 601,  401,  201,    1, -199], dtype=int32)
  >>> ddim_prev_timesteps(schedule, 5, clamp_last=True)
  array([601, 401, 201,   1,   0], dtype=int32)
  """
  t = ddim_timesteps(schedule, num_steps)
  if clamp_last and t[-1] == 0:
    raise ValueError(
      f"the last of {num_steps} steps of this schedule starts at timestep 0, so it has no noise, and no density to "
      'train on; set "steps_offset": 1 (for spacing "leading") or "timestep_spacing": "trailing" in its '
      "scheduler_config.json."
    )
  prev = t - schedule.num_train_timesteps // num_steps
  return (np.maximum(prev, 0) if clamp_last else prev).astype(np.int32)


def ddim_mean_std(
  schedule: Schedule,
  pred: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
  prev_t: jax.Array,
  *,
  eta: float,
) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of the DDIM transition p(x_prev | x_t).

      std  = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
      mean = sqrt(abar_prev) x0_hat + sqrt(1 - abar_prev - std^2) eps_hat

  Args:
    schedule: the noise schedule.
    pred: [B, ...] the (guided) network output, of the schedule's prediction_type.
    x_t: [B, ...] the current sample.
    t: i32[B] its timestep.
    prev_t: i32[B] the timestep to go to, from `ddim_prev_timesteps`. Negative values stand for
      `final_alpha_cumprod`; clamp them to 0 for a last step with positive std, as SPO does.
    eta: 0 is deterministic DDIM, 1 ancestral sampling; a larger value than the variance left at
      prev_t allows drops the noise direction altogether.
  Returns:
    mean f32[B, ...] and std f32[B]. The sample is mean + std * noise.
  Raises:
    ValueError: shapes that disagree.
  References:
    Song et al., arXiv 2010.02502, Eq. 12 and 16.
  """
  _check_batch(t=t, x_t=x_t, pred=pred, prev_t=prev_t)
  abars = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
  abar = abars[t]
  final = jnp.asarray(schedule.final_alpha_cumprod, jnp.float32)
  abar_prev = jnp.where(prev_t < 0, final, abars[jnp.maximum(prev_t, 0)])
  # Both zero only for a step that goes nowhere from zero terminal SNR; its ratio is 1.
  ratio = jnp.where(abar_prev > 0, abar / jnp.where(abar_prev > 0, abar_prev, 1.0), 1.0)
  floor = _MIN_COEFFICIENT**2
  variance = (1.0 - abar_prev) / jnp.maximum(1.0 - abar, floor) * (1.0 - ratio)
  std = eta * jnp.sqrt(jnp.maximum(variance, 0.0))
  direction = jnp.sqrt(jnp.maximum(1.0 - abar_prev - jnp.square(std), 0.0))
  x0 = to_x0(schedule, pred, x_t, t)
  eps = to_epsilon(schedule, pred, x_t, t)
  mean = _expand(jnp.sqrt(abar_prev), x_t) * x0 + _expand(direction, x_t) * eps
  return mean, std


def gaussian_log_prob(
  x: jax.Array, mean: jax.Array, std: jax.Array, *, min_std: float = 1e-6
) -> jax.Array:
  """log N(x; mean, std^2), averaged over everything but the batch, constants included.

  The mean (not the sum) over H, W, C is the convention of the step-wise losses: their clip range
  and beta are tuned to it.

  Args:
    x: [B, ...] where the density is taken. A sample drawn from the same mean must be passed
      through `stop_gradient` first, or the gradient cancels.
    mean: [B, ...] from `ddim_mean_std`.
    std: f32[B].
    min_std: std is floored here. A deterministic transition has no density; the value is then
      finite and meaningless, for the caller to mask.
  Returns:
    f32[B], mean over H, W, C.
  Raises:
    ValueError: shapes that disagree.

  >>> x = jnp.zeros((1, 2, 2, 1))
  >>> print(jnp.array_str(gaussian_log_prob(x, x, jnp.ones(1)), precision=4))
  [-0.9189]
  """
  _check_batch(std=std, x=x, mean=mean)
  std = jnp.maximum(_f32(std), min_std)
  z = (_f32(x) - _f32(mean)) / _expand(std, x)
  axes = tuple(range(1, x.ndim))
  return -0.5 * jnp.mean(jnp.square(z), axis=axes) - jnp.log(std) - 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------
# DPM-Solver++


class SolverSteps(NamedTuple):
  """The steps of a second-order multistep sampler, one entry each; numpy arrays [num_steps].

      x0     = x0_of_x x + x0_of_pred pred(x, t)
      x_next = keep x + new x0 + old x0_before

  Attributes:
    t: i32, descending: the time condition of the network.
    x0_of_x, x0_of_pred: f32, from the network's output to the prediction of x_0.
    keep, new, old: f32, `old` is 0 in the first step and wherever the step is of first order.
  """

  t: np.ndarray
  x0_of_x: np.ndarray
  x0_of_pred: np.ndarray
  keep: np.ndarray
  new: np.ndarray
  old: np.ndarray


def dpm_solver_timesteps(schedule: Schedule, num_steps: int) -> np.ndarray:
  """The timesteps of DPM-Solver, as diffusers' `DPMSolverMultistepScheduler` spaces them.

  They are not DDIM's: all but "trailing" divide the axis into num_steps + 1 parts and leave out
  the one next to t = 0, which the step to sigma = 0 replaces.

  Args:
    schedule: gives the spacing, the offset and T.
    num_steps: number of sampling steps, below T.
  Returns:
    i32[num_steps] numpy array, descending.
  Raises:
    ValueError: too many steps for the schedule.

  >>> schedule = schedule_from_config({"steps_offset": 1})
  >>> dpm_solver_timesteps(schedule, 4)
  array([801, 601, 401, 201], dtype=int32)
  """
  total, offset = schedule.num_train_timesteps, schedule.steps_offset
  if not 1 <= num_steps < total:
    raise ValueError(f"num_steps is {num_steps}, expected between 1 and {total - 1}, below the schedule's timesteps.")
  _check_choice("timestep_spacing", schedule.timestep_spacing, TIMESTEP_SPACINGS)
  if schedule.timestep_spacing == "trailing":
    return ddim_timesteps(schedule, num_steps)
  timesteps: np.ndarray
  if schedule.timestep_spacing == "linspace":
    timesteps = np.linspace(0, total - 1, num_steps + 1).round()[:0:-1]
  else:
    timesteps = np.arange(num_steps, 0, -1) * (total // (num_steps + 1)) + offset
  if timesteps[0] >= total:
    raise ValueError(
      f"{num_steps} steps with steps_offset {offset} start at timestep {int(timesteps[0])}, outside the schedule's "
      f"{total}; use fewer steps."
    )
  return timesteps.astype(np.int32)


def dpm_solver_steps(schedule: Schedule, num_steps: int, *, karras: bool = False) -> SolverSteps:
  """DPM-Solver++ 2M: second order, multistep, data prediction, from x_T to sigma = 0.

  With sigma = sigma_t / alpha_t, lambda = -log sigma, h = lambda_next - lambda and r = h_before / h:

      x_next = sigma_next / sigma_t x + alpha_next (1 - exp(-h)) ((1 + 1 / 2r) x0 - 1 / 2r x0_before)

  The first step and the last, to sigma = 0, are of first order. Equals diffusers'
  `DPMSolverMultistepScheduler` (dpmsolver++, solver_order 2, midpoint, final sigma zero,
  lower_order_final). Zero terminal SNR starts at abar = 2^-24, as there.

  Args:
    schedule: of concrete arrays, not traced ones.
    num_steps: number of sampling steps, below T.
    karras: the noise levels of arXiv 2206.00364, Eq. 5 (rho 7), over the whole schedule, in place
      of the schedule's timestep_spacing; each is shown to the network as the nearest timestep.
  Returns:
    The `SolverSteps`, computed in float64.
  Raises:
    ValueError: too many steps for the schedule.
  References:
    Lu et al., arXiv 2211.01095, Algorithm 2.
  """
  t = dpm_solver_timesteps(schedule, num_steps)
  abars = np.asarray(schedule.alphas_cumprod, np.float64)
  abars = np.where(abars > 0.0, abars, 2.0**-24)
  train_sigmas = np.sqrt((1.0 - abars) / abars)
  if karras:
    sigmas = np.linspace(train_sigmas[-1] ** (1 / 7), train_sigmas[0] ** (1 / 7), num_steps) ** 7
    t = np.interp(np.log(sigmas), np.log(train_sigmas), np.arange(len(abars))).round().astype(np.int32)
  else:
    sigmas = train_sigmas[t]

  alpha = 1.0 / np.sqrt(sigmas**2 + 1.0)
  if schedule.prediction_type == "epsilon":
    x0_of_x, x0_of_pred = 1.0 / alpha, -sigmas
  elif schedule.prediction_type == "v_prediction":
    x0_of_x, x0_of_pred = alpha, -sigmas * alpha
  else:
    x0_of_x, x0_of_pred = np.zeros(num_steps), np.ones(num_steps)

  next_sigmas, next_alpha = np.append(sigmas[1:], 0.0), np.append(alpha[1:], 1.0)
  ratio = next_sigmas / sigmas  # exp(-h)
  gain = next_alpha * (1.0 - ratio)
  half = np.zeros(num_steps)  # 1 / 2r
  h = -np.log(ratio[:-1])
  half[1:-1] = h[1:] / (2.0 * h[:-1])
  steps = (x0_of_x, x0_of_pred, next_alpha / alpha * ratio, gain * (1.0 + half), -gain * half)
  return SolverSteps(t, *(np.asarray(values, np.float32) for values in steps))


# ---------------------------------------------------------------------------------------------
# Timestep-aware training


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
  whatever num_bins, also where it does not divide T.

  Args:
    key: PRNG key.
    batch: number of timesteps.
    num_train_timesteps: T.
    gamma: decay from bin to bin, in (0, 1]; the paper uses 0.9 and also tries 0.8.
    num_bins: the grid i runs over, which the paper does not state. With one bin a timestep,
      gamma = 0.9 would leave nearly all mass on 30 of 1000; with 20 bins, as many as sampling
      steps, the cleanest bin is drawn 0.14 times as often as the noisiest.
  Returns:
    i32[batch] in [0, T).
  Raises:
    ValueError: gamma or num_bins out of range.
  """
  if gamma <= 0:
    raise ValueError(f"gamma is {gamma}, expected a positive decay, e.g. 0.9, or 1 for uniform.")
  if not 1 <= num_bins <= num_train_timesteps:
    raise ValueError(
      f"num_bins is {num_bins}, expected between 1 and num_train_timesteps {num_train_timesteps}."
    )
  key_bin, key_inside = jax.random.split(key)
  logits = jnp.arange(num_bins, dtype=jnp.float32) * math.log(gamma)
  i = jax.random.categorical(key_bin, logits, shape=(batch,)).astype(jnp.float32)
  u = jax.random.uniform(key_inside, (batch,), jnp.float32)
  steps_from_noise = jnp.floor((i + u) * (num_train_timesteps / num_bins)).astype(jnp.int32)
  return num_train_timesteps - 1 - jnp.clip(steps_from_noise, 0, num_train_timesteps - 1)


def timestep_reward_scale(
  schedule: Schedule, t: jax.Array, *, min_snr: float = _STABLE_DIFFUSION_MIN_SNR
) -> jax.Array:
  """lambda(t) = 1 + minmax_t(1 / sqrt(SNR(t))), the reward scale of arXiv 2505.18736.

  The minimum and maximum are those of the whole schedule, so that lambda does not depend on the
  batch. Pass it as `weight` to any pair loss.

  Args:
    schedule: the noise schedule.
    t: i32[B].
    min_snr: used only by a schedule that reaches zero SNR, where the ratio is infinite and its
      min-max undefined (taking the largest finite one instead would leave lambda at 1 for all but
      the last few steps): SNRs below it count as it. The default is where the schedule of Stable
      Diffusion ends: the steps noisier than that share lambda 2, the others keep the shape the
      paper used.
  Returns:
    f32[B] in [1, 2], largest at the noisiest step.
  """
  abars = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
  ratios = abars / jnp.maximum(1.0 - abars, _MIN_COEFFICIENT**2)
  floor = jnp.where(jnp.min(ratios) > 0, 0.0, min_snr)
  inverse = jax.lax.rsqrt(jnp.maximum(ratios, floor))
  low, high = jnp.min(inverse), jnp.max(inverse)
  return 1.0 + (inverse[t] - low) / (high - low)


# ---------------------------------------------------------------------------------------------


def _f32(x: jax.Array) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def _expand(coefficient: jax.Array, like: jax.Array) -> jax.Array:
  """[B] -> [B, 1, ..., 1] of like's rank: broadcasting is always written out."""
  return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def _check_same_shape(**arrays: jax.Array) -> None:
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) < 1:
    raise ValueError(f"expected arrays of one shape [B, ...], got {shapes}.")


def _check_batch(**arrays: jax.Array) -> None:
  """Checks that [B] and [B, ...] arrays agree: one vector length, one sample shape."""
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  vectors = {s for name, s in shapes.items() if name in ("t", "prev_t", "std")}
  samples = {s for name, s in shapes.items() if name not in ("t", "prev_t", "std")}
  vector, sample = min(vectors), min(samples)
  if len(vectors) != 1 or len(samples) != 1 or len(vector) != 1 or vector != sample[:1]:
    raise ValueError(f"expected timesteps and std [B] and samples [B, ...], got {shapes}.")
