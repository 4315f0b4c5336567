import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref.models import lora, presets
from jaxpref.models.attention import Transformer2DModel
from jaxpref.models.resnet import conv1x1, conv3x3
from jaxpref.models.unet import UNet2DConditionModel
from tests.small_presets import smaller

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)


class Attention(nn.Module):
  """The names of a diffusers attention, without the attention."""

  @nn.compact
  def __call__(self, x):
    h = jnp.tanh(nn.Dense(8, use_bias=False, name="to_q")(x))
    h = h + nn.Dense(8, use_bias=False, name="to_k")(x)
    return x + nn.Dense(6, name="to_out.0")(h)


class Network(nn.Module):
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    block = nn.remat(Attention) if self.remat else Attention
    for i in range(2):
      x = block(name=f"blocks.{i}")(x)
    return nn.Dense(3, name="proj_out")(x)


PARAMS = jax.tree.map(
  lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32) / 3,
  jax.eval_shape(Network().init, KEY, X)["params"],
)
plain = jax.jit(lambda params: Network().apply({"params": params}, X))


def _trained(adapter):
  """The adapter with every factor random: B = 0 would hide errors."""
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), adapter)


def _apply(params, adapter, scale, remat=False):
  return lora.apply(Network(remat), params, adapter, X, scale=scale)


def test_targets_attention_projections_by_default():
  adapter = lora.init_lora(KEY, PARAMS, rank=4)
  paths = {".".join(path) for path in lora.adapted_paths(adapter)}
  assert paths == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_out.0")}
  assert adapter["blocks.1"]["to_out.0"]["lora_A"].shape == (8, 4)
  assert adapter["blocks.1"]["to_out.0"]["lora_B"].shape == (4, 6)


def test_unet_has_eight_targets_in_every_transformer_block():
  unet = UNet2DConditionModel(presets.SDXL_MINIATURE.unet)
  shapes = presets.abstract_params(unet)
  adapter = lora.init_lora(KEY, shapes, rank=2)
  paths = list(lora.to_layers(adapter))
  blocks = {path.rpartition(".attn")[0] for path in paths}
  # Depth 1 and 2 on the way down, 2 in the middle, two layers of each depth on the way up.
  assert len(blocks) == 3 + 2 + 6 and len(paths) == 8 * len(blocks)


def test_initialisation_is_peft_s():
  wide = {"to_q": {"kernel": jnp.zeros((400, 30))}}
  factors = lora.init_lora(KEY, wide, rank=16)["to_q"]
  bound = 400**-0.5  # of kaiming_uniform with a = sqrt(5) over fan-in 400
  assert np.abs(factors["lora_A"]).max() <= bound
  np.testing.assert_allclose(factors["lora_A"].std(), bound / 3**0.5, rtol=0.02)
  np.testing.assert_array_equal(factors["lora_B"], 0)
  factors = lora.init_lora(KEY, wide, rank=4, init="gaussian")["to_q"]
  np.testing.assert_allclose(factors["lora_A"].std(), 1 / 4, rtol=0.05)
  assert np.abs(factors["lora_A"]).max() > 2 / 4  # not uniform
  np.testing.assert_array_equal(factors["lora_B"], 0)
  with pytest.raises(ValueError, match="init is 'pissa', expected one of kaiming, gaussian"):
    lora.init_lora(KEY, wide, rank=4, init="pissa")


def test_factors_do_not_depend_on_what_else_is_adapted():
  both = lora.init_lora(KEY, PARAMS, rank=2)
  one = lora.init_lora(KEY, PARAMS, rank=2, targets=r"blocks\.1\.to_k$")
  assert lora.adapted_paths(one) == [("blocks.1", "to_k")]
  np.testing.assert_array_equal(one["blocks.1"]["to_k"]["lora_A"], both["blocks.1"]["to_k"]["lora_A"])
  assert (both["blocks.0"]["to_k"]["lora_A"] != both["blocks.1"]["to_k"]["lora_A"]).any()


def test_fresh_adapter_changes_nothing():
  adapter = lora.init_lora(KEY, PARAMS, rank=4)
  with_adapter = jax.jit(lambda p, a: _apply(p, a, 1.0))(PARAMS, adapter)
  np.testing.assert_array_equal(with_adapter, plain(PARAMS))


@pytest.mark.parametrize("remat", [False, True])
def test_intercepted_equals_merged_with_gradients(remat):
  adapter = _trained(lora.init_lora(KEY, PARAMS, rank=3))
  scale = 0.5

  def merged(params, adapter):
    return plain(lora.merge_lora(params, adapter, scale))

  def total(f):
    return jax.jit(jax.value_and_grad(lambda p, a: jnp.sum(f(p, a) ** 2), argnums=(0, 1)))

  found = total(lambda p, a: _apply(p, a, scale, remat))(PARAMS, adapter)
  expected = total(merged)(PARAMS, adapter)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
  assert abs(found[0] - np.sum(plain(PARAMS) ** 2)) > 1


def test_hand_computed_value():
  params = {"to_q": {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.array([10.0])}}
  adapter = {"to_q": {"lora_A": jnp.array([[1.0], [3.0]]), "lora_B": jnp.array([[2.0]])}}

  class One(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(1, name="to_q")(x)

  y = lora.apply(One(), params, adapter, jnp.array([[1.0, -1.0]]), scale=0.5)
  # 1 - 2 + 10 + 0.5 * (1 - 3) * 2
  np.testing.assert_allclose(y, [[7.0]])
  merged = lora.merge_lora(params, adapter, 0.5)["to_q"]
  np.testing.assert_allclose(merged["kernel"], [[2.0], [5.0]])
  np.testing.assert_allclose(merged["bias"], [10.0])


def test_merge_keeps_dtype_and_structure():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  merged = jax.eval_shape(lora.merge_lora, half, lora.init_lora(KEY, PARAMS, rank=2))
  assert jax.tree.structure(merged) == jax.tree.structure(half)
  assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_target_that_matches_nothing_is_an_error():
  with pytest.raises(ValueError, match=r"'query\$' matches none of the 7 linear layers.*to_q"):
    lora.init_lora(KEY, PARAMS, rank=4, targets="query$")
  with pytest.raises(ValueError, match="rank is 0"):
    lora.init_lora(KEY, PARAMS, rank=0)


def test_a_rank_above_the_smaller_side_of_a_layer_is_refused():
  sentence = r"rank is 7, expected at most 6, the smaller side of narrow \(32 x 6\).* 1 of the 2"
  narrow = {"wide": {"kernel": jnp.zeros((32, 32))}, "narrow": {"kernel": jnp.zeros((1, 1, 32, 6))}}
  with pytest.raises(ValueError, match=sentence):
    lora.init_lora(KEY, narrow, rank=7, targets="")
  assert set(lora.init_lora(KEY, narrow, rank=6, targets="")) == {"wide", "narrow"}
  assert set(lora.init_lora(KEY, narrow, rank=7, targets="wide")) == {"wide"}


def test_adapter_without_effect_is_an_error():
  adapter = lora.init_lora(KEY, {"other": PARAMS["blocks.0"]}, rank=2)
  with pytest.raises(ValueError, match="3 adapted layers were never applied"):
    _apply(PARAMS, adapter, 1.0)


@pytest.fixture(scope="module")
def stacked():
  """A UNet with stacks of blocks, its parameters, a trained adapter, and inputs."""
  unet = UNet2DConditionModel(smaller(presets.SDXL_MINIATURE).unet)
  params = presets.init_params(unet, KEY)
  inputs = presets.example_inputs(unet)
  inputs = (jax.random.normal(KEY, inputs[0].shape), *inputs[1:])
  return unet, params, _trained(lora.init_lora(KEY, params, rank=2)), inputs


def test_stack_with_adapter_equals_merged(stacked):
  unet, params, adapter, inputs = stacked
  found = jax.jit(lambda: lora.apply(unet, params, adapter, *inputs, scale=0.5))()
  plain = jax.jit(lambda p: unet.apply({"params": p}, *inputs))
  np.testing.assert_allclose(found, plain(lora.merge_lora(params, adapter, 0.5)), rtol=1e-4, atol=1e-4)
  assert np.abs(found - plain(params)).max() > 0.01


def test_layers_of_a_stack_are_initialised_by_their_own_names(stacked):
  unet, params, _, _ = stacked
  layers = lora.to_layers(lora.init_lora(KEY, params, rank=2))
  name = "down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q"
  alone = lora.init_lora(KEY, {name: {"kernel": jnp.zeros((16, 16))}}, rank=2)[name]
  np.testing.assert_array_equal(layers[name][0], alone["lora_A"])
  assert (layers[name][0] != layers[name.replace(".1.attn1", ".0.attn1")][0]).any()


def test_adapter_by_layers_and_back(stacked):
  unet, params, adapter, _ = stacked
  layers = lora.to_layers(adapter)
  assert all("transformer_blocks." in name for name in layers)
  again = lora.from_layers(layers, params)
  jax.tree.map(np.testing.assert_array_equal, again, adapter)
  wrong = {name.replace("attn1", "attn3"): factors for name, factors in layers.items()}
  with pytest.raises(ValueError, match=r"attn3\.to_\w+ is not a linear layer of the network.*and \d+ more; use"):
    lora.from_layers(wrong, params)
  ranks = {n: (a[:, :1], b[:1]) if ".transformer_blocks.1." in n else (a, b) for n, (a, b) in layers.items()}
  with pytest.raises(ValueError, match=r"transformer_blocks.attn1.to_q has layers of the ranks \[1, 2\], expected one"):
    lora.from_layers(ranks, params)
  with pytest.raises(ValueError, match="features, expected"):
    lora.from_layers({name: (a[:-1], b) for name, (a, b) in layers.items()}, params)


def test_layers_that_are_not_adapted_stay_so_in_training():
  """The second layer of the stack has zeros for factors, and so for gradients."""
  transformer = Transformer2DModel(num_heads=2, depth=2, linear_projection=False, num_groups=2)
  inputs = (jax.random.normal(KEY, (1, 2, 2, 8)), jax.random.normal(KEY, (1, 3, 4)))
  params = jax.jit(transformer.init)(KEY, *inputs)["params"]
  adapter = _trained(lora.init_lora(KEY, params, rank=2, targets=""))
  some = {name: f for name, f in lora.to_layers(adapter).items() if "transformer_blocks.1." not in name}
  partly = lora.from_layers(some, params)
  assert jax.tree.map(jnp.shape, partly) == jax.tree.map(jnp.shape, adapter)

  @jax.jit
  def step(adapter):
    loss = lambda adapter: jnp.sum(lora.apply(transformer, params, adapter, *inputs, scale=0.5) ** 2)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    updates, _ = optimizer.update(jax.grad(loss)(adapter), optimizer.init(adapter), adapter)
    return optax.apply_updates(adapter, updates)

  trained = lora.to_layers(step(partly))
  assert len(trained) == 2 * 10 + 2 and len(some) == 10 + 2
  for name, factors in trained.items():
    for before, after in zip(some.get(name, (0.0, 0.0)), factors, strict=True):
      assert np.any(after != before) == (name in some), name


def test_a_1x1_convolution():
  """Its factors have the leading axes of its kernel; a larger convolution is not adapted."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = conv3x3(5, dtype=jnp.float32, name="conv1")(x)
      return conv1x1(4, dtype=jnp.float32, name="proj_in")(x)

  x = jax.random.normal(KEY, (2, 3, 3, 6))
  plain = jax.jit(lambda params: Block().apply({"params": params}, x))
  adapted = jax.jit(lambda params, adapter: lora.apply(Block(), params, adapter, x, scale=0.5))
  params = jax.jit(Block().init)(KEY, x)["params"]
  adapter = lora.init_lora(KEY, params, rank=2, targets="")
  assert jax.tree.map(jnp.shape, adapter) == {"proj_in": {"lora_A": (1, 1, 5, 2), "lora_B": (1, 1, 2, 4)}}
  np.testing.assert_array_equal(adapted(params, adapter), plain(params))
  adapter = _trained(adapter)
  found = adapted(params, adapter)
  np.testing.assert_allclose(found, plain(lora.merge_lora(params, adapter, 0.5)), rtol=1e-5, atol=1e-5)
  assert np.abs(found - plain(params)).max() > 0.1

  layers = lora.to_layers(adapter)
  jax.tree.map(np.testing.assert_array_equal, lora.from_layers(layers, params), adapter)
  flat = {name: (a[0, 0], b[0, 0]) for name, (a, b) in layers.items()}
  jax.tree.map(np.testing.assert_array_equal, lora.from_layers(flat, params), adapter)


def test_adapter_of_another_network_is_an_error():
  adapter = lora.init_lora(KEY, PARAMS, rank=2)
  other = {"blocks.0": PARAMS["blocks.0"]}
  with pytest.raises(ValueError, match=r"blocks\.1\.to_\w+.*none of this name"):
    lora.merge_lora(other, adapter)
