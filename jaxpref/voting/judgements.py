"""What votes say about pairs: judgements, and labels made of them. Pure functions."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from jaxpref.voting import choices
from jaxpref.voting.store import Vote

KINDS = ("majority", "soft", "voter")


class Judgement(NamedTuple):
  """What a voter said about a pair.

  Attributes:
    voter, pair: their numbers.
    said: one of `choices.VERDICTS`; None for a skipped pair.
    choice: one of `choices.CHOICES`.
    swapped: whether image_1 was A.
    repeat: whether the voter had judged the pair before; such judgements measure agreement, and make no labels.
    at: when, in seconds since 1970.
  """

  voter: int
  pair: int
  said: str | None
  choice: str
  swapped: bool
  repeat: bool
  at: float


def of_votes(votes: Iterable[Vote]) -> list[Judgement]:
  """Returns the judgements of votes, in their order."""
  return [
    Judgement(v.ask.voter, v.ask.pair, choices.verdict(v.choice, v.ask.swapped), v.choice, v.ask.swapped, v.ask.repeat,
              v.at)
    for v in votes
  ]  # fmt: skip


def by_pair(judgements: Iterable[Judgement]) -> dict[int, list[str]]:
  """Returns the verdicts on each pair, one of each voter; without skipped and repeated pairs."""
  found: dict[int, list[str]] = defaultdict(list)
  for judgement in judgements:
    if judgement.said is not None and not judgement.repeat:
      found[judgement.pair].append(judgement.said)
  return dict(found)


def are_bad(verdicts: Iterable[str]) -> bool:
  """Returns whether more than half of the verdicts call both images bad."""
  counts = Counter(verdicts)
  return 2 * counts[choices.BAD] > counts.total()


def soft_label(verdicts: Iterable[str]) -> float | None:
  """Returns the share of the votes that image_0 won, a tie being half a win; None if the pair is bad.

  >>> soft_label(["image_0", "image_0", "image_1", "tie"]), soft_label(["bad", "bad", "tie"])
  (0.625, None)
  """
  verdicts = list(verdicts)
  shares = [share for said in verdicts if (share := choices.share_of_first(said)) is not None]
  return None if are_bad(verdicts) or not shares else sum(shares) / len(shares)


def majority_label(verdicts: Iterable[str]) -> float | None:
  """Returns 1 if image_0 won more votes, 0 if image_1 did, 0.5 for as many; None if the pair is bad."""
  share = soft_label(verdicts)
  return None if share is None else 0.5 if share == 0.5 else float(share > 0.5)


def labels(judgements: Iterable[Judgement], kind: str, voter: int | None = None) -> dict[int, float | None]:
  """Returns label_0 of each judged pair, None for a pair whose images are both bad.

  Args:
    kind: one of KINDS; "voter": what that voter alone said.
    voter: number of the voter, for "voter".

  Raises:
    ValueError: another kind.
  """
  if kind not in KINDS:
    raise ValueError(f"labels={kind!r}; expected one of {', '.join(KINDS)}.")
  if kind == "voter":
    judgements = [judgement for judgement in judgements if judgement.voter == voter]
  label = soft_label if kind == "soft" else majority_label
  return {pair: label(verdicts) for pair, verdicts in by_pair(judgements).items()}
