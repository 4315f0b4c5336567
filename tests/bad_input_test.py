"""What is wrong is said in one sentence, before anything is compiled or written."""

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import safetensors.numpy

from jaxpref import config, describe, evaluate, export, precompute, sample, score
from jaxpref.data import emoji_pairs, lease, pickapic
from jaxpref.evaluation import drawing
from jaxpref.files import folders, loading, pipelines, tokenizers
from jaxpref.rewards import loading as rewards_loading
from jaxpref.rewards.loading import load_scorer
from jaxpref.training import checkpoint, loop, step
from tests import bad_commands

REPOSITORY = pathlib.Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------------
# On the command line


def main(tmp_path, *arguments):
  """Exit code, what was said, and seconds; in a folder of its own, without network."""
  environment = dict(
    os.environ,
    JAX_PLATFORMS="cpu",
    HF_HUB_OFFLINE="1",
    JAXPREF_DATA_DIR=str(tmp_path / "datasets"),
    PYTHONPATH=str(REPOSITORY),
  )
  environment.pop("XLA_FLAGS", None)
  started = time.time()
  done = subprocess.run(
    [sys.executable, "-m", "jaxpref.main", *arguments],
    env=environment,
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=300,
  )
  return done.returncode, done.stderr, time.time() - started


RECIPE = f"--config={REPOSITORY / 'configs' / 'dpo_tiny.py'}"
PRETRAIN = f"--config={REPOSITORY / 'configs' / 'pretrain_tiny.py'}"


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([RECIPE, "--config.optimizer.learning_rat=1"], "did you mean --config.optimizer.learning_rate?"),
    ([RECIPE, "--config.los.beta=1"], "--config.los.beta is not a field; did you mean --config.loss.beta?"),
    ([RECIPE, "--config.num_steps=many"], "--config.num_steps=many"),
    ([RECIPE, "--workdri=x"], "workdri"),
    ([RECIPE, "stray"], "unexpected argument 'stray'"),
    (["--config=configs/nowhere.py"], "there is no file configs/nowhere.py; give a recipe"),
    ([f"{PRETRAIN}:uent"], "uent is unknown; expected one of vae, unet, unet_restart, clip, judge"),
    ([], "--config"),
  ],
  ids=lambda v: " ".join(v).rpartition("/")[2] if isinstance(v, list) else "",
)
def test_command_lines_that_cannot_be_parsed(tmp_path, arguments, sentence):
  code, said, _ = main(tmp_path, *arguments)
  assert_one_sentence(code, said, sentence)
  assert list(tmp_path.iterdir()) == []


def assert_one_sentence(code, said, sentence):
  assert code != 0
  assert "Traceback" not in said
  last = said.strip().splitlines()[-1]
  assert last.startswith("error: ") and sentence in last, said


def test_a_hub_name_without_network(tmp_path):
  """With the loading of a real run around it: nothing is left behind, and nobody waits."""
  code, said, seconds = main(tmp_path, RECIPE, "--config.model=stabilityai/stable-diffusion-nothing", "--workdir=run")
  assert_one_sentence(code, said, "stabilityai/stable-diffusion-nothing is neither a folder here nor")
  assert len(said.strip().splitlines()) == 1
  assert list(tmp_path.iterdir()) == []
  assert seconds < 120  # nearly all of it imports


class Server:
  """`python -m tests.bad_commands` in a folder of its own."""

  def __init__(self, place):
    self.place = place
    command, pipe = [sys.executable, "-m", "tests.bad_commands"], subprocess.PIPE
    self.environment = bad_commands.prepare(place)
    self.process = subprocess.Popen(
      command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=place, env=self.environment
    )

  def files(self):
    return {path: path.stat().st_size if path.is_file() else 0 for path in self.place.rglob("*")}

  def ask(self, command, arguments):
    self.process.stdin.write(json.dumps([command, arguments]) + "\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  found = Server(tmp_path_factory.mktemp("place"))
  yield found
  found.process.stdin.close()
  found.process.wait(60)


def check_said(server, code, said, sentence):
  assert code in (1, 2), said
  assert "Traceback" not in said and "Errno" not in said, said
  last = said.strip().splitlines()[-1].replace(str(server.place / "home"), "HOME")
  assert "error: " in last and sentence in last, said


@pytest.mark.parametrize(
  ("command", "arguments", "sentence"), bad_commands.TABLE, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_every_command_refuses_what_cannot_work_in_one_sentence_and_writes_nothing(
  server, command, arguments, sentence
):
  before = server.files()
  check_said(server, *server.ask(command, arguments), sentence)
  assert server.files() == before


def test_the_table_has_ten_inputs_for_each_command():
  counts = collections.Counter(command for command, _, _ in bad_commands.TABLE)
  assert counts.keys() == bad_commands.MODULES.keys() and min(counts.values()) >= 10 and counts.total() >= 150


@pytest.mark.parametrize("command", bad_commands.MODULES)
def test_what_is_refused_is_refused_by_the_real_command(server, command):
  """The first of the table that is no lack of an argument, in a process of its own."""
  _, arguments, sentence = [row for row in bad_commands.TABLE if row[0] == command and row[1]][0]
  module = bad_commands.MODULES[command][0].removesuffix(".__main__")
  done = subprocess.run(
    [sys.executable, "-m", module, *arguments],
    cwd=server.place, env=server.environment, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  check_said(server, done.returncode, done.stderr, sentence)


# ---------------------------------------------------------------------------------------------
# In this process: `main` prints what `loop.run` raises


def settings(**fields):
  c = config.default()
  c.update(objective="dpo", num_steps=2, batch_size=8, model="random:sd15-miniature")
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  return c


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  """The embedded pairs are prepared once."""
  return tmp_path_factory.getbasetemp() / "datasets"


@pytest.fixture
def refused(tmp_path, monkeypatch, datasets):
  """refused(config) -> the sentence; asserts that no step was made and nothing written."""
  monkeypatch.setattr(step, "make_step", lambda *a, **k: pytest.fail("a step was made"))
  monkeypatch.setenv("JAXPREF_DATA_DIR", str(datasets))

  def run(config, kind=ValueError):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(kind) as error:
      loop.run(config, str(tmp_path / "run"))
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before
    assert "\n" not in str(error.value)
    return str(error.value)

  return run


@pytest.fixture(scope="module")
def pipeline():
  """Random weights, made once: `loading.load_text_to_image` is what would make them."""
  return pipelines.random_pipeline("sd15-miniature", 0)


@pytest.fixture
def made(pipeline, monkeypatch):
  """Models of random weights come from the fixture."""
  monkeypatch.setattr(pipelines, "random_pipeline", lambda *a, **k: pipeline)


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"objective": "tpdo"}, "config.objective='tpdo'; expected one of .*did you mean 'tdpo'"),
    ({"dtype": "float16"}, "config.dtype='float16'; expected one of float32, bfloat16"),
    ({"data__subset": "cor"}, "data.subset='cor'; expected one of core, all .did you mean 'core'"),
    ({"evaluation__split": "tset"}, "evaluation.split='tset'; .*did you mean 'test'"),
    ({"evaluation__candidates": 1}, "evaluation.candidates=1; expected at least 2"),
    ({"evaluation__guidance_scale": -1.0}, "config.evaluation.guidance_scale=-1.0; expected a number of at least 0"),
    ({"grpo__guidance_scale": float("nan")}, "config.grpo.guidance_scale=nan; expected a number of at least 0"),
    ({"spo__guidance_scale": float("inf")}, "config.spo.guidance_scale=inf; expected a number of at least 0"),
    ({"spm__guidance_scale": -0.5}, "config.spm.guidance_scale=-0.5; expected a number of at least 0"),
    ({"objective": "contrastive", "accumulation": 2}, "accumulation=2; expected 1 for contrastive: each image is comp"),
    ({"seed": -1}, "config.seed=-1; expected an integer from 0 to 4294967295"),
    ({"seed": 2**32}, "config.seed=4294967296; expected an integer from 0 to 4294967295"),
    ({"evaluation__seed": -1}, "config.evaluation.seed=-1; expected an integer from 0 to 4294967295"),
    ({"num_steps": 2**31}, "config.num_steps=2147483648; expected an integer of at most 2147483647"),
    ({"spo__minibatch": 2**40}, "config.spo.minibatch=1099511627776; expected an integer of at most 2147483647"),
    ({"evaluation__num_inference_steps": 1001}, "config.evaluation.num_inference_steps=1001; expected .* 1 to 1000"),
    ({"lora__alpha": float("inf")}, "config.lora.alpha=inf; expected a number above 0"),
    ({"spo__decode_size": -8}, "config.spo.decode_size=-8; expected 0"),
    ({"spm__decode_size": -8}, "config.spm.decode_size=-8; expected 0"),
    ({"sample__every": -1}, "config.sample.every=-1; expected 0"),
    ({"kto__weight_desirable": float("nan")}, "config.kto.weight_desirable=nan; expected a number of at least 0"),
    ({"kto__weight_undesirable": -1.0}, "config.kto.weight_undesirable=-1.0; expected a number of at least 0"),
    ({"vae__kl_weight": float("inf")}, "config.vae.kl_weight=inf; expected a number of at least 0"),
    ({"grpo__kl_coef": float("inf")}, "config.grpo.kl_coef=inf; expected a number of at least 0"),
    ({"optimizer__weight_decay": float("nan")}, "config.optimizer.weight_decay=nan; expected a number of at least 0"),
    ({"loss__beta": float("inf")}, "config.loss.beta=inf; expected a number above 0"),
    ({"optimizer__name": "adamx"}, "config.optimizer.name='adamx'; expected one of adamw, .*did you mean 'adamw'"),
    ({"optimizer__schedule": "cosin"}, "config.optimizer.schedule='cosin'; .*did you mean 'cosine'"),
    ({"data__split": "trian"}, "data.split='trian'; expected one of train, .*did you mean 'train'"),
    ({"data__preferred_style": "nato"}, "data.preferred_style='nato'; .*did you mean 'noto'"),
    ({"num_steps": 0}, "config.num_steps=0; expected an integer of at least 1"),
    ({"max_bad_steps": 0}, "config.max_bad_steps=0; expected an integer of at least 1"),
    ({"profile_steps": "13:10"}, "config.profile_steps='13:10'; expected START:STOP with 0 < START < STOP"),
    ({"batch_size": 12}, r"batch_size=12 .*data=8 x fsdp=1 .*multiple of 8, e.g. 8 or 16"),
    ({"accumulation": 2}, r"accumulation=2; use a multiple of 16"),
    ({"mesh__data": 3}, r"data=3 x fsdp=1 x tensor=1 does not cover 8 devices"),
    ({"reference__alpha": 0.0}, r"reference.alpha=0.0; expected a number in \(0, 1\]"),
    ({"reference__rho": 1.0}, r"reference.rho=1.0; expected a number in \[0, 1\)"),
    ({"reference__mode": "updates"}, "did you mean 'update'"),
    ({"loss__label_smoothing": 0.5}, r"label_smoothing=0.5; expected a number in \[0, 0.5\)"),
    ({"loss__name": "sigmod"}, "config.loss.name='sigmod'; expected one of sigmoid, .*did you mean 'sigmoid'"),
    ({"loss__name": "dspo", "objective": "spo"}, "loss.name='dspo'; expected one of sigmoid, robust, ipo, hinge"),
    ({"loss__name": "mapo"}, "config.loss.beta=5000.0; expected at most 10 for mapo"),
    ({"loss__name": "dspo"}, "config.loss.beta=5000.0; expected below 2 for dspo"),
    ({"loss__name": "sft", "reference__mode": "update"}, "reference.mode='update'; expected frozen: sft has no"),
    ({"loss__safeguard": 2.0}, r"config.loss.safeguard=2.0; expected None or a number in \[0, 1\]"),
    ({"loss__safeguard": 0.5, "objective": "kto"}, "config.loss.safeguard=0.5; expected None for kto"),
    ({"train_text_encoder": True}, "train_text_encoder=True; expected False"),
    ({"data__source": "prompts"}, "data.source='prompts'; expected another source for objective dpo: this one is for"),
    ({"objective": "spo"}, "preference_model=None; expected the folder of a step-aware preference model"),
    (
      {"objective": "spo", "spo__inner_steps": 4, "preference_model": "x"},
      r"spo.inner_steps=4; .*divides num_inference_steps - warmup_steps = 16",
    ),
    (
      {"objective": "spo", "optimizer__schedule": "cosine", "preference_model": "x"},
      "optimizer.schedule='cosine'; expected constant for spo",
    ),
    ({"objective": "grpo"}, "preference_model=None; expected the folder of a preference model"),
    ({"objective": "grpo", "optimizer__schedule": "cosine"}, "optimizer.schedule='cosine'; expected constant for grpo"),
    ({"objective": "grpo", "grpo__eta": 0.0}, r"grpo.eta=0.0; expected a number in \(0, 1\]: steps without noise"),
    ({"objective": "grpo", "grpo__group_size": 1}, "grpo.group_size=1; expected at least 2 samples to compare"),
    ({"objective": "grpo", "grpo__kl_coef": -0.1}, "grpo.kl_coef=-0.1; expected a number of at least 0"),
    ({"objective": "grpo", "grpo__timestep_fraction": 0.0}, r"timestep_fraction=0.0; expected a share in \(0, 1\]"),
    ({"objective": "grpo", "reference__mode": "update"}, "reference.mode='update'; expected frozen, as grpo.kl_coef"),
    ({"grpo__advantage": "prompt"}, "grpo.advantage='prompt'; expected one of group, batch"),
    ({"model": "random:sd15-minature"}, "preset 'sd15-minature' is unknown, expected one of"),
  ],
  ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_values_that_cannot_be(refused, fields, sentence):
  assert re.search(sentence, refused(settings(**fields)))


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"data__split": "all"}, "data.split='all'; expected one of train"),
    ({"lora__rank": 4, "lora__targets": "to_x$"}, "LoRA: targets 'to_x$' matches none"),
    ({"batch_size": 8000}, "fewer than the batch_size of 8000"),
    ({"judge": "random:sd15-miniature", "data__subset": "all"}, "knows 1021 captions, the data"),
  ],
  ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_values_that_models_and_data_refuse(refused, fields, sentence):
  assert sentence in refused(settings(**fields))


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("label", [0.7, -1.0, 2.0, float("nan"), None])
def test_labels_that_are_none(refused, monkeypatch, label):
  image = np.zeros((16, 16, 3), np.uint8)
  records = [
    {"id": f"pair {i}", "caption": "cat", "image_0": image, "image_1": image, "label_0": float(i % 2)}
    for i in range(20)
  ]
  records[7]["label_0"] = label
  monkeypatch.setattr(emoji_pairs, "prepare", lambda **kwargs: {"train": records})
  said = refused(settings())
  assert "'pair 7' has label_0" in said and "expected 1 (image_0 is preferred), 0" in said


@pytest.mark.usefixtures("made")
def test_original_sizes_that_are_none(refused, monkeypatch):
  image = np.zeros((16, 16, 3), np.uint8)
  records = [
    {"id": f"pair {i}", "caption": "cat", "image_0": image, "image_1": image, "label_0": 1.0, "original_size_0": [0, 9]}
    for i in range(20)
  ]
  monkeypatch.setattr(emoji_pairs, "prepare", lambda **kwargs: {"train": records})
  said = refused(settings())
  assert "has original_size_0 = [0, 9]; expected [height, width] in pixels" in said


@pytest.mark.usefixtures("made")
def test_wrong_prompt_files_raise(refused, tmp_path):
  fields = {
    "objective": "spo",
    "data__source": "prompts",
    "preference_model": "random:sd15-miniature",
  }
  missing = settings(**fields, data__path=str(tmp_path / "prompts.txt"))
  assert "there is no file of prompts" in refused(missing, FileNotFoundError)
  for name, text, sentence in (
    ("a.json", '[{"text": "cat"}]', "entry 1: found text; expected a field caption or prompt"),
    ("b.json", "[1, 2]", "entry 1: 1; expected a string, or an object with a caption or a prompt"),
    ("c.json", "{", "is not JSON"),
    ("d.txt", "\n\n", "has no prompts; expected at least one"),
    ("e.txt", "cat\ndog\n", "fewer than the batch_size of 8"),
  ):
    (tmp_path / name).write_text(text)
    said = refused(settings(**fields, data__path=str(tmp_path / name)))
    assert sentence in said, said


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
  ("row", "kind", "sentence"),
  [
    ({"caption": " "}, ValueError, "pairs.jsonl, line 2: caption = ' '; expected a text that is not empty"),
    ({"image_1": "../secret.png"}, ValueError, "line 2: image_1 = '../secret.png'; expected the path of an image file"),
    ({"image_1": "/etc/hostname"}, ValueError, "line 2: image_1 = '/etc/hostname'; expected the path of an image file"),
    ({"image_1": "b.png"}, FileNotFoundError, "line 2: image_1 = 'b.png' does not exist in"),
    ({"winner": 1}, ValueError, "line 2: unknown column 'winner'"),
    ({}, ValueError, "has 2 usable records, fewer than the batch_size of 8"),
  ],
  ids=str,
)
def test_files_of_pairs(refused, tmp_path, row, kind, sentence):
  good = {"caption": "cat", "image_0": "a.png", "image_1": "a2.png", "label_0": 1}
  for name in ("a.png", "a2.png", "secret.png"):
    (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "data" / name).write_bytes(b"")
  (tmp_path / "data" / "pairs.jsonl").write_text("\n".join(map(json.dumps, (good, good | row))))
  said = refused(settings(data__source="pairs_file", data__path=str(tmp_path / "data" / "pairs.jsonl")), kind)
  assert sentence in said


@pytest.mark.usefixtures("made")
def test_a_dataset_without_one_of_its_files(refused, tmp_path):
  folder = tmp_path / "copy" / "1.1.0"
  emoji_pairs.prepare()
  shutil.copytree(next((emoji_pairs.default_data_dir() / "emoji_pairs" / "openmoji_core").iterdir()), folder)
  (file,) = folder.glob("*-train.array_record*")
  file.unlink()
  said = refused(settings(data__source="tfds", data__path=str(folder)), FileNotFoundError)
  assert f"lacks 1 of the 1 files of 'train', such as {file.name}; copy or prepare the dataset again" in said


# ---------------------------------------------------------------------------------------------
# What is not there


@pytest.fixture
def nothing_is_read(monkeypatch):
  """No weights, and no folder is taken."""
  for module in (folders, rewards_loading):
    monkeypatch.setattr(module, "load_tree", lambda *a, **k: pytest.fail("weights were read"))
  for name in ("random_pipeline", "load_pipeline"):
    monkeypatch.setattr(pipelines, name, lambda *a, **k: pytest.fail("a model was made"))
  monkeypatch.setattr(lease, "hold", lambda *a, **k: pytest.fail("the folder was taken"))


MISSING = "model folder nothing does not exist"
SPO = {"objective": "spo", "preference_model": "tiny-spm"}


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"model": "nothing"}, MISSING),
    ({"vae_model": "nothing"}, MISSING),
    ({"unet_model": "nothing"}, MISSING),
    ({"judge": "nothing"}, MISSING),
    ({"lora__init_from": "nothing"}, "there is no LoRA file nothing"),
    ({"data__source": "tfds", "data__path": "nothing"}, "nothing holds no dataset_info.json"),
    ({"data__source": "pairs_file", "data__path": "nothing.csv"}, "there is no file nothing.csv"),
    ({"data__source": "rankings", "data__path": "nothing.json"}, "there is no file nothing.json"),
    ({"objective": "kto", "data__source": "unpaired_file", "data__path": "x.csv"}, "there is no file x.csv"),
    ({"data__source": "precomputed", "data__path": "nothing"}, "nothing has no precomputed data"),
    ({"data__scores": "nothing.npz", "data__labels": "scores"}, "No such file or directory: 'nothing.npz'"),
    ({**SPO, "data__source": "prompts", "data__path": "nothing.txt"}, "there is no file of prompts nothing.txt"),
    ({"objective": "spo", "preference_model": "nothing"}, MISSING),
    ({"objective": "spm", "preference_model": "nothing"}, MISSING),
    ({"objective": "grpo", "preference_model": "nothing", "reward": "preference_model:1"}, MISSING),
    ({"objective": "grpo", "reward": "pickscore=nothing:1"}, MISSING),
  ],
  ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_what_a_config_names_is_looked_for_before_weights_are_read_and_the_folder_is_taken(refused, fields, sentence):
  assert sentence in refused(settings(**{"model": "tiny-sd"} | fields), FileNotFoundError)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
  ("main", "arguments", "sentence"),
  [
    (sample.main, ["--prompt=x", "--vae_model=nothing"], MISSING),
    (sample.main, ["--prompt=x", "--unet_model=nothing"], MISSING),
    (sample.main, ["--prompt=x", "--lora", "broken.safetensors"], "broken.safetensors is not a readable"),
    (evaluate.main, ["--models", "a=tiny-sd", "b=tiny-sd+broken.safetensors"], "broken.safetensors is not a readable"),
    (evaluate.main, ["--models", "a=tiny-sd", "b=nothing"], MISSING),
    (evaluate.main, ["--models=a=tiny-sd", "--vae_model=nothing"], MISSING),
    (evaluate.main, ["--models=a=tiny-sd", "--unet_model=a=nothing"], MISSING),
  ],
  ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_a_command_is_given_is_looked_for_before_weights_are_read(
  tmp_path, monkeypatch, main, arguments, sentence
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "broken.safetensors").write_bytes(b"x")
  monkeypatch.setattr(pipelines, "load_pipeline", configs_alone)
  of_all = ["--prompts=emoji", "--scorers=tiny-clip"] if main is evaluate.main else []
  with pytest.raises(SystemExit) as ended:
    main([*arguments, *of_all])
  assert sentence in ended.value.code


LOAD_PIPELINE = pipelines.load_pipeline


def configs_alone(*args, components, **kwargs):
  assert not components, "weights are read"
  return LOAD_PIPELINE(*args, components=components, **kwargs)


def test_the_model_of_a_run_is_looked_for_before_its_checkpoint_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "load_params", lambda *a: pytest.fail("a checkpoint was read"))
  (tmp_path / "config.json").write_text(json.dumps({"objective": "dpo", "model": "nothing"}))
  with pytest.raises(FileNotFoundError, match=MISSING):
    export.export(tmp_path, "pipeline", tmp_path / "out")


@pytest.mark.usefixtures("nothing_is_read")
def test_what_is_scored_and_by_what_is_looked_for_before_the_file_is_taken(tmp_path, monkeypatch):
  options = {"model": "tiny-spm", "out": tmp_path / "o.npz", "batch_size": 8}
  with pytest.raises(FileNotFoundError, match="there is no file nothing.csv"):
    score.score(settings(data__source="pairs_file", data__path="nothing.csv"), **options)
  with pytest.raises(FileNotFoundError, match=MISSING):  # the scores are what the command makes
    score.score(settings(data__scores="o.npz"), **options | {"model": "nothing"})


# ---------------------------------------------------------------------------------------------
# Library calls


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ({"seed": -1}, "seed=-1; expected an integer from 0 to 4294967295"),
    ({"seed": 2**32}, "seed=4294967296; expected an integer from 0 to 4294967295"),
    ({"seed": 0.5}, "seed=0.5; expected an integer from 0 to 4294967295"),
    ({"num_inference_steps": 0}, "num_inference_steps=0; expected at least 1"),
    ({"num_inference_steps": 1001}, "num_inference_steps=1001; expected at most 1000"),
    ({"seeds_per_prompt": 0}, "seeds_per_prompt=0; expected at least 1"),
    ({"seeds_per_prompt": 2**30}, "prompts * seeds_per_prompt=4294967296; expected at most 2147483647"),
    ({"batch_size": 0}, "batch_size=0; expected at least 1"),
  ],
  ids=str,
)
def test_drawing_refuses_seeds_and_counts_under_their_own_names(arguments, sentence):
  usual = {"seed": 0, "seeds_per_prompt": 1, "num_inference_steps": 1, "batch_size": 1, "guidance_scale": 1.0, "eta": 0}
  model = types.SimpleNamespace(latent_shape=(2, 2, 4))
  with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
    drawing.generate(model, {}, np.zeros((4, 8), np.int32), **usual | arguments)


@pytest.mark.parametrize(
  ("call", "sentence"),
  [
    (lambda: loading.load_text_to_image("tiny-sd", dtype="float32", seed=2**32), "seed=4294967296; expected"),
    (lambda: load_scorer("random:sd15-miniature", dtype="float32", seed=-1), "seed=-1; expected"),
    (lambda: score.score(settings(), model="x", out=pathlib.Path("o.npz"), batch_size=0), "batch_size=0; expected"),
    (lambda: score.score(settings(seed=-1), model="x", out=pathlib.Path("o.npz"), batch_size=1), "config.seed=-1;"),
    (lambda: export.export(pathlib.Path("x"), "lora", pathlib.Path("o"), step=-1), "--step=-1; expected at least 0"),
    (lambda: pickapic.prepare("p", "o", workers=2**31), "workers=2147483648; expected at most 2147483647"),
    (lambda: describe.describe(argparse.Namespace(seed=2**32, out=None)), "--seed=4294967296; expected"),
    (lambda: precompute.run(settings(), "o", batch_size=0), "--batch_size=0; expected at least 1"),
  ],
  ids=["load", "scorer", "score", "score, seed", "export", "pickapic", "describe", "precompute"],
)
def test_the_functions_of_commands_refuse_seeds_and_counts_as_these_do(call, sentence):
  with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
    call()


# ---------------------------------------------------------------------------------------------
# Model folders


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory, pipeline):
  return pipelines.save_pipeline(tmp_path_factory.mktemp("models") / "good", pipeline)


@pytest.fixture
def folder(good_folder, tmp_path):
  """A copy of a good model folder, to damage."""
  return pathlib.Path(shutil.copytree(good_folder, tmp_path / "model"))


UNET = "unet/diffusion_pytorch_model.safetensors"


def change(file, edit):
  tensors = safetensors.numpy.load_file(file)
  edit(tensors)
  safetensors.numpy.save_file(tensors, file)


def test_a_folder_that_is_not_there(refused):
  said = refused(settings(model="models/sd15"), FileNotFoundError)
  assert "models/sd15" in said and ("folder" in said)
  said = refused(settings(model="./nowhere"), FileNotFoundError)
  assert said.startswith("model folder ./nowhere does not exist, expected")


@pytest.mark.parametrize(
  ("edit", "sentence"),
  [
    (lambda t: t.pop("conv_in.bias"), "missing 1 (conv_in.bias)"),
    (lambda t: t.update(surplus=np.zeros(3, np.float32)), "unexpected 1 (surplus)"),
    (
      lambda t: t.update({"conv_in.bias": np.zeros(5, np.float32)}),
      "mis-shaped 1 (conv_in.bias: found [5], expected [16])",
    ),
  ],
  ids=["missing", "extra", "mis-shaped"],
)
def test_a_folder_with_other_tensors(refused, folder, edit, sentence):
  change(folder / UNET, edit)
  said = refused(settings(model=str(folder)))
  assert UNET in said and sentence in said


def test_a_folder_with_the_tokenizer_of_another_model(refused, folder):
  tokenizer = tokenizers.load_tokenizer(folder / "tokenizer")
  tokenizer.add_tokens(["<my-style>"])
  tokenizer.save_pretrained(folder / "tokenizer")
  said = refused(settings(model=str(folder)))
  assert re.search(r"model/tokenizer gives ids up to \d+, expected at most \d+ by the vocab_size of .*config", said)


def test_a_pickle_is_refused_unread(refused, folder):
  (folder / UNET).unlink()
  (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
  said = refused(settings(model=str(folder)))
  assert "only as diffusion_pytorch_model.bin" in said and "pickles can run code" in said


def test_a_truncated_file(refused, folder):
  content = (folder / UNET).read_bytes()
  (folder / UNET).write_bytes(content[: len(content) // 2])
  assert "is not a readable safetensors file" in refused(settings(model=str(folder)))


def test_a_folder_without_its_parts(refused, folder):
  (folder / "scheduler" / "scheduler_config.json").unlink()
  said = refused(settings(model=str(folder)), FileNotFoundError)
  assert "scheduler_config.json is missing" in said
  (folder / "model_index.json").unlink()
  assert "model_index.json is missing" in refused(settings(model=str(folder)), FileNotFoundError)


def test_judge_and_preference_model_folders(refused, folder):
  """A pipeline where one network is expected."""
  c = settings(model=str(folder), judge=str(folder))
  assert "config.json is missing" in refused(c, FileNotFoundError)
  c = settings(model=str(folder), objective="spo", preference_model=str(folder / "unet"))
  assert "unet/config.json does not describe a CLIP" in refused(c)


# ---------------------------------------------------------------------------------------------
# Work folders


def test_a_work_folder_of_another_config(refused, tmp_path):
  (tmp_path / "run").mkdir()
  other = settings(loss__beta=2.0).to_dict()
  (tmp_path / "run" / "config.json").write_text(json.dumps(other))
  said = refused(settings())
  assert "belongs to another config: config.loss.beta is 2.0 there and 5000.0 now" in said
  assert "--workdir" in said


def test_a_work_folder_with_other_files(refused, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "thesis.tex").write_text("years of work")
  assert "is not empty and holds no config.json" in refused(settings())


def test_a_file_as_work_folder(refused, tmp_path):
  (tmp_path / "run").write_text("")
  assert "run is a file; choose another --workdir" in refused(settings())
