"""Draws pairs of pictures for prompts, to train on once a person or a reward has said which picture is better.

    python -m jaxpref.pairs --model=tiny-sd --prompts=emoji:train --seeds=4 --out=pairs --label=tiny-clip
    python -m jaxpref.main --config=configs/dpo_tiny.py --config.data.source=pairs_file --config.data.path=pairs

With --round=next the pictures of a newer model become a further round, in a folder of its own inside --out, and
jaxpref.vote shows people all rounds.

With --other_model a pair has one picture of each model, such as the base model and the aligned one. --label may also
come later, and again with another reward: --out and --label alone draw nothing. The same command continues an
interrupted run and gives the same files; it fails while the first one still runs. All devices take part. Several
processes, started as for training (docs/operations.md), share the work if all of them see the disk of --out.

--out receives images/, settings.json (what they were drawn with), pictures.jsonl (for each picture its prompt, its
model, and the seed and number of its initial noise) and pairs.jsonl, the `pairs_file` to train on; with --label also
scores.jsonl and labels.json. See docs/data.md.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jaxpref import arguments, evaluate
from jaxpref.data import labels, lease, paths, prompt_sets
from jaxpref.data.files import PAIRS_NAME
from jaxpref.devices import distributed, endings, sharding
from jaxpref.devices.progress import tqdm
from jaxpref.evaluation import drawing, settings
from jaxpref.evaluation import folder as evaluation_folder
from jaxpref.files import adapters, loading
from jaxpref.recipes.sections import MAX_COUNT
from jaxpref.rewards import published, scorers
from jaxpref.voting import rounds

SETTINGS, PICTURES, SCORES, LABELS = "settings.json", "pictures.jsonl", "scores.jsonl", "labels.json"
NOISES = ("different", "same")
OF_LABELS = ("label_kind", "min_gap", "pairing", "preferred_style", "score_batch_size")
LABELS_ALONE = (
  "label",
  "out",
  "round",
  *OF_LABELS,
  "distributed",
  "coordinator_address",
  "num_processes",
  "process_id",
)
IMAGES_AT_A_TIME = 256  # pictures each process reads for scoring
SAVE_SECONDS = 60.0  # between two writes of the scores so far
MAX_ROUNDS = 10_000
ROUND_SEED = 100_003  # between the seeds of two rounds, so that rounds of one --seed share no noise


# ---- Command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments, draws and labels; an expected error ends the program with one sentence."""
  parser = make_parser()
  args = parser.parse_args(argv)
  args.changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
  expected = (ValueError, OSError)
  with endings.one_sentence(
    *expected, doing=f"making pairs in {args.out}", again="run the same command again to continue"
  ):
    with distributed.joined(distributed.launch_of(args), args.out, expected=expected):
      make_pairs(args)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the arguments that `make_pairs` takes."""
  parser = arguments.Parser(prog="python -m jaxpref.pairs", description=__doc__)
  add = parser.add_argument
  what = "folder, hub name, shipped model or run"
  add("--model", type=arguments.place, default="tiny-sd", help=f"{what} (default: %(default)s)")
  add("--model_config", type=arguments.place, help="for a --model in one file: a folder with its topology")
  add("--unet_model", type=arguments.place, help="a UNet's folder or hub name, instead of the model's own")
  loras: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "FILE[:STRENGTH]"}
  add("--lora", **loras, help=".safetensors files of diffusers, PEFT or kohya; a.safetensors:0.8 has strength 0.8")
  add("--other_model", type=arguments.place, help=f"{what} that draws the second picture of each pair (default: none)")
  add("--other_model_config", type=arguments.place, help="like --model_config, for --other_model")
  add("--other_unet_model", type=arguments.place, help="like --unet_model, for --other_model")
  add("--other_lora", **loras, help="like --lora, for --other_model")
  add(
    "--prompts",
    type=arguments.place,
    help="emoji (the embedded test captions), emoji:SPLIT, or a file of prompts: docs/evaluation.md; without it "
    "nothing is drawn and --label labels the pictures in --out",
  )
  add(
    "--prompts_kind", choices=prompt_sets.KINDS, help="format of the file (default: detected from its name and content)"
  )
  add("--num_prompts", type=int, help="how many prompts to use, evenly spread (default: all)")
  add(
    "--noise",
    choices=NOISES,
    default=NOISES[0],
    help="same: both pictures of a pair start from one noise, with two models the i-th of each; with one model all "
    "pictures of a prompt do, and differ by --eta alone (default: %(default)s)",
  )
  settings.add_arguments(parser)
  add("--out", type=arguments.path, required=True, help="a new folder, or one to continue or label")
  add(
    "--round",
    metavar="N",
    help="keep rounds apart: draw or label round N in OUT/round_N, from its own noise; next: the last round if it is "
    "not complete, else a new one. --model may then be a folder of runs, for the newest finished one (default: one "
    "round, in OUT itself)",
  )
  _add_label_arguments(parser)
  distributed.add_arguments(parser)
  return parser


def _add_label_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument_group("labels by a reward").add_argument
  add(
    "--label",
    metavar="REWARD",
    help=f"{', '.join(published.PUBLISHED)}; preference_model=FOLDER, a step-aware model; NAME=FOLDER for weights "
    "elsewhere; your own package.module:function; or a sum such as pickscore:1,aesthetic:0.1, in logits",
  )
  add("--label_kind", choices=labels.KINDS, default="hard", help="soft: probabilities (default: %(default)s)")
  add(
    "--min_gap",
    type=float,
    default=0.0,
    help="pairs whose two probabilities differ by no more than this, 0 to 1, are ties: dpo leaves them out, spm learns "
    "equal scores from them (default: %(default)s, equal scores alone)",
  )
  add(
    "--pairing",
    choices=labels.PAIRINGS,
    default=labels.PAIRINGS[0],
    help="best_worst: for each prompt the pair whose scores differ most (default: %(default)s)",
  )
  add("--preferred_style", default="openmoji", help="style that the judge looks for (default: %(default)s)")
  add("--score_batch_size", type=int, default=32, help="pictures to score at a time (default: %(default)s)")


@dataclasses.dataclass(frozen=True)
class Asked:
  """What to draw.

  Attributes:
    models: one or two, by name, see `evaluate.Model`.
    prompts: P texts.
    sizes: height and width of the pictures of each model.
  """

  models: dict[str, evaluate.Model]
  prompts: list[prompt_sets.Prompt]
  sizes: dict[str, list[int]]


def check(args: argparse.Namespace) -> Asked | None:
  """Returns what to draw, None for nothing; raises for what cannot work before anything is loaded.

  Raises:
    ValueError, FileNotFoundError: one sentence with the argument, its value and what was expected.
  """
  if args.label is None and (given := [name for name in OF_LABELS if name in args.changed]):
    raise ValueError(f"--{given[0]} is for labels by a reward; add --label=REWARD, or leave it out.")
  if not 0.0 <= args.min_gap < 1.0:
    raise ValueError(f"--min_gap={args.min_gap}; expected at least 0 and below 1, a difference of probabilities.")
  arguments.check_numbers(args, "score_batch_size", most=arguments.MAX_AT_A_TIME)
  asked = None
  if args.prompts is not None:
    asked = _check_drawing(args)
  elif given := [name for name in args.changed if name not in LABELS_ALONE]:
    raise ValueError(f"--{given[0]} is for drawing, which needs --prompts; add it, or leave out --{given[0]}.")
  elif args.label is None:
    raise ValueError("--prompts is missing; name what to draw, or give --label to label what --out holds.")
  elif not (args.out / PICTURES).is_file():
    raise ValueError(_without_pictures(args.out))
  if args.label is not None:
    _refuse_own_labels(args.out)
    scorers.check(args.label, given=f"--label={args.label!r}", preferred_style=args.preferred_style)
  return asked


def _without_pictures(folder: pathlib.Path) -> str:
  """Returns a sentence on a folder that cannot be labelled."""
  if not folder.exists():
    return f"--out={folder} does not exist; name a folder of pairs, or add --prompts to draw them."
  if begun := rounds.numbers(folder):
    return f"--out={folder} holds rounds of pairs; add --round={begun[-1]} or another number, to label that one."
  return (
    f"--out={folder} has no {PICTURES}, so its pictures are not complete; finish them with the command that drew them, "
    "with --prompts and the other settings."
  )


def _refuse_own_labels(folder: pathlib.Path) -> None:
  """Raises ValueError if pairs.jsonl says `preferred`, as a person writes it and `write_pairs` does not."""
  file = folder / PAIRS_NAME
  try:
    own = any("preferred" in row for row in _read_rows(file)) if file.is_file() else False
  except (ValueError, TypeError):  # not whole: it is written again
    own = False
  if own:
    raise ValueError(
      f"{file} has labels that are no reward's (preferred), which --label would replace; move the file to another name "
      "first, or train on it as it is."
    )


def _check_drawing(args: argparse.Namespace) -> Asked:
  settings.check(args)
  two = args.other_model is not None
  for name in ("other_model_config", "other_unet_model", "other_lora"):
    if getattr(args, name) and not two:
      raise ValueError(f"--{name} is for --other_model; name that model too.")
  if args.seeds < 2 and not two:
    raise ValueError(f"--seeds={args.seeds}; expected at least 2, or --other_model: a pair has two pictures.")
  if args.noise == "same" and not two and not args.eta:
    raise ValueError(
      "--noise=same without --other_model makes all pictures of a prompt the same; add --eta=1, or draw from different "
      "noise."
    )
  for option in ("lora", "other_lora"):
    for file, _ in map(adapters.parse_lora_file, getattr(args, option)):
      if not file.is_file():
        raise FileNotFoundError(f"--{option}: there is no file {file}; give a LoRA of diffusers, PEFT or kohya.")
  models = {"model": _model(args.model, args.model_config, args.unet_model, args.lora)}
  if two:
    models["other"] = _model(args.other_model, args.other_model_config, args.other_unet_model, args.other_lora)
  prompts = evaluate.read_prompts(args.prompts, kind=args.prompts_kind, count=args.num_prompts)
  drawing.check_count(len(models) * len(prompts), args.seeds)
  of_prompt = args.seeds**2 if two else args.seeds * (args.seeds - 1) // 2
  if len(prompts) * of_prompt > MAX_COUNT:
    raise ValueError(
      f"--seeds={args.seeds}: {len(prompts)} prompts make more than {MAX_COUNT} pairs; reduce --seeds or the prompts."
    )
  if args.out.exists() and not args.out.is_dir():
    raise ValueError(f"--out={args.out} is a file; name a folder.")
  sizes = evaluate.check_sizes(models, args)
  return Asked(models, prompts, sizes)


def _model(name: str, topology: str | None, denoiser: str | None, loras: Sequence[str]) -> evaluate.Model:
  return loading.with_unet(loading.with_config(name, topology), denoiser), tuple(map(adapters.parse_lora_file, loras))


def make_pairs(args: argparse.Namespace, *, quiet: bool = False) -> None:
  """Draws pictures, and labels them if a reward is given. JAX processes share the work.

  Args:
    args: of `make_parser`, and `changed`, the names of those that were given.
    quiet: whether not to say at the end what was made.
  """
  if args.round is not None:
    _enter_round(args)
  asked = check(args)
  with lease.hold(args.out) as held:
    mesh = sharding.make_mesh(devices=jax.local_devices())
    if asked is not None:
      draw(args, asked, mesh, held)
    if args.label is not None:
      label(args, mesh, held)
  if jax.process_index() == 0 and not quiet:
    print(_ending(args))
  distributed.barrier("pairs: the end")


def _enter_round(args: argparse.Namespace) -> None:
  """Makes --out the folder of the round, --seed one of its own, and --model the newest run of a folder of runs.

  Raises:
    ValueError, FileNotFoundError: there is no such round to draw, or no finished run.
  """
  given = str(args.round)
  if given == "next" and jax.process_count() > 1:
    raise ValueError("--round=next is for one process; name the number of the round, the same for all processes.")
  if given == "next" and args.prompts is None:
    raise ValueError("--round=next is for drawing, which needs --prompts; name the number of the round to label.")
  if given != "next" and not (re.fullmatch("[0-9]{1,9}", given) and int(given) < MAX_ROUNDS):
    raise ValueError(f"--round={given}; expected next, or a number from 0 to {MAX_ROUNDS - 1}.")
  if (args.out / SETTINGS).is_file():
    raise ValueError(f"--out={args.out} holds pairs that are no round; keep rounds in another folder.")
  number = rounds.next_number(args.out) if given == "next" else int(given)
  begun = rounds.numbers(args.out)
  following = begun[-1] + 1 if begun else 0  # one may have been removed
  if number > following:
    raise ValueError(f"--round={number}: {args.out} has {len(begun)} rounds; the next one is {following}.")
  args.out = rounds.folder_of(args.out, number)
  args.seed = args.seed + ROUND_SEED * number
  if args.prompts is not None:
    args.model = _newest(args.model)


def _newest(model: str) -> str:
  """Returns the newest finished run of a folder of runs; any other model as it is."""
  folder = pathlib.Path(model)
  if folder.is_dir() and not any((folder / name).exists() for name in ("model_index.json", "config.json")):
    model = str(rounds.newest_run(folder))
    print(f"--model is {model}, the newest run", file=sys.stderr)
  return model


def _ending(args: argparse.Namespace) -> str:
  if args.label is None and not (args.out / LABELS).is_file():
    return f"{args.out}: no labels yet; python -m jaxpref.pairs --out={args.out} --label=REWARD"
  file = args.out / LABELS
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
    told = f"{found['pairs']} pairs, {found['ties']} of them ties, by {found['reward']}"
    if found["ties"] == found["pairs"]:
      told += ": dpo can learn nothing from them, so lower --min_gap or choose another reward"
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{file} cannot be read ({error!r}); delete it, and --label makes it again.") from error
  return f"{args.out}: {told}; train with --config.data.source=pairs_file --config.data.path={args.out}"


# ---- Pictures ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picture:
  """A row of pictures.jsonl, in the order of prompts, then models, then pictures.

  Attributes:
    image: its file, relative to the folder.
    caption: its prompt.
    prompt: the number of its prompt.
    model: "model" or "other".
    seed, number: of its initial noise, see `drawing.prior_noise`.
  """

  image: str
  caption: str
  prompt: int
  model: str
  seed: int
  number: int


def draw(args: argparse.Namespace, asked: Asked, mesh: Mesh, held: lease.Held) -> None:
  """Draws what the folder lacks, and writes its list of pictures and the pairs without labels."""
  folder, first = args.out, jax.process_index() == 0
  if not first:
    distributed.barrier("pairs: the folder is begun")
    if not (folder / SETTINGS).is_file():
      raise ValueError(f"this host does not see {folder}, which another host has begun; use a disk that all hosts see.")
  manifest = evaluation_folder.make_manifest(args, asked.models, asked.prompts, asked.sizes)
  manifest["settings"] |= {"noise": args.noise, "models": list(asked.models)}
  evaluation_folder.open_folder(folder, manifest, SETTINGS)
  if first:
    _remove_parts(folder)
    distributed.barrier("pairs: the folder is begun")
  for place in range(len(asked.models)):
    held.check()
    _draw_missing(args, asked, place, mesh)
  distributed.barrier("pairs: the pictures are there", seconds=evaluate.WAIT_SECONDS)
  held.check()
  if first:
    pictures = _pictures(args, asked)
    _write_rows(folder / PICTURES, map(dataclasses.asdict, pictures))
    # Those that are there may have labels. Those that are to be labelled come with their labels: until then a round is
    # not complete, and --round=next goes on with it.
    if args.label is None and not (folder / PAIRS_NAME).is_file():
      write_pairs(folder, pictures, all_pairs(folder, pictures).reshape(-1, 2))
  distributed.barrier("pairs: the list of pictures is there")


def _numbers(args: argparse.Namespace, asked: Asked, place: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns i64[P * K] for a model's pictures, by prompt: the numbers they are drawn by, and those of their noise."""
  own = np.arange(len(asked.prompts) * args.seeds)
  if args.noise == "different":
    own = own + place * own.size
  return own, own // args.seeds if _shares_noise(args) else own


def _shares_noise(args: argparse.Namespace) -> bool:
  """Returns whether all pictures of a prompt start from one noise."""
  return args.noise == "same" and args.other_model is None


def _pictures(args: argparse.Namespace, asked: Asked) -> list[Picture]:
  noises = [_numbers(args, asked, place)[1] for place in range(len(asked.models))]
  return [
    Picture(
      image=evaluation_folder.image_file(pathlib.Path(), name, p, i).as_posix(),
      caption=prompt.text,
      prompt=p,
      model=name,
      seed=args.seed,
      number=int(noise[p * args.seeds + i]),
    )
    for p, prompt in enumerate(asked.prompts)
    for name, noise in zip(asked.models, noises, strict=True)
    for i in range(args.seeds)
  ]


def _draw_missing(args: argparse.Namespace, asked: Asked, place: int, mesh: Mesh) -> None:
  """Draws a model's pictures that are missing from the folder or damaged; each process draws its own share.

  If one picture of a batch is missing, the whole batch is drawn, so that every picture comes from the same batch as in
  an uninterrupted run and is the same to the bit.
  """
  name = list(asked.models)[place]
  file = lambda n: evaluation_folder.image_file(args.out, name, *divmod(int(n), args.seeds))
  mine = evaluate.own_share(len(asked.prompts) * args.seeds)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    lacks = ~np.asarray(list(pool.map(lambda n: evaluation_folder.is_whole(file(n)), mine)), bool)
  if not lacks.any():
    return
  module, params, tokenize = settings.load(*asked.models[name], args, mesh)
  if not lacks.all():
    print(f"{name}: {mine.size - lacks.sum()} of {mine.size} pictures already drawn", file=sys.stderr)
  unit = sharding.batch_devices(mesh)
  batch = -(-min(args.batch_size, mine.size) // unit) * unit
  parts = [mine[i : i + batch] for i in range(0, mine.size, batch) if lacks[i : i + batch].any()]
  numbers, _ = _numbers(args, asked, place)
  ids = tokenize([p.text for p in asked.prompts])
  drawn = drawing.draw(
    module,
    params,
    np.concatenate([ids] * (place + 1)),  # the second model's numbers follow those of the first
    batch_size=batch,
    progress=f"{name}: {len(asked.prompts)} prompts x {args.seeds} seeds" if jax.process_index() == 0 else None,
    mesh=mesh,
    numbers=numbers[np.concatenate(parts)],
    share_noise=args.seeds if _shares_noise(args) else 1,
    **settings.of_draw(args, module, tokenize),
  )
  with paths.cannot_be_written(args.out):
    file(0).parent.mkdir(parents=True, exist_ok=True)
  missing = set(mine[lacks].tolist())
  for found, images in drawn:
    for number, image in zip(found - numbers[0], images, strict=True):
      if int(number) in missing:
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, format="PNG")
        paths.write(file(number), encoded.getvalue())


def _remove_parts(folder: pathlib.Path) -> None:
  """Removes files that a killed run did not finish writing."""
  with paths.cannot_be_written(folder):
    for place in (folder, *folder.glob("images/*")):
      for part in place.glob(f".*{paths.PART}"):
        part.unlink(missing_ok=True)


# ---- The folder's files ------------------------------------------------------------------------------------------


def _write_rows(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  paths.write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _read_rows(file: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a file of JSON objects, one a line; raises ValueError or TypeError if it is something else."""
  rows = [json.loads(line) for line in paths.lines(file.read_text(encoding="utf-8")) if line.strip()]
  return [dict(row) for row in rows]


def read_pictures(folder: pathlib.Path) -> list[Picture]:
  """Reads pictures.jsonl.

  Raises:
    ValueError: the file does not have that form.
    OSError: the file does not exist.
  """
  file = folder / PICTURES
  try:
    pictures = [Picture(**row) for row in _read_rows(file)]
    for n, picture in enumerate(pictures):
      texts = (picture.image, picture.caption, picture.model)
      numbers = (picture.prompt, picture.seed, picture.number)
      if not all(isinstance(v, str) for v in texts) or not all(isinstance(v, int) for v in numbers):
        raise ValueError(f"picture {n} is {dataclasses.asdict(picture)}")
  except (ValueError, TypeError) as error:
    raise ValueError(f"{file} cannot be read ({error}); draw into a new folder.") from error
  return pictures


def all_pairs(folder: pathlib.Path, pictures: Sequence[Picture]) -> np.ndarray:
  """Returns i64[P, T, 2]: the pairs of each prompt, by numbers of pictures; see `labels.pairs_of_prompts`.

  Raises:
    ValueError: settings.json and pictures.jsonl do not fit together.
  """
  file = folder / SETTINGS
  try:
    drawn = json.loads(file.read_text(encoding="utf-8"))["settings"]
    prompts, seeds, models, noise = (drawn[name] for name in ("num_prompts", "seeds", "models", "noise"))
    fits = prompts * seeds * len(models) == len(pictures)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{file} cannot be read ({error!r}); draw into a new folder.") from error
  if not fits:
    raise ValueError(
      f"{folder / PICTURES} has {len(pictures)} pictures, {file} says otherwise; draw into a new folder."
    )
  return labels.pairs_of_prompts(prompts, seeds, models=len(models), same=noise == "same")


def write_pairs(
  folder: pathlib.Path,
  pictures: Sequence[Picture],
  pairs: np.ndarray,
  label_0: np.ndarray | None = None,
  scores: np.ndarray | None = None,
) -> None:
  """Writes pairs.jsonl, which `sources.open_pairs_file` reads.

  Args:
    folder: that of the pictures.
    pictures: as `read_pictures` returns them.
    pairs: i64[M, 2] numbers of pictures.
    label_0: f32[M] in [0, 1]; None for pairs without labels.
    scores: f64[N] of all pictures, in logits, to write beside the labels; None for none.
  """

  def row(m: int) -> dict[str, Any]:
    sides = [pictures[n] for n in pairs[m]]
    found: dict[str, Any] = {"caption": sides[0].caption}
    found |= {f"image_{i}": side.image for i, side in enumerate(sides)}
    if label_0 is not None:
      found["label_0"] = float(label_0[m])
    if scores is not None:
      found |= {f"score_{i}": float(scores[n]) for i, n in enumerate(pairs[m])}
    return found | {f"noise_{i}": [side.seed, side.number] for i, side in enumerate(sides)}

  _write_rows(folder / PAIRS_NAME, map(row, range(len(pairs))))


Known = tuple[str, str]  # name and version of a reward


def read_scores(folder: pathlib.Path, pictures: Sequence[Picture]) -> dict[Known, np.ndarray]:
  """Reads scores.jsonl into f32[N] for all pictures, in the reward's own units, NaN where there is no score.

  Raises:
    ValueError: the file does not have that form.
  """
  file = folder / SCORES
  found: dict[Known, np.ndarray] = {}
  if not file.is_file():
    return found
  place = {picture.image: n for n, picture in enumerate(pictures)}
  try:
    for row in _read_rows(file):
      of_reward = found.setdefault((row["reward"], row["version"]), np.full(len(pictures), np.nan, np.float32))
      of_reward[place[row["image"]]] = row["score"]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} cannot be read ({error!r}); delete it, and --label makes it again.") from error
  return found


def _write_scores(folder: pathlib.Path, pictures: Sequence[Picture], scores: dict[Known, np.ndarray]) -> None:
  rows = (
    {"image": picture.image, "reward": reward, "version": version, "score": float(score)}
    for (reward, version), of_reward in scores.items()
    for picture, score in zip(pictures, of_reward, strict=True)
    if not np.isnan(score)
  )
  _write_rows(folder / SCORES, rows)


# ---- Labels ------------------------------------------------------------------------------------------------------


def label(args: argparse.Namespace, mesh: Mesh, held: lease.Held) -> None:
  """Scores a complete folder's pictures where scores are missing, and writes the labelled pairs."""
  folder, first = args.out, jax.process_index() == 0
  pictures = read_pictures(folder)
  pairs = all_pairs(folder, pictures)
  scores = read_scores(folder, pictures)
  if first:
    _remove_parts(folder)
  distributed.barrier("pairs: all have read the scores")
  models = _drawn_by(folder)
  total = np.zeros(len(pictures))
  described = []
  for spec, weight in scorers.check(args.label, given=f"--label={args.label!r}").items():
    scorer, logits = scorers.load(
      spec,
      batch_size=args.score_batch_size,
      mesh=mesh,
      preferred_style=args.preferred_style,
      models=models,
    )
    found = _score_missing(folder, pictures, scorer, scores, held)
    with np.errstate(over="ignore", invalid="ignore"):
      total += weight * logits * found.astype(np.float64)
    if not np.isfinite(total).all():
      raise ValueError(
        f"--label={args.label!r}: with the weight {weight:g} of {spec} the sum is not finite for every picture; "
        f"choose a smaller weight, or delete {folder / SCORES} if scores in it are not finite."
      )
    described.append({"name": scorer.name, "version": scorer.version, "scale": scorer.scale, "logits": logits})
  chosen = labels.widest(pairs, total) if args.pairing == "best_worst" else pairs
  chosen = chosen.reshape(-1, 2)
  label_0 = labels.label_pairs(total[chosen[:, 0]], total[chosen[:, 1]], kind=args.label_kind, min_gap=args.min_gap)
  held.check()
  if first:
    told = {"reward": args.label, "kind": args.label_kind, "min_gap": args.min_gap, "pairing": args.pairing}
    told |= {"pairs": len(chosen), "ties": int(np.sum(label_0 == 0.5)), "rewards": described}
    with paths.cannot_be_written(folder):
      (folder / LABELS).unlink(missing_ok=True)  # so that it never describes other pairs
    write_pairs(folder, pictures, chosen, label_0, total if args.label_kind == "hard" else None)
    paths.write(folder / LABELS, (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())
  distributed.barrier("pairs: the labels are there")


def _drawn_by(folder: pathlib.Path) -> list[str]:
  """Returns the models that drew a folder; a step-aware model may share their tokenizers."""
  file = folder / SETTINGS
  try:
    described = json.loads(file.read_text(encoding="utf-8"))["models"]
    names = [str(entry["model"]) for entry in described.values()]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{file} cannot be read ({error!r}); draw into a new folder.") from error
  found = []
  for name in names:
    with contextlib.suppress(ValueError):  # a run whose export was removed since
      found.append(settings.model_folder(name))
  return found


def _score_missing(
  folder: pathlib.Path,
  pictures: Sequence[Picture],
  scorer: published.Scorer,
  scores: dict[Known, np.ndarray],
  held: lease.Held,
) -> np.ndarray:
  """Returns f32[N] for all pictures; computes what `scores` lacks, and saves it from time to time."""
  first = jax.process_index() == 0
  found = scores.setdefault((scorer.name, scorer.version), np.full(len(pictures), np.nan, np.float32))
  at_a_time = IMAGES_AT_A_TIME * jax.process_count()
  parts = [slice(i, min(i + at_a_time, found.size)) for i in range(0, found.size, at_a_time)]
  missing = [part for part in parts if np.isnan(found[part]).any()]
  saved = time.monotonic()
  done = found.size - sum(part.stop - part.start for part in missing)
  with tqdm(total=found.size, initial=done, desc=scorer.name, unit=" pictures", disable=not first) as bar:
    for part in missing:
      shown = pictures[part]

      def compute(numbers: np.ndarray, shown: Sequence[Picture] = shown) -> np.ndarray:
        mine = [shown[n] for n in numbers]
        return scorer.score([_read(folder / p.image) for p in mine], [p.caption for p in mine])

      found[part] = evaluate.shared(len(shown), compute)
      bar.update(len(shown))
      if first and (part is missing[-1] or time.monotonic() - saved > SAVE_SECONDS):
        held.check()
        _write_scores(folder, pictures, scores)
        saved = time.monotonic()
  return found


def _read(file: pathlib.Path) -> np.ndarray:
  try:
    return evaluation_folder.read_image(file)
  except (OSError, SyntaxError) as error:
    raise ValueError(f"{file} cannot be read ({error}); run the command that drew it again.") from error


if __name__ == "__main__":
  main()
