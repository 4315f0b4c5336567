"""How many votes does a taste need? Simulated voters, on pictures of tiny-sd.

    python scripts/study/votes.py --list                  # the runs that are left
    python scripts/study/votes.py --until 18:30           # makes them until that time, then the report
    python scripts/study/votes.py --only "active 100 "    # only runs in whose name this regular expression is found
    python scripts/study/votes.py --report                # only docs/results/votes.md and votes.json

Needs the pictures of scripts/study/ground.py. A folder has 8 pairs for each of 637 captions. A simulated voter judges
some of them, and agrees with a hidden score in 70 or 85 % of the pairs (see ground.py). configs/taste_tiny.py trains a
LoRA on these votes alone. 256 captions that no vote saw, 4 pictures each, show what was learnt.

Pairs are asked at random, one of each caption first; or by `jaxpref.vote --active=tiny-clip`, the pairs of which the
votes so far say least; or no person is asked, and a reward labels the pairs (`jaxpref.pairs --label`).
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from jaxpref import pairs  # noqa: E402
from jaxpref.data.labels import label_pairs  # noqa: E402
from jaxpref.voting import active, schedule  # noqa: E402
from scripts.study import ground, measure, study, study_plan  # noqa: E402
from scripts.study.study_plan import ROOT  # noqa: E402

VOTES = (50, 100, 200, 400, 800)
SEEDS = range(5)
REWARD = "preference_model=tiny-spm"  # which knows the style from pairs of its own
OFFERED = 8  # pairs of each caption in the folder that is voted on
RECIPE = "taste_tiny"
COMMON = {"sample.every": 0, "checkpoint.keep": 1, "checkpoint.every": 100_000, "evaluation.num_prompts": 0}


@dataclasses.dataclass(frozen=True)
class Case:
  """A run: who was asked about how many pairs, and which.

  Attributes:
    ask: "random" or "active"; "reward" for labels by REWARD.
    votes: number of pairs.
    agreement: percent of the pairs in which the voter says what the hidden score says; 0 for a reward.
    seed: of the pairs and of training.
  """

  ask: str
  votes: int
  agreement: int
  seed: int

  @property
  def name(self) -> str:
    """Of its folder, without the seed."""
    return f"{self.ask}_{self.votes}" + (f"_{self.agreement}" if self.agreement else "")

  @property
  def path(self) -> str:
    return f"{self.name}/seed{self.seed}"


def cases() -> list[Case]:
  """Returns all runs, a seed of each first."""
  kinds = [("random", 85), ("active", 85), ("random", 70), ("reward", 0)]
  return [Case(ask, votes, agreement, seed) for seed in SEEDS for ask, agreement in kinds for votes in VOTES]


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
  said: dict[int, float] = {}
  free, probability = np.ones(len(flat), bool), None
  rng = np.random.default_rng(seed)
  while len(said) < votes:
    if len(said) % active.EVERY == 0:
      probability = active.predict(differences, said)
    chosen = schedule.choose(rng, free, ordered, probability)
    assert chosen is not None
    said[chosen], free[chosen] = float(label[chosen]), False
  return flat[list(said)]


@functools.cache
def embedded(place: pathlib.Path) -> np.ndarray:
  """Returns f32[16 P, D], tiny-clip's embeddings of the training pictures, computed once."""
  file = place / "train_embeddings.npy"
  if not file.is_file():
    from jaxpref.rewards import published

    embed = published.image_embedder("tiny-clip", batch_size=64)
    images = ground.read_images(place, "train").reshape(-1, 64, 64, 3)
    found = np.concatenate([embed(list(images[i : i + 1024])) for i in range(0, len(images), 1024)])
    np.save(file, found, allow_pickle=False)
  return np.load(file, allow_pickle=False)


@functools.cache
def rewarded(place: pathlib.Path) -> np.ndarray:
  """Returns f64[16 P], REWARD's scores of the training pictures in logits, computed once."""
  file = place / "train_reward.npy"
  if not file.is_file():
    from jaxpref.devices import sharding
    from jaxpref.rewards import scorers

    scorer, logits = scorers.load(REWARD, batch_size=64, mesh=sharding.make_mesh(), models=[])
    images = ground.read_images(place, "train").reshape(-1, 64, 64, 3)
    captions = [e.caption for e in ground.split("train") for _ in range(ground.PICTURES)]
    parts = [slice(i, i + 1024) for i in range(0, len(images), 1024)]
    found = np.concatenate([scorer.score(list(images[part]), captions[part]) for part in parts])
    np.save(file, logits * found.astype(np.float64), allow_pickle=False)
  return np.load(file, allow_pickle=False)


def write_votes(case: Case, place: pathlib.Path) -> pathlib.Path:
  """Writes what was asked and said, a `pairs_file` beside the pictures, and returns it."""
  of_train = ground.scores(place, "train")
  pictures, rated = pairs.read_pictures(place / "train"), ground.rated_pairs(len(of_train["style"]))
  numbers = offered(len(of_train["style"]))
  if case.ask == "reward":
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
  """Returns a run's numbers, of `study_plan.numbers`; None without a result."""
  file = folder / "votes" / case.path / "row.json"
  if file.is_file():
    return json.loads(file.read_text())
  scored, base = file.with_name("test.npz"), study_plan.base_folder(folder) / "test.npz"
  if not scored.is_file() or not base.is_file():
    return None
  row = dataclasses.asdict(case) | study_plan.numbers(measure.read(scored), measure.read(base), "style")
  file.write_text(json.dumps(row) + "\n")
  return row


def make(case: Case, folder: pathlib.Path, deadline: float) -> None:
  """Trains on the votes, draws and scores; raises as `study.train`."""
  place = folder / "votes" / case.path
  fields = COMMON | {"seed": case.seed, "data.path": str(write_votes(case, folder / "ground"))}
  if not (place / "export").is_dir():
    study.call(study_plan.main_command(RECIPE, fields, place), place, deadline, results=place / "export")
  study.call(study_plan.measure_command(place, "test"), place, deadline, results=place / "test.npz")
  if read(case, folder):
    study.remove_models(place)


# ---- Report ----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[dict[str, Any]]) -> str:
  """Returns docs/results/votes.md."""
  base = rows[0]["base_share"] if rows else float("nan")
  lines = [_HEAD.format(base=f"{base:.1%}", reward=REWARD), "", _table_head()]
  named = lambda row: (row["ask"], row["agreement"], row["votes"])
  for (ask, agreement, votes), of_kind in itertools.groupby(sorted(rows, key=named), named):
    mine = list(of_kind)
    gains = np.asarray([row["share"] - row["base_share"] for row in mine])
    alone = sum(row["share"] - row["base_share"] > 1.96 * row["error"] for row in mine)
    who = f"voter, right in {agreement} %" if agreement else "reward"
    cells = [who, {"reward": "random"}.get(ask, ask), str(votes), str(len(mine)), _interval(gains)]
    cells += [f"{alone} of {len(mine)}", f"{100 * np.mean([row['captions'] for row in mine]):+.1f}"]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def _interval(values: np.ndarray) -> str:
  """Returns the mean in points, with its 95 % interval by Student's t from three values on."""
  text = f"{100 * values.mean():+.1f}"
  if len(values) > 2:
    reach = 100 * stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    text += f" [{100 * values.mean() - reach:+.1f}, {100 * values.mean() + reach:+.1f}]"
  return text


def _table_head() -> str:
  head = "who labels | asks | pairs | runs | share, points [95 %] | shown by a run alone | captions, points"
  return f"| {head} |\n" + "|---" * (head.count("|") + 1) + "|"


_HEAD = """# How many votes a taste needs, on tiny-sd

Made by `python scripts/study/votes.py`, on pictures of `python scripts/study/ground.py`; all numbers are in votes.json.

A simulated voter looks at pairs of pictures by tiny-sd and prefers the outlined style, {base} of the base model's
pictures. `configs/taste_tiny.py` trains a LoRA on these votes alone. Share: how many more of 1,024 pictures of 256 new
captions are outlined. Shown by a run alone: in how many runs that change exceeds 1.96 standard errors over captions.
Captions: change of the share of pictures whose caption the judge picks among 16. The reward is `{reward}`."""


def write(folder: pathlib.Path, docs: pathlib.Path) -> None:
  """Writes the report of the runs that are done."""
  rows = [row for case in cases() if (row := read(case, folder))]
  (docs / "votes.json").write_text(json.dumps(rows, indent=1) + "\n")
  (docs / "votes.md").write_text(markdown(rows))


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--until", help="HH:MM of today, when to stop")
  parser.add_argument("--only", default="", help="a regular expression in 'ASK VOTES AGREEMENT seedN'")
  parser.add_argument("--list", action="store_true", help="print what is left, run nothing")
  parser.add_argument("--report", action="store_true", help="run nothing, write the report")
  parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "study", help="default: %(default)s")
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs" / "results", help="default: %(default)s")
  args = parser.parse_args(arguments)
  folder, deadline = args.runs.resolve(), float("inf")
  named = lambda case: f"{case.ask} {case.votes} {case.agreement} seed{case.seed}"
  left = [case for case in cases() if re.search(args.only, named(case)) and not read(case, folder)]
  if args.list:
    print("\n".join(case.path for case in left))
    return
  if args.until:
    hour = datetime.datetime.strptime(args.until, "%H:%M").time()
    deadline = datetime.datetime.combine(datetime.date.today(), hour).timestamp()
  if not args.report:
    study.measure_base(folder, deadline)
    for case in left:
      if time.time() >= deadline:
        break
      print(f"{datetime.datetime.now():%H:%M:%S} {case.path} ...", file=sys.stderr, flush=True)
      try:
        make(case, folder, deadline)
      except TimeoutError as error:
        print(f"stopped: {error}", file=sys.stderr)
        break
  write(folder, args.docs)


if __name__ == "__main__":
  try:
    main()
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
