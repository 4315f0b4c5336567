"""Counts floating-point operations in a jaxpr: matrix products and convolutions, two per multiply-add.

Unlike the compiler's own cost analysis this counts a loop's body as often as it runs, and nothing elementwise.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(fn: Callable[..., Any], *args: Any, while_trips: float = 1.0, scope: str | None = None) -> float:
  """Returns the operations of one call of a function, on all devices together.

  Args:
    fn: anything that can be traced.
    *args: arrays or ShapeDtypeStructs.
    while_trips: how often a loop's body runs if the number of rounds is unknown (SPO's updates).
    scope: counts only what is traced within this `jax.named_scope`.
  """
  return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr, while_trips=while_trips, scope=scope)


def of_jaxpr(jaxpr: core.Jaxpr, *, while_trips: float = 1.0, scope: str | None = None) -> float:
  """Returns what `count` does, for a function that is already traced."""
  return sum(_of_equation(eqn, while_trips, scope) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any, while_trips: float, scope: str | None) -> float:
  name = eqn.primitive.name
  if scope is not None and scope in re.split(r"[/()]", str(eqn.source_info.name_stack)):
    scope = None  # and everything it runs
  if scope is not None and name in ("dot_general", "conv_general_dilated"):
    return 0.0
  if name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
  if name == "conv_general_dilated":
    kernel, dims = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    out, window = eqn.outvars[0].aval.shape, [kernel[i] for i in dims.rhs_spec[2:]]
    # If the input is dilated, a window meets mostly zeros: the gradient of a strided convolution.
    zeros = math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(out) * math.prod(window) * kernel[dims.rhs_spec[1]] / zeros
  if name == "cond":
    return max(of_jaxpr(branch.jaxpr, while_trips=while_trips, scope=scope) for branch in eqn.params["branches"])
  times = {"scan": eqn.params.get("length", 1), "while": while_trips}.get(name, 1)
  if name == "shard_map":  # its arrays are one device's
    times = eqn.params["mesh"].size
  return times * sum(of_jaxpr(inner, while_trips=while_trips, scope=scope) for inner in _inner(eqn))


def _inner(eqn: Any) -> list[core.Jaxpr]:
  """Returns the jaxprs that an equation runs (for a custom gradient the function itself, not its rules)."""
  found = []
  for value in eqn.params.values():
    if isinstance(value, core.ClosedJaxpr):
      found.append(value.jaxpr)
    elif isinstance(value, core.Jaxpr):
      found.append(value)
  return found
