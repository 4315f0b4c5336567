"""Training a step-aware preference model, against numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models.preference import preprocess
from jaxpref.objectives import preference_model
from tests import decisions
from tests.objectives.stubs import (
  ABARS,
  FROZEN,
  KEY,
  MODEL,
  latents_np,
  log_sigmoid,
  loss_of,
  recorded,
  sized,
  sized_batch,
)
from tests.stub_model import StubScorer, pair_batch

SCORER = StubScorer()


def spm_of(model, decode_size=0):
  return preference_model.PreferenceModel(model, SCORER, guidance_scale=5.0, decode_size=decode_size)


@jax.jit
def spm_loss(params, batch):
  def total(params):
    loss, count, found = loss_of(spm_of(MODEL))({"spm": params}, {}, FROZEN, batch, KEY)
    return loss, (count, found)

  return jax.value_and_grad(total, has_aux=True)(params)


@pytest.mark.parametrize("decode_size", [0, 4])
def test_spm_equals_numpy(decode_size):
  """Two-way cross-entropy of the scores of guided predictions, with a weight for each pair."""
  size, of = 7, functools.partial(spm_of, decode_size=decode_size)
  batch, key = pair_batch(size), jax.random.key(10)  # no pair is decided by rounding
  (loss, count, found), (call,) = recorded(of, FROZEN, {}, FROZEN, batch, key)
  # One guided prediction: unconditional rows, then those with a prompt.
  x, t, _, pred = (v.reshape(2, 2 * size, *v.shape[1:]) for v in call)
  np.testing.assert_array_equal(t[0, :size], t[0, size:])
  eps = pred[0] + 5.0 * (pred[1] - pred[0])
  alpha, sigma = (np.sqrt(v)[t[0], None, None, None] for v in (ABARS, 1 - ABARS))
  x0 = (x[0] - sigma * eps) / alpha
  images = np.clip(np.asarray(MODEL.decode(FROZEN, jnp.float32(x0), size=decode_size)), -1, 1)
  noise = x[0] - alpha * latents_np(np.concatenate([batch["pixels_0"], batch["pixels_1"]]))
  np.testing.assert_allclose(noise[:size], noise[size:], atol=1e-5)

  spm = jax.tree.map(np.asarray, FROZEN["spm"])
  pixels = np.asarray(preprocess(jnp.asarray(images), 8)).reshape(2 * size, -1)
  embeds = np.sin(pixels @ spm["image"] + t[0][:, None] / 500.0 * spm["time"])
  text = spm["text"][batch["input_ids"]].mean(1)
  score_0, score_1 = np.split(3.0 * np.sum(embeds * np.concatenate([text, text]), axis=1), 2)
  z, label = score_0 - score_1, batch["label_0"]
  values = -label * log_sigmoid(z) - (1 - label) * log_sigmoid(-z)
  values[label == 0.5] -= math.log(2)
  weights = 1 / batch["num_example_per_prompt"]
  np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)
  np.testing.assert_allclose(loss, (values * weights).sum(), rtol=5e-3)
  chosen = np.linspace(0.1, 2.0, size).astype(np.float32)  # what a selection of pairs says instead
  (loss, count, _), _ = recorded(of, FROZEN, {}, FROZEN, batch | {"weight": chosen}, key)
  np.testing.assert_allclose(count, chosen.sum(), rtol=1e-6)
  np.testing.assert_allclose(loss, (values * chosen).sum(), rtol=5e-3)
  decided = label != 0.5
  right = (decisions.above(z[decided], margin=0.05) == (label[decided] > 0.5)) * weights[decided]
  np.testing.assert_allclose(
    found["accuracy"][0] / found["accuracy"][1], right.sum() / weights[decided].sum(), rtol=1e-5
  )


def test_an_ordinary_preference_model_sees_the_images_alone_at_time_0():
  """What the VAE gives back of them; the denoiser is not called."""
  batch = pair_batch(7) | {"label_0": np.float32([1, 0, 1, 0, 1, 0, 1])}
  ordinary = lambda model: preference_model.PreferenceModel(model, StubScorer(), guidance_scale=5.0, step_aware=False)
  (loss, count, found), calls = recorded(ordinary, FROZEN, {}, FROZEN, batch, KEY)
  assert not calls
  spm = jax.tree.map(np.asarray, FROZEN["spm"])
  latents = latents_np(np.concatenate([batch["pixels_0"], batch["pixels_1"]]))
  images = np.clip(np.asarray(MODEL.decode(FROZEN, jnp.float32(latents))), -1, 1)
  embeds = np.sin(np.asarray(preprocess(jnp.asarray(images), 8)).reshape(14, -1) @ spm["image"])
  text = spm["text"][batch["input_ids"]].mean(1)
  score_0, score_1 = np.split(3.0 * np.sum(embeds * np.concatenate([text, text]), axis=1), 2)
  z = np.where(batch["label_0"] == 1, score_0 - score_1, score_1 - score_0)
  np.testing.assert_allclose(loss, (-log_sigmoid(z) / batch["num_example_per_prompt"]).sum(), rtol=1e-4)
  assert found["accuracy_bin"][1][0] == pytest.approx(count)  # all in the first bin of time


def test_spm_of_equal_images():
  """Equal scores: nothing to pay for a tie, log 2 for a preference."""
  batch = pair_batch(3)
  batch["pixels_1"] = batch["pixels_0"]
  batch["num_example_per_prompt"][:] = 1
  for label, expected in ((0.5, 0.0), (1.0, math.log(2)), (0.0, math.log(2))):
    batch["label_0"][:] = label
    (loss, (count, _)), _ = spm_loss(FROZEN["spm"], batch)
    np.testing.assert_allclose(loss / count, expected, atol=1e-6)


def test_spm_example_weights_scale_gradients_and_ties_pull_scores_together():
  batch = pair_batch(3)
  batch["label_0"][:] = 0.5
  params, grads = FROZEN["spm"], []
  for examples in (4, 1):
    # A new array: JAX may still read the old one.
    batch = {**batch, "num_example_per_prompt": np.full_like(batch["num_example_per_prompt"], examples)}
    grads.append(spm_loss(params, batch)[1])
  for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
    np.testing.assert_allclose(4 * a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
  losses = []
  for _ in range(10):
    (loss, _), step = spm_loss(params, batch)
    losses.append(float(loss))
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, step)
  assert 0 <= losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0, 0.0])
def test_the_preference_model_sees_predictions_at_each_images_size(guidance_scale):
  """Guidance starts from the unconditional prediction at the same size, as in diffusers' pipeline."""
  batch = sized_batch(7)
  _, (call,), encoded = sized(
    lambda m: loss_of(preference_model.PreferenceModel(m, SCORER, guidance_scale=guidance_scale)),
    FROZEN,
    {},
    FROZEN,
    batch,
    KEY,
  )
  assert encoded == [7, 1]  # the prompts, and the empty one
  rows = np.concatenate([batch["sizes_0"], batch["sizes_1"]])
  np.testing.assert_array_equal(call[2], rows if guidance_scale <= 1.0 else np.concatenate([rows, rows]))
