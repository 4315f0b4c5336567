"""Rewards on the host: between what draws images and what learns from them, on the rows of each process."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.devices import chips, sharding
from jaxpref.rewards.base import HostReward
from jaxpref.training import step

_SAID = 1024  # bytes of an error's sentence that all processes are told


def score(
  rewards: Sequence[tuple[HostReward, float]], images: Mapping[int, np.ndarray], captions: Sequence[str]
) -> dict[str, np.ndarray]:
  """Scores f32[N] of N images by each reward, by name, the same on every process.

  Args:
    images: u8[H,W,3] by their numbers: those of this process; all processes together have each number once.
    captions: the prompts of all N.

  Raises:
    ValueError: a reward failed, here or in another process: then all processes raise it, and none waits.
  """
  own, found, said = sorted(images), np.zeros((len(rewards), len(captions)), np.float32), ""
  if not rewards:
    return {}
  try:
    for row, (reward, _) in enumerate(rewards):
      found[row, own] = reward.score_images([images[i] for i in own], [captions[i] for i in own])
  except ValueError as error:
    said = str(error)
  if jax.process_count() > 1:
    text = np.frombuffer(said.encode()[:_SAID].ljust(_SAID, b"\0"), np.uint8)
    parts, texts = multihost_utils.process_allgather((found, text))
    found = parts.sum(axis=0)
    every = [bytes(t).rstrip(b"\0").decode(errors="replace") for t in texts]
    said = next((f"process {i}: {t}" for i, t in enumerate(every) if t), "")
  if said:
    raise ValueError(said)
  return {reward.name: row for (reward, _), row in zip(rewards, found, strict=True)}


@dataclasses.dataclass(frozen=True)
class Iteration:
  """The training step in two programs, with rewards on the host between them; called like the step that is one.

  Attributes:
    draw, learn: compiled, of `step.make_halves`.
    rewards: each with its weight.
    captions: the prompts by their `record`.
    mesh: that the programs run on.
  """

  draw: Callable[..., Any]
  learn: Callable[..., Any]
  rewards: Sequence[tuple[HostReward, float]]
  captions: Sequence[str]
  mesh: jax.sharding.Mesh

  def __call__(self, state: step.State, frozen: Any, batch: Any) -> tuple[step.State, step.Metrics]:
    drawn, records = self.draw(state, frozen, batch)
    captions = [self.captions[i] for i in np.asarray(records)]
    per_prompt = drawn.images.shape[0] // len(captions)
    captions = [c for c in captions for _ in range(per_prompt)]
    images: dict[int, np.ndarray] = {}
    for shard in drawn.images.addressable_shards:
      if shard.replica_id == 0:
        first = shard.index[0].start or 0
        images |= {first + i: image for i, image in enumerate(np.asarray(shard.data))}
    found = score(self.rewards, images, captions)
    scores = {name: self._everywhere(values) for name, values in found.items()}
    return self.learn(state, frozen, batch, drawn._replace(images=None), scores)

  def _everywhere(self, values: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding.replicated(self.mesh), lambda index: values[index])


def compile_iteration(
  halves: tuple[step.DrawFn, step.LearnFn],
  rewards: Sequence[tuple[HostReward, float]],
  captions: Sequence[str],
  mesh: jax.sharding.Mesh,
  shardings: Any,
  arguments: tuple[Any, Any, Any],
) -> Iteration:
  """Compiles both programs.

  Args:
    halves: of `step.make_halves`.
    captions: the prompts by their `record`.
    shardings: of the state, which is donated.
    arguments: state, frozen parameters and a batch, or their shapes.
  """
  draw, learn = (sharding.on_mesh(mesh, half) for half in halves)
  state, frozen, batch = arguments
  options = chips.compiler_options()
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def draw_with_records(state, frozen, batch):
    return draw(state, frozen, batch), batch["record"]

  places: Any = (step.Drawn(None, rows), whole)  # type: ignore[arg-type]
  drawing = jax.jit(draw_with_records, out_shardings=places, compiler_options=options).lower(*arguments).compile()
  # As the first program leaves it on the devices.
  shapes = jax.eval_shape(draw_with_records, *arguments)[0]
  placed = jax.tree.map(
    lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, drawing.output_shardings[0]
  )
  count = shapes.images.shape[0]
  scores = {r.name: jax.ShapeDtypeStruct((count,), np.float32, sharding=whole) for r, _ in rewards}
  learning = jax.jit(learn, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
  compiled = learning.lower(state, frozen, batch, placed._replace(images=None), scores).compile()
  return Iteration(drawing, compiled, rewards, captions, mesh)
