"""How the LoRA files of other tools name the layers of each family's networks."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxpref.models import lora
from jaxpref.models.unet import UNetConfig

# How the keys of CLIP's text towers begin, in files of all tools.
_CLIP = {
  "text_encoder": re.compile(
    r"lora_te1?_|text_encoder\.(base_model\.model\.)?|clip_l\.|text_encoders\.clip_[lh]\.(transformer\.)?"
  ),
  "text_encoder_2": re.compile(
    r"lora_te2_|text_encoder_2\.(base_model\.model\.)?|clip_g\.|text_encoders\.clip_g\.(transformer\.)?"
  ),
}
DIFFUSERS, ORIGINAL = "diffusers", "the original implementation"


class Target(NamedTuple):
  """What a layer of a file is in the network.

  Attributes:
    layers: its name in a diffusers folder; or several names, if the file's layer has their outputs side by side.
    swapped: whether the file has the halves of its outputs in the other order.
    form: whose name it is, DIFFUSERS or ORIGINAL, in families that have both; "" for a name that both use.
  """

  layers: tuple[str, ...]
  swapped: bool = False
  form: str = ""


class Naming(Protocol):
  """How files name the layers of one family of models."""

  @property
  def family(self) -> str | None:
    """Name of the family in messages; None if it is not known."""
    ...

  @property
  def denoiser(self) -> str:
    """The component that is trained: "unet" or "transformer"."""
    ...

  @property
  def prefixes(self) -> Mapping[str, re.Pattern[str]]:
    """How the keys of each component begin; the first match wins."""
    ...

  def targets(self, component: str, params: lora.Tree) -> dict[str, Target]:
    """Returns all linear layers of a component by each name that files have for them (underscores for dots)."""
    ...

  def kohya(self, layers: Mapping[str, tuple[Any, Any]]) -> dict[str, Target]:
    """Returns the layers of a denoiser's adapter, as `lora.to_layers` gives them, by the name in a file of kohya's."""
    ...

  def kohya_metadata(self) -> dict[str, str]:
    """Returns what kohya's files say about the model."""
    ...


def made_for(layers: Mapping[str, tuple[np.ndarray, np.ndarray]], denoiser: str) -> str | None:
  """Returns the family of models that an adapter's layers belong to; None if they do not tell.

  Args:
    layers: lora_A [in, r] and lora_B [r, out] by a name that is no layer of the model.
    denoiser: see `Naming`.
  """
  if any(re.search(r"(single|double)_blocks|single_transformer_blocks", name) for name in layers):
    return "Flux"
  attention = re.compile(r"(transformer[._])?transformer_blocks[._]\d+[._]attn[._](to|add)_|.*attn[._]add_[qkv]_proj")
  widths = {a.shape[0] for name, (a, _) in layers.items() if attention.match(name)}
  if widths or any("joint_blocks" in name for name in layers):
    return "Flux" if widths == {3072} else STABLE_DIFFUSION_3
  widths = {a.shape[0] for name, (a, _) in layers.items() if re.search(r"attn2[._]to_[kv]$", name)}
  blocks = re.compile(r"(unet\.)?(down|mid|up|input|middle|output)_block")
  unet = denoiser != "unet" and any(blocks.match(name) for name in layers)
  return _UNETS.get(min(widths, default=0), "the UNet of another Stable Diffusion" if unet else None)


def _linear_layers(params: lora.Tree) -> dict[str, tuple[int, int]]:
  """Returns the inputs and outputs of all linear layers of a network by name."""

  def one_of_each() -> Any:
    return lora.to_layers(lora.init_lora(jax.random.key(0), params, rank=1, targets=""))

  return {name: (a.shape[-2], b.shape[-1]) for name, (a, b) in jax.eval_shape(one_of_each).items()}


def _text_targets(params: lora.Tree) -> dict[str, Target]:
  names = {}
  for layer in _linear_layers(params):
    # The first of the others predates PEFT, the second is transformers 5's.
    for name in (layer, re.sub(r"(q|k|v|out)_proj$", r"to_\1", layer), layer.removeprefix("text_model.")):
      names[name.replace(".", "_")] = Target((layer,))
  return names


# ---- Stable Diffusion 1.x, 2.x and XL --------------------------------------------------------------------------------

# By the width of the text embeddings that a UNet attends to.
_UNETS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


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


@dataclasses.dataclass(frozen=True)
class UNetNaming:
  """Names of Stable Diffusion 1.x, 2.x and XL. See `Naming`.

  Attributes:
    config: config of the UNet, which determines the names.
  """

  config: UNetConfig
  denoiser = "unet"
  prefixes = {**_CLIP, "unet": re.compile(r"lora_unet_|diffusion_model\.|(unet\.)?(base_model\.model\.)?")}

  @property
  def family(self) -> str | None:
    return _UNETS.get(self.config.per_level("cross_attention_dim")[0])

  @property
  def _is_sdxl(self) -> bool:
    return self.config.addition_embed_type == "text_time"

  def targets(self, component: str, params: lora.Tree) -> dict[str, Target]:
    if component != "unet":
      return _text_targets(params)
    names = {}
    for layer in _linear_layers(params):
      for name in (layer, ldm_name(layer, self.config), layer.removesuffix(".0")):  # "to_out" predates PEFT
        names[name.replace(".", "_")] = Target((layer,))
    return names

  def kohya(self, layers: Mapping[str, tuple[Any, Any]]) -> dict[str, Target]:
    name = lambda layer: ldm_name(layer, self.config) if self._is_sdxl else layer
    return {"lora_unet_" + name(layer).replace(".", "_"): Target((layer,)) for layer in layers}

  def kohya_text(self, component: str, layer: str) -> str:
    """Returns the name of a text encoder's layer in a file of kohya's."""
    first = "lora_te1_" if self._is_sdxl else "lora_te_"
    return {"text_encoder": first, "text_encoder_2": "lora_te2_"}[component] + layer.replace(".", "_")

  def kohya_metadata(self) -> dict[str, str]:
    # AUTOMATIC1111 reads from these which base model a file is for.
    sd2 = not self._is_sdxl and self.config.per_level("cross_attention_dim")[0] == 1024
    return {
      "ss_base_model_version": "sdxl_base_v1-0" if self._is_sdxl else "sd_v2" if sd2 else "sd_v1",
      "ss_v2": str(sd2),
      "ss_network_module": "networks.lora",
    }


# ---- Stable Diffusion 3 and 3.5 --------------------------------------------------------------------------------------

STABLE_DIFFUSION_3 = "Stable Diffusion 3"
# Name in the original implementation -> names in a diffusers folder, within a block and outside of the blocks.
_BLOCK = {
  "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
  "x_block.attn.proj": ("attn.to_out.0",),
  "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
  "x_block.attn2.proj": ("attn2.to_out.0",),
  "x_block.mlp.fc1": ("ff.net.0.proj",),
  "x_block.mlp.fc2": ("ff.net.2",),
  "x_block.adaLN_modulation.1": ("norm1.linear",),
  "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
  "context_block.attn.proj": ("attn.to_add_out",),
  "context_block.mlp.fc1": ("ff_context.net.0.proj",),
  "context_block.mlp.fc2": ("ff_context.net.2",),
  "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_OUTSIDE = {
  "x_embedder.proj": ("pos_embed.proj",),
  "context_embedder": ("context_embedder",),
  "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
  "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
  "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
  "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
  "final_layer.adaLN_modulation.1": ("norm_out.linear",),
  "final_layer.linear": ("proj_out",),
}


class StableDiffusion3Naming:
  """Names of Stable Diffusion 3 and 3.5, whose original implementation has queries, keys and values in one layer.

  Where a stream ends (the last block's context, and the end of the network) diffusers has the scale before the shift,
  and the original implementation the shift before the scale. See `Naming`.
  """

  family = STABLE_DIFFUSION_3
  denoiser = "transformer"
  prefixes = {
    **_CLIP,
    "text_encoder_3": re.compile(r"lora_te3_|text_encoder_3\.|t5xxl\.|text_encoders\.t5xxl\.(transformer\.)?"),
    "transformer": re.compile(r"lora_unet_|lora_transformer_|diffusion_model\.|(transformer\.)?(base_model\.model\.)?"),
  }

  def targets(self, component: str, params: lora.Tree) -> dict[str, Target]:
    if component != "transformer":
      return _text_targets(params)
    shapes = _linear_layers(params)
    original = _original_layers(shapes)
    names = {name.replace(".", "_"): target for name, target in original.items()}
    for layer in shapes:
      form = "" if layer in original else DIFFUSERS
      for name in (layer, layer.removesuffix(".0")):  # "to_out" predates PEFT
        names[name.replace(".", "_")] = Target((layer,), form=form)
    return names

  def kohya(self, layers: Mapping[str, tuple[Any, Any]]) -> dict[str, Target]:
    shapes = {name: (a.shape[-2], b.shape[-1]) for name, (a, b) in layers.items()}
    return {"lora_unet_" + name.replace(".", "_"): target for name, target in _original_layers(shapes).items()}

  def kohya_metadata(self) -> dict[str, str]:
    return {"ss_network_module": "networks.lora_sd3"}


def _original_layers(shapes: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
  """Returns the layers of the original implementation that hold some layers of a transformer, by name.

  Args:
    shapes: inputs and outputs by name in a diffusers folder.
  """
  found = {}
  for layer, (fan_in, fan_out) in shapes.items():
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    table, inner = (_BLOCK, block[2]) if block else (_OUTSIDE, layer)
    name = next((name for name, layers in table.items() if inner in layers), None)
    if name is None:
      continue
    before, after = ("", "") if block is None else (f"joint_blocks.{block[1]}.", f"transformer_blocks.{block[1]}.")
    swapped = inner in ("norm_out.linear", "norm1_context.linear") and fan_out == 2 * fan_in
    form = ORIGINAL if before + name != layer else ""
    found[before + name] = Target(tuple(after + layer for layer in table[name]), swapped, form)
  return found
