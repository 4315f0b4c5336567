"""Stable Diffusion 3 as a family: which names it opens, what it says of others, T5 and its length, and adapters."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpref.diffusion import RectifiedFlow
from jaxpref.evaluation import drawing
from jaxpref.files import adapters, loading, pipelines, sd3, sd3_family
from jaxpref.files import family as families
from jaxpref.models import lora, presets
from jaxpref.models.sd3.transformer import LORA_TARGETS, constant_shapes
from tests.files.trees import assert_same, randomised

FAMILY = families.get("stable_diffusion_3")
UNET = families.get("stable_diffusion")
RANDOM = "random:sd35-miniature"
LENGTH = presets.TINY_LENGTH


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A pipeline with a table of positions of its own, and its folder."""
  pipe = FAMILY.load(RANDOM, dtype="float32")
  table = {sd3.CONSTANTS: constant_shapes(pipe.transformer.config)}
  pipe = dataclasses.replace(pipe, params=randomised(dict(pipe.params) | table))
  folder = tmp_path_factory.mktemp("models") / "sd35"
  FAMILY.save(folder, pipe, dtype="float32")
  return pipe, folder


@pytest.fixture(scope="module")
def adapter(saved):
  tree = lora.init_lora(jax.random.key(0), saved[0].params["transformer"], rank=2, targets=LORA_TARGETS)
  return jax.tree.map(lambda x: x + np.float32(0.1), tree)


def test_a_folder_is_opened_with_its_positions(saved):
  pipe, folder = saved
  read = FAMILY.load(str(folder), dtype="float32")
  assert_same(read.params, pipe.params)
  assert read.max_sequence_length == LENGTH
  assert set(FAMILY.weight_files(str(folder))) == set(sd3.NETWORKS)


def test_positions_come_without_the_transformer_to_be_written_again(saved):
  pipe, folder = saved
  rest = [name for name in FAMILY.networks if name != "transformer"]
  read = FAMILY.load(str(folder), dtype="float32", components=rest)
  assert_same(read.params, {name: pipe.params[name] for name in rest})
  assert families.of_denoiser(FAMILY) == ("transformer", sd3.CONSTANTS)
  assert families.of_denoiser(UNET) == ("unet",)


def test_the_model_has_the_process_of_the_scheduler_config(saved):
  model = FAMILY.model(saved[0], remat="block", lora_scale=0.5)
  assert isinstance(model.process, RectifiedFlow) and model.process.schedule.shift == 3.0
  assert model.transformer.remat == "block" and model.lora_scale == 0.5
  with pytest.raises(ValueError, match="config.remat='none,block'; expected one of none, attention, block, full"):
    FAMILY.model(saved[0], remat="none,block")


def test_a_dynamic_shift_follows_the_size(saved):
  pipe = dataclasses.replace(saved[0], scheduler_config={"use_dynamic_shifting": True, "shift": None})
  model = FAMILY.model(pipe)
  sizes = [model.process.mu, model.at_size(8, 8).process.mu]
  slope = (1.15 - 0.5) / (4096 - 256)
  np.testing.assert_allclose(sizes, [0.5 + slope * (16 - 256), 0.5 + slope * (4 - 256)])
  assert [drawing._process(model, size).mu for size in (None, (8, 8))] == sizes


@pytest.mark.parametrize("length", [None, 7])
def test_t5_is_left_out_by_the_end_of_a_name(saved, length):
  pipe, folder = saved
  name = loading.with_t5(str(folder), drop=True, length=length)
  read = FAMILY.load(name, dtype="float32")
  assert read.text_encoder_3 is None and set(read.params) == set(FAMILY.networks) - {"text_encoder_3"}
  assert FAMILY.model(read).max_sequence_length == (length or LENGTH)
  assert read.tokenize(["a"]).shape == (1, 2 * LENGTH)
  assert "text_encoder_3" not in FAMILY.weight_files(name)
  other = FAMILY.load(loading.with_t5(RANDOM, drop=True), dtype="float32")  # the rest is as with T5
  assert_same(other.params["transformer"], FAMILY.load(RANDOM, dtype="float32").params["transformer"])
  assert FAMILY.load(f"{folder}+t5=9", dtype="float32", components=()).tokenize(["a"]).shape == (1, 2 * LENGTH + 9)


def test_a_prompt_that_t5_cannot_read_whole_is_cut_with_a_warning():
  pipe = FAMILY.load(f"{RANDOM}+t5=5", dtype="float32", components=())
  with pytest.warns(UserWarning, match="T5 reads 5 tokens, .*cut from a prompt: 'apple on a table'.*increase max_se"):
    pipe.tokenize(["a big red apple on a table"])


def edited(folder, target, file, **changes):
  shutil.copytree(folder, target)
  path = target / file
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return str(target)


def test_a_folder_without_t5_is_refused_where_t5_is_asked_for(saved, tmp_path):
  folder = edited(saved[1], tmp_path / "no", "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
  with pytest.warns(UserWarning, match="has no text_encoder_3: T5.s tokens are zeros"):  # as diffusers opens it
    assert FAMILY.load(folder, dtype="float32", components=()).text_encoder_3 is None
  for open_it in (lambda name: FAMILY.load(name, dtype="float32", components=()), FAMILY.look_for):
    with pytest.raises(ValueError, match=r"expected T5, whose 9 tokens.*MODEL\+t5=none, in a .*drop_t5=True\.$"):
      open_it(f"{folder}+t5=9")
  missing = tmp_path / "missing"
  shutil.copytree(saved[1], missing, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
  with pytest.raises(
    FileNotFoundError, match=r"text_encoder_3/config.json is missing; .* leave T5 out: MODEL\+t5=none, in a recipe"
  ):
    FAMILY.look_for(str(missing))
  FAMILY.look_for(f"{missing}+t5=none")
  assert FAMILY.load(f"{missing}+t5=none", dtype="float32", components=["vae"]).params.keys() == {"vae"}
  assert FAMILY.without_values(f"{missing}+t5=none,9") == f"zeros:{missing}+t5=none,9"


def test_a_static_shift_beside_a_dynamic_one_is_refused_with_the_file(saved, tmp_path):
  file = "scheduler/scheduler_config.json"
  folder = edited(saved[1], tmp_path / "both", file, use_dynamic_shifting=True, shift=3.0)
  with pytest.raises(ValueError, match=rf"both/{file}: .*shift is 3 and use_dynamic_shifting is true, expected one of"):
    FAMILY.look_for(folder)


def test_a_sigma_outside_its_range_is_refused_with_the_file(saved, tmp_path):
  file = "scheduler/scheduler_config.json"
  folder = edited(saved[1], tmp_path / "high", file, shift_terminal=1.5)
  with pytest.raises(ValueError, match=rf"high/{file}: .*shift_terminal is 1.5, expected a sigma between 0 and 1"):
    FAMILY.load(folder, dtype="float32", components=())


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"])
def test_a_file_that_holds_a_list_is_refused(saved, tmp_path, file):
  shutil.copytree(saved[1], tmp_path / "list")
  (tmp_path / "list" / file).write_text("[]")
  for family in (FAMILY, UNET) if file == "model_index.json" else (FAMILY,):
    with pytest.raises(ValueError, match=rf"list/{file} holds a list, expected a JSON object; download the"):
      family.load(str(tmp_path / "list"), dtype="float32", components=())


def test_models_of_the_other_family_are_refused(saved, tmp_path):
  folder = str(saved[1])
  unet_folder = str(pipelines.save_pipeline(tmp_path / "sd", pipelines.random_pipeline(presets.ONE_LEVEL)))
  for name in (folder, RANDOM):
    with pytest.raises(
      ValueError, match="is a model of Stable Diffusion 3, expected one of stable_diffusion; set config"
    ):
      families.look_for(UNET, name)
  with pytest.raises(
    ValueError, match=r"is of a StableDiffusion3Pipeline, .*set config.family \(--family\) to stable_"
  ):
    UNET.load(folder, dtype="float32")
  with pytest.raises(ValueError, match="is a preset of the family stable_diffusion_3; set config.family"):
    UNET.load(RANDOM, dtype="float32")
  with pytest.raises(
    ValueError, match=r"is of a StableDiffusionPipeline, expected StableDiffusion3Pipeline; .*--family"
  ):
    families.look_for(FAMILY, unet_folder)
  for name in ("tiny-sd", "random:sd15-miniature"):
    with pytest.raises(
      ValueError, match=f"{name} is a model of the family stable_diffusion, expected one of stable_dif"
    ):
      families.look_for(FAMILY, name)
  for name, field in ((f"{RANDOM}+unet=x", "unet_model"), (f"{RANDOM}+config=x", "model_config")):
    with pytest.raises(ValueError, match=f"{field} is for Stable Diffusion with a UNet, not for stable_diffusion_3"):
      families.look_for(FAMILY, name)
  with pytest.raises(ValueError, match="random:sd4: the preset is unknown, expected one of sd3-medium"):
    FAMILY.load("random:sd4", dtype="float32")


def test_commands_find_the_family_of_a_model(saved, tmp_path):
  assert families.of_run(str(saved[1]), None) == "stable_diffusion_3"
  assert families.of_run(f"{saved[1]}+t5=none", None) == "stable_diffusion_3"
  assert families.of_run("stabilityai/stable-diffusion-3.5-medium", None) == "stable_diffusion_3"
  assert families.of_run(f"{saved[1]}+unet=x", None) == "stable_diffusion_3"  # which then says what does not fit
  assert families.of_run("tiny-sd", None) == families.of_run("no/such", None) == "stable_diffusion"
  (tmp_path / "config.json").write_text(json.dumps({"family": "stable_diffusion_3"}))
  assert families.of_run(str(tmp_path), None) == "stable_diffusion_3"


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("stabilityai/stable-diffusion-3.5-medium", "zeros:sd35-medium"),
    ("stabilityai/stable-diffusion-3-medium-diffusers+t5=77", "zeros:sd3-medium+t5=77"),
    ("drawn:sd35-large", "zeros:sd35-large"),
  ],
)
def test_shapes_are_known_without_files(name, expected):
  assert FAMILY.without_values(name) == expected


def test_zeros_have_the_shapes_of_a_folder(saved):
  pipe, folder = saved
  zeros = FAMILY.load(FAMILY.without_values(str(folder)), dtype="float32")
  assert jax.tree.map(np.shape, zeros.params) == jax.tree.map(np.shape, dict(pipe.params))
  with pytest.raises(ValueError, match="config.model=no/where: its shapes are not known here"):
    FAMILY.without_values("no/where")


def test_drawn_weights_are_those_of_the_shapes(saved):
  drawn = FAMILY.load("drawn:sd35-miniature", dtype="bfloat16", param_dtype="bfloat16", components=["vae"])
  assert jax.tree.map(np.shape, drawn.params) == jax.tree.map(np.shape, {"vae": saved[0].params["vae"]})
  assert {x.dtype for x in jax.tree.leaves(drawn.params)} == {np.dtype("bfloat16")}


def test_another_vae_replaces_the_models_own(saved, tmp_path):
  pipe, folder = saved
  shutil.copytree(folder / "vae", tmp_path / "vae")
  read = FAMILY.load(RANDOM, dtype="float32", vae_model=str(tmp_path / "vae"))
  assert_same(read.params["vae"], pipe.params["vae"])
  with pytest.raises(FileNotFoundError, match="does not exist"):
    families.look_for(FAMILY, RANDOM, vae_model="no-such-vae")


def test_an_adapter_is_written_and_read(saved, adapter, tmp_path):
  pipe, file = saved[0], tmp_path / "a.safetensors"
  FAMILY.save_adapter(file, adapter, 2.0, name="x")
  names = load_file(file)
  assert names["transformer.transformer_blocks.3.attn.add_q_proj.lora_A.weight"].shape == (2, 24)
  assert "transformer.transformer_blocks.3.attn.to_add_out.lora_A.weight" not in names  # the last block has none
  found, scale = FAMILY.load_adapter(str(file), pipe)
  assert scale == 2.0
  assert_same(found, adapter)
  both = [adapters.LoraFile(file, 0.5), adapters.LoraFile(file, 1.0)]
  weights, scale = FAMILY.with_adapters(pipe, both)
  once, twice = (
    lora.merge_lora(pipe.params["transformer"], *a) for a in ((adapter, 3.0), (weights["transformer_lora"], scale))
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), once, twice)


def test_an_adapter_of_another_family_is_refused(saved, adapter, tmp_path):
  file = tmp_path / "unet.safetensors"
  factors = {"lora_A": np.ones((2, 8), np.float32), "lora_B": np.ones((8, 2), np.float32)}
  save_file({f"unet.mid_block.attentions.0.proj_in.{name}.weight": x for name, x in factors.items()}, file)
  with pytest.raises(ValueError, match=f"^{file}.*(Stable Diffusion|other network)"):
    FAMILY.load_adapter(str(file), saved[0])
  sd3_file = tmp_path / "sd3.safetensors"
  FAMILY.save_adapter(sd3_file, adapter, 1.0, name="x")
  pipe = pipelines.random_pipeline(presets.ONE_LEVEL)
  with pytest.raises(ValueError, match="it was made for Stable Diffusion 3, and the model is"):
    UNET.load_adapter(str(sd3_file), pipe)


def test_names_with_t5_at_their_end():
  for drop, length in ((False, None), (True, None), (False, 9), (True, 9)):
    assert loading.split_t5(loading.with_t5("a+b", drop=drop, length=length)) == ("a+b", drop, length)
  for wrong in ("a+t5=", "a+t5=x", "a+t5=1,2", "a+t5=none,none"):
    with pytest.raises(ValueError, match=r"expected \+t5=LENGTH, \+t5=none or \+t5=none,LENGTH\."):
      loading.split_t5(wrong)
  for length in (0, 513):
    with pytest.raises(ValueError, match=f"max_sequence_length={length}; expected 1 to 512"):
      FAMILY.load(f"{RANDOM}+t5={length}", dtype="float32", components=())
  assert sd3_family.recognises("drawn:sd3-medium") and not sd3_family.recognises("random:sd15")
