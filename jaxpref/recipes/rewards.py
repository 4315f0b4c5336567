"""Reads `config.reward`: which rewards, and how much each weighs."""

import math
from typing import Any

from jaxpref.recipes.own import is_own

PREFERENCE_MODEL = "preference_model"  # the term that names `config.preference_model`
LATENT = "latent"  # a latent reward model: `config.preference_model`, or latent=FOLDER


def reward_terms(config: Any) -> dict[str, float]:
  """Returns the weights of `config.reward` by term: names, NAME=FOLDER, package.module:function.

  Raises:
    ValueError: the text has another form, names a reward twice, or has a weight that is not finite or is 0.

  >>> import types
  >>> reward_terms(types.SimpleNamespace(reward="pickscore:1, aesthetic=weights/aesthetic:0.1, mine:brightness"))
  {'pickscore': 1.0, 'aesthetic=weights/aesthetic': 0.1, 'mine:brightness': 1.0}
  """
  return terms_of(config.reward or PREFERENCE_MODEL, f"config.reward={config.reward!r}")


def terms_of(text: str, given: str) -> dict[str, float]:
  """Returns the weights of a sum of rewards, like `reward_terms`.

  Args:
    text: the sum.
    given: the option that names it, for messages.
  """
  found: dict[str, float] = {}
  for term in text.split(","):
    spec, weight = _split(term.strip())
    if ":" in spec and "=" not in spec and not is_own(spec):
      raise ValueError(
        f"{given}: {spec!r} is neither NAME:WEIGHT with a number as its weight nor package.module:function; expected "
        "such terms separated by commas, e.g. pickscore:1,aesthetic:0.1."
      )
    if spec.endswith("="):
      raise ValueError(f"{given}: {spec!r} names no folder; expected NAME, or NAME=FOLDER for weights elsewhere.")
    if not spec or spec in found or not math.isfinite(weight) or not weight:
      raise ValueError(
        f"{given}: {term.strip()!r}; expected NAME:WEIGHT separated by commas, such as pickscore:1,aesthetic:0.1, each "
        "name once, and weights that are finite and not 0."
      )
    found[spec] = weight
  return found


def _split(term: str) -> tuple[str, float]:
  spec, colon, last = term.rpartition(":")
  try:
    return (spec, float(last)) if colon else (term, 1.0)
  except ValueError:  # package.module:function without a weight
    return term, 1.0


def is_function(spec: str) -> bool:
  """Returns whether a term of `config.reward` is package.module:function."""
  return is_own(spec)


def of_preference_model(terms: Any) -> list[str]:
  """Returns the terms of `config.reward` that stand for the network of `config.preference_model`."""
  return [spec for spec in terms if spec in (PREFERENCE_MODEL, LATENT)]


def is_latent(spec: str) -> bool:
  """Returns whether a term of `config.reward` is a latent reward model, which needs no image."""
  return spec.partition("=")[0] == LATENT and not is_function(spec)
