"""How many votes does a taste need? Simulated voters, on pictures of tiny-sd.

    python scripts/study/votes.py --tune                  # tries settings of the recipe, on the validation captions
    python scripts/study/votes.py --list                  # the runs that are left
    python scripts/study/votes.py --until 18:30           # makes them until that time, then the report
    python scripts/study/votes.py --only "active 100 "    # only runs in whose name this regular expression is found
    python scripts/study/votes.py --report                # only docs/results/votes.md and votes.json

Needs the pictures of scripts/study/ground.py. A folder has 8 pairs for each of 637 captions. A simulated voter judges
some of them, and agrees with a hidden score in 70 or 85 % of the pairs (see ground.py). configs/taste_tiny.py trains a
LoRA on these votes alone. 256 captions that no vote saw, 4 pictures each, show what was learnt.

Pairs are asked at random, one of each caption first; or by `jaxpref.vote --active=tiny-clip`, the pairs of which the
votes so far say least; or no person is asked, and a reward labels the pairs (`jaxpref.pairs --label`).

In rounds, `jaxpref.taste` draws 100 pairs with the newest model, has the reward label them and trains on them, four
times. Beside it stands one training on 400 pairs of the base model that takes as many steps.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from jaxpref import pairs  # noqa: E402
from jaxpref.data.labels import label_pairs  # noqa: E402
from jaxpref.voting import active, schedule  # noqa: E402
from scripts.study import active_voting, ground, measure, study, study_plan, study_rows, study_variants  # noqa: E402
from scripts.study.study_variants import ROOT  # noqa: E402

VOTES = (50, 100, 200, 400, 800)
SEEDS = range(5)
REWARD = "preference_model=tiny-spm"  # which knows the style from pairs of its own
OFFERED = 8  # pairs of each caption in the folder that is voted on
RECIPE = "taste_tiny"
ROUNDS, ROUND_VOTES, ROUND_SEEDS = 4, 100, range(3)
IN_ROUNDS = ("rounds", "at_once")
ASKED = {"reward": "at random", "random": "at random", "active": "unsure", "at_once": "at once", "rounds": "in rounds"}
SHORT = (("num_steps", 60),)  # as few votes are learnt by heart
TUNING_VOTES, TUNING_AGREEMENT = 200, 85
COMMON = {"sample.every": 0, "checkpoint.keep": 1, "checkpoint.every": 100_000, "evaluation.num_prompts": 0}


@dataclasses.dataclass(frozen=True)
class Case:
  """A run: who was asked about how many pairs, and which.

  Attributes:
    ask: "random" or "active"; "reward" for labels by REWARD; "rounds" for those of pairs that each round draws anew;
      "at_once" for as many steps as in rounds, on labels by REWARD.
    votes: number of pairs.
    agreement: percent of the pairs in which the voter says what the hidden score says; 0 for a reward.
    seed: of the pairs and of training.
    split: of the captions that show what was learnt.
    fields: changes of the recipe.
  """

  ask: str
  votes: int
  agreement: int
  seed: int
  split: str = "test"
  fields: tuple[tuple[str, Any], ...] = ()

  @property
  def name(self) -> str:
    """Of its folder, without the seed."""
    told = [self.ask, str(self.votes), *([str(self.agreement)] if self.agreement else [])]
    return "_".join([*told, *(f"{name.rpartition('.')[2]}={value:g}" for name, value in self.fields)])

  @property
  def path(self) -> str:
    return f"{self.name}/seed{self.seed}" if self.split == "test" else f"{self.name}/{self.split}_seed{self.seed}"


def cases() -> list[Case]:
  """Returns all runs, a seed of each first; rounds at the end."""
  kinds = [("random", 85), ("active", 85), ("random", 70), ("reward", 0)]
  found = [Case(ask, votes, agreement, seed) for seed in SEEDS for ask, agreement in kinds for votes in VOTES]
  found += [Case("random", votes, 85, seed, fields=SHORT) for votes in VOTES for seed in SEEDS]
  return found + [Case(ask, ROUNDS * ROUND_VOTES, 0, seed) for seed in ROUND_SEEDS for ask in ("rounds", "at_once")]


def trial(rate: float, steps: int, beta: float) -> Case:
  """Returns a run that tries settings, on captions of its own."""
  fields = {"optimizer.learning_rate": rate, "num_steps": steps, "loss.beta": beta}
  return Case("random", TUNING_VOTES, TUNING_AGREEMENT, study_plan.TUNING_SEED, "validation", tuple(fields.items()))


def trials(folder: pathlib.Path) -> list[Case]:
  """Returns the runs that try settings: rates, then numbers of steps at the best rate, then betas at the best of both.

  Those that need another's result follow when that is there.
  """
  found = [trial(rate, 60, 500.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)]
  for name, values in (("num_steps", (30, 120, 240)), ("loss.beta", (50.0, 5000.0))):
    rows = [read(case, folder) for case in found]
    if not all(rows):
      break
    best = best_settings([row for row in rows if row])
    found += [trial(*(best | {name: value}).values()) for value in values]
  return found


def best_settings(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns the fields of the trial that the study's rule chooses, see `study_plan.choose`."""
  best = study_plan.choose([row | {"learning_rate": row["fields"]["optimizer.learning_rate"]} for row in rows], "style")
  assert best is not None
  return best["fields"]


# ---- Which pairs are asked ------------------------------------------------------------------------------------------


def offered(prompts: int) -> np.ndarray:
  """Returns i64[P, 8]: numbers of `ground.rated_pairs` of each caption, the same in all runs."""
  of_prompt = len(ground.rated_pairs(1))
  rng = np.random.default_rng(ground.RATER_SEED)
  return np.stack([p * of_prompt + rng.choice(of_prompt, OFFERED, replace=False) for p in range(prompts)])


def at_random(numbers: np.ndarray, votes: int, seed: int) -> np.ndarray:
  """Returns i64[votes] of `offered`, in the order in which the page asks."""
  keys = [str(number) for number in numbers.reshape(-1)]
  group = np.repeat(np.arange(len(numbers)), numbers.shape[1])
  return numbers.reshape(-1)[schedule.order(keys, group, seed)[:votes]]


def actively(numbers: np.ndarray, votes: int, seed: int, differences: np.ndarray, label: np.ndarray) -> np.ndarray:
  """Returns i64[votes] of `offered`, each chosen by a model of the votes so far, as the page does.

  Args:
    differences: f[N, d], `active.reduced` differences of all offered pairs.
    label: f[N], what the voter says of each.
  """
  flat = numbers.reshape(-1)
  keys, group = [str(number) for number in flat], np.repeat(np.arange(len(numbers)), numbers.shape[1])
  ordered = schedule.order(keys, group, seed)
  rng = np.random.default_rng(seed)
  said: dict[int, float] = {}
  for known, _ in active_voting.asked(differences, label, votes, ordered, rng, ask_unsure=True):
    said = known
  return flat[list(said)]


def flat_images(place: pathlib.Path) -> np.ndarray:
  """Returns u8[16 P, H, W, 3], the training pictures."""
  images = ground.read_images(place, "train")
  return images.reshape(-1, *images.shape[2:])


@functools.cache
def embedded(place: pathlib.Path) -> np.ndarray:
  """Returns f32[16 P, D], tiny-clip's embeddings of the training pictures, computed once."""
  file = place / "train_embeddings.npy"
  if not file.is_file():
    from jaxpref.rewards import published

    embed = published.image_embedder("tiny-clip", batch_size=64)
    images = flat_images(place)
    found = np.concatenate([embed(list(images[i : i + 1024])) for i in range(0, len(images), 1024)])
    ground.save(file, found)
  return np.load(file, allow_pickle=False)


@functools.cache
def rewarded(place: pathlib.Path) -> np.ndarray:
  """Returns f64[16 P], REWARD's scores of the training pictures in logits, computed once."""
  file = place / "train_reward.npy"
  if not file.is_file():
    from jaxpref.devices import sharding
    from jaxpref.rewards import scorers

    scorer, logits = scorers.load(REWARD, batch_size=64, mesh=sharding.make_mesh(), models=["tiny-sd"])
    images = flat_images(place)
    captions = [e.caption for e in ground.split("train") for _ in range(ground.PICTURES)]
    parts = [slice(i, i + 1024) for i in range(0, len(images), 1024)]
    found = np.concatenate([scorer.score(list(images[part]), captions[part]) for part in parts])
    ground.save(file, logits * found.astype(np.float64))
  return np.load(file, allow_pickle=False)


def write_votes(case: Case, place: pathlib.Path) -> pathlib.Path:
  """Writes what was asked and said, a `pairs_file` beside the pictures, and returns it."""
  of_train = ground.scores(place, "train")
  pictures, rated = pairs.read_pictures(place / "train"), ground.rated_pairs(len(of_train["style"]))
  numbers = offered(len(of_train["style"]))
  if case.ask in ("reward", "at_once"):
    score_0, score_1 = rewarded(place)[rated].T
    said = label_pairs(score_0, score_1)
  else:
    said = ground.rater(of_train, "style", case.agreement)
  if case.ask == "active":
    sides = embedded(place)[rated[numbers.reshape(-1)]]
    differences = active.reduced(sides[:, 0] - sides[:, 1])
    chosen = actively(numbers, case.votes, case.seed, differences, said[numbers.reshape(-1)])
  else:
    chosen = at_random(numbers, case.votes, case.seed)
  rows = [
    {
      "caption": pictures[i].caption,
      "image_0": pictures[i].image,
      "image_1": pictures[j].image,
      "label_0": float(label),
    }
    for (i, j), label in zip(rated[chosen], said[chosen], strict=True)
  ]
  file = place / "train" / f"votes_{case.name}_seed{case.seed}.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return file


# ---- Runs ------------------------------------------------------------------------------------------------------------


def read(case: Case, folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns a run's numbers, of `study_rows.numbers`; None without a result."""
  file = folder / "votes" / case.path / "row.json"
  if file.is_file():
    return json.loads(file.read_text())
  scored, base = file.with_name(f"{case.split}.npz"), study_rows.base_folder(folder) / f"{case.split}.npz"
  if not scored.is_file() or not base.is_file():
    return None
  row = dataclasses.asdict(case) | {"fields": dict(case.fields)}
  row |= study_rows.numbers(measure.read(scored), measure.read(base), "style")
  file.write_text(json.dumps(row) + "\n")
  return row


def make(case: Case, folder: pathlib.Path, deadline: float) -> None:
  """Trains on the votes, draws and scores; raises as `study.train`."""
  place = folder / "votes" / case.path
  export = trained_model(case, place)
  if not export.is_dir():
    study.call(training_command(case, folder, place), place, deadline, results=export)
  model = None if case.ask != "rounds" else str(export)
  study.call(
    study_variants.measure_command(place, case.split, model), place, deadline, results=place / f"{case.split}.npz"
  )
  if read(case, folder):
    study.remove_models(place)
    shutil.rmtree(place / "taste", ignore_errors=True)


def trained_model(case: Case, place: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the model that a run in `place` leaves."""
  return place / "taste" / "runs" / f"round_{ROUNDS - 1}" / "export" if case.ask == "rounds" else place / "export"


def training_command(case: Case, folder: pathlib.Path, place: pathlib.Path) -> list[str]:
  """Returns the command that trains; writes the votes before, but for rounds, which draw their own pairs."""
  fields = COMMON | {"seed": case.seed} | dict(case.fields)
  if case.ask == "at_once":
    fields["num_steps"] = ROUNDS * load_recipe().num_steps
  if case.ask != "rounds":
    votes = write_votes(case, folder / "ground")
    return study_variants.main_command(RECIPE, fields | {"data.path": str(votes)}, place)
  command = [sys.executable, "-m", "jaxpref.taste", f"--config=configs/{RECIPE}.py", f"--out={place / 'taste'}"]
  command += [f"--rounds={ROUNDS}", f"--label={REWARD}", f"--prompts={round_prompts(case, folder / 'ground')}"]
  drawing = {"seeds": 2, "steps": ground_steps(), "guidance_scale": 3.5, "batch_size": 64, "seed": case.seed}
  command += [f"--{name}={value}" for name, value in drawing.items()]
  return command + [f"--config.{name}={value}" for name, value in fields.items()]


def load_recipe() -> Any:
  """Returns the recipe."""
  return importlib.import_module(f"configs.{RECIPE}").get_config()


def ground_steps() -> int:
  """Returns the denoising steps with which the pictures that are voted on were drawn."""
  (steps,) = (int(option.partition("=")[2]) for option in ground.DRAW if option.startswith("--steps="))
  return steps


def round_prompts(case: Case, place: pathlib.Path) -> pathlib.Path:
  """Writes the captions whose pictures the rounds of a run compare, and returns the file."""
  captions = [e.caption for e in ground.split("train")]
  chosen = np.random.default_rng([case.seed, 4]).choice(len(captions), ROUND_VOTES, replace=False)
  file = place / f"rounds_seed{case.seed}.txt"
  file.write_text("".join(captions[i] + "\n" for i in chosen))
  return file


# ---- Report ----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[dict[str, Any]], tuning: Sequence[dict[str, Any]] = ()) -> str:
  """Returns docs/results/votes.md."""
  base = rows[0]["base_share"] if rows else float("nan")
  parted = [[row for row in rows if (row["ask"] in IN_ROUNDS) == rounds] for rounds in (False, True)]
  lines = [_HEAD.format(base=f"{base:.1%}", reward=REWARD), "", *_table(parted[0])]
  if compared := _unsure_against_random(rows):
    lines += [
      "",
      "Asking the unsure pairs instead of random ones, share by seed, in points: " + "; ".join(compared) + ".",
    ]
  if parted[1]:
    lines += ["", _ROUNDS_HEAD.format(rounds=ROUNDS, votes=ROUND_VOTES), "", *_table(parted[1])]
  if tuning:
    head = _TUNING_HEAD.format(votes=TUNING_VOTES, agreement=TUNING_AGREEMENT, seed=study_plan.TUNING_SEED)
    lines += ["", head, "", *_tuning_table(tuning)]
  return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
  """A line for all runs that differ only by the seed."""
  lines = [_head_of("who labels", "asks", "pairs", "runs", "share, points [95 %]", "shown by a run alone", "captions")]
  named = lambda row: (row["ask"], row["agreement"], row["fields"].get("num_steps", 0), row["votes"])
  for (ask, agreement, steps, votes), of_kind in itertools.groupby(sorted(rows, key=named), named):
    mine = list(of_kind)
    gains = np.asarray([row["share"] - row["base_share"] for row in mine])
    alone = sum(row["share"] - row["base_share"] > 1.96 * row["error"] for row in mine)
    who = f"voter, right in {agreement} %" if agreement else "reward"
    asks = ASKED.get(ask, ask) + (f", {steps} steps" if steps else "")
    cells = [who, asks, str(votes), str(len(mine)), _interval(gains)]
    cells += [f"{alone} of {len(mine)}", f"{100 * np.mean([row['captions'] for row in mine]):+.1f}"]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _unsure_against_random(rows: Sequence[dict[str, Any]]) -> list[str]:
  """The differences of the runs with the same number of votes and the same seed, with their intervals."""
  of = {
    ask: {(r["votes"], r["seed"]): r["share"] for r in rows if (r["ask"], r["agreement"], r["fields"]) == (ask, 85, {})}
    for ask in ("active", "random")
  }
  found = []
  for votes in VOTES:
    both = [key for key in of["active"] if key[0] == votes and key in of["random"]]
    if len(both) > 1:
      found.append(f"{votes} votes {_interval(np.asarray([of['active'][key] - of['random'][key] for key in both]))}")
  return found


def _tuning_table(rows: Sequence[dict[str, Any]]) -> list[str]:
  """A line for each trial; the chosen one is bold."""
  best = best_settings(rows)
  lines = [_head_of("learning rate", "steps", "beta", "share, points", "captions")]
  for row in rows:
    gains = [100 * (row["share"] - row["base_share"]), 100 * row["captions"]]
    cells = [f"{value:g}" for value in row["fields"].values()] + [f"{gain:+.1f}" for gain in gains]
    lines.append("| " + " | ".join(f"**{cell}**" if row["fields"] == best else cell for cell in cells) + " |")
  return lines


def _head_of(*cells: str) -> str:
  return "| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|"


def _interval(values: np.ndarray) -> str:
  """Returns the mean in points, with its 95 % interval by Student's t from three values on."""
  text = f"{100 * values.mean():+.1f}"
  if len(values) > 2:
    reach = 100 * stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    text += f" [{100 * values.mean() - reach:+.1f}, {100 * values.mean() + reach:+.1f}]"
  return text


_HEAD = """# How many votes a taste needs, on tiny-sd

Made by `python scripts/study/votes.py`, on pictures of `python scripts/study/ground.py`; all numbers are in votes.json.

A simulated voter looks at pairs of pictures by tiny-sd and prefers the outlined style, {base} of the base model's
pictures. `configs/taste_tiny.py` trains a LoRA on these votes alone. Share: how many more of 1,024 pictures of 256 new
captions are outlined. Shown by a run alone: in how many runs that change exceeds 1.96 standard errors over captions.
Captions: change, in points, of the share of pictures whose caption the judge picks among 16. The reward is
`{reward}`."""

_ROUNDS_HEAD = """## In rounds

`jaxpref taste` in {rounds} rounds: each draws {votes} pairs of {votes} captions with the newest model, has the reward
label them, and trains on them. At once: one training on as many pairs of the base model, each of a caption of its own,
that takes as many steps."""

_TUNING_HEAD = """## The recipe's settings

One run each (`--tune`, seed {seed}), on {votes} pairs that were judged by a voter who is right in {agreement} %;
measured on 128 validation captions. The rule is that of [the study of methods](papers_questions.md): the highest share
among runs that lose at most 5 points of captions."""


def write(folder: pathlib.Path, docs: pathlib.Path) -> None:
  """Writes the report of the runs that are done."""
  rows, tuning = [[row for case in of if (row := read(case, folder))] for of in (cases(), trials(folder))]
  (docs / "votes.json").write_text(json.dumps({"runs": rows, "tuning": tuning}, indent=1) + "\n")
  (docs / "votes.md").write_text(markdown(rows, tuning))


def run(chosen: Callable[[], Sequence[Case]], folder: pathlib.Path, deadline: float) -> None:
  """Makes the runs that are left of `chosen`, which is asked anew after each."""
  study.measure_base(folder, deadline)
  while time.time() < deadline and (left := [case for case in chosen() if not read(case, folder)]):
    print(f"{datetime.datetime.now():%H:%M:%S} {left[0].path} ...", file=sys.stderr, flush=True)
    try:
      make(left[0], folder, deadline)
    except TimeoutError as error:
      print(f"stopped: {error}", file=sys.stderr)
      return


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--until", help="HH:MM of today, when to stop")
  parser.add_argument("--only", default="", help="a regular expression in 'ASK VOTES AGREEMENT seedN'")
  parser.add_argument("--tune", action="store_true", help="only runs that try settings")
  parser.add_argument("--list", action="store_true", help="print what is left, run nothing")
  parser.add_argument("--report", action="store_true", help="run nothing, write the report")
  parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "study", help="default: %(default)s")
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs" / "results", help="default: %(default)s")
  args = parser.parse_args(arguments)
  folder, deadline = args.runs.resolve(), float("inf")
  named = lambda case: f"{case.ask} {case.votes} {case.agreement} seed{case.seed}"
  chosen = lambda: trials(folder) if args.tune else [case for case in cases() if re.search(args.only, named(case))]
  if args.list:
    print("\n".join(case.path for case in chosen() if not read(case, folder)))
    return
  if args.until:
    hour = datetime.datetime.strptime(args.until, "%H:%M").time()
    deadline = datetime.datetime.combine(datetime.date.today(), hour).timestamp()
  if not args.report:
    run(chosen, folder, deadline)
  write(folder, args.docs)


if __name__ == "__main__":
  try:
    main()
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
