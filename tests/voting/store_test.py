"""The file of votes: nothing is lost or counted twice, whatever happens to the process, the disk or the request."""

import json
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from jaxpref.voting import store
from jaxpref.voting.store import Refused, Store

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path):
  return tmp_path / store.NAME


def begun(file, pairs=3):
  votes = Store(file)
  votes.numbers_of([f"pair {i}" for i in range(pairs)])
  return votes, votes.voter("Ada")


def test_a_vote_is_there_after_reopening(file):
  votes, ada = begun(file)
  ask = votes.ask(ada, 2, swapped=True)
  vote = votes.vote(ada, ask.ask, "left", seconds=1.5)
  assert vote.ask == ask and vote.choice == "left" and vote.seconds == 1.5
  votes.close()
  again = Store(file)
  assert again.votes() == [vote] and again.open_asks() == [] and again.voters() == {"Ada": ada}


def test_it_is_a_write_ahead_log_that_is_synced(file):
  votes, _ = begun(file)
  value = lambda pragma: votes._db.execute(f"PRAGMA {pragma}").fetchone()[0]
  assert value("journal_mode") == "wal" and value("synchronous") == 2


def test_the_same_vote_again_counts_once_and_another_one_is_refused(file):
  votes, ada = begun(file)
  ask = votes.ask(ada, 1, swapped=False)
  first = votes.vote(ada, ask.ask, "tie")
  assert votes.vote(ada, ask.ask, "tie") == first and len(votes.votes()) == 1
  with pytest.raises(Refused, match="has another vote already"):
    votes.vote(ada, ask.ask, "left")


def test_a_vote_on_what_was_not_shown_to_this_voter_is_refused(file):
  votes, ada = begun(file)
  ask = votes.ask(ada, 1, swapped=False)
  for voter, name in ((votes.voter("Bob"), ask.ask), (ada, "nothing")):
    with pytest.raises(Refused, match="was not shown to this voter"):
      votes.vote(voter, name, "left")
  assert votes.votes() == []


def test_undo_asks_again_first_and_keeps_the_old_vote_in_the_file(file):
  votes, ada = begun(file)
  asks = [votes.ask(ada, pair, swapped=pair == 1, repeat=pair == 1) for pair in (1, 2, 3)]
  votes.vote(ada, asks[0].ask, "left")
  undone, again = votes.undo(ada)
  assert undone.ask == asks[0] and votes.votes() == []
  assert (again.pair, again.swapped, again.repeat) == (1, True, True)
  assert [ask.pair for ask in votes.open_asks()] == [1, 2, 3] and votes.open_asks()[0] == again
  votes.vote(ada, asks[0].ask, "left")  # a late copy of the old request
  assert votes.votes() == []
  assert votes.vote(ada, again.ask, "right").choice == "right" and len(votes.votes()) == 1
  assert sqlite3.connect(file).execute("SELECT count(*) FROM votes").fetchone() == (2,)


def test_undo_goes_back_vote_by_vote_and_only_over_ones_own(file):
  votes, ada = begun(file)
  bob = votes.voter("Bob")
  assert votes.undo(ada) is None
  for voter, pair in ((ada, 1), (bob, 2), (ada, 3)):
    votes.vote(voter, votes.ask(voter, pair, swapped=False).ask, "left")
  assert [votes.undo(ada)[0].ask.pair for _ in range(2)] == [3, 1] and votes.undo(ada) is None
  assert [vote.ask.voter for vote in votes.votes()] == [bob]


def test_pairs_keep_their_numbers(file):
  votes, _ = begun(file, pairs=0)
  assert votes.numbers_of(["a", "b"]) == [1, 2]
  assert votes.numbers_of(["c", "a", "c"]) == [3, 1, 3]


def test_several_threads(file):
  votes, _ = begun(file, pairs=50)

  def work(name):
    voter = votes.voter(name)
    for pair in range(1, 51):
      votes.vote(voter, votes.ask(voter, pair, swapped=False).ask, "left")

  threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(votes.votes()) == 200 and len({vote.ask.ask for vote in votes.votes()}) == 200


# ---- Files that cannot be used -----------------------------------------------------------------------------------


def test_a_file_of_another_format_is_refused_and_left_alone(file):
  begun(file)[0].close()
  with sqlite3.connect(file) as other:
    other.execute("PRAGMA user_version = 7")
  before = file.read_bytes()
  with pytest.raises(ValueError, match="has format 7, this version of jaxpref reads 1; open it with the version"):
    Store(file)
  assert file.read_bytes() == before


def test_an_old_format_is_migrated_with_its_votes(file, monkeypatch):
  votes, ada = begun(file)
  votes.vote(ada, votes.ask(ada, 1, swapped=False).ask, "left")
  votes.close()
  monkeypatch.setattr(store, "FORMAT", 2)
  monkeypatch.setattr(
    store, "MIGRATIONS", {1: "ALTER TABLE voters ADD COLUMN colour TEXT; UPDATE voters SET colour = 'red'"}
  )
  migrated = Store(file)
  assert [vote.choice for vote in migrated.votes()] == ["left"]
  assert migrated._all("SELECT colour FROM voters") == [("red",)]
  migrated.close()
  assert Store(file)._all("PRAGMA user_version") == [(2,)]


def test_a_migration_that_fails_changes_nothing(file, monkeypatch):
  begun(file)[0].close()
  monkeypatch.setattr(store, "FORMAT", 2)
  monkeypatch.setattr(store, "MIGRATIONS", {1: "ALTER TABLE voters ADD COLUMN colour TEXT; UPDATE nothing SET a = 1"})
  with pytest.raises(OSError, match="cannot be written"):
    Store(file)
  monkeypatch.undo()
  assert Store(file).voters() == {"Ada": 1}


@pytest.mark.parametrize(
  ("content", "sentence"),
  [
    (b"no database, but long enough to be looked at" * 100, "is damaged or is no file of votes"),
    (None, "is no file of votes"),
  ],
)
def test_other_files_are_refused_and_left_alone(file, content, sentence):
  if content is None:
    with sqlite3.connect(file) as other:
      other.execute("CREATE TABLE recipes (name TEXT)")
  else:
    file.write_bytes(content)
  before = file.read_bytes()
  with pytest.raises(ValueError, match=sentence):
    Store(file)
  assert file.read_bytes() == before


def test_a_full_disk_is_one_sentence_and_the_votes_before_it_stay(file):
  votes, ada = begun(file, pairs=2000)
  votes.vote(ada, votes.ask(ada, 1, swapped=False).ask, "left")
  pages = votes._db.execute("PRAGMA page_count").fetchone()[0]
  votes._db.execute(f"PRAGMA max_page_count = {pages}")
  with pytest.raises(OSError, match="cannot be written .database or disk is full.; free some space"):
    for pair in range(1, 2000):
      votes.vote(ada, votes.ask(ada, pair, swapped=False).ask, "left")
  counted = len(votes.votes())
  assert counted > 1
  votes._db.execute("PRAGMA max_page_count = 100000")
  ask = votes.open_asks() or [votes.ask(ada, 5, swapped=False)]
  votes.vote(ada, ask[0].ask, "right")
  assert len(votes.votes()) == counted + 1


def test_a_folder_without_votes_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no votes.sqlite, so nobody has voted there yet"):
    store.check_file(tmp_path)


# ---- Killed ------------------------------------------------------------------------------------------------------

# Votes as the server does: answers what was left open, then asks and votes; says what is on the disk, in order.
VOTER = """
import pathlib, sys
from jaxpref.voting.store import Store
votes = Store(pathlib.Path(sys.argv[1]))
votes.numbers_of([f"pair {i}" for i in range(100)])
voter = votes.voter("Ada")
number = 0
while True:
  number += 1
  open_asks = votes.open_asks()
  ask = open_asks[0] if open_asks else votes.ask(voter, 1 + number % 100, swapped=bool(number % 2))
  print("asked", ask.ask, flush=True)
  votes.vote(voter, ask.ask, ("left", "right", "tie", "skip", "bad")[number % 5])
  print("wrote", ask.ask, flush=True)
  if number % 7 == 0:
    undone, again = votes.undo(voter)
    print("undid", undone.ask.ask, again.ask, flush=True)
"""


def killed(file, kills, seed=0):
  """Kills a voter at random moments; checks after each kill that what was said to be written is there, once."""
  rng = random.Random(seed)
  wrote, undid, maybe_undone, late = set(), set(), set(), set()
  environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), PYTHONDONTWRITEBYTECODE="1")
  for _ in range(kills):
    process = subprocess.Popen(
      [sys.executable, "-S", "-c", VOTER, str(file)], stdout=subprocess.PIPE, text=True, env=environment
    )
    first = [] if rng.random() < 0.2 else [process.stdout.readline()]  # else while it opens the file
    time.sleep(rng.random() * (0.03 if first else 0.06))
    process.send_signal(signal.SIGKILL)
    lines = [*first, *process.stdout.read().splitlines(keepends=True)]
    process.wait()
    said = [line.split() for line in lines if line.endswith("\n")]
    wrote |= {words[1] for words in said if words[0] == "wrote"}
    undid |= {words[1] for words in said if words[0] == "undid"}
    maybe_undone |= (
      {said[-1][1]} if said and said[-1][0] == "wrote" else set()
    )  # killed after the undo, before it said so
    votes = Store(file)
    counted = [vote.ask.ask for vote in votes.votes()]
    assert len(counted) == len(set(counted))
    assert wrote - undid - maybe_undone <= set(counted), "a vote is lost"
    assert not undid & set(counted), "an undone vote counts"
    asked = {words[1] for words in said if words[0] == "asked"}
    assert set(counted) - wrote <= asked | late, "a vote that nobody gave"
    late |= set(counted) - wrote  # on the disk, but killed before it said so
    assert len(votes.open_asks()) <= 1
    assert votes._all("PRAGMA integrity_check") == [("ok",)]
    votes.close()
  return len(wrote)


def test_no_vote_is_lost_or_doubled_when_it_is_killed(file):
  assert killed(file, 20) > 20


@pytest.mark.slow
def test_no_vote_is_lost_or_doubled_in_1000_kills(file):
  found = killed(file, 1000, seed=1)
  print(json.dumps({"kills": 1000, "votes": found}))
  assert found > 1000
