"""The README: its Python runs and prints what it says, and what it names exists."""

import pathlib
import re

import pytest

from jaxpref import config, losses

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order_and_print_what_they_say(capsys):
  code = "\n".join(blocks("python"))
  exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
  expected = re.findall(r"^print\(.*\)  # ([-+.0-9]*[0-9])", code, flags=re.MULTILINE)
  assert expected
  assert capsys.readouterr().out.split() == expected


def test_the_first_block_has_the_two_commands():
  lines = [line.partition("#")[0].strip() for line in blocks("sh")[0].splitlines()]
  assert [line for line in lines if line] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]


def test_files_exist():
  files = re.findall(r"(?:configs|docs|jaxpref|scripts|tests)/[\w/]*\w\.\w+", README)
  assert {"configs/spo_tiny.py", "scripts/test.sh"} <= set(files)
  assert not [file for file in files if not (ROOT / file).is_file()]


def test_fields_exist():
  fields = re.findall(r"--config\.([\w.]+\w)", README)
  assert fields and set(fields) - {"model"} <= set(config.names())
  section = README.split("## Configs")[1].split("\n## ")[0]
  rows = [line for line in section.splitlines() if line.startswith("| `")]
  named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
  left_out = {"seed", "spm", "vae", "train_text_encoder"}
  assert named | left_out == set(config.default())


def test_losses_exist():
  section = README.split("## Methods")[1].split("\n## ")[0]
  rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
  names = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
  assert not [name for name in names if not hasattr(losses, name)]
  public = {n for n in dir(losses) if n.endswith("_loss")}
  assert public <= names, "a loss is missing in the README's table"


@pytest.mark.parametrize("objective", config.FACTS)
def test_objectives_are_named(objective):
  assert f"`{objective}`" in README
