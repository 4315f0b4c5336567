"""Rectified flow: steps against diffusers, noise against closed forms, training times against scipy."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion
from jaxpref.diffusion import flow, samplers
from jaxpref.evaluation import drawing
from jaxpref.objectives import pools, spo
from jaxpref.rewards.base import Scores

SHAPE = (3, 6, 5, 4)
STEP = 1e-5  # relative to the norm; measured: 6e-7 for a trajectory of Euler's steps, 6e-7 for one of the solver's
SD3 = diffusion.flow_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
PROCESS = diffusion.RectifiedFlow(SD3)
CONFIGS = {
  "plain": {},
  "sd3": {"shift": 3.0},
  "dynamic": {"use_dynamic_shifting": True},
  "dynamic_linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
  "terminal": {"shift_terminal": 0.1},
  "karras": {"shift": 3.0, "use_karras_sigmas": True},
  "exponential": {"shift": 3.0, "use_exponential_sigmas": True},
  "beta": {"shift": 3.0, "use_beta_sigmas": True},
}
MU = 0.63


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape or SHAPE).astype(np.float32)


def denoise(module, x, t):
  """Depends on every value and on the time; of the size of its input."""
  return 0.7 * x + 0.6 * module.sin(2.0 * x + t / 150.0)


def predict(x, t):
  return denoise(jnp, x, t[:, None, None, None])


def error(ours, theirs):
  theirs = np.asarray(theirs, np.float64)
  return float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs))


def process_of(config):
  schedule = diffusion.flow_from_config(config)
  return diffusion.RectifiedFlow(schedule, MU if schedule.use_dynamic_shifting else None)


def gaussian_velocity(x, s, mean, std):
  """v at x of the flow from N(mean, std^2) to N(0, 1): E[noise - x0 | x]."""
  var = (1 - s) ** 2 * std**2 + s**2
  centred = (x - (1 - s) * mean) / var
  return s * centred - (mean + (1 - s) * std**2 * centred)


def of_gaussian(x, t):
  """For the samplers: of data N(0.8, 0.5^2)."""
  return gaussian_velocity(x, (t / 1000)[:, None, None, None], 0.8, 0.5)


def by_diffusers(scheduler, num_steps, mu, x):
  import torch

  scheduler.set_timesteps(num_steps, mu=mu)
  x = torch.from_numpy(x)
  for t in scheduler.timesteps:
    x = scheduler.step(denoise(torch, x, t), t, x).prev_sample
  return x.numpy()


# ---------------------------------------------------------------------------------------------
# The path and the velocity


def test_add_noise_equals_diffusers():
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  theirs, x0, noise = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), draw(0), draw(1)
  t = theirs.timesteps[[0, 400, 999]]
  expected = theirs.scale_noise(torch.from_numpy(x0), t, torch.from_numpy(noise))
  found = jax.jit(PROCESS.add_noise)(x0, noise, t.numpy())
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_velocity_gives_back_sample_and_noise():
  x0, noise, s = draw(0), draw(1), jnp.asarray([0.0, 0.3, 1.0])
  x_s = flow.add_noise(x0, noise, s)
  v = flow.target(x0, noise)
  np.testing.assert_allclose(v, noise - x0, rtol=1e-6)
  np.testing.assert_allclose(flow.to_x0(v, x_s, s), x0, atol=1e-6)
  np.testing.assert_allclose(flow.to_noise(v, x_s, s), noise, atol=1e-6)
  np.testing.assert_array_equal(x_s[0], x0[0])
  np.testing.assert_array_equal(x_s[2], noise[2])
  np.testing.assert_allclose(PROCESS.to_x0(PROCESS.target(x0, noise, 1000 * s), x_s, 1000 * s), x0, atol=1e-6)


def test_bfloat16_is_computed_with_in_float32():
  x0, noise = (jnp.asarray(draw(i), jnp.bfloat16) for i in (0, 1))
  s = jnp.full((3,), 0.7)
  for found in (
    flow.add_noise(x0, noise, s),
    flow.target(x0, noise),
    flow.to_x0(noise, x0, s),
    flow.to_noise(noise, x0, s),
    flow.mean_std(noise, x0, s, s - 0.1, eta=0.7)[0],
  ):
    assert found.dtype == jnp.float32
  np.testing.assert_array_equal(flow.target(x0, noise), noise.astype(jnp.float32) - x0.astype(jnp.float32))


@pytest.mark.parametrize("fn", [flow.to_x0, flow.to_noise, flow.add_noise])
def test_shapes_that_disagree_are_refused(fn):
  with pytest.raises(ValueError, match="expected timesteps and std"):
    fn(draw(0), draw(1), jnp.zeros(2))


# ---------------------------------------------------------------------------------------------
# Samplers


@pytest.mark.parametrize("num_steps", [2, 10])
@pytest.mark.parametrize("name", CONFIGS)
def test_eulers_steps_equal_diffusers(name, num_steps):
  diffusers = pytest.importorskip("diffusers")
  process, x = process_of(CONFIGS[name]), draw(2)
  sample = jax.jit(lambda x: samplers.sample(predict, process, x, jax.random.key(0), num_steps=num_steps, eta=0.0))
  theirs = by_diffusers(diffusers.FlowMatchEulerDiscreteScheduler.from_config(CONFIGS[name]), num_steps, process.mu, x)
  assert error(sample(x), theirs) <= STEP


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("config", [{"shift": 1.0}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_dpm_solver_equals_diffusers(config, num_steps):
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.DPMSolverMultistepScheduler(
    use_flow_sigmas=True,
    prediction_type="flow_prediction",
    flow_shift=config.get("shift", 1.0),
    use_dynamic_shifting=config.get("use_dynamic_shifting", False),
  )
  process, x = process_of(config), draw(3)
  ours = jax.jit(lambda x: samplers.solver_sample(predict, process.solver_steps(num_steps), x))(x)
  assert ours.dtype == jnp.float32
  assert error(ours, by_diffusers(theirs, num_steps, process.mu, x)) <= STEP


def test_each_single_step_equals_diffusers():
  """From latents that are not ours, at every step of the grid."""
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
  theirs.set_timesteps(10)
  step = jax.jit(lambda v, x, t, prev_t: PROCESS.transition(v, x, t, prev_t, eta=0.0))
  for i, (t, prev_t) in enumerate(zip(*PROCESS.grid(10), strict=True)):
    x, v = draw(10 + i), draw(30 + i)
    expected = theirs.step(torch.from_numpy(v), theirs.timesteps[i], torch.from_numpy(x)).prev_sample
    mean, std = step(v, x, np.full(3, t), np.full(3, prev_t))
    assert error(mean, expected) <= STEP and not std.any()


@pytest.mark.parametrize("num_steps", [20, 40])
def test_dpm_solver_is_nearer_to_the_exact_samples_than_euler(num_steps):
  """On Gaussian data, whose ODE is known: 0.014 and 0.005 of the norm against Euler's 0.071 and 0.036."""
  x = jnp.asarray(draw(4))
  solver = samplers.solver_sample(of_gaussian, PROCESS.solver_steps(num_steps), x)
  euler = samplers.sample(of_gaussian, PROCESS, x, jax.random.key(0), num_steps=num_steps, eta=0.0)
  exact = 0.8 + 0.5 * np.asarray(x)
  assert error(solver, exact) < 0.25 * error(euler, exact) < 0.02


def test_solvers_are_a_process_that_says_so():
  vp = diffusion.VariancePreserving(diffusion.schedule_from_config({}))
  assert isinstance(PROCESS, diffusion.Solvable) and isinstance(vp, diffusion.Solvable)
  assert not isinstance(types.SimpleNamespace(num_train_timesteps=1000), diffusion.Solvable)
  for found, expected in zip(vp.solver_steps(7), diffusion.dpm_solver_steps(vp.schedule, 7), strict=True):
    np.testing.assert_array_equal(found, expected)
  with pytest.raises(ValueError, match="karras is true, expected false"):
    PROCESS.solver_steps(7, karras=True)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_pictures_are_drawn_by_flow(sampler):
  model = types.SimpleNamespace(
    process=PROCESS,
    latent_shape=SHAPE[1:],
    sized=lambda cond, sizes: cond,
    encode_text=lambda weights, ids: {"text": ids},
    encode_empty=lambda weights, count: {"text": jnp.zeros((count, 1))},
    predict=lambda weights, x, t, cond: predict(x, t),
    decode=lambda weights, latents: latents[..., :3],
  )
  options = dict(num_inference_steps=5, guidance_scale=1.0, eta=0.0, seed=3)
  images = drawing.make_sampler(model, sampler=sampler, **options)({}, np.zeros((3, 1), np.int32), np.arange(3))
  noise = drawing.prior_noise(3, np.arange(3), SHAPE[1:])
  if sampler == "ddim":
    latents = samplers.sample(predict, PROCESS, noise, jax.random.key(0), num_steps=5, eta=0.0)
  else:
    latents = samplers.solver_sample(predict, PROCESS.solver_steps(5), noise)
  expected = np.clip((np.asarray(latents[..., :3]) + 1.0) * 127.5, 0, 255)
  assert images.dtype == np.uint8 and images.std() > 20
  np.testing.assert_allclose(images, expected, atol=0.51)
  if sampler == "dpmpp_2m":
    with pytest.raises(ValueError, match="karras is true, expected false"):
      drawing.make_sampler(model, sampler=sampler, karras=True, **options)


# ---------------------------------------------------------------------------------------------
# Steps with noise


def flow_grpo_np(v, x, s, n, eta):
  """arXiv 2505.05470: the deviation's s is n where s is 1."""
  std = eta * math.sqrt(s / (1 - (n if s == 1 else s)))
  ds = n - s
  return x * (1 + std**2 / (2 * s) * ds) + v * (1 + std**2 * (1 - s) / (2 * s)) * ds, std * math.sqrt(-ds)


def dance_np(v, x, s, n, eta):
  """arXiv 2505.07818: the score is -(x - (1 - s) x0) / s^2."""
  ds, x0 = n - s, x - s * v
  return x + (v + 0.5 * eta**2 * (x - (1 - s) * x0) / s**2) * ds, eta * math.sqrt(-ds)


def cps_np(v, x, s, n, eta):
  """arXiv 2509.05952: the coefficients of sample and noise are kept."""
  std = n * math.sin(eta * math.pi / 2)
  return (x - s * v) * (1 - n) + (x + (1 - s) * v) * math.sqrt(n**2 - std**2), std


EQUATIONS = {"flow_grpo": flow_grpo_np, "dance": dance_np, "cps": cps_np}
sdes = pytest.mark.parametrize("sde", EQUATIONS)


@sdes
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_steps_with_noise_follow_their_papers(sde, eta):
  process = diffusion.RectifiedFlow(SD3, sde=sde)
  step = jax.jit(lambda v, x, t, prev_t: process.transition(v, x, t, prev_t, eta=eta))
  levels = diffusion.sigma_grid(SD3, 10)
  s, n = (np.float32(1000) * v for v in (levels[:-1], levels[1:]))
  v, x = draw(5, 10, *SHAPE[1:]), draw(6, 10, *SHAPE[1:])
  mean, std = step(v, x, s, n)
  assert mean.dtype == std.dtype == jnp.float32 and std.shape == (10,)
  for i in range(10):
    expected = EQUATIONS[sde](np.float64(v[i]), np.float64(x[i]), float(levels[i]), float(levels[i + 1]), eta)
    assert error(mean[i], expected[0]) <= STEP, i
    np.testing.assert_allclose(std[i], expected[1], rtol=1e-4, atol=1e-7)  # near s = 1 a rounding of 1 - s


def moments(process, num_steps, eta, mean, std):
  """Mean and variance at every level of the samples that `transition` makes of N(0, 1), exactly.

  On Gaussian data a step's mean is affine in x, so two values of x tell all.
  """
  t, prev_t = process.grid(num_steps)
  x = np.asarray([[0.0], [1.0]]) * np.ones((1, num_steps))
  v = gaussian_velocity(x, np.float64(t) / 1000, mean, std)
  (zero, one), (noise, _) = jax.vmap(lambda v, x: process.transition(v, x, t, prev_t, eta=eta))(
    jnp.asarray(v[..., None], jnp.float32), jnp.asarray(x[..., None], jnp.float32)
  )
  shift, slope, noise = np.float64(zero[:, 0]), np.float64(one[:, 0]) - np.float64(zero[:, 0]), np.float64(noise)
  found = [(0.0, 1.0)]
  for i in range(num_steps):
    found.append((shift[i] + slope[i] * found[-1][0], slope[i] ** 2 * found[-1][1] + noise[i] ** 2))
  return np.asarray(found[1:]), np.float64(prev_t) / 1000


@pytest.mark.parametrize("eta", [0.0, 0.4, 0.7])
@pytest.mark.parametrize("sde", ["flow_grpo", "dance"])
def test_noise_keeps_the_marginals_of_the_ode(sde, eta):
  """On N(0.8, 0.5^2) in 1000 steps: mean and deviation are those of the path.

  Where Flow-GRPO's noise level has no bound, near s = 1, even these steps are too long: 0.046 off at eta 0.7.
  """
  process = diffusion.RectifiedFlow(diffusion.FlowSchedule(), sde=sde)
  found, s = moments(process, 1000, eta, 0.8, 0.5)
  wrong = np.abs(np.sqrt(found[:, 1]) - np.sqrt((1 - s) ** 2 * 0.25 + s**2))
  np.testing.assert_allclose(found[:, 0], (1 - s) * 0.8, atol=1e-5)
  assert wrong[s <= 0.5].max() < 3e-3
  assert wrong.max() < (0.05 if sde == "flow_grpo" and eta else 1e-3)
  fewer, at = moments(process, 100, eta, 0.8, 0.5)
  of_fewer = np.abs(np.sqrt(fewer[:, 1]) - np.sqrt((1 - at) ** 2 * 0.25 + at**2))
  assert wrong[s <= 0.9].max() < 0.7 * of_fewer[at <= 0.9].max()


@pytest.mark.parametrize("eta", [0.0, 0.4, 0.9])
def test_cps_keeps_the_marginals_of_a_point_exactly(eta):
  """Sample and noise are then known, and their coefficients are those of the path in any number of steps."""
  found, s = moments(diffusion.RectifiedFlow(SD3, sde="cps"), 5, eta, 0.8, 0.0)
  np.testing.assert_allclose(found[:, 0], (1 - s) * 0.8, atol=1e-6)
  np.testing.assert_allclose(np.sqrt(found[:, 1]), s, atol=1e-6)


@pytest.mark.parametrize(
  ("sde", "eta", "deviation"), [("dance", 0.0, 0.3592), ("flow_grpo", 0.7, 0.4210), ("cps", 0.7, 0.3198)]
)
def test_ten_steps_lose_variance(sde, eta, deviation):
  """Deviation of the samples at the end, of data with 0.5, with shift 3."""
  found = moments(diffusion.RectifiedFlow(SD3, sde=sde), 10, eta, 0.0, 0.5)[0][-1, 1]
  assert abs(math.sqrt(found) - deviation) < 1e-4


@sdes
def test_trajectories_have_these_moments_and_densities(sde):
  stats = pytest.importorskip("scipy.stats")
  process, rows = diffusion.RectifiedFlow(SD3, sde=sde), 20_000
  x = jax.random.normal(jax.random.key(0), (rows, 1, 1, 1))
  key = jax.random.key(1)
  expected, _ = moments(process, 10, 0.7, 0.8, 0.5)
  if sde == "cps":
    end = samplers.sample(of_gaussian, process, x, key, num_steps=10, eta=0.7)
    with pytest.raises(ValueError, match="sde is 'cps', whose last step has no noise"):
      samplers.trajectories(of_gaussian, process, x, key, num_steps=10, eta=0.7)
  else:
    found = jax.jit(lambda x: samplers.trajectories(of_gaussian, process, x, key, num_steps=10, eta=0.7))(x)
    end = found.x[:, -1]
    mean, std = process.transition(
      of_gaussian(found.x[:, 4], jnp.full(rows, found.t[4])),
      found.x[:, 4],
      jnp.full(rows, found.t[4]),
      jnp.full(rows, found.prev_t[4]),
      eta=0.7,
    )
    log_prob = stats.norm.logpdf(np.float64(found.x[:, 5]), np.float64(mean), np.float64(std)[:, None, None, None])
    np.testing.assert_allclose(found.log_prob[:, 4], log_prob[:, 0, 0, 0], atol=2e-4)
    assert np.isfinite(found.log_prob).all()  # of the last step, too
  end = np.float64(end)
  deviation = math.sqrt(expected[-1, 1])
  assert abs(end.mean() - expected[-1, 0]) < 5 * deviation / math.sqrt(rows)
  assert abs(end.std() / deviation - 1.0) < 5 / math.sqrt(2 * rows)


def test_density_is_the_mean_over_a_latent():
  stats = pytest.importorskip("scipy.stats")
  s, n = jnp.asarray([1.0, 0.6, 0.009]), jnp.asarray([0.96, 0.4, 0.0])
  x, v, z = draw(7), draw(8), draw(9)
  mean, std = flow.mean_std(v, x, s, n, eta=0.7)
  after = mean + std[:, None, None, None] * z
  expected = stats.norm.logpdf(np.float64(after), np.float64(mean), np.float64(std)[:, None, None, None])
  np.testing.assert_allclose(diffusion.gaussian_log_prob(after, mean, std), expected.mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("sde", ["flow_grpo", "dance"])
def test_gradients_of_the_density_are_finite_at_every_step(sde):
  process = diffusion.RectifiedFlow(SD3, sde=sde)
  t, prev_t = process.grid(10, density=True)
  x, v, after = draw(11, 10, 2, 2, 1), draw(12, 10, 2, 2, 1), draw(13, 10, 2, 2, 1)

  def density(v):
    return jnp.sum(diffusion.gaussian_log_prob(after, *process.transition(v, x, t, prev_t, eta=0.7)))

  slope = jax.grad(density)(jnp.asarray(v))
  assert np.isfinite(slope).all() and (np.abs(slope) > 0).all()


@pytest.mark.parametrize("sde", EQUATIONS)
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
def test_a_step_that_goes_nowhere_stays(sde, s):
  """SPO's rollout takes such steps and drops them."""
  x, at = draw(14), jnp.full((3,), s)
  mean, std = flow.mean_std(draw(15), x, at, at, eta=0.7, sde=sde)
  assert np.isfinite(std).all()
  if sde != "cps":
    np.testing.assert_array_equal(mean, x)
    np.testing.assert_array_equal(std, 0.0)
  assert np.isfinite(mean).all()


def test_unknown_noise_is_refused():
  with pytest.raises(ValueError, match="sde is 'vp', expected one of flow_grpo, dance, cps"):
    diffusion.RectifiedFlow(SD3, sde="vp")
  with pytest.raises(ValueError, match="eta is 1.5, expected between 0 and 1 for sde 'cps'"):
    flow.mean_std(draw(0), draw(1), jnp.ones(3), jnp.zeros(3), eta=1.5, sde="cps")


def test_rollout_of_spo_runs_on_flow():
  """Its groups, thresholds and scores, at times that are not integers."""
  score = lambda x0, t: Scores(jnp.mean(x0, axis=(1, 2, 3)) + 0 * t, {})
  found = spo.pool_rollout(
    predict,
    score,
    PROCESS,
    jnp.asarray(draw(16)),
    jax.random.key(0),
    num_steps=6,
    eta=0.7,
    warmup_steps=1,
    pool_size=3,
    inner_steps=0,
    threshold=0.0,
    threshold_max=0.5,
  )
  times = diffusion.sigma_grid(SD3, 6) * 1000
  np.testing.assert_allclose(found.shared.t[0], times[[1, 2, 3, 4]], rtol=1e-6)
  np.testing.assert_allclose(found.score_t, times[[2, 3, 4, 6]], rtol=1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)) and found.latents.std() > 0.1
  limits = pools.step_thresholds(PROCESS, 6, eta=0.7, threshold=0.1, threshold_max=0.5)
  assert limits.min() == np.float32(0.1) and limits.max() == np.float32(0.5)


# ---------------------------------------------------------------------------------------------
# Training times

DRAWS = 40_000


def unshifted(t, shift):
  s = np.float64(t) / 1000
  return s / (shift - (shift - 1) * s)


def mode_cdf(s, scale):
  """P(f(u) <= s) of the decreasing f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u), by interpolation."""
  u = np.linspace(0.0, 1.0, 100_001)
  f = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
  return 1.0 - np.interp(s, f[::-1], u[::-1])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
  ("settings", "cdf"),
  [
    ({"density": "uniform"}, lambda s, stats: s),
    ({"density": "logit_normal"}, lambda s, stats: stats.norm.cdf(np.log(s / (1 - s)))),
    (
      {"density": "logit_normal", "logit_mean": 0.8, "logit_std": 0.6},
      lambda s, stats: stats.norm.cdf(np.log(s / (1 - s)), 0.8, 0.6),
    ),
    ({"density": "mode"}, lambda s, stats: mode_cdf(s, 1.29)),
    ({"density": "mode", "mode_scale": -0.5}, lambda s, stats: mode_cdf(s, -0.5)),
  ],
)
def test_training_times_have_their_density_before_the_shift(settings, cdf, shift):
  stats = pytest.importorskip("scipy.stats")
  process = diffusion.RectifiedFlow(diffusion.FlowSchedule(shift=shift), training=diffusion.TrainingTimes(**settings))
  t = jax.jit(lambda key: process.sample_times(key, DRAWS))(jax.random.key(5))
  assert t.dtype == jnp.float32 and t.shape == (DRAWS,) and t.min() > 0 and t.max() <= 1000
  s = np.clip(unshifted(t, shift), 1e-9, 1 - 1e-9)
  # The lowest thousandth is moved to 1 / T.
  assert stats.kstest(s, lambda s: cdf(s, stats)).statistic < 0.009  # 1.8 / sqrt(DRAWS): 0.2 % of all keys
  assert s.min() > 0.99e-3


@pytest.mark.parametrize(("name", "scale"), [("logit_normal", None), ("mode", 1.29), ("none", None)])
def test_training_times_are_distributed_as_diffusers(name, scale):
  """As its training scripts draw them: an index into the shifted table, from the noisy end."""
  torch = pytest.importorskip("torch")
  utils = pytest.importorskip("diffusers.training_utils")
  stats = pytest.importorskip("scipy.stats")
  import diffusers

  u = utils.compute_density_for_timestep_sampling(
    name, DRAWS, logit_mean=0.5, logit_std=1.0, mode_scale=scale, generator=torch.Generator().manual_seed(0)
  )
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[(u * 1000).long().clip(0, 999)]
  training = diffusion.TrainingTimes("uniform" if name == "none" else name, logit_mean=-0.5)  # from the noisy end
  ours = diffusion.RectifiedFlow(SD3, training=training).sample_times(jax.random.key(6), DRAWS)
  assert stats.ks_2samp(ours, theirs.numpy()).statistic < 0.013  # 1.86 / sqrt(DRAWS / 2)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
def test_bins_run_over_the_shifted_grid_from_the_noisy_end(gamma):
  bins = 10
  t = PROCESS.sample_times(jax.random.key(7), DRAWS, gamma=gamma, num_bins=bins)
  edges = 1000 * flow.shifted(1.0 - np.arange(bins + 1) / bins, 3.0)
  counts = np.histogram(t, edges[::-1])[0][::-1]
  expected = gamma ** np.arange(bins)
  expected = DRAWS * expected / expected.sum()
  assert counts.sum() == DRAWS
  assert np.abs(counts - expected).max() / np.sqrt(expected).max() < 4
  assert (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
  ("density", "options", "message"),
  [
    ("logit_normal", {"gamma": 0.9}, "gamma is 0.9 with the density 'logit_normal', expected 1"),
    ("uniform", {"gamma": 0.0}, "gamma is 0.0, expected a positive decay"),
    ("uniform", {"num_bins": 1001}, "num_bins is 1001, expected between 1 and num_train_timesteps 1000"),
  ],
)
def test_impossible_bins_are_refused(density, options, message):
  process = diffusion.RectifiedFlow(SD3, training=diffusion.TrainingTimes(density))
  with pytest.raises(ValueError, match=message):
    process.sample_times(jax.random.key(0), 4, **options)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"density": "cosine"}, "density is 'cosine', expected one of uniform, logit_normal, mode"),
    ({"weight": "snr"}, "weight is 'snr', expected one of none, sigma_sqrt, cosmap"),
    ({"logit_std": 0.0}, "logit_std is 0.0, expected a number above 0"),
    ({"logit_mean": float("inf")}, "logit_mean is inf, expected a number"),
    ({"mode_scale": 2.0}, "mode_scale is 2.0, expected between -1 and"),
  ],
)
def test_impossible_training_times_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    diffusion.TrainingTimes(**settings)


@pytest.mark.parametrize("weight", flow.LOSS_WEIGHTS)
def test_weights_of_the_loss_equal_diffusers(weight):
  torch = pytest.importorskip("torch")
  utils = pytest.importorskip("diffusers.training_utils")
  s = np.asarray([0.001, 0.1, 0.5, 0.9, 1.0], np.float32)
  process = diffusion.RectifiedFlow(SD3, training=diffusion.TrainingTimes(weight=weight))
  expected = utils.compute_loss_weighting_for_sd3(weight, torch.from_numpy(s))
  np.testing.assert_allclose(flow.loss_weight(s, weight), expected, rtol=1e-6)
  found = process.loss_weight(1000 * s)
  if weight == "none":
    assert found is None  # so that nothing is multiplied
  else:
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_reward_scale_follows_the_noise_ratio_to_stable_diffusions_smallest_snr():
  most = 1 / math.sqrt(4.6e-3)
  s = np.asarray([0.0, 0.1, 0.5, 0.9, 0.936, 0.937, 1.0])
  expected = [1.0, 1 + 1 / 9 / most, 1 + 1 / most, 1 + 9 / most, 1 + 0.936 / 0.064 / most, 2.0, 2.0]
  for schedule in (SD3, diffusion.FlowSchedule()):  # whatever the shift
    found = diffusion.RectifiedFlow(schedule).reward_scale(jnp.asarray(1000 * s))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_reward_scale_is_stable_diffusions_at_the_same_snr():
  """But for the ends of its schedule: the smallest ratio, 0.029, is 0 here, and the largest, 14.61, is 14.74."""
  settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
  schedule, t = diffusion.schedule_from_config(settings), jnp.arange(0, 1000, 37)
  alpha, sigma = diffusion.alpha_sigma(schedule, t)
  found = flow.reward_scale(sigma / (alpha + sigma))
  np.testing.assert_allclose(found, diffusion.timestep_reward_scale(schedule, t), atol=1e-2)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"schedule": SD3, "mu": 0.5}, "mu is 0.5 and the schedule has the static shift 3, expected one of the two"),
    ({"schedule": diffusion.FlowSchedule(use_dynamic_shifting=True)}, "mu is None, expected a number"),
    ({"schedule": SD3, "spacing": "even"}, "spacing is 'even', expected one of scheduler, pipeline"),
  ],
)
def test_impossible_processes_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    diffusion.RectifiedFlow(**arguments)


def test_process_is_a_static_argument():
  """It is hashable and equal by value, so a jitted function is compiled once."""
  assert hash(PROCESS) == hash(diffusion.RectifiedFlow(diffusion.FlowSchedule(shift=3.0)))
  assert diffusion.RectifiedFlow(diffusion.FlowSchedule(shift=3.0)) == PROCESS
  process: diffusion.Process = PROCESS
  assert process.num_train_timesteps == 1000
