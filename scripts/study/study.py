"""Compares the methods on tiny-sd over seeds; writes papers.md and papers.json into docs/results.

    python scripts/study/study.py --list            # the plan: runs that are left, and hours
    python scripts/study/study.py                   # all runs that are left, then the report
    python scripts/study/study.py --until 18:30     # stops at that time, also in the middle of a run
    python scripts/study/study.py --workers 1       # one run at a time, on all cores; by default one on each core
    python scripts/study/study.py --only "B spo"    # only variants in whose part and name this is found
    python scripts/study/study.py --report          # only the report, of what is done; it names what is missing
    python scripts/study/study.py --models          # only the preference models
    python scripts/study/study.py --restore docs/results/papers.json  # goes on from a report: its runs count as done

Needs the pictures and labels of scripts/study/ground.py. Each run is one `python -m jaxpref.main` in
runs/study/VARIANT/, and one scripts/study/measure.py. Finished runs are reused, interrupted ones resume. SIGTERM stops
it as --until does.
"""

import argparse
import datetime
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent import futures

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from scripts.study import ground, measure, study_plan, study_report, study_rows, study_variants  # noqa: E402
from scripts.study.study_variants import ROOT, PreferenceModel, Run, Variant  # noqa: E402

_RUNNING: set[subprocess.Popen] = set()
_STOPPED = threading.Event()  # nothing new is begun


def stop() -> None:
  """Ends the runs that are going on, each of which saves what it has, and `train_all`."""
  _STOPPED.set()
  for process in tuple(_RUNNING):
    process.terminate()


def train_all(
  variants: Sequence[Variant], folder: pathlib.Path, deadline: float = float("inf"), workers: int = 1
) -> None:
  """Trains what remains, `workers` runs at a time, each on a core of its own if there are several.

  Raises:
    Any error of `train` but TimeoutError, when the other runs have ended.
  """
  begun: set[str] = set()
  running: set[str] = set()
  changed = threading.Condition()
  _STOPPED.clear()

  def take() -> Run | None:
    """The next run; waits while only a learning rate that is being chosen holds up the rest."""
    with changed:
      while True:
        left = [run for run in study_plan.remaining(variants, folder) if run.path not in begun]
        if left or not running or _STOPPED.is_set() or time.time() >= deadline:
          break
        changed.wait(1.0)
      if not left or _STOPPED.is_set() or time.time() >= deadline:
        return None
      begun.add(left[0].path)
      running.add(left[0].path)
      return left[0]

  def work(core: int | None) -> None:
    while run := take():
      print(f"{datetime.datetime.now():%H:%M:%S} {run.path} ...", file=sys.stderr, flush=True)
      try:
        train(run, folder, deadline, core)
      except TimeoutError as error:
        print(f"stopped: {error}", file=sys.stderr)
      except BaseException:
        _STOPPED.set()
        raise
      finally:
        with changed:
          running.discard(run.path)
          changed.notify_all()

  cores: list[int | None] = [None] * workers
  if workers > 1 and hasattr(os, "sched_getaffinity"):
    own = sorted(os.sched_getaffinity(0))
    cores = [own[i % len(own)] for i in range(workers)]
  with futures.ThreadPoolExecutor(workers) as pool:
    for done in [pool.submit(work, core) for core in cores]:
      done.result()


_MODEL = threading.Lock()


def train(run: Run, folder: pathlib.Path, deadline: float, core: int | None = None) -> None:
  """Trains, draws and scores. A loss that stays NaN is a result, too, in failed.txt; any other error is raised.

  Raises:
    TimeoutError: the deadline or `stop` came first; what was done is saved.
  """
  if model := study_variants.model_of(run.variant):
    with _MODEL:
      train_model(model, folder, deadline, core)
  place = folder / run.path
  if not (place / "export").is_dir():
    code, last = _call(run.command(folder), place, deadline, core)
    if code and "not finite" in last:
      (place / "failed.txt").write_text(last + "\n")
      return
    if code or not (place / "export").is_dir():
      raise _without_results(run.path, place, code, last)
  call(study_variants.measure_command(place, run.split), place, deadline, core)
  if study_rows.read_run(run, folder):  # which keeps the numbers in row.json
    remove_models(place)


def remove_models(place: pathlib.Path) -> None:
  """Removes the checkpoints and the model of a run that is measured; they are ten times the size of the rest."""
  for name in ("checkpoints", "export"):
    shutil.rmtree(place / name, ignore_errors=True)


def train_model(
  model: PreferenceModel, folder: pathlib.Path, deadline: float = float("inf"), core: int | None = None
) -> None:
  """Trains a preference model unless it is there; raises as `train`."""
  place = folder / "models" / model.name
  if not (place / "export").is_dir():
    call(model.command(folder), place, deadline, core, results=place / "export")
    shutil.rmtree(place / "checkpoints", ignore_errors=True)


def measure_base(folder: pathlib.Path, deadline: float = float("inf")) -> None:
  """Draws and scores both splits with the base model, once; raises as `train`."""
  base = study_rows.base_folder(folder)
  for split in measure.PICTURES:
    if not (base / f"{split}.npz").is_file():
      call(study_variants.measure_command(base, split, "tiny-sd"), base, deadline)


def call(
  arguments: list[str],
  place: pathlib.Path,
  deadline: float,
  core: int | None = None,
  *,
  results: pathlib.Path | None = None,
) -> None:
  """Runs a command, whose output goes to PLACE.log.

  Raises:
    TimeoutError: the deadline or `stop` came first; what was done is saved.
    RuntimeError: it failed, or did not write `results`.
  """
  code, last = _call(arguments, place, deadline, core)
  if code or (results is not None and not results.exists()):
    raise _without_results(f"{place.parent.name}/{place.name}", place, code, last)


def _without_results(what: str, place: pathlib.Path, code: int, last: str) -> Exception:
  if _STOPPED.is_set():
    return TimeoutError(f"{what} was stopped; it resumes with the next call")
  return RuntimeError(f"{what} ended with status {code} and no results, see {place}.log: {last}")


def _call(arguments: list[str], place: pathlib.Path, deadline: float, core: int | None) -> tuple[int, str]:
  """(status, last line) of a training command, whose output goes to PLACE.log."""
  place.parent.mkdir(parents=True, exist_ok=True)
  file = pathlib.Path(f"{place}.log")
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
  what = f"{place.parent.name}/{place.name}"
  with file.open("a") as log:
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    _RUNNING.add(process)
    if _STOPPED.is_set():  # just now
      process.terminate()
    if core is not None:
      os.sched_setaffinity(process.pid, {core})  # before it starts threads, which inherit it
    try:
      process.wait(None if deadline == float("inf") else max(deadline - time.time(), 1.0))
    except subprocess.TimeoutExpired:
      raise TimeoutError(f"{what} was not ready in time; it resumes with the next call") from None
    finally:
      _RUNNING.discard(process)
      if process.poll() is None:
        process.terminate()  # upon which it saves and ends
        process.wait()
  lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
  return process.returncode, (lines or ["no output"])[-1][:300]


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--until", help="HH:MM of today, when to stop")
  parser.add_argument(
    "--only", default="", help="variants in whose part and name this regular expression is found; the report has all"
  )
  parser.add_argument("--models", action="store_true", help="train only the preference models that --only needs")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: %(default)s)")
  parser.add_argument("--list", action="store_true", help="print the plan, run nothing")
  parser.add_argument("--report", action="store_true", help="run nothing, write the report")
  parser.add_argument("--restore", type=pathlib.Path, help="papers.json whose runs count as done, on a new machine")
  parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "study", help="default: %(default)s")
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs" / "results", help="default: %(default)s")
  args = parser.parse_args(arguments)
  if args.workers < 1:
    parser.error(f"--workers={args.workers}: expected at least 1.")
  folder, deadline = args.runs.resolve(), float("inf")
  if args.until:
    try:
      hour = datetime.datetime.strptime(args.until, "%H:%M").time()
    except ValueError:
      parser.error(f"--until={args.until}: expected HH:MM, such as 18:30.")
    deadline = datetime.datetime.combine(datetime.date.today(), hour).timestamp()
  try:
    variants = [v for v in study_variants.VARIANTS if re.search(args.only, f"{v.part} {v.name}")]
  except re.error as error:
    parser.error(f"--only={args.only!r} is no regular expression: {error}.")
  if not variants:
    parser.error(f"--only={args.only!r} is in no variant; --list shows all.")
  if args.restore:
    print(f"{study_rows.restore(args.restore, folder)} runs of {args.restore} count as done", file=sys.stderr)
  if args.list:
    print(study_plan.plan(variants, folder, args.workers))
    return
  if not args.report:
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, lambda *_: stop())
    if missing := ground.missing_labels(folder / "ground"):
      parser.error(f"there is no {missing}; make it by python scripts/study/ground.py.")
    measure_base(folder, deadline)
    if args.models:
      for model in dict.fromkeys(filter(None, map(study_variants.model_of, variants))):
        train_model(model, folder, deadline)
      return
    train_all(variants, folder, deadline, args.workers)
  study_report.write(folder, args.docs)


if __name__ == "__main__":
  try:
    main()
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
