"""Decisions that a test takes twice, in two kinds of arithmetic: only such that rounding cannot turn."""

import numpy as np


def above(values, threshold=0.0, *, margin):
  """Returns `values > threshold` as a numpy array.

  Raises:
    AssertionError: a value is within `margin` of the threshold, so the data of the test decides nothing there.
  """
  values = np.asarray(values)
  nearest = np.abs(values - threshold).min()
  assert nearest > margin, f"rounding may decide: a value is {nearest:.3g} from {threshold}; change the test's data"
  return values > threshold


def argmax(values, *, margin):
  """Returns the index of the largest along the last axis as a numpy array.

  Raises:
    AssertionError: the second is within `margin` of the largest somewhere.
  """
  values = np.asarray(values)
  second, first = np.moveaxis(np.sort(values, axis=-1)[..., -2:], -1, 0)
  nearest = (first - second).min()
  assert nearest > margin, f"rounding may decide: the largest two differ by {nearest:.3g}; change the test's data"
  return values.argmax(axis=-1)
