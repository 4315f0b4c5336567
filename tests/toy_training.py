"""`python -m jaxpref.main` on an objective that compiles in no time, for tests that start several processes of a run.

TOY_PACE: seconds that a batch takes in every process. TOY_SLOW="1 0.2": seconds that it takes longer in process 1.
TOY_BROKEN="1 5": the fifth batch of process 1 cannot be read.
"""

import json
import os
import time

SHORTER = dict(HEARTBEAT_SECONDS=10, SETTLE_SECONDS=1)  # as tests should be


class Batches:
  """Numbered batches of eight rows, of which each process has its part."""

  batch_size = 8
  names = None

  def __init__(self):
    self.next = 0

  def __next__(self):
    import jax
    import numpy as np

    self.next += 1
    slow, seconds = os.environ.get("TOY_SLOW", "-1 0").split()
    time.sleep(float(os.environ.get("TOY_PACE", "0")) + float(seconds) * (jax.process_index() == int(slow)))
    if os.environ.get("TOY_BROKEN") == f"{jax.process_index()} {self.next}":
      raise ValueError(f"record {self.next} cannot be read; mend it.")
    rows = np.arange(8, dtype=np.float32) / 8 + self.next
    return {"x": np.split(rows, jax.process_count())[jax.process_index()]}

  def get_state(self):
    return {"next_batch": self.next}

  def set_state(self, state):
    self.next = state["next_batch"]

  def num_skipped(self):
    return 0

  def close(self):
    pass


def build(config, sharding, **kwargs):
  """In the place of `jaxpref.training.build.build`."""
  import jax
  import jax.numpy as jnp

  from jaxpref.training import build
  from tests.toy_objective import Toy

  def loss(w, batch, key):
    target = jnp.mean(batch["x"]) + jax.random.normal(key, (64, 64)) + w.policy["offset"]
    error = (w.policy["w"] - target) ** 2 + 0.1 * (w.policy["w"] - w.reference["w"]) ** 2
    return jnp.sum(error), jnp.float32(4096), {"error": (jnp.sum(error), jnp.float32(4096))}

  return build.Experiment(
    params={"w": jnp.zeros((64, 64))},
    frozen={"offset": jnp.ones(())},
    objective=Toy(loss, lambda w, batch, key: jnp.sum(w.reference["w"]) * 1e-6),
    batches=Batches,
    export=lambda params, where: where.write_text(json.dumps(params["w"].ravel().tolist())),
    has_reference=True,
    images_per_step=8,
  )


def main():
  from jaxpref import main
  from jaxpref.devices import distributed

  for name, value in SHORTER.items():
    setattr(distributed, name, value)
  join = distributed.join

  def join_then_replace(launch):
    join(launch)
    from jaxpref.training import build as module

    module.build = build

  distributed.join = join_then_replace
  main.run()


if __name__ == "__main__":
  main()
