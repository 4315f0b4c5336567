"""Compares what LPO and SPO compute, in operations counted by `jaxpref.planning.flops`; no weights, nothing is run.

    python scripts/bench/count_lpo.py                           # prints two tables
    python scripts/bench/count_lpo.py --out=docs/results/lpo_cost.json

Of a scored candidate: a latent reward model's two half UNet passes (with and without the prompt), against what a
step-aware preference model takes: the guided call of the policy at the candidate (of the k of a pool one denoises next,
so k - 1 of k are for the score alone), the VAE's decoder, and CLIP-H's image tower. What is computed of prompts once an
iteration is left out of both. Of an iteration, per prompt: rollout, scores and the updates, if all pairs are valid.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from configs import lpo_sd15, lpo_sdxl, spo_sd15, spo_sdxl  # noqa: E402
from jaxpref.devices import sharding  # noqa: E402
from jaxpref.files import loading, pipelines  # noqa: E402
from jaxpref.models import presets  # noqa: E402
from jaxpref.models.base import guided  # noqa: E402
from jaxpref.models.latent_reward import LatentRewardModel  # noqa: E402
from jaxpref.models.preference import StepAwareCLIPModel  # noqa: E402
from jaxpref.objectives import catalog  # noqa: E402
from jaxpref.planning import flops, plan  # noqa: E402
from jaxpref.rewards import latent, step_aware  # noqa: E402

RECIPES = {"sd15": (spo_sd15, lpo_sd15), "sdxl": (spo_sdxl, lpo_sdxl)}
TERA = 1e12


def candidate_parts(preset_name: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
  """Returns what of a candidate is computed to score it: a function and the shapes of its arguments, by name.

  Args:
    preset_name: a name of `presets.PRESETS`.
  """
  preset = presets.get_preset(preset_name)
  pipe = pipelines.random_pipeline(preset, components=())
  model = loading.text_to_image(pipe)
  weights = {
    name: presets.abstract_params(getattr(pipe, name)) for name in pipelines.NETWORKS if getattr(pipe, name) is not None
  }
  tokens = jax.ShapeDtypeStruct((1, pipe.tokenize([""]).shape[1]), jnp.int32)
  x, t = jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
  cond = jax.eval_shape(model.encode_text, weights, tokens)

  def call(w, x, t, c):
    return guided(lambda x, t, c: model.predict(w, x, t, c), c, 5.0)(x, t, c)

  scorer = LatentRewardModel(presets.latent_reward_config(preset))
  of_scorer = presets.abstract_params(scorer)
  prompts = jax.eval_shape(lambda p, ids: latent.embed_prompts(scorer, p, ids, ids), of_scorer, tokens)
  assert preset.preference is not None
  clip = StepAwareCLIPModel(preset.preference)
  of_clip = presets.abstract_params(clip)
  images = jax.eval_shape(model.decode, weights, x)
  text = jax.eval_shape(lambda p, ids: step_aware.embed_prompts(clip, p, ids), of_clip, tokens)
  vae = {"vae": weights["vae"]}
  no_vae = {name: of for name, of in weights.items() if name != "vae"}
  return {
    "latent reward": (lambda *a: latent.score_latents(scorer, *a), (of_scorer, x, t, prompts)),
    "guided call": (call, (no_vae, x, t, cond)),
    "decoder": (model.decode, (vae, x)),
    "image tower": (lambda *a: step_aware.score_images(clip, *a), (of_clip, images, t, text)),
  }


def of_scores(parts: Mapping[str, float], pool_size: int) -> dict[str, float]:
  """Returns costs of a score by a step-aware model, from those of `candidate_parts`.

  Args:
    pool_size: pool size of its rollout.
  """
  after = parts["decoder"] + parts["image tower"]
  return {
    "step-aware, of a pool": (pool_size - 1) / pool_size * parts["guided call"] + after,
    "step-aware without the call": after,
  }


def scored_candidate(preset_name: str, pool_size: int) -> dict[str, float]:
  """Returns TFLOP of one candidate's score, by part.

  Args:
    preset_name: a name of `presets.PRESETS`.
    pool_size: pool size of the step-aware model's rollout.
  """
  found = {name: flops.count(fn, *args) / TERA for name, (fn, args) in candidate_parts(preset_name).items()}
  return found | of_scores(found, pool_size)


def iteration(module, *, like=None) -> dict[str, float]:
  """Returns TFLOP of an iteration of a recipe with one prompt, and of its parts.

  Args:
    module: module of configs/.
    like: another recipe, whose first pool and pool size are used.
  """
  config = module.get_config()
  if like is not None:
    config.spo.update(warmup_steps=like.spo.warmup_steps, pool_size=like.spo.pool_size)
  config.update(batch_size=1, accumulation=1, vae_slicing=0)
  config.spo.minibatch = 10_000  # one update
  config = plan.without_weights(config)
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  step, state, frozen, batch = plan.abstract_inputs(config, mesh)
  jaxpr = jax.make_jaxpr(step)(state, frozen, batch).jaxpr
  whole, rollout = (flops.of_jaxpr(jaxpr, while_trips=trips) / TERA for trips in (1.0, 0.0))
  updates = catalog.method(config).updates(config)
  return {"rollout": rollout, "updates": whole - rollout, "pairs": updates.rows + updates.other_rows, "whole": whole}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json")
  parser.add_argument("--models", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
  args = parser.parse_args()
  found: dict[str, Any] = {"command": "python scripts/bench/count_lpo.py", "unit": "TFLOP, two a multiply-add"}
  for name in args.models:
    spo, lpo = RECIPES[name]
    c = spo.get_config()
    of_it: dict[str, Any] = {"candidate": scored_candidate(name, c.spo.pool_size)}
    of_it["iteration"] = {"spo": iteration(spo), "lpo": iteration(lpo)}
    if c.spo.inner_steps == 0:
      of_it["iteration"]["lpo, the pools of spo"] = iteration(lpo, like=c)
    one = of_it["candidate"]
    of_it["ratios"] = {
      "score": one["step-aware, of a pool"] / one["latent reward"],
      "score without the call": one["step-aware without the call"] / one["latent reward"],
      "iteration": of_it["iteration"]["spo"]["whole"] / of_it["iteration"]["lpo"]["whole"],
      "iteration, per pair": (of_it["iteration"]["spo"]["whole"] / of_it["iteration"]["spo"]["pairs"])
      / (of_it["iteration"]["lpo"]["whole"] / of_it["iteration"]["lpo"]["pairs"]),
    }
    found[name] = of_it
    print(json.dumps({name: of_it}, indent=1))
  if args.out:
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
