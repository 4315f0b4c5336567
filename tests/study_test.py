"""The study of methods: its ground, its plan, the rule of tuning, resuming, and the report, from made-up runs."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from jaxpref import config as config_lib
from jaxpref.data import emoji
from jaxpref.objectives import spo
from scripts.study import ground, instrument, study, study_plan, study_report, study_rows, study_variants
from scripts.study.study_variants import BY_NAME, Run

# Stands in for `python -m jaxpref.main` and for scripts/study/measure.py: writes what they leave behind.
FAKE = """
import json, pathlib, sys
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / "export").mkdir(parents=True, exist_ok=True)
root = folder.parents[1]
with open(root / "calls.txt", "a") as calls:
  calls.write(kind + ":" + folder.parent.name + "/" + folder.name + "\\n")
if kind == "train" and (root / "nan").exists():
  (folder / "export").rmdir()
  sys.exit("error: step 3: loss or gradient was not finite in 6 steps in a row")
if kind == "train" and (root / "broken").exists():
  (folder / "export").rmdir()
  sys.exit("error: no such folder")
made = root / (folder.parent.name + "_" + folder.name + ".json")
if kind == "measure":
  (folder / "part.json").write_text(made.read_text())
  (folder / "part.json").replace(folder / "row.json")  # whole or not there, as measure.py and read_run write
"""
DPO, SPO = BY_NAME["dpo"], BY_NAME["spo"]


def row(run, *, share=0.6, captions=0.0, win=0.7, **others):
  """The numbers of a run."""
  told = {
    "variant": run.variant.name,
    "seed": run.seed,
    "split": run.split,
    "fields": study_variants.changes(run.variant),
  }
  told |= {"learning_rate": run.learning_rate, "beta": run.beta, "share": share, "captions": captions}
  told |= {"win_rate": win, "base_share": 0.4, "error": 0.02, "gain": 0.5, "other_share": 0.0, "minutes": 2.0}
  return told | {"evaluations": 32_000.0, "updates": 125.0, "valid_pairs": 1.0} | others


def write(folder, run, **numbers):
  (folder / run.path).mkdir(parents=True, exist_ok=True)
  (folder / run.path / "row.json").write_text(json.dumps(row(run, **numbers)))


def tune(folder, variant, rates=((0.5, 0.0), (0.6, 0.0), (0.7, -0.1)), betas=((0.3, -0.2), (0.3, -0.2))):
  """Rows: (share, captions) of each try; by default the middle rate and the recipe's beta are chosen."""
  for part in (rates, betas):
    runs = study_plan.tuning_runs(variant, folder)
    for run, (share, captions) in zip(runs[len(runs) - len(part) :], part, strict=True):
      write(folder, run, share=share, captions=captions)


# ---- Ground -------------------------------------------------------------------------------------------------------


def test_splits_have_every_core_emoji_once():
  parts = {name: ground.split(name) for name in ground.SPLITS}
  assert [len(parts[n]) for n in ("test", "validation", "train")] == [256, 128, 637]
  ids = [e.id for part in parts.values() for e in part]
  assert sorted(ids) == sorted(e.id for e in emoji.load_index("core"))
  assert [e.caption for e in parts["test"][:2]] == ["t-shirt", parts["test"][1].caption]
  with pytest.raises(ValueError, match="no split of the study"):
    ground.split("all")


def test_no_picture_is_in_two_pairs_to_measure_on():
  numbers = ground.pair_numbers(3)
  assert numbers.shape == (24, 2) and sorted(numbers.ravel()) == list(range(48))
  rated = ground.rated_pairs(3)
  assert rated.shape == (360, 2) and len({tuple(pair) for pair in rated}) == 360
  assert all(i // 16 == j // 16 for i, j in [*numbers, *rated])


def test_raters_agree_as_often_as_they_say_and_differ_only_where_noise_turned_a_label():
  rng = np.random.default_rng(2)
  scores = {"style": rng.normal(size=(400, 16)) * 7, "legible": -rng.exponential(size=(400, 16))}
  for hidden in ground.HIDDEN:
    first, second = scores[hidden].reshape(-1)[ground.rated_pairs(400)].T
    said = {a: ground.rater(scores, hidden, a) == 1.0 for a in ground.AGREEMENTS}
    for agreement, label in said.items():
      assert abs(np.mean(label == (first > second)) - agreement / 100) < 0.01
    wrong = {a: label != (first > second) for a, label in said.items()}
    assert not wrong[100].any() and not (wrong[85] & ~wrong[70]).any() and not (wrong[70] & ~wrong[60]).any()


def test_hidden_scores_know_style_and_caption_of_tiles():
  emojis = ground.split("validation")[:8]
  ids = np.asarray([e.class_id for e in emojis])
  tiles = np.stack([emoji.load_tiles(style, 32)[ids] for style in ("openmoji", "twemoji")], axis=1)
  found = ground.hidden_scores(tiles, ids)
  assert all(v.shape == (8, 2) for v in found.values())
  assert (found["style"][:, 0] > found["style"][:, 1]).all() and found["style_share"].mean(axis=0).tolist() == [
    1.0,
    0.0,
  ]
  assert found["legible_share"].mean() > 0.9 and (found["legible"] <= 0).all()
  swapped = ground.hidden_scores(tiles, np.roll(ids, 1))
  assert swapped["legible_share"].mean() == 0.0 and (swapped["legible"] < found["legible"]).all()


def test_accuracy_by_time_counts_pairs_that_are_ranked_as_the_score_ranks_them(tmp_path):
  liked = np.zeros((128, 8, 2), np.float32)  # the second picture of six of eight pairs is outlined, in two both are
  liked[:, :, 1], liked[:, :2, 0] = 1.0, 1.0
  np.savez(tmp_path / "validation_scores.npz", style_share=liked.reshape(128, 16))
  scores = np.zeros((10, 128, 8, 2), np.float32)
  scores[:, :, 2:, 1] = 1.0
  scores[:, :, :2, 0] = 1.0  # which does not count
  scores[3, :32, :, :] = [1.0, 0.0]
  scores = scores.reshape(10, 128 * 8, 2)
  assert instrument.by_bin(scores, tmp_path, "style").tolist() == [1.0] * 3 + [0.75] + [1.0] * 6


def test_files_of_the_ground_are_whole_or_not_there(tmp_path, monkeypatch):
  """A process that ends while it writes leaves nothing that the next one takes for finished."""

  def killed(file, **arrays):
    pathlib.Path(file).write_bytes(b"half")
    raise KeyboardInterrupt

  monkeypatch.setattr(ground, "read_images", lambda *_: None)
  monkeypatch.setattr(ground, "hidden_scores", lambda *_: {"style": np.zeros(3)})
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(np, "savez", killed)
    ground.scores(tmp_path, "validation")
  assert ground.scores(tmp_path, "validation")["style"].tolist() == [0, 0, 0]
  ground.save(tmp_path / "one.npy", np.arange(3))
  assert np.load(tmp_path / "one.npy").tolist() == [0, 1, 2] and not list(tmp_path.glob("one.part*"))


def test_the_study_waits_for_all_labels(tmp_path, capsys):
  for hidden in ground.HIDDEN:
    for agreement in ground.AGREEMENTS:
      assert ground.missing_labels(tmp_path) == ground.labels_file(tmp_path, hidden, agreement)
      with pytest.raises(SystemExit):
        study.main(["--runs", str(tmp_path / "runs"), "--only", "A dpo$"])
      ground.labels_file(tmp_path, hidden, agreement).parent.mkdir(exist_ok=True)
      ground.labels_file(tmp_path, hidden, agreement).touch()
  assert ground.missing_labels(tmp_path) is None and "style_60.jsonl; make it by" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["accuracy"], "is for accuracy, which needs it"),
    (["report", "style_a=x"], "is for accuracy, which needs it"),
    (["accuracy", "style_a"], "style_a: expected NAME=FOLDER"),
    (["accuracy", "mine=tiny-spm"], "mine=tiny-spm: expected NAME=FOLDER, whose NAME is style_... or legible_..."),
    (["accuracy", "style_../a=tiny-spm"], "expected NAME=FOLDER"),
    (["accuracy", "style_a=nowhere"], "nowhere/config.json is missing"),
  ],
)
def test_models_to_measure_are_checked_before_any_is_asked(tmp_path, capsys, arguments, sentence):
  with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
    instrument.main([*arguments, f"--ground={tmp_path}", f"--docs={tmp_path}"])
  assert sentence in str(error.value) + capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["25:99", "soon"])
def test_a_time_to_stop_at_has_hours_and_minutes(tmp_path, capsys, given):
  with pytest.raises(SystemExit):
    study.main(["--until", given, "--runs", str(tmp_path)])
  assert f"--until={given}: " in capsys.readouterr().err


def test_times_of_validation_pairs_fall_into_ten_ranges():
  times = instrument.drawn_times("validation", 50)
  assert times.shape == (10, 50) and (times // 100 == np.arange(10)[:, None]).all()
  train = instrument.drawn_times("train", 5000)
  assert train.shape == (2, 5000) and train.min() >= 0 and 990 < train.max() < 1000


# ---- Plan ---------------------------------------------------------------------------------------------------------


def value(config, name):
  for key in name.split("."):
    config = config[key]
  return config


def test_every_variant_is_a_config(tmp_path):
  names = [v.name for v in study_variants.VARIANTS]
  assert len(set(names)) == len(names) and {v.part for v in study_variants.VARIANTS} == set(study_variants.PARTS)
  known = config_lib.names()
  for variant in study_variants.VARIANTS:
    run = Run(variant, 1e-5, 50.0, 0, "test")
    fields = run.fields(tmp_path)
    assert set(fields) <= set(known)
    config = importlib.import_module(f"configs.{variant.recipe}").get_config()
    config.update_from_flattened_dict(fields)
    config_lib.check(config)
    recipe = importlib.import_module(f"configs.{variant.recipe}").get_config()
    changed = {n for n in known if value(config, n) != value(recipe, n)}
    assert set(variant.overrides) - {"reference.delta", "reference.tau"} <= changed  # none says what holds anyway
    assert set(variant.against) <= set(names)
    assert not variant.tuned_as or not BY_NAME[variant.tuned_as].tuned_as
    assert study_plan.tuned(variant).hidden == variant.hidden


def test_methods_cost_the_same():
  """As many UNet evaluations, but for those that are shorter or larger on purpose, and for pairs that are not valid."""
  count = lambda name, valid=1.0: study_variants.evaluations(study_variants.load_config(BY_NAME[name]), valid)
  assert count("dpo") == 125 * 32 * 8 and count("sft") == 167 * 32 * 6
  assert count("spo") == 25 * 8 * 2 * (47 + 44) and count("spo", 0.75) == 25 * 8 * 2 * (47 + 33)
  for other in (count("sft"), count("spo", 0.75)):
    assert abs(other / count("dpo") - 1) < 0.01
  assert count("lpo") == 30 * 8 * 2 * (20 + 40)
  # A move of the reference: two passes of 8 samples.
  assert count("moving_tau16") == 125 * 32 * 8 + 7 * 16
  assert count("spo_moving") == count("spo") + 5 * 16


def test_evaluations_of_other_recipes():
  sdxl = importlib.import_module("configs.spo_sdxl").get_config()  # groups of four steps: 4 shared starts, 12 not
  s = sdxl.spo
  calls = spo.pool_calls(num_steps=s.num_inference_steps, warmup_steps=s.warmup_steps, pool_size=s.pool_size)
  assert study_variants.evaluations(sdxl, 0.0) == sdxl.num_steps * sdxl.batch_size * 2 * calls
  assert study_variants.evaluations(sdxl) == sdxl.num_steps * sdxl.batch_size * 2 * (calls + 4 * (4 + 2 * 12))
  # 24 samples of 20 guided steps; of the policy a forward and (twice) a backward pass of each step.
  grpo = importlib.import_module("configs.grpo_tiny").get_config()
  assert study_variants.evaluations(grpo) == 40 * 24 * 20 * 2 * (1 + 3)
  grpo.grpo.update(timestep_fraction=0.6, kl_coef=0.04)
  assert study_variants.evaluations(grpo) == 40 * 24 * 2 * (20 + 12 * 4)
  kto = importlib.import_module("configs.kto_tiny").get_config()
  assert study_variants.evaluations(kto) == kto.num_steps * kto.batch_size * (1 + 1 + 2)


def test_commands_are_those_of_the_trainer():
  folder = pathlib.Path("runs")
  run = Run(BY_NAME["ungated_tau16"], 4e-5, 500.0, 3, "test")
  command = run.command(folder)
  assert command[1:4] == ["-m", "jaxpref.main", "--config=configs/dpo_tiny.py"]
  assert command[-1] == "--workdir=runs/ungated_tau16/test_4e-05_500_seed3"
  assert {"--config.seed=3", "--config.reference.tau=16", "--config.optimizer.learning_rate=4e-05"} <= set(command)
  assert "--config.data.path=runs/ground/train/style_70.jsonl" in command
  online = Run(BY_NAME["spo_60"], 2e-5, 10.0, 0, "test").command(folder)
  assert "--config.preference_model=runs/models/style_60_step_aware/export" in online
  assert "--config.data.path=runs/ground/train.txt" in online
  kinds = {v.name: study_variants.model_of(v) for v in study_variants.VARIANTS}
  assert kinds["dpo"] is None and kinds["lpo"].name == "style_70_latent" and kinds["spo_clean"].kind == "clean"
  of_clean = kinds["spo_clean"].command(folder)
  assert "--config=configs/spm_tiny.py" in of_clean and "--config.spm.step_aware=False" in of_clean
  assert "--config.data.path=runs/ground/train/style_70.jsonl" in of_clean


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_commands_set_the_fields_as_they_are_meant(name, monkeypatch):
  run, folder = Run(BY_NAME[name], 1e-5, 50.0, 3, "test"), pathlib.Path("runs")
  monkeypatch.setattr(sys, "argv", run.command(folder)[2:-1])  # where fields are looked for
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  values(sys.argv)
  fields = run.fields(folder)
  assert {field: value(values.config, field) for field in fields} == fields


# ---- Tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "rows, factor",
  [
    (((0.5, 0.0), (0.6, -0.01), (0.7, -0.06)), 2.0),  # the highest falls too far
    (((0.5, 0.0), (0.6, -0.01), (0.7, -0.05)), 4.0),  # 5 points are allowed
    (((0.6, 0.0), (0.6, 0.01), (0.6, 0.0)), 1.0),  # of equal ones the smallest
    (((0.5, -0.07), (0.6, -0.06), (0.7, -0.08)), 2.0),  # none is allowed: the one that falls least
  ],
)
def test_learning_rate_is_chosen_by_the_rule(tmp_path, rows, factor):
  assert study_plan.test_runs(DPO, tmp_path) == []
  tune(tmp_path, DPO, rows)
  for name in ("dpo", "dpo_half"):
    tests = study_plan.test_runs(BY_NAME[name], tmp_path)
    assert {(r.learning_rate, r.beta, r.split) for r in tests} == {(factor * 2e-5, 500.0, "test")}
    assert [r.seed for r in tests] == list(range(BY_NAME[name].seeds))


def test_legible_pictures_may_change_captions():
  rows = [{"learning_rate": 1.0, "share": 0.5, "captions": 0.0}, {"learning_rate": 2.0, "share": 0.6, "captions": -0.2}]
  assert study_plan.choose(rows, "style") == rows[0] and study_plan.choose(rows, "legible") == rows[1]
  assert study_plan.choose([{"failed": "NaN"}, rows[0]], "style") == rows[0]
  assert study_plan.choose([{"failed": "NaN"}], "style") is None


@pytest.mark.parametrize(
  ("betas", "chosen"),
  [(((0.5, 0.0), (0.7, 0.0)), 5000.0), (((0.7, 0.0), (0.5, 0.0)), 50.0), (((0.6, 0.0),) * 2, 500.0)],
)
def test_beta_is_chosen_at_the_best_learning_rate(tmp_path, betas, chosen):
  rates = study_plan.tuning_runs(DPO, tmp_path)
  assert [r.learning_rate for r in rates] == pytest.approx([2e-5, 4e-5, 8e-5])
  tune(tmp_path, DPO, betas=betas)
  tried = study_plan.tuning_runs(DPO, tmp_path)[3:]
  assert [(r.learning_rate, r.beta) for r in tried] == [(4e-5, 50.0), (4e-5, 5000.0)]
  assert {r.beta for r in study_plan.test_runs(DPO, tmp_path)} == {chosen}
  recipe = study_plan.test_runs(BY_NAME["moving_tau16"], tmp_path)
  assert {(r.learning_rate, r.beta) for r in recipe} == {(4e-5, 500.0)}


def test_fine_tuning_has_five_learning_rates(tmp_path):
  sft = BY_NAME["sft"]
  runs = study_plan.tuning_runs(sft, tmp_path)
  assert [r.learning_rate for r in runs] == pytest.approx([1e-5, 2e-5, 4e-5, 8e-5, 16e-5])
  for run in runs:
    write(tmp_path, run, share=0.5 + run.learning_rate)
  assert study_plan.test_runs(sft, tmp_path)[0].learning_rate == pytest.approx(16e-5)


# ---- Runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Commands that leave made-up numbers behind, and the calls so far."""

  def train(run, folder):
    made = folder / (run.path.replace("/", "_") + ".json")
    made.write_text(json.dumps(row(run, share=0.5 + 0.01 * run.seed)))
    return [sys.executable, "-S", "-c", FAKE, str(folder / run.path), "train"]

  own = lambda model, folder: [sys.executable, "-S", "-c", FAKE, str(folder / "models" / model.name), "train"]
  monkeypatch.setattr(study_variants.Run, "command", train)
  monkeypatch.setattr(study_variants.PreferenceModel, "command", own)
  monkeypatch.setattr(
    study_variants, "measure_command", lambda place, split: [sys.executable, "-S", "-c", FAKE, str(place), "measure"]
  )
  monkeypatch.setattr(study, "measure_base", lambda *_: None)
  while labels := ground.missing_labels(tmp_path / "ground"):
    labels.parent.mkdir(parents=True, exist_ok=True)
    labels.touch()
  return lambda: (tmp_path / "calls.txt").read_text().split()


def test_runs_are_made_once_and_in_order(tmp_path, fake):
  study_of = f"--runs {tmp_path} --docs {tmp_path / 'docs'} --workers 1 --only".split() + ["A sft"]
  study.main([*study_of, "--until", "00:00"])
  assert not (tmp_path / "calls.txt").exists()
  study.main(study_of)
  runs = [f"sft/validation_{r}_500_seed100" for r in ("1e-05", "2e-05", "4e-05", "8e-05", "0.00016")]
  runs += [f"sft/test_1e-05_500_seed{s}" for s in range(8)]
  expected = [f"{kind}:{run}" for run in runs for kind in ("train", "measure")]
  assert fake() == expected
  assert not (tmp_path / runs[-1] / "export").exists()  # ten times the size of the rest
  (tmp_path / runs[-1] / "row.json").unlink()  # as if it had been interrupted
  study.main(study_of)
  assert fake() == [*expected, *expected[-2:]]
  assert [r["seed"] for r in json.loads((tmp_path / "docs" / "papers.json").read_text())["runs"]["sft"]] == [*range(8)]


def test_two_runs_at_a_time_make_the_same_runs_once_each(tmp_path, fake, monkeypatch):
  """And wait for what tuning chooses."""
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
  pinned = []
  monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
  variants = [DPO, BY_NAME["dpo_half"]]
  study.train_all(variants, tmp_path, workers=2)
  calls = fake()
  assert sorted(calls) == sorted(set(calls)) and len(calls) == 2 * (5 + 8 + 4)
  assert not list(study_plan.remaining(variants, tmp_path))
  assert {0} in pinned and {1} in pinned and len(pinned) == len(calls)


def test_a_preference_model_is_trained_once_for_all_that_learn_from_it(tmp_path, fake):
  for seed in (0, 1):
    study.train(Run(BY_NAME["spo_winner"], 2e-5, 10.0, seed, "test"), tmp_path, float("inf"))
  names = [call for call in fake() if call.startswith("train")]
  runs = [f"train:spo_winner/test_2e-05_10_seed{seed}" for seed in (0, 1)]
  assert names == ["train:models/style_70_step_aware", *runs]


def test_nan_is_a_result_and_other_errors_stop_the_study(tmp_path, fake):
  run = Run(BY_NAME["sft"], 1e-5, 500.0, 0, "test")
  (tmp_path / "broken").touch()
  with pytest.raises(RuntimeError, match=r"sft/test_1e-05_500_seed0 ended with status 1 .* no such folder"):
    study.train(run, tmp_path, float("inf"))
  assert study_rows.read_run(run, tmp_path) is None
  (tmp_path / "nan").touch()
  study.train(run, tmp_path, float("inf"))
  assert "not finite" in study_rows.read_run(run, tmp_path)["failed"]


def test_a_run_in_time_is_stopped(tmp_path, monkeypatch):
  sleeping = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
  monkeypatch.setattr(study_variants.Run, "command", lambda *_: sleeping)
  with pytest.raises(TimeoutError, match="was not ready in time"):
    study.train(Run(BY_NAME["sft"], 1e-5, 500.0, 0, "test"), tmp_path, 0.0)


@pytest.mark.slow
def test_sigterm_ends_the_runs_and_then_the_study(tmp_path):
  """Both that are going on, with a report of what there is."""
  run = [sys.executable, "-S", "-c", "import time; print('begun', flush=True); time.sleep(60)"]
  while labels := ground.missing_labels(tmp_path / "ground"):
    labels.parent.mkdir(parents=True, exist_ok=True)
    labels.touch()
  program = f"from scripts.study import study, study_variants; study_variants.Run.command = lambda *_: {run!r};"
  program += "study.measure_base = lambda *_: None;"
  program += f"study.main('--only sft --workers 2 --runs {tmp_path} --docs {tmp_path}'.split())"
  process = subprocess.Popen(
    [sys.executable, "-c", program], cwd=study_variants.ROOT, stderr=subprocess.PIPE, text=True
  )
  begun = lambda: [log for log in tmp_path.glob("sft/*.log") if "begun" in log.read_text()]
  deadline = time.monotonic() + 50
  while len(begun()) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
  process.terminate()
  _, said = process.communicate(timeout=50)
  assert process.returncode == 0 and said.count("was stopped; it resumes with the next call") == 2
  assert len(list(tmp_path.glob("sft/*.log"))) == 2 and (tmp_path / "papers.md").is_file()


def scores(share, *, prompts=4, pictures=2):
  """Of a model that draws a share of its pictures in the preferred style."""
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(prompts, pictures)).astype(np.float32)
  liked = np.arange(prompts * pictures).reshape(prompts, pictures) < share * prompts * pictures
  ones = np.ones((prompts, pictures), np.float32)
  found = {"style": noise + 10 * liked, "style_share": liked.astype(np.float32), "legible": noise, "correct": ones}
  return found | {"legible_share": 0.5 * ones}


def run_folder(folder, run, *, metrics, share=0.5):
  """What training and measure.py leave behind."""
  place = folder / run.path
  place.mkdir(parents=True)
  config = config_lib.to_dict(study_variants.load_config(run.variant))
  for name, given in run.fields(folder).items():
    *parents, last = name.split(".")
    node = config
    for parent in parents:
      node = node[parent]
    node[last] = given
  (place / "config.json").write_text(json.dumps(config))
  (place / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics) + '{"step": 3')
  ground.save(place / f"{run.split}.npz", scores(share))
  study_rows.base_folder(folder).mkdir(exist_ok=True)
  ground.save(study_rows.base_folder(folder) / f"{run.split}.npz", scores(0.25))


def test_numbers_of_a_run(tmp_path):
  dpo = Run(DPO, 2e-5, 500.0, 0, "test")
  of_step = {"images_per_second": 32.0, "margin_bin_0": 2.0}
  run_folder(
    tmp_path, dpo, metrics=[{"step": 1, "images_per_second": 0.1, "margin_bin_0": 9.0}, {"step": 20, **of_step}]
  )
  found = study_rows.read_run(dpo, tmp_path)
  assert found["minutes"] == pytest.approx(125 * 64 / 32 / 60)  # without the first step, which was slow
  assert (found["updates"], found["evaluations"], found["margin_bin_0"]) == (125, 125 * 32 * 8, 2.0)
  assert (found["share"], found["base_share"], found["captions"], found["other_share"]) == (0.5, 0.25, 0.0, 0.0)
  # Two of eight pictures became outlined; the other six are the base model's.
  assert found["win_rate"] == pytest.approx((2 + 0.5 * 6) / 8) and found["gain"] == pytest.approx(10 * 2 / 8)
  assert found["error"] == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)
  assert "last_d" not in found and study_rows.read_run(dpo, tmp_path) == found  # from row.json
  spo_run = Run(SPO, 2e-5, 10.0, 0, "test")
  online = [{"step": s, "images_per_second": 32.0, "valid_pairs": 0.5, "updates": 4.0} for s in (1, 2)]
  run_folder(tmp_path, spo_run, metrics=online)
  found = study_rows.read_run(spo_run, tmp_path)
  assert found["minutes"] == pytest.approx(25 * 8 / 32 / 60)
  assert (found["updates"], found["evaluations"]) == (100, 25 * 8 * 2 * (47 + 22))
  gated = Run(BY_NAME["moving_tau16"], 2e-5, 500.0, 0, "test")
  moves = [(1, 0.0, 0), (16, 0.002, 1), (32, 0.009, 1), (48, 0.004, 2), (64, 0.006, 2)]
  rows = [{"step": s, "divergence": d, "reference_updates": n, "images_per_second": 1.0} for s, d, n in moves]
  run_folder(tmp_path, gated, metrics=rows)
  found = study_rows.read_run(gated, tmp_path)
  assert (found["last_d"], found["largest_d"], found["accepted_d"], found["moves"]) == (0.006, 0.009, 0.004, 2)
  often = Run(BY_NAME["ema_tau4"], 2e-5, 500.0, 0, "test")
  moves = [(1, 0.0, 0), (10, 0.009, 1), (20, 0.003, 4)]  # of two proposals the second was refused; then three were made
  rows = [{"step": s, "divergence": d, "reference_updates": n, "images_per_second": 1.0} for s, d, n in moves]
  run_folder(tmp_path, often, metrics=rows)
  assert study_rows.read_run(often, tmp_path)["accepted_d"] == 0.003


def test_a_variant_whose_values_are_those_of_another_takes_its_runs(tmp_path):
  same = BY_NAME["dpo_beta500"]
  tune(tmp_path, DPO)  # which chooses the recipe's beta
  write(tmp_path, study_plan.test_runs(DPO, tmp_path)[0], share=0.7)
  first, second = study_plan.test_runs(same, tmp_path)[:2]
  found = study_rows.read_run(first, tmp_path)
  assert (found["variant"], found["share"]) == ("dpo_beta500", 0.7) and study_rows.read_run(second, tmp_path) is None
  assert [run.seed for run in study_plan.remaining([same], tmp_path)] == [1, 2, 3]
  other = dataclasses.replace(first, beta=50.0)
  assert study_rows.read_run(other, tmp_path) is None


def test_a_folder_of_another_config_is_refused(tmp_path):
  run = Run(DPO, 2e-5, 500.0, 0, "test")
  run_folder(tmp_path, run, metrics=[{"step": 1, "images_per_second": 1.0}])
  config = json.loads((tmp_path / run.path / "config.json").read_text())
  config["sample"]["every"] = 200
  (tmp_path / run.path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"made with config\.sample\.every=200, expected 0"):
    study_rows.read_run(run, tmp_path)


def test_a_failed_run_of_another_config_is_refused(tmp_path):
  run = Run(DPO, 2e-5, 500.0, 0, "test")
  run_folder(tmp_path, run, metrics=[])
  (tmp_path / run.path / "failed.txt").write_text("not finite\n")
  assert study_rows.read_run(run, tmp_path)["failed"] == "not finite"
  config = json.loads((tmp_path / run.path / "config.json").read_text())
  config["num_steps"] = 7
  (tmp_path / run.path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"made with config\.num_steps=7, expected 125"):
    study_rows.read_run(run, tmp_path)


# ---- Report -------------------------------------------------------------------------------------------------------


def test_differences_are_of_the_same_seeds():
  rows = lambda shares: [
    {"seed": s, "share": x, "captions": 0.0, "win_rate": 0.5 + x / 2, "other_share": 0.0} for s, x in enumerate(shares)
  ]
  found = study_report.compare(rows([0.6, 0.7, 0.8]), rows([0.5, 0.5, 0.5, 0.9]))
  share = found["share"]
  assert share["values"] == pytest.approx([0.1, 0.2, 0.3]) and share["mean"] == pytest.approx(0.2)
  assert share["interval"] == pytest.approx([0.2 - 4.303 * 0.1 / 3**0.5, 0.2 + 4.303 * 0.1 / 3**0.5], abs=1e-4)
  assert share["p"] == pytest.approx(0.0742, abs=1e-3)  # t = 3.464 with 2 degrees of freedom
  assert found["win_rate"]["mean"] == pytest.approx(0.1)
  assert "interval" not in study_report.compare(rows([0.5] * 2), rows([0.4] * 2))["share"]
  assert study_report.compare(rows([0.5]), [{"seed": 0, "failed": "NaN"}]) is None
  assert study_report.compare(rows([0.5]), []) is None


def test_growth_is_the_difference_of_differences():
  of = lambda x: [
    {"seed": s, "share": x + 0.01 * s, "captions": 0.0, "win_rate": 0.5, "other_share": 0.0} for s in (0, 1)
  ]
  runs = {"spo_60": of(0.6), "dpo_60": of(0.5), "spo_100": of(0.9), "dpo_100": of(0.88)}
  assert study_report.growth(runs)["share"]["values"] == pytest.approx([0.08, 0.08])
  assert study_report.growth(runs | {"dpo_100": []}) is None


def test_power_is_what_the_page_of_questions_says():
  page = (study_variants.ROOT / "docs" / "results" / "papers_questions.md").read_text()
  assert "1.15 s (n = 8) or 2.1 s (n = 4)" in " ".join(page.split())
  assert study_report.power(1.0, 8) == pytest.approx(1.15, abs=0.01)
  assert study_report.power(1.0, 4) == pytest.approx(2.1, abs=0.05)
  for v in study_variants.VARIANTS:
    assert f"`{v.name}`" in page or f"`{v.name.removeprefix('moving')}`" in page or v.name.startswith(("dpo_", "spo_"))


def report(folder):
  study.main(["--report", "--runs", str(folder), "--docs", str(folder / "docs")])
  return (folder / "docs" / "papers.md").read_text()


def test_report_of_nothing_names_all_that_is_missing(tmp_path):
  text = report(tmp_path)
  assert all(f"- {v.name}: not tuned yet\n" in text for v in study_variants.VARIANTS) and "## A" not in text
  assert not re.search(r"[{}]|None|nan", text)


def test_report_says_what_the_numbers_say(tmp_path):
  shares = {"dpo": 0.6, "spo": 0.5, "sft": 0.55}
  for name, share in shares.items():
    variant = BY_NAME[name]
    if name == "sft":
      for run in study_plan.tuning_runs(variant, tmp_path):
        write(tmp_path, run)
    else:
      tune(tmp_path, variant)
    for run in study_plan.test_runs(variant, tmp_path)[:3]:
      write(tmp_path, run, share=share + 0.01 * run.seed * (1 + (name == "spo")))
  text = report(tmp_path)
  assert not re.search(r"[{}]|None|nan", text)
  assert "| dpo | style 70 % | 3 | 61.0% (60.0% to 62.0%) | 1.0 | +0.0% | 70.0% | 125 | 32,000 | 2.0 |" in text
  assert "| **spo** | dpo | 3 | -9.0 [-11.5, -6.5] | 3.1 | 0.0041 |  | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] |" in text
  assert "is 40.0% (style)." in text and "| sft | dpo_tiny | `loss.name=sft`; `num_steps=167` |" in text
  # dpo_beta500 has the runs of dpo, so a difference says nothing.
  assert "| dpo_beta500 | style 70 % | 3 | 61.0%" in text and "| dpo_beta500 | dpo |" not in text
  assert re.search(r"\| spo \| sft \| 3 \| -4\.0 \[-6\.5, -1\.5\] \| 3\.1 \| 0\.02 \| 0\.02 \|", text)
  assert "**4e-05, 500: 60.0% (+0.0)**" in text and "8e-05, 500: 70.0% (-10.0)" in text
  missing = text.partition("## Missing")[2]
  assert "- dpo: 5 runs\n" in missing and "- dpo_legible: not tuned yet\n" in missing and "lpo: not tuned" in missing
  assert {p.name for p in (tmp_path / "docs").iterdir()} == {"papers.md", "papers.json", "papers_frontier.png"}


def test_findings_take_their_numbers_from_the_runs():
  of = lambda shares: [
    {"seed": s, "share": x, "captions": x - 0.7, "win_rate": 0.5, "other_share": 0.0, "evaluations": 24_141.2}
    | {"minutes": 1.5}
    for s, x in enumerate(shares)
  ]
  study = {"runs": {"spo": of([0.70, 0.72, 0.74]), "dpo": of([0.6, 0.6, 0.6]), "sft": [], "lpo": of([0.5])}}
  fill = lambda text: study_report.findings(study, text).removesuffix("\n")
  assert fill("{share spo}, {captions spo}, {seeds spo}, {evaluations dpo}") == "72.0 %, +2.0 points, 3, 24,100"
  assert fill("{deviation spo}") == "2.0 points" and fill("{minutes dpo}") == "1.5"
  assert fill("{spo - dpo}") == fill("{captions spo - dpo}") == "+12.0 points [+7.0, +17.0]"
  assert fill("{lpo - spo}") == "-20.0 points" and fill("a {brace") == "a {brace"
  with pytest.raises(ValueError, match=r"\{spo - sft\} .* no run of sft"):
    fill("{spo - sft}")
  with pytest.raises(ValueError, match=r"sharee is unknown; expected one of share, "):
    fill("{sharee spo}")
  with pytest.raises(ValueError, match=r"no run of grpo"):
    fill("{share grpo}")
  study["runs"]["sft"] = [{f"margin_bin_{i:02}": 1.0 + (i == 3) for i in range(10)}]
  study["comparisons"] = [{"variant": "spo", "against": "lpo", "share": {"p_holm": 0.0123}}]
  assert fill("{largest sft}, {p_holm spo - lpo}") == "18 %, 0.012"
  measured = {"models": {"a": {"mean": 0.902}}, "ceiling": {"style": {"mean": 0.9}}}
  assert study_report.findings(study, "{accuracy a}, {ceiling style}", measured) == "90.2 %, 90.0 %\n"
  with pytest.raises(ValueError, match=r"\{accuracy b\} .* has no b in its models"):
    study_report.findings(study, "{accuracy b}", measured)
  with pytest.raises(ValueError, match=r"\{largest spo\} .* no margins"):
    fill("{largest spo}")
  with pytest.raises(ValueError, match=r"\{p_holm lpo - spo\} .* does not compare them"):
    fill("{p_holm lpo - spo}")
  with pytest.raises(ValueError, match=r"\{growth\} .* share no seed"):
    study_report.findings({"runs": {n: [] for n in ("spo_60", "dpo_60", "spo_100", "dpo_100")}}, "{growth}")


def test_the_page_of_findings_is_what_the_tables_say():
  results = study_variants.ROOT / "docs" / "results"
  study = json.loads((results / "papers.json").read_text())
  template = (study_variants.ROOT / study_report.FINDINGS).read_text()
  measured = json.loads((results / "papers_instrument.json").read_text())
  assert (results / "findings.md").read_text() == study_report.findings(study, template, measured)


def test_findings_are_broken_into_lines():
  long = "word " * 40
  table = f"| {long} |\n|---|\n| b |"
  found = study_report.findings(
    {"runs": {}}, f"# A\n\n{long}\n\n1. {long}\n2. b\n   c\n\n- d\n- {long}\n\n{table}\n\nend\n"
  )
  assert "\n2. b c\n- d\n- word" in found and "word\n  word" in found and f"\n\n{table}\n\nend\n" in found
  found = found.replace(table + "\n\n", "")
  lines = found.splitlines()
  assert max(map(len, lines)) <= 118
  assert found.startswith("# A\n\nword word") and found.endswith("word\n\nend\n") and "\n   word" in found


def test_margins_are_means_over_seeds_by_time():
  rows = [{f"margin_bin_{i:02}": i + 10.0 * seed for i in range(10)} for seed in (0, 1)]
  assert study_report.margins(rows).tolist() == [i + 5.0 for i in range(10)]
  del rows[0]["margin_bin_03"]  # a run that drew no such time
  assert study_report.margins(rows)[3] == 13.0
  assert study_report.margins([]) is None and study_report.margins([{"share": 0.5}]) is None


def test_divergences_are_of_variants_that_move(tmp_path):
  moving = BY_NAME["moving"]
  tune(tmp_path, moving)
  for run, largest in zip(study_plan.test_runs(moving, tmp_path)[:2], (0.004, 0.02), strict=True):
    write(tmp_path, run, moves=3.0, last_d=0.003, largest_d=largest, accepted_d=0.002)
  write(tmp_path, study_plan.test_runs(BY_NAME["moving_160"], tmp_path)[0], moves=2.0, last_d=0.003, largest_d=0.1)
  text = report(tmp_path)
  assert text.index("| moving | 3 | 0.0030") < text.index("## F.") < text.index("| moving_160 | 2 | 0.0030")
  assert "| moving | 3 | 0.0030 | 0.0120 (0.0040 to 0.0200) | 0.0020 |" in text and "| dpo | 3 |" not in text


def test_deviations_are_compared_with_spo_by_an_f_test():
  runs = {n: [] for n in ("spo_60", "spo_85", "spo_100")}
  runs["spo"] = [{"share": x} for x in (0.0, 1.0, 2.0)]  # restored from a report that did not have the other number
  runs["spo_before"] = [{"share": x, "share_64": 2 * x} for x in (0.0, 7.0, 14.0)]
  (_, own, _, none, _), (name, before, seeds, p, few) = study_report.deviations(runs)
  assert (own, none, name, before, seeds, few) == (1.0, None, "spo_before", 7.0, 3, 14.0)
  assert p == pytest.approx(2 / 50)  # the survival of F(2, 2) at x is 1 / (1 + x), here at 49


def test_the_ceiling_is_the_better_size_at_its_best_epoch(tmp_path):
  best = lambda mean, epoch: {"epoch": epoch, "bins": [mean] * 10}
  for width, style, legible in ((0, 0.9, 0.8), (2, 0.8, 0.9)):
    found = {"width": width, "history": [{}] * 5, "best": {"style": best(style, 2), "legible": best(legible, 3)}}
    (tmp_path / f"ceiling_{width}.json").write_text(json.dumps(found))
  (tmp_path / "accuracy").mkdir()
  (tmp_path / "accuracy" / "style_70_latent.json").write_text(json.dumps({"mean": 0.85, "bins": [0.85] * 10}))
  (tmp_path / "docs").mkdir()
  instrument.main(["report", f"--ground={tmp_path}", f"--docs={tmp_path / 'docs'}"])
  found = json.loads((tmp_path / "docs" / "papers_instrument.json").read_text())
  of = found["ceiling"]
  assert (of["style"]["width"], of["style"]["epoch"], of["legible"]["width"], of["legible"]["epoch"]) == (0, 2, 2, 3)
  assert of["style"]["mean"] == pytest.approx(0.9) and of["legible"]["epochs"] == 5
  study = study_report.collect(tmp_path)
  assert re.search(r"\| style_70_latent \| 85\.0 (\| 85\.0 ){10}\| 5\.0 \|", study_report.markdown(study, found))


def test_a_report_is_gone_on_from(tmp_path):
  runs, other = tmp_path / "runs", tmp_path / "other"
  tune(runs, DPO)
  write(runs, study_plan.test_runs(DPO, runs)[0], share=0.7)
  study.main(["--report", "--runs", str(runs), "--docs", str(tmp_path / "docs")])
  file = tmp_path / "docs" / "papers.json"
  assert study_rows.restore(file, other) == 7  # five of tuning, one run, and dpo_beta500 has the same one
  assert study_rows.restore(file, other) == 0
  assert study_plan.test_runs(DPO, other) == study_plan.test_runs(DPO, runs)
  first = study_plan.test_runs(DPO, runs)[0]
  assert study_rows.read_run(first, other) == study_rows.read_run(first, runs)
  assert [run.seed for run in study_plan.remaining([DPO], other)] == list(range(1, 8))
  changed = json.loads(file.read_text())
  changed["runs"]["dpo"][0]["fields"]["num_steps"] = 7
  file.write_text(json.dumps(changed))
  with pytest.raises(ValueError, match="with other fields than it has now"):
    study_rows.restore(file, tmp_path / "third")
  assert not (tmp_path / "third").exists()
  del changed["runs"]["dpo"][0]["fields"]
  file.write_text(json.dumps(changed))
  with pytest.raises(ValueError, match=r"'fields'.*expected a papers\.json"):
    study_rows.restore(file, tmp_path / "third")
  file.write_text("{}")
  with pytest.raises(ValueError, match=r"expected a papers\.json"):
    study_rows.restore(file, tmp_path / "third")


def test_the_plan_counts_what_is_left(tmp_path, capsys):
  study.main(["--list", "--only", "A dpo$", "--runs", str(tmp_path)])
  assert re.search(r"A dpo +13 runs left", capsys.readouterr().out)
  tune(tmp_path, DPO)
  study.main(["--list", "--only", "A dpo$", "--runs", str(tmp_path)])
  assert re.search(r"A dpo +8 runs left", capsys.readouterr().out)
