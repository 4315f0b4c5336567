"""What the tests of objectives share: a stub network that keeps its calls, numbers to start from, formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.objectives import pairs
from jaxpref.objectives.base import Weights
from tests.stub_model import StubModel, init, pair_batch

BETA = 500.0
MODEL = StubModel()
FROZEN = init()
OTHER = {"unet": init(50)["unet"]}
SAME = {"unet": FROZEN["unet"]}
NEAR = jax.tree.map(lambda a, b: a + 0.02 * b, SAME, OTHER)
KEY = jax.random.key(0)
SIGMOID = pairs.denoised_loss("sigmoid", beta=BETA)
ABARS = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def loss_of(objective):
  """Its loss as a function of (params, ref_params, frozen, batch, key)."""
  return lambda params, ref_params, frozen, *args: objective.loss(Weights.of(params, ref_params, frozen), *args)


def divergence_of(objective):
  """Its divergence as a function of (ref_params, frozen, batch, key)."""
  return lambda ref_params, frozen, *args: objective.divergence(Weights.of({}, ref_params, frozen, moves=True), *args)


class Recorder(StubModel):
  """Keeps what every call of the network is given and what it returns."""

  def __init__(self):
    super().__init__()
    object.__setattr__(self, "calls", [])

  def predict(self, weights, x, t, cond):
    out = super().predict(weights, x, t, cond)
    self.calls.append((x, t, cond["encoder_hidden_states"], out))
    return out


def recorded(build, *args):
  """Loss, count and metrics of the objective that `build` makes of a model; and the calls."""

  @jax.jit
  def run(*args):
    model = Recorder()
    return loss_of(build(model))(*args), model.calls

  return jax.tree.map(np.asarray, run(*args))


def compiled_loss(objective):
  def total(*args):
    loss, count, found = loss_of(objective)(*args)
    return loss, (count, found)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def log_sigmoid(z):
  return -np.logaddexp(0.0, -z)


def latents_np(pixels):
  return pixels.reshape(-1, 4, 2, 4, 2, 3).mean(axis=(2, 4))[..., :2] * 0.8


def image_batch(size):
  batch = pair_batch(size)
  label = (np.arange(size) % 3 == 0).astype(np.float32)
  return {"pixels": batch["pixels_0"], "input_ids": batch["input_ids"], "label": label}


# ---------------------------------------------------------------------------------------------
# SDXL's conditioning on the size and crop of each image


class SizedModel(StubModel):
  """Conditioned on sizes as SDXL is; keeps what every call of the network and of the text encoder is given."""

  def __init__(self):
    super().__init__()
    object.__setattr__(self, "calls", [])
    object.__setattr__(self, "encoded", [])

  def predict(self, weights, x, t, cond):
    time_ids = cond["added_cond_kwargs"]["time_ids"]
    shift = jnp.sin(time_ids @ jnp.asarray([0.03, 0.05, 0.4, 0.7, 0.02, 0.01]))
    out = super().predict(weights, x, t, cond) + 0.1 * shift[:, None, None, None] * x
    self.calls.append((x, t, time_ids, out))
    return out

  def encode_text(self, weights, input_ids):
    self.encoded.append(input_ids.shape[0])
    cond = super().encode_text(weights, input_ids)
    size = float(self.image_size)
    own = jnp.broadcast_to(jnp.asarray([[size, size, 0.0, 0.0, size, size]]), (input_ids.shape[0], 6))
    return {**cond, "added_cond_kwargs": {"time_ids": own}}


def sized(build, *args):
  """Result of `build(model)(*args)`, the network's calls, and the rows of each call of the text encoder."""
  encoded = []

  @jax.jit
  def run(*args):
    model = SizedModel()
    out = build(model)(*args), model.calls
    encoded[:] = model.encoded
    return out

  return *jax.tree.map(np.asarray, run(*args)), encoded


def sizes(rows, seed=0):
  """f32[rows, 6] as of images of many shapes."""
  rng = np.random.default_rng(seed)
  height, width = rng.integers(8, 64, (2, rows))
  shorter = np.minimum(height, width)
  crop = [(n - shorter) * 4 // shorter for n in (height, width)]
  return np.stack([height, width, *crop, *np.full((2, rows), 8)], axis=1).astype(np.float32)


def sized_batch(rows, seed=10):
  return pair_batch(rows, seed) | {"sizes_0": sizes(rows, 1), "sizes_1": sizes(rows, 2)}


SQUARE = np.float32([8, 8, 0, 0, 8, 8])
