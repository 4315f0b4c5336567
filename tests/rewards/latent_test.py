"""Latent reward models by name: what they start from, what they fit, and their shapes at full size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import config
from jaxpref.files import latent_rewards, pipelines
from jaxpref.models import presets
from jaxpref.models.latent_reward import LatentRewardConfig, LatentRewardModel
from jaxpref.recipes.rewards import is_latent
from jaxpref.rewards.loading import (
  is_latent_reward,
  load_latent_reward,
  look_for_latent_reward,
  read_config,
  with_text_projection,
)
from jaxpref.training import build


@pytest.mark.parametrize(
  ("name", "features", "width", "count"), [("sd15", 4800, 768, 476_049_665), ("sdxl", 3520, 1280, 2_065_592_961)]
)
def test_full_size_latent_rewards_have_the_published_parameters(name, features, width, count):
  module = LatentRewardModel(presets.latent_reward_config(presets.get_preset(name)))
  shapes = presets.abstract_params(module)
  assert shapes["visual_projection"]["kernel"].shape == (features, width)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  again = LatentRewardConfig.from_dict(module.config.to_dict())
  assert again == module.config


@pytest.mark.parametrize("name", ["one-level", pytest.param("sdxl-miniature", marks=pytest.mark.slow)])
def test_it_starts_as_the_model(name):
  """Its parameters are those of the networks, without the way up, and projections; they are what the module wants."""
  pipe = pipelines.random_pipeline(name, components=latent_rewards.NETWORKS)
  module, params = latent_rewards.of_pipeline(pipe, jax.random.key(0), image_size=16, guidance_scale=3.0)
  shapes = presets.abstract_params(module)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  assert module.config == dataclasses.replace(
    presets.latent_reward_config(presets.get_preset(name)), guidance_scale=3.0, image_size=16
  )
  kept = {k: v for k, v in pipe.params["unet"].items() if k in params["unet"]}
  jax.tree.map(np.testing.assert_array_equal, params["unet"], kept)
  assert float(jnp.std(params["visual_projection"]["kernel"])) == pytest.approx(0.02, rel=0.1)
  assert float(params["logit_scale"]) == pytest.approx(np.log(1 / 0.07), abs=1e-3)


def test_another_family_is_refused():
  with pytest.raises(ValueError, match="can only be made of Stable Diffusion 1.x, 2.x and XL; expected config.family="):
    latent_rewards.of_pipeline(object(), jax.random.key(0), image_size=16, guidance_scale=3.0)


def test_the_text_projection_of_a_clip():
  own = {"text_projection": {"kernel": jnp.zeros((128, 128))}, "logit_scale": 1.0}
  found = with_text_projection(own, "tiny-clip")
  assert float(jnp.abs(found["text_projection"]["kernel"]).max()) > 0 and found["logit_scale"] == 1.0
  for other, said in (
    ({"text_projection": {"kernel": jnp.zeros((3, 3))}}, r"\(128, 128\); expected one of shape \(3, 3\)"),
    ({}, "expected none, as its text encoder has one"),
  ):
    with pytest.raises(ValueError, match=said):
      with_text_projection(other, "tiny-clip")


def test_latent_rewards_are_told_from_other_names():
  assert is_latent_reward("random:sd15-miniature") and not is_latent_reward("tiny-clip")
  assert is_latent("latent") and is_latent("latent=folder") and not is_latent("latents:mine") and not is_latent("judge")
  with pytest.raises(
    ValueError, match="tiny-clip/config.json: model_type is 'clip' and .*'latent_reward_model'; point to a"
  ):
    look_for_latent_reward("tiny-clip")
  with pytest.raises(FileNotFoundError, match="model folder nowhere does not exist"):
    load_latent_reward("nowhere", dtype="float32")


def test_the_work_folder_of_a_run_is_refused_and_its_model_named(tmp_path):
  (tmp_path / "config.json").write_text('{"objective": "lrm"}')
  for read in (read_config, look_for_latent_reward, is_latent_reward):
    with pytest.raises(ValueError, match=f"{tmp_path} is the work folder of a run; give .*{tmp_path / 'export'}"):
      read(str(tmp_path))


def test_one_that_is_trained_further_keeps_its_guidance():
  c = config.default()
  c.update(objective="lrm", model="zeros:one-level", preference_model="zeros:one-level")
  assert build.build(c).params["lrm"]
  c.lrm.guidance_scale = 3.0
  with pytest.raises(ValueError, match="guidance_scale=3.0, but the latent reward model zeros:one-level has 7.5"):
    build.build(c)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *[("guidance_scale", value) for value in ("7.5", float("nan"), -1, [7.5])],
    *[("projection_dim", value) for value in ("a", 0)],
    *[("image_size", value) for value in ("a", [1, 2, 3])],
    ("logit_scale_init_value", "a"),
    *[(name, "a") for name in ("unet", "text_encoder", "text_encoder_2")],
  ],
)
def test_a_config_that_was_damaged_is_refused_by_field(name, value):
  config = LatentRewardModel(presets.latent_reward_config(presets.get_preset("one-level"))).config.to_dict()
  assert LatentRewardConfig.from_dict(config)
  with pytest.raises(ValueError, match=f"^{name} is .*, expected .*; point to a folder"):
    LatentRewardConfig.from_dict(config | {name: value})


def test_what_it_starts_from_is_looked_at_before_weights_are_read():
  c = config.default()
  c.update(objective="lrm", model="zeros:one-level", preference_model="tiny-clip")
  build.look_for(config.typed(c))
  c.preference_model = "tiny-spm"
  with pytest.raises(ValueError, match="preference_model=tiny-spm is a step-aware preference model; expected a latent"):
    build.look_for(config.typed(c))


def test_one_of_another_model_is_refused():
  c = config.default()
  c.update(objective="spo", model="zeros:one-level", preference_model="zeros:sdxl-miniature", reward="latent")
  c.spo.update(warmup_steps=0, pool_last_step=True)
  with pytest.raises(
    ValueError, match="config.reward=latent is for latents of 4 channels and prompts of 32 tokens, tho"
  ):
    build.build(c)
