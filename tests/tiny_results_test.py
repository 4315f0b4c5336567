"""What README and docs say of the first runs, and how it is measured."""

import json
import pathlib

import numpy as np
from PIL import Image

from jaxpref import loading, report, validation
from jaxpref.data import emoji
from scripts import measure_judge, tiny_results

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


def test_a_grid_can_be_cut_again():
  tiles = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3)).astype(np.uint8)
  for scale in (1, 3):
    np.testing.assert_array_equal(report.cut(report.grid(tiles, scale=scale), columns=5, side=8, scale=scale), tiles)


def test_looks_are_judged_by_the_pictures_that_a_run_left(tmp_path):
  """Tiles of the validation prompts, two of each: all outlined, then half of them; then those of other prompts."""
  config = tiny_results.recipe("spo")
  classes = [p.class_id for p in validation.prompts(config, "validation", config.sample.num_prompts)]
  outlined, flat = (emoji.load_tiles(style, 32, class_ids=classes) for style in ("openmoji", "twemoji"))
  for step, pictures in (
    (0, [outlined, outlined]),
    (5, [outlined, flat]),
    (10, [np.roll(outlined, 5, axis=0)] * 2),
  ):
    flat_list = np.stack(pictures, axis=1).reshape(-1, validation.LOOK_COLUMNS, 32, 32, 3)
    report.save_image(tmp_path / "samples" / f"step_{step:06d}.png", report.grid(flat_list, scale=2))
  first, second, third = tiny_results.looks(tmp_path, "spo")
  assert [look["step"] for look in (first, second, third)] == [0, 5, 10]
  assert first["preferred_share"] == 1 and 0.5 <= second["preferred_share"] < 0.6
  assert min(first["caption_accuracy"], second["caption_accuracy"]) > 0.95 and third["caption_accuracy"] < 0.4
  mean = tiny_results.mean_looks([[first], [third]])
  assert mean[0]["caption_accuracy"] == (first["caption_accuracy"] + third["caption_accuracy"]) / 2


def test_the_first_runs_show_the_preference():
  """And those that learn from labels keep the captions; SPO does not yet."""
  rows = json.loads((DOCS / "tiny_results.json").read_text())
  assert {(row["name"], row["seed"]) for row in rows} >= {(n, s) for n in tiny_results.NAMES for s in range(2)}
  for row in rows:
    assert row["protocol"]["preferred_style"] == "openmoji" and row["protocol"]["split"] == "test"
    assert row["preferred_share"] >= 0.8 and row["win_rate_interval"][0] > 0.5
  for name in ("dpo", "tdpo"):
    assert np.mean([row["caption_accuracy_change"] for row in rows if row["name"] == name]) >= -0.05


def test_the_recipes_have_what_was_chosen_on_the_validation_prompts():
  """And that is what the rule takes of the measured points."""
  found = json.loads((DOCS / "tiny_tuning.json").read_text())
  assert set(found["chosen"]) == set(tiny_results.NAMES)
  for name, chosen in found["chosen"].items():
    allowed = []
    for run in (run for run in found["runs"] if run["method"] == name):
      least = run["points"][0]["caption_accuracy"] - tiny_results.ALLOWED_LOSS - 1e-9
      allowed += [p | {"fields": run["fields"]} for p in run["points"] if p["caption_accuracy"] >= least]
    assert chosen == max(allowed, key=lambda p: (p["preferred_share"], p["caption_accuracy"]))
    config = tiny_results.recipe(name)
    assert config.num_steps == chosen["step"]
    for field, value in chosen["fields"].items():
      section, _, key = field.partition(".")
      assert config[section][key] == value


def test_the_judge_agrees_with_eyes_on_style():
  recorded = json.loads((DOCS / "judge_sheet.json").read_text())
  sheet = np.asarray(Image.open(DOCS / "judge_sheet.png").convert("RGB"))
  tiles = report.cut(sheet, columns=measure_judge.COLUMNS, side=32, scale=1)
  pictures = tiles.reshape(-1, 32, 32, 3)[: recorded["pictures"]]
  found = measure_judge.agreement(pictures, recorded["outlined_by_eye"], "tiny-judge")
  assert found["outlined_by_eye"] > 40 and found["pictures"] - found["outlined_by_eye"] > 40
  assert found["judge_agrees"] >= 0.95
  assert abs(found["judge_agrees"] - recorded["judge_agrees"]) < 0.01  # one picture


def test_the_judge_names_the_outlined_style_and_knows_captions_in_all():
  metrics = json.loads((loading.folder_of("tiny-judge") / "metrics.json").read_text())
  assert metrics["openmoji_told"] >= 0.97 and metrics["openmoji_named"] >= 0.97
  rows = json.loads((DOCS / "judge.json").read_text())
  assert [row["t"] for row in rows] == list(measure_judge.TIMESTEPS)
  assert all(row["largest_difference"] <= 0.03 for row in rows)
