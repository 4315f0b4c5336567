"""Lists names in messages."""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence

SHOWN = 5  # names of a list in a message


def listed(names: Iterable[str]) -> str:
  """Returns the first names, separated by commas, and how many more there are.

  >>> listed("abc")
  'a, b, c'
  >>> listed("abcdefgh")
  'a, b, c, d, e and 3 more'
  """
  found = list(names)
  more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
  return ", ".join(found[:SHOWN]) + more


def write_list(lists: Mapping[str, Sequence[str]]) -> str:
  """Writes all names of some lists to a new temporary file, one per line under their headings; returns its path."""
  handle, path = tempfile.mkstemp(prefix="jaxpref-names-", suffix=".txt")
  with os.fdopen(handle, "w", encoding="utf-8") as file:
    for heading, names in lists.items():
      file.write("\n".join([f"{heading} {len(names)}:", *names]) + "\n\n")
  return path
