"""LPO's rollout, SPO on noisy latents, against a step-by-step numpy rollout; and what it does not compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion
from jaxpref.objectives import lpo, policy_gradient, pools, spo
from jaxpref.objectives.base import Weights
from jaxpref.rewards.base import Scores
from jaxpref.training import step
from tests import decisions
from tests.diffusion.ddim_trajectories_test import SCHEDULE, SHAPE, ddim_np, draw, normal, predict_np, timesteps
from tests.objectives.spo_rollout_test import PROMPTS, Stub, score_np
from tests.stub_model import StubModel, init, latent_params, latent_reward, pair_batch, stub_reward
from tests.updates import ADAMW, OPTIONS, POLICY, SEED, SPO_LOSS, equal, state_of

PROCESS = diffusion.VariancePreserving(SCHEDULE)
# Published, and groups of several steps after a warm-up.
LPO = {"num_steps": 20, "warmup_steps": 0, "pool_size": 4, "inner_steps": 0, "threshold": 0.35, "threshold_max": 0.5}
INNER = {"num_steps": 8, "warmup_steps": 2, "pool_size": 3, "inner_steps": 2, "threshold": 0.87}
WINNER = INNER | {"next_latent": "winner", "score_time": "start"}
CASES = {"lpo": LPO, "inner": INNER, "start": WINNER}


@functools.cache
def run(case):
  stub = Stub()
  x, key = jnp.asarray(draw(1, PROMPTS, *SHAPE)), jax.random.key(0)
  go = jax.jit(lambda x, key: lpo.latent_rollout(stub.predict, stub.score, PROCESS, x, key, eta=1.0, **CASES[case]))
  result = jax.tree.map(np.asarray, go(x, key))
  jax.effects_barrier()
  return result, (stub.calls, stub.scored)


# What the released code has for 20 steps (its compare_funcs.py), from the last step to the first.
TABLE = (
  0.0206, 0.0406, 0.1673, 0.2144, 0.2509, 0.2836, 0.3144, 0.3442, 0.3732, 0.4016, 0.4293, 0.4565, 0.4829, 0.5087,
  0.5336, 0.5576, 0.5807, 0.6029, 0.6241, 0.6444,
)  # fmt: skip


def test_thresholds_are_those_of_the_released_table():
  table = np.float64(TABLE[::-1])
  expected = 0.35 + (table - table[-1]) / (table[0] - table[-1]) * 0.15
  options = {"eta": 1.0, "threshold": 0.35, "threshold_max": 0.5}
  np.testing.assert_allclose(pools.step_thresholds(PROCESS, 20, **options), expected, atol=5e-5)
  fewer = np.asarray(pools.step_thresholds(PROCESS, 7, **options))  # for which it has none
  assert fewer[0] == pytest.approx(0.5) and fewer[-1] == pytest.approx(0.35) and (np.diff(fewer) < 0).all()


@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_one_call_and_a_candidate_none(case):
  result, (calls, scored) = run(case)
  c = CASES[case]
  groups = (c["num_steps"] - c["warmup_steps"]) // (c["inner_steps"] + 1)
  inner = groups * c["inner_steps"]
  sizes = sorted(len(t) for t in calls)
  assert sizes == [PROMPTS] * (c["num_steps"] - inner) + [PROMPTS * c["pool_size"]] * inner
  count = {k: c[k] for k in ("num_steps", "warmup_steps", "pool_size", "inner_steps")}
  assert sum(sizes) == PROMPTS * lpo.latent_calls(**count)
  if case == "lpo":
    assert lpo.latent_calls(**count) == 20
  t, prev_t = timesteps(c["num_steps"])
  last = range(c["warmup_steps"] + c["inner_steps"], c["num_steps"], c["inner_steps"] + 1)
  expected = [(t if case == "start" else prev_t)[i] for i in last]
  assert result.score_t.tolist() == expected and len(expected) == groups
  assert sorted((int(s[0]) for s in scored), reverse=True) == expected
  assert all(len(s) == PROMPTS * c["pool_size"] for s in scored)


@pytest.mark.parametrize("case", CASES)
def test_equals_a_rollout_without_scans(case):
  """Python loops in float64: transitions, scores of the latents themselves, pairs and the final latents."""
  result, _ = run(case)
  c, k = CASES[case], CASES[case]["pool_size"]
  t, prev_t = timesteps(c["num_steps"])
  x, length, later = np.float64(draw(1, PROMPTS, *SHAPE)), c["inner_steps"] + 1, 0
  key_warmup, key_groups = jax.random.split(jax.random.key(0))
  for i, key in zip(range(c["warmup_steps"]), jax.random.split(key_warmup, max(1, c["warmup_steps"])), strict=False):
    mean, std, _ = ddim_np(x, predict_np(x, t[i]), t[i], prev_t[i])
    x = mean + std * normal(key, x.shape)
  starts = range(c["warmup_steps"], c["num_steps"], length)
  limits = [c["threshold"]] * len(starts)
  if "threshold_max" in c:
    found = pools.step_thresholds(PROCESS, 20, eta=1.0, threshold=c["threshold"], threshold_max=c["threshold_max"])
    limits = np.asarray(found)[list(starts)]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
  rows, decided = np.arange(PROMPTS), []
  for g, (first, key) in enumerate(zip(starts, jax.random.split(key_groups, len(starts)), strict=True)):
    key_draw, key_walk, key_member = jax.random.split(key, 3)
    keys, path = [key_draw, *jax.random.split(key_walk, max(1, length - 1))], [np.repeat(x, k, axis=0)]
    for n, i in enumerate(range(first, first + length)):
      mean, std, _ = ddim_np(path[-1], predict_np(path[-1], t[i]), t[i], prev_t[i])
      path.append(mean + std * normal(keys[n], path[-1].shape))
    end = first + length - 1
    scores = score_np(path[-1], t[end] if case == "start" else prev_t[end]).reshape(PROMPTS, k)
    close(result.scores.total[:, g], scores)
    best, worst = (decisions.argmax(s, margin=1e-3) for s in (scores, -scores))
    paths = np.stack(path).reshape(len(path), PROMPTS, k, *SHAPE)
    for side, index in (("w", best), ("l", worst)):
      of_side = paths[:, rows, index]
      close(getattr(result.shared, f"x_{side}")[:, g], of_side[0])
      close(getattr(result.shared, f"next_{side}")[:, g], of_side[1])
      for n in range(1, length):
        close(getattr(result.separate, f"x_{side}")[:, later + n - 1], of_side[n])
        close(getattr(result.separate, f"next_{side}")[:, later + n - 1], of_side[n + 1])
    gap = np.tanh((scores.max(axis=1) - scores.min(axis=1)) / 2)
    decided.append(decisions.above(gap, limits[g], margin=1e-6))
    np.testing.assert_array_equal(result.shared.valid[:, g], decided[-1])
    later += length - 1
    random = np.asarray(jax.random.randint(key_member, (PROMPTS,), 0, k))
    x = paths[-1, rows, best if c.get("next_latent") == "winner" else random]
  close(result.latents, x)
  assert 0 < np.mean(decided) < 1, "the case decides nothing"
  assert result.separate.t.shape[1] == later


def test_a_threshold_that_grows_counts_in_an_ordinary_rollout_too():
  """That of the first step of each group, the last one's included."""
  stub = Stub()
  options = {"num_steps": 6, "eta": 1.0, "warmup_steps": 2, "pool_size": 3, "inner_steps": 1}
  x = jnp.asarray(draw(1, PROMPTS, *SHAPE))
  score = lambda x, t: Scores(stub.score(x, t).total * 0.3, {})

  @jax.jit
  def go(x):
    process, key = PROCESS, jax.random.key(0)
    return spo.pool_rollout(stub.predict, score, process, x, key, threshold=0.05, threshold_max=0.6, **options)

  result = go(x)
  limits = pools.step_thresholds(PROCESS, 6, eta=1.0, threshold=0.05, threshold_max=0.6)[jnp.asarray([2, 4])]
  total = np.asarray(result.scores.total)
  gap = np.tanh((total.max(axis=2) - total.min(axis=2)) / 2)
  valid = decisions.above(gap - np.asarray(limits)[None], margin=1e-6)
  np.testing.assert_array_equal(result.shared.valid, valid)
  assert not np.array_equal(valid, gap > 0.05), "the case decides nothing"


# ---------------------------------------------------------------------------------------------
# Whole iterations


class Blind(StubModel):
  """Without a VAE."""

  def decode(self, weights, latents, *, size=0):
    raise AssertionError("the VAE is called")


FROZEN = init() | {"lrm": latent_params()}
PARAMS = {"unet": FROZEN["unet"]}
BATCH = {"input_ids": pair_batch(4)["input_ids"]}
LATENT_OPTIONS = OPTIONS | {"warmup_steps": 0, "pool_last_step": True, "threshold": 0.05, "threshold_max": 0.1}


def step_of(objective):
  return jax.jit(lambda state: step.make_step(objective, ADAMW, seed=SEED)(state, FROZEN, BATCH))


def test_spo_with_a_latent_reward_decodes_nothing_and_learns():
  run = step_of(spo.SPO(Blind(), latent_reward(), SPO_LOSS, **LATENT_OPTIONS))
  state, found = run(state_of(PARAMS, ADAMW))
  assert found["valid_pairs"] > 0 and found["grad_norm"] > 0 and np.isfinite(found["loss"])
  assert not equal(state.params, PARAMS)


def test_the_pairs_are_those_of_scores_of_latents():
  """What is learnt from is what `latent_rollout` makes with the reward's own scores."""
  objective = spo.SPO(Blind(), latent_reward(), SPO_LOSS, **LATENT_OPTIONS)
  drawn = jax.jit(lambda key: objective.rollout(Weights.of(PARAMS, PARAMS, FROZEN), BATCH, key))(jax.random.key(0))
  pools = drawn.data[0]
  reward = latent_reward()
  prompts = reward.prompts(FROZEN, BATCH)
  for g, time in enumerate(np.asarray(pools.score_t)):
    times = jnp.full(4, int(time), jnp.int32)
    for side, extreme in (("w", jnp.max), ("l", jnp.min)):
      ends = getattr(pools.shared, f"next_{side}")[:, g]
      own = reward.score(FROZEN, None, times, prompts, ends).total
      np.testing.assert_allclose(own, extreme(pools.scores.total[:, g], axis=1), rtol=1e-3, atol=1e-3)


def test_grpo_with_a_latent_reward_decodes_nothing():
  objective = policy_gradient.PolicyGradient(Blind(), latent_reward(), **POLICY)
  state, found = step_of(objective)(state_of(PARAMS, ADAMW))
  assert np.isfinite(found["reward"]) and found["grad_norm"] > 0 and not equal(state.params, PARAMS)


def test_grpo_weighs_latents_and_images_alike():
  """A sum of both kinds decodes once, and is the sum of each by itself."""
  both = latent_reward().graph + stub_reward().graph
  reward = type(latent_reward())(both)
  assert reward.needs == {"x_t", "image"}
  images, latents, t = (jnp.asarray(draw(i, 4, *shape)) for i, shape in ((1, (8, 8, 3)), (2, (4, 4, 2)), (3, ())))
  t = jnp.zeros(4, jnp.int32)
  found = reward.score(FROZEN, images, t, reward.prompts(FROZEN, BATCH), latents)
  apart = [
    r.score(FROZEN, images, t, r.prompts(FROZEN, BATCH), latents).total for r in (latent_reward(), stub_reward())
  ]
  np.testing.assert_allclose(found.total, sum(apart), rtol=1e-5)
