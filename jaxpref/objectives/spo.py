"""SPO, step-by-step preference optimisation (arXiv 2406.04314): its rollout, its loss, and its cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import diffusion, losses
from jaxpref.diffusion import Process
from jaxpref.diffusion.samplers import Predict, rows_at
from jaxpref.models.base import Cond, Model, guided, repeat_cond
from jaxpref.objectives import noising
from jaxpref.objectives.base import (
  REWARD_BINS,
  Batch,
  Drawn,
  Experience,
  Rows,
  Weights,
  named_key,
  rows_of_prompts,
)
from jaxpref.objectives.lpo import latent_rollout
from jaxpref.objectives.pairs import PairLoss
from jaxpref.objectives.pools import PoolRollout, Score, Steps, step_thresholds, step_times
from jaxpref.objectives.sums import Pairs, binned_mean, mean_of
from jaxpref.rewards.base import LATENTS, Weighted


def pool_calls(*, num_steps: int, warmup_steps: int, pool_size: int) -> int:
  """Returns guided UNet calls per prompt: warmup_steps + 1 single ones, then pool_size for every further step."""
  return warmup_steps + 1 + (num_steps - warmup_steps - 1) * pool_size


def pool_groups(*, num_steps: int, warmup_steps: int, inner_steps: int, pool_last_step: bool = False) -> list[int]:
  """Returns the length of each group of `pool_rollout`; winner and loser of its first transition share a latent."""
  length = inner_steps + 1
  groups = [length] * ((num_steps - warmup_steps) // length)
  return groups if length > 1 or pool_last_step else [*groups[:-2], 2]


# Long: Algorithm 1 of the paper in one piece, to read beside it.
# Many parameters: the networks as functions, and each number of that algorithm.
def pool_rollout(
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
  pool_last_step: bool = False,
) -> PoolRollout:
  """Runs SPO's rollout (arXiv 2406.04314, Algorithm 1), which costs `pool_calls` guided UNet calls per prompt.

  After `warmup_steps` ordinary steps, every group of j = inner_steps + 1 steps draws `pool_size` candidates from one
  shared latent. Each candidate runs j steps and is scored on its decoded x0-prediction with the timestep it has
  reached; best and worst form a pair. The call that predicts x0 for the score also denoises next. The next group starts
  from one random member of the pool. The last group makes images, which are scored with time 0.

  Args:
    x: f32[B,h,w,C] standard normal latents.
    threshold: a pair is valid if softmax([s_w, s_l])_w - softmax([s_w, s_l])_l exceeds it.
    threshold_max: if given, the threshold of each group is that of its first step, see `step_thresholds`.
    next_latent: "random" (the paper), "winner" or "loser".
    pool_last_step: only for j = 1: True also draws a pool in the last step, as published for Stable Diffusion 1.5;
      False makes the last two steps one group, so that no image is chosen by its last noise alone. The calls are the
      same.
  """
  batch, k, length = x.shape[0], pool_size, inner_steps + 1
  t, prev_t = step_times(process, num_steps)
  limits = step_thresholds(process, num_steps, eta=eta, threshold=threshold, threshold_max=threshold_max)
  steps = Steps(predict, process, batch, x.shape[1:], k, eta, threshold, next_latent)

  key_warmup, key_groups, key_last = jax.random.split(key, 3)
  first = slice(0, warmup_steps + 1)
  xs, preds, _ = steps.walk(x, t[first], prev_t[first], key_warmup)
  x, pred = xs[-1], preds[-1]

  def pool(x, pred, ts, prev_ts, key, end_t):
    """Draws candidates from x [B,...]: path [j,B*k,...] at the ends of their steps, and the last prediction."""
    key_draw, key_walk = jax.random.split(key)
    members = steps.draw(pred, x, ts[0], prev_ts[0], key_draw, repeats=k)
    # Walks on from prev_ts[0]; the step after the group is also drawn, and dropped.
    xs, preds, _ = steps.walk(members, jnp.append(ts[1:], end_t), jnp.append(prev_ts[1:], end_t), key_walk)
    return xs, preds[-1]

  def group(carry, inputs):
    x, pred = carry
    ts, prev_ts, key, limit = inputs
    key_path, key_member = jax.random.split(key)
    path, end_pred = pool(x, pred, ts, prev_ts, key_path, prev_ts[-1])
    end_t = rows_at(prev_ts[-1], batch * k)
    scores = steps.of_pools(score(process.to_x0(end_pred, path[-1], end_t), end_t))
    pairs = steps.choose(x, path, scores.total, ts, prev_ts, limit)
    carry = (steps.member(path[-1], scores.total, key_member), steps.member(end_pred, scores.total, key_member))
    return carry, (pairs, scores, prev_ts[-1])

  *groups, last_length = pool_groups(
    num_steps=num_steps, warmup_steps=warmup_steps, inner_steps=inner_steps, pool_last_step=pool_last_step
  )
  num_groups = len(groups)
  middle = slice(warmup_steps, num_steps - last_length)
  grouped = lambda v: v[middle].reshape(num_groups, length)  # noqa: E731
  of_groups = None if limits is None else grouped(limits)[:, 0]
  (x, pred), (pairs, scores, score_t) = jax.lax.scan(
    group, (x, pred), (grouped(t), grouped(prev_t), jax.random.split(key_groups, num_groups), of_groups)
  )

  key_path, key_member = jax.random.split(key_last)
  ts, prev_ts = t[-last_length:], prev_t[-last_length:]
  key_draw, key_walk = jax.random.split(key_path)
  members = steps.draw(pred, x, ts[0], prev_ts[0], key_draw, repeats=k)
  xs, _, end = steps.walk(members, ts[1:], prev_ts[1:], key_walk)
  path = jnp.concatenate([xs, end[None]])
  last_scores = steps.of_pools(score(path[-1], rows_at(jnp.zeros((), t.dtype), batch * k)))
  last_limit = None if limits is None else limits[-last_length]
  last_pairs = steps.choose(x, path, last_scores.total, ts, prev_ts, last_limit)
  latents = steps.member(path[-1], last_scores.total, key_member)

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
    scores=jax.tree.map(lambda v, e: jnp.concatenate([jnp.moveaxis(v, 0, 1), e[:, None]], axis=1), scores, last_scores),
    score_t=jnp.concatenate([score_t, jnp.zeros((1,), t.dtype)]),
  )


# Many parameters: the inputs of Eq. 8 of the paper: policy, reference, two kinds of rows, conditioning, three numbers.
def transition_loss(
  model: Model,
  loss_fn: PairLoss,
  weights: Any,
  ref_weights: Any,
  shared: Rows,
  separate: Rows,
  cond: Cond,
  uncond: Cond,
  *,
  eta: float,
  guidance_scale: float,
  ratio_clip: float,
) -> tuple[jax.Array, jax.Array, Pairs]:
  """Returns SPO's loss of a minibatch of transitions (arXiv 2406.04314, Eq. 8), log 2 where policy equals reference.

  Log-probabilities are means over H, W, C of the DDIM transition's Gaussian; guidance acts on both policy and
  reference. A transition pair with a shared start takes one UNet call of each, a separate one takes two.

  Args:
    shared, separate: `Transitions` with fields [N,...], and a mask f32[N].
    cond: conditioning of all prompts of the rollout, one row per prompt.
  Returns:
    (sum of losses, count, metric pairs).
  """
  process = model.process
  first, first_prompt, first_mask = shared
  later, later_prompt, later_mask = separate
  n = first_mask.shape[0]
  join = lambda *parts: jnp.concatenate(parts)  # noqa: E731
  x = join(first.x_w, later.x_w, later.x_l)
  t, prev_t = join(first.t, later.t, later.t), join(first.prev_t, later.prev_t, later.prev_t)
  rows = jax.tree.map(lambda c: c[join(first_prompt, later_prompt, later_prompt)], cond)

  def log_probs(weights):
    predict = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
    mean, std = process.transition(predict(x, t, rows), x, t, prev_t, eta=eta)
    # Rows: n shared, then the winners' and the losers' separate ones.
    m, s = (jnp.split(v, [n, n + later_mask.shape[0]]) for v in (mean, std))
    log_prob = diffusion.gaussian_log_prob
    return (
      join(log_prob(first.next_w, m[0], s[0]), log_prob(later.next_w, m[1], s[1])),
      join(log_prob(first.next_l, m[0], s[0]), log_prob(later.next_l, m[2], s[2])),
    )

  logp_w, logp_l = log_probs(weights)
  ref_w, ref_l = jax.lax.stop_gradient(log_probs(ref_weights))
  reward_w = losses.clipped_log_ratio(logp_w, ref_w, eps=ratio_clip)
  reward_l = losses.clipped_log_ratio(logp_l, ref_l, eps=ratio_clip)
  mask = join(first_mask, later_mask)
  margin = reward_w - reward_l
  values = loss_fn(reward_w, reward_l, None)
  times = join(first.t, later.t)
  metrics = {
    "implicit_accuracy": mean_of(losses.implicit_accuracy(reward_w, reward_l), mask),
    "margin": mean_of(margin, mask),
    "loss_bin": binned_mean(values, mask, times, total=process.num_train_timesteps, bins=REWARD_BINS),
  }
  return jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask), metrics


@dataclasses.dataclass(frozen=True)
class SPO:
  """One iteration of SPO (arXiv 2406.04314): rollout, scoring, pair selection and updates, without a host round trip.

  All valid transitions of the batch are shuffled and spread evenly over ceil(valid / minibatch) updates; invalid ones
  cost nothing. Winner and loser transitions that start from one latent share one policy pass and one reference pass.

  Attributes:
    reward: what scores the candidates' predictions, in the paper a step-aware preference model. If it is a latent
      reward model alone, it scores the candidates themselves: LPO (arXiv 2502.01051), with `latent_rollout`.
    pair_loss: loss on the log of the clipped ratios; the paper's is the sigmoid loss with beta 10.
    step_aware: False gives the reward time 0 at every step, for one that only knows clean images.
    decode_size: shorter side in pixels of predictions decoded for the reward, see `Model.decode`; 0: the images' own.
    minibatch: transitions with a shared start in one update; those without come in proportion.
    others: see `pool_rollout`, `latent_rollout` and `transition_loss`.
  """

  model: Model
  reward: Weighted
  pair_loss: PairLoss
  num_inference_steps: int
  eta: float
  guidance_scale: float
  warmup_steps: int
  pool_size: int
  inner_steps: int
  threshold: float
  next_latent: str
  ratio_clip: float
  minibatch: int
  pool_last_step: bool = False
  step_aware: bool = True
  decode_size: int = 0
  threshold_max: float | None = None
  score_time: str = "end"
  kinds = ("shuffle_shared", "shuffle_separate")

  def rollout(self, w: Weights, batch: Batch, key: jax.Array) -> Drawn:
    """Runs `pool_rollout` or `latent_rollout`, which score as they go; returns the result with the conditioning."""
    model = self.model
    prompts = batch["input_ids"].shape[0]
    cond = model.encode_text(w.base, batch["input_ids"])
    uncond = model.encode_empty(w.base, 1)
    of_prompts = self.reward.prompts(w.base, batch)
    eps = guided(lambda x, t, c: model.predict(w.policy, x, t, c), uncond, self.guidance_scale)

    def predict(x, t):
      return eps(x, t, repeat_cond(cond, x.shape[0] // prompts))

    def rows(x):
      return repeat_cond({"reward": of_prompts}, x.shape[0] // prompts)["reward"]

    def score(x0, t):
      of_reward = rows(x0)
      images = model.decode(w.base, x0, size=self.decode_size)
      return self.reward.score(w.base, images, t if self.step_aware else jnp.zeros_like(t), of_reward)

    def score_latents(x, t):
      return self.reward.score(w.base, None, t, rows(x), x)

    noise, key = jax.random.normal(named_key(key, "x_T"), (prompts, *model.latent_shape)), named_key(key, "rollout")
    options: dict[str, Any] = {
      "num_steps": self.num_inference_steps,
      "eta": self.eta,
      "warmup_steps": self.warmup_steps,
      "pool_size": self.pool_size,
      "inner_steps": self.inner_steps,
      "threshold": self.threshold,
      "threshold_max": self.threshold_max,
      "next_latent": self.next_latent,
    }
    if self.reward.needs == {LATENTS}:
      drawn = latent_rollout(predict, score_latents, model.process, noise, key, score_time=self.score_time, **options)
    else:
      drawn = pool_rollout(predict, score, model.process, noise, key, pool_last_step=self.pool_last_step, **options)
    return Drawn((jax.lax.stop_gradient(drawn), cond, uncond))

  def experience(
    self, drawn: Drawn, scores: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[Experience, dict[str, jax.Array]]:
    """Returns pairs of transitions: those that share their start, and the others."""
    pools, cond, uncond = drawn.data
    kinds = tuple(rows_of_prompts(t, t.valid) for t in (pools.shared, pools.separate))
    ends = pools.separate if pools.separate.valid.shape[1] else pools.shared
    total = pools.scores.total
    return Experience(kinds, (cond, uncond), ends.next_w[:, -1]), {
      "valid_pairs": jnp.mean(pools.shared.valid.astype(jnp.float32)),
      "reward": jnp.mean(total[:, -1]),
      "reward_group": jnp.mean(total, axis=(0, 2)),
      "score_gap": jnp.mean(jnp.max(total, axis=2) - jnp.min(total, axis=2)),
      **{f"reward_{name}": jnp.mean(part[:, -1]) for name, part in pools.scores.parts.items()},
    }

  def update_rows(self, rows: int) -> int:
    return min(self.minibatch, rows)

  def statistics(self, w: Weights, batch: Batch, key: jax.Array) -> None:
    return None

  def loss(
    self, w: Weights, e: Experience, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    """Returns `transition_loss` of a minibatch; draws nothing."""
    (shared, separate), (cond, uncond) = e.kinds, e.context
    return transition_loss(
      self.model,
      self.pair_loss,
      w.policy,
      w.reference,
      shared,
      separate,
      cond,
      uncond,
      eta=self.eta,
      guidance_scale=self.guidance_scale,
      ratio_clip=self.ratio_clip,
    )

  def empty_loss(self) -> jax.Array:
    """Returns the loss of an undecided pair: an iteration without any valid pair changes nothing."""
    return self.pair_loss(jnp.zeros(1), jnp.zeros(1), None)[0]

  def divergence(self, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
    """Returns the divergence on the last winners of the prompts' rollouts."""
    return noising.divergence_of_samples(self.model, w, batch, key)

  def timesteps(self, key: jax.Array, size: int) -> None:
    return None
