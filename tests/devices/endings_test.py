"""How commands end that cannot go on: Ctrl-C, and errors of the operating system."""

import errno
import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxpref.devices import endings

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored():
  """As it is in the background of a script."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def interrupted(command, moments, **options):
  """Runs a command, presses Ctrl-C when the given texts were said, in order; returns exit code and what was said."""
  usual = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, preexec_fn=usual, **options)
  said = ""
  for moment in moments:
    while moment not in said:
      more = os.read(process.stderr.fileno(), 2**16).decode()
      assert more, said
      said += more
    time.sleep(2 * endings.ECHO_SECONDS)
    process.send_signal(signal.SIGINT)
  rest = process.communicate(timeout=120)[1]
  return process.returncode, said + rest


BUSY = """
import hashlib, sys, time
from jaxpref.devices import endings
with endings.one_sentence(doing="scoring", again="the same command goes on"):
  print("begun", file=sys.stderr, flush=True)
  {work}
"""


def test_ctrl_c_is_one_sentence_and_exit_code_130():
  code, said = interrupted([sys.executable, "-c", BUSY.format(work="time.sleep(60)")], ["begun"])
  assert (code, said) == (130, "begun\n\nscoring was interrupted; the same command goes on.\n")


def test_a_second_ctrl_c_ends_at_once_what_hears_of_no_signal():
  """As a compiler: a C function that gives the lock of Python away, and does not come back."""
  work = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
  started = time.monotonic()
  code, said = interrupted([sys.executable, "-c", BUSY.format(work=work)], ["begun", "begun"])
  assert (code, said) == (130, "begun\n\nstopped at once.\n")
  assert time.monotonic() - started < 30


def test_a_ctrl_c_that_another_program_passes_on_is_the_same_one(monkeypatch):
  monkeypatch.setattr(endings.os, "_exit", lambda code: pytest.fail("ended"))
  calls = []
  with endings.ctrl_c(lambda: calls.append(1)):
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.1)
  assert calls == [1]


def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector():
  def callback(phase, info):
    if not pressed:
      pressed.append(phase)
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.1)

  pressed = []
  gc.callbacks.append(callback)
  try:
    with pytest.raises(SystemExit) as ended, endings.one_sentence(doing="scoring", again="run it again"):
      gc.collect()
      time.sleep(0.1)
  finally:
    gc.callbacks.remove(callback)
  assert pressed == ["start"] and ended.value.code == 130


def test_afterwards_ctrl_c_is_as_before():
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), endings.ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
  assert signal.getsignal(signal.SIGINT) is before
  assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, 9999])
def test_errors_of_the_system_say_what_was_done_and_the_remedy(number):
  said = endings.in_words(OSError(number, os.strerror(number), "/a/b"), "scoring")
  assert said.startswith("scoring: /a/b: ") and "; " in said and said.endswith(".") and "Errno" not in said


def test_sentences_stay_as_they_are():
  for error in (ValueError("record 3 cannot be read."), FileNotFoundError("there is no file a; give one.")):
    assert endings.in_words(error, "scoring") == str(error)
