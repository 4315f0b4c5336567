"""The folder of a blind comparison: which pictures are compared, the rule, and the results of the votes.

blind.json          models, prompts and seeds; a finished evaluation has them in results.json
images/             as `jaxpref.evaluate` writes them
votes.sqlite        the votes, and the rule that was stated before the first one
blind_results.json  what `trial.results` returns
blind.html          the same as a page
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpref.data import lease, paths
from jaxpref.evaluation import folder as evaluation_folder
from jaxpref.evaluation import page
from jaxpref.rewards import published
from jaxpref.voting import schedule, server, store, trial
from jaxpref.voting.ballot import Ballot
from jaxpref.voting.catalog import OfModels

STATEMENT, RESULTS, PAGE = "blind.json", "blind_results.json", "blind.html"
RULE = "rule"  # in the file of votes
LOCK = f"votes.{lease.NAME}"
SCORER = "votes"  # of jaxpref.evaluate: --scorers votes=FOLDER


def state_rule(votes: store.Store, asked: trial.Rule) -> trial.Rule:
  """Writes the rule before the first vote, and returns it.

  Raises:
    ValueError: there are votes, and another rule was stated for them, or none: choosing the rule by the votes would
      make the intervals and p mean nothing.
  """
  stated = votes.meta(RULE)
  if stated is None and votes.votes():
    raise ValueError(f"{votes.file} has votes without a rule; compare in a new folder.")
  if stated is None or not votes.votes():
    votes.set_meta(RULE, json.dumps(dataclasses.asdict(asked)))
    return asked
  known = trial.Rule(**json.loads(stated))
  if known != asked:
    raise ValueError(
      f"{votes.file} has votes under another rule, --votes={known.votes} --stop={known.stop}; a rule cannot be changed "
      "after the first vote: give that one, or compare in a new folder."
    )
  return known


def catalog_of(folder: pathlib.Path) -> OfModels:
  """Returns the pairs of a folder that `blind`, `vote --models` or a finished `evaluate` wrote.

  Raises:
    FileNotFoundError, ValueError: it is no such folder, or has one model.
  """
  for name in (STATEMENT, "results.json"):
    file = folder / name
    if not file.is_file():
      continue
    try:
      found = json.loads(file.read_text(encoding="utf-8"))
      texts, models = [prompt["text"] for prompt in found["prompts"]], list(found["models"])
      baseline, seeds = found["baseline"] or models[0], int(found["seeds_per_prompt"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{file} cannot be read ({error!r}); compare in a new folder.") from error
    if len(models) < 2:
      raise ValueError(f"{file} has one model, {models[0]}; a comparison needs two or more.")
    models = [baseline, *(model for model in models if model != baseline)]
    return OfModels(folder, texts, models, seeds)
  raise FileNotFoundError(
    f"{folder} has no {STATEMENT} and no results.json of jaxpref.evaluate, so there is nothing to compare; draw with "
    "--models, --prompts and --out."
  )


def read(folder: pathlib.Path) -> tuple[OfModels, trial.Rule, list[Any]]:
  """Returns the pairs, the rule and the judgements of a folder of votes, which stays as it is.

  Raises:
    FileNotFoundError, ValueError: nobody has voted there, or not by a rule.
  """
  file = store.check_file(folder)
  found = catalog_of(folder)
  with lease.hold(folder, name=LOCK):
    votes = store.Store(file)
    try:
      stated = votes.meta(RULE)
      if stated is None:
        raise ValueError(f"{file} holds no blind comparison; vote with python -m jaxpref.blind.")
      rule = trial.Rule(**json.loads(stated))
      return found, rule, Ballot(found, votes, schedule.Rules()).judgements()
    finally:
      votes.close()


def write_results(folder: pathlib.Path) -> str:
  """Writes blind_results.json and blind.html from the votes of a folder, and returns the table as text."""
  found, rule, said = read(folder)
  return write(folder, trial.results(rule, found.cells, found.models, said))


def write(folder: pathlib.Path, results: dict[str, Any]) -> str:
  """Writes blind_results.json and blind.html, and returns the table as text."""
  paths.write(folder / RESULTS, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
  template = page.template("blind.html.j2", folder=server.TEMPLATES)
  paths.write(folder / PAGE, template.render(results=results, level=trial.LEVEL).encode())
  lines = [results["rule"]]
  if not results["ended"]:
    lines.append("Voting has NOT ended by this rule: these numbers may change, and p does not mean what it says.")
  for name, one in results["comparisons"].items():
    rate = page.bounded(one["win_rate"], one["win_rate_interval"], page.share_text)
    lines.append(
      f"{name} against {results['baseline']}: win rate {rate}, {one['prompts_won']} prompts won, "
      f"{one['prompts_lost']} lost, {one['prompts_tied']} tied, p {page.p_text(one['p_holm'])}, {one['verdict']}"
    )
  return "\n".join([*lines, str(folder / PAGE)])


# ---- As a scorer -------------------------------------------------------------------------------------------------


def check_scorer(spec: str) -> None:
  """Raises ValueError or FileNotFoundError for votes=FOLDER without votes."""
  read(_folder_of(spec))


def _folder_of(spec: str) -> pathlib.Path:
  folder = spec.partition("=")[2]
  if not folder:
    raise ValueError(f"--scorers {spec}; expected {SCORER}=FOLDER, a folder of jaxpref.blind.")
  return pathlib.Path(folder)


def is_scorer(spec: str) -> bool:
  """Returns whether --scorers names the votes of a folder."""
  return spec.partition("=")[0] == SCORER


def load_scorer(spec: str) -> published.Scorer:
  """Returns a scorer that gives each picture the share of its votes that it won.

  It knows a picture by its pixels and its prompt. A picture of the comparison without a vote gets 1/2.

  Args:
    spec: votes=FOLDER.

  Raises:
    ValueError, FileNotFoundError: nobody has voted there. Scoring raises ValueError for a picture that is not there.
  """
  folder = _folder_of(spec)
  found, _, said = read(folder)
  won, judged = trial.scores(found.cells, found.models, said, len(found.prompts), found.seeds)
  known: dict[str, float] = {}
  for model, values in won.items():
    for (p, s), value in np.ndenumerate(values):
      file = evaluation_folder.image_file(folder, model, p, s)
      known[_identity(evaluation_folder.read_image(file), found.prompts[p])] = float(value)

  def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    names = [_identity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    if missing := [i for i, name in enumerate(names) if name not in known]:
      raise ValueError(
        f"--scorers {spec}: {len(missing)} of {len(names)} pictures are not among those that were compared, the first "
        f"for the prompt {prompts[missing[0]]!r}; evaluate the folder of the comparison, --out={folder}."
      )
    return np.asarray([known[name] for name in names], np.float32)

  digest = hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()[:16]
  scale = f"share of its votes that a picture won; {judged} of {len(known)} pictures have votes, the others count 0.5"
  return published.Scorer(name=SCORER, version=digest, scale=scale, score=score)


def _identity(image: np.ndarray, prompt: str) -> str:
  return hashlib.sha256(repr((image.shape, prompt)).encode() + image.tobytes()).hexdigest()
