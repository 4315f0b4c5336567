"""A vote that is going on: what each voter sees next, what was said, and what the summary shows.

The state in memory follows the file of votes: it changes only after the file has. Methods may be called from several
threads.
"""

import collections
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxpref.data import records
from jaxpref.voting import agreement, choices, judgements, pictures, schedule
from jaxpref.voting.catalog import Catalog
from jaxpref.voting.judgements import Judgement
from jaxpref.voting.store import Ask, Refused, Store, Vote

QUEUE = 2  # pairs that a voter's page holds: the one that is shown, and the next one
ABSENT_SECONDS = 600.0  # after which a voter's open pairs may be given to others
CACHED = 32  # pairs whose pictures are kept in memory
MAX_VOTERS = 1000
MAX_GAP = 60.0  # seconds between two votes that still count as voting, for the votes a minute
MAX_CAPTION = 2000  # characters shown


class Shown(NamedTuple):
  """A pair on the page: the name of its ask, its prompt, and the two pictures, A and B."""

  ask: str
  caption: str
  sides: tuple[pictures.Picture, pictures.Picture]


class Ballot:
  """Pairs, votes and voters.

  Attributes:
    catalog, store, rules: what it was made of.
    left_out: number of a pair -> why it cannot be shown.
  """

  def __init__(
    self,
    catalog: Catalog,
    store: Store,
    rules: schedule.Rules,
    *,
    ended: Callable[[list[Judgement]], bool] | None = None,
    drawing: Callable[[], str | None] | None = None,
    check: Callable[[], object] = lambda: None,
  ):
    """Reads the votes.

    Args:
      ended: of the judgements so far, numbers of pairs being those of the catalog: whether voting is over; None: never.
      drawing: what the page says while pairs are still drawn, None once they are all there.
      check: called before anything is written; raises OSError if another process has taken over the file.
    """
    self.catalog, self.store, self.rules = catalog, store, rules
    self.left_out: dict[int, str] = {}
    self.probability: np.ndarray | None = None  # see `schedule.choose`; whoever has a model sets it
    self._ended = ended
    self._drawing = drawing or (lambda: None)
    self._check = check
    self._lock = threading.RLock()
    self._of_store = {number: i for i, number in enumerate(store.numbers_of(catalog.keys))}
    self._numbers = list(self._of_store)
    self._order = schedule.order(catalog.keys, catalog.group, rules.seed)
    self._overlap = schedule.in_overlap(catalog.keys, rules.overlap, rules.seed)
    self._seen_at: dict[int, float] = {}
    self._cache: collections.OrderedDict[int, tuple[str, tuple[pictures.Picture, pictures.Picture]]]
    self._cache = collections.OrderedDict()
    self._cache_lock = threading.Lock()
    self._names = store.voters()
    self._votes = {vote.ask.ask: vote for vote in store.votes()}
    self._open: dict[str, Ask] = {ask.ask: ask for ask in store.open_asks()}

  # ---- Voters ----------------------------------------------------------------------------------------------------

  def join(self, name: str) -> int:
    """Returns the number of a voter, who may be new.

    Raises:
      Refused: there are MAX_VOTERS already.
    """
    with self._lock:
      if name not in self._names:
        if len(self._names) >= MAX_VOTERS:
          raise Refused(f"there are {MAX_VOTERS} voters already; use a known name.")
        self._names[name] = self.store.voter(name)
      voter = self._names[name]
      self._seen_at[voter] = time.monotonic()
      return voter

  def queue(self, voter: int) -> list[Shown]:
    """Returns the voter's open pairs, up to QUEUE, the one to show first; asks for new ones if there are fewer."""
    while True:
      with self._lock:
        asks = self._open_of(voter)
        while len(asks) < QUEUE and not self.has_ended() and (showing := self._choose(voter)) is not None:
          self._check()
          pair = self._numbers[showing.pair]
          ask = self.store.ask(voter, pair, swapped=showing.swapped, repeat=showing.repeat)
          self._open[ask.ask] = ask
          asks = self._open_of(voter)
        if self.has_ended():
          return []
      shown = [self._shown(ask) for ask in asks[:QUEUE]]
      if None not in shown:
        return [s for s in shown if s is not None]

  def _open_of(self, voter: int) -> list[Ask]:
    """Returns the asks that a voter can answer, in order."""
    can = lambda ask: ask.pair in self._of_store and self._of_store[ask.pair] not in self.left_out
    return sorted((a for a in self._open.values() if a.voter == voter and can(a)), key=lambda a: a.place)

  def _choose(self, voter: int) -> schedule.Showing | None:
    """Returns what to show a voter after the open pairs; None if there is nothing left."""
    mine, others = np.zeros(len(self._numbers), bool), np.zeros(len(self._numbers), bool)
    judged: list[int] = []
    repeated: list[int] = []
    asks = 0
    for vote in self._votes.values():
      number = self._of_store.get(vote.ask.pair)
      asks += vote.ask.voter == voter
      if number is None:
        continue
      if vote.ask.voter == voter:
        mine[number] = True
        if vote.choice != "skip":
          (repeated if vote.ask.repeat else judged).append(number)
      elif vote.choice != "skip":
        others[number] = True
    now = time.monotonic()
    for ask in self._open.values():
      number = self._of_store.get(ask.pair)
      asks += ask.voter == voter
      if number is not None and ask.voter == voter:
        mine[number] = True
        if ask.repeat:
          repeated.append(number)
      elif number is not None and now - self._seen_at.get(ask.voter, -np.inf) < ABSENT_SECONDS:
        others[number] = True
    rng = np.random.default_rng([self.rules.seed, voter, asks])
    if self.rules.repeats and (again := schedule.wants_repeat(rng, judged, repeated)) is not None:
      if again not in self.left_out:
        return schedule.Showing(again, not self._sides_of(voter, again), repeat=True)
    ready = self.catalog.ready().copy()
    ready[list(self.left_out)] = False
    candidates = schedule.allowed(mine, others, self._overlap, ready)
    pair = schedule.choose(rng, candidates, self._order, self.probability)
    return None if pair is None else schedule.Showing(pair, bool(rng.integers(2)))

  def _sides_of(self, voter: int, number: int) -> bool:
    """Returns whether image_1 was A when the voter first judged a pair."""
    pair = self._numbers[number]
    return next(v.ask.swapped for v in self._votes.values() if v.ask.voter == voter and v.ask.pair == pair)

  def _shown(self, ask: Ask) -> Shown | None:
    """Returns an ask with its pictures; None if they cannot be read: the pair is left out then."""
    number = self._of_store[ask.pair]
    try:
      caption, images = self._pictures(number)
    except (OSError, records.UnreadableImage, ValueError) as error:
      with self._lock:
        self.left_out[number] = str(error)
        print(f"left out pair {number}: {error}", file=sys.stderr)
      return None
    text = caption[:MAX_CAPTION].encode(errors="replace").decode()  # JSON can hold halves of characters, UTF-8 cannot
    return Shown(ask.ask, text, images[::-1] if ask.swapped else images)

  def _pictures(self, number: int) -> tuple[str, tuple[pictures.Picture, pictures.Picture]]:
    with self._cache_lock:
      if number in self._cache:
        self._cache.move_to_end(number)
        return self._cache[number]
    pair = self.catalog.read(number)
    first, second = (pictures.for_page(image) for image in pair.images)
    with self._cache_lock:
      self._cache[number] = pair.caption, (first, second)
      while len(self._cache) > CACHED:
        self._cache.popitem(last=False)
    return pair.caption, (first, second)

  def picture(self, ask: str, side: int) -> bytes:
    """Returns the PNG file of a pair's picture, A (0) or B (1).

    Raises:
      Refused: there is no such open ask.
    """
    with self._lock:
      found = self._open.get(ask)
    if found is None or found.pair not in self._of_store or (shown := self._shown(found)) is None:
      raise Refused("this picture is not shown to anybody; reload the page.")
    return shown.sides[side].content

  # ---- Votes -----------------------------------------------------------------------------------------------------

  def vote(self, voter: int, ask: str, choice: str, *, seconds: float = 0.0) -> None:
    """Writes a vote; it is on the disk when this returns. See `Store.vote`."""
    self._check()
    vote = self.store.vote(voter, ask, choice, seconds=seconds)
    with self._lock:
      if self._open.pop(ask, None) is not None:
        self._votes[ask] = vote

  def undo(self, voter: int) -> bool:
    """Takes back the voter's last vote and shows its pair again; returns False if there is none.

    Raises:
      Refused: voting is over by its rule, and everybody may have seen the results.
    """
    if self.has_ended():
      raise Refused("voting is over, and its votes stay as they are.")
    self._check()
    with self._lock:
      done = self.store.undo(voter)
      if done is None:
        return False
      self._votes.pop(done[0].ask.ask, None)
      self._open[done[1].ask] = done[1]
      return True

  def judgements(self) -> list[Judgement]:
    """Returns all judgements of pairs of the catalog, by their number there, in the order of time."""
    with self._lock:
      votes: list[Vote] = sorted(self._votes.values())
    return [j._replace(pair=self._of_store[j.pair]) for j in judgements.of_votes(votes) if j.pair in self._of_store]

  def has_ended(self) -> bool:
    """Returns whether voting is over by its rule."""
    return self._ended is not None and self._ended(self.judgements())

  # ---- What the page says ----------------------------------------------------------------------------------------

  def progress(self, voter: int) -> dict[str, Any]:
    """Returns what a voter sees of the own votes: numbers, votes a minute, agreement on repeated pairs, and the state.

    `state` is "voting", "drawing" (nothing is ready yet), "done" (this voter has judged all) or "ended" (by the rule).
    """
    found = self.judgements()
    mine = [j for j in found if j.voter == voter]
    first = {j.pair: j.said for j in mine if j.said is not None and not j.repeat}
    again = {j.pair: j.said for j in mine if j.said is not None and j.repeat}
    same, of = agreement.with_oneself(first, again)
    drawing = self._drawing()
    with self._lock:
      left = self._choose(voter) is not None or bool(self._open_of(voter))
    state = "ended" if self.has_ended() else "voting" if left else "drawing" if drawing else "done"
    return {
      "votes": len(mine),
      "judged": len({j.pair for j in found if j.said is not None}),
      "pairs": len(self._numbers) - len(self.left_out),
      "per_minute": rate(j.at for j in mine),
      "repeats": {"same": same, "of": of},
      "state": state,
      "drawing": drawing,
    }

  def summary(self) -> dict[str, Any]:
    """Returns what everybody may see: voters, their shares and overlap, agreement, and the bias of the sides."""
    found = self.judgements()
    counted = [j for j in found if j.said is not None and not j.repeat]
    verdicts = judgements.by_pair(found)
    several = [said for said in verdicts.values() if len(said) > 1]
    left, decided = agreement.share_of_left(j.choice for j in found)
    voters = []
    for name, voter in self._names.items():
      mine = {j.pair for j in counted if j.voter == voter}
      voters.append(
        {
          "name": name,
          "votes": sum(j.voter == voter for j in found),
          "share": len(mine) / len(verdicts) if verdicts else 0.0,
          "overlap": sum(len(verdicts[pair]) > 1 for pair in mine),
          "per_minute": rate(j.at for j in found if j.voter == voter),
        }
      )
    said = collections.Counter(j.choice for j in found)
    return {
      "pairs": len(self._numbers) - len(self.left_out),
      "judged": len(verdicts),
      "left_out": len(self.left_out),
      "voters": voters,
      "choices": {choice: said[choice] for choice in choices.CHOICES},
      "alpha": agreement.krippendorff_alpha(several),
      "alpha_pairs": len(several),
      "left": {"count": left, "of": decided},
      "first_without_bias": agreement.without_bias((j.swapped, j.said) for j in counted if j.said is not None),
      "ended": self.has_ended(),
    }


def rate(times: Iterable[float]) -> float | None:
  """Returns the votes a minute, pauses counted as MAX_GAP at most; None for fewer than two votes.

  >>> rate([0.0, 6.0, 12.0, 5000.0])
  2.5
  """
  ordered = sorted(times)
  gaps = [min(b - a, MAX_GAP) for a, b in zip(ordered, ordered[1:], strict=False)]
  return 60.0 * len(gaps) / sum(gaps) if sum(gaps) else None
