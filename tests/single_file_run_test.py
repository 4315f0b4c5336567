"""A run that starts from a checkpoint in one file: it trains, goes on, plans, exports a folder, and is drawn from."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxpref import config, export, sample
from jaxpref.devices import sharding
from jaxpref.files import pipelines
from jaxpref.planning import plan
from jaxpref.training import inputs, loop
from tests.files import original_layout
from tests.files.trees import assert_same


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The pipeline, its checkpoint, and the folder of its config.json files."""
  place = tmp_path_factory.mktemp("model")
  pipe = pipelines.random_pipeline("one-level")
  folder = pipelines.save_pipeline(place / "folder", pipe)
  of = {p.parent.name: safetensors.numpy.load_file(p) for p in folder.glob("*/*.safetensors")}
  whole = original_layout.whole(of["unet"], of["vae"], of["text_encoder"])
  safetensors.numpy.save_file(whole, place / "model.safetensors")
  return pipe, place / "model.safetensors", pipelines.save_pipeline(place / "configs", pipe, configs_only=True)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))


def recipe(made, **fields):
  c = config.default()
  c.update(objective="dpo", num_steps=1, batch_size=4, model=str(made[1]), model_config=str(made[2]))
  c.evaluation.num_prompts = 0
  c.logging.every = 1
  c.update_from_flattened_dict({"lora.rank": 2} | fields)
  config.check(c)
  return c


@pytest.mark.slow
def test_a_run_from_a_file_trains_goes_on_and_exports_a_folder(model, tmp_path, capsys):
  pipe, file, configs = model
  run = tmp_path / "run"
  for steps in (1, 2):
    loop.run(recipe(model, num_steps=steps), str(run))
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2]
  found = pipelines.load_pipeline(run / "export")
  rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), pipe.params)
  assert_same({k: v for k, v in found.params.items() if k != "unet"}, {k: rounded[k] for k in ("vae", "text_encoder")})
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found.params["unet"], rounded["unet"])
  assert 0 < max(jax.tree.leaves(moved)) < 1e-2
  export.main([str(run), "--format=kohya", f"--out={tmp_path / 'lora.safetensors'}"])
  assert (tmp_path / "lora.safetensors").is_file()

  drawing = ["--prompt=red apple", "--seeds=1", "--steps=1", "--guidance_scale=1", f"--out={tmp_path / 'a.png'}"]
  sample.main([f"--model={file}", f"--model_config={configs}", f"--lora={tmp_path / 'lora.safetensors'}", *drawing])
  assert (tmp_path / "a.png").is_file()


def test_a_plan_and_fingerprints_of_a_file(model):
  pipe, file, configs = model
  c = plan.without_weights(recipe(model))
  assert c.model == f"zeros:{file}+config={configs}" and c.model_config is None
  of_file, of_preset = (
    plan.state_bytes(plan.without_weights(given), sharding.make_mesh())
    for given in (recipe(model), recipe(model, model="random:one-level", model_config=""))
  )
  assert of_file == of_preset
  assert set(inputs.encoder_fingerprints(config.typed(recipe(model)))) == {"vae", "text_encoder"}
  assert inputs.precomputed_fields(config.typed(recipe(model)))["model_config"] == str(configs)
