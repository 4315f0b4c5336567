"""convert_lrm.py: a published folder scores the same after conversion, and others are refused by name."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from torch import nn

from jaxpref.files import folders
from jaxpref.models import latent_reward
from jaxpref.rewards import latent
from jaxpref.rewards.loading import load_latent_reward, load_preference_model, open_latent_reward, save_latent_reward
from scripts.assets import convert_lrm
from tests.models.torch_parity import randomise

REPOSITORY = pathlib.Path(__file__).parents[1]
SIZE, LENGTH, VOCABULARY, PROJECTION = 8, 7, 60, 10

# Everything of its own size, so that a mix-up cannot fit.
UNET = {
  "sample_size": SIZE, "layers_per_block": 2, "norm_num_groups": 2, "block_out_channels": (4, 8, 12, 16),
  "attention_head_dim": 2, "cross_attention_dim": 20,
}  # fmt: skip
XL = {
  "sample_size": SIZE, "layers_per_block": 2, "norm_num_groups": 2, "block_out_channels": (4, 8, 12),
  "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
  "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
  "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 2, 3), "use_linear_projection": True,
  "cross_attention_dim": 36, "addition_embed_type": "text_time", "addition_time_embed_dim": 6,
  "projection_class_embeddings_input_dim": PROJECTION + 36,
}  # fmt: skip


def text_config(width, **fields):
  return transformers.CLIPTextConfig(
    vocab_size=VOCABULARY, hidden_size=width, intermediate_size=28, num_attention_heads=4, num_hidden_layers=2,
    max_position_embeddings=LENGTH, projection_dim=PROJECTION, bos_token_id=0, eos_token_id=2, **fields,
  )  # fmt: skip


class Reference:
  """The reference model in PyTorch, after github.com/Kwai-Kolors/LPO: its networks, and its formulas written out."""

  def __init__(self, xl):
    self.xl = xl
    self.unet = diffusers.UNet2DConditionModel(**(XL if xl else UNET)).eval()
    self.text_encoder = transformers.CLIPTextModel(text_config(20)).eval()
    self.networks = {"unet": self.unet, "text_encoder": self.text_encoder}
    features = sum(self.unet.config.block_out_channels) + self.unet.config.block_out_channels[-1]
    self.visual_projection = nn.Linear(features, PROJECTION, bias=False)
    self.text_projection = nn.Linear(20, PROJECTION, bias=False)
    if xl:
      config = text_config(16, hidden_act="gelu")
      self.text_encoder_2 = transformers.CLIPTextModelWithProjection(config).eval()
      self.networks["text_encoder_2"] = self.text_encoder_2
    for seed, network in enumerate(self.networks.values()):
      randomise(network, seed)
    self.logit_scale = 2.5

  def save(self, folder):
    for name, network in self.networks.items():
      network.save_pretrained(folder / name)
    state = {"visual_projection": self.visual_projection.state_dict(), "logit_scale": self.logit_scale}
    if not self.xl:
      state["text_projection"] = self.text_projection.state_dict()
    torch.save(state, folder / "state_dict.pt")

  def text(self, ids):
    """Hidden states, what SDXL's UNet is told of the pooled text, and the text's features."""
    if not self.xl:
      out = self.text_encoder(ids)
      return out.last_hidden_state, None, self.text_projection(out.pooler_output)
    first = self.text_encoder(ids[:, :LENGTH], output_hidden_states=True).hidden_states[-2]
    second = self.text_encoder_2(ids[:, LENGTH:], output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds, second.text_embeds

  def pooled(self, latents, t, hidden, text_embeds):
    """Means of down_block_res_samples 2, 5, 8 (and 11), taken from the network's own blocks, and of the middle."""
    samples, middle = [], []
    hooks = [b.register_forward_hook(lambda m, a, out: samples.extend(out[1])) for b in self.unet.down_blocks]
    hooks.append(self.unet.mid_block.register_forward_hook(lambda m, a, out: middle.append(out)))
    added = None
    if text_embeds is not None:
      side = 8.0 * SIZE
      time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(t), -1)
      added = {"text_embeds": text_embeds, "time_ids": time_ids}
    self.unet(latents, t, hidden, added_cond_kwargs=added)
    for hook in hooks:
      hook.remove()
    chosen = [samples[i - 1] for i in ((2, 5, 8) if self.xl else (2, 5, 8, 11))]  # the first of all is conv_in's
    return [x.mean(dim=(2, 3)) for x in chosen], middle[0].mean(dim=(2, 3))

  @torch.no_grad()
  def scores(self, latents, t, ids, empty, guidance_scale=7.5):
    """[N] of latents [N, 4, h, w] at t under their prompts."""
    hidden, told, features = self.text(ids)
    hidden_empty, told_empty, _ = self.text(empty.expand(len(ids), -1))
    levels, middle = self.pooled(latents, t, hidden, told)
    _, without = self.pooled(latents, t, hidden_empty, told_empty)
    middle = without + guidance_scale * (middle - without)
    image = self.visual_projection(torch.cat([*levels, middle], dim=-1))
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, features))
    return np.exp(self.logit_scale) * (image * text).sum(dim=-1).numpy()


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def published(request, tmp_path_factory):
  """A reference model, its folder, and that folder converted."""
  torch.manual_seed(0)
  model, folder = Reference(request.param == "sdxl"), tmp_path_factory.mktemp(request.param)
  model.save(folder / "published")
  return model, folder / "published", convert_lrm.convert(folder / "published", folder / "converted")


def inputs(model, count=3):
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((count, SIZE, SIZE, 4)).astype(np.float32)
  towers = 2 if model.xl else 1

  def tokens(length, *shape):
    ids = rng.integers(1, VOCABULARY - 1, (*shape, LENGTH)).astype(np.int32)
    ids[..., length:] = VOCABULARY - 1  # ends of text, the first of which is where it is pooled
    return ids

  ids = np.concatenate([tokens(4, count) for _ in range(towers)], axis=1)
  empty = np.concatenate([tokens(1, 1) for _ in range(towers)], axis=1)
  return latents, np.int32([1, 501, 951])[:count], ids, empty


@functools.partial(jax.jit, static_argnums=0)
def scores(module, params, latents, t, ids, empty):
  return latent.score_latents(module, params, latents, t, latent.embed_prompts(module, params, ids, empty))


def test_scores_are_those_of_the_reference(published):
  model, _, converted = published
  latents, t, ids, empty = inputs(model)
  module, params = open_latent_reward(converted)
  found = scores(module, params, latents, t, ids, empty)
  long = lambda x: torch.from_numpy(x).long()
  of_torch = (torch.from_numpy(latents.transpose(0, 3, 1, 2)), long(t), long(ids), long(empty))
  expected = model.scores(*of_torch)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert np.ptp(expected) > 1e-2, "the case tells nothing apart"
  assert np.abs(expected - model.scores(*of_torch, guidance_scale=1.0)).max() > 1e-2, "guidance does nothing here"
  assert np.abs(scores(module, params, latents, t[::-1].copy(), ids, empty) - expected)[0] > 1e-3, "nor does the time"


def test_the_folder_has_no_way_up_and_opens_again(published, tmp_path):
  model, _, converted = published
  module, params = open_latent_reward(converted)
  assert {p.name for p in converted.iterdir()} == {"config.json", "model.safetensors"}
  assert not [name for name in params["unet"] if "up_blocks" in name or "out" in name]
  assert ("text_projection" in params) != model.xl and module.config.guidance_scale == 7.5
  save_latent_reward(tmp_path / "again", module, params)
  again, tree = load_latent_reward(str(tmp_path / "again"), dtype="float32")
  assert again.config == module.config
  case = inputs(model)
  np.testing.assert_array_equal(scores(module, params, *case), scores(again, tree, *case))


def test_other_folders_are_refused(published, tmp_path):
  _, folder, converted = published
  for name in ("unet/config.json", "state_dict.pt"):
    broken = shutil.copytree(folder, tmp_path / name.replace("/", "_"))
    (broken / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*{name}; give the folder of a latent reward"):
      convert_lrm.convert(broken, tmp_path / "out")
  with pytest.raises(ValueError, match="model_type is None and it has no text_encoder and no unet, expected 'late"):
    latent_reward.LatentRewardConfig.from_dict({})
  with pytest.raises(ValueError, match="is a latent reward model, expected a step-aware .*; set config.reward=latent"):
    load_preference_model(converted)
  assert converted.is_dir() and not (tmp_path / "out").exists()


class Payload:
  def __reduce__(self):
    return print, ("code from a pickle was run",)


def projections(visual, logit_scale=2.5):
  return {"visual_projection": {"weight": visual}, "logit_scale": logit_scale}


@pytest.mark.parametrize(
  ("state", "sentence"),
  [
    ({"visual_projection": Payload()}, "is not a torch file of nothing but tensors and numbers"),
    ({"visual_projection": {"bias": torch.zeros(3)}}, r"\(found visual_projection.bias\); expected logit_scale"),
    (b"hello", r"numbers \(KeyError: 101\); take the one"),
    (b"", r"numbers \(EOFError\); take the one"),
    ({"a": Payload()}, r"numbers \(UnpicklingError: Weights only load failed\); take the one"),  # without advice
    (torch.zeros(3), r"\(found none\); expected logit_scale, text_projection.weight, visual_projection.weight"),
    (projections(torch.zeros(())), "visual_projection.weight is not a matrix of finite numbers"),
    (projections(torch.full((3, 4), float("nan"))), "visual_projection.weight is not a matrix of finite numbers"),
    (projections(torch.zeros(3, 4, dtype=torch.complex64)), "visual_projection.weight is not a matrix of finite nu"),
    (projections(torch.zeros(3, 4).to_sparse()), "visual_projection.weight is not a matrix of finite numbers"),
    (projections(torch.zeros(3, 4), torch.inf), "logit_scale is not a finite number"),
  ],
)
def test_other_pickles_are_refused_and_run_nothing(state, sentence, tmp_path):
  if isinstance(state, bytes):
    (tmp_path / "state_dict.pt").write_bytes(state)
  else:
    torch.save(state, tmp_path / "state_dict.pt")
  with pytest.raises(ValueError, match=sentence):
    convert_lrm.read_projections(tmp_path / "state_dict.pt", tmp_path / "arrays")
  assert not (tmp_path / "arrays").exists()


@pytest.mark.parametrize("given", [float("nan"), float("inf"), -1.0])
def test_a_guidance_scale_that_is_none_is_refused(tmp_path, given):
  with pytest.raises(ValueError, match=f"--guidance_scale={given}; expected a number of at least 0"):
    convert_lrm.convert(tmp_path, tmp_path / "out", guidance_scale=given)


def test_what_cannot_be_written_or_read_is_said_before_weights_are_read(published, tmp_path, monkeypatch):
  _, folder, _ = published
  monkeypatch.setattr(folders, "load_network", None)
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "a.tex").touch()
  with pytest.raises(FileExistsError, match="thesis exists and is not a model folder"):
    convert_lrm.convert(folder, tmp_path / "thesis")
  with pytest.raises(ValueError, match="unet is a folder of the published model; choose a new one"):
    convert_lrm.convert(folder, folder / "unet")
  refused = lambda *_: (_ for _ in ()).throw(ValueError("no projections"))
  monkeypatch.setattr(convert_lrm, "_read_in_process", refused)
  with pytest.raises(ValueError, match="no projections"):
    convert_lrm.convert(folder, tmp_path / "new" / "out")


def test_the_command_says_what_is_missing(tmp_path):
  script = REPOSITORY / "scripts" / "assets" / "convert_lrm.py"
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "out")]
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == 1 and done.stderr.startswith("error: there is no file ") and done.stderr.count("\n") == 1
