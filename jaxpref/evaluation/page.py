"""The report of a comparison as one HTML file that needs no network: tables, interval plots, and pictures side by side.

Pictures are in the file itself, at most PIXELS wide and high, and at most MAX_BYTES in all: where there are too many
they are made smaller first, then fewer. Small ones (pixel art) stay as they are and are shown enlarged.
"""

import base64
import dataclasses
import io
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

PIXELS = (384, 256, 192, 128)  # longer side of a picture in the report; the first that fits
SMALL = 96  # pixels: up to this a picture is kept as it is
MAX_BYTES = 24 * 2**20  # of all pictures, as they stand in the file
BINS = 31  # of a distribution; odd, so that its middle has one

Place = tuple[str, int, int]  # model, prompt, seed
ImagePath = Callable[[str, int, int], pathlib.Path]


# ---- Text ------------------------------------------------------------------------------------------------------


def score_text(value: float) -> str:
  """Four digits, as all scores have."""
  return format(value, "#.4g").rstrip(".")


def change_text(value: float) -> str:
  """Three digits and the sign, as all differences have."""
  return format(value, "+#.3g").rstrip(".") if value else "0"


def share_text(value: float) -> str:
  """Percent, as win rates are."""
  return f"{value:.1%}"


def bounded(value: float, bounds: Sequence[float] | None, text: Callable[[float], str]) -> str:
  """A number and its interval in brackets, if it has one."""
  return text(value) if bounds is None else f"{text(value)} [{text(bounds[0])}, {text(bounds[1])}]"


def p_text(p: float) -> str:
  """A p value as tables have it."""
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(text: str) -> str:
  """A number, and the interval below it."""
  value, bracket, bounds = text.partition(" [")
  return escape(value) + (f" <small>[{escape(bounds)}</small>" if bracket else "")


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
  """A table that is a list of cards on narrow screens; cells are HTML, the first of each row is its header.

  The roles are those of the elements, which they lose for screen readers where their display is not that of a table.
  """
  head = "".join(f'<th role="columnheader" scope="col">{escape(name)}</th>' for name in header)
  body = []
  for row in rows:
    cells = [f'<th role="rowheader" scope="row">{row[0]}</th>']
    cells += [
      f'<td role="cell" data-label="{escape(name)}"><span>{cell}</span></td>'
      for name, cell in zip(header[1:], row[1:], strict=True)
    ]
    body.append(f'<tr role="row">{"".join(cells)}</tr>')
  return (
    f'<table role="table" class="stack {kind}"><caption>{escape(caption)}</caption>'
    f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{"".join(body)}</tbody></table>'
  )


# ---- Plots -----------------------------------------------------------------------------------------------------


def _side(bounds: Sequence[float] | None, middle: float) -> str:
  """Whether an interval is above or below a value, or holds it; also the class of its colour."""
  if bounds is None:
    return "even"
  return "up" if bounds[0] > middle else "down" if bounds[1] < middle else "even"


def interval_plot(value: float, bounds: Sequence[float] | None, side: str) -> str:
  """A share in [0, 1] as a dot and its interval as a bar, on a line with a mark at 50 %, beside text that says it.

  Args:
    side: "up", "down" or "even", for the colour.
  """
  x = lambda share: round(6 + 128 * share, 1)
  bar = ""
  if bounds is not None:
    bar = f'<line class="bar" x1="{x(bounds[0])}" x2="{x(bounds[1])}" y1="10" y2="10"/>'
  return (
    f'<svg class="plot {side}" viewBox="0 0 140 20" aria-hidden="true">'
    f'<line class="axis" x1="{x(0)}" x2="{x(1)}" y1="10" y2="10"/>'
    f'<line class="axis" x1="{x(0.5)}" x2="{x(0.5)}" y1="2" y2="18"/>'
    f'{bar}<circle cx="{x(value)}" cy="10" r="4.5"/></svg>'
  )


def distribution_plot(values: np.ndarray, label: str, *, middle: float | None = 0.0) -> str:
  """A histogram; with a middle this is at the centre, and the bars below, around and above it have three colours."""
  width, height, base = 360, 130, 104
  low, high = float(values.min()), float(values.max())
  if middle is not None:
    reach = max(high - middle, middle - low)
    low, high = middle - reach, middle + reach
  if low == high:
    low, high = low - 1.0, high + 1.0
  counts, edges = np.histogram(values, bins=BINS, range=(low, high))
  step = (width - 20) / BINS
  bars = []
  for i, count in enumerate(counts.tolist()):
    if count:
      side = "even" if middle is None or i == BINS // 2 else "up" if i > BINS // 2 else "down"
      tall = max(1.0, 94 * count / counts.max())
      bars.append(
        f'<rect class="{side}" x="{10 + i * step:.1f}" y="{base - tall:.1f}" width="{step - 1:.1f}" '
        f'height="{tall:.1f}"/>'
      )
  text = score_text if middle is None else change_text
  marks: list[tuple[float, str, float]] = [(10, "start", low), (width - 10, "end", high)]
  line = ""
  if middle is not None:
    marks.append((width / 2, "middle", middle))
    line = f'<line class="axis" x1="{width / 2}" x2="{width / 2}" y1="4" y2="{base}"/>'
  texts = "".join(
    f'<text x="{x:g}" y="{base + 18}" text-anchor="{anchor}">{text(value)}</text>' for x, anchor, value in marks
  )
  return (
    f'<svg class="distribution" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    f'{"".join(bars)}<line class="axis" x1="10" x2="{width - 10}" y1="{base}" y2="{base}"/>{line}{texts}</svg>'
  )


# ---- Pictures --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Section:
  """Prompts and seeds whose pictures are shown.

  Attributes:
    title: such as "Largest gains".
    scorer: by which they were chosen; None: at random.
    models: whose pictures are side by side.
    places: (prompt, seed) of each.
  """

  title: str
  scorer: str | None
  models: tuple[str, ...]
  places: tuple[tuple[int, int], ...]

  def pictures(self) -> list[Place]:
    return [(model, p, s) for p, s in self.places for model in self.models]


def extremes(values: np.ndarray, number: int) -> tuple[tuple[int, int], ...]:
  """(prompt, seed) of the highest of f[P, S]: one seed of each prompt, the highest prompts first."""
  seeds = values.argmax(axis=1)
  best = values.max(axis=1)
  order = np.argsort(-best, kind="stable")[:number]
  return tuple((int(p), int(seeds[p])) for p in order)


def choose(results: Mapping[str, Any], number: int) -> list[Section]:
  """The sections of the report, with at most `number` prompts each.

  For each scorer and model: where it gains most against the baseline and where it loses most, of prompts where it does;
  without a baseline its highest and lowest scores. Then some at random, which are the same for all models.
  """
  models, baseline = tuple(results["models"]), results["baseline"]
  sections = []
  for name in (scorer["name"] for scorer in results["scorers"]):
    of = {model: np.asarray(results["scores"][model][name], np.float64) for model in models}
    for model in models:
      if baseline is None:
        sections.append(Section("Highest scores", name, (model,), extremes(of[model], number)))
        sections.append(Section("Lowest scores", name, (model,), extremes(-of[model], number)))
      elif model != baseline:
        gain = of[model] - of[baseline]
        for title, change in (("Largest gains", gain), ("Largest losses", -gain)):
          places = tuple((p, s) for p, s in extremes(change, number) if change[p, s] > 0)
          sections.append(Section(title, name, (baseline, model), places))
  rng = np.random.default_rng(0)
  prompts = rng.permutation(len(results["prompts"]))[:number].tolist()
  seeds = rng.integers(0, results["seeds_per_prompt"], len(prompts)).tolist()
  order = models if baseline is None else (baseline, *(m for m in models if m != baseline))
  return [*sections, Section("Random", None, order, tuple(zip(prompts, seeds, strict=True)))]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture as the page has it: its address, which holds its bytes, and its size in pixels."""

  uri: str
  width: int
  height: int


def encode(path: pathlib.Path, side: int) -> Picture:
  """A small picture as it is, a larger one with `side` pixels at its longer side.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is no picture.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    with Image.open(path) as opened:
      image = opened.convert("RGB")
  except FileNotFoundError as error:
    raise FileNotFoundError(f"there is no picture {path}; draw it again for the report.") from error
  except (UnidentifiedImageError, OSError) as error:
    raise ValueError(f"{path} cannot be read as a picture ({error}); draw it again for the report.") from error
  stream = io.BytesIO()
  if max(image.size) <= SMALL:
    image.save(stream, "PNG", optimize=True)
    kind = "png"
  else:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=85, optimize=True)
    kind = "jpeg"
  content = base64.b64encode(stream.getvalue()).decode()
  return Picture(f"data:image/{kind};base64,{content}", *image.size)


def embed(
  results: Mapping[str, Any], image_path: ImagePath, number: int
) -> tuple[list[Section], dict[Place, Picture], int]:
  """The sections, their pictures, and the longest side that these were reduced to."""
  while True:
    sections = choose(results, number)
    shown = Counter(place for section in sections for place in section.pictures())
    for side in PIXELS:
      pictures, size = {}, 0
      for place, times in shown.items():
        pictures[place] = encode(image_path(*place), side)
        size += times * len(pictures[place].uri)
        if size > MAX_BYTES:
          break
      else:
        return sections, pictures, side
    number //= 2


# ---- The page --------------------------------------------------------------------------------------------------

SIDES = {"higher": "up", "lower": "down", "undecided": "even"}
SIGNS = {"higher": "▲ higher", "lower": "▼ lower", "undecided": "undecided"}


def page(results: Mapping[str, Any], summary: Mapping[str, Any], image_path: ImagePath, *, pictures: int = 12) -> str:
  """The whole file.

  Args:
    results: see `comparison`.
    summary: of `comparison.summarize`.
    image_path: model, number of the prompt and number of the seed -> file of the picture.
    pictures: in each section, at most.

  Raises:
    FileNotFoundError, ValueError: a picture is missing or none.
  """
  sections, embedded, side = embed(results, image_path, pictures)
  baseline = results["baseline"]
  others = [model for model in results["models"] if model != baseline]
  title = f"{', '.join(others)} against {baseline}"
  if baseline is None or not others:
    title = f"Scores of {', '.join(results['models'])}"
  parts = [
    f"<header><h1>{escape(title)}</h1><p>{_counts(results, summary)}</p>{_navigation(summary)}</header>",
    "<main>",
    _warnings(summary),
    f'<section id="summary"><h2>Scores</h2>{_how_to_read(results, summary)}',
    f"{_summary_table(results, summary)}</section>",
    _diversity(summary),
    '<section id="scorers"><h2>By scorer</h2>',
    *(_scorer(results, summary, i, sections, embedded) for i in range(len(results["scorers"]))),
    "</section>",
    f'<section id="random"><h2>Random pictures</h2>{_cards(results, sections[-1], embedded)}</section>',
    _settings(results, side),
    "</main>",
  ]
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">"
    f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
  )


def _counts(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
  counts = [(len(results["models"]), "model"), (len(results["scorers"]), "scorer"), (summary["prompts"], "prompt")]
  words = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts]
  seeds = summary["seeds_per_prompt"]
  return f"{', '.join(words)}, {seeds} picture{'' if seeds == 1 else 's'} of each prompt and model"


def _navigation(summary: Mapping[str, Any]) -> str:
  places = [("summary", "Scores"), ("diversity", "Diversity"), ("scorers", "By scorer"), ("random", "Random pictures")]
  places.append(("settings", "Settings"))
  links = (f'<a href="#{id_}">{name}</a>' for id_, name in places if id_ != "diversity" or summary["diversity"])
  return f'<nav aria-label="Sections">{"".join(links)}</nav>'


def _warnings(summary: Mapping[str, Any]) -> str:
  if not summary["warnings"]:
    return ""
  items = "".join(f"<li>{escape(text)}</li>" for text in summary["warnings"])
  heading = '<h2 id="warning">⚠ Before you read on</h2>'
  return f'<section class="warning" aria-labelledby="warning">{heading}<ul>{items}</ul></section>'


def _how_to_read(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
  if not summary["comparisons"]:
    text = "Higher scores are better." + (
      f" Brackets are 95 % intervals, from {summary['bootstrap_samples']} resamples of the prompts."
      if summary["prompts"] > 1
      else ""
    )
    return f"<p>{text}</p>"
  text = (
    f"The win rate is the share of pairs of pictures, of the same prompt and seed, in which the model's scores higher "
    f"than {results['baseline']}'s; ties count half, so 50 % means no difference. "
  )
  if summary["prompts"] > 1:
    text += (
      f"Brackets and bars are 95 % intervals, from {summary['bootstrap_samples']} resamples of the prompts; p is that "
      f"of an exact sign test over prompts, corrected by Holm's method for {summary['tests']} comparisons, and a model "
      "is called higher or lower where p is below 0.05 and the interval leaves out 50 %."
    )
  return f"<p>{escape(text).replace(' %', '&nbsp;%')}</p>"


def _win_rate(found: Mapping[str, Any]) -> str:
  bounds = found["win_rate_interval"]
  side = SIDES[found["verdict"]] if "verdict" in found else _side(bounds, 0.5)
  return interval_plot(found["win_rate"], bounds, side) + _number(bounded(found["win_rate"], bounds, share_text))


def _summary_table(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
  tables = []
  header = ["model", "mean", "median"]
  if summary["comparisons"]:
    header += [f"win rate against {results['baseline']}", "verdict", "p", "difference", "effect size"]
  for scorer in results["scorers"]:
    rows = []
    for model in results["models"]:
      one = summary["models"][model][scorer["name"]]
      row = [escape(model), _number(bounded(one["mean"], one["interval"], score_text)), score_text(one["median"])]
      pair = summary["comparisons"].get(model, {}).get(scorer["name"])
      if pair is not None:
        effect = pair["effect_size"]
        row += [
          _win_rate(pair),
          f'<b class="{pair["verdict"]}">{SIGNS[pair["verdict"]]}</b>',
          escape(p_text(pair["p_holm"])),
          _number(bounded(pair["difference"], pair["difference_interval"], change_text)),
          "–" if effect is None else f"{effect:+.2f}",
        ]
      elif summary["comparisons"]:
        row = [f"{row[0]} <small>baseline</small>", *row[1:], *[""] * 5]
      rows.append(row)
    tables.append(_table(_scorer_title(scorer), header, rows, kind="wide" if summary["comparisons"] else ""))
  return "".join(tables)


def _scorer_title(scorer: Mapping[str, Any]) -> str:
  return f"{scorer['name']} (version {scorer['version']}, scale: {scorer['scale']})"


def _diversity(summary: Mapping[str, Any]) -> str:
  if not summary["diversity"]:
    return ""
  signs = {"up": '<b class="higher">▲ rises</b>', "down": '<b class="lower">▼ falls</b>', "even": "undecided"}
  compared = any("change" in found for found in summary["diversity"].values())
  rows = []
  for model, found in summary["diversity"].items():
    row = [escape(model), _number(bounded(found["mean"], found["interval"], score_text))]
    if "change" in found:
      bounds = found["change_interval"]
      row += [_number(bounded(found["change"], bounds, change_text)), signs[_side(bounds, 0.0)]]
    elif compared:
      row += ["", ""]
    rows.append(row)
  header = ["model", "diversity", *(["change", "verdict"] if compared else [])]
  text = "How different the pictures of one prompt are; where it falls, higher scores may come from drawing the same."
  tests = sum("change" in found for found in summary["diversity"].values())
  if tests > 1:
    text += f" Changes have intervals of {100 - 5 / tests:.4g} %, as there are {tests} of them."
  return f'<section id="diversity"><h2>Diversity</h2><p>{text}</p>{_table("Mean over prompts", header, rows)}</section>'


def _scorer(
  results: Mapping[str, Any],
  summary: Mapping[str, Any],
  number: int,
  sections: Sequence[Section],
  embedded: Mapping[Place, Picture],
) -> str:
  scorer = results["scorers"][number]
  name, baseline = scorer["name"], results["baseline"]
  parts = []
  for model in results["models"]:
    mine = [section for section in sections if section.scorer == name and section.models[-1] == model]
    if not mine:
      continue
    values = np.asarray(results["scores"][model][name], np.float64)
    if baseline is None:
      label = f"Distribution of {name} of {model}'s pictures"
      plot = distribution_plot(values, label, middle=None)
    else:
      values = values - np.asarray(results["scores"][baseline][name], np.float64)
      better, worse = float((values > 0).mean()), float((values < 0).mean())
      label = f"Score of {model} minus that of {baseline}, {values.size} pairs: {better:.1%} above 0, {worse:.1%} below"
      plot = distribution_plot(values, label)
    heading = model if baseline is None else f"{model} against {baseline}"
    parts.append(f"<h4>{escape(heading)}</h4><figure>{plot}<figcaption>{escape(label)}</figcaption></figure>")
    categories = summary["comparisons"].get(model, {}).get(name, {}).get("categories", {})
    if categories:
      rows = [
        [
          escape(category or "(none)"),
          str(found["prompts"]),
          _win_rate(found),
          _number(bounded(found["difference"], found["difference_interval"], change_text)),
        ]
        for category, found in categories.items()
      ]
      caption = "By category; intervals are not corrected for their number, and categories of few prompts have none"
      parts.append(_table(caption, ["category", "prompts", "win rate", "difference"], rows))
    for section in mine:
      parts.append(f"<h5>{escape(section.title)}</h5>{_cards(results, section, embedded)}")
  opened = " open" if number == 0 else ""
  return f"<details{opened}><summary><h3>{escape(_scorer_title(scorer))}</h3></summary>{''.join(parts)}</details>"


def _cards(results: Mapping[str, Any], section: Section, embedded: Mapping[Place, Picture]) -> str:
  if not section.places:
    return "<p>There are none.</p>"
  return f'<ul class="cards">{"".join(_card(results, section, p, s, embedded) for p, s in section.places)}</ul>'


def _card(results: Mapping[str, Any], section: Section, p: int, s: int, embedded: Mapping[Place, Picture]) -> str:
  prompt = results["prompts"][p]
  about = [prompt.get("category", ""), prompt.get("id", ""), f"prompt {p}", f"seed {s}"]
  pictures = []
  for model in section.models:
    picture = embedded[model, p, s]
    small = ' class="pixels"' if max(picture.width, picture.height) <= SMALL else ""
    pictures.append(
      f'<figure><img{small} src="{picture.uri}" width="{picture.width}" height="{picture.height}" '
      f'decoding="async" alt="{escape(f"drawn by {model}")}"><figcaption>{escape(model)}</figcaption></figure>'
    )
  changes = len(section.models) == 2 and results["baseline"] is not None
  header = "".join(f'<th scope="col">{escape(model)}</th>' for model in section.models)
  rows = []
  for name in (scorer["name"] for scorer in results["scorers"]):
    values = [results["scores"][model][name][p][s] for model in section.models]
    cells = [score_text(float(value)) for value in values]
    cells += [change_text(values[1] - values[0])] if changes else []
    chosen = ' class="chosen"' if name == section.scorer else ""
    body = "".join(f"<td>{cell}</td>" for cell in cells)
    rows.append(f'<tr{chosen}><th scope="row">{escape(name)}</th>{body}</tr>')
  header += '<th scope="col">difference</th>' if changes else ""
  scrolls = ' tabindex="0" role="group" aria-label="Scores"' if len(section.models) > 2 else ""
  return (
    f'<li><p class="prompt" dir="auto">{escape(prompt["text"])}</p>'
    f'<p class="about">{escape(" · ".join(str(a) for a in about if a != ""))}</p><div class="pictures">'
    f'{"".join(pictures)}</div><div class="scroll"{scrolls}>'
    f"<table><thead><tr><td></td>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></li>"
  )


def _settings(results: Mapping[str, Any], side: int) -> str:
  def text(value: Any) -> str:
    if isinstance(value, Mapping):
      return "<br>".join(f"{escape(str(name))}: {text(part)}" for name, part in value.items())
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

  rows = (
    f'<tr><th scope="row">{escape(str(name))}</th><td>{text(value)}</td></tr>'
    for name, value in results["settings"].items()
  )
  return (
    '<section id="settings"><h2>Settings</h2><table class="settings"><caption>How the pictures were drawn</caption>'
    f"<tbody>{''.join(rows)}</tbody></table><p>Here pictures are reduced to at most {side} pixels; those of at most "
    f"{SMALL} are as they are, and shown enlarged. Prompts and seeds are counted from 0.</p></section>"
  )


STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1d2126; --soft: #5a626c; --line: #d9dce0; --card: #ffffff;
  --up: #1a6fb0; --down: #b3471d; --even: #6a717b; --warn: #fff4d6; --warn-line: #b07d00; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e7e9ec; --soft: #a4acb6; --line: #343a42;
  --card: #1d2126; --up: #6fb7ee; --down: #f09a6b; --even: #a4acb6; --warn: #3a2f12; --warn-line: #e0b040;
  --link: #8cc4f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
main { padding-bottom: 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 0.25rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 0.5rem; }
h3 { font-size: 1.05rem; margin: 0; display: inline; }
h4 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; }
h5 { font-size: 0.95rem; margin: 1.25rem 0 0.5rem; }
header > p, .about, figcaption, caption, small { color: var(--soft); }
header > p { margin: 0; }
p { max-width: 70ch; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin-top: 0.75rem; }
nav a { padding: 0.25rem 0; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); margin-top: 1.25rem;
  padding: 0.75rem 1rem; }
.warning h2 { margin: 0; font-size: 1rem; }
.warning ul { margin: 0.25rem 0 0; padding-left: 1.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.25rem 0; font-weight: 600; }
.stack { width: 100%; margin: 1rem 0; font-size: 0.9rem; }
.stack th, .stack td { text-align: left; vertical-align: middle; padding: 0.4rem 0.75rem 0.4rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
.stack thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
.stack td small { white-space: nowrap; }
@media (min-width: 64rem) {
  .wide { table-layout: fixed; }
  .wide th:nth-child(1) { width: 15%; } .wide th:nth-child(2) { width: 14%; } .wide th:nth-child(3) { width: 6%; }
  .wide th:nth-child(4) { width: 25%; } .wide th:nth-child(5) { width: 9%; } .wide th:nth-child(6) { width: 6%; }
  .wide th:nth-child(7) { width: 17%; }
}
.settings { font-size: 0.9rem; }
.settings th, .settings td { text-align: left; vertical-align: top; padding: 0.3rem 1rem 0.3rem 0;
  border-bottom: 1px solid var(--line); }
.settings th { font-weight: 500; color: var(--soft); min-width: 6rem; }
.plot { width: 7.5rem; height: 1.1rem; vertical-align: middle; margin-right: 0.5rem; }
.plot .axis, .distribution .axis { stroke: var(--even); stroke-width: 1; opacity: 0.6; }
.plot .bar { stroke-width: 4; stroke: var(--even); }
.plot circle { fill: var(--even); }
.plot.up .bar { stroke: var(--up); } .plot.up circle, rect.up { fill: var(--up); }
.plot.down .bar { stroke: var(--down); } .plot.down circle, rect.down { fill: var(--down); }
rect.even { fill: var(--even); }
b.higher { color: var(--up); } b.lower { color: var(--down); } b.undecided { font-weight: 400; }
.distribution { display: block; width: 100%; max-width: 32rem; }
.distribution text { font-size: 10px; fill: var(--soft); }
details { border: 1px solid var(--line); border-radius: 0.5rem; padding: 0 1rem; margin: 0.75rem 0;
  background: var(--card); }
details[open] { padding-bottom: 1rem; }
summary { padding: 0.75rem 0; cursor: pointer; }
figure { margin: 0; }
figcaption { font-size: 0.85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem; padding: 0;
  margin: 0; list-style: none; }
.cards > li { border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.75rem; background: var(--card);
  min-width: 0; }
.prompt { margin: 0; font-weight: 600; line-height: 1.35; }
.about { margin: 0.15rem 0 0.5rem; font-size: 0.85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(7.5rem, 45%), 1fr)); gap: 0.5rem; }
.pictures img { display: block; width: 100%; height: auto; border-radius: 0.25rem; }
.pictures .pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; margin-top: 0.5rem; font-size: 0.85rem; }
.scroll table { width: 100%; }
.scroll th, .scroll td { padding: 0.15rem 0.5rem 0.15rem 0; font-weight: 400; text-align: right;
  overflow-wrap: break-word; }
.scroll th[scope=row] { text-align: left; }
.scroll tbody > tr > * { white-space: nowrap; }
.scroll thead { color: var(--soft); }
.scroll .chosen > * { font-weight: 700; }
@media (max-width: 48rem) {
  .stack, .stack tbody, .stack caption { display: block; }
  .stack thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stack tr { display: block; border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.5rem 0.75rem;
    margin-bottom: 0.5rem; background: var(--card); }
  .stack th[scope=row] { display: block; border: 0; padding: 0; }
  .stack td { display: grid; grid-template-columns: 7.5rem minmax(0, 1fr); gap: 0.5rem; border: 0; padding: 0.15rem 0; }
  .stack td::before { content: attr(data-label); color: var(--soft); }
  .stack td:has(span:empty) { display: none; }
  .stack td small { white-space: normal; }
  .stack .plot { display: block; }
  details { padding: 0 0.75rem; }
}
@media print { body { background: none; } .cards > li, .stack tr { break-inside: avoid; } }
"""
