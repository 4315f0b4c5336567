"""The UNet against diffusers', and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models.unet import UNet2DConditionModel, UNetConfig, timestep_embedding

TOLERANCE = 1e-4

# Heads per level differ from each other and from head widths; groups, widths and lengths too.
SD = UNetConfig(
  block_out_channels=(16, 24),
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  layers_per_block=1,
  attention_head_dim=4,
  cross_attention_dim=12,
  norm_num_groups=4,
)
SDXL = UNetConfig(
  block_out_channels=(8, 16, 24),
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
  layers_per_block=(1, 2, 1),
  transformer_layers_per_block=(1, 0, 2),
  attention_head_dim=(1, 2, 3),
  cross_attention_dim=10,
  use_linear_projection=True,
  upcast_attention=None,
  norm_num_groups=4,
  norm_eps=1e-4,
  flip_sin_to_cos=False,
  freq_shift=1,
  addition_embed_type="text_time",
  addition_time_embed_dim=6,
  projection_class_embeddings_input_dim=7 + 6 * 6,
)
ONE_LEVEL = dataclasses.replace(
  SD,
  block_out_channels=(16,),
  down_block_types=("CrossAttnDownBlock2D",),
  up_block_types=("CrossAttnUpBlock2D",),
  mid_block_type=None,
  attention_head_dim=2,
  time_embedding_dim=20,
)
# As in SSD-1B: no attention in the middle, and ways down and up of different depths.
ASYMMETRIC = dataclasses.replace(
  SD,
  mid_block_type="UNetMidBlock2D",
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
  transformer_layers_per_block=((1,), (2,)),
  reverse_transformer_layers_per_block=((1, 2), (1, 1)),
)


def draw_inputs(config, height, width, batch=2, length=5):
  """Inputs that are differentiated, and those that are not."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  inputs = {
    "sample": normal(batch, height, width, config.in_channels),
    "text": normal(batch, length, config.cross_attention_dim),
  }
  constants = {"timesteps": np.array([7, 981], np.int32)[:batch]}
  if config.addition_embed_type:
    inputs["text_embeds"] = normal(batch, 7)
    constants["time_ids"] = rng.integers(0, 1024, (batch, 6)).astype(np.float32)
  return inputs, constants


def flax_apply(model):
  def apply(params, sample, timesteps, text, **added):
    return model.apply({"params": params}, sample, timesteps, text, added or None)

  return apply


def flax_init(model):
  def init(sample, timesteps, text, **added):
    return model.init(jax.random.key(0), sample, timesteps, text, added or None)

  return init


@pytest.mark.parametrize(
  ("config", "height", "width"),
  [(SD, 6, 8), (SDXL, 7, 10), (ONE_LEVEL, 3, 5), (ASYMMETRIC, 5, 5)],
  ids=["sd", "sdxl-odd-size", "one-level", "asymmetric-odd-size"],
)
def test_the_unet_equals_diffusers(config, height, width):
  diffusers = pytest.importorskip("diffusers")
  from tests.models import torch_parity

  original = diffusers.UNet2DConditionModel.from_config(config.to_dict())

  def torch_apply(sample, timesteps, text, **added):
    output = original(sample.permute(0, 3, 1, 2), timesteps, text, added_cond_kwargs=added or None)
    return output.sample.permute(0, 2, 3, 1)

  model = UNet2DConditionModel(config)
  inputs, constants = draw_inputs(config, height, width)
  errors = torch_parity.compare(original, torch_apply, flax_init(model), flax_apply(model), inputs, constants)
  print(errors)
  assert max(errors.values()) < TOLERANCE, errors


def test_bfloat16_computes_close_to_float32_with_float32_parameters_and_output():
  inputs, constants = draw_inputs(ONE_LEVEL, 4, 4)
  init = flax_init(UNet2DConditionModel(ONE_LEVEL, jnp.bfloat16))
  shapes = jax.eval_shape(lambda: init(**inputs, **constants))["params"]
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)

  def run(dtype):
    apply = flax_apply(UNet2DConditionModel(ONE_LEVEL, dtype))
    return jax.jit(apply)(params, **inputs, **constants)

  exact, rounded = run(jnp.float32), run(jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
  assert 1e-4 < error < 3e-2, error


def test_timestep_embedding_by_hand():
  angles = np.array([5.0, 5.0 / 100])  # 10000^(-i / 2), i = 0, 1
  found = timestep_embedding(jnp.array([5]), 4, flip_sin_to_cos=True, freq_shift=0)
  np.testing.assert_allclose(found[0], [*np.cos(angles), *np.sin(angles)], rtol=1e-5)


@pytest.mark.parametrize("config", [SD, SDXL, ONE_LEVEL, ASYMMETRIC, UNetConfig()])
def test_config_round_trip(config):
  written = config.to_dict()
  assert written["_class_name"] == "UNet2DConditionModel"
  assert UNetConfig.from_dict(written | {"_diffusers_version": "0.6.0"}) == config
  hash(config)


def test_defaults_and_implemented_values_are_those_of_diffusers():
  diffusers = pytest.importorskip("diffusers")
  import inspect

  signature = inspect.signature(diffusers.UNet2DConditionModel.__init__)
  expected = {name: parameter.default for name, parameter in signature.parameters.items() if name != "self"}
  # What this project neither reads nor refuses: nothing.
  found = UNetConfig().to_dict() | {key: values[0] for key, values in UNetConfig.FIXED.items()}
  del found["_class_name"]
  assert UNetConfig.from_dict(expected) == UNetConfig()
  as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}
  assert found == as_lists


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"only_cross_attention": True},
      "only_cross_attention=True is not implemented, expected False",
    ),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 is not implemented"),
    ({"new_feature": 1}, "unknown key new_feature=1"),
    ({"down_block_types": ["DownBlock2D"]}, "down_block_types.*expected 4 block types"),
    ({"up_block_types": ["AttnUpBlock2D"] * 4}, "up_block_types.*only UpBlock2D"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type=.*expected"),
    ({"attention_head_dim": 7}, "attention_head_dim=7, expected numbers of heads that divide 320"),
    ({"layers_per_block": [1, 2]}, "layers_per_block=.*a list of 4"),
    ({"addition_embed_type": "image"}, "addition_embed_type='image', expected null or text_time"),
    ({"cross_attention_dim": [8, 8, 8, 9]}, "cross_attention_dim=.*expected one width"),
  ],
)
def test_refuses_configs_it_does_not_implement(change, message):
  with pytest.raises(ValueError, match=message):
    UNetConfig.from_dict(change)


@pytest.mark.parametrize(
  ("config", "change", "message"),
  [
    (SD, {"sample": np.zeros((2, 4, 6, 8))}, r"sample has the shape \(2, 4, 6, 8\)"),
    (SD, {"text": np.zeros((2, 5, 768))}, r"\(2, 5, 768\), expected \[B, L, 12\]"),
    (SDXL, {"text_embeds": np.zeros((2, 9))}, "make 45 numbers, but .* is 43"),
    (dataclasses.replace(SD, norm_num_groups=7), {}, "16 channels cannot be divided in 7 groups"),
  ],
)
def test_refuses_inputs_that_do_not_fit(config, change, message):
  inputs, constants = draw_inputs(config, 6, 8)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: flax_init(UNet2DConditionModel(config))(**inputs | constants | change))


def test_refuses_missing_conditioning():
  inputs, constants = draw_inputs(SDXL, 6, 8)
  del inputs["text_embeds"]
  with pytest.raises(ValueError, match=r"keys \['time_ids'\].*expects text_embeds and time_ids"):
    jax.eval_shape(lambda: flax_init(UNet2DConditionModel(SDXL))(**inputs, **constants))


@pytest.fixture(scope="module")
def by_remat():
  """Policy -> (function of the gradient, bytes kept for the backward pass) of a UNet of one level."""
  inputs, constants = draw_inputs(ONE_LEVEL, 16, 16)
  shapes = jax.eval_shape(lambda: flax_init(UNet2DConditionModel(ONE_LEVEL))(**inputs, **constants))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes["params"])
  found = {}
  for remat in ("none", "attention", "block", ("full",)):
    apply = flax_apply(UNet2DConditionModel(ONE_LEVEL, remat=remat))

    def loss(params, apply=apply):
      return jnp.sum(apply(params, **inputs, **constants) ** 2)

    gradient = functools.cache(lambda loss=loss: jax.jit(jax.grad(loss))(params))
    backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
    found[remat] = gradient, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))
  return found


@pytest.mark.parametrize(
  "remat", ["block", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("attention", ("full",)))]
)
def test_remat_changes_no_gradient(by_remat, remat):
  for a, b in zip(*(jax.tree.leaves(by_remat[r][0]()) for r in ("none", remat)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_remat_keeps_less(by_remat):
  none, attention, block, full = (size for _, size in by_remat.values())
  print(none, attention, block, full)
  assert attention < 0.9 * none and block < 0.5 * attention and full < 0.9 * block


def test_unknown_remat_is_refused():
  inputs, constants = draw_inputs(SD, 6, 8)
  for remat in ("blocks", ("none",)):
    model = UNet2DConditionModel(SD, remat=remat)
    with pytest.raises(ValueError, match="expected one of none, attention, block, full, or a tuple of 2"):
      jax.eval_shape(lambda model=model: flax_init(model)(**inputs, **constants))
