"""Known values, scipy as oracle, intervals that cover, and sentences for scores that are none."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from jaxpref.evaluation import statistics


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


# ---- Intervals -------------------------------------------------------------------------------------------------


def test_intervals_of_win_rates_cover_the_truth():
  """Of 200 experiments with 40 prompts of 4 seeds, about 95 % of the intervals hold the true rate."""
  truth = 0.5 * (1 + math.erf(0.5 / math.sqrt(2 * 3) / math.sqrt(2)))  # P(N(0.5, 6) > 0), by the normal distribution
  hits = []
  for i in range(200):
    rng = np.random.default_rng(i)
    prompt = rng.standard_normal((40, 1)) * 2  # what a prompt has in common: its pictures are not independent
    new = prompt + 0.5 + rng.standard_normal((40, 4))
    old = rng.standard_normal((40, 4))
    low, high = statistics.win_rate(new, old, samples=400, seed=i)["win_rate_interval"]
    hits.append(low < truth < high)
  assert 0.88 < np.mean(hits) < 0.99


def test_the_interval_is_that_of_the_same_draws_in_one_piece(monkeypatch):
  values = draw(0, 50)
  whole = statistics.bootstrap_interval(values, samples=333, seed=1)
  monkeypatch.setattr(statistics, "CHUNK", 1000)
  assert statistics.bootstrap_interval(values, samples=333, seed=1) == whole
  index = np.random.default_rng(1).integers(0, 50, (333, 50))
  assert whole == tuple(np.percentile(values[index].mean(axis=1), [2.5, 97.5]))


def test_the_interval_is_that_of_scipy_from_the_same_seed():
  values = np.exp(draw(3, 80))
  ours = statistics.bootstrap_interval(values, samples=4000, seed=0)
  theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0))
  np.testing.assert_allclose(ours, theirs.confidence_interval, rtol=1e-12)


def test_intervals_follow_the_seed_alone():
  new, old = draw(0, 30, 2), draw(1, 30, 2)
  assert statistics.compare(new, old) == statistics.compare(new.tolist(), old.tolist())
  other = statistics.compare(new, old, seed=1)
  assert other["win_rate"] == statistics.compare(new, old)["win_rate"]
  assert other["difference_interval"] != statistics.compare(new, old)["difference_interval"]


def test_one_prompt_has_no_interval():
  one = statistics.compare([[1.0, 2.0, 3.0]], [[0.0, 2.0, 4.0]])
  assert one["win_rate"] == 0.5 and one["win_rate_interval"] is None
  assert one["difference"] == 0 and one["difference_interval"] is None and one["effect_size"] == 0
  assert statistics.describe([[1.0, 2.0]]) == {"mean": 1.5, "interval": None, "median": 1.5}


# ---- Known values ----------------------------------------------------------------------------------------------


def test_win_rate_counts_ties_half_and_pairs():
  new = [[1.0, 2.0], [3.0, 3.0], [0.0, 5.0], [1.0, 1.0]]
  old = [[1.0, 1.0], [4.0, 3.0], [1.0, 4.0], [1.0, 1.0]]
  assert statistics.win_rate(new, old)["win_rate"] == (0.5 + 1 + 0 + 0.5 + 0 + 1 + 0.5 + 0.5) / 8
  assert statistics.win_rate(new, old)["win_rate"] + statistics.win_rate(old, new)["win_rate"] == 1


def test_identical_models_are_even():
  scores = draw(0, 12, 3)
  same = statistics.compare(scores, scores.copy(), categories=["a", "b"] * 6)
  assert same["win_rate"] == 0.5 and same["win_rate_interval"] == (0.5, 0.5)
  assert same["p"] == 1 and same["prompts_tied"] == 12
  assert same["difference"] == 0 and same["difference_interval"] == (0, 0) and same["effect_size"] == 0
  assert all(c["win_rate"] == 0.5 and c["p"] == 1 for c in same["categories"].values())


def test_sign_test_takes_the_majority_of_each_prompt():
  new = np.array([[1.0, 1, -9], [1, 1, 1], [1, -1, 0], [-1, -1, 1], [1, 0, 0]])
  found = statistics.sign_test(new, np.zeros_like(new))
  assert (found["prompts_won"], found["prompts_lost"], found["prompts_tied"]) == (3, 1, 1)
  assert found["p"] == 2 * (1 + 4) / 16


@pytest.mark.parametrize(
  ("wins", "losses"), [(0, 0), (1, 0), (5, 5), (0, 6), (7, 2), (300, 253), (1600, 32), (900, 700), (2500, 2400)]
)
def test_binomial_test_counts_the_splits_that_are_as_uneven(wins, losses):
  n = wins + losses
  as_uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses))
  assert statistics.binomial_test(wins, losses) == pytest.approx(as_uneven / 2**n, rel=1e-12)
  assert statistics.binomial_test(losses, wins) == pytest.approx(as_uneven / 2**n, rel=1e-12)


def test_binomial_test_by_hand():
  """5 of 6: 1 + 6 of 64 splits on either side; 9 of 10: 1 + 10 of 1024; 6 of 6 against 5 of 5 around a level of 5 %."""
  found = [statistics.binomial_test(*split) for split in ((5, 1), (9, 1), (6, 0), (5, 0), (4, 4), (0, 0))]
  np.testing.assert_allclose(found, [14 / 64, 22 / 1024, 2 / 64, 2 / 32, 1, 1], rtol=1e-12)


def test_the_sign_test_is_right_about_chance():
  """Under the null hypothesis p falls below 0.05 in at most 5 % of experiments."""
  p = [statistics.sign_test(draw(i, 60, 1), np.zeros((60, 1)))["p"] for i in range(400)]
  assert np.mean(np.array(p) < 0.05) < 0.075


def test_holm_by_hand():
  assert statistics.holm([]) == []
  assert statistics.holm([0.2]) == [0.2]
  np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
  np.testing.assert_allclose(statistics.holm([0.7, 0.6, 0.9]), [1, 1, 1])
  np.testing.assert_allclose(statistics.holm([0.02, 0.02]), [0.04, 0.04])


def test_holm_keeps_the_family_wise_error():
  """Of 400 families of ten true null hypotheses at most about 5 % have any p below 0.05."""
  p = np.random.default_rng(0).random((400, 10))
  assert np.mean([min(statistics.holm(row)) < 0.05 for row in p]) < 0.075
  assert np.mean(p.min(axis=1) < 0.05) > 0.3  # without it, many


def test_difference_and_effect_size():
  change = draw(5, 25, 4) + 0.3
  found = statistics.difference(change, np.zeros_like(change))
  means = change.mean(axis=1)
  assert found["difference"] == pytest.approx(change.mean())
  t = stats.ttest_1samp(means, 0).statistic
  assert found["effect_size"] == pytest.approx(t / 5)  # d = t / sqrt(P)
  low, high = found["difference_interval"]
  assert low < found["difference"] < high
  # The same change everywhere has no spread to be measured by, also where rounding makes one.
  old = draw(0, 5, 2)
  assert statistics.difference(old + 0.1, old)["effect_size"] is None
  assert statistics.difference([[2.0], [3.0]], [[1.0], [2.0]])["effect_size"] is None


def test_categories_are_comparisons_of_their_prompts():
  new, old, names = draw(0, 20, 2), draw(1, 20, 2), ["cat", "dog", ""] * 6 + ["few"] * 2
  found = statistics.compare(new, old, categories=names)["categories"]
  assert list(found) == ["cat", "dog", "", "few"]
  part = statistics.compare(new[1:18:3], old[1:18:3])
  assert found["dog"] == {name: value for name, value in part.items() if name != "categories"}
  assert found["dog"]["prompts"] == 6 and found["dog"]["win_rate_interval"] is not None
  total = sum(c["win_rate"] * c["prompts"] for c in found.values()) / 20
  assert total == pytest.approx(statistics.win_rate(new, old)["win_rate"])
  assert found["few"]["win_rate_interval"] is found["few"]["difference_interval"] is None  # of two prompts
  assert statistics.compare(new, old, categories=["all"] * 20)["categories"] == {}


def test_where_all_is_won_the_interval_is_not_a_point():
  """It holds what wins all of n prompts in 2.5 % of cases."""
  low, high = statistics.win_rate(np.ones((10, 2)), np.zeros((10, 2)))["win_rate_interval"]
  assert low**10 == pytest.approx(0.025) and high == 1.0
  assert statistics.win_rate(np.zeros((10, 2)), np.ones((10, 2)))["win_rate_interval"] == (0.0, 1 - low)
  mixed = np.vstack([np.ones((9, 1)), np.zeros((1, 1))])
  low, high = statistics.win_rate(mixed, np.full((10, 1), 0.5))["win_rate_interval"]
  assert 0.5 < low < 0.9 and high == 1.0


def test_of_many_changes_few_fall_by_chance():
  """Of six models that differ from the baseline by chance alone, one in 5 of 100 cases: without correction in more."""
  wrong = {1: 0, 6: 0}
  for i in range(60):
    old = draw(i, 50, 1)[:, 0]
    models = [old + 0.3 * draw(1000 + 10 * i + k, 50, 1)[:, 0] for k in range(6)]
    for tests in wrong:
      found = [statistics.change(new, old, samples=400, tests=tests)["falls"] for new in models]
      wrong[tests] += any(found)
  assert wrong[6] <= 8 < wrong[1]


def test_change_says_whether_it_falls():
  old = 1 + 0.1 * draw(0, 40)
  assert statistics.change(old - 0.2, old)["falls"]
  assert not statistics.change(old + 0.2, old)["falls"]
  assert not statistics.change(old + 0.1 * draw(1, 40), old)["falls"]
  assert statistics.change([0.1], [0.9]) == {"change": pytest.approx(-0.8), "change_interval": None, "falls": False}


# ---- Bad input -------------------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_are_named():
  scores = draw(0, 6, 4)
  scores[[1, 2, 4, 5], [3, 0, 2, 2]] = np.nan, np.inf, np.nan, np.nan
  with pytest.raises(ValueError, match="scores: no finite number for prompt 1 seed 3, prompt 2 seed 0, "):
    statistics.describe(scores)
  with pytest.raises(ValueError, match="old model's scores: .* and 1 more .*; score these pictures again"):
    statistics.win_rate(draw(0, 6, 4), scores)


@pytest.mark.parametrize("scores", [[], [[]], [1.0, 2.0], [[1.0], [2.0, 3.0]], [["a"]], np.zeros((2, 2, 2))])
def test_scores_of_another_form_are_refused(scores):
  with pytest.raises(ValueError, match=r"^scores: .*expected"):
    statistics.describe(scores)


def test_scores_of_different_pictures_make_no_pairs():
  with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 1\) make no pairs"):
    statistics.win_rate(np.zeros((3, 2)), np.zeros((3, 1)))


def test_the_docstrings_examples_hold():
  found = doctest.testmod(statistics)
  assert found.attempted >= 2 and found.failed == 0
