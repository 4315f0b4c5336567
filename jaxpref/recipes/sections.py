"""Sections of a config: dataclasses that check their values, converted to a ConfigDict and back."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections.config_dict import placeholder

from jaxpref.recipes.places import Place, expand

MAX_SEED = 2**32 - 1  # limit of Grain; JAX's keys wrap larger seeds
MAX_COUNT = 2**31 - 1  # steps, rows and pictures are numbered by 32 bits
MAX_STEPS = 1000  # steps of a rollout: the times of a noise schedule


def nearest(name: Any, known: Iterable[str]) -> str:
  """Returns " (did you mean NAME?)" with the known name that resembles `name`, or "" if none does."""
  near = difflib.get_close_matches(str(name), list(known), n=1)
  return f" (did you mean {near[0]!r}?)" if near else ""


def check_seed(value: int, name: str = "seed") -> None:
  """Raises for a seed so large that it would draw the same as another one.

  >>> check_seed(2**32)
  Traceback (most recent call last):
  ValueError: seed=4294967296; expected an integer from 0 to 4294967295 (2^32 - 1).

  Args:
    value: the seed.
    name: the name its user knows, such as --seed.

  Raises:
    ValueError: it is out of range or not an integer.
  """
  if not _is_integer(value) or not 0 <= value <= MAX_SEED:
    raise ValueError(f"{name}={value}; expected an integer from 0 to {MAX_SEED} (2^32 - 1).")


def check_count(value: int, name: str, *, least: int = 1, most: int = MAX_COUNT) -> None:
  """Raises for an integer outside its limits; takes the arguments and raises the errors of `check_seed`."""
  if not _is_integer(value):
    raise ValueError(f"{name}={value!r}; expected an integer.")
  if not least <= value <= most:
    raise ValueError(f"{name}={value}; expected {f'at least {least}' if value < least else f'at most {most}'}.")


def _is_integer(value: Any) -> bool:
  return hasattr(value, "__index__") and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Section:
  """Fields of a config, with checks of their values. A section is named after its class, in lower case."""

  def to_dict(self) -> dict[str, Any]:
    """Returns nested plain values, like a ConfigDict's `to_dict`."""
    return dataclasses.asdict(self)

  def check(self) -> None:
    """Raises for values that can never work.

    Raises:
      ValueError: one sentence with the field, its value and what was expected, as in the other checks.
    """

  def check_with(self, config: Any, of: Any) -> None:
    """Raises for values that do not fit the method or the rest of the config.

    Args:
      config: the whole `jaxpref.config.Config`.
      of: the `Facts` of its method.
    """

  @classmethod
  def prefix(cls) -> str:
    return f"{cls.__name__.lower()}."

  def require(self, ok: bool, field: str, expected: str) -> None:
    """Raises ValueError unless ok; `field` may be dotted."""
    if not ok:
      value = functools.reduce(getattr, field.split("."), self)
      raise ValueError(f"config.{self.prefix()}{field}={value!r}; expected {expected}.")

  def one_of(self, field: str, choices: Sequence[str]) -> None:
    value = getattr(self, field)
    self.require(value in choices, field, f"one of {', '.join(choices)}{nearest(value, choices)}")

  def integers(self, least: int, *fields: str) -> None:
    for field in fields:
      self.require(getattr(self, field) >= least, field, f"an integer of at least {least}")

  def rollout_steps(self) -> None:
    expected = f"an integer from 1 to {MAX_STEPS}, the times of a noise schedule"
    self.require(1 <= getattr(self, "num_inference_steps") <= MAX_STEPS, "num_inference_steps", expected)  # noqa: B009

  def counts(self) -> None:
    """Raises for integers that 32 bits cannot hold."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int) and field.name != "seed":
        self.require(abs(value) <= MAX_COUNT, field.name, f"an integer of at most {MAX_COUNT} (2^31 - 1)")

  def not_negative(self, *fields: str) -> None:
    for field in fields:
      self.require(0.0 <= getattr(self, field) < math.inf, field, "a number of at least 0")

  def positive(self, *fields: str) -> None:
    for field in fields:
      self.require(0.0 < getattr(self, field) < math.inf, field, "a number above 0")

  def guidance(self, scale: float) -> None:
    self.require(0.0 <= scale < math.inf, "guidance_scale", "a number of at least 0 (up to 1: no guidance)")

  def seeds(self, seed: int) -> None:
    self.require(0 <= seed <= MAX_SEED, "seed", f"an integer from 0 to {MAX_SEED} (2^32 - 1)")


# ---- Dataclasses and nested values --------------------------------------------------------------------------------


def fields(kind: type, of: Any = None) -> dict[str, Any]:
  """Returns the defaults of a dataclass as nested values for a ConfigDict; None becomes a placeholder of its type.

  Args:
    kind: the dataclass.
    of: an instance whose values replace the defaults.
  """
  hints, found = typing.get_type_hints(kind), {}
  for field in dataclasses.fields(kind):
    value = field.default if of is None else getattr(of, field.name)
    if of is None and field.default_factory is not dataclasses.MISSING:
      value = field.default_factory()
    if dataclasses.is_dataclass(value):
      value = fields(type(value), value)
    elif value is None or value is dataclasses.MISSING:
      kinds = _kinds(hints[field.name])
      value = placeholder(kinds[0] if len(kinds) == 1 else object)
    found[field.name] = value
  return found


def _kinds(hint: Any) -> list[Any]:
  """Returns the types that a hint allows besides None."""
  union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not types.NoneType]
  return [kind.__origin__ if typing.get_origin(kind) is typing.Annotated else kind for kind in kinds]


def _is_place(hint: Any) -> bool:
  return Place in (hint, *typing.get_args(hint))


def read(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
  """Makes a dataclass from nested values; fields that they leave out get their defaults.

  Args:
    kind: the dataclass.
    values: by field.
    prefix: prefix of the fields' names in messages.
  Raises:
    ValueError: a field is unknown, a value has another type, or a field without a default is missing.
  """
  known = convert(kind, values, prefix)
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    if needed and field.name not in known:
      _value(hints[field.name], None, prefix + field.name)
      known[field.name] = None
  return kind(**known)


def convert(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Returns the values in the types of the fields; takes and raises what `read` does, but any field may be missing."""
  hints = typing.get_type_hints(kind, include_extras=True)
  known = [field.name for field in dataclasses.fields(kind)]
  for name in values:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
      hint = f"did you mean {prefix}{near[0]}?" if near else "there are no others."
      raise ValueError(f"{prefix}{name} is not a field; {hint}")
  return {name: _value(hints[name], value, prefix + name) for name, value in values.items()}


_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "True or False", tuple: "a tuple"}


def _value(hint: Any, value: Any, name: str) -> Any:
  """Returns a value in the type of its field."""
  kinds = _kinds(hint)
  if value is None and hint not in kinds and hint != Place:
    return None
  if isinstance(value, str) and _is_place(hint):
    try:
      return expand(value)
    except ValueError as error:
      raise ValueError(f"{name}={error}") from error
  for kind in kinds:
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
      return read(typing.cast(type, kind), value, f"{name}.")
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
      return float(value)
    if origin is tuple and isinstance(value, list):  # JSON has lists
      return tuple(value)
    if origin is Any or not isinstance(origin, type) or isinstance(value, origin):
      return value
  origins = [typing.get_origin(kind) or kind for kind in kinds]
  expected = " or ".join(_WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in origins)
  raise ValueError(f"{name}={value!r}; expected {expected}.")
