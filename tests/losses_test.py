"""The losses against derivations in float64 numpy, written from the errors rather than rewards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses

B = 6
BETA = 8.0
LOG2 = np.log(2.0)


def draw(seed, *shape, low=0.05, high=0.6):
  return np.random.default_rng(seed).uniform(low, high, shape or (B,))


def f32(*arrays):
  out = [jnp.asarray(a, jnp.float32) for a in arrays]
  return out if len(out) > 1 else out[0]


def sigmoid(z):
  return 1.0 / (1.0 + np.exp(-z))


def logit(ew, rw, el, rl, weight=1.0):
  """METHODS of the papers, from the four errors: z = -(beta / 2) [(ew - rw) - (el - rl)]."""
  return -(BETA / 2.0) * weight * ((ew - rw) - (el - rl))


# ---------------------------------------------------------------------------------------------
# Every loss on a margin: (reward_w, reward_l, weight) -> [B], and its derivation from the errors

PROB = draw(90, low=0.6, high=0.95)

MARGIN_LOSSES = {
  "dpo": (
    functools.partial(losses.dpo_loss, beta=BETA),
    lambda *e: np.log1p(np.exp(-logit(*e))),
    LOG2,
  ),
  "smoothed": (
    functools.partial(losses.dpo_loss, beta=BETA, label_smoothing=0.2),
    lambda *e: -0.8 * np.log(sigmoid(logit(*e))) - 0.2 * np.log(1.0 - sigmoid(logit(*e))),
    LOG2,
  ),
  "robust": (
    functools.partial(losses.robust_dpo_loss, beta=BETA, label_smoothing=0.2),
    lambda *e: (-0.8 * np.log(sigmoid(logit(*e))) + 0.2 * np.log(1.0 - sigmoid(logit(*e)))) / 0.6,
    LOG2,
  ),
  "soft": (
    lambda *rewards, weight=None: losses.soft_dpo_loss(*rewards, beta=BETA, prob=f32(PROB), gain=1.5, weight=weight),
    lambda *e: np.logaddexp(0.0, -1.5 * (PROB - (1.0 - PROB)) * logit(*e)),
    LOG2,
  ),
  "ipo": (
    functools.partial(losses.ipo_loss, beta=BETA),
    lambda ew, rw, el, rl, weight=1.0: (weight * ((el - rl) - (ew - rw)) - 0.5 / BETA) ** 2,
    0.25 / BETA**2,
  ),
  "hinge": (
    functools.partial(losses.hinge_loss, beta=BETA),
    lambda *e: np.maximum(0.0, 1.0 - logit(*e)),
    1.0,
  ),
}
margin_losses = pytest.mark.parametrize("name", MARGIN_LOSSES)


def on_errors(name, weight=None):
  """The loss as a function of (err_w, ref_w, err_l, ref_l)."""
  fn = MARGIN_LOSSES[name][0]

  def loss(ew, rw, el, rl):
    return fn(losses.implicit_reward(ew, rw), losses.implicit_reward(el, rl), weight=weight)

  return loss


def errors():
  return draw(0), draw(1), draw(2), draw(3)


@margin_losses
def test_margin_loss_equals_its_derivation(name):
  weight = draw(4, low=1.0, high=2.0)
  np.testing.assert_allclose(on_errors(name)(*f32(*errors())), MARGIN_LOSSES[name][1](*errors()), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    on_errors(name, f32(weight))(*f32(*errors())),
    MARGIN_LOSSES[name][1](*errors(), weight),
    rtol=1e-5,
    atol=1e-6,
  )


@margin_losses
def test_margin_loss_gradient_equals_finite_differences_of_the_derivation(name):
  weight, step = draw(4, low=1.0, high=2.0), 1e-6
  loss, oracle = on_errors(name, f32(weight)), MARGIN_LOSSES[name][1]
  grads = jax.grad(lambda *e: loss(*e).sum(), argnums=(0, 1, 2, 3))(*f32(*errors()))
  for position in (0, 2):
    up, down = list(errors()), list(errors())
    up[position], down[position] = up[position] + step, down[position] - step
    expected = (oracle(*up, weight) - oracle(*down, weight)) / (2 * step)
    np.testing.assert_allclose(grads[position], expected, rtol=2e-4, atol=2e-5)
  # The reference is a constant.
  assert not np.any(grads[1]) and not np.any(grads[3])


@margin_losses
def test_margin_loss_at_initialisation(name):
  """Same errors, same loss: the documented constant, and descent favours the winner.

  The sign is where public implementations of IPO and ORPO went wrong.
  """
  e = f32(draw(0))
  loss = on_errors(name)
  np.testing.assert_allclose(loss(e, e, e, e), MARGIN_LOSSES[name][2], rtol=1e-6)
  grad_w, grad_l = jax.grad(lambda ew, el: loss(ew, e, el, e).sum(), argnums=(0, 1))(e, e)
  assert np.all(np.asarray(grad_w) > 0) and np.all(np.asarray(grad_l) < 0)


@margin_losses
def test_margin_loss_weight_acts_on_each_pair_by_itself(name):
  """Not only element 0 of the weight vector, as in trainers run with microbatches of 1."""
  weight = f32(draw(4, low=1.0, high=2.0))
  # Margins below 1 / beta, or the hinge has no slope to tell weights by.
  reward_w, reward_l = f32(draw(5, high=0.1), draw(6, high=0.1))
  fn = MARGIN_LOSSES[name][0]
  whole = fn(reward_w, reward_l, weight=weight)
  scaled = fn(reward_w * weight, reward_l * weight)
  np.testing.assert_allclose(whole, scaled, rtol=1e-5, atol=1e-6)
  assert np.all(np.abs(whole - fn(reward_w, reward_l, weight=weight[:1].repeat(B)))[1:] > 1e-5)


@margin_losses
def test_margin_loss_refuses_shapes_that_would_broadcast(name):
  fn, x = MARGIN_LOSSES[name][0], jnp.zeros(B)
  for bad in ((x, x[:1]), (x[:, None], x[:, None]), (x[0], x[0])):
    with pytest.raises(ValueError, match=r"expected vectors of one shape \[B\], got .*reward_w"):
      fn(*bad)
  with pytest.raises(ValueError, match="weight"):
    fn(x, x, weight=x[:1])


def test_dpo_margin_carries_the_half_of_the_paper():
  """d loss / d err_w = beta / 4 at initialisation; without the 1/2 it would be beta / 2."""
  e = f32(draw(0))
  grad = jax.grad(lambda ew: on_errors("dpo")(ew, e, e, e).sum())(e)
  np.testing.assert_allclose(grad, BETA / 4.0, rtol=1e-6)


def test_dpo_is_antisymmetric_in_the_pair():
  """loss(w, l) - loss(l, w) = -z: swapping the labels turns the sign of the logit."""
  a, b = f32(draw(0), draw(1))
  swapped = losses.dpo_loss(a, b, beta=BETA) - losses.dpo_loss(b, a, beta=BETA)
  np.testing.assert_allclose(swapped, -BETA * (a - b), rtol=1e-5, atol=1e-6)


def test_robust_dpo_is_unbiased_under_flipped_labels():
  a, b = f32(draw(0), draw(1))
  robust = functools.partial(losses.robust_dpo_loss, beta=BETA, label_smoothing=0.3)
  mean_over_flips = 0.7 * robust(a, b) + 0.3 * robust(b, a)
  np.testing.assert_allclose(mean_over_flips, losses.dpo_loss(a, b, beta=BETA), rtol=1e-5)


def test_soft_labels_interpolate_between_the_two_orders():
  a, b = f32(draw(0), draw(1))
  soft = functools.partial(losses.soft_dpo_loss, beta=BETA)
  dpo = functools.partial(losses.dpo_loss, beta=BETA)
  np.testing.assert_allclose(soft(a, b, prob=jnp.ones(B)), dpo(a, b), rtol=1e-6)
  np.testing.assert_allclose(soft(a, b, prob=jnp.zeros(B)), dpo(b, a), rtol=1e-6)
  assert not np.any(jax.grad(lambda a: soft(a, b, prob=jnp.full(B, 0.5)).sum())(a))


def test_ipo_of_log_ratios_is_least_at_the_same_margin():
  """1 / (2 beta), of errors' halves and of log-ratios alike."""
  margins = jnp.linspace(0.0, 0.1, 101)
  zero = jnp.zeros_like(margins)
  of_ratios = losses.ipo_loss(margins, zero, beta=10.0, factor=1.0)
  of_errors = losses.ipo_loss(margins / 2, zero, beta=10.0)
  np.testing.assert_allclose(margins[jnp.argmin(of_ratios)], 0.05, rtol=1e-5)
  np.testing.assert_allclose(of_ratios, of_errors, rtol=1e-5, atol=1e-9)


def test_ipo_is_least_at_its_target_margin():
  """Zero loss where the error margin is 1 / (2 beta), growing on both sides of it."""
  target = 1.0 / (2.0 * BETA)
  err_w = f32(0.5 - np.array([target, 2 * target, 0.0]))
  err_l, ref = jnp.full(3, 0.5), jnp.full(3, 0.5)
  loss = np.asarray(on_errors("ipo")(err_w, ref, err_l, ref))
  np.testing.assert_allclose(loss, [0.0, target**2, target**2], atol=1e-8)


def test_hinge_stops_at_the_margin():
  w = f32([0.0, 0.9, 1.1]) / BETA
  grad = jax.grad(lambda w: losses.hinge_loss(w, jnp.zeros(3), beta=BETA).sum())(w)
  np.testing.assert_allclose(grad, [-BETA, -BETA, 0.0])


@pytest.mark.parametrize("bad", [-0.1, 0.5, 1.0])
def test_label_smoothing_out_of_range_is_refused(bad):
  with pytest.raises(ValueError, match=f"label_smoothing is {bad}, expected"):
    losses.dpo_loss(jnp.zeros(1), jnp.zeros(1), beta=1.0, label_smoothing=bad)
  with pytest.raises(ValueError, match=f"label_smoothing is {bad}, expected"):
    losses.robust_dpo_loss(jnp.zeros(1), jnp.zeros(1), beta=1.0, label_smoothing=bad)


# ---------------------------------------------------------------------------------------------
# Front ends and pairs


def test_implicit_reward_is_half_the_gain_over_the_reference():
  err, ref = draw(0), draw(1)
  reward = losses.implicit_reward(*f32(err, ref))
  np.testing.assert_allclose(reward, (ref - err) / 2.0, rtol=1e-4, atol=1e-6)
  grads = jax.grad(lambda *e: losses.implicit_reward(*e).sum(), argnums=(0, 1))(*f32(err, ref))
  np.testing.assert_array_equal(grads[0], -0.5)
  np.testing.assert_array_equal(grads[1], 0.0)


def test_a_reference_of_another_precision_is_refused_because_it_moves_the_logit():
  """At beta = 5000 a bf16 reference error moves the logit of an untrained policy by whole units."""
  err = f32(draw(0))
  half = err.astype(jnp.bfloat16)
  for fn in (losses.implicit_reward, functools.partial(losses.clipped_log_ratio, eps=0.1)):
    with pytest.raises(ValueError, match="different precision.*float32.*bfloat16"):
      fn(err, half)
    assert not np.any(fn(err, err)) and not np.any(fn(half, half))
  assert np.abs(5000.0 * losses.implicit_reward(err, half.astype(jnp.float32))).max() > 1.0


def test_clipped_log_ratio_equals_log_of_the_clipped_ratio():
  logp, ref = draw(0, low=-2, high=2), draw(1, low=-2, high=2)
  logp[0], logp[1] = ref[0] + 0.05, ref[1] - 0.05
  expected = np.log(np.clip(np.exp(logp - ref), 0.9, 1.1))
  ratio = functools.partial(losses.clipped_log_ratio, eps=0.1)
  np.testing.assert_allclose(ratio(*f32(logp, ref)), expected, atol=2e-7)
  grads = jax.grad(lambda *a: ratio(*a).sum(), argnums=(0, 1))(*f32(logp, ref))
  np.testing.assert_array_equal(grads[0], np.abs(np.exp(logp - ref) - 1) < 0.1)
  assert grads[0][0] == 1 and not np.all(grads[0])
  assert not np.any(grads[1])


def test_clipped_log_ratio_where_the_ratio_itself_overflows():
  out = losses.clipped_log_ratio(f32([500.0, -500.0]), jnp.zeros(2), eps=0.1)
  np.testing.assert_allclose(out, np.log([1.1, 0.9]), rtol=1e-6)


def test_spo_is_dpo_on_clipped_log_ratios():
  """-log sigmoid(beta log r_w - beta log r_l), r clipped, as the paper writes it."""
  win, ref_win, lose, ref_lose = (draw(s, low=-0.06, high=0.06) for s in range(4))
  clip = lambda x: np.clip(np.exp(x), 0.95, 1.05)  # noqa: E731
  expected = -np.log(sigmoid(10 * np.log(clip(win - ref_win)) - 10 * np.log(clip(lose - ref_lose))))
  reward = functools.partial(losses.clipped_log_ratio, eps=0.05)
  out = losses.dpo_loss(reward(*f32(win, ref_win)), reward(*f32(lose, ref_lose)), beta=10.0)
  np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_order_pair_masks_ties_instead_of_counting_them_as_wins():
  value_0, value_1 = f32([1, 2, 3, 4], [5, 6, 7, 8])
  winner, loser, valid = losses.order_pair(value_0, value_1, f32([1.0, 0.0, 0.5, 1.0]))
  np.testing.assert_array_equal(valid, [1, 1, 0, 1])
  np.testing.assert_array_equal(winner[valid == 1], [1, 6, 4])
  np.testing.assert_array_equal(loser[valid == 1], [5, 2, 8])


def test_select_pair_takes_best_and_worst_beyond_the_threshold():
  scores = draw(0, B, 4, low=-1, high=1)
  # Gaps on both sides of the threshold, 0.62 in the scores for 0.3 in the probabilities.
  scores *= (np.array([2.0, 0.58, 0.66, 0.01, 0.4, 1.2]) / np.ptp(scores, axis=1))[:, None]
  winner, loser, valid = losses.select_pair(f32(scores), threshold=0.3)
  for i, s in enumerate(scores):
    order = np.argsort(s)
    assert (winner[i], loser[i]) == (order[-1], order[0])
    best, worst = np.exp(s[order[-1]]), np.exp(s[order[0]])
    assert valid[i] == ((best - worst) / (best + worst) > 0.3)
  np.testing.assert_array_equal(valid, [True, False, True, False, False, True])
  with pytest.raises(ValueError, match="k >= 2"):
    losses.select_pair(jnp.zeros((3, 1)), threshold=0.3)


def test_implicit_accuracy_is_one_half_where_rewards_are_equal():
  accuracy = losses.implicit_accuracy(f32([1.0, 0.0, 0.5]), f32([0.0, 1.0, 0.5]))
  np.testing.assert_array_equal(accuracy, [1.0, 0.0, 0.5])


@pytest.mark.parametrize("label", [1.0, 0.0, 0.5])
def test_d3po_equals_its_reference_formula(label):
  """-log sigmoid(beta log r_0 h_0 + beta log r_1 h_1), h = +-1 by preference, 0 for a tie."""
  p0, r0, p1, r1 = (draw(s, low=-0.08, high=0.08) for s in range(4))
  h = {1.0: (1, -1), 0.0: (-1, 1), 0.5: (0, 0)}[label]
  clip = lambda x: np.clip(np.exp(x), 0.9, 1.1)  # noqa: E731
  expected = -np.log(sigmoid(3 * np.log(clip(p0 - r0)) * h[0] + 3 * np.log(clip(p1 - r1)) * h[1]))
  loss = functools.partial(losses.d3po_loss, label_0=jnp.full(B, label), beta=3.0, eps=0.1)
  np.testing.assert_allclose(loss(*f32(p0, r0, p1, r1)), expected, rtol=1e-5)
  grad = jax.grad(lambda p: loss(p, *f32(r0, p1, r1)).sum())(f32(p0))
  inside = np.abs(np.exp(p0 - r0) - 1) < 0.1
  closed_form = -3 * h[0] * (1 - np.exp(-expected)) * inside
  np.testing.assert_allclose(grad, closed_form, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Losses of another form


def test_sft_is_the_error():
  err = f32(draw(0))
  np.testing.assert_array_equal(losses.sft_loss(err), err)
  np.testing.assert_array_equal(jax.grad(lambda e: losses.sft_loss(e).sum())(err), 1.0)


LIKED = np.array([True, False, True, True, False, False])


def kto_oracle(err, ref, baseline=None):
  g = ref - err
  k = max(0.0, g.mean()) if baseline is None else baseline
  lam, y = np.where(LIKED, 1.5, 0.7), np.where(LIKED, 1.0, -1.0)
  return lam * (1.0 - sigmoid(y * BETA * (g - k))), k


def kto(err, ref, **kwargs):
  return losses.kto_loss(
    losses.implicit_reward(err, ref),
    jnp.asarray(LIKED),
    beta=BETA,
    weight_desirable=1.5,
    weight_undesirable=0.7,
    **kwargs,
  )


@pytest.mark.parametrize("gain", [0.1, -0.1])  # mean g of both signs: K > 0 and K clipped to 0
def test_kto_equals_its_derivation_in_value_and_gradient(gain):
  ref = draw(1)
  err = ref - gain + draw(0, low=-0.1, high=0.1)
  expected, k = kto_oracle(err, ref)
  assert (k > 0) == (gain > 0)
  np.testing.assert_allclose(kto(*f32(err, ref)), expected, rtol=1e-4)
  # K is a constant to the gradient, so the oracle's is frozen for the difference quotient.
  step = 1e-6
  quotient = (kto_oracle(err + step, ref, k)[0] - kto_oracle(err - step, ref, k)[0]) / (2 * step)
  grad = jax.grad(lambda e: kto(e, f32(ref)).sum())(f32(err))
  np.testing.assert_allclose(grad, quotient, rtol=2e-3)
  assert np.all((np.asarray(grad) > 0) == LIKED)


def test_kto_at_initialisation_and_its_weight():
  err = f32(draw(0))
  np.testing.assert_allclose(kto(err, err), np.where(LIKED, 0.75, 0.35), rtol=1e-6)
  ref, weight = f32(draw(1)), f32(draw(2, low=1, high=2))
  zero = jnp.zeros(())
  weighted = kto(err, ref, weight=weight, baseline=zero)
  scaled = kto(err * weight, ref * weight, baseline=zero)
  np.testing.assert_allclose(weighted, scaled, rtol=1e-5)


def test_kto_baseline_divides_once_by_the_count_of_what_counts():
  """The mean over all valid samples, not the mean of two microbatches' means."""
  reward = f32([0.4, 0.0, 0.0, 0.2])
  mask = f32([1.0, 0.0, 1.0, 1.0])
  whole = losses.kto_baseline(reward, mask)
  np.testing.assert_allclose(whole, 2 * 0.6 / 3, rtol=1e-6)
  halves = [losses.kto_baseline(reward[s], mask[s]) for s in (slice(0, 2), slice(2, 4))]
  assert abs(np.mean(halves) - whole) > 0.05
  np.testing.assert_array_equal(losses.kto_baseline(-reward), 0.0)
  np.testing.assert_array_equal(losses.kto_baseline(reward, jnp.zeros(4)), 0.0)
  assert not np.any(jax.grad(lambda r: losses.kto_baseline(r))(reward))


def mapo_oracle(ew, el, weight=1.0):
  phi = lambda m: 0.5 * m / (np.exp(0.5 * m) - 1.0)  # noqa: E731
  return ew + 0.3 * np.log1p(np.exp(-weight * (phi(ew) - phi(el))))


def test_mapo_equals_its_derivation_in_value_and_gradient():
  ew, el, weight = draw(0), draw(1), draw(2, low=1, high=50)
  loss = lambda *e: losses.mapo_loss(*e, beta=0.3, snr=0.5, weight=f32(weight))  # noqa: E731
  np.testing.assert_allclose(loss(*f32(ew, el)), mapo_oracle(ew, el, weight), rtol=1e-5)
  step = 1e-6
  grads = jax.grad(lambda *e: loss(*e).sum(), argnums=(0, 1))(*f32(ew, el))
  up, down = mapo_oracle(ew + step, el, weight), mapo_oracle(ew - step, el, weight)
  np.testing.assert_allclose(grads[0], (up - down) / (2 * step), rtol=1e-3)
  up, down = mapo_oracle(ew, el + step, weight), mapo_oracle(ew, el - step, weight)
  np.testing.assert_allclose(grads[1], (up - down) / (2 * step), rtol=1e-3)
  assert np.all(np.asarray(grads[0]) > 0) and np.all(np.asarray(grads[1]) < 0)


def test_mapo_with_equal_errors_and_where_phi_is_delicate():
  err = f32(draw(0))
  loss = losses.mapo_loss(err, err, beta=0.3, snr=0.5)
  np.testing.assert_allclose(loss, err + 0.3 * LOG2, rtol=1e-6)
  # 0 (0 / 0), just above the series, and where exp overflows float32.
  m = f32([0.0, 1e-4, 2.1e-3, 1e3, 1e30])
  phi, slope = jax.vmap(jax.value_and_grad(losses._x_over_expm1))(m)
  exact = np.array([1.0, 1 - 5e-5, 1 - 1.05e-3 + 2.1e-3**2 / 12, 0.0, 0.0])
  np.testing.assert_allclose(phi, exact, atol=1e-6)
  np.testing.assert_allclose(slope, [-0.5, -0.5, -0.49965, 0.0, 0.0], atol=1e-4)


def dspo_oracle(pred, ref, target, rw, rl, weight=1.0):
  z = BETA * weight * (rw - rl)
  coefficient = BETA / (1.0 + np.exp(z))
  out = []
  for p, r, t, c in zip(pred, ref, target, coefficient, strict=True):
    out.append(np.mean([((a - d) - c * (a - b)) ** 2 for a, b, d in zip(p.ravel(), r.ravel(), t.ravel(), strict=True)]))
  return np.array(out)


def test_dspo_equals_its_derivation_in_value_and_gradient():
  pred, ref, target = (draw(s, B, 2, 2, 3) for s in range(3))
  rw, rl, weight = draw(3), draw(4), draw(5, low=1, high=2)
  loss = lambda *a: losses.dspo_loss(*a, beta=BETA, weight=f32(weight))  # noqa: E731
  args = f32(pred, ref, target, rw, rl)
  expected = dspo_oracle(pred, ref, target, rw, rl, weight)
  np.testing.assert_allclose(loss(*args), expected, rtol=1e-5)
  grads = jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 1, 3))(*args)
  step, one = 1e-6, np.zeros_like(pred)
  one[:, 1, 0, 2] = 1e-6
  up = dspo_oracle(pred + one, ref, target, rw, rl, weight)
  down = dspo_oracle(pred - one, ref, target, rw, rl, weight)
  np.testing.assert_allclose(grads[0][:, 1, 0, 2], (up - down) / 2e-6, rtol=1e-3, atol=1e-5)
  assert not np.any(grads[1])
  up = dspo_oracle(pred, ref, target, rw + step, rl, weight)
  down = dspo_oracle(pred, ref, target, rw - step, rl, weight)
  np.testing.assert_allclose(grads[2], (up - down) / 2e-6, rtol=1e-3, atol=1e-5)


def test_dspo_at_initialisation_is_the_winners_error():
  pred, target = f32(draw(0, B, 4), draw(1, B, 4))
  zero = jnp.zeros(B)
  loss = losses.dspo_loss(pred, pred, target, zero, zero, beta=BETA)
  np.testing.assert_allclose(loss, np.mean((pred - target) ** 2, axis=1), rtol=1e-6)
  beta = 0.25
  gradient = jax.grad(lambda p: losses.dspo_loss(p, pred, target, zero, zero, beta=beta).sum())(pred)
  np.testing.assert_allclose(gradient, (1 - beta / 2) * 2 * (pred - target) / 4, rtol=1e-5)  # SFT's, but for a factor
  with pytest.raises(ValueError, match="one per sample"):
    losses.dspo_loss(pred, pred, target, zero[:1], zero[:1], beta=BETA)


def test_safeguard_keeps_the_winner_from_getting_worse():
  """One step of descent on a shared vector of outputs, with and without the safeguard."""
  win = draw(0, B, 8, low=-0.2, high=0.2)
  # The loser's gradient overpowers the winner's, except where it agrees with it.
  lose = 3.0 * win + draw(1, B, 8, low=-0.04, high=0.04)
  lose[0] *= -1.0
  zero = jnp.zeros((B, 8))
  lam = np.asarray(losses.safeguard_scale(f32(win), zero, f32(lose), zero))
  assert lam[0] == 1.0 and np.all(lam[1:] < 0.5)

  def growth(scale, lr=1e-4):
    moved = win - lr * (2 * win - scale[:, None] * 2 * lose)
    return (np.sum(moved**2, axis=1) / np.sum(win**2, axis=1) - 1.0) / lr

  assert np.all(growth(np.ones(B))[1:] > 1.0)
  assert np.all(growth(lam) < 0.01)
  stricter = np.asarray(losses.safeguard_scale(f32(win), zero, f32(lose), zero, mu=0.2))
  np.testing.assert_allclose(stricter[1:], 0.8 * lam[1:], rtol=1e-5)
  # First order: the winner keeps a share mu of its own descent.
  kept = np.sum(win * (win - stricter[:, None] * lose), axis=1)[1:] / np.sum(win * win, axis=1)[1:]
  np.testing.assert_allclose(kept, 0.2, rtol=1e-4)


def test_safeguard_wraps_any_pair_loss_in_gradient_only():
  ew, rw, el, rl = f32(*errors())
  scale = f32(draw(7))
  for name in MARGIN_LOSSES:
    loss = on_errors(name)
    guarded = lambda ew, el, f=loss: f(ew, rw, losses.scale_gradient(el, scale), rl)  # noqa: E731
    np.testing.assert_array_equal(guarded(ew, el), loss(ew, rw, el, rl))
    plain = jax.grad(lambda *e, f=loss: f(e[0], rw, e[1], rl).sum(), argnums=(0, 1))(ew, el)
    safe = jax.grad(lambda *e, f=guarded: f(*e).sum(), argnums=(0, 1))(ew, el)
    np.testing.assert_array_equal(safe[0], plain[0])
    np.testing.assert_allclose(safe[1], plain[1] * scale, rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# Policy gradients


def test_group_advantages_equal_numpy_by_group():
  reward = draw(0, 12, low=0, high=10)
  groups = reward.reshape(3, 4)
  centred = groups - groups.mean(axis=1, keepdims=True)
  expected = (centred / (groups.std(axis=1, keepdims=True) + 1e-4)).ravel()
  out = losses.group_advantages(f32(reward), group_size=4)
  np.testing.assert_allclose(out, expected, rtol=1e-4)
  np.testing.assert_allclose(
    losses.group_advantages(f32(reward), group_size=4, normalize_std=False),
    centred.ravel(),
    rtol=1e-5,
    atol=1e-6,
  )
  # Shift and scale of a group's rewards do not matter; equal rewards teach nothing.
  np.testing.assert_allclose(losses.group_advantages(f32(3 * reward + 7), group_size=4), expected, rtol=1e-3)
  assert not np.any(losses.group_advantages(jnp.full(4, 0.3), group_size=4))


def test_group_advantages_ignore_masked_rewards():
  reward = f32([1.0, 3.0, np.nan, 5.0, 7.0, 9.0])
  mask = f32([1, 1, 0, 1, 0, 1])
  out = losses.group_advantages(reward, group_size=3, mask=mask, normalize_std=False)
  np.testing.assert_allclose(out, [-1, 1, 0, -2, 0, 2], atol=1e-6)
  with pytest.raises(ValueError, match="6 rewards are not whole groups of 4"):
    losses.group_advantages(reward, group_size=4)


def surrogate_oracle(logp, old, adv, eps):
  r = np.exp(logp - old)
  return -np.minimum(adv * r, adv * np.minimum(np.maximum(r, 1 - eps), 1 + eps))


def policy_gradient_inputs():
  logp, old, ref = (draw(s, low=-0.3, high=0.3) for s in range(3))
  return logp, old, ref, draw(3, low=-2, high=2)


def test_ddpo_score_function_and_importance_sampling():
  logp, old, _, adv = policy_gradient_inputs()
  np.testing.assert_allclose(losses.ddpo_loss(*f32(logp, adv)), -adv * logp, rtol=1e-5)
  clipped = losses.ddpo_loss(*f32(logp, adv), old_logp=f32(old), eps=0.1)
  np.testing.assert_allclose(clipped, surrogate_oracle(logp, old, adv, 0.1), rtol=1e-5)
  # On-policy both have the policy gradient, -A.
  for old_logp in (None, f32(logp)):
    grad = jax.grad(lambda p, o=old_logp: losses.ddpo_loss(p, f32(adv), old_logp=o).sum())(f32(logp))
    np.testing.assert_allclose(grad, -adv, rtol=1e-5)


def test_grpo_equals_its_derivation_in_value_and_gradient():
  logp, old, ref, adv = policy_gradient_inputs()

  def oracle(logp):
    kl = np.exp(ref) / np.exp(logp) - (ref - logp) - 1.0
    return surrogate_oracle(logp, old, adv, 0.1) + 0.2 * kl

  loss = lambda p: losses.grpo_loss(  # noqa: E731
    p, *f32(old, adv), eps=0.1, ref_logp=f32(ref), kl_coef=0.2
  )
  np.testing.assert_allclose(loss(f32(logp)), oracle(logp), rtol=1e-5)
  quotient = (oracle(logp + 1e-6) - oracle(logp - 1e-6)) / 2e-6
  np.testing.assert_allclose(jax.grad(lambda p: loss(p).sum())(f32(logp)), quotient, rtol=1e-3, atol=1e-4)


def test_grpo_stops_only_where_the_ratio_has_gone_far_enough_in_the_right_direction():
  logp = f32([0.5, 0.5, -0.5, -0.5])
  adv = f32([1.0, -1.0, 1.0, -1.0])
  grad = jax.grad(lambda p: losses.grpo_loss(p, jnp.zeros(4), adv, eps=0.1).sum())(logp)
  np.testing.assert_array_equal(np.asarray(grad) != 0, [False, True, True, False])
  with pytest.raises(ValueError, match="ref_logp is missing"):
    losses.grpo_loss(logp, logp, adv, eps=0.1, kl_coef=0.1)


def test_no_gradient_flows_to_advantages_or_to_the_policies_that_are_constants():
  args = f32(*(draw(s) for s in range(4)))
  loss = lambda p, o, r, a: losses.grpo_loss(  # noqa: E731
    p, o, a, eps=0.5, ref_logp=r, kl_coef=0.1
  ).sum()
  grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*args)
  assert [bool(np.any(g)) for g in grads] == [True, False, False, False]


# ---------------------------------------------------------------------------------------------
# Preference model


def test_preference_loss_equals_cross_entropy_with_the_tie_offset():
  s0, s1 = draw(0, low=-3, high=3), draw(1, low=-3, high=3)
  label = np.array([1.0, 0.0, 0.5, 1.0, 0.5, 0.0])
  p0 = np.exp(s0) / (np.exp(s0) + np.exp(s1))
  expected = -label * np.log(p0) - (1 - label) * np.log(1 - p0)
  expected[label == 0.5] += np.log(0.5)
  out = losses.preference_loss(*f32(s0, s1, label))
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)
  grads = jax.grad(lambda *s: losses.preference_loss(*s, f32(label)).sum(), argnums=(0, 1))(*f32(s0, s1))
  np.testing.assert_allclose(grads[0], p0 - label, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(grads[1], label - p0, rtol=1e-4, atol=1e-6)


def test_preference_loss_is_least_at_equal_scores_for_a_tie():
  gaps = f32([-1.0, -0.1, 0.0, 0.1, 1.0])
  loss = np.asarray(losses.preference_loss(gaps, jnp.zeros(5), jnp.full(5, 0.5)))
  np.testing.assert_allclose(loss, loss[::-1], rtol=1e-5)
  assert loss[2] == 0.0 and np.all(np.diff(loss[2:]) > 0)


def info_nce_oracle(image, text, scale, positives):
  n = len(image)
  unit = lambda x: x / np.sqrt((x * x).sum(1))[:, None]  # noqa: E731
  logits = np.exp(scale) * unit(image) @ unit(text).T
  out = np.zeros(n)
  for i in range(n):
    for row, same in ((logits[i], positives[i]), (logits[:, i], positives[:, i])):
      log_p = row - np.log(np.exp(row).sum())
      out[i] -= 0.5 * log_p[same].mean()
  return out


@pytest.mark.parametrize("repeated", [False, True])
def test_info_nce_equals_its_derivation_in_value_and_gradient(repeated):
  image, text = draw(0, B, 4, low=-1, high=1), draw(1, B, 4, low=-1, high=1)
  ids = np.array([0, 1, 1, 2, 3, 1]) if repeated else np.arange(B)
  positives = ids[:, None] == ids[None, :]
  loss = lambda *a: losses.info_nce_loss(  # noqa: E731
    *a, positives=jnp.asarray(positives) if repeated else None
  )
  expected = info_nce_oracle(image, text, 1.2, positives)
  np.testing.assert_allclose(loss(*f32(image, text, 1.2)), expected, rtol=1e-4)
  grads = jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 2))(*f32(image, text, 1.2))
  up = info_nce_oracle(image, text, 1.2 + 1e-6, positives).sum()
  down = info_nce_oracle(image, text, 1.2 - 1e-6, positives).sum()
  np.testing.assert_allclose(grads[1], (up - down) / 2e-6, rtol=1e-3)
  one = np.zeros_like(image)
  one[2, 3] = 1e-6
  up = info_nce_oracle(image + one, text, 1.2, positives).sum()
  down = info_nce_oracle(image - one, text, 1.2, positives).sum()
  np.testing.assert_allclose(grads[0][2, 3], (up - down) / 2e-6, rtol=1e-3)


def test_info_nce_of_indistinguishable_embeddings_and_its_scale_invariance():
  same = jnp.ones((B, 4))
  np.testing.assert_allclose(losses.info_nce_loss(same, same, 2.0), np.log(B), rtol=1e-5)
  image, text = f32(draw(0, B, 4), draw(1, B, 4))
  np.testing.assert_allclose(
    losses.info_nce_loss(5 * image, 0.1 * text, 2.0),
    losses.info_nce_loss(image, text, 2.0),
    rtol=1e-4,
  )
  with pytest.raises(ValueError, match=r"positives \[B, B\]"):
    losses.info_nce_loss(image, text, 2.0, positives=jnp.ones(B, bool))


# ---------------------------------------------------------------------------------------------
# What holds for all of them

ONE = jnp.ones(B)
ALL_LOSSES = {
  **{name: (on_errors(name), 4) for name in MARGIN_LOSSES},
  "kto": (kto, 2),
  "mapo": (functools.partial(losses.mapo_loss, beta=0.3, snr=0.5), 2),
  "spo": (
    lambda *logp: losses.dpo_loss(
      losses.clipped_log_ratio(*logp[:2], eps=0.1),
      losses.clipped_log_ratio(*logp[2:], eps=0.1),
      beta=10.0,
    ),
    4,
  ),
  "d3po": (lambda *p: losses.d3po_loss(*p, ONE, beta=0.1), 4),
  "sft": (losses.sft_loss, 1),
  "ddpo": (lambda p, a: losses.ddpo_loss(p, a), 2),
  "ddpo_is": (lambda p, o, a: losses.ddpo_loss(p, a, old_logp=o), 3),
  "grpo": (lambda p, o, a, r: losses.grpo_loss(p, o, a, eps=0.1, ref_logp=r, kl_coef=0.1), 4),
  "preference": (lambda s0, s1: losses.preference_loss(s0, s1, ONE), 2),
}
all_losses = pytest.mark.parametrize("name", ALL_LOSSES)


@all_losses
def test_half_precision_inputs_are_computed_in_float32(name):
  """bf16 in, f32 out, and exactly what the same numbers give in f32."""
  fn, n = ALL_LOSSES[name]
  half = [jnp.asarray(draw(s), jnp.bfloat16) for s in range(n)]
  out = fn(*half)
  assert out.dtype == jnp.float32 and out.shape == (B,)
  np.testing.assert_array_equal(out, fn(*(x.astype(jnp.float32) for x in half)))


@all_losses
def test_losses_and_gradients_are_finite_at_extremes(name):
  """Errors of a diverged model: 1e4 on either side, and log-densities as far apart."""
  fn, n = ALL_LOSSES[name]
  extremes = np.array([1e4, 0.0, 1e4, 1e-30, 3e3, 0.0])
  args = f32(*(np.roll(extremes, shift) for shift in range(n)))
  args = args if isinstance(args, list) else [args]
  value, grads = jax.value_and_grad(lambda *a: fn(*a).sum(), argnums=tuple(range(n)))(*args)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize("name", sorted(set(ALL_LOSSES) - {"soft", "kto"}))
def test_losses_are_one_value_a_pair(name):
  """Pairs do not see each other (the two left out here close over labels in a fixed order)."""
  fn, n = ALL_LOSSES[name]
  args, order = [f32(draw(s)) for s in range(n)], np.array([3, 1, 5, 0, 2, 4])
  np.testing.assert_allclose(fn(*(a[order] for a in args)), fn(*args)[order], rtol=1e-6)


def test_wide_extremes_of_the_tensor_losses():
  big = f32(np.full((B, 2, 2, 1), 1e6))
  zero, far = jnp.zeros_like(big), f32(np.full(B, 1e6))
  for rewards in ((far, -far), (-far, far)):
    grads = jax.grad(lambda p, *r: losses.dspo_loss(p, zero, zero, *r, beta=1e-3).sum(), argnums=(0, 1, 2))(
      big, *rewards
    )
    assert all(np.all(np.isfinite(g)) for g in grads)
  assert np.all(np.isfinite(losses.safeguard_scale(zero, zero, zero, zero)))
  emb = jnp.zeros((B, 4)).at[0].set(1e6)
  grads = jax.grad(lambda e: losses.info_nce_loss(e, emb, 4.6).sum())(emb)
  assert np.all(np.isfinite(grads))


def test_half_precision_of_the_tensor_losses():
  half = [jnp.asarray(draw(s, B, 4), jnp.bfloat16) for s in range(4)]
  full = [x.astype(jnp.float32) for x in half]
  reward = [f32(draw(s)) for s in (5, 6)]
  for fn in (
    lambda a, b, c, d: losses.dspo_loss(a, b, c, *reward, beta=0.1),
    lambda a, b, c, d: losses.safeguard_scale(a, b, c, d),
    lambda a, b, c, d: losses.info_nce_loss(a, b, 2.0),
  ):
    assert fn(*half).dtype == jnp.float32 and fn(*half).shape == (B,)
    np.testing.assert_array_equal(fn(*half), fn(*full))
