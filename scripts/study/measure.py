"""Draws a split of the study with a model and scores the pictures by both hidden preferences.

    python scripts/study/measure.py runs/study/base --model=tiny-sd --split=test     # the base model
    python scripts/study/measure.py runs/study/RUN --split=test                      # a run's exported model

writes FOLDER/SPLIT.npz: the scores of `ground.hidden_scores`, f32[P, S]. All models are drawn from the same noise, so
that picture i of a prompt can be compared with the base model's picture i.
"""

import argparse
import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from jaxpref.devices import sharding  # noqa: E402
from jaxpref.evaluation import drawing, settings  # noqa: E402
from scripts.study import ground  # noqa: E402

PICTURES = {"test": 4, "validation": 4}  # of a prompt
SEED = 7
BATCH = 128
DRAW: dict[str, Any] = dict(num_inference_steps=10, guidance_scale=3.5, eta=0.0, seed=SEED, sampler="ddim")


def measure(model: str, split: str, **changes: Any) -> dict[str, np.ndarray]:
  """Returns `ground.hidden_scores` of pictures that a model draws of a split's captions.

  Args:
    model: a folder, a run or a shipped model.
    split: "test" or "validation".
    changes: of DRAW.
  """
  parser = argparse.ArgumentParser()
  settings.add_arguments(parser)
  options = DRAW | changes
  args = parser.parse_args([f"--scheduler={options['sampler']}"])
  mesh = sharding.make_mesh(devices=jax.local_devices())
  module, weights, tokenize = settings.load(model, [], args, mesh)
  emojis, pictures = ground.split(split), PICTURES[split]
  drawn = drawing.draw(
    module,
    weights,
    tokenize([e.caption for e in emojis]),
    mesh=mesh,
    seeds_per_prompt=pictures,
    batch_size=BATCH,
    progress=f"{model}, {split}" if sys.stderr.isatty() else None,
    **options,
  )
  images = drawing.together(drawn, pictures)
  return ground.hidden_scores(images, np.asarray([e.class_id for e in emojis]))


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--model", help="default: the run in the folder")
  parser.add_argument("--split", choices=sorted(PICTURES), default="test")
  parser.add_argument("--sampler", choices=drawing.SAMPLERS, default=DRAW["sampler"])
  parser.add_argument("--steps", type=int, default=DRAW["num_inference_steps"])
  args = parser.parse_args(arguments)
  found = measure(args.model or str(args.folder), args.split, sampler=args.sampler, num_inference_steps=args.steps)
  args.folder.mkdir(parents=True, exist_ok=True)
  ground.save(args.folder / f"{args.split}.npz", found)
  print(", ".join(f"{name} {values.mean():.3f}" for name, values in found.items()))


@functools.cache
def read(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the scores in a file of `ground.save`."""
  with np.load(file) as stored:
    return dict(stored)


if __name__ == "__main__":
  try:
    main()
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
