"""The networks of Stable Diffusion 3 on meshes: the same numbers, and layers that know what the rules split."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxpref.devices import sharding
from jaxpref.models import presets
from jaxpref.models.sd3.presets import SD35_MINIATURE
from jaxpref.models.sd3.transformer import SD3Transformer2DModel
from jaxpref.models.t5 import T5EncoderModel

CONFIG = dataclasses.replace(SD35_MINIATURE.transformer, num_layers=3, num_attention_heads=4, caption_projection_dim=32)


def mesh_of(data, fsdp, tensor):
  return sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


@pytest.fixture(scope="module", autouse=True)
def split_small_arrays():
  with mock.patch.object(sharding, "MIN_FSDP_SIZE", 1):
    yield


@pytest.fixture(scope="module")
def transformer():
  """A step, its arguments and its result on one device."""
  model = SD3Transformer2DModel(CONFIG, remat="block")
  params = presets.init_params(model, jax.random.key(0))
  rng = np.random.default_rng(0)
  shapes = ((4, 4, 4, 4), (4,), (4, 5, 48), (4, 40))
  inputs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

  def step(params, *inputs):
    return jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, *inputs) ** 2))(params)

  return step, params, inputs, jax.device_get(jax.jit(step)(params, *inputs))


def assert_close(found, expected):
  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

  jax.tree.map(close, jax.device_get(found), expected)


# All axes at once, and each alone.
ALONE = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((2, 2, 1), (1, 1, 2))]


@pytest.mark.parametrize("sizes", [(2, 2, 2), *ALONE], ids=str)
def test_the_transformer_computes_the_same_on_any_mesh(transformer, sizes):
  step, params, inputs, expected = transformer
  mesh = mesh_of(*sizes)
  placed = sharding.put_tree(mesh, params)
  split = placed["transformer_blocks.0-1"]["attn"]["to_add_out"]["kernel"].sharding.spec
  assert tuple(split) == (None, "tensor", "fsdp")
  rows = jax.device_put(inputs, sharding.batch_sharding(mesh))
  assert_close(jax.jit(sharding.on_mesh(mesh, step))(placed, *rows), expected)


def test_t5_computes_the_same_on_a_mesh():
  model = T5EncoderModel(SD35_MINIATURE.text_encoder_3)
  params = presets.init_params(model, jax.random.key(0))
  ids = np.arange(24, dtype=np.int32).reshape(4, 6)
  apply = lambda params, ids: model.apply({"params": params}, ids)
  expected = jax.device_get(jax.jit(apply)(params, ids))
  mesh = mesh_of(1, 2, 2)
  rows = jax.device_put(ids, sharding.batch_sharding(mesh))
  assert_close(jax.jit(sharding.on_mesh(mesh, apply))(sharding.put_tree(mesh, params), rows), expected)


@pytest.mark.parametrize("module", [SD3Transformer2DModel(CONFIG), T5EncoderModel(SD35_MINIATURE.text_encoder_3)])
def test_gathering_follows_the_rules_of_tensor_parallelism(module):
  """Each layer's `tensor_axis` is the axis that the rules split."""
  seen = {}

  def record(next_fun, args, kwargs, context):
    product = getattr(context.module, "dot_general", None)
    if isinstance(context.module, nn.Dense) and isinstance(product, functools.partial):
      seen["/".join(context.module.path)] = product.keywords["tensor_axis"]
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(record):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *presets.example_inputs(module))["params"]
  found = sharding.tree_shardings(mesh_of(1, 2, 2), shapes)
  rules = {sharding.path_name(path): tuple(s.spec) for path, s in jax.tree_util.tree_leaves_with_path(found)}
  assert len(seen) > 5 and {0, 1} <= set(seen.values())
  for name, axis in seen.items():
    spec = rules[f"{name}/kernel"][-2:]
    assert (spec.index("tensor") if "tensor" in spec else None) == axis, name
