"""A vote that is going on: several voters, repeats, undo, pictures that cannot be read, and what the summary says."""

import threading

import pytest

from jaxpref.voting import catalog, schedule, store
from jaxpref.voting.ballot import Ballot
from jaxpref.voting.store import Refused
from tests.voting.made import ballot, make_pairs, png, vote


@pytest.fixture
def folder(tmp_path):
  return make_pairs(tmp_path / "pairs", 60)


def test_a_voter_sees_each_pair_once(folder):
  made = ballot(folder, repeats=False)
  done = vote(made, "Ada", count=100)
  assert sorted(pair for pair, _ in done) == list(range(60))
  assert 15 < sum(swapped for _, swapped in done) < 45
  assert made.progress(made.join("Ada"))["state"] == "done"


def test_what_is_shown_is_the_pair_on_its_sides(folder):
  made = ballot(folder)
  ada = made.join("Ada")
  for shown in made.queue(ada):
    ask = made._open[shown.ask]
    number = made._of_store[ask.pair]
    levels = (number, 128 + number)
    assert [side.content for side in shown.sides] == [png(level) for level in (levels[::-1] if ask.swapped else levels)]
    assert shown.caption == f"prompt {number}" and made.picture(shown.ask, 1) == shown.sides[1].content


def test_the_next_pair_is_known_before_the_vote(folder):
  made = ballot(folder)
  ada = made.join("Ada")
  first, second = made.queue(ada)
  made.vote(ada, first.ask, "left")
  assert made.queue(ada)[0] == second


def test_reload_and_restart_show_the_same_pairs(folder):
  made = ballot(folder)
  shown = made.queue(made.join("Ada"))
  assert made.queue(made.join("Ada")) == shown
  made.store.close()
  again = ballot(folder)
  assert again.queue(again.join("Ada")) == shown


def test_voters_share_the_pairs_and_have_the_overlap_in_common(folder):
  made = ballot(folder, overlap=0.3, repeats=False)
  done = {"Ada": [], "Bob": []}
  for _ in range(60):
    for name in done:
      done[name] += vote(made, name)
  seen = {name: {pair for pair, _ in pairs} for name, pairs in done.items()}
  overlap = set(schedule.in_overlap(made.catalog.keys, 0.3, 0).nonzero()[0].tolist())
  assert seen["Ada"] | seen["Bob"] == set(range(60)) and seen["Ada"] & seen["Bob"] == overlap
  summary = made.summary()
  assert [voter["overlap"] for voter in summary["voters"]] == [len(overlap)] * 2
  assert summary["alpha_pairs"] == len(overlap) and summary["judged"] == 60


def test_an_absent_voter_s_open_pairs_go_to_others(folder, monkeypatch):
  made = ballot(folder, overlap=0.0, repeats=False)
  kept = {made._of_store[made._open[shown.ask].pair] for shown in made.queue(made.join("Ada"))}
  seen = {pair for pair, _ in vote(made, "Bob", count=100)}
  assert seen == set(range(60)) - kept
  monkeypatch.setattr("jaxpref.voting.ballot.ABSENT_SECONDS", 0.0)
  assert {pair for pair, _ in vote(made, "Bob", count=100)} == kept


def test_a_skipped_pair_goes_to_another_voter(folder):
  made = ballot(folder, overlap=0.0, repeats=False)
  ((skipped, _),) = vote(made, "Ada", "skip")
  assert skipped in {pair for pair, _ in vote(made, "Bob", count=100)}
  assert skipped not in {pair for pair, _ in vote(made, "Ada", count=100)}


def test_repeats_are_mirrored_and_counted_for_the_voter_alone(tmp_path):
  made = ballot(make_pairs(tmp_path / "pairs", 150))
  done = vote(made, "Ada", "left", count=250)
  first, repeated = {}, []
  for place, (pair, swapped) in enumerate(done):
    if pair in first:
      repeated.append(pair)
      assert swapped != first[pair][1] and place - first[pair][0] > schedule.REPEAT_GAP
    else:
      first[pair] = place, swapped
  assert len(first) == 150 and 2 <= len(repeated) <= 18 and len(repeated) == len(set(repeated))
  progress = made.progress(made.join("Ada"))
  assert progress["repeats"] == {"same": 0, "of": len(repeated)}  # always left: never the same image
  assert progress["votes"] == len(done) and progress["judged"] == 150
  assert "repeats" not in str(made.summary())
  assert made.summary()["left"] == {"count": len(done), "of": len(done)}


def test_undo_shows_the_pair_again_and_then_the_ones_that_were_next(folder):
  made = ballot(folder)
  ada = made.join("Ada")
  assert not made.undo(ada)
  before = made.queue(ada)
  made.vote(ada, before[0].ask, "left")
  later = made.queue(ada)
  assert made.undo(ada)
  now = made.queue(ada)
  assert [s.sides for s in now] == [before[0].sides, later[0].sides] and now[0].ask != before[0].ask
  made.vote(ada, now[0].ask, "right")
  assert [j.choice for j in made.judgements()] == ["right"]


def test_a_late_copy_of_a_vote_changes_nothing(folder):
  made = ballot(folder)
  ada = made.join("Ada")
  shown = made.queue(ada)[0]
  made.vote(ada, shown.ask, "left")
  made.vote(ada, shown.ask, "left")
  assert len(made.judgements()) == 1
  made.undo(ada)
  made.vote(ada, shown.ask, "left")
  assert made.judgements() == []


def test_pictures_that_cannot_be_read_are_left_out(folder, capsys):
  (folder / "images" / "3_0.png").write_bytes(b"no picture")
  made = ballot(folder, repeats=False)
  (folder / "images" / "4_1.png").unlink()  # moved while people vote
  done = vote(made, "Ada", count=100)
  assert {pair for pair, _ in done} == set(range(60)) - {3, 4} and sorted(made.left_out) == [3, 4]
  assert made.summary()["left_out"] == 2 and made.progress(made.join("Ada"))["pairs"] == 58
  assert "left out pair 3: 10 bytes in no known image format" in capsys.readouterr().err


def test_a_picture_is_given_for_open_pairs_alone(folder):
  made = ballot(folder)
  ada = made.join("Ada")
  shown = made.queue(ada)[0]
  made.vote(ada, shown.ask, "left")
  for ask in (shown.ask, "", "nothing", "../votes.sqlite"):
    with pytest.raises(Refused, match="is not shown to anybody"):
      made.picture(ask, 0)


def test_agreement_of_two_voters(folder):
  made = ballot(folder, overlap=1.0, repeats=False)
  ada, bob = made.join("Ada"), made.join("Bob")
  for name, voter in (("Ada", ada), ("Bob", bob)):
    for _ in range(60):
      shown = made.queue(voter)[0]
      ask = made._open[shown.ask]
      prefers_first = made._of_store[ask.pair] % 2 == 0 or (name == "Bob" and made._of_store[ask.pair] == 1)
      made.vote(voter, shown.ask, "left" if prefers_first != ask.swapped else "right")
  summary = made.summary()
  # 30 pairs of two a, 29 of two b, one of both: D_o = 2, D_e = (120^2 - 61^2 - 59^2) / 119.
  assert summary["alpha"] == pytest.approx(1 - 119 * 2 / (120**2 - 61**2 - 59**2))
  assert summary["alpha_pairs"] == 60 and summary["first_without_bias"] == pytest.approx(61 / 120, abs=0.02)


def test_a_rule_ends_voting(folder):
  made = ballot(folder, ended=lambda found: len(found) >= 3)
  assert len(vote(made, "Ada", count=10)) == 3
  assert made.progress(made.join("Ada"))["state"] == "ended" and made.summary()["ended"]
  with pytest.raises(Refused, match="voting is over, and its votes stay as they are"):
    made.undo(made.join("Ada"))


def test_while_pictures_are_drawn_the_page_waits(folder):
  saying = ["2 of 3 prompts are drawn."]
  made = ballot(folder, drawing=lambda: saying[0], repeats=False)
  vote(made, "Ada", count=100)
  progress = made.progress(made.join("Ada"))
  assert progress["state"] == "drawing" and progress["drawing"] == saying[0]
  saying[0] = None
  assert made.progress(made.join("Ada"))["state"] == "done"


def test_a_server_that_was_taken_over_writes_nothing_more(folder):
  taken = []

  def check():
    if taken:
      raise OSError("was taken over by another process")

  found = catalog.open_catalog(folder)
  made = Ballot(found, store.Store(folder / store.NAME), schedule.Rules(), check=check)
  ada = made.join("Ada")
  shown = made.queue(ada)
  made.vote(ada, shown[0].ask, "left")
  taken.append(True)
  for work in (lambda: made.vote(ada, shown[1].ask, "left"), lambda: made.undo(ada), lambda: made.queue(ada)):
    with pytest.raises(OSError, match="was taken over"):
      work()
  assert [vote.choice for vote in made.store.votes()] == ["left"]


def test_two_voters_at_once(folder):
  made = ballot(folder, overlap=0.0, repeats=False)
  done = {}
  threads = [threading.Thread(target=lambda n=n: done.update({n: vote(made, n, count=30)})) for n in ("Ada", "Bob")]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  pairs = [pair for of_voter in done.values() for pair, _ in of_voter]
  assert len(pairs) == len(set(pairs)) and len(made.store.votes()) == len(pairs) >= 58
