"""Repeated options: none loses a value without a word."""

import pytest

from jaxpref import arguments


def parser():
  found = arguments.Parser(prog="test", description="x")
  found.add_argument("--many", nargs="+", default=["default"])
  found.add_argument("--seed", type=int, default=0)
  one = found.add_mutually_exclusive_group()
  one.add_argument("--name")
  found.add_argument_group("others").add_argument("--size", type=int)
  return found


def test_a_repeated_option_of_several_values_gathers_them():
  assert parser().parse_args([]).many == ["default"]
  assert parser().parse_args(["--many", "a", "b", "--seed=1", "--many=c"]).many == ["a", "b", "c"]


@pytest.mark.parametrize("option", ["--seed", "--name", "--size"])
def test_of_a_repeated_option_of_one_value_the_last_counts_and_that_is_said(option, capsys):
  found = vars(parser().parse_args([option, "1", option, "2"]))
  assert str(found[option.removeprefix("--")]) == "2"
  assert f"warning: {option} is given twice; 2 counts, not 1." in capsys.readouterr().err


def test_the_same_value_twice_is_no_contradiction_and_a_parser_forgets(capsys):
  both = parser()
  assert both.parse_args(["--seed=0", "--seed=0"]).seed == 0
  assert both.parse_args(["--seed=3"]).seed == 3
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  ("given", "sentence"),
  [
    ("gs://bucket/out", "gs://bucket/out is no path on this machine's disks"),  # not the folder gs:/bucket/out
    ("", "it is empty; expected a path"),
  ],
)
def test_a_local_path_is_one(given, sentence, capsys):
  of_path = arguments.Parser()
  of_path.add_argument("--out", type=arguments.path)
  assert str(of_path.parse_args(["--out=a/b"]).out) == "a/b"
  with pytest.raises(SystemExit):
    of_path.parse_args([f"--out={given}"])
  assert f"argument --out: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--config.num_steps", "--workdir"])
def test_of_a_repeated_field_of_a_recipe_the_last_counts_and_that_is_said(name, capsys):
  arguments._check_arguments(["main", "--config=configs/spo_tiny.py", f"{name}=1", f"{name}=2"])
  assert f"warning: {name} is given twice; 2 counts, not 1." in capsys.readouterr().err


def test_paragraphs_of_the_description_are_as_wide_as_the_terminal_and_commands_stay_whole(monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")
  command = "    python -m jaxpref.sample --model=runs/spo_tiny --prompts volcano"
  description = f"Draws with a model, which is one of several\nkinds:\n\n{command}\n\nIt prints where."
  shown = arguments.Parser(prog="test", description=description).format_help()
  assert "\nDraws with a model, which is one of\nseveral kinds:\n\n" in shown
  assert f"\n\n{command}\n\nIt prints where.\n" in shown
