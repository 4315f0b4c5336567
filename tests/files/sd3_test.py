"""Folders of Stable Diffusion 3: what torch diffusers opens, what it writes, and what must be refused."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxpref.files import sd3, tensors
from jaxpref.models import presets
from jaxpref.models.sd3.model import StableDiffusion3
from jaxpref.models.sd3.presets import SD35_MINIATURE
from jaxpref.models.sd3.transformer import constant_shapes
from tests.files.trees import assert_same, nchw, randomised, relative_error

PROMPTS = ["grinning cat", "a red apple and a very, very, very, very, very long prompt, café"]
LENGTH = 9  # of T5's tokens


def t5_tokenizer():
  """A T5 tokenizer of letters and a few words."""
  words = ["▁", "▁a", "▁cat", "▁red", "▁very", ",", *"abcdefghijklmnopqrstuvwxyz"]
  vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(i)) for i, word in enumerate(words, 1))]
  return transformers.T5Tokenizer(vocab=vocab, extra_ids=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A random pipeline, and the folder it is saved in."""
  pipe = sd3.random_pipeline("sd35-miniature", max_sequence_length=LENGTH)
  table = {"transformer_constants": constant_shapes(pipe.transformer.config)}  # other numbers than the computed ones
  params = randomised(dict(pipe.params) | table)
  pipe = dataclasses.replace(pipe, params=params, tokenizer_3=t5_tokenizer())
  folder = tmp_path_factory.mktemp("models") / "sd35"
  assert sd3.save_pipeline(folder, pipe) == folder
  return pipe, folder


@pytest.fixture(scope="module")
def torch_pipe(saved):
  return diffusers.StableDiffusion3Pipeline.from_pretrained(saved[1])


def model_of(pipe):
  return StableDiffusion3(**pipe.modules, process=None, max_sequence_length=pipe.max_sequence_length)


def draw(pipe, latents, steps, guidance_scale):
  """Pictures by Euler's method, from latents [B, C, h, w], on the sigmas of diffusers' scheduler."""
  model, weights = model_of(pipe), pipe.params
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler_config)
  scheduler.set_timesteps(steps)
  ids = pipe.tokenize([*PROMPTS, "", ""])
  cond = jax.jit(model.encode_text)(weights, jnp.asarray(ids))
  predict = jax.jit(lambda x, t: model.predict(weights, x, jnp.full(4, t), cond))
  x = jnp.asarray(latents).transpose(0, 2, 3, 1)
  for sigma, following, t in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], scheduler.timesteps, strict=True):
    v, v_empty = jnp.split(predict(jnp.concatenate([x, x]), float(t)), 2)
    x = x + float(following - sigma) * (v_empty + guidance_scale * (v - v_empty))
  return np.clip(np.asarray(model.decode(weights, x)) / 2 + 0.5, 0, 1)


def test_diffusers_opens_what_is_written_and_draws_the_same_picture(saved, torch_pipe):
  pipe, _ = saved
  latents = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
  expected = torch_pipe(
    PROMPTS, latents=torch.tensor(latents), num_inference_steps=3, guidance_scale=4.0, max_sequence_length=LENGTH,
    height=16, width=16, output_type="np",
  ).images  # fmt: skip
  with pytest.warns(UserWarning, match="was cut from a prompt"):
    found = draw(pipe, latents, 3, 4.0)
  print(np.abs(found - expected).max(), found.std())
  assert found.std() > 0.05
  assert np.abs(found - expected).max() <= 1 / 255


def test_networks_agree_with_those_that_torch_opens(saved, torch_pipe):
  pipe, _ = saved
  model = model_of(pipe)
  x = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)
  with torch.no_grad():
    text, _, pooled, _ = torch_pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
    expected = torch_pipe.transformer(nchw(x), text, pooled, torch.tensor([3.0, 700.0])).sample
  cond = {"encoder_hidden_states": jnp.asarray(text.numpy()), "pooled_projections": jnp.asarray(pooled.numpy())}
  found = jax.jit(model.predict)(pipe.params, x, jnp.array([3.0, 700.0]), cond)
  assert relative_error(found.transpose(0, 3, 1, 2), expected) <= 1e-4


def test_a_folder_that_torch_writes_is_read_whole_in_shards_and_as_fp16(saved, torch_pipe, tmp_path):
  pipe, folder = saved
  assert_same(sd3.load_pipeline(folder).params, pipe.params)
  torch_pipe.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
  assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 1
  read = sd3.load_pipeline(tmp_path / "shards", max_sequence_length=LENGTH)
  assert_same(read.params, pipe.params)
  assert read.modules == pipe.modules and read.scheduler_config["shift"] == 3.0
  np.testing.assert_array_equal(read.tokenize(PROMPTS), pipe.tokenize(PROMPTS))
  # What this project writes again is the same.
  sd3.save_pipeline(tmp_path / "again", read)
  assert_same(sd3.load_pipeline(tmp_path / "again").params, pipe.params)
  half = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float16)
  half.save_pretrained(tmp_path / "half", variant="fp16")
  assert (tmp_path / "half" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
  rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), pipe.params["transformer"])
  assert_same(sd3.load_pipeline(tmp_path / "half", components=["transformer"]).params["transformer"], rounded)


def test_a_folder_without_t5_is_read_and_written(saved, tmp_path):
  pipe, folder = saved
  small = sd3.without_t5(sd3.load_pipeline(folder))
  assert small.text_encoder_3 is None and "text_encoder_3" not in small.params
  sd3.save_pipeline(tmp_path / "small", small)
  assert not (tmp_path / "small" / "text_encoder_3").exists()
  absent = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told
  opened = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "small", **absent)
  assert opened.text_encoder_3 is None and opened.transformer is not None
  read = sd3.load_pipeline(tmp_path / "small")
  assert read.text_encoder_3 is None and read.tokenize(PROMPTS).shape == (2, 2 * presets.TINY_LENGTH)


def test_only_the_components_asked_for_are_read(saved):
  pipe, folder = saved
  params = sd3.load_pipeline(folder, components=["vae"]).params
  assert_same(params, {"vae": pipe.params["vae"]})


@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]])
def test_the_embedding_of_t5_may_have_its_other_name_or_both(saved, tmp_path, names):
  pipe, folder = saved
  held = safetensors.numpy.load_file(folder / "text_encoder_3" / "model.safetensors")
  table = held.pop("shared.weight")
  safetensors.numpy.save_file(held | {name: table.copy() for name in names}, tmp_path / "model.safetensors")
  shapes = presets.abstract_params(pipe.text_encoder_3)
  assert_same(tensors.load_tree(tmp_path / "model.safetensors", shapes), pipe.params["text_encoder_3"])


def test_arrays_are_read_to_their_shardings(saved):
  from jaxpref.devices import sharding

  pipe, folder = saved
  mesh = sharding.make_mesh(1, 2, 1, jax.devices()[:2])
  read = sd3.load_pipeline(folder, sharding=lambda shapes: sharding.tree_shardings(mesh, shapes))
  embedding = read.params["text_encoder_3"]["shared"]["embedding"]
  assert tuple(embedding.sharding.spec) == ("fsdp",)
  assert_same(jax.device_get(read.params), pipe.params)


def edit(folder, name, **changes):
  file = folder / name
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda f: edit(f, "model_index.json", _class_name="StableDiffusionPipeline"), "is of a StableDiffusionPipeline"),
    (lambda f: edit(f, "model_index.json", transformer=None), "has no transformer, expected the components of"),
    (lambda f: edit(f, "model_index.json", text_encoder_3=["transformers", "UMT5"]), "text_encoder_3 is a UMT5"),
    (lambda f: edit(f, "transformer/config.json", num_layers=3, dual_attention_layers=[0]), "num_layers is 4 in the"),
    (lambda f: edit(f, "text_encoder_3/config.json", d_ff=63), "d_ff is 64 in the tensors, 63 in it"),
    (lambda f: edit(f, "transformer/config.json", qk_norm="l2"), "qk_norm='l2', expected null or rms_norm"),
    (lambda f: shutil.rmtree(f / "text_encoder_3"), "text_encoder_3/config.json is missing"),
    (lambda f: (f / "tokenizer_3" / "tokenizer.json").unlink(), "no tokenizer, expected the tokenizer.json of a T5"),
    (
      lambda f: (f / "tokenizer_3" / "tokenizer.json").rename(f / "tokenizer_3" / "spiece.model"),
      "only a spiece.model, expected the tokenizer.json",
    ),
  ],
)
def test_damaged_folders_are_refused_in_one_sentence(saved, tmp_path, damage, message):
  folder = tmp_path / "damaged"
  shutil.copytree(saved[1], folder)
  damage(folder)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    sd3.load_pipeline(folder)


def test_impossible_settings_are_refused(saved):
  with pytest.raises(ValueError, match="max_sequence_length=513, expected 1 to 512"):
    sd3.load_pipeline(saved[1], max_sequence_length=513)
  with pytest.raises(ValueError, match="preset 'sd4' is unknown, expected one of sd3-medium"):
    sd3.random_pipeline("sd4")
  assert set(sd3.modules_of(SD35_MINIATURE)) == set(sd3.NETWORKS)
