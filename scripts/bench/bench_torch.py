"""Times the training steps of scripts/bench/bench.py in PyTorch, written as the published implementations write them.

    python scripts/bench/bench_torch.py --size sd15 --cases dpo-lora dpo-full spo-lora spo-full --out runs/sd15_torch
    python scripts/bench/bench_torch.py --size sd15 --mode compile --out runs/bench_sd15_compile
    python scripts/bench/bench_torch.py --compare runs/bench_sd15.json runs/bench_sd15_torch.json

The first two write OUT.json and OUT.md with the fields of bench.py. Both take the recipes of configs/ in the same way,
on random weights: jaxpref writes some as a diffusers folder, which diffusers opens; a process that times PyTorch does
not compute with JAX. scripts/parity/torch_check.py shows that both compute the same step, `--compare` makes
the table of the two (scripts/bench/bench_vs_torch.sh does all of it). One device; needs torch, diffusers, transformers,
peft.

`--drawn` writes no weights: PyTorch makes random ones on its device, as jaxpref does (`drawn:` of
jaxpref.files.loading); for DPO alone, as the preference model of SPO is read from a file.

What is done how is said at the top of scripts/parity/torch_steps.py. Memory is the peak of what PyTorch allocated while
it was timed (CUDA) or of what the process had resident (CPU).
"""

import argparse
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))

from scripts.bench import bench  # noqa: E402
from scripts.parity import torch_steps  # noqa: E402

CASES = ("dpo-lora", "dpo-full", "spo-lora", "spo-full")
MODES = ("eager", "compile")


# ---- The models, as files --------------------------------------------------------------------------------------------


def save_models(folder: pathlib.Path, config: Any, pipe: Any, scorer: Any = None, policy: Any = None) -> None:
  """Writes what a case starts from: `pipeline`, and `preference` and `torch_steps.policy_file` where it needs them.

  Args:
    pipe: a `jaxpref.files.pipelines.Pipeline`.
    scorer: SPO's preference model and its parameters.
    policy: trained parameters by component; by default those that training starts from.
  """
  import jax.numpy as jnp

  from jaxpref.files import adapters, pipelines, tensors
  from jaxpref.rewards.loading import save_preference_model
  from jaxpref.training import networks

  if not (folder / "pipeline").is_dir():
    pipelines.save_pipeline(folder / "pipeline", pipe)
  trained = folder / torch_steps.policy_file(config)
  if config.lora.rank:
    adapter = policy["unet_lora"] if policy else networks.initial_adapter(config, pipe)
    adapters.save_diffusers(trained, adapter, networks.adapter_scale(config, config.lora.rank))
  elif policy:
    tensors.save_tree(trained, policy["unet"])
  if scorer and not (folder / "preference").is_dir():
    # In the precision in which both sides keep its parameters.
    save_preference_model(folder / "preference", *scorer, dtype=jnp.dtype(config.dtype))


def save_inputs(file: pathlib.Path, batch: Mapping[str, Any], empty_ids: Any) -> None:
  """Writes one batch as jaxpref's data pipeline gives it."""
  arrays: dict[str, Any] = {k: np.asarray(v) for k, v in batch.items()}
  np.savez(file, **arrays, empty_ids=np.asarray(empty_ids))


def prepare(
  folder: pathlib.Path,
  cases: Sequence[str],
  size: str,
  batch: int | None,
  dtype: str | None,
  *,
  drawn: bool = False,
) -> None:
  """Writes models and one batch of each case into a folder; run where JAX has no accelerator.

  Args:
    drawn: of the models write the configs alone.
  """
  from jaxpref.files import loading, pipelines
  from jaxpref.rewards.loading import load_scorer

  pipe = scorer = None
  for case in cases:
    config = recipe(case, size, batch, dtype)
    if drawn:
      name = config.model.replace("random:", "drawn:")
      configs = loading.load_text_to_image(name, dtype="float32", components=())
      pipelines.save_pipeline(folder / "pipeline", configs, configs_only=True)
      save_batch(folder, case, config)
      continue
    pipe = pipe or loading.load_text_to_image(config.model, dtype="float32", seed=config.seed)
    if config.objective == "spo":
      scorer = scorer or load_scorer(config.preference_model, dtype="float32", seed=config.seed)
    save_models(folder, config, pipe, scorer)
    save_batch(folder, case, config)


def save_batch(folder: pathlib.Path, case: str, config: Any) -> None:
  """Writes the first batch of a case."""
  experiment = bench.build_on_shapes(config)
  assert experiment.tokenize is not None
  save_inputs(folder / f"{case}.npz", next(experiment.batches()), experiment.tokenize([""]))


def recipe(case: str, size: str, batch: int | None, dtype: str | None) -> Any:
  """Returns the config of a case on one device."""
  import jax

  config = bench.recipe(case, size, batch, dtype=dtype, drawn=False)
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
  drawn: bool = False,
  watch: Callable[[dict[str, Any]], None] = lambda row: None,
  deadline: float = math.inf,
) -> dict[str, Any]:
  """Returns one row of OUT.json, from what `prepare` wrote into the folder.

  Args:
    drawn: see `prepare`.
    watch, deadline: see `bench.measure`.
  """
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.benchmark = True
  config = recipe(case, size, batch_size, dtype)
  batch, empty_ids = torch_steps.load_batch(folder / f"{case}.npz", device)
  models = torch_steps.load_models(folder, config, device=device, empty_ids=empty_ids, drawn=drawn)
  if micro_batch:
    batch["micro_batch"] = micro_batch
  if vae_slicing:
    models.vae.enable_slicing()
  if layout == "auto":
    layout = faster_layout(models, config) if device == "cuda" else "contiguous"
  set_layout(models, layout)
  parameters = [p for p in models.unet.parameters() if p.requires_grad]
  run = clocked_step(compiled(models) if mode == "compile" else models, config, parameters, batch)
  warm_up = sum(run()[0] for _ in range(2 if mode == "compile" else 1))
  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  row = described(case, size, config, device) | {"mode": mode, "layout": layout, "vae_slicing": vae_slicing}
  row |= {"compile_seconds": warm_up, "trained_parameters": sum(p.numel() for p in parameters)}
  timed = timed_steps(run, steps, row, watch, deadline)
  memory = torch.cuda.max_memory_allocated() if device == "cuda" else bench.resident_bytes()
  row |= {
    "items_per_second": config.batch_size / row["seconds_a_step"],
    "peak_memory_gib": memory / 2**30,
    "memory_is": "measured" if device == "cuda" else "resident",
    "resident_gib": bench.resident_bytes() / 2**30,
    **timed[-1][1],
  }
  watch(row)
  return row


def described(case: str, size: str, config: Any, device: str) -> dict[str, Any]:
  """Returns what is known of a row before anything has run."""
  import torch

  packages = ("torch", "diffusers", "transformers", "peft")
  return {
    "case": case,
    "size": size,
    "batch": config.batch_size,
    "dtype": config.dtype,
    "remat": config.remat,
    "rank": config.lora.rank,
    "optimizer": config.optimizer.name,
    "devices": f"1 x {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}",
    "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
  }


Timed = tuple[float, dict[str, int]]  # seconds of a step, and its counts


def timed_steps(
  run: Callable[[], Timed], steps: int, row: dict[str, Any], watch: Callable[[dict[str, Any]], None], deadline: float
) -> list[Timed]:
  """Times steps, and adds them to the row as they come; stops at the deadline once there are three."""
  timed: list[Timed] = []
  for _ in range(steps):
    if len(timed) >= 3 and time.monotonic() + timed[-1][0] > deadline:
      break
    timed.append(run())
    row["seconds"] = [round(s, 4) for s, _ in timed]
    watch(row)
  seconds = [s for s, _ in timed]
  median = float(np.median(seconds))
  row |= {"seconds_a_step": median, "spread": float((np.max(seconds) - np.min(seconds)) / median)}
  return timed


def clocked_step(
  models: torch_steps.Models, config: Any, parameters: list[Any], batch: dict[str, Any]
) -> Callable[[], Timed]:
  """Returns a function that makes a step and waits for it."""
  import torch

  device = models.alphas_cumprod.device.type
  optimizer = torch_steps.make_optimizer(config, parameters)
  draws = torch_steps.random_draws(device, len(models.alphas_cumprod))
  step = torch_steps.STEPS[config.objective]

  def run() -> Timed:
    started = time.perf_counter()
    counts = step(models, config, optimizer, batch, draws).counts
    if device == "cuda":
      torch.cuda.synchronize()
    return time.perf_counter() - started, counts

  return run


def set_layout(models: torch_steps.Models, layout: str) -> None:
  """Sets the layout of the convolutions' weights, which their inputs follow."""
  import torch

  form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  for network in (models.unet, models.reference, models.vae):
    if network is not None:
      network.to(memory_format=form)


def faster_layout(models: torch_steps.Models, config: Any) -> str:
  """Returns the layout with the faster forward and backward pass of the UNet, at the batch of a DPO pair step."""
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
  """Returns the same networks under torch.compile."""
  import torch

  torch._dynamo.config.recompile_limit = 64  # rollout and updates have batches of several sizes
  networks = [models.unet, models.vae.encoder, models.vae.decoder, *models.encoders]
  for network in networks if models.reference is None else [*networks, models.reference]:
    network.compile(dynamic=False)
  if models.scorer is None:
    return models
  scores, text_embeds = (torch.compile(f, dynamic=False) for f in models.scorer)
  return models._replace(scorer=(scores, text_embeds))


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a Markdown table."""
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
  """Returns `compare_rows` of all rows of files of bench.py and of this script."""
  return compare_rows([row for file in files for row in json.loads(file.read_text())])


def compare_rows(rows: Sequence[dict[str, Any]]) -> str:
  """Returns the table of rows of bench.py and of this script, rounds of one case pooled.

  The ratio is PyTorch's median of all steps over jaxpref's; in brackets the smallest and the largest ratio of any two
  runs' medians.

  Raises:
    SystemExit: rows of one case are of other batches, precisions or ranks, or only one of the two is there.
  """
  runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
  for row in rows:
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


def child(
  options: Sequence[str], *, script: str = "bench_torch.py", hidden: bool = False
) -> subprocess.CompletedProcess[str]:
  """Runs a script in its own process, in which JAX does not touch an accelerator.

  Args:
    hidden: hides accelerators from PyTorch too.
  """
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  if hidden:
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
  command = [sys.executable, str(ROOT / "scripts" / script), *options]
  return subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, env=environment)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=("smoke", "sdxl", "sd15", "tiny"), default="smoke", help="default: %(default)s")
  parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
  parser.add_argument("--mode", choices=MODES, default="eager", help="default: %(default)s")
  parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
  parser.add_argument("--batch", type=int, help="pairs or prompts")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the recipe's")
  parser.add_argument("--layout", choices=("auto", "contiguous", "channels_last"), default="auto")
  parser.add_argument("--micro-batch", type=int, help="spo: transitions at a time")
  parser.add_argument("--drawn", action="store_true", help="random weights made on the device; dpo alone")
  parser.add_argument("--vae-slicing", action="store_true", help="encode and decode one image at a time")
  parser.add_argument("--out", type=pathlib.Path, help="default: runs/bench_SIZE_torch")
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
  if args.drawn and not args.compare:
    if args.cases == CASES:
      args.cases = [case for case in CASES if case.startswith("dpo")]
    if spo := [case for case in args.cases if case.startswith("spo")]:
      parser.error(f"--drawn: {', '.join(spo)} needs the file of a preference model; leave out --drawn.")
  if args.prepare:
    prepare(args.prepare, args.cases, args.size, args.batch, args.dtype, drawn=args.drawn)
    return
  how = {"mode": args.mode, "dtype": args.dtype, "layout": args.layout}
  if args.child:
    how |= {"vae_slicing": args.vae_slicing, "micro_batch": args.micro_batch, "drawn": args.drawn}
    row = measure(args.child, args.size, args.batch, args.steps, args.folder, **how)
    args.out.write_text(json.dumps(row))
    return
  run_cases(args)


def run_cases(args: argparse.Namespace) -> None:
  """Times each case in a process of its own, and writes OUT.json and OUT.md."""
  out = args.out or pathlib.Path(f"runs/bench_{args.size}_torch")
  out.parent.mkdir(parents=True, exist_ok=True)
  rows = []
  common = ["--size", args.size, "--steps", str(args.steps)] + ["--drawn"] * args.drawn
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


if __name__ == "__main__":
  main()
