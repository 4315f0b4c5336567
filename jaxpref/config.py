"""Defines every field that a recipe can set, with its default and its limits; recipes in `configs/` change `default()`.

A section is a dataclass. Its `check` raises for values that can never work. Its `check_with` raises for values that do
not fit the method, whose `Facts` it asks, or the rest of the config. Recipes and the command line change an
`ml_collections.ConfigDict` with these fields; training reads the dataclasses (`typed`). A field whose default is None
has a type but no value, and can be set on the command line. In a field of type Place, ~ is your home.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import ml_collections

from jaxpref.recipes.facts import (
  DENOISED_LOSSES,
  FACTS,
  PAIR_LOSSES,
  SOURCES,
  Facts,
  facts,
  families_with,
  family_facts,
  own_method,
)
from jaxpref.recipes.own import calling, check_function, hint, load_named
from jaxpref.recipes.places import Place
from jaxpref.recipes.rewards import LATENT, PREFERENCE_MODEL, is_function, is_latent, of_preference_model, reward_terms
from jaxpref.recipes.sections import Section, convert, fields, nearest, read
from jaxpref.recipes.sizes import MAX_PIXELS, is_size

REMAT = ("none", "attention", "block", "full")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
STYLES = ("twemoji", "noto", "openmoji")  # of the embedded emoji
SPLITS = ("train", "validation", "test")


OWN_LOSS = (
  "a function of (reward_w, reward_l, *, beta, weight) that computes floats [B] of arrays [B] by jax.numpy, without "
  "Python's if on their values (weight may be None)"
)


def own_loss(spec: str) -> Callable[..., Any]:
  """Returns the user's own loss function, named as package.module:function.

  Raises:
    OwnCodeError: the function does not exist, or it takes other arguments.
  """
  found = load_named(spec, "config.loss.name", "function")
  check_function(found, f"config.loss.name={spec}", OWN_LOSS, None, None, beta=1.0, weight=None)
  return found


# ---- Sections -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options(Section):
  """Fields of your own objective: those of its `Method.config` (docs/extending.md), or those that the recipe sets."""


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
  data: int = -1  # -1: all devices that fsdp and tensor leave
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Data(Section):
  """What to train on: docs/data.md."""

  # emoji (embedded: pairs, images, prompts); tfds (a folder of pairs, such as Pick-a-Pic's), pairs_file (.jsonl
  # or .csv), rankings (HPDv2's .json); unpaired_file (for kto); prompts (spo, grpo); precomputed (a folder)
  source: str = "emoji"
  path: Place | None = None  # the folder or file; not for emoji
  images: Place | None = None  # rankings: the folder of the images, if it is not the published one
  ranking_pairs: str = "all"  # rankings: all pairs of a ranking, or winner: its best image with each other one
  preferred_style: str = "openmoji"  # emoji: twemoji, noto or openmoji, the outlined one
  subset: str = "core"  # emoji
  split: str = "train"
  validation_share: float = 0.0  # share of the prompts of split "train" to hold out as split "validation"
  labels: str = "given"  # or scores: the image with the higher score wins
  scores: Place | None = None  # a file of jaxpref.score, instead of the source's own scores
  ties: str = "drop"  # drop; keep, at 0.5 (spm); or soft: labels are probabilities, from the scores if there are any
  min_gap: float = 0.0  # pairs are ties if their scores give probabilities that differ by less
  only_labelled: bool = False  # skip pairs that nobody judged (Pick-a-Pic's has_label)
  max_per_prompt: int = 0  # most pairs to use of one prompt; 0: all
  keep_best: bool = False  # an image that won and later lost is replaced by the one that beat it
  flip_labels: float = 0.0  # share of labels to flip, for studies of noise
  caption_dropout: float = 0.0  # share of captions to replace by the empty prompt
  flip: bool = False  # mirror half of the pairs, both images of a pair together
  random_crop: bool = False  # False: crops the central part
  num_threads: int = 2
  num_workers: int = 0  # processes that decode images; 0: the threads do

  def check(self) -> None:
    self.one_of("source", tuple(SOURCES))
    self.one_of("labels", ("given", "scores"))
    self.one_of("ranking_pairs", ("all", "winner"))
    self.one_of("ties", ("drop", "keep", "soft"))
    self.one_of("subset", ("core", "all"))
    self.one_of("preferred_style", STYLES)
    if self.source in ("emoji", "prompts", "pairs_file", "rankings", "unpaired_file"):
      self.one_of("split", (*SPLITS, "all"))
    for field in ("validation_share", "min_gap", "flip_labels", "caption_dropout"):
      self.require(0.0 <= getattr(self, field) < 1.0, field, "a share of at least 0 and below 1")
    self.integers(0, "max_per_prompt", "num_threads", "num_workers")
    self.require(not self.keep_best or self.ties == "drop", "keep_best", "False unless ties are dropped")
    cropped = self.source == "precomputed" and self.random_crop
    self.require(not cropped, "random_crop", "False: precomputed images are central parts")

  def check_with(self, config: "Config", of: Facts) -> None:
    what = SOURCES[self.source][1]
    fitting = [name for name, known in FACTS.items() if self._fits(known)]
    self.require(
      self._fits(of),
      "source",
      f"another source for objective {config.objective}: this one is for {', '.join(fitting)}",
    )
    self.require(self.source == "emoji" or bool(self.path), "path", what)
    others = ", ".join(name for name in SOURCES if name != "emoji")
    self.require(
      self.source != "emoji" or not self.path,
      "path",
      f"nothing for data.source=emoji; set data.source to what it is: {others}",
    )
    usual = Data()
    same = lambda field: getattr(self, field) == getattr(usual, field)
    pairs = of.data in ("pair", "liked") and self.source != "unpaired_file"
    for field in ("labels", "scores", "ties", "min_gap", "only_labelled", "max_per_prompt", "keep_best", "flip_labels"):
      self.require(pairs or same(field), field, f"{getattr(usual, field)!r}: it is for data of pairs")
    for field in ("caption_dropout", "flip", "random_crop"):
      expected = f"{getattr(usual, field)!r} for {config.objective}, which has no images to learn from"
      self.require(not of.online or same(field), field, expected)
    liked = of.data == "liked"
    self.require(not liked or self.ties == "drop", "ties", f"drop for {config.objective}: a tie has no liked image")

  def _fits(self, of: Facts) -> bool:
    """Returns whether the source has rows for the method."""
    return of.data in SOURCES[self.source][0] and (self.source != "precomputed" or of.of_latents)


@dataclasses.dataclass(frozen=True)
class Lora(Section):
  rank: int = 0  # 0: full training, or the rank of init_from
  alpha: float | None = None  # default: the rank
  targets: str = r"(to_q|to_k|to_v|to_out\.0)$"
  init: str = "kaiming"  # of A: kaiming (PEFT's default) or gaussian, with deviation 1 / rank (larger for small ranks)
  init_from: Place | None = None  # a LoRA to continue from, FILE or FILE:STRENGTH; its targets are used

  def check(self) -> None:
    self.require(self.rank >= 0, "rank", "0 (full training) or a positive rank")
    try:
      re.compile(self.targets)
    except re.error as error:
      self.require(False, "targets", f"a regular expression ({error})")
    self.one_of("init", ("kaiming", "gaussian"))
    self.require(self.alpha is None or 0.0 < self.alpha < math.inf, "alpha", "a number above 0")

  def check_with(self, config: "Config", of: Facts) -> None:
    for field in ("rank", "init_from"):
      adapts = of.trains == "denoiser" or not getattr(self, field)
      self.require(adapts, field, f"nothing for {config.objective}: it trains no UNet")


@dataclasses.dataclass(frozen=True)
class Optimizer(Section):
  name: str = "adamw"
  learning_rate: float = 1e-4
  schedule: str = "constant"
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 1e-2
  clip_norm: float = 1.0

  def check(self) -> None:
    self.one_of("name", OPTIMIZERS)
    self.one_of("schedule", SCHEDULES)
    self.positive("learning_rate", "eps")
    for field in ("b1", "b2"):
      self.require(0.0 <= getattr(self, field) < 1.0, field, "a number in [0, 1)")
    self.integers(0, "warmup_steps")
    self.not_negative("weight_decay", "clip_norm")

  def check_with(self, config: "Config", of: Facts) -> None:
    # A schedule counts updates, and an iteration makes many: with spo as many as its valid pairs need.
    self.require(not of.online or self.schedule == "constant", "schedule", f"constant for {config.objective}")


@dataclasses.dataclass(frozen=True)
class Loss(Section):
  name: str = "sigmoid"  # sigmoid, robust, ipo or hinge; for dpo and tdpo also dspo, mapo or sft
  beta: float = 5000.0
  label_smoothing: float = 0.0  # for sigmoid and robust
  snr: float = 0.5  # for mapo: arXiv 2406.06424
  safeguard: float | None = None  # for dpo, tdpo: mu in [0, 1] of arXiv 2511.03317, on top of any loss

  def check(self) -> None:
    self.positive("beta", "snr")
    self.require(0.0 <= self.label_smoothing < 0.5, "label_smoothing", "a number in [0, 0.5)")
    mu = self.safeguard
    self.require(mu is None or 0.0 <= mu <= 1.0, "safeguard", "None or a number in [0, 1]")

  def check_with(self, config: "Config", of: Facts) -> None:
    known = {"denoised": DENOISED_LOSSES, "pair": PAIR_LOSSES}.get(of.losses, PAIR_LOSSES[:1])
    if ":" not in self.name:
      of_its_own = "" if of.losses else f": {config.objective} has a loss of its own"
      near = nearest(self.name, known) or hint(self.name)
      self.require(self.name in known, "name", f"one of {', '.join(known)}{of_its_own or near}")
    elif of.losses:
      own_loss(self.name)
    else:
      self.require(False, "name", f"sigmoid: {config.objective} has a loss of its own")
    smoothed = bool(of.losses) and self.name in ("sigmoid", "robust")
    expected = "0: it is for sigmoid and robust losses"
    self.require(smoothed or not self.label_smoothing, "label_smoothing", expected)
    # The default of 5000 is for a margin of errors; these losses count it in units of the error itself.
    self.require(self.name != "mapo" or self.beta <= 10.0, "beta", "at most 10 for mapo; published: 0.1")
    self.require(self.name != "dspo" or self.beta < 2.0, "beta", "below 2 for dspo; published: 0.001")
    if self.name in ("mapo", "sft"):
      config.require(config.reference.mode == "frozen", "reference.mode", f"frozen: {self.name} has no reference")
    if self.name == "sft":  # it sees neither margin nor loser
      self.require(self.safeguard is None, "safeguard", "None: the loss sft has no loser")
      config.require(not config.timesteps.reward_scale, "timesteps.reward_scale", "False: the loss sft has no margin")
      expected = "drop: the loss sft has no margin that a soft label would scale"
      config.require(config.data.ties != "soft", "data.ties", expected)
    offline = of.losses == "denoised"
    expected = f"None for {config.objective}: it is for dpo and tdpo"
    self.require(self.safeguard is None or offline, "safeguard", expected)


@dataclasses.dataclass(frozen=True)
class Kto(Section):
  """arXiv 2404.04465."""

  weight_desirable: float = 1.0  # of liked images
  weight_undesirable: float = 1.0  # of others

  def check(self) -> None:
    self.not_negative("weight_desirable", "weight_undesirable")


FLOW_TIMES = ("density", "logit_mean", "logit_std", "mode_scale", "weight")  # fields of `Timesteps` for a flow
FLOW_DENSITIES = ("uniform", "logit_normal", "mode")
FLOW_WEIGHTS = ("none", "sigma_sqrt", "cosmap")


@dataclasses.dataclass(frozen=True)
class Timesteps(Section):
  """Times to train at, and their weights: for dpo and tdpo, which are one method (arXiv 2505.18736); and for flows.

  The fields from density on are for models of rectified flow (arXiv 2403.03206, Section 3.1) and for methods that learn
  from data. Their names are those of diffusers' training scripts.
  """

  gamma: float = 1.0
  num_bins: int = 20
  reward_scale: bool = False
  density: str = "uniform"  # of the times of a flow, before its shift: uniform, logit_normal or mode
  logit_mean: float = 0.0  # for logit_normal; above 0 favours noise (below 0 in diffusers' scripts)
  logit_std: float = 1.0  # for logit_normal
  mode_scale: float = 1.29  # for mode; above 0 favours the middle
  weight: str = "none"  # of a flow's errors at sigma: none; sigma_sqrt, sigma^-2; or cosmap

  def of_flow(self) -> dict[str, Any] | None:
    """Returns the arguments of `diffusion.TrainingTimes`; None if they are the defaults."""
    found = {name: getattr(self, name) for name in FLOW_TIMES}
    return None if found == {name: getattr(Timesteps(), name) for name in FLOW_TIMES} else found

  def check(self) -> None:
    self.require(0.0 < self.gamma <= 1.0, "gamma", "a number in (0, 1]")
    self.integers(1, "num_bins")
    self.one_of("density", FLOW_DENSITIES)
    self.one_of("weight", FLOW_WEIGHTS)
    self.require(math.isfinite(self.logit_mean), "logit_mean", "a number")
    self.positive("logit_std")
    most = 2.0 / (math.pi - 2.0)
    self.require(-1.0 <= self.mode_scale <= most, "mode_scale", f"a number from -1 to 2 / (pi - 2) = {most:.3f}")
    both = self.density != "uniform" and self.gamma != 1.0
    self.require(not both, "gamma", f"1 with timesteps.density={self.density}: both choose the times")

  def check_with(self, config: "Config", of: Facts) -> None:
    learns = of.trains == "denoiser" and not of.online
    usual = Timesteps()
    for field in FLOW_TIMES:
      same = getattr(self, field) == getattr(usual, field)
      expected = f"{getattr(usual, field)!r} for {config.objective}: it is for methods that learn from data"
      self.require(learns or same, field, expected)
      expected = f"{getattr(usual, field)!r} for config.family={config.family}: it is for models of rectified flow"
      self.require(family_facts(config.family).flow or same, field, expected)
    expected = "none for the loss dspo, which looks at predictions instead of errors"
    self.require(config.loss.name != "dspo" or self.weight == "none", "weight", expected)
    offline = of.losses == "denoised"
    self.require(offline or self.gamma == 1.0, "gamma", f"1 for {config.objective}: it is for dpo, tdpo")
    expected = f"False for {config.objective}: it is for dpo and tdpo"
    self.require(offline or not self.reward_scale, "reward_scale", expected)


@dataclasses.dataclass(frozen=True)
class Reference(Section):
  mode: str = "frozen"  # frozen or update
  alpha: float = 1.0
  rho: float = 0.0
  tau: int = 32
  delta: float = 0.005
  decay: float = 0.5  # weight of the past in the mean of D that the gate reads; 0: each D alone, as in the paper
  on_diverge: str = "freeze"  # freeze or reinit

  def check(self) -> None:
    self.one_of("mode", ("frozen", "update"))
    self.one_of("on_diverge", ("freeze", "reinit"))
    self.require(0.0 < self.alpha <= 1.0, "alpha", "a number in (0, 1]")
    self.require(0.0 <= self.rho < 1.0, "rho", "a number in [0, 1)")
    self.require(self.delta >= 0.0, "delta", "a divergence of at least 0")
    self.integers(1, "tau")
    self.require(0.0 <= self.decay < 1.0, "decay", "a number in [0, 1)")

  def check_with(self, config: "Config", of: Facts) -> None:
    self.require(of.aligns or self.mode == "frozen", "mode", f"frozen: {config.objective} has no reference")


@dataclasses.dataclass(frozen=True)
class Spo(Section):
  num_inference_steps: int = 20
  eta: float = 1.0
  guidance_scale: float = 5.0  # here and below: 1 or less means no guidance
  warmup_steps: int = 4  # first denoising steps, one sample each
  pool_size: int = 4
  inner_steps: int = 0
  threshold: float = 0.3  # smallest softmax gap between winner and loser
  threshold_max: float | None = None  # threshold of the noisiest step; between them it grows with a step's noise
  next_latent: str = "random"  # random, winner or loser
  pool_last_step: bool = False  # draw a pool in the last step too (SD 1.5's rollout); needs inner_steps 0
  step_aware: bool = True  # False: the preference model gets time 0 at every step
  score_time: str = "end"  # a latent reward gets the time of the scored latent; start: the time of the step to it
  decode_size: int = 0  # shorter side in pixels of what the preference model sees; 0: the images' own
  ratio_clip: float = 0.1
  minibatch: int = 32  # transitions in one update

  def check(self) -> None:
    self.one_of("next_latent", ("random", "winner", "loser"))
    self.one_of("score_time", ("end", "start"))
    self.guidance(self.guidance_scale)
    self.require(self.decode_size >= 0, "decode_size", "0 (the images' own size) or pixels of the shorter side")

  def check_with(self, config: "Config", of: Facts) -> None:
    if of.section != "spo":
      return
    self.rollout_steps()
    self.require(self.pool_size >= 2, "pool_size", "at least 2 candidates")
    self.require(self.minibatch >= 1, "minibatch", "at least 1 transition")
    self.require(0.0 <= self.threshold < 1.0, "threshold", "a softmax gap in [0, 1)")
    grows = self.threshold_max is None or self.threshold <= self.threshold_max < 1.0
    self.require(grows, "threshold_max", f"None or a softmax gap from spo.threshold = {self.threshold} to below 1")
    self.require(0.0 < self.ratio_clip < 1.0, "ratio_clip", "a number in (0, 1)")
    self.require(0.0 < self.eta <= 1.0, "eta", "a number in (0, 1]: without noise all candidates are the same")
    self.integers(0, "inner_steps")
    terms = reward_terms(config)
    expected = "rewards with a network: spo scores every step inside its program, a function scores images"
    config.require(not any(map(is_function, terms)), "reward", expected)
    of_latents = [is_latent(spec) for spec in terms]
    expected = f"{LATENT} alone, or none of it: it scores latents, and spares what other rewards need at every step"
    config.require(all(of_latents) or not any(of_latents), "reward", expected)
    group, latent = self.inner_steps + 1, all(of_latents)
    steps, least = self.num_inference_steps - self.warmup_steps, 0 if latent else 1
    self.require(
      self.warmup_steps >= least and steps >= 2,
      "warmup_steps",
      f"at least {least} step{'s' * (not least)} before the first pool, and at least 2 of the "
      f"{self.num_inference_steps} after it",
    )
    self.require(
      steps % group == 0,
      "inner_steps",
      f"a group length inner_steps + 1 that divides num_inference_steps - warmup_steps = {steps}",
    )
    self.require(group == 1 or not self.pool_last_step, "pool_last_step", "False, as spo.inner_steps is above 0")
    if latent:
      alike = group > 1 or self.pool_last_step
      self.require(
        alike, "pool_last_step", f"True with config.reward={config.reward}: it scores all steps the same way"
      )
      self.require(self.step_aware, "step_aware", f"True with config.reward={config.reward}: its latents have noise")
      self.require(not self.decode_size, "decode_size", f"0 with config.reward={config.reward}: nothing is decoded")
    expected = f"end: the time of a step's start is for config.reward={LATENT}"
    self.require(latent or self.score_time == "end", "score_time", expected)


@dataclasses.dataclass(frozen=True)
class Grpo(Section):
  """GRPO: arXiv 2402.03300, 2505.07818, 2505.05470; DDPO: arXiv 2305.13301."""

  num_inference_steps: int = 20
  eta: float = 1.0
  guidance_scale: float = 5.0
  group_size: int = 8  # samples for each prompt
  advantage: str = "group"  # compares rewards within a prompt (GRPO); batch: within the whole batch (DDPO)
  advantage_clip: float = 5.0
  timestep_fraction: float = 1.0  # share of each sample's steps to train on, chosen at random
  ratio_clip: float = 1e-4  # small, as log-densities are means over the latents
  kl_coef: float = 0.0  # weight of the KL to the reference; 0: the reference is not called
  minibatch: int = 32  # steps in one update

  def check(self) -> None:
    self.one_of("advantage", ("group", "batch"))
    self.guidance(self.guidance_scale)
    self.not_negative("kl_coef")

  def check_with(self, config: "Config", of: Facts) -> None:
    if of.section != "grpo":
      return
    self.rollout_steps()
    self.require(0.0 < self.eta <= 1.0, "eta", "a number in (0, 1]: steps without noise have no density")
    compared = self.group_size if self.advantage == "group" else self.group_size * config.batch_size
    many = self.group_size >= 1 and compared >= 2
    self.require(many, "group_size", "at least 2 samples to compare with each other")
    self.require(self.advantage_clip > 0.0, "advantage_clip", "a number above 0")
    self.require(0.0 < self.timestep_fraction <= 1.0, "timestep_fraction", "a share in (0, 1]")
    self.require(0.0 < self.ratio_clip < 1.0, "ratio_clip", "a number in (0, 1)")
    self.require(self.minibatch >= 1, "minibatch", "at least 1 step")
    moves = config.reference.mode == "update"
    expected = "frozen, as grpo.kl_coef is 0 and nothing looks at it"
    config.require(self.kl_coef > 0.0 or not moves, "reference.mode", expected)


@dataclasses.dataclass(frozen=True)
class Spm(Section):
  guidance_scale: float = 5.0
  step_aware: bool = True  # False: trains on clean images, at time 0
  decode_size: int = 0  # see spo.decode_size

  def check(self) -> None:
    self.guidance(self.guidance_scale)
    self.require(self.decode_size >= 0, "decode_size", "0 (the images' own size) or pixels of the shorter side")

  def check_with(self, config: "Config", of: Facts) -> None:
    started = of.section != "spm" or bool(config.preference_model)
    config.require(started, "preference_model", "the folder of a CLIP or preference model to start from")


@dataclasses.dataclass(frozen=True)
class Lrm(Section):
  """The latent reward model of arXiv 2502.01051; times count steps of its noise schedule."""

  guidance_scale: float = 7.5  # for the features of the UNet's middle; 1 or less: the prompt's alone
  first_time: int = 1
  last_time: int = 951  # the noisiest
  time_step: int = 50  # between two times; 1: every time

  def check(self) -> None:
    self.guidance(self.guidance_scale)
    self.integers(0, "first_time")
    self.integers(1, "time_step")
    self.require(self.last_time >= self.first_time, "last_time", f"at least lrm.first_time = {self.first_time}")

  def check_with(self, config: "Config", of: Facts) -> None:
    measured = of.section == "lrm" and config.data.source == "precomputed" and config.evaluation.num_prompts
    expected = "0 with precomputed data, which have no held-out pairs to measure the latent reward model on"
    config.require(not measured, "evaluation.num_prompts", expected)


@dataclasses.dataclass(frozen=True)
class Vae(Section):
  kl_weight: float = 1e-4
  gradient_weight: float = 1.0

  def check(self) -> None:
    self.not_negative("kl_weight", "gradient_weight")


@dataclasses.dataclass(frozen=True)
class Logging(Section):
  every: int = 10
  wandb_project: str = ""

  def check(self) -> None:
    self.integers(1, "every")


@dataclasses.dataclass(frozen=True)
class Checkpoint(Section):
  every: int = 500
  keep: int = 2

  def check(self) -> None:
    self.integers(1, "every", "keep")


@dataclasses.dataclass(frozen=True)
class Sample(Section):
  """Draws the same validation prompts from the same noise every so many steps (0: never), and measures them."""

  every: int = 0
  num_prompts: int = 8
  seeds_per_prompt: int = 2

  def check(self) -> None:
    self.require(self.every >= 0, "every", "0 (never) or a number of steps")
    self.integers(1, "num_prompts", "seeds_per_prompt")


@dataclasses.dataclass(frozen=True)
class Evaluation(Section):
  num_prompts: int = 64
  seeds_per_prompt: int = 4
  num_inference_steps: int = 20
  guidance_scale: float = 5.0
  eta: float = 0.0
  batch_size: int = 64
  candidates: int = 16  # captions to choose from in caption accuracy
  bootstrap_samples: int = 2000
  seed: int = 12345
  split: str = "test"
  # After the run, python -m jaxpref.evaluate compares base and aligned model by these scorers, separated by commas:
  # names of docs/evaluation.md, or a function of your own as package.module:function.
  scorers: str = ""
  prompts: Place = "emoji"  # for the scorers: a file, or emoji (its `split`); uses num_prompts of them, 0: all
  diversity: str = ""  # the CLIP that measures it; "": one of the scorers

  def check(self) -> None:
    self.one_of("split", SPLITS)
    self.integers(1, "seeds_per_prompt", "num_inference_steps", "batch_size", "bootstrap_samples")
    self.rollout_steps()
    self.guidance(self.guidance_scale)
    self.require(self.num_prompts >= 0, "num_prompts", "0 (no evaluation) or a number of prompts")
    self.require(0.0 <= self.eta <= 1.0, "eta", "a number in [0, 1]")
    self.require(self.candidates >= 2, "candidates", "at least 2 captions to choose from")
    self.seeds(self.seed)

  def check_with(self, config: "Config", of: Facts) -> None:
    expected = "nothing for this objective: they compare an aligned model with its base"
    self.require(not self.scorers or of.aligns, "scorers", expected)


@dataclasses.dataclass(frozen=True)
class Config(Section):
  """A whole recipe."""

  objective: str = "dpo"  # one of FACTS, or your own as package.module:NAME (docs/extending.md)
  options: Any = Options()
  seed: int = 0
  # Updates; for spo and grpo: iterations (rollout, scoring, and the updates they pay for). A run that has gone further
  # raises; a finished one continues with more steps if its learning rate is constant.
  num_steps: int = 1000
  batch_size: int = 32  # global: pairs, images, or prompts of one rollout
  accumulation: int = 1  # number of micro-batches in an update
  dtype: str = "float32"  # for computation and frozen weights: float32 or bfloat16; trained weights are float32
  # What the denoiser's backward pass recomputes: none, attention, block or full; for a UNet also "none,block,...".
  remat: str = "none"
  vae_slicing: int = 0  # images the VAE takes at a time on each device; 0: the whole batch
  # stable_diffusion (1.x, 2.x, XL), stable_diffusion_3 (3 and 3.5), or your own as package.module:NAME
  family: str = "stable_diffusion"
  # What to load. Each is a folder, a hub name, "tiny-sd" (shipped), "random:PRESET" or "drawn:PRESET" (also random:
  # see jaxpref/files/loading.py). The model may also be a checkpoint in one .safetensors file.
  model: Place = "tiny-sd"
  model_config: Place | None = None  # for such a file: a folder of config.json files with its topology
  vae_model: Place | None = None  # a VAE's folder, hub name or file, instead of the model's own
  unet_model: Place | None = None  # a UNet's folder, hub name or file, instead of the model's own
  max_sequence_length: int | None = None  # for stable_diffusion_3: tokens of T5, 1 to 512; None: 256
  drop_t5: bool = False  # for stable_diffusion_3: trains, draws and exports without T5, whose tokens are then zeros
  preference_model: Place | None = None  # for spo, grpo: a reward; for spm, lrm: what to start from
  # The reward of spo and grpo: "" is preference_model; or a weighted sum of it and names of docs/evaluation.md, such as
  # "pickscore:1,aesthetic:0.1". grpo also takes a function of your own, package.module:function. "latent" takes
  # preference_model as a latent reward model (docs/methods.md).
  reward: str = ""
  reward_timeout: float = 600.0  # seconds such a function may take for the images of an iteration
  judge: Place | None = None  # for evaluation only
  # Pixels of the images to train on and draw: a side, or (height, width); None: from the denoiser's sample_size.
  image_size: int | tuple[int, int] | None = None
  mesh: Mesh = Mesh()
  max_bad_steps: int = 5  # steps in a row with a non-finite loss or gradient to skip before stopping
  profile_steps: str = ""  # START:STOP, e.g. 10:13: writes a profile of these steps to WORKDIR/profile
  data: Data = Data()
  lora: Lora = Lora()
  optimizer: Optimizer = Optimizer()
  loss: Loss = Loss()
  kto: Kto = Kto()
  timesteps: Timesteps = Timesteps()
  reference: Reference = Reference()
  spo: Spo = Spo()
  grpo: Grpo = Grpo()
  spm: Spm = Spm()
  lrm: Lrm = Lrm()
  vae: Vae = Vae()
  train_text_encoder: bool = False  # for denoise only
  logging: Logging = Logging()
  checkpoint: Checkpoint = Checkpoint()
  sample: Sample = Sample()
  evaluation: Evaluation = Evaluation()

  @classmethod
  def prefix(cls) -> str:
    return ""

  def check(self) -> None:
    self.one_of("dtype", ("float32", "bfloat16"))
    policies = {name.strip() for name in self.remat.split(",")}
    self.require(policies <= set(REMAT), "remat", f"one of {', '.join(REMAT)}, or one for each level, with commas")
    parse_steps(self.profile_steps)
    self.seeds(self.seed)
    self.integers(1, "num_steps", "batch_size", "accumulation", "max_bad_steps")
    self.require(self.vae_slicing >= 0, "vae_slicing", "0 (all at once) or a number of images")
    self.require(0.0 < self.reward_timeout < math.inf, "reward_timeout", "a number of seconds above 0")
    expected = f"pixels of a side, or of height and width, each from 1 to {MAX_PIXELS}: 512, or 768,512"
    self.require(self.image_size is None or is_size(self.image_size), "image_size", expected)

  def check_with(self, config: "Config", of: Facts) -> None:
    self.require(
      of.trains != "clip" or self.accumulation == 1,
      "accumulation",
      f"1 for {self.objective}: each image is compared with the captions of all of the batch",
    )
    adapted = self.lora.rank or self.lora.init_from
    whole = of.trains == "denoiser" and of.data == "image" and not adapted
    expected = "False for this objective: only denoise without LoRA trains the text encoder"
    self.require(not self.train_text_encoder or whole, "train_text_encoder", expected)
    encoded = self.data.source == "precomputed" and self.train_text_encoder
    self.require(not encoded, "train_text_encoder", "False: the prompts of precomputed data are encoded")
    sized = of.trains in ("clip", "judge")
    expected = f"None for {self.objective}: its network takes squares of one size"
    self.require(self.image_size is None or not sized, "image_size", expected)
    expected = "nothing for this objective: it is for those with a UNet"
    of_stable_diffusion = of.trains in ("denoiser", "scorer", "latent_scorer")
    self.require(not self.vae_model or of_stable_diffusion, "vae_model", expected)
    family = family_facts(self.family)
    known = of_stable_diffusion and family.single_files
    expected = "nothing for this objective or family: it is for checkpoints of Stable Diffusion"
    self.require(not self.model_config or known, "model_config", expected)
    own = of.trains == "denoiser" and family.single_files
    expected = "nothing for this objective or family: it trains no UNet of Stable Diffusion"
    self.require(not self.unet_model or own, "unet_model", expected)
    self._check_text(of)
    self.require(of.online or not self.reward, "reward", f"nothing for {self.objective}: it is for spo and grpo")
    terms = of_preference_model(reward_terms(self)) if of.online else [PREFERENCE_MODEL]
    self.require(len(terms) < 2, "reward", f"one network for config.preference_model, and the other as {LATENT}=FOLDER")
    given = bool(self.preference_model)
    kind = "step-aware preference model" if of.section == "spo" else "preference model"
    kind = "latent reward model, such as the export/ of a run of configs/lrm_tiny.py" if LATENT in terms else kind
    self.require(given or not (of.scorer and terms), "preference_model", f"the folder of a {kind}")

  def _check_text(self, of: Facts) -> None:
    """Checks the fields of models with T5, and which methods have no use for such models."""
    family, expected = family_facts(self.family), f"it is for config.family={families_with('t5')}"
    self.require(family.t5 or not self.drop_t5, "drop_t5", f"False: {expected}")
    length = self.max_sequence_length
    self.require(family.t5 or length is None, "max_sequence_length", f"None: {expected}")
    self.require(length is None or 1 <= length <= 512, "max_sequence_length", "None, or 1 to 512 tokens of T5")
    of_parts = of.trains in ("vae", "latent_scorer")
    expected = f"{families_with('parts')} for {self.objective}, which is made of parts of its models"
    self.require(family.parts or not of_parts, "family", expected)

  def sections(self) -> list[Section]:
    values = (getattr(self, field.name) for field in dataclasses.fields(self))
    return [value for value in values if isinstance(value, Section)]


AnyConfig: TypeAlias = Config | ml_collections.ConfigDict  # both are read the same way


# ---- The two forms of a config: what a recipe changes, and what is read ------------------------------------------


def default() -> ml_collections.ConfigDict:
  """Returns all fields with their defaults, for a recipe to change. Commands refuse an unknown field by name."""
  return ml_collections.ConfigDict(fields(Config))


def typed(config: AnyConfig) -> Config:
  """Returns the dataclasses of a ConfigDict; returns a `Config` unchanged.

  `options` has the dataclass that the objective brings. Fields that the ConfigDict leaves out get their defaults.

  Raises:
    ValueError: a field is unknown, or a value has another type than its field.
  """
  if isinstance(config, Config):
    return config
  values = config.to_dict()
  options = values.pop("options", None) or {}
  found = read(Config, values, "config.")
  return dataclasses.replace(found, options=_options(found.objective, options))


def _options(objective: str, values: Mapping[str, Any]) -> Any:
  """Returns `options` with the values given: of the objective's class, or of one made for them."""
  kind = options_class(objective)
  if kind is None:
    return dataclasses.make_dataclass("Options", values, bases=(Options,), frozen=True)(**values)
  return read(kind, values, "config.options.")


def options_class(objective: str) -> type | None:
  """Returns the dataclass of `config.options` that an objective brings as `Method.config`; None if it brings none.

  Raises:
    ValueError: the objective does not exist, or what it brings is not a dataclass.
  """
  if ":" not in objective:
    return None
  kind = getattr(own_method(objective), "config", None)
  if kind is not None and not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
    raise ValueError(f"config.objective={objective}: its config is {kind!r}; expected a dataclass.")
  return kind


def fill_options(config: ml_collections.ConfigDict, objective: str) -> None:
  """Adds the objective's options that the recipe does not set, so that the command line can set them.

  Raises:
    ValueError: an option is unknown or has a value of another type; also raised as by `options_class`.
  """
  kind = options_class(objective)
  if kind is None:
    return
  given = config.options.to_dict()
  filled = ml_collections.ConfigDict(fields(kind))
  filled.update(convert(kind, given, "config.options."))
  with config.unlocked():
    config.options = filled


def replace(config: AnyConfig, values: Mapping[str, Any]) -> Config:
  """Returns a config with some values replaced.

  >>> replace(default(), {"data.split": "test"}).data.split
  'test'

  Args:
    config: is not changed.
    values: new values by dotted name.
  """
  found: Any = typed(config)
  for name, value in values.items():
    section, _, field = name.rpartition(".")
    inner = dataclasses.replace(getattr(found, section), **{field: value}) if section else value
    found = dataclasses.replace(found, **{section or field: inner})
  return found


def names(config: ml_collections.ConfigDict | None = None, prefix: str = "") -> list[str]:
  """Returns the dotted names of all fields."""
  found: list[str] = []
  for key, value in (default() if config is None else config).items():
    nested = isinstance(value, ml_collections.ConfigDict)
    found += names(value, f"{prefix}{key}.") if nested else [prefix + key]
  return found


def optional_names(kind: type, prefix: str = "") -> list[str]:
  """Returns dotted names of the fields of a dataclass that may be None."""
  found: list[str] = []
  for name, of_field in typing.get_type_hints(kind).items():
    if isinstance(of_field, type) and dataclasses.is_dataclass(of_field):
      found += optional_names(of_field, f"{prefix}{name}.")
    elif types.NoneType in typing.get_args(of_field):
      found.append(prefix + name)
  return found


def to_dict(config: AnyConfig) -> dict[str, Any]:
  """Returns the config as nested plain values, for `config.json`."""
  return config.to_dict()


def check(config: AnyConfig) -> None:
  """Raises for values that cannot run, before anything is loaded or compiled.

  Raises:
    ValueError: one sentence with the field, its value and what was expected.
  """
  whole = typed(config)
  of = facts(whole)
  for part in (whole, *whole.sections()):
    part.counts()
    part.check()
  _check_options(whole)
  for part in (*whole.sections(), whole):
    part.check_with(whole, of)


def _check_options(config: Config) -> None:
  """Checks that the numbers among an objective's options are finite, then runs their class's own check."""
  options, kind = config.options, options_class(config.objective)
  usual = {field.name: field.default for field in dataclasses.fields(options)}
  for name, value in dataclasses.asdict(options).items():
    # A class may use infinity as its own default.
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or value != usual[name]):
      raise ValueError(f"config.options.{name}={value!r}; expected a finite number.")
  if kind is not None and hasattr(options, "check"):
    given = f"config.objective={config.objective}: the check of its options"
    expected = "a ValueError whose sentence begins with config.options, if something is wrong"
    with calling(given, config.objective, expected, options.check):
      options.check()


def parse_steps(text: str) -> tuple[int, int]:
  """Parses START:STOP into two numbers; "" into (0, 0).

  Raises:
    ValueError: the text is anything else, or a range without a step.

  >>> parse_steps("10:13")
  (10, 13)
  """
  if not text:
    return 0, 0
  start, colon, stop = text.partition(":")
  if not (colon and start.isdigit() and stop.isdigit() and 0 < int(start) < int(stop)):
    raise ValueError(f"config.profile_steps={text!r}; expected START:STOP with 0 < START < STOP, e.g. 10:13.")
  return int(start), int(stop)


# ---- Changes of a recipe ------------------------------------------------------------------------------------------


def smoke(config: ml_collections.ConfigDict, preset: str) -> None:
  """Shrinks a recipe to about a minute on a CPU: the same code path on a miniature of the same topology.

  It uses random weights, the embedded emoji, three steps and no evaluation. Fields that decide which code runs stay.

  Args:
    config: changed in place.
    preset: a name of the family's presets: "sd15-miniature", "sdxl-miniature", or "sd35-miniature".
  """
  config.model = f"random:{preset}"
  config.model_config = config.vae_model = config.unet_model = config.image_size = config.max_sequence_length = None
  of = facts(config)
  if of.scorer:
    config.preference_model = f"random:{preset}"
  elif of.trains == "latent_scorer":  # it starts as the model
    config.preference_model = None
  config.accumulation = min(config.accumulation, 2)
  config.update(num_steps=3, batch_size=2 if of.online else 2 * config.accumulation)
  use_embedded_data(config)
  config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
  config.lora.rank = min(config.lora.rank, 4)
  config.reference.tau = min(config.reference.tau, 2)
  config.spo.update(threshold=0.0, minibatch=2, decode_size=0)
  if config.spo.threshold_max is not None:
    config.spo.threshold_max = 0.0
  config.spm.decode_size = 0
  config.grpo.update(group_size=min(config.grpo.group_size, 2), minibatch=2)
  config.logging.every = 1
  config.checkpoint.every = 2
  config.sample.every = 0
  config.evaluation.num_prompts = 0


def use_embedded_data(config: ml_collections.ConfigDict) -> None:
  """Replaces a recipe's training data by the emoji, and clears options that do not apply to them."""
  config.data.update(source="emoji", path=None, images=None, scores=None, labels="given", split="train")
  config.data.update(min_gap=0.0, keep_best=False, validation_share=0.0)
