"""LoRA adapters <-> the safetensors files that other tools read and write.

Writes two forms, and reads both from any tool:

- diffusers / PEFT, `unet.<layer>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], with alpha in the file's
  metadata: `pipe.load_lora_weights` opens these;
- kohya, `lora_unet_<layer>.lora_down.weight` [r, in], `.lora_up.weight` [out, r] and `.alpha`, with underscores for
  the dots of a layer's name: ComfyUI and AUTOMATIC1111 open these. As in kohya's own files, layers have their diffusers
  names for SD1 and SD2, and those of the original implementation for SDXL and Stable Diffusion 3.

What differs between families of models is in `adapter_names`. The functions without a `Naming` are for Stable Diffusion
1.x, 2.x and XL; `sd3_adapters` has those for Stable Diffusion 3.

The tensors of a 1x1 convolution are [r, in, 1, 1] and [out, r, 1, 1] in both. A layer whose factors are zero is not
written. Other tools' files may also adapt text encoders (`text_encoder.`, `lora_te1_`, OneTrainer's `clip_l.`,
ComfyUI's `text_encoders.clip_l.transformer.`, ...). To draw pictures, these factors are merged into the encoders'
weights (`load_pipeline_lora`, `merge_text_encoders`). Training continues adapters of a UNet (`load_lora`), with the
text encoders' part merged, which stays as it is and is written again beside the UNet's (`load_text_encoder_loras`).
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
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.files.adapter_names import Naming, Target, UNetNaming, made_for
from jaxpref.files.tensors import save_tree
from jaxpref.models import lora
from jaxpref.models.unet import UNetConfig
from jaxpref.recipes import places
from jaxpref.recipes.messages import listed

Path = str | os.PathLike[str]

# The name that diffusers looks for in a folder.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

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


# ---- Writing ---------------------------------------------------------------------------------------------------------


def _layers_to_write(adapter: lora.Tree) -> dict[str, tuple[Any, Any]]:
  """Returns `lora.to_layers` without the layers of a stack that the adapter's own file did not adapt."""
  layers = lora.to_layers(adapter)
  return {name: (a, b) for name, (a, b) in layers.items() if np.any(a) or np.any(b)} or layers


def save_diffusers(
  file: Path,
  adapter: lora.Tree,
  scale: float,
  *,
  dtype: Any = jnp.float32,
  denoiser: str = "unet",
  text: Mapping[str, lora.Tree] = MappingProxyType({}),
) -> None:
  """Writes the file that `load_lora_weights` of diffusers opens (by its name, or by its folder's: DIFFUSERS_FILE).

  Args:
    file: path to write.
    adapter: adapter of the denoiser, as `lora.init_lora` returns it.
    scale: alpha / rank.
    dtype: dtype of the file: float32, float16 or bfloat16.
    denoiser: component that the adapter is for.
    text: adapters of text encoders by component, with scale 1, to write beside it.

  Raises:
    ValueError: a factor is not finite or does not fit `dtype`.
  """
  layers, rank = _layers_to_write(adapter), adapter_rank(adapter)
  tree: dict[str, Any] = {}
  for layer, (a, b) in layers.items():
    tree |= {f"{denoiser}.{layer}.lora_A": {"kernel": a}, f"{denoiser}.{layer}.lora_B": {"kernel": b}}
  # Arguments of peft.LoraConfig; without them diffusers assumes that alpha is the rank.
  arguments = {"r": rank, "lora_alpha": scale * rank, "target_modules": sorted(layers)}
  config = {f"{denoiser}.{name}": value for name, value in arguments.items()}
  for component, of_text in text.items():
    layers, rank = _layers_to_write(of_text), adapter_rank(of_text)
    for layer, (a, b) in layers.items():
      name = f"{component}.{layer}"
      tree |= {f"{name}.lora_A": {"kernel": a}, f"{name}.lora_B": {"kernel": b}}
    # PEFT compares the ends of names, which begin with "text_model." in some versions of transformers.
    targets = sorted(layer.removeprefix("text_model.") for layer in layers)
    arguments = {"r": rank, "lora_alpha": float(rank), "target_modules": targets}
    config |= {f"{component}.{name}": value for name, value in arguments.items()}
  metadata = {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
  save_tree(file, tree, dtype=dtype, metadata=metadata)


def save_kohya(
  file: Path,
  adapter: lora.Tree,
  scale: float,
  config: UNetConfig,
  *,
  dtype: Any = jnp.float32,
  text: Mapping[str, lora.Tree] = MappingProxyType({}),
) -> None:
  """Writes the file that ComfyUI and AUTOMATIC1111 open; see `save_diffusers` for the arguments.

  Args:
    config: config of the UNet, which determines the names.
  """
  naming = UNetNaming(config)
  of_text = {
    naming.kohya_text(component, layer): factors
    for component, of_it in text.items()
    for layer, factors in _layers_to_write(of_it).items()
  }
  save_kohya_as(naming, file, adapter, scale, dtype=dtype, beside=of_text)


def save_kohya_as(
  naming: Naming,
  file: Path,
  adapter: lora.Tree,
  scale: float,
  *,
  dtype: Any = jnp.float32,
  beside: Mapping[str, tuple[Any, Any]] = MappingProxyType({}),
) -> None:
  """Writes a file of kohya's in the names of a family; see `save_diffusers` for the other arguments.

  Where a layer of the file has several of the network's side by side, its rank is the sum of theirs, which is exact.

  Args:
    beside: factors [in, r] and [r, out] of further layers, with scale 1, by their names in the file.
  """
  layers, rank = _layers_to_write(adapter), adapter_rank(adapter)
  # Alpha is as precise as the file holds it; the factors take the rest.
  held = lambda alpha: float(np.asarray(alpha, dtype))
  tree: dict[str, Any] = {}
  for name, target in naming.kohya(layers).items():
    a, b = _joined(layers, target)
    alpha = held(scale * a.shape[-1])
    if scale != alpha / a.shape[-1]:
      b = b * (scale / (alpha / a.shape[-1]))
    tree |= _kohya_layer(name, a, b, alpha)
  for name, (a, b) in beside.items():
    tree |= _kohya_layer(name, a, b, a.shape[-1])
  metadata = {
    **naming.kohya_metadata(),
    "ss_network_dim": str(rank),
    "ss_network_alpha": str(held(scale * rank)),
  }
  save_tree(file, tree, dtype=dtype, metadata=metadata)


def _kohya_layer(name: str, a: Any, b: Any, alpha: float) -> dict[str, Any]:
  return {f"{name}.lora_down": {"kernel": a}, f"{name}.lora_up": {"kernel": b}, name: {"alpha": np.float32(alpha)}}


def _joined(layers: Mapping[str, tuple[Any, Any]], target: Target) -> tuple[Any, Any]:
  """Returns the factors [in, r] and [r, out] of a layer of a file: those of the network's layers that it has in it."""
  found = {layer: layers[layer] for layer in target.layers if layer in layers}
  a, b = next(iter(found.values()))
  if len(target.layers) > 1:
    rank, width = b.shape
    shared = all(np.array_equal(a, other) for other, _ in found.values())
    if not shared:
      a = np.concatenate([each for each, _ in found.values()], axis=1)
    b = np.zeros((a.shape[1], len(target.layers) * width), b.dtype)
    for number, (layer, (_, own)) in enumerate(found.items()):
      row, column = 0 if shared else number * rank, target.layers.index(layer) * width
      b[row : row + rank, column : column + width] = own
  return (a, np.roll(b, b.shape[1] // 2, axis=1)) if target.swapped else (a, b)


def _parted(a: np.ndarray, b: np.ndarray, target: Target) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns the factors of each of the network's layers in a layer of a file, the inverse of `_joined`.

  Layers that share the file's rank get all of it, and those that have each its own part of it get that. A layer that
  the file leaves as it is gets none.
  """
  if target.swapped:
    b = np.roll(b, b.shape[1] // 2, axis=1)
  if len(target.layers) == 1:
    return {target.layers[0]: (a, b)}
  blocks = np.split(b, len(target.layers), axis=1)
  used = np.stack([block.any(axis=1) for block in blocks])  # [layers, r]
  if not used.any():
    return {layer: (a, block) for layer, block in zip(target.layers, blocks, strict=True)}
  separate = used.sum(axis=0).max() == 1
  return {
    layer: (a[:, own], block[own]) if separate else (a, block)
    for layer, block, own in zip(target.layers, blocks, used, strict=True)
    if own.any()
  }


# ---- Reading ---------------------------------------------------------------------------------------------------------


def load_lora(file: Path, config: UNetConfig, params: lora.Tree) -> tuple[dict[str, Any], float]:
  """Reads a LoRA of a UNet, written by diffusers, PEFT, kohya or this module in any precision, to continue training it.

  What the file has for text encoders is left out here: see `load_text_encoder_loras`.
  If layers have different ranks, the smaller factors are padded with zeros (which stay zero in training). If they have
  different alpha / rank, the difference goes into lora_B. Layers of a stack that the file leaves out are zero.

  Args:
    file: one safetensors file; PEFT's own `adapter_model.safetensors` needs the `adapter_config.json` beside it.
    config: config of the UNet that the adapter is for.
    params: its parameters, or their ShapeDtypeStructs.

  Returns:
    float32 adapter as `lora.init_lora` returns it, and its scale alpha / rank.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
  """
  return load_lora_as(UNetNaming(config), file, params, leave_text=True)


def load_text_encoder_loras(file: Path, config: UNetConfig, params: Mapping[str, lora.Tree]) -> dict[str, Any]:
  """Reads what a LoRA file has for text encoders, by component, with scale 1; {} if it has nothing.

  Args:
    file, config: see `load_lora`.
    params: parameters of the text encoders by component, or their ShapeDtypeStructs.

  Raises:
    FileNotFoundError, ValueError: see `load_lora`.
  """
  naming, file = UNetNaming(config), pathlib.Path(places.expand(os.fspath(file)))
  found, peft = _read(file, naming)
  found.pop(naming.denoiser, None)
  return {name: rescale(*adapted, 1.0) for name, adapted in _of_components(naming, file, found, params, peft).items()}


def load_lora_as(
  naming: Naming, file: Path, params: lora.Tree, *, leave_text: bool = False
) -> tuple[dict[str, Any], float]:
  """Reads a LoRA of a denoiser in the names of a family; see `load_lora` for the rest.

  Args:
    leave_text: whether to leave out what the file has for text encoders; it raises a ValueError otherwise.
  """
  file = pathlib.Path(places.expand(os.fspath(file)))
  found, peft = _read(file, naming)
  text = sorted(found.keys() - {naming.denoiser})
  network = "UNet" if naming.denoiser == "unet" else naming.denoiser
  if text and not leave_text:
    raise ValueError(
      f"{file} adapts {' and '.join(text)}, and training can continue adapters of a {network} only; merge it into the "
      "base model (load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained of diffusers) and train on that."
    )
  if naming.denoiser not in found:
    raise ValueError(f"{file} holds no adapter of a {network}; give the path of a LoRA file for Stable Diffusion.")
  return _adapter(file, naming.denoiser, found[naming.denoiser], naming, params, peft)


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
  return _load_pipeline_lora(UNetNaming(config), file, params)


def _load_pipeline_lora(
  naming: Naming, file: Path, params: Mapping[str, lora.Tree]
) -> tuple[dict[str, Any], float, dict[str, Any]]:
  file = pathlib.Path(places.expand(os.fspath(file)))
  found, peft = _read(file, naming)
  if not found:
    raise ValueError(f"{file} holds no adapter; give the path of a LoRA file for Stable Diffusion.")
  adapters = _of_components(naming, file, found, params, peft)
  denoiser, scale = adapters.pop(naming.denoiser, ({}, 1.0))
  return denoiser, scale, {name: rescale(adapter, own_scale, 1.0) for name, (adapter, own_scale) in adapters.items()}


def _of_components(
  naming: Naming,
  file: pathlib.Path,
  found: Mapping[str, "_Layers"],
  params: Mapping[str, lora.Tree],
  peft: Mapping[str, Any],
) -> dict[str, tuple[dict[str, Any], float]]:
  """Returns the adapter and the scale of each component in a file."""
  if foreign := sorted(found.keys() - params.keys()):
    raise ValueError(f"{file} adapts {foreign[0]}, which the model does not have; use it with the one it was made for.")
  return {
    name: _adapter(file, name, kept, naming, params[name], peft)
    for name, layers in found.items()
    if (kept := _without_projection(file, name, layers, params[name], naming))
  }


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
  return load_pipeline_loras_as(UNetNaming(config), files, params)


def load_pipeline_loras_as(
  naming: Naming, files: Sequence[LoraFile], params: Mapping[str, lora.Tree]
) -> tuple[dict[str, Any], float, dict[str, Any]]:
  """Reads several LoRAs in the names of a family; see `load_pipeline_loras` for the rest."""
  denoisers: list[tuple[dict[str, Any], float]] = []
  text_encoders: dict[str, list[tuple[dict[str, Any], float]]] = {}
  for file, strength in files:
    denoiser, scale, of_text = _load_pipeline_lora(naming, file, params)
    denoisers.append((denoiser, strength * scale))
    for name, adapter in of_text.items():
      text_encoders.setdefault(name, []).append((adapter, strength))
  texts = {name: lora.combine(adapters, params[name]) for name, adapters in text_encoders.items()}
  if len(denoisers) == 1:
    return *denoisers[0], texts
  return lora.combine(denoisers, params[naming.denoiser]), 1.0, texts


def merge_text_encoders(params: Mapping[str, Any], text_encoders: Mapping[str, lora.Tree]) -> dict[str, Any]:
  """Returns a pipeline's parameters by component, with `load_pipeline_lora`'s text encoder adapters merged in."""
  merged = {name: lora.merge_lora(params[name], adapter) for name, adapter in text_encoders.items()}
  return {**params, **merged}


# For one component: name of the layer in the file -> {"down", "up", "alpha"} -> tensor.
_Layers = dict[str, dict[str, np.ndarray]]


def _read(file: pathlib.Path, naming: Naming) -> tuple[dict[str, _Layers], Mapping[str, Any]]:
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
    prefixes = ((component, pattern.match(key)) for component, pattern in naming.prefixes.items())
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
  return _without_emptied(file, found), _peft_arguments(file, tensors, metadata, naming.denoiser)


def _adapter(
  file: pathlib.Path,
  component: str,
  found: _Layers,
  naming: Naming,
  params: lora.Tree,
  peft: Mapping[str, Any],
) -> tuple[dict[str, Any], float]:
  """Returns the f32 adapter of one component, with one rank, and its scale alpha / rank."""
  by_any_name = naming.targets(component, params)
  targets = {name: by_any_name.get(name.replace(".", "_"), Target((name,))) for name in sorted(found)}
  _check_one_form(file, targets)
  layers, scales = {}, []
  for name, target in targets.items():
    a, b = _pair(file, name, found[name])
    own_scale = _scale(file, name, a.shape[1], found[name].get("alpha"), peft.get(component, {}))
    if b.shape[1] % (2 if target.swapped else len(target.layers)):
      raise ValueError(
        f"{file}: {name} has {b.shape[1]} outputs, expected those of {' and '.join(target.layers)} side by side; use "
        "the LoRA with the model it was made for."
      )
    for layer, factors in _parted(a, b, target).items():
      if layer in layers:
        raise ValueError(f"{file} holds {layer} twice, once as {name}; write the file again.")
      layers[layer] = factors
      scales.append(own_scale)
  scale, rank = statistics.mode(scales), max(a.shape[1] for a, _ in layers.values())
  for (layer, (a, b)), own_scale in zip(layers.items(), scales, strict=True):
    extra = rank - a.shape[1]
    b = b if own_scale == scale else b * np.float32(own_scale / scale)
    layers[layer] = (np.pad(a, ((0, 0), (0, extra))), np.pad(b, ((0, extra), (0, 0))))
  try:
    adapter = lora.from_layers(layers, params)
  except ValueError as error:
    other = made_for(layers, naming.denoiser) if component == naming.denoiser else None
    own = naming.family
    cause = f"it was made for {other}, and the model is {own or 'another'}: " if other not in (None, own) else ""
    raise ValueError(f"{file}: {component}: {cause}{error}") from error
  return jax.tree.map(jnp.asarray, adapter), scale


def _check_one_form(file: pathlib.Path, targets: Mapping[str, Target]) -> None:
  """Raises ValueError for a file with names of diffusers and names of the original implementation."""
  examples = {target.form: name for name, target in targets.items() if target.form}
  if len(examples) > 1:
    names = " and ".join(f"{name} as {form} has it" for form, name in sorted(examples.items()))
    raise ValueError(f"{file} mixes the names of two layouts ({names}), expected one of them; write the file again.")


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
  file: pathlib.Path, tensors: Mapping[str, Any], metadata: Mapping[str, str], denoiser: str
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
    return {denoiser: _parse(str(beside), beside.read_text(encoding="utf-8"))}
  return {}


def _parse(where: str, text: str) -> dict[str, Any]:
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError) as e:
    raise ValueError(f"{where} is not a JSON object ({e}); download or write it again.") from e


def _without_projection(
  file: pathlib.Path, component: str, found: _Layers, params: lora.Tree, naming: Naming
) -> _Layers:
  """Leaves out a text encoder's projection that the model does not have, and warns."""
  if component == naming.denoiser or "text_projection" not in found or "text_projection" in params:
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
