"""Prompts in every published format, one sentence for what is none of them, and GenEval's folders."""

import json
import logging
import re

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jaxpref.data import prompt_sets, sources
from jaxpref.data.prompt_sets import Prompt

GENEVAL = [
  {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
  {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
    "prompt": "a photo of two clocks",
  },
]


def write(tmp_path, name, content):
  file = tmp_path / name
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  return file


def lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


# ---- Formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompts.txt", "pick_test", "prompts.TXT"])
@pytest.mark.parametrize("form", ["{}", "\ufeff{}", "{}\n\n  \n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_gives_one_prompt_per_line(tmp_path, name, form, end):
  text = form.format('a cat\n\n{red|blue} dog, "quoted"\n [x]\n').replace("\n", end)
  file = write(tmp_path, name, text)
  assert prompt_sets.read(file) == [Prompt("a cat"), Prompt('{red|blue} dog, "quoted"'), Prompt(" [x]")]
  assert [p.text for p in prompt_sets.read(file)] == sources.read_prompts(file)


def test_json_prompts_are_strings_or_objects(tmp_path):
  rows = ["a cat", {"caption": "a dog", "category": "Animals", "id": 7, "seed": 3}, {"prompt": "a cow"}]
  expected = [Prompt("a cat"), Prompt("a dog", "Animals", "7", {"seed": 3}), Prompt("a cow")]
  assert prompt_sets.read(write(tmp_path, "prompts.json", json.dumps(rows))) == expected
  assert prompt_sets.read(write(tmp_path, "prompts.txt", json.dumps(rows, indent=2))) == expected
  assert prompt_sets.read(write(tmp_path, "data", json.dumps(rows)), kind="json") == expected


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_parti_prompts_keep_their_quotes_and_categories(tmp_path, end):
  """Quotes are a part of the prompts, wherever they are; the last cell may be missing."""
  content = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    'A robot. The words "Fly an airplane" are written on the wall.\tOutdoor Scenes\tComplex\t\n'
    '"Hello" in the sand \tFood & Beverage\tWriting & Symbols\n\n'
  ).replace("\n", end)
  expected = [
    Prompt("bond", "Abstract", "", {"Challenge": "Basic", "Note": "Biology-inspired concepts with multiple meanings"}),
    Prompt(
      'A robot. The words "Fly an airplane" are written on the wall.',
      "Outdoor Scenes", "", {"Challenge": "Complex", "Note": ""},
    ),
    Prompt('"Hello" in the sand ', "Food & Beverage", "", {"Challenge": "Writing & Symbols", "Note": ""}),
  ]  # fmt: skip
  for name in ("PartiPrompts.tsv", "parti.txt"):
    assert prompt_sets.read(write(tmp_path, name, content)) == expected


def test_hpdv2_prompts_have_their_style_as_category(tmp_path):
  for style in prompt_sets.STYLES:
    write(tmp_path, f"{style}.json", json.dumps([f"{style} one", f"{style} two"]))
  write(tmp_path, "drawbench.json", json.dumps([{"prompts": "of another benchmark"}]))
  found = prompt_sets.read(tmp_path)
  assert [p.category for p in found] == [s for s in prompt_sets.STYLES for _ in range(2)]
  assert found[3] == Prompt("concept-art two", "concept-art", "concept-art/00001")
  assert prompt_sets.read(tmp_path / "concept-art.json") == found[2:4]
  (tmp_path / "photo.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no photo.json; expected the four files"):
    prompt_sets.read(tmp_path)


def test_geneval_prompts_have_their_tag_as_category(tmp_path):
  found = prompt_sets.read(write(tmp_path, "evaluation_metadata.jsonl", lines(GENEVAL)))
  assert found == [
    Prompt("a photo of a bench", "single_object", "00000", GENEVAL[0]),
    Prompt("a photo of two clocks", "counting", "00001", GENEVAL[1]),
  ]


def test_tables_such_as_pick_a_pics(tmp_path):
  csv = 'ranking_id,caption,label_0\r\n3,"a cat, sitting",1\r\n\r\n4,"a\nb",0.5\r\n'
  found = prompt_sets.read(write(tmp_path, "test_unique.csv", "\ufeff" + csv))
  assert found == [
    Prompt("a cat, sitting", "", "", {"ranking_id": "3", "label_0": "1"}),
    Prompt("a\nb", "", "", {"ranking_id": "4", "label_0": "0.5"}),
  ]
  rows = [{"caption": "a cat \u2028", "category": None}, {"Prompt": "a dog", "Category": "x", "ID": 5}]
  raw = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
  expected = [Prompt("a cat \u2028"), Prompt("a dog", "x", "5")]
  assert prompt_sets.read(write(tmp_path, "test.jsonl", raw)) == expected
  assert prompt_sets.read(write(tmp_path, "test_unique", raw)) == expected


def test_of_repeated_prompts_the_first_is_used(tmp_path, caplog):
  rows = [{"caption": "a cat", "id": i} if i % 2 else {"caption": f"a dog {i}"} for i in range(1, 6)]
  with caplog.at_level(logging.WARNING):
    found = prompt_sets.read(write(tmp_path, "a.jsonl", lines(rows)))
  assert found == [Prompt("a cat", id="1"), Prompt("a dog 2"), Prompt("a dog 4")]
  assert "1 prompts are repeated, such as 'a cat' (3 times); each is used once." in caplog.text
  twice = [*GENEVAL, GENEVAL[0]]  # GenEval's scorer numbers all of them
  with caplog.at_level(logging.WARNING):
    assert [p.id for p in prompt_sets.read(write(tmp_path, "b.jsonl", lines(twice)))] == ["00000", "00001", "00002"]
  assert "'a photo of a bench' (2 times); each is kept and counts by itself." in caplog.text


def test_columns_of_a_parquet_file(tmp_path):
  """Pick-a-Pic's, say, whose pictures are not read."""
  file = tmp_path / "test_unique-00000-of-00001-abc.parquet"
  columns = {"jpg_0": [b"x", b"y"], "caption": ["a cat", "a dog"], "Category": ["pets", None]}
  pyarrow.parquet.write_table(pyarrow.table(columns), file)
  assert prompt_sets.read(file) == [Prompt("a cat", "pets"), Prompt("a dog")]
  assert prompt_sets.read(file, kind="table") == prompt_sets.read(file)
  with pytest.raises(ValueError, match="is a Parquet file; expected a file of kind parti"):
    prompt_sets.read(file, kind="parti")
  pyarrow.parquet.write_table(pyarrow.table({"text": ["a cat"]}), file)
  with pytest.raises(ValueError, match="found text; expected a column caption or prompt"):
    prompt_sets.read(file)


SAME = ["a cat", "a dog, sitting", "a cat"]
FORMS = {
  "train_metadata.jsonl": "".join(json.dumps({"tag": "two", "prompt": p}) + "\n" for p in SAME),
  "metadata": "".join(json.dumps({"tag": "two", "prompt": p}) + "\n" for p in SAME),
  "table.csv": 'id,caption\n1,a cat\n2,"a dog, sitting"\n3,a cat\n',
  "table.txt": 'id,caption\n1,a cat\n2,"a dog, sitting"\n3,a cat\n',
  "one_column.csv": 'prompt\na cat\n"a dog, sitting"\na cat\n',
  "parti.tsv": "Prompt\tCategory\na cat\tx\na dog, sitting\tx\na cat\tx\n",
  "geneval.jsonl": "".join(json.dumps({"tag": "a", "include": [], "prompt": p}) + "\n" for p in SAME),
  "list.json": json.dumps([{"prompt": p} for p in SAME], indent=1),
  "list.txt": json.dumps(SAME),
  "lines.txt": "\n".join(SAME),
}


@pytest.mark.parametrize("name", FORMS)
def test_training_and_drawing_read_what_evaluation_reads(tmp_path, name):
  """All of them, where evaluation takes each text once."""
  file = write(tmp_path, name, FORMS[name])
  assert sources.read_prompts(file) == SAME
  assert prompt_sets.given([str(file)], option="--prompts") == SAME
  unique = SAME if name == "geneval.jsonl" else SAME[:2]
  assert [p.text for p in prompt_sets.read(file)] == unique


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_ends_of_lines_end_a_prompt(tmp_path, end):
  odd = [f"a{c}b" for c in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
  table = [{"caption": text} for text in odd]
  for name, content in (
    ("a.txt", end.join(odd)),
    ("a.csv", end.join(["caption", *odd])),
    ("a.tsv", end.join(["Prompt\tCategory", *(f"{text}\tx" for text in odd)])),
    ("a.jsonl", end.join(json.dumps(row, ensure_ascii=False) for row in table)),
  ):
    assert sources.read_prompts(write(tmp_path, name, content)) == odd, name


def test_a_word_that_names_a_file_is_no_prompt(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(tmp_path, "camera", b"\x89PNG\r\n\x1a\n\0\0")
  (tmp_path / "pictures" / "volcano").mkdir(parents=True)
  for words, message in (
    (["a cat", "camera"], "--prompts has 2 prompts, and 'camera' is the name of a file; give only one file of prompts"),
    (["a cat", "nowhere.jsonl"], "and 'nowhere.jsonl' is the name of a file"),
    (["camera"], "camera is not UTF-8 text"),
    (["nowhere.csv"], "there is no file of prompts nowhere.csv"),
    (["pictures/volcano"], "--prompts='pictures/volcano' names a file or a folder, expected the words of a prompt"),
    (["ftp://a/b"], "ftp://a/b is not a place for data"),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      prompt_sets.given(words, option="--prompts")
  for word in ("camera", "pictures/volcano", "prompts.jsonl"):
    with pytest.raises(ValueError, match=f"--prompt='{word}' names a file or a folder, .* end these words with a sp"):
      prompt_sets.check_prompt(word, option="--prompt")
  words = ["camera ", "pictures", "a cat.", "", "x" * 5000, "what://ever this is", "~nobody/a"]
  assert prompt_sets.given(words, option="--prompts") == words


# ---- Bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", "", "has no prompts; expected at least one"),
    ("a.txt", " \n\n", "has no prompts"),
    ("a.txt", b"\xff\xfe\xfa", "is not UTF-8 text"),
    ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8 text"),
    ("a.parquet", b"PAR1\0\0", "is not a Parquet file .*; download it again"),
    ("a.bin", b"PAR1\0\0", "is not a text; expected one of the kinds text, json"),
    ("a.md", "# Prompts", r"has no known form of prompts; expected .txt, .json, .*name it .txt"),
    ("a.yaml", "- a cat", "has no known form"),
    ("a.xml", "<prompt>a cat</prompt>", "has no known form"),
    ("a.txt", "---\nprompts:\n  - a cat\n", "has no known form"),
    ("a.txt", '{\n "prompts": ["a cat"]\n}', "found a JSON dict; expected a list"),
    ("a.txt", '{"prompts": ["a cat"]}', "line 1: found prompts; expected a field caption or prompt"),
    ("a.txt", '{"prompt": "a cat"', "line 1: not JSON"),
    ("a.txt", "id;caption\n1;a cat\n", "line 2: found id;caption; expected a field caption or prompt"),
    ("a.txt", "caption\tscore\na cat\t1\n", "no column Prompt or Category"),
    ("a.json", "[]", "has no prompts"),
    ("a.json", '["a", 3]', r"entry 2: 3; expected a string, or an object with a caption or a prompt"),
    ("a.json", '[{"text": "a"}]', r"entry 1: found text; expected a field caption or prompt"),
    ("a.json", '{"a": 1}', r"found a JSON dict; expected a list"),
    ("a.json", '["a', r"is not JSON .*; expected a list of prompts"),
    ("photo.json", '[{"prompt": "a"}]', r"entry 1: .*expected HPDv2's list of strings"),
    ("a.jsonl", '{"caption": "a"}\n\n{"caption": " "}', r"line 3: caption = ' '; expected a text that is not empty"),
    ("a.jsonl", r'{"caption": "a \ud83d"}', r"line 1: caption = 'a .ud83d' has half of a character; expected text"),
    ("a.json", r'["a \ud83d b"]', "entry 1: prompt = 'a .ud83d b' has half of a character"),
    ("a.jsonl", '{"caption": "a"}\n{"caption": ', r"line 2: not JSON .*; expected one object per line"),
    ("a.jsonl", '["a"]\n', r"line 1: found \['a'\]; expected one object per line"),
    ("a.jsonl", lines([*GENEVAL, {"tag": "colors", "prompt": "x"}]), r"line 3: no include; expected tag, include, p"),
    ("a.csv", "a cat\na dog\n", r"line 2: found a cat; expected a field caption or prompt"),
    ("a.csv", "id;caption\n1;a cat\n", r"line 2: found id;caption; expected a field caption or prompt"),
    ("a.csv", "caption\na cat, sitting\n", r"line 2: more cells than the header has; quote"),
    ("a.csv", 'caption\n"a cat\n', r"not CSV .*expected commas and quotes"),
    ("a.csv", "caption,id\n", "has no prompts"),
    ("a.tsv", "caption\tscore\na\t1\n", r"no column Prompt or Category in .*expected PartiPrompts' Prompt, Category"),
    ("a.tsv", "Prompt\tCategory\na\tb\tc\n", r"line 2: 3 cells; expected 2, separated by tabs"),
    ("a.tsv", "Prompt\tCategory\n\tb\n", r"line 2: Prompt = ''; expected a text that is not empty"),
  ],
)
def test_a_file_of_the_wrong_form_is_refused_in_one_sentence(tmp_path, name, content, message):
  file = write(tmp_path, name, content)
  with pytest.raises(ValueError, match=message) as caught:
    prompt_sets.read(file)
  assert str(file) in str(caught.value) and "\n" not in str(caught.value).strip()


def test_an_empty_name_is_no_folder():
  with pytest.raises(ValueError, match="the name of the file of prompts is empty"):
    prompt_sets.read("")


def test_the_kind_that_is_asked_for_is_expected(tmp_path):
  text = write(tmp_path, "prompts.txt", "a cat\n")
  for kind, message in (
    ("parti", "no column Prompt or Category"),
    ("geneval", "line 1: not JSON"),
    ("json", "is not JSON"),
    ("hpdv2", "is not JSON"),
    ("table", "line 1: not JSON"),
  ):
    with pytest.raises(ValueError, match=message):
      prompt_sets.read(text, kind=kind)
  with pytest.raises(ValueError, match="kind='parquet' of prompts; expected one of text, json, table"):
    prompt_sets.read(text, kind="parquet")
  with pytest.raises(ValueError, match="is a folder; expected a file of kind text"):
    prompt_sets.read(tmp_path, kind="text")
  with pytest.raises(FileNotFoundError, match=r"no file of prompts .*nothing.txt"):
    prompt_sets.read(tmp_path / "nothing.txt")


# ---- GenEval ---------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path):
  """Prompts of GenEval and the file of each picture; one is no PNG."""
  prompts = prompt_sets.read(write(tmp_path, "evaluation_metadata.jsonl", lines(GENEVAL)))
  files = [[tmp_path / f"{p}-{s}.{'webp' if p else 'png'}" for s in range(3)] for p in range(2)]
  for p, of_prompt in enumerate(files):
    for s, file in enumerate(of_prompt):
      Image.new("RGB", (8, 8), (100 * p, 40 * s, 0)).save(file, lossless=True)
  return prompts, files


def test_geneval_layout_is_what_its_scorer_reads(tmp_path, drawn):
  prompts, files = drawn
  folder = tmp_path / "geneval"
  for _ in range(2):  # again into the same folder
    prompt_sets.geneval_layout(folder, prompts, lambda p: files[p])
  seen = []
  for place in sorted(folder.iterdir()):  # as evaluate_images.py does
    assert place.is_dir() and place.name.isdigit()
    with open(place / "metadata.jsonl") as stream:
      metadata = json.load(stream)
    for image in sorted((place / "samples").iterdir()):
      assert re.match(r"\d+\.png", image.name)
      with Image.open(image) as opened:
        assert opened.format == "PNG"
        colour = opened.convert("RGB").getpixel((0, 0))
      seen.append((place.name, metadata["tag"], metadata["prompt"], image.name, colour))
  assert [s[3] for s in seen[:3]] == ["0000.png", "0001.png", "0002.png"]
  assert seen[1] == ("00000", "single_object", "a photo of a bench", "0001.png", (0, 40, 0))
  assert seen[5] == ("00001", "counting", "a photo of two clocks", "0002.png", (100, 80, 0))
  assert (folder / "00000" / "samples" / "0002.png").read_bytes() == files[0][2].read_bytes()


def test_geneval_layout_refuses(tmp_path, drawn):
  prompts, files = drawn
  with pytest.raises(ValueError, match=r"prompt 1, 'a cat', has no tag, include, prompt; GenEval's scorer needs"):
    prompt_sets.geneval_layout(tmp_path / "a", [prompts[0], Prompt("a cat")], lambda p: files[p])
  with pytest.raises(FileNotFoundError, match=r"the picture .*nothing.png does not exist \(2 are missing\)"):
    prompt_sets.geneval_layout(tmp_path / "a", prompts, lambda p: [tmp_path / "nothing.png"])
  assert not (tmp_path / "a").exists()
  prompt_sets.geneval_layout(tmp_path / "a", prompts, lambda p: files[p])
  with pytest.raises(ValueError, match=r"has 00000/samples/0002.png, which is none of these pictures; empty it"):
    prompt_sets.geneval_layout(tmp_path / "a", prompts, lambda p: files[p][:2])
  with pytest.raises(ValueError, match=r"has 00001/samples/0000.png, which is none"):
    prompt_sets.geneval_layout(tmp_path / "a", prompts[:1], lambda p: files[p])
