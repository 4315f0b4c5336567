"""The training state and the one jitted step of each kind: offline (a batch of data) and online (SPO; GRPO and DDPO).

All have the type `step(state, frozen, batch) -> (state, metrics)`. All randomness is derived from (seed, step), so a
restart replays nothing and skips nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpref import losses, rollout
from jaxpref.models.preference import StepAwareCLIPModel
from jaxpref.models.text_to_image import TextToImage, guided, repeat_cond
from jaxpref.objectives import (
  Objective,
  PairLoss,
  embed_prompts,
  named_key,
  policy_loss,
  score_images,
  transition_loss,
)
from jaxpref.reference import ReferenceStats
from jaxpref.training import metrics as metrics_lib

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
  fn = jax.jit(fn)  # so that it is traced once
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

  What a loss takes from the batch as a whole (`Objective.statistics`) is computed of all micro-batches first.

  Where the loss or the gradient is not finite, the update is left out and `skipped_updates` is 1.
  """

  def gradients(state: State, frozen: Any, batch: Any, key: jax.Array, **statistics: Any):
    def total(params):
      loss, count, pairs = objective.loss(params, state.ref_params, frozen, batch, key, **statistics)
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
      known = {}
      if objective.statistics is not None:
        of_part = functools.partial(objective.statistics, state.params, state.ref_params, frozen)
        known["statistics"] = summed(lambda inputs: of_part(*inputs), (micro, keys))
      grads, pairs = summed(lambda inputs: gradients(state, frozen, *inputs, **known), (micro, keys))
    count = jnp.maximum(pairs["loss"][1], 1e-6)
    found = metrics_lib.divide(pairs)
    # A batch of nothing but ties has no loss, and is no reason to stop.
    found["loss"] = jnp.where(pairs["loss"][1] > 0, found["loss"], 0.0)
    before = state
    state, grad_norm = _apply(optimizer, found["loss"], jax.tree.map(lambda g: g / count, grads), state)
    state, finished = _finish(before, state, update_reference, frozen, batch, key)
    return state, {**found, "grad_norm": grad_norm, **finished}

  return step


class _Shuffled(NamedTuple):
  """Transitions of all prompts in a random order.

  Attributes:
    rows: their fields [N,...].
    prompt: i32[N] the prompt of each.
    order: i32[N] positions in `rows`, in a random order with the valid ones in front.
    valid: i32[] the number of valid ones.
  """

  rows: Any
  prompt: jax.Array
  order: jax.Array
  valid: jax.Array


def _shuffled(transitions: Any, key: jax.Array) -> _Shuffled:
  """Transitions with fields [B,G,...], of which one is `valid`, in a random order."""
  prompts, groups = transitions.valid.shape
  flat = jax.tree.map(lambda v: v.reshape(prompts * groups, *v.shape[2:]), transitions)
  rank = jax.random.uniform(key, flat.valid.shape) + jnp.where(flat.valid, 0.0, 1.0)
  return _Shuffled(flat, jnp.arange(prompts * groups) // groups, jnp.argsort(rank), jnp.sum(flat.valid))


def _minibatch_updates(
  loss_fn: Callable[..., tuple[jax.Array, jax.Array, metrics_lib.Pairs]],
  optimizer: optax.GradientTransformation,
  state: State,
  transitions: Sequence[_Shuffled],
  sizes: Sequence[int],
  *,
  accumulation: int,
  constrain: Callable[[Any], Any],
  row_multiple: int,
) -> tuple[State, Metrics]:
  """Every valid transition in one update, spread evenly over as many as minibatches of these sizes take.

  Args:
    loss_fn: (params, ref_params, and of each kind of transitions rows, prompts i32[n] and mask f32[n]) -> (sum of
      losses, count, metric pairs).
    transitions, sizes: of each kind, those of the iteration, and how many an update takes; 0 of a kind without any.
    accumulation, constrain, row_multiple: as of `spo_step`.
  """
  ceil_div = lambda a, b: (a + b - 1) // b  # noqa: E731
  # Rows of all micro-batches past the size of the minibatch are past the valid ones.
  micro = lambda n: ceil_div(ceil_div(n, accumulation), row_multiple) * row_multiple  # noqa: E731
  needed = [ceil_div(kind.valid, size) for kind, size in zip(transitions, sizes, strict=True) if size]
  num_updates = functools.reduce(jnp.maximum, needed)

  def take(kind: _Shuffled, start: jax.Array, size: int):
    """Every `num_updates`-th valid row from `start`: `size` rows, their prompts, and a mask."""
    position = start + num_updates * jnp.arange(size)
    index = kind.order[jnp.minimum(position, kind.order.shape[0] - 1)]
    picked = constrain(jax.tree.map(lambda v: v[index], (kind.rows, kind.prompt)))
    return (*picked, (position < kind.valid).astype(jnp.float32))

  def part_gradients(state: State, m: jax.Array, part: jax.Array):
    def total(params):
      taken = [
        take(kind, m + num_updates * part * micro(size), micro(size))
        for kind, size in zip(transitions, sizes, strict=True)
      ]
      loss, count, found = loss_fn(params, state.ref_params, *taken)
      return loss, (count, found)

    (loss, (count, found)), grads = jax.value_and_grad(total, has_aux=True)(state.params)
    return grads, {"loss": (loss, count), **found}

  def gradients(state: State, m: jax.Array):
    grads, found = summed(lambda part: part_gradients(state, m, part), jnp.arange(accumulation))
    return jax.tree.map(lambda g: g / jnp.maximum(found["loss"][1], 1.0), grads), found

  def update(m, carry):
    before, sums, norms = carry
    grads, found = gradients(before, m)
    state, norm = _apply(optimizer, found["loss"][0], grads, before)
    # The metrics are those of the updates that count.
    found, norm = jax.tree.map(lambda x: jnp.where(state.skipped == before.skipped, x, 0.0), (found, norm))
    return state, metrics_lib.add(sums, found), norms + norm

  gradients = jax.jit(gradients)  # so that it is traced once
  before = state
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, state, jnp.int32(0))[1])
  state, sums, norms = jax.lax.fori_loop(jnp.int32(0), num_updates, update, (state, zeros, jnp.zeros(())))
  done = num_updates - (state.skipped - before.skipped)
  return state, {
    **metrics_lib.divide(sums),
    "grad_norm": jnp.where((done > 0) | (num_updates == 0), norms / jnp.maximum(done, 1), jnp.nan),
    "updates": num_updates.astype(jnp.float32),
  }


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
  pool_last_step: bool = False,
  step_aware: bool = True,
  decode_size: int = 0,
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
  An update whose loss or gradient is not finite is left out, of the metrics, too, and counted in `skipped_updates`.

  Args:
    pair_loss: on the log of the clipped ratios; the paper's is the sigmoid loss with beta 10.
    step_aware: False tells the preference model time 0 at every step, as one that knows clean images only wants it.
    decode_size: pixels a side at which predictions are decoded for the preference model, see `TextToImage.decode`;
      0: those of the images.
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
      images = model.decode(frozen, x0, size=decode_size)
      return score_images(scorer, frozen["spm"], images, t if step_aware else jnp.zeros_like(t), rows)

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
      pool_last_step=pool_last_step,
    )
    return jax.lax.stop_gradient(pairs), cond, uncond

  def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    pairs, cond, uncond = make_pairs(state, frozen, batch, key)
    shared = _shuffled(pairs.shared, named_key(key, "shuffle_shared"))
    separate = _shuffled(pairs.separate, named_key(key, "shuffle_separate"))
    size = min(minibatch, shared.rows.valid.shape[0])
    size_separate = -(-size * pairs.separate.valid.shape[1] // pairs.shared.valid.shape[1])

    def loss(params, ref_params, shared, separate):
      return transition_loss(
        model,
        pair_loss,
        {**frozen, **params},
        {**frozen, **ref_params},
        shared,
        separate,
        cond,
        uncond,
        eta=eta,
        guidance_scale=guidance_scale,
        ratio_clip=ratio_clip,
      )

    before = state
    state, found = _minibatch_updates(
      loss,
      optimizer,
      state,
      (shared, separate),
      (size, size_separate),
      accumulation=accumulation,
      constrain=constrain,
      row_multiple=row_multiple,
    )
    ends = pairs.separate if size_separate else pairs.shared
    batch = {**batch, "latents": ends.next_w[:, -1]}
    state, finished = _finish(before, state, update_reference, frozen, batch, key)
    # An iteration without any valid pair changes nothing: its loss is that of an undecided pair.
    undecided = pair_loss(jnp.zeros(1), jnp.zeros(1), None)[0]
    found["loss"] = jnp.where(found["updates"] > 0, found["loss"], undecided)
    return state, {
      **found,
      "valid_pairs": jnp.mean(pairs.shared.valid.astype(jnp.float32)),
      "reward": jnp.mean(pairs.scores[:, -1]),
      "reward_group": jnp.mean(pairs.scores, axis=(0, 2)),
      "score_gap": jnp.mean(jnp.max(pairs.scores, axis=2) - jnp.min(pairs.scores, axis=2)),
      **finished,
    }

  return step


def trained_steps(num_inference_steps: int, timestep_fraction: float) -> int:
  """How many steps of a sample `grpo_step` trains on."""
  return max(1, round(timestep_fraction * num_inference_steps))


def grpo_step(
  model: TextToImage,
  scorer: StepAwareCLIPModel,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  num_inference_steps: int,
  eta: float,
  guidance_scale: float,
  group_size: int,
  advantage: str,
  advantage_clip: float,
  timestep_fraction: float,
  ratio_clip: float,
  kl_coef: float,
  minibatch: int,
  accumulation: int = 1,
  update_reference: UpdateReference | None = None,
  constrain: Callable[[Any], Any] = lambda tree: tree,
  row_multiple: int = 1,
) -> StepFn:
  """One iteration of an online policy gradient: rollout, rewards, advantages and updates, without a host round trip.

  GRPO (arXiv 2402.03300) on denoising steps, as DanceGRPO (arXiv 2505.07818) and Flow-GRPO (arXiv 2505.05470) have it;
  DDPO (arXiv 2305.13301) with `advantage="batch"`, `group_size=1` and `kl_coef=0`. Of each prompt `group_size` samples
  are drawn from noises of their own, and their images scored at time 0. All steps of all samples, or a share of them,
  are shuffled and spread evenly over ceil(steps / minibatch) updates; each is used once. An update whose loss or
  gradient is not finite is left out, of the metrics, too, and counted in `skipped_updates`.

  Args:
    eta: of DDIM, above 0; the three methods take 1, 0.3 and another sampler of about 0.7.
    advantage: "group", rewards less the mean of their prompt's samples, over their standard deviation (GRPO); "batch",
      the same over all samples of the iteration (DDPO).
    advantage_clip: bound of the advantages' size; 5 to 10 in the released trainers.
    timestep_fraction: share of each sample's steps that is trained on, at random (0.6 in DanceGRPO, 1 in DDPO).
    ratio_clip: eps of the clipped ratio; 1e-4 in all three, as log-densities are means over h, w, C.
    kl_coef: weight of the KL to the reference; with 0 (DDPO, DanceGRPO) the reference is not called.
    minibatch: steps of one update; the rest as of `spo_step`.
  """
  trained = trained_steps(num_inference_steps, timestep_fraction)

  def make_steps(state: State, frozen: Any, batch: Any, key: jax.Array):
    """The steps to train on; of each prompt rewards [B,G] and the best latents; and the conditioning."""
    weights = {**frozen, **state.params}
    prompts = batch["input_ids"].shape[0]
    cond = model.encode_text(frozen, batch["input_ids"])
    uncond = model.encode_empty(frozen, 1)
    text = embed_prompts(scorer, frozen["spm"], batch["input_ids"])
    of_samples = repeat_cond({"cond": cond, "text": text}, group_size)
    eps = guided(lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale)
    noise = jax.random.normal(named_key(key, "x_T"), (prompts * group_size, *model.latent_shape))
    drawn = rollout.ddim_trajectories(
      lambda x, t: eps(x, t, of_samples["cond"]),
      model.schedule,
      noise,
      named_key(key, "rollout"),
      num_steps=num_inference_steps,
      eta=eta,
    )
    images = model.decode(frozen, drawn.x[:, -1])
    reward = score_images(scorer, frozen["spm"], images, jnp.zeros(len(noise), jnp.int32), of_samples["text"])
    of_group = group_size if advantage == "group" else len(noise)
    advantages = losses.group_advantages(reward, group_size=of_group)
    advantages = jnp.clip(advantages, -advantage_clip, advantage_clip)
    # Of each sample the steps whose place in a random order of them is among the first.
    place = jnp.argsort(jax.random.uniform(named_key(key, "timesteps"), drawn.log_prob.shape), axis=1)
    every = lambda v, axis: jnp.broadcast_to(jnp.expand_dims(v, axis), drawn.log_prob.shape)  # noqa: E731
    steps = rollout.Steps(
      x=drawn.x[:, :-1],
      next=drawn.x[:, 1:],
      t=every(drawn.t, 0),
      prev_t=every(drawn.prev_t, 0),
      log_prob=drawn.log_prob,
      advantage=every(advantages, 1),
      valid=place < trained,
    )
    of_prompts = jax.tree.map(lambda v: v.reshape(prompts, -1, *v.shape[2:]), steps)
    reward = reward.reshape(prompts, group_size)
    latents = drawn.x[:, -1].reshape(prompts, group_size, *model.latent_shape)
    best = jax.vmap(lambda x, r: x[jnp.argmax(r)])(latents, reward)
    return jax.lax.stop_gradient((of_prompts, reward, best)), cond, uncond

  def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    (steps, reward, best), cond, uncond = make_steps(state, frozen, batch, key)

    def loss(params, ref_params, rows):
      return policy_loss(
        model,
        {**frozen, **params},
        {**frozen, **ref_params},
        rows,
        cond,
        uncond,
        eta=eta,
        guidance_scale=guidance_scale,
        ratio_clip=ratio_clip,
        kl_coef=kl_coef,
      )

    before = state
    state, found = _minibatch_updates(
      loss,
      optimizer,
      state,
      (_shuffled(steps, named_key(key, "shuffle")),),
      (min(minibatch, reward.size * trained),),
      accumulation=accumulation,
      constrain=constrain,
      row_multiple=row_multiple,
    )
    state, finished = _finish(before, state, update_reference, frozen, {**batch, "latents": best}, key)
    return state, {
      **found,
      "reward": jnp.mean(reward),
      "score_gap": jnp.mean(jnp.max(reward, axis=1) - jnp.min(reward, axis=1)),
      **finished,
    }

  return step
