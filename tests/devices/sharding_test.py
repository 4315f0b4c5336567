"""Meshes, specs of parameters, and batches that must divide."""

import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxpref.devices import sharding
from jaxpref.models import attention, clip, presets
from jaxpref.planning import flops, hlo


def mesh_of(data, fsdp, tensor):
  return sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def test_one_size_is_inferred():
  assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert dict(sharding.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((3, 1, 1), "data=3 x fsdp=1 x tensor=1 does not cover 8 devices.*-1 infers"),
    ((-1, 3, 1), "fsdp=3 x tensor=1 does not cover 8 devices"),
    ((-1, -1, 1), "at most one -1"),
    ((0, 8, 1), "must be positive"),
  ],
)
def test_meshes_that_cannot_be(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(*sizes)


TREE = {
  "unet": {
    "down_blocks.0": {
      "attn1": {
        "to_q": {"kernel": (128, 256)},
        "to_out.0": {"kernel": (256, 128), "bias": (128,)},
      },
      "ff": {"net.0": {"proj": {"kernel": (128, 512)}}, "net.2": {"kernel": (512, 128)}},
      "conv1": {"kernel": (3, 3, 128, 256)},
      "conv_odd": {"kernel": (3, 3, 255, 129)},
    },
    "small": {"kernel": (64, 64)},
  }
}


def specs(mesh, tree=TREE, **kwargs):
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda s: isinstance(s, tuple))
  found = sharding.tree_shardings(mesh, shapes, **kwargs)
  return {
    sharding.path_name(path).removeprefix("unet/down_blocks.0/"): s.spec
    for path, s in jax.tree_util.tree_leaves_with_path(found)
  }


def test_parameters_split_over_fsdp_along_their_largest_axis():
  found = specs(mesh_of(1, 4, 1))
  assert found["conv1/kernel"] == PartitionSpec(None, None, None, "fsdp")
  assert found["attn1/to_q/kernel"] == PartitionSpec("fsdp", "tensor")
  assert found["conv_odd/kernel"] == PartitionSpec()  # nothing divides by 4
  assert found["unet/small/kernel"] == found["attn1/to_out.0/bias"] == PartitionSpec()


def test_tensor_parallel_pairs_columns_with_rows():
  """The second of two projections is split along the axis that the first one's output is."""
  found = specs(mesh_of(1, 2, 2))
  assert found["attn1/to_q/kernel"] == PartitionSpec("fsdp", "tensor")
  assert found["attn1/to_out.0/kernel"] == PartitionSpec("tensor", "fsdp")
  assert found["ff/net.0/proj/kernel"] == PartitionSpec("fsdp", "tensor")
  assert found["ff/net.2/kernel"] == PartitionSpec("tensor", "fsdp")


def test_on_one_device_nothing_is_split():
  tree = {"a": jnp.arange(2.0**15), "b": jnp.ones((3, 3))}
  placed = sharding.put_tree(mesh_of(1, 1, 1), tree)
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))


def test_optimiser_state_is_split_like_its_parameters():
  """Paths end alike, so the same rules apply to Adam's moments."""
  found = specs(mesh_of(1, 4, 1), {"opt_state": {"mu": TREE, "nu": TREE}, "params": TREE})
  by_end = {}
  for name, spec in found.items():
    by_end.setdefault(name.rpartition("unet/")[2], set()).add(spec)
  assert len(by_end) == 8 and all(len(s) == 1 for s in by_end.values())


def test_values_survive_placement():
  tree = {"conv1": {"kernel": np.arange(3 * 3 * 64 * 32, dtype=np.float32).reshape(3, 3, 64, 32)}}
  placed = sharding.put_tree(mesh_of(2, 2, 2), tree)
  kernel = placed["conv1"]["kernel"]
  assert not kernel.sharding.is_fully_replicated
  np.testing.assert_array_equal(kernel, tree["conv1"]["kernel"])


def test_batches_are_split_over_data_and_fsdp():
  batch = {"pixels": np.arange(32.0).reshape(8, 4), "label_0": np.arange(8.0)}
  placed = sharding.put_batch(mesh_of(2, 2, 1), batch)
  for name, value in placed.items():
    np.testing.assert_array_equal(value, batch[name])
    assert {s.data.shape[0] for s in value.addressable_shards} == {2}


@pytest.mark.parametrize(
  ("batch_size", "accumulation", "message"),
  [
    (6, 1, r"batch_size=6 .*data=2 x fsdp=2 .*multiple of 4, e.g. 4 or 8"),
    (12, 2, r"accumulation=2; use a multiple of 8, e.g. 8 or 16"),
    (3, 1, r"multiple of 4, e.g. 4\."),
    (0, 1, "multiple of 4"),
  ],
)
def test_batches_that_do_not_divide_are_refused(batch_size, accumulation, message):
  with pytest.raises(ValueError, match=message):
    sharding.check_batch_size(mesh_of(2, 2, 1), batch_size, accumulation)


def test_batches_that_divide():
  sharding.check_batch_size(mesh_of(2, 2, 1), 8)
  sharding.check_batch_size(mesh_of(1, 1, 2), 3)  # tensor parallel devices share a batch
  sharding.check_batch_size(mesh_of(2, 1, 1), 8, 4)


# ---- Kernels are gathered where they are used ------------------------------------------------------------------


def stack_of_blocks():
  """A transformer of two blocks of 128 channels, ShapeDtypeStructs of its parameters and of x, context."""
  model = attention.Transformer2DModel(4, 2, True, 32)
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 8, 8, 128), (8, 7, 64))]
  return model, jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"], inputs


def sent(mesh, function):
  """Bytes that a device sends for a step with the gradients of parameters and inputs, by kind of collective."""
  model, params, inputs = stack_of_blocks()
  where, rows = sharding.tree_shardings(mesh, params), sharding.batch_sharding(mesh)
  place = lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to)
  loss = lambda p, x, c: jnp.sum(model.apply({"params": p}, x, c) ** 2)
  arguments = jax.tree.map(place, params, where), *(place(x, rows) for x in inputs)
  step = jax.jit(function(jax.grad(loss, argnums=(0, 1, 2))), out_shardings=(where, rows, rows))
  text = step.lower(*arguments).compile().as_text()
  return {kind: found["bytes"] for kind, found in hlo.collective_bytes(text).items()}


def test_a_stack_sends_its_kernels_once_a_use_and_their_gradients_once():
  """A device sends its quarter to 3 others, once for the forward and once for the backward pass."""
  mesh = mesh_of(1, 4, 1)
  kernels = [k.size * 4 for k in jax.tree.leaves(stack_of_blocks()[1]) if k.size >= sharding.MIN_FSDP_SIZE]
  found = sent(mesh, functools.partial(sharding.on_mesh, mesh))
  assert found.pop("all-reduce") < 0.02 * sum(kernels)  # biases and norms
  once = sum(kernels) * 3 / 4
  assert found == pytest.approx({"all-gather": 2 * once, "reduce-scatter": once}, rel=0.03)
  # Left to itself, the compiler sends several times as much.
  assert sum(found.values()) < 0.4 * sum(sent(mesh, lambda step: step).values())


def test_gathered_layers_compute_the_same():
  model, shapes, inputs = stack_of_blocks()
  mesh = mesh_of(2, 2, 1)
  keys = iter(jax.random.split(jax.random.key(0), 100))
  params = jax.tree.map(lambda s: 0.1 * jax.random.normal(next(keys), s.shape), shapes)
  x, context = (jax.random.normal(next(keys), s.shape) for s in inputs)

  def step(params, x, context):
    return jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, x, context) ** 2))(params)

  expected = jax.jit(step)(params, x, context)
  rows = jax.device_put((x, context), sharding.batch_sharding(mesh))
  found = jax.jit(sharding.on_mesh(mesh, step))(sharding.put_tree(mesh, params), *rows)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, jax.device_get(found), jax.device_get(expected))
  # A batch that cannot be split is computed by all.
  found = jax.jit(sharding.on_mesh(mesh, step))(sharding.put_tree(mesh, params), x[:3], context[:3])
  jax.tree.map(close, jax.device_get(found), jax.device_get(jax.jit(step)(params, x[:3], context[:3])))


def test_gathered_layers_have_the_same_operations():
  """Those of all devices together: none of them computes a product again."""
  model, params, (x, context) = stack_of_blocks()
  step = jax.grad(lambda p, x, c: jnp.sum(model.apply({"params": p}, x, c) ** 2))
  on_four = sharding.on_mesh(mesh_of(2, 2, 1), step)
  assert flops.count(on_four, params, x, context) == flops.count(step, params, x, context) > 1e9


def test_gathering_follows_the_rules_of_tensor_parallelism():
  """Each layer's `tensor_axis` is the axis that the rules split."""
  seen = {}

  def record(next_fun, args, kwargs, context):
    product = getattr(context.module, "dot_general", None)
    if isinstance(context.module, nn.Dense) and isinstance(product, functools.partial):
      seen["/".join(context.module.path)] = product.keywords["tensor_axis"]
    return next_fun(*args, **kwargs)

  model, _, inputs = stack_of_blocks()
  text = clip.CLIPTextModel(presets.SD15_MINIATURE.text_encoder)
  with nn.intercept_methods(record):
    shapes = {
      **jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"],
      **jax.eval_shape(text.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16), jnp.int32))["params"],
    }
  with mock.patch.object(sharding, "MIN_FSDP_SIZE", 1):
    found = sharding.tree_shardings(mesh_of(1, 2, 2), shapes)
  rules = {sharding.path_name(path): tuple(s.spec) for path, s in jax.tree_util.tree_leaves_with_path(found)}
  assert len(seen) > 10
  for name, axis in seen.items():
    spec = rules[f"{name}/kernel"][-2:]
    assert (spec.index("tensor") if "tensor" in spec else None) == axis, name


def test_without_a_mesh_kernels_are_left_alone():
  kernel = jnp.ones((4, 4))
  products = functools.partial(sharding.apply_gathered, lambda x, kernel: (x, kernel))
  for function in (products, sharding.on_mesh(mesh_of(8, 1, 1), products)):
    assert function(kernel, kernel) == (kernel, kernel)


def processes_mesh(sizes, process_of_device):
  """What `batch_part` looks at, of devices that belong to several processes."""
  devices = np.array([types.SimpleNamespace(process_index=p) for p in process_of_device]).reshape(sizes)
  return types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, sizes, strict=True)))


@pytest.mark.parametrize(
  ("sizes", "process_of_device", "parts"),
  [
    ((8, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3), [0, 1, 2, 3]),
    ((1, 4, 2), (0, 0, 1, 1, 2, 2, 3, 3), [0, 1, 2, 3]),
    ((2, 1, 4), (0, 0, 1, 1, 2, 2, 3, 3), [0, 0, 1, 1]),  # a row is spread over two processes, which both read it
    ((2, 1, 2), (0, 1, 2, 3), [0, 0, 1, 1]),
    ((1, 1, 4), (0, 1, 2, 3), [0, 0, 0, 0]),
    ((4, 1, 1), (1, 0, 1, 0), [1, 0]),  # in the order of the rows, whatever the processes' numbers
  ],
)
def test_processes_read_the_rows_of_their_devices(sizes, process_of_device, parts):
  mesh = processes_mesh(sizes, process_of_device)
  assert [sharding.batch_part(mesh, p) for p in sorted(set(process_of_device))] == [
    (part, len(set(parts))) for part in parts
  ]


def test_processes_that_share_only_some_rows_are_refused():
  with pytest.raises(ValueError, match="tensor=2 spreads rows of a batch over parts of processes"):
    sharding.batch_part(processes_mesh((3, 1, 2), (0, 0, 0, 1, 1, 1)), 0)
