"""Intervals that cover, ties that count half, chance that is chance, and pictures that depend on their seed only."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.evaluation import drawing, judging, statistics
from jaxpref.models.vae import to_uint8
from tests.stub_model import IMAGE_SIZE, StubModel, init


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


# ---------------------------------------------------------------------------------------------
# Statistics


def test_bootstrap_intervals_cover_the_truth():
  """Of 300 samples of 60 skewed values about 95 % of the intervals hold the mean; some miss it."""
  hits = []
  for i in range(300):
    values = np.exp(0.5 * draw(i, 60))
    low, high = statistics.bootstrap_interval(values, samples=400, seed=i)
    assert low < values.mean() < high
    hits.append(low < np.exp(0.125) < high)
  assert 0.88 < np.mean(hits) < 0.985


def test_bootstrap_resamples_prompts_not_images():
  """Four images that always agree are one observation: the interval is that of one image each."""
  one = draw(0, 40, 1)
  single = statistics.win_rate(one, np.zeros((40, 1)), samples=1000, seed=0)
  copies = statistics.win_rate(one.repeat(4, 1), np.zeros((40, 4)), samples=1000, seed=0)
  assert single == copies
  low, high = single["win_rate_interval"]
  assert high - low > 0.2


def test_win_rate_counts_ties_half():
  new = np.array([[1.0, 2.0], [3.0, 3.0], [0.0, 5.0], [1.0, 1.0]])
  old = np.array([[1.0, 1.0], [4.0, 3.0], [1.0, 4.0], [1.0, 1.0]])
  found = statistics.win_rate(new, old, samples=100, seed=0)
  assert found["win_rate"] == (0.5 + 1 + 0 + 0.5 + 0 + 1 + 0.5 + 0.5) / 8
  assert statistics.win_rate(new, new, samples=100, seed=0)["win_rate_interval"] == (0.5, 0.5)
  other = statistics.win_rate(old, new, samples=100, seed=0)
  assert found["win_rate"] + other["win_rate"] == 1.0


def test_caption_accuracy_of_random_logits_is_chance():
  ids = np.random.default_rng(1).integers(0, 50, 250)
  right = judging.caption_accuracy(draw(0, 250, 4, 50), ids, candidates=10, seed=0)
  assert right.shape == (250, 4)
  assert abs(right.mean() - 0.1) < 4 * (0.1 * 0.9 / 1000) ** 0.5


def test_caption_accuracy_of_the_truth_is_one_and_of_no_opinion_zero():
  ids = np.arange(30) % 7
  truth = np.broadcast_to(np.eye(7)[ids][:, None], (30, 3, 7))
  assert judging.caption_accuracy(truth, ids, candidates=5, seed=0).min() == 1
  assert judging.caption_accuracy(np.zeros((30, 3, 7)), ids, candidates=5, seed=0).max() == 0


def test_base_and_aligned_are_given_the_same_candidates():
  logits, ids = draw(0, 50, 2, 20), np.arange(50) % 20
  one, other = (judging.caption_accuracy(logits, ids, candidates=8, seed=3) for _ in range(2))
  np.testing.assert_array_equal(one, other)


class Judge:
  """Style and caption of a picture that is one colour: red is the style, green the caption."""

  config = types.SimpleNamespace(styles=("flat", "shaded", "outlined"))

  def apply(self, variables, images):
    del variables
    red, green = (jnp.round((images[:, 2, 2, c] + 1) * 127.5).astype(jnp.int32) for c in (0, 1))
    return 4.0 * jax.nn.one_hot(red, 3), jax.nn.one_hot(green, 8)


def pictures(styles, captions):
  """u8[P, S, 4, 4, 3]."""
  colour = np.stack([styles, captions, np.zeros_like(styles)], axis=-1).astype(np.uint8)
  return np.broadcast_to(colour[:, :, None, None], (*styles.shape, 4, 4, 3))


def test_scores_and_table():
  ids = np.array([3, 5, 7])
  base_styles, styles = np.array([[1, 1], [0, 2], [0, 0]]), np.array([[1, 1], [1, 0], [1, 2]])
  captions = np.array([[3, 3], [5, 0], [7, 7]])
  scores = [
    judging.score(Judge(), {}, pictures(s, c), ids, style="shaded", candidates=4, seed=0)
    for s, c in ((base_styles, captions), (styles, np.array([[3, 3], [0, 0], [7, 7]])))
  ]
  np.testing.assert_array_equal(scores[1]["preferred"], styles == 1)
  np.testing.assert_array_equal(scores[0]["correct"], captions == ids[:, None])
  logs = np.where(styles == 1, 4.0, 0.0) - np.log(np.exp(4.0) + 2)
  np.testing.assert_allclose(scores[1]["style_log_prob"], logs, rtol=1e-5)

  results = judging.compare(*scores, samples=200, seed=0)
  assert results["base"]["preferred_share"]["mean"] == pytest.approx(2 / 6)
  assert results["aligned"]["preferred_share"]["mean"] == pytest.approx(4 / 6)
  # Two pairs better, none worse, four equal.
  assert results["win_rate"] == pytest.approx((2 + 4 * 0.5) / 6)
  assert results["caption_accuracy_change"] == pytest.approx(-1 / 6)
  table = judging.table(results, style="shaded", candidates=4)
  assert "share of shaded" in table and "66.7%" in table and "chance 25.0%" in table
  base_row, row = ([c.strip() for c in line.split("|")] for line in table.splitlines()[2:])
  assert row[2].endswith("↑ +33.3") and row[4].endswith("↓ -16.7") and not base_row[2].endswith("3")
  words = judging.in_words(results, style="shaded")
  assert "draws 67 in the preferred style (shaded), the base model 33;" in words
  assert "closer to that style in 67;" in words and "recognises the prompt in 67, before in 83." in words
  same = judging.table(judging.compare(scores[0], scores[0], samples=9, seed=0), style="shaded", candidates=4)
  assert same.splitlines()[3].count(" =") == 2 and "↑" not in same
  alone = judging.compare(None, scores[1], samples=200, seed=0)
  assert "win_rate" not in alone and len(judging.table(alone, style="x", candidates=4).split("\n")) == 3


def test_styles_named_and_told_apart():
  said = np.log([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
  found = judging.style_accuracy(said, np.array([0, 0, 1, 2]), ("flat", "shaded", "outlined"))
  assert (found["flat_named"], found["shaded_named"], found["outlined_named"]) == (0.5, 1, 1)
  assert (found["flat_told"], found["shaded_told"], found["outlined_told"]) == (0.75, 0.75, 1)
  assert found["pictures"] == 4


def test_one_prompt_has_no_intervals():
  scores = judging.score(
    Judge(), {}, pictures(np.array([[1, 0]]), np.array([[3, 3]])), [3], style="shaded", candidates=4, seed=0
  )
  table = judging.table(judging.compare(scores, scores, samples=200, seed=0), style="shaded", candidates=4)
  assert "| aligned | 50.0% = | 50.0% | 100.0% = |" in table


def test_a_style_that_the_judge_does_not_know_is_named():
  with pytest.raises(ValueError, match="knows the styles flat, shaded, outlined, not 'noto'"):
    judging.score(Judge(), {}, pictures(np.zeros((1, 1)), np.zeros((1, 1))), [0], style="noto", candidates=2, seed=0)


# ---------------------------------------------------------------------------------------------
# Pictures

IDS = np.random.default_rng(0).integers(1, 32, (5, 5)).astype(np.int32)


def generate(*, batch_size, eta=0.0, seed=3, scale=1.0):
  weights = init()
  weights["unet"] = jax.tree.map(lambda k: scale * k, weights["unet"])
  return drawing.generate(
    StubModel(),
    weights,
    IDS,
    seeds_per_prompt=3,
    num_inference_steps=4,
    guidance_scale=2.0,
    eta=eta,
    seed=seed,
    batch_size=batch_size,
  )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pictures_do_not_depend_on_the_batch_size(eta):
  """Nor on what fills the last batch: 15 pictures in batches of 4 and of 15."""
  one, other = (generate(batch_size=n, eta=eta) for n in (4, 15))
  assert one.shape == (5, 3, IMAGE_SIZE, IMAGE_SIZE, 3) and one.dtype == np.uint8
  assert np.abs(one.astype(int) - other).max() <= 1
  flat = one.reshape(15, -1).astype(int)
  distances = np.abs(flat[:, None] - flat[None]).mean(-1) + 1e3 * np.eye(15)
  assert distances.min() > 1  # every prompt and every seed its own picture


def test_pictures_follow_seed_and_weights():
  one, again, other = (generate(batch_size=15, seed=s) for s in (3, 3, 4))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one.astype(int) - other).mean() > 1
  # From the same noise: weights that are almost the same give almost the same pictures.
  near = generate(batch_size=15, scale=1.001)
  assert np.abs(one.astype(int) - near).mean() < 0.5


def test_pixels_are_rounded_and_clipped():
  values = jnp.asarray([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0])
  assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 255]
