"""The training state, and the one step of every method: `make_step` of an `Objective`.

The step has the type `step(state, frozen, batch) -> (state, metrics)`. An offline method makes one update from a batch
of data. An online method makes its experience from a batch of prompts, and as many updates as that needs. Then the
reference may move. All randomness derives from (seed, step), so a restart repeats nothing and skips nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpref import reference
from jaxpref.objectives import sums
from jaxpref.objectives.base import Drawn, Experience, Objective, Rows, Weights, named_key
from jaxpref.reference import ReferenceStats

Frozen = Any
Metrics = dict[str, jax.Array]
StepFn = Callable[["State", Frozen, Any], tuple["State", Metrics]]
DrawFn = Callable[["State", Frozen, Any], Drawn]
LearnFn = Callable[["State", Frozen, Any, Drawn, Mapping[str, jax.Array]], tuple["State", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything a checkpoint holds besides the data iterator.

  Attributes:
    step: i32[] completed steps, skipped updates included.
    params: trained parameters by component; float32.
    ref_params: the reference model, with the structure of params; an empty tree for objectives without one.
    opt_state: the optimiser's state.
    ref_stats: running divergence and counts of the reference's moves.
    skipped: i32[] updates that were skipped because loss or gradient was not finite.
  """

  step: jax.Array
  params: Any
  ref_params: Any
  opt_state: Any
  ref_stats: ReferenceStats
  skipped: jax.Array


def initial_state(params: Any, ref_params: Any, opt_state: Any) -> State:
  """Returns the state before the first step."""
  zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
  return State(zero(), params, ref_params, opt_state, ReferenceStats.zeros(), zero())


def _apply(
  optimizer: optax.GradientTransformation, loss: jax.Array, grads: Any, state: State
) -> tuple[State, jax.Array]:
  """Returns the state after an update, unchanged if loss or gradient is not finite; and the gradient's norm."""
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new = (optax.apply_updates(state.params, updates), opt_state)
  params, opt_state = jax.tree.map(lambda n, old: jnp.where(finite, n, old), new, (state.params, state.opt_state))
  skipped = state.skipped + jnp.where(finite, 0, 1)
  return dataclasses.replace(state, params=params, opt_state=opt_state, skipped=skipped), norm


@dataclasses.dataclass(frozen=True)
class MovingReference:
  """How the reference follows the policy: `reference.update` with these numbers, gated by the objective's divergence.

  Attributes:
    all: see `reference.update`.
  """

  alpha: float
  rho: float
  tau: int
  delta: float
  on_diverge: str
  decay: float

  def move(
    self, objective: Objective, state: State, frozen: Frozen, batch: Any, key: jax.Array
  ) -> tuple[Any, ReferenceStats]:
    """Returns the reference after the step, and its statistics.

    Args:
      frozen: has the pre-trained values of what is trained, except for an adapter that started from zero.
    """
    # An adapter adds nothing to the pre-trained model, which has none.
    pretrained = {k: frozen[k] for k in state.params} if all(k in frozen for k in state.params) else None

    return reference.update(
      state.ref_params,
      state.params,
      pretrained,
      state.ref_stats,
      step=state.step,
      divergence_fn=lambda ref: objective.divergence(Weights.of(state.params, ref, frozen, moves=True), batch, key),
      alpha=self.alpha,
      rho=self.rho,
      tau=self.tau,
      delta=self.delta,
      on_diverge=self.on_diverge,
      decay=self.decay,
    )


def _finish(
  before: State, state: State, move: Callable[[State], tuple[Any, ReferenceStats]] | None
) -> tuple[State, Metrics]:
  """Counts the step, and moves the reference if it may move and no update was skipped."""
  state = dataclasses.replace(state, step=state.step + 1)
  skipped = state.skipped - before.skipped
  found = {"skipped_updates": skipped.astype(jnp.float32)}
  # All transformations of a chain have the same count; a skipped update does not count.
  if counts := optax.tree_utils.tree_get_all_with_path(state.opt_state, "count"):
    found["optimizer_updates"] = counts[0][1].astype(jnp.float32)
  if move is None:
    return state, found
  ref_params, stats = jax.lax.cond(skipped == 0, lambda: move(state), lambda: (state.ref_params, state.ref_stats))
  found |= {"divergence": stats.divergence, "reference_updates": stats.accepted.astype(jnp.float32)}
  return dataclasses.replace(state, ref_params=ref_params, ref_stats=stats), found


def summed(fn: Callable[[Any], Any], inputs: Any) -> Any:
  """Returns the sum of fn over the leading axis of inputs, one at a time; keeps only one value of fn besides."""
  first = jax.tree.map(lambda x: x[0], inputs)
  if all(x.shape[0] == 1 for x in jax.tree.leaves(inputs)):
    return fn(first)
  fn = jax.jit(fn)  # traces it only once
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, first))
  return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, fn(x)), None), zeros, inputs)[0]


def timesteps(objective: Objective, size: int, *, seed: int, step: int, accumulation: int = 1) -> jax.Array | None:
  """Returns the times [size] that the step drew for a batch's rows; None if the objective draws none for data.

  Args:
    step: steps completed before it.
  """
  key = named_key(jax.random.fold_in(jax.random.key(seed), step), "loss")
  keys = [key] if accumulation == 1 else jax.random.split(key, accumulation)
  drawn = [t for k in keys if (t := objective.timesteps(k, size // accumulation)) is not None]
  return jnp.stack(drawn, axis=1).reshape(size) if drawn else None


def make_step(objective: Objective, optimizer: optax.GradientTransformation, **options: Any) -> StepFn:
  """Returns the training step of a method without rewards on the host; takes the options of `make_halves`."""
  return joined(*make_halves(objective, optimizer, **options))


def joined(draw: DrawFn, learn: LearnFn) -> StepFn:
  """Returns the halves as one function, for methods without rewards on the host."""
  return lambda state, frozen, batch: learn(state, frozen, batch, draw(state, frozen, batch), {})


def make_halves(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  accumulation: int = 1,
  moving: MovingReference | None = None,
  constrain: Callable[[Any], Any] = lambda tree: tree,
  row_multiple: int = 1,
) -> tuple[DrawFn, LearnFn]:
  """Returns the training step of a method in two halves: drawing, and learning from what was drawn.

  Between them rewards on the host score what was drawn, by name. Offline methods draw nothing. An update whose loss or
  gradient is not finite is skipped, also in the metrics of an online method, and counted in `skipped_updates`.

  Args:
    accumulation: number of micro-batches in an update; the same update in less memory.
    moving: how the reference moves; None: it does not.
    constrain: pins the leading axis of an online method's minibatch to the devices.
    row_multiple: its micro-batches are padded with masked rows to a multiple of this, the number of devices.
  """

  def models_of(frozen: Frozen) -> Callable[[Any, State], Weights]:
    return lambda params, state: Weights.of(params, state.ref_params, frozen, moves=moving is not None)

  def draw(state: State, frozen: Frozen, batch: Any) -> Drawn:
    if not objective.kinds:
      return Drawn(None)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    return objective.rollout(models_of(frozen)(state.params, state), batch, key)

  def learn(
    state: State, frozen: Frozen, batch: Any, drawn: Drawn, scores: Mapping[str, jax.Array]
  ) -> tuple[State, Metrics]:
    key, models = jax.random.fold_in(jax.random.key(seed), state.step), models_of(frozen)
    before = state
    of_rollout: Metrics = {}
    if objective.kinds:
      experience, of_rollout = objective.experience(drawn, scores, key)
      batch = {**batch, "latents": experience.latents}
      state, found = _updates_of_experience(
        objective,
        optimizer,
        models,
        state,
        experience,
        key,
        accumulation=accumulation,
        constrain=constrain,
        row_multiple=row_multiple,
      )
    else:
      state, found = _update_of_batch(
        objective, optimizer, models, state, batch, named_key(key, "loss"), accumulation=accumulation
      )
    move = None
    if moving is not None:
      move = lambda new: moving.move(objective, new, frozen, batch, named_key(key, "reference"))
    state, finished = _finish(before, state, move)
    return state, {**found, **of_rollout, **finished}

  return draw, learn


def _update_of_batch(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  models: Callable[[Any, State], Weights],
  state: State,
  batch: Any,
  key: jax.Array,
  *,
  accumulation: int,
) -> tuple[State, Metrics]:
  """Makes one update, summed over micro-batches and divided once by the global count.

  What a loss needs from the batch as a whole (`Objective.statistics`) is first computed over all micro-batches.
  """

  def gradients(batch: Any, key: jax.Array, known: sums.Pairs | None = None):
    def total(params):
      loss, count, pairs = objective.loss(models(params, state), batch, key, known)
      return loss, (count, pairs)

    (loss, (count, pairs)), grads = jax.value_and_grad(total, has_aux=True)(state.params)
    return grads, {"loss": (loss, count), **pairs}

  if accumulation == 1:
    grads, pairs = gradients(batch, key)
  else:
    # Rows of a micro-batch are taken with a stride, so each stays spread over all devices.
    micro = jax.tree.map(
      lambda x: x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
    )
    parts = (micro, jax.random.split(key, accumulation))
    w = models(state.params, state)
    first = jax.tree.map(lambda x: x[0], parts)
    known = None
    if jax.eval_shape(lambda inputs: objective.statistics(w, *inputs), first) is not None:
      known = summed(lambda inputs: objective.statistics(w, *inputs), parts)
    grads, pairs = summed(lambda inputs: gradients(inputs[0], inputs[1], known), parts)
  count = jnp.maximum(pairs["loss"][1], 1e-6)
  found = sums.divide(pairs)
  # A batch of ties alone has no loss, which is no reason to stop.
  found["loss"] = jnp.where(pairs["loss"][1] > 0, found["loss"], objective.empty_loss())
  state, grad_norm = _apply(optimizer, found["loss"], jax.tree.map(lambda g: g / count, grads), state)
  return state, {**found, "grad_norm": grad_norm}


class _Shuffled(NamedTuple):
  """Rows in a random order.

  Attributes:
    rows: N of them.
    order: i32[N] positions in `rows`, in a random order with the valid ones in front.
    valid: i32[] the number of valid ones.
  """

  rows: Rows
  order: jax.Array
  valid: jax.Array

  def take(self, start: jax.Array, stride: jax.Array, size: int, constrain: Callable[[Any], Any]) -> Rows:
    """Takes every `stride`-th valid row from `start`: `size` rows, with a mask."""
    position = start + stride * jnp.arange(size)
    index = self.order[jnp.minimum(position, self.order.shape[0] - 1)]
    data, prompt = constrain(jax.tree.map(lambda v: v[index], (self.rows.data, self.rows.prompt)))
    return Rows(data, prompt, (position < self.valid).astype(jnp.float32))


def _shuffled(rows: Rows, key: jax.Array) -> _Shuffled:
  rank = jax.random.uniform(key, rows.valid.shape) + jnp.where(rows.valid, 0.0, 1.0)
  return _Shuffled(rows, jnp.argsort(rank), jnp.sum(rows.valid))


def _ceil_div(a: Any, b: Any) -> Any:
  return (a + b - 1) // b


def _updates_of_experience(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  models: Callable[[Any, State], Weights],
  state: State,
  experience: Experience,
  key: jax.Array,
  *,
  accumulation: int,
  constrain: Callable[[Any], Any],
  row_multiple: int,
) -> tuple[State, Metrics]:
  """Uses every valid row in one update, spread evenly over as many updates as there are minibatches.

  A minibatch has `objective.update_rows` rows of the first kind, and rows of the others in proportion to their number.
  """
  shuffled = [
    _shuffled(rows, named_key(key, name)) for rows, name in zip(experience.kinds, objective.kinds, strict=True)
  ]
  counts = [rows.valid.shape[0] for rows in experience.kinds]
  first = objective.update_rows(counts[0])
  sizes = [_ceil_div(first * n, counts[0]) for n in counts]
  # Rows beyond the size of the minibatch come after the valid ones.
  micro = lambda n: _ceil_div(_ceil_div(n, accumulation), row_multiple) * row_multiple
  needed = [_ceil_div(kind.valid, size) for kind, size in zip(shuffled, sizes, strict=True) if size]
  num_updates = functools.reduce(jnp.maximum, needed)

  def part_gradients(state: State, m: jax.Array, part: jax.Array):
    def of_params(params):
      taken = tuple(
        kind.take(m + num_updates * part * micro(size), num_updates, micro(size), constrain)
        for kind, size in zip(shuffled, sizes, strict=True)
      )
      loss, count, found = objective.loss(models(params, state), experience._replace(kinds=taken), key)
      return loss, (count, found)

    (loss, (count, found)), grads = jax.value_and_grad(of_params, has_aux=True)(state.params)
    return grads, {"loss": (loss, count), **found}

  def gradients(state: State, m: jax.Array):
    grads, found = summed(lambda part: part_gradients(state, m, part), jnp.arange(accumulation))
    return jax.tree.map(lambda g: g / jnp.maximum(found["loss"][1], 1.0), grads), found

  def update(m, carry):
    before, total, norms = carry
    grads, found = gradients(before, m)
    state, norm = _apply(optimizer, found["loss"][0], grads, before)
    # The metrics only cover the updates that count.
    found, norm = jax.tree.map(lambda x: jnp.where(state.skipped == before.skipped, x, 0.0), (found, norm))
    return state, sums.add(total, found), norms + norm

  gradients = jax.jit(gradients)  # traces it only once
  before = state
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, state, jnp.int32(0))[1])
  state, total, norms = jax.lax.fori_loop(jnp.int32(0), num_updates, update, (state, zeros, jnp.zeros(())))
  done = num_updates - (state.skipped - before.skipped)
  found = sums.divide(total)
  found["loss"] = jnp.where(num_updates > 0, found["loss"], objective.empty_loss())
  return state, {
    **found,
    "grad_norm": jnp.where((done > 0) | (num_updates == 0), norms / jnp.maximum(done, 1), jnp.nan),
    "updates": num_updates.astype(jnp.float32),
  }
