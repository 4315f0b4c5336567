"""Chooses the settings of the three recipes of tiny-sd on the validation prompts, and plots what they trade for what.

    python scripts/tiny_tuning.py --out docs/tiny_tuning

Every setting trains once (seed 100, runs/tiny_tuning/METHOD_NAME; finished runs are reused). Along the way the share of
the preferred style and the caption accuracy are measured on the same 64 validation prompts and noise, two pictures of
each. Of all settings and steps of a method the rule takes the one with the highest share among those whose caption
accuracy is at most LOSS points below the base model's. OUT.json has all points and the choices, OUT.png the plot.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

LOSS = 0.03  # of 5 points that are allowed: 128 pictures do not tell 3 from 5
SEED = 100
COMMON = {"seed": SEED, "sample.num_prompts": 64, "sample.seeds_per_prompt": 2, "evaluation.num_prompts": 0}
# Method -> how long its runs are, and how often they are looked at.
LENGTH: dict[str, dict[str, Any]] = {
  "spo": {"num_steps": 40, "sample.every": 4},
  "dpo": {"num_steps": 300, "sample.every": 30},
  "tdpo": {"num_steps": 300, "sample.every": 30},
}
# Method -> setting -> its fields; all else is the recipe's.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
  method: {f"rate {rate:.0e}": {"optimizer.learning_rate": rate} for rate in (2e-5, 4e-5)} for method in LENGTH
}


def points(folder: pathlib.Path) -> list[dict[str, float]]:
  """What a run measured along the way, the base model at step 0."""
  from jaxpref import metrics

  return [
    {
      "step": row["step"],
      "preferred_share": row["validation_preferred_share"],
      "caption_accuracy": row["validation_caption_accuracy"],
    }
    for row in metrics.read(folder / "metrics.jsonl")
    if "validation_preferred_share" in row
  ]


def choose(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The rule, on the rows of one method: setting, step and both measures."""
  found = []
  for row in rows:
    base = row["points"][0]["caption_accuracy"]
    allowed = [p for p in row["points"] if p["caption_accuracy"] >= base - LOSS - 1e-9]
    found += [{"setting": row["setting"], **p} for p in allowed]
  return max(found, key=lambda p: (p["preferred_share"], p["caption_accuracy"], -p["step"]))


def plot(rows: list[dict[str, Any]], chosen: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
  """One panel a method: share against caption accuracy along training, one line a setting."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  names = list(chosen)
  figure, axes = plt.subplots(
    1, len(names), figsize=(3.6 * len(names), 3.4), sharex=True, sharey=True, squeeze=False, layout="constrained"
  )
  for axis, name in zip(axes[0], names, strict=True):
    mine = [row for row in rows if row["method"] == name]
    for row in mine:
      x = [100 * p["caption_accuracy"] for p in row["points"]]
      y = [100 * p["preferred_share"] for p in row["points"]]
      taken = row["setting"] == chosen[name]["setting"]
      axis.plot(x, y, marker=".", linewidth=1.6 if taken else 0.7, label=row["setting"], zorder=3 if taken else 2)
    base = mine[0]["points"][0]
    axis.plot(100 * base["caption_accuracy"], 100 * base["preferred_share"], "k*", markersize=11, zorder=4)
    axis.axvline(100 * (base["caption_accuracy"] - LOSS), color="0.6", linestyle="--", linewidth=0.8)
    c = chosen[name]
    axis.plot(
      100 * c["caption_accuracy"], 100 * c["preferred_share"], "o", markersize=12, markerfacecolor="none", color="k"
    )
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("caption accuracy, %", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="lower left")
  axes[0][0].set_ylabel("share of the preferred style, %", fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
  parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/tiny_tuning"))
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/tiny_tuning"))
  args = parser.parse_args()
  rows = []
  for method in args.methods:
    for setting, fields in SETTINGS[method].items():
      folder = args.runs / f"{method}_{setting.replace(' ', '_')}"
      if not (folder / "export").is_dir():
        overrides = [f"--config.{k}={v}" for k, v in (COMMON | LENGTH[method] | fields).items()]
        command = [sys.executable, "-m", "jaxpref.main", f"--config=configs/{method}_tiny.py", *overrides]
        subprocess.run([*command, f"--workdir={folder}"], check=True)
      rows.append({"method": method, "setting": setting, "fields": fields, "points": points(folder)})
  chosen = {m: choose([row for row in rows if row["method"] == m]) for m in args.methods}
  args.out.parent.mkdir(parents=True, exist_ok=True)
  record = {"common": COMMON, "allowed_loss": LOSS, "length": LENGTH, "chosen": chosen, "rows": rows}
  args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
  plot(rows, chosen, args.out.with_suffix(".png"))
  for method, c in chosen.items():
    measures = f"share {c['preferred_share']:.1%}, captions {c['caption_accuracy']:.1%}"
    print(f"{method}: {c['setting']}, step {c['step']}: {measures}")


if __name__ == "__main__":
  main()
