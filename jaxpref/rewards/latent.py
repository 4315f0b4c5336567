"""The latent reward model as a reward: scores noisy latents at any time of the process against their prompts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.models.latent_reward import LatentRewardModel
from jaxpref.rewards.base import LATENTS

COMPONENT = "lrm"  # its component of the weights


def embed_prompts(scorer: LatentRewardModel, params: Any, input_ids: jax.Array, empty_ids: jax.Array) -> dict[str, Any]:
  """Returns rows [B,...] for each prompt: the UNet's conditioning with and without it, and unit vectors.

  Args:
    input_ids: i32[B,L] of the text-to-image model.
    empty_ids: i32[1,L], the empty prompt; the reward's own text encoder encodes it, also for SDXL.
  """
  cond, embeds = scorer.apply({"params": params}, input_ids, method="text")
  uncond, _ = scorer.apply({"params": params}, empty_ids, method="text")
  uncond = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), uncond, cond)
  return {"cond": cond, "uncond": uncond, "embeds": embeds}


def score_latents(
  scorer: LatentRewardModel, params: Any, latents: jax.Array, t: jax.Array, prompts: Mapping[str, Any]
) -> jax.Array:
  """Scores f32[N] = exp(logit_scale) cos(latents, text) of noisy latents f32[N,h,w,C] at times t [N].

  Args:
    prompts: rows [N,...] of what `embed_prompts` returned.
  """
  embeds = scorer.apply({"params": params}, latents, t, prompts["cond"], prompts["uncond"], method="latent_embeds")
  return scorer.apply({"params": params}, embeds, prompts["embeds"], method="score")


@dataclasses.dataclass(frozen=True)
class LatentReward:
  """The `Reward` of a latent reward model, component `lrm`; it reads the model's tokens, and no image.

  Attributes:
    scorer: its network.
  """

  scorer: LatentRewardModel
  name = "latent"
  component = COMPONENT
  scale = 1.0
  needs = LATENTS

  @property
  def tokenizers(self) -> dict[str, Any]:
    return {}

  def prompts(self, weights: Any, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
    return embed_prompts(self.scorer, weights[COMPONENT], batch["input_ids"], weights["empty_ids"])

  def score(self, weights: Any, images: jax.Array, t: jax.Array, prompts: Mapping[str, Any]) -> jax.Array:
    return score_latents(self.scorer, weights[COMPONENT], images, t, prompts)
