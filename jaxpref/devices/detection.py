"""Finds out from the environment how a launcher started this process together with others."""

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Launch:
  """How this process was started together with others; jax.distributed finds what is None.

  Attributes:
    launcher: its name, for messages.
    coordinator_address: HOST:PORT of process 0.
    num_processes: number of processes.
    process_id: number of this process.
    local_device_ids: devices of this machine that belong to this process; () for all it can see.
    detection: jax.distributed's name for a way to find what is None, or "deactivate".
  """

  launcher: str
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None
  detection: str | None = None


def detect(
  environment: Mapping[str, str],
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Launch | None:
  """Returns what the environment variables, and the flags of the same names, say about other processes of this run.

  Args:
    environment: the process's environment variables.
    coordinator_address, num_processes, process_id: values of the flags; they come first.
  Returns:
    The launch; None if the process is alone.
  Raises:
    ValueError: one sentence on what is missing or contradictory.
  """
  by_hand = (coordinator_address, num_processes, process_id)
  if by_hand != (None, None, None) or "JAX_NUM_PROCESSES" in environment or "JAX_PROCESS_ID" in environment:
    return _by_hand(environment, *by_hand)
  if _tpu_hosts() > 1:
    return Launch("TPU slice")
  for find in (_open_mpi, _slurm):
    launch = find(environment)
    if launch is not None:
      return launch
  if "JOB_COMPLETION_INDEX" in environment and "TPU_WORKER_HOSTNAMES" not in environment:
    raise ValueError(
      "this is a pod of an indexed Kubernetes Job (JOB_COMPLETION_INDEX is set), and nothing says how many pods make "
      "one run; set JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS as in scripts/launch/kubernetes_job.yaml, or give "
      "--distributed=false if each pod trains by itself."
    )
  return None


def _integer(environment: Mapping[str, str], name: str) -> int | None:
  """Returns an environment variable as a number; None if it is not set."""
  text = environment.get(name)
  if text is None:
    return None
  if not text.strip().isdecimal():
    raise ValueError(f"environment variable {name}={text!r}; expected a number.")
  return int(text)


def _by_hand(
  environment: Mapping[str, str], address: str | None, count: int | None, index: int | None
) -> Launch | None:
  address = address or environment.get("JAX_COORDINATOR_ADDRESS")
  count = _integer(environment, "JAX_NUM_PROCESSES") if count is None else count
  for name in ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"):
    index = _integer(environment, name) if index is None else index
  found = {"--coordinator_address": address, "--num_processes": count, "--process_id": index}
  if count is not None and count < 1:
    raise ValueError(f"--num_processes={count}; expected at least 1.")
  if count == 1 and index in (None, 0):
    return None
  missing = [name for name, value in found.items() if value is None]
  if missing:
    given = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
    raise ValueError(
      f"{given} without {' and '.join(missing)}; give all three on every process (or set JAX_COORDINATOR_ADDRESS, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID)."
    )
  assert address is not None and count is not None and index is not None
  if not re.fullmatch(r".+:\d+", address):
    raise ValueError(f"--coordinator_address={address}; expected HOST:PORT of process 0, such as 10.0.0.1:8476.")
  if not 0 <= index < count:
    raise ValueError(f"--process_id={index}; expected 0 to {count - 1}, as --num_processes={count}.")
  return Launch("by hand", address, count, index, detection="deactivate")


def _open_mpi(environment: Mapping[str, str]) -> Launch | None:
  count = _integer(environment, "OMPI_COMM_WORLD_SIZE")
  if count is None or count < 2:
    return None
  index, local = _integer(environment, "OMPI_COMM_WORLD_RANK"), _integer(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
  on_host = _integer(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
  devices = _local_devices(environment, on_host, local)
  if "OMPI_MCA_orte_hnp_uri" in environment:  # Open MPI 4: JAX reads the address from it
    return Launch("Open MPI", None, count, index, devices, detection="ompi")
  address = environment.get("JAX_COORDINATOR_ADDRESS")
  if address is None and on_host == count:
    job = environment.get("PMIX_NAMESPACE", "")
    address = f"localhost:{61440 + zlib.crc32(job.encode()) % 4096}"  # one port for each job
  if address is None:
    raise ValueError(
      f"Open MPI started {count} processes, but does not say on which host process 0 runs; set JAX_COORDINATOR_ADDRESS "
      "to its HOST:PORT (mpirun -x JAX_COORDINATOR_ADDRESS=...)."
    )
  return Launch("Open MPI", address, count, index, devices, detection="deactivate")


def _slurm(environment: Mapping[str, str]) -> Launch | None:
  """Returns the job step that srun started; JAX reads the job, which may have more tasks (a shell is a step of one)."""
  count = _integer(environment, "SLURM_STEP_NUM_TASKS")
  if count is None or count < 2:
    return None
  index, local = _integer(environment, "SLURM_PROCID"), _integer(environment, "SLURM_LOCALID")
  node = _integer(environment, "SLURM_NODEID") or 0
  on_host = _tasks_on_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"), node)
  return Launch("SLURM", None, count, index, _local_devices(environment, on_host, local), detection="slurm")


def _tasks_on_node(text: str, node: int) -> int:
  """Returns a node's number of tasks from SLURM's notation: "4(x2),1" means 4, 4, 1."""
  counts: list[int] = []
  for part in text.split(","):
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
    if match is None:
      raise ValueError(f"environment variable SLURM_STEP_TASKS_PER_NODE={text!r}; expected counts such as 4(x2),1.")
    counts += [int(match[1])] * int(match[2] or 1)
  return counts[min(node, len(counts) - 1)]


def _local_devices(environment: Mapping[str, str], on_host: int | None, local: int | None) -> tuple[int, ...] | None:
  """Returns one device for each of several processes on a machine, unless the launcher shows each only its own.

  JAX alone gives a single device even to a process that is alone on its machine.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environment:  # JAX reads it
    return None
  visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
  one_is_visible = bool(visible) and "," not in visible
  return () if on_host in (None, 1) or local is None or one_is_visible else (local,)


def _tpu_hosts() -> int:
  """Returns how many hosts this machine's TPU slices have, as JAX finds them; 1 on other machines."""
  from jax._src import clusters

  for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
    with contextlib.suppress(OSError):  # no metadata server
      if cluster.is_env_present():
        return cluster.get_process_count()
  return 1
