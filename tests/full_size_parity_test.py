"""The script that compares the networks with torch at full size, run on miniatures of the same topology."""

import json

import numpy as np
import pytest
import safetensors.numpy

from jaxpref.models import presets
from jaxpref.models.clip import CLIPTextConfig
from jaxpref.models.preference import StepAwareCLIPConfig
from jaxpref.models.unet import UNet2DConditionModel, UNetConfig
from jaxpref.models.vae import AutoencoderKL, VAEConfig
from scripts.parity import full_size_parity as parity

PRESETS = {
  "sd15-text": presets.SD15.text_encoder,
  "sd15-vae": presets.SD15.vae,
  "sd15-unet": presets.SD15.unet,
  "sdxl-text": presets.SDXL.text_encoder,
  "sdxl-text-2": presets.SDXL.text_encoder_2,
  "sdxl-vae": presets.SDXL.vae,
  "sdxl-unet": presets.SDXL.unet,
  "clip-h": presets.SDXL.preference,
}
CONFIGS = {
  "text": CLIPTextConfig,
  "text_with_projection": CLIPTextConfig,
  "vae": VAEConfig,
  "unet": UNetConfig,
  "clip": StepAwareCLIPConfig,
}


@pytest.mark.parametrize("name", parity.MODELS)
def test_presets_are_the_published_architectures(name):
  kind, config, _ = parity.MODELS[name]
  assert CONFIGS[kind].from_dict(config) == PRESETS[name]


@pytest.mark.parametrize(
  ("name", "network"),
  [
    ("sd15-unet", UNet2DConditionModel),
    ("sdxl-unet", UNet2DConditionModel),
    ("sd15-vae", AutoencoderKL),
  ],
)
def test_published_numbers_of_parameters(name, network):
  """(Those of CLIP: tests/models/clip_test.py.)"""
  assert presets.count_params(network(PRESETS[name])) == parity.MODELS[name][2]


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(arguments...) -> rows; the script with its jobs in this process, which spares the imports."""
  pytest.importorskip("diffusers")
  jobs = []

  def child(folder, **job):
    jobs.append(job)
    parity._run_child(job | {"folder": str(folder)})

  monkeypatch.setattr(parity, "_child", child)

  def run(*arguments):
    jobs.clear()
    parity.main(["--tiny", "--out", str(tmp_path / "parity"), *arguments])
    return json.loads((tmp_path / "parity.json").read_text())

  run.jobs, run.out = jobs, tmp_path / "parity.md"
  return run


@pytest.mark.parametrize("name", [pytest.param("sdxl-unet", marks=pytest.mark.slow), "sd15-vae", "clip-h"])
def test_miniatures_agree_with_their_torch_originals(run, name):
  """Forward only: the gradients of these networks are compared in tests/models."""
  (row,) = run("--models", name, "--dtypes", "float32", "--no-gradient")
  assert row["passed"] and row["bound"] == 1e-4
  if name != "clip-h":  # unit vectors
    assert all(0.2 < e["std"] < 5 for e in row["outputs"].values()), row["outputs"]
  assert row["parameters"] == row["torch_parameters"] > 10_000


def test_rows_are_kept_and_completed(run):
  (row,) = run("--models", "sdxl-text-2", "--dtypes", "float32")
  assert row["passed"] and set(row["gradients"]) == {"token_embedding"}
  rows = run("--models", "sdxl-text-2")
  assert rows[0] == row, "what has passed is not run again"
  assert [(r["dtype"], r["passed"]) for r in rows] == [("float32", True), ("bfloat16", True)]
  assert set(rows[1]["torch_bfloat16"]) == {"last_hidden_state", "penultimate", "text_embeds"}
  assert run("--models", "sdxl-text-2") == rows and not run.jobs
  table = run.out.read_text()
  assert table.count("| passed |") == 2 and "sdxl-text-2 (tiny)" in table


def test_a_difference_is_found(run, monkeypatch):
  """One number of one bias differs."""
  original = parity.run_torch

  def damaged(name, folder, **options):
    original(name, folder, **options)
    file = next(folder.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(file)
    key = next(k for k in tensors if k.endswith("layers.0.mlp.fc1.bias"))
    tensors[key][3] += 0.02
    safetensors.numpy.save_file(tensors, file)

  monkeypatch.setattr(parity, "run_torch", damaged)
  with pytest.raises(SystemExit, match="beyond the bound: sd15-text float32"):
    run("--models", "sd15-text", "--dtypes", "float32", "--no-gradient")
  assert "**failed**" in run.out.read_text()
  monkeypatch.setattr(parity, "run_torch", original)
  (row,) = run("--models", "sd15-text", "--dtypes", "float32", "--no-gradient")
  assert row["passed"], "what has failed is run again"


def test_errors_and_what_passes():
  good = {"max": 1e-6, "l2": 1e-6, "std": 1.0}
  row = {
    "outputs": {"x": good},
    "gradients": {"y": good},
    "bound": 1e-4,
    "parameters": 5,
    "torch_parameters": 5,
    "published_parameters": 5,
  }
  assert parity.passed(row) and parity.passed(row | {"published_parameters": None})
  assert not parity.passed(row | {"published_parameters": 6})
  assert not parity.passed(row | {"torch_parameters": 6})
  for bad in ({"max": 2e-4}, {"l2": 2e-4}, {"max": float("nan")}):
    assert not parity.passed(row | {"outputs": {"x": good | bad}})
    assert not parity.passed(row | {"gradients": {"y": good | bad}})
  found = parity.errors(np.array([1.0, -3.0, 2.0]), np.array([1.0, -4.0, 2.0]))
  assert found["max"] == 0.25 and found["l2"] == pytest.approx(21**-0.5)
  assert np.isnan(parity.errors(np.array([np.nan]), np.array([1.0]))["max"])
