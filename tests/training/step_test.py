"""One update: accumulation, clipping, minibatches of online methods, the moving reference, and any mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import diffusion
from jaxpref.devices import sharding
from jaxpref.objectives import kto, pairs, pools, spo
from jaxpref.objectives.base import named_key
from jaxpref.rewards.base import Scores
from jaxpref.training import step
from tests.stub_model import LATENT, StubModel, draw, init, pair_batch
from tests.toy_objective import Toy
from tests.updates import (
  ADAMW,
  FROZEN,
  PARAMS,
  PROMPTS,
  assert_close,
  equal,
  grpo_step,
  sgd,
  spo_step,
  state_of,
)

# ---------------------------------------------------------------------------------------------
# Offline


def regression(w, batch, key):
  """Masked least squares: sums, not means, and nothing random."""
  del key
  error = (batch["x"] @ w.policy["w"] - batch["y"]) ** 2
  weighted = jnp.where(batch["mask"] > 0, error * batch["mask"], 0.0)
  pairs = {"error": (jnp.sum(weighted), jnp.sum(batch["mask"]))}
  return jnp.sum(weighted), jnp.sum(batch["mask"]), pairs


REGRESSION = Toy(regression, lambda w, batch, key: 0.0)
WEIGHTS = {"w": jnp.asarray(draw(0, 3))}


def regression_batch(mask):
  return {"x": draw(1, 8, 3), "y": draw(2, 8), "mask": np.float32(mask)}


@pytest.mark.parametrize("mask", [[1] * 8, [1, 0, 0, 0, 1, 1, 0, 1], [1, 0.25, 0, 0, 0.5, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_accumulation_changes_nothing(mask, clip_norm):
  """Four micro-batches, some without a valid row: divided once, by the global count."""
  batch, optimizer = regression_batch(mask), sgd(clip_norm=clip_norm)
  results = []
  for accumulation in (1, 2, 4):
    run = jax.jit(step.make_step(REGRESSION, optimizer, seed=0, accumulation=accumulation))
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
  run = jax.jit(step.make_step(REGRESSION, optimizer, seed=0))
  state, batch = state_of(WEIGHTS, optimizer), regression_batch([1] * 8)
  for _ in range(3):
    before = state.params["w"]
    state, found = run(state, {}, batch)
    assert found["grad_norm"] > 0.1  # of the gradient as it was
    np.testing.assert_allclose(np.linalg.norm(state.params["w"] - before), 0.01, rtol=1e-4)


def test_a_batch_without_any_valid_row_stops_nothing():
  """All ties: no gradient, and a loss that is a number."""
  optimizer = sgd()
  run = jax.jit(step.make_step(REGRESSION, optimizer, seed=0))
  state, found = run(state_of(WEIGHTS, optimizer), {}, regression_batch([0] * 8))
  np.testing.assert_array_equal(state.params["w"], WEIGHTS["w"])
  assert state.step == 1
  assert np.isfinite(found["loss"]) and found["grad_norm"] == 0
  assert np.isnan(found["error"])  # nothing was counted, which is not 0


def test_randomness_follows_from_seed_and_step():
  """Resuming at a step draws what an uninterrupted run would, not what the first step drew."""

  def loss(w, batch, key):
    value = jax.random.uniform(key) + 0 * jnp.sum(w.policy["w"])
    return value, jnp.ones(()), {}

  optimizer = sgd()
  draws = {}
  for seed in (0, 1):
    run = jax.jit(step.make_step(Toy(loss), optimizer, seed=seed))
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

  moving = step.MovingReference(alpha=1.0, rho=0.0, tau=3, delta=0.005, on_diverge="freeze", decay=0.5)
  run = jax.jit(step.make_step(REGRESSION, optimizer, seed=0, moving=moving))
  state, batch = state_of(WEIGHTS, optimizer), regression_batch([1] * 8)
  held = WEIGHTS
  for done in range(1, 8):
    state, found = run(state, WEIGHTS, batch)
    if done % 3 == 0:
      held = jax.tree.map(np.asarray, state.params)  # after the update of the same step
    assert equal(state.ref_params, held), done
    assert found["reference_updates"] == done // 3
    assert not equal(state.params, state.ref_params) or done % 3 == 0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("value", [np.nan, 1e18], ids=["loss", "gradient alone"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(value, accumulation):
  """Neither parameters nor moments nor the reference, though its turn has come; the next step goes on as if alone."""
  objective = Toy(regression, lambda w, batch, key: 9.0)
  moving = step.MovingReference(alpha=1.0, rho=0.0, tau=1, delta=0.005, on_diverge="reinit", decay=0.5)
  run = jax.jit(step.make_step(objective, ADAMW, seed=0, accumulation=accumulation, moving=moving))
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
  run = jax.jit(step.make_step(kto.DiffusionKTO(model, beta=beta), optimizer, seed=4, accumulation=accumulation))
  state, found = run(state_of(params, optimizer, ref_params), frozen, batch)

  key = named_key(jax.random.fold_in(jax.random.key(4), 0), "loss")
  parts = [
    ({k: v[i::accumulation] for k, v in batch.items()}, k) for i, k in enumerate(jax.random.split(key, accumulation))
  ]

  def gains(params):
    """err_ref - err of each image, written out."""
    rows = []
    for part, k in parts:
      x0 = model.encode_images(frozen, part["pixels"], None)
      t = diffusion.sample_timesteps(named_key(k, "t"), len(x0), num_train_timesteps=1000)
      noise = jax.random.normal(named_key(k, "noise"), x0.shape)
      abar = jnp.asarray(model.process.schedule.alphas_cumprod)[t][:, None, None, None]
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

  def loss(w, batch, key):
    t = drawn(key, batch["row"].shape[0])
    jax.debug.callback(lambda row, t: seen.append((row.tolist(), t.tolist())), batch["row"], t)
    return jnp.sum(w.policy["w"]) * 0.0, jnp.float32(1), {}

  objective = Toy(loss, timesteps=drawn)
  optimizer = sgd()
  run = jax.jit(step.make_step(objective, optimizer, seed=5, accumulation=accumulation))
  state = dataclasses.replace(state_of(WEIGHTS, optimizer), step=jnp.int32(7))
  jax.block_until_ready(run(state, {}, {"row": jnp.arange(6)}))
  jax.effects_barrier()
  t = step.timesteps(objective, 6, seed=5, step=7, accumulation=accumulation)
  assert {row: t for rows, ts in seen for row, t in zip(rows, ts, strict=True)} == dict(enumerate(t.tolist()))
  assert step.timesteps(Toy(loss), 6, seed=5, step=7) is None


# ---------------------------------------------------------------------------------------------
# Online: which transitions an iteration of SPO uses


def fake_rollout(valid, groups, separate):
  """Transitions that carry their own number; validity as given, for [B, G] and [B, S]."""
  prompts = valid.shape[0]

  def part(count, valid, start):
    number = jnp.arange(prompts * count, dtype=jnp.float32).reshape(prompts, count) + start
    x = jnp.broadcast_to(number[..., None, None, None], (prompts, count, *LATENT))
    return pools.Transitions(x, x, x, x, *[number.astype(jnp.int32)] * 2, valid)

  shared = part(groups, valid, 0)
  later = part(separate, valid[:, jnp.arange(separate) % groups], prompts * groups)
  scores = jnp.broadcast_to(jnp.arange(2.0)[None, None], (prompts, groups, 2))
  return pools.PoolRollout(
    shared, later, jnp.zeros((prompts, *LATENT)), Scores(scores, {}), jnp.zeros(groups, jnp.int32)
  )


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
      jax.debug.callback(lambda *v: seen.append([np.array(x) for x in v]), index, prompt, mask, ordered=True)
    return total, jnp.ones(()), {}  # a count of 1: no division

  monkeypatch.setattr(spo, "transition_loss", loss)

  def run(valid, groups, separate, minibatch, steps=1):
    total = valid.shape[0] * (groups + separate)
    monkeypatch.setattr(spo, "pool_rollout", lambda *a, **k: fake_rollout(jnp.asarray(valid), groups, separate))
    optimizer = sgd(learning_rate=1.0)
    frozen = init()
    params = {"unet": {"uses": jnp.zeros(total)}}
    go = jax.jit(spo_step(optimizer, minibatch=minibatch))
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
def test_every_valid_transition_is_used_once_and_no_other(counting, prompts, groups, separate, minibatch):
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
  loss = spo.transition_loss

  def poisoned(model, pair_loss, weights, ref_weights, shared, separate, *args, **kwargs):
    total, count, found = loss(model, pair_loss, weights, ref_weights, shared, separate, *args, **kwargs)
    return total * jnp.where(jnp.any((shared[0].t == 7) & (shared[2] > 0)), jnp.nan, 1.0), count, found

  monkeypatch.setattr(spo, "transition_loss", poisoned)
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
# Online, with a network


@pytest.mark.parametrize("accumulation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_make_the_same_updates(accumulation):
  """6 transitions in 2 and in 4 parts, of which the last is masked; the updates follow one another."""
  optimizer = sgd(clip_norm=1.0)
  (whole, found), (parts, found_parts) = (
    jax.jit(spo_step(optimizer, accumulation=n))(state_of(PARAMS, optimizer), FROZEN, PROMPTS)
    for n in (1, accumulation)
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
  calls, loss = [], spo.transition_loss
  monkeypatch.setattr(spo, "transition_loss", lambda *args, **kwargs: calls.append(1) or loss(*args, **kwargs))
  jax.eval_shape(spo_step(accumulation=accumulation), state_of(PARAMS, ADAMW), FROZEN, PROMPTS)
  assert len(calls) == 1


def test_updates_of_an_iteration_are_clipped():
  optimizer = sgd(learning_rate=1.0, clip_norm=1e-4)
  start = state_of(PARAMS, optimizer)
  state, found = jax.jit(spo_step(optimizer))(start, FROZEN, PROMPTS)
  moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, start.params))
  assert found["grad_norm"] > 1e-3
  assert 0.2e-4 < moved <= 1.001e-4 * found["updates"]


# ---------------------------------------------------------------------------------------------
# The same on any mesh

ONE, BOTH, OTHERS = (1, 1, 1), (2, 2, 1), [(4, 1, 1), (1, 4, 1)]


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
  objective = pairs.DiffusionDPO(StubModel(), pairs.denoised_loss("sigmoid", beta=50.0))

  def make_step(mesh):
    return step.make_step(objective, ADAMW, seed=0, accumulation=2)

  return on_mesh(sizes, make_step, pair_batch(8), steps=2)


@functools.cache
def online_on(sizes):
  def make_step(mesh):
    rows = sharding.batch_sharding(mesh)
    return spo_step(
      constrain=lambda tree: jax.lax.with_sharding_constraint(tree, rows),
      row_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
      minibatch=10,
    )

  return on_mesh(sizes, make_step, PROMPTS)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("sizes", [BOTH, *OTHERS], ids=str)
def test_dpo_is_the_same_on_every_mesh(sizes):
  params, found = offline_on(sizes)
  expected, expected_found = offline_on(ONE)
  assert_close(params, expected, 1e-5)
  for name in ("loss", "grad_norm", "error_w", "valid_pairs"):
    np.testing.assert_allclose(found[name], expected_found[name], rtol=1e-4)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("sizes", [BOTH, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in OTHERS)], ids=str)
def test_spo_is_the_same_on_every_mesh(sizes):
  """The same pairs, in minibatches that do not divide the devices."""
  params, found = online_on(sizes)
  expected, expected_found = online_on(ONE)
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
    return grpo_step(
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
  params, found = policy_gradient_on(BOTH)
  expected, expected_found = policy_gradient_on(ONE)
  assert found["updates"] == expected_found["updates"] == 5
  for name in ("reward", "score_gap", "kl"):
    np.testing.assert_allclose(found[name], expected_found[name], rtol=1e-4, atol=1e-7)
  assert_close(params, expected, 1e-5)
