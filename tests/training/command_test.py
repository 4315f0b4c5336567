"""Training as a user runs it, in processes of their own on miniature networks: what a run leaves, and a killed one."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import dpo_tiny
from jaxpref import config
from jaxpref.files import pipelines
from jaxpref.models import lora
from jaxpref.training import build, checkpoint, loop, metrics
from tests import QUICK_FLAGS, toy_run
from tests.training.loop_test import rows, states

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A folder with the compiled programs and all runs."""
  return tmp_path_factory.mktemp("runs")


def command(shared, recipe, folder, **fields):
  environment = dict(
    os.environ,
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=QUICK_FLAGS,
    JAXPREF_DATA_DIR=str(shared.parent / "datasets"),  # the embedded pairs, for all test files
    JAX_COMPILATION_CACHE_DIR=str(shared / "programs"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    HF_HUB_OFFLINE="1",
    PYTHONPATH=str(REPOSITORY),
  )
  overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
  arguments = [f"--config={REPOSITORY / 'configs' / recipe}", *overrides, f"--workdir={folder}"]
  return [sys.executable, "-m", "jaxpref.main", *arguments], environment


def main(shared, recipe, folder, **fields):
  arguments, environment = command(shared, recipe, folder, **fields)
  done = subprocess.run(arguments, env=environment, cwd=shared, capture_output=True, text=True, timeout=570)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stderr


DPO = {
  "model": "random:one-level",
  "judge": "random:one-level",
  "num_steps": 10,
  "batch_size": 2,
  "lora__rank": 2,
  "logging__every": 1,
  "checkpoint__every": 2,
  "sample__every": 5,
  "sample__num_prompts": 2,
  "optimizer__warmup_steps": 2,
  "optimizer__learning_rate": 1e-3,
  "evaluation__num_prompts": 2,
  "evaluation__seeds_per_prompt": 2,
  "evaluation__num_inference_steps": 2,
  "evaluation__batch_size": 4,
}


@pytest.fixture(scope="module")
def whole(shared):
  """An uninterrupted run of Diffusion-DPO on embedded pairs, and what it said."""
  return shared / "whole", main(shared, "dpo_tiny.py", shared / "whole", **DPO)


def test_a_run_leaves_everything_a_user_needs(whole):
  folder, said = whole
  names = {p.name for p in folder.iterdir()}
  assert names >= {
    "config.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "export",
    "results.json",
    "table.md",
    "before_after.png",
    "curves.png",
    "index.html",
    "commands.txt",
  }
  assert "python -m jaxpref.main --config=" in (folder / "commands.txt").read_text()
  last = said.strip().splitlines()[-3:]
  assert last[:2] == [f"pictures: {folder / 'before_after.png'}", f"page: {folder / 'index.html'}"]
  of_run = json.loads((folder / "config.json").read_text())["evaluation"]["guidance_scale"]
  assert last[2].startswith(f"next: python -m jaxpref.sample --model={folder} --guidance_scale={of_run:g} --prompt=")
  page = (folder / "index.html").read_text()
  assert page.count("data:image/") == 4 and page.count('class="curve"') >= 6  # before_after.png, and three looks
  assert json.loads((folder / "config.json").read_text())["lora"]["rank"] == 2
  found = metrics.read(folder / "metrics.jsonl")
  looks = [r for r in found if "validation_preferred_share" in r]
  assert [r["step"] for r in looks] == [0, 5, 10]  # of fixed prompts and noise, from the base model on
  assert all(0 <= r[f"validation_{name}"] <= 1 for r in looks for name in ("preferred_share", "caption_accuracy"))
  assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step_{s:06d}.png" for s in (0, 5, 10)]
  found = [r for r in found if "loss" in r]
  assert [r["step"] for r in found] == list(range(1, 11))
  assert abs(found[0]["loss"] - math.log(2)) < 1e-3  # policy and reference still agree
  assert found[-1]["loss"] != found[0]["loss"]
  assert {"implicit_accuracy", "margin", "grad_norm", "valid_pairs", "images_per_second"} <= set(found[0])
  assert any(f.stat().st_size > 0 for f in (folder / "tensorboard").iterdir())
  assert sorted(states(folder)) == [8, 10]
  results = json.loads((folder / "results.json").read_text())
  low, high = results["win_rate_interval"]
  assert 0 <= low <= results["win_rate"] <= high <= 1
  for model in ("base", "aligned"):
    assert 0 <= results[model]["caption_accuracy"]["mean"] <= 1
  assert results["table"] in said and "win rate" in (folder / "table.md").read_text()


def test_the_exported_model_is_the_base_with_the_adapter_merged(whole):
  folder, _ = whole
  base = pipelines.random_pipeline("one-level", 0)
  found = pipelines.load_pipeline(folder / "export")
  adapter = checkpoint.load_params(folder)[0]["unet_lora"]
  half = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), tree)  # noqa: E731
  merged = half(lora.merge_lora(base.params["unet"], adapter, 1.0))
  jax.tree.map(np.testing.assert_array_equal, half(found.params["unet"]), merged)
  untouched = jax.tree.leaves(half(base.params["unet"]))
  assert not all(map(np.array_equal, jax.tree.leaves(merged), untouched))  # it has learnt something
  assert found.unet.config == base.unet.config
  moved = {}
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(base.params), jax.tree.leaves(found.params), strict=True):
    name = "/".join(k.key for k in path)
    moved[name] = float(np.abs(a - b).max() / np.abs(a).max().clip(1e-6))
  adapted = [n for n in moved if "to_q/kernel" in n]
  rest = [n for n in moved if "/to_" not in n]
  assert adapted and max(moved[n] for n in rest) < 1e-3  # half precision
  assert np.isfinite(list(moved.values())).all()


def test_a_killed_run_ends_bit_identical(tmp_path, monkeypatch):
  """SIGKILL once the first checkpoint is on disk; then the same config again. On an objective that compiles at once."""
  fields = {"num_steps": 24, "batch_size": 8, "checkpoint.every": 2, "logging.every": 1, "sample.every": 0}
  arguments, environment = command(tmp_path, "dpo_tiny.py", tmp_path / "killed", **fields)
  arguments[arguments.index("jaxpref.main")] = "tests.toy_run"
  with open(tmp_path / "log", "w") as log:
    process = subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    killed_at_first_checkpoint(process, tmp_path / "killed", tmp_path / "log")
  assert len(rows(tmp_path / "killed")) < 24
  make_mesh = loop.sharding.make_mesh
  monkeypatch.setattr(loop.sharding, "make_mesh", lambda *_, **__: make_mesh(devices=jax.devices()[:1]))
  monkeypatch.setattr(build, "build", toy_run.toy)
  for name in ("killed", "whole"):
    c = dpo_tiny.get_config()
    c.update_from_flattened_dict(fields)
    loop.run(config.typed(c), str(tmp_path / name))
  assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 25))
  assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
  assert states(tmp_path / "killed") == states(tmp_path / "whole")
  assert (tmp_path / "killed" / "export").read_bytes() == (tmp_path / "whole" / "export").read_bytes()


def killed_at_first_checkpoint(process, folder, log):
  deadline = time.time() + 500
  while not (folder / "checkpoints" / "2").exists() and process.poll() is None:
    assert time.time() < deadline
    time.sleep(0.01)
  process.kill()
  assert process.wait() == -signal.SIGKILL, log.read_text()[-3000:]
  assert not (folder / "export").exists()


@pytest.mark.slow  # the loop is that of the test above, and sd3_run_test.py resumes a network bit by bit
def test_a_killed_run_of_networks_ends_bit_identical(whole, shared):
  """By the command line alone."""
  folder = shared / "killed"
  arguments, environment = command(shared, "dpo_tiny.py", folder, **DPO)
  with open(shared / "killed.log", "w") as log:
    process = subprocess.Popen(arguments, env=environment, cwd=shared, stdout=log, stderr=log)
    killed_at_first_checkpoint(process, folder, shared / "killed.log")
  assert len(rows(folder)) < 10
  said = main(shared, "dpo_tiny.py", folder, **DPO)
  assert "resuming" in said
  assert states(folder) == states(whole[0])
  assert rows(folder) == rows(whole[0])
  assert (folder / "table.md").read_text() == (whole[0] / "table.md").read_text()
  name = "unet/diffusion_pytorch_model.safetensors"
  assert (folder / "export" / name).read_bytes() == (whole[0] / "export" / name).read_bytes()


SPO = {
  "model": "random:one-level",
  "preference_model": "random:one-level",
  "judge": "",
  "num_steps": 2,
  "batch_size": 2,
  "lora__rank": 2,
  "logging__every": 1,
  "checkpoint__every": 2,
  "sample__every": 2,
  "sample__num_prompts": 2,
  "evaluation__num_inference_steps": 2,
  "spo__num_inference_steps": 4,
  "spo__warmup_steps": 1,
  "spo__pool_size": 2,
  "spo__minibatch": 2,
  "spo__threshold": 0.0,
}


@pytest.mark.slow  # numbers_test.py makes a run of SPO in its process
def test_spo_runs_from_the_command_line(shared):
  folder = shared / "spo"
  said = main(shared, "spo_tiny.py", folder, **SPO)
  found = metrics.read(folder / "metrics.jsonl")
  looks = [r for r in found if "validation_reward" in r]
  assert [r["step"] for r in looks] == [0, 2] and looks[0]["validation_reward"] != looks[1]["validation_reward"]
  assert set(looks[0]) == {"step", "time", "validation_reward"}  # there is no judge
  found = [r for r in found if "loss" in r]
  assert [r["step"] for r in found] == [1, 2]
  assert abs(found[0]["loss"] - math.log(2)) < 0.05
  assert found[0]["valid_pairs"] == 1.0 and found[0]["updates"] == 2
  assert {"reward", "reward_group_00", "reward_group_01", "score_gap", "margin"} <= set(found[0])
  assert list(states(folder)) == [2]
  assert pipelines.load_pipeline(folder / "export").unet.config.sample_size == 8
  assert "exported" in said and not (folder / "results.json").exists()
