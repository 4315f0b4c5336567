"""The VAE against diffusers', and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import presets
from jaxpref.models.sd3.presets import SD3_MEDIUM
from jaxpref.models.vae import AutoencoderKL, VAEConfig, scale_latents, to_float, unscale_latents

TOLERANCE = 1e-4

SD = VAEConfig(
  block_out_channels=(8, 16),
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
  layers_per_block=1,
  latent_channels=3,
  norm_num_groups=4,
)
BARE = VAEConfig(
  block_out_channels=(16, 8),
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
  layers_per_block=2,
  norm_num_groups=2,
  use_quant_conv=False,
  use_post_quant_conv=False,
  mid_block_add_attention=False,
)
# As in Stable Diffusion 3: 16 channels, scaled and shifted, without convolutions around the latents.
SD3 = dataclasses.replace(
  SD, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
)


@pytest.mark.parametrize(
  ("config", "height", "width"), [(SD, 9, 12), (BARE, 6, 4), (SD3, 6, 8)], ids=["sd-odd-size", "bare", "sd3"]
)
def test_the_vae_equals_diffusers(config, height, width):
  diffusers = pytest.importorskip("diffusers")
  import torch

  from tests.models import torch_parity

  original = diffusers.AutoencoderKL.from_config(config.to_dict())
  model = AutoencoderKL(config)
  rng = np.random.default_rng(0)
  inputs = {
    "image": rng.normal(size=(2, height, width, 3)).astype(np.float32),
    "latents": rng.normal(size=(2, 3, 4, config.latent_channels)).astype(np.float32),
  }

  # Both directions in one compilation: their outputs side by side.
  def torch_apply(image, latents):
    posterior = original.encode(image.permute(0, 3, 1, 2)).latent_dist
    decoded = original.decode(latents.permute(0, 3, 1, 2)).sample
    parts = [posterior.mean, posterior.logvar, decoded]
    return torch.cat([part.permute(0, 2, 3, 1).flatten() for part in parts])

  def flax_apply(params, image, latents):
    mean, logvar = model.apply({"params": params}, image, method="encode")
    decoded = model.apply({"params": params}, latents, method="decode")
    return jnp.concatenate([mean.ravel(), logvar.ravel(), decoded.ravel()])

  def init(image, latents):
    return model.init(jax.random.key(0), image)

  errors = torch_parity.compare(original, torch_apply, init, flax_apply, inputs, {})
  print(errors)
  assert max(errors.values()) < TOLERANCE, errors


def test_variance_is_clamped_as_in_diffusers():
  model = AutoencoderKL(BARE)
  image = jnp.zeros((1, 2, 2, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  bias = jnp.array([5.0, -5.0, 99.0, -99.0] * 2)  # of the mean, then of the logarithm
  params["encoder"]["conv_out"]["bias"] = bias
  encode = jax.jit(lambda params, image: model.apply({"params": params}, image, method="encode"))
  mean, logvar = encode(params, image)
  np.testing.assert_allclose(mean[0, 0, 0], [5, -5, 99, -99])
  np.testing.assert_allclose(logvar[0, 0, 0], [5, -5, 20, -30])


def test_scaling_of_latents():
  config = VAEConfig(scaling_factor=0.5, shift_factor=1.0)
  z = jnp.array([3.0, -1.0])
  np.testing.assert_allclose(scale_latents(config, z), [1.0, -1.0])  # (z - shift) * scale
  np.testing.assert_allclose(unscale_latents(config, scale_latents(config, z)), z)


def test_the_vae_of_stable_diffusion_3_has_its_number_of_parameters():
  assert presets.count_params(AutoencoderKL(SD3_MEDIUM.vae)) == 83_819_683


def test_config_round_trip():
  assert VAEConfig.from_dict(SD.to_dict()) == SD
  assert SD.downscale == 2


def test_the_vae_raises_for_configs_and_inputs_that_do_not_fit():
  with pytest.raises(ValueError, match="latents_mean.*not implemented"):
    VAEConfig.from_dict({"latents_mean": [0.0] * 4})
  with pytest.raises(ValueError, match="up_block_types.*expected 2 times UpDecoderBlock2D"):
    VAEConfig(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2)
  with pytest.raises(ValueError, match=r"image of the shape \(1, 3, 8, 8\).*channels last"):
    AutoencoderKL(BARE).init(jax.random.key(0), jnp.zeros((1, 3, 8, 8)))


def test_bytes_become_the_floats_that_numpy_makes_of_them():
  levels = np.arange(256, dtype=np.uint8)
  expected = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
  np.testing.assert_array_equal(jax.jit(to_float)(levels), expected)
  np.testing.assert_array_equal(to_float(jnp.asarray(expected)), expected)
