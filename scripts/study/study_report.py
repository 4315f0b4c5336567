"""Writes the report of scripts/study/study.py: papers.md, papers.json, findings.md and plots in docs/results.

findings.md is written by hand in scripts/study/findings.md, but for its numbers. In braces stands what is put there:

  {share spo}          mean share of a variant's runs, "74.3 %"
  {captions spo}       mean change of its captions, "-4.2 points"
  {base_share spo}     the same of the base model; {valid_pairs spo}: the share of SPO's pairs above the threshold
  {seeds spo}          number of its runs, "8"
  {deviation spo}      standard deviation of share between its seeds, "1.4 points"
  {evaluations spo}    UNet evaluations of its training, "24,100"; {minutes spo}: minutes of it on one core
  {spo - dpo}          their difference of share by seed, "+10.8 points [+5.6, +16.1]"
  {captions spo - dpo} the same of captions, {win_rate spo - dpo} of win rates
  {largest dpo}        the largest margin of implicit rewards, of ten ranges of t, as a share of their sum, "27 %"
  {accuracy style_70_step_aware}  of a preference model in papers_instrument.json, on the pairs that matter, "90.2 %"
  {ceiling style}      the same of the ceiling of a hidden preference
  {p_holm spo - sft}   p of their difference of share, by Holm's method among those of its part, "0.0042"
  {growth}             how much larger spo - dpo is with the noisiest rater than without noise
"""

import collections
import itertools
import json
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jaxpref.evaluation.statistics import holm
from scripts.study import study_plan, study_rows, study_variants

MAIN = {("spo", "dpo"), ("spo_legible", "dpo_legible"), ("moving", "dpo")}  # not corrected for their number
FINDINGS = "scripts/study/findings.md"
KEYS = ("share", "captions", "win_rate", "other_share")
Rows = Sequence[dict[str, Any]]


def collect(folder: pathlib.Path) -> dict[str, Any]:
  """Returns `runs` and `tuning` by variant, `comparisons`, and the paths of `missing` runs."""
  study: dict[str, Any] = {"runs": {}, "tuning": {}, "comparisons": [], "missing": []}
  for v in study_variants.VARIANTS:
    tuning = [] if v.tuned_as else study_plan.tuning_runs(v, folder)
    tests = study_plan.test_runs(v, folder)
    rows = {run.path: study_rows.read_run(run, folder) for run in [*tuning, *tests]}
    study["missing"] += [path for path, row in rows.items() if not row]
    study["missing"] += [] if tests else [f"{v.name}/test_*: not tuned yet"]
    study["runs"][v.name] = [row for row in rows.values() if row and row["split"] == "test"]
    if tuning:
      study["tuning"][v.name] = [row for row in rows.values() if row and row["split"] != "test"]
  for part in study_variants.PARTS:
    found = []
    for v in (v for v in study_variants.VARIANTS if v.part == part):
      for other in v.against:
        if _same_runs(study["runs"][v.name], study["runs"][other]):
          continue
        if result := compare(study["runs"][v.name], study["runs"][other]):
          found.append({"variant": v.name, "against": other, "part": part} | result)
    if part == "A" and (result := growth(study["runs"])):
      found.append({"variant": "spo - dpo at 60 %", "against": "at 100 %", "part": part, "main": True} | result)
    _correct(found)
    study["comparisons"] += found
  return study


def _same_runs(new: Rows, old: Rows) -> bool:
  """Returns whether the runs of two variants are the same ones, so that their difference says nothing."""
  told = ("fields", "learning_rate", "beta", "seed", "share")
  known = [[r.get(key) for key in told] for r in old]
  return all([r.get(key) for key in told] in known for r in new)


def compare(new: Rows, old: Rows) -> dict[str, Any] | None:
  """Returns differences by seed: their mean with its 95 % interval by Student's t, and its p; None without a seed."""
  pairs = [(a, b) for a in new for b in old if a["seed"] == b["seed"] and not {"failed"} & (a.keys() | b.keys())]
  return differences({key: [a[key] - b[key] for a, b in pairs] for key in KEYS}) if pairs else None


def growth(runs: Mapping[str, Rows]) -> dict[str, Any] | None:
  """Returns how much larger the difference of SPO and Diffusion-DPO is with the noisiest rater than without noise."""
  by_seed = {
    n: {r["seed"]: r for r in runs[n] if "failed" not in r} for n in ("spo_60", "dpo_60", "spo_100", "dpo_100")
  }
  seeds = sorted(set.intersection(*map(set, by_seed.values())))
  if not seeds:
    return None
  of = lambda key, s: [by_seed[n][s][key] for n in by_seed]
  return differences({key: [a - b - (c - d) for a, b, c, d in (of(key, s) for s in seeds)] for key in KEYS})


def differences(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """Returns each key's values, with `mean`, and from three values on `interval` and `p`."""
  found: dict[str, Any] = {}
  for key, of_seeds in values.items():
    v = np.asarray(of_seeds)
    found[key] = {"values": v.tolist(), "mean": float(v.mean())}
    if v.size > 2:
      error = v.std(ddof=1) / v.size**0.5
      reach = stats.t.ppf(0.975, v.size - 1) * error
      found[key] |= {"interval": [float(v.mean() - reach), float(v.mean() + reach)]}
      found[key]["p"] = float(2 * stats.t.sf(abs(v.mean()) / max(error, 1e-12), v.size - 1))
  return found


def _correct(found: list[dict[str, Any]]) -> None:
  """Adds `p_holm` to those that are not main comparisons."""
  for f in found:
    f["main"] = f.get("main", (f["variant"], f["against"]) in MAIN)
  others = [f for f in found if not f["main"] and "p" in f["share"]]
  for f, p in zip(others, holm([f["share"]["p"] for f in others]), strict=True):
    f["share"]["p_holm"] = p


def power(deviation: float, seeds: int) -> float:
  """Returns the difference that a t-test of 5 % on so many paired differences finds with 80 % probability."""
  return float((stats.t.ppf(0.975, seeds - 1) + stats.t.ppf(0.8, seeds - 1)) * deviation / seeds**0.5)


def spread(rows: Rows, key: str, form: str = "{:.1%}") -> str:
  """Returns mean (lowest to highest), one number if all are the same, nothing if no row has it."""
  values = [r[key] for r in rows if r.get(key) is not None]
  shown = [form.format(f(values)) for f in (np.mean, min, max)] if values else [""]
  return shown[0] if len(set(shown)) == 1 else "{} ({} to {})".format(*shown)


def _points(found: Mapping[str, Any]) -> str:
  bounds = " [{:+.1f}, {:+.1f}]".format(*(100 * np.array(found["interval"]))) if "interval" in found else ""
  return f"{100 * found['mean']:+.1f}{bounds}"


def _table(head: str, rows: Sequence[Sequence[Any]]) -> list[str]:
  lines = ["|" + "---|" * (head.count("|") + 1), *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
  return [f"| {head} |", *lines, ""]


def findings(study: Mapping[str, Any], template: str, instrument: Mapping[str, Any] | None = None) -> str:
  """Returns the page of findings: the template with the study's numbers in the place of what stands in braces.

  Args:
    study: `collect`.
    template: scripts/study/findings.md.
    instrument: docs/results/papers_instrument.json.

  Raises:
    ValueError: runs that it speaks of are missing.
  """
  runs = {name: [r for r in rows if "failed" not in r] for name, rows in study["runs"].items()}

  def number(match: re.Match[str]) -> str:
    key, new, old = match[1] or "share", match[2], match[3]
    try:
      if key not in _FORMS:
        raise ValueError(f"{key} is unknown; expected one of {', '.join(_FORMS)}.")
      if key in _MEASURED:
        return _FORMS[key](_accuracy(instrument or {}, key, new))
      if missing := [name for name in (new, old) if name and not runs.get(name)]:
        raise ValueError(f"there is no run of {', '.join(missing)}.")
      if not old:
        return _FORMS[key](_number(runs[new], key))
      return _p_holm(study, new, old) if key == "p_holm" else _difference(runs[new], runs[old], key)
    except ValueError as error:
      raise ValueError(f"{match[0]} in findings.md: {error}") from error

  if "{growth}" in template:
    if not (found := growth(runs)):
      raise ValueError("{growth} in findings.md: the noisiest rater and that without noise share no seed.")
    template = template.replace("{growth}", _points(found["share"]).replace(" [", " points ["))
  return _filled(re.sub(r"\{(?:(\w+) )?(\w+)(?: - (\w+))?\}", number, template))


def _number(rows: Rows, key: str) -> float:
  """Returns what `key` of `_FORMS` is for the runs of a variant."""
  if key == "seeds":
    return len(rows)
  if key == "largest":
    if (of_times := margins(rows)) is None:
      raise ValueError("its runs have no margins by time.")
    return float(of_times.max() / of_times.sum())
  if key == "deviation":
    return float(np.std([r["share"] for r in rows], ddof=1))
  return float(np.mean([r[key] for r in rows]))


def _accuracy(instrument: Mapping[str, Any], key: str, name: str) -> float:
  of = instrument.get(_MEASURED[key], {})
  if name not in of:
    raise ValueError(f"papers_instrument.json has no {name} in its {_MEASURED[key]}.")
  return float(of[name]["mean"])


def _difference(new: Rows, old: Rows, key: str) -> str:
  if not (found := compare(new, old)):
    raise ValueError("the two share no seed.")
  return _points(found[key]).replace(" [", " points [") + ("" if "interval" in found[key] else " points")


def _p_holm(study: Mapping[str, Any], new: str, old: str) -> str:
  for f in study["comparisons"]:
    if (f["variant"], f["against"]) == (new, old) and "p_holm" in f["share"]:
      return f"{f['share']['p_holm']:.2g}"
  raise ValueError("the report does not compare them, or corrects no p.")


def _filled(text: str) -> str:
  """Returns text with paragraphs and the items of lists broken at 118 characters; tables stay as they are."""
  item = r"(?:\d+\.|-) "
  blocks = re.split(rf"\n(?={item})|\n\n", text.strip("\n"))
  filled = []
  for b in blocks:
    if not b.startswith("|"):
      indent = " " * len(found[0]) if (found := re.match(item, b)) else ""
      b = textwrap.fill(" ".join(b.split()), 118, subsequent_indent=indent, break_on_hyphens=False)
    filled.append(b)
  items = [bool(re.match(item, b)) for b in blocks]
  gaps = ["\n" if a and b else "\n\n" for a, b in itertools.pairwise(items)]
  return "".join(part + gap for part, gap in zip(filled, [*gaps, "\n"], strict=True))


_MEASURED = {"accuracy": "models", "ceiling": "ceiling"}  # what of papers_instrument.json they are
_FORMS: dict[str, Callable[[float], str]] = {
  "share": lambda v: f"{100 * v:.1f} %",
  "win_rate": lambda v: f"{100 * v:.1f} %",
  "captions": lambda v: f"{100 * v:+.1f} points",
  "base_share": lambda v: f"{100 * v:.1f} %",
  "valid_pairs": lambda v: f"{100 * v:.0f} %",
  "seeds": str,
  "largest": lambda v: f"{100 * v:.0f} %",
  "p_holm": str,
  "accuracy": lambda v: f"{100 * v:.1f} %",
  "ceiling": lambda v: f"{100 * v:.1f} %",
  "deviation": lambda v: f"{100 * v:.1f} points",
  "minutes": lambda v: f"{v:.1f}",
  "evaluations": lambda v: f"{round(v, -2):,.0f}",
}


def margins(rows: Rows) -> np.ndarray | None:
  """Returns f64[10]: the mean margin of implicit rewards by range of t, over seeds; None if rows do not have it."""
  names = [f"margin_bin_{i:02}" for i in range(10)]
  if not rows or not all(any(name in r for r in rows) for name in names):
    return None
  return np.array([np.mean([r[name] for r in rows if name in r]) for name in names])


def _moves(members: Sequence[study_variants.Variant], runs: Mapping[str, Rows]) -> list[str]:
  """The table of divergences, of those members whose reference moves."""
  of_moves = [v for v in members if any("moves" in r for r in runs[v.name])]
  rows = []
  for v in of_moves:
    found = [spread(runs[v.name], key, "{:.4f}") for key in ("last_d", "largest_d", "accepted_d")]
    rows.append([v.name, spread(runs[v.name], "moves", "{:.0f}"), *found])
  if not rows:
    return []
  return [_MOVES, *_table("variant | moves | last D | largest D | largest D of a move that was made", rows)]


_MOVES = """D is the divergence of the proposed reference from the pre-trained model, a running mean of err_ref -
err_init over 8 samples at a time. The gate compares it with delta, 0.005.
"""


def _margins(runs: Mapping[str, Rows]) -> list[str]:
  """The table of question D2."""
  variants = ("dpo", "sampling", "scale", "timesteps")
  found = {name: m for name in variants if (m := margins(runs[name])) is not None}
  if len(found) < 2:
    return []
  cells = [
    [name, *(f"{1e3 * v:.2f}" for v in m), f"{m.max() / m.sum():.0%}", f"{m[:5].sum() / m.sum():.0%}"]
    for name, m in found.items()
  ]
  head = ["variant", *(f"{100 * i}" for i in range(10)), "largest", "below 500"]
  return [_MARGINS, *_table(" | ".join(head), cells)]


_MARGINS = """Margin of implicit rewards times 1,000, by range of t, each named by where it begins: means over
seeds and the last two fifths of training. Largest: the largest range's share of the total.
"""


def deviations(runs: Mapping[str, Rows]) -> list[tuple[str, float, int, float | None, float | None]]:
  """Returns SPO's variants: their deviation of share, seeds, p of an F-test against `spo`, and that of 64 prompts."""
  shares = {name: [r["share"] for r in runs[name]] for name in ("spo", "spo_before", "spo_60", "spo_85", "spo_100")}
  found: list[tuple[str, float, int, float | None, float | None]] = []
  for name, values in shares.items():
    if len(values) > 2:
      p = None
      if name != "spo" and len(shares["spo"]) > 2:
        ratio = np.var(values, ddof=1) / np.var(shares["spo"], ddof=1)
        law = stats.f(len(values) - 1, len(shares["spo"]) - 1)
        p = float(min(1.0, 2 * min(law.cdf(ratio), law.sf(ratio))))
      few = [r["share_64"] for r in runs[name] if "share_64" in r]
      of_few = float(np.std(few, ddof=1)) if len(few) == len(values) else None
      found.append((name, float(np.std(values, ddof=1)), len(values), p, of_few))
  return found


def _deviations(runs: Mapping[str, Rows]) -> list[str]:
  if len(found := deviations(runs)) < 2:
    return []
  of = lambda value, form: "" if value is None else form.format(value)
  rows = [[name, n, f"{100 * d:.1f}", of(p, "{:.2g}"), of(few and 100 * few, "{:.1f}")] for name, d, n, p, few in found]
  return [
    "Deviation of share between seeds, in points, p of an F-test against `spo`, and that of 64 prompts alone:",
    "",
    *_table("variant | seeds | deviation | p | of 64 prompts", rows),
  ]


def _instrument(found: Mapping[str, Any]) -> list[str]:
  """The table of preference models, each beside the ceiling of its hidden preference."""
  rows = []
  for name, of in found["models"].items():
    hidden = name.partition("_")[0]
    top = found["ceiling"].get(hidden)
    cells = [f"{100 * v:.1f}" for v in (of["mean"], *of["bins"])]
    rows.append([name, *cells, f"{100 * (top['mean'] - of['mean']):.1f}" if top else ""])
  for hidden, of in found["ceiling"].items():
    rows.append([f"**ceiling, {hidden}**", *(f"{100 * v:.1f}" for v in (of["mean"], *of["bins"])), ""])
  head = ["model", "mean", *(f"{100 * i}" for i in range(10)), "below the ceiling"]
  return ["## The instrument", "", _INSTRUMENT, *_table(" | ".join(head), rows)]


_INSTRUMENT = """Held-out pairs that matter and are ranked as the hidden score ranks them, in %, by range of t,
each named by where it begins. Made by `python scripts/study/instrument.py`, whose first lines say what the ceiling is.
It is what the judge's own network reached on predicted pictures; a model that looks at latents may lie above it.
"""


def markdown(study: Mapping[str, Any], instrument: Mapping[str, Any] | None = None) -> str:
  """Returns docs/results/papers.md.

  Args:
    study: `collect`.
    instrument: docs/results/papers_instrument.json.
  """
  runs = {name: [r for r in rows if "failed" not in r] for name, rows in study["runs"].items()}
  done = [r for rows in runs.values() for r in rows]
  lines = [_HEAD, "## Numbers", "", _NUMBERS]
  if done:
    error = max(r["error"] for r in done)
    base = {v.hidden: runs[v.name][0]["base_share"] for v in study_variants.VARIANTS if runs[v.name]}
    of_base = ", ".join(f"{share:.1%} ({hidden})" for hidden, share in base.items())
    lines += [
      f"The standard error of a run's share over prompts, against base, is at most {100 * error:.1f} points. The "
      f"base model's share is {of_base}.",
      "",
    ]
  for part, title in study_variants.PARTS.items():
    members = [v for v in study_variants.VARIANTS if v.part == part and runs[v.name]]
    if not members:
      continue
    lines += [f"## {part}. {title}", ""]
    head = "variant | rater | seeds | share | deviation | captions | win rate | updates | UNet evaluations | minutes"
    lines += _table(head, [_row(v, runs[v.name]) for v in members])
    if found := [f for f in study["comparisons"] if f["part"] == part]:
      head = "variant | against | seeds | share, points [95 %] | detectable | p | p by Holm | captions | win rate"
      lines += _table(head, [_comparison(f) for f in found])
    lines += _moves(members, runs)
    lines += _margins(runs) if part == "D" else _deviations(runs) if part == "F" else []
  lines += _instrument(instrument) if instrument else []
  lines += [
    "## Variants",
    "",
    _VARIANTS,
    *_table("variant | recipe | changed in it | learning rate | beta", _legend(runs)),
  ]
  lines += ["## Tuning", "", *_table("variant | learning rate, beta: share (captions, points)", _tuning(study))]
  failed = [
    f"{r['variant']} seed {r['seed']}: {r['failed']}" for rows in study["runs"].values() for r in rows if "failed" in r
  ]
  lines += ["## Missing", "", *(f"- {line}" for line in [*failed, *_missing(study)] or ["nothing"])]
  return "\n".join(lines) + "\n"


def _missing(study: Mapping[str, Any]) -> list[str]:
  """Returns a line for each variant that lacks runs."""
  counts = collections.Counter(path.partition("/")[0] for path in study["missing"])
  untuned = {path.partition("/")[0] for path in study["missing"] if path.endswith("not tuned yet")}
  left = lambda n: f"{n} run{'' if n == 1 else 's'}"
  return [f"{name}: not tuned yet" if name in untuned else f"{name}: {left(n)}" for name, n in counts.items()]


def _row(v: study_variants.Variant, rows: Rows) -> list[str]:
  deviation = f"{100 * np.std([r['share'] for r in rows], ddof=1):.1f}" if len(rows) > 2 else ""
  return [
    v.name,
    f"{v.hidden} {v.agreement} %",
    str(len(rows)),
    spread(rows, "share"),
    deviation,
    spread(rows, "captions", "{:+.1%}"),
    spread(rows, "win_rate"),
    spread(rows, "updates", "{:.0f}"),
    spread(rows, "evaluations", "{:,.0f}"),
    spread(rows, "minutes", "{:.1f}"),
  ]


def _comparison(f: Mapping[str, Any]) -> list[str]:
  share = f["share"]
  name = f"**{f['variant']}**" if f["main"] else f["variant"]
  p = [f"{share[key]:.2g}" if key in share else "" for key in ("p", "p_holm")]
  n = len(share["values"])
  return [
    name,
    f["against"],
    str(n),
    _points(share),
    f"{100 * power(float(np.std(share['values'], ddof=1)), n):.1f}" if n > 2 else "",
    *p,
    _points(f["captions"]),
    _points(f["win_rate"]),
  ]


def _tuning(study: Mapping[str, Any]) -> list[list[str]]:
  rows = []
  for name, tried in study["tuning"].items():
    best = study_plan.choose(tried, study_variants.BY_NAME[name].hidden)
    cells = []
    for r in tried:
      told = r.get("failed") or f"{r['share']:.1%} ({100 * r['captions']:+.1f})"
      cell = f"{r['learning_rate']:g}, {r['beta']:g}: {told}"
      cells.append(f"**{cell}**" if r is best else cell)
    rows.append([name, "; ".join(cells)])
  return rows


def _legend(runs: Mapping[str, Rows]) -> list[list[str]]:
  """What each variant with a run is."""
  rows = []
  for v in (v for v in study_variants.VARIANTS if runs[v.name]):
    fields = "; ".join(f"`{name}={_value(value)}`" for name, value in v.overrides.items())
    judge = f"preference model: {v.judged_by}" if v.online and v.judged_by != "step_aware" else ""
    first = runs[v.name][0]
    changed = "; ".join(filter(None, (fields, judge)))
    rows.append([v.name, v.recipe, changed, f"{first['learning_rate']:g}", f"{first['beta']:g}"])
  return rows


def _value(value: Any) -> Any:
  return "none" if value == study_variants.NO_GATE else value


_VARIANTS = """A rater is named by the preference, and by the share of pairs that it labels as the hidden score does.
A run takes 125 steps of `dpo_tiny` or `tdpo_tiny`, 25 of `spo_tiny`, 30 of `lpo_tiny`. With `reference.delta=none`
there is no gate.
"""


_HEAD = """# What the papers claim, on tiny-sd

Made by `python scripts/study/study.py`; what it asks, and how it was to be answered, was written down before it ran:
[papers_questions.md](papers_questions.md). [Findings](findings.md) says what follows. All numbers are in papers.json.

![Share over captions](papers_frontier.png)
"""
_NUMBERS = """Means over seeds (lowest to highest). Deviation: the standard deviation of share between seeds, in points.
Captions: change of caption accuracy against base. Minutes are those of training alone, by the median step, on one core.
UNet evaluations are those of one sample in training. Comparisons are by seed; those in bold are the main ones, which
are not corrected for their number. Detectable: the difference in points that a comparison of so many seeds, with the
spread that they have, would find with 80 % probability. [Variants](#variants) says what each variant changes.
"""


def _curves(study: Mapping[str, Any]) -> dict[str, Rows]:
  """Returns the runs of the variants in `study_variants.CURVES` by name; none if one of them has no run."""
  names = [n for of_method in study_variants.CURVES.values() for n in of_method]
  runs: dict[str, Rows] = {n: [r for r in study["runs"][n] if "failed" not in r] for n in names}
  return runs if all(runs.values()) else {}


def plot_budget(study: Mapping[str, Any], docs: pathlib.Path) -> None:
  """Draws share over UNet evaluations for Diffusion-DPO and SPO, once all of its runs are there."""
  (docs / "papers_budget.png").unlink(missing_ok=True)
  if not (runs := _curves(study)):
    return
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
  for label, names in study_variants.CURVES.items():
    points = [np.array([(r["evaluations"], 100 * r["share"]) for r in runs[n]]) for n in names]
    (line,) = axis.plot(*np.array([p.mean(axis=0) for p in points]).T, label=label)
    axis.plot(*np.concatenate(points).T, "o", color=line.get_color(), markersize=3)
  axis.set(xlabel="UNet evaluations of training", ylabel="share of the preferred style, %")
  axis.legend()
  figure.savefig(docs / "papers_budget.png", dpi=110)
  plt.close(figure)


def plot_frontier(study: Mapping[str, Any], docs: pathlib.Path) -> None:
  """Draws share over the change of captions, a point for each variant that learns style from the 70 % rater."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
  base, points = float("nan"), []
  for number, part in enumerate(study_variants.PARTS):
    label: str | None = f"{part}. {study_variants.PARTS[part]}"
    for v in study_variants.VARIANTS:
      rows = [r for r in study["runs"][v.name] if "failed" not in r]
      if v.part == part and (v.hidden, v.agreement) == ("style", 70) and rows:
        x, y = (100 * np.mean([r[key] for r in rows]) for key in ("captions", "share"))
        axis.plot(x, y, "o", color=f"C{number}", markersize=4, label=label)
        points.append((v.name, x, y))
        label = None
        base = rows[0]["base_share"]
  axis.set(xlabel="change of caption accuracy, points", ylabel="share of the preferred style, %")
  if axis.lines:
    axis.axhline(100 * base, color="0.8", linewidth=0.8, zorder=0)
    axis.legend(fontsize=6.5, loc="lower left")
    _name_points(figure, axis, points)
    figure.savefig(docs / "papers_frontier.png", dpi=110)
  plt.close(figure)


def _name_points(figure: Any, axis: Any, points: Sequence[tuple[str, float, float]]) -> None:
  """Writes each point's name at the nearest place where it covers no other name, point or the legend."""
  from matplotlib.text import Text
  from matplotlib.transforms import Bbox

  figure.canvas.draw()  # the layout, which decides where points lie
  taken = [Bbox(axis.transData.transform((x, y)) + np.array([[-3, -3], [3, 3]])) for _, x, y in points]
  taken.append(axis.get_legend().get_window_extent())
  places = [(side * (5 + 6 * ring), 8 * up) for ring in range(9) for up in range(-ring, ring + 1) for side in (1, -1)]
  line = {"arrowstyle": "-", "linewidth": 0.4, "color": "0.5", "shrinkA": 0, "shrinkB": 2}
  for name, x, y in points:
    text = axis.annotate(
      name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=6, va="center", arrowprops=line
    )
    for place in places:
      text.set(position=place, horizontalalignment="left" if place[0] > 0 else "right")
      text.update_positions(figure.canvas.get_renderer())
      box = Text.get_window_extent(text)  # without the line
      if axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1) and not box.padded(2).count_overlaps(taken):
        break
    text.set_in_layout(False)
    taken.append(box)


def write(folder: pathlib.Path, docs: pathlib.Path) -> None:
  """Writes the report of the runs in `folder` into `docs`; says why where findings.md cannot be written."""
  study = collect(folder)
  docs.mkdir(parents=True, exist_ok=True)
  plot_budget(study, docs)
  plot_frontier(study, docs)
  file = docs / "papers_instrument.json"
  instrument = json.loads(file.read_text()) if file.is_file() else None
  (docs / "papers.md").write_text(markdown(study, instrument))
  (docs / "papers.json").write_text(json.dumps(study, indent=1) + "\n")
  template = study_variants.ROOT / FINDINGS
  try:
    if template.is_file():
      (docs / "findings.md").write_text(findings(study, template.read_text(), instrument))
  except ValueError as error:
    print(f"findings.md is not written: {error}", file=sys.stderr)
