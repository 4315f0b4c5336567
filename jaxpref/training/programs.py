"""Makes what a config trains with: the optimiser, the first state, and the training step, as a function or compiled."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxpref import reference
from jaxpref.config import Config
from jaxpref.devices import chips, sharding
from jaxpref.training import build, host, optim, step


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns the config's optimiser, and its learning rate by the number of previous updates."""
  o = config.optimizer
  schedule = optim.learning_rate(o.schedule, o.learning_rate, num_steps=config.num_steps, warmup_steps=o.warmup_steps)
  optimizer = optim.make_optimizer(
    o.name, schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm
  )
  return optimizer, schedule


def state_initializer(
  experiment: build.Experiment, optimizer: optax.GradientTransformation
) -> Callable[[Any], step.State]:
  """Returns the function from loaded parameters to the state before the first step."""

  def init_state(params: Any) -> step.State:
    params = reference.init_reference(params)  # float32 copies: the state is donated, the loaded arrays are not
    ref_params = reference.init_reference(params) if experiment.has_reference else {}
    return step.initial_state(params, ref_params, optimizer.init(params))

  return init_state


def make_halves(
  config: Config,
  experiment: build.Experiment,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[step.DrawFn, step.LearnFn]:
  """Returns `step.make_halves` of a config, not yet jitted."""
  moving = None
  if config.reference.mode == "update" and experiment.has_reference:
    moving = step.MovingReference(**{k: v for k, v in config.reference.to_dict().items() if k != "mode"})
  rows = sharding.batch_sharding(mesh)
  return step.make_halves(
    experiment.objective,
    optimizer,
    seed=config.seed,
    accumulation=config.accumulation,
    moving=moving,
    constrain=lambda tree: jax.lax.with_sharding_constraint(tree, rows) if mesh.size > 1 else tree,
    row_multiple=sharding.batch_devices(mesh),
  )


def make_step(
  config: Config,
  experiment: build.Experiment,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> step.StepFn:
  """Returns the training step, (state, frozen, batch) -> (state, metrics), not yet jitted."""
  return sharding.on_mesh(mesh, step.joined(*make_halves(config, experiment, optimizer, mesh)))


def compile_step(
  config: Config,
  experiment: build.Experiment,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  shardings: Any,
  arguments: tuple[Any, Any, Any],
) -> step.StepFn:
  """Returns the step as one program, or as two with rewards on the host between them.

  Args:
    shardings: shardings of the state, which is donated.
    arguments: state, frozen parameters and a batch.
  """
  if experiment.reward is not None and experiment.reward.host:
    halves = make_halves(config, experiment, optimizer, mesh)
    return host.compile_iteration(halves, experiment.reward.host, experiment.captions(), mesh, shardings, arguments)
  step_fn = make_step(config, experiment, optimizer, mesh)
  # Metrics come back whole on every device.
  jitted = jax.jit(
    step_fn, donate_argnums=0, out_shardings=(shardings, None), compiler_options=chips.compiler_options()
  )
  return jitted.lower(*arguments).compile()
