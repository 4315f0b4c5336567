"""Draws prompts with a model: `python -m jaxpref.sample --model=runs/spo_tiny --prompts volcano "red apple"`.

The model is a folder in the layout of diffusers, a hub name, a shipped model, or the work folder of a finished run. The
same seed gives every model the same initial noise, so pictures of two models can be compared. All devices take part.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpref import arguments
from jaxpref.data import prompt_sets
from jaxpref.devices import sharding
from jaxpref.evaluation import drawing, report
from jaxpref.files import loading, lora_files
from jaxpref.models.text_to_image import TextToImage

TABLE_ROWS = 24  # prompts in a folder's grid.png


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments, draws, writes PNG; expected errors end in one sentence."""
  parser = arguments.Parser(prog="python -m jaxpref.sample", description=__doc__)
  add = parser.add_argument
  add("--model", default="tiny-sd", help="folder, hub name, shipped model or run (default: %(default)s)")
  add(
    "--lora",
    nargs="+",
    default=[],
    metavar="FILE[:STRENGTH]",
    help=".safetensors files of diffusers, PEFT or kohya, which act together; a.safetensors:0.8 takes 0.8 of one",
  )
  prompts = parser.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", help="one prompt")
  prompts.add_argument("--prompts", nargs="+", help=f"prompts, or one file of them: {', '.join(prompt_sets.ENDINGS)}")
  add_arguments(parser)
  add("--out", type=pathlib.Path, default=pathlib.Path("samples"), help="new folder, or NAME.png for one table")
  add("--overwrite", action="store_true", help="write into a folder that holds files")
  args = parser.parse_args(argv)
  try:
    draw(args)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that say how pictures are drawn; `check`, `load` and `settings` take them."""
  add = parser.add_argument
  add("--negative_prompt", help='what to lead away from (default: none, which for SDXL differs from "")')
  add("--seeds", type=int, default=4, help="pictures of each prompt (default: %(default)s)")
  add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
  add("--scheduler", choices=drawing.SAMPLERS, default="ddim", help="dpmpp_2m: DPM-Solver++ (default: %(default)s)")
  add("--steps", type=int, default=20, help="of the scheduler (default: %(default)s)")
  add("--karras", action="store_true", help="Karras' noise levels, for dpmpp_2m")
  add("--eta", type=float, default=0.0, help="of ddim; 0: deterministic, 1: ancestral (default: %(default)s)")
  add("--guidance_scale", type=float, default=5.0, help="0 to 1 switches it off (default: %(default)s)")
  add("--guidance_rescale", type=float, default=0.0, help="0 to 1, against overexposure (default: %(default)s)")
  add("--clip_skip", type=int, help="layers of the text encoder to leave out, as diffusers counts (default: none)")
  add("--height", type=int, help="pixels (default: the model's size)")
  add("--width", type=int, help="pixels (default: the model's size)")
  add("--batch_size", type=int, default=8, help="pictures at a time, of each process (default: %(default)s)")
  add("--vae_model", help="a VAE's folder or hub name, in the place of the model's own")
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of computation and stored weights")


def draw(args: argparse.Namespace) -> None:
  """A folder with each picture, their table and the settings; or the table alone, a row a prompt."""
  check(args)
  loras = [lora_files.parse_lora_file(text) for text in args.lora]
  only_table = args.out.suffix.lower() == ".png"
  if args.prompt is not None:
    prompts = [prompt_sets.check_prompt(args.prompt, option="--prompt")]
  else:
    prompts = prompt_sets.given(args.prompts, option="--prompts")
  mesh = sharding.make_mesh()
  model, weights, tokenize = load(args.model, loras, args, mesh)
  names = [f"{p:04d}_{i}{slug(prompt)}.png" for p, prompt in enumerate(prompts) for i in range(args.seeds)]
  batches = drawing.draw(
    model,
    weights,
    tokenize(prompts),
    batch_size=min(args.batch_size, len(names)),
    progress=f"{len(prompts)} prompts x {args.seeds} seeds",
    mesh=mesh,
    **settings(args, model, tokenize),
  )
  shown = prompts if only_table else prompts[:TABLE_ROWS]
  table: list[np.ndarray] = []
  for numbers, images in batches:
    if not only_table and numbers[0] == 0:  # now that the settings have proved to work
      start_folder(args, prompts, names)
    for number, image in zip(numbers, images, strict=True):
      if not only_table:
        report.save_image(args.out / names[number], image)
      if number < len(shown) * args.seeds:
        table.append(image)
  columns = {"": np.stack(table).reshape(len(shown), args.seeds, *table[0].shape)}
  report.picture_table(args.out if only_table else args.out / "grid.png", columns, shown)
  print(args.out)


def load(
  name: str, loras: Sequence[lora_files.LoraFile], args: argparse.Namespace, mesh: Mesh
) -> tuple[TextToImage, dict[str, Any], Callable[[list[str]], np.ndarray]]:
  """A model with its parameters on all devices of a mesh, and its tokenizer.

  Args:
    name: as of --model.
    loras: as of --lora.
  """
  everywhere = sharding.replicated(mesh)
  pipe = loading.load_text_to_image(
    model_folder(name), dtype=args.dtype, param_dtype=args.dtype, sharding=everywhere, vae_model=args.vae_model
  )
  weights = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  scale = 1.0
  if loras:
    adapter, scale, text_encoders = lora_files.load_pipeline_loras(loras, pipe.unet.config, pipe.params)
    weights = lora_files.merge_text_encoders(weights, text_encoders) | {"unet_lora": adapter}
  model = dataclasses.replace(loading.text_to_image(pipe, lora_scale=scale), clip_skip=args.clip_skip)
  if args.scheduler == "dpmpp_2m":
    # Where the folder does not say, diffusers' DPMSolverMultistepScheduler has another default than its DDIMScheduler.
    spacing = pipe.scheduler_config.get("timestep_spacing", "linspace")
    model = dataclasses.replace(model, schedule=dataclasses.replace(model.schedule, timestep_spacing=spacing))
  return model, jax.device_put(weights, everywhere), pipe.tokenize


def settings(
  args: argparse.Namespace, model: TextToImage, tokenize: Callable[[list[str]], np.ndarray]
) -> dict[str, Any]:
  """The arguments of `drawing.draw` that follow from those of the command."""
  size = (args.height or model.image_size, args.width or model.image_size) if args.height or args.width else None
  return dict(
    seeds_per_prompt=args.seeds,
    num_inference_steps=args.steps,
    guidance_scale=args.guidance_scale,
    eta=args.eta,
    seed=args.seed,
    negative_ids=None if args.negative_prompt is None else tokenize([args.negative_prompt]),
    guidance_rescale=args.guidance_rescale,
    sampler=args.scheduler,
    karras=args.karras,
    size=size,
  )


def check(args: argparse.Namespace) -> None:
  """Refuses what cannot work before anything is loaded."""
  check_settings(args)
  for file, _ in map(lora_files.parse_lora_file, args.lora):
    if not file.is_file():
      raise FileNotFoundError(f"--lora: there is no file {file}; give a LoRA of diffusers, PEFT or kohya.")
  if args.out.suffix.lower() == ".png":
    if args.out.is_dir():
      raise ValueError(f"--out={args.out} is a folder; choose another name.")
  elif args.out.exists() and not args.out.is_dir():
    raise ValueError(f"--out={args.out} is a file; name a folder, or a file that ends in .png.")
  elif args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
    raise ValueError(f"--out={args.out} exists and is not empty; choose another folder, or pass --overwrite.")


def check_settings(args: argparse.Namespace) -> None:
  """Refuses settings of `add_arguments` that cannot work."""
  for name in ("seeds", "steps", "batch_size", "height", "width"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name}={value}; expected at least 1.")
  for name in ("eta", "guidance_rescale"):
    if not 0.0 <= getattr(args, name) <= 1.0:
      raise ValueError(f"--{name}={getattr(args, name)}; expected 0 to 1.")
  if not 0.0 <= args.guidance_scale < math.inf:
    raise ValueError(f"--guidance_scale={args.guidance_scale}; expected a number of at least 0 (up to 1: no guidance).")
  if args.negative_prompt:
    prompt_sets.check_prompt(args.negative_prompt, option="--negative_prompt")
  if args.scheduler == "ddim" and args.karras:
    raise ValueError("--karras is for --scheduler=dpmpp_2m; leave it out, or choose that.")
  if args.scheduler == "dpmpp_2m" and args.eta:
    raise ValueError(f"--eta={args.eta} is for --scheduler=ddim; dpmpp_2m is deterministic, leave it out.")


def model_folder(name: str) -> str:
  """The model's name, or the exported model of a run where that is the name of a work folder."""
  folder = pathlib.Path(name)
  if (folder / "model_index.json").is_file() or not (folder / "config.json").is_file():
    return name
  if (folder / "export").is_dir():
    return str(folder / "export")
  if (folder / "checkpoints").is_dir():
    raise ValueError(
      f"--model={name} is a run without export/, which is written at its end; for its last checkpoint run "
      f"python -m jaxpref.export {name} --format=pipeline --out=NEW, and give that folder."
    )
  return name


def slug(prompt: str) -> str:
  """The beginning of a prompt for a file's name, with an underscore in front; empty where no letter is left."""
  words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
  return f"_{words}" if words else ""


def start_folder(args: argparse.Namespace, prompts: list[str], names: list[str]) -> None:
  """Removes the pictures that an earlier samples.json lists, and writes a new one: all settings, and what is drawn."""
  file = args.out / "samples.json"
  if file.is_file():
    try:
      earlier = [pathlib.Path(entry["file"]).name for entry in json.loads(file.read_text(encoding="utf-8"))["images"]]
    except (ValueError, KeyError, TypeError):
      earlier = []
    for name in earlier:
      (args.out / name).unlink(missing_ok=True)
  found: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("prompt", "prompts", "out", "overwrite")}
  found["lora"] = args.lora or None
  found["images"] = [
    {"file": name, "prompt": prompts[i // args.seeds], "index": i % args.seeds} for i, name in enumerate(names)
  ]
  args.out.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
