"""Three steps of each objective, in numbers that hold on any processor: those of tests/numbers.json.

The runs are those of scripts/same_numbers.py, which compares two versions bit by bit on one machine. Where a change
moves numbers for a reason, write the file anew:

    python scripts/same_numbers.py --renew
"""

import functools
import importlib.util
import json
import re
from unittest import mock

import jax
import numpy as np
import pytest

from jaxpref.devices import sharding
from jaxpref.training import loop
from scripts import same_numbers

EXPECTED = json.loads(same_numbers.NUMBERS.read_text())
# Names of quantities and their relative and absolute tolerance; the first that matches counts. With the arithmetic of
# another processor (docs/contributing.md) no norm was more than 6e-6 off, and what else was more than 2e-5 off was less
# than 1e-6 off: small differences of large errors.
TOLERANCES = (
  (r"(accuracy|clip_fraction)$", None),  # of a few rows, each decided by a sign or a threshold
  (r"/(valid_pairs|\w*updates|skipped_\w+|loss_spikes|diverging)$", (0.0, 0.0)),  # counts
  (r"^norm of (params|ref_params)$", (1e-6, 0.0)),  # of which three steps change 1e-5
  (r"^norm of ", (2e-4, 0.0)),
  (r"", (2e-4, 3e-6)),
)


def config_of(run):
  """The config that the run's command line gives."""
  file, _, variant = run.recipe.partition(":")
  path = same_numbers.ROOT / "configs" / file
  spec = importlib.util.spec_from_file_location(path.stem, path)
  recipe = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(recipe)
  config = recipe.get_config(*filter(None, [variant]))
  config.update_from_flattened_dict(run.fields)
  return config


def assert_close(found, expected):
  assert found.keys() == expected.keys()
  wrong = []
  for name, value in expected.items():
    allowed = next(tolerance for pattern, tolerance in TOLERANCES if re.search(pattern, name))
    if allowed is not None and not np.isclose(found[name], value, rtol=allowed[0], atol=allowed[1]):
      wrong.append(f"{name}: {found[name]:.7g}, expected {value:.7g}")
  assert not wrong, "\n".join(wrong)


# The others differ from these in their loss or in what they sample, which tests of their own compare with numpy
# (grpo: objectives/policy_gradient_test.py), or train other networks, which the smoke variants of configs_test.py do.
ALWAYS = ("dpo", "spo")
OBJECTIVES = [pytest.param(n, marks=[pytest.mark.slow] * (n not in ALWAYS)) for n in same_numbers.OBJECTIVES]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_steps_end_where_they_did(name, tmp_path):
  on_one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with mock.patch.object(sharding, "make_mesh", on_one_device):
    loop.run(config_of(same_numbers.RUNS[name]), str(tmp_path))
  assert_close(same_numbers.summary(same_numbers.left_by(tmp_path, same_numbers.STEPS)), EXPECTED[name])
