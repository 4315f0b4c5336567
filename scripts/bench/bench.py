"""Times training steps and sampling on this machine: seconds, FLOP/s, memory, time to compile.

    python scripts/bench/bench.py --size sdxl --cases dpo-lora dpo-full spo-lora sample --out runs/bench_sdxl
    python scripts/bench/bench.py --size sd15
    python scripts/bench/bench.py --size smoke
    python scripts/bench/bench.py --table runs/bench_sd15.json runs/bench_sdxl.json    # one table of several OUT.json

writes OUT.json and OUT.md. Each case is a recipe of configs/ on random weights and one batch that stays on the device:
what it says of the speed does not include reading data. `smoke` are miniatures for machines without an accelerator.
Each case runs in a process of its own, so that its peak of memory is its own and one that fails leaves the others.

TFLOP are those of matrix products and convolutions, forward and backward (`jaxpref.planning.flops`), without what is
computed again to save memory; TFLOP/s stand beside the highest rate of matrix products measured in the same process.
The updates of an SPO iteration are as many as its random weights make pairs; threshold 0 keeps them all.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Case -> (recipe, rank of the adapter or None for what the recipe has)
CASES: dict[str, tuple[str, int | None]] = {
  "dpo-lora": ("dpo", 64),
  "dpo-full": ("dpo", 0),
  "tdpo-lora": ("tdpo", 64),
  "tdpo-full": ("tdpo", 0),
  "spo-lora": ("spo", None),
  "spo-full": ("spo", 0),
  "spm": ("spm", None),
  "sample": ("dpo", 0),
}
DEFAULT_CASES = ["dpo-lora", "dpo-full", "spo-lora", "spm", "sample"]
# Pairs, prompts or images of a step on each device.
BATCH = {
  "sdxl": {"dpo": 4, "tdpo": 4, "spo": 2, "spm": 4, "sample": 4},
  "sd15": {"dpo": 16, "tdpo": 16, "spo": 10, "spm": 16, "sample": 16},
  "sd35m": {"dpo": 4},
  "tiny": {"dpo": 32, "tdpo": 32, "spo": 8, "spm": 32, "sample": 32},
}
PRESETS = {"sd35m": "sd35-medium"}  # of sizes with another name


def cases_of(size: str) -> list[str]:
  """Returns the cases that a size has recipes for."""
  of_case = lambda case: case if case == "sample" else CASES[case][0]
  return [case for case in CASES if size == "smoke" or of_case(case) in BATCH[size]]


def recipe_module(file: pathlib.Path) -> Any:
  """Returns a recipe as a module, wherever it lies."""
  spec = importlib.util.spec_from_file_location(file.stem, file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def recipe(
  case: str,
  size: str,
  batch: int | None,
  *,
  dtype: str | None = None,
  miniature: bool = False,
  drawn: bool | None = None,
) -> Any:
  """Returns the config of a case: that of configs/, on random weights, and on the embedded data resized.

  Args:
    dtype: replaces the recipe's.
    miniature: uses miniatures of the topology of sd15 and sdxl; tiny is one.
    drawn: whether the device draws the random weights (see `jaxpref.files.loading`); by default at published sizes.
  """
  import jax

  name, rank = CASES[case]
  real = {"smoke": "sdxl", "smoke-sd35m": "sd35m"}.get(size, size)
  miniature = size in ("smoke", "smoke-sd35m") or (miniature and size != "tiny")
  module = recipe_module(ROOT / "configs" / f"{name}_{real}.py")
  config = module.get_config("smoke") if miniature else module.get_config()
  if not miniature:
    if size != "tiny":
      config.model, config.vae_model = f"random:{PRESETS.get(size, size)}", None
      config.drop_t5 = size == "sd35m"  # as with precomputed prompts, its time is not the step's
      if name in ("spo", "spm"):
        config.preference_model = f"random:{size}"
    config.data.update(source="emoji", folder=None, prompts=None)
    config.batch_size = (batch or BATCH[size][case if case == "sample" else name]) * jax.device_count()
    if name != "spo":
      config.accumulation = 1
    config.spo.threshold = 0.0
  elif batch:
    config.batch_size = batch * jax.device_count()
  if rank is not None:
    rank = rank and (config.lora.rank or rank)  # a recipe of LoRA has its own
    config.lora.rank = min(rank, 4) if miniature else rank
    if rank and name in ("dpo", "tdpo"):
      config.optimizer.name = "adamw"
  elif case == "spo-lora" and not config.lora.rank:
    config.lora.rank = 4  # the recipe trains all weights
  config.dtype = dtype or config.dtype
  config.judge = None
  for field in ("model", "preference_model"):
    if config[field] and (not miniature if drawn is None else drawn):
      config[field] = config[field].replace("random:", "drawn:")
  return config


def resident_bytes() -> int:
  """Returns the most memory that this process has had resident; where JAX compiles, what that took is in it."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compile_timed(lowered: Any) -> tuple[Any, float | None]:
  """Returns the compiled program, and the seconds it took; None where it came from JAX_COMPILATION_CACHE_DIR."""
  kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  files = lambda: len(os.listdir(kept)) if kept and os.path.isdir(kept) else 0
  before, started = files(), time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - started
  return compiled, None if kept and files() == before else seconds


def matrix_peak(dtype_of_step: str) -> tuple[float, str]:
  """Returns the highest rate of products of square matrices, operations a second on all devices, and in what dtype."""
  import jax
  import jax.numpy as jnp

  cpu = jax.default_backend() == "cpu"
  size, dtype = (2048, jnp.dtype("float32")) if cpu else (8192, jnp.dtype(dtype_of_step))
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  chain = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: (x @ y) / jnp.asarray(size**0.5, dtype), x))
  chain(x).block_until_ready()
  seconds = []
  for _ in range(5):
    started = time.perf_counter()
    chain(x).block_until_ready()
    seconds.append(time.perf_counter() - started)
  return 10 * 2 * size**3 / min(seconds) * jax.device_count(), jnp.dtype(dtype).name


class Timed(NamedTuple):
  """What a case gave once its steps have run.

  Attributes:
    seconds: of each timed step.
    count_flop: counts the operations of a step, which takes as long as tracing it.
  """

  seconds: list[float]
  count_flop: Callable[[], float]


Found = Callable[..., None]  # takes named fields of a row as they become known


def measure(
  case: str,
  size: str,
  batch: int | None,
  steps: int,
  dtype: str | None = None,
  *,
  drawn: bool | None = None,
  watch: Callable[[dict[str, Any]], None] = lambda row: None,
  deadline: float = math.inf,
) -> dict[str, Any]:
  """Returns one row of OUT.json.

  Args:
    drawn: see `recipe`.
    watch: called with the row whenever something is added to it.
    deadline: time of `time.monotonic` after which no step begins once there are three.
  """
  from jaxpref.devices import sharding

  config = recipe(case, size, batch, dtype=dtype, drawn=drawn)
  row = described(case, size, config)

  def found(**fields: Any) -> None:
    row.update(fields)
    watch(row)

  run = _sample if case == "sample" else _train
  timed = run(config, sharding.make_mesh(**config.mesh), steps, found, deadline)
  median = float(np.median(timed.seconds))
  memory = peak_bytes()
  found(
    seconds_a_step=median,
    spread=float((np.max(timed.seconds) - np.min(timed.seconds)) / median),
    items_per_second=config.batch_size / median,
    peak_memory_gib=(memory or row["compiled_bytes"]) / 2**30,
    memory_is="measured" if memory else "the compiler's",
    resident_gib=resident_bytes() / 2**30,
  )
  peak, dtype = matrix_peak(config.dtype)
  found(matrix_peak_tflop_per_second=peak / 1e12, matrix_peak_dtype=dtype)
  started = time.perf_counter()
  flop = timed.count_flop()
  found(
    tflop_a_step=flop / 1e12,
    tflop_per_second=flop / median / 1e12,
    share_of_peak=flop / median / peak,
    count_seconds=time.perf_counter() - started,
  )
  return row


def described(case: str, size: str, config: Any) -> dict[str, Any]:
  """Returns what is known of a row before anything has run."""
  import jax

  return {
    "case": case,
    "size": size,
    "batch": config.batch_size,
    "dtype": config.dtype,
    "remat": config.remat,
    "rank": config.lora.rank,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "versions": {"jax": jax.__version__, "python": platform.python_version()},
  }


def peak_bytes() -> int:
  """Returns the most bytes that this process has held on one device so far; 0 where the device does not say."""
  import jax

  return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())


def timed_steps(run: Callable[[int], Any], steps: int, found: Found, deadline: float) -> list[float]:
  """Times `steps` calls after a first one, which also initialises libraries; `found` gets the seconds so far."""
  import jax

  found(peak_before_gib=peak_bytes() / 2**30)  # of loading and compiling
  seconds: list[float] = []
  for i in range(steps + 1):
    if len(seconds) >= 3 and time.monotonic() + seconds[-1] > deadline:
      break
    started = time.perf_counter()
    jax.block_until_ready(run(i))
    if i:
      seconds.append(time.perf_counter() - started)
      found(seconds=[round(s, 4) for s in seconds])
  return seconds


class Started(NamedTuple):
  """A training run before its first step.

  Attributes:
    experiment: what the config describes; its parameters are in `state`.
    state, frozen: on the devices.
    shardings: of the state.
    batches: those of the data, on the host.
    jitted: the step (state, frozen, batch) -> (state, metrics), which takes its state.
  """

  experiment: Any
  state: Any
  frozen: Any
  shardings: Any
  batches: Any
  jitted: Any


def start(config: Any, mesh: Any) -> Started:
  """Builds what a config describes, as training does; compiles all but the step."""
  import functools

  import jax

  from jaxpref.devices import chips, sharding
  from jaxpref.training import build, programs

  place = functools.partial(sharding.tree_shardings, mesh)
  experiment = build.build(config, place, batch_devices=sharding.batch_devices(mesh))
  optimizer, _ = programs.make_optimizer(config)
  init_state = programs.state_initializer(experiment, optimizer)
  shardings = sharding.tree_shardings(mesh, jax.eval_shape(init_state, experiment.params))
  state = jax.jit(init_state, out_shardings=shardings)(experiment.params)
  experiment.params = None
  frozen = sharding.put_tree(mesh, experiment.frozen)
  jitted = jax.jit(
    programs.make_step(config, experiment, optimizer, mesh),
    donate_argnums=0,
    out_shardings=(shardings, None),
    compiler_options=chips.compiler_options(),
  )
  return Started(experiment, state, frozen, shardings, experiment.batches(), jitted)


def _train(config: Any, mesh: Any, steps: int, found: Found, deadline: float) -> Timed:
  import jax

  from jaxpref.devices import sharding
  from jaxpref.models import attention
  from jaxpref.planning import flops

  began = time.perf_counter()
  experiment, state, frozen, _, batches, jitted = start(config, mesh)
  batch = sharding.put_batch(mesh, next(batches))
  jax.block_until_ready((state, frozen))
  found(
    trained_parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    start_seconds=time.perf_counter() - began,
    loading_gib=peak_bytes() / 2**30,
  )
  began = time.perf_counter()
  lowered = jitted.lower(state, frozen, batch)
  found(trace_seconds=time.perf_counter() - began)
  step, compile_seconds = compile_timed(lowered)
  memory: Any = step.memory_analysis()
  found(compile_seconds=compile_seconds, compiled_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, frozen, batch))
  metrics: dict[str, Any] = {}

  def run(i: int) -> Any:
    nonlocal state, metrics
    state, metrics = step(state, frozen, batch)
    return state, metrics

  seconds = timed_steps(run, steps, found, deadline)
  updates = float(metrics.get("updates", 1.0))
  found(updates=updates, **(_spo_counts(config, metrics) if config.objective == "spo" else {}))

  def count_flop() -> float:
    """Counts the operations of the same step without recomputation."""
    plain = config.copy_and_resolve_references()
    plain.remat = "none"
    plain.reference.mode = "frozen"  # of tau steps one moves it, at the cost of a few samples, which is left out
    limit, attention.MAX_LOGITS = attention.MAX_LOGITS, sys.maxsize
    flop = flops.count(_plain_step(plain, mesh), *abstract, while_trips=updates)
    attention.MAX_LOGITS = limit
    return flop

  return Timed(seconds, count_flop)


def _spo_counts(config: Any, metrics: Any) -> dict[str, int]:
  """Returns what an iteration consisted of: each valid pair of a group gives as many transitions as it has steps."""
  from jaxpref.objectives import spo

  s = config.spo
  calls = spo.pool_calls(num_steps=s.num_inference_steps, warmup_steps=s.warmup_steps, pool_size=s.pool_size)
  pairs = float(metrics["valid_pairs"]) * config.batch_size  # exact where all of them are valid
  return {
    "transitions": round(pairs * (s.num_inference_steps - s.warmup_steps)),
    "rollout_calls_a_prompt": calls,
  }


def build_on_shapes(config: Any, batch_devices: int = 1) -> Any:
  """Returns the experiment of a config whose parameters are of no use: random ones are not even made."""
  import jax

  from jaxpref.files import loading
  from jaxpref.training import build

  if not loading.is_random(config.model):
    return build.build(config, batch_devices=batch_devices)
  built: list[Any] = []

  def shapes():
    zeros = config.copy_and_resolve_references()
    for field in ("model", "preference_model"):
      if zeros[field]:
        zeros[field] = loading.without_values(zeros[field])
    built.append(build.build(zeros, batch_devices=batch_devices))
    return ()

  jax.eval_shape(shapes)
  return built[0]


def _plain_step(config: Any, mesh: Any) -> Callable[..., Any]:
  """Returns the step of a config, built on shapes alone."""
  from jaxpref.devices import sharding
  from jaxpref.training import programs

  experiment = build_on_shapes(config, sharding.batch_devices(mesh))
  return programs.make_step(config, experiment, programs.make_optimizer(config)[0], mesh)


def _sample(config: Any, mesh: Any, steps: int, found: Found, deadline: float) -> Timed:
  import jax
  import jax.numpy as jnp

  from jaxpref.devices import chips, sharding
  from jaxpref.diffusion import samplers
  from jaxpref.files import loading
  from jaxpref.models import attention
  from jaxpref.models.base import guided
  from jaxpref.planning import flops

  everywhere = sharding.replicated(mesh)
  pipe = loading.load_text_to_image(config.model, dtype=config.dtype, param_dtype=config.dtype, sharding=everywhere)
  slicing = config.vae_slicing * sharding.batch_devices(mesh) or None
  model = loading.text_to_image(pipe, vae_slicing=slicing)
  weights = sharding.put_tree(mesh, dict(pipe.params) | {"empty_ids": pipe.tokenize([""])})
  ids = pipe.tokenize(["a red apple"] * config.batch_size)
  batch = sharding.put_batch(mesh, {"ids": ids})

  def draw(weights, batch, seed):
    cond = model.encode_text(weights, batch["ids"])
    predict = guided(lambda x, t, c: model.predict(weights, x, t, c), model.encode_empty(weights, 1), 5.0)
    noise = jax.random.normal(jax.random.key(seed), (ids.shape[0], *model.latent_shape))
    keys = jax.random.split(jax.random.key(seed), ids.shape[0])
    run = lambda x, t: predict(x, t, cond)  # noqa: E731
    latents = samplers.sample(run, model.process, noise, keys, num_steps=20, eta=0.0)
    return model.decode(weights, latents)

  arguments = (weights, batch, jnp.int32(0))
  compiled, compile_seconds = compile_timed(jax.jit(draw, compiler_options=chips.compiler_options()).lower(*arguments))
  memory: Any = compiled.memory_analysis()
  found(compile_seconds=compile_seconds, compiled_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes)
  seconds = timed_steps(lambda i: compiled(weights, batch, jnp.int32(i)), steps, found, deadline)

  def count_flop() -> float:
    limit, attention.MAX_LOGITS = attention.MAX_LOGITS, sys.maxsize  # attention by cuDNN could not be counted
    flop = flops.count(lambda *a: draw(*a), *arguments)  # another function, as JAX keeps the trace of that one
    attention.MAX_LOGITS = limit
    return flop

  return Timed(seconds, count_flop)


def memory_note(row: Mapping[str, Any]) -> str:
  """Returns what stands behind a row's peak of memory: the compiler's estimate, and whether the steps reached it."""
  if row["memory_is"] != "measured":
    return " (compiler)"
  before = "" if row["peak_memory_gib"] > row["peak_before_gib"] else ", reached before the steps"
  return f" (compiler: {row['compiled_bytes'] / 2**30:.2f}{before})"


def table(rows: list[dict[str, Any]]) -> str:
  """Returns a Markdown table."""
  lines = [
    "| case | batch | s a step (spread) | rows/s | TFLOP a step | TFLOP/s (of matrix peak) | peak GiB | compile s |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for r in rows:
    name = f"{r['case']} {r['size']}"
    if "error" in r:
      lines.append(f"| {name} | | {r['error']} | | | | | |")
      continue
    compiled = "(kept)" if r["compile_seconds"] is None else f"{r['compile_seconds']:.0f}"
    memory = f"{r['peak_memory_gib']:.2f}{memory_note(r)}"
    lines.append(
      f"| {name} | {r['batch']} | {r['seconds_a_step']:.3g} ({100 * r['spread']:.0f} %) | {r['items_per_second']:.3g} "
      f"| {r['tflop_a_step']:.3g} | {r['tflop_per_second']:.3g} ({100 * r['share_of_peak']:.0f} %) "
      f"| {memory} | {compiled} |"
    )
  good = [r for r in rows if "error" not in r]
  where = sorted({f"{r['devices']}, jax {r['versions']['jax']}" for r in good})
  peaks = [r["matrix_peak_tflop_per_second"] for r in good] or [float("nan")]
  dtypes = ", ".join(sorted({r["matrix_peak_dtype"] for r in good}))
  lines += ["", f"On {'; '.join(where)}. Matrix peak: {min(peaks):.3g} to {max(peaks):.3g} TFLOP/s ({dtypes})."]
  return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=("smoke", *BATCH), default="smoke", help="default: %(default)s")
  of_default = ", ".join(DEFAULT_CASES)
  parser.add_argument("--cases", nargs="+", choices=CASES, help=f"default: those of {of_default} that it has")
  parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
  parser.add_argument("--batch", type=int, help="pairs, prompts or images a device")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the recipe's")
  parser.add_argument("--out", type=pathlib.Path, help="default: runs/bench_SIZE")
  parser.add_argument("--table", nargs="+", type=pathlib.Path, metavar="FILE", help="OUT.json files: one table")
  parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  known = cases_of(args.size)
  args.cases = args.cases or [case for case in DEFAULT_CASES if case in known]
  if missing := [case for case in args.cases if case not in known]:
    parser.error(f"--cases: {missing[0]} has no recipe at --size={args.size}; expected {', '.join(known)}.")
  if args.table:
    if missing := [str(file) for file in args.table if not file.is_file()]:
      parser.error(f"--table: there is no {', '.join(missing)}; expected OUT.json files of this script.")
    text = table([row for file in args.table for row in json.loads(file.read_text())])
    print(text)
    if args.out:
      args.out.with_suffix(".md").write_text(text + "\n")
    return
  if args.child:
    from jaxpref.devices import chips

    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(chips.GPU_SHARE))  # as in training
    args.out.write_text(json.dumps(measure(args.child, args.size, args.batch, args.steps, args.dtype)))
    return
  out = args.out or pathlib.Path(f"runs/bench_{args.size}")
  out.parent.mkdir(parents=True, exist_ok=True)
  rows = []
  for case in args.cases:
    print(f"{case} {args.size}: {args.steps} steps ...", file=sys.stderr, flush=True)
    row_file = out.with_name(f".{out.name}_{case}.json")
    row_file.unlink(missing_ok=True)
    options = ["--child", case, "--size", args.size, "--steps", str(args.steps), "--out", str(row_file.resolve())]
    options += ["--batch", str(args.batch)] if args.batch else []
    options += ["--dtype", args.dtype] if args.dtype else []
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "bench.py"), *options]
    # Of the CPU's memory, as docs/operations.md advises.
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, env=environment)
    if done.returncode or not row_file.is_file():
      last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
      rows.append({"case": case, "size": args.size, "error": last[0][:200]})
      print(done.stderr, file=sys.stderr)
    else:
      rows.append(json.loads(row_file.read_text()))
      row_file.unlink()
    out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    out.with_suffix(".md").write_text(table(rows) + "\n")
  print(table(rows))
  if any("error" in row for row in rows):
    raise SystemExit("error: not all cases ran; see above.")


if __name__ == "__main__":
  main()
