"""How a command ends that cannot go on: errors in one sentence, Ctrl-C in one sentence and with exit code 130."""

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

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
ECHO_SECONDS = 0.5  # in which a second SIGINT is the same Ctrl-C, passed on by a program that started this one
AGAIN_SECONDS = 0.05  # after which one that was swallowed is raised again

# What to do about errors of the operating system.
_REMEDIES = {
  errno.ENOENT: "check the name, or choose another place",
  errno.ENOTDIR: "a part of this path is a file: choose another place",
  errno.EISDIR: "it is a folder: give a file",
  errno.EEXIST: "choose another name",
  errno.ENAMETOOLONG: "choose a shorter name",
  errno.ELOOP: "a link leads back to itself: choose another place",
  errno.EACCES: "choose another place, or get the right to this one",
  errno.EPERM: "choose another place, or get the right to this one",
  errno.EROFS: "choose a place that can be written",
  errno.ENOSPC: "free some space, or choose another place",
  errno.EDQUOT: "free some space, or choose another place",
  errno.EMFILE: "allow more open files (ulimit -n)",
}


def in_words(error: BaseException, doing: str) -> str:
  """Returns the sentence of an error; one of the operating system says what was done, to which file, and the remedy.

  >>> in_words(FileNotFoundError(2, "No such file or directory", "/proc/x"), "writing --out=/proc/x")
  'writing --out=/proc/x: /proc/x: no such file or directory; check the name, or choose another place.'

  Args:
    error: that was raised.
    doing: what the command does, such as "scoring".
  """
  if not isinstance(error, OSError) or error.errno is None or not str(error).startswith("[Errno"):
    return str(error)
  reason = (error.strerror or os.strerror(error.errno)).strip()
  where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
  remedy = _REMEDIES.get(error.errno, "look at the disk or the network, and run the same command again")
  return f"{doing}: {where}{reason[:1].lower()}{reason[1:]}; {remedy}."


@contextlib.contextmanager
def one_sentence(*expected: type[BaseException], doing: str, again: str) -> Iterator[None]:
  """Ends the program where the block raises: with a sentence and exit code 1, or 130 at Ctrl-C.

  A second Ctrl-C ends it at once, whatever it is at.

  Args:
    expected: exceptions that are said in one sentence; others pass.
    doing: what the block does, such as "scoring".
    again: what to do after Ctrl-C, as a sentence's end.
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
  """Has Ctrl-C end the program in one sentence and with exit code 130 until a block of `one_sentence` begins.

  For programs alone: what is imported by others leaves their signals as they are. Where Ctrl-C is ignored, or somebody
  else's, it stays so.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _not_begun)


def is_command(argv: Sequence[str], interpreter: Sequence[str]) -> bool:
  """Returns whether Python is about to run a module of this package by -m, whose packages it imports first.

  >>> is_command(["-m", "--help"], ["python", "-u", "-m", "jaxpref.sample", "--help"])
  True
  >>> is_command(["-m", "jaxpref.x"], ["python", "-m", "pytest", "jaxpref.x"])
  False

  Args:
    argv: `sys.argv`, which begins with "-m" at that time alone.
    interpreter: `sys.orig_argv`.
  """
  module = interpreter[-len(argv)] if argv[:1] == ["-m"] else ""
  return re.fullmatch(r"(-\w*m)?jaxpref(\..*)?", module) is not None


def _not_begun(*_: Any) -> None:
  """Ends at once: nothing is there to be finished, and an import may take a KeyboardInterrupt for its own error."""
  _say("interrupted before it began.")
  os._exit(INTERRUPTED)


@contextlib.contextmanager
def ctrl_c(first: Callable[[], Any] | None = None, *, last: str = "") -> Iterator[None]:
  """Has the first Ctrl-C inside the block call a function, and the second end the process at once.

  The function, and the end, come from threads: the main one may be in a compiler, which hears of no signal.
  Outside the main thread the block does nothing, nor where SIGINT is ignored, as by nohup.

  Args:
    first: None for KeyboardInterrupt in the main thread, as usual.
    last: what is said at the second.
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
    """Raises again what a callback of the garbage collector has swallowed: JAX has one, and it is called often."""
    if unraisable.exc_type is not KeyboardInterrupt:
      hook(unraisable)
      return
    timer = threading.Timer(AGAIN_SECONDS, again)  # here it would be swallowed, too
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
  with contextlib.suppress(OSError):  # a terminal that is gone
    print(f"\n{text}", file=sys.stderr, flush=True)
