"""README and docs: generated parts are up to date, the site builds, examples run, and the prose is plain."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

import jaxpref
from jaxpref import config, losses
from jaxpref.objectives import catalog
from scripts.docs import docstrings, draw_flow, pages

ROOT = pathlib.Path(__file__).resolve().parents[1]
GUIDES = [page for page in pages.pages() if "results" not in page.parts]
WIDTH, WORDS = 120, 40


def named(page):
  return str(page.relative_to(ROOT))


# ---- Generated parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages.pages(), ids=named)
def test_generated_parts_are_up_to_date(page):
  text = page.read_text()
  assert pages.written(text) == text, f"{named(page)} is out of date; run python scripts/docs/pages.py"


def test_a_part_that_is_not_known_is_refused():
  with pytest.raises(ValueError, match="generated: results of mine; expected one of results, "):
    pages.written("<!-- generated: results of mine -->\n<!-- end -->")


def test_a_part_that_changed_is_written_again():
  page = "before\n<!-- generated: results -->\nold numbers\n<!-- end -->\nafter\n"
  found = pages.written(page)
  assert "old numbers" not in found and "| base (tiny-sd) | " in found
  assert found.startswith("before\n<!-- generated: results -->\n") and found.endswith("<!-- end -->\nafter\n")


def test_every_objective_and_loss_has_a_row_and_every_row_a_page():
  rows = pages.METHODS.values()
  objectives = {pages.recipe(row).objective for row in rows}
  assert objectives >= {name for name in catalog.METHODS if config.FACTS[name].trains not in ("vae", "judge")} - {
    "denoise"
  }
  names = {pages.recipe(row).loss.name for row in rows}
  assert names == set(config.DENOISED_LOSSES)
  functions = {name for row in rows for name in row.functions}
  assert {name for name in dir(losses) if name.endswith("_loss")} <= functions
  for row in rows:
    if row.key not in pages.WITHOUT_PAGE:
      text = (ROOT / "docs" / "methods" / f"{row.key}.md").read_text()
      headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
      assert [h for h in headings if h in ("Equation", "When to use it", "Recipe", "Cost", "Our result")] == [
        "Equation", "When to use it", "Recipe", "Cost", "Our result",
      ]  # fmt: skip
      assert f"generated: facts {row.key} " in text and f"generated: result {row.key} " in text
      idea = text.split("\n\n")[1]
      assert idea.count("\n") < 5, f"the idea of {row.key} has more than five lines"


@pytest.mark.parametrize("objective", config.FACTS)
def test_objectives_are_named(objective):
  assert f"`{objective}`" in (ROOT / "docs" / "methods.md").read_text()


def test_every_field_has_a_meaning():
  rows = re.findall(r"^\| `([\w.]+)` \| .* \| ([^|]*) \|$", pages.configuration(), flags=re.MULTILINE)
  fields = set(config.names()) - {name for name in config.names() if name.startswith("options")}
  assert {name for name, _ in rows} == fields
  assert not [name for name, meaning in rows if not meaning.strip()]


def test_the_drawing_is_the_script_s():
  assert draw_flow.OUT.read_text() == draw_flow.drawing()
  for start, end, _ in draw_flow.ARROWS:
    assert {start, end} <= set(draw_flow.BOXES)


# ---- The site -------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  losses_page = (tmp_path / "site" / "api" / "losses" / "index.html").read_text()
  for name in ("dpo_loss", "kto_loss", "grpo_loss"):
    assert f'id="jaxpref.losses.{name}"' in losses_page
  interfaces = (tmp_path / "site" / "api" / "interfaces" / "index.html").read_text()
  for name in ("objectives.base.Objective", "rewards.base.Reward", "models.base.Model", "files.family.Family"):
    assert f'id="jaxpref.{name}"' in interfaces
  assert (
    'id="jaxpref.diffusion.process.Process"' in (tmp_path / "site" / "api" / "diffusion" / "index.html").read_text()
  )


def test_docstrings_are_made_readable_for_the_site():
  text = "Adds.\n\nArgs:\n  a: one.\nReturns:\n  The sum.\n\n>>> 1 + 1\n2\n\nMore."
  assert docstrings.readable(text) == (
    "Adds.\n\n\nArgs:\n  a: one.\n\nReturns:\n  The sum.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."
  )


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_python_of_the_method_pages_runs_and_prints_what_it_says(page, capsys):
  code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL))
  exec(compile(code, page.name, "exec"), {"__name__": "page"})
  expected = re.findall(r"^print\(.*\)  # ([-+.0-9]*[0-9])", code, flags=re.MULTILINE)
  assert capsys.readouterr().out.split() == expected


def test_commands_of_the_guides_name_files_and_fields_that_exist():
  for page in GUIDES:
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    for file in re.findall(r"\b(?:configs|scripts)/[\w/]+\.(?:py|sh|sbatch)", shell):
      assert (ROOT / file).is_file(), f"{named(page)}: {file}"
    fields = set(re.findall(r"--config\.([\w.]+)(?==)", shell))
    unknown = fields - set(config.names()) - {field for field in fields if field.startswith("options.")}
    assert not unknown, f"{named(page)}: {unknown}"


# ---- Prose ----------------------------------------------------------------------------------------------------------


def prose(text):
  """Lines of a page that are prose, with their numbers; without code, tables, and what is generated."""
  text = re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), pages.MARKED.sub(
    lambda found: "\n" * found[0].count("\n"), text), flags=re.DOTALL)  # fmt: skip
  fenced = False
  for number, line in enumerate(text.splitlines(), 1):
    if line.lstrip().startswith("```"):
      fenced = not fenced
      yield number, ""
    elif fenced or line.startswith(("|", "    ", "![")):
      yield number, ""
    else:
      yield number, line


def sentences(text):
  """The sentences of a page's prose; a heading, a list item and a paragraph end one."""
  block, blocks = [], []
  for _, line in prose(text):
    starts = re.match(r"\s*([-*]|\d+\.|\[\^\w+\]:|#+) ", line)
    if not line.strip() or starts:
      blocks.append(" ".join(block))
      block = []
    if line.strip():
      block.append(re.sub(r"^\s*([-*]|\d+\.|\[\^\w+\]:|#+) ", "", line).strip())
  blocks.append(" ".join(block))
  for whole in blocks:
    plain = re.sub(r"`[^`]*`", "code", whole)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    yield from re.split(r"(?<=[.!?:])(?:\*\*)?\s+(?=[\"'*(\[A-Z]|code|jaxpref )", plain)


def test_sentences_are_found():
  page = (
    "# A title\n\nOne `code. Here` two. **Three.** Four [five\nsix](a.md). And\nseven.\n\n"
    "- eight\n  nine\n- ten: Eleven\n\n| a | b |\n\n```sh\nnot this\n```\n"
  )
  found = [s for s in sentences(page) if s]
  assert found == [
    "A title",
    "One code two.",
    "**Three.",
    "Four five six.",
    "And seven.",
    "eight nine",
    "ten:",
    "Eleven",
  ]


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_sentences_have_at_most_40_words(page):
  long = [sentence for sentence in sentences(page.read_text()) if len(sentence.split()) > WORDS]
  assert not long, f"{named(page)}: {long[0]}"


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md"], ids=named)
def test_lines_of_prose_are_not_wider_than_the_code(page):
  wide = [n for n, line in prose(page.read_text()) if len(line) > WIDTH and " " in line.strip()[:WIDTH]]
  assert not wide, f"{named(page)}, lines {wide}"


def test_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_spelling():
  done = subprocess.run([sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


# ---- For contributors -----------------------------------------------------------------------------------------------


def test_citation_names_the_version_of_the_package():
  found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert found["version"] == jaxpref.__version__ and found["license"] == "Apache-2.0"
  assert {"cff-version", "message", "title", "authors"} <= set(found)


@pytest.mark.parametrize(
  "file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem
)
def test_issue_forms_can_be_read(file):
  found = yaml.safe_load(file.read_text())
  if file.stem != "config":
    assert {"name", "description", "body"} <= set(found)
    ids = [field["id"] for field in found["body"]]
    assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in found["body"])


def test_pre_commit_runs_what_the_environment_has():
  (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
  assert repository["repo"] == "local"
  for hook in repository["hooks"]:
    assert hook["entry"].startswith(".venv-test/bin/python ")
    for file in re.findall(r"\S+\.py", hook["entry"]):
      assert (ROOT / file).is_file()


def test_scripts_of_the_docs_say_what_they_do():
  for file in (ROOT / "scripts" / "docs").glob("*.py"):
    assert ast.get_docstring(ast.parse(file.read_text()))
