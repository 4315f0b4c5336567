"""The family of Stable Diffusion 3 and 3.5, behind the interface `files.family.Family`.

Besides folders and hub names it knows `random:PRESET`, `drawn:PRESET` and `zeros:PRESET` with a preset of
`models.sd3.presets`. The end of a name may say how T5 is used, see `loading.with_t5`.
"""

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.diffusion import flow_from_config
from jaxpref.files import adapters, folders, loading, pipelines, sd3, sd3_adapters, tensors
from jaxpref.models import presets
from jaxpref.models.sd3.model import StableDiffusion3, flow_of
from jaxpref.models.sd3.presets import PRESETS, SD3Preset
from jaxpref.models.sd3.transformer import REMAT, constant_shapes
from jaxpref.recipes.sections import check_seed

Tree = Any
NAME = "stable_diffusion_3"
CLASS = "StableDiffusion3Pipeline"
LENGTH = 256  # tokens of T5 by default, as in diffusers
REMEDY = "take a complete folder, or leave T5 out: MODEL+t5=none, in a recipe config.drop_t5=True"


def recognises(name: str) -> bool:
  """Returns whether a model's name is certainly one of this family: a preset's, or a folder's here."""
  base, _ = loading.split_config(name)
  if _preset_name(base) is not None or base in StableDiffusion3Family.published:
    return True
  index = pathlib.Path(base) / "model_index.json"
  try:
    return json.loads(index.read_text(encoding="utf-8")).get("_class_name") == CLASS
  except (OSError, ValueError, AttributeError):
    return False


def _preset_name(base: str) -> str | None:
  kind, _, preset = base.partition(":")
  return preset if kind in loading.KINDS and preset in PRESETS else None


class StableDiffusion3Family:
  """Stable Diffusion 3 and 3.5, in diffusers' folders. See `Family`."""

  networks = (*sd3.NETWORKS, sd3.CONSTANTS)
  denoiser = "transformer"
  # Published models with shapes that are known without their files.
  published: Mapping[str, str] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
  }

  def load(
    self,
    name: str,
    *,
    dtype: str,
    seed: int = 0,
    param_dtype: str | Mapping[str, str] = "float32",
    sharding: pipelines.Sharding = None,
    vae_model: str | None = None,
    components: Sequence[str] | None = None,
  ) -> sd3.SD3Pipeline:
    check_seed(seed)
    base, drop, length = loading.split_t5(name)
    asked = [n for n in (self.networks if components is None else components) if not (drop and n == sd3.T5)]
    param_dtypes = dict.fromkeys(self.networks, param_dtype) if isinstance(param_dtype, str) else param_dtype
    others = [n for n in asked if not (vae_model and n == "vae")]
    made: dict[str, Any] = {"param_dtypes": param_dtypes, "sharding": sharding, "components": others}
    if (preset := _preset_of(base, drop=drop)) is not None:
      pipe = _of_preset(base, preset, dtype=dtype, seed=seed, **made)
    else:
      pipe = _of_folder(base, dtype=dtype, drop=drop, length=length, **made)
    pipe = sd3.without_t5(pipe) if drop else pipe
    pipe = dataclasses.replace(pipe, max_sequence_length=_length(pipe, length))
    if not vae_model or "vae" not in asked:
      return pipe
    of_vae = (lambda shapes: sharding({"vae": shapes})["vae"]) if callable(sharding) else sharding
    return loading.replace_vae(pipe, vae_model, of=name, param_dtype=param_dtypes["vae"], sharding=of_vae)

  def model(
    self,
    pipe: sd3.SD3Pipeline,
    *,
    remat: str = "none",
    lora_scale: float = 1.0,
    vae_slicing: int | None = None,
    clip_skip: int | None = None,
    sampler: str = "ddim",
  ) -> StableDiffusion3:
    del sampler  # each has the noise levels of the model's process
    if remat not in REMAT:
      raise ValueError(f"config.remat={remat!r}; expected one of {', '.join(REMAT)}: the transformer has no levels.")
    c = pipe.transformer.config
    return StableDiffusion3(
      **pipe.modules | {"transformer": pipe.transformer.clone(remat=remat)},
      process=flow_of(flow_from_config(pipe.scheduler_config), (c.sample_size // c.patch_size) ** 2),
      max_sequence_length=pipe.max_sequence_length,
      lora_scale=lora_scale,
      clip_skip=clip_skip,
      vae_slicing=vae_slicing,
    )

  def save(self, folder: pathlib.Path, pipe: sd3.SD3Pipeline, *, dtype: Any) -> None:
    sd3.save_pipeline(folder, pipe, dtype=dtype)

  def load_adapter(self, file: str, pipe: sd3.SD3Pipeline) -> tuple[Tree, float]:
    return sd3_adapters.load_lora(file, pipe.params["transformer"])

  def save_adapter(
    self, file: pathlib.Path, adapter: Tree, scale: float, *, name: str, form: str = "lora", dtype: Any = jnp.float32
  ) -> None:
    del name
    sd3_adapters.save_lora(file, adapter, scale, form=form, dtype=dtype)

  def with_adapters(self, pipe: sd3.SD3Pipeline, loras: Sequence[adapters.LoraFile]) -> tuple[dict[str, Tree], float]:
    return sd3_adapters.with_adapters(pipe.params, loras)

  def without_values(self, name: str) -> str:
    base, drop, length = loading.split_t5(name)
    preset = self.published.get(base, _preset_name(base))
    if preset is None:
      try:
        folder = folders.resolve_folder(base, "*.no_weights")
        sd3.read_preset(folder, t5=not drop)
      except (FileNotFoundError, ValueError) as error:
        raise ValueError(
          f"config.model={base}: its shapes are not known here; expected random:PRESET with one of "
          f"{', '.join(PRESETS)}, one of {', '.join(self.published)}, or a model folder: {error}"
        ) from error
      preset = str(folder)
    return loading.with_t5(f"zeros:{preset}", drop=drop, length=length)

  def weight_files(self, name: str) -> Mapping[str, Sequence[tensors.Source]]:
    base, drop, _ = loading.split_t5(name)
    if _preset_of(base) is not None:
      return {}
    folder = folders.resolve_folder(base, "*/*.safetensors")
    own = [n for n in sd3.NETWORKS if (folder / n).is_dir() and not (drop and n == sd3.T5)]
    return {n: tensors.weight_files(folder / n) for n in own}

  def look_for(self, name: str, vae_model: str | None = None) -> None:
    """Checks what `load` would open, without reading weights; see `family.look_for`."""
    base, drop, length = loading.split_t5(name)
    if _preset_of(base) is None:
      _check_folder(folders.resolve_folder(base, "*/*.safetensors"), drop=drop, length=length)
    loading.look_for_parts(base, vae_model)


def _preset_of(base: str, *, drop: bool = False) -> SD3Preset | None:
  """Returns the preset of a name without T5's end; None for names of folders. zeros:FOLDER has that folder's shapes.

  Raises:
    ValueError: it is a name of Stable Diffusion 1.x, 2.x or XL.
  """
  for mark, field in ((loading.UNET, "unet_model"), (loading.CONFIG, "model_config")):
    if mark in base:
      raise ValueError(f"{base}: {field} is for Stable Diffusion with a UNet, not for {NAME}; leave it out.")
  kind, colon, preset = base.partition(":")
  if base in loading.SHIPPED or (colon and kind in loading.KINDS and preset in presets.PRESETS):
    raise ValueError(
      f"{base} is a model of the family stable_diffusion, expected one of {NAME}: a folder, a hub name or "
      f"random:PRESET with one of {', '.join(PRESETS)}; or leave config.family (--family) at stable_diffusion."
    )
  if not colon or kind not in loading.KINDS:
    return None
  if kind == "zeros" and (pathlib.Path(preset) / "model_index.json").is_file():
    return sd3.read_preset(preset, t5=not drop)
  if preset not in PRESETS:
    raise ValueError(f"{base}: the preset is unknown, expected one of {', '.join(PRESETS)}.")
  return PRESETS[preset]


def _of_preset(
  base: str,
  preset: SD3Preset,
  *,
  dtype: str,
  seed: int,
  param_dtypes: Mapping[str, str],
  sharding: pipelines.Sharding,
  components: Sequence[str],
) -> sd3.SD3Pipeline:
  """Returns a pipeline with random weights, or zeros; see `Family.load`."""
  made: dict[str, Any] = {"param_dtypes": param_dtypes, "sharding": sharding, "components": components}
  if base.startswith("drawn:"):
    return loading.draw_params(sd3.random_pipeline(preset, dtype=jnp.dtype(dtype), components=()), seed=seed, **made)
  init = loading.initialiser(base)
  pipe = sd3.random_pipeline(preset, seed, dtype=jnp.dtype(dtype), init=init, components=components)
  if base.startswith("zeros:") and set(components) & {"transformer", sd3.CONSTANTS}:  # as a folder has them
    shapes = constant_shapes(preset.transformer)
    table = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    pipe = dataclasses.replace(pipe, params=pipe.params | {sd3.CONSTANTS: table})
    made["components"] = [*components, sd3.CONSTANTS]
  return loading.place_params(pipe, **made)


def _of_folder(
  base: str,
  *,
  dtype: str,
  drop: bool,
  length: int | None,
  param_dtypes: Mapping[str, str],
  sharding: pipelines.Sharding,
  components: Sequence[str],
) -> sd3.SD3Pipeline:
  """Returns a folder's pipeline; see `Family.load`."""
  folder = folders.resolve_folder(base, "*/*.safetensors")
  _check_folder(folder, drop=drop, length=length)
  return sd3.load_pipeline(
    folder,
    dtype=jnp.dtype(dtype),
    param_dtype=param_dtypes,
    sharding=sharding,
    components=components,
    max_sequence_length=length or LENGTH,
    t5=not drop,
  )


def _check_folder(folder: pathlib.Path, *, drop: bool, length: int | None) -> None:
  """Raises for a folder that lacks T5 though it is asked for, and for noise levels that no sampler can use."""
  modules = {}
  try:
    modules = sd3.read_modules(folder, t5=not drop)
  except FileNotFoundError as error:
    if sd3.T5 not in str(error):
      raise
    raise FileNotFoundError(f"{folder / sd3.T5 / 'config.json'} is missing; {REMEDY}.") from None
  if length is not None and not drop and sd3.T5 not in modules:
    raise ValueError(
      f"{folder / 'model_index.json'} has no {sd3.T5}, expected T5, whose {length} tokens are asked for "
      f"(max_sequence_length); {REMEDY}."
    )
  if sd3.T5 not in modules and not drop:
    warnings.warn(
      f"{folder / 'model_index.json'} has no {sd3.T5}: T5's tokens are zeros, as in diffusers; config.drop_t5=True "
      "says so without this warning.",
      stacklevel=2,
    )
  file = folder / "scheduler" / "scheduler_config.json"
  try:
    flow_from_config(folders.read_json(file))
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def _length(pipe: sd3.SD3Pipeline, given: int | None) -> int:
  """Returns the tokens of T5: those given, or LENGTH; for miniatures as few as their CLIPs read."""
  if given is not None and not 1 <= given <= sd3.MAX_SEQUENCE_LENGTH:
    raise ValueError(f"max_sequence_length={given}; expected 1 to {sd3.MAX_SEQUENCE_LENGTH} tokens of T5.")
  of_clip = pipe.text_encoder.config.max_position_embeddings
  return given or (LENGTH if of_clip == 77 else of_clip)
