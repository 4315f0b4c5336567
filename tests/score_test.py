"""Scores of pairs by a preference model: preprocessing, numbers, resuming, and labels made of them."""

import dataclasses
import functools
import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from configs import spm_tiny
from jaxpref import score
from jaxpref.data import emoji, records, sources
from jaxpref.data import index as index_lib
from jaxpref.files import tokenizers
from jaxpref.rewards import networks
from jaxpref.rewards.loading import load_scorer, scorer_fingerprint
from jaxpref.training import build, inputs
from tests import decisions
from tests.occupied import occupied

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("size", [(300, 200), (224, 224), (97, 411), (640, 481)])
def test_images_are_prepared_as_transformers_does(size):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
  file = io.BytesIO()
  picture.save(file, "PNG")
  for name in ("CLIPImageProcessorPil", "CLIPImageProcessor"):
    if hasattr(transformers, name):
      processor = getattr(transformers, name)(do_rescale=False, do_normalize=False)
      break
  expected = np.asarray(processor(picture)["pixel_values"][0]).transpose(1, 2, 0)
  difference = np.abs(networks.clip_image(file.getvalue(), 224).astype(float) - expected)
  assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.fixture(scope="module")
def config():
  config = spm_tiny.get_config()
  config.data.update(split="test", subset="core")
  return config


@pytest.fixture(scope="module")
def scored(config, tmp_path_factory):
  out = tmp_path_factory.mktemp("scores") / "scores.npz"
  return out, score.score(config, model="tiny-spm", out=out, batch_size=32)


def test_scores_are_the_models(config, scored):
  _, index = scored
  source = inputs.open_pairs(config)
  assert len(index) == len(source)
  module, params = load_scorer("tiny-spm", dtype="float32")
  tokenizer = tokenizers.tiny_tokenizer()
  some = [0, 7, len(source) - 1]
  apply = jax.jit(module.apply)
  size = module.config.vision_config.image_size
  mean, std = np.asarray(module.config.image_mean), np.asarray(module.config.image_std)
  for i in some:
    record = source[i]
    ids = tokenizers.tokenize(tokenizer, [records.text(record["caption"])], length=16)
    for side, found in enumerate(index.scores()):
      pixels = (networks.clip_image(record[f"image_{side}"], size)[None] / 255 - mean) / std
      expected = apply({"params": params}, ids, pixels.astype(np.float32), np.zeros(1, np.int32))
      np.testing.assert_allclose(found[i], expected[0], rtol=1e-4)
  decided = index.label_0 != 0.5
  score_0, score_1 = index.scores()
  assert ((score_0 > score_1) == (index.label_0 > 0.5))[decided].mean() > 0.6  # it was trained for it


def test_an_interrupted_run_continues(config, scored, tmp_path):
  out, index = scored
  begun = np.stack(index.scores(), 1).copy()
  begun[5:] = np.nan
  partial = dataclasses.replace(index, score_0=begun[:, 0] + 100, score_1=begun[:, 1])
  file, by = tmp_path / "scores.npz", f"{scorer_fingerprint('tiny-spm')} in float32"
  fingerprint = sources.content_fingerprint(inputs.open_pairs(config))
  index_lib.save(partial, file, fingerprint=fingerprint, scored_by=by)
  # Training does not take what is missing for ties, and another model does not go on with it.
  changed = config.copy_and_resolve_references()
  changed.data.scores = str(file)
  with pytest.raises(ValueError, match=f"{len(index) - 5} of {len(index)} pairs have no scores yet"):
    inputs.pairs_source(changed)
  with pytest.raises(ValueError, match=f"has scores by {by}, expected random:tiny-sd in float32; choose another file"):
    score.score(config, model="random:tiny-sd", out=file, batch_size=32)
  again = score.score(config, model="tiny-spm", out=tmp_path / "scores.npz", batch_size=32)
  np.testing.assert_allclose(again.scores()[0][5:], index.scores()[0][5:], rtol=1e-5)
  np.testing.assert_allclose(again.scores()[0][:5], index.scores()[0][:5] + 100, rtol=1e-5)  # what was there stays


def test_a_file_that_another_process_writes_is_refused(config, tmp_path):
  with occupied(tmp_path, "scores.npz.writer_lock.json") as sentence:
    with pytest.raises(OSError, match=re.escape(sentence)):
      score.score(config, model="tiny-spm", out=tmp_path / "scores.npz", batch_size=32)
  assert not (tmp_path / "scores.npz").exists()


def test_labels_of_scores_train_a_model(config, scored):
  out, index = scored
  changed = config.copy_and_resolve_references()
  changed.data.update(labels="scores", scores=str(out), min_gap=0.05, ties="drop")
  changed.batch_size = 8
  source = inputs.pairs_source(changed)
  score_0, score_1 = index.scores()
  gap = np.abs(np.tanh((score_0 - score_1) / 2))
  wide = decisions.above(gap, 0.05, margin=1e-6)
  assert len(source) == wide.sum() < len(index)
  np.testing.assert_array_equal(source.index.label_0 > 0.5, (score_0 > score_1)[wide])
  batch = next(build.build(changed).batches())
  assert set(batch["label_0"]) <= {0.0, 1.0}
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(batch) if x.dtype.kind == "f")


def test_scores_of_other_data_are_refused(config, scored, tmp_path):
  out, _ = scored
  changed = config.copy_and_resolve_references()
  changed.data.update(split="train", scores=str(out))
  with pytest.raises(ValueError, match="the dataset has"):
    inputs.pairs_source(changed)
  with pytest.raises(ValueError, match="expected a file that ends in .npz"):
    score.score(config, model="tiny-spm", out=tmp_path / "scores", batch_size=32)


def test_scores_of_other_images_are_refused(config, tmp_path):
  """Whether the file of pairs names others, or the pictures were changed under their old names."""
  tiles = [emoji.encoded_tile("noto", i) for i in range(5)]
  for i, tile in enumerate(tiles):
    (tmp_path / f"{i}.webp").write_bytes(tile)
  pairs = [{"caption": f"a {i}", "image_0": f"{i}.webp", "image_1": f"{i + 1}.webp", "label_0": 1} for i in range(3)]
  lines = [json.dumps(pair) + "\n" for pair in pairs]
  (tmp_path / "pairs.jsonl").write_text("".join(lines))
  changed = config.copy_and_resolve_references()
  changed.data.update(source="pairs_file", path=str(tmp_path / "pairs.jsonl"), split="train")
  again = functools.partial(score.score, changed, model="tiny-spm", out=tmp_path / "scores.npz", batch_size=8)
  first = again()
  assert np.array_equal(again().score_0, first.score_0)
  (tmp_path / "2.webp").write_bytes(tiles[4])
  with pytest.raises(ValueError, match="scores.npz is the index of 3 records with fingerprint .*; delete it"):
    again()
  (tmp_path / "2.webp").write_bytes(tiles[2])
  (tmp_path / "pairs.jsonl").write_text("".join(lines).replace("3.webp", "4.webp"))
  with pytest.raises(ValueError, match="scores.npz is the index of 3 records"):
    again()
  (tmp_path / "pairs.jsonl").write_text("".join(lines))
  assert np.array_equal(again().score_0, first.score_0)
