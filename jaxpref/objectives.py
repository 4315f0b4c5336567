"""What is optimised: from (params, batch, key) to (loss, metrics).

Each builder takes the model's pure functions and hyper-parameters and returns an `Objective`. Its `loss` maps
(params, ref_params, frozen, batch, key) to (sum of losses, count, metric pairs); the trainer divides once by the
global count. Objectives draw timesteps and noise, call the network and a loss of `losses.py`; the losses never
draw. Online objectives (`spo`, `grpo`) first make their batch: see `rollout.py`.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref import diffusion, losses, reference
from jaxpref.models.preference import StepAwareCLIPModel, preprocess
from jaxpref.models.text_to_image import Cond, TextToImage, guided
from jaxpref.rollout import Steps, Transitions
from jaxpref.training.metrics import Pairs, binned_mean, divide, mean_of

Batch = Mapping[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, jax.Array, Pairs]]
# (reward_w f32[B], reward_l f32[B], weight f32[B] or None) -> f32[B]
PairLoss = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
# (ref_params, frozen, batch, key) -> f32[], how far the reference has moved from the pre-trained model
DivergenceFn = Callable[[Any, Any, Any, jax.Array], jax.Array]

REWARD_BINS = 10


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is optimised.

  Attributes:
    loss: of a batch.
    divergence: where the reference may move, what gates its moves.
    timesteps: (key, size of the batch) -> i32[size], those that `loss` draws with this key; None: it draws none.
    statistics: (params, ref_params, frozen, batch, key) -> metric pairs of a batch that its loss depends on as a whole,
      without gradient. Under accumulation they are summed over the micro-batches first, with the keys that the loss has
      then, and `loss` gets their sum as an argument `statistics`; without, it computes its own. None: there are none.
  """

  loss: LossFn
  divergence: DivergenceFn | None = None
  timesteps: Callable[[jax.Array, int], jax.Array] | None = None
  statistics: Callable[[Any, Any, Any, Any, jax.Array], Pairs] | None = None


def named_key(key: jax.Array, name: str) -> jax.Array:
  """The key of one named use: every draw of a step folds a different name into the step's key."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def pair_loss(name: str, *, beta: float, label_smoothing: float = 0.0, ipo_factor: float = 1.0) -> PairLoss:
  """A loss on two implicit rewards by the name TRL users know: what `transition_loss` takes.

  Args:
    ipo_factor: the `factor` of `losses.ipo_loss`; 1 for the log-ratios of `transition_loss`.
  Raises:
    ValueError: if the name is unknown.
  """
  known: dict[str, PairLoss] = {
    "sigmoid": lambda w, l, weight: losses.dpo_loss(
      w, l, beta=beta, weight=weight, label_smoothing=label_smoothing
    ),
    "robust": lambda w, l, weight: losses.robust_dpo_loss(
      w, l, beta=beta, weight=weight, label_smoothing=label_smoothing
    ),
    "ipo": lambda w, l, weight: losses.ipo_loss(w, l, beta=beta, weight=weight, factor=ipo_factor),
    "hinge": lambda w, l, weight: losses.hinge_loss(w, l, beta=beta, weight=weight),
  }
  if name not in known:
    raise ValueError(f"config.loss.name={name!r} is unknown; expected one of {', '.join(known)}.")
  return known[name]


class DenoisedPair(NamedTuple):
  """What is known of noisy winners and losers at the same timestep, with the same noise.

  Attributes:
    pred_w, pred_l, ref_pred_w, ref_pred_l: [B,h,w,C] predictions of policy and reference; the reference's are None for
      losses that have none.
    target_w, target_l: f32[B,h,w,C] what they should be.
    err_w, err_l: f32[B] the policy's squared errors, means over h, w, C.
    reward_w, reward_l: f32[B] `losses.implicit_reward`; without a reference, -err / 2.
    weight: f32[B] factor on the margin.
  """

  pred_w: jax.Array
  pred_l: jax.Array
  ref_pred_w: jax.Array | None
  ref_pred_l: jax.Array | None
  target_w: jax.Array
  target_l: jax.Array
  err_w: jax.Array
  err_l: jax.Array
  reward_w: jax.Array
  reward_l: jax.Array
  weight: jax.Array


# DenoisedPair -> f32[B]
DenoisedLoss = Callable[[DenoisedPair], jax.Array]
REFERENCE_FREE = ("mapo", "sft")


def on_rewards(loss: PairLoss) -> DenoisedLoss:
  """A loss on two implicit rewards as one on denoised pairs."""
  return lambda pair: loss(pair.reward_w, pair.reward_l, pair.weight)


def safeguarded(loss: DenoisedLoss, *, mu: float) -> DenoisedLoss:
  """Any loss, with the loser's gradient scaled so that the winner's error does not grow (arXiv 2511.03317).

  Args:
    mu: share of the winner's own descent to keep, in [0, 1]; see `losses.safeguard_scale`.
  """

  def safe(pair):
    scale = losses.safeguard_scale(pair.pred_w, pair.target_w, pair.pred_l, pair.target_l, mu=mu)
    err_l, reward_l = (losses.scale_gradient(x, scale) for x in (pair.err_l, pair.reward_l))
    return loss(pair._replace(err_l=err_l, reward_l=reward_l))

  return safe


def denoised_loss(
  name: str, *, beta: float, label_smoothing: float = 0.0, snr: float = 0.5, num_train_timesteps: int = 1000
) -> DenoisedLoss:
  """A loss on denoised pairs by its name: those of `pair_loss`, and dspo, mapo and sft, which are not of rewards alone.

  Args:
    snr, num_train_timesteps: of mapo; the released trainer multiplies its margin by the number of timesteps.
  Raises:
    ValueError: if the name is unknown.
  """

  def dspo(p: DenoisedPair) -> jax.Array:
    if p.ref_pred_w is None:
      raise ValueError("dspo compares with the reference's predictions; expected reference_free=False.")
    return losses.dspo_loss(p.pred_w, p.ref_pred_w, p.target_w, p.reward_w, p.reward_l, beta=beta, weight=p.weight)

  known: dict[str, DenoisedLoss] = {
    "dspo": dspo,
    "mapo": lambda p: losses.mapo_loss(p.err_w, p.err_l, beta=beta, snr=snr, weight=num_train_timesteps * p.weight),
    "sft": lambda p: losses.sft_loss(p.err_w),
  }
  if name in known:
    return known[name]
  return on_rewards(pair_loss(name, beta=beta, label_smoothing=label_smoothing, ipo_factor=2.0))  # of halves


def _split_pair(batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """The winners' and the losers' `pixels` or `moments`, and `time_ids`; a tie, which has neither, keeps its order."""
  winners, losers = {}, {}
  for name in ("pixels", "moments", "time_ids"):
    if f"{name}_0" in batch:
      of_0, of_1 = batch[f"{name}_0"], batch[f"{name}_1"]
      first = jnp.expand_dims(batch["label_0"] >= 0.5, tuple(range(1, of_0.ndim)))
      winners[name], losers[name] = jnp.where(first, of_0, of_1), jnp.where(first, of_1, of_0)
  return winners, losers


def _latents(model: TextToImage, weights: Any, images: Batch, key: jax.Array) -> jax.Array:
  """Latents f32[B,h,w,C] of `pixels`, or drawn alike from their `moments` [B,h,w,2C], which were computed before."""
  if "moments" not in images:
    return model.encode_images(weights, images["pixels"], key)
  mean, logvar = jnp.split(images["moments"].astype(jnp.float32), 2, axis=-1)
  return model.draw_latents(mean, logvar, key)


def _text(model: TextToImage, weights: Any, batch: Batch) -> Cond:
  """The conditioning on `input_ids`, or what the text encoders made of them before."""
  if "encoder_hidden_states" not in batch:
    return model.encode_text(weights, batch["input_ids"])
  cond: Cond = {"encoder_hidden_states": batch["encoder_hidden_states"]}
  if "text_embeds" in batch:
    cond["added_cond_kwargs"] = {"text_embeds": batch["text_embeds"]}
  return cond


def _with_time_ids(cond: Cond, time_ids: jax.Array | None) -> Cond:
  """The conditioning at sizes and crops f32[B, 6] of one's own; unchanged without them, or where none is known (SD1.5).

  The text encoders know nothing of them, so that images of any size share one encoding of their prompt.
  """
  if time_ids is None or "added_cond_kwargs" not in cond:
    return cond
  return {**cond, "added_cond_kwargs": {**cond["added_cond_kwargs"], "time_ids": time_ids}}


def _errors(model: TextToImage, weights: Any, x_t: jax.Array, t: jax.Array, cond: Cond, target: jax.Array):
  return diffusion.squared_error(model.predict(weights, x_t, t, cond), target)


def _uniform_timesteps(model: TextToImage) -> Callable[[jax.Array, int], jax.Array]:
  total = model.schedule.num_train_timesteps
  return lambda key, size: diffusion.sample_timesteps(named_key(key, "t"), size, num_train_timesteps=total)


def denoise(model: TextToImage) -> Objective:
  """Denoising score matching (arXiv 2006.11239, Eq. 14) on `pixels` and `input_ids`: pre-training, or SFT.

  In their place a batch may hold what the frozen networks make of them, `moments` and `encoder_hidden_states`
  (data/latents.py). So may those of `dpo` and `kto`.

  SDXL is conditioned on the `time_ids` of each image where the batch has them, on uncropped images of its own size
  otherwise. So are the objectives below, on the `time_ids_0` and `time_ids_1` of a pair.

  Trains whatever components are in params (`unet`, and `text_encoder` if it is there).
  """
  timesteps = _uniform_timesteps(model)

  def loss(params, ref_params, frozen, batch, key):
    del ref_params
    weights = {**frozen, **params}
    x0 = jax.lax.stop_gradient(_latents(model, weights, batch, named_key(key, "posterior")))
    t = timesteps(key, x0.shape[0])
    noise = jax.random.normal(named_key(key, "noise"), x0.shape)
    x_t = diffusion.add_noise(model.schedule, x0, noise, t)
    target = diffusion.training_target(model.schedule, x0, noise, t)
    cond = _with_time_ids(_text(model, weights, batch), batch.get("time_ids"))
    err = _errors(model, weights, x_t, t, cond, target)
    ones = jnp.ones_like(err)
    metrics = {"loss_bin": binned_mean(err, ones, t, total=model.schedule.num_train_timesteps, bins=REWARD_BINS)}
    return jnp.sum(err), jnp.sum(ones), metrics

  return Objective(loss, timesteps=timesteps)


def dpo(
  model: TextToImage,
  loss_fn: DenoisedLoss,
  *,
  reference_free: bool = False,
  gamma: float = 1.0,
  num_bins: int = 20,
  reward_scale: bool = False,
) -> Objective:
  """Diffusion-DPO (arXiv 2311.12908, Eq. 14); timestep-aware (arXiv 2505.18736) with gamma < 1 and reward_scale.

  `label_0` is the probability that image_0 is preferred; 1/2 is a tie, which does not count. Four UNet forward passes
  and two backward passes a pair, two forward passes less without a reference. Winner and loser share t, noise and
  prompt; SDXL's time_ids are each image's own. Accuracy 0.5 where policy and reference agree, and DPO's loss is log 2.

  Args:
    loss_fn: a loss on denoised pairs, see `denoised_loss`.
    reference_free: for losses that look at no reference; the rewards are -err / 2 then, and it has no `divergence`.
    gamma: t is drawn from Cat(gamma^i) over `num_bins` bins of time, i = 0 the noisiest; 1 is uniform.
    reward_scale: multiply the margin by lambda(t) in [1, 2].
  """
  schedule = model.schedule

  def timesteps(key, size):
    return diffusion.sample_timesteps(
      named_key(key, "t"),
      size,
      num_train_timesteps=schedule.num_train_timesteps,
      gamma=gamma,
      num_bins=num_bins,
    )

  def noisy_pair(frozen, batch, key):
    pair = jax.tree.map(lambda w, l: jnp.concatenate([w, l]), *_split_pair(batch))
    valid = (batch["label_0"] != 0.5).astype(jnp.float32)
    x0 = _latents(model, frozen, pair, named_key(key, "posterior"))
    size = valid.shape[0]
    t = timesteps(key, size)
    noise = jax.random.normal(named_key(key, "noise"), (size, *x0.shape[1:]))
    twice = lambda x: jnp.concatenate([x, x])  # noqa: E731
    x_t = diffusion.add_noise(schedule, x0, twice(noise), twice(t))
    target = diffusion.training_target(schedule, x0, twice(noise), twice(t))
    cond = _with_time_ids(jax.tree.map(twice, _text(model, frozen, batch)), pair.get("time_ids"))
    return x_t, twice(t), cond, target, valid

  def preferred(frozen, batch, key):
    return _latents(model, frozen, _split_pair(batch)[0], key)

  def preferred_time_ids(batch):
    return _split_pair(batch)[0].get("time_ids")

  def is_preferred(batch):
    return batch["label_0"] != 0.5

  def loss(params, ref_params, frozen, batch, key):
    x_t, t2, cond, target, valid = noisy_pair(frozen, batch, key)
    pred = model.predict({**frozen, **params}, x_t, t2, cond)
    err = diffusion.squared_error(pred, target)
    ref_pred_w = ref_pred_l = None
    ref_err = jnp.zeros_like(err)
    if not reference_free:
      ref_pred = jax.lax.stop_gradient(model.predict({**frozen, **ref_params}, x_t, t2, cond))
      ref_pred_w, ref_pred_l = jnp.split(ref_pred, 2)
      ref_err = diffusion.squared_error(ref_pred, target)
    reward_w, reward_l = jnp.split(losses.implicit_reward(err, ref_err), 2)
    pred_w, pred_l = jnp.split(pred, 2)
    target_w, target_l = jnp.split(target, 2)
    err_w, err_l = jnp.split(err, 2)
    t = t2[: valid.shape[0]]
    # A soft label, the probability p of the winner, makes the margin's factor 2 p - 1 (arXiv 2409.06691); a hard one 1.
    weight = jnp.abs(2.0 * batch["label_0"] - 1.0)
    if reward_scale:
      weight = weight * diffusion.timestep_reward_scale(schedule, t)
    values = loss_fn(
      DenoisedPair(
        pred_w, pred_l, ref_pred_w, ref_pred_l, target_w, target_l, err_w, err_l, reward_w, reward_l, weight
      )
    )
    margin = reward_w - reward_l
    bins = {"total": schedule.num_train_timesteps, "bins": REWARD_BINS}
    metrics = {
      "implicit_accuracy": mean_of(losses.implicit_accuracy(reward_w, reward_l), valid),
      "margin": mean_of(margin, valid),
      "reward_w": mean_of(reward_w, valid),
      "reward_l": mean_of(reward_l, valid),
      "error_w": mean_of(err_w, valid),
      "error_l": mean_of(err_l, valid),
      "valid_pairs": mean_of(valid, jnp.ones_like(valid)),
      "margin_bin": binned_mean(margin, valid, t, **bins),
      "loss_bin": binned_mean(values, valid, t, **bins),
    }
    return jnp.sum(jnp.where(valid > 0, values, 0.0)), jnp.sum(valid), metrics

  divergence = None if reference_free else denoising_divergence(model, preferred, preferred_time_ids, is_preferred)
  return Objective(loss, divergence, timesteps)


def kto(
  model: TextToImage, *, beta: float, weight_desirable: float = 1.0, weight_undesirable: float = 1.0
) -> Objective:
  """Diffusion-KTO (arXiv 2404.04465, Eq. 8) on single images that are liked (`label` 1) or not (0); no pairs.

  Two UNet forward passes and one backward pass an image. The baseline K is a mean over the whole batch of a step; with
  accumulation it is known before the first micro-batch, by two more forward passes an image. Loss lam / 2 where policy
  and reference agree.

  Args:
    beta: strength of the pull to the reference; 5000 for mean-reduced errors.
    weight_desirable, weight_undesirable: lam of liked images and of others.
  """
  schedule = model.schedule
  timesteps = _uniform_timesteps(model)

  def rewards(params, ref_params, frozen, batch, key):
    x0 = _latents(model, frozen, batch, named_key(key, "posterior"))
    t = timesteps(key, x0.shape[0])
    noise = jax.random.normal(named_key(key, "noise"), x0.shape)
    x_t = diffusion.add_noise(schedule, x0, noise, t)
    target = diffusion.training_target(schedule, x0, noise, t)
    cond = _with_time_ids(_text(model, frozen, batch), batch.get("time_ids"))
    err = _errors(model, {**frozen, **params}, x_t, t, cond, target)
    ref_err = jax.lax.stop_gradient(_errors(model, {**frozen, **ref_params}, x_t, t, cond, target))
    return losses.implicit_reward(err, ref_err), t

  def statistics(params, ref_params, frozen, batch, key):
    reward, _ = rewards(params, ref_params, frozen, batch, key)
    return {"reward": mean_of(reward, jnp.ones_like(reward))}

  def loss(params, ref_params, frozen, batch, key, statistics=None):
    reward, t = rewards(params, ref_params, frozen, batch, key)
    liked = batch["label"] >= 0.5
    baseline = losses.kto_baseline(reward if statistics is None else divide(statistics)["reward"][None])
    values = losses.kto_loss(
      reward,
      liked,
      beta=beta,
      baseline=baseline,
      weight_desirable=weight_desirable,
      weight_undesirable=weight_undesirable,
    )
    ones = jnp.ones_like(values)
    bins = {"total": schedule.num_train_timesteps, "bins": REWARD_BINS}
    metrics = {
      "reward_liked": mean_of(reward, liked.astype(jnp.float32)),
      "reward_disliked": mean_of(reward, 1.0 - liked),
      "baseline": mean_of(jnp.broadcast_to(baseline, ones.shape), ones),
      "reward_bin": binned_mean(reward, ones, t, **bins),
      "loss_bin": binned_mean(values, ones, t, **bins),
    }
    return jnp.sum(values), jnp.sum(ones), metrics

  def latents(frozen, batch, key):
    return _latents(model, frozen, batch, key)

  def is_liked(batch):
    return batch["label"] >= 0.5

  of_samples = denoising_divergence(model, latents, lambda batch: batch.get("time_ids"), is_liked)

  def divergence(ref_params, frozen, batch, key):
    order = jnp.argsort(-batch["label"])  # the liked ones come first
    return of_samples(ref_params, frozen, jax.tree.map(lambda x: x[order], dict(batch)), key)

  return Objective(loss, divergence, timesteps, statistics)


def denoising_divergence(
  model: TextToImage,
  latents: Callable[[Any, Batch, jax.Array], jax.Array],
  time_ids: Callable[[Batch], jax.Array | None] = lambda batch: None,
  is_preferred: Callable[[Batch], jax.Array] | None = None,
  *,
  max_samples: int = 8,
) -> DivergenceFn:
  """D = E[err_ref(x_t) - err_init(x_t)] over preferred samples, uniform t and noise (arXiv 2505.18736, Section 4).

  Positive when the reference denoises preferred samples worse than the pre-trained model. Mean over H, W, C and
  samples. Two UNet forward passes a sample, of at most `max_samples`.

  Args:
    latents: the preferred samples f32[B,h,w,C] of (frozen, batch, key).
    time_ids: the preferred samples' own f32[B,6] of a batch; None: the model's own size, uncropped.
    is_preferred: which rows of a batch count, bool[B]: ties, say, have no preferred sample; None: all. D of no
      row is NaN.
  """

  def divergence(ref_params, frozen, batch, key):
    few = {k: v[:max_samples] for k, v in batch.items()}
    x0 = latents(frozen, few, named_key(key, "posterior"))
    total = model.schedule.num_train_timesteps
    t = diffusion.sample_timesteps(named_key(key, "t"), x0.shape[0], num_train_timesteps=total)
    noise = jax.random.normal(named_key(key, "noise"), x0.shape)
    x_t = diffusion.add_noise(model.schedule, x0, noise, t)
    target = diffusion.training_target(model.schedule, x0, noise, t)
    cond = _with_time_ids(_text(model, frozen, few), time_ids(few))
    err_ref = _errors(model, {**frozen, **ref_params}, x_t, t, cond, target)
    mask = jnp.ones(err_ref.shape, bool) if is_preferred is None else is_preferred(few)
    found = reference.divergence(err_ref, _errors(model, frozen, x_t, t, cond, target), mask)
    return jnp.where(jnp.any(mask), found, jnp.nan)

  return divergence


def transition_loss(
  model: TextToImage,
  loss_fn: PairLoss,
  weights: Any,
  ref_weights: Any,
  shared: tuple[Transitions, jax.Array, jax.Array],
  separate: tuple[Transitions, jax.Array, jax.Array],
  cond: Cond,
  uncond: Cond,
  *,
  eta: float,
  guidance_scale: float,
  ratio_clip: float,
) -> tuple[jax.Array, jax.Array, Pairs]:
  """SPO's loss of one minibatch of transitions (arXiv 2406.04314, Eq. 8), log 2 where policy and reference agree.

  Log-probabilities are means over H, W, C of the DDIM transition's Gaussian; guidance acts on policy and reference
  alike. A transition pair that shares its start takes one UNet call of each, a separate one takes two.

  Args:
    shared, separate: (transitions with fields [N,...], prompt index i32[N], mask f32[N]).
    cond: conditioning of all prompts of the rollout, one row a prompt.
  Returns:
    (sum of losses, count, metric pairs).
  """
  schedule = model.schedule
  first, first_prompt, first_mask = shared
  later, later_prompt, later_mask = separate
  n = first_mask.shape[0]
  join = lambda *parts: jnp.concatenate(parts)  # noqa: E731
  x = join(first.x_w, later.x_w, later.x_l)
  t, prev_t = join(first.t, later.t, later.t), join(first.prev_t, later.prev_t, later.prev_t)
  rows = jax.tree.map(lambda c: c[join(first_prompt, later_prompt, later_prompt)], cond)

  def log_probs(weights):
    predict = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
    mean, std = diffusion.ddim_mean_std(schedule, predict(x, t, rows), x, t, prev_t, eta=eta)
    # Rows: n shared, then the winners' and the losers' separate ones.
    m, s = (jnp.split(v, [n, n + later_mask.shape[0]]) for v in (mean, std))
    log_prob = diffusion.gaussian_log_prob
    return (
      join(log_prob(first.next_w, m[0], s[0]), log_prob(later.next_w, m[1], s[1])),
      join(log_prob(first.next_l, m[0], s[0]), log_prob(later.next_l, m[2], s[2])),
    )

  logp_w, logp_l = log_probs(weights)
  ref_w, ref_l = jax.lax.stop_gradient(log_probs(ref_weights))
  reward_w = losses.clipped_log_ratio(logp_w, ref_w, eps=ratio_clip)
  reward_l = losses.clipped_log_ratio(logp_l, ref_l, eps=ratio_clip)
  mask = join(first_mask, later_mask)
  margin = reward_w - reward_l
  values = loss_fn(reward_w, reward_l, None)
  times = join(first.t, later.t)
  metrics = {
    "implicit_accuracy": mean_of(losses.implicit_accuracy(reward_w, reward_l), mask),
    "margin": mean_of(margin, mask),
    "loss_bin": binned_mean(values, mask, times, total=schedule.num_train_timesteps, bins=REWARD_BINS),
  }
  return jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask), metrics


def policy_loss(
  model: TextToImage,
  weights: Any,
  ref_weights: Any,
  steps: tuple[Steps, jax.Array, jax.Array],
  cond: Cond,
  uncond: Cond,
  *,
  eta: float,
  guidance_scale: float,
  ratio_clip: float,
  kl_coef: float,
) -> tuple[jax.Array, jax.Array, Pairs]:
  """The clipped policy gradient of one minibatch of steps, of GRPO and DDPO alike: they differ in their advantages.

      loss = max(-A r, -A clip(r, 1 - eps, 1 + eps)) + kl_coef KL,    r = p(next) / p_old(next)

  (arXiv 2402.03300, Eq. 3; arXiv 2305.13301, Section 4.3), -A where the policy is still the one that drew the samples.
  KL is that of the step's two Gaussians, |mean - mean_ref|^2 / (2 std^2), a mean over h, w, C, as Flow-GRPO has it
  (arXiv 2505.05470). It takes the place of GRPO's estimate from the sample, exp(d) - d - 1: with d a mean over N
  numbers that has an expectation of about KL / N, which holds nothing back.

  Args:
    ref_weights: of the reference; not called with kl_coef 0.
    steps: (steps with fields [N,...], prompt index i32[N], mask f32[N]).
    cond: conditioning of all prompts of the rollout, one row a prompt.
  Returns:
    (sum of losses, count, metric pairs).
  """
  schedule = model.schedule
  rows, prompt, mask = steps
  of_rows = jax.tree.map(lambda c: c[prompt], cond)

  def mean_std(weights):
    predict = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
    pred = predict(rows.x, rows.t, of_rows)
    return diffusion.ddim_mean_std(schedule, pred, rows.x, rows.t, rows.prev_t, eta=eta)

  mean, std = mean_std(weights)
  log_prob = diffusion.gaussian_log_prob(rows.next, mean, std)
  values = losses.grpo_loss(log_prob, rows.log_prob, rows.advantage, eps=ratio_clip)
  ratio = jnp.exp(log_prob - rows.log_prob)
  metrics = {
    "ratio": mean_of(ratio, mask),
    "clip_fraction": mean_of((jnp.abs(ratio - 1.0) > ratio_clip).astype(jnp.float32), mask),
  }
  if kl_coef:
    ref_mean = jax.lax.stop_gradient(mean_std(ref_weights)[0])
    kl = diffusion.squared_error(mean, ref_mean) / (2.0 * jnp.square(jnp.maximum(std, 1e-6)))
    values = values + kl_coef * kl
    metrics["kl"] = mean_of(kl, mask)
  metrics["loss_bin"] = binned_mean(values, mask, rows.t, total=schedule.num_train_timesteps, bins=REWARD_BINS)
  return jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask), metrics


def spm(
  model: TextToImage,
  scorer: StepAwareCLIPModel,
  *,
  guidance_scale: float,
  step_aware: bool = True,
  decode_size: int = 0,
) -> Objective:
  """Trains a step-aware preference model, `params["spm"]` (arXiv 2406.04314, Section 3.2).

  Both images get the same noise at a uniform t; the frozen model makes one guided x0-prediction of each, which is
  decoded and scored with time t. Two-way cross-entropy, ties pushed to equal scores, each pair weighted by `weight`, or
  by 1 / num_example_per_prompt.

  Args:
    step_aware: False trains on the images alone, at time 0 and as the VAE gives them back: an ordinary preference
      model, to compare with.
    decode_size: pixels a side that predictions are decoded at, see `TextToImage.decode`; 0: those of the images.
  """

  def timesteps(key, size):
    return _uniform_timesteps(model)(key, size) if step_aware else jnp.zeros((size,), jnp.int32)

  def scored_images(frozen, batch, pixels, t2, key):
    size = batch["label_0"].shape[0]
    x0 = model.encode_images(frozen, pixels, named_key(key, "posterior"))
    if not step_aware:
      return model.decode(frozen, x0, size=decode_size)
    noise = jax.random.normal(named_key(key, "noise"), (size, *x0.shape[1:]))
    x_t = diffusion.add_noise(model.schedule, x0, jnp.concatenate([noise, noise]), t2)
    time_ids = jnp.concatenate([batch["time_ids_0"], batch["time_ids_1"]]) if "time_ids_0" in batch else None
    return decode_prediction(model, frozen, x_t, t2, batch["input_ids"], guidance_scale, time_ids, size=decode_size)

  def loss(params, ref_params, frozen, batch, key):
    del ref_params
    pixels = jnp.concatenate([batch["pixels_0"], batch["pixels_1"]])
    t = timesteps(key, batch["label_0"].shape[0])
    t2 = jnp.concatenate([t, t])
    images = jax.lax.stop_gradient(scored_images(frozen, batch, pixels, t2, key))
    # The reference implementation clips here, and not where it scores a rollout, before the resize, too.
    images = jnp.clip(images, -1.0, 1.0)
    text = embed_prompts(scorer, params["spm"], batch["input_ids"])
    score_0, score_1 = jnp.split(score_images(scorer, params["spm"], images, t2, jnp.concatenate([text, text])), 2)
    values = losses.preference_loss(score_0, score_1, batch["label_0"])
    weights = batch["weight"] if "weight" in batch else 1.0 / batch["num_example_per_prompt"].astype(jnp.float32)
    decided = weights * (batch["label_0"] != 0.5)
    correct = ((score_0 > score_1) == (batch["label_0"] > 0.5)).astype(jnp.float32)
    bins = {"total": model.schedule.num_train_timesteps, "bins": REWARD_BINS}
    metrics = {
      "accuracy": mean_of(correct, decided),
      "accuracy_bin": binned_mean(correct, decided, t, **bins),
      "loss_bin": binned_mean(values, weights, t, **bins),
      "score_gap": mean_of(jnp.abs(score_0 - score_1), weights),
    }
    return jnp.sum(values * weights), jnp.sum(weights), metrics

  return Objective(loss, timesteps=timesteps)


def decode_prediction(
  model: TextToImage,
  weights: Any,
  x_t: jax.Array,
  t: jax.Array,
  input_ids: jax.Array,
  guidance_scale: float,
  time_ids: jax.Array | None = None,
  *,
  size: int = 0,
) -> jax.Array:
  """Images f32[N,H,W,3] of the guided x0-prediction at x_t f32[N,h,w,C]; prompts repeat to N rows; size: of `decode`.

  SDXL's time_ids f32[N,6] condition both the prompt's and the unconditional prediction, as diffusers' pipeline does.
  """
  cond = model.encode_text(weights, input_ids)
  times = x_t.shape[0] // input_ids.shape[0]
  cond = _with_time_ids(jax.tree.map(lambda c: jnp.concatenate([c] * times), cond), time_ids)
  uncond = _with_time_ids(model.encode_empty(weights, 1), time_ids)
  predict = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
  return model.decode(weights, diffusion.to_x0(model.schedule, predict(x_t, t, cond), x_t, t), size=size)


def embed_prompts(scorer: StepAwareCLIPModel, params: Any, input_ids: jax.Array) -> jax.Array:
  """Unit vectors f32[B, P] of prompts; they depend on nothing else and are computed once a batch.

  Of the ids of two tokenizers the first are taken: CLIP's, whatever pads them, since the text tower is causal and pools
  at the end of the text.
  """
  ids = input_ids[:, : scorer.config.text_config.max_position_embeddings]
  return scorer.apply({"params": params}, ids, method="text_embeds")


def score_images(
  scorer: StepAwareCLIPModel, params: Any, images: jax.Array, t: jax.Array, text_embeds: jax.Array
) -> jax.Array:
  """Scores f32[N] = exp(logit_scale) cos(image, text) of images f32[N,H,W,3] in [-1, 1] at times t i32[N].

  Predictions that overshoot are clipped after the resize to the scorer's size, see `preprocess`.
  """
  pixels = preprocess(images, scorer.config.vision_config.image_size)
  image_embeds = scorer.apply({"params": params}, pixels, t, method="image_embeds")
  return scorer.apply({"params": params}, image_embeds, text_embeds, method="score")

