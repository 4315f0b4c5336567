"""scripts/assets/install_assets.py: what it writes loads, and nothing is replaced if something is wrong."""

import json
import shutil

import pytest
from safetensors import safe_open

from jaxpref.files import tokenizers
from scripts.assets import install_assets
from scripts.assets.install_assets import ASSETS, install


@pytest.fixture
def runs(tmp_path):
  """Work folders whose exports are the shipped models."""
  folders = {}
  for name in install_assets.RUNS:
    folders[name] = tmp_path / "runs" / name
    shutil.copytree(ASSETS / name, folders[name] / "export")
  (folders["tiny-judge"] / "results.json").write_text('{"held_out_style_accuracy": 1.0}')
  return folders


def tensors(file):
  with safe_open(file, framework="numpy") as f:
    return {key: f.get_tensor(key) for key in f.keys()}


def test_installs_all_models(runs, tmp_path, capsys):
  assets = tmp_path / "assets"
  (assets / "tiny-clip").mkdir(parents=True)
  (assets / "tiny-clip" / "stale.bin").write_bytes(b"")
  install(runs, assets)
  names = {str(p.relative_to(assets)) for p in assets.rglob("*.safetensors")}
  assert names == {str(p.relative_to(ASSETS)) for p in ASSETS.rglob("*.safetensors")}
  for name in names:
    old, new = tensors(ASSETS / name), tensors(assets / name)
    assert old.keys() == new.keys()
    assert all(old[k].dtype == new[k].dtype == "float16" and (old[k] == new[k]).all() for k in old)
  assert not (assets / "tiny-clip" / "stale.bin").exists()
  assert json.loads((assets / "tiny-clip" / "config.json").read_text())["model_type"] == "clip"
  assert json.loads((assets / "tiny-judge" / "metrics.json").read_text())["held_out_style_accuracy"] == 1.0
  captions = ["red apple"]
  tokenizer = tokenizers.load_tokenizer(assets / "tiny-sd" / "tokenizer")
  ids = [tokenizers.tokenize(t, captions, length=16).tolist() for t in (tokenizer, tokenizers.tiny_tokenizer())]
  assert ids[0] == ids[1]
  assert "in all" in capsys.readouterr().out


def test_refuses_before_it_replaces(runs, tmp_path, monkeypatch):
  assets = tmp_path / "assets"
  install({"tiny-judge": runs["tiny-judge"]}, assets)
  before = (assets / "tiny-judge" / "model.safetensors").read_bytes()
  with pytest.raises(ValueError, match="tiny-jugde is no model"):
    install({"tiny-jugde": runs["tiny-judge"]}, assets)
  with pytest.raises(FileNotFoundError, match="no folder export"):
    install({"tiny-judge": tmp_path / "nothing"}, assets)
  monkeypatch.setattr(install_assets, "LARGEST_FILE", 1000)
  with pytest.raises(ValueError, match="expected at most"):
    install({"tiny-judge": runs["tiny-judge"]}, assets)
  monkeypatch.undo()
  monkeypatch.setattr(install_assets, "LARGEST_TOTAL", 1000)
  with pytest.raises(ValueError, match="smaller networks"):
    install({"tiny-judge": runs["tiny-judge"]}, assets)
  assert (assets / "tiny-judge" / "model.safetensors").read_bytes() == before
  assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
