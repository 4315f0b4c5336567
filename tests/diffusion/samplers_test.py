"""The samplers against diffusers' schedulers, driven by one toy denoiser: same latents in, same latents out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion
from jaxpref.diffusion import samplers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STABLE_DIFFUSION = {
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "steps_offset": 1,
  "set_alpha_to_one": False,
  "clip_sample": False,
}
X = np.random.default_rng(0).standard_normal((3, 6, 5, 4)).astype(np.float32)
TOLERANCE = 1e-5  # relative to the norm; measured: 6e-7 for DPM-Solver++, 1.2e-6 for DDIM with noise


def denoise(module, x, t):
  """Depends on every pixel and on the time; of the size of its input."""
  return 0.7 * x + 0.6 * module.sin(2.0 * x + t / 150.0)


def predict(x, t):
  return denoise(jnp, x, t[:, None, None, None])


def by_diffusers(scheduler, num_steps, step_arguments=lambda i: {}):
  scheduler.set_timesteps(num_steps)
  x = torch.from_numpy(X)
  for i, t in enumerate(scheduler.timesteps):
    x = scheduler.step(denoise(torch, x, t), t, x, **step_arguments(i)).prev_sample
  return x.numpy()


def error(ours, theirs):
  return float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs))


def dpm_scheduler(config, karras=False):
  return diffusers.DPMSolverMultistepScheduler.from_config(
    config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=karras
  )


def dpm_error(config, num_steps, karras):
  schedule = diffusion.schedule_from_config(config)
  ours = jax.jit(lambda x: samplers.dpm_solver_sample(predict, schedule, x, num_steps=num_steps, karras=karras))(X)
  assert ours.dtype == jnp.float32
  return error(ours, by_diffusers(dpm_scheduler(config, karras), num_steps))


@pytest.mark.parametrize(("num_steps", "prediction_type"), [(10, "v_prediction"), (20, "epsilon")])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_solver_equals_diffusers(spacing, karras, num_steps, prediction_type):
  config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "prediction_type": prediction_type}
  assert dpm_error(config, num_steps, karras) <= TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_dpm_solver_with_very_few_steps(num_steps):
  config = STABLE_DIFFUSION | {"timestep_spacing": "leading", "prediction_type": "sample"}
  assert dpm_error(config, num_steps, karras=False) <= TOLERANCE


@pytest.mark.parametrize("karras", [False, True])
def test_dpm_solver_from_zero_terminal_snr(karras):
  config = STABLE_DIFFUSION | {
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
  }
  assert dpm_error(config, 20, karras) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 20, 30, 50])
def test_dpm_solver_timesteps_equal_diffusers(num_steps, spacing):
  config = STABLE_DIFFUSION | {"timestep_spacing": spacing}
  schedule = diffusion.schedule_from_config(config)
  scheduler = dpm_scheduler(config)
  scheduler.set_timesteps(num_steps)
  np.testing.assert_array_equal(diffusion.dpm_solver_timesteps(schedule, num_steps), scheduler.timesteps)
  scheduler = dpm_scheduler(config, karras=True)
  scheduler.set_timesteps(num_steps)
  np.testing.assert_array_equal(diffusion.dpm_solver_steps(schedule, num_steps, karras=True).t, scheduler.timesteps)


def test_dpm_solver_calls_the_network_once_a_step_in_one_scan():
  schedule = diffusion.schedule_from_config(STABLE_DIFFUSION)
  seen = []

  def counting(x, t):
    jax.debug.callback(lambda t: seen.append(int(t[0])), t)
    return predict(x, t)

  sample = lambda x: samplers.dpm_solver_sample(counting, schedule, x, num_steps=6)
  jax.block_until_ready(jax.jit(sample)(X))
  jax.effects_barrier()
  assert sorted(seen, reverse=True) == diffusion.dpm_solver_timesteps(schedule, 6).tolist()
  assert str(jax.make_jaxpr(sample)(X)).count("sin ") == 1  # the denoiser is there once


def test_dpm_solver_is_of_second_order():
  """A third of DDIM's error at 20 steps (0.034 of the norm against 0.100), a quarter of its own at 50 steps."""
  schedule = diffusion.schedule_from_config(STABLE_DIFFUSION | {"timestep_spacing": "trailing"})

  def sample(sampler, num_steps, **kwargs):
    return jax.jit(lambda x: sampler(predict, schedule, x, num_steps=num_steps, **kwargs))(X)

  exact, coarse, fine = (np.asarray(sample(samplers.dpm_solver_sample, n)) for n in (500, 20, 50))
  process = diffusion.VariancePreserving(schedule)
  ddim = jax.jit(lambda x: samplers.sample(predict, process, x, jax.random.key(0), num_steps=20, eta=0.0))(X)
  assert error(coarse, exact) < 0.5 * error(ddim, exact)
  assert error(fine, exact) < 0.3 * error(coarse, exact)


def test_too_many_steps_are_refused():
  schedule = diffusion.schedule_from_config(STABLE_DIFFUSION)
  with pytest.raises(ValueError, match="num_steps is 1000, expected between 1 and 999"):
    diffusion.dpm_solver_steps(schedule, 1000)
  with pytest.raises(ValueError, match="start at timestep 1000, outside the schedule's 1000"):
    diffusion.dpm_solver_steps(schedule, 999)


@pytest.mark.parametrize(("num_steps", "prediction_type"), [(10, "v_prediction"), (20, "epsilon")])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_equals_diffusers(spacing, eta, num_steps, prediction_type):
  """With the noises that our keys draw, given to both."""
  config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "prediction_type": prediction_type}
  schedule, key = diffusion.schedule_from_config(config), jax.random.key(1)
  noises = [jax.random.normal(k, X.shape) for k in jax.random.split(key, num_steps)]
  ours = jax.jit(
    lambda x: samplers.sample(predict, diffusion.VariancePreserving(schedule), x, key, num_steps=num_steps, eta=eta)
  )(X)
  theirs = by_diffusers(
    diffusers.DDIMScheduler.from_config(config),
    num_steps,
    lambda i: {"eta": eta, "variance_noise": torch.from_numpy(np.array(noises[i])) if eta else None},
  )
  assert error(ours, theirs) <= TOLERANCE


def test_a_config_without_spacing_means_linspace_to_diffusers():
  """Whichever scheduler's defaults were filled in on loading; jaxpref.sample relies on it."""
  loaded = diffusers.DDIMScheduler.from_config(STABLE_DIFFUSION)
  assert loaded.config.timestep_spacing == "leading"
  assert diffusers.DPMSolverMultistepScheduler.from_config(loaded.config).config.timestep_spacing == "linspace"
