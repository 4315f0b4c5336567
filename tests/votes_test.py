"""The study of votes: which pairs are asked, what is written of them, and the report, from made-up runs."""

import json

import numpy as np
import pytest

from jaxpref.voting import active
from scripts.study import ground, votes


def test_every_run_has_a_folder_of_its_own():
  paths = [case.path for case in votes.cases()]
  in_rounds = 2 * len(votes.ROUND_SEEDS)
  assert len(set(paths)) == len(paths) == 5 * len(votes.VOTES) * len(votes.SEEDS) + in_rounds
  assert len({case.seed for case in votes.cases()[: 4 * len(votes.VOTES)]}) == 1  # a seed of each first


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
    if case.votes in (50, 800) and case.ask in ("random", "active"):
      share = 0.36 if case.votes == 50 else 0.6 + 0.01 * case.seed
      share += 0.1 * (case.ask == "random" and not case.fields)
      row = {"share": share, "base_share": 0.35, "error": 0.02, "captions": -0.01}
      rows.append(row | {name: getattr(case, name) for name in ("ask", "votes", "agreement", "seed")})
      rows[-1]["fields"] = dict(case.fields)
  said = votes.markdown(rows)
  assert "50 votes -10.0 [-10.0, -10.0]; 800 votes -10.0 [-10.0, -10.0]." in said
  lines = [line for line in said.splitlines() if line.startswith("| voter")]
  assert len(lines) == 8
  assert lines[0] == "| voter, right in 85 % | unsure | 50 | 5 | +1.0 [+1.0, +1.0] | 0 of 5 | -1.0 |"
  assert lines[1] == "| voter, right in 85 % | unsure | 800 | 5 | +27.0 [+25.0, +29.0] | 5 of 5 | -1.0 |"


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


def row_of(case, folder, *, share, captions=-0.01):
  """Writes what a run would leave."""
  row = {"share": share, "base_share": 0.35, "error": 0.02, "captions": captions}
  row |= {"ask": case.ask, "votes": case.votes, "agreement": case.agreement, "fields": dict(case.fields)}
  (folder / "votes" / case.path).mkdir(parents=True)
  (folder / "votes" / case.path / "row.json").write_text(json.dumps(row))


def test_settings_are_tried_one_after_the_other(tmp_path):
  """Steps at the best rate, then betas at the best of both; a run that forgets captions is not the best."""
  rates = votes.trials(tmp_path)
  assert [dict(case.fields)["optimizer.learning_rate"] for case in rates] == [3e-4, 1e-3, 3e-3, 1e-2]
  for case, share, captions in zip(rates, (0.4, 0.5, 0.9, 0.3), (-0.01, -0.02, -0.2, -0.01), strict=True):
    assert case.split == "validation" and case.seed not in votes.SEEDS
    row_of(case, tmp_path, share=share, captions=captions)
  steps = votes.trials(tmp_path)[4:]
  assert {dict(case.fields)["optimizer.learning_rate"] for case in steps} == {1e-3}
  for case in steps:
    row_of(case, tmp_path, share=0.7 if dict(case.fields)["num_steps"] == 120 else 0.3)
  betas = votes.trials(tmp_path)[7:]
  assert [tuple(dict(case.fields).values()) for case in betas] == [(1e-3, 120, 50.0), (1e-3, 120, 5000.0)]
  for case in betas:
    row_of(case, tmp_path, share=0.2)
  votes.write(tmp_path, tmp_path)
  assert "| **0.001** | **120** | **500** | **+35.0** | **-1.0** |" in (tmp_path / "votes.md").read_text()
  assert len(json.loads((tmp_path / "votes.json").read_text())["tuning"]) == 9


def test_rounds_and_what_stands_beside_them_take_as_many_steps_and_pairs(small, monkeypatch):
  place, _ = small
  (place / "ground").mkdir()
  rounds, at_once = (votes.Case(ask, 400, 0, 0) for ask in votes.IN_ROUNDS)
  command = votes.training_command(rounds, place, place / "run")
  assert "jaxpref.taste" in command and f"--rounds={votes.ROUNDS}" in command and "--seeds=2" in command
  (prompts,) = [argument.partition("=")[2] for argument in command if argument.startswith("--prompts=")]
  captions = open(prompts).read().splitlines()
  assert len(captions) == len(set(captions)) == votes.ROUND_VOTES
  assert set(captions) <= {e.caption for e in ground.split("train")}
  assert votes.ROUNDS * votes.ROUND_VOTES == at_once.votes
  assert not any(argument.startswith("--config.num_steps") for argument in command)
  monkeypatch.setattr(votes, "write_votes", lambda case, place: place / "votes.jsonl")
  steps = votes.ROUNDS * votes.load_recipe().num_steps
  assert f"--config.num_steps={steps}" in votes.training_command(at_once, place, place / "other")
