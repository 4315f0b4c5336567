"""Stacked layers: the parameters of scanned equal blocks have a leading axis, and one path for all blocks."""

from collections.abc import Sequence

# Modules that are stacks of layers.
STACKS = ("transformer_blocks",)


def is_stacked(path: Sequence[str]) -> bool:
  """Returns whether the array at `path` has a leading axis of layers."""
  return any(name in STACKS for name in path)


def layer_path(path: Sequence[str], layer: int) -> tuple[str, ...]:
  """Returns `path` with the number of one layer in the name of its stack."""
  return tuple(f"{name}.{layer}" if name in STACKS else name for name in path)
