"""The fields of recipes, and their two forms: what a recipe changes, and the dataclasses that are read."""

import json
import pathlib

import ml_collections

from jaxpref import config

# (name, type, default) of fields that recipes, command lines and work folders rely on, in a ConfigDict's order.
FIELDS = json.loads((pathlib.Path(__file__).parent / "config_fields.json").read_text())


def rows(c, prefix=""):
  for key in c:
    if isinstance(c[key], ml_collections.ConfigDict):
      yield [prefix + key, "section", None]
      yield from rows(c[key], f"{prefix}{key}.")
    else:
      yield [prefix + key, c.get_ref(key).get_type().__name__, c[key]]


def test_fields_keep_their_names_types_and_defaults():
  """New ones may come."""
  found = list(rows(config.default()))
  assert [row for row in found if row in FIELDS] == FIELDS
