"""Folders of preference models, CLIPs and judges, those of transformers among them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxpref.models import preference, presets
from jaxpref.rewards.loading import load_preference_model, open_judge, save_judge, save_preference_model
from tests.files.trees import assert_same, draw, nchw, randomised, relative_error


def test_preference_model_and_judge_round_trip(tmp_path):
  preset = presets.SD15_MINIATURE
  module = preference.StepAwareCLIPModel(preset.preference)
  params = randomised(presets.abstract_params(module))
  save_preference_model(tmp_path / "spm", module, params)
  found, found_params = load_preference_model(tmp_path / "spm")
  assert found == module
  assert_same(found_params, params)

  judge = preference.Judge(dataclasses.replace(preset.judge, styles=("a", "b", "c")))
  params = randomised(presets.abstract_params(judge))
  save_judge(tmp_path / "judge", judge, params)
  found, found_params = open_judge(tmp_path / "judge")
  assert found == judge
  assert_same(found_params, params)


def test_preference_model_starts_from_a_clip_folder_of_transformers(tmp_path):
  config = presets.SD15_MINIATURE.preference
  torch_clip = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config=config.text_config.to_dict(),
      vision_config=config.vision_config.to_dict(),
      projection_dim=config.projection_dim,
    )
  )
  torch_clip.save_pretrained(tmp_path / "clip")
  module, params = load_preference_model(tmp_path / "clip")
  assert module.config == config
  assert jax.tree.structure(params) == jax.tree.structure(presets.abstract_params(module))
  size = config.vision_config.image_size
  pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
  ids = np.array([[2046, 7, 2047], [2046, 9, 2047]], np.int32)
  found = jax.jit(module.apply)({"params": params}, ids, pixels, np.array([1, 900]))
  with torch.no_grad():
    expected = torch_clip(torch.tensor(ids), nchw(pixels)).logits_per_image.diagonal()
  assert relative_error(found, expected) <= 1e-4


def test_plain_clip_is_written_for_transformers(tmp_path):
  module = presets.make_clip(presets.SD15_MINIATURE)
  params = randomised(presets.abstract_params(module))
  save_preference_model(tmp_path / "clip", module, params)
  torch_clip = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
  state = torch_clip.state_dict()
  kernel = params["vision_model"]["encoder"]["layers.1"]["mlp"]["fc1"]["kernel"]
  found = state["vision_model.encoder.layers.1.mlp.fc1.weight"].numpy()
  np.testing.assert_array_equal(found, kernel.T)
  np.testing.assert_array_equal(state["logit_scale"].numpy(), params["logit_scale"])


def test_fields_of_a_clip_that_the_tensors_contradict(tmp_path):
  module = presets.make_clip(presets.SD15_MINIATURE)
  save_preference_model(tmp_path / "clip", module, draw(presets.abstract_params(module)))
  config = json.loads((tmp_path / "clip" / "config.json").read_text())
  config["vision_config"]["patch_size"] = 2
  (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="describes: vision_config.patch_size is 4 in the tensors, 2 in it; mis-shaped"):
    load_preference_model(tmp_path / "clip")
