"""Trees of parameters for tests of files: drawn, compared with each other, and with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch


def draw(shapes):
  """Numbers that float16 and bfloat16 round differently, none of them 0 or 1."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.float32(0.1) * rng.standard_normal(x.shape, np.float32), shapes)


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def randomised(params):
  """No parameter at 0 or 1, where errors would hide; and none above float16's range."""
  rng = np.random.default_rng(0)

  def redraw(x):
    noise = rng.normal(size=x.shape).astype(np.float32)
    if x.ndim > 1:
      return jnp.asarray(noise * np.float32(np.prod(x.shape[:-1]) ** -0.5))
    start = np.zeros(x.shape, np.float32) if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x)
    return jnp.asarray(start + np.float32(0.2) * noise)

  return jax.tree.map(redraw, params)


def relative_error(found, expected):
  found, expected = np.asarray(found, np.float64), expected.detach().numpy().astype(np.float64)
  assert found.shape == expected.shape
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def nchw(x):
  return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
