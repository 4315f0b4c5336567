"""What the tests of training steps share: states, optimisers, comparisons, and the options of the online methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpref.objectives import pairs, policy_gradient, spo
from jaxpref.training import optim, step
from tests.stub_model import StubModel, init, pair_batch, stub_reward


def state_of(params, optimizer, ref_params=None):
  copy = lambda tree: jax.tree.map(jnp.array, tree)
  return step.initial_state(copy(params), copy(params if ref_params is None else ref_params), optimizer.init(params))


def sgd(learning_rate=0.1, clip_norm=0.0):
  return optim.make_optimizer(
    "sgd",
    optax.constant_schedule(learning_rate),
    b1=0.0,
    b2=0.0,
    eps=0.0,
    weight_decay=0.0,
    clip_norm=clip_norm,
  )


ADAMW = optim.make_optimizer(
  "adamw", optax.constant_schedule(1e-3), b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip_norm=1.0
)


def assert_close(a, b, tolerance):
  """Relative to the largest entry of each array."""

  def leaf(x, y):
    scale = max(np.abs(x).max(), np.abs(y).max(), 1e-30)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)

  jax.tree.map(leaf, jax.tree.map(np.float32, a), jax.tree.map(np.float32, b))


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


FROZEN = init()
PARAMS = {"unet": FROZEN["unet"]}
PROMPTS = {"input_ids": pair_batch(8)["input_ids"]}
FEW = {"input_ids": PROMPTS["input_ids"][:4]}

SEED = 0
OF_STEP = ("accumulation", "moving", "constrain", "row_multiple")


def _of_step(options):
  return {k: v for k, v in options.items() if k in OF_STEP}


def _rest(options):
  return {k: v for k, v in options.items() if k not in OF_STEP}


# ---------------------------------------------------------------------------------------------
# SPO

OPTIONS = {
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
SPO_LOSS = pairs.pair_loss("sigmoid", beta=10.0)


def spo_step(optimizer=ADAMW, *, model=StubModel(), loss=SPO_LOSS, **options):  # noqa: B008
  """The step of `spo.SPO` with OPTIONS; `options` are others, or of `step.make_step`."""
  objective = spo.SPO(model, stub_reward(), loss, **OPTIONS | _rest(options))
  return step.make_step(objective, optimizer, seed=SEED, **_of_step(options))


# ---------------------------------------------------------------------------------------------
# GRPO and DDPO

GROUP, STEPS = 3, 4
POLICY = {
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


def grpo_step(optimizer=ADAMW, *, reward=stub_reward(), **options):  # noqa: B008
  """The step of `policy_gradient.PolicyGradient` with POLICY; `options` are others, or of `step.make_step`."""
  objective = policy_gradient.PolicyGradient(StubModel(), reward, **POLICY | _rest(options))
  return step.make_step(objective, optimizer, seed=SEED, **_of_step(options))
