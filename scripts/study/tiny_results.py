"""Runs SPO, DPO and timestep-aware DPO on tiny-sd over several seeds and writes the table that the README shows.

    python scripts/study/tiny_results.py --seeds 2 --out docs/results/tiny_results

Each run is `python -m jaxpref.main --config=configs/NAME_tiny.py --config.seed=S` in runs/tiny_results/NAME_S; finished
runs are reused, interrupted ones resume. All are judged on the same test prompts and image seeds.

OUT_frontier.png shows how the preferred share rises along training and what it costs in captions, as each run
measures it on validation prompts on its way; OUT_frontier.json has the points.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np

NAMES = ("spo", "dpo", "tdpo")
TITLES = {"spo": "SPO", "dpo": "Diffusion-DPO", "tdpo": "timestep-aware DPO"}
ALLOWED_LOSS = 0.03  # of caption accuracy, in docs/results/tiny_tuning.json


def run(folder: pathlib.Path, name: str, seed: int) -> None:
  """Trains and evaluates in a folder, and adds up the time in its seconds.txt."""
  seconds = folder / "seconds.txt"
  before = float(seconds.read_text()) if seconds.exists() else 0.0  # of the parts of an interrupted run
  started = time.time()
  command = [sys.executable, "-m", "jaxpref.main", f"--config=configs/{name}_tiny.py", f"--config.seed={seed}"]
  try:
    subprocess.run([*command, f"--workdir={folder}"], check=True)
  finally:
    if folder.is_dir():
      seconds.write_text(f"{before + time.time() - started:.0f}\n")


def looks(folder: pathlib.Path) -> list[dict[str, float]]:
  """What a run measured on its way, from the base model at step 0 on."""
  from jaxpref.training import metrics

  names = ("preferred_share", "caption_accuracy")
  rows = metrics.read(folder / "metrics.jsonl")
  return [
    {"step": row["step"]} | {name: row[f"validation_{name}"] for name in names}
    for row in rows
    if "validation_preferred_share" in row
  ]


def mean_looks(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
  """Those of several seeds, averaged step by step."""
  return [
    {key: float(np.mean([look[key] for look in of_step])) for key in of_step[0]} for of_step in zip(*runs, strict=True)
  ]


def plot(frontier: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
  """Share against caption accuracy along training: of each method the mean over seeds, and thinly each seed."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
  base: dict[str, float] = {}
  for i, (name, found) in enumerate(frontier.items()):
    lines = [(points, 0.4, None) for points in found["seeds"]] + [(found["mean"], 1.8, TITLES.get(name, name))]
    for points, width, label in lines:
      x, y = ([100 * p[k] for p in points] for k in ("caption_accuracy", "preferred_share"))
      axis.plot(x, y, color=f"C{i}", linewidth=width, label=label, marker="." if label else None)
    axis.annotate(f"step {found['mean'][-1]['step']:.0f}", (x[-1], y[-1]), fontsize=7, color=f"C{i}")
    base = found["mean"][0]
  axis.plot(100 * base["caption_accuracy"], 100 * base["preferred_share"], "k*", markersize=11, label="base")
  axis.axvline(100 * (base["caption_accuracy"] - ALLOWED_LOSS), color="0.7", linestyle="--", linewidth=0.8)
  axis.set(xlabel="caption accuracy, %", ylabel="share of the preferred style, %")
  axis.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--names", nargs="+", default=NAMES)
  parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/tiny_results"))
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results/tiny_results"))
  args = parser.parse_args()

  rows = []
  for name in args.names:
    for seed in range(args.seeds):
      folder = args.runs / f"{name}_{seed}"
      if not (folder / "results.json").exists():
        run(folder, name, seed)
      results = json.loads((folder / "results.json").read_text())
      seconds = folder / "seconds.txt"
      rows.append(
        {
          "name": name,
          "seed": seed,
          "minutes": float(seconds.read_text()) / 60 if seconds.exists() else None,
          "base_preferred_share": results["base"]["preferred_share"]["mean"],
          "base_caption_accuracy": results["base"]["caption_accuracy"]["mean"],
          "preferred_share": results["aligned"]["preferred_share"]["mean"],
          "win_rate": results["win_rate"],
          "win_rate_interval": results["win_rate_interval"],
          "caption_accuracy": results["aligned"]["caption_accuracy"]["mean"],
          "caption_accuracy_change": results["caption_accuracy_change"],
          "protocol": results["protocol"],
        }
      )
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
  args.out.with_suffix(".md").write_text(table(rows))
  print(table(rows))

  frontier: dict[str, dict[str, Any]] = {}
  for name in args.names:
    seeds = [looks(args.runs / f"{name}_{seed}") for seed in range(args.seeds)]
    frontier[name] = {"mean": mean_looks(seeds), "seeds": seeds}
  path = args.out.with_name(f"{args.out.name}_frontier")
  path.with_suffix(".json").write_text(json.dumps(frontier, indent=1) + "\n")
  plot(frontier, path.with_suffix(".png"))


def table(rows: list[dict]) -> str:
  """Markdown: per method the mean over seeds, lowest and highest seed, and each seed's interval of the win rate."""
  lines = [
    "| method | preferred share | win rate against base (seeds: 95 % interval over prompts) "
    "| caption accuracy | minutes |",
    "|---|---|---|---|---|",
    f"| base | {rows[0]['base_preferred_share']:.1%} | | {rows[0]['base_caption_accuracy']:.1%} | |",
  ]

  def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"

  for name in dict.fromkeys(r["name"] for r in rows):
    mine = [r for r in rows if r["name"] == name]
    intervals = ", ".join(f"{low:.0%}-{high:.0%}" for low, high in (r["win_rate_interval"] for r in mine))
    minutes = [r["minutes"] for r in mine if r["minutes"] is not None]
    lines.append(
      f"| {name} | {spread([r['preferred_share'] for r in mine])} "
      f"| {spread([r['win_rate'] for r in mine])} [{intervals}] "
      f"| {spread([r['caption_accuracy'] for r in mine])} | {f'{np.mean(minutes):.1f}' if minutes else ''} |"
    )
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
