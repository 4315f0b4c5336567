"""A blind comparison of models by votes: the rule by which it ends, and what the votes say. Pure functions.

The rule is stated before the first vote. "fixed" ends after a number of pairs, and everything is computed once,
as for a scorer (docs/evaluation.md). "early" may end sooner: after each vote it weighs the evidence by a test that
stays valid however often one looks, the mixture of Robbins (Statistical Methods Related to the Law of the Iterated
Logarithm, 1970) for a coin: with w wins and l losses, e = 2^(w + l) B(w + 1, l + 1). If both models are equally good, e
ever reaches 1 / a with probability a at most (Ville's inequality).

A judgement has the number of a pair in `catalog.OfModels`, whose image_0 is the baseline's.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.evaluation import statistics
from jaxpref.voting import agreement, choices, judgements
from jaxpref.voting.judgements import Judgement

LEVEL = 0.05
STOPS = ("fixed", "early")
Cell = tuple[int, int, int]  # model, prompt, seed


@dataclasses.dataclass(frozen=True)
class Rule:
  """When a comparison ends.

  Attributes:
    votes: pairs after which it ends, skipped ones included.
    stop: one of STOPS; "early" ends as soon as each model is shown to differ from the baseline.
  """

  votes: int
  stop: str = "fixed"

  def in_words(self) -> str:
    """Returns the rule as a sentence."""
    if self.stop == "fixed":
      return f"Voting ends after {self.votes} pairs, and the results are computed once."
    return (
      f"Voting ends as soon as the evidence reaches its limit (a test that may be looked at after each vote, at "
      f"{LEVEL:.0%} for all comparisons together), and after {self.votes} pairs at the latest."
    )


def evidence(wins: int, losses: int) -> float:
  """Returns the logarithm of e, the evidence against "each side wins with probability 1/2"; see above.

  >>> evidence(0, 0), round(math.exp(evidence(10, 0)), 1)
  (0.0, 93.1)
  """
  return _mixture(wins, losses) + (wins + losses) * math.log(2.0)


def _mixture(wins: int, losses: int) -> float:
  """Returns log B(wins + 1, losses + 1)."""
  return math.lgamma(wins + 1) + math.lgamma(losses + 1) - math.lgamma(wins + losses + 2)


def sequence_interval(wins: int, losses: int, level: float = LEVEL) -> tuple[float, float]:
  """Returns the win rates that the evidence does not exclude: they hold the true one at all times with 1 - level.

  >>> [round(x, 3) for x in sequence_interval(10, 0)]
  [0.583, 1.0]
  """
  number, limit = wins + losses, math.log(1.0 / level)
  power = lambda p: (wins * math.log(p) if wins else 0.0) + (losses * math.log(1 - p) if losses else 0.0)
  excludes = lambda p: _mixture(wins, losses) - power(p) >= limit
  middle = wins / number if number else 0.5

  def edge(outside: float, inside: float) -> float:
    for _ in range(60):
      half = (outside + inside) / 2
      outside, inside = (half, inside) if excludes(half) else (outside, half)
    return inside

  tiny = 1e-12
  inside = min(max(middle, tiny), 1 - tiny)
  low = edge(tiny, inside) if excludes(tiny) else 0.0
  high = edge(1 - tiny, inside) if excludes(1 - tiny) else 1.0
  return low, high


# ---- Which votes count -------------------------------------------------------------------------------------------


def answered_pairs(found: Iterable[Judgement]) -> int:
  """Returns how many different pairs somebody has answered, be it by skipping."""
  return len({j.pair for j in found if not j.repeat})


def has_ended(rule: Rule, cells: Sequence[Cell], found: Sequence[Judgement]) -> bool:
  """Returns whether a comparison is over."""
  if answered_pairs(found) >= rule.votes:
    return True
  models = sorted({m for m, _, _ in cells})
  return rule.stop == "early" and min(highest_evidence(cells, found, m) for m in models) >= limit(len(models))


def limit(comparisons: int) -> float:
  """Returns the evidence, as a logarithm, that shows a difference; corrected for the comparisons (Bonferroni)."""
  return math.log(comparisons / LEVEL)


def until_the_end(rule: Rule, cells: Sequence[Cell], found: Sequence[Judgement]) -> list[Judgement]:
  """Returns the judgements up to the one by which the comparison ended; all of them if it has not."""
  if not has_ended(rule, cells, found):
    return list(found)
  low, high = 1, len(found)  # the first prefix by which it has ended: evidence and counts only grow
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if has_ended(rule, cells, found[:middle]) else (middle + 1, high)
  return list(found[:low])


def _first_of_prompts(cells: Sequence[Cell], found: Iterable[Judgement], model: int) -> list[bool]:
  """Returns whether the model won, for the first decided vote on each prompt: these votes are independent."""
  first: dict[int, bool] = {}
  for j in found:
    of_model, prompt, _ = cells[j.pair]
    if of_model == model and not j.repeat and j.said in (choices.FIRST, choices.SECOND):
      first.setdefault(prompt, j.said == choices.SECOND)
  return list(first.values())


def highest_evidence(cells: Sequence[Cell], found: Iterable[Judgement], model: int) -> float:
  """Returns the highest evidence, as a logarithm, that there ever was about a model."""
  wins, highest = 0, 0.0
  for number, won in enumerate(_first_of_prompts(cells, found, model), 1):
    wins += won
    highest = max(highest, evidence(wins, number - wins))
  return highest


# ---- What the votes say ------------------------------------------------------------------------------------------


def shares(cells: Sequence[Cell], found: Iterable[Judgement], model: int) -> dict[int, float]:
  """Returns for each judged prompt the share of its votes that a model won against the baseline; ties count half.

  Two bad pictures are a tie. A prompt's pairs count the same, whatever number of voters judged each.
  """
  of_prompt: dict[int, list[float]] = defaultdict(list)
  for pair, verdicts in judgements.by_pair(found).items():
    of_model, prompt, _ = cells[pair]
    if of_model == model:
      of_first = [choices.share_of_first(said) for said in verdicts]
      of_prompt[prompt].append(float(np.mean([0.5 if share is None else 1.0 - share for share in of_first])))
  return {prompt: float(np.mean(values)) for prompt, values in sorted(of_prompt.items())}


def results(rule: Rule, cells: Sequence[Cell], models: Sequence[str], found: Sequence[Judgement]) -> dict[str, Any]:
  """Returns all numbers of a comparison.

  Args:
    rule: as it was stated.
    cells: of `catalog.OfModels`.
    models: names, the baseline first.
    found: all judgements, in the order of time; those after the end are left out.

  Returns:
    `rule` as a sentence, `ended`, the numbers of `votes` (without repeats), `pairs`, `ties` and `bad`, `alpha` of
    several voters, and `comparisons`: model -> `prompts`, `win_rate`, `win_rate_interval`, `prompts_won`,
    `prompts_lost`, `prompts_tied`, `p`, `p_holm` and `verdict`. With an early stop the interval, p and the win rate are
    those of the first decided vote on each prompt (`sequence_interval`), as the usual ones would not hold.
  """
  counted = [j for j in until_the_end(rule, cells, found) if not j.repeat and j.said is not None]
  compared: dict[str, dict[str, Any]] = {}
  for m, name in enumerate(models[1:], 1):
    of_prompts = shares(cells, counted, m)
    if of_prompts:
      compared[name] = _comparison(rule, cells, counted, m, np.asarray(list(of_prompts.values())), len(models) - 1)
  for one, p_holm in zip(compared.values(), statistics.holm([one["p"] for one in compared.values()]), strict=True):
    one["p_holm"] = p_holm if rule.stop == "fixed" else min(1.0, one["p"] * (len(models) - 1))
    low, high = one["win_rate_interval"] or (0.0, 1.0)
    significant = one["p_holm"] < LEVEL or (rule.stop == "early" and one["p_holm"] <= LEVEL)
    one["verdict"] = "undecided" if not significant or low <= 0.5 <= high else "higher" if low > 0.5 else "lower"
  verdicts = judgements.by_pair(counted)
  return {
    "rule": rule.in_words(),
    "ended": has_ended(rule, cells, found),
    "votes": len(counted),
    "pairs": len(verdicts),
    "ties": sum(j.said == choices.TIE for j in counted),
    "bad": sum(j.said == choices.BAD for j in counted),
    "alpha": agreement.krippendorff_alpha([said for said in verdicts.values() if len(said) > 1]),
    "baseline": models[0],
    "comparisons": compared,
  }


def _comparison(
  rule: Rule, cells: Sequence[Cell], counted: Sequence[Judgement], model: int, won: np.ndarray, comparisons: int
) -> dict[str, Any]:
  test = statistics.sign_test(won[:, None], 1.0 - won[:, None])
  found = {"prompts": len(won), **statistics.share(won), **test}
  if rule.stop == "fixed":
    return found
  first = _first_of_prompts(cells, counted, model)
  wins, losses = sum(first), len(first) - sum(first)
  return found | {
    "win_rate": wins / len(first) if first else 0.5,
    "win_rate_interval": sequence_interval(wins, losses, LEVEL / comparisons),
    "p": min(1.0, math.exp(-highest_evidence(cells, counted, model))),
  }


def scores(
  cells: Sequence[Cell], models: Sequence[str], found: Iterable[Judgement], prompts: int, seeds: int
) -> tuple[Mapping[str, np.ndarray], int]:
  """Returns the share of its votes that each picture won, f64[P, S] by model, and how many pictures have a vote.

  A tie, two bad pictures, and a picture without a vote count 1/2. The baseline's pictures count against all models.
  """
  won = {name: np.full((prompts, seeds), 0.5) for name in models}
  sums: dict[tuple[int, int, int], list[float]] = defaultdict(list)
  for pair, verdicts in judgements.by_pair(found).items():
    model, prompt, seed = cells[pair]
    for share in map(choices.share_of_first, verdicts):
      first = 0.5 if share is None else share
      sums[0, prompt, seed].append(first)
      sums[model, prompt, seed].append(1.0 - first)
  for (model, prompt, seed), values in sums.items():
    won[models[model]][prompt, seed] = np.mean(values)
  return won, len(sums)
