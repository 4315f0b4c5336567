"""The command line on an objective that compiles in no time: `python -m tests.toy_run ARGUMENTS`, as of jaxpref.main.

Its loss is random, so that a draw that is replayed or left out shows; its state is 4 MB, of which nothing compresses.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import main
from jaxpref.training import build
from tests.toy_objective import Toy

SHAPE = (512, 512)


class Batches:
  """Numbered batches with a state, as the data pipeline gives."""

  def __init__(self):
    self.next = 0

  def __next__(self):
    self.next += 1
    return {"x": np.full(8, self.next, np.float32)}

  def get_state(self):
    return {"next_batch": self.next}

  def set_state(self, state):
    self.next = state["next_batch"]

  def num_skipped(self):
    return 0

  def names(self, places):
    return [f"record {place}" for place in places]

  def close(self):
    pass


def loss(w, batch, key):
  target = jnp.mean(batch["x"]) + jax.random.normal(key, SHAPE) + w.policy["offset"]
  error = (w.policy["w"] - target) ** 2 + 0.1 * (w.policy["w"] - w.reference["w"]) ** 2
  return jnp.sum(error), jnp.float32(np.prod(SHAPE)), {}


def report(params):
  """Takes a moment, as evaluation does."""
  del params
  time.sleep(0.5)
  return {}


def toy(config, sharding, **kwargs):
  """An experiment in the place of `build.build`'s."""
  del config, sharding, kwargs
  return build.Experiment(
    params={"w": jnp.zeros(SHAPE)},
    frozen={"offset": jnp.ones(())},
    objective=Toy(loss, lambda w, batch, key: jnp.sum(w.reference["w"]) * 1e-6),
    batches=Batches,
    export=lambda params, where: where.write_text(json.dumps(params["w"].tolist())),
    report=report,
    has_reference=True,
    images_per_step=8,
  )


def run():
  """As `jaxpref.main.run`."""
  setattr(build, "build", toy)  # noqa: B010, not the same type
  main.run()


if __name__ == "__main__":
  run()
