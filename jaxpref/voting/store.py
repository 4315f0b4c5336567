"""Votes on disk: an SQLite file in WAL mode, in which a vote is safe once `vote` has returned.

A pair that is shown is written first, as an ask: it has a random name, the pair, the voter, and which image is A. A
vote names its ask, and an ask takes one vote, so a vote that is sent again after a lost answer counts once. An undone
vote stays in the file and no longer counts; the pair is asked again under another name.

Nothing is ever deleted. A file of another format is refused, or migrated by MIGRATIONS, never made new.
"""

import contextlib
import os
import pathlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxpref.voting.choices import CHOICES

NAME = "votes.sqlite"
FORMAT = 1
APPLICATION = 0x6A707674  # "jpvt", so that another program's file is told from an old one
MIGRATIONS: dict[int, str] = {}  # format -> statements that make it the next one
SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pairs (pair INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
CREATE TABLE voters (voter INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, since REAL NOT NULL);
CREATE TABLE asks (
  ask TEXT PRIMARY KEY,
  voter INTEGER NOT NULL REFERENCES voters,
  pair INTEGER NOT NULL REFERENCES pairs,
  swapped INTEGER NOT NULL,
  repeat INTEGER NOT NULL,
  place INTEGER NOT NULL,
  at REAL NOT NULL
);
CREATE TABLE votes (
  vote INTEGER PRIMARY KEY AUTOINCREMENT,
  ask TEXT NOT NULL UNIQUE REFERENCES asks,
  choice TEXT NOT NULL CHECK (choice IN ({", ".join(f"'{choice}'" for choice in CHOICES)})),
  seconds REAL NOT NULL,
  at REAL NOT NULL,
  undone INTEGER NOT NULL DEFAULT 0
);
"""


class Refused(ValueError):
  """Raised for a request that cannot be carried out: an ask that is not known, or is another voter's."""


class Ask(NamedTuple):
  """A pair that was shown, or is about to be.

  Attributes:
    ask: its random name.
    voter, pair: numbers of the voter and the pair.
    swapped: whether image_1 is A.
    repeat: whether the voter had judged the pair before.
    place: asks of a voter are answered in this order.
  """

  ask: str
  voter: int
  pair: int
  swapped: bool
  repeat: bool
  place: int


class Vote(NamedTuple):
  """A vote that counts.

  Attributes:
    vote: its number, in the order of time.
    ask: what it answers.
    choice: one of `choices.CHOICES`.
    seconds: how long the pair was shown.
    at: when it was written, in seconds since 1970.
  """

  vote: int
  ask: Ask
  choice: str
  seconds: float
  at: float


class Store:
  """The file of votes. Methods may be called from several threads; one process at a time holds the file."""

  def __init__(self, file: pathlib.Path):
    """Opens the file, or makes it.

    Raises:
      ValueError: the file is damaged, is no file of votes, or has a format that this version cannot read.
      OSError: it cannot be opened or written.
    """
    self.file = file
    self._lock = threading.RLock()
    with self._in_words():
      self._db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    try:
      with self._in_words():
        self._open()
    except BaseException:
      self._db.close()
      raise

  def _open(self) -> None:
    value = lambda pragma: int(self._db.execute(f"PRAGMA {pragma}").fetchone()[0])
    found, application = value("user_version"), value("application_id")
    empty = not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not empty and application != APPLICATION:
      raise ValueError(f"{self.file} is no file of votes; move it away, or name another folder with --out.")
    if not empty and found != FORMAT and found not in MIGRATIONS:
      raise ValueError(
        f"{self.file} has format {found}, this version of jaxpref reads {FORMAT}; open it with the version that wrote "
        "it, or name another folder with --out."
      )
    self._db.execute("PRAGMA journal_mode = WAL")
    self._db.execute("PRAGMA synchronous = FULL")  # on the disk, not only in the system's memory
    self._db.execute("PRAGMA foreign_keys = ON")
    with self._transaction():
      if empty:
        self._run(SCHEMA)
        self._db.execute(f"PRAGMA application_id = {APPLICATION}")
        found = FORMAT
      while found != FORMAT:
        self._run(MIGRATIONS[found])
        found += 1
      self._db.execute(f"PRAGMA user_version = {FORMAT}")

  def _run(self, statements: str) -> None:
    for statement in filter(str.strip, statements.split(";")):
      self._db.execute(statement)

  @contextlib.contextmanager
  def _in_words(self) -> Iterator[None]:
    try:
      yield
    except sqlite3.OperationalError as error:
      raise OSError(f"{self.file} cannot be written ({error}); free some space, or choose another folder.") from error
    except sqlite3.IntegrityError:
      raise
    except sqlite3.DatabaseError as error:
      raise ValueError(
        f"{self.file} is damaged or is no file of votes ({error}); restore it from a copy, or name another folder with "
        "--out."
      ) from error

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[None]:
    with self._lock, self._in_words():
      self._db.execute("BEGIN IMMEDIATE")
      try:
        yield
        self._db.execute("COMMIT")
      except BaseException:
        with contextlib.suppress(sqlite3.Error):
          self._db.execute("ROLLBACK")
        raise

  def _all(self, statement: str, *values: object) -> list[tuple]:
    with self._lock, self._in_words():
      return self._db.execute(statement, values).fetchall()

  def close(self) -> None:
    """Closes the file."""
    with self._lock:
      self._db.close()

  # ---- What does not change ----------------------------------------------------------------------------------------

  def meta(self, name: str) -> str | None:
    """Returns what was written under a name; None for nothing."""
    found = self._all("SELECT value FROM meta WHERE name = ?", name)
    return found[0][0] if found else None

  def set_meta(self, name: str, value: str) -> None:
    """Writes a text under a name."""
    with self._transaction():
      self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

  def numbers_of(self, keys: Iterable[str]) -> list[int]:
    """Returns the numbers of pairs by their keys; a new key gets the next number."""
    with self._transaction():
      known = dict(self._db.execute("SELECT key, pair FROM pairs"))
      new = [key for key in dict.fromkeys(keys) if key not in known]
      first = 1 + max(known.values(), default=0)
      self._db.executemany("INSERT INTO pairs VALUES (?, ?)", enumerate(new, first))
    known |= {key: number for number, key in enumerate(new, first)}
    return [known[key] for key in keys]

  def voters(self) -> dict[str, int]:
    """Returns all voters by name."""
    return dict(self._all("SELECT name, voter FROM voters ORDER BY voter"))

  def voter(self, name: str) -> int:
    """Returns the number of a voter, who may be new."""
    known = self.voters()
    if name not in known:
      with self._transaction():
        self._db.execute("INSERT OR IGNORE INTO voters (name, since) VALUES (?, ?)", (name, time.time()))
      known = self.voters()
    return known[name]

  # ---- Asks and votes ----------------------------------------------------------------------------------------------

  def ask(self, voter: int, pair: int, *, swapped: bool, repeat: bool = False) -> Ask:
    """Writes that a pair is about to be shown, after the voter's other open asks, and returns the ask."""
    with self._transaction():
      return self._new_ask(voter, pair, swapped, repeat, first=False)

  def _new_ask(self, voter: int, pair: int, swapped: bool, repeat: bool, first: bool) -> Ask:
    low, high = self._db.execute(
      "SELECT min(place), max(place) FROM asks LEFT JOIN votes USING (ask) WHERE voter = ? AND vote IS NULL", (voter,)
    ).fetchone()
    place = 0 if low is None else low - 1 if first else high + 1
    found = Ask(secrets.token_urlsafe(12), voter, pair, swapped, repeat, place)
    self._db.execute("INSERT INTO asks VALUES (?, ?, ?, ?, ?, ?, ?)", (*found, time.time()))
    return found

  def open_asks(self) -> list[Ask]:
    """Returns the asks without a vote, in the order in which each voter answers them."""
    rows = self._all(
      "SELECT asks.ask, voter, pair, swapped, repeat, place FROM asks LEFT JOIN votes USING (ask) "
      "WHERE vote IS NULL ORDER BY place, asks.at"
    )
    return [_ask(row) for row in rows]

  def vote(self, voter: int, ask: str, choice: str, *, seconds: float = 0.0) -> Vote:
    """Writes a vote, and returns it once it is on the disk. The same vote again changes nothing.

    Raises:
      Refused: the ask is not this voter's, or has another vote.
      OSError: it cannot be written.
    """
    with self._transaction():
      row = self._db.execute(
        "SELECT ask, voter, pair, swapped, repeat, place FROM asks WHERE ask = ? AND voter = ?", (ask, voter)
      ).fetchone()
      if row is None:
        raise Refused("this pair was not shown to this voter; reload the page.")
      known = self._db.execute("SELECT vote, choice, seconds, at FROM votes WHERE ask = ?", (ask,)).fetchone()
      if known is not None and known[1] != choice:
        raise Refused("this pair has another vote already; reload the page, and undo to change it.")
      if known is None:
        at = time.time()
        cursor = self._db.execute(
          "INSERT INTO votes (ask, choice, seconds, at) VALUES (?, ?, ?, ?)", (ask, choice, seconds, at)
        )
        known = (cursor.lastrowid, choice, seconds, at)
    number, choice, seconds, at = known
    return Vote(number, _ask(row), choice, seconds, at)

  def undo(self, voter: int) -> tuple[Vote, Ask] | None:
    """Makes the voter's last vote count no longer, and asks for it again before anything else.

    Returns:
      The vote, and the new ask of the same pair with the same sides; None if there is no vote.
    """
    with self._transaction():
      row = self._db.execute(f"{_VOTES} AND voter = ? ORDER BY vote DESC LIMIT 1", (voter,)).fetchone()
      if row is None:
        return None
      self._db.execute("UPDATE votes SET undone = 1 WHERE vote = ?", (row[0],))
      undone = _vote(row)
      return undone, self._new_ask(voter, undone.ask.pair, undone.ask.swapped, undone.ask.repeat, first=True)

  def votes(self) -> list[Vote]:
    """Returns all votes that count, in the order of time."""
    return [_vote(row) for row in self._all(f"{_VOTES} ORDER BY vote")]


_VOTES = (
  "SELECT vote, asks.ask, voter, pair, swapped, repeat, place, choice, seconds, votes.at "
  "FROM votes JOIN asks USING (ask) WHERE NOT undone"
)


def _ask(row: tuple) -> Ask:
  name, voter, pair, swapped, repeat, place = row
  return Ask(name, voter, pair, bool(swapped), bool(repeat), place)


def _vote(row: tuple) -> Vote:
  return Vote(row[0], _ask(row[1:7]), *row[7:])


def check_file(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file of votes in a folder.

  Raises:
    FileNotFoundError: there is none.
  """
  file = folder / NAME
  if not os.path.isfile(file):
    raise FileNotFoundError(f"{folder} has no {NAME}, so nobody has voted there yet; vote first.")
  return file
