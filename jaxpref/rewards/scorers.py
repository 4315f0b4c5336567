"""Weighted sums of rewards, written like `config.reward`, as scorers of finished pictures on the host.

`terms` loads the same sums for training, where the networks run in the graph of a step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpref.devices import sharding
from jaxpref.files import loading, tokenizers
from jaxpref.models.vae import to_float
from jaxpref.recipes import places
from jaxpref.recipes.rewards import PREFERENCE_MODEL, is_function, terms_of
from jaxpref.rewards import networks, published
from jaxpref.rewards.loading import load_scorer, look_for_scorer, scorer_fingerprint
from jaxpref.rewards.step_aware import embed_prompts, score_images


def check(text: str, *, given: str, preferred_style: str = "openmoji") -> dict[str, float]:
  """Returns the weights of a sum of rewards by term; checks that all that `load` of each needs exists.

  Args:
    text: such as "pickscore:1,aesthetic:0.1": names of `published.PUBLISHED`, NAME=FOLDER, package.module:function, or
      preference_model=FOLDER, a step-aware model by its folder, hub name or shipped name.
    given: the option that names it, for messages.
    preferred_style: style that the judge looks for.

  Raises:
    ValueError, FileNotFoundError: one sentence: a reward is unknown or does not exist.
  """
  terms = terms_of(text, given)
  found = [spec.partition("=")[0] for spec in terms]
  if twice := [name for name in found if found.count(name) > 1]:
    raise ValueError(f"{given}: {twice[0]} occurs twice; expected each name once.")
  for spec in terms:
    published.refuse_weight(spec, given)
    name, _, place = spec.partition("=")
    if name == PREFERENCE_MODEL:
      if not place:
        raise ValueError(f"{given}: {name} needs its model, a folder or hub name; such as {name}=tiny-spm.")
      look_for_scorer(places.expand(place))
    elif not is_function(spec) and name not in published.PUBLISHED:
      names = ", ".join((f"{PREFERENCE_MODEL}=FOLDER", *published.PUBLISHED))
      raise ValueError(
        f"{given}: {spec} is unknown, expected {names}, one of them as NAME=FOLDER, or your own function as "
        f"package.module:function{published.near(spec, PREFERENCE_MODEL)}."
      )
    else:
      published.check(spec, preferred_style=preferred_style)
  return terms


def load(
  spec: str,
  *,
  batch_size: int,
  mesh: Mesh,
  preferred_style: str = "openmoji",
  models: Sequence[str] = (),
) -> tuple[published.Scorer, float]:
  """Returns a reward as a scorer in float32, and the constant factor from its numbers to logits.

  Args:
    spec: a term of `check`.
    batch_size: pictures scored at a time, rounded to a multiple of the mesh's devices.
    mesh: splits the pictures over its devices.
    preferred_style: style that the judge looks for.
    models: models whose tokenizer a step-aware model without its own shares.

  Raises:
    ValueError, FileNotFoundError: one sentence on what is missing or does not fit.
  """
  name, _, place = spec.partition("=")
  if name == PREFERENCE_MODEL:
    return _step_aware(places.expand(place), models, batch_size=batch_size, mesh=mesh), 1.0
  scorer = published.load(spec, batch_size=batch_size, mesh=mesh, preferred_style=preferred_style)
  if is_function(spec):
    return scorer, 1.0
  if name == "judge":  # whose numbers depend on the style too, so that kept ones of another are not taken for them
    scorer = dataclasses.replace(scorer, version=f"{scorer.version} {preferred_style}")
  return scorer, published.PUBLISHED[name].logits


def _step_aware(name: str, models: Sequence[str], *, batch_size: int, mesh: Mesh) -> published.Scorer:
  """Returns the scorer of a step-aware model at time 0; its pictures all have one size."""
  module, params = load_scorer(name, dtype="float32", sharding=sharding.replicated(mesh))
  tokenizer = loading.load_tokenizer(name, *models)
  length = module.config.text_config.max_position_embeddings

  def score(params: Any, text: jax.Array, images: jax.Array) -> jax.Array:
    return score_images(module, params, to_float(images), jnp.zeros(len(images), jnp.int32), text)

  network = networks.Network(
    score=score,
    params=jax.device_put(params, sharding.replicated(mesh)),
    prepare=lambda image: image,
    pixels=lambda images: images,
    tokenize=lambda texts: tokenizers.tokenize(tokenizer, texts, length=length),
    files=(),
    text=lambda params, ids: embed_prompts(module, params, ids),
  )
  return published.Scorer(
    name=PREFERENCE_MODEL,
    version=f"{name.rstrip('/').rpartition('/')[2]} {scorer_fingerprint(name)[:8]}",
    scale="exp(logit_scale) x cosine at time 0",
    score=published.checked_scores(name, published.batched(network, batch_size=batch_size, mesh=mesh)),
  )
