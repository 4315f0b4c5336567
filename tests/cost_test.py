"""What a training step costs, by counting and not by the clock: network evaluations, operations, bytes, nothing twice.

Where a change lowers or raises a count of tests/cost.json for a reason, write the file anew:

    RECORD_COST=1 python -m pytest tests/cost_test.py
"""

import dataclasses
import functools
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref.devices import sharding
from jaxpref.objectives import catalog, kto, lpo, pairs, spo
from jaxpref.planning import flops, hlo, plan
from jaxpref.training import optim, step
from scripts.study import study_variants
from tests import mesh_run
from tests.stub_model import StubModel, init, latent_params, latent_reward, pair_batch, stub_reward

RECORDED = pathlib.Path(__file__).with_name("cost.json")
SGD = optim.make_optimizer(
  "sgd", optax.constant_schedule(0.1), b1=0.0, b2=0.0, eps=0.0, weight_decay=0.0, clip_norm=0.0
)  # fmt: skip
WIDTH = 64
FROZEN = init() | {"lrm": latent_params()}


# ---------------------------------------------------------------------------------------------
# Network evaluations


@dataclasses.dataclass(frozen=True)
class Deeper(StubModel):
  """The stub with products of WIDTH x WIDTH in it; what two depths differ by is the cost of evaluations alone."""

  depth: int = 1

  def predict(self, weights, x, t, cond):
    out = super().predict(weights, x, t, cond)
    h = jnp.broadcast_to(jnp.mean(out, axis=(1, 2, 3))[:, None], (x.shape[0], WIDTH))
    for _ in range(self.depth):
      h = jnp.tanh(h @ weights["unet"]["square"])
    return out + jnp.mean(h, axis=1)[:, None, None, None]


def evaluations(make_step, batch, *, has_reference=True, trips=1.0):
  """Evaluations of one image in a step; a forward pass is 1, a backward pass 2."""
  params = {"unet": FROZEN["unet"] | {"square": jnp.zeros((WIDTH, WIDTH))}}
  state = step.initial_state(params, params if has_reference else {}, SGD.init(params))
  frozen = {k: v for k, v in FROZEN.items() if k != "unet"}
  count = lambda depth: flops.count(make_step(Deeper(depth=depth)), state, frozen, batch, while_trips=trips)
  return (count(2) - count(1)) / (2 * WIDTH**2)


def updates(config):
  return catalog.method(config).updates(config).count


@pytest.mark.parametrize(("name", "cost"), [("sigmoid", 8), ("dspo", 8), ("mapo", 6), ("sft", 6)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_pair_takes_two_forward_passes_of_policy_and_reference_and_two_backward(name, cost, accumulation):
  free = name in pairs.REFERENCE_FREE

  def make(model):
    objective = pairs.DiffusionDPO(model, pairs.denoised_loss(name, beta=0.1), reference_free=free)
    return step.make_step(objective, SGD, seed=0, accumulation=accumulation)

  assert evaluations(make, pair_batch(8), has_reference=not free) == 8 * cost


def test_an_image_of_kto_takes_half_a_pair():
  pairs = pair_batch(8)
  batch = {"pixels": pairs["pixels_0"], "input_ids": pairs["input_ids"], "label": np.ones(8, np.float32)}
  assert evaluations(lambda model: step.make_step(kto.DiffusionKTO(model, beta=1.0), SGD, seed=0), batch) == 8 * 4


@pytest.mark.parametrize(
  ("pool_size", "inner_steps", "last", "accumulation"),
  [(2, 0, False, 1), (4, 0, False, 1), (4, 0, False, 2), (4, 0, True, 2), (2, 1, False, 1), (3, 3, False, 1)],
)
def test_an_iteration_of_spo_takes_what_the_readme_says(pool_size, inner_steps, last, accumulation):
  """And as `study_variants.py` counts: a call of winner and loser is shared where they start from one latent."""
  prompts = 4
  config = study_variants.load_config(study_variants.BY_NAME["spo"])
  config.batch_size, config.num_steps = prompts, 1
  config.spo.update(num_inference_steps=12, warmup_steps=4, pool_size=pool_size, inner_steps=inner_steps)
  config.spo.pool_last_step = last
  groups = spo.pool_groups(num_steps=12, warmup_steps=4, inner_steps=inner_steps, pool_last_step=last)
  config.spo.minibatch = len(groups) * prompts // 2  # two updates, without rows that only fill up
  options = config.spo.to_dict()

  def make(model):
    objective = spo.SPO(model, stub_reward(), pairs.pair_loss("sigmoid", beta=10.0), **options)
    return step.make_step(objective, SGD, seed=0, accumulation=accumulation)

  found = evaluations(make, {"input_ids": pair_batch(prompts)["input_ids"]}, trips=updates(config))
  assert found == study_variants.evaluations(config)


@pytest.mark.parametrize(("warmup_steps", "inner_steps"), [(0, 0), (4, 0), (0, 3)])
def test_an_iteration_of_lpo_takes_a_call_a_step_whatever_the_pool(warmup_steps, inner_steps):
  """And k for each inner step; every pair costs an update, which winner and loser share where they start together."""
  prompts, pool = 4, 5
  config = study_variants.load_config(study_variants.BY_NAME["spo"])
  config.batch_size, config.num_steps = prompts, 1
  counts = {"num_inference_steps": 12, "warmup_steps": warmup_steps, "inner_steps": inner_steps, "pool_size": pool}
  config.spo.update(counts | {"pool_last_step": not inner_steps})
  groups = (12 - warmup_steps) // (inner_steps + 1)
  config.spo.minibatch = groups * prompts // 2
  options = config.spo.to_dict()

  def make(model):
    return step.make_step(
      spo.SPO(model, latent_reward(), pairs.pair_loss("sigmoid", beta=500.0), **options), SGD, seed=0
    )

  found = evaluations(make, {"input_ids": pair_batch(prompts)["input_ids"]}, trips=updates(config))
  counts["num_steps"] = counts.pop("num_inference_steps")
  calls = lpo.latent_calls(**counts)
  assert inner_steps or calls == 12
  transitions = groups + 2 * groups * inner_steps
  assert found == 2 * prompts * (calls + 4 * transitions)


# ---------------------------------------------------------------------------------------------
# The compiled program


@functools.cache
def traced(objective, rank):
  """(a step on one device, updates of an iteration): networks of one level, shapes alone."""
  config = mesh_run.recipe(objective, (1, 1, 1))
  config.lora.rank = rank
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  step_fn, state, frozen, batch = plan.abstract_inputs(plan.without_weights(config), mesh)
  shardings = jax.tree.map(lambda s: s.sharding, state)
  run = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
  return run.trace(state, frozen, batch), updates(config)


@functools.cache
def compiled(objective, rank):
  return traced(objective, rank)[0].lower().compile()


def operations(objective, rank):
  found, trips = traced(objective, rank)
  return flops.of_jaxpr(found.jaxpr.jaxpr, while_trips=trips)


def counts(objective, rank):
  """What tests/cost.json has of a program."""
  program, (_, trips) = compiled(objective, rank), traced(objective, rank)
  text = program.as_text()
  return {
    "flop": operations(objective, rank),
    "compiled_flop": program.cost_analysis()["flops"],  # the bodies of loops once
    "memory_bytes": hlo.memory_bytes(text, while_trips=trips),
    "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
  }


CASES = [("dpo", 0), pytest.param("spo", 4, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("objective", "rank"), [("dpo", 0), ("spo", 4)])
def test_a_step_takes_the_operations_that_it_took(objective, rank):
  """To the last one."""
  assert operations(objective, rank) == json.loads(RECORDED.read_text())[f"{objective} rank {rank}"]["flop"]


@pytest.mark.parametrize(("objective", "rank"), CASES)
def test_a_program_is_no_larger_than_it_was(objective, rank):
  """What depends on the compiler's version within a tenth."""
  name, rows = f"{objective} rank {rank}", json.loads(RECORDED.read_text())
  found = counts(objective, rank)
  if os.environ.get("RECORD_COST"):
    RECORDED.write_text(json.dumps(rows | {"jax": jax.__version__, name: found}, indent=1) + "\n")
    return
  recorded = rows[name]
  for name in ("compiled_flop", "memory_bytes", "temporary_bytes"):
    assert found[name] <= 1.1 * recorded[name], f"{name}: {found[name]}, recorded {recorded[name]}"


@pytest.mark.parametrize(
  ("objective", "rank", "within", "calls"),
  [("dpo", 0, "while/body", 2), pytest.param("spo", 4, "jit(gradients)", 1, marks=pytest.mark.slow)],
)
def test_policy_and_reference_compute_what_precedes_the_first_adapter_once(objective, rank, within, calls):
  """Up to there both are the base model on the same latents, and the compiler sees that; trained whole, they differ."""
  text = compiled(objective, rank).as_text()
  names = re.findall(r'op_name="([^"]*UNet2DConditionModel[^"]*/conv_in/conv_general_dilated)"', text)
  forward = [name for name in names if within in name and "transpose" not in name]
  assert len(forward) == calls, names


@pytest.mark.parametrize(("objective", "rank"), CASES)
def test_a_program_waits_for_no_host_and_donates_its_state(objective, rank):
  program = compiled(objective, rank)
  text = program.as_text()
  for word in ("callback", "infeed", "outfeed", "send(", "recv("):
    assert word not in text, word
  memory = program.memory_analysis()
  # All of the output but metrics and addresses takes the memory of the state that it replaces.
  assert memory.alias_size_in_bytes > 0.95 * memory.output_size_in_bytes


def test_steps_after_the_first_move_nothing_between_host_and_device():
  objective = pairs.DiffusionDPO(StubModel(), pairs.denoised_loss("sigmoid", beta=10.0))
  run = jax.jit(step.make_step(objective, SGD, seed=0), donate_argnums=0)
  params = {"unet": jax.tree.map(jnp.array, FROZEN["unet"])}
  state = step.initial_state(params, jax.tree.map(jnp.array, params), SGD.init(params))
  batch = jax.device_put(pair_batch(8))
  state, _ = run(state, FROZEN, batch)
  with jax.transfer_guard("disallow"):
    for _ in range(2):
      state, found = run(state, FROZEN, batch)
  assert run._cache_size() == 1
  with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
    run(state, FROZEN, batch | {"label_0": np.ones(8, np.float32)})
