"""Writes the parts of README.md and docs/ that follow from the code and from recorded runs.

    python scripts/docs/pages.py            # after a change of the catalog, of config.py, or of docs/results/*.json
    python scripts/docs/pages.py --check    # names the pages that are out of date, and ends with exit code 1

A page marks such a part with two comments, which readers do not see:

    <!-- generated: NAME -->
    <!-- end -->

NAME is one of `BLOCKS`, or `facts KEY` with the key of a method in `METHODS`.
"""

import argparse
import ast
import dataclasses
import importlib
import io
import json
import pathlib
import re
import sys
import tokenize
from collections.abc import Callable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxpref import config as config_lib  # noqa: E402
from jaxpref import losses, reference  # noqa: E402
from jaxpref.objectives import catalog  # noqa: E402

RESULTS = ROOT / "docs" / "results"
SOURCE = ROOT / "jaxpref" / "config.py"
MARKED = re.compile(r"(<!-- generated: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Row:
  """A method in the tables. What it learns from, and its reference, follow from the recipe and the catalog.

  Attributes:
    key: the name of its page in docs/methods, and of its row.
    title: as people call it.
    functions: the public functions of `jaxpref.losses` (or `jaxpref.reference`) that compute it.
    papers: arXiv numbers, or the name of a conference.
    recipe: a file of configs/, without .py.
    fields: what the command line sets beside it.
    tiny: its name in tiny_results.json.
    study: its variants in study.json.
    noisy: its variants in papers.json, the study on noisy pairs.
  """

  key: str
  title: str
  functions: tuple[str, ...]
  papers: tuple[str, ...]
  recipe: str
  fields: str = ""
  tiny: str = ""
  study: tuple[str, ...] = ()
  noisy: tuple[str, ...] = ()


D3PO = "spo.pool_size=2 spo.warmup_steps=1 spo.inner_steps=18 spo.threshold=0.0"
METHODS = {
  row.key: row
  for row in (
    Row(
      "dpo", "Diffusion-DPO", ("implicit_reward", "dpo_loss"), ("2311.12908",), "dpo_tiny", "", "dpo", ("dpo",),
      ("dpo", "dpo_250", "dpo_160", "dpo_slow"),
    ),
    Row(
      "tdpo", "Timestep-aware DPO", ("dpo_loss", "update"), ("2505.18736",), "tdpo_tiny", "", "tdpo",
      ("timesteps_freeze_tau16", "timesteps_rate_of_dpo", "freeze_tau16"),
      ("moving", "moving_500", "moving_tau64", "sampling", "scale", "timesteps", "timesteps_moving", "dpo_250"),
    ),
    Row(
      "spo", "SPO", ("select_pair", "clipped_log_ratio"), ("2406.04314",), "spo_tiny", "", "spo", ("spo",),
      ("spo", "spo_more"),
    ),
    Row("spm", "Step-aware preference model", ("preference_loss",), ("2406.04314",), "spm_tiny"),
    Row(
      "lpo",
      "LPO",
      ("select_pair", "clipped_log_ratio"),
      ("2502.01051",),
      "lpo_tiny",
      fields="preference_model=runs/lrm_tiny/export",
      noisy=("lpo",),
    ),
    Row("lrm", "Latent reward model", ("preference_loss",), ("2502.01051",), "lrm_tiny"),
    Row("grpo", "GRPO", ("group_advantages", "grpo_loss"), ("2402.03300", "2505.05470"), "grpo_tiny", study=("grpo",)),
    Row(
      "ddpo", "DDPO", ("ddpo_loss",), ("2305.13301",), "grpo_tiny",
      "batch_size=24 grpo.group_size=1 grpo.advantage=batch", study=("ddpo",),
    ),
    Row("d3po", "D3PO", ("d3po_loss",), ("2311.13231",), "spo_tiny", D3PO, study=("d3po",)),
    Row("kto", "Diffusion-KTO", ("kto_baseline", "kto_loss"), ("2404.04465",), "kto_tiny", study=("kto", "kto_beta")),
    Row("ipo", "IPO", ("ipo_loss",), ("2310.12036",), "dpo_tiny", "loss.name=ipo", study=("ipo", "ipo_beta")),
    Row("hinge", "Hinge (SLiC)", ("hinge_loss",), ("2305.10425",), "dpo_tiny", "loss.name=hinge", study=("hinge",)),
    Row(
      "robust", "Robust DPO", ("robust_dpo_loss",), ("2403.00409",), "dpo_tiny",
      "loss.name=robust loss.label_smoothing=0.1", study=("robust", "smoothed"),
    ),
    Row("soft", "Soft labels", ("soft_dpo_loss",), ("2409.06691", "2506.02698"), "dpo_tiny", "data.ties=soft"),
    Row("mapo", "MaPO", ("mapo_loss",), ("2406.06424",), "dpo_tiny", "loss.name=mapo loss.beta=0.1", study=("mapo",)),
    Row("dspo", "DSPO", ("dspo_loss",), ("ICLR 2025",), "dpo_tiny", "loss.name=dspo loss.beta=0.001", study=("dspo",)),
    Row(
      "safeguard", "SDPO safeguard", ("safeguard_scale", "scale_gradient"), ("2511.03317",), "dpo_tiny",
      "loss.safeguard=0.0", study=("safeguard",),
    ),
    Row(
      "sft", "SFT on winners", ("sft_loss",), ("2006.11239",), "dpo_tiny", "loss.name=sft", study=("sft",),
      noisy=("sft",),
    ),
    Row("clip", "CLIP", ("info_nce_loss",), ("2103.00020",), "pretrain_tiny:clip"),
  )
}  # fmt: skip
# What fields mean that config.py says nothing of.
MEANINGS = {
  "seed": "of everything random: data order, noise, new parameters",
  "mesh.fsdp": "devices that parameters and optimiser state are split over",
  "mesh.tensor": "devices that attention and feed-forward layers are split over",
  "data.split": "the part of the source that is trained on",
  "data.num_threads": "threads that read and decode images",
  "lora.targets": "regular expression; layers of the UNet whose names it finds get an adapter",
  "optimizer.name": "an optimiser of Optax",
  "optimizer.learning_rate": "after the warm-up",
  "optimizer.schedule": "of the learning rate, after the warm-up",
  "optimizer.warmup_steps": "updates in which the learning rate rises from 0",
  "optimizer.b1": "decay of the first moment",
  "optimizer.b2": "decay of the second moment",
  "optimizer.eps": "added to the denominator",
  "optimizer.weight_decay": "decoupled, as in AdamW",
  "optimizer.clip_norm": "largest global norm of the gradient; 0: no clipping",
  "loss.beta": "how strongly the policy is held to the reference",
  "timesteps.gamma": "below 1 noisy timesteps are drawn more often; 1: uniform",
  "timesteps.num_bins": "bins of timesteps that gamma weights",
  "timesteps.reward_scale": "multiply the margin by lambda(t)",
  "reference.alpha": "share of the policy in the new reference",
  "reference.rho": "pull of the new reference back to the pre-trained weights",
  "reference.tau": "steps between two moves",
  "reference.delta": "divergence above which the reference does not move",
  "spo.num_inference_steps": "denoising steps of a rollout",
  "spo.eta": "noise of a DDIM step; 1 is that of DDPM",
  "spo.pool_size": "candidates of a step, of which the best and the worst are compared",
  "spo.inner_steps": "further denoising steps of each candidate before it is scored",
  "spo.ratio_clip": "likelihood ratios are clipped to 1 +- this",
  "grpo.num_inference_steps": "denoising steps of a rollout",
  "grpo.eta": "noise of a DDIM step; 1 is that of DDPM",
  "grpo.guidance_scale": "of classifier-free guidance; up to 1 there is none",
  "grpo.advantage_clip": "advantages are clipped to +- this",
  "spm.guidance_scale": "of the predictions of x0 that it learns to judge",
  "lrm.first_time": "the least noisy time it is trained at",
  "vae.kl_weight": "of the KL term of the autoencoder's loss",
  "vae.gradient_weight": "of the differences between image gradients in that loss",
  "logging.every": "steps between two rows of metrics",
  "logging.wandb_project": "of Weights & Biases; empty: not used",
  "checkpoint.every": "steps between two checkpoints",
  "checkpoint.keep": "how many of the latest are kept",
  "sample.every": "steps between two measurements",
  "sample.num_prompts": "validation prompts that are drawn",
  "sample.seeds_per_prompt": "pictures of each",
  "evaluation.num_prompts": "prompts that the result is judged on",
  "evaluation.seeds_per_prompt": "pictures of each prompt",
  "evaluation.num_inference_steps": "denoising steps of each picture",
  "evaluation.guidance_scale": "of classifier-free guidance; up to 1 there is none",
  "evaluation.eta": "noise of a DDIM step; 0 is deterministic",
  "evaluation.batch_size": "pictures that are drawn at a time",
  "evaluation.bootstrap_samples": "resamples behind each interval",
  "evaluation.seed": "of the noise that pictures begin with",
  "evaluation.split": "whose captions are drawn",
}
# Values that a check names only together with the rest of the config.
VALUES = {"objective": config_lib.FACTS, "loss.name": config_lib.DENOISED_LOSSES, "remat": config_lib.REMAT}
LEARNS_FROM = {"pair": "pairs", "liked": "likes, dislikes", "prompt": "a reward", "tile": "captioned images"}
WITHOUT_PAGE = ("clip",)


def recipe(row: Row) -> config_lib.Config:
  """Returns the config of a method's row.

  Raises:
    ValueError: its fields do not fit its recipe.
  """
  name, _, argument = row.recipe.partition(":")
  config = importlib.import_module(f"configs.{name}").get_config(*[argument] * bool(argument))
  for field in row.fields.split():
    key, _, text = field.partition("=")
    old = config_lib.replace(config, {})
    for part in key.split("."):
      old = getattr(old, part)
    kind = str if key == "preference_model" else float if old is None else type(old)
    config.update_from_flattened_dict({key: kind(text)})
  found = config_lib.typed(config)
  config_lib.check(found)
  return found


def command(row: Row) -> str:
  """Returns what `python -m jaxpref.main` is given for a method."""
  name, colon, argument = row.recipe.partition(":")
  fields = "".join(f" --config.{field}" for field in row.fields.split())
  return f"--config=configs/{name}.py{colon}{argument}{fields}"


# ---- Tables of methods --------------------------------------------------------------------------------------------


def _papers(row: Row) -> str:
  return ", ".join(f"[{p}](https://arxiv.org/abs/{p})" if p[0].isdigit() else p for p in row.papers)


def _functions(row: Row) -> str:
  for name in row.functions:
    assert hasattr(losses, name) or hasattr(reference, name), name
  return ", ".join(f"`{name}`" for name in row.functions)


def methods(folder: str) -> str:
  """Returns the table of all methods; `folder` leads to docs/methods."""
  lines = ["| method | learns from | reference | functions | paper |", "|---|---|---|---|---|"]
  for row in METHODS.values():
    if row.key in WITHOUT_PAGE:
      continue
    config, title = recipe(row), f"[{row.title}]({folder}{row.key}.md)"
    compared = "yes" if catalog.method(config).reference(config) else ""
    learns = LEARNS_FROM[config_lib.facts(config).data]
    lines.append(f"| {title} | {learns} | {compared} | {_functions(row)} | {_papers(row)} |")
  return "\n".join(lines) + "\n"


def commands() -> str:
  """Returns the table of the command that runs each method on the shipped model, and its objective."""
  lines = ["| method | objective | `python -m jaxpref.main` with |", "|---|---|---|"]
  lines += [f"| {row.title} | `{recipe(row).objective}` | `{command(row)}` |" for row in METHODS.values()]
  return "\n".join(lines) + "\n"


def facts(key: str) -> str:
  """Returns the table on a method's page: paper, recipes and what was measured."""
  row = METHODS[key]
  config = recipe(row)
  large = [f"configs/{row.key}_{size}.py" for size in ("sd15", "sdxl")]
  large = [f"`{file}`" for file in large if (ROOT / file).is_file()]
  found = {
    "Paper": _papers(row),
    "Functions": _functions(row),
    "Objective": f"`{config.objective}`",
    "Learns from": LEARNS_FROM[config_lib.facts(config).data],
    "Run it": f"`python -m jaxpref.main {command(row)}`",
    "Published settings": ", ".join(large) or "none; the recipe above is for the shipped model",
  }
  lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in found.items())]
  return "\n".join(lines) + "\n"


def result(key: str) -> str:
  """Returns what was measured of a method, from the recorded runs."""
  row, lines = METHODS[key], []
  if row.tiny:
    mine = [run for run in _read("tiny_results.json") if run["name"] == row.tiny]
    share, wins = _spread([run["preferred_share"] for run in mine]), _spread([run["win_rate"] for run in mine])
    change = _spread([run["caption_accuracy_change"] for run in mine], signed=True)
    lines.append(f"| the recipe, {len(mine)} seeds | {share} | {wins} | {change} |")
  noisy = _read("papers.json")["runs"]
  for variant in (name for name in row.noisy if noisy[name]):
    lines.append(f"| `{variant}` [on noisy pairs](../results/papers.md), {_noisy_cells(noisy[variant])} |")
  runs = _read("study.json")["runs"]
  for variant in (name for name in row.study if name in runs):
    mine = [run for run in runs[variant] if "preferred_share" in run]
    share, wins = _spread([run["preferred_share"] for run in mine]), _spread([run["win_rate"] for run in mine])
    change = _spread([run["caption_accuracy_change"] for run in mine], signed=True)
    lines.append(
      f"| `{variant}` of the [study](../results/study.md), {len(mine)} seeds | {share} | {wins} | {change} |"
    )
  if not lines:
    return "No run of this method is reported.\n"
  bases = {"the recipe": _read("tiny_results.json")[0]["base_preferred_share"]} if row.tiny else {}
  if any(noisy[name] for name in row.noisy):
    bases["the runs on noisy pairs"] = noisy["dpo"][0]["base_share"]
  studied = [run for name in row.study for run in runs.get(name, []) if "base_preferred_share" in run]
  bases |= {"the study": studied[0]["base_preferred_share"]} if studied else {}
  said = ", ".join(f"{share:.1%} in {where}" for where, share in bases.items())
  head = "| runs | share of the preferred style | win rate against base | change of caption accuracy |"
  notes = [f"The base model's share is {said}."]
  if "the study" in bases:
    notes.append("The study prefers another style, one that is hard to tell apart, and its runs have other lengths.")
    notes.append("So compare its numbers only with each other.")
  return "\n".join([head, "|---|---|---|---|", *lines, "", *notes]) + "\n"


def _noisy_cells(runs: list[dict[str, Any]]) -> str:
  share, wins, change = ([run[name] for run in runs] for name in ("share", "win_rate", "captions"))
  return f"{len(runs)} seeds | {_spread(share)} | {_spread(wins)} | {_spread(change, signed=True)}"


# ---- Results -------------------------------------------------------------------------------------------------------


def _read(name: str) -> Any:
  return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _spread(values: list[float], *, signed: bool = False) -> str:
  plus = "+" if signed else ""
  ends = f"{min(values):{plus}.1%} to {max(values):{plus}.1%}"
  return f"{np.mean(values):{plus}.1%} ({ends})" if len(values) > 1 else f"{values[0]:{plus}.1%}"


def results() -> str:
  """Returns the table of the first runs: means over seeds, with the lowest and highest."""
  runs = _read("tiny_results.json")
  lines = [
    "| | share of the preferred style | win rate against base | caption accuracy (1 of 16) |",
    "|---|---|---|---|",
    f"| base (tiny-sd) | {runs[0]['base_preferred_share']:.1%} | | {runs[0]['base_caption_accuracy']:.1%} |",
  ]
  for key in dict.fromkeys(run["name"] for run in runs):
    mine, row = [run for run in runs if run["name"] == key], METHODS[key]
    config = recipe(row)
    online = config_lib.facts(config).online
    work = f"{config.num_steps} {'iterations' if online else 'steps'} of {config.batch_size}"
    cells = [_spread([run[name] for run in mine]) for name in ("preferred_share", "win_rate", "caption_accuracy")]
    lines.append(f"| {row.title}, {work} {'prompts' if online else 'pairs'} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def noisy_results() -> str:
  """Returns the table of what methods make of the same noisy pairs, of those with at least four seeds."""
  study = _read("papers.json")["runs"]
  lines = [
    "| | share of the preferred style | win rate against base | change of caption accuracy |",
    "|---|---|---|---|",
    f"| base (tiny-sd) | {study['dpo'][0]['base_share']:.1%} | | |",
  ]
  titles = {
    "sft": "SFT on winners",
    "dpo": "Diffusion-DPO",
    "spo": "SPO",
    "lpo": "LPO",
    "dpo_250": "Diffusion-DPO, half the beta, tried later",
  }
  for variant, title in titles.items():
    if len(study[variant]) >= 4:
      lines.append(f"| {title}, {_noisy_cells(study[variant])} |")
  return "\n".join(lines) + "\n"


# ---- Fields of a recipe ------------------------------------------------------------------------------------------


def _comments(source: str) -> dict[int, tuple[str, bool]]:
  """Returns the comments of a source by line, and whether each has its line to itself."""
  found = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      found[token.start[0]] = (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
  return found


def _meaning(node: ast.AnnAssign, comments: dict[int, tuple[str, bool]]) -> str:
  """Returns what the comments above and beside a field say of it."""
  said: list[str] = []
  line = node.lineno - 1
  while line in comments and comments[line][1]:
    said.insert(0, comments[line][0])
    line -= 1
  beside = comments.get(node.end_lineno or node.lineno)
  return " ".join([*said, *([beside[0]] if beside and not beside[1] else [])])


def _allowed(section: ast.ClassDef) -> dict[str, str]:
  """Returns what the checks of a section's class demand of its fields, as far as they say it without the config."""
  found: dict[str, list[str]] = {}
  words = {"positive": "above 0", "not_negative": "at least 0"}
  for method in section.body:
    if not (isinstance(method, ast.FunctionDef) and method.name == "check"):
      continue
    for call in (node for node in ast.walk(method) if isinstance(node, ast.Call)):
      if not isinstance(call.func, ast.Attribute):
        continue
      name = call.func.attr
      texts: list[Any] = [a.value for a in call.args if isinstance(a, ast.Constant)]
      if name == "one_of":
        choices = eval(ast.unparse(call.args[1]), vars(config_lib))  # noqa: S307
        found.setdefault(texts[0], []).append(", ".join(f"`{choice}`" for choice in choices))
      elif name == "integers":
        for field in texts[1:]:
          found.setdefault(field, []).append(f"at least {texts[0]}")
      elif name in words:
        for field in texts:
          found.setdefault(field, []).append(words[name])
      elif name == "require" and len(texts) >= 2 and not texts[-1].startswith(("True", "False")):
        found.setdefault(texts[-2], []).append(texts[-1])
  return {field: "; ".join(texts) for field, texts in found.items()}


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


def _type(node: ast.AnnAssign) -> str:
  return ast.unparse(node.annotation).replace("Place", "path").replace(" | None", "")


def configuration() -> str:
  """Returns a table for each section of the config: field, type, default, values, meaning."""
  source = SOURCE.read_text(encoding="utf-8")
  comments = _comments(source)
  classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
  sections = {node.name: node for node in classes if any(ast.unparse(base) == "Section" for base in node.bases)}
  out = []
  of_config = [n for n in sections["Config"].body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
  named = [ast.unparse(n.annotation) for n in of_config if ast.unparse(n.annotation) in sections]
  for name in ["Config", *named]:
    section = sections[name]
    prefix = "" if name == "Config" else f"{name.lower()}."
    out += [f"## {prefix.rstrip('.') or 'Top level'}", ""]
    doc = ast.get_docstring(section)
    out += [doc.split("\n\n")[0].replace("\n", " "), ""] if doc and name != "Config" else []
    out += ["| `--config.` | type | default | values | meaning |", "|---|---|---|---|---|"]
    allowed = _allowed(section)
    for node in section.body:
      if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
        continue
      if ast.unparse(node.annotation) in sections or node.target.id == "options":
        continue
      field, value = node.target.id, ast.unparse(node.value).replace("'", '"')
      given = "" if value == "None" else f"`{_cell(value)}`"
      if (known := VALUES.get(prefix + field)) is not None:
        allowed[field] = ", ".join(f"`{choice}`" for choice in known)
      meaning = _cell(_meaning(node, comments) or MEANINGS.get(prefix + field, ""))
      of_field = _cell(allowed.get(field, ""))
      out.append(f"| `{prefix}{field}` | {_cell(_type(node))} | {given} | {of_field} | {meaning} |")
    out.append("")
  return "\n".join(out)


BLOCKS: dict[str, Callable[[], str]] = {
  "results": results,
  "noisy results": noisy_results,
  "methods from README": lambda: methods("docs/methods/"),
  "methods": lambda: methods("methods/"),
  "commands": commands,
  "configuration": configuration,
}


def block(name: str) -> str:
  """Returns the text of a marked part.

  Raises:
    ValueError: there is no such part.
  """
  kind, _, key = name.partition(" ")
  if kind in ("facts", "result") and key in METHODS:
    return facts(key) if kind == "facts" else result(key)
  if name not in BLOCKS:
    raise ValueError(f"generated: {name}; expected one of {', '.join(BLOCKS)}, facts KEY or result KEY.")
  return BLOCKS[name]()


def written(text: str) -> str:
  """Returns a page with its marked parts as they should be."""
  return MARKED.sub(lambda found: f"{found[1]}{block(found[2])}{found[3]}", text)


def pages() -> list[pathlib.Path]:
  """Returns the pages that may have marked parts."""
  return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
  check, old = parser.parse_args().check, []
  for page in pages():
    text = page.read_text(encoding="utf-8")
    new = written(text)
    if new != text:
      old.append(str(page.relative_to(ROOT)))
      if not check:
        page.write_text(new, encoding="utf-8")
  print(f"{'out of date' if check else 'written'}: {', '.join(old) or 'none'}")
  sys.exit(1 if check and old else 0)


if __name__ == "__main__":
  main()
