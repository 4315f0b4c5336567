"""Times what it takes to score one candidate for LPO and for SPO, at full size on the CPU, with made-up weights.

    python scripts/bench/time_lpo.py --out=docs/results/lpo_time.json

The parts are those of scripts/bench/count_lpo.py, one picture each, in float32. They take turns; a part's time is the
median over the turns. The ratios are beside those of the count.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from scripts.bench import count_lpo  # noqa: E402


def fill(tree: Any) -> Any:
  """Returns arrays of the shapes of a tree: small random floats, and zeros of other types."""
  rng = np.random.default_rng(0)

  def leaf(of: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(of.dtype, jnp.floating):
      return jnp.asarray(rng.standard_normal(of.shape, np.float32) * 0.02, of.dtype)
    return jnp.zeros(of.shape, of.dtype)

  return jax.tree.map(leaf, tree)


def seconds(fn: Callable[[], Any]) -> float:
  """Returns the wall time of a call whose result is waited for."""
  start = time.perf_counter()
  jax.block_until_ready(fn())
  return time.perf_counter() - start


def measure(preset_name: str, turns: int) -> dict[str, Any]:
  """Returns the seconds of each part: their median, and all of them.

  Args:
    preset_name: a name of `presets.PRESETS`.
    turns: number of measurements of each part.
  """
  calls: dict[str, Callable[[], Any]] = {}
  for name, (fn, shapes) in count_lpo.candidate_parts(preset_name).items():
    compiled, args = jax.jit(fn).lower(*shapes).compile(), fill(shapes)
    calls[name] = functools.partial(compiled, *args)
    print(f"{preset_name}: {name} is compiled; first call {seconds(calls[name]):.1f} s", file=sys.stderr, flush=True)
  found: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(turns):
    for name, call in calls.items():
      found[name].append(seconds(call))
  return {name: {"median": statistics.median(values), "all": values} for name, values in found.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json")
  parser.add_argument("--models", nargs="+", choices=sorted(count_lpo.RECIPES), default=["sd15"])
  parser.add_argument("--turns", type=int, default=5)
  args = parser.parse_args()
  if args.turns < 1:
    parser.error(f"--turns={args.turns}: expected at least 1.")
  if args.out and not args.out.parent.is_dir():
    parser.error(f"--out={args.out}: there is no folder {args.out.parent}; make it first.")
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  command = f"python scripts/bench/time_lpo.py --models {' '.join(args.models)} --turns={args.turns}"
  result: dict[str, Any] = {"command": command, "unit": "seconds of one picture, float32", "cores": cores}
  for name in args.models:
    found = measure(name, args.turns)
    medians = {part: of["median"] for part, of in found.items()}
    scores = count_lpo.of_scores(medians, count_lpo.RECIPES[name][0].get_config().spo.pool_size)
    ratios = {what: value / medians["latent reward"] for what, value in scores.items()}
    result[name] = {"parts": found, "scores": scores, "ratios to the latent reward": ratios}
    print(json.dumps({name: {"medians": medians, "scores": scores, "ratios": ratios}}, indent=1))
  if args.out:
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
