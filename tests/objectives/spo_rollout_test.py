"""SPO's candidate pools against a step-by-step numpy rollout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion
from jaxpref.devices import sharding
from jaxpref.objectives import spo
from jaxpref.rewards.base import Scores
from tests import decisions
from tests.diffusion.ddim_trajectories_test import (
  SCHEDULE,
  SHAPE,
  ddim_np,
  draw,
  normal,
  predict,
  predict_np,
  timesteps,
)  # fmt: skip


def score_np(x0, t):
  """Depends on the sample and on the time it is scored with."""
  return np.sin(7.0 * x0.mean(axis=(-3, -2, -1)) + t / 100.0) * np.float32(2.0)


class Stub:
  """The same two functions for the rollout, counting the rows they really see at run time."""

  def __init__(self):
    self.calls, self.scored = [], []

  def predict(self, x, t):
    jax.debug.callback(lambda t: self.calls.append(np.array(t)), t)
    return predict(x, t)

  def score(self, x0, t):
    jax.debug.callback(lambda t: self.scored.append(np.array(t)), t)
    return Scores(jnp.sin(7.0 * jnp.mean(x0, axis=(1, 2, 3)) + t / 100.0) * 2.0, {})


SD15 = {"num_steps": 20, "warmup_steps": 4, "pool_size": 4, "inner_steps": 0, "threshold": 0.3}
LAST = SD15 | {"pool_last_step": True}
SDXL = {"num_steps": 20, "warmup_steps": 4, "pool_size": 2, "inner_steps": 3, "threshold": 0.4}
SHORT = {"num_steps": 6, "warmup_steps": 2, "pool_size": 3, "inner_steps": 1, "threshold": 0.2}
CASES = {"sd15": SD15, "last": LAST, "sdxl": SDXL, "short": SHORT}
PROMPTS = 3


@functools.cache
def compiled(case, next_latent):
  stub = Stub()
  arguments = CASES[case] | {"eta": 1.0, "next_latent": next_latent}
  x = jnp.asarray(draw(1, PROMPTS, *SHAPE))

  @jax.jit
  def go(x, key):
    return spo.pool_rollout(stub.predict, stub.score, diffusion.VariancePreserving(SCHEDULE), x, key, **arguments)

  return (lambda seed: go(x, jax.random.key(seed))), stub


@functools.cache
def run(case, next_latent="random", seed=0):
  go, stub = compiled(case, next_latent)
  stub.calls, stub.scored = [], []
  result = jax.tree.map(np.asarray, go(seed))
  jax.effects_barrier()
  return result, (stub.calls, stub.scored)


def expected_groups(num_steps, warmup_steps, inner_steps, pool_last_step=False, **_):
  """Step numbers of each group; for single steps the last two form one, if the last is none by itself."""
  length = inner_steps + 1
  groups = [list(range(i, i + length)) for i in range(warmup_steps, num_steps, length)]
  if length == 1 and not pool_last_step:
    groups = [*groups[:-2], groups[-2] + groups[-1]]
  return groups


@pytest.mark.parametrize("case", CASES)
def test_number_of_calls(case):
  _, (calls, _) = run(case)
  c = CASES[case]
  single = c["warmup_steps"] + 1
  pooled = c["num_steps"] - single
  sizes = sorted(len(t) for t in calls)
  assert sizes == [PROMPTS] * single + [PROMPTS * c["pool_size"]] * pooled
  expected = spo.pool_calls(num_steps=c["num_steps"], warmup_steps=c["warmup_steps"], pool_size=c["pool_size"])
  assert sum(sizes) == PROMPTS * expected
  if case in ("sd15", "last"):
    assert expected == 65
  if case == "sdxl":
    assert expected == 5 + 15 * 2
  # No timestep is visited by single latents and candidates both, none twice.
  visited = sorted((int(t[0]) for t in calls), reverse=True)
  assert visited == timesteps(c["num_steps"])[0]
  assert all((t == t[0]).all() for t in calls)


@pytest.mark.parametrize("case", CASES)
def test_times_of_transitions_and_of_scores(case):
  result, (_, scored) = run(case)
  c = CASES[case]
  t, prev_t = timesteps(c["num_steps"])
  groups = expected_groups(**c)
  if case == "sd15":
    assert [len(g) for g in groups] == [1] * 14 + [2]
  if case == "last":
    assert [len(g) for g in groups] == [1] * 16 and result.separate.t.shape == (PROMPTS, 0)
  if case == "sdxl":
    assert groups == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
  firsts = [g[0] for g in groups]
  later = [i for g in groups for i in g[1:]]
  for part, steps in ((result.shared, firsts), (result.separate, later)):
    for row in range(PROMPTS):
      assert part.t[row].tolist() == [t[i] for i in steps]
      assert part.prev_t[row].tolist() == [prev_t[i] for i in steps]
  # Scored at the timestep that was reached; what the last step makes are images, time 0.
  assert result.score_t.tolist() == [prev_t[g[-1]] for g in groups[:-1]] + [0]
  called = sorted((int(s[0]) for s in scored), reverse=True)
  assert called == sorted(result.score_t.tolist(), reverse=True)
  assert all(len(s) == PROMPTS * c["pool_size"] for s in scored)


def split_groups(result, case):
  """Winner and loser chains of each group: lists of (x, next) f32[B, ...]."""
  c = CASES[case]
  groups = expected_groups(**c)
  later, chains = 0, []
  for g, steps in enumerate(groups):
    parts = [(result.shared, g)]
    for _ in steps[1:]:
      parts.append((result.separate, later))
      later += 1
    chains.append(
      {side: [(getattr(p, f"x_{side}")[:, i], getattr(p, f"next_{side}")[:, i]) for p, i in parts] for side in "wl"}
    )
  assert later == result.separate.t.shape[1]
  return groups, chains


@pytest.mark.parametrize("case", CASES)
def test_chains_start_from_one_latent_and_hang_together(case):
  result, _ = run(case)
  _, chains = split_groups(result, case)
  np.testing.assert_array_equal(result.shared.x_w, result.shared.x_l)
  for chain in chains:
    for side in "wl":
      for before, after in zip(chain[side][:-1], chain[side][1:], strict=True):
        np.testing.assert_array_equal(before[1], after[0])
    assert np.abs(chain["w"][0][1] - chain["l"][0][1]).min() > 0  # two candidates, not one
  assert case == "last" or np.abs(result.separate.x_w - result.separate.x_l).min() > 0


@pytest.mark.parametrize("case", CASES)
def test_noise_of_every_transition_is_standard_normal_and_used_once(case):
  """(next - mean) / std of each transition, with mean and std of the published formula."""
  result, _ = run(case)
  found = []
  for part in (result.shared, result.separate):
    for i in range(part.t.shape[1]):
      for side in "wl":
        x, after = getattr(part, f"x_{side}")[:, i], getattr(part, f"next_{side}")[:, i]
        t, prev_t = int(part.t[0, i]), int(part.prev_t[0, i])
        mean, std, _ = ddim_np(np.float64(x), predict_np(x, t), t, prev_t)
        assert std > 1e-3  # also of the last step
        found.append((after - mean) / std)
  noise = np.stack(found)
  assert np.abs(noise.mean()) < 4 / math.sqrt(noise.size)
  assert np.abs(noise.std() - 1) < 4 / math.sqrt(noise.size)
  assert np.abs(noise).max() < 6
  flat = np.sort(noise.ravel())
  assert np.diff(flat).min() > 0, "the same noise was used twice"


@pytest.mark.parametrize("case", CASES)
def test_scores_winner_and_loser_are_those_of_the_pool(case):
  """The scores of best and worst are recomputed from the ends of their chains."""
  result, _ = run(case)
  groups, chains = split_groups(result, case)
  last = len(groups) - 1
  for g, chain in enumerate(chains):
    for side, extreme in (("w", np.max), ("l", np.min)):
      end = np.float64(chain[side][-1][1])
      t = int(result.score_t[g])
      if g != last:  # the x0-prediction at the latent reached
        end = ddim_np(end, predict_np(end, t), t, t)[2]
      np.testing.assert_allclose(score_np(end, t), extreme(result.scores.total[:, g], axis=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_kept_above_the_threshold_only(case):
  result, _ = run(case)
  groups, _ = split_groups(result, case)
  gap = result.scores.total.max(axis=2) - result.scores.total.min(axis=2)
  best = np.exp(result.scores.total.max(axis=2))
  share = best / (best + np.exp(result.scores.total.min(axis=2)))
  valid = decisions.above(share - (1 - share), CASES[case]["threshold"], margin=1e-5)
  assert 0 < valid.mean() < 1, f"the case decides nothing: gaps {gap}"
  np.testing.assert_array_equal(result.shared.valid, valid)
  later = [g for g, steps in enumerate(groups) for _ in steps[1:]]
  np.testing.assert_array_equal(result.separate.valid, valid[:, later])


@pytest.mark.parametrize("next_latent", ["winner", "loser"])
def test_the_next_group_starts_from_the_chosen_candidate(next_latent):
  result, _ = run("short", next_latent)
  _, chains = split_groups(result, "short")
  side = next_latent[0]
  for before, after in zip(chains[:-1], chains[1:], strict=True):
    np.testing.assert_array_equal(before[side][-1][1], after["w"][0][0])
  np.testing.assert_array_equal(result.latents, chains[-1][side][-1][1])


def test_a_random_candidate_is_sometimes_best_sometimes_worst_and_mostly_neither():
  counts = {"w": 0, "l": 0, "none": 0}
  for seed in range(4):
    result, _ = run("sd15", seed=seed)
    _, chains = split_groups(result, "sd15")
    for before, after in zip(chains[:-1], chains[1:], strict=True):
      for row in range(PROMPTS):
        start = after["w"][0][0][row]
        hits = [s for s in "wl" if np.array_equal(before[s][-1][1][row], start)]
        counts[hits[0] if hits else "none"] += 1
  total = sum(counts.values())  # 168; a quarter, a quarter, a half: four standard deviations
  assert abs(counts["w"] / total - 0.25) < 0.14
  assert abs(counts["l"] / total - 0.25) < 0.14


def test_in_a_pool_of_two_the_path_goes_on_from_one_of_both():
  result, _ = run("sdxl")
  _, chains = split_groups(result, "sdxl")
  for before, after in zip(chains[:-1], chains[1:], strict=True):
    for row in range(PROMPTS):
      start = after["w"][0][0][row]
      assert any(np.array_equal(before[s][-1][1][row], start) for s in "wl")
  ends = [chains[-1][s][-1][1] for s in "wl"]
  for row in range(PROMPTS):
    assert any(np.array_equal(end[row], result.latents[row]) for end in ends)


# ---------------------------------------------------------------------------------------------
# The whole, step by step


class Tape:
  """Plays back the draws of a rollout in the order in which a program without scans makes them."""

  def __init__(self, key, count_groups):
    self.warmup, groups, self.last = jax.random.split(key, 3)
    self.groups = jax.random.split(groups, max(count_groups, 1))


def reference_rollout(x, key, *, num_steps, warmup_steps, pool_size, inner_steps, next_latent, pool_last_step=False):
  """Algorithm 1 of arXiv 2406.04314 as Python loops in float64; yields every group.

  A group: (starts f64[j, B, k, ...], ends f64[j, B, k, ...], scores [B, k], chosen [B]).
  """
  t, prev_t = timesteps(num_steps)
  groups = expected_groups(num_steps, warmup_steps, inner_steps, pool_last_step)
  tape = Tape(key, len(groups) - 1)
  batch, k = len(x), pool_size
  pool_shape = (batch * k, *SHAPE)

  keys = jax.random.split(tape.warmup, warmup_steps + 1)
  for i in range(warmup_steps):
    mean, std, _ = ddim_np(x, predict_np(x, t[i]), t[i], prev_t[i])
    x = mean + std * normal(keys[i], x.shape)

  for g, steps in enumerate(groups):
    last = g == len(groups) - 1
    key_path, key_member = jax.random.split(tape.last if last else tape.groups[g])
    key_draw, key_walk = jax.random.split(key_path)
    walk_keys = jax.random.split(key_walk, len(steps) - 1 if last else len(steps))
    pool = np.repeat(x, k, axis=0)
    starts, ends = [], []
    for n, i in enumerate(steps):
      noise = normal(key_draw if n == 0 else walk_keys[n - 1], pool_shape)
      mean, std, _ = ddim_np(pool, predict_np(pool, t[i]), t[i], prev_t[i])
      starts.append(pool)
      pool = mean + std * noise
      ends.append(pool)
    reached = prev_t[steps[-1]]
    if last:
      scores = score_np(pool, 0)
    else:
      x0 = ddim_np(pool, predict_np(pool, reached), reached, reached)[2]
      scores = score_np(x0, reached)
    scores = scores.reshape(batch, k)
    if next_latent == "random":
      chosen = np.asarray(jax.random.randint(key_member, (batch,), 0, k))
    else:
      chosen = decisions.argmax(scores if next_latent == "winner" else -scores, margin=1e-3)
    fold = lambda parts: np.stack(parts).reshape(len(parts), batch, k, *SHAPE)
    yield fold(starts), fold(ends), scores, chosen
    x = pool.reshape(batch, k, *SHAPE)[np.arange(batch), chosen]


@pytest.mark.parametrize(("case", "next_latent"), [*((c, "random") for c in CASES), ("short", "winner")])
def test_equals_a_rollout_without_scans(case, next_latent):
  result, _ = run(case, next_latent)
  _, chains = split_groups(result, case)
  c = CASES[case]
  x = np.float64(draw(1, PROMPTS, *SHAPE))
  options = {k: v for k, v in c.items() if k != "threshold"}
  groups = list(reference_rollout(x, jax.random.key(0), **options, next_latent=next_latent))
  rows = np.arange(PROMPTS)
  for g, (starts, ends, scores, _) in enumerate(groups):
    np.testing.assert_allclose(result.scores.total[:, g], scores, rtol=2e-3, atol=2e-3)
    best, worst = (decisions.argmax(x, margin=1e-3) for x in (scores, -scores))
    for side, index in (("w", best), ("l", worst)):
      for n, (start, end) in enumerate(chains[g][side]):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
        close(start, starts[n, rows, index])
        close(end, ends[n, rows, index])
  _, ends, _, chosen = groups[-1]
  np.testing.assert_allclose(result.latents, ends[-1, rows, chosen], rtol=1e-3, atol=1e-3)


def test_devices_choose_among_their_own_prompts():
  """Sharded over prompts, a rollout sends no candidate from one device to another."""
  mesh = sharding.make_mesh(devices=jax.devices()[:4])
  rows = sharding.batch_sharding(mesh)

  def run(x, key):
    # Noise is the same on any mesh, and made for all devices wherever it is needed: out of the picture here.
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))
      return spo.pool_rollout(
        lambda x, t: jnp.sin(x),
        lambda x0, t: Scores(jnp.mean(x0, axis=(1, 2, 3)), {}),
        diffusion.VariancePreserving(SCHEDULE),
        x,
        key,
        num_steps=6,
        eta=1.0,
        warmup_steps=2,
        pool_size=2,
        inner_steps=1,
        threshold=0.0,
      )

  x = jax.ShapeDtypeStruct((8, *SHAPE), jnp.float32, sharding=rows)
  text = jax.jit(run).lower(x, jax.random.key(0)).compile().as_text()
  assert "all-reduce" not in text and "all-gather" not in text
