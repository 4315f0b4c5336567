"""Gives a folder one writer: a second one learns who the first is, instead of writing into its files.

`hold` writes a small JSON file, `writer_lock.json`, into the folder: host, process id, and since when. It removes the
file at the end. A writer that has gone does not block the next one:

- On the same machine its process is looked up. A process is its id and the moment it started, so an id that the system
  has given to another process does not count.
- Elsewhere (another host of a shared disk, another container) the file is a lease. A thread of the writer renews it
  every `RENEW_SECONDS`; without a renewal for `EXPIRE_SECONDS` the lease expires. The next writer watches the file for
  that long instead of comparing clocks, which differ between hosts.

In a run of several processes, process 0 holds the folder for all, and all are refused together. In a bucket (gs://) a
file cannot be created "only if new", so two starts within `SETTLE_SECONDS` may both run for up to `RENEW_SECONDS`.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from jaxpref.data import paths
from jaxpref.devices import distributed

NAME = "writer_lock.json"
RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 60.0  # NFS and gcsfuse may show the state of up to 60 s ago
GRACE_SECONDS = 5.0  # a killed process takes a moment to disappear
SETTLE_SECONDS = 1.0  # if a file cannot be locked, it belongs to its last writer after this long
POLL_SECONDS = 0.2
SIZE = 512  # bytes of a lock; a fixed size, so that it is overwritten in one piece


class Occupied(OSError):
  """Raised if another process writes the folder, or has taken it over."""


def is_lock(name: str) -> bool:
  """Returns whether a file of a folder is a lock, and not content."""
  return re.fullmatch(r"(.*\.)?writer_lock(_\d+)?\.json", name) is not None


# ---- Who writes ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Writer:
  """A process that writes a folder.

  Attributes:
    host, pid: where it runs.
    since: local time at which it began to write.
    place: where process ids mean the same: a boot of a machine and a namespace; "" if unknown.
    process_start: when the process began, in the system's own units; "" if unknown.
    token: a name of this hold alone.
    renewals: renewals so far; used in a bucket, whose files have no times to set.
  """

  host: str
  pid: int
  since: str
  place: str
  process_start: str
  token: str
  renewals: int = 0

  def __str__(self) -> str:
    return f"process {self.pid} on host {self.host}, which started {self.since}"

  def encode(self) -> bytes:
    """Returns the content of a lock."""
    return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode().ljust(SIZE)

  @classmethod
  def decode(cls, content: bytes) -> "Writer | None":
    """Decodes a lock; returns None if its writer did not finish it."""
    try:
      found = cls(**json.loads(content))
    except (ValueError, TypeError):
      return None
    return found if isinstance(found.pid, int) and isinstance(found.token, str) else None

  @classmethod
  def here(cls) -> "Writer":
    """Returns this process as a writer."""
    try:
      start = _process_start(os.getpid())
    except OSError:
      start = None
    return cls(
      host=socket.gethostname(),
      pid=os.getpid(),
      since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
      place=_place(),
      process_start=start or "",
      token=secrets.token_hex(16),
    )

  def is_running(self) -> bool | None:
    """Returns whether the process still runs; None if that is unknown from here."""
    if not self.place or not self.process_start or self.place != _place():
      return None
    if self.pid == os.getpid():
      return False  # this process, in which nobody holds the folder now
    try:
      start = _process_start(self.pid)
    except ProcessLookupError:
      return False
    except OSError:
      return None
    return None if start is None else start == self.process_start


def _place() -> str:
  """Returns where process ids mean what they mean here; "" if that is unknown."""
  if sys.platform != "linux":
    return f"{socket.gethostname()} {uuid.getnode():x}"
  try:
    if os.readlink("/proc/self") != str(os.getpid()):
      return ""  # /proc belongs to another namespace
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink("/proc/self/ns/pid")]
    if os.path.lexists("/proc/self/ns/time"):  # process starts are counted in it
      spaces.append(os.readlink("/proc/self/ns/time"))
  except OSError:
    return ""
  return " ".join([boot, *spaces])


def _process_start(pid: int) -> str | None:
  """Returns when a process began, in the system's own units; None if it exists and hides that.

  Raises:
    ProcessLookupError: the process does not exist.
    OSError: that is unknown.
  """
  if sys.platform != "linux":
    os.kill(pid, 0)
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    os.kill(pid, 0)
    return None
  fields = stat.rpartition(")")[2].split()  # the name in brackets may hold anything
  if fields[0] in ("Z", "X"):
    raise ProcessLookupError(f"process {pid} has ended")
  return fields[19]  # starttime of proc(5), in clock ticks since the boot


# ---- The lock ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Seen:
  """A lock at some moment; two equal ones mean no renewal in between.

  Attributes:
    writer: None if the file is not whole.
    content, changed: those of the file; nanoseconds by the file system's clock, None in a bucket.
  """

  writer: Writer | None
  content: bytes
  changed: int | None


class _File:
  """A lock on a disk. The first process creates it; nobody replaces it: a new writer overwrites it in place."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def read(self) -> _Seen | None:
    """Returns the lock, None if there is none. Opening the file asks a shared disk's server for its present state."""
    try:
      with self.path.open("rb") as file:
        content = file.read()
        return _Seen(Writer.decode(content), content, os.fstat(file.fileno()).st_mtime_ns)
    except OSError:
      if self.path.exists():
        raise
      return None

  def create(self, writer: Writer) -> bool:
    """Creates the lock; returns False if it existed."""
    with paths.cannot_be_written(self.path):
      try:
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
      except FileExistsError:
        return False
      try:
        with os.fdopen(descriptor, "wb") as file:
          file.write(writer.encode())
      except OSError:  # a full disk
        self.path.unlink(missing_ok=True)
        raise
    return True

  def take(self, writer: Writer, seen: _Seen) -> None:
    """Overwrites the lock of a writer that is gone, unless it has changed; reading it tells who was faster."""
    with paths.cannot_be_written(self.path), contextlib.suppress(FileNotFoundError), self.path.open("r+b") as file:
      alone = True
      try:
        fcntl.flock(file, fcntl.LOCK_EX)
      except OSError:  # file systems without locks
        alone = False
      if self.read() == seen:
        os.pwrite(file.fileno(), writer.encode(), 0)
        os.ftruncate(file.fileno(), len(writer.encode()))
      if not alone:
        time.sleep(SETTLE_SECONDS)

  def renew(self, writer: Writer) -> bool:
    """Renews the lock; returns whether it is still this writer's."""
    try:
      with self.path.open("r+b") as file:
        there = Writer.decode(file.read())
        if there is None or there.token != writer.token:
          return False
        os.utime(file.fileno())  # by the clock of the file system
        return True
    except FileNotFoundError:  # someone has deleted it
      return self.create(writer)

  def remove(self) -> None:
    self.path.unlink(missing_ok=True)


class _Object:
  """A lock in a bucket, as far as one is possible: the last writer has it."""

  def __init__(self, path: Any):
    self.path = path
    self._renewals = 0

  def read(self) -> _Seen | None:
    if paths.size(self.path) is None:
      return None
    content = paths.read(self.path)
    return _Seen(Writer.decode(content), content, None)

  def create(self, writer: Writer) -> bool:
    if paths.size(self.path) is not None:
      return False
    self._write(writer)
    time.sleep(SETTLE_SECONDS)
    seen = self.read()
    return seen is not None and seen.writer is not None and seen.writer.token == writer.token

  def take(self, writer: Writer, seen: _Seen) -> None:
    if self.read() == seen:
      self._write(writer)
      time.sleep(SETTLE_SECONDS)

  def renew(self, writer: Writer) -> bool:
    seen = self.read()
    if seen is not None and (seen.writer is None or seen.writer.token != writer.token):
      return False
    self._write(writer)
    return True

  def remove(self) -> None:
    with contextlib.suppress(FileNotFoundError):
      self.path.unlink()

  def _write(self, writer: Writer) -> None:
    paths.write(self.path, dataclasses.replace(writer, renewals=self._renewals).encode())
    self._renewals += 1


# ---- Holding a folder ----------------------------------------------------------------------------------------------


class Held:
  """A folder that this process may write; it does nothing in processes other than a run's first."""

  def __init__(self, lock: _File | _Object | None, writer: Writer):
    self._lock, self._writer = lock, writer
    self._lost = ""
    self._renewed = time.monotonic()
    self._busy = threading.Lock()
    self._ended = threading.Event()
    self.thread = threading.get_ident()  # the thread that holds it
    self.pid = os.getpid()
    if lock is not None:
      threading.Thread(target=self._keep, name="lease", daemon=True).start()

  def check(self) -> None:
    """Raises Occupied if another process has taken over the folder, as after this machine slept."""
    if self._lock is not None and time.monotonic() - self._renewed > EXPIRE_SECONDS / 2:
      self._renew()
    if self._lost:
      raise Occupied(self._lost)

  def move(self, target: pathlib.Path) -> None:
    """Renames the folder; the lock stays at its old name, where a new folder begins."""
    assert isinstance(self._lock, _File)
    with self._busy:
      folder = self._lock.path.parent
      folder.rename(target)
      folder.mkdir()
      (target / self._lock.path.name).rename(self._lock.path)

  def end(self) -> None:
    """Removes the lock, if it is still this one's."""
    self._ended.set()
    with self._busy, contextlib.suppress(OSError):
      if self._lock is not None and self.pid == os.getpid():
        seen = self._lock.read()
        if seen is not None and seen.writer is not None and seen.writer.token == self._writer.token:
          self._lock.remove()

  def _keep(self) -> None:
    while not self._ended.wait(RENEW_SECONDS):
      self._renew()

  def _renew(self) -> None:
    assert self._lock is not None
    # A disk that does not answer now may answer next time; until then nothing can be written either.
    with self._busy, contextlib.suppress(OSError):
      if self._ended.is_set() or self._lost:
        return
      if self._lock.renew(self._writer):
        self._renewed = time.monotonic()
        return
      seen = self._lock.read()
      other = "another process" if seen is None or seen.writer is None else str(seen.writer)
      self._lost = (
        f"{self._lock.path.parent} was taken over by {other}: this process did not renew its lease for "
        f"{EXPIRE_SECONDS:.0f} s, as when a machine sleeps; stop one of the two and run the same command again."
      )


_held: dict[str, Held] = {}  # by the path of the lock


@contextlib.contextmanager
def hold(folder: Any, *, name: str = NAME) -> Iterator[Held]:
  """Makes this run the only writer of a folder inside the block; all processes of a run must call this.

  A missing folder is created, and removed if it is empty at the end. A block inside another one of the same thread, for
  the same folder, does nothing.

  Args:
    folder: as `paths.open_path` takes it.
    name: name of the lock, if it is for one file or one part of the folder.
  Raises:
    Occupied: another process writes there.
    OSError: the folder cannot be written.
  """
  folder = paths.open_path(folder)
  place = folder / name if paths.is_remote(folder) else pathlib.Path(os.path.realpath(folder), name)
  key = os.fspath(place)
  known = _held.get(key)
  if known is not None and known.pid == os.getpid() and known.thread == threading.get_ident():
    yield known
    return
  problem, made, held = "", [], None
  try:
    if distributed.is_first():
      try:
        if known is not None and known.pid == os.getpid():
          raise Occupied(f"{folder} is being written by another thread of this process; wait until it ends.")
        made = _make(folder)
        held = _acquire(_Object(place) if paths.is_remote(folder) else _File(place), folder)
      except OSError as error:
        problem = str(error)
        distributed.word_of_first(problem)
        raise
    if problem := distributed.word_of_first(problem):
      raise Occupied(problem)
    held = held or Held(None, Writer.here())
    _held[key] = held
    yield held
  finally:
    if held is not None:
      _held.pop(key, None)
      held.end()
    with contextlib.suppress(OSError):  # not empty
      for path in made:
        path.rmdir()


def _make(folder: Any) -> list[pathlib.Path]:
  """Makes a local folder; returns it and the parents that did not exist."""
  if paths.is_remote(folder):
    return []
  missing = [path for path in (folder, *folder.parents) if not path.exists()]
  with paths.cannot_be_written(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return missing


def _acquire(lock: _File | _Object, folder: Any) -> Held:
  """Returns when this process is the writer of a folder; says on stderr from whom it took over.

  Raises:
    Occupied: another process is the writer.
  """
  writer = Writer.here()
  while not lock.create(writer):
    seen = lock.read()
    if seen is None:  # it has just gone, or a shared disk is not consistent yet
      time.sleep(POLL_SECONDS)
      continue
    found = _outlast(lock, seen, folder)
    if found is None:
      continue
    lock.take(writer, seen)
    now = lock.read()
    if now is not None and now.writer is not None and now.writer.token == writer.token:
      if seen.changed is not None and now.changed is not None:
        found += f"; last renewed {max(0.0, (now.changed - seen.changed) / 1e9):.0f} s ago"
      _say(f"{folder}: {found}.")
      break
  return Held(lock, writer)


def _outlast(lock: _File | _Object, seen: _Seen, folder: Any) -> str | None:
  """Waits until a lock's writer is known to be gone; returns what to say of it, or None to look again.

  Raises:
    Occupied: the writer still runs.
  """
  writer = seen.writer
  name = str(writer or "a process that has not given its name")
  began = time.monotonic()
  remedy = "wait until it ends or stop it, and run the same command again; or choose another folder."
  while writer is not None and (running := writer.is_running()) is not None:
    if not running:
      return f"took over from {name}; that process is gone"
    now = lock.read()
    if now is None or now.writer is None or now.writer.token != writer.token:
      return None  # that writer has ended, and its process continues
    if time.monotonic() - began > GRACE_SECONDS:
      raise Occupied(f"{folder} is being written by {name}; {remedy}")
    time.sleep(POLL_SECONDS)
  _say(
    f"{folder} has the lock of {name}; from here only its renewals can be seen, waiting up to {EXPIRE_SECONDS:.0f} s "
    "for one ..."
  )
  while True:
    last = time.monotonic() - began > EXPIRE_SECONDS
    now = lock.read()
    if now is None:
      return None  # that writer has ended
    if now != seen:
      if writer is None:
        return None  # now it may have a name
      raise Occupied(f"{folder} is being written by {now.writer or name} (it renewed its lease just now); {remedy}")
    if last:
      return f"waited for {name}, and took over its lease, which has expired"
    time.sleep(min(RENEW_SECONDS / 2, EXPIRE_SECONDS / 10))


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
