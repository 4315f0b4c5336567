"""What TPU chips and GPUs can do, the least time a step takes on one, and XLA's options for a CPU."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

GIB = 2.0**30
GPU_SHARE = 0.92  # share of a GPU's memory that main.py asks JAX to take; JAX's default is 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of TPU or GPU.

  Attributes:
    flops: peak of matrix products in bfloat16, operations per second.
    capacity: bytes of HBM.
    memory: bytes of HBM traffic per second.
    interconnect: bytes per second that a chip can send to its neighbours, over all its links together.
    shapes: the topologies that Google rents, up to 256 chips; () for a GPU.
    gpu: what XLA must know to compile for an absent GPU; None for a TPU.
  """

  flops: float
  capacity: float
  memory: float
  interconnect: float
  shapes: tuple[str, ...] = ()
  gpu: "Gpu | None" = None

  @property
  def usable(self) -> float:
    """Bytes of HBM that a training step can use."""
    return self.capacity * (GPU_SHARE if self.gpu else 1.0)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU with CUDA.

  Attributes:
    name: the driver's name for it.
    capability: compute capability; "9.0a" includes the instructions of that architecture alone.
    cores: streaming multiprocessors.
    clock: GHz.
    l2: bytes of the L2 cache.
    shared: bytes of a core's shared memory; a block can use all but 1 KiB.
    threads: threads of a core.
  """

  name: str
  capability: str
  cores: int
  clock: float
  l2: int
  shared: int
  threads: int

  def target_config(self, chip: Chip) -> str:
    """Returns the GPU as XLA reads it: the text of the protocol buffer stream_executor.GpuTargetConfigProto."""
    major, minor = self.capability.rstrip("a").split(".")
    extension = "ACCELERATED_FEATURES" if self.capability.endswith("a") else "NONE"
    device = {
      "threads_per_block_limit": 1024,
      "threads_per_warp": 32,
      "shared_memory_per_block": 49152,
      "shared_memory_per_core": self.shared,
      "shared_memory_per_block_optin": self.shared - 1024,
      "threads_per_core_limit": self.threads,
      "core_count": self.cores,
      "fpus_per_core": 128 if float(f"{major}.{minor}") > 8.0 else 64,
      "block_dim_limit_x": 2**31 - 1,
      "block_dim_limit_y": 65535,
      "block_dim_limit_z": 65535,
      "thread_dim_limit_x": 1024,
      "thread_dim_limit_y": 1024,
      "thread_dim_limit_z": 64,
      "registers_per_core_limit": 65536,
      "registers_per_block_limit": 65536,
      "memory_bandwidth": int(chip.memory),
      "l2_cache_size": self.l2,
      "clock_rate_ghz": self.clock,
      "device_memory_size": int(chip.capacity),
      "cuda_compute_capability": f"{{ major: {major} minor: {minor} feature_extension: {extension} }}",
      "driver_version": '"13.0.0"',
      "runtime_version": '"12.9.0"',
      "compile_time_toolkit_version": '"12.9.0"',
      "dnn_version": '"9.10.0"',
    }
    fields = "\n".join(f"{key}{'' if str(value).startswith('{') else ':'} {value}" for key, value in device.items())
    lines = [f"gpu_device_info {{\n{fields}\n}}", 'platform_name: "CUDA"', f'device_description_str: "{self.name}"']
    return "\n".join([*lines, "dnn_version_info { major: 9 minor: 10 patch: 0 }\n"])


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
# https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p-training and /v6e: peak compute, HBM, and "bidirectional
# inter-chip interconnect bandwidth (per chip)" of 400, 1,200 and 800 GB/s, half of it outgoing. They do not give v4's:
# six links of 50 GB/s each way by arXiv 2304.01433, Table 4.
CHIPS: dict[str, Chip] = {
  "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9, _CUBES),
  "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _FLAT),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _CUBES),
  "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, _FLAT),
  # NVIDIA's data sheets of A100, H100, H200 (SXM; dense, half of the NVLink bandwidth is outgoing) and of the Ada
  # architecture (with accumulation in float32; PCIe 4.0 x16). Capacity is what the driver leaves to programs.
  "a100-40": Chip(
    312e12, 39.4 * GIB, 1555e9, 300e9, gpu=Gpu("NVIDIA A100-SXM4-40GB", "8.0", 108, 1.41, 40 * 2**20, 167936, 2048)
  ),
  "a100-80": Chip(
    312e12, 79.1 * GIB, 2039e9, 300e9, gpu=Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 1.41, 40 * 2**20, 167936, 2048)
  ),
  "h100": Chip(
    989e12, 79.1 * GIB, 3352e9, 450e9, gpu=Gpu("NVIDIA H100 80GB HBM3", "9.0a", 132, 1.98, 50 * 2**20, 233472, 2048)
  ),
  "h200": Chip(989e12, 139.7 * GIB, 4800e9, 450e9, gpu=Gpu("NVIDIA H200", "9.0a", 132, 1.98, 50 * 2**20, 233472, 2048)),
  "rtx4090": Chip(
    165e12, 23.5 * GIB, 1008e9, 32e9, gpu=Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 2.52, 72 * 2**20, 102400, 1536)
  ),
}


def least_seconds(chip: Chip, *, flop: float, memory_bytes: float, collective_bytes: float) -> dict[str, float]:
  """Returns the seconds that each resource of a chip is busy at its peak; a step takes at least the longest.

  Args:
    flop, memory_bytes, collective_bytes: one chip's operations, bytes to and from HBM, and bytes to other chips.

  Returns:
    `compute`, `memory`, `interconnect`.

  >>> least_seconds(CHIPS["v5e"], flop=197e12, memory_bytes=0, collective_bytes=100e9)
  {'compute': 1.0, 'memory': 0.0, 'interconnect': 0.5}
  """
  return {
    "compute": flop / chip.flops,
    "memory": memory_bytes / chip.memory,
    "interconnect": collective_bytes / chip.interconnect,
  }


def bound(seconds: Mapping[str, Any]) -> str:
  """Returns the resource that takes longest."""
  return max(seconds, key=lambda name: seconds[name])


def program_bytes(compiled: Any) -> dict[str, int]:
  """Returns what a compiled program takes of each device.

  Returns:
    Bytes of its `arguments`, `temporaries`, `output` that does not reuse an argument's memory, and their sum `peak`; {}
    if the device's compiler does not say.
  """
  memory = compiled.memory_analysis()
  if memory is None:
    return {}
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = arguments + temporaries + output
  return {"arguments": arguments, "temporaries": temporaries, "output": output, "peak": peak}


@functools.cache
def compiler_options() -> dict[str, Any] | None:
  """Returns the options of `jax.jit` for networks on this machine's devices; None, XLA's defaults, except on CPUs.

  On CPUs they turn off YNNPACK, whose convolutions and matrix products are slower here than XLA's others
  (docs/results/benchmarks.md) and are prepared again at every start. If the compiler has no such option, None.
  """
  import jax

  options: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda: 0).lower().compile(options)
  except jax.errors.JaxRuntimeError:
    return None
  return options
