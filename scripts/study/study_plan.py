"""Which runs scripts/study/study.py makes: the rule of tuning, what is left, and how long it takes."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from scripts.study import ground, measure
from scripts.study.study_rows import read_run
from scripts.study.study_variants import BY_NAME, PARTS, Run, Variant, evaluations, load_config

RATES = (1.0, 2.0, 4.0)  # of the recipe's learning rate
BETAS = (0.1, 10.0)  # of the recipe's beta, at the best of these rates
TUNING_SEED = 100
ALLOWED_FALL = 0.05  # of caption accuracy against the base model, in tuning for style
# For --list, of a run on one core: to start and compile, twice, and UNet evaluations a minute.
START_MINUTES, EVALUATIONS_A_MINUTE = 0.7, 18_000
DRAWN = 2 * measure.DRAW["num_inference_steps"] * len(ground.split("test")) * measure.PICTURES["test"]


def choose(rows: Sequence[dict[str, Any]], hidden: str) -> dict[str, Any] | None:
  """Returns the row of the highest share; of equal ones the smallest learning rate, then the first; None if all failed.

  For style, among those whose caption accuracy falls by at most ALLOWED_FALL, or where there is none, that falls least.
  """
  if not (rows := [r for r in rows if "failed" not in r]):
    return None
  if hidden == "style":
    bound = min(-ALLOWED_FALL, max(r["captions"] for r in rows)) - 1e-9
    rows = [r for r in rows if r["captions"] >= bound]
  return min(rows, key=lambda r: (-r["share"], r["learning_rate"]))


def tuned(variant: Variant) -> Variant:
  """Returns the variant whose tuning decides."""
  return BY_NAME[variant.tuned_as or variant.name]


def tuning_runs(variant: Variant, folder: pathlib.Path) -> list[Run]:
  """Returns five runs on the validation split: three learning rates, then two betas at the best of them.

  Those of beta follow when the others are done. Fine-tuning has no beta, and two more rates in their place.
  """
  v = tuned(variant)
  config = load_config(v)
  rate, beta = config.optimizer.learning_rate, config.loss.beta
  run = lambda rate, beta: Run(v, rate, beta, TUNING_SEED, "validation")
  if config.loss.name == "sft":
    return [run(factor * rate, beta) for factor in (0.5, *RATES, 8.0)]
  runs = [run(factor * rate, beta) for factor in RATES]
  rows = [read_run(r, folder) for r in runs]
  if all(rows) and (best := choose([r for r in rows if r], v.hidden)):
    runs += [run(best["learning_rate"], factor * beta) for factor in BETAS]
  return runs


def chosen(variant: Variant, folder: pathlib.Path) -> tuple[float, float] | None:
  """Returns the learning rate and the beta of a variant's runs; None while tuning is not done."""
  runs = tuning_runs(variant, folder)
  rows = [read_run(r, folder) for r in runs]
  if len(runs) < len(RATES) + len(BETAS) or not all(rows):
    return None
  best = choose([r for r in rows if r], variant.hidden)
  if best is None:
    return None
  of_beta: dict[str | float, float] = {"tuned": best["beta"], "recipe": load_config(variant).loss.beta}
  return variant.learning_rate or best["learning_rate"], of_beta[variant.beta] if variant.beta in of_beta else float(
    variant.beta
  )


def test_runs(variant: Variant, folder: pathlib.Path) -> list[Run]:
  """Returns the runs that are reported; none before the variant is tuned."""
  if not (best := chosen(variant, folder)):
    return []
  return [Run(variant, *best, seed, "test") for seed in range(variant.seeds)]


def remaining(variants: Sequence[Variant], folder: pathlib.Path) -> Iterator[Run]:
  """Yields runs without a result: all of tuning, then by the order of variants, seed by seed of each part."""
  runs = {run.path: run for v in variants for run in tuning_runs(v, folder)}
  for part in PARTS:
    members = [v for v in variants if v.part == part]
    for seed, variant in itertools.product(range(max((v.seeds for v in members), default=0)), members):
      runs |= {run.path: run for run in test_runs(variant, folder)[seed : seed + 1]}
  yield from (run for run in runs.values() if read_run(run, folder) is None)


def plan(variants: Sequence[Variant], folder: pathlib.Path, workers: int) -> str:
  """Returns the runs that are left of each variant, and the hours they take with so many at a time."""
  lines, seen, total, hours = [], set[str](), 0, 0.0
  for v in variants:
    tuning = [r for r in tuning_runs(v, folder) if r.path not in seen]
    seen |= {r.path for r in tuning}
    pending = len(RATES) + len(BETAS) - len(tuning_runs(v, folder)) if tuning else 0
    done = sum(read_run(r, folder) is not None for r in test_runs(v, folder))
    left = sum(read_run(r, folder) is None for r in tuning) + pending + v.seeds - done
    mine = left * (START_MINUTES + (evaluations(load_config(v)) + DRAWN) / EVALUATIONS_A_MINUTE) / 60 / workers
    total, hours = total + left, hours + mine
    fields = " ".join(f"{k}={value}" for k, value in v.overrides.items())
    lines.append(f"{v.part} {v.name:18} {left:2} runs left, {mine:.1f} h  {v.recipe} {v.hidden} {v.agreement} {fields}")
  return "\n".join(
    [*lines, f"{total} runs left, about {hours:.1f} hours with {workers} at a time, each on an idle core"]
  )
