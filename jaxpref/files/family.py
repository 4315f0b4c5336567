"""Families of text-to-image models: how config.model is opened, adapted and written, behind the interface `Family`.

A family is an object with the functions of `Family`; `config.family` names one of the table, or your own as
package.module:NAME (docs/extending.md).
"""

import contextlib
import dataclasses
import inspect
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion import VariancePreserving
from jaxpref.files import adapters, folders, loading, pipelines, sd3_family, tensors
from jaxpref.models import lora, presets
from jaxpref.models.base import Model
from jaxpref.models.stable_diffusion import StableDiffusion
from jaxpref.recipes import own
from jaxpref.recipes.own import load_named
from jaxpref.recipes.sizes import Size, sides

Tree = Any


class Pipeline(Protocol):
  """A loaded model; a dataclass, so that `dataclasses.replace` can give it other parameters.

  Attributes:
    params: parameters by component, of the components that were asked for.
  """

  @property
  def params(self) -> dict[str, Tree]: ...

  def tokenize(self, captions: list[str]) -> np.ndarray:
    """Returns i32[n, L] token ids."""
    ...


class Family(Protocol):
  """What a family knows that others do not.

  Attributes:
    networks: components that have parameters. What the denoiser needs besides its own, such as constants, has a name
      that begins with the denoiser's.
    denoiser: the component that is trained; an adapter of it is the component `DENOISER_lora`.
  """

  @property
  def networks(self) -> tuple[str, ...]: ...

  @property
  def denoiser(self) -> str: ...

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
  ) -> Pipeline:
    """Opens a model by any value of `config.model`.

    Args:
      dtype: dtype of computation.
      seed: seed of random weights.
      param_dtype: dtype of parameters, or one by component.
      sharding: where arrays go as they are read: None, one Sharding, or a function of shapes by component.
      vae_model: an autoencoder instead of the model's own.
      components: networks whose parameters are read; None: all.

    Raises:
      FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
    """
    ...

  def model(
    self,
    pipe: Any,
    *,
    remat: str = "none",
    lora_scale: float = 1.0,
    vae_slicing: int | None = None,
    clip_skip: int | None = None,
    sampler: str = "ddim",
  ) -> Model:
    """Returns the pure functions of a loaded model.

    Args:
      remat: see `config.remat`.
      lora_scale: alpha / rank of an adapter.
      vae_slicing: images that the autoencoder computes at a time; None: all.
      clip_skip: layers of the text encoder to leave out.
      sampler: name of a sampler of `evaluation.drawing`, if it needs something of its own.

    Raises:
      ValueError: the family does not have something asked for.
    """
    ...

  def save(self, folder: pathlib.Path, pipe: Any, *, dtype: Any) -> None:
    """Writes a folder that `load` opens, with the precision `dtype`."""
    ...

  def load_adapter(self, file: str, pipe: Any) -> tuple[Tree, float]:
    """Returns an f32 adapter of the denoiser to continue, and its scale alpha / rank; ValueError if it does not fit."""
    ...

  def save_adapter(
    self, file: pathlib.Path, adapter: Tree, scale: float, *, name: str, form: str = "lora", dtype: Any = jnp.float32
  ) -> None:
    """Writes an adapter alone: as `load_adapter` reads it (form "lora"), or in another form that the family knows.

    Args:
      name: name of the model.
    """
    ...

  def with_adapters(self, pipe: Any, loras: Sequence[adapters.LoraFile]) -> tuple[dict[str, Tree], float]:
    """Returns the parameters with the sum of adapters, each with its strength, in `DENOISER_lora`, and its scale."""
    ...

  def without_values(self, name: str) -> str:
    """Returns the name of a model of the same shapes whose weights cost nothing to make, for planning.

    Raises:
      ValueError: its shapes are not known here.
    """
    ...

  def weight_files(self, name: str) -> Mapping[str, Sequence[tensors.Source]]:
    """Returns the files of weights by component; none for random ones, which name and seed determine."""
    ...


class StableDiffusionFamily:
  """Stable Diffusion 1.x, 2.x and SDXL, in diffusers' folders or checkpoints in one file. See `Family`."""

  networks = pipelines.NETWORKS
  denoiser = "unet"
  # Published models with shapes that are known without their files.
  published: Mapping[str, str] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
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
  ) -> pipelines.Pipeline:
    return loading.load_text_to_image(
      name,
      dtype=dtype,
      seed=seed,
      param_dtype=param_dtype,
      sharding=sharding,
      vae_model=vae_model,
      components=self.networks if components is None else components,
    )

  def model(
    self,
    pipe: pipelines.Pipeline,
    *,
    remat: str = "none",
    lora_scale: float = 1.0,
    vae_slicing: int | None = None,
    clip_skip: int | None = None,
    sampler: str = "ddim",
  ) -> StableDiffusion:
    levels = tuple(level.strip() for level in remat.split(","))
    if remat != "none":
      pipe = dataclasses.replace(pipe, unet=pipe.unet.clone(remat=levels[0] if len(levels) == 1 else levels))
    model = loading.text_to_image(pipe, lora_scale=lora_scale, vae_slicing=vae_slicing)
    if sampler == "dpmpp_2m":
      # Without a value in the folder, diffusers' DPMSolverMultistepScheduler has another default than DDIMScheduler.
      spacing = pipe.scheduler_config.get("timestep_spacing") or "linspace"
      schedule = dataclasses.replace(pipe.schedule, timestep_spacing=spacing)
      model = dataclasses.replace(model, process=VariancePreserving(schedule))
    return dataclasses.replace(model, clip_skip=clip_skip)

  def save(self, folder: pathlib.Path, pipe: pipelines.Pipeline, *, dtype: Any) -> None:
    pipelines.save_pipeline(folder, pipe, dtype=dtype)

  def load_adapter(self, file: str, pipe: pipelines.Pipeline) -> tuple[Tree, float]:
    return adapters.load_lora(pathlib.Path(file), pipe.unet.config, pipe.params["unet"])

  def save_adapter(
    self,
    file: pathlib.Path,
    adapter: Tree,
    scale: float,
    *,
    name: str,
    form: str = "lora",
    dtype: Any = jnp.float32,
    text: Mapping[str, Tree] = MappingProxyType({}),
  ) -> None:
    """Writes an adapter, and what `text_adapters` returned beside it."""
    if form == "kohya":
      adapters.save_kohya(file, adapter, scale, loading.unet_config(name), dtype=dtype, text=text)
    else:
      adapters.save_diffusers(file, adapter, scale, dtype=dtype, text=text)

  def text_adapters(self, lora_file: adapters.LoraFile, pipe: pipelines.Pipeline) -> dict[str, Tree]:
    """Returns what a LoRA file has for text encoders, by component, at its strength; `pipe` needs no parameters."""
    found = {
      n: getattr(pipe, n) for n in self.networks if n.startswith("text_encoder") and getattr(pipe, n) is not None
    }
    shapes = {name: presets.abstract_params(module) for name, module in found.items()}
    of_text = adapters.load_text_encoder_loras(lora_file.path, pipe.unet.config, shapes)
    return {name: adapters.rescale(adapter, lora_file.strength, 1.0) for name, adapter in of_text.items()}

  def with_adapters(
    self, pipe: pipelines.Pipeline, loras: Sequence[adapters.LoraFile]
  ) -> tuple[dict[str, Tree], float]:
    adapter, scale, text_encoders = adapters.load_pipeline_loras(loras, pipe.unet.config, pipe.params)
    return adapters.merge_text_encoders(dict(pipe.params), text_encoders) | {"unet_lora": adapter}, scale

  def without_values(self, name: str) -> str:
    name, _ = loading.split_unet(name)
    preset = self.published.get(name, name if name in loading.SHIPPED else name.partition(":")[2])
    if preset in presets.PRESETS:
      return f"zeros:{preset}"
    try:
      if loading.checkpoint_of(name) is not None:
        loading.preset_of(f"zeros:{name}")
        return f"zeros:{name}"
      folder = folders.resolve_folder(loading.folder_of(name), "*.no_weights")
      pipelines.read_preset(folder)
    except (FileNotFoundError, ValueError) as error:
      raise ValueError(
        f"config.model={name}: its shapes are not known here; expected random:PRESET with one of "
        f"{', '.join(presets.PRESETS)}, one of {', '.join(self.published)}, or a model folder: {error}"
      ) from error
    return f"zeros:{folder}"

  def weight_files(self, name: str) -> Mapping[str, Sequence[tensors.Source]]:
    return loading.weight_files(name)

  def look_for(self, name: str, vae_model: str | None = None) -> None:
    """Checks what `load` would open, without reading weights; see `look_for` below."""
    if not sd3_family.recognises(name):
      return loading.look_for(name, vae_model)
    raise ValueError(
      f"{name} is a model of Stable Diffusion 3, expected one of {DEFAULT}; set config.family (--family) to "
      f"{sd3_family.NAME}, or choose another model."
    )


DEFAULT = "stable_diffusion"
FAMILIES: dict[str, Family] = {
  DEFAULT: StableDiffusionFamily(),
  sd3_family.NAME: sd3_family.StableDiffusion3Family(),
}


def get(name: str, field: str = "config.family") -> Family:
  """Returns the family of a name: one of the table, or the user's own as package.module:NAME.

  Raises:
    ValueError: there is no such family.
  """
  if ":" not in name:
    if name not in FAMILIES:
      near = f" such as {name.rpartition('.')[0]}:{name.rpartition('.')[2]}" if own.hint(name) else ""
      expected = f"one of {', '.join(FAMILIES)}, or your own as package.module:NAME{near}"
      raise ValueError(f"{field}={name!r}; expected {expected}.")
    return FAMILIES[name]
  found = load_named(name, field, "NAME")
  if isinstance(found, type):
    raise ValueError(
      f"{field}={name} is a class{own.defined_at(found)}; expected an instance: NAME = {found.__name__}()."
    )
  if missing := [what for what in vars(Family) if not what.startswith("_") and not hasattr(found, what)]:
    raise ValueError(f"{field}={name}: it has no {', '.join(missing)}; expected a jaxpref.files.family.Family.")
  for what, function in vars(Family).items():
    if inspect.isfunction(function) and not what.startswith("_"):
      _check_function(getattr(found, what), function, f"{field}={name}: its {what}")
  networks, denoiser = found.networks, found.denoiser
  if not isinstance(networks, tuple | list) or denoiser not in networks:
    expected = "networks to be a tuple of names, and denoiser one of them"
    raise ValueError(
      f"{field}={name}: its networks are {networks!r} and its denoiser is {denoiser!r}; expected {expected}."
    )
  return found


def _check_function(found: Any, of_family: Any, given: str) -> None:
  """Raises if a function does not take what `Family`'s does: all arguments of `load`, else those without a default."""
  takes = list(inspect.signature(of_family).parameters.values())[1:]
  always = [p for p in takes if p.default is p.empty or of_family is Family.load]
  expected = f"a function of ({', '.join(p.name for p in always)}), as in jaxpref.files.family.Family"
  named = {p.name: None for p in always if p.kind is p.KEYWORD_ONLY}
  own.check_function(found, given, expected, *[None] * (len(always) - len(named)), **named)


def opened(name: str, field: str = "config.family") -> contextlib.AbstractContextManager[None]:
  """Reports in one sentence what the user's own family raises in the block, which opens a model with it.

  Args:
    name, field: see `get`.
  """
  if ":" not in name:
    return contextlib.nullcontext()
  return own.calling(
    f"{field}={name}: opening its model", name, "a pipeline and its model, or a ValueError that says what is wrong"
  )


def saving(name: str) -> contextlib.AbstractContextManager[None]:
  """Says in one sentence what a family of one's own raises in the block, which saves what was trained.

  Args:
    name: as of `get`.
  """
  if ":" not in name:
    return contextlib.nullcontext()
  return own.calling(f"config.family={name}: saving its model", name, "files that its load opens again")


def with_text_adapters(pipe: Any, text: Mapping[str, Tree]) -> Any:
  """Returns a pipeline with a family's `text_adapters` merged into the text encoders whose parameters it has."""
  if not text:
    return pipe
  there = {name: adapter for name, adapter in text.items() if name in pipe.params}
  return dataclasses.replace(pipe, params=adapters.merge_text_encoders(pipe.params, there))


def save_trained(
  family: Family,
  folder: pathlib.Path,
  pipe: Any,
  params: Mapping[str, Tree],
  *,
  scale: float,
  name: str,
  dtype: Any,
  image_size: Size | None = None,
  text: Mapping[str, Tree] = MappingProxyType({}),
) -> None:
  """Writes a folder: a pipeline with trained parameters instead of its own.

  Args:
    folder: path to write.
    pipe: the pipeline that was trained.
    params: trained parameters by component; an adapter is merged, and also written separately beside the components (in
      float32, to continue from).
    scale: alpha / rank of the adapter.
    name: name of the model.
    dtype: dtype of the folder's files.
    image_size: size in pixels that it was trained at, which pipelines with `at_size` write; None: their own.
    text: what the family's `text_adapters` returned, which `pipe` has merged already, to write beside the adapter.
  """
  if image_size is not None and hasattr(pipe, "at_size"):
    pipe = pipe.at_size(*sides(image_size))
  trained = dict(pipe.params) | dict(params)
  adapter = trained.pop(f"{family.denoiser}_lora", None)
  if adapter is not None:
    # A bfloat16 base would lose most of a small change, so it is cast to the precision of the file first.
    widened = lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x
    base = jax.tree.map(widened, trained[family.denoiser])
    trained[family.denoiser] = lora.merge_lora(base, adapter, scale)
  family.save(folder, dataclasses.replace(pipe, params=trained), dtype=dtype)
  if adapter is not None:
    beside: dict[str, Any] = {"text": text} if text else {}
    family.save_adapter(folder / adapters.DIFFUSERS_FILE, adapter, scale, name=name, **beside)


def look_for(
  family: Family, name: str, *, vae_model: str | None = None, loras: Sequence[str | pathlib.Path] = ()
) -> None:
  """Checks that what a model is loaded from exists, without reading weights; a hub's model is fetched.

  Only a user's own family knows what its names mean, so its `load` checks them.

  Args:
    name: see `Family.load`.
    vae_model: see `Family.load`.
    loras: files for `Family.load_adapter` or `Family.with_adapters`.

  Raises:
    FileNotFoundError, ValueError: as those functions do.
  """
  if isinstance(family, StableDiffusionFamily | sd3_family.StableDiffusion3Family):
    family.look_for(name, vae_model)
    for file in loras:
      adapters.look_for(file)


def of_denoiser(family: Family) -> tuple[str, ...]:
  """Returns the components that belong to the denoiser."""
  return tuple(name for name in family.networks if name.startswith(family.denoiser))


def of_run(name: str, given: str | None) -> str:
  """Returns the family of --model: the one given, else that of the run that has this folder or export.

  Other models are of DEFAULT, unless their names or folders say that they are of another family.
  """
  if given is not None:
    return given
  usual = sd3_family.NAME if sd3_family.recognises(name) else DEFAULT
  family = field_of_run(name, "family") or usual
  if own.is_own(str(family)) and (place := _config_of_run(name)):
    own.refuse_module_in(place.parent, family, str(place))
  return family


def field_of_run(name: str, field: str) -> Any:
  """Returns a field of the config of the run that has this folder or export; None if the model is no such thing."""
  if place := _config_of_run(name):
    with contextlib.suppress(ValueError, AttributeError):  # files of something else
      return json.loads(place.read_text(encoding="utf-8")).get(field)
  return None


def _config_of_run(name: str) -> pathlib.Path | None:
  """Returns config.json of the run that has this folder or export, if it is one."""
  folder = pathlib.Path(loading.split_config(name)[0])
  if not folder.is_dir():
    return None
  return next((p for p in (folder / "config.json", folder.parent / "config.json") if p.is_file()), None)
