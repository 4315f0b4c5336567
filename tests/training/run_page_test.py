"""The page of a run: made of what its folder holds, also half of it, and standing alone."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxpref import config as config_lib
from jaxpref import show
from jaxpref.training import run_page
from tests.evaluation.comparison_test import HOSTILE, Page

RESULTS = {
  model: {
    name: {"mean": share, "interval": None if model == "base" else [share - 0.1, share + 0.1]}
    for name, share in (("preferred_share", 0.25 + 0.5 * (model == "aligned")), ("caption_accuracy", 0.875))
  }
  for model in ("base", "aligned")
} | {
  "win_rate": 0.9,
  "win_rate_interval": [0.8, 0.95],
  "in_words": "It draws better.",
  "protocol": {"preferred_style": "openmoji", "candidates": 16, "split": "test"},
}


def run_of(folder, *, steps=30, looks=(0, 10, 20, 30), results=RESULTS, export=True, **fields):
  """A work folder; the last step is that of the config."""
  config = config_lib.default()
  config.update(objective="spo", model="tiny-sd", num_steps=30, preference_model="tiny-spm", **fields)
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config_lib.typed(config).to_dict()))
  rows = [{"step": s, "time": 0.0, "loss": 0.7 - 0.01 * s, "reward": float(s % 3)} for s in range(1, steps + 1)]
  rows += [{"step": s, "time": 0.0, "validation_reward": 5.0 + s, "validation_preferred_share": 0.5} for s in looks]
  (folder / "metrics.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: r["step"]))
  )
  for step in looks:
    picture(folder / "samples" / f"step_{step:06d}.png")
  if results:
    (folder / "results.json").write_text(json.dumps(results))
  if export:
    (folder / "export").mkdir()
  return folder


def picture(file, size=(120, 60)):
  file.parent.mkdir(exist_ok=True)
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(file)


def shown(folder):
  Page.VOID.add("polyline")
  return Page(run_page.write(folder).read_text(encoding="utf-8"))


def text(page):
  return " ".join(page.elements[0][2].split())


def test_a_finished_run_shows_results_pictures_curves_config_and_commands(tmp_path):
  folder = run_of(tmp_path / "mine", seed=7)
  picture(folder / "before_after.png")
  run_page.note_command(folder, "python -m jaxpref.main --config=a.py")
  page = shown(folder)
  said = text(page)
  assert "mine: spo of tiny-sd 30 steps, finished" in said and "It draws better." in said
  assert "75.0% [65.0%, 85.0%]" in said and "90.0% [80.0%, 95.0%]" in said and "share of openmoji" in said
  assert [e[2].split()[1] for e in page.all("figcaption") if e[2].startswith("Step")] == ["0", "10", "20", "30"]
  assert "preferred share 50.0%" in said and "reward 35.00" in said
  assert len(page.all("img")) == 5 and len(page.all("svg", "curve")) == 4
  changed = next(e[2] for e in page.all("table", "settings") if "differ from their defaults" in e[2])
  assert "seed7" in changed and "batch_size" not in changed and "python -m jaxpref.main --config=a.py" in said


def test_it_stands_alone(tmp_path):
  content = run_page.write(run_of(tmp_path / "run")).read_text(encoding="utf-8")
  assert (
    "default-src 'none'" in content and "<script" not in content and "http" not in content.replace("http-equiv", "")
  )
  for element in Page(content).all("img"):
    assert element[1]["src"].startswith("data:image/")


def test_a_run_that_was_interrupted_has_a_page(tmp_path):
  folder = run_of(tmp_path / "run", steps=12, looks=(0, 10), results=None, export=False)
  with (folder / "metrics.jsonl").open("a") as file:
    file.write('{"step": 13, "lo')
  (folder / "samples" / "step_000010.png").write_bytes(b"half of it")
  said = text(shown(folder))
  assert "step 12 of 30, not finished" in said
  assert "From step 0 to 10 the mean reward of the validation prompts went from 5.000 to 15.00." in said
  assert "Step 0 " in said and "Step 10 " not in said


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
  folder = run_of(tmp_path / "run", steps=0, looks=(), results=None, export=False)
  page = shown(folder)
  assert "step 0 of 30, not finished" in text(page) and not page.all("img") and not page.all("svg")


def test_numbers_of_held_out_data_are_a_table(tmp_path):
  folder = run_of(tmp_path / "run", results={"validation_accuracy": 0.875, "validation_loss": 0.25})
  assert "validation_accuracy 0.875" in text(shown(folder)).replace("accuracy0", "accuracy 0")


def test_the_accuracy_of_a_preference_model_is_a_sentence(tmp_path):
  bins = {f"validation_accuracy_bin_{i:02d}": 0.95 - 0.05 * i for i in range(10)}
  results = {"validation_accuracy": 0.725, "validation_score_gap": 2.0} | bins
  said = text(shown(run_of(tmp_path / "run", results=results)))
  assert "It ranks 72.5% of the held-out pairs as they are labelled (chance: 50%): " in said
  assert ": 95.0% of those with the least noise, 50.0% of those with the most." in said and "went from" not in said
  assert run_page.in_words({"validation_accuracy": 0.725}, []).endswith("labelled (chance: 50%).")


def test_many_pictures_are_thinned_and_large_ones_made_smaller(tmp_path, monkeypatch):
  looks = tuple(range(0, 31))
  folder = run_of(tmp_path / "run", looks=looks)
  picture(folder / "samples" / "step_000000.png", size=(3200, 40))
  found, number = run_page.looks(folder, [])
  steps = [look.step for look in found]
  assert number == 31 and len(steps) == run_page.LOOKS and steps[0] == 0 and steps[-1] == 30
  assert (found[0].picture.width, found[0].picture.height) == (run_page.SIDE, 20)
  assert "12 of 31 pictures are here; all are in samples/." in text(shown(folder))
  monkeypatch.setattr(run_page, "MAX_BYTES", 3 * len(found[1].picture.uri))
  steps = [look.step for look in run_page.looks(folder, [])[0]]
  assert steps[0] == 0 and steps[-1] == 30 and len(steps) <= 3


def test_a_grid_may_have_more_pixels_than_pillow_opens(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  found, _ = run_page.looks(run_of(tmp_path / "run"), [])
  assert len(found) == 4 and Image.MAX_IMAGE_PIXELS == 100


def test_the_command_of_a_folder_with_spaces_is_quoted(tmp_path):
  assert run_page.command(tmp_path / "my run") == f"python -m jaxpref.show '{tmp_path / 'my run'}'"


def test_what_others_wrote_is_shown_as_text(tmp_path):
  folder = run_of(tmp_path / "run", results=RESULTS | {"in_words": HOSTILE}, judge=HOSTILE)
  run_page.note_command(folder, HOSTILE)
  page = shown(folder)
  assert not page.all("script") and text(page).count(HOSTILE) >= 3


def test_a_curve_has_shares_of_its_range_and_a_running_mean_where_there_are_many():
  rows = [{"step": 10 * i, "loss": float(i)} for i in range(1, 5)] + [{"step": 60, "other": 1.0}]
  found = run_page.curve("loss", rows)
  np.testing.assert_allclose(found.points, [(i / 3, i / 3) for i in range(4)])
  assert not found.smooth and (found.low, found.high, found.first_step, found.last_step, found.last) == (
    1,
    4,
    10,
    40,
    4,
  )
  assert run_page.curve("other", rows) is None
  flat = run_page.curve("loss", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}])
  np.testing.assert_array_equal(flat.points, [(0, 0.5), (1, 0.5)])
  long = run_page.curve("loss", [{"step": i, "loss": float(i % 2)} for i in range(2000)])
  assert len(long.points) == run_page.POINTS and np.ptp([y for _, y in long.smooth]) < 0.02


def test_only_changes_are_among_the_changed_fields():
  usual = json.loads(json.dumps(config_lib.typed(config_lib.default()).to_dict()))
  assert run_page.changed(usual) == {}
  usual["loss"]["beta"], usual["options"] = 3.0, {"margin": 0.1}
  assert run_page.changed(usual) == {"loss.beta": 3.0, "options.margin": 0.1}


def test_commands_are_kept_once_each(tmp_path):
  for command in ("a", "a", "b --x='1 2'", "a", ""):
    run_page.note_command(tmp_path, command)
  assert (tmp_path / "commands.txt").read_text().splitlines() == ["a", "b --x='1 2'", "a"]


def test_the_command_prints_the_page_or_one_sentence(tmp_path, capsys):
  folder = run_of(tmp_path / "run")
  show.main([str(folder)])
  assert capsys.readouterr().out == f"{folder / 'index.html'}\n"
  before = (folder / "index.html").read_bytes()
  show.main([str(folder)])
  assert (folder / "index.html").read_bytes() == before
  for name, content in (("none", None), ("other", "{}"), ("broken", "{")):
    (tmp_path / name).mkdir()
    if content is not None:
      (tmp_path / name / "config.json").write_text(content)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*(no work folder of a run|cannot be read)[^\n]*$"):
      show.main([str(tmp_path / name)])
