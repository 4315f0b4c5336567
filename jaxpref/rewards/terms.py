"""Loads the rewards that `config.reward` names, and their parameters."""

from typing import Any

from jaxpref.config import AnyConfig
from jaxpref.files import pipelines
from jaxpref.recipes.rewards import LATENT, PREFERENCE_MODEL, is_function, is_latent, reward_terms
from jaxpref.rewards import published, shapes
from jaxpref.rewards.base import HostReward, Reward, Weighted
from jaxpref.rewards.latent import COMPONENT as LATENT_COMPONENT
from jaxpref.rewards.latent import LatentReward
from jaxpref.rewards.loading import (
  load_latent_reward,
  load_scorer,
  look_for_latent_reward,
  look_for_scorer,
  scorer_fingerprint,
)
from jaxpref.rewards.python import PythonReward
from jaxpref.rewards.step_aware import COMPONENT, StepAware


def check(config: AnyConfig) -> None:
  """Checks that all that `load` needs exists, without reading large weights; fetches hub models.

  Raises:
    ValueError, FileNotFoundError: one sentence: a reward is unknown, does not exist, or is the evaluation's judge.
  """
  terms = _known_terms(config)
  for spec in terms:
    if spec == PREFERENCE_MODEL:
      assert config.preference_model is not None  # by config.check
      look_for_scorer(config.preference_model)
      continue
    if is_latent(spec):
      look_for_latent_reward(_latent_folder(config, spec))
      continue
    published.check(spec, preferred_style=config.data.preferred_style)
    if spec.partition("=")[0] == "judge" and config.judge:
      own = scorer_fingerprint(spec.partition("=")[2] or "tiny-judge")
      if own == scorer_fingerprint(config.judge):
        raise ValueError(
          f"config.reward={config.reward!r}: the judge of the evaluation, config.judge={config.judge}, cannot also be "
          "trained on, as its numbers would then mean nothing; choose another reward, such as preference_model, or "
          "another judge."
        )


def _known_terms(config: AnyConfig) -> dict[str, float]:
  """Returns `reward_terms`; raises ValueError if a name is unknown or occurs twice."""
  terms = reward_terms(config)
  for spec in terms:
    known = (PREFERENCE_MODEL, *published.PUBLISHED, LATENT)
    published.refuse_weight(spec, f"config.reward={config.reward!r}")
    if not is_function(spec) and spec.partition("=")[0] not in known or spec.startswith(f"{PREFERENCE_MODEL}="):
      names = ", ".join(known)
      raise ValueError(
        f"config.reward={config.reward!r}: {spec} is unknown, expected {names}, one of them as NAME=FOLDER, or your "
        f"own function as package.module:function{published.near(spec, *known)}."
      )
  found = [spec.partition("=")[0] for spec in terms]
  if twice := [name for name in found if found.count(name) > 1]:
    raise ValueError(f"config.reward={config.reward!r}: {twice[0]} occurs twice; expected each name once.")
  return terms


def without_values(config: AnyConfig, scorer: str) -> str:
  """Returns `config.reward` with the same rewards as shapes alone, for planning; "" stays.

  Args:
    scorer: zeros:PRESET, for latent reward models other than `config.preference_model`.

  Raises:
    ValueError: a reward is unknown.
  """
  if not config.reward:
    return ""

  def named(spec):
    if spec in (PREFERENCE_MODEL, LATENT) or is_function(spec):
      return spec
    return f"{LATENT}={scorer}" if is_latent(spec) else shapes.without_values(spec)

  return ",".join(f"{named(spec)}:{weight!r}" for spec, weight in _known_terms(config).items())


def _latent_folder(config: AnyConfig, spec: str) -> str:
  """Returns the folder of a term's latent reward model."""
  return spec.partition("=")[2] or str(config.preference_model)  # config.check requires it


def load(config: AnyConfig, sharding: pipelines.Sharding = None) -> tuple[Weighted, dict[str, Any]]:
  """Returns a config's rewards, and by component the parameters of those in the graph, in the compute dtype.

  Args:
    sharding: where parameters go as they are read, see `pipelines.load_pipeline`.

  Raises:
    ValueError, FileNotFoundError: see `check`.
  """
  check(config)
  graph: list[tuple[Reward, float]] = []
  host: list[tuple[HostReward, float]] = []
  params: dict[str, Any] = {}
  for spec, weight in reward_terms(config).items():
    if spec == PREFERENCE_MODEL:
      assert config.preference_model is not None  # by config.check
      scorer, params[COMPONENT] = load_scorer(
        config.preference_model, dtype=config.dtype, param_dtype=config.dtype, seed=config.seed, sharding=sharding
      )
      graph.append((StepAware(scorer), weight))
    elif is_latent(spec):
      latent, params[LATENT_COMPONENT] = load_latent_reward(
        _latent_folder(config, spec),
        dtype=config.dtype,
        param_dtype=config.dtype,
        seed=config.seed,
        sharding=sharding,
      )
      graph.append((LatentReward(latent), weight))
    elif is_function(spec):
      host.append((PythonReward(published.load(spec), config.reward_timeout), weight))
    else:
      style = config.data.preferred_style
      reward, of_it = published.load_reward(spec, dtype=config.dtype, placement=sharding, preferred_style=style)
      params[reward.name] = of_it
      graph.append((reward, weight))
  return Weighted(tuple(graph), tuple(host)), params
