"""Lets the API pages read the package's docstrings; `mkdocs.yml` names this file."""

import re
from typing import Any

import griffe

# From a prompt to the next empty line.
EXAMPLE = re.compile(r"^([ ]*)>>> .*(?:\n(?![ ]*\n|[ ]*$).*)*", re.MULTILINE)
SECTION = re.compile(r"\n([ ]*(?:Args|Attributes|Returns|Raises|References|Yields):\n)")


def readable(text: str) -> str:
  """Returns a docstring with its examples in fences and an empty line before each section, as the parser wants it.

  >>> print(readable("Adds.\\n\\nReturns:\\n  The sum.\\nRaises:\\n  ValueError: never.\\n\\n>>> 1 + 1\\n2"))
  Adds.
  <BLANKLINE>
  <BLANKLINE>
  Returns:
    The sum.
  <BLANKLINE>
  Raises:
    ValueError: never.
  <BLANKLINE>
  ```pycon
  >>> 1 + 1
  2
  ```
  """
  fenced = EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
  return SECTION.sub(r"\n\n\1", fenced)


class Docstrings(griffe.Extension):
  """Makes every docstring that is read readable."""

  def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    if obj.docstring is not None:
      obj.docstring.value = readable(obj.docstring.value)
