"""Opens the networks of a recipe: those that are needed, those that are trained, and the adapter to start from."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxpref.config import Config
from jaxpref.files import adapters, loading, pipelines
from jaxpref.files import family as families
from jaxpref.models import lora
from jaxpref.training import inputs


def adapter_scale(config: Config, rank: int) -> float:
  """Returns alpha / rank of the adapter that a config trains."""
  return 1.0 if config.lora.alpha is None else config.lora.alpha / rank


def config_lora(config: Config) -> adapters.LoraFile | None:
  """Returns the LoRA file that training continues, and its strength; None if it begins with none."""
  return adapters.parse_lora_file(config.lora.init_from) if config.lora.init_from else None


def text_adapters(config: Config) -> dict[str, Any]:
  """Returns what config.lora.init_from has for text encoders, by component, without reading a model's weights.

  Raises:
    ValueError: it has something, and the data holds prompts that the encoders without it have encoded.
  """
  start, of = config_lora(config), families.get(config.family)
  read = getattr(of, "text_adapters", None)  # families without it refuse such files
  if start is None or read is None:
    return {}
  text: dict[str, Any] = read(start, load(config, None, components=()))
  if text and config.data.source == "precomputed":
    raise ValueError(
      f"config.lora.init_from={start} adapts {' and '.join(sorted(text))}, and precomputed data holds prompts without "
      "that; train on the images themselves."
    )
  return text


def initial_adapter(config: Config, pipe: Any) -> Any:
  """Returns the adapter that training starts from: a fresh one, or a file's, at the config's alpha.

  Args:
    pipe: has the parameters of the denoiser.
  Returns:
    None for full training.
  Raises:
    ValueError, FileNotFoundError: the file is missing, is for another network, or has another rank than the config.
  """
  c, of = config.lora, families.get(config.family)
  if start := config_lora(config):
    adapter, scale = of.load_adapter(str(start.path), pipe)
    scale *= start.strength
    rank = adapters.adapter_rank(adapter)
    if c.rank not in (0, rank):
      raise ValueError(f"config.lora.rank={c.rank}, but {c.init_from} has rank {rank}; leave out one of them.")
    return adapters.rescale(adapter, scale, adapter_scale(config, rank))
  if c.rank:
    key = jax.random.key(config.seed)
    return lora.init_lora(key, pipe.params[of.denoiser], rank=c.rank, targets=c.targets, init=c.init)
  return None


def load(
  config: Config,
  sharding: pipelines.Sharding,
  *,
  trained: tuple[str, ...] = (),
  components: Sequence[str] | None = None,
) -> Any:
  """Returns the config's pipeline: trained parameters in float32, others in the compute dtype."""
  of = families.get(config.family)
  with families.opened(config.family):
    return of.load(
      loading.model_name(config),
      dtype=config.dtype,
      seed=config.seed,
      param_dtype={name: "float32" if name in trained else config.dtype for name in of.networks},
      sharding=sharding,
      vae_model=config.vae_model,
      components=components,
    )


def needed(config: Config) -> tuple[str, ...]:
  """Returns the networks that training needs: with precomputed data only the denoiser, unless it draws."""
  draws = config.sample.every or (config.judge and config.evaluation.num_prompts)
  of = families.get(config.family)
  return of.networks if config.data.source != "precomputed" or draws else families.of_denoiser(of)


def trained_components(config: Config) -> tuple[str, ...]:
  """Returns the components whose own parameters are trained; none with an adapter."""
  if config.lora.rank or config.lora.init_from:
    return ()
  denoiser = families.get(config.family).denoiser
  return (denoiser, "text_encoder") if config.train_text_encoder else (denoiser,)


def load_to_train(config: Config, sharding: pipelines.Sharding) -> tuple[Any, dict[str, Any]]:
  """Returns the networks that are needed, and `text_adapters`, which are merged into them."""
  # Errors are raised now, not after gigabytes have been read.
  if config.data.source == "precomputed":
    inputs.open_precomputed(config)
  text = text_adapters(config)
  pipe = load(config, sharding, trained=trained_components(config), components=needed(config))
  return families.with_text_adapters(pipe, text), text
