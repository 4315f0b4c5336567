"""One writer of a folder: who is refused, and who does not stand in the way."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxpref.data import lease
from jaxpref.devices import distributed
from tests.data import bucket as buckets
from tests.data.latents_test import largest_file

bucket = buckets.bucket

REPOSITORY = pathlib.Path(__file__).parents[2]
HOLD = """
import sys, time
from jaxpref.data import lease
with lease.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
  for name, seconds in (("RENEW", 0.05), ("EXPIRE", 1.0), ("GRACE", 0.1), ("SETTLE", 0.02), ("POLL", 0.02)):
    monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


@contextlib.contextmanager
def another_process(folder):
  """One that holds the folder until it is killed."""
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  process = subprocess.Popen([sys.executable, "-c", HOLD, folder], env=environment, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def leave(folder, name=lease.NAME, **changes):
  """The lock of a writer that is gone, of this process but for what is changed."""
  folder.mkdir(exist_ok=True)
  writer = dataclasses.replace(lease.Writer.here(), **changes)
  (folder / "part").write_bytes(writer.encode())
  (folder / "part").replace(folder / name)  # in one piece
  return writer


ELSEWHERE = {"host": "gpu012", "pid": 4711, "place": "another boot pid:[1]", "since": "2026-11-28 23:59:59 +0000"}


def test_the_lock_names_the_writer_and_goes_at_the_end(tmp_path):
  folder = tmp_path / "runs" / "new"
  with lease.hold(folder) as held:
    there = json.loads((folder / "writer_lock.json").read_text())
    assert there["pid"] == os.getpid() and there["host"] and there["since"] and there["process_start"]
    held.check()
    (folder / "made").touch()
  assert [path.name for path in folder.iterdir()] == ["made"]
  with pytest.raises(KeyError), lease.hold(folder):
    raise KeyError
  assert [path.name for path in folder.iterdir()] == ["made"]


def test_a_folder_in_which_nothing_was_written_is_not_left_behind(tmp_path):
  with pytest.raises(KeyError), lease.hold(tmp_path / "runs" / "new"):
    raise KeyError
  assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_with_the_host_the_pid_and_the_start_of_the_first(tmp_path):
  with another_process(tmp_path) as process:
    before = (tmp_path / lease.NAME).read_bytes()
    there = json.loads(before)
    with pytest.raises(lease.Occupied) as error, lease.hold(tmp_path):
      pass
    assert str(error.value).startswith(
      f"{tmp_path} is being written by process {process.pid} on host {there['host']}, which started {there['since']}; "
    )
    assert (tmp_path / lease.NAME).read_bytes() == before
    os.kill(process.pid, signal.SIGSTOP)  # it may go on at any time
    with pytest.raises(lease.Occupied), lease.hold(tmp_path):
      pass


def test_a_process_that_was_killed_does_not_stand_in_the_way(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 600.0)
  monkeypatch.setattr(lease, "GRACE_SECONDS", 60.0)
  with another_process(tmp_path) as process:
    process.kill()  # and not yet waited for
    with lease.hold(tmp_path):
      pass
  said = capsys.readouterr().err
  assert re.search(rf": took over from process {process.pid} on host .*; that process is gone; last renewed", said)
  assert list(tmp_path.iterdir()) == []


def test_a_pid_that_another_process_has_now_does_not_count(tmp_path, capsys):
  leave(tmp_path, pid=os.getppid(), process_start="1")
  with lease.hold(tmp_path):
    assert "that process is gone" in capsys.readouterr().err


def test_a_process_whose_name_has_brackets_and_spaces_is_found(tmp_path):
  pytest.importorskip("resource")
  program = tmp_path / "a ) R 1"
  program.symlink_to(sys.executable)
  process = subprocess.Popen([program, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
  try:
    process.stdout.readline()
    assert int(lease._process_start(process.pid)) >= int(lease._process_start(os.getpid()))
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  with pytest.raises(ProcessLookupError):
    lease._process_start(process.pid)


@pytest.mark.parametrize("changes", [{"place": "", "process_start": ""}, {"place": "boot pid:[2]"}, ELSEWHERE])
def test_a_lease_that_is_renewed_from_elsewhere_is_refused(tmp_path, changes, capsys, monkeypatch):
  """Another host, or another container on this one, where this process's id may be given out, too."""
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 600.0)
  leave(tmp_path, **changes)
  ended = threading.Event()

  def renew():
    while not ended.wait(0.05):
      os.utime(tmp_path / lease.NAME)

  thread = threading.Thread(target=renew)
  thread.start()
  try:
    with pytest.raises(lease.Occupied, match=r"is being written by process \d+ on host .* \(it renewed its lease just"):
      with lease.hold(tmp_path):
        pass
  finally:
    ended.set()
    thread.join()
  assert "waiting up to 600 s" in capsys.readouterr().err
  assert json.loads((tmp_path / lease.NAME).read_text())["place"] == changes["place"]


def test_a_lease_from_elsewhere_expires_and_its_age_is_told_by_the_file_system(tmp_path, capsys):
  """However wrong the clock of this process is, and it is not asked."""
  leave(tmp_path, **ELSEWHERE)
  now = (tmp_path / lease.NAME).stat().st_mtime
  os.utime(tmp_path / lease.NAME, (now - 100, now - 100))
  began = time.monotonic()
  with lease.hold(tmp_path):
    pass
  assert time.monotonic() - began > 1.0
  said = capsys.readouterr().err
  found = re.search(
    r"waited for process 4711 on host gpu012, which started 2026-11-28 23:59:59 \+0000, and took over its lease, which "
    r"has expired; last renewed (\d+) s ago\.",
    said,
  )
  assert found and 100 <= int(found[1]) < 200


def test_a_lease_in_the_future_expires(tmp_path):
  leave(tmp_path, **ELSEWHERE)
  os.utime(tmp_path / lease.NAME, (time.time() + 1e6,) * 2)
  with lease.hold(tmp_path):
    pass


def test_a_writer_elsewhere_that_ends_makes_room_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 600.0)
  monkeypatch.setattr(lease.time, "sleep", lambda seconds: (tmp_path / lease.NAME).unlink(missing_ok=True))
  leave(tmp_path, **ELSEWHERE)
  with lease.hold(tmp_path):
    pass


@pytest.mark.parametrize("content", [b"", b'{"host": "a", "pi', b"[1]", b"{}"])
def test_a_lock_that_was_never_finished_expires(tmp_path, content, capsys):
  (tmp_path / lease.NAME).write_bytes(content)
  with lease.hold(tmp_path):
    there = json.loads((tmp_path / lease.NAME).read_text())
    assert there["pid"] == os.getpid()
  assert "waited for a process that has not given its name" in capsys.readouterr().err


@pytest.mark.parametrize("lock", ["none", "dead", "expired"])
def test_of_many_that_start_at_once_one_writes(tmp_path, lock, monkeypatch):
  """Threads of this process, which the lock alone keeps apart here."""
  monkeypatch.setattr(lease.Writer, "is_running", lambda self: {"dead": False, "expired": None}.get(self.host, True))
  if lock != "none":
    leave(tmp_path, host=lock)
  held, refused, start, end = [], [], threading.Barrier(8), threading.Event()

  def one():
    start.wait()
    try:
      found = lease._acquire(lease._File(tmp_path / lease.NAME), tmp_path)
    except lease.Occupied:
      refused.append(1)
    else:
      held.append(found)
      end.wait()

  threads = [threading.Thread(target=one) for _ in range(8)]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + 60
  while len(held) + len(refused) < 8 and time.monotonic() < deadline:
    time.sleep(0.01)
  end.set()
  for thread in threads:
    thread.join()
  for found in held:
    found.end()
  assert (len(held), len(refused)) == (1, 7)


def test_a_writer_that_was_taken_over_stops(tmp_path):
  """As one whose machine slept for longer than its lease: it must not go on when it wakes up."""
  with lease.hold(tmp_path) as held:
    other = leave(tmp_path, **ELSEWHERE)
    deadline = time.monotonic() + 30
    with pytest.raises(lease.Occupied, match="was taken over by process 4711 on host gpu012"):
      while time.monotonic() < deadline:
        held.check()
        time.sleep(0.01)
  assert lease.Writer.decode((tmp_path / lease.NAME).read_bytes()) == other  # which stays


def test_a_writer_that_has_not_renewed_its_lease_for_long_looks_before_it_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "RENEW_SECONDS", 600.0)
  with lease.hold(tmp_path) as held:
    leave(tmp_path, **ELSEWHERE)
    held.check()
    held._renewed -= 1.0
    with pytest.raises(lease.Occupied, match="was taken over"):
      held.check()


def test_a_lock_that_somebody_deletes_is_made_again(tmp_path):
  with lease.hold(tmp_path) as held:
    (tmp_path / lease.NAME).unlink()
    deadline = time.monotonic() + 30
    while not (tmp_path / lease.NAME).exists() and time.monotonic() < deadline:
      time.sleep(0.01)
    held.check()
    with pytest.raises(lease.Occupied, match="another thread of this process"):
      in_thread(lambda: lease.hold(tmp_path).__enter__())


def in_thread(call):
  found = []

  def catch():
    try:
      found.append(call())
    except BaseException as error:
      found.append(error)

  thread = threading.Thread(target=catch)
  thread.start()
  thread.join()
  if isinstance(found[0], BaseException):
    raise found[0]


def test_another_name_of_a_folder_is_the_same_folder(tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "link").symlink_to("run")
  with lease.hold(tmp_path / "run") as outer, lease.hold(tmp_path / "link" / ".." / "run") as inner:
    assert inner is outer
    with pytest.raises(lease.Occupied, match="link is being written by another thread"):
      in_thread(lambda: lease.hold(tmp_path / "link").__enter__())


def test_a_lock_that_does_not_fit_on_the_disk_is_not_left_half_written(tmp_path):
  with largest_file(100), pytest.raises(OSError, match=r"writer_lock.json cannot be written \(.*\); free some space"):
    with lease.hold(tmp_path):
      pass
  assert not list(tmp_path.iterdir())


def test_a_lease_in_a_bucket_is_renewed_by_its_content(bucket, monkeypatch, capsys):
  lock = bucket / "made" / lease.NAME
  with lease.hold("gs://bucket/made") as held:
    renewals, deadline = 0, time.monotonic() + 60
    while renewals < 3:
      there = lease.Writer.decode(lock.read_bytes())  # None: this bucket, unlike a true one, shows half of a file
      renewals = there.renewals if there else renewals
      assert time.monotonic() < deadline
    with pytest.raises(lease.Occupied, match="gs://bucket/made is being written by another thread"):
      in_thread(lambda: lease.hold("gs://bucket/made").__enter__())
    held.check()
  assert not lock.exists()
  leave(bucket / "made", **ELSEWHERE)
  monkeypatch.setattr(lease, "RENEW_SECONDS", 600.0)
  with lease.hold("gs://bucket/made") as held:
    assert "waited for process 4711 on host gpu012" in capsys.readouterr().err
    leave(bucket / "made", **ELSEWHERE)
    held._renewed -= 1.0
    with pytest.raises(lease.Occupied, match="was taken over by process 4711"):
      held.check()
  assert lock.exists()


def test_one_run_may_hold_a_folder_twice(tmp_path):
  with lease.hold(tmp_path) as outer:
    with lease.hold(tmp_path) as inner:
      assert inner is outer
    assert (tmp_path / lease.NAME).exists()
    with lease.hold(tmp_path, name="a.npz.writer_lock.json"), lease.hold(tmp_path / "evaluation"):
      pass
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_renamed_keeps_its_name_locked(tmp_path):
  with lease.hold(tmp_path / "a") as held:
    (tmp_path / "a" / "old").touch()
    held.move(tmp_path / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == [lease.NAME]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["old"]
    time.sleep(0.1)
    held.check()
  assert not (tmp_path / "a").exists() and [path.name for path in (tmp_path / "b").iterdir()] == ["old"]


def test_all_processes_of_a_run_are_refused_together(tmp_path, monkeypatch):
  """As process 1 sees it: it writes no lock, and learns from process 0."""
  said = iter(["", "the folder is being written"])
  monkeypatch.setattr(distributed, "is_first", lambda: False)
  monkeypatch.setattr(distributed, "word_of_first", lambda text: next(said))
  with lease.hold(tmp_path) as held:
    held.check()
    assert not list(tmp_path.iterdir())
  with pytest.raises(lease.Occupied, match="the folder is being written"), lease.hold(tmp_path):
    pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"file/run cannot be written \(Not a directory\); .*choose another folder"):
    with lease.hold(tmp_path / "file" / "run"):
      pass


@pytest.mark.parametrize(
  ("name", "expected"),
  [("writer_lock.json", True), ("writer_lock_3.json", True), ("scores.npz.writer_lock.json", True), ("my.json", False)],
)
def test_locks_are_no_content(name, expected):
  assert lease.is_lock(name) == expected
