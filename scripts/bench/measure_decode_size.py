"""Measures what SPO loses and saves if the preference model's pictures are decoded smaller: `config.spo.decode_size`.

    python scripts/bench/measure_decode_size.py --out docs/results/decode_size
    python scripts/bench/measure_decode_size.py --config my_recipe.py --sizes 512 256 224 --prompts 32

writes OUT.json and OUT.md, of two tables. The first is of rollouts on validation captions of the emoji, with the models
of the recipe (default: configs/spo_tiny.py): the same candidates, judged by pictures of each size that were decoded
from shrunk latents, and by whole pictures that were shrunk. A preference model that sees smaller pictures than the VAE
makes shrinks them itself: what decoding from shrunk latents changes for it is the difference of the two. The
second counts the operations of an iteration of the SPO recipes of SD1.5 and SDXL in which all pairs are valid
(nothing is computed).
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))

from scripts.bench import bench  # noqa: E402

BATCH = 16
# Recipe -> sizes whose operations are counted; 0 is the images' own. 224 is what CLIP-H sees.
COUNTED = {"spo_sd15": (0, 256, 224), "spo_sdxl": (0, 512, 256, 224)}


def candidate_scores(config: Any, sizes: Sequence[int], num_prompts: int) -> tuple[int, dict[str, np.ndarray]]:
  """Returns the images' size, and scores f32[prompts, groups, pool] of the same candidates by pictures of each size.

  They are "whole", and of each size "decoded N", from shrunk latents, and "shrunk N", whole pictures made smaller.
  """
  import jax

  from jaxpref.data import pipeline
  from jaxpref.devices import chips
  from jaxpref.files import loading
  from jaxpref.models.base import guided, repeat_cond
  from jaxpref.objectives import spo
  from jaxpref.recipes.sizes import sides
  from jaxpref.rewards import step_aware
  from jaxpref.rewards.base import Scores
  from jaxpref.rewards.loading import load_scorer
  from jaxpref.training import build

  pipe = loading.load_text_to_image(config.model, dtype=config.dtype, param_dtype=config.dtype)
  model = build.at_size(config, loading.text_to_image(pipe, vae_slicing=config.vae_slicing or None))
  side, width = sides(model.image_size)
  if side != width:
    raise ValueError(f"--config: images of {side} x {width} pixels; expected a recipe of squares.")
  for size in sizes:
    if model.latent_shape_for(size, size) > model.latent_shape:
      raise ValueError(f"--sizes: {size} is more than the {side} pixels of {config.model}'s images.")
  scorer, spm = load_scorer(config.preference_model, dtype=config.dtype, param_dtype=config.dtype)
  weights = dict(pipe.params) | {"empty_ids": pipe.tokenize([""]), "spm": spm}
  batches = pipeline.prompt_batches(batch_size=BATCH, tokenize=pipe.tokenize, seed=config.seed, split="validation")
  every = [next(batches)["input_ids"] for _ in range(-(-num_prompts // BATCH))]
  s = config.spo

  def roll_out(decode, weights, ids, key):
    cond = model.encode_text(weights, ids)
    text = step_aware.embed_prompts(scorer, weights["spm"], ids)
    eps = guided(lambda x, t, c: model.predict(weights, x, t, c), model.encode_empty(weights, 1), s.guidance_scale)

    def score(x0, t):
      rows = repeat_cond({"text": text}, x0.shape[0] // BATCH)["text"]
      return Scores(step_aware.score_images(scorer, weights["spm"], decode(weights, x0), t, rows), {})

    found = spo.pool_rollout(
      lambda x, t: eps(x, t, repeat_cond(cond, x.shape[0] // BATCH)),
      score,
      model.process,
      jax.random.normal(jax.random.fold_in(key, 0), (BATCH, *model.latent_shape)),
      jax.random.fold_in(key, 1),
      num_steps=s.num_inference_steps,
      eta=s.eta,
      warmup_steps=s.warmup_steps,
      pool_size=s.pool_size,
      inner_steps=s.inner_steps,
      threshold=s.threshold,
      next_latent="random",  # so that the candidates do not depend on the scores
      pool_last_step=s.pool_last_step,
    )
    return found.scores.total

  def shrunk(size):
    def decode(weights, x0):
      images = model.decode(weights, x0)
      return jax.image.resize(images, (images.shape[0], size, size, 3), "linear")

    return decode

  ways = {"whole": model.decode}
  for size in sizes:
    ways[f"decoded {size}"] = functools.partial(model.decode, size=size)
    ways[f"shrunk {size}"] = shrunk(size)
  scores = {}
  for name, decode in ways.items():
    started = time.perf_counter()
    run = jax.jit(functools.partial(roll_out, decode), compiler_options=chips.compiler_options())
    parts = [np.asarray(run(weights, ids, jax.random.key(i))) for i, ids in enumerate(every)]
    scores[name] = np.concatenate(parts)[:num_prompts]
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
  return side, scores


def compared(truth: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
  """Returns the pairs chosen by `scores` [prompts, groups, pool] against those chosen by `truth`, as shares.

  Of the groups valid by `truth`: `same_winner`, `same_loser`. Of the pairs that `scores` chooses: `order_kept`, where
  the winner is better by `truth`, too. Of all groups: `valid` and `truly_valid`.
  """
  import jax.numpy as jnp

  from jaxpref import losses

  truth, scores = (x.reshape(-1, x.shape[-1]) for x in (truth, scores))

  pairs = [losses.select_pair(jnp.asarray(x), threshold=threshold) for x in (scores, truth)]
  (best, worst, valid), (best_true, worst_true, valid_true) = ([np.asarray(x) for x in pair] for pair in pairs)
  of = lambda index: truth[np.arange(len(truth)), index]
  chosen = of(best) > of(worst)
  return {
    "same_winner": float(np.mean((best == best_true)[valid_true])),
    "same_loser": float(np.mean((worst == worst_true)[valid_true])),
    "order_kept": float(np.mean(chosen[valid])),
    "valid": float(np.mean(valid)),
    "truly_valid": float(np.mean(valid_true)),
  }


def operations(recipe: str, size: int) -> float:
  """Returns the operations per prompt of an iteration in which all pairs are valid."""
  import jax

  from jaxpref.devices import sharding
  from jaxpref.objectives import catalog
  from jaxpref.planning import flops, plan

  config = bench.recipe_module(ROOT / "configs" / f"{recipe}.py").get_config()
  config.data.update(source="emoji", path=None)
  config.remat = "none"  # what is computed again to save memory is not counted
  config.spo.decode_size = size
  config = plan.without_weights(config)
  step, *inputs = plan.abstract_inputs(config, sharding.make_mesh(data=1, devices=jax.devices()[:1]))
  trips = catalog.method(config).updates(config).count
  return flops.of_jaxpr(jax.make_jaxpr(step)(*inputs).jaxpr, while_trips=trips) / config.batch_size


def tables(report: Mapping[str, Any]) -> str:
  """Returns the text of OUT.md."""
  percent = lambda x: f"{100 * x:.1f} %"
  lines = [
    f"{report['model']} and {report['preference_model']}: {report['groups']} pools of {report['pool']}, of which whole "
    f"pictures of {report['image_size']} pixels make {percent(report['truly_valid'])} valid pairs. Of those:",
    "",
    "| pictures | pixels | against | same winner | same loser | winner is better, too | valid pairs |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in report["rows"]:
    lines.append(
      f"| {row['pictures']} | {row['size']} | {row['against']} | {percent(row['same_winner'])} "
      f"| {percent(row['same_loser'])} | {percent(row['order_kept'])} | {percent(row['valid'])} |"
    )
  lines += ["", "| recipe | pictures' pixels | TFLOP of an iteration, a prompt | of the whole |", "|---|---|---|---|"]
  for row in report["operations"]:
    lines.append(f"| {row['recipe']} | {row['size']} | {row['tflop']:.4g} | {percent(row['share'])} |")
  return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs" / "spo_tiny.py", help="an SPO recipe")
  parser.add_argument("--sizes", type=int, nargs="+", default=[24, 16], help="pixels a side (default: 24 16)")
  parser.add_argument("--prompts", type=int, default=64, help="default: %(default)s")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "decode_size", help="default: %(default)s")
  args = parser.parse_args(arguments)
  if args.prompts < 1:
    parser.error(f"--prompts={args.prompts}: expected at least 1.")
  if not args.config.is_file():
    parser.error(f"--config: there is no {args.config}; expected the file of an SPO recipe, as configs/spo_tiny.py.")
  config = bench.recipe_module(args.config).get_config()
  if config.objective != "spo":
    parser.error(f"--config: {args.config} has the objective {config.objective}; expected a recipe of spo.")
  try:
    image_size, scores = candidate_scores(config, args.sizes, args.prompts)
  except ValueError as error:  # of the models, or of sizes that the VAE cannot make
    parser.error(str(error))
  whole, threshold = scores["whole"], config.spo.threshold
  rows = []
  for size in args.sizes:
    for pictures, against in (("decoded", "whole"), ("shrunk", "whole"), ("decoded", "shrunk")):
      truth = whole if against == "whole" else scores[f"shrunk {size}"]
      found = compared(truth, scores[f"{pictures} {size}"], threshold)
      rows.append({"pictures": pictures, "size": size, "against": against, **found})
  counted = []
  for recipe, sizes in COUNTED.items():
    counts = {size: operations(recipe, size) for size in sizes}
    counted += [
      {"recipe": recipe, "size": size, "tflop": n / 1e12, "share": n / counts[0]} for size, n in counts.items()
    ]
  report = {
    "model": config.model,
    "preference_model": config.preference_model,
    "image_size": image_size,
    "groups": int(np.prod(whole.shape[:2])),
    "pool": whole.shape[2],
    "truly_valid": rows[0]["truly_valid"],
    "threshold": threshold,
    "rows": rows,
    "operations": counted,
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
  args.out.with_suffix(".md").write_text(tables(report))
  print(tables(report))


if __name__ == "__main__":
  main()
