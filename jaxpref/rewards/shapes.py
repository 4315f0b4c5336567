"""Scorers as shapes alone, for planning: NAME=zeros:NAME is the published architecture, NAME=zeros:FOLDER a folder's.

Their parameters are zeros, only shapes under `jax.eval_shape`, and so are the ids from their tokenizers.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.files import folders, loading
from jaxpref.models import blip, clip, open_clip, presets
from jaxpref.models.preference import Judge, JudgeConfig, StepAwareCLIPConfig, StepAwareCLIPModel
from jaxpref.recipes import places
from jaxpref.rewards import networks
from jaxpref.rewards.loading import check_style

ZEROS = "zeros:"
SHIPPED = {"judge": "tiny-judge", "tiny-clip": "tiny-clip"}
CLIPS = {
  "pickscore": presets.CLIP_H,
  "clip_l": presets.CLIP_L,
  "clip_h": presets.CLIP_H,
  "hpsv2": open_clip.config_from_dict(open_clip.VIT_H_14),
  "hpsv2.1": open_clip.config_from_dict(open_clip.VIT_H_14),
}
PUBLISHED = (*CLIPS, "aesthetic", "imagereward")  # architectures known without their files


def without_values(spec: str) -> str:
  """Returns NAME=zeros:PLACE for NAME or NAME=FOLDER; for a missing folder the published architecture."""
  name, _, folder = spec.partition("=")
  if folder.startswith(ZEROS):
    return spec
  known = not folder or (name in PUBLISHED and not pathlib.Path(places.expand(folder)).is_dir())
  return f"{name}={ZEROS}{name if known else folder}"


def network(name: str, place: str, *, dtype: Any, preferred_style: str) -> networks.Network:
  """Returns the network of a scorer; `params` are zeros.

  Args:
    place: the part after `zeros:`, a folder or the scorer's name.
    dtype: dtype of the network and its parameters.
    preferred_style: style that the judge looks for.

  Raises:
    ValueError, FileNotFoundError: the folder has no config.json, or that of another network.
  """
  folder = None if place == name else pathlib.Path(places.expand(place))
  if folder is None and name in SHIPPED:
    folder = pathlib.Path(loading.folder_of(SHIPPED[name]))
  if name == "judge":
    assert folder is not None
    judge = Judge(JudgeConfig.from_dict(folders.read_json(folder / "config.json")))
    check_style(place, judge.config, preferred_style)
    return networks.of_judge(judge, _zeros(presets.abstract_params(judge), jnp.float32), preferred_style)
  if name == "aesthetic":
    module = _aesthetic_clip(folder, dtype)
    head = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), networks.head_shapes(module))
    return networks.of_aesthetic(module, {"clip": _zeros(presets.abstract_params(module), dtype), "head": head})
  if name == "imagereward":
    config = blip.ImageRewardConfig()
    if folder is not None:
      config = blip.ImageRewardConfig.from_dict(networks.read_config(folder))
    reward = blip.ImageReward(config, dtype)
    tokenize = lambda texts: np.zeros((len(texts), config.text_length), np.int32)
    return networks.of_imagereward(reward, _zeros(networks.imagereward_shapes(reward), dtype), tokenize)
  module = clip.CLIPModel(CLIPS[name], dtype) if folder is None else _clip(folder, dtype)
  length = module.config.text_config.max_position_embeddings
  params = _zeros(presets.abstract_params(module), dtype)
  return networks.of_clip(name, module, params, lambda texts: np.zeros((len(texts), length), np.int32))


def _zeros(shapes: Any, dtype: Any) -> Any:
  return jax.tree.map(lambda s: jnp.zeros(s.shape, dtype), shapes)


def _clip(folder: pathlib.Path, dtype: Any) -> clip.CLIPModel:
  """Returns the CLIP that `networks.clip_network` would open there."""
  if not (folder / "config.json").is_file() and (folder / "open_clip_config.json").is_file():
    return clip.CLIPModel(open_clip.config_from_dict(folders.read_json(folder / "open_clip_config.json")), dtype)
  config = folders.read_json(folder / "config.json")
  kind = StepAwareCLIPModel if config.get("model_type") == "step_aware_clip" else clip.CLIPModel
  return kind(StepAwareCLIPConfig.from_dict(config), dtype)


def _aesthetic_clip(folder: pathlib.Path | None, dtype: Any) -> clip.CLIPModel:
  """Returns the CLIP beside the predictor or named by its config.json, if it exists, else CLIP-L."""
  if folder is not None:
    named = "" if (folder / "clip").is_dir() else networks.read_config(folder).get("clip") or ""
    for place in (folder / "clip", pathlib.Path(named)):
      if place != pathlib.Path() and place.is_dir():
        return _clip(place, dtype)
  return clip.CLIPModel(presets.CLIP_L, dtype)
