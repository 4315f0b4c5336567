"""The interface `Reward` for what scores samples, and the weighted sum of rewards that a method gets.

A reward is a function of images and prompts inside the jitted step, or (`rewards.python`) a Python function on the
host, which runs between two programs.
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
    name: its name in metrics.
    component: the component of the weights that holds its parameters.
    scale: constant factor from its numbers to logits; SPO's threshold uses their differences.
    needs: what it scores: IMAGE, decoded predictions of x0, or LATENTS, the noisy latents themselves. Nothing else is
      computed for it. A reward without this attribute needs images.
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
    """Returns tokenizers by the field of a batch that each fills; none if it reads the model's own `input_ids`."""
    ...

  def prompts(self, weights: Any, batch: Batch) -> Any:
    """Computes what depends on prompts alone, once per batch: a tree of arrays [B,...].

    Args:
      weights: all frozen parameters by component.
      batch: `input_ids` i32[B,L] of the model, and the fields of `tokenizers`.
    """
    ...

  def score(self, weights: Any, images: jax.Array, t: jax.Array, prompts: Any) -> jax.Array:
    """Scores what it needs, f32[N], at times t i32[N]; 0 for finished images and their latents.

    Args:
      images: f32[N,H,W,3] in [-1, 1], decoded predictions of x0; or f32[N,h,w,C] latents.
      prompts: rows [N,...] of what `prompts` returned.
    """
    ...


class HostReward(Protocol):
  """A scorer of finished images outside the graph; each process scores its own rows.

  Attributes: name and scale, see `Reward`.
  """

  @property
  def name(self) -> str: ...

  @property
  def scale(self) -> float: ...

  def score_images(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Scores images u8[H,W,3] as f32[N]; raises if anything goes wrong."""
    ...


def needs_of(reward: Reward) -> str:
  """Returns what a reward in the graph needs."""
  return getattr(reward, "needs", IMAGE)


def scope(name: str) -> str:
  """Returns the name of a reward's operations in traced programs and profiles."""
  return f"reward {name}"


class Scores(NamedTuple):
  """The rewards' scores of N samples.

  Attributes:
    total: f32[N] the weighted sum, in logits, which is learnt from.
    parts: f32[N] by name: each reward alone, in its own numbers; empty if there is only one.
  """

  total: jax.Array
  parts: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Weighted:
  """The sum of weight x scale x score over some rewards.

  Attributes:
    graph: rewards in the graph, each with its weight.
    host: rewards on the host, each with its weight.
  """

  graph: tuple[tuple[Reward, float], ...]
  host: tuple[tuple[HostReward, float], ...] = ()

  @property
  def scales(self) -> dict[str, float]:
    """Returns weight x scale of each reward, by name; those in the graph come first."""
    of_graph = {reward.name: weight * reward.scale for reward, weight in self.graph}
    return of_graph | {reward.name: weight * reward.scale for reward, weight in self.host}

  @property
  def needs(self) -> frozenset[str]:
    """What the rewards in the graph need; empty if all are on the host."""
    return frozenset(needs_of(reward) for reward, _ in self.graph)

  @property
  def tokenizers(self) -> Mapping[str, Tokenize]:
    """Returns the tokenizers of all rewards."""
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
    """Returns the sum of the rewards in the graph, see `Reward.score`; inputs that no reward needs may be missing."""
    if not self.graph:
      return Scores(jnp.zeros(t.shape), {})
    seen: dict[str, Any] = {IMAGE: images, LATENTS: latents}
    found = {}
    for (reward, _), rows in zip(self.graph, prompts, strict=True):
      with jax.named_scope(scope(reward.name)):
        found[reward.name] = reward.score(weights, seen[needs_of(reward)], t, rows)
    return self.summed(found)

  def score_pictures(self, weights: Any, batch: Batch, images: jax.Array, latents: jax.Array | None = None) -> Scores:
    """Scores finished pictures f32[N,H,W,3] in [-1, 1]; their prompts are the rows of the batch.

    Args:
      latents: their latents f32[N,h,w,C], if a reward needs them.
    """
    times = jnp.zeros(len(images), jnp.int32)
    return self.score(weights, images, times, self.prompts(weights, batch), latents)

  def summed(self, found: Mapping[str, jax.Array], before: Scores | None = None) -> Scores:
    """Returns the weighted sum of the scores f32[N] given by name, added to those before."""
    scales = self.scales
    terms = [] if before is None else [before.total]
    terms += [scale * found[name] for name, scale in scales.items() if name in found]
    parts = {} if before is None else before.parts
    return Scores(
      functools.reduce(jnp.add, terms),
      parts | ({name: found[name] for name in scales if name in found} if len(scales) > 1 else {}),
    )
