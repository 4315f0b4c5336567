"""Maps names of tensors in the original Stable Diffusion code's layout to those of diffusers and transformers.

Each function takes the shapes of a file's tensors by name, and returns {diffusers' name: `tensors.Piece`} for one
network. Unknown names are kept, so that the reader can report the ones that are too many.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping

from jaxpref.files.tensors import Piece
from jaxpref.models.clip import CLIPTextConfig
from jaxpref.models.unet import UNetConfig
from jaxpref.models.vae import VAEConfig

Shapes = Mapping[str, tuple[int, ...]]
Pieces = dict[str, Piece]

# Where a network may be in a whole checkpoint: how its names begin, and one name that it has.
_CLIP, _OPEN_CLIP = "embeddings.position_embedding.weight", "positional_embedding"
PLACES: dict[str, tuple[tuple[str, str], ...]] = {
  "unet": (("model.diffusion_model.", "input_blocks.0.0.weight"),),
  "vae": (("first_stage_model.", "decoder.conv_in.weight"), ("vae.", "decoder.conv_in.weight")),
  "text_encoder": (
    ("cond_stage_model.transformer.", f"text_model.{_CLIP}"),
    ("cond_stage_model.transformer.", _CLIP),
    ("conditioner.embedders.0.transformer.", f"text_model.{_CLIP}"),
    ("cond_stage_model.model.", _OPEN_CLIP),
  ),
  "text_encoder_2": (("conditioner.embedders.1.model.", _OPEN_CLIP),),
}
# The same for a file of one network.
ALONE = {
  "unet": ("input_blocks.0.0.weight", "conv_in.weight"),
  "vae": ("decoder.conv_in.weight",),
}

_UNET_ENDS = {
  "time_embed.0": "time_embedding.linear_1",
  "time_embed.2": "time_embedding.linear_2",
  "label_emb.0.0": "add_embedding.linear_1",
  "label_emb.0.2": "add_embedding.linear_2",
  "input_blocks.0.0": "conv_in",
  "out.0": "conv_norm_out",
  "out.2": "conv_out",
  "middle_block.1": "mid_block.attentions.0",
}
_UNET_RESNET = {
  "in_layers.0": "norm1",
  "in_layers.2": "conv1",
  "emb_layers.1": "time_emb_proj",
  "out_layers.0": "norm2",
  "out_layers.3": "conv2",
  "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"": "", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_OTHERS = re.compile(r"loss\.|model_ema\.")  # what its training leaves in the file
_OPEN_CLIP_ENDS = {
  "token_embedding": "text_model.embeddings.token_embedding",
  "ln_final": "text_model.final_layer_norm",
  "text_projection": "text_projection",
}
_OPEN_CLIP_LAYER = {
  "ln_1": "layer_norm1",
  "ln_2": "layer_norm2",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
  "attn.out_proj": "self_attn.out_proj",
}


def _joined(*names: str) -> str:
  return ".".join(filter(None, names))


def _inside(module: str, new: str, table: Mapping[str, str]) -> dict[str, str]:
  """Returns the table of a module's content under the names that the whole network uses."""
  return {_joined(module, a): _joined(new, b) for a, b in table.items()}


def _unet_modules(config: UNetConfig) -> dict[str, str]:
  """Returns {module of the original UNet: module of diffusers'}."""
  last = len(config.block_out_channels) - 1
  layers = config.per_level("layers_per_block")
  modules = dict(_UNET_ENDS)
  modules |= _inside("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
  modules |= _inside("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)
  number = itertools.count(1)
  for level, count in enumerate(layers):
    for layer in range(count):
      block = f"input_blocks.{next(number)}"
      modules |= _inside(f"{block}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESNET)
      modules[f"{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
    if level != last:
      modules[f"input_blocks.{next(number)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
  number = itertools.count()
  for level, count in enumerate(reversed(layers)):
    for layer in range(count + 1):
      block = f"output_blocks.{next(number)}"
      modules |= _inside(f"{block}.0", f"up_blocks.{level}.resnets.{layer}", _UNET_RESNET)
      modules[f"{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
      for after in ("1", "2"):  # without and with attention
        modules[f"{block}.{after}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
  return modules


def _vae_modules(config: VAEConfig) -> dict[str, str]:
  """Returns {module of the original autoencoder: module of diffusers'}."""
  modules: dict[str, str] = {}
  for half in ("encoder", "decoder"):
    modules[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    for layer in (0, 1):
      modules |= _inside(f"{half}.mid.block_{layer + 1}", f"{half}.mid_block.resnets.{layer}", _VAE_RESNET)
    modules |= _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
  last = len(config.block_out_channels) - 1
  for level in range(last + 1):
    down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"  # up: the coarsest comes first
    modules[f"encoder.down.{level}.downsample"] = f"{down}.downsamplers.0"
    modules[f"decoder.up.{level}.upsample"] = f"{up}.upsamplers.0"
    for layer in range(config.layers_per_block + 1):
      modules |= _inside(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", _VAE_RESNET)
      modules |= _inside(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", _VAE_RESNET)
  return modules


def _open_clip_modules(config: CLIPTextConfig) -> dict[str, str]:
  """Returns {module of open_clip's text tower: module of transformers'}."""
  modules = dict(_OPEN_CLIP_ENDS)
  for layer in range(config.num_hidden_layers):
    new = f"text_model.encoder.layers.{layer}"
    modules |= _inside(f"transformer.resblocks.{layer}", new, _OPEN_CLIP_LAYER)
  return modules


def renamed(key: str, modules: Mapping[str, str]) -> str:
  """Returns a name with its longest leading module that the table has replaced; else the name itself.

  >>> renamed("out.2.weight", {"out.2": "conv_out"})
  'conv_out.weight'
  """
  parts = key.split(".")
  for end in range(len(parts) - 1, 0, -1):
    if (module := modules.get(".".join(parts[:end]))) is not None:
      return _joined(module, *parts[end:])
  return key


def _below(prefix: str, shapes: Shapes) -> dict[str, str]:
  """Returns {name without the prefix: name} of the tensors that have the prefix."""
  return {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}


def unet(shapes: Shapes, prefix: str, config: UNetConfig) -> Pieces:
  """Maps the original UNet, whose names begin with `prefix`."""
  modules = _unet_modules(config)
  return {renamed(name, modules): Piece(key) for name, key in _below(prefix, shapes).items()}


def vae(shapes: Shapes, prefix: str, config: VAEConfig) -> Pieces:
  """Maps the original autoencoder, without what its training leaves beside it."""
  modules = _vae_modules(config)
  found = _below(prefix, shapes).items()
  return {renamed(name, modules): Piece(key) for name, key in found if not _VAE_OTHERS.match(name)}


def clip(shapes: Shapes, prefix: str, config: CLIPTextConfig) -> Pieces:
  """Maps a text encoder of transformers, which keeps its own names."""
  del config
  return {name: Piece(key) for name, key in _below(prefix, shapes).items()}


def open_clip(shapes: Shapes, prefix: str, config: CLIPTextConfig) -> Pieces:
  """Maps open_clip's text tower: its queries, keys and values are rows of one matrix, its projection is transposed.

  Leaves out the scale of its logits, and the layer after the last one of `config`: Stable Diffusion 2 conditions on the
  penultimate one.
  """
  modules = _open_clip_modules(config)
  return dict(_open_clip_pieces(shapes, prefix, config.num_hidden_layers, modules))


def _open_clip_pieces(
  shapes: Shapes, prefix: str, layers: int, modules: Mapping[str, str]
) -> Iterator[tuple[str, Piece]]:
  for name, key in _below(prefix, shapes).items():
    fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
    if name in ("logit_scale", "attn_mask") or name.startswith(f"transformer.resblocks.{layers}."):
      continue
    if fused:
      width = shapes[key][0] // 3
      for i, part in enumerate("qkv"):
        new = f"text_model.encoder.layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}"
        yield new, Piece(key, rows=(i * width, (i + 1) * width))
    elif name == "positional_embedding":
      yield "text_model.embeddings.position_embedding.weight", Piece(key)
    elif name == "text_projection":
      yield "text_projection.weight", Piece(key, transposed=True)
    else:
      yield renamed(name, modules), Piece(key)


def place(component: str, shapes: Shapes) -> tuple[str, str] | None:
  """Returns where a network is in a whole checkpoint, an entry of PLACES; None if it is missing."""
  return next(((prefix, has) for prefix, has in PLACES[component] if prefix + has in shapes), None)


def pieces(component: str, shapes: Shapes, config: UNetConfig | VAEConfig | CLIPTextConfig) -> Pieces:
  """Returns where a network's tensors are in a whole checkpoint, by diffusers' names; {} if it has none."""
  if (found := place(component, shapes)) is None:
    return {}
  prefix, has = found
  return _converter(component, has)(shapes, prefix, config)


def holds(component: str, shapes: Shapes) -> bool:
  """Returns whether a file holds a UNet or a VAE, for `pieces_alone`."""
  return any(name in shapes for name in ALONE[component]) or place(component, shapes) is not None


def pieces_alone(component: str, shapes: Shapes, config: UNetConfig | VAEConfig) -> Pieces:
  """Returns the same for a whole checkpoint, or for a file of one UNet or VAE, also in the layout of diffusers."""
  if any(name in shapes for name in ALONE[component]):
    return _converter(component, "")(shapes, "", config)  # diffusers' names are not in the tables
  return pieces(component, shapes, config)


def _converter(component: str, has: str) -> Callable[..., Pieces]:
  """Returns the function of the network whose place has this name."""
  converters: dict[str, Callable[..., Pieces]] = {"unet": unet, "vae": vae}
  return converters.get(component) or (open_clip if has == _OPEN_CLIP else clip)
