"""Krippendorff's alpha against published examples and another derivation; agreement with oneself; bias of the sides."""

import itertools

import numpy as np
import pytest

from jaxpref.voting import agreement

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): sections A (two observers, two values: 0.095) and
# C (four observers, five values, missing data: 0.743).
MEG = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
OWEN = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
FOUR = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]


def test_alpha_of_the_published_examples():
  assert agreement.krippendorff_alpha(zip(MEG, OWEN, strict=True)) == pytest.approx(0.095, abs=5e-4)
  units = [[v for v in unit if v != "."] for unit in zip(*(row.split() for row in FOUR), strict=True)]
  assert agreement.krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def by_coincidences(units):
  """Alpha from the matrix of coincidences, pair by pair."""
  values = sorted({v for unit in units for v in unit})
  o = np.zeros((len(values), len(values)))
  for unit in units:
    for a, b in itertools.permutations(unit, 2):
      o[values.index(a), values.index(b)] += 1 / (len(unit) - 1)
  n = o.sum(axis=1)
  observed = o.sum() - np.trace(o)
  expected = sum(n[i] * n[j] for i in range(len(n)) for j in range(len(n)) if i != j) / (n.sum() - 1)
  return 1 - observed / expected


def test_alpha_is_that_of_the_matrix_of_coincidences():
  rng = np.random.default_rng(0)
  for _ in range(20):
    units = [rng.choice(list("abcd"), rng.integers(0, 5)).tolist() for _ in range(rng.integers(5, 40))]
    units += [["a", "b"]]
    assert agreement.krippendorff_alpha(units) == pytest.approx(by_coincidences(units), abs=1e-12)


def test_alpha_of_chance_is_about_zero_and_of_agreement_one():
  rng = np.random.default_rng(1)
  assert abs(agreement.krippendorff_alpha(rng.integers(0, 3, (5000, 2)).tolist())) < 0.03
  assert agreement.krippendorff_alpha([["a", "a", "a"], ["b", "b"]]) == 1.0


@pytest.mark.parametrize("units", [[], [["a"], []], [["a", "a"], ["a", "a"]]])
def test_alpha_is_unknown_without_two_values_that_differ(units):
  assert agreement.krippendorff_alpha(units) is None


def test_agreement_with_oneself_counts_pairs_that_came_again():
  first, again = {1: "tie", 2: "image_0", 3: "image_1"}, {2: "image_0", 3: "image_0", 4: "bad"}
  assert agreement.with_oneself(first, again) == (1, 2)


def test_the_share_of_the_left_side_leaves_out_what_is_not_decided():
  assert agreement.share_of_left(["left", "left", "right", "tie", "skip", "bad"]) == (2, 3)


def test_the_bias_of_a_voter_who_always_says_left_is_taken_out():
  always_left = [(False, "image_0")] * 9 + [(True, "image_1")]
  assert agreement.without_bias(always_left) == 0.5
  assert agreement.without_bias([(False, "image_0")]) is None
  assert agreement.without_bias([(False, "image_0"), (True, "image_0"), (True, "tie")]) == 1.0
