"""Beside each of several processes of a run a small one that supervises it: none is left waiting for one that is gone.

A process that waits for another one cannot know why nothing comes, and the JAX runtime ends a program that has lost the
others in the middle of things. So `fork` puts each process under a parent that knows no JAX: it waits for its child and
is connected to the supervisor of process 0, which passes on what it hears.

  process 0  <-  supervisor 0  ---  supervisor 1  ->  process 1
                     |
                     +----------  supervisor 2  ->  process 2

Who is killed, fails, or is silent for `SILENCE_SECONDS` (its machine is gone) is thus known to all within seconds. Each
of the others prints one line that names it, kills its child, and ends with exit code `RUN_AGAIN`.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

RUN_AGAIN = 75  # EX_TEMPFAIL: nothing is wrong with this process
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
# From the first news to the end: time for news of others, and for processes that fail alike to say why by themselves.
SETTLE_SECONDS = 2.0
CONNECT_SECONDS = 30.0
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Group:
  """The processes of a run.

  Attributes:
    index: of this process.
    hosts: each one's machine.
    workdir: the run's work folder.
  """

  index: int
  hosts: tuple[str, ...]
  workdir: str

  def name(self, index: int) -> str:
    """Of one of them, for messages."""
    return f"process {index} of {len(self.hosts)} (host {self.hosts[index]})"


class Line:
  """A socket that carries JSON objects, one a line."""

  def __init__(self, connection: socket.socket):
    connection.settimeout(5.0)
    self.socket = connection
    self.heard = time.monotonic()
    self._rest = b""

  def send(self, **message: Any) -> None:
    """Sends one; that the other end is gone shows when receiving."""
    with contextlib.suppress(OSError):
      self.socket.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[dict[str, Any]] | None:
    """Those that have come, to be called when there is something; None: the other end is gone, or talks nonsense."""
    try:
      data = self.socket.recv(1 << 16)
    except OSError:
      data = b""
    if not data:
      return None
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + data).split(b"\n")
    try:
      messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
      return None
    return messages if all(isinstance(message, dict) for message in messages) else None


# ---- In the process itself -----------------------------------------------------------------------------------------


class Reporter:
  """What a process tells its supervisor.

  Attributes:
    port, token: with which the supervisors of other processes reach the own one, if this is process 0.
  """

  def __init__(self, line: Line, port: int, token: str):
    self.port, self.token = port, token
    self._line = line

  def starting(self, sentence: str) -> None:
    """From now until the group is known the JAX runtime may end the process; then the supervisor says this of it."""
    self._line.send(starting=sentence)

  def joined(self, group: Group, address: tuple[str, int], token: str) -> None:
    """The group is known, and where the supervisor of process 0 listens."""
    self._line.send(group=dataclasses.asdict(group), address=address, token=token)

  def fail(self, why: str) -> NoReturn:
    """Ends the process at once, with no exit barrier: an error of its own, which it has printed."""
    self._line.send(failed=why)
    _flush()
    os._exit(1)

  def break_off(self, why: str) -> NoReturn:
    """An operation between processes failed: waits for the supervisor, who finds out which one is the cause."""
    self._line.send(broken=why)
    _flush()
    threading.Event().wait()
    raise AssertionError  # never here


def fork() -> Reporter:
  """Returns in a child process, which goes on; the parent supervises it and ends when it ends.

  To be called before anything has started threads.
  """
  ipv6 = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if ipv6 else socket.AF_INET
  listener = socket.create_server(("", 0), family=family, dualstack_ipv6=ipv6, backlog=1024)
  supervisors, own = socket.socketpair()
  token = secrets.token_hex(16)
  _flush()
  parent = os.getpid()
  child = os.fork()
  if child == 0:
    port = listener.getsockname()[1]
    listener.close()
    supervisors.close()
    _die_with(parent)
    return Reporter(Line(own), port, token)
  own.close()
  try:
    code = _Supervisor(child, Line(supervisors), listener, token).run()
  except Exception:  # of the supervisor: no reason to end the training
    _say(f"warning: this process is no longer supervised:\n{traceback.format_exc()}")
    code = abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
  _kill(child, signal.SIGKILL)
  _flush()
  os._exit(code)


def _flush() -> None:
  sys.stdout.flush()
  sys.stderr.flush()


def _die_with(parent: int) -> None:
  """Lets the kernel kill this process when its parent is gone (Linux)."""
  with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != parent:
    os._exit(1)


def _kill(process: int, number: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.kill(process, number)


# ---- In the supervisor ---------------------------------------------------------------------------------------------


class _Supervisor:
  """The parent's side of `fork`."""

  def __init__(self, child: int, report: Line, listener: socket.socket, token: str):
    self._child, self._report, self._listener, self._token = child, report, listener, token
    self._selector = selectors.DefaultSelector()
    self._selector.register(report.socket, selectors.EVENT_READ, (self._from_child, report))
    self._selector.register(listener, selectors.EVENT_READ, (self._accept, None))
    self._group: Group | None = None
    self._starting: str | None = None  # what to say if the group is never known
    self._leader: Line | None = None  # to the supervisor of process 0, in the others
    self._others: dict[int, Line] = {}  # to theirs, in the one of process 0
    self._lost: dict[int, str] = {}  # by process: what has become of it, in the order of the news
    self._own_failure: str | None = None  # the child's, which it has printed
    self._broken: str | None = None  # what the child says of an operation that may have failed because of others
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
      signal.signal(number, lambda number, frame: _kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to both

  def run(self) -> int:
    """Returns the exit code."""
    beat_at, ended = 0.0, None
    decide_at: float | None = None
    while True:
      for key, _ in self._selector.select(POLL_SECONDS):
        handle, line = key.data
        handle(line)
      now = time.monotonic()
      if now >= beat_at:
        beat_at = now + BEAT_SECONDS
        self._beat(now)
      if ended is None:
        process, status = os.waitpid(self._child, os.WNOHANG)
        if process:
          ended = os.waitstatus_to_exitcode(status)
          while self._has_come(self._report):  # what it said at last
            self._from_child(self._report)
      if ended == 0:
        self._say_goodbye()
        return 0
      if self._lost or ended is not None or self._broken:
        # The cause of what failed between processes is another one, as a rule; a machine may be gone unnoticed so far.
        patience = SILENCE_SECONDS if self._broken and not self._lost else 0.0
        decide_at = min(decide_at or now + patience + SETTLE_SECONDS, now + patience + SETTLE_SECONDS)
        if now >= decide_at:
          return self._decide(ended)

  def _has_come(self, line: Line) -> bool:
    return any(key.fileobj is line.socket for key, _ in self._selector.select(0))

  # -- News --

  def _from_child(self, line: Line) -> None:
    messages = line.receive()
    if messages is None:
      self._selector.unregister(line.socket)
      return
    for message in messages:
      self._own_failure = message.get("failed", self._own_failure)
      self._broken = message.get("broken", self._broken)
      self._starting = message.get("starting", self._starting)
      if "group" in message:
        self._group = Group(**message["group"])
        if self._group.index:
          self._selector.unregister(self._listener)
          self._listener.close()
          self._connect(message["address"], message["token"])

  def _connect(self, address: tuple[str, int], token: str) -> None:
    assert self._group is not None
    try:
      self._leader = Line(socket.create_connection((address[0], address[1]), CONNECT_SECONDS))
    except OSError as error:
      _say(
        f"warning: {address[0]} cannot be reached at port {address[1]} ({error}); that another process is gone will be "
        "noticed by JAX alone, which takes longer and does not name it."
      )
      return
    self._leader.send(hello=self._group.index, token=token)
    self._selector.register(self._leader.socket, selectors.EVENT_READ, (self._from_leader, self._leader))

  def _from_leader(self, line: Line) -> None:
    messages = line.receive()
    for message in messages or []:
      if message.get("goodbye"):
        self._drop(line)
        return
      if "process" in message:
        self._lost.setdefault(message["process"], message["why"])
    if messages is None:
      self._drop(line)
      self._lost.setdefault(0, "stopped answering")

  def _accept(self, _: None) -> None:
    """In the supervisor of process 0; who does not know the token is not listened to."""
    with contextlib.suppress(OSError):
      line = Line(self._listener.accept()[0])
      self._selector.register(line.socket, selectors.EVENT_READ, (self._from_other, line))

  def _from_other(self, line: Line) -> None:
    index = next((i for i, other in self._others.items() if other is line), None)
    messages = line.receive()
    for message in messages or []:
      if index is None and message.get("token") == self._token:
        index = int(message["hello"])
        self._others[index] = line
        for process, why in self._lost.items():
          line.send(process=process, why=why)
      elif index is None:
        messages = None
        break
      elif message.get("goodbye"):
        del self._others[index]
        self._drop(line)
        return
      elif "why" in message:
        self._hear(index, message["why"])
    if messages is None:
      self._drop(line)
      if index is not None:
        del self._others[index]
        self._hear(index, "stopped answering")

  def _hear(self, index: int, why: str) -> None:
    """News of a process, which the supervisor of process 0 passes on."""
    if index not in self._lost:
      self._lost[index] = why
      for line in self._others.values():
        line.send(process=index, why=why)

  def _beat(self, now: float) -> None:
    for index, line in list(self._others.items()):
      line.send(beat=True)
      if now - line.heard > SILENCE_SECONDS:
        del self._others[index]
        self._drop(line)
        self._hear(index, "stopped answering")
    if self._leader is not None:
      self._leader.send(beat=True)
      if now - self._leader.heard > SILENCE_SECONDS:
        self._drop(self._leader)
        self._lost.setdefault(0, "stopped answering")

  def _drop(self, line: Line) -> None:
    self._selector.unregister(line.socket)
    line.socket.close()
    if line is self._leader:
      self._leader = None

  # -- The end --

  def _decide(self, ended: int | None) -> int:
    """Something is wrong, and all is known that will be: says which process is the cause. Returns the exit code."""
    group, own = self._group, f"failed: {self._own_failure}"
    causes = {i: why for i, why in self._lost.items() if group is None or (i != group.index and why != own)}
    if group is not None and causes:
      first = next(iter(causes.values()))
      names = " and ".join(group.name(i) for i, why in causes.items() if why == first)
      _say(f"error: {names} {first.rstrip('.')}; {advice(group.workdir)}")
      self._say_goodbye()
      return RUN_AGAIN
    if group is None and ended == -signal.SIGABRT and self._starting:
      _say(f"error: {self._starting}")
      return RUN_AGAIN
    if not self._own_failure:
      if ended is not None and ended < 0:
        hint = "out of memory?" if ended == -signal.SIGKILL else "what it printed last may say why"
        own = f"was killed by {signal.Signals(-ended).name} ({hint})"
      else:
        own = f"failed: {self._broken}" if self._broken else f"ended with exit code {ended}"
      if group is not None:
        _say(f"error: {group.name(group.index)} {own.rstrip('.')}; {advice(group.workdir)}")
    self._announce(own)
    return 1 if ended is None else ended if ended > 0 else 128 - ended

  def _announce(self, why: str) -> None:
    if self._leader is not None:
      self._leader.send(why=why)
    elif self._group is not None:
      self._hear(self._group.index, why)
    self._say_goodbye()

  def _say_goodbye(self) -> None:
    """That this process's end is no news; waits until the others have read it."""
    lines = [*self._others.values(), *([] if self._leader is None else [self._leader])]
    for line in lines:
      line.send(goodbye=True)
      with contextlib.suppress(OSError):
        line.socket.shutdown(socket.SHUT_WR)
    for line in lines:
      while line.receive() is not None and time.monotonic() - line.heard < 5.0:
        pass


def advice(workdir: str | os.PathLike) -> str:
  """What to do once the cause is gone, for the end of a message."""
  try:
    names = [path.name for path in (pathlib.Path(workdir) / "checkpoints").iterdir()]
  except OSError:
    names = []
  steps = [int(name) for name in names if name.isdecimal()]
  where = f"it resumes at step {max(steps)}" if steps else "it starts anew, as there is no checkpoint yet"
  return f"run the same command on all hosts again: {where}."


def _say(text: str) -> None:
  print(f"\n{text}", file=sys.stderr, flush=True)
