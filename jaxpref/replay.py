"""Runs a step that went wrong again, on one device: `python -m jaxpref.replay runs/dpo_sd15/bad_step_000123`.

Training writes the folder when the loss or the gradient was not finite in too many steps in a row
(config.max_bad_steps), with a checkpoint of the state, which those steps left unchanged. This command says whether the
step goes wrong here too, and where: in which fields and records of the batch, at which times, in the gradients of which
parameters.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from jaxpref import arguments, export
from jaxpref import config as config_lib
from jaxpref.devices import chips, endings, sharding
from jaxpref.training import build, checkpoint, metrics, monitor, programs

TIMESTEPS = 1000  # of all models here: in Stable Diffusion's schedules, and the time of pure noise of flow models
NOT_FINITE = ("nan", "inf", "-inf")  # as a report writes them


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments and prints; an expected error ends the program with one sentence."""
  parser = arguments.Parser(prog="python -m jaxpref.replay", description=__doc__)
  parser.add_argument("folder", type=arguments.path, metavar="FOLDER", help="bad_step_... in the work folder of a run")
  parser.add_argument(
    "--debug_nans", action="store_true", help="stop at the first operation that makes a NaN, and say where it is (slow)"
  )
  args = parser.parse_args(argv)
  jax.config.update("jax_debug_nans", args.debug_nans)
  # The FloatingPointError of jax_debug_nans passes, with the traceback that the flag asks for.
  with endings.one_sentence(ValueError, OSError, doing=f"replaying {args.folder}", again="run the same command again"):
    print(replay(args.folder))


def replay(folder: pathlib.Path) -> str:
  """Runs the step again and returns what it finds.

  Raises:
    ValueError, OSError: one sentence on what is missing or does not fit.
  """
  batch, recorded = monitor.read_bad_step(folder)
  run, number = folder.resolve().parent, recorded["step"]
  config = export.read_config(run)
  with config.unlocked():
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.judge = None
  mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:1])
  build.look_for(config_lib.typed(config))
  experiment = build.build(config)
  optimizer, _ = programs.make_optimizer(config)
  init_state = programs.state_initializer(experiment, optimizer)
  shapes = jax.eval_shape(init_state, experiment.params)
  state = checkpoint.load_state(run, number, checkpoint.abstract(shapes, sharding.tree_shardings(mesh, shapes)))
  state = dataclasses.replace(state, step=state.step - 1)  # the updates were skipped, so all else is unchanged

  bad_gradients: dict[str, int] = {}

  def look(gradients: Any) -> None:
    for path, count in jax.tree_util.tree_leaves_with_path(gradients):
      name = sharding.path_name(path)
      bad_gradients[name] = bad_gradients.get(name, 0) + int(count)

  def update(gradients: Any, opt_state: Any, params: Any = None) -> tuple[Any, Any]:
    jax.debug.callback(look, jax.tree.map(lambda g: (~jax.numpy.isfinite(g)).sum(), gradients))
    return optimizer.update(gradients, opt_state, params)

  watched = optax.GradientTransformation(optimizer.init, update)  # type: ignore[arg-type]
  step_fn = jax.jit(programs.make_step(config, experiment, watched, mesh), compiler_options=chips.compiler_options())
  _, values = step_fn(state, sharding.put_tree(mesh, experiment.frozen), sharding.put_batch(mesh, batch))
  found = metrics.to_scalars(values)
  jax.effects_barrier()
  return describe(batch, recorded, found, {name: count for name, count in bad_gradients.items() if count})


def describe(
  batch: Mapping[str, np.ndarray],
  recorded: Mapping[str, Any],
  found: Mapping[str, float],
  bad_gradients: Mapping[str, int],
) -> str:
  """Returns a description of a step.

  Args:
    batch: the step's rows.
    recorded: the report that training wrote.
    found: metrics of the step as run here.
    bad_gradients: how many values of each parameter's gradient are not finite.
  """
  records, times = recorded["records"], recorded["timesteps"]

  def row(i: int) -> str:
    return f"row {i}" + (f", record {records[i]}" if records else "") + (f", t = {times[i]}" if times else "")

  then = {key: recorded["metrics"][key] for key in ("loss", "grad_norm")}
  lines = [
    f"step {recorded['step']}: loss {found['loss']:g}, gradient norm {found['grad_norm']:g} here; "
    f"loss {then['loss']}, gradient norm {then['grad_norm']} in training"
  ]
  if np.isfinite(found["loss"]) and np.isfinite(found["grad_norm"]):
    lines.append("the step is finite here: check what differs, such as device, mesh, precision or a failing chip")
  for name, values in batch.items():
    if np.issubdtype(values.dtype, np.inexact):
      wrong = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
      if len(wrong):
        lines.append(f"{name} is not finite in {len(wrong)} of {len(values)} rows: {'; '.join(map(row, wrong[:8]))}")
  bins = recorded["metrics"].get("loss_bin", [])
  places = [min(int(t * len(bins) // TIMESTEPS), len(bins) - 1) for t in times or ()]  # times of flow are floats
  in_bad_bin = [i for i, place in enumerate(places) if bins[place] in NOT_FINITE]
  if in_bad_bin:  # bins without a row have no mean, which is NaN as well
    spans = sorted({places[i] for i in in_bad_bin})
    at = [f"{TIMESTEPS * b // len(bins)}-{TIMESTEPS * (b + 1) // len(bins) - 1}" for b in spans]
    lines.append(f"the loss was not finite at t of {', '.join(at)}, where these rows were:")
    lines += [f"  {row(i)}" for i in in_bad_bin[:16]]
  if bad_gradients:
    names = list(bad_gradients)
    lines.append(f"gradients of {len(names)} arrays are not finite, such as {', '.join(names[:4])}")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
