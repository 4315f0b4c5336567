"""A folder written here, opened by torch diffusers: the same latents become the same picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.diffusion import samplers
from jaxpref.files import loading, pipelines
from jaxpref.models.base import guided
from jaxpref.models.vae import to_uint8

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["grinning cat", "red apple"]
STEPS, GUIDANCE = 4, 5.0
CLASSES = {
  "sd15-miniature": diffusers.StableDiffusionPipeline,
  "sdxl-miniature": diffusers.StableDiffusionXLPipeline,
}


@pytest.fixture(scope="module")
def sampler(request):
  """(name, pipeline of random weights, compiled (parameters, ids, latents) -> u8 pictures)."""
  pipe = pipelines.random_pipeline(request.param, 3)
  model = loading.text_to_image(pipe)

  @jax.jit
  def sample(params, ids, latents):
    cond = model.encode_text(params, ids)
    eps = guided(lambda x, t, c: model.predict(params, x, t, c), model.encode_empty(params, 1), GUIDANCE)
    clean = samplers.sample(
      lambda x, t: eps(x, t, cond),
      model.process,
      latents,
      jax.random.key(0),
      num_steps=STEPS,
      eta=0.0,
    )
    return to_uint8(model.decode(params, clean))

  return request.param, pipe, sample


# The others open what files/pipelines_test.py compares network by network, and draw as text_to_image_test.py does.
@pytest.mark.parametrize(
  ("sampler", "dtype"),
  [
    ("sd15-miniature", "float16"),
    *(
      pytest.param(name, dtype, marks=pytest.mark.slow)
      for name, dtype in (("sd15-miniature", "float32"), ("sdxl-miniature", "float32"), ("sdxl-miniature", "float16"))
    ),
  ],
  indirect=["sampler"],
)
def test_diffusers_draws_the_same_picture(sampler, tmp_path, dtype):
  """From a folder in single or half precision; computed in single precision on both sides."""
  name, pipe, sample = sampler
  folder = pipelines.save_pipeline(tmp_path / "export", pipe, dtype=jnp.dtype(dtype))
  opened = pipelines.load_pipeline(folder)
  latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
  params = dict(opened.params) | {"empty_ids": opened.tokenize([""])}
  ours = np.asarray(sample(params, opened.tokenize(PROMPTS), latents)).astype(int)

  theirs = CLASSES[name].from_pretrained(folder, dtype=torch.float32)
  theirs.set_progress_bar_config(disable=True)
  images = theirs(
    PROMPTS,
    latents=torch.from_numpy(latents).permute(0, 3, 1, 2),
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    eta=0.0,
    output_type="pil",
  ).images
  pictures = np.stack([np.asarray(image) for image in images]).astype(int)
  assert pictures.shape == ours.shape == (2, 16, 16, 3)
  assert pictures.std() > 5, "a picture of one colour shows nothing"
  assert np.abs(pictures[0] - pictures[1]).mean() > 1
  assert np.abs(ours - pictures).mean() <= 0.05  # far below 1 of 255: rounding of single pixels
