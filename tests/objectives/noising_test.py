"""What the methods share: the divergence of a moving reference, and the conditioning on sizes."""

import functools

import jax
import numpy as np

from jaxpref.objectives import kto, noising, pairs, preference_model, pretraining
from jaxpref.objectives.base import Weights
from tests.objectives.stubs import (
  FROZEN,
  KEY,
  MODEL,
  NEAR,
  OTHER,
  SAME,
  SIGMOID,
  SQUARE,
  compiled_loss,
  divergence_of,
  image_batch,
  loss_of,
  sized,
  sized_batch,
)
from tests.stub_model import LATENT, StubScorer, draw, pair_batch

DPO = pairs.DiffusionDPO(MODEL, SIGMOID)
DIVERGENCE = jax.jit(divergence_of(DPO))


def test_divergence_is_zero_at_the_start_and_grows_with_damage():
  batch = pair_batch(12)
  assert abs(float(DIVERGENCE(SAME, FROZEN, batch, KEY))) < 1e-6
  found = []
  for scale in (2.0, 5.0):
    damaged = jax.tree.map(lambda k, s=scale: s * k, SAME)
    found.append(float(DIVERGENCE(damaged, FROZEN, batch, KEY)))
  assert 0 < found[0] < found[1]


def test_ties_have_no_preferred_image():
  """Nor has a batch of images that nobody likes; D of none is no number, which closes the gate."""
  batch = pair_batch(6)
  tied = np.array([True, False] * 3)
  with_ties = batch | {"label_0": np.where(tied, 0.5, batch["label_0"]).astype(np.float32)}
  changed = {k: v.copy() for k, v in with_ties.items()}
  for k in ("pixels_0", "pixels_1"):
    changed[k][tied] = 0
  one, other = (float(DIVERGENCE(OTHER, FROZEN, b, KEY)) for b in (with_ties, changed))
  assert one == other not in (0, float(DIVERGENCE(OTHER, FROZEN, batch, KEY)))
  assert np.isnan(DIVERGENCE(OTHER, FROZEN, batch | {"label_0": np.full(6, 0.5, np.float32)}, KEY))
  of_images = jax.jit(divergence_of(kto.DiffusionKTO(MODEL, beta=10.0)))
  batch = image_batch(6) | {"label": np.float32([0, 1, 0, 1, 0, 0])}
  changed = batch["pixels"].copy()
  changed[batch["label"] == 0] = 0
  assert of_images(OTHER, FROZEN, batch, KEY) == of_images(OTHER, FROZEN, batch | {"pixels": changed}, KEY)
  assert np.isnan(of_images(OTHER, FROZEN, batch | {"label": np.zeros(6, np.float32)}, KEY))


def test_divergence_looks_at_few_preferred_images_only():
  batch = pair_batch(12)
  first = batch["label_0"] >= 0.5
  changed = {k: v.copy() for k, v in batch.items()}
  changed["pixels_1"][first] = 0
  changed["pixels_0"][~first] = 0
  for k in ("pixels_0", "pixels_1"):
    changed[k][8:] = 0  # beyond MAX_SAMPLES
  one, other = (float(DIVERGENCE(OTHER, FROZEN, b, KEY)) for b in (batch, changed))
  assert one == other != 0


# ---------------------------------------------------------------------------------------------
# What SDXL is conditioned on: the size and crop of each image


def spm_of(model):
  return preference_model.PreferenceModel(model, StubScorer(), guidance_scale=5.0)


def test_without_sizes_the_model_keeps_its_own():
  batch = sized_batch(6) | {k: np.tile(SQUARE, (6, 1)) for k in ("sizes_0", "sizes_1")}
  bare = {k: v for k, v in batch.items() if not k.startswith("sizes")}
  for make in (lambda m: pairs.DiffusionDPO(m, SIGMOID), spm_of):
    build = lambda m, make=make: loss_of(make(m))
    with_sizes, without = (sized(build, FROZEN, FROZEN, FROZEN, b, KEY) for b in (batch, bare))
    for a, b in zip(with_sizes[1], without[1], strict=True):
      np.testing.assert_array_equal(a[2], b[2])
      np.testing.assert_array_equal(b[2], np.tile(SQUARE, (len(b[2]), 1)))
    np.testing.assert_allclose(with_sizes[0][0], without[0][0], rtol=1e-6)


def test_the_divergence_is_conditioned_on_the_preferred_images():
  batch = sized_batch(12)
  _, calls, encoded = sized(lambda m: divergence_of(pairs.DiffusionDPO(m, SIGMOID)), OTHER, FROZEN, batch, KEY)
  assert encoded == [8]
  first = batch["label_0"][:, None] >= 0.5
  preferred = np.where(first, batch["sizes_0"], batch["sizes_1"])[:8]
  for call in calls:
    np.testing.assert_array_equal(call[2], preferred)
  # SPO's samples are the model's own.
  batch = {"latents": draw(0, 4, *LATENT), "input_ids": batch["input_ids"][:4]}
  _, calls, _ = sized(
    lambda m: lambda *args: noising.divergence_of_samples(m, Weights.of({}, *args[:2], moves=True), *args[2:]),
    OTHER,
    FROZEN,
    batch,
    KEY,
  )
  for call in calls:
    np.testing.assert_array_equal(call[2], np.tile(SQUARE, (4, 1)))


def test_a_model_without_size_conditioning_is_not_changed_by_sizes():
  """Stable Diffusion 1.x: bit for bit."""
  batch = sized_batch(9)
  bare = {k: v for k, v in batch.items() if not k.startswith("sizes")}
  equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  dpo = compiled_loss(DPO)
  equal(*(dpo(NEAR, SAME, FROZEN, b, KEY) for b in (batch, bare)))
  equal(*(DIVERGENCE(OTHER, FROZEN, b, KEY) for b in (batch, bare)))
  spm = compiled_loss(spm_of(MODEL))
  equal(*(spm({"spm": FROZEN["spm"]}, {}, FROZEN, b, KEY) for b in (batch, bare)))
  images = {"pixels": batch["pixels_0"], "input_ids": batch["input_ids"]}
  denoise = compiled_loss(pretraining.Denoising(MODEL))
  equal(*(denoise(SAME, {}, FROZEN, b, KEY) for b in (images | {"sizes": batch["sizes_0"]}, images)))
