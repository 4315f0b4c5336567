"""`emoji_pairs`: the embedded emoji as preference pairs in the form of Pick-a-Pic.

Every emoji gives four pairs: its preferred style against each of the other two, those two against each other as a tie,
and the emoji against another one in the same style, which loses because it does not show the caption. A program makes
the labels: one style is declared the preferred one. Nobody judged anything, so the labels show whether a method works,
not what people like.

  sources = prepare(preferred_style="openmoji", subset="core")
  record = sources["train"][0]   # caption, image_0, image_1, label_0, ...
"""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpref.data import emoji
from jaxpref.devices.progress import tqdm

DATA_DIR_VARIABLES = ("JAXPREF_DATA_DIR", "TFDS_DATA_DIR")
NUM_EXAMPLES_PER_PROMPT = 4


def _draw(sides: int, *parts: str) -> int:
  """Returns a fair die, 0 .. sides - 1, that falls the same way for the same strings."""
  digest = hashlib.sha256("/".join(("emoji_pairs", *parts)).encode()).digest()
  return int.from_bytes(digest[:8], "little") % sides


def records(
  *, preferred_style: str = "openmoji", subset: str = "core", split: str = "train"
) -> Iterator[dict[str, Any]]:
  """Yields the pairs of one split, without writing files.

  Each emoji gives four pairs: two of style, one with label 1 and one with label 0; a tie; and one of
  content, in which another emoji of the split, in the same style, loses. A hash of the emoji decides
  the order, the style and the other emoji, so neither order nor label reveals a style.

  Args:
    preferred_style: "twemoji", "noto" or "openmoji".
    subset: "core" or "all".
    split: "train", "validation" or "test", by emoji.

  Yields:
    A dict: id, caption, image_0 and image_1 (bytes, 64x64 WebP), label_0 (1: image_0 is
    preferred, 0: image_1 is, 0.5: neither), num_example_per_prompt, style_0, style_1, group.

  Raises:
    ValueError: unknown style, subset or split.
  """
  if preferred_style not in emoji.STYLES:
    raise ValueError(f"preferred_style must be one of {', '.join(emoji.STYLES)}, not {preferred_style!r}.")
  other, another = (s for s in emoji.STYLES if s != preferred_style)
  index = emoji.load_index(subset, split)
  for row, e in enumerate(index):
    first = _draw(2, e.id, preferred_style)
    wrong = index[(row + 1 + _draw(len(index) - 1, e.id, "wrong emoji")) % len(index)]
    style = emoji.STYLES[_draw(len(emoji.STYLES), e.id, "style of the content pair")]
    right_first = _draw(2, e.id, "content")
    pairs = [
      (preferred_style, e, other, e, 1.0) if first else (other, e, preferred_style, e, 0.0),
      (another, e, preferred_style, e, 0.0) if first else (preferred_style, e, another, e, 1.0),
      (other, e, another, e, 0.5) if _draw(2, e.id, other, another) else (another, e, other, e, 0.5),
      (style, e, style, wrong, 1.0) if right_first else (style, wrong, style, e, 0.0),
    ]
    for style_0, emoji_0, style_1, emoji_1, label_0 in pairs:
      yield {
        "id": f"{e.id}/{style_0}-{style_1}" + (f"/{wrong.id}" if style_0 == style_1 else ""),
        "caption": e.caption,
        "image_0": emoji.encoded_tile(style_0, emoji_0.class_id),
        "image_1": emoji.encoded_tile(style_1, emoji_1.class_id),
        "label_0": label_0,
        "num_example_per_prompt": NUM_EXAMPLES_PER_PROMPT,
        "style_0": style_0,
        "style_1": style_1,
        "group": e.group,
      }


def default_data_dir() -> pathlib.Path:
  """Returns $JAXPREF_DATA_DIR, else $TFDS_DATA_DIR, else `jaxpref/datasets` in the user's cache folder."""
  for variable in DATA_DIR_VARIABLES:
    if os.environ.get(variable):
      return pathlib.Path(os.environ[variable]).expanduser()
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(cache).expanduser() / "jaxpref" / "datasets"


def prepare(
  data_dir: str | os.PathLike | None = None,
  *,
  preferred_style: str = "openmoji",
  subset: str = "core",
) -> Mapping[str, Sequence[dict[str, Any]]]:
  """Builds the ArrayRecord files on first use (seconds), and opens them.

  Without tensorflow-datasets, the records are held in memory instead.

  Several processes may call this at once: each builds in a folder of its own, and the first to finish puts its folder
  in place.

  Args:
    data_dir: folder of datasets; None: `default_data_dir()`.
    preferred_style: "twemoji", "noto" or "openmoji".
    subset: "core" or "all".

  Returns:
    {split: random-access source of `records`}, with images as PNG bytes (WebP if held in memory).

  Raises:
    ValueError: unknown style or subset.
    PermissionError: the folder cannot be written.
  """
  for name, value, known in (
    ("preferred_style", preferred_style, emoji.STYLES),
    ("subset", subset, emoji.SUBSETS),
  ):
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError:
    return {s: list(records(preferred_style=preferred_style, subset=subset, split=s)) for s in emoji.SPLITS}

  from jaxpref.data.emoji_pairs.emoji_pairs_dataset_builder import Builder

  root = pathlib.Path(default_data_dir() if data_dir is None else data_dir)
  config = f"{preferred_style}_{subset}"
  folder = pathlib.Path(Builder(config=config, data_dir=root).data_dir)
  if not folder.exists():
    try:
      folder.parent.mkdir(parents=True, exist_ok=True)
      own = pathlib.Path(tempfile.mkdtemp(prefix=f".{config}.", dir=root))
    except OSError as error:
      raise PermissionError(
        f"the dataset folder {root} cannot be written ({error.strerror}); set "
        f"{DATA_DIR_VARIABLES[0]} to a folder that can."
      ) from error
    try:
      builder = Builder(config=config, data_dir=own)
      total = NUM_EXAMPLES_PER_PROMPT * len(emoji.load_index(subset))
      # Otherwise the library announces a download of unknown size into the temporary folder.
      tfds.display_progress_bar(False)
      with tqdm(total=total, desc=f"building {folder}", unit=" pairs") as bar:
        builder.on_record = bar.update
        with contextlib.redirect_stdout(io.StringIO()):
          builder.download_and_prepare(file_format="array_record")
      try:
        os.rename(builder.data_dir, folder)
      except OSError:
        if not folder.exists():  # Otherwise another process was faster, and wrote the same content.
          raise
    finally:
      tfds.display_progress_bar(True)
      shutil.rmtree(own, ignore_errors=True)
  builder = Builder(config=config, data_dir=root)
  skip = tfds.decode.SkipDecoding()
  return builder.as_data_source(decoders={"image_0": skip, "image_1": skip})
