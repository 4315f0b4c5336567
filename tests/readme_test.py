"""The README: its Python runs and prints what it says, and what it names exists."""

import pathlib
import re

import pytest

from jaxpref import config, losses, reference

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
  assert {"configs/spo_sdxl.py", "scripts/test.sh"} <= set(files)
  assert not [file for file in files if not (ROOT / file).is_file()]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def slug(heading):
  """The anchor of a heading, as GitHub makes it."""
  return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
  for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    path, _, anchor = link.partition("#")
    if "://" in path:
      continue
    target = page.parent / path if path else page
    assert target.is_file(), f"{page.name} links to {link}, which does not exist"
    if anchor:
      headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
      assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {path or page.name} has no #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_results_that_are_named_exist(page):
  named = re.findall(r"\bdocs/[\w/]*\w\.(?:json|md|png|txt)\b", page.read_text())
  assert not [file for file in named if not (ROOT / file).is_file()]


def test_measurements_lie_beside_their_pages():
  assert not [file.name for file in (ROOT / "docs").iterdir() if file.is_file() and file.suffix != ".md"]


def test_fields_exist():
  fields = set(re.findall(r"--config\.([\w.]+)(?==)", README))
  assert fields and fields <= set(config.names())


def test_losses_exist():
  section = README.split("## Methods")[1].split("\n## ")[0]
  rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
  names = {name for row in rows for name in re.findall(r"`(\w+)`", row[4])}
  assert not [name for name in names if not hasattr(losses, name) and not hasattr(reference, name)]
  public = {n for n in dir(losses) if n.endswith("_loss")} - {"info_nce_loss"}
  assert public <= names, "a loss is missing in the README's table"


def test_the_sections_a_reader_looks_for_are_there():
  headings = re.findall(r"^## (.*)$", README, flags=re.MULTILINE)
  assert headings == [
    "Start", "Install", "A loss in your own project", "Methods", "SDXL in four commands", "Beside other public code",
    "Read on",
  ]  # fmt: skip
