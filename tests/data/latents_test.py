"""Folders of precomputed data: what is written is read again, and what is damaged, unfinished or foreign is named."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import pickle
import resource
import shutil
from typing import Any

import numpy as np
import pytest

from jaxpref.data import batching, latents

NUM_ROWS, ROWS_PER_FILE = 10, 4
IDS = {caption: np.asarray([7, i, 9], np.int32) for i, caption in enumerate(["", "a", "b", "c"])}
KEYS = {caption: latents.prompt_key(ids) for caption, ids in IDS.items()}
PLAN: dict[str, Any] = {
  "format": latents.FORMAT,
  "kind": "pairs",
  "weights": {"vae": "0123"},
  "config": {"model": "x", "data.flip": True},
  "rows_per_file": ROWS_PER_FILE,
  "num_rows": NUM_ROWS,
  "empty_prompt": KEYS[""],
}
NAMES = [latents.file_name("rows", i, 3) for i in range(3)]


def value(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def caption(row):
  return ["a", "b", "c"][row % 3]


def row_record(row):
  record = {}
  for prefix, seed in (("", row), (latents.FLIPPED, 100 + row)):
    record |= {
      f"{prefix}moments_0": value(seed, 2, 2, 4),
      f"{prefix}label_0": np.float32(row % 2),
      f"{prefix}prompt": np.asarray(KEYS[caption(row)]),
    }
  return record


def prompt_record(key):
  return {"encoder_hidden_states": value(abs(key) % 1000, 3, 5), "prompt": np.asarray(key)}


def write(folder, files=range(3), finish=True):
  latents.start(folder, PLAN)
  for i in files:
    rows = range(i * ROWS_PER_FILE, min((i + 1) * ROWS_PER_FILE, NUM_ROWS))
    prompts = np.stack([IDS[c] for c in sorted({"", *map(caption, rows)})])
    records = [*map(row_record, rows), {"input_ids": prompts}]
    latents.write_file(folder, NAMES[i], records, skipped=lambda i=i: [f"image {i}"])
  if finish:
    keys, ids = latents.different_prompts(folder, NAMES)
    prompts = latents.file_name("prompts", 0, 1)
    latents.write_file(folder, prompts, map(prompt_record, keys.tolist()))
    latents.write_prompts(folder, keys, ids)
    latents.write_manifest(folder, {"rows": NAMES, "prompts": [prompts]}, {"jax": "1"})
  return folder


@pytest.fixture
def folder(tmp_path):
  return write(tmp_path / "data")


def equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], strict=True)


def test_rows_are_read_as_they_were_written(folder):
  data = latents.open_folder(folder)
  assert data.manifest["config"] == PLAN["config"] and data.manifest["skipped"] == ["image 0", "image 1", "image 2"]
  assert sorted(KEYS.values()) == data.keys.tolist()  # each prompt once, with the empty one
  for row in range(NUM_ROWS):
    for dropped, flipped in ((False, False), (True, False), (False, True)):
      prefix, key = latents.FLIPPED if flipped else "", KEYS["" if dropped else caption(row)]
      expected = {name: row_record(row)[prefix + name] for name in ("moments_0", "label_0")}
      expected["encoder_hidden_states"] = prompt_record(key)["encoder_hidden_states"]
      equal(data.row(row, dropped, flipped), {k: np.asarray(v) for k, v in expected.items()})
  with pytest.raises(latents.DamagedFile, match="lacks the prompt 17"):
    data.prompt(17)
  equal(pickle.loads(pickle.dumps(data)).row(9), data.row(9))  # worker processes open it anew


def test_batches_have_the_order_and_the_draws_of_the_pipeline(folder):
  def load(position, dropped, flipped):
    return {"drawn": np.asarray([position, dropped, flipped])}

  options = dict(batch_size=5, seed=3, caption_dropout=0.4, flip=True, process_index=0, process_count=1, num_threads=0)
  expected = batching.open_batches(NUM_ROWS, load, what="", **options)
  data = latents.open_folder(folder)
  found = latents.batches(data, **options)
  seen = set()
  for _ in range(6):
    drawn = next(expected)["drawn"].tolist()
    batch = next(found)
    assert batch.pop("record").tolist() == [i for i, _, _ in drawn]
    equal(batch, batching.stack([data.row(i, bool(d), bool(f)) for i, d, f in drawn]))
    seen |= {(d, f) for _, d, f in drawn}
  assert len(seen) == 4


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_folder_is_continued(folder, tmp_path):
  other = tmp_path / "other"
  write(other, [1], finish=False)

  def broken():
    yield row_record(0)
    raise KeyboardInterrupt

  for name in (NAMES[0], NAMES[2]):
    with pytest.raises(KeyboardInterrupt):
      latents.write_file(other, name, broken())
  (other / f".{NAMES[2]}.5.part").write_bytes(b"of a process that is no more")
  assert len(list(other.glob(".*.part"))) == 3
  latents.start(other, PLAN, process_index=1, process_count=2)  # whose is number 5
  assert len(list(other.glob(".*.part"))) == 2
  assert [latents.finished(other, name) is not None for name in NAMES] == [False, True, False]
  with pytest.raises(FileNotFoundError, match=r"is not finished \(no manifest.json\); run python -m jaxpref.prec"):
    latents.open_folder(other)
  write(other, [0, 2])
  assert files(other) == files(folder)


def test_a_file_without_its_note_is_not_finished(folder):
  (folder / f"{NAMES[1]}.json").unlink()  # the process died between the two
  assert latents.finished(folder, NAMES[1]) is None


def flip_bit(path, place):
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(content)


def test_damage_is_named_with_its_remedy(folder):
  assert [error for _, error in latents.damaged_files(folder)] == [None] * 5
  content = (folder / NAMES[1]).read_bytes()
  place = content.index(value(6, 2, 2, 4).tobytes())  # of row 6, the third one of its file
  flip_bit(folder / NAMES[1], place + 3)
  data = latents.open_folder(folder)  # the size is right
  equal(data.row(5), latents.open_folder(folder).row(5))
  remedy = r"delete it and run the same python -m jaxpref\.precompute again; it makes only what is missing\."
  with pytest.raises(latents.DamagedFile, match=rf"{NAMES[1]} is damaged \(.*hash.*\); {remedy}"):
    data.row(6)
  damaged = {name: str(error) for name, error in latents.damaged_files(folder) if error}
  assert damaged.keys() == {NAMES[1]} and "its content has changed since it was written" in damaged[NAMES[1]]

  (folder / NAMES[1]).write_bytes(content[:-1])
  with pytest.raises(latents.DamagedFile, match=rf"it has {len(content) - 1} bytes, expected {len(content)}"):
    latents.open_folder(folder)
  assert latents.finished(folder, NAMES[1]) is None
  (folder / NAMES[1]).unlink()
  with pytest.raises(latents.DamagedFile, match="it is missing"):
    latents.open_folder(folder)
  write(folder, [1])  # the remedy
  assert (folder / NAMES[1]).read_bytes() == content
  assert [error for _, error in latents.damaged_files(folder)] == [None] * 5


def test_prompts_of_another_table_are_noticed(folder):
  keys = latents.open_folder(folder).keys
  latents.write_file(folder, latents.file_name("prompts", 0, 1), map(prompt_record, keys.tolist()[::-1]))
  with pytest.raises(latents.DamagedFile, match="its prompts differ from those of the table"):
    latents.open_folder(folder).row(0)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"config": PLAN["config"] | {"model": "y"}}, "begun with config.model='x', now it is 'y'; choose another"),
    ({"config": PLAN["config"] | {"data.new": 1}}, "begun with config.data.new=None, now it is 1"),
    ({"num_rows": 11}, "begun with num_rows=10, now it is 11"),
    ({"weights": {"vae": "4567"}}, "begun with other weights of the vae, though of the same name; choose"),
  ],
)
def test_another_plan_is_refused(folder, change, sentence):
  before = files(folder)
  with pytest.raises(ValueError, match=sentence):
    latents.start(folder, PLAN | change)
  assert files(folder) == before


def test_other_folders_are_refused(folder, tmp_path):
  content = (folder / "manifest.json").read_text()
  manifest = json.loads(content)
  foreign = json.dumps(manifest | {"rows": ["../secret.array_record"]})
  for text in ("[", "[]", "{}", content[:40], json.dumps(manifest | {"rows": None})[:-2], foreign):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(latents.DamagedFile, match=r"manifest.json is damaged \(.*\); delete it and run the same"):
      latents.open_folder(folder)
  (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
  with pytest.raises(ValueError, match="has format 2, expected 1; make it again with this version"):
    latents.open_folder(folder)
  with pytest.raises(FileNotFoundError, match=r"nowhere has no precomputed data \(no manifest.json\)"):
    latents.open_folder(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="nothing to compare with; finish it first"):
    next(latents.damaged_files(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match="is not empty and has no plan.json of an earlier run"):
    latents.start(pathlib.Path(__file__).parent, PLAN)
  with pytest.raises(ValueError, match="is a file; name a folder"):
    latents.start(pathlib.Path(__file__), PLAN)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\0\0\0"])
def test_a_damaged_plan_is_answered_by_what_helps(folder, text):
  """Of a complete folder the manifest has it too; of another one nobody knows what is in its files."""
  (folder / "plan.json").write_text(text)
  latents.check_plan(folder, PLAN)
  (folder / "manifest.json").unlink()
  before = files(folder)
  with pytest.raises(latents.DamagedFile, match=rf"plan.json is damaged \(.*\); delete the folder {folder} and run"):
    latents.start(folder, PLAN)
  assert files(folder) == before
  shutil.rmtree(folder)  # the remedy
  write(folder)
  latents.open_folder(folder)


def test_few_files_stay_open(folder, monkeypatch):
  """Whatever the order, and if several threads read."""
  monkeypatch.setattr(latents, "MAX_OPEN_FILES", 2)
  expected = [latents.open_folder(folder).rows[i] for i in range(NUM_ROWS)]
  data = latents.open_folder(folder)

  def opened():
    links = [pathlib.Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return sum(link.exists() and os.readlink(link).startswith(str(folder)) for link in links)

  before = opened()  # of the object above
  order = np.random.default_rng(0).integers(0, NUM_ROWS, 200).tolist()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for i, row in zip(order, pool.map(lambda i: data.rows[i], order), strict=True):
      equal(row, expected[i])
  assert opened() - before <= 2


@contextlib.contextmanager
def largest_file(size):
  """No file of this process may become larger; stands for a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 70_000])
def test_nothing_is_taken_for_whole_where_there_was_no_space(folder, tmp_path, size):
  """The file of rows, its note, or the plan do not fit; a second try makes what one without a limit makes."""
  other = tmp_path / "other"
  with largest_file(size), pytest.raises(OSError, match=r"other.* cannot be written \(.*File too large.*\); free some"):
    write(other, finish=False)
    latents.write_file(other, NAMES[2], (row_record(i) for i in range(10_000)))
  assert not [name for name in NAMES if latents.finished(other, name) and size < 65_536]
  with pytest.raises(FileNotFoundError, match="has no precomputed data|is not finished"):
    latents.open_folder(other)
  write(other)
  assert files(other) == files(folder)


def test_a_full_disk_is_an_os_error(tmp_path):
  latents.start(tmp_path / "data", PLAN)
  (tmp_path / "data" / f".{NAMES[0]}.0.part").symlink_to("/dev/full")
  with pytest.raises(OSError, match="cannot be written .*No space left on device"):
    latents.write_file(tmp_path / "data", NAMES[0], map(row_record, range(4)))
