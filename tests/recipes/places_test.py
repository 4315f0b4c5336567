"""~ is the home folder in every path, of recipes and of command lines."""

import dataclasses
import json
import pathlib

import pytest

from jaxpref import config as config_lib
from jaxpref import describe, evaluate, export, pairs, replay, sample
from jaxpref.data import paths, pickapic, prompt_sets
from jaxpref.data.pickapic import __main__ as pickapic_command
from jaxpref.files import adapters, folders
from jaxpref.recipes import places, sections
from jaxpref.rewards import published
from jaxpref.training import checkpoint

FIELDS = (
  "model", "model_config", "vae_model", "unet_model", "preference_model", "judge", "data.path", "data.images",
  "data.scores", "lora.init_from", "evaluation.prompts",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  (tmp_path / "home").mkdir()
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path / "elsewhere")
  yield tmp_path / "home"
  assert list((tmp_path / "elsewhere").iterdir()) == []  # no folder named ~


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_recipe(name, home):
  changeable = config_lib.default()
  changeable.update_from_flattened_dict({name: "~/x"})
  value = config_lib.typed(changeable)
  for part in name.split("."):
    value = getattr(value, part)
  assert value == str(home / "x")
  changeable.update_from_flattened_dict({name: "~nobody-of-this-name/x"})
  with pytest.raises(ValueError, match=f"^config.{name}=~nobody-of-this-name/x: there is no user .*; write ./~nobody"):
    config_lib.typed(changeable)


def test_options_of_an_objective_of_one_s_own(home):
  made = sections.read(Own, {"file": "~/x", "other": "~/x"}, "config.options.")
  assert (made.file, made.other) == (str(home / "x"), "~/x")


@dataclasses.dataclass(frozen=True)
class Own:
  file: places.Place = ""
  other: str = ""


def test_paths_inside_of_names(home):
  assert published._parse("pickscore=~/w") == ("pickscore", str(home / "w"))
  assert adapters.parse_lora_file("~/a.safetensors:0.5") == (home / "a.safetensors", 0.5)
  (home / "a.safetensors").write_bytes(b"")
  found = evaluate.parse_models(["base=~/m+~/a.safetensors:0.5"])
  assert found == {"base": (str(home / "m"), ((home / "a.safetensors", 0.5),))}
  for spec in ("pickscore=~nobody-of-this-name/w",):
    with pytest.raises(ValueError, match="there is no user 'nobody-of-this-name'"):
      published._parse(spec)


def test_functions_that_are_given_paths(home):
  (home / "m").mkdir()
  assert folders.resolve_folder("~/m") == home / "m"
  (home / "p.txt").write_text("red apple\n")
  assert prompt_sets.read("~/p.txt")[0].text == "red apple"
  assert paths.open_path("~/m") == home / "m"


def test_a_run_that_was_begun_with_a_tilde_goes_on(home):
  (home / "run").mkdir()
  (home / "run" / "config.json").write_text(json.dumps({"model": "~/m"}))
  checkpoint.check_workdir(home / "run", {"model": str(home / "m")})
  with pytest.raises(ValueError, match="belongs to another config"):
    checkpoint.check_workdir(home / "run", {"model": str(home / "other")})


COMMANDS = [
  (
    sample.main,
    sample,
    "draw",
    ["--prompt=x", "--model=~/m", "--model_config=~/c", "--vae_model=~/v", "--out=~/o"],
    ("model", "model_config", "vae_model"),
  ),
  (
    evaluate.main,
    evaluate,
    "evaluate",
    ["--models=a=b", "--prompts=~/p", "--out=~/o", "--geneval_layout=~/g", "--vae_model=~/v"],
    ("prompts", "geneval_layout", "vae_model"),
  ),
  (
    pairs.main,
    pairs,
    "make_pairs",
    ["--model=~/m", "--unet_model=~/u", "--other_model=~/b", "--other_unet_model=~/c", "--prompts=~/p", "--out=~/o"],
    ("model", "unet_model", "other_model", "other_unet_model", "prompts"),
  ),
  (
    describe.main,
    describe,
    "describe",
    ["~/s", "--images=~/i", "--tokenizer=~/t", "--out=~/o"],
    ("images", "tokenizer"),
  ),
]


@pytest.mark.parametrize(("command", "module", "work", "arguments", "names"), COMMANDS, ids=lambda v: str(v)[:20])
def test_arguments_of_commands(monkeypatch, home, command, module, work, arguments, names):
  seen = []
  monkeypatch.setattr(module, work, lambda args: seen.append(args) or "")
  command(arguments)
  for name in (*names, "out"):
    assert str(getattr(seen[0], name)).startswith(str(home)), name
  assert getattr(seen[0], "source", [str(home / "s")]) == [str(home / "s")]


def test_arguments_of_export_replay_and_pickapic(monkeypatch, home):
  seen = []
  monkeypatch.setattr(export, "export", lambda run, form, out, **_: seen.append([run, out]))
  export.main(["~/r", "--format=lora", "--out=~/o"])
  monkeypatch.setattr(replay, "replay", lambda folder: seen.append([folder, folder]))
  replay.main(["~/b"])
  monkeypatch.setattr(pickapic, "prepare", lambda parquet, out, **_: seen.append([parquet, out]))
  pickapic_command.main(["--parquet=~/p", "--out=~/d"])
  assert all(pathlib.Path(path).parent == home for found in seen for path in found) and len(seen) == 3
