"""The sampler against diffusers', and trajectories against a step-by-step numpy rollout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion
from jaxpref.diffusion import samplers

SHAPE = (2, 2, 1)
STABLE_DIFFUSION = {
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "steps_offset": 1,
  "set_alpha_to_one": False,
  "clip_sample": False,
}
SCHEDULE = diffusion.schedule_from_config(STABLE_DIFFUSION)


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def predict_np(x, t):
  return np.sin(x) * np.float32(0.5) + np.float32(t / 2000.0)


def predict(x, t):
  """The same for the samplers."""
  return jnp.sin(x) * 0.5 + (t / 2000.0)[:, None, None, None]


def timesteps(num_steps):
  """t of every step, and where it goes: the last to 0, not to the clean image."""
  t = [1 + 1000 // num_steps * i for i in reversed(range(num_steps))]
  return t, [*t[1:], 0]


def ddim_np(x, pred, t, prev_t, eta=1.0):
  """Mean and std of one step, and x0, from arXiv 2010.02502, Eq. 12 and 16, in float64."""
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  abar = np.cumprod(1.0 - betas)
  a, b = abar[t], abar[prev_t]
  std = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
  x0 = (x - math.sqrt(1 - a) * pred) / math.sqrt(a)
  return math.sqrt(b) * x0 + math.sqrt(1 - b - std**2) * pred, std, x0


def normal(key, shape):
  return np.float64(jax.random.normal(key, shape))


# ---------------------------------------------------------------------------------------------
# Plain sampling


@pytest.fixture
def fixed_noise(monkeypatch):
  """All noise inside the samplers is one constant array, so that torch can be given the same."""
  monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(np.resize(draw(5, *SHAPE), shape)))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.usefixtures("fixed_noise")
def test_ddim_equals_diffusers(eta, prediction_type, spacing):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  config = STABLE_DIFFUSION | {"prediction_type": prediction_type, "timestep_spacing": spacing}
  x = draw(0, 3, *SHAPE)
  ours = samplers.sample(
    lambda x, t: jnp.sin(x + t[:, None, None, None] / 300.0),
    diffusion.VariancePreserving(diffusion.schedule_from_config(config)),
    jnp.asarray(x),
    jax.random.key(0),
    num_steps=7,
    eta=eta,
  )
  scheduler = diffusers.DDIMScheduler.from_config(config)
  scheduler.set_timesteps(7)
  theirs = torch.from_numpy(x)
  noise = torch.from_numpy(np.resize(draw(5, *SHAPE), x.shape))
  for t in scheduler.timesteps:
    prediction = torch.sin(theirs + t / 300.0)
    theirs = scheduler.step(prediction, t, theirs, eta=eta, variance_noise=noise).prev_sample
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_ddim_noise_is_drawn_afresh_at_every_step_and_for_every_row():
  x = jnp.zeros((2, *SHAPE))

  def sample(key, eta):
    predict = lambda x, t: jnp.zeros_like(x)
    return samplers.sample(predict, diffusion.VariancePreserving(SCHEDULE), x, key, num_steps=2, eta=eta)

  one, other = (np.asarray(sample(jax.random.key(i), 1.0)) for i in (0, 1))
  assert np.abs(one - other).min() > 0
  assert np.abs(one[0] - one[1]).min() > 0
  np.testing.assert_array_equal(sample(jax.random.key(0), 0.0), sample(jax.random.key(1), 0.0))


# ---------------------------------------------------------------------------------------------
# Trajectories


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_trajectories_equal_a_loop_that_keeps_everything(eta):
  """Latents, times and densities of every step, also of the last, whose std is positive."""
  steps, x, key = 7, draw(1, 3, *SHAPE), jax.random.key(3)
  found = samplers.trajectories(
    predict, diffusion.VariancePreserving(SCHEDULE), jnp.asarray(x), key, num_steps=steps, eta=eta
  )
  assert found.x.shape == (3, steps + 1, *SHAPE) and found.log_prob.shape == (3, steps)
  t, prev_t = timesteps(steps)
  assert found.t.tolist() == t and found.prev_t.tolist() == prev_t
  np.testing.assert_array_equal(found.x[:, 0], x)
  x = np.float64(x)
  for i, k in enumerate(jax.random.split(key, steps)):
    mean, std = ddim_np(x, predict_np(x, t[i]), t[i], prev_t[i], eta)[:2]
    noise = normal(k, x.shape)
    x = mean + std * noise
    np.testing.assert_allclose(found.x[:, i + 1], x, rtol=1e-4, atol=1e-4)
    log_prob = -0.5 * (noise**2).mean(axis=(1, 2, 3)) - math.log(std * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(found.log_prob[:, i], log_prob, rtol=1e-3, atol=1e-3)
