"""convert_spm.py: a reference checkpoint scores the same after conversion, and others are refused by name."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from torch import nn

from jaxpref.models import clip, preference
from jaxpref.rewards.loading import load_preference_model
from scripts.assets import convert_spm

REPOSITORY = pathlib.Path(__file__).parents[1]

# Everything of its own size, so that a mix-up cannot fit. The last id ends a text.
TEXT = {"vocab_size": 60, "hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 5, "num_hidden_layers": 2}
VISION = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3}
SIZE, PATCH, LENGTH, PROJECTION = 16, 4, 7, 12


# ---------------------------------------------------------------------------------------------
# The reference model in PyTorch, after github.com/RockeyCoss/SPO: the names are its names.


class Attention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

  def forward(self, x, causal):
    split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
  def __init__(self, width, inner):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

  def forward(self, x):
    return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
  """Of both towers; with a modulation in the one that knows the time."""

  def __init__(self, config, timed):
    super().__init__()
    width = config["hidden_size"]
    self.self_attn = Attention(width, config["num_attention_heads"])
    self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.mlp = MLP(width, config["intermediate_size"])
    if timed:
      self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

  def forward(self, x, causal, time=None):
    shift_1 = scale_1 = shift_2 = scale_2 = torch.zeros(())
    gate_1 = gate_2 = torch.ones(())
    if time is not None:
      parts = self.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
      shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
    h = self.layer_norm1(x) * (1 + scale_1) + shift_1
    x = x + gate_1 * self.self_attn(h, causal)
    h = self.layer_norm2(x) * (1 + scale_2) + shift_2
    return x + gate_2 * self.mlp(h)


class Stack(nn.Module):
  def __init__(self, config, timed):
    super().__init__()
    self.layers = nn.ModuleList(Block(config, timed) for _ in range(config["num_hidden_layers"]))

  def forward(self, x, causal, time=None):
    for layer in self.layers:
      x = layer(x, causal, time)
    return x


class TextEmbeddings(nn.Module):
  def __init__(self):
    super().__init__()
    self.token_embedding = nn.Embedding(TEXT["vocab_size"], TEXT["hidden_size"])
    self.position_embedding = nn.Embedding(LENGTH, TEXT["hidden_size"])
    self.register_buffer("position_ids", torch.arange(LENGTH)[None])

  def forward(self, ids):
    return self.token_embedding(ids) + self.position_embedding(self.position_ids)


class TextTower(nn.Module):
  def __init__(self):
    super().__init__()
    self.embeddings, self.encoder = TextEmbeddings(), Stack(TEXT, timed=False)
    self.final_layer_norm = nn.LayerNorm(TEXT["hidden_size"])

  def forward(self, ids):
    x = self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))
    return x[torch.arange(len(ids)), ids.argmax(dim=-1)]  # the first end of text: the largest id


class VisionEmbeddings(nn.Module):
  def __init__(self):
    super().__init__()
    width, patches = VISION["hidden_size"], (SIZE // PATCH) ** 2
    self.class_embedding = nn.Parameter(torch.zeros(width))
    self.patch_embedding = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
    self.position_embedding = nn.Embedding(patches + 1, width)
    self.register_buffer("position_ids", torch.arange(patches + 1)[None])

  def forward(self, pixels):
    x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
    return x + self.position_embedding(self.position_ids)


class VisionTower(nn.Module):
  def __init__(self):
    super().__init__()
    width = VISION["hidden_size"]
    self.embeddings, self.encoder = VisionEmbeddings(), Stack(VISION, timed=True)
    self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
    self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

  def forward(self, pixels, time):
    x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False, time=time)
    shift, scale = self.adaLN_modulation(time).chunk(2, dim=-1)
    return self.post_layernorm(x[:, 0]) * (1 + scale) + shift


class TimeEmbedder(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

  def forward(self, t):
    angles = t.float()[:, None] * 10_000 ** (-torch.arange(128) / 128)
    return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class TimedCLIP(nn.Module):
  def __init__(self):
    super().__init__()
    self.text_model, self.vision_model = TextTower(), VisionTower()
    self.visual_projection = nn.Linear(VISION["hidden_size"], PROJECTION, bias=False)
    self.text_projection = nn.Linear(TEXT["hidden_size"], PROJECTION, bias=False)
    self.logit_scale = nn.Parameter(torch.tensor(4.6))
    self.t_embedder = TimeEmbedder(VISION["hidden_size"])


class Reference(nn.Module):
  """What the published checkpoints are the state dict of."""

  def __init__(self):
    super().__init__()
    self.model = TimedCLIP()

  def forward(self, images, ids, t):
    """Scores [B] of images [B, 3, H, W] in [-1, 1]."""
    height, width = images.shape[-2:]
    scale = SIZE / min(height, width)
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    x = nn.functional.interpolate(images, size=size, mode="bicubic", align_corners=False)
    top, left = round((size[0] - SIZE) / 2), round((size[1] - SIZE) / 2)
    x = (x[..., top : top + SIZE, left : left + SIZE] / 2 + 0.5).clamp(0, 1)
    mean, std = torch.tensor(preference.CLIP_MEAN), torch.tensor(preference.CLIP_STD)
    x = (x - mean[:, None, None]) / std[:, None, None]
    m = self.model
    image = nn.functional.normalize(m.visual_projection(m.vision_model(x, m.t_embedder(t))), dim=-1)
    text = nn.functional.normalize(m.text_projection(m.text_model(ids)), dim=-1)
    return m.logit_scale.exp() * (image * text).sum(dim=-1)


# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
  """Every parameter random, those included that start at zero."""
  model = Reference()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "logit_scale" not in name:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name and "weight" in name else 0.3 * noise)
  return model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
  """With reference.bin, whose tensors are views of one storage, as DeepSpeed leaves them, and a CLIP's config.json."""
  folder = tmp_path_factory.mktemp("checkpoint")
  state = reference.state_dict()
  floats = [k for k, v in state.items() if v.is_floating_point()]
  flat = torch.cat([state[k].flatten() for k in floats])
  parts = flat.split([state[k].numel() for k in floats])
  views = {k: part.view(state[k].shape) for k, part in zip(floats, parts, strict=True)}
  torch.save(collections.OrderedDict((k, views.get(k, v)) for k, v in state.items()), folder / "reference.bin")
  fields = {"hidden_act": "gelu", "projection_dim": 512}
  config = clip.CLIPConfig(
    clip.CLIPTextConfig(max_position_embeddings=LENGTH, eos_token_id=2, **TEXT, **fields),
    clip.CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, **VISION, **fields),
    PROJECTION,
  )
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  return folder


def test_a_converted_checkpoint_scores_as_the_reference_does(reference, folder, tmp_path):
  """From the command line, as a user does; the process that converts does not import torch."""
  script = [sys.executable, "-X", "importtime", "scripts/assets/convert_spm.py"]
  done = subprocess.run(
    [*script, str(folder / "reference.bin"), str(tmp_path / "spm"), f"--clip={folder}"],
    cwd=REPOSITORY,
    env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"wrote {tmp_path / 'spm'}\n"
  assert [p.name for p in tmp_path.iterdir()] == ["spm"]
  imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
  assert "safetensors" in imported and "torch" not in imported

  module, params = load_preference_model(tmp_path / "spm")
  score = jax.jit(lambda pixels, ids, t: module.apply({"params": params}, ids, pixels, t))
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 58, (4, LENGTH))
  ids[:, 0] = 58
  for row, end in enumerate((3, 4, 5, 6)):
    ids[row, end:] = 59 if row % 2 else 0  # padded by the end of text, as SD1.5, or by 0, as SDXL's second tokenizer
    ids[row, end] = 59
  times = np.array([0, 1, 321, 981])
  for height, width in ((32, 32), (24, 41), (13, 9)):  # smaller, another shape, larger
    images = rng.uniform(-1.3, 1.3, (4, height, width, 3)).astype(np.float32)
    for t in (times, times[::-1].copy()):
      with torch.no_grad():
        expected = reference(torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(ids), torch.tensor(t)).numpy()
      found = np.asarray(score(preference.preprocess(images, SIZE), ids, t))
      assert np.abs(found - expected).max() / np.abs(expected).max() <= 1e-4
      assert np.abs(np.diff(expected)).min() > 1e-2, "the scores are the same whatever the input"


class Malicious:
  """Unpickling it would write a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (pathlib.Path(self.path),))


def test_other_files_are_refused_and_nothing_is_left_behind(reference, folder, tmp_path):
  config, out = folder / "config.json", tmp_path / "spm"
  state = dict(reference.state_dict())
  torch.save({"model.evil": Malicious(tmp_path / "executed")}, tmp_path / "evil.bin")
  with pytest.raises(ValueError, match=r"evil\.bin is not a torch file of nothing but tensors"):
    convert_spm.convert(tmp_path / "evil.bin", out, config)
  torch.save({"state_dict": state, "step": 3}, tmp_path / "nested.bin")
  with pytest.raises(ValueError, match=r"nested\.bin is not a flat dict .*something else at: state_dict, step"):
    convert_spm.read_checkpoint(tmp_path / "nested.bin", out)  # without a process of its own

  time = "model.t_embedder.mlp.0.weight"
  last = "model.vision_model.adaLN_modulation.1.bias"
  other = {k: v for k, v in state.items() if k not in (time, last)} | {"model.surplus": torch.zeros(3)}
  other["model.visual_projection.weight"] = torch.zeros(5, 24)
  torch.save(other, tmp_path / "other.bin")
  with pytest.raises(ValueError) as error:
    convert_spm.convert(tmp_path / "other.bin", out, config)
  said = str(error.value)
  assert said.startswith(f"{tmp_path / 'other.bin'} does not hold the tensors that its config.json describes")
  assert "unexpected 1 (model.surplus)" in said
  assert "mis-shaped 1 (visual_projection.weight: found [5, 24], expected [12, 24])" in said
  assert "missing 2 (" in said and all(k.removeprefix("model.") in said for k in (time, last))

  with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.bin"):
    convert_spm.convert(tmp_path / "nothing.bin", out, config)
  with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing; give the config\.json"):
    convert_spm.convert(folder / "reference.bin", out, tmp_path / "nothing")
  (tmp_path / "unet.json").write_text('{"_class_name": "UNet2DConditionModel"}')
  with pytest.raises(ValueError, match=r"unet\.json describes no CLIP"):
    convert_spm.convert(folder / "reference.bin", out, tmp_path / "unet.json")
  names = {p.name for p in tmp_path.iterdir()}
  assert names == {"evil.bin", "nested.bin", "other.bin", "unet.json"}


def test_without_a_config_the_checkpoint_is_taken_to_extend_clip_h():
  config = preference.StepAwareCLIPConfig.from_dict(convert_spm.clip_config(None))
  assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1280, 32)
  assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (1024, 24)
  assert config.projection_dim == 1024 and config.frequency_embedding_size == 256
  assert {config.text_config.hidden_act, config.vision_config.hidden_act} == {"gelu"}
