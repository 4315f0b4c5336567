"""Measures a run: pictures while it trains; held-out data, and base against aligned, after it."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import config as config_lib
from jaxpref.config import Config
from jaxpref.data import emoji
from jaxpref.devices import chips, sharding
from jaxpref.evaluation import drawing, judging, pictures
from jaxpref.models.vae import to_float
from jaxpref.objectives import sums
from jaxpref.objectives.base import Weights
from jaxpref.rewards.base import LATENTS, Scores
from jaxpref.training import build, host, metrics, run_page, step

LOOK_COLUMNS = 16


def held_out_metrics(
  experiment: build.Experiment, mesh: jax.sharding.Mesh, frozen: Any, state: step.State, *, least: int = 512
) -> dict[str, float]:
  """Returns the objective's metrics on held-out batches: means over at least `least` rows, repeating a short split."""
  assert experiment.held_out is not None
  objective = experiment.objective
  of_batch = jax.jit(
    sharding.on_mesh(
      mesh, lambda params, frozen, batch, key: objective.loss(Weights.of(params, {}, frozen), batch, key)[2]
    ),
    compiler_options=chips.compiler_options(),
  )
  batches, total = experiment.held_out(), None
  try:
    for i in range(-(-least // batches.batch_size)):
      batch = sharding.put_batch(mesh, next(batches))
      pairs = of_batch(state.params, frozen, batch, jax.random.key(i))
      total = pairs if total is None else sums.add(total, pairs)
  finally:
    batches.close()
  assert total is not None
  return metrics.to_scalars({f"validation_{k}": v for k, v in sums.divide(total).items()})


def prompts(config: Config, split: str, count: int) -> list[emoji.Emoji]:
  """Returns `count` emoji of a split, spread evenly over it, and so over animals, food, objects, ..."""
  every = emoji.load_index(config.data.subset, split)
  return [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)]


class Drawer:
  """Draws prompts with the run's model and the evaluation's settings: one program, compiled once for the whole run."""

  def __init__(self, config: Config, experiment: build.Experiment, mesh: jax.sharding.Mesh):
    assert experiment.model is not None and experiment.tokenize is not None
    e = config.evaluation
    self.mesh = mesh
    self.batch_size = e.batch_size
    self.tokenize = experiment.tokenize
    self._sample = drawing.make_sampler(
      experiment.model,
      num_inference_steps=e.num_inference_steps,
      guidance_scale=e.guidance_scale,
      eta=e.eta,
      seed=e.seed,
      mesh=mesh,
    )
    self._reward = experiment.reward
    if experiment.reward is not None:
      reward, model = experiment.reward, experiment.model

      def score(w: Any, batch: Any, images: jax.Array) -> Scores:
        latents = model.encode_images(w, images, jax.random.key(e.seed)) if LATENTS in reward.needs else None
        return reward.score_pictures(w, batch, to_float(images), latents)

      self._score = jax.jit(
        sharding.on_mesh(mesh, score),
        out_shardings=sharding.replicated(mesh),
        compiler_options=chips.compiler_options(),
      )

  def draw(
    self, weights: Any, captions: list[str], *, seeds_per_prompt: int, progress: str | None = None
  ) -> np.ndarray:
    """Draws S pictures of each caption, u8[P, S, H, W, 3]; always from the same noise."""
    parts = drawing.draw_by(
      self._sample,
      weights,
      self.tokenize(captions),
      seeds_per_prompt=seeds_per_prompt,
      batch_size=min(self.batch_size, len(captions) * seeds_per_prompt),
      progress=progress if jax.process_index() == 0 else None,
      mesh=self.mesh,
    )
    return drawing.together(parts, seeds_per_prompt)

  def reward(self, weights: Any, captions: list[str], images: np.ndarray) -> Scores | None:
    """Scores u8[P, S, H, W, 3] as f32[P * S] by the rewards that are trained on; None if there are none."""
    if self._reward is None:
      return None
    captions = [c for c in captions for _ in range(images.shape[1])]
    fields = {"input_ids": self.tokenize, **self._reward.tokenizers}
    batch = {field: tokenize(captions) for field, tokenize in fields.items()}
    flat = images.reshape(-1, *images.shape[2:])
    size = min(self.batch_size, len(flat))
    found = []
    for start in range(0, len(flat), size):
      rows = np.resize(np.arange(start, min(start + size, len(flat))), size)  # one shape, so one compilation
      scores = self._score(weights, {field: ids[rows] for field, ids in batch.items()}, flat[rows])
      found.append(jax.tree.map(np.asarray, scores))
    in_graph = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(flat)], *found)
    own = range(jax.process_index(), len(flat), jax.process_count())
    on_host = host.score(self._reward.host, {i: flat[i] for i in own}, captions)
    return jax.tree.map(np.asarray, self._reward.summed(jax.tree.map(jnp.asarray, on_host), in_graph))


def _judge(
  config: Config, experiment: build.Experiment, images: np.ndarray, chosen: Sequence[emoji.Emoji]
) -> dict[str, np.ndarray]:
  """Returns the judge's scores of pictures u8[P, S, H, W, 3], see `judging.score`."""
  assert experiment.judge is not None
  return judging.score(
    experiment.judge,
    experiment.judge_params,
    images,
    [c.class_id for c in chosen],
    style=config.data.preferred_style,
    candidates=config.evaluation.candidates,
    seed=config.evaluation.seed,
  )


def look(
  config: Config,
  experiment: build.Experiment,
  drawer: Drawer,
  weights: Any,
  path: pathlib.Path,
) -> tuple[np.ndarray, dict[str, float]]:
  """Draws the same validation prompts from the same noise while a model trains, and measures the pictures.

  Args:
    path: PNG file to write with all pictures, prompt by prompt, `LOOK_COLUMNS` in a row.
  Returns:
    The picture u8[H, W, 3], and means over all pictures: `validation_reward`, the score of the reward that is trained
    on, if there is one; with a judge `validation_preferred_share` and `validation_caption_accuracy`.
  """
  chosen = prompts(config, "validation", config.sample.num_prompts)
  captions = [c.caption for c in chosen]
  images = drawer.draw(weights, captions, seeds_per_prompt=config.sample.seeds_per_prompt)
  means = {}
  if (scores := drawer.reward(weights, captions, images)) is not None:
    means["validation_reward"] = float(scores.total.mean())
    means |= {f"validation_reward_{name}": float(part.mean()) for name, part in scores.parts.items()}
  if experiment.judge is not None:
    judged = _judge(config, experiment, images, chosen)
    means["validation_preferred_share"] = float(judged["preferred"].mean())
    means["validation_caption_accuracy"] = float(judged["correct"].mean())
  flat = images.reshape(-1, *images.shape[2:])
  blank = np.full((-len(flat) % LOOK_COLUMNS, *flat.shape[1:]), 255, np.uint8)
  rows = np.concatenate([flat, blank]).reshape(-1, LOOK_COLUMNS, *flat.shape[1:])
  picture = pictures.grid(rows, scale=max(1, 64 // flat.shape[1]))
  if jax.process_index() == 0:
    pictures.save_image(path, picture)
  return picture, means


def compare_with_base(
  config: Config,
  experiment: build.Experiment,
  drawer: Drawer,
  frozen: Any,
  state: step.State,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Generates from the base and the aligned model, lets the judge score both, writes table and pictures."""
  e = config.evaluation
  chosen = prompts(config, e.split, e.num_prompts)
  captions = [c.caption for c in chosen]
  models = {}
  if config.reference.mode == "update" and experiment.has_reference:
    models["base"] = frozen  # it has the base, for the reference's divergence
  elif experiment.has_reference:  # a reference that never moved is the base
    models["base"] = {**frozen, **state.ref_params}
  elif experiment.read_base is not None:  # pre-training has none
    models["base"] = {**frozen, **sharding.put_tree(drawer.mesh, experiment.read_base())}
  models["aligned"] = {**frozen, **state.params}
  images, scores = {}, {}
  for name, weights in models.items():
    progress = f"{name}: {len(captions)} prompts x {e.seeds_per_prompt} seeds"
    images[name] = drawer.draw(weights, captions, seeds_per_prompt=e.seeds_per_prompt, progress=progress)
    scores[name] = _judge(config, experiment, images[name], chosen)
  results = judging.compare(scores.get("base"), scores["aligned"], samples=e.bootstrap_samples, seed=e.seed)
  results["table"] = judging.table(results, style=config.data.preferred_style, candidates=e.candidates)
  results["protocol"] = config_lib.to_dict(config)["evaluation"] | {"preferred_style": config.data.preferred_style}
  if "base" in results:
    results["in_words"] = judging.in_words(results, style=config.data.preferred_style)
  if jax.process_index() == 0:
    said = [results[name] for name in ("table", "in_words") if name in results]
    (folder / "table.md").write_text("\n\n".join(said) + "\n")
    few = np.linspace(0, len(captions) - 1, min(12, len(captions))).round().astype(int)
    titles = {"base": "before", "aligned": "after"} if "base" in images else {"aligned": ""}
    picture = folder / ("before_after.png" if "base" in images else "samples.png")
    pictures.picture_table(picture, {titles[k]: v[few] for k, v in images.items()}, [captions[i] for i in few])
    try:
      pictures.curves(folder / "curves.png", metrics.read(folder / "metrics.jsonl"), run_page.CURVES)
    except ImportError as error:  # pictures.picture_table needs no matplotlib
      print(f"curves.png is left out ({error}); {run_page.NAME} has the curves, too.", file=sys.stderr)
  return results
