"""Pick-a-Pic from parquet files with the published columns and names, made here from the embedded images."""

import datetime
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxpref.data import emoji, pickapic, records, sources
from jaxpref.data import index as index_lib
from jaxpref.data.pickapic import __main__ as command
from tests.data import latents_test

# dataset_info of yuvalkirstain/pickapic_v1 on the Hugging Face hub; v2 has the same columns.
COLUMNS = {
  "are_different": "bool",
  "best_image_uid": "string",
  "caption": "string",
  "created_at": "timestamp",
  "has_label": "bool",
  "image_0_uid": "string",
  "image_0_url": "string",
  "image_1_uid": "string",
  "image_1_url": "string",
  "jpg_0": "binary",
  "jpg_1": "binary",
  "label_0": "float64",
  "label_1": "float64",
  "model_0": "string",
  "model_1": "string",
  "ranking_id": "int64",
  "user_id": "int64",
  "num_example_per_prompt": "int64",
  "__index_level_0__": "int64",
}
ROWS = 37


def rows(start, count):
  """Records of a split; a winner is shown again in the next pair, as in the web application."""
  made = []
  for i in range(start, start + count):
    label = (1.0, 0.0, 0.5)[i % 3]
    made.append(
      {
        "are_different": True,
        "best_image_uid": f"uid-{i}-{0 if label == 1 else 1}",
        "caption": f"a picture, number {i // 4}",
        "created_at": datetime.datetime(2023, 4, 1),
        "has_label": i % 6 != 5,
        "image_0_uid": f"uid-{i}-0",
        "image_0_url": "https://example.com/0.png",
        "image_1_uid": f"uid-{i}-1",
        "image_1_url": "https://example.com/1.png",
        "jpg_0": emoji.encoded_tile("noto", i % 50),
        "jpg_1": emoji.encoded_tile("twemoji", i % 50),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": "CompVis/stable-diffusion-v1-4",
        "model_1": None if i == 1 else "stabilityai/stable-diffusion-2-1",
        "ranking_id": 1000 + i,
        "user_id": i // 10,
        "num_example_per_prompt": 4,
        "__index_level_0__": i,
      }
    )
  return made


def write_shard(file, table, **options):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  kinds = {"timestamp": pa.timestamp("ns"), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
  kinds |= {"string": pa.string(), "binary": pa.binary()}
  schema = pa.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
  pq.write_table(pa.Table.from_pylist(table, schema=schema), file, **options)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
  """Three files of the training split in small row groups, and one of a split with an underscore in its name."""
  folder = tmp_path_factory.mktemp("parquet")
  (folder / "data").mkdir()
  for number, start, count in ((0, 0, 20), (1, 20, 12), (2, 32, ROWS - 32)):
    name = f"train-{number:05d}-of-00003-b66ac786bf6fb553.parquet"
    write_shard(folder / "data" / name, rows(start, count), row_group_size=7)
  write_shard(folder / "data" / "validation_unique-00000-of-00001-33ead111845fc9c4.parquet", rows(100, 9))
  (folder / "data" / "README.md").write_text("not a parquet file")
  return folder


@pytest.fixture(scope="module")
def prepared(parquet, tmp_path_factory):
  out = tmp_path_factory.mktemp("datasets")
  return pickapic.prepare(parquet, out, version="v2")


def check(folder, start, count, split):
  source = sources.open_tfds(folder, split)
  assert len(source) == count
  for i, row in enumerate(rows(start, count)):
    record = source[i]
    assert record["image_0"] == row["jpg_0"] and record["image_1"] == row["jpg_1"]  # untouched, to the byte
    assert record["caption"].decode() == row["caption"] and record["id"].decode() == f"{split}/{i}"
    assert record["label_0"] == row["label_0"] and record["num_example_per_prompt"] == 4
    assert record["model_1"].decode() == (row["model_1"] or "")
    assert record["ranking_id"] == row["ranking_id"] and record["has_label"] == row["has_label"]
  return source


def test_a_prepared_dataset_has_the_parquet_files_records(prepared, monkeypatch):
  monkeypatch.setattr(sources, "index_of_records", lambda *args, **kwargs: pytest.fail("all records are read"))
  assert prepared.endswith("pickapic/v2/1.0.0")
  source = check(prepared, 0, ROWS, "train")
  check(prepared, 100, 9, "validation_unique")
  data = [name for name in os.listdir(prepared) if "array_record" in name]
  assert len(data) == 4  # a file for a file
  index = source.index
  assert index.label_0.tolist() == [row["label_0"] for row in rows(0, ROWS)]
  assert index.has_label.tolist() == [row["has_label"] for row in rows(0, ROWS)]
  captions = [row["caption"] for row in rows(0, ROWS)]
  assert index.prompt.tolist() == index_lib.prompt_ids(captions).tolist()
  assert len(np.union1d(index.image_0, index.image_1)) == 2 * ROWS


def test_the_written_index_is_that_of_the_records(prepared):
  source = sources.open_tfds(prepared, "train")
  found = sources.index_of_records(records.open_folder(prepared, "train"))
  assert found.arrays().keys() == source.index.arrays().keys()
  for name, value in found.arrays().items():
    np.testing.assert_array_equal(source.index.arrays()[name], value)


def test_several_processes_write_the_same(parquet, tmp_path):
  folder = pickapic.prepare(parquet, tmp_path, version="v1", workers=2)
  assert folder.endswith("pickapic/v1/1.0.0")
  check(folder, 0, ROWS, "train")


def test_beam_writes_the_same(parquet, tmp_path):
  pytest.importorskip("apache_beam")
  import tensorflow_datasets as tfds
  from apache_beam.options.pipeline_options import PipelineOptions

  from jaxpref.data.pickapic.pickapic_dataset_builder import Builder

  builder = Builder(config="v2", data_dir=tmp_path)
  options = PipelineOptions([], runner="DirectRunner", direct_running_mode="in_memory")
  config = tfds.download.DownloadConfig(manual_dir=parquet, beam_options=options)
  builder.download_and_prepare(download_config=config)
  check(builder.data_dir, 0, ROWS, "train")
  check(builder.data_dir, 100, 9, "validation_unique")


def test_the_command_says_where_the_dataset_is(parquet, prepared, tmp_path, capsys):
  out = os.path.dirname(os.path.dirname(os.path.dirname(prepared)))
  command.main([f"--parquet={parquet}", f"--out={out}"])  # it is there already
  assert capsys.readouterr().out.strip() == prepared
  with pytest.raises(SystemExit, match="error: .*/missing is not a folder, or an empty one"):
    command.main([f"--parquet={tmp_path / 'missing'}", f"--out={tmp_path / 'out'}"])
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(SystemExit, match="error: .*holds no files such as train-00000-of-00645-b66ac786bf6fb553.parquet"):
    command.main([f"--parquet={tmp_path}", f"--out={tmp_path / 'out'}"])


def test_some_of_the_files_are_enough(parquet, tmp_path, caplog):
  (tmp_path / "parquet").mkdir()
  name = "train-00001-of-00003-b66ac786bf6fb553.parquet"
  os.link(parquet / "data" / name, tmp_path / "parquet" / name)
  folder = pickapic.prepare(tmp_path / "parquet", tmp_path / "out")
  check(folder, 20, 12, "train")
  assert "has 1 of the 3 files of the split train" in caplog.text


def test_a_dataset_of_other_parquet_files_is_refused(parquet, tmp_path, capsys):
  folder, out = tmp_path / "parquet", tmp_path / "out"
  folder.mkdir()
  names = sorted(os.listdir(parquet / "data"))[1:]
  shutil.copyfile(parquet / "data" / names[0], folder / names[0])
  arguments = [f"--parquet={folder}", f"--out={out}"]
  command.main(arguments)
  made = capsys.readouterr().out.strip()
  command.main(arguments)  # the same files
  for name in names[1:]:
    shutil.copyfile(parquet / "data" / name, folder / name)
  sentence = r"v2/1.0.0 was made from other parquet files than .*parquet has now \(then 1 of train, now 3 of train, "
  with pytest.raises(SystemExit, match=sentence):
    command.main(arguments)
  check(made, 0, 20, "train")  # it is as it was
  for name in names[1:]:
    (folder / name).unlink()
  changed = rows(0, 20)
  changed[3]["jpg_0"] = changed[4]["jpg_0"]
  write_shard(folder / names[0], changed, row_group_size=7)  # another content under the same name
  with pytest.raises(SystemExit, match=r"\(then 1 of train, now 1 of train, and not the same ones\); delete that fol"):
    command.main(arguments)
  os.remove(os.path.join(made, pickapic.MADE_OF))
  with pytest.raises(SystemExit, match="exists and has no parquet_files.json, which says from what it was made"):
    command.main(arguments)
  shutil.rmtree(made)
  command.main(arguments)
  assert sources.open_tfds(made)[3]["image_0"] == changed[4]["jpg_0"]


def test_shards_are_in_order(parquet):
  shards = pickapic.find_shards(parquet)
  assert list(shards) == ["train", "validation_unique"]
  assert [os.path.basename(file)[:11] for file in shards["train"]] == ["train-00000", "train-00001", "train-00002"]
  assert pickapic.num_rows(shards["train"]) == [20, 12, ROWS - 32]


def test_an_image_that_is_not_there_leaves_an_empty_one(tmp_path):
  table = rows(0, 3)
  table[1]["jpg_1"] = None
  write_shard(tmp_path / "train-00000-of-00001-0.parquet", table)
  source = sources.open_tfds(pickapic.prepare(tmp_path, tmp_path / "out"))
  assert source[1]["image_1"] == b"" and source[1]["image_0"] == table[1]["jpg_0"]


def test_pairs_without_a_label(tmp_path):
  table = rows(0, 6)
  table[5] |= {"has_label": False, "label_0": None}
  write_shard(tmp_path / "train-00000-of-00001-0.parquet", table)
  source = sources.open_tfds(pickapic.prepare(tmp_path, tmp_path / "out"))
  assert source.index.label_0[5] == source[5]["label_0"] == 0.5 and not source.index.has_label[5]


def test_what_is_wrong_is_found_before_anything_is_written(tmp_path):
  table = rows(0, 8)
  table[4] |= {"label_0": 0.7}
  file = tmp_path / "train-00000-of-00001-0.parquet"
  write_shard(file, table, row_group_size=3)
  with pytest.raises(ValueError, match="train-00000-of-00001-0.parquet, row 4: label_0 = 0.7; expected 0, 0.5 or 1"):
    pickapic.prepare(tmp_path, tmp_path / "out")
  assert not list((tmp_path / "out").rglob("*array_record*"))
  import pyarrow.parquet as pq

  pq.write_table(pq.read_table(file).drop_columns(["jpg_1", "user_id"]), file)
  with pytest.raises(ValueError, match="has no column user_id, jpg_1, only are_different"):
    pickapic.prepare(tmp_path, tmp_path / "out")
  with pytest.raises(ValueError, match="version='v3'; expected one of v1, v2"):
    pickapic.prepare(tmp_path, tmp_path / "out", version="v3")
  with pytest.raises(ValueError, match="workers=0; expected at least 1"):
    pickapic.prepare(tmp_path, tmp_path / "out", workers=0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "overwritten"])
def test_parquet_files_that_cannot_be_read(tmp_path, damage):
  """At the end, which is read first; or in the middle of the images, hours later."""
  file = tmp_path / "train-00000-of-00001-0.parquet"
  write_shard(file, rows(0, 30), compression="none", use_dictionary=False)
  content = file.read_bytes()
  place = content.index(rows(20, 1)[0]["jpg_0"])
  cut = {"truncated": content[:-50], "empty": b"", "overwritten": content[:4] + bytes(place) + content[4 + place :]}
  file.write_bytes(cut[damage])
  with pytest.raises(ValueError, match=r"train-00000-of-00001-0.parquet cannot be read \(.*\); download it again"):
    pickapic.prepare(tmp_path, tmp_path / "out")
  assert not list((tmp_path / "out").rglob("*array_record*"))  # nothing unfinished is left


def test_a_full_disk_leaves_no_half_dataset(parquet, tmp_path):
  sentence = "error: .*array_record.* cannot be written .*File too large"
  with latents_test.largest_file(20_000), pytest.raises(SystemExit, match=sentence):
    command.main([f"--parquet={parquet}", f"--out={tmp_path / 'out'}"])
  with pytest.raises(FileNotFoundError, match="holds no dataset_info.json"):
    sources.open_tfds(tmp_path / "out")
  assert not list((tmp_path / "out").rglob("*array_record*"))
  command.main([f"--parquet={parquet}", f"--out={tmp_path / 'out'}"])
  check(tmp_path / "out", 0, ROWS, "train")


def test_from_parquet_to_selected_records(prepared):
  source = sources.open_tfds(prepared, "train")
  selection = index_lib.select(source.index, max_per_prompt=2, only_labelled=True)
  chosen = sources.Selected(source, selection)
  assert {float(chosen[i]["label_0"]) for i in range(len(chosen))} == {0.0, 1.0}
  single = sources.unpaired(chosen)
  assert len(single) == 2 * len(chosen) and single[0]["label"] in (0, 1)


def test_no_tensorflow_is_needed(parquet, tmp_path):
  code = (
    "import sys; from jaxpref.data import pickapic, sources; "
    f"folder = pickapic.prepare({str(parquet)!r}, {str(tmp_path)!r}); len(sources.open_tfds(folder)); "
    "print([m for m in ('tensorflow', 'jax', 'flax', 'torch', 'apache_beam') if m in sys.modules])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "[]"
