"""The methods by name: their facts, which are known before anything is loaded, and how a recipe makes them.

A new method is its file in this folder, its section of `jaxpref/config.py`, and its entry here.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.config import FACTS, Config, Facts, facts, own_method
from jaxpref.models.base import Model
from jaxpref.models.latent_reward import LatentRewardModel
from jaxpref.models.preference import StepAwareCLIPModel
from jaxpref.objectives import pairs
from jaxpref.objectives.base import Drawn, Experience, Objective
from jaxpref.objectives.kto import DiffusionKTO
from jaxpref.objectives.latent_reward import LatentPreference
from jaxpref.objectives.pairs import DiffusionDPO
from jaxpref.objectives.policy_gradient import PolicyGradient, trained_steps
from jaxpref.objectives.preference_model import PreferenceModel
from jaxpref.objectives.pretraining import Denoising
from jaxpref.objectives.spo import SPO, pool_groups
from jaxpref.recipes import own
from jaxpref.rewards.base import Weighted

Scorer = Weighted | StepAwareCLIPModel | LatentRewardModel | None


@dataclasses.dataclass(frozen=True)
class Updates:
  """What the updates of a recipe's step consist of.

  Attributes:
    count: updates in a step, or in an iteration in which all pairs are valid.
    rows: rows of one update, which micro-batches share: pairs, images, or transitions of the first kind.
    passes: passes of the network for a row of an update, forward and backward, without guidance.
    other_rows, other_passes: the same for the second kind of an online method's experience.
  """

  count: float
  rows: int
  passes: int
  other_rows: int = 0
  other_passes: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
  """A method: its facts, and its objective.

  Attributes:
    facts: what a recipe may set for it, and which data and models it needs.
    make: (config, text-to-image model, scorer) -> objective; None for methods that train a network from scratch
      (`training.build`). The scorer is the rewards of an online method, the network that becomes a preference model, or
      None.
    options: the section of the config with its sampler and guidance, if it has one.
    reference: config -> whether it compares with a reference model.
    images: config -> images in one row of the batch, read or drawn.
    updates: config -> its `Updates`.
    config: for your own method: the dataclass of its options, `config.options` (docs/extending.md).
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
  """Returns the method of `config.objective`: one of the table, or the user's own as package.module:NAME.

  Raises:
    ValueError: there is no such method.
  """
  facts(config)
  return _own(config.objective) if ":" in config.objective else METHODS[config.objective]


def make(config: Config, model: Model, scorer: Scorer = None) -> Any:
  """Returns the objective of a config that trains a text-to-image model, or a preference model with its help.

  Raises:
    OwnCodeError: the user's own `make` raises, or returns something else.
  """
  found = method(config)
  assert found.make is not None, config.objective
  objective = found.make(config, model, scorer)
  if ":" in config.objective:
    _check_objective(objective, found.facts, f"config.objective={config.objective}: its make")
  return objective


# ---- The user's own methods -------------------------------------------------------------------------------------


def _own(spec: str) -> Method:
  """Returns a user's own method, whose functions report what is wrong with them in one sentence."""
  found, given = own_method(spec), f"config.objective={spec}"
  if not isinstance(found, Method):
    raise own.OwnCodeError(f"{given}: it is of type {type(found).__name__}; expected a Method of {__name__}.")

  def guarded(name: str) -> Callable[..., Any]:
    function, takes = getattr(found, name), "(config, model, scorer)" if name == "make" else "(config)"
    said, expected = f"{given}: its {name}", f"a function of {takes}"
    if function is None:
      raise own.OwnCodeError(f"{given}: it has no {name}; expected {name}={expected}.")
    own.check_function(function, said, expected, *[None] * (3 if name == "make" else 1))

    def call(*arguments: Any) -> Any:
      with own.calling(said, spec, expected, function):
        return function(*arguments)

    return call

  return dataclasses.replace(
    found,
    make=guarded("make"),
    reference=guarded("reference"),
    images=guarded("images"),
    updates=guarded("updates"),
  )


def _check_objective(objective: Any, of: Facts, given: str) -> None:
  """Raises for an object that is not an `Objective`, or not of the kind that the facts say."""
  needed = ["kinds", "statistics", "loss", "empty_loss", "timesteps"]
  needed += ["rollout", "experience", "update_rows"] if of.online else []
  if missing := [name for name in needed if not hasattr(objective, name)]:
    raise own.OwnCodeError(
      f"{given} returned {own.described(objective)}, which has no {', '.join(missing)}; expected a "
      "jaxpref.objectives.base.Objective."
    )
  if of.online != bool(objective.kinds):
    expected = "the name of a key for each kind of experience" if of.online else "(), as it draws nothing"
    raise own.OwnCodeError(
      f"{given} returned {own.described(objective)} with kinds={objective.kinds!r}, and its Facts say "
      f"online={of.online}; expected kinds to be {expected}."
    )


_PAIR = "a dict of name: (sum, count)"
_LOSS = f"(sum of the losses, their count, {_PAIR}): floats of shape [], computed by jax.numpy"
_EXPECTED = {
  "rollout": "a jaxpref.objectives.base.Drawn",
  "experience": "(Experience, a dict of means for the metrics)",
  "update_rows": "a number of rows",
  "statistics": f"None, or {_PAIR}",
  "loss": _LOSS,
  "empty_loss": "a number",
  "divergence": "a float of shape []",
}


class Checked:
  """A user's own objective while it is tried on shapes: reports what its functions raise and return in one sentence.

  Attributes:
    objective: the objective.
    spec: package.module:NAME.
    fields: fields of a batch, for messages.
  """

  def __init__(self, objective: Objective, spec: str, fields: Iterable[str]):
    self.objective, self.spec, self.fields = objective, spec, ", ".join(sorted(fields))

  def __getattr__(self, name: str) -> Any:
    found = getattr(self.objective, name)
    if name not in _EXPECTED:
      return found
    given, expected = f"config.objective={self.spec}: its {name}", _EXPECTED[name]

    def call(*arguments: Any, **named: Any) -> Any:
      where = f"{expected}, of batches with {self.fields}"
      with own.calling(given, self.spec, where, found):
        returned = found(*arguments, **named)
      if (what := _wrong(name, returned, len(self.objective.kinds))) is not None:
        raise own.OwnCodeError(f"{given} returned {what}{own.defined_at(found)}; expected {expected}.")
      return returned

    return call


def _wrong(name: str, returned: Any, kinds: int) -> str | None:
  """Returns in words what is wrong with the return value of an objective's function; None if nothing is."""
  of_tuple = {"loss": 3, "experience": 2}.get(name, 0)
  if of_tuple and not (isinstance(returned, tuple) and len(returned) == of_tuple):
    return own.described(returned)
  if name == "loss":
    wrong = next((x for x in returned[:2] if not _is_number(x)), None)
    floats = hasattr(returned[0], "dtype") and jnp.issubdtype(returned[0].dtype, jnp.floating)
    if wrong is not None or not floats:
      return f"{own.described(returned[0] if wrong is None else wrong)} among its sums"
    return _wrong_pairs(returned[2])
  if name == "experience":
    if not isinstance(returned[0], Experience) or len(returned[0].kinds) != kinds:
      return f"{own.described(returned[0])} for the experience, of {kinds} kinds"
    return None if isinstance(returned[1], dict) else f"{own.described(returned[1])} for the metrics"
  if name == "rollout":
    return None if isinstance(returned, Drawn) else own.described(returned)
  if name == "statistics":
    return None if returned is None else _wrong_pairs(returned)
  return None if _is_number(returned) else own.described(returned)


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float | jax.Array | np.ndarray | np.generic) and np.shape(x) == ()


def _wrong_pairs(found: Any) -> str | None:
  """Returns what is wrong with the pairs of a loss; None if nothing is."""
  if not isinstance(found, dict):
    return f"{own.described(found)} for the metrics"
  for name, pair in found.items():
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
      return f"{own.described(pair)} for the metric {name!r}"
  return None


def try_losses(config: Config) -> None:
  """Calls a user's own loss with shapes alone.

  Raises:
    OwnCodeError: see `pairs.try_own_loss`.
  """
  of = facts(config)
  if ":" in config.loss.name and of.losses:
    pairs.try_own_loss(config.loss.name, weighted=of.losses == "denoised")
