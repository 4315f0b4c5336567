"""Sampling as `lax.scan`s over a prediction function: DDIM, DPM-Solver++, and the rollouts of online methods.

None knows a network: `predict(x f32[N,h,w,C], t i32[N]) -> f32[N,h,w,C]` has prompts and guidance bound, and rows
are ordered prompt by prompt, so N may be any multiple of the number of prompts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref import diffusion, losses
from jaxpref.diffusion import Schedule

# (x f32[B*m,h,w,C], t i32[B*m]) -> f32[B*m,h,w,C], rows of one prompt side by side
Predict = Callable[[jax.Array, jax.Array], jax.Array]
# (x0 f32[B*m,h,w,C], t i32[B*m]) -> f32[B*m]: scores of predicted clean latents
Score = Callable[[jax.Array, jax.Array], jax.Array]


def _rows(value: Any, count: int) -> jax.Array:
  return jnp.full((count,), value, jnp.int32)


def ddim_sample(
  predict: Predict, schedule: Schedule, x: jax.Array, key: jax.Array, *, num_steps: int, eta: float
) -> jax.Array:
  """DDIM (arXiv 2010.02502, Eq. 12) from x_T to x_0: `num_steps` calls of `predict`.

  Args:
    x: f32[B,h,w,C] standard normal latents.
    key: consumed only if eta > 0; one key, or one for each row [B], whose noise then depends on no other row.
  Returns:
    f32[B,h,w,C] clean latents.
  """
  batch = x.shape[0]
  t = jnp.asarray(diffusion.ddim_timesteps(schedule, num_steps))
  prev_t = jnp.asarray(diffusion.ddim_prev_timesteps(schedule, num_steps))

  def normal(key):
    if key.ndim:
      return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(key)
    return jax.random.normal(key, x.shape)

  def step(x, inputs):
    t, prev_t, key = inputs
    pred = predict(x, _rows(t, batch))
    mean, std = diffusion.ddim_mean_std(schedule, pred, x, _rows(t, batch), _rows(prev_t, batch), eta=eta)
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
  """DPM-Solver++ 2M (arXiv 2211.01095) from x_T to x_0: deterministic, `num_steps` calls of `predict`.

  Args:
    schedule: of concrete arrays; its timestep_spacing is read as diffusers' scheduler of this name does.
    x: f32[B,h,w,C] standard normal latents.
    karras: the noise levels of arXiv 2206.00364 in place of the schedule's spacing.
  Returns:
    f32[B,h,w,C] clean latents.
  """
  x = x.astype(jnp.float32)

  def step(carry, s):
    x, x0_before = carry
    pred = predict(x, _rows(s.t, x.shape[0])).astype(jnp.float32)
    x0 = s.x0_of_x * x + s.x0_of_pred * pred
    return (s.keep * x + s.new * x0 + s.old * x0_before, x0), None

  steps = jax.tree.map(jnp.asarray, diffusion.dpm_solver_steps(schedule, num_steps, karras=karras))
  (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), steps)
  return x


class Trajectories(NamedTuple):
  """Samples with all that a policy gradient needs to know of how they were drawn, in T steps.

  Attributes:
    x: f32[B,T+1,h,w,C] latents, from the noise to those of the image.
    t, prev_t: i32[T] timesteps where each step starts and ends.
    log_prob: f32[B,T] log-density of each step under the policy that drew it, mean over h, w, C.
  """

  x: jax.Array
  t: jax.Array
  prev_t: jax.Array
  log_prob: jax.Array


def ddim_trajectories(
  predict: Predict, schedule: Schedule, x: jax.Array, key: jax.Array, *, num_steps: int, eta: float
) -> Trajectories:
  """As `ddim_sample` with eta > 0, keeping every latent and density; the rollout of DDPO (arXiv 2305.13301) and GRPO.

  The last step goes to abar_0 rather than to 1, so that it has a density, too: its std is positive, and `num_steps`
  steps can be trained on, as in DDPO's reference implementation.

  Args:
    x: f32[B,h,w,C] standard normal latents.
  """
  t = jnp.asarray(diffusion.ddim_timesteps(schedule, num_steps))
  prev_t = jnp.asarray(diffusion.ddim_prev_timesteps(schedule, num_steps, clamp_last=True))

  def step(x, inputs):
    t, prev_t, key = inputs
    t, prev_t = _rows(t, x.shape[0]), _rows(prev_t, x.shape[0])
    mean, std = diffusion.ddim_mean_std(schedule, predict(x, t), x, t, prev_t, eta=eta)
    after = mean + std[:, None, None, None] * jax.random.normal(key, x.shape)
    return after, (after, diffusion.gaussian_log_prob(after, mean, std))

  _, (xs, log_prob) = jax.lax.scan(step, x, (t, prev_t, jax.random.split(key, num_steps)))
  return Trajectories(jnp.moveaxis(jnp.concatenate([x[None], xs]), 0, 1), t, prev_t, log_prob.T)


class Steps(NamedTuple):
  """Steps x -> next to take a policy gradient on, G of them a prompt: those of all its samples.

  Attributes:
    x, next: f32[B,G,h,w,C] where each starts and ends.
    t, prev_t: i32[B,G] timesteps of start and end.
    log_prob: f32[B,G] log-density under the policy that drew it, mean over h, w, C.
    advantage: f32[B,G] of the sample that it is a step of.
    valid: bool[B,G] whether it is trained on.
  """

  x: jax.Array
  next: jax.Array
  t: jax.Array
  prev_t: jax.Array
  log_prob: jax.Array
  advantage: jax.Array
  valid: jax.Array


class Transitions(NamedTuple):
  """Pairs of transitions x -> next of winner and loser, G of them a prompt.

  Attributes:
    x_w, x_l: f32[B,G,h,w,C] where each transition starts.
    next_w, next_l: f32[B,G,h,w,C] where it ends.
    t, prev_t: i32[B,G] timesteps of start and end.
    valid: bool[B,G] whether the pair's gap is above the threshold.
  """

  x_w: jax.Array
  x_l: jax.Array
  next_w: jax.Array
  next_l: jax.Array
  t: jax.Array
  prev_t: jax.Array
  valid: jax.Array


class PoolRollout(NamedTuple):
  """What one SPO rollout leaves behind.

  Attributes:
    shared: transitions whose winner and loser start from the same latent (x_w is x_l).
    separate: the later transitions of a group, which do not; none where all groups are single steps.
    latents: f32[B,h,w,C] the final latents of the path that was followed.
    scores: f32[B,G,k] of all candidates, by group.
    score_t: i32[G] the time condition of each group's scores.
  """

  shared: Transitions
  separate: Transitions
  latents: jax.Array
  scores: jax.Array
  score_t: jax.Array


def pool_calls(*, num_steps: int, warmup_steps: int, pool_size: int) -> int:
  """UNet calls (each guided) a prompt: warmup_steps + 1 single ones, then pool_size for every further step."""
  return warmup_steps + 1 + (num_steps - warmup_steps - 1) * pool_size


def pool_groups(*, num_steps: int, warmup_steps: int, inner_steps: int, pool_last_step: bool = False) -> list[int]:
  """The length of each of `pool_rollout`'s groups, whose first transition winner and loser start from one latent."""
  length = inner_steps + 1
  groups = [length] * ((num_steps - warmup_steps) // length)
  return groups if length > 1 or pool_last_step else [*groups[:-2], 2]


def pool_rollout(
  predict: Predict,
  score: Score,
  schedule: Schedule,
  x: jax.Array,
  key: jax.Array,
  *,
  num_steps: int,
  eta: float,
  warmup_steps: int,
  pool_size: int,
  inner_steps: int,
  threshold: float,
  next_latent: str = "random",
  pool_last_step: bool = False,
) -> PoolRollout:
  """SPO's rollout (arXiv 2406.04314, Algorithm 1), costing `pool_calls` guided UNet calls a prompt.

  After `warmup_steps` ordinary steps, every group of j = inner_steps + 1 steps draws `pool_size` candidates from one
  shared latent; each runs j steps on its own, is scored on its decoded x0-prediction with the timestep it has
  reached, and best and worst form a pair. The call that predicts x0 for the score is the one that denoises next.
  One member of the pool, at random, is where the next group starts. What the last group makes are images, scored with
  time 0.

  Args:
    x: f32[B,h,w,C] standard normal latents.
    threshold: a pair is valid if softmax([s_w, s_l])_w - softmax([s_w, s_l])_l exceeds it.
    next_latent: "random" (the paper), "winner" or "loser".
    pool_last_step: for j = 1 alone: True draws a pool in the last step, too, as published for Stable Diffusion 1.5;
      else the last two steps are one group, so that no image is chosen by its last noise alone. The calls are the same.
  """
  batch, shape, k, length = x.shape[0], x.shape[1:], pool_size, inner_steps + 1
  t = jnp.asarray(diffusion.ddim_timesteps(schedule, num_steps))
  # The last step goes to abar_0 rather than to 1, so that its std is positive, as in the reference implementation.
  prev_t = jnp.append(t[1:], jnp.asarray(diffusion.ddim_prev_timesteps(schedule, num_steps, clamp_last=True))[-1])

  def call(x, t):  # x [B*m,h,w,C], t scalar
    return predict(x, _rows(t, x.shape[0]))

  def draw(pred, x, t, prev_t, key, repeats=1):
    n = x.shape[0]
    mean, std = diffusion.ddim_mean_std(schedule, pred, x, _rows(t, n), _rows(prev_t, n), eta=eta)
    mean, std = jnp.repeat(mean, repeats, axis=0), jnp.repeat(std, repeats, axis=0)
    return mean + std[:, None, None, None] * jax.random.normal(key, mean.shape)

  def walk(x, ts, prev_ts, key):
    """Steps from x at ts[0] on, one `call` each: latents and predictions [n,N,...] at ts[0], ..., ts[n-1].

    A draw follows every call, the last one too, whose result is dropped: so one call is compiled, in a scan.
    """

    def one(x, inputs):
      t, prev_t, key = inputs
      pred = call(x, t)
      return draw(pred, x, t, prev_t, key), (x, pred)

    end, (xs, preds) = jax.lax.scan(one, x, (ts, prev_ts, jax.random.split(key, ts.shape[0])))
    return xs, preds, end

  key_warmup, key_groups, key_last = jax.random.split(key, 3)
  first = slice(0, warmup_steps + 1)
  xs, preds, _ = walk(x, t[first], prev_t[first], key_warmup)
  x, pred = xs[-1], preds[-1]

  def pool(x, pred, ts, prev_ts, key, end_t):
    """Candidates from x [B,...]: path [j,B*k,...] at the ends of their steps, and the prediction at the last."""
    key_draw, key_walk = jax.random.split(key)
    members = draw(pred, x, ts[0], prev_ts[0], key_draw, repeats=k)
    # Walked on from prev_ts[0]; the step after the group is drawn too, and dropped.
    xs, preds, _ = walk(members, jnp.append(ts[1:], end_t), jnp.append(prev_ts[1:], end_t), key_walk)
    return xs, preds[-1]

  def of_pool(values, index):
    """Of each pool the candidate at its index: [B*k,...] -> [B,...]; each device finds those of its own prompts."""
    return jax.vmap(lambda pool, i: pool[i])(values.reshape(batch, k, *shape), index)

  def choose(x, path, scores, ts, prev_ts):
    """Transitions of best and worst: x [B,...] and path [j,B*k,...] -> fields [B,j,...]."""
    best, worst, valid = losses.select_pair(scores, threshold=threshold)
    j = path.shape[0]

    def pick(index):
      members = jax.vmap(lambda values: of_pool(values, index))(path)
      return jnp.moveaxis(jnp.concatenate([x[None], members]), 0, 1)  # [B,j+1,h,w,C]

    w, l = pick(best), pick(worst)
    rows = lambda v: jnp.broadcast_to(v[None], (batch, j))  # noqa: E731
    return Transitions(
      w[:, :-1], l[:, :-1], w[:, 1:], l[:, 1:], rows(ts), rows(prev_ts), jnp.broadcast_to(valid[:, None], (batch, j))
    )

  def member(values, scores, key):
    """The candidate to continue from: [B*k,...] -> [B,...]."""
    if next_latent == "random":
      index = jax.random.randint(key, (batch,), 0, k)
    else:
      index = jnp.argmax(scores, axis=1) if next_latent == "winner" else jnp.argmin(scores, axis=1)
    return of_pool(values, index)

  def group(carry, inputs):
    x, pred = carry
    ts, prev_ts, key = inputs
    key_path, key_member = jax.random.split(key)
    path, end_pred = pool(x, pred, ts, prev_ts, key_path, prev_ts[-1])
    end_t = _rows(prev_ts[-1], batch * k)
    scores = score(diffusion.to_x0(schedule, end_pred, path[-1], end_t), end_t).reshape(batch, k)
    pairs = choose(x, path, scores, ts, prev_ts)
    carry = (member(path[-1], scores, key_member), member(end_pred, scores, key_member))
    return carry, (pairs, scores, prev_ts[-1])

  *groups, last_length = pool_groups(
    num_steps=num_steps, warmup_steps=warmup_steps, inner_steps=inner_steps, pool_last_step=pool_last_step
  )
  num_groups = len(groups)
  middle = slice(warmup_steps, num_steps - last_length)
  grouped = lambda v: v[middle].reshape(num_groups, length)  # noqa: E731
  (x, pred), (pairs, scores, score_t) = jax.lax.scan(
    group, (x, pred), (grouped(t), grouped(prev_t), jax.random.split(key_groups, num_groups))
  )

  key_path, key_member = jax.random.split(key_last)
  ts, prev_ts = t[-last_length:], prev_t[-last_length:]
  key_draw, key_walk = jax.random.split(key_path)
  members = draw(pred, x, ts[0], prev_ts[0], key_draw, repeats=k)
  xs, _, end = walk(members, ts[1:], prev_ts[1:], key_walk)
  path = jnp.concatenate([xs, end[None]])
  last_scores = score(path[-1], _rows(0, batch * k)).reshape(batch, k)
  last_pairs = choose(x, path, last_scores, ts, prev_ts)
  latents = member(path[-1], last_scores, key_member)

  # Groups were stacked in front: [G,B,j,...] -> [B,G,j,...]; then the first step of each, and the others.
  pairs = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), pairs)
  first = jax.tree.map(lambda v, e: jnp.concatenate([v[:, :, 0], e[:, :1]], axis=1), pairs, last_pairs)
  rest = jax.tree.map(
    lambda v, e: jnp.concatenate(
      [v[:, :, 1:].reshape(batch, num_groups * (length - 1), *v.shape[3:]), e[:, 1:]], axis=1
    ),
    pairs,
    last_pairs,
  )
  return PoolRollout(
    shared=first,
    separate=rest,
    latents=latents,
    scores=jnp.concatenate([jnp.moveaxis(scores, 0, 1), last_scores[:, None]], axis=1),
    score_t=jnp.concatenate([score_t, jnp.zeros((1,), jnp.int32)]),
  )
