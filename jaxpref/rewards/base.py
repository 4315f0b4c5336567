"""What scores samples: the interface `Reward`, and the weighted sum of several that a method is given.

A reward is a function of images and prompts inside the jitted step, or (`rewards.python`) one of Python on the host,
which runs between two programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, jax.Array]
Tokenize = Callable[[list[str]], np.ndarray]  # prompts -> i32[n, L]
IMAGE, LATENTS = "image", "x_t"  # what a reward may need


class Reward(Protocol):
  """A scorer in the graph.

  Attributes:
    name: in metrics.
    component: of the weights, that which holds its parameters.
    scale: constant, from its numbers into logits, of which SPO's threshold takes differences.
    needs: what it looks at: IMAGE, decoded predictions of x0, or LATENTS, the noisy latents themselves. Nothing else is
      computed for it. A reward that does not say it needs images.
  """

  @property
  def name(self) -> str: ...

  @property
  def component(self) -> str: ...

  @property
  def scale(self) -> float: ...

  @property
  def needs(self) -> str: ...

  @property
  def tokenizers(self) -> Mapping[str, Tokenize]:
    """By the field of a batch that each fills; none where it reads the model's own `input_ids`."""
    ...

  def prompts(self, weights: Any, batch: Batch) -> Any:
    """What it computes of prompts alone, once a batch: a tree of arrays [B,...].

    Args:
      weights: all frozen parameters by component.
      batch: `input_ids` i32[B,L] of the model, and the fields of `tokenizers`.
    """
    ...

  def score(self, weights: Any, images: jax.Array, t: jax.Array, prompts: Any) -> jax.Array:
    """f32[N] of what it needs, at times t i32[N]; 0 for finished images and their latents.

    Args:
      images: f32[N,H,W,3] in [-1, 1], decoded predictions of x0; or f32[N,h,w,C] latents.
      prompts: rows [N,...] of what `prompts` gave.
    """
    ...


class HostReward(Protocol):
  """A scorer of finished images outside the graph; rows of each process are scored there.

  Attributes: name and scale as of `Reward`.
  """

  @property
  def name(self) -> str: ...

  @property
  def scale(self) -> float: ...

  def score_images(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """f32[N] of u8[H,W,3] each; raises on whatever goes wrong."""
    ...


def needs_of(reward: Reward) -> str:
  """What a reward in the graph looks at."""
  return getattr(reward, "needs", IMAGE)


def scope(name: str) -> str:
  """Returns the name by which a reward's operations are known in traced programs and profiles."""
  return f"reward {name}"


class Scores(NamedTuple):
  """What rewards say of N samples.

  Attributes:
    total: f32[N] the weighted sum, in logits; what is learnt from.
    parts: f32[N] by name: each by itself, in its own numbers; none where there is but one.
  """

  total: jax.Array
  parts: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Weighted:
  """The sum of weight x scale x score over some rewards.

  Attributes:
    graph: those in the graph, each with its weight.
    host: those on the host, likewise.
  """

  graph: tuple[tuple[Reward, float], ...]
  host: tuple[tuple[HostReward, float], ...] = ()

  @property
  def scales(self) -> dict[str, float]:
    """weight x scale of each, by name; those in the graph first."""
    of_graph = {reward.name: weight * reward.scale for reward, weight in self.graph}
    return of_graph | {reward.name: weight * reward.scale for reward, weight in self.host}

  @property
  def needs(self) -> frozenset[str]:
    """What those in the graph look at; nothing where all are on the host."""
    return frozenset(needs_of(reward) for reward, _ in self.graph)

  @property
  def tokenizers(self) -> Mapping[str, Tokenize]:
    """Those of all rewards."""
    return {field: of_field for reward, _ in self.graph for field, of_field in reward.tokenizers.items()}

  def prompts(self, weights: Any, batch: Batch) -> tuple[Any, ...]:
    """See `Reward.prompts`."""
    found = []
    for reward, _ in self.graph:
      with jax.named_scope(scope(reward.name)):
        found.append(reward.prompts(weights, batch))
    return tuple(found)

  def score(
    self,
    weights: Any,
    images: jax.Array | None,
    t: jax.Array,
    prompts: tuple[Any, ...],
    latents: jax.Array | None = None,
  ) -> Scores:
    """Returns the sum of those in the graph, see `Reward.score`; of what none of them needs nothing has to be given."""
    if not self.graph:
      return Scores(jnp.zeros(t.shape), {})
    seen: dict[str, Any] = {IMAGE: images, LATENTS: latents}
    found = {}
    for (reward, _), rows in zip(self.graph, prompts, strict=True):
      with jax.named_scope(scope(reward.name)):
        found[reward.name] = reward.score(weights, seen[needs_of(reward)], t, rows)
    return self.summed(found)

  def score_pictures(self, weights: Any, batch: Batch, images: jax.Array, latents: jax.Array | None = None) -> Scores:
    """Scores finished pictures f32[N,H,W,3] in [-1, 1], whose prompts are the rows of the batch.

    Args:
      latents: f32[N,h,w,C] of these, where a reward needs them.
    """
    times = jnp.zeros(len(images), jnp.int32)
    return self.score(weights, images, times, self.prompts(weights, batch), latents)

  def summed(self, found: Mapping[str, jax.Array], before: Scores | None = None) -> Scores:
    """Returns the weighted sum of the scores f32[N] that there are, by name, and of those before."""
    scales = self.scales
    terms = [] if before is None else [before.total]
    terms += [scale * found[name] for name, scale in scales.items() if name in found]
    parts = {} if before is None else before.parts
    return Scores(
      functools.reduce(jnp.add, terms),
      parts | ({name: found[name] for name in scales if name in found} if len(scales) > 1 else {}),
    )
