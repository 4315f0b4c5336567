"""Draws prompts with a text-to-image model: the same pictures whatever the batch size and the devices."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpref.devices import chips, sharding
from jaxpref.devices.progress import tqdm
from jaxpref.diffusion import Process, Solvable, samplers
from jaxpref.models.base import Model, guided
from jaxpref.models.vae import to_uint8
from jaxpref.recipes import sections

SAMPLERS = ("ddim", "dpmpp_2m")


def check_count(prompts: int, seeds: int) -> None:
  """Raises ValueError for more pictures than there are numbers; each number has its own noise."""
  if prompts * seeds > sections.MAX_COUNT:
    raise ValueError(
      f"--seeds={seeds}: {prompts} prompts make {prompts * seeds} pictures; expected at most {sections.MAX_COUNT}."
    )


def prior_noise(seed: int, numbers: np.ndarray | jax.Array, latent_shape: tuple[int, ...]) -> jax.Array:
  """Returns the noise that pictures start from.

  Args:
    seed: seed of the command that drew them.
    numbers: i32[n] of the pictures, or of the pictures whose noise they share.
    latent_shape: (h, w, C) of one picture's latents.
  Returns:
    f32[n, h, w, C], the same on every device up to rounding; bit-identical on one device with one version of JAX.
  """
  base = jax.random.key(seed)
  keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.asarray(numbers, jnp.int32))
  return jax.vmap(lambda k: jax.random.normal(k, latent_shape))(keys)


def initial_latents(seed: int, count: int, latent_shape: tuple[int, ...]) -> np.ndarray:
  """Returns `prior_noise` of the pictures 0 to count - 1 as diffusers takes it, f32[count, C, h, w]."""
  return np.moveaxis(np.asarray(prior_noise(seed, np.arange(count), latent_shape)), -1, 1)


def check_latents(latents: Any, count: int, latent_shape: tuple[int, ...], given: str = "latents") -> np.ndarray:
  """Returns latents to start pictures from as f32[N, C, h, w].

  Args:
    latents: standard normal noise [N, C, h, w] as diffusers takes it, of any floating dtype.
    count: pictures to draw.
    latent_shape: (h, w, C) of one picture's latents.
    given: what messages call the latents.
  Raises:
    ValueError: the latents do not fit the pictures, or are not finite.
  """
  height, width, channels = latent_shape
  shape = tuple(latents.shape)
  expected = f"expected [N, C, h, w] = [{count}, {channels}, {height}, {width}]"
  if len(shape) != 4:
    raise ValueError(f"{given} has the shape {list(shape)}, {expected}; save one array for all pictures.")
  if shape[1] != channels:
    raise ValueError(
      f"{given} has the shape {list(shape)}, {expected}: the model's latents have {channels} channels, which come "
      "second; take latents for this model."
    )
  if shape[2:] != (height, width):
    raise ValueError(
      f"{given} has the shape {list(shape)}, {expected}; choose the height and width of the pictures to fit, or other "
      "latents."
    )
  if shape[0] != count:
    raise ValueError(
      f"{given} has the shape {list(shape)}, {expected}: one for each picture of each prompt, prompt by prompt; choose "
      "prompts and pictures of each to fit, or other latents."
    )
  if not np.issubdtype(latents.dtype, np.floating):
    raise ValueError(f"{given} holds {latents.dtype}, expected float32, float16 or float64; save it as float32.")
  with np.errstate(over="ignore"):
    found = np.array(latents, np.float32)
  if not np.isfinite(found).all():
    raise ValueError(f"{given} holds NaN, infinity or numbers too large for float32; make the latents again.")
  return found


def read_latents(file: pathlib.Path, given: str) -> np.ndarray:
  """Returns the array of a .npy file, not yet read from the disk; see `check_latents`.

  Args:
    file: path.
    given: what messages call the file.
  Raises:
    FileNotFoundError, ValueError: there is no such file, or it is not one array of numbers.
  """
  if not file.is_file():
    raise FileNotFoundError(f"{given}: there is no such file; give one that --save_latents or numpy.save has written.")
  try:
    with open(file, "rb") as stream:
      is_array = stream.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
    if is_array:
      return np.load(file, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, SyntaxError) as error:
    raise ValueError(f"{given} cannot be read ({error}); save the array again with numpy.save.") from error
  raise ValueError(
    f"{given} is not an array that numpy.save wrote, the only supported format (pickles can run code, archives hold "
    "several arrays); save one array of numbers as NAME.npy."
  )


# (parameters by component, prompts i32[n, L], numbers of the pictures i32[n], and maybe the noise f32[n, h, w, C] that
# they start from) -> u8[n, H, W, 3]
Sample = Callable[..., jax.Array]


def _process(model: Model, size: tuple[int, int] | None) -> Process:
  """Returns a model's process for pictures of a size, on which a flow's shift may depend."""
  return model.process if size is None or not hasattr(model, "at_size") else model.at_size(*size).process


# Many parameters: everything a picture depends on besides its weights, prompt and number; and the devices.
def make_sampler(
  model: Model,
  *,
  num_inference_steps: int,
  guidance_scale: float,
  eta: float,
  seed: int,
  negative_ids: np.ndarray | None = None,
  guidance_rescale: float = 0.0,
  sampler: str = "ddim",
  karras: bool = False,
  size: tuple[int, int] | None = None,
  share_noise: int = 1,
  mesh: Mesh | None = None,
) -> Sample:
  """Returns the jitted function that draws a batch; callers that draw more than once compile it once.

  Args:
    eta: noise of the process's steps: 0 is deterministic; 1 is ancestral sampling of DDIM.
    seed: seed of the noise, which depends only on it and the number of the picture.
    negative_ids: i32[1, L] of a negative prompt; None for none.
    guidance_rescale: see `models.base.guided`.
    sampler: "ddim" for the process's own steps (Euler's of rectified flow), or "dpmpp_2m" for DPM-Solver++ 2M.
    karras: noise levels of "dpmpp_2m", see `Solvable.solver_steps`.
    size: height and width in pixels; the model's own by default.
    share_noise: this many pictures in a row start from the same noise: that of number // share_noise.
    mesh: splits each batch over its devices, which have the weights.
  Raises:
    ValueError: the sampler is unknown or needs another process than the model's, or a seed or a number of steps is out
      of range.
  """
  sections.check_seed(seed)
  sections.check_count(num_inference_steps, "num_inference_steps", most=sections.MAX_STEPS)
  if sampler not in SAMPLERS:
    raise ValueError(f"sampler={sampler!r}, expected one of {', '.join(SAMPLERS)}.")
  solver_steps = None
  if sampler != "ddim":
    process = _process(model, size)
    if not isinstance(process, Solvable):
      raise ValueError(
        f"sampler={sampler!r} is for a process with solver_steps, which the model's {type(process).__name__} has "
        "not; expected ddim, which works with any process."
      )
    solver_steps = process.solver_steps(num_inference_steps, karras=karras)
  latent_shape = model.latent_shape if size is None else model.latent_shape_for(*size)
  sizes = None if size is None else jnp.asarray([[*size, 0.0, 0.0, *size]], jnp.float32)  # the model gets them
  whole, split = (None, None) if mesh is None else (sharding.replicated(mesh), sharding.batch_sharding(mesh))

  def sample(weights, ids, number, noise=None):
    if split is not None:
      ids, number, noise = jax.lax.with_sharding_constraint((ids, number, noise), split)
    if noise is None:
      noise = prior_noise(seed, number if share_noise == 1 else number // share_noise, latent_shape)
    cond = model.sized(model.encode_text(weights, ids), sizes)
    if negative_ids is None:
      uncond = model.encode_empty(weights, 1)
    else:
      uncond = model.encode_negative(weights, jnp.asarray(negative_ids))
    uncond = model.sized(uncond, sizes)
    eps = guided(
      lambda x, t, c: model.predict(weights, x, t, c), uncond, guidance_scale, guidance_rescale=guidance_rescale
    )
    predict = lambda x, t: eps(x, t, cond)
    if solver_steps is None:
      steps = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed + 1), i))(number)  # each row's own noise
      latents = samplers.sample(predict, _process(model, size), noise, steps, num_steps=num_inference_steps, eta=eta)
    else:
      latents = samplers.solver_sample(predict, solver_steps, noise)
    return to_uint8(model.decode(weights, latents))

  on_devices = sample if mesh is None else sharding.on_mesh(mesh, sample)
  return jax.jit(on_devices, out_shardings=None if mesh is None else whole, compiler_options=chips.compiler_options())


def draw_by(
  sample: Sample,
  weights: Any,
  input_ids: np.ndarray,
  *,
  seeds_per_prompt: int,
  batch_size: int,
  progress: str | None = None,
  mesh: Mesh | None = None,
  numbers: np.ndarray | None = None,
  latents: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Draws every prompt from the same seeds, for any weights, batch size and devices.

  The picture numbered prompt * seeds_per_prompt + i has its own noise.

  Args:
    sample: from `make_sampler`, for this mesh.
    weights: parameters by component, with `empty_ids`.
    input_ids: i32[P, L].
    batch_size: pictures in one call; rounded to a multiple of the devices that split it.
    progress: label of a progress bar; None for none.
    numbers: i64[N], the pictures to draw; all by default.
    latents: f32[P * S, C, h, w] of `check_latents`, which the pictures start from; by default the noise of their seed
      and number. No sampler scales them.
  Yields:
    Numbers i64[n] of pictures, in order, and the pictures u8[n, H, W, 3]; n is at most the batch size. With guidance
    2 * P * S * num_inference_steps UNet evaluations in all, S = seeds_per_prompt.
  Raises:
    ValueError: a count is out of range.
  """
  sections.check_count(seeds_per_prompt, "seeds_per_prompt")
  sections.check_count(batch_size, "batch_size")
  sections.check_count(max(input_ids.shape[0], 1) * seeds_per_prompt, "prompts * seeds_per_prompt")
  if numbers is None:
    numbers = np.arange(input_ids.shape[0] * seeds_per_prompt)
  unit = 1 if mesh is None else sharding.batch_devices(mesh)
  batch_size = -(-batch_size // unit) * unit
  with tqdm(total=numbers.size, desc=progress, disable=progress is None) as bar:
    for start in range(0, numbers.size, batch_size):
      rows = numbers[start : start + batch_size]
      padded = np.resize(rows, batch_size)  # one shape, so one compilation
      noise = () if latents is None else (np.moveaxis(latents[padded], 1, -1),)
      images = np.asarray(sample(weights, input_ids[padded // seeds_per_prompt], padded.astype(np.int32), *noise))
      bar.update(rows.size)
      yield rows, images[: rows.size]


_BY_BATCH = ("seeds_per_prompt", "batch_size", "progress", "numbers", "latents")


def draw(
  model: Model, weights: Any, input_ids: np.ndarray, *, mesh: Mesh | None = None, **arguments: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields what `draw_by` does with a sampler of the model; takes the arguments of both functions.

  Raises:
    ValueError: see both functions, and `check_latents`.
  """
  by_batch = {name: arguments.pop(name) for name in _BY_BATCH if name in arguments}
  if by_batch.get("latents") is not None:
    size = arguments.get("size")
    shape = model.latent_shape if size is None else model.latent_shape_for(*size)
    count = input_ids.shape[0] * by_batch["seeds_per_prompt"]
    by_batch["latents"] = check_latents(by_batch["latents"], count, shape)
  sample = make_sampler(model, mesh=mesh, **arguments)
  return draw_by(sample, weights, input_ids, mesh=mesh, **by_batch)


def generate(
  model: Model, weights: Any, input_ids: np.ndarray, *, seeds_per_prompt: int, **arguments: Any
) -> np.ndarray:
  """Returns all that `draw` yields, as u8[P, S, H, W, 3], S = seeds_per_prompt; takes the arguments of `draw`."""
  return together(draw(model, weights, input_ids, seeds_per_prompt=seeds_per_prompt, **arguments), seeds_per_prompt)


def together(parts: Iterator[tuple[np.ndarray, np.ndarray]], seeds_per_prompt: int) -> np.ndarray:
  """Joins what `draw` yields for all pictures to one array u8[P, S, H, W, 3], S = seeds_per_prompt."""
  flat = np.concatenate([images for _, images in parts])
  return flat.reshape(-1, seeds_per_prompt, *flat.shape[1:])
