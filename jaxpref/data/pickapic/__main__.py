"""Prepares Pick-a-Pic for training: `python -m jaxpref.data.pickapic --parquet=FOLDER --out=DATASETS`.

FOLDER has the parquet files of yuvalkirstain/pickapic_v1 or pickapic_v2 as published, or some of them. The last line
printed is the folder for --config.data.path.
"""

from jaxpref import arguments
from jaxpref.data import pickapic
from jaxpref.devices import endings


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments and writes; an expected error ends the program with one sentence."""
  parser = arguments.Parser(prog="python -m jaxpref.data.pickapic", description=__doc__)
  parser.add_argument(
    "--parquet", type=arguments.place, required=True, metavar="FOLDER", help="folder of the parquet files, or gs://..."
  )
  parser.add_argument(
    "--out",
    type=arguments.place,
    required=True,
    metavar="FOLDER",
    help="folder of datasets, or gs://...; gets pickapic/VERSION/",
  )
  parser.add_argument(
    "--version", choices=pickapic.VERSIONS, default="v2", help="version of Pick-a-Pic (default: %(default)s)"
  )
  parser.add_argument("--workers", type=int, default=1, help="processes that write files (default: %(default)s)")
  args = parser.parse_args(argv)
  with endings.one_sentence(ValueError, OSError, doing=f"writing into {args.out}", again="run the same command again"):
    arguments.check_numbers(args, "workers")
    print(pickapic.prepare(args.parquet, args.out, version=args.version, workers=args.workers))


if __name__ == "__main__":
  main()
