"""The file that survives a restart."""

import importlib.machinery
import json
import re
import resource
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.training import metrics


def test_scalars_leave_out_what_was_not_counted():
  """An empty bin is no zero; a loss that is not a number must be seen."""
  found = metrics.to_scalars(
    {"loss": jnp.nan, "bin": jnp.asarray([1.0, np.nan]), "accuracy": jnp.nan, "x": jnp.float32(2)}
  )
  assert np.isnan(found.pop("loss"))
  assert found == {"bin_00": 1.0, "x": 2.0}


def steps(folder):
  return [row["step"] for row in metrics.read(folder / "metrics.jsonl")]


def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path):
  writer = metrics.Writer(tmp_path, first_step=0)
  for step in (1, 2, 3, 4):
    writer.write(step, {"loss": 0.1 * step})
  writer.close()
  assert steps(tmp_path) == [1, 2, 3, 4]
  writer = metrics.Writer(tmp_path, first_step=2)
  assert steps(tmp_path) == [1, 2]
  writer.write(3, {"loss": 7.0})
  writer.close()
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert [(r["step"], r["loss"]) for r in rows] == [(1, 0.1), (2, 0.2), (3, 7.0)]


def test_a_half_written_line_is_left_out_and_repaired(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2, "loss": 1})[:9])
  assert steps(tmp_path) == [1]
  metrics.Writer(tmp_path, first_step=2).close()
  assert path.read_text() == '{"step": 1}\n'


def test_a_full_disk_costs_rows_but_not_the_run(tmp_path, capfd):
  """No file may be larger than 20 kB for a while."""
  writer = metrics.Writer(tmp_path, first_step=0)
  row = {f"metric_{i:03d}": 0.123456 for i in range(100)}  # 2 kB
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
  try:
    for step in range(1, 31):
      writer.write(step, row)
      writer.image(step, "samples", np.full((8, 8, 3), step, np.uint8))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  writer.write(31, row)
  writer.close()
  found = steps(tmp_path)
  assert found == [*range(1, len(found)), 31] and 5 < len(found) < 15  # whole lines only
  (said,) = capfd.readouterr().err.splitlines()
  pattern = rf"{tmp_path}/metrics.jsonl and the curves .* \(File too large\); training continues without them."
  assert re.fullmatch(pattern, said)


def test_event_files_hold_scalars_and_pictures(tmp_path):
  event_file_loader = pytest.importorskip("tensorboardX")
  writer = metrics.Writer(tmp_path, first_step=0)
  writer.write(1, {"loss": 0.5})
  writer.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
  writer.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  content = events.read_bytes()
  assert b"loss" in content and b"samples" in content and event_file_loader


def test_a_run_that_continues_goes_on_with_its_run_of_wandb(tmp_path, monkeypatch):
  begun = []
  wandb = types.SimpleNamespace(init=lambda **kwargs: begun.append(kwargs["id"]))
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for folder in ("a", "a", "b"):
    (tmp_path / folder).mkdir(exist_ok=True)
    metrics.Writer(tmp_path / folder, first_step=0, wandb_project="p").close()
  assert begun[0] == begun[1] != begun[2]


def test_wandb_that_is_missing_is_named(monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  metrics.check_wandb("")
  with pytest.raises(ValueError, match=r"config.logging.wandb_project='p', but wandb is not installed; pip install"):
    metrics.check_wandb("p")


class StandIn(types.ModuleType):
  """What is asked of wandb, of a version as now or as 0.19; at a terminal `init` would wait for a key.

  Its spec is what `find_spec` looks at.
  """

  __spec__ = importlib.machinery.ModuleSpec("wandb", None)

  def __init__(self, *, key=None, mode="online", old=False):
    super().__init__("wandb")
    self.__spec__ = StandIn.__spec__
    self.key, self.mode = key, mode
    self.login = self.old_login if old else self.new_login
    self.api = types.SimpleNamespace(api_key=key)

  def setup(self):
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

  def new_login(self, key=None, verify=True, prompt=True):
    assert not prompt and not verify, "it asks the user, or the network"
    return self.key is not None

  def old_login(self, key=None, verify=False):
    pytest.fail("it asks the user")

  def init(self, **kwargs):
    raise RuntimeError("the key is refused")


@pytest.mark.parametrize("old", [False, True], ids=["now", "0.19"])
def test_wandb_without_a_key_is_refused_before_it_could_ask_for_one(monkeypatch, old):
  monkeypatch.setitem(sys.modules, "wandb", StandIn(old=old))
  with pytest.raises(ValueError, match="'p', but wandb has no API key; run wandb login, .*or set WANDB_MODE=offline"):
    metrics.check_wandb("p")
  for mode in ("offline", "disabled"):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(old=old, mode=mode))
    metrics.check_wandb("p")
  monkeypatch.setitem(sys.modules, "wandb", StandIn(old=old, key="k"))
  metrics.check_wandb("p")
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)  # which writes nothing
  monkeypatch.setitem(sys.modules, "wandb", StandIn(old=old))
  metrics.check_wandb("p")


def test_wandb_that_cannot_start_a_run_says_so_in_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", StandIn(key="k"))
  with pytest.raises(ValueError, match="='p': wandb cannot start a run .the key is refused.; fix that, or set WANDB"):
    metrics.Writer(tmp_path, first_step=0, wandb_project="p")
