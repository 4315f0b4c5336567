"""The interface `Objective`, through which the training step uses a method, and the plain values that pass through it.

A method is one file of this folder: a dataclass whose fields are its hyper-parameters. Offline methods (`pairs`, `kto`,
`preference_model`, `pretraining`) have a loss of a batch. Online methods (`spo`, `policy_gradient`) first draw samples
for a batch of prompts, turn samples and scores into experience, and have a loss of a minibatch of it. Losses draw
timesteps and noise and call the network and a function of `losses.py`, which never draws. `training.step.make_step`
turns any method into a training step.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxpref.objectives.sums import Pairs

Batch = Mapping[str, jax.Array]
REWARD_BINS = 10  # bins of time, in metrics


def named_key(key: jax.Array, name: str) -> jax.Array:
  """Returns the key of one named use: each draw of a step folds a different name into the step's key."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


class Weights(NamedTuple):
  """All networks by component, for three models; made inside a jitted step, never an argument of one.

  Attributes:
    policy: has the trained parameters.
    reference: has the reference's parameters; without a reference, the loaded ones.
    base: the pre-trained model; if the reference does not move, it is the reference.
  """

  policy: Any
  reference: Any
  base: Any

  @classmethod
  def of(cls, params: Any, ref_params: Any, frozen: Any, *, moves: bool = False) -> "Weights":
    """Returns the three models from trained, reference and frozen parameters, each by component.

    Args:
      moves: whether the reference moves; `frozen` then also has the pre-trained values of what is trained.
    """
    reference = {**frozen, **ref_params}
    return cls({**frozen, **params}, reference, frozen if moves else reference)


class Rows(NamedTuple):
  """One kind of experience.

  Attributes:
    data: its fields [N,...].
    prompt: i32[N] the row of the experience's context that each row belongs to.
    valid: [N] whether it counts: bool, or a mask f32 in a minibatch.
  """

  data: Any
  prompt: jax.Array
  valid: jax.Array


def rows_of_prompts(data: Any, valid: jax.Array) -> Rows:
  """Returns rows from fields [B,G,...] and bool[B,G], G for each prompt."""
  prompts, groups = valid.shape
  flat = jax.tree.map(lambda v: v.reshape(prompts * groups, *v.shape[2:]), (data, valid))
  return Rows(flat[0], jnp.arange(prompts * groups) // groups, flat[1])


class Experience(NamedTuple):
  """What an online method learns from.

  Attributes:
    kinds: shuffled, and cut into minibatches in proportion to their sizes.
    context: conditioning of all prompts, not cut.
    latents: f32[B,h,w,C] of one sample per prompt, on which a moving reference is measured.
  """

  kinds: tuple[Rows, ...]
  context: Any
  latents: jax.Array | None = None


class Drawn(NamedTuple):
  """What an online method draws, before its scores are known.

  Attributes:
    data: any data of the method's own.
    images: u8[N,H,W,3] finished images for rewards on the host, prompt by prompt; None if there are none.
  """

  data: Any
  images: jax.Array | None = None


class Objective(Protocol):
  """A method. All of its functions are pure and traced inside the jitted training step."""

  @property
  def kinds(self) -> tuple[str, ...]:
    """For each kind of experience the name of the key that shuffles it; empty offline: an update takes the batch."""
    ...

  def rollout(self, w: Weights, batch: Batch, key: jax.Array) -> Drawn:
    """Online: draws samples for a batch of prompts, and scores them by the rewards in the graph."""
    ...

  def experience(
    self, drawn: Drawn, scores: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[Experience, dict[str, jax.Array]]:
    """Online: returns what is learnt from these samples, and means for the metrics.

    Args:
      scores: f32[N] of the images by each reward on the host, by name; empty if there is none.
      key: the key of the rollout.
    """
    ...

  def update_rows(self, rows: int) -> int:
    """Online: returns how many rows of the first kind of experience one update takes, of a number of rows."""
    ...

  def statistics(self, w: Weights, batch: Batch, key: jax.Array) -> Pairs | None:
    """Offline: returns what the loss needs from the batch as a whole, as pairs; None: nothing.

    Under accumulation these pairs are first summed over the micro-batches, with the keys that the loss then gets.
    """
    ...

  def loss(
    self, w: Weights, e: Any, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    """Returns sum of the losses, their count, and pairs for the metrics, for a batch or a minibatch of `Experience`."""
    ...

  def empty_loss(self) -> Any:
    """Returns the loss that the metrics show for a step in which nothing counted."""
    ...

  def divergence(self, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
    """Returns f32[]: how much worse the reference denoises preferred samples than the base; gates a moving reference.

    Args:
      batch: the batch; online it has the experience's `latents`.
    """
    ...

  def timesteps(self, key: jax.Array, size: int) -> jax.Array | None:
    """Returns [size], the times that `loss` draws with this key for a batch of this size; None: it draws none."""
    ...


class Offline:
  """What methods that learn from a batch of data have in common; they define the rest of `Objective`."""

  kinds: tuple[str, ...] = ()

  def rollout(self, w: Weights, batch: Batch, key: jax.Array) -> Drawn:
    raise NotImplementedError("it learns from the batch itself")

  def experience(
    self, drawn: Drawn, scores: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[Experience, dict[str, jax.Array]]:
    raise NotImplementedError("it learns from the batch itself")

  def update_rows(self, rows: int) -> int:
    raise NotImplementedError("it learns from the batch itself")

  def statistics(self, w: Weights, batch: Batch, key: jax.Array) -> Pairs | None:
    return None

  def empty_loss(self) -> Any:
    return 0.0

  def divergence(self, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
    raise NotImplementedError("it has no reference")

  def timesteps(self, key: jax.Array, size: int) -> jax.Array | None:
    return None
