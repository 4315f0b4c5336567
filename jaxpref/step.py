"""The training state and the one jitted step of each kind: offline (a batch of data) and online (SPO).

Both have the type `step(state, frozen, batch) -> (state, metrics)`. All randomness is derived from (seed, step), so a
restart replays nothing and skips nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpref import metrics as metrics_lib
from jaxpref import rollout
from jaxpref.models.preference import StepAwareCLIPModel
from jaxpref.models.text_to_image import TextToImage, guided, repeat_cond
from jaxpref.objectives import Objective, PairLoss, embed_prompts, named_key, score_images, transition_loss
from jaxpref.reference import ReferenceStats

Frozen = Any
Metrics = dict[str, jax.Array]
StepFn = Callable[["State", Frozen, Any], tuple["State", Metrics]]
# (ref_params, params, stats, step, frozen, batch, key) -> (ref_params, stats)
UpdateReference = Callable[..., tuple[Any, ReferenceStats]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything a checkpoint holds besides the data iterator.

  Attributes:
    step: i32[] completed steps, skipped updates included.
    params: what is trained, by component; float32.
    ref_params: the reference model, mirrors params; an empty tree for objectives without one.
    opt_state: the optimiser's.
    ref_stats: running divergence and counts of the reference's moves.
    skipped: i32[] updates that were left out because loss or gradient was not finite.
  """

  step: jax.Array
  params: Any
  ref_params: Any
  opt_state: Any
  ref_stats: ReferenceStats
  skipped: jax.Array


def initial_state(params: Any, ref_params: Any, opt_state: Any) -> State:
  """The state before the first step."""
  zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
  return State(zero(), params, ref_params, opt_state, ReferenceStats.zeros(), zero())


def _apply(
  optimizer: optax.GradientTransformation, loss: jax.Array, grads: Any, state: State
) -> tuple[State, jax.Array]:
  """The state after an update, or the same one where loss or gradient is not finite; and the gradient's norm."""
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new = (optax.apply_updates(state.params, updates), opt_state)
  params, opt_state = jax.tree.map(lambda n, old: jnp.where(finite, n, old), new, (state.params, state.opt_state))
  skipped = state.skipped + jnp.where(finite, 0, 1)
  return dataclasses.replace(state, params=params, opt_state=opt_state, skipped=skipped), norm


def _finish(
  before: State, state: State, update_reference: UpdateReference | None, frozen: Any, batch: Any, key: jax.Array
) -> tuple[State, Metrics]:
  """Counts the step and, where the reference may move, lets it; not in a step that skipped an update."""
  state = dataclasses.replace(state, step=state.step + 1)
  skipped = state.skipped - before.skipped
  found = {"skipped_updates": skipped.astype(jnp.float32)}
  # All transformations of a chain count alike; a skipped update is not counted.
  if counts := optax.tree_utils.tree_get_all_with_path(state.opt_state, "count"):
    found["optimizer_updates"] = counts[0][1].astype(jnp.float32)
  if update_reference is None:
    return state, found

  def move():
    return update_reference(
      state.ref_params, state.params, state.ref_stats, state.step, frozen, batch, named_key(key, "reference")
    )

  ref_params, stats = jax.lax.cond(skipped == 0, move, lambda: (state.ref_params, state.ref_stats))
  found |= {"divergence": stats.divergence, "reference_updates": stats.accepted.astype(jnp.float32)}
  return dataclasses.replace(state, ref_params=ref_params, ref_stats=stats), found


def summed(fn: Callable[[Any], Any], inputs: Any) -> Any:
  """The sum of fn over the leading axis of inputs, one at a time; besides its result it keeps one value of fn."""
  first = jax.tree.map(lambda x: x[0], inputs)
  if all(x.shape[0] == 1 for x in jax.tree.leaves(inputs)):
    return fn(first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, first))
  return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, fn(x)), None), zeros, inputs)[0]


def timesteps(objective: Objective, size: int, *, seed: int, step: int, accumulation: int = 1) -> jax.Array | None:
  """The timesteps i32[size] that `offline_step` drew for the rows of a batch; None for objectives without any.

  Args:
    step: steps completed before it.
  """
  if objective.timesteps is None:
    return None
  key = named_key(jax.random.fold_in(jax.random.key(seed), step), "loss")
  keys = [key] if accumulation == 1 else jax.random.split(key, accumulation)
  return jnp.stack([objective.timesteps(k, size // accumulation) for k in keys], axis=1).reshape(size)


def offline_step(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  accumulation: int = 1,
  update_reference: UpdateReference | None = None,
) -> StepFn:
  """One update from a batch of data, summed over `accumulation` micro-batches and divided once by the global count.

  Where the loss or the gradient is not finite, the update is left out and `skipped_updates` is 1.
  """

  def gradients(state: State, frozen: Any, batch: Any, key: jax.Array):
    def total(params):
      loss, count, pairs = objective.loss(params, state.ref_params, frozen, batch, key)
      return loss, (count, pairs)

    (loss, (count, pairs)), grads = jax.value_and_grad(total, has_aux=True)(state.params)
    return grads, {"loss": (loss, count), **pairs}

  def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    if accumulation == 1:
      grads, pairs = gradients(state, frozen, batch, named_key(key, "loss"))
    else:
      # Rows of a micro-batch are taken with a stride, so each stays spread over all devices.
      micro = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
      )
      keys = jax.random.split(named_key(key, "loss"), accumulation)
      grads, pairs = summed(lambda inputs: gradients(state, frozen, *inputs), (micro, keys))
    count = jnp.maximum(pairs["loss"][1], 1e-6)
    found = metrics_lib.divide(pairs)
    # A batch of nothing but ties has no loss, and is no reason to stop.
    found["loss"] = jnp.where(pairs["loss"][1] > 0, found["loss"], 0.0)
    before = state
    state, grad_norm = _apply(optimizer, found["loss"], jax.tree.map(lambda g: g / count, grads), state)
    state, finished = _finish(before, state, update_reference, frozen, batch, key)
    return state, {**found, "grad_norm": grad_norm, **finished}

  return step


def spo_step(
  model: TextToImage,
  scorer: StepAwareCLIPModel,
  pair_loss: PairLoss,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  num_inference_steps: int,
  eta: float,
  guidance_scale: float,
  warmup_steps: int,
  pool_size: int,
  inner_steps: int,
  threshold: float,
  next_latent: str,
  step_aware: bool = True,
  ratio_clip: float,
  minibatch: int,
  accumulation: int = 1,
  update_reference: UpdateReference | None = None,
  constrain: Callable[[Any], Any] = lambda tree: tree,
  row_multiple: int = 1,
) -> StepFn:
  """One iteration of SPO (arXiv 2406.04314): rollout, scoring, pair selection and updates, without a host round trip.

  All valid transitions of the batch are shuffled and spread evenly over ceil(valid / minibatch) updates; invalid ones
  cost nothing. Winner and loser transitions that start from one latent share one policy pass and one reference pass.
  An update whose loss or gradient is not finite is left out and counted in `skipped_updates`.

  Args:
    pair_loss: on the log of the clipped ratios; the paper's is the sigmoid loss with beta 10.
    step_aware: False tells the preference model time 0 at every step, as one that knows clean images only wants it.
    minibatch: transitions with a shared start in one update; those without come in proportion.
    accumulation: micro-batches that an update is split into; the same update, in less memory.
    constrain: pins the leading axis of a minibatch to the devices.
    row_multiple: micro-batches are filled up with masked rows to a multiple of it: the devices that share them.
  """

  def make_pairs(state: State, frozen: Any, batch: Any, key: jax.Array):
    weights = {**frozen, **state.params}
    prompts = batch["input_ids"].shape[0]
    cond = model.encode_text(frozen, batch["input_ids"])
    uncond = model.encode_empty(frozen, 1)
    text = embed_prompts(scorer, frozen["spm"], batch["input_ids"])
    eps = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)

    def predict(x, t):
      return eps(x, t, repeat_cond(cond, x.shape[0] // prompts))

    def score(x0, t):
      rows = repeat_cond({"text": text}, x0.shape[0] // prompts)["text"]
      return score_images(scorer, frozen["spm"], model.decode(frozen, x0), t if step_aware else jnp.zeros_like(t), rows)

    noise = jax.random.normal(named_key(key, "x_T"), (prompts, *model.latent_shape))
    pairs = rollout.pool_rollout(
      predict,
      score,
      model.schedule,
      noise,
      named_key(key, "rollout"),
      num_steps=num_inference_steps,
      eta=eta,
      warmup_steps=warmup_steps,
      pool_size=pool_size,
      inner_steps=inner_steps,
      threshold=threshold,
      next_latent=next_latent,
    )
    return jax.lax.stop_gradient(pairs), cond, uncond

  def flatten(transitions: rollout.Transitions, key: jax.Array):
    """Rows [B*G], the prompt of each, a random order with the valid rows in front, and their number."""
    prompts, groups = transitions.valid.shape
    flat = jax.tree.map(lambda v: v.reshape(prompts * groups, *v.shape[2:]), transitions)
    rank = jax.random.uniform(key, flat.valid.shape) + jnp.where(flat.valid, 0.0, 1.0)
    prompt = jnp.arange(prompts * groups) // groups
    return flat, prompt, jnp.argsort(rank), jnp.sum(flat.valid)

  def take(rows, start: jax.Array, stride: jax.Array, size: int):
    """Every `stride`-th valid row from `start`: `size` rows, a mask, and their prompts."""
    flat, prompt, order, valid = rows
    position = start + stride * jnp.arange(size)
    index = order[jnp.minimum(position, order.shape[0] - 1)]
    picked = constrain(jax.tree.map(lambda v: v[index], (flat, prompt)))
    return (*picked, (position < valid).astype(jnp.float32))

  def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    pairs, cond, uncond = make_pairs(state, frozen, batch, key)
    shared = flatten(pairs.shared, named_key(key, "shuffle_shared"))
    separate = flatten(pairs.separate, named_key(key, "shuffle_separate"))
    size = min(minibatch, shared[0].valid.shape[0])
    size_separate = -(-size * pairs.separate.valid.shape[1] // pairs.shared.valid.shape[1])
    ceil_div = lambda a, b: (a + b - 1) // b  # noqa: E731
    # Rows of all micro-batches past the size of the minibatch are past the valid ones.
    micro = lambda n: ceil_div(ceil_div(n, accumulation), row_multiple) * row_multiple  # noqa: E731
    num_updates = jnp.maximum(ceil_div(shared[3], size), ceil_div(separate[3], size_separate))

    def part_gradients(state: State, m: jax.Array, part: jax.Array):
      def rows(transitions, size):
        return take(transitions, m + num_updates * part * micro(size), num_updates, micro(size))

      def total(params):
        loss, count, found = transition_loss(
          model,
          pair_loss,
          {**frozen, **params},
          {**frozen, **state.ref_params},
          rows(shared, size),
          rows(separate, size_separate),
          cond,
          uncond,
          eta=eta,
          guidance_scale=guidance_scale,
          ratio_clip=ratio_clip,
        )
        return loss, (count, found)

      (loss, (count, found)), grads = jax.value_and_grad(total, has_aux=True)(state.params)
      return grads, {"loss": (loss, count), **found}

    def gradients(state: State, m: jax.Array):
      grads, found = summed(lambda part: part_gradients(state, m, part), jnp.arange(accumulation))
      return jax.tree.map(lambda g: g / jnp.maximum(found["loss"][1], 1.0), grads), found

    def update(m, carry):
      state, sums, norms = carry
      grads, found = gradients(state, m)
      state, norm = _apply(optimizer, found["loss"][0], grads, state)
      return state, metrics_lib.add(sums, found), norms + norm

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, state, jnp.int32(0))[1])
    before = state
    state, sums, norms = jax.lax.fori_loop(0, num_updates, update, (state, zeros, jnp.zeros(())))
    batch = {**batch, "latents": pairs.separate.next_w[:, -1]}
    state, finished = _finish(before, state, update_reference, frozen, batch, key)
    found = metrics_lib.divide(sums)
    # An iteration without any valid pair changes nothing: its loss is that of an undecided pair.
    found["loss"] = jnp.where(num_updates > 0, found["loss"], jnp.log(2.0))
    return state, {
      **found,
      "grad_norm": norms / jnp.maximum(num_updates, 1),
      "updates": num_updates.astype(jnp.float32),
      "valid_pairs": jnp.mean(pairs.shared.valid.astype(jnp.float32)),
      "reward": jnp.mean(pairs.scores[:, -1]),
      "reward_bin": jnp.mean(pairs.scores, axis=(0, 2)),
      "score_gap": jnp.mean(jnp.max(pairs.scores, axis=2) - jnp.min(pairs.scores, axis=2)),
      **finished,
    }

  return step
