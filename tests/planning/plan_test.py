"""What is known before compiling, against training and against the compiler."""

import dataclasses
import fnmatch
import functools
import math

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from transformers.models.blip import modeling_blip, modeling_blip_text

from configs import dpo_sd15, dpo_sdxl, grpo_tiny, lpo_sd15, lrm_sd15, spm_sdxl, spo_sd15, spo_sdxl
from jaxpref import precompute
from jaxpref.devices import sharding
from jaxpref.files import loading, pipelines
from jaxpref.models import presets
from jaxpref.objectives import catalog, spo
from jaxpref.planning import plan
from jaxpref.rewards import published, shapes, terms
from jaxpref.rewards.loading import load_clip, load_preference_model
from jaxpref.training import build, programs
from scripts.parity import full_size_parity

MESH = sharding.make_mesh(devices=jax.devices()[:1])


def real_bytes(config):
  """Bytes of what a training run of the config holds before its first step."""
  experiment = build.build(config, functools.partial(sharding.tree_shardings, MESH))
  state = jax.jit(programs.state_initializer(experiment, programs.make_optimizer(config)[0]))(experiment.params)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  return {
    "trained": size(state.params),
    "reference": size(state.ref_params),
    "optimizer": size(state.opt_state),
    "batch": size(next(experiment.batches())),
    **{f"frozen {name}": size(tree) for name, tree in experiment.frozen.items()},
  }


@pytest.mark.parametrize("recipe", [dpo_sdxl, spo_sd15])
def test_the_arguments_are_those_of_training(recipe):
  config = recipe.get_config("smoke")
  _, *shapes = plan.abstract_inputs(plan.without_weights(config), MESH)
  assert plan.argument_bytes(*shapes) == real_bytes(config)


def test_precomputed_data_need_neither_vae_nor_text_encoders(tmp_path):
  config = dpo_sdxl.get_config("smoke")
  config.batch_size = 4
  config.data.split = "validation"  # a ninth of the images
  assert precompute.run(config, str(tmp_path / "made"), rows_per_file=2048, batch_size=8)
  config.data.update(source="precomputed", path=str(tmp_path / "made"))
  config.sample.every, config.evaluation.num_prompts = 0, 0
  _, state, frozen, batch = plan.abstract_inputs(plan.without_weights(config), MESH)
  assert set(frozen) <= {"unet", "empty_ids"}
  assert plan.argument_bytes(state, frozen, batch) == real_bytes(config)
  real = next(build.build(config).batches())
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
  config.data.path = str(tmp_path / "not_there")
  plan.without_weights(config)  # nothing is read from it


def test_recipes_of_published_models_need_neither_network_nor_weights():
  config = plan.without_weights(dpo_sdxl.get_config())
  assert config.model == "zeros:sdxl"
  config.update(batch_size=2, accumulation=1)
  config.lora.rank = 8
  _, state, frozen, batch = plan.abstract_inputs(config, MESH)
  assert sum(x.size for x in jax.tree.leaves(frozen["unet"])) == 2_567_463_684
  assert {x.dtype for x in jax.tree.leaves(frozen["unet"])} == {jnp.dtype("bfloat16")}
  assert set(state.params) == {"unet_lora"}
  assert batch["pixels_0"].shape == (2, 1024, 1024, 3)


def test_a_preference_model_needs_neither_scores_nor_images():
  config = spm_sdxl.get_config()
  config.data.update(path="nowhere", scores="nowhere.npz")
  config = plan.without_weights(config)
  config.update(batch_size=1, accumulation=1)
  _, state, _, batch = plan.abstract_inputs(config, MESH)
  assert set(state.params) == {"spm"} and batch["pixels_0"].shape[0] == 1


def test_a_latent_reward_model_of_precomputed_data_needs_no_other_network():
  config = lrm_sd15.get_config("smoke")
  config.data.update(source="precomputed", path="nowhere")
  _, state, frozen, batch = plan.abstract_inputs(plan.without_weights(config), MESH)
  assert set(state.params) == {"lrm"} and set(frozen) == {"empty_ids"}
  assert {"input_ids", "moments_0", "moments_1"} <= set(batch)
  assert not {"encoder_hidden_states", "pixels_0"} & set(batch)


def test_lpo_is_planned_with_a_latent_reward_model():
  config = plan.without_weights(lpo_sd15.get_config("smoke"))
  assert config.reward == "latent:1.0"
  _, state, frozen, _ = plan.abstract_inputs(config, MESH)
  assert set(state.params) == {"unet_lora"} and "lrm" in frozen and "spm" not in frozen


@pytest.mark.parametrize("model", ["folder", "tiny-sd"])
def test_shapes_follow_from_the_json_files_of_a_folder(model, tmp_path):
  """Those of a shipped model from its preset; no weights are there to be read."""
  config = dpo_sd15.get_config("smoke")
  config.batch_size, config.accumulation = 1, 1
  preset = {"folder": "sd15-miniature", "tiny-sd": "tiny-sd"}[model]
  config.model = f"random:{preset}"
  expected = plan.argument_bytes(*plan.abstract_inputs(plan.without_weights(config), MESH)[1:])
  config.model = model
  if model == "folder":
    pipe = pipelines.random_pipeline(preset, components=())
    config.model = str(pipelines.save_pipeline(tmp_path / "model", pipe, configs_only=True))
  found = plan.without_weights(config)
  assert plan.argument_bytes(*plan.abstract_inputs(found, MESH)[1:]) == expected
  if model == "folder":
    assert loading.preset_of(found.model) == dataclasses.replace(presets.PRESETS[preset], preference=None, judge=None)
  else:
    read, own = pipelines.read_preset(loading.folder_of("tiny-sd")), presets.TINY_SD
    vae = dataclasses.replace(own.vae, scaling_factor=read.vae.scaling_factor)  # which was measured
    assert (read.unet, read.vae, read.text_encoder) == (own.unet, vae, own.text_encoder)


def test_an_unknown_model_is_refused(monkeypatch):
  config = dpo_sdxl.get_config()
  asked = []

  def unreachable(name, *, allow_patterns, **_):
    asked.append(allow_patterns)
    raise ConnectionError("no network")

  monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
  config.model = "somebody/some-model"
  with pytest.raises(ValueError, match="config.model=somebody/some-model: its shapes are not.*sdxl.*connect to the"):
    plan.without_weights(config)
  (patterns,) = asked
  assert not any(fnmatch.fnmatch("unet/diffusion_pytorch_model.safetensors", p) for p in patterns)


def transitions(config):
  """Those of SPO of one prompt whose winner and loser start from one latent, and the others."""
  s = config.spo
  groups = spo.pool_groups(
    num_steps=s.num_inference_steps,
    warmup_steps=s.warmup_steps,
    inner_steps=s.inner_steps,
    pool_last_step=s.pool_last_step,
  )
  return len(groups), sum(groups) - len(groups)


def minibatch(config):
  """Rows of one update, of each kind."""
  found = catalog.method(config).updates(config)
  return found.rows, found.other_rows


def updates(config):
  return catalog.method(config).updates(config).count


def test_sizes_of_spo_are_the_published_ones():
  """As the recipes say: of 16 transitions none, or three of four, do not share their start."""
  sd15, sdxl = spo_sd15.get_config(), spo_sdxl.get_config()
  assert transitions(sd15) == (16, 0) and minibatch(sd15) == (40, 0)
  assert transitions(sdxl) == (4, 12) and minibatch(sdxl) == (4, 12)
  assert updates(sd15) == 16 and plan.denoiser_rows(sd15, 4) == 2 * 10
  sd15.spo.update(pool_last_step=False, minibatch=37)
  assert transitions(sd15) == (15, 1) and minibatch(sd15) == (37, 3)
  assert updates(sd15) == 17  # 600 shared in pieces of 37, and 40 others in pieces of 3 are 14
  assert updates(sdxl) == 8
  assert plan.denoiser_rows(sdxl, 4) == 2 * (1 + 2 * 2)  # guided: one shared, winner and loser of two others
  dpo = dpo_sdxl.get_config()
  assert plan.denoiser_rows(dpo, 16) == 2


def test_sizes_of_grpo():
  """4 prompts x 6 samples x 20 steps, of which a share is trained on, 120 at a time."""
  config = grpo_tiny.get_config()
  assert updates(config) == 4 and plan.denoiser_rows(config, 1) == 2 * 120
  config.update(accumulation=2)
  config.grpo.update(timestep_fraction=0.6, guidance_scale=0.0)  # as 1: no guidance
  assert updates(config) == 3 and plan.denoiser_rows(config, 4) == 15
  config.grpo.minibatch = 1000
  assert updates(config) == 1 and minibatch(config) == (288, 0)
  assert updates(spo_sdxl.get_config()) == 8 and updates(dpo_sdxl.get_config()) == 1
  assert "--config.accumulation=4" in changed(grpo_tiny.get_config(), 2)


def changed(config, devices):
  return [change.flags(config) for change in plan.changes(config, devices)]


def test_changes_are_in_the_order_of_their_cost():
  config = dpo_sd15.get_config()
  config.update(batch_size=8, accumulation=1, remat="attention")
  found = changed(config, 4)
  assert found[:3] == [
    "--config.accumulation=2",
    "--config.mesh.fsdp=2",
    "--config.accumulation=2 --config.mesh.fsdp=2",
  ]
  assert found[5] == "--config.remat=block"
  assert found[-1] == "--config.accumulation=2 --config.mesh.fsdp=4 --config.remat=full --config.lora.rank=64"
  assert len(found) == 2 * 3 * 3 * 2 - 1
  config.lora.rank = 4
  assert not any("lora" in flags for flags in changed(config, 4))


@pytest.mark.slow
def test_estimates_follow_shardings_micro_batches_and_what_is_kept():
  devices = jax.devices()[:4]
  config = plan.without_weights(dpo_sd15.get_config("smoke"))
  config.update(batch_size=16, accumulation=1, remat="none")
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  arguments = plan.argument_bytes(*plan.abstract_inputs(config, mesh)[1:])
  trained, temporaries = arguments["trained"], 50 * 2**20
  report = {"arguments": arguments, "peak": sum(arguments.values()) + trained + temporaries}
  found = {change.flags(config): size for change, size in plan.estimates(config, devices, report)}
  # Four micro-batches: a second copy of gradients, a fourth of the rest.
  assert found["--config.accumulation=4"] == pytest.approx(report["peak"] + trained - 0.75 * temporaries)
  split = config.copy_and_resolve_references()
  split.mesh.fsdp = 4
  mesh = sharding.make_mesh(**split.mesh, devices=devices)
  arguments = plan.argument_bytes(*plan.abstract_inputs(split, mesh)[1:])
  assert arguments["trained"] < trained
  expected = sum(arguments.values()) + arguments["trained"] + temporaries
  assert found["--config.mesh.fsdp=4"] == pytest.approx(expected)
  policies = [found[f"--config.remat={remat}"] for remat in ("attention", "block", "full")]
  assert sorted(policies, reverse=True) == policies and policies[0] < report["peak"]


# ---- Rewards ----------------------------------------------------------------------------------------------------


def rewarded(reward, **fields):
  config = grpo_tiny.get_config()
  config.update(model="random:one-level", preference_model=None, reward=reward, batch_size=2, **fields)
  config.judge = None
  config.grpo.update(group_size=2, num_inference_steps=2, minibatch=2)
  return config


def sizes(config):
  planned = plan.planned(plan.without_weights(config), MESH)
  return plan.reward_sizes(planned.reward, planned.frozen), plan.argument_bytes(planned.state, planned.frozen)


def count(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def torch_parameters(make):
  with torch.device("meta"):
    return sum(p.numel() for p in make().parameters())


def head_parameters(width):
  """Of five linear layers to 1024, 128, 64, 16 and 1."""
  widths = (width, 1024, 128, 64, 16, 1)
  return sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))


def imagereward_parameters():
  """BLIP's ViT-L/16 and BERT with attention to it, by transformers, and the head."""
  vision = modeling_blip.BlipVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
  )
  text = modeling_blip_text.BlipTextConfig(
    vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, max_position_embeddings=512
  )
  image = torch_parameters(lambda: modeling_blip.BlipVisionModel(vision))
  prompt = torch_parameters(lambda: modeling_blip_text.BlipTextModel(text, add_pooling_layer=False))
  return image + prompt + head_parameters(768)


def clip_l_parameters():
  text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
  vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
  config = transformers.CLIPConfig(text_config=text, vision_config=vision | {"projection_dim": 768}, projection_dim=768)
  return torch_parameters(lambda: transformers.CLIPModel(config))


def test_published_scorers_are_counted_without_their_files():
  """As many parameters as the published models have, in the dtype of the computation but for the head."""
  clip_h = full_size_parity.MODELS["clip-h"][2]
  expected = {
    "pickscore": clip_h,
    "hpsv2.1": clip_h,
    "aesthetic": clip_l_parameters() + head_parameters(768),
    "imagereward": imagereward_parameters(),
  }
  found, arguments = sizes(
    rewarded("pickscore:1,hpsv2.1:-0.5,aesthetic=/nowhere/aesthetic:0.1,imagereward:1", dtype="bfloat16")
  )
  assert {name: of_it["parameters"] for name, of_it in found.items()} == expected
  assert found["pickscore"]["bytes"] == 2 * clip_h
  assert found["aesthetic"]["bytes"] == 2 * clip_l_parameters() + 4 * head_parameters(768)
  assert {name: arguments[f"frozen {name}"] for name in found} == {n: of_it["bytes"] for n, of_it in found.items()}
  assert "frozen spm" not in arguments


def test_the_shapes_of_every_published_scorer_are_known():
  assert {*shapes.PUBLISHED, *shapes.SHIPPED} == set(published.PUBLISHED)


def test_rewards_take_what_they_take_in_training():
  """Those with weights at hand, as they are loaded for training."""
  config = rewarded("tiny-clip:1,judge:0.1,preference_model:1")
  config.preference_model = "random:one-level"
  loaded = terms.load(config, functools.partial(sharding.tree_shardings, MESH))[1]
  loaded["preference_model"] = loaded.pop("spm")
  size = lambda tree: {"parameters": count(tree), "bytes": sum(x.nbytes for x in jax.tree.leaves(tree))}
  assert sizes(config)[0] == {name: size(tree) for name, tree in loaded.items()}


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-spm"])
def test_the_config_of_a_folder_says_as_much_as_its_weights(name):
  folder = loading.folder_of(name)
  spec = shapes.without_values(f"pickscore={folder}")
  found = jax.eval_shape(lambda: published.load_reward(spec, dtype="float32", placement=None, preferred_style="")[1])
  expected = load_preference_model(folder)[1] if name == "tiny-spm" else load_clip(folder)[1]
  assert jax.tree.map(jnp.shape, expected) == jax.tree.map(lambda s: s.shape, found)


@pytest.mark.parametrize(
  ("reward", "sentence"),
  [
    ("picscore:1", "picscore is unknown, expected preference_model, pickscore"),
    ("judge=/nowhere:1", "/nowhere/config.json is missing"),
    ("pickscore={tmp}:1", "config.json is missing"),
    ("imagereward={tmp}:1", "config.json is missing; point to a folder that scripts/assets/convert_scorer.py wrote"),
  ],
)
def test_a_reward_of_unknown_shapes_is_one_sentence(reward, sentence, tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match=sentence):
    sizes(rewarded(reward.format(tmp=tmp_path)))
