"""`jaxpref COMMAND`, and recipes that cannot be read: one sentence each, before anything else happens."""

import pathlib
import subprocess
import sys

import pytest

from jaxpref import __main__ as commands
from jaxpref import config as config_lib
from jaxpref import describe, evaluate, export, pairs, replay, sample
from jaxpref.data import emoji, paths
from jaxpref.data.pickapic import __main__ as pickapic_command
from jaxpref.training import inputs

REPOSITORY = pathlib.Path(__file__).parents[1]


def called(monkeypatch, *arguments):
  """The module that is run, and the arguments that it sees."""
  seen = []
  monkeypatch.setattr(sys, "argv", ["jaxpref", *arguments])
  monkeypatch.setattr(commands.runpy, "run_module", lambda name, **_: seen.append((name, sys.argv[1:])))
  commands.run()
  return seen[0]


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_runs_its_module(monkeypatch, command):
  name, arguments = called(monkeypatch, command, "--out=x", "y")
  assert (REPOSITORY / pathlib.Path(*name.split("."))).with_suffix(".py").is_file()
  assert name == ("jaxpref.main" if command == "train" else f"jaxpref.{command}")
  assert arguments == ["--out=x", "y"]


def test_without_a_command_it_trains(monkeypatch):
  assert called(monkeypatch, "--config=a.py") == ("jaxpref.main", ["--config=a.py"])


def test_help_names_every_command(monkeypatch, capsys):
  for arguments in ((), ("--help",), ("help",)):
    monkeypatch.setattr(sys, "argv", ["jaxpref", *arguments])
    commands.run()
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in commands.COMMANDS)


def test_other_commands_are_refused(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["jaxpref", "sampel"])
  with pytest.raises(SystemExit, match="sampel is no command .did you mean sample.*expected one of train, sample"):
    commands.run()


def test_the_module_is_run_with_its_own_arguments():
  command = [sys.executable, "-m", "jaxpref", "export", "--help"]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
  assert "usage: python -m jaxpref.export" in done.stdout


DEFAULT = "  from jaxpref.config import default\n  config = default()\n"


@pytest.mark.parametrize(
  ("recipe", "sentence"),
  [
    ("x = 1\n", "recipe.py has no function get_config"),
    (f"def get_config():\n{DEFAULT}", "its get_config returns nothing; end it with: return config."),
    ("def get_config():\n  return {}\n", "its get_config returns dict, expected the config that it changes"),
    ("def get_config(:\n", "recipe.py, line 1: "),
    ("def get_config():\n  return undefined\n", "recipe.py, line 2: NameError: name 'undefined' is not defined"),
    ("import not_there\n", "recipe.py, line 1: ModuleNotFoundError: No module named 'not_there'"),
    ("def get_config():\n  raise ValueError('what it is')\n", "what it is (RECIPE, line 2)"),
    (f"def get_config():\n{DEFAULT}  config.seed = 'x'\n  return config\n", "recipe.py, line 4: TypeError: "),
    (
      f"def get_config():\n{DEFAULT}  config.batch_sise = 2\n  return config\n",
      "sets config.batch_sise, which is no field; did you mean config.batch_size?",
    ),
  ],
)
def test_recipes_that_cannot_be_read(tmp_path, recipe, sentence):
  file = tmp_path / "recipe.py"
  file.write_text(recipe)
  command = [sys.executable, "-m", "jaxpref.main", f"--config={file}"]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
  assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
  assert sentence.replace("RECIPE", str(file)) in done.stderr


def test_the_choices_of_the_config_are_those_of_the_code():
  assert config_lib.STYLES == emoji.STYLES and config_lib.SPLITS == emoji.SPLITS


@pytest.mark.parametrize(
  ("module", "work", "arguments"),
  [
    (sample, "draw", ["--prompt=x"]),
    (evaluate, "evaluate", ["--models=a=b", "--prompts=emoji"]),
    (pairs, "make_pairs", ["--prompts=emoji", "--out=o"]),
    (export, "export", ["run", "--format=lora", "--out=o"]),
    (describe, "describe", ["source"]),
    (replay, "replay", ["folder"]),
    (pickapic_command.pickapic, "prepare", ["--parquet=p", "--out=o"]),
  ],
  ids=lambda v: getattr(v, "__name__", ""),
)
def test_ctrl_c_ends_a_command_in_one_sentence_with_exit_code_130(
  monkeypatch, tmp_path, capsys, module, work, arguments
):
  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(module, work, interrupted)
  main = pickapic_command.main if work == "prepare" else module.main
  with pytest.raises(SystemExit) as ended:
    main(arguments)
  said = capsys.readouterr().err.strip()
  assert ended.value.code == 130 and " was interrupted; " in said and said.count("\n") == 0
  assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_libraries_are_read_is_no_traceback(monkeypatch, capsys):
  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(sys, "argv", ["jaxpref", "sample"])
  monkeypatch.setattr(commands.runpy, "run_module", interrupted)
  with pytest.raises(SystemExit) as ended:
    commands.run()
  assert ended.value.code == 130
  assert capsys.readouterr().err.strip() == "jaxpref sample was interrupted before it began."


def test_a_package_for_a_bucket_is_looked_for_before_anything_is_loaded(monkeypatch):
  def missing(path):
    raise ValueError(f"{path} cannot be reached without the package s3fs")

  monkeypatch.setattr(paths, "open_path", missing)
  inputs.check_packages(config_lib.replace(config_lib.default(), {"data.path": "data/pairs.jsonl"}))
  config = config_lib.replace(config_lib.default(), {"data.path": "s3://bucket/pairs"})
  with pytest.raises(ValueError, match="s3://bucket/pairs cannot be reached without the package s3fs"):
    inputs.check_packages(config)
