"""Starts a latent reward model from a text-to-image model."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.files import pipelines
from jaxpref.files.tensors import Tree
from jaxpref.models import latent_reward
from jaxpref.models.clip import init_std
from jaxpref.models.latent_reward import LatentRewardModel
from jaxpref.models.unet import encoder_params
from jaxpref.recipes.sizes import Size

NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # the networks it shares


def of_pipeline(
  pipe: Any, key: jax.Array, *, image_size: Size, guidance_scale: float, remat: str | tuple[str, ...] = "none"
) -> tuple[LatentRewardModel, Tree]:
  """Returns the latent reward model that starts as a Stable Diffusion model: its way down, middle and text encoders.

  The projections are random: of features normal with deviation 0.02, of text like a new CLIP's (SDXL's has its own).

  Args:
    pipe: has the parameters of NETWORKS, as far as it has these networks.
    key: PRNG key of the projections.
    image_size: the model's size of images, in pixels.
    guidance_scale, remat: settings of the latent reward model.

  Raises:
    ValueError: the pipeline belongs to another family.
  """
  if not isinstance(pipe, pipelines.Pipeline):
    raise ValueError(
      "a latent reward model can only be made of Stable Diffusion 1.x, 2.x and XL; expected "
      "config.family=stable_diffusion."
    )
  second = None if pipe.text_encoder_2 is None else pipe.text_encoder_2.config
  text = pipe.text_encoder.config
  config = latent_reward.of_networks(
    pipe.unet.config, text, second, image_size=image_size, guidance_scale=guidance_scale
  )
  module = LatentRewardModel(config, pipe.unet.dtype, remat)
  params = {name: pipe.params[name] for name in NETWORKS if name in pipe.params}
  params["unet"] = encoder_params(params["unet"])
  of_features, of_text = jax.random.split(key)
  normal = lambda key, width, std: {"kernel": std * jax.random.normal(key, (width, config.projection_dim))}
  channels = config.unet.block_out_channels
  params["visual_projection"] = normal(of_features, sum(channels) + channels[-1], latent_reward.VISUAL_STD)
  if second is None:
    params["text_projection"] = normal(of_text, text.hidden_size, init_std(text, "text_projection"))
  params["logit_scale"] = jnp.asarray(config.logit_scale_init_value, jnp.float32)
  return module, params
