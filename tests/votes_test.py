"""The study of votes: which pairs are asked, what is written of them, and the report, from made-up runs."""

import json

import numpy as np
import pytest

from jaxpref.voting import active
from scripts.study import ground, votes


def test_every_run_has_a_folder_of_its_own():
  paths = [case.path for case in votes.cases()]
  assert len(set(paths)) == len(paths) == 4 * len(votes.VOTES) * len(votes.SEEDS)
  assert len({case.seed for case in votes.cases()[: len(paths) // len(votes.SEEDS)]}) == 1  # a seed of each first


def test_pairs_of_a_caption_are_its_own():
  found = votes.offered(5)
  assert found.shape == (5, votes.OFFERED) and len(np.unique(found)) == found.size
  pictures = ground.rated_pairs(5)[found]
  assert (pictures // ground.PICTURES == np.arange(5)[:, None, None]).all()
  np.testing.assert_array_equal(votes.offered(9)[:5], found)  # whatever other captions there are


def test_at_random_each_caption_comes_once_before_any_comes_again():
  numbers = votes.offered(10)
  asked = votes.at_random(numbers, 25, seed=0)
  captions = asked // len(ground.rated_pairs(1))
  assert len(np.unique(asked)) == 25
  assert sorted(captions[:10]) == sorted(captions[10:20]) == list(range(10))
  assert (votes.at_random(numbers, 12, seed=0) == asked[:12]).all()  # more votes go on from fewer
  assert (votes.at_random(numbers, 25, seed=1) != asked).any()


def test_actively_asked_pairs_are_the_unsure_ones():
  """Of pairs whose answer is a direction, those that the votes so far say least of."""
  numbers = votes.offered(40)
  rng = np.random.default_rng(0)
  differences = active.reduced(rng.normal(size=(numbers.size, 6)))
  truth = differences[:, 0]
  label = (truth > 0).astype(np.float32)
  asked = votes.actively(numbers, 120, 0, differences, label)
  assert len(np.unique(asked)) == 120 and set(asked) <= set(numbers.reshape(-1))
  place = {number: i for i, number in enumerate(numbers.reshape(-1))}
  late = np.abs([truth[place[number]] for number in asked[60:]])
  assert late.mean() < 0.7 * np.abs(truth).mean()


def test_the_report_has_a_line_for_each_kind(tmp_path):
  assert votes.markdown([]).count("\n|") == 2
  rows = []
  for case in votes.cases():
    if case.votes in (50, 800) and case.ask != "reward":
      share = 0.36 if case.votes == 50 else 0.6 + 0.01 * case.seed
      row = {"share": share, "base_share": 0.35, "error": 0.02, "captions": -0.01}
      rows.append({"ask": case.ask, "votes": case.votes, "agreement": case.agreement, "seed": case.seed} | row)
  lines = [line for line in votes.markdown(rows).splitlines() if line.startswith("| voter")]
  assert len(lines) == 6
  assert lines[0] == "| voter, right in 85 % | active | 50 | 5 | +1.0 [+1.0, +1.0] | 0 of 5 | -1.0 |"
  assert lines[1] == "| voter, right in 85 % | active | 800 | 5 | +27.0 [+25.0, +29.0] | 5 of 5 | -1.0 |"


@pytest.fixture
def small(tmp_path, monkeypatch):
  """Two captions, whose pictures exist by name only."""
  prompts = ground.split("train")[:2]
  score = np.random.default_rng(3).normal(size=(2, ground.PICTURES)).astype(np.float32)
  monkeypatch.setattr(votes.ground, "scores", lambda place, name: {"style": score})
  rows = [
    {"image": f"{p}_{i}.png", "caption": prompts[p].caption, "prompt": p, "model": "model", "seed": 1, "number": i}
    for p in range(2)
    for i in range(ground.PICTURES)
  ]
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path, score.reshape(-1)


def test_votes_say_what_the_voter_says(small):
  place, score = small
  file = votes.write_votes(votes.Case("random", 16, 100, 0), place)
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  assert len(rows) == 16
  number = lambda name: int(name[0]) * ground.PICTURES + int(name[2:-4])
  for row in rows:
    assert row["label_0"] == float(score[number(row["image_0"])] > score[number(row["image_1"])])
