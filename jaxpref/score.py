"""Scores the images of a recipe's preference pairs with a preference model.

    python -m jaxpref.score --config=configs/spm_sdxl.py --config.data.path=PICKAPIC --out=scores.npz

With --config.data.scores=scores.npz and --config.data.labels=scores the recipe then takes its labels from the scores
instead of from people, as SPO does for its SDXL preference model (arXiv 2406.04314); --config.data.min_gap turns pairs
with nearly equal scores into ties. The model is a CLIP such as PickScore, or a step-aware preference model (at time 0),
by folder or hub name; scores are exp(logit_scale) x cosine. The devices of one host take part. The same command
continues an interrupted run; it fails while the first one still runs.
"""

import concurrent.futures
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from jaxpref import arguments
from jaxpref import config as config_lib
from jaxpref.config import AnyConfig, Config
from jaxpref.data import index as index_lib
from jaxpref.data import lease, records, sources
from jaxpref.devices import endings, sharding
from jaxpref.devices.progress import tqdm
from jaxpref.files import loading, tokenizers
from jaxpref.models.preference import StepAwareCLIPModel
from jaxpref.models.vae import to_float
from jaxpref.recipes import sections
from jaxpref.rewards import networks
from jaxpref.rewards.loading import load_scorer, look_for_scorer, scorer_fingerprint
from jaxpref.training import inputs

AGAIN = "run the same command again to continue"
SAVE_SECONDS = 60  # between two writes of the scores so far


def score_pairs(
  scorer: StepAwareCLIPModel,
  params: Any,
  tokenize: Callable[[list[str]], np.ndarray],
  source: records.Source,
  *,
  scores: np.ndarray,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  num_threads: int = 8,
  progress: bool = True,
) -> Iterator[int]:
  """Computes the scores that are missing.

  Args:
    scores: f32[N, 2] of image_0 and image_1 of each record, NaN where missing; changed in place. A record with an
      unreadable image gets scores of -inf.
    batch_size: pairs scored at a time on all devices together.
  Yields:
    The number of records that have scores, after each batch.
  """
  config = scorer.config
  size = config.vision_config.image_size
  unit = sharding.batch_devices(mesh)
  batch_size = -(-batch_size // unit) * unit
  mean, std = (np.asarray(v, np.float32).reshape(1, 1, 1, 3) for v in (config.image_mean, config.image_std))

  @jax.jit
  def apply(params, ids, images):  # i32[B, L], u8[B, 2, S, S, 3]
    pixels = (to_float(images.reshape(-1, size, size, 3)) / 2 + 0.5 - mean) / std
    times = jnp.zeros(pixels.shape[0], jnp.int32)
    text = jnp.repeat(scorer.apply({"params": params}, ids, method="text_embeds"), 2, axis=0)
    image = scorer.apply({"params": params}, pixels, times, method="image_embeds")
    return scorer.apply({"params": params}, image, text, method="score").reshape(-1, 2)

  def read(index: int) -> tuple[int, str, np.ndarray | None]:
    record = source[index]
    caption = records.text(records.field(record, index, "caption"))
    try:
      images = [networks.clip_image(records.field(record, index, f"image_{i}"), size) for i in (0, 1)]
    except records.UnreadableImage:
      return index, caption, None
    return index, caption, np.stack(images)

  missing = np.flatnonzero(np.isnan(scores).any(1)).tolist()
  done = len(scores) - len(missing)
  with (
    concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
    tqdm(total=len(scores), initial=done, desc="pairs", disable=not progress) as bar,
  ):
    chunks = (missing[i : i + batch_size] for i in range(0, len(missing), batch_size))
    waiting = [[pool.submit(read, i) for i in chunk] for chunk in itertools.islice(chunks, 2)]
    while waiting:
      rows = [future.result() for future in waiting.pop(0)]
      waiting += [[pool.submit(read, i) for i in chunk] for chunk in itertools.islice(chunks, 1)]
      good = [(index, caption, images) for index, caption, images in rows if images is not None]
      scores[[index for index, _, image in rows if image is None]] = -np.inf
      if good:
        filled = [good[i % len(good)] for i in range(batch_size)]  # one shape, so one compilation
        batch = {"ids": tokenize([caption for _, caption, _ in filled]), "images": np.stack([x for _, _, x in filled])}
        placed = sharding.put_batch(mesh, batch)
        found = np.asarray(apply(params, placed["ids"], placed["images"]))
        scores[[index for index, _, _ in good]] = found[: len(good)]
      bar.update(len(rows))
      done += len(rows)
      yield done


def score(config: AnyConfig, *, model: str, out: pathlib.Path, batch_size: int) -> index_lib.Index:
  """Writes the index of the config's pairs with the scores of their images, and returns it.

  Raises:
    ValueError, FileNotFoundError: one sentence on what is missing or does not fit.
  """
  if out.suffix != ".npz":
    raise ValueError(f"--out={out}; expected a file that ends in .npz.")
  sections.check_count(batch_size, "batch_size", most=arguments.MAX_AT_A_TIME)
  config = config_lib.typed(config)
  config_lib.check(config)
  inputs.look_for(config, scores=False)
  look_for_scorer(model)
  with lease.hold(out.parent, name=f"{out.name}.{lease.NAME}") as held:
    return _score(config, held, model=model, out=out, batch_size=batch_size)


def _score(config: Config, held: lease.Held, *, model: str, out: pathlib.Path, batch_size: int) -> index_lib.Index:
  """Does the work of `score` on a file that only this process writes."""
  tokenizer = loading.load_tokenizer(model, config.model)
  source = inputs.open_pairs(config)
  fingerprint = sources.content_fingerprint(source)
  scores = np.full((len(source), 2), np.nan, np.float32)
  by = f"{scorer_fingerprint(model)} in {config.dtype}"
  if out.is_file():
    begun = index_lib.load(out, num_records=len(source), fingerprint=fingerprint, scored_by=by)
    scores = np.stack(begun.scores(), axis=1)
  mesh = sharding.make_mesh()
  module, params = load_scorer(model, dtype=config.dtype, param_dtype=config.dtype, sharding=sharding.replicated(mesh))
  params = jax.device_put(params, sharding.replicated(mesh))
  length = module.config.text_config.max_position_embeddings

  def save() -> index_lib.Index:
    held.check()
    scored = dataclasses.replace(source.index, score_0=scores[:, 0], score_1=scores[:, 1])
    index_lib.save(scored, out, fingerprint=fingerprint, scored_by=by)
    return scored

  saved = time.monotonic()
  for _ in score_pairs(
    module,
    params,
    lambda captions: tokenizers.tokenize(tokenizer, captions, length=length),
    source,
    scores=scores,
    batch_size=batch_size,
    mesh=mesh,
  ):
    if time.monotonic() - saved > SAVE_SECONDS:
      save()
      saved = time.monotonic()
  return save()


def main(argv: list[str]) -> None:
  """Scores; an expected error ends the program with one sentence."""
  del argv
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  out = pathlib.Path(flags.FLAGS.out)
  with endings.one_sentence(ValueError, OSError, doing=f"scoring into {out}", again=AGAIN):
    scored = score(flags.FLAGS.config, model=flags.FLAGS.model, out=out, batch_size=flags.FLAGS.batch_size)
  agrees, unreadable = index_lib.score_agreement(scored), int(np.isneginf(scored.scores()[0]).sum())
  print(
    f"{out}: {len(scored)} pairs, {unreadable} unreadable; agrees with {agrees:.1%} of the labels, without ties; train "
    f"with --config.data.scores={out}"
  )


def run() -> None:
  """Runs the command: the console entry point."""
  config_flags.DEFINE_config_file("config", None, "The recipe. Change a field with --config.NAME=VALUE.")
  arguments.define_place("model", "yuvalkirstain/PickScore_v1", "The preference model: a folder or a hub name.")
  arguments.define_place("out", None, "The .npz file to write, or to continue.")
  flags.DEFINE_integer("batch_size", 64, "Pairs scored at a time.", lower_bound=1, upper_bound=arguments.MAX_AT_A_TIME)
  flags.mark_flags_as_required(["config", "out"])
  with endings.one_sentence(doing="scoring", again=AGAIN):
    app.run(main, flags_parser=arguments.parse_flags)


if __name__ == "__main__":
  run()
