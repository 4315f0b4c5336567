"""Scorers against the torch code of each model, images prepared and prompts tokenized by it too; and bad inputs."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jaxpref.devices import sharding
from jaxpref.evaluation import judging
from jaxpref.files import tokenizers
from jaxpref.models import blip, open_clip, preference, presets
from jaxpref.rewards import networks, published
from jaxpref.rewards.loading import open_judge
from scripts.assets import convert_scorer
from tests.models import blip_test

pytestmark = pytest.mark.filterwarnings("ignore:the text encoder reads")  # one prompt is too long on purpose
REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = REPOSITORY / "jaxpref" / "assets"
TOLERANCE = 1e-3
SIZE = 32
PROMPTS = ["a red cat", "two dogs on a hill", "", "a cat", "a very long prompt " * 8]


def pictures() -> list[np.ndarray]:
  """Smooth ones of several shapes; square, wide, tall, smaller and larger than the network's, odd remainders."""
  rng = np.random.default_rng(0)
  shapes = [(48, 48), (47, 64), (75, 40), (20, 31), (SIZE, SIZE)]
  coarse = [rng.integers(0, 256, (5, 5, 3), np.uint8) for _ in shapes]
  resize = lambda image, h, w: np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
  return [resize(image, *shape) for image, shape in zip(coarse, shapes, strict=True)]


IMAGES = pictures()


def normalised(images) -> torch.Tensor:
  """u8[S, S, 3] -> f32[B, 3, S, S]."""
  pixels = (np.stack(images) / 255 - np.array(preference.CLIP_MEAN)) / np.array(preference.CLIP_STD)
  return torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)


def torchvision_pixels(images, size=SIZE) -> torch.Tensor:
  """Resize(size, bicubic) and CenterCrop(size) of PIL images, as torchvision's source has them."""
  out = []
  for image in images:
    picture = Image.fromarray(image)
    short, long = sorted(picture.size)
    new_long = int(size * long / short)
    new = (size, new_long) if picture.width <= picture.height else (new_long, size)
    picture = picture.resize(new, Image.Resampling.BICUBIC)
    top, left = int(round((picture.height - size) / 2.0)), int(round((picture.width - size) / 2.0))
    out.append(np.asarray(picture.crop((left, top, left + size, top + size))))
  return normalised(out)


def clip_config(eos_token_id: int) -> transformers.CLIPConfig:
  text = dict(
    vocab_size=2048, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=5,
    max_position_embeddings=16, eos_token_id=eos_token_id, bos_token_id=2046, pad_token_id=2047,
  )  # fmt: skip
  vision = dict(
    hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3, image_size=SIZE, patch_size=8
  )
  return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def make_clip(folder: pathlib.Path, eos_token_id: int = 2) -> transformers.CLIPModel:
  """A random CLIP in transformers' layout, with tiny-sd's tokenizer."""
  model = transformers.CLIPModel(clip_config(eos_token_id)).eval()
  blip_test.randomise(model)
  with torch.no_grad():
    model.logit_scale.fill_(4.5)
  model.save_pretrained(folder)
  shutil.copytree(TINY / "tiny-sd" / "tokenizer", folder, dirs_exist_ok=True)
  return model


def expected_cosines(model: transformers.CLIPModel, size: int = SIZE) -> np.ndarray:
  """As the model card of PickScore does it."""
  options = dict(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
  pixels = CLIPImageProcessorPil(**options)([Image.fromarray(i) for i in IMAGES], return_tensors="pt")
  tokenizer = tokenizers.tiny_tokenizer()
  ids = tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
  with torch.no_grad():
    out = model(input_ids=ids["input_ids"], pixel_values=pixels["pixel_values"])
  return (out.image_embeds * out.text_embeds).sum(-1).numpy()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  return folder, make_clip(folder)


# ---- Parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pickscore", "clip_h"])
def test_clip_scores_are_those_of_transformers(name, clip_folder):
  folder, model = clip_folder
  scorer = published.load(f"{name}={folder}", batch_size=2)  # five images: the last batch is not full
  factor = np.exp(4.5) if name == "pickscore" else 100.0
  expected = factor * expected_cosines(model)
  assert np.std(expected) > 3  # the scores tell the images and prompts apart
  np.testing.assert_allclose(scorer.score(IMAGES, PROMPTS), expected, atol=TOLERANCE)
  assert scorer.name == name and scorer.version.startswith(f"{folder.name} ")
  assert "logit_scale" in scorer.scale if name == "pickscore" else scorer.scale == "100 x cosine"


def test_tiny_clip_scores_are_those_of_transformers():
  model = transformers.CLIPModel.from_pretrained(TINY / "tiny-clip", dtype=torch.float32).eval()
  scorer = published.load("tiny-clip", batch_size=8)
  np.testing.assert_allclose(scorer.score(IMAGES, PROMPTS), 100 * expected_cosines(model), atol=TOLERANCE)


class Block(nn.Module):
  """Of open_clip's transformer."""

  def __init__(self, width, heads):
    super().__init__()
    self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
    layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
    self.mlp = nn.Sequential()
    for name, layer in layers.items():
      self.mlp.add_module(name, layer)

  def forward(self, x, mask):
    h = self.ln_1(x)
    x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
    return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
  def __init__(self, width, layers, heads):
    super().__init__()
    self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

  def forward(self, x, mask=None):
    for block in self.resblocks:
      x = block(x, mask)
    return x


class Visual(nn.Module):
  def __init__(self, width, layers, heads, patch, embed):
    super().__init__()
    self.class_embedding = nn.Parameter(torch.zeros(width))
    self.positional_embedding = nn.Parameter(torch.zeros((SIZE // patch) ** 2 + 1, width))
    self.proj = nn.Parameter(torch.zeros(width, embed))
    self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
    self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
    self.transformer = Tower(width, layers, heads)

  def forward(self, pixels):
    x = self.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
    return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
  """As open_clip's CLIP computes, with its names."""

  def __init__(self, config):
    super().__init__()
    c = config["model_cfg"]
    v, t = c["vision_cfg"], c["text_cfg"]
    self.visual = Visual(v["width"], v["layers"], v["width"] // v["head_width"], v["patch_size"], c["embed_dim"])
    self.transformer = Tower(t["width"], t["layers"], t["heads"])
    self.token_embedding = nn.Embedding(t["vocab_size"], t["width"])
    self.positional_embedding = nn.Parameter(torch.zeros(t["context_length"], t["width"]))
    self.ln_final = nn.LayerNorm(t["width"])
    self.text_projection = nn.Parameter(torch.zeros(t["width"], c["embed_dim"]))
    self.logit_scale = nn.Parameter(torch.zeros(()))
    blip_test.randomise(self)
    with torch.no_grad():
      self.logit_scale.fill_(4.6)
    self.eval()

  def forward(self, ids, pixels):
    x = self.token_embedding(ids) + self.positional_embedding
    causal = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
    x = self.ln_final(self.transformer(x, causal))
    text = x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
    unit = nn.functional.normalize
    return (unit(self.visual(pixels), dim=-1) * unit(text, dim=-1)).sum(-1)


MINIATURE_CONFIG = {
  "model_cfg": {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 2048, "width": 20, "heads": 5, "layers": 3},
  }
}


def hpsv2_pixels(images) -> torch.Tensor:
  """ToTensor, the longer side to SIZE, padding and normalising, as in the hpsv2 package."""
  out = []
  for image in images:
    x = torch.tensor(image).permute(2, 0, 1)[None] / 255
    scale = SIZE / float(max(image.shape[:2]))
    new = [round(n * scale) for n in image.shape[:2]]
    x = nn.functional.interpolate(x, size=new, mode="bicubic", align_corners=False, antialias=True)
    pad_h, pad_w = SIZE - new[0], SIZE - new[1]
    x = nn.functional.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    mean, std = torch.tensor(preference.CLIP_MEAN), torch.tensor(preference.CLIP_STD)
    out.append((x - mean[:, None, None]) / std[:, None, None])
  return torch.cat(out)


@pytest.fixture
def in_this_process(monkeypatch):
  """The converter's other process costs seconds; one test starts it."""

  def run(command, **unused):
    convert_scorer.read_checkpoint(pathlib.Path(command[-2]), pathlib.Path(command[-1]))
    return subprocess.CompletedProcess(command, 0, stderr="")

  monkeypatch.setattr(convert_scorer.subprocess, "run", run)


def open_clip_ids() -> torch.Tensor:
  """open_clip pads with zeros; the largest id ends the text."""
  ids = tokenizers.tokenize(tokenizers.tiny_tokenizer(), PROMPTS, length=16)
  end = ids.argmax(1)
  return torch.tensor(np.where(np.arange(16)[None] <= end[:, None], ids, 0)).long()


def test_hpsv2_scores_are_those_of_open_clips_layers(tmp_path, in_this_process):
  name, model = "hpsv2.1", OpenCLIP(MINIATURE_CONFIG)
  state = {f"module.{k}": v for k, v in model.state_dict().items()}
  torch.save({"state_dict": state | {"attn_mask": torch.zeros(3)}, "epoch": 3}, tmp_path / "HPS.pt")
  (tmp_path / "config.json").write_text(json.dumps(MINIATURE_CONFIG))
  out = tmp_path / "out"
  options = dict(config=tmp_path / "config.json", tokenizer=TINY / "tiny-sd" / "tokenizer")
  left_out = convert_scorer.convert(name, tmp_path / "HPS.pt", out, **options)
  assert left_out == ["attn_mask"]
  files = ["merges.txt", "open_clip_config.json", "open_clip_model.safetensors", "vocab.json"]
  assert sorted(p.name for p in out.iterdir()) == files
  scorer = published.load(f"{name}={out}", batch_size=4)
  with torch.no_grad():
    expected = model(open_clip_ids(), hpsv2_pixels(IMAGES)).numpy()
  assert np.std(expected) > 0.05
  np.testing.assert_allclose(scorer.score(IMAGES, PROMPTS), expected, atol=1e-5)
  assert scorer.scale.startswith("cosine")


def test_an_open_clip_folder_is_read_and_quick_gelu_is_seen(tmp_path):
  """What open_clip publishes beside, or instead of, transformers' layout."""
  model = OpenCLIP(MINIATURE_CONFIG)
  for block in [*model.transformer.resblocks, *model.visual.transformer.resblocks]:
    block.mlp.gelu = transformers.activations.QuickGELUActivation()
  safetensors.torch.save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
  config = {"model_cfg": MINIATURE_CONFIG["model_cfg"] | {"quick_gelu": True}}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
  shutil.copytree(TINY / "tiny-sd" / "tokenizer", tmp_path, dirs_exist_ok=True)
  options = dict(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
  pixels = CLIPImageProcessorPil(**options)([Image.fromarray(i) for i in IMAGES], return_tensors="pt")["pixel_values"]
  with torch.no_grad():
    expected = 100 * model(open_clip_ids(), pixels).numpy()
  found = published.load(f"clip_h={tmp_path}").score(IMAGES, PROMPTS)
  np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_open_clip_trees_survive_the_round_trip():
  config = open_clip.config_from_dict(open_clip.VIT_H_14)
  module = preference.CLIPModel(config)
  shapes = presets.abstract_params(module)
  there = jax.eval_shape(lambda p: open_clip.from_clip(p, config), shapes)
  back = jax.eval_shape(lambda p: open_clip.to_clip(p, config), there)
  assert jax.tree.map(lambda x: x.shape, back) == jax.tree.map(lambda x: x.shape, shapes)
  assert sum(x.size for x in jax.tree.leaves(there)) == 986_109_441  # that of the published ViT-H-14


def test_aesthetic_scores_are_those_of_a_sequential(tmp_path, clip_folder):
  folder, model = clip_folder
  head = blip_test.head(12)
  blip_test.randomise(head)
  torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "mlp.pth")
  out = tmp_path / "aesthetic"
  script = [sys.executable, "scripts/assets/convert_scorer.py"]
  script += ["aesthetic", tmp_path / "mlp.pth", out, "--clip", folder]
  environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
  done = subprocess.run(script, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"wrote {out}\n"
  with torch.no_grad():
    features = model.visual_projection(model.vision_model(torchvision_pixels(IMAGES)).pooler_output)
    expected = head(nn.functional.normalize(features, dim=-1))[:, 0].numpy()
  assert np.std(expected) > 0.03
  scorer = published.load(f"aesthetic={out}", batch_size=8)
  np.testing.assert_allclose(scorer.score(IMAGES, [""] * 5), expected, atol=1e-5)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two", "dog", "##s", "hill", "very", "long"]


@pytest.fixture
def imagereward(tmp_path, in_this_process):
  """A miniature of the published files, converted, and its torch model."""
  vision = blip.BLIPVisionConfig(SIZE, 8, 24, 40, 2, 3)
  text = blip.BLIPTextConfig(len(WORDS) + 2, 20, 28, 2, 5, 12)
  config = blip.ImageRewardConfig(vision, text, text_length=9)
  model = blip_test.Reference(config)
  torch.save(model.published(), tmp_path / "ImageReward.pt")
  (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  options = dict(config=tmp_path / "config.json", tokenizer=tmp_path)
  out = tmp_path / "out"
  left_out = convert_scorer.convert("imagereward", tmp_path / "ImageReward.pt", out, **options)
  assert left_out == ["blip.text_encoder.embeddings.position_ids", "blip.vision_proj.weight"]
  return out, model


def test_imagereward_scores_are_those_of_transformers_blip(imagereward):
  folder, model = imagereward
  tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
  ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=9, return_tensors="pt")
  with torch.no_grad():
    expected = model(ids["input_ids"], torchvision_pixels(IMAGES)).numpy()
  assert np.std(expected) > 0.1
  scorer = published.load(f"imagereward={folder}", batch_size=3)
  np.testing.assert_allclose(scorer.score(IMAGES, PROMPTS), expected, atol=TOLERANCE)


def test_the_judge_is_that_of_the_evaluation():
  images = [i for i in np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)]
  module, params = open_judge(TINY / "tiny-judge")
  expected, _ = judging.judge_images(module, params, np.stack(images), batch_size=4)
  for style, mesh in (("noto", None), ("openmoji", sharding.make_mesh(devices=jax.devices()[:2]))):
    scorer = published.load("judge", batch_size=2, preferred_style=style, mesh=mesh)
    column = module.config.styles.index(style)
    np.testing.assert_allclose(scorer.score(images, ["", "x", "y"]), expected[:, column], atol=1e-4)
    assert scorer.scale == f"log-probability of the preferred style {style}"
  assert scorer.score([np.zeros((64, 48, 3), np.uint8)], [""]).shape == (1,)  # resized to what it was trained on


@pytest.mark.parametrize("image", IMAGES)
def test_images_are_prepared_as_torchvision_does(image):
  found = normalised([networks.torchvision_image(image, SIZE)])
  np.testing.assert_array_equal(found, torchvision_pixels([image]))
  padded = torch.tensor(networks.padded_image(image, SIZE)).permute(2, 0, 1)[None] / 255
  mean, std = (torch.tensor(v)[:, None, None] for v in (preference.CLIP_MEAN, preference.CLIP_STD))
  np.testing.assert_allclose((padded - mean) / std, hpsv2_pixels([image]), atol=1e-4)


# ---- Batches and devices ---------------------------------------------------------------------------------------------


def test_neither_the_batch_nor_the_devices_change_a_score(imagereward, tmp_path):
  """Of each kind of network; five images are no multiple of these batches."""
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  safetensors.torch.save_file(OpenCLIP(MINIATURE_CONFIG).state_dict(), tmp_path / "open_clip_model.safetensors")
  shutil.copytree(TINY / "tiny-sd" / "tokenizer", tmp_path, dirs_exist_ok=True)
  (tmp_path / "config.json").unlink()  # of the fixture
  (tmp_path / "open_clip_config.json").write_text(json.dumps(MINIATURE_CONFIG))
  for spec in (f"hpsv2={tmp_path}", f"imagereward={imagereward[0]}"):
    expected = published.load(spec, batch_size=5).score(IMAGES, PROMPTS)
    found = published.load(spec, batch_size=3, mesh=mesh).score(IMAGES, PROMPTS)  # 4, on two devices
    np.testing.assert_allclose(found, expected, atol=1e-4)


# ---- In the graph ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
def test_images_are_prepared_in_the_graph_as_on_the_host(image):
  """But for one level in few places, where float32 and PIL's integers round differently."""
  batch = jnp.asarray(image, jnp.float32)[None]
  pairs = (
    (networks.clip_image, networks.clip_pixels),
    (networks.torchvision_image, networks.torchvision_pixels),
  )
  for on_host, in_graph in pairs:
    difference = np.abs(np.asarray(jax.jit(in_graph, static_argnums=1)(batch, SIZE))[0] - on_host(image, SIZE))
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.02
  found = jax.jit(networks.padded_pixels, static_argnums=1)(batch, SIZE)[0]
  np.testing.assert_allclose(found, networks.padded_image(image, SIZE), atol=2e-3)


@pytest.fixture
def every_network(imagereward, clip_folder, tmp_path):
  """A spec of each kind of network."""
  hps, head = tmp_path / "hps", tmp_path / "aesthetic"
  hps.mkdir()
  safetensors.torch.save_file(OpenCLIP(MINIATURE_CONFIG).state_dict(), hps / "open_clip_model.safetensors")
  shutil.copytree(TINY / "tiny-sd" / "tokenizer", hps, dirs_exist_ok=True)
  (hps / "config.json").unlink(missing_ok=True)
  (hps / "open_clip_config.json").write_text(json.dumps(MINIATURE_CONFIG))
  mlp = blip_test.head(12)
  blip_test.randomise(mlp)
  torch.save({f"layers.{k}": v for k, v in mlp.state_dict().items()}, tmp_path / "mlp.pth")
  convert_scorer.convert("aesthetic", tmp_path / "mlp.pth", head, clip=str(clip_folder[0]))
  clip = clip_folder[0]
  return [
    *(f"{name}={clip}" for name in ("pickscore", "clip_l", "clip_h")),
    *(f"{name}={hps}" for name in ("hpsv2", "hpsv2.1")),
    f"aesthetic={head}", f"imagereward={imagereward[0]}", "judge", "tiny-clip",
  ]  # fmt: skip


def test_every_scorer_gives_its_numbers_in_the_graph(every_network):
  """Of images between the levels of 8 bits, of which two are of one prompt; and a scale into logits."""
  assert {spec.partition("=")[0] for spec in every_network} == set(published.PUBLISHED)
  images = np.stack([IMAGES[0], IMAGES[0][::-1], np.rot90(IMAGES[0])])
  prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
  between = images / 127.5 - 1.0 + np.random.default_rng(0).uniform(-0.45, 0.45, images.shape) / 127.5
  logits = {"hpsv2": 100.0, "hpsv2.1": 100.0, "imagereward": 1.033}
  for spec in every_network:
    reward, params = published.load_reward(spec, dtype="float32", placement=None, preferred_style="noto")
    assert reward.scale == logits.get(reward.name, 1.0)
    weights = {reward.name: params}
    batch = {field: tokenize(prompts) for field, tokenize in reward.tokenizers.items()}
    assert bool(batch) == (reward.name not in ("aesthetic", "judge"))

    @jax.jit
    def score(weights, batch, images, reward=reward):
      return reward.score(weights, images, jnp.full(3, 500), reward.prompts(weights, batch))

    found = score(weights, batch, np.float32(between))
    expected = published.load(spec, preferred_style="noto").score(list(images), prompts)
    # A level of 255 in few places (see above) is little beside what tells these images apart.
    np.testing.assert_allclose(found, expected, atol=0.005 * np.ptp(expected), rtol=0, err_msg=spec)


# ---- Diversity -------------------------------------------------------------------------------------------------------


def test_embeddings_and_diversity(clip_folder):
  folder, model = clip_folder
  found = published.image_embedder(f"clip_l={folder}", batch_size=2)(IMAGES)
  options = dict(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
  pixels = CLIPImageProcessorPil(**options)([Image.fromarray(i) for i in IMAGES], return_tensors="pt")["pixel_values"]
  with torch.no_grad():
    features = model.visual_projection(model.vision_model(pixels).pooler_output)
  np.testing.assert_allclose(found, nn.functional.normalize(features, dim=-1).numpy(), atol=1e-5)
  tiny = published.image_embedder("tiny-clip")(IMAGES)
  assert tiny.shape == (5, 128)
  np.testing.assert_allclose(np.linalg.norm(tiny, axis=1), 1, atol=1e-5)
  x, y = np.eye(3, dtype=np.float32)[:2]
  embeds = np.stack([[x, x, x], [x, y, y], [x, -x, x]])  # of pairs: none, two of three at 90 degrees, two at 180
  np.testing.assert_allclose(published.diversity(embeds), [0, 2 / 3, 4 / 3], atol=1e-6)
  assert np.isnan(published.diversity(embeds[:, :1])).all()
  with pytest.raises(ValueError, match="judge does not embed images, expected one of pickscore, clip_l"):
    published.image_embedder("judge")


# ---- A user's own function -------------------------------------------------------------------------------------------


def brightness(images, prompts):
  """mean brightness, 0 to 255

  More text.
  """
  assert len(images) == len(prompts)
  return [image.mean() for image in images]


def wrong(images, prompts):
  return np.zeros((len(images), 2))


def undefined(images, prompts):
  return [1.0, float("nan"), 2.0][: len(images)]


def test_a_function_of_a_users_own(monkeypatch):
  scorer = published.load(f"{__name__}:brightness")
  version = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:8]
  assert (scorer.name, scorer.version, scorer.scale) == (f"{__name__}:brightness", version, "mean brightness, 0 to 255")
  np.testing.assert_allclose(scorer.score(IMAGES, PROMPTS), [i.mean() for i in IMAGES], rtol=1e-6)
  assert scorer.score([], []).shape == (0,)
  monkeypatch.setattr(sys.modules[__name__], "__version__", "1.2", raising=False)
  own = published.load(f"{__name__}:wrong")
  assert (own.version, own.scale) == ("1.2", "user's")
  with pytest.raises(ValueError, match=r"returned numbers of shape \[5, 2\] for 5 images, expected \[5\]"):
    own.score(IMAGES, PROMPTS)
  with pytest.raises(ValueError, match="gives nan to 1 of 3 images, the first of them number 1, expected finite"):
    published.load(f"{__name__}:undefined").score(IMAGES[:3], PROMPTS[:3])
  with pytest.raises(ValueError, match="has no function 'nothing', expected one that takes images and prompts"):
    published.load(f"{__name__}:nothing")
  with pytest.raises(ValueError, match="cannot be imported .ModuleNotFoundError: .* by PYTHONPATH"):
    published.load("no_such_package.module:function")


# ---- Bad inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("images", "prompts", "message"),
  [
    ([np.zeros((4, 4, 3), np.uint8)], ["a", "b"], "1 images and 2 prompts, expected as many"),
    ([np.zeros((4, 4, 3), np.float32)], ["a"], r"image 0 is float32\[4, 4, 3\], expected uint8\[H, W, 3\]"),
    ([np.zeros((4, 4), np.uint8)], ["a"], r"image 0 is uint8\[4, 4\], expected uint8\[H, W, 3\]"),
  ],
)
def test_wrong_images_are_refused(images, prompts, message):
  with pytest.raises(ValueError, match=message):
    published.load("judge").score(images, prompts)


def test_what_is_missing_is_said_with_where_it_comes_from(tmp_path, monkeypatch):
  def unreachable(*args, **kwargs):
    raise ConnectionError("no network")

  monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
  monkeypatch.setenv("HOME", str(tmp_path))
  for spec, message in {
    "pickscore": r"model.safetensors of the Hugging Face repository yuvalkirstain/PickScore_v1 is not .* pickscore=F",
    "hpsv2.1": (
      r"no folder ~/.cache/jaxpref/scorers/hpsv2.1; download HPS_v2.1_compressed.pt from the Hugging Face repository "
      r"xswu/HPSv2 and run python scripts/assets/convert_scorer.py hpsv2.1 HPS_v2.1_compressed.pt ~/.cache/.*/hpsv2.1 "
    ),
    "aesthetic": r"download sac\+logos\+ava1-l14-linearMSE.pth from christophschuhmann/.* on GitHub and run python",
    "imagereward=nowhere": "no folder nowhere; download ImageReward.pt from the Hugging Face repository THUDM/ImageR",
    "clip_l=nowhere": "scorer clip_l has no weights: model folder nowhere does not exist",
  }.items():
    for find in (published.load, published.check):
      with pytest.raises(FileNotFoundError, match=message):
        find(spec)
  for spec in ("judge", "tiny-clip", f"{__name__}:brightness"):
    published.check(spec)
  for spec in ("hps", "hpsv2=", "hps=folder"):
    with pytest.raises(ValueError, match=f"scorer '{spec}' is unknown, expected one of pickscore, clip_l, .*module:fu"):
      published.load(spec)


def test_incomplete_folders_are_named(tmp_path, monkeypatch, clip_folder, imagereward):
  def unreachable(*args, **kwargs):
    raise ConnectionError("no network")

  monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
  published.check(f"clip_l={clip_folder[0]}")
  published.check(f"imagereward={imagereward[0]}")
  copy = shutil.copytree(clip_folder[0], tmp_path / "clip")
  for file in ("vocab.json", "merges.txt", "tokenizer.json"):
    (copy / file).unlink()
  with pytest.raises(FileNotFoundError, match="clip has no tokenizer .vocab.json and merges.txt. and the Hugging Face"):
    published.check(f"clip_l={copy}")
  (imagereward[0] / "vocab.txt").unlink()
  with pytest.raises(FileNotFoundError, match="has no vocab.txt and the Hugging Face repository .*bert-base-uncased"):
    published.check(f"imagereward={imagereward[0]}")
  (imagereward[0] / "vocab.txt").write_text("\n".join([*WORDS, "one", "more"]))
  with pytest.raises(ValueError, match="tokenizer gives ids up to 17, expected at most 15 by the vocab_size"):
    published.load(f"imagereward={imagereward[0]}")
  with pytest.raises(ValueError, match="ImageReward config: model_type is 'clip', expected 'imagereward'"):
    published.load(f"imagereward={copy}")
  head = tmp_path / "head"
  head.mkdir()
  shutil.copy(clip_folder[0] / "model.safetensors", head)
  (head / "config.json").write_text('{"model_type": "aesthetic", "clip": "no/where"}')
  with pytest.raises(FileNotFoundError, match="scorer aesthetic: its CLIP no/where could not be fetched: no conn"):
    published.check(f"aesthetic={head}")
  (head / "model.safetensors").rename(head / "model.pth")
  with pytest.raises(ValueError, match="head has its weights only as model.pth"):
    published.check(f"aesthetic={head}")
  (copy / "config.json").unlink()
  (copy / "open_clip_config.json").write_text(json.dumps(MINIATURE_CONFIG))
  with pytest.raises(FileNotFoundError, match="open_clip_model.safetensors is missing, expected it beside"):
    published.load(f"hpsv2={copy}")


def test_other_open_clip_architectures_are_refused():
  model = MINIATURE_CONFIG["model_cfg"]
  timm = {"model_cfg": model | {"vision_cfg": {"timm_model_name": "convnext", "image_size": 256}}}
  with pytest.raises(ValueError, match="model_cfg.vision_cfg has timm_model_name, which is not implemented"):
    open_clip.config_from_dict(timm)
  with pytest.raises(ValueError, match="KeyError at 'model_cfg', expected a model_cfg with embed_dim"):
    open_clip.config_from_dict({})


def test_the_converter_refuses_other_files(tmp_path, in_this_process):
  torch.save({"layers.0.weight": torch.zeros(1024, 12)}, tmp_path / "half.pth")
  with pytest.raises(ValueError, match=r"half.pth does not hold the tensors .*missing 9 \(layers.0.bias"):
    convert_scorer.convert("aesthetic", tmp_path / "half.pth", tmp_path / "out")
  with pytest.raises(ValueError, match="half.pth holds none of the tensors of imagereward, but layers.0.weight"):
    convert_scorer.convert("imagereward", tmp_path / "half.pth", tmp_path / "out")
  torch.save({"a": 1}, tmp_path / "none.pt")
  with pytest.raises(ValueError, match="none.pt holds no state dict"):
    convert_scorer.convert("hpsv2", tmp_path / "none.pt", tmp_path / "out")
  torch.save({"state_dict": pathlib.PurePosixPath("x")}, tmp_path / "code.pt")
  with pytest.raises(ValueError, match="code.pt is not a torch file of nothing but tensors"):
    convert_scorer.convert("hpsv2", tmp_path / "code.pt", tmp_path / "out")
  with pytest.raises(FileNotFoundError, match="there is no file .*absent.pt"):
    convert_scorer.convert("hpsv2", tmp_path / "absent.pt", tmp_path / "out")
  with pytest.raises(FileNotFoundError, match="has no vocab.txt; give the folder of the model's tokenizer"):
    convert_scorer.convert("imagereward", tmp_path / "half.pth", tmp_path / "out", tokenizer=tmp_path)
  assert not list((tmp_path / "out").glob("*.safetensors"))
