"""Rewards on the host: run between the program that draws and the one that learns, on the rows of each process."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpref.devices import chips, sharding
from jaxpref.rewards.base import HostReward
from jaxpref.training import step

PROGRAMS = ("rollout", "experience and updates")
_SAID = 1024  # bytes of an error's sentence that all processes receive


def score(
  rewards: Sequence[tuple[HostReward, float]], images: Mapping[int, np.ndarray], captions: Sequence[str]
) -> dict[str, np.ndarray]:
  """Scores N images by each reward, f32[N] by name, the same on every process.

  Args:
    images: u8[H,W,3] by number: those of this process; all processes together have each number once.
    captions: the prompts of all N.

  Raises:
    ValueError: a reward failed, here or in another process: all processes then raise, and none waits.
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
  """The training step as two programs, with rewards on the host between them; called like a step that is one program.

  Attributes:
    draw, learn: the compiled halves of `step.make_halves`.
    rewards: rewards with their weights.
    captions: prompts by their `record`.
    mesh: the mesh that the programs run on.
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
    images, drawn = _own_images(drawn.images), drawn._replace(images=None)  # the devices need not keep them
    found = score(self.rewards, images, captions)
    scores = {name: self._everywhere(values) for name, values in found.items()}
    return self.learn(state, frozen, batch, drawn, scores)

  @property
  def programs(self) -> dict[str, Any]:
    """Returns both programs, by name."""
    return dict(zip(PROGRAMS, (self.draw, self.learn), strict=True))

  def _everywhere(self, values: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding.replicated(self.mesh), lambda index: values[index])


def _own_images(images: jax.Array) -> dict[int, np.ndarray]:
  """Returns u8[H,W,3] by number: the images on this process's devices, each once."""
  found: dict[int, np.ndarray] = {}
  for shard in images.addressable_shards:
    if shard.replica_id == 0:
      first = shard.index[0].start or 0
      found |= {first + i: image for i, image in enumerate(np.asarray(shard.data))}
  return found


def compile_iteration(
  halves: tuple[step.DrawFn, step.LearnFn],
  rewards: Sequence[tuple[HostReward, float]],
  captions: Sequence[str],
  mesh: jax.sharding.Mesh,
  shardings: Any,
  arguments: tuple[Any, Any, Any],
) -> Iteration:
  """Compiles both programs; see `compile_halves` for the other arguments.

  Args:
    captions: prompts by their `record`.
  """
  options = chips.compiler_options()
  compiled = lambda name, traced: traced.lower().compile(compiler_options=options)
  draw, learn = compile_halves(halves, rewards, mesh, shardings, arguments, compiled)
  return Iteration(draw, learn, rewards, captions, mesh)


def compile_halves(
  halves: tuple[step.DrawFn, step.LearnFn],
  rewards: Sequence[tuple[HostReward, float]],
  mesh: jax.sharding.Mesh,
  shardings: Any,
  arguments: tuple[Any, Any, Any],
  compiled: Callable[[str, Any], Any],
) -> tuple[Any, Any]:
  """Compiles the two programs of `PROGRAMS`; both count everything that is on the devices while they run.

  Args:
    halves: those of `step.make_halves`.
    shardings: shardings of the state, which is donated.
    arguments: state, frozen parameters and a batch, or their shapes.
    compiled: (name of a program, traced program) -> compiled program.
  """
  draw, learn = (sharding.on_mesh(mesh, half) for half in halves)
  state, frozen, batch = arguments
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def draw_with_records(state, frozen, batch):
    return draw(state, frozen, batch), batch["record"]

  places: Any = (step.Drawn(None, rows), whole)  # type: ignore[arg-type]
  jitted = jax.jit(draw_with_records, out_shardings=places, keep_unused=True)
  drawing = compiled(PROGRAMS[0], jitted.trace(*arguments))
  # As the first program leaves it on the devices.
  shapes = jax.eval_shape(draw_with_records, *arguments)[0]
  placed = jax.tree.map(
    lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, drawing.output_shardings[0]
  )
  count = shapes.images.shape[0]
  scores = {r.name: jax.ShapeDtypeStruct((count,), np.float32, sharding=whole) for r, _ in rewards}
  jitted = jax.jit(learn, donate_argnums=0, out_shardings=(shardings, None), keep_unused=True)
  return drawing, compiled(PROGRAMS[1], jitted.trace(state, frozen, batch, placed._replace(images=None), scores))
