"""Training a latent reward model, against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.objectives.base import named_key
from jaxpref.objectives.latent_reward import LatentPreference
from tests import decisions
from tests.objectives.stubs import ABARS, FROZEN, KEY, MODEL, latents_np, log_sigmoid, loss_of
from tests.stub_model import LATENT, StubLatentScorer, latent_params, pair_batch

PARAMS = latent_params()
LRM = LatentPreference(MODEL, StubLatentScorer(), first_time=1, last_time=951, time_step=50)


@jax.jit
def lrm_loss(params, batch, key):
  def total(params):
    loss, count, found = loss_of(LRM)({"lrm": params}, {}, FROZEN, batch, key)
    return loss, (count, found)

  return jax.value_and_grad(total, has_aux=True)(params)


def test_times_are_those_of_a_sampler():
  t = np.asarray(LRM.timesteps(KEY, 4000))
  assert set(t) == set(range(1, 952, 50))
  counts = np.unique(t, return_counts=True)[1]
  assert np.abs(counts - 200).max() < 4 * math.sqrt(200)
  every = LatentPreference(MODEL, StubLatentScorer(), first_time=0, last_time=2, time_step=1)
  assert set(np.asarray(every.timesteps(KEY, 100))) == {0, 1, 2}


def scores_np(x_t, t, input_ids):
  p = jax.tree.map(np.float64, PARAMS)
  text, empty = p["text"][input_ids], p["text"][np.asarray(FROZEN["empty_ids"])]
  guided = (2.0 * (text - empty) + empty).mean(axis=1)
  embeds = np.sin(x_t.reshape(len(x_t), -1) @ p["latents"] + t[:, None] / 500.0 * p["time"] + guided)
  return 3.0 * np.sum(embeds * text.mean(axis=1), axis=1)


def test_the_loss_equals_numpy():
  """Two-way cross-entropy of the scores of noisy latents, each with noise of its own, and a weight for each pair."""
  size, key = 7, jax.random.key(10)
  batch = pair_batch(size)
  (loss, (count, found)), _ = lrm_loss(PARAMS, batch, key)
  t = np.asarray(LRM.timesteps(key, size))
  x0 = latents_np(np.concatenate([batch["pixels_0"], batch["pixels_1"]]))
  noise = np.asarray(jax.random.normal(named_key(key, "noise"), (2 * size, *LATENT)))
  t2 = np.concatenate([t, t])
  abar = ABARS[t2][:, None, None, None]
  x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
  score_0, score_1 = np.split(scores_np(x_t, t2, np.concatenate([batch["input_ids"]] * 2)), 2)
  z, label = score_0 - score_1, batch["label_0"]
  values = -label * log_sigmoid(z) - (1 - label) * log_sigmoid(-z)
  values[label == 0.5] -= math.log(2)
  weights = 1 / batch["num_example_per_prompt"]
  np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)
  np.testing.assert_allclose(loss, (values * weights).sum(), rtol=1e-4)
  decided = label != 0.5
  right = (decisions.above(z[decided], margin=0.01) == (label[decided] > 0.5)) * weights[decided]
  np.testing.assert_allclose(
    found["accuracy"][0] / found["accuracy"][1], right.sum() / weights[decided].sum(), rtol=1e-5
  )


def test_precomputed_latents_are_all_that_it_needs():
  """Moments in the place of pixels, which the stub's encoder has no use for, give the same loss without a VAE."""

  class Stored(type(MODEL)):
    def draw_latents(self, mean, logvar, key):
      return mean

    def encode_images(self, weights, images, key):
      raise AssertionError("the VAE is called")

  batch = pair_batch(5)
  expected = lrm_loss(PARAMS, batch, KEY)[0][0]
  moments = {}
  for i in (0, 1):
    mean = latents_np(batch.pop(f"pixels_{i}"))
    moments[f"moments_{i}"] = np.concatenate([mean, np.zeros_like(mean)], axis=-1)
  stored = LatentPreference(Stored(), StubLatentScorer(), first_time=1, last_time=951, time_step=50)
  frozen = {"empty_ids": FROZEN["empty_ids"]}
  found = jax.jit(loss_of(stored))({"lrm": PARAMS}, {}, frozen, batch | moments, KEY)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("label", [1.0, 0.5])
def test_it_learns_preferences_and_pulls_ties_together(label):
  batch = pair_batch(6) | {"label_0": np.full(6, label, np.float32)}
  params, losses = PARAMS, []
  for _ in range(15):
    (loss, (count, _)), grads = lrm_loss(params, batch, KEY)
    losses.append(float(loss / count))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    params = jax.tree.map(lambda p, g: p - 3e-3 * g, params, grads)
  assert losses[-1] < 0.8 * losses[0] and losses[-1] >= 0
