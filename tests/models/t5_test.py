"""The T5 encoder against transformers, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import presets, t5
from jaxpref.models.sd3.presets import SD3_MEDIUM, T5_XXL
from jaxpref.models.t5 import T5Config, T5EncoderModel

TOLERANCE = 1e-4

# Heads times their width differ from d_model, as in the smallest T5 1.1.
T5 = dict(
  vocab_size=45,
  d_model=16,
  d_kv=6,
  d_ff=28,
  num_layers=3,
  num_heads=2,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=12,
  layer_norm_epsilon=1e-3,
)
IDS = np.random.default_rng(0).integers(0, 45, (2, 21)).astype(np.int32)


@pytest.mark.parametrize(
  ("feed_forward", "layers"), [("relu", 3), ("gated-gelu", 3), ("gated-gelu", 1)], ids=["t5", "t5-1.1", "one-layer"]
)
def test_the_encoder_equals_transformers(feed_forward, layers):
  transformers = pytest.importorskip("transformers")
  from tests.models import torch_parity

  settings = T5 | {"feed_forward_proj": feed_forward, "num_layers": layers}
  torch_config = transformers.T5Config(**settings)
  original = transformers.T5EncoderModel(torch_config).eval()
  config = T5Config.from_dict(torch_config.to_dict())
  assert config == T5Config(**settings)
  module = T5EncoderModel(config)
  errors = torch_parity.compare(
    original,
    lambda input_ids: original(input_ids).last_hidden_state,
    lambda input_ids: module.init(jax.random.key(0), input_ids),
    lambda params, input_ids: module.apply({"params": params}, input_ids),
    {},
    {"input_ids": IDS},
    carry=torch_parity.through_files,
  )
  print(errors)
  assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 12), (16, 64), (64, 200)])
def test_buckets_of_positions_equal_those_of_transformers(buckets, distance):
  pytest.importorskip("transformers")
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention

  length = 700
  relative = torch.arange(length)[None, :] - torch.arange(length)[:, None]
  expected = T5Attention._relative_position_bucket(relative, num_buckets=buckets, max_distance=distance)
  found = t5.relative_buckets(length, num_buckets=buckets, max_distance=distance)
  np.testing.assert_array_equal(found, expected.numpy())


def test_the_encoder_of_published_models_has_its_number_of_parameters():
  assert presets.count_params(T5EncoderModel(T5_XXL)) == 4_762_310_656
  assert SD3_MEDIUM.text_encoder_3 == T5_XXL


def test_config_round_trip():
  transformers = pytest.importorskip("transformers")
  for config in (T5Config(**T5), T5_XXL):
    written = config.to_dict()
    assert T5Config.from_dict(written) == config
    read = transformers.T5Config.from_dict(written)
    assert (read.is_gated_act, read.d_kv, read.num_heads) == (config is T5_XXL, config.d_kv, config.num_heads)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "umt5"}, "model_type='umt5' is not implemented, expected 't5'"),
    ({"is_decoder": True}, "is_decoder=True is not implemented"),
    ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu' is not implemented"),
    ({"d_model": 0}, "d_model=0, expected a positive integer"),
    ({"relative_attention_num_buckets": 3}, "an even number of buckets"),
  ],
)
def test_refuses_configs_it_does_not_implement(change, message):
  with pytest.raises(ValueError, match=message):
    T5Config.from_dict(change)


def test_bfloat16_stays_close_and_parameters_stay_float32():
  config = T5Config(**T5)
  params = presets.init_params(T5EncoderModel(config), jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  full, half = (
    jax.jit(T5EncoderModel(config, dtype).apply)({"params": params}, IDS) for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert half.dtype == jnp.bfloat16
  assert jnp.linalg.norm(full - half) / jnp.linalg.norm(full) < 0.03
