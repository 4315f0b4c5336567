"""Measures how the cost of a training step grows with pairs, prompts, denoising steps and pool size.

    python scripts/bench/measure_linearity.py --out docs/results/linearity

writes OUT.json and OUT.md: for each of them a straight line through the counts (`jaxpref.planning.flops`, of the steps
of configs/dpo_tiny.py and configs/spo_tiny.py; nothing is computed), and how far the counts are from it at most. SPO's
updates are those of an iteration in which every pair is valid.
"""

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What grows: recipe, field, its values, and fields that hold all else as it was.
AXES: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any]]] = {
  "pairs": ("dpo", "batch_size", (4, 8, 16, 32, 64), {}),
  "prompts": ("spo", "batch_size", (4, 8, 16, 32), {}),
  "denoising steps": ("spo", "spo.num_inference_steps", (10, 20, 30, 50), {"spo.warmup_steps": 4}),
  "pool size": ("spo", "spo.pool_size", (2, 4, 8, 16), {}),
}


def operations(recipe: str, fields: Mapping[str, Any]) -> float:
  """Returns the operations of one step of the recipe with these fields."""
  import jax

  from jaxpref.devices import sharding
  from jaxpref.objectives import catalog
  from jaxpref.planning import flops, plan

  config = importlib.import_module(f"configs.{recipe}_tiny").get_config()
  config.update_from_flattened_dict(dict(fields))
  config.model = "random:tiny-sd"
  if recipe == "spo":
    config.preference_model = "random:tiny-sd"
    config.spo.minibatch = config.batch_size  # updates that all take the same, so that none is filled up
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  config = plan.without_weights(config)
  step, *inputs = plan.abstract_inputs(config, mesh)
  trips = catalog.method(config).updates(config).count if recipe == "spo" else 1.0
  return flops.of_jaxpr(jax.make_jaxpr(step)(*inputs).jaxpr, while_trips=trips)


def fit(values: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
  """Fits a straight line by least squares; `deviation` is the largest distance of a count from it, over the count."""
  slope, intercept = np.polyfit(values, counts, 1)
  line = slope * np.array(values) + intercept
  deviation = np.max(np.abs(line / np.array(counts) - 1))
  return {"slope": float(slope), "intercept": float(intercept), "deviation": float(deviation)}


def measure(name: str) -> dict[str, Any]:
  """Returns one row."""
  recipe, field, values, fields = AXES[name]
  counts = [operations(recipe, fields | {field: value}) for value in values]
  return {"name": name, "recipe": recipe, "field": field, "values": values, "flop": counts, **fit(values, counts)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the text of OUT.md."""
  lines = ["| what grows | recipe | values | GFLOP | line | furthest from it |", "|---|---|---|---|---|---|"]
  for row in rows:
    values, counts = (", ".join(f"{v:.4g}" for v in vs) for vs in (row["values"], np.array(row["flop"]) / 1e9))
    line = f"{row['intercept'] / 1e9:.3g} + {row['slope'] / 1e9:.4g} n"
    lines.append(f"| {row['name']} | {row['recipe']} | {values} | {counts} | {line} | {row['deviation']:.1e} |")
  return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "linearity", help="default: %(default)s")
  args = parser.parse_args(arguments)
  sys.path.insert(0, str(ROOT))
  rows = [measure(name) for name in AXES]
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
  args.out.with_suffix(".md").write_text(table(rows))
  print(table(rows))


if __name__ == "__main__":
  main()
