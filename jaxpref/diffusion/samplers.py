"""Samplers as `lax.scan`s over a prediction function: a process's steps, with or without their record; DPM-Solver++.

No sampler knows a network: `predict(x f32[N,h,w,C], t [N]) -> f32[N,h,w,C]` has prompts and guidance bound. Rows are
ordered prompt by prompt, so N may be any multiple of the number of prompts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.diffusion import transitions
from jaxpref.diffusion.gaussian import Schedule
from jaxpref.diffusion.process import Process

# (x f32[B*m,h,w,C], t [B*m]) -> f32[B*m,h,w,C], rows of one prompt side by side
Predict = Callable[[jax.Array, jax.Array], jax.Array]


def rows_at(value: jax.Array, count: int) -> jax.Array:
  """Returns [count] copies of one value: every row is at this time."""
  return jnp.full((count,), value, value.dtype)


def sample(
  predict: Predict, process: Process, x: jax.Array, key: jax.Array, *, num_steps: int, eta: float
) -> jax.Array:
  """Takes a process's steps (e.g. DDIM's, arXiv 2010.02502, Eq. 12) from noise to x_0: `num_steps` calls of `predict`.

  Args:
    x: f32[B,h,w,C] standard normal latents.
    key: used only if eta > 0; one key, or one for each row [B], whose noise then depends on no other row.
  Returns:
    f32[B,h,w,C] clean latents.
  """
  batch = x.shape[0]
  t, prev_t = map(jnp.asarray, process.grid(num_steps))

  def normal(key):
    if key.ndim:
      return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(key)
    return jax.random.normal(key, x.shape)

  def step(x, inputs):
    t, prev_t, key = inputs
    pred = predict(x, rows_at(t, batch))
    mean, std = process.transition(pred, x, rows_at(t, batch), rows_at(prev_t, batch), eta=eta)
    if eta > 0.0:
      mean = mean + std[:, None, None, None] * normal(key)
    return mean, None

  split = lambda k: jax.random.split(k, num_steps)  # noqa: E731
  keys = jax.vmap(split, out_axes=1)(key) if key.ndim else split(key)
  x, _ = jax.lax.scan(step, x, (t, prev_t, keys))
  return x


def dpm_solver_sample(
  predict: Predict, schedule: Schedule, x: jax.Array, *, num_steps: int, karras: bool = False
) -> jax.Array:
  """Samples by DPM-Solver++ 2M (arXiv 2211.01095) from x_T to x_0: deterministic, `num_steps` calls of `predict`.

  Args:
    schedule: has concrete arrays; its timestep_spacing is read as diffusers' scheduler of this name reads it.
    x: f32[B,h,w,C] standard normal latents.
    karras: uses the noise levels of arXiv 2206.00364 instead of the schedule's spacing.
  Returns:
    f32[B,h,w,C] clean latents.
  """
  return solver_sample(predict, transitions.dpm_solver_steps(schedule, num_steps, karras=karras), x)


def solver_sample(predict: Predict, steps: transitions.SolverSteps, x: jax.Array) -> jax.Array:
  """Samples by the steps of a second-order multistep solver, `Solvable.solver_steps` of a process.

  Args:
    x: f32[B,h,w,C] standard normal latents.
  Returns:
    f32[B,h,w,C] clean latents.
  """
  x = x.astype(jnp.float32)

  def step(carry, s):
    x, x0_before = carry
    pred = predict(x, rows_at(s.t, x.shape[0])).astype(jnp.float32)
    x0 = s.x0_of_x * x + s.x0_of_pred * pred
    return (s.keep * x + s.new * x0 + s.old * x0_before, x0), None

  (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), jax.tree.map(jnp.asarray, steps))
  return x


class Trajectories(NamedTuple):
  """Samples with everything a policy gradient needs to know of how they were drawn, in T steps.

  Attributes:
    x: f32[B,T+1,h,w,C] latents, from the noise to those of the image.
    t, prev_t: [T] times where each step starts and ends.
    log_prob: f32[B,T] log-density of each step under the policy that drew it, mean over h, w, C.
  """

  x: jax.Array
  t: jax.Array
  prev_t: jax.Array
  log_prob: jax.Array


def trajectories(
  predict: Predict, process: Process, x: jax.Array, key: jax.Array, *, num_steps: int, eta: float
) -> Trajectories:
  """Samples like `sample` with eta > 0, keeping every latent and density; the rollout of DDPO and GRPO.

  The last step has a density too (DDIM's goes to abar_0 instead of to 1): its std is positive, so all `num_steps` steps
  can be trained on, as in DDPO's reference implementation (arXiv 2305.13301).

  Args:
    x: f32[B,h,w,C] standard normal latents.
  """
  t, prev_t = map(jnp.asarray, process.grid(num_steps, density=True))

  def step(x, inputs):
    t, prev_t, key = inputs
    t, prev_t = rows_at(t, x.shape[0]), rows_at(prev_t, x.shape[0])
    mean, std = process.transition(predict(x, t), x, t, prev_t, eta=eta)
    after = mean + std[:, None, None, None] * jax.random.normal(key, x.shape)
    return after, (after, transitions.gaussian_log_prob(after, mean, std))

  _, (xs, log_prob) = jax.lax.scan(step, x, (t, prev_t, jax.random.split(key, num_steps)))
  return Trajectories(jnp.moveaxis(jnp.concatenate([x[None], xs]), 0, 1), t, prev_t, log_prob.T)
