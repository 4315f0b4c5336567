"""Turns scores of pictures into labelled pairs: which pairs there are, which are kept, and their labels.

All functions are pure, in numpy. Scores are logits: by Bradley and Terry's model image_0 is preferred with probability
sigmoid(score_0 - score_1).
"""

import itertools

import numpy as np

KINDS = ("hard", "soft")
PAIRINGS = ("best_worst", "all")


def pairs_of_prompts(prompts: int, pictures: int, *, models: int = 1, same: bool = False) -> np.ndarray:
  """Returns the pairs that the pictures of each prompt can make.

  Args:
    prompts: P.
    pictures: K, the number that each model draws for a prompt.
    models: 1, or 2: a pair then has a picture of each.
    same: with two models, pairs only the i-th pictures.
  Returns:
    i64[P, T, 2] numbers of pictures, counted by prompt, then model, then picture. T = K (K - 1) / 2 with one model,
    K^2 with two, and K with `same`.

  >>> pairs_of_prompts(2, 2).tolist()
  [[[0, 1]], [[2, 3]]]
  >>> pairs_of_prompts(1, 2, models=2, same=True).tolist()
  [[[0, 2], [1, 3]]]
  """
  if models == 1:
    of_one = list(itertools.combinations(range(pictures), 2))
  else:
    both = itertools.product(range(pictures), repeat=2)
    of_one = [(i, pictures + j) for i, j in both if i == j or not same]
  template = np.asarray(of_one, np.int64).reshape(-1, 2)
  return np.arange(prompts)[:, None, None] * (models * pictures) + template[None]


def widest(pairs: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """Returns for each prompt the pair whose scores differ most, best and worst picture; the first of equals.

  Args:
    pairs: i64[P, T, 2], as `pairs_of_prompts` returns them.
    scores: f64[N] of all pictures.
  Returns:
    i64[P, 1, 2].
  """
  gap = np.abs(scores[pairs[..., 0]] - scores[pairs[..., 1]])
  return np.take_along_axis(pairs, np.argmax(gap, axis=1)[:, None, None], axis=1)


def preference(score_0: np.ndarray, score_1: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
  """Returns f64[N], the probability that image_0 is preferred: sigmoid((score_0 - score_1) / temperature).

  Temperature 0 is a rater without noise: 1, 0, or 1/2 at equal scores.

  >>> preference(np.array([1.0, 1.0]), np.array([1.0, 0.0])).round(4).tolist()
  [0.5, 0.7311]
  """
  gap = np.asarray(score_0, np.float64) - np.asarray(score_1, np.float64)
  if temperature == 0.0:
    return (1.0 + np.sign(gap)) / 2.0
  return (1.0 + np.tanh(gap / (2.0 * temperature))) / 2.0


def label_pairs(score_0: np.ndarray, score_1: np.ndarray, *, kind: str = "hard", min_gap: float = 0.0) -> np.ndarray:
  """Returns label_0 of pairs from their scores.

  Args:
    score_0, score_1: f64[N], in logits.
    kind: "hard": 1 if image_0 has the higher score, 0 if image_1 has, 0.5 for equal scores. "soft": the probability
      that image_0 is preferred (`preference`).
    min_gap: pairs with |p_0 - p_1| <= min_gap are ties, where p are these probabilities; see `config.data.min_gap`.
  Returns:
    f32[N].
  """
  if kind not in KINDS or not 0.0 <= min_gap < 1.0:
    raise ValueError(f"kind={kind!r}, min_gap={min_gap}; expected one of {', '.join(KINDS)}, and a gap in [0, 1).")
  probability = preference(score_0, score_1)
  said = probability if kind == "soft" else preference(score_0, score_1, temperature=0.0)
  close = np.abs(2.0 * probability - 1.0) <= min_gap
  return np.where(close, 0.5, said).astype(np.float32)


# ---- A simulated rater -------------------------------------------------------------------------------------------


def noisy_labels(
  score_0: np.ndarray, score_1: np.ndarray, rng: np.random.Generator, *, temperature: float
) -> np.ndarray:
  """Draws label_0 in {0, 1} as a noisy rater with these scores in mind would give it (Bradley and Terry's model).

  A rater who is right in 70 % of the pairs:

  >>> rng = np.random.default_rng(0)
  >>> score_0, score_1 = rng.normal(size=(2, 20000))
  >>> temperature = temperature_for(score_0, score_1, agreement=0.7)
  >>> label_0 = noisy_labels(score_0, score_1, rng, temperature=temperature)
  >>> round(float(np.mean((label_0 == 1) == (score_0 > score_1))), 2)
  0.7

  Args:
    score_0, score_1: f64[N], on any scale.
    rng: numpy's generator; N numbers are drawn.
    temperature: see `preference`; 0 for no noise.
  Returns:
    f32[N]; for equal scores either label with probability 1/2.
  """
  probability = preference(score_0, score_1, temperature=temperature)
  return (rng.random(len(probability)) < probability).astype(np.float32)


def temperature_for(score_0: np.ndarray, score_1: np.ndarray, *, agreement: float) -> float:
  """Returns the temperature at which `noisy_labels` agrees with the scores in a given share of pairs, in expectation.

  Pairs of equal scores do not count.

  Args:
    score_0, score_1: f64[N].
    agreement: mean probability of the image with the higher score, in (0.5, 1]; 1 gives 0.

  Raises:
    ValueError: agreement is out of range, or all scores are equal.
  """
  gap = np.abs(np.asarray(score_0, np.float64) - np.asarray(score_1, np.float64))
  gap = gap[gap > 0.0]
  if not 0.5 < agreement <= 1.0 or not gap.size:
    raise ValueError(f"agreement={agreement} over {gap.size} pairs of different scores; expected one in (0.5, 1].")
  if agreement == 1.0:
    return 0.0
  expected = lambda temperature: float(np.mean(preference(gap, np.zeros_like(gap), temperature=temperature)))
  low, high = 0.0, float(gap.max())
  while expected(high) > agreement:
    low, high = high, 2.0 * high
  for _ in range(100):  # bisection, to the last digit
    middle = (low + high) / 2.0
    low, high = (middle, high) if expected(middle) > agreement else (low, middle)
  return high
