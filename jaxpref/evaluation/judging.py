"""Asks an independent judge about the pictures of an emoji model, and of the model it started from."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.evaluation.statistics import bootstrap_interval, win_rate
from jaxpref.models.preference import Judge, ask_judge
from jaxpref.recipes.messages import listed


@functools.partial(jax.jit, static_argnums=0)
def _apply(judge: Judge, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  return ask_judge(judge, params, images.astype(jnp.float32) / 127.5 - 1.0)


def judge_images(
  judge: Judge, params: Any, images: np.ndarray, *, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
  """Returns log-probabilities of styles f32[N, S] and logits of captions f32[N, C] for u8[N, H, W, 3]."""
  parts = []
  batch_size = min(batch_size, len(images))
  for start in range(0, len(images), batch_size):
    rows = images[start : start + batch_size]
    out = _apply(judge, params, np.resize(rows, (batch_size, *rows.shape[1:])))
    parts.append([np.asarray(o)[: len(rows)] for o in out])
  style, classes = (np.concatenate(p) for p in zip(*parts, strict=True))
  return style, classes


def caption_accuracy(class_logits: np.ndarray, class_ids: Sequence[int], *, candidates: int, seed: int) -> np.ndarray:
  """Returns f32[P, S], 1 where the judge picks the true caption among `candidates`, the others drawn at random.

  Args:
    class_logits: f32[P, S, C].
    class_ids: the true class of each prompt.
  """
  rng = np.random.default_rng(seed)
  prompts, seeds, classes = class_logits.shape
  right = np.zeros((prompts, seeds), np.float32)
  for p, true in enumerate(class_ids):
    for s in range(seeds):
      others = rng.choice(np.delete(np.arange(classes), true), candidates - 1, replace=False)
      right[p, s] = class_logits[p, s, true] > class_logits[p, s, others].max()
  return right


def style_accuracy(log_probs: np.ndarray, style: np.ndarray, names: Sequence[str]) -> dict[str, float]:
  """Returns how well the judge tells styles apart in pictures of known style.

  Args:
    log_probs: f32[N, S].
    style: i32[N], the true styles.
    names: names of the S styles.

  Returns:
    For each style NAME: `NAME_named`, the share of its pictures that get its name, and `NAME_told`, the share of all
    pictures that are correctly assigned to it or not; and the number of `pictures`.
  """
  said = np.argmax(log_probs, axis=1)
  found: dict[str, float] = {}
  for i, name in enumerate(names):
    found[f"{name}_named"] = float(np.mean(said[style == i] == i))
    found[f"{name}_told"] = float(np.mean((said == i) == (style == i)))
  return found | {"pictures": len(style)}


def score(
  judge: Judge, params: Any, images: np.ndarray, class_ids: Sequence[int], *, style: str, candidates: int, seed: int
) -> dict[str, np.ndarray]:
  """Returns the judge's scores of u8[P, S, H, W, 3], each f32[P, S].

  `style_log_prob` is that of the preferred style, `preferred` is 1 where that style is the most likely one, `correct`
  is 1 where the caption is recognised among the candidates.
  """
  if style not in judge.config.styles:
    raise ValueError(f"the judge knows the styles {listed(judge.config.styles)}, not {style!r}.")
  prompts, seeds = images.shape[:2]
  column = judge.config.styles.index(style)
  styles, classes = judge_images(judge, params, images.reshape(-1, *images.shape[2:]))
  return {
    "style_log_prob": styles[:, column].reshape(prompts, seeds),
    "preferred": (np.argmax(styles, axis=1) == column).astype(np.float32).reshape(prompts, seeds),
    "correct": caption_accuracy(classes.reshape(prompts, seeds, -1), class_ids, candidates=candidates, seed=seed),
  }


def compare(
  base: Mapping[str, np.ndarray] | None, aligned: Mapping[str, np.ndarray], *, samples: int, seed: int
) -> dict[str, Any]:
  """Returns the table's numbers from the scores of both models, or of one; a single prompt has no intervals."""

  def interval(values: np.ndarray) -> tuple[float, float] | None:
    return bootstrap_interval(values, samples=samples, seed=seed) if len(values) > 1 else None

  def one(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
      name: {
        "mean": float(scores[key].mean()),
        "interval": interval(scores[key].mean(axis=1)),
      }
      for name, key in (("preferred_share", "preferred"), ("caption_accuracy", "correct"))
    }

  results: dict[str, Any] = {"aligned": one(aligned)}
  if base is not None:
    results["base"] = one(base)
    results |= win_rate(aligned["style_log_prob"], base["style_log_prob"], samples=samples, seed=seed)
    change = aligned["correct"].mean(axis=1) - base["correct"].mean(axis=1)
    results["caption_accuracy_change"] = float(change.mean())
    results["caption_accuracy_change_interval"] = interval(change)
  return results


def table(results: Mapping[str, Any], *, style: str, candidates: int) -> str:
  """Returns the results of `judging.compare` as a Markdown table, with arrows for changes in points.

  Brackets hold 95 % intervals, by bootstrap over prompts; a single prompt has none.
  """

  def number(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1%}" if interval is None else f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

  def cell(name: str, model: str) -> str:
    value = results[model][name]
    arrow = ""
    if model == "aligned" and "base" in results:
      points = 100 * (value["mean"] - results["base"][name]["mean"])
      arrow = f" {'↑' if points > 0 else '↓'} {points:+.1f}" if round(points, 1) else " ="
    return number(value["mean"], value["interval"]) + arrow

  lines = [
    f"| | share of {style} | win rate against base "
    f"| caption accuracy (1 of {candidates}; chance {1 / candidates:.1%}) |",
    "|---|---|---|---|",
  ]
  if "base" in results:
    lines.append(f"| base | {cell('preferred_share', 'base')} | | {cell('caption_accuracy', 'base')} |")
    wins = number(results["win_rate"], results["win_rate_interval"])
  else:
    wins = ""
  name = "aligned" if "base" in results else "model"
  lines.append(f"| {name} | {cell('preferred_share', 'aligned')} | {wins} | {cell('caption_accuracy', 'aligned')} |")
  return "\n".join(lines)


def in_words(results: Mapping[str, Any], *, style: str) -> str:
  """Returns a sentence on the results of `judging.compare` with a base model."""
  of_100 = {
    f"{model}_{name}": f"{100 * results[model][name]['mean']:.0f}"
    for model in ("base", "aligned")
    for name in ("preferred_share", "caption_accuracy")
  }
  return (
    f"Of 100 pictures the aligned model draws {of_100['aligned_preferred_share']} in the preferred style ({style}), "
    f"the base model {of_100['base_preferred_share']}; from the same prompt and noise the aligned model's picture is "
    f"the one closer to that style in {100 * results['win_rate']:.0f}; and the judge recognises the prompt in "
    f"{of_100['aligned_caption_accuracy']}, before in {of_100['base_caption_accuracy']}."
  )
