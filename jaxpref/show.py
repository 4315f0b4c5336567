"""Writes the page of a run, index.html in its work folder: `python -m jaxpref.show runs/spo_tiny`.

Training writes it at its end. This makes it from what is in the folder now: for a run that was interrupted, one that
still trains, or one of an earlier version. It has results, pictures over time, curves, config and commands, and needs
no network.
"""

from jaxpref import arguments
from jaxpref.devices import endings
from jaxpref.training import run_page


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments, writes, and prints where the page is; expected errors end in one sentence."""
  parser = arguments.Parser(prog="python -m jaxpref.show", description=__doc__)
  parser.add_argument("run", type=arguments.path, metavar="RUN", help="work folder: config.json, metrics.jsonl, ...")
  run = parser.parse_args(argv).run
  with endings.one_sentence(ValueError, OSError, doing=f"writing {run / run_page.NAME}", again="run it again"):
    print(run_page.write(run))


if __name__ == "__main__":
  main()
