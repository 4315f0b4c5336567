"""One update: accumulation, clipping, minibatches of online methods, the moving reference, and any mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import diffusion, losses, objectives, reference, rollout
from jaxpref.devices import sharding
from jaxpref.training import optim, step
from tests import decisions
from tests.stub_model import LATENT, StubModel, StubScorer, draw, init, pair_batch


def state_of(params, optimizer, ref_params=None):
  copy = lambda tree: jax.tree.map(jnp.array, tree)
  return step.initial_state(
    copy(params), copy(params if ref_params is None else ref_params), optimizer.init(params)
  )


def sgd(learning_rate=0.1, clip_norm=0.0):
  return optim.make_optimizer(
    "sgd", optax.constant_schedule(learning_rate), b1=0.0, b2=0.0, eps=0.0, weight_decay=0.0,
    clip_norm=clip_norm,
  )


def assert_close(a, b, tolerance):
  """Relative to the largest entry of each array."""

  def leaf(x, y):
    scale = max(np.abs(x).max(), np.abs(y).max(), 1e-30)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)

  jax.tree.map(leaf, jax.tree.map(np.float32, a), jax.tree.map(np.float32, b))


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


# ---------------------------------------------------------------------------------------------
# Offline


def regression(params, ref_params, frozen, batch, key):
  """Masked least squares: sums, not means, and nothing random."""
  del ref_params, frozen, key
  error = (batch["x"] @ params["w"] - batch["y"]) ** 2
  weighted = jnp.where(batch["mask"] > 0, error * batch["mask"], 0.0)
  pairs = {"error": (jnp.sum(weighted), jnp.sum(batch["mask"]))}
  return jnp.sum(weighted), jnp.sum(batch["mask"]), pairs


REGRESSION = objectives.Objective(regression)
WEIGHTS = {"w": jnp.asarray(draw(0, 3))}


def regression_batch(mask):
  return {"x": draw(1, 8, 3), "y": draw(2, 8), "mask": np.float32(mask)}


@pytest.mark.parametrize(
  "mask", [[1] * 8, [1, 0, 0, 0, 1, 1, 0, 1], [1, 0.25, 0, 0, 0.5, 0, 0, 0]], ids=str
)
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_accumulation_changes_nothing(mask, clip_norm):
  """Four micro-batches, some without a valid row: divided once, by the global count."""
  batch, optimizer = regression_batch(mask), sgd(clip_norm=clip_norm)
  results = []
  for accumulation in (1, 2, 4):
    run = jax.jit(step.offline_step(REGRESSION, optimizer, seed=0, accumulation=accumulation))
    state, found = run(state_of(WEIGHTS, optimizer), {}, batch)
    results.append((state.params, found))
  for params, found in results[1:]:
    assert_close(params, results[0][0], 1e-6)
    assert_close(found, results[0][1], 1e-6)
  residual = batch["x"] @ WEIGHTS["w"] - batch["y"]
  grad = 2 * (batch["mask"] * residual) @ batch["x"] / batch["mask"].sum()
  norm = np.linalg.norm(grad)
  np.testing.assert_allclose(results[0][1]["grad_norm"], norm, rtol=1e-5)
  np.testing.assert_allclose(
    results[0][1]["loss"], (batch["mask"] * residual**2).sum() / batch["mask"].sum(), rtol=1e-5
  )
  if clip_norm:
    grad *= min(1.0, clip_norm / norm)
  np.testing.assert_allclose(results[0][0]["w"], WEIGHTS["w"] - 0.1 * grad, rtol=1e-4)


def test_the_gradient_is_clipped_at_every_step():
  """An optimiser that clips the first step only, or none, moves further."""
  optimizer = sgd(learning_rate=1.0, clip_norm=0.01)
  run = jax.jit(step.offline_step(REGRESSION, optimizer, seed=0))
  state, batch = state_of(WEIGHTS, optimizer), regression_batch([1] * 8)
  for _ in range(3):
    before = state.params["w"]
    state, found = run(state, {}, batch)
    assert found["grad_norm"] > 0.1  # of the gradient as it was
    np.testing.assert_allclose(np.linalg.norm(state.params["w"] - before), 0.01, rtol=1e-4)


def test_a_batch_without_any_valid_row_stops_nothing():
  """All ties: no gradient, and a loss that is a number."""
  optimizer = sgd()
  run = jax.jit(step.offline_step(REGRESSION, optimizer, seed=0))
  state, found = run(state_of(WEIGHTS, optimizer), {}, regression_batch([0] * 8))
  np.testing.assert_array_equal(state.params["w"], WEIGHTS["w"])
  assert state.step == 1
  assert np.isfinite(found["loss"]) and found["grad_norm"] == 0
  assert np.isnan(found["error"])  # nothing was counted, which is not 0


def test_randomness_follows_from_seed_and_step():
  """Resuming at a step draws what an uninterrupted run would, not what the first step drew."""

  def loss(params, ref_params, frozen, batch, key):
    value = jax.random.uniform(key) + 0 * jnp.sum(params["w"])
    return value, jnp.ones(()), {}

  optimizer = sgd()
  draws = {}
  for seed in (0, 1):
    run = jax.jit(step.offline_step(objectives.Objective(loss), optimizer, seed=seed))
    state = state_of(WEIGHTS, optimizer)
    for i in range(3):
      state, found = run(state, {}, {})
      draws[seed, i] = float(found["loss"])
  assert len(set(draws.values())) == 6
  resumed = dataclasses.replace(state_of(WEIGHTS, optimizer), step=jnp.asarray(2, jnp.int32))
  _, found = run(resumed, {}, {})
  assert float(found["loss"]) == draws[1, 2]


def test_the_reference_moves_on_its_steps_only():
  optimizer = sgd()

  def update(ref_params, params, stats, step, frozen, batch, key):
    return reference.update(
      ref_params, params, WEIGHTS, stats, step=step, divergence_fn=lambda tree: 0.0, tau=3
    )

  run = jax.jit(step.offline_step(REGRESSION, optimizer, seed=0, update_reference=update))
  state, batch = state_of(WEIGHTS, optimizer), regression_batch([1] * 8)
  held = WEIGHTS
  for done in range(1, 8):
    state, found = run(state, {}, batch)
    if done % 3 == 0:
      held = jax.tree.map(np.asarray, state.params)  # after the update of the same step
    assert equal(state.ref_params, held), done
    assert found["reference_updates"] == done // 3
    assert not equal(state.params, state.ref_params) or done % 3 == 0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("value", [np.nan, 1e18], ids=["loss", "gradient alone"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(value, accumulation):
  """Neither parameters nor moments nor the reference, though its turn has come; the next step goes on as if alone."""

  def update(ref_params, params, stats, step, frozen, batch, key):
    return reference.update(
      ref_params, params, None, stats, step=step, divergence_fn=lambda tree: 9.0, tau=1, on_diverge="reinit"
    )

  run = jax.jit(
    step.offline_step(REGRESSION, ADAMW, seed=0, accumulation=accumulation, update_reference=update)
  )
  batch = regression_batch([1] * 8)
  dirty = batch | {"x": batch["x"].copy()}
  dirty["x"][1] = value
  start = state_of(WEIGHTS, ADAMW, jax.tree.map(lambda x: x + 1, WEIGHTS))
  state, found = run(start, {}, dirty)
  assert np.isfinite(found["loss"]) == np.isfinite(value) and not np.isfinite(found["grad_norm"])
  assert found["skipped_updates"] == 1 and state.skipped == 1 and state.step == 1
  assert equal(dataclasses.replace(state, step=start.step, skipped=start.skipped), start)

  state, found = run(state, {}, batch)
  assert found["skipped_updates"] == 0 and state.skipped == 1 and state.step == 2
  alone, _ = run(dataclasses.replace(start, step=jnp.int32(1)), {}, batch)
  assert equal(dataclasses.replace(state, skipped=alone.skipped), alone)
  assert not equal(state.params, start.params) and state.ref_stats.resets == 1


@pytest.mark.parametrize("sign", [1, -1], ids=["K above 0", "K is 0"])
def test_the_baseline_of_kto_is_that_of_the_whole_batch_under_accumulation(sign):
  """The update is the gradient of all images' loss with one K, at the timesteps and the noise of the micro-batches."""
  model, beta, accumulation, size = StubModel(), 30.0, 4, 8
  frozen, pairs = init(), pair_batch(size)
  label = np.float32([1, 1, 1, 0, 0, 0, 1, 0])
  batch = {"pixels": pairs["pixels_0"], "input_ids": pairs["input_ids"], "label": label}
  ref_params = {"unet": jax.tree.map(lambda a, b: a + 0.3 * b, frozen["unet"], init(50)["unet"])}
  params = {"unet": frozen["unet"]}
  if sign < 0:
    params, ref_params = ref_params, params
  optimizer = sgd(learning_rate=1.0)
  run = jax.jit(step.offline_step(objectives.kto(model, beta=beta), optimizer, seed=4, accumulation=accumulation))
  state, found = run(state_of(params, optimizer, ref_params), frozen, batch)

  key = objectives.named_key(jax.random.fold_in(jax.random.key(4), 0), "loss")
  parts = [
    ({k: v[i::accumulation] for k, v in batch.items()}, k) for i, k in enumerate(jax.random.split(key, accumulation))
  ]

  def gains(params):
    """err_ref - err of each image, written out."""
    rows = []
    for part, k in parts:
      x0 = model.encode_images(frozen, part["pixels"], None)
      t = diffusion.sample_timesteps(objectives.named_key(k, "t"), len(x0), num_train_timesteps=1000)
      noise = jax.random.normal(objectives.named_key(k, "noise"), x0.shape)
      abar = jnp.asarray(model.schedule.alphas_cumprod)[t][:, None, None, None]
      x_t, cond = jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * noise, model.encode_text(frozen, part["input_ids"])
      err_ref, err = ((model.predict({**frozen, **p}, x_t, t, cond) - noise) ** 2 for p in (ref_params, params))
      rows.append(jnp.mean(err_ref - err, axis=(1, 2, 3)))
    return jnp.concatenate(rows)

  baseline = max(float(gains(params).mean()), 0.0)
  assert (baseline > 0.01) == (sign > 0)
  liked = jnp.concatenate([part["label"] for part, _ in parts])

  def by_hand(params):
    z = beta * (gains(params) - baseline)
    return jnp.mean(1.0 - jax.nn.sigmoid(jnp.where(liked == 1, z, -z)))

  value, gradient = jax.value_and_grad(by_hand)(params)
  np.testing.assert_allclose(found["loss"], value, rtol=1e-4)
  np.testing.assert_allclose(found["baseline"], baseline, rtol=1e-4, atol=1e-7)
  assert_close(jax.tree.map(lambda a, b: a - b, params, state.params), gradient, 1e-3)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_timesteps_of_a_step_can_be_drawn_again(accumulation):
  """They are those that the loss drew for each row, whichever micro-batch it was in."""
  drawn = lambda key, size: jax.random.randint(key, (size,), 0, 1000)  # noqa: E731
  seen = []

  def loss(params, ref_params, frozen, batch, key):
    t = drawn(key, batch["row"].shape[0])
    jax.debug.callback(lambda row, t: seen.append((row.tolist(), t.tolist())), batch["row"], t)
    return jnp.sum(params["w"]) * 0.0, jnp.float32(1), {}

  objective = objectives.Objective(loss, timesteps=drawn)
  optimizer = sgd()
  run = jax.jit(step.offline_step(objective, optimizer, seed=5, accumulation=accumulation))
  state = dataclasses.replace(state_of(WEIGHTS, optimizer), step=jnp.int32(7))
  jax.block_until_ready(run(state, {}, {"row": jnp.arange(6)}))
  jax.effects_barrier()
  t = step.timesteps(objective, 6, seed=5, step=7, accumulation=accumulation)
  assert {row: t for rows, ts in seen for row, t in zip(rows, ts, strict=True)} == dict(enumerate(t.tolist()))
  assert step.timesteps(objectives.Objective(loss), 6, seed=5, step=7) is None


# ---------------------------------------------------------------------------------------------
# SPO: which transitions an iteration uses


def fake_rollout(valid, groups, separate):
  """Transitions that carry their own number; validity as given, for [B, G] and [B, S]."""
  prompts = valid.shape[0]

  def part(count, valid, start):
    number = jnp.arange(prompts * count, dtype=jnp.float32).reshape(prompts, count) + start
    x = jnp.broadcast_to(number[..., None, None, None], (prompts, count, *LATENT))
    return rollout.Transitions(x, x, x, x, *[number.astype(jnp.int32)] * 2, valid)

  shared = part(groups, valid, 0)
  later = part(separate, valid[:, jnp.arange(separate) % groups], prompts * groups)
  scores = jnp.broadcast_to(jnp.arange(2.0)[None, None], (prompts, groups, 2))
  return rollout.PoolRollout(
    shared, later, jnp.zeros((prompts, *LATENT)), scores, jnp.zeros(groups, jnp.int32)
  )


OPTIONS = {
  "seed": 0,
  "num_inference_steps": 6,
  "eta": 1.0,
  "guidance_scale": 3.0,
  "warmup_steps": 2,
  "pool_size": 3,
  "inner_steps": 0,
  "threshold": 0.15,
  "next_latent": "random",
  "ratio_clip": 0.1,
  "minibatch": 6,
}


@pytest.fixture
def counting(monkeypatch):
  """Replaces rollout and loss: parameters fall by 1 for every use of a transition.

  Gives run(valid, groups, separate, minibatch, steps) -> (uses of each transition, metrics, and for
  each step what its updates were given: indices, prompts and mask, shared and separate in turn).
  """
  seen: list[list[np.ndarray]] = []

  def loss(model, pair_loss, weights, ref_weights, shared, separate, cond, uncond, **kwargs):
    total = 0.0
    for transitions, prompt, mask in (shared, separate):
      index = transitions.t
      total += jnp.sum(mask * weights["unet"]["uses"][index])
      jax.debug.callback(
        lambda *v: seen.append([np.array(x) for x in v]), index, prompt, mask, ordered=True
      )
    return total, jnp.ones(()), {}  # a count of 1: no division

  monkeypatch.setattr(step, "transition_loss", loss)

  def run(valid, groups, separate, minibatch, steps=1):
    total = valid.shape[0] * (groups + separate)
    monkeypatch.setattr(
      rollout, "pool_rollout", lambda *a, **k: fake_rollout(jnp.asarray(valid), groups, separate)
    )
    optimizer = sgd(learning_rate=1.0)
    frozen = init()
    params = {"unet": {"uses": jnp.zeros(total)}}
    options = OPTIONS | {"minibatch": minibatch}
    go = jax.jit(step.spo_step(StubModel(), StubScorer(), SPO_LOSS, optimizer, **options))
    batch = {"input_ids": jnp.zeros((valid.shape[0], 5), jnp.int32)}
    state, given = state_of(params, optimizer), []
    for _ in range(steps):
      seen.clear()
      state, found = go(state, frozen, batch)
      jax.effects_barrier()
      given.append(list(seen))
    return -np.asarray(state.params["unet"]["uses"]), found, given

  return run


@pytest.mark.parametrize(
  ("prompts", "groups", "separate", "minibatch"),
  [(4, 15, 1, 20), (3, 4, 12, 5), (2, 4, 12, 100), (5, 3, 1, 1), (4, 16, 0, 20)],
)
def test_every_valid_transition_is_used_once_and_no_other(
  counting, prompts, groups, separate, minibatch
):
  valid = np.random.default_rng(prompts * minibatch).random((prompts, groups)) < 0.6
  uses, found, (seen,) = counting(valid, groups, separate, minibatch)
  later = valid[:, np.arange(separate) % groups]
  np.testing.assert_array_equal(uses, np.concatenate([valid.ravel(), later.ravel()]))
  assert found["updates"] == len(seen) // 2
  assert found["updates"] >= math.ceil(valid.sum() / minibatch)
  np.testing.assert_allclose(found["valid_pairs"], valid.mean(), rtol=1e-6)
  # Each transition with the prompt it was rolled out for.
  for index, prompt, _ in seen:
    offset = np.where(index >= prompts * groups, prompts * groups, 0)
    per_prompt = np.where(index >= prompts * groups, separate, groups)
    np.testing.assert_array_equal(prompt, (index - offset) // per_prompt)
  # Spread evenly: no update is left with a remainder.
  for part in (seen[::2], seen[1::2]):
    filled = [mask.sum() for _, _, mask in part]
    assert max(filled) - min(filled) <= 1


def test_an_update_that_is_not_finite_is_left_out_alone(counting, monkeypatch):
  """The one with transition 7; those of the other updates are used once, as ever."""
  loss = step.transition_loss

  def poisoned(model, pair_loss, weights, ref_weights, shared, separate, *args, **kwargs):
    total, count, found = loss(model, pair_loss, weights, ref_weights, shared, separate, *args, **kwargs)
    return total * jnp.where(jnp.any((shared[0].t == 7) & (shared[2] > 0)), jnp.nan, 1.0), count, found

  monkeypatch.setattr(step, "transition_loss", poisoned)
  uses, found, (seen,) = counting(np.ones((4, 15), bool), 15, 1, 20)
  assert found["skipped_updates"] == 1 and found["updates"] == 3
  assert np.isfinite(found["loss"]) and np.isfinite(found["grad_norm"])  # of the two others
  updates = [{int(i) for index, _, mask in seen[n : n + 2] for i in index[mask > 0]} for n in (0, 2, 4)]
  left_out = [used for used in updates if 7 in used]
  assert len(left_out) == 1
  np.testing.assert_array_equal(uses, [0 if i in left_out[0] else 1 for i in range(64)])


def test_the_order_is_shuffled_over_prompts_and_steps(counting):
  valid = np.ones((4, 15), bool)
  uses, _, given = counting(valid, 15, 1, 20, steps=2)
  assert (uses == 2).all()
  firsts = [np.sort(seen[0][0]) for seen in given]
  assert not np.array_equal(*firsts)
  for first in firsts:
    assert len(set(first // 15)) > 1 and len(set(first % 15)) > 5


# ---------------------------------------------------------------------------------------------
# SPO with a network


FROZEN = init()
PARAMS = {"unet": FROZEN["unet"]}
ADAMW = optim.make_optimizer(
  "adamw", optax.constant_schedule(1e-3), b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip_norm=1.0
)
PROMPTS = {"input_ids": pair_batch(8)["input_ids"]}
SPO_LOSS = objectives.pair_loss("sigmoid", beta=10.0)


def spo(optimizer=ADAMW, **options):
  constrain = options.pop("constrain", lambda tree: tree)
  update = options.pop("update_reference", None)
  return step.spo_step(
    StubModel(), StubScorer(), SPO_LOSS, optimizer, **OPTIONS | options, constrain=constrain,
    update_reference=update,
  )


def test_without_a_valid_pair_nothing_changes():
  """Not even by weight decay or momentum; the step counts."""
  start = state_of(PARAMS, ADAMW)
  state, found = jax.jit(spo(threshold=0.9999))(start, FROZEN, PROMPTS)
  assert found["valid_pairs"] == found["updates"] == found["grad_norm"] == 0
  assert equal(state.params, start.params)
  assert equal(state.opt_state, start.opt_state)
  assert state.step == 1
  np.testing.assert_allclose(found["loss"], math.log(2), rtol=1e-6)
  hinge = objectives.pair_loss("hinge", beta=10.0)
  undecided = step.spo_step(StubModel(), StubScorer(), hinge, ADAMW, **OPTIONS | {"threshold": 0.9999})
  assert jax.jit(undecided)(start, FROZEN, PROMPTS)[1]["loss"] == 1


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_make_the_same_updates(accumulation):
  """6 transitions in 2 and in 4 parts, of which the last is masked; the updates follow one another."""
  optimizer = sgd(clip_norm=1.0)
  (whole, found), (parts, found_parts) = (
    jax.jit(spo(optimizer, accumulation=n))(state_of(PARAMS, optimizer), FROZEN, PROMPTS) for n in (1, accumulation)
  )
  assert found["updates"] > 1
  assert not equal(whole.params, PARAMS)
  assert_close(parts.params, whole.params, 1e-6)
  for key in ("loss", "grad_norm", "margin", "updates"):
    np.testing.assert_allclose(found_parts[key], found[key], rtol=1e-4, atol=1e-7, err_msg=key)
  # Of a few dozen transitions, rounding may decide one.
  np.testing.assert_allclose(found_parts["implicit_accuracy"], found["implicit_accuracy"], atol=0.05)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_of_an_iteration_is_traced_once(accumulation, monkeypatch):
  """Tracing is most of a second start's time."""
  calls, loss = [], step.transition_loss
  monkeypatch.setattr(step, "transition_loss", lambda *args, **kwargs: calls.append(1) or loss(*args, **kwargs))
  jax.eval_shape(spo(accumulation=accumulation), state_of(PARAMS, ADAMW), FROZEN, PROMPTS)
  assert len(calls) == 1


@pytest.mark.parametrize("last, groups", [(False, 3), (True, 4)])  # single steps, with the last two as one, or not
def test_an_iteration_learns_and_reports(monkeypatch, last, groups):
  """From log 2 at the start; the next iteration starts where it ended, with other noise."""
  seen, winners, drawn = [], [], rollout.pool_rollout

  def pool_rollout(*args, **kwargs):
    pairs = drawn(*args, **kwargs)
    ends = (pairs.shared if last else pairs.separate).next_w[:, -1]
    jax.debug.callback(lambda latents: winners.append(np.array(latents)), ends)
    return pairs

  monkeypatch.setattr(rollout, "pool_rollout", pool_rollout)

  def update(ref_params, params, stats, step, frozen, batch, key):
    """Moves at the second step; the latents are those the divergence is measured on."""
    jax.debug.callback(lambda latents: seen.append(np.array(latents)), batch["latents"])
    return jax.tree.map(lambda r, p: jnp.where(step == 2, p, r), ref_params, params), stats

  run = jax.jit(spo(update_reference=update, pool_last_step=last))
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
  cases = ((False, FROZEN), (True, timeless), (True, FROZEN))
  of_images, without, aware = (
    jax.jit(spo(step_aware=step_aware))(start, frozen, PROMPTS)[1] for step_aware, frozen in cases
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), of_images, without)
  assert not np.allclose(of_images["reward_group"], aware["reward_group"], rtol=1e-2)


def test_pairs_may_be_chosen_by_smaller_pictures():
  """As by a model all of whose pictures are small."""

  class Small(StubModel):
    def decode(self, weights, latents, *, size=0):
      assert not size
      return super().decode(weights, latents, size=4)

  start = state_of(PARAMS, ADAMW)
  of = lambda model, **options: step.spo_step(model, StubScorer(), SPO_LOSS, ADAMW, **OPTIONS | options)
  (after, found), (same, expected), (_, whole) = (
    jax.jit(run)(start, FROZEN, PROMPTS) for run in (of(StubModel(), decode_size=4), of(Small()), of(StubModel()))
  )
  jax.tree.map(np.testing.assert_array_equal, (after.params, found), (same.params, expected))
  assert not np.allclose(found["reward_group"], whole["reward_group"], rtol=1e-2)


def test_updates_of_an_iteration_are_clipped():
  optimizer = sgd(learning_rate=1.0, clip_norm=1e-4)
  start = state_of(PARAMS, optimizer)
  state, found = jax.jit(spo(optimizer))(start, FROZEN, PROMPTS)
  moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, start.params))
  assert found["grad_norm"] > 1e-3
  assert 0.2e-4 < moved <= 1.001e-4 * found["updates"]


def test_one_group_of_two_trajectories_is_d3po():
  """One label for all steps after the shared first one; a pool of two whose group is all of the others."""
  model, scorer, prompts, steps = StubModel(), StubScorer(), 6, 5
  ids = PROMPTS["input_ids"][:prompts]
  cond, uncond = model.encode_text(FROZEN, ids), model.encode_empty(FROZEN, 1)
  text = objectives.embed_prompts(scorer, FROZEN["spm"], ids)

  def predict(x, t):
    return model.predict(FROZEN, x, t, jax.tree.map(lambda c: jnp.repeat(c, len(x) // prompts, axis=0), cond))

  def score(x0, t):
    of_rows = jnp.repeat(text, len(x0) // prompts, axis=0)
    return objectives.score_images(scorer, FROZEN["spm"], model.decode(FROZEN, x0), t, of_rows)

  start = jax.random.normal(jax.random.key(1), (prompts, *LATENT))
  draw = functools.partial(
    rollout.pool_rollout, predict, score, model.schedule, num_steps=steps, eta=1.0, warmup_steps=1, pool_size=2,
    inner_steps=steps - 2, threshold=0.0,
  )  # fmt: skip
  pairs = jax.jit(draw)(start, jax.random.key(2))
  assert pairs.shared.t.shape == (prompts, 1) and pairs.separate.t.shape == (prompts, steps - 2)
  assert pairs.shared.valid.all() and pairs.score_t.tolist() == [0]
  final = jax.jit(lambda x: score(x, jnp.zeros(prompts, jnp.int32)))
  for side, best in (("w", np.max), ("l", np.min)):
    end = getattr(pairs.separate, f"next_{side}")[:, -1]
    np.testing.assert_allclose(final(end), best(pairs.scores[:, 0], axis=1), rtol=1e-5, atol=1e-5)

  policy = {**FROZEN, "unet": jax.tree.map(lambda k: k * 1.02, FROZEN["unet"])}

  def taken(part):
    """Rows, the prompt of each, and a mask."""
    rows = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), part)
    return rows, jnp.repeat(jnp.arange(prompts), part.t.shape[1]), jnp.ones(part.t.size)

  of_spo = functools.partial(
    objectives.transition_loss, model, objectives.pair_loss("sigmoid", beta=0.1), cond=cond, uncond=uncond, eta=1.0,
    guidance_scale=1.0, ratio_clip=0.1,
  )  # fmt: skip
  loss, count, _ = jax.jit(of_spo)(policy, FROZEN, shared=taken(pairs.shared), separate=taken(pairs.separate))

  def log_prob(weights, part, i, side):
    x, after = getattr(part, f"x_{side}")[:, i], getattr(part, f"next_{side}")[:, i]
    pred = model.predict(weights, x, part.t[:, i], cond)
    mean, std = diffusion.ddim_mean_std(model.schedule, pred, x, part.t[:, i], part.prev_t[:, i], eta=1.0)
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
# GRPO and DDPO

GROUP, STEPS = 3, 4
POLICY = {
  "seed": 0,
  "num_inference_steps": STEPS,
  "eta": 1.0,
  "guidance_scale": 3.0,
  "group_size": GROUP,
  "advantage": "group",
  "advantage_clip": 5.0,
  "timestep_fraction": 1.0,
  "ratio_clip": 0.2,
  "kl_coef": 0.0,
  "minibatch": 1000,
}
FEW = {"input_ids": PROMPTS["input_ids"][:4]}


def grpo(optimizer=ADAMW, **options):
  return step.grpo_step(StubModel(), StubScorer(), optimizer, **POLICY | options)


@pytest.fixture
def counting_steps(monkeypatch):
  """Replaces rollout and loss, as `counting`; gives run(**options) -> (uses [samples, steps], metrics, updates)."""
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
    return rollout.Trajectories(jnp.concatenate([latents, x[:, None]], axis=1), t, t, number)

  monkeypatch.setattr(step, "policy_loss", loss)
  monkeypatch.setattr(rollout, "ddim_trajectories", trajectories)

  def run(**options):
    samples, steps = len(FEW["input_ids"]) * GROUP, POLICY["num_inference_steps"]
    optimizer = sgd(learning_rate=1.0)
    state = state_of({"unet": {"uses": jnp.zeros(samples * steps)}}, optimizer)
    seen.clear()
    state, found = jax.jit(grpo(optimizer, **options))(state, FROZEN, FEW)
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
  assert [step.trained_steps(n, f) for n, f in ((20, 0.6), (50, 0.29), (10, 0.99), (3, 0.1))] == [12, 14, 10, 1]


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
  key = jax.random.fold_in(jax.random.key(POLICY["seed"]), 0)
  xs = [jax.random.normal(objectives.named_key(key, "x_T"), (samples, *LATENT))]
  for k, (t, prev_t) in zip(jax.random.split(objectives.named_key(key, "rollout"), STEPS), TIMES, strict=True):
    mean, std = ddim_mean(guided_prediction(weights, xs[-1], t, ids), xs[-1], t, prev_t)
    xs.append(mean + std * jax.random.normal(k, xs[-1].shape))
  text = jnp.repeat(scorer.text_embeds(FROZEN["spm"], ids), GROUP, axis=0)
  images = jnp.clip(model.decode(FROZEN, xs[-1]), -1, 1)
  pixels = objectives.preprocess(images, 8)
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
  state, found = jax.jit(grpo(optimizer, **options))(start, FROZEN, FEW)
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
  _, found = jax.jit(grpo(still, minibatch=5, ratio_clip=1e-5))(state_of(PARAMS, still), FROZEN, FEW)
  assert found["updates"] > 1 and found["clip_fraction"] == 0
  np.testing.assert_allclose(found["ratio"], 1.0, atol=1e-6)


def test_without_a_coefficient_the_reference_is_not_called():
  """With one, a reference of NaN spoils every update, and none is made."""
  start = state_of(PARAMS, ADAMW, jax.tree.map(lambda k: k * jnp.nan, PARAMS))
  state, found = jax.jit(grpo(minibatch=20, kl_coef=0.1))(start, FROZEN, FEW)
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
    loss = jax.make_jaxpr(lambda p, ref, *rest, kl_coef=kl_coef: objectives.policy_loss(
      Counting(), {**FROZEN, **p}, {**FROZEN, **ref}, *rest, eta=1.0, guidance_scale=1.0, ratio_clip=0.1,
      kl_coef=kl_coef,
    ))  # fmt: skip
    x, ones = jnp.zeros((2, *LATENT)), jnp.ones(2)
    steps = rollout.Steps(x, x, jnp.array([751, 1]), jnp.array([501, 0]), ones, ones, ones > 0)
    cond = StubModel().encode_text(FROZEN, FEW["input_ids"])
    loss(PARAMS, PARAMS, (steps, jnp.arange(2), ones), cond, cond)
  assert [len(calls[kl_coef]) for kl_coef in (0.0, 0.1)] == [1, 2]


def test_micro_batches_of_steps_make_the_same_updates():
  optimizer = sgd(clip_norm=1.0)
  options = {"minibatch": 10, "kl_coef": 0.1}
  (whole, found), (parts, found_parts) = (
    jax.jit(grpo(optimizer, accumulation=n, **options))(state_of(PARAMS, optimizer), FROZEN, FEW)
    for n in (1, 4)
  )
  assert found["updates"] == 5 and not equal(whole.params, PARAMS)
  assert_close(parts.params, whole.params, 1e-5)
  for key in ("loss", "grad_norm", "ratio", "kl", "updates"):
    np.testing.assert_allclose(found_parts[key], found[key], rtol=1e-3, atol=1e-6, err_msg=key)


def test_the_reference_is_moved_by_the_best_samples_and_seed_and_step_decide_everything():
  seen = []

  def update(ref_params, params, stats, step, frozen, batch, key):
    jax.debug.callback(lambda latents: seen.append(np.array(latents)), batch["latents"])
    return jax.tree.map(lambda r, p: jnp.where(step == 2, p, r), ref_params, params), stats

  run = jax.jit(grpo(minibatch=20, kl_coef=0.1, ratio_clip=1e-5, update_reference=update))
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
  run = jax.jit(step.grpo_step(StubModel(), Brightness(), optimizer, **POLICY | many | options))

  def unseen(params):
    state = dataclasses.replace(state_of(params, optimizer), step=jnp.int32(1000))
    return float(run(state, FROZEN, FEW)[1]["reward"])

  state, rewards = state_of(PARAMS, optimizer), []
  for _ in range(10):
    state, found = run(state, FROZEN, FEW)
    rewards.append(float(found["reward"]))
  assert found["updates"] == 2
  assert rewards[-1] > rewards[0] + 1.0 and unseen(state.params) > unseen(PARAMS) + 1.0, rewards


# ---------------------------------------------------------------------------------------------
# The same on any mesh

MESHES = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 1)]


@pytest.fixture
def small_pieces(monkeypatch):
  monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 64)


def on_mesh(sizes, make_step, batch, steps=1):
  """State and metrics after some steps, jitted as the trainer does."""
  mesh = sharding.make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
  state = state_of(PARAMS, ADAMW)
  shardings = sharding.tree_shardings(mesh, state)
  state = jax.device_put(state, shardings)
  frozen = sharding.put_tree(mesh, FROZEN)
  run = jax.jit(make_step(mesh), donate_argnums=0, out_shardings=(shardings, None))
  for _ in range(steps):
    state, found = run(state, frozen, sharding.put_batch(mesh, batch))
  split = [s for s in jax.tree.leaves(shardings.params) if not s.is_fully_replicated]
  assert bool(split) == (sizes[1] > 1)
  return jax.device_get((state.params, found))


@functools.cache
def offline_on(sizes):
  objective = objectives.dpo(StubModel(), objectives.denoised_loss("sigmoid", beta=50.0))

  def make_step(mesh):
    return step.offline_step(objective, ADAMW, seed=0, accumulation=2)

  return on_mesh(sizes, make_step, pair_batch(8), steps=2)


@functools.cache
def online_on(sizes):
  def make_step(mesh):
    rows = sharding.batch_sharding(mesh)
    return spo(
      constrain=lambda tree: jax.lax.with_sharding_constraint(tree, rows),
      row_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
      minibatch=10,
    )

  return on_mesh(sizes, make_step, PROMPTS)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_dpo_is_the_same_on_every_mesh(sizes):
  params, found = offline_on(sizes)
  expected, expected_found = offline_on(MESHES[0])
  assert_close(params, expected, 1e-5)
  for name in ("loss", "grad_norm", "error_w", "valid_pairs"):
    np.testing.assert_allclose(found[name], expected_found[name], rtol=1e-4)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_spo_is_the_same_on_every_mesh(sizes):
  """The same pairs, in minibatches that do not divide the devices."""
  params, found = online_on(sizes)
  expected, expected_found = online_on(MESHES[0])
  assert 0 < expected_found["valid_pairs"] < 1
  assert found["valid_pairs"] == expected_found["valid_pairs"]
  assert found["updates"] == expected_found["updates"]
  np.testing.assert_allclose(found["reward_group"], expected_found["reward_group"], rtol=1e-4)
  # Another pair would change parameters by 5e-3. AdamW makes a step of its own size of gradients that are rounding.
  assert_close(params, expected, 1e-4)


@functools.cache
def policy_gradient_on(sizes):
  def make_step(mesh):
    rows = sharding.batch_sharding(mesh)
    return grpo(
      constrain=lambda tree: jax.lax.with_sharding_constraint(tree, rows),
      row_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
      minibatch=10,
      kl_coef=0.1,
      timestep_fraction=0.5,
    )

  return on_mesh(sizes, make_step, PROMPTS)


@pytest.mark.usefixtures("small_pieces")
def test_grpo_is_the_same_on_a_mesh():
  """Minibatches that do not divide the devices."""
  params, found = policy_gradient_on((2, 2, 1))
  expected, expected_found = policy_gradient_on(MESHES[0])
  assert found["updates"] == expected_found["updates"] == 5
  for name in ("reward", "score_gap", "kl"):
    np.testing.assert_allclose(found[name], expected_found[name], rtol=1e-4, atol=1e-7)
  assert_close(params, expected, 1e-5)
