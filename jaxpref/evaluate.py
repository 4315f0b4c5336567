"""Compares models by their pictures of the same prompts from the same seeds:

    python -m jaxpref.evaluate --models base=tiny-sd aligned=runs/spo_tiny --prompts=emoji --scorers judge tiny-clip

The first model is the one that the others are compared with. --out receives the pictures, their scores, tables
(Markdown, LaTeX, CSV, JSON) and report.html, a single file with intervals and the pictures side by side. The same
command continues an interrupted run; it fails while the first one still runs. Models and scorers can be added to a
finished one. All devices take part. Several processes, started as for training (docs/operations.md), share the work if
all of them see the disk of --out.
"""

import argparse
import concurrent.futures
import io
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from jaxpref import arguments
from jaxpref.config import Config
from jaxpref.data import emoji, lease, paths, prompt_sets
from jaxpref.devices import distributed, endings, sharding
from jaxpref.devices.progress import tqdm
from jaxpref.evaluation import comparison, drawing, settings
from jaxpref.evaluation import folder as evaluation_folder
from jaxpref.files import adapters, loading
from jaxpref.files import family as families
from jaxpref.recipes import places
from jaxpref.recipes.messages import listed
from jaxpref.recipes.sizes import sides
from jaxpref.rewards import published
from jaxpref.voting import blind_folder

Model = tuple[str, tuple[adapters.LoraFile, ...]]  # like --model and --lora of jaxpref.sample
IMAGES_AT_A_TIME = 256  # pictures read for scoring
WAIT_SECONDS = 24 * 3600.0  # for the pictures of other processes


# ---- Command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments and evaluates; an expected error ends the program with one sentence."""
  parser = make_parser()
  distributed.add_arguments(parser)
  args = parser.parse_args(argv)
  args.scorers = [name for spec in args.scorers for name in spec.split(",") if name]
  expected = (ValueError, OSError)
  with endings.one_sentence(
    *expected, doing=f"evaluating into {args.out}", again="run the same command again to continue"
  ):
    with distributed.joined(distributed.launch_of(args), args.out, expected=expected):
      evaluate(args)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the arguments that `evaluate` takes."""
  parser = arguments.Parser(prog="python -m jaxpref.evaluate", description=__doc__)
  add = parser.add_argument
  add(
    "--models",
    "--model",
    nargs="+",
    required=True,
    metavar="NAME=MODEL",
    help="folder, hub name, checkpoint file, shipped model or run; "
    "NAME=MODEL+a.safetensors:0.8+b.safetensors adds one LoRA at strength 0.8 and another at 1",
  )
  add(
    "--model_config",
    nargs="+",
    default=[],
    metavar="NAME=FOLDER",
    help="for a checkpoint file: a folder of config.json files with its topology, if that is not a published one",
  )
  add(
    "--unet_model",
    nargs="+",
    default=[],
    metavar="NAME=UNET",
    help="a UNet's folder, hub name or file, instead of that model's own",
  )
  add(
    "--prompts",
    type=arguments.place,
    required=True,
    help="emoji (the embedded test captions), emoji:SPLIT, or a file of prompts: docs/evaluation.md",
  )
  add("--prompts_kind", choices=prompt_sets.KINDS, help="format of the file (default: from its name and content)")
  add("--num_prompts", type=int, help="how many prompts to use, evenly spread (default: all)")
  add(
    "--scorers",
    nargs="+",
    default=["pickscore"],
    help=f"{', '.join(published.PUBLISHED)}; NAME=FOLDER for weights elsewhere; votes=FOLDER for the votes of "
    "jaxpref.blind; or your own MODULE:FUNCTION; separated by spaces or commas (default: %(default)s)",
  )
  add("--diversity", default=None, help="CLIP that measures how a prompt's pictures differ (default: one of --scorers)")
  add("--preferred_style", default="openmoji", help="style that the judge looks for (default: %(default)s)")
  add("--score_batch_size", type=int, default=32, help="pictures to score at a time (default: %(default)s)")
  settings.add_arguments(parser)
  add("--pictures", type=int, default=12, help="pictures in each section of report.html (default: %(default)s)")
  add(
    "--geneval_layout",
    "--geneval-layout",
    type=arguments.path,
    metavar="FOLDER",
    help="also write the pictures in the layout of GenEval's own scorer",
  )
  add("--out", type=arguments.path, default=pathlib.Path("evaluation"), help="a new folder, or one to continue")
  parser.set_defaults(set_aside=False)
  return parser


def arguments_of_run(config: Config, workdir: str) -> argparse.Namespace:
  """Returns the arguments that compare a finished run with its base model: config.evaluation, into WORKDIR/evaluation.

  Raises:
    ValueError, FileNotFoundError: the prompts or scorers do not exist.
  """
  e = config.evaluation
  prompts = f"emoji:{e.split}" if e.prompts == "emoji" else e.prompts
  command = ["--models", f"base={loading.model_name(config)}", f"aligned={workdir}", "--prompts", prompts, "--scorers"]
  command += [name.strip() for name in e.scorers.split(",")]
  command += [f"--vae_model={config.vae_model}"] if config.vae_model else []
  command += [f"--diversity={e.diversity}"] if e.diversity else []
  fields: dict[str, Any] = {"family": config.family}
  fields |= {"seeds": e.seeds_per_prompt, "seed": e.seed, "steps": e.num_inference_steps, "eta": e.eta}
  fields |= {"guidance_scale": e.guidance_scale, "batch_size": e.batch_size, "dtype": config.dtype}
  fields |= {"preferred_style": config.data.preferred_style, "out": pathlib.Path(workdir) / "evaluation"}
  if config.image_size is not None:
    fields["height"], fields["width"] = sides(config.image_size)
  if e.num_prompts:  # 0: all
    fields["num_prompts"] = min(e.num_prompts, len(read_prompts(prompts)))
  args = make_parser().parse_args(command + [f"--{name}={value}" for name, value in fields.items()])
  args.set_aside = True  # an older evaluation, of a run that was continued since or changed
  check(args)
  return args


def check(args: argparse.Namespace) -> tuple[dict[str, Model], list[prompt_sets.Prompt]]:
  """Returns the models and prompts asked for; raises for what cannot work before anything is loaded.

  Raises:
    ValueError, FileNotFoundError: one sentence with the argument, its value and what was expected.
  """
  settings.check(args)
  arguments.check_numbers(args, "score_batch_size", most=arguments.MAX_AT_A_TIME)
  arguments.check_numbers(args, "pictures")
  models = with_unets(with_configs(parse_models(args.models), args.model_config), args.unet_model)
  prompts = read_prompts(args.prompts, kind=args.prompts_kind, count=args.num_prompts)
  drawing.check_count(len(prompts), args.seeds)
  names = [spec.partition("=")[0] for spec in args.scorers]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"--scorers names {name} twice; scores are stored by name, so give it once.")
  if args.diversity is not None and args.diversity.partition("=")[0] not in published.CLIPS:
    raise ValueError(f"--diversity={args.diversity}; expected one of {', '.join(published.CLIPS)}, or NAME=FOLDER.")
  for spec in (*args.scorers, *filter(None, [args.diversity])):
    if blind_folder.is_scorer(spec):
      blind_folder.check_scorer(spec)
    else:
      published.check(spec, preferred_style=args.preferred_style)
  return models, prompts


def evaluate(args: argparse.Namespace) -> None:
  """Draws, scores, writes, and prints the table. JAX processes share the work."""
  models, prompts = check(args)
  sizes = check_sizes(models, args)
  if args.geneval_layout:
    prompt_sets.check_geneval(prompts)
  if args.out.exists() and not args.out.is_dir():
    raise ValueError(f"--out={args.out} is a file; name a folder.")
  if args.geneval_layout:
    paths.check_writable(args.geneval_layout, "--geneval_layout")
  with lease.hold(args.out) as held:
    _evaluate(args, models, prompts, sizes, held)


def _evaluate(
  args: argparse.Namespace,
  models: dict[str, Model],
  prompts: list[prompt_sets.Prompt],
  sizes: dict[str, list[int]],
  held: lease.Held,
) -> None:
  """Does the work of `evaluate` in a folder that only this run writes."""
  folder, first = args.out, jax.process_index() == 0
  if not first:
    distributed.barrier("evaluation: the folder is begun")
    if not (folder / "manifest.json").is_file():
      raise ValueError(f"this host does not see {folder}, which another host has begun; use a disk that all hosts see.")
  asked = evaluation_folder.make_manifest(args, models, prompts, sizes)
  if first and args.set_aside and (aside := evaluation_folder.set_aside(folder, asked, held)) is not None:
    print(f"{folder} held results of other weights or settings; they are in {aside} now", file=sys.stderr)
  manifest = evaluation_folder.open_folder(folder, asked)
  if first:
    distributed.barrier("evaluation: the folder is begun")
  mesh = sharding.make_mesh(devices=jax.local_devices())

  # ---- Pictures
  for name, model in models.items():
    held.check()
    draw_missing(folder, name, model, prompts, args, mesh)
  distributed.barrier("evaluation: the pictures are there", seconds=WAIT_SECONDS)

  # ---- Scores
  described, found = score_missing(list(models), prompts, args, mesh, held)
  results: dict[str, Any] = {
    "models": list(models),
    "baseline": next(iter(models)) if len(models) > 1 else None,
    "prompts": [{"text": p.text, "category": p.category, "id": p.id} for p in prompts],
    "seeds_per_prompt": args.seeds,
    "settings": manifest["settings"] | {"models": manifest["models"], "versions": manifest["versions"]},
    "scorers": described,
    "scores": found,
  }
  clip = args.diversity or next((s for s in args.scorers if s.partition("=")[0] in published.CLIPS), None)
  if clip is not None and args.seeds > 1:
    results["settings"]["diversity"] = f"mean of 1 - cosine between the pictures of a prompt, by {clip}"
    embed = published.image_embedder(clip, batch_size=args.score_batch_size, mesh=mesh)
    results["diversity"] = {name: image_diversity(folder, name, embed, len(prompts), args.seeds) for name in models}

  # ---- Files
  held.check()
  if first:
    write_files(folder, results, prompts, args)
    print(f"{(folder / 'table.md').read_text(encoding='utf-8')}\n{folder / 'report.html'}")
  distributed.barrier("evaluation: the files are written")


def write_files(
  folder: pathlib.Path, results: dict[str, Any], prompts: Sequence[prompt_sets.Prompt], args: argparse.Namespace
) -> None:
  """Writes the tables, the page, and GenEval's folders."""
  place = lambda model, p, s: evaluation_folder.image_file(folder, model, p, s)
  comparison.write(folder, results, place, pictures=args.pictures)
  for name in results["models"] if args.geneval_layout else ():
    of_prompt = lambda p, name=name: [evaluation_folder.image_file(folder, name, p, s) for s in range(args.seeds)]
    prompt_sets.geneval_layout(args.geneval_layout / name, prompts, of_prompt)


# ---- What is asked for -----------------------------------------------------------------------------------------------


def parse_models(specs: Sequence[str]) -> dict[str, Model]:
  """Reads NAME=MODEL or NAME=MODEL+FILE.safetensors[:STRENGTH]+... into {name: (model, its LoRAs)}, in order.

  Raises:
    ValueError: a name is missing, cannot name a folder or is given twice, or a strength is not a number.
    FileNotFoundError: a LoRA does not exist.
  """
  found: dict[str, Model] = {}
  for spec in specs:
    name, equals, source = spec.partition("=")
    if not equals or not source:
      raise ValueError(f"--models {spec!r}; expected NAME=MODEL, such as base=tiny-sd.")
    if not re.fullmatch(r"[\w][\w.\- ]*", name):
      raise ValueError(f"--models {spec!r}: the name becomes a folder's; use letters, digits, dots, dashes.")
    if name in found:
      raise ValueError(f"--models names {name!r} twice; give each model its own name.")
    loras: list[adapters.LoraFile] = []
    # A checkpoint's own name may contain a plus, and a UNet may be a file.
    while not pathlib.Path(source).is_file() and (
      part := re.fullmatch(rf"(.+)(?!{re.escape(loading.UNET)})\+([^+]*\.safetensors(?::[^+/]*)?)", source)
    ):
      source = part[1]
      loras.insert(0, adapters.parse_lora_file(part[2]))
      if not loras[0].path.is_file():
        raise FileNotFoundError(
          f"--models {spec!r}: there is no file {loras[0].path}; give a LoRA of diffusers, PEFT or kohya."
        )
    found[name] = (places.expand(source), tuple(loras))
  return found


def with_unets(models: dict[str, Model], specs: Sequence[str]) -> dict[str, Model]:
  """Returns the models of `parse_models`, with other UNets for those named as NAME=UNET.

  Raises:
    ValueError: no model has the name, or it is given twice.
  """
  found = dict(models)
  for name, other in _by_name("--unet_model", "UNET", models, specs):
    source, loras = found[name]
    if loading.split_unet(source)[1]:
      raise ValueError(f"--unet_model {name}={other}: {name} already has another UNet; give each model one.")
    found[name] = (loading.with_unet(source, other), loras)
  return found


def with_configs(models: dict[str, Model], specs: Sequence[str]) -> dict[str, Model]:
  """Returns the models of `parse_models`, with topologies for those named as NAME=FOLDER; raises as `with_unets`."""
  found = dict(models)
  for name, folder in _by_name("--model_config", "FOLDER", models, specs):
    source, loras = found[name]
    if loading.split_config(source)[1]:
      raise ValueError(f"--model_config {name}={folder}: {name} already has one; give each model one.")
    found[name] = (loading.with_config(source, folder), loras)
  return found


def _by_name(option: str, what: str, models: dict[str, Model], specs: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields the two halves of each NAME=WHAT; raises ValueError for a name that no model has."""
  for spec in specs:
    name, equals, value = spec.partition("=")
    if not equals or not value or name not in models:
      raise ValueError(f"{option} {spec!r}; expected NAME={what} with the name of a model, one of {listed(models)}.")
    yield name, places.expand(value)


def read_prompts(name: str, *, kind: str | None = None, count: int | None = None) -> list[prompt_sets.Prompt]:
  """Returns `count` evenly spread prompts: embedded captions ("emoji" or "emoji:SPLIT"), or those of a file."""
  source, _, split = name.partition(":")
  if source == "emoji":
    prompts = [prompt_sets.Prompt(e.caption, e.group, e.id) for e in emoji.load_index("core", split or "test")]
  else:
    prompts = prompt_sets.read(name, kind=kind)
  if count is not None:
    if not 1 <= count <= len(prompts):
      raise ValueError(f"--num_prompts={count}; {name} has {len(prompts)}, expected 1 to {len(prompts)}.")
    prompts = [prompts[i] for i in np.linspace(0, len(prompts) - 1, count).round().astype(int)]
  return prompts


def check_sizes(models: dict[str, Model], args: argparse.Namespace) -> dict[str, list[int]]:
  """Returns height and width of each model's pictures, from its configs alone.

  Where models differ and the runs among them were trained at one size, all draw at that: it becomes `args.height` and
  `args.width`.

  Raises:
    ValueError: they differ, so pictures cannot be compared; or a model cannot draw them.
    FileNotFoundError: a model, a LoRA or the VAE does not exist.
  """
  found = {}
  for name, (source, loras) in models.items():
    of = families.get(families.of_run(source, args.family), "--family")
    files = [file for file, _ in loras]
    families.look_for(of, settings.model_folder(source), vae_model=args.vae_model, loras=files)
    found[name] = list(settings.check_size(source, args))
  trained = {tuple(found[name]): name for name, (source, _) in models.items() if settings.trained_size(source)}
  if len(set(map(tuple, found.values()))) > 1 and len(trained) == 1 and not (args.height or args.width):
    ((args.height, args.width), run) = next(iter(trained.items()))
    if jax.process_index() == 0:
      print(f"all models draw {args.height} x {args.width} pixels, which {run} was trained at", file=sys.stderr)
    found = {name: list(settings.check_size(source, args)) for name, (source, _) in models.items()}
  first = next(iter(found))
  for name, size in found.items():
    if size != found[first]:
      raise ValueError(
        f"{first} draws {' x '.join(map(str, found[first]))} pixels and {name} {' x '.join(map(str, size))}; set "
        "--height and --width, or compare models of one size."
      )
  return found


# ---- Pictures -----------------------------------------------------------------------------------------------------


def draw_missing(
  folder: pathlib.Path,
  name: str,
  model: Model,
  prompts: Sequence[prompt_sets.Prompt],
  args: argparse.Namespace,
  mesh: Mesh,
) -> None:
  """Draws a model's pictures that are missing from the folder or damaged, and forgets the scores of the old ones.

  Each process looks after its own share of the pictures.
  """
  files = [evaluation_folder.image_file(folder, name, p, s) for p in range(len(prompts)) for s in range(args.seeds)]
  mine = own_share(len(files))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    missing = mine[~np.asarray(list(pool.map(evaluation_folder.is_whole, [files[i] for i in mine])), bool)]
  if not missing.size:
    return
  module, params, tokenize = settings.load(*model, args, mesh)
  if missing.size < mine.size:
    print(f"{name}: {mine.size - missing.size} of {mine.size} pictures are there", file=sys.stderr)
  batches = drawing.draw(
    module,
    params,
    tokenize([p.text for p in prompts]),
    batch_size=min(args.batch_size, mine.size),
    progress=f"{name}: {len(prompts)} prompts x {args.seeds} seeds" if jax.process_index() == 0 else None,
    mesh=mesh,
    numbers=missing,
    **settings.of_draw(args, module, tokenize),
  )
  evaluation_folder.forget_scores(folder, name)  # of the old pictures
  with paths.cannot_be_written(folder):
    files[0].parent.mkdir(parents=True, exist_ok=True)
  for numbers, images in batches:
    for number, image in zip(numbers, images, strict=True):
      encoded = io.BytesIO()
      Image.fromarray(image).save(encoded, format="PNG")
      paths.write(files[number], encoded.getvalue())


# ---- Scores ----------------------------------------------------------------------------------------------------------


def own_share(count: int) -> np.ndarray:
  """Returns i64[n]: the numbers below `count` that this process works on."""
  return np.arange(jax.process_index(), count, jax.process_count())


def shared(count: int, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """Returns f32[count], `compute` of all numbers below `count`; each process computes its share."""
  values = np.asarray(compute(own_share(count)), np.float32)
  if jax.process_count() == 1:
    return values
  padded = np.full(-(-count // jax.process_count()), np.nan, np.float32)
  padded[: values.size] = values
  return multihost_utils.process_allgather(padded).T.ravel()[:count]


def score_images(
  folder: pathlib.Path, model: str, scorer: published.Scorer, prompts: Sequence[prompt_sets.Prompt], seeds: int
) -> np.ndarray:
  """Returns f64[P, S], the scores of a model's pictures."""

  def compute(numbers: np.ndarray) -> np.ndarray:
    found = [np.zeros(0, np.float32)]
    silent = jax.process_index() > 0
    with tqdm(total=numbers.size, desc=f"{scorer.name}: {model}", unit=" pictures", disable=silent) as bar:
      for start in range(0, numbers.size, IMAGES_AT_A_TIME):
        part = [divmod(int(n), seeds) for n in numbers[start : start + IMAGES_AT_A_TIME]]
        files = [evaluation_folder.image_file(folder, model, p, s) for p, s in part]
        images = [evaluation_folder.read_image(file) for file in files]
        found.append(scorer.score(images, [prompts[p].text for p, _ in part]))
        bar.update(len(part))
    return np.concatenate(found)

  return shared(len(prompts) * seeds, compute).astype(np.float64).reshape(len(prompts), seeds)


def score_missing(
  models: Sequence[str],
  prompts: Sequence[prompt_sets.Prompt],
  args: argparse.Namespace,
  mesh: Mesh,
  held: lease.Held,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
  """Scores the models' pictures with each scorer, except where the folder already has the scores.

  Returns:
    The name, version and scale of each scorer; and the scores by model and scorer, as lists [P][S].
  """
  described: list[dict[str, Any]] = []
  found: dict[str, dict[str, Any]] = {name: {} for name in models}
  for spec in args.scorers:
    # In float32, whatever dtype the pictures were drawn in: bfloat16 gives other scores.
    if blind_folder.is_scorer(spec):
      scorer = blind_folder.load_scorer(spec)
    else:
      scorer = published.load(spec, batch_size=args.score_batch_size, mesh=mesh, preferred_style=args.preferred_style)
    described.append({"name": scorer.name, "version": scorer.version, "scale": scorer.scale})
    known = {"version": scorer.version, "scale": scorer.scale}
    for name in models:
      scores = evaluation_folder.read_scores(args.out, name, scorer.name, known)
      if scores is None:
        scores = score_images(args.out, name, scorer, prompts, args.seeds).tolist()
        held.check()
        if jax.process_index() == 0:
          evaluation_folder.write_scores(args.out, name, scorer.name, known, scores)
      found[name][scorer.name] = scores
  return described, found


def image_diversity(folder: pathlib.Path, model: str, embed: Any, num_prompts: int, seeds: int) -> list[float]:
  """Returns the diversity of each prompt's pictures: see `published.diversity`."""
  at_a_time = max(1, IMAGES_AT_A_TIME // seeds)

  def compute(numbers: np.ndarray) -> np.ndarray:
    found = [np.zeros(0, np.float32)]
    for start in range(0, numbers.size, at_a_time):
      part = numbers[start : start + at_a_time]
      files = [evaluation_folder.image_file(folder, model, p, s) for p in part for s in range(seeds)]
      images = [evaluation_folder.read_image(file) for file in files]
      found.append(published.diversity(embed(images).reshape(len(part), seeds, -1)))
    return np.concatenate(found)

  return shared(num_prompts, compute).tolist()


if __name__ == "__main__":
  main()
