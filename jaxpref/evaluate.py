"""Compares a model with the one it started from: same prompts, same seeds, an independent judge, honest intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxpref import rollout, sharding
from jaxpref.models.preference import Judge
from jaxpref.models.text_to_image import TextToImage, guided

SAMPLERS = ("ddim", "dpmpp_2m")


def draw(
  model: TextToImage,
  weights: Any,
  input_ids: np.ndarray,
  *,
  seeds_per_prompt: int,
  num_inference_steps: int,
  guidance_scale: float,
  eta: float,
  seed: int,
  batch_size: int,
  progress: str | None = None,
  negative_ids: np.ndarray | None = None,
  guidance_rescale: float = 0.0,
  sampler: str = "ddim",
  karras: bool = False,
  size: tuple[int, int] | None = None,
  mesh: Mesh | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Draws every prompt from the same seeds, whatever the weights, the batch size and the devices.

  The picture numbered prompt * seeds_per_prompt + i has its own noise, which follows from `seed` and that number.

  Args:
    weights: parameters by component, with `empty_ids`.
    input_ids: i32[P, L].
    eta: of DDIM: 0 is deterministic, 1 ancestral sampling.
    progress: label of a progress bar; None for none.
    negative_ids: i32[1, L] of a negative prompt; None for none.
    guidance_rescale: as of `text_to_image.guided`.
    sampler: "ddim", or "dpmpp_2m" for DPM-Solver++ 2M.
    karras: noise levels of "dpmpp_2m", as of `rollout.dpm_solver_sample`.
    size: height and width in pixels; the model's own by default.
    mesh: splits each batch, made a multiple, over its devices, on which the weights are.
  Yields:
    numbers i64[n] of pictures, in order, and the pictures u8[n, H, W, 3]; n at most the batch size.
    2 * P * S * num_inference_steps UNet evaluations in all with guidance, S = seeds_per_prompt.
  """
  if sampler not in SAMPLERS:
    raise ValueError(f"sampler={sampler!r}, expected one of {', '.join(SAMPLERS)}.")
  latent_shape = model.latent_shape if size is None else model.latent_shape_for(*size)
  sized = {}  # SDXL is told the size
  if size is not None and model.text_encoder_2 is not None:
    sized["time_ids"] = jnp.asarray([[*size, 0.0, 0.0, *size]], jnp.float32)
  numbers = np.arange(input_ids.shape[0] * seeds_per_prompt)
  base = jax.random.key(seed)
  whole, split = (None, None) if mesh is None else (sharding.replicated(mesh), sharding.batch_sharding(mesh))

  def sample(weights, ids, number):
    if split is not None:
      ids, number = jax.lax.with_sharding_constraint((ids, number), split)
    keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(number)
    noise = jax.vmap(lambda k: jax.random.normal(k, latent_shape))(keys)
    cond = model.encode_text(weights, ids, **sized)
    if negative_ids is None:
      uncond = model.encode_empty(weights, 1, **sized)
    else:
      uncond = model.encode_negative(weights, jnp.asarray(negative_ids), **sized)
    eps = guided(
      lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale, guidance_rescale=guidance_rescale
    )
    predict = lambda x, t: eps(x, t, cond)
    if sampler == "ddim":
      steps = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed + 1), i))(number)  # each row's own noise
      latents = rollout.ddim_sample(predict, model.schedule, noise, steps, num_steps=num_inference_steps, eta=eta)
    else:
      latents = rollout.dpm_solver_sample(
        predict, model.schedule, noise, num_steps=num_inference_steps, karras=karras
      )
    return to_uint8(model.decode(weights, latents))

  sample = jax.jit(sample) if mesh is None else jax.jit(sharding.on_mesh(mesh, sample), out_shardings=whole)
  unit = 1 if mesh is None else sharding.batch_devices(mesh)
  batch_size = -(-batch_size // unit) * unit
  with tqdm(total=numbers.size, desc=progress, disable=progress is None) as bar:
    for start in range(0, numbers.size, batch_size):
      rows = numbers[start : start + batch_size]
      padded = np.resize(rows, batch_size)  # one shape, so one compilation
      images = np.asarray(sample(weights, input_ids[padded // seeds_per_prompt], padded.astype(np.int32)))
      bar.update(rows.size)
      yield rows, images[: rows.size]


def generate(
  model: TextToImage, weights: Any, input_ids: np.ndarray, *, seeds_per_prompt: int, **arguments: Any
) -> np.ndarray:
  """All that `draw`, whose arguments these are, yields: u8[P, S, H, W, 3], S = seeds_per_prompt."""
  parts = draw(model, weights, input_ids, seeds_per_prompt=seeds_per_prompt, **arguments)
  flat = np.concatenate([images for _, images in parts])
  return flat.reshape(input_ids.shape[0], seeds_per_prompt, *flat.shape[1:])


def to_uint8(images: jax.Array) -> jax.Array:
  """f32[..., 3] in [-1, 1] to u8, rounded and clipped as diffusers does."""
  return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def judge_images(
  judge: Judge, params: Any, images: np.ndarray, *, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
  """Log-probabilities of styles f32[N, S] and logits of captions f32[N, C] for u8[N, H, W, 3]."""

  @jax.jit
  def apply(x):
    style, classes = judge.apply({"params": params}, x.astype(jnp.float32) / 127.5 - 1.0)
    return jax.nn.log_softmax(style), classes

  parts = []
  for start in range(0, len(images), batch_size):
    rows = images[start : start + batch_size]
    out = apply(np.resize(rows, (batch_size, *rows.shape[1:])))
    parts.append([np.asarray(o)[: len(rows)] for o in out])
  style, classes = (np.concatenate(p) for p in zip(*parts, strict=True))
  return style, classes


def bootstrap_interval(
  values: np.ndarray, *, samples: int, seed: int, statistic: Callable[..., np.ndarray] = np.mean
) -> tuple[float, float]:
  """Percentile bootstrap, 95 %, over the first axis (prompts: the images of one prompt are not independent)."""
  rng = np.random.default_rng(seed)
  index = rng.integers(0, len(values), (samples, len(values)))
  low, high = np.percentile(statistic(values[index], axis=1), [2.5, 97.5])
  return float(low), float(high)


def win_rate(new: np.ndarray, old: np.ndarray, *, samples: int, seed: int) -> dict[str, Any]:
  """Share of pairs (same prompt, same seed) where `new` scores higher; ties count half.

  Args:
    new, old: f32[P, S] scores.
  Returns:
    `win_rate` and `win_rate_interval`, 95 %, bootstrapped over prompts.
  """
  wins = ((new > old) + 0.5 * (new == old)).mean(axis=1)
  return {
    "win_rate": float(wins.mean()),
    "win_rate_interval": bootstrap_interval(wins, samples=samples, seed=seed),
  }


def caption_accuracy(class_logits: np.ndarray, class_ids: Sequence[int], *, candidates: int, seed: int) -> np.ndarray:
  """f32[P, S] 1 where the judge picks the true caption among `candidates`, the others drawn at random.

  Args:
    class_logits: f32[P, S, C].
    class_ids: the true class of each prompt.
  """
  rng = np.random.default_rng(seed)
  prompts, seeds, classes = class_logits.shape
  right = np.zeros((prompts, seeds), np.float32)
  for p, true in enumerate(class_ids):
    for s in range(seeds):
      others = rng.choice(np.delete(np.arange(classes), true), candidates - 1, replace=False)
      right[p, s] = class_logits[p, s, true] > class_logits[p, s, others].max()
  return right


def score(
  judge: Judge, params: Any, images: np.ndarray, class_ids: Sequence[int], *, style: str, candidates: int, seed: int
) -> dict[str, np.ndarray]:
  """What the judge says of u8[P, S, H, W, 3]: each f32[P, S].

  `style_log_prob` of the preferred style, `preferred` 1 where it is the most likely one, `correct` 1 where the caption
  is recognised among the candidates.
  """
  if style not in judge.config.styles:
    raise ValueError(f"the judge knows the styles {', '.join(judge.config.styles)}, not {style!r}.")
  prompts, seeds = images.shape[:2]
  column = judge.config.styles.index(style)
  styles, classes = judge_images(judge, params, images.reshape(-1, *images.shape[2:]))
  return {
    "style_log_prob": styles[:, column].reshape(prompts, seeds),
    "preferred": (np.argmax(styles, axis=1) == column).astype(np.float32).reshape(prompts, seeds),
    "correct": caption_accuracy(
      classes.reshape(prompts, seeds, -1), class_ids, candidates=candidates, seed=seed
    ),
  }


def compare(
  base: Mapping[str, np.ndarray] | None, aligned: Mapping[str, np.ndarray], *, samples: int, seed: int
) -> dict[str, Any]:
  """The table's numbers from the scores of both models; without a base, those of one."""

  def one(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
      name: {
        "mean": float(scores[key].mean()),
        "interval": bootstrap_interval(scores[key].mean(axis=1), samples=samples, seed=seed),
      }
      for name, key in (("preferred_share", "preferred"), ("caption_accuracy", "correct"))
    }

  results: dict[str, Any] = {"aligned": one(aligned)}
  if base is not None:
    results["base"] = one(base)
    results |= win_rate(aligned["style_log_prob"], base["style_log_prob"], samples=samples, seed=seed)
    change = aligned["correct"].mean(axis=1) - base["correct"].mean(axis=1)
    results["caption_accuracy_change"] = float(change.mean())
    results["caption_accuracy_change_interval"] = bootstrap_interval(change, samples=samples, seed=seed)
  return results
