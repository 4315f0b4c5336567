"""Model folders of diffusers and transformers <-> networks and parameter trees."""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpref.diffusion import Schedule, schedule_from_config
from jaxpref.files.tensor_files import MisfitError, Path, Tree, load_tree, save_tree, torch_name, weight_files
from jaxpref.models import open_clip, presets
from jaxpref.models.clip import CLIPModel, CLIPTextConfig, CLIPTextModel
from jaxpref.models.deduce import contradicted_fields
from jaxpref.models.preference import (
  Judge,
  JudgeConfig,
  StepAwareCLIPConfig,
  StepAwareCLIPModel,
)
from jaxpref.models.unet import UNet2DConditionModel, UNetConfig
from jaxpref.models.vae import AutoencoderKL, VAEConfig

# One sharding for all arrays, or a function from the tree of ShapeDtypeStructs to one of shardings.
Sharding = jax.sharding.Sharding | Callable[[Tree], Any] | None

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_COMPONENTS = (*NETWORKS, "tokenizer", "tokenizer_2", "scheduler")

# A dataset may hold thousands of captions that are too long: what is cut from them is shown so many times.
MAX_CUT_WARNINGS = 5
_cut_warnings: set[str] = set()
_cut_warnings_lock = threading.Lock()

_CLASSES = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
  "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}


# ---- pipelines -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A Stable Diffusion model: what a diffusers folder holds.

  Attributes:
    unet, vae, text_encoder, text_encoder_2: networks without parameters; the last is SDXL's second
      encoder or None.
    params: {"unet", "vae", "text_encoder"[, "text_encoder_2"]} -> nested dicts of arrays.
    schedule: of the diffusion.
    scheduler_config: the dict of scheduler_config.json that `schedule` was made from.
    tokenizer, tokenizer_2: transformers tokenizers, one for each text encoder.
    force_zeros_for_empty_prompt: of SDXL: the empty prompt conditions on zeros.
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
    """i32[n, L] token ids, padded and cut as Stable Diffusion does.

    With two text encoders i32[n, 2 L], the ids of both tokenizers side by side.
    """
    pairs = [(self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)]
    ids = [
      tokenize(tokenizer, captions, length=encoder.config.max_position_embeddings)
      for encoder, tokenizer in pairs
      if encoder is not None
    ]
    return np.concatenate(ids, axis=1)


def tokenize(tokenizer: Any, captions: Sequence[str], *, length: int | None = None) -> np.ndarray:
  """Token ids as Stable Diffusion makes them: padded and cut to the full context length.

  Args:
    tokenizer: a transformers CLIPTokenizer.
    captions: prompts; "" is the empty one of classifier-free guidance.
    length: upper bound of the context length; a tokenizer_config.json without `model_max_length`
      gives none of its own.

  Returns:
    i32[n, L]. What is cut is shown in one warning a call, and in MAX_CUT_WARNINGS of a process.
  """
  limit = min(tokenizer.model_max_length, length or tokenizer.model_max_length)
  if limit > 10**6:
    raise ValueError(
      "tokenize: tokenizer_config.json has no model_max_length; pass length, the text encoder's "
      "max_position_embeddings."
    )
  captions = list(captions)
  out = tokenizer(captions, padding="max_length", max_length=limit, truncation=True, return_tensors="np")
  full = [c for c, mask in zip(captions, out["attention_mask"], strict=True) if mask.all()]
  # The texts beyond the limit; the last token is the end of the text.
  every = tokenizer(full, verbose=False)["input_ids"] if full else []
  cut = [tokenizer.decode(ids[limit - 1 : -1]).strip() for ids in every if len(ids) > limit]
  if cut:
    others = f" (and the ends of {len(cut) - 1} others)" if len(cut) > 1 else ""
    _warn_of_cut(
      f"the text encoder reads {limit} tokens, begin and end included, so this was cut from a "
      f"prompt: {cut[0]!r}{others}; shorten it."
    )
  return np.asarray(out["input_ids"], np.int32)


def _warn_of_cut(message: str) -> None:
  """Warns for the caller of `tokenize`: of each message once, of so many messages, and then that it says no more."""
  with _cut_warnings_lock:
    count = len(_cut_warnings)
    if message in _cut_warnings or count > MAX_CUT_WARNINGS:
      return
    _cut_warnings.add(message)
  if count == MAX_CUT_WARNINGS:
    message = f"after {count} warnings of prompts that are too long, further ones are cut without a warning."
  warnings.warn(message, stacklevel=3)


def import_tokenizer(name: str) -> Any:
  """A tokenizer's class of transformers, which is imported here: a second, and without advice to install PyTorch."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  return getattr(importlib.import_module("transformers"), name)


def load_tokenizer(folder: Path) -> Any:
  """The CLIP tokenizer of a folder."""
  folder = pathlib.Path(folder)
  missing = [f for f in ("vocab.json", "merges.txt") if not (folder / f).is_file()]
  if missing and not (folder / "tokenizer.json").is_file():
    raise FileNotFoundError(
      f"{folder} has no {' and no '.join(missing)}, expected a CLIP tokenizer; download the folder again."
    )
  return import_tokenizer("CLIPTokenizer").from_pretrained(str(folder))


def _load_tokenizer_of(folder: pathlib.Path, suffix: str, encoder: CLIPTextModel) -> Any:
  """The tokenizer of a pipeline folder that belongs to a text encoder; all its ids must be ones the encoder knows."""
  tokenizer = load_tokenizer(folder / f"tokenizer{suffix}")
  largest, size = max(tokenizer.get_vocab().values()), encoder.config.vocab_size
  if largest >= size:
    raise ValueError(
      f"{folder / f'tokenizer{suffix}'} gives ids up to {largest}, expected at most {size - 1} by the vocab_size of "
      f"{folder / f'text_encoder{suffix}' / 'config.json'}; take the tokenizer of the same model."
    )
  return tokenizer


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"{file} is missing; point to a model folder in the layout of diffusers.") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"{file} is not valid JSON ({e}); download the folder again.") from e


def _write_json(file: pathlib.Path, value: Any) -> None:
  file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def resolve_folder(name: Path, weights: str = "*.safetensors") -> pathlib.Path:
  """A model folder on this machine, downloaded from the Hugging Face hub if it is named so.

  Args:
    name: a folder, or "organisation/model" of the hub. Only safetensors, JSON and text files are
      fetched, no second copies in half precision.
    weights: pattern of the weight files to fetch.

  Raises:
    FileNotFoundError: neither is to be had.
  """
  folder = pathlib.Path(name)
  if folder.is_dir():
    return folder
  if folder.is_file():
    raise FileNotFoundError(
      f"{name} is a file, expected a model folder in the layout of diffusers; unpack or convert the checkpoint to one."
    )
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name)):
    raise FileNotFoundError(
      f"model folder {name} does not exist, expected a folder in the layout of diffusers or a "
      "hub name such as organisation/model; check the path."
    )
  try:
    import huggingface_hub

    return pathlib.Path(
      huggingface_hub.snapshot_download(
        str(name),
        allow_patterns=[weights, "*.json", "*.txt"],
        ignore_patterns=["*.fp16.*", "*.non_ema.*", "safety_checker/*"],
      )
    )
  except Exception as e:  # whatever the hub client raises without network, or for a wrong name
    raise FileNotFoundError(
      f"{name} is neither a folder here nor could it be fetched from the Hugging Face hub "
      f"({type(e).__name__}); check the name, connect to the network, or give the path of a "
      "downloaded folder."
    ) from e


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
    components: the networks whose parameters are read. The others need no files but their config.json.

  Returns:
    The pipeline; its params have the components asked for.

  Raises:
    FileNotFoundError: the folder or one of its files is missing.
    ValueError: a file does not fit, a pickle stands where safetensors are expected, or the
      architecture is not implemented.
  """
  folder = resolve_folder(folder, "*/*.safetensors")  # not the single-file copies beside them
  index = _read_json(folder / "model_index.json")
  modules: dict[str, nn.Module] = {}
  for name in NETWORKS:
    class_name = _component_class(index, name, folder)
    if class_name is None:
      if name == "text_encoder_2":
        continue
      raise ValueError(
        f"{folder / 'model_index.json'} has no {name}, expected the components of Stable "
        "Diffusion (unet, vae, text_encoder, tokenizer, scheduler); take a complete folder."
      )
    config = _read_json(folder / name / "config.json")
    modules[name] = _make_module(name, class_name, config, dtype)
  shapes = {name: presets.abstract_params(module) for name, module in modules.items() if name in components}
  files = {name: weight_files(folder / name) for name in shapes}
  # Small files first: what is wrong with them should show before gigabytes are read.
  scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json")
  schedule = schedule_from_config(scheduler_config)
  tokenizer = _load_tokenizer_of(folder, "", modules["text_encoder"])
  tokenizer_2 = _load_tokenizer_of(folder, "_2", modules["text_encoder_2"]) if "text_encoder_2" in modules else None
  shardings = sharding(shapes) if callable(sharding) else dict.fromkeys(shapes, sharding)
  dtypes = param_dtype if isinstance(param_dtype, Mapping) else dict.fromkeys(shapes, param_dtype)
  params = {name: _load(modules[name], files[name], shapes[name], dtypes[name], shardings[name]) for name in shapes}
  return Pipeline(
    **modules,
    params=params,
    schedule=schedule,
    scheduler_config=scheduler_config,
    tokenizer=tokenizer,
    tokenizer_2=tokenizer_2,
    # The default is that of diffusers' pipeline of SDXL; the others have no such option.
    force_zeros_for_empty_prompt="text_encoder_2" in modules and bool(index.get("force_zeros_for_empty_prompt", True)),
  )


def _load(module: nn.Module, files: Sequence[Path], shapes: Tree, param_dtype: Any, sharding: Any) -> Tree:
  """`load_tree`; if that fails, with the fields of config.json that do not fit."""
  try:
    return load_tree(files, shapes, param_dtype=param_dtype, sharding=sharding)
  except MisfitError as e:
    fields = contradicted_fields(getattr(module, "config", None), e.found)
    if not fields:
      raise
    said = [f"{name} is {right} in the tensors, {wrong} in it" for name, (wrong, right) in fields.items()]
    raise MisfitError(e.where, f"{', '.join(said)}; {e.problems}", e.found) from None


def _make_module(name: str, class_name: str, config: Mapping[str, Any], dtype: Any) -> nn.Module:
  if name == "unet":
    return UNet2DConditionModel(UNetConfig.from_dict(config), dtype)
  if name == "vae":
    return AutoencoderKL(VAEConfig.from_dict(config), dtype)
  with_projection = class_name == "CLIPTextModelWithProjection"
  return CLIPTextModel(CLIPTextConfig.from_dict(config), with_projection, dtype)


def random_pipeline(
  preset: presets.Preset | str,
  seed: int = 0,
  *,
  dtype: Any = jnp.float32,
  init: Callable[[Any, jax.Array], Any] = presets.init_params,
  components: Sequence[str] = NETWORKS,
) -> Pipeline:
  """A pipeline of random weights with tiny-sd's tokenizer, for tests, smoke runs and pre-training.

  Args:
    preset: or its name; its text encoders' vocabulary must hold tiny-sd's.
    seed: of the parameters.
    dtype: compute dtype.
    init: makes the parameters of a network from it and a key.
    components: the networks whose parameters are made.
  """
  preset = presets.get_preset(preset) if isinstance(preset, str) else preset
  if preset.text_encoder.vocab_size < presets.TINY_VOCAB_SIZE:
    raise ValueError(
      f"random_pipeline: the preset's vocabulary has {preset.text_encoder.vocab_size} entries, "
      f"expected at least tiny-sd's {presets.TINY_VOCAB_SIZE}."
    )
  modules: dict[str, Any] = {
    "unet": UNet2DConditionModel(preset.unet, dtype),
    "vae": AutoencoderKL(preset.vae, dtype),
    "text_encoder": CLIPTextModel(preset.text_encoder, False, dtype),
  }
  if preset.text_encoder_2 is not None:
    modules["text_encoder_2"] = CLIPTextModel(preset.text_encoder_2, True, dtype)
  keys = jax.random.split(jax.random.key(seed), len(modules))
  params = {
    name: init(module, key) for (name, module), key in zip(modules.items(), keys, strict=True) if name in components
  }
  return Pipeline(
    **modules,
    params=params,
    schedule=schedule_from_config(preset.scheduler),
    scheduler_config=dict(preset.scheduler),
    tokenizer=_tokenizer_of(preset.text_encoder),
    tokenizer_2=None if preset.text_encoder_2 is None else _tokenizer_of(preset.text_encoder_2),
    force_zeros_for_empty_prompt="text_encoder_2" in modules,
  )


def _tokenizer_of(config: CLIPTextConfig) -> Any:
  """The shipped one, padding to as many tokens as the text encoder reads."""
  tokenizer = tiny_tokenizer()
  tokenizer.model_max_length = config.max_position_embeddings
  return tokenizer


def tiny_tokenizer() -> Any:
  """The tokenizer in jaxpref/assets/tiny-sd, made by scripts/assets/build_tokenizer.py."""
  return load_tokenizer(pathlib.Path(__file__).parents[1] / "assets" / "tiny-sd" / "tokenizer")


def save_pipeline(
  folder: Path, pipeline: Pipeline, *, dtype: Any = jnp.float32, configs_only: bool = False
) -> pathlib.Path:
  """Writes a folder that torch diffusers opens with `from_pretrained`.

  Everything is written beside `folder` first and renamed at the end, so a run that dies leaves
  either the old folder or the new one. An existing pipeline folder is replaced (files in it that
  are not the pipeline's are kept); any other existing folder is left alone.

  Args:
    folder: to write.
    pipeline: with parameters this process can read in full.
    dtype: of the files: float32, float16 or bfloat16.
    configs_only: writes no weights: configs, scheduler and tokenizers, from which networks can be made.

  Returns:
    The folder.

  Raises:
    FileExistsError: `folder` exists and is not a pipeline folder.
    ValueError: a parameter is not finite, or does not fit `dtype`.
  """
  with _replacing(folder, "model_index.json", _COMPONENTS) as target:
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
      _save_component(target / name, "diffusion_pytorch_model", config, params, dtype)
    for suffix in ("", "_2") if xl else ("",):
      encoder = getattr(pipeline, f"text_encoder{suffix}")
      class_name = "CLIPTextModelWithProjection" if encoder.with_projection else "CLIPTextModel"
      index[f"text_encoder{suffix}"] = ["transformers", class_name]
      index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
      config = {"architectures": [class_name], **encoder.config.to_dict()}
      params = None if configs_only else pipeline.params[f"text_encoder{suffix}"]
      _save_component(target / f"text_encoder{suffix}", "model", config, params, dtype)
      _save_tokenizer(target / f"tokenizer{suffix}", getattr(pipeline, f"tokenizer{suffix}"))
    (target / "scheduler").mkdir()
    _write_json(
      target / "scheduler" / "scheduler_config.json",
      {"_class_name": scheduler_class, **pipeline.scheduler_config},
    )
    _write_json(target / "model_index.json", index)
  return pathlib.Path(folder)


def _save_component(
  folder: pathlib.Path, stem: str, config: Mapping[str, Any], params: Tree | None, dtype: Any
) -> None:
  folder.mkdir(exist_ok=True)
  _write_json(folder / "config.json", config)
  if params is not None:
    save_tree(folder / f"{stem}.safetensors", params, dtype=dtype)


def _save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
  """In transformers' own format, plus vocab.json and merges.txt for versions before 5."""
  folder.mkdir(exist_ok=True)
  tokenizer.save_pretrained(str(folder))
  source = pathlib.Path(tokenizer.name_or_path)
  for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
    if (source / name).is_file() and not (folder / name).exists():
      shutil.copyfile(source / name, folder / name)


@contextlib.contextmanager
def _replacing(folder: Path, marker: str, known: Sequence[str]) -> Iterator[pathlib.Path]:
  """A temporary folder that takes the place of `folder` if the block succeeds.

  An existing `folder` must be empty, have `marker`, or hold nothing but entries of `known`.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    entries = {p.name for p in folder.iterdir()} if folder.is_dir() else {""}
    if marker not in entries and not entries <= set(known):
      raise FileExistsError(
        f"{folder} exists and is not a model folder (no {marker} in it), so it is not "
        "overwritten; choose a new folder or delete it."
      )
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    temporary.chmod(0o755)  # mkdtemp's 0700 is for secrets
    yield temporary
    if folder.exists():
      for entry in folder.iterdir():
        if entry.name not in known and not (temporary / entry.name).exists():
          copy = shutil.copytree if entry.is_dir() else shutil.copyfile
          copy(entry, temporary / entry.name)
      old = temporary.with_name(f"{temporary.name}.old")
      folder.rename(old)
      temporary.rename(folder)
      shutil.rmtree(old)
    else:
      temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def load_vae(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
) -> tuple[AutoencoderKL, Tree]:
  """Opens a VAE that is published by itself, such as madebyollin/sdxl-vae-fp16-fix.

  Args:
    folder: path or hub name with config.json and diffusion_pytorch_model.safetensors.
    dtype, param_dtype: as for `load_pipeline`.
    sharding: as for `load_pipeline`, of the VAE's parameter tree.
  """
  folder = resolve_folder(folder, "diffusion_pytorch_model*.safetensors")
  module = AutoencoderKL(VAEConfig.from_dict(_read_json(folder / "config.json")), dtype)
  shapes = presets.abstract_params(module)
  shardings = sharding(shapes) if callable(sharding) else sharding
  return module, _load(module, weight_files(folder), shapes, param_dtype, shardings)


# ---- preference model and judge ------------------------------------------------------------------


def load_preference_model(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
) -> tuple[StepAwareCLIPModel, Tree]:
  """Opens a step-aware preference model, or a CLIP (PickScore) as the start of one.

  Args:
    folder: path or hub name with config.json and model.safetensors: what `save_preference_model` or
      scripts/assets/convert_spm.py wrote, or transformers' CLIPModel (yuvalkirstain/PickScore_v1,
      laion/CLIP-ViT-H-14-laion2B-s32B-b79K).
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
    sharding: as for `load_pipeline`, of the parameter tree.

  Returns:
    The module and its parameters; from a plain CLIP with freshly initialised time condition, with
    which the scores are CLIP's.

  Raises:
    FileNotFoundError, ValueError: as `load_pipeline`.
  """
  folder = resolve_folder(folder, "model*.safetensors")  # not open_clip's copy of CLIP-H beside it
  config_dict = _read_json(folder / "config.json")
  if not {"model_type", "text_config"} & config_dict.keys():
    raise ValueError(
      f"{folder / 'config.json'} describes no CLIP, expected a model_type or a text_config; point to "
      "a folder that save_preference_model wrote, or a CLIP such as PickScore."
    )
  module = StepAwareCLIPModel(StepAwareCLIPConfig.from_dict(config_dict), dtype)
  files = weight_files(folder)
  shapes = presets.abstract_params(module)
  shardings = sharding(shapes) if callable(sharding) else sharding
  if config_dict.get("model_type", "step_aware_clip") == "step_aware_clip":
    return module, _load(module, files, shapes, param_dtype, shardings)
  clip_shapes = presets.abstract_params(CLIPModel(module.config))
  clip_params = _load(module, files, clip_shapes, param_dtype, shardings)

  def fresh():  # only the time condition remains of it: the rest is dead code to the compiler
    params = module.init(jax.random.key(0), *presets.example_inputs(module))["params"]
    return _without(jax.tree.map(lambda x: x.astype(param_dtype), params), clip_shapes)

  out = (
    jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if shardings is None
    else (_without(shardings, clip_shapes) if isinstance(shardings, Mapping) else shardings)
  )
  added = jax.jit(fresh, out_shardings=out)()
  return module, _merge(added, clip_params)


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
    dtype, param_dtype: as for `load_preference_model`.
    sharding: of all parameters.

  Raises:
    FileNotFoundError, ValueError: as `load_pipeline`.
  """
  folder = resolve_folder(folder, "model*.safetensors")
  if not (folder / "config.json").is_file() and (folder / "open_clip_config.json").is_file():
    config = open_clip.config_from_dict(_read_json(folder / "open_clip_config.json"))
    module = CLIPModel(config, dtype)
    file = folder / "open_clip_model.safetensors"
    if not file.is_file():
      raise FileNotFoundError(f"{file} is missing, expected it beside open_clip_config.json; download it.")
    shapes = jax.eval_shape(lambda p: open_clip.from_clip(p, config), presets.abstract_params(module))
    tree = load_tree(file, shapes, param_dtype=param_dtype, sharding=sharding)
    return module, open_clip.to_clip(tree, config)
  module = CLIPModel(StepAwareCLIPConfig.from_dict(_read_json(folder / "config.json")), dtype)
  return module, _load(module, weight_files(folder), presets.abstract_params(module), param_dtype, sharding)


def _without(tree: Mapping[str, Any], shapes: Mapping[str, Any]) -> Tree:
  """The part of a tree that `shapes` lacks."""
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
  """Writes config.json and model.safetensors, as `save_pipeline` does.

  A plain `CLIPModel` is written so that transformers' `CLIPModel.from_pretrained` opens it.
  """
  step_aware = isinstance(module, StepAwareCLIPModel)
  architecture = "StepAwareCLIPModel" if step_aware else "CLIPModel"
  return _save_single(folder, architecture, module, params, dtype)


def load_judge(
  folder: Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Sharding = None,
) -> tuple[Judge, Tree]:
  """Opens a judge's folder; arguments as for `load_preference_model`."""
  folder = resolve_folder(folder)
  module = Judge(JudgeConfig.from_dict(_read_json(folder / "config.json")), dtype)
  shapes = presets.abstract_params(module)
  shardings = sharding(shapes) if callable(sharding) else sharding
  return module, load_tree(weight_files(folder), shapes, param_dtype=param_dtype, sharding=shardings)


def save_judge(folder: Path, module: Judge, params: Tree, *, dtype: Any = jnp.float32) -> pathlib.Path:
  """Writes config.json and model.safetensors, as `save_pipeline` does."""
  return _save_single(folder, "Judge", module, params, dtype)


def _save_single(folder: Path, architecture: str, module: nn.Module, params: Tree, dtype: Any) -> pathlib.Path:
  with _replacing(folder, "config.json", ("config.json", "model.safetensors")) as target:
    config = {"architectures": [architecture], **module.config.to_dict()}
    _save_component(target, "model", config, params, dtype)
  return pathlib.Path(folder)


__all__ = [
  "Pipeline",
  "load_clip",
  "load_judge",
  "load_pipeline",
  "load_preference_model",
  "load_tokenizer",
  "load_tree",
  "load_vae",
  "random_pipeline",
  "resolve_folder",
  "save_judge",
  "save_pipeline",
  "save_preference_model",
  "save_tree",
  "tiny_tokenizer",
  "tokenize",
  "torch_name",
  "weight_files",
]
