"""A step that went wrong is run again from what training left of it."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest

from jaxpref import config, replay
from jaxpref.devices import sharding
from jaxpref.files import pipelines
from jaxpref.models import presets
from jaxpref.training import loop
from tests.small_presets import drawn, smaller, with_one_attention


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """The folder of the step at which a run with an absurd learning rate stops."""
  folder = tmp_path_factory.mktemp("replay")
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(presets.PRESETS, "one-level", with_one_attention(smaller(presets.ONE_LEVEL)))
    patch.setattr(pipelines, "random_pipeline", drawn)
    yield from stop_in(folder)


def stop_in(folder):
  c = config.default()
  c.update(objective="dpo", model="random:one-level", num_steps=6, batch_size=16, max_bad_steps=1, accumulation=2)
  c.optimizer.update(name="sgd", learning_rate=1e25, clip_norm=0.0)
  c.mesh.update(data=1, fsdp=2)
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:2])
  with mock.patch.object(sharding, "make_mesh", make_mesh), pytest.raises(loop.NonFiniteError) as error:
    loop.run(c, str(folder / "run"))
  yield folder / "run", str(error.value)


@pytest.mark.slow  # with the next one, which has its run
def test_the_step_goes_wrong_again_on_one_device(stopped):
  run, message = stopped
  assert f"python -m jaxpref.replay {run / 'bad_step_000003'}," in message
  assert "the parameters are those of step 1" in message
  said = replay.replay(run / "bad_step_000003")
  assert said.startswith("step 3: loss nan, gradient norm nan here; loss nan, gradient norm nan in training")
  assert "the loss was not finite at t of" in said and "row 0, record" in said
  assert "gradients of" in said and "arrays are not finite, such as unet/" in said
  assert "is finite here" not in said


@pytest.mark.slow
def test_what_is_missing_is_said_in_a_sentence(stopped, tmp_path, capsys):
  run, _ = stopped
  with pytest.raises(SystemExit) as ended:
    replay.main([str(run)])
  assert "expected a folder bad_step_..." in str(ended.value)
  broken = tmp_path / "bad_step_000003"
  broken.mkdir()
  (broken / "report.json").write_text((run / "bad_step_000003" / "report.json").read_text())
  with pytest.raises(SystemExit) as ended:
    replay.main([str(broken)])
  assert "batch_00000.npz" in str(ended.value)


@pytest.mark.parametrize(("report", "batch"), [('{"num_parts": 1}', b"PK\x03\x04 truncated"), ("[1]", b""), ("{", b"")])
def test_a_damaged_record_is_named(tmp_path, report, batch):
  (tmp_path / "report.json").write_text(report)
  (tmp_path / "batch_00000.npz").write_bytes(batch)
  with pytest.raises(SystemExit, match="it needs report.json and all parts of the batch") as ended:
    replay.main([str(tmp_path)])
  assert str(tmp_path) in str(ended.value)


def test_fields_records_and_times_are_named():
  batch = {"moments": np.ones((3, 2), np.float32), "record": np.arange(3)}
  batch["moments"][1, 0] = np.inf
  recorded = {
    "step": 4,
    "records": ["'a'", "'b'", "'c'"],
    "timesteps": [50, 120, 999],
    "metrics": {"loss": "nan", "grad_norm": "inf", "loss_bin": [0.5, "nan", *["nan"] * 7, 0.25]},
  }
  assert replay.describe(batch, recorded, {"loss": np.nan, "grad_norm": np.nan}, {"unet/a": 3, "unet/b": 1}) == (
    "step 4: loss nan, gradient norm nan here; loss nan, gradient norm inf in training\n"
    "moments is not finite in 1 of 3 rows: row 1, record 'b', t = 120\n"
    "the loss was not finite at t of 100-199, where these rows were:\n"
    "  row 1, record 'b', t = 120\n"
    "gradients of 2 arrays are not finite, such as unet/a, unet/b"
  )
  clean = replay.describe({}, recorded | {"timesteps": None}, {"loss": 0.5, "grad_norm": 1.0}, {})
  assert "the step is finite here" in clean and "not finite at" not in clean
  of_flow = recorded | {"timesteps": [50.5, 120.25, 1000.0]}  # noise itself is in the last bin, whose loss is finite
  assert "not finite at t of 100-199, where these rows were:\n  row 1, record 'b', t = 120.25" in replay.describe(
    {}, of_flow, {"loss": np.nan, "grad_norm": np.nan}, {}
  )
