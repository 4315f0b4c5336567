"""Deduces from tensors which network they belong to and which fields of config.json they contradict, for messages."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxpref.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jaxpref.models.sd3.transformer import SD3TransformerConfig
from jaxpref.models.t5 import T5Config
from jaxpref.models.unet import UNetConfig
from jaxpref.models.vae import VAEConfig

Shapes = Mapping[str, tuple[int, ...]]

# field -> (names of tensors, axis that has its size). For a field with a value for each level the names match in the
# order of the levels. None instead of the axis: the field is the number of different numbers in the name's group.
_UNET = {
  "in_channels": (r"conv_in\.weight", 1),
  "out_channels": (r"conv_out\.weight", 0),
  "block_out_channels": (r"down_blocks\.\d+\.resnets\.0\.conv1\.weight", 0),
  "layers_per_block": (r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight", None),
  "cross_attention_dim": (r".*\.attn2\.to_k\.weight", 1),
  "projection_class_embeddings_input_dim": (r"add_embedding\.linear_1\.weight", 1),
}
_VAE = {
  "in_channels": (r"encoder\.conv_in\.weight", 1),
  "out_channels": (r"decoder\.conv_out\.weight", 0),
  "latent_channels": (r"decoder\.conv_in\.weight", 1),
  "block_out_channels": (r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight", 0),
  "layers_per_block": (r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight", None),
}
_TEXT = {
  "vocab_size": (r"(?:text_model\.)?embeddings\.token_embedding\.weight", 0),
  "max_position_embeddings": (r"(?:text_model\.)?embeddings\.position_embedding\.weight", 0),
  "hidden_size": (r"(?:text_model\.)?embeddings\.token_embedding\.weight", 1),
  "intermediate_size": (r"(?:text_model\.)?encoder\.layers\.0\.mlp\.fc1\.weight", 0),
  "num_hidden_layers": (r"(?:text_model\.)?encoder\.layers\.(\d+)\.mlp\.fc1\.weight", None),
  "projection_dim": (r"text_projection\.weight", 0),
}
_VISION = {
  "hidden_size": (r"vision_model\.embeddings\.patch_embedding\.weight", 0),
  "num_channels": (r"vision_model\.embeddings\.patch_embedding\.weight", 1),
  "patch_size": (r"vision_model\.embeddings\.patch_embedding\.weight", 2),
  "intermediate_size": (r"vision_model\.encoder\.layers\.0\.mlp\.fc1\.weight", 0),
  "num_hidden_layers": (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.weight", None),
}
_SD3 = {
  "patch_size": (r"pos_embed\.proj\.weight", 2),
  "in_channels": (r"pos_embed\.proj\.weight", 1),
  "num_layers": (r"transformer_blocks\.(\d+)\.attn\.to_q\.weight", None),
  "caption_projection_dim": (r"context_embedder\.weight", 0),
  "joint_attention_dim": (r"context_embedder\.weight", 1),
  "pooled_projection_dim": (r"time_text_embed\.text_embedder\.linear_1\.weight", 1),
}
_T5 = {
  "vocab_size": (r"shared\.weight", 0),
  "d_model": (r"shared\.weight", 1),
  "d_ff": (r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wo\.weight", 1),
  "num_layers": (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.weight", None),
}
_FIELDS: dict[type, dict[str, tuple[str, int | None]]] = {
  UNetConfig: _UNET,
  VAEConfig: _VAE,
  CLIPTextConfig: _TEXT,
  CLIPVisionConfig: _VISION,
  SD3TransformerConfig: _SD3,
  T5Config: _T5,
}


# What names of tensors tell; the first match wins.
_KINDS = {
  "a whole checkpoint in one file": r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.",
  "a LoRA": r".*[._]lora[._](A|B|down|up)\b",
  "a ControlNet": r"controlnet_",
  "the transformer of Flux": r"single_transformer_blocks\.|(model\.diffusion_model\.)?double_blocks\.",
  "the transformer of Stable Diffusion 3": r"transformer_blocks\.\d+\.attn\.add_[qkv]_proj|joint_blocks\.",
  "a diffusion transformer": r"transformer_blocks\.\d+\.(attn|scale_shift_table)|adaln_single\.",
  "the UNet of a video model": r".*(temp_convs|temp_attentions|motion_modules|temporal_)",
  "the UNet of Stable Diffusion XL": r"add_embedding\.",
  "the UNet of Stable Diffusion 1 or 2": r"(down|up)_blocks\.\d+\.attentions\..*\.attn2\.",
  "a VAE": r"(encoder|decoder)\.(conv_in|mid_block|conv_out)\.",
  "a T5": r"(encoder|decoder)\.block\.\d+\.layer\.",
  "a CLIP": r"visual_projection\.",
  "a CLIP's vision tower": r"(vision_model\.)?embeddings\.(patch_embedding|class_embedding)",
  "a CLIP's text encoder": r"(text_model\.)?embeddings\.token_embedding\.",
}


def kind_of(names: Iterable[str]) -> str | None:
  """Returns which network tensors with these names belong to, such as "a VAE"; None if they do not tell.

  >>> kind_of(["add_embedding.linear_1.weight", "conv_in.weight"])
  'the UNet of Stable Diffusion XL'
  """
  known = list(names)
  return next((kind for kind, pattern in _KINDS.items() if any(re.match(pattern, name) for name in known)), None)


def contradicted_fields(config: Any, shapes: Shapes, prefix: str = "") -> dict[str, tuple[Any, Any]]:
  """Returns the fields that the tensors contradict.

  Args:
    config: config of a denoiser, an autoencoder, a text encoder or a CLIP; others have no known fields.
    shapes: {name: shape} of the tensors in the files.
    prefix: prefix of the fields' names.

  Returns:
    {name of the field: (value in the config, value from the tensors)}.
  """
  if isinstance(config, CLIPConfig):
    return contradicted_fields(config.text_config, shapes, "text_config.") | contradicted_fields(
      config.vision_config, shapes, "vision_config."
    )
  out = {}
  for field, (pattern, axis) in _FIELDS.get(type(config), {}).items():
    expected = getattr(config, field)
    matches = [match for name in sorted(shapes) if (match := re.fullmatch(pattern, name))]
    if not matches:
      continue
    if axis is None:
      found: Any = len({match[1] for match in matches})
    else:
      sizes = [shapes[match[0]][axis] for match in matches if len(shapes[match[0]]) > axis]
      found = tuple(sizes) if field == "block_out_channels" else next(iter(sizes), expected)
    if isinstance(expected, tuple) and not isinstance(found, tuple):
      expected = expected[0]
    if found != expected:
      out[prefix + field] = (expected, found)
  return out
