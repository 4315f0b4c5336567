"""Group normalisation against float64, and GEGLU's gradient against that of jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import attention
from jaxpref.models.resnet import GroupNorm


def normalised(x, groups, epsilon):
  """In float64, [B, h, w, C]."""
  x = np.asarray(x, np.float64).reshape(*x.shape[:-1], groups, -1)
  x = x - x.mean((1, 2, 4), keepdims=True)
  return (x / np.sqrt(np.square(x).mean((1, 2, 4), keepdims=True) + epsilon)).reshape(*x.shape[:-2], -1)


@pytest.mark.parametrize(
  # Of one unit in the last place of the result, at 4 and above; float32's error grows with the mean.
  ("dtype", "bound"),
  [(jnp.float32, 5e-5), (jnp.bfloat16, 2**-7 * 4), (jnp.float16, 2**-10 * 4)],
)
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
def test_group_norm_is_that_of_its_rounded_input(dtype, bound, mean):
  """Also where the mean is a hundred standard deviations, most of which half precision has rounded away."""
  x = (mean + jax.random.normal(jax.random.key(0), (2, 16, 16, 8)) * jnp.arange(1, 9).reshape(1, 1, 1, 8)).astype(dtype)
  layer = GroupNorm(num_groups=4, epsilon=1e-5, dtype=dtype)
  found = layer.apply(layer.init(jax.random.key(1), x), x)
  assert found.dtype == dtype
  np.testing.assert_allclose(np.asarray(found, np.float64), normalised(x, 4, 1e-5), atol=bound)


def test_group_norm_in_half_precision_has_no_negative_variance():
  x = jnp.full((1, 4, 4, 4), 300.0, jnp.bfloat16)
  layer = GroupNorm(num_groups=2, epsilon=1e-5, dtype=jnp.bfloat16)
  params = layer.init(jax.random.key(0), x)
  found, gradient = jax.value_and_grad(lambda x: jnp.sum(layer.apply(params, x).astype(jnp.float32)))(x)
  assert np.isfinite(found) and np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_gradients_of_group_norm_in_half_precision_are_those_in_float32():
  x = (2 + jax.random.normal(jax.random.key(0), (2, 8, 8, 8))).astype(jnp.bfloat16)
  target = jax.random.normal(jax.random.key(1), x.shape)
  layer = GroupNorm(num_groups=4, epsilon=1e-5, dtype=jnp.float32)
  params = layer.init(jax.random.key(2), x)
  loss = lambda params, x: jnp.sum(layer.apply(params, x) * target)
  ours = jax.grad(loss, argnums=(0, 1))(params, x)
  theirs = jax.grad(loss, argnums=(0, 1))(params, x.astype(jnp.float32))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), ours[0], theirs[0])
  np.testing.assert_allclose(np.asarray(ours[1], np.float32), theirs[1], atol=0.02)


def test_geglu_has_the_gradient_of_its_formula():
  y = jax.random.normal(jax.random.key(0), (2, 3, 10))
  formula = lambda y: attention._gated(*jnp.split(y, 2, axis=-1))
  np.testing.assert_array_equal(attention._geglu(y), formula(y))
  weight = jax.random.normal(jax.random.key(1), (2, 3, 5))
  ours, theirs = (jax.jit(jax.grad(lambda y, f=f: jnp.sum(f(y) * weight)))(y) for f in (attention._geglu, formula))
  np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
