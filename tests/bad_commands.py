"""Command lines that cannot work, and what is to be said of each; run by `python -m tests.bad_commands` in few processes.

The program reads [command, arguments] from stdin, one a line in JSON, and answers each with [exit code, what was said]. A
child process runs the command as its module does; the libraries are imported once.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback

MODULES = {  # where each begins
  "train": ("jaxpref.main", "run"),
  "sample": ("jaxpref.sample", "main"),
  "evaluate": ("jaxpref.evaluate", "main"),
  "export": ("jaxpref.export", "main"),
  "score": ("jaxpref.score", "run"),
  "precompute": ("jaxpref.precompute", "start"),
  "describe": ("jaxpref.describe", "main"),
  "compile": ("jaxpref.compile", "run"),
  "replay": ("jaxpref.replay", "main"),
  "pickapic": ("jaxpref.data.pickapic.__main__", "main"),
}

DPO, SPO, SPM = (f"--config=recipes/{name}_tiny.py" for name in ("dpo", "spo", "spm"))
ONE = "--prompt=red apple"
BASE = ["--models=base=tiny-sd", "--prompts=emoji", "--scorers=judge"]
BIG = str(2**40)

TABLE = [
  ("train", [], "--config is missing"),
  ("train", ["--config=nowhere.py"], "no file nowhere.py"),
]


def child(command, arguments):
  """Runs a command line to its end, as the interpreter would."""
  module, name = MODULES[command]
  sys.argv = [module, *arguments]
  try:
    getattr(importlib.import_module(module), name)()
  except SystemExit as ended:
    if isinstance(ended.code, str):
      print(ended.code, file=sys.stderr)
      return 1
    return ended.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def serve():
  for name in ("training.loop", *(m.removeprefix("jaxpref.") for m, _ in MODULES.values() if m != "jaxpref.main")):
    importlib.import_module(f"jaxpref.{name}")
  import orbax.checkpoint  # noqa: F401
  import tensorflow_datasets  # noqa: F401

  for line in sys.stdin:
    command, arguments = json.loads(line)
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir="/tmp") as said:
      pid = os.fork()
      if pid == 0:
        signal.alarm(60)
        os.dup2(said.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = child(command, arguments)
        sys.stderr.flush()
        os._exit(code)
      code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
      said.seek(0)
      print(json.dumps([code, said.read()]), flush=True)


if __name__ == "__main__":
  serve()
