"""The objectives that made the shipped models, with stubs for networks, and what the judge is not taught."""

import json
import types

import jax.numpy as jnp
import numpy as np

from jaxpref import config
from jaxpref.data import emoji
from jaxpref.files import loading
from jaxpref.objectives import pretraining
from jaxpref.training import build
from tests.objectives.stubs import (
  ABARS,
  FROZEN,
  KEY,
  MODEL,
  SAME,
  SQUARE,
  compiled_loss,
  latents_np,
  loss_of,
  recorded,
  sized,
  sizes,
)
from tests.stub_model import pair_batch


def log_softmax(x):
  return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def test_the_judge_is_not_taught_the_styles_it_is_measured_on():
  """Of the emoji outside the training split, whose captions it knows; as many as its metrics say."""
  c = config.default()
  c.objective = "classify"
  c.data.update(split="all", subset="all")
  c.update(batch_size=256)
  experiment = build.build(c)
  core, training = emoji.num_classes("core"), {e.class_id for e in emoji.load_index("all", "train")}
  batches, seen = experiment.batches(), {}
  try:
    for _ in range(emoji.num_classes("all") * len(emoji.STYLES) // 256):
      batch = next(batches)
      for class_id, style in zip(batch["class_id"].tolist(), batch["style"].tolist(), strict=True):
        seen.setdefault(class_id, set()).add(style)
  finally:
    batches.close()
  assert all(styles == {pretraining.NOT_TAUGHT} for c, styles in seen.items() if c not in training)
  assert all(pretraining.NOT_TAUGHT not in styles for c, styles in seen.items() if c in training)
  assert set(seen) == training | set(range(core))  # others have nothing to teach
  metrics = json.loads((loading.folder_of("tiny-judge") / "metrics.json").read_text())
  assert metrics["pictures"] == len(set(range(core)) - training) * len(emoji.STYLES)


def test_augmented_images_keep_a_white_background():
  white = pretraining.augment(jnp.ones((4, 16, 16, 3)), KEY)
  assert abs(float(white.mean()) - 1.0) < 0.02 and float(white.std()) < 0.2  # but for the noise
  square = pretraining.augment(jnp.ones((64, 16, 16, 3)).at[:, 4:12, 4:12].set(-1.0), KEY)
  assert float(square[:, 0, 0].mean()) > 0.9 and float(square[:, 8, 8].mean()) < -0.6
  assert len({float(x) for x in square.sum((1, 2, 3))}) == 64  # each its own


def test_a_share_of_the_images_is_left_as_it_is():
  images = np.random.default_rng(0).uniform(-1, 1, (400, 8, 8, 3)).astype(np.float32)
  changed = np.abs(np.asarray(pretraining.augment(images, KEY, clean=0.25)) - images).max((1, 2, 3)) > 0
  assert 0.68 < changed.mean() < 0.82
  assert (np.abs(np.asarray(pretraining.augment(images, KEY)) - images).max((1, 2, 3)) > 0).all()


def test_classify_is_the_sum_of_the_cross_entropies_that_are_taught():
  styles, classes = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
  judge = types.SimpleNamespace(apply=lambda variables, images: (jnp.asarray(styles), jnp.asarray(classes)))
  batch = {"pixels": np.zeros((5, 8, 8, 3), np.uint8), "style": np.int32([0, 1, 2, 3, 0])}
  batch["class_id"] = np.int32([3, 3, 1, 0, 2])
  loss, count, found = loss_of(pretraining.Classification(judge))({"judge": {}}, {}, {}, batch, KEY)
  rows = np.arange(5)
  of_style, of_class = -log_softmax(styles)[rows, batch["style"]], -log_softmax(classes)[rows, batch["class_id"]]
  np.testing.assert_allclose(loss, of_style.sum() + of_class.sum(), rtol=1e-5)
  assert count == 5
  assert found["style_accuracy"][0] == (styles.argmax(1) == batch["style"]).sum()
  assert found["class_accuracy"][0] == (classes.argmax(1) == batch["class_id"]).sum()

  taught, known = np.array([0, 1, 1, 1, 0]), np.array([1, 1, 0, 1, 1])
  batch["style"] = np.where(taught, batch["style"], pretraining.NOT_TAUGHT).astype(np.int32)
  batch["class_id"] = np.where(known, batch["class_id"], 1500).astype(np.int32)  # whose caption is not taught
  loss, count, found = loss_of(pretraining.Classification(judge))({"judge": {}}, {}, {}, batch, KEY)
  np.testing.assert_allclose(loss, (taught * of_style + known * of_class).sum(), rtol=1e-5)
  assert count == 5 and found["style_accuracy"][1] == 3 and found["class_accuracy"][1] == 4


def test_images_of_one_caption_are_positives_of_each_others_text():
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  images, texts = unit(np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32))
  config = types.SimpleNamespace(vision_config=types.SimpleNamespace(image_size=8))
  clip = types.SimpleNamespace(config=config, apply=lambda *_: (jnp.asarray(images), jnp.asarray(texts), jnp.log(5.0)))
  batch = {"pixels": np.zeros((4, 8, 8, 3), np.uint8), "input_ids": np.zeros((4, 3), np.int32)}
  batch["class_id"] = np.int32([7, 2, 7, 1])
  loss, count, found = loss_of(pretraining.Contrastive(clip))({"clip": {}}, {}, {}, batch, KEY)
  same = batch["class_id"][:, None] == batch["class_id"]
  logits = 5.0 * images @ texts.T
  rows = [-(log_softmax(x) * same).sum(1) / same.sum(1) for x in (logits, logits.T)]
  np.testing.assert_allclose(loss, 0.5 * (rows[0] + rows[1]).sum(), rtol=1e-4)
  assert count == 4 and found["accuracy"][0] == same[np.arange(4), logits.argmax(1)].sum()


# ---------------------------------------------------------------------------------------------
# Denoising


def test_denoise_is_the_mean_squared_error():
  batch = pair_batch(5)
  images = {"pixels": batch["pixels_0"], "input_ids": batch["input_ids"]}
  (loss, count, found), calls = recorded(pretraining.Denoising, SAME, {}, FROZEN, images, KEY)
  x, t, _, pred = calls[0]
  alpha, sigma = (np.sqrt(v)[t, None, None, None] for v in (ABARS, 1 - ABARS))
  noise = (x - alpha * latents_np(batch["pixels_0"])) / sigma
  errors = np.mean((pred - noise) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(loss, errors.sum(), rtol=1e-3)
  assert count == 5
  bins = np.bincount(t // 100, minlength=10)
  np.testing.assert_array_equal(found["loss_bin"][1], bins)
  # A text encoder that is trained, too.
  params = SAME | {"text_encoder": FROZEN["text_encoder"]}
  frozen = {k: v for k, v in FROZEN.items() if k not in params}
  (again, _), grads = compiled_loss(pretraining.Denoising(MODEL))(params, {}, frozen, images, KEY)
  np.testing.assert_allclose(again, loss, rtol=1e-5)
  used = np.unique(images["input_ids"])
  moved = np.abs(grads["text_encoder"]["embedding"]).max(axis=1) > 0
  assert moved[used].all() and moved.sum() == len(used)


def test_denoising_is_conditioned_on_each_image():
  batch = pair_batch(5)
  images = {"pixels": batch["pixels_0"], "input_ids": batch["input_ids"], "sizes": sizes(5)}
  (loss, _, _), ((x, t, time_ids, pred),), encoded = sized(
    lambda m: loss_of(pretraining.Denoising(m)), SAME, {}, FROZEN, images, KEY
  )
  assert encoded == [5]
  np.testing.assert_array_equal(time_ids, images["sizes"])
  alpha, sigma = (np.sqrt(v)[t, None, None, None] for v in (ABARS, 1 - ABARS))
  noise = (x - alpha * latents_np(images["pixels"])) / sigma
  np.testing.assert_allclose(loss, np.mean((pred - noise) ** 2, axis=(1, 2, 3)).sum(), rtol=1e-3)
  del images["sizes"]
  _, ((_, _, time_ids, _),), _ = sized(lambda m: loss_of(pretraining.Denoising(m)), SAME, {}, FROZEN, images, KEY)
  np.testing.assert_array_equal(time_ids, np.tile(SQUARE, (5, 1)))
