"""The report of scripts/study/study.py: study.md, study.json and its plots in docs/results, from the runs there are."""

import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from scripts.study import study_plan


def collect(folder: pathlib.Path, seeds: int) -> dict[str, Any]:
  """`runs` by variant, `tuning` by the variant it was done for, `comparisons`, and the `missing` runs."""
  study: dict[str, Any] = {"seeds": seeds, "runs": {}, "tuning": {}, "comparisons": [], "missing": []}
  for v in study_plan.VARIANTS:
    tests = study_plan.test_runs(v, folder, seeds)
    tuning = study_plan.beta_runs(v, folder) if v.tuned_as else study_plan.rate_runs(v)
    rows = {run.path: study_plan.read_run(run, folder) for run in [*tuning, *tests]}
    study["missing"] += [path for path, row in rows.items() if not row and path not in study["missing"]]
    study["missing"] += [] if tests else [f"{v.name}/test_*: no learning rate is chosen"]
    study["runs"][v.name] = [row for row in rows.values() if row and row["split"] == "test"]
    if tuning:
      chosen = (study_plan.beta(tests[0].variant) if v.betas else tests[0].learning_rate) if tests else None
      study["tuning"][v.name] = {"chosen": chosen, "runs": [r for r in rows.values() if r and r["split"] != "test"]}
  for v in study_plan.VARIANTS:
    for other in v.against:
      runs, others = study["runs"][v.name], study["runs"][other]
      if v.name != other and runs != others and (found := compare(runs, others)):
        study["comparisons"].append({"variant": v.name, "against": other} | found)
  return study


def compare(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """Of the same seeds, differences of the preferred share: the 95 % interval of their mean by Student's t, their mean
  over their standard deviation, and p of the exact two-sided sign-flip test of it. And the mean differences of caption
  accuracy and of the win rate, this with its interval."""
  pairs = [(a, b) for a in new for b in old if a["seed"] == b["seed"] and "failed" not in a | b]
  if not pairs:
    return None
  keys = ("preferred_share", "caption_accuracy_change", "win_rate")
  change, accuracy, wins = (np.array([a[key] - b[key] for a, b in pairs]) for key in keys)
  flipped = np.array(list(itertools.product((1, -1), repeat=len(pairs)))) @ change
  p = np.mean(np.abs(flipped) >= abs(change.sum()) - 1e-9)
  found = {"change": change.tolist(), "p": float(p), "caption_accuracy": float(accuracy.mean())}
  found["win_rate"] = float(wins.mean())
  if len(pairs) > 2:  # of two seeds an interval says nothing
    found |= {"interval": _interval(change), "win_rate_interval": _interval(wins)}
    if (deviation := float(change.std(ddof=1))) > 1e-9:
      found["effect_size"] = float(change.mean()) / deviation
  return found


def _interval(values: np.ndarray) -> list[float]:
  """Of the mean, 95 %, by Student's t."""
  reach = stats.t.ppf(0.975, values.size - 1) * values.std(ddof=1) / values.size**0.5
  return [float(values.mean() - reach), float(values.mean() + reach)]


def spread(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
  """Mean (lowest to highest), one number if all are the same, empty if no row has it."""
  values = [r[key] for r in rows if r.get(key) is not None]
  shown = [f"{f(values):{form}}" for f in (np.mean, min, max)] if values else [""]
  return shown[0] if len(set(shown)) == 1 else "{} ({} to {})".format(*shown)


def _table(head: str, rows: Sequence[Sequence[Any]]) -> list[str]:
  lines = ["|" + "---|" * (head.count("|") + 1), *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
  return [f"| {head} |", *lines, ""]


def markdown(study: dict[str, Any], conclusions: str = "", *, divergence: bool = True) -> str:
  """docs/results/study.md; the conclusions are written by hand, in docs/results/study_conclusions.md.

  Args:
    divergence: whether there is a plot of D.
  """
  runs = {name: [r for r in rows if "failed" not in r] for name, rows in study["runs"].items()}
  rule: dict[str, Any] = {"factors": ", ".join(map(str, study_plan.FACTORS)), "seed": study_plan.TUNING_SEED}
  rule |= {"fall": f"{100 * study_plan.ALLOWED_FALL:g}", "pictures": study_plan.TUNING_PICTURES}
  rule["conclusions"] = conclusions and f"## Conclusions\n\n{conclusions}\n## Numbers\n\n"
  rule["divergence"] = "![D of the proposed reference](study_divergence.png)" if divergence else ""
  rule["budget"] = " ![Preferred share against cost](study_budget.png)" if _has_budgets(study) else ""
  lines = [_HEAD.format(n=study["seeds"], p=2 / 2 ** study["seeds"], **rule)]
  if done := [r for rows in runs.values() for r in rows]:
    text = "{num_prompts} prompts x {seeds_per_prompt} image seeds, {num_inference_steps} steps, guidance"
    text = f"Evaluation: {text} {{guidance_scale}}. The base model's preferred share is"
    lines.append(f"{text.format(**done[0]['protocol'])} {spread(done, 'base_preferred_share', '.1%')}.\n")
  cell = lambda r: r.get("failed") or f"{r['preferred_share']:.1%} ({100 * r['caption_accuracy_change']:+.1f})"
  tried = lambda r: study_plan.beta(study_plan.BY_NAME[r["variant"]])
  rates: list[Sequence[Any]] = []
  betas: list[Sequence[Any]] = []
  for name, t in study["tuning"].items():
    of_beta = bool(study_plan.BY_NAME[name].betas)
    values = "; ".join(f"{tried(r) if of_beta else r['learning_rate']:g}: {cell(r)}" for r in t["runs"])
    if values:
      (betas if of_beta else rates).append((name, values, f"{t['chosen']:g}" if t["chosen"] else ""))
  for title, rows in (("Learning rates", rates), ("Betas", betas)):
    if rows:
      head = f"variant | {title[:-1].lower()}: preferred share (change of caption accuracy, points) | chosen"
      lines += [f"## {title}", "", *_table(head, rows)]
  for part, title in study_plan.PARTS.items():
    members = [v for v in study_plan.VARIANTS if v.part == part]
    if not any(runs[v.name] for v in members):
      continue
    names = list(dict.fromkeys([v.against[0] for v in members] + [v.name for v in members]))
    lines += [f"## {part}. {title}", ""]
    head = "variant | seeds | preferred share | win rate | caption accuracy | updates | minutes | UNet evaluations"
    rows = [[n, len(runs[n]), *(spread(runs[n], k, f) for k, f in _COLUMNS.items())] for n in names if runs[n]]
    lines += _table(head, rows)
    found = [f for f in study["comparisons"] if study_plan.BY_NAME[f["variant"]].part == part]
    rows = []
    for f in found:
      c, accuracy = 100 * np.array(f["change"]), 100 * f["caption_accuracy"]
      bounds, of_wins = (
        " [{:+.1f}, {:+.1f}]".format(*(100 * np.array(f[key]))) if key in f else ""
        for key in ("interval", "win_rate_interval")
      )
      reach = f"{c.min():+.1f} to {c.max():+.1f}"
      size = f"{f['effect_size']:+.1f}" if "effect_size" in f else ""
      mean, p = f"{c.mean():+.1f}{bounds}", f"{f['p']:.3g}"
      wins = f"{100 * f['win_rate']:+.1f}{of_wins}"
      rows.append([f["variant"], f["against"], len(c), mean, reach, size, p, wins, f"{accuracy:+.1f}"])
    head = "variant | against | seeds | preferred share, points [95 %] | lowest to highest | d | p"
    head += " | win rate, points [95 %] | caption accuracy"
    lines += _table(head, rows)
    for word, sign in (("Above", 1), ("Below", -1)):
      many = [f for f in found if len(f["change"]) > 2]
      always = [f"{f['variant']} ({f['against']})" for f in many if min(sign * c for c in f["change"]) > 0]
      lines.append(f"{word} what it is compared with, in all of three or more seeds: {', '.join(always) or 'none'}.\n")
    if moving := [v for v in members if v.overrides.get("reference.mode") == "update"]:
      shown = lambda v: [spread(runs[v.name], key, form) for key, form in _D.items()]
      rows = [[v.name, v.overrides["reference.tau"], *shown(v)] for v in moving if runs[v.name]]
      lines += _table("variant | tau | last D | largest D | largest D of a move that was made | moves", rows)
      lines += [*_divergence_sentences(moving, runs), ""]
    lines += [_CLEAN] if part == "B" else []
  failed = [r for rows in study["runs"].values() for r in rows if "failed" in r]
  failed = [f"{r['variant']} seed {r['seed']} failed: {r['failed']}" for r in failed]
  lines += ["## Missing", "", *(f"- {line}" for line in [*failed, *_missing(study)] or ["nothing"])]
  return "\n".join(lines) + "\n"


def _has_budgets(study: dict[str, Any]) -> bool:
  """Whether all points of the plot of cost are there."""
  return all(study["runs"][name] for names in study_plan.CURVES.values() for name in names)


def _missing(study: dict[str, Any]) -> list[str]:
  """The missing runs, those of variants without any in one line."""
  none = [name for name, rows in study["runs"].items() if not rows]
  # A folder may have a beta after the name.
  of_none = re.compile("|".join(rf"{name}[\d.]*/" for name in none) or r"\Z.")
  some = [path for path in study["missing"] if not of_none.match(path)]
  return [*some, *([f"all seeds of {', '.join(none)}"] if none else [])]


def _divergence_sentences(moving: Sequence[study_plan.Variant], runs: dict[str, list]) -> list[str]:
  """What the numbers say of the reference without a gate as tau falls, and of the gate."""
  last, lines = {}, []
  for v in moving:
    delta = study_plan.load_config(v).reference.delta
    made = [r["accepted_d"] for r in runs[v.name] if r["accepted_d"] is not None]
    if delta == study_plan.NO_GATE and runs[v.name]:
      last[v.overrides["reference.tau"]] = float(np.mean([r["last_d"] for r in runs[v.name]]))
    elif made:
      where = "above" if max(made) > delta else "not above"
      lines.append(f"- {v.name}: the largest D of a move that was made, {max(made):.4f}, is {where} delta, {delta:g}.")
  if len(last) > 1:
    values = [last[tau] for tau in sorted(last, reverse=True)]
    rises = "rises" if all(a < b for a, b in itertools.pairwise(values)) else "does not rise throughout"
    by_tau = ", ".join(f"{last[tau]:.4f} at {tau}" for tau in sorted(last, reverse=True))
    lines.append(f"- Without a gate the last D {rises} as tau falls: {by_tau}.")
  return lines


_COLUMNS = {"preferred_share": ".1%", "win_rate": ".1%", "caption_accuracy_change": "+.1%", "updates": ".0f"}
_COLUMNS |= {"minutes": ".1f", "evaluations": ",.0f"}
_D = {"last_d": ".4f", "largest_d": ".4f", "accepted_d": ".4f", "moves": ".0f"}
_HEAD = """# Study of methods on tiny-sd

Made by `python scripts/study/study.py`; all numbers are in study.json (of the plot of D only those of runs since it
keeps them). Runs have half of the updates or iterations that the recipes
(configs/*_tiny.py) had when it was made; all that is not named is theirs.
Learning rates: of {factors} times the recipe's, with seed
{seed} and {pictures} pictures of each validation prompt, that of the highest preferred share among those whose caption
accuracy falls by at most {fall} points against base (if there is none, those that fall least); of equal ones the
smaller. Variants of tau alone take the rate of tau 16; those of one setting of SPO or of Diffusion-DPO's loss, and
shorter runs, that of the method. Those that end in _beta are the method with the beta that the same rule chose at its
learning rate, of its own, a tenth and ten times as much (IPO: as listed); where that is its own, they are the
same runs. Then {n} seeds, judged on the test prompts by the judge, which no training sees.

{conclusions}Numbers are means over seeds (lowest to highest). All have as many updates as Diffusion-DPO, or as many
iterations as SPO (quarter and half: 1/4 and 1/2 of them); KTO sees as many images as there are in the pairs. Caption
accuracy is the change against base. Minutes are those of training alone, by the median step, on one core of
machines that had other work. UNet evaluations are those of one sample in training, as docs/methods.md counts them.

Comparisons are by seed. Intervals are Student's t, of three seeds or more; d is the mean of the differences over their
standard deviation, p is of the exact two-sided sign-flip test, a weak one: with {n} seeds it cannot be below {p:.3g}.
They are not corrected for the number of comparisons, and tell of other seeds of training, not of other prompts, which
all runs share.

D is what the gate reads: a running mean of err_ref - err_init, 8 samples at a time, of the reference that is proposed,
also where it is then refused; reinit sets it to 0.

{divergence}{budget}
"""
_CLEAN = """spo_clean is judged by an ordinary preference model: the recipe of the step-aware one (configs/spm_tiny.py,
from the same tiny-clip), trained on images without noise, and told time 0 at every step.
"""


def plots(study: dict[str, Any], docs: pathlib.Path) -> None:
  """D over steps, and preferred share over minutes and UNet evaluations.

  The first is left as it is while a run with a moving reference came without its curve, as those of older reports; the
  second is there if its runs are.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  runs = {name: [r for r in rows if "failed" not in r] for name, rows in study["runs"].items()}
  size: dict[str, Any] = {"figsize": (9, 3.2), "layout": "constrained"}
  moving = [v for v in study_plan.VARIANTS if v.part == "A" and any("last_d" in r for r in runs[v.name])]
  if all("d_curve" in r for v in moving for r in runs[v.name]):
    figure, axes = plt.subplots(1, 2, **size)
    for v in moving:
      axis = axes[0 if study_plan.load_config(v).reference.delta == study_plan.NO_GATE else 1]
      axis.plot(*np.mean([r["d_curve"] for r in runs[v.name]], axis=0).T, label=v.name)
      axis.legend(fontsize=7)
    axes[1].axhline(study_plan.load_config(study_plan.BY_NAME["freeze_tau16"]).reference.delta, color="0.8")
    for axis, title in zip(axes, ("without a gate", "with a gate at the grey line"), strict=True):
      axis.set(title=title, xlabel="step", ylabel="D of the proposal, mean over seeds")
    figure.savefig(docs / "study_divergence.png", dpi=110)
    plt.close("all")
  (docs / "study_budget.png").unlink(missing_ok=True)
  if not _has_budgets(study):
    return
  figure, axes = plt.subplots(1, 2, sharey=True, **size)
  for axis, key in zip(axes, ("minutes", "evaluations"), strict=True):
    for label, names in study_plan.CURVES.items():
      points = [np.array([(r[key], 100 * r["preferred_share"]) for r in runs[n]]) for n in names if runs[n]]
      if points:
        (line,) = axis.plot(*np.array([p.mean(axis=0) for p in points]).T, label=label)
        axis.plot(*np.concatenate(points).T, "o", color=line.get_color(), markersize=3)
        axis.legend()
    axis.set(xlabel=f"{'UNet ' * (key == 'evaluations')}{key} of training", ylabel="preferred share, %: seeds and mean")
  figure.savefig(docs / "study_budget.png", dpi=110)
  plt.close("all")


def write(folder: pathlib.Path, docs: pathlib.Path, seeds: int) -> None:
  """The report of the runs in `folder`, into `docs`; conclusions come from study_conclusions.md there."""
  study = collect(folder, seeds)
  docs.mkdir(parents=True, exist_ok=True)
  plots(study, docs)
  conclusions = docs / "study_conclusions.md"
  text = conclusions.read_text() if conclusions.is_file() else ""
  plotted = (docs / "study_divergence.png").is_file()
  (docs / "study.md").write_text(markdown(study, text, divergence=plotted))
  (docs / "study.json").write_text(json.dumps(study, indent=1) + "\n")
