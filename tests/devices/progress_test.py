"""What bars say where there is no terminal."""

import sys
import time

import pytest

from jaxpref.devices import progress


class Terminal:
  """Of stderr: what pytest gives, but a terminal."""

  def __init__(self, file):
    self._file = file

  def isatty(self):
    return True

  def __getattr__(self, name):
    return getattr(self._file, name)


@pytest.fixture
def often(monkeypatch):
  monkeypatch.setattr(progress, "SECONDS", 0.05)


def test_a_short_job_says_nothing_without_a_terminal(capsys):
  with progress.tqdm(total=3, desc="pictures") as bar:
    bar.update(3)
  assert list(progress.tqdm(range(3), desc="files")) == [0, 1, 2]
  assert capsys.readouterr().err == ""


def test_a_long_job_says_lines_without_carriage_returns(often, capsys):
  with progress.tqdm(total=4, initial=1, desc="spo") as bar:
    for loss in ("0.7", "0.6", "0.5"):
      time.sleep(0.06)
      bar.set_postfix(loss=loss, refresh=False)
      bar.update()
  said = capsys.readouterr().err
  assert "\r" not in said
  of_step = "spo: {} of 4, 00:00 left, loss={}".format
  assert said.splitlines() == [of_step(2, "0.7"), of_step(3, "0.6"), of_step(4, "0.5")]


def test_without_a_total_a_line_says_what_is_done(often, capsys):
  for _ in progress.tqdm(iter(range(2)), desc="reading", unit=" files"):
    time.sleep(0.06)
  assert capsys.readouterr().err.splitlines()[-1] == "reading: 2 files, 00:00 so far"


def test_a_terminal_has_a_bar(capsys, monkeypatch):
  monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
  with progress.tqdm(total=3, desc="spo") as bar:
    bar.update(3)
  said = capsys.readouterr().err
  assert "\rspo: 100%|" in said and "3/3" in said


def test_a_message_between_two_lines_stays_whole(often, capsys):
  with progress.tqdm(total=2, desc="spo") as bar:
    time.sleep(0.06)
    bar.update()
    progress.tqdm.write("step 1: the loss is high.", file=sys.stderr)
  assert capsys.readouterr().err.splitlines()[1] == "step 1: the loss is high."
