"""Runs SPO, DPO and timestep-aware DPO on tiny-sd over several seeds and writes the table that the README shows.

    python scripts/tiny_results.py --seeds 3 --out docs/tiny_results

Each run is `python -m jaxpref.main --config=configs/NAME_tiny.py --config.seed=S` in runs/tiny_results/NAME_S; finished
runs are reused, interrupted ones resume. All are judged on the same test prompts and image seeds.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

NAMES = ("spo", "dpo", "tdpo")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--names", nargs="+", default=NAMES)
  parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/tiny_results"))
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/tiny_results"))
  args = parser.parse_args()

  rows = []
  for name in args.names:
    for seed in range(args.seeds):
      folder = args.runs / f"{name}_{seed}"
      started = time.time()
      if not (folder / "results.json").exists():
        seconds = folder / "seconds.txt"
        before = float(seconds.read_text()) if seconds.exists() else 0.0  # of the parts of an interrupted run
        try:
          subprocess.run(
            [
              sys.executable, "-m", "jaxpref.main", f"--config=configs/{name}_tiny.py", f"--config.seed={seed}",
              f"--workdir={folder}",
            ],
            check=True,
          )  # fmt: skip
        finally:
          if folder.is_dir():
            seconds.write_text(f"{before + time.time() - started:.0f}\n")
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
