"""Images to latents and back, through an autoencoder, as families of `models.base.Model` share it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.models.base import Weights
from jaxpref.models.vae import AutoencoderKL, scale_latents, to_float, unscale_latents
from jaxpref.recipes.sizes import Size, of_sides


class LatentSpace:
  """The functions of a `Model` that need only its autoencoder, `weights["vae"]`.

  Attributes:
    vae: the autoencoder.
    vae_slicing: images that it encodes or decodes at a time, on all devices together; None for the whole batch.
  """

  vae: AutoencoderKL
  vae_slicing: int | None

  @property
  def unit(self) -> int:
    """Pixels in a side of one latent."""
    return self.vae.config.downscale

  @property
  def image_size(self) -> Size:
    """Size of the images in pixels: the side of squares, or (height, width)."""
    height, width, _ = self.latent_shape
    return of_sides(height * self.unit, width * self.unit)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, C) of one sample's latents."""
    raise NotImplementedError

  def latent_shape_for(self, height: int, width: int) -> tuple[int, int, int]:
    """Returns (h, w, C) of the latents of images of another size in pixels than the model's own."""
    raise NotImplementedError

  def encode_images(self, weights: Weights, images: jax.Array, key: jax.Array) -> jax.Array:
    """Draws scaled latents f32[B,h,w,C] from the VAE's posterior of images [B,H,W,3], u8 or f32 in [-1, 1]."""
    return self.draw_latents(*self.encode_moments(weights, images), key)

  def encode_moments(self, weights: Weights, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log variance f32[B,h,w,C] of the VAE's posterior of images [B,H,W,3], u8 or f32 in [-1, 1]."""
    return self._vae("encode", weights, to_float(images))

  def draw_latents(self, mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
    """Draws scaled latents f32[B,h,w,C] from the posterior with these moments; needs no weights."""
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    return scale_latents(self.vae.config, z)

  def decode(self, weights: Weights, latents: jax.Array, *, size: int = 0) -> jax.Array:
    """Decodes scaled latents f32[B,h,w,C] to images f32[B,H,W,3], about [-1, 1].

    Args:
      size: the shorter side of smaller images, in pixels: the latents are shrunk first (linear, antialiased), so that
        the VAE computes (size / H)^2 as much. The result is close to the shrunk whole images, but not the same.
        0: the latents' own size.
    """
    if size:
      height, width = latents.shape[1:3]
      smaller = (size * height // min(height, width), size * width // min(height, width))
      shape = (latents.shape[0], *self.latent_shape_for(*smaller)[:2], latents.shape[3])
      latents = jax.image.resize(latents, shape, "linear")
    return self._vae("decode", weights, unscale_latents(self.vae.config, latents))

  def _vae(self, method: str, weights: Weights, x: jax.Array) -> Any:
    """Applies the VAE to x [B, ...], in equal slices of at most `vae_slicing` rows."""
    apply = functools.partial(self.vae.apply, {"params": weights["vae"]}, method=method)
    rows = x.shape[0] if self.vae_slicing is None else math.gcd(self.vae_slicing, x.shape[0])
    if rows == x.shape[0]:
      return apply(x)
    # Rows are taken with a stride, so each slice stays spread over all devices.
    slices = x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1)
    back = lambda y: y.swapaxes(0, 1).reshape(x.shape[0], *y.shape[2:])
    return jax.tree.map(back, jax.lax.map(apply, slices))
