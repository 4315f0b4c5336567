"""Preference losses for diffusion models: arrays in, one float32 value per pair out.

    implicit_reward(err, ref_err)              denoising errors     (DPO family, offline)
    clipped_log_ratio(logp, ref_logp, eps=)    step log-densities   (SPO family, online)
        -> dpo_loss, ipo_loss, hinge_loss, ...  on the two rewards of a pair

Conventions of every function here: float32 inside whatever the input dtype; `[B]` out, unreduced,
so that masks, example weights and the one division by the global number of valid pairs belong to
the caller; no randomness, no model, no config. `err` is a squared error averaged over H, W, C and
`logp` a Gaussian log-density averaged over H, W, C. A pair (w, l) shares prompt, timestep and
noise. `weight` is a factor on the margin, one per pair: the timestep-aware reward scale lambda(t)
of arXiv 2505.18736 (`diffusion.timestep_reward_scale`) works with every loss that has a margin.
"""

import math

import jax
import jax.numpy as jnp

# A likelihood ratio is computed from a log-ratio limited to +-20, so that it stays finite.
_MAX_LOG_RATIO = 20.0

# ---------------------------------------------------------------------------------------------
# Front ends: what a loss takes as reward


def implicit_reward(err: jax.Array, ref_err: jax.Array) -> jax.Array:
  """Returns the implicit reward of a sample under Diffusion-DPO: -(err - ref_err) / 2.

  The difference of two of them times beta is the logit of arXiv 2311.12908, Eq. 14,
  -(beta / 2) [(err_w - err_w_ref) - (err_l - err_l_ref)], with the 1/2 that some public
  implementations drop. No gradient flows to the reference.

  Args:
    err: f32[B] squared error of the policy, mean over H, W, C.
    ref_err: f32[B] squared error of the reference at the same x_t, of the same dtype.
  Returns:
    f32[B], 0 where policy and reference agree.
  Raises:
    ValueError: shapes that disagree, or errors computed in different precisions: their
      difference would not be 0 at initialisation, and beta multiplies it by thousands.

  >>> print(implicit_reward(jnp.array([0.10]), jnp.array([0.12])))
  [0.01]
  """
  _check_vectors(err=err, ref_err=ref_err)
  _check_same_precision(err=err, ref_err=ref_err)
  return 0.5 * (jax.lax.stop_gradient(_f32(ref_err)) - _f32(err))


def clipped_log_ratio(logp: jax.Array, ref_logp: jax.Array, *, eps: float) -> jax.Array:
  """Returns log clip(exp(logp - ref_logp), 1 - eps, 1 + eps), the reward of a step in SPO.

  Clipped in log space, so that no ratio overflows. No gradient where the clip is active, none to
  the reference.

  Args:
    logp: f32[B] log-density of the transition under the policy, mean over H, W, C.
    ref_logp: f32[B] the same under the reference, of the same dtype.
    eps: clip range in (0, 1); 0.1 in SPO.
  Returns:
    f32[B] in [log(1 - eps), log(1 + eps)], 0 where policy and reference agree.
  Raises:
    ValueError: shapes or precisions that disagree.
  References:
    SPO: Liang et al., arXiv 2406.04314; the clip is that of its reference implementation.

  >>> reward = clipped_log_ratio(jnp.array([3.05, 9.0]), jnp.array([3.0, 3.0]), eps=0.1)
  >>> print(jnp.array_str(reward, precision=4))
  [0.05   0.0953]
  """
  _check_vectors(logp=logp, ref_logp=ref_logp)
  _check_same_precision(logp=logp, ref_logp=ref_logp)
  log_ratio = _f32(logp) - jax.lax.stop_gradient(_f32(ref_logp))
  return jnp.clip(log_ratio, math.log1p(-eps), math.log1p(eps))


def order_pair(value_0: jax.Array, value_1: jax.Array, label_0: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sorts the values of images 0 and 1 of labelled pairs into winner and loser.

  Args:
    value_0: [B] a reward, error or score of image 0.
    value_1: [B] the same of image 1.
    label_0: f32[B] preference for image 0 in {0, 0.5, 1}, as in Pick-a-Pic.
  Returns:
    (value_w, value_l) and valid f32[B], 0 for ties. A tie has no winner: mask it out of the pair
    losses instead of counting it as a win of image 1.
  Raises:
    ValueError: shapes that disagree.

  >>> one, two = jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0])
  >>> winner, loser, valid = order_pair(one, two, jnp.array([0.0, 0.5]))
  >>> print(winner[0], loser[0], valid)
  2.0 1.0 [1. 0.]
  """
  _check_vectors(value_0=value_0, value_1=value_1, label_0=label_0)
  first = label_0 > 0.5
  winner, loser = jnp.where(first, value_0, value_1), jnp.where(first, value_1, value_0)
  return winner, loser, (label_0 != 0.5).astype(jnp.float32)


def select_pair(scores: jax.Array, *, threshold: float | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the best and worst of a pool of candidates, and whether they differ enough to learn from.

  The criterion is softmax([s_w, s_l])_w - softmax([s_w, s_l])_l > threshold, which equals
  tanh((s_w - s_l) / 2) > threshold (SPO, arXiv 2406.04314).

  Args:
    scores: f32[B, k] preference scores (logits) of k candidates from one shared x_t.
    threshold: in [0, 1), or f32[] (LPO lets it grow with the noise); 0.3 for SD1.5 and 0.4 for SDXL.
  Returns:
    winner i32[B] and loser i32[B], positions in the pool, and valid bool[B].
  Raises:
    ValueError: scores that are not [B, k >= 2].

  >>> print(*select_pair(jnp.array([[0.0, 2.0, 1.0], [0.1, 0.0, 0.1]]), threshold=0.3))
  [1 0] [0 1] [ True False]
  """
  if scores.ndim != 2 or scores.shape[1] < 2:
    raise ValueError(f"expected scores of shape [B, k] with k >= 2, got {scores.shape}.")
  scores = _f32(scores)
  winner, loser = jnp.argmax(scores, axis=1), jnp.argmin(scores, axis=1)
  gap = jnp.max(scores, axis=1) - jnp.min(scores, axis=1)
  return winner, loser, jnp.tanh(0.5 * gap) > threshold


def implicit_accuracy(reward_w: jax.Array, reward_l: jax.Array) -> jax.Array:
  """Returns f32[B]: 1 where the winner's reward is larger, 0 where smaller, 0.5 where equal.

  Equality counts half, so a policy equal to its reference has accuracy 0.5, not 0.
  """
  _check_vectors(reward_w=reward_w, reward_l=reward_l)
  return 0.5 * (1.0 + jnp.sign(_f32(reward_w) - _f32(reward_l)))


# ---------------------------------------------------------------------------------------------
# Losses on the margin z = weight * beta * (reward_w - reward_l)


def dpo_loss(
  reward_w: jax.Array,
  reward_l: jax.Array,
  *,
  beta: float,
  weight: jax.Array | None = None,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Diffusion-DPO, -log sigmoid(z), z = weight beta (r_w - r_l) (arXiv 2311.12908, Eq. 14).

  On `clipped_log_ratio` rewards it is the loss of SPO (arXiv 2406.04314) with beta = 10. With
  label smoothing s it is conservative DPO, -(1 - s) log sigmoid(z) - s log sigmoid(-z).

  Args:
    reward_w: f32[B] reward of the preferred sample, e.g. `implicit_reward(err, ref_err)`:
      -(err - ref_err) / 2, mean over H, W, C.
    reward_l: f32[B] the same for the dispreferred one, at the same t and noise.
    beta: strength of the pull to the reference; 5000 for mean-reduced errors, 10 for SPO.
    weight: f32[B] factor on the margin, e.g. lambda(t); None for 1.
    label_smoothing: assumed probability that the label is wrong, in [0, 0.5).
  Returns:
    f32[B], log 2 where policy and reference agree. The caller reduces.
  Raises:
    ValueError: shapes that disagree, or a label_smoothing out of range.
  References:
    Label smoothing: Mitchell, A note on DPO with noisy preferences, 2023.

  >>> print(jnp.array_str(dpo_loss(jnp.array([0.0, 2e-4]), jnp.zeros(2), beta=5000.0), precision=4))
  [0.6931 0.3133]
  """
  z = _margin(reward_w, reward_l, beta, weight)
  _check_smoothing(label_smoothing)
  return (label_smoothing - 1.0) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust_dpo_loss(
  reward_w: jax.Array,
  reward_l: jax.Array,
  *,
  beta: float,
  label_smoothing: float,
  weight: jax.Array | None = None,
) -> jax.Array:
  """Robust DPO: the loss whose mean under labels flipped with probability s is that of clean DPO.

      loss = [-(1 - s) log sigmoid(z) + s log sigmoid(-z)] / (1 - 2 s)

  Unlike label smoothing in `dpo_loss` it is unbiased, and unbounded below for wrong labels.

  Args:
    reward_w: f32[B] reward of the preferred sample.
    reward_l: f32[B] reward of the dispreferred sample.
    beta: strength of the pull to the reference.
    label_smoothing: probability s that a label is flipped, in [0, 0.5).
    weight: f32[B] factor on the margin; None for 1.
  Returns:
    f32[B], log 2 where policy and reference agree.
  Raises:
    ValueError: shapes that disagree, or a label_smoothing out of range.
  References:
    Ray Chowdhury et al., arXiv 2403.00409, Section 3.

  >>> r = jnp.zeros(1)
  >>> print(jnp.array_str(robust_dpo_loss(r, r, beta=5000.0, label_smoothing=0.1), precision=4))
  [0.6931]
  """
  z = _margin(reward_w, reward_l, beta, weight)
  _check_smoothing(label_smoothing)
  clean = (label_smoothing - 1.0) * jax.nn.log_sigmoid(z) + label_smoothing * jax.nn.log_sigmoid(-z)
  return clean / (1.0 - 2.0 * label_smoothing)


def soft_dpo_loss(
  reward_w: jax.Array,
  reward_l: jax.Array,
  *,
  beta: float,
  prob: jax.Array,
  gain: float = 1.0,
  weight: jax.Array | None = None,
) -> jax.Array:
  """DPO with soft labels, -log sigmoid(g (2 p - 1) z): an undecided pair moves nothing.

  Args:
    reward_w: f32[B] reward of the sample that p is the preference for.
    reward_l: f32[B] reward of the other one.
    beta: strength of the pull to the reference.
    prob: f32[B] probability that the first is preferred, in [0, 1]: 1 is `dpo_loss`, 1/2 has no
      gradient, below 1/2 the roles change.
    gain: the factor g.
    weight: f32[B] factor on the margin; None for 1.
  Returns:
    f32[B], log 2 where policy and reference agree and wherever p is 1/2.
  Raises:
    ValueError: shapes that disagree.
  References:
    Geometric averaging: Furuta et al., arXiv 2409.06691. For diffusion, with g: Lu et al., arXiv
    2506.02698, Eq. 9.

  >>> r = jnp.array([2e-4, 2e-4])
  >>> loss = soft_dpo_loss(r, jnp.zeros(2), beta=5000.0, prob=jnp.array([1.0, 0.5]))
  >>> print(jnp.array_str(loss, precision=4))
  [0.3133 0.6931]
  """
  z = _margin(reward_w, reward_l, beta, weight)
  _check_vectors(reward_w=reward_w, prob=prob)
  return -jax.nn.log_sigmoid(gain * (2.0 * _f32(prob) - 1.0) * z)


def ipo_loss(
  reward_w: jax.Array,
  reward_l: jax.Array,
  *,
  beta: float,
  weight: jax.Array | None = None,
  factor: float = 2.0,
) -> jax.Array:
  """IPO, (l - 1 / (2 beta))^2 with l = -[(err_w - err_w_ref) - (err_l - err_l_ref)].

  The error margin l is twice the margin of `implicit_reward`, which carries the 1/2 of
  Diffusion-DPO, so l = factor (r_w - r_l) with a factor of 2. `clipped_log_ratio` carries none:
  there l is the margin of log-ratios itself, with a factor of 1. It grows as the winner's error
  falls: descent pulls it up to 1 / (2 beta), then holds it there.

  Args:
    reward_w: f32[B] reward of the preferred sample.
    reward_l: f32[B] reward of the dispreferred sample.
    beta: inverse of twice the target margin, in units of l.
    weight: f32[B] factor on l; None for 1.
    factor: 2 for `implicit_reward`, 1 for `clipped_log_ratio`.
  Returns:
    f32[B], 1 / (4 beta^2) where policy and reference agree.
  Raises:
    ValueError: shapes that disagree.
  References:
    Azar et al., arXiv 2310.12036, Eq. 17.

  >>> print(ipo_loss(jnp.array([0.0, 0.25]), jnp.zeros(2), beta=1.0))
  [0.25 0.  ]
  """
  margin = _margin(reward_w, reward_l, factor, weight)
  return jnp.square(margin - 1.0 / (2.0 * beta))


def hinge_loss(reward_w: jax.Array, reward_l: jax.Array, *, beta: float, weight: jax.Array | None = None) -> jax.Array:
  """SLiC hinge, max(0, 1 - z): no gradient once the margin z exceeds 1.

  Args:
    reward_w: f32[B] reward of the preferred sample.
    reward_l: f32[B] reward of the dispreferred sample.
    beta: factor on the margin; 1 / beta is the margin asked for.
    weight: f32[B] factor on the margin; None for 1.
  Returns:
    f32[B], 1 where policy and reference agree.
  Raises:
    ValueError: shapes that disagree.
  References:
    Zhao et al., arXiv 2305.10425; on policy/reference ratios: Liu et al., arXiv 2309.06657.

  >>> print(hinge_loss(jnp.array([0.0, 2.0]), jnp.zeros(2), beta=1.0))
  [1. 0.]
  """
  return jax.nn.relu(1.0 - _margin(reward_w, reward_l, beta, weight))


def d3po_loss(
  logp_0: jax.Array,
  ref_logp_0: jax.Array,
  logp_1: jax.Array,
  ref_logp_1: jax.Array,
  label_0: jax.Array,
  *,
  beta: float,
  eps: float = 0.1,
  weight: jax.Array | None = None,
) -> jax.Array:
  """D3PO, DPO on the steps of two trajectories of which one is preferred as a whole.

      loss = -log sigmoid( (2 label_0 - 1) beta (log r_0 - log r_1) ),  r clipped to 1 +- eps

  SPO's loss with one label for all steps of a pair of trajectories. A tie gives log 2 and no
  gradient.

  Args:
    logp_0: f32[B] log-density of a step of trajectory 0 under the policy, mean over H, W, C.
    ref_logp_0: f32[B] the same under the reference.
    logp_1: f32[B] log-density of the same step of trajectory 1.
    ref_logp_1: f32[B] the same under the reference.
    label_0: f32[B] preference for trajectory 0 in {0, 0.5, 1}.
    beta: strength of the pull to the reference; 0.1 in the official configuration.
    eps: clip range of the likelihood ratios.
    weight: f32[B] factor on the margin; None for 1.
  Returns:
    f32[B], log 2 where policy and reference agree.
  Raises:
    ValueError: shapes or precisions that disagree.
  References:
    Yang et al., arXiv 2311.13231; the clip is that of its reference implementation.

  >>> same = jnp.zeros(1)
  >>> print(jnp.array_str(d3po_loss(same, same, same, same, jnp.ones(1), beta=0.1), precision=4))
  [0.6931]
  """
  reward_0 = clipped_log_ratio(logp_0, ref_logp_0, eps=eps)
  reward_1 = clipped_log_ratio(logp_1, ref_logp_1, eps=eps)
  return soft_dpo_loss(reward_0, reward_1, beta=beta, prob=label_0, weight=weight)


# ---------------------------------------------------------------------------------------------
# Offline losses that are not a function of the margin alone


def sft_loss(err_w: jax.Array) -> jax.Array:
  """Supervised fine-tuning on the winners: returns the denoising error itself, f32[B].

  The baseline of every preference loss (arXiv 2006.11239, Eq. 14, mean over H, W, C).

  >>> print(sft_loss(jnp.array([0.5], jnp.bfloat16)).dtype)
  float32
  """
  _check_vectors(err_w=err_w)
  return _f32(err_w)


def kto_baseline(reward: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Returns K = max(0, mean(err_ref - err)) of Diffusion-KTO, an estimate of the KL divergence.

  The mean is over the global batch, as under `jit` on a sharded array. Inside `shard_map`, or with
  accumulation over microbatches, compute it once for all and pass it to `kto_loss`.

  Args:
    reward: f32[B] `implicit_reward` of all samples, desirable or not.
    mask: f32[B] 1 for the samples that count; None for all.
  Returns:
    f32[] without gradient, 0 where policy and reference agree.
  Raises:
    ValueError: shapes that disagree.
  """
  _check_vectors(reward=reward, mask=reward if mask is None else mask)
  gain = 2.0 * _f32(reward)
  mask = jnp.ones_like(gain) if mask is None else _f32(mask)
  mean = jnp.sum(gain * mask) / jnp.maximum(jnp.sum(mask), 1.0)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
  reward: jax.Array,
  desirable: jax.Array,
  *,
  beta: float,
  baseline: jax.Array | None = None,
  weight_desirable: float = 1.0,
  weight_undesirable: float = 1.0,
  weight: jax.Array | None = None,
) -> jax.Array:
  """Diffusion-KTO on unpaired likes and dislikes: lam_y (1 - sigmoid(y beta (g - K))).

  g = err_ref - err = 2 reward, y = +1 for liked and -1 for disliked samples.

  Args:
    reward: f32[B] `implicit_reward` of each sample.
    desirable: [B] bool or {0, 1}, which samples are liked.
    beta: strength of the pull to the reference; 5000 for mean-reduced errors.
    baseline: f32[] K, from `kto_baseline` over the global batch; None computes it from `reward`.
    weight_desirable: lam of liked samples.
    weight_undesirable: lam of disliked samples.
    weight: f32[B] factor on g - K, e.g. lambda(t); None for 1.
  Returns:
    f32[B], lam_y / 2 where policy and reference agree.
  Raises:
    ValueError: shapes that disagree.
  References:
    Li et al., arXiv 2404.04465, Eq. 8, with the sigmoid utility of its released trainer.

  >>> print(kto_loss(jnp.zeros(2), jnp.array([True, False]), beta=5000.0, weight_desirable=2.0))
  [1.  0.5]
  """
  _check_vectors(reward=reward, desirable=desirable, weight=reward if weight is None else weight)
  reward, liked = _f32(reward), jnp.asarray(desirable, bool)
  baseline = kto_baseline(reward) if baseline is None else jax.lax.stop_gradient(_f32(baseline))
  z = beta * (2.0 * reward - baseline)
  z = z if weight is None else _f32(weight) * z
  lam = jnp.where(liked, weight_desirable, weight_undesirable).astype(jnp.float32)
  return lam * jax.nn.sigmoid(jnp.where(liked, -z, z))


def mapo_loss(
  err_w: jax.Array,
  err_l: jax.Array,
  *,
  beta: float,
  snr: float,
  weight: jax.Array | None = None,
) -> jax.Array:
  """MaPO, reference-free: err_w - beta log sigmoid(phi(err_w) - phi(err_l)).

  phi(m) = s m / (exp(s m) - 1) falls from 1 at m = 0 towards 0.

  Args:
    err_w: f32[B] squared error of the preferred sample, mean over H, W, C.
    err_l: f32[B] squared error of the dispreferred sample.
    beta: weight of the margin term.
    snr: s, a constant in the released trainer.
    weight: f32[B] factor on the difference of phi; None for 1. The released trainer multiplies it
      by the number of timesteps.
  Returns:
    f32[B], err_w + beta log 2 where both errors are equal.
  Raises:
    ValueError: shapes that disagree.
  References:
    Hong et al., arXiv 2406.06424.

  >>> loss = mapo_loss(jnp.array([0.1]), jnp.array([0.1]), beta=0.1, snr=0.5)
  >>> print(jnp.array_str(loss, precision=4))
  [0.1693]
  """
  _check_vectors(err_w=err_w, err_l=err_l, weight=err_w if weight is None else weight)
  err_w, err_l = _f32(err_w), _f32(err_l)
  odds = _x_over_expm1(snr * err_w) - _x_over_expm1(snr * err_l)
  odds = odds if weight is None else _f32(weight) * odds
  return err_w - beta * jax.nn.log_sigmoid(odds)


def _x_over_expm1(x: jax.Array) -> jax.Array:
  """Returns x / (exp(x) - 1) for x >= 0, without overflow and with a gradient at 0."""
  tiny = x < 1e-3
  safe = jnp.where(tiny, 1.0, x)
  return jnp.where(tiny, 1.0 - x / 2.0 + x * x / 12.0, safe * jnp.exp(-safe) / -jnp.expm1(-safe))


def dspo_loss(
  pred_w: jax.Array,
  ref_pred_w: jax.Array,
  target_w: jax.Array,
  reward_w: jax.Array,
  reward_l: jax.Array,
  *,
  beta: float,
  weight: jax.Array | None = None,
) -> jax.Array:
  """DSPO, || (eps_w - eps) - beta (1 - sigmoid(z)) (eps_w - eps_w_ref) ||^2, z as in `dpo_loss`.

  Score matching to the preferred distribution. Gradients flow through the prediction, the
  difference to the reference and z, as in the released trainers. Therefore beta must stay far
  below 2: above it the gradient at initialisation changes sign. With their 0.001 it is `sft_loss`
  to a thousandth: at initialisation its gradient is 1 - beta / 2 times that of `sft_loss`.

  Args:
    pred_w: [B, ...] the policy's prediction for the preferred sample.
    ref_pred_w: [B, ...] the reference's.
    target_w: [B, ...] the training target, the noise for an epsilon network.
    reward_w: f32[B] `implicit_reward` of the preferred sample.
    reward_l: f32[B] `implicit_reward` of the dispreferred sample.
    beta: strength of the pull to the reference, in the margin and in the correction.
    weight: f32[B] factor on the margin z; None for 1.
  Returns:
    f32[B], mean over H, W, C; err_w where policy and reference agree.
  Raises:
    ValueError: shapes that disagree.
  References:
    Zhu et al., Direct Score Preference Optimization for Diffusion Model Alignment, ICLR 2025.

  >>> pred, zero = jnp.full((1, 2, 2, 1), 0.5), jnp.zeros(1)
  >>> print(dspo_loss(pred, pred, jnp.zeros_like(pred), zero, zero, beta=0.001))
  [0.25]
  """
  _check_samples(pred_w=pred_w, ref_pred_w=ref_pred_w, target_w=target_w)
  if pred_w.shape[:1] != reward_w.shape:
    raise ValueError(f"expected rewards {pred_w.shape[:1]}, one per sample, got {reward_w.shape}.")
  z = _margin(reward_w, reward_l, beta, weight)
  drift = _f32(pred_w) - jax.lax.stop_gradient(_f32(ref_pred_w))
  coefficient = jnp.expand_dims(beta * jax.nn.sigmoid(-z), tuple(range(1, pred_w.ndim)))
  residual = _f32(pred_w) - _f32(target_w) - coefficient * drift
  return jnp.mean(jnp.square(residual), axis=tuple(range(1, residual.ndim)))


def safeguard_scale(
  pred_w: jax.Array,
  target_w: jax.Array,
  pred_l: jax.Array,
  target_l: jax.Array,
  *,
  mu: float = 0.0,
) -> jax.Array:
  """Returns how much of the loser's gradient an update may use without raising the winner's error.

  To first order, and measured in output space, a step along -(g_w - lam g_l), with g the
  gradient of the error, changes err_w by -(|g_w|^2 - lam g_w . g_l). It does not grow for
      lam = clip( (1 - mu) |g_w|^2 / (g_w . g_l), 0, 1 )  if g_w . g_l > 0, else 1.
  Wrap any pair loss with it:
      err_l = scale_gradient(err_l, safeguard_scale(pred_w, target_w, pred_l, target_l))

  Args:
    pred_w: [B, ...] the policy's prediction for the preferred sample.
    target_w: [B, ...] its target.
    pred_l: [B, ...] the prediction for the dispreferred sample.
    target_l: [B, ...] its target (the same noise, for an epsilon network).
    mu: share of the winner's own descent to keep, in [0, 1]; 0.2 in the released DSPO script.
  Returns:
    f32[B] in [0, 1], without gradient, one per pair (the released trainer pools the batch).
  Raises:
    ValueError: shapes that disagree.
  References:
    Fu et al., Diffusion-SDPO, arXiv 2511.03317.

  >>> pred = jnp.ones((1, 2)); zero = jnp.zeros((1, 2))
  >>> print(safeguard_scale(pred, zero, 4 * pred, zero))
  [0.25]
  """
  _check_samples(pred_w=pred_w, target_w=target_w, pred_l=pred_l, target_l=target_l)
  axes = tuple(range(1, pred_w.ndim))
  residual_w, residual_l = _f32(pred_w) - _f32(target_w), _f32(pred_l) - _f32(target_l)
  dot = jnp.sum(residual_w * residual_l, axis=axes)
  room = (1.0 - mu) * jnp.sum(jnp.square(residual_w), axis=axes)
  lam = jnp.where(dot > 0, room / jnp.where(dot > 0, dot, 1.0), 1.0)
  return jax.lax.stop_gradient(jnp.clip(lam, 0.0, 1.0))


def scale_gradient(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns x unchanged in value, with its gradient multiplied by scale; f32[B].

  >>> print(jax.grad(lambda x: scale_gradient(x, jnp.array([0.25])).sum())(jnp.array([3.0])))
  [0.25]
  """
  _check_vectors(x=x, scale=scale)
  x, fixed = _f32(x), jax.lax.stop_gradient(_f32(x))
  return fixed + _f32(scale) * (x - fixed)


# ---------------------------------------------------------------------------------------------
# Online policy gradients on the same rollout statistics


def group_advantages(
  reward: jax.Array,
  *,
  group_size: int,
  mask: jax.Array | None = None,
  normalize_std: bool = True,
  eps: float = 1e-4,
) -> jax.Array:
  """Returns advantages relative to the other samples of the same prompt: (r - mean) / (std + eps).

  Args:
    reward: f32[B] rewards, with the group_size samples of a prompt next to each other.
    group_size: samples per prompt; B must be a multiple of it.
    mask: f32[B] 1 for the samples that count; None for all. Others get advantage 0.
    normalize_std: False only subtracts the mean (arXiv 2503.20783).
    eps: gives a group of equal rewards advantage 0.
  Returns:
    f32[B] without gradient, of mean 0 in every group.
  Raises:
    ValueError: a batch that is not made of whole groups.
  References:
    GRPO: Shao et al., arXiv 2402.03300, Section 4.1.

  >>> r = jnp.array([1.0, 3.0, 5.0, 5.0])
  >>> print(group_advantages(r, group_size=2, normalize_std=False))
  [-1.  1.  0.  0.]
  """
  _check_vectors(reward=reward, mask=reward if mask is None else mask)
  if group_size < 1 or reward.shape[0] % group_size:
    raise ValueError(
      f"{reward.shape[0]} rewards are not whole groups of {group_size}; "
      f"pass the group_size samples of every prompt next to each other."
    )
  grouped = _f32(reward).reshape(-1, group_size)
  mask = jnp.ones_like(grouped) if mask is None else _f32(mask).reshape(-1, group_size)
  count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
  # Where, not multiply: a masked reward may be NaN.
  grouped = jnp.where(mask > 0, grouped, 0.0)
  centred = (grouped - jnp.sum(grouped, axis=1, keepdims=True) / count) * mask
  if normalize_std:
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count)
    centred = centred / (std + eps)
  return jax.lax.stop_gradient(centred.reshape(-1))


def ddpo_loss(
  logp: jax.Array,
  advantage: jax.Array,
  *,
  old_logp: jax.Array | None = None,
  eps: float = 1e-4,
) -> jax.Array:
  """DDPO, the policy gradient of a denoising step.

  Without old_logp it is the score-function estimator, -A logp, for samples of the current policy.
  With it, the importance-sampled one: max(-A r, -A clip(r, 1 - eps, 1 + eps)), r = exp(logp - old_logp).

  Args:
    logp: f32[B] log-density of the step under the policy, mean over H, W, C.
    advantage: f32[B] normalised reward of the sample; no gradient flows to it.
    old_logp: f32[B] log-density under the policy that drew the sample.
    eps: clip range; 1e-4 in the official configuration, for mean-reduced log-densities.
  Returns:
    f32[B]; at initialisation -A logp, or -A with old_logp. The gradient there is the same.
  Raises:
    ValueError: shapes that disagree.
  References:
    Black et al., arXiv 2305.13301, Section 4.3, DDPO_SF and DDPO_IS.

  >>> print(ddpo_loss(jnp.array([-2.0]), jnp.array([1.5])))
  [3.]
  """
  _check_vectors(logp=logp, advantage=advantage)
  advantage = jax.lax.stop_gradient(_f32(advantage))
  if old_logp is None:
    return -advantage * _f32(logp)
  return _clipped_surrogate(logp, old_logp, advantage, eps)


def grpo_loss(
  logp: jax.Array,
  old_logp: jax.Array,
  advantage: jax.Array,
  *,
  eps: float,
  ref_logp: jax.Array | None = None,
  kl_coef: float = 0.0,
) -> jax.Array:
  """GRPO on denoising steps: clipped ratio, group advantages, optional KL to a reference.

      loss = max(-A r, -A clip(r, 1 - eps, 1 + eps)) + kl_coef (exp(d) - d - 1),
      r = exp(logp - old_logp),  d = ref_logp - logp

  Args:
    logp: f32[B] log-density of the step under the policy, mean over H, W, C.
    old_logp: f32[B] under the policy that drew the sample.
    advantage: f32[B] from `group_advantages`; no gradient flows to it.
    eps: clip range; small (1e-4) for mean-reduced log-densities.
    ref_logp: f32[B] under the reference; needed only with kl_coef.
    kl_coef: weight of the (non-negative, unbiased) KL estimate.
  Returns:
    f32[B], -A where all three policies agree.
  Raises:
    ValueError: shapes that disagree, or kl_coef without ref_logp.
  References:
    Shao et al., arXiv 2402.03300, Eq. 3 and 4; on diffusion: arXiv 2505.07818, 2505.05470.

  >>> same = jnp.zeros(2)
  >>> print(grpo_loss(same, same, jnp.array([1.0, -1.0]), eps=0.1))
  [-1.  1.]
  """
  _check_vectors(logp=logp, old_logp=old_logp, advantage=advantage)
  loss = _clipped_surrogate(logp, old_logp, jax.lax.stop_gradient(_f32(advantage)), eps)
  if ref_logp is None:
    if isinstance(kl_coef, int | float) and kl_coef:
      raise ValueError(f"kl_coef is {kl_coef} but ref_logp is missing; pass both or neither.")
    return loss
  _check_vectors(logp=logp, ref_logp=ref_logp)
  d = jax.lax.stop_gradient(_f32(ref_logp)) - _f32(logp)
  d = jnp.clip(d, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
  return loss + kl_coef * (jnp.expm1(d) - d)


def _clipped_surrogate(logp, old_logp, advantage, eps):
  _check_vectors(logp=logp, old_logp=old_logp)
  log_ratio = _f32(logp) - jax.lax.stop_gradient(_f32(old_logp))
  ratio = jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
  return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - eps, 1.0 + eps))


# ---------------------------------------------------------------------------------------------
# Losses of the preference model


def preference_loss(score_0: jax.Array, score_1: jax.Array, label_0: jax.Array) -> jax.Array:
  """Two-way cross-entropy of a preference model, with ties pushed to equal scores.

      loss = -label_0 log p_0 - (1 - label_0) log p_1 (+ log 0.5 for a tie),  p = softmax(s_0, s_1)

  The offset makes the smallest loss of a tie 0, as for the other labels; it has no gradient.
  Multiply by 1 / num_example_per_prompt to weigh prompts instead of pairs.

  Args:
    score_0: f32[B] score (logit) of image 0, exp(logit_scale) cos(image, text).
    score_1: f32[B] score of image 1.
    label_0: f32[B] preference for image 0 in {0, 0.5, 1}; values between are soft labels.
  Returns:
    f32[B]; where the scores are equal, log 2 for a preference and 0 for a tie.
  Raises:
    ValueError: shapes that disagree.
  References:
    PickScore: Kirstain et al., arXiv 2305.01569, Section 3; step-aware: arXiv 2406.04314.

  >>> loss = preference_loss(jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 0.5]))
  >>> print(jnp.array_str(loss, precision=4))
  [0.6931 0.    ]
  """
  _check_vectors(score_0=score_0, score_1=score_1, label_0=label_0)
  z, label_0 = _f32(score_0) - _f32(score_1), _f32(label_0)
  entropy = -label_0 * jax.nn.log_sigmoid(z) - (1.0 - label_0) * jax.nn.log_sigmoid(-z)
  return entropy + jnp.where(label_0 == 0.5, math.log(0.5), 0.0)


def info_nce_loss(
  image_emb: jax.Array,
  text_emb: jax.Array,
  logit_scale: jax.Array | float,
  *,
  positives: jax.Array | None = None,
) -> jax.Array:
  """Symmetric InfoNCE of CLIP: each image finds its text in the batch, each text its image.

  Args:
    image_emb: [B, D] image embeddings, normalised here.
    text_emb: [B, D] text embeddings, normalised here.
    logit_scale: f32[] logarithm of the inverse temperature, as CLIP stores it.
    positives: bool[B, B], which images (rows) and texts (columns) belong together, for batches in
      which texts repeat: the target is then uniform over the positives (arXiv 2204.03610). The
      diagonal always belongs. None for the diagonal alone.
  Returns:
    f32[B] mean of the two cross-entropies; log B where all embeddings agree.
  Raises:
    ValueError: shapes that disagree.
  References:
    Radford et al., arXiv 2103.00020, Figure 3.

  >>> print(jnp.array_str(info_nce_loss(jnp.eye(2), jnp.eye(2), 0.0), precision=4))
  [0.3133 0.3133]
  """
  _check_samples(image_emb=image_emb, text_emb=text_emb)
  size = image_emb.shape[0]
  if image_emb.ndim != 2 or (positives is not None and positives.shape != (size, size)):
    raise ValueError(
      f"expected embeddings [B, D] and positives [B, B], got {image_emb.shape} and "
      f"{None if positives is None else positives.shape}."
    )
  image_emb, text_emb = _normalize(_f32(image_emb)), _normalize(_f32(text_emb))
  cosine = jnp.matmul(image_emb, text_emb.T, precision=jax.lax.Precision.HIGHEST)
  logits = jnp.exp(_f32(logit_scale)) * cosine
  target = jnp.eye(size, dtype=bool)
  target = _f32(target if positives is None else target | jnp.asarray(positives, bool))
  of_image = jax.nn.logsumexp(logits, axis=1) - _mean_where(logits, target, axis=1)
  of_text = jax.nn.logsumexp(logits, axis=0) - _mean_where(logits, target, axis=0)
  return 0.5 * (of_image + of_text)


def _mean_where(x: jax.Array, mask: jax.Array, *, axis: int) -> jax.Array:
  return jnp.sum(x * mask, axis=axis) / jnp.sum(mask, axis=axis)


def _normalize(x: jax.Array) -> jax.Array:
  """Scales rows to unit length; a zero row stays zero, with gradient 0 instead of NaN."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


# ---------------------------------------------------------------------------------------------


def _margin(reward_w, reward_l, beta, weight):
  """Returns z = weight beta (r_w - r_l), with a weight for each pair."""
  _check_vectors(reward_w=reward_w, reward_l=reward_l, weight=reward_w if weight is None else weight)
  z = beta * (_f32(reward_w) - _f32(reward_l))
  return z if weight is None else _f32(weight) * z


def _f32(x):
  return jnp.asarray(x, jnp.float32)


def _check_vectors(**arrays):
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
    raise ValueError(f"expected vectors of one shape [B], got {shapes}.")


def _check_samples(**arrays):
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) < 2:
    raise ValueError(f"expected arrays of one shape [B, ...], got {shapes}.")


def _check_same_precision(**arrays):
  dtypes = {name: jnp.asarray(x).dtype.name for name, x in arrays.items()}
  if len(set(dtypes.values())) != 1:
    raise ValueError(
      f"policy and reference have different precisions, {dtypes}; compute both in float32, or "
      f"their difference is not 0 where they agree."
    )


def _check_smoothing(label_smoothing):
  if isinstance(label_smoothing, int | float) and not 0.0 <= label_smoothing < 0.5:
    raise ValueError(f"label_smoothing is {label_smoothing}, expected a value in [0, 0.5).")
