"""Asks about the pairs on which a preference model is least sure, which it learns from the votes so far.

The model is Bradley and Terry's over embeddings of the pictures: image_0 is preferred with probability
sigmoid(w . (e_0 - e_1)), with a normal prior on w. It has as many weights as the embedding, so a few hundred votes fit
it in milliseconds, again after every few votes.
"""

import sys
import threading
from collections.abc import Callable, Mapping

import numpy as np

from jaxpref.data import records
from jaxpref.voting import judgements
from jaxpref.voting.ballot import Ballot
from jaxpref.voting.catalog import Catalog

LEAST_VOTES = 20  # before which the order is random
EVERY = 5  # votes between two fits
PRIOR = 1.0  # of the weights, for differences scaled to a mean square of 1
POLL_SECONDS = 0.2
Embed = Callable[[list[np.ndarray]], np.ndarray]


def fit(differences: np.ndarray, label: np.ndarray, *, prior: float = PRIOR, steps: int = 25) -> np.ndarray:
  """Returns f64[D], the most probable weights, by Newton's method.

  Args:
    differences: f[n, D], e_0 - e_1 of judged pairs.
    label: f[n], the share of votes for image_0, in [0, 1].
    prior: the precision of the normal prior, of a logit's weight for differences of a mean square of 1.
    steps: most steps.
  """
  x = np.asarray(differences, np.float64)
  w = np.zeros(x.shape[1])
  for _ in range(steps):
    probability = 1.0 / (1.0 + np.exp(-x @ w))
    gradient = x.T @ (probability - label) + prior * w
    curvature = (x.T * (probability * (1.0 - probability))) @ x + prior * np.eye(len(w))
    step = np.linalg.solve(curvature, gradient)
    w = w - step
    if np.abs(step).max() < 1e-8:
      break
  return w


def reduced(differences: np.ndarray, most: int = 64) -> np.ndarray:
  """Returns f64[N, d]: differences in their d <= most main directions, scaled to a mean square of 1 each row.

  Args:
    differences: f[N, D] of all pairs, NaN in rows that are not known.
  """
  known = np.isfinite(differences).all(axis=1)
  x = np.asarray(differences[known], np.float64)
  _, _, directions = np.linalg.svd(x[: 4 * differences.shape[1] + 1000], full_matrices=False)
  found = np.full((len(differences), min(most, len(directions))), np.nan)
  found[known] = x @ directions[:most].T
  return found / np.sqrt(np.mean(np.sum(found[known] ** 2, axis=1)) or 1.0)


def predict(differences: np.ndarray, labels: Mapping[int, float]) -> np.ndarray | None:
  """Returns f64[N], the probability that image_0 is preferred, NaN where the pictures are not known.

  Args:
    differences: f[N, d] of all pairs.
    labels: by number of the pair.
  Returns:
    None before there are LEAST_VOTES labels.
  """
  judged = [number for number in labels if np.isfinite(differences[number]).all()]
  if len(judged) < LEAST_VOTES:
    return None
  w = fit(differences[judged], np.asarray([labels[number] for number in judged]))
  return 1.0 / (1.0 + np.exp(-(differences @ w)))


def differences_of(
  catalog: Catalog, embed: Embed, *, at_a_time: int = 32, stopped: Callable[[], bool] = lambda: False
) -> np.ndarray:
  """Returns f32[N, D], e_0 - e_1 of all pairs, NaN where a picture cannot be read.

  Args:
    embed: images u8[H, W, 3] -> f32[n, D].
    at_a_time: pairs to embed at a time.
    stopped: whether to leave out the rest.
  """
  found: np.ndarray | None = None
  for start in range(0, len(catalog.keys), at_a_time):
    if stopped():
      break
    numbers, images = [], []
    for number in range(start, min(start + at_a_time, len(catalog.keys))):
      try:
        both = [np.asarray(records.open_image(image)) for image in catalog.read(number).images]
      except (OSError, ValueError, records.UnreadableImage):
        continue
      numbers.append(number)
      images += both
    if not numbers:
      continue
    embedded = np.asarray(embed(images), np.float32).reshape(len(numbers), 2, -1)
    if found is None:
      found = np.full((len(catalog.keys), embedded.shape[-1]), np.nan, np.float32)
    found[numbers] = embedded[:, 0] - embedded[:, 1]
  return np.full((len(catalog.keys), 1), np.nan, np.float32) if found is None else found


class Learner:
  """Fits the model again and again while people vote, in a thread of its own."""

  def __init__(self, ballot: Ballot, embed: Embed):
    """Starts at once.

    Args:
      ballot: whose `probability` it sets.
      embed: images u8[H, W, 3] -> f32[n, D].
    """
    self._ballot = ballot
    self._embed = embed
    self._ended = threading.Event()
    self.thread = threading.Thread(target=self._run, name="active", daemon=True)
    self.thread.start()

  def stop(self) -> None:
    """Ends after the pictures that are being embedded: a thread that computes must not outlive the interpreter."""
    self._ended.set()
    self.thread.join()

  def _run(self) -> None:
    try:
      self._learn()
    except Exception as error:  # whatever it is, voting goes on, at random
      print(f"error: --active has stopped, and pairs come at random: {error}", file=sys.stderr, flush=True)

  def _learn(self) -> None:
    differences = differences_of(self._ballot.catalog, self._embed, stopped=self._ended.is_set)
    if self._ended.is_set():
      return
    differences = reduced(differences)
    known = -EVERY
    while not self._ended.wait(POLL_SECONDS):
      found = self._ballot.judgements()
      if len(found) >= known + EVERY:
        known = len(found)
        labels = judgements.labels(found, "soft")
        self._ballot.probability = predict(differences, {n: v for n, v in labels.items() if v is not None})
