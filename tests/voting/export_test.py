"""Votes become data to train on."""

import json
import runpy

import numpy as np
import pytest

from jaxpref import config, describe
from jaxpref.data import sources
from jaxpref.models import presets
from jaxpref.training import inputs, loop, metrics
from jaxpref.voting import catalog, export
from jaxpref.voting.judgements import Judgement
from tests.small_presets import smaller, with_one_attention
from tests.voting.made import make_pairs, png


def said(pair, verdict, voter=1):
  return Judgement(voter, pair, verdict, "left", False, False, 0.0)


FOUND = [said(0, "image_1"), said(1, "image_0"), said(2, "tie"), said(3, "bad")]
LABELS = {0: 0.0, 1: 1.0, 2: 0.5, 3: None}


@pytest.fixture
def found(tmp_path):
  return catalog.open_catalog(make_pairs(tmp_path / "pairs", 5))


def test_a_folder_of_pairs_that_training_reads(found, tmp_path, capsys):
  out = tmp_path / "taste"
  assert export.write_folder(out, found, LABELS, FOUND) == {"pairs": 3, "ties": 1, "bad": 1}
  source = sources.open_pairs_file(out)
  assert len(source) == 3 and source.index.label_0.tolist() == [0.0, 1.0, 0.5]
  assert source[0]["caption"] == "prompt 0" and source[0]["image_1"] == png(128)
  describe.main([str(out)])
  assert "pairs: 3" in capsys.readouterr().out


def test_single_images_for_kto_have_both_pictures_of_a_bad_pair(found, tmp_path):
  export.write_folder(tmp_path / "taste", found, LABELS, FOUND)
  source = sources.open_unpaired_file(tmp_path / "taste" / export.UNPAIRED_NAME)
  liked = {source[i]["image"]: bool(source[i]["label"]) for i in range(len(source))}
  assert liked == {png(0): False, png(128): True, png(1): True, png(129): False, png(3): False, png(131): False}


def test_kto_trains_on_what_is_called_bad(tmp_path, monkeypatch, one_device):
  """Two pairs with a better picture and two with none are eight images, six of them disliked."""
  found = catalog.open_catalog(make_pairs(tmp_path / "pairs", 4))
  votes = [said(0, "image_0"), said(1, "image_1"), said(2, "bad"), said(3, "bad")]
  counts = export.write_folder(tmp_path / "votes", found, {0: 1.0, 1: 0.0, 2: None, 3: None}, votes)
  assert counts == {"pairs": 2, "ties": 0, "bad": 2}
  recipe = runpy.run_path("configs/kto_tiny.py")["get_config"]()
  recipe.update(model="random:one-level", judge=None, num_steps=2, batch_size=8)
  recipe.data.update(source="unpaired_file", path=str(tmp_path / "votes" / export.UNPAIRED_NAME))
  recipe.update_from_flattened_dict({"sample.every": 0, "evaluation.num_prompts": 0, "logging.every": 1})
  recipe.optimizer.update(warmup_steps=0, learning_rate=1e-3)
  batches = inputs.offline_batches(config.typed(recipe), 16, lambda texts: np.zeros((len(texts), 4), np.int32))
  assert next(batches)["label"].tolist().count(0.0) == 6
  batches.close()
  monkeypatch.setitem(presets.PRESETS, "one-level", with_one_attention(smaller(presets.ONE_LEVEL)))
  loop.run(recipe, str(tmp_path / "run"))
  rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
  assert [row["step"] for row in rows] == [1, 2]
  assert rows[0]["reward_disliked"] == 0.0 and np.isfinite(rows[1]["loss"]) and rows[1]["reward_disliked"] != 0.0


def test_soft_labels_and_noise_are_kept(tmp_path):
  folder = make_pairs(tmp_path / "pairs", 2)
  rows = [json.loads(line) | {"noise_0": [0, 1], "noise_1": [0, 2]} for line in (folder / "pairs.jsonl").open()]
  (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  export.write_folder(tmp_path / "taste", catalog.open_catalog(folder), {1: 0.75}, [said(1, "image_0")])
  (row,) = [json.loads(line) for line in (tmp_path / "taste" / "pairs.jsonl").open()]
  assert row["label_0"] == 0.75 and row["noise_0"] == [0, 1]


def test_prompts_in_any_script_and_halves_of_characters(tmp_path):
  folder = make_pairs(tmp_path / "pairs", 2)
  rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
  rows[0]["caption"], rows[1]["caption"] = "ein Fuchs — 狐", "half \ud83e"
  (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = catalog.open_catalog(folder)
  export.write_folder(tmp_path / "taste", found, {0: 1.0, 1: 0.0}, [])
  assert "狐" in (tmp_path / "taste" / "pairs.jsonl").read_text(encoding="utf-8")
  source = sources.open_pairs_file(tmp_path / "taste")
  assert [source[i]["caption"] for i in range(2)] == ["ein Fuchs — 狐", "half \ud83e"]


def test_an_image_of_several_pairs_is_one_file(found, tmp_path):
  class Twice:
    keys, read = ["a", "b"], lambda self, number: found.read(0)

  export.write_folder(tmp_path / "taste", Twice(), {0: 1.0, 1: 0.0}, [])
  assert len(list((tmp_path / "taste" / "images").iterdir())) == 2


def test_a_tfds_dataset_that_training_and_describe_read(found, tmp_path, capsys):
  out = tmp_path / "taste"
  assert export.write_tfds(out, found, LABELS) == {"pairs": 3, "ties": 1, "bad": 1}
  source = sources.open_tfds(out)
  assert len(source) == 3 and [float(source[i]["label_0"]) for i in range(3)] == [0.0, 1.0, 0.5]
  record = source[1]
  assert record["image_0"] == png(1) and np.asarray(record["caption"]).item() in ("prompt 1", b"prompt 1")
  describe.main([str(out)])
  assert "pairs: 3" in capsys.readouterr().out


def test_a_tfds_dataset_takes_no_shares(found, tmp_path):
  with pytest.raises(ValueError, match="a tfds dataset has no soft labels"):
    export.write_tfds(tmp_path / "taste", found, {0: 0.75})


@pytest.mark.parametrize("write", [lambda *a: export.write_folder(*a, found=[]), export.write_tfds])
def test_bad_pairs_alone_are_nothing_to_train_on(found, tmp_path, write):
  with pytest.raises(ValueError, match="so there is nothing to train on; vote on more pairs"):
    write(tmp_path / "taste", found, {3: None})


def test_a_folder_with_files_is_refused(tmp_path):
  (tmp_path / "x").write_text("")
  with pytest.raises(ValueError, match="exists and is not empty; name a new folder"):
    export.check_folder(tmp_path)
  export.check_folder(tmp_path / "new")
