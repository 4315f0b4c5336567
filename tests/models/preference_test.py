import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from PIL import Image

from jaxpref.models import clip, preference, presets
from jaxpref.rewards.loading import load_preference_model
from tests.models import torch_parity

torch_parity.LEAF_NAMES.update(class_embedding="class_embedding", logit_scale="logit_scale")

TEXT = clip.CLIPTextConfig(
  vocab_size=45,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=8,
  projection_dim=12,
  eos_token_id=40,
)
VISION = clip.CLIPVisionConfig(
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=8,
  patch_size=4,
  projection_dim=12,
)
CONFIG = preference.StepAwareCLIPConfig(TEXT, VISION, projection_dim=12, frequency_embedding_size=10)
MODULE = preference.StepAwareCLIPModel(CONFIG)
IDS = np.array([[38, 5, 40, 40], [38, 7, 9, 40]], np.int32)
PIXELS = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
T = np.array([3, 981], np.int32)


def _scores(params, t):
  scores = MODULE.apply({"params": params}, IDS, PIXELS, t)
  return jnp.sum(scores), scores


@jax.jit
def score_and_grad(params, t):
  """Scores, and the gradient of their sum."""
  (_, scores), grads = jax.value_and_grad(_scores, has_aux=True)(params, t)
  return scores, grads


@pytest.fixture(scope="module")
def torch_clip():
  model = transformers.CLIPModel(
    transformers.CLIPConfig(text_config=TEXT.to_dict(), vision_config=VISION.to_dict(), projection_dim=12)
  )
  torch_parity.randomise(model)
  return model


@pytest.fixture(scope="module")
def clip_params(torch_clip):
  tensors = {k: v.detach().numpy() for k, v in torch_clip.named_parameters()}
  return torch_parity.to_flax(tensors, presets.abstract_params(clip.CLIPModel(CONFIG)))


@pytest.fixture(scope="module")
def step_aware_params(clip_params):
  fresh = presets.init_params(MODULE, jax.random.key(0))
  return preference.from_clip(fresh, clip_params)


def test_initialisation_is_clip_at_every_time(torch_clip, clip_params, step_aware_params):
  image, _, _ = jax.jit(clip.CLIPModel(CONFIG).apply)({"params": clip_params}, IDS, PIXELS)
  image_embeds = jax.jit(lambda p, t: MODULE.apply({"params": p}, PIXELS, t, method="image_embeds"))
  for t in (T, np.zeros_like(T)):
    assert torch_parity.relative_error(image_embeds(step_aware_params, t), image) <= 2e-6  # another program rounds
  with torch.no_grad():
    out = torch_clip(torch.tensor(IDS), torch.tensor(PIXELS).permute(0, 3, 1, 2))
  expected = out.logits_per_image.diagonal().numpy()
  scores, grads = score_and_grad(step_aware_params, T)
  assert torch_parity.relative_error(scores, expected) <= 1e-4
  # And training can leave this point: the layers that make the modulation get a gradient.
  for i in range(2):
    layer = grads["vision_model"]["encoder"][f"layers.{i}"]["adaLN_modulation"]["1"]
    assert np.abs(layer["kernel"]).max() > 0


def _randomised(params):
  """Every parameter random, AdaLN and time embedding included."""
  rng = np.random.default_rng(5)
  return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)


def _torch_image_embeds(p, pixels, t):
  """The image side as METHODS describe it, from the flat torch-named parameters `p` alone."""
  functional = torch.nn.functional

  def linear(x, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

  def norm(x, name):
    return functional.layer_norm(x, (16,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

  frequencies = 10_000 ** (-torch.arange(5) / 5)
  angles = t[:, None] * frequencies
  time = linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")
  time = linear(functional.silu(time), "t_embedder.mlp.2")

  root = "vision_model"
  x = functional.conv2d(pixels, p[f"{root}.embeddings.patch_embedding.weight"], stride=4)
  x = x.flatten(2).transpose(1, 2)
  token = p[f"{root}.embeddings.class_embedding"].expand(2, 1, 16)
  x = torch.cat([token, x], 1) + p[f"{root}.embeddings.position_embedding.weight"]
  x = norm(x, f"{root}.pre_layrnorm")
  for i in range(2):
    layer = f"{root}.encoder.layers.{i}"
    modulation = linear(functional.silu(time), f"{layer}.adaLN_modulation.1")[:, None]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, -1)
    h = norm(x, f"{layer}.layer_norm1") * (1 + scale_1) + shift_1
    q, k, v = (linear(h, f"{layer}.self_attn.{n}_proj").reshape(2, 5, 4, 4).transpose(1, 2) for n in "qkv")
    h = ((q @ k.transpose(2, 3)) / 2).softmax(-1) @ v
    x = x + gate_1 * linear(h.transpose(1, 2).reshape(2, 5, 16), f"{layer}.self_attn.out_proj")
    h = norm(x, f"{layer}.layer_norm2") * (1 + scale_2) + shift_2
    h = linear(h, f"{layer}.mlp.fc1")
    x = x + gate_2 * linear(h * (1.702 * h).sigmoid(), f"{layer}.mlp.fc2")
  shift, scale = linear(functional.silu(time), f"{root}.adaLN_modulation.1").chunk(2, -1)
  pooled = norm(x[:, 0], f"{root}.post_layernorm") * (1 + scale) + shift
  return functional.normalize(pooled @ p["visual_projection.weight"].T, dim=-1)


def test_time_condition_matches_an_independent_implementation(step_aware_params):
  params = _randomised(step_aware_params)
  tensors = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    *modules, name = (key.key for key in path)
    if name == "kernel":
      leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    key = ".".join([*modules, torch_parity.LEAF_NAMES[name]])
    tensors[key] = torch.tensor(np.asarray(leaf), requires_grad=True)
  pixels = torch.tensor(PIXELS).permute(0, 3, 1, 2)
  weight = np.random.default_rng(1).normal(size=(2, 12)).astype(np.float32)
  expected = _torch_image_embeds(tensors, pixels, torch.tensor(T))
  (expected * torch.tensor(weight)).sum().backward()

  def scalar(params):
    out = MODULE.apply({"params": params}, PIXELS, T, method="image_embeds")
    return jnp.sum(out * weight), out

  grads, found = jax.jit(jax.grad(scalar, has_aux=True))(params)
  assert torch_parity.relative_error(found, expected.detach()) <= 1e-4
  for name, key in (("mlp.0", "t_embedder.mlp.0"), ("mlp.2", "t_embedder.mlp.2")):
    expected_grad = tensors[f"{key}.weight"].grad.T
    assert torch_parity.relative_error(grads["t_embedder"][name]["kernel"], expected_grad) <= 1e-4
  layer = grads["vision_model"]["encoder"]["layers.1"]["adaLN_modulation"]["1"]
  expected_grad = tensors["vision_model.encoder.layers.1.adaLN_modulation.1.weight"].grad.T
  assert torch_parity.relative_error(layer["kernel"], expected_grad) <= 1e-4


def test_time_matters_once_trained(step_aware_params):
  params = _randomised(step_aware_params)
  late, early = (score_and_grad(params, t)[0] for t in (T, T[::-1].copy()))
  assert np.abs(late - early).min() > 1e-3


@pytest.mark.parametrize("twice", [False, True], ids=["towers once", "towers twice"])
def test_folders_as_pickscore_and_clip_h_are_published(tmp_path, twice):
  """Their kinds of config: exact GELU, a projection of another width than the towers, eos_token_id 2.

  Then the text ends at the first of the largest id, whatever pads it. Files of transformers 4 can
  have each tower twice, and hold buffers; beside CLIP-H's weights lie open_clip's.
  """
  sizes = dict(hidden_act="gelu", projection_dim=512, intermediate_size=24, num_hidden_layers=2)
  config = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 12,
    "logit_scale_init_value": 2.6592,
    "text_config": {"model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 2}
    | {"vocab_size": 45, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 8}
    | {"layer_norm_eps": 1e-5, "dropout": 0.0, "attention_dropout": 0.0, "top_k": 50, **sizes},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 20, "dropout": 0.0}
    | {"num_attention_heads": 5, "image_size": 8, "patch_size": 4, "num_channels": 3, **sizes},
  }
  if twice:
    for tower in ("text_config", "vision_config"):
      config[f"{tower}_dict"] = config[tower]
      config[tower] = {"hidden_size": 7, "hidden_act": "quick_gelu"}  # does not count
  model = transformers.CLIPModel(transformers.CLIPConfig(**json.loads(json.dumps(config))))
  torch_parity.randomise(model)
  with torch.no_grad():
    model.logit_scale.fill_(4.6)
  model.save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(config))
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  for tower, length in (("text_model", 8), ("vision_model", 5)):
    tensors[f"{tower}.embeddings.position_ids"] = np.arange(length)[None]
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  safetensors.numpy.save_file({"visual.proj": np.zeros(3)}, tmp_path / "open_clip_model.safetensors")

  module, params = load_preference_model(tmp_path)
  assert module.config.text_config.eos_token_id == 2
  ids = np.array([[43, 5, 44, 44, 44, 44, 44, 44], [43, 7, 9, 44, 0, 0, 0, 0]], np.int32)
  found = jax.jit(module.apply)({"params": params}, ids, PIXELS, T)
  published = transformers.CLIPModel.from_pretrained(tmp_path)
  with torch.no_grad():
    out = published(torch.tensor(ids), torch.tensor(PIXELS).permute(0, 3, 1, 2))
  expected = out.logits_per_image.diagonal().numpy()
  assert torch_parity.relative_error(found, expected) <= 1e-5


def test_from_clip_refuses_other_sizes(clip_params):
  other = dataclasses.replace(CONFIG, projection_dim=8)
  fresh = presets.abstract_params(preference.StepAwareCLIPModel(other))
  with pytest.raises(ValueError, match=r"text_projection\.kernel"):
    preference.from_clip(fresh, clip_params)


@pytest.mark.parametrize("shape", [(8, 8), (5, 5), (20, 20), (12, 17), (16, 9)])
def test_preprocess_matches_torch(shape):
  images = np.random.default_rng(0).uniform(-1.2, 1.2, (2, *shape, 3)).astype(np.float32)
  x = torch.tensor(images).permute(0, 3, 1, 2)
  scale = 8 / min(shape)
  size = [int(n * scale + 0.5) for n in shape]
  x = torch.nn.functional.interpolate(x, size=size, mode="bicubic", align_corners=False)
  top, left = round((size[0] - 8) / 2), round((size[1] - 8) / 2)
  x = (x[:, :, top : top + 8, left : left + 8] / 2 + 0.5).clamp(0, 1)
  mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
  std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
  expected = ((x - mean) / std).permute(0, 2, 3, 1).numpy()
  found = jax.jit(lambda x: preference.preprocess(x, 8))(images)
  np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("size_in", "size_out"), [(64, 24), (61, 24), (24, 24), (7, 24)])
def test_antialiased_kernel_is_that_of_torch(size_in, size_out):
  rows = torch.eye(size_in)[None, None]
  options = dict(mode="bicubic", antialias=True, align_corners=False)
  expected = torch.nn.functional.interpolate(rows, size=(size_in, size_out), **options)[0, 0].T
  found = preference.bicubic_matrix(size_in, size_out, antialias=True)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(517, 763), (768, 513), (101, 130)])
def test_antialiased_preprocess_is_that_of_transformers(shape):
  """Noise with and without sharp edges; what differs is one of 255 levels, where rounding differs."""
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  rng = np.random.default_rng(0)
  height, width = shape
  coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
  smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
  images = np.stack([smooth, rng.integers(0, 256, (*shape, 3), np.uint8)])
  processor = CLIPImageProcessorPil()
  pictures = processor(images=[Image.fromarray(i) for i in images], return_tensors="np")
  expected = pictures["pixel_values"].transpose(0, 2, 3, 1)
  found = preference.preprocess(images.astype(np.float32) / 127.5 - 1, 224, antialias=True)
  difference = np.abs(found - expected)
  level = 1 / 255 / np.array(preference.CLIP_STD)
  assert (difference / level).max() < 1.01
  assert (difference > 1e-3).mean() < 1e-3


@pytest.mark.parametrize("antialias", [False, True])
def test_preprocess_is_differentiable(antialias):
  images = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 5, 5, 3)).astype(np.float32)

  def loss(x):
    return jnp.sum(preference.preprocess(x, 8, antialias=antialias) ** 2)

  grads = jax.grad(loss)(images)
  assert np.isfinite(grads).all() and (np.abs(grads) > 0).all()


def test_configs_survive_json():
  assert preference.StepAwareCLIPConfig.from_dict(CONFIG.to_dict()) == CONFIG
  plain = preference.StepAwareCLIPConfig.from_dict(clip.CLIPConfig(TEXT, VISION, 12).to_dict())
  assert plain == dataclasses.replace(CONFIG, frequency_embedding_size=256)
  judge = preference.JudgeConfig(channels=(8, 16), styles=("a", "b", "c"))
  assert preference.JudgeConfig.from_dict(judge.to_dict()) == judge
  with pytest.raises(ValueError, match="model_type is 'clip', expected 'judge'"):
    preference.JudgeConfig.from_dict({"model_type": "clip"})


def test_judge_classifies_pictures_of_any_size():
  module = preference.Judge(preference.JudgeConfig(num_classes=7, channels=(8, 16), norm_num_groups=4))
  params = presets.init_params(module, jax.random.key(0))
  apply = lambda images: module.apply({"params": params}, images)  # noqa: E731
  images = np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
  for logits, number in zip(jax.jit(apply)(images), (3, 7), strict=True):
    assert logits.shape == (4, number) and logits.dtype == jnp.float32
    assert np.std(logits, axis=0).min() > 1e-4, "logits do not depend on the picture"
  assert jax.eval_shape(apply, np.zeros((2, 24, 40, 3), np.float32))[1].shape == (2, 7)


def test_init_params_is_distributed_as_module_init():
  size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, projection_dim=32)
  config = dataclasses.replace(
    CONFIG,
    text_config=dataclasses.replace(TEXT, **size),
    vision_config=dataclasses.replace(VISION, **size),
    projection_dim=32,
    frequency_embedding_size=32,
  )
  module = preference.StepAwareCLIPModel(config)
  found = presets.init_params(module, jax.random.key(0))
  expected = jax.jit(module.init)(jax.random.key(0, impl="rbg"), IDS, PIXELS, T)["params"]
  assert jax.tree.structure(found) == jax.tree.structure(expected)

  def check(path, a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
    name = jax.tree_util.keystr(path)
    if path[-1].key in ("bias", "scale", "logit_scale") or "adaLN" in name:
      np.testing.assert_array_equal(a, b, err_msg=name)
    else:
      np.testing.assert_allclose(np.std(a), np.std(b), rtol=0.5 if a.ndim == 1 else 0.2)

  jax.tree_util.tree_map_with_path(check, found, expected)
