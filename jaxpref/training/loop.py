"""The training loop, read top to bottom: the same for every objective and on any devices."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import optax
from jax.experimental import multihost_utils

from jaxpref import config as config_lib
from jaxpref.config import AnyConfig, Config
from jaxpref.data import batching, lease
from jaxpref.devices import chips, distributed, endings, sharding
from jaxpref.devices.progress import tqdm
from jaxpref.models.attention import cuda_capability
from jaxpref.objectives import catalog
from jaxpref.recipes.rewards import of_preference_model, reward_terms
from jaxpref.training import build, checkpoint, host, monitor, own_code, programs, run_page, step, validation
from jaxpref.training import metrics as metrics_lib
from jaxpref.training import watch as watch_lib

# Fields that may differ when a run is continued: they do not change what is computed at a given step.
MAY_CHANGE = (
  "logging.", "checkpoint.", "sample.", "evaluation.", "mesh.", "judge", "data.num_threads",
  "data.num_workers", "remat", "vae_slicing", "max_bad_steps", "profile_steps",
)  # fmt: skip


def may_change(config: Config) -> tuple[str, ...]:
  """Returns fields, or beginnings of their names, that may differ when a run is continued."""
  # A learning rate that decays depends on the last step.
  return MAY_CHANGE + (("num_steps",) if config.optimizer.schedule == "constant" else ())


# What a run writes at its end; `export` comes last, as scripts take it as the sign that nothing is left to do.
RESULTS = (
  "results.json", "table.md", "before_after.png", "samples.png", "curves.png", run_page.NAME, "export",
)  # fmt: skip


class NonFiniteError(RuntimeError):
  """Raised if losses or gradients were not finite in too many steps in a row, or the state is not; it is not saved."""


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
  """Moves away the results of an earlier end of the run, which now continues to `num_steps`."""
  ended = checkpoint.num_steps_before(folder)
  there = [name for name in RESULTS if (folder / name).exists()]
  if ended is None or ended >= num_steps or not there:
    return
  names = (f"results_of_step_{ended}", *(f"results_of_step_{ended}_{n}" for n in range(2, 10_000)))
  aside = next(folder / name for name in names if not (folder / name).exists())
  aside.mkdir()
  for name in there:
    (folder / name).replace(aside / name)
  _say(f"the run continues from step {ended} to {num_steps}; the results of step {ended} are now in {aside}")


def _memory(train_step: Any) -> str:
  """Returns in words what a compiled step takes of each device; "" if the compiler does not say."""
  programs = train_step.programs if isinstance(train_step, host.Iteration) else {"": train_step}
  peaks = {name: chips.program_bytes(program).get("peak", 0) / chips.GIB for name, program in programs.items()}
  if not all(peaks.values()):
    return ""
  parts = ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items() if name)
  return f"the training step takes {max(peaks.values()):.2f} GiB of each device{parts and f' ({parts})'}"


def run(config: AnyConfig, workdir: str, *, command: str = "") -> dict[str, Any]:
  """Trains, resumes if `workdir` holds a checkpoint, then evaluates and exports.

  Args:
    config: the recipe.
    workdir: the folder of checkpoints, metrics and results.
    command: that trains so, for the page of the run; "" for none.
  Returns:
    The evaluation's results (empty for pre-training objectives).
  Raises:
    ValueError: something is wrong with config, folders or data; raised before compilation.
    lease.Occupied: another process trains in `workdir`.
    NonFiniteError: the loss or the gradient became NaN or infinite.
  """
  # ---- Checks ------------------------------------------------------------------------------------------------
  goodput = monitor.Goodput("start")
  config = config_lib.typed(config)
  config_lib.check(config)
  metrics_lib.check_wandb(config.logging.wandb_project)
  capability = cuda_capability()
  if config.dtype == "bfloat16" and capability is not None and capability < 8.0:
    raise ValueError(
      f"config.dtype='bfloat16': a GPU of compute capability {capability} cannot multiply in it; expected one of 8.0 "
      "(Ampere) or later; set config.dtype=float32."
    )
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  online = catalog.method(config).facts.online
  sharding.check_batch_size(mesh, config.batch_size, 1 if online else config.accumulation)
  programs.make_optimizer(config)
  folder = pathlib.Path(workdir)
  _check_folder(config, folder)  # before anything is written to it
  build.look_for(config)
  if online and config.preference_model and not of_preference_model(reward_terms(config)):
    _say(
      f"config.preference_model={config.preference_model} is not used: config.reward={config.reward} does not name it"
    )
  with lease.hold(folder) as held:
    _check_folder(config, folder)  # it may have changed since
    return _run(config, folder, mesh, held, goodput, command)


def _run(
  config: Config,
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
  held: lease.Held,
  goodput: monitor.Goodput,
  command: str,
) -> dict[str, Any]:
  """Does the work of `run` in a folder that only this run writes."""
  optimizer, schedule = programs.make_optimizer(config)
  experiment = build.build(
    config, functools.partial(sharding.tree_shardings, mesh), batch_devices=sharding.batch_devices(mesh)
  )
  own_code.try_own(config, experiment, optimizer, mesh, say=_say)
  batches = experiment.batches()
  # Nothing has been written so far, and errors in the config have been found.
  if jax.process_index() == 0 and not (folder / "config.json").exists():
    checkpoint.claim_workdir(folder, config.to_dict(), may_change=may_change(config), usual=_usual(config))
  distributed.check_shared(folder)
  frozen = sharding.put_tree(mesh, experiment.frozen)
  training = _restore(config, folder, mesh, experiment, optimizer, batches)
  if jax.process_index() == 0:  # the run can be continued, so the changed fields hold from here on
    _set_results_aside(folder, config.num_steps)
    checkpoint.claim_workdir(folder, config.to_dict(), may_change=may_change(config), usual=_usual(config))
    run_page.note_command(folder, command)
    if changed := checkpoint.note_own_code(folder, own_code.versions(config)):
      _say(
        f"warning: the module of {', '.join(changed)} has changed since this run began; it continues with the present "
        "module; choose another --workdir to begin again."
      )
  num_params = sum(x.size for x in jax.tree.leaves(training.state.params))
  _say(
    f"{config.objective}: {num_params:,} trained parameters, {len(jax.devices())} x {jax.devices()[0].device_kind}, "
    f"mesh {dict(mesh.shape)}, batch {config.batch_size}, {config.num_steps} steps, folder {folder}"
  )
  drawer = validation.Drawer(config, experiment, mesh) if experiment.evaluable else None
  compiled = functools.partial(programs.compile_step, config, experiment, optimizer, mesh, training.shardings)
  _train(_Run(config, folder, mesh, held, goodput, experiment, batches, frozen, drawer), training, compiled, schedule)

  # ---- Evaluate and export -----------------------------------------------------------------------------------
  goodput.switch("evaluation")
  held.check()
  params = sharding.fetch(training.state.params)
  if jax.process_index() == 0:
    experiment.export(params, folder / "export")
  distributed.barrier("exported")
  _say(f"exported to {folder / 'export'}: step {config.num_steps}")
  results = experiment.report(params)
  if experiment.held_out is not None:
    results = validation.held_out_metrics(experiment, mesh, frozen, training.state)
  if drawer is not None and experiment.judge is not None and config.evaluation.num_prompts:
    results = validation.compare_with_base(config, experiment, drawer, frozen, training.state, folder)
  if results and jax.process_index() == 0:
    unfinished = folder / "results.json.partial"
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(folder / "results.json")  # it exists only when it is whole
    _say(_numbers(results))
  _say(str(goodput))
  if jax.process_index() == 0:
    _say_what_there_is(folder, results, _next(experiment, folder, config.evaluation.guidance_scale))
  return results


def _numbers(results: dict[str, Any]) -> str:
  """Returns the table of an evaluation; without one its numbers, to four digits (results.json has all digits)."""
  rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in results.items()}
  return str(results.get("table", json.dumps(rounded)))


def _next(experiment: build.Experiment, folder: pathlib.Path, guidance_scale: float) -> str:
  """Returns what to do with the result of a run; "" where nothing is known."""
  if experiment.evaluable:
    command = f"python -m jaxpref.sample --model={shlex.quote(str(folder))} --guidance_scale={guidance_scale:g}"
    return f'{command} --prompt="a fox in the snow"'
  if method := experiment.trains:
    field = f"--config.preference_model={shlex.quote(str(folder / 'export'))}"
    return f"{method} trains on it with {field} (docs/methods/{method.lower()}.md)"
  return ""


def _say_what_there_is(folder: pathlib.Path, results: dict[str, Any], then: str) -> None:
  """Writes the page of a run that has ended, and says what happened, what there is to look at, and what comes next.

  Args:
    results: of the evaluation.
    then: what comes next; may be empty.
  """
  if said := run_page.in_words(results, metrics_lib.read(folder / "metrics.jsonl")):
    _say(said)
  for name in ("before_after.png", "samples.png"):
    if (folder / name).is_file():
      _say(f"pictures: {folder / name}")
      break
  try:
    _say(f"page: {run_page.write(folder)}")
  except (OSError, ValueError) as error:  # all else is there
    _say(f"{folder / run_page.NAME} cannot be written ({error}); {run_page.command(folder)} writes it later.")
  if then:
    _say(f"next: {then}")


@dataclasses.dataclass
class _Training:
  """What a checkpoint holds, and the object that writes it.

  Attributes:
    state: state after the step before; donated to the next step.
    shardings: shardings of the state.
    data_state: state of the data at that step.
    losses: running mean of the loss, saved as well.
    first_step: number of steps done before this start.
  """

  state: step.State
  shardings: Any
  saver: checkpoint.Checkpointer
  losses: monitor.LossMonitor
  first_step: int = 0
  data_state: Any = None


def _restore(
  config: Config,
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
  experiment: build.Experiment,
  optimizer: optax.GradientTransformation,
  batches: batching.Batches,
) -> _Training:
  """Returns the last checkpoint's state, or the first state; the batches continue from there."""
  params, experiment.params = experiment.params, None
  init_state = programs.state_initializer(experiment, optimizer)
  shapes = jax.eval_shape(init_state, params)
  shardings = sharding.tree_shardings(mesh, shapes)
  saver, losses = checkpoint.Checkpointer(folder, keep=config.checkpoint.keep), monitor.LossMonitor()
  if saver.latest_step() is None:
    return _Training(jax.jit(init_state, out_shardings=shardings)(params), shardings, saver, losses)
  del params
  first_step, state, saved = saver.restore(checkpoint.abstract(shapes, shardings))
  batches.set_state(saved["batches"])
  losses.set_state(saved["loss"])
  _say(f"resuming {folder} at step {first_step}")
  return _Training(state, shardings, saver, losses, first_step)


class _Run(NamedTuple):
  """What does not change while a run trains."""

  config: Config
  folder: pathlib.Path
  mesh: jax.sharding.Mesh
  held: lease.Held
  goodput: monitor.Goodput
  experiment: build.Experiment
  batches: batching.Batches
  frozen: Any
  drawer: validation.Drawer | None


def _train(
  run: _Run, training: _Training, compiled: Callable[[tuple[Any, Any, Any]], step.StepFn], schedule: optax.Schedule
) -> None:
  """Runs all steps that are left; `training.state` is then the last one's.

  Args:
    compiled: (state, frozen parameters, batch) -> the compiled step.
    schedule: the learning rate by the number of updates.
  """
  config, goodput, first, last = run.config, run.goodput, training.first_step, run.config.num_steps
  every = config.sample.every if run.drawer is not None else 0
  wandb = config.logging.wandb_project
  writer = metrics_lib.Writer(run.folder, first_step=first, wandb_project=wandb, config=config_lib.to_dict(config))
  # Makes the next batches and moves them to the devices while a step runs.
  prefetched = batching.Prefetched(run.batches, functools.partial(sharding.put_batch, run.mesh), count=last - first)
  profiler = monitor.Profiler(run.folder, *config_lib.parse_steps(config.profile_steps))
  watch = _watch(run, training, writer, schedule)
  try:
    if every and first == 0:
      with monitor.ticking("drawing the validation prompts before the first step"):
        _look(run, training, writer, watch, 0)
    # With a delay it is shown when the first step begins.
    bar = tqdm(total=last, initial=first, desc=config.objective, disable=jax.process_index() != 0, delay=0.001)
    with bar, _stop_on_signal() as stop:
      watch.bar, watch.on_failed = bar, lambda seen: _stop_at_bad_step(run, training, watch, seen)
      for done in range(first + 1, last + 1):
        run.held.check()
        with goodput.phase("input wait"):
          batch, training.data_state = next(prefetched)
        if done == first + 1:
          with goodput.phase("compile"), monitor.ticking(f"compiling the training step of {config.objective}"):
            train_step = compiled((training.state, run.frozen, batch))
          if taken := _memory(train_step):
            _say(taken)
          goodput.switch("step")
          watch.start_clock()
          bar.begin()
        if said := profiler.before_step(done, training.state):
          _say(said)
        started = time.perf_counter()
        training.state, values = train_step(training.state, run.frozen, batch)
        watch.dispatched(time.perf_counter() - started)
        watch.step(done, values, batch)
        bar.update()
        if every and done % every == 0:
          watch.settle()
          _look(run, training, writer, watch, done)
        stopping = stop(done)  # read once: a signal may arrive at any time
        if done % config.checkpoint.every == 0 or done == last or stopping:
          watch.settle()
          _save(run, training, done)
        if stopping:
          training.saver.wait()
          shown = f"{run_page.command(run.folder)} makes a page of what there is"
          _say(f"stopped at step {done} by {stop.cause}; the same command resumes. {shown}. {goodput}")
          sys.exit(stop.code)
  finally:
    if said := profiler.close():
      _say(said)
    prefetched.close()
    with goodput.phase("checkpoint"):
      training.saver.close()
    writer.close()


def _watch(run: _Run, training: _Training, writer: metrics_lib.Writer, schedule: optax.Schedule) -> watch_lib.Watch:
  return watch_lib.Watch(
    first_step=training.first_step,
    num_steps=run.config.num_steps,
    every=run.config.logging.every,
    max_bad_steps=run.config.max_bad_steps,
    images_per_step=run.experiment.images_per_step,
    schedule=schedule,
    batches=run.batches,
    writer=writer,
    goodput=run.goodput,
    losses=training.losses,
    say=_say,
  )


def _save(run: _Run, training: _Training, done: int) -> None:
  """Writes a checkpoint after the step `done`.

  Raises:
    NonFiniteError: the state is not finite.
  """
  run.held.check()
  with run.goodput.phase("checkpoint"):
    try:
      training.saver.save(done, training.state, {"batches": training.data_state, "loss": training.losses.get_state()})
    except FloatingPointError as error:
      training.saver.wait()
      last, place = training.saver.latest_step(), run.folder / "checkpoints"
      where = f"The last good checkpoint is step {last} in {place}." if last else "No checkpoint yet."
      raise NonFiniteError(
        f"step {done}: the training state is not finite; stopped without saving it. {where} "
        "Lower config.optimizer.learning_rate."
      ) from error


def _look(run: _Run, training: _Training, writer: metrics_lib.Writer, watch: watch_lib.Watch, done: int) -> None:
  """Draws the validation prompts with the state after the step `done`, and measures them."""
  assert run.drawer is not None
  started = time.perf_counter()
  with run.goodput.phase("samples"):
    path = run.folder / "samples" / f"step_{done:06d}.png"
    weights = {**run.frozen, **training.state.params}
    picture, means = validation.look(run.config, run.experiment, run.drawer, weights, path)
    writer.image(done, "samples", picture)
    if means:
      writer.write(done, means)
  watch.not_training(time.perf_counter() - started)


def _stop_at_bad_step(run: _Run, training: _Training, watch: watch_lib.Watch, seen: watch_lib.Seen) -> NoReturn:
  """Saves, records the step, and raises NonFiniteError.

  The state is that before the first of the bad steps, except for its count, and no step is pending.
  """
  config, done, count = run.config, seen.done, len(watch.bad)
  _save(run, training, done)
  training.saver.wait()
  where = monitor.bad_step_folder(run.folder, done)
  options = {"seed": config.seed, "step": done - 1, "accumulation": config.accumulation}
  drawn = step.timesteps(run.experiment.objective, config.batch_size, **options)
  names, batch = run.batches.names, seen.batch
  monitor.write_bad_step(where, batch, step=done, metrics=seen.values, timesteps=drawn, names=names, in_a_row=watch.bad)
  raise NonFiniteError(
    f"step {done}: loss or gradient was not finite in {count} steps in a row, so the parameters are those of step "
    f"{done - count}; they are saved. See what is wrong with python -m jaxpref.replay {where}, and lower "
    "config.optimizer.learning_rate or fix the data it names; the same command continues with the batches that follow."
  )


class _Stop:
  """Whether to save the step just done and stop, because SIGTERM (preemption) or Ctrl-C came.

  Several processes all stop at the same step, whichever got the signal: there JAX handles SIGTERM, and Ctrl-C becomes a
  SIGTERM. The first interrupted process tells the others, and says so.
  """

  def __init__(self) -> None:
    self._asked, self._by_hand = False, False
    self._lock, self._closed = threading.Lock(), False

  def __call__(self, done: int) -> bool:
    if jax.process_count() == 1:
      return self._asked
    stopping = multihost_utils.reached_preemption_sync_point(done)
    if stopping:  # this process may not have had the signal
      self._by_hand = distributed.was_interrupted()
    return stopping

  def terminated(self, *_: Any) -> None:
    self._asked = True

  def interrupted(self) -> None:
    """Notes Ctrl-C; another thread calls it."""
    self._asked = self._by_hand = True
    if distributed.tell_interrupted():
      tqdm.write("stopping: this step is finished and saved first; Ctrl-C again stops at once.", file=sys.stderr)
    with self._lock:
      if jax.process_count() > 1 and not self._closed:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # it has arrived when this returns

  def close(self) -> None:
    """Ends the handling: no step follows, and from now on a signal ends the process as usual."""
    with self._lock:
      self._closed = True

  def too_late(self) -> bool:
    """Returns whether Ctrl-C came while the last step was saved; the same in all processes if it came a while ago."""
    if jax.process_count() > 1:
      self._by_hand |= bool(distributed.word_of_first("interrupted" if distributed.was_interrupted() else ""))
    return self._by_hand

  @property
  def cause(self) -> str:
    return "Ctrl-C" if self._by_hand else "a signal"

  @property
  def code(self) -> int:
    return endings.INTERRUPTED if self._by_hand else 0


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
  """Handles SIGTERM and Ctrl-C inside the block; outside the main thread the embedding program does."""
  stop, before = _Stop(), None
  if jax.process_count() == 1:
    with contextlib.suppress(ValueError):  # not in the main thread
      before = signal.signal(signal.SIGTERM, stop.terminated)
  last = "stopped at once; the same command resumes at the last checkpoint."
  try:
    with endings.ctrl_c(stop.interrupted, last=last):
      yield stop
    if stop.too_late():
      raise KeyboardInterrupt
  finally:
    stop.close()
    if jax.process_count() > 1:
      with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the work after the last step can be done again
    elif before is not None:
      signal.signal(signal.SIGTERM, before)
