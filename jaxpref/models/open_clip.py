"""CLIP under open_clip's names: its configs and parameter trees <-> those of `jaxpref.models.clip`.

The network is the same. In open_clip's files the queries, keys and values of a block are one array (torch's
MultiheadAttention), the projections are plain matrices [in, out], and modules have other names.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxpref.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jaxpref.models.preference import CLIP_MEAN, CLIP_STD, StepAwareCLIPConfig
from jaxpref.recipes.messages import listed

Tree = dict[str, Any]

# (here, there): modules of a block that have the same parameters.
_BLOCK = (
  (("layer_norm1",), ("ln_1",)),
  (("layer_norm2",), ("ln_2",)),
  (("mlp", "fc1"), ("mlp", "c_fc")),
  (("mlp", "fc2"), ("mlp", "c_proj")),
  (("self_attn", "out_proj"), ("attn", "out_proj")),
)
_KNOWN_KEYS = {
  "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
  "model_cfg.vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"},
  "model_cfg.text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}

# open_clip_config.json of ViT-H-14, the architecture of HPSv2.
VIT_H_14 = {
  "model_cfg": {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
  },
  "preprocess_cfg": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)},
}


def config_from_dict(config: Mapping[str, Any]) -> StepAwareCLIPConfig:
  """Reads the dict of an open_clip_config.json; ignore the time condition of the result.

  Raises:
    ValueError: the file lacks a key, or describes a network that is not a CLIP of two plain transformers.
  """
  try:
    model = config["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    for name, part in zip(_KNOWN_KEYS, (model, vision, text), strict=True):
      others = sorted(key for key in part if key not in _KNOWN_KEYS[name] and part[key] is not None)
      if others:
        raise ValueError(
          f"open_clip config: {name} has {listed(others)}, which is not implemented, expected "
          f"{', '.join(sorted(_KNOWN_KEYS[name]))}; take a plain ViT such as ViT-H-14."
        )
    shared = {
      "projection_dim": model["embed_dim"],
      "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }
    preprocess = config.get("preprocess_cfg") or {}
    return StepAwareCLIPConfig(
      CLIPTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["width"],
        intermediate_size=int(text["width"] * (text.get("mlp_ratio") or 4)),
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
        eos_token_id=2,  # open_clip pools at the largest id, as transformers does with this value
        **shared,
      ),
      CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * (vision.get("mlp_ratio") or 4)),
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // (vision.get("head_width") or 64),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        **shared,
      ),
      projection_dim=model["embed_dim"],
      image_mean=tuple(preprocess.get("mean") or CLIP_MEAN),
      image_std=tuple(preprocess.get("std") or CLIP_STD),
    )
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"open_clip config: {type(error).__name__} at {error}, expected a model_cfg with embed_dim, vision_cfg and "
      "text_cfg; download open_clip_config.json again."
    ) from error


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  for name in path:
    tree = tree[name]
  return tree


def _put(tree: Tree, path: tuple[str, ...], value: Any) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def to_clip(tree: Mapping[str, Any], config: CLIPConfig) -> Tree:
  """Returns parameters of `CLIPModel` from those of an open_clip file, as `load_tree` reads them."""

  def tower(there: Mapping[str, Any], depth: int) -> Tree:
    here: Tree = {}
    for i in range(depth):
      block, out = there[f"resblocks.{i}"], here.setdefault(f"layers.{i}", {})
      for ours, theirs in _BLOCK:
        _put(out, ours, _get(block, theirs))
      kernels = jnp.split(block["attn"]["in_proj_weight"].T, 3, axis=1)
      biases = jnp.split(block["attn"]["in_proj_bias"], 3)
      for name, kernel, bias in zip(("q_proj", "k_proj", "v_proj"), kernels, biases, strict=True):
        out["self_attn"][name] = {"kernel": kernel, "bias": bias}
    return here

  visual = tree["visual"]
  return {
    "text_model": {
      "embeddings": {
        "token_embedding": tree["token_embedding"],
        "position_embedding": {"embedding": tree["positional_embedding"]},
      },
      "encoder": tower(tree["transformer"], config.text_config.num_hidden_layers),
      "final_layer_norm": tree["ln_final"],
    },
    "vision_model": {
      "embeddings": {
        "class_embedding": visual["class_embedding"],
        "patch_embedding": visual["conv1"],
        "position_embedding": {"embedding": visual["positional_embedding"]},
      },
      "pre_layrnorm": visual["ln_pre"],
      "encoder": tower(visual["transformer"], config.vision_config.num_hidden_layers),
      "post_layernorm": visual["ln_post"],
    },
    "text_projection": {"kernel": tree["text_projection"]},
    "visual_projection": {"kernel": visual["proj"]},
    "logit_scale": tree["logit_scale"],
  }


def from_clip(params: Mapping[str, Any], config: CLIPConfig) -> Tree:
  """Returns the inverse of `to_clip`; for `load_tree`, that of shapes under `jax.eval_shape`."""

  def tower(here: Mapping[str, Any], depth: int) -> Tree:
    there: Tree = {}
    for i in range(depth):
      block, out = here[f"layers.{i}"], there.setdefault(f"resblocks.{i}", {})
      for ours, theirs in _BLOCK:
        _put(out, theirs, _get(block, ours))
      parts = [block["self_attn"][name] for name in ("q_proj", "k_proj", "v_proj")]
      out["attn"]["in_proj_weight"] = jnp.concatenate([p["kernel"] for p in parts], axis=1).T
      out["attn"]["in_proj_bias"] = jnp.concatenate([p["bias"] for p in parts])
    return there

  text, vision = params["text_model"], params["vision_model"]
  return {
    "token_embedding": text["embeddings"]["token_embedding"],
    "positional_embedding": text["embeddings"]["position_embedding"]["embedding"],
    "transformer": tower(text["encoder"], config.text_config.num_hidden_layers),
    "ln_final": text["final_layer_norm"],
    "text_projection": params["text_projection"]["kernel"],
    "logit_scale": params["logit_scale"],
    "visual": {
      "class_embedding": vision["embeddings"]["class_embedding"],
      "conv1": vision["embeddings"]["patch_embedding"],
      "positional_embedding": vision["embeddings"]["position_embedding"]["embedding"],
      "ln_pre": vision["pre_layrnorm"],
      "transformer": tower(vision["encoder"], config.vision_config.num_hidden_layers),
      "ln_post": vision["post_layernorm"],
      "proj": params["visual_projection"]["kernel"],
    },
  }
