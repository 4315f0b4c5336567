"""docs/extending.md: what it shows trains as it says, from a folder of the user's own."""

import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from jaxpref import config as config_lib
from jaxpref.objectives import catalog, pairs
from jaxpref.planning import plan
from jaxpref.training import loop, metrics
from tests.stub_model import draw

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "extending.md").read_text()
TINY = {
  "model": "random:one-level", "judge": None, "num_steps": 2, "batch_size": 8, "logging.every": 1,
  "sample.every": 0, "evaluation.num_prompts": 0, "accumulation": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
  """The folder with the modules of the page, which Python finds."""
  folder = tmp_path_factory.mktemp("mine")
  for name, code in re.findall(r"```python\n# (\w+)\.py[^\n]*\n(.*?)```", PAGE, re.DOTALL):
    with (folder / f"{name}.py").open("a") as file:
      file.write(code)
  assert {p.name for p in folder.iterdir()} == {"mine.py", "winners.py"}
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))
  for name in ("mine", "winners"):
    sys.modules.pop(name, None)


def trained(config, folder):
  config.update_from_flattened_dict(TINY)
  loop.run(config, str(folder))
  return [row for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]


def test_a_loss_of_ones_own(mine, tmp_path):
  w, l = draw(0, 5), draw(1, 5)
  of_name = pairs.pair_loss("mine:squared_hinge", beta=2.0)
  np.testing.assert_allclose(of_name(w, l, None), np.maximum(0, 1 - 2.0 * (w - l)) ** 2, rtol=1e-6)
  np.testing.assert_allclose(of_name(w, l, 0.5 * np.ones(5)), np.maximum(0, 1 - (w - l)) ** 2, rtol=1e-6)
  config = config_lib.default()
  config.loss.name = "mine:squared_hinge"
  rows = trained(config, tmp_path / "run")
  assert abs(rows[0]["loss"] - 1.0) < 1e-2  # policy and reference agree, but for rounding, times beta
  assert rows[1]["loss"] != rows[0]["loss"]


def test_a_method_of_ones_own(mine, tmp_path):
  import winners

  config = winners.get_config()
  assert config.options.scale == 2.0
  rows = trained(config, tmp_path / "run")
  for row in rows:
    np.testing.assert_allclose(row["loss"], 2.0 * row["error"], rtol=1e-4)
  assert (tmp_path / "run" / "export" / "model_index.json").is_file()
  assert "images_per_second" in rows[-1] and jax.process_count() == 1


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"objective": "nowhere:X"}, "config.objective=nowhere:X: the module nowhere cannot be imported .ModuleNotFound"),
    ({"objective": "tpdo"}, "config.objective='tpdo'; expected one of spo, .*did you mean 'tdpo'"),
    ({"objective": "mine:WINNER"}, "config.objective=mine:WINNER: the module mine has no WINNER .did you mean WINNERS"),
    ({"objective": "mine:Winners"}, "config.objective=mine:Winners: it is of type type; expected a jaxpref.objectives"),
    ({"loss.name": "mine:squared"}, "config.loss.name=mine:squared: the module mine has no squared"),
    ({"objective": "kto", "loss.name": "mine:squared_hinge"}, "loss.name='mine:squared_hinge'; expected sigmoid: kto"),
    ({"objective": "mine:WINNERS", "data.source": "prompts"}, "expected another source for objective mine:WINNERS"),
    ({"objective": "mine:WINNERS", "loss.name": "ipo"}, "config.loss.name='ipo'; expected one of sigmoid"),
  ],
)
def test_what_is_not_there_is_refused(mine, fields, sentence):
  config = config_lib.default()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=sentence):
    config_lib.check(config)


def test_a_reference_that_cannot_move_is_refused(mine, tmp_path):
  import winners

  config = winners.get_config()
  config.reference.mode = "update"
  with pytest.raises(ValueError, match="reference.mode='update'; expected 'frozen', as mine:WINNERS has no reference"):
    trained(config, tmp_path / "run")
  assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json"))


def test_an_unknown_method_is_one_sentence_everywhere():
  config = config_lib.default()
  config.update(objective="tpdo", model="random:sd15")
  for ask in (catalog.method, config_lib.facts, lambda c: config_lib.smoke(c, "sd15-miniature"), plan.without_weights):
    with pytest.raises(ValueError, match="did you mean 'tdpo'"):
      ask(config)


def test_the_tables_of_names_agree():
  assert set(catalog.METHODS) == set(config_lib.FACTS)
  for name, method in catalog.METHODS.items():
    assert method.facts == config_lib.FACTS[name]
    assert method.facts.losses == config_lib.FACTS[name].losses
  for name in config_lib.DENOISED_LOSSES:
    pairs.denoised_loss(name, beta=0.1)
  for name in config_lib.PAIR_LOSSES:
    pairs.pair_loss(name, beta=0.1)
  with pytest.raises(ValueError, match="unknown"):
    pairs.denoised_loss("sigmod", beta=0.1)
