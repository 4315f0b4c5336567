"""GRPO and DDPO: each step used once, the first update by hand, and a reward that rises."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref.diffusion import samplers
from jaxpref.models.preference import preprocess
from jaxpref.objectives import policy_gradient
from jaxpref.objectives.base import named_key
from jaxpref.training import optim
from tests import decisions
from tests.stub_model import LATENT, StubModel, StubScorer, stub_reward
from tests.updates import (
  ADAMW,
  FEW,
  FROZEN,
  GROUP,
  PARAMS,
  POLICY,
  SEED,
  STEPS,
  assert_close,
  equal,
  grpo_step,
  sgd,
  state_of,
)


@pytest.fixture
def counting_steps(monkeypatch):
  """Replaces rollout and loss, as `counting` of training/step_test.py.

  Gives run(**options) -> (uses [samples, steps], metrics, updates).
  """
  seen = []

  def loss(model, weights, ref_weights, steps, cond, uncond, **kwargs):
    rows, prompt, mask = steps
    index = rows.x[:, 0, 0, 0].astype(jnp.int32)
    jax.debug.callback(
      lambda *v: seen.append([np.array(x) for x in v]), index, prompt, mask, rows.advantage, ordered=True
    )
    return jnp.sum(mask * weights["unet"]["uses"][index]), jnp.ones(()), {}

  def trajectories(predict, schedule, x, key, *, num_steps, eta):
    number = jnp.arange(len(x) * num_steps, dtype=jnp.float32).reshape(len(x), num_steps)
    latents = jnp.broadcast_to(number[..., None, None, None], (len(x), num_steps, *LATENT))
    t = jnp.arange(num_steps)
    return samplers.Trajectories(jnp.concatenate([latents, x[:, None]], axis=1), t, t, number)

  monkeypatch.setattr(policy_gradient, "policy_loss", loss)
  monkeypatch.setattr(samplers, "trajectories", trajectories)

  def run(**options):
    samples, steps = len(FEW["input_ids"]) * GROUP, POLICY["num_inference_steps"]
    optimizer = sgd(learning_rate=1.0)
    state = state_of({"unet": {"uses": jnp.zeros(samples * steps)}}, optimizer)
    seen.clear()
    state, found = jax.jit(grpo_step(optimizer, **options))(state, FROZEN, FEW)
    jax.effects_barrier()
    return -np.asarray(state.params["unet"]["uses"]).reshape(samples, steps), found, list(seen)

  return run


@pytest.mark.parametrize("minibatch", [7, 1000])
def test_every_step_of_every_sample_is_used_once(counting_steps, minibatch):
  """With the prompt it was drawn for and the advantage of its sample; advantages have mean 0 in every group."""
  uses, found, seen = counting_steps(minibatch=minibatch)
  assert (uses == 1).all()
  assert found["updates"] == len(seen) == math.ceil(uses.size / minibatch)
  filled = [mask.sum() for _, _, mask, _ in seen]
  assert max(filled) - min(filled) <= 1
  advantages = np.full(uses.size, np.nan)
  for index, prompt, mask, advantage in seen:
    np.testing.assert_array_equal(prompt, index // (GROUP * STEPS))
    advantages[index[mask > 0]] = advantage[mask > 0]
  of_samples = advantages.reshape(-1, STEPS)
  np.testing.assert_array_equal(of_samples, np.repeat(of_samples[:, :1], STEPS, axis=1))
  np.testing.assert_allclose(of_samples[:, 0].reshape(-1, GROUP).mean(axis=1), 0.0, atol=1e-5)
  if minibatch == 7:
    assert len(set(seen[0][1])) > 1 and not np.array_equal(seen[0][0], np.sort(seen[0][0]))


def test_a_share_of_the_steps_is_drawn_anew_for_each_sample(counting_steps):
  uses, found, _ = counting_steps(timestep_fraction=0.5, minibatch=8)
  assert set(uses.ravel()) == {0, 1} and (uses.sum(axis=1) == STEPS // 2).all()
  assert len({tuple(row) for row in uses}) > 1 and found["updates"] == 3
  cases = ((20, 0.6), (50, 0.29), (10, 0.99), (3, 0.1))
  assert [policy_gradient.trained_steps(n, f) for n, f in cases] == [12, 14, 10, 1]


def ddim_mean(pred, x, t, prev_t):
  """Mean and std of an ancestral step by the posterior of arXiv 2006.11239, Eq. 6 and 7."""
  abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)
  a, b = abar[t], abar[prev_t]
  alpha = a / b
  x0 = (x - math.sqrt(1 - a) * pred) / math.sqrt(a)
  mean = math.sqrt(b) * (1 - alpha) / (1 - a) * x0 + math.sqrt(alpha) * (1 - b) / (1 - a) * x
  return mean, math.sqrt((1 - b) / (1 - a) * (1 - alpha))


@functools.cache
def drawn_by_hand():
  """Latents [N,T+1,...] of the samples of the first iteration and their rewards [N]; a loop over the steps."""
  x, reward = jax.jit(lambda: _drawn(FROZEN, FEW["input_ids"]))()
  return x, np.asarray(reward)


def _drawn(weights, ids):
  model, scorer, samples = StubModel(), StubScorer(), len(ids) * GROUP
  key = jax.random.fold_in(jax.random.key(SEED), 0)
  xs = [jax.random.normal(named_key(key, "x_T"), (samples, *LATENT))]
  for k, (t, prev_t) in zip(jax.random.split(named_key(key, "rollout"), STEPS), TIMES, strict=True):
    mean, std = ddim_mean(guided_prediction(weights, xs[-1], t, ids), xs[-1], t, prev_t)
    xs.append(mean + std * jax.random.normal(k, xs[-1].shape))
  text = jnp.repeat(scorer.text_embeds(FROZEN["spm"], ids), GROUP, axis=0)
  images = jnp.clip(model.decode(FROZEN, xs[-1]), -1, 1)
  pixels = preprocess(images, 8)
  embeds = scorer.image_embeds(FROZEN["spm"], pixels, jnp.zeros(samples, jnp.int32))
  return jnp.stack(xs, axis=1), scorer.score(FROZEN["spm"], embeds, text)


TIMES = [(751, 501), (501, 251), (251, 1), (1, 0)]


def guided_prediction(weights, x, t, ids):
  model = StubModel()
  cond = jax.tree.map(lambda c: jnp.repeat(c, GROUP, axis=0), model.encode_text(FROZEN, ids))
  t = jnp.full(len(x), t)
  with_text = model.predict(weights, x, t, cond)
  without = model.predict(weights, x, t, model.encode_empty(FROZEN, len(x)))
  return without + 3.0 * (with_text - without)


@pytest.mark.parametrize(
  "options",
  [{}, {"advantage": "batch", "advantage_clip": 0.7}, {"kl_coef": 0.3}],
  ids=lambda o: " ".join(map(str, o)) or "grpo",
)
def test_the_first_update_is_the_policy_gradient(options):
  """-E[A grad log p] by a loop over steps, with advantages by hand; no ratio, no clip. And the KL of two Gaussians."""
  optimizer = sgd(learning_rate=1.0)
  ref = {"unet": jax.tree.map(lambda k: k * 0.97, PARAMS["unet"])}
  start = state_of(PARAMS, optimizer, ref)
  state, found = jax.jit(grpo_step(optimizer, **options))(start, FROZEN, FEW)
  x, reward = drawn_by_hand()
  grouped = reward.reshape(1 if "advantage" in options else -1, reward.size if "advantage" in options else GROUP)
  advantage = (grouped - grouped.mean(axis=1, keepdims=True)) / (grouped.std(axis=1, keepdims=True) + 1e-4)
  bound = options.get("advantage_clip", 5.0)
  assert (np.abs(advantage).max() > bound) == ("advantage_clip" in options)
  advantage = np.clip(advantage.ravel(), -bound, bound)

  def objective(params):
    total = kl = 0.0
    for i, (t, prev_t) in enumerate(TIMES):
      mean, std = ddim_mean(guided_prediction({**FROZEN, **params}, x[:, i], t, FEW["input_ids"]), x[:, i], t, prev_t)
      ref_mean, _ = ddim_mean(guided_prediction({**FROZEN, **ref}, x[:, i], t, FEW["input_ids"]), x[:, i], t, prev_t)
      log_prob = -jnp.mean((x[:, i + 1] - mean) ** 2, axis=(1, 2, 3)) / (2 * std**2)
      total += jnp.mean(-advantage * log_prob) / STEPS
      kl += jnp.mean((mean - ref_mean) ** 2) / (2 * std**2) / STEPS
    return total + options.get("kl_coef", 0.0) * kl, kl

  grad, kl = jax.jit(jax.grad(objective, has_aux=True))(PARAMS)
  moved = jax.tree.map(lambda a, b: a - b, start.params, state.params)
  assert_close(moved, grad, 2e-3)
  assert found["updates"] == 1 and found["clip_fraction"] == 0
  np.testing.assert_allclose(found["ratio"], 1.0, atol=1e-5)
  np.testing.assert_allclose(found["reward"], reward.mean(), rtol=1e-4)
  np.testing.assert_allclose(found["score_gap"], np.ptp(reward.reshape(-1, GROUP), axis=1).mean(), rtol=1e-3)
  np.testing.assert_allclose(found["grad_norm"], optax.tree.norm(grad), rtol=2e-3)
  assert ("kl" in found) == ("kl_coef" in options)
  if "kl" in found:
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-3)


def test_the_ratio_is_1_until_the_policy_changes():
  """The density that the rollout kept is that of the update's own pass, in minibatches of another size."""
  still = sgd(learning_rate=0.0)
  _, found = jax.jit(grpo_step(still, minibatch=5, ratio_clip=1e-5))(state_of(PARAMS, still), FROZEN, FEW)
  assert found["updates"] > 1 and found["clip_fraction"] == 0
  np.testing.assert_allclose(found["ratio"], 1.0, atol=1e-6)


def test_without_a_coefficient_the_reference_is_not_called():
  """With one, a reference of NaN spoils every update, and none is made."""
  start = state_of(PARAMS, ADAMW, jax.tree.map(lambda k: k * jnp.nan, PARAMS))
  state, found = jax.jit(grpo_step(minibatch=20, kl_coef=0.1))(start, FROZEN, FEW)
  assert found["skipped_updates"] == found["updates"] == 3
  assert np.isnan(found["loss"]) and np.isnan(found["grad_norm"])
  assert equal(state.params, start.params) and equal(state.opt_state, start.opt_state)
  calls = {}

  class Counting(StubModel):
    def predict(self, weights, x, t, cond):
      calls[kl_coef].add(id(weights["unet"]["inner"]["kernel"]))
      return super().predict(weights, x, t, cond)

  for kl_coef in (0.0, 0.1):
    calls[kl_coef] = set()
    loss = jax.make_jaxpr(lambda p, ref, *rest, kl_coef=kl_coef: policy_gradient.policy_loss(
      Counting(), {**FROZEN, **p}, {**FROZEN, **ref}, *rest, eta=1.0, guidance_scale=1.0, ratio_clip=0.1,
      kl_coef=kl_coef,
    ))  # fmt: skip
    x, ones = jnp.zeros((2, *LATENT)), jnp.ones(2)
    steps = policy_gradient.Steps(x, x, jnp.array([751, 1]), jnp.array([501, 0]), ones, ones, ones > 0)
    cond = StubModel().encode_text(FROZEN, FEW["input_ids"])
    loss(PARAMS, PARAMS, (steps, jnp.arange(2), ones), cond, cond)
  assert [len(calls[kl_coef]) for kl_coef in (0.0, 0.1)] == [1, 2]


def test_micro_batches_of_steps_make_the_same_updates():
  optimizer = sgd(clip_norm=1.0)
  options = {"minibatch": 10, "kl_coef": 0.1}
  (whole, found), (parts, found_parts) = (
    jax.jit(grpo_step(optimizer, accumulation=n, **options))(state_of(PARAMS, optimizer), FROZEN, FEW) for n in (1, 4)
  )
  assert found["updates"] == 5 and not equal(whole.params, PARAMS)
  assert_close(parts.params, whole.params, 1e-5)
  for key in ("loss", "grad_norm", "ratio", "kl", "updates"):
    np.testing.assert_allclose(found_parts[key], found[key], rtol=1e-3, atol=1e-6, err_msg=key)


def test_the_reference_is_moved_by_the_best_samples_and_seed_and_step_decide_everything():
  seen = []

  def move(objective, state, frozen, batch, key):
    jax.debug.callback(lambda latents: seen.append(np.array(latents)), batch["latents"])
    moved = jax.tree.map(lambda r, p: jnp.where(state.step == 2, p, r), state.ref_params, state.params)
    return moved, state.ref_stats

  run = jax.jit(grpo_step(minibatch=20, kl_coef=0.1, ratio_clip=1e-5, moving=types.SimpleNamespace(move=move)))
  start = state_of(PARAMS, ADAMW)
  state, found = run(start, FROZEN, FEW)
  jax.effects_barrier()
  x, reward = drawn_by_hand()
  best = decisions.argmax(reward.reshape(-1, GROUP), margin=1e-3) + GROUP * np.arange(len(FEW["input_ids"]))
  np.testing.assert_allclose(seen[0], x[best, -1], rtol=1e-3, atol=1e-3)
  assert equal(state.ref_params, start.ref_params) and not equal(state.params, start.params)
  assert found["optimizer_updates"] == found["updates"] == 3 and "divergence" in found
  assert 0.3 < found["clip_fraction"] <= 2 / 3  # no step of the first update, most of the two others
  again, found_again = run(start, FROZEN, FEW)
  assert equal(again, state)
  jax.tree.map(np.testing.assert_array_equal, found, found_again)
  second, later = run(state, FROZEN, FEW)
  assert equal(second.ref_params, second.params) and later["reward"] != found["reward"]
  resumed, _ = run(jax.tree.map(jnp.asarray, jax.device_get(state)), FROZEN, FEW)
  assert equal(resumed, second)


class Brightness(StubScorer):
  """A reward as smooth as can be."""

  def image_embeds(self, params, pixels, t):
    return jnp.mean(pixels, axis=(1, 2))

  def score(self, params, image_embeds, text_embeds):
    return 10.0 * jnp.mean(image_embeds, axis=1)


@pytest.mark.parametrize("options", [{}, {"advantage": "batch"}], ids=["grpo", "ddpo"])
def test_the_reward_rises(options):
  """Also of samples from noise that no iteration has seen. Many samples: a policy gradient is mostly noise."""
  optimizer = optim.make_optimizer(
    "adamw", optax.constant_schedule(1e-2), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0
  )
  many = {"group_size": 512, "minibatch": 4096}
  run = jax.jit(grpo_step(optimizer, reward=stub_reward(Brightness()), **many | options))

  def unseen(params):
    state = dataclasses.replace(state_of(params, optimizer), step=jnp.int32(1000))
    return float(run(state, FROZEN, FEW)[1]["reward"])

  state, rewards = state_of(PARAMS, optimizer), []
  for _ in range(10):
    state, found = run(state, FROZEN, FEW)
    rewards.append(float(found["reward"]))
  assert found["updates"] == 2
  assert rewards[-1] > rewards[0] + 1.0 and unseen(state.params) > unseen(PARAMS) + 1.0, rewards
