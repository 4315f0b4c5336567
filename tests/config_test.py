"""The fields of recipes, and their two forms: what a recipe changes, and the dataclasses that are read."""

import json
import pathlib

import ml_collections
import pytest

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


def test_both_forms_say_the_same():
  changeable = config.default()
  changeable.update(num_steps=7, vae_model="x")
  changeable.options.mine = 2
  read = config.typed(changeable)
  assert read.to_dict() == changeable.to_dict() and read.options.mine == 2
  assert config.typed(read) is read
  changed = config.replace(changeable, {"num_steps": 8, "data.split": "test", "data.flip": True})
  assert (changed.num_steps, changed.data.split, changed.data.flip, changed.vae_model) == (8, "test", True, "x")
  assert changeable.data.split == "train" and read.num_steps == 7


@pytest.mark.parametrize(
  ("field", "value", "sentence"),
  [
    ("num_steps", None, r"config\.num_steps=None; expected an integer\."),
    ("objective", None, r"config\.objective=None; expected a text\."),
    ("loss", {"nam": "ipo"}, r"config\.loss\.nam is not a field; did you mean config\.loss\.name\?"),
    ("loss", None, r"config\.loss=None; expected Loss\."),
    ("los", {"name": "ipo"}, r"config\.los is not a field; did you mean config\.loss\?"),
  ],
)
def test_values_that_a_config_dict_lets_pass_are_refused(field, value, sentence):
  changeable = config.default()
  changeable[field] = value
  with pytest.raises(ValueError, match=sentence):
    config.check(changeable)


def test_a_section_that_leaves_out_fields_has_their_defaults():
  changeable = config.default()
  changeable.loss = {"name": "ipo"}
  assert config.typed(changeable).loss == config.Loss(name="ipo")


def test_a_section_has_the_name_of_its_class():
  """Which is how its errors name it."""
  for section in config.Config().sections():
    assert getattr(config.Config(), section.prefix().rstrip(".")) is section
