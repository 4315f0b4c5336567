"""The index of a dataset and what is selected by it: by hand, by independent loops, and at a million records."""

import math
import time

import numpy as np
import pytest

from jaxpref.data import index as index_lib
from jaxpref.data.index import Index, StaleIndex, select


def make(label_0, prompt=None, **fields):
  n = len(label_0)
  prompt = np.arange(n) if prompt is None else prompt
  fields.setdefault("num_example_per_prompt", np.ones(n))
  return Index(label_0=label_0, prompt=prompt, **fields)


def random_index(n, prompts, seed=0, **fields):
  rng = np.random.default_rng(seed)
  ids = rng.integers(-(2**63), 2**63 - 1, prompts, dtype=np.int64)
  return make(rng.choice([0.0, 0.5, 1.0], n, p=[0.44, 0.12, 0.44]), ids[rng.integers(0, prompts, n)], **fields)


# ---- Prompts ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_caption_as_clip_reads_it():
  ids = index_lib.prompt_ids(["A red  cat", "a red cat\n", "a blue cat", "Cafe\u0301", "caf\u00e9", ""])
  assert ids.dtype == np.int64
  assert ids[0] == ids[1] != ids[2] and ids[3] == ids[4] and len(set(ids.tolist())) == 4
  # Written down: indexes on disk and held-out prompts depend on it.
  assert index_lib.prompt_ids(["a red cat"])[0] == -3037774535702438454
  assert len(index_lib.prompt_ids([])) == 0


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_share_of_held_out_prompts(share):
  for prompt in (np.arange(50_000), index_lib.prompt_ids(f"caption {i}" for i in range(50_000))):
    held_out = index_lib.in_validation(prompt, share)
    assert abs(held_out.mean() - share) < 5 * math.sqrt(share * (1 - share) / 50_000)
    assert not (held_out & ~index_lib.in_validation(prompt, share + 0.1)).any()  # a larger share holds out more


# ---- Selection -------------------------------------------------------------------------------------------------


def test_ties_are_dropped_kept_or_soft():
  index = make([1.0, 0.5, 0.0])
  dropped, kept, soft = (select(index, ties=ties) for ties in ("drop", "keep", "soft"))
  assert dropped.kept.tolist() == [0, 2] and dropped.label.tolist() == [1, 0]
  for chosen in (kept, soft):  # without scores, a soft label is the label
    assert chosen.kept.tolist() == [0, 1, 2] and chosen.label.tolist() == [1, 0.5, 0]
  assert [values.dtype for values in dropped] == [np.int64, np.float32, np.float32, np.int64]


def test_soft_labels_are_the_softmax_of_the_scores():
  score_0, score_1 = np.array([21.0, 20.0, 22.0]), np.array([20.0, 20.0, 25.0])
  index = make([1.0, 1.0, 0.5], score_0=score_0, score_1=score_1)
  expected = np.exp(score_0) / (np.exp(score_0) + np.exp(score_1))
  np.testing.assert_allclose(select(index, ties="soft").label, expected, rtol=1e-6)
  assert select(index, ties="keep").label.tolist() == [1, 1, 0.5]


def test_min_gap_is_one_of_probabilities():
  # softmax([0.1, 0]) - softmax([0, 0.1]) = tanh(0.05) = 0.04996, of 0.3: 0.1489
  index = make([1.0, 0.0, 1.0], score_0=[0.1, 0.0, 0.0], score_1=[0.0, 0.3, 0.0])
  assert select(index, min_gap=0.1).kept.tolist() == [1]
  assert select(index, min_gap=0.1, ties="keep").label.tolist() == [0.5, 0, 0.5]
  soft = select(index, min_gap=0.1, ties="soft").label
  np.testing.assert_allclose(soft, [0.5, 1 / (1 + math.exp(0.3)), 0.5], rtol=1e-6)
  assert select(index, min_gap=0.04).kept.tolist() == [0, 1]
  assert select(index).kept.tolist() == [0, 1, 2]  # without it people's labels stand


def test_labels_by_score():
  index = make([0.0, 0.0, 1.0], score_0=[2.0, 1.0, 0.0], score_1=[1.0, 1.0, 5.0], has_label=[True, False, True])
  relabelled = index_lib.labels_by_score(index)
  assert relabelled.label_0.tolist() == [1, 0.5, 0] and relabelled.has_label is None
  with pytest.raises(ValueError, match="labels by score needs the scores of all images"):
    index_lib.labels_by_score(make([1.0]))


def test_weights_count_what_is_left():
  index = make([1.0, 0.5, 0.5, 0.0, 1.0], [7, 7, 7, 7, 8], num_example_per_prompt=[4, 4, 4, 4, 1])
  chosen = select(index)
  np.testing.assert_allclose(chosen.weight, [0.5, 0.5, 1.0])
  assert chosen.weight.sum() == 2  # prompts


def test_weights_against_a_loop():
  index = random_index(5_000, 300)
  chosen = select(index, max_per_prompt=6, validation_share=0.2, seed=3)
  counts = {}
  for record in chosen.kept:
    counts[index.prompt[record]] = counts.get(index.prompt[record], 0) + 1
  np.testing.assert_allclose(chosen.weight, [1 / counts[index.prompt[record]] for record in chosen.kept], rtol=1e-6)
  assert max(counts.values()) == 6
  assert chosen.weight.sum() == pytest.approx(len(counts), rel=1e-5)


def test_the_limit_of_a_prompt_draws_at_random_and_takes_as_many_as_there_are():
  index = make(np.ones(100), np.repeat([3, 1, 2], [60, 2, 38]))
  first, again, other = (select(index, max_per_prompt=5, seed=seed) for seed in (0, 0, 1))
  assert [np.sum(index.prompt[first.kept] == p) for p in (1, 2, 3)] == [2, 5, 5]
  assert first.kept.tolist() == again.kept.tolist() != other.kept.tolist()
  assert (np.diff(first.kept) > 0).all()
  drawn = np.concatenate([select(index, max_per_prompt=1, seed=seed).kept for seed in range(200)])
  assert len(np.unique(drawn[drawn < 60])) > 50  # all of them have a chance


def test_no_prompt_is_in_both_parts():
  index = random_index(20_000, 900)
  parts = {part: select(index, validation_share=0.1, part=part, seed=1) for part in index_lib.PARTS}
  train, validation = (set(index.prompt[parts[part].kept].tolist()) for part in index_lib.PARTS)
  assert train and validation and not train & validation
  both = np.sort(np.concatenate([chosen.kept for chosen in parts.values()]))
  assert both.tolist() == select(index).kept.tolist()
  # Neither the seed nor another dataset moves a prompt to the other part.
  assert select(index, validation_share=0.1, seed=2).kept.tolist() == parts["train"].kept.tolist()
  half = select(index.take(np.arange(10_000)), validation_share=0.1, part="validation")
  assert set(index.prompt[half.kept].tolist()) <= validation


def test_a_share_of_training_labels_is_flipped():
  index = random_index(20_000, 900)
  clean = select(index, ties="keep", validation_share=0.1)
  few, more, other = (
    select(index, ties="keep", validation_share=0.1, flip_labels=share, seed=seed)
    for share, seed in ((0.1, 0), (0.3, 0), (0.1, 1))
  )
  decided = clean.label != 0.5
  few_turned, more_turned = few.label != clean.label, more.label != clean.label
  assert abs(few_turned[decided].mean() - 0.1) < 0.01 and abs(more_turned[decided].mean() - 0.3) < 0.015
  assert (few.label[few_turned] == 1 - clean.label[few_turned]).all() and not few_turned[~decided].any()
  assert (more_turned | ~few_turned).all()  # a larger share turns those and more
  assert (other.label != few.label).any()
  held_out = select(index, validation_share=0.1, flip_labels=0.3, part="validation")
  assert held_out.label.tolist() == select(index, validation_share=0.1, part="validation").label.tolist()
  # Which labels are turned does not depend on what else is selected.
  capped = select(index, ties="keep", validation_share=0.1, flip_labels=0.1, max_per_prompt=3)
  places = np.searchsorted(few.kept, capped.kept)
  assert capped.label.tolist() == few.label[places].tolist()


def test_pairs_nobody_judged():
  index = make([1.0, 0.5, 0.5], has_label=[True, True, False])
  assert select(index, ties="keep").kept.tolist() == [0, 1, 2]
  assert select(index, ties="keep", only_labelled=True).kept.tolist() == [0, 1]
  assert select(make([1.0, 0.5]), only_labelled=True, ties="keep").kept.tolist() == [0, 1]


# ---- keep_best -------------------------------------------------------------------------------------------------


def published_keep_best(label, image_0, image_1):
  """What only_on_best of PickScore and SPO says, by dicts: record -> image that takes the place of its winner."""
  better = {}
  for l, a, b in zip(label, image_0, image_1, strict=True):
    if l != 0.5:
      won, lost = (a, b) if l == 1 else (b, a)
      better[lost] = won
  ends = {}
  for image in better:
    seen, end = {image}, better[image]
    while end in better and end not in seen:
      seen.add(end)
      end = better[end]
    ends[image] = None if end in seen else end  # None: in a circle, or leads into one
  result = {}
  for record, (l, a, b) in enumerate(zip(label, image_0, image_1, strict=True)):
    if l != 0.5 and ends.get(a, a) is not None and ends.get(b, b) is not None:
      result[record] = ends[b if l == 1 else a]
  return result


def winning_images(index, records):
  return np.where(index.label_0[records] == 1, index.image_0[records], index.image_1[records])


def test_the_winner_gives_way_to_the_image_that_beat_it():
  # One person's choices: 10 against 11, the better one against 12, that against 13; then a circle 20-21-22; then a tie.
  index = make(
    [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5],
    image_0=[10, 11, 11, 20, 21, 22, 11],
    image_1=[11, 12, 13, 21, 22, 20, 12],
  )
  chosen = select(index, keep_best=True)
  assert chosen.kept.tolist() == [0, 1, 2] and chosen.winner.tolist() == [2, 2, 2]
  assert winning_images(index, chosen.winner).tolist() == [13, 13, 13]
  assert select(index).winner.tolist() == select(index).kept.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_keep_best_against_the_published_rule(seed):
  """Each image loses at most once, as in one person's session, where the published rule is unambiguous."""
  rng = np.random.default_rng(seed)
  losers = np.append(rng.permutation(400)[:300], [400, 401, 402, 403])
  winners = np.append(rng.integers(0, 400, 300), [401, 402, 400, 400])  # a circle, and what leads to it
  label = np.append(rng.choice([0.0, 0.5, 1.0], 300, p=[0.45, 0.1, 0.45]), [0, 1, 0, 1])
  image_0, image_1 = np.where(label == 0, losers, winners), np.where(label == 0, winners, losers)
  index = make(label, image_0=image_0, image_1=image_1)
  chosen = select(index, keep_best=True)
  label[image_0 == image_1] = 0.5  # a tie here; the published rule leaves out all pairs of such an image
  expected = published_keep_best(label, image_0, image_1)
  assert chosen.kept.tolist() == sorted(expected)
  assert 100 < len(expected) < np.sum(label != 0.5)
  assert winning_images(index, chosen.winner).tolist() == [expected[record] for record in chosen.kept]


def test_where_an_image_lost_twice_the_last_time_counts():
  index = make([1.0, 1.0, 1.0], image_0=[1, 2, 3], image_1=[0, 1, 1])
  assert select(index, keep_best=True).winner.tolist() == [2, 1, 2]


def test_a_pair_of_an_image_with_itself_is_a_tie():
  index = make([1.0, 0.0, 1.0], image_0=[1, 2, 3], image_1=[2, 2, 4])
  assert select(index).kept.tolist() == [0, 2]
  assert select(index, ties="keep").label.tolist() == select(index, ties="soft").label.tolist() == [1, 0.5, 1]
  assert select(index, ties="keep", flip_labels=0.99).label[1] == 0.5
  assert select(make([1.0, 0.0], image_0=[1, 2])).kept.tolist() == [0, 1]  # of single images


def test_records_without_a_caption_are_left_out():
  index = make([1.0, 0.0, 0.5], caption_words=[3, 0, 1])
  assert select(index).kept.tolist() == [0] and select(index, ties="keep").kept.tolist() == [0, 2]


def test_a_pair_that_is_there_twice_counts_as_two_of_its_prompt():
  index = make([1.0, 1.0, 0.0], [5, 5, 6], image_0=[1, 1, 3], image_1=[2, 2, 4])
  assert select(index).weight.tolist() == [0.5, 0.5, 1]


def test_a_long_chain():
  n = 1000
  index = make(np.ones(n), image_0=np.arange(1, n + 1), image_1=np.arange(n))
  assert (select(index, keep_best=True).winner == n - 1).all()


# ---- Arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"ties": "skip"}, "ties='skip'.*expected one of drop, keep, soft"),
    ({"part": "test"}, "part='test'.*train, validation"),
    ({"min_gap": 0.1}, "min_gap needs the scores"),
    ({"min_gap": -0.1}, "min_gap=-0.1; expected a number of at least 0 and below 1"),
    ({"flip_labels": 1.0}, "flip_labels=1.0; expected"),
    ({"validation_share": 2}, "validation_share=2; expected"),
    ({"max_per_prompt": -1}, "max_per_prompt=-1"),
    ({"part": "validation"}, "selects nothing"),
    ({"keep_best": True}, "which images are the same"),
    ({"keep_best": True, "ties": "keep"}, "a tie has no best image"),
  ],
)
def test_wrong_arguments_are_answered_by_a_sentence(arguments, message):
  with pytest.raises(ValueError, match=message):
    select(make([1.0, 0.0]), **arguments)


def test_selecting_nothing_is_empty():
  chosen = select(make([0.5, 0.5]), max_per_prompt=2)
  assert [len(values) for values in chosen] == [0, 0, 0, 0]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"label_0": [1.5]}, r"label_0 of record 0 is 1.5; expected 0 to 1"),
    ({"label_0": [math.nan]}, r"label_0 of record 0 is nan"),
    ({"score_0": [1.0]}, "one of score_0 and score_1"),
    ({"prompt": [1, 2]}, r"prompt of an index has shape \[2\], label_0 1 records"),
  ],
)
def test_an_index_is_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    Index(**{"label_0": [1.0], "prompt": [1], "num_example_per_prompt": [1]} | fields)


def test_parts_of_an_index():
  index = make([1.0, 0.0, 0.5], image_0=[1, 2, 3], image_1=[4, 5, 6])
  joined = index_lib.concatenate([index.take([2]), make([1.0], image_0=[7])])
  assert joined.label_0.tolist() == [0.5, 1] and joined.image_0.tolist() == [3, 7] and joined.image_1 is None


# ---- Files -----------------------------------------------------------------------------------------------------


def test_round_trip_and_stale_files(tmp_path):
  index = random_index(100, 10, score_0=np.ones(100), score_1=np.zeros(100), has_label=np.arange(100) % 2 == 0)
  file = tmp_path / "new" / "index-train.npz"
  index_lib.save(index, file, fingerprint="abc")
  assert [path.name for path in file.parent.iterdir()] == [file.name]
  found = index_lib.load(file, num_records=100, fingerprint="abc")
  assert found.arrays().keys() == index.arrays().keys()
  for name, value in index.arrays().items():
    assert found.arrays()[name].dtype == value.dtype
    np.testing.assert_array_equal(found.arrays()[name], value)
  with pytest.raises(StaleIndex, match="of 100 records with fingerprint abc, the dataset has 101"):
    index_lib.load(file, num_records=101, fingerprint="abc")
  with pytest.raises(StaleIndex, match="delete it"):
    index_lib.load(file, num_records=100, fingerprint="abd")


def test_damaged_files_and_pickles_are_refused(tmp_path, monkeypatch):
  index, file = make([1.0, 0.0]), tmp_path / "index.npz"
  index_lib.save(index, file, fingerprint="")
  whole = file.read_bytes()
  for content in (b"", b"no archive", whole[: len(whole) // 2]):
    file.write_bytes(content)
    with pytest.raises(StaleIndex, match="is not a readable index"):
      index_lib.load(file, num_records=2, fingerprint="")
  np.savez(file, format=index_lib.FORMAT, fingerprint="", label_0=np.array([print, 1], dtype=object))
  with pytest.raises(StaleIndex, match="allow_pickle"):
    index_lib.load(file, num_records=2, fingerprint="")
  np.savez(file, format=index_lib.FORMAT, fingerprint="", colour=np.ones(2))
  with pytest.raises(StaleIndex, match="colour"):
    index_lib.load(file, num_records=2, fingerprint="")
  index_lib.save(index, file, fingerprint="")
  monkeypatch.setattr(index_lib, "FORMAT", 2)
  with pytest.raises(StaleIndex, match="of format 1, expected 2"):
    index_lib.load(file, num_records=2, fingerprint="")


def test_an_index_is_read_built_or_built_again(tmp_path, caplog):
  beside, cache = tmp_path / "data" / "i.npz", tmp_path / "cache" / "i.npz"
  built = []

  def get(fingerprint="a", **kwargs):
    def build():
      built.append(fingerprint)
      return make([1.0, 0.0])

    return index_lib.load_or_build([beside, cache], build, num_records=2, fingerprint=fingerprint, **kwargs)

  get(), get()
  assert built == ["a"] and beside.exists() and not cache.exists() and not caplog.text
  get("b")
  assert built == ["a", "b"] and "Making it again" in caplog.text
  get("b", agrees=lambda index: False)
  assert built == ["a", "b", "b"] and "does not agree" in caplog.text
  beside.unlink()
  beside.parent.rmdir()
  beside.parent.write_text("a file, so that no folder can be here")
  get("b"), get("b")
  assert built == ["a", "b", "b", "b"] and cache.exists()


# ---- A million records -----------------------------------------------------------------------------------------


def test_a_million_records(tmp_path):
  """CPU seconds, which other programs do not change much; measured on 2 cores: 0.03 to read, 0.1 to 0.6 to select."""
  n = 1_000_000
  rng = np.random.default_rng(0)
  losers = rng.permutation(n)
  index = random_index(
    n,
    60_000,
    score_0=rng.normal(size=n),
    score_1=rng.normal(size=n),
    image_0=losers,
    image_1=rng.integers(0, n, n),
    has_label=np.ones(n),
    caption_words=np.ones(n),
  )
  assert sum(value.nbytes for value in index.arrays().values()) == 45 * n
  index_lib.save(index, tmp_path / "i.npz", fingerprint="f")
  start = time.process_time()
  index = index_lib.load(tmp_path / "i.npz", num_records=n, fingerprint="f")
  assert time.process_time() - start < 2
  for arguments in (
    {},
    {"ties": "soft", "min_gap": 0.1, "max_per_prompt": 8, "validation_share": 0.01, "flip_labels": 0.1},
    {"keep_best": True, "max_per_prompt": 8},
  ):
    start = time.process_time()
    chosen = select(index, **arguments)
    seconds = time.process_time() - start
    print(f"{arguments}: {seconds:.2f} s, {len(chosen.kept)} records")
    assert len(chosen.kept) > 1000 and seconds < 2
