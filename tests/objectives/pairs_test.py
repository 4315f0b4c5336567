"""Diffusion-DPO and the losses of its front end: against numpy, at initialisation, under masks and ties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import diffusion, losses
from jaxpref.files.loading import text_to_image
from jaxpref.files.pipelines import random_pipeline
from jaxpref.models.stable_diffusion import StableDiffusion
from jaxpref.objectives import pairs
from jaxpref.objectives.base import Weights, named_key
from tests import decisions
from tests.objectives.stubs import (
  ABARS,
  BETA,
  FROZEN,
  KEY,
  MODEL,
  NEAR,
  OTHER,
  SAME,
  SIGMOID,
  compiled_loss,
  latents_np,
  log_sigmoid,
  loss_of,
  recorded,
  sized,
  sized_batch,
)
from tests.stub_model import LATENT, StubModel, pair_batch

DPO = compiled_loss(pairs.DiffusionDPO(MODEL, SIGMOID))


@pytest.mark.parametrize("loss_name", ["sigmoid", "hinge"])
def test_soft_labels_scale_the_margin(loss_name):
  """p of the winner counts as 2 p - 1, whichever image it is; 1 and 0 are hard labels."""
  loss_fn = pairs.pair_loss(loss_name, beta=100.0)
  batch, size = pair_batch(9), 9
  seen = []

  def spy(reward_w, reward_l, weight):
    seen.append((reward_w, reward_l, weight))
    return loss_fn(reward_w, reward_l, weight)

  hard = np.array([1, 0] * 4 + [1], np.float32)
  soft = np.array([0.8, 0.3] * 4 + [0.5], np.float32)
  objective = pairs.DiffusionDPO(MODEL, pairs.on_rewards(spy))
  objective.loss(Weights.of(NEAR, SAME, FROZEN), batch | {"label_0": hard}, KEY)
  loss, count, _ = objective.loss(Weights.of(NEAR, SAME, FROZEN), batch | {"label_0": soft}, KEY)
  (w, l, ones), (soft_w, soft_l, weight) = seen
  np.testing.assert_array_equal(ones, np.ones(size))
  np.testing.assert_allclose(weight, [0.6, 0.4] * 4 + [0.0], atol=1e-6)
  np.testing.assert_allclose(soft_w - soft_l, w - l, rtol=1e-5)
  assert count == 8
  np.testing.assert_allclose(loss, loss_fn(w, l, weight)[:8].sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dpo_is_undecided_where_policy_and_reference_agree(dtype):
  """Also in half precision: both errors come from the same computation."""
  loss_fn = DPO
  if dtype != jnp.float32:
    loss_fn = compiled_loss(pairs.DiffusionDPO(StubModel(dtype=dtype), SIGMOID))
  (loss, (count, found)), grads = loss_fn(SAME, SAME, FROZEN, pair_batch(9), KEY)
  assert count == 6
  np.testing.assert_allclose(loss / count, math.log(2), atol=1e-4)
  assert abs(float(found["margin"][0] / count)) < 1e-7
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


def test_dpo_accuracy_of_equal_errors_is_a_half():
  """Of a network that predicts 0: with others, two compiled passes may differ in the last bit."""
  zero = jax.tree.map(jnp.zeros_like, SAME)
  (loss, (count, found)), _ = DPO(zero, zero, FROZEN, pair_batch(9), KEY)
  assert found["implicit_accuracy"][0] / count == 0.5
  assert found["margin"][0] == 0.0
  np.testing.assert_allclose(loss / count, math.log(2), rtol=1e-6)


@pytest.mark.parametrize(("gamma", "reward_scale"), [(1.0, False), (0.8, True)], ids=["dpo", "tdpo"])
def test_dpo_equals_numpy_pair_by_pair(gamma, reward_scale):
  """From the noisy latents that the network was given: same t, noise and prompt for w and l."""
  size = 9
  batch = pair_batch(size)
  (loss, count, found), calls = recorded(
    lambda model: pairs.DiffusionDPO(model, SIGMOID, gamma=gamma, reward_scale=reward_scale),
    NEAR,
    SAME,
    FROZEN,
    batch,
    KEY,
  )
  (x, t, cond, pred), (ref_x, ref_t, ref_cond, ref_pred) = calls

  for a, b in ((x, ref_x), (t, ref_t), (cond, ref_cond)):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(t[:size], t[size:])
  assert len(set(t[:size].tolist())) > 1
  np.testing.assert_array_equal(cond[:size], cond[size:])
  table = FROZEN["text_encoder"]["embedding"]
  np.testing.assert_array_equal(cond[:size], table[batch["input_ids"]])
  first = batch["label_0"][:, None, None, None] == 1
  x0_w = latents_np(np.where(first, batch["pixels_0"], batch["pixels_1"]))
  x0_l = latents_np(np.where(first, batch["pixels_1"], batch["pixels_0"]))
  tie = batch["label_0"] == 0.5
  x0_w[tie], x0_l[tie] = latents_np(batch["pixels_0"])[tie], latents_np(batch["pixels_1"])[tie]
  alpha, sigma = (np.sqrt(v)[t[:size], None, None, None] for v in (ABARS, 1 - ABARS))
  noise = (x[:size] - alpha * x0_w) / sigma
  # Divided by the signal's own rounding error: at t = 0 little is left of the noise.
  np.testing.assert_allclose(noise * sigma, x[size:] - alpha * x0_l, atol=2e-6)

  def error(prediction):
    return np.mean(np.square(prediction - np.concatenate([noise, noise])), axis=(1, 2, 3))

  difference = error(pred) - error(ref_pred)
  margin = -(difference[:size] - difference[size:])  # of the errors; the logit has the 1/2
  z = 0.5 * BETA * margin
  if reward_scale:
    noise_to_signal = np.sqrt((1 - ABARS) / ABARS)
    low, high = noise_to_signal.min(), noise_to_signal.max()
    z *= 1 + (noise_to_signal[t[:size]] - low) / (high - low)
  np.testing.assert_allclose(loss, -log_sigmoid(z)[~tie].sum(), rtol=2e-3)
  assert count == (~tie).sum() == 6
  accuracy = float(found["implicit_accuracy"][0])
  assert accuracy == decisions.above(margin[~tie], margin=1e-5).sum()


def test_gamma_moves_training_to_noisy_steps():
  objective = functools.partial(pairs.DiffusionDPO, loss_fn=SIGMOID, gamma=0.8)
  _, calls = recorded(objective, SAME, SAME, FROZEN, pair_batch(240), KEY)
  # 20 bins with 0.8^i: on average i = 3.77 bins from the noisy end.
  assert abs(calls[0][1].mean() - (1000 - 50 * (3.77 + 0.5))) < 60


def test_ties_weigh_nothing():
  batch = pair_batch(9)
  tie = batch["label_0"] == 0.5
  changed = {k: v.copy() for k, v in batch.items()}
  for k in ("pixels_0", "pixels_1"):
    changed[k][tie] = -(batch[k][tie] ** 3)
  one, other = (DPO(NEAR, SAME, FROZEN, b, KEY) for b in (batch, changed))
  jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
  assert one[0][0] == other[0][0] and one[0][1][0] == 6
  all_ties = batch | {"label_0": np.full(9, 0.5, np.float32)}
  (loss, (count, _)), grads = DPO(NEAR, SAME, FROZEN, all_ties, KEY)
  assert loss == count == 0
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_order_of_the_images_does_not_matter():
  batch = pair_batch(9)
  swapped = batch | {
    "pixels_0": batch["pixels_1"],
    "pixels_1": batch["pixels_0"],
    "label_0": 1 - batch["label_0"],
  }
  one, other = (DPO(NEAR, SAME, FROZEN, b, KEY)[0][0] for b in (batch, swapped))
  np.testing.assert_allclose(one, other, rtol=1e-6)


def test_equal_images_have_no_margin_whatever_the_policy():
  batch = pair_batch(9)
  batch["pixels_1"] = batch["pixels_0"]
  (loss, (count, found)), _ = DPO(OTHER, SAME, FROZEN, batch, KEY)
  np.testing.assert_allclose(loss / count, math.log(2), atol=1e-3)
  assert abs(float(found["margin"][0])) < 1e-5


def test_descent_prefers_the_winner():
  """Some steps lower the winner's error against the loser's, at this t and noise and others."""
  params, batch = SAME, pair_batch(9)
  for i in range(20):
    _, grads = DPO(params, SAME, FROZEN, batch, jax.random.key(i))
    params = jax.tree.map(lambda p, g: p - 2e-6 * g, params, grads)
  for seed in (0, 99):
    (loss, (count, found)), _ = DPO(params, SAME, FROZEN, batch, jax.random.key(seed))
    assert found["margin"][0] > 0
    assert loss / count < math.log(2)


def test_every_draw_depends_on_the_key_alone():
  batch = pair_batch(6)
  values = [float(DPO(NEAR, SAME, FROZEN, batch, jax.random.key(i))[0][0]) for i in (1, 1, 2)]
  assert values[0] == values[1] != values[2]


# ---------------------------------------------------------------------------------------------
# Other losses of the same front end


def denoised(name, batch, **options):
  """(loss, count, metrics) with this loss, [winners', losers'] predictions of each call, and the noise."""
  loss_fn = pairs.denoised_loss(name, **options)
  free = name in pairs.REFERENCE_FREE
  (loss, count, found), calls = recorded(
    lambda model: pairs.DiffusionDPO(model, loss_fn, reference_free=free), NEAR, SAME, FROZEN, batch, KEY
  )
  x, t = calls[0][:2]
  size = len(batch["label_0"])
  first = batch["label_0"][:, None, None, None] == 1
  x0 = latents_np(np.where(first, batch["pixels_0"], batch["pixels_1"]))
  alpha, sigma = (np.sqrt(v)[t[:size], None, None, None] for v in (ABARS, 1 - ABARS))
  noise = (x[:size] - alpha * x0) / sigma
  return loss, count, found, [np.split(call[3].astype(np.float64), 2) for call in calls], noise


def decided(size):
  return pair_batch(size) | {"label_0": (np.arange(size) % 2).astype(np.float32)}


@pytest.mark.parametrize("name", ["robust", "ipo", "hinge", "dspo", "mapo", "sft"])
def test_other_losses_equal_numpy_on_the_same_front_end(name):
  """From predictions and noise; winner's and loser's errors are means over h, w and C."""
  beta, smoothing = {"dspo": 0.5, "mapo": 0.1, "ipo": 300.0}.get(name, 30.0), 0.1
  loss, count, found, preds, noise = denoised(name, decided(6), beta=beta, label_smoothing=smoothing)
  mean = lambda x: x.mean(axis=(1, 2, 3))
  err_w, err_l = (mean((p - noise) ** 2) for p in preds[0])
  assert len(preds) == (1 if name in ("mapo", "sft") else 2)  # a loss without a reference does not call it
  margin = err_l - err_w
  if name == "sft":
    expected = err_w
  elif name == "mapo":
    odds = [0.5 * e / (np.exp(0.5 * e) - 1) for e in (err_w, err_l)]
    expected = err_w - beta * log_sigmoid(1000 * (odds[0] - odds[1]))
  else:
    ref_w, ref_l = (mean((p - noise) ** 2) for p in preds[1])
    margin = (ref_w - err_w) - (ref_l - err_l)
    z = 0.5 * beta * margin
    if name == "robust":
      expected = (-(1 - smoothing) * log_sigmoid(z) + smoothing * log_sigmoid(-z)) / (1 - 2 * smoothing)
    elif name == "ipo":
      expected = (margin - 1 / (2 * beta)) ** 2
    elif name == "hinge":
      expected = np.maximum(1 - z, 0)
    else:
      drift = (beta * (1 - 1 / (1 + np.exp(-z))))[:, None, None, None] * (preds[0][0] - preds[1][0])
      expected = mean((preds[0][0] - noise - drift) ** 2)
  np.testing.assert_allclose(loss, expected.sum(), rtol=2e-3)
  assert count == 6
  np.testing.assert_allclose(found["margin"][0], 0.5 * margin.sum(), rtol=2e-3, atol=1e-5)


def test_the_margin_of_ipo_is_that_of_errors_or_of_log_ratios():
  reward, zero, weight = jnp.linspace(0.0, 0.1, 11), jnp.zeros(11), jnp.ones(11)
  of_ratios = pairs.pair_loss("ipo", beta=10.0)(reward, zero, None)
  np.testing.assert_allclose(of_ratios, np.square(reward - 0.05), rtol=1e-5, atol=1e-9)
  pair = pairs.DenoisedPair(*[None] * 8, reward_w=reward, reward_l=zero, weight=weight)
  of_errors = pairs.denoised_loss("ipo", beta=10.0)(pair)
  np.testing.assert_allclose(of_errors, np.square(2 * reward - 0.05), rtol=1e-5, atol=1e-9)


def test_a_safeguard_scales_the_losers_gradient_alone():
  rng = np.random.default_rng(0)
  pred_w, noise, target_w, target_l = (jnp.float32(rng.standard_normal((5, *LATENT))) for _ in range(4))
  pred_l = target_l + 3.0 * (pred_w - target_w) + 0.5 * noise  # so that the gradients agree
  scalars = jnp.float32(rng.uniform(0.1, 1.0, (4, 5)))
  scale = losses.safeguard_scale(pred_w, target_w, pred_l, target_l, mu=0.3)
  assert (np.asarray(scale) < 0.9).all()  # they are held back

  def gradients(name, guarded):
    loss = pairs.denoised_loss(name, beta=0.5)
    loss = pairs.safeguarded(loss, mu=0.3) if guarded else loss

    def total(scalars):
      pair = pairs.DenoisedPair(pred_w, pred_l, pred_w, pred_l, target_w, target_l, *scalars, weight=jnp.ones(5))
      return jnp.sum(loss(pair))

    return jax.grad(total)(scalars)  # of err_w, err_l, reward_w, reward_l

  for name in ("sigmoid", "mapo"):
    plain, safe = gradients(name, False), gradients(name, True)
    np.testing.assert_allclose(safe[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(safe[2], plain[2], rtol=1e-6)
    np.testing.assert_allclose(safe[1], plain[1] * scale, rtol=1e-5)
    np.testing.assert_allclose(safe[3], plain[3] * scale, rtol=1e-5)
    assert np.abs(plain[1]).max() + np.abs(plain[3]).max() > 0


def test_a_safeguard_holds_back_the_losers_gradient():
  """The same value; with mu = 1 nothing of the winner's descent may be given up where the gradients agree."""
  batch = decided(6)
  gradients = {}
  for mu in (None, 0.0, 1.0):
    loss = pairs.denoised_loss("sigmoid", beta=BETA)
    objective = pairs.DiffusionDPO(MODEL, loss if mu is None else pairs.safeguarded(loss, mu=mu))
    (value, _), gradients[mu] = compiled_loss(objective)(NEAR, SAME, FROZEN, batch, KEY)
    np.testing.assert_allclose(value, DPO(NEAR, SAME, FROZEN, batch, KEY)[0][0], rtol=5e-5)  # of errors times beta
  norms = {mu: float(optax.tree.norm(optax.tree.sub(g, gradients[None]))) for mu, g in gradients.items()}
  assert norms[1.0] > norms[0.0] > 0 and norms[None] == 0


def test_dspo_needs_a_reference():
  objective = pairs.DiffusionDPO(MODEL, pairs.denoised_loss("dspo", beta=0.001), reference_free=True)
  with pytest.raises(ValueError, match="dspo compares with the reference"):
    objective.loss(Weights.of(NEAR, {}, FROZEN), decided(6), KEY)


def test_unknown_pair_loss_is_named():
  with pytest.raises(ValueError, match="loss.name='sigmod'.*sigmoid, robust, ipo, hinge"):
    pairs.pair_loss("sigmod", beta=1.0)


# ---------------------------------------------------------------------------------------------
# What SDXL is conditioned on: the size and crop of each image


def dpo_of(model):
  return loss_of(pairs.DiffusionDPO(model, SIGMOID))


def test_winner_and_loser_are_conditioned_on_their_own_sizes():
  batch = sized_batch(9)
  (loss, _, _), calls, encoded = sized(dpo_of, NEAR, SAME, FROZEN, batch, KEY)
  assert encoded == [9]  # one row a prompt, once
  lost = batch["label_0"] == 0
  winners, losers = (batch[k].copy() for k in ("sizes_0", "sizes_1"))
  winners[lost], losers[lost] = batch["sizes_1"][lost], batch["sizes_0"][lost]
  assert not np.array_equal(winners, losers)
  for _, _, time_ids, _ in calls:  # policy and reference
    np.testing.assert_array_equal(time_ids, np.concatenate([winners, losers]))
  swapped = {k[:-1] + "10"[int(k[-1])]: v for k, v in batch.items() if k.startswith(("pixels", "sizes"))}
  swapped = batch | swapped | {"label_0": 1 - batch["label_0"]}
  (same, _, _), _, _ = sized(dpo_of, NEAR, SAME, FROZEN, swapped, KEY)
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  other = batch | {"sizes_0": batch["sizes_1"], "sizes_1": batch["sizes_0"]}
  (other, _, _), _, _ = sized(dpo_of, NEAR, SAME, FROZEN, other, KEY)
  assert abs(other - loss) > 1e-3 * loss


class PooledImages(StableDiffusion):
  """The real networks, but for the autoencoder, which costs the most to compile."""

  def encode_images(self, weights, images, key):
    height, width, channels = self.latent_shape
    pooled = images.reshape(len(images), height, 2, width, 2, 3).mean((2, 4))
    return jnp.concatenate([pooled, pooled], axis=-1)[..., :channels]


def test_sdxl_loss_of_wide_and_tall_images_equals_a_computation_by_hand():
  """Of the real network: each image by itself, its own sizes given to the text encoding."""
  pipe = random_pipeline("sdxl-miniature")
  model = PooledImages(**vars(text_to_image(pipe)))
  frozen = dict(pipe.params)
  params = {"unet": jax.tree.map(lambda p: p * 1.01, frozen["unet"])}
  ref_params = {"unet": frozen["unet"]}
  size, side = 2, model.image_size
  rng = np.random.default_rng(0)
  pixels = rng.uniform(-1, 1, (2, size, side, side, 3)).astype(np.float32)
  wide, tall = np.float32([side, 2 * side, 0, side // 2, side, side]), np.float32([90, 40, 10, 0, side, side])
  batch = {
    "pixels_0": pixels[0],
    "pixels_1": pixels[1],
    "label_0": np.float32([1, 0]),
    "input_ids": pipe.tokenize(["red apple", "grinning cat"]),
    "sizes_0": np.stack([wide, tall]),
    "sizes_1": np.stack([tall, wide / 2]),
  }
  run = jax.jit(lambda *args: dpo_of(model)(*args)[0])
  loss = float(run(params, ref_params, frozen, batch, KEY))

  @jax.jit
  def error(unet, x_t, t, ids, time_ids, target):
    cond = model.encode_text(frozen, ids, time_ids)
    return jnp.mean((model.predict({**frozen, **unet}, x_t, t, cond) - target) ** 2)

  winners = np.stack([pixels[0, 0], pixels[1, 1]]), np.stack([wide, wide / 2])
  losers = np.stack([pixels[1, 0], pixels[0, 1]]), np.stack([tall, tall])
  x0 = model.encode_images(frozen, np.concatenate([winners[0], losers[0]]), KEY)
  noise = jax.random.normal(named_key(KEY, "noise"), (size, *model.latent_shape))
  t = diffusion.sample_timesteps(named_key(KEY, "t"), size, num_train_timesteps=1000)
  expected = 0.0
  for i in range(size):
    rewards = []
    for side_x0, time_ids in ((x0[:size], winners[1]), (x0[size:], losers[1])):
      a = ABARS[t[i]]
      x_t = (math.sqrt(a) * side_x0[i] + math.sqrt(1 - a) * noise[i])[None]
      args = x_t, t[i : i + 1], batch["input_ids"][i : i + 1], time_ids[i : i + 1], noise[i : i + 1]
      rewards.append(-0.5 * float(error(params, *args) - error(ref_params, *args)))
    expected += -log_sigmoid(BETA * (rewards[0] - rewards[1]))
  assert abs(expected - 2 * math.log(2)) > 1e-3, "the case is undecided"
  np.testing.assert_allclose(loss, expected, rtol=4e-4)  # other sizes make 1e-3
  square = np.tile(np.float32([side, side, 0, 0, side, side]), (size, 1))
  other = float(run(params, ref_params, frozen, batch | {"sizes_0": square, "sizes_1": square}, KEY))
  assert abs(other - loss) > 1e-3
