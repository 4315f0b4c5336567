"""Weighted means that add up exactly: pairs (sum, count) of arrays.

Pairs of micro-batches are added and divided once at the end, so a mean is never a mean of means. A pair of vectors is a
mean per bin (e.g. reward by timestep).
"""

import jax
import jax.numpy as jnp

Pairs = dict[str, tuple[jax.Array, jax.Array]]


def mean_of(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the pair (sum of weights * values, sum of weights) of f32[B] values; masked rows may hold NaN."""
  return jnp.sum(jnp.where(weights > 0, values, 0.0) * weights), jnp.sum(weights)


def binned_mean(values: jax.Array, weights: jax.Array, t: jax.Array, *, total: int, bins: int):
  """Returns `mean_of` in `bins` equal ranges of the time t [B] in [0, total]: a pair of f32[bins].

  A value that is not finite only spoils the mean of its own bin.
  """
  place = jnp.minimum((t * bins // total).astype(jnp.int32), bins - 1)
  counts = jax.nn.one_hot(place, bins) * weights[:, None]
  return jnp.sum(jnp.where(counts > 0, values[:, None] * counts, 0.0), axis=0), jnp.sum(counts, axis=0)


def add(a: Pairs, b: Pairs) -> Pairs:
  """Adds the pairs of two micro-batches."""
  return jax.tree.map(jnp.add, a, b)


def divide(pairs: Pairs) -> dict[str, jax.Array]:
  """Returns means; NaN where nothing was counted."""
  return {
    k: jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), jnp.nan) for k, (total, count) in pairs.items()
  }
