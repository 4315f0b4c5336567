"""Stable Diffusion 3 trains, resumes, draws and is exported: whole runs on miniatures of random weights."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import dpo_sd35_tiny, dpo_sd35m
from jaxpref import compile, config, evaluate, export, pairs, precompute, sample
from jaxpref.data import latents, sources
from jaxpref.devices import sharding
from jaxpref.diffusion import TrainingTimes, flow
from jaxpref.files import family as families
from jaxpref.files import sd3
from jaxpref.models.sd3 import presets as sd3_presets
from jaxpref.models.sd3.transformer import LORA_TARGETS
from jaxpref.objectives.base import Weights
from jaxpref.planning import plan
from jaxpref.training import build, checkpoint, inputs, loop, metrics
from tests.precompute_test import RECORDS

make_mesh = sharding.make_mesh
CPU = jax.devices()[:1]
T5 = "t5_hidden_states"


def two_blocks(preset):
  """One dual block and the last: compiling is most of the time."""
  dual = (0,) if preset.transformer.dual_attention_layers else ()
  transformer = dataclasses.replace(preset.transformer, num_layers=2, dual_attention_layers=dual)
  return dataclasses.replace(preset, transformer=transformer)


SMALL = {name: two_blocks(sd3_presets.PRESETS[name]) for name in ("sd3-miniature", "sd35-miniature")}


def make_quick(monkeypatch):
  """One device, smaller miniatures, and data in memory."""
  monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: make_mesh(devices=CPU))
  for name, preset in SMALL.items():
    monkeypatch.setitem(sd3_presets.PRESETS, name, preset)
  source = sources.Indexed(RECORDS, sources.index_of_records(RECORDS))
  monkeypatch.setattr(inputs, "open_pairs", lambda config: source)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  make_quick(monkeypatch)


def recipe(**fields):
  c = dpo_sd35_tiny.get_config()
  c.update(num_steps=2, batch_size=4)
  c.checkpoint.every = 1
  c.data.update(num_threads=0)
  c.update_from_flattened_dict(fields)
  return c


def rows_of(folder):
  return metrics.read(folder / "metrics.jsonl")


FULL = {"lora.rank": 0, "lora.alpha": None}


@pytest.mark.parametrize(
  ("fields", "first_loss"),
  [
    # A moving reference, the sampler and the weights of timestep-aware DPO, all weights trained, no T5.
    pytest.param(
      FULL
      | {"objective": "tdpo", "model": "random:sd3-miniature", "timesteps.density": "uniform", "timesteps.gamma": 0.9,
         "timesteps.reward_scale": True, "reference.mode": "update", "reference.tau": 2, "drop_t5": True,
         "max_sequence_length": 9},
      math.log(2),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      FULL | {"loss.name": "sft", "timesteps.density": "mode", "timesteps.weight": "cosmap", "remat": "block"},
      None,
      marks=pytest.mark.slow,
    ),
    pytest.param({"objective": "kto", "lora.targets": r"attn2\.to_q$"}, 0.5, marks=pytest.mark.slow),
  ],
  ids=["tdpo", "sft", "kto"],
)  # fmt: skip
def test_methods_train(fields, first_loss, tmp_path):
  loop.run(recipe(**fields), str(tmp_path / "run"))
  rows = rows_of(tmp_path / "run")
  assert [row["step"] for row in rows] == [1, 2]
  assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
  if first_loss is not None:
    np.testing.assert_allclose(rows[0]["loss"], first_loss, rtol=1e-4)
    assert np.isfinite(rows[-1].get("divergence", 0.0))
  written = json.loads((tmp_path / "run" / "export" / "model_index.json").read_text())
  assert (written["text_encoder_3"] == [None, None]) == bool(fields.get("drop_t5"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A finished run with LoRA, and its config."""
  folder = tmp_path_factory.mktemp("runs") / "whole"
  with pytest.MonkeyPatch.context() as patch:
    make_quick(patch)
    c = recipe(**{"max_sequence_length": 9})
    loop.run(c, str(folder))
  return folder, c


def test_a_lora_learns_and_a_resumed_run_is_the_same(trained, tmp_path):
  whole, c = trained
  rows = rows_of(whole)
  np.testing.assert_allclose(rows[0]["loss"], math.log(2), rtol=1e-5)
  assert np.isfinite(rows[1]["loss"]) and rows[0]["grad_norm"] > 0
  params = checkpoint.load_params(whole, 2)[0]
  assert set(params) == {"transformer_lora"}  # neither the frozen weights nor the table of positions
  for steps in (1, 2):
    again = c.copy_and_resolve_references()
    again.num_steps = steps
    loop.run(again, str(tmp_path / "resumed"))
  resumed = checkpoint.load_params(tmp_path / "resumed", 2)[0]
  jax.tree.map(np.testing.assert_array_equal, resumed, params)
  assert np.abs(params["transformer_lora"]["transformer_blocks.0"]["attn"]["add_q_proj"]["lora_B"]).max() > 0


@pytest.mark.parametrize("objective", ["grpo", "spo"])
def test_online_methods_start_from_the_policy_that_drew(objective, tmp_path):
  """GRPO's update gives the rollout's log-densities again: a ratio of 1. SPO's policy still equals its reference."""
  c = recipe(**{"timesteps.density": "uniform", "data.source": "emoji", "data.caption_dropout": 0.0, "loss.beta": 10.0})
  c.update(objective=objective, preference_model="tiny-spm", batch_size=2)
  c.optimizer.warmup_steps = 0
  c.grpo.update(num_inference_steps=4, group_size=3, minibatch=24, guidance_scale=2.0)
  c.spo.update(num_inference_steps=4, warmup_steps=2, pool_size=3, threshold=0.0, minibatch=8, guidance_scale=2.0)
  loop.run(c, str(tmp_path / "run"))
  first, second = rows_of(tmp_path / "run")
  assert first["grad_norm"] > 0 and first["score_gap"] > 0 and np.isfinite(second["loss"])
  if objective == "grpo":
    np.testing.assert_allclose([first["ratio"], first["loss"]], [1.0, 0.0], atol=5e-6)
  else:
    np.testing.assert_allclose([first["loss"], first["margin"]], [math.log(2), 0.0], atol=1e-5)
  learned = checkpoint.load_params(tmp_path / "run", 2)[0]["transformer_lora"]["transformer_blocks.0"]["attn"]
  assert np.abs(learned["add_q_proj"]["lora_B"]).max() > 0


def pictures(folder):
  return np.stack([np.asarray(Image.open(p), np.int32) for p in sorted(folder.glob("0*.png"))])


def test_the_run_its_export_and_base_with_adapter_draw_the_same(trained, tmp_path):
  run, _ = trained
  few = ["--steps=2", "--seeds=1", "--prompts", "red apple", "volcano", "--guidance_scale=2"]
  sample.main([f"--model={run}", *few, f"--out={tmp_path / 'run'}"])
  export.main([str(run), "--format=lora", f"--out={tmp_path / 'a.safetensors'}"])
  base = ["--model=random:sd35-miniature+t5=9", f"--lora={tmp_path / 'a.safetensors'}"]
  sample.main([*base, *few, f"--out={tmp_path / 'base'}"])
  assert json.loads((tmp_path / "run" / "samples.json").read_text())["family"] == "stable_diffusion_3"
  merged, adapted = pictures(tmp_path / "run"), pictures(tmp_path / "base")
  assert merged.shape == (2, 16, 16, 3) and merged.std() > 1
  assert np.abs(merged - adapted).max() <= 2  # the folder is in half precision
  export.main([str(run), "--format=pipeline", "--dtype=float32", f"--out={tmp_path / 'whole'}"])
  sample.main([f"--model={tmp_path / 'whole'}+t5=9", "--scheduler=dpmpp_2m", *few, f"--out={tmp_path / 'dpm'}"])
  assert np.abs(pictures(tmp_path / "dpm") - merged).max() > 2


def test_a_run_is_evaluated_and_makes_pairs(trained, tmp_path):
  run, _ = trained
  (tmp_path / "prompts.txt").write_text("red apple\nvolcano\ngrinning cat")
  few = [f"--prompts={tmp_path / 'prompts.txt'}", "--steps=2", "--seeds=2", "--guidance_scale=1"]
  models = ["--models", "base=random:sd35-miniature+t5=9", f"aligned={run}"]
  scorer = "tests.evaluate_test:brightness"
  evaluate.main([*models, *few, "--scorers", scorer, f"--out={tmp_path / 'evaluation'}"])
  manifest = json.loads((tmp_path / "evaluation" / "manifest.json").read_text())["models"]
  assert manifest["base"]["weights"] == "random:sd35-miniature+t5=9"
  assert manifest["aligned"]["weights"].endswith("+t5=9")  # other pictures than with another length
  pairs.main([f"--model={run}", *few, f"--label={scorer}", f"--out={tmp_path / 'pairs'}"])
  assert (tmp_path / "pairs" / "pairs.jsonl").read_text().count("\n") == 3


def test_positions_of_a_folder_travel_through_a_run(trained, tmp_path):
  """They are neither trained nor in checkpoints, and the export has those of the folder, not computed ones."""
  run, c = trained
  folder = tmp_path / "model"
  pipe = sd3.load_pipeline(run / "export")
  table = jax.tree.map(lambda x: x + 1.0, pipe.params[sd3.CONSTANTS])
  sd3.save_pipeline(folder, dataclasses.replace(pipe, params=dict(pipe.params) | {sd3.CONSTANTS: table}))
  c = c.copy_and_resolve_references()
  c.update(model=str(folder), num_steps=1, dtype="bfloat16")
  experiment = build.build(c)
  found = jax.tree.leaves(experiment.frozen[sd3.CONSTANTS])[0]
  np.testing.assert_allclose(found.astype(np.float32), jax.tree.leaves(table)[0], rtol=1e-2)
  experiment.export(jax.device_get(experiment.params), tmp_path / "export")
  written = sd3.load_pipeline(tmp_path / "export", components=[sd3.CONSTANTS]).params[sd3.CONSTANTS]
  np.testing.assert_allclose(jax.tree.leaves(written)[0], jax.tree.leaves(table)[0], rtol=1e-3)


def loss_and_gradient(c):
  """(loss and gradient of a config's first batch as a function of what is trained, a place away from the reference)."""
  experiment = build.build(c)
  batch = next(experiment.batches())

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    w = Weights.of(params, experiment.params, experiment.frozen)
    total, count, _ = experiment.objective.loss(w, batch, jax.random.key(0))
    return total / count

  return loss, jax.tree.map(lambda x: x + 0.01, experiment.params)


def test_the_loss_falls_along_its_gradient():
  loss, params = loss_and_gradient(recipe(**{"timesteps.weight": "sigma_sqrt", "loss.beta": 5.0}))
  value, grads = loss(params)
  slope = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))
  size = 1e-3 * value / slope
  moved = [loss(jax.tree.map(lambda p, g, s=s: p - s * g, params, grads))[0] for s in (size, -size)]
  np.testing.assert_allclose((moved[1] - moved[0]) / (2 * size), slope, rtol=2e-2)
  assert moved[0] < value < moved[1]


def test_precomputed_data_give_the_same_gradient_without_text_encoders_and_vae(tmp_path):
  c = recipe(**{"loss.beta": 20.0, "data.caption_dropout": 0.3})
  precompute.run(c, tmp_path / "data")
  stored = c.copy_and_resolve_references()
  stored.data.update(source="precomputed", path=str(tmp_path / "data"))
  from_data = next(build.build(stored).batches())
  assert from_data[T5].dtype == jnp.bfloat16 and from_data[T5].shape == (4, 16, 48)
  assert from_data["clip_hidden_states"].dtype == np.float16 and from_data["clip_hidden_states"].shape[1] == 16
  assert set(build.build(stored).frozen) == {"transformer", "empty_ids"}
  without_t5 = config.replace(c, {"drop_t5": True})
  found = [loss(params) for loss, params in map(loss_and_gradient, (c, stored, without_t5))]
  one, other, another = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)]) for _, grads in found)
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-3)
  assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(one)  # float16 and bfloat16
  assert np.linalg.norm(one - another) > 0.1 * np.linalg.norm(one)
  by_workers = next(build.build(config.replace(stored, {"data.num_workers": 1})).batches())
  np.testing.assert_array_equal(by_workers[T5], from_data[T5])
  # What a folder was made with must be what training asks for.
  for field, value in (("drop_t5", True), ("max_sequence_length", 9)):
    with pytest.raises(
      ValueError, match=f"was precomputed with config.{field}=.*, expected {value!r} as in this config"
    ):
      build.build(config.replace(stored, {field: value}))


def test_precomputing_on_split_networks_makes_the_same_files(tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, "make_mesh", lambda fsdp=1, **_: make_mesh(-1, fsdp, devices=jax.devices()[:2]))
  monkeypatch.setattr(jax, "local_device_count", lambda: 2)
  found = []
  for fsdp in (1, 2):
    c = recipe(**{"mesh.fsdp": fsdp})
    precompute.run(c, tmp_path / str(fsdp))
    data = latents.open_folder(tmp_path / str(fsdp))
    found.append([data.row(i) for i in range(4)])
  for one, other in zip(*found, strict=True):
    assert one.keys() == other.keys()
    for name, value in one.items():
      np.testing.assert_allclose(np.float32(value), np.float32(other[name]), atol=2e-2, err_msg=name)


def test_t5_is_stored_exactly_where_it_is_computed_in_bfloat16():
  family = families.get("stable_diffusion_3")
  pipe = family.load("random:sd35-miniature", dtype="bfloat16", param_dtype="bfloat16")
  model, ids = family.model(pipe), jnp.asarray(pipe.tokenize(["red apple", ""]))
  cond = model.encode_text(pipe.params, ids)
  stored = inputs.stored_text(model, pipe.params, ids)
  assert {k: v.dtype for k, v in stored.items()} == {
    T5: jnp.bfloat16, "clip_hidden_states": np.float16, "pooled_projections": np.float16,
  }  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, model.restored_text(stored), cond)
  huge = stored | {T5: jnp.full_like(stored[T5], 1e5)}  # more than float16 holds
  assert np.isfinite(np.asarray(model.restored_text(huge)["encoder_hidden_states"], np.float32)).all()


@pytest.mark.slow  # models/sd3/sharding_test.py has the network on each mesh
@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=["data", "fsdp", "tensor"])
def test_a_mesh_changes_nothing(mesh, tmp_path, monkeypatch, on_one_device):
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 2**8)
  monkeypatch.setattr(
    sharding, "make_mesh", lambda *_, **__: make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
  )
  c = recipe(**FULL | {"optimizer.eps": 1e-6, "loss.beta": 20.0})
  c.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
  loop.run(c, str(tmp_path / "run"))
  for row, other in zip(rows_of(tmp_path / "run"), on_one_device, strict=True):
    np.testing.assert_allclose([row["loss"], row["grad_norm"]], [other["loss"], other["grad_norm"]], rtol=1e-4)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
  folder = tmp_path_factory.mktemp("one")
  with pytest.MonkeyPatch.context() as patch:
    make_quick(patch)
    loop.run(recipe(**FULL | {"optimizer.eps": 1e-6, "loss.beta": 20.0}), str(folder / "run"))
  return rows_of(folder / "run")


def test_the_times_of_a_recipe_reach_the_process():
  c = config.typed(recipe(**{"timesteps.density": "mode", "timesteps.mode_scale": 0.5, "timesteps.weight": "cosmap"}))
  process = build.build(c).model.process
  assert process.training == TrainingTimes("mode", mode_scale=0.5, weight="cosmap")
  assert (config.FLOW_DENSITIES, config.FLOW_WEIGHTS) == (flow.TRAINING_TIMES, flow.LOSS_WEIGHTS)


@pytest.mark.slow  # planning/plan_test.py has other recipes, and planning/flops_test.py counts this transformer by hand
def test_the_full_size_recipe_is_planned_on_shapes_alone():
  c = dpo_sd35m.get_config()
  c.data.path = "pickapic"
  config.check(c)
  assert c.lora.targets == LORA_TARGETS
  c.update(model="random:sd35-miniature", image_size=None, batch_size=4, accumulation=1)
  c.lora.rank = 8
  c.data.update(source="precomputed")
  planned = plan.without_weights(c)
  assert planned.model == "zeros:sd35-miniature"
  report = compile.compile_step(planned, make_mesh(devices=CPU))
  assert report["flop"] > 0 and report["arguments"]["frozen transformer_constants"] > 0
  assert "frozen text_encoder_3" not in report["arguments"] and "frozen vae" not in report["arguments"]
  changes = [change for change, _ in plan.estimates(planned, CPU, report)]
  assert {change.remat for change in changes} == {"block", "full"}


def test_other_training_times_are_refused_where_there_is_no_flow(monkeypatch):
  family = families.get("stable_diffusion_3")
  monkeypatch.setattr(type(family), "model", lambda *_, **__: types.SimpleNamespace(process=object()))
  c = config.typed(recipe())
  with pytest.raises(ValueError, match="config.timesteps.density='logit_normal'; expected 'uniform', as the models of"):
    build.with_times(c, family.model(None))
