"""Every field a recipe can set, with its default: `configs/*.py` start from `default()` and override.

A `placeholder` has a type but no value until it is set, so that it can be given on the command line.
"""

import difflib
import importlib
import math
import pathlib
import re
import sys
import traceback
from typing import Any, NamedTuple

import ml_collections
from absl import flags, logging
from ml_collections.config_dict import placeholder

REMAT = ("none", "attention", "block", "full")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
STYLES = ("twemoji", "noto", "openmoji")  # of the embedded emoji
SPLITS = ("train", "validation", "test")
MAX_SEED = 2**32 - 1  # of Grain


class Facts(NamedTuple):
  """What is asked of a method instead of its name.

  Attributes:
    data: what a row of its batches is: "pair"; "liked", an image that is or is not; "image", with its caption;
      "prompt"; or "tile", of the embedded emoji.
    online: whether it draws what it learns from, and makes several updates of it.
    scorer: whether it has a preference model, `config.preference_model`; online methods have rewards, of which it is
      one.
    trains: "denoiser" (or its adapter), "scorer", or the network that is trained from nothing.
    losses: which losses `config.loss.name` may choose: "denoised", "pair" or "".
  """

  data: str
  online: bool = False
  scorer: bool = False
  trains: str = "denoiser"
  losses: str = ""

  @property
  def aligns(self) -> bool:
    """Whether it changes a text-to-image model that is compared with the one it started from."""
    return self.trains == "denoiser" and self.data != "image"


FACTS = {
  "spo": Facts("prompt", online=True, scorer=True, losses="pair"),
  "grpo": Facts("prompt", online=True, scorer=True),
  "dpo": Facts("pair", losses="denoised"),
  "tdpo": Facts("pair", losses="denoised"),
  "kto": Facts("liked"),
  "spm": Facts("pair", scorer=True, trains="scorer"),
  "denoise": Facts("image"),
  "autoencode": Facts("tile", trains="vae"),
  "contrastive": Facts("tile", trains="clip"),
  "classify": Facts("tile", trains="judge"),
}
OBJECTIVES = tuple(FACTS)
PAIR_LOSSES = ("sigmoid", "robust", "ipo", "hinge")
DENOISED_LOSSES = (*PAIR_LOSSES, "dspo", "mapo", "sft")
# What each kind of data has rows for, and what lies at config.data.path.
SOURCES: dict[str, tuple[tuple[str, ...], str]] = {
  "emoji": (("pair", "liked", "image", "prompt", "tile"), "nothing"),
  "tfds": (("pair", "liked"), "the folder of a tfds dataset of pairs"),
  "pairs_file": (("pair", "liked"), "a .jsonl or .csv file of pairs"),
  "rankings": (("pair", "liked"), "a JSON file of rankings, such as HPDv2's train.json"),
  "unpaired_file": (("liked",), "a .jsonl or .csv file of images that are liked or not"),
  "prompts": (("prompt",), "a file of prompts (docs/evaluation.md)"),
  "precomputed": (("pair", "liked", "image"), "the folder that python -m jaxpref.precompute wrote"),
}


def reward_terms(config: ml_collections.ConfigDict) -> dict[str, float]:
  """The weights of `config.reward` by what they are of: names, NAME=FOLDER, package.module:function.

  Raises:
    ValueError: not of that form, a name twice, or a weight that is not a finite number other than 0.

  >>> config = default()
  >>> config.reward = "pickscore:1, aesthetic=weights/aesthetic:0.1, mine:brightness"
  >>> reward_terms(config)
  {'pickscore': 1.0, 'aesthetic=weights/aesthetic': 0.1, 'mine:brightness': 1.0}
  """
  found: dict[str, float] = {}
  for term in config.reward.split(",") if config.reward else ["preference_model"]:
    spec, colon, last = term.strip().rpartition(":")
    try:
      weight = float(last) if colon else 1.0
    except ValueError:  # of package.module:function without a weight
      weight = 1.0
      colon = ""
    spec = spec if colon else term.strip()
    if not spec or spec in found or not math.isfinite(weight) or not weight:
      raise ValueError(
        f"config.reward={config.reward!r}: {term.strip()!r}; expected NAME:WEIGHT with commas between them, such as "
        "pickscore:1,aesthetic:0.1, each name once, and weights that are finite and not 0."
      )
    found[spec] = weight
  return found


def is_function(spec: str) -> bool:
  """Whether a term of `config.reward` is package.module:function."""
  return ":" in spec and "=" not in spec


def load_named(spec: str, field: str, what: str) -> Any:
  """What package.module:Name of a user's own names.

  Raises:
    ValueError: the module cannot be imported, or has no such name.
  """
  module_name, _, name = spec.partition(":")
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # whatever the user's module raises
    raise ValueError(
      f"{field}={spec}: the module {module_name} cannot be imported ({type(error).__name__}: {error}); expected "
      f"package.module:{what} of a module that Python finds, e.g. by PYTHONPATH."
    ) from error
  if not hasattr(module, name):
    near = difflib.get_close_matches(name, vars(module), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"{field}={spec}: the module {module_name} has no {name}{hint}.")
  return getattr(module, name)


def facts(config: ml_collections.ConfigDict) -> Facts:
  """Those of `config.objective`: a name, or package.module:NAME of a method of one's own (docs/extending.md).

  Raises:
    ValueError: it names none.
  """
  if ":" not in config.objective:
    if config.objective not in FACTS:
      near = difflib.get_close_matches(str(config.objective), OBJECTIVES, n=1)
      hint = f" (did you mean {near[0]!r}?)" if near else ""
      raise ValueError(f"config.objective={config.objective!r}; expected one of {', '.join(OBJECTIVES)}{hint}.")
    return FACTS[config.objective]
  found = load_named(config.objective, "config.objective", "NAME")
  if not isinstance(getattr(found, "facts", None), Facts):
    raise ValueError(
      f"config.objective={config.objective}: it is of type {type(found).__name__}; expected a "
      "jaxpref.objectives.catalog.Method."
    )
  return found.facts


def default() -> ml_collections.ConfigDict:
  """The full set of fields. Unknown fields are refused by name wherever a config is changed."""
  return ml_collections.ConfigDict(
    dict(
      objective="dpo",  # one of OBJECTIVES, or package.module:NAME of your own (docs/extending.md)
      options=dict(),  # fields of your own objective
      seed=0,
      # Updates; for spo and grpo: iterations (rollout, scoring, and the updates it pays for). A run that is beyond them
      # is refused; a finished one goes on with more if its learning rate is constant.
      num_steps=1000,
      batch_size=32,  # global: pairs, images, or prompts of one rollout
      accumulation=1,  # micro-batches that an update is split into
      dtype="float32",  # of computation and of what is not trained: float32 or bfloat16; what is trained is float32
      remat="none",  # what the UNet's backward pass recomputes: none, attention, block or full; or "none,block,..."
      vae_slicing=0,  # images that the VAE encodes or decodes at a time on each device; 0: all of a batch
      family="stable_diffusion",  # of the model: Stable Diffusion 1.x, 2.x, SDXL; or package.module:NAME of your own
      # What is loaded. Each is a folder, a hub name, "tiny-sd" (shipped), "random:PRESET", or
      # "drawn:PRESET" (random, too: see jaxpref/files/loading.py).
      model="tiny-sd",
      vae_model=placeholder(str),  # a VAE's folder or hub name, in the place of the model's own
      preference_model=placeholder(str),  # spo, grpo: a reward; spm: what to start from
      # What spo and grpo are rewarded by: "" is preference_model, or a weighted sum of it and names of docs/rewards.md,
      # such as "pickscore:1,aesthetic:0.1"; grpo also takes a function of your own, package.module:function.
      reward="",
      reward_timeout=600.0,  # seconds that such a function may take for the images of an iteration
      judge=placeholder(str),  # evaluation only
      mesh=dict(data=-1, fsdp=1, tensor=1),
      max_bad_steps=5,  # steps in a row whose loss or gradient is not finite, and whose update is left out; then stop
      profile_steps="",  # START:STOP, e.g. 10:13: a profile of these steps in WORKDIR/profile
      data=dict(  # docs/data.md
        # emoji (embedded: pairs, images, prompts); tfds (a folder of pairs, such as Pick-a-Pic's), pairs_file (.jsonl
        # or .csv), rankings (HPDv2's .json); unpaired_file (for kto); prompts (spo, grpo); precomputed (a folder)
        source="emoji",
        path=placeholder(str),  # of the folder or file, for all but emoji
        images=placeholder(str),  # rankings: the folder of the images, where it is not the published one
        ranking_pairs="all",  # rankings: all pairs of a ranking, or winner: those of its best image with the others
        preferred_style="openmoji",  # emoji: twemoji, noto or openmoji, the outlined one
        subset="core",  # emoji
        split="train",
        validation_share=0.0,  # of the prompts of split "train", which are held out and become split "validation"
        labels="given",  # or scores: the image with the higher score wins
        scores=placeholder(str),  # written by jaxpref.score, in the place of those that the source may have
        ties="drop",  # drop; keep, at 0.5 (spm); or soft: labels are probabilities, by the scores where there are any
        min_gap=0.0,  # pairs whose scores give probabilities less than this apart are ties
        only_labelled=False,  # leave out pairs that nobody judged (Pick-a-Pic's has_label)
        max_per_prompt=0,  # pairs of a prompt that are used at most; 0: all
        keep_best=False,  # an image that won and later lost gives way to the one that beat it
        flip_labels=0.0,  # share of labels that is flipped, for studies of noise
        caption_dropout=0.0,  # share of captions replaced by the empty prompt
        flip=False,  # mirror half of the pairs, both images alike
        random_crop=False,  # or the central square
        num_threads=2,
        num_workers=0,  # processes that decode images; 0: the threads do
      ),
      lora=dict(
        rank=0,  # 0: full training, or the rank of init_from
        alpha=placeholder(float),  # default: the rank
        targets=r"(to_q|to_k|to_v|to_out\.0)$",
        init="kaiming",  # of A: kaiming (PEFT's default) or gaussian, of deviation 1 / rank (larger for small ranks)
        init_from=placeholder(str),  # a LoRA file (diffusers, PEFT or kohya) to continue from; it says the targets
      ),
      optimizer=dict(
        name="adamw",
        learning_rate=1e-4,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=1e-2,
        clip_norm=1.0,
      ),
      loss=dict(
        name="sigmoid",  # sigmoid, robust, ipo or hinge; of dpo and tdpo also dspo, mapo or sft
        beta=5000.0,
        label_smoothing=0.0,  # of sigmoid and robust
        snr=0.5,  # of mapo: arXiv 2406.06424
        safeguard=placeholder(float),  # dpo, tdpo: mu in [0, 1] of arXiv 2511.03317, on top of any loss
      ),
      kto=dict(weight_desirable=1.0, weight_undesirable=1.0),  # arXiv 2404.04465: of liked images and of others
      timesteps=dict(gamma=1.0, num_bins=20, reward_scale=False),  # dpo, tdpo (which is another name): arXiv 2505.18736
      reference=dict(
        mode="frozen",  # frozen or update
        alpha=1.0,
        rho=0.0,
        tau=32,
        delta=0.005,
        decay=0.5,  # weight of the past in the mean of D that the gate reads; 0: each D by itself, as in the paper
        on_diverge="freeze",  # freeze or reinit
      ),
      spo=dict(
        num_inference_steps=20,
        eta=1.0,
        guidance_scale=5.0,  # here and below: up to 1 there is no guidance
        warmup_steps=4,  # first denoising steps, one sample each
        pool_size=4,
        inner_steps=0,
        threshold=0.3,  # smallest softmax gap between winner and loser
        next_latent="random",  # random, winner or loser
        pool_last_step=False,  # a pool in the last step, too (SD 1.5's rollout), with inner_steps 0
        step_aware=True,  # False: the preference model is told time 0 at every step
        decode_size=0,  # pixels a side that predictions are decoded at, for the preference model; 0: the images'
        ratio_clip=0.1,
        minibatch=32,  # transitions of one update
      ),
      grpo=dict(  # GRPO: arXiv 2402.03300, 2505.07818, 2505.05470; DDPO: arXiv 2305.13301
        num_inference_steps=20,
        eta=1.0,
        guidance_scale=5.0,
        group_size=8,  # samples of a prompt
        advantage="group",  # rewards relative to those of the same prompt (GRPO), or of the whole batch (DDPO)
        advantage_clip=5.0,
        timestep_fraction=1.0,  # of each sample's steps, at random, that is trained on
        ratio_clip=1e-4,  # small, as log-densities are means over the latents
        kl_coef=0.0,  # weight of the KL to the reference; 0: the reference is not called
        minibatch=32,  # steps of one update
      ),
      spm=dict(
        guidance_scale=5.0,
        step_aware=True,  # False: trains on clean images, at time 0
        decode_size=0,  # as of spo
      ),
      vae=dict(kl_weight=1e-4, gradient_weight=1.0),
      train_text_encoder=False,  # denoise only
      logging=dict(every=10, wandb_project=""),
      checkpoint=dict(every=500, keep=2),
      # Every so many steps (0: never) the same validation prompts are drawn from the same noise, and measured.
      sample=dict(every=0, num_prompts=8, seeds_per_prompt=2),
      evaluation=dict(
        num_prompts=64,
        seeds_per_prompt=4,
        num_inference_steps=20,
        guidance_scale=5.0,
        eta=0.0,
        batch_size=64,
        candidates=16,  # captions to choose from in caption accuracy
        bootstrap_samples=2000,
        seed=12345,
        split="test",
        # After the run python -m jaxpref.evaluate compares base and aligned model by these, with commas between them:
        # names of docs/evaluation.md, or a function of your own as package.module:function.
        scorers="",
        prompts="emoji",  # for them: a file, or emoji (those of `split`); num_prompts of it, 0: all
        diversity="",  # the CLIP that measures it; one of the scorers by itself
      ),
    )
  )


def smoke(config: ml_collections.ConfigDict, preset: str) -> None:
  """Shrinks a recipe to about a minute on a CPU: its code path, on a miniature of the same topology.

  Random weights, the embedded emoji, three steps, no evaluation. What decides which code runs stays as it is.

  Args:
    config: changed in place.
    preset: of `jaxpref.models.presets`: "sd15-miniature" or "sdxl-miniature".
  """
  config.model = f"random:{preset}"
  config.vae_model = None
  of = facts(config)
  if of.scorer:
    config.preference_model = f"random:{preset}"
  config.accumulation = min(config.accumulation, 2)
  config.update(num_steps=3, batch_size=2 if of.online else 2 * config.accumulation)
  use_embedded_data(config)
  config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
  config.lora.rank = min(config.lora.rank, 4)
  config.reference.tau = min(config.reference.tau, 2)
  config.spo.update(threshold=0.0, minibatch=2, decode_size=0)
  config.spm.decode_size = 0
  config.grpo.update(group_size=min(config.grpo.group_size, 2), minibatch=2)
  config.logging.every = 1
  config.checkpoint.every = 2
  config.sample.every = 0
  config.evaluation.num_prompts = 0


def use_embedded_data(config: ml_collections.ConfigDict) -> None:
  """The emoji in the place of what a recipe trains on, and no options that they have nothing for."""
  config.data.update(source="emoji", path=None, images=None, scores=None, labels="given", split="train")
  config.data.update(min_gap=0.0, keep_best=False, validation_share=0.0)


def names(config: ml_collections.ConfigDict | None = None, prefix: str = "") -> list[str]:
  """Dotted names of all fields."""
  found: list[str] = []
  for key, value in (default() if config is None else config).items():
    nested = isinstance(value, ml_collections.ConfigDict)
    found += names(value, f"{prefix}{key}.") if nested else [prefix + key]
  return found


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Nested plain values, for `config.json`."""
  return config.to_dict()


def parse_steps(text: str) -> tuple[int, int]:
  """START:STOP as two numbers; (0, 0) for "".

  Raises:
    ValueError: anything else, or a range without a step.

  >>> parse_steps("10:13")
  (10, 13)
  """
  if not text:
    return 0, 0
  start, colon, stop = text.partition(":")
  if not (colon and start.isdigit() and stop.isdigit() and 0 < int(start) < int(stop)):
    raise ValueError(f"config.profile_steps={text!r}; expected START:STOP with 0 < START < STOP, e.g. 10:13.")
  return int(start), int(stop)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses values that cannot run, before anything is loaded or compiled.

  Raises:
    ValueError: one sentence: field, value, what was expected.
  """

  def require(ok: bool, field: str, expected: str) -> None:
    if not ok:
      value: Any = config
      for part in field.split("."):
        value = value[part]
      raise ValueError(f"config.{field}={value!r}; expected {expected}.")

  def one_of(field: str, choices: tuple[str, ...]) -> None:
    value: Any = config
    for part in field.split("."):
      value = value[part]
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    require(value in choices, field, f"one of {', '.join(choices)}{hint}")

  of = facts(config)
  one_of("dtype", ("float32", "bfloat16"))
  policies = [name.strip() for name in config.remat.split(",")]
  require(set(policies) <= set(REMAT), "remat", f"one of {', '.join(REMAT)}, or one for each level, with commas")
  parse_steps(config.profile_steps)
  one_of("data.source", tuple(SOURCES))
  one_of("data.labels", ("given", "scores"))
  one_of("data.ranking_pairs", ("all", "winner"))
  one_of("data.ties", ("drop", "keep", "soft"))
  one_of("data.subset", ("core", "all"))
  one_of("data.preferred_style", STYLES)
  if config.data.source in ("emoji", "prompts", "pairs_file", "rankings", "unpaired_file"):
    one_of("data.split", (*SPLITS, "all"))
  one_of("evaluation.split", SPLITS)
  one_of("optimizer.name", OPTIMIZERS)
  one_of("optimizer.schedule", SCHEDULES)
  require(
    isinstance(config.seed, int) and 0 <= config.seed <= MAX_SEED, "seed", f"an integer from 0 to {MAX_SEED} (2^32 - 1)"
  )
  one_of("reference.mode", ("frozen", "update"))
  one_of("reference.on_diverge", ("freeze", "reinit"))
  one_of("spo.next_latent", ("random", "winner", "loser"))
  one_of("grpo.advantage", ("group", "batch"))
  counts = (
    "num_steps", "batch_size", "accumulation", "max_bad_steps", "logging.every", "checkpoint.every", "checkpoint.keep",
  )  # fmt: skip
  evaluation = ("seeds_per_prompt", "num_inference_steps", "batch_size", "bootstrap_samples")
  for field in (*counts, *(f"evaluation.{name}" for name in evaluation)):
    value: Any = config
    for part in field.split("."):
      value = value[part]
    require(isinstance(value, int) and value >= 1, field, "an integer of at least 1")
  require(
    config.objective != "contrastive" or config.accumulation == 1,
    "accumulation",
    "1 for contrastive: each image is compared with the captions of all of the batch",
  )
  for section in ("spo", "grpo", "spm", "evaluation"):
    scale = config[section].guidance_scale
    require(0.0 <= scale < math.inf, f"{section}.guidance_scale", "a number of at least 0 (up to 1: no guidance)")
  for section in ("spo", "spm"):
    size = config[section].decode_size
    require(isinstance(size, int) and size >= 0, f"{section}.decode_size", "0 (the images' own size) or pixels a side")
  for field in (
    "kto.weight_desirable",
    "kto.weight_undesirable",
    "vae.kl_weight",
    "vae.gradient_weight",
    "grpo.kl_coef",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
  ):
    section, name = field.split(".")
    require(0.0 <= config[section][name] < math.inf, field, "a number of at least 0")
  require(0.0 < config.reference.alpha <= 1.0, "reference.alpha", "a number in (0, 1]")
  require(0.0 <= config.reference.rho < 1.0, "reference.rho", "a number in [0, 1)")
  require(config.reference.delta >= 0.0, "reference.delta", "a divergence of at least 0")
  require(config.reference.tau >= 1, "reference.tau", "an integer of at least 1")
  require(0.0 <= config.reference.decay < 1.0, "reference.decay", "a number in [0, 1)")
  require(0.0 < config.loss.beta < math.inf, "loss.beta", "a number above 0")
  require(0.0 <= config.loss.label_smoothing < 0.5, "loss.label_smoothing", "a number in [0, 0.5)")
  offline, of_pairs = of.losses == "denoised", bool(of.losses)
  if ":" not in config.loss.name:
    one_of("loss.name", DENOISED_LOSSES if offline else PAIR_LOSSES if of_pairs else PAIR_LOSSES[:1])
  elif of_pairs:
    load_named(config.loss.name, "config.loss.name", "function")
  else:
    require(False, "loss.name", f"sigmoid: {config.objective} has a loss of its own")
  smoothed = of_pairs and config.loss.name in ("sigmoid", "robust")
  require(smoothed or not config.loss.label_smoothing, "loss.label_smoothing", "0: it is for sigmoid and robust losses")
  if config.loss.name in ("mapo", "sft"):
    require(config.reference.mode == "frozen", "reference.mode", f"frozen: {config.loss.name} has no reference")
  if config.loss.name == "sft":  # which sees neither margin nor loser
    require(config.loss.safeguard is None, "loss.safeguard", "None: the loss sft has no loser")
    require(not config.timesteps.reward_scale, "timesteps.reward_scale", "False: the loss sft has no margin")
    require(config.data.ties != "soft", "data.ties", "drop: the loss sft has no margin that a soft label would scale")
  # The default of 5000 is for the margin of errors; these count it in units of the error itself.
  require(config.loss.name != "mapo" or config.loss.beta <= 10.0, "loss.beta", "at most 10 for mapo; published: 0.1")
  require(config.loss.name != "dspo" or config.loss.beta < 2.0, "loss.beta", "below 2 for dspo; published: 0.001")
  require(0.0 < config.loss.snr < math.inf, "loss.snr", "a number above 0")
  mu = config.loss.safeguard
  require(mu is None or 0.0 <= mu <= 1.0, "loss.safeguard", "None or a number in [0, 1]")
  require(mu is None or offline, "loss.safeguard", f"None for {config.objective}: it is for dpo and tdpo")
  require(0.0 < config.timesteps.gamma <= 1.0, "timesteps.gamma", "a number in (0, 1]")
  require(config.timesteps.num_bins >= 1, "timesteps.num_bins", "an integer of at least 1")
  require(offline or config.timesteps.gamma == 1.0, "timesteps.gamma", f"1 for {config.objective}: it is for dpo, tdpo")
  scaled = config.timesteps.reward_scale
  require(offline or not scaled, "timesteps.reward_scale", f"False for {config.objective}: it is for dpo and tdpo")
  aligns = of.aligns
  require(aligns or config.reference.mode == "frozen", "reference.mode", f"frozen: {config.objective} has no reference")
  require(config.vae_slicing >= 0, "vae_slicing", "0 (all at once) or a number of images")
  require(config.lora.rank >= 0, "lora.rank", "0 (full training) or a positive rank")
  for field in ("rank", "init_from"):
    adapts = of.trains == "denoiser" or not config.lora[field]
    require(adapts, f"lora.{field}", f"nothing for {config.objective}: it trains no UNet")
  try:
    re.compile(config.lora.targets)
  except re.error as error:
    require(False, "lora.targets", f"a regular expression ({error})")
  one_of("lora.init", ("kaiming", "gaussian"))
  require(config.lora.alpha is None or config.lora.alpha > 0, "lora.alpha", "a number above 0")
  require(config.evaluation.num_prompts >= 0, "evaluation.num_prompts", "0 (no evaluation) or a number of prompts")
  require(0.0 <= config.evaluation.eta <= 1.0, "evaluation.eta", "a number in [0, 1]")
  require(config.evaluation.candidates >= 2, "evaluation.candidates", "at least 2 captions to choose from")
  require(
    not config.evaluation.scorers or aligns,
    "evaluation.scorers",
    "nothing for this objective: they compare an aligned model with its base",
  )
  require(config.sample.every >= 0, "sample.every", "0 (never) or a number of steps")
  for field in ("num_prompts", "seeds_per_prompt"):
    require(config.sample[field] >= 1, f"sample.{field}", "an integer of at least 1")
  require(0.0 < config.optimizer.learning_rate < math.inf, "optimizer.learning_rate", "a number above 0")
  for field in ("b1", "b2"):
    require(0.0 <= config.optimizer[field] < 1.0, f"optimizer.{field}", "a number in [0, 1)")
  require(config.optimizer.eps > 0.0, "optimizer.eps", "a number above 0")
  require(config.optimizer.warmup_steps >= 0, "optimizer.warmup_steps", "an integer of at least 0")
  require(
    not config.train_text_encoder
    or (of.trains == "denoiser" and of.data == "image" and not config.lora.rank and not config.lora.init_from),
    "train_text_encoder",
    "False for this objective: only denoise without LoRA trains the text encoder",
  )
  require(
    not config.vae_model or of.trains in ("denoiser", "scorer"),
    "vae_model",
    "nothing for this objective: it is for those with a UNet",
  )
  rows, what = SOURCES[config.data.source]
  fits = of.data in rows and (config.data.source != "precomputed" or of.trains == "denoiser")
  known = (name for name, f in FACTS.items() if f.data in rows)
  known = (name for name in known if config.data.source != "precomputed" or FACTS[name].trains == "denoiser")
  require(fits, "data.source", f"another source for objective {config.objective}: this one is for {', '.join(known)}")
  require(config.data.source == "emoji" or bool(config.data.path), "data.path", what)
  require(
    config.data.source != "emoji" or not config.data.path,
    "data.path",
    f"nothing for data.source=emoji; set data.source to what it is: {', '.join(k for k in SOURCES if k != 'emoji')}",
  )
  for field in ("validation_share", "min_gap", "flip_labels", "caption_dropout"):
    require(0.0 <= config.data[field] < 1.0, f"data.{field}", "a share of at least 0 and below 1")
  for field in ("max_per_prompt", "num_threads", "num_workers"):
    require(config.data[field] >= 0, f"data.{field}", "an integer of at least 0")
  usual = default().data
  pairs = of.data in ("pair", "liked") and config.data.source != "unpaired_file"
  for field in ("labels", "scores", "ties", "min_gap", "only_labelled", "max_per_prompt", "keep_best", "flip_labels"):
    require(pairs or config.data[field] == usual[field], f"data.{field}", f"{usual[field]!r}: it is for data of pairs")
  for field in ("caption_dropout", "flip", "random_crop"):
    drawn = of.online and config.data[field] != usual[field]
    require(not drawn, f"data.{field}", f"{usual[field]!r} for {config.objective}, which has no images to learn from")
  liked = of.data == "liked"
  require(
    not liked or config.data.ties == "drop", "data.ties", f"drop for {config.objective}: a tie has no liked image"
  )
  require(not config.data.keep_best or config.data.ties == "drop", "data.keep_best", "False unless ties are dropped")
  if config.data.source == "precomputed":
    require(not config.data.random_crop, "data.random_crop", "False: precomputed images are central squares")
    require(not config.train_text_encoder, "train_text_encoder", "False: the prompts of precomputed data are encoded")
  require(of.online or not config.reward, "reward", f"nothing for {config.objective}: it is for spo and grpo")
  require(0.0 < config.reward_timeout < math.inf, "reward_timeout", "a number of seconds above 0")
  if of.online and of.scorer:
    terms = reward_terms(config)
    needs = (
      "the folder of a step-aware preference model" if config.objective == "spo" else "the folder of a preference model"
    )
    require("preference_model" not in terms or bool(config.preference_model), "preference_model", needs)
    unused = bool(config.preference_model) and "preference_model" not in terms
    require(not unused, "preference_model", "None, as config.reward does not name preference_model")
    on_host = [term for term in terms if is_function(term)]
    spo = config.objective != "spo" or not on_host
    require(spo, "reward", "rewards with a network: spo scores every step inside its program, a function scores images")
  if of.online:
    # A schedule counts updates, of which an iteration has many: with spo as many as it has valid pairs.
    require(config.optimizer.schedule == "constant", "optimizer.schedule", f"constant for {config.objective}")
  if config.objective == "spo":
    require(config.spo.pool_size >= 2, "spo.pool_size", "at least 2 candidates")
    require(config.spo.minibatch >= 1, "spo.minibatch", "at least 1 transition")
    require(0.0 <= config.spo.threshold < 1.0, "spo.threshold", "a softmax gap in [0, 1)")
    require(0.0 < config.spo.ratio_clip < 1.0, "spo.ratio_clip", "a number in (0, 1)")
    require(0.0 < config.spo.eta <= 1.0, "spo.eta", "a number in (0, 1]: without noise all candidates are the same")
    require(config.spo.inner_steps >= 0, "spo.inner_steps", "an integer of at least 0")
    group = config.spo.inner_steps + 1
    steps = config.spo.num_inference_steps - config.spo.warmup_steps
    require(
      config.spo.warmup_steps >= 1 and steps >= 2,
      "spo.warmup_steps",
      f"at least 1 step before the first pool, and at least 2 of the {config.spo.num_inference_steps} after it",
    )
    require(
      steps % group == 0,
      "spo.inner_steps",
      f"a group length inner_steps + 1 that divides num_inference_steps - warmup_steps = {steps}",
    )
    require(group == 1 or not config.spo.pool_last_step, "spo.pool_last_step", "False, as spo.inner_steps is above 0")
  if config.objective == "spm":
    require(bool(config.preference_model), "preference_model", "the folder of a CLIP or preference model to start from")
  if config.objective == "grpo":
    g = config.grpo
    require(g.num_inference_steps >= 1, "grpo.num_inference_steps", "at least 1 step")
    require(0.0 < g.eta <= 1.0, "grpo.eta", "a number in (0, 1]: steps without noise have no density")
    compared = g.group_size if g.advantage == "group" else g.group_size * config.batch_size
    require(g.group_size >= 1 and compared >= 2, "grpo.group_size", "at least 2 samples to compare with each other")
    require(g.advantage_clip > 0.0, "grpo.advantage_clip", "a number above 0")
    require(0.0 < g.timestep_fraction <= 1.0, "grpo.timestep_fraction", "a share in (0, 1]")
    require(0.0 < g.ratio_clip < 1.0, "grpo.ratio_clip", "a number in (0, 1)")
    require(g.minibatch >= 1, "grpo.minibatch", "at least 1 step")
    moves = config.reference.mode == "update"
    require(g.kl_coef > 0.0 or not moves, "reference.mode", "frozen, as grpo.kl_coef is 0 and nothing looks at it")


def _check_arguments(argv: list[str]) -> None:
  """Answers recipes that are not there and misspelt fields before absl does, which shows a traceback."""
  options = [a.lstrip("-") for a in argv[1:] if a.startswith("-")]
  for recipe in _recipes(argv):
    file = recipe.partition(":")[0]
    if not pathlib.Path(file).is_file():
      raise ValueError(f"--config={recipe}: there is no file {file}; give a recipe such as configs/spo_tiny.py.")
    variants = re.search(r"def get_config\((.*?)\)", pathlib.Path(file).read_text(encoding="utf-8", errors="replace"))
    if ":" in recipe and variants is not None and not variants[1]:
      raise ValueError(f"--config={recipe}: {file} has no variants; leave out the colon and what follows.")
  given: dict[str, str] = {}
  for option in options:
    name, equals, value = option.partition("=")
    if equals and given.get(name, value) != value:
      print(f"warning: --{name} is given twice; {value} counts, not {given[name]}.", file=sys.stderr)
    given[name] = value
  known = names()
  for option in options:
    name = option.partition("=")[0].removeprefix("config.")
    if option.startswith("config.") and name not in known and not name.startswith("options."):
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise ValueError(f"--config.{name} is no field; did you mean --config.{near}? See jaxpref/config.py for all.")


def parse_flags(argv: list[str]) -> list[str]:
  """Parses a command line with --config, for `app.run`; what is wrong with it ends the program in one sentence."""
  try:
    _check_arguments(argv)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # what is warned of here is said below
    rest = flags.FLAGS(argv)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(before)
    _check_recipes(argv)
    return rest
  except (flags.Error, ValueError) as error:
    if (where := _line_of_recipe(error, argv)) is not None:
      sys.exit(f"error: {where}")
    lines = [line for line in str(error).splitlines() if line.strip(" ;") not in ("", "see --help.")]
    said = re.sub(r"^[A-Za-z]*Error: ", "", lines[-1])
    if missing := re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", said):
      said = f"--{missing[1]} is missing; --help says what it is."
      if missing[1] == "config" and _recipes(argv):
        said = f"--config={_recipes(argv)[-1]}: its get_config returns nothing; end it with: return config."
    sys.exit(f"error: {said}")
  except Exception as error:
    if (where := _line_of_recipe(error, argv)) is None:
      raise
    sys.exit(f"error: {where}")


def _recipes(argv: list[str]) -> list[str]:
  """What is given as --config."""
  options = [a.lstrip("-") for a in argv[1:] if a.startswith("-")]
  return [o.partition("=")[2] for o in options if o.startswith("config=")]


def _check_recipes(argv: list[str]) -> None:
  """Refuses a recipe that gave no config."""
  value = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  if _recipes(argv) and not isinstance(value, ml_collections.ConfigDict):
    raise ValueError(
      f"--config={_recipes(argv)[-1]}: its get_config returns {type(value).__name__}, expected the config that it "
      "changes: return config."
    )
  known = names()
  for name in names(value) if _recipes(argv) else ():
    if name not in known and not name.startswith("options."):
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise ValueError(f"{_recipes(argv)[-1]} sets config.{name}, which is no field; did you mean config.{near}?")


def _line_of_recipe(error: BaseException, argv: list[str]) -> str | None:
  """What is wrong in a recipe, with its file and line; None where the error is not of one."""
  for recipe in _recipes(argv):
    file = recipe.partition(":")[0]
    name = pathlib.Path(file).name
    if isinstance(error, SyntaxError) and error.filename and pathlib.Path(error.filename).name == name:
      return f"{file}, line {error.lineno}: {error.msg}."
    if "get_config" in str(error) and isinstance(error, AttributeError):
      return f"--config={recipe}: {file} has no function get_config; see configs/spo_tiny.py."
    cause: BaseException | None = error
    while cause is not None:  # absl makes errors of its own of some
      frames = traceback.extract_tb(cause.__traceback__)
      if lines := [frame.lineno for frame in frames if pathlib.Path(frame.filename).name == name]:
        text = (str(cause).splitlines() or [""])[0]
        where = f"{file}, line {lines[-1]}"
        return f"{text} ({where})" if isinstance(cause, ValueError) else f"{where}: {type(cause).__name__}: {text}"
      cause = cause.__cause__ or cause.__context__
  return None
