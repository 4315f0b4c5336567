"""Folders as they are found: number types, shards, indices that lie, weights of another architecture."""

import json
import re
import shutil
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxpref.files import loading, pipelines, tensor_files
from jaxpref.models import clip, presets
from jaxpref.models.unet import UNet2DConditionModel
from jaxpref.models.vae import AutoencoderKL

TEXT = clip.CLIPTextConfig(
  vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
)


def draw(shapes):
  """Numbers that float16 and bfloat16 round differently, none of them 0 or 1."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.float32(0.1) * rng.standard_normal(x.shape, np.float32), shapes)


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def text():
  """Shapes and parameters of a text encoder."""
  shapes = presets.abstract_params(clip.CLIPTextModel(TEXT))
  return shapes, draw(shapes)


@pytest.fixture(scope="module")
def unet():
  """Shapes and parameters of a UNet whose transformers are two blocks deep."""
  shapes = presets.abstract_params(UNet2DConditionModel(presets.SDXL_MINIATURE.unet))
  return shapes, draw(shapes)


# ---- number types --------------------------------------------------------------------------------


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: f"to-{jnp.dtype(d).name}")
@pytest.mark.parametrize("file_dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
def test_every_type_of_file_as_every_type_of_parameter(text, tmp_path, file_dtype, param_dtype):
  shapes, params = text
  pipelines.save_tree(tmp_path / "model.safetensors", params, dtype=file_dtype)
  found = pipelines.load_tree(tmp_path / "model.safetensors", shapes, param_dtype=param_dtype)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(param_dtype)}
  rounded = jax.tree.map(lambda x: x.astype(file_dtype).astype(np.float32).astype(param_dtype), params)
  assert_same(found, rounded)


def test_types_may_differ_within_a_file(text, tmp_path):
  """As in folders of which only a part was converted to half precision."""
  shapes, params = text
  file = tmp_path / "model.safetensors"
  pipelines.save_tree(file, params)
  tensors = safetensors.numpy.load_file(file)
  types = dict(zip(tensors, [np.float16, np.float32, jnp.bfloat16] * len(tensors), strict=False))
  safetensors.numpy.save_file({k: v.astype(types[k]) for k, v in tensors.items()}, file)

  def rounded(path, x):
    name = pipelines.torch_name([key.key for key in path])
    return x.astype(types[name]).astype(np.float32)

  assert_same(pipelines.load_tree(file, shapes), jax.tree_util.tree_map_with_path(rounded, params))
  assert_same(
    pipelines.load_tree(file, shapes, param_dtype=jnp.float16),
    jax.tree.map(lambda x: x.astype(np.float16), jax.tree_util.tree_map_with_path(rounded, params)),
  )


def test_a_header_that_contradicts_the_bytes_is_refused(text, tmp_path):
  """Half-precision numbers under a header of single precision, and the other way round."""
  shapes, params = text
  file = tmp_path / "model.safetensors"
  for dtype, found, claimed in ((jnp.float16, b"F16", b"F32"), (jnp.float32, b"F32", b"F16")):
    pipelines.save_tree(file, params, dtype=dtype)
    content = file.read_bytes()
    file.write_bytes(content.replace(found, claimed, 1))
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file .*; download"):
      pipelines.load_tree(file, shapes)


def test_other_numbers_are_refused(text, tmp_path):
  """As quantised models hold them: read as numbers they would be nonsense."""
  shapes, params = text
  file = tmp_path / "model.safetensors"
  pipelines.save_tree(file, params)
  tensors = safetensors.numpy.load_file(file)
  key = "text_model.encoder.layers.0.mlp.fc1.weight"
  safetensors.numpy.save_file(tensors | {key: tensors[key].astype(np.int8)}, file)
  with pytest.raises(ValueError, match=rf"holds numbers of other types than F64, .*1 \({key} I8\); take"):
    pipelines.load_tree(file, shapes)


# ---- shards --------------------------------------------------------------------------------------

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write_shards(folder, params, count=3):
  """Deals the tensors out to `count` files, so that every stack of layers is torn apart."""
  pipelines.save_tree(folder / "all.safetensors", params)
  tensors = safetensors.numpy.load_file(folder / "all.safetensors")
  (folder / "all.safetensors").unlink()
  names = [f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  weight_map = {key: names[i % count] for i, key in enumerate(sorted(tensors))}
  for name in names:
    part = {key: value for key, value in tensors.items() if weight_map[key] == name}
    safetensors.numpy.save_file(part, folder / name)
  (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return names, weight_map


def load(folder, shapes, **options):
  return pipelines.load_tree(pipelines.weight_files(folder), shapes, **options)


def test_layers_of_a_stack_may_lie_in_several_shards(unet, tmp_path):
  shapes, params = unet
  names, weight_map = write_shards(tmp_path, params)
  blocks = {name for key, name in weight_map.items() if "transformer_blocks" in key}
  assert blocks == set(names)
  assert_same(load(tmp_path, shapes), params)


def test_an_index_may_name_the_wrong_shard(text, tmp_path):
  """What counts is where a tensor is."""
  shapes, params = text
  names, weight_map = write_shards(tmp_path, params)
  wrong = dict(zip(names, names[1:] + names[:1], strict=True))
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": {key: wrong[name] for key, name in weight_map.items()}}))
  assert_same(load(tmp_path, shapes), params)


def test_missing_and_incomplete_shards(text, tmp_path):
  shapes, params = text
  names, weight_map = write_shards(tmp_path, params)
  file = tmp_path / names[1]
  content = file.read_bytes()

  file.write_bytes(content[: len(content) // 2])  # a download that stopped
  with pytest.raises(ValueError, match=f"{names[1]} is not a readable safetensors file"):
    load(tmp_path, shapes)

  file.unlink()
  with pytest.raises(FileNotFoundError, match=f"{INDEX} names shards that are not there .{names[1]}.; download"):
    pipelines.weight_files(tmp_path)

  # An index that has forgotten a shard: the tensors in it are missing, whatever lies in the folder.
  file.write_bytes(content)
  kept = {key: name for key, name in weight_map.items() if name != names[1]}
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": kept}))
  lost = sorted(set(weight_map) - set(kept))
  with pytest.raises(ValueError, match=rf"\(2 shards\) does not hold .*missing {len(lost)} ") as error:
    load(tmp_path, shapes)
  assert all(key in str(error.value) for key in lost)


@pytest.mark.parametrize(
  "content", ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": {}}}']
)
def test_an_index_that_is_none(tmp_path, content):
  (tmp_path / INDEX).write_text(content)
  with pytest.raises(ValueError, match=f"{INDEX} is not an index of shards .*expected JSON with a weight_map") as error:
    pipelines.weight_files(tmp_path)
  assert "\n" not in str(error.value)


def test_a_tensor_in_two_shards_is_refused(text, tmp_path):
  """Nobody knows which one is meant."""
  shapes, params = text
  names, weight_map = write_shards(tmp_path, params)
  key = next(key for key, name in weight_map.items() if name == names[0])
  tensors = safetensors.numpy.load_file(tmp_path / names[2])
  copy = safetensors.numpy.load_file(tmp_path / names[0])[key]
  safetensors.numpy.save_file(tensors | {key: 2 * copy}, tmp_path / names[2])
  with pytest.raises(ValueError, match=f"{names[2]} holds {key}, which .*{names[0]} holds too"):
    load(tmp_path, shapes)


def test_one_file_goes_before_shards(text, tmp_path):
  shapes, params = text
  write_shards(tmp_path, draw(shapes))
  doubled = jax.tree.map(lambda x: 2 * x, params)
  pipelines.save_tree(tmp_path / "diffusion_pytorch_model.safetensors", doubled)
  assert_same(load(tmp_path, shapes), doubled)


# ---- pieces of arrays ----------------------------------------------------------------------------


def test_every_kind_of_array_is_spread_along_every_axis(unet, tmp_path):
  """Kernels of convolutions and of dense layers, biases, and stacks of them; over all devices."""
  shapes, params = unet
  write_shards(tmp_path, params)
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  for offset in range(2):

    def place(shape, offset=offset):
      """The last axes that divide, in turn: over 4 devices, over 2, over both."""
      spec = [None] * len(shape.shape)
      names = [("a", "b"), "b"] if offset else ["b", "a"]
      for axis in reversed(range(offset, len(shape.shape))):
        size = 8 if names and names[0] == ("a", "b") else 4
        if names and shape.shape[axis] % size == 0 and (names[0] != "b" or not offset):
          spec[axis] = names.pop(0)
      return jax.sharding.NamedSharding(mesh, jax.P(*spec))

    shardings = jax.tree.map(place, shapes)
    assert len({s.spec for s in jax.tree.leaves(shardings)}) > 4
    found = load(tmp_path, shapes, sharding=shardings)
    assert_same(found, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, found, shardings)))


@pytest.fixture
def bytes_read(monkeypatch):
  """A list that grows by the bytes of tensors that are read."""
  sizes = []
  original = tensor_files._Stored.read

  def read(self, shape, index, out):
    rows = index[0].stop - index[0].start if index else 1
    sizes.append(rows * int(np.prod(shape[1:])) * np.dtype(tensor_files._DTYPES[self.dtype]).itemsize)
    return original(self, shape, index, out)

  monkeypatch.setattr(tensor_files._Stored, "read", read)
  return sizes


def test_a_device_reads_what_it_takes(tmp_path, bytes_read):
  """A kernel that is split by its outputs is split by rows of the file; copies are read once."""
  params = {"a": {"kernel": np.arange(64 * 32, dtype=np.float32).reshape(64, 32)}}
  pipelines.save_tree(tmp_path / "model.safetensors", params)
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  for spec, times in ((("b", "a"), 4), ((None, ("a", "b")), 1), ((None, "a"), 1), ((None, None), 1)):
    bytes_read.clear()
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    found = pipelines.load_tree(tmp_path / "model.safetensors", params, sharding=sharding)
    assert_same(found, params)
    # Columns of the file cannot be read without their neighbours: 4 devices read the same rows.
    assert sum(bytes_read) == times * 64 * 32 * 4, spec


def test_the_host_holds_little_more_than_one_array(tmp_path):
  """1.2 of the largest array, whether it is a stack of layers or one large table."""
  stack = {"transformer_blocks": {"a": {"kernel": np.ones((4, 1024, 1024), np.float32)}}}
  table = {"token_embedding": {"embedding": np.ones((4096, 1024), np.float32)}}
  everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P(None, "x"))
  for params in (stack, table):
    (largest,) = (x.nbytes for x in jax.tree.leaves(params))
    pipelines.save_tree(tmp_path / "model.safetensors", params, dtype=jnp.float16)
    for sharding in (None, everywhere):
      tracemalloc.start()
      try:
        found = pipelines.load_tree(tmp_path / "model.safetensors", params, sharding=sharding)
        _, peak = tracemalloc.get_traced_memory()
      finally:
        tracemalloc.stop()
      assert_same(found, params)
      assert 0.4 * largest < peak < 1.2 * largest


# ---- another architecture ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
  """A folder of sd15-miniature; its weights are the same tensors as its config.json describes."""
  preset = presets.SD15_MINIATURE
  modules = {
    "unet": UNet2DConditionModel(preset.unet),
    "vae": AutoencoderKL(preset.vae),
    "text_encoder": clip.CLIPTextModel(preset.text_encoder),
  }
  pipe = pipelines.Pipeline(
    **modules,
    params={name: draw(presets.abstract_params(module)) for name, module in modules.items()},
    schedule=None,
    scheduler_config=dict(preset.scheduler),
    tokenizer=pipelines.tiny_tokenizer(),
  )
  return pipelines.save_pipeline(tmp_path_factory.mktemp("models") / "model", pipe)


@pytest.fixture
def folder(pipeline_folder, tmp_path):
  """A copy to damage."""
  return shutil.copytree(pipeline_folder, tmp_path / "model")


def edit(file, **fields):
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_text_encoder_of_another_width(folder):
  """The commonest mix-up: SD 1's UNet (768) beside SD 2's text encoder (1024)."""
  edit(folder / "unet" / "config.json", cross_attention_dim=32)
  with pytest.raises(ValueError) as error:
    pipelines.load_pipeline(folder)
  message = str(error.value)
  assert str(folder / "unet") in message and "config.json" in message and "\n" not in message
  assert "attn2.to_k.weight: found [16, 24], expected [16, 32]" in message
  assert "missing" not in message and "unexpected" not in message
  assert "describes: cross_attention_dim is 24 in the tensors, 32 in it; mis-shaped" in message


def test_more_layers_than_there_are(folder):
  edit(folder / "text_encoder" / "config.json", num_hidden_layers=3)
  sentence = r"describes: num_hidden_layers is 2 in the tensors, 3 in it; missing 16 \(.*encoder\.layers\.2\."
  with pytest.raises(ValueError, match=sentence) as error:
    pipelines.load_pipeline(folder)
  assert "mis-shaped" not in str(error.value)
  edit(folder / "text_encoder" / "config.json", num_hidden_layers=1)
  with pytest.raises(ValueError, match=r"unexpected 16 \(.*encoder\.layers\.1\."):
    pipelines.load_pipeline(folder)


def test_fields_that_the_tensors_contradict(folder):
  """The names of the fields lead the message, whichever component it is about."""
  for name, right, wrong in (
    ("unet", {"block_out_channels": [16, 32, 32]}, {"block_out_channels": [16, 32, 64]}),
    ("unet", {"in_channels": 4}, {"in_channels": 9}),
    ("vae", {"latent_channels": 4, "layers_per_block": 1}, {"latent_channels": 16, "layers_per_block": 2}),
    ("text_encoder", {"hidden_size": 24, "vocab_size": 2048}, {"hidden_size": 32, "vocab_size": 49408}),
  ):
    edit(folder / name / "config.json", **wrong)
    with pytest.raises(ValueError) as error:
      pipelines.load_pipeline(folder)
    said = str(error.value).partition("describes: ")[2].partition(";")[0]
    for field, value in wrong.items():
      found = right[field]
      as_python = [tuple(v) if isinstance(v, list) else v for v in (found, value)]
      assert f"{field} is {as_python[0]} in the tensors, {as_python[1]} in it" in said, said
    assert said.count(" in it") == len(wrong), said
    edit(folder / name / "config.json", **right)


def test_fields_of_a_clip_that_the_tensors_contradict(tmp_path):
  module = presets.make_clip(presets.SD15_MINIATURE)
  pipelines.save_preference_model(tmp_path / "clip", module, draw(presets.abstract_params(module)))
  config = json.loads((tmp_path / "clip" / "config.json").read_text())
  edit(tmp_path / "clip" / "config.json", vision_config=config["vision_config"] | {"patch_size": 2})
  with pytest.raises(ValueError, match="describes: vision_config.patch_size is 4 in the tensors, 2 in it; mis-shaped"):
    pipelines.load_preference_model(tmp_path / "clip")


def test_fields_that_are_not_implemented_name_themselves(folder):
  for name, field, value in (
    ("unet", "class_embed_type", "timestep"),
    ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("vae", "latents_mean", [0.0] * 4),
    ("text_encoder", "hidden_act", "relu"),
  ):
    file = folder / name / "config.json"
    before = file.read_text()
    edit(file, **{field: value})
    with pytest.raises(ValueError, match=re.escape(field)):
      pipelines.load_pipeline(folder)
    file.write_text(before)


# ---- tokenizer -----------------------------------------------------------------------------------


def test_incomplete_tokenizers(folder):
  """Either format will do, the one file of transformers 5 or the two of CLIP; not half of one."""
  tokenizer = folder / "tokenizer"
  prompts = ["grinning cat", ""]
  expected = pipelines.tokenize(pipelines.load_tokenizer(tokenizer), prompts)
  merges = (tokenizer / "merges.txt").read_text()
  (tokenizer / "merges.txt").unlink()
  (tokenizer / "vocab.json").rename(tokenizer / "vocab.kept")
  np.testing.assert_array_equal(pipelines.tokenize(pipelines.load_tokenizer(tokenizer), prompts), expected)
  (tokenizer / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match="tokenizer has no vocab.json and no merges.txt, expected a CLIP"):
    pipelines.load_pipeline(folder)
  (tokenizer / "vocab.kept").rename(tokenizer / "vocab.json")
  with pytest.raises(FileNotFoundError, match="tokenizer has no merges.txt, expected a CLIP tokenizer; download"):
    pipelines.load_pipeline(folder)
  (tokenizer / "merges.txt").write_text(merges)
  np.testing.assert_array_equal(pipelines.tokenize(pipelines.load_tokenizer(tokenizer), prompts), expected)


def test_small_files_are_read_before_large_ones(folder, monkeypatch):
  """What is wrong with a tokenizer or a schedule shows before gigabytes are read."""
  monkeypatch.setattr(pipelines, "load_tree", lambda *a, **k: pytest.fail("weights were read"))
  shutil.rmtree(folder / "tokenizer")
  with pytest.raises(FileNotFoundError, match="tokenizer"):
    pipelines.load_pipeline(folder)
  edit(folder / "scheduler" / "scheduler_config.json", prediction_type="direction")
  with pytest.raises(ValueError, match="prediction_type"):
    pipelines.load_pipeline(folder)
  (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="vae has no weights"):
    pipelines.load_pipeline(folder)


# ---- scripts/bench/measure_loading.py ------------------------------------------------------------------


def test_random_folders_have_the_layout_of_published_ones(unet, tmp_path):
  pytest.importorskip("diffusers")
  from scripts.bench import measure_loading

  measure_loading.write_folder(tmp_path, "sdxl-miniature", shard=200_000)
  shapes, _ = unet
  assert len(pipelines.weight_files(tmp_path / "unet")) > 1
  found = load(tmp_path / "unet", shapes, param_dtype=jnp.bfloat16)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, shape: x.shape == shape.shape, found, shapes)))
  assert 0.01 < np.std(np.asarray(found["conv_in"]["kernel"], np.float32)) < 0.03
  for name, last in (
    ("text_encoder", "text_model.final_layer_norm.weight"),
    ("text_encoder_2", "text_projection.weight"),
  ):
    tensors = safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
    assert last in tensors and all(key.startswith("text_") for key in tensors)
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float16)}
  index = json.loads((tmp_path / "model_index.json").read_text())
  assert set(index) - {"_class_name"} == {p.name for p in tmp_path.iterdir()} - {"model_index.json"}


def test_memory_is_watched():
  from scripts.bench import measure_loading

  before = measure_loading.status("VmRSS")["VmRSS"]
  watch = measure_loading.Peak()
  watch.start()
  block = np.ones(2**25)  # 256 MiB
  time.sleep(0.1)
  del block
  assert 0.9 * 2**28 < watch.stop()["VmRSS"] - before < 1.5 * 2**28


# ---- random weights ------------------------------------------------------------------------------


def test_drawn_weights_are_distributed_as_random_ones_and_have_the_wanted_type():
  drawn, random = (
    loading.load_text_to_image(f"{kind}:one-level", dtype="float32", param_dtype=dtypes).params["unet"]
    for kind, dtypes in (("drawn", "bfloat16"), ("random", "float32"))
  )
  assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, random)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(random), strict=True):
    assert a.dtype == jnp.bfloat16
    a, b = np.asarray(a, np.float32), np.asarray(b)
    if np.std(b) == 0:
      np.testing.assert_array_equal(a, b)
    elif a.size > 1000:
      assert np.std(a) == pytest.approx(np.std(b), rel=0.15) and abs(np.mean(a)) < 0.15 * np.std(b), path
      assert not np.array_equal(a, b)


def test_drawn_weights_follow_the_seed_and_lie_where_they_belong():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  a, b, c = (
    loading.load_text_to_image(
      "drawn:one-level", dtype="float32", seed=seed, sharding=device, components=("text_encoder",)
    ).params
    for seed in (0, 0, 1)
  )
  assert a.keys() == {"text_encoder"}
  assert_same(a, b)
  assert not all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True))
  assert all(x.sharding == device for x in jax.tree.leaves(a))
