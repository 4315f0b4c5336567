"""LoRA files of Stable Diffusion 3: torch diffusers computes what we compute; kohya's are merged as by hand."""

import dataclasses
import re
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.numpy import load_file, save_file

from jaxpref.files import adapters, pipelines, sd3, sd3_adapters
from jaxpref.files.tensors import save_tree
from jaxpref.models import lora, presets
from jaxpref.models.sd3.model import StableDiffusion3
from jaxpref.models.sd3.presets import PRESETS
from jaxpref.models.sd3.transformer import LORA_TARGETS, SD3Transformer2DModel
from tests.files import trees

RANK, SCALE = 3, 2.0  # alpha 6
TOLERANCE = 1e-5  # of a relative error, in float32
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
TIMES = np.array([3.0, 700.0], np.float32)
TEXT = RNG.standard_normal((2, 7, 48)).astype(np.float32)
POOLED = RNG.standard_normal((2, 40)).astype(np.float32)
MODELS = ("sd3-miniature", "sd35-miniature")


def random_adapter(params, rank=RANK, targets="", seed=2):
  """Of every linear layer, with a B that is not zero."""
  adapter = lora.init_lora(jax.random.key(1), params, rank=rank, targets=targets)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.float32(0.5 / x.shape[-2] ** 0.5) * rng.standard_normal(x.shape, np.float32), adapter
  )


@dataclasses.dataclass
class Both:
  """A pipeline of random weights here and in torch, and an adapter of every linear layer of its transformer."""

  pipe: sd3.SD3Pipeline
  torch_pipe: Any
  adapter: dict
  compute: Any

  @property
  def params(self):
    return self.pipe.params["transformer"]

  def ours(self, adapter, scale):
    """The velocity with an adapter."""
    return np.asarray(self.compute(dict(self.pipe.params) | {"transformer": merged(self.params, adapter, scale)}))

  def theirs(self):
    """The velocity of torch diffusers as it stands."""
    inputs = (torch.from_numpy(x) for x in (LATENTS.transpose(0, 3, 1, 2), TEXT, POOLED, TIMES))
    with torch.no_grad():
      return self.torch_pipe.transformer(*inputs).sample.permute(0, 2, 3, 1).numpy()

  def theirs_with(self, file):
    self.torch_pipe.load_lora_weights(file)
    try:
      return self.theirs()
    finally:
      self.torch_pipe.unload_lora_weights()


def merged(params, adapter, scale):
  return jax.jit(lora.merge_lora)(params, adapter, scale)


def model_of(pipe, scale=1.0):
  return StableDiffusion3(**pipe.modules, process=None, max_sequence_length=7, lora_scale=scale)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """More would wait for each other longer than they compute."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
  pipe = sd3.random_pipeline(request.param, 3)
  pipe = sd3.without_t5(dataclasses.replace(pipe, params=trees.randomised(pipe.params)))
  folder = sd3.save_pipeline(tmp_path_factory.mktemp("base") / "base", pipe)
  absent = {"text_encoder_3": None, "tokenizer_3": None}
  torch_pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **absent)
  cond = {"encoder_hidden_states": TEXT, "pooled_projections": POOLED}
  compute = jax.jit(lambda params: model_of(pipe).predict(params, LATENTS, TIMES, cond))
  return Both(pipe, torch_pipe, random_adapter(pipe.params["transformer"]), compute)


def difference(a, b):
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_diffusers_computes_the_same_from_a_file_of_every_layer(both, tmp_path):
  base, cond = both.theirs(), {"encoder_hidden_states": TEXT, "pooled_projections": POOLED}
  params = dict(both.pipe.params) | {"transformer_lora": both.adapter}
  ours = np.asarray(jax.jit(model_of(both.pipe, SCALE).predict)(params, LATENTS, TIMES, cond))
  assert difference(ours, base) > 0.1, "an adapter without effect shows nothing"
  assert difference(both.ours(both.adapter, SCALE / 2), ours) > 0.01, "a lost alpha would not show"
  sd3_adapters.save_lora(tmp_path / adapters.DIFFUSERS_FILE, both.adapter, SCALE)
  theirs = both.theirs_with(tmp_path)
  print(difference(ours, theirs))
  assert difference(ours, theirs) <= TOLERANCE
  assert difference(both.ours(both.adapter, SCALE), theirs) <= TOLERANCE
  assert difference(both.theirs(), base) == 0


def test_what_is_written_is_read_again_exactly(both, tmp_path):
  for targets in ("", LORA_TARGETS, r"attn\.(to_q|to_v|add_k_proj)$"):
    adapter = random_adapter(both.params, targets=targets)
    for form in ("lora", "kohya"):
      sd3_adapters.save_lora(tmp_path / "x.safetensors", adapter, SCALE, form=form)
      again, scale = sd3_adapters.load_lora(tmp_path / "x.safetensors", both.params)
      assert scale == SCALE
      trees.assert_same(again, adapter)


def test_files_that_diffusers_writes_are_read(both, tmp_path):
  """Trained with PEFT; saved by today's diffusers, without metadata, and in older names."""
  network = both.torch_pipe.transformer
  targets = [*"to_q to_k to_v to_out.0 add_q_proj add_v_proj to_add_out linear proj_out context_embedder".split()]
  config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=[*targets, "net.2"], init_lora_weights=False)
  torch.manual_seed(0)
  base = both.theirs()
  peft.inject_adapter_in_model(config, network, adapter_name="default")
  try:
    theirs = both.theirs()
    state = {k: v.clone() for k, v in peft.get_peft_model_state_dict(network, adapter_name="default").items()}
    metadata = diffusers.training_utils._collate_lora_metadata({"transformer": network})
  finally:
    network.unload_lora()
  assert difference(theirs, base) > 0.01 and difference(both.theirs(), base) == 0
  save = both.torch_pipe.save_lora_weights
  save(tmp_path / "new", state, **metadata)
  unscaled = {k: v * SCALE if ".lora_B." in k else v for k, v in state.items()}
  save(tmp_path / "bare", unscaled)
  for name, old in {"old": (".lora_A.", ".lora.down."), "kohya's": (".lora_A.", ".lora_down.")}.items():
    up = old[1].replace("down", "up")
    renamed = {k.replace(*old).replace(".lora_B.", up): v for k, v in unscaled.items()}
    save(tmp_path / name, renamed)
  scales = {"new": SCALE, "bare": 1.0, "old": 1.0, "kohya's": 1.0}
  for name, expected in scales.items():
    adapter, scale = sd3_adapters.load_lora(tmp_path / name / adapters.DIFFUSERS_FILE, both.params)
    assert scale == expected and adapters.adapter_rank(adapter) == RANK
    assert difference(both.ours(adapter, scale), theirs) <= TOLERANCE, name


def test_several_files_act_together_by_their_strengths(both, tmp_path):
  """As diffusers' set_adapters has them; of different ranks, layers and forms."""
  pipe = both.torch_pipe
  second = random_adapter(both.params, rank=2, targets=LORA_TARGETS, seed=4)
  sd3_adapters.save_lora(tmp_path / "a.safetensors", both.adapter, SCALE)
  sd3_adapters.save_lora(tmp_path / "b.safetensors", second, 1.5)
  sd3_adapters.save_lora(tmp_path / "c.safetensors", second, 1.5, form="kohya")
  for name in "ab":
    pipe.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
  try:
    pipe.set_adapters(["a", "b"], adapter_weights=[0.8, -0.5])
    theirs = both.theirs()
  finally:
    pipe.unload_lora_weights()
  for other in "bc":
    files = [adapters.parse_lora_file(f"{tmp_path}/{file}.safetensors:{s}") for file, s in (("a", 0.8), (other, -0.5))]
    params, scale = sd3_adapters.with_adapters(both.pipe.params, files)
    assert scale == 1.0 and adapters.adapter_rank(params["transformer_lora"]) == RANK + 2
    assert difference(both.ours(params["transformer_lora"], scale), theirs) <= TOLERANCE
    for file in files:
      params, scale = sd3_adapters.with_adapters(both.pipe.params, [file])
      assert difference(both.ours(params["transformer_lora"], scale), theirs) > 0.01, "one of the files does nothing"


# ---- kohya's files, against weights of the original implementation ---------------------------------------------------


def original_shapes(config):
  """The dense layers of Stability's MMDiTX: name -> (out, in)."""
  width, shapes = config.width, {}
  for i in range(config.num_layers):
    for stream in ("x_block", "context_block"):
      block, last = f"joint_blocks.{i}.{stream}", stream == "context_block" and i == config.num_layers - 1
      dual = stream == "x_block" and i in config.dual_attention_layers
      for attention in ("attn", "attn2") if dual else ("attn",):
        shapes[f"{block}.{attention}.qkv"] = (3 * width, width)
        if not last:
          shapes[f"{block}.{attention}.proj"] = (width, width)
      if not last:
        shapes |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
      shapes[f"{block}.adaLN_modulation.1"] = ((2 if last else 9 if dual else 6) * width, width)
  shapes["context_embedder"] = (width, config.joint_attention_dim)
  for name, size in {"t_embedder": 256, "y_embedder": config.pooled_projection_dim}.items():
    shapes |= {f"{name}.mlp.0": (width, size), f"{name}.mlp.2": (width, width)}
  shapes["final_layer.adaLN_modulation.1"] = (2 * width, width)
  shapes["final_layer.linear"] = (config.patch_size**2 * config.predicted_channels, width)
  return shapes


def in_diffusers_names(weights, config):
  """Dense weights of the original layout in diffusers' names, by the converter of diffusers."""
  held = {f"{name}.weight": torch.from_numpy(w) for name, w in weights.items()}
  held |= {f"{name}.bias": torch.zeros(len(w)) for name, w in weights.items()}
  held |= {
    "pos_embed": torch.zeros(1),
    "x_embedder.proj.weight": torch.zeros(1),
    "x_embedder.proj.bias": torch.zeros(1),
  }
  if config.qk_norm:
    for name in [name for name in weights if name.endswith(".qkv")]:
      held |= {f"{name.removesuffix('qkv')}ln_{x}.weight": torch.zeros(1) for x in "qk"}
  found = convert_sd3_transformer_checkpoint_to_diffusers(held)
  return {name: w.numpy() for name, w in found.items() if w.ndim == 2}


def with_kohya(weights, file):
  """Weights of the original layout with a file of kohya's merged in: weight + alpha / rank * up @ down."""
  tensors, weights = load_file(file), dict(weights)
  for name, weight in weights.items():
    key = "lora_unet_" + name.replace(".", "_")
    if f"{key}.lora_up.weight" in tensors:
      up, down, alpha = (tensors.pop(f"{key}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
      weights[name] = weight + float(alpha) / len(down) * up.astype(np.float32) @ down.astype(np.float32)
  assert not tensors, list(tensors)
  return weights


def stored(tree, folder):
  """A transformer's dense weights as its file has them."""
  save_tree(folder / "stored.safetensors", tree)
  return {k: v for k, v in load_file(folder / "stored.safetensors").items() if v.ndim == 2}


def originals(config):
  rng = np.random.default_rng(1)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in original_shapes(config).items()}


@pytest.fixture(scope="module", params=MODELS)
def layout(request):
  """Weights in the original layout, and the same ones here."""
  config = PRESETS[request.param].transformer
  rng = np.random.default_rng(1)
  weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in original_shapes(config).items()}
  shapes = presets.abstract_params(SD3Transformer2DModel(config))
  base = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  # Each weight is put there as the product of the identity and itself.
  layers = {name.removesuffix(".weight"): w.T for name, w in in_diffusers_names(weights, config).items()}
  factors = {name: (np.eye(len(w), dtype=np.float32), w) for name, w in layers.items()}
  return config, weights, lora.merge_lora(base, lora.from_layers(factors, shapes))


def assert_merged(params, adapter, scale, weights, folder):
  found = stored(lora.merge_lora(params, adapter, scale), folder)
  assert found.keys() == weights.keys()
  for name, weight in weights.items():
    np.testing.assert_allclose(found[name], weight, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_written_kohya_file_is_merged_as_by_hand(layout, tmp_path):
  config, weights, base = layout
  for targets, dtype in (("", jnp.float32), (r"attn\.(to_q|to_v)$|attn2\.to_k|norm", jnp.float32), ("", jnp.float16)):
    adapter, scale = random_adapter(base, targets=targets), 1 / 7
    file = tmp_path / "x.safetensors"
    sd3_adapters.save_lora(file, adapter, scale, form="kohya", dtype=dtype)
    expected = in_diffusers_names(with_kohya(weights, file), config)
    if dtype == jnp.float16:  # what it holds is rounded, so compare with what is read
      adapter, scale = sd3_adapters.load_lora(file, base)
    assert_merged(base, adapter, scale, expected, tmp_path)


def kohya_file(config, rank_of=lambda name: RANK, alpha=6.0):
  """Of every dense layer, as sd-scripts write it."""
  rng, tensors = np.random.default_rng(5), {}
  for name, (fan_out, fan_in) in original_shapes(config).items():
    key, rank = "lora_unet_" + name.replace(".", "_"), rank_of(name)
    tensors[f"{key}.lora_down.weight"] = rng.standard_normal((rank, fan_in)).astype(np.float32)
    tensors[f"{key}.lora_up.weight"] = rng.standard_normal((fan_out, rank)).astype(np.float32)
    tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
  return tensors


def test_a_file_of_kohya_is_merged_as_by_hand_and_written_again(layout, tmp_path):
  config, weights, base = layout
  tensors = kohya_file(config)
  save_file(tensors, tmp_path / "x.safetensors")
  adapter, scale = sd3_adapters.load_lora(tmp_path / "x.safetensors", base)
  assert scale == SCALE and adapters.adapter_rank(adapter) == RANK, "the three share the rank of the one"
  expected = in_diffusers_names(with_kohya(weights, tmp_path / "x.safetensors"), config)
  assert_merged(base, adapter, scale, expected, tmp_path)
  q, k = (lora.to_layers(adapter)[f"transformer_blocks.1.attn.to_{x}"] for x in "qk")
  np.testing.assert_array_equal(q[0], k[0])
  sd3_adapters.save_lora(tmp_path / "again.safetensors", adapter, scale, form="kohya")
  again = load_file(tmp_path / "again.safetensors")
  assert again.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(again[name], tensor)


def test_layers_of_kohya_have_their_own_ranks_and_some_are_left_out(layout, tmp_path):
  """As sd-scripts write them with context_attn_dim, x_mlp_dim, ... and train_block_indices."""
  config, weights, base = layout
  tensors = kohya_file(config, rank_of=lambda name: 4 if "mlp" in name else 2, alpha=1.0)
  tensors = {name: x for name, x in tensors.items() if not re.search("blocks_1_|blocks_2_context|embedder", name)}
  qkv = "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_up.weight"
  tensors[qkv][: config.width] = 0.0  # queries that stay as they are
  save_file(tensors, tmp_path / "x.safetensors")
  adapter, scale = sd3_adapters.load_lora(tmp_path / "x.safetensors", base)
  assert adapters.adapter_rank(adapter) == 4
  expected = in_diffusers_names(with_kohya(weights, tmp_path / "x.safetensors"), config)
  assert_merged(base, adapter, scale, expected, tmp_path)


def test_text_encoders_are_merged_as_by_hand(tmp_path):
  pipe = sd3.random_pipeline("sd3-miniature")
  names = {
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": ("text_encoder", "layers.0.self_attn.q_proj"),
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": ("text_encoder_2", "layers.1.mlp.fc1"),
    "lora_te3_encoder_block_1_layer_0_SelfAttention_k": ("text_encoder_3", "block.1.layer.0.SelfAttention.k"),
    "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo": ("text_encoder_3", "block.0.layer.1.DenseReluDense.wo"),
  }
  tensors, expected, rng = {}, {}, np.random.default_rng(0)
  for key, (component, end) in names.items():
    held = expected.setdefault(component, stored(pipe.params[component], tmp_path))
    name = next(name for name in held if name.endswith(f"{end}.weight"))
    fan_out, fan_in = held[name].shape
    down, up = rng.standard_normal((2, fan_in)).astype(np.float32), rng.standard_normal((fan_out, 2)).astype(np.float32)
    tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.array(3.0, np.float32)}
    held[name] = held[name] + 0.5 * 1.5 * up @ down
  save_file(tensors, tmp_path / "x.safetensors")
  file = adapters.parse_lora_file(f"{tmp_path}/x.safetensors:0.5")
  params, _ = sd3_adapters.with_adapters(pipe.params, [file])
  assert params["transformer_lora"] == {}
  for component, held in expected.items():
    found = stored(params[component], tmp_path)
    for name, weight in held.items():
      np.testing.assert_allclose(found[name], weight, rtol=1e-5, atol=1e-5, err_msg=name)
  with pytest.raises(ValueError, match="adapts text_encoder and .*, and training can continue adapters of a transf"):
    sd3_adapters.load_lora(file.path, pipe.params["transformer"])
  small = sd3.without_t5(pipe)
  with pytest.raises(ValueError, match="adapts text_encoder_3, which the model does not have"):
    sd3_adapters.with_adapters(small.params, [file])


# ---- What must be refused --------------------------------------------------------------------------------------------

PARAMS = presets.abstract_params(SD3Transformer2DModel(PRESETS["sd35-miniature"].transformer))
UNET = presets.SD15_MINIATURE.unet
UNET_PARAMS = presets.abstract_params(pipelines.UNet2DConditionModel(UNET))


def pair(layer, fan_in, fan_out, rank=2, parts=("lora_A", "lora_B")):
  down, up = np.ones((rank, fan_in), np.float32), np.ones((fan_out, rank), np.float32)
  return {f"{layer}.{parts[0]}.weight": down, f"{layer}.{parts[1]}.weight": up}


def kohya_pair(layer, fan_in, fan_out, rank=2):
  return pair(f"lora_unet_{layer}", fan_in, fan_out, rank, ("lora_down", "lora_up"))


Q = "transformer.transformer_blocks.0.attn.to_q"
QKV = "joint_blocks_0_x_block_attn_qkv"
GOOD = pair(Q, 24, 24)


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    (
      pair("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 2048, 640),
      "transformer: it was made for Stable Diffusion XL, and the model is Stable Diffusion 3: LoRA for another network",
    ),
    (
      kohya_pair("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 320, 320),
      "it was made for the UNet of another Stable Diffusion, and the model is Stable Diffusion 3: LoRA for another",
    ),
    (kohya_pair("double_blocks_0_img_attn_qkv", 24, 72), "it was made for Flux, and the model is Stable Diffusion 3"),
    (
      pair("transformer.single_transformer_blocks.0.attn.to_q", 24, 24),
      "it was made for Flux, and the model is Stable Diffusion 3: .*single_transformer_blocks.0.attn.to_q is not a lin",
    ),
    (
      pair(Q, 3072, 3072),
      "it was made for Flux, and the model is Stable Diffusion 3: .*has 3072 x 3072 features, expected 24 x 24",
    ),
    (
      pair("transformer.transformer_blocks.3.attn2.to_q", 24, 24),
      r"x.safetensors: transformer: LoRA for another network: transformer_blocks.3.attn2.to_q is not a linear layer",
    ),
    (pair(Q, 16, 24), "attn.to_q has 16 x 24 features, expected 24 x 24; use the network it was made for"),
    (kohya_pair(QKV, 24, 48), "attn.to_q has 24 x 16 features, expected 24 x 24"),
    (
      kohya_pair(QKV, 24, 71),
      "joint_blocks_0_x_block_attn_qkv has 71 outputs, expected those of .*to_q and .*to_k and .*to_v side by side",
    ),
    (kohya_pair("final_layer_adaLN_modulation_1", 24, 47), "has 47 outputs, expected those of norm_out.linear side"),
    (kohya_pair("joint_blocks_7_x_block_attn_qkv", 24, 72), "joint_blocks_7_x_block_attn_qkv is not a linear layer"),
    (
      {**GOOD, **kohya_pair("joint_blocks_1_x_block_attn_qkv", 24, 72)},
      r"mixes the names of two layouts \(transformer_blocks.0.attn.to_q as diffusers has it and joint_blocks_1_x_block",
    ),
    (
      {**GOOD, **kohya_pair("transformer_blocks_0_attn_to_q", 24, 24)},
      "holds transformer_blocks.0.attn.to_q twice, once as ",
    ),
    ({**GOOD, f"{Q}.scalar": np.ones(1, np.float32)}, "holds 1 tensors such as .*to_q.scalar, expected low-rank fact"),
    ({f"{Q}.lora_A.weight": np.ones((2, 24), np.float32)}, "attn.to_q has only down, expected both factors"),
    ({f"{Q}.lokr_w1": np.ones((2, 24), np.float32)}, r"is an adapter of another kind, LoKr"),
    ({}, "holds no adapter of a transformer; give the path of a LoRA file for Stable Diffusion"),
    ({**GOOD, f"{Q}.lora_B.weight": np.full((24, 2), np.nan, np.float32)}, "attn.to_q holds NaN or infinity"),
  ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(tensors, message, tmp_path):
  save_file(tensors, tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match=message) as error:
    sd3_adapters.load_lora(tmp_path / "x.safetensors", PARAMS)
  assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize("targets", [LORA_TARGETS, r"attn\.to_q$"])
def test_a_unet_refuses_a_file_of_stable_diffusion_3(form, targets, tmp_path):
  sd3_adapters.save_lora(tmp_path / "x.safetensors", random_adapter(PARAMS, targets=targets), 1.0, form=form)
  with pytest.raises(ValueError, match="x.safetensors: unet: it was made for Stable Diffusion 3, and the model is"):
    adapters.load_lora(tmp_path / "x.safetensors", UNET, UNET_PARAMS)
