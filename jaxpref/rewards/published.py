"""Scores images under their prompts with published reward models in Flax, or with a user's own functions.

    scorer = scorers.load("pickscore")
    scorer.score(images, prompts)  # u8[H, W, 3] each, and as many strings -> f32[N]

Every score has the scorer's name, the version of its weights and the scale of its numbers. Images are prepared like in
the code that came with each model (`jaxpref.rewards.networks`).
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpref.devices import chips, sharding
from jaxpref.files import folders, hub, tensors
from jaxpref.models.vae import to_uint8
from jaxpref.recipes import own, places
from jaxpref.recipes.sections import nearest
from jaxpref.rewards import networks, shapes
from jaxpref.rewards.base import IMAGE
from jaxpref.rewards.loading import look_for_judge

Array = jax.Array
ScoreFn = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]
_ASSETS = pathlib.Path(__file__).parents[1] / "assets"


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A function that scores images, and what to write beside its numbers.

  Attributes:
    name: such as "pickscore".
    version: the model's name and a fingerprint of its weights.
    scale: unit of the numbers, in a phrase.
    score: images u8[H, W, 3] of any sizes and their prompts -> f32[N], higher is better.
  """

  name: str
  version: str
  scale: str
  score: ScoreFn


@dataclasses.dataclass(frozen=True)
class _Published:
  """A scorer that is known by name.

  Attributes:
    scale: unit of its scores.
    logits: constant factor from its scores to logits, whose differences are log-odds of a preference; see PUBLISHED.
    repository: where its weights come from: on the Hugging Face hub, unless it says otherwise.
    file: file of the repository to convert; None for folders that are read unchanged.
    shipped: folder in jaxpref/assets instead.
  """

  scale: str
  logits: float = 1.0
  repository: str = ""
  file: str | None = None
  shipped: str | None = None


# Logits: PickScore and the CLIPs are logits of a softmax over images or texts. HPSv2 was trained with a cosine times
# exp(logit_scale) = 100, ImageReward with sigmoid(r_w - r_l) of the reward before standardisation. The judge's are
# logarithms of probabilities. A point of the aesthetic rating, which is not a logit, counts as one.
PUBLISHED = {
  "pickscore": _Published(
    "exp(logit_scale) x cosine (about 100 x cosine; papers print these numbers, 20 to 23)",
    repository="yuvalkirstain/PickScore_v1",
  ),
  "clip_l": _Published("100 x cosine", repository=networks.CLIP_L),
  "clip_h": _Published("100 x cosine", repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
  "hpsv2": _Published(
    "cosine (about 0.27, as the hpsv2 package returns it; papers often print 100 x)",
    logits=100.0,
    repository="xswu/HPSv2",
    file="HPS_v2_compressed.pt",
  ),
  "hpsv2.1": _Published(
    "cosine (about 0.27, as the hpsv2 package returns it; papers often print 100 x)",
    logits=100.0,
    repository="xswu/HPSv2",
    file="HPS_v2.1_compressed.pt",
  ),
  "aesthetic": _Published(
    "rating from 1 to 10",
    repository="christophschuhmann/improved-aesthetic-predictor on GitHub",
    file="sac+logos+ava1-l14-linearMSE.pth",
  ),
  "imagereward": _Published(
    "standardised reward ((r - 0.167) / 1.033, as the image-reward package returns it)",
    logits=1.033,
    repository="THUDM/ImageReward",
    file="ImageReward.pt",
  ),
  "judge": _Published("log-probability of the preferred style", shipped="tiny-judge"),
  "tiny-clip": _Published("100 x cosine", shipped="tiny-clip"),
}
# These also embed images.
CLIPS = ("pickscore", "clip_l", "clip_h", "hpsv2", "hpsv2.1", "tiny-clip")

# ---- From a name to a function ---------------------------------------------------------------------------------------


def default_folder(name: str) -> pathlib.Path:
  """Returns the folder where a scorer's converted weights should be."""
  return pathlib.Path("~/.cache/jaxpref/scorers").expanduser() / name


def _find(name: str, folder: str | None) -> pathlib.Path:
  """Returns the folder with a scorer's weights.

  Raises:
    FileNotFoundError: the folder does not exist; says where the weights come from.
  """
  published = PUBLISHED[name]
  if folder is None and published.shipped is not None:
    return _ASSETS / published.shipped
  if published.file is not None:
    place = default_folder(name) if folder is None else pathlib.Path(folder)
    if place.is_dir():
      return place
    shown = f"~/.cache/jaxpref/scorers/{name}" if folder is None else folder
    where = "" if " on " in published.repository else "the Hugging Face repository "
    raise FileNotFoundError(
      f"scorer {name} has no weights: there is no folder {shown}; download {published.file} from {where}"
      f"{published.repository} and run python scripts/assets/convert_scorer.py {name} {published.file} {shown} in a "
      "checkout of jaxpref's repository."
    )
  try:
    return folders.resolve_folder(folder or published.repository, "model*.safetensors")
  except FileNotFoundError as error:
    if folder is not None or not isinstance(error, hub.HubError):
      raise FileNotFoundError(f"scorer {name} has no weights: {error}") from error
    raise FileNotFoundError(
      f"scorer {name} has no weights: model.safetensors of the Hugging Face repository {published.repository} is not "
      f"in the hub's cache and could not be fetched: {error.reason}; {error.remedy}; "
      f"or download that repository and give {name}=FOLDER."
    ) from error


def _parse(spec: str) -> tuple[str, str | None]:
  """Returns name and folder of NAME or NAME=FOLDER."""
  name, equals, folder = spec.partition("=")
  if name not in PUBLISHED or (equals and not folder):
    raise ValueError(
      f"scorer {spec!r} is unknown, expected one of {', '.join(PUBLISHED)}, one of them as NAME=FOLDER, or your own "
      f"function as package.module:function{near(spec)}."
    )
  return name, places.expand(folder) if equals else None  # the shell does not expand ~ after =


def batched(network: networks.Network, *, batch_size: int, mesh: Mesh | None) -> ScoreFn:
  """Returns a function that applies `network` to any number of images in batches of one shape: one compilation."""
  split = None if mesh is None else sharding.batch_sharding(mesh)
  unit = 1 if mesh is None else sharding.batch_devices(mesh)
  batch_size = -(-batch_size // unit) * unit
  whole = None if mesh is None else sharding.replicated(mesh)
  apply = jax.jit(network.apply, out_shardings=whole, compiler_options=chips.compiler_options())

  def placed(rows: np.ndarray) -> Any:
    if split is None:
      return rows
    return jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])

  def run(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    parts = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for start in range(0, len(images), batch_size):  # the device computes while the next batch is prepared
        pixels = np.stack(list(pool.map(network.prepare, images[start : start + batch_size])))
        fill = np.resize(np.arange(len(pixels)), batch_size)
        ids = np.zeros((len(pixels), 1), np.int32)
        if network.tokenize is not None:
          ids = network.tokenize(list(prompts[start : start + batch_size]))
        out = apply(network.params, placed(ids[fill]), placed(pixels[fill]))
        parts.append((out, len(pixels)))
    return np.concatenate([np.asarray(out, np.float32)[:count] for out, count in parts])

  return run


def checked_scores(name: str, score: ScoreFn, remedy: str = "use dtype float32, or check the weights") -> ScoreFn:
  """Returns `score` with checks of its inputs and outputs.

  Args:
    remedy: what to do about scores that are not finite.
  """

  def checked(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    if len(images) != len(prompts):
      raise ValueError(f"scorer {name}: {len(images)} images and {len(prompts)} prompts, expected as many of both.")
    for i, image in enumerate(images):
      if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
          f"scorer {name}: image {i} is {image.dtype}{list(image.shape)}, expected uint8[H, W, 3]; convert it to RGB."
        )
    if not len(images):
      return np.zeros(0, np.float32)
    scores = np.asarray(score(images, prompts), np.float32)
    if scores.shape != (len(images),):
      raise ValueError(
        f"scorer {name} returned numbers of shape {list(scores.shape)} for {len(images)} images, expected "
        f"[{len(images)}]; return one score per image."
      )
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
      raise ValueError(
        f"scorer {name} gives {scores[bad[0]]} to {bad.size} of {len(images)} images, the first of them number "
        f"{bad[0]}, expected finite scores; {remedy}."
      )
    return scores

  return checked


def _load_function(spec: str) -> Scorer:
  """Loads a user's own function as a scorer."""
  module_name, _, function_name = spec.partition(":")
  module = own.import_module(module_name, f"scorer {spec}", "function")
  function = getattr(module, function_name, None)
  if not callable(function):
    raise ValueError(
      f"scorer {spec}: the module {module_name} has no function {function_name!r}, expected one that takes images and "
      "prompts and returns [N] scores."
    )
  if isinstance(function, type) or inspect.iscoroutinefunction(function):
    what = "a class" if isinstance(function, type) else "a coroutine"
    raise ValueError(f"scorer {spec} is {what}; expected a function of images and prompts that returns [N] scores.")
  doc = (function.__doc__ or "").strip().splitlines()
  version = getattr(module, "__version__", None)
  if version is None:  # scores of a changed module must not be taken for its own
    with contextlib.suppress(OSError, TypeError):  # not a Python file
      version = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:8]
  return Scorer(
    name=spec,
    version=str(version or ""),
    scale=doc[0].strip() if doc else "user's",
    score=checked_scores(spec, _numbers(spec, function), "fix the function"),
  )


def _numbers(spec: str, function: Callable[..., Any]) -> ScoreFn:
  """Returns a user's function whose errors become one sentence; raises for results that are not real numbers."""

  def run(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    try:
      returned = function(images, prompts)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
      place = own.raised_at(error, spec) or own.defined_at(function)
      said = f"reward {spec} raised {type(error).__name__}: {error}{place}"
      raise ValueError(said) from error
    reason = ""
    try:
      found = np.asarray(returned)
    except Exception as error:  # arrays of other libraries, rows of different lengths
      found, reason = np.asarray(None), f" ({error})"
    if not any(jnp.issubdtype(found.dtype, kind) for kind in (np.bool_, np.integer, np.floating)):
      kinds = {"c": "complex numbers", "U": "texts", "S": "texts"}
      what = kinds.get(found.dtype.kind) or ("None" if returned is None else f"a {type(returned).__name__}")
      raise ValueError(
        f"scorer {spec} returned {what}{reason}{own.defined_at(function)} for {len(images)} images, expected as many "
        "real numbers; return one score per image."
      )
    return found

  return run


def near(spec: str, *more: str) -> str:
  """Returns " (did you mean NAME?)" if a name resembles a known one, or has a dot where the colon belongs."""
  name = spec.partition("=")[0]
  return nearest(name, (*PUBLISHED, *more)) or own.hint(name)


def refuse_weight(spec: str, given: str) -> None:
  """Raises ValueError for NAME:WEIGHT whose weight is not a number, which looks like a function of a module NAME."""
  name, colon, weight = spec.partition(":")
  if colon and name in PUBLISHED:
    raise ValueError(f"{given}: the weight {weight!r} of {name} is not a number; expected e.g. {name}:0.5.")


def check(spec: str, *, preferred_style: str = "openmoji") -> None:
  """Checks that all that `load` of the same spec needs exists, without reading large weights; fetches hub models.

  Raises:
    ValueError, FileNotFoundError: see `load`.
  """
  if own.is_own(spec):
    _load_function(spec)
    return
  name, place = _parse(spec)
  if place is not None and place.startswith(shapes.ZEROS):
    return
  folder = _find(name, place)
  networks.weight_files(folder)
  if name == "aesthetic":
    networks.aesthetic_clip(folder)
  elif name == "imagereward":
    networks.bert_tokenizer(folder)
  elif name == "judge":
    look_for_judge(str(folder), style=preferred_style)
  elif name in CLIPS and name != "tiny-clip":
    networks.clip_tokenizer(name, folder)


def load(
  spec: str,
  *,
  dtype: str = "float32",
  batch_size: int = 16,
  mesh: Mesh | None = None,
  preferred_style: str = "openmoji",
) -> Scorer:
  """Returns a scorer, ready to call.

  Args:
    spec: a name of PUBLISHED; NAME=FOLDER for weights in another place than the default; or package.module:function, a
      user's own function from (images u8[H, W, 3], prompts) to [N], whose docstring's first line says what the scale
      is.
    dtype: dtype of the networks and their parameters.
    batch_size: images scored at a time, rounded to a multiple of the mesh's devices.
    mesh: splits the images over its devices.
    preferred_style: style that the judge looks for.

  Raises:
    ValueError, FileNotFoundError: one sentence on what is missing or does not fit.
  """
  if own.is_own(spec):
    return _load_function(spec)
  name, place = _parse(spec)
  placement = None if mesh is None else sharding.replicated(mesh)
  network = _network(name, _find(name, place), dtype, placement, preferred_style)
  scale = PUBLISHED[name].scale + (f" {preferred_style}" if name == "judge" else "")
  score = checked_scores(name, batched(network, batch_size=batch_size, mesh=mesh))
  return Scorer(name, _version(name, place, network.files), scale, score)


def _network(name: str, folder: pathlib.Path, dtype: str, placement: Any, preferred_style: str) -> networks.Network:
  if name == "aesthetic":
    return networks.aesthetic_network(folder, jnp.dtype(dtype), placement)
  if name == "imagereward":
    return networks.imagereward_network(folder, jnp.dtype(dtype), placement)
  if name == "judge":
    return networks.judge_network(folder, preferred_style, placement)
  return networks.clip_network(name, folder, jnp.dtype(dtype), placement)


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
  """The `Reward` of a scorer in the graph; its numbers are the scorer's for 8-bit pictures.

  Attributes:
    name: a name of PUBLISHED.
    network: the network without its parameters.
    scale: factor from its numbers to logits.
  """

  name: str
  network: networks.Network
  scale: float
  needs = IMAGE

  @property
  def component(self) -> str:
    return self.name

  @property
  def tokenizers(self) -> dict[str, Callable[[list[str]], np.ndarray]]:
    return {} if self.network.tokenize is None else {f"{self.name}_ids": self.network.tokenize}

  def prompts(self, weights: Any, batch: Any) -> Any:
    return None if self.network.tokenize is None else self.network.text(weights[self.name], batch[f"{self.name}_ids"])

  def score(self, weights: Any, images: Array, t: Array, prompts: Any) -> Array:
    """Scores pictures f32[N,H,W,3] in [-1, 1], rounded to 8 bits, as f32[N]; the time is ignored."""
    levels = to_uint8(images).astype(jnp.float32)
    return self.network.score(weights[self.name], prompts, self.network.pixels(levels)).astype(jnp.float32)


def load_reward(spec: str, *, dtype: str, placement: Any, preferred_style: str) -> tuple[Published, Any]:
  """Returns a scorer as a reward in the graph, and its parameters.

  Args:
    spec: NAME or NAME=FOLDER, see `load`, or NAME=zeros:PLACE, on shapes alone (`rewards.shapes`).
    dtype: dtype of the network and its parameters.
    placement: where these go as they are read, see `pipelines.load_pipeline`.
    preferred_style: style that the judge looks for.

  Raises:
    ValueError, FileNotFoundError: one sentence on what is missing or does not fit.
  """
  name, place = _parse(spec)
  if place is not None and place.startswith(shapes.ZEROS):
    place = place.removeprefix(shapes.ZEROS)
    network = shapes.network(name, place, dtype=jnp.dtype(dtype), preferred_style=preferred_style)
  else:
    network = _network(name, _find(name, place), dtype, placement, preferred_style)
  return Published(name, dataclasses.replace(network, params=None), PUBLISHED[name].logits), network.params


def _version(name: str, place: str | None, files: Sequence[pathlib.Path]) -> str:
  published = PUBLISHED[name]
  source = published.shipped or (published.file or published.repository.rpartition("/")[2])
  title = pathlib.Path(place).name if place is not None else source.removesuffix(".pt").removesuffix(".pth")
  return f"{title} {tensors.fingerprint(files)[:8]}"


# ---- Diversity -------------------------------------------------------------------------------------------------------


def image_embedder(
  spec: str = "clip_l", *, dtype: str = "float32", batch_size: int = 16, mesh: Mesh | None = None
) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
  """Returns the image side of one of CLIPS: images u8[H, W, 3] -> f32[N, D] of unit length; see `load`."""
  name, place = _parse(spec)
  if name not in CLIPS:
    raise ValueError(f"image_embedder: {name} does not embed images, expected one of {', '.join(CLIPS)}.")
  placement = None if mesh is None else sharding.replicated(mesh)
  network = networks.clip_network(name, _find(name, place), jnp.dtype(dtype), placement, embeddings=True)
  run = batched(network, batch_size=batch_size, mesh=mesh)
  return lambda images: run(images, [""] * len(images))


def diversity(embeds: np.ndarray) -> np.ndarray:
  """Returns how much the images of one prompt differ: the mean of 1 - cosine over their pairs.

  Falling diversity with a rising reward is a sign of reward hacking.

  Args:
    embeds: f32[P, S, D] of unit length, S seeds of each prompt.

  Returns:
    f32[P]; NaN with one seed, which has no pairs.
  """
  seeds = embeds.shape[1]
  if seeds < 2:
    return np.full(embeds.shape[0], np.nan, np.float32)
  x = np.asarray(embeds, np.float64)
  cosines = np.einsum("psd,ptd->pst", x, x)
  pairs = np.triu_indices(seeds, k=1)
  return (1 - cosines[:, pairs[0], pairs[1]].mean(axis=1)).astype(np.float32)
