"""What `build` holds in memory, and in which precision it writes."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import config
from jaxpref.files import loading, pipelines
from jaxpref.models import presets
from jaxpref.training import build, loop, programs, step
from tests.small_presets import drawn, with_one_attention


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setitem(presets.PRESETS, "one-level", with_one_attention(presets.ONE_LEVEL))
  monkeypatch.setattr(pipelines, "random_pipeline", drawn)


def recipe(**fields):
  c = config.default()
  c.update(objective="dpo", model="random:one-level", batch_size=2)
  c.evaluation.num_prompts = 0
  with c.unlocked():
    c.update_from_flattened_dict(fields)
  return c


def dtypes(tree):
  return {str(x.dtype) for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize("rank", [0, 2])
def test_only_what_is_trained_is_float32_under_bfloat16(rank):
  experiment = build.build(recipe(**{"dtype": "bfloat16", "lora.rank": rank}))
  assert dtypes(experiment.params) == {"float32"}
  frozen = {k: v for k, v in experiment.frozen.items() if k != "empty_ids"}
  assert dtypes(frozen) == {"bfloat16"}
  assert ("unet" in frozen) == bool(rank)


def test_untrained_weights_are_written_as_they_were_read(tmp_path):
  original = pipelines.random_pipeline("one-level", 0).params
  experiment = build.build(recipe(**{"dtype": "bfloat16", "lora.rank": 2}))
  experiment.export(experiment.params, tmp_path / "export")
  found = pipelines.load_pipeline(tmp_path / "export").params
  half = jax.tree.map(lambda x: np.asarray(x, np.float16), original)
  jax.tree.map(np.testing.assert_array_equal, found, half)
  kernel = original["unet"]["conv_in"]["kernel"]
  assert (np.asarray(kernel.astype(jnp.bfloat16), np.float16) != np.asarray(kernel, np.float16)).any()


def test_in_full_precision_nothing_is_read_again_to_be_written(tmp_path, monkeypatch):
  experiment = build.build(recipe(**{"sample.every": 1}))
  monkeypatch.setattr(loading, "load_text_to_image", None)
  experiment.export(experiment.params, tmp_path / "export")
  found = pipelines.load_pipeline(tmp_path / "export").params["vae"]
  original = pipelines.random_pipeline("one-level", 0).params["vae"]
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float16)), found, original)


def test_pretraining_may_train_the_text_encoder():
  experiment = build.build(recipe(objective="denoise", train_text_encoder=True))
  assert set(experiment.params) == {"unet", "text_encoder"} and not {"unet", "text_encoder"} & set(experiment.frozen)


def test_full_training_lets_go_of_the_parameters_it_started_from():
  experiment = build.build(recipe())
  loaded = weakref.ref(experiment.params["unet"]["conv_in"]["kernel"])
  experiment.params = None
  gc.collect()
  assert loaded() is None


def test_remat_reaches_the_network():
  assert build.build(recipe(remat="block")).model.unet.remat == "block"
  assert build.build(recipe(remat="none, block,full")).model.unet.remat == ("none", "block", "full")
  with pytest.raises(ValueError, match="config.remat='blocks'; expected one of none, attention, block, full"):
    config.check(recipe(remat="blocks"))


def test_a_loss_without_a_reference_is_compared_with_the_base_model_all_the_same(monkeypatch):
  c = config.default()
  c.update(objective="dpo", model="random:one-level")
  c.reference.mode = "update"
  moving = []
  monkeypatch.setattr(step, "make_halves", lambda *args, **options: moving.append(options["moving"]))
  c.loss.update(name="mapo", beta=0.1)
  for rank in (0, 2):
    c.lora.rank = rank
    experiment = build.build(c)
    assert not experiment.has_reference and experiment.read_base is not None  # no copy of it in memory meanwhile
    programs.make_halves(c, experiment, None, loop.sharding.make_mesh(devices=jax.devices()[:1]))
    assert moving.pop() is None  # nothing moves, whatever the config says
    jax.tree.map(np.testing.assert_array_equal, experiment.read_base(), experiment.params)


@pytest.mark.parametrize("objective", ["spo", "spm"])
@pytest.mark.parametrize("size", [7, 32, -2])
def test_sizes_that_predictions_cannot_be_decoded_at_are_refused(objective, size):
  c = recipe(objective=objective, preference_model="random:one-level", **{f"{objective}.decode_size": size})
  said = f"config.{objective}.decode_size={size}; expected 0 .* or a multiple of 2 up to 16, the pixels of random:one"
  with pytest.raises(ValueError, match=said):
    build.build(c)
