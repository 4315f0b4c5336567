"""Which pair is next: the order, the overlap, repeats, and pairs that a model is unsure of."""

import numpy as np

from jaxpref.voting import schedule

KEYS = [f"pair {i}" for i in range(1000)]


def test_the_order_holds_every_pair_once_and_stays_when_pairs_are_added():
  group = np.arange(1000) % 10
  found = schedule.order(KEYS, group, 0)
  assert sorted(found) == list(range(1000))
  before = schedule.order(KEYS[:500], group[:500], 0)
  of_group = lambda ordered: [i for i in ordered if i % 10 == 3]
  assert of_group(before) == [i for i in of_group(found) if i < 500]
  assert found.tolist() != schedule.order(KEYS, group, 1).tolist()


def test_one_pair_of_each_group_comes_first():
  group = np.arange(1000) % 10
  found = schedule.order(KEYS, group, 0)
  for start in range(0, 1000, 10):
    assert sorted(group[found[start : start + 10]]) == list(range(10))
  assert schedule.order([], np.zeros(0, np.int64), 0).size == 0


def test_groups_of_different_sizes():
  group = np.asarray([0, 0, 0, 1, 2])
  found = schedule.order(KEYS[:5], group, 0)
  assert sorted(group[found[:3]]) == [0, 1, 2] and group[found[3:]].tolist() == [0, 0]


def test_the_overlap_is_a_share_that_depends_on_the_key_alone():
  overlap = schedule.in_overlap(KEYS, 0.2, 0)
  assert 150 < overlap.sum() < 250
  assert schedule.in_overlap(KEYS[100:200], 0.2, 0).tolist() == overlap[100:200].tolist()
  assert not schedule.in_overlap(KEYS, 0.0, 0).any() and schedule.in_overlap(KEYS, 1.0, 0).all()
  assert (schedule.in_overlap(KEYS, 0.4, 0) | ~overlap).all()  # a larger share keeps the pairs of a smaller one


def test_a_pair_is_for_one_voter_unless_it_is_in_the_overlap():
  yes, no = True, False
  mine, others = np.asarray([yes, no, no, no, no]), np.asarray([no, yes, yes, no, no])
  overlap, ready = np.asarray([yes, yes, no, no, no]), np.asarray([yes, yes, yes, yes, no])
  assert schedule.allowed(mine, others, overlap, ready).tolist() == [no, yes, no, yes, no]


def test_one_showing_in_twenty_repeats_an_old_pair():
  judged = list(range(100))
  drawn = [schedule.wants_repeat(np.random.default_rng(i), judged, [5, 6]) for i in range(4000)]
  found = [pair for pair in drawn if pair is not None]
  assert 0.04 < len(found) / 4000 < 0.06
  assert min(found) == 0 and max(found) == 100 - schedule.REPEAT_GAP - 1 and not {5, 6} & set(found)
  assert all(schedule.wants_repeat(np.random.default_rng(i), judged[:10], []) is None for i in range(200))


def test_without_a_model_pairs_come_in_order():
  ordered = np.asarray([3, 1, 0, 2])
  candidates = np.asarray([True, False, True, False])
  assert schedule.choose(np.random.default_rng(0), candidates, ordered) == 0
  assert schedule.choose(np.random.default_rng(0), np.zeros(4, bool), ordered) is None


def test_with_a_model_most_showings_ask_what_it_is_least_sure_of():
  ordered = np.arange(5)
  probability = np.asarray([0.9, 0.51, np.nan, 0.45, 0.5])
  candidates = np.asarray([True, True, True, True, False])
  found = [schedule.choose(np.random.default_rng(i), candidates, ordered, probability) for i in range(1000)]
  assert set(found) == {0, 1} and 0.76 < found.count(1) / 1000 < 0.84
  unknown = np.full(5, np.nan)
  assert {schedule.choose(np.random.default_rng(i), candidates, ordered, unknown) for i in range(50)} == {0}
