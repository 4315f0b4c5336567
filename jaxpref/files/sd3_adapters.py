"""LoRA files of Stable Diffusion 3 and 3.5, as diffusers writes them: `transformer.LAYER.lora_A.weight`."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpref.files import adapters, tensors
from jaxpref.models import lora

PREFIX = "transformer."
_ENDINGS = (".lora_A.weight", ".lora_B.weight")


def load_lora(file: adapters.Path, params: lora.Tree) -> tuple[dict[str, Any], float]:
  """Returns the f32 adapter of a transformer in a file, and its scale alpha / rank.

  Raises:
    FileNotFoundError, ValueError: it does not exist, or is for another network.
  """
  import safetensors

  adapters.look_for(file)
  with safetensors.safe_open(file, framework="numpy") as handle:
    found = {key: handle.get_tensor(key) for key in handle.keys()}
    metadata = handle.metadata() or {}
  foreign = [key for key in found if not key.startswith(PREFIX) or not key.endswith(_ENDINGS)]
  if foreign or not found:
    raise ValueError(
      f"{file} holds {min(foreign, default='nothing')}, expected an adapter of Stable Diffusion 3 with names such as "
      f"{PREFIX}transformer_blocks.0.attn.to_q.lora_A.weight; use it with the family of models it was made for."
    )
  names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in found})
  part = lambda name, end: jnp.asarray(found[f"{PREFIX}{name}{end}"].T, jnp.float32)
  adapter = lora.from_layers({name: (part(name, _ENDINGS[0]), part(name, _ENDINGS[1])) for name in names}, params)
  rank = adapters.adapter_rank(adapter)
  alpha = json.loads(metadata.get("lora_adapter_metadata", "{}")).get(f"{PREFIX}lora_alpha", rank)
  return adapter, alpha / rank


def save_lora(
  file: adapters.Path, adapter: lora.Tree, scale: float, *, form: str = "lora", dtype: Any = jnp.float32
) -> None:
  """Writes a LoRA of a transformer, and alpha in the metadata; raises ValueError for another form than "lora"."""
  if form != "lora":
    raise ValueError(f"--format={form}; expected lora or pipeline for Stable Diffusion 3.")
  layers, rank = lora.to_layers(adapter), adapters.adapter_rank(adapter)
  tree: dict[str, Any] = {}
  for layer, (a, b) in layers.items():
    tree |= {f"{PREFIX}{layer}.lora_A": {"kernel": a}, f"{PREFIX}{layer}.lora_B": {"kernel": b}}
  config = {f"{PREFIX}r": rank, f"{PREFIX}lora_alpha": scale * rank, f"{PREFIX}target_modules": sorted(layers)}
  metadata = {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
  tensors.save_tree(pathlib.Path(file), tree, dtype=dtype, metadata=metadata)


def with_adapters(params: Mapping[str, Any], loras: Sequence[adapters.LoraFile]) -> tuple[dict[str, Any], float]:
  """Returns a pipeline's parameters with the sum of LoRAs as "transformer_lora", and its scale."""
  found = [(load_lora(file, params["transformer"]), strength) for file, strength in loras]
  if len(found) == 1:
    (adapter, scale), strength = found[0]
    return dict(params) | {"transformer_lora": adapter}, scale * strength
  parts = [(adapter, scale * strength) for (adapter, scale), strength in found]
  return dict(params) | {"transformer_lora": lora.combine(parts, params["transformer"])}, 1.0
