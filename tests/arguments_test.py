"""Repeated options: none loses a value without a word."""

import pytest

from jaxpref import arguments, config


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
def test_a_repeated_option_of_one_value_is_refused(option, capsys):
  with pytest.raises(SystemExit):
    parser().parse_args([option, "1", option, "2"])
  assert f"{option} is given twice, as " in capsys.readouterr().err


def test_the_same_value_twice_is_no_contradiction_and_a_parser_forgets():
  both = parser()
  assert both.parse_args(["--seed=0", "--seed=0"]).seed == 0
  assert both.parse_args(["--seed=3"]).seed == 3


@pytest.mark.parametrize("name", ["--config.num_steps", "--workdir"])
def test_a_repeated_field_of_a_recipe_is_refused(name, capsys):
  command = ["main", "--config=configs/spo_tiny.py", f"{name}=1", f"{name}=2"]
  with pytest.raises(SystemExit, match=f"{name} is given twice, as 1 and as 2; give it once"):
    config.parse_flags(command)
