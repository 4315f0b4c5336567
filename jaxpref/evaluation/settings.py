"""The drawing settings on the command line of `sample` and `evaluate`: arguments, checks, and loading the model."""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpref import arguments
from jaxpref.data import prompt_sets
from jaxpref.devices import sharding
from jaxpref.diffusion import RectifiedFlow
from jaxpref.evaluation import drawing
from jaxpref.files import adapters, loading, sd3
from jaxpref.files import family as families
from jaxpref.models.base import Model
from jaxpref.recipes.sections import MAX_STEPS
from jaxpref.recipes.sizes import MAX_PIXELS, is_size, sides

MAX_SEEDS = 10**6  # most pictures of a prompt
SCHEDULER = "ddim: DDIM, or Euler steps for Stable Diffusion 3; dpmpp_2m: DPM-Solver++ (default: %(default)s)"
ETA = "noise of ddim: 0 is deterministic, 1 ancestral; for Stable Diffusion 3, Flow-GRPO's eta (default: %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that control how pictures are drawn; `check`, `load` and `of_draw` read them."""
  add = parser.add_argument
  add("--negative_prompt", help='what to steer away from (default: none, which for SDXL differs from "")')
  add("--seeds", type=int, default=4, help="pictures of each prompt (default: %(default)s)")
  add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
  add("--scheduler", choices=drawing.SAMPLERS, default="ddim", help=SCHEDULER)
  add("--steps", type=int, default=20, help="steps of the scheduler (default: %(default)s)")
  add("--karras", action="store_true", help="use Karras' noise levels, for dpmpp_2m")
  add("--eta", type=float, default=0.0, help=ETA)
  add("--guidance_scale", type=float, default=5.0, help="0 to 1 switches guidance off (default: %(default)s)")
  add("--guidance_rescale", type=float, default=0.0, help="0 to 1, against overexposure (default: %(default)s)")
  add("--clip_skip", type=int, help="layers of the text encoder to leave out, as diffusers counts (default: none)")
  add("--max_sequence_length", type=int, help="tokens of T5, for models that have it (default: the model's)")
  add("--height", type=int, help="in pixels (default: the model's size)")
  add("--width", type=int, help="in pixels (default: the model's size)")
  add("--batch_size", type=int, default=8, help="pictures that each process draws at a time (default: %(default)s)")
  add(
    "--family",
    help=f"model family: {', '.join(families.FAMILIES)}, or your own package.module:NAME (default: what the run or the "
    "folder says, else the first)",
  )
  add("--vae_model", type=arguments.place, help="a VAE's folder, hub name or file, instead of the model's own")
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of computation and stored weights")


def load(
  name: str, loras: Sequence[adapters.LoraFile], args: argparse.Namespace, mesh: Mesh
) -> tuple[Model, dict[str, Any], Callable[[list[str]], np.ndarray]]:
  """Returns a model with its parameters on all devices of a mesh, and its tokenizer.

  Args:
    name: value of --model.
    loras: values of --lora.
  """
  everywhere = sharding.replicated(mesh)
  family, folder = families.of_run(name, args.family), model_folder(name)
  of = families.get(family, "--family")
  families.look_for(of, folder, vae_model=args.vae_model, loras=[file for file, _ in loras])
  with families.opened(family, "--family"):
    pipe = of.load(folder, dtype=args.dtype, param_dtype=args.dtype, sharding=everywhere, vae_model=args.vae_model)
  pipe = at_length(pipe, args.max_sequence_length)
  weights = dict(pipe.params) | {"empty_ids": pipe.tokenize([""])}
  scale = 1.0
  if loras:
    adapted, scale = of.with_adapters(pipe, loras)
    weights |= adapted
  with families.opened(family, "--family"):
    model = of.model(pipe, lora_scale=scale, clip_skip=args.clip_skip, sampler=args.scheduler)
  model = at_trained_size(name, model)
  return model, jax.device_put(weights, everywhere), pipe.tokenize


def of_draw(args: argparse.Namespace, model: Model, tokenize: Callable[[list[str]], np.ndarray]) -> dict[str, Any]:
  """Returns the arguments of `drawing.draw` that the command's arguments set."""
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
    size=size_of(args, model) if args.height or args.width else None,
  )


def size_of(args: argparse.Namespace, model: Model) -> tuple[int, int]:
  """Returns the height and width that --height and --width ask for; the model's own by default.

  Raises:
    ValueError: the model cannot draw pictures of this size.
  """
  height, width = sides(model.image_size)
  height, width = args.height or height, args.width or width
  if args.height or args.width:
    try:
      model.latent_shape_for(height, width)
    except ValueError as error:
      given = [f"--{name}={getattr(args, name)}" for name in ("height", "width") if getattr(args, name)]
      raise ValueError(f"{' '.join(given)}: {error}") from error
  return height, width


def check_size(name: str, args: argparse.Namespace) -> tuple[int, int]:
  """Returns `size_of` from the model's configs alone, before its weights are read.

  Args:
    name: value of --model.
  Raises:
    ValueError: see `size_of`.
    FileNotFoundError: the model does not exist.
  """
  return size_of(args, without_weights(name, args))


def without_weights(name: str, args: argparse.Namespace) -> Model:
  """Returns a model that draws `trained_size`, from its configs alone.

  Args:
    name: value of --model.
  Raises:
    FileNotFoundError, ValueError: the model does not exist, or does not take --max_sequence_length or --karras.
  """
  family = families.of_run(name, args.family)
  of = families.get(family, "--family")
  with families.opened(family, "--family"):
    pipe = of.load(model_folder(name), dtype="float32", components=())
  pipe = at_length(pipe, args.max_sequence_length)
  with families.opened(family, "--family"):
    model = of.model(pipe, clip_skip=args.clip_skip)
  if args.karras and isinstance(model.process, RectifiedFlow):
    raise ValueError(f"--karras: {name} is a rectified flow, which has noise levels of its own; leave it out.")
  return at_trained_size(name, model)


def at_length(pipe: Any, length: int | None) -> Any:
  """Returns a pipeline that reads at most so many tokens of T5; None: as it is.

  Raises:
    ValueError: the pipeline has no `max_sequence_length`.
  """
  if length is None:
    return pipe
  if not hasattr(pipe, "max_sequence_length"):
    raise ValueError(
      f"--max_sequence_length={length} is for models with T5, which this one does not have; leave it out."
    )
  return dataclasses.replace(pipe, max_sequence_length=length)


def trained_size(name: str) -> tuple[int, int] | None:
  """Returns the height and width that a run was trained at; None if `name` is no run, or one at its model's own size.

  Args:
    name: as of --model; a run is named by its work folder or its export.
  """
  size = families.field_of_run(name, "image_size") if families.field_of_run(name, "objective") else None
  return sides(size) if size is not None and is_size(size) else None


def at_trained_size(name: str, model: Model) -> Model:
  """Returns the model, which draws `trained_size` where it does not say so itself: SDXL's, and exports of before."""
  size = trained_size(name)
  return model if size is None or not hasattr(model, "at_size") else model.at_size(*size)


def check(args: argparse.Namespace) -> None:
  """Raises for settings of `add_arguments` that cannot work."""
  arguments.check_seed(args)
  arguments.check_numbers(args, "seeds", most=MAX_SEEDS)
  arguments.check_numbers(args, "steps", most=MAX_STEPS)
  arguments.check_numbers(args, "batch_size", most=arguments.MAX_AT_A_TIME)
  arguments.check_numbers(args, "height", "width", most=MAX_PIXELS)
  arguments.check_numbers(args, "clip_skip", least=0)
  arguments.check_numbers(args, "max_sequence_length", most=sd3.MAX_SEQUENCE_LENGTH)
  for name in ("eta", "guidance_rescale"):
    if not 0.0 <= getattr(args, name) <= 1.0:
      raise ValueError(f"--{name}={getattr(args, name)}; expected 0 to 1.")
  if not 0.0 <= args.guidance_scale < math.inf:
    raise ValueError(f"--guidance_scale={args.guidance_scale}; expected a number of at least 0 (up to 1: no guidance).")
  if args.guidance_rescale and args.guidance_scale <= 1.0:
    raise ValueError(
      f"--guidance_rescale={args.guidance_rescale} changes guidance, which --guidance_scale={args.guidance_scale} "
      "switches off; leave it out, or set a scale above 1."
    )
  if args.negative_prompt:
    prompt_sets.check_prompt(args.negative_prompt, option="--negative_prompt")
  if args.scheduler == "ddim" and args.karras:
    raise ValueError("--karras is for --scheduler=dpmpp_2m; leave it out, or choose that.")
  if args.scheduler == "dpmpp_2m" and args.eta:
    raise ValueError(f"--eta={args.eta} is for --scheduler=ddim; dpmpp_2m is deterministic, leave it out.")


def model_folder(name: str) -> str:
  """Returns the model's name, or a run's exported model if the name is that of a work folder.

  A run or its export is told to use T5 as the run did, unless the name says otherwise.
  """
  model, other = loading.split_unet(name)
  if other:
    return loading.with_unet(model_folder(model), other)
  base, drop, length = loading.split_t5(name)
  folder = pathlib.Path(base)
  if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
    if (folder / "export").is_dir():
      folder = folder / "export"
    elif (folder / "checkpoints").is_dir():
      raise ValueError(
        f"--model={name} is a run without export/, which is written at its end; for its last checkpoint run "
        f"python -m jaxpref.export {name} --format=pipeline --out=NEW, and give that folder."
      )
  drop = drop or families.field_of_run(base, "drop_t5") is True
  of_run = families.field_of_run(base, "max_sequence_length")
  length = of_run if length is None and isinstance(of_run, int) else length
  return loading.with_t5(base if folder == pathlib.Path(base) else str(folder), drop=drop, length=length)
