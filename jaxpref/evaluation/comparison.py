"""Compares models by the scores of their pictures: all numbers, and the files that show them.

`results`, which everything here takes, is a plain dict of JSON values:

  models            names, in the order of the tables
  baseline          the model that the others are compared with; None: no comparison
  prompts           P of {"text": ..., "category": ..., "id": ...}; the last two may be empty or absent
  seeds_per_prompt  S, the number of pictures of each prompt
  settings          name -> anything, such as scheduler, steps, guidance and seed; shown unchanged
  scorers           list of {"name": ..., "version": ..., "scale": ...}; the names differ
  scores            model -> name of a scorer -> P lists of S numbers; higher is better
  diversity         optional: model -> P numbers, such as the mean distance between the pictures of a prompt

`write` makes results.json (with `summarize`'s numbers under "summary"), scores.csv, table.md, table.tex and report.html
(`jaxpref.evaluation.page`).
"""

import csv
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data import paths
from jaxpref.evaluation import page, statistics
from jaxpref.evaluation.page import bounded, change_text, p_text, score_text, share_text
from jaxpref.recipes.messages import listed

FEW_PROMPTS = 20  # with fewer, bootstrap intervals over prompts are too short
LEVEL = 0.05  # significance level of the verdicts
FILES = ("results.json", "scores.csv", "table.md", "table.tex", "report.html")


def check(results: Mapping[str, Any]) -> None:
  """Raises for results that do not have the form above.

  Raises:
    ValueError: names what is missing, has the wrong size, or is not a number.
  """
  needed = ("models", "baseline", "prompts", "seeds_per_prompt", "settings", "scorers", "scores")
  missing = [name for name in needed if name not in results]
  if missing:
    raise ValueError(f"results have no {', '.join(missing)}; expected {', '.join(needed)}.")
  models, scorers = results["models"], [scorer["name"] for scorer in results["scorers"]]
  for what, names in (("models", models), ("scorers", scorers)):
    if not names or len(set(names)) < len(names):
      raise ValueError(f"{what} of the results: {list(names)}; expected at least one, each with its own name.")
  if results["baseline"] is not None and results["baseline"] not in models:
    raise ValueError(f"baseline {results['baseline']!r} is not one of the models {listed(models)}; name one of them.")
  if not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in results["prompts"]):
    raise ValueError('prompts of the results: expected {"text": ...} in each of them.')
  shape = (len(results["prompts"]), results["seeds_per_prompt"])
  for model in models:
    for scorer in scorers:
      of = f"scores of {model} by {scorer}"
      if scorer not in results["scores"].get(model, {}):
        raise ValueError(f"there are no {of}; score all models with all scorers.")
      found = statistics.check_scores(results["scores"][model][scorer], of=of).shape
      if found != shape:
        raise ValueError(f"{of}: shape {found}; expected {shape}, prompts and seeds.")
  for model, values in results.get("diversity", {}).items():
    statistics.check_scores([values], of=f"diversity of {model}")
    if model not in models or len(values) != shape[0]:
      raise ValueError(f"diversity of {model}: {len(values)} values; expected one of the models and {shape[0]} values.")


def summarize(results: Mapping[str, Any], *, samples: int = statistics.SAMPLES, seed: int = 0) -> dict[str, Any]:
  """Returns all statistics of the results.

  Args:
    samples, seed: settings of the bootstrap.

  Returns:
    `prompts`, `seeds_per_prompt` and `bootstrap_samples`;
    `models`: model -> scorer -> `statistics.describe`;
    `comparisons`: model -> scorer -> `statistics.compare` with the baseline, with `p_holm`, its p corrected for the
    `tests` of all models and scorers, and `verdict`: "higher" or "lower" if p_holm is below 0.05 and the interval of
    the win rate excludes 50 %, else "undecided". Categories have neither, as they are not corrected;
    `diversity`: model -> mean, interval, and with a baseline `statistics.change`, corrected for their number;
    `warnings`: sentences that anyone who reads the numbers must know.

  Raises:
    ValueError: see `check`.
  """
  check(results)
  options = {"samples": samples, "seed": seed}
  scores, baseline = results["scores"], results["baseline"]
  scorers = [scorer["name"] for scorer in results["scorers"]]
  others = [model for model in results["models"] if baseline is not None and model != baseline]
  categories = [prompt.get("category") or "" for prompt in results["prompts"]]
  comparisons = {
    model: {
      name: statistics.compare(scores[model][name], scores[baseline][name], categories=categories, **options)
      for name in scorers
    }
    for model in others
  }
  tests = [comparisons[model][name] for model in others for name in scorers]
  for test, p_holm in zip(tests, statistics.holm([test["p"] for test in tests]), strict=True):
    test |= {"p_holm": p_holm, "verdict": _verdict(test, p_holm)}
  summary = {
    "prompts": len(results["prompts"]),
    "seeds_per_prompt": results["seeds_per_prompt"],
    "bootstrap_samples": samples,
    "tests": len(tests),
    "models": {m: {n: statistics.describe(scores[m][n], **options) for n in scorers} for m in results["models"]},
    "comparisons": comparisons,
    "diversity": _diversity(results, **options),
  }
  return summary | {"warnings": _warnings(results, summary)}


def _verdict(test: Mapping[str, Any], p_holm: float) -> str:
  low, high = test["win_rate_interval"] or (0.0, 1.0)
  if p_holm < LEVEL and low > 0.5:
    return "higher"
  return "lower" if p_holm < LEVEL and high < 0.5 else "undecided"


def _diversity(results: Mapping[str, Any], **options: int) -> dict[str, Any]:
  values, baseline = results.get("diversity", {}), results["baseline"]
  found: dict[str, Any] = {}
  tests = max(1, sum(model != baseline for model in values))
  for model in (m for m in results["models"] if m in values):
    mine = np.asarray(values[model], np.float64)
    found[model] = {"mean": float(mine.mean()), "interval": statistics.interval(mine, **options)}
    if baseline in values and model != baseline:
      found[model] |= statistics.change(mine, values[baseline], tests=tests, **options)
  return found


def _warnings(results: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
  found = []
  prompts, baseline = summary["prompts"], results["baseline"]
  if prompts == 1:
    found.append("There is only one prompt: how results vary between prompts is unknown, so there are no intervals.")
  elif prompts < FEW_PROMPTS:
    found.append(f"There are only {prompts} prompts: the intervals are too short; use {FEW_PROMPTS} or more.")
  for model, of_model in summary["diversity"].items():
    if of_model.get("falls"):
      change = bounded(of_model["change"], of_model["change_interval"], change_text)
      rises = any(pair["verdict"] == "higher" for pair in summary["comparisons"][model].values())
      found.append(
        f"The pictures of {model} are less diverse than those of {baseline}: {change}, from "
        f"{score_text(summary['diversity'][baseline]['mean'])}."
        + " Higher scores may come from drawing the same picture again and again."
        * rises
      )
  if baseline is not None and not summary["diversity"]:
    one = results["seeds_per_prompt"] == 1
    why = "there is one picture of each prompt" if one else "no CLIP is among the scorers (--diversity=clip_l)"
    found.append(f"Diversity was not measured, as {why}: nothing would reveal that a model repeats one picture.")
  for model in summary["comparisons"]:
    if all(results["scores"][model][n] == results["scores"][baseline][n] for n in summary["comparisons"][model]):
      found.append(f"All scores of {model} and {baseline} are equal: they may be the same model.")
  return found


# ---- Files -----------------------------------------------------------------------------------------------------


def write(
  folder: str | os.PathLike,
  results: Mapping[str, Any],
  image_path: Callable[[str, int, int], pathlib.Path],
  *,
  pictures: int = 12,
) -> dict[str, Any]:
  """Writes FILES, those with numbers first.

  Args:
    folder: created if missing.
    image_path: model, number of the prompt and number of the seed -> file of the picture.
    pictures: most pictures in each section of the report.

  Returns:
    `summarize`'s numbers.

  Raises:
    ValueError: see `check`; or a file is not a picture.
    FileNotFoundError: a picture is missing.
    CannotBeWritten: see `paths`.
  """
  summary = summarize(results)
  place = pathlib.Path(folder)
  with paths.cannot_be_written(place):
    place.mkdir(parents=True, exist_ok=True)

  def save(name: str, text: str) -> None:
    paths.write(place / name, text.encode(errors="replace"))  # JSON can hold halves of characters, UTF-8 cannot

  save("results.json", json.dumps({**results, "summary": summary}, indent=1, allow_nan=False) + "\n")
  save("scores.csv", scores_csv(results))
  save("table.md", markdown(results, summary))
  save("table.tex", latex(results, summary))
  save("report.html", page.page(results, summary, image_path, pictures=pictures))
  return summary


def scores_csv(results: Mapping[str, Any]) -> str:
  """Returns CSV with a row for each picture: model, prompt and seed, counted from 0, and a column for each scorer."""
  scorers = [scorer["name"] for scorer in results["scorers"]]
  stream = io.StringIO(newline="")
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow(["model", "prompt", "seed", "id", "category", "text", *scorers])
  for model in results["models"]:
    for p, prompt in enumerate(results["prompts"]):
      about = [prompt.get("id", ""), prompt.get("category", ""), prompt["text"]]
      for s in range(results["seeds_per_prompt"]):
        values = [repr(float(results["scores"][model][name][p][s])) for name in scorers]
        writer.writerow([model, p, s, *about, *values])
  return stream.getvalue()


def table_rows(results: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[list[str]]:
  """Yields the header, then a row for each scorer and model as text; comparisons are empty for the baseline."""
  baseline = results["baseline"]
  against = [] if baseline is None else [f"win rate against {baseline}", "p (Holm)", "difference", "effect size"]
  yield ["scorer", "model", "mean", "median", *against]
  for scorer in results["scorers"]:
    for model in results["models"]:
      one = summary["models"][model][scorer["name"]]
      row = [scorer["name"], model, bounded(one["mean"], one["interval"], score_text), score_text(one["median"])]
      pair = summary["comparisons"].get(model, {}).get(scorer["name"])
      if pair is not None:
        effect = pair["effect_size"]
        row += [
          bounded(pair["win_rate"], pair["win_rate_interval"], share_text),
          p_text(pair["p_holm"]),
          bounded(pair["difference"], pair["difference_interval"], change_text),
          "" if effect is None else f"{effect:+.2f}",
        ]
      yield row + [""] * (4 + len(against) - len(row))


def _notes(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
  prompts, seeds = summary["prompts"], summary["seeds_per_prompt"]
  text = f"{prompts} prompt{'s' * (prompts != 1)}, {seeds} picture{'s' * (seeds != 1)} each."
  if prompts > 1:
    text += f" Brackets: 95 % intervals, bootstrap over prompts ({summary['bootstrap_samples']} samples)."
  if results["baseline"] is not None:
    text += (
      f" Pairs have the same prompt and seed, ties count half. p: sign test over prompts, corrected (Holm) for "
      f"{summary['tests']} comparisons."
    )
  return text


def markdown(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
  """Returns Markdown tables of all scorers, of categories and of diversity."""

  def table(rows: Iterator[list[str]]) -> list[str]:
    cells = [[cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:], ""]

  lines = [*table(table_rows(results, summary)), _notes(results, summary), "", *_drawn_by(results), ""]
  lines += [f"{s['name']}: version {s['version']}, scale {s['scale']}  " for s in results["scorers"]] + [""]
  if any(pair["categories"] for of_model in summary["comparisons"].values() for pair in of_model.values()):
    lines += table(_category_rows(summary))
  if summary["diversity"]:
    lines += table(_diversity_rows(summary))
  lines += [f"Note: {text}\n" for text in summary["warnings"]]
  return "\n".join(lines).rstrip() + "\n"


def _category_rows(summary: Mapping[str, Any]) -> Iterator[list[str]]:
  yield ["scorer", "model", "category", "prompts", "win rate", "difference"]
  for model, of_model in summary["comparisons"].items():
    for name, pair in of_model.items():
      for category, found in pair["categories"].items():
        yield [
          name, model, category or "(none)", str(found["prompts"]),
          bounded(found["win_rate"], found["win_rate_interval"], share_text),
          bounded(found["difference"], found["difference_interval"], change_text),
        ]  # fmt: skip


def _diversity_rows(summary: Mapping[str, Any]) -> Iterator[list[str]]:
  yield ["model", "diversity", "change"]
  for model, found in summary["diversity"].items():
    change = bounded(found["change"], found["change_interval"], change_text) if "change" in found else ""
    yield [model, bounded(found["mean"], found["interval"], score_text), change]


DRAWN_BY = ("scheduler", "steps", "guidance_scale", "eta", "seed", "prompts")


def _drawn_by(results: Mapping[str, Any]) -> list[str]:
  """Returns a line with the settings that change all scores; none if results have none of them."""
  known = [f"{name} {results['settings'][name]}" for name in DRAWN_BY if results["settings"].get(name) is not None]
  return [f"Drawn with {', '.join(known)}."] if known else []


LATEX = {
  "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
  "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", **{c: f"\\{c}" for c in "&%$#_"}, "\n": " ",
  "\u2212": "$-$",
}  # fmt: skip


def latex(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
  """Returns a LaTeX table of all scorers; it needs the package booktabs."""

  def line(row: Sequence[str]) -> str:
    cells = ("".join(LATEX.get(c, c) for c in cell) for cell in row)
    return " & ".join(f"{{{cell}}}" if cell.startswith("[") else cell for cell in cells) + r" \\"

  header, *rows = table_rows(results, summary)
  body = []
  for i, row in enumerate(rows):
    if i and row[0] != rows[i - 1][0]:
      body.append(r"\addlinespace")
    numbers = [re.sub(r"-(?=\d)", "\u2212", cell) for cell in row[2:]]  # a minus, not a hyphen
    body.append(line([row[0] if i == 0 or row[0] != rows[i - 1][0] else "", row[1], *numbers]))
  about = [_notes(results, summary), *_drawn_by(results)]
  about += [f"{s['name']}: version {s['version']}, scale {s['scale']}" for s in results["scorers"]]
  about += summary["warnings"]
  return "\n".join(
    [
      *("% " + " ".join(text.split()) for text in about),
      r"% \usepackage{booktabs}",
      rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
      r"\toprule",
      line(header),
      r"\midrule",
      *body,
      r"\bottomrule",
      r"\end{tabular}",
      "",
    ]
  )
