"""The step-aware preference model as a reward: scores images at any time of the process against their prompts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxpref.models.preference import StepAwareCLIPModel, preprocess
from jaxpref.rewards.base import IMAGE

COMPONENT = "spm"  # its component of the weights


def embed_prompts(scorer: StepAwareCLIPModel, params: Any, input_ids: jax.Array) -> jax.Array:
  """Returns unit vectors f32[B, P] of prompts; they depend on nothing else and are computed once per batch.

  With the ids of two tokenizers, the first are used: CLIP's, whatever pads them, since the text tower is causal and
  pools at the end of the text.
  """
  ids = input_ids[:, : scorer.config.text_config.max_position_embeddings]
  return scorer.apply({"params": params}, ids, method="text_embeds")


def score_images(
  scorer: StepAwareCLIPModel, params: Any, images: jax.Array, t: jax.Array, text_embeds: jax.Array
) -> jax.Array:
  """Scores images f32[N,H,W,3] in [-1, 1] at times t i32[N] as f32[N] = exp(logit_scale) cos(image, text).

  Predictions that overshoot are clipped after the resize to the scorer's size, see `preprocess`.
  """
  pixels = preprocess(images, scorer.config.vision_config.image_size)
  image_embeds = scorer.apply({"params": params}, pixels, t, method="image_embeds")
  return scorer.apply({"params": params}, image_embeds, text_embeds, method="score")


@dataclasses.dataclass(frozen=True)
class StepAware:
  """The `Reward` of a step-aware preference model, component `spm`; it reads the model's tokens.

  Attributes:
    scorer: its network.
  """

  scorer: StepAwareCLIPModel
  name = "preference_model"
  component = COMPONENT
  scale = 1.0
  needs = IMAGE

  @property
  def tokenizers(self) -> dict[str, Any]:
    return {}

  def prompts(self, weights: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return embed_prompts(self.scorer, weights[COMPONENT], batch["input_ids"])

  def score(self, weights: Any, images: jax.Array, t: jax.Array, prompts: jax.Array) -> jax.Array:
    return score_images(self.scorer, weights[COMPONENT], images, t, prompts)
