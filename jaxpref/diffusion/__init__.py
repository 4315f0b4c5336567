"""Noise processes as pure functions: `from jaxpref import diffusion`, then `diffusion.add_noise(schedule, ...)`.

`gaussian` is the process of Stable Diffusion, `transitions` are steps back through it, `times` chooses the timesteps to
train on, and `process` puts all of it behind the interface that methods use. Import `jaxpref.diffusion.samplers`, which
takes all the steps, separately.
"""

from jaxpref.diffusion.gaussian import (
  BETA_SCHEDULES,
  PREDICTION_TYPES,
  TIMESTEP_SPACINGS,
  Schedule,
  add_noise,
  alpha_sigma,
  convert_prediction,
  get_velocity,
  schedule_from_config,
  snr,
  squared_error,
  to_epsilon,
  to_velocity,
  to_x0,
  training_target,
)
from jaxpref.diffusion.process import (
  Process,
  VariancePreserving,
)
from jaxpref.diffusion.times import (
  sample_timesteps,
  timestep_reward_scale,
)
from jaxpref.diffusion.transitions import (
  SolverSteps,
  ddim_mean_std,
  ddim_prev_timesteps,
  ddim_timesteps,
  dpm_solver_steps,
  dpm_solver_timesteps,
  gaussian_log_prob,
)

__all__ = [
  "BETA_SCHEDULES",
  "PREDICTION_TYPES",
  "Process",
  "Schedule",
  "SolverSteps",
  "TIMESTEP_SPACINGS",
  "VariancePreserving",
  "add_noise",
  "alpha_sigma",
  "convert_prediction",
  "ddim_mean_std",
  "ddim_prev_timesteps",
  "ddim_timesteps",
  "dpm_solver_steps",
  "dpm_solver_timesteps",
  "gaussian_log_prob",
  "get_velocity",
  "sample_timesteps",
  "schedule_from_config",
  "snr",
  "squared_error",
  "timestep_reward_scale",
  "to_epsilon",
  "to_velocity",
  "to_x0",
  "training_target",
]
