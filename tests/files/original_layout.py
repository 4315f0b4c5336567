"""Files in the layout of the original Stable Diffusion code, made of diffusers folders by names alone: for tests.

The tables are those of that code's modules, read off the order in which it builds them, and not those of the package.
"""

import re

RESNET = (
  ("norm1", "in_layers.0"),
  ("conv1", "in_layers.2"),
  ("time_emb_proj", "emb_layers.1"),
  ("norm2", "out_layers.0"),
  ("conv2", "out_layers.3"),
  ("conv_shortcut", "skip_connection"),
)
UNET = (
  ("conv_in", "input_blocks.0.0"),
  ("time_embedding.linear_1", "time_embed.0"),
  ("time_embedding.linear_2", "time_embed.2"),
  ("add_embedding.linear_1", "label_emb.0.0"),
  ("add_embedding.linear_2", "label_emb.0.2"),
  ("mid_block.resnets.0", "middle_block.0"),
  ("mid_block.attentions.0", "middle_block.1"),
  ("mid_block.resnets.1", "middle_block.2"),
  ("conv_norm_out", "out.0"),
  ("conv_out", "out.2"),
)
VAE = (
  ("mid_block.resnets.0", "mid.block_1"),
  ("mid_block.resnets.1", "mid.block_2"),
  ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
  ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
  ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
  ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
  ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
  ("conv_norm_out", "norm_out"),
  ("conv_shortcut", "nin_shortcut"),
)
OPEN_CLIP = (
  ("text_model.embeddings.token_embedding", "token_embedding"),
  ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
  ("text_model.final_layer_norm", "ln_final"),
  ("text_model.encoder.layers", "transformer.resblocks"),
  ("layer_norm", "ln_"),
  ("mlp.fc1", "mlp.c_fc"),
  ("mlp.fc2", "mlp.c_proj"),
  ("self_attn.out_proj", "attn.out_proj"),
)


def replaced(name, *tables):
  for table in tables:
    for a, b in table:
      name = name.replace(a, b)
  return name


def unet(names):
  """{diffusers' name: original one}; the blocks are numbered as they are run."""
  modules, number = [], 0
  runs = lambda side, level, what: {m[1] for n in names if (m := re.match(rf"{side}.{level}\.{what}\.(\d+)\.", n))}
  levels = {m[1] for n in names if (m := re.match(r"down_blocks\.(\d+)", n))}
  for level in map(str, range(len(levels))):
    for layer in map(str, range(len(runs("down_blocks", level, "resnets")))):
      number += 1
      modules.append((f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{number}.0."))
      modules.append((f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{number}.1."))
    if runs("down_blocks", level, "downsamplers"):
      number += 1
      modules.append((f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{number}.0.op."))
  number = -1
  for level in map(str, range(len(levels))):
    attends = bool(runs("up_blocks", level, "attentions"))
    for layer in map(str, range(len(runs("up_blocks", level, "resnets")))):
      number += 1
      modules.append((f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{number}.0."))
      modules.append((f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{number}.1."))
    modules.append((f"up_blocks.{level}.upsamplers.0.", f"output_blocks.{number}.{1 + attends}."))
  inner = lambda name: RESNET if "resnets" in name else ()
  return {name: replaced(name, modules, UNET, inner(name)) for name in names}


def vae(names):
  levels = len({m[1] for n in names if (m := re.match(r"decoder\.up_blocks\.(\d+)", n))})
  modules = [(f"down_blocks.{i}.resnets", f"down.{i}.block") for i in range(levels)]
  modules += [(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample") for i in range(levels)]
  modules += [(f"up_blocks.{i}.resnets", f"up.{levels - 1 - i}.block") for i in range(levels)]
  modules += [(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample") for i in range(levels)]
  return {name: replaced(name, modules, VAE) for name in names}


def open_clip(tensors, *, fuse, transpose):
  """Tensors of a text encoder under open_clip's names.

  Args:
    fuse, transpose: of three tensors, and of one.
  """
  out = {}
  for name, value in tensors.items():
    if name == "text_projection.weight":
      out["text_projection"] = transpose(value)
    elif match := re.fullmatch(r"(.*self_attn)\.q_proj\.(weight|bias)", name):
      parts = [tensors[f"{match[1]}.{x}_proj.{match[2]}"] for x in "qkv"]
      out[replaced(match[1], OPEN_CLIP).replace("self_attn", "attn") + f".in_proj_{match[2]}"] = fuse(parts)
    elif not re.search(r"self_attn\.[kv]_proj", name):
      out[replaced(name, OPEN_CLIP)] = value
  return out


def whole(unet_of, vae_of, text, text_2=None, *, open_clip_text=False, **ops):
  """All tensors of a checkpoint: {name: tensor}, of those of its networks by diffusers' names.

  Args:
    open_clip_text: whether the only text encoder is open_clip's.
    ops: of `open_clip`.
  """
  names, vae_names = unet(unet_of), vae(vae_of)
  out = {f"model.diffusion_model.{names[k]}": v for k, v in unet_of.items()}
  out |= {f"first_stage_model.{vae_names[k]}": v for k, v in vae_of.items()}
  if text_2 is not None:
    out |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in text.items()}
    out |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(text_2, **ops).items()}
  elif open_clip_text:
    out |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(text, **ops).items()}
  else:
    out |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
  return out
