"""Kills a small run at random moments, restarts it each time, and compares its end with that of a run left alone.

    python scripts/launch/chaos.py --kills 25
    python scripts/launch/chaos.py --kills 10 --mesh_changes
    python scripts/launch/chaos.py --kills 5 --config=configs/tdpo_tiny.py --config.reference.mode=update

The run is `python -m jaxpref.main` on networks of one level, a few milliseconds a step, saved every other step. It is
killed by SIGKILL while it starts, compiles, trains, evaluates and, most often, while it saves (a folder of a checkpoint
that is not yet complete is there); or by SIGTERM, upon which it has to save and to end with status 0. The same command
then continues. In the end these must equal, bit by bit, those of the run left alone: the training state and that of
the data, every row of metrics.jsonl but for times, and all files of export/. With --mesh_changes each restart is on
another mesh (1 device, or 8 virtual ones as 8 x 1 x 1 or 2 x 2 x 2); then parameters and losses may be a relative 1e-5
apart.

Flags --config.NAME=VALUE are passed on, and --program names another module to run instead of jaxpref.main, which takes
the same arguments in its function `run()`. Restarted processes are forked from one that has imported everything, and
share a cache of compiled programs. Exit status 1: something differs, or a process failed; its folder is then kept.
"""

import argparse
import collections
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 600  # seconds that a process may be silent
TOLERANCE = 1e-5  # relative, where meshes change
MESHES = {"1x1x1": 1, "8x1x1": 8, "2x2x2": 8}  # devices
# Times in the rows of metrics.jsonl, and how names of more of them begin.
TIMES = ("time", "images_per_second", "data_wait_share", "step_seconds")
TIMES_OF = ("host_", "slowest_")
STEPS_PER_KILL = 4  # so that the run is still going when the last one is due
# What the kills wait for, again and again; the last one waits for evaluation.
MOMENTS = ("save", "terminate", "step", "save", "start", "save", "step", "start", "save")
# Imported before forking, none of which starts a thread or looks for devices.
IMPORTS = (
  "jaxpref.main", "jaxpref.training.loop", "grain", "matplotlib.pyplot", "tensorboardX.event_file_writer",
  "tensorboardX.summary", "transformers",
)  # fmt: skip


def small(num_steps: int) -> list[str]:
  """Returns the flags that make a recipe small."""
  fields = {
    "model": "random:one-level", "judge": "random:one-level", "num_steps": num_steps, "batch_size": 8,
    "lora.rank": 2, "logging.every": 1, "checkpoint.every": 2, "sample.every": 0, "optimizer.warmup_steps": 2,
    "evaluation.num_prompts": 2, "evaluation.seeds_per_prompt": 1, "evaluation.num_inference_steps": 2,
    "evaluation.batch_size": 2,
  }  # fmt: skip
  return [f"--config.{name}={value}" for name, value in fields.items()]


def live(program: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
  """Runs one process of the run: what `python -m PROGRAM ARGUMENTS` does, with the imports already done."""
  os.environ.update(environment)  # before the devices are looked for
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.argv = ["jaxpref", *arguments]
  importlib.import_module(program).run()


def devices(count: int) -> dict[str, str]:
  """Returns the environment of a process with so many CPU devices."""
  return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"}


class Life:
  """A process of the killed run, and what can be seen of it from outside."""

  def __init__(
    self, context: Any, program: str, arguments: list[str], mesh: str, workdir: pathlib.Path, log: pathlib.Path
  ):
    self.workdir, self.log = workdir, log
    self.metrics = workdir / "metrics.jsonl"
    self.file_before = self._file()  # of earlier lives; a life begins with a new one, in which it keeps their rows
    self.first_row: int | None = None
    self.started = time.monotonic()
    of_mesh = ([*arguments, *on_mesh(mesh)], devices(MESHES[mesh]))
    self.process = context.Process(target=live, args=(program, *of_mesh, str(log)))
    self.process.start()

  def _file(self) -> int:
    return self.metrics.stat().st_ino if self.metrics.exists() else 0

  def seconds(self) -> float:
    return time.monotonic() - self.started

  def steps(self) -> int:
    """Returns how many steps this life has written to metrics.jsonl."""
    if self.first_row is None:
      if self._file() in (0, self.file_before):
        return 0
      self.first_row = last_row(self.metrics)
    return last_row(self.metrics) - self.first_row

  def said(self, words: str) -> bool:
    return self.log.exists() and words in self.log.read_text(errors="replace")

  def saving(self) -> bool:
    """Returns whether a checkpoint is half-written; what earlier lives left is removed before the first step."""
    return self.steps() > 0 and any("tmp" in name for name in os.listdir(self.workdir / "checkpoints"))

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """Waits for a condition; returns False if the process ended first."""
    while not condition():
      if self.process.exitcode is not None:
        return False
      written = self.log.stat().st_mtime if self.log.exists() else 0.0
      if self.seconds() > LIMIT and time.time() - written > LIMIT:
        raise TimeoutError(f"a process did nothing for {LIMIT} s; see {self.log}.")
      time.sleep(0.001)
    return True

  def phase(self, num_steps: int) -> str:
    """Returns where the process is, from what it has written; exact once it is dead."""
    if self.saving():
      return "save"
    if (self.workdir / "checkpoints" / str(num_steps)).is_dir():
      return "evaluation"
    if self.steps():
      return "step"
    return "compile" if self.said("compiling the training step") else "start"


def on_mesh(mesh: str) -> list[str]:
  return [f"--config.mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh.split("x"), strict=True)]


def last_row(path: pathlib.Path) -> int:
  """Returns the step of the last row of a metrics.jsonl, 0 without one."""
  lines = path.read_bytes().splitlines() if path.exists() else []
  try:
    return int(json.loads(lines[-1])["step"]) if lines else 0
  except json.JSONDecodeError:  # being written
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def kill(life: Life, moment: str, rng: random.Random, num_steps: int, startup: float) -> dict[str, Any] | None:
  """Waits for a moment, kills the process and says where that hit; returns None if the process ended earlier.

  Args:
    moment: one of MOMENTS, or "evaluation".
    startup: seconds that a life takes to its first step.
  """
  steps = rng.randint(1, 4)
  conditions: dict[str, tuple[Callable[[], bool], float]] = {  # and how long to wait from then, at most
    "start": (lambda: True, startup),
    "step": (lambda: life.steps() >= steps, 0.2),
    "terminate": (lambda: life.steps() >= steps, 0.2),
    "save": (lambda: life.steps() >= steps and life.saving(), 0.1),
    "evaluation": (lambda: life.said("exported to"), 2.0),
  }
  condition, longest = conditions[moment]
  if not life.wait_for(condition):
    return None
  until = time.monotonic() + rng.uniform(0.0, longest)
  if not life.wait_for(lambda: time.monotonic() > until):
    return None
  number = signal.SIGTERM if moment == "terminate" else signal.SIGKILL
  hit = life.phase(num_steps)
  os.kill(life.process.pid, number)
  life.process.join()
  code = life.process.exitcode
  if number == signal.SIGKILL:
    if code == 0:  # it ended by itself just before
      return None
    hit = life.phase(num_steps)
    good = code == -number
  else:  # it saved and ended, or was already past the last step
    step = last_row(life.metrics)
    good = hit == "evaluation" or (code == 0 and (life.workdir / "checkpoints" / str(step)).is_dir())
  if not good:
    raise RuntimeError(f"a process ended with status {code} after {number.name} ({hit}); see {life.log}.")
  return {
    "signal": number.name, "hit": hit, "step": last_row(life.metrics), "seconds": round(life.seconds(), 1)
  }  # fmt: skip


def run_killed(
  context: Any, program: str, arguments: list[str], workdir: pathlib.Path, logs: pathlib.Path, *, num_steps: int,
  kills: int, meshes: Sequence[str], rng: random.Random,
) -> list[dict[str, Any]]:  # fmt: skip
  """Restarts the run until it has been killed so many times, then lets it end; returns what was hit where."""
  found: list[dict[str, Any]] = []
  startup, mesh = 5.0, meshes[0]
  for number in range(1, 100 * kills):
    life = Life(context, program, arguments, mesh, workdir, logs / f"life_{number:03d}.log")
    hit = None
    try:
      if len(found) < kills:
        trained = (workdir / "checkpoints" / str(num_steps)).is_dir()
        moment = "evaluation" if trained or len(found) == kills - 1 else MOMENTS[len(found) % len(MOMENTS)]
        hit = kill(life, moment, rng, num_steps, startup)
      else:
        life.wait_for(lambda: False)
    finally:
      life.process.kill()
    if hit is not None:
      found.append({"life": number, "mesh": mesh, **hit})
      say(f"kill {len(found)} of {kills}: {hit['signal']} in {hit['hit']}, step {hit['step']}", found[-1]["seconds"])
      if hit["hit"] == "step" and hit["signal"] == "SIGKILL":
        startup = 0.5 * startup + 0.5 * hit["seconds"]
      mesh = rng.choice([m for m in meshes if m != mesh] or [mesh])
      continue
    if life.process.exitcode != 0:
      raise RuntimeError(f"a process that was not killed ended with status {life.process.exitcode}; see {life.log}.")
    if len(found) == kills:
      break
  return found


def say(message: str, seconds: float) -> None:
  print(f"{message} ({seconds:.1f} s)", file=sys.stderr, flush=True)


# ---- What a run leaves ---------------------------------------------------------------------------------------------


def left_by(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """Returns state by name, state of the data, rows without times, and a hash of each exported file."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  from jaxpref.devices import sharding
  from jaxpref.training import metrics

  folder = workdir / "checkpoints" / str(step)
  reader = ocp.PyTreeCheckpointHandler()
  shapes = reader.metadata(folder / "state").tree
  numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
  state = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=numpy))
  files = [*sorted((workdir / "export").rglob("*")), workdir / "export", workdir / "results.json"]
  return {
    "state": {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)},
    "data": json.loads((folder / "data" / "metadata").read_text())["data"],
    "metrics": [
      {k: v for k, v in row.items() if k not in TIMES and not k.startswith(TIMES_OF)}
      for row in metrics.read(workdir / "metrics.jsonl")
    ],
    "export": {
      str(f.relative_to(workdir)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()
    },
  }  # fmt: skip


def compare(found: dict[str, Any], expected: dict[str, Any], *, exact: bool, way: float = 0.0) -> dict[str, Any]:
  """Returns what is equal, and how far apart parameters and losses are, relative to the norm of each.

  Args:
    way: how far a parameter can move in the whole run; arrays that begin as 0 are compared with at least this.
  """
  import numpy as np

  def distance(a: Any, b: Any, way: float = 0.0) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
      return math.inf
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), way * np.sqrt(b.size), 1e-30))

  steps = [[row["step"] for row in left["metrics"]] for left in (found, expected)]
  names = found["state"].keys() == expected["state"].keys()
  trained = [name for name in expected["state"] if name.startswith("params/")] if names else []
  params = [distance(found["state"][name], expected["state"][name], way) for name in trained] or [math.inf]
  losses = [distance(a["loss"], b["loss"]) for a, b in zip(found["metrics"], expected["metrics"], strict=False)]
  same = {
    "state": names and all(x.tobytes() == found["state"][name].tobytes() for name, x in expected["state"].items()),
    **{part: found[part] == expected[part] for part in ("data", "metrics", "export")},
  }
  result = {
    "equal": same,
    "every_step_once": steps[0] == steps[1] == sorted(set(steps[0])),
    "largest_distance": {"parameters": max(params), "loss": max(losses)},
  }
  close = max(*params, *losses) <= TOLERANCE and found["data"]["batches"] == expected["data"]["batches"]
  result["passed"] = result["every_step_once"] and (all(same.values()) if exact else close)
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=25, metavar="N")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--config", default=str(ROOT / "configs" / "dpo_tiny.py"), metavar="FILE", help="the recipe")
  parser.add_argument("--program", default="jaxpref.main", metavar="MODULE", help="what is run (default: %(default)s)")
  parser.add_argument("--mesh_changes", action="store_true", help="restart on another mesh")
  parser.add_argument("--out", type=pathlib.Path, metavar="PATH", help="writes PATH.json and PATH.md")
  args, fields = parser.parse_known_args()
  if args.kills < 1 or not all(f.startswith("--config.") for f in fields):
    parser.error("expected --kills of at least 1, and no other flags than --config.NAME=VALUE")

  started = time.monotonic()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="chaos_"))
  os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_COMPILATION_CACHE_DIR=str(folder / "programs"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    HF_HUB_OFFLINE="1",
    PYTHONWARNINGS="ignore::UserWarning:multiprocessing.resource_tracker",  # that killed processes did not tidy up
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    **devices(1),
  )
  sys.path.insert(0, str(ROOT))
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([*IMPORTS, args.program])
  (folder / "logs").mkdir()
  num_steps = STEPS_PER_KILL * args.kills
  # An error, of about 1, is rounded to 6e-8, on another mesh to another side; beta makes that part of the loss.
  fields = ["--config.loss.beta=10", *fields] if args.mesh_changes else fields
  arguments = [f"--config={args.config}", *small(num_steps), *fields]

  alone, killed = folder / "alone", folder / "killed"
  command = [sys.executable, "-m", args.program, *arguments, *on_mesh("1x1x1"), f"--workdir={alone}"]
  with (folder / "logs" / "alone.log").open("w") as log:
    begun = time.monotonic()
    if subprocess.run(command, stdout=log, stderr=log, cwd=folder, check=False).returncode:
      sys.exit(f"error: the run that is left alone failed; see {log.name}.")
  say(f"left alone: {num_steps} steps", time.monotonic() - begun)
  try:
    kills = run_killed(
      context, args.program, [*arguments, f"--workdir={killed}"], killed, folder / "logs", num_steps=num_steps,
      kills=args.kills, meshes=list(MESHES) if args.mesh_changes else ["1x1x1"], rng=random.Random(args.seed),
    )  # fmt: skip
  except (RuntimeError, TimeoutError) as error:
    sys.exit(f"error: {error}")
  way = num_steps * json.loads((alone / "config.json").read_text())["optimizer"]["learning_rate"]
  result = compare(left_by(killed, num_steps), left_by(alone, num_steps), exact=not args.mesh_changes, way=way)
  result["left_over"] = [p.name for p in (killed / "checkpoints").iterdir() if not p.name.isdigit()]
  result["damaged"] = (killed / "checkpoints_damaged").exists()
  result["passed"] &= not result["left_over"] and not result["damaged"]
  import jax

  report = {
    "command": "python scripts/launch/chaos.py " + " ".join(sys.argv[1:]),
    "seed": args.seed,
    "num_steps": num_steps,
    "hits": dict(collections.Counter(k["hit"] for k in kills)),
    "signals": dict(collections.Counter(k["signal"] for k in kills)),
    **result,
    "minutes": round((time.monotonic() - started) / 60, 1),
    "jax": jax.__version__,
    "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    "kills": kills,
  }
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(as_json(report))
    args.out.with_suffix(".md").write_text(table(report))
  print(table(report))
  if not report["passed"]:
    sys.exit(f"error: the killed run differs from the one left alone; both are in {folder}.")
  shutil.rmtree(folder)


def as_json(report: dict[str, Any]) -> str:
  """Returns JSON with one line for each kill."""
  kills = ",\n".join(f"    {json.dumps(k)}" for k in report["kills"])
  head = json.dumps({k: v for k, v in report.items() if k != "kills"}, indent=2)
  return f'{head[:-2]},\n  "kills": [\n{kills}\n  ]\n}}\n'


def table(report: dict[str, Any]) -> str:
  """Returns Markdown: how often which phase was hit, and the result."""
  hits = report["hits"]
  phases = [phase for phase in ("start", "compile", "step", "save", "evaluation") if phase in hits]
  rows = [f"| {phase} | {hits[phase]} |" for phase in phases]
  signals = ", ".join(f"{count} by {name}" for name, count in report["signals"].items())
  equal = ", ".join(f"{part} {'equal' if same else 'DIFFERENT'}" for part, same in report["equal"].items())
  compared = "other meshes, so compared by distance" if len({kill["mesh"] for kill in report["kills"]}) > 1 else equal
  distance = report["largest_distance"]
  return "\n".join(
    [
      f"`{report['command']}`: {len(report['kills'])} kills ({signals}) in a run of {report['num_steps']} steps, "
      f"{report['minutes']} minutes on {report['machine']}.",
      "",
      "| killed in | times |",
      "|---|---|",
      *rows,
      "",
      f"Against the run left alone: {compared}; every step logged once: {report['every_step_once']}; largest relative "
      f"distance {distance['parameters']:.1e} (parameters), {distance['loss']:.1e} (loss). "
      f"{'Passed' if report['passed'] else 'FAILED'}.",
      "",
    ]
  )


if __name__ == "__main__":
  main()
