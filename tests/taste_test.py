"""Rounds of pairs, labels and training: which commands run, in which order, and where a second call continues."""

import json
import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpref import taste
from jaxpref.voting import export, rounds, store
from tests import QUICK_FLAGS


@pytest.fixture
def commands(monkeypatch):
  """The commands that were run; each leaves what the real one leaves."""
  ran = []

  def run(command, given, *, read=False):
    ran.append((command, list(given)))
    fields = dict(argument.lstrip("-").split("=", 1) for argument in given if "=" in argument)
    if command == "vote" and read:
      return json.dumps({"judged": commands.judged, "pairs": 300})
    if command == "pairs":
      folder = rounds.folder_of(pathlib.Path(fields["out"]), int(fields["round"]))
      folder.mkdir(parents=True, exist_ok=True)
      if commands.begun:
        (folder.parent / store.NAME).write_text("")
      (folder / ("labels.json" if "label" in fields else "pairs.jsonl")).write_text("{}")
    if command == "vote":
      folder = pathlib.Path(fields["export"])
      folder.mkdir(parents=True)
      (folder / export.UNPAIRED_NAME).write_text("")
    if command == "main":
      folder = pathlib.Path(fields["workdir"]) / "export"
      folder.mkdir(parents=True)
      (folder / "model_index.json").write_text("{}")
      if commands.lora:
        (folder / taste.ADAPTER).write_text("")
    return ""

  def commands():
    found = list(ran)
    ran.clear()
    return found

  commands.judged, commands.lora, commands.begun = 0, True, True
  monkeypatch.setattr(taste, "_run", run)
  return commands


def plan(folder, *arguments):
  return taste.parse([f"--out={folder}", "--prompts=emoji", *arguments])


def test_a_reward_labels_all_rounds_in_one_call(commands, tmp_path):
  asked = plan(tmp_path, "--rounds=2", "--label=tiny-clip", "--seeds=3", "--config.num_steps=7")
  taste.follow(asked)
  pairs, runs = tmp_path / "pairs", tmp_path / "runs"
  train = ["--config=configs/taste_tiny.py", f"--workdir={runs}/round_0", "--config.num_steps=7"]
  assert commands() == [
    ("pairs", ["--model=tiny-sd", "--prompts=emoji", f"--out={pairs}", "--round=0", "--seeds=3"]),
    ("pairs", [f"--out={pairs}", "--round=0", "--label=tiny-clip"]),
    (
      "main",
      [*train, "--config.data.source=pairs_file", f"--config.data.path={pairs}/round_0", "--config.model=tiny-sd"],
    ),
    ("pairs", [f"--model={runs}/round_0", "--prompts=emoji", f"--out={pairs}", "--round=1", "--seeds=3"]),
    ("pairs", [f"--out={pairs}", "--round=1", "--label=tiny-clip"]),
    (
      "main",
      [train[0], f"--workdir={runs}/round_1", train[2], "--config.data.source=pairs_file",
       f"--config.data.path={pairs}/round_1", "--config.model=tiny-sd",
       f"--config.lora.init_from={runs}/round_0/export/{taste.ADAPTER}"],
    ),
  ]  # fmt: skip
  taste.follow(asked)
  assert commands() == []


def test_all_of_a_model_is_trained_from_the_newest(commands, tmp_path):
  commands.lora = False
  taste.follow(plan(tmp_path, "--rounds=2", "--label=tiny-clip", "--model=mine"))
  trained = [given for command, given in commands() if command == "main"]
  assert [given[-1] for given in trained] == ["--config.model=mine", f"--config.model={tmp_path}/runs/round_0/export"]


def test_a_lora_of_ones_own_is_what_the_first_round_continues(commands, tmp_path, capsys):
  mine = tmp_path / "mine.safetensors"
  save_file({"x": np.zeros(1)}, mine)
  given = [f"--lora={mine}:0.8", "--model=base", "--rounds=2", "--label=tiny-clip", "--seeds=3", "--steps=9"]
  asked = plan(tmp_path / "o", *given)
  taste.follow(asked)
  ran = commands()
  trained = [arguments[-3:] for command, arguments in ran if command == "main"]
  adapter = f"{tmp_path}/o/runs/round_{{}}/export/{taste.ADAPTER}"
  assert trained == [
    ["--config.model=base", f"--config.lora.init_from={start}", "--config.lora.rank=0"]
    for start in (f"{mine}:0.8", adapter.format(0))
  ]
  drawn = [arguments for command, arguments in ran if command == "pairs" and "--label=tiny-clip" not in arguments]
  assert drawn[0][:2] == ["--model=base", f"--lora={mine}:0.8"]
  assert drawn[1][0] == f"--model={tmp_path}/o/runs/round_0" and not [a for a in drawn[1] if a.startswith("--lora")]
  said = capsys.readouterr().out
  models = f"--models before=base+{mine}:0.8 after=base+{adapter.format(1)}"
  assert f"jaxpref.blind {models} --out={tmp_path}/o/blind --steps=9 --prompts=PROMPTS" in said


def test_people_are_waited_for(commands, tmp_path):
  asked = plan(tmp_path, "--rounds=2", "--votes=40")
  commands.judged = 39
  with pytest.raises(taste.Waiting, match=r"round 1 of 2: 39 of 40 pairs are judged\.") as waiting:
    taste.follow(asked)
  assert str(waiting.value).endswith(f"python -m jaxpref.vote {tmp_path}/pairs --round=0")
  assert [command for command, _ in commands()] == ["pairs", "vote"]
  with pytest.raises(taste.Waiting):
    taste.follow(asked)
  assert [command for command, _ in commands()] == ["vote"]  # drawn already
  commands.judged = 40
  taste.follow(asked)
  ran = commands()
  assert [command for command, _ in ran] == ["vote", "vote", "main", "pairs", "vote", "vote", "main"]
  assert f"--export={tmp_path}/votes/round_0" in ran[1][1]
  assert f"--config.data.path={tmp_path}/votes/round_0" in ran[2][1]


def test_nobody_has_opened_the_page_yet(commands, tmp_path):
  commands.begun = False
  with pytest.raises(taste.Waiting, match=r"round 1 of 1: 0 of 1 pairs are judged\. .*\n  python -m jaxpref.vote "):
    taste.follow(plan(tmp_path, "--votes=40"))
  assert [command for command, _ in commands()] == ["pairs"]


def test_all_pairs_are_enough(commands, tmp_path):
  """Where there are fewer than --votes."""
  commands.judged = 300
  taste.follow(plan(tmp_path, "--votes=1000"))
  assert [command for command, _ in commands()][-1] == "main"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--rounds=0"], "--rounds=0; expected at least 1"),
    (["--votes=0"], "--votes=0; expected at least 1"),
    (["--label=tiny-clip", "--votes=9"], "--votes is for people, and --label=tiny-clip labels instead"),
    (["--config=configs/tasty.py"], "there is no configs/tasty.py; expected a recipe"),
    (["--seed=3", "--sedes=3"], "--sedes=3: expected an argument of this command"),
    (["--round=3"], "--round=3: expected an argument of this command"),
    (["--config.model=tiny-sd"], "--config.model=tiny-sd: each round has a model of its own"),
    (["--model_config", "x"], "--model_config: expected an argument of this command"),
  ],
)
def test_what_cannot_work_is_one_sentence(arguments, message, tmp_path):
  with pytest.raises(ValueError, match=re.escape(message)):
    plan(tmp_path, *arguments)


def test_a_lora_of_ones_own_has_its_own_rank(tmp_path):
  mine = tmp_path / "mine.safetensors"
  with pytest.raises(FileNotFoundError, match="there is no LoRA file .*mine.safetensors"):
    plan(tmp_path, f"--lora={mine}")
  save_file({"x": np.zeros(1)}, mine)
  for field in ("rank=8", "init_from=other.safetensors"):
    with pytest.raises(ValueError, match=f"--config.lora.{field}: the LoRA is that of --lora="):
      plan(tmp_path, f"--lora={mine}", f"--config.lora.{field}")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\n", "recipe.py has no function get_config"),
    ("def get_config():\n  pass\n", "its get_config returns no recipe"),
    ("def get_config():\n  return 1 / 0\n", "recipe.py, line 2"),
  ],
)
def test_a_broken_recipe_is_one_sentence(text, message, tmp_path):
  (tmp_path / "recipe.py").write_text(text)
  with pytest.raises(ValueError, match=re.escape(message)):
    plan(tmp_path, f"--config={tmp_path / 'recipe.py'}")


@pytest.mark.slow
def test_two_rounds_of_tiny_sd(tmp_path, capfd, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)
  asked = plan(
    tmp_path / "taste", "--rounds=2", "--label=tiny-clip", "--num_prompts=2", "--seeds=2", "--steps=2",
    "--config.num_steps=2", "--config.batch_size=2", "--config.sample.every=0", "--config.optimizer.warmup_steps=0",
  )  # fmt: skip
  taste.follow(asked)
  assert asked.is_trained(0) and asked.is_trained(1)
  assert (asked.run(1) / "export" / taste.ADAPTER).is_file()
  assert "aligned in 2 rounds" in capfd.readouterr().out
