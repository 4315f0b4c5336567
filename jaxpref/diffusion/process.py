"""The interface `Process`, through which methods and samplers use a noise process, and Stable Diffusion's process."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from jaxpref.diffusion import gaussian, times, transitions


class Process(Protocol):
  """How samples become noise, and one step back.

  Times are numbers from 0, the sample, to `num_train_timesteps`, noise; the process chooses their dtype. A step is its
  two ends, `t` and `prev_t`, as `grid` returns them. At the ends of the grid they may mean something special (such as
  `prev_t` below 0) to the `transition` of the same process.
  """

  @property
  def num_train_timesteps(self) -> int: ...

  def sample_times(self, key: jax.Array, batch: int, *, gamma: float = 1.0, num_bins: int = 20) -> jax.Array:
    """Draws [batch] times to train at; gamma below 1 favours noisy ones (arXiv 2505.18736), in num_bins bins."""
    ...

  def reward_scale(self, t: jax.Array) -> jax.Array:
    """Returns f32[B] from 1 to 2, the factor on a reward at these times (arXiv 2505.18736)."""
    ...

  def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Returns f32[B,...], x_t of x0 and noise [B,...] at t [B]."""
    ...

  def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Returns f32[B,...], what the network must predict."""
    ...

  def to_x0(self, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns f32[B,...], x0 according to the network's prediction."""
    ...

  def grid(self, num_steps: int, *, density: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns `t` and `prev_t` [num_steps] of the steps from noise to the sample.

    Args:
      density: gives the last step noise too, and so a density, as methods that learn from it need.
    Raises:
      ValueError: the process cannot take that many steps, or has none with a density.
    """
    ...

  def transition(
    self, pred: jax.Array, x_t: jax.Array, t: jax.Array, prev_t: jax.Array, *, eta: float
  ) -> tuple[jax.Array, jax.Array]:
    """Returns mean f32[B,...] and standard deviation f32[B] of a step from t to prev_t [B]; eta 0 is without noise."""
    ...


@runtime_checkable
class Solvable(Process, Protocol):
  """A `Process` that DPM-Solver++ 2M can follow (`samplers.solver_sample`)."""

  def solver_steps(self, num_steps: int, *, karras: bool = False) -> transitions.SolverSteps:
    """Returns the solver's steps from noise to the sample, with Karras' noise levels (arXiv 2206.00364) if asked.

    Raises:
      ValueError: the process cannot take that many steps, or has no such levels.
    """
    ...


@runtime_checkable
class Weighing(Process, Protocol):
  """A `Process` that weighs the errors of a network by their times."""

  def loss_weight(self, t: jax.Array) -> jax.Array | None:
    """Returns the factor f32[B] on squared errors at these times; None: all are 1."""
    ...


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
  """The `Process` of `gaussian`: discrete-time Gaussian diffusion with DDIM's steps; times are i32 timesteps."""

  schedule: gaussian.Schedule

  @property
  def num_train_timesteps(self) -> int:
    return self.schedule.num_train_timesteps

  def sample_times(self, key: jax.Array, batch: int, *, gamma: float = 1.0, num_bins: int = 20) -> jax.Array:
    return times.sample_timesteps(
      key, batch, num_train_timesteps=self.num_train_timesteps, gamma=gamma, num_bins=num_bins
    )

  def reward_scale(self, t: jax.Array) -> jax.Array:
    return times.timestep_reward_scale(self.schedule, t)

  def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    return gaussian.add_noise(self.schedule, x0, noise, t)

  def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    return gaussian.training_target(self.schedule, x0, noise, t)

  def to_x0(self, pred: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    return gaussian.to_x0(self.schedule, pred, x_t, t)

  def grid(self, num_steps: int, *, density: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns DDIM's timesteps. With a density the last step goes to abar_0 instead of `final_alpha_cumprod`."""
    t = transitions.ddim_timesteps(self.schedule, num_steps)
    return t, transitions.ddim_prev_timesteps(self.schedule, num_steps, clamp_last=density)

  def transition(
    self, pred: jax.Array, x_t: jax.Array, t: jax.Array, prev_t: jax.Array, *, eta: float
  ) -> tuple[jax.Array, jax.Array]:
    return transitions.ddim_mean_std(self.schedule, pred, x_t, t, prev_t, eta=eta)

  def solver_steps(self, num_steps: int, *, karras: bool = False) -> transitions.SolverSteps:
    return transitions.dpm_solver_steps(self.schedule, num_steps, karras=karras)
