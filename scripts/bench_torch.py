"""Times the training steps of scripts/bench.py in PyTorch, written as the published implementations write them.

    python scripts/bench_torch.py --size sd15 --cases dpo-lora dpo-full spo-lora spo-full --out runs/bench_sd15_torch
    python scripts/bench_torch.py --size sd15 --mode compile --out runs/bench_sd15_compile
    python scripts/bench_torch.py --check --size sd15
    python scripts/bench_torch.py --compare runs/bench_sd15.json runs/bench_sd15_torch.json

The first two write OUT.json and OUT.md with the fields of bench.py. Both take the recipes of configs/ in the same way
and start from the same files: jaxpref writes its weights as a diffusers folder, which diffusers opens; a process that
times PyTorch does not compute with JAX. `--check` shows that both compute the same step, `--compare` makes the table of
the two (scripts/bench_vs_torch.sh does all of it). One device; needs torch, diffusers, transformers and peft.

What is done how. On both sides: batch, recipe, precision (parameters that are trained in float32, networks in the
recipe's dtype, losses in float32; TF32 where the dtype is float32), gradient norm clipped, activation checkpointing
where the recipe has `remat`, data and images on the device before the clock starts. In PyTorch:

- networks of diffusers and transformers with their SDPA attention; LoRA by peft; `torch.autocast` around the UNet,
  since accelerate, which the published trainers use, does the same; AdamW fused on CUDA, Adafactor transformers'.
- on CUDA the memory layout is contiguous or channels_last, whichever made a forward and backward pass of the UNet
  faster in a trial before the clock starts; cuDNN benchmarks its convolutions. Nothing is copied to the host for logs.
- `--mode compile` compiles UNet, VAE, text encoders and preference model with torch.compile, a graph for each shape.
- Diffusion-DPO (github.com/SalesforceAIResearch/DiffusionDPO): winners and losers are one batch; the reference runs
  under no_grad, a second UNet in the recipe's dtype for full training, the same one with its adapter switched off for
  LoRA (as the example of diffusers does); images and prompts are encoded within the step.
- SPO (github.com/RockeyCoss/SPO): a Python loop over the timesteps, all candidates of all pools in one guided batch;
  only valid pairs are kept; they are shuffled and split into updates. An update runs the policy on the transitions of
  the winners and on those of the losers, and the reference likewise, each guided: that most of them start from one
  latent is what jaxpref makes use of. Groups, and the time that each is scored with, are jaxpref's. Better than
  published: the preference model encodes a prompt once (there in every scoring) and computes in the recipe's dtype
  (there float32); the reference is the policy without its adapter (there a copy). It is written here, on jaxpref's
  weights.
- as many updates as jaxpref makes, of as many transitions, in as many micro-batches (`accumulation`); there 10 (SD1.5)
  or 2 (SDXL) transitions a GPU at a time, which --micro-batch gives.
- the VAE takes all images at once, as published; with --vae-slicing one at a time, in less memory.

Memory is the peak of what PyTorch allocated while it was timed (CUDA) or of what the process had resident (CPU).
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))

from scripts import bench  # noqa: E402

CASES = ("dpo-lora", "dpo-full", "spo-lora", "spo-full")
MODES = ("eager", "compile")
ADAPTER = "default"  # peft's name of the only adapter
# Largest relative differences that --check accepts, in float32.
BOUNDS = {"loss": 1e-3, "grad_norm": 1e-3, "scores": 1e-3, "update": 1e-2}

Config = Any
Tensor = Any
Cond = dict[str, Tensor]


# ---- The models, as files --------------------------------------------------------------------------------------------


def save_models(folder: pathlib.Path, config: Config, pipe: Any, scorer: Any = None, policy: Any = None) -> None:
  """Writes what a case starts from: `pipeline`, and `preference` and `policy_file` where it needs them.

  Args:
    pipe: a `jaxpref.weights.Pipeline`.
    scorer: SPO's preference model and its parameters.
    policy: trained parameters by component; by default those that training starts from.
  """
  import jax.numpy as jnp

  from jaxpref import build, lora_files, tensor_files, weights

  if not (folder / "pipeline").is_dir():
    weights.save_pipeline(folder / "pipeline", pipe)
  if config.lora.rank:
    adapter = policy["unet_lora"] if policy else build.initial_adapter(config, pipe.unet.config, pipe.params["unet"])
    lora_files.save_diffusers(folder / policy_file(config), adapter, build.adapter_scale(config, config.lora.rank))
  elif policy:
    tensor_files.save_tree(folder / policy_file(config), policy["unet"])
  if scorer and not (folder / "preference").is_dir():
    # In the precision in which both sides keep its parameters.
    weights.save_preference_model(folder / "preference", *scorer, dtype=jnp.dtype(config.dtype))


def policy_file(config: Config) -> str:
  """Name of the file with the trained parameters."""
  return f"{config.objective}_{config.lora.rank}.safetensors"


def save_inputs(file: pathlib.Path, batch: Mapping[str, Any], empty_ids: Any) -> None:
  """Writes one batch as jaxpref's data pipeline gives it."""
  arrays: dict[str, Any] = {k: np.asarray(v) for k, v in batch.items()}
  np.savez(file, **arrays, empty_ids=np.asarray(empty_ids))


def prepare(folder: pathlib.Path, cases: Sequence[str], size: str, batch: int | None, dtype: str | None) -> None:
  """Writes models and one batch of each case into a folder; run where JAX has no accelerator."""
  from jaxpref import build

  pipe = scorer = None
  for case in cases:
    config = recipe(case, size, batch, dtype)
    pipe = pipe or build.load_text_to_image(config.model, dtype="float32", seed=config.seed)
    if config.objective == "spo":
      scorer = scorer or build.load_scorer(config.preference_model, dtype="float32", seed=config.seed)
    save_models(folder, config, pipe, scorer)
    experiment = bench.build_on_shapes(config)
    assert experiment.tokenize is not None
    save_inputs(folder / f"{case}.npz", next(experiment.batches()), experiment.tokenize([""]))


def recipe(case: str, size: str, batch: int | None, dtype: str | None) -> Config:
  """The config of a case on one device."""
  import jax

  config = bench.recipe(case, size, batch, dtype=dtype)
  if size != "smoke" or batch:
    config.batch_size //= jax.device_count()
  return config


# ---- The models, in PyTorch ------------------------------------------------------------------------------------------


class Draws(NamedTuple):
  """Where the random numbers of a step come from.

  Attributes:
    normal: (rows, shape [C,h,w]) -> f32[rows,C,h,w].
    timesteps: n -> i64[n] of T.
    members: (n, k) -> i64[n] in [0, k).
    order: n -> i64[n], a permutation.
  """

  normal: Callable[[int, Sequence[int]], Tensor]
  timesteps: Callable[[int], Tensor]
  members: Callable[[int, int], Tensor]
  order: Callable[[int], Tensor]


def random_draws(device: Any, total: int) -> Draws:
  """Draws on the device; `total` is T."""
  import torch

  return Draws(
    normal=lambda rows, shape: torch.randn((rows, *shape), device=device),
    timesteps=lambda n: torch.randint(0, total, (n,), device=device),
    members=lambda n, k: torch.randint(0, k, (n,), device=device),
    order=lambda n: torch.randperm(n, device=device),
  )


class Models(NamedTuple):
  """Networks of one case on their device.

  Attributes:
    unet: the policy, with an adapter for LoRA.
    reference: the UNet it started from; None: that is the policy without its adapter.
    encoders: one text encoder, or SDXL's two.
    scheduler: DDIM's.
    alphas_cumprod: f32[T].
    empty: conditioning on the empty prompt, one row.
    scorer: (images f32[N,3,H,W], t i64[N] or [], text f32[N,P]) -> f32[N], and for prompts i64[B,L] -> f32[B,P].
    dtype: of the networks.
  """

  unet: Any
  reference: Any
  vae: Any
  encoders: list[Any]
  scheduler: Any
  alphas_cumprod: Tensor
  empty: Cond
  scorer: tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]] | None
  dtype: Any

  def autocast(self) -> Any:
    """Float32 parameters compute in the dtype of the networks."""
    import torch

    return torch.autocast(self.alphas_cumprod.device.type, self.dtype, enabled=self.dtype != torch.float32)

  @contextlib.contextmanager
  def as_reference(self) -> Iterator[Any]:
    """The reference UNet, without gradients."""
    import torch

    with torch.no_grad():
      if self.reference is not None:
        yield self.reference
      else:
        self.unet.disable_adapters()
        yield self.unet
        self.unet.enable_adapters()


def load_models(folder: pathlib.Path, config: Config, *, device: str, empty_ids: np.ndarray) -> Models:
  """Opens what `save_models` wrote."""
  import diffusers
  import peft
  import safetensors.torch
  import torch
  import transformers
  from diffusers.training_utils import cast_training_params

  dtype = getattr(torch, config.dtype)
  pipeline = folder / "pipeline"

  def frozen(cls, name):
    kind = {"dtype": dtype} if cls.__module__.startswith("transformers") else {"torch_dtype": dtype}
    network = cls.from_pretrained(pipeline, subfolder=name, **kind)
    return network.to(device).eval().requires_grad_(False)

  vae = frozen(diffusers.AutoencoderKL, "vae")
  encoders = [frozen(transformers.CLIPTextModel, "text_encoder")]
  if (pipeline / "text_encoder_2").is_dir():
    encoders.append(frozen(transformers.CLIPTextModelWithProjection, "text_encoder_2"))
  policy = folder / policy_file(config)
  trained = safetensors.torch.load_file(policy, device=device) if policy.is_file() else {}
  reference = None
  if config.lora.rank:
    unet = frozen(diffusers.UNet2DConditionModel, "unet")
    alpha = config.lora.rank if config.lora.alpha is None else config.lora.alpha
    targets = f".*{config.lora.targets}"  # peft matches all of a name
    unet.add_adapter(peft.LoraConfig(r=config.lora.rank, lora_alpha=alpha, target_modules=targets), ADAPTER)
    cast_training_params(unet, torch.float32)
    factors = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    assert {torch_name(n) for n in trained} == set(factors), "peft adapts other layers than jaxpref"
    with torch.no_grad():
      for name, value in trained.items():
        factors[torch_name(name)].copy_(value)
  else:
    reference = frozen(diffusers.UNet2DConditionModel, "unet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").to(device)
    if trained:
      unet.load_state_dict(trained)
  unet.train()
  if config.remat != "none":
    unet.enable_gradient_checkpointing()
  scheduler = diffusers.DDIMScheduler.from_pretrained(pipeline, subfolder="scheduler")
  assert scheduler.config.prediction_type == "epsilon"
  index = json.loads((pipeline / "model_index.json").read_text())
  scorer = load_scorer(folder / "preference", dtype, device) if config.objective == "spo" else None
  with torch.no_grad():
    empty = encode_prompts(encoders, vae, unet, torch.from_numpy(empty_ids).to(device, torch.long))
    if index.get("force_zeros_for_empty_prompt"):
      empty |= {k: torch.zeros_like(empty[k]) for k in ("encoder_hidden_states", "text_embeds")}
  return Models(unet, reference, vae, encoders, scheduler, scheduler.alphas_cumprod.to(device), empty, scorer, dtype)


def torch_name(name: str) -> str:
  """A factor's parameter in peft, by its name in a file: unet.LAYER.lora_A.weight -> LAYER.lora_A.default.weight."""
  return name.removeprefix("unet.").replace(".weight", f".{ADAPTER}.weight")


def encode_prompts(encoders: Sequence[Any], vae: Any, unet: Any, ids: Tensor) -> Cond:
  """The UNet's conditioning on prompts i64[B,L], or i64[B,2L] for two encoders."""
  import torch

  if len(encoders) == 1:
    return {"encoder_hidden_states": encoders[0](ids)[0]}
  both = [e(i, output_hidden_states=True) for e, i in zip(encoders, ids.chunk(2, dim=1), strict=True)]
  size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
  time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=ids.device, dtype=torch.float32)
  return {
    "encoder_hidden_states": torch.cat([out.hidden_states[-2] for out in both], dim=-1),
    "text_embeds": both[1].text_embeds,
    "time_ids": time_ids.expand(len(ids), 6),
  }


def predict(unet: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
  """The UNet's output f32[N,C,h,w]."""
  added = {k: cond[k] for k in ("text_embeds", "time_ids") if k in cond} or None
  return unet(x, t, cond["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0].float()


def with_empty(models: Models, cond: Cond) -> Cond:
  """The conditioning of a guided call: rows of the empty prompt, then those of `cond`."""
  import torch

  return {k: torch.cat([models.empty[k].expand(len(v), *v.shape[1:]), v]) for k, v in cond.items()}


def guided(unet: Any, x: Tensor, t: Tensor, both: Cond, scale: float) -> Tensor:
  """Classifier-free guidance in one call; `both` from `with_empty`."""
  import torch

  t = torch.cat([t, t]) if t.ndim else t
  uncond, cond = predict(unet, torch.cat([x, x]), t, both).chunk(2)
  return uncond + scale * (cond - uncond)


# ---- The step-aware preference model ---------------------------------------------------------------------------------


def load_scorer(
  folder: pathlib.Path, dtype: Any, device: str
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
  """SPO's preference model on the file that jaxpref writes, whose names are those of the published checkpoints."""
  import safetensors.torch
  import torch
  from torch.nn import functional as F

  config = json.loads((folder / "config.json").read_text())
  text, vision = config["text_config"], config["vision_config"]
  weights = {k: v.to(device, dtype) for k, v in safetensors.torch.load_file(folder / "model.safetensors").items()}
  mean, std = (torch.tensor(config[f"image_{k}"], device=device)[:, None, None] for k in ("mean", "std"))
  half = config["frequency_embedding_size"] // 2
  frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=device, dtype=torch.float32) / half)

  def linear(name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

  def norm(name, x, c):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], c["layer_norm_eps"])

  def layer(name, x, c, time):
    """One block; with time f32[N,D] its branches are shifted, scaled and gated."""
    act = F.gelu if c["hidden_act"] == "gelu" else (lambda v: v * torch.sigmoid(1.702 * v))
    heads = lambda v: v.unflatten(-1, (c["num_attention_heads"], -1)).transpose(1, 2)
    modulation: Any = [None] * 6 if time is None else linear(f"{name}.adaLN_modulation.1", time)[:, None].chunk(6, -1)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
    h = norm(f"{name}.layer_norm1", x, c)
    h = h if time is None else h * (1 + scale_attn) + shift_attn
    q, k, v = (heads(linear(f"{name}.self_attn.{n}_proj", h)) for n in "qkv")
    h = F.scaled_dot_product_attention(q, k, v, is_causal=time is None).transpose(1, 2).flatten(2)
    h = linear(f"{name}.self_attn.out_proj", h)
    x = x + (h if time is None else gate_attn * h)
    h = norm(f"{name}.layer_norm2", x, c)
    h = h if time is None else h * (1 + scale_mlp) + shift_mlp
    h = linear(f"{name}.mlp.fc2", act(linear(f"{name}.mlp.fc1", h)))
    return x + (h if time is None else gate_mlp * h)

  def text_embeds(ids):
    """Unit vectors f32[B,P]; of the ids of two tokenizers the first are CLIP's."""
    ids = ids[:, : text["max_position_embeddings"]]
    x = F.embedding(ids, weights["text_model.embeddings.token_embedding.weight"])
    x = x + weights["text_model.embeddings.position_embedding.weight"][: ids.shape[1]]
    for i in range(text["num_hidden_layers"]):
      x = layer(f"text_model.encoder.layers.{i}", x, text, None)
    x = norm("text_model.final_layer_norm", x, text)
    end = text["eos_token_id"]
    end = ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)
    x = x[torch.arange(len(ids), device=ids.device), end]
    return F.normalize(linear("text_projection", x).float(), dim=-1)

  def scores(images, t, embeds):
    """Images as they are decoded, about [-1, 1]; t of one number or one for each."""
    height, width = images.shape[-2:]
    size = vision["image_size"]
    scale = size / min(height, width)
    shape = (int(height * scale + 0.5), int(width * scale + 0.5))
    x = images.float().clamp(-1, 1)
    if shape != (height, width):
      x = F.interpolate(x, size=shape, mode="bicubic", align_corners=False)
    top, left = (round((n - size) / 2) for n in shape)
    x = x[..., top : top + size, left : left + size]
    x = (((x / 2 + 0.5).clamp(0, 1) - mean) / std).to(dtype)
    angles = t.float().expand(len(x))[:, None] * frequencies
    time = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
    time = F.silu(linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time))))
    x = F.conv2d(x, weights["vision_model.embeddings.patch_embedding.weight"], stride=vision["patch_size"])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + weights["vision_model.embeddings.position_embedding.weight"]
    x = norm("vision_model.pre_layrnorm", x, vision)
    for i in range(vision["num_hidden_layers"]):
      x = layer(f"vision_model.encoder.layers.{i}", x, vision, time)
    shift, scale = linear("vision_model.adaLN_modulation.1", time).chunk(2, -1)
    x = norm("vision_model.post_layernorm", x[:, 0], vision) * (1 + scale) + shift
    x = F.normalize(linear("visual_projection", x).float(), dim=-1)
    return weights["logit_scale"].float().exp() * (x * embeds).sum(-1)

  return scores, text_embeds


# ---- The steps -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
  """What a step computed, on the device.

  Attributes:
    loss: f32[] of the last update.
    grad_norm: f32[] before clipping, of the last update.
    counts: of SPO: transitions, updates, rows of the UNet that the rollout and each training pass took.
    scores: of SPO: f32[G,B,k] of all candidates.
    pairs: of SPO: (winner, loser, valid) i64 and bool [G,B].
  """

  loss: Tensor
  grad_norm: Tensor
  counts: dict[str, int]
  scores: Tensor = None
  pairs: Any = None


def make_optimizer(config: Config, parameters: Sequence[Tensor]) -> Any:
  """The recipe's, at its full learning rate."""
  import torch
  from transformers.optimization import Adafactor

  o = config.optimizer
  if o.name == "sgd":
    return torch.optim.SGD(parameters, lr=o.learning_rate, momentum=o.b1)
  if o.name == "adafactor":
    fixed = dict(scale_parameter=False, relative_step=False, warmup_init=False)
    return Adafactor(parameters, lr=o.learning_rate, weight_decay=o.weight_decay, **fixed)
  assert o.name == "adamw", o.name
  fused = parameters[0].is_cuda or None
  return torch.optim.AdamW(
    parameters, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, fused=fused
  )


def update(config: Config, optimizer: Any) -> Tensor:
  """Clips the gradient, takes the optimiser's step, and returns the gradient's norm."""
  import torch

  parameters = optimizer.param_groups[0]["params"]
  norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or math.inf)
  optimizer.step()
  optimizer.zero_grad()
  return norm


def dpo_step(models: Models, config: Config, optimizer: Any, batch: Mapping[str, Tensor], draws: Draws) -> Found:
  """One update of Diffusion-DPO.

  Args:
    batch: `winner` and `loser`, images f32[B,3,H,W] in [-1, 1], and `input_ids` i64[B,L]; for SDXL their sizes,
      `winner_time_ids` and `loser_time_ids` f32[B,6].
  """
  import torch
  from torch.nn import functional as F

  size = len(batch["input_ids"])
  t_all, losses = draws.timesteps(size), []
  for part in range(config.accumulation):
    rows = slice(part, None, config.accumulation)
    with torch.no_grad():
      pixels = torch.cat([batch["winner"][rows], batch["loser"][rows]])
      posterior = models.vae.encode(pixels.to(models.dtype)).latent_dist
      mean, std = posterior.mean.float(), posterior.std.float()
      latents = (mean + std * draws.normal(len(mean), mean.shape[1:])) * models.vae.config.scaling_factor
      cond = encode_prompts(models.encoders, models.vae, models.unet, batch["input_ids"][rows])
      cond = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in cond.items()}
      if "time_ids" in cond and "winner_time_ids" in batch:
        cond["time_ids"] = torch.cat([batch["winner_time_ids"][rows], batch["loser_time_ids"][rows]])
      t = t_all[rows].repeat(2)
      noise = draws.normal(len(latents) // 2, latents.shape[1:]).repeat(2, 1, 1, 1)
      x_t = models.scheduler.add_noise(latents, noise, t)

    def errors(unet, x_t=x_t, t=t, cond=cond, noise=noise):
      with models.autocast():
        prediction = predict(unet, x_t, t, cond)
      return (prediction - noise).pow(2).mean(dim=(1, 2, 3)).chunk(2)

    with models.as_reference() as reference:
      ref_w, ref_l = errors(reference)
    err_w, err_l = errors(models.unet)
    z = -0.5 * config.loss.beta * ((err_w - ref_w) - (err_l - ref_l))
    loss = -F.logsigmoid(z).sum() / size
    loss.backward()
    losses.append(loss.detach())
  return Found(torch.stack(losses).sum(), update(config, optimizer), {})


def ddim_mean_std(models: Models, pred: Tensor, x: Tensor, t: Tensor, prev_t: Tensor, eta: float):
  """Of the transition from x at t to prev_t, each [N] or []: mean f32[N,C,h,w] and std f32[N,1,1,1] or [1,1,1]."""
  abar, prev = (models.alphas_cumprod[v].reshape(*v.shape, 1, 1, 1) for v in (t, prev_t))
  std = eta * ((1 - prev) / (1 - abar) * (1 - abar / prev)).sqrt()
  x0 = (x - (1 - abar).sqrt() * pred) / abar.sqrt()
  return prev.sqrt() * x0 + (1 - prev - std**2).sqrt() * pred, std


def select_pair(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
  """Best and worst i64[B] of pools f32[B,k], and whether softmax tells them apart by more than the threshold."""
  import torch

  (best, winner), (worst, loser) = scores.max(1), scores.min(1)
  return winner, loser, torch.softmax(torch.stack([best, worst]), 0).diff(dim=0)[0].neg() > threshold


def pool_rollout(models: Models, config: Config, cond: Cond, text: Tensor, draws: Draws):
  """SPO's rollout: valid transitions by name, how many of them share their start, scores and pairs of all groups.

  After `warmup_steps` steps each group of steps draws `pool_size` candidates from one latent of a prompt; they run on
  their own, are scored, and one of them at random is where the next group starts.
  """
  import torch

  s, unet = config.spo, models.unet
  assert models.scorer is not None
  scores_of, device = models.scorer[0], text.device
  prompts, k, length = len(text), s.pool_size, s.inner_steps + 1
  latent = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
  models.scheduler.set_timesteps(s.num_inference_steps, device=device)
  ts = models.scheduler.timesteps
  # The last step goes to abar_0, so that its std is positive.
  prev = torch.cat([ts[1:], torch.zeros_like(ts[:1])])
  single = with_empty(models, cond)
  pooled = with_empty(models, {name: v.repeat_interleave(k, dim=0) for name, v in cond.items()})
  text = text.repeat_interleave(k, dim=0)
  rows = torch.arange(prompts, device=device)

  def call(x, i):
    return guided(unet, x, ts[i], single if len(x) == prompts else pooled, s.guidance_scale)

  def draw(pred, x, i):
    mean, std = ddim_mean_std(models, pred, x, ts[i], prev[i], s.eta)
    return mean + std * draws.normal(len(x), latent)

  def score(x0, t):
    x0 = (x0 / models.vae.config.scaling_factor).to(models.dtype)
    return scores_of(models.vae.decode(x0, return_dict=False)[0], t, text).reshape(prompts, k)

  x = draws.normal(prompts, latent)
  for i in range(s.warmup_steps):
    x = draw(call(x, i), x, i)
  pred = call(x, s.warmup_steps)
  last_length = 2 if length == 1 else length
  last_start = s.num_inference_steps - last_length
  starts = [*range(s.warmup_steps, last_start, length), last_start]
  found: dict[str, list[Tensor]] = {name: [] for name in ("x_w", "x_l", "next_w", "next_l", "t", "prev_t", "prompt")}
  all_scores, all_pairs, num_shared = [], [], 0
  for start in starts:
    last = start == last_start
    end = s.num_inference_steps if last else start + length
    pred, spread = (v.repeat_interleave(k, dim=0) for v in (pred, x))
    path = [draw(pred, spread, start)]
    for i in range(start + 1, end):
      path.append(draw(call(path[-1], i), path[-1], i))
    if last:
      scores = score(path[-1], torch.zeros_like(ts[0]))
    else:  # the call that scores is the one that denoises next
      pred, abar = call(path[-1], end), models.alphas_cumprod[ts[end]]
      scores = score((path[-1] - (1 - abar).sqrt() * pred) / abar.sqrt(), ts[end])
    winner, loser, valid = select_pair(scores, s.threshold)
    all_scores.append(scores)
    all_pairs.append((winner, loser, valid))
    prompt = rows[valid]
    w, l = ((rows * k + index)[valid] for index in (winner, loser))
    for j, i in enumerate(range(start, end)):
      found["x_w"].append(path[j - 1][w] if j else x[valid])
      found["x_l"].append(path[j - 1][l] if j else x[valid])
      found["next_w"].append(path[j][w])
      found["next_l"].append(path[j][l])
      found["t"].append(ts[i].expand(len(prompt)))
      found["prev_t"].append(prev[i].expand(len(prompt)))
      found["prompt"].append(prompt)
    num_shared += len(prompt)
    if not last:
      member = rows * k + draws.members(prompts, k)
      x, pred = path[-1][member], pred[member]
  pairs = tuple(torch.stack(v) for v in zip(*all_pairs, strict=True))
  return {name: torch.cat(v) for name, v in found.items()}, num_shared, torch.stack(all_scores), pairs


def transition_losses(models: Models, config: Config, part: Mapping[str, Tensor], cond: Cond) -> Tensor:
  """SPO's loss f32[N] of transitions: four guided calls of N rows, two of them with gradients."""
  from torch.nn import functional as F

  s = config.spo
  both = with_empty(models, {k: v[part["prompt"]] for k, v in cond.items()})

  def log_prob(unet, x, target):
    pred = guided(unet, x, part["t"], both, s.guidance_scale)
    mean, std = ddim_mean_std(models, pred, x, part["t"], part["prev_t"], s.eta)
    value = -((target - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return value.mean(dim=(1, 2, 3))

  with models.autocast():
    with models.as_reference() as reference:
      ref_w = log_prob(reference, part["x_w"], part["next_w"])
      ref_l = log_prob(reference, part["x_l"], part["next_l"])
  with models.autocast():
    log_w = log_prob(models.unet, part["x_w"], part["next_w"])
    log_l = log_prob(models.unet, part["x_l"], part["next_l"])
  ratio_w, ratio_l = (
    (a - b).exp().clamp(1 - s.ratio_clip, 1 + s.ratio_clip) for a, b in ((log_w, ref_w), (log_l, ref_l))
  )
  return -F.logsigmoid(config.loss.beta * (ratio_w.log() - ratio_l.log()))


def spo_step(models: Models, config: Config, optimizer: Any, batch: Mapping[str, Tensor], draws: Draws) -> Found:
  """One iteration of SPO: rollout, scoring, and the updates that the valid pairs pay for.

  Args:
    batch: `input_ids` i64[B,L]; `micro_batch`, transitions at a time, where it is not an update's / accumulation.
  """
  import torch

  s, ids = config.spo, batch["input_ids"]
  assert models.scorer is not None
  with torch.no_grad():
    cond = encode_prompts(models.encoders, models.vae, models.unet, ids)
    text = models.scorer[1](ids)
    with models.autocast():
      rows, shared, scores, pairs = pool_rollout(models, config, cond, text, draws)
  total = len(rows["t"])
  updates = num_updates(config, shared, total - shared)
  order = draws.order(total)
  loss, norm = torch.full((), math.log(2.0)), torch.zeros(())
  for m in range(updates):
    index = order[m::updates]
    loss = torch.zeros((), device=ids.device)
    micro = batch.get("micro_batch") or -(-len(index) // config.accumulation)
    for chosen in index.split(micro):
      part = {name: v[chosen] for name, v in rows.items()}
      part_loss = transition_losses(models, config, part, cond).sum() / len(index)
      part_loss.backward()
      loss += part_loss.detach()
    norm = update(config, optimizer)
  singles = s.warmup_steps + 1
  counts = {
    "transitions": total,
    "updates": updates,
    "rollout_calls_a_prompt": singles + (s.num_inference_steps - singles) * s.pool_size,
    "policy_rows": 2 * total,
    "reference_rows": 2 * total,
  }
  return Found(loss, norm, counts, scores, pairs)


def num_updates(config: Config, shared: int, separate: int) -> int:
  """As jaxpref makes them: `minibatch` transitions that share their start in one, the others in proportion."""
  s = config.spo
  of_prompt = (s.num_inference_steps - s.warmup_steps) // (s.inner_steps + 1) - (s.inner_steps == 0)
  size = min(s.minibatch, config.batch_size * of_prompt)
  size_separate = -(-size * (s.num_inference_steps - s.warmup_steps - of_prompt) // of_prompt)
  return max(-(-shared // size), -(-separate // size_separate))


def load_batch(file: pathlib.Path, device: str) -> tuple[dict[str, Tensor], np.ndarray]:
  """The batch that `save_inputs` wrote, with the pairs in order, and the ids of the empty prompt."""
  import torch

  with np.load(file) as arrays:
    found = dict(arrays)
  batch = {"input_ids": torch.from_numpy(found["input_ids"]).to(device, torch.long)}
  if "label_0" in found:
    first = torch.from_numpy(found["label_0"] >= 0.5).to(device)
    for name, field in (("", "pixels"), ("_time_ids", "time_ids")):
      if f"{field}_0" not in found:
        continue
      both = [found[f"{field}_{i}"] for i in (0, 1)]
      if field == "pixels":
        both = [x.astype(np.float32) / 127.5 - 1 if x.dtype == np.uint8 else x for x in both]
        both = [np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for x in both]
      both = [torch.from_numpy(x).to(device) for x in both]
      of_first = first.reshape(-1, *[1] * (both[0].ndim - 1))
      batch[f"winner{name}"], batch[f"loser{name}"] = torch.where(of_first, *both), torch.where(of_first, *both[::-1])
  return batch, found["empty_ids"]


STEPS = {"dpo": dpo_step, "spo": spo_step}


# ---- The clock -------------------------------------------------------------------------------------------------------


def measure(
  case: str,
  size: str,
  batch_size: int | None,
  steps: int,
  folder: pathlib.Path,
  *,
  mode: str,
  dtype: str | None,
  layout: str = "auto",
  vae_slicing: bool = False,
  micro_batch: int | None = None,
) -> dict[str, Any]:
  """One row of OUT.json, from what `prepare` wrote into the folder."""
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.benchmark = True
  config = recipe(case, size, batch_size, dtype)
  batch, empty_ids = load_batch(folder / f"{case}.npz", device)
  models = load_models(folder, config, device=device, empty_ids=empty_ids)
  if micro_batch:
    batch["micro_batch"] = micro_batch
  if vae_slicing:
    models.vae.enable_slicing()
  if layout == "auto":
    layout = faster_layout(models, config) if device == "cuda" else "contiguous"
  set_layout(models, layout)
  if mode == "compile":
    models = compiled(models)
  parameters = [p for p in models.unet.parameters() if p.requires_grad]
  optimizer = make_optimizer(config, parameters)
  draws = random_draws(device, len(models.alphas_cumprod))
  step = STEPS[config.objective]

  def run() -> tuple[float, dict[str, int]]:
    started = time.perf_counter()
    counts = step(models, config, optimizer, batch, draws).counts
    if device == "cuda":
      torch.cuda.synchronize()
    return time.perf_counter() - started, counts

  warm_up = sum(run()[0] for _ in range(2 if mode == "compile" else 1))
  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  timed = [run() for _ in range(steps)]
  seconds = [s for s, _ in timed]
  median = float(np.median(seconds))
  memory = torch.cuda.max_memory_allocated() if device == "cuda" else bench.resident_bytes()
  return {
    "case": case,
    "size": size,
    "mode": mode,
    "batch": config.batch_size,
    "dtype": config.dtype,
    "remat": config.remat,
    "rank": config.lora.rank,
    "optimizer": config.optimizer.name,
    "layout": layout,
    "vae_slicing": vae_slicing,
    "seconds": [round(s, 4) for s in seconds],
    "seconds_a_step": median,
    "spread": float((np.max(seconds) - np.min(seconds)) / median),
    "items_per_second": config.batch_size / median,
    "peak_memory_gib": memory / 2**30,
    "memory_is": "measured" if device == "cuda" else "resident",
    "resident_gib": bench.resident_bytes() / 2**30,
    "compile_seconds": warm_up,
    "trained_parameters": sum(p.numel() for p in parameters),
    **timed[-1][1],
    "devices": f"1 x {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}",
    "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    | {"python": platform.python_version()},
  }


def set_layout(models: Models, layout: str) -> None:
  """Of the convolutions' weights, which their inputs follow."""
  import torch

  form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  for network in (models.unet, models.reference, models.vae):
    if network is not None:
      network.to(memory_format=form)


def faster_layout(models: Models, config: Config) -> str:
  """Of the two the one in which forward and backward pass of the UNet are faster, at the batch of a DPO pair step."""
  import torch

  size = models.unet.config.sample_size
  rows = 2 * config.batch_size
  x = torch.randn(rows, models.unet.config.in_channels, size, size, device=models.alphas_cumprod.device)
  t = torch.full((rows,), 500, device=x.device)
  cond = {k: v.expand(rows, *v.shape[1:]) for k, v in models.empty.items()}
  seconds: dict[str, float] = {}
  for layout in ("contiguous", "channels_last"):
    set_layout(models, layout)
    for trial in range(4):
      torch.cuda.synchronize()
      started = time.perf_counter()
      with models.autocast():
        predict(models.unet, x, t, cond).sum().backward()
      torch.cuda.synchronize()
      if trial:  # the first chooses kernels
        seconds[layout] = min(time.perf_counter() - started, seconds.get(layout, math.inf))
    models.unet.zero_grad()
  return min(seconds, key=seconds.__getitem__)


def compiled(models: Models) -> Models:
  """The same networks under torch.compile."""
  import torch

  torch._dynamo.config.recompile_limit = 64  # rollout and updates have batches of several sizes
  networks = [models.unet, models.vae.encoder, models.vae.decoder, *models.encoders]
  for network in networks if models.reference is None else [*networks, models.reference]:
    network.compile(dynamic=False)
  if models.scorer is None:
    return models
  scores, text_embeds = (torch.compile(f, dynamic=False) for f in models.scorer)
  return models._replace(scorer=(scores, text_embeds))


# ---- That both compute the same --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
  """One step of a case, of either framework.

  Attributes:
    loss, grad_norm: of its one update.
    change: what the update added to each trained parameter, by name and in the layout of PyTorch.
    scores: of SPO: f32[G,B,k].
    pairs: of SPO: winner, loser and valid, each [G,B].
  """

  loss: float
  grad_norm: float
  change: dict[str, np.ndarray]
  scores: np.ndarray | None = None
  pairs: tuple[np.ndarray, ...] | None = None


def check_recipe(case: str, size: str) -> Config:
  """A case on a miniature of the size's topology (tiny: on tiny-sd itself), made to be compared.

  Float32, one update with all transitions, and SGD of rate 1: the update is the clipped gradient. AdamW's first step is
  nearly the sign of each entry of the gradient, so that it would show rounding of the smallest ones.
  """
  config = bench.recipe(case, size, None, dtype="float32", miniature=True)
  config.batch_size = 4 if config.objective == "dpo" else 2
  config.optimizer.update(name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, b1=0.0)
  config.spo.minibatch = sys.maxsize
  if config.objective == "dpo":
    config.accumulation = 1
    config.loss.beta = 500.0  # 5000 makes of one rounding of an error a change of the logit by 3e-4
  return config


def check_batch(config: Config, experiment: Any) -> dict[str, np.ndarray]:
  """Prompts and, for Diffusion-DPO, pairs of noise of which each image wins in some; for SDXL of different sizes."""
  rng, size = np.random.default_rng(2), config.batch_size
  batch = {"input_ids": np.asarray(experiment.tokenize(["a red apple", "cat", "two dogs", ""][:size]))}
  if config.objective == "dpo":
    side = experiment.model.image_size
    for i in (0, 1):
      batch[f"pixels_{i}"] = rng.integers(0, 256, (size, side, side, 3), np.uint8)
      if experiment.model.text_encoder_2 is not None:
        batch[f"time_ids_{i}"] = rng.integers(0, 1024, (size, 6)).astype(np.float32)
    batch["label_0"] = np.arange(size, dtype=np.float32) % 2
  return batch


def fixed_noise(shape: Sequence[int]) -> np.ndarray:
  """One array of normal numbers f32[...] in the place of all noise of that shape."""
  return np.resize(np.random.default_rng(0).standard_normal(2**16 + 1, np.float32), shape)


def fixed_members(n: int, k: int) -> np.ndarray:
  """The candidates to continue from, in the place of random ones."""
  return np.arange(n, dtype=np.int32) % k


@contextlib.contextmanager
def fixed_jax_draws() -> Iterator[None]:
  """While a step is traced: no noise and no member of a pool is random."""
  import jax
  import jax.numpy as jnp

  normal = lambda key, shape=(), dtype=jnp.float32: jnp.asarray(fixed_noise(shape), dtype)
  randint = lambda key, shape, minval, maxval: jnp.asarray(fixed_members(shape[0], maxval))
  with mock.patch.object(jax.random, "normal", normal), mock.patch.object(jax.random, "randint", randint):
    yield


def perturbed(tree: Any, scale: float) -> Any:
  """Parameters f32 moved at random: each array by `scale` times its root mean square, or of 1 where it is zero."""
  import jax

  rng = np.random.default_rng(1)

  def move(x):
    x = np.asarray(x, np.float32)
    size = float(np.sqrt(np.mean(x**2))) or 1.0
    return x + np.float32(scale * size) * rng.standard_normal(x.shape, np.float32)

  return jax.tree.map(move, tree)


# How far the policy is moved away from its reference, so that no loss is log 2 and few ratios are clipped.
MOVED = 3e-3


def jax_outcome(case: str, size: str, folder: pathlib.Path, config: Config | None = None) -> Outcome:
  """jaxpref's own step; writes what it starts from into the folder: models, and CASE.npz with the timesteps as well."""
  import jax
  import safetensors.numpy

  from jaxpref import build, lora_files, rollout, step, tensor_files, train

  config = check_recipe(case, size) if config is None else config
  experiment = build.build(config)
  params = perturbed(experiment.params, MOVED)
  frozen, ref_params = dict(experiment.frozen), experiment.params
  if "spm" in frozen and config.preference_model.startswith("random:"):
    frozen["spm"] = perturbed(frozen["spm"], 0.1)  # a fresh one does not know the time
  # The modules alone; the parameters are the experiment's.
  weights = {**frozen, **ref_params}
  pipe = build.load_text_to_image(config.model.replace("random:", "zeros:"), dtype="float32")
  pipe = dataclasses.replace(pipe, params={name: weights[name] for name in pipe.params})
  scorer = None
  if "spm" in frozen:
    name = config.preference_model.replace("random:", "zeros:")
    scorer = (build.load_scorer(name, dtype="float32")[0], frozen["spm"])
  save_models(folder, config, pipe, scorer, params)
  batch = check_batch(config, experiment)
  assert experiment.tokenize is not None
  extra = {}
  optimizer, _ = train.make_optimizer(config)
  if experiment.objective is not None:
    step_fn = step.offline_step(experiment.objective, optimizer, seed=config.seed)
    extra["timesteps"] = step.timesteps(experiment.objective, config.batch_size, seed=config.seed, step=0)
  else:
    assert experiment.online_step is not None
    step_fn = experiment.online_step(optimizer)
  save_inputs(folder / f"{case}.npz", batch | extra, experiment.tokenize([""]))

  seen: list[Any] = []

  def watched(*args, **kwargs):
    pairs = pool_rollout(*args, **kwargs)
    jax.debug.callback(seen.append, (pairs.scores, pairs.shared.valid))
    return pairs

  pool_rollout = rollout.pool_rollout
  state = step.initial_state(params, ref_params, optimizer.init(params))
  with fixed_jax_draws(), mock.patch.object(rollout, "pool_rollout", watched):
    run = jax.jit(step_fn).lower(state, frozen, batch).compile()
  after, metrics = jax.block_until_ready(run(state, frozen, batch))
  jax.effects_barrier()
  change = jax.tree.map(lambda a, b: np.asarray(a, np.float32) - b, after.params, params)
  if "unet_lora" in change:
    lora_files.save_diffusers(folder / "change.safetensors", change["unet_lora"], 1.0)
  else:
    tensor_files.save_tree(folder / "change.safetensors", change["unet"])
  arrays = safetensors.numpy.load_file(folder / "change.safetensors")
  if "unet_lora" in change:
    arrays = {torch_name(name): value for name, value in arrays.items()}
  scores = pairs = None
  if seen:
    scores, valid = (np.asarray(v).swapaxes(0, 1) for v in seen[0])
    pairs = (scores.argmax(-1), scores.argmin(-1), valid)
  return Outcome(float(metrics["loss"]), float(metrics["grad_norm"]), arrays, scores, pairs)


def torch_outcome(case: str, size: str, folder: pathlib.Path, config: Config | None = None) -> Outcome:
  """The same step in PyTorch, from what `jax_outcome` wrote."""
  import torch

  config = check_recipe(case, size) if config is None else config
  batch, empty_ids = load_batch(folder / f"{case}.npz", "cpu")
  models = load_models(folder, config, device="cpu", empty_ids=empty_ids)
  with np.load(folder / f"{case}.npz") as arrays:
    timesteps = torch.from_numpy(arrays["timesteps"]).long() if "timesteps" in arrays else None

  def normal(rows, shape):
    channels, height, width = shape
    return torch.from_numpy(fixed_noise((rows, height, width, channels))).permute(0, 3, 1, 2)

  draws = Draws(
    normal=normal,
    timesteps=lambda n: timesteps,
    members=lambda n, k: torch.from_numpy(fixed_members(n, k)).long(),
    order=torch.arange,
  )
  trained = {n: p for n, p in models.unet.named_parameters() if p.requires_grad}
  before = {n: p.detach().clone() for n, p in trained.items()}
  optimizer = make_optimizer(config, list(trained.values()))
  found = STEPS[config.objective](models, config, optimizer, batch, draws)
  assert found.counts.get("updates", 1) == 1
  change = {n: (p.detach() - before[n]).numpy() for n, p in trained.items()}
  scores = pairs = None
  if found.scores is not None:
    scores, pairs = found.scores.numpy(), tuple(v.numpy() for v in found.pairs)
  return Outcome(float(found.loss), float(found.grad_norm), change, scores, pairs)


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
  """Relative differences of loss, gradient norm, scores and update, and the share of pairs that are not the same."""
  relative = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a))
  if ours.change.keys() != theirs.change.keys():
    raise SystemExit(f"error: the two train other parameters: {sorted(ours.change.keys() ^ theirs.change.keys())[:4]}.")
  names = sorted(ours.change)
  flat = [np.concatenate([o.change[n].ravel() for n in names]).astype(np.float64) for o in (ours, theirs)]
  found = {
    "loss": relative(np.float64(ours.loss), theirs.loss),
    "grad_norm": relative(np.float64(ours.grad_norm), theirs.grad_norm),
    "update": relative(*flat),
  }
  if ours.scores is not None and ours.pairs is not None and theirs.pairs is not None:
    found["scores"] = relative(ours.scores, theirs.scores)
    same = [np.asarray(a == b) for a, b in zip(ours.pairs, theirs.pairs, strict=True)]
    found["other_pairs"] = 1.0 - float(np.mean(np.all(same, axis=0)))
  return found


def disagreements(found: Mapping[str, float]) -> list[str]:
  """What of `differences` is above its bound; no pair may be another one."""
  return [name for name, value in found.items() if not value <= BOUNDS.get(name, 0.0)]


def check(case: str, size: str) -> list[str]:
  """Runs both, prints the numbers, and returns what disagrees."""
  with tempfile.TemporaryDirectory() as folder:
    ours = jax_outcome(case, size, pathlib.Path(folder))
    theirs = torch_outcome(case, size, pathlib.Path(folder))
  found = differences(ours, theirs)
  bad = disagreements(found)
  parts = [
    f"loss {ours.loss:.6f} (jaxpref), {theirs.loss:.6f} (torch)",
    *(f"{name.replace('_', ' ')} {value:.1e}" for name, value in found.items()),
  ]
  if ours.pairs is not None:
    parts.append(f"{ours.pairs[2].size} pairs, {int(ours.pairs[2].sum())} of them valid")
  print(f"{case} {size}: {'; '.join(parts)}: {'DIFFERENT: ' + ', '.join(bad) if bad else 'the same'}", flush=True)
  return bad


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Markdown."""
  lines = [
    "| case | mode | batch | dtype | s a step (spread) | rows/s | peak GiB | warm-up s | transitions, updates |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for r in rows:
    name = f"{r['case']} {r['size']} | {r['mode']}"
    if "error" in r:
      lines.append(f"| {name} | | | {r['error']} | | | | |")
      continue
    memory = f"{r['peak_memory_gib']:.2f}{'' if r['memory_is'] == 'measured' else ' (resident)'}"
    work = f"{r['transitions']}, {r['updates']}" if "transitions" in r else ""
    lines.append(
      f"| {name} | {r['batch']} | {r['dtype']} | {r['seconds_a_step']:.3g} ({100 * r['spread']:.0f} %) "
      f"| {r['items_per_second']:.3g} | {memory} | {r['compile_seconds']:.0f} | {work} |"
    )
  good = [r for r in rows if "error" not in r]
  where = sorted({f"{r['devices']}, torch {r['versions']['torch']}, {r['layout']}" for r in good})
  return "\n".join([*lines, "", f"On {'; '.join(where)}."])


def compare(files: Sequence[pathlib.Path]) -> str:
  """The table of all rows of files of bench.py and of this script, rounds of one case pooled.

  The ratio is PyTorch's median of all steps over jaxpref's; in brackets the smallest and the largest ratio of any two
  runs' medians.

  Raises:
    SystemExit: rows of one case are of other batches, precisions or ranks, or only one of the two is there.
  """
  runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
  for file in files:
    for row in json.loads(file.read_text()):
      name = row.get("mode") or "jaxpref"
      if "error" not in row:
        runs.setdefault((row["case"], row["size"]), {}).setdefault(name, []).append(row)
  lines = [
    "| case | batch | dtype | jaxpref s | torch s | torch / jaxpref (of any two runs) | peak GiB: jaxpref, torch |",
    "|---|---|---|---|---|---|---|",
  ]
  notes = []
  for (case, size), sides in runs.items():
    ours = sides.get("jaxpref", [])
    others = {mode: rows for mode, rows in sides.items() if mode != "jaxpref"}
    if not ours or not others:
      raise SystemExit(f"error: {case} {size} was timed by one of the two alone; give files of both.")
    for mode, theirs in others.items():
      for field in ("batch", "dtype", "rank", "remat", "trained_parameters", "updates", "transitions"):
        values = {r[field] for r in [*ours, *theirs] if field in r}
        if field == "updates":
          values = {float(v) for v in values} if "transitions" in theirs[0] else set()
        if len(values) > 1:
          raise SystemExit(f"error: {case} {size}: {field} is {sorted(values)}; time both with the same.")
      median = lambda rows: float(np.median([s for r in rows for s in r["seconds"]]))
      ratios = [b["seconds_a_step"] / a["seconds_a_step"] for a in ours for b in theirs]
      memory = []
      for rows in (ours, theirs):
        kind = "" if rows[0]["memory_is"] == "measured" else " resident"
        value = "peak_memory_gib" if not kind else "resident_gib"
        memory.append(f"{max(r.get(value, math.nan) for r in rows):.2f}{kind}")
      lines.append(
        f"| {case} {size}, {mode} | {ours[0]['batch']} | {ours[0]['dtype']} | {median(ours):.3g} "
        f"| {median(theirs):.3g} | {median(theirs) / median(ours):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
        f"{len(ours)} x {len(theirs)} runs) | {', '.join(memory)} |"
      )
    theirs = next(iter(others.values()))
    if "transitions" in theirs[0]:
      notes.append(
        f"{case} {size}: in an iteration {theirs[0]['transitions']} transitions in {theirs[0]['updates']} updates, and "
        f"{theirs[0]['rollout_calls_a_prompt']} guided calls of the UNet a prompt in the rollout, on both sides."
      )
  versions = sorted(
    {f"jax {r['versions']['jax']}" if "jax" in r["versions"] else f"torch {r['versions']['torch']}"
     for sides in runs.values() for rows in sides.values() for r in rows}
  )  # fmt: skip
  devices = sorted({r["devices"] for sides in runs.values() for rows in sides.values() for r in rows})
  return "\n".join([*lines, "", *notes, f"On {'; '.join(devices)}; {', '.join(versions)}."])


# ---- Command line ----------------------------------------------------------------------------------------------------


def child(options: Sequence[str], *, hidden: bool = False) -> subprocess.CompletedProcess[str]:
  """This script in a process of its own, where JAX does not touch an accelerator.

  Args:
    hidden: PyTorch is not to see one either.
  """
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  if hidden:
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
  command = [sys.executable, str(ROOT / "scripts" / "bench_torch.py"), *options]
  return subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, env=environment)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=("smoke", *bench.BATCH), default="smoke", help="default: %(default)s")
  parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
  parser.add_argument("--mode", choices=MODES, default="eager", help="default: %(default)s")
  parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
  parser.add_argument("--batch", type=int, help="pairs or prompts")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the recipe's")
  parser.add_argument("--layout", choices=("auto", "contiguous", "channels_last"), default="auto")
  parser.add_argument("--micro-batch", type=int, help="spo: transitions at a time")
  parser.add_argument("--vae-slicing", action="store_true", help="encode and decode one image at a time")
  parser.add_argument("--out", type=pathlib.Path, help="default: runs/bench_SIZE_torch")
  parser.add_argument("--check", action="store_true", help="show that both compute the same, on miniatures; no timing")
  parser.add_argument("--compare", nargs="+", type=pathlib.Path, metavar="FILE", help="OUT.json of both: a table")
  parser.add_argument("--prepare", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.compare:
    text = compare(args.compare)
    print(text)
    if args.out:
      args.out.with_suffix(".md").write_text(text + "\n")
    return
  if args.check and not args.child:
    failed = [case for case in args.cases if _checked(case, args.size)]
    if failed:
      raise SystemExit(f"error: {', '.join(failed)}: not the same as jaxpref, or could not be run; see above.")
    return
  if args.check:
    raise SystemExit(bool(check(args.child, args.size)))
  if args.prepare:
    prepare(args.prepare, args.cases, args.size, args.batch, args.dtype)
    return
  how = {"mode": args.mode, "dtype": args.dtype, "layout": args.layout}
  if args.child:
    how |= {"vae_slicing": args.vae_slicing, "micro_batch": args.micro_batch}
    row = measure(args.child, args.size, args.batch, args.steps, args.folder, **how)
    args.out.write_text(json.dumps(row))
    return
  out = args.out or pathlib.Path(f"runs/bench_{args.size}_torch")
  out.parent.mkdir(parents=True, exist_ok=True)
  rows = []
  common = ["--size", args.size, "--steps", str(args.steps)]
  for name in ("batch", "dtype", "micro_batch"):
    if getattr(args, name):
      common += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
  with tempfile.TemporaryDirectory() as folder:
    print(f"models and batches of {args.size} ...", file=sys.stderr, flush=True)
    done = child([*common, "--prepare", folder, "--cases", *args.cases])
    if done.returncode:
      raise SystemExit(f"{done.stderr}\nerror: the models could not be written; see above.")
    for case in args.cases:
      print(f"{case} {args.size} {args.mode}: {args.steps} steps ...", file=sys.stderr, flush=True)
      row_file = pathlib.Path(folder) / f"{case}.json"
      options = [*common, "--child", case, "--folder", folder, "--out", str(row_file)]
      options += ["--mode", args.mode, "--layout", args.layout] + ["--vae-slicing"] * args.vae_slicing
      done = child(options)
      if done.returncode or not row_file.is_file():
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        rows.append({"case": case, "size": args.size, "mode": args.mode, "error": last[0][:200]})
        print(done.stderr, file=sys.stderr)
      else:
        rows.append(json.loads(row_file.read_text()))
      out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
      out.with_suffix(".md").write_text(table(rows) + "\n")
  print(table(rows))
  if any("error" in row for row in rows):
    raise SystemExit("error: not all cases ran; see above.")


def _checked(case: str, size: str) -> bool:
  """Whether a case's check failed; in a process without an accelerator, as TF32 is no float32."""
  done = child(["--check", "--child", case, "--size", size], hidden=True)
  if done.returncode not in (0, 1) or (done.returncode == 1 and "Traceback" in done.stderr):
    print(done.stderr, file=sys.stderr)
  return done.returncode != 0


if __name__ == "__main__":
  main()
