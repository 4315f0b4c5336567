"""What README and docs say of the first runs, and how it is measured."""

import importlib
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from jaxpref.evaluation.pictures import cut, grid
from jaxpref.files import loading
from scripts.study import measure_judge, tiny_results

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results"


def test_a_grid_can_be_cut_again():
  tiles = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3)).astype(np.uint8)
  for scale in (1, 3):
    np.testing.assert_array_equal(cut(grid(tiles, scale=scale), columns=5, side=8, scale=scale), tiles)


def test_looks_are_the_rows_that_measured_validation_prompts(tmp_path):
  rows = [
    {"step": 0, "validation_preferred_share": 0.4, "validation_caption_accuracy": 0.9, "validation_reward": 5.0},
    {"step": 1, "loss": 0.7},
    {"step": 5, "validation_preferred_share": 0.6, "validation_caption_accuracy": 0.8},
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  first, last = tiny_results.looks(tmp_path)
  assert first == {"step": 0, "preferred_share": 0.4, "caption_accuracy": 0.9}
  assert last == {"step": 5, "preferred_share": 0.6, "caption_accuracy": 0.8}
  assert tiny_results.mean_looks([[first], [last]])[0] == pytest.approx(
    {"step": 2.5, "preferred_share": 0.5, "caption_accuracy": 0.85}
  )


def test_the_first_runs_show_the_preference():
  """And captions are mostly kept: README says by how much SPO misses 80 % at a loss of 5 points."""
  rows = json.loads((RESULTS / "tiny_results.json").read_text())
  assert {(row["name"], row["seed"]) for row in rows} >= {(n, s) for n in tiny_results.NAMES for s in range(3)}
  for row in rows:
    assert row["protocol"]["preferred_style"] == "openmoji" and row["protocol"]["split"] == "test"
    assert row["win_rate_interval"][0] > 0.8
  for name, least, allowed in (("spo", 0.78, 0.06), ("dpo", 0.8, 0.05), ("tdpo", 0.8, 0.05)):
    mine = [row for row in rows if row["name"] == name]
    assert np.mean([row["preferred_share"] for row in mine]) >= least
    assert np.mean([row["caption_accuracy_change"] for row in mine]) >= -allowed


def test_the_recipes_have_what_was_chosen_on_the_validation_prompts():
  """And that is what the rule takes of the measured points."""
  found = json.loads((RESULTS / "tiny_tuning.json").read_text())
  assert set(found["chosen"]) == set(tiny_results.NAMES)
  for name, chosen in found["chosen"].items():
    allowed = []
    for run in (run for run in found["runs"] if run["method"] == name):
      least = run["points"][0]["caption_accuracy"] - tiny_results.ALLOWED_LOSS - 1e-9
      allowed += [p | {"fields": run["fields"]} for p in run["points"] if p["caption_accuracy"] >= least]
    assert chosen == max(allowed, key=lambda p: (p["preferred_share"], p["caption_accuracy"]))
    config = importlib.import_module(f"configs.{name}_tiny").get_config()
    assert config.num_steps == chosen["step"]
    for field, value in chosen["fields"].items():
      section, _, key = field.partition(".")
      assert config[section][key] == value


@pytest.mark.slow  # of files that do not change
def test_the_judge_agrees_with_eyes_on_style():
  recorded = json.loads((RESULTS / "judge_sheet.json").read_text())
  sheet = np.asarray(Image.open(RESULTS / "judge_sheet.png").convert("RGB"))
  tiles = cut(sheet, columns=measure_judge.COLUMNS, side=32, scale=1)
  pictures = tiles.reshape(-1, 32, 32, 3)[: recorded["pictures"]]
  found = measure_judge.agreement(pictures, recorded["outlined_by_eye"], "tiny-judge")
  assert found["outlined_by_eye"] > 40 and found["pictures"] - found["outlined_by_eye"] > 40
  assert found["judge_agrees"] >= 0.95
  assert abs(found["judge_agrees"] - recorded["judge_agrees"]) < 0.01  # one picture


def test_the_judge_names_the_outlined_style_and_knows_captions_in_all():
  metrics = json.loads((loading.folder_of("tiny-judge") / "metrics.json").read_text())
  assert metrics["openmoji_told"] >= 0.97 and metrics["openmoji_named"] >= 0.97
  rows = json.loads((RESULTS / "judge.json").read_text())
  assert [row["t"] for row in rows] == list(measure_judge.TIMESTEPS)
  assert all(row["largest_difference"] <= 0.03 for row in rows)
