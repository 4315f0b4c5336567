"""Scores of images under their prompts: published reward models in Flax, and a user's own functions.

    scorer = scorers.load("pickscore")
    scorer.score(images, prompts)  # u8[H, W, 3] each, and as many strings -> f32[N]

Every score says what it is: the scorer's name, the version of its weights and the scale of its numbers. Images are
prepared as the code that came with each model does it.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jaxpref import loading, sharding, tensor_files, weights
from jaxpref.models import blip, clip
from jaxpref.models.preference import StepAwareCLIPModel
from jaxpref.score import clip_image

Array = jax.Array
ScoreFn = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]
_ASSETS = pathlib.Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A function that judges images, and what is to be written beside its numbers.

  Attributes:
    name: "pickscore", say.
    version: the model's name and a fingerprint of its weights.
    scale: what the numbers are, in a phrase.
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
    scale: of its scores.
    repository: where its weights come from: on the Hugging Face hub, unless it says otherwise.
    file: of the repository, to be converted; None for folders that are read as they are.
    shipped: the folder in jaxpref/assets instead.
  """

  scale: str
  repository: str = ""
  file: str | None = None
  shipped: str | None = None


PUBLISHED = {
  "pickscore": _Published(
    "exp(logit_scale) x cosine (about 100 x cosine; papers print these numbers, 20 to 23)",
    "yuvalkirstain/PickScore_v1",
  ),
  "clip_l": _Published("100 x cosine", "openai/clip-vit-large-patch14"),
  "clip_h": _Published("100 x cosine", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
  "hpsv2": _Published(
    "cosine (about 0.27, as the hpsv2 package returns it; papers often print 100 x)",
    "xswu/HPSv2",
    "HPS_v2_compressed.pt",
  ),
  "hpsv2.1": _Published(
    "cosine (about 0.27, as the hpsv2 package returns it; papers often print 100 x)",
    "xswu/HPSv2",
    "HPS_v2.1_compressed.pt",
  ),
  "aesthetic": _Published(
    "rating from 1 to 10",
    "christophschuhmann/improved-aesthetic-predictor on GitHub",
    "sac+logos+ava1-l14-linearMSE.pth",
  ),
  "imagereward": _Published(
    "standardised reward ((r - 0.167) / 1.033, as the image-reward package returns it)",
    "THUDM/ImageReward",
    "ImageReward.pt",
  ),
  "judge": _Published("log-probability of the preferred style", shipped="tiny-judge"),
  "tiny-clip": _Published("100 x cosine", shipped="tiny-clip"),
}
# These give embeddings of images, too.
CLIPS = ("pickscore", "clip_l", "clip_h", "hpsv2", "hpsv2.1", "tiny-clip")

# ---- Images as each model wants them ---------------------------------------------------------------------------------
# `score.clip_image` is what transformers does, for the CLIPs that are published for it.


def torchvision_image(image: np.ndarray, size: int) -> np.ndarray:
  """u8[size, size, 3]: torchvision's Resize (bicubic) of the shorter side and CenterCrop, of a PIL image.

  That of transformers crops an odd remainder elsewhere.
  """
  height, width = image.shape[:2]
  short = min(height, width)
  new = (size * width // short, size * height // short)
  picture = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)
  left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def padded_image(image: np.ndarray, size: int) -> np.ndarray:
  """f32[size, size, 3] in [0, 255]: the longer side bicubically to `size`, and black beside the shorter: HPSv2's.

  In its code a tensor is resized, so that nothing is rounded to 8 bits; with antialiasing, as by default in torchvision
  since 0.17.
  """
  height, width = image.shape[:2]
  new_height, new_width = (round(n * size / max(height, width)) for n in (height, width))
  channels = [Image.fromarray(np.asarray(image[..., c], np.float32)) for c in range(3)]
  resized = [np.asarray(c.resize((new_width, new_height), Image.Resampling.BICUBIC)) for c in channels]
  out = np.zeros((size, size, 3), np.float32)
  top, left = (size - new_height) // 2, (size - new_width) // 2
  out[top : top + new_height, left : left + new_width] = np.stack(resized, axis=-1)
  return out


def _normalised(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
  """u8 or f32[B, S, S, 3] in [0, 255] -> f32, normalised."""
  mean_C, std_C = (np.asarray(v, np.float32)[None, None, None] for v in (mean, std))
  return (images.astype(jnp.float32) / 255 - mean_C) / std_C


# ---- Networks --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Network:
  """What scoring takes.

  Attributes:
    apply: (params, token ids i32[B, L], images as prepared) -> f32[B], or embeddings f32[B, D].
    prepare: one image u8[H, W, 3] -> an array of the one shape that the network takes.
    tokenize: prompts -> i32[B, L]; None where they do not count.
    files: of the weights.
  """

  apply: Callable[[Any, Array, Array], Array]
  params: Any
  prepare: Callable[[np.ndarray], np.ndarray]
  tokenize: Callable[[list[str]], np.ndarray] | None
  files: Sequence[pathlib.Path]


def _image_embeds(module: clip.CLIPModel, params: Any, pixels: Array) -> Array:
  if isinstance(module, StepAwareCLIPModel):
    times = jnp.zeros(pixels.shape[0], jnp.int32)
    return module.apply({"params": params}, pixels, times, method="image_embeds")
  return clip.normalize(module.apply({"params": params}, pixels, method="image_features"))


def _text_embeds(module: clip.CLIPModel, params: Any, ids: Array) -> Array:
  return clip.normalize(module.apply({"params": params}, ids, method="text_features"))


def _weight_files(folder: pathlib.Path) -> Sequence[pathlib.Path]:
  """Of a folder in any of the layouts."""
  file = folder / "open_clip_model.safetensors"  # beside transformers' files it is a copy
  return [file] if file.is_file() and not (folder / "config.json").is_file() else tensor_files.weight_files(folder)


def _read_clip(folder: pathlib.Path, dtype: Any, placement: Any) -> tuple[clip.CLIPModel, Any]:
  """A CLIP in transformers' or open_clip's layout, or a step-aware preference model."""
  file = folder / "config.json"
  arguments = dict(dtype=dtype, param_dtype=dtype, sharding=placement)
  if file.is_file() and '"step_aware_clip"' in file.read_text(encoding="utf-8"):
    return weights.load_preference_model(folder, **arguments)
  return weights.load_clip(folder, **arguments)


def _clip_network(name: str, folder: pathlib.Path, dtype: Any, placement: Any, *, embeddings: bool = False) -> _Network:
  """Scores by the cosine of image and text, or the embeddings of images alone."""
  module, params = _read_clip(folder, dtype, placement)
  files = _weight_files(folder)
  config: Any = module.config  # with image_mean and image_std
  size = config.vision_config.image_size
  resize = padded_image if name.startswith("hpsv2") else clip_image

  def embed(params, images):
    return _image_embeds(module, params, _normalised(images, config.image_mean, config.image_std))

  def score(params, ids, images):
    cosine = jnp.sum(embed(params, images) * _text_embeds(module, params, ids), axis=-1)
    if name == "pickscore":
      return jnp.exp(params["logit_scale"].astype(jnp.float32)) * cosine
    return cosine if name.startswith("hpsv2") else 100.0 * cosine

  prepare = lambda image: resize(image, size)
  if embeddings:
    return _Network(lambda params, _, images: embed(params, images), params, prepare, None, files)
  tokenizer = weights.tiny_tokenizer() if name == "tiny-clip" else _clip_tokenizer(name, folder)
  _check_vocabulary(name, tokenizer, config.text_config.vocab_size)
  length = config.text_config.max_position_embeddings
  return _Network(score, params, prepare, lambda texts: weights.tokenize(tokenizer, texts, length=length), files)


def _aesthetic_clip(folder: pathlib.Path) -> pathlib.Path:
  """The folder of the CLIP that the predictor's config.json names, or in `clip` beside it."""
  place = folder / "clip" if (folder / "clip").is_dir() else _read_config(folder).get("clip", "")
  place = place or PUBLISHED["clip_l"].repository
  try:
    return weights.resolve_folder(place, "model*.safetensors")
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"scorer aesthetic: its CLIP {place} is neither a folder here nor could it be fetched; connect to the network, "
      f"or put model.safetensors and config.json of the Hugging Face repository {PUBLISHED['clip_l'].repository} into "
      f"{folder / 'clip'}."
    ) from error


def _aesthetic_network(folder: pathlib.Path, dtype: Any, placement: Any) -> _Network:
  """LAION's predictor: linear layers on the embedding of CLIP-L."""
  clip_folder = _aesthetic_clip(folder)
  module, params = _read_clip(clip_folder, dtype, placement)
  config: Any = module.config
  head = blip.RewardHead()
  width = jnp.zeros((1, config.projection_dim))
  shapes = jax.eval_shape(head.init, jax.random.key(0), width)["params"]
  head_files = tensor_files.weight_files(folder)
  head_params = weights.load_tree(head_files, shapes, sharding=placement)

  def score(params, unused_ids, images):
    pixels = _normalised(images, config.image_mean, config.image_std)
    return head.apply({"params": params["head"]}, _image_embeds(module, params["clip"], pixels))

  prepare = lambda image: torchvision_image(image, config.vision_config.image_size)
  return _Network(
    score, {"clip": params, "head": head_params}, prepare, None, [*head_files, *_weight_files(clip_folder)]
  )


def _imagereward_network(folder: pathlib.Path, dtype: Any, placement: Any) -> _Network:
  config = blip.ImageRewardConfig.from_dict(_read_config(folder))
  module, files = blip.ImageReward(config, dtype), tensor_files.weight_files(folder)
  size, length = config.vision_config.image_size, config.text_length
  example = jnp.zeros((1, length), jnp.int32), jnp.zeros((1, size, size, 3))
  shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
  params = weights.load_tree(files, shapes, param_dtype=dtype, sharding=placement)
  tokenizer = _bert_tokenizer(folder)
  _check_vocabulary("imagereward", tokenizer, config.text_config.vocab_size)

  def tokenize(texts: list[str]) -> np.ndarray:
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return np.asarray(out["input_ids"], np.int32)

  def score(params, ids, images):
    return module.apply({"params": params}, ids, _normalised(images, config.image_mean, config.image_std))

  return _Network(score, params, lambda image: torchvision_image(image, size), tokenize, files)


def _judge_network(folder: pathlib.Path, style: str, placement: Any) -> _Network:
  module, params = loading.load_judge(str(folder), style=style, num_classes=1)
  assert module is not None
  size, column = module.config.image_size, module.config.styles.index(style)
  if placement is not None:
    params = jax.device_put(params, placement)

  def score(params, unused_ids, images):
    logits, _ = module.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1.0)
    return jax.nn.log_softmax(logits)[:, column]

  prepare = lambda image: image if image.shape[:2] == (size, size) else clip_image(image, size)
  return _Network(score, params, prepare, None, tensor_files.weight_files(folder))


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / "config.json"
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"{file} is missing; point to a folder that scripts/convert_scorer.py wrote.") from None
  except ValueError as error:
    raise ValueError(f"{file} is not valid JSON ({error}); convert the weights again.") from error


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def _clip_tokenizer(name: str, folder: pathlib.Path) -> Any:
  """The one beside the weights, or CLIP-L's: all published CLIPs have the same."""
  other = PUBLISHED["clip_l"].repository
  with contextlib.suppress(FileNotFoundError):
    return loading.load_tokenizer(str(folder), other)
  raise FileNotFoundError(
    f"scorer {name}: {folder} has no tokenizer (vocab.json and merges.txt) and the Hugging Face repository {other} "
    f"could not be reached; copy the two files of that repository into {folder}."
  )


def _bert_tokenizer(folder: pathlib.Path) -> Any:
  from transformers import BertTokenizer

  other = "google-bert/bert-base-uncased"
  place = next((p for p in (folder / "tokenizer", folder) if (p / "vocab.txt").is_file()), None)
  if place is None:
    try:
      place = weights.resolve_folder(other, "tokenizer/*.safetensors")  # no weights
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"scorer imagereward: {folder} has no vocab.txt and the Hugging Face repository {other} could not be reached; "
        f"copy vocab.txt of that repository into {folder}."
      ) from error
  tokenizer = BertTokenizer(vocab=str(place / "vocab.txt"), do_lower_case=True)
  tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's own, should a prompt hold them
  return tokenizer


def _check_vocabulary(name: str, tokenizer: Any, size: int) -> None:
  largest = max(tokenizer.get_vocab().values())
  if largest >= size:
    raise ValueError(
      f"scorer {name}: its tokenizer gives ids up to {largest}, expected at most {size - 1} by the vocab_size of its "
      "weights; take the tokenizer of the same model."
    )


# ---- From a name to a function ---------------------------------------------------------------------------------------


def default_folder(name: str) -> pathlib.Path:
  """Where the converted weights of a scorer are looked for."""
  return pathlib.Path("~/.cache/jaxpref/scorers").expanduser() / name


def _find(name: str, folder: str | None) -> pathlib.Path:
  """The folder with a scorer's weights.

  Raises:
    FileNotFoundError: it is not there; says where the weights come from.
  """
  published = PUBLISHED[name]
  if folder is None and published.shipped is not None:
    return _ASSETS / published.shipped
  if published.file is not None:
    place = default_folder(name) if folder is None else pathlib.Path(folder)
    if place.is_dir():
      return place
    shown = f"~/.cache/jaxpref/scorers/{name}" if folder is None else folder
    hub = "" if " on " in published.repository else "the Hugging Face repository "
    raise FileNotFoundError(
      f"scorer {name} has no weights: there is no folder {shown}; download {published.file} from {hub}"
      f"{published.repository} and run python scripts/convert_scorer.py {name} {published.file} {shown}."
    )
  try:
    return weights.resolve_folder(folder or published.repository, "model*.safetensors")
  except FileNotFoundError as error:
    if folder is not None or not published.repository:
      raise FileNotFoundError(f"scorer {name} has no weights: {error}") from error
    raise FileNotFoundError(
      f"scorer {name} has no weights: model.safetensors of the Hugging Face repository {published.repository} is not "
      f"in the hub's cache and could not be fetched; connect to the network, or download that repository and give "
      f"{name}=FOLDER."
    ) from error


def _parse(spec: str) -> tuple[str, str | None]:
  """Name and folder of NAME or NAME=FOLDER."""
  name, equals, folder = spec.partition("=")
  if name not in PUBLISHED or (equals and not folder):
    raise ValueError(
      f"scorer {spec!r} is unknown, expected one of {', '.join(PUBLISHED)}, one of them as NAME=FOLDER, or a function "
      "of your own as package.module:function."
    )
  return name, str(pathlib.Path(folder).expanduser()) if equals else None  # the shell leaves the ~ after = alone


def _batched(network: _Network, *, batch_size: int, mesh: Mesh | None) -> ScoreFn:
  """`network` over any number of images, in batches of one shape, so with one compilation."""
  split = None if mesh is None else sharding.batch_sharding(mesh)
  unit = 1 if mesh is None else sharding.batch_devices(mesh)
  batch_size = -(-batch_size // unit) * unit
  apply = jax.jit(network.apply, out_shardings=None if mesh is None else sharding.replicated(mesh))

  def placed(rows: np.ndarray) -> Any:
    if split is None:
      return rows
    return jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])

  def run(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    parts = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for start in range(0, len(images), batch_size):  # the device is at work while the next batch is prepared
        pixels = np.stack(list(pool.map(network.prepare, images[start : start + batch_size])))
        fill = np.resize(np.arange(len(pixels)), batch_size)
        ids = np.zeros((len(pixels), 1), np.int32)
        if network.tokenize is not None:
          ids = network.tokenize(list(prompts[start : start + batch_size]))
        out = apply(network.params, placed(ids[fill]), placed(pixels[fill]))
        parts.append((out, len(pixels)))
    return np.concatenate([np.asarray(out, np.float32)[:count] for out, count in parts])

  return run


def _checked(name: str, score: ScoreFn) -> ScoreFn:
  """`score` with its inputs and outputs checked."""

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
        f"[{len(images)}]; return one score an image."
      )
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
      raise ValueError(
        f"scorer {name} gives {scores[bad[0]]} to {bad.size} of {len(images)} images, the first of them number "
        f"{bad[0]}, expected finite scores; use dtype float32, or check the weights."
      )
    return scores

  return checked


def _load_function(spec: str) -> Scorer:
  """A user's own function."""
  module_name, _, function_name = spec.partition(":")
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # whatever the user's module raises
    raise ValueError(
      f"scorer {spec}: the module {module_name} cannot be imported ({type(error).__name__}: {error}); expected "
      "package.module:function of a module that Python finds, e.g. by PYTHONPATH."
    ) from error
  function = getattr(module, function_name, None)
  if not callable(function):
    raise ValueError(
      f"scorer {spec}: the module {module_name} has no function {function_name!r}, expected one that takes images and "
      "prompts and returns [N] scores."
    )
  doc = (function.__doc__ or "").strip().splitlines()
  return Scorer(
    name=spec,
    version=str(getattr(module, "__version__", "")),
    scale=doc[0].strip() if doc else "user's",
    score=_checked(spec, function),
  )


def check(spec: str) -> None:
  """Looks for all that `load` of the same spec needs, without reading weights; hub models are fetched.

  Raises:
    ValueError, FileNotFoundError: as `load`.
  """
  if _is_function(spec):
    _load_function(spec)
    return
  name, place = _parse(spec)
  folder = _find(name, place)
  _weight_files(folder)
  if name == "aesthetic":
    _aesthetic_clip(folder)
  elif name == "imagereward":
    _bert_tokenizer(folder)
  elif name in CLIPS and name != "tiny-clip":
    _clip_tokenizer(name, folder)


def _is_function(spec: str) -> bool:
  return "=" not in spec and ":" in spec


def load(
  spec: str,
  *,
  dtype: str = "float32",
  batch_size: int = 16,
  mesh: Mesh | None = None,
  preferred_style: str = "noto",
) -> Scorer:
  """A scorer, ready to be called.

  Args:
    spec: a name of PUBLISHED; NAME=FOLDER for weights elsewhere than in the default place; or package.module:function,
      a function of a user's own from (images u8[H, W, 3], prompts) to [N], whose docstring's first line says what the
      scale is.
    dtype: of the networks and their parameters.
    batch_size: images scored at a time, made a multiple of the mesh's devices.
    mesh: splits the images over its devices.
    preferred_style: of the judge.

  Raises:
    ValueError, FileNotFoundError: one sentence on what is missing or does not fit.
  """
  if _is_function(spec):
    return _load_function(spec)
  name, place = _parse(spec)
  folder = _find(name, place)
  placement = None if mesh is None else sharding.replicated(mesh)
  if name == "aesthetic":
    network = _aesthetic_network(folder, jnp.dtype(dtype), placement)
  elif name == "imagereward":
    network = _imagereward_network(folder, jnp.dtype(dtype), placement)
  elif name == "judge":
    network = _judge_network(folder, preferred_style, placement)
  else:
    network = _clip_network(name, folder, jnp.dtype(dtype), placement)
  scale = PUBLISHED[name].scale + (f" {preferred_style}" if name == "judge" else "")
  score = _checked(name, _batched(network, batch_size=batch_size, mesh=mesh))
  return Scorer(name, _version(name, place, network.files), scale, score)


def _version(name: str, place: str | None, files: Sequence[pathlib.Path]) -> str:
  published = PUBLISHED[name]
  source = published.shipped or (published.file or published.repository.rpartition("/")[2])
  title = pathlib.Path(place).name if place is not None else source.removesuffix(".pt").removesuffix(".pth")
  return f"{title} {tensor_files.fingerprint(files)[:8]}"


# ---- Diversity -------------------------------------------------------------------------------------------------------


def image_embedder(
  spec: str = "clip_l", *, dtype: str = "float32", batch_size: int = 16, mesh: Mesh | None = None
) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
  """The image side of one of CLIPS: images u8[H, W, 3] -> f32[N, D] of unit length. Arguments as of `load`."""
  name, place = _parse(spec)
  if name not in CLIPS:
    raise ValueError(f"image_embedder: {name} has no embeddings of images, expected one of {', '.join(CLIPS)}.")
  placement = None if mesh is None else sharding.replicated(mesh)
  network = _clip_network(name, _find(name, place), jnp.dtype(dtype), placement, embeddings=True)
  run = _batched(network, batch_size=batch_size, mesh=mesh)
  return lambda images: run(images, [""] * len(images))


def diversity(embeds: np.ndarray) -> np.ndarray:
  """How much the images of one prompt differ: the mean of 1 - cosine over their pairs.

  Falling diversity beside a rising reward is what reward hacking looks like.

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
