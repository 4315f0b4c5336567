"""The moving reference against numpy, its gate case by case, and under sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpref import reference
from jaxpref.reference import ReferenceStats


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tree_of(seed):
  return {"block": {"kernel": jnp.asarray(draw(seed, 8, 4))}, "bias": jnp.asarray(draw(seed, 8))}


def assert_trees(x, y, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)


def equal(x, y):
  return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.all(a == b)), x, y)))


REF, PARAMS, INIT = tree_of(0), tree_of(1), tree_of(2)
ZEROS = jax.tree.map(jnp.zeros_like, REF)

# ---------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize(("alpha", "rho"), [(1.0, 0.0), (0.3, 0.0), (1.0, 0.2), (0.05, 0.01)])
def test_proposal_equals_its_formula(alpha, rho):
  out = reference.propose(REF, PARAMS, INIT, alpha=alpha, rho=rho)
  expected = jax.tree.map(
    lambda r, p, i: (1 - alpha - rho) * np.float64(r) + alpha * np.float64(p) + rho * np.float64(i),
    REF,
    PARAMS,
    INIT,
  )
  assert_trees(out, expected, rtol=1e-5, atol=1e-6)


def test_hard_update_copies_bit_for_bit_and_agreement_is_a_fixed_point():
  assert equal(reference.propose(REF, PARAMS), PARAMS)
  assert equal(reference.propose(REF, REF, REF, alpha=0.3, rho=0.2), REF)


def test_zero_adapter_is_the_default_anchor():
  out = reference.propose(REF, PARAMS, None, alpha=0.5, rho=0.1)
  assert_trees(out, reference.propose(REF, PARAMS, ZEROS, alpha=0.5, rho=0.1), rtol=1e-6)
  assert_trees(out, jax.tree.map(lambda r, p: 0.4 * r + 0.5 * p, REF, PARAMS), rtol=1e-5, atol=1e-6)


def test_small_steps_add_up_in_float32_where_bfloat16_stalls():
  """1,000 steps of 1e-3 from 1.0 towards 1.5: 1.5 - 0.5 * 0.999^1000, not 1.0."""
  theta = {"w": jnp.full(3, 1.5, jnp.bfloat16)}
  start = reference.init_reference({"w": jnp.ones(3, jnp.bfloat16)})

  @functools.partial(jax.jit, static_argnums=1)
  def run(ref, step):
    return jax.lax.fori_loop(0, 1000, lambda _, r: step(r), ref)

  ours = run(start, lambda r: reference.propose(r, theta, alpha=1e-3))["w"]
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, 1.5 - 0.5 * 0.999**1000, rtol=1e-4)
  naive = run(jnp.ones(3, jnp.bfloat16), lambda r: r + jnp.bfloat16(1e-3) * (theta["w"] - r))
  np.testing.assert_array_equal(np.float32(naive), 1.0)


def test_a_reference_that_would_stall_is_refused_by_name():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), REF)
  with pytest.raises(ValueError, match=r"leaf \['bias'\] is bfloat16, expected float32"):
    reference.propose(half, PARAMS, INIT)


def test_init_reference_copies_into_float32():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  ref = reference.init_reference(params)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ref))
  assert equal(ref, params)
  # Of float32 parameters as well a copy: donating both must not donate one buffer twice.
  copy = reference.init_reference(PARAMS)
  pointers = lambda t: {x.unsafe_buffer_pointer() for x in jax.tree.leaves(t)}  # noqa: E731
  assert not pointers(copy) & pointers(PARAMS)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"alpha": 0.0}, "alpha is 0.0"),
    ({"alpha": 1.5}, "alpha is 1.5"),
    ({"rho": -0.1}, "rho is -0.1"),
    ({"tau": 0}, "tau is 0"),
    ({"delta": -1.0}, "delta is -1.0"),
    ({"delta": float("nan")}, "delta is nan"),
    ({"on_diverge": "stop"}, "on_diverge is 'stop', expected one of freeze, reinit"),
    ({"mode": "ema"}, "mode is 'ema', expected one of update, frozen"),
    ({"gate": "policy"}, "gate is 'policy', expected one of proposal, reference"),
    ({"decay": 1.0}, "decay is 1.0"),
  ],
)
def test_settings_out_of_range_are_refused_by_name(kwargs, message):
  with pytest.raises(ValueError, match=message):
    reference.update(REF, PARAMS, INIT, ReferenceStats.zeros(), step=1, divergence_fn=lambda _: 0.0, **kwargs)


def test_trees_that_do_not_match_are_refused():
  with pytest.raises(ValueError, match="params and the reference are different trees"):
    reference.propose(REF, {"bias": PARAMS["bias"]})
  with pytest.raises(ValueError, match=r"init leaf \['bias'\] has shape \(1,\)"):
    reference.propose(REF, PARAMS, {**INIT, "bias": jnp.zeros(1)})


# ---------------------------------------------------------------------------------------------
# The gate


def test_divergence_is_the_mean_difference_over_what_counts():
  ref, init = np.array([0.3, 0.5, 0.7]), np.array([0.2, 0.1, np.nan])
  mask = jnp.array([1.0, 1.0, 0.0])
  np.testing.assert_allclose(reference.divergence(ref, init, mask), 0.25, rtol=1e-6)
  np.testing.assert_allclose(reference.divergence(ref[:2], init[:2]), 0.25, rtol=1e-6)
  # It grows as the reference denoises worse than the pre-trained model.
  assert reference.divergence(2 * ref[:2], init[:2]) > 0.25
  assert reference.divergence(jnp.ones(2, jnp.bfloat16), jnp.ones(2)).dtype == jnp.float32
  with pytest.raises(ValueError, match=r"errors and mask \[B\]"):
    reference.divergence(jnp.ones(2), jnp.ones(1))


@pytest.mark.parametrize("on_diverge", reference.ON_DIVERGE)
@pytest.mark.parametrize(
  ("step", "measured", "moves"),
  [
    (32, 0.001, "accepted"),
    (64, 0.0078125, "accepted"),  # equal to delta
    (32, 0.0079, "refused"),
    (32, float("nan"), "refused"),
    (33, 0.001, "not due"),
    (33, 1.0, "not due"),
  ],
)
def test_gate_case_by_case(step, measured, moves, on_diverge):
  settings = dict(alpha=0.5, rho=0.1, tau=32, delta=0.0078125, on_diverge=on_diverge)
  refused = REF if on_diverge == "freeze" else INIT
  expected = {
    "accepted": reference.propose(REF, PARAMS, INIT, alpha=0.5, rho=0.1),
    "refused": refused,
    "not due": REF,
  }[moves]
  ref, accepted = reference.gated_update(REF, PARAMS, INIT, step=step, divergence=measured, **settings)
  assert equal(ref, expected) and bool(accepted) == (moves == "accepted")
  ref, stats = reference.update(
    REF,
    PARAMS,
    INIT,
    ReferenceStats.zeros(),
    step=step,
    divergence_fn=lambda _: measured,
    **settings,
  )
  if moves == "accepted":  # compiled, the same arithmetic may round differently
    assert_trees(ref, expected, rtol=1e-5, atol=1e-6)
  else:
    assert equal(ref, expected)
  counts = (int(stats.proposals), int(stats.accepted), int(stats.resets))
  reset = int(on_diverge == "reinit")
  assert counts == {"accepted": (1, 1, 0), "refused": (1, 0, reset), "not due": (0, 0, 0)}[moves]
  assert np.isfinite(stats.divergence)


def test_frozen_mode_is_free():
  """Neither the proposal nor the divergence is traced: not even invalid ones are noticed."""

  def never(_):
    raise AssertionError("measured in frozen mode")

  stats = ReferenceStats.zeros()
  out = reference.update(REF, None, None, stats, step=32, divergence_fn=never, mode="frozen", alpha=7.0)
  assert out[0] is REF and out[1] is stats


@functools.partial(jax.jit, static_argnames=("on_diverge", "gate", "decay", "tau"))
def jitted_update(ref, params, init, stats, step, table, **settings):
  """A divergence read from a table at the tree's first bias, which names the tree measured."""
  measured = lambda tree: table[tree["bias"][0].astype(jnp.int32)]  # noqa: E731
  return reference.update(ref, params, init, stats, step=step, divergence_fn=measured, delta=0.5, **settings)


def test_divergence_is_evaluated_on_update_steps_only():
  calls = []

  @jax.jit
  def step(ref, stats, i):
    def measured(tree):
      jax.debug.callback(lambda n: calls.append(int(n)), i)
      return jnp.zeros(())

    return reference.update(ref, PARAMS, INIT, stats, step=i, divergence_fn=measured, tau=4, alpha=0.5)

  ref, stats = REF, ReferenceStats.zeros()
  for i in range(1, 11):
    ref, stats = step(ref, stats, i)
  jax.effects_barrier()
  assert calls == [4, 8]
  assert (int(stats.proposals), int(stats.accepted), int(stats.estimates)) == (2, 2, 2)
  assert_trees(ref, jax.tree.map(lambda r, p: 0.25 * r + 0.75 * p, REF, PARAMS), rtol=1e-5)


def named(i):
  return {"bias": jnp.full(2, i, jnp.float32)}


@pytest.mark.parametrize(
  ("gate", "table", "moves"),
  [
    ("proposal", [0.0, 0.9, 9.0], False),
    ("proposal", [0.9, 0.1, 9.0], True),
    ("reference", [0.0, 0.9, 9.0], True),
    ("reference", [0.9, 0.1, 9.0], False),
  ],
)
def test_gate_measures_the_tree_it_is_told_to(gate, table, moves):
  """Trees are named 0 (reference), 1 (policy, so the hard proposal) and 2 (init)."""
  ref, stats = jitted_update(
    named(0),
    named(1),
    named(2),
    ReferenceStats.zeros(),
    1,
    jnp.asarray(table),
    on_diverge="freeze",
    gate=gate,
    decay=0.0,
    tau=1,
  )
  assert ref["bias"][0] == (1 if moves else 0) and bool(stats.accepted) == moves


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_running_divergence_is_a_weighted_mean_without_bias(decay):
  """Weights decay^age, normalised: the first measurement counts fully, not by 1 - decay."""
  measured = np.abs(draw(5, 6)) + 0.01
  stats, running = ReferenceStats.zeros(), []
  for i, value in enumerate(measured):
    _, stats = jitted_update(
      named(0),
      named(1),
      named(2),
      stats,
      i,
      jnp.asarray([0.0, value]),
      on_diverge="freeze",
      gate="proposal",
      decay=decay,
      tau=1,
    )
    running.append(float(stats.divergence))
    weights = decay ** np.arange(i, -1, -1.0)
    expected = np.sum(weights * measured[: i + 1]) / np.sum(weights)
    np.testing.assert_allclose(running[-1], expected, rtol=1e-5)
  np.testing.assert_allclose(running[0], measured[0], rtol=1e-6)


def test_gate_reads_the_running_mean_and_passes_over_nan():
  stats, accepted, running = ReferenceStats.zeros(), [], []
  for i, value in enumerate([0.1, 0.8, np.nan, 0.9, 0.0]):  # delta is 0.5
    before = int(stats.accepted)
    _, stats = jitted_update(
      named(0),
      named(1),
      named(2),
      stats,
      i,
      jnp.asarray([0.0, value]),
      on_diverge="freeze",
      gate="proposal",
      decay=0.9,
      tau=1,
    )
    accepted.append(int(stats.accepted) - before)
    running.append(float(stats.divergence))
  # The second alone is beyond delta, its mean with the first (0.47) is not.
  assert accepted == [1, 1, 0, 0, 1]
  assert running[2] == running[1] and int(stats.estimates) == 4 and int(stats.proposals) == 5


def test_reset_goes_to_the_pretrained_weights_and_starts_a_new_mean():
  run = functools.partial(jitted_update, on_diverge="reinit", gate="proposal", decay=0.9, tau=1)
  ref, stats = run(named(0), named(1), named(2), ReferenceStats.zeros(), 1, jnp.asarray([0.0, 9.0]))
  assert ref["bias"][0] == 2.0
  assert (int(stats.resets), int(stats.estimates), float(stats.divergence)) == (1, 0, 0.0)
  ref, stats = run(ref, named(1), named(2), stats, 2, jnp.asarray([0.0, 0.25]))
  assert ref["bias"][0] == 1.0
  assert (int(stats.accepted), int(stats.resets), float(stats.divergence)) == (1, 1, 0.25)


def test_reset_without_init_is_the_zero_adapter():
  ref, accepted = reference.gated_update(REF, PARAMS, None, step=32, divergence=9.0, on_diverge="reinit")
  assert equal(ref, ZEROS) and not accepted


# ---------------------------------------------------------------------------------------------
# Sharding


def test_update_keeps_shardings_and_values_on_sharded_trees():
  if jax.device_count() < 4:
    pytest.skip("needs 4 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("fsdp",))
  shardings = {
    "block": {"kernel": NamedSharding(mesh, PartitionSpec("fsdp", None))},
    "bias": NamedSharding(mesh, PartitionSpec("fsdp")),
  }
  put = lambda tree: jax.tree.map(jax.device_put, tree, shardings)  # noqa: E731

  @jax.jit
  def step(ref, params, init, stats):
    # A measurement that needs every shard, as a model's does.
    total = lambda tree: 1e-3 * jnp.abs(sum(x.sum() for x in jax.tree.leaves(tree)))  # noqa: E731
    return reference.update(ref, params, init, stats, step=8, divergence_fn=total, tau=4, alpha=0.3, rho=0.1, delta=1.0)

  ref, stats = step(put(REF), put(PARAMS), put(INIT), ReferenceStats.zeros())
  assert int(stats.accepted) == 1
  for leaf, sharding in zip(jax.tree.leaves(ref), jax.tree.leaves(shardings), strict=True):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  plain, plain_stats = step(REF, PARAMS, INIT, ReferenceStats.zeros())
  assert_trees(ref, plain, rtol=1e-6)
  np.testing.assert_allclose(stats.divergence, plain_stats.divergence, rtol=1e-5)
  assert_trees(plain, reference.propose(REF, PARAMS, INIT, alpha=0.3, rho=0.1), rtol=1e-5, atol=1e-6)


def test_stats_are_a_pytree_of_separate_scalars():
  stats = ReferenceStats.zeros()
  leaves = jax.tree.leaves(stats)
  assert [x.dtype.name for x in leaves] == ["float32"] + ["int32"] * 4
  assert len({x.unsafe_buffer_pointer() for x in leaves}) == 5


# ---------------------------------------------------------------------------------------------
# LoRA


def adapter(seed):
  return {
    "q": {"lora_A": jnp.asarray(draw(seed, 8, 2)), "lora_B": jnp.asarray(draw(seed + 1, 2, 6))},
    "stack": {  # scanned layers carry a leading axis
      "lora_A": jnp.asarray(draw(seed + 2, 3, 8, 2)),
      "lora_B": jnp.asarray(draw(seed + 3, 3, 2, 6)),
    },
  }


def dense(tree):
  return {k: np.float64(v["lora_A"]) @ np.float64(v["lora_B"]) for k, v in tree.items()}


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_averaging_products_is_exact_and_averaging_factors_is_off_by_the_gap(alpha):
  old, new = adapter(10), adapter(20)
  expected = jax.tree.map(lambda a, b: (1 - alpha) * a + alpha * b, dense(old), dense(new))
  exact = reference.propose(reference.lora_delta(old), reference.lora_delta(new), alpha=alpha)
  assert_trees(exact, expected, rtol=1e-4, atol=1e-5)
  factors = dense(reference.propose(old, new, alpha=alpha))
  norm = lambda tree: np.sqrt(sum((x**2).sum() for x in tree.values()))  # noqa: E731
  gap = norm(jax.tree.map(lambda a, b: a - b, factors, expected)) / norm(expected)
  assert gap > 0.1 or alpha == 1.0
  np.testing.assert_allclose(reference.lora_average_gap(old, new, alpha=alpha), gap, rtol=1e-4, atol=1e-6)


def test_hard_update_of_an_adapter_is_exact_in_its_factors():
  old, new = adapter(10), adapter(20)
  assert equal(reference.propose(old, new, alpha=1.0), new)
  assert reference.lora_average_gap(old, new, alpha=1.0) == 0.0
  assert reference.lora_average_gap(old, old, alpha=0.5) == 0.0
