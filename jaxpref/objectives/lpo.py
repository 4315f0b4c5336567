"""LPO, latent preference optimisation (arXiv 2502.01051): SPO whose rollout scores noisy latents themselves."""

import jax
import jax.numpy as jnp

from jaxpref.diffusion import Process
from jaxpref.diffusion.samplers import Predict, rows_at
from jaxpref.objectives.pools import PoolRollout, Score, Steps, step_thresholds, step_times


def latent_calls(*, num_steps: int, warmup_steps: int, pool_size: int, inner_steps: int) -> int:
  """Returns guided UNet calls per prompt of `latent_rollout`: one per step, and pool_size for every inner step."""
  groups = (num_steps - warmup_steps) // (inner_steps + 1)
  return warmup_steps + groups * (1 + inner_steps * pool_size)


# Many parameters: see `pool_rollout`.
def latent_rollout(
  predict: Predict,
  score: Score,
  process: Process,
  x: jax.Array,
  key: jax.Array,
  *,
  num_steps: int,
  eta: float,
  warmup_steps: int,
  pool_size: int,
  inner_steps: int,
  threshold: float,
  threshold_max: float | None = None,
  next_latent: str = "random",
  score_time: str = "end",
) -> PoolRollout:
  """Runs LPO's rollout (arXiv 2502.01051): scores the latents at the end of each group themselves, also the last.

  As nothing is predicted for candidates, dropped ones cost no UNet call: `latent_calls` guided calls per prompt.

  Args:
    score: scores latents f32[B*k,h,w,C] at times [B*k].
    warmup_steps: 0 or more.
    score_time: "end", the time of the scored latents, 0 at last; "start", the time of the step to them, which the
      released code gives its reward model.
    others: see `pool_rollout`.
  """
  batch, k, length = x.shape[0], pool_size, inner_steps + 1
  t, prev_t = step_times(process, num_steps)
  limits = step_thresholds(process, num_steps, eta=eta, threshold=threshold, threshold_max=threshold_max)
  steps = Steps(predict, process, batch, x.shape[1:], k, eta, threshold, next_latent)
  key_warmup, key_groups = jax.random.split(key)
  if warmup_steps:
    _, _, x = steps.walk(x, t[:warmup_steps], prev_t[:warmup_steps], key_warmup)

  def group(x, inputs):
    ts, prev_ts, key, limit = inputs
    key_draw, key_walk, key_member = jax.random.split(key, 3)
    members = steps.draw(steps.call(x, ts[0]), x, ts[0], prev_ts[0], key_draw, repeats=k)
    path = members[None]
    if length > 1:
      xs, _, end = steps.walk(members, ts[1:], prev_ts[1:], key_walk)
      path = jnp.concatenate([xs, end[None]])
    time = ts[-1] if score_time == "start" else prev_ts[-1]
    scores = steps.of_pools(score(path[-1], rows_at(time, batch * k)))
    pairs = steps.choose(x, path, scores.total, ts, prev_ts, limit)
    return steps.member(path[-1], scores.total, key_member), (pairs, scores, time)

  num_groups = (num_steps - warmup_steps) // length
  grouped = lambda v: v[warmup_steps:].reshape(num_groups, length)  # noqa: E731
  of_groups = None if limits is None else grouped(limits)[:, 0]
  inputs = (grouped(t), grouped(prev_t), jax.random.split(key_groups, num_groups), of_groups)
  latents, (pairs, scores, score_t) = jax.lax.scan(group, x, inputs)
  pairs = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), pairs)  # [G,B,j,...] -> [B,G,j,...]
  return PoolRollout(
    shared=jax.tree.map(lambda v: v[:, :, 0], pairs),
    separate=jax.tree.map(lambda v: v[:, :, 1:].reshape(batch, num_groups * (length - 1), *v.shape[3:]), pairs),
    latents=latents,
    scores=jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), scores),
    score_t=score_t,
  )
