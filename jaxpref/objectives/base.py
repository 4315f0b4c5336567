"""What the training step asks of a method: the interface `Objective`, and the plain values that pass through it.

A method is one file of this folder, a dataclass whose fields are its hyper-parameters. Offline methods (`pairs`, `kto`,
`preference_model`, `pretraining`) have a loss of a batch. Online ones (`spo`, `policy_gradient`) first draw samples of
a batch of prompts, make their experience of these and their scores, and have a loss of a minibatch of it. Losses draw
timesteps and noise, call the network and a function of `losses.py`, which never draws. `training.step.make_step` turns
any of them into a training step.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxpref.objectives.sums import Pairs

Batch = Mapping[str, jax.Array]
REWARD_BINS = 10  # of the time, in metrics


def named_key(key: jax.Array, name: str) -> jax.Array:
  """Returns the key of one named use: every draw of a step folds a different name into the step's key."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


class Weights(NamedTuple):
  """All networks by component, as three models have them; inside a jitted step, never an argument of one.

  Attributes:
    policy: with what is trained.
    reference: with the reference's; without one, with what it was loaded with.
    base: the pre-trained model; where the reference does not move it is the reference.
  """

  policy: Any
  reference: Any
  base: Any

  @classmethod
  def of(cls, params: Any, ref_params: Any, frozen: Any, *, moves: bool = False) -> "Weights":
    """Returns the three models of trained, reference's and frozen parameters, each by component.

    Args:
      moves: whether the reference does; then `frozen` has the pre-trained values of what is trained, too.
    """
    reference = {**frozen, **ref_params}
    return cls({**frozen, **params}, reference, frozen if moves else reference)


class Rows(NamedTuple):
  """One kind of what is learnt from.

  Attributes:
    data: its fields [N,...].
    prompt: i32[N] the row of the experience's context that each belongs to.
    valid: [N] whether it counts: bool, or a mask f32 in a minibatch.
  """

  data: Any
  prompt: jax.Array
  valid: jax.Array


def rows_of_prompts(data: Any, valid: jax.Array) -> Rows:
  """Rows of fields [B,G,...] and bool[B,G], G of each prompt."""
  prompts, groups = valid.shape
  flat = jax.tree.map(lambda v: v.reshape(prompts * groups, *v.shape[2:]), (data, valid))
  return Rows(flat[0], jnp.arange(prompts * groups) // groups, flat[1])


class Experience(NamedTuple):
  """What an online method learns from.

  Attributes:
    kinds: shuffled, and cut into minibatches in proportion to their sizes.
    context: of all prompts, not cut: their conditioning.
    latents: f32[B,h,w,C] of one sample of each prompt, on which a moving reference is measured.
  """

  kinds: tuple[Rows, ...]
  context: Any
  latents: jax.Array | None = None


class Drawn(NamedTuple):
  """What an online method draws, before it is known how good it is.

  Attributes:
    data: its own.
    images: u8[N,H,W,3] finished images for rewards on the host, prompt by prompt; None where there are none.
  """

  data: Any
  images: jax.Array | None = None


class Objective(Protocol):
  """A method. All of its functions are pure, and traced inside the jitted training step."""

  @property
  def kinds(self) -> tuple[str, ...]:
    """Of each kind of experience the name of the key that shuffles it; none offline: an update takes the batch."""
    ...

  def rollout(self, w: Weights, batch: Batch, key: jax.Array) -> Drawn:
    """Online: samples of a batch of prompts, and what rewards in the graph say of them."""
    ...

  def experience(
    self, drawn: Drawn, scores: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[Experience, dict[str, jax.Array]]:
    """Online: what is learnt from these samples, and means for the metrics.

    Args:
      scores: f32[N] of the images by each reward on the host, by name; none where there is none.
      key: the same as of the rollout.
    """
    ...

  def update_rows(self, rows: int) -> int:
    """Online: of so many rows of the first kind of experience those that one update takes."""
    ...

  def statistics(self, w: Weights, batch: Batch, key: jax.Array) -> Pairs | None:
    """Offline: what the loss takes from the batch as a whole, as pairs; None: nothing.

    Under accumulation they are summed over the micro-batches first, with the keys that the loss has then.
    """
    ...

  def loss(
    self, w: Weights, e: Any, key: jax.Array, statistics: Pairs | None = None
  ) -> tuple[jax.Array, jax.Array, Pairs]:
    """Of a batch, or a minibatch of `Experience`: sum of the losses, their count, pairs for the metrics."""
    ...

  def empty_loss(self) -> Any:
    """Returns the loss that stands in the metrics of a step in which nothing counted."""
    ...

  def divergence(self, w: Weights, batch: Batch, key: jax.Array) -> jax.Array:
    """f32[]: how much worse the reference denoises preferred samples than the base, which gates a moving reference.

    Args:
      batch: online with the experience's `latents`.
    """
    ...

  def timesteps(self, key: jax.Array, size: int) -> jax.Array | None:
    """i32[size], those that `loss` draws with this key for a batch of this size; None: it draws none."""
    ...


class Offline:
  """What is the same in methods that learn from a batch of data; they say the rest of `Objective`."""

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
