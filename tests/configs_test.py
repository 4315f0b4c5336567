"""The recipes: each says what the papers do, refuses what it does not know, and its miniature runs end to end."""

import dataclasses
import functools
import importlib
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxpref import config
from jaxpref.data import emoji_pairs, records
from jaxpref.devices import sharding
from jaxpref.files import loading, pipelines
from jaxpref.models import presets
from jaxpref.rewards.loading import load_latent_reward, load_preference_model
from jaxpref.training import build, inputs, loop, metrics
from tests.small_presets import drawn, smaller, with_one_attention

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
METHODS = ("dpo", "tdpo", "spo", "spm", "lrm", "lpo")
FULL_SIZE = [f"{method}_{model}" for method in METHODS for model in ("sd15", "sdxl")]


def recipe(name, *variant):
  return importlib.import_module(f"configs.{name}").get_config(*variant)


def completed(name):
  """The recipe with the fields that its command sets."""
  c = recipe(name)
  if c.data.source == "tfds":
    c.data.path = "pickapic"
  if c.data.source == "prompts":
    c.data.path = "prompts.json"
  if c.data.source == "pairs_file":
    c.data.path = "votes"
  if c.objective == "spo":
    c.preference_model = c.preference_model or "spm"
  return c


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_is_a_config_that_passes_the_checks(name):
  c = completed(name)
  config.check(c)
  assert set(config.names(c)) == set(config.names())
  docstring = importlib.import_module(f"configs.{name}").__doc__
  assert f"python -m jaxpref.main --config=configs/{name}.py" in docstring


@pytest.mark.parametrize("name", FULL_SIZE)
def test_an_unknown_variant_is_refused(name):
  with pytest.raises(ValueError, match=rf"configs/{name}\.py:smokes is unknown; expected nothing or smoke\."):
    recipe(name, "smokes")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_what_a_command_must_set_is_asked_for(name):
  c = recipe(name)
  with pytest.raises(ValueError, match=r"config\.data\.path=None; expected"):
    config.check(c)
  if c.objective == "spo":
    c.data.path = "prompts.json"
    with pytest.raises(ValueError, match=r"config\.preference_model=None; expected the folder"):
      config.check(c)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_batches_divide_over_the_hardware_of_the_papers(name):
  c = recipe(name)
  devices = {"spo": 4, "spm": 4, "lrm": 8}.get(c.objective, 16)
  assert c.batch_size % (devices * c.accumulation) == 0


def test_recipes_have_the_published_numbers():
  """METHODS' tables, so that an edit of the shared code does not change a recipe unnoticed."""
  for model, warmup in (("sd15", 500), ("sdxl", 200)):
    for method in ("dpo", "tdpo"):
      c = recipe(f"{method}_{model}")
      assert (c.num_steps, c.batch_size, c.loss.beta, c.optimizer.warmup_steps) == (2000, 2048, 5000, warmup)
      assert math.isclose(c.optimizer.learning_rate, 1e-8 * c.batch_size)
      assert c.data.ties == "drop" and c.data.caption_dropout == 0.2 and c.lora.rank == 0
      assert c.optimizer.name == ("adamw" if model == "sd15" else "adafactor")
  for model, delta in (("sd15", 0.005), ("sdxl", 0.002)):
    c = recipe(f"tdpo_{model}")
    assert (c.reference.mode, c.reference.on_diverge, c.reference.delta) == ("update", "freeze", delta)
    assert (c.reference.alpha, c.reference.rho, c.timesteps.gamma, c.timesteps.reward_scale) == (1, 0, 0.9, True)
  table = {  # k, inner_steps, threshold, rank, rate, prompts a rollout, transitions an update
    "sd15": (4, 0, 0.3, 4, 6e-5, 40, 40),
    "sdxl": (2, 3, 0.4, 64, 1e-5, 8, 16),
  }
  for model, expected in table.items():
    c = recipe(f"spo_{model}")
    s = c.spo
    groups = (s.num_inference_steps - s.warmup_steps) // (s.inner_steps + 1)  # the last step of SD 1.5 is one, too
    assert s.pool_last_step == (model == "sd15")
    separate = s.num_inference_steps - s.warmup_steps - groups  # transitions of a prompt without a shared start
    transitions = s.minibatch + -(-s.minibatch * separate // groups)
    found = (s.pool_size, s.inner_steps, s.threshold, c.lora.rank, c.optimizer.learning_rate, c.batch_size)
    assert (*found, transitions) == expected
    assert c.num_steps * c.batch_size == 10 * 4000
    assert (c.loss.beta, s.ratio_clip, s.eta, s.guidance_scale, s.warmup_steps) == (10, 0.1, 1, 5, 4)
    assert (c.optimizer.weight_decay, c.optimizer.clip_norm, c.optimizer.schedule) == (1e-4, 1, "constant")
  for model, steps, rate in (("sd15", 8000, 3e-6), ("sdxl", 7000, 1e-6)):
    c = recipe(f"spm_{model}")
    assert (c.num_steps, c.optimizer.learning_rate, c.optimizer.weight_decay) == (steps, rate, 0.3)
    assert (c.batch_size, c.optimizer.warmup_steps, c.data.ties) == (64, 500, "keep")
  for model, steps, pairs, warmup in (("sd15", 4000, 128, 500), ("sdxl", 8000, 32, 1000)):
    c = recipe(f"lrm_{model}")
    assert (c.num_steps, c.batch_size, c.optimizer.warmup_steps, c.data.ties) == (steps, pairs, warmup, "keep")
    assert (c.optimizer.learning_rate, c.lrm.guidance_scale, c.lrm.last_time) == (1e-5, 7.5, 951)
  for model, low, high, rank, rate in (("sd15", 0.35, 0.5, 4, 6e-5), ("sdxl", 0.45, 0.6, 64, 1e-5)):
    c = recipe(f"lpo_{model}")
    s = c.spo
    assert (s.threshold, s.threshold_max, c.lora.rank, c.optimizer.learning_rate) == (low, high, rank, rate)
    assert (c.loss.beta, s.pool_size, s.warmup_steps, s.pool_last_step, c.reward) == (500, 4, 0, True, "latent")
    assert c.num_steps * c.batch_size == 5 * 4000


# ---------------------------------------------------------------------------------------------
# The miniatures


SMALL = {name: with_one_attention(smaller(presets.PRESETS[name])) for name in ("sd15-miniature", "sdxl-miniature")}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  """The embedded pairs are prepared once."""
  return tmp_path_factory.getbasetemp() / "datasets"


@pytest.fixture(autouse=True)
def quick(monkeypatch, datasets):
  """One device, smaller miniatures, and random weights are drawn once a preset."""
  monkeypatch.setenv("JAXPREF_DATA_DIR", str(datasets))
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
  for name in SMALL:
    monkeypatch.setitem(presets.PRESETS, name, SMALL[name])
  monkeypatch.setattr(pipelines, "random_pipeline", drawn)


# One with rollouts, LoRA, a scorer and an export. Of the others training/inputs_test.py trains a preference model,
# text_to_image_test.py and objectives/pairs_test.py have SDXL, and training/loop_test.py a reference that moves.
FAST = ("lpo_sd15",)
SMOKES = [*FULL_SIZE, "taste_sd15", "taste_sdxl"]
MARKED = [pytest.param(name, marks=() if name in FAST else (pytest.mark.slow,)) for name in SMOKES]


@pytest.mark.parametrize("name", MARKED)
def test_the_smoke_variant_runs_end_to_end(name, tmp_path):
  """As the recipe, but for fewer steps and for what only the size decides."""
  c, whole = recipe(name, "smoke"), recipe(name)
  preset = "sd15-miniature" if name.endswith("sd15") else "sdxl-miniature"
  assert c.model == f"random:{preset}" and not c.evaluation.num_prompts and c.num_steps == 3
  same = ("objective", "dtype", "remat", "optimizer.name", "optimizer.schedule", "loss.beta", "timesteps.gamma")
  same += ("reference.mode", "spo.pool_size", "spo.inner_steps", "spm.guidance_scale", "data.ties", "data.flip")
  for field in same:
    parts = field.split(".")
    assert functools.reduce(getattr, parts, c) == functools.reduce(getattr, parts, whole), field
  # The reference moves at the second step; a decay needs a step after the warm-up.
  c.num_steps = 2 if c.reference.mode == "update" or c.optimizer.schedule != "constant" else 1
  if c.objective != "spo":
    c.data.split = "validation"  # is read faster
  else:
    c.spo.num_inference_steps = c.spo.warmup_steps + 2 * (c.spo.inner_steps + 1)

  assert loop.run(c, str(tmp_path / "run")) == {}
  rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
  assert [r["step"] for r in rows] == list(range(1, c.num_steps + 1))
  assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)
  if c.objective not in ("spm", "lrm"):  # policy and reference still agree, as far as bfloat16 goes (times beta)
    assert abs(rows[0]["loss"] - math.log(2)) < (0.05 if c.loss.beta == 10.0 else 0.5)
  if c.reference.mode == "update":
    assert np.isfinite(rows[-1]["divergence"]) and rows[-1]["reference_updates"] in (0, 1)
  export = tmp_path / "run" / "export"
  if c.objective == "spm":
    assert load_preference_model(export)[0].config == presets.get_preset(preset).preference
  elif c.objective == "lrm":
    found = load_latent_reward(str(export), dtype="float32")[0].config
    assert found == presets.latent_reward_config(presets.get_preset(preset))
  else:
    assert (export / "model_index.json").is_file() and (export / "unet" / "config.json").is_file()


@pytest.mark.slow
def test_lpo_trains_by_what_lrm_made_and_resumes_bit_by_bit(tmp_path):
  c = recipe("lrm_sd15", "smoke")
  c.num_steps, c.optimizer.warmup_steps = 1, 0
  loop.run(c, str(tmp_path / "lrm"))
  c = recipe("lpo_sd15", "smoke")
  c.update(num_steps=2, preference_model=str(tmp_path / "lrm" / "export"), dtype="float32")
  c.spo.num_inference_steps, c.checkpoint.every = 3, 1
  loop.run(c, str(tmp_path / "whole"))
  for steps in (1, 2):
    c.num_steps = steps
    loop.run(c, str(tmp_path / "resumed"))
  whole, resumed = (
    safetensors.numpy.load_file(tmp_path / name / "export" / "pytorch_lora_weights.safetensors")
    for name in ("whole", "resumed")
  )
  assert whole and whole.keys() == resumed.keys()
  for name, array in whole.items():
    np.testing.assert_array_equal(resumed[name], array, err_msg=name)


# Of grpo tests/numbers_test.py runs the same steps; of DDPO objectives/policy_gradient_test.py has what differs.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ddpo"])
def test_a_policy_gradient_runs_end_to_end(method, tmp_path):
  """GRPO with a reference that moves, and DDPO, which has one sample a prompt and looks at no reference."""
  c = recipe("grpo_tiny")
  c.judge = None
  config.smoke(c, "sd15-miniature")
  c.update(num_steps=2)
  c.grpo.update(num_inference_steps=3, minibatch=4)
  if method == "grpo":
    c.grpo.kl_coef = 0.1
    c.reference.update(mode="update", tau=2, delta=1e9)
  else:
    c.grpo.update(group_size=1, advantage="batch")
  assert loop.run(c, str(tmp_path / "run")) == {}
  rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
  assert [r["step"] for r in rows] == [1, 2]
  assert all(r["updates"] == (3 if method == "grpo" else 2) and r["grad_norm"] > 0 for r in rows)
  assert {"reward", "score_gap", "ratio", "clip_fraction", "loss_bin_00"} <= set(rows[0])
  assert ("kl" in rows[0]) == (method == "grpo") and rows[-1].get("reference_updates", 0) == (method == "grpo")
  assert (tmp_path / "run" / "export" / "model_index.json").is_file()


# ---------------------------------------------------------------------------------------------
# Fields that the recipes brought


def settings(**fields):
  c = config.default()
  c.update(objective="dpo", num_steps=1, batch_size=4, model="random:sd15-miniature")
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  return c


SPO = {"objective": "spo", "preference_model": "tiny-spm"}
LATENT = SPO | {"reward": "latent", "spo__pool_last_step": True}


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"data__source": "pair_file"}, r"data.source='pair_file'; expected one of emoji, .*did you mean 'pairs_file'"),
    ({"data__source": "tfds"}, "data.path=None; expected the folder of a tfds dataset of pairs"),
    (
      {"data__source": "tfds", "objective": "denoise"},
      "data.source='tfds'; expected another source for objective denoise: this one is for dpo",
    ),
    ({"vae_model": "x", "objective": "contrastive"}, "vae_model='x'; expected nothing for this objective"),
    ({"data__path": "mine.jsonl"}, "data.path='mine.jsonl'; expected nothing for data.source=emoji; set data.source"),
    ({"objective": "spo", "preference_model": ""}, "preference_model=''; expected the folder of a step-aware"),
    ({"objective": "spm"}, "preference_model=None; expected the folder of a CLIP"),
    (LATENT | {"preference_model": None}, "=None; expected the folder of a latent reward model, such as .*lrm_tiny"),
    (
      SPO | {"objective": "grpo", "reward": "preference_model:1,latent:1"},
      "reward=.*; expected one network for config.preference_model",
    ),
    (SPO | {"reward": "preference_model:1,latent=lrm:1"}, "reward=.*; expected latent alone, or none of it"),
    (LATENT | {"spo__step_aware": False}, "spo.step_aware=False; expected True with config.reward=l"),
    (LATENT | {"spo__decode_size": 8}, "spo.decode_size=8; expected 0 with config.reward=latent: n"),
    (LATENT | {"spo__pool_last_step": False}, "spo.pool_last_step=False; expected True with config.r"),
    (LATENT | {"spo__warmup_steps": -1}, "spo.warmup_steps=-1; expected at least 0 steps before the"),
    (SPO | {"spo__score_time": "start"}, "spo.score_time='start'; expected end: the time of a step's start is for"),
    (
      SPO | {"spo__threshold_max": 0.2},
      "spo.threshold_max=0.2; expected None or a softmax gap from spo.threshold = 0.3",
    ),
    ({"objective": "lrm", "lrm__last_time": 0}, "lrm.last_time=0; expected at least lrm.first_time = 1"),
    (
      {"objective": "lrm", "data__source": "precomputed", "data__path": "x"},
      "evaluation.num_prompts=64; expected 0 with precomputed data, which have no held-out pairs",
    ),
    (SPO | {"spo__eta": 0.0}, r"spo.eta=0.0; expected a number in \(0, 1\]: without noise"),
    (SPO | {"spo__warmup_steps": 0}, "spo.warmup_steps=0; expected at least 1 step before the first pool"),
    (SPO | {"spo__warmup_steps": 19}, "spo.warmup_steps=19; .* at least 2 of the 20 after it"),
    ({"loss__name": "sft", "timesteps__reward_scale": True}, "timesteps.reward_scale=True; expected False: the loss"),
    ({"loss__name": "sft", "loss__safeguard": 0.5}, "loss.safeguard=0.5; expected None: the loss sft has no loser"),
    ({"loss__name": "sft", "data__ties": "soft"}, "data.ties='soft'; expected drop: the loss sft has no margin"),
    ({"objective": "kto", "data__ties": "keep"}, "data.ties='keep'; expected drop for kto"),
    ({"reference__decay": 1.0}, r"reference.decay=1.0; expected a number in \[0, 1\)"),
    ({"lora__init": "gausian"}, "lora.init='gausian'; expected one of kaiming, gaussian .did you mean 'gaussian'"),
    (SPO | {"spo__inner_steps": -1}, "spo.inner_steps=-1; expected an integer of at least 0"),
    (SPO | {"spo__inner_steps": 1, "spo__pool_last_step": True}, "spo.pool_last_step=True; expected False, as"),
    (SPO | {"data__caption_dropout": 0.1}, "data.caption_dropout=0.1; expected 0.0 for spo"),
    (SPO | {"data__flip_labels": 0.1}, "data.flip_labels=0.1; expected 0.0: it is for data of pairs"),
    (SPO | {"timesteps__gamma": 0.9}, "timesteps.gamma=0.9; expected 1 for spo"),
    (
      {"objective": "kto", "data__source": "unpaired_file", "data__path": "x.csv", "data__labels": "scores"},
      "data.labels='scores'; expected 'given': it is for data of pairs",
    ),
    ({"objective": "kto", "loss__name": "ipo"}, "loss.name='ipo'; expected one of sigmoid"),
    ({"loss__name": "ipo", "loss__label_smoothing": 0.1}, "loss.label_smoothing=0.1; expected 0: it is for sigmoid"),
    ({"objective": "denoise", "reference__mode": "update"}, "reference.mode='update'; expected frozen: denoise has no"),
    ({"objective": "spm", "lora__rank": 4}, "lora.rank=4; expected nothing for spm: it trains no UNet"),
    ({"lora__targets": "("}, r"lora.targets='\('; expected a regular expression"),
    ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm=-1.0; expected a number of at least 0"),
    ({"optimizer__b2": 1.5}, r"optimizer.b2=1.5; expected a number in \[0, 1\)"),
    ({"optimizer__learning_rate": math.inf}, "optimizer.learning_rate=inf; expected a number above 0"),
    ({"sample__num_prompts": 0}, "sample.num_prompts=0; expected an integer of at least 1"),
    ({"evaluation__num_prompts": -1}, "evaluation.num_prompts=-1; expected 0"),
  ],
  ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_values_that_cannot_be(fields, sentence):
  with pytest.raises(ValueError, match=sentence):
    config.check(settings(**fields))


@pytest.fixture(scope="module")
def pairs_folder(datasets):
  emoji_pairs.prepare(datasets)
  return next((datasets / "emoji_pairs" / "openmoji_core").iterdir())


def test_pairs_come_from_a_folder(pairs_folder):
  c = settings(data__source="tfds", data__path=str(pairs_folder), data__split="validation[:8]")
  source = inputs.pairs_source(c)
  expected = list(emoji_pairs.records(split="validation"))[:8]
  assert [records.text(source[i]["id"]) for i in range(len(source))] == [
    r["id"] for r in expected if r["label_0"] != 0.5
  ]
  batch = next(build.build(c).batches())
  assert batch["pixels_0"].shape == (4, 16, 16, 3) and set(batch["label_0"]) <= {0.0, 1.0}
  for fields, kind, sentence in (
    ({"data__split": "test_unique"}, ValueError, "has no split 'test_unique', only train, validation, test"),
    ({"data__path": str(pairs_folder / "nothing")}, FileNotFoundError, "holds no dataset_info.json"),
  ):
    other = settings(**{"data__source": "tfds", "data__path": str(pairs_folder), **fields})
    with pytest.raises(kind, match=sentence):
      inputs.pairs_source(other)


def test_a_preference_model_asks_for_held_out_pairs_before_it_is_trained(pairs_folder, monkeypatch):
  """Not after days, when they are wanted."""
  open_folder = records.open_folder

  def without_validation(folder, split):
    if split == "validation":
      raise ValueError(f"{folder} has no split 'validation', only train.")
    return open_folder(folder, split)

  monkeypatch.setattr(records, "open_folder", without_validation)
  fields = {"objective": "spm", "data__source": "tfds", "data__path": str(pairs_folder)}
  c = settings(preference_model="random:sd15-miniature", **fields)
  with pytest.raises(ValueError, match="has no split 'validation'"):
    build.build(c)
  c.evaluation.num_prompts = 0
  build.build(c)


def test_another_unet_is_trained_and_exported(tmp_path):
  pipe = drawn("sd15-miniature")
  halved = {**pipe.params, "unet": jax.tree.map(lambda x: x / 2, pipe.params["unet"])}
  folder = pipelines.save_pipeline(tmp_path / "model", dataclasses.replace(pipe, params=halved))
  c = settings(unet_model=str(folder / "unet"))
  experiment = build.build(c)
  a, b = (tree["conv_in"]["kernel"] for tree in (experiment.params["unet"], halved["unet"]))
  np.testing.assert_array_equal(a, b)
  c.objective = "contrastive"
  with pytest.raises(ValueError, match="unet_model=.*; expected nothing for this objective"):
    config.check(c)


def test_another_vae_takes_the_place_of_the_models_own(tmp_path):
  pipe = drawn("sd15-miniature")
  halved = {**pipe.params, "vae": jax.tree.map(lambda x: x / 2, pipe.params["vae"])}
  folder = pipelines.save_pipeline(tmp_path / "model", dataclasses.replace(pipe, params=halved))
  c = settings(vae_model=str(folder / "vae"))
  found = loading.load_text_to_image(c.model, dtype="bfloat16", param_dtype="bfloat16", vae_model=c.vae_model)
  assert found.vae == dataclasses.replace(pipe.vae, dtype=jax.numpy.dtype("bfloat16"))
  for name, factor in (("vae", 0.5), ("unet", 1.0)):
    for a, b in zip(jax.tree.leaves(found.params[name]), jax.tree.leaves(pipe.params[name]), strict=True):
      assert a.dtype == "bfloat16"
      np.testing.assert_allclose(a.astype("float32"), factor * b, rtol=1e-2)
  # And it is the one that encodes the images, and that is exported.
  frozen = build.build(c).frozen
  a, b = (tree["encoder"]["conv_in"]["kernel"] for tree in (frozen["vae"], halved["vae"]))
  np.testing.assert_array_equal(a, b)

  settings_file = folder / "vae" / "config.json"
  settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"scaling_factor": 0.5}))
  with pytest.raises(ValueError, match=r"vae_model=.* factor are \(4, 1, 0.5\), those of random:sd15-miniature"):
    loading.load_text_to_image(c.model, dtype="float32", vae_model=c.vae_model)
  with pytest.raises(FileNotFoundError, match="config.json is missing"):
    loading.load_text_to_image(c.model, dtype="float32", vae_model=str(folder))


def test_a_vae_beside_single_file_copies_is_found(tmp_path):
  """As sdxl-vae-fp16-fix is published."""
  pipe = drawn("sdxl-miniature")
  pipelines.save_pipeline(tmp_path / "model", pipe)
  folder = tmp_path / "model" / "vae"
  safetensors.numpy.save_file({"first_stage_model.x": np.zeros(3)}, folder / "sdxl_vae.safetensors")
  module, params = pipelines.load_vae(folder)
  assert module == pipe.vae
  jax.tree.map(np.testing.assert_array_equal, params, pipe.params["vae"])
