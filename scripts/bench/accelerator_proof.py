"""The part `proof` of scripts/bench/accelerator.py: that an accelerator computes what a CPU does.

Three steps of each objective on the shipped models in float32 (TF32 off): all metrics against those of a CPU, which
`python scripts/bench/accelerator.py --make` wrote. The same seeds give the same random numbers on every device, so that
only rounding differs.

- A metric may be off by TOLERANCE[step] of its size, which is the largest value of all three steps, plus FLOOR. What is
  close in the first step drifts apart afterwards, as Adam divides by small gradients.
- Rounding may also turn a decision. A share (DECISIONS: valid pairs, right rows, clipped ratios) may be off by one row.
  If a decision turned, losses that depend on it may be off by more; the objective is then reported as wrong, and its
  numbers, which are all kept, tell.

Attention in bfloat16 for every length, number and size of heads of SD1.5's and SDXL's UNets and VAEs, by cuDNN and by
what jaxpref chooses, against float32: the largest difference, forward or in a gradient, as a share of the largest
number. Then a picture of tiny-sd, and a run that is saved and goes on.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.bench import bench
from scripts.bench.accelerator_results import Results, clocked, sentence

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPECTED = ROOT / "scripts" / "bench" / "accelerator_cpu.json"
PACKAGES = (
  "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "flax", "optax",
  "orbax-checkpoint", "numpy", "torch", "diffusers", "transformers", "peft", "ml_collections", "grain",
)  # fmt: skip


# ---- The machine -----------------------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
  """Returns what is there: driver, device, versions."""
  import jax

  command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
  driver = "none"
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
  versions = {}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "backend": jax.default_backend(),
    "driver": driver,
    "memory_gib": (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0) / 2**30,
    "cpus": os.cpu_count(),
    "python": platform.python_version(),
    "versions": versions,
  }


# ---- Three steps of each objective -----------------------------------------------------------------------------------

STEPS = 3
_COMMON = {"optimizer.warmup_steps": 0, "data.num_threads": 0}
_GRPO = {"grpo.num_inference_steps": 5, "grpo.minibatch": 10}
# Objective -> (recipe of configs/, its argument or None, fields that are not the recipe's).
OBJECTIVES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
  "dpo": ("dpo_tiny", None, {"batch_size": 4}),
  "spo": (
    "spo_tiny",
    None,
    {"batch_size": 2, "spo.num_inference_steps": 8, "spo.warmup_steps": 2, "spo.minibatch": 6},
  ),  # fmt: skip
  "tdpo": ("tdpo_tiny", None, {"batch_size": 4, "reference.tau": 2}),
  "grpo": ("grpo_tiny", None, {"batch_size": 2, "grpo.group_size": 3, **_GRPO}),
  "ddpo": ("grpo_tiny", None, {"batch_size": 6, "grpo.group_size": 1, "grpo.advantage": "batch", **_GRPO}),
  "kto": ("kto_tiny", None, {"batch_size": 4}),
  "spm": ("spm_tiny", None, {"batch_size": 4}),
  "denoise": ("pretrain_tiny", "unet", {"batch_size": 4, "model": "tiny-sd", "optimizer.learning_rate": 1e-4}),
  "autoencode": ("pretrain_tiny", "vae", {"batch_size": 4, "model": "tiny-sd", "optimizer.learning_rate": 1e-4}),
  "contrastive": ("pretrain_tiny", "clip", {"batch_size": 4, "optimizer.learning_rate": 1e-4}),
  "classify": ("pretrain_tiny", "judge", {"batch_size": 4, "optimizer.learning_rate": 1e-4}),
}
TOLERANCE = (1e-3, 5e-3, 5e-3)  # of each step
# Where the policy is still the one it started from, margins are zero but for the rounding of errors of about 0.05, and
# losses of GRPO but for that of log-densities.
FLOOR, LOSS_FLOOR = 1e-6, 5e-5
DECISIONS = ("accuracy", "class_accuracy", "style_accuracy", "clip_fraction", "valid_pairs")
SIGNS = "implicit_accuracy"  # of margins, which are compared themselves, and are zero where nothing has moved


def objective_config(name: str) -> Any:
  """Returns the config of an objective's three steps."""
  recipe, argument, fields = OBJECTIVES[name]
  module = bench.recipe_module(ROOT / "configs" / f"{recipe}.py")
  config = module.get_config(argument) if argument else module.get_config()
  config.update_from_flattened_dict(_COMMON | fields)
  config.judge = None
  return config


class Training:
  """Three steps of one objective."""

  def __init__(self, name: str):
    import jax

    from jaxpref.devices import sharding

    self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    self.run = bench.start(objective_config(name), self.mesh)
    self.batches = [sharding.put_batch(self.mesh, next(self.run.batches)) for _ in range(STEPS)]
    with jax.default_matmul_precision("highest"):
      self._lowered = self.run.jitted.lower(self.run.state, self.run.frozen, self.batches[0])

  def compile(self) -> Callable[..., Any]:
    return self._lowered.compile()

  def steps(
    self, compiled: Callable[..., Any], state: Any, first: int, last: int
  ) -> tuple[Any, list[dict[str, float]]]:
    """Trains from one step up to another: the state, and the metrics of each step."""
    from jaxpref.training import metrics

    found = []
    for batch in self.batches[first:last]:
      state, values = compiled(state, self.run.frozen, batch)
      found.append(metrics.to_scalars(values))
    return state, found


def decided(name: str) -> int:
  """Returns how many rows an objective's shares are of, at least: a pair of a rollout, a transition, or a row."""
  config = objective_config(name)
  if config.objective == "spo":
    return config.batch_size * (config.spo.num_inference_steps - config.spo.warmup_steps - 1)
  return config.grpo.minibatch if config.objective == "grpo" else config.batch_size


def scales(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns the size of each metric: the largest of all steps, and of all ranges of the timestep."""
  sizes: dict[str, float] = {}
  for name, value in ((name, value) for step in steps for name, value in step.items()):
    kind = name.split("_bin_")[0]
    sizes[kind] = max(abs(value), sizes.get(kind, 0.0))
  return {name: sizes[name.split("_bin_")[0]] for step in steps for name in step}


def offsets(
  found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], rows: int
) -> dict[tuple[int, str], float]:
  """Returns how far each metric of each step is off, as a share of what is allowed.

  Args:
    found: the metrics of each step.
    expected: those of the CPU.
    rows: that a share counts.
  """
  sizes, off = scales(expected), {}
  for i, (a, b) in enumerate(zip(found, expected, strict=True)):
    for name in (a.keys() | b.keys()) - {SIGNS}:
      if name.startswith(DECISIONS):
        allowed = 1.01 if "_bin_" in name else 1.01 / rows
      else:
        allowed = TOLERANCE[i] * sizes.get(name, 0.0) + (LOSS_FLOOR if name.startswith("loss") else FLOOR)
      share = abs(a.get(name, math.nan) - b.get(name, math.nan)) / allowed
      off[i + 1, name] = math.inf if math.isnan(share) else share
  return off


def differences(found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], rows: int) -> list[str]:
  """Returns a sentence for each metric that is off by more than is allowed; see `offsets` for the arguments."""
  wrong = []
  for (step, name), share in sorted(offsets(found, expected, rows).items()):
    if share > 1.0:
      a, b = (steps[step - 1].get(name, math.nan) for steps in (found, expected))
      wrong.append(f"step {step}: {name} is {a:.6g}, on the CPU {b:.6g}")
  return wrong


def objectives(results: Results, expected: Mapping[str, Any]) -> None:
  """Adds an item an objective; programs are compiled side by side while the next ones are traced."""
  pending: dict[str, tuple[Training, concurrent.futures.Future]] = {}

  def add(names: Sequence[str]) -> None:
    for name in names:
      with results.attempt(name):
        add_objective(results, name, *pending.pop(name), expected[name])

  with pool() as executor:
    for name in OBJECTIVES:
      if not results.done(name):
        with results.attempt(name):
          training = Training(name)
          pending[name] = training, executor.submit(clocked, training.compile)
      add([name for name, (_, compiling) in pending.items() if compiling.done()])
    add(list(pending))


def add_objective(
  results: Results,
  name: str,
  training: Training,
  compiling: concurrent.futures.Future,
  expected: Sequence[Mapping[str, float]],
) -> None:
  """Trains the steps of an objective and adds its item."""
  compiled, seconds = compiling.result()
  _, found = training.steps(compiled, training.run.state, 0, STEPS)
  off = offsets(found, expected, decided(name))
  step, metric = max(off, key=off.__getitem__)
  said = f"furthest from the CPU is {metric} of step {step}, by {100 * off[step, metric]:.1f} % of what is allowed"
  item = {"steps": found, "off": off[step, metric], "compile_seconds": seconds}
  item["wrong"] = differences(found, expected, decided(name))
  results.add(name, item, f"{said} (compiled in {seconds:.0f} s)")


def pool() -> concurrent.futures.ThreadPoolExecutor:
  """Returns threads for XLA's compiler, which Python does not hold up."""
  return concurrent.futures.ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))


# ---- Attention -------------------------------------------------------------------------------------------------------

Size = tuple[int, int, int, int]
TOKENS = 77
BOUND = 0.02


def attention_sizes(names: Sequence[str]) -> list[Size]:
  """Returns (positions, keys, heads, size of a head) of all attention in the UNets and VAEs of presets."""
  from jaxpref.models import presets

  found: set[Size] = set()
  for name in names:
    unet, vae = presets.get_preset(name).unet, presets.get_preset(name).vae
    side, levels = unet.sample_size, len(unet.block_out_channels)
    assert isinstance(side, int)
    for level, (kind, channels, heads) in enumerate(
      zip(unet.down_block_types, unet.block_out_channels, unet.per_level("attention_head_dim"), strict=True)
    ):
      if kind.startswith("CrossAttn") or level == levels - 1:  # the middle has the size of the last level
        positions = (side >> level) ** 2
        found |= {(positions, keys, heads, channels // heads) for keys in (positions, TOKENS)}
    found.add((side**2, side**2, 1, vae.block_out_channels[-1]))
  return sorted(found, reverse=True)


class Attention:
  """Forward and backward pass of one size: in float32, and in bfloat16 by several implementations."""

  def __init__(self, size: Size):
    import jax
    import jax.numpy as jnp

    self.size = length, keys, heads, width = size
    batch = 1 if heads == 1 else 2
    shapes = [(batch, n, heads, width) for n in (length, keys, keys, length)]
    self._arguments = tuple(jax.random.normal(jax.random.key(i), x, jnp.bfloat16) for i, x in enumerate(shapes))

  def ways(self) -> list[str]:
    """Returns what jaxpref chooses, first, and cuDNN where there is one."""
    import jax.numpy as jnp

    from jaxpref.models import attention

    chosen = attention.choose(*self.size, jnp.bfloat16)
    has_cudnn = (attention.cuda_capability() or 0.0) >= 8.0
    return list(dict.fromkeys([chosen, *(["cudnn"] if has_cudnn else [])]))

  def compile(self, way: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the program of an implementation, None for float32, and its arguments."""
    import jax
    import jax.numpy as jnp

    from jaxpref.models import attention

    def both(q: Any, k: Any, v: Any, out: Any) -> Any:
      function = lambda q, k, v: attention.attention(q, k, v, implementation=way or "chunked")
      y, pull = jax.vjp(function, q, k, v)
      return y, *pull(out.astype(y.dtype))

    arguments = self._arguments if way else tuple(x.astype(jnp.float32) for x in self._arguments)
    with jax.default_matmul_precision("default" if way else "highest"):
      return jax.jit(both).lower(*arguments).compile(), arguments


def attention_row(way: str, compiling: Any, expected: Any) -> dict[str, Any]:
  """Returns error and seconds of one implementation."""
  import jax
  import jax.numpy as jnp

  relative = lambda a, b: float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
  try:
    program, arguments = compiling.result()
    found = jax.block_until_ready(program(*arguments))
    _, seconds = clocked(lambda: jax.block_until_ready(program(*arguments)))
  except Exception as error:  # whatever the device's library raises is the result
    return {"implementation": way, "error": sentence(error)}
  names = ("forward", "dq", "dk", "dv")
  errors = {name: relative(a, b) for name, a, b in zip(names, found, expected, strict=True)}
  return {"implementation": way, **errors, "seconds": seconds}


def attention_wrong(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns a sentence for each implementation that is wrong; only the first, which jaxpref chooses, must run."""
  wrong = []
  for i, row in enumerate(rows):
    if "error" in row:
      wrong += [f"{row['implementation']} is chosen and fails: {row['error']}"] if i == 0 else []
    else:
      off = {name: row[name] for name in ("forward", "dq", "dk", "dv") if not row[name] <= BOUND}
      wrong += [f"{row['implementation']}: {name} is off by {value:.2g}" for name, value in off.items()]
  return wrong


def attention(results: Results, sizes: Sequence[Size]) -> None:
  """Adds an item a size."""
  pending = {}
  with pool() as executor:
    for size in sizes:
      if not results.done(name := attention_name(size)):
        with results.attempt(name):
          case = Attention(size)
          compiling = {way: executor.submit(case.compile, way) for way in (None, *case.ways())}
          pending[name] = size, compiling
    for name, (size, compiling) in pending.items():
      with results.attempt(name):
        program, arguments = compiling[None].result()
        expected = program(*arguments)
        rows = [attention_row(way, future, expected) for way, future in compiling.items() if way]
        results.add(name, {"size": size, "rows": rows, "wrong": attention_wrong(rows)}, attention_said(rows))


def attention_name(size: Size) -> str:
  return "attention " + "x".join(map(str, size))


def attention_said(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a line on the implementations of one size."""
  parts = []
  for i, row in enumerate(rows):
    name = f"{row['implementation']}{' (chosen)' if i == 0 else ''}"
    if "error" in row:
      parts.append(f"{name} fails: {row['error']}")
    else:
      gradient = max(row[k] for k in ("dq", "dk", "dv"))
      parts.append(f"{name} off by {row['forward']:.1e}, gradients {gradient:.1e}, {1e3 * row['seconds']:.3g} ms")
  return "; ".join(parts)


# ---- A picture, and a run that goes on -------------------------------------------------------------------------------

PROMPTS = ("volcano", "love letter", "camera", "red apple")
COLOUR = 0.01  # largest difference of a picture's mean colour, of 1


def draw(folder: pathlib.Path | None) -> list[list[float]]:
  """Draws prompts with tiny-sd, into sample.png; returns the mean colour of each picture."""
  import jax
  import numpy as np

  from jaxpref.evaluation import drawing
  from jaxpref.evaluation.pictures import picture_table
  from jaxpref.files import loading

  pipe = loading.load_text_to_image("tiny-sd", dtype="float32")
  weights = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  with jax.default_matmul_precision("highest"):
    pictures = drawing.generate(
      loading.text_to_image(pipe),
      weights,
      pipe.tokenize(list(PROMPTS)),
      seeds_per_prompt=2,
      num_inference_steps=20,
      guidance_scale=3.5,
      eta=0.0,
      seed=0,
      batch_size=2 * len(PROMPTS),
    )
  if folder is not None:
    picture_table(folder / "sample.png", {"": pictures}, PROMPTS)
  return np.round(pictures.reshape(-1, pictures[0, 0].size // 3, 3).mean(1) / 255, 5).tolist()


def sample(results: Results, expected: Sequence[Sequence[float]]) -> None:
  """Adds the item `sample`."""
  found, seconds = clocked(lambda: draw(results.folder))
  off = max(abs(x - y) for a, b in zip(found, expected, strict=True) for x, y in zip(a, b, strict=True))
  wrong = [] if off <= COLOUR else [f"a picture's mean colour is off by {off:.3f} of 1"]
  said = f"{len(found)} pictures of tiny-sd in {results.folder / 'sample.png'}; "
  said += f"mean colours within {off:.1e} of the CPU's"
  results.add("sample", {"colours": found, "largest": off, "seconds": seconds, "wrong": wrong}, said)


def resume(results: Results) -> None:
  """Adds the item `resume`: the third step after saving and restoring the second against the third step without."""
  import jax

  from jaxpref.training import checkpoint

  training = Training("dpo")
  compiled = training.compile()
  state, _ = training.steps(compiled, training.run.state, 0, 2)
  with tempfile.TemporaryDirectory() as folder:
    saver = checkpoint.Checkpointer(folder, keep=1)
    saving = time.perf_counter()
    saver.save(2, state, {"batches": 0})
    saver.wait()
    saving = time.perf_counter() - saving
    abstract = checkpoint.abstract(jax.eval_shape(lambda x: x, state), training.run.shardings)
    (step, restored, _), restoring = clocked(lambda: saver.restore(abstract))
    saver.close()
  same = checkpoint.digest(state) == checkpoint.digest(restored)
  _, first = training.steps(compiled, state, 2, 3)
  _, second = training.steps(compiled, restored, 2, 3)
  wrong = [] if same and step == 2 else ["what was restored is not what was saved"]
  wrong += differences(second, first, 1)
  said = f"the restored state of step 2 is {'the same bit by bit' if same else 'another one'}; "
  said += f"loss of step 3 {first[0]['loss']:.8f}, resumed {second[0]['loss']:.8f}"
  item = {"same_state": same, "steps": [first[0], second[0]], "save_seconds": saving, "restore_seconds": restoring}
  results.add("resume", item | {"wrong": wrong}, said)


def proof(results: Results) -> list[str]:
  """Runs the part `proof`; returns the names of its items."""
  expected = json.loads(EXPECTED.read_text())
  if not results.done("device"):
    with results.attempt("device"):
      found = device()
      said = f"{found['devices']}, driver {found['driver']}, python {found['python']}, " + ", ".join(
        f"{name} {version}" for name, version in found["versions"].items()
      )
      results.add("device", found, said)
  sizes = attention_sizes(("sd15", "sdxl") if results.size == "full" else ("sd15-miniature", "sdxl-miniature"))
  objectives(results, expected["objectives"])
  attention(results, sizes)
  for name, run in (("sample", lambda: sample(results, expected["sample"])), ("resume", lambda: resume(results))):
    if not results.done(name):
      with results.attempt(name):
        run()
  return ["device", *OBJECTIVES, *map(attention_name, sizes), "sample", "resume"]


def make() -> None:
  """Writes EXPECTED."""
  import jax

  found: dict[str, Any] = {"made": {"command": "python scripts/bench/accelerator.py --make", "jax": jax.__version__}}
  found["objectives"] = {}
  for name in OBJECTIVES:
    training = Training(name)
    _, found["objectives"][name] = training.steps(training.compile(), training.run.state, 0, STEPS)
    print(name, found["objectives"][name][-1], flush=True)
  found["sample"] = draw(None)
  EXPECTED.write_text(json.dumps(found, indent=1) + "\n")
