"""Known architectures: Stable Diffusion 3 medium, 3.5 medium and 3.5 large, and miniatures of their topology."""

import dataclasses
from typing import Any

from jaxpref.models import presets
from jaxpref.models.clip import CLIPTextConfig
from jaxpref.models.sd3.transformer import SD3TransformerConfig
from jaxpref.models.t5 import T5Config
from jaxpref.models.vae import VAEConfig

# The schedule of all published models: rectified flow with a static shift.
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@dataclasses.dataclass(frozen=True)
class SD3Preset:
  """The architectures of one pipeline.

  Attributes:
    transformer: denoiser.
    vae: autoencoder.
    text_encoder, text_encoder_2: CLIP's text towers, both with a projection.
    text_encoder_3: T5, or None: its tokens are then zeros.
    scheduler: the dict of scheduler_config.json.
  """

  transformer: SD3TransformerConfig
  vae: VAEConfig
  text_encoder: CLIPTextConfig
  text_encoder_2: CLIPTextConfig
  text_encoder_3: T5Config | None = None
  scheduler: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SCHEDULER))


# google/t5-v1_1-xxl, the encoder of 4.8 billion parameters of all published models.
T5_XXL = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")


def _second_text_encoder(preset: presets.Preset) -> CLIPTextConfig:
  assert preset.text_encoder_2 is not None
  return preset.text_encoder_2


SD3_MEDIUM = SD3Preset(
  transformer=SD3TransformerConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
  ),
  vae=dataclasses.replace(
    presets.SD15.vae,
    sample_size=1024,
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
  ),
  text_encoder=presets.SDXL.text_encoder,
  text_encoder_2=_second_text_encoder(presets.SDXL),
  text_encoder_3=T5_XXL,
)
SD35_MEDIUM = dataclasses.replace(
  SD3_MEDIUM,
  transformer=dataclasses.replace(
    SD3_MEDIUM.transformer, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
  ),
)
SD35_LARGE = dataclasses.replace(
  SD3_MEDIUM,
  transformer=dataclasses.replace(
    SD3_MEDIUM.transformer,
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    qk_norm="rms_norm",
  ),
)


def _miniature(**fields: Any) -> SD3Preset:
  """Returns every kind of layer, in a size for tests: 16 x 16 pixels, and texts of the tokenizer of tiny-sd."""
  return SD3Preset(
    transformer=SD3TransformerConfig(
      sample_size=8,
      num_layers=4,
      attention_head_dim=8,
      num_attention_heads=3,
      in_channels=4,
      out_channels=4,
      joint_attention_dim=48,
      caption_projection_dim=24,
      pooled_projection_dim=16 + 24,
      pos_embed_max_size=12,
      **fields,
    ),
    vae=dataclasses.replace(
      presets.SD15_MINIATURE.vae,
      latent_channels=4,
      scaling_factor=1.5305,
      shift_factor=0.0609,
      use_quant_conv=False,
      use_post_quant_conv=False,
    ),
    text_encoder=presets.SDXL_MINIATURE.text_encoder,
    text_encoder_2=dataclasses.replace(_second_text_encoder(presets.SDXL_MINIATURE), projection_dim=24),
    text_encoder_3=T5Config(
      vocab_size=presets.TINY_VOCAB_SIZE,
      d_model=48,
      d_kv=8,
      d_ff=64,
      num_layers=2,
      num_heads=4,
      relative_attention_num_buckets=8,
      relative_attention_max_distance=16,
      feed_forward_proj="gated-gelu",
    ),
  )


SD3_MINIATURE = _miniature()
SD35_MINIATURE = _miniature(dual_attention_layers=(0, 1), qk_norm="rms_norm")

PRESETS: dict[str, SD3Preset] = {
  "sd3-medium": SD3_MEDIUM,
  "sd35-medium": SD35_MEDIUM,
  "sd35-large": SD35_LARGE,
  "sd3-miniature": SD3_MINIATURE,
  "sd35-miniature": SD35_MINIATURE,
}
