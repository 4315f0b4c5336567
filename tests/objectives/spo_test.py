"""SPO's loss of transitions against numpy, and its iterations."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diffusion, losses
from jaxpref.models.base import guided
from jaxpref.objectives import pools, spo
from jaxpref.objectives.pairs import pair_loss
from jaxpref.rewards import step_aware
from jaxpref.rewards.base import Scores
from tests import decisions
from tests.objectives.stubs import ABARS, FROZEN, MODEL, NEAR, OTHER, SAME, log_sigmoid
from tests.stub_model import LATENT, SCHEDULE, StubModel, StubScorer, draw
from tests.updates import ADAMW, PARAMS, PROMPTS, SPO_LOSS, equal, spo_step, state_of

OF_LOSS = {"eta": 1.0, "guidance_scale": 5.0, "ratio_clip": 0.1}


def transitions(count, *, shared, seed=20):
  """Transitions near the policy's own mean, so that no ratio is clipped."""
  t = np.resize(np.int32([951, 501, 51, 1]), count)
  prev_t = np.resize(np.int32([901, 451, 1, 0]), count)
  x_w = draw(seed, count, *LATENT)
  x_l = x_w if shared else draw(seed + 1, count, *LATENT)
  cond = {"encoder_hidden_states": jnp.asarray(draw(3, 2, 5, 8))}
  prompt = np.resize(np.int32([0, 1, 1]), count)
  uncond = MODEL.encode_empty(FROZEN, 1)
  predict = guided(functools.partial(MODEL.predict, FROZEN), uncond, 5.0)
  rows = jax.tree.map(lambda c: c[prompt], cond)
  ends = []
  for side, x in enumerate((x_w, x_l)):
    mean, std = diffusion.ddim_mean_std(SCHEDULE, predict(jnp.asarray(x), jnp.asarray(t), rows), x, t, prev_t, eta=1.0)
    ends.append(mean + std[:, None, None, None] * draw(seed + 2 + side, count, *LATENT))
  valid = jnp.ones(count, bool)
  steps = pools.Transitions(*map(jnp.asarray, (x_w, x_l, *ends, t, prev_t)), valid)
  return (steps, jnp.asarray(prompt), jnp.ones(count)), cond, uncond


def nothing():
  (steps, prompt, mask), _, _ = transitions(2, shared=False)
  return jax.tree.map(lambda v: v[:0], (steps, prompt, mask))


@jax.jit
def transition_loss(params, ref_params, shared, separate, cond, uncond):
  def total(params):
    loss, count, found = spo.transition_loss(
      MODEL,
      SPO_LOSS,
      {**FROZEN, **params},
      {**FROZEN, **ref_params},
      shared,
      separate,
      cond,
      uncond,
      **OF_LOSS,
    )
    return loss, (count, found)

  return jax.value_and_grad(total, has_aux=True)(params)


def with_mask(part, mask):
  return (*part[:2], jnp.asarray(mask, jnp.float32))


SMALL = jax.tree.map(lambda a, b: a + 2e-4 * b, SAME, OTHER)


def test_transition_loss_is_undecided_where_policy_and_reference_agree():
  shared, cond, uncond = transitions(6, shared=True)
  separate, _, _ = transitions(4, shared=False, seed=30)
  (loss, (count, found)), grads = transition_loss(SAME, SAME, shared, separate, cond, uncond)
  assert count == 10
  np.testing.assert_allclose(loss / count, math.log(2), atol=1e-4)
  assert abs(float(found["margin"][0])) < 1e-3
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


def test_a_shared_start_equals_two_separate_ones():
  """One pass for winner and loser gives the loss and gradient of two."""
  shared, cond, uncond = transitions(6, shared=True, seed=22)
  (one, (count, found)), grads = transition_loss(SMALL, SAME, shared, nothing(), cond, uncond)
  (two, (count_2, found_2)), grads_2 = transition_loss(SMALL, SAME, nothing(), shared, cond, uncond)
  assert count == count_2 == 6
  of_row = lambda row: transition_loss(SMALL, SAME, with_mask(shared, row), nothing(), cond, uncond)[0][1][1]
  one_by_one = [of_row(row) for row in np.eye(6)]
  decisions.above([found["margin"][0] for found in one_by_one], margin=1e-5)
  assert found["implicit_accuracy"] == found_2["implicit_accuracy"]
  np.testing.assert_allclose(one, two, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()),
    grads,
    grads_2,
  )


def test_transition_loss_equals_numpy():
  shared, cond, uncond = transitions(6, shared=True)
  separate, _, _ = transitions(4, shared=False, seed=30)
  mask, mask_2 = [1, 0, 1, 1, 1, 0], [1, 1, 0, 1]
  far = NEAR  # some ratios are clipped here
  (loss, (count, _)), _ = transition_loss(far, SAME, with_mask(shared, mask), with_mask(separate, mask_2), cond, uncond)

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
  (_, _), grads = transition_loss(SMALL, SAME, shared, separate, cond, uncond)
  norm = math.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
  h = 2e-4
  up, down = (
    transition_loss(
      jax.tree.map(lambda p, g, s=s: p + s * h * g / norm, SMALL, grads), SAME, shared, separate, cond, uncond
    )[0][0]
    for s in (1, -1)
  )
  np.testing.assert_allclose((up - down) / (2 * h), norm, rtol=2e-2)


def test_masked_transitions_weigh_nothing():
  shared, cond, uncond = transitions(6, shared=True)
  separate, _, _ = transitions(4, shared=False, seed=30)
  masks = [1, 1, 0, 1, 0, 1], [0, 1, 1, 0]
  one = transition_loss(NEAR, SAME, *map(with_mask, (shared, separate), masks), cond, uncond)
  wild = []
  for (steps, prompt, _), mask in zip((shared, separate), masks, strict=True):
    off = jnp.asarray(mask)[:, None, None, None] == 0
    steps = steps._replace(next_w=jnp.where(off, 50.0, steps.next_w))
    wild.append((steps, prompt, jnp.asarray(mask, jnp.float32)))
  other = transition_loss(NEAR, SAME, *wild, cond, uncond)
  assert one[0][0] == other[0][0] and one[0][1][0] == 6
  jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def test_a_step_makes_winners_likelier_than_losers():
  shared, cond, uncond = transitions(6, shared=True)
  (start, _), grads = transition_loss(SAME, SAME, shared, nothing(), cond, uncond)
  params = jax.tree.map(lambda p, g: p - 1e-5 * g, SAME, grads)
  (loss, (_, found)), _ = transition_loss(params, SAME, shared, nothing(), cond, uncond)
  assert loss < start
  assert found["margin"][0] > 0


def test_one_group_of_two_trajectories_is_d3po():
  """One label for all steps after the shared first one; a pool of two whose group is all of the others."""
  model, scorer, prompts, steps = StubModel(), StubScorer(), 6, 5
  ids = PROMPTS["input_ids"][:prompts]
  cond, uncond = model.encode_text(FROZEN, ids), model.encode_empty(FROZEN, 1)
  text = step_aware.embed_prompts(scorer, FROZEN["spm"], ids)

  def predict(x, t):
    return model.predict(FROZEN, x, t, jax.tree.map(lambda c: jnp.repeat(c, len(x) // prompts, axis=0), cond))

  def score(x0, t):
    of_rows = jnp.repeat(text, len(x0) // prompts, axis=0)
    return Scores(step_aware.score_images(scorer, FROZEN["spm"], model.decode(FROZEN, x0), t, of_rows), {})

  start = jax.random.normal(jax.random.key(1), (prompts, *LATENT))
  draw = functools.partial(
    spo.pool_rollout, predict, score, model.process, num_steps=steps, eta=1.0, warmup_steps=1, pool_size=2,
    inner_steps=steps - 2, threshold=0.0,
  )  # fmt: skip
  pairs = jax.jit(draw)(start, jax.random.key(2))
  assert pairs.shared.t.shape == (prompts, 1) and pairs.separate.t.shape == (prompts, steps - 2)
  assert pairs.shared.valid.all() and pairs.score_t.tolist() == [0]
  final = jax.jit(lambda x: score(x, jnp.zeros(prompts, jnp.int32)).total)
  for side, best in (("w", np.max), ("l", np.min)):
    end = getattr(pairs.separate, f"next_{side}")[:, -1]
    np.testing.assert_allclose(final(end), best(pairs.scores.total[:, 0], axis=1), rtol=1e-5, atol=1e-5)

  policy = {**FROZEN, "unet": jax.tree.map(lambda k: k * 1.02, FROZEN["unet"])}

  def taken(part):
    """Rows, the prompt of each, and a mask."""
    rows = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), part)
    return rows, jnp.repeat(jnp.arange(prompts), part.t.shape[1]), jnp.ones(part.t.size)

  of_spo = functools.partial(
    spo.transition_loss, model, pair_loss("sigmoid", beta=0.1), cond=cond, uncond=uncond, eta=1.0,
    guidance_scale=1.0, ratio_clip=0.1,
  )  # fmt: skip
  loss, count, _ = jax.jit(of_spo)(policy, FROZEN, shared=taken(pairs.shared), separate=taken(pairs.separate))

  def log_prob(weights, part, i, side):
    x, after = getattr(part, f"x_{side}")[:, i], getattr(part, f"next_{side}")[:, i]
    pred = model.predict(weights, x, part.t[:, i], cond)
    mean, std = diffusion.ddim_mean_std(SCHEDULE, pred, x, part.t[:, i], part.prev_t[:, i], eta=1.0)
    return diffusion.gaussian_log_prob(after, mean, std)

  @jax.jit
  def of_d3po(policy):
    total = 0.0
    first_is_better = jnp.arange(prompts) % 2  # the trajectories of a pair in either order
    for part, i in [(pairs.shared, 0), *((pairs.separate, i) for i in range(steps - 2))]:
      of = {side: (log_prob(policy, part, i, side), log_prob(FROZEN, part, i, side)) for side in "wl"}
      pick = lambda a, b: jnp.where(first_is_better > 0, a, b)
      zero, one = ([pick(a, b) for a, b in zip(of[x], of[y], strict=True)] for x, y in ("wl", "lw"))
      total += losses.d3po_loss(*zero, *one, first_is_better.astype(jnp.float32), beta=0.1, eps=0.1).sum()
    return total

  assert count == prompts * (steps - 1)
  assert abs(loss - count * math.log(2)) > 1e-3
  np.testing.assert_allclose(loss, of_d3po(policy), rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# Iterations


def test_without_a_valid_pair_nothing_changes():
  """Not even by weight decay or momentum; the step counts."""
  start = state_of(PARAMS, ADAMW)
  state, found = jax.jit(spo_step(threshold=0.9999))(start, FROZEN, PROMPTS)
  assert found["valid_pairs"] == found["updates"] == found["grad_norm"] == 0
  assert equal(state.params, start.params)
  assert equal(state.opt_state, start.opt_state)
  assert state.step == 1
  np.testing.assert_allclose(found["loss"], math.log(2), rtol=1e-6)
  hinge = pair_loss("hinge", beta=10.0)
  undecided = spo_step(loss=hinge, threshold=0.9999)
  assert jax.jit(undecided)(start, FROZEN, PROMPTS)[1]["loss"] == 1


@pytest.mark.parametrize("last, groups", [(False, 3), (True, 4)])  # single steps, with the last two as one, or not
def test_an_iteration_learns_and_reports(monkeypatch, last, groups):
  """From log 2 at the start; the next iteration starts where it ended, with other noise."""
  seen, winners, drawn = [], [], spo.pool_rollout

  def pool_rollout(*args, **kwargs):
    pairs = drawn(*args, **kwargs)
    ends = (pairs.shared if last else pairs.separate).next_w[:, -1]
    jax.debug.callback(lambda latents: winners.append(np.array(latents)), ends)
    return pairs

  monkeypatch.setattr(spo, "pool_rollout", pool_rollout)

  def move(objective, state, frozen, batch, key):
    """Moves at the second step; the latents are those the divergence is measured on."""
    jax.debug.callback(lambda latents: seen.append(np.array(latents)), batch["latents"])
    moved = jax.tree.map(lambda r, p: jnp.where(state.step == 2, p, r), state.ref_params, state.params)
    return moved, state.ref_stats

  run = jax.jit(spo_step(moving=types.SimpleNamespace(move=move), pool_last_step=last))
  start = state_of(PARAMS, ADAMW)
  state, found = run(start, FROZEN, PROMPTS)
  assert 0 < found["valid_pairs"] < 1
  pairs = round(float(found["valid_pairs"]) * 8 * groups)
  assert found["updates"] >= math.ceil(pairs / 6) > 1
  assert found["optimizer_updates"] == found["updates"]
  assert abs(found["loss"] - math.log(2)) < 0.2
  assert not equal(state.params, start.params)
  assert equal(state.ref_params, start.ref_params)
  assert found["reward_group"].shape == (groups,)
  assert found["score_gap"] > 0 and found["grad_norm"] > 0
  again, found_again = run(start, FROZEN, PROMPTS)
  assert equal(again.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, found, found_again)
  second, later = run(state, FROZEN, PROMPTS)
  assert later["reward"] != found["reward"]
  assert later["optimizer_updates"] == found["updates"] + later["updates"]
  jax.effects_barrier()
  assert seen[0].shape == (8, *LATENT) and "divergence" in found
  np.testing.assert_array_equal(seen[0], winners[0])
  assert equal(second.ref_params, second.params)


def test_an_ordinary_preference_model_is_told_time_0_at_every_step():
  """As one that does not look at the time."""
  timeless = FROZEN | {"spm": FROZEN["spm"] | {"time": jnp.zeros_like(FROZEN["spm"]["time"])}}
  start = state_of(PARAMS, ADAMW)
  run = {step_aware: jax.jit(spo_step(step_aware=step_aware)) for step_aware in (False, True)}
  cases = ((False, FROZEN), (True, timeless), (True, FROZEN))
  of_images, without, aware = (run[step_aware](start, frozen, PROMPTS)[1] for step_aware, frozen in cases)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), of_images, without)
  assert not np.allclose(of_images["reward_group"], aware["reward_group"], rtol=1e-2)


def test_pairs_may_be_chosen_by_smaller_pictures():
  """As by a model all of whose pictures are small."""

  class Small(StubModel):
    def decode(self, weights, latents, *, size=0):
      assert not size
      return super().decode(weights, latents, size=4)

  start = state_of(PARAMS, ADAMW)
  (after, found), (same, expected), (_, whole) = (
    jax.jit(run)(start, FROZEN, PROMPTS) for run in (spo_step(decode_size=4), spo_step(model=Small()), spo_step())
  )
  jax.tree.map(np.testing.assert_array_equal, (after.params, found), (same.params, expected))
  assert not np.allclose(found["reward_group"], whole["reward_group"], rtol=1e-2)
