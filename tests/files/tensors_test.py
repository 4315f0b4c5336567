"""Files of tensors as they are found: number types, shards, indices that lie, pieces of arrays."""

import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxpref.files.tensors import _DTYPES, _Stored, load_tree, save_tree, torch_name, weight_files
from jaxpref.models import clip, presets
from jaxpref.models.unet import UNet2DConditionModel
from jaxpref.models.vae import AutoencoderKL
from tests.files.trees import assert_same, draw

TEXT = clip.CLIPTextConfig(
  vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
)


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
  save_tree(tmp_path / "model.safetensors", params, dtype=file_dtype)
  found = load_tree(tmp_path / "model.safetensors", shapes, param_dtype=param_dtype)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(param_dtype)}
  rounded = jax.tree.map(lambda x: x.astype(file_dtype).astype(np.float32).astype(param_dtype), params)
  assert_same(found, rounded)


def test_types_may_differ_within_a_file(text, tmp_path):
  """As in folders of which only a part was converted to half precision."""
  shapes, params = text
  file = tmp_path / "model.safetensors"
  save_tree(file, params)
  tensors = safetensors.numpy.load_file(file)
  types = dict(zip(tensors, [np.float16, np.float32, jnp.bfloat16] * len(tensors), strict=False))
  safetensors.numpy.save_file({k: v.astype(types[k]) for k, v in tensors.items()}, file)

  def rounded(path, x):
    name = torch_name([key.key for key in path])
    return x.astype(types[name]).astype(np.float32)

  assert_same(load_tree(file, shapes), jax.tree_util.tree_map_with_path(rounded, params))
  assert_same(
    load_tree(file, shapes, param_dtype=jnp.float16),
    jax.tree.map(lambda x: x.astype(np.float16), jax.tree_util.tree_map_with_path(rounded, params)),
  )


def test_a_header_that_contradicts_the_bytes_is_refused(text, tmp_path):
  """Half-precision numbers under a header of single precision, and the other way round."""
  shapes, params = text
  file = tmp_path / "model.safetensors"
  for dtype, found, claimed in ((jnp.float16, b"F16", b"F32"), (jnp.float32, b"F32", b"F16")):
    save_tree(file, params, dtype=dtype)
    content = file.read_bytes()
    file.write_bytes(content.replace(found, claimed, 1))
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file .*; download"):
      load_tree(file, shapes)


def test_other_numbers_are_refused(text, tmp_path):
  """As quantised models hold them: read as numbers they would be nonsense."""
  shapes, params = text
  file = tmp_path / "model.safetensors"
  save_tree(file, params)
  tensors = safetensors.numpy.load_file(file)
  key = "text_model.encoder.layers.0.mlp.fc1.weight"
  safetensors.numpy.save_file(tensors | {key: tensors[key].astype(np.int8)}, file)
  with pytest.raises(ValueError, match=rf"holds numbers of types other than F64, .*1 \({key} I8\); use"):
    load_tree(file, shapes)


# ---- shards --------------------------------------------------------------------------------------

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write_shards(folder, params, count=3):
  """Deals the tensors out to `count` files, so that every stack of layers is torn apart."""
  save_tree(folder / "all.safetensors", params)
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
  return load_tree(weight_files(folder), shapes, **options)


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


@pytest.mark.parametrize("shard", ["../all.safetensors", "inner/all.safetensors", "/all.safetensors", "..", ""])
def test_an_index_names_no_shard_outside_of_its_folder(tmp_path, shard):
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": shard}}))
  with pytest.raises(ValueError, match="index.json names shards outside of its folder .*expected names of files"):
    weight_files(tmp_path)


def test_missing_and_incomplete_shards(text, tmp_path, monkeypatch):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  shapes, params = text
  names, weight_map = write_shards(tmp_path, params)
  file = tmp_path / names[1]
  content = file.read_bytes()

  file.write_bytes(content[: len(content) // 2])  # a download that stopped
  with pytest.raises(ValueError, match=f"{names[1]} is not a readable safetensors file"):
    load(tmp_path, shapes)

  file.unlink()
  with pytest.raises(FileNotFoundError, match=f"{INDEX} names shards that do not exist .{names[1]}.; download"):
    weight_files(tmp_path)

  # An index that has forgotten a shard: the tensors in it are missing, whatever lies in the folder.
  file.write_bytes(content)
  kept = {key: name for key, name in weight_map.items() if name != names[1]}
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": kept}))
  lost = sorted(set(weight_map) - set(kept))
  with pytest.raises(ValueError, match=rf"\(2 shards\) does not hold .*missing {len(lost)} ") as error:
    load(tmp_path, shapes)
  (whole,) = tmp_path.glob("jaxpref-names-*.txt")
  assert str(whole) in str(error.value) and set(lost) <= set(whole.read_text().split())


@pytest.mark.parametrize(
  "content", ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": {}}}']
)
def test_an_index_that_is_none(tmp_path, content):
  (tmp_path / INDEX).write_text(content)
  with pytest.raises(ValueError, match=f"{INDEX} is not an index of shards .*expected JSON with a weight_map") as error:
    weight_files(tmp_path)
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
  save_tree(tmp_path / "diffusion_pytorch_model.safetensors", doubled)
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
  original = _Stored.read

  def read(self, shape, index, out):
    rows = index[0].stop - index[0].start if index else 1
    sizes.append(rows * int(np.prod(shape[1:])) * np.dtype(_DTYPES[self.dtype]).itemsize)
    return original(self, shape, index, out)

  monkeypatch.setattr(_Stored, "read", read)
  return sizes


def test_a_device_reads_what_it_takes(tmp_path, bytes_read):
  """A kernel that is split by its outputs is split by rows of the file; copies are read once."""
  params = {"a": {"kernel": np.arange(64 * 32, dtype=np.float32).reshape(64, 32)}}
  save_tree(tmp_path / "model.safetensors", params)
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  for spec, times in ((("b", "a"), 4), ((None, ("a", "b")), 1), ((None, "a"), 1), ((None, None), 1)):
    bytes_read.clear()
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    found = load_tree(tmp_path / "model.safetensors", params, sharding=sharding)
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
    save_tree(tmp_path / "model.safetensors", params, dtype=jnp.float16)
    for sharding in (None, everywhere):
      tracemalloc.start()
      try:
        found = load_tree(tmp_path / "model.safetensors", params, sharding=sharding)
        _, peak = tracemalloc.get_traced_memory()
      finally:
        tracemalloc.stop()
      assert_same(found, params)
      assert 0.4 * largest < peak < 1.2 * largest


def test_a_long_list_of_tensors_is_cut_and_written_to_a_file_and_the_cause_comes_first(tmp_path, monkeypatch):
  """A VAE's weights in the place of the UNet's."""
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  preset = presets.SD15_MINIATURE
  unet, vae = (presets.abstract_params(m) for m in (UNet2DConditionModel(preset.unet), AutoencoderKL(preset.vae)))
  save_tree(tmp_path / "vae.safetensors", draw(vae))
  with pytest.raises(ValueError) as error:
    load_tree(tmp_path / "vae.safetensors", unet)
  message = str(error.value)
  assert "describes: they are those of a VAE, expected the UNet of Stable Diffusion 1 or 2; missing" in message
  assert len(message) < 1500 and "\n" not in message
  found = re.search(r"unexpected (\d+) \(((?:\S+, ){4}\S+) and (\d+) more\)", message)
  (whole,) = tmp_path.glob("jaxpref-names-*.txt")
  assert f"; {whole} lists them all; take weights" in message
  written = whole.read_text().partition(f"unexpected {found[1]}:\n")[2].partition("\n\n")[0].split("\n")
  assert len(written) == int(found[1]) == 5 + int(found[3])
  assert written[:5] == found[2].split(", ")
  with safetensors.safe_open(tmp_path / "vae.safetensors", "numpy") as file:
    assert set(written) == set(file.keys())
