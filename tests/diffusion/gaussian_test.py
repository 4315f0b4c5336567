"""Schedules, conversions and DDIM against torch diffusers, and the rest against plain numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion

STABLE_DIFFUSION = {
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "set_alpha_to_one": False,
  "steps_offset": 1,
  "clip_sample": False,
}
CONFIGS = {
  "stable_diffusion": STABLE_DIFFUSION,
  "zero_snr": {
    **STABLE_DIFFUSION,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
  },
  "linear": {"clip_sample": False, "prediction_type": "sample", "timestep_spacing": "linspace"},
  "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
  "trained": {
    "trained_betas": np.linspace(0.01, 0.3, 40).tolist(),
    "num_train_timesteps": 40,
    "clip_sample": False,
    "prediction_type": "v_prediction",
  },
}
configs = pytest.mark.parametrize("name", CONFIGS)
TYPES = diffusion.PREDICTION_TYPES
SHAPE = (4, 3, 5, 2)


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape or SHAPE).astype(np.float32)


@functools.cache
def schedule_of(name):
  return diffusion.schedule_from_config(CONFIGS[name])


def torch_scheduler(name, kind="DDIMScheduler", **overrides):
  pytest.importorskip("torch")
  config = {**CONFIGS[name], **overrides}
  if kind == "DDPMScheduler":
    config.pop("set_alpha_to_one", None)  # it always ends in 1
  return getattr(pytest.importorskip("diffusers"), kind)(**config)


def in_torch(fn, *images):
  """Runs a diffusers function on NHWC numpy images, as NCHW torch tensors."""
  import torch

  out = fn(*(torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in images))
  return np.moveaxis(np.asarray(out), 1, -1)


mean_std = jax.jit(diffusion.ddim_mean_std, static_argnames="eta")

# ---------------------------------------------------------------------------------------------
# Schedules


@configs
def test_schedule_equals_diffusers(name):
  ours = schedule_of(name)
  for kind in ("DDIMScheduler", "DDPMScheduler"):
    theirs = torch_scheduler(name, kind)
    assert ours.num_train_timesteps == theirs.config.num_train_timesteps
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-6, atol=1e-9)
  final = torch_scheduler(name).final_alpha_cumprod
  np.testing.assert_allclose(ours.final_alpha_cumprod, final, rtol=1e-6)
  previous = np.concatenate([[1.0], ours.alphas_cumprod[:-1]])
  np.testing.assert_allclose(1 - ours.alphas_cumprod / previous, theirs.betas, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_scheduler_of_diffusers_is_read_as_its_own_process_or_refused():
  """From the file that its class writes by itself."""
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  read, refused = [], []
  for name in dir(diffusers.schedulers):
    kind = getattr(diffusers, name, None)
    try:
      theirs = kind() if name.endswith("Scheduler") else None
    except (ImportError, TypeError, ValueError, AttributeError):  # another library is missing, or what it samples
      continue
    if theirs is None:
      continue
    config = {**theirs.config, "_class_name": name, "clip_sample": False}
    try:
      ours = diffusion.schedule_from_config(config)
    except ValueError as error:
      assert "_class_name" in str(error), name
      refused.append(name)
      continue
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-6, err_msg=name)
    read.append(name)
  assert len(read) == 24 and {"LCMScheduler", "UniPCMultistepScheduler", "CogVideoXDDIMScheduler"} <= set(read)
  assert {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler"} <= set(refused)
  assert diffusion.schedule_from_config({"_class_name": "FlaxPNDMScheduler"}).num_train_timesteps == 1000


def test_a_shifted_snr_is_also_rescaled_as_in_diffusers():
  settings = {"snr_shift_scale": 3.0, "rescale_betas_zero_snr": True}
  theirs = torch_scheduler("stable_diffusion", "CogVideoXDDIMScheduler", **settings)
  ours = diffusion.schedule_from_config(STABLE_DIFFUSION | settings)
  np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_null_stands_for_the_default():
  keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "set_alpha_to_one", "prediction_type",
          "timestep_spacing", "steps_offset", "trained_betas", "_class_name")  # fmt: skip
  found, usual = (diffusion.schedule_from_config(c) for c in (dict.fromkeys(keys), {}))
  jax.tree.map(np.testing.assert_array_equal, found, usual)


def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_first_step():
  plain, rescaled = schedule_of("stable_diffusion"), schedule_of("zero_snr")
  assert rescaled.alphas_cumprod[-1] == 0.0 and plain.alphas_cumprod[-1] > 0.004
  np.testing.assert_allclose(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-6)
  assert np.all(np.diff(rescaled.alphas_cumprod) < 0)


@pytest.mark.parametrize("spacing", diffusion.TIMESTEP_SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_diffusers(spacing, offset):
  settings = {"timestep_spacing": spacing, "steps_offset": offset}
  ours = diffusion.schedule_from_config({**STABLE_DIFFUSION, **settings})
  for kind in ("DDIMScheduler", "DDPMScheduler"):
    theirs = torch_scheduler("stable_diffusion", kind, **settings)
    for num_steps in (1, 2, 4, 7, 20, 25, 30, 50, 61, 999, 1000):
      if spacing == "leading" and offset and num_steps == 1000:
        continue  # theirs starts at 1000, outside the schedule; ours refuses, see below
      theirs.set_timesteps(num_steps)
      timesteps = diffusion.ddim_timesteps(ours, num_steps)
      assert timesteps.dtype == np.int32 and timesteps.shape == (num_steps,)
      # For 61 trailing steps theirs returns a 62nd, -1, from rounding inside arange.
      np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy()[:num_steps])
      assert timesteps.min() >= 0 and timesteps.max() < 1000


def test_previous_timesteps_step_by_the_ratio_and_clamp_on_request():
  schedule = schedule_of("stable_diffusion")
  prev = diffusion.ddim_prev_timesteps(schedule, 20)
  np.testing.assert_array_equal(prev, diffusion.ddim_timesteps(schedule, 20) - 50)
  np.testing.assert_array_equal(prev[:-1], diffusion.ddim_timesteps(schedule, 20)[1:])
  clamped = diffusion.ddim_prev_timesteps(schedule, 20, clamp_last=True)
  np.testing.assert_array_equal(clamped[:-1], prev[:-1])
  assert prev[-1] == -49 and clamped[-1] == 0


def test_a_last_step_without_noise_is_refused_where_its_density_is_wanted():
  for settings in ({"steps_offset": 0}, {"timestep_spacing": "linspace"}):
    schedule = diffusion.schedule_from_config({**STABLE_DIFFUSION, **settings})
    assert diffusion.ddim_prev_timesteps(schedule, 20)[-1] < 0
    with pytest.raises(ValueError, match=r"last of 20 steps .* at timestep 0, .* the schedule \"steps_offset\": 1 "):
      diffusion.ddim_prev_timesteps(schedule, 20, clamp_last=True)
  trailing = diffusion.schedule_from_config({**STABLE_DIFFUSION, "timestep_spacing": "trailing"})
  assert diffusion.ddim_prev_timesteps(trailing, 20, clamp_last=True)[-1] == 0


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', expected one of linear"),
    ({"prediction_type": "flow"}, "prediction_type is 'flow', expected one of epsilon"),
    ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras', expected one of leading"),
    ({"clip_sample": True}, "clip_sample is true"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas is true, expected false"),
    ({"timestep_type": "continuous"}, "timestep_type is 'continuous', expected 'discrete'"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is FlowMatchEulerDiscreteScheduler, expected"),
    ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler, expected a scheduler of diffusers with discrete betas"),
    ({"_class_name": "SCMScheduler"}, "flow matching and EDM are other processes"),
    ({"thresholding": True}, "thresholding is true"),
    ({"trained_betas": [0.1, 0.2]}, r"trained_betas has shape \(2,\), expected \(1000,\)"),
  ],
)
def test_unknown_settings_are_refused_by_name(config, message):
  with pytest.raises(ValueError, match=message):
    diffusion.schedule_from_config(config)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
  with pytest.raises(ValueError, match=f"num_steps is {num_steps}, expected between 1 and"):
    diffusion.ddim_timesteps(schedule_of("stable_diffusion"), num_steps)


def test_timesteps_outside_the_schedule_are_refused():
  with pytest.raises(ValueError, match="start at timestep 1000, outside"):
    diffusion.ddim_timesteps(schedule_of("stable_diffusion"), 1000)


def test_schedule_is_a_pytree_of_two_arrays_with_static_conventions():
  schedule = schedule_of("zero_snr")
  leaves, tree = jax.tree.flatten(schedule)
  assert [np.shape(leaf) for leaf in leaves] == [(1000,), ()]
  back = jax.tree.unflatten(tree, leaves)
  assert (back.prediction_type, back.timestep_spacing, back.steps_offset) == ("v_prediction", "trailing", 1)


# ---------------------------------------------------------------------------------------------
# The forward process and prediction types


@configs
def test_add_noise_and_velocity_equal_diffusers(name):
  theirs, ours = torch_scheduler(name), schedule_of(name)
  last = ours.num_train_timesteps - 1
  t = np.array([0, 1, last // 2, last], np.int32)
  x0, noise = draw(0), draw(1)
  import torch

  expected = in_torch(lambda a, b: theirs.add_noise(a, b, torch.from_numpy(t)), x0, noise)
  np.testing.assert_allclose(diffusion.add_noise(ours, x0, noise, t), expected, atol=2e-6)
  expected = in_torch(lambda a, b: theirs.get_velocity(a, b, torch.from_numpy(t)), x0, noise)
  np.testing.assert_allclose(diffusion.get_velocity(ours, x0, noise, t), expected, atol=2e-6)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_training_target_is_what_the_network_predicts(prediction_type):
  schedule = diffusion.schedule_from_config({**STABLE_DIFFUSION, "prediction_type": prediction_type})
  x0, noise, t = draw(0), draw(1), np.array([0, 300, 700, 999], np.int32)
  abar = schedule.alphas_cumprod[t].astype(np.float64)[:, None, None, None]
  expected = {
    "epsilon": noise,
    "sample": x0,
    "v_prediction": np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0,
  }[prediction_type]
  np.testing.assert_allclose(diffusion.training_target(schedule, x0, noise, t), expected, atol=2e-6)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_every_conversion_of_the_truth_is_the_truth(source, target):
  """From exact x_0 and noise in float64: each prediction type, converted, is each other one."""
  schedule = schedule_of("stable_diffusion")
  t = np.array([0, 250, 600, 999], np.int32)
  x0, noise = draw(0).astype(np.float64), draw(1).astype(np.float64)
  abar = schedule.alphas_cumprod[t].astype(np.float64)[:, None, None, None]
  alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
  truth = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
  x_t = alpha * x0 + sigma * noise
  out = diffusion.convert_prediction(schedule, truth[source], x_t, jnp.asarray(t), source=source, target=target)
  # The conversion divides by alpha or sigma, which magnifies rounding by up to 1 / 0.03.
  np.testing.assert_allclose(out, truth[target], atol=1e-4 if source != target else 1e-6)


def test_named_conversions_read_the_type_from_the_schedule():
  x_t, pred, t = draw(0), draw(1), np.array([1, 200, 500, 900], np.int32)
  convert = {
    "sample": diffusion.to_x0,
    "epsilon": diffusion.to_epsilon,
    "v_prediction": diffusion.to_velocity,
  }
  for source in TYPES:
    schedule = diffusion.schedule_from_config({**STABLE_DIFFUSION, "prediction_type": source})
    for target, fn in convert.items():
      expected = diffusion.convert_prediction(
        schedule_of("stable_diffusion"), pred, x_t, t, source=source, target=target
      )
      np.testing.assert_array_equal(fn(schedule, pred, x_t, t), expected)


def test_conversions_at_zero_terminal_snr():
  """v and sample predictions are exact where there is no signal; epsilon stays finite."""
  schedule = schedule_of("zero_snr")
  t = np.full(SHAPE[0], 999, np.int32)
  x0, noise = draw(0), draw(1)
  x_t = diffusion.add_noise(schedule, x0, noise, t)
  np.testing.assert_array_equal(x_t, noise)
  v = diffusion.training_target(schedule, x0, noise, t)
  np.testing.assert_allclose(diffusion.to_x0(schedule, v, x_t, t), x0, atol=1e-6)
  np.testing.assert_allclose(diffusion.to_epsilon(schedule, v, x_t, t), noise, atol=1e-6)
  for source in TYPES:
    for target in TYPES:
      fn = functools.partial(diffusion.convert_prediction, schedule, x_t=x_t, t=t, source=source, target=target)
      value, grad = jax.value_and_grad(lambda p, f=fn: f(p).sum())(jnp.asarray(v))
      assert np.isfinite(value) and np.all(np.isfinite(grad)), (source, target)


def test_snr_is_the_ratio_of_signal_to_noise():
  abar = schedule_of("stable_diffusion").alphas_cumprod.astype(np.float64)
  t = np.arange(0, 1000, 37)
  np.testing.assert_allclose(diffusion.snr(schedule_of("stable_diffusion"), t), (abar / (1 - abar))[t], rtol=1e-3)
  assert diffusion.snr(schedule_of("zero_snr"), np.array([999]))[0] == 0.0


def test_squared_error_is_the_mean_over_all_but_the_batch_in_float32():
  pred, target = draw(0), draw(1)
  expected = [np.mean((p.astype(np.float64) - q) ** 2) for p, q in zip(pred, target, strict=True)]
  np.testing.assert_allclose(diffusion.squared_error(pred, target), expected, rtol=1e-6)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (pred, target)]
  out = diffusion.squared_error(*half)
  assert out.dtype == jnp.float32
  np.testing.assert_array_equal(out, diffusion.squared_error(*(x.astype(jnp.float32) for x in half)))
  grad = jax.grad(lambda p: diffusion.squared_error(p, target).sum())(jnp.asarray(pred))
  np.testing.assert_allclose(grad, 2 * (pred - target) / np.prod(SHAPE[1:]), rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# DDIM


@configs
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_equals_diffusers(name, eta):
  """Every step of a short trajectory, the first (perhaps of zero SNR) and the last included."""
  theirs, ours = torch_scheduler(name), schedule_of(name)
  num_steps = 4
  theirs.set_timesteps(num_steps)
  x, noise = draw(0), draw(9)
  prevs = diffusion.ddim_prev_timesteps(ours, num_steps)
  for i, (t, prev) in enumerate(zip(theirs.timesteps.tolist(), prevs, strict=True)):
    pred = 0.5 * draw(i + 1)
    expected = in_torch(
      lambda p, s, n, t=t: (
        theirs.step(p, t, s, eta=eta, variance_noise=n).prev_sample
        if eta
        else theirs.step(p, t, s, eta=eta).prev_sample
      ),
      pred,
      x,
      noise,
    )
    ts, ps = (np.full(SHAPE[0], v, np.int32) for v in (t, prev))
    mean, std = mean_std(ours, pred, x, ts, ps, eta=eta)
    out = np.asarray(mean) + np.asarray(std)[:, None, None, None] * noise
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(out / scale, expected / scale, atol=1e-5)
    # Without noise at eta 0, and where the step ends in an abar of 1 or does not move at all.
    goes_to = ours.alphas_cumprod[prev] if prev >= 0 else ours.final_alpha_cumprod
    assert np.all((np.asarray(std) > 0) == (eta > 0 and ours.alphas_cumprod[t] < goes_to < 1))
    x = draw(20 + i)


def test_ancestral_ddim_over_all_steps_is_ddpm():
  """eta = 1 and T steps: diffusers' DDPM step with the same noise, the posterior of x_{t-1}."""
  torch = pytest.importorskip("torch")
  ddpm = torch_scheduler("stable_diffusion", "DDPMScheduler")
  schedule = schedule_of("stable_diffusion")
  x, pred = draw(0), draw(1)
  for t in (999, 500, 3):
    noise = torch.randn(SHAPE[0], SHAPE[3], *SHAPE[1:3], generator=torch.Generator().manual_seed(t))
    expected = in_torch(
      lambda p, s, t=t: ddpm.step(p, t, s, generator=torch.Generator().manual_seed(t)).prev_sample,
      pred,
      x,
    )
    ts = np.full(SHAPE[0], t, np.int32)
    mean, std = mean_std(schedule, pred, x, ts, ts - 1, eta=1.0)
    noise = np.moveaxis(noise.numpy(), 1, -1)
    out = np.asarray(mean) + np.asarray(std)[:, None, None, None] * noise
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_steps_of_a_batch_use_their_own_timesteps():
  schedule = schedule_of("stable_diffusion")
  x, pred = draw(0), draw(1)
  t, prev = np.array([1, 251, 501, 951], np.int32), np.array([-49, 201, 451, 901], np.int32)
  mean, std = mean_std(schedule, pred, x, t, prev, eta=1.0)
  for i in range(4):
    rows = np.full(4, i)
    one_mean, one_std = mean_std(schedule, pred, x, t[rows], prev[rows], eta=1.0)
    np.testing.assert_allclose(one_mean[i], mean[i], rtol=1e-6)
    np.testing.assert_allclose(one_std[i], std[i], rtol=1e-6)
  assert len(np.unique(np.asarray(std))) == 4


def test_clamping_the_last_step_keeps_its_density():
  """abar_0 in the place of the final abar: std > 0 and a finite log-probability."""
  schedule = schedule_of("stable_diffusion")
  x, pred = draw(0), draw(1)
  t = np.full(SHAPE[0], diffusion.ddim_timesteps(schedule, 20)[-1], np.int32)
  for clamp in (False, True):
    last = diffusion.ddim_prev_timesteps(schedule, 20, clamp_last=clamp)[-1]
    mean, std = mean_std(schedule, pred, x, t, np.full_like(t, last), eta=1.0)
    assert np.all(np.asarray(std) > 1e-3)
    assert np.all(np.isfinite(diffusion.gaussian_log_prob(mean, mean, std)))
  to_one = diffusion.schedule_from_config({**STABLE_DIFFUSION, "set_alpha_to_one": True})
  _, std = mean_std(to_one, pred, x, t, np.full_like(t, -49), eta=1.0)
  assert not np.any(std)
  _, std = mean_std(to_one, pred, x, t, np.zeros_like(t), eta=1.0)
  assert np.all(np.asarray(std) > 1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_ddim_is_finite_at_zero_terminal_snr_and_for_any_eta(eta, prediction_type):
  schedule = diffusion.schedule_from_config({**CONFIGS["zero_snr"], "prediction_type": prediction_type})
  t, prev = np.array([999, 999, 999, 50], np.int32), np.array([949, 999, -1, -1], np.int32)
  x, pred = jnp.asarray(draw(0)), jnp.asarray(draw(1))

  def total(pred):
    mean, std = diffusion.ddim_mean_std(schedule, pred, x, t, prev, eta=eta)
    return diffusion.gaussian_log_prob(x, mean, jnp.maximum(std, 0.1)).sum(), (mean, std)

  (_, (mean, std)), grad = jax.value_and_grad(total, has_aux=True)(pred)
  for value in (mean, std, grad):
    assert np.all(np.isfinite(value))
  # A step from 999 to 999 goes nowhere and draws no noise.
  assert std[1] == 0.0
  if prediction_type == "v_prediction":
    np.testing.assert_allclose(mean[1], x[1], rtol=1e-5)


def test_gaussian_log_prob_equals_the_mean_log_density():
  torch = pytest.importorskip("torch")
  x, mean, std = draw(0), draw(1), np.array([0.01, 0.3, 1.0, 7.0], np.float32)
  normal = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(std)[:, None, None, None])
  expected = normal.log_prob(torch.from_numpy(x)).mean(dim=(1, 2, 3))
  np.testing.assert_allclose(diffusion.gaussian_log_prob(x, mean, std), expected, rtol=1e-5)
  grad = jax.grad(lambda m: diffusion.gaussian_log_prob(x, m, std).sum())(jnp.asarray(mean))
  closed_form = (x - mean) / std[:, None, None, None] ** 2 / np.prod(SHAPE[1:])
  np.testing.assert_allclose(grad, closed_form, rtol=1e-4)


def test_gaussian_log_prob_is_greatest_at_the_mean_and_finite_without_variance():
  mean, std = draw(0), np.array([0.5, 0.5, 0.0, 1e-30], np.float32)
  at_mean = diffusion.gaussian_log_prob(mean, mean, std)
  np.testing.assert_allclose(at_mean[:2], -math.log(0.5 * math.sqrt(2 * math.pi)), rtol=1e-5)
  away = diffusion.gaussian_log_prob(mean + 0.1, mean, std)
  assert np.all(np.isfinite(at_mean)) and np.all(np.isfinite(away))
  assert np.all(np.asarray(away) < np.asarray(at_mean))
  grad = jax.grad(lambda m: diffusion.gaussian_log_prob(mean + 0.1, m, std).sum())(jnp.asarray(mean))
  assert np.all(np.isfinite(grad))


def test_half_precision_predictions_are_stepped_in_float32():
  schedule = schedule_of("stable_diffusion")
  x, pred = (jnp.asarray(draw(s), jnp.bfloat16) for s in range(2))
  t = np.full(SHAPE[0], 501, np.int32)
  mean, std = mean_std(schedule, pred, x, t, t - 50, eta=1.0)
  full = mean_std(schedule, pred.astype(jnp.float32), x.astype(jnp.float32), t, t - 50, eta=1.0)
  for ours, expected in zip((mean, std), full, strict=True):
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, expected)
  for fn in (diffusion.add_noise, diffusion.training_target, diffusion.to_x0, diffusion.to_epsilon):
    args = (schedule, x, pred, t)
    assert fn(*args).dtype == jnp.float32
  assert diffusion.gaussian_log_prob(x, pred, std).dtype == jnp.float32


def test_shapes_that_would_broadcast_are_refused():
  schedule = schedule_of("stable_diffusion")
  x, t = jnp.zeros(SHAPE), jnp.zeros(SHAPE[0], jnp.int32)
  for call in (
    lambda: diffusion.add_noise(schedule, x, x[:1], t),
    lambda: diffusion.training_target(schedule, x, x, t[:1]),
    lambda: diffusion.to_x0(schedule, x, x, t[0]),
    lambda: diffusion.ddim_mean_std(schedule, x, x, t, t[:1], eta=1.0),
    lambda: diffusion.gaussian_log_prob(x, x, jnp.ones(1)),
    lambda: diffusion.squared_error(x, x[..., :1]),
  ):
    with pytest.raises(ValueError, match=r"expected .*\[B, \.\.\.\], got"):
      call()
  with pytest.raises(ValueError, match="target is 'x0', expected one of epsilon"):
    diffusion.convert_prediction(schedule, x, x, t, target="x0")


# ---------------------------------------------------------------------------------------------
# Timestep-aware training


def histogram(**kwargs):
  draws = diffusion.sample_timesteps(jax.random.key(3), 50_000, num_train_timesteps=1000, **kwargs)
  assert draws.dtype == jnp.int32 and draws.shape == (50_000,)
  t = np.asarray(draws)
  assert t.min() >= 0 and t.max() < 1000
  return t


@pytest.mark.parametrize("num_bins", [1, 7, 20, 64])
def test_gamma_one_is_uniform_whatever_the_bins(num_bins):
  counts = np.bincount(histogram(gamma=1.0, num_bins=num_bins) // 100, minlength=10)
  # 5 standard deviations of a binomial count.
  np.testing.assert_allclose(counts, 5000, atol=5 * math.sqrt(50_000 * 0.1 * 0.9))


@pytest.mark.parametrize("gamma", [0.9, 0.8])
def test_bins_are_drawn_in_proportion_to_gamma_to_the_i_from_the_noisiest(gamma):
  t = histogram(gamma=gamma, num_bins=20)
  counts = np.bincount((999 - t) // 50, minlength=20)
  weights = gamma ** np.arange(20)
  p = weights / weights.sum()
  assert np.all(np.abs(counts - 50_000 * p) < 5 * np.sqrt(50_000 * p * (1 - p)))
  inside = np.bincount((999 - t[t >= 950]) // 10, minlength=5)
  np.testing.assert_allclose(inside / inside.sum(), 0.2, atol=0.02)


def test_timesteps_depend_on_the_key_alone():
  sample = functools.partial(diffusion.sample_timesteps, batch=64, num_train_timesteps=1000, gamma=0.9)
  np.testing.assert_array_equal(sample(jax.random.key(0)), sample(jax.random.key(0)))
  assert np.any(sample(jax.random.key(0)) != sample(jax.random.key(1)))
  for bad, message in (({"gamma": 0.0}, "gamma is 0.0"), ({"num_bins": 0}, "num_bins is 0")):
    with pytest.raises(ValueError, match=message):
      sample(jax.random.key(0), **bad)


@pytest.mark.parametrize("name", ["stable_diffusion", "linear", "cosine", "trained"])
def test_reward_scale_equals_its_derivation(name):
  abar = schedule_of(name).alphas_cumprod.astype(np.float64)
  ratio = np.sqrt((1 - abar) / abar)
  expected = 1 + (ratio - ratio.min()) / (ratio.max() - ratio.min())
  t = np.arange(len(abar))
  scale = np.asarray(diffusion.timestep_reward_scale(schedule_of(name), t))
  np.testing.assert_allclose(scale, expected, rtol=1e-4)
  assert scale[0] == 1.0 and scale[-1] == 2.0 and np.all(np.diff(scale) >= 0)


def test_reward_scale_does_not_depend_on_the_batch():
  schedule = schedule_of("stable_diffusion")
  t = np.array([999, 0, 500, 20], np.int32)
  whole = diffusion.timestep_reward_scale(schedule, t)
  for i in range(4):
    one = diffusion.timestep_reward_scale(schedule, t[i : i + 1])
    np.testing.assert_array_equal(one, whole[i : i + 1])


def test_reward_scale_at_zero_terminal_snr_keeps_the_shape_of_stable_diffusion():
  """1 / sqrt(SNR) is infinite at the end; the scale stays in [1, 2] and tells steps apart."""
  t = np.arange(1000)
  scale = np.asarray(diffusion.timestep_reward_scale(schedule_of("zero_snr"), t))
  plain = np.asarray(diffusion.timestep_reward_scale(schedule_of("stable_diffusion"), t))
  assert np.all(np.isfinite(scale)) and scale[0] == 1.0 and scale[-1] == 2.0
  assert np.all(np.diff(scale) >= 0)
  np.testing.assert_allclose(scale[:600], plain[:600], atol=0.06)
