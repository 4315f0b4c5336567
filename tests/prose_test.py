"""Checks how docstrings of the package begin, and how long its lines are."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ["jaxpref", "configs"]
MAX_WIDTH = 120
# Classes, modules and properties may begin with a noun; functions begin with a verb.
NOT_VERBS = {
  "A",
  "All",
  "An",
  "And",
  "As",
  "How",
  "It",
  "Of",
  "The",
  "These",
  "This",
  "Those",
  "What",
  "Where",
  "Which",
}


def is_public(name):
  return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def documented(tree, prefix=""):
  """Yields (name, kind, docstring) of each public module, class and function with a docstring, except local ones."""
  if isinstance(tree, ast.Module) and (text := ast.get_docstring(tree)):
    yield "the module", "module", text
  for node in tree.body:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not is_public(node.name):
      continue
    name = f"{prefix}{node.name}"
    if text := ast.get_docstring(node):
      properties = any("property" in ast.unparse(d) for d in node.decorator_list)
      kind = "class" if isinstance(node, ast.ClassDef) else "property" if properties else "function"
      yield name, kind, text
    if isinstance(node, ast.ClassDef):
      yield from documented(node, f"{name}.")


def bad_beginnings(source):
  """Returns the public names whose docstrings begin with a word that none should begin with."""
  found = []
  for name, kind, text in documented(ast.parse(source)):
    first = text.split(maxsplit=1)[0].rstrip(",;:.")
    if first == "Of" or (kind == "function" and first in NOT_VERBS):
      found.append(f"{name} begins with {first!r}")
  return found


def long_lines(text):
  """Returns the numbers of the lines that are wider than allowed."""
  return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > MAX_WIDTH]


FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_public_docstring_begins_with_a_verb(path):
  assert not bad_beginnings(path.read_text())


@pytest.mark.parametrize("path", [*FILES, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_wider_than_allowed(path):
  assert not long_lines(path.read_text())


@pytest.mark.parametrize(
  ("source", "found"),
  [
    ('"""Of a module."""', ["the module begins with 'Of'"]),
    ('class A:\n  """Of a thing."""', ["A begins with 'Of'"]),
    ('class A:\n  """A thing."""', []),
    ('class A:\n  def f(self):\n    """The number."""', ["A.f begins with 'The'"]),
    ('class A:\n  @property\n  def f(self):\n    """The number."""', []),
    ('def f():\n  """What it is."""', ["f begins with 'What'"]),
    ('def f():\n  """Returns it."""', []),
    ('def _f():\n  """Of it."""', []),
    ('def f():\n  def g():\n    """Of it."""', []),
  ],
)
def test_the_check_finds_bad_beginnings(source, found):
  assert bad_beginnings(source) == found


def test_the_check_finds_long_lines():
  assert long_lines("a" * 120 + "\n" + "b" * 121) == [2]
