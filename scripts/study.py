"""Compares the methods on tiny-sd over seeds; writes docs/study.md, docs/study.json and docs/study_*.png.

    python scripts/study.py --list            # the plan: runs that are left, and hours on two idle CPU cores
    python scripts/study.py                   # all runs that are left, then the report
    python scripts/study.py --until 18:30     # stops at that time, also in the middle of a run
    python scripts/study.py --workers 1       # one run at a time, on all cores; by default one on each core
    python scripts/study.py --only "B spo"    # only variants whose part and name contain this
    python scripts/study.py --report          # only the report, of what is done; it names what is missing

Each run is one `python -m jaxpref.main` in runs/study/VARIANT/. Finished runs are reused, interrupted ones resume.
"""

import argparse
import dataclasses
import datetime
import importlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
FACTORS = (1.0, 2.0, 4.0)  # of the recipe's learning rate
STEPS = {"dpo_tiny": 150, "tdpo_tiny": 150, "kto_tiny": 150, "spo_tiny": 20, "grpo_tiny": 20}  # half of the recipes'
TUNING_SEED = 100
TUNING_PICTURES = 2  # of a prompt
ALLOWED_FALL = 0.05  # of caption accuracy against the base model, in tuning; the error of 128 pictures is about 0.03
NO_GATE = 1e9  # a delta that no divergence exceeds
# Pictures and checkpoints during training would count as its time; what is stopped is saved all the same.
COMMON = {"sample.every": 0, "checkpoint.keep": 1, "checkpoint.every": 100_000}
MOVING = {"reference.mode": "update", "logging.every": 4}  # 4 divides all tau, so that every move is logged
# For --list, from the recipes' times on two idle cores: to start and compile, and UNet evaluations after that.
START_MINUTES, EVALUATIONS_A_MINUTE = 0.7, 35_000
D3PO = {"spo.pool_size": 2, "spo.warmup_steps": 1, "spo.inner_steps": 18, "spo.threshold": 0.0, "spo.minibatch": 1}
DDPO = {"batch_size": 24, "grpo.group_size": 1, "grpo.advantage": "batch"}
PARTS = {
  "A": "Diffusion-DPO with a moving reference and timestep-aware training (arXiv 2505.18736)",
  "B": "SPO (arXiv 2406.04314) and Diffusion-DPO",
  "C": "Other losses",
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A recipe with changes, the variant it is compared with, and the one whose learning rate it takes ("": its own).

  `judged_by` names a preference model of MODELS, in the place of the recipe's.
  """

  name: str
  part: str
  config_file: str
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  baseline: str = "dpo"
  tuned_as: str = ""
  judged_by: str = ""


# Preference models that variants need, by name: recipe and changes. Trained once, in runs/study/models/.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {"clean": ("spm_tiny", {"spm.step_aware": False})}


def _moving(name: str, tau: int, config_file: str = "dpo_tiny", tuned_as: str = "", **reference: Any) -> Variant:
  changes = {"reference.tau": tau} | {f"reference.{k}": v for k, v in reference.items()}
  return Variant(name, "A", config_file, MOVING | changes, tuned_as=tuned_as)


VARIANTS = (
  Variant("dpo", "A", "dpo_tiny"),
  _moving("ungated_tau64", 64, delta=NO_GATE, tuned_as="ungated_tau16"),  # so that only tau differs
  _moving("ungated_tau16", 16, delta=NO_GATE),
  _moving("ungated_tau4", 4, delta=NO_GATE, tuned_as="ungated_tau16"),
  _moving("freeze_tau64", 64, tuned_as="freeze_tau16"),
  _moving("freeze_tau16", 16),
  _moving("freeze_tau4", 4, tuned_as="freeze_tau16"),
  _moving("reinit_tau16", 16, on_diverge="reinit"),
  Variant("timesteps", "A", "tdpo_tiny", {"reference.mode": "frozen"}),
  _moving("timesteps_freeze_tau16", 16, "tdpo_tiny"),
  Variant("spo", "B", "spo_tiny"),
  Variant("spo_winner", "B", "spo_tiny", {"spo.next_latent": "winner"}, baseline="spo"),
  Variant("spo_loser", "B", "spo_tiny", {"spo.next_latent": "loser"}, baseline="spo"),
  Variant("spo_pool2", "B", "spo_tiny", {"spo.pool_size": 2}, baseline="spo"),
  Variant("spo_pool8", "B", "spo_tiny", {"spo.pool_size": 8}, baseline="spo"),
  Variant("spo_clean", "B", "spo_tiny", {"spo.step_aware": False}, baseline="spo", judged_by="clean"),
  Variant("spo_reference", "B", "spo_tiny", {"reference.mode": "update", "reference.tau": 8}, baseline="spo"),
  Variant("dpo_quarter", "B", "dpo_tiny", {"num_steps": 38}, tuned_as="dpo"),
  Variant("dpo_half", "B", "dpo_tiny", {"num_steps": 75}, tuned_as="dpo"),
  Variant("spo_quarter", "B", "spo_tiny", {"num_steps": 5}, baseline="dpo_quarter", tuned_as="spo"),
  Variant("spo_half", "B", "spo_tiny", {"num_steps": 10}, baseline="dpo_half", tuned_as="spo"),
  Variant("sft", "C", "dpo_tiny", {"loss.name": "sft"}),
  Variant("smoothed", "C", "dpo_tiny", {"loss.label_smoothing": 0.1}),
  Variant("robust", "C", "dpo_tiny", {"loss.name": "robust", "loss.label_smoothing": 0.1}),
  Variant("ipo", "C", "dpo_tiny", {"loss.name": "ipo"}),
  Variant("hinge", "C", "dpo_tiny", {"loss.name": "hinge"}),
  Variant("dspo", "C", "dpo_tiny", {"loss.name": "dspo", "loss.beta": 0.001}),
  Variant("mapo", "C", "dpo_tiny", {"loss.name": "mapo", "loss.beta": 0.1}),
  Variant("safeguard", "C", "dpo_tiny", {"loss.safeguard": 0.0}),
  Variant("kto", "C", "kto_tiny"),
  # The same number of samples in an iteration, of 4 prompts and of 24.
  Variant("grpo", "C", "grpo_tiny", baseline="spo"),
  Variant("ddpo", "C", "grpo_tiny", DDPO, baseline="spo"),
  # One label for all steps of two trajectories that part after the first step: SPO with a single group.
  Variant("d3po", "C", "spo_tiny", D3PO, baseline="spo"),
)
BY_NAME = {v.name: v for v in VARIANTS}
CURVES = {"Diffusion-DPO": ("dpo_quarter", "dpo_half", "dpo"), "SPO": ("spo_quarter", "spo_half", "spo")}


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run with its evaluation, in the folder `path` of runs/study."""

  variant: Variant
  learning_rate: float
  seed: int
  split: str

  @property
  def path(self) -> str:
    return f"{self.variant.name}/{self.split}_{self.learning_rate:g}_seed{self.seed}"

  def fields(self) -> dict[str, Any]:
    own = {"seed": self.seed, "optimizer.learning_rate": self.learning_rate, "evaluation.split": self.split}
    if self.split == "validation":
      own["evaluation.seeds_per_prompt"] = TUNING_PICTURES
    return changes(self.variant) | own


def changes(variant: Variant) -> dict[str, Any]:
  """What a variant's runs change of the recipe."""
  return COMMON | {"num_steps": STEPS[variant.config_file]} | variant.overrides


def load_config(variant: Variant) -> Any:
  """The recipe with the variant's changes."""
  config = importlib.import_module(f"configs.{variant.config_file}").get_config()
  config.update_from_flattened_dict(changes(variant))
  return config


def command(run: Run, folder: pathlib.Path) -> list[str]:
  fields = run.fields()
  if run.variant.judged_by:
    fields["preference_model"] = folder / "models" / run.variant.judged_by / "export"
  return _main(run.variant.config_file, fields, folder / run.path)


def _main(config_file: str, fields: dict[str, Any], workdir: pathlib.Path) -> list[str]:
  start = [sys.executable, "-m", "jaxpref.main", f"--config=configs/{config_file}.py"]
  return [*start, *(f"--config.{k}={v}" for k, v in fields.items()), f"--workdir={workdir}"]


def evaluations(config: Any, valid: float = 1.0) -> float:
  """UNet evaluations of one sample in the training of a run, counted as in the README ("What it costs").

  Guidance doubles a call, a backward pass is two more. Not counted: rows that only fill up a minibatch, the VAE, and
  the preference model. `valid` is the share of SPO's pairs above the threshold.
  """
  reference_free = config.objective == "dpo" and config.loss.name in ("mapo", "sft")
  reference_free |= config.objective == "grpo" and not config.grpo.kl_coef
  update = (not reference_free) + 1 + 2  # reference, policy, and its backward pass
  if config.objective == "spo":
    s, after = config.spo, config.spo.num_inference_steps - config.spo.warmup_steps
    rollout = s.warmup_steps + 1 + (after - 1) * s.pool_size
    length = s.inner_steps + 1
    shared = after // length - (length == 1)  # of winner and loser, which share start and call
    step = 2 * config.batch_size * (rollout + valid * update * (shared + 2 * (after - shared)))
  elif config.objective == "grpo":
    g = config.grpo
    trained = max(1, round(g.timestep_fraction * g.num_inference_steps))
    step = 2 * config.batch_size * g.group_size * (g.num_inference_steps + update * trained)
  else:
    step = config.batch_size * update * (1 if config.objective == "kto" else 2)
  moves = config.num_steps // config.reference.tau if config.reference.mode == "update" else 0
  return config.num_steps * step + moves * 2 * min(8, config.batch_size)


def read_run(run: Run, folder: pathlib.Path) -> dict[str, Any] | None:
  """A run's numbers, or only `failed` of one that became NaN; None without a result; ValueError if of other fields."""
  place = folder / run.path
  row = {"variant": run.variant.name, "seed": run.seed, "learning_rate": run.learning_rate, "split": run.split}
  if (place / "failed.txt").is_file():
    return row | {"failed": (place / "failed.txt").read_text().strip()}
  if not (place / "results.json").is_file():
    return None
  made = json.loads((place / "config.json").read_text())
  for name, value in run.fields().items():
    found = made
    for key in name.split("."):
      found = found.get(key, {})
    if found != value:
      raise ValueError(f"{place} was made with config.{name}={found!r}, expected {value!r}; move the folder away.")
  results = json.loads((place / "results.json").read_text())
  metrics = [json.loads(m) for m in (place / "metrics.jsonl").read_text().splitlines() if m.endswith("}")]
  config, base, aligned = load_config(run.variant), results["base"], results["aligned"]
  spo, online = config.objective == "spo", config.objective in ("spo", "grpo")
  # The first row's time has what is done once. The median, since other work on the machine may have slowed some.
  of_batch = {"dpo": 2, "tdpo": 2, "grpo": config.grpo.group_size}
  images = config.batch_size * of_batch.get(config.objective, 1)
  times = [images / m["images_per_second"] for m in metrics[1:]]
  row |= {
    "preferred_share": aligned["preferred_share"]["mean"],
    "win_rate": results["win_rate"],
    "caption_accuracy_change": results["caption_accuracy_change"],
    "base_preferred_share": base["preferred_share"]["mean"],
    "protocol": results["protocol"],
    "minutes": float(np.median(times)) * config.num_steps / 60,
    "evaluations": evaluations(config, float(np.mean([m["valid_pairs"] for m in metrics])) if spo else 1.0),
    "updates": float(np.mean([m["updates"] for m in metrics])) * config.num_steps if online else config.num_steps,
  }
  if moved := [m for m in metrics if "divergence" in m]:
    passed = [b["divergence"] for a, b in itertools.pairwise(moved) if b["reference_updates"] > a["reference_updates"]]
    row |= {"last_d": moved[-1]["divergence"], "largest_d": max(m["divergence"] for m in moved)}
    row |= {"accepted_d": max(passed, default=None), "moves": moved[-1]["reference_updates"]}
    row["d_curve"] = [(m["step"], m["divergence"]) for m in moved]
  return row


def choose(rows: Sequence[dict[str, Any]]) -> float | None:
  """The learning rate of the highest preferred share; of equal ones the smallest; None if all failed.

  Among those whose caption accuracy falls by at most ALLOWED_FALL, or where there is none, that falls least.
  """
  if not (rows := [r for r in rows if "failed" not in r]):
    return None
  bound = min(-ALLOWED_FALL, max(r["caption_accuracy_change"] for r in rows)) - 1e-9
  allowed = [r for r in rows if r["caption_accuracy_change"] >= bound]
  return min(allowed, key=lambda r: (-r["preferred_share"], r["learning_rate"]))["learning_rate"]


def tuning_runs(variant: Variant) -> list[Run]:
  """The runs on the validation split that decide on the learning rate of a variant, be they its own or another's."""
  tuned = BY_NAME[variant.tuned_as or variant.name]
  rate = load_config(tuned).optimizer.learning_rate
  return [Run(tuned, factor * rate, TUNING_SEED, "validation") for factor in FACTORS]


def test_runs(variant: Variant, folder: pathlib.Path, seeds: int) -> list[Run]:
  """None before the learning rate is known."""
  rows = [row for run in tuning_runs(variant) if (row := read_run(run, folder))]
  rate = choose(rows) if len(rows) == len(FACTORS) else None
  return [] if rate is None else [Run(variant, rate, seed, "test") for seed in range(seeds)]


def remaining(variants: Sequence[Variant], folder: pathlib.Path, seeds: int) -> Iterator[Run]:
  """Runs without a result: all of tuning, then seed by seed, so that those of a seed can be compared early."""
  runs = {run.path: run for v in variants for run in tuning_runs(v)}
  yield from (run for run in runs.values() if read_run(run, folder) is None)
  for seed, variant in itertools.product(range(seeds), variants):
    yield from (r for r in test_runs(variant, folder, seeds)[seed : seed + 1] if read_run(r, folder) is None)


def train_all(
  variants: Sequence[Variant], folder: pathlib.Path, seeds: int, deadline: float = float("inf"), workers: int = 1
) -> None:
  """Trains what remains, `workers` runs at a time, each on a core of its own if there are several.

  Raises:
    Any error of `train` but TimeoutError, when the other runs have ended.
  """
  begun: set[str] = set()
  running: set[str] = set()
  changed, stopped = threading.Condition(), threading.Event()

  def take() -> Run | None:
    """The next run; waits while only a learning rate that is being chosen holds up the rest."""
    with changed:
      while True:
        left = [run for run in remaining(variants, folder, seeds) if run.path not in begun]
        if left or not running or stopped.is_set() or time.time() >= deadline:
          break
        changed.wait(1.0)
      if not left or stopped.is_set() or time.time() >= deadline:
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
        stopped.set()
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
  """Trains and evaluates. A loss that stays NaN is a result, too, in failed.txt; any other error is raised.

  Raises:
    TimeoutError: the deadline came first; what was done is saved.
  """
  if name := run.variant.judged_by:
    model, (config_file, changes) = folder / "models" / name, MODELS[name]
    with _MODEL:
      if not (model / "results.json").is_file():
        code, last = _call(_main(config_file, {"checkpoint.keep": 1} | changes, model), model, deadline, core)
        if code or not (model / "results.json").is_file():
          raise RuntimeError(f"{model} ended with status {code} and no results, see {model}.log: {last}")
  place = folder / run.path
  code, last = _call(command(run, folder), place, deadline, core)
  if code and "not finite" in last:
    (place / "failed.txt").write_text(last + "\n")
  elif code or not (place / "results.json").is_file():
    raise RuntimeError(f"{run.path} ended with status {code} and no results, see {place}.log: {last}")
  shutil.rmtree(place / "checkpoints", ignore_errors=True)  # ten times the size of the rest


def _call(arguments: list[str], place: pathlib.Path, deadline: float, core: int | None) -> tuple[int, str]:
  """(status, last line) of a training command, whose output goes to PLACE.log."""
  place.parent.mkdir(parents=True, exist_ok=True)
  file = pathlib.Path(f"{place}.log")
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
  with file.open("a") as log:
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if core is not None:
      os.sched_setaffinity(process.pid, {core})  # before it starts threads, which inherit it
    try:
      process.wait(None if deadline == float("inf") else max(deadline - time.time(), 1.0))
    except subprocess.TimeoutExpired:
      what = f"{place.parent.name}/{place.name}"
      raise TimeoutError(f"{what} was not ready in time; it resumes with the next call") from None
    finally:
      if process.poll() is None:
        process.terminate()  # upon which it saves and ends
        process.wait()
  lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
  return process.returncode, (lines or ["no output"])[-1][:300]


def plan(variants: Sequence[Variant], folder: pathlib.Path, seeds: int) -> str:
  """The runs that are left of each variant, and the hours they take."""
  lines, seen, total, hours = [], set[str](), 0, 0.0
  for variant in variants:
    runs = [r for r in tuning_runs(variant) if r.path not in seen]
    seen |= {r.path for r in runs}
    done = sum(read_run(r, folder) is not None for r in [*runs, *test_runs(variant, folder, seeds)])
    left, config = len(runs) + seeds - done, load_config(variant)
    e = config.evaluation
    drawn = 2 * 2 * e.num_prompts * e.seeds_per_prompt * e.num_inference_steps  # two models, with guidance
    mine = left * (START_MINUTES + (evaluations(config) + drawn) / EVALUATIONS_A_MINUTE) / 60
    total, hours = total + left, hours + mine
    fields = " ".join(f"{k}={v}" for k, v in variant.overrides.items())
    of = f"{left:2} of {len(runs) + seeds} runs left, {mine:.1f} h"
    lines.append(f"{variant.part} {variant.name:22} {of}  {variant.config_file} {fields}")
  return "\n".join([*lines, f"{total} runs left, about {hours:.1f} hours on two idle CPU cores"])


# ---- Report ------------------------------------------------------------------------------------------------------


def collect(folder: pathlib.Path, seeds: int) -> dict[str, Any]:
  """`runs` and `comparisons` by variant, `tuning` by the variant it was done for, and the `missing` runs."""
  study: dict[str, Any] = {"seeds": seeds, "runs": {}, "tuning": {}, "comparisons": {}, "missing": []}
  for v in VARIANTS:
    tests = test_runs(v, folder, seeds)
    tuning = [] if v.tuned_as else tuning_runs(v)
    rows = {run.path: read_run(run, folder) for run in [*tuning, *tests]}
    study["missing"] += [path for path, row in rows.items() if not row]
    study["missing"] += [] if tests else [f"{v.name}/test_*: no learning rate is chosen"]
    study["runs"][v.name] = [row for row in rows.values() if row and row["split"] == "test"]
    if tuning:
      chosen = tests[0].learning_rate if tests else None
      study["tuning"][v.name] = {"chosen": chosen, "runs": [r for r in rows.values() if r and r["split"] != "test"]}
  for v in VARIANTS:
    if v.name != v.baseline and (found := compare(study["runs"][v.name], study["runs"][v.baseline])):
      study["comparisons"][v.name] = found
  return study


def compare(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """Preferred share of the same seeds: differences, and p of the exact two-sided sign-flip test of their mean."""
  pairs = [(a, b) for a in new for b in old if a["seed"] == b["seed"] and "failed" not in a | b]
  if not pairs:
    return None
  change, accuracy = (
    np.array([a[key] - b[key] for a, b in pairs]) for key in ("preferred_share", "caption_accuracy_change")
  )
  flipped = np.array(list(itertools.product((1, -1), repeat=len(pairs)))) @ change
  p = np.mean(np.abs(flipped) >= abs(change.sum()) - 1e-9)
  return {"change": change.tolist(), "p": float(p), "caption_accuracy": float(accuracy.mean())}


def spread(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
  """Mean (lowest to highest), one number if all are the same, empty if no row has it."""
  values = [r[key] for r in rows if r.get(key) is not None]
  shown = [f"{f(values):{form}}" for f in (np.mean, min, max)] if values else [""]
  return shown[0] if len(set(shown)) == 1 else "{} ({} to {})".format(*shown)


def _table(head: str, rows: Sequence[Sequence[Any]]) -> list[str]:
  lines = ["|" + "---|" * (head.count("|") + 1), *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
  return [f"| {head} |", *lines, ""]


def markdown(study: dict[str, Any], conclusions: str = "") -> str:
  """docs/study.md; the conclusions are written by hand, in docs/study_conclusions.md."""
  runs = {name: [r for r in rows if "failed" not in r] for name, rows in study["runs"].items()}
  rule: dict[str, Any] = {"factors": ", ".join(map(str, FACTORS)), "seed": TUNING_SEED}
  rule |= {"fall": f"{100 * ALLOWED_FALL:g}", "pictures": TUNING_PICTURES}
  rule["conclusions"] = conclusions and f"## Conclusions\n\n{conclusions}\n## Numbers\n\n"
  lines = [_HEAD.format(n=study["seeds"], p=2 / 2 ** study["seeds"], **rule)]
  if done := [r for rows in runs.values() for r in rows]:
    text = "{num_prompts} prompts x {seeds_per_prompt} image seeds, {num_inference_steps} steps, guidance"
    text = f"Evaluation: {text} {{guidance_scale}}. The base model's preferred share is"
    lines.append(f"{text.format(**done[0]['protocol'])} {spread(done, 'base_preferred_share', '.1%')}.\n")
  cell = lambda r: r.get("failed") or f"{r['preferred_share']:.1%} ({100 * r['caption_accuracy_change']:+.1f})"
  rows: list[Sequence[Any]] = [
    (name, "; ".join(f"{r['learning_rate']:g}: {cell(r)}" for r in t["runs"]), t["chosen"] or "")
    for name, t in study["tuning"].items()
  ]
  lines += ["## Learning rates", ""]
  lines += _table("variant | rate: preferred share (change of caption accuracy, points) | chosen", rows)
  for part, title in PARTS.items():
    members = [v for v in VARIANTS if v.part == part]
    names = list(dict.fromkeys([v.baseline for v in members] + [v.name for v in members]))
    lines += [f"## {part}. {title}", ""]
    head = "variant | seeds | preferred share | win rate | caption accuracy | updates | minutes | UNet evaluations"
    rows = [[n, len(runs[n]), *(spread(runs[n], k, f) for k, f in _COLUMNS.items())] for n in names if runs[n]]
    lines += _table(head, rows)
    found = [(v, study["comparisons"][v.name]) for v in members if v.name in study["comparisons"]]
    rows = []
    for v, f in found:
      c, accuracy = 100 * np.array(f["change"]), 100 * f["caption_accuracy"]
      points = f"{c.mean():+.1f} ({c.min():+.1f} to {c.max():+.1f})"
      rows.append([v.name, v.baseline, len(c), points, f"{f['p']:.3g}", f"{accuracy:+.1f}"])
    lines += _table("variant | against | seeds | preferred share, points | p | caption accuracy, points", rows)
    for word, sign in (("Above", 1), ("Below", -1)):
      always = [v.name for v, f in found if min(sign * c for c in f["change"]) > 0]
      lines.append(f"{word} what it is compared with, in all seeds there are: {', '.join(always) or 'none'}.\n")
    if moving := [v for v in members if v.overrides.get("reference.mode") == "update"]:
      shown = lambda v: [spread(runs[v.name], key, form) for key, form in _D.items()]
      rows = [[v.name, v.overrides["reference.tau"], *shown(v)] for v in moving if runs[v.name]]
      lines += _table("variant | tau | last D | largest D | largest D of a move that was made | moves", rows)
      lines += [*_divergence_sentences(moving, runs), ""]
    lines += [_CLEAN] if part == "B" else []
  failed = [r for rows in study["runs"].values() for r in rows if "failed" in r]
  failed = [f"{r['variant']} seed {r['seed']} failed: {r['failed']}" for r in failed]
  lines += ["## Missing", "", *(f"- {line}" for line in [*failed, *study["missing"]] or ["nothing"])]
  return "\n".join(lines) + "\n"


def _divergence_sentences(moving: Sequence[Variant], runs: dict[str, list]) -> list[str]:
  """What the numbers say of the reference without a gate as tau falls, and of the gate."""
  last, lines = {}, []
  for v in moving:
    delta, made = load_config(v).reference.delta, [r["accepted_d"] for r in runs[v.name] if r["accepted_d"] is not None]
    if delta == NO_GATE and runs[v.name]:
      last[v.overrides["reference.tau"]] = float(np.mean([r["last_d"] for r in runs[v.name]]))
    elif made:
      where = "above" if max(made) > delta else "not above"
      lines.append(f"- {v.name}: the largest D of a move that was made, {max(made):.4f}, is {where} delta, {delta:g}.")
  if len(last) > 1:
    values = [last[tau] for tau in sorted(last, reverse=True)]
    rises = "rises" if all(a < b for a, b in itertools.pairwise(values)) else "does not rise throughout"
    by_tau = ", ".join(f"{last[tau]:.4f} at {tau}" for tau in sorted(last, reverse=True))
    lines.append(f"- Without a gate the last D {rises} as tau falls: {by_tau}.")
  return lines


_COLUMNS = {"preferred_share": ".1%", "win_rate": ".1%", "caption_accuracy_change": "+.1%", "updates": ".0f"}
_COLUMNS |= {"minutes": ".1f", "evaluations": ",.0f"}
_D = {"last_d": ".4f", "largest_d": ".4f", "accepted_d": ".4f", "moves": ".0f"}
_HEAD = """# Study of methods on tiny-sd

Made by `python scripts/study.py`; all numbers are in study.json. Runs have half of the updates or iterations of the
recipes (configs/*_tiny.py); all that is not named is theirs. Learning rates: of {factors} times the recipe's, with seed
{seed} and {pictures} pictures of each validation prompt, that of the highest preferred share among those whose caption
accuracy falls by at most {fall} points against base (if there is none, those that fall least); of equal ones the
smaller. Variants of tau alone take the rate of tau 16, shorter runs that of the full one. Then {n} seeds, judged on the
test prompts by the judge, which no training sees.

{conclusions}Numbers are means over seeds (lowest to highest). All have as many updates as Diffusion-DPO, or as many
iterations as SPO (quarter and half: 1/4 and 1/2 of them); KTO sees as many images as there are in the pairs. Caption
accuracy is the change against base. Minutes are those of training alone, by the median step, on one core of a machine
that had other work. UNet evaluations are those of one sample in training, as the README counts them. p is of the exact
two-sided sign-flip test over seeds, a weak one: with {n} seeds it cannot be below {p:.3g}. D is what the gate reads: a
running mean of err_ref - err_init, 8 samples at a time, of the reference that is proposed, also where it is then
refused; reinit sets it to 0.

![D of the proposed reference](study_divergence.png) ![Preferred share against cost](study_budget.png)
"""
_CLEAN = """spo_clean is judged by an ordinary preference model: the recipe of the step-aware one (configs/spm_tiny.py,
from the same tiny-clip), trained on images without noise, and told time 0 at every step.
"""


def plots(study: dict[str, Any], docs: pathlib.Path) -> None:
  """D over steps, and preferred share over minutes and UNet evaluations."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  runs = {name: [r for r in rows if "failed" not in r] for name, rows in study["runs"].items()}
  size: dict[str, Any] = {"figsize": (9, 3.2), "layout": "constrained"}
  figure, axes = plt.subplots(1, 2, **size)
  for v in VARIANTS:
    curves = [r["d_curve"] for r in runs[v.name] if v.part == "A" and "d_curve" in r]
    if curves:
      axis = axes[0 if load_config(v).reference.delta == NO_GATE else 1]
      axis.plot(*np.mean(curves, axis=0).T, label=v.name)
      axis.legend(fontsize=7)
  axes[1].axhline(load_config(BY_NAME["freeze_tau16"]).reference.delta, color="0.8")
  for axis, title in zip(axes, ("without a gate", "with a gate at the grey line"), strict=True):
    axis.set(title=title, xlabel="step", ylabel="D of the proposal, mean over seeds")
  figure.savefig(docs / "study_divergence.png", dpi=110)
  figure, axes = plt.subplots(1, 2, sharey=True, **size)
  for axis, key in zip(axes, ("minutes", "evaluations"), strict=True):
    for label, names in CURVES.items():
      points = [np.array([(r[key], 100 * r["preferred_share"]) for r in runs[n]]) for n in names if runs[n]]
      if points:
        (line,) = axis.plot(*np.array([p.mean(axis=0) for p in points]).T, label=label)
        axis.plot(*np.concatenate(points).T, "o", color=line.get_color(), markersize=3)
        axis.legend()
    axis.set(xlabel=f"{'UNet ' * (key == 'evaluations')}{key} of training", ylabel="preferred share, %: seeds and mean")
  figure.savefig(docs / "study_budget.png", dpi=110)
  plt.close("all")


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--until", help="HH:MM of today, when to stop")
  parser.add_argument("--only", default="", help="variants whose part and name contain this; the report has all")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: %(default)s)")
  parser.add_argument("--list", action="store_true", help="print the plan, run nothing")
  parser.add_argument("--report", action="store_true", help="run nothing, write the report")
  parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "study", help="default: %(default)s")
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs", help="default: %(default)s")
  args = parser.parse_args(arguments)
  if args.workers < 1:
    parser.error(f"--workers={args.workers}: expected at least 1.")
  sys.path.insert(0, str(ROOT))
  folder, deadline = args.runs.resolve(), float("inf")
  variants = [v for v in VARIANTS if args.only in f"{v.part} {v.name}"]
  if not variants:
    parser.error(f"--only={args.only!r} is in no variant; --list shows all.")
  if args.list:
    print(plan(variants, folder, args.seeds))
    return
  if args.until:
    hour = datetime.datetime.strptime(args.until, "%H:%M").time()
    deadline = datetime.datetime.combine(datetime.date.today(), hour).timestamp()
  if not args.report:
    train_all(variants, folder, args.seeds, deadline, args.workers)
  study = collect(folder, args.seeds)
  args.docs.mkdir(parents=True, exist_ok=True)
  plots(study, args.docs)
  conclusions = args.docs / "study_conclusions.md"
  (args.docs / "study.md").write_text(markdown(study, conclusions.read_text() if conclusions.is_file() else ""))
  for row in (row for rows in study["runs"].values() for row in rows):
    row.pop("d_curve", None)  # in a picture, and in the runs
  (args.docs / "study.json").write_text(json.dumps(study, indent=1) + "\n")


if __name__ == "__main__":
  main()
