"""Parses command lines: `Parser` for commands without a recipe, `parse_flags` for commands with --config.

Both keep, or warn about, each value of a repeated option, and report an error in one sentence.
"""

import argparse
import difflib
import itertools
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags, logging

from jaxpref import config as config_lib
from jaxpref.recipes import places, sections
from jaxpref.recipes.sections import MAX_COUNT

MAX_AT_A_TIME = 2**16  # rows or pictures of one call


class Parser(argparse.ArgumentParser):
  """An ArgumentParser that gathers all values of a repeated option of several values.

  If an option of one value is repeated, the last one counts, as usual, and stderr says so. Paragraphs of the
  description are as wide as the terminal.

  >>> parser = Parser()
  >>> _ = parser.add_argument("--lora", nargs="+", default=[])
  >>> parser.parse_args(["--lora", "a", "b", "--lora", "c"]).lora
  ['a', 'b', 'c']
  """

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    super().__init__(*args, **{"formatter_class": _Formatter} | kwargs)
    self.given: dict[str, Any] = {}
    self.register("action", None, _Store)
    self.register("action", "store", _Store)

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    self.given.clear()
    return super().parse_known_args(args, namespace)


class _Formatter(argparse.RawDescriptionHelpFormatter):
  """Leaves lines of the description alone that are indented, such as commands and lists."""

  def _fill_text(self, text: str, width: int, indent: str) -> str:
    raw = lambda paragraph: paragraph.startswith(" ") or "\n " in paragraph
    fill = lambda paragraph: textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
    parts = text.strip("\n").split("\n\n")
    return "\n\n".join(part if raw(part) else fill(part) for part in parts)


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


def place(text: str) -> str:
  """Reads an option that may be a path, for `type`; expands ~."""
  try:
    return places.expand(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def path(text: str) -> pathlib.Path:
  """Reads an option that is a local path, for `type`; a Path of gs://bucket would be a folder here, named gs:."""
  if not text:
    raise argparse.ArgumentTypeError("it is empty; expected a path, here perhaps of a variable that is not set")
  if "://" in text:
    raise argparse.ArgumentTypeError(f"{text} is no path on this machine's disks; expected one, and copy it from there")
  return pathlib.Path(place(text))


def check_numbers(args: argparse.Namespace, *names: str, least: int = 1, most: int = MAX_COUNT) -> None:
  """Checks that integers are within their limits; None stands for an option that was not given.

  Raises:
    ValueError: one sentence with the argument, its value and what was expected.
  """
  for name in names:
    if (value := getattr(args, name)) is not None:
      sections.check_count(value, f"--{name}", least=least, most=most)


def check_seed(args: argparse.Namespace) -> None:
  """Raises ValueError for a seed so large that it would draw the same as another one."""
  sections.check_seed(args.seed, "--seed")


class _PlaceParser(flags.ArgumentParser):
  def parse(self, argument: str) -> str:
    return places.expand(argument)

  def flag_type(self) -> str:
    return "string"


def define_place(name: str, default: str | None, help: str) -> Any:
  """Defines a flag that may be a path, for commands with a recipe, and returns its holder."""
  return flags.DEFINE(_PlaceParser(), name, default, help)


# ---- Recipes -----------------------------------------------------------------------------------------------------


def _check_arguments(argv: list[str]) -> None:
  """Raises ValueError for recipes that do not exist and misspelt fields, before absl shows a traceback for them."""
  for recipe in _recipes(argv):
    file = recipe.partition(":")[0]
    if not pathlib.Path(file).is_file():
      raise ValueError(f"--config={recipe}: there is no file {file}; give a recipe such as configs/spo_tiny.py.")
    variants = re.search(r"def get_config\((.*?)\)", pathlib.Path(file).read_text(encoding="utf-8", errors="replace"))
    if ":" in recipe and variants is not None and not variants[1]:
      raise ValueError(f"--config={recipe}: {file} has no variants; leave out the colon and what follows.")
  given: dict[str, str] = {}
  for name, value in _options(argv):
    if value is not None and given.get(name, value) != value:
      print(f"warning: --{name} is given twice; {value} counts, not {given[name]}.", file=sys.stderr)
    given[name] = value or ""
  known = config_lib.names()
  for option, _ in _options(argv):
    name = option.removeprefix("config.")
    if option.startswith("config.") and name not in known and not name.startswith("options."):
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise ValueError(f"--config.{name} is not a field; did you mean --config.{near}? See jaxpref/config.py for all.")


class _RefusedOptions(Exception):
  """Carries what is wrong with `config.options` past absl, which would put its own words before it."""


class _RecipeParser(flags.ArgumentParser):
  """Reads a recipe and adds the options of the objective that the recipe or the command line names."""

  def __init__(self, parser: flags.ArgumentParser, argv: list[str]) -> None:
    self.parser, self.argv = parser, argv

  def flag_type(self) -> str:
    return self.parser.flag_type()

  def parse(self, argument: str) -> Any:
    config = self.parser.parse(argument)
    if not isinstance(config, ml_collections.ConfigDict) or not isinstance(config.get("objective"), str):
      return config  # `_check_recipes` raises for it
    given = [value for name, value in _options(self.argv) if name == "config.objective" and value]
    objective = (given or [config.objective])[-1]
    try:
      config_lib.fill_options(config, objective)
      self._check_names(config, objective)
    except ValueError as error:
      raise _RefusedOptions(str(error)) from error
    return config

  def _check_names(self, config: ml_collections.ConfigDict, objective: str) -> None:
    """Raises `_RefusedOptions` or ValueError for misspelt options of the command line."""
    known = [f"config.options.{name}" for name in config_lib.names(config.options)]
    for name, _ in _options(self.argv):
      if name.startswith("config.options.") and name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"did you mean --{near[0]}?" if near else f"{objective} has none."
        raise ValueError(f"--{name} is not an option; {hint}")


def parse_flags(argv: list[str]) -> list[str]:
  """Parses a command line with --config, for `app.run`; an error ends the program with one sentence."""
  try:
    _check_arguments(argv)
    recipe = flags.FLAGS["config"]
    recipe.parser = _RecipeParser(recipe.parser, argv)
    argv, emptied = _without_nones(argv)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # what it would warn about is said below
    rest = flags.FLAGS(argv)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(before)
    _check_recipes(argv)
    for name in emptied:
      _empty(flags.FLAGS["config"].value, name)
    return rest
  except (flags.Error, ValueError) as error:
    if (where := line_of_recipe(error, argv)) is not None:
      sys.exit(f"error: {where}")
    lines = [line for line in str(error).splitlines() if line.strip(" ;") not in ("", "see --help.")]
    said = re.sub(r"^[A-Za-z]*Error: ", "", lines[-1])
    if missing := re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", said):
      said = f"--{missing[1]} is missing; --help says what it is."
      if missing[1] == "config" and _recipes(argv):
        said = f"--config={_recipes(argv)[-1]}: its get_config returns nothing; end it with: return config."
    sys.exit(f"error: {said}")
  except _RefusedOptions as error:
    sys.exit(f"error: {error}")
  except Exception as error:
    if (where := line_of_recipe(error, argv)) is None:
      raise
    sys.exit(f"error: {where}")


def _without_nones(argv: list[str]) -> tuple[list[str], list[str]]:
  """Returns a command line without the fields set to None, and their names: flags cannot set a field to None.

  If a field is given twice, the last one counts.
  """
  optional = {f"config.{name}" for name in config_lib.optional_names(config_lib.Config)}
  last = {name: value for name, value in _options(argv) if value is not None}
  may = lambda name: name in optional or name.startswith("config.options.")  # known only later
  emptied = [name for name, value in last.items() if value == "None" and may(name)]
  kept, following = argv[:1], iter(argv[1:])
  for argument in following:
    name, equals, _ = argument.lstrip("-").partition("=")
    if not (argument.startswith("-") and name in emptied):
      kept.append(argument)
    elif not equals:
      next(following)
  return kept, emptied


def _empty(config: ml_collections.ConfigDict, name: str) -> None:
  """Sets a field to None; sets an option that is a text and cannot be None to the text "None".

  Raises:
    ValueError: the field cannot be None.
  """
  section, _, field = name.removeprefix("config.").rpartition(".")
  inside = config
  for part in filter(None, section.split(".")):
    inside = inside[part]
  kind = config_lib.options_class(config.objective)
  known = config_lib.optional_names(kind) if kind is not None else []
  if section == "options" and field not in known and inside[field] is not None:
    if not isinstance(inside[field], str):
      raise ValueError(f"--{name}=None; expected a value such as {inside[field]!r}, as this option cannot be None.")
    inside[field] = "None"
  else:
    inside[field] = None


def _options(argv: list[str]) -> list[tuple[str, str | None]]:
  """Returns name and value of each option, written as --name=value or --name value; the value may be None."""
  found: list[tuple[str, str | None]] = []
  for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue="-"):
    if argument.startswith("-"):
      name, equals, value = argument.lstrip("-").partition("=")
      found.append((name, value if equals else None if following.startswith("-") else following))
  return found


def _recipes(argv: list[str]) -> list[str]:
  """Returns all values of --config."""
  return [value for name, value in _options(argv) if name == "config" and value]


def _check_recipes(argv: list[str]) -> None:
  """Raises ValueError for a recipe whose `get_config` returned no config."""
  value = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  if _recipes(argv) and not isinstance(value, ml_collections.ConfigDict):
    raise ValueError(
      f"--config={_recipes(argv)[-1]}: its get_config returns {type(value).__name__}, expected the config that it "
      "changes: return config."
    )
  known = config_lib.names()
  for name in config_lib.names(value) if _recipes(argv) else ():
    if name not in known and not name.startswith("options."):
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise ValueError(f"{_recipes(argv)[-1]} sets config.{name}, which is not a field; did you mean config.{near}?")


def line_of_recipe(error: BaseException, argv: list[str]) -> str | None:
  """Returns what is wrong in a recipe, with its file and line; None if the error did not arise in a recipe."""
  for recipe in _recipes(argv):
    file = recipe.partition(":")[0]
    name = pathlib.Path(file).name
    if isinstance(error, SyntaxError) and error.filename and pathlib.Path(error.filename).name == name:
      return f"{file}, line {error.lineno}: {error.msg}."
    if "get_config" in str(error) and isinstance(error, AttributeError):
      return f"--config={recipe}: {file} has no function get_config; see configs/spo_tiny.py."
    cause: BaseException | None = error
    while cause is not None:  # absl wraps some in its own errors
      frames = traceback.extract_tb(cause.__traceback__)
      if lines := [frame.lineno for frame in frames if pathlib.Path(frame.filename).name == name]:
        text = (str(cause).splitlines() or [""])[0]
        where = f"{file}, line {lines[-1]}"
        return f"{text} ({where})" if isinstance(cause, ValueError) else f"{where}: {type(cause).__name__}: {text}"
      cause = cause.__cause__ or cause.__context__
  return None
