"""The script that makes the shipped models, as one command, two steps a stage, in a copy of the sources."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = [
  "--config.num_steps=2",
  "--config.batch_size=8",
  "--config.optimizer.warmup_steps=0",
  "--config.checkpoint.every=2",
  "--config.sample.every=0",
  "--config.evaluation.num_prompts=2",
  "--config.evaluation.seeds_per_prompt=1",
  "--config.evaluation.num_inference_steps=2",
]


@pytest.mark.slow
def test_all_stages_run_and_are_installed(tmp_path):
  copy = tmp_path / "jaxpref"
  shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__"))
  command = ["bash", "scripts/assets/make_tiny_sd.sh", *SHORT]
  environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": sys.executable}
  subprocess.run(command, cwd=copy, env=environment, check=True, timeout=3000)
  for name in ("tiny-sd", "tiny-spm", "tiny-judge"):
    metrics = json.loads((copy / "jaxpref" / "assets" / name / "metrics.json").read_text())
    shipped = json.loads((ROOT / "jaxpref" / "assets" / name / "metrics.json").read_text())
    assert set(metrics) == set(shipped) and metrics != shipped
  weights = pathlib.Path("jaxpref/assets/tiny-clip/model.safetensors")
  assert (copy / weights).read_bytes() != (ROOT / weights).read_bytes()
