"""What the rollouts of SPO and LPO share: their steps, pools of candidates, and the pairs chosen from them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.diffusion import Process
from jaxpref.diffusion.samplers import Predict, rows_at
from jaxpref.rewards.base import Scores

# (x f32[B*m,h,w,C], t [B*m]) -> scores of B*m latents: predicted clean ones, or (`latent_rollout`) noisy ones at t
Score = Callable[[jax.Array, jax.Array], Scores]


class Transitions(NamedTuple):
  """Pairs of transitions x -> next of winner and loser, G for each prompt.

  Attributes:
    x_w, x_l: f32[B,G,h,w,C] where each transition starts.
    next_w, next_l: f32[B,G,h,w,C] where it ends.
    t, prev_t: [B,G] times of start and end.
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
  """The result of an SPO rollout.

  Attributes:
    shared: transitions whose winner and loser start from the same latent (x_w is x_l).
    separate: the later transitions of a group, which do not; none if all groups are single steps.
    latents: f32[B,h,w,C] the final latents of the path that was followed.
    scores: f32[B,G,k] of all candidates, by group: their sum, and its parts.
    score_t: [G] the time condition of each group's scores.
  """

  shared: Transitions
  separate: Transitions
  latents: jax.Array
  scores: Scores
  score_t: jax.Array


def step_times(process: Process, num_steps: int) -> tuple[jax.Array, jax.Array]:
  """Returns where each step starts and ends, [num_steps] each.

  The last step has noise too (to abar_0 instead of to 1), so that its std is positive, as in the reference code.
  """
  t, ends = map(jnp.asarray, process.grid(num_steps, density=True))
  return t, jnp.append(t[1:], ends[-1])


def step_thresholds(
  process: Process, num_steps: int, *, eta: float, threshold: float, threshold_max: float | None
) -> jax.Array | None:
  """Returns f32[num_steps], linear in the standard deviation of each step's noise (arXiv 2502.01051).

  It goes from `threshold` at the sampler's smallest to `threshold_max` at the largest; None if that is None.
  """
  if threshold_max is None:
    return None
  t, prev_t = step_times(process, num_steps)
  nothing = jnp.zeros((num_steps, 1, 1, 1))
  _, std = process.transition(nothing, nothing, t, prev_t, eta=eta)
  share = (std - jnp.min(std)) / jnp.maximum(jnp.max(std) - jnp.min(std), 1e-12)
  return threshold + share * (threshold_max - threshold)


@dataclasses.dataclass(frozen=True)
class Steps:
  """What the rollouts of B prompts consist of.

  Attributes:
    batch: B.
    shape: (h, w, C) of a latent.
    others: see `pool_rollout`.
  """

  predict: Predict
  process: Process
  batch: int
  shape: tuple[int, ...]
  pool_size: int
  eta: float
  threshold: float
  next_latent: str

  def call(self, x: jax.Array, t: jax.Array) -> jax.Array:  # x [B*m,h,w,C], t scalar
    return self.predict(x, rows_at(t, x.shape[0]))

  def draw(
    self, pred: jax.Array, x: jax.Array, t: jax.Array, prev_t: jax.Array, key: jax.Array, repeats: int = 1
  ) -> jax.Array:
    n = x.shape[0]
    mean, std = self.process.transition(pred, x, rows_at(t, n), rows_at(prev_t, n), eta=self.eta)
    mean, std = jnp.repeat(mean, repeats, axis=0), jnp.repeat(std, repeats, axis=0)
    return mean + std[:, None, None, None] * jax.random.normal(key, mean.shape)

  def walk(
    self, x: jax.Array, ts: jax.Array, prev_ts: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steps from x at ts[0] on, one `call` each; returns latents and predictions [n,N,...] at ts[0], ..., ts[n-1].

    A draw follows every call; the last one's result is dropped. So one call is compiled, in a scan.
    """

    def one(x, inputs):
      t, prev_t, key = inputs
      pred = self.call(x, t)
      return self.draw(pred, x, t, prev_t, key), (x, pred)

    end, (xs, preds) = jax.lax.scan(one, x, (ts, prev_ts, jax.random.split(key, ts.shape[0])))
    return xs, preds, end

  def of_pool(self, values: jax.Array, index: jax.Array) -> jax.Array:
    """Picks from each pool the candidate at its index: [B*k,...] -> [B,...]; each device handles its own prompts."""
    pools = values.reshape(self.batch, self.pool_size, *self.shape)
    return jax.vmap(lambda pool, i: pool[i])(pools, index)

  def of_pools(self, scores: Scores) -> Scores:
    return jax.tree.map(lambda v: v.reshape(self.batch, self.pool_size), scores)

  def choose(
    self,
    x: jax.Array,
    path: jax.Array,
    scores: jax.Array,
    ts: jax.Array,
    prev_ts: jax.Array,
    limit: jax.Array | None,
  ) -> Transitions:
    """Returns transitions of best and worst: x [B,...] and path [j,B*k,...] -> fields [B,j,...].

    Args:
      limit: the group's own threshold, or None.
    """
    best, worst, valid = losses.select_pair(scores, threshold=self.threshold if limit is None else limit)
    j = path.shape[0]

    def pick(index):
      members = jax.vmap(lambda values: self.of_pool(values, index))(path)
      return jnp.moveaxis(jnp.concatenate([x[None], members]), 0, 1)  # [B,j+1,h,w,C]

    w, l = pick(best), pick(worst)
    rows = lambda v: jnp.broadcast_to(v[None], (self.batch, j))  # noqa: E731
    return Transitions(
      w[:, :-1],
      l[:, :-1],
      w[:, 1:],
      l[:, 1:],
      rows(ts),
      rows(prev_ts),
      jnp.broadcast_to(valid[:, None], (self.batch, j)),
    )

  def member(self, values: jax.Array, scores: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the candidate to continue from: [B*k,...] -> [B,...]."""
    if self.next_latent == "random":
      index = jax.random.randint(key, (self.batch,), 0, self.pool_size)
    else:
      index = jnp.argmax(scores, axis=1) if self.next_latent == "winner" else jnp.argmin(scores, axis=1)
    return self.of_pool(values, index)
