"""Several processes: how launchers are recognised, and true runs of two and four processes in which one goes away."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxpref.data import lease
from jaxpref.devices import detection, distributed
from jaxpref.training import metrics
from scripts.launch import heartbeats

REPOSITORY = pathlib.Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts" / "launch"

# ---------------------------------------------------------------------------------------------
# What the environment says. The variables are those of true jobs, without the many that say nothing here.

SLURM = {  # task 5 of `srun`, two nodes with four tasks each
  "SLURM_JOB_ID": "84231",
  "SLURM_JOB_NODELIST": "gpu[011-012]",
  "SLURM_JOB_NUM_NODES": "2",
  "SLURM_LOCALID": "1",
  "SLURM_NNODES": "2",
  "SLURM_NODEID": "1",
  "SLURM_NODELIST": "gpu[011-012]",
  "SLURM_NPROCS": "8",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "5",
  "SLURM_STEPID": "0",
  "SLURM_STEP_ID": "0",
  "SLURM_STEP_NODELIST": "gpu[011-012]",
  "SLURM_STEP_NUM_NODES": "2",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
  "SLURM_TASKS_PER_NODE": "4(x2)",
}
SLURM_NODES = SLURM | {  # one task on each of two nodes, all GPUs visible
  "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
  "SLURM_LOCALID": "0",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
  "SLURM_TASKS_PER_NODE": "1(x2)",
}
SLURM_SHELL = {  # an interactive shell of a job with eight tasks: a step of one
  "SLURM_JOB_ID": "84231",
  "SLURM_LOCALID": "0",
  "SLURM_NODEID": "0",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "0",
  "SLURM_STEP_ID": "4294967290",
  "SLURM_STEP_NODELIST": "gpu011",
  "SLURM_STEP_NUM_TASKS": "1",
  "SLURM_STEP_TASKS_PER_NODE": "1",
  "SLURM_TASKS_PER_NODE": "8",
}
SLURM_BATCH = {  # a batch script without srun
  "SLURM_JOB_ID": "84231",
  "SLURM_JOB_NODELIST": "gpu[011-012]",
  "SLURM_LOCALID": "0",
  "SLURM_NODEID": "0",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "0",
  "SLURM_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI_4 = {
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_COMM_WORLD_NODE_RANK": "0",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_MCA_orte_ess_num_procs": "4",
  "OMPI_MCA_orte_hnp_uri": "195559424.0;tcp://198.51.100.70:53997;tcp://10.10.10.4:53997",
  "OMPI_UNIVERSE_SIZE": "4",
}
OPEN_MPI_5 = {  # has no address in it
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_COMM_WORLD_NODE_RANK": "1",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_SIZE": "2",
  "PMIX_NAMESPACE": "prterun-node-7-20815@1",
  "PMIX_RANK": "1",
}
KUBERNETES = {  # a pod of scripts/launch/kubernetes_job.yaml
  "HOSTNAME": "dpo-sd15-1",
  "JAX_COORDINATOR_ADDRESS": "dpo-sd15-0.dpo-sd15:8476",
  "JAX_NUM_PROCESSES": "4",
  "JOB_COMPLETION_INDEX": "1",
  "KUBERNETES_SERVICE_HOST": "10.96.0.1",
  "KUBERNETES_SERVICE_PORT": "443",
}
GKE_TPU = {
  "JOB_COMPLETION_INDEX": "1",
  "KUBERNETES_SERVICE_HOST": "10.96.0.1",
  "TPU_TOPOLOGY": "4x4",
  "TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc,job-2.svc,job-3.svc",
  "TPU_WORKER_ID": "1",
}
Launch = detection.Launch


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({"PATH": "/usr/bin"}, None),
    (SLURM, Launch("SLURM", None, 8, 5, (1,), "slurm")),
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Launch("SLURM", None, 8, 5, (1,), "slurm")),
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, Launch("SLURM", None, 8, 5, (), "slurm")),  # --gpus-per-task=1
    (SLURM | {"ROCR_VISIBLE_DEVICES": "0"}, Launch("SLURM", None, 8, 5, (), "slurm")),
    (SLURM | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, Launch("SLURM", None, 8, 5, None, "slurm")),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,1"}, Launch("SLURM", None, 8, 5, (), "slurm")),
    (SLURM_NODES, Launch("SLURM", None, 2, 1, (), "slurm")),
    (SLURM_SHELL, None),
    (SLURM_BATCH, None),
    (OPEN_MPI_4, Launch("Open MPI", None, 4, 2, (0,), "ompi")),
    (OPEN_MPI_5, Launch("Open MPI", "localhost:61778", 2, 1, (1,), "deactivate")),
    (
      OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "4", "JAX_COORDINATOR_ADDRESS": "node-7:8476"},
      Launch("Open MPI", "node-7:8476", 4, 1, (1,), "deactivate"),
    ),
    (OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    (OPEN_MPI_4 | SLURM, Launch("Open MPI", None, 4, 2, (0,), "ompi")),  # mpirun in a SLURM job
    (KUBERNETES, Launch("by hand", "dpo-sd15-0.dpo-sd15:8476", 4, 1, None, "deactivate")),
    (KUBERNETES | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"}, None),
  ],
)
def test_launchers_are_recognised(environment, expected):
  assert detection.detect(environment) == expected


ONE_HOST = GKE_TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
  ("environment", "metadata", "several"),
  [
    (GKE_TPU, {}, True),
    (ONE_HOST, {}, False),
    (ONE_HOST | {"MEGASCALE_NUM_SLICES": "2"}, {}, True),
    ({}, {"worker-network-endpoints": "host-0,host-1", "agent-worker-number": "0"}, True),  # Compute Engine
    ({}, {"worker-network-endpoints": "host-0", "agent-worker-number": "0"}, False),
    ({}, None, False),
  ],
)
def test_tpu_slices_are_those_that_jax_finds(monkeypatch, environment, metadata, several):
  from jax._src.clusters import cloud_tpu_cluster

  def get_metadata(key):
    if metadata is None:
      raise ConnectionError("no such host")
    return metadata.get(key, ""), 200 if key in metadata else 404

  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # which JAX sets where it finds no chips
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert detection.detect(os.environ) == (Launch("TPU slice") if several else None)


def test_flags_come_before_the_launcher():
  flags = dict(coordinator_address="10.0.0.1:8476", num_processes=2, process_id=1)
  expected = Launch("by hand", "10.0.0.1:8476", 2, 1, None, "deactivate")
  for environment in ({}, SLURM, OPEN_MPI_4, GKE_TPU):
    assert detection.detect(environment, **flags) == expected
  assert detection.detect({}, coordinator_address="10.0.0.1:8476", num_processes=1, process_id=0) is None
  # What is the same everywhere by variables, what is not by a flag.
  shared = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2"}
  assert detection.detect(shared, process_id=1) == expected


@pytest.mark.parametrize(
  ("environment", "flags", "message"),
  [
    ({}, {"num_processes": 2}, r"--num_processes=2 without --coordinator_address and --process_id; give all three"),
    ({}, {"coordinator_address": "a:1"}, r"--coordinator_address=a:1 without --num_processes and --process_id"),
    ({}, {"coordinator_address": "a", "num_processes": 2, "process_id": 0}, r"=a; expected HOST:PORT"),
    ({}, {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, r"--process_id=2; expected 0 to 1"),
    ({"JAX_PROCESS_ID": "1"}, {}, r"--process_id=1 without --coordinator_address and --num_processes"),
    ({"JAX_NUM_PROCESSES": "two"}, {}, r"JAX_NUM_PROCESSES='two'; expected a number"),
    ({"JOB_COMPLETION_INDEX": "0"}, {}, r"indexed Kubernetes Job .* set JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS"),
    (OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "4"}, {}, r"does not say on which host process 0 runs; set JAX_COORDINATOR"),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "x"}, {}, r"SLURM_STEP_TASKS_PER_NODE='x'; expected counts"),
  ],
)
def test_what_does_not_fit_together_is_one_sentence(environment, flags, message):
  with pytest.raises(ValueError, match=message) as error:
    detection.detect(environment, **flags)
  assert "\n" not in str(error.value)


def test_jax_finds_the_coordinator_of_the_jobs_that_are_left_to_it(monkeypatch):
  """Its own detection, on the same variables: the address is that of the first node, the same for all tasks."""
  clusters = pytest.importorskip("jax._src.clusters")
  for environment, cluster, address in (
    (SLURM, clusters.SlurmCluster, "gpu011:63751"),
    (OPEN_MPI_4, clusters.OmpiCluster, "198.51.100.70:64128"),
  ):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    assert cluster.is_env_present()
    assert cluster.get_coordinator_address(timeout_secs=1, override_coordinator_port=None) == address


def test_distributed_false_starts_nothing(monkeypatch, tmp_path):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  launch = distributed.find_launch("false")
  with pytest.raises(OSError, match="of one's own"), distributed.joined(launch, tmp_path, expected=(OSError,)):
    assert launch is None
    raise OSError("of one's own")
  with pytest.raises(ValueError, match="--distributed=false contradicts --num_processes; leave out one"):
    distributed.find_launch("false", num_processes=2)


def test_flags_that_contradict_each_other_end_in_one_sentence(tmp_path):
  command = [sys.executable, "-m", "jaxpref.main", f"--config={REPOSITORY / 'configs' / 'dpo_tiny.py'}"]
  environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
  for flag, sentence in (
    ("--num_processes=2", "error: --num_processes=2 without --coordinator_address and --process_id; give all three"),
    ("--workdir=gs://bucket/run", "error: --workdir=gs://bucket/run: expected a folder; mount the bucket"),
    ("--distributed=maybe", "error: flag --distributed=maybe: value should be one of <auto|true|false>"),
  ):
    done = subprocess.run([*command, flag], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(sentence), done.stderr
  assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# How one leaves


class Client:
  """Of JAX's coordination service: what was set before, and None where process 0 is gone."""

  def __init__(self, values):
    self.values = values

  def key_value_set(self, key, value):
    if self.values is None or key in self.values:
      raise RuntimeError("ALREADY_EXISTS")
    self.values[key] = value

  def key_value_try_get(self, key):
    if self.values is None or key not in self.values:
      raise RuntimeError("NOT_FOUND")
    return self.values[key]


@pytest.fixture
def leave(monkeypatch, tmp_path, capsys):
  """A function of what is raised in process 1 of 2: (exit code, what it said, what it told the others)."""
  from jax._src import distributed as runtime

  (tmp_path / "checkpoints" / "40").mkdir(parents=True)
  monkeypatch.setattr(distributed, "join", lambda launch: None)
  monkeypatch.setattr(distributed, "SETTLE_SECONDS", 0)
  monkeypatch.setattr(distributed.os, "_exit", lambda code: sys.exit(f"exit code {code}"))
  monkeypatch.setattr(runtime.global_state, "process_id", 1)
  monkeypatch.setattr(runtime.global_state, "num_processes", 2)

  def leave(error, told=None):
    client = Client(told)
    monkeypatch.setattr(runtime.global_state, "client", client)
    with pytest.raises(SystemExit) as end:
      with distributed.joined(Launch("by hand"), tmp_path, expected=(ValueError,)):
        raise error
    return end.value.code, capsys.readouterr().err.strip(), client.values

  return leave


def test_whoever_is_interrupted_first_says_so_and_all_know(monkeypatch):
  from jax._src import distributed as runtime

  assert distributed.tell_interrupted() and not distributed.was_interrupted()  # alone
  monkeypatch.setattr(runtime.global_state, "client", Client({}))
  assert not distributed.was_interrupted()
  assert [distributed.tell_interrupted() for _ in range(2)] == [True, False]
  assert distributed.was_interrupted()
  monkeypatch.setattr(runtime.global_state, "client", Client(None))
  assert not distributed.tell_interrupted() and not distributed.was_interrupted()


ADVICE = "run the same command on all hosts again: it resumes at step 40."


def test_what_is_raised_is_said_and_told(leave):
  me = f"process 1 of 2 (host {socket.gethostname()})"
  said = "error: record 3 cannot be read."
  assert leave(ValueError("record 3 cannot be read."), {}) == (
    "exit code 1", said, {"jaxpref/failed": f"{me} failed: record 3 cannot be read"},
  )  # fmt: skip
  first = {"jaxpref/failed": "process 0 of 2 (host a) failed"}
  assert leave(ValueError("record 3 cannot be read."), dict(first)) == ("exit code 1", said, first)
  assert leave(ValueError("record 3 cannot be read.")) == ("exit code 1", said, None)
  code, said, _ = leave(TypeError("no sentence"), {})
  assert code == "exit code 1" and said.startswith("Traceback") and said.endswith("TypeError: no sentence")
  assert leave(SystemExit(0), {}) == (0, "", {})  # stopped by SIGTERM: JAX's exit barrier, as at any end
  assert leave(SystemExit(130), {}) == (130, "", {})  # by Ctrl-C, which all heard of
  told = {"jaxpref/interrupted": "1", "jaxpref/failed": f"{me} failed: it was interrupted"}
  assert leave(KeyboardInterrupt(), {}) == ("exit code 130", f"interrupted; {ADVICE}", told)
  assert leave(KeyboardInterrupt(), dict(told)) == ("exit code 130", "", told)  # another one has said so
  assert leave(SystemExit("error: a"), {})[0] == "exit code 1"


def test_what_breaks_off_after_ctrl_c_at_another_process_is_interrupted_too(leave):
  told = {"jaxpref/interrupted": "0"}
  code, said, _ = leave(ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), told)
  assert (code, said) == ("exit code 130", f"interrupted; {ADVICE}")
  assert leave(ValueError("record 3 cannot be read."), {"jaxpref/interrupted": "0"})[0] == "exit code 1"


@pytest.mark.parametrize(
  "text",
  [
    "UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error [127.0.0.1]:18151: Connection reset by peer",
    "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout",
    "UNAVAILABLE: Failed to send RPC to coordination service.\nCheck earlier logs",
    "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a network error",
  ],
)
def test_an_operation_between_processes_that_fails_is_the_fault_of_another_one(leave, text):
  first = text.splitlines()[0].rstrip(".")
  said = f"error: another process of this run has ended ({first}); {ADVICE}"
  for told in (None, {}):
    assert leave(ValueError(text), told) == (f"exit code {distributed.RUN_AGAIN}", said, told)
  told = {"jaxpref/failed": "process 0 of 2 (host a) failed: record 3 cannot be read"}
  said = f"error: process 0 of 2 (host a) failed: record 3 cannot be read; {ADVICE}"
  assert leave(ValueError(text), told) == (f"exit code {distributed.RUN_AGAIN}", said, told)


@pytest.mark.parametrize("text", ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: the compiler failed", "a barrier"])
def test_an_error_of_one_s_own_is_no_reason_to_start_again(leave, text):
  assert leave(RuntimeError(text), {})[0] == "exit code 1"


def test_without_a_checkpoint_no_step_is_named(tmp_path):
  assert distributed.advice(tmp_path) == "run the same command on all hosts again."


@pytest.mark.slow
def test_a_start_to_which_others_do_not_come():
  """JAX ends the process then."""
  program = """
from jaxpref.devices import detection, distributed
distributed.START_SECONDS, distributed.PATIENCE_SECONDS = 2, 0.5
distributed.join(detection.Launch("by hand", "localhost:{port}", 2, 0, detection="deactivate"))
"""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-c", program.replace("{port}", str(port))]
  environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(REPOSITORY))
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == -signal.SIGABRT
  assert (
    f"this process (by hand, number 0) waits for all 2 at localhost:{port}, up to 2 s; start the same command on every "
    "host, and see that the hosts reach that address."
  ) in done.stderr


# ---------------------------------------------------------------------------------------------
# True processes, on a toy objective


def hear_sigint():
  """In the background of a script it is ignored."""
  signal.signal(signal.SIGINT, signal.default_int_handler)


class Run:
  """The processes of a run of `toy_training.py`, started together."""

  def __init__(self, folder, count, *, steps, save_every=2, log=None, **variables):
    self.folder = folder
    with socket.socket() as free:
      free.bind(("localhost", 0))
      address = f"localhost:{free.getsockname()[1]}"
    environment = dict(
      os.environ,
      JAX_PLATFORMS="cpu",
      XLA_FLAGS="--xla_force_host_platform_device_count=1",
      PYTHONPATH=str(REPOSITORY),
      **{f"TOY_{name}": str(value) for name, value in variables.items()},
    )
    fields = {"num_steps": steps, "batch_size": 8, "logging.every": 2, "checkpoint.every": save_every}
    fields["optimizer.learning_rate"] = 0.1
    command = [sys.executable, str(REPOSITORY / "tests" / "toy_training.py")]
    command += [f"--config={REPOSITORY / 'configs' / 'dpo_tiny.py'}", f"--workdir={folder}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    group = [f"--coordinator_address={address}", f"--num_processes={count}"] if count > 1 else []
    self.logs = [folder.with_name(f"{log or folder.name}.{i}.log") for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      with log.open("w") as file:
        arguments = [*command, *group, *([f"--process_id={i}"] if group else [])]
        streams = dict(stdout=file, stderr=file, preexec_fn=hear_sigint)
        self.processes.append(subprocess.Popen(arguments, env=environment, cwd=folder.parent, **streams))

  def wait_for_step(self, step):
    """Until its checkpoint, or a later one, is there."""
    while not any(int(p.name) >= step for p in (self.folder / "checkpoints").glob("[0-9]*") if p.name.isdecimal()):
      assert all(p.poll() is None for p in self.processes), self.said()
      time.sleep(0.01)

  def said(self):
    """What each process printed, bars left out."""
    lines = [log.read_text().replace("\r", "\n").splitlines() for log in self.logs]
    return ["\n".join(line for line in of if line.strip() and "it/s" not in line) for of in lines]

  def end(self):
    """The exit codes, once all have ended."""
    return [p.wait(timeout=500) for p in self.processes]


def steps_of(folder):
  return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.mark.slow
def test_a_slow_process_shows_and_a_broken_one_ends_all(tmp_path):
  """The data of process 1 are slow, and those of step 13 are broken."""
  run = Run(tmp_path / "run", 2, steps=50, save_every=6, SLOW="1 0.4", BROKEN="1 13")
  assert run.end() == [distributed.RUN_AGAIN, 1], run.said()
  first, second = run.said()
  assert second.splitlines()[-1] == "error: record 13 cannot be read; mend it."
  assert first.splitlines()[-1] == (
    f"error: process 1 of 2 (host {socket.gethostname()}) failed: record 13 cannot be read; mend it; run the same "
    f"command on all hosts again: it resumes at step {max(steps_of(run.folder))}."
  )
  assert "Traceback" not in first + second
  rows = metrics.read(run.folder / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 4, 6, 8, 10, 12]
  usual = rows[5]  # others' batches were made while the step was compiled, or a checkpoint was saved
  assert usual["slowest_process"] == 1
  assert 0.1 < usual["host_seconds_max"] < 1.5 * usual["step_seconds"]
  assert usual["host_seconds_median"] < 0.75 * usual["host_seconds_max"]  # of two: their mean
  assert (run.folder / "config.json").exists() and not (run.folder / "export").exists()


@pytest.mark.slow  # training/loop_test.py and data/lease_test.py refuse it in one process
def test_a_second_start_in_the_folder_of_a_run_is_refused_in_all_its_processes(tmp_path):
  """And once the first one is killed, the same command goes on at once."""
  first = Run(tmp_path / "run", 1, steps=4000, PACE=0.1)
  first.wait_for_step(4)
  before = (tmp_path / "run" / "metrics.jsonl").read_text()
  second = Run(tmp_path / "run", 2, steps=4000, log="second")
  assert second.end() == [1, 1], second.said()
  there = json.loads((tmp_path / "run" / lease.NAME).read_text())
  assert there["pid"] == first.processes[0].pid and there["host"] == socket.gethostname()
  for said in second.said():
    assert said.splitlines()[-1].startswith(
      f"error: {tmp_path / 'run'} is being written by process {there['pid']} on host {there['host']}, which started "
      f"{there['since']}; wait until it ends or stop it, and run the same command again; or choose another folder."
    )
  assert first.processes[0].poll() is None
  assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)  # not rewound
  first.processes[0].kill()
  again = Run(tmp_path / "run", 1, steps=max(steps_of(first.folder)) + 4)
  assert again.end() == [0], again.said()
  assert f"took over from process {there['pid']} on host" in again.said()[0] and "resuming" in again.said()[0]
  steps = [row["step"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")]
  assert steps == sorted(set(steps)) and not (tmp_path / "run" / lease.NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("count", "gone"), [(2, 0), (2, 1), (4, 2)])
def test_a_process_that_is_lost_takes_the_others_with_it(tmp_path, count, gone, number):
  """Process 0 has JAX's coordination service in it."""
  run = Run(tmp_path / "run", count, steps=400, PACE=0.1)
  run.wait_for_step(4)
  run.processes[gone].send_signal(number)
  lost = time.monotonic()
  others = [p for i, p in enumerate(run.processes) if i != gone]
  codes = [p.wait(timeout=60) for p in others]
  assert time.monotonic() - lost < 30
  run.processes[gone].kill()
  assert run.processes[gone].wait() == -signal.SIGKILL
  assert set(codes) <= {distributed.RUN_AGAIN, -signal.SIGABRT}
  for i, said in enumerate(run.said()):
    if i != gone:
      assert re.search("error: another process of this run has ended|another task died", said), said
  again = Run(run.folder, count, steps=max(steps_of(run.folder)) + 2)
  assert again.end() == [0] * count, again.said()
  assert "resuming" in again.said()[0]


def test_the_table_of_those_who_end():
  ends = {1: {"code": 75, "seconds": 2.0}, 2: {"code": 134, "seconds": 3.0}}
  row = {"processes": 3, "event": "killed", "gone": 0, "doing": "a step", "ends": ends}
  never = row | {"gone": 2, "ends": {0: {"code": None, "seconds": 120}, 1: ends[1]}}
  assert heartbeats.table([row, never]).splitlines()[2:] == [
    "| process 0: killed | 3.0 s; code 134, 75 |",
    "| another one: killed | 120.0 s; code 75, none |",
  ]


@pytest.mark.slow
def test_all_others_end_soon_whatever_they_do(tmp_path):
  """As docs/operations.md says; what JAX does by itself when one raises is not held to it."""
  command = [sys.executable, SCRIPTS / "heartbeats.py", "--processes=2", "--out", tmp_path / "out"]
  subprocess.run([*command, "--events", "killed", "stopped", "raises"], check=True, timeout=1200)
  rows = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert len(rows) == 18
  for row in rows:
    for end in row["ends"].values():
      assert end["code"] in (distributed.RUN_AGAIN, 128 + signal.SIGABRT) and end["seconds"] < 60, row


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, before, after):
  """Then the run ends as one that was left alone, in which one process had all rows of the batches."""
  whole = Run(tmp_path / "whole", 1, steps=30)
  assert whole.end() == [0], whole.said()
  run = Run(tmp_path / "run", before, steps=30, PACE=0.2)
  run.wait_for_step(4)
  run.processes[-1].terminate()
  assert run.end() == [0] * before, run.said()
  stopped = max(steps_of(run.folder))
  assert f"stopped at step {stopped} by a signal; the same command resumes." in run.said()[0]
  assert stopped < 30 and not (run.folder / "export").exists()
  again = Run(run.folder, after, steps=30)
  assert again.end() == [0] * after, again.said()
  assert f"at step {stopped}" in again.said()[0]
  exported = [np.asarray(json.loads((folder / "export").read_text())) for folder in (run.folder, whole.folder)]
  np.testing.assert_allclose(*exported, rtol=1e-5)
  losses = [[row["loss"] for row in metrics.read(f / "metrics.jsonl")] for f in (run.folder, whole.folder)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


STOPPING = "stopping: this step is finished and saved first; Ctrl-C again stops at once."


@pytest.mark.slow
@pytest.mark.parametrize("pressed", [[0, 1], [0], [1]], ids=str)
def test_ctrl_c_stops_all_processes_at_the_same_step_with_exit_code_130(tmp_path, pressed):
  """At all of them, as a terminal does it, or at one alone."""
  run = Run(tmp_path / "run", 2, steps=400, PACE=0.2)
  run.wait_for_step(4)
  for i in pressed:
    run.processes[i].send_signal(signal.SIGINT)
  assert run.end() == [130, 130], run.said()
  stopped = max(steps_of(run.folder))
  said = run.said()
  assert sum(text.count("stopping") for text in said) == sum(text.count(STOPPING) for text in said) == 1, said
  assert f"stopped at step {stopped} by Ctrl-C; the same command resumes." in said[0]
  assert "stopped" not in said[1] and "Traceback" not in "".join(said)
  again = Run(run.folder, 2, steps=stopped + 2)
  assert again.end() == [0, 0], again.said()
  assert f"at step {stopped}" in again.said()[0]


@pytest.mark.slow
@pytest.mark.parametrize("pressed", [[0, 1], [0], [1]], ids=str)
def test_a_second_ctrl_c_stops_at_once(tmp_path, pressed):
  """Steps take long enough that none is done in between. Process 0 has JAX's coordination service in it."""
  run = Run(tmp_path / "run", 2, steps=400, save_every=1, SLOW="1 6")
  run.wait_for_step(1)
  for _ in range(2):
    for i in pressed:
      run.processes[i].send_signal(signal.SIGINT)
    time.sleep(2)
  pressed_last = time.monotonic()
  codes = run.end()
  assert time.monotonic() - pressed_last < 25
  assert [codes[i] for i in pressed] == [130] * len(pressed)
  assert all(
    run.said()[i].endswith("stopped at once; the same command resumes at the last checkpoint.") for i in pressed
  )
  assert codes[0] == 130 and codes[1] in ((130, -signal.SIGABRT) if pressed == [0] else (130,)), run.said()


JOIN = """
import os
from jaxpref.devices import detection, distributed
distributed.join(distributed.find_launch("auto"))
import jax
from jax._src import xla_bridge
assert jax.process_count() == 2 and jax.device_count() == 2 * jax.local_device_count()
print("process", jax.process_index(), "devices", xla_bridge.CUDA_VISIBLE_DEVICES.value, flush=True)
distributed.barrier("end")
"""


@pytest.mark.parametrize(
  ("environment", "own", "devices"),
  [
    (SLURM_NODES | {"SLURM_STEP_NODELIST": "localhost"}, {"SLURM_PROCID": "01"}, ["all", "all"]),
    pytest.param(
      SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"},
      {"SLURM_PROCID": "01", "SLURM_LOCALID": "01"},
      ["0", "1"],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "{job}.0;tcp://127.0.0.1:53997"},
      {"OMPI_COMM_WORLD_RANK": "01", "OMPI_COMM_WORLD_LOCAL_RANK": "01"},
      ["0", "1"],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      OPEN_MPI_5 | {"PMIX_NAMESPACE": "prterun-node-7-{job}@1"},
      {"OMPI_COMM_WORLD_RANK": "01", "OMPI_COMM_WORLD_LOCAL_RANK": "01"},
      ["0", "1"],
      marks=pytest.mark.slow,
    ),
  ],
  ids=["slurm, nodes", "slurm, gpus", "open mpi 4", "open mpi 5"],
)
def test_two_processes_join_as_their_launcher_says(environment, own, devices):
  job = str((os.getpid() % 4000 + 1) * 4096)  # the port follows from it
  shared = {name: value.replace("{job}", job) for name, value in environment.items()}
  if "SLURM_JOB_ID" in shared:
    shared["SLURM_JOB_ID"] = str(os.getpid())
  shared |= {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", JOIN],
      env=shared | {name: values[i] for name, values in own.items()},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for i, process in enumerate(processes):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == f"process {i} devices {devices[i]}"


# ---------------------------------------------------------------------------------------------
# The scripts that launch

SHELL = sorted([*SCRIPTS.glob("launch_*.sh"), *SCRIPTS.glob("*.sbatch")])
VARIABLES = dict(NAME="run-1", IMAGE="registry/image:1", CLAIM="claim", PROCESSES="4", GPUS="8", CONFIG="configs/a.py")


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_are_good_shell(script):
  subprocess.run(["bash", "-n", script], check=True)
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  done = subprocess.run([shellcheck, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_say_which_variable_is_missing(script):
  environment = {"PATH": os.environ["PATH"]}
  missing = []
  for _ in range(10):  # one after the other
    done = subprocess.run(["bash", script, "--config=a"], env=environment, capture_output=True, text=True)
    if done.returncode == 0 or ": " not in done.stderr or done.stderr.split(": ")[2] in environment:
      break
    missing.append(done.stderr.split(": ")[2])
    if missing[-1] in ("WORKDIR", "CONFIG"):  # the last one
      break
    environment[missing[-1]] = "x"
  expected = {
    "launch_kubernetes.sh": ["NAME", "IMAGE", "CLAIM", "PROCESSES", "GPUS", "CONFIG"],
    "launch_slurm.sbatch": ["WORKDIR"],
    "launch_tpu_pod.sh": ["TPU_NAME", "ZONE", "WORKDIR"],
  }
  assert missing == expected[script.name]


def stand_in(folder, name, script):
  """A program that the scripts call, replaced."""
  (folder / name).write_text(f"#!/usr/bin/env bash\n{script}")
  (folder / name).chmod(0o755)


def test_the_slurm_script_goes_on_until_the_run_is_done(tmp_path):
  stand_in(tmp_path, "srun", 'printf "%s\\n" "$@" > "$WORKDIR/srun"; exit "$SRUN_CODE"')
  stand_in(tmp_path, "scontrol", 'echo "$@" > "$WORKDIR/scontrol"')
  for name, code, finished, again in (
    ("done", 0, True, False),
    ("stopped", 0, False, True),
    ("failed", 1, False, False),
  ):
    workdir = tmp_path / name
    workdir.mkdir()
    if finished:
      (workdir / "export").mkdir()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORKDIR": str(workdir), "SRUN_CODE": str(code)}
    command = ["bash", SCRIPTS / "launch_slurm.sbatch", "--config=a.py", "--config.data.path=with a space"]
    done = subprocess.run(command, env=environment | {"SLURM_JOB_ID": "84231"})
    assert done.returncode == code
    arguments = (workdir / "srun").read_text().splitlines()
    assert arguments[:4] == ["--kill-on-bad-exit=1", "python", "-m", "jaxpref.main"]
    assert arguments[4:] == ["--config=a.py", "--config.data.path=with a space", f"--workdir={workdir}"]
    assert (workdir / "scontrol").exists() == again


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="the script installs what git has")
def test_the_tpu_script_installs_starts_and_stops(tmp_path):
  """The hosts are this one; gcloud runs commands in a shell, as ssh does."""
  home = tmp_path / "home"
  (home / "jaxpref-venv" / "bin").mkdir(parents=True)
  stand_in(home / "jaxpref-venv" / "bin", "pip", 'echo "$@" > ~/pip; test -f ~/jaxpref/pyproject.toml')
  training = 'printf "%s\\n" "$@"; trap "echo stopped; exit" TERM; while sleep 0.1; do :; done'
  stand_in(home / "jaxpref-venv" / "bin", "python", training)
  ssh = 'command="${*: -1}"; bash -c "${command#--command=}"'
  stand_in(tmp_path, "gcloud", f'if [[ "$4" == scp ]]; then cp "$5" ~/jaxpref.tar.gz; else {ssh}; fi')
  environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(home), "TPU_NAME": "t", "ZONE": "z"}
  script = ["bash", SCRIPTS / "launch_tpu_pod.sh"]
  subprocess.run([*script, "--config=a.py", "--config.data.path=a b"], env=environment | {"WORKDIR": "/w"}, check=True)
  subprocess.run([*script, "--stop"], env=environment, check=True)
  log, deadline = home / "jaxpref.log", time.monotonic() + 30
  while "stopped" not in log.read_text():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  assert log.read_text().splitlines() == [
    "-m", "jaxpref.main", "--config=a.py", "--config.data.path=a b", "--workdir=/w", "stopped",
  ]  # fmt: skip
  assert (home / "pip").read_text().split() == ["install", "--quiet", "--upgrade", f"{home}/jaxpref[tpu]"]


@pytest.mark.skipif(shutil.which("envsubst") is None, reason="the script needs envsubst")
def test_the_kubernetes_script_fills_in_the_manifest():
  command = ["bash", SCRIPTS / "launch_kubernetes.sh", "--print"]
  done = subprocess.run(command, env={"PATH": os.environ["PATH"], **VARIABLES}, capture_output=True, text=True)
  text = (SCRIPTS / "kubernetes_job.yaml").read_text()
  for name, value in VARIABLES.items():
    text = text.replace("${" + name + "}", value)
  assert done.stdout == text and '"$!"' in text and "$code" in text


def test_the_kubernetes_manifest():
  yaml = pytest.importorskip("yaml")
  text = (SCRIPTS / "kubernetes_job.yaml").read_text()
  for name, value in VARIABLES.items():
    text = text.replace("${" + name + "}", value)
  assert "${" not in text
  service, job = yaml.safe_load_all(text)
  assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
  assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
  # The names of the pods, by which they find process 0.
  pod = job["spec"]["template"]["spec"]
  assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
  assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
  assert pod["subdomain"] == service["metadata"]["name"]
  (container,) = pod["containers"]
  variables = {v["name"]: v["value"] for v in container["env"]}
  assert all(isinstance(value, str) for value in variables.values())
  assert variables["JAX_COORDINATOR_ADDRESS"] == f"{job['metadata']['name']}-0.{pod['subdomain']}:8476"
  for index in range(job["spec"]["completions"]):
    launch = detection.detect(variables | {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (launch.num_processes, launch.process_id) == (4, index)
  assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["parallelism"] == job["spec"]["completions"] == 4
  # A policy for exit codes needs pods that are not started again in place.
  assert pod["restartPolicy"] == "Never"
  rules = job["spec"]["podFailurePolicy"]["rules"]
  codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
  assert codes == [
    {"containerName": container["name"], "operator": "In", "values": [distributed.RUN_AGAIN, 128 + signal.SIGABRT]}
  ]
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  assert mounts.keys() == {v["name"] for v in pod["volumes"]}
  assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
  assert "--workdir=/runs/run-1" in container["args"][0] and mounts["runs"] == "/runs"


@pytest.mark.parametrize(
  ("training", "finished", "code"),
  [
    ("exit 0", True, 0),
    ("exit 0", False, 75),
    ("exit 1", False, 1),
    ("kill -ABRT $$", False, 134),
    ("trap 'exit 0' TERM; kill -TERM $PPID; for i in {1..100}; do sleep 0.1; done", False, 75),
  ],
)
def test_a_pod_that_was_stopped_is_not_done(tmp_path, training, finished, code):
  """The command of the manifest, on a stand-in for the training; the last one is a pod that gets SIGTERM."""
  yaml = pytest.importorskip("yaml")
  _, job = yaml.safe_load_all((SCRIPTS / "kubernetes_job.yaml").read_text())
  container = job["spec"]["template"]["spec"]["containers"][0]
  (tmp_path / "run-1").mkdir()
  if finished:
    (tmp_path / "run-1" / "export").mkdir()
  stand_in = f"bash -c {shlex.quote(training)}"
  script = container["args"][0].replace("${NAME}", "run-1").replace("/runs", str(tmp_path))
  trap, command, *rest = script.splitlines()
  assert trap.startswith("trap ") and command.startswith("python -m jaxpref.main --config=") and command.endswith("&")
  done = subprocess.run([*container["command"], "\n".join([trap, f"{stand_in} &", *rest])], timeout=60)
  assert done.returncode == code
