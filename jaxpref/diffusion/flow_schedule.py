"""The noise levels of rectified flow: what scheduler_config.json says, and the grids that diffusers' samplers visit.

s is what diffusers calls sigma: 0 at the sample, 1 for pure noise. Everything is computed in numpy, in float64.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.diffusion import arrays
from jaxpref.diffusion.transitions import SolverSteps

SIGMA_TYPES = ("flow", "karras", "exponential", "beta")
TIME_SHIFT_TYPES = ("exponential", "linear")


def is_number(value: Any) -> bool:
  """Returns whether it is a finite number, and no bool."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(key: str, value: Any, *, above: float | None = None) -> None:
  if not is_number(value) or (above is not None and not value > above):
    expected = "a number" if above is None else f"a number above {above:g}"
    raise ValueError(f"scheduler config: {key} is {value!r}, expected {expected}.")


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
  """The noise levels of a flow model, as diffusers' `FlowMatchEulerDiscreteScheduler` is configured.

  A shift f moves s to f s / (1 + (f - 1) s), towards noise for f > 1 (arXiv 2403.03206, Eq. 23). It is static, or
  dynamic: exp(mu) or mu itself, with mu linear in the number of image tokens.

  Attributes:
    num_train_timesteps: T, the time of pure noise.
    shift: the static shift; 1 with a dynamic one.
    use_dynamic_shifting: the shift depends on the image size, see `mu_of_tokens`.
    time_shift_type: the dynamic shift is exp(mu), "exponential", or mu, "linear".
    base_shift, max_shift: mu at base_image_seq_len and at max_image_seq_len.
    base_image_seq_len, max_image_seq_len: numbers of image tokens.
    shift_terminal: stretches the levels so that the last one before 0 has this value; None for none.
    sigma_type: "flow", or "karras", "exponential" or "beta" for levels spaced otherwise between the same ends.
  """

  num_train_timesteps: int = 1000
  shift: float = 1.0
  use_dynamic_shifting: bool = False
  time_shift_type: str = "exponential"
  base_shift: float = 0.5
  max_shift: float = 1.15
  base_image_seq_len: int = 256
  max_image_seq_len: int = 4096
  shift_terminal: float | None = None
  sigma_type: str = "flow"

  def __post_init__(self) -> None:
    """Raises ValueError for a value that no sampler can use."""
    total, terminal = self.num_train_timesteps, self.shift_terminal
    if isinstance(total, bool) or not isinstance(total, int) or total < 2:
      raise ValueError(f"scheduler config: num_train_timesteps is {total!r}, expected an integer above 1.")
    if not isinstance(self.use_dynamic_shifting, bool):
      raise ValueError(
        f"scheduler config: use_dynamic_shifting is {self.use_dynamic_shifting!r}, expected true or false."
      )
    _check_number("shift", self.shift, above=0)
    if self.use_dynamic_shifting and self.shift != 1.0:
      raise ValueError(
        f"scheduler config: shift is {self.shift:g} and use_dynamic_shifting is true, expected one of the two; set "
        "use_dynamic_shifting to false, or shift to null (diffusers ignores it there)."
      )
    for key in ("base_shift", "max_shift"):
      _check_number(key, getattr(self, key))
    for key in ("base_image_seq_len", "max_image_seq_len"):
      _check_number(key, getattr(self, key), above=0)
    if not self.base_image_seq_len < self.max_image_seq_len:
      raise ValueError(
        f"scheduler config: base_image_seq_len is {self.base_image_seq_len} and max_image_seq_len "
        f"{self.max_image_seq_len}, expected a larger maximum."
      )
    if terminal is not None and not (is_number(terminal) and 0.0 < terminal < 1.0):
      raise ValueError(f"scheduler config: shift_terminal is {terminal!r}, expected a sigma between 0 and 1, or null.")
    arrays.check_choice("time_shift_type", self.time_shift_type, TIME_SHIFT_TYPES)
    arrays.check_choice("sigma_type", self.sigma_type, SIGMA_TYPES)

  def shift_at(self, mu: float | None = None) -> float:
    """Returns the shift f; a dynamic one needs mu.

    Raises:
      ValueError: mu is missing, makes no shift, or is given beside a static shift.
    """
    if not self.use_dynamic_shifting:
      if mu is not None:
        raise ValueError(
          f"mu is {mu} and the schedule has the static shift {self.shift:g}, expected one of the two: leave mu out, or "
          "set use_dynamic_shifting to true in scheduler_config.json."
        )
      return self.shift
    if mu is None or not is_number(mu):
      raise ValueError(f"mu is {mu}, expected a number, as the schedule's shift is dynamic; `mu_of_tokens` gives it.")
    if self.time_shift_type == "exponential":
      return math.exp(mu)
    if mu <= 0:
      raise ValueError(f"mu is {mu}, expected a number above 0, as the schedule's shift is mu itself.")
    return mu


# Classes of diffusers with the process of rectified flow whose steps are the sampler's choice, and those that have it
# with `use_flow_sigmas`. Distilled models (FlowMatchLCM) need the steps they were distilled for.
_FLOW = frozenset(["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
_SOLVERS = frozenset("DEISMultistep DPMSolverMultistep DPMSolverSinglestep SASolver UniPCMultistep".split())
_SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}


def flow_from_config(config: Mapping[str, Any]) -> FlowSchedule:
  """Builds the schedule that a flow model's `scheduler_config.json` describes.

  Reads what `FlowMatchEulerDiscreteScheduler.from_config` would read, with its defaults for absent keys. Solvers with
  use_flow_sigmas call the shift flow_shift. Keys that only choose a sampler are ignored.

  Args:
    config: the parsed JSON; null means the default. The fields of `FlowSchedule` are used, and use_karras_sigmas,
      use_exponential_sigmas and use_beta_sigmas.
  Returns:
    The `FlowSchedule`.
  Raises:
    ValueError: names a class of another process, or a value that is unknown or not implemented. A static shift beside
      use_dynamic_shifting is among them, which diffusers ignores; a caller who wants that sets the shift to None.

  >>> flow_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}).shift
  3.0
  """
  config = {key: value for key, value in config.items() if value is not None}
  name = str(config.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
  kind = name.removesuffix("Scheduler")
  solver = kind in _SOLVERS and config.get("use_flow_sigmas") is True
  if kind not in _FLOW and not solver:
    raise ValueError(
      f"scheduler config: _class_name is {name}, expected a scheduler of rectified flow: "
      "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, or a solver with use_flow_sigmas."
    )
  if solver and config.get("prediction_type") != "flow_prediction":
    raise ValueError(
      f"scheduler config: prediction_type is {config.get('prediction_type', 'epsilon')!r}, expected 'flow_prediction' "
      "beside use_flow_sigmas."
    )
  for key in ("invert_sigmas", "stochastic_sampling", "thresholding"):
    if config.get(key):
      raise ValueError(f"scheduler config: {key} is true, which is not implemented; set it to false.")
  chosen = [key for key in _SIGMAS if config.get(key)]
  if len(chosen) > 1 or (solver and chosen):
    names = [*(["use_flow_sigmas"] if solver else []), *chosen]
    raise ValueError(f"scheduler config: {' and '.join(names)} are true, expected one of them.")
  values = {field.name: config[field.name] for field in dataclasses.fields(FlowSchedule) if field.name in config}
  if solver:
    values["shift"] = config.get("flow_shift", 1.0)
  if not values.get("shift_terminal"):  # 0 is none to diffusers
    values["shift_terminal"] = None
  return FlowSchedule(**values | {"sigma_type": _SIGMAS[chosen[0]] if chosen else "flow"})


def mu_of_tokens(schedule: FlowSchedule, tokens: int) -> float:
  """Returns mu of the dynamic shift for images of so many tokens: linear from base_shift to max_shift, and beyond.

  >>> round(mu_of_tokens(FlowSchedule(use_dynamic_shifting=True), 1024), 4)
  0.63
  """
  slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_image_seq_len - schedule.base_image_seq_len)
  return schedule.base_shift + slope * (tokens - schedule.base_image_seq_len)


def shifted(s: Any, shift: float) -> Any:
  """Returns f s / (1 + (f - 1) s) for a shift f, of numbers or arrays s in [0, 1] (arXiv 2403.03206, Eq. 23)."""
  return shift * s / (1.0 + (shift - 1.0) * s)


def _check_steps(schedule: FlowSchedule, num_steps: int) -> None:
  if not 1 <= num_steps <= schedule.num_train_timesteps:
    raise ValueError(
      f"num_steps is {num_steps}, expected between 1 and the schedule's {schedule.num_train_timesteps} timesteps."
    )


def sigma_grid(
  schedule: FlowSchedule, num_steps: int, *, mu: float | None = None, sigmas: Sequence[float] | None = None
) -> np.ndarray:
  """Returns the noise levels that a sampler visits, as `FlowMatchEulerDiscreteScheduler.set_timesteps` makes them.

  Without `sigmas` they are even from 1 to the smallest level of the training table, 1 / T shifted, and then shifted
  (by a static shift a second time, as in diffusers). Then they are stretched to `shift_terminal`, or spaced otherwise.

  Args:
    schedule: the schedule.
    num_steps: number of sampling steps, at most T.
    mu: of a dynamic shift.
    sigmas: [num_steps] levels before the shift, in (0, 1] and descending; some pipelines give even ones to 1 / n.
  Returns:
    f32[num_steps + 1] numpy array, descending, the last 0.
  Raises:
    ValueError: a number of steps, mu, or a level is out of range.

  >>> sigma_grid(FlowSchedule(shift=3.0), 4).round(4)
  array([1.    , 0.8577, 0.6022, 0.0089, 0.    ], dtype=float32)
  """
  _check_steps(schedule, num_steps)
  shift, total = schedule.shift_at(mu), schedule.num_train_timesteps
  if sigmas is None:
    smallest = float(np.float32(shifted(1.0 / total, schedule.shift)))
    levels = np.linspace(1.0, smallest, num_steps)
  else:
    levels = np.asarray(sigmas, np.float64)
    inside = levels.shape == (num_steps,) and np.all((levels > 0.0) & (levels <= 1.0)) and np.all(np.diff(levels) < 0)
    if not inside:
      raise ValueError(f"sigmas are {sigmas}, expected {num_steps} in (0, 1], each below the one before it.")
    levels = levels.astype(np.float32).astype(np.float64)
  levels = shifted(levels, shift)
  if schedule.shift_terminal is not None:
    if levels[-1] == 1.0:
      raise ValueError(
        "num_steps is 1, expected at least 2, as the schedule's shift_terminal is the last step's level."
      )
    levels = 1.0 - (1.0 - levels) * (1.0 - schedule.shift_terminal) / (1.0 - levels[-1])
  first, last = levels[0], levels[-1]
  if schedule.sigma_type == "karras":  # arXiv 2206.00364, Eq. 5, rho 7
    levels = np.linspace(first ** (1 / 7), last ** (1 / 7), num_steps) ** 7
  elif schedule.sigma_type == "exponential":
    levels = np.exp(np.linspace(math.log(first), math.log(last), num_steps))
  elif schedule.sigma_type == "beta":  # arXiv 2407.12173
    levels = last + _beta_quantile(1.0 - np.linspace(0.0, 1.0, num_steps)) * (first - last)
  return np.append(levels, 0.0).astype(np.float32)


def _beta_quantile(p: np.ndarray, a: float = 0.6) -> np.ndarray:
  """Returns the quantiles of Beta(a, a), f64 of p's shape, by bisection of its distribution function's power series."""
  n = np.arange(64.0)
  # (1 - a)_n / n!, n = 0, 1, ...; the distribution is x^a / B sum_n of it x^n / (a + n), quickly for x <= 1/2
  coefficients = np.cumprod(np.append(1.0, (n[1:] - a) / n[1:])) / (a + n)
  scale = math.exp(math.lgamma(2 * a) - 2 * math.lgamma(a))
  target = np.minimum(p, 1.0 - p)
  low, high = np.zeros_like(p), np.full_like(p, 0.5)
  for _ in range(60):
    x = (low + high) / 2
    below = scale * x**a * np.polyval(coefficients[::-1], x) < target
    low, high = np.where(below, x, low), np.where(below, high, x)
  return np.where(p <= 0.5, low, 1.0 - low)


def solver_steps(schedule: FlowSchedule, num_steps: int, *, mu: float | None = None) -> SolverSteps:
  """Returns the steps of DPM-Solver++ 2M on rectified flow, from noise to the sample.

  They are those of `dpm_solver_steps` with alpha = 1 - s and sigma = s. The levels start at 1 - 1 / T and are shifted
  once; times are rounded down to integers. Equals diffusers' `DPMSolverMultistepScheduler` (dpmsolver++,
  solver_order 2, midpoint, final sigma zero, use_flow_sigmas, flow_prediction).

  Args:
    schedule: with sigma_type "flow" and without shift_terminal.
    num_steps: number of sampling steps, at most T.
    mu: of a dynamic shift.
  Returns:
    The `SolverSteps`, computed in float64; t is f32.
  Raises:
    ValueError: a number of steps or mu is out of range, or diffusers' solver has no such levels.
  References:
    Lu et al., arXiv 2211.01095, Algorithm 2.
  """
  _check_steps(schedule, num_steps)
  if schedule.sigma_type != "flow" or schedule.shift_terminal is not None:
    has = "shift_terminal" if schedule.sigma_type == "flow" else f"{schedule.sigma_type} sigmas"
    raise ValueError(f"the schedule has {has}, with which DPM-Solver++ is not implemented; use Euler's steps.")
  total = schedule.num_train_timesteps
  # In diffusers' order of operations: rounding down to integers sees the last bit.
  levels = np.flip(shifted(1.0 - np.linspace(1.0, 1.0 / total, num_steps + 1), schedule.shift_at(mu)))[:-1]
  sigma = levels.astype(np.float32).astype(np.float64)
  alpha = 1.0 - sigma
  next_sigma, next_alpha = np.append(sigma[1:], 0.0), np.append(alpha[1:], 1.0)
  ratio = next_sigma * alpha / (sigma * next_alpha)  # exp(-h)
  gain = next_alpha * (1.0 - ratio)
  half = np.zeros(num_steps)  # 1 / 2r
  h = -np.log(ratio[:-1])
  half[1:-1] = h[1:] / (2.0 * h[:-1])
  steps = (np.ones(num_steps), -sigma, next_sigma / sigma, gain * (1.0 + half), -gain * half)
  return SolverSteps(np.floor(levels * total).astype(np.float32), *(np.asarray(v, np.float32) for v in steps))
