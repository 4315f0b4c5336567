"""Steps back through the process: DDIM and its density, DPM-Solver++."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion import arrays
from jaxpref.diffusion.gaussian import MIN_COEFFICIENT, TIMESTEP_SPACINGS, Schedule, to_epsilon, to_x0


def ddim_timesteps(schedule: Schedule, num_steps: int) -> np.ndarray:
  """Returns the timesteps of a DDIM sampler, spaced as by diffusers' `DDIMScheduler.set_timesteps`.

  Args:
    schedule: gives the spacing, the offset and T.
    num_steps: number of sampling steps, at most T.
  Returns:
    i32[num_steps] numpy array, descending.
  Raises:
    ValueError: there are more steps than the schedule has, or the offset leaves it.
  References:
    Spacings: arXiv 2305.08891, Table 2.

  >>> schedule = schedule_from_config({"steps_offset": 1})
  >>> ddim_timesteps(schedule, 5)
  array([801, 601, 401, 201,   1], dtype=int32)
  """
  total = schedule.num_train_timesteps
  if not 1 <= num_steps <= total:
    raise ValueError(f"num_steps is {num_steps}, expected between 1 and the schedule's {total} timesteps.")
  arrays.check_choice("timestep_spacing", schedule.timestep_spacing, TIMESTEP_SPACINGS)
  timesteps: np.ndarray
  if schedule.timestep_spacing == "linspace":
    timesteps = np.linspace(0, total - 1, num_steps).round()[::-1]
  elif schedule.timestep_spacing == "leading":
    timesteps = np.arange(num_steps)[::-1] * (total // num_steps) + schedule.steps_offset
  else:
    # num_steps values, even if rounding of the step makes diffusers' own arange return one more
    # (whose timestep would be -1).
    timesteps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
  if timesteps[0] >= total:
    raise ValueError(
      f"{num_steps} steps with steps_offset {schedule.steps_offset} start at timestep "
      f"{int(timesteps[0])}, outside the schedule's {total}; use fewer steps."
    )
  return timesteps.astype(np.int32)


def ddim_prev_timesteps(schedule: Schedule, num_steps: int, *, clamp_last: bool = False) -> np.ndarray:
  """Returns where each step of `ddim_timesteps` goes: t - T // num_steps, as in diffusers.

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
    ValueError: with `clamp_last`, the steps end at timestep 0, from which the last one goes nowhere.

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
      'train on; give the schedule "steps_offset": 1 (for spacing "leading") or "timestep_spacing": "trailing", in '
      "scheduler_config.json of a model's folder."
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
  """Returns mean and standard deviation of the DDIM transition p(x_prev | x_t).

      std  = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
      mean = sqrt(abar_prev) x0_hat + sqrt(1 - abar_prev - std^2) eps_hat

  Args:
    schedule: the noise schedule.
    pred: [B, ...] the (guided) network output, of the schedule's prediction_type.
    x_t: [B, ...] the current sample.
    t: i32[B] its timestep.
    prev_t: i32[B] the timestep to go to, from `ddim_prev_timesteps`. Negative values stand for
      `final_alpha_cumprod`; clamp them to 0 for a last step with positive std, as SPO does.
    eta: 0 is deterministic DDIM, 1 ancestral sampling; a value above what the variance at prev_t
      allows drops the noise direction altogether.
  Returns:
    mean f32[B, ...] and std f32[B]. The sample is mean + std * noise.
  Raises:
    ValueError: shapes that disagree.
  References:
    Song et al., arXiv 2010.02502, Eq. 12 and 16.
  """
  arrays.check_batch(t=t, x_t=x_t, pred=pred, prev_t=prev_t)
  abars = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
  abar = abars[t]
  final = jnp.asarray(schedule.final_alpha_cumprod, jnp.float32)
  abar_prev = jnp.where(prev_t < 0, final, abars[jnp.maximum(prev_t, 0)])
  # Both are zero only for a step that goes nowhere from zero terminal SNR; its ratio is 1.
  ratio = jnp.where(abar_prev > 0, abar / jnp.where(abar_prev > 0, abar_prev, 1.0), 1.0)
  floor = MIN_COEFFICIENT**2
  variance = (1.0 - abar_prev) / jnp.maximum(1.0 - abar, floor) * (1.0 - ratio)
  std = eta * jnp.sqrt(jnp.maximum(variance, 0.0))
  direction = jnp.sqrt(jnp.maximum(1.0 - abar_prev - jnp.square(std), 0.0))
  x0 = to_x0(schedule, pred, x_t, t)
  eps = to_epsilon(schedule, pred, x_t, t)
  mean = arrays.expand(jnp.sqrt(abar_prev), x_t) * x0 + arrays.expand(direction, x_t) * eps
  return mean, std


def gaussian_log_prob(x: jax.Array, mean: jax.Array, std: jax.Array, *, min_std: float = 1e-6) -> jax.Array:
  """Returns log N(x; mean, std^2), averaged over everything but the batch, constants included.

  The mean (not the sum) over H, W, C is the convention of the step-wise losses: their clip range
  and beta are tuned to it.

  Args:
    x: [B, ...] where the density is taken. Pass a sample that was drawn from the same mean through
      `stop_gradient` first, or the gradient cancels.
    mean: [B, ...] from `ddim_mean_std`.
    std: f32[B].
    min_std: floor of std. A deterministic transition has no density; the value is then finite and
      meaningless, for the caller to mask.
  Returns:
    f32[B], mean over H, W, C.
  Raises:
    ValueError: shapes that disagree.

  >>> x = jnp.zeros((1, 2, 2, 1))
  >>> print(jnp.array_str(gaussian_log_prob(x, x, jnp.ones(1)), precision=4))
  [-0.9189]
  """
  arrays.check_batch(std=std, x=x, mean=mean)
  std = jnp.maximum(arrays.f32(std), min_std)
  z = (arrays.f32(x) - arrays.f32(mean)) / arrays.expand(std, x)
  axes = tuple(range(1, x.ndim))
  return -0.5 * jnp.mean(jnp.square(z), axis=axes) - jnp.log(std) - 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------
# DPM-Solver++


class SolverSteps(NamedTuple):
  """The steps of a second-order multistep sampler, one entry each; numpy arrays [num_steps].

      x0     = x0_of_x x + x0_of_pred pred(x, t)
      x_next = keep x + new x0 + old x0_before

  Attributes:
    t: descending: the time condition of the network, i32 timesteps, or f32 times of rectified flow.
    x0_of_x, x0_of_pred: f32, from the network's output to the prediction of x_0.
    keep, new, old: f32; `old` is 0 in the first step and in each step of first order.
  """

  t: np.ndarray
  x0_of_x: np.ndarray
  x0_of_pred: np.ndarray
  keep: np.ndarray
  new: np.ndarray
  old: np.ndarray


def dpm_solver_timesteps(schedule: Schedule, num_steps: int) -> np.ndarray:
  """Returns the timesteps of DPM-Solver, spaced as by diffusers' `DPMSolverMultistepScheduler`.

  They are not DDIM's: all spacings but "trailing" divide the axis into num_steps + 1 parts and omit
  the timestep next to t = 0, which the step to sigma = 0 replaces.

  Args:
    schedule: gives the spacing, the offset and T.
    num_steps: number of sampling steps, below T.
  Returns:
    i32[num_steps] numpy array, descending.
  Raises:
    ValueError: there are too many steps for the schedule.

  >>> schedule = schedule_from_config({"steps_offset": 1})
  >>> dpm_solver_timesteps(schedule, 4)
  array([801, 601, 401, 201], dtype=int32)
  """
  total, offset = schedule.num_train_timesteps, schedule.steps_offset
  if not 1 <= num_steps < total:
    raise ValueError(f"num_steps is {num_steps}, expected between 1 and {total - 1}, below the schedule's timesteps.")
  arrays.check_choice("timestep_spacing", schedule.timestep_spacing, TIMESTEP_SPACINGS)
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
  """Returns the steps of DPM-Solver++ 2M: second order, multistep, data prediction, from x_T to sigma = 0.

  With sigma = sigma_t / alpha_t, lambda = -log sigma, h = lambda_next - lambda and r = h_before / h:

      x_next = sigma_next / sigma_t x + alpha_next (1 - exp(-h)) ((1 + 1 / 2r) x0 - 1 / 2r x0_before)

  The first step and the last, to sigma = 0, are of first order. Equals diffusers'
  `DPMSolverMultistepScheduler` (dpmsolver++, solver_order 2, midpoint, final sigma zero,
  lower_order_final). Zero terminal SNR starts at abar = 2^-24, as there.

  Args:
    schedule: of concrete arrays, not traced ones.
    num_steps: number of sampling steps, below T.
    karras: uses the noise levels of arXiv 2206.00364, Eq. 5 (rho 7), over the whole schedule
      instead of the schedule's timestep_spacing; the network gets the nearest timestep of each.
  Returns:
    The `SolverSteps`, computed in float64.
  Raises:
    ValueError: there are too many steps for the schedule.
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
