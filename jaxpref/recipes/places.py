"""Paths as people write them: ~ is their home, anywhere on a command line or in a recipe."""

import os
from typing import Annotated

Place = Annotated[str, "a path"]  # the type of fields in which ~ is expanded; they may also hold other names


def expand(path: str) -> str:
  """Returns a path with the home folder in place of ~ or ~USER at its beginning.

  >>> import os
  >>> expand("~/models") == os.path.join(os.path.expanduser("~"), "models")
  True
  >>> expand("models/~a")
  'models/~a'

  Raises:
    ValueError: the user does not exist.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith("~"):
    user = path[1:].partition("/")[0]
    raise ValueError(f"{path}: there is no user {user!r}; write ./{path} if the name itself begins with ~.")
  return expanded


def same(before: object, now: object) -> bool:
  """Returns whether two recorded values are the same; NaN equals NaN, and an old value may still have its ~."""
  if before != before and now != now:
    return True
  return before == now or (isinstance(before, str) and os.path.expanduser(before) == now)
