"""Times the training steps of scripts/bench.py in PyTorch, written as the published implementations write them.

    python scripts/bench_torch.py --size sd15 --cases dpo-lora dpo-full spo-lora spo-full --out runs/bench_sd15_torch
    python scripts/bench_torch.py --size sd15 --mode compile --out runs/bench_sd15_compile
    python scripts/bench_torch.py --check --size sd15
    python scripts/bench_torch.py --compare runs/bench_sd15.json runs/bench_sd15_torch.json

The first two write OUT.json and OUT.md with the fields of bench.py. Both take the recipes of configs/ in the same way
and start from the same files: jaxpref writes its weights as a diffusers folder, which diffusers opens; a process that
times PyTorch does not compute with JAX. `--check` shows that both compute the same step, `--compare` makes the table of
the two (scripts/bench_vs_torch.sh does all of it). One device; needs torch, diffusers, transformers and peft.

What is done how is said at the top of scripts/torch_steps.py. Memory is the peak of what PyTorch allocated while it was
timed (CUDA) or of what the process had resident (CPU).
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))

from scripts import bench, torch_steps  # noqa: E402

CASES = ("dpo-lora", "dpo-full", "spo-lora", "spo-full")
MODES = ("eager", "compile")
# Largest relative differences that --check accepts, in float32.
BOUNDS = {"loss": 1e-3, "grad_norm": 1e-3, "scores": 1e-3, "update": 1e-2}


# ---- The models, as files --------------------------------------------------------------------------------------------


def save_models(folder: pathlib.Path, config: Any, pipe: Any, scorer: Any = None, policy: Any = None) -> None:
  """Writes what a case starts from: `pipeline`, and `preference` and `torch_steps.policy_file` where it needs them.

  Args:
    pipe: a `jaxpref.weights.Pipeline`.
    scorer: SPO's preference model and its parameters.
    policy: trained parameters by component; by default those that training starts from.
  """
  import jax.numpy as jnp

  from jaxpref import build, lora_files, tensor_files, weights

  if not (folder / "pipeline").is_dir():
    weights.save_pipeline(folder / "pipeline", pipe)
  trained = folder / torch_steps.policy_file(config)
  if config.lora.rank:
    adapter = policy["unet_lora"] if policy else build.initial_adapter(config, pipe.unet.config, pipe.params["unet"])
    lora_files.save_diffusers(trained, adapter, build.adapter_scale(config, config.lora.rank))
  elif policy:
    tensor_files.save_tree(trained, policy["unet"])
  if scorer and not (folder / "preference").is_dir():
    # In the precision in which both sides keep its parameters.
    weights.save_preference_model(folder / "preference", *scorer, dtype=jnp.dtype(config.dtype))


def save_inputs(file: pathlib.Path, batch: Mapping[str, Any], empty_ids: Any) -> None:
  """Writes one batch as jaxpref's data pipeline gives it."""
  arrays: dict[str, Any] = {k: np.asarray(v) for k, v in batch.items()}
  np.savez(file, **arrays, empty_ids=np.asarray(empty_ids))


def prepare(folder: pathlib.Path, cases: Sequence[str], size: str, batch: int | None, dtype: str | None) -> None:
  """Writes models and one batch of each case into a folder; run where JAX has no accelerator."""
  from jaxpref import loading

  pipe = scorer = None
  for case in cases:
    config = recipe(case, size, batch, dtype)
    pipe = pipe or loading.load_text_to_image(config.model, dtype="float32", seed=config.seed)
    if config.objective == "spo":
      scorer = scorer or loading.load_scorer(config.preference_model, dtype="float32", seed=config.seed)
    save_models(folder, config, pipe, scorer)
    experiment = bench.build_on_shapes(config)
    assert experiment.tokenize is not None
    save_inputs(folder / f"{case}.npz", next(experiment.batches()), experiment.tokenize([""]))


def recipe(case: str, size: str, batch: int | None, dtype: str | None) -> Any:
  """The config of a case on one device."""
  import jax

  config = bench.recipe(case, size, batch, dtype=dtype)
  if size != "smoke" or batch:
    config.batch_size //= jax.device_count()
  return config


# ---- The clock -------------------------------------------------------------------------------------------------------


def measure(
  case: str,
  size: str,
  batch_size: int | None,
  steps: int,
  folder: pathlib.Path,
  *,
  mode: str,
  dtype: str | None,
  layout: str = "auto",
  vae_slicing: bool = False,
  micro_batch: int | None = None,
) -> dict[str, Any]:
  """One row of OUT.json, from what `prepare` wrote into the folder."""
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.benchmark = True
  config = recipe(case, size, batch_size, dtype)
  batch, empty_ids = torch_steps.load_batch(folder / f"{case}.npz", device)
  models = torch_steps.load_models(folder, config, device=device, empty_ids=empty_ids)
  if micro_batch:
    batch["micro_batch"] = micro_batch
  if vae_slicing:
    models.vae.enable_slicing()
  if layout == "auto":
    layout = faster_layout(models, config) if device == "cuda" else "contiguous"
  set_layout(models, layout)
  if mode == "compile":
    models = compiled(models)
  parameters = [p for p in models.unet.parameters() if p.requires_grad]
  optimizer = torch_steps.make_optimizer(config, parameters)
  draws = torch_steps.random_draws(device, len(models.alphas_cumprod))
  step = torch_steps.STEPS[config.objective]

  def run() -> tuple[float, dict[str, int]]:
    started = time.perf_counter()
    counts = step(models, config, optimizer, batch, draws).counts
    if device == "cuda":
      torch.cuda.synchronize()
    return time.perf_counter() - started, counts

  warm_up = sum(run()[0] for _ in range(2 if mode == "compile" else 1))
  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  timed = [run() for _ in range(steps)]
  seconds = [s for s, _ in timed]
  median = float(np.median(seconds))
  memory = torch.cuda.max_memory_allocated() if device == "cuda" else bench.resident_bytes()
  return {
    "case": case,
    "size": size,
    "mode": mode,
    "batch": config.batch_size,
    "dtype": config.dtype,
    "remat": config.remat,
    "rank": config.lora.rank,
    "optimizer": config.optimizer.name,
    "layout": layout,
    "vae_slicing": vae_slicing,
    "seconds": [round(s, 4) for s in seconds],
    "seconds_a_step": median,
    "spread": float((np.max(seconds) - np.min(seconds)) / median),
    "items_per_second": config.batch_size / median,
    "peak_memory_gib": memory / 2**30,
    "memory_is": "measured" if device == "cuda" else "resident",
    "resident_gib": bench.resident_bytes() / 2**30,
    "compile_seconds": warm_up,
    "trained_parameters": sum(p.numel() for p in parameters),
    **timed[-1][1],
    "devices": f"1 x {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}",
    "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    | {"python": platform.python_version()},
  }


def set_layout(models: torch_steps.Models, layout: str) -> None:
  """Of the convolutions' weights, which their inputs follow."""
  import torch

  form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  for network in (models.unet, models.reference, models.vae):
    if network is not None:
      network.to(memory_format=form)


def faster_layout(models: torch_steps.Models, config: Any) -> str:
  """Of the two the one in which forward and backward pass of the UNet are faster, at the batch of a DPO pair step."""
  import torch

  size = models.unet.config.sample_size
  rows = 2 * config.batch_size
  x = torch.randn(rows, models.unet.config.in_channels, size, size, device=models.alphas_cumprod.device)
  t = torch.full((rows,), 500, device=x.device)
  cond = {k: v.expand(rows, *v.shape[1:]) for k, v in models.empty.items()}
  seconds: dict[str, float] = {}
  for layout in ("contiguous", "channels_last"):
    set_layout(models, layout)
    for trial in range(4):
      torch.cuda.synchronize()
      started = time.perf_counter()
      with models.autocast():
        torch_steps.predict(models.unet, x, t, cond).sum().backward()
      torch.cuda.synchronize()
      if trial:  # the first chooses kernels
        seconds[layout] = min(time.perf_counter() - started, seconds.get(layout, math.inf))
    models.unet.zero_grad()
  return min(seconds, key=seconds.__getitem__)


def compiled(models: torch_steps.Models) -> torch_steps.Models:
  """The same networks under torch.compile."""
  import torch

  torch._dynamo.config.recompile_limit = 64  # rollout and updates have batches of several sizes
  networks = [models.unet, models.vae.encoder, models.vae.decoder, *models.encoders]
  for network in networks if models.reference is None else [*networks, models.reference]:
    network.compile(dynamic=False)
  if models.scorer is None:
    return models
  scores, text_embeds = (torch.compile(f, dynamic=False) for f in models.scorer)
  return models._replace(scorer=(scores, text_embeds))


# ---- That both compute the same --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
  """One step of a case, of either framework.

  Attributes:
    loss, grad_norm: of its one update.
    change: what the update added to each trained parameter, by name and in the layout of PyTorch.
    scores: of SPO: f32[G,B,k].
    pairs: of SPO: winner, loser and valid, each [G,B].
  """

  loss: float
  grad_norm: float
  change: dict[str, np.ndarray]
  scores: np.ndarray | None = None
  pairs: tuple[np.ndarray, ...] | None = None


def check_recipe(case: str, size: str) -> Any:
  """A case on a miniature of the size's topology (tiny: on tiny-sd itself), made to be compared.

  Float32, one update with all transitions, and SGD of rate 1: the update is the clipped gradient. AdamW's first step is
  nearly the sign of each entry of the gradient, so that it would show rounding of the smallest ones.
  """
  config = bench.recipe(case, size, None, dtype="float32", miniature=True)
  config.batch_size = 4 if config.objective == "dpo" else 2
  config.optimizer.update(name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, b1=0.0, weight_decay=0.0)
  config.spo.minibatch = sys.maxsize
  if config.objective == "dpo":
    config.accumulation = 1
    config.loss.beta = 500.0  # 5000 makes of one rounding of an error a change of the logit by 3e-4
  return config


def check_batch(config: Any, experiment: Any) -> dict[str, np.ndarray]:
  """Prompts and, for Diffusion-DPO, pairs of noise of which each image wins in some; for SDXL of different sizes."""
  rng, size = np.random.default_rng(2), config.batch_size
  batch = {"input_ids": np.asarray(experiment.tokenize(["a red apple", "cat", "two dogs", ""][:size]))}
  if config.objective == "dpo":
    side = experiment.model.image_size
    for i in (0, 1):
      batch[f"pixels_{i}"] = rng.integers(0, 256, (size, side, side, 3), np.uint8)
      if experiment.model.text_encoder_2 is not None:
        batch[f"time_ids_{i}"] = rng.integers(0, 1024, (size, 6)).astype(np.float32)
    batch["label_0"] = np.arange(size, dtype=np.float32) % 2
  return batch


def fixed_noise(shape: Sequence[int]) -> np.ndarray:
  """One array of normal numbers f32[...] in the place of all noise of that shape."""
  return np.resize(np.random.default_rng(0).standard_normal(2**16 + 1, np.float32), shape)


def fixed_members(n: int, k: int) -> np.ndarray:
  """The candidates to continue from, in the place of random ones."""
  return np.arange(n, dtype=np.int32) % k


@contextlib.contextmanager
def fixed_jax_draws() -> Iterator[None]:
  """While a step is traced: no noise and no member of a pool is random."""
  import jax
  import jax.numpy as jnp

  normal = lambda key, shape=(), dtype=jnp.float32: jnp.asarray(fixed_noise(shape), dtype)
  randint = lambda key, shape, minval, maxval: jnp.asarray(fixed_members(shape[0], maxval))
  with mock.patch.object(jax.random, "normal", normal), mock.patch.object(jax.random, "randint", randint):
    yield


def perturbed(tree: Any, scale: float) -> Any:
  """Parameters f32 moved at random: each array by `scale` times its root mean square, or of 1 where it is zero."""
  import jax

  rng = np.random.default_rng(1)

  def move(x):
    x = np.asarray(x, np.float32)
    size = float(np.sqrt(np.mean(x**2))) or 1.0
    return x + np.float32(scale * size) * rng.standard_normal(x.shape, np.float32)

  return jax.tree.map(move, tree)


# How far the policy is moved away from its reference, so that no loss is log 2 and few ratios are clipped.
MOVED = 3e-3


def jax_outcome(case: str, size: str, folder: pathlib.Path, config: Any | None = None) -> Outcome:
  """jaxpref's own step; writes what it starts from into the folder: models, and CASE.npz with the timesteps as well."""
  import jax
  import safetensors.numpy

  from jaxpref import build, loading, lora_files, rollout, step, tensor_files, train

  config = check_recipe(case, size) if config is None else config
  experiment = build.build(config)
  params = perturbed(experiment.params, MOVED)
  frozen, ref_params = dict(experiment.frozen), experiment.params
  if "spm" in frozen and config.preference_model.startswith("random:"):
    frozen["spm"] = perturbed(frozen["spm"], 0.1)  # a fresh one does not know the time
  # The modules alone; the parameters are the experiment's.
  weights = {**frozen, **ref_params}
  pipe = loading.load_text_to_image(config.model.replace("random:", "zeros:"), dtype="float32")
  pipe = dataclasses.replace(pipe, params={name: weights[name] for name in pipe.params})
  scorer = None
  if "spm" in frozen:
    name = config.preference_model.replace("random:", "zeros:")
    scorer = (loading.load_scorer(name, dtype="float32")[0], frozen["spm"])
  save_models(folder, config, pipe, scorer, params)
  batch = check_batch(config, experiment)
  assert experiment.tokenize is not None
  extra = {}
  optimizer, _ = train.make_optimizer(config)
  if experiment.objective is not None:
    step_fn = step.offline_step(experiment.objective, optimizer, seed=config.seed)
    extra["timesteps"] = step.timesteps(experiment.objective, config.batch_size, seed=config.seed, step=0)
  else:
    assert experiment.online_step is not None
    step_fn = experiment.online_step(optimizer)
  save_inputs(folder / f"{case}.npz", batch | extra, experiment.tokenize([""]))

  seen: list[Any] = []

  def watched(*args, **kwargs):
    pairs = pool_rollout(*args, **kwargs)
    jax.debug.callback(seen.append, (pairs.scores, pairs.shared.valid))
    return pairs

  pool_rollout = rollout.pool_rollout
  state = step.initial_state(params, ref_params, optimizer.init(params))
  with fixed_jax_draws(), mock.patch.object(rollout, "pool_rollout", watched):
    run = jax.jit(step_fn).lower(state, frozen, batch).compile()
  after, metrics = jax.block_until_ready(run(state, frozen, batch))
  jax.effects_barrier()
  change = jax.tree.map(lambda a, b: np.asarray(a, np.float32) - b, after.params, params)
  if "unet_lora" in change:
    lora_files.save_diffusers(folder / "change.safetensors", change["unet_lora"], 1.0)
  else:
    tensor_files.save_tree(folder / "change.safetensors", change["unet"])
  arrays = safetensors.numpy.load_file(folder / "change.safetensors")
  if "unet_lora" in change:
    arrays = {torch_steps.torch_name(name): value for name, value in arrays.items()}
  scores = pairs = None
  if seen:
    scores, valid = (np.asarray(v).swapaxes(0, 1) for v in seen[0])
    pairs = (scores.argmax(-1), scores.argmin(-1), valid)
  return Outcome(float(metrics["loss"]), float(metrics["grad_norm"]), arrays, scores, pairs)


def torch_outcome(case: str, size: str, folder: pathlib.Path, config: Any | None = None) -> Outcome:
  """The same step in PyTorch, from what `jax_outcome` wrote."""
  import torch

  config = check_recipe(case, size) if config is None else config
  batch, empty_ids = torch_steps.load_batch(folder / f"{case}.npz", "cpu")
  models = torch_steps.load_models(folder, config, device="cpu", empty_ids=empty_ids)
  with np.load(folder / f"{case}.npz") as arrays:
    timesteps = torch.from_numpy(arrays["timesteps"]).long() if "timesteps" in arrays else None

  def normal(rows, shape):
    channels, height, width = shape
    return torch.from_numpy(fixed_noise((rows, height, width, channels))).permute(0, 3, 1, 2)

  draws = torch_steps.Draws(
    normal=normal,
    timesteps=lambda n: timesteps,
    members=lambda n, k: torch.from_numpy(fixed_members(n, k)).long(),
    order=torch.arange,
  )
  trained = {n: p for n, p in models.unet.named_parameters() if p.requires_grad}
  before = {n: p.detach().clone() for n, p in trained.items()}
  optimizer = torch_steps.make_optimizer(config, list(trained.values()))
  found = torch_steps.STEPS[config.objective](models, config, optimizer, batch, draws)
  assert found.counts.get("updates", 1) == 1
  change = {n: (p.detach() - before[n]).numpy() for n, p in trained.items()}
  scores = pairs = None
  if found.scores is not None:
    scores, pairs = found.scores.numpy(), tuple(v.numpy() for v in found.pairs)
  return Outcome(float(found.loss), float(found.grad_norm), change, scores, pairs)


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
  """Relative differences of loss, gradient norm, scores and update, and the share of pairs that are not the same."""
  relative = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a))
  if ours.change.keys() != theirs.change.keys():
    raise SystemExit(f"error: the two train other parameters: {sorted(ours.change.keys() ^ theirs.change.keys())[:4]}.")
  names = sorted(ours.change)
  flat = [np.concatenate([o.change[n].ravel() for n in names]).astype(np.float64) for o in (ours, theirs)]
  found = {
    "loss": relative(np.float64(ours.loss), theirs.loss),
    "grad_norm": relative(np.float64(ours.grad_norm), theirs.grad_norm),
    "update": relative(*flat),
  }
  if ours.scores is not None and ours.pairs is not None and theirs.pairs is not None:
    found["scores"] = relative(ours.scores, theirs.scores)
    same = [np.asarray(a == b) for a, b in zip(ours.pairs, theirs.pairs, strict=True)]
    found["other_pairs"] = 1.0 - float(np.mean(np.all(same, axis=0)))
  return found


def disagreements(found: Mapping[str, float]) -> list[str]:
  """What of `differences` is above its bound; no pair may be another one."""
  return [name for name, value in found.items() if not value <= BOUNDS.get(name, 0.0)]


def check(case: str, size: str) -> list[str]:
  """Runs both, prints the numbers, and returns what disagrees."""
  with tempfile.TemporaryDirectory() as folder:
    ours = jax_outcome(case, size, pathlib.Path(folder))
    theirs = torch_outcome(case, size, pathlib.Path(folder))
  found = differences(ours, theirs)
  bad = disagreements(found)
  parts = [
    f"loss {ours.loss:.6f} (jaxpref), {theirs.loss:.6f} (torch)",
    *(f"{name.replace('_', ' ')} {value:.1e}" for name, value in found.items()),
  ]
  if ours.pairs is not None:
    parts.append(f"{ours.pairs[2].size} pairs, {int(ours.pairs[2].sum())} of them valid")
  print(f"{case} {size}: {'; '.join(parts)}: {'DIFFERENT: ' + ', '.join(bad) if bad else 'the same'}", flush=True)
  return bad


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Markdown."""
  lines = [
    "| case | mode | batch | dtype | s a step (spread) | rows/s | peak GiB | warm-up s | transitions, updates |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for r in rows:
    name = f"{r['case']} {r['size']} | {r['mode']}"
    if "error" in r:
      lines.append(f"| {name} | | | {r['error']} | | | | |")
      continue
    memory = f"{r['peak_memory_gib']:.2f}{'' if r['memory_is'] == 'measured' else ' (resident)'}"
    work = f"{r['transitions']}, {r['updates']}" if "transitions" in r else ""
    lines.append(
      f"| {name} | {r['batch']} | {r['dtype']} | {r['seconds_a_step']:.3g} ({100 * r['spread']:.0f} %) "
      f"| {r['items_per_second']:.3g} | {memory} | {r['compile_seconds']:.0f} | {work} |"
    )
  good = [r for r in rows if "error" not in r]
  where = sorted({f"{r['devices']}, torch {r['versions']['torch']}, {r['layout']}" for r in good})
  return "\n".join([*lines, "", f"On {'; '.join(where)}."])


def compare(files: Sequence[pathlib.Path]) -> str:
  """The table of all rows of files of bench.py and of this script, rounds of one case pooled.

  The ratio is PyTorch's median of all steps over jaxpref's; in brackets the smallest and the largest ratio of any two
  runs' medians.

  Raises:
    SystemExit: rows of one case are of other batches, precisions or ranks, or only one of the two is there.
  """
  runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
  for file in files:
    for row in json.loads(file.read_text()):
      name = row.get("mode") or "jaxpref"
      if "error" not in row:
        runs.setdefault((row["case"], row["size"]), {}).setdefault(name, []).append(row)
  lines = [
    "| case | batch | dtype | jaxpref s | torch s | torch / jaxpref (of any two runs) | peak GiB: jaxpref, torch |",
    "|---|---|---|---|---|---|---|",
  ]
  notes = []
  for (case, size), sides in runs.items():
    ours = sides.get("jaxpref", [])
    others = {mode: rows for mode, rows in sides.items() if mode != "jaxpref"}
    if not ours or not others:
      raise SystemExit(f"error: {case} {size} was timed by one of the two alone; give files of both.")
    for mode, theirs in others.items():
      for field in ("batch", "dtype", "rank", "remat", "trained_parameters", "updates", "transitions"):
        values = {r[field] for r in [*ours, *theirs] if field in r}
        if field == "updates":
          values = {float(v) for v in values} if "transitions" in theirs[0] else set()
        if len(values) > 1:
          raise SystemExit(f"error: {case} {size}: {field} is {sorted(values)}; time both with the same.")
      median = lambda rows: float(np.median([s for r in rows for s in r["seconds"]]))
      ratios = [b["seconds_a_step"] / a["seconds_a_step"] for a in ours for b in theirs]
      memory = []
      for rows in (ours, theirs):
        kind = "" if rows[0]["memory_is"] == "measured" else " resident"
        value = "peak_memory_gib" if not kind else "resident_gib"
        memory.append(f"{max(r.get(value, math.nan) for r in rows):.2f}{kind}")
      lines.append(
        f"| {case} {size}, {mode} | {ours[0]['batch']} | {ours[0]['dtype']} | {median(ours):.3g} "
        f"| {median(theirs):.3g} | {median(theirs) / median(ours):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
        f"{len(ours)} x {len(theirs)} runs) | {', '.join(memory)} |"
      )
    theirs = next(iter(others.values()))
    if "transitions" in theirs[0]:
      notes.append(
        f"{case} {size}: in an iteration {theirs[0]['transitions']} transitions in {theirs[0]['updates']} updates, and "
        f"{theirs[0]['rollout_calls_a_prompt']} guided calls of the UNet a prompt in the rollout, on both sides."
      )
  versions = sorted(
    {f"jax {r['versions']['jax']}" if "jax" in r["versions"] else f"torch {r['versions']['torch']}"
     for sides in runs.values() for rows in sides.values() for r in rows}
  )  # fmt: skip
  devices = sorted({r["devices"] for sides in runs.values() for rows in sides.values() for r in rows})
  return "\n".join([*lines, "", *notes, f"On {'; '.join(devices)}; {', '.join(versions)}."])


# ---- Command line ----------------------------------------------------------------------------------------------------


def child(options: Sequence[str], *, hidden: bool = False) -> subprocess.CompletedProcess[str]:
  """This script in a process of its own, where JAX does not touch an accelerator.

  Args:
    hidden: PyTorch is not to see one either.
  """
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  if hidden:
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
  command = [sys.executable, str(ROOT / "scripts" / "bench_torch.py"), *options]
  return subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, env=environment)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=("smoke", *bench.BATCH), default="smoke", help="default: %(default)s")
  parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
  parser.add_argument("--mode", choices=MODES, default="eager", help="default: %(default)s")
  parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
  parser.add_argument("--batch", type=int, help="pairs or prompts")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the recipe's")
  parser.add_argument("--layout", choices=("auto", "contiguous", "channels_last"), default="auto")
  parser.add_argument("--micro-batch", type=int, help="spo: transitions at a time")
  parser.add_argument("--vae-slicing", action="store_true", help="encode and decode one image at a time")
  parser.add_argument("--out", type=pathlib.Path, help="default: runs/bench_SIZE_torch")
  parser.add_argument("--check", action="store_true", help="show that both compute the same, on miniatures; no timing")
  parser.add_argument("--compare", nargs="+", type=pathlib.Path, metavar="FILE", help="OUT.json of both: a table")
  parser.add_argument("--prepare", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.compare:
    text = compare(args.compare)
    print(text)
    if args.out:
      args.out.with_suffix(".md").write_text(text + "\n")
    return
  if args.check and not args.child:
    failed = [case for case in args.cases if _checked(case, args.size)]
    if failed:
      raise SystemExit(f"error: {', '.join(failed)}: not the same as jaxpref, or could not be run; see above.")
    return
  if args.check:
    raise SystemExit(bool(check(args.child, args.size)))
  if args.prepare:
    prepare(args.prepare, args.cases, args.size, args.batch, args.dtype)
    return
  how = {"mode": args.mode, "dtype": args.dtype, "layout": args.layout}
  if args.child:
    how |= {"vae_slicing": args.vae_slicing, "micro_batch": args.micro_batch}
    row = measure(args.child, args.size, args.batch, args.steps, args.folder, **how)
    args.out.write_text(json.dumps(row))
    return
  out = args.out or pathlib.Path(f"runs/bench_{args.size}_torch")
  out.parent.mkdir(parents=True, exist_ok=True)
  rows = []
  common = ["--size", args.size, "--steps", str(args.steps)]
  for name in ("batch", "dtype", "micro_batch"):
    if getattr(args, name):
      common += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
  with tempfile.TemporaryDirectory() as folder:
    print(f"models and batches of {args.size} ...", file=sys.stderr, flush=True)
    done = child([*common, "--prepare", folder, "--cases", *args.cases])
    if done.returncode:
      raise SystemExit(f"{done.stderr}\nerror: the models could not be written; see above.")
    for case in args.cases:
      print(f"{case} {args.size} {args.mode}: {args.steps} steps ...", file=sys.stderr, flush=True)
      row_file = pathlib.Path(folder) / f"{case}.json"
      options = [*common, "--child", case, "--folder", folder, "--out", str(row_file)]
      options += ["--mode", args.mode, "--layout", args.layout] + ["--vae-slicing"] * args.vae_slicing
      done = child(options)
      if done.returncode or not row_file.is_file():
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        rows.append({"case": case, "size": args.size, "mode": args.mode, "error": last[0][:200]})
        print(done.stderr, file=sys.stderr)
      else:
        rows.append(json.loads(row_file.read_text()))
      out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
      out.with_suffix(".md").write_text(table(rows) + "\n")
  print(table(rows))
  if any("error" in row for row in rows):
    raise SystemExit("error: not all cases ran; see above.")


def _checked(case: str, size: str) -> bool:
  """Whether a case's check failed; in a process without an accelerator, as TF32 is no float32."""
  done = child(["--check", "--child", case, "--size", size], hidden=True)
  if done.returncode not in (0, 1) or (done.returncode == 1 and "Traceback" in done.stderr):
    print(done.stderr, file=sys.stderr)
  return done.returncode != 0


if __name__ == "__main__":
  main()
