"""Converts and checks arrays for the functions of this folder: float32, written-out broadcasting, equal shapes."""

from typing import Any

import jax
import jax.numpy as jnp


def f32(x: jax.Array) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def expand(coefficient: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes [B] to [B, 1, ..., 1] of like's rank: broadcasting is always written out."""
  return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def check_same_shape(**arrays: jax.Array) -> None:
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) < 1:
    raise ValueError(f"expected arrays of one shape [B, ...], got {shapes}.")


def check_batch(**arrays: jax.Array) -> None:
  """Checks that [B] and [B, ...] arrays agree: one vector length, one sample shape."""
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  vectors = {s for name, s in shapes.items() if name in ("t", "prev_t", "std")}
  samples = {s for name, s in shapes.items() if name not in ("t", "prev_t", "std")}
  vector, sample = min(vectors), min(samples)
  if len(vectors) != 1 or len(samples) != 1 or len(vector) != 1 or vector != sample[:1]:
    raise ValueError(f"expected timesteps and std [B] and samples [B, ...], got {shapes}.")
