"""Reads and writes the config.json of a diffusers model as a frozen dataclass."""

import dataclasses
import math
import types
import typing
import warnings
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from jaxpref.recipes.messages import listed

# Keys of no network that change nothing: those of diffusers' EMAModel, transformers and trainers.
IGNORED = (
  "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
  "architectures", "dtype", "model_type", "torch_dtype", "transformers_version", "gradient_checkpointing",
)  # fmt: skip


def _freeze(value: Any) -> Any:
  """Converts lists of JSON to tuples, so that a config can be hashed (Linen requires it)."""
  return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def without_nulls(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config.json's dict without null keys for which the dataclass has another default.

  A null key means the same as an absent one, unless null is a value of the field's type.
  """
  own = {f.name for f in dataclasses.fields(kind) if type(None) in typing.get_args(f.type)}
  return {key: value for key, value in config.items() if value is not None or key in own}


def check_types(kind: type, given: Mapping[str, Any]) -> None:
  """Raises a one-sentence ValueError if a value of a config.json is not of the type of its field.

  Args:
    kind: a dataclass. Fields of other types than numbers, texts, booleans, null and lists of them are not checked.
    given: values by field.
  """
  hints = typing.get_type_hints(kind)
  for key, value in given.items():
    if key in hints and not _fits(value, hints[key]):
      name = getattr(kind, "CLASS_NAME", "") or kind.__name__
      raise ValueError(
        f"{name} config: {key}={value!r}, expected {_named(hints[key])}; correct it in the model's config.json."
      )


def _parts(hint: Any) -> tuple[Any, ...]:
  """Returns the types of a union, or the one type."""
  return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
  if len(parts := _parts(hint)) > 1:
    return any(_fits(value, part) for part in parts)
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, list | tuple):
      return False
    of = typing.get_args(hint)
    kinds = of[:1] * len(value) if of[-1] is Ellipsis else of
    return len(kinds) == len(value) and all(map(_fits, value, kinds))
  if hint in (int, float):
    numbers = int | float if hint is float else int
    return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
  return not isinstance(hint, type) or hint not in _NAMES or isinstance(value, hint)


_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


def _named(hint: Any) -> str:
  """Returns how a sentence calls a type."""
  if len(parts := _parts(hint)) > 1:
    return " or ".join(map(_named, parts))
  if typing.get_origin(hint) is tuple:
    *_, number = of = typing.get_args(hint)
    return f"a list of {'' if number is Ellipsis else f'{len(of)} '}{_NAMES[of[0]]}s"
  article = {int: "an ", float: "a ", str: "a "}.get(hint, "")
  return f"{article}{_NAMES[hint]}"


def _thaw(value: Any) -> Any:
  return list(map(_thaw, value)) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Base of the configs whose fields are the keys of a diffusers config.json.

  A field's default is what diffusers assumes when an older file lacks the key.
  """

  CLASS_NAME: ClassVar[str] = ""
  # Keys that exist in diffusers but are implemented for these values only (never written back: the
  # first value is what diffusers assumes).
  FIXED: ClassVar[Mapping[str, Collection[Any]]] = {}
  CHECKED: ClassVar[Collection[str]] = ()  # fields of any type, of which the class itself says what it expects

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> Self:
    """Reads the dict of a config.json.

    Args:
      config: the parsed file. Keys that start with "_" and unknown null keys are ignored, and IGNORED with a warning; a
        known null key gets its default.

    Returns:
      The config.

    Raises:
      ValueError: the file asks for something that is not implemented.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    given = {k: v for k, v in without_nulls(cls, config).items() if not k.startswith("_")}
    others = {k: v for k, v in given.items() if k in cls.FIXED and _freeze(v) not in cls.FIXED[k]}
    unknown = {k: v for k, v in given.items() if k not in fields and k not in cls.FIXED and k not in IGNORED}
    problems = [
      f"{k}={v!r} is not implemented, expected {' or '.join(map(repr, cls.FIXED[k]))}" for k, v in others.items()
    ]
    if unknown:
      said = listed(f"{k}={v!r}" for k, v in unknown.items())
      problems.append(f"unknown key{'s' if len(unknown) > 1 else ''} {said}, expected diffusers' own")
    if problems:
      raise ValueError(
        f"{cls.CLASS_NAME} config: {'; '.join(problems)}; choose a model folder without them, or remove keys that do "
        "not change the network."
      )
    if ignored := [k for k in given if k in IGNORED and k not in fields]:
      warnings.warn(
        f"{cls.CLASS_NAME} config: ignored {', '.join(ignored)}, which do not change the network.", stacklevel=3
      )
    kwargs = {k: _freeze(v) for k, v in given.items() if k in fields}
    check_types(cls, {k: v for k, v in kwargs.items() if k not in cls.CHECKED})
    return cls(**kwargs)

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict of a config.json that torch diffusers opens and `from_dict` reads back."""
    fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
    return {"_class_name": self.CLASS_NAME} | {name: _thaw(value) for name, value in fields}

  def _require(self, ok: bool, key: str, expected: str) -> None:
    """Raises a one-sentence ValueError about the field `key` unless `ok`."""
    if not ok:
      found = getattr(self, key)
      raise ValueError(f"{self.CLASS_NAME} config: {key}={found!r}, expected {expected}.")
