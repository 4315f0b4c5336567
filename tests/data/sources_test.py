"""Sources of preference data: what each gives as records, and one sentence for what is wrong with a file."""

import csv
import json
import os
import pathlib
import pickle
import re
import shutil
import time

import numpy as np
import pytest

from jaxpref import config
from jaxpref.data import emoji, emoji_pairs, pipeline, records, sources
from jaxpref.data import index as index_lib


def encoded(class_id, style="noto"):
  return emoji.encoded_tile(style, class_id)


@pytest.fixture
def images(tmp_path):
  """A folder with images/0.webp to images/7.webp."""
  folder = tmp_path / "data" / "images"
  folder.mkdir(parents=True)
  for i in range(8):
    (folder / f"{i}.webp").write_bytes(encoded(i))
  return folder


def image(i):
  return f"images/{i}.webp"


def write(images, rows, name="pairs.jsonl"):
  file = images.parent / name
  if file.suffix == ".jsonl":
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="") as stream:
      writer = csv.DictWriter(stream, columns)
      writer.writeheader()
      writer.writerows(rows)
  return file


def pair(caption="a cat", first=0, second=1, **fields):
  return {"caption": caption, "image_0": image(first), "image_1": image(second)} | fields


# ---- Pairs in a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_pairs_file_reads_jsonl_and_csv(images, name):
  rows = [
    pair("a cat, sitting", 0, 1, label_0=1, id="first"),
    pair("a dog", 2, 3, label_0=0, original_size_1="1024x768"),
    pair("a cat, sitting", 0, 4, preferred="tie"),
    pair("A Dog", 3, 5, preferred=1),
    pair("a dog", 5, 2, preferred=0),
  ]
  source = sources.open_pairs_file(write(images, rows, name))
  assert len(source) == len(source.index) == 5
  assert source.index.label_0.tolist() == [1, 0, 0.5, 0, 1]
  assert source[0] == {
    "id": "first",
    "caption": "a cat, sitting",
    "image_0": encoded(0),
    "image_1": encoded(1),
    "label_0": 1.0,
    "num_example_per_prompt": 2,
  }
  assert source[1]["id"] == f"{name}:{2 if name.endswith('jsonl') else 3}"  # the line
  assert source[1]["original_size_1"] == [1024, 768] and "original_size_0" not in source[1]
  assert records.original_size(source[1], 1, "image_1") == (1024, 768)
  assert [source[i]["num_example_per_prompt"] for i in range(5)] == [2, 3, 2, 3, 3]
  assert source[np.int64(-1)]["image_1"] == encoded(2)
  assert source.index.image_0[0] == source.index.image_0[2] != source.index.image_1[0]
  assert source.index.caption_words.tolist() == [3, 2, 3, 2, 2]
  with pytest.raises(IndexError):
    source[5]


def test_names_of_one_file_are_one_image(images):
  """Relative paths in every form, and links of both kinds; copies are noticed when they are read."""
  os.symlink(images / "0.webp", images / "soft.webp")
  os.link(images / "0.webp", images / "hard.webp")
  os.symlink(images, images.parent / "more")
  shutil.copyfile(images / "0.webp", images / "copy.webp")
  names = ["./images/0.webp", "images//0.webp", "images/./0.webp", "more/0.webp", image("soft"), image("hard")]
  same = [{"caption": "a", "image_0": image(0), "image_1": name, "preferred": 0} for name in names]
  source = sources.open_pairs_file(write(images, [*same, pair(preferred=0), pair(preferred=1, second="copy")]))
  assert (source.index.image_0 == source.index.image_1).tolist() == [True] * len(names) + [False] * 2
  assert index_lib.select(source.index).kept.tolist() == [len(names), len(names) + 1]
  assert source[0]["image_1"] == source[len(names)]["image_0"] == encoded(0)
  liked = [{"caption": "a", "image": name, "label": 1} for name in names]
  assert len(set(sources.open_unpaired_file(write(images, liked, "images.jsonl")).index.image_0)) == 1
  rankings = sources.open_rankings(write_rankings(images, [ranking([0, "./0", 1], rank=[1, 2, 3])]))
  assert (rankings.index.image_0 == rankings.index.image_1).sum() == 1
  os.symlink(images / "nowhere.webp", images / "broken.webp")
  with pytest.raises(FileNotFoundError, match="line 1: image_1 = 'images/broken.webp' does not exist"):
    sources.open_pairs_file(write(images, [pair(second="broken", preferred=0)]))


def test_images_are_read_when_asked_for(images):
  source = sources.open_pairs_file(write(images, [pair(label_0=1), pair("b", 2, 3, label_0=0)]))
  (images / "2.webp").write_bytes(b"changed since")
  assert source[1]["image_0"] == b"changed since"


def test_scores_in_a_file_make_labels_where_none_are_given(images):
  rows = [
    pair(score_0=21.0, score_1=20),
    pair("b", 2, 3, score_0="1", score_1=1.0),
    pair("c", score_0=0, score_1=3, label_0=1),
  ]
  source = sources.open_pairs_file(write(images, rows))
  assert source.index.label_0.tolist() == [1, 0.5, 1]
  assert source.index.score_0.tolist() == [21, 1, 0] and source.index.score_1.tolist() == [20, 1, 3]


def test_given_counts_of_a_prompt_are_kept(images):
  source = sources.open_pairs_file(write(images, [pair(label_0=1, num_example_per_prompt=7)]))
  assert source[0]["num_example_per_prompt"] == 7


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"caption": " "}, "line 2: caption = ' '; expected a text that is not empty"),
    ({"caption": ""}, "line 2: no caption, or an empty one; expected caption, image_0, image_1 in every row"),
    ({"caption": None}, "line 2: no caption"),
    ({"caption": 3}, "line 2: caption = 3"),
    ({"image_1": None}, "line 2: no image_1"),
    ({"image_1": 5}, "line 2: image_1 = 5; expected the path"),
    ({"label": 1}, "line 2: unknown column 'label'; did you mean 'label_0'. Expected caption, image_0"),
    ({"zebra": 1}, "line 2: unknown column 'zebra'; expected caption, image_0"),
    (
      {"label_0": 2},
      "line 2: label_0 = 2; expected 1 .image_0 is preferred., 0 .image_1 is., 0.5 .a tie. or a probability",
    ),
    ({"label_0": -0.1}, "line 2: label_0 = -0.1; expected 1"),
    ({"label_0": True}, "line 2: label_0 = True; expected 1"),
    ({"noise_0": [1]}, r"line 2: noise_0 = \[1\]; expected \[seed, number\] or SEED:NUMBER"),
    ({"noise_1": "3:-1"}, "line 2: noise_1 = '3:-1'; expected"),
    ({"label_0": "left"}, "line 2: label_0 = 'left'"),
    (
      {"label_0": None},
      "line 2: no label_0, no preferred and no scores; say which image is .*pairs --out=.* --label=REWARD",
    ),
    ({"preferred": 0}, "line 2: both label_0 and preferred; give one of them"),
    ({"label_0": None, "preferred": "left"}, "line 2: preferred = 'left'; expected 0 .image_0., 1 .image_1. or tie"),
    ({"label_0": None, "preferred": True}, "line 2: preferred = True"),
    ({"score_0": 1, "score_1": 2}, "line 2: score_0 and score_1 are given in a part of the rows or columns"),
    ({"score_0": 1}, "line 2: score_0 and score_1 are given in a part"),
    ({"num_example_per_prompt": 0}, "line 2: num_example_per_prompt = 0; expected a positive integer"),
    ({"num_example_per_prompt": "few"}, "line 2: num_example_per_prompt = 'few'; expected a number"),
    ({"original_size_0": [3]}, r"line 2: original_size_0 = \[3\]; expected \[height, width\] or HEIGHTxWIDTH"),
    ({"original_size_0": "0x3"}, "line 2: original_size_0 = '0x3'"),
  ],
)
def test_wrong_rows_are_answered_by_file_and_line(images, row, message):
  file = write(images, [pair(label_0=1), pair(label_0=0) | row])
  with pytest.raises(ValueError, match=f"pairs.jsonl, {message}"):
    sources.open_pairs_file(file)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_probabilities_and_the_noise_of_drawn_images(images, name):
  noise = (lambda a, b: f"{a}:{b}") if name.endswith("csv") else (lambda a, b: [a, b])
  rows = [
    pair(label_0=0.7, noise_0=noise(3, 0), noise_1=noise(3, 1)),
    pair(first=0, second=2, label_0=0.25),
    pair(first=3, second=0, label_0=1, noise_0=noise(4, 9)),
  ]
  file = write(images, rows, name)
  source = sources.open_pairs_file(file)
  np.testing.assert_allclose(source.index.label_0, [0.7, 0.25, 1])
  assert (source[0]["noise_0"], source[0]["noise_1"]) == ([3, 0], [3, 1]) and "noise_0" not in source[1]
  # The winner that takes another one's place brings its noise.
  selection = index_lib.Selection(np.arange(3), source.index.label_0, np.ones(3), np.array([2, 1, 2]))
  chosen = sources.Selected(source, selection)
  assert (chosen[0]["noise_0"], chosen[0]["noise_1"]) == ([4, 9], [3, 1])
  assert chosen[0]["image_0"] == source[2]["image_0"]


def test_a_folder_stands_for_its_pairs(images):
  file = write(images, [pair(label_0=1)])
  assert sources.detect_kind(file.parent) == "pairs_file"
  assert sources.open_source("pairs_file", file.parent)[0] == sources.open_pairs_file(file)[0]
  with pytest.raises(FileNotFoundError, match="images has no pairs.jsonl; finish it by the command that began it"):
    sources.open_pairs_file(images)
  with pytest.raises(ValueError, match="images is not a .jsonl or .csv file; it is a folder: name the file in it"):
    sources.open_source("unpaired_file", images)


def test_missing_images_are_answered_by_file_and_line(images):
  file = write(images, [pair(label_0=1), pair(label_0=0, second=9)])
  with pytest.raises(FileNotFoundError, match=r"line 2: image_1 = 'images/9.webp' does not exist in .*data; correct"):
    sources.open_pairs_file(file)
  file = write(images, [pair(label_0=1) | {"image_0": "elsewhere/0.webp"}, pair(label_0=0, second=9)])
  with pytest.raises(FileNotFoundError, match=r"line 1: image_0 = 'elsewhere/0.webp' .* .2 of 4 files are missing."):
    sources.open_pairs_file(file)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl", "", "a.jsonl has no rows"),
    ("a.jsonl", "\n\n{'caption'}", "a.jsonl, line 3: not JSON"),
    ("a.jsonl", "[1, 2]", "a.jsonl, line 1: found a list; expected one object per line"),
    ("a.csv", "", "a.csv, line 1: no caption"),
    ("a.csv", "caption,image_0,image_1,lable_0\n", "a.csv, line 1: unknown column 'lable_0'; did you mean 'label_0'"),
    ("a.csv", "caption,image_0\n", "a.csv, line 1: no image_1"),
    ("a.csv", "caption,image_0,image_1\na,b,c,d\n", "a.csv, line 2: more cells than the header has; quote texts"),
    ("a.csv", "caption,image_0,image_1,label_0\na,b,,1\n", "a.csv, line 2: no image_1"),
    ("a.csv", 'caption,image_0,image_1\n"a"b,c,d\n', "a.csv, line 2: not CSV"),
    ("a.txt", "", "a.txt is not a .jsonl or .csv file"),
  ],
)
def test_wrong_files_are_answered_by_a_sentence(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    sources.open_pairs_file(tmp_path / name)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no file .*a.jsonl; expected .jsonl or .csv with caption"):
    sources.open_pairs_file(tmp_path / "a.jsonl")
  with pytest.raises(FileNotFoundError, match="there is no file .*nothing; expected .jsonl or .csv with caption"):
    sources.open_pairs_file(tmp_path / "nothing")
  (tmp_path / "a.csv").write_bytes("caption,image_0,image_1\n\xe9,a,b".encode("latin-1"))
  with pytest.raises(ValueError, match="a.csv is not UTF-8"):
    sources.open_pairs_file(tmp_path / "a.csv")


def test_pairs_of_a_file_feed_the_pipeline(images):
  rows = [pair(f"caption {i}", i, (i + 1) % 8, label_0=[1, 0, 0.5, 1][i % 4]) for i in range(8)]
  source = sources.open_pairs_file(write(images, rows))
  chosen = sources.Selected(source, index_lib.select(source.index))
  batches = pipeline.pair_batches(
    chosen, batch_size=6, image_size=64, tokenize=lambda c: np.zeros((len(c), 4), np.int32), seed=0, drop_ties=True
  )
  batch = next(batches)
  tiles = {i: np.asarray(records.decode(encoded(i), 64)[0], np.float32) for i in range(8)}

  def number(pixels):
    pixels = pixels.astype(np.float32) if pixels.dtype == np.uint8 else (pixels + 1) * 127.5
    return min(tiles, key=lambda i: np.abs(tiles[i] - pixels).mean())

  columns = (batch[name] for name in ("pixels_0", "pixels_1", "label_0"))
  found = {(number(a), number(b), float(label)) for a, b, label in zip(*columns, strict=True)}
  assert found == {(i, (i + 1) % 8, [1, 0, 0.5, 1][i % 4]) for i in range(8) if i % 4 != 2}


def test_repeated_pairs_and_pairs_of_an_image_with_itself(images):
  """The first are used as often as they are there, the second are ties, whatever the file says."""
  rows = [pair(label_0=1), pair(label_0=1), pair("a dog", 3, 3, label_0=1), pair("a dog", 3, 4, label_0=0)]
  source = sources.open_pairs_file(write(images, rows))
  chosen = sources.Selected(source, index_lib.select(source.index))
  assert [chosen[i]["weight"] for i in range(3)] == [0.5, 0.5, 1]
  assert [chosen[i]["caption"] for i in range(len(chosen))] == ["a cat", "a cat", "a dog"]
  liked = sources.unpaired(chosen)
  found = [(liked[i]["image"], liked[i]["label"]) for i in range(len(liked))]
  assert found == [(encoded(0), 1), (encoded(1), 0), (encoded(3), 0), (encoded(4), 1)]
  kept = index_lib.select(source.index, ties="keep")
  assert kept.label.tolist() == [1, 1, 0.5, 0]


def test_a_large_file_opens_in_seconds(tmp_path):
  """100,000 pairs; measured: 1.1 s of CPU."""
  (tmp_path / "images").mkdir()
  for i in range(8):
    (tmp_path / image(i)).write_bytes(b"")
  lines = [json.dumps(pair(f"caption {i // 10}", i % 8, (i + 1) % 8, label_0=i % 2)) for i in range(100_000)]
  (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
  start = time.process_time()
  source = sources.open_pairs_file(tmp_path / "pairs.jsonl")
  print(f"{time.process_time() - start:.2f} s")
  assert len(source) == 100_000 and time.process_time() - start < 10


# ---- Rankings --------------------------------------------------------------------------------------------------


def ranking(names, prompt="a cat", **fields):
  return {"prompt": prompt, "image_path": [f"{i}.webp" for i in names]} | fields


def write_rankings(images, entries, name="train.json", folder="train"):
  if folder:
    shutil.copytree(images, images.parent / folder, dirs_exist_ok=True)
  file = images.parent / name
  file.write_text(json.dumps(entries))
  return file


def test_rankings_of_the_training_file(images):
  """HPDv2's train.json: two images, human_preference 1 for the better one; the images in the folder train."""
  entries = [
    ranking([0, 1], human_preference=[0, 1], user_hash="ab"),
    ranking([2, 3], "a dog", human_preference=[1, 0], user_hash="cd"),
    {"prompt": "a cat", "file_path": ["4.webp", "0.webp"], "human_preference": [1, 1]},
  ]
  source = sources.open_rankings(write_rankings(images, entries))
  assert source.index.label_0.tolist() == [0, 1, 0.5]
  assert source[0]["image_1"] == encoded(1) and source[2]["image_0"] == encoded(4)
  assert [source[i]["id"] for i in range(3)] == ["train.json:0:0-1", "train.json:1:0-1", "train.json:2:0-1"]
  assert [source[i]["num_example_per_prompt"] for i in range(3)] == [2, 1, 2]
  assert source.index.image_0[0] == source.index.image_1[2]


def test_ranks_make_all_pairs_or_those_of_the_best(images):
  """HPDv2's test.json: rank 1 is the best; every pair has the order of its ranks, equal ranks are a tie."""
  ranks = [3, 1, 2, 2]
  file = write_rankings(images, [ranking([0, 1, 2, 3], rank=ranks, raw_annotations=[])], "test.json", "test")
  source = sources.open_rankings(file)
  found = {record["id"]: record["label_0"] for record in (source[i] for i in range(len(source)))}
  expected = {
    f"test.json:0:{i}-{j}": 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
    for i in range(4)
    for j in range(i + 1, 4)
  }
  assert found == expected and len(found) == 6
  winner = sources.open_rankings(file, pairs="winner")
  assert [winner[i]["id"] for i in range(len(winner))] == [f"test.json:0:{p}" for p in ("0-1", "1-2", "1-3")]
  assert winner.index.label_0.tolist() == [0, 1, 1]


def test_images_that_nobody_compared_make_no_pair(images):
  file = write_rankings(images, [ranking([0, 1, 2, 3], human_preference=[0, 0, 1, 0])])
  source = sources.open_rankings(file)
  assert [source[i]["id"][-3:] for i in range(len(source))] == ["0-2", "1-2", "2-3"]
  assert source.index.label_0.tolist() == [0, 0, 1]


def test_the_folder_of_the_images(images):
  entries = [ranking([0, 1], human_preference=[1, 0])]
  file = write_rankings(images, entries, folder=None)
  with pytest.raises(FileNotFoundError, match="entry 0: '0.webp' does not exist in .*data .2 of 2 files are missing."):
    sources.open_rankings(file)
  assert sources.open_rankings(file, images=images)[0]["image_0"] == encoded(0)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ("a", "entry 1: str; expected an object with prompt"),
    (ranking([0, 1], " ", rank=[1, 2]), "entry 1: prompt = ' '"),
    (ranking([0], rank=[1]), "entry 1: image_path = .*at least two file names"),
    (ranking([0, 1], rank=[1]), r"entry 1: rank = \[1\]; expected a number for each of the 2 images"),
    (ranking([0, 1]), "entry 1: human_preference = None"),
    (ranking([0, 1], human_preference=[1, 2]), r"entry 1: human_preference = \[1, 2\]; expected 1 for the preferred"),
  ],
)
def test_wrong_rankings_are_answered_by_file_and_entry(images, entry, message):
  file = write_rankings(images, [ranking([0, 1], human_preference=[1, 0]), entry])
  with pytest.raises(ValueError, match=f"train.json, {message}"):
    sources.open_rankings(file)


@pytest.mark.parametrize(
  ("content", "message"), [("{", "is not valid JSON"), ("{}", "does not hold a list, or an empty one")]
)
def test_files_that_are_no_rankings(tmp_path, content, message):
  (tmp_path / "train.json").write_text(content)
  with pytest.raises(ValueError, match=message):
    sources.open_rankings(tmp_path / "train.json")
  with pytest.raises(FileNotFoundError, match="there is no file"):
    sources.open_rankings(tmp_path / "test.json")
  with pytest.raises(ValueError, match="pairs='best'; expected 'all' or 'winner'"):
    sources.open_rankings(tmp_path / "train.json", pairs="best")


# ---- Single images ---------------------------------------------------------------------------------------------


def test_unpaired_file_reads_jsonl_and_csv(images):
  rows = [
    {"caption": "a cat", "image": image(0), "label": value, "id": str(i)}
    for i, value in enumerate([True, False, 1, 0, "true", "False", "1", "0"])
  ]
  for name in ("images.jsonl", "images.csv"):
    source = sources.open_unpaired_file(write(images, rows, name))
    assert source.index.label_0.tolist() == [1, 0] * 4
    record = source[3]
    assert record == {"id": "3", "caption": "a cat", "image": encoded(0), "label": 0.0}
    assert record["label"].dtype == np.float32
  with pytest.raises(ValueError, match="images.jsonl, line 1: label = 'good'; expected true or 1 .liked., false or 0"):
    sources.open_unpaired_file(write(images, [rows[0] | {"label": "good"}], "images.jsonl"))
  with pytest.raises(FileNotFoundError, match="line 1: image = 'b.webp' does not exist"):
    sources.open_unpaired_file(write(images, [rows[0] | {"image": "b.webp"}], "images.jsonl"))


def test_pairs_as_single_images(images):
  """Image 1 lost once and won once: it is there once and liked. Image 0 with another prompt is another record."""
  rows = [
    pair("a", 0, 1, label_0=1),
    pair("a", 1, 2, label_0=1),
    pair("a", 2, 3, label_0=0.5),
    pair("b", 4, 0, label_0=1, original_size_0=[7, 8]),
  ]
  source = sources.open_pairs_file(write(images, rows))
  single = sources.unpaired(source)
  found = {(record["caption"], record["image"]): record["label"] for record in (single[i] for i in range(len(single)))}
  assert found == {
    ("a", encoded(0)): 1.0,
    ("a", encoded(1)): 1.0,
    ("a", encoded(2)): 0.0,
    ("b", encoded(4)): 1.0,
    ("b", encoded(0)): 0.0,
  }
  assert len(single) == 5 and single[0]["id"] == "pairs.jsonl:1/0" and single[0]["label"].dtype == np.float32
  assert single.index.num_example_per_prompt.tolist() == [3, 3, 3, 2, 2]
  assert [record["original_size"] for i in range(5) if "original_size" in (record := single[i])] == [[7, 8]]


class Listed:
  """Records in memory, with an index that may not know which images are the same."""

  def __init__(self, rows, **columns):
    self._rows = rows
    labels = [row["label_0"] for row in rows]
    self.index = index_lib.make_index([row["caption"] for row in rows], label_0=labels, **columns)

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, i):
    return self._rows[i]


def test_pairs_as_single_images_where_images_are_not_known():
  rows = [
    {"caption": "a", "image_0": "A", "image_1": "B", "label_0": 0.0},
    {"caption": "a", "image_0": "A", "image_1": "C", "label_0": 0.5},
    {"caption": "a", "image_0": "A", "image_1": "C", "label_0": 1.0},
  ]
  single = sources.unpaired(Listed(rows))
  found = [(single[i]["id"], single[i]["image"], float(single[i]["label"])) for i in range(len(single))]
  assert found == [("0/0", "A", 0.0), ("0/1", "B", 1.0), ("2/0", "A", 1.0), ("2/1", "C", 0.0)]


# ---- Prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("a.txt", "a cat\n\n  \na dog\n"),
    ("a.json", '["a cat", "a dog"]'),
    ("a.json", '[{"caption": "a cat", "trainset_idx": 3}, {"caption": "a dog"}]'),
  ],
)
def test_read_prompts_reads_every_format(tmp_path, name, content):
  (tmp_path / name).write_text(content)
  assert sources.read_prompts(tmp_path / name) == ["a cat", "a dog"]


@pytest.mark.parametrize(
  "content", ["[1]", "[]", "3", '"abc"', '{"1": "a cat"}', '[{"text": "a"}]', "[", '["a", " "]', '[{"caption": ""}]']
)
def test_prompts_of_a_wrong_form_raise(tmp_path, content):
  (tmp_path / "a.json").write_text(content)
  with pytest.raises(ValueError, match="a.json.*expected"):
    sources.read_prompts(tmp_path / "a.json")
  (tmp_path / "a.txt").write_bytes(b"a caf\xe9")
  with pytest.raises(ValueError, match="a.txt is not UTF-8 .* convert it"):
    sources.read_prompts(tmp_path / "a.txt")


# ---- tfds ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  """The embedded pairs: a dataset without an index beside it."""
  folder = tmp_path_factory.mktemp("datasets")
  emoji_pairs.prepare(folder)
  return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXPREF_DATA_DIR", str(tmp_path / "cache"))
  return tmp_path / "cache" / "indexes"


def test_open_tfds_reads_records_and_index(dataset, cache, monkeypatch):
  folder = dataset / "emoji_pairs" / "openmoji_core" / "1.1.0"
  source = sources.open_tfds(dataset, "test")
  rows = list(emoji_pairs.records(split="test"))
  assert source.index.label_0.tolist() == [row["label_0"] for row in rows]
  assert source.index.prompt.tolist() == index_lib.prompt_ids(row["caption"] for row in rows).tolist()
  assert (source.index.num_example_per_prompt == 4).all() and source.index.image_0 is None
  assert source[7]["id"].decode() == rows[7]["id"] and isinstance(source[7]["image_0"], bytes)
  assert (folder / "index-test.npz").exists() and not cache.exists()
  # From now on the records are not read to open it.
  monkeypatch.setattr(sources, "index_of_records", lambda *args, **kwargs: pytest.fail("all records are read"))
  piece = sources.open_tfds(folder, "test[10:20]")
  assert len(piece) == 10 and piece[0]["id"].decode() == rows[10]["id"]
  assert piece.index.label_0.tolist() == [row["label_0"] for row in rows[10:20]]
  assert len(sources.open_tfds(folder, "test[-5:]").index) == 5
  assert len(sources.open_tfds(folder, "test[50%:]").index) == len(rows) // 2


def test_an_index_of_other_labels_is_made_again(dataset, cache, caplog):
  folder = dataset / "emoji_pairs" / "openmoji_core" / "1.1.0"
  right = sources.open_tfds(folder, "validation").index
  file = folder / "index-validation.npz"
  with np.load(file) as stored:
    fingerprint = str(stored["fingerprint"])
  wrong = right.take(np.arange(len(right))[::-1])
  index_lib.save(wrong, file, fingerprint=fingerprint)
  assert sources.open_tfds(folder, "validation").index.label_0.tolist() == right.label_0.tolist()
  assert "does not agree" in caplog.text
  index_lib.save(right, file, fingerprint="of other files")
  assert sources.open_tfds(folder, "validation").index.label_0.tolist() == right.label_0.tolist()
  assert "with fingerprint of other files" in caplog.text


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(dataset, cache, monkeypatch):
  folder = dataset / "emoji_pairs" / "openmoji_core" / "1.1.0"
  (folder / "index-test.npz").unlink(missing_ok=True)
  save = index_lib.save

  def save_elsewhere(index, file, **kwargs):
    if pathlib.Path(file).is_relative_to(dataset):
      raise PermissionError("read-only")
    save(index, file, **kwargs)

  monkeypatch.setattr(index_lib, "save", save_elsewhere)
  sources.open_tfds(folder, "test")
  assert len(list(cache.iterdir())) == 1 and not (folder / "index-test.npz").exists()
  monkeypatch.setattr(sources, "index_of_records", lambda *args, **kwargs: pytest.fail("all records are read"))
  sources.open_tfds(folder, "test")


def test_which_dataset_is_meant(dataset, tmp_path):
  assert sources.find_dataset(dataset).name == "1.1.0"
  assert set(sources.splits_of(dataset)) == {"train", "validation", "test"}
  with pytest.raises(FileNotFoundError, match="holds no dataset_info.json, nor does a folder in it"):
    sources.find_dataset(tmp_path)
  for version in ("incomplete.ABC_1.0.0", "1.0.0"):  # the first was left by a builder that was killed
    (tmp_path / "name" / version).mkdir(parents=True)
    (tmp_path / "name" / version / "dataset_info.json").write_text("{}")
  assert sources.find_dataset(tmp_path).name == "1.0.0"
  for version in ("2.0.0",):
    (tmp_path / "name" / version).mkdir(parents=True)
    (tmp_path / "name" / version / "dataset_info.json").write_text("{}")
  with pytest.raises(ValueError, match="several datasets, .*1.0.0, .*2.0.0; give the folder of one"):
    sources.find_dataset(tmp_path)


@pytest.fixture
def damaged(dataset, cache, tmp_path):
  """A copy of a dataset with an index beside it, and the one file of its split test."""
  folder = tmp_path / "copy" / "1.1.0"
  sources.open_tfds(dataset, "test")
  shutil.copytree(sources.find_dataset(dataset), folder)
  (file,) = folder.glob("*-test.array_record*")
  return folder, file


def test_a_file_of_a_dataset_that_is_not_there(damaged):
  folder, file = damaged
  file.unlink()
  with pytest.raises(FileNotFoundError, match=rf"{folder} lacks 1 of the 1 files of 'test', such as {file.name}; copy"):
    sources.open_tfds(folder, "test")
  sources.open_tfds(folder, "validation")  # of which all is there


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty"])
def test_a_file_of_a_dataset_that_cannot_be_read(damaged, damage):
  folder, file = damaged
  content = file.read_bytes()
  damages = {"truncated": content[: len(content) // 2], "overwritten": b"x" * len(content), "empty": b""}
  file.write_bytes(damages[damage])
  sentence = r"record \d+ of emoji_pairs/openmoji_core/1.1.0 cannot be read \(.*\); copy or prepare that file"
  with pytest.raises(OSError, match=sentence):  # already when the index is compared with a few records
    sources.open_tfds(folder, "test")
  (folder / "index-test.npz").unlink()
  with pytest.raises(OSError, match=sentence):
    sources.open_tfds(folder, "test")


def test_flipped_bits_in_a_dataset(damaged):
  """ArrayRecord knows by its checksums; other records can still be read."""
  folder, file = damaged
  content = bytearray(file.read_bytes())
  content[len(content) // 3] ^= 255
  file.write_bytes(content)
  source, failed = sources.open_tfds(folder, "test"), []
  for i in range(len(source)):
    try:
      assert source[i]["id"]
    except OSError as error:
      failed.append((i, str(error)))
  ((i, said),) = failed
  assert re.match(rf"record {i} of emoji_pairs/openmoji_core/1.1.0 cannot be read \(.*hash mismatch", said)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_description_of_a_dataset(damaged, name):
  folder, _ = damaged
  (folder / name).write_text((folder / name).read_text()[:100])
  with pytest.raises(ValueError, match=rf"{folder} holds a dataset_info.json or features.json that cannot be read"):
    sources.open_tfds(folder, "test")


def test_a_dataset_whose_files_are_said_to_be_elsewhere(damaged):
  folder, _ = damaged
  text = (folder / "dataset_info.json").read_text()
  (folder / "dataset_info.json").write_text(text.replace("{DATASET}-{SPLIT}.", "../{DATASET}-{SPLIT}."))
  with pytest.raises(ValueError, match="dataset_info.json names files that are not in its folder .*; correct it"):
    sources.open_tfds(folder, "test")


# ---- What was selected of a source -------------------------------------------------------------------------------


def test_selected_records_have_the_label_and_weight_of_the_selection(images):
  rows = [pair("a", 0, 1, label_0=1), pair("a", 2, 3, label_0=0.5), pair("a", 4, 5, label_0=0)]
  source = sources.open_pairs_file(write(images, rows))
  selection = index_lib.select(source.index)
  chosen = sources.Selected(source, selection._replace(label=np.array([0.25, 0], np.float32)))
  assert len(chosen) == 2 and [chosen[i]["label_0"] for i in range(2)] == [0.25, 0]
  assert [chosen[i]["weight"] for i in range(2)] == [0.5, 0.5]
  assert chosen[1]["image_0"] == encoded(4) and chosen.index.label_0.tolist() == [0.25, 0]


def test_selected_records_show_the_image_that_beat_the_winner(images):
  rows = [
    pair("a", 0, 1, label_0=1, original_size_0=[1, 1]),
    pair("a", 2, 0, label_0=1, original_size_0=[9, 9]),
    pair("a", 2, 3, label_0=0),
    pair("b", 4, 5, label_0=0, original_size_0=[5, 5]),
  ]
  source = sources.open_pairs_file(write(images, rows))
  selection = index_lib.select(source.index, keep_best=True, flip_labels=0.5, seed=1)
  assert 0 < np.sum(selection.label != source.index.label_0) < 4  # which image is the better one is not for the flips
  chosen = sources.Selected(source, selection)
  shown = [(record["image_0"], record["image_1"]) for record in (chosen[i] for i in range(4))]
  assert shown == [(encoded(a), encoded(b)) for a, b in ((3, 1), (3, 0), (2, 3), (4, 5))]
  assert [chosen[i].get("original_size_0") for i in range(4)] == [None, None, None, [5, 5]]
  same = {number: image for number, image in zip(chosen.index.image_0, (3, 3, 2, 4), strict=True)}
  assert len(same) == 3 and chosen.index.image_0[0] == chosen.index.image_1[2]


# ---- By name ---------------------------------------------------------------------------------------------------


def test_kinds_are_recognised_and_opened_by_name(images, dataset, cache):
  rows = [pair(label_0=1)]
  files = {
    "pairs_file": [write(images, rows), write(images, rows, "pairs.csv")],
    "unpaired_file": [write(images, [{"caption": "a", "image": image(0), "label": 1}], "images.jsonl")],
    "rankings": [write_rankings(images, [ranking([0, 1], rank=[1, 2])])],
    "tfds": [dataset],
    "prompts": [images.parent / "prompts.txt", images.parent / "prompts.json"],
  }
  files["prompts"][0].write_text("a cat")
  files["prompts"][1].write_text('["a cat"]')
  for name, content in (
    ("metadata.jsonl", '{"tag": "two", "prompt": "a cat with an image_0"}'),
    ("prompts.csv", "id,prompt\n1,an image\n"),
    ("parti.tsv", "Prompt\tCategory\na cat\tx\n"),
  ):
    files["prompts"].append(images.parent / name)
    files["prompts"][-1].write_text(content)
  files["unpaired_file"].append(write(images, [{"caption": "a", "picture": image(0), "label": 1}], "misspelt.jsonl"))
  for kind, paths in files.items():
    for path in paths:
      assert sources.detect_kind(path) == kind
      if kind != "prompts" and path.stem != "misspelt":
        source = sources.open_source(kind, path, split="test")
        assert len(source) == len(source.index) > 0
  assert set(files) == set(sources.KINDS)
  with pytest.raises(ValueError, match="kind='pairs'; expected one of tfds, pairs_file, rankings, unpaired_file"):
    sources.open_source("pairs", images)
  with pytest.raises(FileNotFoundError, match="there is no file or folder"):
    sources.detect_kind(images / "a.jsonl")
  with pytest.raises(ValueError, match="is none of tfds, pairs_file"):
    sources.detect_kind(images / "0.webp")


def test_sources_can_be_sent_to_worker_processes(images, dataset, cache):
  opened = [
    sources.open_pairs_file(write(images, [pair(label_0=1), pair("b", 2, 3, label_0=0, id="x")])),
    sources.open_rankings(write_rankings(images, [ranking([0, 1, 2], rank=[1, 2, 2])])),
    sources.open_unpaired_file(write(images, [{"caption": "a", "image": image(0), "label": 1}], "images.jsonl")),
    sources.open_tfds(dataset, "test[:9]"),
  ]
  pairs = [opened[0], opened[1], opened[3]]
  opened += [sources.Selected(source, index_lib.select(source.index)) for source in pairs]
  opened += [sources.unpaired(source) for source in pairs]
  for source in opened:
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == len(source) > 0
    for i in range(len(source)):
      assert again[i] == source[i]


def test_the_page_on_data_names_what_exists():
  root = pathlib.Path(sources.__file__).parents[2]
  page = (root / "docs" / "data.md").read_text()
  head, _ = page.split("\n## ", 1)
  _, table = page.split("## Which records are used", 1)
  assert set(re.findall(r"^\| `(\w+)`", head, re.M)) == set(config.SOURCES)
  assert set(sources.KINDS) < set(config.SOURCES)
  fields = set(re.findall(r"--config\.([\w.]+\w)", page))
  fields |= {f"data.{name}" for name in re.findall(r"^\| `(\w+)[`=]", table, re.M)}
  assert {"data.ties", "data.source"} < fields <= set(config.names())
  assert not [name for name in re.findall(r"configs/\w+\.py", page) if not (root / name).is_file()]
  assert all(hasattr(sources, name) for name in re.findall(r"`(open_\w+|read_prompts)`", head))
