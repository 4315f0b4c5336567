"""Turns captions into token ids with the transformers tokenizers of model folders."""

import importlib
import json
import os
import pathlib
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxpref.files.tensors import Path
from jaxpref.models.clip import CLIPTextConfig

# A dataset may hold thousands of captions that are too long: this many cuts are shown.
MAX_CUT_WARNINGS = 5
_cut_warnings: set[str] = set()
_cut_warnings_lock = threading.Lock()


def tokenize(tokenizer: Any, captions: Sequence[str], *, length: int | None = None, exact: bool = False) -> np.ndarray:
  """Returns token ids as Stable Diffusion makes them: padded and cut to the full context length.

  Args:
    tokenizer: a transformers CLIPTokenizer or T5Tokenizer.
    captions: prompts; "" is the empty one of classifier-free guidance.
    length: upper bound of the context length; a tokenizer_config.json without `model_max_length`
      sets none.
    exact: `length` is the length, whatever the tokenizer's `model_max_length`, as for T5.

  Returns:
    i32[n, L]. One warning per call shows what is cut, and at most MAX_CUT_WARNINGS per process.
  """
  limit = length if exact and length else min(tokenizer.model_max_length, length or tokenizer.model_max_length)
  if limit > 10**6:
    raise ValueError(
      "tokenize: tokenizer_config.json has no model_max_length; pass length, the text encoder's "
      "max_position_embeddings."
    )
  captions = list(captions)
  out = tokenizer(captions, padding="max_length", max_length=limit, truncation=True, return_tensors="np")
  full = [c for c, mask in zip(captions, out["attention_mask"], strict=True) if mask.all()]
  # The texts beyond the limit; the last token is the end of the text.
  every = tokenizer(full, verbose=False)["input_ids"] if full else []
  cut = [tokenizer.decode(ids[limit - 1 : -1]).strip() for ids in every if len(ids) > limit]
  if cut:
    others = f" (and the ends of {len(cut) - 1} others)" if len(cut) > 1 else ""
    encoder, marks = ("T5", "the end") if exact else ("the text encoder", "begin and end")
    reads = f"{encoder} reads {limit} tokens, including {marks}"
    remedy = "shorten it, or increase max_sequence_length (at most 512)" if exact else "shorten it"
    _warn_of_cut(f"{reads}, so this was cut from a prompt: {cut[0]!r}{others}; {remedy}.")
  return np.asarray(out["input_ids"], np.int32)


def _warn_of_cut(message: str) -> None:
  """Warns for the caller of `tokenize`: once per message, for a limited number, then that it stops warning."""
  with _cut_warnings_lock:
    count = len(_cut_warnings)
    if message in _cut_warnings or count > MAX_CUT_WARNINGS:
      return
    _cut_warnings.add(message)
  if count == MAX_CUT_WARNINGS:
    message = f"after {count} warnings of prompts that are too long, further prompts are cut without a warning."
  warnings.warn(message, stacklevel=3)


def import_tokenizer(name: str) -> Any:
  """Imports a tokenizer's class from transformers, which takes a second, without its advice to install PyTorch."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  return getattr(importlib.import_module("transformers"), name)


def load_tokenizer(folder: Path) -> Any:
  """Loads the CLIP tokenizer of a folder.

  Raises:
    FileNotFoundError: vocab.json or merges.txt is missing, and there is no tokenizer.json.
  """
  folder = pathlib.Path(folder)
  missing = [f for f in ("vocab.json", "merges.txt") if not (folder / f).is_file()]
  if missing and not (folder / "tokenizer.json").is_file():
    raise FileNotFoundError(
      f"{folder} has no {' and no '.join(missing)}, expected a CLIP tokenizer; download the folder again."
    )
  return import_tokenizer("CLIPTokenizer").from_pretrained(str(folder))


def load_t5_tokenizer(folder: Path) -> Any:
  """Loads the T5 tokenizer of a folder, from its tokenizer.json.

  Raises:
    FileNotFoundError: there is no tokenizer.json.
  """
  folder = pathlib.Path(folder)
  if not (folder / "tokenizer.json").is_file():
    only = "only a spiece.model" if (folder / "spiece.model").is_file() else "no tokenizer"
    raise FileNotFoundError(
      f"{folder} has {only}, expected the tokenizer.json of a T5 tokenizer; download the folder again, or make the file"
      " with transformers.T5Tokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), which needs sentencepiece."
    )
  # The random miniatures tokenize with a CLIPTokenizer.
  settings = folder / "tokenizer_config.json"
  own = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
  kind = own if own == "CLIPTokenizer" else "T5Tokenizer"
  return import_tokenizer(kind).from_pretrained(str(folder))


def load_tokenizer_of(
  folder: pathlib.Path, suffix: str, encoder: Any, load: Callable[[Path], Any] = load_tokenizer
) -> Any:
  """Loads the tokenizer of a pipeline folder that belongs to a text encoder.

  Args:
    folder: the pipeline's folder.
    suffix: of the tokenizer's and the text encoder's names.
    encoder: the text encoder.
    load: what opens the tokenizer's own folder.

  Raises:
    ValueError: the tokenizer gives ids that the encoder does not know.
  """
  tokenizer = load(folder / f"tokenizer{suffix}")
  largest, size = max(tokenizer.get_vocab().values()), encoder.config.vocab_size
  if largest >= size:
    raise ValueError(
      f"{folder / f'tokenizer{suffix}'} gives ids up to {largest}, expected at most {size - 1} by the vocab_size of "
      f"{folder / f'text_encoder{suffix}' / 'config.json'}; take the tokenizer of the same model."
    )
  return tokenizer


def tiny_tokenizer_for(config: CLIPTextConfig) -> Any:
  """Loads the shipped tokenizer, padding to the number of tokens that the text encoder reads."""
  tokenizer = tiny_tokenizer()
  tokenizer.model_max_length = config.max_position_embeddings
  return tokenizer


def tiny_tokenizer() -> Any:
  """Loads the tokenizer in jaxpref/assets/tiny-sd, made by scripts/assets/build_tokenizer.py."""
  return load_tokenizer(pathlib.Path(__file__).parents[1] / "assets" / "tiny-sd" / "tokenizer")


def save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
  """Writes transformers' own format, plus vocab.json and merges.txt for versions before 5."""
  folder.mkdir(exist_ok=True)
  tokenizer.save_pretrained(str(folder))
  source = pathlib.Path(tokenizer.name_or_path)
  for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
    if (source / name).is_file() and not (folder / name).exists():
      shutil.copyfile(source / name, folder / name)
