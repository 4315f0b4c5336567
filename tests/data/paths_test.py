"""Data in a bucket: what each source gives from there is what it gives from a folder, and what cannot be is said."""

import functools
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from fsspec.registry import _registry

from jaxpref import config
from jaxpref.data import emoji, latents, paths, pickapic, pipeline, records, sources
from jaxpref.data import index as index_lib
from jaxpref.training import inputs
from tests.data import bucket as buckets
from tests.data import latents_test, pickapic_test

bucket, served, parquet = buckets.bucket, buckets.served, pickapic_test.parquet  # fixtures


def test_paths_of_this_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert paths.open_path("~/a") == paths.open_path(tmp_path / "a") == tmp_path / "a"
  assert paths.size(tmp_path / "a") is paths.size(tmp_path / "a" / "b") is None
  paths.write(tmp_path / "a", b"content")
  assert os.listdir(tmp_path) == ["a"] and paths.size(tmp_path / "a") == 7
  assert paths.names(tmp_path) == {"a"} and paths.names(tmp_path / "a") == paths.names(tmp_path / "b") == set()
  with pytest.raises(paths.CannotBeWritten, match=r"none/a cannot be written \(No such file or directory\); free some"):
    paths.write(tmp_path / "none" / "a", b"")


def test_paths_in_a_bucket(bucket, tmp_path):
  folder = paths.open_path("gs://bucket/new")
  assert not folder.exists() and paths.names(folder) == set() and paths.size(folder / "a") is None
  folder.mkdir(parents=True, exist_ok=True)
  paths.write(folder / "a", b"\xef\xbb\xbfa\r\nb")
  with paths.part_of(folder / "c") as part:
    part.write_bytes(b"content")
    paths.move(part, folder / "c")
  assert not part.exists() and paths.names(folder) == set(os.listdir(bucket / "new")) == {"a", "c"}
  assert paths.size(folder / "c") == 7 and paths.read(folder / "c") == b"content" and paths.size(folder) is None
  with paths.open_text(folder / "a") as lines:
    assert list(lines) == ["a\r\n", "b"]
  assert pickle.loads(pickle.dumps(folder)) == folder == paths.open_path(folder)


def test_a_copy_that_did_not_arrive_is_an_error(bucket, tmp_path, monkeypatch):
  (tmp_path / "part").write_bytes(b"content")
  path = paths.open_path("gs://bucket/file")
  monkeypatch.setattr(type(path), "copy", lambda *_, **__: path.write_bytes(b"cont"))
  with pytest.raises(OSError, match=r"gs://bucket/file cannot be written \(4 of its 7 bytes arrived\)"):
    paths.move(tmp_path / "part", path)


@pytest.mark.parametrize(
  ("raised", "kind", "sentence"),
  [
    (ImportError("no gcsfs"), ValueError, r"without the package gcsfs \(no gcsfs\); pip install gcsfs, or copy"),
    (RuntimeError("401"), OSError, r"gs://bucket/a cannot be reached \(RuntimeError: 401\); check its name, the"),
    (PermissionError("forbidden"), OSError, "forbidden"),
  ],
)
def test_what_clients_of_buckets_raise_is_one_sentence(bucket, monkeypatch, raised, kind, sentence):
  class Broken(_registry["gcs"]):
    def exists(self, path, **_):
      raise raised

  monkeypatch.setitem(_registry, "gcs", Broken)
  for fails in (sources.open_tfds, sources.open_pairs_file, sources.open_rankings, sources.read_prompts,
                sources.detect_kind, latents.open_folder, pickapic.find_shards):  # fmt: skip
    with pytest.raises(kind, match=sentence):
      fails("gs://bucket/a")


def test_other_schemes_are_refused(tmp_path):
  for path in ("http://example.com/a.jsonl", "ftp://a", "://a"):
    with pytest.raises(ValueError, match=f"{path} is not a place for data; expected a path, or gs://, s3://"):
      sources.open_pairs_file(path)


def test_array_record_files_are_read_from_google_or_here(bucket, monkeypatch, tmp_path):
  monkeypatch.setitem(_registry, "s3", _registry["gcs"])
  for fails in (
    sources.open_tfds,
    latents.open_folder,
    functools.partial(records.open_folder, split="train"),
    functools.partial(pickapic.prepare, tmp_path),
  ):
    (tmp_path / "a").touch()
    with pytest.raises(
      ValueError, match="s3://bucket/a: ArrayRecord files can only be read from this machine and from"
    ):
      fails("s3://bucket/a")
  plan = latents_test.PLAN
  with pytest.raises(ValueError, match="s3://bucket/a: ArrayRecord files"):
    latents.start(paths.open_path("s3://bucket/a"), plan)


# ---- Files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(bucket):
  """A file of each kind, and images, in the bucket."""
  (bucket / "raw" / "test" / "images").mkdir(parents=True)
  names = [f"images/{i}.webp" for i in range(6)]
  for i, name in enumerate(names):
    (bucket / "raw" / "test" / name).write_bytes(emoji.encoded_tile("noto", i))
  shutil.copytree(bucket / "raw" / "test" / "images", bucket / "raw" / "images")
  pairs = [{"caption": f"caption {i}", "image_0": names[i], "image_1": names[5 - i], "label_0": 1} for i in range(6)]
  (bucket / "raw" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\r\n" for row in pairs))
  liked = [f"caption {i},{name},{i % 2}" for i, name in enumerate(names)]
  (bucket / "raw" / "images.csv").write_text("\ufeff" + "\n".join(["caption,image,label", *liked]))
  (bucket / "raw" / "test.json").write_text(
    json.dumps([{"prompt": "a cat", "image_path": names, "rank": list(range(6))}])
  )
  (bucket / "raw" / "prompts.txt").write_text("a cat\na dog\n")
  return bucket / "raw"


KINDS = {"pairs_file": "pairs.jsonl", "unpaired_file": "images.csv", "rankings": "test.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_their_images(raw, kind):
  assert sources.detect_kind(f"gs://bucket/raw/{KINDS[kind]}") == kind
  found, expected = (sources.open_source(kind, f"{at}/{KINDS[kind]}") for at in ("gs://bucket/raw", raw))
  assert len(found) == len(expected) > 0
  assert [found[i] for i in range(len(found))] == [expected[i] for i in range(len(expected))]
  assert pickle.loads(pickle.dumps(found))[1] == expected[1]  # for worker processes
  for name, value in expected.index.arrays().items():
    np.testing.assert_array_equal(found.index.arrays()[name], value)


def test_the_images_of_rankings_elsewhere_and_prompts(raw):
  shutil.move(raw / "test", raw / "elsewhere")
  shutil.rmtree(raw / "images")
  with pytest.raises(FileNotFoundError, match="'images/0.webp' does not exist in gs://bucket/raw .6 of 6 files are mi"):
    sources.open_rankings("gs://bucket/raw/test.json")
  source = sources.open_rankings("gs://bucket/raw/test.json", images="gs://bucket/raw/elsewhere")
  assert source[0]["image_0"] == emoji.encoded_tile("noto", 0)
  assert sources.read_prompts("gs://bucket/raw/prompts.txt") == ["a cat", "a dog"]
  for fails in (sources.open_pairs_file, sources.open_rankings, sources.read_prompts, sources.detect_kind):
    with pytest.raises(FileNotFoundError, match="there is no file.*gs://bucket/raw/none.jsonl"):
      fails("gs://bucket/raw/none.jsonl")


OUTSIDE = ("../secret", "a/../../secret", "/etc/hostname", "gs://other/a.png", "/gs/other/a.png", "a/\0")


@pytest.mark.parametrize("place", ["gs://bucket/raw", "here"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_a_file_cannot_leave_its_folder(raw, place, name):
  (raw.parent / "secret").write_bytes(b"")
  row = {"caption": "a", "image_0": "images/0.webp", "image_1": name, "label_0": 1}
  (raw / "secret.jsonl").write_text(json.dumps(row))
  (raw / "liked.jsonl").write_text(json.dumps({"caption": "a", "image": name, "label": 1}))
  (raw / "ranks.json").write_text(json.dumps([{"prompt": "a", "image_path": ["0.webp", name], "rank": [1, 2]}]))
  at = raw if place == "here" else place
  for opens, file, sentence in (
    (sources.open_pairs_file, "secret.jsonl", "line 1: image_1 = .*; expected the path of an image file, relative"),
    (sources.open_unpaired_file, "liked.jsonl", "line 1: image = .*; expected the path of an image file, relative"),
    (sources.open_rankings, "ranks.json", "entry 0: image_path has .*; expected paths relative to the folder of"),
  ):
    with pytest.raises(ValueError, match=f"{file}, {sentence}"):
      opens(f"{at}/{file}")


def test_scores_and_configs(raw, monkeypatch):
  """An index in a bucket, and a config whose path is there."""
  c = config.default()
  c.data.update(source="pairs_file", path="gs://bucket/raw/pairs.jsonl")
  config.check(c)
  source = inputs.open_pairs(c)
  index, fingerprint = source.index, sources.content_fingerprint(source)
  scored = index_lib.Index(**index.arrays(), score_0=np.arange(6), score_1=np.full(6, 2.5))
  index_lib.save(scored, "gs://bucket/raw/scores/all.npz", fingerprint=fingerprint)
  assert os.listdir(raw / "scores") == ["all.npz"]
  c.data.update(scores="gs://bucket/raw/scores/all.npz", labels="scores")
  chosen = inputs.pairs_source(c)
  assert [chosen[i]["label_0"] for i in range(6)] == [0, 0, 0, 1, 1, 1]


# ---- Datasets --------------------------------------------------------------------------------------------------


def test_pickapic_from_a_bucket_to_a_bucket(served, parquet, tmp_path, monkeypatch):
  bucket = served
  shutil.copytree(parquet, bucket / "parquet")
  folder = pickapic.prepare("gs://bucket/parquet", "gs://bucket/out")
  assert folder == "gs://bucket/out/pickapic/v2/1.0.0"
  local = pickapic.prepare(parquet, tmp_path / "out")
  there = bucket / "out" / "pickapic" / "v2" / "1.0.0"
  assert sorted(os.listdir(there)) == sorted(os.listdir(local))
  for name in os.listdir(local):
    if "array_record" in name or name.endswith(".npz"):
      assert (there / name).read_bytes() == (tmp_path / "out" / "pickapic" / "v2" / "1.0.0" / name).read_bytes(), name
  monkeypatch.setattr(sources, "index_of_records", lambda *args, **kwargs: pytest.fail("all records are read"))
  assert sources.detect_kind("gs://bucket/out") == "tfds" and "train" in sources.splits_of("gs://bucket/out")
  found, expected = (sources.open_tfds(place, "train[3:20]") for place in ("gs://bucket/out", local))
  assert [found[i] for i in range(17)] == [expected[i] for i in range(17)]
  options = dict(batch_size=8, image_size=16, tokenize=lambda c: np.zeros((len(c), 1), np.int32), seed=0)
  for name, value in next(pipeline.pair_batches(expected, **options)).items():
    np.testing.assert_array_equal(next(pipeline.pair_batches(found, **options))[name], value)


def test_precomputed_folders_in_a_bucket(served, tmp_path):
  """Begun and continued there; the same bytes as here, and nothing else is left."""
  bucket = served
  local, folder = latents_test.write(tmp_path / "data"), paths.open_path("gs://bucket/made")
  latents_test.write(folder, [1], finish=False)
  assert [latents.finished(folder, name) is not None for name in latents_test.NAMES] == [False, True, False]
  with pytest.raises(FileNotFoundError, match="gs://bucket/made is not finished"):
    latents.open_folder("gs://bucket/made")
  latents_test.write(folder, [0, 2])
  assert latents_test.files(bucket / "made") == latents_test.files(local)
  found, expected = (latents.open_folder(place) for place in ("gs://bucket/made", local))
  for row in range(latents_test.NUM_ROWS):
    latents_test.equal(found.row(row, False, True), expected.row(row, False, True))
  assert [error for _, error in latents.damaged_files("gs://bucket/made")] == [None] * 5
  latents_test.flip_bit(bucket / "made" / latents_test.NAMES[2], 70)
  assert [error is None for _, error in latents.damaged_files("gs://bucket/made")].count(False) == 1
  (bucket / "made" / latents_test.NAMES[1]).unlink()
  with pytest.raises(latents.DamagedFile, match="it is missing"):
    latents.open_folder("gs://bucket/made")
  with pytest.raises(latents.DamagedFile, match="gs://bucket/made/rows-00001-of-00003.array_record is damaged .*No"):
    found.rows[latents_test.ROWS_PER_FILE]
  with pytest.raises(ValueError, match="--out=gs://bucket/made was begun with num_rows=10, now it is 11"):
    latents.start(folder, latents_test.PLAN | {"num_rows": 11})
