"""The latent reward model of LPO (arXiv 2502.01051): scores a denoiser's own features against the prompt."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpref.models.base import is_guided
from jaxpref.models.clip import CLIPTextConfig, CLIPTextModel, init_std, normalize
from jaxpref.models.unet import UNetConfig, UNetEncoder
from jaxpref.recipes.sizes import Size, is_size, sides

Array = jax.Array
MODEL_TYPE = "latent_reward_model"  # model_type in config.json
VISUAL_STD = 0.02  # initial deviation of the projection of features
Rows = dict[str, Array]
_is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
_CONFIG = ("the config of a network", lambda value: isinstance(value, Mapping))
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what config.json may say
  "unet": _CONFIG,
  "text_encoder": _CONFIG,
  "text_encoder_2": _CONFIG,
  "projection_dim": ("a number of channels", lambda value: isinstance(value, int) and value >= 1),
  "image_size": ("a side in pixels, or height and width", is_size),
  "guidance_scale": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
  "logit_scale_init_value": ("a number", _is_number),
}


@dataclasses.dataclass(frozen=True)
class LatentRewardConfig:
  """A latent reward model's config.json.

  Attributes:
    unet: config of the whole UNet, of which the way down and the middle are used.
    text_encoder, text_encoder_2: configs of its own text encoders; the second is SDXL's, or None.
    projection_dim: width of the space in which latents and prompts meet; with two text encoders that of the second.
    image_size: image size in pixels that SDXL's UNet gets, a side or height and width.
    guidance_scale: guidance of the middle's features; up to 1 they are the prompt's alone.
    logit_scale_init_value: logarithm of the scores' initial scale, log(1 / 0.07).
  """

  unet: UNetConfig
  text_encoder: CLIPTextConfig
  text_encoder_2: CLIPTextConfig | None = None
  projection_dim: int = 768
  image_size: Size = 512
  guidance_scale: float = 7.5
  logit_scale_init_value: float = 2.6592

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> Self:
    """Reads the dict of a config.json.

    Raises:
      ValueError: it describes another model.
    """
    missing = {name for name in ("unet", "text_encoder") if config.get(name) is None}
    if config.get("model_type") != MODEL_TYPE or missing:
      without = f" and it has no {' and no '.join(sorted(missing))}" if missing else ""
      raise ValueError(
        f"model_type is {config.get('model_type')!r}{without}, expected {MODEL_TYPE!r}; point to a latent reward "
        "model: the export/ of a run of configs/lrm_tiny.py, lrm_sd15.py or lrm_sdxl.py, or what "
        "scripts/assets/convert_lrm.py wrote."
      )
    second = config.get("text_encoder_2")
    networks = ("unet", "text_encoder", "text_encoder_2")
    given = {f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None}
    for name, value in given.items():
      expected, allowed = _ALLOWED[name]
      if not allowed(value):
        raise ValueError(
          f"{name} is {value!r}, expected {expected}; point to a folder that a run of configs/lrm_sd15.py exported, or "
          "that scripts/assets/convert_lrm.py wrote."
        )
    given = {name: value for name, value in given.items() if name not in networks}
    own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return cls(
      unet=UNetConfig.from_dict(config["unet"]),
      text_encoder=CLIPTextConfig.from_dict(config["text_encoder"]),
      text_encoder_2=None if second is None else CLIPTextConfig.from_dict(second),
      **own,
    )

  def to_dict(self) -> dict[str, Any]:
    """Returns the dict for config.json."""
    networks = ("unet", "text_encoder", "text_encoder_2")
    own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return {"model_type": MODEL_TYPE} | {
      name: value.to_dict() if name in networks and value is not None else value for name, value in own.items()
    }

  def check_fits(self, name: str, *, channels: int, tokens: int) -> None:
    """Raises for latents and prompts of another text-to-image model than its own, as far as their sizes tell.

    Args:
      name: name of the latent reward model, for the message.
      channels: channels of the latents.
      tokens: tokens of a prompt.

    Raises:
      ValueError: they differ.
    """
    found, expected = (channels, tokens), (self.unet.in_channels, self.tokens)
    if found != expected:
      raise ValueError(
        f"latent reward model {name} is for latents of {expected[0]} channels and prompts of {expected[1]} tokens, "
        f"those of config.model have {found[0]} and {found[1]}; use one that was made for this model."
      )

  @property
  def tokens(self) -> int:
    """Number of ids in a prompt, for all text encoders together."""
    encoders = (self.text_encoder, self.text_encoder_2)
    return sum(encoder.max_position_embeddings for encoder in encoders if encoder is not None)


def of_networks(
  unet: UNetConfig,
  text_encoder: CLIPTextConfig,
  text_encoder_2: CLIPTextConfig | None,
  *,
  image_size: Size,
  guidance_scale: float = 7.5,
) -> LatentRewardConfig:
  """Returns the latent reward model that starts as these networks of a text-to-image model.

  Args:
    image_size: image size of the model, in pixels.
  """
  projection_dim = (text_encoder if text_encoder_2 is None else text_encoder_2).projection_dim
  return LatentRewardConfig(unet, text_encoder, text_encoder_2, projection_dim, image_size, guidance_scale)


class LatentRewardModel(nn.Module):
  """Scores noisy latents at any time of the process under their prompts (arXiv 2502.01051, Section 4.1).

  The features are means over height and width: each level of the UNet before it is halved (conditioned on the prompt),
  and the middle (guided), side by side. They are projected without bias; the score is exp(logit_scale) times the cosine
  with the projected pooled text of the model's own text encoder. With SDXL's two, it is the second's `text_embeds`.

  Attributes:
    config: configs of all its networks.
    dtype: compute dtype; pooled features, projections and scores are float32.
    remat: that of the UNet, see `UNet2DConditionModel`.
  """

  config: LatentRewardConfig
  dtype: Any = jnp.float32
  remat: str | tuple[str, ...] = "none"

  def setup(self):
    c = self.config
    self.unet = UNetEncoder(c.unet, self.dtype, self.remat)
    self.text_encoder = CLIPTextModel(c.text_encoder, False, self.dtype)
    project = lambda std: nn.Dense(
      c.projection_dim, use_bias=False, dtype=jnp.float32, kernel_init=nn.initializers.normal(std)
    )
    if c.text_encoder_2 is not None:
      self.text_encoder_2 = CLIPTextModel(c.text_encoder_2, True, self.dtype)
    else:
      self.text_projection = project(init_std(c.text_encoder, "text_projection"))
    self.visual_projection = project(VISUAL_STD)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(c.logit_scale_init_value), (), jnp.float32)

  def text(self, input_ids: Array) -> tuple[Rows, Array]:
    """Returns what the UNet is conditioned on, and unit vectors f32[B, P], for prompts.

    Args:
      input_ids: i32[B, L], or i32[B, 2 L] for two text encoders, as the text-to-image model takes them.
    """
    if self.config.text_encoder_2 is None:
      out = self.text_encoder(input_ids)
      return {"hidden": out["last_hidden_state"]}, normalize(self.text_projection(out["pooler_output"]))
    ids, ids_2 = jnp.split(input_ids, 2, axis=1)
    first, second = self.text_encoder(ids), self.text_encoder_2(ids_2)
    hidden = jnp.concatenate([e["hidden_states"][-2] for e in (first, second)], axis=-1)
    return {"hidden": hidden, "pooled": second["text_embeds"]}, normalize(second["text_embeds"])

  def latent_embeds(self, latents: Array, t: Array, cond: Rows, uncond: Rows) -> Array:
    """Returns unit vectors f32[N, P] of noisy latents f32[N, h, w, C] at times t [N].

    Args:
      cond, uncond: rows [N, ...] of what `text` returns for the prompts, and for the empty prompt.
    """
    guided = is_guided(self.config.guidance_scale)
    if guided:  # one call on a doubled batch
      latents, t = jnp.concatenate([latents, latents]), jnp.concatenate([t, t])
      cond = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, uncond)
    added = None
    if "pooled" in cond:
      size = sides(self.config.image_size)
      sizes = jnp.asarray([[*size, 0, 0, *size]], jnp.float32)
      added = {"text_embeds": cond["pooled"], "time_ids": jnp.broadcast_to(sizes, (len(t), 6))}
    levels, middle = self.unet(latents, t, cond["hidden"], added)
    if guided:
      levels = [jnp.split(x, 2)[0] for x in levels]
      middle, without = jnp.split(middle, 2)
      middle = without + self.config.guidance_scale * (middle - without)
    return normalize(self.visual_projection(jnp.concatenate([*levels, middle], axis=-1)))

  def score(self, latent_embeds: Array, text_embeds: Array) -> Array:
    """Returns f32[N]: exp(logit_scale) cos(latents, text), row by row, for unit vectors [N, P]."""
    return jnp.exp(self.logit_scale.astype(jnp.float32)) * jnp.sum(latent_embeds * text_embeds, axis=-1)

  def __call__(self, latents: Array, t: Array, input_ids: Array, empty_ids: Array) -> Array:
    """Scores latents at times t under their prompts, f32[N]; empty_ids i32[N, L] is the empty prompt."""
    cond, text_embeds = self.text(input_ids)
    uncond, _ = self.text(empty_ids)
    return self.score(self.latent_embeds(latents, t, cond, uncond), text_embeds)
