"""The command that compares models: drawing, resuming, scoring, and what it refuses."""

import dataclasses
import importlib
import json
import linecache
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from configs import dpo_tiny
from jaxpref import evaluate, main
from jaxpref.data import emoji, lease
from jaxpref.evaluation import folder as evaluation_folder
from jaxpref.files import adapters, loading, pipelines
from jaxpref.models import lora, presets
from jaxpref.rewards import published
from tests import QUICK_FLAGS
from tests.occupied import occupied
from tests.small_presets import with_one_attention

pytestmark = pytest.mark.usefixtures("one_device")

REPOSITORY = pathlib.Path(__file__).parents[1]
PROMPTS = ("red apple", "volcano", "grinning cat")
FEW = ("--steps=2", "--seeds=2", "--guidance_scale=2")


def brightness(images, prompts):
  """Mean of the pixels, 0 to 255."""
  assert len(images) == len(prompts)
  return [float(image.mean()) for image in images]


def redness(images, prompts):
  """Mean red above mean blue, -255 to 255."""
  return np.asarray([image[..., 0].mean() - image[..., 2].mean() for image in images])


BRIGHTNESS, REDNESS = (f"tests.evaluate_test:{name}" for name in ("brightness", "redness"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Folders of two models of random weights with a UNet of one level, of a larger one, and a LoRA of the first."""
  folder = tmp_path_factory.mktemp("models")
  preset = with_one_attention(presets.ONE_LEVEL)
  for seed, name in enumerate(("one", "two")):
    pipe = pipelines.random_pipeline(preset, seed=seed)
    pipelines.save_pipeline(folder / name, pipe)
  large = dataclasses.replace(preset.unet, sample_size=2 * preset.unet.sample_size)
  pipelines.save_pipeline(folder / "large", pipelines.random_pipeline(dataclasses.replace(preset, unet=large)))
  adapter = lora.init_lora(jax.random.key(1), pipe.params["unet"], rank=2)
  adapter = jax.tree.map(lambda x: 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
  adapters.save_diffusers(folder / "lora.safetensors", adapter, 1.0)
  (folder / "prompts.txt").write_text("\n".join(PROMPTS))
  return folder


def run(models, out, *arguments, names=("one", "two"), prompts="prompts.txt", scorers=(BRIGHTNESS,)):
  specs = [f"{name}={models / name}" if "=" not in name else name for name in names]
  evaluate.main(["--models", *specs, f"--prompts={models / prompts}", "--scorers", *scorers, f"--out={out}", *FEW,
                 *arguments])  # fmt: skip


@pytest.mark.slow
def test_a_model_with_another_unet_is_drawn_and_has_its_own_fingerprint(models, tmp_path):
  """Its pictures are those of a folder in which the UNet was exchanged."""
  exchanged = shutil.copytree(models / "one", tmp_path / "exchanged")
  shutil.rmtree(exchanged / "unet")
  shutil.copytree(models / "two" / "unet", exchanged / "unet")
  names = ("one", f"other={models / 'one'}", f"exchanged={exchanged}")
  run(models, tmp_path / "out", f"--unet=other={models / 'two'}", names=names)
  found = {name: pictures(tmp_path / "out", name) for name in ("one", "other", "exchanged")}
  assert found["other"] == found["exchanged"] != found["one"]
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["models"]
  assert manifest["other"]["weights"] == manifest["exchanged"]["weights"] != manifest["one"]["weights"]
  drawn = [evaluation_folder.fingerprint(f"random:tiny-sd{u}", ()) for u in ("", f"+unet={models / 'two'}")]
  assert drawn[0] == "random:tiny-sd" and drawn[1].startswith("random:tiny-sd+") and "unet" not in drawn[1]
  for unet, sentence in (
    ("nobody=x", "expected NAME=UNET with the name of a model, one of one, other"),
    ("x", "NAME="),
  ):
    with pytest.raises(ValueError, match=sentence):
      evaluate.with_unets({"one": ("a", ()), "other": ("b", ())}, [unet])


def pictures(folder, model):
  return {p.name: p.read_bytes() for p in sorted((folder / "images" / model).iterdir())}


def results(folder):
  return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
  folder = tmp_path_factory.mktemp("evaluated") / "out"
  run(models, folder)
  return folder


def test_pictures_scores_tables_and_a_manifest(models, evaluated):
  names = {p.name for p in evaluated.iterdir()}
  assert names == {"images", "manifest.json", "report.html", "results.json", "scores", "scores.csv", "table.md",
                   "table.tex"}  # fmt: skip
  assert list(pictures(evaluated, "one")) == [f"0000{p}_{s}.png" for p in range(3) for s in range(2)]
  found = results(evaluated)
  assert found["baseline"] == "one" and [p["text"] for p in found["prompts"]] == list(PROMPTS)
  for name in ("one", "two"):
    of_files = [np.asarray(Image.open(evaluated / "images" / name / f"0000{p}_{s}.png")).mean() for p in range(3)
                for s in range(2)]  # fmt: skip
    np.testing.assert_allclose(np.ravel(found["scores"][name][BRIGHTNESS]), of_files, rtol=1e-6)
  assert found["scorers"][0]["scale"] == "Mean of the pixels, 0 to 255."
  manifest = json.loads((evaluated / "manifest.json").read_text())
  assert manifest["settings"]["steps"] == 2 and manifest["settings"]["scheduler"] == "ddim"
  assert len(manifest["settings"]["prompts_sha256"]) == 64 and set(manifest["versions"]) >= {"jax", "jaxpref"}
  assert manifest["models"]["one"]["weights"] != manifest["models"]["two"]["weights"]


def copy(evaluated, folder):
  for file in evaluated.rglob("*"):
    if file.is_file():
      (folder / file.relative_to(evaluated)).parent.mkdir(parents=True, exist_ok=True)
      (folder / file.relative_to(evaluated)).write_bytes(file.read_bytes())
  return folder


def test_missing_and_damaged_pictures_are_drawn_again_and_scored_again(models, evaluated, tmp_path):
  folder = copy(evaluated, tmp_path / "out")
  before = pictures(folder, "two")
  lost, damaged = (folder / "images" / "two" / name for name in ("00000_1.png", "00002_0.png"))
  lost.unlink()
  damaged.write_bytes(damaged.read_bytes()[:100])
  kept = {p: p.stat().st_mtime_ns for p in (folder / "images").rglob("*.png") if p not in (lost, damaged)}
  stale = folder / "scores" / "two" / next((folder / "scores" / "two").iterdir()).name
  stale.write_text(stale.read_text().replace("[[", "[[1000.0, ", 1))
  run(models, folder)
  assert pictures(folder, "two") == before
  assert {p: p.stat().st_mtime_ns for p in kept} == kept
  assert results(folder)["scores"] == results(evaluated)["scores"]


def test_models_and_scorers_are_added_to_a_folder(models, evaluated, tmp_path, capsys, monkeypatch):
  folder = copy(evaluated, tmp_path / "out")
  with_lora = f"lora={models / 'one'}+{models / 'lora.safetensors'}"
  begun = json.loads((folder / "manifest.json").read_text())
  begun["models"]["one"]["versions"]["jaxpref"] = "0.0.1"
  del begun["models"]["two"]["versions"]  # as they were, once for all
  (folder / "manifest.json").write_text(json.dumps(begun))
  run(models, folder, names=("one", with_lora), scorers=(BRIGHTNESS, REDNESS))
  found = results(folder)
  assert found["models"] == ["one", "lora"] and set(found["scores"]["lora"]) == {BRIGHTNESS, REDNESS}
  assert found["scores"]["one"][BRIGHTNESS] == results(evaluated)["scores"]["one"][BRIGHTNESS]
  assert pictures(folder, "lora") != pictures(folder, "one")
  manifest = json.loads((folder / "manifest.json").read_text())
  assert set(manifest["models"]) == {"one", "two", "lora"}
  # What was drawn before keeps its versions.
  assert manifest["models"]["one"]["versions"] == manifest["versions"] | {"jaxpref": "0.0.1"}
  assert manifest["models"]["lora"]["versions"] == manifest["versions"]
  # Nothing is drawn or scored a second time.
  monkeypatch.setattr(evaluate.drawing, "draw", None)
  monkeypatch.setattr(evaluate, "score_images", None)
  run(models, folder, names=("one", with_lora, "two"), scorers=(BRIGHTNESS,))
  assert results(folder)["models"] == ["one", "lora", "two"]


def test_one_prompt_has_no_interval_and_identical_models_are_even(models, tmp_path, capsys):
  same = f"same={models / 'one'}"
  run(models, tmp_path / "out", "--num_prompts=1", names=("one", same))
  found = results(tmp_path / "out")["summary"]
  text = json.dumps(found)
  assert "null" in text
  table = capsys.readouterr().out
  assert "50.0%" in table and "[" not in table.split("Brackets")[0].split("| one |")[1].split("\n")[0]
  assert "one prompt" in table.lower() and "1 prompt, 2 pictures each" in table
  assert "Drawn with scheduler ddim, steps 2," in table
  assert "Diversity was not measured, as no CLIP is among the scorers" in table


def test_the_shipped_models_with_the_shipped_scorers(tmp_path, capsys):
  """Offline, with the diversity of their pictures, on the embedded captions."""
  arguments = ["--models", "base=tiny-sd", "--prompts=emoji", "--num_prompts=2", "--steps=2", "--seeds=2"]
  evaluate.main([*arguments, "--scorers", "judge", "tiny-clip", f"--out={tmp_path / 'out'}"])
  found = results(tmp_path / "out")
  assert found["baseline"] is None and set(found["scores"]["base"]) == {"judge", "tiny-clip"}
  assert np.shape(found["diversity"]["base"]) == (2,) and min(found["diversity"]["base"]) > 0
  assert all(p["category"] for p in found["prompts"])
  assert "tiny-clip" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--scorers", "judge", "--preferred_style=notto"], "not 'notto'; choose one of them as preferred_style"),
    (["--scorers", "judge", f"judge={loading.folder_of('tiny-judge')}"], "--scorers names judge twice"),
    (["--scorers", "judge", "--diversity=judge"], "--diversity=judge; expected one of "),
  ],
)
def test_mistakes_are_told_before_anything_is_drawn(tmp_path, monkeypatch, arguments, message):
  monkeypatch.setattr(evaluate.drawing, "draw", None)
  with pytest.raises(SystemExit, match=message):
    evaluate.main(["--models", "base=tiny-sd", "--prompts=emoji", *arguments, f"--out={tmp_path / 'out'}"])
  assert not (tmp_path / "out").exists()


def test_scores_of_a_function_that_has_changed_are_not_its_own(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  versions = []
  for constant in (1.0, 1.0, 2.0):
    (tmp_path / "own_scores.py").write_text(f"def one(images, prompts):\n  return [{constant}] * len(images)\n")
    importlib.invalidate_caches()
    sys.modules.pop("own_scores", None)
    linecache.clearcache()
    versions.append(published.load("own_scores:one").version)
  assert versions[0] == versions[1] != versions[2]


def test_geneval_layout_writes_the_folders_of_its_scorer(models, tmp_path):
  prompts = tmp_path / "evaluation_metadata.jsonl"
  objects = [{"class": "bench", "count": 1}]
  rows = [{"tag": "single_object", "include": objects, "prompt": f"a photo of {i}"} for i in "ab"]
  prompts.write_text("\n".join(map(json.dumps, rows)))
  run(models, tmp_path / "out", f"--geneval_layout={tmp_path / 'geneval'}", prompts=prompts, names=("one",))
  assert json.loads((tmp_path / "geneval/one/00001/metadata.jsonl").read_text()) == rows[1]
  drawn = tmp_path / "geneval/one/00001/samples/0001.png"
  assert np.array_equal(Image.open(drawn), Image.open(tmp_path / "out/images/one/00001_1.png"))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"names": ("one", "gone=nowhere/at_all")}, "nowhere/at_all"),
    ({"names": ("one", "two=")}, "expected NAME=MODEL"),
    ({"names": ("one", "a/b=tiny-sd")}, "the name becomes a folder's"),
    ({"names": ("one", "one")}, "names 'one' twice"),
    ({"names": ("one", "large")}, r"one draws 16 x 16 pixels and large 32 x 32; set --height and --width"),
    ({"names": ("one", "l=tiny-sd+gone.safetensors")}, "there is no file gone.safetensors"),
    ({"names": ("one", "l=tiny-sd+gone.safetensors:0.8+b.safetensors")}, "there is no file b.safetensors"),
    ({"prompts": "gone.txt"}, "gone.txt"),
    ({"scorers": ("beauty",)}, "beauty"),
    ({"scorers": ("imagereward",)}, "ImageReward.pt.*convert_scorer.py"),
    ({"arguments": ("--num_prompts=4",)}, "has 3, expected 1 to 3"),
    ({"arguments": ("--prompts=emoji:tests",)}, "split of the emoji data must be one of train, validation, test"),
    ({"arguments": ("--steps=0",)}, "--steps=0; expected at least 1"),
    ({"arguments": ("--score_batch_size=0",)}, "--score_batch_size=0; expected at least 1"),
    ({"arguments": ("--geneval_layout=x",)}, "prompt 0, 'red apple', has no tag"),
  ],
)
def test_bad_input_is_refused_in_a_sentence_before_anything_is_drawn(
  models, tmp_path, monkeypatch, change, message, capsys
):
  monkeypatch.setenv("HOME", str(tmp_path))
  change = dict(change)
  arguments = change.pop("arguments", ())
  with pytest.raises(SystemExit) as error:
    run(models, tmp_path / "out", *arguments, **change)
  assert re.search(message, str(error.value)), error.value
  assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
  assert not (tmp_path / "out" / "images").exists()


def test_a_model_has_its_loras_with_their_strengths_in_order(tmp_path):
  one, two = (tmp_path / name for name in ("one.safetensors", "two.safetensors"))
  for file in (one, two):
    save_file({"x": np.zeros(1, np.float32)}, file)
  models = evaluate.parse_models(["base=a+b/c:d", f"x=a+b/c+{one}:0.8+{two}", f"y=a+{two}:-1"])
  assert models == {"base": ("a+b/c:d", ()), "x": ("a+b/c", ((one, 0.8), (two, 1.0))), "y": ("a", ((two, -1.0),))}
  manifest = evaluation_folder.fingerprint("random:tiny-sd", models["y"][1])
  assert manifest != evaluation_folder.fingerprint("random:tiny-sd", models["x"][1][1:])  # another strength


def test_a_folder_of_other_settings_prompts_or_weights_is_left_alone(models, evaluated, tmp_path):
  folder = copy(evaluated, tmp_path / "out")
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  other = pathlib.Path(tmp_path / "other.txt")
  other.write_text("something else\nand more\nand more yet")
  for arguments, message in (
    ({"arguments": ("--seed=1",)}, "was begun with seed=0, not 1"),
    ({"prompts": other}, "was begun with prompts_sha256="),
    ({"names": (f"one={models / 'two'}",)}, "pictures of other weights under the name one"),
  ):
    with pytest.raises(SystemExit, match=message):
      run(models, folder, *arguments.pop("arguments", ()), **arguments)
  assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
  (folder / "manifest.json").write_text('{"settings": {}, "models": {"one": {}}}')
  with pytest.raises(SystemExit, match=r"manifest.json cannot be read .*choose another --out"):
    run(models, folder)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").touch()
  with pytest.raises(SystemExit, match="full is not empty and has no manifest.json"):
    run(models, tmp_path / "full")


def test_a_folder_that_another_evaluation_writes_is_refused(models, evaluated, tmp_path):
  folder = copy(evaluated, tmp_path / "out")
  (folder / "report.html").unlink()
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  with occupied(folder) as sentence, pytest.raises(SystemExit, match=re.escape(f"error: {sentence}")):
    run(models, folder)
  (folder / lease.NAME).unlink()
  assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_two_processes_share_the_work(models, evaluated, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  folder, ending = copy(evaluated, tmp_path / "out"), ("00000_1.png", "00001_0.png", "00002_1.png")
  for name in ending:  # numbers 1, 2 and 5: each process misses some
    (folder / "images" / "two" / name).unlink()
  specs = [f"{name}={models / name}" for name in ("one", "two")]
  command = [sys.executable, "-m", "jaxpref.evaluate", "--models", *specs, f"--prompts={models / 'prompts.txt'}", *FEW]
  command += ["--scorers", BRIGHTNESS, REDNESS, f"--out={folder}", "--num_processes=2"]
  command += [f"--coordinator_address=localhost:{port}"]
  options = dict(cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{QUICK_FLAGS} --xla_force_host_platform_device_count=2",
  }
  processes = [subprocess.Popen([*command, f"--process_id={i}"], env=environment, **options) for i in range(2)]
  said = [process.communicate(timeout=500) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], said
  assert "report.html" in said[0][0] and "report.html" not in said[1][0]
  assert "two: 2 of 3 pictures are there" in said[0][1] and "two: 1 of 3 pictures are there" in said[1][1]
  assert list(pictures(folder, "two")) == list(pictures(evaluated, "two"))
  found, expected = results(folder)["scores"], results(evaluated)["scores"]
  for name in ("one", "two"):
    np.testing.assert_allclose(found[name][BRIGHTNESS], expected[name][BRIGHTNESS], atol=0.1)
    of_files = [redness([np.asarray(Image.open(file))], "")[0] for file in sorted((folder / "images" / name).iterdir())]
    np.testing.assert_allclose(np.ravel(found[name][REDNESS]), of_files, rtol=1e-5)


def test_a_recipe_names_scorers(models, tmp_path, monkeypatch, capsys):
  """The comparison follows the training; what is not there is refused before it."""
  trained = []

  def run(config, workdir, command=""):
    trained.append(workdir)
    pipe = pipelines.load_pipeline(models / "two")
    pipelines.save_pipeline(pathlib.Path(workdir) / "export", pipe)
    (pathlib.Path(workdir) / "config.json").write_text(config.to_json_best_effort())

  monkeypatch.setattr("jaxpref.training.loop.run", run)
  config = dpo_tiny.get_config()
  config.model = str(models / "one")
  config.evaluation.update(prompts=str(models / "prompts.txt"), seeds_per_prompt=1, num_inference_steps=2)
  for fields, message in (
    ({"scorers": "beauty"}, "scorer 'beauty' is unknown"),
    ({"scorers": f"{BRIGHTNESS},tests.evaluate_test:gone"}, "has no function 'gone'"),
    ({"scorers": BRIGHTNESS, "num_prompts": -1}, "evaluation.num_prompts=-1; expected 0"),
    ({"scorers": BRIGHTNESS, "eta": 2.0, "num_prompts": 0}, "evaluation.eta=2.0; expected a number in"),
  ):
    config.evaluation.update(fields)
    with pytest.raises(ValueError, match=message):
      main.run_and_evaluate(config, str(tmp_path / "run"))
  config.evaluation.eta = 0.0
  embedded = config.copy_and_resolve_references()
  embedded.evaluation.update(scorers=BRIGHTNESS, prompts="emoji", split="validation", num_prompts=1000)
  args = evaluate.arguments_of_run(embedded, str(tmp_path / "run"))
  assert args.prompts == "emoji:validation" and args.num_prompts == len(emoji.load_index("core", "validation"))
  config.evaluation.scorers = f"{BRIGHTNESS}, {REDNESS}"
  missing = config.copy_and_resolve_references()
  missing.evaluation.prompts = str(tmp_path / "gone.txt")
  with pytest.raises(OSError, match="gone.txt"):
    main.run_and_evaluate(missing, str(tmp_path / "run"))
  assert not trained
  main.run_and_evaluate(config, str(tmp_path / "run"))
  assert trained == [str(tmp_path / "run")]
  found = results(tmp_path / "run" / "evaluation")
  assert found["models"] == ["base", "aligned"] and [s["name"] for s in found["scorers"]] == [BRIGHTNESS, REDNESS]
  assert len(found["prompts"]) == 3 and found["settings"]["guidance_scale"] == 3.5
  assert '<a href="evaluation/report.html">' in (tmp_path / "run" / "index.html").read_text()
  # Continued, the run has other weights: the evaluation of those before is kept, and there is a new one.
  run_before, two = run, pipelines.load_pipeline(models / "two")

  def go_on(config, workdir, command=""):
    run_before(config, workdir)
    changed = {**two.params, "unet": jax.tree.map(lambda x: 1.5 * x, two.params["unet"])}
    pipelines.save_pipeline(pathlib.Path(workdir) / "export", dataclasses.replace(two, params=changed))

  before = pictures(tmp_path / "run" / "evaluation", "aligned")
  monkeypatch.setattr("jaxpref.training.loop.run", go_on)
  shutil.rmtree(tmp_path / "run" / "export")
  main.run_and_evaluate(config, str(tmp_path / "run"))
  assert pictures(tmp_path / "run" / "evaluation_1", "aligned") == before
  assert pictures(tmp_path / "run" / "evaluation", "aligned") != before
  assert f"they are in {tmp_path / 'run' / 'evaluation_1'} now" in capsys.readouterr().err
  config.objective = "denoise"
  with pytest.raises(ValueError, match="config.evaluation.scorers=.*expected nothing for this objective"):
    main.run_and_evaluate(config, str(tmp_path / "other"))
