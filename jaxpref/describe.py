"""Says what preference data holds: `python -m jaxpref.describe SOURCE --out=FOLDER`.

SOURCE is a folder or file of any kind that training accepts (see docs/data.md); several are compared with each other.
The command prints counts, ties, labels, captions, pairs per prompt, the sizes of some images, and how many prompts the
splits or sources share. With --out it also writes stats.json and, for each source, a picture of some records: the
winner in a green frame, a tie in grey, a disliked image in red.
"""

import argparse
import collections
import io
import json
import os
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref import arguments
from jaxpref.data import index as index_lib
from jaxpref.data import paths, records, sources
from jaxpref.data.files import PROGRESS_AFTER
from jaxpref.devices import endings
from jaxpref.devices.progress import tqdm
from jaxpref.evaluation import pictures

SIDE, FRAME, GAP, COLUMNS = 128, 4, 12, 3  # of the picture: pixels of an image, its frame and the gap; records in a row
CAPTION_HEIGHT = 44
GREEN, GREY, RED = (0, 150, 60), (150, 150, 150), (200, 40, 40)
IN_COMMON = "prompts in common"
CLIP_LENGTH = 75  # tokens that fit beside the start and the end


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments and prints; an expected error ends the program with one sentence."""
  parser = arguments.Parser(prog="python -m jaxpref.describe", description=__doc__)
  add = parser.add_argument
  add("source", type=arguments.place, nargs="+", metavar="SOURCE", help="folder or file")
  add("--kind", choices=sources.KINDS, help="kind of SOURCE (default: detected from its name and first lines)")
  add("--split", action="append", help="split of a tfds dataset; may be repeated (default: all)")
  add(
    "--images",
    type=arguments.place,
    metavar="FOLDER",
    help="folder of the images of rankings (default: the one named like the file)",
  )
  add(
    "--pairs", choices=("all", "winner"), default="all", help="which pairs of a ranking to use (default: %(default)s)"
  )
  add("--tokenizer", type=arguments.path, metavar="FOLDER", help="a CLIP tokenizer, to count tokens (default: none)")
  add("--sample", type=int, default=200, metavar="N", help="records whose images are read (default: %(default)s)")
  add("--pictures", type=int, default=36, metavar="N", help="records in the picture (default: %(default)s)")
  add("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
  add("--out", type=arguments.path, metavar="FOLDER", help="folder for stats.json and the pictures (default: none)")
  args = parser.parse_args(argv)
  doing = f"describing {' '.join(args.source)}"
  with endings.one_sentence(ValueError, OSError, doing=doing, again="run the same command again"):
    print(describe(args))


def describe(args: argparse.Namespace) -> str:
  """Opens and counts the sources and writes what --out asks for; takes the arguments of the command.

  Returns:
    The text to print.
  Raises:
    ValueError, OSError: one sentence on what is missing or does not fit.
  """
  arguments.check_seed(args)
  arguments.check_numbers(args, "sample")
  arguments.check_numbers(args, "pictures", least=0)
  if args.out is not None:
    if args.out.exists() and not args.out.is_dir():
      raise ValueError(f"--out={args.out} is a file; name a folder.")
    paths.check_writable(args.out, "--out")
  count_tokens = None if args.tokenizer is None else _token_counter(args.tokenizer)
  opened = _open_all(args)
  if args.out is not None:
    _remove_pictures(args.out)
  stats: dict[str, Any] = {}
  for name, (kind, source) in opened.items():
    if kind == "prompts":
      stats[name] = {"kind": kind} | prompt_stats(source)
      captions = source
    else:
      index = source.index
      stats[name] = {"kind": kind} | (unpaired_stats(index) if kind == "unpaired_file" else pair_stats(index))
      chosen = np.sort(np.random.default_rng(args.seed).permutation(len(source))[: max(args.sample, args.pictures)])
      sample = [source[int(i)] for i in tqdm(chosen, desc=f"images of {name}", delay=PROGRESS_AFTER)]
      stats[name] |= image_stats(sample)
      captions = [records.text(record["caption"]) for record in sample]
      if args.out is not None and args.pictures:
        file = args.out / f"{_file_name(name)}.png"
        pictures.save_image(file, contact_sheet(sample[:: max(1, len(sample) // args.pictures)][: args.pictures]))
    if count_tokens is not None:
      stats[name]["caption_tokens"] = token_stats(captions, count_tokens)
  shared = common_prompts({name: _prompts(kind, source) for name, (kind, source) in opened.items()})
  if shared:
    stats[IN_COMMON] = shared
  if args.out is not None:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stats.json").write_text(json.dumps(stats, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  return as_text(stats)


def _remove_pictures(folder: pathlib.Path) -> None:
  """Removes the pictures of an earlier run, which its stats.json names."""
  try:
    names = list(json.loads((folder / "stats.json").read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError):
    return
  for name in names:
    (folder / f"{_file_name(name)}.png").unlink(missing_ok=True)


def _open_all(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
  """Returns {name: (kind, source)}; each split of a tfds dataset is a source."""
  opened: dict[str, tuple[str, Any]] = {}
  for path in args.source:
    kind = args.kind or sources.detect_kind(path)
    if kind == "prompts":
      opened[str(path)] = kind, sources.read_prompts(path)
    elif kind == "tfds":
      folder = sources.find_dataset(path)
      for split in args.split or sources.splits_of(folder):
        opened[f"{folder}:{split}"] = kind, sources.open_tfds(folder, split)
    else:
      opened[str(path)] = kind, sources.open_source(kind, path, images=args.images, pairs=args.pairs)
  return opened


# ---- Numbers ---------------------------------------------------------------------------------------------------


def pair_stats(index: index_lib.Index) -> dict[str, Any]:
  """Returns numbers about all pairs: labels, prompts, captions."""
  label = index.label_0
  stats: dict[str, Any] = {
    "pairs": len(index),
    "image_0_preferred": float(np.mean(label > 0.5)),
    "image_1_preferred": float(np.mean(label < 0.5)),
    "ties": float(np.mean(label == 0.5)),
  }
  if index.has_label is not None:
    stats["not_judged"] = float(np.mean(~index.has_label))
  if index.score_0 is not None and index.score_1 is not None:
    agreement = index_lib.score_agreement(index)
    stats["scores_agree_with_labels"] = None if np.isnan(agreement) else agreement
  stats |= _prompt_numbers(index, "pairs_of_a_prompt")
  counted = index_lib.counts_per_prompt(index.prompt)
  stats["num_example_per_prompt_differs_from_the_count"] = float(np.mean(counted != index.num_example_per_prompt))
  if index.image_0 is not None and index.image_1 is not None:
    stats["images"] = len(np.union1d(index.image_0, index.image_1))
    pairs = np.stack([index.prompt, *np.sort([index.image_0, index.image_1], axis=0)])
    stats["pairs_that_were_there_before"] = len(index) - np.unique(pairs, axis=1).shape[1]
    stats["pairs_of_an_image_with_itself"] = int(np.sum(index.image_0 == index.image_1))
  return stats


def unpaired_stats(index: index_lib.Index) -> dict[str, Any]:
  """Returns numbers about all single images: labels, prompts, captions."""
  return {"images": len(index), "liked": float(np.mean(index.label_0 > 0.5))} | _prompt_numbers(
    index, "images_of_a_prompt"
  )


def prompt_stats(prompts: Sequence[str]) -> dict[str, Any]:
  """Returns numbers about a list of prompts."""
  prompt = index_lib.prompt_ids(prompts)
  return {
    "prompts": len(prompts),
    "different_prompts": len(np.unique(prompt)),
    "caption_words": spread([len(text.split()) for text in prompts]),
  }


def _prompt_numbers(index: index_lib.Index, name: str) -> dict[str, Any]:
  _, counts = np.unique(index.prompt, return_counts=True)
  stats: dict[str, Any] = {"prompts": len(counts), name: spread(counts)}
  if index.caption_words is not None:
    stats["caption_words"] = spread(index.caption_words)
  return stats


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
  """Returns mean, median, 95th percentile and maximum."""
  half, most, largest = np.percentile(values, [50, 95, 100]).tolist()
  return {"mean": round(float(np.mean(values)), 2), "median": half, "95%": most, "max": largest}


def image_stats(sample: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns numbers about the images of some records: size, format, bytes, and how many cannot be read."""
  from PIL import Image

  sizes: collections.Counter[str] = collections.Counter()
  formats: collections.Counter[str] = collections.Counter()
  lengths: list[int] = []
  unreadable: list[str] = []
  for record in sample:
    for key in _image_fields(record):
      lengths.append(len(record[key]))
      try:
        with Image.open(io.BytesIO(record[key])) as image:
          sizes[f"{image.width}x{image.height}"] += 1
          formats[str(image.format)] += 1
        records.open_image(record[key])
      except Exception as error:  # Pillow raises many types
        unreadable.append(str(error))
  because = {"unreadable_because": dict(collections.Counter(unreadable).most_common(3))} if unreadable else {}
  return {
    "images_looked_at": len(lengths),
    "unreadable": len(unreadable),
    **because,
    "width_x_height": dict(sizes.most_common(5)),
    "formats": dict(formats.most_common()),
    "kilobytes": spread(np.asarray(lengths) / 1e3),
  }


def token_stats(captions: Sequence[str], count: Callable[[list[str]], list[int]]) -> dict[str, float]:
  """Returns statistics of the tokens of some captions, and the share of captions that is too long for CLIP."""
  tokens = np.asarray(count(list(captions)))
  return spread(tokens) | {f"above {CLIP_LENGTH}": float(np.mean(tokens > CLIP_LENGTH))}


def _token_counter(folder: pathlib.Path) -> Callable[[list[str]], list[int]]:
  if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
    raise FileNotFoundError(f"{folder} has no vocab.json and no tokenizer.json; expected a CLIP tokenizer.")
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # silences the note that PyTorch is missing
  from transformers import CLIPTokenizer

  tokenizer = CLIPTokenizer.from_pretrained(str(folder))
  return lambda captions: [len(ids) for ids in tokenizer(captions, add_special_tokens=False)["input_ids"]]


def _prompts(kind: str, source: Any) -> np.ndarray:
  return np.unique(index_lib.prompt_ids(source) if kind == "prompts" else source.index.prompt)


def common_prompts(prompts: Mapping[str, np.ndarray]) -> dict[str, int]:
  """Returns how many prompts each two of several sources share."""
  names = list(prompts)
  return {
    f"{a} and {b}": len(np.intersect1d(prompts[a], prompts[b], assume_unique=True))
    for i, a in enumerate(names)
    for b in names[i + 1 :]
  }


def as_text(stats: Mapping[str, Any]) -> str:
  """Returns the numbers as lines, with a block for each source; the floats of a block are shares, in percent."""

  def number(value: Any) -> str:
    if isinstance(value, Mapping):
      return ", ".join(f"{name}: {number(v)}" for name, v in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

  lines = []
  for title, block in stats.items():
    lines += ["", title]
    for name, value in block.items():
      shown = f"{value:.1%}" if isinstance(value, float) else number(value)
      lines.append(f"  {name if title == IN_COMMON else name.replace('_', ' ')}: {shown}")
  return "\n".join(lines[1:])


# ---- Picture ---------------------------------------------------------------------------------------------------


def _image_fields(record: Mapping[str, Any]) -> tuple[str, ...]:
  return ("image",) if "image" in record else ("image_0", "image_1")


def contact_sheet(sample: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """Returns u8[H, W, 3]: the images of records side by side, framed by their label, captions below."""
  from PIL import Image, ImageDraw

  images = len(_image_fields(sample[0]))
  cell_width = images * (SIDE + 2 * FRAME) + GAP
  cell_height = SIDE + 2 * FRAME + CAPTION_HEIGHT
  columns = COLUMNS * 2 // images
  rows = -(-len(sample) // columns)
  canvas = Image.new("RGB", (GAP + columns * cell_width, GAP + rows * cell_height), "white")
  draw = ImageDraw.Draw(canvas)
  for number, record in enumerate(sample):
    left, top = GAP + number % columns * cell_width, GAP + number // columns * cell_height
    for place, (key, colour) in enumerate(zip(_image_fields(record), _colours(record), strict=True)):
      x = left + place * (SIDE + 2 * FRAME)
      draw.rectangle((x, top, x + SIDE + 2 * FRAME - 1, top + SIDE + 2 * FRAME - 1), fill=colour)
      try:
        canvas.paste(Image.fromarray(records.decode(record[key], SIDE)[0]), (x + FRAME, top + FRAME))
      except records.UnreadableImage:
        draw.text((x + FRAME + 4, top + SIDE // 2), "unreadable", fill="black")
    words = textwrap.wrap(records.text(record["caption"]), width=cell_width // 6, max_lines=3, placeholder=" ...")
    # Pillow's built-in font has the letters of Latin 1.
    text = "\n".join(words).encode("latin-1", "replace").decode("latin-1")
    draw.multiline_text((left, top + SIDE + 2 * FRAME + 2), text, fill="black", spacing=1)
  return np.asarray(canvas)


def _colours(record: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
  if "image" in record:
    return (GREEN if record["label"] > 0.5 else RED,)
  label = float(record["label_0"])
  if label == 0.5:
    return GREY, GREY
  white = (255, 255, 255)
  return (GREEN, white) if label > 0.5 else (white, GREEN)


def _file_name(name: str) -> str:
  """Returns the last parts of a path as a file name."""
  parts = pathlib.PurePosixPath(name.replace(":", "/")).parts
  return "-".join(part for part in parts[-4:] if part != "/")


if __name__ == "__main__":
  main()
