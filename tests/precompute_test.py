"""Training on precomputed data takes the steps it takes without; the command survives, shares and refuses."""

import dataclasses
import functools
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxpref import config, precompute
from jaxpref.data import latents, lease, pipeline, sources
from jaxpref.devices import sharding
from jaxpref.files import loading, pipelines
from jaxpref.models import presets
from jaxpref.models.stable_diffusion import StableDiffusion
from jaxpref.objectives import kto, pairs, pretraining
from jaxpref.objectives.base import Weights
from jaxpref.training import build, inputs, optim, programs
from tests.data import bucket as buckets
from tests.data.latents_test import largest_file
from tests.occupied import occupied
from tests.small_presets import drawn, smaller, with_one_attention
from tests.stub_model import StubModel, init, pair_batch

bucket, served = buckets.bucket, buckets.served  # fixtures
SIZE = 16
MINIATURES = ("sd15-miniature", "sdxl-miniature")


def picture(seed, height, width):
  """Smooth, and different at each edge, so that a mirrored or shifted picture is another one."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (3, 3, 3))
  return np.kron(small, np.ones((height // 3 + 1, width // 3 + 1, 1)))[:height, :width].astype(np.uint8)


RECORDS = [
  {
    "id": f"pair {i}",
    "caption": ["red apple", "grinning cat", "volcano"][i % 3],
    "image_0": picture(2 * i, 16, 20 + i),
    "image_1": picture(2 * i + 1, 18 + i, 16) if i != 4 else b"no image",
    "label_0": [1.0, 0.0, 1.0, 0.5][i % 4],
  }
  for i in range(14)
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """One device, smaller miniatures, and data in memory."""
  monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: make_mesh(devices=jax.devices()[:1]))
  for name in MINIATURES:
    monkeypatch.setitem(presets.PRESETS, name, MADE_SMALLER[name])
  monkeypatch.setattr(pipelines, "random_pipeline", drawn)
  source = sources.Indexed(RECORDS, sources.index_of_records(RECORDS))
  monkeypatch.setattr(inputs, "open_pairs", lambda config: source)


make_mesh = sharding.make_mesh


def with_one_block(preset):
  """Of the one transformer that is left."""
  return dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, transformer_layers_per_block=(1,)))


MADE_SMALLER = {name: with_one_block(with_one_attention(smaller(presets.PRESETS[name]))) for name in MINIATURES}


def recipe(model="sd15-miniature", **fields):
  c = config.default()
  c.update(objective="dpo", model=f"random:{model}", batch_size=4, num_steps=3)
  c.loss.beta = 5000.0
  c.data.update(flip=True, caption_dropout=0.3, num_threads=0)
  c.evaluation.num_prompts = 0
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  return c


def trained_on(c, folder):
  c = c.copy_and_resolve_references()
  c.data.update(source="precomputed", path=str(folder))
  return c


OPTIONS = {"rows_per_file": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Of sd15-miniature; four files, of which two are full."""
  return tmp_path_factory.mktemp("precomputed") / "sd15"


@pytest.fixture
def folder(made):
  if not made.exists():
    assert precompute.run(recipe(), made, **OPTIONS)
  return made


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------
# Training


def steps(c, count):
  """Losses, and the first and the last parameters."""
  config.check(c)
  experiment = build.build(c)
  optimizer = optim.make_optimizer("adamw", 1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
  state = jax.jit(programs.state_initializer(experiment, optimizer))(experiment.params)
  first = jax.device_get(state.params)
  step = jax.jit(programs.make_step(c, experiment, optimizer, make_mesh(devices=jax.devices()[:1])))
  batches, losses = experiment.batches(), []
  for _ in range(count):
    state, metrics = step(state, experiment.frozen, next(batches))
    losses.append(float(metrics["loss"]))
  return losses, first, jax.device_get(state.params)


def distance(a, b):
  squares = jax.tree.map(lambda x, y: np.sum(np.square(np.float64(x) - y)), a, b)
  return sum(jax.tree.leaves(squares)) ** 0.5


def test_training_takes_the_same_steps(folder):
  """Flips, dropped captions, ties, unreadable images, and the posterior's draws are those of training without."""
  c = recipe()
  losses, first, last = steps(c, 4)
  found, _, found_last = steps(trained_on(c, folder), 4)
  assert abs(losses[-1] - np.log(2)) > 0.01  # they are no longer those of the start
  np.testing.assert_allclose(found, losses, rtol=1e-3)
  assert distance(found_last, last) < 0.05 * distance(first, last)


def sdxl():
  return recipe("sdxl-miniature", objective="tdpo", data__ties="keep", data__flip=False, timesteps__reward_scale=True)


def test_batches_of_sdxl_have_the_size_of_each_image(tmp_path):
  c = sdxl()
  assert precompute.run(c, tmp_path / "xl", **OPTIONS)
  batch, expected = next(build.build(trained_on(c, tmp_path / "xl")).batches()), next(build.build(c).batches())
  for name in ("sizes_0", "sizes_1", "label_0", "num_example_per_prompt"):
    np.testing.assert_array_equal(batch[name], expected[name], strict=True)
  assert len(np.unique(batch["sizes_0"], axis=0)) > 1
  assert {v.dtype for k, v in batch.items() if k.startswith(("moments", "enc", "text"))} == {np.dtype("float16")}


@pytest.mark.slow
def test_sdxl_takes_the_same_steps_at_each_images_size(tmp_path):
  c = sdxl()
  assert precompute.run(c, tmp_path / "xl", **OPTIONS)
  losses, first, last = steps(c, 3)
  found, _, found_last = steps(trained_on(c, tmp_path / "xl"), 3)
  assert abs(losses[-1] - np.log(2)) > 0.01
  np.testing.assert_allclose(found, losses, rtol=1e-3)
  assert distance(found_last, last) < 0.05 * distance(first, last)


def test_images_whose_sides_differ_are_the_same_precomputed(tmp_path):
  c = recipe("sdxl-miniature", image_size=(16, 24))
  assert precompute.run(c, tmp_path / "wide", **OPTIONS)
  trained = trained_on(c, tmp_path / "wide")
  assert latents.open_folder(tmp_path / "wide").manifest["image_size"] == [16, 24]
  found, whole = next(build.build(trained).batches()), build.build(c)
  batch = next(whole.batches())
  moments = jax.jit(functools.partial(inputs.stored_moments, whole.model))(whole.frozen, batch["pixels_1"])
  assert batch["pixels_1"].shape == (4, 16, 24, 3) and found["moments_1"].shape == moments.shape
  np.testing.assert_allclose(found["moments_1"], moments, atol=2e-2)
  np.testing.assert_array_equal(found["sizes_1"], batch["sizes_1"])
  assert (found["sizes_1"][:, 4:] == (16, 24)).all()
  for size in (None, (24, 16)):
    trained.image_size = c.image_size = size
    with pytest.raises(ValueError, match="is of images of 16 x 24 pixels, random:sdxl-miniature wants (16|24) x 16"):
      build.build(trained).batches()
    with pytest.raises(ValueError, match=r"was begun with config.image_size=\[16, 24\], now it is"):
      precompute.run(c, tmp_path / "wide", **OPTIONS)


def test_a_latent_reward_model_takes_the_tokens_of_a_folder(folder):
  """It trains its own text encoder, and loads no other network."""
  c = recipe(objective="lrm")
  of_folder = build.build(trained_on(c, folder))
  batch, expected = next(of_folder.batches()), next(build.build(c).batches())
  for name in ("input_ids", "label_0", "num_example_per_prompt"):
    np.testing.assert_array_equal(batch[name], expected[name], strict=True)
  assert set(of_folder.frozen) == {"empty_ids"} and not {"encoder_hidden_states", "pixels_0"} & set(batch)


@pytest.mark.slow
def test_a_latent_reward_model_takes_the_same_steps(folder):
  c = recipe(objective="lrm")
  losses, first, last = steps(c, 2)
  found, _, found_last = steps(trained_on(c, folder), 2)
  np.testing.assert_allclose(found, losses, rtol=1e-2)
  assert distance(found_last, last) < 0.05 * distance(first, last)


class Encoder(StubModel):
  """A stub whose latents are drawn, from a mean and a variance."""

  def encode_moments(self, weights, images):
    mean = super().encode_images(weights, images, None)
    return mean, mean - 2.0

  def draw_latents(self, mean, logvar, key):
    return mean + jax.numpy.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)

  def encode_images(self, weights, images, key):
    return self.draw_latents(*self.encode_moments(weights, images), key)


@pytest.mark.parametrize("name", ["denoise", "dpo", "kto"])
def test_each_objective_and_its_divergence_take_either(name):
  """Pixels and ids, or what was computed of them; here without rounding."""
  model, weights, other = Encoder(), init(), init(seed=1)
  objective = {
    "denoise": lambda: pretraining.Denoising(model),
    "dpo": lambda: pairs.DiffusionDPO(model, pairs.denoised_loss("sigmoid", beta=10.0)),
    "kto": lambda: kto.DiffusionKTO(model, beta=10.0),
  }[name]()
  batch = jax.tree.map(jax.numpy.asarray, pair_batch(9))
  sides = ("_0", "_1") if name == "dpo" else ("",)
  if name != "dpo":
    batch |= {"pixels": batch["pixels_0"], "label": jax.numpy.arange(9.0) % 2}
  encoded = {k: v for k, v in batch.items() if not k.startswith(("pixels", "input_ids"))}
  for side in sides:
    encoded[f"moments{side}"] = jax.numpy.concatenate(model.encode_moments(weights, batch[f"pixels{side}"]), -1)
  encoded |= model.encode_text(weights, batch["input_ids"])

  def run(batch, weights):
    params, ref_params = {"unet": other["unet"]}, {"unet": weights["unet"]}
    loss = objective.loss(Weights.of(params, ref_params, weights), batch, jax.random.key(3))
    moved = Weights.of({}, params, weights, moves=True)
    return loss, None if name == "denoise" else objective.divergence(moved, batch, jax.random.key(4))

  found, expected = jax.jit(lambda: (run(encoded, {"unet": weights["unet"]}), run(batch, weights)))()
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), found, expected)


def test_neither_vae_nor_text_encoder_is_loaded_and_the_export_has_both(folder, tmp_path):
  c = trained_on(recipe(), folder)
  experiment = build.build(c)
  assert experiment.params.keys() == {"unet"} and experiment.frozen.keys() == {"empty_ids"}
  experiment.export(experiment.params, tmp_path / "export")
  found, expected = pipelines.load_pipeline(tmp_path / "export").params, drawn("sd15-miniature", 0).params
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float16(b)), found, expected)
  # Where pictures are drawn on the way, they are there.
  c.sample.every = 5
  assert {"vae", "text_encoder"} <= build.build(c).frozen.keys()


def test_networks_that_are_not_asked_for_need_no_weights(tmp_path):
  folder = pipelines.save_pipeline(tmp_path / "model", drawn("sdxl-miniature", 0))
  for name in ("vae", "text_encoder", "text_encoder_2"):
    (file,) = (folder / name).glob("*.safetensors")
    file.unlink()
  pipe = loading.load_text_to_image(str(folder), dtype="float32", vae_model="none/such", components=("unet",))
  assert pipe.params.keys() == {"unet"} and pipe.text_encoder_2 is not None
  with pytest.raises(FileNotFoundError, match="vae"):
    pipelines.load_pipeline(folder)


def test_single_images_are_precomputed(tmp_path, monkeypatch):
  """Those of denoising; here a few of the embedded ones."""
  images = pipeline.emoji_images(SIZE, split="validation", styles=("noto",))[:9]
  monkeypatch.setattr(pipeline, "emoji_images", lambda *_, **__: images)
  c = recipe(objective="denoise", data__split="validation")
  assert precompute.run(c, tmp_path / "images", **OPTIONS)
  batch, expected = next(build.build(trained_on(c, tmp_path / "images")).batches()), next(build.build(c).batches())
  pipe = drawn("sd15-miniature", 0)
  mean, logvar = jax.jit(loading.text_to_image(pipe).encode_moments)(pipe.params, expected["pixels"])
  np.testing.assert_allclose(batch["moments"], np.concatenate([mean, logvar], -1), rtol=1e-2, atol=1e-3)
  np.testing.assert_array_equal(batch["class_id"], expected["class_id"])


# ---------------------------------------------------------------------------------------------
# The command


def test_a_killed_run_continues_to_the_same_bytes(folder, tmp_path, monkeypatch):
  """Killed in the second file, which leaves a part of it; whole files are not made again."""
  write_file, written = latents.write_file, []

  def killed(folder, name, records, **kwargs):
    written.append(name)
    if len(written) == 2:
      records = (r if i < 2 else (_ for _ in ()).throw(KeyboardInterrupt) for i, r in enumerate(records))
    write_file(folder, name, records, **kwargs)

  monkeypatch.setattr(latents, "write_file", killed)
  with pytest.raises(KeyboardInterrupt):
    precompute.run(recipe(), tmp_path / "data", **OPTIONS)
  assert [p.name for p in (tmp_path / "data").glob(".*.part")] == [f".{written[1]}.0.part"]
  with pytest.raises(FileNotFoundError, match="is not finished"):
    build.build(trained_on(recipe(), tmp_path / "data"))
  written[:] = [""] * 2
  assert precompute.run(recipe(), tmp_path / "data", **OPTIONS)
  assert [name[:10] for name in written[2:]] == ["rows-00001", "rows-00002", "prompts-00"]
  assert files(tmp_path / "data") == files(folder)
  assert latents.open_folder(folder).manifest["skipped"] == ["'pair 4'"]


def test_two_processes_make_the_files_of_one(folder, tmp_path, capsys):
  share = functools.partial(precompute.run, recipe(), tmp_path / "data", process_count=2, **OPTIONS)
  assert not share(process_index=1)
  assert "2 files of other processes are not finished" in capsys.readouterr().err
  assert share(process_index=0)
  assert files(tmp_path / "data") == files(folder)


def test_a_folder_that_another_process_writes_is_refused_until_that_process_is_gone(folder, tmp_path, capsys):
  with occupied(tmp_path / "data") as sentence, pytest.raises(OSError, match=re.escape(sentence)):
    precompute.run(recipe(), tmp_path / "data", **OPTIONS)
  assert [path.name for path in (tmp_path / "data").iterdir()] == [lease.NAME]
  assert precompute.run(recipe(), tmp_path / "data", **OPTIONS)
  assert "that process is gone" in capsys.readouterr().err
  assert files(tmp_path / "data") == files(folder)
  with occupied(tmp_path / "data"):  # to read it is nobody's concern
    assert precompute.run(recipe(), tmp_path / "data", **OPTIONS) and precompute.verify(tmp_path / "data") == []


def test_a_share_of_a_folder_has_one_writer(tmp_path):
  share = functools.partial(precompute.run, recipe(), tmp_path / "data", process_count=2, **OPTIONS)
  with occupied(tmp_path / "data", "writer_lock_1.json") as sentence:
    with pytest.raises(OSError, match=re.escape(sentence)):
      share(process_index=1)
    assert not share(process_index=0)


def test_a_bucket_that_another_process_writes_is_refused(served):
  (served / "made").mkdir()
  with occupied(served / "made"), pytest.raises(OSError, match="gs://bucket/made is being written by process"):
    precompute.run(recipe(), "gs://bucket/made", **OPTIONS)


def test_a_finished_folder_is_left_alone_and_a_missing_file_is_made_again(folder, monkeypatch):
  before = files(folder)
  name = latents.file_name("rows", 1, 3)
  (folder / name).unlink()
  assert precompute.run(recipe(), folder, **OPTIONS)
  assert files(folder) == before
  monkeypatch.setattr(loading, "load_text_to_image", None)  # nothing is loaded
  assert precompute.run(recipe(), folder, **OPTIONS)
  assert precompute.verify(folder) == []


@pytest.mark.parametrize("field", ["label_0", "caption", "image_0"])
def test_a_finished_folder_of_other_data_is_refused(folder, monkeypatch, field):
  before = files(folder)
  other = {"label_0": 0.0, "caption": "another", "image_0": picture(99, 16, 20)}[field]
  changed = [RECORDS[0] | {field: other}, *RECORDS[1:]]
  source = sources.Indexed(changed, sources.index_of_records(changed))
  monkeypatch.setattr(inputs, "open_pairs", lambda config: source)
  with pytest.raises(ValueError, match="was begun with other data than config.data.path has now .*choose another"):
    precompute.run(recipe(), folder, **OPTIONS)
  assert files(folder) == before


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"dtype": "bfloat16"}, "begun with config.dtype='float32', now it is 'bfloat16'; choose another folder"),
    ({"data__flip": False}, "begun with config.data.flip=True, now it is False"),
    ({"seed": 1}, "begun with config.seed=0, now it is 1"),
    ({"objective": "denoise"}, "begun with kind='pairs', now it is 'images'"),
    (
      {"objective": "spo", "preference_model": "x", "data__caption_dropout": 0.0, "data__flip": False},
      "objective='spo' needs the VAE while it trains",
    ),
    (
      {"objective": "spm", "preference_model": "x"},
      "objective='spm' needs the VAE while it trains, so nothing can be precomputed for it",
    ),
    ({"data__source": "precomputed", "data__path": "x"}, "is what this command makes; set the source of the images"),
  ],
)
def test_what_cannot_be_precomputed_into_a_folder(folder, fields, sentence):
  before = files(folder)
  with pytest.raises(ValueError, match=sentence):
    precompute.run(recipe(**fields), folder, **OPTIONS)
  assert files(folder) == before


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"model": "random:sdxl-miniature"}, "with config.model='random:sd15-miniature', expected 'random:sdxl-miniature'"),
    ({"seed": 1}, "was precomputed with config.seed=0, expected 1 as in this config"),
    ({"data__split": "test"}, "was precomputed with config.data.split='train', expected 'test'"),
    ({"data__ties": "keep"}, "was precomputed with config.data.ties='drop', expected 'keep'"),
    ({"objective": "denoise"}, "holds pairs, expected images for config.objective='denoise'"),
    ({"objective": "spm"}, "data.source='precomputed'; expected another source for objective spm: this one is for dpo"),
    ({"objective": "spo", "preference_model": "x"}, "data.source='precomputed'; expected another source"),
    ({"data__path": None}, "data.path=None; expected the folder that python -m jaxpref.precompute wrote"),
    ({"objective": "denoise", "train_text_encoder": True}, "train_text_encoder=True; expected False"),
  ],
)
def test_what_cannot_be_trained_on_a_folder(folder, fields, sentence):
  c = trained_on(recipe(), folder)
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  with pytest.raises(ValueError, match=sentence):
    config.check(c)
    build.build(c)


def test_a_folder_of_other_sizes_or_without_mirrored_images_is_refused(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(latents, "open_folder", lambda path: dataclasses.replace(data, manifest=data.manifest | change))
  data, change = latents_open(folder), {"image_size": 32}
  with pytest.raises(
    ValueError, match="is of images of 32 x 32 pixels, random:sd15-miniature wants 16 x 16; set config.im"
  ):
    build.build(trained_on(recipe(), folder)).batches()
  change = {"config": data.manifest["config"] | {"data.flip": False}}
  with pytest.raises(ValueError, match=r"was precomputed with config.data.flip=False, expected True"):
    build.build(trained_on(recipe(), folder))
  build.build(trained_on(recipe(data__flip=False), folder)).batches()  # it has both


latents_open = latents.open_folder


@pytest.fixture
def model(tmp_path):
  """A model in a folder, and how to train a component of it a little, without a change of names or sizes."""
  folder = pipelines.save_pipeline(tmp_path / "model", drawn("sd15-miniature", 0))

  def train_a_little(name):
    (file,) = (folder / name).glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    key = max(tensors, key=lambda k: tensors[k].size)
    safetensors.numpy.save_file(tensors | {key: tensors[key] * np.float32(1.001)}, file)

  return folder, train_a_little


def test_fingerprints_are_those_of_the_weights(model):
  folder, _ = model
  c = recipe()
  c.model = str(folder)
  found = inputs.encoder_fingerprints(c)
  assert found.keys() == {"vae", "text_encoder"} and len(set(found.values())) == 2
  assert inputs.encoder_fingerprints(recipe()) == {}  # what is drawn at random follows from name and seed


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_other_weights_under_the_same_name_are_refused(model, tmp_path, name):
  folder, train_a_little = model
  c, out = recipe(), tmp_path / "out"
  c.model = str(folder)
  made = inputs.encoder_fingerprints(c)
  assert precompute.run(c, out, **OPTIONS)
  assert latents.open_folder(out).manifest["weights"] == made
  build.build(trained_on(c, out))
  shutil.copytree(folder, tmp_path / "same")
  shutil.rmtree(folder)
  (tmp_path / "same").rename(folder)
  train_a_little("unet")  # which plays no part in it, nor does the time of a file
  build.build(trained_on(c, out))
  train_a_little(name)
  assert {k for k, v in inputs.encoder_fingerprints(c).items() if v != made[k]} == {name}
  with pytest.raises(ValueError, match=f"precomputed with other weights of the {name} than config.model=.* have now"):
    build.build(trained_on(c, out))
  before = files(out)
  (out / "manifest.json").unlink()
  with pytest.raises(ValueError, match=f"was begun with other weights of the {name}, though of the same name; choose"):
    precompute.run(c, out, **OPTIONS)
  assert files(out) == {k: v for k, v in before.items() if k != "manifest.json"}


def test_another_vae_is_told_by_its_weights(model):
  folder, train_a_little = model
  c = recipe(vae_model=str(folder / "vae"))
  before = inputs.encoder_fingerprints(c)
  assert before.keys() == {"vae"}
  train_a_little("vae")
  assert inputs.encoder_fingerprints(c) != before


def test_numbers_beyond_float16_are_refused(tmp_path, monkeypatch):
  encode = StableDiffusion.encode_moments
  monkeypatch.setattr(StableDiffusion, "encode_moments", lambda *args: jax.tree.map(lambda x: x * 1e9, encode(*args)))
  with pytest.raises(ValueError, match=r"row 0 of the data: the VAE makes no finite float16 latents of pixels_0; set"):
    precompute.run(recipe(), tmp_path / "data", **OPTIONS)


@pytest.mark.parametrize("size", [1000, 9000])
def test_a_full_disk_ends_the_command_in_one_sentence(folder, tmp_path, monkeypatch, size):
  """In the plan, or in a file of rows; the same command continues where there is space."""
  out = tmp_path / "data"
  with largest_file(size), pytest.raises(OSError, match=rf"{out}/.* cannot be written \(.*\); free some space or"):
    precompute.run(recipe(), out, **OPTIONS)
  assert not precompute.is_complete(out)
  assert precompute.run(recipe(), out, **OPTIONS)
  assert files(out) == files(folder)


def test_a_folder_in_a_bucket(folder, served):
  """Written there, continued there, and trained on from there; the bytes of a folder of this machine."""
  assert precompute.run(recipe(), "gs://bucket/made", **OPTIONS)
  assert files(served / "made") == files(folder)
  (served / "made" / latents.file_name("rows", 1, 3)).unlink()
  assert precompute.run(recipe(), "gs://bucket/made", **OPTIONS)
  assert files(served / "made") == files(folder) and precompute.verify("gs://bucket/made") == []
  batches = [next(build.build(trained_on(recipe(), at)).batches()) for at in ("gs://bucket/made", folder)]
  jax.tree.map(np.testing.assert_array_equal, *batches)
  with pytest.raises(ValueError, match="s3://bucket/made(: ArrayRecord| cannot be reached without the package s3fs)"):
    precompute.run(recipe(), "s3://bucket/made", **OPTIONS)


def test_the_command_ends_in_one_sentence(folder):
  content = (folder / "prompts.safetensors").read_bytes()
  (folder / "prompts.safetensors").write_bytes(content[:-1] + b"x")
  command = [sys.executable, "-m", "jaxpref.precompute", "--verify", f"--out={folder}"]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  (folder / "prompts.safetensors").write_bytes(content)
  assert result.returncode == 1
  assert "error: " in result.stderr and "its content has changed since it was written" in result.stderr
  assert "Traceback" not in result.stderr
