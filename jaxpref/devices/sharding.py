"""The mesh, shardings and the placement of batches: the only module that knows where arrays live.

A mesh has the axes `data`, `fsdp` and `tensor`. Batches are split over `data` x `fsdp`; parameters are
split over `fsdp` (their largest divisible axis) and, if a rule says so, over `tensor`.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The first match wins. The value is a PartitionSpec of the last axes (stacked layers have one more in front) or "fsdp"
# (split the largest divisible axis).
DEFAULT_RULES: tuple[tuple[str, Any], ...] = (
  (r"(to_q|to_k|to_v|q_proj|k_proj|v_proj|fc1|net\.0/proj)/kernel$", PartitionSpec("fsdp", "tensor")),
  (r"(to_out\.0|out_proj|fc2|net\.2)/kernel$", PartitionSpec("tensor", "fsdp")),
  # The modulation and the text's output of the transformer of Stable Diffusion 3, and T5.
  (r"norm1(_context)?/linear/kernel$", PartitionSpec("fsdp", "tensor")),
  (r"to_add_out/kernel$", PartitionSpec("tensor", "fsdp")),
  (r"(SelfAttention/[qkv]|DenseReluDense/wi(_[01])?)/kernel$", PartitionSpec("fsdp", "tensor")),
  (r"(SelfAttention/o|DenseReluDense/wo)/kernel$", PartitionSpec("tensor", "fsdp")),
  (r".*", "fsdp"),
)

# Splitting smaller arrays costs more in collectives than it saves in memory.
MIN_FSDP_SIZE = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh over all devices with the axes data, fsdp and tensor; one size may be -1 (inferred).

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  # Process by process, so that a batch's rows have the same order whatever the number of processes.
  devices = sorted(jax.devices(), key=lambda d: d.process_index) if devices is None else list(devices)
  sizes = [data, fsdp, tensor]
  if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
    raise ValueError(
      f"mesh: sizes must be positive and at most one -1, found data={data}, fsdp={fsdp}, tensor={tensor}."
    )
  known = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if int(np.prod(sizes)) != len(devices):
    raise ValueError(
      f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not cover {len(devices)} devices; "
      "set config.mesh so that the product is the number of devices (-1 infers one size)."
    )
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its leading axis over data x fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_devices(mesh: Mesh) -> int:
  """Returns how many devices the rows of a batch are spread over."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_part(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
  """Returns (index, count): which part of every batch a process reads, and how many parts there are.

  Processes whose devices hold the same rows read the same part: `tensor` spreads a row over them.

  Args:
    process_index: this process by default.
  Raises:
    ValueError: the devices of a process hold some, but not all, rows of another process.
  """
  shards: dict[int, list[int]] = {}
  for shard, copies in enumerate(mesh.devices.reshape(batch_devices(mesh), -1)):
    for process in sorted({device.process_index for device in copies}):
      shards.setdefault(process, []).append(shard)
  parts = sorted({tuple(of_process) for of_process in shards.values()})
  if sum(map(len, parts)) != batch_devices(mesh) or len({len(part) for part in parts}) > 1:
    raise ValueError(
      f"mesh: tensor={mesh.shape['tensor']} spreads rows of a batch over parts of processes; set config.mesh.tensor to "
      "a divisor or a multiple of the devices of one process."
    )
  return parts.index(tuple(shards[jax.process_index() if process_index is None else process_index])), len(parts)


def path_name(path: Sequence[Any]) -> str:
  """Returns the slash-joined name of a pytree path, e.g. `unet/conv_in/kernel`."""
  return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _fsdp_spec(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  size = mesh.shape["fsdp"]
  axes = [i for i, n in enumerate(shape) if n % size == 0 and n >= size]
  if size == 1 or not axes or np.prod(shape) < MIN_FSDP_SIZE:
    return PartitionSpec()
  largest = max(axes, key=lambda i: shape[i])
  return PartitionSpec(*("fsdp" if i == largest else None for i in range(largest + 1)))


def tree_shardings(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, Any]] = DEFAULT_RULES) -> Any:
  """Returns NamedShardings for a pytree of arrays or ShapeDtypeStructs, from regex rules on the path.

  A rule that does not fit an array (too few axes, sizes that do not divide) falls back to "fsdp".
  """

  def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
    name = path_name(path)
    spec = next((spec for pattern, spec in rules if re.search(pattern, name)), "fsdp")
    if isinstance(spec, PartitionSpec):
      spec = PartitionSpec(*(None,) * (len(leaf.shape) - len(spec)), *spec)
      fits = len(spec) <= len(leaf.shape) and all(
        axis is None or leaf.shape[i] % mesh.shape[axis] == 0 for i, axis in enumerate(spec)
      )
      if fits and np.prod(leaf.shape) >= MIN_FSDP_SIZE:
        return NamedSharding(mesh, spec)
    return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(sharding, tree)


# ---- Inside of a step ------------------------------------------------------------------------------------------


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function to jit whose networks know the mesh; without it `apply_gathered` does nothing special."""

  @functools.wraps(function)
  def traced(*args: Any, **kwargs: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return traced


def apply_gathered(
  product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array, tensor_axis: int | None = None
) -> jax.Array:
  """Returns `product(x, kernel)` for a kernel split over `fsdp`: each device applies the whole kernel to its rows.

  The kernel is gathered just before, and again in the backward pass; its gradient is summed into each device's own
  part. A compiler left to itself moves activations between devices instead wherever they are smaller than the kernel.

  Args:
    product: linear in each argument, row by row: [B, ...], kernel -> [B, ...].
    x: [B, ...]; split over data x fsdp if that divides B.
    kernel: parameters of one layer, not of a stack, in the dtype of the computation.
    tensor_axis: the axis that `DEFAULT_RULES` split over `tensor`, if they do.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(AXES) <= set(mesh.axis_names) or mesh.shape["fsdp"] == 1:  # no mesh, or that of another program
    return product(x, kernel)
  if mesh.shape["tensor"] > 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
    split = tensor_axis is not None and kernel.shape[tensor_axis] % mesh.shape["tensor"] == 0
    whole = PartitionSpec(*("tensor" if split and i == tensor_axis else None for i in range(kernel.ndim)))
    return product(x, jax.lax.with_sharding_constraint(kernel, whole))
  spec = _fsdp_spec(kernel.shape, mesh)
  if tensor_axis is not None and kernel.shape[1 - tensor_axis] % mesh.shape["fsdp"] == 0:
    spec = PartitionSpec(*("fsdp" if i == 1 - tensor_axis else None for i in range(2)))

  @jax.checkpoint  # the backward pass keeps the part of the kernel, not the whole one
  def of_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if "fsdp" in spec:
      kernel = jax.lax.all_gather(kernel, "fsdp", axis=spec.index("fsdp"), tiled=True)
    return product(x, kernel)

  rows = PartitionSpec(("data", "fsdp"))
  return jax.shard_map(of_rows, mesh=mesh, in_specs=(rows, spec), out_specs=rows, check_vma=False)(x, kernel)


# ---- Batches ---------------------------------------------------------------------------------------------------


def check_batch_size(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
  """Raises for a batch that the mesh cannot split evenly.

  Raises:
    ValueError: names the sizes and the nearest batch sizes that work.
  """
  unit = batch_devices(mesh) * accumulation
  if batch_size < 1 or batch_size % unit:
    lower = batch_size // unit * unit
    near = f"{lower} or {lower + unit}" if lower else f"{unit}"
    raise ValueError(
      f"config.batch_size={batch_size} cannot be split evenly over data={mesh.shape['data']} x "
      f"fsdp={mesh.shape['fsdp']} devices x accumulation={accumulation}; use a multiple of {unit}, e.g. {near}."
    )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Moves this process's part of a global batch (`batch_part`) to the devices, split over data x fsdp."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def put_tree(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, Any]] = DEFAULT_RULES) -> Any:
  """Moves a pytree of host or device arrays to its shardings on the mesh."""
  return jax.tree.map(jax.device_put, tree, tree_shardings(mesh, tree, rules))


def fetch(tree: Any) -> Any:
  """Returns whole arrays on the host; every process must call it."""
  return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)
