"""Compares models by people who do not know which model drew what:

    python -m jaxpref.blind --models base=tiny-sd aligned=runs/spo_tiny --prompts=emoji --out=blind --votes=100
    python -m jaxpref.blind evaluation --votes=100

The page is that of jaxpref.vote, and the models draw while you vote. The second command compares the pictures of a
finished jaxpref.evaluate. The first model is the one that the others are compared with. The rule by which voting ends
is fixed before the first vote, and nothing on the page tells the models apart until then. Results are on the page and
in blind_results.json and blind.html: win rates with intervals, and an exact sign test over prompts. jaxpref.evaluate
shows them beside other scorers with --scorers votes=FOLDER. See docs/taste.md.
"""

import argparse
import contextlib
import io
import json
import pathlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxpref import arguments, evaluate
from jaxpref.data import lease, paths, prompt_sets
from jaxpref.devices import endings, sharding
from jaxpref.evaluation import drawing, settings
from jaxpref.evaluation import folder as evaluation_folder
from jaxpref.voting import blind_folder, guard, schedule, server, store, trial
from jaxpref.voting.ballot import Ballot
from jaxpref.voting.catalog import OfModels

PROMPTS_AT_A_TIME = 4  # prompts that each model draws before the next model's turn
TITLE = "Which picture is better?"


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments and serves the page; an expected error ends the program with one sentence."""
  parser = make_parser()
  args = parser.parse_args(argv)
  with endings.one_sentence(
    *(ValueError, OSError), doing="comparing", again="all votes are kept; the same command continues"
  ):
    compare(args)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the arguments that `compare` takes."""
  parser = arguments.Parser(prog="python -m jaxpref.blind", description=__doc__)
  add = parser.add_argument
  add("folder", nargs="?", type=arguments.path, metavar="FOLDER", help="of a finished jaxpref.evaluate, or of blind")
  add("--out", type=arguments.path, help="folder for pictures, votes and results, with --models")
  add("--votes", type=int, help="pairs after which voting ends (default: all pairs)")
  add(
    "--stop",
    choices=trial.STOPS,
    default=trial.STOPS[0],
    help="early: end as soon as the votes show a difference, by a test that may be looked at after each vote "
    "(default: %(default)s, after --votes)",
  )
  add("--overlap", type=float, default=0.1, help="share of the pairs that all voters judge (default: %(default)s)")
  add("--order_seed", type=int, default=0, help="seed of the order and the sides (default: %(default)s)")
  add("--results", action="store_true", help="write the results of the votes so far, and say whether voting has ended")
  add_page_arguments(parser)
  add_drawing_arguments(parser, "for models that draw while you vote, instead of FOLDER")
  return parser


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments about the page's server."""
  add = parser.add_argument_group("page").add_argument
  add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, for this machine alone)")
  add("--port", type=int, default=server.PORT, help="(default: %(default)s)")


def add_drawing_arguments(parser: argparse.ArgumentParser, what: str) -> None:
  """Adds the arguments about models and their pictures: those of jaxpref.evaluate."""
  group = parser.add_argument_group("models", what)
  add = group.add_argument
  add("--models", nargs="+", default=[], metavar="NAME=MODEL", help="see python -m jaxpref.evaluate --help")
  add("--model_config", nargs="+", default=[], metavar="NAME=FOLDER", help="see python -m jaxpref.evaluate --help")
  add("--unet_model", nargs="+", default=[], metavar="NAME=UNET", help="see python -m jaxpref.evaluate --help")
  add("--prompts", type=arguments.place, help="emoji, emoji:SPLIT, or a file of prompts: docs/evaluation.md")
  add("--prompts_kind", choices=prompt_sets.KINDS, help="format of the file (default: from its name and content)")
  add("--num_prompts", type=int, help="how many prompts to use, evenly spread (default: all)")
  settings.add_arguments(group)  # type: ignore[arg-type]
  group.set_defaults(seeds=1)


# ---- What is asked for -------------------------------------------------------------------------------------------


def check_page(args: argparse.Namespace) -> None:
  """Raises ValueError for an address that cannot be listened on."""
  if not 1 <= args.port < 2**16:
    raise ValueError(f"--port={args.port}; expected 1 to 65535.")


def check_drawing(args: argparse.Namespace) -> None:
  """Raises ValueError for models that cannot be drawn, and for arguments about models without --models."""
  if not args.models:
    for name in ("prompts", "prompts_kind", "num_prompts", "model_config", "unet_model"):
      if getattr(args, name):
        raise ValueError(f"--{name} is for --models; name them, or leave it out.")
    return
  if args.prompts is None:
    raise ValueError("--prompts is missing; name what the models draw, such as --prompts=emoji.")
  settings.check(args)


def compare(args: argparse.Namespace) -> None:
  """Serves the page, or writes the results."""
  if bool(args.models) == (args.folder is not None):
    raise ValueError("expected FOLDER or --models, and not both; say what to compare.")
  if args.folder is not None and args.out is not None:
    raise ValueError(f"--out={args.out} is for --models; votes and results go into FOLDER.")
  if args.votes is not None and args.votes < 1:
    raise ValueError(f"--votes={args.votes}; expected at least 1.")
  if not 0.0 <= args.overlap <= 1.0:
    raise ValueError(f"--overlap={args.overlap}; expected 0 to 1.")
  check_page(args)
  check_drawing(args)
  if args.models:
    if len(args.models) < 2:
      raise ValueError("--models names one model; a comparison needs two or more.")
    if args.out is None:
      raise ValueError("--out is missing; name the folder for pictures, votes and results.")
  folder = args.out if args.out is not None else args.folder
  if args.results:
    print(blind_folder.write_results(folder))
    return
  server.check_library()
  drawn = drawn_while_voting(args, folder) if args.models else contextlib.nullcontext()
  with server.listen(args.host, args.port) as listening, drawn as drawing_now:
    found = drawing_now.catalog if drawing_now is not None else blind_folder.catalog_of(folder)
    with _opened(folder, found, args, drawing_now) as (ballot, rule):
      print(rule.in_words(), file=sys.stderr)
      summary = lambda: _summary(ballot, found, rule)
      try:
        show(ballot, folder, args.host, listening, summary=summary)
      finally:
        if ballot.has_ended():
          blind_folder.write(folder, trial.results(rule, found.cells, found.models, ballot.judgements()))


@contextlib.contextmanager
def _opened(
  folder: pathlib.Path, found: OfModels, args: argparse.Namespace, now: "Drawing | None"
) -> Iterator[tuple[Ballot, trial.Rule]]:
  with lease.hold(folder, name=blind_folder.LOCK) as held:
    votes = store.Store(folder / store.NAME)
    try:
      rule = blind_folder.state_rule(votes, trial.Rule(min(args.votes or len(found.keys), len(found.keys)), args.stop))
      rules = schedule.Rules(seed=args.order_seed, overlap=args.overlap)
      ended = lambda said: trial.has_ended(rule, found.cells, said)
      drawing_now = None if now is None else now.status
      yield Ballot(found, votes, rules, ended=ended, drawing=drawing_now, check=held.check), rule
    finally:
      votes.close()


# ---- Drawing while people vote -----------------------------------------------------------------------------------


class Drawing:
  """Models that draw in a thread, a few prompts each in turn, so that the first pairs are there soon.

  Attributes:
    catalog: all pairs, drawn or not.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    models: Mapping[str, evaluate.Model],
    prompts: Sequence[prompt_sets.Prompt],
    args: argparse.Namespace,
  ):
    """Prepares; `start` begins to draw."""
    self.catalog = OfModels(folder, [prompt.text for prompt in prompts], list(models), args.seeds)
    self._folder, self._models, self._prompts, self._args = folder, models, prompts, args
    self._status: str | None = "Loading the models."
    self._stopped = threading.Event()
    self.thread = threading.Thread(target=self._run, name="drawing", daemon=True)

  def status(self) -> str | None:
    """Returns what the page says; None once all pictures are there."""
    return self._status

  def stop(self) -> None:
    """Ends after what is being loaded or drawn: a thread that computes must not outlive the interpreter."""
    self._stopped.set()
    if self.thread.is_alive():
      print("finishing what is being drawn; Ctrl-C again stops at once", file=sys.stderr, flush=True)
      self.thread.join()

  def _run(self) -> None:
    try:
      self._draw()
      self._status = None
    except Exception as error:  # whatever it is, voting on what is there goes on
      self._status = "Drawing has stopped; the terminal says why."  # it may name the model
      print(f"error: drawing has stopped: {error}", file=sys.stderr, flush=True)

  def _draw(self) -> None:
    seeds, count = self._args.seeds, len(self._prompts) * self._args.seeds
    file = lambda name, n: evaluation_folder.image_file(self._folder, name, *divmod(int(n), seeds))
    missing = {
      name: np.asarray([n for n in range(count) if not evaluation_folder.is_whole(file(name, n))], np.int64)
      for name in self._models
    }
    if not any(numbers.size for numbers in missing.values()):
      return
    mesh = sharding.make_mesh(devices=jax.local_devices())
    texts = [prompt.text for prompt in self._prompts]
    drawers = {}
    for name in (name for name, numbers in missing.items() if numbers.size):
      module, params, tokenize = settings.load(*self._models[name], self._args, mesh)
      of_draw = settings.of_draw(self._args, module, tokenize)
      of_draw.pop("seeds_per_prompt")
      drawers[name] = drawing.make_sampler(module, mesh=mesh, **of_draw), params, tokenize(texts)
      (self._folder / "images" / name).mkdir(parents=True, exist_ok=True)
      if self._stopped.is_set():
        return
    for start in range(0, count, PROMPTS_AT_A_TIME * seeds):
      self._status = f"{start // seeds} of {len(self._prompts)} prompts are drawn."
      for name, (sample, params, ids) in drawers.items():
        numbers = missing[name]
        numbers = numbers[(numbers >= start) & (numbers < start + PROMPTS_AT_A_TIME * seeds)]
        batch = min(self._args.batch_size, PROMPTS_AT_A_TIME * seeds)
        drawn = drawing.draw_by(
          sample, params, ids, seeds_per_prompt=seeds, batch_size=batch, mesh=mesh, numbers=numbers
        )
        for found, images in drawn:
          for number, image in zip(found, images, strict=True):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="PNG")
            paths.write(file(name, number), encoded.getvalue())
          if self._stopped.is_set():
            return


@contextlib.contextmanager
def drawn_while_voting(args: argparse.Namespace, folder: pathlib.Path) -> Iterator[Drawing]:
  """Begins or continues the folder of jaxpref.evaluate that --models, --prompts and the settings describe, and draws.

  Raises:
    ValueError, OSError: the models differ in size, or do not exist; or the folder has other pictures.
  """
  models = evaluate.with_unets(
    evaluate.with_configs(evaluate.parse_models(args.models), args.model_config), args.unet_model
  )
  prompts = evaluate.read_prompts(args.prompts, kind=args.prompts_kind, count=args.num_prompts)
  drawing.check_count(len(prompts), args.seeds)
  sizes = evaluate.check_sizes(models, args)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--out={folder} is a file; name a folder.")
  with lease.hold(folder):
    evaluation_folder.open_folder(folder, evaluation_folder.make_manifest(args, models, prompts, sizes))
    statement = {
      "models": list(models),
      "baseline": next(iter(models)),
      "prompts": [{"text": p.text, "category": p.category, "id": p.id} for p in prompts],
      "seeds_per_prompt": args.seeds,
    }
    paths.write(folder / blind_folder.STATEMENT, (json.dumps(statement, indent=1) + "\n").encode())
    found = Drawing(folder, models, prompts, args)
    found.thread.start()
    try:
      yield found
    finally:
      found.stop()


# ---- Page --------------------------------------------------------------------------------------------------------


def show(
  ballot: Ballot,
  folder: pathlib.Path,
  host: str,
  listening: socket.socket,
  *,
  summary: Callable[[], dict[str, Any]] | None = None,
) -> None:
  """Serves the page of a ballot until Ctrl-C; prints its link.

  Args:
    ballot: what to vote on.
    folder: of the votes, and of the token.
    host, listening: see `server.listen`.
    summary: what everybody may see; `Ballot.summary` by default.
  """
  token = server.token_of(folder)
  app = server.make_app(ballot, title=TITLE, token=token, host=host, summary=summary)
  if not guard.is_loopback(host):
    print(
      "warning: the page is open to the network, without encryption; whoever sees the link can vote.", file=sys.stderr
    )
  address = server.link(host, listening.getsockname()[1], token)
  print(f"{address}\nvotes go to {folder / store.NAME}; Ctrl-C ends", flush=True)
  server.run(app, listening)


def _summary(ballot: Ballot, found: OfModels, rule: trial.Rule) -> dict[str, Any]:
  """Returns the ballot's summary with the results, which nobody sees before the end."""
  shown = ballot.summary()
  del shown["first_without_bias"]  # it would tell how often the baseline wins
  if not shown["ended"]:
    return shown | {"comparison": {"rule": rule.in_words()}}
  return shown | {"comparison": trial.results(rule, found.cells, found.models, ballot.judgements())}


if __name__ == "__main__":
  main()
