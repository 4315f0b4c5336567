"""Measures what each optimisation of the training step is worth: with it and without it, in turns, in one process.

    python scripts/bench/measure_optimizations.py --out docs/results/optimizations
    python scripts/bench/measure_optimizations.py --only "GroupNorm" --rounds 20
    python scripts/bench/measure_optimizations.py --topology h200 --out docs/results/optimizations_h200

writes OUT.json and OUT.md. Steps are those of configs/dpo_tiny.py and configs/spo_tiny.py on the shipped models; each
optimisation is taken away by replacing one function, and the gradient's norm must stay what it was. Times are of pairs
of steps, one with and one without, in turns, after one of each; of the pairs' ratios the table has median and
quartiles. TFLOP are counted (`jaxpref.planning.flops`, bodies of SPO's loop over updates as often as they ran),
temporaries are the compiler's.

With --topology (see `jaxpref.compile`; the device may be absent) two blocks of SD1.5's UNet are compiled with and
without, forward and gradient, batch 8 in bfloat16 at 64 x 64 x 320, and the bytes that they read and write are counted
in units of that array, and activations that are transposed or copied. Attention itself, a kernel of its own, is left
out there.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
HUGE_PAGES = "GLIBC_TUNABLES"


@dataclasses.dataclass(frozen=True)
class Optimization:
  """One row: the recipe that shows it, its replacement, and the context in which that is traced.

  `exact` is False if it also changes the gradient.
  """

  name: str
  recipe: str
  instead: str
  without: Callable[[], contextlib.AbstractContextManager[Any]]
  exact: bool = True


@contextlib.contextmanager
def separate_passes() -> Iterator[None]:
  """Treats every transition pair as one whose winner and loser start from different latents."""
  import jax
  import jax.numpy as jnp

  from jaxpref.objectives import spo

  original = spo.transition_loss

  def unshared(model, loss_fn, weights, ref_weights, shared, separate, *args, **options):
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), shared, separate)
    nothing = jax.tree.map(lambda a: a[:0], shared)
    return original(model, loss_fn, weights, ref_weights, nothing, joined, *args, **options)

  with mock.patch.object(spo, "transition_loss", unshared):
    yield


@contextlib.contextmanager
def all_pairs() -> Iterator[None]:
  """Lets pairs below the threshold take part in the updates: shows their cost if only a mask leaves them out."""
  import jax.numpy as jnp

  from jaxpref.training import step

  original = step._shuffled

  def shuffled(transitions, key):
    found = original(transitions, key)
    return found._replace(valid=jnp.asarray(found.order.shape[0]))

  with mock.patch.object(step, "_shuffled", shuffled):
    yield


@contextlib.contextmanager
def one_candidate_at_a_time() -> Iterator[None]:
  """Calls the denoiser on one candidate of each pool after the other, without and with the prompt in turn."""
  import jax

  from jaxpref.models import base
  from jaxpref.objectives import spo

  def guided(predict, uncond, scale):
    def apply(x, t, cond):
      prompts = load_config("spo").batch_size
      pieces = x.shape[0] // prompts
      cut = lambda v: v.reshape(prompts, pieces, *v.shape[1:]).swapaxes(0, 1)  # noqa: E731

      def of_piece(piece):
        x, t, cond = piece
        without = predict(x, t, base.repeat_cond(uncond, x.shape[0]))
        return without + scale * (predict(x, t, cond) - without)

      eps = jax.lax.map(of_piece, jax.tree.map(cut, (x, jax.numpy.broadcast_to(t, x.shape[:1]), cond)))
      return eps.swapaxes(0, 1).reshape(x.shape)

    return apply

  original = spo.SPO.rollout

  def rollout(self, *args):
    with mock.patch.object(spo, "guided", guided):  # in the rollout alone
      return original(self, *args)

  with mock.patch.object(spo.SPO, "rollout", rollout):
    yield


@contextlib.contextmanager
def gradients_of_jax() -> Iterator[None]:
  """Gives 3x3 convolutions the gradient that jax.grad writes."""
  import jax

  from jaxpref.models import resnet

  def conv(x, kernel, stride, pad):
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  with mock.patch.object(resnet, "_conv", conv):
    yield


@contextlib.contextmanager
def products_of_flax() -> Iterator[None]:
  """Computes Dense layers and 1x1 convolutions like flax, on all leading axes."""
  import jax

  from jaxpref.models import resnet

  def product(x, kernel, dimension_numbers, *, tensor_axis=None, **options):
    return jax.lax.dot_general(x, kernel, dimension_numbers, **options)

  with mock.patch.object(resnet, "flat_dot_general", product):
    yield


@contextlib.contextmanager
def reshaped_groups() -> Iterator[None]:
  """Computes GroupNorm by a reshape to [..., groups, channels / groups]."""
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from jaxpref.models import attention, resnet, unet, vae

  class GroupNorm(nn.Module):
    num_groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
      channels = x.shape[-1]
      scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
      bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
      groups = x.astype(jnp.float32).reshape(*x.shape[:-1], self.num_groups, -1)
      axes = (*range(1, x.ndim - 1), x.ndim)
      groups = groups - groups.mean(axes, keepdims=True)
      groups = groups * jax.lax.rsqrt(jnp.square(groups).mean(axes, keepdims=True) + self.epsilon)
      full = (1,) * (x.ndim - 1) + (channels,)
      return (groups.reshape(x.shape) * scale.reshape(full) + bias.reshape(full)).astype(self.dtype)

  with contextlib.ExitStack() as stack:
    for module in (attention, resnet, unet, vae):
      stack.enter_context(mock.patch.object(module, "GroupNorm", GroupNorm))
    yield


@contextlib.contextmanager
def two_passes() -> Iterator[None]:
  """Computes GroupNorm of half precision like that of float32: first the mean, then the variance."""
  import jax.numpy as jnp
  from flax import linen as nn

  from jaxpref.models import resnet

  class GroupNorm(resnet.GroupNorm):
    @nn.compact
    def __call__(self, x):
      return super().__call__(x.astype(jnp.float32))

  with mock.patch.object(resnet, "GroupNorm", GroupNorm):
    yield


@contextlib.contextmanager
def gradient_of_halves() -> Iterator[None]:
  """Gives GEGLU the gradient that jax.grad writes."""
  import jax.numpy as jnp

  from jaxpref.models import attention

  with mock.patch.object(attention, "_geglu", lambda y: attention._gated(*jnp.split(y, 2, axis=-1))):
    yield


@contextlib.contextmanager
def options_of_xla() -> Iterator[None]:
  """Compiles with XLA's default options."""
  from jaxpref.devices import chips

  with mock.patch.object(chips, "compiler_options", lambda: None):
    yield


OPTIMIZATIONS = (
  Optimization("winner and loser of one latent share a pass", "spo", "a pass for each", separate_passes),
  Optimization("pairs below the threshold cost nothing", "spo", "they are computed, too", all_pairs, False),
  Optimization("candidates and guidance in one batch", "spo", "one after the other", one_candidate_at_a_time),
  Optimization("a convolution's own gradient (CPU)", "spo", "that of jax.grad", gradients_of_jax),
  Optimization("a convolution's own gradient (CPU)", "dpo", "that of jax.grad", gradients_of_jax),
  Optimization("Dense layers on one merged axis", "dpo", "flax's", products_of_flax),
  Optimization("GroupNorm by sums of channels", "dpo", "by a reshape to groups", reshaped_groups),
  Optimization("compiled without YNNPACK (CPU)", "spo", "with it, as XLA does by itself", options_of_xla),
  Optimization("compiled without YNNPACK (CPU)", "dpo", "with it, as XLA does by itself", options_of_xla),
  Optimization("huge pages (CPU)", "dpo", "pages of 4 kB", contextlib.nullcontext),
  Optimization("huge pages (CPU)", "spo", "pages of 4 kB", contextlib.nullcontext),
)


# Name, block, what stands in its place.
OF_BLOCKS = (
  ("GroupNorm's variance in one pass (half precision)", "ResnetBlock2D", two_passes),
  ("GEGLU's gradient written once", "BasicTransformerBlock", gradient_of_halves),
)


def block_costs(block: str, topology: str, without: Callable[[], contextlib.AbstractContextManager[Any]]):
  """Returns bytes read and written, and temporaries, in arrays: of a forward pass and of the gradient of two blocks."""
  import jax
  import jax.numpy as jnp

  from jaxpref import compile as compile_lib
  from jaxpref.devices import chips
  from jaxpref.models import attention, resnet
  from jaxpref.planning import hlo

  device = compile_lib.topology_devices(topology)[0]
  chip = chips.CHIPS[topology.partition(":")[0]]
  # On GPUs with Triton's products, as training has them.
  options = {} if chip.gpu is not None else compile_lib.compiler_options(chip, quick=True)
  sharding = jax.sharding.SingleDeviceSharding(device)
  shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=sharding)  # noqa: E731
  if block == "ResnetBlock2D":
    layer: Any = resnet.ResnetBlock2D(320, num_groups=32, epsilon=1e-5, dtype=jnp.bfloat16)
    inputs = (shape(8, 64, 64, 320), shape(8, 1280))
  else:
    layer = attention.BasicTransformerBlock(8, dtype=jnp.bfloat16)
    inputs = (shape(8, 64 * 64, 320), shape(8, 77, 768))

  def no_attention(q, k, v, mask=None):
    return q * v if q.shape == v.shape else q * jnp.mean(v, axis=1, keepdims=True) * jnp.mean(k, axis=1, keepdims=True)

  with without(), mock.patch.object(attention, "attention", no_attention):
    params = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda p: shape(*p.shape, dtype=jnp.float32), params)
    apply = lambda params, x, other: layer.apply(params, x, other)  # noqa: E731
    loss = lambda p, x, other: jnp.sum(apply(p, apply(p, x, other), other).astype(jnp.float32) ** 2)  # noqa: E731
    found = {}
    for name, function in (("forward", apply), ("gradient of two", jax.grad(loss, argnums=(0, 1)))):
      program: Any = jax.jit(function).lower(params, *inputs).compile(compiler_options=options)
      array, text = 8 * 64 * 64 * 320 * 2, program.as_text()
      found[name] = {
        "arrays": hlo.memory_bytes(text) / array,
        "temporaries": program.memory_analysis().temp_size_in_bytes / array,
        "transposed_activations": len(transposed(text, of_batch=8)),
      }
  return found


def transposed(text: str, *, of_batch: int) -> list[str]:
  """Returns the results of a compiled program's transposes and copies with a dimension of this size: `bf16[8,64]`."""
  results = re.findall(r"= (\w+\[[\d,]*\])\S* (?:transpose|copy)\(", text)
  return [result for result in results if str(of_batch) in re.findall(r"\d+", result.partition("[")[2])]


def block_table(rows: list[dict[str, Any]]) -> str:
  """Returns OUT.md of --topology."""
  lines = ["| optimisation | block | pass | arrays read, written | without | temporaries | without | transposed |"]
  lines.append("|---|---|---|---|---|---|---|---|")
  for row in rows:
    for name, used in row["with"].items():
      other = row["without"][name]
      arrays = (used["arrays"], other["arrays"], used["temporaries"], other["temporaries"])
      cells = " | ".join([*(f"{a:.1f}" for a in arrays), str(used["transposed_activations"])])
      lines.append(f"| {row['name']} | {row['block']} | {name} | {cells} |")
  return "\n".join(lines) + "\n"


def prepare(config: Any, without: Callable[[], contextlib.AbstractContextManager[Any]]) -> dict[str, Any]:
  """Compiles the step of a config as traced in `without()`: a function that makes one step, and its costs.

  The step starts from the same state every time, so that all steps cost the same.
  """
  import jax

  from jaxpref.devices import chips, sharding
  from jaxpref.planning import flops
  from jaxpref.training import build, programs

  mesh = sharding.make_mesh(**config.mesh)
  experiment = build.build(config, lambda tree: sharding.tree_shardings(mesh, tree))
  optimizer, _ = programs.make_optimizer(config)
  state = jax.jit(programs.state_initializer(experiment, optimizer))(experiment.params)
  frozen, batch = experiment.frozen, jax.device_put(next(experiment.batches()))
  with without():
    step = programs.make_step(config, experiment, optimizer, mesh)
    traced = jax.jit(step, compiler_options=chips.compiler_options()).trace(state, frozen, batch)
    program = traced.lower().compile()
  _, metrics = jax.block_until_ready(program(state, frozen, batch))

  def seconds() -> float:
    """Returns the seconds of one step."""
    started = time.perf_counter()
    jax.block_until_ready(program(state, frozen, batch))
    return time.perf_counter() - started

  trips = float(metrics.get("updates", 1.0))
  costs = {
    "tflop": flops.of_jaxpr(traced.jaxpr.jaxpr, while_trips=trips) / 1e12,
    "temporary_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
    "grad_norm": float(metrics["grad_norm"]),
    "updates": trips,
  }
  return {"seconds": seconds, "costs": costs}


def load_config(recipe: str) -> Any:
  """Returns the recipe on tiny-sd, without what costs time beside the step."""
  import importlib

  config = importlib.import_module(f"configs.{recipe}_tiny").get_config()
  config.judge = None
  return config


def measure(optimization: Optimization, rounds: int) -> dict[str, Any]:
  """Returns one row: costs with and without, and the seconds of pairs of steps in turns."""
  if optimization.name.startswith("huge pages"):
    both = [_timed_in_a_process(optimization.recipe, huge, rounds) for _ in range(2) for huge in (True, False)]
    used = [s for row in both[::2] for s in row["seconds"]]
    other = [s for row in both[1::2] for s in row["seconds"]]
    costs = [both[0]["costs"], both[1]["costs"]]
  else:
    config = load_config(optimization.recipe)
    sides = [prepare(config, context) for context in (contextlib.nullcontext, optimization.without)]
    costs = [side["costs"] for side in sides]
    times = [(sides[0]["seconds"](), sides[1]["seconds"]()) for _ in range(rounds)]
    used, other = ([pair[i] for pair in times] for i in (0, 1))
  norms = [side["grad_norm"] for side in costs]
  if optimization.exact and abs(norms[1] / norms[0] - 1) > 1e-3:
    raise RuntimeError(f"{optimization.name}: the gradient's norm is {norms[1]} without it, {norms[0]} with it.")
  ratios = np.array(other) / np.array(used)
  return {
    "name": optimization.name,
    "recipe": optimization.recipe,
    "instead": optimization.instead,
    "with": costs[0] | {"seconds": used},
    "without": costs[1] | {"seconds": other},
    "ratio": float(np.median(ratios)),
    "quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
  }


def _timed_in_a_process(recipe: str, huge: bool, rounds: int) -> dict[str, Any]:
  environment = os.environ | {HUGE_PAGES: "glibc.malloc.hugetlb=1" if huge else "glibc.malloc.hugetlb=0"}
  options = ["--time", recipe, "--rounds", str(rounds)]
  done = subprocess.run([sys.executable, __file__, *options], env=environment, check=True, stdout=subprocess.PIPE)
  return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the text of OUT.md."""
  lines = [
    "| optimisation | recipe | instead | s with | s without | without / with (quartiles) | TFLOP with, without |"
    " temporaries, MiB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    a, b = row["with"], row["without"]
    low, high = row["quartiles"]
    lines.append(
      f"| {row['name']} | {row['recipe']} | {row['instead']} | {np.median(a['seconds']):.3g} |"
      f" {np.median(b['seconds']):.3g} | **{row['ratio']:.2f}** ({low:.2f} to {high:.2f}) |"
      f" {a['tflop']:.3g}, {b['tflop']:.3g} | {a['temporary_mib']:.0f}, {b['temporary_mib']:.0f} |"
    )
  return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default="", help="optimisations whose name or recipe contains this")
  parser.add_argument("--rounds", type=int, default=8, help="pairs of steps (default: %(default)s)")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "optimizations", help="default: %(default)s")
  parser.add_argument("--topology", help="count what blocks read and write there, such as h200 or v5e:2x2; no clock")
  parser.add_argument("--time", metavar="RECIPE", help="only time the step of a recipe, and print it as JSON")
  args = parser.parse_args(arguments)
  sys.path.insert(0, str(ROOT))
  if args.time:
    side = prepare(load_config(args.time), contextlib.nullcontext)
    print(json.dumps({"costs": side["costs"], "seconds": [side["seconds"]() for _ in range(args.rounds)]}))
    return
  rows: list[dict[str, Any]] = []
  if args.rounds < 1:
    parser.error(f"--rounds={args.rounds}: expected at least 1.")
  if not any(args.only in f"{o.name} {o.recipe}" for o in OPTIMIZATIONS):
    parser.error(f"--only={args.only!r} is in the name or recipe of no optimisation.")
  if args.topology:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an absent device is not started
    for name, block, without in OF_BLOCKS:
      try:
        used, other = (block_costs(block, args.topology, context) for context in (contextlib.nullcontext, without))
      except ValueError as error:  # of the topology
        parser.error(str(error))
      rows.append({"name": name, "block": block, "topology": args.topology, "with": used, "without": other})
    _write(args.out, rows, block_table(rows))
    print(block_table(rows))
    return
  for optimization in OPTIMIZATIONS:
    if args.only in f"{optimization.name} {optimization.recipe}":
      print(f"{optimization.name}, {optimization.recipe} ...", file=sys.stderr, flush=True)
      rows.append(measure(optimization, args.rounds))
      _write(args.out, rows, table(rows))
  print(table(rows))


def _write(out: pathlib.Path, rows: list[dict[str, Any]], text: str) -> None:
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
  out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
  main()
