"""Captions as token ids: padded, cut and warned of; and the shipped tokenizer."""

import concurrent.futures
import subprocess
import sys
import warnings

import numpy as np

from jaxpref.files import tokenizers
from jaxpref.files.tokenizers import MAX_CUT_WARNINGS, tiny_tokenizer, tokenize
from jaxpref.models import presets

PROMPTS = ["grinning cat", "a red apple and a very, very, very, very, very long prompt, café"]


def test_tokenize_pads_and_cuts_as_stable_diffusion_does():
  tokenizer = tiny_tokenizer()
  ids = tokenize(tokenizer, [*PROMPTS, ""])
  end = presets.TINY_VOCAB_SIZE - 1
  assert ids.dtype == np.int32 and ids.shape == (3, presets.TINY_LENGTH)
  assert (ids[:, 0] == end - 1).all() and (ids[:, -1] == end).all()
  assert (ids[2, 1:] == end).all() and (ids[1, 1:-1] < end - 1).all()
  assert tokenize(tokenizer, PROMPTS, length=8).shape == (2, 8)
  # SDXL's second tokenizer pads with "!", id 0.
  tokenizer.pad_token = "!"
  assert (tokenize(tokenizer, [""])[0, 2:] == 0).all()


def test_few_cut_prompts_are_shown_and_then_no_more(monkeypatch):
  """From many threads, as a data pipeline calls it; the two tokenizers of SDXL cut the same and say it once."""
  monkeypatch.setattr(tokenizers, "_cut_warnings", set())
  of_threads = [tiny_tokenizer() for _ in range(4)]

  def cut(thread):
    for i in range(20):
      for _ in range(2):
        tokenize(of_threads[thread], [f"a cat and {20 * thread + i}"], length=4)

  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      list(pool.map(cut, range(4)))
  said = [str(w.message) for w in found]
  assert len(said) == len(set(said)) == MAX_CUT_WARNINGS + 1 == 6
  assert sum("this was cut from a prompt: 'and" in s for s in said) == 5
  last = "after 5 warnings of prompts that are too long, further prompts are cut without a warning."
  assert said.count(last) == 1
  assert {w.filename for w in found} == {__file__}, "a warning points to the caller"


def test_tokenizers_come_without_the_advice_to_install_pytorch(monkeypatch):
  """Which transformers gives where there is none; the same import by itself shows that it does."""
  monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)  # loading a tokenizer has set it
  hidden = "import importlib.util as u; find = u.find_spec\n"
  hidden += "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
  said = []
  ours = "from jaxpref.files import tokenizers; tokenizers.import_tokenizer('CLIPTokenizer')"
  for program in ("import transformers", ours):
    done = subprocess.run([sys.executable, "-c", hidden + program], capture_output=True, text=True, check=True)
    said.append("PyTorch was not found" in done.stderr)
  assert said == [True, False]


def test_shipped_tokenizer_is_what_the_script_builds(tmp_path):
  from jaxpref.data.emoji import load_index
  from scripts.assets import build_tokenizer

  captions = [e.caption for subset in ("core", "all") for e in load_index(subset)]
  build_tokenizer.write_tokenizer(
    tmp_path, captions, vocab_size=presets.TINY_VOCAB_SIZE, max_length=presets.TINY_LENGTH
  )
  shipped = tiny_tokenizer()
  for name in ("vocab.json", "merges.txt"):  # saving the model rewrites the other files
    expected = (tmp_path / name).read_text(encoding="utf-8")
    with open(f"{shipped.name_or_path}/{name}", encoding="utf-8") as f:
      assert f.read() == expected, f"{name} is stale: run scripts/assets/build_tokenizer.py"
  assert shipped.model_max_length == presets.TINY_LENGTH
  core = [e.caption for e in load_index("core")]
  ids = shipped(core).input_ids
  assert max(map(len, ids)) <= presets.TINY_LENGTH, "a caption would be cut"
  assert len(set(map(tuple, ids))) == len(core), "two captions look the same"
  decoded = shipped.decode(shipped("a café, no. 42!").input_ids[1:-1])
  assert decoded.replace(" ", "") == "acafé,no.42!"


def test_merges_of_a_hand_worked_example():
  from scripts.assets.build_tokenizer import learn_merges

  # "ab</w>" occurs three times, then "c" + "ab</w>" twice; then nothing is left to merge.
  assert learn_merges(["ab cab", "cab"], 9) == [("a", "b</w>"), ("c", "ab</w>")]
