"""What scripts/same_numbers.py takes for a difference; tests/numbers_test.py makes its runs."""

import json
import subprocess
import sys

import numpy as np

from scripts import same_numbers


def left(**changed):
  found = {
    "metrics/step 1/loss": np.float64(0.693147),
    "state/params/w": np.array([1.0, -2.0], np.float32),
    "state/step": np.int32(3),
    "export/model_index.json/kind": np.asarray("a"),
  }
  return found | {name.replace("__", "/"): value for name, value in changed.items()}


def test_the_same_is_the_same():
  assert same_numbers.differences(left(), left()) == []
  assert same_numbers.describe([], 4) == "same (4 values)"


def test_a_bit_is_a_difference_and_a_tolerance_allows_it():
  next_number = np.nextafter(np.float32(1.0), np.float32(2.0))
  found = left(state__params__w=np.array([next_number, -2.0], np.float32))
  ((name, _, apart),) = same_numbers.differences(found, left())
  assert name == "state/params/w" and 1e-7 < apart < 2e-7
  assert same_numbers.differences(found, left(), 1e-6) == []
  assert same_numbers.differences(found, left(), 1e-8) != []


def test_the_sign_of_zero_and_what_is_not_a_number_are_differences():
  zero, minus = left(state__params__w=np.zeros(1)), left(state__params__w=-np.zeros(1))
  assert same_numbers.differences(minus, zero) and not same_numbers.differences(minus, zero, 1e-6)
  spoilt = left(state__params__w=np.array([1.0, np.nan], np.float32))
  assert same_numbers.differences(spoilt, left(), 1e-6) and not same_numbers.differences(spoilt, spoilt)


def test_names_shapes_types_and_texts_are_compared():
  def differ(found):
    return [name for name, *_ in same_numbers.differences(found, left(), 0.1)]

  assert differ(left(state__new=np.zeros(1))) == ["state/new"]
  assert differ({k: v for k, v in left().items() if k != "state/step"}) == ["state/step"]
  assert differ(left(state__step=np.int64(3))) == ["state/step"]
  assert differ(left(state__params__w=np.array([[1.0, -2.0]], np.float32))) == ["state/params/w"]
  assert differ(left() | {"export/model_index.json/kind": np.asarray("b")}) == ["export/model_index.json/kind"]


def test_a_line_names_the_first_metrics_and_the_largest_differences():
  differ = [(f"metrics/step {i}/loss", "1 -> 2", 1.0) for i in range(1, 6)]
  differ += [("state/a", "by 0.1", 0.1), ("state/b", "by 0.5", 0.5)]
  said = same_numbers.describe(differ, 9)
  assert said == (
    "DIFFERENT, 5 of metrics: step 1/loss 1 -> 2, step 2/loss 1 -> 2, step 3/loss 1 -> 2, ...; "
    "2 of state: b by 0.5, a by 0.1"
  )


def test_rows_without_times_and_files_by_their_values(tmp_path):
  row = {"step": 2, "time": 5.0, "loss": 0.5, "images_per_second": 3.0, "host_seconds": 1.0}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  assert dict(same_numbers._rows(tmp_path / "metrics.jsonl")) == {"metrics/step 2/loss": 0.5}
  found = dict(same_numbers._values({"a": [1, {"b": True}], "c": None, "d": []}, "data"))
  assert {k: v.item() for k, v in found.items()} == {
    "data/a/0": 1, "data/a/1/b": True, "data/c": "None", "data/d": "[]"
  }  # fmt: skip


def test_a_commit_that_is_not_there_is_one_sentence():
  command = [sys.executable, str(same_numbers.ROOT / "scripts" / "same_numbers.py"), "no-such-commit"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
