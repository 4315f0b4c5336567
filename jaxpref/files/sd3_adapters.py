"""LoRA files of Stable Diffusion 3 and 3.5, as diffusers, PEFT and kohya write them. See `adapters`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpref.files import adapters
from jaxpref.files.adapter_names import StableDiffusion3Naming
from jaxpref.models import lora

_NAMING = StableDiffusion3Naming()


def load_lora(file: adapters.Path, params: lora.Tree) -> tuple[dict[str, Any], float]:
  """Reads a LoRA of a transformer to continue training it.

  A layer of queries, keys and values together, as kohya's files have it, becomes three that share lora_A; or three of a
  third of its rank, if `save_lora` or another tool put them together from these.

  Args:
    file: one safetensors file; PEFT's own `adapter_model.safetensors` needs the `adapter_config.json` beside it.
    params: parameters of the transformer, or their ShapeDtypeStructs.

  Returns:
    float32 adapter as `lora.init_lora` returns it, with one rank, and its scale alpha / rank.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit, as `adapters.load_lora`.
  """
  return adapters.load_lora_as(_NAMING, file, params)


def save_lora(
  file: adapters.Path, adapter: lora.Tree, scale: float, *, form: str = "lora", dtype: Any = jnp.float32
) -> None:
  """Writes a LoRA of a transformer.

  Args:
    file: path to write.
    adapter: as `lora.init_lora` returns it.
    scale: alpha / rank.
    form: "lora" for diffusers, which ComfyUI opens, too; or "kohya", where queries, keys and values are one layer and
      its rank is the sum of theirs.
    dtype: dtype of the file: float32, float16 or bfloat16.

  Raises:
    ValueError: a factor is not finite or does not fit `dtype`.
  """
  if form == "kohya":
    adapters.save_kohya_as(_NAMING, file, adapter, scale, dtype=dtype)
  else:
    adapters.save_diffusers(file, adapter, scale, dtype=dtype, denoiser=_NAMING.denoiser)


def with_adapters(params: Mapping[str, Any], loras: Sequence[adapters.LoraFile]) -> tuple[dict[str, Any], float]:
  """Returns a pipeline's parameters with the sum of LoRAs, each with its strength, to draw pictures with.

  Args:
    params: parameters by component.
    loras: files; those of text encoders are merged into the encoders' parameters.

  Returns:
    The parameters with the adapter "transformer_lora", and the adapter's scale.

  Raises:
    FileNotFoundError, ValueError: one sentence on what is missing or does not fit.
  """
  adapter, scale, text_encoders = adapters.load_pipeline_loras_as(_NAMING, loras, params)
  return adapters.merge_text_encoders(params, text_encoders) | {"transformer_lora": adapter}, scale
