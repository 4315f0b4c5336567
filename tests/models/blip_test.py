"""ImageReward against transformers' BLIP, whose tensors are renamed to those of the published file."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxpref.files.tensors import load_tree
from jaxpref.models import blip
from tests.models import torch_parity

TOLERANCE = 1e-4
# Everything of its own size, so that a mix-up cannot fit.
VISION = blip.BLIPVisionConfig(16, 4, 24, 40, 2, 3)
TEXT = blip.BLIPTextConfig(50, 20, 28, 2, 5, 12)
CONFIG = blip.ImageRewardConfig(VISION, TEXT, text_length=9)

# transformers' names -> BLIP's own; those of the text encoder are the same in both.
_RENAMED = {
  "embeddings.class_embedding": "cls_token",
  "embeddings.position_embedding": "pos_embed",
  "embeddings.patch_embedding": "patch_embed.proj",
  "encoder.layers": "blocks",
  "self_attn.projection": "attn.proj",
  "self_attn.qkv": "attn.qkv",
  "layer_norm": "norm",
  "post_layernorm": "norm",
}


def head(width: int) -> torch.nn.Sequential:
  """As in ImageReward and LAION's aesthetic predictor: dropouts between, no activations."""
  layers = []
  for i, (size_in, size_out) in enumerate([(width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]):
    layers += [torch.nn.Linear(size_in, size_out)] + [torch.nn.Dropout(0.2)] * (i < 3)
  return torch.nn.Sequential(*layers).eval()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
  """Every parameter random, and so that the output depends much on the inputs."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if "norm" in name.lower():
        parameter.add_(0.3 * noise)
      elif "embedding" in name and "patch" not in name:
        parameter.copy_(noise)
      else:
        gain = 2.0 if any(part in name for part in ("query", "key", "qkv")) else 1.2
        parameter.copy_(gain * noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * noise)


class Reference(torch.nn.Module):
  """ImageReward of transformers' modules."""

  def __init__(self, config: blip.ImageRewardConfig):
    super().__init__()
    v, t = config.vision_config, config.text_config
    self.config = config
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    vision = {k: getattr(v, k) for k in (*shared, "image_size", "patch_size")}
    text = {k: getattr(t, k) for k in (*shared, "vocab_size", "max_position_embeddings", "pad_token_id")}
    self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision, hidden_act="gelu"))
    self.text = transformers.models.blip.modeling_blip_text.BlipTextModel(
      transformers.BlipTextConfig(
        **text, hidden_act="gelu", is_decoder=True, encoder_hidden_size=v.hidden_size, bos_token_id=1, sep_token_id=3
      ),
      add_pooling_layer=False,
    )
    self.mlp = head(t.hidden_size)
    randomise(self)
    self.eval()

  def forward(self, ids, pixels):
    image = self.vision(pixels).last_hidden_state
    text = self.text(
      ids,
      attention_mask=(ids != self.config.text_config.pad_token_id).long(),
      encoder_hidden_states=image,
      encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long),
    )
    reward = self.mlp(text.last_hidden_state[:, 0])[:, 0]
    return (reward - 0.16717362830052426) / 1.0333394966054072

  def published(self) -> dict[str, torch.Tensor]:
    """The state dict under the published names, with what else the published file has."""
    out = {}
    for name, tensor in self.vision.state_dict().items():
      for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
      out[f"blip.visual_encoder.{name}"] = tensor
    out |= {f"blip.text_encoder.{k}": v for k, v in self.text.state_dict().items()}
    out |= {f"mlp.layers.{k}": v for k, v in self.mlp.state_dict().items()}
    length = self.config.text_config.max_position_embeddings
    out["blip.text_encoder.embeddings.position_ids"] = torch.arange(length)[None]
    out["blip.vision_proj.weight"] = torch.zeros(4, self.config.vision_config.hidden_size)
    return out


@pytest.fixture(scope="module")
def reference():
  return Reference(CONFIG)


def test_image_reward_matches_transformers(reference, tmp_path):
  module = blip.ImageReward(CONFIG)
  ids = np.array([[2, 5, 7, 9, 3, 0, 0, 0, 0], [2, 11, 49, 48, 6, 8, 12, 13, 3]], np.int32)
  pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  tensors = {k: v.numpy() for k, v in reference.published().items() if k != "blip.vision_proj.weight"}
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  shapes = jax.eval_shape(module.init, jax.random.key(0), ids, pixels)["params"]
  params = load_tree(tmp_path / "model.safetensors", shapes)
  found = jax.jit(module.apply)({"params": params}, ids, pixels)
  with torch.no_grad():
    expected = reference(torch.tensor(ids).long(), torch.tensor(pixels).permute(0, 3, 1, 2)).numpy()
  assert torch_parity.relative_error(found, expected) <= TOLERANCE
  # The prompt, its padding and the image all count.
  unmasked = np.where(ids == 0, 1, ids)
  for other in [(ids[::-1], pixels), (ids, pixels[::-1]), (unmasked, pixels)]:
    moved = np.abs(np.asarray(jax.jit(module.apply)({"params": params}, *other)) - expected)
    assert moved[0] > 1000 * TOLERANCE * np.abs(expected).max()


def test_parameter_count_of_the_published_architecture():
  """ViT-L/16 (303 M), BERT-base with cross-attention to 1024 features (144 M without pooler), and the head."""
  module = blip.ImageReward(blip.ImageRewardConfig())
  example = np.zeros((1, 35), np.int32), np.zeros((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  vit = 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 + 1024 * (768 + 1) + 1024 + 197 * 1024
  assert count(shapes["blip"]["visual_encoder"]) == vit
  layer = 4 * (768**2 + 768) + 2 * (768**2 + 768) + 2 * (1024 * 768 + 768) + 8 * 768**2 + 5 * 768 + 3 * 2 * 768
  assert count(shapes["blip"]["text_encoder"]) == 12 * layer + (30524 + 512 + 2) * 768
  assert count(shapes["mlp"]) == sum((a + 1) * b for a, b in [(768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)])


def test_config_survives_json_and_refuses_others():
  assert blip.ImageRewardConfig.from_dict(CONFIG.to_dict()) == CONFIG
  med = {"hidden_act": "gelu", "encoder_width": 768, "add_cross_attention": True, "vocab_size": 30524}
  assert blip.ImageRewardConfig.from_dict({"model_type": "imagereward", "text_config": med}) == blip.ImageRewardConfig()
  with pytest.raises(ValueError, match="model_type is 'bert', expected 'imagereward'"):
    blip.ImageRewardConfig.from_dict({"model_type": "bert"})
  with pytest.raises(ValueError, match="hidden_act is 'relu', expected 'gelu'"):
    blip.ImageRewardConfig.from_dict({"model_type": "imagereward", "text_config": {"hidden_act": "relu"}})
