"""Builds the small CLIP tokenizer of tiny-sd from the captions of the embedded emoji.

  python scripts/assets/build_tokenizer.py

writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, a format that
transformers' `CLIPTokenizer` (and so every Stable Diffusion pipeline) opens. The vocabulary is laid
out as CLIP's: 256 bytes, the same 256 at the end of a word, one entry per merge, start and end of
text. Any text can be encoded; frequent words of the captions are single tokens. Deterministic.
"""

import argparse
import collections
import json
import pathlib
import re
from collections.abc import Iterable

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

# CLIP's split into words (ASCII, since the captions are; the tokenizer itself knows all letters).
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")


def byte_alphabet() -> list[str]:
  """Returns the 256 printable characters that stand for the 256 bytes in a byte-level BPE.

  Printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on, in the
  order of GPT-2's table (printable ones first).
  """
  printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
  others = 256 - len(printable)
  return [chr(b) for b in printable] + [chr(256 + i) for i in range(others)]


def learn_merges(captions: Iterable[str], num_merges: int) -> list[tuple[str, str]]:
  """Learns a byte-pair encoding (Sennrich et al., arXiv 1508.07909): merges the most frequent pair repeatedly.

  Args:
    captions: lower-case ASCII texts.
    num_merges: how many to learn; fewer come back if all words are whole before.

  Returns:
    Pairs of symbols in the order learnt; among equally frequent pairs the alphabetically first.
  """
  counts = collections.Counter(word for text in captions for word in _WORDS.findall(text))
  words = [(*word[:-1], word[-1] + END_OF_WORD) for word in counts]
  pairs: collections.Counter[tuple[str, str]] = collections.Counter()
  where = collections.defaultdict(set)  # pair -> the words that have it (or had it)

  def count(i: int, n: int) -> None:
    for pair in zip(words[i], words[i][1:], strict=False):
      pairs[pair] += n
      where[pair].add(i)

  frequencies = list(counts.values())
  for i, n in enumerate(frequencies):
    count(i, n)
  merges: list[tuple[str, str]] = []
  while len(merges) < num_merges and (most := max(pairs.values(), default=0)) > 0:
    best = min(pair for pair, n in pairs.items() if n == most)
    merges.append(best)
    for i in where.pop(best):
      count(i, -frequencies[i])
      words[i] = _merge(words[i], best)
      count(i, frequencies[i])
  return merges


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
  out: list[str] = []
  i = 0
  while i < len(symbols):
    if symbols[i : i + 2] == pair:
      out.append(pair[0] + pair[1])
      i += 2
    else:
      out.append(symbols[i])
      i += 1
  return tuple(out)


def write_tokenizer(folder: str | pathlib.Path, captions: Iterable[str], *, vocab_size: int, max_length: int) -> None:
  """Learns and writes a tokenizer.

  Args:
    folder: made if it is missing.
    captions: what the merges are learnt from.
    vocab_size: entries in all; 512 bytes and the two special tokens are among them.
    max_length: tokens of a prompt with start and end, `model_max_length`.

  Raises:
    ValueError: the captions do not yield that many merges.
  """
  alphabet = byte_alphabet()
  num_merges = vocab_size - 2 * len(alphabet) - 2
  merges = learn_merges(captions, num_merges)
  if len(merges) != num_merges:
    raise ValueError(
      f"tokenizer: the captions yield {len(merges)} merges, expected {num_merges}; choose a "
      f"vocabulary of at most {vocab_size - num_merges + len(merges)}."
    )
  tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *("".join(m) for m in merges)]
  tokens += [BOS, EOS]
  assert len(set(tokens)) == vocab_size, "two merges make the same token"
  special = {
    name: {
      "content": content,
      "lstrip": False,
      "normalized": True,
      "rstrip": False,
      "single_word": False,
    }
    for name, content in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))
  } | {"pad_token": EOS}
  config = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": max_length,
    "tokenizer_class": "CLIPTokenizer",
  }
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)

  def dump(name, value, **options):
    text = json.dumps(value, ensure_ascii=False, **options)
    (folder / name).write_text(text + "\n", encoding="utf-8")

  dump("vocab.json", {token: i for i, token in enumerate(tokens)})
  dump("special_tokens_map.json", special, indent=2)
  dump("tokenizer_config.json", config | special, indent=2)
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
  from jaxpref.data.emoji import load_index
  from jaxpref.models.presets import TINY_LENGTH, TINY_VOCAB_SIZE

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="jaxpref/assets/tiny-sd/tokenizer")
  args = parser.parse_args()
  # The core emoji come twice, so that their words are whole first; all others still help.
  captions = [e.caption for subset in ("core", "all") for e in load_index(subset)]
  write_tokenizer(args.out, captions, vocab_size=TINY_VOCAB_SIZE, max_length=TINY_LENGTH)


if __name__ == "__main__":
  main()
