"""The objectives that made the shipped models, with stubs for networks, and what the judge is not taught."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import build, config, loading, pretraining
from jaxpref.data import emoji

KEY = jax.random.key(0)


def log_softmax(x):
  return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def test_the_judge_is_not_taught_the_styles_it_is_measured_on():
  """Of the emoji outside the training split, whose captions it knows; as many as its metrics say."""
  c = config.default()
  c.objective = "classify"
  c.data.split = "all"
  c.update(batch_size=256)
  experiment = build.build(c)
  training = {e.class_id for e in emoji.load_index("core", "train")}
  batches, seen = experiment.batches(), {}
  try:
    for _ in range(emoji.num_classes("core") * len(emoji.STYLES) // 256):
      batch = next(batches)
      for class_id, style in zip(batch["class_id"].tolist(), batch["style"].tolist(), strict=True):
        seen.setdefault(class_id, set()).add(style)
  finally:
    batches.close()
  assert all(styles == {pretraining.NOT_TAUGHT} for c, styles in seen.items() if c not in training)
  assert all(pretraining.NOT_TAUGHT not in styles for c, styles in seen.items() if c in training)
  assert len(seen) > 1000
  metrics = json.loads((loading.folder_of("tiny-judge") / "metrics.json").read_text())
  assert metrics["pictures"] == (emoji.num_classes("core") - len(training)) * len(emoji.STYLES)


def test_augmented_images_keep_a_white_background():
  white = pretraining.augment(jnp.ones((4, 16, 16, 3)), KEY)
  assert abs(float(white.mean()) - 1.0) < 0.02 and float(white.std()) < 0.2  # but for the noise
  square = pretraining.augment(jnp.ones((64, 16, 16, 3)).at[:, 4:12, 4:12].set(-1.0), KEY)
  assert float(square[:, 0, 0].mean()) > 0.9 and float(square[:, 8, 8].mean()) < -0.6
  assert len({float(x) for x in square.sum((1, 2, 3))}) == 64  # each its own


def test_classify_is_the_sum_of_cross_entropies_of_what_is_taught():
  """Captions on the first five views, styles on these and again on the first two."""
  styles, classes = np.random.default_rng(0).standard_normal((2, 7, 4)).astype(np.float32)
  shapes = []

  def apply(variables, images):
    shapes.append(images.shape)
    return jnp.asarray(styles), jnp.asarray(classes)

  batch = {"pixels": np.zeros((5, 8, 8, 3), np.uint8), "style": np.int32([0, 1, 2, 3, 0])}
  batch["class_id"] = np.int32([3, 3, 1, 0, 2])
  judge = types.SimpleNamespace(apply=apply)
  of_style, of_class = -log_softmax(styles), -log_softmax(classes)
  rows, views = np.arange(5), np.array([0, 1, 2, 3, 4, 0, 1])

  def expected(taught, known):
    style = of_style[np.arange(7), np.maximum(batch["style"], 0)[views]] * taught[views]
    return style.sum() + (of_class[rows, np.minimum(batch["class_id"], 3)] * known).sum()

  loss, count, found = pretraining.classify(judge)({"judge": {}}, {}, {}, batch, KEY)
  np.testing.assert_allclose(loss, expected(np.ones(5), np.ones(5)), rtol=1e-5)
  assert count == 5 and shapes == [(7, 8, 8, 3)]
  assert found["style_accuracy"][0] == (styles.argmax(1) == batch["style"][views]).sum()
  assert found["style_accuracy"][1] == 7
  assert found["class_accuracy"][0] == (classes[:5].argmax(1) == batch["class_id"]).sum()

  taught, known = np.array([0, 1, 1, 1, 0]), np.array([1, 1, 0, 1, 1])
  batch["style"] = np.where(taught, batch["style"], pretraining.NOT_TAUGHT)
  batch["class_id"] = np.where(known, batch["class_id"], 1500)  # an emoji that no caption is taught of
  loss, count, found = pretraining.classify(judge)({"judge": {}}, {}, {}, batch, KEY)
  np.testing.assert_allclose(loss, expected(taught, known), rtol=1e-5)
  assert count == 5 and found["style_accuracy"][1] == 4 and found["class_accuracy"][1] == 4


def test_views_for_style_are_mirrored_and_exchange_colours():
  red = jnp.ones((256, 16, 16, 3)).at[:, 4:12, 2:8, 1:].set(-1.0)  # a red bar, left of the middle
  views = np.asarray(pretraining.augment_style(red, KEY))
  colours = np.argmax(views[:, 6:10].mean((1, 2)), axis=-1)
  assert min(np.bincount(colours, minlength=3)) > 60
  right = views[:, :, 8:].min(axis=-1).mean((1, 2)) < views[:, :, :8].min(axis=-1).mean((1, 2))
  assert 0.35 < right.mean() < 0.65


def test_images_of_one_caption_are_positives_of_each_others_text():
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  images, texts = unit(np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32))
  config = types.SimpleNamespace(vision_config=types.SimpleNamespace(image_size=8))
  clip = types.SimpleNamespace(config=config, apply=lambda *_: (jnp.asarray(images), jnp.asarray(texts), jnp.log(5.0)))
  batch = {"pixels": np.zeros((4, 8, 8, 3), np.uint8), "input_ids": np.zeros((4, 3), np.int32)}
  batch["class_id"] = np.int32([7, 2, 7, 1])
  loss, count, found = pretraining.contrastive(clip)({"clip": {}}, {}, {}, batch, KEY)
  same = batch["class_id"][:, None] == batch["class_id"]
  logits = 5.0 * images @ texts.T
  rows = [-(log_softmax(x) * same).sum(1) / same.sum(1) for x in (logits, logits.T)]
  np.testing.assert_allclose(loss, 0.5 * (rows[0] + rows[1]).sum(), rtol=1e-4)
  assert count == 4 and found["accuracy"][0] == same[np.arange(4), logits.argmax(1)].sum()
