"""Checkpoints in one file: what diffusers loads of them, too, what tells their topology, and what is refused."""

import dataclasses
import json
import re
import shutil
import warnings

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from jaxpref import evaluate
from jaxpref.evaluation import folder as evaluation_folder
from jaxpref.files import family as families
from jaxpref.files import folders, hub, loading, pipelines, single_file, tensors
from jaxpref.models import presets
from tests.files import original_layout
from tests.files.trees import assert_same, randomised

MINIATURE = presets.SD15_MINIATURE
PRESETS = {
  "sd1": MINIATURE,
  "sd2": dataclasses.replace(
    MINIATURE,
    unet=dataclasses.replace(MINIATURE.unet, use_linear_projection=True),
    text_encoder=dataclasses.replace(MINIATURE.text_encoder, hidden_act="gelu"),
    scheduler=presets.SD2.scheduler,
  ),
  "sdxl": presets.SDXL_MINIATURE,
}
CLASSES = dict.fromkeys(("sd1", "sd2"), diffusers.StableDiffusionPipeline) | {
  "sdxl": diffusers.StableDiffusionXLPipeline
}
OPS = {"fuse": np.concatenate, "transpose": lambda x: np.ascontiguousarray(x.T)}
PROMPTS = ["grinning cat", "a red apple"]


def read(folder):
  """{component: {name: array}} of a folder in the layout of diffusers."""
  files = {p.parent.name: p for p in folder.glob("*/*.safetensors")}
  return {name: safetensors.numpy.load_file(file) for name, file in files.items()}


def whole(kind, of, **ops):
  text_2 = of.get("text_encoder_2")
  of_sd2 = {"open_clip_text": kind == "sd2"}
  return original_layout.whole(of["unet"], of["vae"], of["text_encoder"], text_2, **of_sd2, **(ops or OPS))


class Made:
  """A pipeline, its folder, one of its config.json files alone, and its checkpoint."""

  def __init__(self, kind, place):
    pipe = pipelines.random_pipeline(PRESETS[kind], components=())
    drawn = {k: randomised(presets.abstract_params(getattr(pipe, k))) for k in pipelines.NETWORKS if getattr(pipe, k)}
    self.kind, self.pipe = kind, dataclasses.replace(pipe, params=drawn)
    self.folder = pipelines.save_pipeline(place / "folder", self.pipe)
    self.configs = pipelines.save_pipeline(place / "configs", self.pipe, configs_only=True)
    self.tensors = whole(kind, read(self.folder))
    self.file = self.write(place / "model.safetensors")
    self.name = f"{self.file}+config={self.configs}"

  def write(self, file, without=(), dtype=np.float32, **more):
    """A file of these tensors, without those whose names begin so, and with more."""
    kept = {k: v.astype(dtype) for k, v in self.tensors.items() if not k.startswith(tuple(without))}
    safetensors.numpy.save_file(kept | more, file)
    return file


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
  return Made("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
  return Made("sd2", tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
  return Made("sdxl", tmp_path_factory.mktemp("sdxl"))


def load(name, **options):
  return loading.load_text_to_image(str(name), dtype="float32", **options)


# ---- against diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PRESETS)
def test_what_is_loaded_is_what_diffusers_loads(kind, request, tmp_path):
  """Of its UNet, VAE and text encoders each weight, and all that its folder says."""
  made = request.getfixturevalue(kind)
  theirs = CLASSES[kind].from_single_file(made.file, config=str(made.configs), local_files_only=True)
  theirs.save_pretrained(tmp_path / "theirs")
  expected = pipelines.load_pipeline(tmp_path / "theirs")
  found = load(made.name)
  assert_same(found.params, expected.params)
  assert_same(found.params, made.pipe.params)
  plain = {"params": None, "schedule": None, "tokenizer": None, "tokenizer_2": None}
  assert dataclasses.replace(found, **plain) == dataclasses.replace(made.pipe, **plain)
  jax.tree.map(np.testing.assert_array_equal, found.schedule, made.pipe.schedule)
  np.testing.assert_array_equal(found.tokenize(PROMPTS), made.pipe.tokenize(PROMPTS))
  assert loading.unet_config(made.name) == made.pipe.unet.config


def test_half_precision_and_averages_of_the_weights(sd1, tmp_path):
  """The averages are left out, as diffusers does, and so is what training left in the file."""
  more = {
    "model_ema.diffusion_modelinput_blocks00weight": np.ones(3, np.float32),
    "global_step": np.zeros((), np.int64),
  }
  more |= {"alphas_cumprod": np.ones(9, np.float32), "first_stage_model.loss.logvar": np.ones((), np.float32)}
  more["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(9)[None]
  file = sd1.write(tmp_path / "half.safetensors", dtype=np.float16, **more)
  with pytest.warns(UserWarning, match=r"half.safetensors: model_ema.\*, averages of its weights, are not read"):
    found = load(f"{file}+config={sd1.configs}")
  rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), sd1.pipe.params)
  assert_same(found.params, rounded)
  theirs = diffusers.StableDiffusionPipeline.from_single_file(file, config=str(sd1.configs), local_files_only=True)
  weight = theirs.unet.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(found.params["unet"]["conv_in"]["kernel"], weight)


def test_layouts_of_other_programs(sd1, sd2, sdxl, tmp_path):
  """SD 1 files without text_model, SD 2's last layer that is not used, ComfyUI's projection, and vae. as a prefix."""
  flat = {k.replace(".text_model.", "."): v for k, v in sd1.tensors.items()}
  safetensors.numpy.save_file(flat, tmp_path / "flat.safetensors")
  assert_same(load(f"{tmp_path / 'flat.safetensors'}+config={sd1.configs}").params, sd1.pipe.params)

  beside = "cond_stage_model.model."
  last = {
    k.replace(".1.", ".2."): v for k, v in sd2.tensors.items() if k.startswith(f"{beside}transformer.resblocks.1.")
  }
  assert last
  last |= {f"{beside}text_projection": np.ones((24, 24), np.float32), f"{beside}logit_scale": np.ones((), np.float32)}
  file = sd2.write(tmp_path / "last.safetensors", **last)
  assert_same(load(f"{file}+config={sd2.configs}").params, sd2.pipe.params)

  projection = "conditioner.embedders.1.model.text_projection"
  weight = np.ascontiguousarray(sdxl.tensors[projection].T)
  file = sdxl.write(tmp_path / "comfy.safetensors", [projection], **{f"{projection}.weight": weight})
  assert_same(load(f"{file}+config={sdxl.configs}").params, sdxl.pipe.params)

  renamed = {re.sub("^first_stage_model", "vae", k): v for k, v in sd1.tensors.items()}
  safetensors.numpy.save_file(renamed, tmp_path / "renamed.safetensors")
  assert_same(load(f"{tmp_path / 'renamed.safetensors'}+config={sd1.configs}").params, sd1.pipe.params)


def test_rows_and_transposes_go_straight_to_their_sharding(sdxl):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
  split = lambda x: jax.P(*(["fsdp"] if x.ndim == 2 and x.shape[0] % 2 == 0 else []))
  place = lambda shapes: jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, split(x)), shapes)
  found = load(sdxl.name, sharding=place, param_dtype="bfloat16", components=("text_encoder_2",))
  expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), sdxl.pipe.params["text_encoder_2"])
  assert_same(found.params, {"text_encoder_2": expected})
  assert found.params["text_encoder_2"]["text_projection"]["kernel"].sharding.spec == jax.P("fsdp")


# ---- published topologies -------------------------------------------------------------------------------------


def sparse(file, shapes):
  """A file of tensors in half precision whose numbers are not written."""
  header, offset = {}, 0
  for name, shape in shapes.items():
    end = offset + 2 * int(np.prod(shape))
    header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
    offset = end
  encoded = json.dumps(header).encode()
  with open(file, "wb") as f:
    f.write(len(encoded).to_bytes(8, "little") + encoded)
    f.truncate(8 + len(encoded) + offset)
  return file


def shapes_of(kind, preset):
  """{component: {name in the layout of diffusers: shape}}."""
  modules = pipelines.modules_of(preset).items()
  of = {k: {e.key: e.shape for e in tensors._entries(presets.abstract_params(m)).values()} for k, m in modules}
  fuse = lambda parts: (3 * parts[0][0], *parts[0][1:])
  return whole(kind, of, fuse=fuse, transpose=lambda shape: shape[::-1])


@pytest.mark.parametrize(
  "kind, preset, name",
  [
    ("sd1", presets.SD15, "v1"),
    pytest.param("sd2", presets.SD2, "v2", marks=pytest.mark.slow),
    ("sdxl", presets.SDXL, "xl_base"),
  ],
)
def test_published_topologies_are_recognised(kind, preset, name, sd1, sdxl, tmp_path, monkeypatch):
  """By names and shapes alone, as diffusers does; their tokenizers come from the hub's cache."""
  shapes = shapes_of(kind, preset)
  utils = diffusers.loaders.single_file_utils
  assert utils.infer_diffusers_model_type({k: torch.empty(s, device="meta") for k, s in shapes.items()}) == name
  file = sparse(tmp_path / "full.safetensors", shapes)
  asked = []
  made = sdxl if kind == "sdxl" else sd1
  monkeypatch.setattr(hub, "fetch", lambda *args: asked.append(args) or made.configs)
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = load(file, components=())
  assert asked == [(utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[name]["pretrained_model_name_or_path"], "*.no_weights")]
  assert [str(w.message).split("; ")[1] for w in said] == (
    ["v is assumed, as in diffusers: for a base model give config.model_config (--model_config)."]
    if kind == "sd2"
    else []
  )
  assert found.unet.config == preset.unet and found.vae.config == preset.vae
  assert found.scheduler_config["prediction_type"] == ("v_prediction" if kind == "sd2" else "epsilon")
  for component, files in single_file.weight_files(file, None).items():
    module = getattr(found, component)
    folders.check_network(module, files, presets.abstract_params(module))
  zeros = families.get("stable_diffusion").without_values(str(file))
  assert loading.preset_of(zeros) == dataclasses.replace(preset, preference=None)


def test_a_file_that_says_that_it_predicts_v(tmp_path, monkeypatch, sdxl):
  monkeypatch.setattr(hub, "fetch", lambda *args: sdxl.configs)
  shapes = {single_file.KNOWN[2].key: (640, 2048), "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
  found = load(sparse(tmp_path / "v.safetensors", shapes | {"v_pred": (0,), "ztsnr": (0,)}), components=())
  assert found.schedule.prediction_type == "v_prediction" and found.schedule.alphas_cumprod[-1] < 1e-6


def test_a_tokenizer_that_is_not_to_be_had(tmp_path, monkeypatch):
  shapes = {single_file.KNOWN[0].key: (320, 768), "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}

  def fetch(name, weights):
    raise hub.HubError(name, "no connection (X)", "connect to the network")

  monkeypatch.setattr(hub, "fetch", fetch)
  expected = (
    r"Stable Diffusion 1, but the tokenizer of \S+-v1-5 could not be fetched: no connection \(X\); connect to the "
    r"network; or give config.model_config \(--model_config\), a folder that has the tokenizer.$"
  )
  with pytest.raises(FileNotFoundError, match=expected):
    load(sparse(tmp_path / "m.safetensors", shapes), components=())


# ---- what is refused ------------------------------------------------------------------------------------------

UNET = {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)}


@pytest.mark.parametrize(
  "shapes, sentence",
  [
    ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 9)}, "is Stable Diffusion 3, expected"),
    ({"joint_blocks.0.x_block.attn.qkv.weight": (9, 9)}, "is Stable Diffusion 3, .*; give its folder in the layout of"),
    ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9, 9)}, "is Flux, expected a whole checkpoint"),
    ({"double_blocks.0.img_attn.norm.key_norm.scale": (9,)}, "is Flux, expected"),
    (UNET | {"conditioner.embedders.0.model.positional_embedding": (77, 8)}, "is the refiner of Stable Diffusion XL,"),
    (UNET | {"edm_mean": (4,)}, "is a model of EDM noise"),
    (UNET | {"model.diffusion_model.input_blocks.1.1.time_stack.0.norm.weight": (4,)}, "is a video model"),
    (UNET | {"control_model.time_embed.0.weight": (4, 4)}, "is a ControlNet"),
    (
      {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)},
      r"its UNet takes a mask and a masked image as well \(inpainting\), 9 channels instead of 4; take a text-to-image",
    ),
    ({"model.diffusion_model.input_blocks.0.0.weight": (8, 8, 3, 3)}, "an image to edit as well, 8 channels"),
    ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 4)}, "is a LoRA, .*; give it as --lora"),
    ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 4)}, "is a LoRA, .*; give it as --lora"),
    ({"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}, "is a VAE, .*; give it as config.vae_model"),
    ({"encoder.conv_in.weight": (8, 3, 3, 3)}, "is a VAE, .*; give it as config.vae_model"),
    ({"input_blocks.0.0.weight": (8, 4, 3, 3)}, "is a UNet, .*; give it as config.unet_model"),
    ({"add_embedding.linear_1.weight": (8, 4)}, "is the UNet of Stable Diffusion XL, .*; give it as config.unet_model"),
    ({"text_model.embeddings.token_embedding.weight": (8, 4)}, "is a text encoder, expected a whole checkpoint"),
    ({"cond_stage_model.model.transformer.resblocks.0.ln_1.bias": (8,)}, "is a text encoder, expected a whole"),
    ({"emb_params": (8, 768)}, "is a textual inversion, expected"),
    ({"x": (8,)}, "has no tensors named model.diffusion_model.input_blocks, expected a whole checkpoint"),
    (UNET, "its tensors have the shapes of none of Stable Diffusion 1, .*; give config.model_config"),
  ],
)
def test_files_that_are_something_else_are_said_to_be_it(shapes, sentence, tmp_path):
  file = sparse(tmp_path / "model.safetensors", shapes)
  with pytest.raises(ValueError, match=sentence) as e:
    load(file)
  assert str(file) in str(e.value) and "\n" not in str(e.value)


def test_a_file_without_a_part_or_of_another_shape_is_refused(sd1, sdxl, tmp_path):
  file = sd1.write(tmp_path / "no_vae.safetensors", ["first_stage_model."])
  name = f"{file}+config={sd1.configs}"
  with pytest.raises(ValueError, match=r"no_vae.safetensors does not hold the VAE; give one as config.vae_model \(--v"):
    load(name)
  found = load(name, vae_model=str(sd1.folder / "vae"))
  assert_same(found.params, sd1.pipe.params)
  file = sd1.write(tmp_path / "no_text.safetensors", ["cond_stage_model."])
  with pytest.raises(ValueError, match=r"no_text.safetensors does not hold the text encoder; use a whole model"):
    load(f"{file}+config={sd1.configs}")
  file = sd1.write(tmp_path / "hole.safetensors", ["model.diffusion_model.out."])
  expected = (
    r"hole.safetensors \(its UNet\) does not hold the tensors that \S+configs describes: missing 4 "
    r"\(.*conv_norm_out.*\); give config.model_config"
  )
  with pytest.raises(ValueError, match=expected):
    load(f"{file}+config={sd1.configs}")
  with pytest.raises(ValueError, match="does not hold the second text encoder"):
    load(f"{sd1.file}+config={sdxl.configs}")
  other = shutil.copytree(sd1.configs, tmp_path / "other")
  config = json.loads((other / "unet" / "config.json").read_text())
  (other / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [16, 32, 64]}))
  expected = r"\(its UNet\) .*: block_out_channels is \(16, 32, 32\) in the tensors, \(16, 32, 64\) in it"
  with pytest.raises(ValueError, match=expected):
    load(f"{sd1.file}+config={other}", components=("unet",))


def test_names_that_are_no_readable_checkpoint_are_refused(sd1, tmp_path):
  (tmp_path / "cut.safetensors").write_bytes(sd1.file.read_bytes()[:-100])
  (tmp_path / "model.ckpt").write_bytes(b"x")
  for name, sentence in (
    (tmp_path / "cut.safetensors", r"cut.safetensors is not a readable safetensors file \(.*\); download or write it"),
    (
      tmp_path / "model.ckpt",
      "model.ckpt is a pickle, which can run code and is never loaded; use .* as .safetensors",
    ),
    (tmp_path / "none.safetensors", "there is no file .*none.safetensors; check the path"),
    ("organisation/none.safetensors", "there is no file organisation/none.safetensors"),
    (f"{sd1.folder}+config={sd1.configs}", "is for a checkpoint in one .safetensors file, which .*folder is not"),
    (
      f"tiny-sd+config={sd1.configs}",
      "is for a checkpoint in one .safetensors file, which tiny-sd is not; leave it out",
    ),
    (f"random:tiny-sd+config={sd1.configs}", "which random:tiny-sd is not; leave it out"),
    (f"{tmp_path / 'none.safetensors'}+config={sd1.configs}", "there is no file .*none.safetensors"),
    (f"{sd1.file}+config={tmp_path / 'none'}", r"config.model_config \(--model_config\): model folder .*none does not"),
    (f"{sd1.file}+config={tmp_path}", "model_index.json is missing"),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as e:
      load(name)
    assert "\n" not in str(e.value)


# ---- parts of a file, and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["whole", "original", "diffusers"])
def test_a_unet_and_a_vae_from_a_file(layout, sd1, tmp_path):
  """In the place of those of a folder."""
  halved = Made.__new__(Made)
  halved.tensors = {k: v / 2 for k, v in sd1.tensors.items()}
  of = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
  files = dict.fromkeys(of, halved.write(tmp_path / "whole.safetensors"))
  for component, prefix in of.items() if layout != "whole" else ():
    files[component] = tmp_path / f"{component}.safetensors"
    alone = {k.removeprefix(prefix): v for k, v in halved.tensors.items() if k.startswith(prefix)}
    if layout == "diffusers":
      alone = {k: v / 2 for k, v in read(sd1.folder)[component].items()}
    safetensors.numpy.save_file(alone, files[component])
  name = f"{sd1.folder}+unet={files['unet']}"
  found = load(name, vae_model=str(files["vae"]))
  expected = {k: jax.tree.map(lambda x: x / 2, v) if k in of else v for k, v in sd1.pipe.params.items()}
  assert_same(found.params, expected)
  assert loading.unet_config(name) == sd1.pipe.unet.config
  assert loading.weight_files(name)["unet"] == [files["unet"]] and loading.vae_files(str(files["vae"])) == [
    files["vae"]
  ]
  assert set(load(name, components=("text_encoder",)).params) == {"text_encoder"}


def test_a_file_of_another_network_takes_no_place(sd1, sdxl, tmp_path):
  lora = sparse(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": (4, 4)})
  with pytest.raises(ValueError, match="lora.safetensors is a LoRA, expected a UNet in the layout of diffusers or of"):
    load(f"{sd1.folder}+unet={lora}")
  with pytest.raises(ValueError, match="lora.safetensors is a LoRA, expected a VAE"):
    load(sd1.folder, vae_model=str(lora))
  expected = (
    r"\(its UNet\) does not hold the tensors that the model's own UNet describes: .*choose one that was made for"
  )
  with pytest.raises(ValueError, match=expected):
    load(f"{sd1.folder}+unet={sdxl.file}")


def test_fingerprints_are_of_the_weights(sd1, tmp_path):
  """Not of the file's name or of what else is in it; and of each network by itself."""
  with_more = sd1.write(tmp_path / "more.safetensors", betas=np.ones(3, np.float32))
  of_unet = "model.diffusion_model.out.2.bias"
  changed = sd1.write(tmp_path / "changed.safetensors", [of_unet], **{of_unet: sd1.tensors[of_unet] + 1})
  names = [f"{file}+config={sd1.configs}" for file in (sd1.file, with_more, changed)]
  a, b, c = (evaluation_folder.fingerprint(name, ()) for name in names)
  assert a == b != c
  found = [{k: tensors.fingerprint(v) for k, v in loading.weight_files(name).items()} for name in names]
  assert found[0] == found[1] and {k for k in found[0] if found[0][k] != found[2][k]} == {"unet"}


def test_names_of_models_to_evaluate(tmp_path):
  """A checkpoint may have a plus in its name, a LoRA beside it and a UNet from a file."""
  for name in ("a+b.safetensors", "m.safetensors", "l.safetensors"):
    (tmp_path / name).write_bytes(b"x")
  at = lambda name: str(tmp_path / name)
  specs = [f"a={at('a+b.safetensors')}", f"b={at('m.safetensors')}+{at('l.safetensors')}:0.5"]
  specs += [f"c={at('m.safetensors')}+unet={at('l.safetensors')}", f"d={at('m.safetensors')}+config=F"]
  found = evaluate.parse_models(specs)
  assert {k: v[0] for k, v in found.items()} == {
    "a": at("a+b.safetensors"),
    "b": at("m.safetensors"),
    "c": f"{at('m.safetensors')}+unet={at('l.safetensors')}",
    "d": f"{at('m.safetensors')}+config=F",
  }
  assert [len(v[1]) for v in found.values()] == [0, 1, 0, 0]
  more = evaluate.with_configs(found, ["a=G", "c=G"])
  assert more["a"][0] == f"{at('a+b.safetensors')}+config=G"
  assert more["c"][0] == f"{at('m.safetensors')}+config=G+unet={at('l.safetensors')}"
  for spec, sentence in (("d=G", "d already has one"), ("x=G", "expected NAME=FOLDER with the name"), ("G", "NAME=F")):
    with pytest.raises(ValueError, match=sentence):
      evaluate.with_configs(found, [spec])
