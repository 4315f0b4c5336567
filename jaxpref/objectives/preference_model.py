"""Trains a step-aware preference model (arXiv 2406.04314, Section 3.2), with which SPO chooses."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.models.base import Model
from jaxpref.models.preference import StepAwareCLIPModel
from jaxpref.objectives import noising
from jaxpref.objectives.base import REWARD_BINS, Batch, Offline, Weights, named_key
from jaxpref.objectives.sums import Pairs, binned_mean, mean_of
from jaxpref.rewards.step_aware import embed_prompts, score_images


def preference(
  score_0: jax.Array, score_1: jax.Array, e: Batch, t: jax.Array, *, total: int
) -> tuple[jax.Array, jax.Array, Pairs]:
  """Returns `Objective.loss` from the scores of pairs: two-way cross-entropy, with ties pushed to equal scores.

  Each pair counts by its `weight`, or by 1 / num_example_per_prompt.

  Args:
    score_0, score_1: f32[B] scores of the two images.
    e: the batch.
    t: [B] times at which they were scored, below `total`.
  """
  values = losses.preference_loss(score_0, score_1, e["label_0"])
  weights = e["weight"] if "weight" in e else 1.0 / e["num_example_per_prompt"].astype(jnp.float32)
  decided = weights * (e["label_0"] != 0.5)
  correct = ((score_0 > score_1) == (e["label_0"] > 0.5)).astype(jnp.float32)
  bins = {"total": total, "bins": REWARD_BINS}
  metrics = {
    "accuracy": mean_of(correct, decided),
    "accuracy_bin": binned_mean(correct, decided, t, **bins),
    "loss_bin": binned_mean(values, weights, t, **bins),
    "score_gap": mean_of(jnp.abs(score_0 - score_1), weights),
  }
  return jnp.sum(values * weights), jnp.sum(weights), metrics


@dataclasses.dataclass(frozen=True)
class PreferenceModel(Offline):
  """Trains a step-aware preference model, component `spm` (arXiv 2406.04314, Section 3.2).

  Both images get the same noise at a uniform t; the frozen model makes one guided x0-prediction of each, which is
  decoded and scored with time t. The loss is two-way cross-entropy with ties pushed to equal scores; each pair is
  weighted by `weight`, or by 1 / num_example_per_prompt.

  Attributes:
    step_aware: False trains on the images alone, at time 0 and as the VAE reconstructs them: an ordinary preference
      model, for comparison.
    decode_size: shorter side in pixels of decoded predictions, see `Model.decode`; 0: that of the images.
  """

  model: Model
  scorer: StepAwareCLIPModel
  guidance_scale: float
  step_aware: bool = True
  decode_size: int = 0

  def timesteps(self, key: jax.Array, size: int) -> jax.Array:
    return noising.training_times(self.model, key, size) if self.step_aware else jnp.zeros((size,), jnp.int32)

  def _scored_images(self, w: Weights, batch: Batch, pixels: jax.Array, t2: jax.Array, key: jax.Array) -> jax.Array:
    """Returns images f32[2B,H,W,3], first all of image_0: decoded predictions at times t2 i32[2B]."""
    model, size = self.model, batch["label_0"].shape[0]
    x0 = model.encode_images(w.base, pixels, named_key(key, "posterior"))
    if not self.step_aware:
      return model.decode(w.base, x0, size=self.decode_size)
    noise = jax.random.normal(named_key(key, "noise"), (size, *x0.shape[1:]))
    x_t = model.process.add_noise(x0, jnp.concatenate([noise, noise]), t2)
    sizes = jnp.concatenate([batch["sizes_0"], batch["sizes_1"]]) if "sizes_0" in batch else None
    return noising.decode_prediction(
      model, w.base, x_t, t2, batch["input_ids"], self.guidance_scale, sizes, size=self.decode_size
    )

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    scorer, params = self.scorer, w.policy["spm"]
    pixels = jnp.concatenate([e["pixels_0"], e["pixels_1"]])
    t = self.timesteps(key, e["label_0"].shape[0])
    t2 = jnp.concatenate([t, t])
    images = jax.lax.stop_gradient(self._scored_images(w, e, pixels, t2, key))
    # The reference implementation also clips before the resize here, but not where it scores a rollout.
    images = jnp.clip(images, -1.0, 1.0)
    text = embed_prompts(scorer, params, e["input_ids"])
    score_0, score_1 = jnp.split(score_images(scorer, params, images, t2, jnp.concatenate([text, text])), 2)
    return preference(score_0, score_1, e, t, total=self.model.process.num_train_timesteps)
