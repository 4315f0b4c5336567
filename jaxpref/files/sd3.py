"""Model folders of Stable Diffusion 3 (diffusers' StableDiffusion3Pipeline) <-> networks and parameter trees."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpref.files.folders import (
  check_network,
  load_network,
  read_json,
  replacing,
  resolve_folder,
  save_network,
  write_json,
)
from jaxpref.files.tensors import Part, Path, Piece, Sharding, Source, Tree, read_shapes, weight_files
from jaxpref.files.tokenizers import (
  load_t5_tokenizer,
  load_tokenizer_of,
  save_tokenizer,
  tiny_tokenizer,
  tiny_tokenizer_for,
  tokenize,
)
from jaxpref.models import presets
from jaxpref.models.clip import CLIPTextConfig, CLIPTextModel
from jaxpref.models.sd3.presets import PRESETS, SD3Preset
from jaxpref.models.sd3.transformer import (
  SD3Transformer2DModel,
  SD3TransformerConfig,
  constant_shapes,
  join_constants,
  position_table,
  split_constants,
)
from jaxpref.models.t5 import T5Config, T5EncoderModel
from jaxpref.models.vae import AutoencoderKL, VAEConfig

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_COMPONENTS = (*NETWORKS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
_CLIP = ("transformers", "CLIPTextModelWithProjection")
_CLASSES = {
  "transformer": ("diffusers", "SD3Transformer2DModel"),
  "vae": ("diffusers", "AutoencoderKL"),
  "text_encoder": _CLIP,
  "text_encoder_2": _CLIP,
  "text_encoder_3": ("transformers", "T5EncoderModel"),
}
# What a transformer's files hold beside its parameters, a component of its own in `SD3Pipeline.params`.
CONSTANTS = "transformer_constants"
T5 = "text_encoder_3"
# Tokens of T5 that the published models read at most.
MAX_SEQUENCE_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class SD3Pipeline:
  """A Stable Diffusion 3 model: the content of a diffusers folder.

  Attributes:
    transformer, vae, text_encoder, text_encoder_2, text_encoder_3: networks without parameters; the last is T5 or None.
    params: parameters by component, of the components that were asked for. With the transformer's come CONSTANTS, its
      table of positions; without it the computed table is used.
    scheduler_config: the dict of scheduler_config.json.
    tokenizer, tokenizer_2, tokenizer_3: transformers tokenizers, one for each text encoder.
    max_sequence_length: tokens that T5 reads.
  """

  transformer: SD3Transformer2DModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  text_encoder_2: CLIPTextModel
  params: Tree
  scheduler_config: dict[str, Any]
  tokenizer: Any
  tokenizer_2: Any
  text_encoder_3: T5EncoderModel | None = None
  tokenizer_3: Any = None
  max_sequence_length: int = 256

  def tokenize(self, captions: Sequence[str]) -> np.ndarray:
    """Returns i32[n, L], the ids of all tokenizers side by side, padded and cut as diffusers does.

    A warning shows what is cut.
    """
    ids = [
      tokenize(tokenizer, captions, length=encoder.config.max_position_embeddings)
      for encoder, tokenizer in ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
    ]
    if self.text_encoder_3 is not None:
      ids.append(tokenize(self.tokenizer_3, captions, length=self.max_sequence_length, exact=True))
    return np.concatenate(ids, axis=1)

  @property
  def modules(self) -> dict[str, nn.Module]:
    """The networks by component."""
    return {name: module for name in NETWORKS if (module := getattr(self, name)) is not None}


def without_t5(pipe: SD3Pipeline) -> SD3Pipeline:
  """Returns the pipeline without T5, whose tokens are then zeros."""
  params = {name: tree for name, tree in pipe.params.items() if name != T5}
  return dataclasses.replace(pipe, text_encoder_3=None, tokenizer_3=None, params=params)


def load_pipeline(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any | Mapping[str, Any] = jnp.float32,
  sharding: Sharding = None,
  components: Sequence[str] = NETWORKS,
  max_sequence_length: int = 256,
  t5: bool = True,
) -> SD3Pipeline:
  """Opens a Stable Diffusion 3 or 3.5 folder in the layout of diffusers.

  Args:
    folder: path or hub name ("organisation/model").
    dtype: compute dtype of the networks.
    param_dtype: dtype of the parameters, or a dict with one for each of NETWORKS.
    sharding: where arrays go as they are read: None (default device), one Sharding, or a function from the tree of
      ShapeDtypeStructs {"transformer": ..., ...} to one of Shardings.
    components: networks whose parameters are read. The others need only their config.json. CONSTANTS alone is read
      without the transformer.
    max_sequence_length: tokens that T5 reads, at most 512.
    t5: False leaves out T5, whose files may then be missing.

  Returns:
    The pipeline; its params have only the components asked for.

  Raises:
    FileNotFoundError: the folder or one of its files is missing.
    ValueError: a file does not fit, a pickle stands where safetensors are expected, or the architecture is not
      implemented.
  """
  folder = resolve_folder(folder, "*/*.safetensors")
  pipe = open_pipeline(folder, dtype=dtype, max_sequence_length=max_sequence_length, t5=t5)
  modules = {name: module for name, module in pipe.modules.items() if name in components}
  files = {name: weight_files(folder / name) for name in modules}
  shapes = {name: file_shapes(module) for name, module in modules.items()}
  for name in modules:
    check_network(modules[name], files[name], shapes[name])
  shardings = sharding(shapes) if callable(sharding) else dict.fromkeys(shapes, sharding)
  dtypes = param_dtype if isinstance(param_dtype, Mapping) else dict.fromkeys(shapes, param_dtype)
  params: Tree = {}
  for name, module in modules.items():
    tree = load_network(module, files[name], shapes[name], dtypes[name], shardings[name])
    if name == "transformer":
      tree, params[CONSTANTS] = split_constants(tree)
    params[name] = tree
  if CONSTANTS in components and "transformer" not in components:
    kind = dtypes.get("transformer", jnp.float32) if isinstance(param_dtype, Mapping) else param_dtype
    params[CONSTANTS] = _load_constants(folder, pipe.transformer, kind, sharding)
  return dataclasses.replace(pipe, params=params)


def _load_constants(folder: pathlib.Path, module: SD3Transformer2DModel, dtype: Any, sharding: Sharding) -> Tree:
  """Returns the constants of a transformer whose parameters are not read."""
  shapes, key = constant_shapes(module.config), "pos_embed.pos_embed"
  files: list[Source] = [*weight_files(folder / "transformer")]
  holder = next((file for file in weight_files(folder / "transformer") if key in read_shapes(file)), None)
  if holder is not None:
    described = str(folder / "transformer" / "config.json")
    files = [Part(holder, "its positions", described, "take both from the same model", {key: Piece(key)})]
  placed = sharding({CONSTANTS: shapes})[CONSTANTS] if callable(sharding) else sharding
  return load_network(module, files, shapes, dtype, placed)


def file_shapes(module: nn.Module) -> Tree:
  """Returns the ShapeDtypeStructs of what a network's files hold: its parameters, and a transformer's positions."""
  shapes = presets.abstract_params(module)
  if isinstance(module, SD3Transformer2DModel):
    return join_constants(shapes, constant_shapes(module.config))
  return shapes


def open_pipeline(
  folder: pathlib.Path, *, dtype: Any = jnp.float32, max_sequence_length: int = 256, t5: bool = True
) -> SD3Pipeline:
  """Returns the pipeline of a folder without parameters, from its JSON files and tokenizers.

  Raises:
    FileNotFoundError, ValueError: as `load_pipeline`, for these files.
  """
  if not 1 <= max_sequence_length <= MAX_SEQUENCE_LENGTH:
    raise ValueError(f"max_sequence_length={max_sequence_length}, expected 1 to {MAX_SEQUENCE_LENGTH} tokens of T5.")
  modules = read_modules(folder, dtype, t5=t5)
  return SD3Pipeline(
    **modules,
    params={},
    scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
    tokenizer=load_tokenizer_of(folder, "", modules["text_encoder"]),
    tokenizer_2=load_tokenizer_of(folder, "_2", modules["text_encoder_2"]),
    tokenizer_3=load_tokenizer_of(folder, "_3", modules[T5], load_t5_tokenizer) if T5 in modules else None,
    max_sequence_length=max_sequence_length,
  )


def read_modules(folder: pathlib.Path, dtype: Any = jnp.float32, *, t5: bool = True) -> dict[str, Any]:
  """Returns the networks of a folder without parameters, by component; see `load_pipeline` for t5 and for errors."""
  index = read_json(folder / "model_index.json")
  found = index.get("_class_name")
  if found is not None and found != "StableDiffusion3Pipeline":
    raise ValueError(
      f"{folder / 'model_index.json'} is of a {found}, expected StableDiffusion3Pipeline; choose a folder of Stable"
      " Diffusion 3 or 3.5, or another family (config.family, --family)."
    )
  modules: dict[str, Any] = {}
  for name, (_, expected) in _CLASSES.items():
    if name == T5 and not t5:
      continue
    class_name = (index.get(name) or [None, None])[-1]
    if class_name is None:
      if name == T5:
        continue
      raise ValueError(
        f"{folder / 'model_index.json'} has no {name}, expected the components of Stable Diffusion 3 (transformer,"
        " vae, text_encoder, text_encoder_2, tokenizers, scheduler); take a complete folder."
      )
    if class_name != expected:
      raise ValueError(f"{folder / 'model_index.json'}: {name} is a {class_name}, expected {expected}.")
    modules[name] = _make_module(name, read_json(folder / name / "config.json"), dtype)
  return modules


def _make_module(name: str, config: Mapping[str, Any], dtype: Any) -> nn.Module:
  if name == "transformer":
    return SD3Transformer2DModel(SD3TransformerConfig.from_dict(config), dtype)
  if name == "vae":
    return AutoencoderKL(VAEConfig.from_dict(config), dtype)
  if name == "text_encoder_3":
    return T5EncoderModel(T5Config.from_dict(config), dtype)
  return CLIPTextModel(CLIPTextConfig.from_dict(config), True, dtype)


def modules_of(preset: SD3Preset, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Returns the networks of a preset without parameters, by component."""
  modules: dict[str, Any] = {
    "transformer": SD3Transformer2DModel(preset.transformer, dtype),
    "vae": AutoencoderKL(preset.vae, dtype),
    "text_encoder": CLIPTextModel(preset.text_encoder, True, dtype),
    "text_encoder_2": CLIPTextModel(preset.text_encoder_2, True, dtype),
  }
  if preset.text_encoder_3 is not None:
    modules["text_encoder_3"] = T5EncoderModel(preset.text_encoder_3, dtype)
  return modules


def random_pipeline(
  preset: SD3Preset | str,
  seed: int = 0,
  *,
  dtype: Any = jnp.float32,
  init: Callable[[Any, jax.Array], Any] = presets.init_params,
  components: Sequence[str] = NETWORKS,
  max_sequence_length: int = presets.TINY_LENGTH,
) -> SD3Pipeline:
  """Returns a pipeline of random weights with tiny-sd's tokenizer, also for T5.

  Args:
    preset: a preset or its name.
    seed: seed of the parameters.
    dtype: compute dtype.
    init: (network, key) -> parameters of the network.
    components: networks whose parameters are made.
    max_sequence_length: tokens that T5 reads.

  Raises:
    ValueError: there is no such preset.
  """
  if isinstance(preset, str) and preset not in PRESETS:
    raise ValueError(f"preset {preset!r} is unknown, expected one of {', '.join(PRESETS)}.")
  found = PRESETS[preset] if isinstance(preset, str) else preset
  modules = modules_of(found, dtype)
  keys = jax.random.split(jax.random.key(seed), len(modules))
  params = {
    name: init(module, key) for (name, module), key in zip(modules.items(), keys, strict=True) if name in components
  }
  return SD3Pipeline(
    **modules,
    params=params,
    scheduler_config=dict(found.scheduler),
    tokenizer=tiny_tokenizer_for(found.text_encoder),
    tokenizer_2=tiny_tokenizer_for(found.text_encoder_2),
    tokenizer_3=None if found.text_encoder_3 is None else tiny_tokenizer(),
    max_sequence_length=max_sequence_length,
  )


def save_pipeline(folder: Path, pipe: SD3Pipeline, *, dtype: Any = jnp.float32) -> pathlib.Path:
  """Writes a folder that torch diffusers opens with `from_pretrained`; an existing one is replaced at the end.

  Args:
    folder: path to write.
    pipe: has the parameters of all its networks, which this process can read in full.
    dtype: dtype of the files: float32, float16 or bfloat16.

  Returns:
    The folder.

  Raises:
    FileExistsError: `folder` exists and is not a pipeline folder.
    ValueError: a parameter is not finite or does not fit `dtype`.
  """
  with replacing(folder, "model_index.json", _COMPONENTS) as target:
    scheduler_class = pipe.scheduler_config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    index: dict[str, Any] = {
      "_class_name": "StableDiffusion3Pipeline",
      "_diffusers_version": "0.32.0",
      "scheduler": ["diffusers", scheduler_class],
      "feature_extractor": [None, None],
      "image_encoder": [None, None],
      "text_encoder_3": [None, None],
      "tokenizer_3": [None, None],
    }
    for name, module in pipe.modules.items():
      library, class_name = _CLASSES[name]
      index[name] = [library, class_name]
      if library == "diffusers":
        config, stem = {"_diffusers_version": "0.32.0", **module.config.to_dict()}, "diffusion_pytorch_model"
      else:
        config, stem = {"architectures": [class_name], **module.config.to_dict()}, "model"
      params = pipe.params[name]
      if name == "transformer":
        params = join_constants(params, pipe.params.get(CONSTANTS) or computed_constants(module.config))
      save_network(target / name, stem, config, params, dtype)
    for suffix in ("", "_2", "_3"):
      tokenizer = getattr(pipe, f"tokenizer{suffix}")
      if tokenizer is not None:
        index[f"tokenizer{suffix}"] = ["transformers", type(tokenizer).__name__]
        save_tokenizer(target / f"tokenizer{suffix}", tokenizer)
    (target / "scheduler").mkdir()
    scheduler = {"_class_name": scheduler_class, **pipe.scheduler_config}
    write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    write_json(target / "model_index.json", index)
  return pathlib.Path(folder)


def read_preset(folder: Path, *, t5: bool = True) -> SD3Preset:
  """Returns the architectures of a model folder, from its JSON files alone; see `load_pipeline` for t5.

  Raises:
    FileNotFoundError, ValueError: as `load_pipeline`, for these files.
  """
  folder = pathlib.Path(folder)
  modules = read_modules(folder, t5=t5)
  scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
  return SD3Preset(**{name: module.config for name, module in modules.items()}, scheduler=scheduler)


def computed_constants(config: SD3TransformerConfig) -> Tree:
  """Returns the constants of a transformer that was not read from files."""
  table = position_table(config)
  size = len(table)
  whole = np.concatenate([np.tile(table, (size, 1)), np.repeat(table, size, axis=0)], axis=1)
  return {"pos_embed": {"pos_embed": whole[None]}}
