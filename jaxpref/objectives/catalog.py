"""The methods by name: what is asked of them before anything is loaded, and how a recipe makes them.

A new method is its file in this folder, its section of `jaxpref/config.py`, and its entry here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxpref.config import FACTS, Config, Facts, facts, load_named
from jaxpref.models.base import Model
from jaxpref.models.latent_reward import LatentRewardModel
from jaxpref.models.preference import StepAwareCLIPModel
from jaxpref.objectives import pairs
from jaxpref.objectives.base import Objective
from jaxpref.objectives.kto import DiffusionKTO
from jaxpref.objectives.latent_reward import LatentPreference
from jaxpref.objectives.pairs import DiffusionDPO
from jaxpref.objectives.policy_gradient import PolicyGradient, trained_steps
from jaxpref.objectives.preference_model import PreferenceModel
from jaxpref.objectives.pretraining import Denoising
from jaxpref.objectives.spo import SPO, pool_groups
from jaxpref.rewards.base import Weighted

Scorer = Weighted | StepAwareCLIPModel | LatentRewardModel | None


@dataclasses.dataclass(frozen=True)
class Updates:
  """What the updates of a step are made of, of a recipe.

  Attributes:
    count: of a step, or of an iteration in which all pairs are valid.
    rows: of one update, which micro-batches share: pairs, images, or transitions of the first kind.
    passes: of the network for a row of an update, forward and backward, without guidance.
    other_rows, other_passes: the same of the second kind of an online method's experience.
  """

  count: float
  rows: int
  passes: int
  other_rows: int = 0
  other_passes: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
  """A method: what is asked of it before anything is loaded, and its objective.

  Attributes:
    facts: what a recipe may set for it, and which data and models it needs.
    make: the objective of (config, text-to-image model, scorer); None for those that train a network from nothing
      (`training.build`). The scorer is the rewards of an online method, the network that is to become a preference
      model, or None.
    options: the section of the config with its sampler and guidance, if it has one.
    reference: of a config: whether it compares with a reference model.
    images: of a config: those of one row of the batch, read or drawn.
    updates: of a config.
    config: of a method of your own: the dataclass of its options, `config.options` (docs/extending.md).
  """

  facts: Facts
  make: Callable[[Config, Model, Scorer], Objective] | None = None
  options: str | None = None
  reference: Callable[[Config], bool] = lambda config: False
  images: Callable[[Config], int] = lambda config: 1
  updates: Callable[[Config], Updates] = lambda config: Updates(1.0, config.batch_size, 1)
  config: type | None = None


# ---- How a config makes them ------------------------------------------------------------------------------------


def _dpo(config: Config, model: Model, scorer: Scorer) -> Objective:
  o, total = config.loss, model.process.num_train_timesteps
  if config.timesteps.num_bins > total:
    raise ValueError(f"config.timesteps.num_bins={config.timesteps.num_bins}; expected at most {total} timesteps.")
  loss = pairs.denoised_loss(
    o.name, beta=o.beta, label_smoothing=o.label_smoothing, snr=o.snr, num_train_timesteps=total
  )
  return DiffusionDPO(
    model,
    loss if o.safeguard is None else pairs.safeguarded(loss, mu=o.safeguard),
    reference_free=o.name in pairs.REFERENCE_FREE,
    gamma=config.timesteps.gamma,
    num_bins=config.timesteps.num_bins,
    reward_scale=config.timesteps.reward_scale,
  )


def _kto(config: Config, model: Model, scorer: Scorer) -> Objective:
  return DiffusionKTO(model, beta=config.loss.beta, **config.kto.to_dict())


def _spo(config: Config, model: Model, scorer: Scorer) -> Objective:
  assert isinstance(scorer, Weighted)
  o = config.loss
  loss = pairs.pair_loss(o.name, beta=o.beta, label_smoothing=o.label_smoothing)
  return SPO(model, scorer, loss, **config.spo.to_dict())


def _grpo(config: Config, model: Model, scorer: Scorer) -> Objective:
  assert isinstance(scorer, Weighted)
  return PolicyGradient(model, scorer, **config.grpo.to_dict())


def _spm(config: Config, model: Model, scorer: Scorer) -> Objective:
  assert isinstance(scorer, StepAwareCLIPModel)
  return PreferenceModel(model, scorer, **config.spm.to_dict())


def _lrm(config: Config, model: Model, scorer: Scorer) -> Objective:
  assert isinstance(scorer, LatentRewardModel)
  o, total = config.lrm, model.process.num_train_timesteps
  if o.last_time >= total:
    raise ValueError(f"config.lrm.last_time={o.last_time}; expected a time below {total}, as {config.model} has.")
  return LatentPreference(model, scorer, o.first_time, o.last_time, o.time_step)


# ---- What their updates are -------------------------------------------------------------------------------------


def _of_pairs(config: Config) -> Updates:
  return Updates(1.0, config.batch_size, 2)


def _spo_updates(config: Config) -> Updates:
  s = config.spo
  groups = pool_groups(
    num_steps=s.num_inference_steps,
    warmup_steps=s.warmup_steps,
    inner_steps=s.inner_steps,
    pool_last_step=s.pool_last_step,
  )
  shared, separate = len(groups), sum(groups) - len(groups)
  size = min(s.minibatch, shared * config.batch_size)
  other = -(-size * separate // shared)
  sizes = ((shared, size), (separate, other))
  count = max(-(-of_prompt * config.batch_size // of_update) for of_prompt, of_update in sizes if of_update)
  return Updates(float(count), size, 1, other, 2)


def _grpo_updates(config: Config) -> Updates:
  g = config.grpo
  steps = config.batch_size * g.group_size * trained_steps(g.num_inference_steps, g.timestep_fraction)
  size = min(g.minibatch, steps)
  return Updates(float(-(-steps // size)), size, 1)


# ---- The table --------------------------------------------------------------------------------------------------

_DPO = Method(
  facts=FACTS["dpo"],
  make=_dpo,
  reference=lambda config: config.loss.name not in pairs.REFERENCE_FREE,
  images=lambda config: 2,
  updates=_of_pairs,
)
METHODS: dict[str, Method] = {
  "spo": Method(
    facts=FACTS["spo"],
    make=_spo,
    options="spo",
    reference=lambda config: True,
    updates=_spo_updates,
  ),
  "grpo": Method(
    facts=FACTS["grpo"],
    make=_grpo,
    options="grpo",
    reference=lambda config: bool(config.grpo.kl_coef),
    images=lambda config: config.grpo.group_size,
    updates=_grpo_updates,
  ),
  "dpo": _DPO,
  "tdpo": _DPO,
  "kto": Method(FACTS["kto"], _kto, reference=lambda config: True),
  "spm": Method(FACTS["spm"], _spm, options="spm", images=lambda config: 2),
  "lrm": Method(FACTS["lrm"], _lrm, images=lambda config: 2),
  "denoise": Method(FACTS["denoise"], lambda config, model, scorer: Denoising(model)),
  "autoencode": Method(FACTS["autoencode"]),
  "contrastive": Method(FACTS["contrastive"]),
  "classify": Method(FACTS["classify"]),
}


def method(config: Config) -> Method:
  """That of `config.objective`: of the table, or of one's own, package.module:NAME.

  Raises:
    ValueError: it names none.
  """
  facts(config)
  if ":" in config.objective:
    return load_named(config.objective, "config.objective", "NAME")
  return METHODS[config.objective]


def make(config: Config, model: Model, scorer: Scorer = None) -> Any:
  """The objective of a config that trains a text-to-image model, or a preference model with its help."""
  found = method(config).make
  assert found is not None, config.objective
  return found(config, model, scorer)
