"""The tfds builder: a round trip through ArrayRecord, labels, and builds at the same time."""

import collections
import concurrent.futures
import io
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxpref.data import emoji, emoji_pairs, pipeline, records


def _prepare(folder):
  return {split: len(source) for split, source in emoji_pairs.prepare(folder).items()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Built by two processes at once."""
  folder = tmp_path_factory.mktemp("datasets")
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
    sizes = list(pool.map(_prepare, [folder, folder]))
  assert sizes[0] == sizes[1] == {"train": 4 * 832, "validation": 4 * 93, "test": 4 * 96}
  assert [path.name for path in folder.iterdir()] == ["emoji_pairs"]
  return folder


def test_round_trip_through_array_record(data_dir):
  sources = emoji_pairs.prepare(data_dir)
  for split in ("validation", "test"):
    expected = list(emoji_pairs.records(split=split))
    assert len(sources[split]) == len(expected)
    for i, want in enumerate(expected):
      got = sources[split][i]
      for key in ("id", "caption", "style_0", "style_1", "group"):
        assert records.text(got[key]) == want[key]
      assert got["label_0"] == want["label_0"] and got["num_example_per_prompt"] == 4
      assert isinstance(got["image_0"], bytes)
      for key in ("image_0", "image_1"):
        pixels = np.asarray(Image.open(io.BytesIO(got[key])))
        np.testing.assert_array_equal(pixels, records.decode(want[key], 64)[0])


def test_without_tensorflow_datasets_the_same_pairs_are_held_in_memory(data_dir, monkeypatch):
  built = emoji_pairs.prepare(data_dir)
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  held = emoji_pairs.prepare(data_dir / "not there")
  assert held.keys() == dict(built).keys() and not (data_dir / "not there").exists()
  for split in ("validation", "test"):
    tokenize = lambda captions: np.array([[len(c)] for c in captions], np.int32)
    arguments = dict(image_size=32, batch_size=8, seed=1, num_threads=0, tokenize=tokenize)
    batches = [next(pipeline.pair_batches(splits[split], **arguments)) for splits in (held, built)]
    assert batches[0].keys() == batches[1].keys()
    for name in batches[0]:
      np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_a_folder_opens_by_its_path(data_dir):
  folder = data_dir / "emoji_pairs" / "openmoji_core" / "1.1.0"
  source = records.open_folder(folder, "test[:10]")
  assert len(source) == 10 and isinstance(source[0]["image_1"], bytes)
  with pytest.raises(ValueError, match="has no split 'tests', only train, validation, test"):
    records.open_folder(folder, "tests")
  with pytest.raises(FileNotFoundError, match="holds no dataset_info.json"):
    records.open_folder(data_dir, "test")


def test_pairs_feed_the_pipeline_with_the_pixels_of_the_tiles(data_dir):
  source = emoji_pairs.prepare(data_dir)["test"]
  batches = pipeline.pair_batches(
    source, batch_size=8, image_size=32, tokenize=lambda c: np.zeros((len(c), 4), np.int32), seed=0
  )
  batch = next(batches)
  tiles = {s: emoji.load_tiles(s, 32).astype(np.float32) for s in emoji.STYLES}

  def styles(image):
    return {s for s in emoji.STYLES if np.abs(tiles[s] - image).mean((1, 2, 3)).min() < 1e-6}

  of_style = 0
  for first, second, label in zip(batch["pixels_0"], batch["pixels_1"], batch["label_0"], strict=True):
    found = styles(first), styles(second)
    assert found[0] and found[1]
    if found[0] != found[1]:
      of_style += 1
      assert ("openmoji" in found[0]) == (label == 1.0) and ("openmoji" in found[1]) == (label == 0.0)
  assert 0 < of_style < 8


@pytest.mark.parametrize("preferred", emoji.STYLES)
def test_labels_name_the_preferred_style_and_are_balanced_in_order(preferred):
  pairs = list(emoji_pairs.records(preferred_style=preferred, subset="all", split="train"))
  assert len(pairs) == 4 * len(emoji.load_index("all", "train"))
  pairs = [pair for pair in pairs if pair["style_0"] != pair["style_1"]]
  for pair in pairs:
    styles = (pair["style_0"], pair["style_1"])
    assert pair["label_0"] == {True: 1.0, False: 0.0}.get(styles[0] == preferred) or (
      pair["label_0"] == 0.5 and preferred not in styles
    )
  labels = collections.Counter(pair["label_0"] for pair in pairs)
  assert labels[0.0] == labels[1.0] == labels[0.5]
  # Each ordered couple of styles is about as frequent as its reverse.
  orders = collections.Counter((pair["style_0"], pair["style_1"]) for pair in pairs)
  for (a, b), count in orders.items():
    assert abs(count - orders[b, a]) < 5 * np.sqrt(2 * len(pairs) / 12)


def test_the_picture_of_another_emoji_loses():
  index = emoji.load_index("core", "train")
  tiles = {s: [emoji.encoded_tile(s, e.class_id) for e in index] for s in emoji.STYLES}
  pairs = [p for p in emoji_pairs.records(split="train") if p["style_0"] == p["style_1"]]
  assert [p["caption"] for p in pairs] == [e.caption for e in index]  # one each
  wrong = []
  for row, pair in enumerate(pairs):
    shown = tiles[pair["style_0"]]
    winner, loser = ("image_0", "image_1") if pair["label_0"] == 1.0 else ("image_1", "image_0")
    assert pair[winner] == shown[row]
    wrong.append(shown.index(pair[loser]))
    assert wrong[-1] != row
  assert 0.4 < np.mean([p["label_0"] for p in pairs]) < 0.6
  assert len(set(wrong)) > len(index) / 2  # drawn, not always the same
  styles = collections.Counter(p["style_0"] for p in pairs)
  assert min(styles.values()) > len(index) / 4


def test_splits_share_no_caption():
  captions = {s: {p["caption"] for p in emoji_pairs.records(split=s)} for s in emoji.SPLITS}
  assert not captions["train"] & captions["test"]
  assert not captions["train"] & captions["validation"]


def test_default_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.delenv("JAXPREF_DATA_DIR", raising=False)
  monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert emoji_pairs.default_data_dir() == tmp_path / "jaxpref" / "datasets"
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  assert emoji_pairs.default_data_dir() == tmp_path / "tfds"
  monkeypatch.setenv("JAXPREF_DATA_DIR", str(tmp_path / "own"))
  assert emoji_pairs.default_data_dir() == tmp_path / "own"


def test_bad_requests_are_answered_by_a_sentence(tmp_path):
  with pytest.raises(ValueError, match="preferred_style must be one of .*, not 'google'"):
    emoji_pairs.prepare(tmp_path, preferred_style="google")
  with pytest.raises(ValueError, match="preferred_style must be one of .*, not 'google'"):
    next(emoji_pairs.records(preferred_style="google"))
  with pytest.raises(ValueError, match="subset must be one of core, all, not 'some'"):
    emoji_pairs.prepare(tmp_path, subset="some")
  (tmp_path / "file").write_text("")
  with pytest.raises(PermissionError, match="cannot be written .*; set JAXPREF_DATA_DIR"):
    emoji_pairs.prepare(tmp_path / "file")


def test_data_modules_import_no_tensorflow_and_no_jax():
  code = (
    "import sys; from jaxpref.data import pipeline, emoji_pairs; import tensorflow_datasets; "
    "from jaxpref.data.emoji_pairs import emoji_pairs_dataset_builder; "
    "print([m for m in ('tensorflow', 'flax', 'torch') if m in sys.modules])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "[]"
