"""What scripts/study/study.py runs: the variants, the rule of tuning, and what a run leaves behind."""

import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
FACTORS = (1.0, 2.0, 4.0)  # of the recipe's learning rate
# What the study trains by: the recipes as they were when it was made, at half of their lengths then.
OF_RECIPE: dict[str, dict[str, Any]] = {
  "dpo_tiny": {"num_steps": 150},
  "tdpo_tiny": {"num_steps": 150},
  "kto_tiny": {"num_steps": 150},
  "spo_tiny": {"num_steps": 20, "spo.warmup_steps": 4},
  "grpo_tiny": {"num_steps": 20},
}
TUNING_SEED = 100
TUNING_PICTURES = 2  # of a prompt
ALLOWED_FALL = 0.05  # of caption accuracy against the base model, in tuning; the error of 128 pictures is about 0.03
NO_GATE = 1e9  # a delta that no divergence exceeds
# Pictures and checkpoints during training would count as its time; what is stopped is saved all the same.
COMMON = {"sample.every": 0, "checkpoint.keep": 1, "checkpoint.every": 100_000}
MOVING = {"reference.mode": "update", "logging.every": 4}  # 4 divides all tau, so that every move is logged
# For --list, of a run on one core: to start and compile, and UNet evaluations after that, evaluation included.
START_MINUTES, EVALUATIONS_A_MINUTE = 1.0, 36_000
D3PO = {"spo.pool_size": 2, "spo.warmup_steps": 1, "spo.inner_steps": 18, "spo.threshold": 0.0, "spo.minibatch": 1}
DDPO = {"batch_size": 24, "grpo.group_size": 1, "grpo.advantage": "batch"}
PARTS = {
  "A": "Diffusion-DPO with a moving reference and timestep-aware training (arXiv 2505.18736)",
  "B": "SPO (arXiv 2406.04314) and Diffusion-DPO",
  "C": "Other losses",
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A recipe with changes, the variants it is compared with, and the one whose learning rate it takes ("": its own).

  `judged_by` names a preference model of MODELS, in the place of the recipe's. One with `betas` is `tuned_as` with one
  of them, or as it is, whichever is chosen at that one's learning rate.
  """

  name: str
  part: str
  config_file: str
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  against: tuple[str, ...] = ("dpo",)
  tuned_as: str = ""
  judged_by: str = ""
  betas: tuple[float, ...] = ()


# Preference models that variants need, by name: recipe and changes. Trained once, in runs/study/models/.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {"clean": ("spm_tiny", {"spm.step_aware": False})}


def _moving(
  name: str,
  tau: int,
  config_file: str = "dpo_tiny",
  tuned_as: str = "",
  against: tuple[str, ...] = (),
  **reference: Any,
) -> Variant:
  changes = {"reference.tau": tau} | {f"reference.{k}": v for k, v in reference.items()}
  return Variant(name, "A", config_file, MOVING | changes, ("dpo", *against), tuned_as)


def _beta(name: str, config_file: str, *betas: float, part: str = "C") -> Variant:
  against = ("dpo",) if name == "dpo" else ("dpo_beta", name)
  return Variant(f"{name}_beta", part, config_file, against=against, tuned_as=name, betas=betas)


VARIANTS = (
  Variant("dpo", "A", "dpo_tiny"),
  _moving("ungated_tau64", 64, delta=NO_GATE, tuned_as="ungated_tau16"),  # so that only tau differs
  _moving("ungated_tau16", 16, delta=NO_GATE, against=("dpo_beta",)),
  _moving("ungated_tau4", 4, delta=NO_GATE, tuned_as="ungated_tau16"),
  _moving("freeze_tau64", 64, tuned_as="freeze_tau16", against=("dpo_rate_of_freeze",)),
  _moving("freeze_tau16", 16, against=("dpo_rate_of_freeze", "dpo_beta", "ungated_tau16")),
  _moving("freeze_tau4", 4, tuned_as="freeze_tau16", against=("dpo_rate_of_freeze", "ungated_tau4")),
  _moving("reinit_tau16", 16, against=("dpo_rate_of_freeze", "freeze_tau16"), on_diverge="reinit"),
  # Those with a gate were given another learning rate than Diffusion-DPO: this tells what the rate alone does.
  Variant("dpo_rate_of_freeze", "A", "dpo_tiny", tuned_as="freeze_tau16"),
  Variant("timesteps", "A", "tdpo_tiny", {"reference.mode": "frozen"}),
  # Tuning gave timestep-aware training half the rate of what it is compared with: this has the same.
  Variant("timesteps_rate_of_dpo", "A", "tdpo_tiny", {"reference.mode": "frozen"}, tuned_as="dpo"),
  _moving("timesteps_freeze_tau16", 16, "tdpo_tiny", against=("freeze_tau16",)),
  # A smaller beta lets the policy go further, too: both with the beta that suits them.
  _beta("freeze_tau16", "dpo_tiny", 50.0, 5000.0, part="A"),
  Variant("spo", "B", "spo_tiny", against=("dpo", "dpo_beta", "dpo_half", "dpo_quarter")),
  Variant("spo_winner", "B", "spo_tiny", {"spo.next_latent": "winner"}, against=("spo",), tuned_as="spo"),
  Variant("spo_loser", "B", "spo_tiny", {"spo.next_latent": "loser"}, against=("spo",), tuned_as="spo"),
  Variant("spo_pool2", "B", "spo_tiny", {"spo.pool_size": 2}, against=("spo",), tuned_as="spo"),
  Variant("spo_pool8", "B", "spo_tiny", {"spo.pool_size": 8}, against=("spo", "spo_pool2"), tuned_as="spo"),
  Variant("spo_clean", "B", "spo_tiny", {"spo.step_aware": False}, against=("spo",), tuned_as="spo", judged_by="clean"),
  Variant("spo_pool_last", "B", "spo_tiny", {"spo.pool_last_step": True}, against=("spo",), tuned_as="spo"),
  Variant(
    "spo_reference", "B", "spo_tiny", {"reference.mode": "update", "reference.tau": 8}, against=("spo",), tuned_as="spo"
  ),
  Variant("dpo_quarter", "B", "dpo_tiny", {"num_steps": 38}, tuned_as="dpo"),
  Variant("dpo_half", "B", "dpo_tiny", {"num_steps": 75}, tuned_as="dpo"),
  # As many wrong labels as the preference model of SPO gives held-out pairs.
  Variant("dpo_flipped", "B", "dpo_tiny", {"data.flip_labels": 0.273}, against=("dpo", "spo"), tuned_as="dpo"),
  Variant("spo_quarter", "B", "spo_tiny", {"num_steps": 5}, against=("dpo_quarter",), tuned_as="spo"),
  Variant("spo_half", "B", "spo_tiny", {"num_steps": 10}, against=("dpo_half",), tuned_as="spo"),
  Variant("sft", "C", "dpo_tiny", {"loss.name": "sft"}),
  Variant("smoothed", "C", "dpo_tiny", {"loss.label_smoothing": 0.1}, tuned_as="dpo"),
  Variant("robust", "C", "dpo_tiny", {"loss.name": "robust", "loss.label_smoothing": 0.1}, tuned_as="dpo"),
  Variant("ipo", "C", "dpo_tiny", {"loss.name": "ipo"}),
  Variant("hinge", "C", "dpo_tiny", {"loss.name": "hinge"}),
  Variant("dspo", "C", "dpo_tiny", {"loss.name": "dspo", "loss.beta": 0.001}),
  Variant("mapo", "C", "dpo_tiny", {"loss.name": "mapo", "loss.beta": 0.1}),
  Variant("safeguard", "C", "dpo_tiny", {"loss.safeguard": 0.0}, tuned_as="dpo"),
  Variant("kto", "C", "kto_tiny"),
  # beta tuned, too: a tenth and ten times the one above. But IPO's 500 asks for a margin of errors of 0.001, and holds
  # it there: smaller ones ask for more. Not DSPO's: below 2, where its gradient turns, it stays SFT to another target.
  _beta("dpo", "dpo_tiny", 50.0, 5000.0),
  _beta("ipo", "dpo_tiny", 5.0, 50.0),
  _beta("hinge", "dpo_tiny", 50.0, 5000.0),
  _beta("mapo", "dpo_tiny", 0.01, 1.0),
  _beta("kto", "kto_tiny", 50.0, 5000.0),
  _beta("spo", "spo_tiny", 1.0, 100.0),
  # The same number of samples in an iteration, of 4 prompts and of 24.
  Variant("grpo", "C", "grpo_tiny", against=("spo",)),
  Variant("ddpo", "C", "grpo_tiny", DDPO, against=("spo",)),
  # One label for all steps of two trajectories that part after the first step: SPO with a single group.
  Variant("d3po", "C", "spo_tiny", D3PO, against=("spo",)),
)
BY_NAME = {v.name: v for v in VARIANTS}


def with_beta(name: str, beta: float) -> Variant:
  """The variant of that name with another beta, at its learning rate."""
  v = BY_NAME[name]
  return dataclasses.replace(
    v, name=f"{name}_beta{beta:g}", overrides=v.overrides | {"loss.beta": beta}, tuned_as=v.tuned_as or name
  )


BY_NAME |= {v.name: v for v in (with_beta(chosen.tuned_as, b) for chosen in VARIANTS for b in chosen.betas)}
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
  return COMMON | OF_RECIPE[variant.config_file] | variant.overrides


def load_config(variant: Variant) -> Any:
  """The recipe with the variant's changes."""
  config = importlib.import_module(f"configs.{variant.config_file}").get_config()
  config.update_from_flattened_dict(changes(variant))
  return config


def beta(variant: Variant) -> float:
  return float(load_config(variant).loss.beta)


def command(run: Run, folder: pathlib.Path) -> list[str]:
  fields = run.fields()
  if run.variant.judged_by:
    fields["preference_model"] = folder / "models" / run.variant.judged_by / "export"
  return main_command(run.variant.config_file, fields, folder / run.path)


def main_command(config_file: str, fields: dict[str, Any], workdir: pathlib.Path) -> list[str]:
  start = [sys.executable, "-m", "jaxpref.main", f"--config=configs/{config_file}.py"]
  return [*start, *(f"--config.{k}={v}" for k, v in fields.items()), f"--workdir={workdir}"]


def evaluations(config: Any, valid: float = 1.0) -> float:
  """UNet evaluations of one sample in the training of a run, counted as in docs/methods.md ("What a step costs").

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
    # Of winner and loser, which share start and call; single steps but for a pair of two at the end.
    shared = after // length - (length == 1 and not s.pool_last_step)
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
  if (place / "row.json").is_file():  # its numbers alone, see `restore`
    row = json.loads((place / "row.json").read_text())
    _same_fields(run, row["fields"], f"The row of {run.path}")
    return row
  row = {"variant": run.variant.name, "seed": run.seed, "learning_rate": run.learning_rate, "split": run.split}
  row["fields"] = run.fields()
  if (place / "failed.txt").is_file():
    return row | {"failed": (place / "failed.txt").read_text().strip()}
  if not (place / "results.json").is_file():
    return None
  made = json.loads((place / "config.json").read_text())
  of_config = lambda name: functools.reduce(lambda node, key: node.get(key, {}), name.split("."), made)
  _same_fields(run, {name: of_config(name) for name in run.fields()}, f"{place}")
  results = json.loads((place / "results.json").read_text())
  metrics = [json.loads(m) for m in (place / "metrics.jsonl").read_text().split("\n") if m.endswith("}")]
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


def _same_fields(run: Run, made: dict[str, Any], what: str) -> None:
  for name, value in run.fields().items():
    if made.get(name) != value:
      raise ValueError(f"{what} was made with config.{name}={made.get(name)!r}, expected {value!r}; move it away.")


def restore(file: pathlib.Path, folder: pathlib.Path) -> int:
  """Puts the rows of a study.json into `folder`, where they count as runs that are done; the number of them.

  A row of which the folder has a result is left out.

  Raises:
    ValueError: it is no study.json; a variant is not in VARIANTS; the fields of a row are not those that the variant
      has now.
  """
  try:
    study = json.loads(file.read_text())
    rows = [*itertools.chain(*study["runs"].values(), *(t["runs"] for t in study["tuning"].values()))]
    made = [[row[key] for key in ("variant", "learning_rate", "seed", "split", "fields")] for row in rows]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{file} cannot be read ({error!r}); expected a study.json of scripts/study/study.py.") from error
  count = 0
  for row, (variant, learning_rate, seed, split, fields) in zip(rows, made, strict=True):
    if variant not in BY_NAME:
      raise ValueError(f"{file} has a run of {variant!r}, expected one of {', '.join(BY_NAME)}; remove it.")
    run = Run(BY_NAME[variant], learning_rate, seed, split)
    _same_fields(run, fields, f"{run.path} in {file}")
    if read_run(run, folder) is None:
      (folder / run.path).mkdir(parents=True, exist_ok=True)
      (folder / run.path / "row.json").write_text(json.dumps(row))
      count += 1
  return count


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """That of the highest preferred share; of equal ones the smallest learning rate, then the first; None if all failed.

  Among those whose caption accuracy falls by at most ALLOWED_FALL, or where there is none, that falls least.
  """
  if not (rows := [r for r in rows if "failed" not in r]):
    return None
  bound = min(-ALLOWED_FALL, max(r["caption_accuracy_change"] for r in rows)) - 1e-9
  allowed = [r for r in rows if r["caption_accuracy_change"] >= bound]
  return min(allowed, key=lambda r: (-r["preferred_share"], r["learning_rate"]))


def rate_runs(variant: Variant) -> list[Run]:
  """The runs on the validation split that decide on the learning rate of a variant, be they its own or another's."""
  tuned = BY_NAME[variant.tuned_as or variant.name]
  rate = load_config(tuned).optimizer.learning_rate
  return [Run(tuned, factor * rate, TUNING_SEED, "validation") for factor in FACTORS]


def beta_runs(variant: Variant, folder: pathlib.Path) -> list[Run]:
  """Those that decide on beta, the first with the one it has anyway; none before the learning rate is known."""
  if not variant.betas or not (best := _best(rate_runs(variant), folder)):
    return []
  among = [BY_NAME[variant.tuned_as], *(BY_NAME[f"{variant.tuned_as}_beta{b:g}"] for b in variant.betas)]
  return [Run(v, best["learning_rate"], TUNING_SEED, "validation") for v in among]


def _best(runs: Sequence[Run], folder: pathlib.Path) -> dict[str, Any] | None:
  """What `choose` takes of these, once all are done."""
  rows = [read_run(run, folder) for run in runs]
  return choose([r for r in rows if r]) if all(rows) else None


def test_runs(variant: Variant, folder: pathlib.Path, seeds: int) -> list[Run]:
  """None before learning rate and beta are known."""
  if not (best := _best(rate_runs(variant), folder)):
    return []
  if variant.betas:
    if not (best := _best(beta_runs(variant, folder), folder)):
      return []
    variant = BY_NAME[best["variant"]]
  return [Run(variant, best["learning_rate"], seed, "test") for seed in range(seeds)]


def remaining(variants: Sequence[Variant], folder: pathlib.Path, seeds: int) -> Iterator[Run]:
  """Runs without a result: all of tuning, then seed by seed, so that those of a seed can be compared early."""
  runs = {run.path: run for v in variants for run in rate_runs(v)}
  runs |= {run.path: run for v in variants for run in beta_runs(v, folder)}
  for seed, variant in itertools.product(range(seeds), variants):
    runs |= {run.path: run for run in test_runs(variant, folder, seeds)[seed : seed + 1]}
  yield from (run for run in runs.values() if read_run(run, folder) is None)


def plan(variants: Sequence[Variant], folder: pathlib.Path, seeds: int, workers: int) -> str:
  """The runs that are left of each variant, and the hours they take with so many at a time."""
  lines, seen, total, hours = [], set[str](), 0, 0.0
  for variant in variants:
    tuning = [r for r in [*rate_runs(variant), *beta_runs(variant, folder)] if r.path not in seen]
    seen |= {r.path for r in tuning}
    tests = test_runs(variant, folder, seeds)
    left = [
      sum(read_run(r, folder) is None for r in tuning),
      seeds - sum(read_run(r, folder) is not None for r in tests),
    ]
    config = load_config(variant)
    e, mine = config.evaluation, 0.0
    for count, pictures in zip(left, (TUNING_PICTURES, e.seeds_per_prompt), strict=True):
      drawn = 2 * 2 * e.num_prompts * pictures * e.num_inference_steps  # two models, with guidance
      mine += count * (START_MINUTES + (evaluations(config) + drawn) / EVALUATIONS_A_MINUTE) / 60 / workers
    total, hours = total + sum(left), hours + mine
    fields = " ".join(f"{k}={v}" for k, v in variant.overrides.items())
    of = f"{sum(left):2} of {len(tuning) + seeds} runs left, {mine:.1f} h"
    lines.append(f"{variant.part} {variant.name:22} {of}  {variant.config_file} {fields}")
  return "\n".join(
    [*lines, f"{total} runs left, about {hours:.1f} hours with {workers} at a time, each on an idle core"]
  )
