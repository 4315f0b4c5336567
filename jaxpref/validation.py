"""What a run is told of itself: pictures while it trains; held-out data, and base against aligned, after it."""

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxpref import build, chips, drawing, judging, metrics, report, sharding, step
from jaxpref import config as config_lib
from jaxpref.data import emoji


def held_out_metrics(
  experiment: build.Experiment, mesh: jax.sharding.Mesh, frozen: Any, state: step.State, *, least: int = 512
) -> dict[str, float]:
  """The objective's metrics on held-out batches: means over at least so many rows, those of a short split repeated."""
  assert experiment.objective is not None and experiment.held_out is not None
  loss = experiment.objective.loss
  of_batch = jax.jit(
    sharding.on_mesh(mesh, lambda params, frozen, batch, key: loss(params, {}, frozen, batch, key)[2]),
    compiler_options=chips.compiler_options(),
  )
  batches, total = experiment.held_out(), None
  try:
    for i in range(-(-least // batches.batch_size)):
      batch = sharding.put_batch(mesh, next(batches))
      pairs = of_batch(state.params, frozen, batch, jax.random.key(i))
      total = pairs if total is None else metrics.add(total, pairs)
  finally:
    batches.close()
  assert total is not None
  return metrics.to_scalars({f"validation_{k}": v for k, v in metrics.divide(total).items()})


def _prompts(config: ml_collections.ConfigDict, split: str, count: int) -> list[emoji.Emoji]:
  """`count` emoji of a split, spread evenly over it, and so over animals, food, objects, ..."""
  every = emoji.load_index(config.data.subset, split)
  return [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)]


def _generate(
  config: ml_collections.ConfigDict,
  experiment: build.Experiment,
  mesh: jax.sharding.Mesh,
  weights: Any,
  captions: list[str],
  **kwargs: Any,
) -> np.ndarray:
  assert experiment.model is not None and experiment.tokenize is not None
  e = config.evaluation
  return drawing.generate(
    experiment.model,
    weights,
    experiment.tokenize(captions),
    num_inference_steps=e.num_inference_steps,
    guidance_scale=e.guidance_scale,
    eta=e.eta,
    seed=e.seed,
    mesh=mesh,
    **kwargs,
  )


def draw_samples(
  config: ml_collections.ConfigDict,
  experiment: build.Experiment,
  mesh: jax.sharding.Mesh,
  weights: Any,
  path: pathlib.Path,
) -> np.ndarray:
  """A grid of validation prompts, two seeds each, written and returned."""
  captions = [e.caption for e in _prompts(config, "validation", config.sample.num_prompts)]
  images = _generate(config, experiment, mesh, weights, captions, seeds_per_prompt=2, batch_size=2 * len(captions))
  picture = report.grid(images.swapaxes(0, 1))
  if jax.process_index() == 0:
    report.save_image(path, picture)
  return picture


def compare_with_base(
  config: ml_collections.ConfigDict,
  experiment: build.Experiment,
  mesh: jax.sharding.Mesh,
  frozen: Any,
  state: step.State,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Generates from the base and the aligned model, lets the judge score both, writes table and pictures."""
  assert experiment.judge is not None
  e = config.evaluation
  chosen = _prompts(config, e.split, e.num_prompts)
  captions, classes = [c.caption for c in chosen], [c.class_id for c in chosen]
  models = {}
  if config.reference.mode == "update" and experiment.has_reference:
    models["base"] = frozen  # which has it, for the reference's divergence
  elif experiment.has_reference:  # a reference that never moved still is it
    models["base"] = {**frozen, **state.ref_params}
  elif experiment.read_base is not None:  # pre-training has none
    models["base"] = {**frozen, **sharding.put_tree(mesh, experiment.read_base())}
  models["aligned"] = {**frozen, **state.params}
  images, scores = {}, {}
  for name, weights in models.items():
    images[name] = _generate(
      config,
      experiment,
      mesh,
      weights,
      captions,
      seeds_per_prompt=e.seeds_per_prompt,
      batch_size=e.batch_size,
      progress=f"{name}: {len(captions)} prompts x {e.seeds_per_prompt} seeds" if jax.process_index() == 0 else None,
    )
    scores[name] = judging.score(
      experiment.judge,
      experiment.judge_params,
      images[name],
      classes,
      style=config.data.preferred_style,
      candidates=e.candidates,
      seed=e.seed,
    )
  results = judging.compare(scores.get("base"), scores["aligned"], samples=e.bootstrap_samples, seed=e.seed)
  results["table"] = report.table(results, style=config.data.preferred_style, candidates=e.candidates)
  results["protocol"] = config_lib.to_dict(config)["evaluation"] | {"preferred_style": config.data.preferred_style}
  if jax.process_index() == 0:
    (folder / "table.md").write_text(results["table"] + "\n")
    few = np.linspace(0, len(captions) - 1, min(12, len(captions))).round().astype(int)
    titles = {"base": "before", "aligned": "after"} if "base" in images else {"aligned": ""}
    picture = folder / ("before_after.png" if "base" in images else "samples.png")
    report.picture_table(picture, {titles[k]: v[few] for k, v in images.items()}, [captions[i] for i in few])
    names = ("loss", "implicit_accuracy", "reward", "valid_pairs", "margin", "divergence", "grad_norm")
    report.curves(folder / "curves.png", metrics.read(folder / "metrics.jsonl"), names)
  return results
