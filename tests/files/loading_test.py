"""Folders of another architecture or without a part, names that draw weights, and how loading is measured."""

import dataclasses
import json
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxpref.files import family as families
from jaxpref.files import folders, loading, pipelines, tokenizers
from jaxpref.files.tensors import load_tree, save_tree, weight_files
from jaxpref.models import clip, presets
from jaxpref.models.unet import UNet2DConditionModel, UNetConfig
from jaxpref.models.vae import AutoencoderKL, VAEConfig
from tests.files.trees import assert_same, draw

# ---- another architecture ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
  """A folder of sd15-miniature; its weights are the same tensors as its config.json describes."""
  preset = presets.SD15_MINIATURE
  modules = {
    "unet": UNet2DConditionModel(preset.unet),
    "vae": AutoencoderKL(preset.vae),
    "text_encoder": clip.CLIPTextModel(preset.text_encoder),
  }
  pipe = pipelines.Pipeline(
    **modules,
    params={name: draw(presets.abstract_params(module)) for name, module in modules.items()},
    schedule=None,
    scheduler_config=dict(preset.scheduler),
    tokenizer=tokenizers.tiny_tokenizer(),
  )
  return pipelines.save_pipeline(tmp_path_factory.mktemp("models") / "model", pipe)


@pytest.fixture
def folder(pipeline_folder, tmp_path):
  """A copy to damage."""
  return shutil.copytree(pipeline_folder, tmp_path / "model")


def edit(file, **fields):
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_text_encoder_of_another_width(folder):
  """The commonest mix-up: SD 1's UNet (768) beside SD 2's text encoder (1024)."""
  edit(folder / "unet" / "config.json", cross_attention_dim=32)
  with pytest.raises(ValueError) as error:
    pipelines.load_pipeline(folder)
  message = str(error.value)
  assert str(folder / "unet") in message and "config.json" in message and "\n" not in message
  assert "attn2.to_k.weight: found [16, 24], expected [16, 32]" in message
  assert "missing" not in message and "unexpected" not in message
  assert "describes: cross_attention_dim is 24 in the tensors, 32 in it; mis-shaped" in message


def test_more_layers_than_there_are(folder):
  edit(folder / "text_encoder" / "config.json", num_hidden_layers=3)
  sentence = r"describes: num_hidden_layers is 2 in the tensors, 3 in it; missing 16 \(.*encoder\.layers\.2\."
  with pytest.raises(ValueError, match=sentence) as error:
    pipelines.load_pipeline(folder)
  assert "mis-shaped" not in str(error.value)
  edit(folder / "text_encoder" / "config.json", num_hidden_layers=1)
  with pytest.raises(ValueError, match=r"unexpected 16 \(.*encoder\.layers\.1\."):
    pipelines.load_pipeline(folder)


def test_fields_that_the_tensors_contradict(folder):
  """The names of the fields lead the message, whichever component it is about."""
  for name, right, wrong in (
    ("unet", {"block_out_channels": [16, 32, 32]}, {"block_out_channels": [16, 32, 64]}),
    ("unet", {"in_channels": 4}, {"in_channels": 9}),
    ("vae", {"latent_channels": 4, "layers_per_block": 1}, {"latent_channels": 16, "layers_per_block": 2}),
    ("text_encoder", {"hidden_size": 24, "vocab_size": 2048}, {"hidden_size": 32, "vocab_size": 49408}),
  ):
    edit(folder / name / "config.json", **wrong)
    with pytest.raises(ValueError) as error:
      pipelines.load_pipeline(folder)
    said = str(error.value).partition("describes: ")[2].partition(";")[0]
    for field, value in wrong.items():
      found = right[field]
      as_python = [tuple(v) if isinstance(v, list) else v for v in (found, value)]
      assert f"{field} is {as_python[0]} in the tensors, {as_python[1]} in it" in said, said
    assert said.count(" in it") == len(wrong), said
    edit(folder / name / "config.json", **right)


def test_fields_that_are_not_implemented_name_themselves(folder):
  for name, field, value in (
    ("unet", "class_embed_type", "timestep"),
    ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("vae", "latents_mean", [0.0] * 4),
    ("text_encoder", "hidden_act", "relu"),
  ):
    file = folder / name / "config.json"
    before = file.read_text()
    edit(file, **{field: value})
    with pytest.raises(ValueError, match=re.escape(field)):
      pipelines.load_pipeline(folder)
    file.write_text(before)


# ---- tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("component", "changes", "sentence"),
  [
    (
      "unet",
      {"in_channels": 9},
      r"unet/config.json: in_channels is 9, expected 4, the latent_channels of the vae \(this UNet takes a mask and a",
    ),
    ("unet", {"in_channels": 8}, r"in_channels is 8, .* \(this UNet takes an image to edit as well\)"),
    ("unet", {"out_channels": 8}, "out_channels is 8, expected 4, the latent_channels of the vae"),
    ("unet", {"cross_attention_dim": 32}, "cross_attention_dim is 32, expected 24, the hidden_size of the text enc"),
    (
      "unet",
      {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40},
      "addition_embed_type is text_time, expected None, with 1 text encoders",
    ),
    ("vae", {"in_channels": 4}, "vae/config.json: in_channels is 4, expected 3, the colours of an image"),
  ],
)
def test_a_model_of_another_task_is_refused_at_loading_by_the_field(component, changes, sentence, folder, monkeypatch):
  """Its tensors fit its config.json, so that nothing else finds it before shapes meet in a compilation."""
  monkeypatch.setattr(folders, "load_tree", lambda *a, **k: pytest.fail("weights were read"))
  edit(folder / component / "config.json", **changes)
  kind, config = {"unet": (UNet2DConditionModel, UNetConfig), "vae": (AutoencoderKL, VAEConfig)}[component]
  own = kind(config.from_dict(json.loads((folder / component / "config.json").read_text())))
  save_tree(folder / component / "diffusion_pytorch_model.safetensors", draw(presets.abstract_params(own)))
  with pytest.raises(ValueError, match=sentence):
    pipelines.load_pipeline(folder)


def test_an_incomplete_tokenizer_raises(folder):
  """Either format will do, the one file of transformers 5 or the two of CLIP; not half of one."""
  tokenizer = folder / "tokenizer"
  prompts = ["grinning cat", ""]
  expected = tokenizers.tokenize(tokenizers.load_tokenizer(tokenizer), prompts)
  merges = (tokenizer / "merges.txt").read_text()
  (tokenizer / "merges.txt").unlink()
  (tokenizer / "vocab.json").rename(tokenizer / "vocab.kept")
  np.testing.assert_array_equal(tokenizers.tokenize(tokenizers.load_tokenizer(tokenizer), prompts), expected)
  (tokenizer / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match="tokenizer has no vocab.json and no merges.txt, expected a CLIP"):
    pipelines.load_pipeline(folder)
  (tokenizer / "vocab.kept").rename(tokenizer / "vocab.json")
  with pytest.raises(FileNotFoundError, match="tokenizer has no merges.txt, expected a CLIP tokenizer; download"):
    pipelines.load_pipeline(folder)
  (tokenizer / "merges.txt").write_text(merges)
  np.testing.assert_array_equal(tokenizers.tokenize(tokenizers.load_tokenizer(tokenizer), prompts), expected)


def test_small_files_are_read_before_large_ones(folder, monkeypatch):
  """What is wrong with a tokenizer or a schedule shows before gigabytes are read."""
  monkeypatch.setattr(folders, "load_tree", lambda *a, **k: pytest.fail("weights were read"))
  shutil.rmtree(folder / "tokenizer")
  with pytest.raises(FileNotFoundError, match="tokenizer"):
    pipelines.load_pipeline(folder)
  edit(folder / "scheduler" / "scheduler_config.json", prediction_type="direction")
  with pytest.raises(ValueError, match="prediction_type"):
    pipelines.load_pipeline(folder)
  (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="vae has no weights"):
    pipelines.load_pipeline(folder)


# ---- scripts/bench/measure_loading.py ------------------------------------------------------------------


def test_random_folders_have_the_layout_of_published_ones(tmp_path):
  pytest.importorskip("diffusers")
  from scripts.bench import measure_loading

  measure_loading.write_folder(tmp_path, "sdxl-miniature", shard=200_000)
  shapes = presets.abstract_params(UNet2DConditionModel(presets.SDXL_MINIATURE.unet))
  assert len(weight_files(tmp_path / "unet")) > 1
  found = load_tree(weight_files(tmp_path / "unet"), shapes, param_dtype=jnp.bfloat16)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, shape: x.shape == shape.shape, found, shapes)))
  assert 0.01 < np.std(np.asarray(found["conv_in"]["kernel"], np.float32)) < 0.03
  for name, last in (
    ("text_encoder", "text_model.final_layer_norm.weight"),
    ("text_encoder_2", "text_projection.weight"),
  ):
    tensors = safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
    assert last in tensors and all(key.startswith("text_") for key in tensors)
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float16)}
  index = json.loads((tmp_path / "model_index.json").read_text())
  assert set(index) - {"_class_name"} == {p.name for p in tmp_path.iterdir()} - {"model_index.json"}


def test_a_folder_of_stable_diffusion_3_opens_with_the_parts_that_were_written(tmp_path):
  pytest.importorskip("diffusers")
  from jaxpref.files import sd3
  from scripts.bench import measure_loading

  measure_loading.write_folder(tmp_path, "sd35-miniature", shard=60_000, components=("text_encoder_3", "transformer"))
  assert len(weight_files(tmp_path / "text_encoder_3")) > 1 and len(weight_files(tmp_path / "transformer")) > 1
  found = sd3.load_pipeline(tmp_path, components=("text_encoder_3", "transformer")).params
  assert found.keys() == {"text_encoder_3", "transformer", sd3.CONSTANTS}


def test_memory_is_watched():
  from scripts.bench import measure_loading

  before = measure_loading.status("VmRSS")["VmRSS"]
  watch = measure_loading.Peak()
  watch.start()
  block = np.ones(2**25)  # 256 MiB
  time.sleep(0.1)
  del block
  assert 0.9 * 2**28 < watch.stop()["VmRSS"] - before < 1.5 * 2**28


# ---- random weights ------------------------------------------------------------------------------


@pytest.mark.slow
def test_drawn_weights_are_distributed_as_random_ones_and_have_the_wanted_type():
  drawn, random = (
    loading.load_text_to_image(f"{kind}:one-level", dtype="float32", param_dtype=dtypes, components=("unet",)).params[
      "unet"
    ]
    for kind, dtypes in (("drawn", "bfloat16"), ("random", "float32"))
  )
  assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, random)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(random), strict=True):
    assert a.dtype == jnp.bfloat16
    a, b = np.asarray(a, np.float32), np.asarray(b)
    if np.std(b) == 0:
      np.testing.assert_array_equal(a, b)
    elif a.size > 1000:
      assert np.std(a) == pytest.approx(np.std(b), rel=0.15) and abs(np.mean(a)) < 0.15 * np.std(b), path
      assert not np.array_equal(a, b)


def test_drawn_weights_follow_the_seed_and_lie_where_they_belong():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  a, b, c = (
    loading.load_text_to_image(
      "drawn:one-level", dtype="float32", seed=seed, sharding=device, components=("text_encoder",)
    ).params
    for seed in (0, 0, 1)
  )
  assert a.keys() == {"text_encoder"}
  assert_same(a, b)
  assert not all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True))
  assert all(x.sharding == device for x in jax.tree.leaves(a))


# ---- a UNet by itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["unet/", "alone", "named"])
def test_another_unet_takes_the_place_of_the_models_own(layout, folder, tmp_path):
  """Its config.json may have keys of an average of weights; what the rest computes stays."""
  own = pipelines.load_pipeline(folder)
  halved = jax.tree.map(lambda x: x / 2, own.params["unet"])
  place = tmp_path / "dpo" / "unet"
  place.mkdir(parents=True)
  (place / "config.json").write_text(json.dumps(own.unet.config.to_dict() | {"decay": 0.99, "sample_size": None}))
  save_tree(place / "diffusion_pytorch_model.safetensors", halved)
  name = f"{folder}+unet={place if layout == 'alone' else place.parent}"
  if layout == "named":
    name = loading.with_unet(str(folder), str(place))
  with pytest.warns(UserWarning, match="ignored decay, which"):
    found = loading.load_text_to_image(name, dtype="float32")
  assert_same(found.params, {**own.params, "unet": halved})
  assert found.unet == own.unet and found.tokenizer.get_vocab() == own.tokenizer.get_vocab()
  with pytest.warns(UserWarning, match="decay"):
    rest = loading.load_text_to_image(name, dtype="float32", components=("vae",))
    assert loading.unet_config(name) == dataclasses.replace(own.unet.config, sample_size=None)
  assert set(rest.params) == {"vae"}
  files = families.get("stable_diffusion").weight_files(name)
  assert files["unet"] == [place / "diffusion_pytorch_model.safetensors"]
  assert files["vae"] == [folder / "vae" / "diffusion_pytorch_model.safetensors"]
  edit(place / "config.json", cross_attention_dim=32)
  with (
    pytest.warns(UserWarning, match="decay"),
    pytest.raises(ValueError, match="cross_attention_dim is 32, expected 24 like the model's own UNet; choose"),
  ):
    loading.load_text_to_image(name, dtype="float32", components=())


def test_the_family_of_a_model_is_the_one_given_or_that_of_its_run_or_stable_diffusion(tmp_path):
  assert families.of_run("tiny-sd", None) == families.of_run(str(tmp_path), None) == "stable_diffusion"
  (tmp_path / "export").mkdir()
  for text, found in (('{"family": "mine:OWN"}', "mine:OWN"), ("{}", "stable_diffusion"), ("{", "stable_diffusion")):
    (tmp_path / "config.json").write_text(text)
    for name in (tmp_path, tmp_path / "export"):
      assert families.of_run(str(name), None) == found
      assert families.of_run(str(name), "stable_diffusion") == "stable_diffusion"


@pytest.mark.parametrize(
  ("spec", "file"),
  [
    ("models.theirs.code:OWN", "code.py"),
    ("models.theirs.inner.code:OWN", "inner/code.py"),
    ("models.theirs:OWN", "__init__.py"),
    ("theirs:OWN", "__init__.py"),
  ],
)
def test_a_model_folder_cannot_name_code_that_it_brings(tmp_path, monkeypatch, spec, file):
  folder = tmp_path / "models" / "theirs"
  (folder / file).parent.mkdir(parents=True)
  (folder / file).write_text("raise SystemExit('was run')\n")
  (folder / "config.json").write_text(json.dumps({"family": spec}))
  monkeypatch.chdir(tmp_path)
  for entry in ("", str(tmp_path), str(tmp_path / "models")):
    monkeypatch.syspath_prepend(entry)
  with pytest.raises(ValueError, match=f"config.json names {spec}, code in .*; code in a model's folder is not run"):
    families.of_run("models/theirs", None)
  assert families.of_run("models/theirs", "mine:OWN") == "mine:OWN"


def test_a_module_beside_the_folder_of_a_run_is_its_family(tmp_path, monkeypatch):
  (tmp_path / "run").mkdir()
  (tmp_path / "run.py").write_text("")
  (tmp_path / "run" / "config.json").write_text('{"family": "run:OWN"}')
  monkeypatch.syspath_prepend(str(tmp_path))
  assert families.of_run(str(tmp_path / "run"), None) == "run:OWN"
