"""Trains a recipe, or continues a run:

    python -m jaxpref.main --config=configs/spo_tiny.py --workdir=runs/spo_tiny --config.num_steps=80

jaxpref/config.py lists all fields of a recipe. Under SLURM, Open MPI and Kubernetes and on TPUs several processes need
no flags; elsewhere use --distributed, --coordinator_address, --num_processes and --process_id (docs/operations.md).
"""

import os
import pathlib
import re
import shlex
import sys
from collections.abc import MutableMapping

from absl import app, flags, logging
from ml_collections import config_flags

from jaxpref import arguments
from jaxpref import config as config_lib
from jaxpref.config import Config
from jaxpref.devices import chips, distributed, endings

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The recipe, e.g. configs/spo_tiny.py or configs/spo_sdxl.py:smoke. Change a field with --config.NAME=VALUE.",
)
_WORKDIR = arguments.define_place(
  "workdir",
  None,
  "Folder of checkpoints, metrics and results, the same for all processes. The same command resumes a run; it fails "
  "while the first one still runs. Default: runs/NAME of the recipe.",
)
AGAIN = "the same command continues from the last checkpoint"
distributed.define_flags()
flags.mark_flag_as_required("config")


def _default_workdir() -> str:
  path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
  return str(pathlib.Path("runs") / "_".join(filter(None, [pathlib.Path(path).stem, argument])))


def set_defaults(environment: MutableMapping[str, str]) -> None:
  """Sets defaults for libraries' environment variables; must run before JAX is imported."""
  caches = os.path.expanduser(environment.get("XDG_CACHE_HOME") or "~/.cache")
  # Compiled steps are kept, so that the second start of a run does not compile again.
  environment.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(caches, "jaxpref", "compiled"))
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a start compiles a hundred small programs
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:  # its older name
    environment.setdefault("XLA_CLIENT_MEM_FRACTION", str(chips.GPU_SHARE))
  if virtual := re.search(r"xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", "")):
    # A virtual device that waits for the others holds a thread; with only as many as cores, all may wait for ever.
    environment.setdefault("NPROC", str(4 * int(virtual[1])))


def main(argv: list[str]) -> None:
  """Runs the recipe; an expected error ends the program with one sentence (--verbosity=1 shows the traceback)."""
  if len(argv) > 1:
    sys.exit(f"error: unexpected argument {argv[1]!r}; set fields with --config.NAME=VALUE.")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  workdir = _WORKDIR.value or _default_workdir()
  if "://" in workdir:
    sys.exit(f"error: --workdir={workdir}: expected a folder; mount the bucket (docs/operations.md) and give its path.")
  from jaxpref.training import loop

  expected = (ValueError, OSError, loop.NonFiniteError) if logging.get_verbosity() <= 0 else ()
  with endings.one_sentence(*expected, doing=f"training in {workdir}", again=AGAIN):
    launch = distributed.find_launch(**distributed.given_flags())
    with distributed.joined(launch, workdir, expected=expected):
      command = shlex.join(["python", "-m", "jaxpref.main", *sys.argv[1:]])
      run_and_evaluate(config_lib.typed(_CONFIG.value), workdir, command)


def run_and_evaluate(config: Config, workdir: str, command: str = "") -> None:
  """Calls `loop.run`, then compares with the base model by config.evaluation.scorers, if there are any."""
  from jaxpref import evaluate
  from jaxpref.data import lease
  from jaxpref.training import loop, run_page

  if not config.evaluation.scorers:
    loop.run(config, workdir, command=command)
    return
  config_lib.check(config)
  arguments = evaluate.arguments_of_run(config, workdir)  # raises for missing files before training
  with lease.hold(workdir):  # also between the two
    loop.run(config, workdir, command=command)
    evaluate.evaluate(arguments)
    if distributed.is_first():
      run_page.write(pathlib.Path(workdir))  # which has a link to it now


def run() -> None:
  """Runs the command: the console entry point."""
  set_defaults(os.environ)  # now: reading the options of your own objective imports JAX
  with endings.one_sentence(doing="training", again=AGAIN):
    app.run(main, flags_parser=arguments.parse_flags)


if __name__ == "__main__":
  run()
