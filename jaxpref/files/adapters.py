"""LoRA adapters <-> the safetensors files that other tools read and write.

Writes two forms, and reads both from any tool:

- diffusers / PEFT, `unet.<layer>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], with alpha in the file's
  metadata: `pipe.load_lora_weights` opens these;
- kohya, `lora_unet_<layer>.lora_down.weight` [r, in], `.lora_up.weight` [out, r] and `.alpha`, with underscores for
  the dots of a layer's name: ComfyUI and AUTOMATIC1111 open these. As in kohya's own files, layers have their diffusers
  names for SD1 and SD2, and those of the original implementation (`ldm_name`) for SDXL.

The tensors of a 1x1 convolution are [r, in, 1, 1] and [out, r, 1, 1] in both. A layer whose factors are zero is not
written. Other tools' files may also adapt text encoders (`text_encoder.`, `lora_te1_`, OneTrainer's `clip_l.`,
ComfyUI's `text_encoders.clip_l.transformer.`, ...). To draw pictures, these factors are merged into the encoders'
weights (`load_pipeline_lora`, `merge_text_encoders`); training only continues adapters of a UNet (`load_lora`).
Embeddings of new words beside them are left out with a warning. LoRA of 3x3 convolutions (LoCon) and other kinds of
adapters (DoRA, LoHa, LoKr, (IA)^3) raise.
"""

import json
import math
import os
import pathlib
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.files.tensors import save_tree
from jaxpref.models import lora
from jaxpref.models.unet import UNetConfig
from jaxpref.recipes import places
from jaxpref.recipes.messages import listed

Path = str | os.PathLike[str]

# The name that diffusers looks for in a folder.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

# How the keys of a component begin; the first match wins.
_PREFIXES = {
  "text_encoder": re.compile(
    r"lora_te1?_|text_encoder\.(base_model\.model\.)?|clip_l\.|text_encoders\.clip_[lh]\.(transformer\.)?"
  ),
  "text_encoder_2": re.compile(
    r"lora_te2_|text_encoder_2\.(base_model\.model\.)?|clip_g\.|text_encoders\.clip_g\.(transformer\.)?"
  ),
  "unet": re.compile(r"lora_unet_|diffusion_model\.|(unet\.)?(base_model\.model\.)?"),
}
# What follows a layer's name: in diffusers before PEFT; in PEFT (with or without the adapter's name) and kohya; alpha.
_PART = re.compile(
  r"((_lora|\.lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
  r"|\.lora_(?P<new>A|B|down|up)(\.\w+)?\.weight"
  r"|(\.lora)?\.(?P<alpha>alpha))$"
)
# Embeddings of new words (textual inversion), which some tools put beside the factors.
_EMBEDDING = re.compile(r"bundle_emb\.(?P<word>.+?)\.(string_to_\w+\..+|[^.]+)$")
# Keys that only adapters of other kinds have, as PEFT, kohya and LyCORIS write them.
_OTHER_KINDS = {
  "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"),
  "LoHa": re.compile(r"\.hada_"),
  "LoKr": re.compile(r"\.lokr_"),
  "(IA)^3": re.compile(r"\.(on_input$|ia3_l\b)"),
  "OFT": re.compile(r"\.(oft|boft)_"),
  "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
  "full-rank difference": re.compile(r"\.diff(_b)?$"),
}


def adapter_rank(adapter: lora.Tree) -> int:
  """Returns r, the same in all layers; raises ValueError if they differ."""
  ranks = {a.shape[-1] for a, _ in lora.to_layers(adapter).values()}
  if len(ranks) != 1:
    raise ValueError(f"LoRA: the layers have the ranks {sorted(ranks)}, expected one; pad the smaller ones with zeros.")
  return ranks.pop()


def rescale(adapter: lora.Tree, scale: float, new_scale: float) -> lora.Tree:
  """Returns the adapter that with `new_scale` does what the given one does with `scale`."""
  if scale == new_scale:
    return adapter
  factors = {"lora_A": 1.0, "lora_B": scale / new_scale}
  return jax.tree_util.tree_map_with_path(lambda path, x: x * factors[path[-1].key], adapter)


# ---- Names -----------------------------------------------------------------------------------------------------------


def ldm_name(layer: str, config: UNetConfig) -> str:
  """Returns the name of a UNet's linear layer in the original implementation of Stable Diffusion.

  That implementation numbers the layers of all levels consecutively: `input_blocks` are the first convolution, then for
  each level its layers and its downsampler; each `output_blocks` is one layer of the way up, and the last one of each
  level includes the upsampler. In each block 0 is the resnet and 1 the transformer.

  Args:
    layer: dotted diffusers name, such as "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q".
    config: config of the UNet.

  >>> from jaxpref.models.presets import SDXL
  >>> ldm_name("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", SDXL.unet)
  'input_blocks.4.1.transformer_blocks.0.attn1.to_q'
  """
  layers = config.per_level("layers_per_block")
  inner = {"resnets": 0, "attentions": 1}
  layer = layer.replace(".time_emb_proj", ".emb_layers.1").replace(".conv_shortcut", ".skip_connection")
  if match := re.fullmatch(r"(time_embedding|add_embedding)\.linear_([12])", layer):
    name = {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}[match[1]]
    return f"{name}.{2 * int(match[2]) - 2}"
  if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer):
    return f"middle_block.{2 * int(match[2]) + inner[match[1]]}.{match[3]}"
  if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", layer):
    down, level, index = match[1] == "down", int(match[2]), int(match[4])
    before = sum(n + 1 for n in (layers if down else layers[::-1])[:level])
    block = f"input_blocks.{1 + before + index}" if down else f"output_blocks.{before + index}"
    return f"{block}.{inner[match[3]]}.{match[5]}"
  return layer


def _is_sdxl(config: UNetConfig) -> bool:
  return config.addition_embed_type == "text_time"


def _kohya_name(layer: str, config: UNetConfig) -> str:
  return "lora_unet_" + (ldm_name(layer, config) if _is_sdxl(config) else layer).replace(".", "_")


def _layers_by_any_name(component: str, config: UNetConfig, params: lora.Tree) -> dict[str, str]:
  """Returns all linear layers of a component by each name that files have for them (underscores for dots)."""

  def one_of_each() -> Any:
    return lora.to_layers(lora.init_lora(jax.random.key(0), params, rank=1, targets=""))

  names = {}
  for layer in jax.eval_shape(one_of_each):
    if component == "unet":  # "to_out" predates PEFT
      others = [ldm_name(layer, config), layer.removesuffix(".0")]
    else:  # the first predates PEFT, the second is transformers 5's
      others = [re.sub(r"(q|k|v|out)_proj$", r"to_\1", layer), layer.removeprefix("text_model.")]
    for name in (layer, *others):
      names[name.replace(".", "_")] = layer
  return names


# ---- Writing ---------------------------------------------------------------------------------------------------------


def _layers_to_write(adapter: lora.Tree) -> dict[str, tuple[Any, Any]]:
  """Returns `lora.to_layers` without the layers of a stack that the adapter's own file did not adapt."""
  layers = lora.to_layers(adapter)
  return {name: (a, b) for name, (a, b) in layers.items() if np.any(a) or np.any(b)} or layers


def save_diffusers(file: Path, adapter: lora.Tree, scale: float, *, dtype: Any = jnp.float32) -> None:
  """Writes the file that `load_lora_weights` of diffusers opens (by its name, or by its folder's: DIFFUSERS_FILE).

  Args:
    file: path to write.
    adapter: adapter of a UNet, as `lora.init_lora` returns it.
    scale: alpha / rank.
    dtype: dtype of the file: float32, float16 or bfloat16.

  Raises:
    ValueError: a factor is not finite or does not fit `dtype`.
  """
  layers, rank = _layers_to_write(adapter), adapter_rank(adapter)
  tree: dict[str, Any] = {}
  for layer, (a, b) in layers.items():
    tree |= {f"unet.{layer}.lora_A": {"kernel": a}, f"unet.{layer}.lora_B": {"kernel": b}}
  # Arguments of peft.LoraConfig; without them diffusers assumes that alpha is the rank.
  config = {"unet.r": rank, "unet.lora_alpha": scale * rank, "unet.target_modules": sorted(layers)}
  metadata = {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
  save_tree(file, tree, dtype=dtype, metadata=metadata)


def save_kohya(file: Path, adapter: lora.Tree, scale: float, config: UNetConfig, *, dtype: Any = jnp.float32) -> None:
  """Writes the file that ComfyUI and AUTOMATIC1111 open; see `save_diffusers` for the arguments.

  Args:
    config: config of the UNet, which determines the names.
  """
  rank = adapter_rank(adapter)
  alpha = float(np.asarray(scale * rank, dtype))  # as precise as the file holds it; the factors take the rest
  tree: dict[str, Any] = {}
  for layer, (a, b) in _layers_to_write(rescale(adapter, scale, alpha / rank)).items():
    name = _kohya_name(layer, config)
    tree |= {f"{name}.lora_down": {"kernel": a}, f"{name}.lora_up": {"kernel": b}, name: {"alpha": np.float32(alpha)}}
  # AUTOMATIC1111 reads from the metadata which base model a file is for.
  sd2 = not _is_sdxl(config) and config.per_level("cross_attention_dim")[0] == 1024
  metadata = {
    "ss_base_model_version": "sdxl_base_v1-0" if _is_sdxl(config) else "sd_v2" if sd2 else "sd_v1",
    "ss_v2": str(sd2),
    "ss_network_module": "networks.lora",
    "ss_network_dim": str(rank),
    "ss_network_alpha": str(alpha),
  }
  save_tree(file, tree, dtype=dtype, metadata=metadata)


# ---- Reading ---------------------------------------------------------------------------------------------------------


def load_lora(file: Path, config: UNetConfig, params: lora.Tree) -> tuple[dict[str, Any], float]:
  """Reads a LoRA of a UNet, written by diffusers, PEFT, kohya or this module in any precision, to continue training it.

  If layers have different ranks, the smaller factors are padded with zeros (which stay zero in training). If they have
  different alpha / rank, the difference goes into lora_B. Layers of a stack that the file leaves out are zero.

  Args:
    file: one safetensors file; PEFT's own `adapter_model.safetensors` needs the `adapter_config.json` beside it.
    config: config of the UNet that the adapter is for.
    params: its parameters, or their ShapeDtypeStructs.

  Returns:
    float32 adapter as `lora.init_lora` returns it, and its scale alpha / rank.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit. A file that also adapts text
      encoders raises: only the UNet's adapter is trained and written.
  """
  file = pathlib.Path(places.expand(os.fspath(file)))
  found, peft = _read(file)
  text = sorted(found.keys() - {"unet"})
  if text:
    raise ValueError(
      f"{file} adapts {' and '.join(text)}, and training can continue adapters of a UNet only; merge it into the base "
      "model (load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained of diffusers) and train on that."
    )
  if not found:
    raise ValueError(f"{file} holds no adapter of a UNet; give the path of a LoRA file for Stable Diffusion.")
  return _adapter(file, "unet", found["unet"], config, params, peft)


def load_pipeline_lora(
  file: Path, config: UNetConfig, params: Mapping[str, lora.Tree]
) -> tuple[dict[str, Any], float, dict[str, Any]]:
  """Reads a LoRA of a UNet, of text encoders, or of both, to draw pictures with.

  Args:
    file: see `load_lora`.
    config: config of the UNet.
    params: parameters of a pipeline by component, or their ShapeDtypeStructs.

  Returns:
    The UNet's float32 adapter ({} if the file has none), its scale alpha / rank, and the adapters of the text encoders
    in the file by component, with scale 1: see `merge_text_encoders`.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
  """
  file = pathlib.Path(places.expand(os.fspath(file)))
  found, peft = _read(file)
  if not found:
    raise ValueError(f"{file} holds no adapter; give the path of a LoRA file for Stable Diffusion.")
  if foreign := sorted(found.keys() - params.keys()):
    raise ValueError(f"{file} adapts {foreign[0]}, which the model does not have; use it with the one it was made for.")
  adapters = {
    name: _adapter(file, name, kept, config, params[name], peft)
    for name, layers in found.items()
    if (kept := _without_projection(file, name, layers, params[name]))
  }
  unet, scale = adapters.pop("unet", ({}, 1.0))
  return unet, scale, {name: rescale(adapter, own_scale, 1.0) for name, (adapter, own_scale) in adapters.items()}


class LoraFile(NamedTuple):
  """A file of an adapter, and its strength."""

  path: pathlib.Path
  strength: float = 1.0

  def __str__(self) -> str:
    return str(self.path) if self.strength == 1.0 else f"{self.path}:{self.strength:g}"


def parse_lora_file(text: str) -> LoraFile:
  """Reads FILE.safetensors, or FILE.safetensors:STRENGTH.

  Raises:
    ValueError: the strength is not a finite number.

  >>> parse_lora_file("styles/ink.safetensors:0.8").strength
  0.8
  """
  path, colon, number = text.rpartition(":")
  if not colon or not path.endswith(".safetensors"):
    return LoraFile(pathlib.Path(places.expand(text)))
  try:
    strength = float(number)
  except ValueError:
    strength = math.nan
  if not math.isfinite(strength):
    raise ValueError(f"LoRA {text}: the strength is {number!r}; expected a number, such as {path}:0.8.")
  return LoraFile(pathlib.Path(places.expand(path)), strength)


def load_pipeline_loras(
  files: Sequence[LoraFile], config: UNetConfig, params: Mapping[str, lora.Tree]
) -> tuple[dict[str, Any], float, dict[str, Any]]:
  """Reads several LoRAs that act together, each with its strength; arguments and result are `load_pipeline_lora`'s.

  The sum is exact: the factors stand side by side (`lora.combine`), and nothing is rounded into the network's weights.

  Raises:
    FileNotFoundError, ValueError: see `load_pipeline_lora`.
  """
  unets: list[tuple[dict[str, Any], float]] = []
  text_encoders: dict[str, list[tuple[dict[str, Any], float]]] = {}
  for file, strength in files:
    unet, scale, of_text = load_pipeline_lora(file, config, params)
    unets.append((unet, strength * scale))
    for name, adapter in of_text.items():
      text_encoders.setdefault(name, []).append((adapter, strength))
  texts = {name: lora.combine(adapters, params[name]) for name, adapters in text_encoders.items()}
  if len(unets) == 1:
    return *unets[0], texts
  return lora.combine(unets, params["unet"]), 1.0, texts


def merge_text_encoders(params: Mapping[str, Any], text_encoders: Mapping[str, lora.Tree]) -> dict[str, Any]:
  """Returns a pipeline's parameters by component, with `load_pipeline_lora`'s text encoder adapters merged in."""
  merged = {name: lora.merge_lora(params[name], adapter) for name, adapter in text_encoders.items()}
  return {**params, **merged}


# For one component: name of the layer in the file -> {"down", "up", "alpha"} -> tensor.
_Layers = dict[str, dict[str, np.ndarray]]


def _read(file: pathlib.Path) -> tuple[dict[str, _Layers], Mapping[str, Any]]:
  """Returns the factors in a file and arguments of peft.LoraConfig ({} if it has none), both by component."""
  tensors, metadata = _read_tensors(file)
  words = dict.fromkeys(match["word"] for key in tensors if (match := _EMBEDDING.match(key)))
  if words:
    warnings.warn(
      f"{file}: its embeddings of new words were left out ({listed(words)}): the tokenizer does not know them, so in a "
      "prompt they mean no more than their letters.",
      stacklevel=4,
    )
    tensors = {key: tensor for key, tensor in tensors.items() if not _EMBEDDING.match(key)}
  for kind, pattern in _OTHER_KINDS.items():
    if keys := sorted(filter(pattern.search, tensors)):
      raise ValueError(
        f"{file} is an adapter of another kind, {kind} ({len(keys)} tensors such as {keys[0]}), expected LoRA; merge "
        "it into the base model first, with the tool that made it."
      )
  found: dict[str, _Layers] = {}
  unexpected = []
  for key, tensor in tensors.items():
    match = _PART.search(key)
    if match is None:
      unexpected.append(key)
      continue
    prefixes = ((component, pattern.match(key)) for component, pattern in _PREFIXES.items())
    component, prefix = next((name, prefix[0]) for name, prefix in prefixes if prefix)
    layer = key[len(prefix) : match.start()].replace(".processor.", ".")
    part = match["old"] or match["new"] or match["alpha"]
    parts = found.setdefault(component, {}).setdefault(layer, {})
    parts[{"A": "down", "B": "up"}.get(part, part)] = tensor
  if unexpected:
    raise ValueError(
      f"{file} holds {len(unexpected)} tensors such as {min(unexpected)}, expected low-rank factors (lora_A and "
      "lora_B, or lora_down and lora_up); merge another kind of adapter into the base model first."
    )
  convolutions = sorted(
    layer
    for layers in found.values()
    for layer, parts in layers.items()
    if any(x.ndim == 4 and x.shape[2:] != (1, 1) for x in parts.values())
  )
  if convolutions:
    raise ValueError(
      f"{file} adapts {len(convolutions)} convolutions larger than 1x1, such as {convolutions[0]} (LoCon, kohya's "
      "conv_dim), expected dense layers and 1x1 convolutions; merge it into the base model first (load_lora_weights, "
      "fuse_lora, unload_lora_weights, save_pretrained of diffusers)."
    )
  return _without_emptied(file, found), _peft_arguments(file, tensors, metadata)


def _adapter(
  file: pathlib.Path,
  component: str,
  found: _Layers,
  config: UNetConfig,
  params: lora.Tree,
  peft: Mapping[str, Any],
) -> tuple[dict[str, Any], float]:
  """Returns the f32 adapter of one component, with one rank, and its scale alpha / rank."""
  by_any_name = _layers_by_any_name(component, config, params)
  layers, scales = {}, []
  for name in sorted(found):
    layer = by_any_name.get(name.replace(".", "_"), name)
    if layer in layers:
      raise ValueError(f"{file} holds {layer} twice, once as {name}; write the file again.")
    a, b = layers[layer] = _pair(file, name, found[name])
    scales.append(_scale(file, name, a.shape[1], found[name].get("alpha"), peft.get(component, {})))
  scale, rank = statistics.mode(scales), max(a.shape[1] for a, _ in layers.values())
  for (layer, (a, b)), own_scale in zip(layers.items(), scales, strict=True):
    extra = rank - a.shape[1]
    b = b if own_scale == scale else b * np.float32(own_scale / scale)
    layers[layer] = (np.pad(a, ((0, 0), (0, extra))), np.pad(b, ((0, extra), (0, 0))))
  try:
    adapter = lora.from_layers(layers, params)
  except ValueError as error:
    made_for = _made_for(layers) if component == "unet" else None
    own = _FAMILIES.get(config.per_level("cross_attention_dim")[0])
    cause = f"it was made for {made_for}, and the model is {own or 'another'}: " if made_for not in (None, own) else ""
    raise ValueError(f"{file}: {component}: {cause}{error}") from error
  return jax.tree.map(jnp.asarray, adapter), scale


# By the width of the text embeddings that a UNet attends to.
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


def _made_for(layers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str | None:
  """Returns the family of models that an adapter's layers belong to; None if they do not tell."""
  if any(re.search(r"(single|double)_blocks|single_transformer_blocks", name) for name in layers):
    return "Flux"
  if any(re.search(r"joint_blocks|attn[._]add_[qkv]_proj", name) for name in layers):
    return "Stable Diffusion 3"
  widths = {a.shape[0] for name, (a, _) in layers.items() if re.search(r"attn2[._]to_[kv]$", name)}
  return _FAMILIES.get(min(widths, default=0))


def look_for(file: Path) -> None:
  """Checks that a LoRA file exists, without reading its tensors.

  Raises:
    FileNotFoundError, ValueError: it does not exist, or is not a safetensors file.
  """
  import safetensors

  file = pathlib.Path(file)
  if not file.is_file():
    raise FileNotFoundError(f"there is no LoRA file {file}; give the path of one .safetensors file.")
  if file.suffix != ".safetensors":
    raise ValueError(f"{file} is not a .safetensors file, the only supported format (pickles can run code).")
  try:
    with safetensors.safe_open(file, framework="numpy"):
      pass
  except safetensors.SafetensorError as e:
    raise ValueError(f"{file} is not a readable safetensors file ({e}); download or write it again.") from e


def _read_tensors(file: pathlib.Path) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
  """Returns all tensors and the metadata of a file."""
  import safetensors

  look_for(file)
  try:
    with safetensors.safe_open(file, framework="numpy") as handle:
      tensors = {key: handle.get_tensor(key) for key in handle.keys()}
      return tensors, handle.metadata() or {}
  except (AttributeError, TypeError) as e:  # numpy lacks the number format
    raise ValueError(f"{file} holds numbers in an unsupported format ({e}); save it again in float16.") from e
  except safetensors.SafetensorError as e:
    raise ValueError(f"{file} is not a readable safetensors file ({e}); download or write it again.") from e


def _peft_arguments(
  file: pathlib.Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
  """Returns arguments of peft.LoraConfig by component; {} if the file has none."""
  if "lora_adapter_metadata" in metadata:
    arguments: dict[str, dict[str, Any]] = {}
    for key, value in _parse(f"the metadata of {file}", metadata["lora_adapter_metadata"]).items():
      component, _, name = key.partition(".")
      arguments.setdefault(component, {})[name] = value
    return arguments
  if tensors and all(key.startswith("base_model.model.") for key in tensors):
    beside = file.with_name("adapter_config.json")
    if not beside.is_file():
      raise FileNotFoundError(f"{file} has no adapter_config.json beside it, which says its alpha; copy that file too.")
    return {"unet": _parse(str(beside), beside.read_text(encoding="utf-8"))}
  return {}


def _parse(where: str, text: str) -> dict[str, Any]:
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError) as e:
    raise ValueError(f"{where} is not a JSON object ({e}); download or write it again.") from e


def _without_projection(file: pathlib.Path, component: str, found: _Layers, params: lora.Tree) -> _Layers:
  """Leaves out a text encoder's projection that the model does not have, and warns."""
  if component == "unet" or "text_projection" not in found or "text_projection" in params:
    return found
  warnings.warn(f"{file}: text_projection was left out: the model's {component} has none.", stacklevel=4)
  return {name: parts for name, parts in found.items() if name != "text_projection"}


def _without_emptied(file: pathlib.Path, found: Mapping[str, _Layers]) -> dict[str, _Layers]:
  """Leaves out layers whose factors have rank 0, as tools that resize adapters write them, and warns."""

  def is_emptied(parts: Mapping[str, np.ndarray]) -> bool:
    return {"down", "up"} <= parts.keys() and parts["down"].shape[:1] == parts["up"].shape[1:2] == (0,)

  emptied = [name for layers in found.values() for name, parts in layers.items() if is_emptied(parts)]
  if emptied:
    warnings.warn(f"{file}: {len(emptied)} layers of rank 0 were left out: {listed(emptied)}.", stacklevel=4)
  kept = {name: {n: p for n, p in layers.items() if not is_emptied(p)} for name, layers in found.items()}
  return {name: layers for name, layers in kept.items() if layers}


def _pair(file: pathlib.Path, layer: str, found: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Returns lora_A f32[in, r] and lora_B f32[r, out] of one layer."""
  if not {"down", "up"} <= found.keys():
    raise ValueError(
      f"{file}: {layer} has only {' and '.join(sorted(found))}, expected both factors; write the file again."
    )
  shapes = [found[name].shape for name in ("down", "up")]
  two = [s[:2] for s in shapes if len(s) == 2 or s[2:] == (1, 1)]  # some tools write dense layers as 1x1 convolutions
  if len(two) < 2 or two[0][0] != two[1][1]:
    raise ValueError(
      f"{file}: the factors of {layer} are {' and '.join(str(list(s)) for s in shapes)}, expected [r, in] and "
      "[out, r]; write the file again."
    )
  a, b = (found[name].astype(np.float32).reshape(s).T for name, s in zip(("down", "up"), two, strict=True))
  if not (np.isfinite(a).all() and np.isfinite(b).all()):
    raise ValueError(f"{file}: {layer} holds NaN or infinity; take an earlier checkpoint of this LoRA.")
  return a, b


def _scale(file: pathlib.Path, layer: str, rank: int, alpha: np.ndarray | None, peft: Mapping[str, Any]) -> float:
  """Returns alpha / rank of one layer: from its own tensor, from the arguments of peft.LoraConfig, or 1."""
  if alpha is not None:
    value = float(alpha.astype(np.float32).reshape(()))
  else:
    patterns = peft.get("alpha_pattern") or {}
    own = [v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
    value = float(own[0] if own else rank if peft.get("lora_alpha") is None else peft["lora_alpha"])
  scale = value / (rank**0.5 if alpha is None and peft.get("use_rslora") else rank)
  if not (np.isfinite(scale) and scale != 0):
    raise ValueError(f"{file}: {layer} has alpha {value}, expected a number other than 0; write the file again.")
  return scale
