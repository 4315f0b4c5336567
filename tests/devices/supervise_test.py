"""Supervisors of processes that do nothing, one of which goes away: who is named, and that nobody is left."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxpref.devices import supervise

REPOSITORY = pathlib.Path(__file__).parents[2]
CHILD = """
import os, pathlib, signal, sys, time
from jaxpref.devices import supervise
supervise.SILENCE_SECONDS, supervise.BEAT_SECONDS, supervise.SETTLE_SECONDS = 1.5, 0.1, 0.3
index, count, folder, what = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
parent = os.getpid()
reporter = supervise.fork()
assert "jax" not in sys.modules and os.getppid() == parent
if what == "alone":
  reporter.starting("nobody came.")
  os.abort()
if index == 0:
  (folder / "part").write_text(f"{reporter.port} {reporter.token}")
  (folder / "part").rename(folder / "leader")
while not (folder / "leader").exists():
  time.sleep(0.01)
port, token = (folder / "leader").read_text().split()
group = supervise.Group(index, tuple(f"h{i}" for i in range(count)), str(folder))
reporter.joined(group, ("127.0.0.1", int(port)), token)
time.sleep(0.3)
(folder / f"{index}.part").write_text(str(os.getpid()))
(folder / f"{index}.part").rename(folder / f"{index}.pid")
while len(list(folder.glob("*.pid"))) < count:
  time.sleep(0.01)
if what == "fail":
  print("error: record 3 cannot be read.", file=sys.stderr)
  reporter.fail("record 3 cannot be read.")
if what == "break":
  reporter.break_off("UNKNOWN: connection closed by peer")
if what == "abort":
  os.abort()
if what == "stop":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if what != "end":
  time.sleep(60)
"""


class Run:
  """Processes of the given kinds; `pids` are those of the children, once all are connected."""

  def __init__(self, folder, *kinds):
    folder.mkdir(exist_ok=True)
    (folder / "checkpoints" / "40").mkdir(parents=True)
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    self.processes = [
      subprocess.Popen(
        [sys.executable, "-c", CHILD, str(i), str(len(kinds)), str(folder), kind],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i, kind in enumerate(kinds)
    ]
    files = [folder / f"{i}.pid" for i in range(len(kinds))]
    while not all(f.exists() for f in files):
      time.sleep(0.01)
    self.pids = [int(f.read_text()) for f in files]

  def end(self):
    """(exit codes, what each said), once all have ended."""
    said = [process.communicate(timeout=60)[1].strip() for process in self.processes]
    deadline = time.monotonic() + 10
    while any(map(alive, self.pids)):
      assert time.monotonic() < deadline
      time.sleep(0.01)
    return [process.returncode for process in self.processes], said


def alive(pid):
  """Whether it runs; a process that was killed and not yet waited for does not."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
  except FileNotFoundError:
    return False


ADVICE = "run the same command on all hosts again: it resumes at step 40."


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_killed_with_its_supervisor(tmp_path, gone):
  run = Run(tmp_path, "wait", "wait", "wait")
  run.processes[gone].kill()
  started = time.monotonic()
  codes, said = run.end()
  assert time.monotonic() - started < 10
  line = f"error: process {gone} of 3 (host h{gone}) stopped answering; {ADVICE}"
  assert codes == [-9 if i == gone else supervise.RUN_AGAIN for i in range(3)]
  assert said == ["" if i == gone else line for i in range(3)]


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_killed_alone(tmp_path, gone):
  run = Run(tmp_path, "wait", "wait")
  os.kill(run.pids[gone], signal.SIGKILL)
  codes, said = run.end()
  assert codes == [137 if i == gone else supervise.RUN_AGAIN for i in range(2)]
  assert said == [f"error: process {gone} of 2 (host h{gone}) was killed by SIGKILL (out of memory?); {ADVICE}"] * 2


@pytest.mark.parametrize("gone", [0, 1])
def test_an_error_is_told_to_the_others(tmp_path, gone):
  run = Run(tmp_path, *("fail" if i == gone else "wait" for i in range(2)))
  codes, said = run.end()
  assert codes == [1 if i == gone else supervise.RUN_AGAIN for i in range(2)]
  assert said[gone] == "error: record 3 cannot be read."
  assert said[1 - gone] == f"error: process {gone} of 2 (host h{gone}) failed: record 3 cannot be read; {ADVICE}"


def test_an_error_of_all_is_said_once_by_each(tmp_path):
  assert Run(tmp_path, "fail", "fail", "fail").end() == ([1] * 3, ["error: record 3 cannot be read."] * 3)


def test_a_machine_that_is_gone_says_nothing(tmp_path):
  run = Run(tmp_path, "wait", "wait", "wait")
  for pid in (run.processes[2].pid, run.pids[2]):
    os.kill(pid, signal.SIGSTOP)
  said = [run.processes[i].communicate(timeout=60)[1].strip() for i in range(2)]
  assert said == [f"error: process 2 of 3 (host h2) stopped answering; {ADVICE}"] * 2
  os.kill(run.processes[2].pid, signal.SIGKILL)
  os.kill(run.pids[2], signal.SIGKILL)
  assert run.end()[0] == [supervise.RUN_AGAIN, supervise.RUN_AGAIN, -9]


def test_an_operation_that_fails_is_the_fault_of_the_one_that_is_gone(tmp_path):
  run = Run(tmp_path, "break", "wait", "abort")  # an abort may be a consequence, too: here it is the only news
  codes, said = run.end()
  assert codes == [supervise.RUN_AGAIN, supervise.RUN_AGAIN, 128 + signal.SIGABRT]
  assert said[0] == said[1]
  assert said[0].startswith("error: process 2 of 3 (host h2) was killed by SIGABRT")


def test_an_operation_that_fails_by_itself(tmp_path):
  codes, said = Run(tmp_path, "break", "wait").end()
  assert codes == [1, supervise.RUN_AGAIN]
  assert said == [f"error: process 0 of 2 (host h0) failed: UNKNOWN: connection closed by peer; {ADVICE}"] * 2


def test_the_end_of_a_run_is_no_news(tmp_path):
  run = Run(tmp_path, "stop", "end", "stop")
  assert run.processes[1].wait(timeout=60) == 0
  time.sleep(2)  # more than the silence that is allowed
  assert alive(run.pids[0]) and alive(run.pids[2])
  for i in (0, 2):  # the signal is for the process, whoever gets it
    os.kill(run.processes[i].pid, signal.SIGTERM)
  assert run.end() == ([0, 0, 0], ["", "", ""])


def test_strangers_are_not_listened_to(tmp_path):
  run = Run(tmp_path, "stop", "stop")
  port = int((tmp_path / "leader").read_text().split()[0])
  for message in (b'{"hello": 1, "token": "guess"}\n', b"\xff\n", b'{"why": "stopped"}\n', b"[1]\n", b""):
    with socket.create_connection(("127.0.0.1", port)) as connection:
      connection.sendall(message)
  time.sleep(0.5)
  assert all(alive(pid) for pid in run.pids)
  for process in run.processes:
    process.terminate()
  assert run.end() == ([0, 0], ["", ""])


def test_without_a_checkpoint_a_run_starts_anew(tmp_path):
  assert supervise.advice(tmp_path) == (
    "run the same command on all hosts again: it starts anew, as there is no checkpoint yet."
  )


def test_a_start_to_which_others_do_not_come(tmp_path):
  """The JAX runtime ends a process then."""
  command = [sys.executable, "-c", CHILD, "0", "2", str(tmp_path), "alone"]
  done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=str(REPOSITORY)), capture_output=True, text=True)
  assert (done.returncode, done.stderr.strip()) == (supervise.RUN_AGAIN, "error: nobody came.")
