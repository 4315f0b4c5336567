"""Diffusion-KTO: against numpy, at initialisation, and the divergence of its reference."""

import jax
import numpy as np
import optax

from jaxpref.objectives import kto
from tests.objectives.stubs import (
  FROZEN,
  KEY,
  MODEL,
  NEAR,
  OTHER,
  SAME,
  compiled_loss,
  divergence_of,
  image_batch,
  latents_np,
  recorded,
)


def test_kto_is_half_where_policy_and_reference_agree_and_pulls_apart():
  """lam / 2 for each image at first; a step along the gradient raises the liked ones' reward over the others'."""
  objective = compiled_loss(kto.DiffusionKTO(MODEL, beta=10.0, weight_desirable=2.0, weight_undesirable=0.5))
  batch = image_batch(9)
  (loss, (count, found)), grads = objective(SAME, SAME, FROZEN, batch, KEY)
  assert count == 9 and found["reward_liked"][1] == 3 and found["reward_disliked"][1] == 6
  np.testing.assert_allclose(loss, 3 * 2.0 / 2 + 6 * 0.5 / 2, rtol=1e-5)
  moved = jax.tree.map(lambda p, g: p - 0.01 * g / optax.tree.norm(grads), SAME, grads)
  (after, (_, found)), _ = objective(moved, SAME, FROZEN, batch, KEY)
  assert after < loss
  assert found["reward_liked"][0] / 3 > found["reward_disliked"][0] / 6


def test_kto_equals_numpy_image_by_image():
  batch, beta = image_batch(9), 10.0
  (loss, count, found), calls = recorded(
    lambda model: kto.DiffusionKTO(model, beta=beta), NEAR, SAME, FROZEN, batch, KEY
  )
  (x, t, cond, pred), (ref_x, ref_t, _, ref_pred) = calls
  np.testing.assert_array_equal(x, ref_x)
  np.testing.assert_array_equal(t, ref_t)
  np.testing.assert_array_equal(cond, FROZEN["text_encoder"]["embedding"][batch["input_ids"]])
  abar = np.asarray(MODEL.process.schedule.alphas_cumprod)[t][:, None, None, None]
  noise = (x - np.sqrt(abar) * latents_np(batch["pixels"])) / np.sqrt(1 - abar)
  err, ref_err = (((p - noise) ** 2).mean((1, 2, 3)) for p in (pred, ref_pred))
  gain = ref_err - err
  z = beta * (gain - max(gain.mean(), 0.0))
  sign = np.where(batch["label"] == 1, 1.0, -1.0)
  np.testing.assert_allclose(loss, (1 - 1 / (1 + np.exp(-sign * z))).sum(), rtol=1e-4)
  assert count == 9


def test_the_divergence_of_kto_looks_at_liked_images_first():
  """At most at eight."""
  batch = image_batch(12) | {"label": np.float32([0] * 4 + [1] * 8)}
  divergence = jax.jit(divergence_of(kto.DiffusionKTO(MODEL, beta=10.0)))
  found = []
  for changed in (slice(0, 0), slice(0, 4), slice(4, 12)):
    pixels = batch["pixels"].copy()
    pixels[changed] = 0
    found.append(float(divergence(OTHER, FROZEN, batch | {"pixels": pixels}, KEY)))
  assert found[0] == found[1] != found[2]
