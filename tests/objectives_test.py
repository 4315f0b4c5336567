"""Objectives on a stub network: against numpy, at initialisation, under masks and ties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import diffusion, losses, objectives, rollout
from jaxpref.files.loading import text_to_image
from jaxpref.files.pipelines import random_pipeline
from jaxpref.models.preference import StepAwareCLIPConfig, preprocess
from jaxpref.models.text_to_image import TextToImage
from tests import decisions
from tests.stub_model import LATENT, SCHEDULE, StubModel, StubScorer, draw, init, pair_batch

BETA = 500.0
MODEL = StubModel()
FROZEN = init()
OTHER = {"unet": init(50)["unet"]}
SAME = {"unet": FROZEN["unet"]}
NEAR = jax.tree.map(lambda a, b: a + 0.02 * b, SAME, OTHER)
KEY = jax.random.key(0)
SIGMOID = objectives.denoised_loss("sigmoid", beta=BETA)
ABARS = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class Recorder(StubModel):
  """Keeps what every call of the network is given and what it returns."""

  def __init__(self):
    super().__init__()
    object.__setattr__(self, "calls", [])

  def predict(self, weights, x, t, cond):
    out = super().predict(weights, x, t, cond)
    self.calls.append((x, t, cond["encoder_hidden_states"], out))
    return out


def recorded(build, *args):
  """Loss, count and metrics of the objective that `build` makes of a model; and the calls."""

  @jax.jit
  def run(*args):
    model = Recorder()
    return build(model).loss(*args), model.calls

  return jax.tree.map(np.asarray, run(*args))


def log_sigmoid(z):
  return -np.logaddexp(0.0, -z)


def latents_np(pixels):
  return pixels.reshape(-1, 4, 2, 4, 2, 3).mean(axis=(2, 4))[..., :2] * 0.8


# ---------------------------------------------------------------------------------------------
# Diffusion-KTO


def image_batch(size):
  pairs = pair_batch(size)
  label = (np.arange(size) % 3 == 0).astype(np.float32)
  return {"pixels": pairs["pixels_0"], "input_ids": pairs["input_ids"], "label": label}


def test_kto_is_half_where_policy_and_reference_agree_and_pulls_apart():
  """lam / 2 for each image at first; a step along the gradient raises the liked ones' reward over the others'."""
  objective = compiled_loss(objectives.kto(MODEL, beta=10.0, weight_desirable=2.0, weight_undesirable=0.5))
  batch = image_batch(9)
  (loss, (count, found)), grads = objective(SAME, SAME, FROZEN, batch, KEY)
  assert count == 9 and found["reward_liked"][1] == 3 and found["reward_disliked"][1] == 6
  np.testing.assert_allclose(loss, 3 * 2.0 / 2 + 6 * 0.5 / 2, rtol=1e-5)
  moved = jax.tree.map(lambda p, g: p - 0.01 * g / optax.tree.norm(grads), SAME, grads)
  (after, (_, found)), _ = objective(moved, SAME, FROZEN, batch, KEY)
  assert after < loss
  assert found["reward_liked"][0] / 3 > found["reward_disliked"][0] / 6


def test_kto_equals_numpy_image_by_image():
  batch, beta = image_batch(9), 10.0
  (loss, count, found), calls = recorded(
    lambda model: objectives.kto(model, beta=beta), NEAR, SAME, FROZEN, batch, KEY
  )
  (x, t, cond, pred), (ref_x, ref_t, _, ref_pred) = calls
  np.testing.assert_array_equal(x, ref_x)
  np.testing.assert_array_equal(t, ref_t)
  np.testing.assert_array_equal(cond, FROZEN["text_encoder"]["embedding"][batch["input_ids"]])
  abar = np.asarray(MODEL.schedule.alphas_cumprod)[t][:, None, None, None]
  noise = (x - np.sqrt(abar) * latents_np(batch["pixels"])) / np.sqrt(1 - abar)
  err, ref_err = (((p - noise) ** 2).mean((1, 2, 3)) for p in (pred, ref_pred))
  gain = ref_err - err
  z = beta * (gain - max(gain.mean(), 0.0))
  sign = np.where(batch["label"] == 1, 1.0, -1.0)
  np.testing.assert_allclose(loss, (1 - 1 / (1 + np.exp(-sign * z))).sum(), rtol=1e-4)
  assert count == 9


# ---------------------------------------------------------------------------------------------
# Diffusion-DPO


@pytest.mark.parametrize("loss_name", ["sigmoid", "hinge"])
def test_soft_labels_scale_the_margin(loss_name):
  """p of the winner counts as 2 p - 1, whichever image it is; 1 and 0 are hard labels."""
  loss_fn = objectives.pair_loss(loss_name, beta=100.0)
  batch, size = pair_batch(9), 9
  seen = []

  def spy(reward_w, reward_l, weight):
    seen.append((reward_w, reward_l, weight))
    return loss_fn(reward_w, reward_l, weight)

  hard = np.array([1, 0] * 4 + [1], np.float32)
  soft = np.array([0.8, 0.3] * 4 + [0.5], np.float32)
  objective = objectives.dpo(MODEL, objectives.on_rewards(spy))
  objective.loss(NEAR, SAME, FROZEN, batch | {"label_0": hard}, KEY)
  loss, count, _ = objective.loss(NEAR, SAME, FROZEN, batch | {"label_0": soft}, KEY)
  (w, l, ones), (soft_w, soft_l, weight) = seen
  np.testing.assert_array_equal(ones, np.ones(size))
  np.testing.assert_allclose(weight, [0.6, 0.4] * 4 + [0.0], atol=1e-6)
  np.testing.assert_allclose(soft_w - soft_l, w - l, rtol=1e-5)
  assert count == 8
  np.testing.assert_allclose(loss, loss_fn(w, l, weight)[:8].sum(), rtol=1e-5)


def compiled_loss(objective):
  def total(params, ref_params, frozen, batch, key):
    loss, count, pairs = objective.loss(params, ref_params, frozen, batch, key)
    return loss, (count, pairs)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


DPO = compiled_loss(objectives.dpo(MODEL, SIGMOID))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dpo_is_undecided_where_policy_and_reference_agree(dtype):
  """Also in half precision: both errors come from the same computation."""
  loss_fn = DPO
  if dtype != jnp.float32:
    loss_fn = compiled_loss(objectives.dpo(StubModel(dtype=dtype), SIGMOID))
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


@pytest.mark.parametrize(
  ("gamma", "reward_scale"), [(1.0, False), (0.8, True)], ids=["dpo", "tdpo"]
)
def test_dpo_equals_numpy_pair_by_pair(gamma, reward_scale):
  """From the noisy latents that the network was given: same t, noise and prompt for w and l."""
  size = 9
  batch = pair_batch(size)
  (loss, count, found), calls = recorded(
    lambda model: objectives.dpo(model, SIGMOID, gamma=gamma, reward_scale=reward_scale),
    NEAR, SAME, FROZEN, batch, KEY,
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
  objective = functools.partial(objectives.dpo, loss_fn=SIGMOID, gamma=0.8)
  _, calls = recorded(objective, SAME, SAME, FROZEN, pair_batch(240), KEY)
  # 20 bins with 0.8^i: on average i = 3.77 bins from the noisy end.
  assert abs(calls[0][1].mean() - (1000 - 50 * (3.77 + 0.5))) < 60


def test_ties_weigh_nothing():
  batch = pair_batch(9)
  tie = batch["label_0"] == 0.5
  changed = {k: v.copy() for k, v in batch.items()}
  for k in ("pixels_0", "pixels_1"):
    changed[k][tie] = -batch[k][tie] ** 3
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


def denoised(name, batch, **options):
  """(loss, count, metrics) with this loss, [winners', losers'] predictions of each call, and the noise."""
  loss_fn = objectives.denoised_loss(name, **options)
  free = name in objectives.REFERENCE_FREE
  (loss, count, found), calls = recorded(
    lambda model: objectives.dpo(model, loss_fn, reference_free=free), NEAR, SAME, FROZEN, batch, KEY
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


def test_the_divergence_of_kto_looks_at_liked_images_first():
  """At most at eight."""
  batch = image_batch(12) | {"label": np.float32([0] * 4 + [1] * 8)}
  divergence = jax.jit(objectives.kto(MODEL, beta=10.0).divergence)
  found = []
  for changed in (slice(0, 0), slice(0, 4), slice(4, 12)):
    pixels = batch["pixels"].copy()
    pixels[changed] = 0
    found.append(float(divergence(OTHER, FROZEN, batch | {"pixels": pixels}, KEY)))
  assert found[0] == found[1] != found[2]


def test_a_safeguard_scales_the_losers_gradient_alone():
  rng = np.random.default_rng(0)
  pred_w, noise, target_w, target_l = (jnp.float32(rng.standard_normal((5, *LATENT))) for _ in range(4))
  pred_l = target_l + 3.0 * (pred_w - target_w) + 0.5 * noise  # so that the gradients agree
  scalars = jnp.float32(rng.uniform(0.1, 1.0, (4, 5)))
  scale = losses.safeguard_scale(pred_w, target_w, pred_l, target_l, mu=0.3)
  assert (np.asarray(scale) < 0.9).all()  # they are held back

  def gradients(name, guarded):
    loss = objectives.denoised_loss(name, beta=0.5)
    loss = objectives.safeguarded(loss, mu=0.3) if guarded else loss

    def total(scalars):
      pair = objectives.DenoisedPair(
        pred_w, pred_l, pred_w, pred_l, target_w, target_l, *scalars, weight=jnp.ones(5)
      )
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
    loss = objectives.denoised_loss("sigmoid", beta=BETA)
    objective = objectives.dpo(MODEL, loss if mu is None else objectives.safeguarded(loss, mu=mu))
    (value, _), gradients[mu] = compiled_loss(objective)(NEAR, SAME, FROZEN, batch, KEY)
    np.testing.assert_allclose(value, DPO(NEAR, SAME, FROZEN, batch, KEY)[0][0], rtol=5e-5)  # of errors times beta
  norms = {mu: float(optax.tree.norm(optax.tree.sub(g, gradients[None]))) for mu, g in gradients.items()}
  assert norms[1.0] > norms[0.0] > 0 and norms[None] == 0


def test_dspo_needs_a_reference():
  objective = objectives.dpo(MODEL, objectives.denoised_loss("dspo", beta=0.001), reference_free=True)
  with pytest.raises(ValueError, match="dspo compares with the reference"):
    objective.loss(NEAR, {}, FROZEN, decided(6), KEY)


def test_unknown_pair_loss_is_named():
  with pytest.raises(ValueError, match="loss.name='sigmod'.*sigmoid, robust, ipo, hinge"):
    objectives.pair_loss("sigmod", beta=1.0)


def test_named_keys_differ():
  keys = [objectives.named_key(KEY, n) for n in ("t", "noise", "posterior", "reference")]
  assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == 4


# ---------------------------------------------------------------------------------------------
# Denoising and the divergence of the reference


def test_denoise_is_the_mean_squared_error():
  batch = pair_batch(5)
  images = {"pixels": batch["pixels_0"], "input_ids": batch["input_ids"]}
  (loss, count, found), calls = recorded(objectives.denoise, SAME, {}, FROZEN, images, KEY)
  x, t, _, pred = calls[0]
  alpha, sigma = (np.sqrt(v)[t, None, None, None] for v in (ABARS, 1 - ABARS))
  noise = (x - alpha * latents_np(batch["pixels_0"])) / sigma
  errors = np.mean((pred - noise) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(loss, errors.sum(), rtol=1e-3)
  assert count == 5
  bins = np.bincount(t // 100, minlength=10)
  np.testing.assert_array_equal(found["loss_bin"][1], bins)
  # A text encoder that is trained, too.
  params = SAME | {"text_encoder": FROZEN["text_encoder"]}
  frozen = {k: v for k, v in FROZEN.items() if k not in params}
  (again, _), grads = compiled_loss(objectives.denoise(MODEL))(params, {}, frozen, images, KEY)
  np.testing.assert_allclose(again, loss, rtol=1e-5)
  used = np.unique(images["input_ids"])
  moved = np.abs(grads["text_encoder"]["embedding"]).max(axis=1) > 0
  assert moved[used].all() and moved.sum() == len(used)


DIVERGENCE = jax.jit(objectives.dpo(MODEL, SIGMOID).divergence)


def test_divergence_is_zero_at_the_start_and_grows_with_damage():
  batch = pair_batch(12)
  assert abs(float(DIVERGENCE(SAME, FROZEN, batch, KEY))) < 1e-6
  found = []
  for scale in (2.0, 5.0):
    damaged = jax.tree.map(lambda k, s=scale: s * k, SAME)
    found.append(float(DIVERGENCE(damaged, FROZEN, batch, KEY)))
  assert 0 < found[0] < found[1]


def test_ties_have_no_preferred_image():
  """Nor has a batch of images that nobody likes; D of none is no number, which closes the gate."""
  batch = pair_batch(6)
  tied = np.array([True, False] * 3)
  with_ties = batch | {"label_0": np.where(tied, 0.5, batch["label_0"]).astype(np.float32)}
  changed = {k: v.copy() for k, v in with_ties.items()}
  for k in ("pixels_0", "pixels_1"):
    changed[k][tied] = 0
  one, other = (float(DIVERGENCE(OTHER, FROZEN, b, KEY)) for b in (with_ties, changed))
  assert one == other not in (0, float(DIVERGENCE(OTHER, FROZEN, batch, KEY)))
  assert np.isnan(DIVERGENCE(OTHER, FROZEN, batch | {"label_0": np.full(6, 0.5, np.float32)}, KEY))
  of_images = jax.jit(objectives.kto(MODEL, beta=10.0).divergence)
  batch = image_batch(6) | {"label": np.float32([0, 1, 0, 1, 0, 0])}
  changed = batch["pixels"].copy()
  changed[batch["label"] == 0] = 0
  assert of_images(OTHER, FROZEN, batch, KEY) == of_images(OTHER, FROZEN, batch | {"pixels": changed}, KEY)
  assert np.isnan(of_images(OTHER, FROZEN, batch | {"label": np.zeros(6, np.float32)}, KEY))


def test_the_margin_of_ipo_is_that_of_errors_or_of_log_ratios():
  reward, zero, weight = jnp.linspace(0.0, 0.1, 11), jnp.zeros(11), jnp.ones(11)
  of_ratios = objectives.pair_loss("ipo", beta=10.0)(reward, zero, None)
  np.testing.assert_allclose(of_ratios, np.square(reward - 0.05), rtol=1e-5, atol=1e-9)
  pair = objectives.DenoisedPair(*[None] * 8, reward_w=reward, reward_l=zero, weight=weight)
  of_errors = objectives.denoised_loss("ipo", beta=10.0)(pair)
  np.testing.assert_allclose(of_errors, np.square(2 * reward - 0.05), rtol=1e-5, atol=1e-9)


def test_overshoot_is_clipped_after_the_resize():
  """As the published scorer does it; before it, edges would be other ones."""
  seen = []

  class Scorer:
    config = StepAwareCLIPConfig.from_dict(
      {"vision_config": {"image_size": 4, "patch_size": 2}, "text_config": {}, "projection_dim": 8}
    )

    def apply(self, variables, *args, method):
      seen.append(args[0])
      return args[0]

  images = jnp.asarray(2.0 * draw(0, 2, 8, 8, 3))
  objectives.score_images(Scorer(), {}, images, jnp.zeros(2, jnp.int32), None)
  np.testing.assert_array_equal(seen[0], preprocess(images, 4))
  assert np.abs(seen[0] - preprocess(jnp.clip(images, -1, 1), 4)).max() > 0.1


def test_divergence_looks_at_few_preferred_images_only():
  batch = pair_batch(12)
  first = batch["label_0"] >= 0.5
  changed = {k: v.copy() for k, v in batch.items()}
  changed["pixels_1"][first] = 0
  changed["pixels_0"][~first] = 0
  for k in ("pixels_0", "pixels_1"):
    changed[k][8:] = 0  # beyond max_samples
  one, other = (float(DIVERGENCE(OTHER, FROZEN, b, KEY)) for b in (batch, changed))
  assert one == other != 0


# ---------------------------------------------------------------------------------------------
# SPO's transitions

SPO = objectives.pair_loss("sigmoid", beta=10.0)
OPTIONS = {"eta": 1.0, "guidance_scale": 5.0, "ratio_clip": 0.1}


def transitions(count, *, shared, seed=20):
  """Transitions near the policy's own mean, so that no ratio is clipped."""
  t = np.resize(np.int32([951, 501, 51, 1]), count)
  prev_t = np.resize(np.int32([901, 451, 1, 0]), count)
  x_w = draw(seed, count, *LATENT)
  x_l = x_w if shared else draw(seed + 1, count, *LATENT)
  cond = {"encoder_hidden_states": jnp.asarray(draw(3, 2, 5, 8))}
  prompt = np.resize(np.int32([0, 1, 1]), count)
  uncond = MODEL.encode_empty(FROZEN, 1)
  predict = objectives.guided(functools.partial(MODEL.predict, FROZEN), uncond, 5.0)
  rows = jax.tree.map(lambda c: c[prompt], cond)
  ends = []
  for side, x in enumerate((x_w, x_l)):
    mean, std = diffusion.ddim_mean_std(
      SCHEDULE, predict(jnp.asarray(x), jnp.asarray(t), rows), x, t, prev_t, eta=1.0
    )
    ends.append(mean + std[:, None, None, None] * draw(seed + 2 + side, count, *LATENT))
  valid = jnp.ones(count, bool)
  steps = rollout.Transitions(
    *map(jnp.asarray, (x_w, x_l, *ends, t, prev_t)), valid
  )
  return (steps, jnp.asarray(prompt), jnp.ones(count)), cond, uncond


def nothing():
  (steps, prompt, mask), _, _ = transitions(2, shared=False)
  return jax.tree.map(lambda v: v[:0], (steps, prompt, mask))


@jax.jit
def spo(params, ref_params, shared, separate, cond, uncond):
  def total(params):
    loss, count, found = objectives.transition_loss(
      MODEL, SPO, {**FROZEN, **params}, {**FROZEN, **ref_params}, shared, separate, cond, uncond,
      **OPTIONS,
    )
    return loss, (count, found)

  return jax.value_and_grad(total, has_aux=True)(params)


def with_mask(part, mask):
  return (*part[:2], jnp.asarray(mask, jnp.float32))


SMALL = jax.tree.map(lambda a, b: a + 2e-4 * b, SAME, OTHER)


def test_transition_loss_is_undecided_where_policy_and_reference_agree():
  shared, cond, uncond = transitions(6, shared=True)
  separate, _, _ = transitions(4, shared=False, seed=30)
  (loss, (count, found)), grads = spo(SAME, SAME, shared, separate, cond, uncond)
  assert count == 10
  np.testing.assert_allclose(loss / count, math.log(2), atol=1e-4)
  assert abs(float(found["margin"][0])) < 1e-3
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


def test_a_shared_start_equals_two_separate_ones():
  """One pass for winner and loser gives the loss and gradient of two."""
  shared, cond, uncond = transitions(6, shared=True, seed=22)
  (one, (count, found)), grads = spo(SMALL, SAME, shared, nothing(), cond, uncond)
  (two, (count_2, found_2)), grads_2 = spo(SMALL, SAME, nothing(), shared, cond, uncond)
  assert count == count_2 == 6
  one_by_one = [spo(SMALL, SAME, with_mask(shared, row), nothing(), cond, uncond)[0][1][1] for row in np.eye(6)]
  decisions.above([found["margin"][0] for found in one_by_one], margin=1e-5)
  assert found["implicit_accuracy"] == found_2["implicit_accuracy"]
  np.testing.assert_allclose(one, two, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()),
    grads, grads_2,
  )


def test_transition_loss_equals_numpy():
  shared, cond, uncond = transitions(6, shared=True)
  separate, _, _ = transitions(4, shared=False, seed=30)
  mask, mask_2 = [1, 0, 1, 1, 1, 0], [1, 1, 0, 1]
  far = NEAR  # some ratios are clipped here
  (loss, (count, _)), _ = spo(
    far, SAME, with_mask(shared, mask), with_mask(separate, mask_2), cond, uncond
  )

  def log_prob(params, x, after, t, prev_t, text):
    w = jax.tree.map(np.float64, params["unet"])

    def predict(text):
      h = x.ravel() @ w["inner"]["kernel"] + text.mean(0) @ w["text"]["kernel"] + t / 1000
      return (np.tanh(h) @ w["outer"]["kernel"]).reshape(LATENT)

    empty = np.float64(uncond["encoder_hidden_states"][0])
    eps = predict(empty) + 5.0 * (predict(text) - predict(empty))
    a, b = ABARS[t], ABARS[prev_t]
    std = math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    mean = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    mean += math.sqrt(1 - b - std**2) * eps
    z = (after - mean) / std
    return np.mean(-0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi))

  expected, clipped = 0.0, 0
  for (steps, prompt, _), keep in ((shared, mask), (separate, mask_2)):
    s = jax.tree.map(np.asarray, steps)
    for i in range(len(keep)):
      text = np.float64(cond["encoder_hidden_states"][prompt[i]])
      rewards = []
      for x, after in ((s.x_w[i], s.next_w[i]), (s.x_l[i], s.next_l[i])):
        where = (np.float64(x), np.float64(after), s.t[i], s.prev_t[i], text)
        ratio = math.exp(log_prob(far, *where) - log_prob(SAME, *where))
        clipped += not 0.9 < ratio < 1.1
        rewards.append(math.log(min(max(ratio, 0.9), 1.1)))
      expected += keep[i] * -log_sigmoid(10.0 * (rewards[0] - rewards[1]))
  assert 0 < clipped < 20, "the case tests one branch of the clip only"
  assert count == 7
  np.testing.assert_allclose(loss, expected, rtol=2e-3)


def test_transition_gradient_equals_finite_differences():
  shared, cond, uncond = transitions(6, shared=True)
  separate, _, _ = transitions(3, shared=False, seed=30)
  # Of t = 951, 501 and 51: near the last step a ratio moves too fast for a difference.
  shared = with_mask(shared, [1, 1, 0, 0, 1, 1])
  (_, _), grads = spo(SMALL, SAME, shared, separate, cond, uncond)
  norm = math.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
  h = 2e-4
  up, down = (
    spo(jax.tree.map(lambda p, g, s=s: p + s * h * g / norm, SMALL, grads),
        SAME, shared, separate, cond, uncond)[0][0]
    for s in (1, -1)
  )
  np.testing.assert_allclose((up - down) / (2 * h), norm, rtol=2e-2)


def test_masked_transitions_weigh_nothing():
  shared, cond, uncond = transitions(6, shared=True)
  separate, _, _ = transitions(4, shared=False, seed=30)
  masks = [1, 1, 0, 1, 0, 1], [0, 1, 1, 0]
  one = spo(NEAR, SAME, *map(with_mask, (shared, separate), masks), cond, uncond)
  wild = []
  for (steps, prompt, _), mask in zip((shared, separate), masks, strict=True):
    off = jnp.asarray(mask)[:, None, None, None] == 0
    steps = steps._replace(next_w=jnp.where(off, 50.0, steps.next_w))
    wild.append((steps, prompt, jnp.asarray(mask, jnp.float32)))
  other = spo(NEAR, SAME, *wild, cond, uncond)
  assert one[0][0] == other[0][0] and one[0][1][0] == 6
  jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def test_a_step_makes_winners_likelier_than_losers():
  shared, cond, uncond = transitions(6, shared=True)
  (start, _), grads = spo(SAME, SAME, shared, nothing(), cond, uncond)
  params = jax.tree.map(lambda p, g: p - 1e-5 * g, SAME, grads)
  (loss, (_, found)), _ = spo(params, SAME, shared, nothing(), cond, uncond)
  assert loss < start
  assert found["margin"][0] > 0


# ---------------------------------------------------------------------------------------------
# The step-aware preference model

SCORER = StubScorer()


def spm_of(model, decode_size=0):
  return objectives.spm(model, SCORER, guidance_scale=5.0, decode_size=decode_size)


@jax.jit
def spm_loss(params, batch):
  def total(params):
    loss, count, found = spm_of(MODEL).loss({"spm": params}, {}, FROZEN, batch, KEY)
    return loss, (count, found)

  return jax.value_and_grad(total, has_aux=True)(params)


@pytest.mark.parametrize("decode_size", [0, 4])
def test_spm_equals_numpy(decode_size):
  """Two-way cross-entropy of the scores of guided predictions, with a weight for each pair."""
  size, of = 7, functools.partial(spm_of, decode_size=decode_size)
  batch, key = pair_batch(size), jax.random.key(10)  # no pair is decided by rounding
  (loss, count, found), (call,) = recorded(of, FROZEN, {}, FROZEN, batch, key)
  # One guided prediction: unconditional rows, then those with a prompt.
  x, t, _, pred = (v.reshape(2, 2 * size, *v.shape[1:]) for v in call)
  np.testing.assert_array_equal(t[0, :size], t[0, size:])
  eps = pred[0] + 5.0 * (pred[1] - pred[0])
  alpha, sigma = (np.sqrt(v)[t[0], None, None, None] for v in (ABARS, 1 - ABARS))
  x0 = (x[0] - sigma * eps) / alpha
  images = np.clip(np.asarray(MODEL.decode(FROZEN, jnp.float32(x0), size=decode_size)), -1, 1)
  noise = x[0] - alpha * latents_np(np.concatenate([batch["pixels_0"], batch["pixels_1"]]))
  np.testing.assert_allclose(noise[:size], noise[size:], atol=1e-5)

  spm = jax.tree.map(np.asarray, FROZEN["spm"])
  pixels = np.asarray(preprocess(jnp.asarray(images), 8)).reshape(2 * size, -1)
  embeds = np.sin(pixels @ spm["image"] + t[0][:, None] / 500.0 * spm["time"])
  text = spm["text"][batch["input_ids"]].mean(1)
  score_0, score_1 = np.split(3.0 * np.sum(embeds * np.concatenate([text, text]), axis=1), 2)
  z, label = score_0 - score_1, batch["label_0"]
  values = -label * log_sigmoid(z) - (1 - label) * log_sigmoid(-z)
  values[label == 0.5] -= math.log(2)
  weights = 1 / batch["num_example_per_prompt"]
  np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)
  np.testing.assert_allclose(loss, (values * weights).sum(), rtol=5e-3)
  chosen = np.linspace(0.1, 2.0, size).astype(np.float32)  # what a selection of pairs says instead
  (loss, count, _), _ = recorded(of, FROZEN, {}, FROZEN, batch | {"weight": chosen}, key)
  np.testing.assert_allclose(count, chosen.sum(), rtol=1e-6)
  np.testing.assert_allclose(loss, (values * chosen).sum(), rtol=5e-3)
  decided = label != 0.5
  right = (decisions.above(z[decided], margin=0.05) == (label[decided] > 0.5)) * weights[decided]
  np.testing.assert_allclose(
    found["accuracy"][0] / found["accuracy"][1], right.sum() / weights[decided].sum(), rtol=1e-5
  )


def test_an_ordinary_preference_model_sees_the_images_alone_at_time_0():
  """What the VAE gives back of them; the denoiser is not called."""
  batch = pair_batch(7) | {"label_0": np.float32([1, 0, 1, 0, 1, 0, 1])}
  ordinary = lambda model: objectives.spm(model, StubScorer(), guidance_scale=5.0, step_aware=False)
  (loss, count, found), calls = recorded(ordinary, FROZEN, {}, FROZEN, batch, KEY)
  assert not calls
  spm = jax.tree.map(np.asarray, FROZEN["spm"])
  latents = latents_np(np.concatenate([batch["pixels_0"], batch["pixels_1"]]))
  images = np.clip(np.asarray(MODEL.decode(FROZEN, jnp.float32(latents))), -1, 1)
  embeds = np.sin(np.asarray(preprocess(jnp.asarray(images), 8)).reshape(14, -1) @ spm["image"])
  text = spm["text"][batch["input_ids"]].mean(1)
  score_0, score_1 = np.split(3.0 * np.sum(embeds * np.concatenate([text, text]), axis=1), 2)
  z = np.where(batch["label_0"] == 1, score_0 - score_1, score_1 - score_0)
  np.testing.assert_allclose(loss, (-log_sigmoid(z) / batch["num_example_per_prompt"]).sum(), rtol=1e-4)
  assert found["accuracy_bin"][1][0] == pytest.approx(count)  # all in the first bin of time


def test_spm_of_equal_images():
  """Equal scores: nothing to pay for a tie, log 2 for a preference."""
  batch = pair_batch(3)
  batch["pixels_1"] = batch["pixels_0"]
  batch["num_example_per_prompt"][:] = 1
  for label, expected in ((0.5, 0.0), (1.0, math.log(2)), (0.0, math.log(2))):
    batch["label_0"][:] = label
    (loss, (count, _)), _ = spm_loss(FROZEN["spm"], batch)
    np.testing.assert_allclose(loss / count, expected, atol=1e-6)


def test_spm_example_weights_scale_gradients_and_ties_pull_scores_together():
  batch = pair_batch(3)
  batch["label_0"][:] = 0.5
  params, grads = FROZEN["spm"], []
  for examples in (4, 1):
    # A new array: JAX may still read the old one.
    batch = {**batch, "num_example_per_prompt": np.full_like(batch["num_example_per_prompt"], examples)}
    grads.append(spm_loss(params, batch)[1])
  for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
    np.testing.assert_allclose(4 * a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
  losses = []
  for _ in range(10):
    (loss, _), step = spm_loss(params, batch)
    losses.append(float(loss))
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, step)
  assert 0 <= losses[-1] < 0.9 * losses[0]


def test_prompts_of_two_tokenizers_are_read_by_the_first():
  ids = np.arange(10, dtype=np.int32).reshape(1, 10)
  both, first = (
    objectives.embed_prompts(SCORER, FROZEN["spm"], jnp.asarray(i)) for i in (ids, ids[:, :5])
  )
  np.testing.assert_array_equal(both, first)


# ---------------------------------------------------------------------------------------------
# What SDXL is conditioned on: the size and crop of each image


class SizedModel(StubModel):
  """Conditioned on sizes as SDXL is; keeps what every call of the network and of the text encoder is given."""

  def __init__(self):
    super().__init__()
    object.__setattr__(self, "calls", [])
    object.__setattr__(self, "encoded", [])

  def predict(self, weights, x, t, cond):
    time_ids = cond["added_cond_kwargs"]["time_ids"]
    shift = jnp.sin(time_ids @ jnp.asarray([0.03, 0.05, 0.4, 0.7, 0.02, 0.01]))
    out = super().predict(weights, x, t, cond) + 0.1 * shift[:, None, None, None] * x
    self.calls.append((x, t, time_ids, out))
    return out

  def encode_text(self, weights, input_ids, time_ids=None):
    assert time_ids is None, "time_ids are put beside the encoded text, which is encoded once"
    self.encoded.append(input_ids.shape[0])
    cond = super().encode_text(weights, input_ids)
    size = float(self.image_size)
    own = jnp.broadcast_to(jnp.asarray([[size, size, 0.0, 0.0, size, size]]), (input_ids.shape[0], 6))
    return {**cond, "added_cond_kwargs": {"time_ids": own}}


def sized(build, *args):
  """Result of `build(model)(*args)`, the network's calls, and the rows of each call of the text encoder."""
  encoded = []

  @jax.jit
  def run(*args):
    model = SizedModel()
    out = build(model)(*args), model.calls
    encoded[:] = model.encoded
    return out

  return *jax.tree.map(np.asarray, run(*args)), encoded


def sizes(rows, seed=0):
  """time_ids f32[rows, 6] as of images of many shapes."""
  rng = np.random.default_rng(seed)
  height, width = rng.integers(8, 64, (2, rows))
  shorter = np.minimum(height, width)
  crop = [(n - shorter) * 4 // shorter for n in (height, width)]
  return np.stack([height, width, *crop, *np.full((2, rows), 8)], axis=1).astype(np.float32)


def sized_batch(rows, seed=10):
  return pair_batch(rows, seed) | {"time_ids_0": sizes(rows, 1), "time_ids_1": sizes(rows, 2)}


def dpo_of(model):
  return objectives.dpo(model, SIGMOID).loss


SQUARE = np.float32([8, 8, 0, 0, 8, 8])


def test_winner_and_loser_are_conditioned_on_their_own_sizes():
  batch = sized_batch(9)
  (loss, _, _), calls, encoded = sized(dpo_of, NEAR, SAME, FROZEN, batch, KEY)
  assert encoded == [9]  # one row a prompt, once
  lost = batch["label_0"] == 0
  winners, losers = (batch[k].copy() for k in ("time_ids_0", "time_ids_1"))
  winners[lost], losers[lost] = batch["time_ids_1"][lost], batch["time_ids_0"][lost]
  assert not np.array_equal(winners, losers)
  for _, _, time_ids, _ in calls:  # policy and reference
    np.testing.assert_array_equal(time_ids, np.concatenate([winners, losers]))
  swapped = {k[:-1] + "10"[int(k[-1])]: v for k, v in batch.items() if k.startswith(("pixels", "time_ids"))}
  swapped = batch | swapped | {"label_0": 1 - batch["label_0"]}
  (same, _, _), _, _ = sized(dpo_of, NEAR, SAME, FROZEN, swapped, KEY)
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  other = batch | {"time_ids_0": batch["time_ids_1"], "time_ids_1": batch["time_ids_0"]}
  (other, _, _), _, _ = sized(dpo_of, NEAR, SAME, FROZEN, other, KEY)
  assert abs(other - loss) > 1e-3 * loss


def test_without_sizes_the_model_keeps_its_own():
  batch = sized_batch(6) | {k: np.tile(SQUARE, (6, 1)) for k in ("time_ids_0", "time_ids_1")}
  bare = {k: v for k, v in batch.items() if not k.startswith("time_ids")}
  for build in (dpo_of, lambda m: objectives.spm(m, SCORER, guidance_scale=5.0).loss):
    with_sizes, without = (sized(build, FROZEN, FROZEN, FROZEN, b, KEY) for b in (batch, bare))
    for a, b in zip(with_sizes[1], without[1], strict=True):
      np.testing.assert_array_equal(a[2], b[2])
      np.testing.assert_array_equal(b[2], np.tile(SQUARE, (len(b[2]), 1)))
    np.testing.assert_allclose(with_sizes[0][0], without[0][0], rtol=1e-6)


def test_denoising_is_conditioned_on_each_image():
  batch = pair_batch(5)
  images = {"pixels": batch["pixels_0"], "input_ids": batch["input_ids"], "time_ids": sizes(5)}
  (loss, _, _), ((x, t, time_ids, pred),), encoded = sized(
    lambda m: objectives.denoise(m).loss, SAME, {}, FROZEN, images, KEY
  )
  assert encoded == [5]
  np.testing.assert_array_equal(time_ids, images["time_ids"])
  alpha, sigma = (np.sqrt(v)[t, None, None, None] for v in (ABARS, 1 - ABARS))
  noise = (x - alpha * latents_np(images["pixels"])) / sigma
  np.testing.assert_allclose(loss, np.mean((pred - noise) ** 2, axis=(1, 2, 3)).sum(), rtol=1e-3)
  del images["time_ids"]
  _, ((_, _, time_ids, _),), _ = sized(lambda m: objectives.denoise(m).loss, SAME, {}, FROZEN, images, KEY)
  np.testing.assert_array_equal(time_ids, np.tile(SQUARE, (5, 1)))


def test_the_divergence_is_conditioned_on_the_preferred_images():
  batch = sized_batch(12)
  _, calls, encoded = sized(lambda m: objectives.dpo(m, SIGMOID).divergence, OTHER, FROZEN, batch, KEY)
  assert encoded == [8]
  first = batch["label_0"][:, None] >= 0.5
  preferred = np.where(first, batch["time_ids_0"], batch["time_ids_1"])[:8]
  for call in calls:
    np.testing.assert_array_equal(call[2], preferred)
  # SPO's samples are the model's own.
  batch = {"latents": draw(0, 4, *LATENT), "input_ids": batch["input_ids"][:4]}
  _, calls, _ = sized(
    lambda m: objectives.denoising_divergence(m, lambda frozen, batch, key: batch["latents"]),
    OTHER, FROZEN, batch, KEY,
  )
  for call in calls:
    np.testing.assert_array_equal(call[2], np.tile(SQUARE, (4, 1)))


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0, 0.0])
def test_the_preference_model_sees_predictions_at_each_images_size(guidance_scale):
  """Guidance starts from the unconditional prediction at the same size, as in diffusers' pipeline."""
  batch = sized_batch(7)
  _, (call,), encoded = sized(
    lambda m: objectives.spm(m, SCORER, guidance_scale=guidance_scale).loss, FROZEN, {}, FROZEN, batch, KEY
  )
  assert encoded == [7, 1]  # the prompts, and the empty one
  rows = np.concatenate([batch["time_ids_0"], batch["time_ids_1"]])
  np.testing.assert_array_equal(call[2], rows if guidance_scale <= 1.0 else np.concatenate([rows, rows]))


def test_a_model_without_size_conditioning_is_not_changed_by_sizes():
  """Stable Diffusion 1.x: bit for bit."""
  batch = sized_batch(9)
  bare = {k: v for k, v in batch.items() if not k.startswith("time_ids")}
  equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  equal(*(DPO(NEAR, SAME, FROZEN, b, KEY) for b in (batch, bare)))
  equal(*(DIVERGENCE(OTHER, FROZEN, b, KEY) for b in (batch, bare)))
  equal(*(spm_loss(FROZEN["spm"], b) for b in (batch, bare)))
  images = {"pixels": batch["pixels_0"], "input_ids": batch["input_ids"]}
  denoise = compiled_loss(objectives.denoise(MODEL))
  equal(*(denoise(SAME, {}, FROZEN, b, KEY) for b in (images | {"time_ids": batch["time_ids_0"]}, images)))


class PooledImages(TextToImage):
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
    "time_ids_0": np.stack([wide, tall]),
    "time_ids_1": np.stack([tall, wide / 2]),
  }
  run = jax.jit(lambda *args: objectives.dpo(model, SIGMOID).loss(*args)[0])
  loss = float(run(params, ref_params, frozen, batch, KEY))

  @jax.jit
  def error(unet, x_t, t, ids, time_ids, target):
    cond = model.encode_text(frozen, ids, time_ids)
    return jnp.mean((model.predict({**frozen, **unet}, x_t, t, cond) - target) ** 2)

  winners = np.stack([pixels[0, 0], pixels[1, 1]]), np.stack([wide, wide / 2])
  losers = np.stack([pixels[1, 0], pixels[0, 1]]), np.stack([tall, tall])
  x0 = model.encode_images(frozen, np.concatenate([winners[0], losers[0]]), KEY)
  noise = jax.random.normal(objectives.named_key(KEY, "noise"), (size, *model.latent_shape))
  t = diffusion.sample_timesteps(objectives.named_key(KEY, "t"), size, num_train_timesteps=1000)
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
  other = float(run(params, ref_params, frozen, batch | {"time_ids_0": square, "time_ids_1": square}, KEY))
  assert abs(other - loss) > 1e-3
