"""What a config.json may leave open, whichever network it is of."""

import dataclasses
from typing import Any

import pytest

from jaxpref.models import blip, clip, open_clip, preference
from jaxpref.models.sd3.transformer import SD3TransformerConfig
from jaxpref.models.t5 import T5Config
from jaxpref.models.unet import UNetConfig
from jaxpref.models.vae import VAEConfig

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
  "unet": (UNetConfig, {}),
  "vae": (VAEConfig, {}),
  "text encoder": (clip.CLIPTextConfig, {"model_type": None, "attention_dropout": None}),
  "vision": (clip.CLIPVisionConfig, {"model_type": None}),
  "clip": (clip.CLIPConfig, {"model_type": None}),
  "step-aware": (preference.StepAwareCLIPConfig, {"model_type": None}),
  "judge": (preference.JudgeConfig, {"model_type": "judge"}),
  "imagereward": (blip.ImageRewardConfig, {"model_type": "imagereward"}),
}
OF_SD3: dict[str, tuple[Any, dict[str, Any]]] = {"t5": (T5Config, {}), "sd3": (SD3TransformerConfig, {})}


@pytest.mark.parametrize("kind", KINDS)
def test_null_means_the_default(kind):
  cls, others = KINDS[kind]
  nulls = dict.fromkeys(f.name for f in dataclasses.fields(cls))
  nulls |= dict.fromkeys(getattr(cls, "FIXED", {}))
  for choice in ("mid_block_type", "upcast_attention"):  # of which null is a value
    nulls.pop(choice, None)
  assert cls.from_dict(nulls | others) == cls.from_dict(others)


def test_null_that_is_a_choice_is_kept():
  assert UNetConfig.from_dict({"mid_block_type": None}).mid_block_type is None
  assert UNetConfig.from_dict({}).mid_block_type is not None


def test_null_in_the_towers_of_imagereward_and_of_open_clip_means_the_default():
  towers = {"vision_config": {"patch_size": None}, "text_config": {"hidden_act": None, "vocab_size": None}}
  assert blip.ImageRewardConfig.from_dict({"model_type": "imagereward", **towers}) == blip.ImageRewardConfig()
  model = open_clip.VIT_H_14["model_cfg"]
  usual = {"model_cfg": {**model, "vision_cfg": {k: v for k, v in model["vision_cfg"].items() if k != "head_width"}}}
  null = {
    "model_cfg": {
      **model,
      "vision_cfg": {**model["vision_cfg"], "head_width": None, "mlp_ratio": None},
      "text_cfg": {**model["text_cfg"], "mlp_ratio": None},
    },
    "preprocess_cfg": {"mean": None, "std": None},
  }
  assert open_clip.config_from_dict(null) == open_clip.config_from_dict(usual)
  assert open_clip.config_from_dict({**null, "preprocess_cfg": None}) == open_clip.config_from_dict(usual)


def test_keys_of_an_average_of_weights_are_ignored_with_one_warning():
  """As diffusers' EMAModel writes them into unet_ema/config.json."""
  ema = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 2000, "power": 2 / 3,
         "update_after_step": 0, "use_ema_warmup": False}  # fmt: skip
  with pytest.warns(UserWarning) as warned:
    assert UNetConfig.from_dict(ema) == UNetConfig()
  (said,) = [str(w.message) for w in warned]
  assert all(key in said for key in ema) and "do not change the network" in said


def test_all_that_is_unknown_or_not_implemented_is_one_sentence():
  wrong = {"dropout": 0.1, "time_cond_proj_dim": 256, "new_feature": 1, "other": [2]}
  with pytest.raises(ValueError) as error:
    UNetConfig.from_dict({"decay": 0.5, **wrong})
  said = str(error.value)
  assert "unknown keys new_feature=1, other=[2], expected" in said and "decay" not in said
  assert "dropout=0.1 is not implemented, expected 0; time_cond_proj_dim=256 is not implemented" in said


@pytest.mark.parametrize(
  ("kind", "key", "value", "expected"),
  [
    ("unet", "block_out_channels", "x", "expected a list of integers;"),
    ("unet", "block_out_channels", [320, "640"], "expected a list of integers;"),
    ("unet", "cross_attention_dim", 768.5, "integer"),
    ("unet", "layers_per_block", True, "integer"),
    ("unet", "norm_eps", float("nan"), "expected a number;"),
    ("vae", "use_quant_conv", "false", "expected true or false;"),
    ("vae", "sample_size", [512], "expected an integer or a list of 2 integers;"),
    ("text encoder", "hidden_size", "768", "expected an integer;"),
    ("vision", "layer_norm_eps", [], "expected a number;"),
    ("clip", "logit_scale_init_value", "2.6", "expected a number;"),
    ("step-aware", "image_mean", 0.5, "expected a list of numbers;"),
    ("judge", "styles", {"a": 1}, "expected a list of texts;"),
    ("imagereward", "reward_mean", None, None),
    ("imagereward", "reward_mean", "0.1", "expected a number;"),
    ("t5", "d_model", 4096.0, "expected an integer;"),
    ("sd3", "num_layers", "24", "expected an integer;"),
  ],
)
def test_a_value_of_another_type_is_one_sentence(kind, key, value, expected):
  cls, others = (KINDS | OF_SD3)[kind]
  if expected is None:
    assert cls.from_dict(others | {key: value}) == cls.from_dict(others)
  else:
    with pytest.raises(ValueError, match=rf"config: {key}=.*{expected}"):
      cls.from_dict(others | {key: value})


def test_whole_numbers_pass_for_numbers():
  assert VAEConfig.from_dict({"scaling_factor": 1}).scaling_factor == 1
