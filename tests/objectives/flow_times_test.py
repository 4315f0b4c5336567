"""Methods on rectified flow: their times and weights are the process's own, and the errors those of velocities."""

import jax
import numpy as np
import pytest

from jaxpref.diffusion import FlowSchedule, RectifiedFlow, TrainingTimes
from jaxpref.objectives import kto, noising, pairs, pretraining
from jaxpref.objectives.base import Weights, named_key
from tests.objectives.stubs import FROZEN, KEY, OTHER, image_batch
from tests.stub_model import StubModel, pair_batch

SHIFT, BETA = 3.0, 3.0


def model_of(**training):
  return StubModel(process=RectifiedFlow(FlowSchedule(shift=SHIFT), training=TrainingTimes(**training)))


def cosmap(s):
  return 2 / (np.pi * (1 - 2 * s + 2 * s**2))


WEIGHTS = {"none": np.ones_like, "sigma_sqrt": lambda s: s**-2.0, "cosmap": cosmap}


def by_hand(model, params, x0, t, noise, input_ids):
  """Errors of the velocity, means over a latent."""
  s = np.float64(t)[:, None, None, None] / 1000
  x_t = ((1 - s) * x0 + s * noise).astype(np.float32)
  v = np.asarray(model.predict(params, x_t, t, model.encode_text(params, input_ids)))
  return np.mean((v - (noise - x0)) ** 2, axis=(1, 2, 3))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_loss_of_dpo(weight):
  model, batch = model_of(density="logit_normal", logit_mean=0.3, weight=weight), pair_batch(9)
  objective = pairs.DiffusionDPO(model, pairs.denoised_loss("sigmoid", beta=BETA))
  policy, reference = {**FROZEN, **OTHER}, dict(FROZEN)
  w = Weights(policy, reference, reference)
  total, count, metrics = jax.jit(lambda key: objective.loss(w, batch, key))(KEY)

  t = np.asarray(objective.timesteps(KEY, 9))
  np.testing.assert_array_equal(t, model.process.sample_times(named_key(KEY, "t"), 9))
  first = batch["label_0"] >= 0.5
  images = [np.where(first[:, None, None, None], batch[f"pixels_{a}"], batch[f"pixels_{b}"]) for a, b in ("01", "10")]
  x0 = [np.asarray(model.encode_images(reference, x, None)) for x in images]
  noise = np.asarray(jax.random.normal(named_key(KEY, "noise"), x0[0].shape))
  differences = [
    by_hand(model, policy, x, t, noise, batch["input_ids"]) - by_hand(model, reference, x, t, noise, batch["input_ids"])
    for x in x0
  ]
  margin = -0.5 * WEIGHTS[weight](t / 1000) * (differences[0] - differences[1])
  losses = np.log1p(np.exp(-BETA * margin))
  counted = batch["label_0"] != 0.5
  np.testing.assert_allclose(total, losses[counted].sum(), rtol=1e-4)
  assert count == counted.sum() and metrics["loss_bin"][1].sum() == count


def test_timestep_aware_dpo_scales_the_margin_by_the_flows_lambda():
  model, batch = model_of(), pair_batch(9)
  w = Weights({**FROZEN, **OTHER}, dict(FROZEN), dict(FROZEN))
  seen = []

  def keep(pair):
    seen.append(pair.weight)
    return pair.err_w

  objective = pairs.DiffusionDPO(model, keep, gamma=0.8, num_bins=20, reward_scale=True)
  objective.loss(w, batch, KEY)
  t = np.asarray(objective.timesteps(KEY, 9))
  np.testing.assert_array_equal(t, model.process.sample_times(named_key(KEY, "t"), 9, gamma=0.8))
  known = np.abs(2 * batch["label_0"] - 1)  # 0 for ties
  np.testing.assert_allclose(seen[0], known * np.asarray(model.process.reward_scale(t)), rtol=1e-6)


@pytest.mark.parametrize("method", ["denoise", "kto", "divergence"])
def test_other_methods_weigh_their_errors(method):
  """With sigma_sqrt at one level for all, everything is as without, times the weight."""
  batch, found = image_batch(6) | {"label": np.float32([1, 0] * 3)}, {}
  for weight in ("none", "sigma_sqrt"):
    model = model_of(weight=weight)
    process = model.process
    at_half = type(
      "AtHalf", (RectifiedFlow,), {"sample_times": lambda self, key, n, **_: np.full(n, 500.0, np.float32)}
    )
    model = StubModel(process=at_half(process.schedule, training=process.training))
    w = Weights({**FROZEN, **OTHER}, dict(FROZEN), dict(FROZEN))
    if method == "denoise":
      found[weight] = pretraining.Denoising(model).loss(w, batch, KEY)[0]
    elif method == "kto":
      found[weight] = kto.DiffusionKTO(model, beta=1.0).loss(w, batch, KEY)[2]["reward_liked"][0]
    else:
      moved = w._replace(reference={**FROZEN, **OTHER})
      found[weight] = kto.DiffusionKTO(model, beta=1.0).divergence(moved, batch, KEY)
  assert found["none"] != 0
  np.testing.assert_allclose(found["sigma_sqrt"], 4 * found["none"], rtol=1e-4)


def test_a_process_without_weights_changes_nothing():
  """Its errors are not even multiplied by 1: what is compiled stays the same."""
  target = np.ones((2, 4, 4, 2), np.float32)
  for model in (StubModel(), model_of()):
    traced = jax.make_jaxpr(lambda p, m=model: noising.error(m, p, target, np.float32([1, 2])))(0 * target)
    plain = jax.make_jaxpr(lambda p: noising.diffusion.squared_error(p, target))(0 * target)
    assert str(traced) == str(plain)
