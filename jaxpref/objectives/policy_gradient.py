"""Online policy gradients on denoising steps: GRPO (arXiv 2402.03300, 2505.07818, 2505.05470), DDPO (2305.13301)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref import diffusion, losses
from jaxpref.diffusion import samplers
from jaxpref.models.base import Cond, Model, guided, repeat_cond
from jaxpref.models.vae import to_uint8
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
from jaxpref.objectives.sums import Pairs, binned_mean, mean_of
from jaxpref.rewards.base import LATENTS, Weighted


class Steps(NamedTuple):
  """Steps x -> next to take a policy gradient on, G for each prompt: those of all its samples.

  Attributes:
    x, next: f32[B,G,h,w,C] where each starts and ends.
    t, prev_t: [B,G] times of start and end.
    log_prob: f32[B,G] log-density under the policy that drew it, mean over h, w, C.
    advantage: f32[B,G] of the sample that the step belongs to.
    valid: bool[B,G] whether it is trained on.
  """

  x: jax.Array
  next: jax.Array
  t: jax.Array
  prev_t: jax.Array
  log_prob: jax.Array
  advantage: jax.Array
  valid: jax.Array


def policy_loss(
  model: Model,
  weights: Any,
  ref_weights: Any,
  steps: Rows,
  cond: Cond,
  uncond: Cond,
  *,
  eta: float,
  guidance_scale: float,
  ratio_clip: float,
  kl_coef: float,
) -> tuple[jax.Array, jax.Array, Pairs]:
  """Returns the clipped policy gradient of a minibatch of steps; GRPO and DDPO only differ in their advantages.

      loss = max(-A r, -A clip(r, 1 - eps, 1 + eps)) + kl_coef KL,    r = p(next) / p_old(next)

  (arXiv 2402.03300, Eq. 3; arXiv 2305.13301, Section 4.3), -A where the policy is still the one that drew the samples.
  KL is that of the step's two Gaussians, |mean - mean_ref|^2 / (2 std^2), a mean over h, w, C, as in Flow-GRPO
  (arXiv 2505.05470). It replaces GRPO's estimate from the sample, exp(d) - d - 1: as d is a mean over N numbers, that
  has an expectation of about KL / N, which holds nothing back.

  Args:
    ref_weights: weights of the reference; not called with kl_coef 0.
    steps: `Steps` with fields [N,...], and a mask f32[N].
    cond: conditioning of all prompts of the rollout, one row per prompt.
  Returns:
    (sum of losses, count, metric pairs).
  """
  process = model.process
  rows, prompt, mask = steps
  of_rows = jax.tree.map(lambda c: c[prompt], cond)

  def mean_std(weights):
    predict = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
    pred = predict(rows.x, rows.t, of_rows)
    return process.transition(pred, rows.x, rows.t, rows.prev_t, eta=eta)

  mean, std = mean_std(weights)
  log_prob = diffusion.gaussian_log_prob(rows.next, mean, std)
  values = losses.grpo_loss(log_prob, rows.log_prob, rows.advantage, eps=ratio_clip)
  ratio = jnp.exp(log_prob - rows.log_prob)
  metrics = {
    "ratio": mean_of(ratio, mask),
    "clip_fraction": mean_of((jnp.abs(ratio - 1.0) > ratio_clip).astype(jnp.float32), mask),
  }
  if kl_coef:
    ref_mean = jax.lax.stop_gradient(mean_std(ref_weights)[0])
    kl = diffusion.squared_error(mean, ref_mean) / (2.0 * jnp.square(jnp.maximum(std, 1e-6)))
    values = values + kl_coef * kl
    metrics["kl"] = mean_of(kl, mask)
  metrics["loss_bin"] = binned_mean(values, mask, rows.t, total=process.num_train_timesteps, bins=REWARD_BINS)
  return jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask), metrics


def trained_steps(num_inference_steps: int, timestep_fraction: float) -> int:
  """Returns how many steps of a sample are trained on."""
  return max(1, round(timestep_fraction * num_inference_steps))


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
  """One iteration of an online policy gradient: rollout, rewards, advantages and updates, without a host round trip.

  GRPO (arXiv 2402.03300) on denoising steps, as in DanceGRPO (arXiv 2505.07818) and Flow-GRPO (arXiv 2505.05470); DDPO
  (arXiv 2305.13301) with `advantage="batch"`, `group_size=1` and `kl_coef=0`. For each prompt `group_size` samples are
  drawn from separate noise, and their images scored at time 0. All steps of all samples, or a share of them, are
  shuffled and spread evenly over ceil(steps / minibatch) updates; each is used once.

  Attributes:
    reward: what scores the finished images, in the graph or on the host.
    eta: noise of DDIM, above 0; the three methods use 1, 0.3 and another sampler of about 0.7.
    group_size: samples of a prompt.
    advantage: "group", rewards minus the mean of their prompt's samples, over their standard deviation (GRPO); "batch",
      the same over all samples of the iteration (DDPO).
    advantage_clip: bound of the advantages' size; 5 to 10 in the released trainers.
    timestep_fraction: share of each sample's steps to train on, at random (0.6 in DanceGRPO, 1 in DDPO).
    ratio_clip: eps of the clipped ratio; 1e-4 in all three, as log-densities are means over h, w, C.
    kl_coef: weight of the KL to the reference; with 0 (DDPO, DanceGRPO) the reference is not called.
    minibatch: steps in one update.
  """

  model: Model
  reward: Weighted
  num_inference_steps: int
  eta: float
  guidance_scale: float
  group_size: int
  advantage: str
  advantage_clip: float
  timestep_fraction: float
  ratio_clip: float
  kl_coef: float
  minibatch: int
  kinds = ("shuffle",)

  def rollout(self, w: Weights, batch: Batch, key: jax.Array) -> Drawn:
    """Draws trajectories; returns them with their conditioning and the scores of their ends by rewards in the graph."""
    model, group_size = self.model, self.group_size
    prompts = batch["input_ids"].shape[0]
    cond = model.encode_text(w.base, batch["input_ids"])
    uncond = model.encode_empty(w.base, 1)
    of_prompts = self.reward.prompts(w.base, batch)
    of_samples = repeat_cond({"cond": cond, "reward": of_prompts}, group_size)
    eps = guided(lambda x, t, c: model.predict(w.policy, x, t, c), uncond, self.guidance_scale)
    noise = jax.random.normal(named_key(key, "x_T"), (prompts * group_size, *model.latent_shape))
    drawn = samplers.trajectories(
      lambda x, t: eps(x, t, of_samples["cond"]),
      model.process,
      noise,
      named_key(key, "rollout"),
      num_steps=self.num_inference_steps,
      eta=self.eta,
    )
    ends = drawn.x[:, -1]
    seen = self.reward.needs != {LATENTS} or self.reward.host
    images: Any = model.decode(w.base, ends) if seen else None
    scores = self.reward.score(w.base, images, jnp.zeros(len(noise), jnp.int32), of_samples["reward"], ends)
    return Drawn((drawn, scores, cond, uncond), to_uint8(images) if self.reward.host else None)

  def experience(
    self, drawn: Drawn, scores: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[Experience, dict[str, jax.Array]]:
    """Returns the steps to train on, with their advantages."""
    group_size = self.group_size
    trajectories, in_graph, cond, uncond = drawn.data
    reward, parts = self.reward.summed(scores, in_graph)
    prompts = len(reward) // group_size
    of_group = group_size if self.advantage == "group" else len(reward)
    advantages = losses.group_advantages(reward, group_size=of_group)
    advantages = jnp.clip(advantages, -self.advantage_clip, self.advantage_clip)
    # For each sample the first steps in a random order of its steps.
    place = jnp.argsort(jax.random.uniform(named_key(key, "timesteps"), trajectories.log_prob.shape), axis=1)
    every = lambda v, axis: jnp.broadcast_to(jnp.expand_dims(v, axis), trajectories.log_prob.shape)  # noqa: E731
    steps = Steps(
      x=trajectories.x[:, :-1],
      next=trajectories.x[:, 1:],
      t=every(trajectories.t, 0),
      prev_t=every(trajectories.prev_t, 0),
      log_prob=trajectories.log_prob,
      advantage=every(advantages, 1),
      valid=place < trained_steps(self.num_inference_steps, self.timestep_fraction),
    )
    of_prompts = jax.tree.map(lambda v: v.reshape(prompts, -1, *v.shape[2:]), steps)
    reward = reward.reshape(prompts, group_size)
    latents = trajectories.x[:, -1].reshape(prompts, group_size, *trajectories.x.shape[2:])
    best = jax.vmap(lambda x, r: x[jnp.argmax(r)])(latents, reward)
    of_prompts, reward, best = jax.lax.stop_gradient((of_prompts, reward, best))
    return Experience((rows_of_prompts(of_prompts, of_prompts.valid),), (cond, uncond), best), {
      "reward": jnp.mean(reward),
      "score_gap": jnp.mean(jnp.max(reward, axis=1) - jnp.min(reward, axis=1)),
      **{f"reward_{name}": jnp.mean(part) for name, part in parts.items()},
    }

  def update_rows(self, rows: int) -> int:
    samples = rows // self.num_inference_steps
    return min(self.minibatch, samples * trained_steps(self.num_inference_steps, self.timestep_fraction))

  def statistics(self, w: Weights, batch: Batch, key: jax.Array) -> None:
    return None

  def loss(
    self, w: Weights, e: Experience, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    """Returns `policy_loss` of a minibatch; draws nothing."""
    (steps,), (cond, uncond) = e.kinds, e.context
    return policy_loss(
      self.model,
      w.policy,
      w.reference,
      steps,
      cond,
      uncond,
      eta=self.eta,
      guidance_scale=self.guidance_scale,
      ratio_clip=self.ratio_clip,
      kl_coef=self.kl_coef,
    )

  def empty_loss(self) -> float:
    return 0.0

  def divergence(self, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
    """Returns the divergence on the best samples of the prompts."""
    return noising.divergence_of_samples(self.model, w, batch, key)

  def timesteps(self, key: jax.Array, size: int) -> None:
    return None
