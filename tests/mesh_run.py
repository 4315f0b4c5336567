"""Six steps of each objective on a mesh, in this process or as one of several; what mesh_test.py compares.

    python -m tests.mesh_run FOLDER DATA,FSDP,TENSOR OBJECTIVES [PORT NUM_PROCESSES PROCESS_ID]

The networks are those of presets.ONE_LEVEL, with attention in the middle of the UNet only; arrays are split from 2,048
numbers on, so that half of the kernels are.
"""

import pathlib
import sys
from unittest import mock

import jax

OBJECTIVES = ("dpo", "tdpo", "spo", "grpo", "spm")
STEPS = 6
LEARNING_RATE = 1e-4


def recipe(objective, mesh):
  """A config whose steps exercise all that depends on the mesh: accumulation, a moving reference, warm-up, dropout."""
  from jaxpref import config

  c = config.default()
  c.update(objective=objective, model="random:one-level", num_steps=STEPS, batch_size=16, seed=3)
  c.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
  c.accumulation = 2 if objective != "tdpo" else 1
  # With Adam's epsilon of 1e-8, gradients that are rounding alone would make whole steps.
  c.optimizer.update(learning_rate=LEARNING_RATE, warmup_steps=2, clip_norm=1.0, eps=1e-6)
  if objective not in ("spo", "grpo"):
    c.data.update(caption_dropout=0.2, flip=True)
  c.logging.every = 1
  c.checkpoint.every = STEPS
  # Each error, of about 1, is rounded to 6e-8; the published beta of 5000 would make 3e-4 of it in the loss.
  c.loss.beta = 10.0 if objective == "spo" else 20.0
  c.evaluation.num_prompts = 0
  if objective in ("spo", "grpo", "spm"):
    c.preference_model = "random:one-level"
  if objective == "spm":
    c.data.ties = "keep"
  else:
    c.reference.update(mode="update", tau=4, delta=1.0, alpha=0.5)
  if objective == "tdpo":
    c.timesteps.update(gamma=0.9, reward_scale=True)
  if objective == "spo":
    c.batch_size = 8
    c.spo.update(num_inference_steps=5, warmup_steps=1, pool_size=2, inner_steps=1, threshold=0.0, minibatch=16)
  if objective == "grpo":
    c.batch_size = 8
    # A ratio that is clipped on one mesh and not on another would make other updates.
    c.grpo.update(num_inference_steps=4, group_size=2, minibatch=32, kl_coef=0.1, ratio_clip=0.5)
  return c


def run(folder, mesh, objectives):
  """Trains in FOLDER/OBJECTIVE_MESH, on the first devices that the mesh needs."""
  from jaxpref.devices import sharding
  from jaxpref.models import presets
  from jaxpref.training import loop
  from tests.small_presets import with_one_attention

  make_mesh = sharding.make_mesh

  def of_first_devices(**sizes):
    count = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    return make_mesh(**sizes, devices=jax.devices()[:count])

  split_all = mock.patch.object(sharding, "MIN_FSDP_SIZE", 2**11)
  small = mock.patch.dict(presets.PRESETS, {"one-level": with_one_attention(presets.ONE_LEVEL)})
  for objective in objectives:
    with small, split_all, mock.patch.object(sharding, "make_mesh", of_first_devices):
      loop.run(recipe(objective, mesh), str(workdir(folder, objective, mesh)))


def workdir(folder, objective, mesh):
  """Of a run."""
  processes = f"_{jax.process_count()}" if jax.process_count() > 1 else ""
  return folder / f"{objective}_{'x'.join(map(str, mesh))}{processes}"


def main():
  folder, mesh, objectives, *group = sys.argv[1:]
  if group:
    port, count, index = map(int, group)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
  run(pathlib.Path(folder), tuple(map(int, mesh.split(","))), objectives.split(","))


if __name__ == "__main__":
  main()
