"""Stacked layers: the parameters of scanned equal blocks have a leading axis, and one path for all blocks.

A stack is a module called `transformer_blocks` (all blocks of that name, from 0 on) or NAME.FIRST-LAST, such as
`transformer_blocks.0-12`: blocks 0 to 12 of a network whose other blocks differ from them.
"""

import re
from collections.abc import Sequence

# Modules that are stacks of layers although their name gives no range.
STACKS = ("transformer_blocks",)
_RANGE = re.compile(r"(.+)\.(\d+)-\d+")


def stack_name(name: str, layers: range) -> str:
  """Returns the name of the module that holds consecutive layers.

  >>> stack_name("transformer_blocks", range(0, 13))
  'transformer_blocks.0-12'
  """
  return f"{name}.{layers[0]}-{layers[-1]}"


def _stack(name: str) -> tuple[str, int] | None:
  """Returns the name of a stack's layers and the number of its first layer; None for other modules."""
  if name in STACKS:
    return name, 0
  match = _RANGE.fullmatch(name)
  return (match[1], int(match[2])) if match else None


def is_stacked(path: Sequence[str]) -> bool:
  """Returns whether the array at `path` has a leading axis of layers."""
  return any(_stack(name) for name in path)


def layer_path(path: Sequence[str], layer: int) -> tuple[str, ...]:
  """Returns `path` with the number of one layer in the name of its stack.

  Args:
    layer: index in the array's leading axis.
  """
  stacks = [_stack(name) for name in path]
  return tuple(
    name if stack is None else f"{stack[0]}.{stack[1] + layer}" for name, stack in zip(path, stacks, strict=True)
  )
