"""The moving reference: a regularised EMA step behind a divergence gate, from tree to tree.

Every tau steps the reference moves towards the policy, unless the move would take it too far from
the pre-trained weights (Kang et al., arXiv 2505.18736):

    proposal = ref + alpha (theta - ref) - rho (ref - init)
    ref'     = proposal if step % tau == 0 and D <= delta else (ref | init)
    D        = E[ err_ref(x_t) - err_init(x_t) ]  over preferred samples, t and noise

alpha = 1, rho = 0 is the paper's hard update. Everything is elementwise, so it runs under `jit` on
sharded parameters unchanged. The reference is float32: in bfloat16 a small EMA step is lost to
rounding (1,000 steps of 1e-3 from 1.0 towards 1.5 leave exactly 1.0).

With LoRA the trees are the adapters and init is the zero adapter (`None`). alpha = 1 copies the
adapter exactly. For alpha < 1 an average of the factors A, B is not the average of the products
BA. `lora_average_gap` measures the difference. The same functions applied to the products,
`lora_delta`, are exact, at the cost of a dense matrix per adapted layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

MODES = ("update", "frozen")
ON_DIVERGE = ("freeze", "reinit")
GATES = ("proposal", "reference")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReferenceStats:
  """What the gate remembers: a pytree of scalars to keep in the training state and to log.

  Attributes:
    divergence: f32[] running estimate of D in units of the mean-reduced error; 0 before the first.
    estimates: i32[] measurements in the running estimate, since the start or the last reset.
    proposals: i32[] update steps so far.
    accepted: i32[] proposals the reference moved to.
    resets: i32[] times it was set back to the pre-trained weights.
  """

  divergence: jax.Array
  estimates: jax.Array
  proposals: jax.Array
  accepted: jax.Array
  resets: jax.Array

  @classmethod
  def zeros(cls) -> "ReferenceStats":
    """Returns the statistics at step 0; separate buffers, so that all can be donated."""
    counts = (jnp.zeros((), jnp.int32) for _ in range(4))
    return cls(jnp.zeros((), jnp.float32), *counts)


def init_reference(params: Tree) -> Tree:
  """Returns a float32 copy of the parameters: never the same buffers, so that both can be donated."""
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)


def divergence(err_ref: jax.Array, err_init: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Returns D = mean(err_ref - err_init), how much worse the reference denoises preferred samples.

  The plain mean-reduced difference, with the sign that grows as the reference drifts: the paper's
  Eq. 7 and 8 disagree in sign, and it does not say whether D scales with T.

  Args:
    err_ref: f32[B] squared error of the reference (or proposal), mean over H, W, C.
    err_init: f32[B] the same of the pre-trained model, at the same x_t.
    mask: f32[B] 1 for the samples that count; None for all.
  Returns:
    f32[], 0 while the reference is the pre-trained model.
  Raises:
    ValueError: shapes that disagree.

  >>> print(divergence(jnp.array([0.25, 0.5]), jnp.array([0.25, 0.25])))
  0.125
  """
  mask = jnp.ones(jnp.shape(err_ref)) if mask is None else mask
  if not jnp.ndim(err_ref) == 1 or not jnp.shape(err_ref) == jnp.shape(err_init) == mask.shape:
    raise ValueError(f"expected errors and mask [B], got {jnp.shape(err_ref)}, {jnp.shape(err_init)} and {mask.shape}.")
  mask = jnp.asarray(mask, jnp.float32)
  difference = jnp.asarray(err_ref, jnp.float32) - jnp.asarray(err_init, jnp.float32)
  return jnp.sum(jnp.where(mask > 0, difference * mask, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)


def propose(ref: Tree, params: Tree, init: Tree | None = None, *, alpha: float = 1.0, rho: float = 0.0) -> Tree:
  """Returns the regularised EMA step, ref + alpha (params - ref) - rho (ref - init).

  Args:
    ref: float32 tree, the reference.
    params: tree of the same structure, the policy.
    init: tree of the same structure, the pre-trained weights; None for zeros, the zero adapter of
      LoRA.
    alpha: share of the way to the policy, in (0, 1]; 1 copies the policy, bit for bit.
    rho: pull towards the pre-trained weights, in [0, 1).
  Returns:
    float32 tree.
  Raises:
    ValueError: a hyper-parameter out of range, trees that do not match, or a reference that is
      not float32.

  >>> print(propose({"w": jnp.array([0.0])}, {"w": jnp.array([2.0])}, alpha=0.25))
  {'w': Array([0.5], dtype=float32)}
  """
  if not 0.0 < alpha <= 1.0:
    raise ValueError(f"alpha is {alpha}, expected a share in (0, 1]; 1 copies the policy.")
  if not 0.0 <= rho < 1.0:
    raise ValueError(f"rho is {rho}, expected a pull in [0, 1); 0 for none.")
  _check_trees(ref, params, init)

  def leaf(r, p, i):
    p = jnp.asarray(p, jnp.float32)
    # r + (p - r) would differ from p by rounding.
    new = p if alpha == 1.0 else r + alpha * (p - r)
    if rho:
      new -= rho * (r if i is None else r - jnp.asarray(i, jnp.float32))
    return new

  if init is None:
    return jax.tree.map(lambda r, p: leaf(r, p, None), ref, params)
  return jax.tree.map(leaf, ref, params, init)


def gated_update(
  ref: Tree,
  params: Tree,
  init: Tree | None,
  *,
  step: jax.Array | int,
  divergence: jax.Array | float,
  alpha: float = 1.0,
  rho: float = 0.0,
  tau: int = 32,
  delta: float = 0.005,
  on_diverge: str = "freeze",
) -> tuple[Tree, jax.Array]:
  """Moves the reference one step for a known divergence; see `update`.

  Args:
    ref: float32 tree, the reference.
    params: tree of the same structure, the policy.
    init: the pre-trained weights; None for zeros (LoRA).
    step: i32[] number of completed steps.
    divergence: f32[] D, from `divergence`; a non-finite one counts as too large.
    alpha: share of the way to the policy, in (0, 1].
    rho: pull towards the pre-trained weights.
    tau: steps between moves.
    delta: largest D at which a move is accepted.
    on_diverge: "freeze" keeps the reference, "reinit" sets it back to init.
  Returns:
    The float32 tree to use from now on and accepted bool[].
  Raises:
    ValueError: as `propose`, or an unknown on_diverge.

  >>> ref, accepted = gated_update({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, None,
  ...                              step=64, divergence=0.001)
  >>> print(ref["w"], accepted)
  [1.] True
  """
  _check_gate(tau, delta, on_diverge)
  proposal = propose(ref, params, init, alpha=alpha, rho=rho)
  due = jnp.asarray(step) % tau == 0
  inside = jnp.asarray(divergence, jnp.float32) <= delta
  kept = ref if on_diverge == "freeze" else _where(due, _init_like(ref, init), ref)
  return _where(due & inside, proposal, kept), due & inside


# Many parameters: public; the numbers of the paper are arguments, each with a default.
def update(
  ref: Tree,
  params: Tree,
  init: Tree | None,
  stats: ReferenceStats,
  *,
  step: jax.Array | int,
  divergence_fn: Callable[[Tree], jax.Array],
  mode: str = "update",
  alpha: float = 1.0,
  rho: float = 0.0,
  tau: int = 32,
  delta: float = 0.005,
  on_diverge: str = "freeze",
  gate: str = "proposal",
  decay: float = 0.5,
) -> tuple[Tree, ReferenceStats]:
  """Moves the reference every tau steps if the divergence allows it (arXiv 2505.18736).

  divergence_fn is traced into a `lax.cond` and runs on update steps only. One measurement is
  noisy, so the gate reads a running mean over measurements, with exponentially decaying weights
  that sum to 1 from the first one on (bias-corrected); decay = 0 is the paper's single
  measurement. A measurement that is not finite closes the gate and is not averaged. A reset starts
  a new average.

  Args:
    ref: float32 tree, the reference.
    params: tree of the same structure, the policy.
    init: the pre-trained weights; None for zeros, the zero adapter of LoRA.
    stats: `ReferenceStats.zeros()` at first, then what the last call returned.
    step: i32[] number of completed steps; a multiple of tau is an update step.
    divergence_fn: tree -> f32[], D of a would-be reference from init; see `divergence`.
    mode: "frozen" returns ref and stats as they are and traces nothing.
    alpha: share of the way to the policy, in (0, 1]; 1 is the paper's hard update.
    rho: pull towards the pre-trained weights, in [0, 1).
    tau: steps between moves; the paper searches 16, 32, 64.
    delta: largest divergence at which a move is accepted; 0.005 for SD1.5, 0.002 for SDXL.
    on_diverge: "freeze" keeps the reference (better in the paper), "reinit" sets it to init.
    gate: whose divergence is measured: the "proposal"'s, so that none above delta is adopted, or
      the present "reference"'s, which adopts the first one above it. "Above" refers to the running
      mean; with decay = 0 it is the proposal's own measurement.
    decay: weight of the past in the running mean, in [0, 1).
  Returns:
    The float32 tree to use from now on, with ref's shardings, and the new statistics.
  Raises:
    ValueError: an argument is out of range or has an unknown name, trees do not match, or the
      reference is not float32.

  >>> ref, params = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
  >>> ref, stats = update(ref, params, None, ReferenceStats.zeros(), step=32,
  ...                     divergence_fn=lambda tree: 0.002 * tree["w"].sum())
  >>> print(ref["w"], stats.accepted, stats.divergence)
  [1.] 1 0.002
  """
  for name, value, known in (("mode", mode, MODES), ("gate", gate, GATES)):
    if value not in known:
      raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
  if mode == "frozen":
    return ref, stats
  _check_gate(tau, delta, on_diverge)
  if not 0.0 <= decay < 1.0:
    raise ValueError(f"decay is {decay}, expected a weight in [0, 1); 0 for no averaging.")
  _check_trees(ref, params, init)

  def move():
    proposal = propose(ref, params, init, alpha=alpha, rho=rho)
    measured = jnp.asarray(divergence_fn(proposal if gate == "proposal" else ref), jnp.float32)
    finite = jnp.isfinite(measured)
    estimates = stats.estimates + finite
    # The newest weight, (1 - decay) / (1 - decay^n), makes the weights of n measurements sum to 1;
    # decay is rounded first, so that the first weight is exactly 1.
    past = jnp.float32(decay)
    weight = (1.0 - past) / (1.0 - past ** jnp.maximum(estimates, 1).astype(jnp.float32))
    step_to = jnp.where(finite, weight * (measured - stats.divergence), 0.0)
    running = stats.divergence + step_to
    accepted = finite & (running <= delta)
    reset = ~accepted if on_diverge == "reinit" else jnp.zeros((), bool)
    kept = ref if on_diverge == "freeze" else _init_like(ref, init)
    return _where(accepted, proposal, kept), ReferenceStats(
      divergence=jnp.where(reset, 0.0, running),
      estimates=jnp.where(reset, 0, estimates),
      proposals=stats.proposals + 1,
      accepted=stats.accepted + accepted,
      resets=stats.resets + reset,
    )

  return jax.lax.cond(jnp.asarray(step) % tau == 0, move, lambda: (ref, stats))


# ---------------------------------------------------------------------------------------------
# LoRA


def lora_delta(adapter: Tree) -> Tree:
  """Returns the dense weight changes A B of an adapter; their average is exact for every alpha.

  Args:
    adapter: nested dict with {"lora_A" [..., in, r], "lora_B" [..., r, out]} at its leaves.
  Returns:
    The same nesting with one f32[..., in, out] instead of each pair, without any scale.
    `propose` and `update` take such trees like any other, with init None.

  >>> print(lora_delta({"q": {"lora_A": jnp.ones((2, 1)), "lora_B": jnp.ones((1, 2))}})["q"])
  [[1. 1.]
   [1. 1.]]
  """
  return jax.tree.map(_product, adapter, is_leaf=_is_lora_pair)


def lora_average_gap(ref: Tree, adapter: Tree, *, alpha: float) -> jax.Array:
  """Returns the relative error of averaging LoRA factors instead of their products.

  The product of the averaged factors differs from the average of the products by
  alpha (1 - alpha) (A' - A)(B' - B), which is 0 for alpha = 1 and small for small moves.

  Args:
    ref: the adapter of the reference.
    adapter: the adapter of the policy.
    alpha: share of the way to the policy.
  Returns:
    f32[], Frobenius norm of the difference over that of the exact average, over all layers.
    Computed in the rank dimension: no dense matrix is formed.
  """
  gap = exact = jnp.zeros((), jnp.float32)
  old = jax.tree.leaves(ref, is_leaf=_is_lora_pair)
  new = jax.tree.leaves(adapter, is_leaf=_is_lora_pair)
  for r, p in zip(old, new, strict=True):
    (a0, b0), (a1, b1) = _factors(r), _factors(p)
    gap += _square_norm(alpha * (a1 - a0), (1.0 - alpha) * (b1 - b0))
    both = jnp.concatenate([a0, a1], axis=-1)
    exact += _square_norm(both, jnp.concatenate([(1.0 - alpha) * b0, alpha * b1], axis=-2))
  return jnp.sqrt(gap) / jnp.maximum(jnp.sqrt(exact), 1e-30)


def _is_lora_pair(node: Any) -> bool:
  return isinstance(node, Mapping) and set(node) == {"lora_A", "lora_B"}


def _factors(pair):
  return jnp.asarray(pair["lora_A"], jnp.float32), jnp.asarray(pair["lora_B"], jnp.float32)


def _product(pair):
  a, b = _factors(pair)
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _square_norm(a, b):
  """Returns |A B|_F^2 = sum (A^T A) * (B B^T), an r x r computation."""
  highest = jax.lax.Precision.HIGHEST
  left = jnp.matmul(jnp.swapaxes(a, -1, -2), a, precision=highest)
  right = jnp.matmul(b, jnp.swapaxes(b, -1, -2), precision=highest)
  return jnp.maximum(jnp.sum(left * right), 0.0)


# ---------------------------------------------------------------------------------------------


def _where(condition, x, y):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def _init_like(ref, init):
  if init is None:
    return jax.tree.map(jnp.zeros_like, ref)
  return jax.tree.map(lambda r, i: jnp.asarray(i, r.dtype), ref, init)


def _check_gate(tau, delta, on_diverge):
  if tau < 1:
    raise ValueError(f"tau is {tau}, expected at least 1 step between moves.")
  if not delta >= 0.0:
    raise ValueError(f"delta is {delta}, expected a divergence of at least 0, e.g. 0.005.")
  if on_diverge not in ON_DIVERGE:
    raise ValueError(f"on_diverge is {on_diverge!r}, expected one of {', '.join(ON_DIVERGE)}.")


def _check_trees(ref: Any, params: Any, init: Any) -> None:
  expected: Any = jax.tree.structure(ref)
  for name, tree in (("params", params), ("init", init)):
    if tree is None:
      continue
    if jax.tree.structure(tree) != expected:
      raise ValueError(
        f"{name} and the reference are different trees, {jax.tree.structure(tree)} and "
        f"{expected}; make the reference with init_reference(params)."
      )
    for (path, r), x in zip(jax.tree_util.tree_leaves_with_path(ref), jax.tree.leaves(tree), strict=True):
      if jnp.shape(x) != jnp.shape(r):
        raise ValueError(
          f"{name} leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(x)}, the reference "
          f"has {jnp.shape(r)}; make the reference with init_reference(params)."
        )
  for path, leaf in jax.tree_util.tree_leaves_with_path(ref):
    if leaf.dtype != jnp.float32:
      raise ValueError(
        f"reference leaf {jax.tree_util.keystr(path)} is {leaf.dtype}, expected float32, because "
        f"small moves are lost to rounding below it; make it with init_reference(params)."
      )
