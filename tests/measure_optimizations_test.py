"""What stands in the place of an optimisation: the same step, by more or by other operations."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref.models import resnet
from jaxpref.models.attention import Transformer2DModel
from jaxpref.models.resnet import ResnetBlock2D
from jaxpref.objectives import pairs, spo
from jaxpref.objectives.base import Rows
from jaxpref.training import step
from scripts.bench import measure_linearity
from scripts.bench import measure_optimizations as measured
from scripts.study import study_variants
from tests.cost_test import FROZEN, SGD, evaluations
from tests.stub_model import StubModel, pair_batch, stub_reward

PROMPTS = 4
OPTIONS = {"num_inference_steps": 12, "warmup_steps": 4, "pool_size": 2}


@pytest.fixture
def config(monkeypatch):
  config = study_variants.load_config(study_variants.BY_NAME["spo"])
  config.update(batch_size=PROMPTS, num_steps=1)
  config.spo.update(OPTIONS | {"threshold": 0.0})
  groups = spo.pool_groups(
    num_steps=12, warmup_steps=4, inner_steps=config.spo.inner_steps, pool_last_step=config.spo.pool_last_step
  )
  config.spo.minibatch = len(groups) * PROMPTS // 2  # two updates
  monkeypatch.setattr(measured, "load_config", lambda _: config)
  return config


def make_step(config, model):
  loss = pairs.pair_loss("sigmoid", beta=10.0)
  return step.make_step(spo.SPO(model, stub_reward(), loss, **config.spo.to_dict()), SGD, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("without", [measured.separate_passes, measured.one_candidate_at_a_time])
def test_iterations_of_spo_are_the_same(without, config):
  params = {"unet": FROZEN["unet"]}
  batch = {"input_ids": pair_batch(PROMPTS)["input_ids"]}
  new = []
  for context in (contextlib.nullcontext, without):
    state = step.initial_state(params, params, SGD.init(params))
    with context():
      state, metrics = jax.jit(make_step(config, StubModel()))(state, FROZEN, batch)
    new.append(state.params)
    assert metrics["valid_pairs"] == 1 and metrics["grad_norm"] > 0
  moved, apart = (optax.tree.norm(optax.tree.sub(new[0], other)) for other in (params, new[1]))
  assert apart < 1e-4 * moved  # they round differently


def test_what_iterations_of_spo_take(config):
  def count(context):
    with context():
      return evaluations(lambda model: make_step(config, model), batch, trips=2)

  batch = {"input_ids": pair_batch(PROMPTS)["input_ids"]}
  plain = count(contextlib.nullcontext)
  assert plain == study_variants.evaluations(config)
  # Of 7 of 8 pairs a pass of the loser's with guidance, of the reference and of the policy, and backward.
  assert count(measured.separate_passes) == plain + PROMPTS * 7 * 2 * 4


def test_pairs_below_the_threshold_are_counted_as_valid():
  rows = Rows((), jnp.zeros(6, jnp.int32), jnp.zeros(6, bool).at[0].set(True))
  assert step._shuffled(rows, jax.random.key(0)).valid == 1
  with measured.all_pairs():
    assert step._shuffled(rows, jax.random.key(0)).valid == 6


TRANSFORMER = Transformer2DModel(num_heads=2, depth=1, linear_projection=False, num_groups=2)
LAYERS = {
  "ResnetBlock2D": (ResnetBlock2D(8, num_groups=2, epsilon=1e-5), [(2, 4, 4, 8), (2, 6)]),
  "Transformer2DModel": (TRANSFORMER, [(2, 4, 4, 8), (2, 3, 6)]),
}


@pytest.mark.parametrize(
  ("without", "layers"),
  [
    (measured.gradients_of_jax, ["ResnetBlock2D"]),
    (measured.products_of_flax, ["Transformer2DModel"]),
    (measured.reshaped_groups, ["ResnetBlock2D", "Transformer2DModel"]),
    (measured.gradient_of_halves, ["Transformer2DModel"]),
  ],
)
def test_layers_are_the_same(without, layers):
  for layer, shapes in (LAYERS[name] for name in layers):
    inputs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    params = jax.jit(layer.init)(jax.random.key(9), *inputs)
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)

    def gradients(params, *inputs, layer=layer):
      return jax.grad(lambda *a: jnp.sum(jnp.sin(layer.apply(*a))), argnums=(0, 1))(params, *inputs)

    found, text = jax.jit(gradients)(params, *inputs), str(jax.make_jaxpr(gradients)(params, *inputs))
    with without():
      # Another function, as traces are kept by function.
      others = lambda *a, gradients=gradients: gradients(*a)  # noqa: E731
      other, instead = jax.jit(others)(params, *inputs), str(jax.make_jaxpr(others)(params, *inputs))
    assert instead != text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, other)


def test_half_precision_is_normalised_in_one_pass():
  """And in two as float32 is, to the rounding of the result."""
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8), jnp.bfloat16)

  def apply():
    layer = resnet.GroupNorm(2, 1e-5, dtype=jnp.float32)
    return layer.apply(layer.init(jax.random.key(1), x), x)

  one = apply()
  with measured.two_passes():
    two = apply()
  assert np.any(one != two)
  np.testing.assert_allclose(one, two, atol=1e-5)


def test_rows_have_ratios_of_paired_steps(monkeypatch):
  def prepare(config, without):
    used = without is contextlib.nullcontext
    costs = {"tflop": 1.0 if used else 1.5, "temporary_mib": 10.0, "grad_norm": 2.0 if used else norm, "updates": 1.0}
    return {"seconds": lambda: 2.0 if used else 3.0, "costs": costs}

  monkeypatch.setattr(measured, "prepare", prepare)
  norm, shared = 2.0, measured.OPTIMIZATIONS[0]
  row = measured.measure(shared, 3)
  assert row["ratio"] == 1.5 and row["quartiles"] == [1.5, 1.5]
  text = measured.table([json.loads(json.dumps(row))])
  assert "| spo | a pass for each | 2 | 3 | **1.50** (1.50 to 1.50) | 1, 1.5 | 10, 10 |" in text
  norm = 2.1
  with pytest.raises(RuntimeError, match=r"share a pass: the gradient's norm is 2\.1 without it, 2\.0 with it"):
    measured.measure(shared, 3)
  assert measured.measure(measured.OPTIMIZATIONS[1], 3)["with"]["seconds"] == [2.0] * 3


def test_transposed_activations_are_told_from_kernels():
  text = """
    %transpose.1 = bf16[320,3,3,320]{3,2,1,0} transpose(%convert.1), dimensions={3,0,1,2}
    ROOT %transpose.5 = bf16[8,320,64,64]{3,2,1,0} transpose(%x.1), dimensions={0,3,1,2}
    %copy.7 = f32[8,1280]{1,0} copy(%x.2)
    %copy-start = (f32[8]{0}, f32[8]{0}) copy-start(%x.3)
    %add.2 = f32[8,64]{1,0} add(%transpose.5, %x.4)
  """
  assert measured.transposed(text, of_batch=8) == ["bf16[8,320,64,64]", "f32[8,1280]"]


def test_fit_finds_a_straight_line_and_its_deviation():
  found = measure_linearity.fit([1, 2, 4], [13.0, 23.0, 43.0])
  assert (found["slope"], found["intercept"]) == pytest.approx((10.0, 3.0)) and found["deviation"] < 1e-12
  bent = measure_linearity.fit([1, 2, 3], [1.0, 4.0, 9.0])
  assert bent["deviation"] > 0.05
  row = {"name": "pairs", "recipe": "dpo", "values": [1, 2, 4], "flop": [1e9, 2e9, 4e9]}
  assert "| pairs | dpo | 1, 2, 4 | 1, 2, 4 | 3e-09 + 1e-08 n |" in measure_linearity.table([row | found])
