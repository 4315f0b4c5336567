"""The command that draws pairs: pictures, resumption, labels by rewards, and training on what it made."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxpref import config as config_lib
from jaxpref import pairs
from jaxpref.data import labels, lease, sources
from jaxpref.evaluation import drawing
from jaxpref.files import loading, pipelines
from jaxpref.models import presets
from jaxpref.models.vae import to_uint8
from jaxpref.rewards import published, scorers, step_aware
from jaxpref.rewards.loading import load_scorer
from jaxpref.training import inputs
from tests import QUICK_FLAGS
from tests.occupied import occupied

REPOSITORY = pathlib.Path(__file__).parents[1]
PROMPTS = ("red apple", "volcano", "grinning cat")
FEW = ("--steps=2", "--seeds=3", "--guidance_scale=2")
FILES = {"images", "pairs.jsonl", "pictures.jsonl", "settings.json"}


def tenth(images, prompts):
  """A tenth of the mean of the pixels."""
  assert len(images) == len(prompts)
  return [image.mean() / 10 for image in images]


def dark(images, prompts):
  """Minus the mean of the pixels."""
  return [-image.mean() for image in images]


def broken(images, prompts):
  raise KeyError("mine")


TENTH, DARK, BROKEN = (f"tests.pairs_test:{name}" for name in ("tenth", "dark", "broken"))


def tree(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder, name="pairs.jsonl"):
  return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def label(folder, reward, *arguments):
  pairs.main([f"--out={folder}", f"--label={reward}", *arguments])
  return rows(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
  file.write_text("\n".join(PROMPTS))
  return f"--prompts={file}"


@pytest.fixture(scope="module")
def drawn(prompts, tmp_path_factory):
  """Three pictures of each of three prompts by tiny-sd, on the eight virtual devices of the tests."""
  folder = tmp_path_factory.mktemp("drawn") / "new" / "out"
  pairs.main([prompts, *FEW, f"--out={folder}"])
  return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Folders of two small models of random weights."""
  folder = tmp_path_factory.mktemp("models")
  preset = presets.get_preset("sd15-miniature")
  blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
  preset = dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, block_out_channels=(16,), **blocks))
  for seed, name in enumerate(("one", "two")):
    pipelines.save_pipeline(folder / name, pipelines.random_pipeline(preset, seed=seed))
  return folder


@pytest.fixture
def by_hand(tmp_path):
  """A folder of two prompts with three grey pictures each; `tenth` scores them 0, 1, 2 and 3, 3, 2.8."""
  folder = tmp_path / "by_hand"
  settings = {"num_prompts": 2, "seeds": 3, "models": ["model"], "noise": "different"}
  pictures = []
  for n, level in enumerate((0, 10, 20, 30, 30, 28)):
    image = f"images/model/{n // 3:05d}_{n % 3}.png"
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(folder / image)
    pictures.append(pairs.Picture(image, PROMPTS[n // 3], n // 3, "model", 7, n))
  (folder / "settings.json").write_text(json.dumps({"settings": settings, "models": {"model": {"model": "tiny-sd"}}}))
  (folder / "pictures.jsonl").write_text("".join(json.dumps(dataclasses.asdict(p)) + "\n" for p in pictures))
  pairs.write_pairs(folder, pictures, pairs.all_pairs(folder, pictures).reshape(-1, 2))
  return folder


# ---- Pictures ----------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_and_of_pairs_without_labels(drawn):
  assert {p.name for p in drawn.iterdir()} == FILES
  names = [f"0000{p}_{i}.png" for p in range(3) for i in range(3)]
  assert sorted(p.name for p in (drawn / "images" / "model").iterdir()) == names
  images = np.stack([np.asarray(Image.open(drawn / "images" / "model" / name)).astype(int) for name in names])
  assert images.shape == (9, 32, 32, 3)
  assert np.abs(images[:, None] - images[None]).max(axis=(2, 3, 4))[~np.eye(9, dtype=bool)].min() > 10
  pictures = rows(drawn, "pictures.jsonl")
  assert [row["number"] for row in pictures] == list(range(9)) and {row["seed"] for row in pictures} == {0}
  assert pictures[5] | {"seed": 0} == {
    **{"image": "images/model/00001_2.png", "caption": "volcano", "prompt": 1, "model": "model"},
    **{"seed": 0, "number": 5},
  }
  found = rows(drawn)
  assert len(found) == 9 and found[4] == {
    **{"caption": "volcano", "image_0": "images/model/00001_0.png", "image_1": "images/model/00001_2.png"},
    **{"noise_0": [0, 3], "noise_1": [0, 5]},
  }
  settings = json.loads((drawn / "settings.json").read_text())
  assert settings["settings"]["steps"] == 2 and settings["settings"]["noise"] == "different"
  assert settings["models"]["model"]["model"] == "tiny-sd" and settings["models"]["model"]["weights"]


def test_missing_and_damaged_pictures_are_drawn_again_to_the_bit(drawn, prompts, tmp_path):
  folder = tmp_path / "out"
  shutil.copytree(drawn, folder)
  (folder / "images" / "model" / "00000_1.png").unlink()
  damaged = folder / "images" / "model" / "00002_2.png"
  damaged.write_bytes(damaged.read_bytes()[:100])
  for name in ("pictures.jsonl", "pairs.jsonl"):
    (folder / name).unlink()
  (folder / "images" / "model" / ".00000_1.png.77.part").write_bytes(b"half")
  kept = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png") if p != damaged}
  pairs.main([prompts, *FEW, f"--out={folder}"])
  assert tree(folder) == tree(drawn)
  assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_a_finished_folder_loads_nothing_and_keeps_its_labels(drawn, prompts, tmp_path, monkeypatch, capsys):
  folder = tmp_path / "out"
  shutil.copytree(drawn, folder)
  monkeypatch.setattr(pairs.settings, "load", None)
  pairs.main([prompts, *FEW, f"--out={folder}"])
  said = capsys.readouterr().out
  assert tree(folder) == tree(drawn) and f"no labels yet; python -m jaxpref.pairs --out={folder} --label=REWARD" in said
  pairs.main([prompts, *FEW, f"--out={folder}", f"--label={TENTH}"])
  labelled = tree(folder)
  assert set(labelled) == set(tree(drawn)) | {"scores.jsonl", "labels.json"}
  pairs.main([prompts, *FEW, f"--out={folder}"])
  assert tree(folder) == labelled and f"3 pairs, 0 of them ties, by {TENTH}; train with" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--seed=1"], "was begun with seed=0, not 1; choose another --out, or the same settings"),
    (["--num_prompts=2"], "was begun with num_prompts=3, not 2"),
    (["--other_model=tiny-sd"], r"was begun with models=\['model'\], not \['model', 'other'\]"),
  ],
)
def test_a_folder_of_other_settings_is_left_alone(drawn, prompts, tmp_path, arguments, sentence):
  folder = tmp_path / "out"
  shutil.copytree(drawn, folder)
  with pytest.raises(SystemExit, match=sentence):
    pairs.main([prompts, *FEW, *arguments, f"--out={folder}"])
  assert tree(folder) == tree(drawn)


def test_a_folder_that_another_process_writes_is_refused(by_hand):
  before = tree(by_hand)
  with occupied(by_hand) as sentence, pytest.raises(SystemExit, match=re.escape(f"error: {sentence}")):
    label(by_hand, TENTH)
  (by_hand / lease.NAME).unlink()
  assert tree(by_hand) == before


def test_rounds_are_kept_apart(prompts, tmp_path, monkeypatch, capsys):
  """Without models: which folder, seed and model each round gets."""
  asked = []

  def draw(args, found, mesh, held):
    asked.append((args.out, args.seed, args.model))
    args.out.mkdir(parents=True, exist_ok=True)
    if len(asked) != 2:  # the second one is interrupted
      (args.out / "pairs.jsonl").write_text("")

  monkeypatch.setattr(pairs, "draw", draw)
  monkeypatch.setattr(pairs, "check", lambda args: args.prompts)
  taste, runs = tmp_path / "taste", tmp_path / "runs"
  for age, name in enumerate(("new", "old")):
    (runs / name / "export").mkdir(parents=True)
    (runs / name / "export" / "model_index.json").write_text("{}")
    (runs / name / "config.json").write_text("{}")
    os.utime(runs / name / "export" / "model_index.json", (1000 - age, 1000 - age))
  for model in ("tiny-sd", str(runs), str(runs), str(runs / "old")):
    pairs.main([prompts, f"--out={taste}", "--round=next", "--seed=5", f"--model={model}"])
  step = pairs.ROUND_SEED
  assert asked == [
    (taste / "round_0", 5, "tiny-sd"),
    (taste / "round_1", 5 + step, str(runs / "new")),
    (taste / "round_1", 5 + step, str(runs / "new")),
    (taste / "round_2", 5 + 2 * step, str(runs / "old")),
  ]
  assert f"--model is {runs / 'new'}, the newest run" in capsys.readouterr().err
  with pytest.raises(SystemExit, match="--round=4: .* has 3 rounds; the next one is 3"):
    pairs.main([prompts, f"--out={taste}", "--round=4"])


def test_a_round_goes_on_after_its_labelling_was_interrupted(prompts, tmp_path, monkeypatch):
  """The pictures are drawn, the labels are not there yet: the same command labels them, and begins no other round."""

  def draw(args, asked, place, mesh):
    for p in range(len(asked.prompts)):
      for i in range(args.seeds):
        file = pairs.evaluation_folder.image_file(args.out, "model", p, i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 20 * p + i, np.uint8)).save(file)

  monkeypatch.setattr(pairs, "_draw_missing", draw)
  command = [prompts, *FEW, f"--out={tmp_path / 'taste'}", "--round=next"]
  with pytest.raises(SystemExit, match="raised KeyError"):
    pairs.main([*command, f"--label={BROKEN}"])
  pairs.main([*command, f"--label={TENTH}"])
  assert [path.name for path in (tmp_path / "taste").iterdir()] == ["round_0"]
  assert rows(tmp_path / "taste" / "round_0")[0]["label_0"] == 0
  pairs.main(command)
  assert "label_0" not in rows(tmp_path / "taste" / "round_1")[0]


def test_a_round_that_was_removed_is_no_reason_to_refuse_the_next(prompts, tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(pairs, "draw", lambda args, *_: asked.append(args.out.name))
  for number in (0, 2):
    (tmp_path / f"round_{number}").mkdir()
    (tmp_path / f"round_{number}" / "pairs.jsonl").touch()
  pairs.main([prompts, f"--out={tmp_path}", "--round=next"])
  assert asked == ["round_3"]
  with pytest.raises(SystemExit, match="--round=5: .* has 2 rounds; the next one is 3"):
    pairs.main([prompts, f"--out={tmp_path}", "--round=5"])


def test_a_folder_of_pairs_is_no_folder_of_rounds(by_hand, prompts):
  with pytest.raises(SystemExit, match="holds pairs that are no round; keep rounds in another folder"):
    pairs.main([prompts, f"--out={by_hand}", "--round=next"])


def test_a_round_is_labelled_like_any_folder(by_hand, tmp_path):
  (tmp_path / "taste").mkdir()
  by_hand.rename(tmp_path / "taste" / "round_0")
  pairs.main([f"--out={tmp_path / 'taste'}", "--round=0", f"--label={TENTH}"])
  assert rows(tmp_path / "taste" / "round_0")[0]["label_0"] in (0.0, 1.0)


@pytest.mark.slow
def test_two_models_draw_a_picture_each_from_the_same_noise(models, prompts, tmp_path):
  """The pairs, and that a second model that is the first one draws the same pictures."""
  command = [prompts, "--steps=2", "--seeds=2", "--num_prompts=2", "--noise=same", f"--model={models / 'one'}"]
  pairs.main([*command, f"--other_model={models / 'two'}", f"--out={tmp_path / 'two'}"])
  found = rows(tmp_path / "two")
  assert [(row["image_0"], row["image_1"]) for row in found] == [
    (f"images/model/0000{p}_{i}.png", f"images/other/0000{p}_{i}.png") for p in range(2) for i in range(2)
  ]
  assert [row["noise_0"] for row in found] == [row["noise_1"] for row in found] == [[0, n] for n in range(4)]
  files = tree(tmp_path / "two")
  assert all(files[row["image_0"]] != files[row["image_1"]] for row in found)
  pairs.main([*command, f"--other_model={models / 'one'}", f"--out={tmp_path / 'one'}"])
  files = tree(tmp_path / "one")
  assert all(files[row["image_0"]] == files[row["image_1"]] for row in found)


@pytest.mark.parametrize(
  ("arguments", "noises"),
  [
    ([], [(0, 1), (2, 3)]),
    (["--noise=same", "--eta=1"], [(0, 0), (1, 1)]),
    (["--other_model=tiny-sd"], [(0, 4), (0, 5), (1, 4), (1, 5), (2, 6), (2, 7), (3, 6), (3, 7)]),
    (["--other_model=tiny-sd", "--noise=same"], [(0, 0), (1, 1), (2, 2), (3, 3)]),
  ],
  ids=str,
)
def test_which_pictures_make_pairs_and_what_each_is_drawn_from(prompts, tmp_path, monkeypatch, arguments, noises):
  """With pictures that show the number of their noise, their prompt and their model."""
  loaded = []

  def load(name, loras, args, mesh):
    loaded.append(name)
    return len(loaded), None, lambda texts: np.asarray([[PROMPTS.index(text)] for text in texts])

  def draw(module, params, ids, *, numbers, share_noise, seeds_per_prompt, **_):
    for n in numbers:
      colour = [n // share_noise, ids[n // seeds_per_prompt, 0], module]
      yield np.asarray([n]), np.full((1, 2, 2, 3), colour, np.uint8)

  monkeypatch.setattr(pairs.settings, "load", load)
  monkeypatch.setattr(pairs.drawing, "draw", draw)
  pairs.main([prompts, "--num_prompts=2", "--seeds=2", *arguments, f"--out={tmp_path / 'out'}"])
  found = rows(tmp_path / "out")
  assert chosen(found) == noises
  two = "--other_model=tiny-sd" in arguments
  for row in found:
    shown = [np.asarray(Image.open(tmp_path / "out" / row[f"image_{i}"]))[0, 0].tolist() for i in (0, 1)]
    prompt = PROMPTS.index(row["caption"])
    assert shown == [[row["noise_0"][1], prompt, 1], [row["noise_1"][1], prompt, 1 + two]]


class Noise:
  """A model that shows the noise that its pictures begin with."""

  latent_shape, process = (4, 4, 3), None

  def encode_text(self, weights, ids):
    return {}

  encode_empty = encode_text

  def sized(self, cond, sizes):
    return cond

  def decode(self, weights, latents):
    return latents

  predict = None


@pytest.mark.parametrize("share_noise", [1, 3])
def test_the_noise_of_a_picture_follows_from_its_seed_and_number(monkeypatch, share_noise):
  monkeypatch.setattr(drawing.samplers, "sample", lambda predict, process, noise, steps, **_: noise)
  arguments = dict(num_inference_steps=1, guidance_scale=1.0, eta=1.0, seed=5, batch_size=4, seeds_per_prompt=3)
  shown = drawing.generate(Noise(), {}, np.zeros((2, 1), np.int32), share_noise=share_noise, **arguments)
  numbers = np.arange(6) // share_noise
  noise = drawing.prior_noise(5, numbers, (4, 4, 3))
  np.testing.assert_array_equal(shown.reshape(6, 4, 4, 3), to_uint8(noise))
  own = jax.random.normal(jax.random.fold_in(jax.random.key(5), int(numbers[4])), (4, 4, 3))
  np.testing.assert_allclose(noise[4], own, rtol=1e-6)
  assert len(np.unique(np.asarray(noise).reshape(6, -1), axis=0)) == 6 // share_noise


# ---- Labels ------------------------------------------------------------------------------------------------------

ALL = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
HARD = [0, 0, 0, 0.5, 1, 1]
sigmoid = lambda x: 1 / (1 + math.exp(-x))
SOFT = [sigmoid(-1), sigmoid(-2), sigmoid(-1), 0.5, sigmoid(0.2), sigmoid(0.2)]


def chosen(found):
  return [(row["noise_0"][1], row["noise_1"][1]) for row in found]


def test_hard_labels_of_the_best_and_the_worst(by_hand):
  found = label(by_hand, TENTH)
  assert chosen(found) == [(0, 2), (3, 5)]
  assert [row["label_0"] for row in found] == [0, 1]
  np.testing.assert_allclose([[row["score_0"], row["score_1"]] for row in found], [[0, 2], [3, 2.8]], rtol=1e-6)
  scores = rows(by_hand, "scores.jsonl")
  np.testing.assert_allclose([row["score"] for row in scores], [0, 1, 2, 3, 3, 2.8], rtol=1e-6)
  assert {row["reward"] for row in scores} == {TENTH} and scores[4]["image"] == "images/model/00001_1.png"
  told = json.loads((by_hand / "labels.json").read_text())
  assert told["reward"] == TENTH and told["rewards"][0]["scale"] == "A tenth of the mean of the pixels."
  assert (told["pairs"], told["ties"], told["kind"], told["pairing"]) == (2, 0, "hard", "best_worst")


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ([], HARD),
    (["--min_gap=0.0996"], HARD),  # tanh(0.2 / 2) = 0.0997
    (["--min_gap=0.1"], [0, 0, 0, 0.5, 0.5, 0.5]),
    (["--min_gap=0.47"], [0.5, 0, 0.5, 0.5, 0.5, 0.5]),  # tanh(1 / 2) = 0.462, tanh(2 / 2) = 0.762
    (["--label_kind=soft"], SOFT),
    (["--label_kind=soft", "--min_gap=0.1"], [*SOFT[:3], 0.5, 0.5, 0.5]),
  ],
  ids=str,
)
def test_labels_of_all_pairs(by_hand, arguments, expected):
  found = label(by_hand, TENTH, "--pairing=all", *arguments)
  assert chosen(found) == ALL
  np.testing.assert_allclose([row["label_0"] for row in found], expected, rtol=1e-5)
  source = sources.open_pairs_file(by_hand)
  np.testing.assert_allclose(source.index.label_0, expected, rtol=1e-5)
  assert ("score_0" in found[0]) == ("--label_kind=soft" not in arguments)


def test_sums_are_in_logits_and_scores_are_kept(by_hand, monkeypatch):
  found = label(by_hand, f"{TENTH}:2,{DARK}:0.1", "--pairing=all")
  np.testing.assert_allclose([row["score_0"] for row in found], [0, 0, 1, 3, 3, 3], rtol=1e-5, atol=1e-6)
  assert {row["reward"] for row in rows(by_hand, "scores.jsonl")} == {TENTH, DARK}
  load = scorers.load

  def unused(spec, **arguments):
    scorer, _ = load(spec, **arguments)
    return dataclasses.replace(scorer, score=None), 100.0

  monkeypatch.setattr(scorers, "load", unused)
  found = label(by_hand, f"{DARK}:0.01", "--pairing=all")
  np.testing.assert_allclose([row["score_1"] for row in found], [-10, -20, -20, -30, -28, -28], rtol=1e-5)


def test_pairs_that_are_all_ties_say_so(by_hand, capsys):
  label(by_hand, TENTH, "--min_gap=0.8")
  assert f"2 pairs, 2 of them ties, by {TENTH}: dpo can learn nothing from them" in capsys.readouterr().out
  label(by_hand, TENTH, "--min_gap=0.7")
  assert "dpo can learn nothing" not in capsys.readouterr().out


def test_scoring_goes_on_where_it_was_interrupted(by_hand, monkeypatch):
  finished = shutil.copytree(by_hand, by_hand.parent / "finished")
  label(finished, TENTH)
  monkeypatch.setattr(pairs, "IMAGES_AT_A_TIME", 2)
  monkeypatch.setattr(pairs, "SAVE_SECONDS", -1.0)
  read, seen = pairs._read, []

  def interrupted(file):
    seen.append(file.name)
    if len(seen) == 5:
      raise OSError("no more")
    return read(file)

  monkeypatch.setattr(pairs, "_read", interrupted)
  with pytest.raises(SystemExit, match="no more"):
    label(by_hand, TENTH)
  assert len(rows(by_hand, "scores.jsonl")) == 4 and "label_0" not in rows(by_hand)[0]
  label(by_hand, TENTH)
  assert seen[5:] == ["00001_1.png", "00001_2.png"]
  assert tree(by_hand) == tree(finished)


@pytest.mark.slow
def test_shipped_rewards_give_the_scores_they_give_in_training(drawn, tmp_path):
  folder = tmp_path / "out"
  shutil.copytree(drawn, folder)
  found = label(folder, "preference_model=tiny-spm,tiny-clip:0.1", "--pairing=all", "--label_kind=soft")
  pictures = pairs.read_pictures(folder)
  scores = {name: of_reward for (name, _), of_reward in pairs.read_scores(folder, pictures).items()}
  images = [np.asarray(Image.open(folder / p.image)) for p in pictures]
  captions = [p.caption for p in pictures]
  module, params = load_scorer("tiny-spm", dtype="float32")
  ids = loading.load_text_to_image("tiny-sd", dtype="float32", components=()).tokenize(captions)
  text = step_aware.embed_prompts(module, params, ids)
  floats = np.stack(images).astype(np.float32) / 127.5 - 1
  spm = step_aware.score_images(module, params, jnp.asarray(floats), jnp.zeros(9, jnp.int32), text)
  np.testing.assert_allclose(scores["preference_model"], spm, rtol=1e-3, atol=1e-3)
  clip = published.load("tiny-clip").score(images, captions)
  np.testing.assert_allclose(scores["tiny-clip"], clip, rtol=1e-3, atol=1e-3)
  total = np.asarray(spm, np.float64) + 0.1 * clip
  expected = [sigmoid(total[i] - total[j]) for p in range(3) for i, j in np.add(ALL[:3], 3 * p)]
  np.testing.assert_allclose([row["label_0"] for row in found], expected, atol=1e-3)


@pytest.mark.parametrize(
  ("reward", "sentence"),
  [
    (BROKEN, f"reward {BROKEN} raised KeyError: 'mine'"),
    ("tests.pairs_test:nothing", "has no function 'nothing'"),
    ("preference_model", "preference_model needs its model, a folder or hub name"),
    ("judge,judge=x", "judge occurs twice"),
    ("preference_model=tiny-judge", "model_type 'judge' is not supported"),
    (f"{TENTH}:1e308", f"with the weight 1e+308 of {TENTH} the sum is not finite for every picture"),
  ],
)
def test_rewards_that_cannot_be_asked(by_hand, reward, sentence):
  before = tree(by_hand)
  with pytest.raises(SystemExit, match=re.escape(sentence)):
    label(by_hand, reward)
  (by_hand / "scores.jsonl").unlink(missing_ok=True)  # which may be kept
  assert tree(by_hand) == before


def test_a_reward_of_another_kind_is_refused_before_anything_is_drawn(prompts, tmp_path):
  with pytest.raises(SystemExit, match="model_type 'judge' is not supported"):
    pairs.main([prompts, f"--out={tmp_path / 'out'}", "--label=preference_model=tiny-judge"])
  assert not (tmp_path / "out").exists()


def test_kept_scores_of_the_judge_are_of_the_same_style(by_hand, monkeypatch):
  def load(spec, *, preferred_style, **_):
    sign = 1.0 if preferred_style == "noto" else -1.0
    score = lambda images, prompts: np.float32([sign * image.mean() for image in images])
    return published.Scorer("judge", "v1", f"log-probability of {preferred_style}", score)

  monkeypatch.setattr(published, "load", load)
  found = {style: label(by_hand, "judge", f"--preferred_style={style}") for style in ("openmoji", "noto")}
  assert [row["label_0"] for row in found["openmoji"]] == [1, 0] and [row["label_0"] for row in found["noto"]] == [0, 1]


def test_a_run_whose_export_was_removed_does_not_keep_its_pictures_from_being_labelled(by_hand, tmp_path):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text("{}")
  told = json.loads((by_hand / "settings.json").read_text())
  told["models"]["model"]["model"] = str(tmp_path / "run")
  (by_hand / "settings.json").write_text(json.dumps(told))
  assert len(label(by_hand, TENTH)) == 2


def test_labels_of_people_are_not_replaced(by_hand):
  file, drawn = by_hand / "pairs.jsonl", rows(by_hand)
  write = lambda found: file.write_text("".join(json.dumps(row) + "\n" for row in found))
  write([row | {"preferred": 1} for row in drawn])
  before = tree(by_hand)
  with pytest.raises(SystemExit, match="pairs.jsonl has labels that are no reward's .preferred.*; move the file"):
    label(by_hand, TENTH)
  assert tree(by_hand) == before
  write([row | {"caption": "preferred"} for row in drawn])
  assert label(by_hand, TENTH)[0]["label_0"] == 0


def test_folders_without_pictures_say_what_to_name_instead(by_hand, tmp_path):
  with pytest.raises(SystemExit, match="nowhere does not exist; name a folder of pairs"):
    label(tmp_path / "nowhere", TENTH)
  (tmp_path / "taste").mkdir()
  by_hand.rename(tmp_path / "taste" / "round_0")
  with pytest.raises(SystemExit, match="holds rounds of pairs; add --round=0"):
    label(tmp_path / "taste", TENTH)
  with pytest.raises(SystemExit, match="--round=next is for drawing"):
    label(tmp_path / "taste", TENTH, "--round=next")
  with pytest.raises(SystemExit, match="9; expected next, or a number from 0 to 9999"):
    label(tmp_path / "taste", TENTH, f"--round={'9' * 5000}")


_PICTURE = '{"image": 5, "caption": "a", "prompt": 0, "model": "m", "seed": 7, "number": 0}'
_SETTINGS = '{"settings": {"num_prompts": 2, "seeds": 3, "models": ["model"], "noise": "different"}, "models": %s}'


@pytest.mark.parametrize(
  ("name", "content", "sentence"),
  [
    ("pictures.jsonl", "{", "pictures.jsonl cannot be read"),
    ("pictures.jsonl", '{"image": "a.png"}', "pictures.jsonl cannot be read"),
    ("pictures.jsonl", _PICTURE, "pictures.jsonl cannot be read .picture 0 is"),
    ("settings.json", _SETTINGS % '["tiny-sd"]', "settings.json cannot be read .*draw into a new folder"),
    ("settings.json", _SETTINGS % '{"model": "tiny-sd"}', "settings.json cannot be read .*draw into a new folder"),
    ("scores.jsonl", "half", r"scores.jsonl cannot be read \((?!.*draw into).*; delete it"),
    ("pictures.jsonl", "", "pictures.jsonl has 0 pictures, .*settings.json says otherwise"),
    ("settings.json", "{}", "settings.json cannot be read"),
    ("scores.jsonl", '{"image": "a.png"}', "scores.jsonl cannot be read .*; delete it"),
    ("images/model/00001_1.png", "x", "00001_1.png cannot be read .*run the command that drew it again"),
  ],
)
def test_folders_that_were_damaged(by_hand, name, content, sentence):
  (by_hand / name).write_text(content)
  with pytest.raises(SystemExit, match=sentence):
    label(by_hand, TENTH)


def test_a_description_of_labels_that_was_damaged(by_hand, prompts, monkeypatch):
  (by_hand / "labels.json").write_text('{"pairs": 2}')
  monkeypatch.setattr(pairs, "draw", lambda *_: None)
  with pytest.raises(SystemExit, match=r"labels.json cannot be read \(KeyError.*; delete it"):
    pairs.main([prompts, f"--out={by_hand}"])


def test_a_noisy_rater_agrees_as_often_as_stated():
  rng = np.random.default_rng(1)
  score_0, score_1 = 20 + 3 * rng.standard_normal((2, 40000))
  for agreement in (0.55, 0.7, 0.95):
    temperature = labels.temperature_for(score_0, score_1, agreement=agreement)
    expected = np.mean(labels.preference(np.abs(score_0 - score_1), np.zeros(40000), temperature=temperature))
    assert expected == pytest.approx(agreement, abs=1e-9)
    found = labels.noisy_labels(score_0, score_1, np.random.default_rng(2), temperature=temperature)
    assert set(found) == {0, 1}
    assert np.mean((found == 1) == (score_0 > score_1)) == pytest.approx(agreement, abs=0.01)  # 4 standard errors
  assert labels.temperature_for(score_0, score_1, agreement=1.0) == 0
  found = labels.noisy_labels(score_0, score_1, rng, temperature=0.0)
  np.testing.assert_array_equal(found, score_0 > score_1)
  # Two pairs, one with twice the gap: agreement is (sigmoid(1 / T) + sigmoid(2 / T)) / 2.
  agreement = (sigmoid(1 / 3) + sigmoid(2 / 3)) / 2
  two = labels.temperature_for(np.array([1.0, 0.0, 5.0]), np.array([0.0, 2.0, 5.0]), agreement=agreement)
  assert two == pytest.approx(3)
  for wrong in (0.5, 1.1):
    with pytest.raises(ValueError, match=r"expected one in \(0.5, 1\]"):
      labels.temperature_for(score_0, score_1, agreement=wrong)
  with pytest.raises(ValueError, match="over 0 pairs of different scores"):
    labels.temperature_for(score_0, score_0, agreement=0.7)


# ---- Training on it ----------------------------------------------------------------------------------------------


def settings_of(folder, **fields):
  fields = {"data.source": "pairs_file", "data.path": str(folder), "batch_size": 2} | fields
  return config_lib.replace(config_lib.default(), fields)


def test_pairs_without_labels_are_refused_with_what_gives_them(by_hand):
  with pytest.raises(ValueError) as error:
    inputs.pairs_source(settings_of(by_hand))
  said = str(error.value)
  assert f"python -m jaxpref.pairs --out={by_hand} --label=REWARD" in said and "pairs.jsonl, line 1" in said
  assert "\n" not in said


def test_labels_arrive_in_training(by_hand):
  """Ties are dropped by default, probabilities stay as they are, and records know their noise."""
  label(by_hand, TENTH, "--pairing=all", "--label_kind=soft")
  source = inputs.pairs_source(settings_of(by_hand))
  decided = [n for n, value in enumerate(SOFT) if value != 0.5]
  np.testing.assert_allclose(source.index.label_0, [SOFT[n] for n in decided], rtol=1e-6)
  assert source[2]["noise_0"] == [7, 1] and source[2]["noise_1"] == [7, 2]
  kept = inputs.pairs_source(settings_of(by_hand, **{"data.ties": "keep"}))
  np.testing.assert_allclose(kept.index.label_0, SOFT, rtol=1e-6)
  batches = inputs.pair_batches(
    settings_of(by_hand, batch_size=4), 4, lambda texts: np.zeros((len(texts), 2), np.int32)
  )
  batch = next(iter(batches))
  batches.close()
  by_record = dict(zip(decided, [SOFT[n] for n in decided], strict=True))
  np.testing.assert_allclose(batch["label_0"], [by_record[n] for n in np.asarray(decided)[_places(batch)]], rtol=1e-6)
  # Hard labels come with their scores, so that training can make them soft, or ties of close ones.
  label(by_hand, TENTH, "--pairing=all")
  soft = inputs.pairs_source(settings_of(by_hand, **{"data.ties": "soft"}))
  np.testing.assert_allclose(soft.index.label_0, SOFT, rtol=1e-5)
  assert len(inputs.pairs_source(settings_of(by_hand, **{"data.min_gap": 0.1}))) == 3


def _places(batch):
  return np.asarray(batch["record"])


ONE_DEVICE = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS}


def command(module, *arguments, check=True):
  return subprocess.run(
    [sys.executable, "-m", f"jaxpref.{module}", *map(str, arguments)],
    cwd=REPOSITORY,
    env=os.environ | ONE_DEVICE,
    capture_output=True,
    text=True,
    check=check,
  )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_dpo_trains_on_what_was_drawn_also_precomputed(drawn, tmp_path, kind):
  folder = tmp_path / "out"
  shutil.copytree(drawn, folder)
  recipe = ["--config=configs/dpo_tiny.py", "--config.num_steps=2", "--config.batch_size=4", "--config.logging.every=1"]
  recipe += ["--config.evaluation.num_prompts=0", "--config.sample.every=0", "--config.judge="]
  recipe += ["--config.data.caption_dropout=0"]
  data = ["--config.data.source=pairs_file", f"--config.data.path={folder}"]
  refused = command("main", *recipe, *data, f"--workdir={tmp_path / 'refused'}", check=False)
  assert refused.returncode == 1 and "--label=REWARD" in refused.stderr and "Traceback" not in refused.stderr
  assert not (tmp_path / "refused").exists()
  label(folder, "tiny-clip", "--pairing=all", f"--label_kind={kind}")
  command("main", *recipe, *data, f"--workdir={tmp_path / 'run'}")
  command("precompute", *recipe, *data, f"--out={tmp_path / 'latents'}")
  precomputed = ["--config.data.source=precomputed", f"--config.data.path={tmp_path / 'latents'}"]
  command("main", *recipe, *precomputed, f"--workdir={tmp_path / 'again'}")
  losses = [
    [row["loss"] for row in rows(tmp_path / name, "metrics.jsonl") if "loss" in row] for name in ("run", "again")
  ]
  assert losses[0][0] == pytest.approx(math.log(2), abs=1e-4) and len(losses[0]) == 2
  np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)


@pytest.mark.slow
def test_a_preference_model_trains_on_what_was_drawn(drawn, tmp_path):
  folder = tmp_path / "out"
  shutil.copytree(drawn, folder)
  label(folder, "tiny-clip", "--pairing=all", "--label_kind=soft")
  recipe = ["--config=configs/spm_tiny.py", "--config.num_steps=2", "--config.batch_size=4", "--config.logging.every=1"]
  recipe += ["--config.evaluation.num_prompts=0", "--config.data.source=pairs_file", f"--config.data.path={folder}"]
  recipe += ["--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=0"]
  command("main", *recipe, f"--workdir={tmp_path / 'run'}")
  losses = [row["loss"] for row in rows(tmp_path / "run", "metrics.jsonl") if "loss" in row]
  assert len(losses) == 2 and np.isfinite(losses).all()


# ---- Several processes, and kills --------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_folder(prompts, tmp_path):
  arguments = [prompts, *FEW, "--batch_size=2", "--label=tiny-clip"]
  command("pairs", *arguments, f"--out={tmp_path / 'whole'}")
  folder = tmp_path / "killed"
  for pictures in (1, 5, 9):
    process = subprocess.Popen(
      [sys.executable, "-m", "jaxpref.pairs", *arguments, f"--out={folder}"],
      cwd=REPOSITORY,
      env=os.environ | ONE_DEVICE,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    while len(list(folder.rglob("*_?.png"))) < pictures:
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not (folder / "labels.json").exists()
  command("pairs", *arguments, f"--out={folder}")
  assert tree(folder) == tree(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_work(models, prompts, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  arguments = [prompts, *FEW, f"--model={models / 'one'}", f"--label={TENTH}", "--pairing=all"]
  command("pairs", *arguments, f"--out={tmp_path / 'one'}")
  together = [sys.executable, "-m", "jaxpref.pairs", *arguments, f"--out={tmp_path / 'two'}", "--num_processes=2"]
  together += [f"--coordinator_address=localhost:{port}"]
  options = dict(cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | ONE_DEVICE)
  processes = [subprocess.Popen([*together, f"--process_id={i}"], **options) for i in range(2)]
  said = [process.communicate(timeout=500) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], said
  assert "9 pairs" in said[0][0] and "9 pairs" not in said[1][0]
  one, two = (tree(tmp_path / name) for name in ("one", "two"))
  assert one.keys() == two.keys()
  for name in one:
    if name.endswith(".png"):
      apart = [np.asarray(Image.open(tmp_path / run / name)).astype(int) for run in ("one", "two")]
      assert np.abs(apart[0] - apart[1]).max() <= 1
  assert [row["noise_0"] for row in rows(tmp_path / "one")] == [row["noise_0"] for row in rows(tmp_path / "two")]
