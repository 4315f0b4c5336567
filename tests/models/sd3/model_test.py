"""Stable Diffusion 3 as a Model: its conditioning against diffusers' pipeline, sizes, and what it refuses."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import presets
from jaxpref.models.base import Model
from jaxpref.models.clip import CLIPTextModel
from jaxpref.models.sd3.model import StableDiffusion3
from jaxpref.models.sd3.presets import PRESETS, SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD35_MINIATURE
from jaxpref.models.sd3.transformer import LORA_TARGETS, SD3Transformer2DModel, constant_shapes
from jaxpref.models.t5 import T5EncoderModel
from jaxpref.models.vae import AutoencoderKL

LENGTH = 7  # of T5's tokens
# As the published CLIPs: the end of the text is the first of the largest id.
PRESET = dataclasses.replace(
  SD35_MINIATURE,
  text_encoder=dataclasses.replace(SD35_MINIATURE.text_encoder, eos_token_id=2, num_hidden_layers=3),
  text_encoder_2=dataclasses.replace(SD35_MINIATURE.text_encoder_2, eos_token_id=2, num_hidden_layers=3),
)


def make_model(preset=PRESET, **changes):
  settings = dict(
    transformer=SD3Transformer2DModel(preset.transformer),
    vae=AutoencoderKL(preset.vae),
    text_encoder=CLIPTextModel(preset.text_encoder, True),
    text_encoder_2=CLIPTextModel(preset.text_encoder_2, True),
    text_encoder_3=T5EncoderModel(preset.text_encoder_3),
    process=None,
    max_sequence_length=LENGTH,
  )
  return StableDiffusion3(**settings | changes)


def components(model):
  names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
  return {name: module for name in names if (module := getattr(model, name)) is not None}


def draw_ids(rows, with_t5=True):
  rng = np.random.default_rng(0)
  lengths = [presets.TINY_LENGTH] * 2 + [LENGTH] * with_t5
  return np.concatenate([rng.integers(1, presets.TINY_VOCAB_SIZE, (rows, n)) for n in lengths], axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def weights():
  keys = iter(jax.random.split(jax.random.key(0), 9))
  return {name: presets.init_params(module, next(keys)) for name, module in components(make_model()).items()}


class Tokens:
  """Stands for a tokenizer: a prompt is the number of its row of ids."""

  def __init__(self, ids):
    self.ids, self.model_max_length = ids, ids.shape[1]

  def __call__(self, prompts, **kwargs):
    import torch

    return types.SimpleNamespace(input_ids=torch.tensor(self.ids[[int(p) for p in prompts]], dtype=torch.long))


def torch_pipeline(ids, weights, folder, t5=True):
  """diffusers' pipeline with these weights, read from files that this project writes."""
  import diffusers
  import safetensors.torch
  import transformers

  from jaxpref.files.tensors import save_tree

  def filled(model, name):
    save_tree(folder / f"{name}.safetensors", weights[name])
    tensors = safetensors.torch.load_file(folder / f"{name}.safetensors")
    own = set(model.state_dict())
    if not own & set(tensors):  # transformers 5 names a CLIP's text tower without its prefix
      tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}, (missing, unexpected)
    return model.eval()

  clips = [
    filled(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config.to_dict())), name)
    for name, config in (("text_encoder", PRESET.text_encoder), ("text_encoder_2", PRESET.text_encoder_2))
  ]
  t5_config = transformers.T5Config(**PRESET.text_encoder_3.to_dict())
  return diffusers.StableDiffusion3Pipeline(
    transformer=diffusers.SD3Transformer2DModel.from_config(PRESET.transformer.to_dict()),
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=diffusers.AutoencoderKL.from_config(PRESET.vae.to_dict()),
    text_encoder=clips[0],
    tokenizer=Tokens(ids[:, : presets.TINY_LENGTH]),
    text_encoder_2=clips[1],
    tokenizer_2=Tokens(ids[:, presets.TINY_LENGTH : 2 * presets.TINY_LENGTH]),
    text_encoder_3=filled(transformers.T5EncoderModel(t5_config), "text_encoder_3") if t5 else None,
    tokenizer_3=Tokens(ids[:, 2 * presets.TINY_LENGTH :]) if t5 else None,
  )


@pytest.mark.parametrize(
  ("t5", "clip_skip"), [(True, None), (True, 1), (False, None)], ids=["t5", "clip-skip", "without-t5"]
)
def test_the_conditioning_equals_that_of_diffusers(weights, tmp_path, t5, clip_skip):
  pytest.importorskip("diffusers")
  import torch

  ids = draw_ids(3)
  pipe = torch_pipeline(ids, weights, tmp_path, t5)
  with torch.no_grad():
    found = pipe.encode_prompt(
      ["0", "1"], None, None, negative_prompt=["2", "2"], max_sequence_length=LENGTH, clip_skip=clip_skip
    )
  model = make_model(clip_skip=clip_skip, **{} if t5 else {"text_encoder_3": None})
  given = jnp.asarray(ids if t5 else ids[:, : 2 * presets.TINY_LENGTH])
  cond = jax.jit(model.encode_text)(weights, given[:2])
  negative = jax.jit(model.encode_negative)(weights, given[2:])
  kept = ("text_encoder", "text_encoder_2", "text_encoder_3")
  empty = jax.jit(lambda weights: model.encode_empty(weights, 2))(
    {k: weights[k] for k in kept} | {"empty_ids": given[2:]}
  )
  for name, (positive, unguided) in (
    ("encoder_hidden_states", (found[0], found[1])),
    ("pooled_projections", (found[2], found[3])),
  ):
    np.testing.assert_allclose(cond[name], positive.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(negative[name], unguided[:1].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(empty[name], unguided.numpy(), rtol=1e-4, atol=1e-5)
  assert cond["encoder_hidden_states"].shape == (2, presets.TINY_LENGTH + LENGTH, 48)
  if not t5:
    assert not np.any(cond["encoder_hidden_states"][:, presets.TINY_LENGTH :])


@pytest.mark.parametrize("t5", [True, False])
def test_the_text_is_restored_from_what_is_stored_of_it(weights, t5):
  model = make_model() if t5 else make_model(text_encoder_3=None)
  cond = model.encode_text(weights, jnp.asarray(draw_ids(2, t5)))
  stored = model.stored_text(cond)
  assert ("t5_hidden_states" in stored) == t5
  assert stored["clip_hidden_states"].shape == (2, presets.TINY_LENGTH, 16 + 24)
  restored = model.restored_text(stored | {"latents": jnp.zeros(2)})
  assert jax.tree.structure(restored) == jax.tree.structure(cond)
  jax.tree.map(np.testing.assert_array_equal, restored, cond)
  assert model.restored_text({"latents": jnp.zeros(2)}) is None
  assert model.sized(cond, jnp.zeros((2, 6))) is cond


def test_the_model_predicts_with_an_adapter_and_with_a_table_of_positions(weights):
  from jaxpref.models import lora

  model = make_model(lora_scale=0.5)
  shape = model.latent_shape
  assert shape == (8, 8, 4) and model.image_size == 16
  x = jax.random.normal(jax.random.key(1), (2, *shape))
  cond = {"encoder_hidden_states": jnp.ones((2, 5, 48)), "pooled_projections": jnp.ones((2, 40))}
  predict = jax.jit(lambda weights: model.predict(weights, x, jnp.array([10.0, 900.0]), cond))
  plain = predict(weights)
  assert plain.shape == x.shape and plain.dtype == jnp.float32
  adapter = lora.init_lora(jax.random.key(2), weights["transformer"], rank=2, targets=LORA_TARGETS)
  np.testing.assert_allclose(predict(weights | {"transformer_lora": adapter}), plain, rtol=1e-4, atol=1e-5)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), constant_shapes(PRESET.transformer))
  both = predict(weights | {"transformer_lora": adapter, "transformer_constants": zeros})
  assert np.abs(np.asarray(both - plain)).max() > 1e-3


def test_images_pass_through_the_vae_scaled_and_shifted(weights):
  model = make_model()
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  mean, _ = model.encode_moments(weights, jnp.asarray(images))
  latents = model.draw_latents(mean, jnp.full(mean.shape, -60.0), jax.random.key(0))
  np.testing.assert_allclose(latents, (mean - 0.0609) * 1.5305, rtol=1e-4, atol=1e-5)
  assert model.decode(weights, latents).shape == images.shape
  expected = model.vae.apply({"params": weights["vae"]}, mean, method="decode")
  np.testing.assert_allclose(model.decode(weights, latents), expected, rtol=1e-4, atol=1e-4)


def test_it_has_every_function_of_the_interface():
  members = {name for name in vars(Model) if not name.startswith("_")} - {"process", "denoiser"}
  assert all(hasattr(StableDiffusion3, name) for name in members) and make_model().denoiser == "transformer"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_the_components_of_each_preset_fit_together(preset):
  model = make_model(preset)
  assert model.latent_shape_for(32, 16) == (32 // model.unit, 16 // model.unit, preset.transformer.in_channels)


def test_published_models_draw_at_their_sizes():
  for preset, most in ((SD3_MEDIUM, 3072), (SD35_MEDIUM, 6144), (SD35_LARGE, 3072)):
    model = make_model(preset)
    assert model.image_size == 1024 and model.unit == 8
    assert model.at_size(512, 768).latent_shape == (64, 96, 16)
    assert model.latent_shape_for(most, 16) == (most // 8, 2, 16)
    with pytest.raises(ValueError, match=f"expected at most {most} on a side"):
      model.latent_shape_for(16, most + 16)
  with pytest.raises(ValueError, match="images of 520 x 512 pixels, expected multiples of 16"):
    model.at_size(520, 512)


def test_refuses_components_and_inputs_that_do_not_fit(weights):
  with pytest.raises(ValueError, match="text_encoder_3 has d_model=8, expected joint_attention_dim = 48"):
    make_model(text_encoder_3=T5EncoderModel(dataclasses.replace(PRESET.text_encoder_3, d_model=8)))
  with pytest.raises(ValueError, match="expected latent_channels = 8 of the VAE"):
    make_model(vae=AutoencoderKL(dataclasses.replace(PRESET.vae, latent_channels=8)))
  with pytest.raises(ValueError, match="have 32 numbers together, expected pooled_projection_dim = 40"):
    make_model(text_encoder_2=CLIPTextModel(dataclasses.replace(PRESET.text_encoder_2, projection_dim=16), True))
  with pytest.raises(ValueError, match="need a projection"):
    make_model(text_encoder=CLIPTextModel(PRESET.text_encoder))
  with pytest.raises(ValueError, match="max_sequence_length=0"):
    make_model(max_sequence_length=0)
  with pytest.raises(ValueError, match=r"input_ids have the shape \(1, 32\), expected \[B, 16 \+ 16 \+ 7\]"):
    make_model().encode_text(weights, jnp.asarray(draw_ids(1, False)))
  with pytest.raises(ValueError, match="clip_skip=3, expected 0 to 2"):
    make_model(clip_skip=3).encode_text(weights, jnp.asarray(draw_ids(1)))
