"""Blind comparisons: the rule by which they end, what may be looked at, and the numbers, against other derivations."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from jaxpref.evaluation import statistics
from jaxpref.voting import trial
from jaxpref.voting.judgements import Judgement
from jaxpref.voting.trial import Rule


def said(pair, verdict, voter=1, repeat=False):
  return Judgement(voter, pair, verdict, "left", False, repeat, 0.0)


def cells_of(prompts, seeds=1, models=2):
  return [(m, p, s) for m in range(1, models) for p in range(prompts) for s in range(seeds)]


def votes_of(rng, prompts, p):
  """A vote on each prompt, which the model wins with probability p."""
  return [said(i, "image_1" if rng.random() < p else "image_0") for i in range(prompts)]


# ---- Evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 5), (40, 20)])
def test_the_evidence_is_the_mean_likelihood_ratio_over_all_win_rates(wins, losses):
  ratio = lambda p: (2 * p) ** wins * (2 * (1 - p)) ** losses
  assert math.exp(trial.evidence(wins, losses)) == pytest.approx(integrate.quad(ratio, 0, 1)[0], rel=1e-9)


def test_the_evidence_is_a_martingale_for_a_fair_coin():
  for wins, losses in ((0, 0), (4, 1), (10, 13)):
    now = math.exp(trial.evidence(wins, losses))
    after = [math.exp(trial.evidence(wins + won, losses + 1 - won)) for won in (0, 1)]
    assert np.mean(after) == pytest.approx(now)


def test_looking_after_each_vote_finds_a_difference_that_is_not_there_in_less_than_five_percent():
  rng = np.random.default_rng(0)
  tosses = rng.random((2000, 300)) < 0.5
  wins = tosses.cumsum(axis=1)
  number = np.arange(1, 301)
  table = np.asarray([[trial.evidence(w, n - w) if w <= n else 0.0 for w in range(301)] for n in number])
  highest = table[np.arange(300)[None], wins].max(axis=1)
  assert (highest >= math.log(20)).mean() < 0.05
  p_of = {}
  for w, n in {(int(w), int(n)) for w, n in zip(wins[:300].ravel(), np.tile(number, 300), strict=True)}:
    p_of[w, n] = stats.binomtest(w, n).pvalue if n % 10 == 0 else 1.0
  often = np.mean([min(p_of[int(w), int(n)] for w, n in zip(row, number, strict=True)) < 0.05 for row in wins[:300]])
  assert often > 0.15  # what the usual test would do


@pytest.mark.parametrize(("wins", "losses"), [(10, 0), (0, 7), (30, 20), (0, 0), (1, 1)])
def test_the_interval_holds_the_win_rates_that_the_evidence_does_not_exclude(wins, losses):
  low, high = trial.sequence_interval(wins, losses)
  assert 0.0 <= low <= high <= 1.0
  mixture = lambda p: integrate.quad(lambda q: (q / p) ** wins * ((1 - q) / (1 - p)) ** losses, 0, 1)[0]
  for edge, step in ((low, -1), (high, 1)):
    if 0.0 < edge < 1.0:
      assert mixture(edge - step * 1e-4) < 20 < mixture(edge + step * 1e-4) or mixture(edge) == pytest.approx(
        20, rel=1e-3
      )


def test_the_interval_of_a_fair_coin_holds_one_half_at_all_times():
  rng = np.random.default_rng(1)
  missed = 0
  for row in rng.random((200, 200)) < 0.5:
    wins = row.cumsum()
    missed += any(
      not lo <= 0.5 <= hi
      for lo, hi in (trial.sequence_interval(int(w), n - int(w)) for n, w in enumerate(wins, 1) if n % 10 == 0)
    )
  assert missed / 200 < 0.05


# ---- The end ---------------------------------------------------------------------------------------------------------


def test_a_fixed_comparison_ends_after_so_many_pairs_and_not_before():
  cells = cells_of(10)
  found = [said(i, "image_1") for i in range(10)]
  assert not trial.has_ended(Rule(10), cells, found[:9])
  assert trial.has_ended(Rule(10), cells, found) and trial.has_ended(Rule(3), cells, found[:3])
  assert not trial.has_ended(
    Rule(3), cells, [said(0, "tie", 1), said(0, "tie", 2), said(1, None), said(0, "tie", repeat=True)]
  )
  assert trial.has_ended(Rule(2), cells, [said(0, "tie"), said(1, None)])  # a skipped pair is answered


def test_an_early_comparison_ends_with_the_evidence_of_all_models():
  cells = cells_of(20, models=3)
  one = [said(i, "image_1") for i in range(20)]
  both = one + [said(20 + i, "image_0") for i in range(20)]
  rule = Rule(1000, "early")
  assert trial.limit(2) == math.log(40)
  assert not trial.has_ended(rule, cells, one)
  assert trial.has_ended(rule, cells, both)
  ended = trial.until_the_end(rule, cells, both)
  assert trial.has_ended(rule, cells, ended) and not trial.has_ended(rule, cells, ended[:-1])
  needed = next(n for n in range(30) if trial.evidence(0, n) >= math.log(40))
  assert len(ended) == 20 + needed


def test_votes_after_the_end_do_not_count():
  cells = cells_of(30)
  found = [said(i, "image_1") for i in range(10)] + [said(i, "image_0") for i in range(10, 30)]
  result = trial.results(Rule(10), cells, ["base", "new"], found)
  assert result["votes"] == result["pairs"] == 10 and result["comparisons"]["new"]["prompts_won"] == 10


def test_only_the_first_vote_on_a_prompt_is_evidence():
  cells = cells_of(5, seeds=4)
  many = [said(cells.index((1, 0, s)), "image_1", voter) for s in range(4) for voter in range(5)]
  assert trial.highest_evidence(cells, many, 1) == pytest.approx(max(0.0, trial.evidence(1, 0)))


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_results_are_those_of_a_scorer_with_one_vote_for_each_prompt():
  rng = np.random.default_rng(3)
  cells = cells_of(40)
  found = votes_of(rng, 40, 0.8)
  found[5] = said(5, "tie")
  found[6] = said(6, "bad")
  one = trial.results(Rule(40), cells, ["base", "new"], found)["comparisons"]["new"]
  score = {"image_1": 1.0, "image_0": -1.0, "tie": 0.0, "bad": 0.0}
  new = np.asarray([[score[j.said]] for j in found])
  known = statistics.win_rate(new, 0 * new) | statistics.sign_test(new, 0 * new)
  assert {name: one[name] for name in known} == known and one["p_holm"] == one["p"]
  assert one["prompts"] == 40 and one["prompts_tied"] == 2 and one["verdict"] == "higher"


def test_a_prompt_counts_once_whatever_votes_it_has():
  cells = cells_of(3, seeds=2)
  found = [said(cells.index((1, 0, 0)), "image_1", voter) for voter in range(9)]
  found += [said(cells.index((1, 0, 1)), "image_0")]
  found += [said(cells.index((1, 1, 0)), "image_0"), said(cells.index((1, 2, 0)), "image_0")]
  assert trial.shares(cells, found, 1) == {0: 0.5, 1: 0.0, 2: 0.0}
  one = trial.results(Rule(4), cells, ["base", "new"], found)["comparisons"]["new"]
  assert one["win_rate"] == pytest.approx(1 / 6) and (one["prompts_lost"], one["prompts_tied"]) == (2, 1)


def test_equal_models_are_called_different_in_at_most_five_percent():
  rng = np.random.default_rng(4)
  cells = cells_of(50)
  verdicts = [
    trial.results(Rule(50), cells, ["a", "b"], votes_of(rng, 50, 0.5))["comparisons"]["b"]["verdict"]
    for _ in range(200)
  ]
  assert np.mean([verdict != "undecided" for verdict in verdicts]) <= 0.05


def test_several_models_are_corrected_by_holm():
  rng = np.random.default_rng(5)
  cells = cells_of(30, models=3)
  found = votes_of(rng, 30, 0.5) + [said(30 + i, "image_1") for i in range(30)]
  compared = trial.results(Rule(60), cells, ["base", "same", "new"], found)["comparisons"]
  p = [compared[name]["p"] for name in ("same", "new")]
  assert [compared[name]["p_holm"] for name in ("same", "new")] == statistics.holm(p)
  assert compared["new"]["verdict"] == "higher" and compared["same"]["verdict"] == "undecided"


def test_an_early_end_has_numbers_that_hold_at_all_times():
  cells = cells_of(30)
  result = trial.results(Rule(30, "early"), cells, ["a", "b"], [said(i, "image_1") for i in range(30)])
  one = result["comparisons"]["b"]
  number = next(n for n in range(30) if trial.evidence(n, 0) >= math.log(20))
  assert result["votes"] == number and one["p"] == pytest.approx(math.exp(-trial.evidence(number, 0)))
  assert one["win_rate_interval"] == trial.sequence_interval(number, 0) and one["verdict"] == "higher"


def test_no_votes_give_no_comparison():
  assert trial.results(Rule(5), cells_of(5), ["a", "b"], [])["comparisons"] == {}


def test_scores_of_pictures_are_shares_of_their_votes():
  cells = cells_of(2, seeds=2, models=3)
  found = [said(cells.index((1, 0, 0)), "image_1"), said(cells.index((2, 0, 0)), "image_0")]
  found += [said(cells.index((1, 1, 1)), "bad"), said(cells.index((1, 0, 0)), "image_1", repeat=True)]
  scores, judged = trial.scores(cells, ["base", "one", "two"], found, 2, 2)
  assert scores["base"].tolist() == [[0.5, 0.5], [0.5, 0.5]] and judged == 5
  assert scores["one"].tolist() == [[1.0, 0.5], [0.5, 0.5]] and scores["two"].tolist() == [[0.0, 0.5], [0.5, 0.5]]


def test_the_rule_is_said_in_words():
  assert Rule(7).in_words() == "Voting ends after 7 pairs, and the results are computed once."
  assert "after 7 pairs at the latest" in Rule(7, "early").in_words()
