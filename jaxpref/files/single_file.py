"""Opens checkpoints in one .safetensors file, in the layout of the original Stable Diffusion code, ComfyUI and civitai.

Their topology is that of a published model, recognised by the names and shapes of their tensors, or that of a folder of
config.json files.
"""

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpref.files import folders, hub, original_layout, pipelines, tensors, tokenizers
from jaxpref.files.original_layout import Shapes
from jaxpref.models import presets
from jaxpref.models.deduce import kind_of
from jaxpref.recipes import places

CONFIG = "config.model_config (--model_config)"
_CONFIG_REMEDY = f"give {CONFIG}, a folder of the config.json files of the same model"


@dataclasses.dataclass(frozen=True)
class Known:
  """A published topology.

  Attributes:
    name: its name, for messages.
    key, shape: name and shape of a tensor that only this topology has.
    preset: its architectures.
    repository: the hub name whose tokenizers are used.
    said: what the tensors do not tell, for a warning.
  """

  name: str
  key: str
  shape: tuple[int, ...]
  preset: presets.Preset
  repository: str
  said: str = ""


_TO_K = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.{}.attn2.to_k.weight"
KNOWN = (
  Known(
    "Stable Diffusion 1",
    _TO_K.format(1, 0),
    (320, 768),
    presets.SD15,
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
  ),
  Known(
    "Stable Diffusion 2",
    _TO_K.format(1, 0),
    (320, 1024),
    presets.SD2,
    "stabilityai/stable-diffusion-2-1",
    f"the file does not say whether it predicts v at 768 pixels or noise at 512; v is assumed, as in diffusers: for a "
    f"base model give {CONFIG}",
  ),
  Known(
    "Stable Diffusion XL",
    _TO_K.format(4, 1),
    (640, 2048),
    presets.SDXL,
    "stabilityai/stable-diffusion-xl-base-1.0",
  ),
)

# What a file is that is not one of these text-to-image models; the first pattern that matches one of its names wins.
_NOT_IMPLEMENTED = "take a model of Stable Diffusion 1, 2 or XL"
_OTHERS = {
  "the refiner of Stable Diffusion XL": r"conditioner\.embedders\.0\.model\.",
  "Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.",
  "Chroma": r"(model\.diffusion_model\.)?distilled_guidance_layer\.",
  "Flux": r"(model\.diffusion_model\.)?double_blocks\.",
  "AuraFlow": r"(model\.)?double_layers\.",
  "Lumina 2": r"(model\.diffusion_model\.)?cap_embedder\.",
  "Stable Cascade": r"clip_txt_mapper\.|down_blocks\.\d+\.\d+\.channelwise\.",
  "a model of EDM noise (Playground 2.5, CosXL)": r"edm_mean$|edm_vpred\.",
  "a video model": r".*(time_stack|temporal_transformer|motion_modules)\.",
  "an unCLIP model of Stable Diffusion 2": r"embedder\.model\.visual\.",
  "a ControlNet": r"control_model\.|controlnet_",
}
_PART_NAMES = {  # one network alone, without its prefix in a whole checkpoint
  "a LoRA": r".*[._](lora|lokr|hada|oft)_",
  "a UNet": r"input_blocks\.",
  "a text encoder": r"(transformer\.)?(resblocks\.|text_model\.)|encoder\.block\.",
  "a textual inversion": r"emb_params$|clip_[lg]$|string_to_param",
}
_REMEDIES = {  # by a word in the name of the kind
  "Stable Diffusion 3": "give its folder in the layout of diffusers, which is of config.family=stable_diffusion_3",
  "LoRA": "give it as --lora (config.lora.init_from) beside a model",
  "VAE": "give it as config.vae_model (--vae_model) beside a model",
  "UNet": "give it as config.unet_model (--unet_model) beside a model",
}
_MISSING = {
  "vae": "the VAE; give one as config.vae_model (--vae_model)",
  "text_encoder": "the text encoder; use a whole model",
  "text_encoder_2": "the second text encoder; use a whole model",
}
_CALLED = {"unet": "its UNet", "vae": "its VAE", "text_encoder": "its text encoder"}
_CALLED["text_encoder_2"] = "its second text encoder"


def find(name: tensors.Path) -> pathlib.Path | None:
  """Returns the file that a model's name means; None for folders and other names."""
  file = pathlib.Path(places.expand(str(name)))
  return file if file.suffix == ".safetensors" and file.is_file() else None


def _first(table: Mapping[str, str], names: Iterable[str]) -> str | None:
  """Returns the first key of a table whose pattern matches the beginning of a name."""
  known = list(names)
  return next((kind for kind, pattern in table.items() if any(re.match(pattern, name) for name in known)), None)


def _kind(shapes: Shapes) -> str | None:
  """Returns what a file is if it is not a Stable Diffusion model; None if its names do not tell."""
  prefixes = "|".join(re.escape(prefix) for several in original_layout.PLACES.values() for prefix, _ in several)
  bare = [re.sub(f"^(?:{prefixes})", "", key) for key in shapes]
  return _first(_OTHERS, shapes) or _first(_PART_NAMES, bare) or kind_of(bare)


def check(file: pathlib.Path, shapes: Shapes) -> None:
  """Raises a ValueError that says what a file is, unless it has a text-to-image UNet in the original layout."""
  kind = _first(_OTHERS, shapes)
  if original_layout.place("unet", shapes) is None:
    kind = kind or _kind(shapes)
    said = f"is {kind}" if kind else "has no tensors named model.diffusion_model.input_blocks"
    remedy = next((what for name, what in _REMEDIES.items() if name in (kind or "")), _NOT_IMPLEMENTED)
    raise ValueError(
      f"{file} {said}, expected a whole checkpoint in the layout of the original code of Stable Diffusion; {remedy}."
    )
  if kind is not None:
    raise ValueError(f"{file} is {kind}, which is not implemented; {_NOT_IMPLEMENTED}.")
  channels = shapes["model.diffusion_model.input_blocks.0.0.weight"][1]
  if channels in pipelines.OTHER_INPUTS:
    raise ValueError(
      f"{file}: its UNet takes {pipelines.OTHER_INPUTS[channels]}, {channels} channels instead of 4; take a "
      "text-to-image model."
    )


def recognise(file: pathlib.Path, shapes: Shapes) -> Known:
  """Returns the published topology that a file's tensors have.

  Raises:
    ValueError: they have none of them.
  """
  known = next((k for k in KNOWN if shapes.get(k.key) == k.shape), None)
  if known is None:
    raise ValueError(
      f"{file}: its tensors have the shapes of none of {', '.join(k.name for k in KNOWN)}; {_CONFIG_REMEDY}."
    )
  if "v_pred" in shapes:  # an empty tensor with which ComfyUI marks models that predict v
    scheduler = known.preset.scheduler | {"prediction_type": "v_prediction"}
    scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in shapes else {}
    known = dataclasses.replace(known, preset=dataclasses.replace(known.preset, scheduler=scheduler), said="")
  return known


def read_shapes(file: pathlib.Path) -> Shapes:
  """Returns the shapes of a file's tensors; raises as `check` does."""
  shapes = tensors.read_shapes(file)
  check(file, shapes)
  return shapes


def _config_folder(folder: tensors.Path) -> pathlib.Path:
  """Returns the folder that gives a topology, fetched without weights if it is on the hub."""
  try:
    return folders.resolve_folder(folder, "*.no_weights")
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{CONFIG}: {error}") from error


def read_preset(file: pathlib.Path, folder: tensors.Path | None) -> presets.Preset:
  """Returns the architectures of a checkpoint; checks its tensors against them.

  Raises:
    FileNotFoundError, ValueError: as `load`, except for tokenizers.
  """
  shapes = read_shapes(file)
  preset = recognise(file, shapes).preset if folder is None else pipelines.read_preset(_config_folder(folder))
  modules = pipelines.modules_of(preset)
  unet = parts(file, shapes, {"unet": modules["unet"]}, folder)["unet"]
  folders.check_network(modules["unet"], unet, presets.abstract_params(modules["unet"]))
  return dataclasses.replace(preset, preference=None, judge=None)


def open_pipeline(file: pathlib.Path, shapes: Shapes, folder: tensors.Path | None, *, dtype: Any) -> pipelines.Pipeline:
  """Returns the pipeline of a checkpoint without parameters.

  Args:
    file: the checkpoint.
    shapes: shapes of its tensors.
    folder: folder with config.json files and tokenizers that gives its topology; None: a published topology.
    dtype: compute dtype.
  """
  if folder is not None:
    return pipelines.open_pipeline(_config_folder(folder), dtype=dtype)
  known = recognise(file, shapes)
  if known.said:
    warnings.warn(f"{file} is {known.name}: {known.said}.", stacklevel=2)
  pipe = pipelines.random_pipeline(known.preset, dtype=dtype, components=())
  try:
    place = hub.fetch(known.repository, "*.no_weights")
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{file} is {known.name}, but the tokenizer of {known.repository} {hub.said(error)}; or give {CONFIG}, a folder "
      "that has the tokenizer."
    ) from error
  names = ["tokenizer"] if pipe.text_encoder_2 is None else ["tokenizer", "tokenizer_2"]
  found: dict[str, Any] = {name: tokenizers.load_tokenizer(place / name) for name in names}
  return dataclasses.replace(pipe, **found)


def parts(
  file: pathlib.Path, shapes: Shapes, modules: Mapping[str, Any], folder: tensors.Path | None
) -> dict[str, list[tensors.Source]]:
  """Returns where networks, without parameters, are in a checkpoint.

  Raises:
    ValueError: the checkpoint lacks one of them.
  """
  described = recognise(file, shapes).name if folder is None else str(folder)
  found: dict[str, list[tensors.Source]] = {}
  for name, module in modules.items():
    pieces = dict(original_layout.pieces(name, shapes, module.config))
    if not pieces:
      raise ValueError(f"{file} does not hold {_MISSING[name]}.")
    if name.startswith("text_encoder") and not module.with_projection:
      pieces.pop("text_projection.weight", None)
    found[name] = [tensors.Part(file, _CALLED[name], described, _CONFIG_REMEDY, pieces)]
  return found


def load(
  file: pathlib.Path,
  folder: tensors.Path | None,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any | Mapping[str, Any] = jnp.float32,
  sharding: tensors.Sharding = None,
  components: Sequence[str] = pipelines.NETWORKS,
) -> pipelines.Pipeline:
  """Opens a whole checkpoint in one .safetensors file.

  Ignores averages of the weights in it (model_ema.*), with a warning.

  Args:
    file: the checkpoint.
    folder: path or hub name of a folder in the layout of diffusers with the checkpoint's config.json files and
      tokenizers; None: it is one of KNOWN, with tokenizers from the hub's cache.
    dtype, param_dtype, sharding, components: see `pipelines.load_pipeline`.

  Raises:
    FileNotFoundError: no tokenizers are available.
    ValueError: it is something else, lacks a network, or has other tensors than its topology describes.
  """
  shapes = read_shapes(file)
  pipe = open_pipeline(file, shapes, folder, dtype=dtype)
  if components and any(key.startswith("model_ema.") for key in shapes):
    warnings.warn(f"{file}: model_ema.*, averages of its weights, are not read.", stacklevel=2)
  modules = {name: module for name in components if (module := getattr(pipe, name)) is not None}
  files, place = parts(file, shapes, modules, folder), pathlib.Path(folder or file)
  return pipelines.load_params(pipe, files, place, param_dtype=param_dtype, sharding=sharding)


def tokenizer(file: pathlib.Path, folder: tensors.Path | None) -> Any:
  """Returns the (first) tokenizer of a checkpoint; see `load` for the arguments."""
  return open_pipeline(file, read_shapes(file), folder, dtype=jnp.float32).tokenizer


def weight_files(file: pathlib.Path, folder: tensors.Path | None) -> dict[str, list[tensors.Source]]:
  """Returns the existing parts of a checkpoint; see `load` for the arguments."""
  shapes = read_shapes(file)
  preset = recognise(file, shapes).preset if folder is None else pipelines.read_preset(_config_folder(folder))
  modules = pipelines.modules_of(preset)
  there = {name: modules[name] for name in modules if original_layout.place(name, shapes) is not None}
  return parts(file, shapes, there, folder)


def check_alone(file: pathlib.Path, component: str) -> Shapes:
  """Returns the shapes of a file's tensors; raises ValueError unless it holds a "unet" or a "vae", alone or not."""
  shapes = tensors.read_shapes(file)
  if not original_layout.holds(component, shapes):
    kind, expected = _kind(shapes), _CALLED[component].replace("its", "a")
    said = f"is {kind}" if kind else "holds other tensors"
    raise ValueError(
      f"{file} {said}, expected {expected} in the layout of diffusers or of the original code; choose another file."
    )
  return shapes


def load_alone(
  file: pathlib.Path, component: str, module: Any, *, param_dtype: Any = jnp.float32, sharding: tensors.Sharding = None
) -> tensors.Tree:
  """Reads the parameters of a network from a file that holds it, alone or with others.

  Args:
    file: a file in the original layout or that of diffusers.
    component: "unet" or "vae".
    module: the network to read parameters of.
    param_dtype, sharding: see `tensors.load_tree`.

  Raises:
    ValueError: the file does not hold such a network.
  """
  shapes = check_alone(file, component)
  pieces = original_layout.pieces_alone(component, shapes, module.config)
  own = _CALLED[component].replace("its", "the model's own")
  part = tensors.Part(file, _CALLED[component], own, "choose one that was made for this model", pieces)
  tree = presets.abstract_params(module)
  return folders.load_network(module, [part], tree, param_dtype, sharding(tree) if callable(sharding) else sharding)
