"""Opens the batches that a config trains on: sources, the records chosen from them, and precomputed data."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpref
from jaxpref import config as config_lib
from jaxpref.config import Config
from jaxpref.data import batching, emoji, latents, paths, pipeline, sources
from jaxpref.data import index as index_lib
from jaxpref.devices import sharding
from jaxpref.files import family as families
from jaxpref.files import loading, tensors
from jaxpref.models.base import Model
from jaxpref.objectives import catalog
from jaxpref.recipes import places
from jaxpref.recipes.sizes import Size, in_words, sides

logger = logging.getLogger(__name__)


def selection(config: Config, index: index_lib.Index, *, part: str) -> index_lib.Selection:
  """Returns the records of a source that the config uses, as `index.select` chooses them."""
  d = config.data
  return index_lib.select(
    index,
    ties=d.ties,
    max_per_prompt=d.max_per_prompt,
    keep_best=d.keep_best,
    min_gap=d.min_gap,
    only_labelled=d.only_labelled,
    flip_labels=d.flip_labels,
    validation_share=d.validation_share,
    part=part,
    seed=config.seed,
  )


def open_pairs(config: Config) -> Any:
  """Returns the source of preference pairs of `config.data`, all of it, with its `index`.

  The share of the training split's prompts that is held out is its validation split.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
  """
  d = config.data
  split = "train" if d.validation_share and d.split == "validation" else d.split
  if d.source == "emoji":
    from jaxpref.data import emoji_pairs

    splits = emoji_pairs.prepare(preferred_style=d.preferred_style, subset=d.subset)
    if split not in splits:
      raise ValueError(f"config.data.split={d.split!r}; expected one of {', '.join(splits)} for pairs.")
    return sources.Indexed(splits[split], sources.index_of_records(splits[split]))
  assert d.path is not None  # by config.check
  if d.source != "tfds":
    _check_split(config)
  return sources.open_source(d.source, d.path, split=split, images=d.images, pairs=d.ranking_pairs)


def _check_split(config: Config) -> None:
  """Raises if the file does not have the requested split."""
  d = config.data
  if d.split != "train" and not (d.split == "validation" and d.validation_share):
    raise ValueError(
      f"config.data.split={d.split!r}: {d.path} has no splits; hold out a share of its prompts with "
      "config.data.validation_share."
    )


def pairs_source(config: Config) -> sources.Selected:
  """Returns the preference pairs of `config.data.split` that are used, with labels and weights, without ties.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
  """
  d = config.data
  source = open_pairs(config)
  words = source.index.caption_words
  if words is not None and not words.all():
    logger.warning("%d of %d pairs have no caption and are left out", np.sum(words == 0), len(words))
  if d.scores:
    fingerprint = sources.content_fingerprint(source)
    scored = index_lib.load(d.scores, num_records=len(source), fingerprint=fingerprint)
    if missing := int(np.isnan(scored.scores()).any(0).sum()):
      raise ValueError(
        f"config.data.scores={d.scores}: {missing} of {len(source)} pairs have no scores yet; run the same "
        "python -m jaxpref.score again to finish it."
      )
    source = sources.Indexed(source, scored)
  if d.labels == "scores":
    source = sources.Indexed(source, index_lib.labels_by_score(source.index))
  held_out = bool(d.validation_share) and d.split == "validation"
  return sources.Selected(source, selection(config, source.index, part="validation" if held_out else "train"))


def unpaired_source(config: Config) -> Any:
  """Returns images that are liked or not: those of an unpaired source, or of the pairs that are used.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
  """
  if config.data.source != "unpaired_file":
    return sources.unpaired(pairs_source(config))
  _check_split(config)
  assert config.data.path is not None  # by config.check
  source = sources.open_source("unpaired_file", config.data.path)
  held_out = index_lib.in_validation(source.index.prompt, config.data.validation_share)
  kept = np.flatnonzero(held_out if config.data.split == "validation" else ~held_out)
  return sources.Selected(source, index_lib.Selection(kept, source.index.label_0[kept], np.ones(len(kept)), kept))


# ---- Batches ---------------------------------------------------------------------------------------------------


def _split(config: Config) -> str | None:
  return None if config.data.split == "all" else config.data.split


def _shared_data_arguments(config: Config) -> dict[str, Any]:
  # A single process may plan for a mesh of absent devices.
  index, count = (
    (0, 1) if jax.process_count() == 1 else sharding.batch_part(sharding.make_mesh(**config.mesh.to_dict()))
  )
  return {
    "batch_size": config.batch_size,
    "seed": config.seed,
    "process_index": index,
    "process_count": count,
    "num_threads": config.data.num_threads,
  }


def pair_batches(
  config: Config, image_size: Size, tokenize: Callable[[list[str]], np.ndarray], **processes: int
) -> batching.Batches:
  """Returns the pairs of `pairs_source`; `processes` may set another process_index and process_count than the run's."""
  return pipeline.pair_batches(
    pairs_source(config),
    image_size=image_size,
    tokenize=tokenize,
    caption_dropout=config.data.caption_dropout,
    flip=config.data.flip,
    random_crop=config.data.random_crop,
    num_workers=config.data.num_workers,
    **(_shared_data_arguments(config) | processes),
  )


def image_batches(
  config: Config, image_size: Size, tokenize: Callable[[list[str]], np.ndarray] | None, source: Any = None
) -> batching.Batches:
  """Returns images of a source, or of the embedded emoji."""
  return pipeline.image_batches(
    source,
    image_size=image_size,
    tokenize=tokenize,
    subset=config.data.subset,
    split=_split(config),
    caption_dropout=config.data.caption_dropout,
    flip=config.data.flip,
    random_crop=config.data.random_crop,
    num_workers=config.data.num_workers,
    **_shared_data_arguments(config),
  )


def prompts(config: Config) -> list[str]:
  """Returns what an online objective draws pictures of: prompts of `config.data.split`, the emoji's or a file's.

  Raises:
    ValueError: the file does not have the requested split.
  """
  d = config.data
  if d.source != "prompts":
    return emoji.prompts(_split(config), d.subset)
  _check_split(config)
  assert d.path is not None  # by config.check
  found = sources.read_prompts(d.path)
  held_out = index_lib.in_validation(index_lib.prompt_ids(found), d.validation_share)
  return [p for p, out in zip(found, held_out, strict=True) if out == (d.split == "validation")]


def prompt_batches(
  config: Config, tokenize: batching.Tokenize, tokenizers: Mapping[str, batching.Tokenize] | None = None
) -> batching.Batches:
  """Returns batches of `prompts`, with the tokens of the model, and those of rewards by field.

  Raises:
    ValueError: the file does not have the requested split, or has fewer prompts than a batch.
  """
  return pipeline.prompt_batches(
    prompts(config), tokenize=tokenize, tokenizers=tokenizers, **_shared_data_arguments(config)
  )


def offline_batches(config: Config, image_size: Size, tokenize: Callable[[list[str]], np.ndarray]) -> batching.Batches:
  """Returns the data of an objective that trains on images or pairs."""
  if config.data.source == "precomputed":
    return _precomputed_batches(config, image_size)
  data = catalog.method(config).facts.data
  if data == "image":
    return image_batches(config, image_size, tokenize)
  if data == "liked":
    return image_batches(config, image_size, tokenize, unpaired_source(config))
  return pair_batches(config, image_size, tokenize)


# ---- Precomputed -----------------------------------------------------------------------------------------------

# Data that can be precomputed, for methods that train on latents alone.
_KINDS = {"pair": "pairs", "liked": "liked and other images", "image": "images"}


def precomputable(objective_facts: config_lib.Facts) -> str | None:
  """Returns what a method's precomputed data are; None: it needs the VAE while it trains."""
  return _KINDS.get(objective_facts.data) if objective_facts.of_latents else None


# Fields of config.data that do not change the frozen networks' output: training applies them.
_OF_TRAINING = ("caption_dropout", "num_threads", "num_workers")


def look_for(config: Config, *, scores: bool = True) -> None:
  """Checks that the data and prompts that a config names by paths exist, before anything else is loaded.

  Args:
    scores: whether config.data.scores must exist; `jaxpref.score` makes it.

  Raises:
    FileNotFoundError, ValueError, OSError: something does not exist, cannot be reached, or needs a missing package; in
      the words of what reads it.
  """
  d = config.data
  for place in (d.path, d.images, d.scores, config.evaluation.prompts):
    if place and paths.is_remote(place):
      paths.open_path(place)
  if d.path and d.source == "precomputed":
    latents.open_folder(d.path)
  elif d.path and d.source in sources.KINDS:
    sources.look_for(d.source, d.path, images=d.images if d.source == "rankings" else None)
  pairs = catalog.method(config).facts.data in ("pair", "liked") and d.source in ("emoji", *sources.PAIR_KINDS)
  if d.scores and scores and pairs:
    paths.open_path(d.scores).stat()


# Fields of the frozen networks that folders leave out where they have their defaults, as older folders do.
_LATER = ("family", "max_sequence_length", "drop_t5")


def precomputed_fields(config: Config, *, all_fields: bool = False) -> dict[str, Any]:
  """Returns the fields that decide the frozen networks' output, as JSON values by dotted name.

  Args:
    all_fields: also those that a folder leaves out.
  """
  fields = {name: getattr(config, name) for name in ("model", "model_config", "vae_model", "dtype", "seed")}
  usual = Config()
  later = {name: getattr(config, name) for name in _LATER}
  fields |= {name: value for name, value in later.items() if all_fields or value != getattr(usual, name)}
  fields |= {f"data.{k}": v for k, v in config.data.to_dict().items() if k not in _OF_TRAINING}
  return json.loads(json.dumps(fields))


def data_fingerprint(config: Config) -> str:
  """Returns the fingerprint of the records that `offline_batches` reads; for the embedded ones their version."""
  data = catalog.method(config).facts.data
  if data == "image":
    return f"jaxpref {jaxpref.__version__}"
  return sources.content_fingerprint(unpaired_source(config) if data == "liked" else pairs_source(config))


def encoder_fingerprints(config: Config) -> dict[str, str]:
  """Returns fingerprints of the precomputing networks' weights, by component; none for random weights."""
  of = families.get(config.family)
  with families.opened(config.family):
    name = loading.with_config(config.model, config.model_config)
    files = dict(of.weight_files(loading.with_t5(name, drop=config.drop_t5)))
  files.pop(of.denoiser, None)
  if config.vae_model:
    files["vae"] = loading.vae_files(config.vae_model)
  return {name: tensors.fingerprint(of_network) for name, of_network in files.items()}


def open_precomputed(config: Config) -> latents.Precomputed:
  """Returns the folder of a config with data.source="precomputed".

  Raises:
    FileNotFoundError, ValueError: it does not exist, is incomplete, or was made for another model or other data.
  """
  assert config.data.path is not None  # by config.check
  data = latents.open_folder(config.data.path)
  kind = precomputable(config_lib.facts(config))
  if data.manifest["kind"] != kind:
    raise ValueError(
      f"{data.folder} holds {data.manifest['kind']}, expected {kind} for config.objective={config.objective!r}; give a "
      "folder that was precomputed for it."
    )
  made, now = data.manifest["config"], precomputed_fields(config, all_fields=True)
  defaults = precomputed_fields(Config(), all_fields=True)  # defaults of fields that are newer than the folder
  # Float32 and bfloat16 only differ by rounding. A published model does not depend on the seed, nor does the choice of
  # all pairs with their own labels. A folder that was made with flip has the images and the mirrored ones.
  ignored = ["data.source", "data.path", "data.images", "data.scores", "dtype"]
  random = any(config.model.startswith(f"{kind}:") for kind in loading.KINDS)
  drawn = random or config.data.flip_labels or config.data.max_per_prompt
  ignored += [] if drawn else ["seed"]
  ignored += ["data.flip"] if made["data.flip"] else []
  for field, value in now.items():
    found = made.get(field, defaults[field])
    if field not in ignored and not places.same(found, value):
      raise ValueError(
        f"{data.folder} was precomputed with config.{field}={found!r}, expected {value!r} as in this config; "
        "change the config, or run python -m jaxpref.precompute with it."
      )
  weights_made = data.manifest.get("weights", {})
  for name, found in (encoder_fingerprints(config) if weights_made else {}).items():
    if weights_made.get(name) != found:
      raise ValueError(
        f"{data.folder} was precomputed with other weights of the {name} than config.model={config.model!r} and "
        f"config.vae_model={config.vae_model!r} have now; put the old ones back, or run python -m jaxpref.precompute "
        "into another folder."
      )
  return data


def _precomputed_batches(config: Config, image_size: Size) -> batching.Batches:
  data = open_precomputed(config)
  size = data.manifest["image_size"]
  if sides(size) != sides(image_size):
    raise ValueError(
      f"{data.folder} is of images of {in_words(size)} pixels, {config.model} wants {in_words(image_size)}; set "
      "config.image_size to that, or make it again."
    )
  return latents.batches(
    data,
    caption_dropout=config.data.caption_dropout,
    flip=config.data.flip,
    tokens=config_lib.facts(config).encodes_text,
    num_workers=config.data.num_workers,
    **_shared_data_arguments(config),
  )


def stored_moments(model: Model, params: Any, images: jax.Array) -> jax.Array:
  """Returns f16[B, h, w, 2C], the moments of images u8[B, H, W, 3] as they are stored."""
  return jnp.concatenate(model.encode_moments(params, images), axis=-1).astype(latents.DTYPE)


def stored_text(model: Model, params: Any, input_ids: jax.Array) -> dict[str, jax.Array]:
  """Returns `Model.stored_text` of prompts i32[B, L] as they are stored.

  Fields are f16[B, ...], unless the model has `stored_dtypes`, other types by field: T5's tokens are bf16.
  """
  fields = model.stored_text(model.encode_text(params, input_ids))
  dtypes = getattr(model, "stored_dtypes", {})
  return {name: x.astype(dtypes.get(name, latents.DTYPE)) for name, x in fields.items()}
