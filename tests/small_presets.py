"""Networks that compile fast, and random weights that are drawn once: compiling is most of the time of the tests."""

import dataclasses

import jax

from jaxpref.files import pipelines
from jaxpref.models import presets

_random_pipeline = pipelines.random_pipeline


def smaller(preset):
  """The miniature with one level and one layer of each kind (but SDXL's stack)."""
  depth = preset.unet.transformer_layers_per_block
  levels = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (16,),
    "attention_head_dim": (2,),
    "transformer_layers_per_block": (depth if isinstance(depth, int) else depth[-1],),
  }
  one = {"num_hidden_layers": 1}
  second, scorer = preset.text_encoder_2, preset.preference
  return dataclasses.replace(
    preset,
    unet=dataclasses.replace(preset.unet, sample_size=16, **levels),
    vae=dataclasses.replace(
      preset.vae,
      block_out_channels=(8,),
      down_block_types=("DownEncoderBlock2D",),
      up_block_types=("UpDecoderBlock2D",),
    ),
    text_encoder=dataclasses.replace(preset.text_encoder, **one),
    text_encoder_2=second and dataclasses.replace(second, **one),
    preference=dataclasses.replace(
      scorer,
      text_config=dataclasses.replace(scorer.text_config, **one),
      vision_config=dataclasses.replace(scorer.vision_config, **one),
    ),
  )


def with_one_attention(preset):
  """A preset of one level of which only the middle of the UNet sees the prompt."""
  blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
  return dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, **blocks))


_once: dict[tuple, pipelines.Pipeline] = {}  # by the text of a preset, which has no hash


def drawn(preset, seed=0, **options):
  """`pipelines.random_pipeline`, which draws each pipeline once; its arrays are copies, since training donates them."""
  preset = presets.get_preset(preset) if isinstance(preset, str) else preset
  key = repr(preset), seed, tuple(sorted(options.items()))
  if key not in _once:
    pipe = _random_pipeline(preset, seed, **options)
    _once[key] = dataclasses.replace(pipe, params=jax.device_get(pipe.params))
  pipe = _once[key]
  return dataclasses.replace(pipe, params=jax.tree.map(jax.numpy.array, pipe.params))
