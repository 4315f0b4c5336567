"""Trains a latent reward model (arXiv 2502.01051, Section 4.1), with which LPO chooses among noisy latents."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpref.models.base import Model
from jaxpref.models.latent_reward import LatentRewardModel
from jaxpref.objectives import noising
from jaxpref.objectives.base import Batch, Offline, Weights, named_key
from jaxpref.objectives.preference_model import preference
from jaxpref.objectives.sums import Pairs
from jaxpref.rewards.latent import COMPONENT, embed_prompts, score_latents


@dataclasses.dataclass(frozen=True)
class LatentPreference(Offline):
  """Trains a latent reward model, component `lrm`, on pairs at any noise (arXiv 2502.01051, Section 4.1).

  The latents of both images get separate noise at one time, and are scored there. The loss is two-way cross-entropy
  with ties pushed to equal scores; each pair is weighted by `weight`, or 1 / num_example_per_prompt. No image is
  decoded, so precomputed latents suffice. The text encoders are trained too.

  Attributes:
    model: the model with these latents and this noise process.
    first_time, last_time, time_step: a pair's time is one of first_time, first_time + time_step, ... up to last_time,
      all equally likely; 1, 951 and 50 are those of a sampler of 20 steps.
  """

  model: Model
  scorer: LatentRewardModel
  first_time: int
  last_time: int
  time_step: int

  def timesteps(self, key: jax.Array, size: int) -> jax.Array:
    count = (self.last_time - self.first_time) // self.time_step + 1
    return self.first_time + self.time_step * jax.random.randint(named_key(key, "t"), (size,), 0, count)

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    scorer, params = self.scorer, w.policy[COMPONENT]
    kind = "moments" if "moments_0" in e else "pixels"
    images = {kind: jnp.concatenate([e[f"{kind}_0"], e[f"{kind}_1"]])}
    x0 = jax.lax.stop_gradient(noising.latents(self.model, w.base, images, named_key(key, "posterior")))
    t = self.timesteps(key, e["label_0"].shape[0])
    t2 = jnp.concatenate([t, t])
    x_t = self.model.process.add_noise(x0, jax.random.normal(named_key(key, "noise"), x0.shape), t2)
    of_prompts = embed_prompts(scorer, params, e["input_ids"], w.base["empty_ids"])
    prompts = jax.tree.map(lambda rows: jnp.concatenate([rows, rows]), of_prompts)
    score_0, score_1 = jnp.split(score_latents(scorer, params, x_t, t2, prompts), 2)
    return preference(score_0, score_1, e, t, total=self.model.process.num_train_timesteps)
