"""Shows pairs of pictures in a browser, and people choose the better one of each:

    python -m jaxpref.vote --demo
    python -m jaxpref.vote pairs
    python -m jaxpref.vote pairs --export=taste
    python -m jaxpref.main --config=configs/dpo_tiny.py --config.data.source=pairs_file --config.data.path=taste

The first command draws a few pairs with tiny-sd and shows them. The second one shows the pairs that jaxpref.pairs drew,
with or without rounds, or those of any source of pairs. With --models two models draw while you vote. The command
prints a link; open it, and vote with the mouse, by touch, or with the arrow keys. Votes are in votes.sqlite, written
before the next pair appears. Ctrl-C ends the command, and the same command continues. See docs/taste.md.
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

from jaxpref import arguments, blind, pairs
from jaxpref.data import lease, paths, sources
from jaxpref.data.files import PAIRS_NAME
from jaxpref.devices import endings
from jaxpref.rewards import published
from jaxpref.voting import active, blind_folder, catalog, export, judgements, rounds, schedule, server, store
from jaxpref.voting.ballot import Ballot
from jaxpref.voting.catalog import Catalog

DEMO = "jaxpref_demo"
DEMO_PAIRS = ["--model=tiny-sd", "--prompts=emoji", "--num_prompts=24", "--seeds=2", "--guidance_scale=3"]


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments and serves the page; an expected error ends the program with one sentence."""
  parser = make_parser()
  args = parser.parse_args(argv)
  args.changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
  with endings.one_sentence(
    *(ValueError, OSError), doing="voting", again="all votes are kept; the same command continues"
  ):
    vote(args)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the arguments that `vote` takes."""
  parser = arguments.Parser(prog="python -m jaxpref.vote", description=__doc__)
  add = parser.add_argument
  add(
    "pairs",
    nargs="?",
    type=arguments.place,
    metavar="PAIRS",
    help="what jaxpref.pairs wrote, or another source of pairs: docs/data.md",
  )
  add("--demo", action="store_true", help=f"draw a few pairs with tiny-sd into {DEMO} (or --out), and vote on them")
  add("--kind", choices=sources.PAIR_KINDS, help="kind of PAIRS (default: from its name and content)")
  add("--split", default="train", help="split of a tfds dataset (default: %(default)s)")
  add("--round", type=int, help="the round of PAIRS to vote on or to export (default: all)")
  add("--out", type=arguments.path, help="folder of the votes (default: that of PAIRS)")
  add("--overlap", type=float, default=0.1, help="share of the pairs that all voters judge (default: %(default)s)")
  add("--order_seed", type=int, default=0, help="seed of the order and the sides (default: %(default)s)")
  add(
    "--active",
    nargs="?",
    const="clip_l",
    metavar="CLIP",
    help="ask about the pairs that a preference model, trained on the votes so far over the embeddings of a CLIP "
    f"({', '.join(published.CLIPS)}; clip_l if none is named), is least sure of (default: at random)",
  )
  add("--summary", action="store_true", help="print what the votes say so far, as JSON, instead of voting")
  of_export = parser.add_argument_group("export")
  add = of_export.add_argument
  add("--export", type=arguments.path, metavar="FOLDER", help="write the votes as labelled pairs instead of voting")
  add("--export_format", choices=export.FORMATS, default=export.FORMATS[0], help="(default: %(default)s)")
  add(
    "--labels",
    choices=judgements.KINDS,
    default=judgements.KINDS[0],
    help="majority of the voters, soft: the share that preferred a picture, voter: one of them (default: %(default)s)",
  )
  add("--voter", metavar="NAME", help="whose votes --labels=voter takes")
  blind.add_page_arguments(parser)
  blind.add_drawing_arguments(parser, "for voting on two models that draw while you vote, instead of PAIRS")
  return parser


# ---- What is asked for -------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
  """Raises ValueError for arguments that cannot work together, before anything is read."""
  kinds = {"PAIRS": args.pairs is not None, "--demo": args.demo, "--models": bool(args.models)}
  given = [name for name, is_given in kinds.items() if is_given]
  if len(given) != 1:
    found = " and ".join(given) or "none of them"
    raise ValueError(f"expected one of PAIRS, --demo and --models, found {found}; say what to vote on.")
  if not 0.0 <= args.overlap <= 1.0:
    raise ValueError(f"--overlap={args.overlap}; expected 0 to 1.")
  if args.order_seed < 0:
    raise ValueError(f"--order_seed={args.order_seed}; expected at least 0.")
  if args.round is not None and args.pairs is None:
    raise ValueError(f"--round={args.round} is for a folder of rounds; name it as PAIRS.")
  if args.active is not None and args.active.partition("=")[0] not in published.CLIPS:
    raise ValueError(f"--active={args.active}; expected one of {', '.join(published.CLIPS)}, or NAME=FOLDER.")
  if args.export is None and (extra := [n for n in ("export_format", "labels", "voter") if n in args.changed]):
    raise ValueError(f"--{extra[0]} is for --export; name a folder to export to.")
  if (args.labels == "voter") != (args.voter is not None):
    raise ValueError("--labels=voter and --voter=NAME belong together; give both.")
  if args.models:
    if len(args.models) != 2:
      raise ValueError(f"--models names {len(args.models)} models; expected two, as NAME=MODEL NAME=MODEL.")
    if args.out is None:
      raise ValueError("--out is missing; name the folder for pictures and votes.")
  if args.pairs is None and (args.export is not None or args.summary):
    raise ValueError("--export and --summary take a folder that has votes; name it as PAIRS.")
  blind.check_drawing(args)
  blind.check_page(args)


def folder_of(args: argparse.Namespace) -> pathlib.Path:
  """Returns the folder of the votes.

  Raises:
    ValueError: the pairs lie in a bucket, and --out is not given.
    FileNotFoundError: there are no pairs.
  """
  if args.out is not None:
    return args.out
  if args.demo:
    return pathlib.Path(DEMO)
  place = pathlib.Path(args.pairs)
  if paths.is_remote(args.pairs):
    raise ValueError(f"--out is missing; name a folder of this machine for the votes on {args.pairs}.")
  if not place.exists():
    raise FileNotFoundError(f"there is no file or folder {place}.")
  return place if place.is_dir() else place.with_name(f"{place.name}.votes")


def vote(args: argparse.Namespace) -> None:
  """Serves the page, exports, or prints the summary."""
  check(args)
  folder = folder_of(args)
  if args.export is not None or args.summary:
    store.check_file(folder)
    _read_only(args, folder)
    return
  server.check_library()
  with server.listen(args.host, args.port) as listening:
    if args.demo:
      _draw_demo(folder)
      args.pairs = str(folder)
    with blind.drawn_while_voting(args, folder) if args.models else contextlib.nullcontext() as drawing:
      found = _catalog(args) if drawing is None else drawing.catalog
      rules = schedule.Rules(seed=args.order_seed, overlap=args.overlap)
      with opened(folder, found, rules, drawing=None if drawing is None else drawing.status) as ballot:
        learner = None if args.active is None else active.Learner(ballot, published.image_embedder(args.active))
        try:
          blind.show(ballot, folder, args.host, listening)
        finally:
          if learner is not None:
            learner.stop()


def _catalog(args: argparse.Namespace) -> Catalog:
  if not paths.is_remote(args.pairs) and (pathlib.Path(args.pairs) / blind_folder.STATEMENT).is_file():
    return blind_folder.catalog_of(pathlib.Path(args.pairs))
  return catalog.open_catalog(args.pairs, kind=args.kind, split=args.split, only=args.round)


@contextlib.contextmanager
def opened(
  folder: pathlib.Path,
  found: Catalog,
  rules: schedule.Rules,
  *,
  drawing: Callable[[], str | None] | None = None,
) -> Iterator[Ballot]:
  """Gives the ballot of a folder, which this process alone has.

  Raises:
    lease.Occupied: another server has it.
    ValueError, OSError: see `Store`.
  """
  with lease.hold(folder, name=blind_folder.LOCK) as held:
    votes = store.Store(folder / store.NAME)
    try:
      yield Ballot(found, votes, rules, drawing=drawing, check=held.check)
    finally:
      votes.close()


def _draw_demo(folder: pathlib.Path) -> None:
  if rounds.drawn(folder) or (folder / PAIRS_NAME).is_file():  # which is written last
    return
  print(f"drawing 24 pairs with tiny-sd into {folder}; this takes about a minute on a CPU", file=sys.stderr)
  parser = pairs.make_parser()
  args = parser.parse_args([*DEMO_PAIRS, f"--out={folder}"])
  args.changed = []
  pairs.make_pairs(args, quiet=True)


# ---- Export ------------------------------------------------------------------------------------------------------


def _read_only(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Exports the votes or prints their summary."""
  if args.export is not None:
    export.check_folder(args.export)
  found = _catalog(args)
  with opened(folder, found, schedule.Rules(seed=args.order_seed, overlap=args.overlap)) as ballot:
    if args.summary:
      print(json.dumps(ballot.summary(), indent=2, ensure_ascii=False))
    else:
      print(_export(args, folder, found, ballot))


def _export(args: argparse.Namespace, folder: pathlib.Path, found: Catalog, ballot: Ballot) -> str:
  voters = ballot.store.voters()
  if args.voter is not None and args.voter not in voters:
    raise ValueError(f"--voter={args.voter}: nobody of that name has voted; expected one of {', '.join(voters)}.")
  said = ballot.judgements()
  labels = judgements.labels(said, args.labels, voters.get(args.voter))
  if not labels:
    raise ValueError(f"{folder} has no votes on these pairs yet, so there is nothing to export.")
  if args.export_format == "tfds":
    counts, source = export.write_tfds(args.export, found, labels), "tfds"
  else:
    if args.labels == "voter":
      said = [judgement for judgement in said if judgement.voter == voters[args.voter]]
    counts, source = export.write_folder(args.export, found, labels, said), "pairs_file"
  return (
    f"{args.export}: {counts['pairs']} pairs, {counts['ties']} of them ties; {counts['bad']} left out, both pictures "
    f"of which are bad; train with --config.data.source={source} --config.data.path={args.export}"
  )


if __name__ == "__main__":
  main()
