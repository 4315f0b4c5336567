"""The facts of a method, and of a family of models, that are needed before anything is loaded."""

from typing import Any, NamedTuple

from jaxpref.recipes.own import OwnCodeError, hint, load_named
from jaxpref.recipes.sections import nearest


class Facts(NamedTuple):
  """The properties of a method; code asks them instead of its name.

  Attributes:
    data: a row of its batches: "pair"; "liked", an image that is liked or not; "image", with its caption; "prompt"; or
      "tile", of the embedded emoji.
    online: whether it draws what it learns from, and makes several updates from it.
    scorer: whether it has a preference model, `config.preference_model`; online that is one of the rewards.
    trains: "denoiser" (or its adapter), "scorer" of images, "latent_scorer", or the name of the network that it trains
      from scratch.
    losses: which losses `config.loss.name` may choose: "denoised", "pair" or "".
    section: the name of its own section of the config, whose rules hold if it is used; "" if it has none.
  """

  data: str
  online: bool = False
  scorer: bool = False
  trains: str = "denoiser"
  losses: str = ""
  section: str = ""

  @property
  def aligns(self) -> bool:
    """Whether it changes a text-to-image model that is compared with its starting point."""
    return self.trains == "denoiser" and self.data != "image"

  @property
  def of_latents(self) -> bool:
    """Whether latents are all it needs of images, so that data can be precomputed."""
    return self.trains in ("denoiser", "latent_scorer")

  @property
  def encodes_text(self) -> bool:
    """Whether it trains a text encoder of its own, and so takes the tokens of precomputed prompts."""
    return self.trains == "latent_scorer"


FACTS = {
  "spo": Facts("prompt", online=True, scorer=True, losses="pair", section="spo"),
  "grpo": Facts("prompt", online=True, scorer=True, section="grpo"),
  "dpo": Facts("pair", losses="denoised"),
  "tdpo": Facts("pair", losses="denoised"),
  "kto": Facts("liked"),
  "spm": Facts("pair", scorer=True, trains="scorer", section="spm"),
  "lrm": Facts("pair", trains="latent_scorer", section="lrm"),
  "denoise": Facts("image"),
  "autoencode": Facts("tile", trains="vae"),
  "contrastive": Facts("tile", trains="clip"),
  "classify": Facts("tile", trains="judge"),
}


class FamilyFacts(NamedTuple):
  """The properties of a family of models; the config asks them instead of its name.

  Attributes:
    flow: whether its process is, or may be, a rectified flow, whose training times the config chooses.
    single_files: whether it reads checkpoints of one file, and takes another denoiser (`config.unet_model`).
    t5: whether prompts also go through T5, which may be left out.
    parts: whether methods that train one of its networks, or a network made of their parts, support it.
  """

  flow: bool = True
  single_files: bool = False
  t5: bool = False
  parts: bool = True


FAMILY_FACTS = {
  "stable_diffusion": FamilyFacts(flow=False, single_files=True),
  "stable_diffusion_3": FamilyFacts(t5=True, parts=False),
}


def family_facts(name: str) -> FamilyFacts:
  """Returns the facts of a value of `config.family`; of your own family, those that forbid the least."""
  return FAMILY_FACTS.get(name, FamilyFacts())


def families_with(field: str) -> str:
  """Returns the names of the families that have a property of `FamilyFacts`, for messages."""
  return ", ".join(name for name, of in FAMILY_FACTS.items() if getattr(of, field))


PAIR_LOSSES = ("sigmoid", "robust", "ipo", "hinge")
DENOISED_LOSSES = (*PAIR_LOSSES, "dspo", "mapo", "sft")
# For each kind of data: the rows it has, and what config.data.path names.
SOURCES: dict[str, tuple[tuple[str, ...], str]] = {
  "emoji": (("pair", "liked", "image", "prompt", "tile"), "nothing"),
  "tfds": (("pair", "liked"), "the folder of a tfds dataset of pairs"),
  "pairs_file": (("pair", "liked"), "a .jsonl or .csv file of pairs"),
  "rankings": (("pair", "liked"), "a JSON file of rankings, such as HPDv2's train.json"),
  "unpaired_file": (("liked",), "a .jsonl or .csv file of images that are liked or not"),
  "prompts": (("prompt",), "a file of prompts (docs/evaluation.md)"),
  "precomputed": (("pair", "liked", "image"), "the folder that python -m jaxpref.precompute wrote"),
}


def facts(config: Any) -> Facts:
  """Returns the facts of `config.objective`: a name, or your own as package.module:NAME (docs/extending.md).

  Raises:
    ValueError: there is no such objective.
  """
  if ":" in config.objective:
    return own_method(config.objective).facts
  if config.objective not in FACTS:
    near = nearest(config.objective, FACTS) or hint(config.objective)
    raise ValueError(f"config.objective={config.objective!r}; expected one of {', '.join(FACTS)}{near}.")
  return FACTS[config.objective]


# What the fields of a user's own facts may be; sections are those of FACTS.
_VALUES = {
  "data": ("pair", "liked", "image", "prompt"),
  "online": (False, True),
  "scorer": (False, True),
  "trains": ("denoiser", "scorer", "latent_scorer"),
  "losses": ("", "denoised", "pair"),
  "section": ("", *dict.fromkeys(of.section for of in FACTS.values() if of.section)),
}


def own_method(objective: str) -> Any:
  """Returns the `Method` that package.module:NAME names.

  Raises:
    OwnCodeError: there is none, or its facts or functions are invalid.
  """
  found, given = load_named(objective, "config.objective", "NAME"), f"config.objective={objective}"
  if not isinstance(getattr(found, "facts", None), Facts):
    raise OwnCodeError(f"{given}: it is of type {type(found).__name__}; expected a jaxpref.objectives.catalog.Method.")
  for field, values in _VALUES.items():
    if (value := getattr(found.facts, field)) not in values:
      choices = ", ".join(map(repr, values))
      near = nearest(value, map(str, values))
      raise OwnCodeError(f"{given}: its Facts have {field}={value!r}; expected one of {choices}{near}.")
  online, data = found.facts.online, found.facts.data
  if online != (data == "prompt"):
    expected = "data='prompt' and online=True together, as an online method draws for prompts, or neither"
    raise OwnCodeError(f"{given}: its Facts have data={data!r} and online={online}; expected {expected}.")
  return found
