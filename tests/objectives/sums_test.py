"""Means that add up exactly."""

import jax.numpy as jnp
import numpy as np

from jaxpref.objectives import sums
from tests.stub_model import draw


def test_parts_of_a_batch_add_up_to_the_whole():
  """Three parts of different sizes and masks: not the mean of three means."""
  values = draw(0, 12)
  weights = np.float32([1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
  parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
  total = {"m": sums.mean_of(jnp.zeros(1), jnp.zeros(1))}
  for part in parts:
    total = sums.add(total, {"m": sums.mean_of(values[part], jnp.asarray(weights[part]))})
  found = sums.divide(total)["m"]
  np.testing.assert_allclose(found, values[weights > 0].mean(), rtol=1e-6)
  means = [values[p][weights[p] > 0].mean() for p in (parts[0], parts[2])]
  assert abs(found - np.mean(means)) > 1e-3


def test_masked_rows_may_hold_nan():
  values = jnp.asarray([1.0, np.nan, np.inf, 3.0])
  pair = sums.mean_of(values, jnp.asarray([1.0, 0.0, 0.0, 1.0]))
  assert sums.divide({"m": pair})["m"] == 2.0


def test_bins_hold_the_mean_of_their_timesteps():
  t = np.arange(0, 1000, 7)
  values, weights = draw(1, len(t)), (np.arange(len(t)) % 3 > 0).astype(np.float32)
  totals, counts = sums.binned_mean(jnp.asarray(values), jnp.asarray(weights), jnp.asarray(t), total=1000, bins=10)
  for b in range(10):
    inside = (t >= 100 * b) & (t < 100 * (b + 1)) & (weights > 0)
    assert counts[b] == inside.sum()
    np.testing.assert_allclose(totals[b], values[inside].sum(), rtol=1e-4, atol=1e-5)
