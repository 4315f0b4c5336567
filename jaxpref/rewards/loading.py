"""Reads and writes folders of preference models, latent rewards, CLIPs and judges, by the names of `files.loading`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpref.files import loading, tensors
from jaxpref.files.folders import check_replaceable, load_network, read_json, replacing, resolve_folder, save_network
from jaxpref.files.tensors import Path, Sharding, Tree, load_tree, weight_files
from jaxpref.models import open_clip, presets
from jaxpref.models.clip import CLIPModel
from jaxpref.models.latent_reward import MODEL_TYPE as LATENT_REWARD
from jaxpref.models.latent_reward import LatentRewardConfig, LatentRewardModel
from jaxpref.models.preference import Judge, JudgeConfig, StepAwareCLIPConfig, StepAwareCLIPModel
from jaxpref.recipes.messages import listed
from jaxpref.recipes.sections import check_seed


def load_preference_model(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
) -> tuple[StepAwareCLIPModel, Tree]:
  """Opens a step-aware preference model, or a CLIP (PickScore) to start one from.

  Args:
    folder: path or hub name with config.json and model.safetensors: written by `save_preference_model` or
      scripts/assets/convert_spm.py, or transformers' CLIPModel (yuvalkirstain/PickScore_v1,
      laion/CLIP-ViT-H-14-laion2B-s32B-b79K).
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
    sharding: see `pipelines.load_pipeline`, for the parameter tree.

  Returns:
    The module and its parameters; a plain CLIP gets a freshly initialised time condition, with
    which the scores are CLIP's.

  Raises:
    FileNotFoundError, ValueError: see `pipelines.load_pipeline`.
  """
  folder, config_dict = read_config(folder)
  module = StepAwareCLIPModel(StepAwareCLIPConfig.from_dict(config_dict), dtype)
  files = weight_files(folder)
  shapes = presets.abstract_params(module)
  shardings = sharding(shapes) if callable(sharding) else sharding
  if config_dict.get("model_type", "step_aware_clip") == "step_aware_clip":
    return module, load_network(module, files, shapes, param_dtype, shardings)
  clip_shapes = presets.abstract_params(CLIPModel(module.config))
  clip_params = load_network(module, files, clip_shapes, param_dtype, shardings)

  def fresh():  # only its time condition is used: the rest is dead code to the compiler
    params = module.init(jax.random.key(0), *presets.example_inputs(module))["params"]
    return _without(jax.tree.map(lambda x: x.astype(param_dtype), params), clip_shapes)

  out = (
    jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if shardings is None
    else (_without(shardings, clip_shapes) if isinstance(shardings, Mapping) else shardings)
  )
  added = jax.jit(fresh, out_shardings=out)()
  return module, _merge(added, clip_params)


def _read_no_run(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the config.json of a model; raises ValueError if the folder is that of a run, which holds its model."""
  found = read_json(folder / "config.json")
  if "objective" in found:
    raise ValueError(f"{folder} is the work folder of a run; give the model that it exported, {folder / 'export'}.")
  return found


def _latent_config(folder: pathlib.Path) -> LatentRewardConfig:
  """Returns the config of a latent reward model's folder; an error names the file."""
  found = _read_no_run(folder)
  try:
    return LatentRewardConfig.from_dict(found)
  except ValueError as error:
    raise ValueError(f"{folder / 'config.json'}: {error}") from error


def read_config(folder: Path) -> tuple[pathlib.Path, dict[str, Any]]:
  """Returns the folder of a preference model, fetched if it is a hub name, and its config.json.

  Raises:
    FileNotFoundError, ValueError: see `load_preference_model`.
  """
  folder = resolve_folder(folder, "model*.safetensors")  # not open_clip's copy of CLIP-H beside it
  config_dict = _read_no_run(folder)
  if not {"model_type", "text_config"} & config_dict.keys():
    raise ValueError(
      f"{folder / 'config.json'} does not describe a CLIP, expected a model_type or a text_config; point to "
      "a folder that save_preference_model wrote, or a CLIP such as PickScore."
    )
  if config_dict.get("model_type") == LATENT_REWARD:
    raise ValueError(
      f"{folder} is a latent reward model, expected a step-aware preference model or a CLIP; set config.reward=latent "
      "to train by it."
    )
  return folder, config_dict


def load_clip(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[CLIPModel, Tree]:
  """Opens a plain CLIP, without a time condition: in transformers' layout or in open_clip's.

  Args:
    folder: path or hub name with config.json and model.safetensors, or path of a folder with open_clip_config.json and
      open_clip_model.safetensors.
    dtype, param_dtype: see `load_preference_model`.
    sharding: sharding of all parameters.

  Raises:
    FileNotFoundError, ValueError: see `pipelines.load_pipeline`.
  """
  folder = resolve_folder(folder, "model*.safetensors")
  if not (folder / "config.json").is_file() and (folder / "open_clip_config.json").is_file():
    config = open_clip.config_from_dict(read_json(folder / "open_clip_config.json"))
    module = CLIPModel(config, dtype)
    file = folder / "open_clip_model.safetensors"
    if not file.is_file():
      raise FileNotFoundError(f"{file} is missing, expected it beside open_clip_config.json; download it.")
    shapes = jax.eval_shape(lambda p: open_clip.from_clip(p, config), presets.abstract_params(module))
    tree = load_tree(file, shapes, param_dtype=param_dtype, sharding=sharding)
    return module, open_clip.to_clip(tree, config)
  module = CLIPModel(StepAwareCLIPConfig.from_dict(read_json(folder / "config.json")), dtype)
  return module, load_network(module, weight_files(folder), presets.abstract_params(module), param_dtype, sharding)


def _without(tree: Mapping[str, Any], shapes: Mapping[str, Any]) -> Tree:
  """Returns the part of a tree that `shapes` lacks."""
  out = {}
  for name, value in tree.items():
    if name not in shapes:
      out[name] = value
    elif isinstance(value, Mapping) and (rest := _without(value, shapes[name])):
      out[name] = rest
  return out


def _merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tree:
  out = dict(a)
  for name, value in b.items():
    both = name in out and isinstance(value, Mapping)
    out[name] = _merge(out[name], value) if both else value
  return out


def save_preference_model(
  folder: Path, module: StepAwareCLIPModel, params: Tree, *, dtype: Any = jnp.float32
) -> pathlib.Path:
  """Writes config.json and model.safetensors, as `pipelines.save_pipeline` does.

  transformers' `CLIPModel.from_pretrained` opens a plain `CLIPModel` written so.
  """
  step_aware = isinstance(module, StepAwareCLIPModel)
  architecture = "StepAwareCLIPModel" if step_aware else "CLIPModel"
  return _save_single(folder, architecture, module, params, dtype)


def open_judge(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
) -> tuple[Judge, Tree]:
  """Opens a judge's folder; see `load_preference_model` for the arguments."""
  folder = resolve_folder(folder)
  module = Judge(JudgeConfig.from_dict(read_json(folder / "config.json")), dtype)
  shapes = presets.abstract_params(module)
  shardings = sharding(shapes) if callable(sharding) else sharding
  return module, load_tree(weight_files(folder), shapes, param_dtype=param_dtype, sharding=shardings)


def save_judge(folder: Path, module: Judge, params: Tree, *, dtype: Any = jnp.float32) -> pathlib.Path:
  """Writes config.json and model.safetensors, as `pipelines.save_pipeline` does."""
  return _save_single(folder, "Judge", module, params, dtype)


_SINGLE = ("config.json", ("config.json", "model.safetensors"))  # what marks such a folder, and what it holds


def check_out(folder: Path) -> None:
  """Raises FileExistsError for a folder that the functions that save here would not replace."""
  check_replaceable(folder, *_SINGLE)


def _save_single(folder: Path, architecture: str, module: nn.Module, params: Tree, dtype: Any) -> pathlib.Path:
  with replacing(folder, *_SINGLE) as target:
    config = {"architectures": [architecture], **module.config.to_dict()}
    save_network(target, "model", config, params, dtype)
  return pathlib.Path(folder)


def open_latent_reward(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
) -> tuple[LatentRewardModel, Tree]:
  """Opens a latent reward model's folder; see `load_preference_model` for the other arguments.

  Args:
    folder: path or hub name with config.json and model.safetensors, written by `save_latent_reward` or
      scripts/assets/convert_lrm.py.

  Raises:
    FileNotFoundError, ValueError: see `pipelines.load_pipeline`.
  """
  folder = resolve_folder(folder)
  module = LatentRewardModel(_latent_config(folder), dtype)
  shapes = presets.abstract_params(module)
  shardings = sharding(shapes) if callable(sharding) else sharding
  return module, load_network(module, weight_files(folder), shapes, param_dtype, shardings)


def save_latent_reward(
  folder: Path, module: LatentRewardModel, params: Tree, *, dtype: Any = jnp.float32
) -> pathlib.Path:
  """Writes config.json and model.safetensors, as `pipelines.save_pipeline` does."""
  return _save_single(folder, "LatentRewardModel", module, params, dtype)


def is_latent_reward(name: str) -> bool:
  """Returns whether a name is that of a latent reward model and not of a CLIP; true for random models.

  Raises:
    FileNotFoundError, ValueError: it is neither.
  """
  if loading.preset_of(name) is not None:
    return True
  folder = resolve_folder(loading.folder_of(name), "model*.safetensors")
  return _read_no_run(folder).get("model_type") == LATENT_REWARD


def with_text_projection(params: Tree, name: str) -> Tree:
  """Returns the parameters of a latent reward model with a CLIP's text projection instead of its own.

  Args:
    name: the CLIP whose text tower the text-to-image model has; for Stable Diffusion openai/clip-vit-large-patch14.

  Raises:
    ValueError: the model's own text encoder has a projection (SDXL), or another width.
  """
  _, clip = load_clip(loading.folder_of(name))
  given, own = clip["text_projection"]["kernel"], params.get("text_projection", {}).get("kernel")
  if own is None or given.shape != own.shape:
    expected = "none, as its text encoder has one" if own is None else f"one of shape {own.shape}"
    raise ValueError(
      f"config.preference_model={name}: its text projection has the shape {given.shape}; expected {expected}; leave it "
      "out, or give the CLIP of config.model's text encoder."
    )
  return dict(params) | {"text_projection": {"kernel": given}}


def look_for_text_projection(name: str) -> None:
  """Checks that what `with_text_projection` loads exists, fetching it if it has a hub name; reads no weights.

  Raises:
    FileNotFoundError, ValueError: it does not exist, or is no plain CLIP.
  """
  folder, config_dict = read_config(loading.folder_of(name))
  if config_dict.get("model_type") == "step_aware_clip":
    raise ValueError(
      f"config.preference_model={name} is a step-aware preference model; expected a latent reward model, or the CLIP "
      "of config.model's text encoder."
    )
  StepAwareCLIPConfig.from_dict(config_dict)
  weight_files(folder)


def look_for_latent_reward(name: str) -> None:
  """Checks that what `load_latent_reward` loads exists, fetching it if it has a hub name; reads no weights.

  Raises:
    FileNotFoundError, ValueError: see `load_latent_reward`.
  """
  if loading.preset_of(name) is None:
    folder = resolve_folder(loading.folder_of(name))
    _latent_config(folder)
    weight_files(folder)


def load_latent_reward(
  name: str, *, dtype: str, param_dtype: str = "float32", seed: int = 0, sharding: Sharding = None
) -> tuple[LatentRewardModel, Any]:
  """Loads a latent reward model by folder, hub name, or `random:PRESET` (the preset's text-to-image model)."""
  if (preset := loading.preset_of(name)) is not None:
    module = LatentRewardModel(presets.latent_reward_config(preset), jnp.dtype(dtype))
    return _by_preset(name, module, param_dtype, seed, sharding)
  return open_latent_reward(
    loading.folder_of(name), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), sharding=sharding
  )


def load_scorer(
  name: str, *, dtype: str, param_dtype: str = "float32", seed: int = 0, sharding: Sharding = None
) -> tuple[StepAwareCLIPModel, Any]:
  """Loads a step-aware preference model by folder, hub name, shipped name, or `random:PRESET`.

  Raises:
    FileNotFoundError, ValueError: see `load_preference_model`; or the seed is out of range.
  """
  check_seed(seed)
  if (preset := loading.preset_of(name)) is not None:
    return _by_preset(name, StepAwareCLIPModel(preset.preference, jnp.dtype(dtype)), param_dtype, seed, sharding)
  return load_preference_model(
    loading.folder_of(name), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), sharding=sharding
  )


def look_for_scorer(name: str) -> None:
  """Checks that what `load_scorer` loads exists, fetching it if it has a hub name; reads no weights.

  Raises:
    FileNotFoundError, ValueError: see `load_scorer`.
  """
  if loading.preset_of(name) is None:
    folder, config_dict = read_config(loading.folder_of(name))
    StepAwareCLIPConfig.from_dict(config_dict)
    weight_files(folder)


def look_for_judge(name: str | None, *, style: str) -> None:
  """Checks that what `load_judge` loads exists, without reading weights.

  Raises:
    FileNotFoundError, ValueError: see `load_judge`.
  """
  if name and not name.startswith("random:"):
    folder = resolve_folder(loading.folder_of(name))
    check_style(name, JudgeConfig.from_dict(read_json(folder / "config.json")), style)
    weight_files(folder)


def _by_preset(name: str, module: Any, param_dtype: str, seed: int, sharding: Sharding) -> tuple[Any, Tree]:
  """Returns a network and its parameters by random:PRESET, drawn:PRESET or zeros:PRESET."""
  if name.startswith("drawn:"):
    return module, presets.draw_params(module, seed, dtype=jnp.dtype(param_dtype), sharding=sharding)
  params = loading.initialiser(name)(module, jax.random.key(seed))
  return module, jax.tree.map(lambda x: x.astype(param_dtype), params)


def scorer_fingerprint(name: str) -> str:
  """Returns a hash of the weights that `load_scorer` reads; for random ones their name."""
  if loading.preset_of(name) is not None:
    return name
  folder = resolve_folder(loading.folder_of(name), "model*.safetensors")
  return tensors.fingerprint(weight_files(folder))


def load_judge(name: str | None, *, style: str, num_classes: int) -> tuple[Judge | None, Any]:
  """Loads a judge by folder, shipped name, or `random:PRESET`; None, or "" on the command line, for none.

  Raises:
    ValueError: the judge does not know the preferred style, or knows fewer than `num_classes` captions.
  """
  if not name:
    return None, None
  if name.startswith("random:"):
    module = Judge(presets.get_preset(name.removeprefix("random:")).judge)
    params = presets.init_params(module, jax.random.key(1))
  else:
    module, params = open_judge(loading.folder_of(name))
  check_style(name, module.config, style)
  if num_classes > module.config.num_classes:
    raise ValueError(
      f"judge {name} knows {module.config.num_classes} captions, the data (config.data.subset) or "
      f"config.evaluation.candidates ask for {num_classes}; choose fewer or another judge."
    )
  return module, params


def check_style(name: str, config: JudgeConfig, style: str) -> None:
  """Raises ValueError if a judge does not know the preferred style."""
  if style not in config.styles:
    raise ValueError(
      f"judge {name} knows the styles {listed(config.styles) or '(none)'}, not {style!r}; choose one of them "
      "as preferred_style (config.data.preferred_style or --preferred_style), or another judge."
    )
