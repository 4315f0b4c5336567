"""Noise processes as pure functions: `from jaxpref import diffusion`, then `diffusion.add_noise(schedule, ...)`.

`gaussian` is the process of Stable Diffusion, `transitions` are steps back through it, `times` chooses the timesteps to
train on, and `process` puts all of it behind the interface that methods use. `flow` and `flow_schedule` are the same
for rectified flow; functions of `flow` stay in it: `diffusion.flow.add_noise`. Import `jaxpref.diffusion.samplers`,
which takes all the steps, separately.
"""

from jaxpref.diffusion import flow
from jaxpref.diffusion.flow import (
  RectifiedFlow,
  TrainingTimes,
)
from jaxpref.diffusion.flow_schedule import (
  FlowSchedule,
  flow_from_config,
  mu_of_tokens,
  sigma_grid,
)
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
  Solvable,
  VariancePreserving,
  Weighing,
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
  "FlowSchedule",
  "PREDICTION_TYPES",
  "Process",
  "RectifiedFlow",
  "Schedule",
  "Solvable",
  "SolverSteps",
  "TIMESTEP_SPACINGS",
  "TrainingTimes",
  "VariancePreserving",
  "Weighing",
  "add_noise",
  "alpha_sigma",
  "convert_prediction",
  "ddim_mean_std",
  "ddim_prev_timesteps",
  "ddim_timesteps",
  "dpm_solver_steps",
  "dpm_solver_timesteps",
  "flow",
  "flow_from_config",
  "gaussian_log_prob",
  "get_velocity",
  "mu_of_tokens",
  "sample_timesteps",
  "schedule_from_config",
  "sigma_grid",
  "snr",
  "squared_error",
  "timestep_reward_scale",
  "to_epsilon",
  "to_velocity",
  "to_x0",
  "training_target",
]
