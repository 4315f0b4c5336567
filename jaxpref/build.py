"""From a config to what the training loop needs: models, parameters, data and the objective.

One function an objective family; with `train.py` the only place that reads the config's fields.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict as Config

from jaxpref import config as config_lib
from jaxpref import inputs, lora_files, metrics, objectives, pretraining, step, tensor_files, weights
from jaxpref import sharding as sharding_lib
from jaxpref.data import emoji, latents, pipeline, sources
from jaxpref.models import lora, presets
from jaxpref.models.preference import Judge, StepAwareCLIPModel
from jaxpref.models.text_to_image import TextToImage
from jaxpref.models.unet import UNetConfig
from jaxpref.models.vae import AutoencoderKL


@dataclasses.dataclass
class Experiment:
  """What `train.run` needs to know of an objective.

  Attributes:
    params: trained parameters by component.
    frozen: all other parameters by component; never donated, checkpointed or optimised.
    batches: opens the data: an iterator with get_state, set_state.
    export: writes the trained model: (params on the host, folder).
    objective: of offline objectives.
    online_step: builds the step of online ones: (optimizer, and keyword arguments of its function in `step`) -> step.
    divergence: gates the reference of an online objective.
    init_params: the pre-trained values of params, from frozen (for the reference).
    has_reference: whether a reference model is kept.
    images_per_step: images, or pairs, or generated images of one step.
    evaluable: whether the result is a text-to-image model to be compared with the one it started from.
    model: the text-to-image model, if there is one.
    tokenize: captions to i32[n, L].
    judge, judge_params: for the evaluation only.
    report: numbers on held-out data for pre-training objectives, from the trained params.
  """

  params: Any
  frozen: Any
  batches: Callable[[], Any]
  export: Callable[[Any, pathlib.Path], Any]
  objective: objectives.Objective | None = None
  online_step: Callable[..., step.StepFn] | None = None
  divergence: objectives.DivergenceFn | None = None
  init_params: Callable[[Any], Any] = lambda frozen: {}
  has_reference: bool = False
  images_per_step: int = 0
  evaluable: bool = False
  model: TextToImage | None = None
  tokenize: Callable[[list[str]], np.ndarray] | None = None
  judge: Judge | None = None
  judge_params: Any = None
  report: Callable[[Any], dict[str, float]] = lambda params: {}


def build(config: Config, sharding: weights.Sharding = None, *, batch_devices: int = 1) -> Experiment:
  """The experiment that a config describes; loads models and opens the data, compiles nothing.

  Args:
    sharding: where the parameters of models go as they are read; see `weights.load_pipeline`.
    batch_devices: devices that the rows of a batch are spread over.

  Raises:
    ValueError, FileNotFoundError: one sentence on what is missing or does not fit.
  """
  pretraining_stages = {"autoencode": _autoencode, "contrastive": _contrastive, "classify": _classify}
  if config.objective in pretraining_stages:
    return pretraining_stages[config.objective](config)
  family = _spm if config.objective == "spm" else _text_to_image
  return family(config, sharding, config.vae_slicing * batch_devices or None)


# ---- Models ----------------------------------------------------------------------------------------------------

_ASSETS = pathlib.Path(__file__).parent / "assets"
SHIPPED = ("tiny-sd", "tiny-clip", "tiny-spm", "tiny-judge")


def folder_of(name: str) -> str | pathlib.Path:
  """The folder of a shipped model, or the name itself: a folder or a hub name."""
  return _ASSETS / name if name in SHIPPED else name


def _preset(name: str) -> presets.Preset | None:
  """Of a name random:PRESET or zeros:PRESET; None for others, which are loaded."""
  kind, colon, preset = name.partition(":")
  return presets.get_preset(preset) if colon and kind in ("random", "zeros") else None


def _initialiser(name: str) -> Callable[[Any, jax.Array], Any]:
  return presets.zero_params if name.startswith("zeros:") else presets.init_params


def load_text_to_image(
  name: str,
  *,
  dtype: str,
  seed: int = 0,
  param_dtype: str | Mapping[str, str] = "float32",
  sharding: weights.Sharding = None,
  vae_model: str | None = None,
  components: Sequence[str] = weights.NETWORKS,
) -> weights.Pipeline:
  """A pipeline by folder, hub name, shipped name, or `random:PRESET`; arguments as of `weights.load_pipeline`.

  Args:
    vae_model: folder or hub name of a VAE that takes the place of the pipeline's.
    components: the networks whose parameters are read.

  Raises:
    ValueError: the VAE's latents are not those of the pipeline.
  """
  param_dtypes = dict.fromkeys(weights.NETWORKS, param_dtype) if isinstance(param_dtype, str) else param_dtype
  if vae_model and "vae" in components:
    others = [c for c in components if c != "vae"]
    pipe = load_text_to_image(
      name, dtype=dtype, seed=seed, param_dtype=param_dtype, sharding=sharding, components=others
    )
    of_vae = (lambda shapes: sharding({"vae": shapes})["vae"]) if callable(sharding) else sharding
    vae, params = weights.load_vae(
      vae_model, dtype=jnp.dtype(dtype), param_dtype=param_dtypes["vae"], sharding=of_vae
    )
    found, expected = ((c.latent_channels, c.downscale, c.scaling_factor) for c in (vae.config, pipe.vae.config))
    if found != expected:
      raise ValueError(
        f"config.vae_model={vae_model}: latent channels, downscaling and scaling factor are {found}, those of {name} "
        f"{expected}; choose a VAE that was made for this model."
      )
    return dataclasses.replace(pipe, vae=vae, params={**pipe.params, "vae": params})
  if _preset(name) is not None:
    preset = name.partition(":")[2]
    pipe = weights.random_pipeline(preset, seed, dtype=jnp.dtype(dtype), init=_initialiser(name))
    chosen = {k: v for k, v in pipe.params.items() if k in components}
    params = {k: jax.tree.map(lambda x, k=k: x.astype(param_dtypes[k]), v) for k, v in chosen.items()}
    if sharding is not None:
      params = jax.device_put(params, sharding(params) if callable(sharding) else sharding)
    return dataclasses.replace(pipe, params=params)
  return weights.load_pipeline(
    folder_of(name), dtype=jnp.dtype(dtype), param_dtype=param_dtypes, sharding=sharding, components=components
  )


def unet_config(name: str) -> UNetConfig:
  """Of a pipeline, without reading its weights; name as for `load_text_to_image`."""
  if (preset := _preset(name)) is not None:
    return preset.unet
  file = weights.resolve_folder(folder_of(name), "*/*.safetensors") / "unet" / "config.json"
  return UNetConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))


def text_to_image(pipe: weights.Pipeline, *, lora_scale: float = 1.0, vae_slicing: int | None = None) -> TextToImage:
  """The pure functions of a loaded pipeline."""
  return TextToImage(
    unet=pipe.unet,
    vae=pipe.vae,
    text_encoder=pipe.text_encoder,
    text_encoder_2=pipe.text_encoder_2,
    schedule=pipe.schedule,
    lora_scale=lora_scale,
    zero_empty_prompt=pipe.force_zeros_for_empty_prompt,
    vae_slicing=vae_slicing,
  )


def _tiny_tokenize(captions: list[str]) -> np.ndarray:
  return weights.tokenize(weights.tiny_tokenizer(), captions, length=presets.TINY_LENGTH)


def load_scorer(
  name: str | None, *, dtype: str, param_dtype: str = "float32", seed: int = 0, sharding: weights.Sharding = None
) -> tuple[StepAwareCLIPModel, Any]:
  """A step-aware preference model by folder, hub name, shipped name, or `random:PRESET`."""
  name = name or "random:tiny-sd"
  if (preset := _preset(name)) is not None:
    module = StepAwareCLIPModel(preset.preference, jnp.dtype(dtype))
    params = _initialiser(name)(module, jax.random.key(seed))
    return module, jax.tree.map(lambda x: x.astype(param_dtype), params)
  return weights.load_preference_model(
    folder_of(name), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), sharding=sharding
  )


def load_tokenizer(*models: str) -> Any:
  """The CLIP tokenizer of the first of some models that has one: a pipeline, or a CLIP with its tokenizer beside it.

  Raises:
    FileNotFoundError: none has.
  """
  for name in models:
    if _preset(name) is not None:
      return weights.tiny_tokenizer()
    folder = weights.resolve_folder(folder_of(name), "tokenizer/*.safetensors")  # no weights
    for place in (folder / "tokenizer", folder):
      with contextlib.suppress(FileNotFoundError):
        return weights.load_tokenizer(place)
  raise FileNotFoundError(f"none of {', '.join(models)} has a CLIP tokenizer; expected vocab.json and merges.txt.")


def load_judge(name: str | None, *, style: str, num_classes: int) -> tuple[Judge | None, Any]:
  """A judge by folder, shipped name, or `random:PRESET`; None, or "" on the command line, for none.

  Raises:
    ValueError: the judge cannot tell the preferred style, or knows fewer than `num_classes` captions.
  """
  if not name:
    return None, None
  if name.startswith("random:"):
    module = Judge(presets.get_preset(name.removeprefix("random:")).judge)
    params = presets.init_params(module, jax.random.key(1))
  else:
    module, params = weights.load_judge(folder_of(name))
  if style not in module.config.styles:
    raise ValueError(
      f"judge {name} knows the styles {', '.join(module.config.styles) or '(none)'}, not "
      f"config.data.preferred_style={style!r}; choose one of them or another judge."
    )
  if num_classes > module.config.num_classes:
    raise ValueError(
      f"judge {name} knows {module.config.num_classes} captions, the data (config.data.subset) or "
      f"config.evaluation.candidates ask for {num_classes}; choose fewer or another judge."
    )
  return module, params


# ---- Data ------------------------------------------------------------------------------------------------------


def _split(config: Config) -> str | None:
  return None if config.data.split == "all" else config.data.split


def _shared_data_arguments(config: Config) -> dict[str, Any]:
  # A single process may look at a mesh of devices that are not there.
  index, count = (0, 1) if jax.process_count() == 1 else sharding_lib.batch_part(sharding_lib.make_mesh(**config.mesh))
  return {
    "batch_size": config.batch_size,
    "seed": config.seed,
    "process_index": index,
    "process_count": count,
    "num_threads": config.data.num_threads,
  }


def _pair_batches(
  config: Config, image_size: int, tokenize: Callable[[list[str]], np.ndarray], **processes: int
) -> pipeline.Batches:
  return pipeline.pair_batches(
    inputs.pairs_source(config),
    image_size=image_size,
    tokenize=tokenize,
    caption_dropout=config.data.caption_dropout,
    flip=config.data.flip,
    random_crop=config.data.random_crop,
    num_workers=config.data.num_workers,
    **(_shared_data_arguments(config) | processes),
  )


def _image_batches(
  config: Config, image_size: int, tokenize: Callable[[list[str]], np.ndarray] | None, source: Any = None
) -> pipeline.Batches:
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


# Objectives whose data the frozen networks can be run over once, and what these data are.
PRECOMPUTABLE = {"dpo": "pairs", "tdpo": "pairs", "kto": "liked and other images", "denoise": "images"}
# Fields of config.data that do not change what the frozen networks make of them: training decides on these.
_OF_TRAINING = ("caption_dropout", "num_threads", "num_workers")


def precomputed_fields(config: Config) -> dict[str, Any]:
  """The fields that decide what the frozen networks make of the data, as JSON values by dotted name."""
  fields = {name: config[name] for name in ("model", "vae_model", "dtype", "seed")}
  fields |= {f"data.{k}": v for k, v in config.data.to_dict().items() if k not in _OF_TRAINING}
  return json.loads(json.dumps(fields))


def encoder_fingerprints(config: Config) -> dict[str, str]:
  """Of the weights whose results are precomputed, by component; none of random ones: their name and seed say it all."""
  files: dict[str, list[pathlib.Path]] = {}
  if _preset(config.model) is None:
    folder = weights.resolve_folder(folder_of(config.model), "*/*.safetensors")
    names = [n for n in weights.NETWORKS if n != "unet" and (folder / n).is_dir()]
    files = {n: tensor_files.weight_files(folder / n) for n in names if n != "vae" or not config.vae_model}
  if config.vae_model:
    folder = weights.resolve_folder(config.vae_model, "diffusion_pytorch_model*.safetensors")
    files["vae"] = tensor_files.weight_files(folder)
  return {name: tensor_files.fingerprint(of_network) for name, of_network in files.items()}


def open_precomputed(config: Config) -> latents.Precomputed:
  """The folder of a config with data.source="precomputed".

  Raises:
    FileNotFoundError, ValueError: it is not there, not complete, or made for another model or other data.
  """
  data = latents.open_folder(config.data.path)
  kind = PRECOMPUTABLE[config.objective]
  if data.manifest["kind"] != kind:
    raise ValueError(
      f"{data.folder} holds {data.manifest['kind']}, expected {kind} for config.objective={config.objective!r}; give a "
      "folder that was precomputed for it."
    )
  made, now = data.manifest["config"], precomputed_fields(config)
  defaults = precomputed_fields(config_lib.default())  # of fields that came after the folder was made
  # Float32 and bfloat16 differ by rounding alone; a published model does not depend on the seed; and a folder that was
  # made with flip has both, the images and the mirrored ones.
  ignored = ["data.source", "data.path", "data.images", "data.scores", "dtype"]
  ignored += ["seed"] if _preset(config.model) is None else []
  ignored += ["data.flip"] if made["data.flip"] else []
  for field, value in now.items():
    found = made.get(field, defaults[field])
    if field not in ignored and found != value:
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


def _precomputed_batches(config: Config, image_size: int) -> pipeline.Batches:
  data = open_precomputed(config)
  size = data.manifest["image_size"]
  if size != image_size:
    raise ValueError(f"{data.folder} is of images of {size} pixels, {config.model} wants {image_size}; make it again.")
  return latents.batches(
    data,
    caption_dropout=config.data.caption_dropout,
    flip=config.data.flip,
    num_workers=config.data.num_workers,
    **_shared_data_arguments(config),
  )


def offline_batches(
  config: Config, image_size: int, tokenize: Callable[[list[str]], np.ndarray]
) -> pipeline.Batches:
  """The data of an objective that trains on images or pairs."""
  if config.data.source == "precomputed":
    return _precomputed_batches(config, image_size)
  if config.objective == "denoise":
    return _image_batches(config, image_size, tokenize)
  if config.objective == "kto":
    return _image_batches(config, image_size, tokenize, inputs.unpaired_source(config))
  return _pair_batches(config, image_size, tokenize)


def _remat(text: str) -> str | tuple[str, ...]:
  """The UNet's `remat` from config.remat: one name, or one for each level, separated by commas."""
  names = tuple(name.strip() for name in text.split(","))
  return names[0] if len(names) == 1 else names


# ---- Text-to-image: denoise, dpo, tdpo, kto, spo, grpo ---------------------------------------------------------


def adapter_scale(config: Config, rank: int) -> float:
  """alpha / rank of the adapter that a config trains."""
  return 1.0 if config.lora.alpha is None else config.lora.alpha / rank


def initial_adapter(config: Config, unet: UNetConfig, params: Any) -> Any:
  """The adapter that training starts from: fresh, or what a file does, at the config's alpha.

  Args:
    unet: the network's config.
    params: its parameters.
  Returns:
    None for full training.
  Raises:
    ValueError, FileNotFoundError: the file is missing, is for another network, or has another rank than the config.
  """
  c = config.lora
  if c.init_from:
    adapter, scale = lora_files.load_lora(c.init_from, unet, params)
    rank = lora_files.adapter_rank(adapter)
    if c.rank not in (0, rank):
      raise ValueError(f"config.lora.rank={c.rank}, but {c.init_from} has rank {rank}; leave out one of them.")
    return lora_files.rescale(adapter, scale, adapter_scale(config, rank))
  if c.rank:
    return lora.init_lora(jax.random.key(config.seed), params, rank=c.rank, targets=c.targets)
  return None


def save_trained(folder: pathlib.Path, pipe: weights.Pipeline, params: Any, *, scale: float, dtype: Any) -> None:
  """Writes a diffusers folder: a pipeline with trained parameters in the place of its own.

  Args:
    folder: to write.
    pipe: the pipeline that was trained.
    params: trained parameters by component; an adapter `unet_lora` is merged, and also written by itself beside the
      components (in float32, to be continued from).
    scale: alpha / rank of the adapter.
    dtype: of the folder's files.
  """
  trained = dict(pipe.params) | params
  adapter = trained.pop("unet_lora", None)
  if adapter is not None:
    # A bfloat16 base would swallow most of a small change, so it takes the precision of the file first.
    base = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, trained["unet"])
    trained["unet"] = lora.merge_lora(base, adapter, scale)
  weights.save_pipeline(folder, dataclasses.replace(pipe, params=trained), dtype=dtype)
  if adapter is not None:
    lora_files.save_diffusers(folder / lora_files.DIFFUSERS_FILE, adapter, scale)


def _load(
  config: Config,
  sharding: weights.Sharding,
  *,
  trained: tuple[str, ...] = (),
  components: Sequence[str] = weights.NETWORKS,
) -> weights.Pipeline:
  """The config's pipeline: parameters float32 where trained, else in the dtype of the computation."""
  return load_text_to_image(
    config.model,
    dtype=config.dtype,
    seed=config.seed,
    param_dtype={name: "float32" if name in trained else config.dtype for name in weights.NETWORKS},
    sharding=sharding,
    vae_model=config.vae_model,
    components=components,
  )


def networks(config: Config) -> tuple[str, ...]:
  """Those that a run of `_text_to_image` needs: with precomputed data only the UNet, unless it draws pictures."""
  draws = config.sample.every or (config.judge and config.evaluation.num_prompts)
  return weights.NETWORKS if config.data.source != "precomputed" or draws else ("unet",)


def _text_to_image(config: Config, sharding: weights.Sharding, vae_slicing: int | None) -> Experiment:
  if config.lora.rank or config.lora.init_from:
    components: tuple[str, ...] = ()
  else:
    components = ("unet", "text_encoder") if config.train_text_encoder else ("unet",)
  if config.data.source == "precomputed":
    open_precomputed(config)  # what is wrong with it is said now, not after gigabytes were read
  needed = networks(config)
  pipe = _load(config, sharding, trained=components, components=needed)
  pipe = dataclasses.replace(pipe, unet=pipe.unet.clone(remat=_remat(config.remat)))
  frozen = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  adapter = initial_adapter(config, pipe.unet.config, frozen["unet"])
  scale = 1.0
  if adapter is not None:
    scale = adapter_scale(config, lora_files.adapter_rank(adapter))
    params = {"unet_lora": adapter}
    if config.lora.init_from:  # then the model without an adapter is not what training starts from
      frozen["unet_lora"] = adapter
  else:
    params = {name: frozen[name] for name in components}
  # What the functions below hold on to stays in memory: not the parameters that training replaces.
  pipe = dataclasses.replace(pipe, params={k: v for k, v in pipe.params.items() if k not in components})
  tokenize = pipe.tokenize
  model = text_to_image(pipe, lora_scale=scale, vae_slicing=vae_slicing)
  num_classes = max(emoji.num_classes(config.data.subset), config.evaluation.candidates)
  judge, judge_params = load_judge(config.judge, style=config.data.preferred_style, num_classes=num_classes)
  reference_free = config.objective in ("dpo", "tdpo") and config.loss.name in objectives.REFERENCE_FREE
  has_reference = config.objective != "denoise"  # a loss that calls none is compared with it in the end
  if config.reference.mode == "frozen":  # Only a moving reference needs the pre-trained weights beside it.
    frozen = {k: v for k, v in frozen.items() if k not in params}

  trained_names = tuple(params)
  zero_adapter = adapter is not None and not config.lora.init_from
  del adapter

  def init_params(frozen: Any) -> Any:
    return None if zero_adapter else {k: frozen[k] for k in trained_names}

  def export(params: Any, folder: pathlib.Path) -> None:
    original = pipe
    if config.dtype != "float32" or networks != weights.NETWORKS or jax.process_count() > 1:
      # What was not trained is written as it was read, not rounded to bfloat16. Of several processes one writes, and it
      # cannot compute by itself with arrays that are spread over all.
      param_dtype = "float32" if config.dtype == "float32" else "float16"
      original = load_text_to_image(
        config.model, dtype=config.dtype, seed=config.seed, param_dtype=param_dtype, vae_model=config.vae_model
      )
    save_trained(folder, original, params, scale=scale, dtype=jnp.float16)

  shared: dict[str, Any] = dict(
    params=params,
    frozen=frozen,
    export=export,
    init_params=init_params,
    has_reference=has_reference,
    images_per_step=config.batch_size,
    evaluable=True,
    model=model,
    tokenize=tokenize,
    judge=judge,
    judge_params=judge_params,
  )
  if config.objective == "denoise":
    return Experiment(
      objective=objectives.denoise(model), batches=lambda: offline_batches(config, model.image_size, tokenize), **shared
    )
  if config.objective == "kto":
    return Experiment(
      objective=objectives.kto(model, beta=config.loss.beta, **config.kto.to_dict()),
      batches=lambda: offline_batches(config, model.image_size, tokenize),
      **shared,
    )
  if config.objective in ("dpo", "tdpo"):
    o = config.loss
    options = {"beta": o.beta, "label_smoothing": o.label_smoothing, "snr": o.snr}
    total = model.schedule.num_train_timesteps
    loss = objectives.denoised_loss(o.name, **options, num_train_timesteps=total)
    objective = objectives.dpo(
      model,
      loss if o.safeguard is None else objectives.safeguarded(loss, mu=o.safeguard),
      reference_free=reference_free,
      gamma=config.timesteps.gamma,
      num_bins=config.timesteps.num_bins,
      reward_scale=config.timesteps.reward_scale,
    )
    shared["images_per_step"] = 2 * config.batch_size
    return Experiment(
      objective=objective, batches=lambda: offline_batches(config, model.image_size, tokenize), **shared
    )

  scorer, shared["frozen"]["spm"] = load_scorer(
    config.preference_model, dtype=config.dtype, param_dtype=config.dtype, seed=config.seed, sharding=sharding
  )

  def online_step(optimizer: Any, **kwargs: Any) -> step.StepFn:
    kwargs |= {"seed": config.seed, "accumulation": config.accumulation}
    if config.objective == "grpo":
      return step.grpo_step(model, scorer, optimizer, **config.grpo.to_dict(), **kwargs)
    o = config.loss
    pair_loss = objectives.pair_loss(o.name, beta=o.beta, label_smoothing=o.label_smoothing)
    return step.spo_step(model, scorer, pair_loss, optimizer, **config.spo.to_dict(), **kwargs)

  if config.objective == "grpo":
    shared["images_per_step"] = config.batch_size * config.grpo.group_size
  return Experiment(
    online_step=online_step,
    divergence=objectives.denoising_divergence(model, lambda frozen, batch, key: batch["latents"]),
    batches=lambda: pipeline.prompt_batches(
      sources.read_prompts(config.data.path) if config.data.source == "prompts" else None,
      tokenize=tokenize,
      subset=config.data.subset,
      split=_split(config),
      **_shared_data_arguments(config),
    ),
    **shared,
  )


# ---- Preference model ------------------------------------------------------------------------------------------


def _spm(config: Config, sharding: weights.Sharding, vae_slicing: int | None) -> Experiment:
  pipe = _load(config, sharding)
  model, tokenize = text_to_image(pipe, vae_slicing=vae_slicing), pipe.tokenize
  scorer, params = load_scorer(config.preference_model, dtype=config.dtype, seed=config.seed, sharding=sharding)
  frozen = dict(pipe.params) | {"empty_ids": tokenize([""])}
  objective = objectives.spm(model, scorer, **config.spm.to_dict())
  held_out = config.copy_and_resolve_references()
  held_out.unlock()
  held_out.data.update(split="validation", ties="drop", flip_labels=0.0, caption_dropout=0.0)
  if config.data.scores and not config.data.validation_share:  # the scores are those of the other split
    held_out.data.update(scores=None, labels="given", min_gap=0.0)
  if config.evaluation.num_prompts:
    inputs.pairs_source(held_out)  # a split that is not there is refused now, not after the training

  def report(params: Any) -> dict[str, float]:
    if not config.evaluation.num_prompts:
      return {}
    batches = _pair_batches(held_out, model.image_size, tokenize, process_index=0, process_count=1)
    evaluate = jax.jit(lambda params, batch, key: objective.loss(params, {}, frozen, batch, key)[2])
    total: Any = None
    for i in range(max(1, 512 // config.batch_size)):
      pairs = evaluate(params, next(batches), jax.random.key(i))
      total = pairs if total is None else jax.tree.map(jnp.add, total, pairs)
    return metrics.to_scalars({f"validation_{k}": v for k, v in metrics.divide(total).items()})

  return Experiment(
    params={"spm": params},
    frozen=frozen,
    objective=objective,
    batches=lambda: _pair_batches(config, model.image_size, tokenize),
    export=lambda params, folder: weights.save_preference_model(folder, scorer, params["spm"], dtype=jnp.float16),
    images_per_step=2 * config.batch_size,
    report=report,
  )


# ---- Pre-training ----------------------------------------------------------------------------------------------


def _autoencode(config: Config) -> Experiment:
  pipe = load_text_to_image(config.model, dtype=config.dtype, seed=config.seed)
  image_size = text_to_image(pipe).image_size

  def export(params: Any, folder: pathlib.Path) -> None:
    """With the scaling factor that gives the training images' latents unit variance."""
    images = np.stack([r["image"] for r in pipeline.emoji_images(image_size, subset=config.data.subset, split=None)])
    encode = jax.jit(lambda x: pipe.vae.apply({"params": params["vae"]}, x, method="encode")[0])
    latents = np.concatenate([encode(np.float32(images[i : i + 64]) / 127.5 - 1) for i in range(0, len(images), 64)])
    vae = AutoencoderKL(
      dataclasses.replace(pipe.vae.config, scaling_factor=round(float(1 / latents.std()), 5)), pipe.vae.dtype
    )
    result = dataclasses.replace(pipe, vae=vae, params=dict(pipe.params) | params)
    weights.save_pipeline(folder, result, dtype=jnp.float32)

  return Experiment(
    params={"vae": pipe.params["vae"]},
    frozen={},
    objective=objectives.Objective(
      pretraining.autoencode(pipe.vae, kl_weight=config.vae.kl_weight, gradient_weight=config.vae.gradient_weight)
    ),
    batches=lambda: _image_batches(config, image_size, None),
    export=export,
    images_per_step=config.batch_size,
  )


def _contrastive(config: Config) -> Experiment:
  clip = presets.make_clip(presets.get_preset("tiny-sd"))
  return Experiment(
    params={"clip": presets.init_params(clip, jax.random.key(config.seed))},
    frozen={},
    objective=objectives.Objective(pretraining.contrastive(clip)),
    batches=lambda: _image_batches(config, clip.config.vision_config.image_size, _tiny_tokenize),
    export=lambda params, folder: weights.save_preference_model(folder, clip, params["clip"], dtype=jnp.float16),
    images_per_step=config.batch_size,
  )


def _held_out(record: Any) -> bool:
  """Tiles the judge never sees: of each emoji outside the training split, one of the three styles."""
  return record["class_id"] in _held_out_classes() and record["class_id"] % len(emoji.STYLES) == record["style"]


@functools.cache
def _held_out_classes() -> set[int]:
  return {e.class_id for split in ("validation", "test") for e in emoji.load_index("all", split)}


def _classify(config: Config) -> Experiment:
  preset = presets.get_preset("tiny-sd").judge
  assert preset is not None
  judge = Judge(preset)
  images = pipeline.emoji_images(preset.image_size, subset=config.data.subset, split=None)
  seen = [r for r in images if not _held_out(r)]
  unseen = [r for r in images if _held_out(r)]

  def report(params: Any) -> dict[str, float]:
    """Accuracy on tiles that were not trained on."""
    x = np.stack([r["image"] for r in unseen]).astype(np.float32) / 127.5 - 1
    style, classes = jax.jit(lambda x: judge.apply({"params": params["judge"]}, x))(x)
    labels = np.array([r["class_id"] for r in unseen])
    right = {
      "held_out_style_accuracy": np.argmax(style, 1) == np.array([r["style"] for r in unseen]),
      "held_out_class_accuracy": np.argmax(classes, 1) == labels,
    }
    rng = np.random.default_rng(0)
    others = np.stack([rng.choice(np.setdiff1d(np.arange(classes.shape[1]), [c]), 15, replace=False) for c in labels])
    candidates = np.take_along_axis(np.asarray(classes), np.concatenate([labels[:, None], others], 1), axis=1)
    right["held_out_accuracy_among_16"] = np.argmax(candidates, 1) == 0
    return {k: float(np.mean(v)) for k, v in right.items()} | {"held_out_tiles": len(unseen)}

  return Experiment(
    params={"judge": presets.init_params(judge, jax.random.key(config.seed))},
    frozen={},
    objective=objectives.Objective(pretraining.classify(judge)),
    batches=lambda: _image_batches(config, preset.image_size, None, source=seen),
    export=lambda params, folder: weights.save_judge(folder, judge, params["judge"], dtype=jnp.float16),
    images_per_step=config.batch_size,
    report=report,
  )
