"""`python -m jaxpref.export` on work folders, and runs that start from a LoRA file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import config, export
from jaxpref.files import adapters, folders, loading, pipelines
from jaxpref.files import family as families
from jaxpref.models import lora
from jaxpref.training import build, checkpoint, networks, step

RANK, ALPHA, SEED = 2, 4.0, 5
TARGETS = r"(to_q|to_v|proj_in)$"  # with a 1x1 convolution


def recipe(**overrides):
  c = config.default()
  c.update(objective="dpo", model="random:sd15-miniature", seed=SEED)
  c.update_from_flattened_dict(overrides)
  return c


def trained(params, step_number):
  """Parameters as if after some steps, different at each."""
  rng = np.random.default_rng(step_number)
  return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def make_run(folder, c, params, steps=(1, 2)):
  """A work folder as the trainer leaves it: states of two steps."""
  checkpoint.claim_workdir(folder, config.to_dict(c))
  saver = checkpoint.Checkpointer(folder, keep=2)
  optimizer = optax.adamw(1e-4)
  for number in steps:
    now = jax.tree.map(jnp.asarray, trained(params, number))
    state = step.initial_state(now, params, optimizer.init(now))
    saver.save(number, state, {"next_batch": number})
  saver.close()


@pytest.fixture(scope="module")
def base():
  return pipelines.random_pipeline("sd15-miniature", SEED)


@pytest.fixture(autouse=True)
def loaded_once(base, monkeypatch):
  def load(name, *, seed, **options):
    assert (name, seed) == ("random:sd15-miniature", SEED)
    return base

  monkeypatch.setattr(loading, "load_text_to_image", load)


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory):
  """(work folder, parameters at its start)."""
  folder = tmp_path_factory.mktemp("runs") / "lora"
  params = {"unet_lora": lora.init_lora(jax.random.key(0), base.params["unet"], rank=RANK, targets=TARGETS)}
  make_run(folder, recipe(**{"lora.rank": RANK, "lora.alpha": ALPHA}), params)
  return folder, params


@pytest.fixture(scope="module")
def full_run(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "full"
  params = {"unet": base.params["unet"]}
  make_run(folder, recipe(), params, steps=(1,))
  return folder, params


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_adapter_alone(lora_run, base, tmp_path, capsys):
  run, params = lora_run
  last = trained(params, 2)["unet_lora"]
  unet, base_params = base.unet.config, base.params["unet"]
  for form, out in {"lora": "new/folder", "kohya": "new/k.safetensors"}.items():
    export.main([str(run), f"--format={form}", f"--out={tmp_path / out}"])
    file = capsys.readouterr().out.strip()
    adapter, scale = adapters.load_lora(file, unet, base_params)
    assert scale == ALPHA / RANK
    equal(adapter, last)
  assert (tmp_path / "new" / "folder" / "pytorch_lora_weights.safetensors").is_file()
  export.main([str(run), "--format=lora", f"--out={tmp_path / 'x.safetensors'}", "--step=1", "--dtype=float16"])
  adapter, _ = adapters.load_lora(tmp_path / "x.safetensors", unet, base_params)
  first = trained(params, 1)["unet_lora"]
  equal(adapter, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), first))


def test_the_merged_pipeline(lora_run, base, tmp_path):
  run, params = lora_run
  adapter = trained(params, 2)["unet_lora"]
  export.main([str(run), "--format=pipeline", f"--out={tmp_path / 'out'}", "--dtype=float32"])
  found = pipelines.load_pipeline(tmp_path / "out")
  equal(found.params["unet"], lora.merge_lora(base.params["unet"], adapter, ALPHA / RANK))
  equal(found.params["vae"], base.params["vae"])


def test_a_unet_that_has_moved_is_merged_from_where_it_is_now(base, tmp_path, monkeypatch):
  run, place = tmp_path / "run", tmp_path / "moved"
  params = {"unet_lora": lora.init_lora(jax.random.key(0), base.params["unet"], rank=RANK, targets=TARGETS)}
  fields = {"lora.rank": RANK, "lora.alpha": ALPHA, "unet_model": "where/it/was"}
  make_run(run, recipe(**fields), params, steps=(1,))
  halved = jax.tree.map(lambda x: x / 2, base.params["unet"])
  folders.save_network(place, "diffusion_pytorch_model", base.unet.config.to_dict(), halved, jnp.float32)
  names = []

  def load(name, **options):
    names.append(name)
    return pipelines.replace_unet(base, loading.split_unet(name)[1])

  monkeypatch.setattr(loading, "load_text_to_image", load)
  command = [str(run), "--format=pipeline", f"--out={tmp_path / 'out'}", "--dtype=float32"]
  with pytest.raises(SystemExit, match="where/it/was does not exist"):
    export.main(command)
  export.main([*command, f"--unet_model={place}"])
  assert names == [f"random:sd15-miniature+unet={place}"]
  adapter = trained(params, 1)["unet_lora"]
  equal(pipelines.load_pipeline(tmp_path / "out").params["unet"], lora.merge_lora(halved, adapter, ALPHA / RANK))


def test_a_fully_trained_pipeline(full_run, base, tmp_path):
  run, params = full_run
  (tmp_path / "out").mkdir()  # an empty folder may be there
  export.main([str(run), "--format=pipeline", f"--out={tmp_path / 'out'}"])
  found = pipelines.load_pipeline(tmp_path / "out")
  half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), trained(params, 1)["unet"])
  equal(found.params["unet"], half)
  assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_export_says_which_step_it_writes(lora_run, tmp_path, capsys):
  folder = lora_run[0]
  for more, expected in (([], 2), (["--step=1"], 1)):
    file = tmp_path / f"{expected}.safetensors"
    export.main([str(folder), "--format=lora", f"--out={file}", *more])
    said = capsys.readouterr()
    assert said.err.startswith(f"exporting step {expected} of {folder}; the run ends at step ")
    assert said.out == f"{file}\n"


def test_what_cannot_be_exported_ends_in_one_sentence(lora_run, full_run, tmp_path):
  lora_folder, full_folder = lora_run[0], full_run[0]
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "thesis.tex").write_text("years of work")
  checkpoint.claim_workdir(tmp_path / "fresh", config.to_dict(recipe()))
  checkpoint.claim_workdir(tmp_path / "judge", config.to_dict(recipe(objective="classify")))
  checkpoint.claim_workdir(tmp_path / "future", {"objective": "dpo", "warp": 9})
  cases = [
    (full_folder, "lora", "x", [], "trained all weights .*use --format=pipeline"),
    (lora_folder, "kohya", "x", [], "expected a file name that ends in .safetensors"),
    (lora_folder, "lora", "taken", [], "taken exists and is not empty"),
    (lora_folder, "pipeline", "taken", [], "taken exists and is not empty"),
    (lora_folder, "kohya", "taken/thesis.tex", [], "expected a file name"),
    (lora_folder, "lora", "x", ["--step=7"], "no checkpoint of step 7, only of 1, 2"),
    (tmp_path / "nowhere", "lora", "x", [], "nowhere is not the work folder of a run"),
    (tmp_path / "fresh", "lora", "x", [], "holds no checkpoint yet"),
    (tmp_path / "judge", "pipeline", "x", [], "trained config.objective='classify'"),
    (tmp_path / "future", "pipeline", "x", [], "future/config.json is not a config of this version.*warp"),
  ]
  for run, form, out, more, message in cases:
    with pytest.raises(SystemExit, match=message) as stopped:
      export.main([str(run), f"--format={form}", f"--out={tmp_path / out}", *more])
    assert str(stopped.value).startswith("error: ")
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_is_named(lora_run, tmp_path):
  checkpoint.claim_workdir(tmp_path / "run", config.to_dict(recipe()))
  (tmp_path / "run" / "checkpoints" / "3" / "state").mkdir(parents=True)
  with pytest.raises(SystemExit, match="checkpoints/3 cannot be read"):
    export.main([str(tmp_path / "run"), "--format=pipeline", f"--out={tmp_path / 'x'}"])


def test_a_half_precision_base_does_not_swallow_the_change(base, tmp_path):
  """Training computes with both apart; the merged file may round only once, to its own precision."""
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params["unet"])
  pipe = dataclasses.replace(base, params={**base.params, "unet": half})
  fresh = lora.init_lora(jax.random.key(0), half, rank=RANK)
  small = jax.tree.map(lambda x: x * 1e-2, trained(fresh, 1))
  of = families.get("stable_diffusion")
  families.save_trained(of, tmp_path / "out", pipe, {"unet_lora": small}, scale=1.0, name="", dtype=jnp.float32)
  found = pipelines.load_pipeline(tmp_path / "out").params["unet"]
  expected = lora.merge_lora(jax.tree.map(lambda x: x.astype(jnp.float32), half), small, 1.0)
  equal(found, expected)


# ---- Training from a file --------------------------------------------------------------------------------------------


def test_a_run_leaves_its_adapter_and_another_continues_it(tmp_path):
  first = build.build(recipe(**{"lora.rank": RANK, "lora.alpha": ALPHA, "lora.targets": TARGETS}))
  adapter = trained(first.params, 1)["unet_lora"]
  first.export({"unet_lora": adapter}, tmp_path / "export")
  file = tmp_path / "export" / "pytorch_lora_weights.safetensors"
  assert file.is_file() and (tmp_path / "export" / "model_index.json").is_file()

  fields = {"lora.init_from": str(file), "reference.mode": "update"}
  same = build.build(recipe(**fields, **{"lora.alpha": ALPHA}))
  assert same.model.lora_scale == ALPHA / RANK
  equal(same.params["unet_lora"], adapter)
  equal(same.frozen["unet_lora"], adapter)  # what the reference returns to
  assert "unet_lora" not in build.build(recipe(**{"lora.init_from": str(file)})).frozen

  other = build.build(recipe(**fields))  # alpha = rank: the factors take up the difference
  assert other.model.lora_scale == 1.0
  expected = lora.to_layers(adapter)
  for name, (a, b) in lora.to_layers(other.params["unet_lora"]).items():
    np.testing.assert_array_equal(a, expected[name][0])
    np.testing.assert_allclose(b, ALPHA / RANK * expected[name][1], rtol=1e-6)

  with pytest.raises(ValueError, match=r"config.lora.rank=3, but .*weights.safetensors has rank 2"):
    build.build(recipe(**fields, **{"lora.rank": 3}))
  with pytest.raises(FileNotFoundError, match="there is no LoRA file"):
    build.build(recipe(**{"lora.init_from": "nowhere.safetensors"}))


def test_a_file_with_a_text_encoder_is_continued_whole(base, tmp_path):
  """Training changes the UNet's part; the text encoder's is in what it sees, and in all that is written."""
  targets = {"unet": TARGETS, "text_encoder": "(q_proj|fc1)$"}
  made = {
    name: lora.init_lora(jax.random.key(0), base.params[name], rank=RANK, targets=t) for name, t in targets.items()
  }
  unet, of_text = trained(made, 3)["unet"], trained(made, 3)["text_encoder"]
  file = tmp_path / "mine.safetensors"
  adapters.save_kohya(file, unet, 2.0, base.unet.config, text={"text_encoder": of_text})

  close = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
  fields = {"lora.init_from": f"{file}:0.5"}
  first = build.build(recipe(**fields))
  merged = lora.merge_lora(base.params["text_encoder"], of_text, 0.5)
  changed = np.concatenate(
    [(x - y).ravel() for x, y in zip(*map(jax.tree.leaves, (merged, base.params["text_encoder"])), strict=True)]
  )
  assert np.abs(changed).max() > 0.01
  close(first.frozen["text_encoder"], merged)
  close(first.params["unet_lora"], unet)  # strength 0.5 of scale 2, at the new scale 1
  assert list(first.params) == ["unet_lora"]
  with pytest.raises(ValueError, match="mine.safetensors:0.5 adapts text_encoder, and precomputed data holds prompts"):
    networks.text_adapters(config.typed(recipe(**fields, **{"data.source": "precomputed"})))

  after = trained(first.params, 1)
  first.export(after, tmp_path / "export")
  make_run(tmp_path / "run", recipe(**fields), first.params, steps=(1,))
  for form, out in {"lora": "lora.safetensors", "kohya": "kohya.safetensors", "pipeline": "pipeline"}.items():
    export.main([str(tmp_path / "run"), f"--format={form}", f"--out={tmp_path / out}"])
  half = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), tree)
  for folder in ("export", "pipeline"):
    equal(pipelines.load_pipeline(tmp_path / folder).params["text_encoder"], half(first.frozen["text_encoder"]))
  for written in ("lora.safetensors", "kohya.safetensors", "export/pytorch_lora_weights.safetensors"):
    adapter, scale, texts = adapters.load_pipeline_lora(tmp_path / written, base.unet.config, base.params)
    close((adapter, scale), (after["unet_lora"], 1.0))
    close(lora.merge_lora(base.params["text_encoder"], texts["text_encoder"]), merged)


def test_metadata_of_a_run_is_its_config(lora_run):
  """What `read_config` gives is what the trainer wrote, field by field."""
  assert config.to_dict(export.read_config(lora_run[0])) == json.loads((lora_run[0] / "config.json").read_text())
