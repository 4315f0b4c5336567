"""Noise levels of rectified flow against diffusers' schedulers, and what a scheduler_config.json may say."""

import numpy as np
import pytest

from jaxpref import diffusion
from jaxpref.diffusion import flow_schedule

TABLE = dict(rtol=0, atol=1e-6)  # of levels in [0, 1]; measured: 1.2e-7, two ulps below 1

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
CONFIGS = {
  "plain": {},
  "sd3": SD3,
  "shift_below_1": {"shift": 0.5},
  "short_table": {"num_train_timesteps": 100, "shift": 2.0},
  "dynamic": FLUX,
  "dynamic_linear": FLUX | {"time_shift_type": "linear"},
  "terminal": {"shift": 3.0, "shift_terminal": 0.1},
  "qwen": FLUX | {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
  "karras": {"shift": 3.0, "use_karras_sigmas": True},
  "exponential": {"shift": 3.0, "use_exponential_sigmas": True},
  "beta": {"shift": 3.0, "use_beta_sigmas": True},
  "dynamic_karras": FLUX | {"use_karras_sigmas": True},
  "terminal_beta": {"shift_terminal": 0.05, "use_beta_sigmas": True},
}
TOKENS = 1024
configs = pytest.mark.parametrize("name", CONFIGS)


def mu_of(schedule):
  return diffusion.mu_of_tokens(schedule, TOKENS) if schedule.use_dynamic_shifting else None


def euler(name, num_steps, sigmas=None):
  """diffusers' scheduler, its timesteps set."""
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(CONFIGS[name])
  mu = mu_of(diffusion.flow_from_config(CONFIGS[name]))
  scheduler.set_timesteps(num_steps if sigmas is None else None, mu=mu, sigmas=sigmas)
  return scheduler


@configs
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 28, 100])
def test_grid_equals_diffusers(name, num_steps):
  if num_steps == 1 and "shift_terminal" in CONFIGS[name]:
    pytest.skip("theirs is not a number; ours refuses, see below")
  schedule = diffusion.flow_from_config(CONFIGS[name])
  found = diffusion.sigma_grid(schedule, num_steps, mu=mu_of(schedule))
  theirs = euler(name, num_steps)
  assert found.dtype == np.float32 and found[-1] == 0.0
  np.testing.assert_allclose(found, theirs.sigmas.numpy(), **TABLE)
  process = diffusion.RectifiedFlow(schedule, mu_of(schedule))
  t, prev_t = process.grid(num_steps)
  assert t.dtype == np.float32 and t.shape == prev_t.shape == (num_steps,)
  np.testing.assert_allclose(t / schedule.num_train_timesteps, theirs.timesteps / schedule.num_train_timesteps, **TABLE)
  np.testing.assert_array_equal(prev_t, [*t[1:], 0.0])


@configs
def test_grid_from_a_pipelines_sigmas_equals_diffusers(name):
  """FLUX's pipeline gives its scheduler even levels from 1 to 1 / n."""
  schedule, even = diffusion.flow_from_config(CONFIGS[name]), np.linspace(1.0, 1.0 / 20, 20)
  theirs = euler(name, 20, sigmas=even.tolist()).sigmas.numpy()
  found = diffusion.sigma_grid(schedule, 20, mu=mu_of(schedule), sigmas=even.tolist())
  np.testing.assert_allclose(found, theirs, **TABLE)
  t, _ = diffusion.RectifiedFlow(schedule, mu_of(schedule), spacing="pipeline").grid(20)
  np.testing.assert_allclose(t / schedule.num_train_timesteps, theirs[:-1], **TABLE)


def test_stable_diffusion_3_visits_these_levels():
  """A static shift of 3 is applied to the table's end and to the grid, as in diffusers."""
  levels = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
  np.testing.assert_allclose(diffusion.sigma_grid(diffusion.flow_from_config(SD3), 10), levels, atol=5e-5)


def test_mu_equals_the_pipelines():
  pytest.importorskip("torch")
  module = pytest.importorskip("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3")
  schedule = diffusion.flow_from_config(FLUX)
  for tokens in (64, 256, 1024, 4096, 16384):
    np.testing.assert_allclose(diffusion.mu_of_tokens(schedule, tokens), module.calculate_shift(tokens), rtol=1e-12)


@pytest.mark.parametrize("a", [0.3, 0.6, 2.5])
def test_quantiles_of_the_beta_distribution_equal_scipys(a):
  stats = pytest.importorskip("scipy.stats")
  p = np.concatenate([np.linspace(0.0, 1.0, 41), [1e-9, 1e-4, 0.4999, 1.0 - 1e-6]])
  np.testing.assert_allclose(flow_schedule._beta_quantile(p, a), stats.beta.ppf(p, a, a), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------
# DPM-Solver++


@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 10, 20, 45, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, "dynamic"])
def test_solver_times_and_levels_equal_diffusers(shift, num_steps):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
  if shift == "dynamic":
    config |= {"use_dynamic_shifting": True}
  else:
    config |= {"flow_shift": shift}
  theirs = diffusers.DPMSolverMultistepScheduler(**config)
  schedule = diffusion.flow_from_config({**theirs.config, "_class_name": "DPMSolverMultistepScheduler"})
  theirs.set_timesteps(num_steps, mu=mu_of(schedule))
  steps = flow_schedule.solver_steps(schedule, num_steps, mu=mu_of(schedule))
  assert steps.t.dtype == np.float32
  np.testing.assert_array_equal(steps.t, theirs.timesteps)
  np.testing.assert_allclose(-steps.x0_of_pred, theirs.sigmas[:-1], **TABLE)
  assert steps.old[0] == steps.old[-1] == steps.keep[-1] == 0.0 and steps.new[-1] == 1.0


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"shift_terminal": 0.1}, "the schedule has shift_terminal, with which DPM-Solver"),
    ({"use_beta_sigmas": True}, "the schedule has beta sigmas, with which DPM-Solver"),
  ],
)
def test_solver_refuses_levels_that_diffusers_gives_it_not(config, message):
  with pytest.raises(ValueError, match=message):
    flow_schedule.solver_steps(diffusion.flow_from_config(config), 10)


# ---------------------------------------------------------------------------------------------
# Configs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_scheduler_of_diffusers_is_read_as_rectified_flow_or_refused():
  """From the file that its class writes by itself, and with use_flow_sigmas."""
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  read = {False: set(), True: set()}
  for name in dir(diffusers.schedulers):
    kind = getattr(diffusers, name, None)
    try:
      theirs = kind() if name.endswith("Scheduler") else None
    except (ImportError, TypeError, ValueError, AttributeError):  # another library is missing, or what it samples
      continue
    if theirs is None:
      continue
    for solver in read:
      config = {**theirs.config, "_class_name": name}
      if solver:
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
      try:
        diffusion.flow_from_config(config)
        read[solver].add(name)
      except ValueError as error:
        assert "_class_name" in str(error), name
  flow = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
  assert read[False] == flow
  solvers = "DEISMultistep DPMSolverMultistep DPMSolverSinglestep SASolver UniPCMultistep".split()
  assert read[True] >= flow and {f"{name}Scheduler" for name in solvers} >= read[True] - flow
  assert {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"} <= read[True]


def test_values_are_read_under_the_names_of_each_class():
  assert diffusion.flow_from_config(SD3) == diffusion.FlowSchedule(shift=3.0)
  solver = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0, "shift": 2.0}
  assert diffusion.flow_from_config(solver | {"prediction_type": "flow_prediction"}).shift == 5.0
  nothing = dict.fromkeys(["_class_name", "shift", "use_dynamic_shifting", "shift_terminal", "num_train_timesteps"])
  assert diffusion.flow_from_config(nothing) == diffusion.flow_from_config({}) == diffusion.FlowSchedule()
  assert diffusion.flow_from_config({"shift_terminal": 0}).shift_terminal is None


def test_dynamic_shift_beside_an_ignored_static_one_is_read_once_that_is_null():
  published = FLUX | {"shift": 3.0}  # FLUX.1-dev
  with pytest.raises(ValueError, match="shift to null"):
    diffusion.flow_from_config(published)
  assert diffusion.flow_from_config(published | {"shift": None}).use_dynamic_shifting


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"_class_name": "DDIMScheduler"}, "_class_name is DDIMScheduler, expected a scheduler of rectified flow"),
    ({"_class_name": "FlowMatchLCMScheduler"}, "_class_name is FlowMatchLCMScheduler, expected"),
    ({"_class_name": "DPMSolverMultistepScheduler"}, "or a solver with use_flow_sigmas"),
    (
      {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
      "prediction_type is 'epsilon', expected 'flow_prediction' beside use_flow_sigmas",
    ),
    (
      {
        "_class_name": "UniPCMultistepScheduler",
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "use_karras_sigmas": True,
      },
      "use_flow_sigmas and use_karras_sigmas are true, expected one of them",
    ),
    ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas are true, expected"),
    ({"invert_sigmas": True}, "invert_sigmas is true, which is not implemented"),
    ({"stochastic_sampling": True}, "stochastic_sampling is true, which is not implemented"),
    ({"shift": 3.0, "use_dynamic_shifting": True}, "shift is 3 and use_dynamic_shifting is true, expected one of the"),
    ({"shift": 0}, "shift is 0, expected a number above 0"),
    ({"shift": "3"}, "shift is '3', expected a number above 0"),
    ({"shift": float("nan")}, "shift is nan, expected a number above 0"),
    ({"use_dynamic_shifting": "yes"}, "use_dynamic_shifting is 'yes', expected true or false"),
    ({"base_shift": [1]}, r"base_shift is \[1\], expected a number"),
    ({"base_image_seq_len": 4096}, "base_image_seq_len is 4096 and max_image_seq_len 4096, expected a larger maximum"),
    ({"shift_terminal": 1.5}, "shift_terminal is 1.5, expected a sigma between 0 and 1, or null"),
    ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic', expected one of exponential, linear"),
    ({"num_train_timesteps": 1}, "num_train_timesteps is 1, expected an integer above 1"),
    ({"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0, expected an integer above 1"),
  ],
)
def test_unknown_settings_are_refused_by_name(config, message):
  with pytest.raises(ValueError, match=message) as error:
    diffusion.flow_from_config(config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("config", "arguments", "message"),
  [
    ({}, {"num_steps": 0}, "num_steps is 0, expected between 1 and the schedule's 1000"),
    ({}, {"num_steps": 1001}, "num_steps is 1001, expected between 1 and"),
    ({}, {"num_steps": 2, "sigmas": [1.5, 0.5]}, r"sigmas are \[1.5, 0.5\], expected 2 in \(0, 1\], each below"),
    ({}, {"num_steps": 2, "sigmas": [0.5, -0.1]}, r"expected 2 in \(0, 1\]"),
    ({}, {"num_steps": 2, "sigmas": [0.5, 0.5]}, "each below the one before it"),
    ({}, {"num_steps": 2, "sigmas": [0.5]}, r"sigmas are \[0.5\], expected 2"),
    ({}, {"num_steps": 2, "sigmas": [float("nan"), 0.5]}, r"expected 2 in \(0, 1\]"),
    ({"shift": 3.0}, {"num_steps": 2, "mu": 0.5}, "mu is 0.5 and the schedule has the static shift 3, expected one of"),
    (FLUX, {"num_steps": 2}, "mu is None, expected a number, as the schedule"),
    (FLUX | {"time_shift_type": "linear"}, {"num_steps": 2, "mu": -1.0}, "mu is -1.0, expected a number above 0"),
    (
      {"shift_terminal": 0.1},
      {"num_steps": 1},
      "num_steps is 1, expected at least 2, as the",
    ),
  ],
)
def test_impossible_grids_are_refused(config, arguments, message):
  with pytest.raises(ValueError, match=message):
    diffusion.sigma_grid(diffusion.flow_from_config(config), **arguments)
