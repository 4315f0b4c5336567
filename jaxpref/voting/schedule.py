"""Which pair a voter sees next, and on which sides. Pure functions of what was asked before.

Each pair has a place in one order, drawn by a seed from its key, so that pairs of a later round do not move those of an
earlier one. A share of the pairs, the overlap, is for all voters: their agreement is measured on it. Each other pair is
for one voter, whoever comes to it first. One showing in twenty repeats a pair that the voter has already judged, with
the sides exchanged.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

REPEAT_EVERY = 20  # one showing in so many repeats a pair
REPEAT_GAP = 10  # votes since the pair was first shown, so that the voter does not remember it
ACTIVE_SHARE = (
  0.8  # of the showings of --active; the rest keeps to the order, so that the model sees all kinds of pairs
)


@dataclasses.dataclass(frozen=True)
class Rules:
  """How pairs are given to voters.

  Attributes:
    seed: of the order, the overlap, and the sides.
    overlap: share of the pairs that all voters judge, in [0, 1].
    repeats: whether one showing in REPEAT_EVERY repeats a pair.
  """

  seed: int = 0
  overlap: float = 0.1
  repeats: bool = True


@dataclasses.dataclass(frozen=True)
class Showing:
  """A pair to show.

  Attributes:
    pair: its number.
    swapped: whether image_1 is A.
    repeat: whether the voter has judged it before.
  """

  pair: int
  swapped: bool
  repeat: bool = False


def uniform(keys: Sequence[str], seed: int, purpose: str) -> np.ndarray:
  """Returns f64[N] in [0, 1), a number for each key that depends on nothing else but the seed and the purpose."""
  salt = f"{seed} {purpose} ".encode()
  digests = b"".join(hashlib.blake2b(salt + key.encode(), digest_size=8).digest() for key in keys)
  return (np.frombuffer(digests, "<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(keys: Sequence[str], group: np.ndarray, seed: int) -> np.ndarray:
  """Returns i64[N], the numbers of the pairs in the order in which they are asked.

  One pair of each group comes first, then a second one of each, and so on; otherwise the order is random.

  Args:
    keys: of the N pairs.
    group: i64[N], such as their prompts.
  """
  place = uniform(keys, seed, "order")
  by_group = np.lexsort((place, group))
  sorted_group = group[by_group]
  starts = np.flatnonzero(np.r_[True, sorted_group[1:] != sorted_group[:-1]]) if len(group) else np.zeros(0, np.int64)
  rank = np.empty(len(group), np.int64)
  rank[by_group] = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
  return np.lexsort((place, rank))


def in_overlap(keys: Sequence[str], share: float, seed: int) -> np.ndarray:
  """Returns bool[N]: the pairs that all voters judge."""
  return uniform(keys, seed, "overlap") < share


def allowed(mine: np.ndarray, of_others: np.ndarray, overlap: np.ndarray, ready: np.ndarray) -> np.ndarray:
  """Returns bool[N]: the pairs that may be shown to a voter for the first time.

  Args:
    mine: bool[N], whether the voter was asked.
    of_others: bool[N], whether somebody else was asked.
    overlap: bool[N], see `in_overlap`.
    ready: bool[N], whether both pictures are there.
  """
  return ready & ~mine & (overlap | ~of_others)


def wants_repeat(rng: np.random.Generator, judged: Sequence[int], repeated: Sequence[int]) -> int | None:
  """Returns the pair to repeat now, or None to show a new one; draws at most two numbers.

  Args:
    judged: pairs that the voter has decided, in order, each once.
    repeated: pairs that came again already.
  """
  if rng.random() >= 1.0 / REPEAT_EVERY:
    return None
  known = set(repeated)
  old = [pair for pair in judged[: max(0, len(judged) - REPEAT_GAP)] if pair not in known]
  return old[int(rng.integers(len(old)))] if old else None


def choose(
  rng: np.random.Generator, candidates: np.ndarray, ordered: np.ndarray, probability: np.ndarray | None = None
) -> int | None:
  """Returns the pair to show for the first time; None if there is none.

  Args:
    candidates: bool[N], see `allowed`.
    ordered: i64[N], see `order`.
    probability: f64[N], how likely image_0 is to be preferred as far as a model knows, NaN where it does not; with it
      the pair closest to 1/2 is asked in ACTIVE_SHARE of the showings. None: in order.
  """
  if probability is not None and rng.random() < ACTIVE_SHARE:
    unsure = np.where(candidates & np.isfinite(probability), np.abs(probability - 0.5), np.inf)
    best = int(np.argmin(unsure))
    if np.isfinite(unsure[best]):
      return best
  place = np.flatnonzero(candidates[ordered])
  return int(ordered[place[0]]) if len(place) else None
