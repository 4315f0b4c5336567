"""Ends a command that cannot go on: an error with one sentence, Ctrl-C with one sentence and exit code 130."""

import _thread
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, as in shells
ECHO_SECONDS = 0.5  # a second SIGINT within it is the same Ctrl-C, passed on by a parent program
AGAIN_SECONDS = 0.05  # after it a swallowed KeyboardInterrupt is raised again

# What to do about errors of the operating system.
_REMEDIES = {
  errno.ENOENT: "check the name, or choose another place",
  errno.ENOTDIR: "a part of this path is a file: choose another place",
  errno.EISDIR: "it is a folder: give a file",
  errno.EEXIST: "choose another name",
  errno.ENAMETOOLONG: "choose a shorter name",
  errno.ELOOP: "a link leads back to itself: choose another place",
  errno.EACCES: "choose another place, or get permission for this one",
  errno.EPERM: "choose another place, or get permission for this one",
  errno.EROFS: "choose a place that is writable",
  errno.ENOSPC: "free some space, or choose another place",
  errno.EDQUOT: "free some space, or choose another place",
  errno.EMFILE: "allow more open files (ulimit -n)",
}


def in_words(error: BaseException, doing: str) -> str:
  """Returns an error as a sentence; for an operating system's error: what was done, to which file, and the remedy.

  >>> in_words(FileNotFoundError(2, "No such file or directory", "/proc/x"), "writing --out=/proc/x")
  'writing --out=/proc/x: /proc/x: no such file or directory; check the name, or choose another place.'

  Args:
    error: the exception that was raised.
    doing: what the command does, such as "scoring".
  """
  if not isinstance(error, OSError) or error.errno is None or not str(error).startswith("[Errno"):
    return str(error)
  reason = (error.strerror or os.strerror(error.errno)).strip()
  where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
  remedy = _REMEDIES.get(error.errno, "check the disk or the network and run the same command again")
  return f"{doing}: {where}{reason[:1].lower()}{reason[1:]}; {remedy}."


@contextlib.contextmanager
def one_sentence(*expected: type[BaseException], doing: str, again: str) -> Iterator[None]:
  """Ends the program if the block raises: with a sentence and exit code 1, or 130 after Ctrl-C.

  A second Ctrl-C ends it at once, whatever it is doing.

  Args:
    expected: exceptions to print as one sentence; others pass.
    doing: what the block does, such as "scoring".
    again: what to do after Ctrl-C, as the end of a sentence.
  """
  with ctrl_c():
    try:
      yield
    except KeyboardInterrupt:
      _say(f"{doing} was interrupted; {again}.")
      sys.exit(INTERRUPTED)
    except expected as error:
      sys.exit(f"error: {in_words(error, doing)}")


def begin() -> None:
  """Makes Ctrl-C end the program with one sentence and exit code 130 until a block of `one_sentence` begins.

  For programs only: an imported module leaves signals alone. Nothing changes if Ctrl-C is ignored or already has
  another handler.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _not_begun)


def is_command(argv: Sequence[str], interpreter: Sequence[str]) -> bool:
  """Returns whether Python is about to run a module of this package by -m, and first imports its packages.

  >>> is_command(["-m", "--help"], ["python", "-u", "-m", "jaxpref.sample", "--help"])
  True
  >>> is_command(["-m", "jaxpref.x"], ["python", "-m", "pytest", "jaxpref.x"])
  False

  Args:
    argv: `sys.argv`, which begins with "-m" only at that time.
    interpreter: `sys.orig_argv`.
  """
  module = interpreter[-len(argv)] if argv[:1] == ["-m"] else ""
  return re.fullmatch(r"(-\w*m)?jaxpref(\..*)?", module) is not None


def _not_begun(*_: Any) -> None:
  """Ends at once: there is nothing to finish, and an import may mistake a KeyboardInterrupt for its own error."""
  _say("interrupted before it began.")
  os._exit(INTERRUPTED)


@contextlib.contextmanager
def ctrl_c(first: Callable[[], Any] | None = None, *, last: str = "") -> Iterator[None]:
  """Makes the first Ctrl-C inside the block call a function, and the second end the process at once.

  Both happen in threads: the main thread may be in a compiler, which sees no signals. The block changes nothing outside
  the main thread, or if SIGINT is ignored, as under nohup.

  Args:
    first: the function; None raises KeyboardInterrupt in the main thread, as usual.
    last: what to print at the second Ctrl-C.
  """
  if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    yield
    return
  seen: list[float] = []
  ended = threading.Event()
  interrupted: list[bool] = []
  repeated: list[bool] = []

  def handle(*_: Any) -> None:
    if first is None and not interrupted:
      interrupted.append(True)
      raise KeyboardInterrupt

  def lost(unraisable: Any) -> None:
    """Raises again what a callback of the garbage collector swallowed: JAX has one that is called often."""
    if unraisable.exc_type is not KeyboardInterrupt:
      hook(unraisable)
      return
    timer = threading.Timer(AGAIN_SECONDS, again)  # here it would be swallowed again
    timer.daemon = True
    timer.start()

  def again() -> None:
    if not ended.is_set():
      interrupted.clear()
      repeated.append(True)
      _thread.interrupt_main()

  def watch() -> None:
    while data := os.read(receiver, 1):
      now = time.monotonic()
      if repeated:
        repeated.pop()
        continue
      if data[0] != signal.SIGINT or (seen and now - seen[0] < ECHO_SECONDS):
        continue
      seen.append(now)
      if len(seen) > 1:
        _say(last or "stopped at once.")
        os._exit(INTERRUPTED)
      if first is not None:
        threading.Thread(target=first, name="first ctrl-c", daemon=True).start()  # it may wait for other processes
    os.close(receiver)

  receiver, sender = os.pipe()
  os.set_blocking(sender, False)
  before, hook = signal.signal(signal.SIGINT, handle), sys.unraisablehook
  sys.unraisablehook = lost
  descriptor = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
  threading.Thread(target=watch, name="ctrl-c", daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    sys.unraisablehook = hook
    signal.signal(signal.SIGINT, signal.default_int_handler if before is _not_begun else before)
    signal.set_wakeup_fd(descriptor)
    os.close(sender)


def _say(text: str) -> None:
  with contextlib.suppress(OSError):  # the terminal is gone
    print(f"\n{text}", file=sys.stderr, flush=True)
