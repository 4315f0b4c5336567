"""All numbers of a comparison, its files, and a page that stands alone whatever the prompts hold."""

import base64
import copy
import csv
import html.parser
import io
import json
import pathlib
import re
import shutil
import subprocess
import tomllib

import numpy as np
import pytest
from PIL import Image

from jaxpref.evaluation import comparison, statistics
from jaxpref.evaluation import page as comparison_page

HOSTILE = "</title><script>alert(1)</script> & \"quoted\" 'single' <img src=http://example.com/x onerror=alert(1)>"
SCORERS = [
  {"name": "pickscore", "version": "v1", "scale": "cosine x 100"},
  {"name": "aesthetic", "version": "sac+logos+ava1-l14-linearMSE", "scale": "1 to 10"},
]


def make_results(models=("base", "dpo", "spo"), prompts=24, seeds=3, baseline="base"):
  """dpo gains by pickscore and loses by aesthetic and in diversity, spo is like base."""
  rng = np.random.default_rng(0)
  shift = {"dpo": {"pickscore": 1.0, "aesthetic": -1.0}}
  common = {s["name"]: rng.standard_normal((prompts, seeds)) for s in SCORERS}
  scores = {
    model: {
      name: (20 + values + shift.get(model, {}).get(name, 0) + 0.3 * rng.standard_normal(values.shape)).tolist()
      for name, values in common.items()
    }
    for model in models
  }
  return {
    "models": list(models),
    "baseline": baseline,
    "prompts": [
      {"text": f"a cat, number {i}", "category": ("Animals", "Arts")[i % 2], "id": f"{i:05}"} for i in range(prompts)
    ],
    "seeds_per_prompt": seeds,
    "settings": {"scheduler": "ddim", "guidance": 7.5, "size": [64, 64], "weights": {"base": "a", "dpo": 1}},
    "scorers": SCORERS,
    "scores": scores,
    "diversity": {m: (0.4 - 0.1 * (m == "dpo") + 0.02 * rng.standard_normal(prompts)).tolist() for m in models},
  }


@pytest.fixture
def results():
  return make_results()


def pictures(folder, size=(32, 32)):
  """image_path of toy pictures, made as they are asked for; those that were are in `.asked`."""
  folder.mkdir(exist_ok=True)

  def image_path(model, p, s):
    image_path.asked.append((model, p, s))
    file = folder / f"{abs(hash(model))}-{p}-{s}.png"
    if not file.exists():
      noise = np.random.default_rng([p, s, len(model)]).integers(0, 255, (*size[::-1], 3), np.uint8)
      Image.fromarray(noise).save(file)
    return file

  image_path.asked = []
  return image_path


# ---- Numbers ---------------------------------------------------------------------------------------------------


def test_summary_is_that_of_the_statistics(results):
  summary = comparison.summarize(results)
  base, dpo = (np.asarray(results["scores"][m]["pickscore"]) for m in ("base", "dpo"))
  assert summary["models"]["dpo"]["pickscore"] == statistics.describe(dpo)
  found = summary["comparisons"]["dpo"]["pickscore"]
  for name, value in statistics.compare(dpo, base, categories=["Animals", "Arts"] * 12).items():
    assert found[name] == value
  assert list(summary["comparisons"]) == ["dpo", "spo"]
  assert set(found["categories"]) == {"Animals", "Arts"}
  assert summary["diversity"]["dpo"]["falls"] and not summary["diversity"]["spo"]["falls"]
  assert "change" not in summary["diversity"]["base"]
  json.dumps(summary, allow_nan=False)


def test_p_is_corrected_over_all_scorers_and_models(results):
  summary = comparison.summarize(results)
  tests = [pair for of_model in summary["comparisons"].values() for pair in of_model.values()]
  assert summary["tests"] == len(tests) == 4
  assert [t["p_holm"] for t in tests] == statistics.holm([t["p"] for t in tests])
  assert [t["verdict"] for t in tests] == ["higher", "lower", "undecided", "undecided"]


def test_a_verdict_needs_the_corrected_p_and_the_interval(results):
  """Six of six prompts won: p is 0.03 by itself, and nothing is said if there are two comparisons."""
  few = make_results(("base", "dpo"), prompts=6)
  assert [c["verdict"] for c in comparison.summarize(few)["comparisons"]["dpo"].values()] == ["undecided"] * 2
  few["scorers"] = few["scorers"][:1]
  found = comparison.summarize(few)["comparisons"]["dpo"]["pickscore"]
  assert found["p"] == found["p_holm"] == 2 / 2**6 and found["verdict"] == "higher"


def test_what_a_reader_must_know_is_said():
  (warning,) = comparison.summarize(make_results())["warnings"]
  assert warning.startswith("The pictures of dpo are less diverse than those of base: -0.")
  assert "There is only one prompt" in comparison.summarize(make_results(prompts=1))["warnings"][0]
  assert "only 19 prompts" in comparison.summarize(make_results(prompts=19))["warnings"][0]
  same = make_results(("base", "copy"))
  for of_models in (same["scores"], same["diversity"]):
    of_models["copy"] = of_models["base"]
  summary = comparison.summarize(same)
  assert summary["warnings"] == ["All scores of copy and base are equal: they may be the same model."]
  assert summary["comparisons"]["copy"]["pickscore"]["win_rate"] == 0.5


def test_without_a_baseline_nothing_is_compared(results):
  summary = comparison.summarize(results | {"baseline": None})
  assert summary["comparisons"] == {} and summary["tests"] == 0 and summary["warnings"] == []
  assert set(summary["models"]) == {"base", "dpo", "spo"}


def change(**fields):
  return lambda results: results.update(fields)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda r: r.pop("settings"), "results have no settings; expected models, baseline"),
    (change(models=[]), r"models of the results: \[\]; expected at least one"),
    (change(models=["base", "base"]), "each with its own name"),
    (change(scorers=SCORERS + SCORERS[:1]), "scorers of the results: .*each with its own name"),
    (change(baseline="bsae"), "baseline 'bsae' is not one of the models base, dpo, spo"),
    (change(prompts=["a cat"] * 24), "prompts of the results: expected"),
    (lambda r: r["scores"]["dpo"].pop("aesthetic"), "there are no scores of dpo by aesthetic; score all models"),
    (change(seeds_per_prompt=2), r"scores of base by pickscore: shape \(24, 3\); expected \(24, 2\)"),
    (
      lambda r: r["scores"]["spo"]["aesthetic"][4].__setitem__(2, float("nan")),
      "scores of spo by aesthetic: no finite number for prompt 4 seed 2",
    ),
    (lambda r: r["diversity"].update(dpo=[0.1]), "diversity of dpo: 1 values; expected .* and 24 values"),
    (lambda r: r["diversity"].update(other=[0.1] * 24), "diversity of other: 24 values; expected one of the models"),
  ],
)
def test_results_of_another_form_are_refused(results, damage, message):
  damage(results)
  with pytest.raises(ValueError, match=message) as caught:
    comparison.summarize(results)
  assert "\n" not in str(caught.value)


# ---- Files -----------------------------------------------------------------------------------------------------


def test_write_makes_all_files_of_a_comparison(tmp_path, results):
  before = copy.deepcopy(results)
  summary = comparison.write(tmp_path / "a" / "b", results, pictures(tmp_path / "pictures"))
  assert results == before
  folder = tmp_path / "a" / "b"
  assert {f.name for f in folder.iterdir()} == set(comparison.FILES)
  read = json.loads((folder / "results.json").read_text())
  assert read.pop("summary") == json.loads(json.dumps(summary)) and read == results
  assert comparison.summarize(read) == summary  # from the file again

  with (folder / "scores.csv").open(newline="") as stream:
    rows = list(csv.DictReader(stream))
  assert len(rows) == 3 * 24 * 3
  row = rows[24 * 3 + 3 * 5 + 2]
  assert (row["model"], row["prompt"], row["seed"], row["id"]) == ("dpo", "5", "2", "00005")
  assert (row["category"], row["text"]) == ("Arts", "a cat, number 5")
  assert float(row["aesthetic"]) == results["scores"]["dpo"]["aesthetic"][5][2]


def test_halves_of_characters_are_written(tmp_path, results):
  results["prompts"][0]["text"] = json.loads('"a cat \\ud83d"')
  comparison.write(tmp_path, results, pictures(tmp_path / "pictures"))
  assert json.loads((tmp_path / "results.json").read_text())["prompts"] == results["prompts"]
  assert "a cat ?" in (tmp_path / "scores.csv").read_text()


def cells(line):
  return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_has_tables_of_scores_categories_and_diversity(results):
  results["prompts"][1]["category"] = "a|b"
  summary = comparison.summarize(results)
  text = comparison.markdown(results, summary)
  tables = [[cells(line) for line in block.splitlines()] for block in text.split("\n\n") if block.startswith("|")]
  scores, categories, diversity = tables
  for table in tables:
    assert {len(row) for row in table} == {len(table[0])} and set(table[1]) == {"---"}
  assert scores[2][:2] == ["pickscore", "base"] and scores[2][4:] == [""] * 4
  pair = summary["comparisons"]["dpo"]["pickscore"]
  low, high = pair["win_rate_interval"]
  assert scores[3][4] == f"{pair['win_rate']:.1%} [{low:.1%}, {high:.1%}]" and scores[3][5] == "< 0.001"
  assert "a\\|b" in {row[2] for row in categories} and len(categories) == 2 + 2 * 2 * 3
  assert [row[0] for row in diversity[2:]] == ["base", "dpo", "spo"]
  assert "24 prompts, 3 pictures each" in text and "corrected (Holm) for 4 comparisons" in text
  assert "Note: The pictures of dpo are less diverse" in text


@pytest.fixture
def latex_table(results):
  """With a model whose name has all that LaTeX reads."""
  results["models"][1] = name = "dpo_5%&$#{x}~^\\<"
  for part in ("scores", "diversity"):
    results[part][name] = results[part].pop("dpo")
  return comparison.latex(results, comparison.summarize(results))


def test_the_latex_table_is_escaped_and_aligned(latex_table):
  assert r"dpo\_5\%\&\$\#\{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textless{}" in latex_table
  body = [line for line in latex_table.splitlines() if line.endswith(r"\\")]
  assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {8} and len(body) == 1 + 2 * 3
  assert r"\begin{tabular}{llrrrrrr}" in latex_table and latex_table.count(r"\addlinespace") == 1
  assert "[$-$" in latex_table and " -" not in "".join(body)  # a minus, not a hyphen
  for line in latex_table.replace("$-$", "").splitlines():
    assert line.startswith("% ") or not re.search(r"(?<!\\)[%#$]", line)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX is not installed")
def test_the_latex_table_compiles(tmp_path, latex_table):
  start = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
  (tmp_path / "page.tex").write_text(f"{start}{latex_table}\\end{{document}}\n")
  command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-2000:]


def test_numbers_are_written_though_a_picture_is_missing(tmp_path, results):
  with pytest.raises(FileNotFoundError, match="the picture .*nothing.png does not exist; draw it again"):
    comparison.write(tmp_path, results, lambda model, p, s: tmp_path / "nothing.png")
  assert {f.name for f in tmp_path.iterdir()} == set(comparison.FILES) - {"report.html"}
  (tmp_path / "broken.png").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="broken.png cannot be read as a picture"):
    comparison.write(tmp_path, results, lambda model, p, s: tmp_path / "broken.png")


# ---- The page --------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
  """Elements, in order, with attributes and the text in them; refuses tags that do not match."""

  VOID = {"meta", "img", "br", "line", "circle", "rect"}

  def __init__(self, text):
    super().__init__()
    self.elements, self.open = [], []
    self.feed(text)
    assert not self.open

  def handle_startendtag(self, tag, attributes):
    self.elements.append([tag, dict(attributes), ""])

  def handle_starttag(self, tag, attributes):
    self.elements.append([tag, dict(attributes), ""])
    if tag not in self.VOID:
      self.open.append(self.elements[-1])

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    for element in self.open:
      element[2] += data

  def all(self, tag, css=None):
    return [e for e in self.elements if e[0] == tag and (css is None or css in e[1].get("class", "").split())]


def page_of(tmp_path, results, size=(32, 32), **options):
  image_path = pictures(tmp_path / "pictures", size)
  text = comparison_page.page(results, comparison.summarize(results), image_path, **options)
  return text, Page(text), image_path.asked


def picture_of(element):
  return Image.open(io.BytesIO(base64.b64decode(element[1]["src"].partition("base64,")[2])))


def test_the_page_stands_alone_and_says_what_the_numbers_are(tmp_path, results):
  text, page, _ = page_of(tmp_path, results)
  assert not page.all("script") and not page.all("link") and "@import" not in text and "url(" not in text
  assert all(e[1]["src"].startswith("data:image/") and e[1]["alt"] for e in page.all("img"))
  assert all(e[1]["href"].startswith("#") for e in page.all("a"))
  ids = [e[1]["id"] for e in page.elements if "id" in e[1]]
  assert len(ids) == len(set(ids)) and {e[1]["href"][1:] for e in page.all("a")} <= set(ids)
  (policy,) = (e[1]["content"] for e in page.all("meta") if e[1].get("http-equiv") == "Content-Security-Policy")
  assert policy.startswith("default-src 'none'")
  assert page.all("html")[0][1]["lang"] == "en" and page.all("title")[0][2] == "dpo, spo against base"
  main = page.all("main")[0][2]
  for words in ("▲ higher", "▼ lower", "undecided", "less diverse", "Largest gains", "Largest losses", "Random", "7.5"):
    assert words in main
  assert "the share of pairs" in main and "ties count half" in main and "Holm's method for 4 comparisons" in main
  details = page.all("details")
  assert len(details) == 2 and "open" in details[0][1] and "open" not in details[1][1]
  assert "prefers-color-scheme: dark" in text and "max-width" in text
  assert page.all("svg", "plot") and len(page.all("svg", "distribution")) == 4


def test_what_the_page_is_made_of_is_installed():
  folder = pathlib.Path(comparison_page.__file__).parent
  project = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text())
  installed = project["tool"]["setuptools"]["package-data"]["jaxpref.evaluation"]
  assert set(installed) == {file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}


def test_what_others_wrote_is_shown_as_text(tmp_path, results):
  """Prompts, names and settings may hold HTML."""
  results = json.loads(json.dumps(results).replace('"dpo"', json.dumps(HOSTILE)))
  for prompt in results["prompts"]:
    prompt |= {"text": HOSTILE, "id": HOSTILE, "category": f"{prompt['category']}{HOSTILE}"}
  results["settings"] |= {HOSTILE: {HOSTILE: HOSTILE}}
  results["scorers"] = [{"name": HOSTILE, "version": HOSTILE, "scale": HOSTILE}]
  for model in results["models"]:
    results["scores"][model] = {HOSTILE: results["scores"][model]["pickscore"]}
  text, page, _ = page_of(tmp_path, results)
  assert "<script" not in text and "<img src=http" not in text
  assert not page.all("script") and all(e[1]["src"].startswith("data:") for e in page.all("img"))
  assert not any(name.startswith("on") for e in page.elements for name in e[1])
  assert page.all("p", "prompt")[0][2] == HOSTILE
  assert HOSTILE in page.all("title")[0][2] and HOSTILE in page.all("h3")[0][2]


def test_sections_are_chosen_by_the_difference():
  scores = np.zeros((6, 2))
  change = np.array([[0, 3.0], [5, 1], [-1, -2], [2, 2], [0, 0], [-4, 0.5]])
  assert comparison_page.extremes(change, 3) == ((1, 0), (0, 1), (3, 0))
  results = make_results(("base", "dpo"), prompts=6, seeds=2)
  results["scores"] = {
    "base": {s["name"]: scores.tolist() for s in SCORERS},
    "dpo": {"pickscore": change.tolist(), "aesthetic": scores.tolist()},
  }
  gains, losses, no_gains, no_losses, random = comparison_page.choose(results, 4)
  assert gains.places == ((1, 0), (0, 1), (3, 0), (5, 1)) and losses.places == ((5, 0), (2, 1))
  assert gains.models == ("base", "dpo") and gains.pictures()[:2] == [("base", 1, 0), ("dpo", 1, 0)]
  assert no_gains.places == no_losses.places == ()
  assert len({p for p, _ in random.places}) == 4 and random == comparison_page.choose(results, 4)[-1]
  alone = comparison_page.choose(results | {"baseline": None}, 2)
  assert [(s.title, s.models) for s in alone[:2]] == [("Highest scores", ("base",)), ("Lowest scores", ("base",))]
  assert alone[2].places == ((1, 0), (0, 1)) and alone[3].places == ((5, 0), (2, 1))


def test_cards_have_the_pictures_and_their_scores(tmp_path, results):
  _, page, asked = page_of(tmp_path, results, pictures=2)
  gains = comparison_page.choose(results, 2)[0]
  (p, s), _ = gains.places
  card = page.all("li")[1][2]  # the first item is the warning
  assert f"a cat, number {p}" in card and f"seed {s}" in card
  old, new = (results["scores"][m]["pickscore"][p][s] for m in ("base", "dpo"))
  assert all(x in card for x in (f"{old:#.4g}", f"{new:#.4g}", f"+{new - old:#.3g}"))
  assert len(asked) == len(set(asked))  # each is read once
  shown = sum(len(section.pictures()) for section in comparison_page.choose(results, 2))
  assert len(page.all("img")) == shown


def test_small_pictures_are_kept_and_large_ones_reduced(tmp_path, results):
  _, page, _ = page_of(tmp_path, results, pictures=1)
  first = page.all("img")[0]
  assert first[1]["class"] == "pixels" and picture_of(first).format == "PNG"
  section = comparison_page.choose(results, 1)[0]
  p, s = section.places[0]
  expected = np.random.default_rng([p, s, len("base")]).integers(0, 255, (32, 32, 3), np.uint8)
  np.testing.assert_array_equal(np.asarray(picture_of(first)), expected)

  (tmp_path / "large").mkdir()
  _, page, _ = page_of(tmp_path / "large", results, size=(800, 400), pictures=1)
  first = page.all("img")[0]
  assert "class" not in first[1] and picture_of(first).size == (384, 192)
  assert (first[1]["width"], first[1]["height"]) == ("384", "192")


@pytest.mark.parametrize(("share", "side"), [(0.9, 256), (0.3, 192), (0.05, 128)])
def test_pictures_are_bounded_by_making_them_smaller_and_then_fewer(tmp_path, monkeypatch, share, side):
  results = make_results(("base", "dpo"), prompts=4, seeds=1)

  def total(text):
    return sum(len(e[1]["src"]) for e in Page(text).all("img"))

  whole, _, _ = page_of(tmp_path, results, size=(400, 400), pictures=2)
  monkeypatch.setattr(comparison_page, "MAX_BYTES", int(share * total(whole)))
  text, page, _ = page_of(tmp_path, results, size=(400, 400), pictures=2)
  assert 0 < total(text) <= share * total(whole)
  assert max(picture_of(page.all("img")[0]).size) == side and f"at most {side} pixels" in page.all("main")[0][2]
  monkeypatch.setattr(comparison_page, "MAX_BYTES", 10)
  text, page, _ = page_of(tmp_path, results, size=(400, 400), pictures=2)
  assert not page.all("img") and "There are none." in page.all("main")[0][2]


def test_one_prompt_has_a_page_without_intervals(tmp_path):
  text, page, _ = page_of(tmp_path, make_results(("base", "dpo"), prompts=1, seeds=1))
  assert "There is only one prompt" in page.all("section", "warning")[0][2]
  assert "1 prompt, 1 picture of each" in page.all("header")[0][2]
  assert not page.all("line", "bar") and "resamples" not in text


def test_a_model_by_itself_has_a_page(tmp_path):
  for baseline in (None, "base"):
    _, page, _ = page_of(tmp_path, make_results(("base",), baseline=baseline))
    main = page.all("main")[0][2]
    assert "win rate" not in main and page.all("title")[0][2] == "Scores of base"
    assert ("Highest scores" in main) == (baseline is None)
  identical = make_results(("base", "copy"))
  identical["scores"]["copy"] = identical["scores"]["base"]
  _, page, _ = page_of(tmp_path, identical)
  main = page.all("main")[0][2]
  assert "50.0%" in main and "may be the same model" in main and "There are none." in main


def test_numbers_as_text():
  assert [comparison_page.score_text(x) for x in (21.4, 0.2, 1234.5, 0)] == ["21.40", "0.2000", "1234", "0.000"]
  assert [comparison_page.change_text(x) for x in (0.06, -1.0, 0.0)] == ["+0.0600", "-1.00", "0"]
  assert comparison_page.bounded(0.5, None, comparison_page.share_text) == "50.0%"
  assert comparison_page.bounded(0.5, (0.4, 0.6), comparison_page.share_text) == "50.0% [40.0%, 60.0%]"
