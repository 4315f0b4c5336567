"""Model folders of diffusers and transformers <-> networks and parameter trees."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpref.diffusion import Schedule, schedule_from_config
from jaxpref.files.folders import (
  check_network,
  load_network,
  read_json,
  replacing,
  resolve_folder,
  save_network,
  write_json,
)
from jaxpref.files.tensors import Path, Sharding, Source, Tree, weight_files
from jaxpref.files.tokenizers import load_tokenizer_of, save_tokenizer, tiny_tokenizer_for, tokenize
from jaxpref.models import presets
from jaxpref.models.clip import CLIPTextConfig, CLIPTextModel
from jaxpref.models.unet import UNet2DConditionModel, UNetConfig
from jaxpref.models.vae import AutoencoderKL, VAEConfig
from jaxpref.recipes.sizes import of_sides

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_COMPONENTS = (*NETWORKS, "tokenizer", "tokenizer_2", "scheduler")
_CLASSES = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
  "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A Stable Diffusion model: the content of a diffusers folder.

  Attributes:
    unet, vae, text_encoder, text_encoder_2: networks without parameters; the last is SDXL's second
      encoder or None.
    params: {"unet", "vae", "text_encoder"[, "text_encoder_2"]} -> nested dicts of arrays.
    schedule: the noise schedule.
    scheduler_config: the dict of scheduler_config.json that `schedule` was made from.
    tokenizer, tokenizer_2: transformers tokenizers, one for each text encoder.
    force_zeros_for_empty_prompt: for SDXL: the empty prompt conditions on zeros.
  """

  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  params: Tree
  schedule: Schedule
  scheduler_config: dict[str, Any]
  tokenizer: Any
  text_encoder_2: CLIPTextModel | None = None
  tokenizer_2: Any = None
  force_zeros_for_empty_prompt: bool = False

  def tokenize(self, captions: Sequence[str]) -> np.ndarray:
    """Returns i32[n, L] token ids, padded and cut as Stable Diffusion does.

    With two text encoders i32[n, 2 L]: the ids of both tokenizers side by side.
    """
    pairs = [(self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)]
    ids = [
      tokenize(tokenizer, captions, length=encoder.config.max_position_embeddings)
      for encoder, tokenizer in pairs
      if encoder is not None
    ]
    return np.concatenate(ids, axis=1)

  def at_size(self, height: int, width: int) -> "Pipeline":
    """Returns the pipeline whose folder says that it draws images of this size in pixels.

    `sample_size` is an int for squares and [height, width] of the latents otherwise, as diffusers writes it. SDXL keeps
    its own where the sides differ, because its pipeline in diffusers only reads an int.
    """
    if height != width and self.unet.config.addition_embed_type == "text_time":
      return self
    unit = self.vae.config.downscale
    config = dataclasses.replace(self.unet.config, sample_size=of_sides(height // unit, width // unit))
    return dataclasses.replace(self, unet=self.unet.clone(config=config))


def _component_class(index: Mapping[str, Any], name: str, folder: pathlib.Path) -> str | None:
  entry = index.get(name)
  if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
    return None
  if name in _CLASSES and entry[1] not in _CLASSES[name]:
    raise ValueError(
      f"{folder / 'model_index.json'}: {name} is a {entry[1]}, expected "
      f"{' or '.join(_CLASSES[name])}; only Stable Diffusion 1, 2 and XL are implemented."
    )
  return entry[1]


def load_pipeline(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any | Mapping[str, Any] = jnp.float32,
  sharding: Sharding = None,
  components: Sequence[str] = NETWORKS,
) -> Pipeline:
  """Opens a Stable Diffusion 1.x, 2.x or XL folder in the layout of diffusers.

  Args:
    folder: path or hub name ("organisation/model").
    dtype: compute dtype of the networks.
    param_dtype: dtype of the parameters, or a dict with one for each of NETWORKS.
    sharding: where arrays go as they are read: None (default device), one Sharding, or a function
      from the tree of ShapeDtypeStructs {"unet": ..., ...} to one of Shardings.
    components: networks whose parameters are read. The others need only their config.json.

  Returns:
    The pipeline; its params have only the components asked for.

  Raises:
    FileNotFoundError: the folder or one of its files is missing.
    ValueError: a file does not fit, a pickle stands where safetensors are expected, or the
      architecture is not implemented.
  """
  folder = resolve_folder(folder, "*/*.safetensors")  # not the single-file copies beside them
  modules = read_modules(folder, dtype)
  files = {name: weight_files(folder / name) for name in modules if name in components}
  return load_params(open_pipeline(folder, dtype=dtype), files, folder, param_dtype=param_dtype, sharding=sharding)


def open_pipeline(folder: pathlib.Path, *, dtype: Any = jnp.float32) -> Pipeline:
  """Returns the pipeline of a folder without parameters, from its JSON files and tokenizers.

  Raises:
    FileNotFoundError, ValueError: as `load_pipeline`, for these files.
  """
  zeros = read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt")
  modules = read_modules(folder, dtype)
  scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
  schedule = schedule_from_config(scheduler_config)
  tokenizer = load_tokenizer_of(folder, "", modules["text_encoder"])
  tokenizer_2 = load_tokenizer_of(folder, "_2", modules["text_encoder_2"]) if "text_encoder_2" in modules else None
  return Pipeline(
    **modules,
    params={},
    schedule=schedule,
    scheduler_config=scheduler_config,
    tokenizer=tokenizer,
    tokenizer_2=tokenizer_2,
    # The default is that of diffusers' SDXL pipeline; the others have no such option.
    force_zeros_for_empty_prompt="text_encoder_2" in modules and (zeros is None or bool(zeros)),
  )


def load_params(
  pipe: Pipeline,
  files: Mapping[str, Sequence[Source]],
  folder: pathlib.Path,
  *,
  param_dtype: Any | Mapping[str, Any] = jnp.float32,
  sharding: Sharding = None,
) -> Pipeline:
  """Returns a pipeline with the parameters of some networks; checks everything before it reads any.

  Args:
    pipe: a pipeline without parameters.
    files: files of each of these networks.
    folder: folder with the networks' config.json files, for messages.
    param_dtype, sharding: see `load_pipeline`.

  Raises:
    ValueError: a file or a config.json does not fit.
  """
  modules = {name: module for name in NETWORKS if (module := getattr(pipe, name)) is not None}
  shapes = {name: presets.abstract_params(modules[name]) for name in files}
  for name in shapes:
    check_network(modules[name], files[name], shapes[name])
  _check_parts(folder, modules)
  shardings = sharding(shapes) if callable(sharding) else dict.fromkeys(shapes, sharding)
  dtypes = param_dtype if isinstance(param_dtype, Mapping) else dict.fromkeys(shapes, param_dtype)
  params = {
    name: load_network(modules[name], files[name], shapes[name], dtypes[name], shardings[name]) for name in shapes
  }
  return dataclasses.replace(pipe, params=params)


def read_preset(folder: Path) -> presets.Preset:
  """Returns the architectures of a model folder, from its JSON files alone.

  Raises:
    FileNotFoundError, ValueError: as `load_pipeline`, for these files.
  """
  folder = pathlib.Path(folder)
  modules = read_modules(folder)
  _check_parts(folder, modules)
  scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
  return presets.Preset(**{name: module.config for name, module in modules.items()}, scheduler=scheduler)


def read_modules(folder: pathlib.Path, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Returns the networks of a folder without parameters, by component; raises as `load_pipeline` for these files."""
  index = read_json(folder / "model_index.json")
  if index.get("_class_name") == "StableDiffusion3Pipeline":
    raise ValueError(
      f"{folder / 'model_index.json'} is of a StableDiffusion3Pipeline, expected Stable Diffusion 1, 2 or XL; set "
      "config.family (--family) to stable_diffusion_3, or take another folder."
    )
  modules: dict[str, Any] = {}
  for name in NETWORKS:
    class_name = _component_class(index, name, folder)
    if class_name is None:
      if name == "text_encoder_2":
        continue
      raise ValueError(
        f"{folder / 'model_index.json'} has no {name}, expected the components of Stable "
        "Diffusion (unet, vae, text_encoder, tokenizer, scheduler); take a complete folder."
      )
    config = read_json(folder / name / "config.json")
    modules[name] = _make_module(name, class_name, config, dtype)
  return modules


# What the UNet of a model that is not text-to-image takes besides noise, by its number of channels.
OTHER_INPUTS = {
  5: "a depth map as well",
  7: "a small image as well (an upscaler)",
  8: "an image to edit as well",
  9: "a mask and a masked image as well (inpainting)",
}


def _check_parts(folder: pathlib.Path, modules: Mapping[str, Any]) -> None:
  """Raises a ValueError if a field of one component's config.json does not fit the others."""
  unet, vae, text = (modules[name].config for name in ("unet", "vae", "text_encoder"))
  text_2 = modules["text_encoder_2"].config if "text_encoder_2" in modules else None

  def require(component: str, field: str, expected: Any, why: str, found: Any = None) -> None:
    found = getattr(modules[component].config, field) if found is None else found
    if found != expected:
      raise ValueError(
        f"{folder / component / 'config.json'}: {field} is {found}, expected {expected}, {why}; take a text-to-image "
        "model, and all of its components from it."
      )

  for field in ("in_channels", "out_channels"):
    require("vae", field, 3, "the colours of an image")
  takes = f" (this UNet takes {OTHER_INPUTS[unet.in_channels]})" if unet.in_channels in OTHER_INPUTS else ""
  require("unet", "in_channels", vae.latent_channels, f"the latent_channels of the vae{takes}")
  require("unet", "out_channels", vae.latent_channels, "the latent_channels of the vae")
  width = text.hidden_size + (text_2.hidden_size if text_2 else 0)
  found = unet.per_level("cross_attention_dim")[0]
  require("unet", "cross_attention_dim", width, "the hidden_size of the text encoders", found)
  require("unet", "addition_embed_type", "text_time" if text_2 else None, f"with {2 if text_2 else 1} text encoders")
  if text_2 and unet.addition_time_embed_dim and unet.projection_class_embeddings_input_dim:
    expected = text_2.projection_dim + 6 * unet.addition_time_embed_dim
    why = "text_encoder_2's projection_dim + 6 addition_time_embed_dim"
    require("unet", "projection_class_embeddings_input_dim", expected, why)


def _make_module(name: str, class_name: str, config: Mapping[str, Any], dtype: Any) -> nn.Module:
  if name == "unet":
    return UNet2DConditionModel(UNetConfig.from_dict(config), dtype)
  if name == "vae":
    return AutoencoderKL(VAEConfig.from_dict(config), dtype)
  with_projection = class_name == "CLIPTextModelWithProjection"
  return CLIPTextModel(CLIPTextConfig.from_dict(config), with_projection, dtype)


def modules_of(preset: presets.Preset, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Returns the networks of a preset without parameters, by component."""
  modules: dict[str, Any] = {
    "unet": UNet2DConditionModel(preset.unet, dtype),
    "vae": AutoencoderKL(preset.vae, dtype),
    "text_encoder": CLIPTextModel(preset.text_encoder, False, dtype),
  }
  if preset.text_encoder_2 is not None:
    modules["text_encoder_2"] = CLIPTextModel(preset.text_encoder_2, True, dtype)
  return modules


def random_pipeline(
  preset: presets.Preset | str,
  seed: int = 0,
  *,
  dtype: Any = jnp.float32,
  init: Callable[[Any, jax.Array], Any] = presets.init_params,
  components: Sequence[str] = NETWORKS,
) -> Pipeline:
  """Returns a pipeline of random weights with tiny-sd's tokenizer, for tests, smoke runs and pre-training.

  Args:
    preset: a preset or its name; its text encoders' vocabulary must hold tiny-sd's.
    seed: seed of the parameters.
    dtype: compute dtype.
    init: (network, key) -> parameters of the network.
    components: networks whose parameters are made.
  """
  preset = presets.get_preset(preset) if isinstance(preset, str) else preset
  if preset.text_encoder.vocab_size < presets.TINY_VOCAB_SIZE:
    raise ValueError(
      f"random_pipeline: the preset's vocabulary has {preset.text_encoder.vocab_size} entries, "
      f"expected at least tiny-sd's {presets.TINY_VOCAB_SIZE}."
    )
  modules = modules_of(preset, dtype)
  keys = jax.random.split(jax.random.key(seed), len(modules))
  params = {
    name: init(module, key) for (name, module), key in zip(modules.items(), keys, strict=True) if name in components
  }
  return Pipeline(
    **modules,
    params=params,
    schedule=schedule_from_config(preset.scheduler),
    scheduler_config=dict(preset.scheduler),
    tokenizer=tiny_tokenizer_for(preset.text_encoder),
    tokenizer_2=None if preset.text_encoder_2 is None else tiny_tokenizer_for(preset.text_encoder_2),
    force_zeros_for_empty_prompt="text_encoder_2" in modules,
  )


def save_pipeline(
  folder: Path, pipeline: Pipeline, *, dtype: Any = jnp.float32, configs_only: bool = False
) -> pathlib.Path:
  """Writes a folder that torch diffusers opens with `from_pretrained`.

  Everything is written beside `folder` first and renamed at the end, so a run that dies leaves either the old folder or
  the new one. An existing pipeline folder is replaced (files in it that are not the pipeline's are kept); any other
  existing folder raises.

  Args:
    folder: path to write.
    pipeline: has parameters that this process can read in full.
    dtype: dtype of the files: float32, float16 or bfloat16.
    configs_only: writes no weights, only configs, scheduler and tokenizers, from which networks can be made.

  Returns:
    The folder.

  Raises:
    FileExistsError: `folder` exists and is not a pipeline folder.
    ValueError: a parameter is not finite or does not fit `dtype`.
  """
  with replacing(folder, "model_index.json", _COMPONENTS) as target:
    xl = pipeline.text_encoder_2 is not None
    scheduler_class = pipeline.scheduler_config.get("_class_name", "DDIMScheduler")
    index: dict[str, Any] = {
      "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
      "_diffusers_version": "0.30.0",
      "unet": ["diffusers", "UNet2DConditionModel"],
      "vae": ["diffusers", "AutoencoderKL"],
      "scheduler": ["diffusers", scheduler_class],
      "feature_extractor": [None, None],
      "image_encoder": [None, None],
    }
    if xl:
      index["force_zeros_for_empty_prompt"] = pipeline.force_zeros_for_empty_prompt
      index["add_watermarker"] = False
    else:
      index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for name in ("unet", "vae"):
      config = {"_diffusers_version": "0.30.0", **getattr(pipeline, name).config.to_dict()}
      params = None if configs_only else pipeline.params[name]
      save_network(target / name, "diffusion_pytorch_model", config, params, dtype)
    for suffix in ("", "_2") if xl else ("",):
      encoder = getattr(pipeline, f"text_encoder{suffix}")
      class_name = "CLIPTextModelWithProjection" if encoder.with_projection else "CLIPTextModel"
      index[f"text_encoder{suffix}"] = ["transformers", class_name]
      index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
      config = {"architectures": [class_name], **encoder.config.to_dict()}
      params = None if configs_only else pipeline.params[f"text_encoder{suffix}"]
      save_network(target / f"text_encoder{suffix}", "model", config, params, dtype)
      save_tokenizer(target / f"tokenizer{suffix}", getattr(pipeline, f"tokenizer{suffix}"))
    (target / "scheduler").mkdir()
    write_json(
      target / "scheduler" / "scheduler_config.json",
      {"_class_name": scheduler_class, **pipeline.scheduler_config},
    )
    write_json(target / "model_index.json", index)
  return pathlib.Path(folder)


def load_vae(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
) -> tuple[AutoencoderKL, Tree]:
  """Opens a VAE that is published separately, such as madebyollin/sdxl-vae-fp16-fix.

  Args:
    folder: path or hub name with config.json and diffusion_pytorch_model.safetensors.
    dtype, param_dtype: see `load_pipeline`.
    sharding: see `load_pipeline`, for the VAE's parameter tree.
  """
  folder = vae_folder(folder)
  module = AutoencoderKL(VAEConfig.from_dict(read_json(folder / "config.json")), dtype)
  shapes = presets.abstract_params(module)
  shardings = sharding(shapes) if callable(sharding) else sharding
  return module, load_network(module, weight_files(folder), shapes, param_dtype, shardings)


def vae_folder(name: Path) -> pathlib.Path:
  """Returns the folder of a VAE that is published separately.

  Raises:
    FileNotFoundError: it does not exist or has no config.json.
    ValueError: its config.json is not valid JSON.
  """
  folder = resolve_folder(name, "diffusion_pytorch_model*.safetensors")
  read_json(folder / "config.json")
  return folder


def unet_folder(name: Path) -> pathlib.Path:
  """Returns the folder of a UNet that is published separately: the one named, or `unet` in it."""
  folder = resolve_folder(name, "unet/*.safetensors")
  if (folder / "unet" / "config.json").is_file():
    return folder / "unet"
  return resolve_folder(name, "diffusion_pytorch_model*.safetensors")


def replace_unet(
  pipe: Pipeline,
  name: Path,
  *,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
  with_params: bool = True,
) -> Pipeline:
  """Returns a pipeline with a separately published UNet instead of its own.

  Args:
    pipe: a pipeline; it may lack the UNet's parameters.
    name: see `unet_folder`; has config.json and diffusion_pytorch_model.safetensors.
    param_dtype: see `load_pipeline`.
    sharding: see `load_pipeline`, for the UNet's parameter tree.
    with_params: whether its parameters are read.

  Raises:
    ValueError: the UNet was made for another model.
  """
  folder, own = unet_folder(name), pipe.unet.config
  config = UNetConfig.from_dict(read_json(folder / "config.json"))
  if config.sample_size is None:
    config = dataclasses.replace(config, sample_size=own.sample_size)
  for field in ("in_channels", "out_channels", "addition_embed_type", "projection_class_embeddings_input_dim"):
    _same_field(folder, field, getattr(config, field), getattr(own, field))
  widths = (c.per_level("cross_attention_dim")[0] for c in (config, own))
  _same_field(folder, "cross_attention_dim", *widths)
  module = UNet2DConditionModel(config, pipe.unet.dtype)
  params = {k: v for k, v in pipe.params.items() if k != "unet"}
  if with_params:
    shapes = presets.abstract_params(module)
    shardings = sharding(shapes) if callable(sharding) else sharding
    params["unet"] = load_network(module, weight_files(folder), shapes, param_dtype, shardings)
  return dataclasses.replace(pipe, unet=module, params=params)


def _same_field(folder: pathlib.Path, field: str, found: Any, expected: Any) -> None:
  if found != expected:
    raise ValueError(
      f"{folder / 'config.json'}: {field} is {found}, expected {expected} like the model's own UNet; choose a UNet "
      "that was made for this model."
    )
