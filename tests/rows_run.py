"""Which records of a batch lie on this process's devices, as one of several; what mesh_test.py compares.

    python -m tests.rows_run DATA,FSDP,TENSOR PORT NUM_PROCESSES PROCESS_ID

Prints JSON: [place in the batch, records] of each of its devices.
"""

import json
import sys
from unittest import mock

import jax
import numpy as np


def pairs():
  """More than a batch of them; the embedded ones would take each process seconds to prepare or to open."""
  from jaxpref.data import sources

  image = np.zeros((16, 16, 3), np.uint8)
  records = [
    {"id": f"pair {i}", "caption": f"caption {i % 7}", "image_0": image, "image_1": image + 1, "label_0": float(i % 2)}
    for i in range(50)
  ]
  return sources.Indexed(records, sources.index_of_records(records))


def batch_of(sizes):
  """The first batch, 16 pairs, on a mesh of these sizes."""
  from jaxpref.devices import sharding
  from jaxpref.training import inputs
  from tests import mesh_run

  config = mesh_run.recipe("dpo", sizes)
  mesh = sharding.make_mesh(**config.mesh)
  with mock.patch.object(inputs, "open_pairs", lambda config: pairs()):
    batches = inputs.offline_batches(config, 16, lambda texts: np.zeros((len(texts), 4), np.int32))
  batch, _ = next(batches), batches.close()
  return sharding.put_batch(mesh, batch)


def main():
  sizes, port, count, index = sys.argv[1:]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
  record = batch_of(tuple(map(int, sizes.split(","))))["record"]
  print(json.dumps([[shard.index[0].start or 0, shard.data.tolist()] for shard in record.addressable_shards]))


if __name__ == "__main__":
  main()
