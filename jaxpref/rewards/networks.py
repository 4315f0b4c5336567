"""The networks of scorers: how each prepares images and prompts, and what it computes from them.

Each prepares images like the code that came with the model.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxpref.data import records
from jaxpref.files import folders, hub, loading, tensors, tokenizers
from jaxpref.models import blip, clip
from jaxpref.models.preference import Judge, StepAwareCLIPModel, ask_judge, bicubic_matrix
from jaxpref.rewards.loading import load_clip, load_judge, load_preference_model

Array = jax.Array
Tokenize = Callable[[list[str]], np.ndarray]  # prompts -> i32[n, L]
CLIP_L = "openai/clip-vit-large-patch14"

# ---- Images as each model wants them ---------------------------------------------------------------------------------
# `clip_image` does what transformers does, for the CLIPs published for it.


def clip_image(image: bytes | np.ndarray, size: int) -> np.ndarray:
  """Returns u8[size, size, 3] as transformers' CLIPImageProcessor does: bicubic on the shorter side, centre crop.

  Raises:
    records.UnreadableImage: the bytes are corrupt or truncated.
  """
  picture = records.open_image(image)
  width, height = picture.size
  short = min(width, height)
  picture = picture.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
  left, top = (picture.width - size) // 2, (picture.height - size) // 2
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def torchvision_image(image: np.ndarray, size: int) -> np.ndarray:
  """Returns u8[size, size, 3]: torchvision's Resize (bicubic) of the shorter side and CenterCrop of a PIL image.

  transformers' crop puts an odd remainder elsewhere.
  """
  height, width = image.shape[:2]
  short = min(height, width)
  new = (size * width // short, size * height // short)
  picture = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)
  left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def padded_image(image: np.ndarray, size: int) -> np.ndarray:
  """Returns HPSv2's f32[size, size, 3] in [0, 255]: the longer side resized to `size` (bicubic), the rest black.

  Its code resizes a tensor, so nothing is rounded to 8 bits; with antialiasing, torchvision's default since 0.17.
  """
  height, width = image.shape[:2]
  new_height, new_width = (round(n * size / max(height, width)) for n in (height, width))
  channels = [Image.fromarray(np.asarray(image[..., c], np.float32)) for c in range(3)]
  resized = [np.asarray(c.resize((new_width, new_height), Image.Resampling.BICUBIC)) for c in channels]
  out = np.zeros((size, size, 3), np.float32)
  top, left = (size - new_height) // 2, (size - new_width) // 2
  out[top : top + new_height, left : left + new_width] = np.stack(resized, axis=-1)
  return out


def _resized(images: Array, height: int, width: int, *, rounded: bool = True) -> Array:
  """Resizes f32[B, H, W, C], 0 to 255, like PIL's bicubic, inside a jitted function.

  Args:
    rounded: rounds and clips after each direction, like PIL with 8-bit images. Float32 and PIL's integers then differ
      by one level in a few places, see `models.preference.preprocess`.
  """
  high = jax.lax.Precision.HIGHEST
  for axis, equation, size in ((2, "ow,bhwc->bhoc", width), (1, "oh,bhwc->bowc", height)):
    if images.shape[axis] != size:
      images = jnp.einsum(equation, bicubic_matrix(images.shape[axis], size, antialias=True), images, precision=high)
      images = jnp.clip(jnp.floor(images + 0.5), 0.0, 255.0) if rounded else images
  return images


def clip_pixels(images: Array, size: int) -> Array:
  """Computes `clip_image` of f32[B, H, W, 3], inside a jitted function."""
  height, width = images.shape[1:3]
  short = min(height, width)
  images = _resized(images, size * height // short, size * width // short)
  top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
  return images[:, top : top + size, left : left + size]


def torchvision_pixels(images: Array, size: int) -> Array:
  """Computes `torchvision_image` of f32[B, H, W, 3], inside a jitted function."""
  height, width = images.shape[1:3]
  short = min(height, width)
  images = _resized(images, size * height // short, size * width // short)
  top, left = round((images.shape[1] - size) / 2), round((images.shape[2] - size) / 2)
  return images[:, top : top + size, left : left + size]


def padded_pixels(images: Array, size: int) -> Array:
  """Computes `padded_image` of f32[B, H, W, 3], inside a jitted function."""
  height, width = (round(n * size / max(images.shape[1:3])) for n in images.shape[1:3])
  images = _resized(images, height, width, rounded=False)
  top, left = (size - height) // 2, (size - width) // 2
  return jnp.pad(images, ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0)))


def _normalised(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
  """Normalises u8 or f32[B, S, S, 3] in [0, 255] to f32."""
  mean_C, std_C = (np.asarray(v, np.float32)[None, None, None] for v in (mean, std))
  return (images.astype(jnp.float32) / 255 - mean_C) / std_C


# ---- Networks --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """What scoring needs. The functions below read one from a folder.

  Attributes:
    score: (params, what `text` returns, prepared images) -> f32[B], or embeddings f32[B, D].
    prepare: one image u8[H, W, 3] -> an array of the one shape that the network takes.
    pixels: the same inside a jitted function, for images f32[B, H, W, 3] with whole values from 0 to 255.
    tokenize: prompts -> i32[B, L]; None if it uses no prompts.
    files: files of the weights.
    text: (params, token ids i32[B, L]) -> what the score needs of prompts, [B, ...].
  """

  score: Callable[[Any, Array, Array], Array]
  params: Any
  prepare: Callable[[np.ndarray], np.ndarray]
  pixels: Callable[[Array], Array]
  tokenize: Callable[[list[str]], np.ndarray] | None
  files: Sequence[pathlib.Path]
  text: Callable[[Any, Array], Array] = lambda params, ids: ids

  def apply(self, params: Any, ids: Array, images: Array) -> Array:
    """Returns scores f32[B] of token ids i32[B, L] and prepared images; or embeddings f32[B, D]."""
    return self.score(params, self.text(params, ids), images)


def _image_embeds(module: clip.CLIPModel, params: Any, pixels: Array) -> Array:
  if isinstance(module, StepAwareCLIPModel):
    times = jnp.zeros(pixels.shape[0], jnp.int32)
    return module.apply({"params": params}, pixels, times, method="image_embeds")
  return clip.normalize(module.apply({"params": params}, pixels, method="image_features"))


def _text_embeds(module: clip.CLIPModel, params: Any, ids: Array) -> Array:
  return clip.normalize(module.apply({"params": params}, ids, method="text_features"))


def weight_files(folder: pathlib.Path) -> Sequence[pathlib.Path]:
  """Returns the weight files of a folder in any of the layouts."""
  file = folder / "open_clip_model.safetensors"  # next to transformers' files it is a copy
  return [file] if file.is_file() and not (folder / "config.json").is_file() else tensors.weight_files(folder)


def _read_clip(folder: pathlib.Path, dtype: Any, placement: Any) -> tuple[clip.CLIPModel, Any]:
  """Returns a CLIP in transformers' or open_clip's layout, or a step-aware preference model."""
  file = folder / "config.json"
  arguments = dict(dtype=dtype, param_dtype=dtype, sharding=placement)
  if file.is_file() and '"step_aware_clip"' in file.read_text(encoding="utf-8"):
    return load_preference_model(folder, **arguments)
  return load_clip(folder, **arguments)


def clip_network(name: str, folder: pathlib.Path, dtype: Any, placement: Any, *, embeddings: bool = False) -> Network:
  """Returns scores by the cosine of image and text, or the embeddings of images alone."""
  module, params = _read_clip(folder, dtype, placement)
  files = weight_files(folder)
  if embeddings:
    return of_clip(name, module, params, None, files)
  config: Any = module.config
  tokenizer = tokenizers.tiny_tokenizer() if name == "tiny-clip" else clip_tokenizer(name, folder)
  _check_vocabulary(name, tokenizer, config.text_config.vocab_size)
  length = config.text_config.max_position_embeddings
  return of_clip(name, module, params, lambda texts: tokenizers.tokenize(tokenizer, texts, length=length), files)


def of_clip(
  name: str, module: clip.CLIPModel, params: Any, tokenize: Tokenize | None, files: Sequence[pathlib.Path] = ()
) -> Network:
  """Returns the scores of a CLIP; without a tokenizer its embeddings of images."""
  config: Any = module.config  # has image_mean and image_std
  size = config.vision_config.image_size
  resize, pixels = (padded_image, padded_pixels) if name.startswith("hpsv2") else (clip_image, clip_pixels)

  def embed(params, images):
    return _image_embeds(module, params, _normalised(images, config.image_mean, config.image_std))

  def score(params, text, images):
    cosine = jnp.sum(embed(params, images) * text, axis=-1)
    if name == "pickscore":
      return jnp.exp(params["logit_scale"].astype(jnp.float32)) * cosine
    return cosine if name.startswith("hpsv2") else 100.0 * cosine

  prepare, in_graph = lambda image: resize(image, size), lambda images: pixels(images, size)
  if tokenize is None:
    return Network(lambda params, _, images: embed(params, images), params, prepare, in_graph, None, files)
  text = lambda params, ids: _text_embeds(module, params, ids)
  return Network(score, params, prepare, in_graph, tokenize, files, text)


def aesthetic_clip(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the CLIP that the predictor's config.json names, or in `clip` beside it."""
  place = folder / "clip" if (folder / "clip").is_dir() else read_config(folder).get("clip") or ""
  place = place or CLIP_L
  try:
    return folders.resolve_folder(place, "model*.safetensors")
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"scorer aesthetic: its CLIP {place} {hub.said(error)}; "
      f"or put model.safetensors and config.json of the Hugging Face repository {CLIP_L} into {folder / 'clip'}."
    ) from error


def aesthetic_network(folder: pathlib.Path, dtype: Any, placement: Any) -> Network:
  """Returns LAION's predictor: linear layers on the embedding of CLIP-L."""
  clip_folder = aesthetic_clip(folder)
  module, params = _read_clip(clip_folder, dtype, placement)
  head_files = tensors.weight_files(folder)
  head_params = tensors.load_tree(head_files, head_shapes(module), sharding=placement)
  return of_aesthetic(module, {"clip": params, "head": head_params}, [*head_files, *weight_files(clip_folder)])


def head_shapes(module: clip.CLIPModel) -> Any:
  """Returns ShapeDtypeStructs of the aesthetic predictor's own parameters."""
  width = jnp.zeros((1, module.config.projection_dim))
  return jax.eval_shape(blip.RewardHead().init, jax.random.key(0), width)["params"]


def of_aesthetic(module: clip.CLIPModel, params: Any, files: Sequence[pathlib.Path] = ()) -> Network:
  """Returns the ratings by a CLIP and the head on it, with parameters `clip` and `head`."""
  config: Any = module.config
  head = blip.RewardHead()

  def score(params, unused_ids, images):
    pixels = _normalised(images, config.image_mean, config.image_std)
    return head.apply({"params": params["head"]}, _image_embeds(module, params["clip"], pixels))

  size = config.vision_config.image_size
  prepare, pixels = lambda image: torchvision_image(image, size), lambda images: torchvision_pixels(images, size)
  return Network(score, params, prepare, pixels, None, files)


def imagereward_network(folder: pathlib.Path, dtype: Any, placement: Any) -> Network:
  """Returns ImageReward, from a folder that scripts/assets/convert_scorer.py wrote."""
  config = blip.ImageRewardConfig.from_dict(read_config(folder))
  module, files = blip.ImageReward(config, dtype), tensors.weight_files(folder)
  length = config.text_length
  params = tensors.load_tree(files, imagereward_shapes(module), param_dtype=dtype, sharding=placement)
  tokenizer = bert_tokenizer(folder)
  _check_vocabulary("imagereward", tokenizer, config.text_config.vocab_size)

  def tokenize(texts: list[str]) -> np.ndarray:
    out = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return np.asarray(out["input_ids"], np.int32)

  return of_imagereward(module, params, tokenize, files)


def imagereward_shapes(module: blip.ImageReward) -> Any:
  """Returns ShapeDtypeStructs of ImageReward's parameters."""
  size = module.config.vision_config.image_size
  example = jnp.zeros((1, module.config.text_length), jnp.int32), jnp.zeros((1, size, size, 3))
  return jax.eval_shape(module.init, jax.random.key(0), *example)["params"]


def of_imagereward(
  module: blip.ImageReward, params: Any, tokenize: Tokenize, files: Sequence[pathlib.Path] = ()
) -> Network:
  """Returns ImageReward's rewards."""
  config, size = module.config, module.config.vision_config.image_size

  def score(params, ids, images):
    return module.apply({"params": params}, ids, _normalised(images, config.image_mean, config.image_std))

  prepare, pixels = lambda image: torchvision_image(image, size), lambda images: torchvision_pixels(images, size)
  return Network(score, params, prepare, pixels, tokenize, files)


def judge_network(folder: pathlib.Path, style: str, placement: Any) -> Network:
  """Returns the log-probability that a judge gives to a style."""
  module, params = load_judge(str(folder), style=style, num_classes=1)
  assert module is not None
  if placement is not None:
    params = jax.device_put(params, placement(params) if callable(placement) else placement)
  return of_judge(module, params, style, tensors.weight_files(folder))


def of_judge(module: Judge, params: Any, style: str, files: Sequence[pathlib.Path] = ()) -> Network:
  """Returns the log-probabilities of a style, by a judge that knows it."""
  size, column = module.config.image_size, module.config.styles.index(style)

  def score(params, unused_ids, images):
    log_probs, _ = ask_judge(module, params, images.astype(jnp.float32) / 127.5 - 1.0)
    return log_probs[:, column]

  prepare = lambda image: image if image.shape[:2] == (size, size) else clip_image(image, size)
  return Network(score, params, prepare, lambda images: clip_pixels(images, size), None, files)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / "config.json"
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    wrote = "a folder that scripts/assets/convert_scorer.py wrote"
    raise FileNotFoundError(f"{file} is missing; point to {wrote}.") from None
  except ValueError as error:
    raise ValueError(f"{file} is not valid JSON ({error}); convert the weights again.") from error


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def clip_tokenizer(name: str, folder: pathlib.Path) -> Any:
  """Returns the tokenizer beside the weights, or CLIP-L's: all published CLIPs have the same."""
  other = CLIP_L
  try:
    return loading.load_tokenizer(str(folder), other)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"scorer {name}: {folder} has no tokenizer (vocab.json and merges.txt) and the Hugging Face repository {other} "
      f"{hub.said(error)}; or copy the two files of that repository into {folder}."
    ) from error


def bert_tokenizer(folder: pathlib.Path) -> Any:
  """Returns BERT's tokenizer, whose vocabulary is in the folder or its `tokenizer`, or comes from the hub."""
  other = "google-bert/bert-base-uncased"
  place = next((p for p in (folder / "tokenizer", folder) if (p / "vocab.txt").is_file()), None)
  if place is None:
    try:
      place = folders.resolve_folder(other, "tokenizer/*.safetensors")  # no weights
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"scorer imagereward: {folder} has no vocab.txt and the Hugging Face repository {other} {hub.said(error)}; "
        f"or copy vocab.txt of that repository into {folder}."
      ) from error
  tokenizer = tokenizers.import_tokenizer("BertTokenizer")(vocab=str(place / "vocab.txt"), do_lower_case=True)
  tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's own, in case a prompt holds them
  return tokenizer


def _check_vocabulary(name: str, tokenizer: Any, size: int) -> None:
  largest = max(tokenizer.get_vocab().values())
  if largest >= size:
    raise ValueError(
      f"scorer {name}: its tokenizer gives ids up to {largest}, expected at most {size - 1} by the vocab_size of its "
      "weights; take the tokenizer of the same model."
    )
