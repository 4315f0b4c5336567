"""What a model is conditioned on, and how it is guided, against the pipelines of torch diffusers; long prompts."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.diffusion import samplers
from jaxpref.evaluation import drawing
from jaxpref.files import loading, pipelines, tokenizers
from jaxpref.models import presets
from jaxpref.models.base import guided
from jaxpref.models.vae import to_uint8
from jaxpref.planning import flops

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["grinning cat", "red apple"]
SEED, STEPS, GUIDANCE = 5, 4, 5.0
CLASSES = {
  "sd15-miniature": diffusers.StableDiffusionPipeline,
  "sdxl-miniature": diffusers.StableDiffusionXLPipeline,
}
# As the miniatures, whose UNets are compared in models/unet_test.py, with as few levels as show what is asked.
_SDXL_UNET = dataclasses.replace(
  presets.SDXL_MINIATURE.unet,
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
  block_out_channels=(16, 32),
  transformer_layers_per_block=(1, 1),
  attention_head_dim=(1, 2),
)
PRESETS = {
  "sd15-miniature": presets.ONE_LEVEL,
  "sdxl-miniature": dataclasses.replace(presets.SDXL_MINIATURE, unet=_SDXL_UNET),
}


@pytest.fixture(scope="module", autouse=True)
def text_model():
  """Diffusers' clip_skip asks for `text_encoder.text_model`, which transformers 5 has dropped from CLIPTextModel."""
  if "text_model" not in vars(transformers.CLIPTextModel):
    patch = pytest.MonkeyPatch()
    patch.setattr(transformers.CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    yield
    patch.undo()
  else:
    yield


@pytest.fixture(scope="module", params=list(CLASSES))
def models(request, tmp_path_factory):
  """(our model, its weights, our pipeline, diffusers' pipeline) of the same random weights."""
  pipe = pipelines.random_pipeline(PRESETS[request.param], 3)
  folder = pipelines.save_pipeline(tmp_path_factory.mktemp(request.param) / "model", pipe)
  theirs = CLASSES[request.param].from_pretrained(folder, dtype=torch.float32)
  theirs.set_progress_bar_config(disable=True)
  params = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  return loading.text_to_image(pipe), params, pipe, theirs


# Of drawing, export_test.py and a size below have a picture of Stable Diffusion 1.5; the VAEs are of one kind.
drawn = pytest.mark.parametrize(
  "models", [pytest.param("sd15-miniature", marks=pytest.mark.slow), "sdxl-miniature"], indirect=True
)


def error(ours, theirs):
  ours, theirs = np.asarray(ours, np.float64), theirs.detach().numpy()
  assert ours.shape == theirs.shape
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def conditions(theirs, **kwargs):
  """What diffusers' encode_prompt returns: [(prompt, negative prompt)] of hidden states, and of SDXL's pooled ones."""
  out = theirs.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **kwargs)
  return [out] if len(out) == 2 else [out[:2], out[2:]]


def parts(cond):
  return [cond["encoder_hidden_states"], *([cond["added_cond_kwargs"]["text_embeds"]] if len(cond) > 1 else [])]


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_clip_skip_equals_diffusers(models, clip_skip):
  """For the prompt only: diffusers encodes negative prompts with all layers."""
  model, params, pipe, theirs = models
  model = dataclasses.replace(model, clip_skip=clip_skip)

  @jax.jit
  def encode(ids, negative_ids):
    return model.encode_text(params, ids), model.encode_negative(params, negative_ids)

  ours, negative = encode(pipe.tokenize(PROMPTS), pipe.tokenize(["a volcano"] * 2))
  expected = conditions(theirs, clip_skip=clip_skip, negative_prompt=["a volcano"] * 2)
  assert len(parts(ours)) == len(expected)
  for found, found_negative, both in zip(parts(ours), parts(negative), expected, strict=True):
    assert error(found, both[0]) <= 1e-5  # measured: 5e-7
    assert error(found_negative, both[1]) <= 1e-5


def test_clip_skip_out_of_range_is_refused(models):
  model, params, pipe, _ = models
  with pytest.raises(ValueError, match="clip_skip=9, expected 0 to"):
    dataclasses.replace(model, clip_skip=9).encode_text(params, pipe.tokenize([""]))


def test_no_negative_prompt_is_not_an_empty_one_for_sdxl(models):
  """Zeros where none is given, the encoded empty prompt where it is given as ""."""
  model, params, pipe, theirs = models
  none, empty = jax.jit(lambda: (model.encode_empty(params, 2), model.encode_negative(params, params["empty_ids"])))()
  for negative, ours in ((None, none), ([""] * 2, jax.tree.map(lambda c: jnp.repeat(c, 2, axis=0), empty))):
    for found, both in zip(parts(ours), conditions(theirs, negative_prompt=negative), strict=True):
      assert error(found, both[1]) <= 1e-5 if both[1].any() else not found.any()
  assert model.zero_empty_prompt == (pipe.text_encoder_2 is not None)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_up_to_1_is_the_plain_conditional_prediction(scale):
  """Turbo and LCM models are run at 0. Above 1 it is the two predictions' combination."""
  calls = []

  def network(x, t, cond):
    calls.append(x.shape[0])
    return x + cond["c"]

  x, t, cond, uncond = jnp.ones((2, 3)), jnp.zeros(2), {"c": jnp.full((2, 3), 7.0)}, {"c": jnp.full((1, 3), 2.0)}
  found = guided(network, uncond, scale)(x, t, cond)
  np.testing.assert_array_equal(found, 8.0 * x)
  assert calls == [2]
  np.testing.assert_array_equal(guided(network, uncond, 1.5)(x, t, cond), (3.0 + 1.5 * 5.0) * x)
  assert calls == [2, 4]


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_guidance_scale_that_is_none_is_refused(scale):
  with pytest.raises(ValueError, match=f"guidance_scale={scale}; expected a number of at least 0"):
    guided(lambda *args: args[0], {}, scale)


@pytest.mark.slow
@pytest.mark.parametrize("models", list(CLASSES), indirect=True)
def test_guidance_of_0_draws_diffusers_pictures(models):
  """Which follow the prompt."""
  expected = pictures(models[3], noise(models[0].latent_shape), guidance_scale=0.0)
  found = draw(models, guidance_scale=0.0)
  assert np.abs(found - expected).max() <= 1
  assert np.abs(found[0] - draw(models, guidance_scale=0.0, prompts=PROMPTS[::-1])[0]).mean() > 0.3


def pictures(theirs, latents, **kwargs):
  """u8[2, H, W, 3] by diffusers from latents NHWC."""
  out = theirs(
    PROMPTS,
    latents=torch.from_numpy(np.array(latents)).permute(0, 3, 1, 2),
    num_inference_steps=STEPS,
    output_type="pil",
    **{"guidance_scale": GUIDANCE} | kwargs,
  )
  return np.stack([np.asarray(image) for image in out.images]).astype(int)


def noise(shape):
  keys = [jax.random.fold_in(jax.random.key(SEED), i) for i in range(len(PROMPTS))]
  return jnp.stack([jax.random.normal(key, shape) for key in keys])


def draw(models, **kwargs):
  model, params, pipe, _ = models
  options = {"clip_skip": kwargs.pop("clip_skip", None)}
  prompts = kwargs.pop("prompts", PROMPTS)
  images = drawing.generate(
    dataclasses.replace(model, **options),
    params,
    pipe.tokenize(prompts),
    seeds_per_prompt=1,
    num_inference_steps=STEPS,
    eta=0.0,
    seed=SEED,
    batch_size=2,
    **{"guidance_scale": GUIDANCE} | kwargs,
  )
  return images[:, 0].astype(int)


@drawn
def test_all_options_together_draw_what_diffusers_draws(models):
  """And each of them matters: without it the picture is another."""
  model, _, pipe, theirs = models
  ours = draw(
    models,
    clip_skip=1,
    negative_ids=pipe.tokenize(["volcano"]),
    guidance_rescale=0.7,
    sampler="dpmpp_2m",
    karras=True,
    size=(24, 16),
  )
  ddim = theirs.scheduler
  theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config, use_karras_sigmas=True)
  options = {"clip_skip": 1, "negative_prompt": ["volcano"] * 2, "guidance_rescale": 0.7}
  latents = noise(model.latent_shape_for(24, 16))
  try:
    expected = pictures(theirs, latents, height=24, width=16, **options)
    without = {
      name: pictures(theirs, latents, height=24, width=16, **{k: v for k, v in options.items() if k != name})
      for name in options
    }
  finally:
    theirs.scheduler = ddim
  assert ours.shape == expected.shape == (2, 24, 16, 3) and expected.std() > 5
  assert np.abs(ours - expected).mean() <= 0.05  # of 255; measured: 0
  for name, other in without.items():
    assert np.abs(other - expected).mean() > 0.3, f"{name} shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("models", list(CLASSES), indirect=True)
def test_a_model_of_another_size_draws_what_diffusers_draws(models):
  """Which tells SDXL this size, height first."""
  model, params, pipe, theirs = models
  wide = model.at_size(16, 24)
  assert wide.image_size == (16, 24) and wide.latent_shape == (8, 12, 4)
  found = draw((wide, params, pipe, theirs))
  expected = pictures(theirs, noise(wide.latent_shape), height=16, width=24)
  assert found.shape == (2, 16, 24, 3) and expected.std() > 5
  assert np.abs(found - expected).mean() <= 0.05


def test_a_pair_in_sample_size_is_the_size_that_diffusers_draws(tmp_path):
  """Diffusers' pipeline of SDXL takes one number only."""
  preset = presets.get_preset("one-level")
  preset = dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, sample_size=(8, 12)))
  folder = pipelines.save_pipeline(tmp_path / "model", pipelines.random_pipeline(preset, 3))
  assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == [8, 12]
  pipe = pipelines.load_pipeline(folder)
  theirs = CLASSES["sd15-miniature"].from_pretrained(folder, dtype=torch.float32)
  theirs.set_progress_bar_config(disable=True)
  model, params = loading.text_to_image(pipe), dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  found = draw((model, params, pipe, theirs))
  expected = pictures(theirs, noise(model.latent_shape))
  assert model.image_size == (16, 24) and found.shape == expected.shape == (2, 16, 24, 3)
  assert np.abs(found - expected).mean() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("models", list(CLASSES), indirect=True)
def test_an_empty_negative_prompt_draws_what_diffusers_draws(models):
  model, params, _, theirs = models
  latents = noise(model.latent_shape)
  expected = pictures(theirs, latents, negative_prompt=[""] * 2)
  assert np.abs(draw(models, negative_ids=params["empty_ids"]) - expected).mean() <= 0.05
  different = np.abs(pictures(theirs, latents) - expected).mean() > 0.3
  assert different == model.zero_empty_prompt


def test_sizes_and_crops_of_sdxl_draw_what_diffusers_draws(models):
  model, params, pipe, theirs = models
  time_ids = jnp.asarray([[48.0, 40.0, 3.0, 5.0, 20.0, 24.0]])
  if model.text_encoder_2 is None:
    with pytest.raises(ValueError, match="only SDXL"):
      model.encode_text(params, pipe.tokenize(PROMPTS), time_ids)
    return

  @jax.jit
  def sample(latents):
    cond = model.encode_text(params, pipe.tokenize(PROMPTS), time_ids)
    uncond = model.encode_empty(params, 1, time_ids)
    eps = guided(lambda x, t, c: model.predict(params, x, t, c), uncond, GUIDANCE)
    clean = samplers.sample(
      lambda x, t: eps(x, t, cond), model.process, latents, jax.random.key(0), num_steps=STEPS, eta=0.0
    )
    return to_uint8(model.decode(params, clean))

  latents = noise(model.latent_shape)
  sizes = {"original_size": (48, 40), "crops_coords_top_left": (3, 5), "target_size": (20, 24)}
  expected = pictures(theirs, latents, **sizes)
  assert np.abs(np.asarray(sample(latents)).astype(int) - expected).mean() <= 0.05
  assert np.abs(pictures(theirs, latents) - expected).mean() > 0.3


@drawn
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_vae_in_slices_gives_the_same(models, rows):
  """6 images, 1 or 2 at a time (4 does not divide 6: then 2)."""
  model, params, _, _ = models
  sliced = dataclasses.replace(model, vae_slicing=rows)
  latents = jax.random.normal(jax.random.key(0), (6, *model.latent_shape))
  images = model.decode(params, latents)
  np.testing.assert_allclose(sliced.decode(params, latents), images, atol=1e-5)
  key = jax.random.key(1)
  np.testing.assert_allclose(
    sliced.encode_images(params, images, key), model.encode_images(params, images, key), atol=1e-4
  )
  size = images.shape[1]
  jaxpr = str(jax.make_jaxpr(lambda z: sliced.decode(params, z))(latents))
  assert f"f32[{min(rows, 2)},{size},{size},3]" in jaxpr


@drawn
@pytest.mark.parametrize("vae_slicing", [None, 1])
def test_smaller_images_are_of_latents_that_torch_has_shrunk(models, vae_slicing):
  """And the VAE computes a fourth at half the size, but for its attention, whose share shrinks more."""
  model, params, _, theirs = models
  model = dataclasses.replace(model, vae_slicing=vae_slicing)
  latents = jax.random.normal(jax.random.key(0), (3, *model.latent_shape))
  size = model.image_size // 2
  images = model.decode(params, latents, size=size)
  assert images.shape == (3, size, size, 3)
  z = torch.from_numpy(np.moveaxis(np.array(latents), 3, 1))
  small = torch.nn.functional.interpolate(z, scale_factor=0.5, mode="bilinear", antialias=True)
  with torch.no_grad():
    expected = theirs.vae.decode(small / theirs.vae.config.scaling_factor).sample
  assert error(images, expected.permute(0, 2, 3, 1)) <= 1e-5
  count = lambda size: flops.count(lambda z: model.decode(params, z, size=size), latents)
  assert 0.2 < count(size) / count(0) <= 0.25


def test_sizes_that_the_vae_cannot_halve_are_refused(models):
  with pytest.raises(ValueError, match="images of 24 x 17 pixels, expected multiples of 2"):
    models[0].latent_shape_for(24, 17)


# ---- Long prompts ------------------------------------------------------------------------------------------------


def test_what_is_cut_from_long_prompts_is_shown_once(monkeypatch):
  monkeypatch.setattr(tokenizers, "_cut_warnings", set())
  tokenizer = tokenizers.tiny_tokenizer()
  limit = tokenizer.model_max_length
  fits = "cat " * (limit - 2)
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    assert tokenizers.tokenize(tokenizer, [fits, "cat", ""]).shape == (3, limit)
  assert not found  # the longest that fits is not cut
  with pytest.warns(UserWarning, match="cut from a prompt: 'red apple' \\(and the ends of 1 others\\)") as found:
    ids = tokenizers.tokenize(tokenizer, ["cat", fits + "red apple", fits + "cat"])
  assert len(found) == 1 and ids.shape == (3, limit)
  np.testing.assert_array_equal(ids[1], ids[2])
  with pytest.warns(UserWarning, match="reads 6 tokens, .* cut from a prompt: 'cat cat'; shorten it"):
    assert tokenizers.tokenize(tokenizer, ["cat " * 6], length=6).shape == (1, 6)


def test_a_folder_without_tokenizer_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="tokenizer has no vocab.json and no merges.txt, expected a CLIP token"):
    tokenizers.load_tokenizer(tmp_path / "tokenizer")
