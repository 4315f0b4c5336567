"""The model that says which pairs to ask about."""

import time

import numpy as np
import pytest
from scipy import optimize

from jaxpref.voting import active
from tests.voting.made import ballot, make_pairs, vote


def test_the_fit_is_the_minimum_of_the_penalised_likelihood():
  rng = np.random.default_rng(0)
  x, label = rng.normal(size=(60, 4)), rng.random(60)

  def loss(w):
    logits = x @ w
    return np.sum(np.logaddexp(0, logits) - label * logits) + 0.5 * 2.0 * w @ w

  assert np.allclose(active.fit(x, label, prior=2.0), optimize.minimize(loss, np.zeros(4), tol=1e-12).x, atol=1e-5)


def test_reduction_keeps_the_main_directions_and_what_is_unknown():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 40))
  x[7] = np.nan
  found = active.reduced(x, most=8)
  known = np.isfinite(found).all(axis=1)
  assert found.shape == (300, 8) and np.flatnonzero(~known).tolist() == [7]
  assert np.mean(np.sum(found[known] ** 2, axis=1)) == pytest.approx(1.0)
  distance = lambda v: np.linalg.norm(v[known][:50, None] - v[known][None, :50], axis=-1)
  scale = distance(x)[0, 1] / distance(found)[0, 1]
  assert np.allclose(distance(x), distance(found) * scale, rtol=1e-5)


def test_it_learns_a_taste_after_the_first_votes():
  rng = np.random.default_rng(0)
  x = active.reduced(rng.normal(size=(500, 6)))
  taste = rng.normal(size=6)
  label = (x @ taste > 0).astype(float)
  assert active.predict(x, dict(enumerate(label[:19]))) is None
  found = active.predict(x, dict(enumerate(label[:200])))
  assert np.mean((found[200:] > 0.5) == label[200:]) > 0.9


def test_pictures_that_cannot_be_read_are_unknown(tmp_path):
  folder = make_pairs(tmp_path / "pairs", 5)
  made = ballot(folder)
  (folder / "images" / "2_0.png").write_bytes(b"no picture")
  embed = lambda images: np.asarray([[image.mean(), 1.0] for image in images])
  found = active.differences_of(made.catalog, embed, at_a_time=2)
  assert np.isnan(found[2]).all() and found[0].tolist() == [-128.0, 0.0] and found[4].tolist() == [-128.0, 0.0]


def test_the_ballot_asks_what_the_model_is_unsure_of(tmp_path):
  made = ballot(make_pairs(tmp_path / "pairs", 60), repeats=False)
  embed = lambda images: np.asarray([[image.mean() / 255, 1.0] for image in images])
  learner = active.Learner(made, embed)
  vote(made, "Ada", count=25)
  deadline = time.monotonic() + 20
  while made.probability is None and time.monotonic() < deadline:
    time.sleep(0.05)
  learner.stop()
  assert not learner.thread.is_alive()
  assert made.probability is not None and made.probability.shape == (60,) and np.isfinite(made.probability).all()


def test_a_model_that_fails_leaves_the_order_at_random(tmp_path, capsys):
  def broken(images):
    raise RuntimeError("out of memory")

  made = ballot(make_pairs(tmp_path / "pairs", 5))
  learner = active.Learner(made, broken)
  learner.thread.join(20)
  learner.stop()
  assert made.probability is None and vote(made, "Ada")
  assert "--active has stopped, and pairs come at random: out of memory" in capsys.readouterr().err


def test_embedding_stops_when_voting_ends(tmp_path):
  made = ballot(make_pairs(tmp_path / "pairs", 5))
  calls = []
  embed = lambda images: calls.append(1) or np.zeros((len(images), 2))
  active.differences_of(made.catalog, embed, at_a_time=1, stopped=lambda: len(calls) == 2)
  assert len(calls) == 2
