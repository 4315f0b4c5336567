"""Installs trained models as the ones that the package ships, in half precision.

    python scripts/assets/install_assets.py                               # all four, from the runs of make_tiny_sd.sh
    python scripts/assets/install_assets.py tiny-judge=runs/other_judge   # one, from another run

Each model is read from RUN/export and written to jaxpref/assets/NAME, in a scratch folder first: nothing is replaced
unless all fit the size limits. RUN/results.json, if the recipe measures something, is copied as metrics.json.
"""

import argparse
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import jax.numpy as jnp

from jaxpref.files import pipelines, tensors, tokenizers
from jaxpref.models import presets
from jaxpref.rewards.loading import load_preference_model, open_judge, save_judge, save_preference_model

ASSETS = pathlib.Path(pipelines.__file__).parents[1] / "assets"
RUNS = {
  "tiny-sd": "runs/pretrain_tiny_unet_restart",
  "tiny-clip": "runs/pretrain_tiny_clip",
  "tiny-spm": "runs/spm_tiny",
  "tiny-judge": "runs/pretrain_tiny_judge",
}
MEGABYTE = 10**6
LARGEST_FILE = 16 * MEGABYTE
LARGEST_TOTAL = 32 * MEGABYTE


def copy_pipeline(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a Stable Diffusion folder with its tokenizer."""
  pipelines.save_pipeline(target, pipelines.load_pipeline(source), dtype=jnp.float16)


def copy_clip(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a plain CLIP with tiny-sd's towers."""
  clip = presets.make_clip(presets.TINY_SD)
  params = tensors.load_tree(tensors.weight_files(source), presets.abstract_params(clip))
  save_preference_model(target, clip, params, dtype=jnp.float16)


def copy_preference_model(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a step-aware preference model."""
  save_preference_model(target, *load_preference_model(source), dtype=jnp.float16)


def copy_judge(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a judge."""
  save_judge(target, *open_judge(source), dtype=jnp.float16)


COPY: dict[str, Callable[[pathlib.Path, pathlib.Path], None]] = {
  "tiny-sd": copy_pipeline,
  "tiny-clip": copy_clip,
  "tiny-spm": copy_preference_model,
  "tiny-judge": copy_judge,
}


def sizes(folder: pathlib.Path) -> dict[pathlib.Path, int]:
  """Returns the bytes of every file below a folder."""
  return {p: p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def install(runs: dict[str, pathlib.Path], assets: pathlib.Path = ASSETS) -> None:
  """Replaces the models in `assets` that `runs` names.

  Args:
    runs: name of a model -> the work folder of the run that made it.
    assets: where the models are.

  Raises:
    FileNotFoundError, ValueError: a run has no export, or what it exported does not load.
    ValueError: a file is above 16 MB, or all together are above 32 MB.
  """
  for name, run in runs.items():
    if name not in COPY:
      raise ValueError(f"{name} is no model that is shipped; expected one of {', '.join(COPY)}.")
    if not (run / "export").is_dir():
      raise FileNotFoundError(f"{run} has no folder export; let the run of {name} finish, or name another run.")
  assets.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".install.", dir=assets.parent) as scratch:
    new = pathlib.Path(scratch)
    for name, run in runs.items():
      COPY[name](run / "export", new / name)
      if (run / "results.json").is_file():
        shutil.copyfile(run / "results.json", new / name / "metrics.json")
    kept = {p: n for p, n in sizes(assets).items() if p.relative_to(assets).parts[0] not in runs}
    written = sizes(new)
    for file, size in written.items():
      if size > LARGEST_FILE:
        raise ValueError(
          f"{file.relative_to(new)} has {size / MEGABYTE:.1f} MB, expected at most {LARGEST_FILE / MEGABYTE:.0f}; "
          "train a smaller network."
        )
    total = sum(kept.values()) + sum(written.values())
    if total > LARGEST_TOTAL:
      raise ValueError(
        f"{assets} would hold {total / MEGABYTE:.1f} MB, expected at most {LARGEST_TOTAL / MEGABYTE:.0f}; "
        "train smaller networks."
      )
    for name in runs:
      shutil.rmtree(assets / name, ignore_errors=True)
      (new / name).rename(assets / name)
  tokenizers.tiny_tokenizer()  # other presets take tiny-sd's, from there
  for file, size in sizes(assets).items():
    print(f"{size / MEGABYTE:7.2f} MB  {file.relative_to(assets)}")
  print(f"{total / MEGABYTE:7.2f} MB  in all")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", nargs="*", metavar="NAME=RUN", help="a model and the work folder to take it from")
  args = parser.parse_args()
  runs = dict(text.partition("=")[::2] for text in args.runs) or RUNS
  try:
    install({name: pathlib.Path(run) for name, run in runs.items()})
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
  main()
