"""Several processes in one run: they join, stay in step, and leave when one cannot go on.

`detection` finds out from the environment how a launcher started this process; within `joined` it takes part in the
run. If a process is killed or falls silent, JAX's heartbeats end the others (SIGABRT, exit code 134). A process that
raises leaves at once: at JAX's exit barrier it would wait for the others, and they for it. docs/operations.md says how
long each takes.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import flags

from jaxpref.devices import endings
from jaxpref.devices.detection import Launch, detect

MODES = ("auto", "true", "false")

START_SECONDS = 300  # how long processes wait for each other at the start
PATIENCE_SECONDS = 30  # after this long at the start a line says what the process waits for
HEARTBEAT_SECONDS = 20  # time without a heartbeat after which JAX gives up a process
EXIT_SECONDS = 60  # how long processes wait for each other at the end of a run
SETTLE_SECONDS = 2  # time from an error to the end, in which other processes can report the same error
RUN_AGAIN = 75  # EX_TEMPFAIL, the exit code if nothing is wrong with this process
_INTERRUPTED = "jaxpref/interrupted"  # the key that `tell_interrupted` sets
_words = itertools.count()  # numbers the messages of process 0 to the others


# ---- Start -------------------------------------------------------------------------------------------------------


def define_flags() -> None:
  """Defines the flags that say how this process was started; `given_flags` returns their values."""
  flags.DEFINE_enum(
    "distributed",
    "auto",
    MODES,
    "Whether this is one of several processes of a run: auto (TPU slices, SLURM, Open MPI, indexed Kubernetes Jobs, or "
    "the three flags below), true, false. docs/operations.md.",
    case_sensitive=False,
  )
  flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, if no launcher says it.")
  flags.DEFINE_integer("num_processes", None, "Number of processes of this run, if no launcher says it.")
  flags.DEFINE_integer("process_id", None, "Number of this process, from 0, if no launcher says it.")


def given_flags() -> dict[str, Any]:
  """Returns the values of the flags, as the arguments of `find_launch`."""
  names = ("coordinator_address", "num_processes", "process_id")
  return {"mode": flags.FLAGS.distributed, **{name: flags.FLAGS[name].value for name in names}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the same flags to a command without absl; `launch_of` reads them."""
  launch = parser.add_argument_group("several processes, if no launcher says it (docs/operations.md)")
  launch.add_argument("--distributed", choices=MODES, default="auto", help="default: %(default)s")
  launch.add_argument("--coordinator_address", help="HOST:PORT of process 0")
  launch.add_argument("--num_processes", type=int, help="number of processes that run this command")
  launch.add_argument("--process_id", type=int, help="number of this process, from 0")


def launch_of(args: argparse.Namespace) -> Launch | None:
  """Returns `find_launch` of the arguments of `add_arguments`."""
  by_hand = {name: getattr(args, name) for name in ("coordinator_address", "num_processes", "process_id")}
  return find_launch(args.distributed, **by_hand)


def find_launch(
  mode: str,
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Launch | None:
  """Returns how this process was started together with others; None if it is alone.

  Args:
    mode: "auto": joins others if there are any, see `detect`; "true": there must be others; "false": never joins.
    coordinator_address, num_processes, process_id: see `detect`.
  Raises:
    ValueError: one sentence on what is missing or contradictory.
  """
  by_hand: dict[str, Any] = dict(
    coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id
  )
  if mode == "false":
    given = [name for name, value in by_hand.items() if value is not None]
    if given:
      raise ValueError(f"--distributed=false contradicts --{given[0]}; leave out one of them.")
    return None
  launch = detect(os.environ, **by_hand)
  return launch or (None if mode == "auto" else Launch("any launcher"))


@contextlib.contextmanager
def joined(
  launch: Launch | None, folder: str | os.PathLike, *, expected: tuple[type[BaseException], ...]
) -> Iterator[None]:
  """Joins this process to the others of its run; if one raises in the block or is lost, all end.

  A process that is alone just runs the block. Otherwise an exception in it is printed and ends the process (`leave`).

  Args:
    launch: as `find_launch` returns it.
    folder: the folder that the processes write, for messages.
    expected: exceptions of which only the message is printed, without a traceback.
  Raises:
    ValueError: one sentence on which process did not answer.
  """
  join(launch)
  try:
    yield
  except BaseException as error:
    if launch is None or (isinstance(error, SystemExit) and error.code in (None, 0, endings.INTERRUPTED)):
      raise
    leave(error, folder, expected=expected)


def join(launch: Launch | None) -> None:
  """Joins this process to the others, if any; JAX ends it once one of them has been lost for HEARTBEAT_SECONDS.

  Raises:
    ValueError: one sentence on which process did not answer.
  """
  if launch is None:
    return
  import jax

  patience = threading.Timer(PATIENCE_SECONDS, lambda: _say(_waits(launch)))  # when JAX gives up, it ends the process
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(
      coordinator_address=launch.coordinator_address,
      num_processes=launch.num_processes,
      process_id=launch.process_id,
      local_device_ids=launch.local_device_ids,
      cluster_detection_method=launch.detection,
      initialization_timeout=START_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=EXIT_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"jax.distributed cannot start for {launch.launcher} ({_first_line(error)}); give --coordinator_address, "
      "--num_processes and --process_id, or --distributed=false to continue in this process alone."
    ) from error
  finally:
    patience.cancel()


def _waits(launch: Launch) -> str:
  """Returns a sentence for a start at which others are missing."""
  return (
    f"this process ({launch.launcher}{'' if launch.process_id is None else f', number {launch.process_id}'}) waits for "
    f"all {launch.num_processes or 'others'} at {launch.coordinator_address or 'the address of process 0'}, up to "
    f"{START_SECONDS} s; start the same command on every host, and see that the hosts reach that address."
  )


def _say(text: str) -> None:
  print(f"\n{text}", file=sys.stderr, flush=True)


def _first_line(error: Any) -> str:
  lines = str(error).strip().splitlines()
  return lines[0].rstrip(" .:") if lines else type(error).__name__


# ---- In step -----------------------------------------------------------------------------------------------------


def barrier(name: str, *, seconds: float = 3600.0) -> None:
  """Waits until all processes have come here; returns at once if there is one. Use a name only once in a program."""
  from jax._src import distributed as runtime

  client: Any = runtime.global_state.client
  if client is not None:
    client.wait_at_barrier(f"jaxpref/{name}", int(seconds * 1000))


def is_first() -> bool:
  """Returns whether this is process 0, or the only process."""
  from jax._src import distributed as runtime

  state: Any = runtime.global_state
  return state.client is None or state.process_id == 0


def word_of_first(text: str, *, seconds: float = 3600.0) -> str:
  """Returns process 0's `text` in all processes; all must call it equally often, and the others wait."""
  from jax._src import distributed as runtime

  client: Any = runtime.global_state.client
  if client is None:
    return text
  key = f"jaxpref/word/{next(_words)}"
  if is_first():
    client.key_value_set(key, f"={text}")  # an empty value is not accepted everywhere
    return text
  return client.blocking_key_value_get(key, int(seconds * 1000))[1:]


def tell_interrupted() -> bool:
  """Tells all processes that someone pressed Ctrl-C; returns whether this process is the first to do so."""
  from jax._src import distributed as runtime

  client: Any = runtime.global_state.client
  if client is not None:
    try:
      client.key_value_set(_INTERRUPTED, str(runtime.global_state.process_id))
    except RuntimeError:  # another process was first, or they are ending
      return False
  return True


def was_interrupted() -> bool:
  """Returns whether any process has called `tell_interrupted`."""
  from jax._src import distributed as runtime

  client: Any = runtime.global_state.client
  with contextlib.suppress(RuntimeError):  # the key does not exist
    return client is not None and bool(client.key_value_try_get(_INTERRUPTED))
  return False


def check_shared(workdir: str | os.PathLike) -> None:
  """Waits until process 0 has made the work folder, then checks that this process sees it.

  Raises:
    ValueError: this process does not see it.
  """
  barrier("workdir")
  path = pathlib.Path(workdir).absolute()
  if not (path / "config.json").exists():
    raise ValueError(
      f"{socket.gethostname()} does not see {path / 'config.json'}, which process 0 has written; choose a --workdir "
      "on storage that all hosts mount at the same path."
    )


def host_metrics(own_seconds: float, step_seconds: float) -> dict[str, float]:
  """Returns which process the others wait for; {} if there is only one. All processes must call this.

  Args:
    own_seconds: per step, what this process spent by itself: waiting for its data, and in Python.
    step_seconds: per step, in all. It is the same everywhere, as each step waits for the slowest process.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if jax.process_count() == 1:
    return {}
  seconds = np.ravel(multihost_utils.process_allgather(np.float32(own_seconds)))
  return {
    "step_seconds": step_seconds,
    "host_seconds_max": float(seconds.max()),
    "host_seconds_median": float(np.median(seconds)),
    "slowest_process": float(seconds.argmax()),
  }


# ---- The end -----------------------------------------------------------------------------------------------------

# How errors begin, and what is in them, that have their cause in another process as a rule: a connection that broke, a
# barrier nobody came to.
_BETWEEN = re.compile(
  r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): .*"
  r"(Gloo|NCCL|coordination service|heartbeat|[Bb]arrier|[Cc]onnection|[Pp]eer|[Ss]ocket)",
  flags=re.DOTALL,
)


def leave(error: BaseException, folder: str | os.PathLike, *, expected: tuple[type[BaseException], ...]) -> NoReturn:
  """Ends this process, one of several, which cannot go on: prints why, and does not wait for the others.

  The exit code is 130 after Ctrl-C, here or, as far as this process knows, elsewhere. It is RUN_AGAIN if an operation
  between processes failed for another reason, as another process is the cause. Else it is 1.

  Args:
    error: the exception that was raised.
    folder, expected: see `joined`.
  """
  from jax._src import distributed as runtime

  state: Any = runtime.global_state
  pressed = isinstance(error, KeyboardInterrupt)
  if pressed:
    tell_interrupted()
  broken = not pressed and _BETWEEN.match(str(error)) is not None
  interrupted = pressed or (broken and was_interrupted())
  between = broken and not interrupted
  words = "it was interrupted" if interrupted else endings.in_words(error, f"working on {folder}")
  try:
    if between:
      why = f"another process of this run has ended ({_first_line(error)})"
      with contextlib.suppress(RuntimeError):  # it has not said why, or process 0 has ended
        why = state.client.key_value_try_get("jaxpref/failed")
      _say(f"error: {why}; {advice(folder)}")
    else:
      me, first = f"process {state.process_id} of {state.num_processes} (host {socket.gethostname()})", False
      with contextlib.suppress(RuntimeError):  # another process was first
        state.client.key_value_set("jaxpref/failed", f"{me} failed: {_first_line(words)}")
        first = True
      if interrupted:
        if first or not pressed:  # a terminal interrupts all of them
          _say(f"interrupted; {advice(folder)}")
      elif isinstance(error, expected):
        _say(f"error: {words}")
      else:
        _say("".join(traceback.format_exception(error)).rstrip())
      # Process 0 ends last: the others end when it does, before they can say anything.
      time.sleep(2 * SETTLE_SECONDS if state.process_id == 0 else SETTLE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
  finally:
    os._exit(RUN_AGAIN if between else endings.INTERRUPTED if interrupted else 1)


def advice(folder: str | os.PathLike) -> str:
  """Returns what to do once the cause is fixed, for the end of a message."""
  try:
    names = [path.name for path in (pathlib.Path(folder) / "checkpoints").iterdir()]
  except OSError:
    names = []
  steps = [int(name) for name in names if name.isdecimal()]
  where = f": it resumes at step {max(steps)}" if steps else ""
  return f"run the same command on all hosts again{where}."
