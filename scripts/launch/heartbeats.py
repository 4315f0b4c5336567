"""Measures who ends, with which exit code and after how long, when one of several processes of a run goes away.

    python scripts/launch/heartbeats.py --out docs/results/heartbeats

The processes run on this machine, on the CPU (gloo), joined as those of a training are (`devices.distributed.joined`).
Process 0, which has JAX's coordination service in it, or the last one is killed (SIGKILL), stopped (SIGSTOP), raises,
or raises where nothing but JAX ends it ("raises, plainly": it waits at JAX's exit barrier). The others are meanwhile in
a step that all compute together, at work of their own, or at a barrier. The table has the seconds until the last of the
others has ended, one figure for each number of processes, and the exit codes of the others; OUT.json has each.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVENTS = ("killed", "stopped", "raises", "raises, plainly")
DOING = ("a step", "work of their own", "a barrier")
LIMIT = 120  # seconds that the others are watched


def work(case: dict[str, Any], index: int, folder: pathlib.Path, address: str, heartbeat: int) -> None:
  """Runs one process: joins the others, then does what the case says until the file `go` appears, or for ever."""
  sys.path.insert(0, str(ROOT))
  from jaxpref.devices import detection, distributed

  distributed.HEARTBEAT_SECONDS = heartbeat
  launch = detection.Launch("by hand", address, case["processes"], index, detection="deactivate")
  if case["event"] == "raises, plainly" and index == case["gone"]:
    distributed.join(launch)
    work_until_it_raises(case, index, folder)
  with distributed.joined(launch, folder, expected=(ValueError,)):
    work_until_it_raises(case, index, folder)


def work_until_it_raises(case: dict[str, Any], index: int, folder: pathlib.Path) -> None:
  import jax
  import numpy as np

  from jaxpref.devices import distributed

  mesh = jax.make_mesh((case["processes"],), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  total = jax.jit(lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  x = jax.make_array_from_process_local_data(rows, np.ones(1, np.float32))
  total(x).block_until_ready()
  (folder / f"ready {index}").touch()
  while True:
    if case["event"].startswith("raises") and index == case["gone"] and (folder / "go").exists():
      raise ValueError("record 13 cannot be read.")
    if case["doing"] == "a step":
      total(x).block_until_ready()
    elif case["doing"] == "a barrier" and index != case["gone"]:
      distributed.barrier("nobody comes")
    time.sleep(0.02)


def measure(case: dict[str, Any], heartbeat: int) -> dict[str, Any]:
  """Returns the case with `ends` of the others by process: exit code (None if it did not end), and seconds."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="heartbeats_"))
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=1")
  processes = []
  for index in range(case["processes"]):
    options = ["--case", json.dumps(case), "--index", str(index), "--folder", str(folder), "--address", address]
    command = [sys.executable, __file__, "--heartbeat_seconds", str(heartbeat), *options]
    with (folder / f"log {index}").open("w") as log:
      processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
  try:
    deadline = time.monotonic() + 10 * LIMIT
    while len(list(folder.glob("ready *"))) < len(processes):
      if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
        raise RuntimeError(f"the processes of {case} did not start; see {folder}.")
      time.sleep(0.05)
    time.sleep(1.0)
    started = time.monotonic()
    ends: dict[int, dict[str, Any]] = {}
    if case["event"].startswith("raises"):
      (folder / "go").touch()
    else:
      processes[case["gone"]].send_signal(signal.SIGKILL if case["event"] == "killed" else signal.SIGSTOP)
    others = [i for i in range(len(processes)) if i != case["gone"]]
    while len(ends) < len(others) and time.monotonic() - started < LIMIT:
      for i in others:
        if i not in ends and processes[i].poll() is not None:
          ends[i] = {"code": processes[i].returncode, "seconds": round(time.monotonic() - started, 1)}
      time.sleep(0.02)
  finally:
    for process in processes:
      process.kill()
      process.wait()
  shutil.rmtree(folder)
  # As a shell, SLURM and Kubernetes give the code of one that a signal ended.
  found = {i: end | {"code": end["code"] if end["code"] >= 0 else 128 - end["code"]} for i, end in ends.items()}
  return case | {"ends": {i: found.get(i, {"code": None, "seconds": LIMIT}) for i in others}}


def table(rows: list[dict[str, Any]]) -> str:
  """Returns a line for each event and process: seconds until the last of the others ended, and their exit codes."""
  doing = [what for what in DOING if any(row["doing"] == what for row in rows)]
  lines = ["| one process | the others are in " + " | in ".join(doing) + " |", "|---" * (len(doing) + 1) + "|"]
  for event, first in itertools.product(EVENTS, (True, False)):
    cells = []
    for what in doing:
      found = [r for r in rows if (r["event"], r["doing"], r["gone"] == 0) == (event, what, first)]
      ends = [end for row in found for end in row["ends"].values()]
      codes = sorted({"none" if end["code"] is None else str(end["code"]) for end in ends})
      seconds = (f"{max(end['seconds'] for end in row['ends'].values()):.1f}" for row in found)
      cells.append(f"{', '.join(seconds)} s; code {', '.join(codes)}")
    if ends:
      lines.append(f"| {'process 0' if first else 'another one'}: {event} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], metavar="N")
  parser.add_argument("--heartbeat_seconds", type=int, default=20, metavar="S")
  parser.add_argument("--events", nargs="+", choices=EVENTS, default=list(EVENTS), metavar="EVENT")
  parser.add_argument("--doing", nargs="+", choices=DOING, default=list(DOING), metavar="WHAT")
  parser.add_argument("--at_once", type=int, default=8, metavar="N", help="cases at a time; most of it is waiting")
  parser.add_argument("--out", type=pathlib.Path, metavar="PATH", help="writes PATH.json")
  for name in ("--case", "--index", "--folder", "--address"):  # of a process of a case
    parser.add_argument(name, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.case:
    work(json.loads(args.case), int(args.index), pathlib.Path(args.folder), args.address, args.heartbeat_seconds)
    return
  cases = [
    {"processes": n, "event": event, "gone": gone, "doing": doing}
    for n, event, gone, doing in itertools.product(args.processes, args.events, (0, -1), args.doing)
  ]
  cases = [case | {"gone": case["gone"] % case["processes"]} for case in cases]
  with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
    rows = list(pool.map(lambda case: measure(case, args.heartbeat_seconds), cases))
  print(table(rows), end="")
  if args.out:
    args.out.with_suffix(".json").write_text(
      json.dumps({"heartbeat_seconds": args.heartbeat_seconds, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
  main()
