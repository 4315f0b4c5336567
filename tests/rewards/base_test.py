"""Rewards as SPO and GRPO see them: weighted sums, each logged by itself, in the graph and on the host."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import compile
from jaxpref import config as config_lib
from jaxpref.devices import chips, sharding
from jaxpref.models.vae import to_uint8
from jaxpref.objectives import catalog, policy_gradient, spo
from jaxpref.planning import flops, plan
from jaxpref.recipes.rewards import reward_terms
from jaxpref.rewards import published, terms
from jaxpref.rewards.base import Weighted
from jaxpref.rewards.python import PythonReward
from jaxpref.rewards.step_aware import StepAware
from jaxpref.training import host, loop, step
from tests.stub_model import StubModel, StubScorer, stub_reward
from tests.updates import ADAMW, FEW, FROZEN, OPTIONS, PARAMS, POLICY, SEED, SPO_LOSS, assert_close, state_of


@dataclasses.dataclass(frozen=True)
class Light:
  """The mean of rounded images, 0 to 1; it reads tokens of its own, which count for nothing."""

  name: str = "light"
  scale: float = 50.0

  @property
  def tokenizers(self):
    return {f"{self.name}_ids": lambda captions: np.ones((len(captions), 2), np.int32)}

  def prompts(self, weights, batch):
    return {"ids": batch[f"{self.name}_ids"]}

  def score(self, weights, images, t, prompts):
    assert prompts["ids"].shape == (len(images), 2)
    return jnp.mean(to_uint8(images).astype(jnp.float32), axis=(1, 2, 3)) / 255


def light(images, prompts):
  """Of images u8[H, W, 3]: their mean, 0 to 1."""
  assert len(images) == len(prompts)
  return [np.float32(i.mean(dtype=np.float64) / 255) for i in images]


STUB = StepAware(StubScorer())
BATCH = FEW | {"light_ids": np.ones((4, 2), np.int32), "record": np.arange(4, dtype=np.int32)}


def spo_of(reward):
  return spo.SPO(StubModel(), reward, SPO_LOSS, **OPTIONS)


def grpo_of(reward):
  return policy_gradient.PolicyGradient(StubModel(), reward, **POLICY)


def after(objective, batch=BATCH):
  return jax.jit(step.make_step(objective, ADAMW, seed=SEED))(state_of(PARAMS, ADAMW), FROZEN, batch)


class Both:
  """The same sum as one reward."""

  name, scale = "both", 1.0
  tokenizers = Light().tokenizers

  def prompts(self, weights, batch):
    return STUB.prompts(weights, batch), Light().prompts(weights, batch)

  def score(self, weights, images, t, prompts):
    return 2.0 * STUB.score(weights, images, t, prompts[0]) - 5.0 * Light().score(weights, images, t, prompts[1])


@pytest.mark.parametrize("make", [pytest.param(spo_of, marks=pytest.mark.slow), grpo_of])
def test_a_weighted_sum_is_learnt_from_and_each_part_is_logged(make):
  """weight x scale x score: 2 x 1 and -0.1 x 50."""
  reward = Weighted(((STUB, 2.0), (Light(), -0.1)))
  state, found = after(make(reward))
  same, expected = after(make(Weighted(((Both(), 1.0),))))
  assert_close(state.params, same.params, 1e-5)
  np.testing.assert_allclose(found["reward"], expected["reward"], rtol=1e-5)
  parts = 2.0 * found["reward_preference_model"] - 5.0 * found["reward_light"]
  np.testing.assert_allclose(parts, found["reward"], rtol=1e-5)
  assert not [name for name in expected if name.startswith("reward_") and name != "reward_group"]
  other, _ = after(make(stub_reward()))
  assert not np.allclose(other.params["unet"]["outer"]["kernel"], state.params["unet"]["outer"]["kernel"], rtol=1e-6)


def python_reward(function, seconds=60.0):
  return PythonReward(published.Scorer("light", "", "", published.checked_scores("light", function)), seconds)


def test_a_function_on_the_host_does_what_the_same_in_the_graph_does():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  arguments = (state_of(PARAMS, ADAMW), FROZEN, BATCH)
  for weight, graph in ((3.0, ()), (3.0, ((STUB, 1.0),))):
    reward = Weighted(graph, ((python_reward(light), weight),))
    halves = step.make_halves(grpo_of(reward), ADAMW, seed=SEED)
    places = jax.tree.map(lambda _: sharding.replicated(mesh), arguments[0])
    run = host.compile_iteration(halves, reward.host, ["a", "b", "c", "d"], mesh, places, arguments)
    state, found = run(*jax.tree.map(jnp.array, arguments))
    same, expected = after(grpo_of(Weighted((*graph, (Light(scale=1.0), weight)))))
    assert_close(state.params, same.params, 1e-5)
    assert set(found) == set(expected)
    for name in ("reward", "score_gap", *[n for n in found if n.startswith("reward_")]):
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


def test_both_programs_of_a_reward_on_the_host_are_planned(monkeypatch):
  """As training compiles them: the larger one's memory, the sum of their costs, and each reward by its name."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  reward = Weighted(((STUB, 2.0),), ((python_reward(light), 1.0),))
  halves = step.make_halves(grpo_of(reward), ADAMW, seed=SEED)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))
  arguments = jax.tree.map(place, (state_of(PARAMS, ADAMW), FROZEN, jax.tree.map(jnp.asarray, BATCH)))
  monkeypatch.setattr(plan, "planned", lambda config, mesh: plan.Planned(halves, reward, *arguments))
  found = compile.compile_step(grpo_config(), mesh, compiler_options=chips.compiler_options())
  rollout, updates = (found["programs"][name] for name in host.PROGRAMS)
  given = sum(found["arguments"].values())
  assert rollout["arguments"] >= given and updates["arguments"] > given  # with all that lies there meanwhile
  assert found["peak"] == max(rollout["peak"], updates["peak"])
  for cost in ("flop", "memory_bytes", "compile_seconds"):
    assert found[cost] == rollout[cost] + updates[cost] > rollout[cost] > 0
  whole = step.make_step(grpo_of(Weighted(((STUB, 2.0), (Light(), 1.0)))), ADAMW, seed=SEED)
  trips = catalog.method(grpo_config()).updates(grpo_config()).count
  assert found["flop"] == flops.count(whole, *arguments, while_trips=trips)
  assert found["rewards"]["light"] == {"host": True}
  of_stub = found["rewards"]["preference_model"]
  assert of_stub["parameters"] == sum(x.size for x in jax.tree.leaves(FROZEN["spm"]))
  assert 0 < of_stub["flop"] < rollout["flop"]
  places = jax.tree.map(lambda x: x.sharding, arguments[0])
  run = host.compile_iteration(halves, reward.host, list("abcd"), mesh, places, arguments)
  peaks = {name: chips.program_bytes(program)["peak"] for name, program in run.programs.items()}
  assert peaks == {name: program["peak"] for name, program in found["programs"].items()}
  shown = compile.table(found)
  assert "| light | on the host | |  |" in shown and "| experience and updates |" in shown
  monkeypatch.setattr(chips, "GIB", 1.0)
  largest = max(peaks.values())
  assert f"takes {largest:.2f} GiB of each device (rollout {peaks['rollout']:.2f}, experience" in loop._memory(run)


def test_prompts_stand_beside_their_images():
  """In whatever order the batch has them, on several devices."""
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  seen = []

  def number(images, prompts):
    seen.append((np.stack(images), list(prompts)))
    return np.arange(len(images))

  reward = Weighted((), ((python_reward(number), 1.0),))
  halves = step.make_halves(grpo_of(reward), ADAMW, seed=SEED)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  batch = jax.device_put(BATCH | {"record": np.int32([2, 0, 3, 1])}, rows)
  state = jax.device_put(state_of(PARAMS, ADAMW), whole)
  frozen = jax.device_put(FROZEN, whole)
  run = host.compile_iteration(
    halves, reward.host, list("abcd"), mesh, jax.tree.map(lambda _: whole, state), (state, frozen, batch)
  )
  drawn, _ = run.draw(state, frozen, batch)
  images = np.asarray(drawn.images)
  run(state, frozen, batch)
  (given, prompts), *_ = seen
  assert "".join(prompts) == "c" * 3 + "a" * 3 + "d" * 3 + "b" * 3
  np.testing.assert_array_equal(given, images)


def slow(images, prompts):
  time.sleep(5)


def fails(images, prompts):
  raise KeyError("no such key")


@pytest.mark.parametrize(
  ("function", "sentence"),
  [
    (fails, "reward light raised KeyError: 'no such key'"),
    (
      slow,
      "reward light took longer than 0.5 s for 2 images; make it faster, or allow more time with",
    ),
    (lambda i, p: [1.0], "scorer light returned numbers of shape [1] for 2 images"),
    (lambda i, p: [1.0, np.nan], "scorer light gives nan to 1 of 2 images"),
  ],
)
def test_what_goes_wrong_in_a_function_is_one_sentence(function, sentence):
  images = {i: np.zeros((2, 2, 3), np.uint8) for i in range(2)}
  with pytest.raises(ValueError, match=re.escape(sentence)):
    host.score(((python_reward(function, 0.5), 1.0),), images, ["", ""])


def grpo_config(**fields):
  config = config_lib.default()
  config.update(objective="grpo", model="random:one-level", preference_model="random:one-level")
  config.update_from_flattened_dict(fields)
  return config


def test_terms_of_the_config():
  config = grpo_config(reward="pickscore:1, aesthetic=/a/b:0.1,mine:light,a.b:c:-2")
  expected = {"pickscore": 1.0, "aesthetic=/a/b": 0.1, "mine:light": 1.0, "a.b:c": -2.0}
  assert reward_terms(config) == expected
  assert reward_terms(grpo_config()) == {"preference_model": 1.0}


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"reward": "pickscore:nan"}, "config.reward='pickscore:nan': 'pickscore:nan'; expected NAME:WEIGHT"),
    ({"reward": "pickscore:0"}, "expected NAME:WEIGHT"),
    ({"reward": "preference_model:1,,"}, "''; expected NAME:WEIGHT"),
    ({"reward": "preference_model:1,preference_model"}, "each name once"),
    ({"reward": "preference_model", "preference_model": None}, "preference_model=None; expected the folder"),
    ({"reward": "clip_l:1", "objective": "dpo"}, "reward='clip_l:1'; expected nothing for dpo"),
    ({"reward": "mine:light,preference_model:1", "objective": "spo"}, "spo scores every step inside its program"),
    ({"reward_timeout": 0.0}, "reward_timeout=0.0; expected a number of seconds above 0"),
  ],
)
def test_what_cannot_be_a_reward_is_refused(fields, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    config_lib.check(grpo_config(**fields))


@pytest.mark.parametrize(
  ("reward", "sentence"),
  [
    ("picscore:1", "picscore is unknown, expected preference_model, pickscore, "),
    ("tests.rewards.base_test:nothing", "has no function 'nothing'"),
    ("aesthetic=/nowhere:1", "scorer aesthetic has no weights: there is no folder /nowhere"),
    ("tiny-clip:1,tiny-clip=/x:1", "occurs twice"),
    ("latent=", "'latent=' names no folder; expected NAME, or NAME=FOLDER"),
    ("tiny-clip=:2", "'tiny-clip=' names no folder"),
    ("judge:1", "the judge of the evaluation, config.judge=tiny-judge, cannot also be trained on"),
  ],
)
def test_rewards_that_are_not_there_are_refused(reward, sentence, monkeypatch):
  monkeypatch.setattr(published, "check", published.check if "=/x" not in reward else lambda *a, **k: None)
  with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
    terms.check(grpo_config(reward=reward, judge="tiny-judge", preference_model=None))


def test_another_judge_may_be_a_reward():
  terms.check(grpo_config(reward="judge:1", judge="random:sd15-miniature", preference_model=None))
