"""Opens models by name: a folder, a hub name, a shipped model, `random:PRESET`, or a checkpoint in one file.

Each may be NAME+unet=UNET, with another UNet; a file may be FILE+config=FOLDER, where FOLDER gives its topology. Models
with T5 may be NAME+t5=LENGTH, NAME+t5=none or NAME+t5=none,LENGTH, see `with_t5`.

`random:PRESET` has the same numbers on every device, drawn by numpy. `drawn:PRESET` is for measurements at full size:
the device draws the weights in seconds, each in its final precision.
"""

import contextlib
import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.config import AnyConfig
from jaxpref.diffusion import VariancePreserving
from jaxpref.files import folders, pipelines, single_file, tensors, tokenizers
from jaxpref.models import presets
from jaxpref.models.sd3 import presets as sd3_presets
from jaxpref.models.stable_diffusion import StableDiffusion
from jaxpref.models.unet import UNetConfig
from jaxpref.recipes.sections import check_seed

_ASSETS = pathlib.Path(__file__).parents[1] / "assets"
SHIPPED = ("tiny-sd", "tiny-clip", "tiny-spm", "tiny-judge")
KINDS = ("random", "drawn", "zeros")  # before the colon and a preset


UNET = "+unet="  # in a model's name, before the folder or hub name of a UNet that replaces its own
CONFIG = "+config="  # in a checkpoint file's name, before the folder with its topology
T5 = "+t5="  # at the end of a model's name, see `with_t5`


def with_unet(model: str, unet: str | None) -> str:
  """Returns the name of a model with another UNet, if one is given."""
  return f"{model}{UNET}{unet}" if unet else model


def with_config(model: str, folder: str | None) -> str:
  """Returns the name of a checkpoint file with the folder of its topology, if one is given."""
  base, unet = split_unet(model)
  return with_unet(f"{base}{CONFIG}{folder}", unet) if folder else model


def with_t5(model: str, *, drop: bool = False, length: int | None = None) -> str:
  """Returns the name of a model that has been told how to use T5, if anything is to tell.

  Args:
    model: a name without this.
    drop: leaves T5 out; its tokens are then zeros.
    length: number of its tokens; None: the family's own.

  >>> with_t5("folder", drop=True, length=128), with_t5("folder", length=128), with_t5("folder")
  ('folder+t5=none,128', 'folder+t5=128', 'folder')
  """
  told = (["none"] if drop else []) + ([] if length is None else [str(length)])
  return f"{model}{T5}{','.join(told)}" if told else model


def split_t5(name: str) -> tuple[str, bool, int | None]:
  """Returns the arguments of `with_t5` that give a name.

  Raises:
    ValueError: the end of the name is something else.

  >>> split_t5("folder+t5=none,128"), split_t5("folder")
  (('folder', True, 128), ('folder', False, None))
  """
  model, separator, told = str(name).rpartition(T5)
  if not separator:
    return name, False, None
  parts = told.split(",")
  drop = parts[0] == "none"
  numbers = parts[1:] if drop else parts
  if len(numbers) > 1 or not all(number.isdecimal() for number in numbers):
    raise ValueError(f"{name}: {T5}{told}; expected {T5}LENGTH, {T5}none or {T5}none,LENGTH.")
  return model, drop, int(numbers[0]) if numbers else None


def model_name(config: AnyConfig) -> str:
  """Returns the name of config.model with what other fields say of it: MODEL[+config=FOLDER][+unet=UNET][+t5=...]."""
  name = with_unet(with_config(config.model, config.model_config), config.unet_model)
  return with_t5(name, drop=config.drop_t5, length=config.max_sequence_length)


def split_unet(name: str) -> tuple[str, str | None]:
  """Returns MODEL and UNET of MODEL+unet=UNET, where UNET replaces the model's own; else the name and None."""
  model, separator, unet = str(name).partition(UNET)
  return (model, unet) if separator else (name, None)


def split_config(name: str) -> tuple[str, str | None]:
  """Returns FILE and FOLDER of FILE+config=FOLDER, else the name and None; leaves out UNet and T5 of a name."""
  model, separator, folder = str(split_unet(split_t5(name)[0])[0]).partition(CONFIG)
  return model, (str(folder_of(folder)) if separator else None)


def checkpoint_of(name: str) -> tuple[pathlib.Path, str | None] | None:
  """Returns the checkpoint file that a name means, and the folder with its topology; None for other models.

  Raises:
    ValueError: there is such a folder, but the model is not a file.
  """
  model, folder = split_config(name)
  file = single_file.find(model)
  if file is None and folder is not None and not model.startswith("zeros:"):
    folders.refuse_pickles(model)
    raise ValueError(
      f"{single_file.CONFIG} is for a checkpoint in one .safetensors file, which {model} is not; leave it out: folders "
      "have their own config.json files."
    )
  return None if file is None else (file, folder)


def folder_of(name: str) -> str | pathlib.Path:
  """Returns the folder of a shipped model, else the name itself (a folder or a hub name), without +unet=UNET."""
  name, _ = split_unet(name)
  return _ASSETS / name if name in SHIPPED else name


def preset_of(name: str) -> presets.Preset | None:
  """Returns the preset of random:PRESET, drawn:PRESET or zeros:PRESET; None for names that are loaded.

  zeros:FOLDER has the shapes that the config.json files of a model folder describe, zeros:FILE[+config=FOLDER] those of
  a checkpoint. For MODEL+unet=UNET it is the preset of MODEL.
  """
  name, _ = split_unet(name)
  kind, colon, preset = name.partition(":")
  if kind == "zeros" and (checkpoint := checkpoint_of(preset)) is not None:
    return single_file.read_preset(*checkpoint)
  if kind == "zeros" and preset not in presets.PRESETS and (pathlib.Path(preset) / "model_index.json").is_file():
    return pipelines.read_preset(preset)
  if not colon or kind not in KINDS:
    return None
  if preset in sd3_presets.PRESETS:
    raise ValueError(
      f"{name} is a preset of the family stable_diffusion_3; set config.family (--family) to that, or choose one of "
      f"{', '.join(presets.PRESETS)}."
    )
  return presets.get_preset(preset)


def is_random(name: str) -> bool:
  """Returns whether a name is that of a preset of any family, whose weights are not read; raises as `preset_of`."""
  kind, colon, preset = split_t5(name)[0].partition(":")
  return bool(colon and kind in KINDS and preset in sd3_presets.PRESETS) or preset_of(name) is not None


def without_values(name: str) -> str:
  """Returns zeros:PRESET for random:PRESET and drawn:PRESET, and any other name unchanged."""
  return f"zeros:{name.partition(':')[2]}" if is_random(name) else name


def initialiser(name: str) -> Callable[[Any, jax.Array], Any]:
  """Returns the function (network, key) -> parameters for random:PRESET or zeros:PRESET."""
  return presets.zero_params if name.startswith("zeros:") else presets.init_params


def draw_params(
  pipe: Any, *, seed: int, param_dtypes: Mapping[str, str], sharding: pipelines.Sharding, components: Sequence[str]
) -> Any:
  """Returns a pipeline with weights that the device draws, as for drawn:PRESET.

  Args:
    pipe: a pipeline without parameters.
    seed, param_dtypes, sharding, components: see `load_text_to_image`; components without a network are left out.
  """
  params = {}
  for component in components:
    if (module := getattr(pipe, component, None)) is not None:
      of_it = (lambda shapes, c=component: sharding({c: shapes})[c]) if callable(sharding) else sharding
      own = zlib.crc32(f"{component} {seed}".encode())
      params[component] = presets.draw_params(module, own, dtype=jnp.dtype(param_dtypes[component]), sharding=of_it)
  return dataclasses.replace(pipe, params=params)


def place_params(
  pipe: Any, *, param_dtypes: Mapping[str, str], sharding: pipelines.Sharding, components: Sequence[str]
) -> Any:
  """Returns a pipeline of random weights that has some components' parameters, cast, where they belong."""
  chosen = {k: v for k, v in pipe.params.items() if k in components}
  params = {k: jax.tree.map(lambda x, k=k: x.astype(param_dtypes[k]), v) for k, v in chosen.items()}
  if sharding is not None:
    params = jax.device_put(params, sharding(params) if callable(sharding) else sharding)
  return dataclasses.replace(pipe, params=params)


def replace_vae(pipe: Any, vae_model: str, *, of: str, param_dtype: Any, sharding: pipelines.Sharding) -> Any:
  """Returns a pipeline, named `of`, with another VAE; raises ValueError if that was made for another model."""
  if (file := single_file.find(vae_model)) is not None:
    params = single_file.load_alone(file, "vae", pipe.vae, param_dtype=param_dtype, sharding=sharding)
    return dataclasses.replace(pipe, params={**pipe.params, "vae": params})
  vae, params = pipelines.load_vae(vae_model, dtype=pipe.vae.dtype, param_dtype=param_dtype, sharding=sharding)
  found, expected = ((c.latent_channels, c.downscale, c.scaling_factor) for c in (vae.config, pipe.vae.config))
  if found != expected:
    raise ValueError(
      f"vae_model={vae_model}: latent channels, downscaling and scaling factor are {found}, those of {of} "
      f"{expected}; choose a VAE that was made for this model."
    )
  return dataclasses.replace(pipe, vae=vae, params={**pipe.params, "vae": params})


def _replace_unet(
  pipe: pipelines.Pipeline, unet: str, *, param_dtype: Any, sharding: pipelines.Sharding, with_params: bool
) -> pipelines.Pipeline:
  """Returns a pipeline with another UNet; takes what `pipelines.replace_unet` does, and also a file."""
  if (file := single_file.find(unet)) is None:
    return pipelines.replace_unet(pipe, unet, param_dtype=param_dtype, sharding=sharding, with_params=with_params)
  params = {k: v for k, v in pipe.params.items() if k != "unet"}
  if with_params:
    params["unet"] = single_file.load_alone(file, "unet", pipe.unet, param_dtype=param_dtype, sharding=sharding)
  return dataclasses.replace(pipe, params=params)


def load_text_to_image(
  name: str,
  *,
  dtype: str,
  seed: int = 0,
  param_dtype: str | Mapping[str, str] = "float32",
  sharding: pipelines.Sharding = None,
  vae_model: str | None = None,
  components: Sequence[str] = pipelines.NETWORKS,
) -> pipelines.Pipeline:
  """Returns a pipeline by a name that this module knows; see `pipelines.load_pipeline` for other arguments.

  Args:
    vae_model: folder or hub name of a VAE that replaces the pipeline's, or a file that holds one.
    components: networks whose parameters are read.

  Raises:
    ValueError: the VAE's latents do not fit the pipeline, or the seed is out of range.
  """
  check_seed(seed)
  look_for_parts(name, vae_model if "vae" in components else None)
  param_dtypes = dict.fromkeys(pipelines.NETWORKS, param_dtype) if isinstance(param_dtype, str) else param_dtype
  if vae_model and "vae" in components:
    others = [c for c in components if c != "vae"]
    pipe = load_text_to_image(
      name, dtype=dtype, seed=seed, param_dtype=param_dtype, sharding=sharding, components=others
    )
    of_vae = (lambda shapes: sharding({"vae": shapes})["vae"]) if callable(sharding) else sharding
    return replace_vae(pipe, vae_model, of=name, param_dtype=param_dtypes["vae"], sharding=of_vae)
  base, unet = split_unet(name)
  if unet:
    of_unet = (lambda shapes: sharding({"unet": shapes})["unet"]) if callable(sharding) else sharding
    others = [c for c in components if c != "unet"]
    pipe = load_text_to_image(
      base, dtype=dtype, seed=seed, param_dtype=param_dtypes, sharding=sharding, components=others
    )
    read = "unet" in components
    return _replace_unet(pipe, unet, param_dtype=param_dtypes["unet"], sharding=of_unet, with_params=read)
  if (checkpoint := checkpoint_of(name)) is not None:
    return single_file.load(
      *checkpoint, dtype=jnp.dtype(dtype), param_dtype=param_dtypes, sharding=sharding, components=components
    )
  if (preset := preset_of(name)) is not None:
    made: dict[str, Any] = {"param_dtypes": param_dtypes, "sharding": sharding, "components": components}
    known = name.partition(":")[2]
    if name.startswith("drawn:"):
      pipe = pipelines.random_pipeline(known, dtype=jnp.dtype(dtype), components=())
      return draw_params(pipe, seed=seed, **made)
    pipe = pipelines.random_pipeline(
      known if known in presets.PRESETS else preset,
      seed,
      dtype=jnp.dtype(dtype),
      init=initialiser(name),
      components=tuple(components),
    )
    return place_params(pipe, **made)
  return pipelines.load_pipeline(
    folder_of(name), dtype=jnp.dtype(dtype), param_dtype=param_dtypes, sharding=sharding, components=components
  )


def look_for_parts(name: str, vae_model: str | None) -> None:
  """Checks that the VAE and the UNet that replace a model's own exist, fetching those with hub names.

  Raises:
    FileNotFoundError, ValueError: as `load_text_to_image`, before anything large is read.
  """
  unet = split_unet(name)[1]
  if vae_model and (file := single_file.find(vae_model)) is not None:
    single_file.check_alone(file, "vae")
  elif vae_model:
    pipelines.vae_folder(vae_model)
  if unet and (file := single_file.find(unet)) is not None:
    single_file.check_alone(file, "unet")
  elif unet:
    folders.read_json(pipelines.unet_folder(unet) / "config.json")


def look_for(name: str, vae_model: str | None = None) -> None:
  """Checks that a pipeline of `load_text_to_image` exists, fetching it if it has a hub name; reads no weights.

  Raises:
    FileNotFoundError, ValueError: as `load_text_to_image`.
  """
  if (checkpoint := checkpoint_of(name)) is not None:
    single_file.read_preset(*checkpoint)
  elif preset_of(name) is None:
    folders.read_json(folders.resolve_folder(folder_of(name), "*/*.safetensors") / "model_index.json")
  look_for_parts(name, vae_model)


def unet_config(name: str) -> UNetConfig:
  """Returns the UNet's config of a pipeline, without reading weights; takes a name of `load_text_to_image`."""
  base, unet = split_unet(name)
  if unet and single_file.find(unet) is None:
    return UNetConfig.from_dict(folders.read_json(pipelines.unet_folder(unet) / "config.json"))
  if (preset := preset_of(base)) is not None:
    return preset.unet
  if (checkpoint := checkpoint_of(base)) is not None:
    return single_file.read_preset(*checkpoint).unet
  file = folders.resolve_folder(folder_of(name), "*/*.safetensors") / "unet" / "config.json"
  return UNetConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))


def weight_files(name: str) -> dict[str, list[tensors.Source]]:
  """Returns the files of a pipeline's weights by component; none for random ones, which name and seed determine."""
  base, unet = split_unet(name)
  found: dict[str, list[tensors.Source]] = {}
  if (checkpoint := checkpoint_of(base)) is not None:
    found = single_file.weight_files(*checkpoint)
  elif preset_of(base) is None:
    folder = folders.resolve_folder(folder_of(base), "*/*.safetensors")
    own = [n for n in pipelines.NETWORKS if (folder / n).is_dir() and not (unet and n == "unet")]
    found = {n: list(tensors.weight_files(folder / n)) for n in own}
  if unet:
    file = single_file.find(unet)
    found["unet"] = list(tensors.weight_files(pipelines.unet_folder(unet))) if file is None else [file]
  return {n: found[n] for n in pipelines.NETWORKS if n in found}


def vae_files(name: str) -> list[tensors.Source]:
  """Returns the files of a VAE that replaces a model's own."""
  if (file := single_file.find(name)) is not None:
    return [file]
  return list(tensors.weight_files(folders.resolve_folder(name, "diffusion_pytorch_model*.safetensors")))


def text_to_image(
  pipe: pipelines.Pipeline, *, lora_scale: float = 1.0, vae_slicing: int | None = None
) -> StableDiffusion:
  """Returns the pure functions of a loaded pipeline."""
  return StableDiffusion(
    unet=pipe.unet,
    vae=pipe.vae,
    text_encoder=pipe.text_encoder,
    text_encoder_2=pipe.text_encoder_2,
    process=VariancePreserving(pipe.schedule),
    lora_scale=lora_scale,
    zero_empty_prompt=pipe.force_zeros_for_empty_prompt,
    vae_slicing=vae_slicing,
  )


def tiny_tokenize(captions: list[str]) -> np.ndarray:
  return tokenizers.tokenize(tokenizers.tiny_tokenizer(), captions, length=presets.TINY_LENGTH)


def load_tokenizer(*models: str) -> Any:
  """Returns the CLIP tokenizer of the first model that has one: a pipeline, or a CLIP with its tokenizer beside it.

  Raises:
    FileNotFoundError: no model has one.
  """
  for name in models:
    name = split_t5(name)[0]
    if is_random(name):
      return tokenizers.tiny_tokenizer()
    if (checkpoint := checkpoint_of(name)) is not None:
      return single_file.tokenizer(*checkpoint)
    folder = folders.resolve_folder(folder_of(name), "tokenizer/*.safetensors")  # no weights
    for place in (folder / "tokenizer", folder):
      with contextlib.suppress(FileNotFoundError):
        return tokenizers.load_tokenizer(place)
  raise FileNotFoundError(f"none of {', '.join(models)} has a CLIP tokenizer; expected vocab.json and merges.txt.")
