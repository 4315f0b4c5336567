"""The study of methods: its plan, the rule of tuning, resuming, and the report, from made-up runs."""

import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from absl import flags
from ml_collections import config_flags

from jaxpref import config as config_lib
from jaxpref.objectives import spo
from scripts.study import study, study_plan, study_report

# Stands in for `python -m jaxpref.main`: writes what a run leaves behind, from its own command line.
FAKE = """
import json, pathlib, sys
fields = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(fields["workdir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parents[1] / "calls.txt", "a") as calls:
  calls.write(folder.parent.name + "/" + folder.name + "\\n")
if (folder.parents[1] / "nan").exists():
  sys.exit("error: step 3: loss or gradient was not finite in 6 steps in a row")
if (folder.parents[1] / "broken").exists():
  sys.exit("error: no such folder")
made = json.loads((folder.parents[1] / "made.json").read_text())
for name in sorted(made, key="results.json".__eq__):  # last and whole, as a run's are: others read it meanwhile
  (folder / (name + ".new")).write_text(made[name])
  (folder / (name + ".new")).replace(folder / name)
"""


def files(run, *, share=0.6, fall=0.0, win=0.7, divergences=()):
  """What a run leaves behind, by file name; the divergences are (step, D, moves so far)."""
  made = config_lib.to_dict(study_plan.load_config(run.variant))
  for name, value in run.fields().items():
    *parents, last = name.split(".")
    node = made
    for parent in parents:
      node = node[parent]
    node[last] = value
  one = lambda share, accuracy: {"preferred_share": {"mean": share}, "caption_accuracy": {"mean": accuracy}}
  results = {"aligned": one(share, 0.8 - fall), "base": one(0.4, 0.8), "win_rate": win}
  results |= {"caption_accuracy_change": 0.0 - fall, "protocol": made["evaluation"]}
  row = {"images_per_second": 32.0, "valid_pairs": 0.5, "updates": 4.0}
  metrics = [{"step": 1, **row, "images_per_second": 0.1}, {"step": 10, **row}, {"step": 20, **row}]
  if divergences:
    metrics = [{"step": s, "divergence": d, "reference_updates": n, **row} for s, d, n in divergences]
  lines = "".join(json.dumps(m) + "\n" for m in metrics)
  return {"config.json": json.dumps(made), "results.json": json.dumps(results), "metrics.jsonl": lines + '{"step": 3'}


def write(folder, run, **numbers):
  place = folder / run.path
  place.mkdir(parents=True)
  for name, text in files(run, **numbers).items():
    (place / name).write_text(text)


def tune(folder, variant, rows=((0.5, 0.0), (0.6, 0.0), (0.7, 0.1))):
  """Rows: (preferred share, fall of caption accuracy) of each learning rate; by default the middle one is chosen."""
  for run, (share, fall) in zip(study_plan.rate_runs(variant), rows, strict=True):
    write(folder, run, share=share, fall=fall)


def test_every_variant_is_a_config():
  names = [v.name for v in study_plan.VARIANTS]
  assert len(set(names)) == len(names) and {v.part for v in study_plan.VARIANTS} == set(study_plan.PARTS)
  known = config_lib.names()
  for variant in study_plan.VARIANTS:
    run = study_plan.Run(variant, 1e-5, 0, "test")
    assert set(run.fields()) <= set(known)
    config = importlib.import_module(f"configs.{variant.config_file}").get_config()
    config.update_from_flattened_dict(run.fields())
    config_lib.check(config)
    recipe = importlib.import_module(f"configs.{variant.config_file}").get_config()
    changed = {n for n in known if value(config, n) != value(recipe, n)}
    assert set(variant.overrides) - {"reference.delta"} <= changed | {"reference.mode"}  # none says what holds anyway
    assert set(variant.against) <= set(names)
    assert not variant.tuned_as or not study_plan.BY_NAME[variant.tuned_as].tuned_as
    assert not variant.betas or variant.tuned_as and not variant.overrides
  for variant in study_plan.BY_NAME.values():  # those with another beta, too, at each of its tries
    assert study_plan.beta(variant) > 0 and study_plan.load_config(variant).num_steps < 151
  moving = [v for v in study_plan.VARIANTS if v.overrides.get("reference.mode") == "update"]
  for config in map(study_plan.load_config, moving):
    assert config.reference.tau % config.logging.every == 0


def value(config, name):
  for key in name.split("."):
    config = config[key]
  return config


def test_commands_are_those_of_the_trainer():
  run = study_plan.Run(study_plan.BY_NAME["ungated_tau4"], 4e-5, 3, "test")
  command = study_plan.command(run, pathlib.Path("runs"))
  assert command[1:4] == ["-m", "jaxpref.main", "--config=configs/dpo_tiny.py"]
  assert command[-1] == "--workdir=runs/ungated_tau4/test_4e-05_seed3"
  assert {"--config.seed=3", "--config.reference.tau=4", "--config.optimizer.learning_rate=4e-05"} <= set(command)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("name", study_plan.BY_NAME)
def test_commands_set_the_fields_as_they_are_meant(name, monkeypatch):
  run = study_plan.Run(study_plan.BY_NAME[name], 1e-5, 3, "test")
  monkeypatch.setattr(sys, "argv", study_plan.command(run, pathlib.Path("runs"))[2:-1])  # where fields are looked for
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  values(sys.argv)
  assert {field: value(values.config, field) for field in run.fields()} == run.fields()


def test_evaluations_by_hand():
  config = lambda name: study_plan.load_config(study_plan.BY_NAME[name])
  # Half of the recipe's steps. 32 pairs: two reference passes, two of the policy, two backward passes that count twice.
  assert study_plan.evaluations(config("dpo")) == 150 * 32 * (2 + 2 + 4)
  assert study_plan.evaluations(config("dpo_quarter")) == 38 * 32 * 8
  assert study_plan.evaluations(config("mapo")) == study_plan.evaluations(config("sft")) == 150 * 32 * (2 + 4)
  assert study_plan.evaluations(config("d3po")) == 20 * 8 * ((2 + 18 * 2) * 2 + (1 + 18 * 2) * 2 * 4)
  # 24 samples of 20 guided steps; of the policy a forward and (twice) a backward pass of each step.
  assert study_plan.evaluations(config("grpo")) == study_plan.evaluations(config("ddpo")) == 20 * 24 * 20 * 2 * (1 + 3)
  some = config("grpo")
  some.grpo.update(timestep_fraction=0.6, kl_coef=0.04)
  assert study_plan.evaluations(some) == 20 * 24 * 2 * (20 + 12 * 4)
  assert study_plan.evaluations(config("kto")) == 150 * 64 * (1 + 1 + 2)
  # A move of the reference: two passes of 8 samples.
  assert study_plan.evaluations(config("freeze_tau16")) == 150 * 32 * 8 + 9 * 16
  # 8 prompts: 65 guided calls, and 17 of reference and policy, forward and (twice) backward, of the valid pairs.
  assert study_plan.evaluations(config("spo")) == 20 * 8 * (65 * 2 + 17 * 2 * 4)
  assert study_plan.evaluations(config("spo"), 0.5) == 20 * 8 * (65 * 2 + 17 * 4)
  assert study_plan.evaluations(config("spo_reference")) == 20 * 8 * (65 * 2 + 17 * 2 * 4) + 2 * 16
  sdxl = importlib.import_module("configs.spo_sdxl").get_config()  # groups of four steps: 4 shared starts, 12 not
  s = sdxl.spo
  calls = spo.pool_calls(num_steps=s.num_inference_steps, warmup_steps=s.warmup_steps, pool_size=s.pool_size)
  assert study_plan.evaluations(sdxl, 0.0) == sdxl.num_steps * sdxl.batch_size * 2 * calls
  assert study_plan.evaluations(sdxl) == sdxl.num_steps * sdxl.batch_size * 2 * (calls + 4 * (4 + 2 * 12))


@pytest.mark.parametrize(
  "rows, factor",
  [
    (((0.5, 0.0), (0.6, 0.01), (0.7, 0.06)), 2.0),  # the highest falls too far
    (((0.5, 0.0), (0.6, 0.01), (0.7, 0.05)), 4.0),  # 5 points are allowed
    (((0.6, 0.0), (0.6, -0.01), (0.6, 0.0)), 1.0),  # of equal ones the smallest
    (((0.5, 0.07), (0.6, 0.06), (0.7, 0.08)), 2.0),  # none is allowed: the one that falls least
  ],
)
def test_learning_rate_is_chosen_by_the_rule(tmp_path, rows, factor):
  dpo = study_plan.BY_NAME["dpo"]
  assert study_plan.test_runs(dpo, tmp_path, 2) == []
  tune(tmp_path, dpo, rows)
  for name in ("dpo", "dpo_half"):
    tests = study_plan.test_runs(study_plan.BY_NAME[name], tmp_path, 2)
    assert [(r.learning_rate, r.seed, r.split) for r in tests] == [(factor * 2e-5, seed, "test") for seed in (0, 1)]


def test_failed_runs_are_not_chosen():
  row = {"learning_rate": 1.0, "preferred_share": 0.5, "caption_accuracy_change": 0.0}
  assert study_plan.choose([{"failed": "NaN"}, row]) == row
  assert study_plan.choose([{"failed": "NaN"}]) is None


def tries(folder, variant, *shares):
  """Runs with each beta; with no share, of the one it has anyway alone."""
  for run, share in zip(study_plan.beta_runs(variant, folder)[1:], shares, strict=True):
    write(folder, run, share=share)


@pytest.mark.parametrize(
  "shares, name, beta",
  [((0.5, 0.7), "mapo_beta1", 1.0), ((0.7, 0.5), "mapo_beta0.01", 0.01), ((0.6, 0.5), "mapo", 0.1)],
)
def test_beta_is_chosen_at_the_learning_rate(tmp_path, shares, name, beta):
  """By the same rule; the runs of the method itself are taken where its own beta is the best, also of equal ones."""
  mapo, chosen = study_plan.BY_NAME["mapo"], study_plan.BY_NAME["mapo_beta"]
  assert study_plan.beta_runs(chosen, tmp_path) == []
  tune(tmp_path, mapo)
  assert [r.path for r in study_plan.beta_runs(chosen, tmp_path)] == [
    f"{n}/validation_4e-05_seed100" for n in ("mapo", "mapo_beta0.01", "mapo_beta1")
  ]
  assert study_plan.test_runs(chosen, tmp_path, 2) == []
  left = [r.path for r in study_plan.remaining([chosen], tmp_path, 2)]
  assert left == [f"mapo_beta{b}/validation_4e-05_seed100" for b in ("0.01", "1")]
  tries(tmp_path, chosen, *shares)
  tests = study_plan.test_runs(chosen, tmp_path, 2)
  assert [r.path for r in tests] == [f"{name}/test_4e-05_seed{seed}" for seed in (0, 1)]
  assert all(study_plan.load_config(r.variant).loss.beta == beta for r in tests)
  fields = tests[0].fields()
  assert fields.get("loss.beta") == beta and fields["loss.name"] == "mapo"
  assert [r.path for r in study_plan.test_runs(mapo, tmp_path, 1)] == ["mapo/test_4e-05_seed0"]


def test_the_report_tells_of_betas(tmp_path):
  for name, shares in (("dpo", (0.7, 0.1)), ("mapo", (0.1, 0.2))):
    tune(tmp_path, study_plan.BY_NAME[name])
    chosen = study_plan.BY_NAME[f"{name}_beta"]
    tries(tmp_path, chosen, *shares)
    runs = {r.path: r for v in (study_plan.BY_NAME[name], chosen) for r in study_plan.test_runs(v, tmp_path, 1)}
    for run in runs.values():
      write(tmp_path, run, share=0.5 + 0.1 * (run.variant.name == "dpo_beta50"))
  text = report(tmp_path)
  assert "| dpo_beta | 500: 60.0% (+0.0); 50: 70.0% (+0.0); 5000: 10.0% (+0.0) | 50 |" in text
  assert "| mapo_beta | 0.1: 60.0% (+0.0); 0.01: 10.0% (+0.0); 1: 20.0% (+0.0) | 0.1 |" in text
  assert "| dpo_beta | dpo | 1 | +10.0 |" in text and "| mapo_beta | dpo_beta | 1 | -10.0 |" in text
  assert "| mapo_beta | mapo |" not in text  # the same runs
  other = tmp_path / "other"
  assert study_plan.restore(tmp_path / "docs" / "study.json", other) == 6 + 4 + 3
  names = ("dpo_beta", "mapo_beta")
  for chosen in (study_plan.BY_NAME[n] for n in names):
    assert study_plan.test_runs(chosen, other, 1) == study_plan.test_runs(chosen, tmp_path, 1)


def fake_command(run, folder):
  (folder / "made.json").write_text(json.dumps(files(run, share=0.5 + 0.01 * run.seed)))
  return [sys.executable, "-S", "-c", FAKE, f"--workdir={folder / run.path}"]


def test_runs_are_made_once_and_in_order(tmp_path, monkeypatch):
  monkeypatch.setattr(study_plan, "command", fake_command)
  monkeypatch.setattr(study_report, "plots", lambda *_: None)
  study_of = f"--seeds 2 --runs {tmp_path} --docs {tmp_path / 'docs'} --workers 1 --only".split() + ["C sft"]
  study.main([*study_of, "--until", "00:00"])
  assert not (tmp_path / "calls.txt").exists()
  study.main(study_of)
  expected = [f"sft/validation_{r}_seed100" for r in ("2e-05", "4e-05", "8e-05")]
  expected += [f"sft/test_2e-05_seed{s}" for s in (0, 1)]
  assert (tmp_path / "calls.txt").read_text().split() == expected
  (tmp_path / expected[-1] / "results.json").unlink()  # as if it had been interrupted
  study.main(study_of)
  assert (tmp_path / "calls.txt").read_text().split() == [*expected, expected[-1]]
  assert [r["seed"] for r in json.loads((tmp_path / "docs" / "study.json").read_text())["runs"]["sft"]] == [0, 1]


def test_two_runs_at_a_time_make_the_same_runs_once_each(tmp_path, monkeypatch):
  """And wait for the learning rates that others are choosing."""

  def command(run, folder):
    name = run.path.replace("/", "_") + ".json"
    (folder / name).write_text(json.dumps(files(run)))
    return [sys.executable, "-S", "-c", FAKE.replace("made.json", name), f"--workdir={folder / run.path}"]

  monkeypatch.setattr(study_plan, "command", command)
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
  pinned = []
  monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
  variants = [study_plan.BY_NAME["ipo"], study_plan.BY_NAME["hinge"]]
  study.train_all(variants, tmp_path, 2, workers=2)
  calls = (tmp_path / "calls.txt").read_text().split()
  assert sorted(calls) == sorted(set(calls)) and len(calls) == 2 * (3 + 2)
  assert not list(study_plan.remaining(variants, tmp_path, 2))
  assert {0} in pinned and {1} in pinned and len(pinned) == len(calls)


def test_a_preference_model_is_trained_once_and_judges(tmp_path, monkeypatch):
  run = study_plan.Run(study_plan.BY_NAME["spo_clean"], 2e-5, 0, "test")
  model = tmp_path / "models" / "clean"
  assert f"--config.preference_model={model / 'export'}" in study_plan.command(run, tmp_path)
  seen = []

  def main(config_file, fields, workdir):
    seen.append((config_file, fields.get("spm.step_aware"), workdir))
    (tmp_path / "made.json").write_text(json.dumps(files(run)))
    return [sys.executable, "-S", "-c", FAKE, f"--workdir={workdir}"]

  monkeypatch.setattr(study_plan, "main_command", main)
  for seed in (0, 1):
    study.train(study_plan.Run(run.variant, 2e-5, seed, "test"), tmp_path, float("inf"))
  assert seen[0] == ("spm_tiny", False, model)
  assert [name for name, _, _ in seen] == ["spm_tiny", "spo_tiny", "spo_tiny"]


def test_nan_is_a_result_and_other_errors_stop_the_study(tmp_path, monkeypatch):
  monkeypatch.setattr(study_plan, "command", fake_command)
  run = study_plan.Run(study_plan.BY_NAME["ipo"], 1e-5, 0, "test")
  (tmp_path / "broken").touch()
  with pytest.raises(RuntimeError, match=r"ipo/test_1e-05_seed0 ended with status 1 .* no such folder"):
    study.train(run, tmp_path, float("inf"))
  assert study_plan.read_run(run, tmp_path) is None
  (tmp_path / "nan").touch()
  study.train(run, tmp_path, float("inf"))
  assert "not finite" in study_plan.read_run(run, tmp_path)["failed"]


def test_a_run_in_time_is_stopped(tmp_path, monkeypatch):
  monkeypatch.setattr(study_plan, "command", lambda *_: [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
  with pytest.raises(TimeoutError, match="was not ready in time"):
    study.train(study_plan.Run(study_plan.BY_NAME["ipo"], 1e-5, 0, "test"), tmp_path, 0.0)


def test_sigterm_ends_the_runs_and_then_the_study(tmp_path):
  """Both that are going on, with a report of what there is."""
  run = [sys.executable, "-S", "-c", "import time; print('begun', flush=True); time.sleep(60)"]
  program = f"from scripts.study import study, study_plan; study_plan.command = lambda *_: {run!r};"
  program += f"study.main('--only sft --workers 2 --runs {tmp_path} --docs {tmp_path}'.split())"
  process = subprocess.Popen([sys.executable, "-c", program], cwd=study_plan.ROOT, stderr=subprocess.PIPE, text=True)
  begun = lambda: [log for log in tmp_path.glob("sft/*.log") if "begun" in log.read_text()]
  deadline = time.monotonic() + 50
  while len(begun()) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
  process.terminate()
  _, said = process.communicate(timeout=50)
  assert process.returncode == 0 and said.count("was stopped; it resumes with the next call") == 2
  assert len(list(tmp_path.glob("sft/*.log"))) == 2 and (tmp_path / "study.md").is_file()


def test_a_folder_of_another_config_is_refused(tmp_path):
  run = study_plan.Run(study_plan.BY_NAME["dpo"], 2e-5, 0, "test")
  write(tmp_path, run)
  config = json.loads((tmp_path / run.path / "config.json").read_text())
  config["sample"]["every"] = 200
  (tmp_path / run.path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"made with config\.sample\.every=200, expected 0"):
    study_plan.read_run(run, tmp_path)


def test_numbers_of_a_run(tmp_path):
  dpo = study_plan.Run(study_plan.BY_NAME["dpo"], 2e-5, 0, "test")
  write(tmp_path, dpo)
  row = study_plan.read_run(dpo, tmp_path)
  assert row["minutes"] == pytest.approx(150 * 64 / 32 / 60)  # without the first step, which was slow
  assert (row["updates"], row["evaluations"]) == (150, 150 * 32 * 8) and "last_d" not in row
  spo = study_plan.Run(study_plan.BY_NAME["spo"], 2e-5, 0, "test")
  write(tmp_path, spo)
  row = study_plan.read_run(spo, tmp_path)
  assert row["minutes"] == pytest.approx(20 * 8 / 32 / 60)
  assert (row["updates"], row["evaluations"]) == (80, 20 * 8 * (130 + 68))
  grpo = study_plan.Run(study_plan.BY_NAME["grpo"], 2e-5, 0, "test")
  write(tmp_path, grpo)
  row = study_plan.read_run(grpo, tmp_path)
  assert row["minutes"] == pytest.approx(20 * 24 / 32 / 60)  # pictures a second
  assert (row["updates"], row["evaluations"]) == (80, 20 * 24 * 160)
  gated = study_plan.Run(study_plan.BY_NAME["freeze_tau16"], 2e-5, 0, "test")
  write(tmp_path, gated, divergences=[(1, 0.0, 0), (16, 0.002, 1), (32, 0.009, 1), (48, 0.004, 2), (64, 0.006, 2)])
  row = study_plan.read_run(gated, tmp_path)
  assert (row["last_d"], row["largest_d"], row["accepted_d"], row["moves"]) == (0.006, 0.009, 0.004, 2)


def test_differences_are_of_the_same_seeds():
  rows = lambda shares: [
    {"seed": s, "preferred_share": x, "caption_accuracy_change": 0.0, "win_rate": 0.5 + x / 2}
    for s, x in enumerate(shares)
  ]
  found = study_report.compare(rows([0.6, 0.7, 0.8]), rows([0.5, 0.5, 0.5, 0.9]))
  assert found["change"] == pytest.approx([0.1, 0.2, 0.3]) and found["p"] == 2 / 8
  assert found["interval"] == pytest.approx([0.2 - 4.303 * 0.1 / 3**0.5, 0.2 + 4.303 * 0.1 / 3**0.5], abs=1e-4)
  assert found["effect_size"] == pytest.approx(2.0)
  assert found["win_rate"] == pytest.approx(0.1)
  assert found["win_rate_interval"] == pytest.approx([x / 2 for x in found["interval"]])
  for few in (1, 2):
    assert "interval" not in study_report.compare(rows([0.5] * few), rows([0.4] * few))
  assert study_report.compare(rows([0.5] * 5), rows([0.4] * 5))["p"] == 2 / 32
  assert study_report.compare(rows([0.5]), [{"seed": 0, "failed": "NaN"}]) is None
  assert study_report.compare(rows([0.5, 0.6]), rows([0.6, 0.5]))["p"] == 1.0


def report(folder):
  study.main(["--report", "--runs", str(folder), "--docs", str(folder / "docs")])
  return (folder / "docs" / "study.md").read_text()


def test_report_of_nothing_names_all_that_is_missing(tmp_path):
  text = report(tmp_path)
  assert f"- all seeds of {', '.join(v.name for v in study_plan.VARIANTS)}\n" in text and "## A" not in text
  assert not re.search(r"[{}]|None|nan", text)


def test_report_says_what_the_numbers_say(tmp_path):
  every = {name: study_plan.BY_NAME[name] for name in ("dpo", "spo", "kto", "ungated_tau16", "freeze_tau16")}
  shares = {"dpo": 0.6, "spo": 0.5, "kto": 0.7, "ungated_tau16": 0.55, "freeze_tau16": 0.65}
  curves = {"freeze_tau16": [(4, 0.0, 0), (16, 0.004, 1), (32, 0.011, 1)]}
  for name, variant in every.items():
    tune(tmp_path, variant)
    rate = study_plan.test_runs(variant, tmp_path, 1)[0].learning_rate
    also = {"ungated_tau16": ("ungated_tau64", "ungated_tau4"), "dpo": ("dpo_half",)}.get(name, ())
    for member, seed in itertools.product((name, *also), range(3)):
      last = {"ungated_tau64": 0.01, "ungated_tau16": 0.02, "ungated_tau4": 0.03 + 0.01 * seed}.get(member)
      curve = [(4, 0.0, 0), (64, last, 1)] if last else curves.get(member, ())
      run = study_plan.Run(study_plan.BY_NAME[member], rate, seed, "test")
      write(tmp_path, run, share=shares[name] + 0.01 * seed, divergences=curve)
  text = report(tmp_path)
  assert not re.search(r"[{}]|None|nan", text)
  assert "| dpo | 3 | 61.0% (60.0% to 62.0%) | 70.0% | +0.0% | 150 | 5.0 | 38,400 |" in text
  assert "| spo | dpo | 3 | -10.0 [-10.0, -10.0] | -10.0 to -10.0 |  | 0.25 | +0.0 [+0.0, +0.0] | +0.0 |" in text
  assert "- Without a gate the last D rises as tau falls: 0.0100 at 64, 0.0200 at 16, 0.0400 at 4." in text
  assert "- freeze_tau16: the largest D of a move that was made, 0.0040, is not above delta, 0.005." in text
  assert "Above what it is compared with, in all of three or more seeds: kto (dpo)." in text
  missing = text.partition("## Missing")[2]
  assert "- dpo/test_4e-05_seed3" in missing and "- dpo/test_4e-05_seed2" not in missing
  assert re.search("- all seeds of .*, ipo, ", missing) and " spo," not in missing
  assert {p.name for p in (tmp_path / "docs").iterdir()} == {
    "study.md", "study.json", "study_divergence.png",
  }  # fmt: skip
  saved = json.loads((tmp_path / "docs" / "study.json").read_text())
  assert saved["tuning"]["dpo"]["chosen"] == 4e-5 and len(saved["runs"]["kto"]) == 3


def test_a_report_is_gone_on_from(tmp_path, monkeypatch):
  dpo, gated = (study_plan.BY_NAME[name] for name in ("dpo", "freeze_tau16"))
  runs, other = tmp_path / "runs", tmp_path / "other"
  for v in (dpo, gated):
    tune(runs, v)
    curve = [(4, 0.1, 0), (8, 0.2, 0)] if v == gated else ()
    write(runs, study_plan.test_runs(v, runs, 1)[0], share=0.7, divergences=curve)
  study.main(["--report", "--runs", str(runs), "--docs", str(tmp_path / "docs")])
  file = tmp_path / "docs" / "study.json"
  assert study_plan.restore(file, other) == 8 and study_plan.restore(file, other) == 0
  for v in (dpo, gated):
    assert study_plan.test_runs(v, other, 5) == study_plan.test_runs(v, runs, 5)
    first = study_plan.test_runs(v, runs, 1)[0]
    rows = [json.loads(json.dumps(study_plan.read_run(first, place))) for place in (runs, other)]
    assert rows[0] == rows[1] and rows[0]["preferred_share"] == 0.7
  left = [run.seed for run in study_plan.remaining([dpo], other, 5)]
  assert left == [1, 2, 3, 4]
  study.main(["--report", "--restore", str(file), "--runs", str(tmp_path / "third"), "--docs", str(tmp_path / "again")])
  for name in ("study.md", "study.json", "study_divergence.png"):
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "docs" / name).read_bytes()


def test_a_report_of_another_plan_is_refused(tmp_path):
  dpo = study_plan.BY_NAME["dpo"]
  tune(tmp_path, dpo)
  write(tmp_path, study_plan.test_runs(dpo, tmp_path, 1)[0])
  study.main(["--report", "--runs", str(tmp_path), "--docs", str(tmp_path / "docs")])
  file = tmp_path / "docs" / "study.json"
  made = json.loads(file.read_text())
  made["runs"]["dpo"][0]["fields"]["num_steps"] = 7
  file.write_text(json.dumps(made))
  with pytest.raises(ValueError, match=r"study\.json was made with config\.num_steps=7, expected 150"):
    study_plan.restore(file, tmp_path / "other")
  made["runs"]["dpo"][0]["variant"] = "dppo"
  file.write_text(json.dumps(made))
  with pytest.raises(ValueError, match="has a run of 'dppo', expected one of dpo, "):
    study_plan.restore(file, tmp_path / "other")
  file.write_text('{"runs": {"dpo": [{"variant": "dpo"}]}, "tuning": {}}')
  for bad in (file, tmp_path / "none.json", pathlib.Path(__file__)):
    with pytest.raises(ValueError, match=f"{re.escape(str(bad))} cannot be read .*; expected a study.json"):
      study_plan.restore(bad, tmp_path / "other")
  program = study_plan.ROOT / "scripts" / "study" / "study.py"
  command = [sys.executable, program, "--list", "--restore", tmp_path / "none.json"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_the_picture_of_divergences_needs_all_curves(tmp_path):
  gated = study_plan.BY_NAME["freeze_tau16"]
  tune(tmp_path, gated)
  write(tmp_path, study_plan.test_runs(gated, tmp_path, 1)[0], divergences=[(4, 0.1, 0), (8, 0.2, 0)])
  found = study_report.collect(tmp_path, 1)
  study_report.plots(found, tmp_path)
  assert (tmp_path / "study_divergence.png").stat().st_size
  (tmp_path / "study_divergence.png").write_text("earlier")
  del found["runs"]["freeze_tau16"][0]["d_curve"]
  study_report.plots(found, tmp_path)
  assert (tmp_path / "study_divergence.png").read_text() == "earlier"


def test_the_plan_counts_what_is_left(tmp_path, capsys):
  tune(tmp_path, study_plan.BY_NAME["dpo"])
  write(tmp_path, study_plan.Run(study_plan.BY_NAME["dpo"], 4e-5, 0, "test"))
  study.main(["--list", "--runs", str(tmp_path)])
  text = capsys.readouterr().out
  assert re.search(r"^A dpo +4 of 8 runs left", text, flags=re.MULTILINE)
  assert re.search(r"^B dpo_half +5 of 5 runs left.*num_steps=75$", text, flags=re.MULTILINE)
  left = [int(n) for n in re.findall(r"(\d+) of \d+ runs left", text)]
  assert text.splitlines()[-1].startswith(f"{sum(left)} runs left, about ")


def test_conclusions_stand_before_the_numbers(tmp_path):
  (tmp_path / "docs").mkdir()
  (tmp_path / "docs" / "study_conclusions.md").write_text("- All {methods} win.\n")
  text = report(tmp_path)
  assert "no training sees.\n\n## Conclusions\n\n- All {methods} win.\n\n## Numbers\n\nNumbers are means" in text


def test_the_plot_of_cost_comes_with_its_runs(tmp_path):
  for name in ("dpo", "spo"):
    tune(tmp_path, study_plan.BY_NAME[name])
  for name in itertools.chain(*study_plan.CURVES.values()):
    assert "study_budget" not in report(tmp_path)
    write(tmp_path, study_plan.test_runs(study_plan.BY_NAME[name], tmp_path, 1)[0])
  assert "(study_budget.png)" in report(tmp_path) and (tmp_path / "docs" / "study_budget.png").is_file()


def test_runs_of_a_variant_without_any_are_named_once():
  """By its name, though its folder has the chosen beta in it."""
  study = {
    "runs": {"spo": [{"seed": 0}], "spo_beta": []},
    "missing": ["spo/test_4e-05_seed1", "spo_beta100/test_4e-05_seed0"],
  }
  assert study_report._missing(study) == ["spo/test_4e-05_seed1", "all seeds of spo_beta"]
  full = {"runs": {"spo": [{"seed": 0}]}, "missing": ["spo/test_4e-05_seed1"]}
  assert study_report._missing(full) == ["spo/test_4e-05_seed1"]
