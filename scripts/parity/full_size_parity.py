"""Compares the networks with their torch originals at full size: the published architectures, random weights.

    python scripts/parity/full_size_parity.py --out docs/results/full_size_parity
    python scripts/parity/full_size_parity.py --models sd15-text sd15-vae --dtypes float32
    python scripts/parity/full_size_parity.py --tiny

writes OUT.json and OUT.md. For each network one process builds the original of diffusers or transformers, redraws
every parameter, saves the folder as safetensors (in shards of 2 GB) and stores outputs and, in float32, the gradient of
a random linear function of the outputs with respect to the inputs; further processes, one for each dtype, read the
folder with jaxpref's own loader and repeat that in JAX. float32 has to agree to 1e-4; bfloat16 parameters and compute
have to agree with torch's float32 to 3e-2, and what torch's own bfloat16 differs by stands beside it. The UNets run on
latents of 32x32, the VAE on images of 128x128, text on 77 tokens: weights and code are those of any other size. The
largest network (SDXL's UNet, 10.3 GB in float32) should do with 24 GB of memory and 11 GB of disk.

A network and dtype that has passed with the installed versions is not run again, so an interrupted run can be
continued; delete OUT.json to start over. --tiny takes miniatures of the same topology, for a test of this script.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}
PACKAGES = ("jax", "flax", "safetensors", "torch", "diffusers", "transformers")

# ---------------------------------------------------------------------------------------------------------------------
# The published architectures, as their config.json files have them (keys that are at diffusers' defaults left out)

_SD15_UNET: dict[str, Any] = {
  "_class_name": "UNet2DConditionModel",
  "act_fn": "silu",
  "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280],
  "cross_attention_dim": 768,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "in_channels": 4,
  "layers_per_block": 2,
  "norm_eps": 1e-5,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 64,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}

_SDXL_UNET: dict[str, Any] = {
  "_class_name": "UNet2DConditionModel",
  "act_fn": "silu",
  "addition_embed_type": "text_time",
  "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 256,
  "attention_head_dim": [5, 10, 20],
  "block_out_channels": [320, 640, 1280],
  "cross_attention_dim": 2048,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "in_channels": 4,
  "layers_per_block": 2,
  "norm_eps": 1e-5,
  "norm_num_groups": 32,
  "out_channels": 4,
  "projection_class_embeddings_input_dim": 2816,
  "sample_size": 128,
  "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "use_linear_projection": True,
}

_SD15_VAE: dict[str, Any] = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 512,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}

_CLIP_L_TEXT: dict[str, Any] = {
  "bos_token_id": 0,
  "eos_token_id": 2,
  "hidden_act": "quick_gelu",
  "hidden_size": 768,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-5,
  "max_position_embeddings": 77,
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "pad_token_id": 1,
  "projection_dim": 768,
  "vocab_size": 49408,
}

_BIGG_TEXT = _CLIP_L_TEXT | {
  "hidden_act": "gelu",
  "hidden_size": 1280,
  "intermediate_size": 5120,
  "num_attention_heads": 20,
  "num_hidden_layers": 32,
  "projection_dim": 1280,
}

_CLIP_H: dict[str, Any] = {
  "model_type": "clip",
  "projection_dim": 1024,
  "text_config": _CLIP_L_TEXT
  | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "projection_dim": 1024,
  },
  "vision_config": {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
  },
}

# name -> (kind, config, published number of parameters)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
  "sd15-text": ("text", _CLIP_L_TEXT, 123_060_480),
  "sd15-vae": ("vae", _SD15_VAE, 83_653_863),
  "sd15-unet": ("unet", _SD15_UNET, 859_520_964),
  "sdxl-text": ("text", _CLIP_L_TEXT, 123_060_480),
  "sdxl-text-2": ("text_with_projection", _BIGG_TEXT, 694_659_840),
  "sdxl-vae": ("vae", _SD15_VAE | {"sample_size": 1024, "scaling_factor": 0.13025}, 83_653_863),
  "clip-h": ("clip", _CLIP_H, 986_109_441),
  "sdxl-unet": ("unet", _SDXL_UNET, 2_567_463_684),
}

# What makes a miniature of each kind: widths and numbers of layers, never the kinds of layers.
_TINY_TEXT = {
  "hidden_size": 24,
  "intermediate_size": 48,
  "max_position_embeddings": 16,
  "num_attention_heads": 2,
  "num_hidden_layers": 2,
  "projection_dim": 16,
  "vocab_size": 60,
}
_TINY_VISION = {
  "hidden_size": 16,
  "image_size": 28,
  "intermediate_size": 32,
  "num_attention_heads": 2,
  "num_hidden_layers": 2,
  "projection_dim": 16,
}
_TINY_UNET = {"cross_attention_dim": 24, "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
_TINY: dict[str, dict[str, Any]] = {
  "sd15-unet": _TINY_UNET | {"attention_head_dim": 2, "block_out_channels": [16, 32, 32, 32]},
  "sdxl-unet": _TINY_UNET
  | {
    "addition_time_embed_dim": 8,
    "attention_head_dim": [1, 2, 4],
    "block_out_channels": [16, 32, 32],
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
    "transformer_layers_per_block": [1, 2, 3],
  },
  "vae": {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16},
  "text": _TINY_TEXT,
  "text_with_projection": _TINY_TEXT,
  "clip": {
    "projection_dim": 16,
    "text_config": _CLIP_H["text_config"] | _TINY_TEXT,
    "vision_config": _CLIP_H["vision_config"] | _TINY_VISION,
  },
}


def model_config(name: str, tiny: bool) -> tuple[str, dict[str, Any]]:
  """Returns kind and config of a network; its miniature's if `tiny`."""
  kind, config, _ = MODELS[name]
  return kind, config | (_TINY.get(name) or _TINY[kind]) if tiny else config


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def draw_inputs(kind: str, config: Mapping[str, Any], tiny: bool) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Draws a batch of two different examples, channels last; returns it with the inputs' names to differentiate."""
  rng = np.random.default_rng(0)

  def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)

  def token_ids(text: Mapping[str, Any]) -> np.ndarray:
    """Returns start, tokens, end and padding, as a tokenizer makes them; the end of the text is the largest id."""
    length, end = text["max_position_embeddings"], text["vocab_size"] - 1
    ids = rng.integers(0, end - 1, (2, length)).astype(np.int32)
    ids[:, 0] = end - 1
    for row, words in enumerate((length // 4, length - 2)):
      ids[row, 1 + words :] = end
    return ids

  if kind == "unet":
    size = 8 if tiny else 32
    inputs = {
      "sample": normal(2, size, size, config["in_channels"]),
      "timesteps": np.array([21, 981], np.int32),
      "text": normal(2, 77, config["cross_attention_dim"]),
    }
    if "addition_embed_type" not in config:
      return inputs, ("sample", "text")
    inputs["text_embeds"] = normal(
      2, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    )
    inputs["time_ids"] = np.array([[1024, 1024, 0, 0, 1024, 1024], [768, 512, 8, 40, 640, 896]], np.float32)
    return inputs, ("sample", "text", "text_embeds")
  if kind == "vae":
    size = 16 if tiny else 128
    latents = size // 2 ** (len(config["block_out_channels"]) - 1)
    images = rng.uniform(-1, 1, (2, size, size, config["in_channels"])).astype(np.float32)
    return {"images": images, "latents": normal(2, latents, latents, config["latent_channels"])}, ("images", "latents")
  if kind == "clip":
    vision = config["vision_config"]
    pixels = normal(2, vision["image_size"], vision["image_size"], vision["num_channels"])
    return {"ids": token_ids(config["text_config"]), "pixels": pixels}, ("pixels",)
  # Token ids have no gradient; the table that they look up has.
  return {"ids": token_ids(config)}, ("token_embedding",)


def output_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the random numbers by which an output enters the scalar that is differentiated."""
  return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def errors(found: Any, expected: Any, *, magnitude: float | None = None) -> dict[str, float]:
  """Returns {"max": max |found - expected| / max |expected|, "l2": the same for 2-norms, "std": of expected}, float64.

  With a magnitude, both are relative to that instead: max |found - expected| / magnitude, and so on.
  """
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape, f"{found.shape} against {expected.shape}"
  difference = found - expected
  typical = expected if magnitude is None else np.full_like(expected, magnitude)
  return {
    "max": float(np.abs(difference).max() / np.abs(typical).max()),
    "l2": float(np.linalg.norm(difference) / np.linalg.norm(typical)),
    "std": float(expected.std()),
  }


def peak_gib() -> float:
  """Returns the most memory this process has had resident (mapped pages of files included), GiB."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) / 2**20
  return float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# In the first process: torch


def _build_torch(kind: str, config: dict[str, Any]) -> Any:
  """Returns the original, with parameters yet to be drawn."""
  import torch

  if kind in ("unet", "vae"):
    import diffusers

    with torch.device("meta"):  # no time for an initialisation that is overwritten
      model = getattr(diffusers, config["_class_name"]).from_config(config)
    assert not list(model.buffers()), "a buffer would be left undefined"
    return model.to_empty(device="cpu").eval()
  import transformers

  if kind == "clip":
    return transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
  cls = transformers.CLIPTextModelWithProjection if kind.endswith("projection") else transformers.CLIPTextModel
  return cls(transformers.CLIPTextConfig(**config)).eval()


LOGIT_SCALE = 2.5  # CLIP's scores are exp of it times a cosine

# What a layer of these names computes is added to the residual stream.
_WRITERS = ("conv2.", "proj_out.", "to_out.", "ff.net.2.", "out_proj.", "fc2.")


def randomise(model: Any) -> None:
  """Redraws every parameter: no bias, norm or "zero" layer is left where an error would not show.

  Outputs and activations keep a standard deviation of about 1, as far as random weights can.
  """
  import torch

  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim > 1:
        gain = 0.5 if any(writer in name for writer in _WRITERS) else 1.0
        parameter.normal_(0, gain / parameter[0].numel() ** 0.5, generator=generator)
      elif "norm" in name:
        parameter.normal_(float(name.endswith("weight")), 0.3, generator=generator)
      elif name == "logit_scale":
        parameter.fill_(LOGIT_SCALE)
      else:
        parameter.normal_(0, 0.2, generator=generator)


def _torch_apply(kind: str, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
  """Outputs by name, channels last."""

  def nchw(x):
    return x.permute(0, 3, 1, 2)

  def nhwc(x):
    return x.permute(0, 2, 3, 1)

  if kind == "unet":
    added = {k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs}
    out = model(nchw(inputs["sample"]), inputs["timesteps"], inputs["text"], added_cond_kwargs=added or None)
    return {"prediction": nhwc(out.sample)}
  if kind == "vae":
    moments = model.encode(nchw(inputs["images"])).latent_dist
    decoded = model.decode(nchw(inputs["latents"])).sample
    return {"mean": nhwc(moments.mean), "logvar": nhwc(moments.logvar), "decoded": nhwc(decoded)}
  if kind == "clip":
    out = model(inputs["ids"], nchw(inputs["pixels"]))
    scores = out.logits_per_image.diagonal()
    return {"image_embeds": out.image_embeds, "text_embeds": out.text_embeds, "scores": scores}
  out = model(inputs["ids"], output_hidden_states=True)
  outputs = {"last_hidden_state": out.last_hidden_state, "penultimate": out.hidden_states[-2]}
  if kind == "text_with_projection":
    return outputs | {"text_embeds": out.text_embeds}
  return outputs | {"pooler_output": out.pooler_output}


def run_torch(name: str, folder: pathlib.Path, *, tiny: bool, dtypes: tuple[str, ...], gradient: bool) -> None:
  """Writes the model folder, {dtype}.npz of the outputs (float32 always), gradient.npz and torch.json."""
  import torch

  started = time.time()
  kind, config = model_config(name, tiny)
  model = _build_torch(kind, config)
  randomise(model)
  model.requires_grad_(False)
  model.save_pretrained(folder, max_shard_size="100KB" if tiny else "2GB")
  drawn, differentiated = draw_inputs(kind, config, tiny)
  parameters = sum(p.numel() for p in model.parameters())
  _say(f"{name}: {parameters:,} parameters drawn and saved, {time.time() - started:.0f} s")

  def numpy(tensors):
    return {key: tensor.detach().float().numpy() for key, tensor in tensors.items()}

  inputs = {key: torch.from_numpy(value) for key, value in drawn.items()}
  if "token_embedding" in differentiated:
    inputs["token_embedding"] = model.get_input_embeddings().weight
  if gradient:
    for key in differentiated:
      inputs[key].requires_grad_(True)
  with torch.set_grad_enabled(gradient):
    outputs = _torch_apply(kind, model, inputs)
  np.savez(folder / "float32.npz", **numpy(outputs))
  if gradient:
    scalar = sum(
      (value * torch.from_numpy(output_weight(key, tuple(value.shape)))).sum() for key, value in outputs.items()
    )
    gradients = torch.autograd.grad(scalar, [inputs[key] for key in differentiated])
    np.savez(folder / "gradient.npz", **numpy(dict(zip(differentiated, gradients, strict=True))))
    del gradients, scalar
  del outputs
  if "bfloat16" in dtypes:
    model.requires_grad_(False).to(torch.bfloat16)
    half = {k: torch.from_numpy(v).to(torch.bfloat16 if v.dtype == np.float32 else None) for k, v in drawn.items()}
    with torch.no_grad():
      np.savez(folder / "bfloat16.npz", **numpy(_torch_apply(kind, model, half)))
  (folder / "torch.json").write_text(
    json.dumps({"parameters": parameters, "seconds": time.time() - started, "peak_gib": peak_gib()})
  )


# ---------------------------------------------------------------------------------------------------------------------
# In the others: jax


def _load_flax(kind: str, folder: pathlib.Path, dtype: Any) -> tuple[Any, Any]:
  """Returns network and parameters, with the functions that `pipelines.load_pipeline` and the trainer use."""
  from jaxpref.files.tensors import load_tree, weight_files
  from jaxpref.models import clip, presets, unet, vae
  from jaxpref.rewards.loading import load_preference_model

  if kind == "clip":  # with the time condition at its identity, as training starts from it
    return load_preference_model(folder, dtype=dtype, param_dtype=dtype)
  config = json.loads((folder / "config.json").read_text())
  module: Any
  if kind == "unet":
    module = unet.UNet2DConditionModel(unet.UNetConfig.from_dict(config), dtype)
  elif kind == "vae":
    module = vae.AutoencoderKL(vae.VAEConfig.from_dict(config), dtype)
  else:
    module = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(config), kind == "text_with_projection", dtype)
  files = weight_files(folder)
  return module, load_tree(files, presets.abstract_params(module), param_dtype=dtype)


def _count(kind: str, module: Any) -> int:
  from jaxpref.models import clip, presets

  if kind == "clip":  # without the time condition
    c = module.config
    module = clip.CLIPModel(clip.CLIPConfig(c.text_config, c.vision_config, c.projection_dim))
  return presets.count_params(module)


def _flax_apply(kind: str, module: Any, params: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
  """As `_torch_apply`."""

  def apply(*args, **kwargs):
    return module.apply({"params": params}, *args, **kwargs)

  if kind == "unet":
    added = {k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs}
    return {"prediction": apply(inputs["sample"], inputs["timesteps"], inputs["text"], added or None)}
  if kind == "vae":
    mean, logvar = apply(inputs["images"], method="encode")
    return {"mean": mean, "logvar": logvar, "decoded": apply(inputs["latents"], method="decode")}
  if kind == "clip":
    times = np.array([0, 700], np.int32)  # must not matter
    image_embeds = apply(inputs["pixels"], times, method="image_embeds")
    text_embeds = apply(inputs["ids"], method="text_embeds")
    scores = apply(image_embeds, text_embeds, method="score")
    return {"image_embeds": image_embeds, "text_embeds": text_embeds, "scores": scores}
  if "token_embedding" in inputs:
    text_model = params["text_model"]
    embeddings = text_model["embeddings"] | {"token_embedding": {"embedding": inputs["token_embedding"]}}
    params = params | {"text_model": text_model | {"embeddings": embeddings}}
  out = apply(inputs["ids"])
  outputs = {"last_hidden_state": out["last_hidden_state"], "penultimate": out["hidden_states"][-2]}
  last = "text_embeds" if kind == "text_with_projection" else "pooler_output"
  return outputs | {last: out[last]}


def run_flax(name: str, folder: pathlib.Path, *, tiny: bool, dtype: str, gradient: bool) -> dict[str, Any]:
  """Returns the comparison of one network in one dtype: a row of OUT.json."""
  import jax
  import jax.numpy as jnp

  kind, config = model_config(name, tiny)
  seconds, started = {}, time.time()

  def lap(what):
    nonlocal started
    seconds[what], started = time.time() - started, time.time()

  module, params = jax.block_until_ready(_load_flax(kind, folder, jnp.dtype(dtype)))
  lap("load")
  _say(f"{name} {dtype}: loaded, {seconds['load']:.0f} s")
  inputs, differentiated = draw_inputs(kind, config, tiny)
  if "token_embedding" in differentiated:
    inputs["token_embedding"] = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
  gradient = gradient and dtype == "float32"
  differentiable = {key: inputs.pop(key) for key in differentiated}

  def scalar(differentiable, params, inputs):
    outputs = _flax_apply(kind, module, params, inputs | differentiable)
    return sum((x * output_weight(key, x.shape)).sum() for key, x in outputs.items()), outputs

  function: Callable[..., Any] = jax.value_and_grad(scalar, has_aux=True) if gradient else scalar
  # A GPU or TPU would round the products of float32 numbers.
  with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
    compiled = jax.jit(function).lower(differentiable, params, inputs).compile()
  lap("compile")
  _say(f"{name} {dtype}: compiled, {seconds['compile']:.0f} s")
  found = jax.device_get(compiled(differentiable, params, inputs))
  lap("run")
  (_, outputs), gradients = found if gradient else (found, {})

  original = json.loads((folder / "torch.json").read_text())
  row = {
    "model": name,
    "dtype": dtype,
    "tiny": tiny,
    "parameters": _count(kind, module),
    "torch_parameters": original["parameters"],
    "published_parameters": None if tiny else MODELS[name][2],
    "inputs": {key: list(value.shape) for key, value in draw_inputs(kind, config, tiny)[0].items()},
    "bound": BOUNDS[dtype],
    "outputs": _compare(outputs, folder / "float32.npz"),
    "gradients": _compare(gradients, folder / "gradient.npz") if gradient else {},
    "torch_bfloat16": {},
    "seconds": {"torch": original["seconds"], **seconds},
    "peak_gib": {"torch": original["peak_gib"], "jax": peak_gib()},
    "device": jax.devices()[0].device_kind,
    "versions": versions(),
  }
  if dtype == "bfloat16":
    with np.load(folder / "bfloat16.npz") as theirs:
      row["torch_bfloat16"] = _compare(theirs, folder / "float32.npz")
  row["passed"] = passed(row)
  return row


def _compare(found: Mapping[str, Any], file: pathlib.Path) -> dict[str, dict[str, float]]:
  with np.load(file) as expected:
    assert set(found) == set(expected), f"{file}: {sorted(found)} against {sorted(expected)}"
    rows = {key: errors(found[key], expected[key]) for key in expected}
    if "scores" in expected:
      rows["scores"] = errors(found["scores"], expected["scores"], magnitude=math.exp(LOGIT_SCALE))
      rows["scores"]["relative_to_themselves"] = errors(found["scores"], expected["scores"])["l2"]
  return rows


def passed(row: Mapping[str, Any]) -> bool:
  """Returns whether all errors are within the bound, and the sizes are the published ones; False for NaN."""
  measured = [*row["outputs"].values(), *row["gradients"].values()]
  return (
    all(e["max"] <= row["bound"] and e["l2"] <= row["bound"] for e in measured)
    and row["parameters"] == row["torch_parameters"]
    and row["published_parameters"] in (None, row["parameters"])
  )


def versions() -> dict[str, str]:
  """Returns the versions of the packages that compute."""
  return {package: importlib.metadata.version(package) for package in PACKAGES}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def table(rows: list[dict[str, Any]]) -> str:
  """Returns a Markdown table."""
  lines = [
    "| network | parameters | dtype | max error | L2 error | torch's own bfloat16 (max, L2) | gradient (max, L2) "
    "| bound | | s: torch, load, compile, run | peak GiB: torch, jax |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]

  def worst(measured: Mapping[str, Mapping[str, float]], key: str) -> str:
    return f"{max((e[key] for e in measured.values()), default=float('nan')):.1e}"

  def both(measured: Mapping[str, Mapping[str, float]]) -> str:
    return f"{worst(measured, 'max')}, {worst(measured, 'l2')}" if measured else ""

  for row in rows:
    seconds = ", ".join(f"{row['seconds'][key]:.0f}" for key in ("torch", "load", "compile", "run"))
    peaks = ", ".join(f"{row['peak_gib'][key]:.1f}" for key in ("torch", "jax"))
    lines.append(
      f"| {row['model']}{' (tiny)' if row['tiny'] else ''} | {row['parameters']:,} | {row['dtype']} "
      f"| {worst(row['outputs'], 'max')} | {worst(row['outputs'], 'l2')} | {both(row['torch_bfloat16'])} "
      f"| {both(row['gradients'])} | {row['bound']:.0e} | {'passed' if row['passed'] else '**failed**'} "
      f"| {seconds} | {peaks} |"
    )
  used = sorted({f"{k} {v}" for row in rows for k, v in row["versions"].items()})
  devices = sorted({row["device"] for row in rows})
  return "\n".join(
    [
      *lines,
      "",
      "Random weights of the published architectures; errors against torch's float32, relative to the largest absolute "
      "value and to the 2-norm, the worst output of each network. Gradients are those of a random linear function of "
      "all outputs with respect to all inputs (of the text encoders: to the table of token embeddings), float32 only. "
      "Latents of 32x32, images of 128x128 (CLIP: 224x224), 77 tokens, batches of two. bfloat16 means parameters and "
      "compute. CLIP's scores are compared relative to their range, exp(logit_scale): the cosines of random networks "
      "are near 0, so that relative to themselves rounding errors look large (both in the JSON).",
      "",
      f"Written by `scripts/parity/full_size_parity.py` with {', '.join(used)}, on: {', '.join(devices)}.",
      "",
    ]
  )


def _write(out: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  out.parent.mkdir(parents=True, exist_ok=True)
  order = list(MODELS)
  rows.sort(key=lambda row: (row["tiny"], order.index(row["model"]), row["dtype"] != "float32"))
  for suffix, text in ((".json", json.dumps(rows, indent=2) + "\n"), (".md", table(rows))):
    partial = out.with_name(f".{out.name}{suffix}")
    partial.write_text(text)
    partial.replace(out.with_suffix(suffix))


def _say(text: str) -> None:
  print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _child(folder: pathlib.Path, **job: Any) -> None:
  """Runs `job` in its own process, which gives all memory back."""
  done = subprocess.run(
    [sys.executable, "-m", "scripts.parity.full_size_parity", "--child", json.dumps(job | {"folder": str(folder)})],
    cwd=ROOT,
    env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    check=False,
  )
  if done.returncode:
    killed = " (killed: out of memory? try --no-gradient)" if done.returncode == -9 else ""
    what = f"{job['name']} {job.get('dtype', 'torch')}"
    raise SystemExit(f"error: {what}: exit code {done.returncode}{killed}; what is finished is kept.")


def _run_child(job: dict[str, Any]) -> None:
  folder = pathlib.Path(job.pop("folder"))
  if "dtypes" in job:
    run_torch(job.pop("name"), folder, dtypes=tuple(job.pop("dtypes")), **job)
  else:
    (folder / "row.json").write_text(json.dumps(run_flax(job.pop("name"), folder, **job)))


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS)
  )
  parser.add_argument("--dtypes", nargs="+", choices=BOUNDS, default=list(BOUNDS))
  parser.add_argument(
    "--out", type=pathlib.Path, help="default docs/results/full_size_parity; with --tiny runs/tiny_parity"
  )
  parser.add_argument("--tiny", action="store_true", help="miniatures instead of the published sizes")
  parser.add_argument("--no-gradient", action="store_true", help="for machines with less memory")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.child:
    _run_child(json.loads(args.child))
    return
  out = args.out or pathlib.Path("runs/tiny_parity" if args.tiny else "docs/results/full_size_parity")
  file = out.with_suffix(".json")
  rows = json.loads(file.read_text()) if file.is_file() else []
  gradient = not args.no_gradient
  failed = []
  for name in args.models:
    known = {
      row["dtype"]
      for row in rows
      if row["model"] == name and row["tiny"] == args.tiny and row["passed"] and row["versions"] == versions()
    }
    dtypes = [dtype for dtype in args.dtypes if dtype not in known]
    for dtype in sorted(known & set(args.dtypes)):
      _say(f"{name} {dtype}: passed before, kept")
    if not dtypes:
      continue
    with tempfile.TemporaryDirectory(prefix="full_size_parity.") as temporary:
      folder = pathlib.Path(temporary)
      job = {"name": name, "tiny": args.tiny}
      _child(folder, **job, dtypes=dtypes, gradient=gradient and "float32" in dtypes)
      for dtype in dtypes:
        _child(folder, **job, dtype=dtype, gradient=gradient)
        row = json.loads((folder / "row.json").read_text())
        rows = [r for r in rows if (r["model"], r["dtype"], r["tiny"]) != (name, dtype, args.tiny)] + [row]
        _write(out, rows)
        worst = max((max(e["max"], e["l2"]) for e in row["outputs"].values()), default=float("nan"))
        _say(f"{name} {dtype}: {'passed' if row['passed'] else 'FAILED'}, worst error {worst:.1e}")
        failed += [] if row["passed"] else [f"{name} {dtype}"]
  print(table(rows))
  if failed:
    raise SystemExit(f"error: beyond the bound: {', '.join(failed)}; see {file}.")


if __name__ == "__main__":
  main()
