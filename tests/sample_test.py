"""The command that draws prompts."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxpref import sample
from jaxpref.evaluation import drawing, settings
from jaxpref.evaluation.pictures import picture_table
from jaxpref.files import adapters, loading, pipelines
from jaxpref.models import lora, presets
from tests import QUICK_FLAGS

FEW = ["--steps=2", "--seeds=2"]
PROMPTS = ["Red apple!", "volcano"]
NAMES = ["0000_0_red-apple.png", "0000_1_red-apple.png", "0001_0_volcano.png", "0001_1_volcano.png"]


def pixels(path):
  return np.asarray(Image.open(path)).astype(int)


def pictures(folder, names=NAMES):
  return np.stack([pixels(folder / name) for name in names])


@pytest.fixture(scope="module")
def pipe():
  """A model of random weights, whose UNet has one level."""
  return pipelines.random_pipeline(presets.ONE_LEVEL)


@pytest.fixture(scope="module")
def few(pipe, tmp_path_factory):
  """Arguments that draw few pictures with the model of a run."""
  run = tmp_path_factory.mktemp("run")
  pipelines.save_pipeline(run / "export", pipe)
  (run / "config.json").write_text("{}")
  return [f"--model={run}", *FEW]


@pytest.fixture(scope="module")
def drawn(few, tmp_path_factory):
  """The folder of two prompts, drawn on the eight virtual devices of the tests."""
  folder = tmp_path_factory.mktemp("sample") / "new" / "folder"
  sample.main([*few, "--prompts", *PROMPTS, f"--out={folder}"])
  return folder


def test_a_folder_of_pictures_with_table_and_settings(drawn, few):
  assert sorted(p.name for p in drawn.iterdir()) == [*NAMES, "grid.png", "samples.json"]
  images = pictures(drawn)
  assert images.shape == (4, 16, 16, 3)
  assert np.abs(images[:, None] - images[None]).max(axis=(2, 3, 4))[~np.eye(4, dtype=bool)].min() > 10
  settings = json.loads((drawn / "samples.json").read_text())
  assert f"--model={settings['model']}" == few[0] and settings["steps"] == 2 and settings["lora"] is None
  assert settings["images"][3] == {"file": NAMES[3], "prompt": "volcano", "index": 1}


def test_same_pictures_on_one_device_in_other_batches(drawn, few, tmp_path):
  """One row at a time, on one device, in another process: the same but for rounding."""
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("\n".join(PROMPTS))
  environment = os.environ | {"XLA_FLAGS": QUICK_FLAGS, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "jaxpref.sample", *few, "--prompts", str(prompts), "--batch_size=1"]
  root = pathlib.Path(__file__).resolve().parents[1]
  subprocess.run([*command, f"--out={tmp_path / 'one'}"], cwd=root, env=environment, check=True, capture_output=True)
  assert len(jax.devices()) == 8
  assert np.abs(pictures(tmp_path / "one") - pictures(drawn)).max() <= 1


def test_overwrite_removes_what_it_drew_before_and_nothing_else(drawn, few, tmp_path):
  """With all options once, in bfloat16."""
  folder = tmp_path / "again"
  folder.mkdir()
  for file in drawn.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  (folder / "mine.txt").write_text("kept")
  options = ["--scheduler=dpmpp_2m", "--karras", "--negative_prompt=", "--clip_skip=1", "--guidance_rescale=0.5"]
  options += ["--height=8", "--dtype=bfloat16", "--seeds=1", "--prompt", "Red apple!"]
  with pytest.raises(SystemExit, match="again exists and is not empty; choose another folder, or pass --overwrite"):
    sample.main([*few, *options, f"--out={folder}"])
  sample.main([*few, *options, "--overwrite", f"--out={folder}"])
  assert sorted(p.name for p in folder.iterdir()) == [NAMES[0], "grid.png", "mine.txt", "samples.json"]
  assert pixels(folder / NAMES[0]).shape == (8, 16, 3)


def test_frozen_weights_are_stored_in_bfloat16():
  pipe = loading.load_text_to_image("tiny-sd", dtype="bfloat16", param_dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(pipe.params)} == {jnp.dtype("bfloat16")}


def test_a_table_alone_with_a_lora_file_and_another_seed(drawn, few, pipe, tmp_path):
  """The table that the model with the adapter merged into it draws; of a file that adapts the text encoder, too."""
  adapter = lora.init_lora(jax.random.key(1), pipe.params["unet"], rank=2)
  adapter = jax.tree.map(lambda x: 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
  adapters.save_kohya(tmp_path / "a.safetensors", adapter, 0.5, pipe.unet.config)
  down, up = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate(((2, 24), (24, 2))))
  factors = {"lora_A": down.T, "lora_B": up.T}
  text_encoder = {"text_model": {"encoder": {"layers.0": {"self_attn": {"v_proj": factors}}}}}
  name = "lora_te_text_model_encoder_layers_0_self_attn_v_proj"
  tensors = load_file(tmp_path / "a.safetensors") | {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
  save_file(tensors, tmp_path / "a.safetensors")
  options = [f"--lora={tmp_path / 'a.safetensors'}", "--seed=7", f"--out={tmp_path / 'table.PNG'}"]
  sample.main([*few, "--prompts", *PROMPTS, *options])
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "table.PNG"]

  merged = dict(pipe.params) | {"unet": lora.merge_lora(pipe.params["unet"], adapter, 0.5)}
  merged["text_encoder"] = lora.merge_lora(pipe.params["text_encoder"], text_encoder)
  images = drawing.generate(
    loading.text_to_image(pipe),
    merged | {"empty_ids": pipe.tokenize([""])},
    pipe.tokenize(PROMPTS),
    seeds_per_prompt=2,
    num_inference_steps=2,
    guidance_scale=5.0,
    eta=0.0,
    seed=7,
    batch_size=4,
  )
  picture_table(tmp_path / "expected.png", {"": images}, PROMPTS)
  found, expected, other = (pixels(p) for p in (tmp_path / "table.PNG", tmp_path / "expected.png", drawn / "grid.png"))
  assert np.abs(found - expected).max() <= 1
  assert found.shape == other.shape and np.abs(found - other).max() > 10


LATENTS = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m"])
def test_the_same_latents_give_the_pictures_of_diffusers(few, scheduler, tmp_path):
  np.save(tmp_path / "latents.npy", LATENTS.astype(np.float64))
  options = [f"--scheduler={scheduler}", f"--latents={tmp_path / 'latents.npy'}", f"--out={tmp_path / 'out'}"]
  sample.main([*few, "--prompts", *PROMPTS, *options])
  folder = pathlib.Path(few[0].removeprefix("--model=")) / "export"
  theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
  kind = {"ddim": diffusers.DDIMScheduler, "dpmpp_2m": diffusers.DPMSolverMultistepScheduler}[scheduler]
  theirs.scheduler = kind.from_config(theirs.scheduler.config)
  latents = torch.from_numpy(LATENTS)
  settings = {"num_inference_steps": 2, "guidance_scale": 5.0, "num_images_per_prompt": 2, "output_type": "np"}
  expected = theirs(PROMPTS, latents=latents, **settings).images * 255
  assert np.abs(pictures(tmp_path / "out") - expected).max() <= 1
  assert np.abs(expected[:2] - expected[2:]).max() > 10 and expected.std() > 10


def test_saved_latents_give_the_same_pictures(drawn, few, tmp_path):
  """Whatever the seed; and the saved ones are those that the seed draws."""
  command = [*few, "--prompts", *PROMPTS]
  first, second = tmp_path / "new" / "first.npy", tmp_path / "second.npy"
  sample.main([*command, f"--save_latents={first}", f"--out={tmp_path / 'a'}"])
  sample.main([*command, "--seed=7", f"--latents={first}", f"--save_latents={second}", f"--out={tmp_path / 'b'}"])
  a, b = pictures(tmp_path / "a"), pictures(tmp_path / "b")
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - pictures(drawn)).max() <= 1
  assert first.read_bytes() == second.read_bytes()
  saved = np.load(first, allow_pickle=False)
  assert saved.shape == (4, 4, 8, 8) and saved.dtype == np.float32
  found = json.loads((tmp_path / "b" / "samples.json").read_text())
  assert found["latents"] == str(first) and "save_latents" not in found
  assert json.loads((tmp_path / "a" / "samples.json").read_text())["latents"] is None


def test_latents_have_the_size_of_the_pictures(few, tmp_path):
  file = tmp_path / "latents.npy"
  command = [*few, "--prompt=cat", "--height=8"]
  sample.main([*command, f"--save_latents={file}", f"--out={tmp_path / 'x.png'}"])
  assert np.load(file).shape == (2, 4, 4, 8)
  with pytest.raises(SystemExit, match="save_latents=.* exists; choose another name, or pass --overwrite"):
    sample.main([*command, f"--save_latents={file}", f"--out={tmp_path / 'y.png'}"])
  command.append(f"--out={tmp_path / 'x.png'}")
  drawn = (tmp_path / "x.png").read_bytes()
  with pytest.raises(SystemExit, match="x.png exists; choose another name, or pass --overwrite"):
    sample.main([*command, "--seed=3"])
  assert (tmp_path / "x.png").read_bytes() == drawn
  sample.main([*command, "--seed=3", f"--save_latents={file}", "--overwrite"])
  assert (tmp_path / "x.png").read_bytes() != drawn


def saved_as(array, **kwargs):
  return lambda file: np.save(file, array, **kwargs)


def save_cut(file):
  np.save(file, LATENTS)
  os.truncate(file, 500)


BAD_LATENTS = {
  "rank": (saved_as(LATENTS[0]), r"has the shape [4, 8, 8], expected [N, C, h, w] = [4, 4, 8, 8]; save one array for"),
  "channels": (saved_as(np.tile(LATENTS, (1, 2, 1, 1))), "= [4, 4, 8, 8]: the model's latents have 4 channels, which"),
  "channels last": (saved_as(LATENTS.transpose(0, 2, 3, 1)), "has the shape [4, 8, 8, 4], expected [N, C, h, w] = [4,"),
  "size": (
    saved_as(LATENTS[..., :4]),
    "has the shape [4, 4, 8, 4], expected [N, C, h, w] = [4, 4, 8, 8]; choose the h",
  ),
  "count": (
    saved_as(LATENTS[:3]),
    "one for each picture of each prompt, prompt by prompt; choose prompts and pictures",
  ),
  "NaN": (saved_as(LATENTS * np.nan), "holds NaN, infinity or numbers too large for float32; make the latents again"),
  "large": (saved_as(LATENTS.astype(np.float64) * 1e300), "holds NaN, infinity or numbers too large for float32"),
  "integers": (saved_as(LATENTS.astype(np.int64)), "holds int64, expected float32, float16 or float64; save it as"),
  "bfloat16": (saved_as(np.asarray(jnp.asarray(LATENTS, jnp.bfloat16))), "holds |V2, expected float32"),
  "complex": (saved_as(LATENTS.astype(np.complex64)), "holds complex64, expected float32"),
  "objects": (
    saved_as(np.array([{}], object), allow_pickle=True),
    "cannot be read (Array can't be memory-mapped: Pyth",
  ),
  "pickle": (
    lambda file: file.write_bytes(pickle.dumps(LATENTS)),
    "is not an array that numpy.save wrote, the only sup",
  ),
  "archive": (
    lambda file: np.savez(file.open("wb"), LATENTS),
    "is not an array that numpy.save wrote, the only support",
  ),
  "cut": (save_cut, "cannot be read (mmap length is greater than"),
  "empty": (lambda file: file.write_bytes(b""), "is not an array that numpy.save wrote"),
  "missing": (lambda file: None, "there is no such file; give one that --save_latents or numpy.save has written"),
}


@pytest.mark.parametrize("what", BAD_LATENTS)
def test_latents_that_do_not_fit_are_refused_before_the_weights_are_read(few, what, tmp_path, monkeypatch):
  monkeypatch.setattr(settings, "load", None)
  file = tmp_path / "x.npy"
  save, message = BAD_LATENTS[what]
  save(file)
  with pytest.raises(SystemExit) as stopped:
    sample.main([*few, "--prompts", *PROMPTS, f"--latents={file}", f"--out={tmp_path / 'out'}"])
  assert str(stopped.value).startswith(f"error: --latents={file}") and message in str(stopped.value)
  assert "\n" not in str(stopped.value) and not (tmp_path / "out").exists()


def test_a_length_of_t5_is_refused_for_a_model_without_it(few, tmp_path, monkeypatch):
  monkeypatch.setattr(settings, "load", None)
  with pytest.raises(SystemExit, match="--max_sequence_length=9 is for models with T5, which this one does not have"):
    sample.main([*few, "--prompt=cat", "--max_sequence_length=9", f"--out={tmp_path / 'x.png'}"])


def test_a_run_stands_for_its_export(tmp_path):
  assert settings.model_folder("organisation/model") == "organisation/model"
  assert settings.model_folder(str(tmp_path)) == str(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match="is a run without export/, .* python -m jaxpref.export"):
    settings.model_folder(str(tmp_path))
  (tmp_path / "export").mkdir()
  assert settings.model_folder(str(tmp_path)) == str(tmp_path / "export")


@pytest.mark.parametrize(
  ("prompt", "expected"),
  [("A cat, on a mat.", "_a-cat-on-a-mat"), ("../../etc", "_etc"), ("猫", ""), ("x" * 99, "_" + "x" * 40)],
)
def test_names_of_pictures(prompt, expected):
  assert sample.slug(prompt) == expected


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--model=nowhere"], "model folder nowhere does not exist"),
    (["--seeds=0"], "--seeds=0; expected at least 1"),
    (["--height=-8"], "--height=-8; expected at least 1"),
    (["--guidance_rescale=7"], "--guidance_rescale=7.0; expected 0 to 1"),
    (
      ["--guidance_rescale=0.7", "--guidance_scale=1"],
      "--guidance_rescale=0.7 changes guidance, which --guidance_scal",
    ),
    (["--out=pyproject.toml"], "is a file; name a folder, or a file that ends in .png"),
    (["--guidance_scale=-1"], "--guidance_scale=-1.0; expected a number of at least 0"),
    (["--guidance_scale=nan"], "--guidance_scale=nan; expected a number of at least 0"),
    (["--lora", "gone.safetensors", "--lora=b.safetensors"], "--lora: there is no file gone.safetensors"),
    (["--lora=a.safetensors:big"], "the strength is 'big'; expected a number, such as a.safetensors:0.8"),
    (["--prompts", "cat", "pyproject.toml"], "--prompts has 2 prompts, and 'pyproject.toml' is the name of a file"),
    (["--prompts", "nowhere.jsonl"], "there is no file of prompts nowhere.jsonl"),
    (["--negative_prompt=README.md"], "--negative_prompt='README.md' names a file or a folder"),
    (["--save_latents=x.npz"], "--save_latents=x.npz; expected a file that ends in .npy"),
    (["--save_latents=/proc/x.npy"], "--save_latents=/proc/x.npy cannot be written"),
    (["--max_sequence_length=513"], "--max_sequence_length=513; expected at most 512"),
    (["--karras"], "--karras is for --scheduler=dpmpp_2m"),
    (["--scheduler=dpmpp_2m", "--eta=1"], "--eta=1.0 is for --scheduler=ddim"),
    (["--model=random:sd35-miniature", "--scheduler=dpmpp_2m", "--karras"], "--karras: random:sd35-miniature is a rec"),
    (["--model=random:sd35-miniature", "--clip_skip=9"], "clip_skip=9, expected 0 to 1 for text encoders of 2 layers"),
    (["--model=random:sd35-miniature", "--unet_model=x"], "unet_model is for Stable Diffusion with a UNet, not for st"),
  ],
)
def test_bad_arguments_end_in_one_sentence(arguments, message, tmp_path):
  with pytest.raises(SystemExit) as stopped:
    prompts = [] if "--prompts" in arguments else ["--prompts", "cat"]
    sample.main([*prompts, f"--out={tmp_path / 'x.png'}", *arguments])
  assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
