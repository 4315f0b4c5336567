"""What a run of scripts/study/study.py leaves behind: its row of numbers, read, kept and restored."""

import dataclasses
import functools
import itertools
import json
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.study import ground, measure
from scripts.study.study_variants import BY_NAME, VARIANTS, Run, changes, evaluations, load_config


def base_folder(folder: pathlib.Path) -> pathlib.Path:
  """Returns where the base model's pictures were scored."""
  return folder / "base"


def read_run(run: Run, folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns a run's numbers, only `failed` of one that became NaN, None without a result.

  Variants that are trained the same way, with the same values, share their runs.

  Raises:
    ValueError: the folder has a run of other fields.
  """
  place = folder / run.path
  told = {"variant": run.variant.name, "seed": run.seed, "split": run.split, "fields": changes(run.variant)}
  told |= {"learning_rate": run.learning_rate, "beta": run.beta}
  if (place / "row.json").is_file():
    row = json.loads((place / "row.json").read_text())
    if any(row.get(name) != value for name, value in told.items()):
      raise ValueError(f"The row of {run.path} was made with other fields, expected {told}; move it away.")
    return row
  for other in (v for v in VARIANTS if v.name != run.variant.name and v.trained == run.variant.trained):
    file = folder / dataclasses.replace(run, variant=other).path / "row.json"
    if file.is_file():
      return json.loads(file.read_text()) | told
  failed, base = place / "failed.txt", base_folder(folder) / f"{run.split}.npz"
  if not failed.is_file() and not ((place / f"{run.split}.npz").is_file() and base.is_file()):
    return None
  if failed.is_file() and not (place / "config.json").is_file():
    return told | {"failed": failed.read_text().strip()}
  config = json.loads((place / "config.json").read_text())
  of_config = lambda name: functools.reduce(lambda node, key: node.get(key, {}), name.split("."), config)
  for name, value in run.fields(folder).items():
    if of_config(name) != value:
      raise ValueError(f"{place} was made with config.{name}={of_config(name)!r}, expected {value!r}; move it away.")
  if failed.is_file():
    return told | {"failed": failed.read_text().strip()}
  metrics = [json.loads(m) for m in (place / "metrics.jsonl").read_text().split("\n") if m.endswith("}")]
  row = told | numbers(measure.read(place / f"{run.split}.npz"), measure.read(base), run.variant.hidden)
  row |= cost(run, metrics)
  last = [m for m in metrics if m["step"] > 0.6 * metrics[-1]["step"]]  # by range of t, in the last two fifths
  for name in sorted(k for k in metrics[-1] if k.startswith(("margin_bin", "loss_bin"))):
    row[name] = float(np.mean([m[name] for m in last if name in m]))
  if moved := [m for m in metrics if "divergence" in m]:
    # Of the last proposal between two rows D is known; that was accepted if all between them were.
    tau = config["reference"]["tau"]
    proposed = lambda a, b: b["step"] // tau - a["step"] // tau
    accepted = lambda a, b: b["reference_updates"] - a["reference_updates"]
    passed = [b["divergence"] for a, b in itertools.pairwise(moved) if accepted(a, b) == proposed(a, b) > 0]
    row |= {"last_d": moved[-1]["divergence"], "largest_d": max(m["divergence"] for m in moved)}
    row |= {"accepted_d": max(passed, default=None), "moves": moved[-1]["reference_updates"]}
  _write_row(place / "row.json", row)
  return row


def _write_row(file: pathlib.Path, row: dict[str, Any]) -> None:
  """Writes a row so that the file is whole or not there; another thread may read it, or write the same."""
  part = file.with_name(f"{file.name}.{threading.get_ident()}.part")
  part.write_text(json.dumps(row) + "\n")
  part.replace(file)


def numbers(found: dict[str, np.ndarray], base: dict[str, np.ndarray], hidden: str) -> dict[str, float]:
  """Returns what is reported of scores f32[P, S], beside those of the base model from the same noise.

  `share` is of pictures in the preferred style, or whose caption is the likeliest of all. `share_64` is that of the
  first 64 prompts, as many as the study before this one had. `win_rate` is of pictures whose hidden score is above
  the base model's, ties a half, `gain` the mean change of that score, and `captions` the change of caption accuracy.
  `other_share` is the change of the share of the preference that was not asked for. `error` is the standard error of
  share minus the base model's share over prompts.
  """
  other = next(h for h in ground.HIDDEN if h != hidden)
  change = found[f"{hidden}_share"].mean(axis=1) - base[f"{hidden}_share"].mean(axis=1)
  won = (found[hidden] > base[hidden]) + 0.5 * (found[hidden] == base[hidden])
  return {
    "share": float(found[f"{hidden}_share"].mean()),
    "share_64": float(found[f"{hidden}_share"][:64].mean()),
    "base_share": float(base[f"{hidden}_share"].mean()),
    "error": float(change.std(ddof=1) / len(change) ** 0.5),
    "win_rate": float(won.mean()),
    "gain": float((found[hidden] - base[hidden]).mean()),
    "captions": float(found["correct"].mean() - base["correct"].mean()),
    "other_share": float(found[f"{other}_share"].mean() - base[f"{other}_share"].mean()),
  }


def cost(run: Run, metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Returns minutes of training by the median step, UNet evaluations, and updates."""
  config = load_config(run.variant)
  images = config.batch_size * {"dpo": 2, "tdpo": 2}.get(config.objective, 1)
  # The first row's time has what is done once. The median, since other work on the machine may have slowed some.
  times = [images / m["images_per_second"] for m in metrics[1:]]
  valid = float(np.mean([m["valid_pairs"] for m in metrics])) if run.variant.online else 1.0
  updates = float(np.mean([m["updates"] for m in metrics])) if run.variant.online else 1.0
  return {
    "minutes": float(np.median(times)) * config.num_steps / 60 if times else 0.0,
    "evaluations": evaluations(config, valid),
    "updates": updates * config.num_steps,
    "valid_pairs": valid,
  }


def restore(file: pathlib.Path, folder: pathlib.Path) -> int:
  """Puts the rows of a papers.json into `folder`, where they count as runs that are done; returns their number.

  Raises:
    ValueError: it is no papers.json, or has a run of a variant that there is not.
  """
  try:
    study = json.loads(file.read_text())
    rows = [*itertools.chain(*study["runs"].values(), *study["tuning"].values())]
    runs = [Run(BY_NAME[r["variant"]], r["learning_rate"], r["beta"], r["seed"], r["split"]) for r in rows]
    of_rows = [dict(r["fields"]) for r in rows]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{file} cannot be read ({error!r}); expected a papers.json of scripts/study/study.py.") from error
  count = 0
  for run, fields in zip(runs, of_rows, strict=True):
    if fields != changes(run.variant):
      raise ValueError(f"{file} has {run.path} with other fields than it has now; remove that row.")
  for run, row in zip(runs, rows, strict=True):
    if not (folder / run.path / "row.json").is_file():
      (folder / run.path).mkdir(parents=True, exist_ok=True)
      _write_row(folder / run.path / "row.json", row)
      count += 1
  return count
