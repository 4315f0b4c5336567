"""Aligns a model with a taste in rounds: draws pairs, has them labelled, trains on them, and begins again:

    python -m jaxpref.taste --prompts=prompts.txt --out=my_taste --rounds=3
    python -m jaxpref.vote my_taste/pairs --round=0          # as the first command asks; then run that again
    python -m jaxpref.taste --prompts=prompts.txt --out=my_taste --rounds=3 --label=pickscore     # without people
    python -m jaxpref.taste --prompts=prompts.txt --out=my_taste --config=configs/taste_sdxl.py --lora=mine.safetensors

Each round draws with the newest model, and trains from it: it is the reference of its round (iterative Diffusion-DPO).
A LoRA is continued from round to round, so that the last one is all that was learnt. The first round may begin with a
LoRA of your own: the result then holds it, too, and is for the same base model. A call does whatever can be done,
prints the command to vote with once votes are missing, and continues when it is run again.

Arguments --config.NAME=VALUE go to training. Others that jaxpref.pairs has go to drawing, such as --seeds=4 --steps=30
--guidance_scale=7.5. See docs/taste.md.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

from jaxpref import arguments, pairs
from jaxpref.data.files import PAIRS_NAME
from jaxpref.devices import endings
from jaxpref.evaluation import settings
from jaxpref.files import adapters
from jaxpref.voting import export, rounds, store

# Arguments of jaxpref.pairs that this command decides.
OWN = ("model", "lora", "out", "round", "label", "prompts", "other_model", "distributed", "num_processes", "process_id")
ADAPTER, INIT = adapters.DIFFUSERS_FILE, "--config.lora.init_from="


class Waiting(Exception):
  """People have to vote before the next step; the message says how."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What was asked for.

  Attributes:
    out: the folder of all rounds.
    model: what the first round draws with and trains from.
    config: the recipe's file, perhaps with a variant.
    rounds: how many.
    votes: judged pairs that a round needs, if people vote.
    label: the reward that labels instead; None: people vote.
    prompts: for all rounds.
    lora: FILE or FILE:STRENGTH, an adapter to begin with; None: none.
    of_pairs, of_training: further arguments of both commands.
  """

  out: pathlib.Path
  model: str
  config: str
  rounds: int
  votes: int
  label: str | None
  prompts: str
  lora: str | None = None
  of_pairs: tuple[str, ...] = ()
  of_training: tuple[str, ...] = ()

  @property
  def pairs(self) -> pathlib.Path:
    """The folder of the rounds' pairs, and of the votes."""
    return self.out / "pairs"

  def run(self, number: int) -> pathlib.Path:
    """Returns the work folder of a round's training."""
    return self.out / "runs" / f"round_{number}"

  def is_trained(self, number: int) -> bool:
    """Returns whether a round's training has ended."""
    return (self.run(number) / "export" / "model_index.json").is_file()

  def adapter(self, number: int) -> str | None:
    """Returns the LoRA file that a round has trained; None if it trained all weights."""
    file = self.run(number) / "export" / ADAPTER
    return str(file) if file.is_file() else None

  def comparison(self) -> list[str]:
    """Returns the arguments of jaxpref.blind that compare the last round with what the first one began with."""
    last, parser = self.rounds - 1, argparse.ArgumentParser(add_help=False)
    settings.add_arguments(parser)
    of_blind = {name for action in parser._actions for name in action.option_strings} - {"--seeds"}
    given = [argument for argument in self.of_pairs if argument.partition("=")[0] in of_blind]
    before = f"{self.model}+{self.lora}" if self.lora else self.model
    after = f"{self.model}+{adapter}" if (adapter := self.adapter(last)) else str(self.run(last))
    return ["--models", f"before={before}", f"after={after}", f"--out={self.out / 'blind'}", *given]

  def drawing(self, number: int) -> list[str]:
    """Returns the arguments of jaxpref.pairs that draw a round."""
    model = [f"--model={self.run(number - 1)}"] if number else [f"--model={self.model}"]
    if self.lora and not number:
      model.append(f"--lora={self.lora}")
    return [*model, f"--prompts={self.prompts}", f"--out={self.pairs}", f"--round={number}", *self.of_pairs]

  def data(self, number: int) -> pathlib.Path:
    """Returns the folder with a round's labelled pairs."""
    return rounds.folder_of(self.pairs, number) if self.label else self.out / "votes" / f"round_{number}"

  def training(self, number: int) -> list[str]:
    """Returns the arguments of jaxpref.main that train a round."""
    command = [f"--config={self.config}", f"--workdir={self.run(number)}", *self.of_training]
    command += ["--config.data.source=pairs_file", f"--config.data.path={self.data(number)}"]
    adapter = self.adapter(number - 1) if number else self.lora
    if adapter is not None:
      of_file = ["--config.lora.rank=0"] if self.lora else []  # the rank of the recipe need not be the file's
      return [*command, f"--config.model={self.model}", f"--config.lora.init_from={adapter}", *of_file]
    return [*command, f"--config.model={self.model if not number else self.run(number - 1) / 'export'}"]


def main(argv: list[str] | None = None) -> None:
  """Does the next steps; an expected error, or a wait for votes, ends the program with one sentence."""
  with endings.one_sentence(ValueError, OSError, doing="aligning", again="the same command continues"):
    plan = parse(sys.argv[1:] if argv is None else argv)
    try:
      follow(plan)
    except Waiting as waiting:
      print(waiting)


def parse(argv: Sequence[str]) -> Plan:
  """Returns the plan of a command line.

  Raises:
    ValueError: arguments that do not fit together or that no command knows.
  """
  parser = arguments.Parser(prog="python -m jaxpref.taste", description=__doc__, allow_abbrev=False)
  add = parser.add_argument
  add("--out", type=arguments.path, required=True, help="a new folder for pairs, votes and runs, or one to continue")
  add("--prompts", type=arguments.place, required=True, help="a file of prompts, or emoji: docs/evaluation.md")
  add("--model", type=arguments.place, help="what to begin with: folder, hub name or run (default: the recipe's)")
  add(
    "--lora", type=arguments.place, metavar="FILE[:STRENGTH]", help="a LoRA of yours to begin with, which is continued"
  )
  add("--config", default="configs/taste_tiny.py", help="the recipe (default: %(default)s)")
  add("--rounds", type=int, default=1, help="how often to draw, label and train (default: %(default)s)")
  add("--votes", type=int, default=200, help="pairs that people judge in each round (default: %(default)s)")
  add("--label", metavar="REWARD", help="a reward of jaxpref.pairs that labels the pairs, instead of people")
  args, others = parser.parse_known_args(list(argv))
  of_training = tuple(other for other in others if other.startswith("--config."))
  of_pairs = tuple(other for other in others if other not in of_training)
  if model := next((other for other in of_training if other.startswith("--config.model=")), None):
    raise ValueError(f"{model}: each round has a model of its own; name the first with --model.")
  if args.lora is not None:
    adapters.look_for(adapters.parse_lora_file(args.lora).path)
    if given := next((other for other in of_training if other.startswith(("--config.lora.rank=", INIT))), None):
      raise ValueError(f"{given}: the LoRA is that of --lora={args.lora}, with the rank of the file; leave it out.")
  _check_pairs(of_pairs)
  for name in ("rounds", "votes"):
    if getattr(args, name) < 1:
      raise ValueError(f"--{name}={getattr(args, name)}; expected at least 1.")
  if args.label is not None and any(argument.startswith("--votes") for argument in argv):
    raise ValueError(f"--votes is for people, and --label={args.label} labels instead; leave out one of them.")
  file = args.config.partition(":")[0]
  if not pathlib.Path(file).is_file():
    raise ValueError(f"--config={args.config}: there is no {file}; expected a recipe such as configs/taste_tiny.py.")
  return Plan(
    out=args.out,
    model=args.model or _model_of(args.config),
    config=args.config,
    rounds=args.rounds,
    votes=args.votes,
    label=args.label,
    prompts=args.prompts,
    lora=args.lora,
    of_pairs=of_pairs,
    of_training=of_training,
  )


def _check_pairs(given: Sequence[str]) -> None:
  """Raises ValueError for an argument that jaxpref.pairs does not have, or that is not its user's here."""
  known = {name for action in pairs.make_parser()._actions for name in action.option_strings}
  for argument in given:
    name = argument.partition("=")[0]
    if not name.startswith("--") or name not in known or name[2:] in OWN or "=" not in argument:
      raise ValueError(
        f"{argument}: expected an argument of this command, --config.NAME=VALUE, or --NAME=VALUE of jaxpref.pairs; "
        "see --help of both."
      )


def _model_of(config: str) -> str:
  """Returns the model of a recipe."""
  import runpy

  file, _, variant = config.partition(":")
  try:
    recipe = runpy.run_path(file)
    if "get_config" not in recipe:
      raise ValueError(f"--config={config}: {file} has no function get_config; see configs/taste_tiny.py.")
    found = recipe["get_config"](*filter(None, [variant]))
  except Exception as error:
    if (where := arguments.line_of_recipe(error, ["taste", f"--config={config}"])) is None:
      raise
    raise ValueError(where) from error
  if not hasattr(found, "model"):
    raise ValueError(f"--config={config}: its get_config returns no recipe; end it with: return config.")
  return str(found.model)


def follow(plan: Plan) -> None:
  """Does what is left of all rounds, up to the votes that are missing.

  Raises:
    Waiting: people have to vote.
    ValueError: a command failed, which has said why.
  """
  for number in range(plan.rounds):
    if plan.is_trained(number):
      continue
    if not (rounds.folder_of(plan.pairs, number) / PAIRS_NAME).is_file():
      _say(plan, number, "drawing pairs")
      _run("pairs", plan.drawing(number), read=True)
    if plan.label is not None:
      if not (rounds.folder_of(plan.pairs, number) / pairs.LABELS).is_file():
        _say(plan, number, f"labelling by {plan.label}")
        _run("pairs", [f"--out={plan.pairs}", f"--round={number}", f"--label={plan.label}"], read=True)
    else:
      _gather_votes(plan, number)
    _say(plan, number, "training")
    _run("main", plan.training(number))
  last = plan.run(plan.rounds - 1)
  print(f"aligned in {plan.rounds} round{'s' * (plan.rounds > 1)}: {last}")
  if adapter := plan.adapter(plan.rounds - 1):
    print(f"its LoRA, for {plan.model}: {adapter}")
  print("next, with a file of prompts that nobody has voted on:")
  print(f"  python -m jaxpref.blind {shlex.join(plan.comparison())} --prompts=PROMPTS")


def _gather_votes(plan: Plan, number: int) -> None:
  """Exports a round's votes; raises Waiting if there are too few."""
  voting = [str(plan.pairs), f"--round={number}"]
  if (plan.pairs / store.NAME).is_file():
    found = json.loads(_run("vote", [*voting, "--summary"], read=True))
  else:  # nobody has opened the page yet
    drawn = (rounds.folder_of(plan.pairs, number) / PAIRS_NAME).read_text(encoding="utf-8")
    found = {"judged": 0, "pairs": len(drawn.splitlines())}
  needed = min(plan.votes, found["pairs"])
  if found["judged"] < needed:
    raise Waiting(
      f"round {number + 1} of {plan.rounds}: {found['judged']} of {needed} pairs are judged. Vote, end with Ctrl-C, "
      f"and run this command again:\n  python -m jaxpref.vote {shlex.join(voting)}"
    )
  folder = plan.data(number)
  if not (folder / export.UNPAIRED_NAME).is_file():
    _run("vote", [*voting, f"--export={folder}"])


def _say(plan: Plan, number: int, what: str) -> None:
  print(f"round {number + 1} of {plan.rounds}: {what}", file=sys.stderr)


def _run(command: str, given: Sequence[str], *, read: bool = False) -> str:
  """Runs a command of the package in a process of its own, and returns what it prints if that is to be read."""
  line = [sys.executable, "-m", f"jaxpref.{command}", *given]
  done = subprocess.run(line, stdout=subprocess.PIPE if read else None, text=True)
  if done.returncode == endings.INTERRUPTED:
    raise KeyboardInterrupt
  if done.returncode:
    raise ValueError(
      f"{shlex.join(['python', *line[1:]])} failed, as it says above; mend it and run this command again."
    )
  return done.stdout or ""


if __name__ == "__main__":
  main()
