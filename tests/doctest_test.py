"""The examples in the docstrings of the pure modules."""

import doctest
import importlib

import pytest

from jaxpref import diffusion

NAMES = ["losses", "diffusion.flow_schedule", "diffusion.gaussian", "diffusion.transitions", "reference"]


@pytest.mark.parametrize("name", NAMES)
def test_the_docstrings_examples_hold(name):
  names = vars(diffusion) if name.startswith("diffusion.") else {}  # those of the folder, whichever file they are in
  found = doctest.testmod(importlib.import_module(f"jaxpref.{name}"), extraglobs=names)
  assert found.attempted > 0
  assert found.failed == 0
