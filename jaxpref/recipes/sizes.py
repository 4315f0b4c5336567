"""Sizes of images in pixels: one number for squares, or height and width."""

from collections.abc import Sequence
from typing import TypeAlias

Size: TypeAlias = int | tuple[int, int]  # side, or (height, width)
MAX_PIXELS = 2**14  # in a side


def sides(size: int | Sequence[int]) -> tuple[int, int]:
  """Returns height and width.

  >>> sides(64), sides((64, 32))
  ((64, 64), (64, 32))
  """
  height, width = (size, size) if isinstance(size, int) else size
  return height, width


def of_sides(height: int, width: int) -> Size:
  """Returns one number if height and width are equal, else both.

  >>> of_sides(64, 64), of_sides(64, 32)
  (64, (64, 32))
  """
  return height if height == width else (height, width)


def is_size(size: object, most: int = MAX_PIXELS) -> bool:
  """Returns whether a value is a side from 1 to `most`, or two of them."""
  pair = size if isinstance(size, tuple | list) else (size, size)
  return len(pair) == 2 and all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= most for n in pair)


def in_words(size: int | Sequence[int]) -> str:
  """Returns "HEIGHT x WIDTH".

  >>> in_words(64)
  '64 x 64'
  """
  return " x ".join(map(str, sides(size)))
