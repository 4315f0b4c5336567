"""Paths as people write them: ~ is their home, wherever it stands on a command line or in a recipe."""

import os
from typing import Annotated

Place = Annotated[str, "a path"]  # the type of fields in which ~ is the home; they may also hold other names


def expand(path: str) -> str:
  """Returns a path with the home folder instead of ~ or ~USER at its beginning.

  >>> import os
  >>> expand("~/models") == os.path.join(os.path.expanduser("~"), "models")
  True
  >>> expand("models/~a")
  'models/~a'

  Raises:
    ValueError: there is no such user.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith("~"):
    user = path[1:].partition("/")[0]
    raise ValueError(
      f"{path}: there is no user {user!r} whose home it could be in; write ./{path} for this name itself."
    )
  return expanded


def same(before: object, now: object) -> bool:
  """Returns whether two recorded values are the same, NaN and NaN, too; an old one may still have its ~."""
  if before != before and now != now:
    return True
  return before == now or (isinstance(before, str) and os.path.expanduser(before) == now)
