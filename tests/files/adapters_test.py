"""Adapters in the files of other tools: torch diffusers computes what we compute, and what others wrote is read."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from jaxpref.files import adapter_names, adapters, loading, pipelines
from jaxpref.files import family as families
from jaxpref.files.tensors import save_tree
from jaxpref.models import lora, presets
from tests.files import trees

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

RANK, SCALE = 3, 2.0  # alpha 6
PROMPTS = ["grinning cat", "red apple"]
LATENTS = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
TIMES = np.array([10, 700], np.int32)
TOLERANCE = 1e-5  # of a relative error, in float32
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("proj_in", "proj_out", "conv_shortcut")  # 1x1; the first two are dense in SDXL
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# The block structure of SDXL itself: two layers in each level, of one, two and more transformer blocks.
SDXL_LAYOUT = dataclasses.replace(
  presets.SDXL_MINIATURE,
  unet=dataclasses.replace(presets.SDXL_MINIATURE.unet, layers_per_block=2, transformer_layers_per_block=(1, 2, 3)),
)
MODELS = {
  "sd15-miniature": (presets.ONE_LEVEL, diffusers.StableDiffusionPipeline),
  "sdxl-layout": (SDXL_LAYOUT, diffusers.StableDiffusionXLPipeline),
}


def random_adapter(params, rank=RANK, targets="", size=0.5):
  """Of every dense layer and 1x1 convolution, with a B that is not zero."""
  adapter = lora.init_lora(jax.random.key(1), params, rank=rank, targets=targets)
  rng = np.random.default_rng(2)

  def draw(path, x):
    std = size if path[-1].key == "lora_B" else 1.0
    return std * rng.standard_normal(x.shape).astype(np.float32) / x.shape[-2] ** 0.5

  return jax.tree_util.tree_map_with_path(draw, adapter)


@dataclasses.dataclass
class Both:
  """A pipeline of random weights here and in torch, and an adapter of every linear layer of its UNet."""

  pipe: pipelines.Pipeline
  torch_pipe: Any
  adapter: dict
  compute: object

  def ours(self, adapter, scale, params=None):
    """{"text", ["pooled",] "noise"}: embeddings of the prompts, and the UNet's prediction from them."""
    layers = {n: (np.zeros_like(a), np.zeros_like(b)) for n, (a, b) in lora.to_layers(self.adapter).items()}
    layers |= lora.to_layers(adapter)  # zero where there is none: no second compilation
    padded = lora.from_layers(layers, self.pipe.params["unet"])
    return self.compute(dict(params or self.pipe.params) | {"unet_lora": padded}, jnp.float32(scale))

  def theirs(self, torch_pipe=None):
    """The same of torch diffusers, as it stands."""
    pipe, added = torch_pipe or self.torch_pipe, {}
    with torch.no_grad():
      out = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
      if len(out) == 4:
        added = {"text_embeds": out[2], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
      x = torch.from_numpy(LATENTS).permute(0, 3, 1, 2)
      noise = pipe.unet(x, torch.from_numpy(TIMES), out[0], added_cond_kwargs=added).sample
    pooled = {"pooled": added["text_embeds"]} if added else {}
    return {k: v.numpy() for k, v in ({"text": out[0], "noise": noise.permute(0, 2, 3, 1)} | pooled).items()}

  def theirs_with(self, file):
    self.torch_pipe.load_lora_weights(file)
    try:
      return self.theirs()
    finally:
      self.torch_pipe.unload_lora_weights()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """More would wait for each other longer than they compute."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(MODELS))
def both(request, tmp_path_factory):
  preset, pipeline_class = MODELS[request.param]
  pipe = pipelines.random_pipeline(preset, 3)
  model = loading.text_to_image(pipe)
  ids = pipe.tokenize(PROMPTS)

  @jax.jit
  def compute(params, scale):
    adapted = dataclasses.replace(model, lora_scale=scale)
    cond = adapted.encode_text(params, ids)
    pooled = {"pooled": cond["added_cond_kwargs"]["text_embeds"]} if "added_cond_kwargs" in cond else {}
    noise = adapted.predict(params, LATENTS, TIMES, cond)
    return {"text": cond["encoder_hidden_states"], "noise": noise} | pooled

  folder = pipelines.save_pipeline(tmp_path_factory.mktemp("base") / "base", pipe)
  torch_pipe = pipeline_class.from_pretrained(folder, dtype=torch.float32)
  return Both(pipe, torch_pipe, random_adapter(pipe.params["unet"]), compute)


def difference(a, b):
  """The largest relative error of the outputs."""
  assert a.keys() == b.keys()
  return max(float(np.linalg.norm(a[k] - b[k]) / np.linalg.norm(b[k])) for k in a)


def test_diffusers_computes_the_same_from_every_file(both, tmp_path):
  """Merged, as a diffusers file and as a kohya file, which diffusers converts with its own table of names."""
  ours, base = both.ours(both.adapter, SCALE), both.theirs()
  assert difference(ours, base) > 0.1, "an adapter without effect shows nothing"
  assert difference(both.ours(both.adapter, SCALE / 2), ours) > 0.01, "a lost alpha would not show"
  unet = both.pipe.unet.config
  adapters.save_diffusers(tmp_path / adapters.DIFFUSERS_FILE, both.adapter, SCALE)
  adapters.save_kohya(tmp_path / "kohya.safetensors", both.adapter, SCALE, unet)
  of, trained = families.get("stable_diffusion"), {"unet_lora": both.adapter}
  families.save_trained(of, tmp_path / "merged", both.pipe, trained, scale=SCALE, name="", dtype=jnp.float32)
  merged = type(both.torch_pipe).from_pretrained(tmp_path / "merged", dtype=torch.float32)
  outputs = {
    "merged": both.theirs(merged),
    "diffusers": both.theirs_with(tmp_path),
    "beside the merged": both.theirs_with(tmp_path / "merged"),
    "kohya": both.theirs_with(tmp_path / "kohya.safetensors"),
  }
  differences = {name: difference(ours, theirs) for name, theirs in outputs.items()}
  assert max(differences.values()) <= TOLERANCE, differences
  assert difference(both.theirs(), base) == 0


def test_what_is_written_is_read_again_exactly(both, tmp_path):
  unet, params = both.pipe.unet.config, both.pipe.params["unet"]
  adapters.save_diffusers(tmp_path / "a.safetensors", both.adapter, SCALE)
  adapters.save_kohya(tmp_path / "b.safetensors", both.adapter, SCALE, unet)
  for name in "ab":
    adapter, scale = adapters.load_lora(tmp_path / f"{name}.safetensors", unet, params)
    assert scale == SCALE
    jax.tree.map(np.testing.assert_array_equal, adapter, both.adapter)


def trained_by_peft(network, targets):
  """Puts an adapter of rank 3 and alpha 6 into a torch network -> its tensors."""
  config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, init_lora_weights=False)
  torch.manual_seed(0)
  # PEFT by itself: transformers 5.24 has an `add_adapter` that asks for a version of PEFT that is not released.
  peft.inject_adapter_in_model(config, network, adapter_name="default")
  return {k: v.clone() for k, v in peft.get_peft_model_state_dict(network, adapter_name="default").items()}


def test_a_file_of_diffusers_is_read(both, tmp_path):
  """Trained with PEFT; saved by today's diffusers, without metadata, and in its older names."""
  torch_unet = both.torch_pipe.unet
  state = trained_by_peft(torch_unet, [*ATTENTION, *CONVOLUTIONS])
  try:
    theirs = both.theirs()
    metadata = diffusers.training_utils._collate_lora_metadata({"unet": torch_unet})
  finally:
    torch_unet.unload_lora()
  assert any(x.ndim == 4 for x in state.values())
  save = type(both.torch_pipe).save_lora_weights
  save(tmp_path / "new", state, unet_lora_adapter_metadata=metadata["unet_lora_adapter_metadata"])
  unscaled = {k: v * SCALE if ".lora_B." in k else v for k, v in state.items()}
  save(tmp_path / "bare", unscaled)
  save(tmp_path / "old", diffusers.utils.convert_state_dict_to_diffusers(unscaled))
  for name, scale in {"new": SCALE, "bare": 1.0, "old": 1.0}.items():
    file = tmp_path / name / adapters.DIFFUSERS_FILE
    adapter, found = adapters.load_lora(file, both.pipe.unet.config, both.pipe.params["unet"])
    assert found == scale and adapters.adapter_rank(adapter) == RANK
    assert difference(both.ours(adapter, scale), theirs) <= TOLERANCE, name
  assert difference(theirs, both.theirs()) > 0.01


def test_some_layers_of_a_stack(both, tmp_path):
  """What the file does not adapt stays as it is, and is left out when the adapter is written again."""
  torch_unet, unet, params = both.torch_pipe.unet, both.pipe.unet.config, both.pipe.params["unet"]
  state = trained_by_peft(torch_unet, r"mid_block.*attn2\.to_q|up_blocks.*\.0\.attn1\.to_k|down_.*proj_in")
  theirs = both.theirs()
  torch_unet.unload_lora()
  assert difference(theirs, both.theirs()) > 0.001
  unscaled = {k: v * SCALE if ".lora_B." in k else v for k, v in state.items()}
  both.torch_pipe.save_lora_weights(tmp_path, unscaled)
  file = tmp_path / adapters.DIFFUSERS_FILE
  adapter, scale = adapters.load_lora(file, unet, params)
  assert difference(both.ours(adapter, scale), theirs) <= TOLERANCE
  adapters.save_diffusers(tmp_path / "again.safetensors", adapter, scale)
  again, expected = load_file(tmp_path / "again.safetensors"), load_file(file)
  assert again.keys() == expected.keys()
  for key, tensor in expected.items():
    np.testing.assert_array_equal(again[key], tensor)
  adapters.save_kohya(tmp_path / "kohya.safetensors", adapter, scale, unet)
  assert len(load_file(tmp_path / "kohya.safetensors")) == 3 * len(expected) // 2


@pytest.mark.parametrize("both", ["sd15-miniature", pytest.param("sdxl-layout", marks=pytest.mark.slow)], indirect=True)
def test_several_files_act_together_by_their_strengths(both, tmp_path):
  """As diffusers' set_adapters has them; of a UNet and of text encoders, of different ranks and layers."""
  pipe, unet, params = both.torch_pipe, both.pipe.unet.config, both.pipe.params
  second = random_adapter(params["unet"], rank=2, targets=lora.ATTENTION_TARGETS)
  adapters.save_diffusers(tmp_path / "a.safetensors", both.adapter, SCALE)
  adapters.save_diffusers(tmp_path / "b.safetensors", second, 1.0)
  width = both.pipe.text_encoder.config.hidden_size
  rng, name = np.random.default_rng(5), "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"
  for file, rank in (("a", RANK), ("b", 2)):
    a, b = factors(rng, rank, width, width)
    tensors = load_file(tmp_path / f"{file}.safetensors")
    tensors |= {f"{name}.lora_A.weight": 0.3 * a, f"{name}.lora_B.weight": b}
    save_file({k: SCALE * v if file == "a" and ".lora_B." in k else v for k, v in tensors.items()}, tmp_path / file)
  files = []
  for file, strength in {"a": 0.8, "b": -0.5}.items():
    path = (tmp_path / file).rename(tmp_path / f"{file}.safetensors")
    files.append(adapters.parse_lora_file(f"{path}:{strength}"))
    pipe.load_lora_weights(path, adapter_name=file)
  try:
    pipe.set_adapters(["a", "b"], adapter_weights=[0.8, -0.5])
    theirs = both.theirs()
  finally:
    pipe.unload_lora_weights()
  adapter, scale, text_encoders = adapters.load_pipeline_loras(files, unet, params)
  assert scale == 1.0 and adapters.adapter_rank(adapter) == RANK + 2
  ours = both.ours(adapter, scale, adapters.merge_text_encoders(params, text_encoders))
  assert difference(ours, theirs) <= TOLERANCE
  for alone in files:
    adapter, scale, text_encoders = adapters.load_pipeline_loras([alone], unet, params)
    with_one = both.ours(adapter, scale, adapters.merge_text_encoders(params, text_encoders))
    assert difference(with_one, theirs) > 0.01, "one of the files does nothing"


def kohya_name(key, config):
  """Of a layer in PEFT's names, as sd-scripts write it."""
  component, _, layer = key.partition(".")
  sdxl = config.addition_embed_type is not None
  if component == "unet":
    return "lora_unet_" + (adapter_names.ldm_name(layer, config) if sdxl else layer).replace(".", "_")
  te = {"text_encoder": "lora_te1" if sdxl else "lora_te", "text_encoder_2": "lora_te2"}[component]
  return f"{te}_text_model_{layer.removeprefix('text_model.').replace('.', '_')}"


def test_text_encoders_are_merged(both, tmp_path):
  """Trained with PEFT; saved by diffusers, and in kohya's names."""
  pipe, unet = both.torch_pipe, both.pipe.unet.config
  names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
  states = {name: trained_by_peft(getattr(pipe, name), list(TEXT_LAYERS)) for name in names}
  states["unet"] = trained_by_peft(pipe.unet, list(ATTENTION))
  theirs = both.theirs()
  metadata = {f"{name}_lora_adapter_metadata": getattr(pipe, name).peft_config["default"].to_dict() for name in states}
  pipe.unload_lora_weights()
  base = both.theirs()
  assert difference(theirs, base) > 0.01 and np.linalg.norm(theirs["text"] - base["text"]) > 0.1

  pipe.save_lora_weights(tmp_path, **{f"{name}_lora_layers": state for name, state in states.items()}, **metadata)
  file = tmp_path / adapters.DIFFUSERS_FILE
  kohya = {}
  for key, tensor in load_file(file).items():
    name, part = kohya_name(key.partition(".lora_")[0], unet), {"A": "down", "B": "up"}[key[-len("A.weight")]]
    kohya |= {f"{name}.lora_{part}.weight": tensor, f"{name}.alpha": np.array(6, np.float32)}
  save_file(kohya, tmp_path / "kohya.safetensors")
  for path in (file, tmp_path / "kohya.safetensors"):
    assert difference(both.theirs_with(path), theirs) <= TOLERANCE, "of the files themselves"
    adapter, scale, text_encoders = adapters.load_pipeline_lora(path, unet, both.pipe.params)
    assert sorted(text_encoders) == names
    params = adapters.merge_text_encoders(both.pipe.params, text_encoders)
    assert difference(both.ours(adapter, scale, params), theirs) <= TOLERANCE, path
    continued, its_scale = adapters.load_lora(path, unet, both.pipe.params["unet"])
    of_text = adapters.load_text_encoder_loras(path, unet, {name: both.pipe.params[name] for name in names})
    jax.tree.map(np.testing.assert_array_equal, (continued, of_text), (adapter, text_encoders))
    assert its_scale == scale
  written = tmp_path / "d.safetensors", tmp_path / "k.safetensors"
  adapters.save_diffusers(written[0], adapter, scale, text=text_encoders)
  adapters.save_kohya(written[1], adapter, scale, unet, text=text_encoders)
  for path in written:
    assert difference(both.theirs_with(path), theirs) <= TOLERANCE, path


# ---- Names and numbers, without drawing ------------------------------------------------------------------------------

UNET = presets.SD15_MINIATURE.unet
PARAMS = presets.abstract_params(pipelines.UNet2DConditionModel(UNET))
LAYERS = [f"mid_block.attentions.0.transformer_blocks.0.attn1.{name}" for name in ATTENTION]
CONVOLUTION = "mid_block.attentions.0.proj_in"


def test_sdxl_has_the_names_of_the_original_implementation():
  """As files of kohya's sd-scripts have them."""

  def block(layer):
    name = adapter_names.ldm_name(f"{layer}.transformer_blocks.1.attn2.to_out.0", presets.SDXL.unet)
    return name.removesuffix(".transformer_blocks.1.attn2.to_out.0")

  names = {
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
  }
  assert {layer: block(layer) for layer in names} == names
  others = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks.2.0.emb_layers.1",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "up_blocks.2.resnets.0.time_emb_proj": "output_blocks.6.0.emb_layers.1",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
  }
  assert {layer: adapter_names.ldm_name(layer, presets.SDXL.unet) for layer in others} == others


def test_keys_and_metadata_of_the_files(tmp_path):
  adapter = random_adapter(PARAMS, targets=r"(to_q|to_k|to_v|to_out\.0|proj_in)$")
  adapters.save_diffusers(tmp_path / "a.safetensors", adapter, 2.0, dtype=jnp.float16)
  adapters.save_kohya(tmp_path / "b.safetensors", adapter, 2.0, UNET, dtype=jnp.float16)
  with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as f:
    assert len(f.keys()) == 2 * len(lora.to_layers(adapter))
    a, b = (f.get_tensor(f"unet.{LAYERS[0]}.lora_{x}.weight") for x in "AB")
    assert a.shape == (RANK, 32) and b.shape == (32, RANK) and a.dtype == np.float16
    a, b = (f.get_tensor(f"unet.{CONVOLUTION}.lora_{x}.weight") for x in "AB")
    assert a.shape == (RANK, 32, 1, 1) and b.shape == (32, RANK, 1, 1)
    metadata = f.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 6
  name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
  with safetensors.safe_open(tmp_path / "b.safetensors", framework="numpy") as f:
    assert len(f.keys()) == 3 * len(lora.to_layers(adapter))
    assert f.get_tensor(f"{name}.lora_down.weight").shape == (RANK, 32)
    assert f.get_tensor(f"{name}.lora_up.weight").shape == (32, RANK)
    assert f.get_tensor(f"{name}.alpha").shape == () and f.get_tensor(f"{name}.alpha") == 6
    assert f.get_tensor("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight").shape == (RANK, 32, 1, 1)
    assert f.get_tensor("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight").shape == (32, RANK, 1, 1)
    metadata = f.metadata()
  assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_v2"] == "False"
  assert metadata["ss_network_dim"] == "3" and metadata["ss_network_alpha"] == "6.0"
  adapters.save_kohya(
    tmp_path / "c.safetensors", random_adapter(SDXL_PARAMS, targets="attn1.to_q$"), 1.0, SDXL_LAYOUT.unet
  )
  with safetensors.safe_open(tmp_path / "c.safetensors", framework="numpy") as f:
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight" in f.keys()
    assert "lora_unet_output_blocks_5_1_transformer_blocks_1_attn1_to_q.alpha" in f.keys()
    assert f.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


SDXL_PARAMS = presets.abstract_params(pipelines.UNet2DConditionModel(SDXL_LAYOUT.unet))


def deltas(adapter, scale):
  """The changes of the weights, [in, out] or [1, 1, in, out]."""
  return {name: scale * np.asarray(a) @ np.asarray(b) for name, (a, b) in lora.to_layers(adapter).items()}


def factors(rng, rank, fan_in=32, fan_out=32):
  """lora_A [r, in] and lora_B [out, r] as in files."""
  return [rng.standard_normal(shape).astype(np.float32) for shape in ((rank, fan_in), (fan_out, rank))]


FORMS = {
  "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "."),
  "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", "."),
  "named": ("unet.{}.lora_A.default.weight", "unet.{}.lora_B.default.weight", "."),
  "dotted kohya": ("unet.{}.lora_down.weight", "unet.{}.lora_up.weight", "."),
  "before PEFT": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "."),
  "processors": ("{}_lora.down.weight", "{}_lora.up.weight", "processor"),
  "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "_"),
  "kohya, original": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "ldm"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised(form, tmp_path):
  down, up, style = FORMS[form]
  rng, tensors, expected = np.random.default_rng(0), {}, {}
  for layer in [*LAYERS, CONVOLUTION]:
    a, b = factors(rng, 2)
    expected[layer] = b @ a
    if layer == CONVOLUTION:
      a, b = a[..., None, None], b[..., None, None]
    name = layer
    if style == "processor":
      name = layer.replace(".to_", ".processor.to_").removesuffix(".0")
    elif style != ".":
      name = (adapter_names.ldm_name(layer, UNET) if style == "ldm" else layer).replace(".", "_")
    tensors |= {down.format(name): a, up.format(name): b}
  save_file(tensors, tmp_path / "x.safetensors")
  factor = 1.0
  if form == "peft":
    with pytest.raises(FileNotFoundError, match="no adapter_config.json beside it, which says its alpha"):
      adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 5}))
    factor = 2.5
  adapter, scale = adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)
  assert scale == factor
  found = deltas(adapter, 1.0)
  assert found.keys() == expected.keys() and found[CONVOLUTION].shape == (1, 1, 32, 32)
  for layer, delta in found.items():
    np.testing.assert_allclose(delta.reshape(32, 32).T, expected[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_precision_is_read(dtype, tmp_path):
  a, b = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in factors(np.random.default_rng(0), 2))
  tensors = {f"unet.{LAYERS[0]}.lora_A.weight": a, f"unet.{LAYERS[0]}.lora_B.weight": b}
  safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
  adapter, _ = adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)
  ((found, _),) = lora.to_layers(adapter).values()
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, a.float().numpy().T)


def test_different_ranks_and_alphas_become_one(tmp_path):
  """Of kohya's files by their alphas, of PEFT's by patterns."""
  rng, kohya, diffusers_form, expected = np.random.default_rng(0), {}, {}, {}
  ranks, alphas = (4, 2, 4, 1), (2.0, 1.0, 8.0, 3.0)
  for layer, rank, alpha in zip(LAYERS, ranks, alphas, strict=True):
    a, b = factors(rng, rank)
    expected[layer] = alpha / rank * (b @ a).T
    name = "lora_unet_" + layer.replace(".", "_")
    kohya |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": np.array(alpha, np.float32)}
    diffusers_form |= {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": b}
  config = {
    "unet.r": 4,
    "unet.lora_alpha": 2.0,
    "unet.alpha_pattern": {"to_k": 1.0, "attn1.to_v": 8.0, f"^{LAYERS[3]}": 3.0},
  }
  save_file(kohya, tmp_path / "a.safetensors")
  save_file(diffusers_form, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(config)})
  for name in "ab":
    adapter, scale = adapters.load_lora(tmp_path / f"{name}.safetensors", UNET, PARAMS)
    assert scale == 0.5 and adapters.adapter_rank(adapter) == 4
    found = deltas(adapter, scale)
    assert found.keys() == expected.keys()
    for layer, delta in expected.items():
      np.testing.assert_allclose(found[layer], delta, rtol=1e-4, atol=1e-4)


def test_different_ranks_in_a_stack_of_which_one_layer_is_missing(tmp_path):
  layers = [f"mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(3)]
  rng, tensors, expected = np.random.default_rng(0), {}, {layers[1]: np.zeros((32, 32))}
  for layer, rank in ((layers[0], 4), (layers[2], 1)):
    a, b = factors(rng, rank)
    expected[layer] = (b @ a).T
    tensors |= {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": b}
  save_file(tensors, tmp_path / "x.safetensors")
  found = deltas(*adapters.load_lora(tmp_path / "x.safetensors", SDXL_LAYOUT.unet, SDXL_PARAMS))
  assert found.keys() == expected.keys()
  for layer, delta in expected.items():
    np.testing.assert_allclose(found[layer], delta, rtol=1e-5, atol=1e-5)


def test_layers_of_rank_0_are_left_out_with_a_warning(tmp_path):
  """As tools that resize adapters write them, and as PEFT cannot."""
  empty = [x[:0] if x is A else x[:, :0] for x in (A, B)]
  emptied = {f"unet.{LAYERS[1]}.lora_{part}.weight": x for part, x in zip("AB", empty, strict=True)}
  emptied[f"unet.{LAYERS[1]}.alpha"] = np.array(4.0, np.float32)
  save_file({**GOOD, **emptied}, tmp_path / "x.safetensors")
  save_file(GOOD, tmp_path / "good.safetensors")
  with pytest.warns(UserWarning, match=rf"x.safetensors: 1 layers of rank 0 were left out: {re.escape(LAYERS[1])}\."):
    found, scale = adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)
  expected, expected_scale = adapters.load_lora(tmp_path / "good.safetensors", UNET, PARAMS)
  assert scale == expected_scale
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  save_file(emptied, tmp_path / "x.safetensors")
  with pytest.warns(UserWarning, match="rank 0"), pytest.raises(ValueError, match="x.safetensors holds no adapter of"):
    adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)


def test_a_null_alpha_of_peft_means_the_rank(tmp_path):
  metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": None, "unet.alpha_pattern": None})}
  save_file(GOOD, tmp_path / "x.safetensors", metadata)
  assert adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)[1] == 1.0


def test_rank_stabilised_scale(tmp_path):
  a, b = factors(np.random.default_rng(0), 4)
  tensors = {f"unet.{LAYERS[0]}.lora_A.weight": a, f"unet.{LAYERS[0]}.lora_B.weight": b}
  config = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True}
  save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
  assert adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)[1] == 3.0


def test_an_alpha_that_half_precision_lacks_is_kept(tmp_path):
  adapter = random_adapter(PARAMS, targets="attn1.to_q$")
  scale = 1 / 7
  adapters.save_kohya(tmp_path / "x.safetensors", adapter, scale, UNET, dtype=jnp.float16)
  again, found = adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)
  for (layer, a), b in zip(deltas(adapter, scale).items(), deltas(again, found).values(), strict=True):
    assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(a), layer


A, B = factors(np.random.default_rng(0), 2)
GOOD = {f"unet.{LAYERS[0]}.lora_A.weight": A, f"unet.{LAYERS[0]}.lora_B.weight": B}
KOHYA = "lora_unet_mid_block_attentions_0"
TEXT = {
  "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": A,
  "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": B,
}
LOCON = {
  "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": A[..., None, None] * np.ones((3, 3), np.float32),
  "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": B[..., None, None],
}
MERGE = "expected LoRA; merge it into the base model first"


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    (TEXT, r"holds no adapter of a UNet; give the path of a LoRA file"),
    ({}, "holds no adapter of a UNet"),
    ({f"{KOHYA}_proj_in.hada_w1_a": A}, r"another kind, LoHa \(1 tensors such as .*hada_w1_a\), " + MERGE),
    ({f"{KOHYA}_proj_in.lokr_w2": A, f"{KOHYA}_proj_in.lokr_w1": A}, r"LoKr \(2 tensors such as .*lokr_w1\), " + MERGE),
    ({f"{KOHYA}_proj_in.on_input": A, f"{KOHYA}_proj_in.weight": A}, r"\(IA\)\^3 \(1 tensors such as .*on_input\)"),
    ({f"base_model.model.{LAYERS[0]}.ia3_l": A}, r"\(IA\)\^3 \(1 tensors such as .*ia3_l\), " + MERGE),
    ({**GOOD, f"unet.{LAYERS[0]}.lora_magnitude_vector": A}, r"DoRA \(1 tensors such as .*_magnitude_vector\)"),
    ({**GOOD, f"{KOHYA}_proj_in.dora_scale": A}, r"DoRA \(1 tensors such as .*dora_scale\), " + MERGE),
    ({**GOOD, f"{KOHYA}_proj_in.oft_blocks": A}, r"OFT \(1 tensors such as .*oft_blocks\), " + MERGE),
    ({**GOOD, f"{KOHYA}_norm.diff_b": A}, r"full-rank difference \(1 tensors such as .*diff_b\), " + MERGE),
    ({**GOOD, f"{KOHYA}_proj_in.scalar": A}, r"holds 1 tensors such as .*proj_in.scalar, expected low-rank factors"),
    (
      {**GOOD, **LOCON},
      r"adapts 1 convolutions larger than 1x1, such as mid_block_resnets_0_conv1 \(LoCon, kohya's conv_dim\)",
    ),
    (
      {**GOOD, **{f"lora_unet_{LAYERS[0].replace('.', '_')}.lora_{x}.weight": y for x, y in (("up", B), ("down", A))}},
      "x.safetensors holds mid_block.*to_q twice, once as ",
    ),
    ({f"unet.{LAYERS[0]}.lora_A.weight": A}, r"attn1.to_q has only down, expected both"),
    ({**GOOD, f"unet.{LAYERS[0]}.lora_B.weight": B[:, :1]}, r"are \[2, 32\] and \[32, 1\], expected \[r, in\]"),
    ({**GOOD, f"unet.{LAYERS[0]}.lora_B.weight": B * np.nan}, r"attn1.to_q holds NaN"),
    ({**GOOD, f"unet.{LAYERS[0]}.alpha": np.array(np.nan, np.float32)}, r"attn1.to_q has alpha nan"),
    (
      {"lora_unet_input_blocks_9_1_to_q.lora_down.weight": A, "lora_unet_input_blocks_9_1_to_q.lora_up.weight": B},
      r"x.safetensors: unet: LoRA for another network: input_blocks_9_1_to_q is not a linear layer",
    ),
    (
      {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": np.ones((2, 2048), np.float32),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": np.ones((640, 2), np.float32),
      },
      r"unet: it was made for Stable Diffusion XL, and the model is another: LoRA for another network",
    ),
    (
      {
        f"lora_unet_double_blocks_{i}_img_mlp_0.lora_{x}.weight": y
        for i in range(9)
        for x, y in (("up", B), ("down", A))
      },
      r"it was made for Flux, .*: double_blocks_0_.*_4_img_mlp_0 is not a linear layer of the network and 4 more; use",
    ),
    (
      {f"unet.{LAYERS[0]}.lora_A.weight": A[:, :16], f"unet.{LAYERS[0]}.lora_B.weight": B},
      r"LoRA for another network: mid_block.*attn1.to_q has 16 x 32 features, expected 32 x 32",
    ),
  ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(tensors, message, tmp_path):
  save_file(tensors, tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match=message) as error:
    adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)
  assert str(tmp_path) in str(error.value)


ENCODERS = {
  name: presets.abstract_params(pipelines.CLIPTextModel(config, with_projection))
  for name, config, with_projection in (
    ("text_encoder", SDXL_LAYOUT.text_encoder, False),
    ("text_encoder_2", SDXL_LAYOUT.text_encoder_2, True),
  )
}
TEXT_FORMS = {
  "kohya": ("lora_te2_text_model_encoder_layers_1_", "lora_{}.weight"),
  "diffusers": ("text_encoder_2.text_model.encoder.layers.1.", "lora_{}.weight"),
  "transformers 5": ("text_encoder_2.encoder.layers.1.", "lora_{}.weight"),
  "before PEFT": ("text_encoder_2.text_model.encoder.layers.1.", "lora_linear_layer.{}.weight"),
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_every_form_of_text_encoders_is_recognised(form, tmp_path):
  prefix, suffix = TEXT_FORMS[form]
  a, b = factors(np.random.default_rng(0), 2, 24, 24)
  parts = {suffix.format("down"): a, suffix.format("up"): 3.0 * b}
  tensors = {}
  for layer in ("self_attn.q_proj", "self_attn.out_proj"):
    if form == "kohya":
      layer = layer.replace(".", "_")
      parts["alpha"] = np.array(4.0, np.float32)  # twice the rank
    tensors |= {f"{prefix}{layer}.{part}": x for part, x in parts.items()}
  tensors |= {f"text_encoder_2.text_projection.lora_{x}.weight": y[:16] for x, y in (("A", a), ("B", b))}
  save_file(tensors, tmp_path / "x.safetensors")
  params = {"unet": SDXL_PARAMS, **ENCODERS}
  adapter, scale, text_encoders = adapters.load_pipeline_lora(tmp_path / "x.safetensors", SDXL_LAYOUT.unet, params)
  assert adapter == {} and scale == 1.0 and list(text_encoders) == ["text_encoder_2"]
  found = deltas(text_encoders["text_encoder_2"], 1.0)
  np.testing.assert_allclose(found.pop("text_projection"), (b[:16] @ a).T, rtol=1e-4, atol=1e-4)
  assert list(found) == [f"text_model.encoder.layers.1.self_attn.{name}_proj" for name in ("out", "q")]
  for delta in found.values():
    np.testing.assert_allclose(delta, (6.0 if form == "kohya" else 3.0) * (b @ a).T, rtol=1e-4, atol=1e-4)

  del params["text_encoder_2"]
  with pytest.raises(ValueError, match="adapts text_encoder_2, which the model does not have; use it with"):
    adapters.load_pipeline_lora(tmp_path / "x.safetensors", SDXL_LAYOUT.unet, params)


# How other tools name the layers of SDXL: their name -> its component and name in a diffusers folder.
SDXL_NAMES = {
  "unet": {
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.5.1.transformer_blocks.1.attn1.to_out.0": (
      "down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_out.0"
    ),
    "middle_block.1.transformer_blocks.2.attn2.to_k": "mid_block.attentions.0.transformer_blocks.2.attn2.to_k",
    "output_blocks.5.1.transformer_blocks.0.ff.net.2": "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
    "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
  },
  "text_encoder": {"text_model.encoder.layers.1.mlp.fc1": "text_model.encoder.layers.1.mlp.fc1"},
  "text_encoder_2": {
    "text_model.encoder.layers.0.self_attn.q_proj": "text_model.encoder.layers.0.self_attn.q_proj",
    "text_projection": "text_projection",
  },
}
TOOLS = {
  "OneTrainer": {"unet": "unet.", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."},
  "ComfyUI": {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
  },
}


@pytest.mark.parametrize("tool", TOOLS)
def test_files_of_other_tools_are_merged_as_by_hand(tool, tmp_path):
  """Every weight of the merged model, against kernel + alpha / rank * up @ down of the same keys in numpy."""
  rng = np.random.default_rng(0)
  params = {name: trees.draw(shapes) for name, shapes in {"unet": SDXL_PARAMS, **ENCODERS}.items()}
  file, written = tmp_path / "x.safetensors", {}
  expected = {name: stored(tree, tmp_path) for name, tree in params.items()}
  for component, layers in SDXL_NAMES.items():
    for name, own in layers.items():
      weight = expected[component][f"{own}.weight"]
      down, up = factors(rng, 2, weight.shape[1], weight.shape[0])
      key = TOOLS[tool][component] + name
      written |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.float32(3.0)}
      expected[component][f"{own}.weight"] = weight + 1.5 * up @ down
  written |= {"bundle_emb.my-style.clip_l": A, "bundle_emb.my-style.clip_g": A, "bundle_emb.v1.5.string_to_param.*": B}
  projection = f"{TOOLS[tool]['text_encoder']}text_projection"
  written |= {f"{projection}.lora_down.weight": A, f"{projection}.lora_up.weight": B}
  save_file({key: np.asarray(x) for key, x in written.items()}, file)
  with pytest.warns(UserWarning) as warned:
    adapter, scale, text_encoders = adapters.load_pipeline_lora(file, SDXL_LAYOUT.unet, params)
  said = [str(w.message) for w in warned]
  assert any(
    f"{file}: its embeddings of new words were left out (my-style, v1.5): the tokenizer does" in s for s in said
  )
  assert any(f"{file}: text_projection was left out: the model's text_encoder has none." in s for s in said)
  assert len(said) == 2
  merged = adapters.merge_text_encoders(params, text_encoders)
  merged["unet"] = lora.merge_lora(params["unet"], adapter, scale)
  for component, tensors in expected.items():
    found = stored(merged[component], tmp_path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
      np.testing.assert_allclose(found[key], tensor, rtol=1e-5, atol=1e-5, err_msg=key)


def stored(tree, folder):
  """A network's tensors as its file has them."""
  save_tree(folder / "stored.safetensors", tree)
  return load_file(folder / "stored.safetensors")


def test_attention_of_text_encoders_in_names_of_the_unet(tmp_path):
  """As diffusers wrote them at first."""
  a, b = factors(np.random.default_rng(0), 2, 16, 16)
  layer = "text_encoder.text_model.encoder.layers.0.self_attn"
  names = {"to_q": "q_proj", "to_out": "out_proj"}
  tensors = {f"{layer}.{name}_lora.{part}.weight": x for name in names for part, x in (("down", a), ("up", b))}
  save_file(tensors, tmp_path / "x.safetensors")
  params = {"unet": SDXL_PARAMS, **ENCODERS}
  _, _, found = adapters.load_pipeline_lora(tmp_path / "x.safetensors", SDXL_LAYOUT.unet, params)
  expected = {f"{layer.removeprefix('text_encoder.')}.{name}" for name in names.values()}
  assert lora.to_layers(found["text_encoder"]).keys() == expected


def test_what_is_no_safetensors_file_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no LoRA file .*x.safetensors"):
    adapters.load_lora(tmp_path / "x.safetensors", UNET, PARAMS)
  for name, message in {"x.bin": "pickles can run code", "x.safetensors": "is not a readable safetensors file"}.items():
    (tmp_path / name).write_bytes(b"\x80\x04K*.")
    with pytest.raises(ValueError, match=message):
      adapters.load_lora(tmp_path / name, UNET, PARAMS)
  save_file(GOOD, tmp_path / "y.safetensors", {"lora_adapter_metadata": "{"})
  with pytest.raises(ValueError, match="the metadata of .*y.safetensors is not a JSON object"):
    adapters.load_lora(tmp_path / "y.safetensors", UNET, PARAMS)


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path):
  adapter = random_adapter(PARAMS, targets="attn1.to_q$", size=np.nan)
  with pytest.raises(ValueError, match="lora_B.weight holds NaN or infinity, which is not saved"):
    adapters.save_diffusers(tmp_path / "x.safetensors", adapter, 1.0)
  assert list(tmp_path.iterdir()) == []
