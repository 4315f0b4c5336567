"""`jaxpref COMMAND`, and recipes that cannot be read: one sentence each, before anything else happens."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jaxpref import __main__ as commands
from jaxpref import blind, describe, evaluate, export, pairs, replay, sample, vote
from jaxpref import config as config_lib
from jaxpref.data import emoji, paths
from jaxpref.data.pickapic import __main__ as pickapic_command
from jaxpref.devices import endings
from jaxpref.training import inputs

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def ctrl_c_is_as_usual():
  """As at a terminal; commands leave it so."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


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
  with pytest.raises(SystemExit, match="sampel is not a command .did you mean sample.*expected one of train, sample"):
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
      "sets config.batch_sise, which is not a field; did you mean config.batch_size?",
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
    (vote, "vote", ["pairs"]),
    (blind, "compare", ["evaluation"]),
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


SLOW = "import sys, time\nprint('reading', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
MODULES = [f"jaxpref.{'main' if name == 'train' else name}" for name in commands.COMMANDS]


def interrupted(folder, *command):
  """Exit code and stderr of a program that gets Ctrl-C while it imports numpy, absl or jax: it stops there."""
  for name in ("absl", "jax", "numpy"):
    (folder / f"{name}.py").write_text(SLOW)
  usual = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script
  path = os.pathsep.join([str(folder), str(REPOSITORY)])
  environment = dict(os.environ, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
  process = subprocess.Popen(
    [sys.executable, *command], env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=usual
  )
  assert process.stderr.readline() == "reading\n"
  process.send_signal(signal.SIGINT)
  said = process.communicate(timeout=60)[1]
  return process.returncode, said


@pytest.mark.parametrize("module", [*MODULES, "jaxpref.data.pickapic"])
def test_ctrl_c_while_libraries_are_read_is_one_sentence_and_exit_code_130(tmp_path, module):
  assert interrupted(tmp_path, "-m", module, "--config=x") == (130, "\ninterrupted before it began.\n")


@pytest.mark.parametrize(
  "command", [["-m", "jaxpref"], ["-c", "from jaxpref import __main__; __main__.run()"]], ids=str
)
def test_ctrl_c_of_the_one_command_while_libraries_are_read(tmp_path, command):
  assert interrupted(tmp_path, *command, "sample") == (130, "\ninterrupted before it began.\n")


def test_a_program_that_imports_the_package_keeps_its_ctrl_c(tmp_path):
  """Also one that Python runs by -m."""
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "__init__.py").write_text("import jaxpref\n")
  (tmp_path / "own" / "__main__.py").write_text("import jaxpref.sample\n")
  for command in (["-m", "own", "jaxpref.sample"], ["-c", "import jaxpref.sample", "-m", "jaxpref.sample"]):
    code, said = interrupted(tmp_path, *command)
    assert code == -signal.SIGINT and said.splitlines()[-1] == "KeyboardInterrupt"


def test_after_a_command_ctrl_c_is_as_usual():
  with endings.one_sentence(doing="drawing", again="run it again"):
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  endings.begin()
  assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
  with endings.one_sentence(doing="drawing", again="run it again"):
    pass
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_package_for_a_bucket_is_looked_for_before_anything_is_loaded(monkeypatch):
  def missing(path):
    raise ValueError(f"{path} cannot be reached without the package s3fs")

  monkeypatch.setattr(paths, "open_path", missing)
  inputs.look_for(config_lib.replace(config_lib.default(), {"data.path": "data/pairs.jsonl"}))
  config = config_lib.replace(config_lib.default(), {"data.path": "s3://bucket/pairs"})
  with pytest.raises(ValueError, match="s3://bucket/pairs cannot be reached without the package s3fs"):
    inputs.look_for(config)
