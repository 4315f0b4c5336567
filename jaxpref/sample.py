"""Draws prompts with a model: `python -m jaxpref.sample --model=runs/spo_tiny --prompts volcano "red apple"`.

The model is a folder in the layout of diffusers, a hub name, a checkpoint in one .safetensors file, a shipped model, or
the work folder of a finished run. The same seed gives every model the same initial noise, so pictures of two models are
comparable. All devices take part.
"""

import argparse
import io
import json
import pathlib
import re
from typing import Any

import numpy as np

from jaxpref import arguments
from jaxpref.data import paths, prompt_sets
from jaxpref.devices import endings, sharding
from jaxpref.evaluation import drawing, pictures, settings
from jaxpref.files import adapters, loading
from jaxpref.files import family as families
from jaxpref.models.base import Model

TABLE_ROWS = 24  # prompts in a folder's grid.png


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments, draws and writes PNG files; an expected error ends the program with one sentence."""
  parser = arguments.Parser(prog="python -m jaxpref.sample", description=__doc__)
  add = parser.add_argument
  add(
    "--model",
    type=arguments.place,
    default="tiny-sd",
    help="folder, hub name, checkpoint file, shipped model or run (default: %(default)s)",
  )
  add(
    "--model_config",
    type=arguments.place,
    metavar="FOLDER",
    help="for a checkpoint file: a folder of config.json files with its topology, if that is not a published one",
  )
  add("--unet_model", type=arguments.place, help="a UNet's folder, hub name or file, instead of the model's own")
  add(
    "--lora",
    nargs="+",
    default=[],
    metavar="FILE[:STRENGTH]",
    help=".safetensors files of diffusers, PEFT or kohya, added together; a.safetensors:0.8 has strength 0.8",
  )
  prompts = parser.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", help="one prompt")
  prompts.add_argument(
    "--prompts", nargs="+", help=f"prompts, or one file of prompts: {', '.join(prompt_sets.ENDINGS)}"
  )
  settings.add_arguments(parser)
  add(
    "--out", type=arguments.path, default=pathlib.Path("samples"), help="a new folder, or NAME.png for a single table"
  )
  add("--overwrite", action="store_true", help="write into a folder that is not empty, or over a file")
  add(
    "--latents",
    type=arguments.path,
    metavar="FILE.npy",
    help="noise to start from, [N, C, h, w] as diffusers takes it, N = prompts x seeds (default: drawn from --seed)",
  )
  add("--save_latents", type=arguments.path, metavar="FILE.npy", help="writes the noise that the pictures start from")
  args = parser.parse_args(argv)
  with endings.one_sentence(ValueError, OSError, doing=f"drawing into {args.out}", again="run the same command again"):
    draw(args)


def draw(args: argparse.Namespace) -> None:
  """Writes a folder with each picture, their table and the settings; or the table alone, with a row for each prompt."""
  check(args)
  loras = [adapters.parse_lora_file(text) for text in args.lora]
  only_table = args.out.suffix.lower() == ".png"
  if args.prompt is not None:
    prompts = [prompt_sets.check_prompt(args.prompt, option="--prompt")]
  else:
    prompts = prompt_sets.given(args.prompts, option="--prompts")
  drawing.check_count(len(prompts), args.seeds)
  mesh = sharding.make_mesh()
  name = loading.with_unet(loading.with_config(args.model, args.model_config), args.unet_model)
  latents = latents_of(args, settings.without_weights(name, args), len(prompts) * args.seeds)
  model, weights, tokenize = settings.load(name, loras, args, mesh)
  names = [f"{p:04d}_{i}{slug(prompt)}.png" for p, prompt in enumerate(prompts) for i in range(args.seeds)]
  batches = drawing.draw(
    model,
    weights,
    tokenize(prompts),
    batch_size=min(args.batch_size, len(names)),
    progress=f"{len(prompts)} prompts x {args.seeds} seeds",
    mesh=mesh,
    latents=latents,
    **settings.of_draw(args, model, tokenize),
  )
  shown = prompts if only_table else prompts[:TABLE_ROWS]
  table: list[np.ndarray] = []
  for numbers, images in batches:
    if numbers[0] == 0:  # the settings have proved to work
      if not only_table:
        start_folder(args, prompts, names)
      if args.save_latents is not None:
        save_latents(args.save_latents, latents)
    for number, image in zip(numbers, images, strict=True):
      if not only_table:
        pictures.save_image(args.out / names[number], image)
      if number < len(shown) * args.seeds:
        table.append(image)
  columns = {"": np.stack(table).reshape(len(shown), args.seeds, *table[0].shape)}
  pictures.picture_table(args.out if only_table else args.out / "grid.png", columns, shown)
  print(args.out)


def check(args: argparse.Namespace) -> None:
  """Raises for what cannot work, before anything is loaded."""
  settings.check(args)
  for file, _ in map(adapters.parse_lora_file, args.lora):
    if not file.is_file():
      raise FileNotFoundError(f"--lora: there is no file {file}; give a LoRA of diffusers, PEFT or kohya.")
  if args.out.suffix.lower() == ".png":
    if args.out.is_dir():
      raise ValueError(f"--out={args.out} is a folder; choose another name.")
    if args.out.exists() and not args.overwrite:
      raise ValueError(f"--out={args.out} exists; choose another name, or pass --overwrite.")
  elif args.out.exists() and not args.out.is_dir():
    raise ValueError(f"--out={args.out} is a file; name a folder, or a file that ends in .png.")
  elif args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
    raise ValueError(f"--out={args.out} exists and is not empty; choose another folder, or pass --overwrite.")
  paths.check_writable(args.out, "--out")
  if args.latents is not None:
    drawing.read_latents(args.latents, f"--latents={args.latents}")
  if (file := args.save_latents) is not None:
    if file.suffix != ".npy" or file.is_dir():
      raise ValueError(f"--save_latents={file}; expected a file that ends in .npy.")
    if file.exists() and not args.overwrite:
      raise ValueError(f"--save_latents={file} exists; choose another name, or pass --overwrite.")
    paths.check_writable(file, "--save_latents")


def latents_of(args: argparse.Namespace, model: Model, count: int) -> np.ndarray | None:
  """Returns f32[count, C, h, w] that --latents gives or --save_latents will write; None without both.

  Args:
    model: draws the pictures, whose weights are not needed.
    count: pictures.
  Raises:
    ValueError: the model cannot draw pictures of this size, or the latents do not fit.
  """
  size = settings.size_of(args, model)
  shape = model.latent_shape_for(*size) if args.height or args.width else model.latent_shape
  if args.latents is not None:
    given = f"--latents={args.latents}"
    return drawing.check_latents(drawing.read_latents(args.latents, given), count, shape, given)
  return None if args.save_latents is None else drawing.initial_latents(args.seed, count, shape)


def save_latents(file: pathlib.Path, latents: np.ndarray | None) -> None:
  """Writes latents as numpy.save does."""
  assert latents is not None
  stream = io.BytesIO()
  np.save(stream, latents, allow_pickle=False)
  file.parent.mkdir(parents=True, exist_ok=True)
  paths.write(file, stream.getvalue())


def slug(prompt: str) -> str:
  """Returns the beginning of a prompt for a file name, after an underscore; "" if no letter is left."""
  words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
  return f"_{words}" if words else ""


def start_folder(args: argparse.Namespace, prompts: list[str], names: list[str]) -> None:
  """Removes the pictures that an earlier samples.json lists, and writes a new one with all settings and pictures."""
  file = args.out / "samples.json"
  if file.is_file():
    try:
      earlier = [pathlib.Path(entry["file"]).name for entry in json.loads(file.read_text(encoding="utf-8"))["images"]]
    except (ValueError, KeyError, TypeError):
      earlier = []
    for name in earlier:
      (args.out / name).unlink(missing_ok=True)
  not_settings = ("prompt", "prompts", "out", "overwrite", "save_latents")
  found: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in not_settings}
  found |= {"lora": args.lora or None, "family": families.of_run(args.model, args.family)}
  found["images"] = [
    {"file": name, "prompt": prompts[i // args.seeds], "index": i % args.seeds} for i, name in enumerate(names)
  ]
  args.out.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
