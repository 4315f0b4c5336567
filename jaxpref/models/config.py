"""Reading and writing the config.json of a diffusers model as a frozen dataclass."""

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self


def _freeze(value: Any) -> Any:
  """Lists of JSON become tuples, so that a config can be hashed (Linen requires it)."""
  return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def without_nulls(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config.json's dict without the keys that are null and for which the dataclass has another default.

  A key that is null means the same as a key that is absent, unless null is a value of the field's type.
  """
  own = {f.name for f in dataclasses.fields(kind) if type(None) in typing.get_args(f.type)}
  return {key: value for key, value in config.items() if value is not None or key in own}


def _thaw(value: Any) -> Any:
  return list(map(_thaw, value)) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Base of the configs whose fields are the keys of a diffusers config.json.

  A field's default is what diffusers assumes when an older file lacks the key.
  """

  CLASS_NAME: ClassVar[str] = ""
  # Keys that exist in diffusers but are implemented for these values only (never written back:
  # the first value is what diffusers assumes).
  FIXED: ClassVar[Mapping[str, Collection[Any]]] = {}

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> Self:
    """Reads the dict of a config.json.

    Args:
      config: the parsed file; keys that start with "_" and unknown keys that hold null are ignored;
        a known key that holds null has its default.

    Returns:
      The config.

    Raises:
      ValueError: the file asks for something that is not implemented here.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in without_nulls(cls, config).items():
      if key.startswith("_"):
        continue
      if key in fields:
        kwargs[key] = _freeze(value)
      elif key in cls.FIXED:
        if _freeze(value) not in cls.FIXED[key]:
          expected = " or ".join(map(repr, cls.FIXED[key]))
          raise ValueError(
            f"{cls.CLASS_NAME} config: {key}={value!r} is not implemented, expected {expected};"
            " choose a model folder without it."
          )
      else:
        raise ValueError(
          f"{cls.CLASS_NAME} config: unknown key {key}={value!r}, expected keys of diffusers'"
          f" {cls.CLASS_NAME}; remove the key if it does not change the network."
        )
    return cls(**kwargs)

  def to_dict(self) -> dict[str, Any]:
    """The dict of a config.json that torch diffusers opens and `from_dict` reads back."""
    fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
    return {"_class_name": self.CLASS_NAME} | {name: _thaw(value) for name, value in fields}

  def _require(self, ok: bool, key: str, expected: str) -> None:
    """Raises the one-sentence ValueError about the field `key` unless `ok`."""
    if not ok:
      found = getattr(self, key)
      raise ValueError(f"{self.CLASS_NAME} config: {key}={found!r}, expected {expected}.")
