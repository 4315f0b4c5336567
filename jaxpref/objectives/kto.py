"""Diffusion-KTO (arXiv 2404.04465): learns from single images that are liked or not."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.models.base import Model
from jaxpref.objectives import noising
from jaxpref.objectives.base import REWARD_BINS, Batch, Offline, Weights, named_key
from jaxpref.objectives.sums import Pairs, binned_mean, divide, mean_of


@dataclasses.dataclass(frozen=True)
class DiffusionKTO(Offline):
  """Diffusion-KTO (arXiv 2404.04465, Eq. 8) on single images that are liked (`label` 1) or not (0); no pairs.

  It takes two UNet forward passes and one backward pass per image. The baseline K is a mean over the whole batch of a
  step; with accumulation it is computed before the first micro-batch, with two more forward passes per image. The loss
  is lam / 2 where policy and reference agree.

  Attributes:
    beta: strength of the pull to the reference; 5000 for mean-reduced errors.
    weight_desirable, weight_undesirable: lam of liked images and of others.
  """

  model: Model
  beta: float
  weight_desirable: float = 1.0
  weight_undesirable: float = 1.0

  def timesteps(self, key: jax.Array, size: int) -> jax.Array:
    return noising.training_times(self.model, key, size)

  def _rewards(self, w: Weights, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns implicit rewards f32[B], and their timesteps."""
    model = self.model
    x0 = noising.latents(model, w.base, batch, named_key(key, "posterior"))
    t = self.timesteps(key, x0.shape[0])
    noise = jax.random.normal(named_key(key, "noise"), x0.shape)
    x_t = model.process.add_noise(x0, noise, t)
    target = model.process.target(x0, noise, t)
    cond = model.sized(noising.text(model, w.base, batch), batch.get("sizes"))
    err = noising.errors(model, w.policy, x_t, t, cond, target)
    ref_err = jax.lax.stop_gradient(noising.errors(model, w.reference, x_t, t, cond, target))
    return losses.implicit_reward(err, ref_err), t

  def statistics(self, w: Weights, batch: Batch, key: jax.Array) -> Pairs:
    """Returns the mean reward, from which the baseline is made."""
    reward, _ = self._rewards(w, batch, key)
    return {"reward": mean_of(reward, jnp.ones_like(reward))}

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    reward, t = self._rewards(w, e, key)
    liked = e["label"] >= 0.5
    baseline = losses.kto_baseline(reward if statistics is None else divide(statistics)["reward"][None])
    values = losses.kto_loss(
      reward,
      liked,
      beta=self.beta,
      baseline=baseline,
      weight_desirable=self.weight_desirable,
      weight_undesirable=self.weight_undesirable,
    )
    ones = jnp.ones_like(values)
    bins = {"total": self.model.process.num_train_timesteps, "bins": REWARD_BINS}
    metrics = {
      "reward_liked": mean_of(reward, liked.astype(jnp.float32)),
      "reward_disliked": mean_of(reward, 1.0 - liked),
      "baseline": mean_of(jnp.broadcast_to(baseline, ones.shape), ones),
      "reward_bin": binned_mean(reward, ones, t, **bins),
      "loss_bin": binned_mean(values, ones, t, **bins),
    }
    return jnp.sum(values), jnp.sum(ones), metrics

  def divergence(self, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
    """Returns the divergence on the liked images, which come first."""
    order = jnp.argsort(-batch["label"])
    few = noising.first_samples({k: v[order] for k, v in batch.items()})
    x0 = noising.latents(self.model, w.base, few, named_key(key, "posterior"))
    cond = self.model.sized(noising.text(self.model, w.base, few), few.get("sizes"))
    return noising.divergence(self.model, w, noising.Preferred(x0, cond, few["label"] >= 0.5), key)
