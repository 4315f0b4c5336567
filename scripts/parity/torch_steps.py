"""Training steps of Diffusion-DPO and SPO in PyTorch, as the published implementations write them.

scripts/bench/bench_torch.py times them beside jaxpref's. On both sides: batch, recipe, precision (parameters that are
trained in float32, networks in the recipe's dtype, losses in float32; TF32 where the dtype is float32), gradient norm
clipped, activation checkpointing where the recipe has `remat`, data and images on the device before the clock starts.
Here:

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
"""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ADAPTER = "default"  # peft's name of the only adapter

Config = Any
Tensor = Any
Cond = dict[str, Tensor]


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
    """Makes float32 parameters compute in the dtype of the networks."""
    import torch

    return torch.autocast(self.alphas_cumprod.device.type, self.dtype, enabled=self.dtype != torch.float32)

  @contextlib.contextmanager
  def as_reference(self) -> Iterator[Any]:
    """Switches to the reference UNet, without gradients."""
    import torch

    with torch.no_grad():
      if self.reference is not None:
        yield self.reference
      else:
        self.unet.disable_adapters()
        yield self.unet
        self.unet.enable_adapters()


def policy_file(config: Config) -> str:
  """Returns the name of the file with the trained parameters."""
  return f"{config.objective}_{config.lora.rank}.safetensors"


def load_models(
  folder: pathlib.Path, config: Config, *, device: str, empty_ids: np.ndarray, drawn: bool = False
) -> Models:
  """Opens what `save_models` wrote; `drawn` makes networks of its configs, with random weights, on the device."""
  import diffusers
  import peft
  import safetensors.torch
  import torch
  import transformers
  from diffusers.training_utils import cast_training_params

  dtype = getattr(torch, config.dtype)
  pipeline = folder / "pipeline"

  load = functools.partial(make_network, pipeline, device=device, drawn=drawn)

  def frozen(cls, name):
    return load(cls, name, dtype=dtype).eval().requires_grad_(False)

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
    same = drawn or {torch_name(n) for n in trained} == set(factors)
    assert same, "peft adapts other layers than jaxpref"
    with torch.no_grad():
      for name, value in trained.items():
        factors[torch_name(name)].copy_(value)
  else:
    reference = frozen(diffusers.UNet2DConditionModel, "unet")
    unet = load(diffusers.UNet2DConditionModel, "unet", dtype=torch.float32)
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


def make_network(folder: pathlib.Path, cls: Any, name: str, *, dtype: Any, device: str, drawn: bool) -> Any:
  """Opens a network of a pipeline folder, or makes it of its config with random weights, on the device."""
  import torch

  of_transformers = cls.__module__.startswith("transformers")
  if not drawn:
    kind = {"dtype": dtype} if of_transformers else {"torch_dtype": dtype}
    return cls.from_pretrained(folder, subfolder=name, **kind).to(device)
  with torch.device(device):
    if of_transformers:
      return cls(cls.config_class.from_pretrained(folder, subfolder=name)).to(dtype)
    return cls.from_config(cls.load_config(folder, subfolder=name)).to(dtype)


def torch_name(name: str) -> str:
  """Returns a factor's name in peft from its name in a file: unet.LAYER.lora_A.weight, LAYER.lora_A.default.weight."""
  return name.removeprefix("unet.").replace(".weight", f".{ADAPTER}.weight")


def encode_prompts(encoders: Sequence[Any], vae: Any, unet: Any, ids: Tensor) -> Cond:
  """Returns the UNet's conditioning on prompts i64[B,L], or i64[B,2L] for two encoders."""
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
  """Returns the UNet's output f32[N,C,h,w]."""
  added = {k: cond[k] for k in ("text_embeds", "time_ids") if k in cond} or None
  return unet(x, t, cond["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0].float()


def with_empty(models: Models, cond: Cond) -> Cond:
  """Returns the conditioning of a guided call: rows of the empty prompt, then those of `cond`."""
  import torch

  return {k: torch.cat([models.empty[k].expand(len(v), *v.shape[1:]), v]) for k, v in cond.items()}


def guided(unet: Any, x: Tensor, t: Tensor, both: Cond, scale: float) -> Tensor:
  """Computes classifier-free guidance in one call; `both` is from `with_empty`."""
  import torch

  if scale <= 1.0:
    return predict(unet, x, t, {k: v[len(v) // 2 :] for k, v in both.items()})
  t = torch.cat([t, t]) if t.ndim else t
  uncond, cond = predict(unet, torch.cat([x, x]), t, both).chunk(2)
  return uncond + scale * (cond - uncond)


# ---- The step-aware preference model ---------------------------------------------------------------------------------


def load_scorer(
  folder: pathlib.Path, dtype: Any, device: str
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
  """Loads SPO's preference model from the file that jaxpref writes, with the names of the published checkpoints."""
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
    """Applies one block; with time f32[N,D] its branches are shifted, scaled and gated."""
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
    """Returns unit vectors f32[B,P]; of two tokenizers' ids the first are CLIP's."""
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
    """Scores decoded images, about [-1, 1]; t is one number or one for each."""
    height, width = images.shape[-2:]
    size = vision["image_size"]
    scale = size / min(height, width)
    shape = (int(height * scale + 0.5), int(width * scale + 0.5))
    x = images.float()
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
  """Returns the recipe's optimiser at its full learning rate."""
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
  """Makes one update of Diffusion-DPO.

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
  """Returns mean f32[N,C,h,w] and std f32[N,1,1,1] or [1,1,1] of the transition from x at t to prev_t, [N] or []."""
  abar, prev = (models.alphas_cumprod[v].reshape(*v.shape, 1, 1, 1) for v in (t, prev_t))
  std = eta * ((1 - prev) / (1 - abar) * (1 - abar / prev)).sqrt()
  x0 = (x - (1 - abar).sqrt() * pred) / abar.sqrt()
  return prev.sqrt() * x0 + (1 - prev - std**2).sqrt() * pred, std


def select_pair(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
  """Returns best and worst i64[B] of pools f32[B,k], and whether their softmax differs by more than the threshold."""
  import torch

  (best, winner), (worst, loser) = scores.max(1), scores.min(1)
  return winner, loser, torch.softmax(torch.stack([best, worst]), 0).diff(dim=0)[0].neg() > threshold


def pool_rollout(models: Models, config: Config, cond: Cond, text: Tensor, draws: Draws):
  """Runs SPO's rollout; returns valid transitions by name, how many share their start, scores and pairs of all groups.

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
  last_length = 2 if length == 1 and not s.pool_last_step else length
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
  """Returns SPO's loss f32[N] of transitions: four guided calls of N rows, two of them with gradients."""
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
  """Makes one iteration of SPO: rollout, scoring, and the updates that the valid pairs need.

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
  """Returns jaxpref's number of updates: `minibatch` transitions that share their start, others in proportion."""
  s = config.spo
  steps = s.num_inference_steps - s.warmup_steps
  of_prompt = steps // (s.inner_steps + 1) - (s.inner_steps == 0 and not s.pool_last_step)
  size = min(s.minibatch, config.batch_size * of_prompt)
  size_separate = -(-size * (steps - of_prompt) // of_prompt)
  return max(-(-shared // size), -(-separate // size_separate) if size_separate else 0)


def load_batch(file: pathlib.Path, device: str) -> tuple[dict[str, Tensor], np.ndarray]:
  """Loads the batch that `save_inputs` wrote, with the pairs in order, and the ids of the empty prompt."""
  import torch

  with np.load(file) as arrays:
    found = dict(arrays)
  batch = {"input_ids": torch.from_numpy(found["input_ids"]).to(device, torch.long)}
  if "label_0" in found:
    first = torch.from_numpy(found["label_0"] >= 0.5).to(device)
    for name, field in (("", "pixels"), ("_time_ids", "sizes")):
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
