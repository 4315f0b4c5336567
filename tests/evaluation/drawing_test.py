"""Pictures that start from given latents, also of Stable Diffusion 3."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from jaxpref.diffusion import RectifiedFlow, flow_from_config
from jaxpref.evaluation import drawing, settings
from jaxpref.files import sd3
from jaxpref.models.sd3.model import StableDiffusion3
from tests.files import trees

PROMPTS = ["grinning cat", "a red apple"]
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
LENGTH = 9  # of T5's tokens, which are zeros


@pytest.fixture(scope="module")
def pipe():
  pipe = sd3.without_t5(sd3.random_pipeline("sd3-miniature"))
  return dataclasses.replace(pipe, params=trees.randomised(pipe.params))


def draw(pipe, latents, **options):
  process = RectifiedFlow(flow_from_config(pipe.scheduler_config))
  model = StableDiffusion3(**pipe.modules, process=process, max_sequence_length=pipe.max_sequence_length)
  weights = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  usual = {"num_inference_steps": 3, "guidance_scale": 4.0, "eta": 0.0, "seed": 0, "batch_size": 2}
  ids = pipe.tokenize(PROMPTS)
  return drawing.generate(model, weights, ids, seeds_per_prompt=1, latents=latents, **usual | options)[:, 0].astype(int)


def test_diffusers_draws_the_same_from_the_latents_of_stable_diffusion_3(pipe, tmp_path):
  absent = {"text_encoder_3": None, "tokenizer_3": None}
  theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3.save_pipeline(tmp_path / "sd3", pipe), **absent)
  options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np", "height": 16, "width": 16}
  expected = theirs(PROMPTS, latents=torch.from_numpy(LATENTS), max_sequence_length=LENGTH, **options).images * 255
  found = draw(settings.at_length(pipe, LENGTH), LATENTS)
  assert expected.std() > 10
  assert np.abs(found - expected).max() <= 1


def test_latents_do_not_depend_on_the_batch(pipe):
  both, alone = draw(pipe, LATENTS), draw(pipe, LATENTS, batch_size=1)
  assert np.abs(both - alone).max() <= 1 < np.abs(both[0] - both[1]).max()
  assert np.abs(both - draw(pipe, LATENTS[::-1])).max() > 1


@pytest.mark.parametrize(
  ("latents", "message"),
  [
    (LATENTS[:1], r"^latents has the shape \[1, 4, 8, 8\], expected \[N, C, h, w\] = \[2, 4, 8, 8\]: one for each"),
    (LATENTS.astype(int), "^latents holds int64, expected float32"),
  ],
)
def test_latents_that_do_not_fit_are_refused(pipe, latents, message):
  with pytest.raises(ValueError, match=message):
    draw(pipe, latents)


def test_the_length_of_t5_is_a_pipeline_s_own(pipe):
  assert settings.at_length(pipe, None) is pipe
  assert settings.at_length(pipe, LENGTH).max_sequence_length == LENGTH
  whole = sd3.random_pipeline("sd3-miniature", components=())
  shapes = [settings.at_length(whole, n).tokenize(PROMPTS).shape[1] for n in (LENGTH, 12)]
  assert shapes[1] - shapes[0] == 12 - LENGTH
