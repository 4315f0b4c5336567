"""`jaxpref COMMAND ...` runs any command. Each is also `python -m jaxpref.COMMAND`, except that train is jaxpref.main.

  train        trains a recipe: --config=configs/spo_tiny.py; the default, so `jaxpref --config=...` trains too
  sample       draws prompts with a model
  evaluate     compares models by scorers and writes a page of their pictures
  export       writes a run's model as a pipeline or a LoRA file
  score        scores the pairs of a recipe's data with a preference model
  pairs        draws pairs of pictures for prompts and labels them with a reward
  vote         shows pairs in a browser, where people choose the better picture
  blind        compares models by people who do not know which one drew what
  taste        draws, labels and trains in rounds, by people's votes or by a reward
  precompute   runs the frozen networks over a recipe's data once
  describe     says what preference data holds
  compile      compiles a training step for devices that this machine need not have
  replay       runs a step that went wrong again
  show         writes the page of a run, finished or not

`jaxpref COMMAND --help` lists the arguments of each.
"""

import difflib
import runpy
import sys

from jaxpref.devices import endings

COMMANDS = (
  "train", "sample", "evaluate", "export", "score", "pairs", "vote", "blind", "taste", "precompute", "describe",
  "compile", "replay", "show",
)  # fmt: skip


def run() -> None:
  """Runs the command that the first argument names: the console entry point."""
  given = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if given in ("-h", "--help", "help"):
    print(__doc__, end="")
    return
  command = "train" if given.startswith("-") else given
  if command not in COMMANDS:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    sys.exit(f"error: jaxpref {command} is not a command{hint}; expected one of {', '.join(COMMANDS)}.")
  if given == command:
    del sys.argv[1]
  endings.begin()
  runpy.run_module(f"jaxpref.{'main' if command == 'train' else command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  run()
