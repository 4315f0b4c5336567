"""CLIP against transformers: forward, and gradients with respect to inputs and every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxpref.models import clip, presets
from tests.models import torch_parity

# Parameters that are no layer's: they keep their name.
torch_parity.LEAF_NAMES.update(class_embedding="class_embedding", logit_scale="logit_scale")

TOLERANCE = 1e-4
EOS = 40
# Row 0: padded with the end token. Row 1: ids above the end token (added tokens) around it.
IDS = np.array([[38, 5, EOS, EOS, EOS, EOS], [38, 41, 7, EOS, 9, 42]], np.int32)
PIXELS = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)

TEXT = dict(
  vocab_size=45,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=8,
  projection_dim=12,
  bos_token_id=38,
  eos_token_id=EOS,
  pad_token_id=EOS,
)
VISION = dict(
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=8,
  patch_size=4,
  projection_dim=12,
)


class _Named(torch.nn.Module):
  """Gives a tower the prefix that its names have in published files."""

  def __init__(self, name: str, tower: torch.nn.Module):
    super().__init__()
    setattr(self, name, tower)


def _flat(outputs) -> np.ndarray:
  """All outputs as one vector, so that one scalar depends on each of them."""
  concatenate = torch.cat if isinstance(outputs[0], torch.Tensor) else jnp.concatenate
  return concatenate([x.reshape(-1) for x in outputs])


def _compare(torch_model, torch_outputs, module, outputs, inputs, constants):
  errors = torch_parity.compare(
    torch_model,
    lambda **kwargs: _flat(torch_outputs(**kwargs)),
    lambda **kwargs: module.init(jax.random.key(0), **kwargs),
    lambda params, **kwargs: _flat(outputs(module.apply({"params": params}, **kwargs))),
    inputs,
    constants,
  )
  print(errors)
  assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(("projection", "act", "eos"), [(False, "quick_gelu", 2), (True, "gelu", EOS)])
def test_text_model_matches_transformers(projection, act, eos):
  settings = TEXT | {"hidden_act": act, "eos_token_id": eos}
  torch_config = transformers.CLIPTextConfig(**settings)
  config = clip.CLIPTextConfig.from_dict(torch_config.to_dict())
  assert config == clip.CLIPTextConfig(**settings)
  if projection:
    torch_model = tower = transformers.CLIPTextModelWithProjection(torch_config)
  else:
    tower = transformers.CLIPTextModel(torch_config)
    torch_model = _Named("text_model", tower)
  module = clip.CLIPTextModel(config, with_projection=projection)

  def torch_outputs(input_ids):
    out = tower(input_ids, output_hidden_states=True)
    last = out.text_embeds if projection else out.pooler_output
    return (out.last_hidden_state, *out.hidden_states, last)

  def outputs(out):
    assert len(out["hidden_states"]) == config.num_hidden_layers + 1
    last = out["text_embeds"] if projection else out["pooler_output"]
    return (out["last_hidden_state"], *out["hidden_states"], last)

  _compare(torch_model, torch_outputs, module, outputs, {}, {"input_ids": IDS})


@pytest.mark.parametrize(("projection", "act"), [(False, "gelu"), (True, "quick_gelu")])
def test_vision_model_matches_transformers(projection, act):
  torch_config = transformers.CLIPVisionConfig(**VISION, hidden_act=act)
  config = clip.CLIPVisionConfig.from_dict(torch_config.to_dict())
  assert config == clip.CLIPVisionConfig(**VISION, hidden_act=act)
  if projection:
    torch_model = tower = transformers.CLIPVisionModelWithProjection(torch_config)
  else:
    tower = transformers.CLIPVisionModel(torch_config)
    torch_model = _Named("vision_model", tower)
  module = clip.CLIPVisionModel(config, with_projection=projection)

  def torch_outputs(pixel_values):
    out = tower(pixel_values.permute(0, 3, 1, 2), output_hidden_states=True)
    last = out.image_embeds if projection else out.pooler_output
    return (out.last_hidden_state, *out.hidden_states, last)

  def outputs(out):
    last = out["image_embeds"] if projection else out["pooler_output"]
    return (out["last_hidden_state"], *out["hidden_states"], last)

  _compare(torch_model, torch_outputs, module, outputs, {"pixel_values": PIXELS}, {})


def test_clip_model_matches_transformers():
  torch_config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
  config = clip.CLIPConfig.from_dict(torch_config.to_dict())
  assert config.vision_config == clip.CLIPVisionConfig(**VISION)
  torch_model = transformers.CLIPModel(torch_config)

  def torch_outputs(input_ids, pixel_values):
    out = torch_model(input_ids, pixel_values.permute(0, 3, 1, 2))
    return (out.image_embeds, out.text_embeds, out.logits_per_image)

  def outputs(out):
    image_embeds, text_embeds, logit_scale = out
    return (image_embeds, text_embeds, jnp.exp(logit_scale) * image_embeds @ text_embeds.T)

  _compare(
    torch_model,
    torch_outputs,
    clip.CLIPModel(config),
    outputs,
    {"pixel_values": PIXELS},
    {"input_ids": IDS},
  )


def test_parameter_counts_of_published_models():
  """Numbers of the published checkpoints: every layer is there, nothing else is."""
  count = presets.count_params
  assert count(clip.CLIPTextModel(presets.SD15.text_encoder)) == 123_060_480
  assert count(clip.CLIPTextModel(presets.SDXL.text_encoder_2, True)) == 694_659_840
  assert count(presets.make_clip(presets.SDXL)) == 986_109_441


def test_reduced_precision_stays_close_and_parameters_stay_float32():
  config = clip.CLIPTextConfig(**TEXT)
  params = presets.init_params(clip.CLIPTextModel(config), jax.random.key(0))
  full, half = (
    jax.jit(clip.CLIPTextModel(config, dtype=dtype).apply)({"params": params}, IDS)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  assert half["last_hidden_state"].dtype == jnp.bfloat16
  assert torch_parity.relative_error(half["pooler_output"], full["pooler_output"]) < 0.02


@pytest.mark.parametrize(
  ("config", "key", "value", "named"),
  [
    (clip.CLIPTextConfig, "hidden_act", "relu", "hidden_act"),
    (clip.CLIPTextConfig, "model_type", "t5", "model_type"),
    (clip.CLIPTextConfig, "eos_token_id", [1, 2], "eos_token_id"),
    (clip.CLIPTextConfig, "num_attention_heads", 3, "num_attention_heads"),
    (clip.CLIPTextConfig, "attention_dropout", 0.1, "attention_dropout"),
    (clip.CLIPVisionConfig, "image_size", [8, 16], "image_size"),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(config, key, value, named):
  with pytest.raises(ValueError, match=f"{config.__name__}.*{named}"):
    config.from_dict(config().to_dict() | {key: value})


def test_config_ignores_what_does_not_change_the_network():
  old = {"_name_or_path": "x", "torch_dtype": "float16", "transformers_version": "4.2", "top_k": 50}
  config = clip.CLIPTextConfig(**TEXT)
  assert clip.CLIPTextConfig.from_dict(config.to_dict() | old) == config


def test_wrong_inputs_are_refused():
  text = clip.CLIPTextModel(clip.CLIPTextConfig(**TEXT))
  with pytest.raises(ValueError, match="length 9, expected at most max_position_embeddings = 8"):
    jax.eval_shape(text.init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
  vision = clip.CLIPVisionModel(clip.CLIPVisionConfig(**VISION))
  with pytest.raises(ValueError, match=r"\(16, 16, 3\) per image, expected \(8, 8, 3\)"):
    jax.eval_shape(vision.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
