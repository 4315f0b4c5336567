"""Optimisers and learning-rate schedules, by the names Optax users know."""

import optax

from jaxpref.config import OPTIMIZERS, SCHEDULES


def learning_rate(name: str, peak: float, *, num_steps: int, warmup_steps: int) -> optax.Schedule:
  """Returns a linear warm-up from 0 to `peak`, then constant, or linear / cosine decay to 0 at `num_steps`.

  Raises:
    ValueError: the name is unknown, or the warm-up leaves no steps to decay in.
  """
  if name not in SCHEDULES:
    raise ValueError(f"config.optimizer.schedule={name!r} is unknown; expected one of {', '.join(SCHEDULES)}.")
  if name != "constant" and warmup_steps >= num_steps:
    raise ValueError(
      f"config.optimizer.warmup_steps={warmup_steps} must be below the number of updates ({num_steps}) "
      f"for schedule={name!r}."
    )
  if name == "constant":
    body = optax.constant_schedule(peak)
  elif name == "linear":
    body = optax.linear_schedule(peak, 0.0, num_steps - warmup_steps)
  else:
    body = optax.cosine_decay_schedule(peak, num_steps - warmup_steps)
  if not warmup_steps:
    return body
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), body], [warmup_steps])


def _decayed(
  core: optax.GradientTransformation, schedule: optax.Schedule, weight_decay: float, *, flip_sign: bool = True
) -> optax.GradientTransformation:
  """Adds decoupled weight decay like AdamW's; `flip_sign` if `core` returns an ascent direction."""
  decay = [optax.add_decayed_weights(weight_decay if flip_sign else -weight_decay)] if weight_decay else []
  return optax.chain(core, *decay, optax.scale_by_learning_rate(schedule, flip_sign=flip_sign))


def make_optimizer(
  name: str,
  schedule: optax.Schedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """Returns global-norm clipping (0 switches it off) followed by the named optimiser, all with AdamW's weight decay.

  Clipping comes first and acts on the whole gradient, after accumulation.

  Raises:
    ValueError: the name is unknown.
  """
  if name == "adamw":
    core = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  elif name == "adafactor":
    # Its own weight decay would not scale with the learning rate.
    core = _decayed(optax.adafactor(multiply_by_parameter_scale=False), schedule, weight_decay, flip_sign=False)
  elif name == "lion":
    core = optax.lion(schedule, b1=b1, b2=b2, weight_decay=weight_decay)
  elif name == "sgd":
    core = _decayed(optax.trace(b1) if b1 else optax.identity(), schedule, weight_decay)
  else:
    raise ValueError(f"config.optimizer.name={name!r} is unknown; expected one of {', '.join(OPTIMIZERS)}.")
  return optax.chain(optax.clip_by_global_norm(clip_norm), core) if clip_norm else core
