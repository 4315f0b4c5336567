"""Checks that the present checkout computes the same numbers as an earlier commit, bit by bit.

    python scripts/same_numbers.py COMMIT                        # all runs
    python scripts/same_numbers.py COMMIT --only dpo spo_lora    # some of them
    python scripts/same_numbers.py COMMIT --tolerance 1e-6       # close is enough
    python scripts/same_numbers.py --renew                       # writes tests/numbers.json again, for all or some runs
    python scripts/same_numbers.py --list                        # names and arguments of the runs

For a change that moves code and is not to change what it does. COMMIT is checked out into a temporary git worktree; in
it and in the present checkout, changes that are not committed included, the same tiny runs of three steps are made,
each in a process of its own and by nothing but the command line, so that modules may have other names. Compared are:

- metrics: all numbers of each row of metrics.jsonl but those of time,
- state: every array of the last checkpoint, by its path: parameters, reference, optimiser, counts,
- data: the state of the data and of the monitors in that checkpoint,
- export: every array of the exported safetensors, and every value of the JSON files beside them.

Runs `..._resumed` end after two steps and are started again; `..._continued` are begun by COMMIT and ended by the
present checkout. Both have to leave what COMMIT leaves without a stop.

What COMMIT leaves is kept under --cache, by commit, processor and versions, so that it runs once. One line is printed
for each run; exit status 1: something differs. Programs are compiled without LLVM's optimisation, which changes
numbers, but the same way in both checkouts, and a program that is the same in both is compiled once.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import QUICK_FLAGS  # noqa: E402

NUMBERS = ROOT / "tests" / "numbers.json"
STEPS = 3
LIMIT = 900  # seconds that a process may take
ROW_DIGITS = 1e-5  # rows have six digits: with a tolerance, the last one may differ, too
SHOWN = 3  # differences of a kind that are named
# Times in the rows of metrics.jsonl, and how names of more of them begin.
TIMES = ("step", "time", "images_per_second", "data_wait_share", "step_seconds")
TIMES_OF = ("host_", "slowest_")
LIBRARIES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "pillow")

# ---- The runs ------------------------------------------------------------------------------------------------------

Fields = dict[str, Any]
Left = dict[str, np.ndarray]  # what a run leaves: name -> numbers, or a text

SMALL: Fields = {
  "model": "random:one-level", "judge": "", "num_steps": STEPS, "batch_size": 4, "seed": 3, "logging.every": 1,
  "checkpoint.every": STEPS, "sample.every": 0, "evaluation.num_prompts": 0,
  # With Adam's epsilon of 1e-8, gradients that are rounding alone would make whole steps.
  "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 0, "optimizer.eps": 1e-6,
}  # fmt: skip
SCORED: Fields = SMALL | {"preference_model": "random:one-level"}
PAIRS: Fields = SMALL | {"loss.beta": 20.0, "data.caption_dropout": 0.25, "data.flip": True}
MOVES: Fields = {"reference.mode": "update", "reference.tau": 2, "reference.alpha": 0.5, "reference.delta": 1.0}
SPO: Fields = SCORED | {
  "batch_size": 2, "spo.num_inference_steps": 4, "spo.warmup_steps": 1, "spo.pool_size": 3, "spo.threshold": 0.0,
  "spo.minibatch": 2, "spo.ratio_clip": 0.9,
}  # fmt: skip
GRPO: Fields = SCORED | {
  "batch_size": 2, "grpo.num_inference_steps": 3, "grpo.group_size": 2, "grpo.minibatch": 8, "grpo.kl_coef": 0.1,
  "grpo.ratio_clip": 0.5,
}  # fmt: skip
PRETRAIN: Fields = SMALL | {"optimizer.warmup_steps": 1}  # before a cosine
DDPO: Fields = GRPO | {"batch_size": 4, "grpo.group_size": 1, "grpo.advantage": "batch", "grpo.kl_coef": 0.0}


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of training, as a user starts it.

  Attributes:
    recipe: file of configs/, with its variant.
    fields: fields of the config that replace the recipe's.
    processes: that make the run together.
    precomputed: whether its data is precomputed first.
    stops_at: the step that a first start ends at; 0 for a run that is not interrupted.
    begun_before: whether it is the earlier commit that makes the first start.
    like: name of the run that has to leave the same, where it is another one.
  """

  recipe: str
  fields: Fields
  processes: int = 1
  precomputed: bool = False
  stops_at: int = 0
  begun_before: bool = False
  like: str = ""


def _variants(name: str, recipe: str, fields: Fields) -> dict[str, Run]:
  """Returns a run, and the same with each option that takes another way through the trainer."""
  return {
    name: Run(recipe, fields),
    f"{name}_lora": Run(recipe, fields | {"lora.rank": 2}),
    f"{name}_accumulation": Run(recipe, fields | {"accumulation": 2, "optimizer.warmup_steps": 2}),
    f"{name}_two_processes": Run(recipe, fields, processes=2),
    f"{name}_resumed": Run(recipe, fields, stops_at=2, like=name),
    f"{name}_continued": Run(recipe, fields, stops_at=2, begun_before=True, like=name),
  }


RUNS: dict[str, Run] = {
  **_variants("dpo", "dpo_tiny.py", PAIRS),
  "dpo_precomputed": Run("dpo_tiny.py", PAIRS | {"data.source": "precomputed", "data.path": "data"}, precomputed=True),
  "dpo_sdxl": Run("dpo_sdxl.py:smoke", {}),
  "tdpo": Run("tdpo_tiny.py", PAIRS | MOVES),
  "kto": Run("kto_tiny.py", PAIRS),
  **_variants("spo", "spo_tiny.py", SPO),
  "spo_inner": Run("spo_tiny.py", SPO | MOVES | {"spo.inner_steps": 2, "spo.ratio_clip": 0.1}),
  "grpo": Run("grpo_tiny.py", GRPO),
  "ddpo": Run("grpo_tiny.py", DDPO),
  "spm": Run("spm_tiny.py", SCORED),
  "denoise": Run("pretrain_tiny.py:unet", PRETRAIN),
  "autoencode": Run("pretrain_tiny.py:vae", PRETRAIN),
  "contrastive": Run("pretrain_tiny.py:clip", PRETRAIN),
  "classify": Run("pretrain_tiny.py:judge", PRETRAIN | {"data.subset": "core"}),
}
# Those of tests/numbers.json.
OBJECTIVES = (
  "spo", "grpo", "ddpo", "dpo", "tdpo", "kto", "spm", "denoise", "autoencode", "contrastive", "classify",
)  # fmt: skip

# ---- Making a run --------------------------------------------------------------------------------------------------


class FailedError(RuntimeError):
  """A process of a run ended with an error; the message has the end of what it said."""


def environment(tree: pathlib.Path, cache: pathlib.Path, data: pathlib.Path) -> dict[str, str]:
  """Returns the environment of a process that runs the code of `tree`."""
  return os.environ | {
    "PYTHONPATH": str(tree),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": QUICK_FLAGS,
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAXPREF_DATA_DIR": str(data),
    "HF_HUB_OFFLINE": "1",
  }


def arguments(tree: pathlib.Path, run: Run, **others: Any) -> list[str]:
  """Returns the flags that describe a run; `others` are fields without a dot in their name."""
  fields = run.fields | others
  return [f"--config={tree / 'configs' / run.recipe}", *(f"--config.{k}={v}" for k, v in fields.items())]


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Tree:
  """A checkout, and where its runs are made.

  Attributes:
    code: the checkout.
    work: folder of the runs.
    cache: folder of compiled programs.
  """

  code: pathlib.Path
  work: pathlib.Path
  cache: pathlib.Path

  def _call(self, folder: pathlib.Path, commands: list[list[str]]) -> None:
    """Runs `python -m COMMAND` in `folder`, all at once, and waits for them."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = environment(self.code, self.cache, self.work / "datasets")
    logs = [folder / f"process_{i}.log" for i in range(len(commands))]
    running = []
    for command, log in zip(commands, logs, strict=True):
      with log.open("a") as file:
        arguments = [sys.executable, "-m", *command]
        running.append(subprocess.Popen(arguments, env=variables, cwd=folder, stdout=file, stderr=file))
    try:
      codes = [process.wait(timeout=LIMIT) for process in running]
    finally:
      for process in running:
        process.kill()
    for code, log in zip(codes, logs, strict=True):
      if code:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise FailedError(f"status {code}: {' '.join(said[-1:])} (all of it: {log})")

  def check(self) -> None:
    """Raises FailedError if Python takes the package from another place."""
    command = [sys.executable, "-c", "import jaxpref; print(jaxpref.__file__)"]
    variables = environment(self.code, self.cache, self.work / "datasets")
    self.work.mkdir(parents=True, exist_ok=True)
    found = subprocess.run(command, env=variables, cwd=self.work, capture_output=True, text=True, check=True).stdout
    if self.code.resolve() not in pathlib.Path(found.strip()).resolve().parents:
      raise FailedError(f"Python takes jaxpref from {found.strip()}, not from {self.code}")

  def start(self, name: str, run: Run, num_steps: int) -> pathlib.Path:
    """Trains to a step, from the last checkpoint if there is one; returns the work folder."""
    folder = self.work / name
    if run.precomputed and not (folder / "data").exists():
      of_source = dataclasses.replace(run, fields={k: v for k, v in run.fields.items() if not k.startswith("data.pa")})
      of_source.fields["data.source"] = "emoji"
      self._call(folder, [["jaxpref.precompute", *arguments(self.code, of_source), "--out=data"]])
    training = ["jaxpref.main", *arguments(self.code, run, num_steps=num_steps), "--workdir=run"]
    together = [f"--coordinator_address=127.0.0.1:{_free_port()}", f"--num_processes={run.processes}"]
    commands = [[*training, *together, f"--process_id={i}"] for i in range(run.processes)]
    self._call(folder, commands if run.processes > 1 else [training])
    return folder / "run"

  def leave(self, name: str, run: Run) -> Left:
    """Makes a run, to its end, and reads what it leaves."""
    num_steps = run.fields.get("num_steps", STEPS)
    for step in (run.stops_at, num_steps):
      if step and not (self.work / name / "run" / "checkpoints" / str(step)).exists():
        self.start(name, run, step)
    return left_by(self.work / name / "run", num_steps)


# ---- What a run leaves ---------------------------------------------------------------------------------------------


def _values(tree: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, value) of the leaves of nested JSON values or arrays; an empty value is a leaf too."""
  if isinstance(tree, Mapping) and tree:
    for key, value in tree.items():
      yield from _values(value, f"{prefix}/{key}")
  elif isinstance(tree, list | tuple) and tree:
    for i, value in enumerate(tree):
      yield from _values(value, f"{prefix}/{i}")
  elif isinstance(tree, np.ndarray | bool | int | float) or np.isscalar(tree):
    value = np.asarray(tree)
    # bfloat16 is none of NumPy's own types
    yield prefix, value if value.dtype.kind in "biufU" else value.astype(np.float32)
  else:
    yield prefix, np.asarray(str(tree))


def _rows(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  for line in path.read_text().splitlines():
    row = json.loads(line)
    numbers = {k: v for k, v in row.items() if k not in TIMES and not k.startswith(TIMES_OF)}
    yield from _values(numbers, f"metrics/step {row['step']}")


def _state(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the arrays of a checkpoint, by what Orbax alone knows of them."""
  import jax
  import orbax.checkpoint as ocp

  reader = ocp.PyTreeCheckpointHandler()
  shapes = reader.metadata(folder).tree
  numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
  yield from _values(reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=numpy)), "state")


def _export(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  from safetensors.numpy import load_file

  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    name = f"export/{path.relative_to(folder)}"
    if path.suffix == ".safetensors":
      yield from _values(load_file(path), name)
    elif path.suffix == ".json" and path.parent.name != "tokenizer":
      yield from _values(json.loads(path.read_text()), name)
    else:
      yield name, np.asarray(hashlib.sha256(path.read_bytes()).hexdigest())


def left_by(workdir: pathlib.Path, step: int) -> Left:
  """Returns what is compared of a finished run; `step` is its last."""
  checkpoint = (workdir / "checkpoints" / str(step)).absolute()
  return {
    **dict(_rows(workdir / "metrics.jsonl")),
    **dict(_state(checkpoint / "state")),
    **dict(_values(json.loads((checkpoint / "data" / "metadata").read_text())["data"], "data")),
    **dict(_export(workdir / "export")),
  }


def differences(found: Left, expected: Left, tolerance: float = 0.0) -> list[tuple[str, str, float]]:
  """Returns (name, difference, its largest size) of each value that is not the same.

  Args:
    tolerance: that numbers may be apart, relative to the largest of their array.
  """
  differ = []
  for name in [*expected, *(n for n in found if n not in expected)]:
    a, b = found.get(name), expected.get(name)
    if a is None or b is None:
      differ.append((name, "missing" if a is None else "new", np.inf))
    elif (a.dtype, a.shape) != (b.dtype, b.shape) and "U" not in a.dtype.kind + b.dtype.kind:
      differ.append((name, f"{b.dtype}{list(b.shape)} -> {a.dtype}{list(a.shape)}", np.inf))
    elif a.tobytes() != b.tobytes():
      if a.dtype.kind == "U" or b.dtype.kind == "U":
        differ.append((name, f"{str(b)[:20]} -> {str(a)[:20]}", np.inf))
        continue
      apart = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
      allowed = tolerance + ROW_DIGITS if tolerance and name.startswith("metrics/") else tolerance
      if not tolerance or not apart <= allowed * float(np.abs(b).max()):
        differ.append((name, f"{b:.6g} -> {a:.6g}" if a.ndim == 0 else f"by {apart:.3g}", apart))
  return differ


def describe(differ: list[tuple[str, str, float]], total: int) -> str:
  """Returns what differs in one line: the first metrics, and of all else the largest differences."""
  if not differ:
    return f"same ({total} values)"
  parts = []
  for kind in ("metrics", "state", "data", "export"):
    of_kind = [(name.partition("/")[2], what, apart) for name, what, apart in differ if name.startswith(f"{kind}/")]
    if kind != "metrics":
      of_kind.sort(key=lambda entry: -entry[2])
    if of_kind:
      named = ", ".join(f"{name} {what}" for name, what, _ in of_kind[:SHOWN])
      parts.append(f"{len(of_kind)} of {kind}: {named}{', ...' if of_kind[SHOWN:] else ''}")
  return f"DIFFERENT, {'; '.join(parts)}"


# ---- Summaries, for a test on any processor -------------------------------------------------------------------------


def summary(left: Left) -> dict[str, float]:
  """Returns metrics of every step, and Euclidean norms: of the state's parts, and of the way from the reference."""
  found = {k: float(v) for k, v in left.items() if k.startswith("metrics/") and v.ndim == 0}
  squares: dict[str, float] = collections.defaultdict(float)
  for name, value in left.items():
    part = f"{name}/".split("/")[1]
    if not name.startswith("state/") or value.dtype.kind != "f":
      continue
    moment = next((f"/{m}" for m in ("mu", "nu") if f"/{m}/" in name), "")
    squares[f"norm of {part}{moment}"] += _square(value)
    if part == "params" and (reference := left.get(f"state/ref_{name.removeprefix('state/')}")) is not None:
      squares["norm of params - ref_params"] += _square(value - reference)
  return found | {key: float(np.sqrt(value)) for key, value in squares.items()}


def _square(value: np.ndarray) -> float:
  return float(np.sum(np.square(value.astype(np.float64))))


def renew(names: list[str], tree: Tree) -> None:
  """Writes what some runs leave now into tests/numbers.json."""
  found = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
  for name in names:
    found[name] = {k: float(f"{v:.7g}") for k, v in summary(tree.leave(name, RUNS[name])).items()}
    print(f"{name}: {len(found[name])} numbers", flush=True)
  kept = {name: found[name] for name in OBJECTIVES if name in found}
  NUMBERS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


# ---- An earlier commit ---------------------------------------------------------------------------------------------


def _git(*arguments: Any) -> str:
  command = ["git", "-C", str(ROOT), *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    sys.exit(f"error: {' '.join(command)}: {done.stderr.strip()}")
  return done.stdout.strip()


def _processor() -> str:
  """Returns what may make rounding differ elsewhere."""
  cpu = pathlib.Path("/proc/cpuinfo")
  lines = cpu.read_text().splitlines() if cpu.is_file() else [platform.processor()]
  described = sorted({line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))})
  return "\n".join([platform.machine(), str(os.cpu_count()), *described])


class Before:
  """What runs of an earlier commit leave, made when they are first asked for, by one thread each."""

  def __init__(self, commit: str, work: pathlib.Path, cache: pathlib.Path):
    """Takes the hash of the commit, the folder of temporary files, and the folder of those to keep."""
    self._commit = commit
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    known = "\n".join([platform.python_version(), *versions, _processor(), QUICK_FLAGS])
    self._kept = cache / f"{self._commit[:12]}_{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    self._tree = Tree(work / "before" / "code", work / "before" / "runs", cache)
    self._locks: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)  # by run; "" of the worktree

  def _checked_out(self) -> Tree:
    with self._locks[""]:
      if not self._tree.code.exists():
        self._tree.work.mkdir(parents=True)
        _git("worktree", "add", "--detach", self._tree.code, self._commit)
        self._tree.check()
    return self._tree

  def close(self) -> None:
    """Removes the worktree."""
    if self._tree.code.exists():
      _git("worktree", "remove", "--force", self._tree.code)

  def _place(self, name: str, run: Run, suffix: str) -> pathlib.Path:
    """Returns where something of a run is kept; other arguments of the run give another place."""
    return self._kept / f"{name}_{hashlib.sha256(repr(run).encode()).hexdigest()[:8]}{suffix}"

  def left(self, name: str) -> Left:
    """Returns what a run leaves."""
    run = RUNS[name]
    place = self._place(name, run, ".npz")
    with self._locks[name]:
      if not place.exists():
        left = self._checked_out().leave(name, run)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".npz.part")
        with part.open("wb") as file:
          np.savez_compressed(file, allow_pickle=False, **left)  # type: ignore[arg-type]
        part.replace(place)
    with np.load(place, allow_pickle=False) as file:
      return dict(file)

  def begun(self, name: str) -> pathlib.Path:
    """Returns the work folder of a run after its first start."""
    run = RUNS[name]
    place = self._place(name, run, "")
    if not place.exists():
      workdir = self._checked_out().start(name, run, run.stops_at)
      part = place.with_suffix(".part")
      shutil.rmtree(part, ignore_errors=True)
      shutil.copytree(workdir, part)
      part.replace(place)
    return place


def compare(name: str, before: Before, now: Tree, tolerance: float) -> str:
  """Makes a run on both sides; returns what differs in one line."""
  run = RUNS[name]
  expected = before.left(run.like or name)
  if run.begun_before:
    shutil.copytree(before.begun(name), now.work / name / "run")
  try:
    found = now.leave(name, run)
  except FailedError as error:
    return f"FAILED, {error}"
  return describe(differences(found, expected, tolerance), len(expected))


def _compare_all(args: argparse.Namespace, work: pathlib.Path, now: Tree) -> list[str]:
  """Returns the names of the runs that differ; prints a line for each run."""
  before = Before(args.commit, work, args.cache)

  def same(name: str) -> bool:
    started = time.monotonic()
    said = compare(name, before, now, args.tolerance)
    print(f"{name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
    return said.startswith("same")

  try:
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      try:
        return [name for name, ok in zip(args.only, pool.map(same, args.only), strict=True) if not ok]
      finally:
        pool.shutdown(cancel_futures=True)
  finally:
    before.close()


def _show(names: Iterable[str]) -> None:
  for name in names:
    run = RUNS[name]
    options = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)[2:]}
    notes = ", ".join(f"{k}={v}" for k, v in options.items() if v not in (0, "", False) and (k, v) != ("processes", 1))
    print(f"{name}: {' '.join(arguments(pathlib.Path(), run))}{f'  ({notes})' if notes else ''}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("commit", nargs="?", help="to compare with")
  parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME", help="of runs")
  parser.add_argument(
    "--tolerance", type=float, default=0.0, help="difference that is allowed, relative to the largest of an array"
  )
  caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  parser.add_argument(
    "--cache", type=pathlib.Path, default=caches / "jaxpref" / "same_numbers", help="folder (default: %(default)s)"
  )
  parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
  parser.add_argument("--renew", action="store_true", help=f"write {NUMBERS.relative_to(ROOT)} from this checkout")
  parser.add_argument("--list", action="store_true", help="names of the runs, and their arguments")
  args = parser.parse_args()
  if args.list:
    _show(args.only)
    return
  if bool(args.commit) == args.renew:
    parser.error("expected a commit, or --renew")
  args.cache = args.cache.absolute()
  args.commit = args.commit and _git("rev-parse", "--verify", f"{args.commit}^{{commit}}")
  signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by a signal"))  # so that the worktree is removed
  work = pathlib.Path(tempfile.mkdtemp(prefix="same_numbers_"))
  now = Tree(ROOT, work / "now", args.cache)
  try:
    now.check()
    if args.renew:
      renew([name for name in args.only if name in OBJECTIVES], now)
      differ = []
    else:
      differ = _compare_all(args, work, now)
  except FailedError as error:
    sys.exit(f"error: {error}")
  if differ:
    sys.exit(f"error: {len(differ)} of {len(args.only)} runs differ: {', '.join(differ)}; all runs are in {work}.")
  shutil.rmtree(work)


if __name__ == "__main__":
  main()
