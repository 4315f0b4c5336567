"""Images whose height and width differ, from a recipe's field to pictures, data, batches, rewards and plans.

Height and width are different everywhere, so that an exchange of the two shows.
"""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from jaxpref import config as config_lib
from jaxpref import evaluate, export
from jaxpref.data import pipeline, records
from jaxpref.devices import sharding
from jaxpref.evaluation import settings
from jaxpref.files import family, loading, pipelines
from jaxpref.models import preference, presets
from jaxpref.models.vae import VAEConfig
from jaxpref.planning import flops, plan
from jaxpref.recipes import sizes
from jaxpref.rewards import networks, published
from jaxpref.training import build, checkpoint, loop, optim, programs
from tests.small_presets import with_one_attention

pytestmark = pytest.mark.usefixtures("one_device")

SIZE = HEIGHT, WIDTH = 16, 24
LATENT = HEIGHT // 2, WIDTH // 2, 4
MESH = sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def small_networks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(presets.PRESETS, "one-level", with_one_attention(presets.ONE_LEVEL))
    yield


def recipe(objective="dpo", **fields):
  c = config_lib.default()
  c.update(objective=objective, model="random:one-level", image_size=SIZE, batch_size=2)
  c.data.update(num_threads=0, split="validation")
  c.evaluation.num_prompts = 0
  c.spo.update(num_inference_steps=4, warmup_steps=1, pool_size=2, minibatch=2, threshold=0.0)
  c.grpo.update(num_inference_steps=2, group_size=2, minibatch=2)
  if objective in ("spo", "grpo", "spm"):
    c.preference_model = "random:one-level"
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  config_lib.check(c)
  return c


def step_of(c, experiment, batch):
  """A training step as JAX's text, which has the shape of each array."""
  optimizer = optim.make_optimizer("sgd", 1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
  state = jax.eval_shape(programs.state_initializer(experiment, optimizer), experiment.params)
  return str(jax.make_jaxpr(programs.make_step(c, experiment, optimizer, MESH))(state, experiment.frozen, batch))


# ---- The field -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "expected"), [("64", 64), ("64,32", (64, 32)), ("(64, 32)", (64, 32)), ("[64,32]", (64, 32)), ("None", None)]
)
def test_a_command_line_says_a_side_or_both(text, expected, monkeypatch):
  values = flags.FlagValues()
  monkeypatch.setattr("sys.argv", ["main", f"--config.image_size={text}"])  # where the fields of a config are found
  config_flags.DEFINE_config_dict("config", config_lib.default(), flag_values=values)
  values(["main", f"--config.image_size={text}"])
  c = config_lib.typed(values.config)
  config_lib.check(c)
  assert c.image_size == expected
  again = config_lib.default()
  again.update(json.loads(json.dumps(c.to_dict())))  # a work folder's config.json
  assert config_lib.typed(again).image_size == c.image_size


@pytest.mark.parametrize("value", ["64x32", 64.0, (64,), (64, 32, 16), (64, 0), (64, 2**15), -64, True, (64, "32")])
def test_a_size_that_is_none_is_refused(value):
  with pytest.raises(ValueError, match=r"^config\.image_size=.*; expected [^\n]*$"):
    recipe(image_size=value)


@pytest.mark.parametrize("objective", ["contrastive", "classify"])
def test_networks_of_one_size_have_no_other(objective):
  with pytest.raises(ValueError, match="config.image_size=.*; expected None for .*: its network takes squares"):
    recipe(objective)


def test_a_run_keeps_its_size_and_an_old_one_has_none(tmp_path):
  checkpoint.claim_workdir(tmp_path / "new", config_lib.typed(recipe()).to_dict())
  checkpoint.check_workdir(tmp_path / "new", config_lib.typed(recipe()).to_dict())
  with pytest.raises(ValueError, match=r"config.image_size is \[16, 24\] there and \[24, 16\] now"):
    checkpoint.check_workdir(tmp_path / "new", config_lib.typed(recipe(image_size=(24, 16))).to_dict())
  old = config_lib.typed(recipe(image_size=None)).to_dict()
  checkpoint.claim_workdir(tmp_path / "old", {k: v for k, v in old.items() if k != "image_size"})
  checkpoint.check_workdir(tmp_path / "old", old, usual=config_lib.default().to_dict())


@pytest.mark.parametrize("objective", ["dpo", "spm", "grpo", "autoencode"])
def test_a_size_that_the_vae_cannot_halve_is_refused_before_weights_are_made(objective, monkeypatch):
  made = []
  monkeypatch.setattr(presets, "init_params", lambda module, key: made.append(module))
  with pytest.raises(ValueError, match=r"^config.image_size=\(16, 25\): images of 16 x 25 pixels, expected multiples"):
    build.build(recipe(objective, image_size=(16, 25)))
  assert not made


def test_a_family_whose_models_have_one_size_is_named(monkeypatch):
  monkeypatch.delattr("jaxpref.models.stable_diffusion.StableDiffusion.at_size")
  with pytest.raises(ValueError, match=r"expected None, as the models of config.family=.* have no at_size"):
    build.build(recipe())


# ---- Data ----------------------------------------------------------------------------------------------------------


def gradient(height, width):
  """Red is the row, green the column."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0], image[..., 1] = np.arange(height)[:, None], np.arange(width)
  return image


@pytest.mark.parametrize(
  ("height", "width", "size", "box", "framing"),
  [  # box: top, left, bottom, right; framing: top, left, right in pixels of the resized image
    (40, 60, (16, 24), (0, 0, 40, 60), (0, 0, 0)),
    (40, 100, (16, 24), (0, 20, 40, 80), (0, 8, 8)),
    (100, 60, (16, 24), (30, 0, 70, 60), (12, 0, 0)),
    (40, 60, (24, 16), (0, 16, 40, 43), (0, 9, 10)),  # 26.7 columns are 27, with 16 and 17 beside them
    (60, 40, (8, 24), (23, 0, 36, 40), (14, 0, 0)),  # 13.3 rows are 13
    (16, 24, (16, 24), (0, 0, 16, 24), (0, 0, 0)),
    (24, 24, (16, 24), (4, 0, 20, 24), (4, 0, 0)),  # only cropped
    (3, 5, (16, 24), (0, 0, 3, 5), (0, 0, 0)),  # enlarged: 4.5 columns are 5
  ],
)
def test_a_crop_has_the_shape_of_the_size(height, width, size, box, framing):
  image = gradient(height, width)
  found, framed = records.decode(image, size)
  top, left, bottom, right = box
  expected = Image.fromarray(image[top:bottom, left:right]).resize((size[1], size[0]), Image.Resampling.LANCZOS)
  inner = (slice(2, -2), slice(2, -2))  # what lies beside the box reaches over its edge by the filter's width
  assert found.shape == (*size, 3)
  assert np.abs(found[inner].astype(int) - np.asarray(expected)[inner]).max() <= 1
  assert framed == (height, width, *framing) == records.framing_of(height, width, size)
  conditioned = records.sizes(framed, size, flip=True)
  np.testing.assert_array_equal(conditioned, [height, width, framing[0], framing[2], *size])


def test_random_crops_lie_everywhere_and_say_where():
  source = [{"image": gradient(HEIGHT + 5, WIDTH)} for _ in range(8)] + [{"image": gradient(HEIGHT, WIDTH + 7)}] * 8
  batches = pipeline.image_batches(source, batch_size=16, image_size=SIZE, seed=0, random_crop=True, flip=True)
  tops, lefts = set(), set()
  for _ in range(8):
    batch = next(batches)
    assert batch["pixels"].shape == (16, *SIZE, 3)
    first, last = (batch["pixels"][:, 0, x, 1].astype(int) for x in (0, -1))
    left = np.where(last < first, batch["sizes"][:, 1] - 1 - first, first)  # in the mirrored original
    expected = np.stack([batch["pixels"][:, 0, 0, 0], left], axis=1)
    np.testing.assert_array_equal(batch["sizes"][:, 2:4], expected)
    np.testing.assert_array_equal(batch["sizes"][:, 4:], np.broadcast_to(SIZE, (16, 2)))
    tops |= set(batch["sizes"][:, 2])
    lefts |= set(batch["sizes"][:, 3])
  batches.close()
  assert tops == set(range(6)) and lefts == set(range(8))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(8, 32), (32, 8)])
def test_large_jpegs_are_decoded_smaller_by_their_upright_shape(orientation, size):
  upright = np.kron(np.random.default_rng(0).integers(0, 256, (4, 5, 3)), np.ones((20, 20, 1))).astype(np.uint8)
  stored = upright if orientation == 1 else np.rot90(upright)
  exif, file = Image.Exif(), io.BytesIO()
  exif[0x0112] = orientation
  Image.fromarray(np.ascontiguousarray(stored)).save(file, "JPEG", quality=95, subsampling=0, exif=exif)
  found, framing = records.decode(file.getvalue(), size)
  expected, of_pixels = records.decode(upright, size)
  assert framing == of_pixels and framing[:2] == (80, 100)
  assert np.abs(found.astype(int) - expected).mean() < 6
  _, _, reduced = records._open(file.getvalue(), at_least=size)
  assert reduced == {(8, 32): 2, (32, 8): 2}[size]  # 100 columns hold 32 three times, 80 rows hold 32 twice


def test_tiles_are_cropped_and_keep_their_colours():
  small = pipeline.emoji_images((24, 48), split="validation", styles=("noto",))
  whole = pipeline.emoji_images(48, split="validation", styles=("noto",))
  assert small[0]["image"].shape == (24, 48, 3)
  for a, b in zip(small[:20], whole, strict=False):
    assert np.abs(a["image"][2:-2].astype(int) - b["image"][14:-14]).mean() < 2


# ---- Drawing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model whose latents are 8 x 12, as its config.json says."""
  preset = presets.get_preset("one-level")
  unet = dataclasses.replace(preset.unet, sample_size=LATENT[:2])
  pipe = pipelines.random_pipeline(dataclasses.replace(preset, unet=unet), 3)
  return pipelines.save_pipeline(tmp_path_factory.mktemp("sized") / "model", pipe)


@pytest.mark.parametrize("size", [[8], [8, 12, 16], [8, 0], "8", 8.5])
def test_a_sample_size_that_is_none_is_refused(folder, tmp_path, size):
  config = json.loads((folder / "unet" / "config.json").read_text()) | {"sample_size": size}
  with pytest.raises(ValueError, match=r"sample_size=.*, expected the side of square latents, or \[height, width\]"):
    type(pipelines.load_pipeline(folder, components=()).unet.config).from_dict(config)


def test_a_vae_says_a_pair_too():
  config = VAEConfig.from_dict(VAEConfig().to_dict() | {"sample_size": [32, 48]})
  assert config.sample_size == (32, 48) and config.to_dict()["sample_size"] == [32, 48]


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [([], [16, 24]), (["--height=8"], [8, 24]), (["--width=8"], [16, 8]), (["--height=8", "--width=12"], [8, 12])],
)
def test_commands_take_the_other_side_from_the_model(folder, arguments, expected):
  args = evaluate.make_parser().parse_args(["--models", f"a={folder}", "--prompts=emoji", *arguments])
  assert evaluate.check_sizes(evaluate.parse_models(args.models), args) == {"a": expected}


def test_a_run_is_evaluated_at_its_size(tmp_path):
  c = recipe(evaluation__scorers="judge", evaluation__num_prompts=2)
  args = evaluate.arguments_of_run(config_lib.typed(c), str(tmp_path))
  assert (args.height, args.width) == SIZE
  c.image_size = None
  args = evaluate.arguments_of_run(config_lib.typed(c), str(tmp_path))
  assert (args.height, args.width) == (None, None)


def sample_size(folder):
  return json.loads((folder / "unet" / "config.json").read_text())["sample_size"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of one step at 16 x 24, whose model alone draws 16 x 16."""
  folder = tmp_path_factory.mktemp("trained") / "run"
  config = recipe(num_steps=1, sample__every=0, batch_size=8)
  config.judge = None
  loop.run(config, str(folder))
  return folder


def test_an_export_draws_what_the_run_was_trained_at(run, tmp_path):
  assert sample_size(run / "export") == list(LATENT[:2])
  export.export(run, "pipeline", tmp_path / "later")
  assert sample_size(tmp_path / "later") == list(LATENT[:2])
  args = evaluate.make_parser().parse_args(["--models", "a=a", "--prompts=emoji"])
  for name in (run, run / "export", tmp_path / "later"):
    assert settings.check_size(str(name), args) == SIZE
  continued = recipe(model=str(tmp_path / "later"), image_size=None)
  assert build.build(continued).model.image_size == SIZE


def test_a_square_export_has_one_number(tmp_path):
  pipe = pipelines.random_pipeline("one-level", 3).at_size(32, 32)
  assert sample_size(pipelines.save_pipeline(tmp_path / "model", pipe)) == 16


def test_sdxl_keeps_its_own_size_where_the_pipeline_of_diffusers_reads_an_int():
  pipe = pipelines.random_pipeline("sdxl-miniature", components=())
  assert pipe.at_size(*SIZE).unet.config.sample_size == pipe.unet.config.sample_size
  assert pipe.at_size(32, 32).unet.config.sample_size == 16


def test_a_run_that_was_exported_before_is_drawn_at_its_size(folder, tmp_path):
  small = pipelines.save_pipeline(tmp_path / "run" / "export", pipelines.random_pipeline("one-level", 3))
  config = config_lib.typed(recipe(image_size=(32, 48))).to_dict()
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  args = evaluate.make_parser().parse_args(["--models", "a=a", "--prompts=emoji"])
  assert settings.check_size(str(small), args) == settings.check_size(str(tmp_path / "run"), args) == (32, 48)
  of_clip = {"image_size": 48, "model_type": "clip"}
  (tmp_path / "run" / "config.json").write_text(json.dumps(of_clip))
  assert settings.check_size(str(small), args) == (16, 16)
  assert settings.check_size(str(folder), args) == SIZE


def test_a_run_and_its_base_model_are_compared_at_one_size(run, folder, capsys):
  def sizes_of(*arguments):
    args = evaluate.make_parser().parse_args(["--prompts=emoji", *arguments])
    return evaluate.check_sizes(evaluate.parse_models(args.models), args), (args.height, args.width)

  both = ["--models", "base=random:one-level", f"aligned={run}"]
  assert sizes_of(*both) == ({"base": list(SIZE), "aligned": list(SIZE)}, SIZE)
  assert capsys.readouterr().err == "all models draw 16 x 24 pixels, which aligned was trained at\n"
  assert sizes_of(*both, "--height=8", "--width=8")[0] == {"base": [8, 8], "aligned": [8, 8]}
  assert sizes_of(*both[:1], f"again={run}", f"aligned={run}") == ({"again": [*SIZE], "aligned": [*SIZE]}, (None, None))
  with pytest.raises(ValueError, match="base draws 16 x 16 pixels and other 16 x 24; set --height and --width"):
    sizes_of("--models", "base=random:one-level", f"other={folder}")  # which is no run


def test_sdxl_is_told_height_before_width():
  encoders = ("text_encoder", "text_encoder_2")
  pipe = pipelines.random_pipeline("sdxl-miniature", components=())
  model = loading.text_to_image(pipe).at_size(*SIZE)

  @jax.jit
  def time_ids():
    weights = loading.load_text_to_image("zeros:sdxl-miniature", dtype="float32", components=encoders).params
    return model.encode_text(weights, jnp.zeros((1, 32), jnp.int32))["added_cond_kwargs"]["time_ids"]

  np.testing.assert_array_equal(time_ids(), [[*SIZE, 0, 0, *SIZE]])


def test_smaller_images_keep_their_shape():
  model = loading.text_to_image(pipelines.random_pipeline("one-level", components=())).at_size(*SIZE)
  weights = {"vae": presets.abstract_params(model.vae)}
  latents = jnp.zeros((3, *LATENT))
  shape = lambda size: jax.eval_shape(lambda w, z: model.decode(w, z, size=size), weights, latents).shape
  assert shape(0) == (3, *SIZE, 3) and shape(8) == (3, 8, 12, 3)
  for size in (6, 20):
    with pytest.raises(ValueError, match=f"spm.decode_size={size}; expected 0 .* or a multiple of 4 up to 16, the"):
      build._check_decode_size(config_lib.typed(recipe("spm", spm__decode_size=size)), model)
  build._check_decode_size(config_lib.typed(recipe("spm", spm__decode_size=12)), model)


# ---- Training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dpo", "kto", "denoise", "autoencode", "spm", "lrm"])
def test_offline_methods_train_on_the_size(objective):
  c = recipe(objective, spm__decode_size=8 if objective == "spm" else 0)
  experiment = build.build(c)
  batch = next(experiment.batches())
  pixels = [v for k, v in batch.items() if k.startswith("pixels")]
  assert pixels and all(p.shape == (2, *SIZE, 3) for p in pixels)
  assert all((v[:, 4:] == SIZE).all() for k, v in batch.items() if k.startswith("sizes"))
  if objective in ("dpo", "spm"):
    program = step_of(c, experiment, batch)
    assert f"2,{HEIGHT},{WIDTH},3]" in program or f"4,{HEIGHT},{WIDTH},3]" in program
    assert f"{WIDTH},{HEIGHT},3]" not in program


@pytest.mark.parametrize("objective", ["spo", "grpo"])
def test_online_methods_draw_the_size(objective):
  c = recipe(objective)
  experiment = build.build(c)
  program = step_of(c, experiment, next(experiment.batches()))
  assert f"{HEIGHT},{WIDTH},3]" in program and f"{WIDTH},{HEIGHT},3]" not in program


def test_a_step_takes_as_many_operations_as_its_latents_are_large():
  def operations(size):
    step, *arguments = plan.abstract_inputs(plan.without_weights(recipe("denoise", image_size=size)), MESH)
    assert arguments[2]["pixels"].shape == (2, *sizes.sides(size), 3)
    return flops.count(step, *arguments)

  assert 1.9 < operations((16, 32)) / operations(16) < 2.5


# ---- Rewards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (24, 37)])
def test_rewards_see_what_the_processor_of_clip_makes(shape):
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  image = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BOX))
  size = 24
  processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
  expected = processor(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
  level = 1 / 255 / np.array(preference.CLIP_STD)
  raw = np.asarray(networks.clip_pixels(jnp.asarray(image, jnp.float32)[None], size)) / 255
  for found in (
    (raw - np.array(preference.CLIP_MEAN)) / np.array(preference.CLIP_STD),
    preference.preprocess(jnp.asarray(image, jnp.float32)[None] / 127.5 - 1, size, antialias=True),
  ):
    difference = np.abs(np.asarray(found) - expected) / level
    assert difference.max() < 1.01 and (difference > 0.1).mean() < 0.02


def test_a_reward_in_the_graph_scores_as_the_evaluation_does():
  spec = "tiny-clip"
  tiles = [r["image"] for r in pipeline.emoji_images((40, 56), split="test", styles=("noto",))[:3]]
  prompts = ["red apple", "volcano", "red apple"]
  reward, params = published.load_reward(spec, dtype="float32", placement=None, preferred_style="noto")
  batch = {field: tokenize(prompts) for field, tokenize in reward.tokenizers.items()}
  weights = {reward.name: params}
  images = np.stack(tiles) / np.float32(127.5) - 1
  score = jax.jit(lambda w, x, b: reward.score(w, x, jnp.zeros(3, jnp.int32), reward.prompts(w, b)))
  found = score(weights, images, batch)
  expected = published.load(spec, preferred_style="noto").score(tiles, prompts)
  np.testing.assert_allclose(found, expected, atol=0.01 * np.ptp(expected))


def test_the_family_has_the_methods_that_are_asked_for():
  model = family.get("stable_diffusion").model(pipelines.random_pipeline("one-level", components=()))
  assert model.image_size == 16 and model.at_size(16, 24).image_size == (16, 24) and model.at_size(8, 8).image_size == 8
