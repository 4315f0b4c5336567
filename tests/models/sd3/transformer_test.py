"""The transformer of Stable Diffusion 3 against diffusers', and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import lora, presets
from jaxpref.models.sd3.presets import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from jaxpref.models.sd3.transformer import (
  LORA_TARGETS,
  SD3Transformer2DModel,
  SD3TransformerConfig,
  constant_shapes,
  join_constants,
  position_table,
  split_constants,
)

TOLERANCE = 1e-4

SD3 = SD3TransformerConfig(
  sample_size=10,
  in_channels=3,
  out_channels=5,
  num_layers=4,
  attention_head_dim=4,
  num_attention_heads=5,
  joint_attention_dim=11,
  caption_projection_dim=20,
  pooled_projection_dim=7,
  pos_embed_max_size=9,
)
SD35_M = dataclasses.replace(SD3, num_layers=5, dual_attention_layers=(0, 1), qk_norm="rms_norm")
SD35_L = dataclasses.replace(SD3, num_layers=3, qk_norm="rms_norm", out_channels=None)
# No two neighbours alike: nothing is scanned; and the last block is a dual one.
MIXED = dataclasses.replace(SD3, num_layers=3, dual_attention_layers=(0, 2), patch_size=3, sample_size=12)


def draw_inputs(config, height, width, batch=2, length=5):
  """Inputs that are differentiated, and those that are not."""
  rng = np.random.default_rng(0)
  shapes = {
    "sample": (batch, height, width, config.in_channels),
    "text": (batch, length, config.joint_attention_dim),
    "pooled": (batch, config.pooled_projection_dim),
  }
  inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  return inputs, {"timesteps": np.array([7.5, 981], np.float32)[:batch]}


def flax_apply(model):
  def apply(params, sample, timesteps, text, pooled):
    return model.apply({"params": params}, sample, timesteps, text, pooled)

  return apply


def flax_init(model):
  def init(sample, timesteps, text, pooled):
    return model.init(jax.random.key(0), sample, timesteps, text, pooled)

  return init


def compare_with_diffusers(config, height, width, **sizes):
  import diffusers

  from tests.models import torch_parity

  original = diffusers.SD3Transformer2DModel.from_config(config.to_dict())

  def torch_apply(sample, timesteps, text, pooled):
    output = original(sample.permute(0, 3, 1, 2), text, pooled, timesteps)
    return output.sample.permute(0, 2, 3, 1)

  model = SD3Transformer2DModel(config)
  inputs, constants = draw_inputs(config, height, width, **sizes)
  return torch_parity.compare(
    original, torch_apply, flax_init(model), flax_apply(model), inputs, constants, carry=torch_parity.through_files
  )


@pytest.mark.parametrize(
  ("config", "height", "width"),
  [(SD3, 8, 14), (SD35_M, 10, 6), (SD35_L, 18, 2), (MIXED, 9, 12)],
  ids=["sd3", "sd3.5-medium", "sd3.5-large", "mixed"],
)
def test_the_transformer_equals_diffusers(config, height, width):
  pytest.importorskip("diffusers")
  errors = compare_with_diffusers(config, height, width)
  print(errors)
  assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize("preset", [SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE], ids=["sd3-m", "sd3.5-m", "sd3.5-l"])
def test_the_transformer_equals_diffusers_at_full_width(preset):
  pytest.importorskip("diffusers")
  dual = preset.transformer.dual_attention_layers and (0,)
  # The table of positions is not what is compared: a smaller one takes less memory.
  config = dataclasses.replace(preset.transformer, num_layers=2, dual_attention_layers=dual, pos_embed_max_size=24)
  errors = compare_with_diffusers(config, 16, 24, batch=1, length=13)
  print(errors)
  assert max(errors.values()) <= TOLERANCE, errors


def test_published_models_have_their_numbers_of_parameters():
  sizes = (SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE)
  counts = [presets.count_params(SD3Transformer2DModel(preset.transformer)) for preset in sizes]
  assert counts == [2_028_328_000, 2_243_171_520, 8_056_627_520]


@pytest.mark.parametrize("config", [SD3, SD35_M])
def test_positions_equal_those_of_diffusers(config):
  diffusers = pytest.importorskip("diffusers")
  expected = diffusers.SD3Transformer2DModel.from_config(config.to_dict()).pos_embed.pos_embed[0].numpy()
  table = position_table(config)
  size = config.pos_embed_max_size
  whole = np.concatenate([np.tile(table, (size, 1)), np.repeat(table, size, axis=0)], axis=1)
  assert whole.shape == expected.shape == constant_shapes(config)["pos_embed"]["pos_embed"].shape[1:]
  np.testing.assert_allclose(whole, expected, atol=1e-6)


def test_a_table_of_positions_replaces_the_computed_one_and_has_no_gradient():
  model = SD3Transformer2DModel(SD3)
  inputs, constants = draw_inputs(SD3, 4, 6)
  params = presets.init_params(model, jax.random.key(0))
  table = position_table(SD3)
  size = SD3.pos_embed_max_size
  whole = jnp.asarray(np.concatenate([np.tile(table, (size, 1)), np.repeat(table, size, axis=0)], axis=1))[None]

  @jax.jit
  @jax.value_and_grad
  def total(table):
    variables = {"params": params, "constants": {"pos_embed": {"pos_embed": table}}}
    return jnp.sum(model.apply(variables, inputs["sample"], constants["timesteps"], inputs["text"], inputs["pooled"]))

  computed = jnp.sum(jax.jit(flax_apply(model))(params, **inputs, **constants))
  same, gradient = total(whole)
  other, _ = total(whole[:, ::-1])
  np.testing.assert_allclose(same, computed, rtol=1e-5)
  assert abs(float(other - computed)) > 1e-3
  assert not np.any(gradient)


def test_constants_are_split_from_the_content_of_a_file_and_joined_again():
  params = presets.abstract_params(SD3Transformer2DModel(SD3))
  whole = join_constants(params, constant_shapes(SD3))
  assert set(whole["pos_embed"]) == {"proj", "pos_embed"}
  assert split_constants(whole) == (params, constant_shapes(SD3))


def test_bfloat16_computes_close_to_float32_with_float32_parameters_and_output():
  inputs, constants = draw_inputs(SD35_M, 4, 4)
  params = presets.init_params(SD3Transformer2DModel(SD35_M), jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

  def run(dtype):
    return jax.jit(flax_apply(SD3Transformer2DModel(SD35_M, dtype)))(params, **inputs, **constants)

  exact, rounded = run(jnp.float32), run(jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
  assert 1e-4 < error < 3e-2, error


@pytest.fixture(scope="module")
def by_remat():
  """Policy -> (function of the gradient, bytes kept for the backward pass besides the parameters)."""
  inputs, constants = draw_inputs(SD3, 12, 12)
  params = presets.init_params(SD3Transformer2DModel(SD3), jax.random.key(0))
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  found = {}
  for remat in ("none", "attention", "block", "full"):
    apply = flax_apply(SD3Transformer2DModel(SD3, remat=remat))

    def loss(params, apply=apply):
      return jnp.sum(apply(params, **inputs, **constants) ** 2)

    gradient = functools.cache(lambda loss=loss: jax.jit(jax.grad(loss))(params))
    backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
    found[remat] = gradient, size(backward) - size(params)
  return found


@pytest.mark.parametrize(
  "remat", ["block", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("attention", "full"))]
)
def test_remat_changes_no_gradient(by_remat, remat):
  for a, b in zip(*(jax.tree.leaves(by_remat[r][0]()) for r in ("none", remat)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_remat_keeps_less(by_remat):
  none, attention, block, full = (size for _, size in by_remat.values())
  print(none, attention, block, full)
  assert attention < 0.6 * none and block < 0.1 * attention and full < 0.9 * block


def test_lora_adapts_the_joint_attention_under_the_names_of_diffusers_and_merges_to_the_same_function():
  model = SD3Transformer2DModel(SD35_M)
  params = presets.init_params(model, jax.random.key(0))
  adapter = lora.init_lora(jax.random.key(1), params, rank=2, targets=LORA_TARGETS)
  layers = lora.to_layers(adapter)
  both = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
  names = {f"transformer_blocks.{i}.attn.{name}" for i in range(5) for name in both}
  assert set(layers) == names | {f"transformer_blocks.{i}.attn.to_add_out" for i in range(4)}
  # A layer's factor depends on its own name only.
  alone = lora.init_lora(jax.random.key(1), params, rank=2, targets=r"\.attn\.to_q$")
  np.testing.assert_array_equal(
    layers["transformer_blocks.3.attn.to_q"][0], lora.to_layers(alone)["transformer_blocks.3.attn.to_q"][0]
  )
  again = lora.from_layers(layers, params)
  assert jax.tree.structure(again) == jax.tree.structure(adapter)
  rng = np.random.default_rng(0)
  adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), again)
  inputs, constants = draw_inputs(SD35_M, 4, 6)
  arguments = (inputs["sample"], constants["timesteps"], inputs["text"], inputs["pooled"])
  apply = jax.jit(model.apply)
  plain = apply({"params": params}, *arguments)
  merged = apply({"params": lora.merge_lora(params, adapter, 0.5)}, *arguments)
  for remat in ("none", "full"):
    network = SD3Transformer2DModel(SD35_M, remat=remat)
    adapted = jax.jit(lambda a, network=network: lora.apply(network, params, a, *arguments, scale=0.5))(adapter)
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(adapted - plain)).max() > 1e-2


@pytest.mark.parametrize("config", [SD3, SD35_M, MIXED, SD35_MEDIUM.transformer])
def test_config_round_trip(config):
  written = config.to_dict()
  assert written["_class_name"] == "SD3Transformer2DModel"
  assert SD3TransformerConfig.from_dict(written | {"_diffusers_version": "0.32.0"}) == config
  hash(config)


def test_defaults_are_those_of_diffusers():
  diffusers = pytest.importorskip("diffusers")
  import inspect

  signature = inspect.signature(diffusers.SD3Transformer2DModel.__init__)
  expected = {name: parameter.default for name, parameter in signature.parameters.items() if name != "self"}
  assert SD3TransformerConfig.from_dict(expected) == SD3TransformerConfig()
  assert set(expected) == set(SD3TransformerConfig().to_dict()) - {"_class_name"}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm', expected null or rms_norm"),
    ({"pos_embed_max_size": None}, "pos_embed_max_size=None, expected a positive integer"),
    ({"caption_projection_dim": 1000}, "caption_projection_dim=1000, expected 1152, num_attention_heads x"),
    ({"dual_attention_layers": [18]}, r"dual_attention_layers=\(18,\), expected .* from 0 to 17"),
    ({"num_layers": 0}, "num_layers=0, expected a positive integer"),
    ({"attention_head_dim": 7, "num_attention_heads": 1}, "attention_head_dim=7, expected"),
    ({"new_feature": 1}, "unknown key new_feature=1"),
  ],
)
def test_refuses_configs_it_does_not_implement(change, message):
  with pytest.raises(ValueError, match=message):
    SD3TransformerConfig.from_dict(change)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"sample": np.zeros((2, 3, 4, 6))}, r"sample has the shape \(2, 3, 4, 6\)"),
    ({"sample": np.zeros((2, 5, 6, 3))}, r"h and w that 2 divides"),
    ({"sample": np.zeros((2, 4, 20, 3))}, r"2 x 10 patches, expected at most 9"),
    ({"text": np.zeros((2, 5, 4096))}, r"\(2, 5, 4096\), expected \[B, S, 11\]"),
    ({"pooled": np.zeros((2, 8))}, r"pooled_projections has the shape \(2, 8\), expected \[B, 7\]"),
  ],
)
def test_refuses_inputs_that_do_not_fit(change, message):
  inputs, constants = draw_inputs(SD3, 4, 6)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: flax_init(SD3Transformer2DModel(SD3))(**inputs | constants | change))


def test_refuses_an_unknown_remat():
  inputs, constants = draw_inputs(SD3, 4, 6)
  with pytest.raises(ValueError, match="remat='layer', expected one of none, attention, block, full"):
    jax.eval_shape(lambda: flax_init(SD3Transformer2DModel(SD3, remat="layer"))(**inputs | constants))
