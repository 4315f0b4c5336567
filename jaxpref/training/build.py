"""Builds what the training loop needs from a config: models, parameters, data and the objective.

There is one function per family of objectives. Only this module, `networks.py` and `inputs.py` read the config's fields
for it.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import config as config_lib
from jaxpref.config import FLOW_TIMES, AnyConfig, Config, Timesteps
from jaxpref.data import emoji, pipeline
from jaxpref.diffusion import RectifiedFlow, TrainingTimes
from jaxpref.evaluation import judging
from jaxpref.files import adapters, latent_rewards, loading, pipelines
from jaxpref.files import family as families
from jaxpref.models import presets
from jaxpref.models.base import Model
from jaxpref.models.preference import Judge
from jaxpref.models.vae import AutoencoderKL
from jaxpref.objectives import base, catalog, pretraining
from jaxpref.recipes.sizes import sides
from jaxpref.rewards import terms
from jaxpref.rewards.base import Weighted
from jaxpref.rewards.latent import LatentReward
from jaxpref.rewards.loading import (
  is_latent_reward,
  load_judge,
  load_latent_reward,
  load_scorer,
  look_for_judge,
  look_for_latent_reward,
  look_for_scorer,
  look_for_text_projection,
  save_judge,
  save_latent_reward,
  save_preference_model,
  with_text_projection,
)
from jaxpref.training import inputs, networks


@dataclasses.dataclass
class Experiment:
  """What `loop.run` needs to know of an objective.

  Attributes:
    params: trained parameters by component.
    frozen: all other parameters by component; never donated, checkpointed or optimised.
    batches: opens the data: an iterator with get_state, set_state.
    export: writes the trained model: (params on the host, folder).
    objective: the method.
    has_reference: whether a reference model is kept; not for losses without one.
    read_base: reads the values of params that training started from again; None for objectives without a base model.
    images_per_step: images, pairs, or generated images in one step.
    evaluable: whether the result is a text-to-image model to compare with its starting point.
    model: the text-to-image model, if there is one.
    tokenize: captions -> i32[n, L].
    judge, judge_params: for the evaluation only.
    reward: reward of an online objective.
    captions: the prompts of records of `batches`, for rewards on the host.
    held_out: opens the data that measures a preference model, like `batches`.
    report: for pre-training objectives: trained params on the host -> numbers on held-out data.
    trains: the method that a preference model is made for, "SPO" or "LPO"; "" for other models.
  """

  params: Any
  frozen: Any
  batches: Callable[[], Any]
  export: Callable[[Any, pathlib.Path], Any]
  objective: base.Objective
  has_reference: bool = False
  read_base: Callable[[], Any] | None = None
  images_per_step: int = 0
  evaluable: bool = False
  model: Model | None = None
  tokenize: Callable[[list[str]], np.ndarray] | None = None
  judge: Judge | None = None
  judge_params: Any = None
  reward: Weighted | None = None
  captions: Callable[[], list[str]] = lambda: []
  held_out: Callable[[], Any] | None = None
  report: Callable[[Any], dict[str, Any]] = lambda params: {}
  trains: str = ""


def look_for(config: Config) -> None:
  """Checks that everything a config names by path or hub name exists, without reading weights; fetches hub models.

  Raises:
    FileNotFoundError, ValueError, OSError: what is missing, in the sentence of the function that would load it.
  """
  catalog.try_losses(config)
  inputs.look_for(config)
  facts = catalog.method(config).facts
  if facts.trains not in ("clip", "judge"):  # they start from scratch
    loras = [own.path] if (own := networks.config_lora(config)) else []
    name, of = loading.model_name(config), families.get(config.family)
    families.look_for(of, name, vae_model=config.vae_model, loras=loras)
  if facts.trains == "scorer":
    assert config.preference_model is not None  # by config.check
    look_for_scorer(config.preference_model)
  elif facts.trains == "latent_scorer" and (start := config.preference_model):
    if is_latent_reward(start):
      look_for_latent_reward(start)
    else:
      look_for_text_projection(start)
  elif facts.trains == "denoiser":
    look_for_judge(config.judge, style=config.data.preferred_style)
    if facts.scorer:
      terms.check(config)


def build(config: AnyConfig, sharding: pipelines.Sharding = None, *, batch_devices: int = 1) -> Experiment:
  """Returns the experiment that a config describes; loads models and opens the data, compiles nothing.

  Args:
    sharding: where the parameters of models go as they are read; see `pipelines.load_pipeline`.
    batch_devices: number of devices that the rows of a batch are spread over.

  Raises:
    ValueError, FileNotFoundError: one sentence on what is missing or does not fit.
  """
  config = config_lib.typed(config)
  from_nothing = {"vae": _autoencode, "clip": _contrastive, "judge": _classify}
  check_image_size(config)
  trains = catalog.method(config).facts.trains
  if trains in from_nothing:
    return from_nothing[trains](config)
  vae_slicing = config.vae_slicing * batch_devices or None
  if trains == "scorer":
    return _preference_model(config, sharding, vae_slicing, batch_devices)
  if trains == "latent_scorer":
    return _latent_reward_model(config, sharding, vae_slicing, batch_devices)
  return _text_to_image(config, sharding, vae_slicing)


def at_size(config: Config, model: Model) -> Model:
  """Returns the model at `config.image_size`, if that is set.

  Raises:
    ValueError: the model cannot draw images of this size.
  """
  if config.image_size is None:
    return model
  try:
    height, width = sides(config.image_size)
    model.latent_shape_for(height, width)
  except ValueError as error:
    raise ValueError(f"config.image_size={config.image_size}: {error}") from error
  if not hasattr(model, "at_size"):
    expected = f"None, as the models of config.family={config.family!r} have no at_size (docs/extending.md)"
    raise ValueError(f"config.image_size={config.image_size}; expected {expected}.")
  return model.at_size(height, width)


def with_times(config: Config, model: Model) -> Model:
  """Returns the model whose process has the training times of `config.timesteps`, if they are those of a flow.

  Raises:
    ValueError: the model is no flow.
  """
  training = config.timesteps.of_flow()
  if training is None:
    return model
  flow: Any = model
  process = model.process
  if not isinstance(process, RectifiedFlow):
    usual = Timesteps()
    field = next(name for name in FLOW_TIMES if training[name] != getattr(usual, name))
    expected = f"{getattr(usual, field)!r}, as the models of config.family={config.family!r} are no rectified flow"
    raise ValueError(f"config.timesteps.{field}={training[field]!r}; expected {expected}.")
  return dataclasses.replace(flow, process=dataclasses.replace(process, training=TrainingTimes(**training)))


def check_image_size(config: Config) -> None:
  """Raises what `at_size` would raise, before any weights are read."""
  if config.image_size is not None:
    pipe = networks.load(config, None, components=())
    with families.opened(config.family):
      model = families.get(config.family).model(pipe)
    at_size(config, model)


def _check_decode_size(config: Config, model: Model) -> None:
  """Raises for sizes at which the objective's predictions cannot be decoded."""
  section = catalog.method(config).options
  size = None if section is None else getattr(getattr(config, section), "decode_size", None)
  if size is None:
    return
  shorter, longer = sorted(sides(model.image_size))
  unit = model.unit * shorter // math.gcd(shorter, longer)  # makes the longer side a multiple of model.unit too
  if size % unit or not 0 <= size <= shorter:
    raise ValueError(
      f"config.{section}.decode_size={size}; expected 0 (the images' own size) or a multiple of {unit} up to "
      f"{shorter}, the pixels of {config.model}'s images."
    )


# ---- Text-to-image: methods that train a denoiser --------------------------------------------------------------


def _text_to_image(config: Config, sharding: pipelines.Sharding, vae_slicing: int | None) -> Experiment:
  of, method, components = families.get(config.family), catalog.method(config), networks.trained_components(config)
  adapter_name = f"{of.denoiser}_lora"
  pipe, text = networks.load_to_train(config, sharding)
  frozen = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  adapter, scale = networks.initial_adapter(config, pipe), 1.0
  params = {name: frozen[name] for name in components}
  if adapter is not None:
    scale = networks.adapter_scale(config, adapters.adapter_rank(adapter))
    params = {adapter_name: adapter}
    if config.lora.init_from:  # training then does not start from the model without an adapter
      frozen[adapter_name] = adapter
  # What the functions below refer to stays in memory, so not the parameters that training replaces.
  pipe = dataclasses.replace(pipe, params={k: v for k, v in pipe.params.items() if k not in components})
  with families.opened(config.family):
    model = of.model(pipe, remat=config.remat, lora_scale=scale, vae_slicing=vae_slicing)
  model = with_times(config, at_size(config, model))
  _check_steps(config, model)
  _check_decode_size(config, model)
  num_classes = max(emoji.num_classes(config.data.subset), config.evaluation.candidates)
  judge, judge_params = load_judge(config.judge, style=config.data.preferred_style, num_classes=num_classes)
  if config.reference.mode == "frozen":  # Only a moving reference needs the pre-trained weights as well.
    frozen = {k: v for k, v in frozen.items() if k not in params}
  del adapter

  def read_base() -> Any:
    if components:
      return networks.load(config, sharding, trained=components, components=components).params
    return {adapter_name: networks.initial_adapter(config, pipe)}

  reward = None
  if method.facts.scorer:
    reward, params_of_rewards = _rewards(config, sharding, model, tokens=frozen["empty_ids"].shape[1])
    frozen |= params_of_rewards
  objective = catalog.make(config, model, reward)
  _check_reference(config, objective)
  if method.facts.online:
    batches = lambda: inputs.prompt_batches(config, pipe.tokenize, reward.tokenizers if reward else {})
  else:
    batches = lambda: inputs.offline_batches(config, model.image_size, pipe.tokenize)
  return Experiment(
    params=params,
    frozen=frozen,
    objective=objective,
    batches=batches,
    export=functools.partial(_export, config, pipe, scale, text),
    has_reference=method.reference(config),
    read_base=read_base if method.facts.aligns else None,
    images_per_step=config.batch_size * method.images(config),
    evaluable=True,
    model=model,
    tokenize=pipe.tokenize,
    judge=judge,
    judge_params=judge_params,
    reward=reward,
    captions=lambda: inputs.prompts(config),
  )


def _rewards(
  config: Config, sharding: pipelines.Sharding, model: Model, *, tokens: int
) -> tuple[Weighted, dict[str, Any]]:
  """Returns `terms.load`; raises for latent reward models made for another model, judged by its prompts' `tokens`."""
  reward, params = terms.load(config, sharding)
  for of_it, _ in reward.graph:
    if isinstance(of_it, LatentReward):
      name = f"of config.reward={config.reward}"
      of_it.scorer.config.check_fits(name, channels=model.latent_shape[-1], tokens=tokens)
  return reward, params


def _check_steps(config: Config, model: Model) -> None:
  """Raises for more sampling steps than the model's process has."""
  section, total = catalog.method(config).options, model.process.num_train_timesteps
  for name in ("evaluation", section) if section else ("evaluation",):
    count = getattr(config, name).num_inference_steps
    if count > total:
      raise ValueError(f"config.{name}.num_inference_steps={count}; expected at most {total}, as {config.model} has.")
    if name != section:
      continue
    try:
      model.process.grid(count, density=True)  # those methods learn from it
    except ValueError as error:
      raise ValueError(f"config.{name}.num_inference_steps={count}: {error}") from error


def _check_reference(config: Config, objective: base.Objective) -> None:
  """Raises for a moving reference of a user's own method without one; config.check knows the other methods."""
  if config.reference.mode == "frozen" or ":" not in config.objective:
    return
  divergence = getattr(type(objective), "divergence", None)
  if not catalog.method(config).reference(config) or divergence in (None, base.Offline.divergence):
    what = f"{config.objective} has no reference, or no divergence of it"
    raise ValueError(f"config.reference.mode='update'; expected 'frozen', as {what}.")


def _export(config: Config, pipe: Any, scale: float, text: dict[str, Any], params: Any, folder: pathlib.Path) -> None:
  """Writes the folder of a trained model.

  Args:
    pipe: a pipeline without the parameters that were trained.
    scale: alpha / rank of the adapter.
    text: see `networks.text_adapters`.
    params: trained parameters, on the host.
  """
  of = families.get(config.family)
  if config.dtype != "float32" or networks.needed(config) != of.networks or jax.process_count() > 1:
    # Untrained weights are written as they were read, not rounded to bfloat16. Only process 0 exports, and it cannot
    # compute on arrays sharded across processes.
    with families.opened(config.family):
      pipe = of.load(
        loading.model_name(config),
        dtype=config.dtype,
        seed=config.seed,
        param_dtype="float32" if config.dtype == "float32" else "float16",
        vae_model=config.vae_model,
        components=[name for name in of.networks if name not in params],
      )
    pipe = families.with_text_adapters(pipe, text)
  name, size = loading.model_name(config), config.image_size
  with families.saving(config.family):
    families.save_trained(
      of, folder, pipe, params, scale=scale, name=name, dtype=jnp.float16, image_size=size, text=text
    )


# ---- Preference model ------------------------------------------------------------------------------------------


def _preference_model(
  config: Config, sharding: pipelines.Sharding, vae_slicing: int | None, batch_devices: int
) -> Experiment:
  pipe = networks.load(config, sharding)
  with families.opened(config.family):
    model = families.get(config.family).model(pipe, vae_slicing=vae_slicing)
  model, tokenize = at_size(config, model), pipe.tokenize
  _check_decode_size(config, model)
  assert config.preference_model is not None  # by config.check
  scorer, params = load_scorer(config.preference_model, dtype=config.dtype, seed=config.seed, sharding=sharding)
  return Experiment(
    params={"spm": params},
    frozen=dict(pipe.params) | {"empty_ids": tokenize([""])},
    objective=catalog.make(config, model, scorer),
    batches=lambda: inputs.pair_batches(config, model.image_size, tokenize),
    export=lambda params, folder: save_preference_model(folder, scorer, params["spm"], dtype=jnp.float16),
    images_per_step=config.batch_size * catalog.method(config).images(config),
    held_out=_held_out(config, model, tokenize, batch_devices),
    trains="SPO",
  )


def _held_out(config: Config, model: Model, tokenize: Any, batch_devices: int) -> Callable[[], Any] | None:
  """Opens the pairs that measure a preference model; None if it is not measured.

  Raises:
    ValueError, FileNotFoundError: there are no such pairs.
  """
  if not config.evaluation.num_prompts:
    return None
  changes = {"split": "validation", "ties": "drop", "flip_labels": 0.0, "caption_dropout": 0.0}
  if config.data.scores and not config.data.validation_share:  # the scores belong to the other split
    changes |= {"scores": None, "labels": "given", "min_gap": 0.0}
  held_out = config_lib.replace(config, {f"data.{name}": value for name, value in changes.items()})
  # Raises for missing data now, not after training.
  if config.data.source not in ("emoji", "tfds") and not config.data.validation_share:
    raise ValueError(
      f"{config.data.path} has no validation split to measure the preference model on; hold out a share of its "
      "prompts with config.data.validation_share, or measure nothing: config.evaluation.num_prompts=0."
    )
  number = len(inputs.pairs_source(held_out))
  if not number and config.data.validation_share:
    raise ValueError(
      f"config.data.validation_share={config.data.validation_share} holds out no pair of {config.data.path} to measure "
      "the preference model on; set a larger share, or measure nothing: config.evaluation.num_prompts=0."
    )
  size = min(config.batch_size, max(number // batch_devices * batch_devices, batch_devices))
  held_out = config_lib.replace(held_out, {"batch_size": size})
  inputs.pair_batches(held_out, model.image_size, tokenize).close()
  return lambda: inputs.pair_batches(held_out, model.image_size, tokenize)


# ---- Latent reward model ---------------------------------------------------------------------------------------


def _latent_reward_model(
  config: Config, sharding: pipelines.Sharding, vae_slicing: int | None, batch_devices: int
) -> Experiment:
  """Starts from the text-to-image model, or `config.preference_model`: another model, or a CLIP's text projection."""
  of, start = families.get(config.family), config.preference_model
  if config.data.source == "precomputed":
    inputs.open_precomputed(config)
  continued = start is not None and start != "" and is_latent_reward(start)
  trained = () if continued else latent_rewards.NETWORKS
  # With precomputed data it needs no VAE.
  others = [] if config.data.source == "precomputed" else [n for n in of.networks if n not in latent_rewards.NETWORKS]
  pipe = networks.load(config, sharding, trained=trained, components=[n for n in of.networks if n in trained] + others)
  with families.opened(config.family):
    model = of.model(pipe, vae_slicing=vae_slicing)
  model, tokenize = at_size(config, model), pipe.tokenize
  remat = tuple(level.strip() for level in config.remat.split(","))
  of_levels = remat[0] if len(remat) == 1 else remat
  if start and continued:
    scorer, params = load_latent_reward(start, dtype=config.dtype, seed=config.seed, sharding=sharding)
    if (own := scorer.config.guidance_scale) != config.lrm.guidance_scale:
      raise ValueError(
        f"config.lrm.guidance_scale={config.lrm.guidance_scale}, but the latent reward model {start} has {own}; "
        f"expected the same, so set it to {own}."
      )
    scorer = scorer.clone(remat=of_levels)
    scorer.config.check_fits(str(start), channels=model.latent_shape[-1], tokens=tokenize([""]).shape[1])
  else:
    scorer, params = latent_rewards.of_pipeline(
      pipe,
      jax.random.key(config.seed),
      image_size=model.image_size,
      guidance_scale=config.lrm.guidance_scale,
      remat=of_levels,
    )
    if start:
      params = with_text_projection(params, start)
  return Experiment(
    params={"lrm": params},
    frozen={name: pipe.params[name] for name in others} | {"empty_ids": tokenize([""])},
    objective=catalog.make(config, model, scorer),
    batches=lambda: inputs.offline_batches(config, model.image_size, tokenize),
    export=lambda params, folder: save_latent_reward(folder, scorer, params["lrm"], dtype=jnp.float16),
    images_per_step=config.batch_size * catalog.method(config).images(config),
    held_out=_held_out(config, model, tokenize, batch_devices),
    model=model,
    trains="LPO",
  )


# ---- Pre-training ----------------------------------------------------------------------------------------------


def _autoencode(config: Config) -> Experiment:
  pipe = loading.load_text_to_image(config.model, dtype=config.dtype, seed=config.seed)
  size = at_size(config, loading.text_to_image(pipe)).image_size

  def export(params: Any, folder: pathlib.Path) -> None:
    """Writes the VAE with the scaling factor that gives the training images' latents unit variance."""
    images = np.stack([r["image"] for r in pipeline.emoji_images(size, subset=config.data.subset, split=None)])
    encode = jax.jit(lambda x: pipe.vae.apply({"params": params["vae"]}, x, method="encode")[0])
    latents = np.concatenate([encode(np.float32(images[i : i + 64]) / 127.5 - 1) for i in range(0, len(images), 64)])
    vae = AutoencoderKL(
      dataclasses.replace(pipe.vae.config, scaling_factor=round(float(1 / latents.std()), 5)), pipe.vae.dtype
    )
    result = dataclasses.replace(pipe, vae=vae, params=dict(pipe.params) | params)
    if config.image_size is not None:
      result = result.at_size(*sides(size))
    pipelines.save_pipeline(folder, result, dtype=jnp.float32)

  return Experiment(
    params={"vae": pipe.params["vae"]},
    frozen={},
    objective=pretraining.Autoencoding(pipe.vae, **config.vae.to_dict()),
    batches=lambda: inputs.image_batches(config, size, None),
    export=export,
    images_per_step=config.batch_size,
  )


def _contrastive(config: Config) -> Experiment:
  clip = presets.make_clip(presets.get_preset("tiny-sd"))
  return Experiment(
    params={"clip": presets.init_params(clip, jax.random.key(config.seed))},
    frozen={},
    objective=pretraining.Contrastive(clip),
    batches=lambda: inputs.image_batches(config, clip.config.vision_config.image_size, loading.tiny_tokenize),
    export=lambda params, folder: save_preference_model(folder, clip, params["clip"], dtype=jnp.float16),
    images_per_step=config.batch_size,
  )


def _classify(config: Config) -> Experiment:
  """Trains the judge: captions of all core emoji, but only styles of the training split's emoji."""
  preset = presets.get_preset("tiny-sd").judge
  assert preset is not None
  judge = Judge(preset)
  taught = {e.class_id for e in emoji.load_index("all", "train")}
  images = pipeline.emoji_images(preset.image_size, subset=config.data.subset, split=None)
  source = [r if r["class_id"] in taught else r | {"style": pretraining.NOT_TAUGHT} for r in images]
  source = [r for r in source if r["style"] != pretraining.NOT_TAUGHT or r["class_id"] < preset.num_classes]
  unseen = [r for r in images if r["class_id"] not in taught and r["class_id"] < preset.num_classes]

  def report(params: Any) -> dict[str, Any]:
    """Returns how many tiles of each untaught style get the right name, by style."""
    x = np.stack([r["image"] for r in unseen])
    log_probs, _ = judging.judge_images(judge, params["judge"], x)
    return judging.style_accuracy(log_probs, np.array([r["style"] for r in unseen]), preset.styles)

  return Experiment(
    params={"judge": presets.init_params(judge, jax.random.key(config.seed))},
    frozen={},
    objective=pretraining.Classification(judge),
    batches=lambda: inputs.image_batches(config, preset.image_size, None, source=source),
    export=lambda params, folder: save_judge(folder, judge, params["judge"], dtype=jnp.float16),
    images_per_step=config.batch_size,
    report=report,
  )
