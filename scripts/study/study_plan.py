"""What scripts/study/study.py runs: the variants, the rule of tuning, and what a run leaves behind."""

import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scripts.study import ground, measure

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE_CHANGES: dict[str, dict[str, Any]] = {
  "dpo_tiny": {"num_steps": 125},  # as many UNet evaluations as SPO's
  "tdpo_tiny": {"num_steps": 125},
  "spo_tiny": {},
  "lpo_tiny": {"num_steps": 30},
}
# Pictures and checkpoints during training would count as its time; what is stopped is saved all the same.
COMMON = {"sample.every": 0, "checkpoint.keep": 1, "checkpoint.every": 100_000, "evaluation.num_prompts": 0}
ONLINE = ("spo_tiny", "lpo_tiny", "grpo_tiny")
RATES = (1.0, 2.0, 4.0)  # of the recipe's learning rate
BETAS = (0.1, 10.0)  # of the recipe's beta, at the best of these rates
TUNING_SEED = 100
ALLOWED_FALL = 0.05  # of caption accuracy against the base model, in tuning for style
FROZEN = {"reference.mode": "frozen"}
NO_GATE = 1e9  # a delta that no divergence exceeds
# For --list, of a run on one core: to start and compile, twice, and UNet evaluations a minute.
START_MINUTES, EVALUATIONS_A_MINUTE = 0.7, 18_000
DRAWN = 2 * measure.DRAW["num_inference_steps"] * len(ground.split("test")) * measure.PICTURES["test"]
PARTS = {
  "A": "SPO (arXiv 2406.04314) and Diffusion-DPO on the same noisy pairs",
  "B": "What SPO is made of",
  "C": "The moving reference (arXiv 2505.18736)",
  "D": "Timestep-aware training (arXiv 2505.18736)",
  "E": "Combinations that no paper has",
  "F": "Asked after the first answers, to explain them",
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A recipe with changes, and the variants that it is compared with.

  Attributes:
    name: of its folder.
    part: one of PARTS.
    recipe: a file of configs/.
    overrides: fields of the recipe.
    hidden, agreement: whose labels it learns from, `ground.HIDDEN` and percent.
    against: names of variants.
    tuned_as: the variant whose learning rate and beta it takes; "": its own are tuned.
    beta: what it has of that: "tuned", "recipe" for the recipe's own, or a number.
    learning_rate: a number instead of the tuned one.
    judged_by: kind of the preference model, see `models`.
    seeds: number of runs on the test split.
  """

  name: str
  part: str
  recipe: str
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  hidden: str = "style"
  agreement: int = 70
  against: tuple[str, ...] = ()
  tuned_as: str = ""
  beta: str | float = "tuned"
  learning_rate: float | None = None
  judged_by: str = "step_aware"
  seeds: int = 4

  @property
  def online(self) -> bool:
    return self.recipe in ONLINE

  @property
  def trained(self) -> tuple[Any, ...]:
    """What a run of this variant is made of, but for its learning rate, beta and seed."""
    return self.recipe, self.overrides, self.hidden, self.agreement, self.judged_by


def _moving(name: str, recipe: str = "dpo_tiny", part: str = "C", **options: Any) -> Variant:
  """A variant whose reference moves; `reference` are fields of that section."""
  changes = {"reference.mode": "update"} | {f"reference.{k}": v for k, v in options.pop("reference").items()}
  return Variant(name, part, recipe, changes | options.pop("overrides", {}), **options)


def _at_agreement(agreement: int) -> Iterator[Variant]:
  dpo, spo = f"dpo_{agreement}", f"spo_{agreement}"
  yield Variant(dpo, "A", "dpo_tiny", agreement=agreement, tuned_as="dpo", seeds=8)
  yield Variant(spo, "A", "spo_tiny", agreement=agreement, tuned_as="spo", against=(dpo,), seeds=8)


VARIANTS = (
  # A. `dpo` and `spo` learn from the rater who is right in 70 %, as people are.
  Variant("dpo", "A", "dpo_tiny", seeds=8),
  Variant("spo", "A", "spo_tiny", against=("dpo", "sft", "dpo_half", "dpo_quarter"), seeds=8),
  Variant("sft", "A", "dpo_tiny", {"loss.name": "sft", "num_steps": 167}, against=("dpo",), seeds=8),
  Variant("dpo_legible", "A", "dpo_tiny", hidden="legible", seeds=8),
  Variant("spo_legible", "A", "spo_tiny", hidden="legible", against=("dpo_legible",), seeds=8),
  *_at_agreement(60),
  *_at_agreement(85),
  *_at_agreement(100),
  Variant("dpo_half", "A", "dpo_tiny", {"num_steps": 62}, tuned_as="dpo"),
  Variant("dpo_quarter", "A", "dpo_tiny", {"num_steps": 31}, tuned_as="dpo"),
  Variant("spo_half", "A", "spo_tiny", {"num_steps": 12}, against=("dpo", "dpo_half"), tuned_as="spo"),
  Variant("spo_quarter", "A", "spo_tiny", {"num_steps": 6}, against=("dpo", "dpo_quarter"), tuned_as="spo"),
  # B.
  Variant("spo_winner", "B", "spo_tiny", {"spo.next_latent": "winner"}, against=("spo",), tuned_as="spo"),
  Variant("spo_loser", "B", "spo_tiny", {"spo.next_latent": "loser"}, against=("spo",), tuned_as="spo"),
  Variant("spo_pool2", "B", "spo_tiny", {"spo.pool_size": 2}, against=("spo",), tuned_as="spo"),
  Variant("spo_pool8", "B", "spo_tiny", {"spo.pool_size": 8}, against=("spo", "spo_pool2"), tuned_as="spo"),
  Variant("spo_clean", "B", "spo_tiny", {"spo.step_aware": False}, against=("spo",), tuned_as="spo", judged_by="clean"),
  Variant("lpo", "B", "lpo_tiny", against=("spo", "dpo"), judged_by="latent"),
  # C. beta as in the recipe, and tuned with as many tries as Diffusion-DPO's.
  Variant("dpo_beta500", "C", "dpo_tiny", against=("dpo",), tuned_as="dpo", beta="recipe"),
  _moving("moving_tau16", reference={"tau": 16}, against=("dpo_beta500",), tuned_as="dpo", beta="recipe"),
  _moving("moving_tau32", reference={"tau": 32}, against=("dpo_beta500",), tuned_as="dpo", beta="recipe"),
  _moving("moving_tau64", reference={"tau": 64}, against=("dpo_beta500",), tuned_as="dpo", beta="recipe"),
  _moving(
    "ungated_tau16",
    reference={"tau": 16, "delta": NO_GATE},
    against=("moving_tau16", "dpo_beta500"),
    tuned_as="dpo",
    beta="recipe",
  ),
  _moving("ema_tau4", reference={"tau": 4, "alpha": 0.25}, against=("moving_tau16",), tuned_as="dpo", beta="recipe"),
  _moving("rho_tau16", reference={"tau": 16, "rho": 0.2}, against=("moving_tau16",), tuned_as="dpo", beta="recipe"),
  _moving("moving", reference={"tau": 16}, against=("dpo", "dpo_slow"), seeds=8),  # all of it tuned: the headline
  # D.
  Variant("sampling", "D", "tdpo_tiny", FROZEN | {"timesteps.reward_scale": False}, against=("dpo",), tuned_as="dpo"),
  Variant("scale", "D", "tdpo_tiny", FROZEN | {"timesteps.gamma": 1.0}, against=("dpo",), tuned_as="dpo"),
  Variant("timesteps", "D", "tdpo_tiny", FROZEN, against=("dpo",), tuned_as="dpo"),
  Variant("timesteps_moving", "D", "tdpo_tiny", {"reference.tau": 16}, against=("moving", "dpo"), tuned_as="moving"),
  # E. tau counts iterations of SPO, each of which makes several updates.
  _moving("spo_moving", "spo_tiny", "E", reference={"tau": 5}, against=("spo",), tuned_as="spo"),
  _moving("lpo_moving", "lpo_tiny", "E", reference={"tau": 5}, against=("lpo",), tuned_as="lpo", judged_by="latent"),
  # F. Is it the reference, or a small beta? Diffusion-DPO at the moving reference's rate, and both at other betas.
  Variant("dpo_slow", "F", "dpo_tiny", tuned_as="dpo", beta=50.0, learning_rate=2e-5),
  Variant("dpo_slow160", "F", "dpo_tiny", tuned_as="dpo", beta=160.0, learning_rate=2e-5),
  Variant("dpo_160", "F", "dpo_tiny", tuned_as="dpo", beta=160.0),
  _moving(
    "moving_160", part="F", reference={"tau": 16}, against=("dpo_slow160", "dpo_160"), tuned_as="moving", beta=160.0
  ),
  Variant("dpo_slow250", "F", "dpo_tiny", against=("spo",), tuned_as="dpo", beta=250.0, learning_rate=2e-5),
  Variant("dpo_250", "F", "dpo_tiny", against=("spo", "spo_more"), tuned_as="dpo", beta=250.0),
  _moving(
    "moving_500",
    part="F",
    reference={"tau": 16},
    against=("dpo", "spo", "dpo_250", "dpo_slow250"),
    tuned_as="moving",
    beta=500.0,
  ),
  # SPO with as many updates as the others: its gaps are small after noisy labels, and few pass the recipe's threshold.
  Variant("spo_more", "F", "spo_tiny", {"spo.threshold": 0.03}, against=("spo", "dpo", "moving_500")),
  # Where did SPO's deviation between seeds come from? The settings of the study before this one.
  Variant(
    "spo_before",
    "F",
    "spo_tiny",
    {"spo.warmup_steps": 4, "num_steps": 20},
    against=("spo",),
    tuned_as="spo",
    beta="recipe",
    learning_rate=4e-5,
    seeds=8,
  ),
)
BY_NAME = {v.name: v for v in VARIANTS}
CURVES = {"Diffusion-DPO": ("dpo_quarter", "dpo_half", "dpo"), "SPO": ("spo_quarter", "spo_half", "spo")}
# The recipe and changes of each kind of preference model.
MODEL_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
  "step_aware": ("spm_tiny", {}),
  "clean": ("spm_tiny", {"spm.step_aware": False}),
  "latent": ("lrm_tiny", {}),
}


@dataclasses.dataclass(frozen=True)
class PreferenceModel:
  """A preference model that online variants learn from, in the folder models/`name`."""

  kind: str
  hidden: str
  agreement: int

  @property
  def name(self) -> str:
    return f"{self.hidden}_{self.agreement}_{self.kind}"

  def fields(self, folder: pathlib.Path) -> dict[str, Any]:
    labels = ground.labels_file(folder / "ground", self.hidden, self.agreement)
    own = {"data.source": "pairs_file", "data.path": str(labels)}
    return COMMON | own | MODEL_RECIPES[self.kind][1]

  def command(self, folder: pathlib.Path) -> list[str]:
    return main_command(MODEL_RECIPES[self.kind][0], self.fields(folder), folder / "models" / self.name)


def model_of(variant: Variant) -> PreferenceModel | None:
  """Returns the preference model that a variant learns from; None for offline ones."""
  return PreferenceModel(variant.judged_by, variant.hidden, variant.agreement) if variant.online else None


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run and its pictures, in the folder `path` of runs/study."""

  variant: Variant
  learning_rate: float
  beta: float
  seed: int
  split: str

  @property
  def path(self) -> str:
    return f"{self.variant.name}/{self.split}_{self.learning_rate:g}_{self.beta:g}_seed{self.seed}"

  def fields(self, folder: pathlib.Path) -> dict[str, Any]:
    """Returns every field of the recipe that is changed."""
    v = self.variant
    found = changes(v) | {"seed": self.seed, "optimizer.learning_rate": self.learning_rate, "loss.beta": self.beta}
    place = folder / "ground"
    if model := model_of(v):
      return found | {
        "data.source": "prompts",
        "data.path": str(place / "train.txt"),
        "preference_model": str(folder / "models" / model.name / "export"),
      }
    labels = ground.labels_file(place, v.hidden, v.agreement)
    return found | {"data.source": "pairs_file", "data.path": str(labels)}

  def command(self, folder: pathlib.Path) -> list[str]:
    return main_command(self.variant.recipe, self.fields(folder), folder / self.path)


def changes(variant: Variant) -> dict[str, Any]:
  """Returns what a variant's runs change of the recipe, whatever the machine."""
  return COMMON | RECIPE_CHANGES[variant.recipe] | variant.overrides


def load_config(variant: Variant) -> Any:
  """Returns the recipe with the variant's changes."""
  config = importlib.import_module(f"configs.{variant.recipe}").get_config()
  config.update_from_flattened_dict(changes(variant))
  return config


def main_command(recipe: str, fields: dict[str, Any], workdir: pathlib.Path) -> list[str]:
  """Returns a training command."""
  start = [sys.executable, "-m", "jaxpref.main", f"--config=configs/{recipe}.py"]
  return [*start, *(f"--config.{k}={v}" for k, v in fields.items()), f"--workdir={workdir}"]


def measure_command(folder: pathlib.Path, split: str, model: str | None = None) -> list[str]:
  """Returns the command that draws and scores the pictures of a run, or of a model into a folder of its own."""
  script = ROOT / "scripts" / "study" / "measure.py"
  return [sys.executable, str(script), str(folder), f"--split={split}", *([f"--model={model}"] if model else [])]


def evaluations(config: Any, valid: float = 1.0) -> float:
  """Returns UNet evaluations of one sample in training, as docs/methods.md counts them.

  Guidance doubles a call, a backward pass is two more. Rows that only fill up a minibatch, the VAE, and the preference
  model are not counted.

  Args:
    valid: share of SPO's pairs above the threshold.
  """
  reference_free = config.objective == "dpo" and config.loss.name in ("mapo", "sft")
  reference_free |= config.objective == "grpo" and not config.grpo.kl_coef
  update = (not reference_free) + 1 + 2  # reference, policy, and its backward pass
  if config.objective == "spo":
    s, after = config.spo, config.spo.num_inference_steps - config.spo.warmup_steps
    of_latents = config.reward == "latent"
    rollout = s.num_inference_steps if of_latents else s.warmup_steps + 1 + (after - 1) * s.pool_size
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


# ---- What runs leave behind ---------------------------------------------------------------------------------------


def base_folder(folder: pathlib.Path) -> pathlib.Path:
  """Returns where the base model's pictures were scored."""
  return folder / "base"


def read_run(run: Run, folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns a run's numbers, only `failed` of one that became NaN, None without a result.

  Variants that are trained the same way, with the same values, share their runs.

  Raises:
    ValueError: the folder has a run of other fields.
  """
  place = folder / run.path
  told = {"variant": run.variant.name, "seed": run.seed, "split": run.split, "fields": changes(run.variant)}
  told |= {"learning_rate": run.learning_rate, "beta": run.beta}
  if (place / "row.json").is_file():
    row = json.loads((place / "row.json").read_text())
    if any(row.get(name) != value for name, value in told.items()):
      raise ValueError(f"The row of {run.path} was made with other fields, expected {told}; move it away.")
    return row
  for other in (v for v in VARIANTS if v.name != run.variant.name and v.trained == run.variant.trained):
    file = folder / dataclasses.replace(run, variant=other).path / "row.json"
    if file.is_file():
      return json.loads(file.read_text()) | told
  if (place / "failed.txt").is_file():
    return told | {"failed": (place / "failed.txt").read_text().strip()}
  base = base_folder(folder) / f"{run.split}.npz"
  if not (place / f"{run.split}.npz").is_file() or not base.is_file():
    return None
  config = json.loads((place / "config.json").read_text())
  of_config = lambda name: functools.reduce(lambda node, key: node.get(key, {}), name.split("."), config)
  for name, value in run.fields(folder).items():
    if of_config(name) != value:
      raise ValueError(f"{place} was made with config.{name}={of_config(name)!r}, expected {value!r}; move it away.")
  metrics = [json.loads(m) for m in (place / "metrics.jsonl").read_text().split("\n") if m.endswith("}")]
  row = told | numbers(measure.read(place / f"{run.split}.npz"), measure.read(base), run.variant.hidden)
  row |= cost(run, metrics)
  last = [m for m in metrics if m["step"] > 0.6 * metrics[-1]["step"]]  # by range of t, in the last two fifths
  for name in sorted(k for k in metrics[-1] if k.startswith(("margin_bin", "loss_bin"))):
    row[name] = float(np.mean([m[name] for m in last if name in m]))
  if moved := [m for m in metrics if "divergence" in m]:
    # Of the last proposal between two rows D is known; that was accepted if all between them were.
    tau = config["reference"]["tau"]
    proposed = lambda a, b: b["step"] // tau - a["step"] // tau
    accepted = lambda a, b: b["reference_updates"] - a["reference_updates"]
    passed = [b["divergence"] for a, b in itertools.pairwise(moved) if accepted(a, b) == proposed(a, b) > 0]
    row |= {"last_d": moved[-1]["divergence"], "largest_d": max(m["divergence"] for m in moved)}
    row |= {"accepted_d": max(passed, default=None), "moves": moved[-1]["reference_updates"]}
  _write_row(place / "row.json", row)
  return row


def _write_row(file: pathlib.Path, row: dict[str, Any]) -> None:
  """Writes a row so that the file is whole or not there; another thread may read it, or write the same."""
  part = file.with_name(f"{file.name}.{threading.get_ident()}.part")
  part.write_text(json.dumps(row) + "\n")
  part.replace(file)


def numbers(found: dict[str, np.ndarray], base: dict[str, np.ndarray], hidden: str) -> dict[str, float]:
  """Returns what is reported of scores f32[P, S], beside those of the base model from the same noise.

  `share` is of pictures in the preferred style, or whose caption is the likeliest of all. `share_64` is that of the
  first 64 prompts, as many as the study before this one had. `win_rate` is of pictures whose hidden score is above
  the base model's, ties a half, `gain` the mean change of that score, and `captions` the change of caption accuracy.
  `other_share` is the change of the share of the preference that was not asked for. `error` is the standard error of
  share minus the base model's share over prompts.
  """
  other = next(h for h in ground.HIDDEN if h != hidden)
  change = found[f"{hidden}_share"].mean(axis=1) - base[f"{hidden}_share"].mean(axis=1)
  won = (found[hidden] > base[hidden]) + 0.5 * (found[hidden] == base[hidden])
  return {
    "share": float(found[f"{hidden}_share"].mean()),
    "share_64": float(found[f"{hidden}_share"][:64].mean()),
    "base_share": float(base[f"{hidden}_share"].mean()),
    "error": float(change.std(ddof=1) / len(change) ** 0.5),
    "win_rate": float(won.mean()),
    "gain": float((found[hidden] - base[hidden]).mean()),
    "captions": float(found["correct"].mean() - base["correct"].mean()),
    "other_share": float(found[f"{other}_share"].mean() - base[f"{other}_share"].mean()),
  }


def cost(run: Run, metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Returns minutes of training by the median step, UNet evaluations, and updates."""
  config = load_config(run.variant)
  images = config.batch_size * {"dpo": 2, "tdpo": 2}.get(config.objective, 1)
  # The first row's time has what is done once. The median, since other work on the machine may have slowed some.
  times = [images / m["images_per_second"] for m in metrics[1:]]
  valid = float(np.mean([m["valid_pairs"] for m in metrics])) if run.variant.online else 1.0
  updates = float(np.mean([m["updates"] for m in metrics])) if run.variant.online else 1.0
  return {
    "minutes": float(np.median(times)) * config.num_steps / 60 if times else 0.0,
    "evaluations": evaluations(config, valid),
    "updates": updates * config.num_steps,
    "valid_pairs": valid,
  }


def restore(file: pathlib.Path, folder: pathlib.Path) -> int:
  """Puts the rows of a papers.json into `folder`, where they count as runs that are done; returns their number.

  Raises:
    ValueError: it is no papers.json, or has a run of a variant that there is not.
  """
  try:
    study = json.loads(file.read_text())
    rows = [*itertools.chain(*study["runs"].values(), *study["tuning"].values())]
    runs = [Run(BY_NAME[r["variant"]], r["learning_rate"], r["beta"], r["seed"], r["split"]) for r in rows]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{file} cannot be read ({error!r}); expected a papers.json of scripts/study/study.py.") from error
  count = 0
  for run, row in zip(runs, rows, strict=True):
    if row["fields"] != changes(run.variant):
      raise ValueError(f"{file} has {run.path} with other fields than it has now; remove that row.")
    if not (folder / run.path / "row.json").is_file():
      (folder / run.path).mkdir(parents=True, exist_ok=True)
      _write_row(folder / run.path / "row.json", row)
      count += 1
  return count


# ---- Which runs there are -----------------------------------------------------------------------------------------


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
