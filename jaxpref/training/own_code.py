"""Tries code of the user's own before a run begins: objectives, families, losses and rewards."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from jaxpref.config import Config
from jaxpref.devices import sharding
from jaxpref.objectives import catalog
from jaxpref.recipes import own, sizes
from jaxpref.recipes.rewards import reward_terms
from jaxpref.training import build, host, programs


def try_own(
  config: Config,
  experiment: build.Experiment,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  *,
  say: Callable[[str], None],
) -> None:
  """Tries the user's own code: an objective or family on shapes alone, rewards on two blank pictures of each process.

  Raises:
    ValueError: one sentence on what is wrong with it.
  """
  rewards = () if experiment.reward is None else experiment.reward.host
  if rewards:
    assert experiment.model is not None
    first, sides = 2 * jax.process_index(), sizes.sides(experiment.model.image_size)
    blank = {first + i: np.full((*sides, 3), 255 * i, np.uint8) for i in range(2)}
    host.score(rewards, blank, experiment.captions()[:1] * 2 * jax.process_count())
  if ":" in config.objective or ":" in config.family:
    say("trying the training step on shapes ...")
  if ":" in config.objective:
    _try_step(config, experiment, optimizer, mesh)
  elif ":" in config.family:
    with own.calling(
      f"config.family={config.family}: the training step of {config.objective} with its model",
      config.family,
      "a jaxpref.models.base.Model",
      experiment.model,
    ):
      _try_step(config, experiment, optimizer, mesh)


def _try_step(
  config: Config, experiment: build.Experiment, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> None:
  """Traces the training step, checking a user's own objective."""
  rewards = () if experiment.reward is None else experiment.reward.host
  state = jax.eval_shape(programs.state_initializer(experiment, optimizer), experiment.params)
  with contextlib.closing(experiment.batches()) as batches:
    rows = next(batches)
  batch = {k: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype) for k, x in rows.items()}
  tried = experiment
  if ":" in config.objective:
    checked: Any = catalog.Checked(experiment.objective, config.objective, batch)
    tried = dataclasses.replace(experiment, objective=checked)
  draw, learn = (sharding.on_mesh(mesh, half) for half in programs.make_halves(config, tried, optimizer, mesh))
  drawn = jax.eval_shape(draw, state, experiment.frozen, batch)
  scores = {}
  if rewards:
    if drawn.images is None:
      raise ValueError(f"config.objective={config.objective}: its rollout draws no images; config.reward needs them.")
    scores = {r.name: jax.ShapeDtypeStruct(drawn.images.shape[:1], np.float32) for r, _ in rewards}
  jax.eval_shape(learn, state, experiment.frozen, batch, drawn, scores)


def versions(config: Config) -> dict[str, str]:
  """Returns the versions of the user's own code in a config, by package.module:Name."""
  named = [config.objective, config.loss.name, config.family]
  named += reward_terms(config) if catalog.method(config).facts.online else []
  return {spec: found for spec in named if own.is_own(spec) and (found := own.version(spec))}
