"""The variants that scripts/study/study.py compares, their preference models, and the commands of a run."""

import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from scripts.study import ground

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
FROZEN = {"reference.mode": "frozen"}
NO_GATE = 1e9  # a delta that no divergence exceeds
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
  Variant("dpo_slow", "F", "dpo_tiny", against=("spo",), tuned_as="dpo", beta=50.0, learning_rate=2e-5),
  Variant("dpo_slow160", "F", "dpo_tiny", tuned_as="dpo", beta=160.0, learning_rate=2e-5),
  Variant("dpo_160", "F", "dpo_tiny", against=("spo",), tuned_as="dpo", beta=160.0),
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
  # A preference model that is better at noisy times: does it see what the step-aware one does not?
  Variant("lpo_legible", "F", "lpo_tiny", hidden="legible", against=("dpo_legible", "spo_legible"), judged_by="latent"),
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
