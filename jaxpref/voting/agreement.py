"""How far votes agree: between voters, of a voter with herself, and of the two sides of the page. Pure functions."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

from jaxpref.voting import choices


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
  """Returns Krippendorff's alpha for nominal data: 1 - D_o / D_e, 1 for perfect agreement and about 0 for chance.

  "Computing Krippendorff's Alpha-Reliability" (2011), section B: the coincidences of a unit with m values count
  1 / (m - 1). Two of three pairs with the same verdict of two voters, and all kinds of verdicts:

  >>> round(krippendorff_alpha([["a", "a"], ["b", "b"], ["a", "b"]]), 3)
  0.444

  Args:
    units: for each unit the values that observers gave it, without missing ones. Units with fewer than two values
      count for nothing.
  Returns:
    The coefficient; None if no unit has two values, or all values are the same, which says nothing about chance.
  """
  disagreement, totals = 0.0, Counter[Hashable]()
  for values in units:
    size = len(values)
    if size < 2:
      continue
    counts = Counter(values)
    totals.update(counts)
    disagreement += (size * size - sum(n * n for n in counts.values())) / (size - 1)
  number = sum(totals.values())
  expected = number * number - sum(n * n for n in totals.values())
  return 1.0 - (number - 1) * disagreement / expected if expected else None


def with_oneself(first: Mapping[int, str], again: Mapping[int, str]) -> tuple[int, int]:
  """Returns how many pairs a voter judged the same when they came again, and how many came again.

  Args:
    first, again: pair -> one of `choices.VERDICTS`; pairs that only one of the two has do not count.
  """
  both = first.keys() & again.keys()
  return sum(first[pair] == again[pair] for pair in both), len(both)


def share_of_left(said: Iterable[str]) -> tuple[int, int]:
  """Returns how many of the decided choices are "left", and how many are decided: half of them, without a bias.

  Args:
    said: each of `choices.CHOICES`.
  """
  decided = [choice for choice in said if choice in ("left", "right")]
  return decided.count("left"), len(decided)


def without_bias(verdicts: Iterable[tuple[bool, str]]) -> float | None:
  """Returns the share of decided votes for image_0 with both orders of the sides counted the same; None without both.

  A voter who favours the left side favours whichever image is there. The mean over the two orders takes that out, even
  if one order was shown more often.

  Args:
    verdicts: (whether image_1 was A, one of `choices.VERDICTS`) of each vote.
  """
  means = []
  decided = [(swapped, said) for swapped, said in verdicts if said in (choices.FIRST, choices.SECOND)]
  for order in (False, True):
    of_order = [said == choices.FIRST for swapped, said in decided if swapped == order]
    if not of_order:
      return None
    means.append(sum(of_order) / len(of_order))
  return sum(means) / 2
