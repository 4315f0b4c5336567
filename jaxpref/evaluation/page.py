"""Writes the report of a comparison as one HTML file without network access: tables, interval plots, and pictures.

report.html.j2 and report.css define its looks; this module computes what they show.

The file contains the pictures, at most PIXELS wide and high and MAX_BYTES in all: if there are too many, they first get
smaller, then fewer. Small ones (pixel art) stay unchanged and are shown enlarged.
"""

import base64
import dataclasses
import io
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

PIXELS = (384, 256, 192, 128)  # longer side of a picture in the report; the first that fits is used
SMALL = 96  # pixels: pictures up to this size are kept unchanged
MAX_BYTES = 24 * 2**20  # of all pictures, as encoded in the file
BINS = 31  # bars of a distribution; odd, so that the middle has one

Place = tuple[str, int, int]  # model, prompt, seed
ImagePath = Callable[[str, int, int], pathlib.Path]


# ---- Text ------------------------------------------------------------------------------------------------------


def score_text(value: float) -> str:
  """Formats a score with four digits."""
  return format(value, "#.4g").rstrip(".")


def change_text(value: float) -> str:
  """Formats a difference with three digits and its sign."""
  return format(value, "+#.3g").rstrip(".") if value else "0"


def share_text(value: float) -> str:
  """Formats a win rate in percent."""
  return f"{value:.1%}"


def bounded(value: float, bounds: Sequence[float] | None, text: Callable[[float], str]) -> str:
  """Returns a number and its interval in brackets, if it has one."""
  return text(value) if bounds is None else f"{text(value)} [{text(bounds[0])}, {text(bounds[1])}]"


def p_text(p: float) -> str:
  """Formats a p value for tables."""
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


# ---- Plots -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
  """A bar of a histogram.

  Attributes:
    side: "up", "down" or "even": whether it lies above, below or around the middle; the class of its colour.
    left, right: its edges, as shares of the width.
    height: as a share of the highest bar's.
  """

  side: str
  left: float
  right: float
  height: float


@dataclasses.dataclass(frozen=True)
class Distribution:
  """A histogram of BINS bars, without the empty ones.

  Attributes:
    low, high: the values at its ends.
    middle: the value at its centre, None if its centre has no meaning.
  """

  bars: tuple[Bar, ...]
  low: float
  high: float
  middle: float | None


def distribution(values: np.ndarray, *, middle: float | None = 0.0) -> Distribution:
  """Returns the histogram of f[...], centred on a middle if there is one; each side of it has its own colour."""
  low, high = float(values.min()), float(values.max())
  if middle is not None:
    reach = max(high - middle, middle - low)
    low, high = middle - reach, middle + reach
  if low == high:
    low, high = low - 1.0, high + 1.0
  counts, _ = np.histogram(values, bins=BINS, range=(low, high))
  side = lambda i: "even" if middle is None or i == BINS // 2 else "up" if i > BINS // 2 else "down"
  heights = (counts / counts.max()).tolist()
  bars = tuple(Bar(side(i), i / BINS, (i + 1) / BINS, height) for i, height in enumerate(heights) if height)
  return Distribution(bars, low, high, middle)


def side_of(bounds: Sequence[float] | None, middle: float) -> str:
  """Returns "up" or "down" if an interval is above or below a value, "even" if it holds the value or is None."""
  if bounds is None:
    return "even"
  return "up" if bounds[0] > middle else "down" if bounds[1] < middle else "even"


# ---- Pictures --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Section:
  """Prompts and seeds whose pictures are shown.

  Attributes:
    title: its heading, such as "Largest gains".
    scorer: the scorer that chose them; None: chosen at random.
    models: models whose pictures are side by side.
    places: (prompt, seed) of each.
  """

  title: str
  scorer: str | None
  models: tuple[str, ...]
  places: tuple[tuple[int, int], ...]

  def pictures(self) -> list[Place]:
    return [(model, p, s) for p, s in self.places for model in self.models]


def extremes(values: np.ndarray, number: int) -> tuple[tuple[int, int], ...]:
  """Returns (prompt, seed) of the highest of f[P, S]: one seed for each prompt, the highest prompts first."""
  seeds = values.argmax(axis=1)
  best = values.max(axis=1)
  order = np.argsort(-best, kind="stable")[:number]
  return tuple((int(p), int(seeds[p])) for p in order)


def choose(results: Mapping[str, Any], number: int) -> list[Section]:
  """Returns the sections of the report, with at most `number` prompts each.

  For each scorer and model: its largest gains and its largest losses against the baseline; without a baseline its
  highest and lowest scores. Then some at random, the same for all models.
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
  """A picture in the page: its address, which contains its bytes, and its size in pixels."""

  uri: str
  width: int
  height: int


def encode(path: pathlib.Path, side: int) -> Picture:
  """Returns a small picture unchanged, a larger one with `side` pixels at its longer side.

  Raises:
    FileNotFoundError: the picture does not exist.
    ValueError: the file is not a picture.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    with Image.open(path) as opened:
      image = opened.convert("RGB")
  except FileNotFoundError as error:
    raise FileNotFoundError(f"the picture {path} does not exist; draw it again for the report.") from error
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
  """Returns the sections, their pictures, and the longest side to which these were reduced."""
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


def page(results: Mapping[str, Any], summary: Mapping[str, Any], image_path: ImagePath, *, pictures: int = 12) -> str:
  """Returns the whole file as text.

  Args:
    results: see `comparison`.
    summary: as `comparison.summarize` returns it.
    image_path: model, number of the prompt and number of the seed -> file of the picture.
    pictures: most pictures in each section.

  Raises:
    FileNotFoundError, ValueError: a picture is missing or is not a picture.
  """
  sections, embedded, side = embed(results, image_path, pictures)
  return template("report.html.j2").render(
    results=results,
    summary=summary,
    random=sections[-1],
    by_scorer=[(scorer, list(_changes(results, summary, scorer["name"], sections))) for scorer in results["scorers"]],
    pictures=embedded,
    side=side,
  )


def template(name: str, folder: pathlib.Path | None = None) -> Any:
  """Returns a template of a folder, by default this one, with the style of the report and its functions of numbers."""
  import jinja2
  import markupsafe

  here = pathlib.Path(__file__).parent
  environment = jinja2.Environment(
    autoescape=True,
    keep_trailing_newline=True,
    loader=jinja2.FileSystemLoader(folder or here),
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.globals.update(
    change_text=change_text,
    json_text=lambda value: json.dumps(value, ensure_ascii=False),
    p_text=p_text,
    score_text=score_text,
    share_text=share_text,
    side_of=side_of,
    small=SMALL,
    style=markupsafe.Markup((here / "report.css").read_text(encoding="utf-8")),
  )
  return environment.get_template(name)


@dataclasses.dataclass(frozen=True)
class Change:
  """What a scorer says about a model: its scores, or their change if there is a baseline.

  Attributes:
    heading: the model, and what it is compared with.
    label: title of the distribution.
    categories: category -> its comparison, see `statistics.compare`.
    sections: sections whose pictures this scorer chose.
  """

  heading: str
  label: str
  distribution: Distribution
  categories: Mapping[str, Any]
  sections: tuple[Section, ...]


def _changes(
  results: Mapping[str, Any], summary: Mapping[str, Any], scorer: str, sections: Sequence[Section]
) -> Iterator[Change]:
  baseline = results["baseline"]
  for model in results["models"]:
    mine = tuple(section for section in sections if section.scorer == scorer and section.models[-1] == model)
    if not mine:
      continue
    values = np.asarray(results["scores"][model][scorer], np.float64)
    if baseline is None:
      heading, label, middle = model, f"Distribution of {scorer} of {model}'s pictures", None
    else:
      values = values - np.asarray(results["scores"][baseline][scorer], np.float64)
      better, worse = float((values > 0).mean()), float((values < 0).mean())
      heading, middle = f"{model} against {baseline}", 0.0
      label = f"Score of {model} minus that of {baseline}, {values.size} pairs: {better:.1%} above 0, {worse:.1%} below"
    categories = summary["comparisons"].get(model, {}).get(scorer, {}).get("categories", {})
    yield Change(heading, label, distribution(values, middle=middle), categories, mine)
