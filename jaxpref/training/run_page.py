"""The page of a run, `index.html` in its work folder: results, pictures over time, curves, config and commands.

One file that needs no network. It is made from what the folder holds, so that a run that was interrupted has one, too
(`python -m jaxpref.show`). What it looks like is in evaluation/run.html.j2; here is what it shows.
"""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref import config as config_lib
from jaxpref.data import paths
from jaxpref.evaluation import page
from jaxpref.training import metrics

NAME = "index.html"
COMMANDS = "commands.txt"
# What curves show, of what there is.
CURVES = (
  "validation_reward", "validation_preferred_share", "validation_caption_accuracy",
  "loss", "implicit_accuracy", "reward", "valid_pairs", "margin", "divergence", "grad_norm",
)  # fmt: skip
POINTS = 400  # of a curve, at most
SIDE = 1600  # pixels: the longer side of a picture, at most
LOOKS = 12  # grids over time, at most
MAX_BYTES = 6 * 2**20  # of those grids, as they stand in the file


def value_text(name: str, value: float) -> str:
  """Returns a value of a metric: percent for shares and accuracies, four digits for others."""
  return page.share_text(value) if name.endswith(("share", "accuracy")) else page.score_text(value)


@dataclasses.dataclass(frozen=True)
class Curve:
  """A metric by step.

  Attributes:
    name: of the metric.
    points: (x, y) of what was measured, as shares of width and height from the lower left.
    smooth: the same of its running mean; empty where there are few points.
    low, high: values at the lower and the upper edge.
    first_step, last_step: at the left and the right edge.
    last: value at the end.
  """

  name: str
  points: tuple[tuple[float, float], ...]
  smooth: tuple[tuple[float, float], ...]
  low: float
  high: float
  first_step: int
  last_step: int
  last: float


def curve(name: str, rows: Sequence[Mapping[str, Any]]) -> Curve | None:
  """Returns the curve of a metric in rows of metrics.jsonl; None if fewer than two have it."""
  found = [(row["step"], row[name]) for row in rows if name in row]
  if len(found) < 2:
    return None
  steps, values = (np.array(part, np.float64) for part in zip(*found, strict=True))
  low, high = float(values.min()), float(values.max())
  reach, span = (high - low) or 1.0, (steps[-1] - steps[0]) or 1.0
  shares = lambda x, y: [
    (float((x[i] - steps[0]) / span), float((y[i] - low) / reach if high > low else 0.5))
    for i in np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
  ]
  window = len(values) // 12
  smooth = [] if window < 2 else shares(steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid"))
  ends = int(steps[0]), int(steps[-1])
  return Curve(name, tuple(shares(steps, values)), tuple(smooth), low, high, *ends, float(values[-1]))


@dataclasses.dataclass(frozen=True)
class Look:
  """The validation prompts, drawn after a step.

  Attributes:
    step: after which.
    picture: of all of them.
    means: metric -> value at that step.
  """

  step: int
  picture: page.Picture
  means: dict[str, float]


def looks(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Look], int]:
  """Returns pictures of samples/, the first and the last among them, and how many there are.

  Args:
    folder: of the run.
    rows: of metrics.jsonl.
  """
  files = {int(f.stem[5:]): f for f in folder.glob("samples/step_*.png") if f.stem[5:].isdigit()}
  steps = sorted(files)
  number = min(LOOKS, len(steps))
  while number:
    chosen = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, number).round().astype(int))]
    found, size = [], 0
    for step in chosen:
      if (picture := _picture(files[step])) is not None:
        means = {k: v for row in rows if row["step"] == step for k, v in row.items() if k.startswith("validation_")}
        found.append(Look(step, picture, means))
        size += len(picture.uri)
    if size <= MAX_BYTES or number <= 2:
      return found, len(steps)
    number = max(2, number // 2)  # the first and the last stay
  return [], 0


def _picture(file: pathlib.Path) -> page.Picture | None:
  """Returns a picture for the page; None where there is none, or half of one."""
  from PIL import Image

  limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a grid of large pictures is above it
  try:
    return page.encode(file, SIDE)
  except (FileNotFoundError, ValueError):
    return None
  finally:
    Image.MAX_IMAGE_PIXELS = limit


def in_words(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns in a sentence what became of a run, by its results or else by its metrics; "" where they say nothing."""
  return results.get("in_words") or _ranked_in_words(results) or _trained_in_words(rows)


def _ranked_in_words(results: Mapping[str, Any]) -> str:
  """Returns how a preference model ranks held-out pairs; "" for results of other runs."""
  if "validation_accuracy" not in results:
    return ""
  bins = [results[name] for name in sorted(results) if name.startswith("validation_accuracy_bin_")]
  by_noise = ""
  if len(bins) > 1:
    least, most = page.share_text(bins[0]), page.share_text(bins[-1])
    by_noise = f": {least} of those with the least noise, {most} of those with the most"
  every = page.share_text(results["validation_accuracy"])
  return f"It ranks {every} of the held-out pairs as they are labelled (chance: 50%){by_noise}."


def _trained_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns how a metric changed in a run that no judge looked at."""
  for name, what in (
    ("validation_reward", "the mean reward of the validation prompts"),
    ("implicit_accuracy", "the share of training pairs in which the model favours the winner"),
    ("reward", "the mean reward of what is drawn in training"),
    ("loss", "the loss"),
  ):
    values = [row[name] for row in rows if name in row]
    if len(values) < 2:
      continue
    # Those of validation are of the same prompts and noise; others are of a few records each.
    few = 1 if name.startswith("validation") else max(1, len(values) // 10)
    before, after = (value_text(name, float(np.mean(part))) for part in (values[:few], values[-few:]))
    steps = [row["step"] for row in rows if name in row]
    return f"From step {steps[0]} to {steps[-1]} {what} went from {before} to {after}."
  return ""


# ---- The config ------------------------------------------------------------------------------------------------------


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns fields by their dotted names.

  >>> flat({"loss": {"beta": 1.0}, "seed": 0})
  {'loss.beta': 1.0, 'seed': 0}
  """
  found: dict[str, Any] = {}
  for name, value in values.items():
    found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
  return found


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a run's config.json that differ from their defaults, by dotted name."""
  usual = flat(json.loads(json.dumps(config_lib.typed(config_lib.default()).to_dict())))
  missing = object()
  return {name: value for name, value in flat(config).items() if usual.get(name, missing) != value}


# ---- The page --------------------------------------------------------------------------------------------------------


def command(folder: pathlib.Path) -> str:
  """Returns the command that writes the page of a work folder."""
  return f"python -m jaxpref.show {shlex.quote(str(folder))}"


def note_command(folder: pathlib.Path, command: str) -> None:
  """Adds the command that trains in a work folder to its commands.txt, unless the last one was the same."""
  file = folder / COMMANDS
  before = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
  if command and before[-1:] != [command]:
    paths.write(file, "".join(f"{line}\n" for line in [*before, command]).encode())


def make(folder: pathlib.Path) -> str:
  """Returns the page of a work folder.

  Raises:
    FileNotFoundError, ValueError: it is no run's, or its files cannot be read.
  """
  config = _read(folder / "config.json")
  if config is None or "objective" not in config:
    raise FileNotFoundError(
      f"{folder} is no work folder of a run: it has no config.json of one; give the --workdir of a training."
    )
  rows = metrics.read(folder / "metrics.jsonl")
  results = _read(folder / "results.json") or {}
  shown, number = looks(folder, rows)
  step = max((row["step"] for row in rows), default=0)
  # Of the last step that wrote all of them.
  last = max((row for row in rows if "loss" in row), key=lambda row: row["step"], default={})
  commands = folder / COMMANDS
  return page.template("run.html.j2").render(
    name=folder.resolve().name,
    value_text=value_text,
    config=config,
    step=step,
    finished=(folder / "export").exists() and step >= config.get("num_steps", 0),
    in_words=in_words(results, rows),
    results=results,
    compared=[model for model in ("base", "aligned") if model in results],
    numbers={k: v for k, v in results.items() if isinstance(v, int | float)},
    picture=_picture(folder / "before_after.png") or _picture(folder / "samples.png"),
    report="evaluation/report.html" if (folder / "evaluation" / "report.html").is_file() else None,
    looks=shown,
    number=number,
    curves=[found for name in CURVES if (found := curve(name, rows)) is not None],
    last={k: v for k, v in last.items() if k not in ("step", "time")},
    changed=changed(config),
    fields=flat(config),
    commands=commands.read_text(encoding="utf-8").splitlines() if commands.is_file() else [],
  )


def _read(file: pathlib.Path) -> dict[str, Any] | None:
  if not file.is_file():
    return None
  try:
    return dict(json.loads(file.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{file} cannot be read ({error}); expected a JSON object, as training writes it.") from error


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes the page of a work folder into it, and returns its path.

  Raises:
    FileNotFoundError, ValueError, OSError: as `make`, and where it cannot be written.
  """
  paths.write(folder / NAME, make(folder).encode())
  return folder / NAME
