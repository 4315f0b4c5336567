"""Objectives that make the networks preference optimisation starts from: autoencoder, CLIP, classifier.

As in `objectives.py`, a loss function maps (params, ref_params, frozen, batch, key) to (sum of losses, count,
metric pairs). `reference` and `frozen` parameters are unused here.
"""

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.models.clip import CLIPModel
from jaxpref.models.preference import Judge, preprocess
from jaxpref.models.vae import AutoencoderKL, to_float
from jaxpref.objectives import LossFn, named_key
from jaxpref.training.metrics import Pairs, mean_of


def augment(images: jax.Array, key: jax.Array, *, clean: float = 0.0) -> jax.Array:
  """Random scale (0.85 to 1.1), shift (up to 6 %), contrast and pixel noise of images f32[B,H,W,3] in [-1, 1].

  White stays the background. The noise and blur-like resampling make classifiers usable on generated images.

  Args:
    clean: share of the images that is left as it is; without any, sharp images are strange to what was trained.
  """
  batch, height, width, _ = images.shape
  k_scale, k_shift, k_gain, k_level, k_noise = jax.random.split(key, 5)
  scale = jax.random.uniform(k_scale, (batch, 1), minval=0.85, maxval=1.1)
  size = jnp.asarray([height, width], jnp.float32)
  shift = jax.random.uniform(k_shift, (batch, 2), minval=-0.06, maxval=0.06) * size[None]
  translation = shift + (1 - scale) * size[None] / 2

  def one(image, s, offset):
    return jax.image.scale_and_translate(
      image, image.shape, (0, 1), jnp.broadcast_to(s, (2,)), offset, method="linear", antialias=False
    )

  # Resampling pads with 0, so 0 is made to mean white.
  moved = 1.0 - jax.vmap(one)(1.0 - images, scale, translation)
  gain = jax.random.uniform(k_gain, (batch, 1, 1, 1), minval=0.85, maxval=1.1)
  level = jax.random.uniform(k_level, (batch, 1, 1, 1), maxval=0.15)
  changed = 1.0 - gain * (1.0 - moved) + level * jax.random.normal(k_noise, images.shape)
  return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 5), clean, (batch, 1, 1, 1)), images, changed)


def autoencode(vae: AutoencoderKL, *, kl_weight: float, gradient_weight: float) -> LossFn:
  """Reconstruction by L1 on pixels and on their differences, and a small KL to N(0, 1); all means.

  Trains `params["vae"]` on `batch["pixels"]` [B,H,W,3], u8 or f32 in [-1, 1].
  """

  def loss_fn(params, ref_params, frozen, batch, key):
    del ref_params, frozen
    x = to_float(batch["pixels"])
    mean, logvar = vae.apply({"params": params["vae"]}, x, method="encode")
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(named_key(key, "posterior"), mean.shape)
    y = vae.apply({"params": params["vae"]}, z, method="decode")
    pixels = (1, 2, 3)
    l1 = jnp.mean(jnp.abs(y - x), axis=pixels)
    dy = jnp.mean(jnp.abs(jnp.diff(y - x, axis=1)), axis=pixels)
    dx = jnp.mean(jnp.abs(jnp.diff(y - x, axis=2)), axis=pixels)
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=pixels)
    loss = l1 + gradient_weight * (dx + dy) + kl_weight * kl
    weights = jnp.ones_like(loss)
    metrics: Pairs = {
      "l1": mean_of(l1, weights),
      "kl": mean_of(kl, weights),
      "latent_std": mean_of(jnp.sqrt(jnp.mean(mean**2, axis=pixels)), weights),
    }
    return jnp.sum(loss), jnp.sum(weights), metrics

  return loss_fn


def contrastive(clip: CLIPModel) -> LossFn:
  """CLIP (arXiv 2103.00020) on augmented images; images of one caption are positives of each other's text.

  Trains `params["clip"]` on `batch["pixels"]`, `batch["input_ids"]` and `batch["class_id"]` i32[B].
  """

  def loss_fn(params, ref_params, frozen, batch, key):
    del ref_params, frozen
    images = augment(to_float(batch["pixels"]), named_key(key, "augment"))
    images = preprocess(images, clip.config.vision_config.image_size)
    image_embeds, text_embeds, logit_scale = clip.apply({"params": params["clip"]}, batch["input_ids"], images)
    same = batch["class_id"][:, None] == batch["class_id"][None, :]
    loss = losses.info_nce_loss(image_embeds, text_embeds, logit_scale, positives=same)
    weights = jnp.ones_like(loss)
    hit = jnp.take_along_axis(same, jnp.argmax(image_embeds @ text_embeds.T, axis=1)[:, None], axis=1)[:, 0]
    metrics = {"accuracy": mean_of(hit.astype(jnp.float32), weights)}
    return jnp.sum(loss), jnp.sum(weights), metrics

  return loss_fn


NOT_TAUGHT = -1  # the style of a tile on which the judge's style is measured


def classify(judge: Judge) -> LossFn:
  """Cross-entropy of style and of caption class on images of which three quarters are augmented, added.

  Trains `params["judge"]` on `batch["pixels"]`, `batch["style"]` i32[B] and `batch["class_id"]` i32[B]. Where the style
  is `NOT_TAUGHT`, only the caption is learned; where the judge has no such class, only the style.
  """

  def loss_fn(params, ref_params, frozen, batch, key):
    del ref_params, frozen
    images = augment(to_float(batch["pixels"]), named_key(key, "augment"), clean=0.25)
    style_logits, class_logits = judge.apply({"params": params["judge"]}, images)
    taught = (batch["style"] != NOT_TAUGHT).astype(jnp.float32)
    known = (batch["class_id"] < class_logits.shape[1]).astype(jnp.float32)
    style, class_id = jnp.maximum(batch["style"], 0), jnp.minimum(batch["class_id"], class_logits.shape[1] - 1)

    def cross_entropy(logits, labels):
      return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]

    def accuracy(logits, labels, weights):
      return mean_of((jnp.argmax(logits, axis=1) == labels).astype(jnp.float32), weights)

    loss = taught * cross_entropy(style_logits, style) + known * cross_entropy(class_logits, class_id)
    metrics = {
      "style_accuracy": accuracy(style_logits, style, taught),
      "class_accuracy": accuracy(class_logits, class_id, known),
    }
    return jnp.sum(loss), jnp.asarray(loss.shape[0], jnp.float32), metrics

  return loss_fn
