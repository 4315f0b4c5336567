"""Makes the networks that preference optimisation starts from: denoiser, autoencoder, CLIP, classifier."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.models.base import Model
from jaxpref.models.clip import CLIPModel
from jaxpref.models.preference import Judge, preprocess
from jaxpref.models.vae import AutoencoderKL, to_float
from jaxpref.objectives import noising
from jaxpref.objectives.base import REWARD_BINS, Batch, Offline, Weights, named_key
from jaxpref.objectives.sums import Pairs, binned_mean, mean_of

NOT_TAUGHT = -1  # the style of a tile that measures the judge's style


def augment(images: jax.Array, key: jax.Array, *, clean: float = 0.0) -> jax.Array:
  """Applies random scale (0.85 to 1.1), shift (up to 6 %), contrast and pixel noise to f32[B,H,W,3] in [-1, 1].

  White stays the background. Noise and blur-like resampling make classifiers usable on generated images.

  Args:
    clean: share of the images left unchanged; without any, the trained network does not know sharp images.
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

  # Resampling pads with 0, so 0 must mean white.
  moved = 1.0 - jax.vmap(one)(1.0 - images, scale, translation)
  gain = jax.random.uniform(k_gain, (batch, 1, 1, 1), minval=0.85, maxval=1.1)
  level = jax.random.uniform(k_level, (batch, 1, 1, 1), maxval=0.15)
  changed = 1.0 - gain * (1.0 - moved) + level * jax.random.normal(k_noise, images.shape)
  return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 5), clean, (batch, 1, 1, 1)), images, changed)


@dataclasses.dataclass(frozen=True)
class Denoising(Offline):
  """Denoising score matching (arXiv 2006.11239, Eq. 14) on `pixels` and `input_ids`: pre-training, or SFT.

  Instead of these a batch may hold the frozen networks' output, `moments` and the stored text (data/latents.py). The
  same holds for `DiffusionDPO` and `DiffusionKTO`.

  SDXL is conditioned on the `sizes` of each image if the batch has them, otherwise on uncropped images of its own size.
  The two methods above do so with the `sizes_0` and `sizes_1` of a pair.

  Trains whichever components are trained: `unet`, and `text_encoder` if it is among them.
  """

  model: Model

  def timesteps(self, key: jax.Array, size: int) -> jax.Array:
    return noising.training_times(self.model, key, size)

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    model = self.model
    x0 = jax.lax.stop_gradient(noising.latents(model, w.policy, e, named_key(key, "posterior")))
    t = self.timesteps(key, x0.shape[0])
    noise = jax.random.normal(named_key(key, "noise"), x0.shape)
    x_t = model.process.add_noise(x0, noise, t)
    target = model.process.target(x0, noise, t)
    cond = model.sized(noising.text(model, w.policy, e), e.get("sizes"))
    err = noising.errors(model, w.policy, x_t, t, cond, target)
    ones = jnp.ones_like(err)
    metrics = {"loss_bin": binned_mean(err, ones, t, total=model.process.num_train_timesteps, bins=REWARD_BINS)}
    return jnp.sum(err), jnp.sum(ones), metrics


@dataclasses.dataclass(frozen=True)
class Autoencoding(Offline):
  """Reconstruction by L1 on pixels and on their differences, with a small KL to N(0, 1); all are means.

  Trains component `vae` on `pixels` [B,H,W,3], u8 or f32 in [-1, 1].
  """

  vae: AutoencoderKL
  kl_weight: float
  gradient_weight: float

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    x = to_float(e["pixels"])
    mean, logvar = self.vae.apply({"params": w.policy["vae"]}, x, method="encode")
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(named_key(key, "posterior"), mean.shape)
    y = self.vae.apply({"params": w.policy["vae"]}, z, method="decode")
    pixels = (1, 2, 3)
    l1 = jnp.mean(jnp.abs(y - x), axis=pixels)
    dy = jnp.mean(jnp.abs(jnp.diff(y - x, axis=1)), axis=pixels)
    dx = jnp.mean(jnp.abs(jnp.diff(y - x, axis=2)), axis=pixels)
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=pixels)
    loss = l1 + self.gradient_weight * (dx + dy) + self.kl_weight * kl
    weights = jnp.ones_like(loss)
    metrics: Pairs = {
      "l1": mean_of(l1, weights),
      "kl": mean_of(kl, weights),
      "latent_std": mean_of(jnp.sqrt(jnp.mean(mean**2, axis=pixels)), weights),
    }
    return jnp.sum(loss), jnp.sum(weights), metrics


@dataclasses.dataclass(frozen=True)
class Contrastive(Offline):
  """CLIP (arXiv 2103.00020) on augmented images; images of one caption are positives of each other's text.

  Trains component `clip` on `pixels`, `input_ids` and `class_id` i32[B].
  """

  clip: CLIPModel

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    images = augment(to_float(e["pixels"]), named_key(key, "augment"))
    images = preprocess(images, self.clip.config.vision_config.image_size)
    image_embeds, text_embeds, logit_scale = self.clip.apply({"params": w.policy["clip"]}, e["input_ids"], images)
    same = e["class_id"][:, None] == e["class_id"][None, :]
    loss = losses.info_nce_loss(image_embeds, text_embeds, logit_scale, positives=same)
    weights = jnp.ones_like(loss)
    hit = jnp.take_along_axis(same, jnp.argmax(image_embeds @ text_embeds.T, axis=1)[:, None], axis=1)[:, 0]
    metrics = {"accuracy": mean_of(hit.astype(jnp.float32), weights)}
    return jnp.sum(loss), jnp.sum(weights), metrics


@dataclasses.dataclass(frozen=True)
class Classification(Offline):
  """Cross-entropy of style plus that of caption class, on images of which three quarters are augmented.

  Trains component `judge` on `pixels`, `style` i32[B] and `class_id` i32[B]. Where the style is `NOT_TAUGHT`, only the
  caption is learnt; where the judge has no such class, only the style.
  """

  judge: Judge

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    images = augment(to_float(e["pixels"]), named_key(key, "augment"), clean=0.25)
    style_logits, class_logits = self.judge.apply({"params": w.policy["judge"]}, images)
    taught = (e["style"] != NOT_TAUGHT).astype(jnp.float32)
    known = (e["class_id"] < class_logits.shape[1]).astype(jnp.float32)
    style, class_id = jnp.maximum(e["style"], 0), jnp.minimum(e["class_id"], class_logits.shape[1] - 1)

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
