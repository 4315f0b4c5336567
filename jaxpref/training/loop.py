"""The one training loop, read top to bottom: for every objective, on whatever devices there are."""

import contextlib
import functools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxpref import config as config_lib
from jaxpref import reference
from jaxpref.config import AnyConfig, Config
from jaxpref.data import batching, lease
from jaxpref.devices import chips, distributed, sharding
from jaxpref.models.attention import cuda_capability
from jaxpref.objectives import catalog
from jaxpref.training import build, checkpoint, host, monitor, optim, step, validation
from jaxpref.training import metrics as metrics_lib

# Fields that may differ when a run is continued: they do not change what is computed at a given step.
MAY_CHANGE = (
  "logging.", "checkpoint.", "sample.", "evaluation.", "mesh.", "judge", "data.num_threads",
  "data.num_workers", "remat", "vae_slicing", "max_bad_steps", "profile_steps",
)  # fmt: skip


def may_change(config: Config) -> tuple[str, ...]:
  """Fields, or beginnings of their names, that may differ when a run is continued."""
  # A learning rate that decays does so until the last step.
  return MAY_CHANGE + (("num_steps",) if config.optimizer.schedule == "constant" else ())


# What a run leaves at its end; `export` last, as scripts take it for the sign that there is nothing more to do.
RESULTS = ("results.json", "table.md", "before_after.png", "samples.png", "curves.png", "export")


class NonFiniteError(RuntimeError):
  """Losses or gradients that were not finite in too many steps in a row, or such a state; nothing of it was saved."""


def _say(message: str) -> None:
  if jax.process_index() == 0:
    tqdm.write(message, file=sys.stderr)


def _usual(config: Config) -> dict[str, Any]:
  """Returns the defaults of all fields, and of the objective's options."""
  usual = config_lib.default()
  config_lib.fill_options(usual, config.objective)
  return usual.to_dict()


def _check_folder(config: Config, folder: pathlib.Path) -> None:
  """Raises ValueError if the run in a work folder cannot be continued as the config says."""
  checkpoint.check_workdir(folder, config.to_dict(), may_change=may_change(config), usual=_usual(config))
  checkpoint.check_num_steps(folder, config.num_steps)


def _set_results_aside(folder: pathlib.Path, num_steps: int) -> None:
  """Moves what an earlier end of the run has left: it is not of the run that goes on to `num_steps`."""
  ended = checkpoint.num_steps_before(folder)
  there = [name for name in RESULTS if (folder / name).exists()]
  if ended is None or ended >= num_steps or not there:
    return
  names = (f"results_of_step_{ended}", *(f"results_of_step_{ended}_{n}" for n in range(2, 10_000)))
  aside = next(folder / name for name in names if not (folder / name).exists())
  aside.mkdir()
  for name in there:
    (folder / name).replace(aside / name)
  _say(f"the run goes on from step {ended} to {num_steps}; the results of step {ended} are in {aside} now")


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The config's optimiser and its learning rate by the number of updates before."""
  o = config.optimizer
  schedule = optim.learning_rate(o.schedule, o.learning_rate, num_steps=config.num_steps, warmup_steps=o.warmup_steps)
  optimizer = optim.make_optimizer(
    o.name, schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm
  )
  return optimizer, schedule


def state_initializer(
  experiment: build.Experiment, optimizer: optax.GradientTransformation
) -> Callable[[Any], step.State]:
  """The function from trained parameters, as loaded, to the state before the first step."""

  def init_state(params: Any) -> step.State:
    params = reference.init_reference(params)  # float32 copies: the state is donated, what was loaded is not
    ref_params = reference.init_reference(params) if experiment.has_reference else {}
    return step.initial_state(params, ref_params, optimizer.init(params))

  return init_state


def make_halves(
  config: Config,
  experiment: build.Experiment,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[step.DrawFn, step.LearnFn]:
  """`step.make_halves` of a config, not yet jitted."""
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
  """One training step, (state, frozen, batch) -> (state, metrics), not yet jitted."""
  return sharding.on_mesh(mesh, step.joined(*make_halves(config, experiment, optimizer, mesh)))


def compile_step(
  config: Config,
  experiment: build.Experiment,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  shardings: Any,
  arguments: tuple[Any, Any, Any],
) -> step.StepFn:
  """The step as one program, or as two with rewards on the host between them.

  Args:
    shardings: of the state, which is donated.
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


def run(config: AnyConfig, workdir: str) -> dict[str, Any]:
  """Trains, resumes if `workdir` holds a checkpoint, then evaluates and exports.

  Returns:
    The evaluation's results (empty for pre-training objectives).
  Raises:
    ValueError: anything wrong with config, folders or data, before compilation.
    lease.Occupied: another process trains in `workdir`.
    NonFiniteError: the loss or the gradient became NaN or infinite.
  """
  # ---- Checks ------------------------------------------------------------------------------------------------
  goodput = monitor.Goodput("start")
  config = config_lib.typed(config)
  config_lib.check(config)
  capability = cuda_capability()
  if config.dtype == "bfloat16" and capability is not None and capability < 8.0:
    raise ValueError(
      f"config.dtype='bfloat16': a GPU of compute capability {capability} cannot multiply in it; expected one of 8.0 "
      "(Ampere) or later; set config.dtype=float32."
    )
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  online = catalog.method(config).facts.online
  sharding.check_batch_size(mesh, config.batch_size, 1 if online else config.accumulation)
  make_optimizer(config)
  folder = pathlib.Path(workdir)
  _check_folder(config, folder)  # before anything is written into it
  with lease.hold(folder) as held:
    _check_folder(config, folder)  # it may have changed until now
    return _run(config, folder, mesh, held, goodput)


def _run(
  config: Config,
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
  held: lease.Held,
  goodput: monitor.Goodput,
) -> dict[str, Any]:
  """The loop of `run`, in a folder that this run alone writes."""
  optimizer, schedule = make_optimizer(config)

  # ---- Models and data ---------------------------------------------------------------------------------------
  experiment = build.build(
    config, functools.partial(sharding.tree_shardings, mesh), batch_devices=sharding.batch_devices(mesh)
  )
  batches = experiment.batches()
  # Nothing was written so far, and what could be wrong with the config has been found.
  if jax.process_index() == 0 and not (folder / "config.json").exists():
    checkpoint.claim_workdir(folder, config.to_dict(), may_change=may_change(config), usual=_usual(config))
  distributed.check_shared(folder)

  # ---- State -------------------------------------------------------------------------------------------------
  frozen = sharding.put_tree(mesh, experiment.frozen)

  params, experiment.params = experiment.params, None
  init_state = state_initializer(experiment, optimizer)
  shapes = jax.eval_shape(init_state, params)
  shardings = sharding.tree_shardings(mesh, shapes)
  saver = checkpoint.Checkpointer(folder, keep=config.checkpoint.keep)
  loss_monitor = monitor.LossMonitor()
  first_step = 0
  if saver.latest_step() is not None:
    first_step, state, saved = saver.restore(checkpoint.abstract(shapes, shardings))
    batches.set_state(saved["batches"])
    loss_monitor.set_state(saved["loss"])
    _say(f"resuming {folder} at step {first_step}")
  else:
    state = jax.jit(init_state, out_shardings=shardings)(params)
  del params
  if jax.process_index() == 0:  # what is there can be continued, so the fields that may change hold from here on
    _set_results_aside(folder, config.num_steps)
    checkpoint.claim_workdir(folder, config.to_dict(), may_change=may_change(config), usual=_usual(config))
  num_params = sum(x.size for x in jax.tree.leaves(state.params))
  _say(
    f"{config.objective}: {num_params:,} trained parameters, {len(jax.devices())} x {jax.devices()[0].device_kind}, "
    f"mesh {dict(mesh.shape)}, batch {config.batch_size}, {config.num_steps} steps, folder {folder}"
  )

  # ---- Loop --------------------------------------------------------------------------------------------------
  writer = metrics_lib.Writer(
    folder, first_step=first_step, wandb_project=config.logging.wandb_project, config=config_lib.to_dict(config)
  )
  # The next batches are made and moved to the devices while a step runs.
  prefetched = batching.Prefetched(
    batches, functools.partial(sharding.put_batch, mesh), count=config.num_steps - first_step
  )
  profiler = monitor.Profiler(folder, *config_lib.parse_steps(config.profile_steps))
  pending: tuple[int, Any, Any] | None = None  # metrics are read one step late, so that dispatch stays asynchronous
  bad: list[dict[str, float]] = []  # the steps without an update since the last one with it
  since, since_step = time.perf_counter(), first_step
  on_devices = 0.0  # seconds since then in which this process waited for the devices, and so for other processes

  def last_checkpoint() -> str:
    saver.wait()
    last = saver.latest_step()
    return f"The last good checkpoint is step {last} in {folder / 'checkpoints'}." if last else "No checkpoint yet."

  def read(pending: tuple[int, Any, Any]) -> None:
    nonlocal since, since_step, on_devices
    done, values, batch = pending
    started = time.perf_counter()
    scalars = metrics_lib.to_scalars({k: values[k] for k in ("loss", "grad_norm", "skipped_updates")})
    updates = float(values.get("updates", 1.0))
    on_devices += time.perf_counter() - started
    bar.set_postfix(loss=f"{scalars['loss']:.4f}", refresh=False)
    if scalars["skipped_updates"] and scalars["skipped_updates"] == updates:
      bad.append({"step": done, **scalars})
      _say(
        f"step {done}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}; its update was left out "
        f"({len(bad)} in a row; after more than {config.max_bad_steps} training stops)."
      )
    else:
      bad.clear()
      if scalars["skipped_updates"]:
        _say(f"step {done}: {scalars['skipped_updates']:.0f} of {updates:.0f} updates were not finite and left out.")
      if (spike := loss_monitor.see(scalars["loss"])) is not None:
        _say(f"step {done}: loss {scalars['loss']:.4g} is {spike:.1f} standard deviations above its running mean.")
    if bad or done % config.logging.every == 0 or done in (1, config.num_steps):  # whether resumed or not
      now = time.perf_counter()
      scalars |= metrics_lib.to_scalars(values) | loss_monitor.metrics()
      waited = goodput.since_last("input wait")
      own = waited + goodput.since_last("step") - on_devices  # the time of this process by itself
      scalars |= distributed.host_metrics(own / (done - since_step), (now - since) / (done - since_step))
      scalars["images_per_second"] = (done - since_step) * experiment.images_per_step / (now - since)
      scalars["data_wait_share"] = waited / (now - since)
      scalars["learning_rate"] = float(schedule(max(scalars["optimizer_updates"] - 1, 0)))  # of the last update
      scalars["skipped_records"] = float(batches.num_skipped())
      on_devices = time.perf_counter() - now  # all of this waits for the devices, too
      since, since_step = now, done
      writer.write(done, scalars)
    if len(bad) > config.max_bad_steps:
      stop_at_bad_step(done, values, batch)

  def stop_at_bad_step(done: int, values: Any, batch: Any) -> None:
    # The state is that before the first of these steps, but for its count, and no step is on its way: see below.
    save(done)
    saver.wait()
    where = monitor.bad_step_folder(folder, done)
    options = {"seed": config.seed, "step": done - 1, "accumulation": config.accumulation}
    drawn = step.timesteps(experiment.objective, config.batch_size, **options)
    monitor.write_bad_step(where, batch, step=done, metrics=values, timesteps=drawn, names=batches.names, in_a_row=bad)
    raise NonFiniteError(
      f"step {done}: loss or gradient was not finite in {len(bad)} steps in a row, so the parameters are those of step "
      f"{done - len(bad)}; they are saved. See what is wrong with python -m jaxpref.replay {where}, and lower "
      "config.optimizer.learning_rate or mend the data it names; the same command goes on with the batches that follow."
    )

  def save(done: int) -> None:
    held.check()
    with goodput.phase("checkpoint"):
      try:
        saver.save(done, state, {"batches": data_state, "loss": loss_monitor.get_state()})
      except FloatingPointError as error:
        raise NonFiniteError(
          f"step {done}: the training state is not finite; stopped without saving it. {last_checkpoint()} "
          "Lower config.optimizer.learning_rate."
        ) from error

  drawer = validation.Drawer(config, experiment, mesh) if experiment.evaluable else None
  every = config.sample.every if drawer is not None else 0

  def look(done: int) -> None:
    nonlocal since
    assert drawer is not None
    started = time.perf_counter()
    with goodput.phase("samples"):
      path = folder / "samples" / f"step_{done:06d}.png"
      picture, means = validation.look(config, experiment, drawer, {**frozen, **state.params}, path)
      writer.image(done, "samples", picture)
      if means:
        writer.write(done, means)
    since += time.perf_counter() - started  # which is no part of a step

  try:
    if every and first_step == 0:
      look(0)
    bar = tqdm(total=config.num_steps, initial=first_step, desc=config.objective, disable=jax.process_index() != 0)
    with bar, _stop_on_signal() as stop:
      for done in range(first_step + 1, config.num_steps + 1):
        held.check()
        with goodput.phase("input wait"):
          batch, data_state = next(prefetched)
        if done == first_step + 1:
          with goodput.phase("compile"), monitor.ticking(f"compiling the training step of {config.objective}"):
            compiled = compile_step(config, experiment, optimizer, mesh, shardings, (state, frozen, batch))
          goodput.switch("step")
          since = time.perf_counter()
        if said := profiler.before_step(done, state):
          _say(said)
        started = time.perf_counter()
        state, values = compiled(state, frozen, batch)
        on_devices += time.perf_counter() - started
        if pending is not None:
          read(pending)
        pending = (done, values, batch)
        if bad:  # then one step at a time, so that no other follows the last one that is tolerated
          read(pending)
          pending = None
        bar.update()
        if every and done % every == 0:
          if pending is not None:
            read(pending)
          pending = None
          look(done)
        stopping = stop(done)  # read once: a signal may arrive at any time
        if done % config.checkpoint.every == 0 or done == config.num_steps or stopping:
          if pending is not None:
            read(pending)
          pending = None
          save(done)
        if stopping:
          saver.wait()
          _say(f"stopped at step {done} by a signal; the same command resumes. {goodput}")
          sys.exit(0)
  finally:
    if said := profiler.close():
      _say(said)
    prefetched.close()
    with goodput.phase("checkpoint"):
      saver.close()
    writer.close()

  # ---- Evaluate and export -----------------------------------------------------------------------------------
  goodput.switch("evaluation")
  held.check()
  params = sharding.fetch(state.params)
  if jax.process_index() == 0:
    experiment.export(params, folder / "export")
  distributed.barrier("exported")
  _say(f"exported to {folder / 'export'}: step {config.num_steps}")
  results = experiment.report(params)
  if experiment.held_out is not None:
    results = validation.held_out_metrics(experiment, mesh, frozen, state)
  if drawer is not None and experiment.judge is not None and config.evaluation.num_prompts:
    results = validation.compare_with_base(config, experiment, drawer, frozen, state, folder)
  if results and jax.process_index() == 0:
    unfinished = folder / "results.json.partial"
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(folder / "results.json")  # which is there only when it is whole
    _say(str(results.get("table", json.dumps(results))))
    _say(f"results, pictures and curves are in {folder}")
  _say(str(goodput))
  if "in_words" in results:
    _say(results["in_words"])
  return results


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Callable[[int], bool]]:
  """A function of the step just done: whether to save it and stop, as SIGTERM came inside the block (preemption).

  Several processes all stop at the same step, whichever of them got the signal: JAX handles it there.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    with contextlib.suppress(ValueError):  # not in the main thread
      signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what comes after the last step can be done again
    return
  stop: list[int] = []
  try:
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
  except ValueError:  # not in the main thread: the embedding program handles signals
    yield lambda done: False
    return
  try:
    yield lambda done: bool(stop)
  finally:
    signal.signal(signal.SIGTERM, before)
