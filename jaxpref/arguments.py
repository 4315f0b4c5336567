"""Command lines of the commands that have no recipe: argparse, but no repeated option loses a value without a word."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
  """An ArgumentParser in which a repeated option of several values gathers them all. Of a repeated option of one value
  the last counts, as usual, and stderr says so. The description is printed as it stands.

  >>> parser = Parser()
  >>> _ = parser.add_argument("--lora", nargs="+", default=[])
  >>> parser.parse_args(["--lora", "a", "b", "--lora", "c"]).lora
  ['a', 'b', 'c']
  """

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs)
    self.given: dict[str, Any] = {}
    self.register("action", None, _Store)
    self.register("action", "store", _Store)

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    self.given.clear()
    return super().parse_known_args(args, namespace)


class _Store(argparse._StoreAction):
  def __call__(
    self,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: str | Sequence[Any] | None,
    option_string: str | None = None,
  ) -> None:
    assert isinstance(parser, Parser)
    if option_string is not None:
      before = parser.given.get(self.dest)
      if isinstance(values, list) and before is not None:
        values = [*before, *values]
      elif before is not None and before != values:
        print(f"warning: {option_string} is given twice; {values} counts, not {before}.", file=sys.stderr)
      parser.given[self.dest] = values
    setattr(namespace, self.dest, values)
