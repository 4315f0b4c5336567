"""Choices become verdicts about images, and verdicts labels."""

import pytest

from jaxpref.voting import choices, judgements
from jaxpref.voting.judgements import Judgement


@pytest.mark.parametrize(
  ("choice", "swapped", "said"),
  [
    ("left", False, "image_0"),
    ("right", False, "image_1"),
    ("left", True, "image_1"),
    ("right", True, "image_0"),
    ("tie", True, "tie"),
    ("bad", False, "bad"),
    ("skip", False, None),
  ],
)
def test_a_choice_of_a_side_is_a_verdict_about_an_image(choice, swapped, said):
  assert choices.verdict(choice, swapped) == said


def said(pair, verdict, voter=1, repeat=False):
  return Judgement(voter, pair, verdict, "left", False, repeat, 0.0)


FOUND = [
  *(said(1, "image_0", 1), said(1, "image_0", 2), said(1, "image_1", 3)),
  *(said(2, "image_0", 1), said(2, "image_1", 2)),
  *(said(3, "bad", 1), said(3, "bad", 2), said(3, "image_0", 3)),
  *(said(4, "bad", 1), said(4, "image_1", 2)),
  said(5, None, 1),
  *(said(6, "tie", 2), said(6, "image_0", 2, repeat=True)),
]


def test_labels_of_the_majority_are_hard_and_a_draw_is_a_tie():
  assert judgements.labels(FOUND, "majority") == {1: 1.0, 2: 0.5, 3: None, 4: 0.0, 6: 0.5}


def test_soft_labels_are_shares():
  assert judgements.labels(FOUND, "soft") == {1: pytest.approx(2 / 3), 2: 0.5, 3: None, 4: 0.0, 6: 0.5}


def test_labels_of_one_voter():
  assert judgements.labels(FOUND, "voter", 1) == {1: 1.0, 2: 1.0, 3: None, 4: None}
  with pytest.raises(ValueError, match="expected one of majority, soft, voter"):
    judgements.labels(FOUND, "mean")


def test_skipped_and_repeated_pairs_make_no_verdict():
  assert judgements.by_pair(FOUND)[6] == ["tie"] and 5 not in judgements.by_pair(FOUND)
