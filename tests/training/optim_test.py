"""Schedules, and clipping that acts on the whole gradient at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref.training import optim

DEFAULTS = {"b1": 0.0, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0}


def test_each_schedule_warms_up_and_decays_as_named():
  values = {}
  for name in optim.SCHEDULES:
    schedule = optim.learning_rate(name, 2.0, num_steps=10, warmup_steps=4)
    values[name] = [float(schedule(i)) for i in range(11)]
  for name, found in values.items():
    np.testing.assert_allclose(found[:5], [0.0, 0.5, 1.0, 1.5, 2.0], err_msg=name)
  np.testing.assert_allclose(values["constant"][5:], 2.0)
  np.testing.assert_allclose(values["linear"][5:], 2 - np.arange(1, 7) / 3, atol=1e-6)
  np.testing.assert_allclose(values["cosine"][5:], 1 + np.cos(np.pi * np.arange(1, 7) / 6), atol=1e-6)
  assert float(optim.learning_rate("cosine", 2.0, num_steps=10, warmup_steps=0)(0)) == 2.0


@pytest.mark.parametrize(
  ("name", "warmup_steps", "message"),
  [
    ("cosin", 0, "schedule='cosin' is unknown.*constant, linear, cosine"),
    ("linear", 10, r"warmup_steps=10 must be below the number of updates \(10\)"),
  ],
)
def test_schedules_that_cannot_be(name, warmup_steps, message):
  with pytest.raises(ValueError, match=message):
    optim.learning_rate(name, 1.0, num_steps=10, warmup_steps=warmup_steps)


def test_clipping_acts_on_the_global_norm_at_every_step():
  optimizer = optim.make_optimizer("sgd", optax.constant_schedule(1.0), **DEFAULTS | {"clip_norm": 0.5})
  params = {"a": jnp.zeros(3), "b": {"c": jnp.zeros(4)}}
  state = optimizer.init(params)
  for scale, norm in ((100.0, 0.5), (7.0, 0.5), (0.01, 0.01 * 7**0.5)):
    grads = jax.tree.map(lambda p, s=scale: jnp.full_like(p, s), params)
    updates, state = optimizer.update(grads, state, params)
    np.testing.assert_allclose(optax.tree.norm(updates), norm, rtol=1e-5)
    ratio = updates["a"][0] / updates["b"]["c"][0]  # one factor for all: the direction stays
    np.testing.assert_allclose(ratio, 1.0, rtol=1e-6)


def test_zero_switches_clipping_off():
  optimizer = optim.make_optimizer("sgd", optax.constant_schedule(1.0), **DEFAULTS)
  params = {"a": jnp.zeros(3)}
  updates, _ = optimizer.update({"a": jnp.full(3, 50.0)}, optimizer.init(params), params)
  np.testing.assert_array_equal(updates["a"], -50.0)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_descends(name):
  optimizer = optim.make_optimizer(
    name, optax.constant_schedule(0.05), **DEFAULTS | {"clip_norm": 1.0, "weight_decay": 0.01}
  )
  params = {"a": jnp.linspace(-1.0, 1.0, 6)}
  start, state = params["a"], optimizer.init(params)
  for _ in range(5):
    updates, state = optimizer.update(params, state, params)  # the gradient of |a|^2 / 2
    params = optax.apply_updates(params, updates)
  assert float(jnp.sum(params["a"] ** 2)) < float(jnp.sum(start**2))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_weight_decay_is_decoupled(name):
  """With a zero gradient a parameter shrinks by learning rate times decay, at every rate of a schedule."""
  optimizer = optim.make_optimizer(
    name, optax.piecewise_constant_schedule(0.1, {1: 0.5}), **DEFAULTS | {"b1": 0.9, "weight_decay": 0.2}
  )
  params = {"a": jnp.ones(2)}
  state = optimizer.init(params)
  for expected in (-0.02, -0.01):
    updates, state = optimizer.update({"a": jnp.zeros(2)}, state, params)
    np.testing.assert_allclose(updates["a"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_without_weight_decay_it_is_optax_own(name):
  ours = optim.make_optimizer(name, optax.linear_schedule(0.1, 0.0, 4), **DEFAULTS | {"b1": 0.9})
  schedule = optax.linear_schedule(0.1, 0.0, 4)
  adafactor = lambda: optax.adafactor(schedule, multiply_by_parameter_scale=False)
  theirs = adafactor() if name == "adafactor" else optax.sgd(schedule, momentum=0.9)
  params = {"a": jnp.linspace(-1.0, 1.0, 256 * 256).reshape(256, 256)}  # large enough to be factored
  states = ours.init(params), theirs.init(params)
  for _ in range(3):
    (found, first), (expected, second) = (o.update(params, states[i], params) for i, o in enumerate((ours, theirs)))
    states = first, second
    np.testing.assert_array_equal(found["a"], expected["a"])


def test_unknown_optimizer_is_named():
  with pytest.raises(ValueError, match="optimizer.name='adamx'.*adamw, adafactor, lion, sgd"):
    optim.make_optimizer("adamx", optax.constant_schedule(0.1), **DEFAULTS)
