"""`python -m jaxpref.describe`: its numbers by hand, its picture by colours, its sentences on wrong input."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import jaxpref
from jaxpref import describe
from jaxpref.data import emoji, emoji_pairs, sources
from jaxpref.data import index as index_lib


@pytest.fixture
def pairs_file(tmp_path):
  for i in range(4):
    (tmp_path / f"{i}.webp").write_bytes(emoji.encoded_tile("noto", i))
  (tmp_path / "bad.webp").write_bytes(b"no image")
  rows = [
    {"caption": "a red cat", "image_0": "0.webp", "image_1": "1.webp", "label_0": 1, "score_0": 2, "score_1": 1},
    {"caption": "A red cat", "image_0": "0.webp", "image_1": "2.webp", "label_0": 0, "score_0": 2, "score_1": 1},
    {"caption": "a red cat", "image_0": "3.webp", "image_1": "3.webp", "label_0": 0.5, "score_0": 2, "score_1": 1},
    {"caption": "Sm\u00f8rrebr\u00f8d \U0001f600", "image_0": "0.webp", "image_1": "bad.webp", "label_0": 1}
    | {"score_0": 2, "score_1": 1},
  ]
  file = tmp_path / "pairs.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return file


def test_numbers_of_pairs(pairs_file, tmp_path, capsys):
  describe.main([str(pairs_file), f"--out={tmp_path / 'out'}"])
  stats = json.loads((tmp_path / "out" / "stats.json").read_text())[str(pairs_file)]
  assert stats["kind"] == "pairs_file" and stats["pairs"] == 4 and stats["prompts"] == 2
  assert (stats["image_0_preferred"], stats["image_1_preferred"], stats["ties"]) == (0.5, 0.25, 0.25)
  assert stats["scores_agree_with_labels"] == pytest.approx(2 / 3)
  assert stats["pairs_of_a_prompt"]["max"] == 3 and stats["caption_words"]["mean"] == 2.75
  assert stats["images"] == 5 and stats["pairs_of_an_image_with_itself"] == 1
  assert stats["pairs_that_were_there_before"] == 0
  assert stats["images_looked_at"] == 8 and stats["unreadable"] == 1
  assert stats["width_x_height"] == {"64x64": 7} and stats["formats"] == {"WEBP": 7}
  out = capsys.readouterr().out
  assert "  image 1 preferred: 25.0%\n" in out and "  scores agree with labels: 66.7%\n" in out
  assert "  pairs: 4\n" in out and "  pairs of a prompt: mean: 2" in out and "  width x height: 64x64: 7" in out


def test_the_picture_frames_the_winner(pairs_file, tmp_path):
  describe.main([str(pairs_file), f"--out={tmp_path / 'out'}"])
  (file,) = (tmp_path / "out").glob("*.png")
  picture = np.asarray(Image.open(file))
  frame = describe.SIDE + 2 * describe.FRAME

  def frame_colours(number):
    column, row = number % describe.COLUMNS, number // describe.COLUMNS
    left = describe.GAP + column * (2 * frame + describe.GAP)
    top = describe.GAP + row * (frame + describe.CAPTION_HEIGHT)
    return [tuple(int(v) for v in picture[top + 1, left + place * frame + 1]) for place in (0, 1)]

  white = (255, 255, 255)
  assert [frame_colours(i) for i in range(4)] == [
    [describe.GREEN, white],
    [white, describe.GREEN],
    [describe.GREY, describe.GREY],
    [describe.GREEN, white],
  ]
  inside = describe.GAP + describe.FRAME + describe.SIDE // 2
  assert (picture[inside, inside] != 255).any()  # an image is there


def test_repeated_pairs_are_counted(pairs_file):
  """Whichever image comes first; not those of another caption."""
  first = {"caption": "a dog", "image_0": "0.webp", "image_1": "1.webp", "label_0": 1}
  rows = [first, first, first | {"image_0": "1.webp", "image_1": "0.webp"}, first | {"caption": "a cat"}]
  pairs_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  stats = describe.pair_stats(sources.open_pairs_file(pairs_file).index)
  assert stats["pairs_that_were_there_before"] == 2


def test_splits_of_a_dataset_and_what_they_share(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("JAXPREF_DATA_DIR", str(tmp_path / "cache"))
  emoji_pairs.prepare(tmp_path)
  folder = sources.find_dataset(tmp_path)
  splits = ["--split=validation", "--split=test", "--split=test[:20]"]
  describe.main([str(tmp_path), *splits, "--pictures=0", "--sample=3", f"--out={tmp_path / 'out'}"])
  stats = json.loads((tmp_path / "out" / "stats.json").read_text())
  assert stats[f"{folder}:test"]["ties"] == 0.25 and stats[f"{folder}:test"]["images_looked_at"] == 6
  shared = stats[describe.IN_COMMON]
  assert shared[f"{folder}:validation and {folder}:test"] == 0
  assert shared[f"{folder}:test and {folder}:test[:20]"] == 5
  assert not list((tmp_path / "out").glob("*.png"))
  assert f"{folder}:test and {folder}:test[:20]: 5" in capsys.readouterr().out


def test_single_images_prompts_and_tokens(tmp_path, capsys):
  (tmp_path / "0.webp").write_bytes(emoji.encoded_tile("noto", 0))
  file = tmp_path / "images.csv"
  file.write_text("caption,image,label\na cat,0.webp,1\na cat,0.webp,0\na dog,0.webp,true\n")
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a cat\n" + "cat " * 100 + "\n")
  tokenizer = pathlib.Path(jaxpref.__file__).parent / "assets" / "tiny-sd" / "tokenizer"
  describe.main([str(file), str(prompts), f"--tokenizer={tokenizer}", f"--out={tmp_path / 'out'}"])
  stats = json.loads((tmp_path / "out" / "stats.json").read_text())
  assert stats[str(file)]["images"] == 3 and stats[str(file)]["liked"] == pytest.approx(2 / 3)
  assert stats[str(prompts)]["different_prompts"] == 2 and stats[str(prompts)]["caption_words"]["max"] == 100
  assert stats[str(prompts)]["caption_tokens"]["above 75"] == 0.5
  assert stats[describe.IN_COMMON] == {f"{file} and {prompts}": 1}
  assert len(list((tmp_path / "out").glob("*.png"))) == 1
  assert "liked: 66.7%" in capsys.readouterr().out


def test_pictures_of_an_earlier_run_do_not_stay(pairs_file, tmp_path):
  out = tmp_path / "out"
  describe.main([str(pairs_file), f"--out={out}"])
  (out / "mine.png").write_text("kept")
  assert len(list(out.glob("*.png"))) == 2
  describe.main([str(pairs_file), "--pictures=0", f"--out={out}"])
  assert [file.name for file in out.glob("*.png")] == ["mine.png"]


def test_pictures_of_an_unknown_scale_count_as_unreadable():
  wide = io.BytesIO()
  Image.fromarray(np.full((4, 4), 7, np.int32)).save(wide, "TIFF")
  stats = describe.image_stats([{"image": wide.getvalue()}, {"image": emoji.encoded_tile("noto", 0)}])
  assert stats["unreadable"] == 1 and stats["formats"] == {"TIFF": 1, "WEBP": 1}
  ((reason, count),) = stats["unreadable_because"].items()
  assert reason.startswith("its integers, from 7 to 7, are of 32 bits") and count == 1


def test_all_numbers_of_an_index():
  index = index_lib.Index([1.0, 0.0, 0.5], [5, 5, 6], [2, 2, 3], has_label=[True, True, False])
  stats = describe.pair_stats(index)
  assert stats["not_judged"] == pytest.approx(1 / 3)
  assert stats["num_example_per_prompt_differs_from_the_count"] == pytest.approx(1 / 3)
  assert "scores_agree_with_labels" not in stats and "images" not in stats


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["missing"], "error: there is no file or folder missing"),
    (["{file}", "--kind=rankings"], "error: .*pairs.jsonl is not valid JSON"),
    (["{file}", "--tokenizer=missing"], "error: missing has no vocab.json and no tokenizer.json"),
  ],
)
def test_wrong_input_is_answered_by_a_sentence(pairs_file, arguments, message):
  with pytest.raises(SystemExit, match=message):
    describe.main([argument.format(file=pairs_file) for argument in arguments])
