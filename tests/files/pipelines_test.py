"""Folders: what torch diffusers opens, what it writes, and what must be refused."""

import dataclasses
import errno
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from huggingface_hub import errors as hub_errors

from jaxpref.files import folders, pipelines, tensors
from jaxpref.files.tensors import load_tree, save_tree
from jaxpref.files.tokenizers import load_tokenizer
from jaxpref.models import clip, presets
from tests.files.trees import assert_same, nchw, randomised, relative_error

XL = {"sd15-miniature": False, "sdxl-miniature": True}
TORCH_CLASSES = {
  "sd15-miniature": diffusers.StableDiffusionPipeline,
  "sdxl-miniature": diffusers.StableDiffusionXLPipeline,
}
PROMPTS = ["grinning cat", "a red apple and a very, very, very, very, very long prompt, café"]


def _save(name, tmp_path_factory):
  pipe = pipelines.random_pipeline(name)
  pipe = dataclasses.replace(pipe, params=randomised(pipe.params))
  folder = tmp_path_factory.mktemp("models") / name
  assert pipelines.save_pipeline(folder, pipe) == folder
  return name, pipe, folder


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
  """A random pipeline, and the folder it is saved in."""
  return _save("sd15-miniature", tmp_path_factory)


@pytest.fixture(scope="module", params=list(XL))
def saved(request, tmp_path_factory):
  """The same, of each kind."""
  if request.param == "sd15-miniature":
    return request.getfixturevalue("sd15")
  return _save(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def torch_pipe(saved):
  name, _, folder = saved
  return TORCH_CLASSES[name].from_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
  """A copy of a small component folder to damage: a text encoder and its config."""
  config = clip.CLIPTextConfig(
    vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
  )
  module = clip.CLIPTextModel(config)
  params = randomised(presets.abstract_params(module))
  save_tree(tmp_path / "model.safetensors", params)
  return tmp_path, presets.abstract_params(module), params


# ---- against diffusers ---------------------------------------------------------------------------


# Of Stable Diffusion 1.5, export_test.py compares the picture that they make together.
@pytest.mark.parametrize(
  "saved", [pytest.param("sd15-miniature", marks=pytest.mark.slow), "sdxl-miniature"], indirect=True
)
def test_diffusers_opens_what_is_written_and_agrees(saved, torch_pipe):
  name, pipe, _ = saved
  rng = np.random.default_rng(1)
  ids = pipe.tokenize(PROMPTS)
  torch_ids, torch_added, added = [], None, None
  pairs = [(torch_pipe.tokenizer, torch_pipe.text_encoder)]
  if XL[name]:
    pairs.append((torch_pipe.tokenizer_2, torch_pipe.text_encoder_2))
  for tokenizer, _ in pairs:
    out = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    torch_ids.append(out.input_ids)
  np.testing.assert_array_equal(ids, torch.cat(torch_ids, 1))

  # Text.
  encoders = [pipe.text_encoder, pipe.text_encoder_2][: len(pairs)]
  names = ["text_encoder", "text_encoder_2"]
  for encoder, key, (_, torch_encoder), part in zip(encoders, names, pairs, torch_ids, strict=False):
    found = jax.jit(encoder.apply)({"params": pipe.params[key]}, part.numpy())
    expected = torch_encoder(part, output_hidden_states=True)
    assert relative_error(found["last_hidden_state"], expected.last_hidden_state) <= 1e-4
    assert relative_error(found["hidden_states"][-2], expected.hidden_states[-2]) <= 1e-4
    if encoder.with_projection:
      assert relative_error(found["text_embeds"], expected.text_embeds) <= 1e-4

  # UNet.
  config = pipe.unet.config
  sample = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
  t = np.array([7, 801], np.int32)
  context = rng.normal(size=(2, 5, config.cross_attention_dim)).astype(np.float32)
  if XL[name]:
    added = {
      "text_embeds": rng.normal(size=(2, 16)).astype(np.float32),
      "time_ids": np.array([[16, 16, 0, 0, 16, 16], [20, 30, 1, 2, 16, 16]], np.float32),
    }
    torch_added = {key: torch.tensor(value) for key, value in added.items()}
  found = jax.jit(pipe.unet.apply)({"params": pipe.params["unet"]}, sample, t, context, added)
  with torch.no_grad():
    expected = torch_pipe.unet(
      nchw(sample), torch.tensor(t), torch.tensor(context), added_cond_kwargs=torch_added
    ).sample
  assert relative_error(found, expected.permute(0, 2, 3, 1)) <= 1e-4

  # VAE, both ways in one compilation.
  images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)

  @jax.jit
  def code(params):
    variables = {"params": params}
    mean, _ = pipe.vae.apply(variables, images, method="encode")
    return mean, pipe.vae.apply(variables, mean, method="decode")

  mean, decoded = code(pipe.params["vae"])
  with torch.no_grad():
    torch_mean = torch_pipe.vae.encode(nchw(images)).latent_dist.mean
    torch_decoded = torch_pipe.vae.decode(torch_mean).sample
  assert relative_error(mean, torch_mean.permute(0, 2, 3, 1)) <= 1e-4
  assert relative_error(decoded, torch_decoded.permute(0, 2, 3, 1)) <= 1e-4

  alphas = torch_pipe.scheduler.alphas_cumprod.numpy()
  np.testing.assert_allclose(pipe.schedule.alphas_cumprod, alphas, rtol=1e-5)


def test_what_diffusers_writes_is_opened(saved, torch_pipe, tmp_path):
  """In its own naming (transformers 5 drops "text_model."), in shards and as fp16 variant."""
  _, pipe, _ = saved
  torch_pipe.save_pretrained(tmp_path / "plain")
  found = pipelines.load_pipeline(tmp_path / "plain")
  assert_same(found.params, pipe.params)
  assert found.unet == pipe.unet and found.vae == pipe.vae
  assert found.text_encoder == pipe.text_encoder and found.text_encoder_2 == pipe.text_encoder_2
  np.testing.assert_array_equal(found.tokenize(PROMPTS), pipe.tokenize(PROMPTS))
  assert found.force_zeros_for_empty_prompt == pipe.force_zeros_for_empty_prompt

  torch_pipe.save_pretrained(tmp_path / "split", max_shard_size="100KB")
  assert len(list((tmp_path / "split" / "unet").glob("*.safetensors"))) > 1
  assert_same(pipelines.load_pipeline(tmp_path / "split").params, pipe.params)
  shutil.rmtree(tmp_path / "plain")

  torch_pipe.save_pretrained(tmp_path / "half", variant="fp16")
  assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
  assert_same(pipelines.load_pipeline(tmp_path / "half").params, pipe.params)


# ---- round trips ---------------------------------------------------------------------------------


def test_round_trip_is_bitwise(saved):
  _, pipe, folder = saved
  found = pipelines.load_pipeline(folder)
  assert_same(found.params, pipe.params)
  plain = {"params": None, "schedule": None, "tokenizer": None, "tokenizer_2": None}
  assert dataclasses.replace(found, **plain) == dataclasses.replace(pipe, **plain)
  jax.tree.map(np.testing.assert_array_equal, found.schedule, pipe.schedule)


def test_half_precision_files_and_parameters(sd15, tmp_path):
  _, pipe, folder = sd15
  pipelines.save_pipeline(tmp_path / "half", pipe, dtype=jnp.float16)
  size, full = (
    (f / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for f in (tmp_path / "half", folder)
  )
  assert 0.45 < size / full < 0.6
  found = pipelines.load_pipeline(tmp_path / "half")
  rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), pipe.params)
  assert_same(found.params, rounded)

  found = pipelines.load_pipeline(folder, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}
  assert found.unet.dtype == found.vae.dtype == found.text_encoder.dtype == jnp.bfloat16


def test_tensors_go_straight_to_their_sharding(folder):
  tmp_path, shapes, params = folder
  devices = np.array(jax.devices()[:2])
  mesh = jax.sharding.Mesh(devices, ("fsdp",))

  def place(shape):
    split = shape.ndim == 2 and shape.shape[1] % devices.size == 0
    spec = jax.sharding.PartitionSpec(None, "fsdp" if split else None)
    return jax.sharding.NamedSharding(mesh, spec if shape.ndim > 1 else jax.P())

  shardings = jax.tree.map(place, shapes)
  found = load_tree(tmp_path / "model.safetensors", shapes, sharding=shardings)
  assert_same(found, params)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, found, shardings)))


def test_pipeline_takes_a_sharding_function(sd15):
  _, pipe, folder = sd15
  everywhere = jax.sharding.NamedSharding(jax.make_mesh((len(jax.devices()),), ("x",)), jax.P())
  seen = {}

  def shardings(shapes):
    seen.update(shapes)
    return jax.tree.map(lambda _: everywhere, shapes)

  found = pipelines.load_pipeline(folder, sharding=shardings)
  assert seen.keys() == pipe.params.keys()
  assert {x.sharding for x in jax.tree.leaves(found.params)} == {everywhere}


# ---- files of other versions ---------------------------------------------------------------------


def test_old_names_and_layouts_are_understood(tmp_path):
  module = presets.AutoencoderKL(presets.SD15_MINIATURE.vae)
  shapes = presets.abstract_params(module)
  params = randomised(shapes)
  file = tmp_path / "vae.safetensors"
  save_tree(file, params)
  tensors = safetensors.numpy.load_file(file)
  old = {}
  for key, value in tensors.items():
    for new_name, old_name in (
      ("to_q", "query"),
      ("to_k", "key"),
      ("to_v", "value"),
      ("to_out.0", "proj_attn"),
    ):
      key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
    # Some conversions kept attention as 1x1 convolutions.
    is_projection = "attentions.0.query.weight" in key
    old[key] = value[:, :, None, None] if is_projection else value
  assert sum("proj_attn" in key for key in old) == 4
  safetensors.numpy.save_file(old, file)
  assert_same(load_tree(file, shapes), params)


def test_buffers_of_old_transformers_files_are_no_parameters(folder):
  tmp_path, shapes, params = folder
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
  safetensors.numpy.save_file(tensors, file)
  assert_same(load_tree(file, shapes), params)


# ---- what is refused -----------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_all_named(folder):
  tmp_path, shapes, _ = folder
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  del tensors["text_model.final_layer_norm.bias"]
  del tensors["text_model.encoder.layers.0.mlp.fc1.weight"]
  tensors["lm_head.weight"] = np.zeros((3, 3), np.float32)
  tensors["text_model.final_layer_norm.weight"] = np.zeros(5, np.float32)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError) as error:
    load_tree(file, shapes)
  message = str(error.value)
  assert str(file) in message
  for part in (
    "missing 2",
    "text_model.final_layer_norm.bias",
    "text_model.encoder.layers.0.mlp.fc1.weight",
    "unexpected 1 (lm_head.weight)",
    "mis-shaped 1 (text_model.final_layer_norm.weight: found [5], expected [4])",
  ):
    assert part in message, message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickles_are_refused(sd15, tmp_path, name):
  _, _, source = sd15
  damaged = tmp_path / "model"
  shutil.copytree(source, damaged)
  (damaged / "text_encoder" / "model.safetensors").unlink()
  (damaged / "text_encoder" / name).write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match=f"only as {name}.*pickles can run code.*safe_serialization"):
    pipelines.load_pipeline(damaged)
  with pytest.raises(ValueError, match="not a .safetensors file"):
    load_tree(damaged / "text_encoder" / name, {})


def test_truncated_weights_are_refused(folder):
  tmp_path, shapes, _ = folder
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
    load_tree(file, shapes)


def test_missing_folder_and_files(sd15, tmp_path):
  _, _, source = sd15
  with pytest.raises(FileNotFoundError, match="model folder .*nowhere does not exist"):
    pipelines.load_pipeline(tmp_path / "nowhere")
  (tmp_path / "model.ckpt").write_bytes(b"")
  with pytest.raises(ValueError, match="model.ckpt is a pickle, which can run code and is never loaded"):
    pipelines.load_pipeline(tmp_path / "model.ckpt")
  (tmp_path / "model.txt").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match="is a file, expected a model folder"):
    pipelines.load_pipeline(tmp_path / "model.txt")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="model_index.json is missing"):
    pipelines.load_pipeline(tmp_path / "empty")
  for name in ("unet/config.json", "tokenizer", "scheduler/scheduler_config.json"):
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    path = damaged / name
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=name.split("/")[0]):
      pipelines.load_pipeline(damaged)
    shutil.rmtree(damaged)
  (tmp_path / "empty" / "model_index.json").write_text("{")
  with pytest.raises(ValueError, match="model_index.json is not valid JSON"):
    pipelines.load_pipeline(tmp_path / "empty")


def test_hub_name_without_network_is_one_sentence(monkeypatch):
  import huggingface_hub

  asked = {}

  def offline(name, **kwargs):
    asked.update(kwargs, name=name)
    raise ConnectionError("no route to host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  with pytest.raises(FileNotFoundError, match="someone/some-model is neither a folder here nor"):
    pipelines.load_pipeline("someone/some-model")
  assert asked["name"] == "someone/some-model"
  assert not any(".bin" in pattern or ".ckpt" in pattern for pattern in asked["allow_patterns"])


def http_error(kind, status=403):
  import httpx2

  request = httpx2.Request("GET", "https://hub")
  return kind("as the client says it", response=httpx2.Response(status, request=request))


def beyond(error):
  """As the hub's client raises where the cache has nothing either."""
  found = hub_errors.LocalEntryNotFoundError("not in the cache")
  found.__cause__ = error
  return found


@pytest.mark.parametrize(
  ("error", "sentence"),
  [
    (http_error(hub_errors.GatedRepoError), r"hub: it is gated; accept its licence on huggingface.co/a/b, and log in"),
    (
      http_error(hub_errors.RepositoryNotFoundError, 404),
      "no model of this name, or it is private; check the name; for a",
    ),
    (http_error(hub_errors.DisabledRepoError), "the hub has disabled it; use another"),
    (http_error(hub_errors.RevisionNotFoundError, 404), "has no revision main; download the revision you want"),
    (http_error(hub_errors.HfHubHTTPError, 401), r"refuses the token \(401\); log in .*HF_TOKEN to a valid one"),
    (
      beyond(http_error(hub_errors.HfHubHTTPError, 429)),
      r"no more requests for now \(429\); wait some minutes, or log",
    ),
    (beyond(http_error(hub_errors.HfHubHTTPError, 503)), r"out of order \(503\); try again later"),
    (
      beyond(hub_errors.OfflineModeIsEnabled("offline")),
      "HF_HUB_OFFLINE forbids fetching it; unset HF_HUB_OFFLINE, or",
    ),
    (
      beyond(ConnectionError("no route to host")),
      r"no connection \(ConnectionError\); connect to the network, or give",
    ),
    (OSError(errno.ENOSPC, "full"), r"its cache cannot be written \(No space left .*; free space, or set HF_HOME"),
  ],
  ids=lambda value: "" if isinstance(value, str) else type(value.__cause__ or value).__name__,
)
def test_each_error_of_the_hub_has_its_own_remedy(error, sentence, monkeypatch):
  def raises(*_, **__):
    raise error

  monkeypatch.setattr("huggingface_hub.snapshot_download", raises)
  with pytest.raises(FileNotFoundError, match=sentence) as caught:
    folders.resolve_folder("a/b")
  said = str(caught.value)
  assert said.startswith("a/b is neither a folder here nor could it be fetched from the Hugging Face hub: ")
  assert "\n" not in said and ("connect to the network" in said) == (type(error.__cause__) is ConnectionError)


@pytest.mark.parametrize("of_both", [(), ("unet",)], ids=["only fp16", "one in both"])
def test_a_repository_with_only_half_precision_is_downloaded(sd15, tmp_path, monkeypatch, of_both):
  """By a client that fetches what the patterns say; shards and their index, too."""
  from huggingface_hub.utils import filter_repo_objects

  _, _, source = sd15
  repository, cache = shutil.copytree(source, tmp_path / "repository"), tmp_path / "cache"
  for name in ("unet", "vae", "text_encoder"):
    stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
    file = repository / name / f"{stem}.safetensors"
    shutil.copy(file, file.with_name(f"{stem}.non_ema.fp16.safetensors"))
    if name == "vae":  # one shard
      shard = f"{stem}.fp16-00001-of-00001.safetensors"
      shutil.copy(file, file.with_name(shard))
      keys = safetensors.numpy.load_file(file).keys()
      index = json.dumps({"weight_map": dict.fromkeys(keys, shard)})
      file.with_name(f"{stem}.safetensors.index.fp16.json").write_text(index)
    else:
      shutil.copy(file, file.with_name(f"{stem}.fp16.safetensors"))
    if name not in of_both:
      file.unlink()

  def snapshot_download(name, *, allow_patterns, ignore_patterns):
    paths = [p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()]
    for path in filter_repo_objects(paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
      (cache / path).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(repository / path, cache / path)
    return str(cache)

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
  folder = folders.resolve_folder("a/b", "*/*.safetensors")
  assert tensors.weight_files(folder / "vae") and tensors.weight_files(folder / "text_encoder")
  assert not list(folder.rglob("*non_ema*"))
  assert [p.name for p in (folder / "unet").glob("*.safetensors")] == [
    "diffusion_pytorch_model.safetensors" if of_both else "diffusion_pytorch_model.fp16.safetensors"
  ]


def test_hub_name_is_downloaded(monkeypatch, sd15):
  import huggingface_hub

  _, pipe, folder = sd15
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
  assert_same(pipelines.load_pipeline("someone/some-model").params, pipe.params)


def test_other_architectures_are_refused_by_name(sd15, tmp_path):
  _, _, source = sd15
  damaged = tmp_path / "model"
  shutil.copytree(source, damaged)
  index_file = damaged / "model_index.json"
  index = json.loads(index_file.read_text())
  index_file.write_text(json.dumps(index | {"unet": ["diffusers", "UNet3DConditionModel"]}))
  with pytest.raises(ValueError, match="unet is a UNet3DConditionModel, expected UNet2DCond"):
    pipelines.load_pipeline(damaged)
  del index["unet"]
  index_file.write_text(json.dumps(index))
  with pytest.raises(ValueError, match="model_index.json has no unet"):
    pipelines.load_pipeline(damaged)


def test_numbers_that_a_file_cannot_hold_are_not_saved(sd15, tmp_path):
  _, pipe, _ = sd15
  target = tmp_path / "model"
  pipelines.save_pipeline(target, pipe)

  def with_bias(value):
    bias = pipe.params["unet"]["conv_in"]["bias"].at[0].set(value)
    unet = pipe.params["unet"] | {"conv_in": pipe.params["unet"]["conv_in"] | {"bias": bias}}
    return dataclasses.replace(pipe, params=pipe.params | {"unet": unet})

  with pytest.raises(ValueError, match="conv_in.bias holds NaN"):
    pipelines.save_pipeline(target, with_bias(jnp.nan))
  with pytest.raises(ValueError, match="conv_in.bias holds numbers too large for float16"):
    pipelines.save_pipeline(target, with_bias(1e5), dtype=jnp.float16)
  # The failure left the old folder as it was, and nothing beside it.
  assert [p.name for p in tmp_path.iterdir()] == ["model"]
  assert_same(pipelines.load_pipeline(target).params, pipe.params)
  with pytest.raises(ValueError, match="cannot be written as float64"):
    save_tree(tmp_path / "x.safetensors", {}, dtype=np.float64)


def test_only_pipeline_folders_are_replaced(sd15, tmp_path):
  _, pipe, _ = sd15
  holiday = tmp_path / "holiday"
  holiday.mkdir()
  (holiday / "photo.jpg").write_bytes(b"precious")
  with pytest.raises(FileExistsError, match="holiday exists and is not a model folder"):
    pipelines.save_pipeline(holiday, pipe)
  assert [p.name for p in holiday.iterdir()] == ["photo.jpg"]

  target = tmp_path / "model"
  target.mkdir()  # empty: fine
  pipelines.save_pipeline(target, pipe)
  (target / "README.md").write_text("mine")
  doubled = jax.tree.map(lambda x: 2 * x, pipe.params)
  pipelines.save_pipeline(target, dataclasses.replace(pipe, params=doubled))
  assert_same(pipelines.load_pipeline(target).params, doubled)
  assert (target / "README.md").read_text() == "mine"


def test_a_tokenizer_of_another_vocabulary_is_refused(sd15, tmp_path):
  target = tmp_path / "model"
  shutil.copytree(sd15[2], target)
  tokenizer = load_tokenizer(target / "tokenizer")
  tokenizer.add_tokens(["<my-style>"])
  tokenizer.save_pretrained(target / "tokenizer")
  size = presets.TINY_VOCAB_SIZE
  with pytest.raises(ValueError) as error:
    pipelines.load_pipeline(target)
  assert str(error.value) == (
    f"{target / 'tokenizer'} gives ids up to {size}, expected at most {size - 1} by the vocab_size of "
    f"{target / 'text_encoder' / 'config.json'}; take the tokenizer of the same model."
  )
