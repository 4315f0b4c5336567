"""The step in PyTorch that jaxpref's speed is compared with is the same step, and the check sees when it is not."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxpref.models import presets
from jaxpref.models.unet import UNetConfig
from jaxpref.models.vae import VAEConfig
from scripts.bench import bench, bench_torch
from scripts.parity import torch_check, torch_steps
from tests import decisions

# Networks of one level, which compile in seconds.
SMALL = dataclasses.replace(
  presets.SD15_MINIATURE,
  unet=UNetConfig(
    sample_size=4,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    block_out_channels=(8,),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=4,
  ),
  # Images of 4 x 4 pixels, which the preference model wants larger.
  vae=VAEConfig(sample_size=4, block_out_channels=(4,), norm_num_groups=2, up_block_types=("UpDecoderBlock2D",)),
  text_encoder=dataclasses.replace(
    presets.SD15_MINIATURE.text_encoder, hidden_size=16, intermediate_size=32, num_hidden_layers=1
  ),
)


def small_recipe(case, **fields):
  config = torch_check.check_recipe(case, "sd15")
  config.remat = "none"
  config.spo.update(num_inference_steps=6, warmup_steps=2, pool_size=3, inner_steps=1)
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory):
  """case -> jaxpref's step and a folder with what it started from; each is computed once."""
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  pytest.importorskip("peft")
  known = {}

  def get(case):
    if case not in known:
      folder = tmp_path_factory.mktemp(case)
      with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "sd15-miniature", SMALL)
        known[case] = torch_check.jax_outcome(case, "sd15", folder, small_recipe(case)), folder
    return known[case]

  return get


def compared(outcome_of, case, **fields):
  """What is different, by `disagreements`, between jaxpref's step and PyTorch's with other fields."""
  ours, folder = outcome_of(case)
  theirs = torch_check.torch_outcome(case, "sd15", folder, small_recipe(case, **fields))
  found = torch_check.differences(ours, theirs)
  return found, torch_check.disagreements(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dpo-lora", "spo-full"])
def test_both_compute_the_same_step(outcome_of, case):
  found, bad = compared(outcome_of, case)
  assert not bad
  assert found["loss"] < 1e-4 and found["update"] < 1e-4
  ours, _ = outcome_of(case)
  assert abs(ours.loss - np.log(2)) > 1e-5  # the policy is not its reference
  assert sum(np.any(v) for v in ours.change.values()) > 0.9 * len(ours.change)
  if case == "spo-full":
    assert ours.pairs[2].shape == (2, 2) and ours.pairs[2].all()
    for scores in (ours.scores, -ours.scores):
      decisions.argmax(scores, margin=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["sd15", "smoke"])
@pytest.mark.parametrize("case", bench_torch.CASES)
def test_the_published_topologies_compute_the_same_step(case, size):
  pytest.importorskip("torch")
  assert not torch_check.check(case, size)


@pytest.mark.slow
@pytest.mark.parametrize(
  "case, field, value, seen",
  [
    ("dpo-lora", "loss.beta", 550.0, {"loss", "grad_norm"}),
    ("dpo-lora", "lora.alpha", 5.0, {"loss", "grad_norm"}),
    ("spo-full", "loss.beta", 11.0, {"grad_norm"}),
    ("spo-full", "spo.guidance_scale", 6.5, {"scores", "update"}),
  ],
)
def test_another_field_is_seen(outcome_of, case, field, value, seen):
  """Gradients are clipped to a norm of 1, so what only scales them is not seen in the update."""
  assert seen <= set(compared(outcome_of, case, **{field: value})[1])


@pytest.mark.slow
def test_a_swapped_winner_is_seen(outcome_of, monkeypatch):
  load = torch_steps.load_batch

  def swapped(*args):
    batch, empty_ids = load(*args)
    winner, loser = batch["winner"].clone(), batch["loser"].clone()
    winner[0], loser[0] = batch["loser"][0], batch["winner"][0]
    return batch | {"winner": winner, "loser": loser}, empty_ids

  monkeypatch.setattr(torch_steps, "load_batch", swapped)
  assert {"loss", "update"} <= set(compared(outcome_of, "dpo-lora")[1])


@pytest.mark.slow
def test_a_swapped_pair_is_seen(outcome_of, monkeypatch):
  select = torch_steps.select_pair

  def swapped(scores, threshold):
    winner, loser, valid = select(scores, threshold)
    return loser, winner, valid

  monkeypatch.setattr(torch_steps, "select_pair", swapped)
  assert {"other_pairs", "update"} <= set(compared(outcome_of, "spo-full")[1])


@pytest.mark.parametrize("size, shared, separate, updates", [("sd15", 160, 0, 4), ("sdxl", 8, 24, 2)])
def test_as_many_updates_as_jaxpref(size, shared, separate, updates):
  """The recipes' minibatches: 40 transitions (SD1.5), 4 and 12 (SDXL)."""
  config = bench.recipe("spo-lora", size, None)
  config.batch_size = bench.BATCH[size]["spo"]
  assert torch_steps.num_updates(config, shared, separate) == updates
  if size == "sd15":
    config.spo.update(pool_last_step=False, minibatch=37)  # and 3 that start apart
    assert torch_steps.num_updates(config, 150, 10) == 5


def test_drawn_networks_are_timed_without_files_of_weights(tmp_path):
  pytest.importorskip("torch")
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(presets.PRESETS, "sdxl-miniature", SMALL)
    bench_torch.prepare(tmp_path, ["dpo-lora"], "smoke", 2, "float32", drawn=True)
    assert not [*tmp_path.rglob("*.safetensors")]
    seen = []
    watch = lambda row: seen.append(len(row["seconds"]))
    options = {"mode": "eager", "dtype": "float32", "drawn": True, "watch": watch, "deadline": 0.0}
    row = bench_torch.measure("dpo-lora", "smoke", 2, 4, tmp_path, **options)
  assert len(row["seconds"]) == 3 and seen == [1, 2, 3, 3]  # the time was up
  assert row["trained_parameters"] > 0 and np.isfinite(row["seconds_a_step"])


def test_drawn_networks_of_spo_are_refused(capsys):
  with pytest.raises(SystemExit):
    bench_torch.main(["--drawn", "--cases", "spo-lora"])
  assert "--drawn: spo-lora needs the file of a preference model" in capsys.readouterr().err


# ---- The scripts that run both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["bench_vs_torch.sh", "bench_gpu.sh", "accelerator.sh"])
def test_shellcheck_finds_nothing_in_the_scripts(script):
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  done = subprocess.run([shellcheck, bench_torch.ROOT / "scripts" / "bench" / script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# Stands in for Python: writes the rows that a timing writes, or fails, and makes the tables as it is.
TIMES = """
import json, pathlib, sys
calls = pathlib.Path(__file__).with_name("calls.txt")
script, *rest = sys.argv[1:]
if "--table" in rest or "--compare" in rest:
  sys.argv = [script, *rest]
  sys.path.insert(0, ".")
  from scripts.bench import bench, bench_torch
  (bench if script.endswith("bench.py") else bench_torch).main(rest)
  sys.exit()
options = {a: b for a, b in zip(rest, rest[1:])}
if script.endswith("accelerator.py"):
  calls.open("a").write(f"{rest[0]}\\n")
  sys.exit()
torch, check = script.endswith("bench_torch.py"), script.endswith("torch_check.py")
case = options["--cases"]
calls.open("a").write(f"{'torch check' if check else 'torch' if torch else 'jax'} {case}\\n")
if check:
  sys.exit()
rows = json.loads(calls.with_name("rows.json").read_text())
row = rows["torch" if torch else "jax"] | {"case": case, "size": options["--size"]}
row |= {"mode": options.get("--mode")} if torch else {}
failed = case == "spm" or options["--size"] == "tiny" and options.get("--mode") == "compile"
failed = failed and not calls.with_name("all_works").exists()
pathlib.Path(options["--out"] + ".json").write_text(json.dumps([row | ({"error": "no memory"} if failed else {})]))
pathlib.Path(options["--out"] + ".md").write_text("table")
sys.exit(failed)
"""


def test_one_command_makes_the_tables_and_goes_on_where_it_was(tmp_path):
  speed = {"spread": 0.1, "items_per_second": 8.0, "tflop_a_step": 1.0, "tflop_per_second": 1.0, "share_of_peak": 0.5}
  speed |= {"compile_seconds": 9.0, "matrix_peak_tflop_per_second": 2.0, "matrix_peak_dtype": "bfloat16"}
  speed |= {"compiled_bytes": 2**30, "peak_before_gib": 1.0}
  (tmp_path / "rows.json").write_text(json.dumps({"jax": row(1.0) | speed, "torch": row(2.5, **TORCH)}))
  (tmp_path / "times.py").write_text(TIMES)
  (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/times.py" "$@"\n')
  (tmp_path / "python").chmod(0o755)
  environment = os.environ | {"PYTHON": str(tmp_path / "python"), "SIZES": "smoke tiny", "CASES": "dpo-lora spm"}
  environment |= {"ROUNDS": "2"}

  def run():
    command = ["bash", str(bench_torch.ROOT / "scripts" / "bench" / "bench_gpu.sh"), str(tmp_path / "out")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)

  done = run()
  assert done.returncode == 1 and "error: smoke spm,tiny dpo-lora,tiny spm failed, see above" in done.stderr
  calls = (tmp_path / "calls.txt").read_text().splitlines()
  turns = ["torch check dpo-lora", *2 * ["jax dpo-lora", "torch dpo-lora", "torch dpo-lora"]]
  assert calls == ["proof", *2 * [*turns, "jax spm"]]
  # What the other side's failure leaves is in the table of speeds.
  table = (tmp_path / "out" / "bench.md").read_text()
  assert all(table.count(f"| dpo-lora {size} |") == 1 for size in ("smoke", "tiny")) and "spm" not in table
  table = (tmp_path / "out" / "vs_torch.md").read_text()
  assert table.count("| dpo-lora smoke") == 2 and "tiny" not in table
  assert "| 2.50 (2.50 to 2.50, 2 x 2 runs) |" in table
  (tmp_path / "all_works").touch()
  done = run()
  assert done.returncode == 0, done.stderr
  again = ["proof", "jax spm", "torch check dpo-lora", "torch dpo-lora", "torch dpo-lora", "jax spm"]
  assert (tmp_path / "calls.txt").read_text().splitlines()[len(calls) :] == again
  assert "| spm tiny |" in (tmp_path / "out" / "bench.md").read_text()
  assert (tmp_path / "out" / "vs_torch.md").read_text().count("| dpo-lora tiny") == 2


# ---- The table -------------------------------------------------------------------------------------------------------


def row(seconds, **fields):
  ours = {"case": "spo-lora", "size": "tiny", "batch": 8, "dtype": "float32", "remat": "none", "rank": 4}
  measured = {"seconds": [seconds] * 3, "seconds_a_step": seconds, "memory_is": "measured", "peak_memory_gib": 2.0}
  counts = {"transitions": 128, "updates": 7.0, "trained_parameters": 10, "rollout_calls_a_prompt": 65}
  return ours | measured | counts | {"devices": "1 x GPU", "versions": {"jax": "1"}} | fields


TORCH = {"mode": "eager", "versions": {"torch": "2"}, "updates": 7}


def write(folder, *rows):
  files = []
  for i, content in enumerate(rows):
    files.append(folder / f"{i}.json")
    files[-1].write_text(json.dumps([content]))
  return files


def test_the_table_has_ratio_and_spread(tmp_path):
  files = write(tmp_path, row(1.0), row(2.0, **TORCH), row(1.25), row(3.0, **TORCH))
  text = bench_torch.compare(files)
  assert "| spo-lora tiny, eager | 8 | float32 | 1.12 | 2.5 | 2.22 (1.60 to 3.00, 2 x 2 runs) | 2.00, 2.00 |" in text
  assert "128 transitions in 7 updates" in text and "jax 1, torch 2" in text


@pytest.mark.parametrize("field, value", [("batch", 4), ("dtype", "bfloat16"), ("transitions", 127), ("updates", 6)])
def test_unlike_runs_are_not_compared(tmp_path, field, value):
  files = write(tmp_path, row(1.0), row(2.0, **(TORCH | {field: value})))
  with pytest.raises(SystemExit, match=re.escape(f"error: spo-lora tiny: {field} is")):
    bench_torch.compare(files)
  with pytest.raises(SystemExit, match="by one of the two alone"):
    bench_torch.compare(files[:1])
