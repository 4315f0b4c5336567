"""A text-to-image model and a scorer of a few matrices: networks would take minutes to compile.

They have the methods that objectives and steps call, no others, and are smooth in everything, so
that what is around them can be compared with numpy.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import diffusion
from jaxpref.models.stable_diffusion import StableDiffusion
from jaxpref.rewards.base import Weighted
from jaxpref.rewards.latent import LatentReward
from jaxpref.rewards.step_aware import StepAware

LATENT = (4, 4, 2)
IMAGE_SIZE = 8
WIDTH, TEXT, VOCABULARY, LENGTH = 16, 8, 32, 5
SCHEDULE = diffusion.schedule_from_config(
  {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
  }
)


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def init(seed=0):
  """Parameters by component, as a pipeline has them."""
  size = int(np.prod(LATENT))
  return {
    "unet": {
      "inner": {"kernel": jnp.asarray(draw(seed, size, WIDTH) / 6)},
      "text": {"kernel": jnp.asarray(draw(seed + 1, TEXT, WIDTH) / 3)},
      "outer": {"kernel": jnp.asarray(draw(seed + 2, WIDTH, size) / 4)},
    },
    "text_encoder": {"embedding": jnp.asarray(draw(seed + 3, VOCABULARY, TEXT))},
    "vae": {"gain": jnp.asarray(0.8, jnp.float32)},
    "empty_ids": jnp.zeros((1, LENGTH), jnp.int32),
    "spm": {
      "image": jnp.asarray(draw(seed + 4, IMAGE_SIZE**2 * 3, TEXT) / 14),
      "text": jnp.asarray(draw(seed + 5, VOCABULARY, TEXT)),
      "time": jnp.asarray(draw(seed + 6, TEXT)),
    },
  }


def pair_batch(size, seed=10):
  """A batch of pairs; wins of the first, of the second and ties in turn."""
  rng = np.random.default_rng(seed)
  shape = (size, IMAGE_SIZE, IMAGE_SIZE, 3)
  return {
    "pixels_0": rng.uniform(-1, 1, shape).astype(np.float32),
    "pixels_1": rng.uniform(-1, 1, shape).astype(np.float32),
    "label_0": np.resize(np.float32([1, 0, 0.5]), size),
    "input_ids": rng.integers(1, VOCABULARY, (size, LENGTH)).astype(np.int32),
    "num_example_per_prompt": np.resize(np.int32([1, 3, 2, 4]), size),
  }


@dataclasses.dataclass(frozen=True)
class StubModel:
  """What `models.base.Model` asks for. The encoder draws nothing: its latents can be recomputed.

  Attributes:
    dtype: compute dtype of the network.
  """

  process: diffusion.Process = diffusion.VariancePreserving(SCHEDULE)
  dtype: type = jnp.float32
  latent_shape: tuple[int, int, int] = LATENT
  image_size: int = IMAGE_SIZE

  sized = StableDiffusion.sized
  stored_text = StableDiffusion.stored_text
  restored_text = StableDiffusion.restored_text

  def predict(self, weights, x, t, cond):
    w = jax.tree.map(lambda k: k.astype(self.dtype), weights["unet"])
    flat = x.reshape(x.shape[0], -1).astype(self.dtype)
    text = jnp.mean(cond["encoder_hidden_states"], axis=1).astype(self.dtype)
    h = flat @ w["inner"]["kernel"] + text @ w["text"]["kernel"]
    h = jnp.tanh(h + (t / 1000.0).astype(self.dtype)[:, None])
    return (h @ w["outer"]["kernel"]).reshape(x.shape).astype(jnp.float32)

  def encode_text(self, weights, input_ids):
    return {"encoder_hidden_states": weights["text_encoder"]["embedding"][input_ids]}

  def encode_empty(self, weights, batch_size):
    cond = self.encode_text(weights, weights["empty_ids"])
    return jax.tree.map(lambda c: jnp.broadcast_to(c, (batch_size, *c.shape[1:])), cond)

  def encode_images(self, weights, images, key):
    del key
    small = images.reshape(images.shape[0], LATENT[0], 2, LATENT[1], 2, 3).mean(axis=(2, 4))
    return small[..., :2] * weights["vae"]["gain"]

  def decode(self, weights, latents, *, size=0):
    if size:
      latents = jax.image.resize(latents, (len(latents), size // 2, size // 2, latents.shape[-1]), "linear")
    images = jnp.concatenate([latents, latents[..., :1]], axis=-1) / weights["vae"]["gain"]
    return jnp.tanh(images.repeat(2, axis=1).repeat(2, axis=2))


class StubScorer:
  """What a `StepAwareCLIPModel` offers: `config`, and `apply` with a method's name."""

  config = types.SimpleNamespace(
    text_config=types.SimpleNamespace(max_position_embeddings=LENGTH),
    vision_config=types.SimpleNamespace(image_size=IMAGE_SIZE),
  )

  def apply(self, variables, *args, method):
    return getattr(self, method)(variables["params"], *args)

  def text_embeds(self, params, input_ids):
    return jnp.mean(params["text"][input_ids], axis=1)

  def image_embeds(self, params, pixels, t):
    phase = (t / 500.0)[:, None] * params["time"][None]
    return jnp.sin(pixels.reshape(pixels.shape[0], -1) @ params["image"] + phase)

  def score(self, params, image_embeds, text_embeds):
    del params
    return 3.0 * jnp.sum(image_embeds * text_embeds, axis=-1)


class StubLatentScorer:
  """What a `LatentRewardModel` offers to a reward; its parameters are those of the stub's `spm`, and `latents`."""

  config = types.SimpleNamespace(guidance_scale=2.0)

  def apply(self, variables, *args, method):
    return getattr(self, method)(variables["params"], *args)

  def text(self, params, input_ids):
    rows = params["text"][input_ids]
    return {"hidden": rows}, jnp.mean(rows, axis=1)

  def latent_embeds(self, params, latents, t, cond, uncond):
    phase = (t / 500.0)[:, None] * params["time"][None]
    guided = self.config.guidance_scale * (cond["hidden"] - uncond["hidden"]) + uncond["hidden"]
    return jnp.sin(latents.reshape(len(latents), -1) @ params["latents"] + phase + jnp.mean(guided, axis=1))

  def score(self, params, latent_embeds, text_embeds):
    del params
    return 3.0 * jnp.sum(latent_embeds * text_embeds, axis=-1)


def latent_params(seed=0):
  """Parameters of a `StubLatentScorer`."""
  own = {"latents": jnp.asarray(draw(seed + 7, int(np.prod(LATENT)), TEXT) / 6)}
  return own | {k: v for k, v in init(seed)["spm"].items() if k != "image"}


def latent_reward():
  """What SPO and GRPO are given of LPO: the latent scorer as the one reward."""
  return Weighted(((LatentReward(StubLatentScorer()), 1.0),))


def stub_reward(scorer=StubScorer()):  # noqa: B008
  """What SPO and GRPO are given: the scorer as the one reward."""
  return Weighted(((StepAware(scorer), 1.0),))
