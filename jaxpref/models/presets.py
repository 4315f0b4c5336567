"""Known architectures: Stable Diffusion 1.5 and XL, miniatures of their topology, and tiny-sd."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpref.models import latent_reward, t5
from jaxpref.models.clip import (
  CLIPConfig,
  CLIPModel,
  CLIPTextConfig,
  CLIPTextModel,
  CLIPVisionConfig,
  CLIPVisionModel,
  init_std,
)
from jaxpref.models.latent_reward import LatentRewardModel
from jaxpref.models.preference import Judge, JudgeConfig, StepAwareCLIPConfig
from jaxpref.models.sd3.transformer import SD3Transformer2DModel
from jaxpref.models.stacks import is_stacked
from jaxpref.models.t5 import T5EncoderModel
from jaxpref.models.unet import UNet2DConditionModel, UNetConfig, UNetEncoder
from jaxpref.models.vae import AutoencoderKL, VAEConfig
from jaxpref.recipes.sizes import sides

# The noise schedule that SD1.5's and SDXL's networks were trained with, for a deterministic sampler.
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "prediction_type": "epsilon",
  "timestep_spacing": "leading",
  "steps_offset": 1,
  "set_alpha_to_one": False,
  "clip_sample": False,
}

# Ids of the tokenizer in jaxpref/assets/tiny-sd; the last two begin and end a text.
TINY_VOCAB_SIZE = 2048
TINY_LENGTH = 16
_TINY_TOKENS = {
  "vocab_size": TINY_VOCAB_SIZE,
  "max_position_embeddings": TINY_LENGTH,
  "bos_token_id": TINY_VOCAB_SIZE - 2,
  "eos_token_id": TINY_VOCAB_SIZE - 1,
  "pad_token_id": TINY_VOCAB_SIZE - 1,
}


@dataclasses.dataclass(frozen=True)
class Preset:
  """The architectures of one pipeline, and of the models that judge its pictures.

  Attributes:
    unet: denoiser; `sample_size`, a side or (height, width), times the VAE's factor is the picture's size in pixels.
    vae: autoencoder.
    text_encoder: first (or only) text encoder.
    text_encoder_2: SDXL's second text encoder, the one with a projection, or None.
    scheduler: the dict of scheduler_config.json.
    preference: step-aware preference model.
    judge: classifier for evaluation, or None if there is none.
  """

  unet: UNetConfig
  vae: VAEConfig
  text_encoder: CLIPTextConfig
  text_encoder_2: CLIPTextConfig | None = None
  scheduler: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SCHEDULER))
  preference: StepAwareCLIPConfig | None = None
  judge: JudgeConfig | None = None


def _vae(channels: tuple[int, ...], **fields: Any) -> VAEConfig:
  levels = len(channels)
  return VAEConfig(
    block_out_channels=channels,
    down_block_types=("DownEncoderBlock2D",) * levels,
    up_block_types=("UpDecoderBlock2D",) * levels,
    **fields,
  )


# laion/CLIP-ViT-H-14, the architecture of PickScore and HPSv2; eos_token_id is 2 in its config.json.
CLIP_H = StepAwareCLIPConfig(
  CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    hidden_act="gelu",
    bos_token_id=0,
    eos_token_id=2,
  ),
  CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
  ),
  projection_dim=1024,
)

# openai/clip-vit-large-patch14's text tower, as in the config.json of SD1.5 and SDXL.
_CLIP_L_TEXT = CLIPTextConfig(
  hidden_size=768,
  intermediate_size=3072,
  projection_dim=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  bos_token_id=0,
  eos_token_id=2,
)

# openai/clip-vit-large-patch14, which LAION's aesthetic predictor reads.
CLIP_L = StepAwareCLIPConfig(
  _CLIP_L_TEXT,
  CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=768,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
  ),
  projection_dim=768,
)

SD15 = Preset(
  unet=UNetConfig(sample_size=64, cross_attention_dim=768),
  vae=_vae((128, 256, 512, 512), sample_size=512, layers_per_block=2),
  text_encoder=_CLIP_L_TEXT,
  preference=CLIP_H,
)

# The variant that predicts v, at 768 pixels; its text encoder is CLIP-H's without the last layer.
SD2 = Preset(
  unet=UNetConfig(
    sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
  ),
  vae=dataclasses.replace(SD15.vae, sample_size=768),
  text_encoder=dataclasses.replace(CLIP_H.text_config, num_hidden_layers=23),
  scheduler=SCHEDULER | {"prediction_type": "v_prediction"},
  preference=CLIP_H,
)

SDXL = Preset(
  unet=UNetConfig(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
  ),
  vae=_vae((128, 256, 512, 512), sample_size=1024, layers_per_block=2, scaling_factor=0.13025),
  text_encoder=_CLIP_L_TEXT,
  # laion/CLIP-ViT-bigG-14's text tower.
  text_encoder_2=CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    bos_token_id=0,
    eos_token_id=2,
  ),
  preference=CLIP_H,
)


def _tiny_text(width: int, layers: int, heads: int, **fields: Any) -> CLIPTextConfig:
  return CLIPTextConfig(
    hidden_size=width,
    intermediate_size=4 * width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    **{"projection_dim": width, **_TINY_TOKENS, **fields},
  )


def _tiny_clip(
  text_width: int, vision_width: int, layers: int, heads: int, image_size: int, projection: int
) -> StepAwareCLIPConfig:
  return StepAwareCLIPConfig(
    _tiny_text(text_width, layers, heads, projection_dim=projection),
    CLIPVisionConfig(
      hidden_size=vision_width,
      intermediate_size=4 * vision_width,
      projection_dim=projection,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      image_size=image_size,
      patch_size=4,
    ),
    projection_dim=projection,
  )


_STYLES = ("twemoji", "noto", "openmoji")
_MINIATURE_JUDGE = JudgeConfig(num_classes=1021, styles=_STYLES, image_size=16, channels=(8, 16), norm_num_groups=4)

# The same block types and kinds of layers as SD1.5; three levels instead of four.
SD15_MINIATURE = Preset(
  unet=UNetConfig(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=24,
    norm_num_groups=8,
  ),
  vae=_vae((8, 16), sample_size=16, norm_num_groups=4),
  text_encoder=_tiny_text(24, 2, 2),
  preference=_tiny_clip(16, 16, 2, 2, 16, 16),
  judge=_MINIATURE_JUDGE,
)

# The smallest with every kind of layer of SD1.5: compiles in seconds, for tests of anything but the networks.
ONE_LEVEL = dataclasses.replace(
  SD15_MINIATURE,
  unet=dataclasses.replace(
    SD15_MINIATURE.unet,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(16,),
  ),
  vae=dataclasses.replace(SD15_MINIATURE.vae, layers_per_block=1),
  text_encoder=dataclasses.replace(SD15_MINIATURE.text_encoder, num_hidden_layers=1),
)

# Like SDXL: no attention at the finest level, then 1 and 2 blocks deep; linear projections; embeddings of size and
# pooled text; two text encoders of different widths and activations.
SDXL_MINIATURE = Preset(
  unet=UNetConfig(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 2),
    attention_head_dim=(1, 2, 4),
    cross_attention_dim=40,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=16 + 6 * 8,
    norm_num_groups=8,
  ),
  vae=_vae((8, 16), sample_size=16, norm_num_groups=4, scaling_factor=0.13025),
  text_encoder=_tiny_text(16, 2, 2),
  text_encoder_2=_tiny_text(24, 2, 2, projection_dim=16, hidden_act="gelu"),
  preference=_tiny_clip(16, 16, 2, 2, 16, 16),
  judge=_MINIATURE_JUDGE,
)

# A real model small enough to train on a CPU: 32x32 pictures through 8x8x4 latents.
TINY_SD = Preset(
  unet=UNetConfig(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 160),
    layers_per_block=1,
    attention_head_dim=(2, 5),
    cross_attention_dim=128,
    norm_num_groups=16,
  ),
  # The scaling factor is measured once the autoencoder has been trained.
  vae=_vae((24, 48, 64), sample_size=32, norm_num_groups=8, scaling_factor=1.0),
  text_encoder=_tiny_text(128, 3, 4),
  preference=_tiny_clip(128, 128, 4, 4, 32, 128),
  judge=JudgeConfig(num_classes=1021, styles=_STYLES, channels=(32, 64, 128, 256)),
)

PRESETS: dict[str, Preset] = {
  "sd15": SD15,
  "sdxl": SDXL,
  "sd15-miniature": SD15_MINIATURE,
  "sdxl-miniature": SDXL_MINIATURE,
  "one-level": ONE_LEVEL,
  "tiny-sd": TINY_SD,
}


def get_preset(name: str) -> Preset:
  """Returns the preset of this name.

  Raises:
    ValueError: it does not exist.
  """
  if name not in PRESETS:
    raise ValueError(f"preset {name!r} is unknown, expected one of {', '.join(PRESETS)}.")
  return PRESETS[name]


def example_inputs(module: nn.Module) -> tuple[Any, ...]:
  """Returns the arguments of `module.init`, a batch with one zero each; only their shapes matter."""
  c = module.config
  match module:
    case UNet2DConditionModel():  # and UNetEncoder
      height, width = sides(c.sample_size or 8)
      added = None
      if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        added = {"text_embeds": jnp.zeros((1, pooled)), "time_ids": jnp.zeros((1, 6))}
      return (
        jnp.zeros((1, height, width, c.in_channels)),
        jnp.zeros(1, jnp.int32),
        jnp.zeros((1, 1, c.per_level("cross_attention_dim")[0])),
        added,
      )
    case SD3Transformer2DModel():
      return (
        jnp.zeros((1, c.patch_size, c.patch_size, c.in_channels)),
        jnp.zeros(1),
        jnp.zeros((1, 1, c.joint_attention_dim)),
        jnp.zeros((1, c.pooled_projection_dim)),
      )
    case T5EncoderModel():
      return (jnp.zeros((1, 1), jnp.int32),)
    case AutoencoderKL():
      side = 2 * c.downscale  # the parameters do not depend on it
      return (jnp.zeros((1, side, side, c.in_channels)),)
    case CLIPTextModel():
      return (jnp.zeros((1, c.max_position_embeddings), jnp.int32),)
    case CLIPVisionModel():
      return (jnp.zeros((1, c.image_size, c.image_size, c.num_channels)),)
    case CLIPModel():  # and StepAwareCLIPModel
      vision = c.vision_config
      size = vision.image_size
      ids = jnp.zeros((1, c.text_config.max_position_embeddings), jnp.int32)
      pixels = jnp.zeros((1, size, size, vision.num_channels))
      times = (jnp.zeros(1, jnp.int32),) if module.time_conditioned else ()
      return (ids, pixels, *times)
    case LatentRewardModel():
      latents, t, _, _ = example_inputs(UNetEncoder(c.unet))
      ids = jnp.zeros((1, c.tokens), jnp.int32)
      return (latents, t, ids, ids)
    case Judge():
      return (jnp.zeros((1, c.image_size, c.image_size, 3)),)
  raise ValueError(f"example_inputs: {type(module).__name__} is not a network of jaxpref.models.")


def abstract_params(module: nn.Module) -> dict[str, Any]:
  """Returns the ShapeDtypeStructs of a network's parameters; computes nothing."""
  return jax.eval_shape(module.init, jax.random.key(0), *example_inputs(module))["params"]


def init_params(module: nn.Module, key: jax.Array) -> dict[str, Any]:
  """Returns random parameters of a network, distributed like those of `module.init` but drawn by numpy.

  `module.init` compiles a random generator for every shape: half a minute even for the smallest
  UNet, but a second here.

  Args:
    module: one of this package's networks.
    key: PRNG key; each parameter mixes in the hash of its own name.

  Returns:
    A nested dict of float32 arrays.
  """
  shapes = abstract_params(module)
  paths = [tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  stds = [_random_std(module, path, leaf) for path, leaf in zip(paths, jax.tree.leaves(shapes), strict=True)]
  fixed = iter(_constant_params(module))
  seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
  leaves = []
  for path, std, leaf in zip(paths, stds, jax.tree.leaves(shapes), strict=True):
    if std is None:
      leaves.append(next(fixed))
      continue
    rng = np.random.default_rng([*seed, zlib.crc32(".".join(path).encode())])
    leaves.append(jnp.asarray(std * rng.standard_normal(leaf.shape, np.float32)))
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _constant_params(module: nn.Module) -> list[jax.Array]:
  """The parameters that start constant, in the order of the tree; what is drawn is dead code to the compiler."""

  def constants():
    params = module.init(jax.random.key(0), *example_inputs(module))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [x for path, x in leaves if _random_std(module, tuple(k.key for k in path), x) is None]

  return jax.jit(constants)()


def zero_params(module: nn.Module, key: jax.Array) -> dict[str, Any]:
  """Returns a network's parameters, all zero; under a trace, such as `jax.eval_shape`, only their shapes."""
  del key
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract_params(module))


def draw_params(
  module: nn.Module, seed: int | jax.Array, *, dtype: Any = jnp.float32, sharding: Any = None
) -> dict[str, Any]:
  """Draws random parameters on the device in seconds: distributed like those of `init_params`, but other numbers.

  One compiled program draws one parameter after the other, rounds it to `dtype` and puts it where it belongs. Besides
  them it holds the largest in float32. The generator is XLA's own, which compiles quickly. Its numbers are the same
  for the same seed on one kind of device.

  Args:
    module: one of this package's networks.
    seed: seed of all parameters; each mixes in the hash of its own name.
    dtype: dtype of all parameters.
    sharding: one for all arrays, or a function of the tree of ShapeDtypeStructs; None for JAX's default device.
  """

  def draw(seed: jax.Array) -> dict[str, Any]:
    key = jax.random.wrap_key_data(jnp.full(4, seed, jnp.uint32), impl="unsafe_rbg")
    drawn = jnp.zeros(())

    def leaf(path: Any, constant: jax.Array) -> jax.Array:  # what is not constant is dead code to the compiler
      nonlocal drawn
      names = tuple(k.key for k in path)
      std = _random_std(module, names, constant)
      if std is None:
        return constant.astype(dtype)
      own = jax.random.key_data(jax.random.fold_in(key, zlib.crc32(".".join(names).encode())))
      # One after the other, as each has float32 temporaries: XLA does not simplify a float times 0 to 0.
      own = own + (0.0 * drawn.ravel()[0]).astype(jnp.uint32)
      normal = jax.random.normal(jax.random.wrap_key_data(own, impl="unsafe_rbg"), constant.shape)
      drawn = (std * normal).astype(dtype)
      return drawn

    params = module.init(jax.random.key(0), *example_inputs(module))["params"]
    return jax.tree_util.tree_map_with_path(leaf, params)

  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), abstract_params(module))
  out = sharding(shapes) if callable(sharding) else sharding
  return jax.jit(draw, out_shardings=out)(jnp.uint32(seed))


def _random_std(module: nn.Module, path: tuple[str, ...], leaf: Any) -> float | None:
  """Returns the standard deviation of a parameter at initialisation; None if it starts constant."""
  *modules, name = path
  if name not in ("kernel", "embedding", "class_embedding") or "adaLN_modulation" in modules:
    return None
  if "t_embedder" in modules:
    return 0.02
  if isinstance(module, CLIPTextModel | CLIPVisionModel | CLIPModel):
    config: Any = module.config
    if isinstance(module, CLIPModel):
      text = modules[0] in ("text_model", "text_projection")
      config = config.text_config if text else config.vision_config
    return init_std(config, name if name == "class_embedding" else modules[-1])
  if isinstance(module, T5EncoderModel):
    return t5.init_std(module.config, modules[-1].rpartition(".")[2])
  if isinstance(module, SD3Transformer2DModel):
    return float(np.prod(leaf.shape[is_stacked(path) : -1])) ** -0.5
  if isinstance(module, LatentRewardModel):
    if modules[0].startswith("text_encoder"):
      return init_std(getattr(module.config, modules[0]), modules[-1])
    if modules[0] == "text_projection":
      return init_std(module.config.text_encoder, modules[0])
    if modules[0] == "visual_projection":
      return latent_reward.VISUAL_STD
  return float(np.prod(leaf.shape[:-1])) ** -0.5  # Linen's default: 1 / sqrt(fan in)


def make_clip(preset: Preset, dtype: Any = jnp.float32) -> CLIPModel:
  """Returns a plain CLIP with the towers of the preset's preference model, which starts from it."""
  c = preset.preference
  if c is None:
    raise ValueError("make_clip: the preset has no preference model, whose towers the CLIP takes.")
  return CLIPModel(CLIPConfig(c.text_config, c.vision_config, c.projection_dim), dtype)


def latent_reward_config(preset: Preset) -> latent_reward.LatentRewardConfig:
  """Returns the latent reward model that starts as the networks of a preset."""
  size = preset.unet.sample_size
  if not isinstance(size, int):
    raise ValueError(f"latent_reward_config: sample_size={size!r} of the preset's UNet; expected one number.")
  return latent_reward.of_networks(
    preset.unet, preset.text_encoder, preset.text_encoder_2, image_size=size * preset.vae.downscale
  )


def count_params(module: nn.Module) -> int:
  """Returns the number of parameters of a network."""
  return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(module)))


__all__ = [
  "ONE_LEVEL",
  "PRESETS",
  "SD15",
  "SD15_MINIATURE",
  "SDXL",
  "SDXL_MINIATURE",
  "TINY_SD",
  "Preset",
  "abstract_params",
  "count_params",
  "draw_params",
  "example_inputs",
  "get_preset",
  "init_params",
  "latent_reward_config",
  "make_clip",
]
