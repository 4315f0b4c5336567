"""Rectified flow: straight paths from samples to noise, steps back, and the times to train at.

    x_s = (1 - s) x_0 + s e,   v = e - x_0,   s from 0, the sample, to 1, noise (arXiv 2209.03003)

s is what diffusers calls sigma. Functions take s; `RectifiedFlow` puts them behind the interface `Process`, whose times
are t = num_train_timesteps * s: what diffusers tells the network. All arithmetic is float32 whatever the input dtype.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion import arrays, flow_schedule, times
from jaxpref.diffusion.flow_schedule import FlowSchedule, is_number, shifted
from jaxpref.diffusion.transitions import SolverSteps

SPACINGS = ("scheduler", "pipeline")
SDES = ("flow_grpo", "dance", "cps")
TRAINING_TIMES = ("uniform", "logit_normal", "mode")
LOSS_WEIGHTS = ("none", "sigma_sqrt", "cosmap")

_MIN = 1e-6  # floor of denominators that are 0 at the ends, where s is 0 or 1

# ---------------------------------------------------------------------------------------------
# The forward process and the velocity


def add_noise(x0: jax.Array, noise: jax.Array, s: jax.Array) -> jax.Array:
  """Returns f32[B,...], (1 - s) x_0 + s noise of x0 and noise [B,...] at s f32[B]."""
  arrays.check_batch(t=s, x0=x0, noise=noise)
  s = arrays.expand(arrays.f32(s), x0)
  return (1.0 - s) * arrays.f32(x0) + s * arrays.f32(noise)


def target(x0: jax.Array, noise: jax.Array) -> jax.Array:
  """Returns f32[B,...], what the network must predict: the velocity v = noise - x_0."""
  arrays.check_same_shape(x0=x0, noise=noise)
  return arrays.f32(noise) - arrays.f32(x0)


def to_x0(v: jax.Array, x_s: jax.Array, s: jax.Array) -> jax.Array:
  """Returns f32[B,...], x_0 according to the velocity v [B,...] at s f32[B]: x_s - s v."""
  arrays.check_batch(t=s, x_s=x_s, v=v)
  return arrays.f32(x_s) - arrays.expand(arrays.f32(s), x_s) * arrays.f32(v)


def to_noise(v: jax.Array, x_s: jax.Array, s: jax.Array) -> jax.Array:
  """Returns f32[B,...], the noise according to the velocity v [B,...] at s f32[B]: x_s + (1 - s) v."""
  arrays.check_batch(t=s, x_s=x_s, v=v)
  return arrays.f32(x_s) + (1.0 - arrays.expand(arrays.f32(s), x_s)) * arrays.f32(v)


# ---------------------------------------------------------------------------------------------
# Steps back


def mean_std(
  v: jax.Array, x_s: jax.Array, s: jax.Array, next_s: jax.Array, *, eta: float, sde: str = "flow_grpo"
) -> tuple[jax.Array, jax.Array]:
  """Returns mean and standard deviation of a step from s to next_s with noise; `gaussian_log_prob` is its density.

  With ds = next_s - s < 0 and the noise e = x_s + (1 - s) v according to the velocity, the first two are Euler's step
  of the SDE with the ODE's marginals and the noise level g(s):

      mean = x_s + (v + g^2 / 2s e) ds,   std = g sqrt(-ds)
      "flow_grpo"  g = eta sqrt(s / (1 - s)), in which a step from s = 1 has its next_s for s    arXiv 2505.05470
      "dance"      g = eta                                                                       arXiv 2505.07818
      "cps"        mean = (1 - next_s) x_0 + sqrt(next_s^2 - std^2) e,  std = next_s sin(eta pi / 2)
                                                                                                 arXiv 2509.05952

  Args:
    v: [B,...] the (guided) network output.
    x_s: [B,...] the current sample.
    s, next_s: f32[B] its noise level, and that to go to.
    eta: strength of the noise. 0 is Euler's step of the ODE, whichever the SDE; Flow-GRPO uses 0.7.
    sde: "flow_grpo", "dance", or "cps". The noise of "cps" does not shrink with the step, so it is for few steps; its
      last step, to 0, has none.
  Returns:
    mean f32[B,...] and std f32[B]. The sample is mean + std * noise.
  Raises:
    ValueError: shapes that disagree, an unknown SDE, or an eta outside [0, 1] with "cps".
  """
  arrays.check_batch(t=s, x_s=x_s, v=v, prev_t=next_s)
  arrays.check_choice("sde", sde, SDES)
  s, next_s, x_s, v = map(arrays.f32, (s, next_s, x_s, v))
  ds = next_s - s
  mean = x_s + arrays.expand(ds, x_s) * v
  if eta == 0.0:
    return mean, jnp.zeros_like(s)
  if sde == "cps":
    if not 0.0 <= eta <= 1.0:
      raise ValueError(f"eta is {eta}, expected between 0 and 1 for sde 'cps'.")
    std = next_s * math.sin(eta * math.pi / 2)
    of_noise = next_s * (math.cos(eta * math.pi / 2) - 1.0)
  else:
    # g^2 / s
    if sde == "flow_grpo":
      rate = eta**2 / jnp.maximum(1.0 - jnp.where(s >= 1.0 - _MIN, next_s, s), _MIN)
    else:
      rate = eta**2 / jnp.maximum(s, _MIN)
    std = jnp.sqrt(rate * s * jnp.maximum(-ds, 0.0))
    of_noise = 0.5 * rate * ds
  return mean + arrays.expand(of_noise, x_s) * to_noise(v, x_s, s), std


# ---------------------------------------------------------------------------------------------
# Training times


@dataclasses.dataclass(frozen=True)
class TrainingTimes:
  """Where a flow model is trained, before the shift: arXiv 2403.03206, Section 3.1.

  Attributes:
    density: "uniform"; "logit_normal", sigmoid(logit_mean + logit_std z) for a normal z; or "mode",
      1 - u - mode_scale (cos^2(pi u / 2) - 1 + u) for a uniform u.
    logit_mean: above 0 favours noise (below 0 in diffusers' training scripts, which count from the noisy end).
    logit_std: above 0.
    mode_scale: in [-1, 2 / (pi - 2)], above 0 for the middle.
    weight: factor on the loss: "none" is 1, "sigma_sqrt" s^-2, "cosmap" 2 / (pi (1 - 2 s + 2 s^2)).
  """

  density: str = "uniform"
  logit_mean: float = 0.0
  logit_std: float = 1.0
  mode_scale: float = 1.29
  weight: str = "none"

  def __post_init__(self) -> None:
    """Raises ValueError for a name that is unknown or a number out of range."""
    arrays.check_choice("density", self.density, TRAINING_TIMES)
    arrays.check_choice("weight", self.weight, LOSS_WEIGHTS)
    if not is_number(self.logit_mean):
      raise ValueError(f"logit_mean is {self.logit_mean!r}, expected a number.")
    if not (is_number(self.logit_std) and self.logit_std > 0):
      raise ValueError(f"logit_std is {self.logit_std!r}, expected a number above 0.")
    if not (is_number(self.mode_scale) and -1.0 <= self.mode_scale <= 2.0 / (math.pi - 2.0)):
      raise ValueError(f"mode_scale is {self.mode_scale!r}, expected between -1 and 2 / (pi - 2), about 1.752.")


def sample_sigmas(
  key: jax.Array,
  batch: int,
  *,
  training: TrainingTimes = TrainingTimes(),  # noqa: B008 (frozen)
  shift: float = 1.0,
  num_train_timesteps: int = 1000,
  gamma: float = 1.0,
  num_bins: int = 20,
) -> jax.Array:
  """Draws noise levels to train at, shifted as the sampler's are.

  gamma below 1 carries the sampler of arXiv 2505.18736 over to flow: the axis before the shift, which the steps of a
  sampler divide evenly, is cut into num_bins equal bins, and bin i from the noisy end has probability proportional to
  gamma^i. The bins thus run over the sampler's shifted grid. No public result on flow models exists.

  Args:
    key: PRNG key.
    batch: number of levels.
    training: the density, before the shift.
    shift: see `FlowSchedule.shift_at`.
    num_train_timesteps: T; levels below 1 / T, before the shift, become 1 / T, the smallest that diffusers trains at.
    gamma: decay from bin to bin, in (0, 1]; below 1 only with the uniform density.
    num_bins: number of bins.
  Returns:
    f32[batch] in (0, 1].
  Raises:
    ValueError: gamma or num_bins is out of range, or gamma is given with another density.
  """
  if gamma != 1.0 and training.density != "uniform":
    raise ValueError(
      f"gamma is {gamma} with the density {training.density!r}, expected 1: both choose times; or use 'uniform'."
    )
  if training.density == "logit_normal":
    s = jax.nn.sigmoid(training.logit_mean + training.logit_std * jax.random.normal(key, (batch,), jnp.float32))
  elif training.density == "mode":
    u = jax.random.uniform(key, (batch,), jnp.float32)
    s = 1.0 - u - training.mode_scale * (jnp.square(jnp.cos(0.5 * math.pi * u)) - 1.0 + u)
  else:
    s = 1.0 - times.bins_from_noise(
      key, batch, num_train_timesteps=num_train_timesteps, gamma=gamma, num_bins=num_bins
    ) * (1.0 / num_bins)
  return shifted(jnp.clip(s, 1.0 / num_train_timesteps, 1.0), shift)


def loss_weight(s: jax.Array, weight: str) -> jax.Array:
  """Returns the factor f32[B] on the loss at s f32[B] in (0, 1], see `TrainingTimes`."""
  arrays.check_choice("weight", weight, LOSS_WEIGHTS)
  s = arrays.f32(s)
  if weight == "sigma_sqrt":
    return 1.0 / jnp.square(s)
  if weight == "cosmap":
    return 2.0 / (math.pi * (1.0 - 2.0 * s + 2.0 * jnp.square(s)))
  return jnp.ones_like(s)


def reward_scale(s: jax.Array, *, min_snr: float = times.STABLE_DIFFUSION_MIN_SNR) -> jax.Array:
  """Returns lambda(s) = 1 + minmax_s(1 / sqrt(SNR(s))), SNR = ((1 - s) / s)^2: arXiv 2505.18736 carried over to flow.

  The ratio s / (1 - s) diverges at s = 1, so SNR has a floor, as `timestep_reward_scale` has for schedules that reach
  zero SNR: at Stable Diffusion's smallest the ratio is 14.7, and all s above 0.936 share lambda 2. It does not depend
  on the shift. No public result on flow models exists.

  Args:
    s: f32[B] in [0, 1].
    min_snr: floor of the SNR, above 0.
  Returns:
    f32[B] in [1, 2], 1 at the sample.
  """
  s, most = arrays.f32(s), 1.0 / math.sqrt(min_snr)
  return 1.0 + jnp.minimum(s / jnp.maximum(1.0 - s, _MIN), most) / most


# ---------------------------------------------------------------------------------------------
# The process


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
  """The `Process` of rectified flow; times are f32 from 0 to T, num_train_timesteps, the noise level s times T.

  Attributes:
    schedule: noise levels, see `flow_from_config`.
    mu: of a dynamic shift, see `mu_of_tokens`; None with a static one.
    spacing: levels before the shift: "scheduler", to 1 / T; or "pipeline", linspace(1, 1 / n, n), which pipelines such
      as FLUX's give their scheduler. See `flow_schedule.sigma_grid`.
    sde: how noise enters a step, see `mean_std`.
    training: where, and with which weight, a model is trained.
  """

  schedule: FlowSchedule
  mu: float | None = None
  spacing: str = "scheduler"
  sde: str = "flow_grpo"
  training: TrainingTimes = TrainingTimes()

  def __post_init__(self) -> None:
    """Raises ValueError for an unknown name, or a mu that is missing or too much."""
    arrays.check_choice("spacing", self.spacing, SPACINGS)
    arrays.check_choice("sde", self.sde, SDES)
    self.schedule.shift_at(self.mu)

  @property
  def num_train_timesteps(self) -> int:
    return self.schedule.num_train_timesteps

  def sigma(self, t: jax.Array) -> jax.Array:
    """Returns the noise level s = t / T, f32 of t's shape."""
    return arrays.f32(t) / self.num_train_timesteps

  def sample_times(self, key: jax.Array, batch: int, *, gamma: float = 1.0, num_bins: int = 20) -> jax.Array:
    s = sample_sigmas(
      key,
      batch,
      training=self.training,
      shift=self.schedule.shift_at(self.mu),
      num_train_timesteps=self.num_train_timesteps,
      gamma=gamma,
      num_bins=num_bins,
    )
    return s * self.num_train_timesteps

  def loss_weight(self, t: jax.Array) -> jax.Array | None:
    """Returns the factor f32[B] on squared errors at t [B]; None: all are 1."""
    return None if self.training.weight == "none" else loss_weight(self.sigma(t), self.training.weight)

  def reward_scale(self, t: jax.Array) -> jax.Array:
    return reward_scale(self.sigma(t))

  def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    return add_noise(x0, noise, self.sigma(t))

  def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    return target(x0, noise)

  def to_x0(self, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    return to_x0(pred, x_t, self.sigma(t))

  def grid(self, num_steps: int, *, density: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times of `flow_schedule.sigma_grid`; the last step has a density anyway, but with "cps" none."""
    if density and self.sde == "cps":
      raise ValueError("sde is 'cps', whose last step has no noise, so no density; expected 'flow_grpo' or 'dance'.")
    even = [1.0 - i / num_steps for i in range(num_steps)] if self.spacing == "pipeline" else None
    levels = flow_schedule.sigma_grid(self.schedule, num_steps, mu=self.mu, sigmas=even)
    t = levels * np.float32(self.num_train_timesteps)
    return t[:-1], t[1:]

  def transition(
    self, pred: jax.Array, x_t: jax.Array, t: jax.Array, prev_t: jax.Array, *, eta: float
  ) -> tuple[jax.Array, jax.Array]:
    return mean_std(pred, x_t, self.sigma(t), self.sigma(prev_t), eta=eta, sde=self.sde)

  def solver_steps(self, num_steps: int, *, karras: bool = False) -> SolverSteps:
    if karras:
      raise ValueError(
        "karras is true, expected false; DPM-Solver++ on rectified flow has the flow's own noise levels."
      )
    return flow_schedule.solver_steps(self.schedule, num_steps, mu=self.mu)
