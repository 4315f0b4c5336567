"""The objectives that made the shipped models, with stubs in the place of networks, and what the judge never sees."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import build, loading, pretraining
from jaxpref.data import emoji, pipeline

KEY = jax.random.key(0)


def log_softmax(x):
  return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def test_the_judge_never_sees_the_tiles_it_is_measured_on():
  """One style of every emoji outside the training split; as many as its metrics say."""
  images = pipeline.emoji_images(8, split=None)
  unseen = {(r["class_id"], r["style"]) for r in images if build._held_out(r)}
  metrics = json.loads((loading.folder_of("tiny-judge") / "metrics.json").read_text())
  assert len(unseen) == metrics["held_out_tiles"]
  others = {e.class_id for split in ("validation", "test") for e in emoji.load_index("core", split)}
  assert {class_id for class_id, _ in unseen} == others and len(others) == len(unseen)
  training = {e.class_id for e in emoji.load_index("all", "train")}
  assert not others & training
  assert len({style for _, style in unseen}) == len(emoji.STYLES)


def test_augmented_images_keep_a_white_background():
  white = pretraining.augment(jnp.ones((4, 16, 16, 3)), KEY)
  assert abs(float(white.mean()) - 1.0) < 0.02 and float(white.std()) < 0.2  # but for the noise
  square = pretraining.augment(jnp.ones((64, 16, 16, 3)).at[:, 4:12, 4:12].set(-1.0), KEY)
  assert float(square[:, 0, 0].mean()) > 0.9 and float(square[:, 8, 8].mean()) < -0.6
  assert len({float(x) for x in square.sum((1, 2, 3))}) == 64  # each its own


def test_classify_is_the_sum_of_two_cross_entropies():
  styles, classes = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
  judge = types.SimpleNamespace(apply=lambda variables, images: (jnp.asarray(styles), jnp.asarray(classes)))
  batch = {"pixels": np.zeros((5, 8, 8, 3), np.uint8), "style": np.int32([0, 1, 2, 3, 0])}
  batch["class_id"] = np.int32([3, 3, 1, 0, 2])
  loss, count, found = pretraining.classify(judge)({"judge": {}}, {}, {}, batch, KEY)
  rows = np.arange(5)
  expected = -log_softmax(styles)[rows, batch["style"]] - log_softmax(classes)[rows, batch["class_id"]]
  np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
  assert count == 5
  assert found["style_accuracy"][0] == (styles.argmax(1) == batch["style"]).sum()
  assert found["class_accuracy"][0] == (classes.argmax(1) == batch["class_id"]).sum()


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
