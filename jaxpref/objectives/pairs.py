"""Methods that learn from pairs of data: Diffusion-DPO (arXiv 2311.12908), timestep-aware DPO (2505.18736), others.

`DiffusionDPO` draws a time and noise for each pair and turns the errors of policy and reference into a `DenoisedPair`;
the loss on it is a separate function, chosen by name (`denoised_loss`).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses
from jaxpref.config import OWN_LOSS, own_loss
from jaxpref.models.base import Model
from jaxpref.objectives import noising
from jaxpref.objectives.base import REWARD_BINS, Batch, Offline, Weights, named_key
from jaxpref.objectives.sums import Pairs, binned_mean, mean_of
from jaxpref.recipes import own

# (reward_w f32[B], reward_l f32[B], weight f32[B] or None) -> f32[B]
PairLoss = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def pair_loss(name: str, *, beta: float, label_smoothing: float = 0.0, ipo_factor: float = 1.0) -> PairLoss:
  """Returns a loss on two implicit rewards by the name TRL users know, for `transition_loss`.

  Args:
    name: its name, or the user's own package.module:function, which takes (reward_w, reward_l, beta=, weight=) like
      those of `losses.py`.
    ipo_factor: the `factor` of `losses.ipo_loss`; 1 for the log-ratios of `transition_loss`.
  Raises:
    ValueError: the name is unknown.
  """
  known: dict[str, PairLoss] = {
    "sigmoid": lambda w, l, weight: losses.dpo_loss(w, l, beta=beta, weight=weight, label_smoothing=label_smoothing),
    "robust": lambda w, l, weight: losses.robust_dpo_loss(
      w, l, beta=beta, weight=weight, label_smoothing=label_smoothing
    ),
    "ipo": lambda w, l, weight: losses.ipo_loss(w, l, beta=beta, weight=weight, factor=ipo_factor),
    "hinge": lambda w, l, weight: losses.hinge_loss(w, l, beta=beta, weight=weight),
  }
  if ":" in name:
    return _own_loss(name, beta)
  if name not in known:
    raise ValueError(f"config.loss.name={name!r} is unknown; expected one of {', '.join(known)}.")
  return known[name]


def _own_loss(spec: str, beta: float) -> PairLoss:
  """Returns a user's own function, whose results are checked where it is traced."""
  function, given = own_loss(spec), f"config.loss.name={spec}"

  def loss(reward_w: jax.Array, reward_l: jax.Array, weight: jax.Array | None) -> jax.Array:
    with own.calling(given, spec, OWN_LOSS, function):
      values = function(reward_w, reward_l, beta=beta, weight=weight)
    floats = isinstance(values, jax.Array | np.ndarray) and jnp.issubdtype(values.dtype, jnp.floating)
    if not floats or values.shape != reward_w.shape:
      raise own.OwnCodeError(
        f"{given} returned {own.described(values)}{own.defined_at(function)} for B={len(reward_w)} pairs; expected "
        f"{OWN_LOSS}."
      )
    return values

  return loss


def try_own_loss(spec: str, *, weighted: bool) -> None:
  """Calls a user's own loss with shapes alone.

  Args:
    spec: package.module:function.
    weighted: whether the margin has a weight.

  Raises:
    OwnCodeError: it raises, or does not return a float for each pair.
  """
  rewards = jax.ShapeDtypeStruct((3,), jnp.float32)
  jax.eval_shape(_own_loss(spec, 1.0), rewards, rewards, rewards if weighted else None)


class DenoisedPair(NamedTuple):
  """What is known of noisy winners and losers at the same timestep, with the same noise.

  Attributes:
    pred_w, pred_l, ref_pred_w, ref_pred_l: [B,h,w,C] predictions of policy and reference; the reference's are None for
      losses without one.
    target_w, target_l: f32[B,h,w,C] their targets.
    err_w, err_l: f32[B] the policy's squared errors, means over h, w, C, weighed by the process if it does so.
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
  """Turns a loss on two implicit rewards into one on denoised pairs."""
  return lambda pair: loss(pair.reward_w, pair.reward_l, pair.weight)


def safeguarded(loss: DenoisedLoss, *, mu: float) -> DenoisedLoss:
  """Wraps any loss so that the loser's gradient does not raise the winner's error (arXiv 2511.03317).

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
  """Returns a loss on denoised pairs by name: one of `pair_loss`, or dspo, mapo or sft, which need more than rewards.

  Args:
    snr, num_train_timesteps: settings of mapo; the released trainer multiplies its margin by the number of timesteps.
  Raises:
    ValueError: the name is unknown.
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
  return on_rewards(pair_loss(name, beta=beta, label_smoothing=label_smoothing, ipo_factor=2.0))  # rewards are halves


def _split_pair(batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns winners' and losers' `pixels` or `moments`, and `sizes`; a tie, which has neither, keeps its order."""
  winners, losers = {}, {}
  for name in ("pixels", "moments", "sizes"):
    if f"{name}_0" in batch:
      of_0, of_1 = batch[f"{name}_0"], batch[f"{name}_1"]
      first = jnp.expand_dims(batch["label_0"] >= 0.5, tuple(range(1, of_0.ndim)))
      winners[name], losers[name] = jnp.where(first, of_0, of_1), jnp.where(first, of_1, of_0)
  return winners, losers


@dataclasses.dataclass(frozen=True)
class DiffusionDPO(Offline):
  """Diffusion-DPO (arXiv 2311.12908, Eq. 14); timestep-aware (arXiv 2505.18736) with gamma < 1 and reward_scale.

  `label_0` is the probability that image_0 is preferred; 1/2 is a tie, which does not count. A pair takes four UNet
  forward passes and two backward passes, two forward passes less without a reference. Winner and loser share t, noise
  and prompt; each image has its own sizes. Where policy and reference agree, the accuracy is 0.5 and DPO's loss log 2.

  Attributes:
    loss_fn: a loss on denoised pairs, see `denoised_loss`.
    reference_free: for losses without a reference; the rewards are then -err / 2.
    gamma: t is drawn from Cat(gamma^i) over `num_bins` bins of time, i = 0 the noisiest; 1 is the process's own times,
      uniform unless it says otherwise.
    reward_scale: multiplies the margin by lambda(t) in [1, 2].
  """

  model: Model
  loss_fn: DenoisedLoss
  reference_free: bool = False
  gamma: float = 1.0
  num_bins: int = 20
  reward_scale: bool = False

  def timesteps(self, key: jax.Array, size: int) -> jax.Array:
    return self.model.process.sample_times(named_key(key, "t"), size, gamma=self.gamma, num_bins=self.num_bins)

  def loss(
    self, w: Weights, e: Batch, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    model = self.model
    pair = jax.tree.map(lambda w, l: jnp.concatenate([w, l]), *_split_pair(e))
    valid = (e["label_0"] != 0.5).astype(jnp.float32)
    x0 = noising.latents(model, w.base, pair, named_key(key, "posterior"))
    size = valid.shape[0]
    t = self.timesteps(key, size)
    noise = jax.random.normal(named_key(key, "noise"), (size, *x0.shape[1:]))
    twice = lambda x: jnp.concatenate([x, x])  # noqa: E731
    x_t = model.process.add_noise(x0, twice(noise), twice(t))
    target = model.process.target(x0, twice(noise), twice(t))
    cond = model.sized(jax.tree.map(twice, noising.text(model, w.base, e)), pair.get("sizes"))

    pred = model.predict(w.policy, x_t, twice(t), cond)
    err = noising.error(model, pred, target, twice(t))
    ref_pred_w = ref_pred_l = None
    ref_err = jnp.zeros_like(err)
    if not self.reference_free:
      ref_pred = jax.lax.stop_gradient(model.predict(w.reference, x_t, twice(t), cond))
      ref_pred_w, ref_pred_l = jnp.split(ref_pred, 2)
      ref_err = noising.error(model, ref_pred, target, twice(t))
    reward_w, reward_l = jnp.split(losses.implicit_reward(err, ref_err), 2)
    pred_w, pred_l = jnp.split(pred, 2)
    target_w, target_l = jnp.split(target, 2)
    err_w, err_l = jnp.split(err, 2)
    # A soft label, the winner's probability p, multiplies the margin by 2 p - 1 (arXiv 2409.06691), a hard one by 1.
    weight = jnp.abs(2.0 * e["label_0"] - 1.0)
    if self.reward_scale:
      weight = weight * model.process.reward_scale(t)
    values = self.loss_fn(
      DenoisedPair(pred_w, pred_l, ref_pred_w, ref_pred_l, target_w, target_l, err_w, err_l, reward_w, reward_l, weight)
    )
    margin = reward_w - reward_l
    bins = {"total": model.process.num_train_timesteps, "bins": REWARD_BINS}
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

  def divergence(self, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
    """Returns the divergence on the winners."""
    few = noising.first_samples(batch)
    winners, _ = _split_pair(few)
    x0 = noising.latents(self.model, w.base, winners, named_key(key, "posterior"))
    cond = self.model.sized(noising.text(self.model, w.base, few), winners.get("sizes"))
    return noising.divergence(self.model, w, noising.Preferred(x0, cond, few["label_0"] != 0.5), key)
