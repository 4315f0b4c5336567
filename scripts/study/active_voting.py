"""Measures what `jaxpref vote --active` gains over asking at random, on simulated voters.

    python -m scripts.study.active_voting --out=docs/results/active_voting.json

Pairs are two random pictures of the embedded emoji, in random styles. A simulated voter has a taste, a
score of each picture: the judge's log-probability of a style, or a property of the pixels. She votes with Bradley and
Terry's noise, so that she agrees with her own taste in a share of the pairs. The model is that of
`jaxpref.voting.active`, over embeddings of tiny-clip, which the tastes do not use. After N votes it says which picture
of 1,000 other pairs is better; the share in which it agrees with the taste is the number. Both ways of asking have the
same pairs, voters and noise; intervals are over voters.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from jaxpref.data import emoji, labels
from jaxpref.evaluation import judging, statistics
from jaxpref.rewards import loading, published
from jaxpref.voting import active, schedule

POOL, HELD_OUT = 2000, 1000
VOTES = (50, 100, 200, 400)
TASTES = ("style", "brightness", "colour")
AGREEMENT = 0.8  # of a voter with the own taste


def pictures() -> np.ndarray:
  """Returns u8[N, H, W, 3]: the core emoji in all styles."""
  ids = [one.class_id for one in emoji.load_index("core")]
  return np.concatenate([emoji.load_tiles(style, class_ids=ids) for style in emoji.STYLES])


def tastes(images: np.ndarray) -> dict[str, np.ndarray]:
  """Returns f64[N] for each of TASTES."""
  judge, params = loading.load_judge("tiny-judge", style="openmoji", num_classes=emoji.num_classes("core"))
  assert judge is not None
  styles, _ = judging.judge_images(judge, params, images)
  pixels = images.astype(np.float64)
  return {
    "style": styles[:, judge.config.styles.index("openmoji")].astype(np.float64),
    "brightness": pixels.mean(axis=(1, 2, 3)),
    "colour": pixels.std(axis=3).mean(axis=(1, 2)),
  }


def vote(difference: np.ndarray, score: np.ndarray, pairs: np.ndarray, *, ask_unsure: bool, seed: int) -> list[float]:
  """Returns the agreement with the taste on held-out pairs after each of VOTES.

  Args:
    difference: f64[POOL + HELD_OUT, d], reduced.
    score: f64[N], the taste.
    pairs: i64[POOL + HELD_OUT, 2] numbers of pictures; the last ones are held out.
    ask_unsure: as --active, else at random.
    seed: of the voter's noise, and of the order.
  """
  first, second = score[pairs[:, 0]], score[pairs[:, 1]]
  temperature = labels.temperature_for(first[:POOL], second[:POOL], agreement=AGREEMENT)
  label = labels.noisy_labels(first, second, np.random.default_rng([seed, 1]), temperature=temperature)
  rng = np.random.default_rng([seed, 2])
  found, better = [], first[POOL:] > second[POOL:]
  ordered = rng.permutation(POOL)
  for known, probability in asked(difference, label[:POOL], VOTES[-1], ordered, rng, ask_unsure=ask_unsure):
    if len(known) in VOTES:
      assert probability is not None
      found.append(float(np.mean((probability[POOL:] > 0.5) == better)))
  return found


def asked(
  difference: np.ndarray,
  label: np.ndarray,
  votes: int,
  ordered: np.ndarray,
  rng: np.random.Generator,
  *,
  ask_unsure: bool,
) -> Iterator[tuple[dict[int, float], np.ndarray | None]]:
  """Asks a simulated voter as the page does; yields whenever the model has learnt from new votes, and at the end.

  Args:
    difference: f64[M, d], reduced.
    label: f[N], N <= M, what the voter says of the pairs that can be asked.
    votes: how many.
    ordered: i64[N], their numbers in the order in which they are asked at random.
    rng: of the choice.
    ask_unsure: as --active, else at random.
  Yields:
    The votes so far by number of the pair, in the order in which they came, and f64[M], what the model says of all
    pairs: the probability that image_0 is preferred; None while there are too few votes.
  """
  candidates = np.ones(len(label), bool)
  known: dict[int, float] = {}
  probability: np.ndarray | None = None
  while len(known) < votes:
    unsure = probability[: len(label)] if ask_unsure and probability is not None else None
    chosen = schedule.choose(rng, candidates, ordered, unsure)
    assert chosen is not None
    candidates[chosen] = False
    known[chosen] = float(label[chosen])
    if len(known) % active.EVERY == 0:
      probability = active.predict(difference, known)
    if len(known) % active.EVERY == 0 or len(known) == votes:
      yield known, probability


def measure(voters: int) -> dict[str, object]:
  """Returns the mean agreement of each way of asking, by taste and number of votes, and the gain with its interval."""
  images = pictures()
  embedded = published.image_embedder("tiny-clip", batch_size=64)(list(images))
  scores = tastes(images)
  results: dict[str, object] = {}
  for name in TASTES:
    runs = np.zeros((voters, 2, len(VOTES)))
    for seed in range(voters):
      pairs = np.random.default_rng([seed, 0]).integers(0, len(images), (POOL + HELD_OUT, 2))
      difference = active.reduced(embedded[pairs[:, 0]] - embedded[pairs[:, 1]])
      for way in (0, 1):
        runs[seed, way] = vote(difference, scores[name], pairs, ask_unsure=bool(way), seed=seed)
    gain = runs[:, 1] - runs[:, 0]
    results[name] = {
      str(votes): {
        "random": float(runs[:, 0, i].mean()),
        "active": float(runs[:, 1, i].mean()),
        "gain": float(gain[:, i].mean()),
        "gain_interval": statistics.interval(gain[:, i]),
      }
      for i, votes in enumerate(VOTES)
    }
  settings = {"voters": voters, "pool": POOL, "held_out": HELD_OUT, "agreement": AGREEMENT, "clip": "tiny-clip"}
  return {"settings": settings, "tastes": results}


def main() -> None:
  """Measures and writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--voters", type=int, default=20)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  found = measure(args.voters)
  args.out.write_text(json.dumps(found, indent=1) + "\n")
  print(json.dumps(found, indent=1))


if __name__ == "__main__":
  main()
