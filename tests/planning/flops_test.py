"""The count of operations, against sums by hand and the compiler's count of a network without loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import attention, presets
from jaxpref.models.resnet import _conv
from jaxpref.models.sd3.presets import PRESETS as SD3_PRESETS
from jaxpref.models.sd3.transformer import SD3Transformer2DModel
from jaxpref.models.unet import UNet2DConditionModel
from jaxpref.models.vae import AutoencoderKL
from jaxpref.planning import flops

X = jax.ShapeDtypeStruct((5, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 8), jnp.float32)
PRODUCT = 2 * 5 * 16 * 8


def test_products_and_loops():
  product = lambda x, w: x @ w

  def scanned(x, w):
    return jax.lax.scan(lambda c, _: (c + (x @ w).sum(), None), 0.0, length=7)[0]

  def until(x, w):
    return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda i, c: c + (x @ w).sum(), 0.0)

  assert flops.count(product, X, W) == PRODUCT
  assert flops.count(jax.jit(product), X, W) == PRODUCT
  assert flops.count(jax.vmap(product, (0, None)), jax.ShapeDtypeStruct((3, 5, 16), jnp.float32), W) == 3 * PRODUCT
  assert flops.count(jax.grad(lambda w, x: (x @ w).sum()), W, X) == 2 * PRODUCT
  assert flops.count(scanned, X, W) == 7 * PRODUCT
  assert flops.count(until, X, W, while_trips=4.5) == 4.5 * PRODUCT
  assert flops.count(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((5, 8))), X, W) == PRODUCT


def test_operations_within_a_scope_are_counted_by_its_name():
  def named(name, x, w):
    with jax.named_scope(name):
      return jax.jit(lambda x: x @ w)(x).sum()

  def both(x, w):
    step = lambda c, _: (c + named("reward a", x, w) + (x @ w).sum(), None)
    once = jax.vmap(lambda row: named("reward a.b", row[None], w))(x).sum()
    return jax.lax.scan(step, 0.0, length=3)[0] + once

  assert flops.count(both, X, W) == 7 * PRODUCT
  assert flops.count(both, X, W, scope="reward a") == 3 * PRODUCT
  assert flops.count(both, X, W, scope="reward a.b") == PRODUCT
  assert flops.count(both, X, W, scope="reward") == 0


def test_what_is_computed_again_is_counted():
  loss = lambda w, x: (jnp.sin(x @ w) ** 2).sum()
  assert flops.count(jax.grad(loss), W, X) == 2 * PRODUCT
  assert flops.count(jax.grad(jax.checkpoint(loss)), W, X) == 3 * PRODUCT


@pytest.mark.parametrize(("stride", "pad"), [(1, (1, 1)), (2, (1, 1)), (2, (0, 1))])
def test_convolutions_and_their_gradients(stride, pad):
  x = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 6, 10), jnp.float32)
  forward = 2 * 2 * (8 // stride) ** 2 * 10 * 9 * 6
  assert flops.count(lambda x, k: _conv(x, k, stride, pad), x, kernel) == forward
  gradient = jax.grad(lambda x, k: _conv(x, k, stride, pad).sum(), argnums=(0, 1))
  assert flops.count(gradient, x, kernel) == 3 * forward


@pytest.mark.parametrize("name", ["sd15-miniature", "sdxl-miniature"])
def test_the_compiler_counts_the_same_in_a_network_without_loops(name):
  """Within what it counts beyond products, which is much in a network as small as this."""
  module = AutoencoderKL(presets.get_preset(name).vae)
  params = presets.abstract_params(module)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  apply = lambda p, x: module.apply({"params": p}, x)
  counted = flops.count(apply, params, images)
  theirs = jax.jit(apply).lower(params, images).cost_analysis()["flops"]
  assert counted <= theirs <= 1.3 * counted


def unet_of(config, size, pooled):
  """(function of a UNet, shapes of its arguments)."""
  module = UNet2DConditionModel(config)
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  added = {"text_embeds": shape(1, pooled), "time_ids": shape(1, 6)}
  inputs = shape(1, size, size, 4), shape(1), shape(1, 77, config.cross_attention_dim), added
  return lambda p, *a: module.apply({"params": p}, *a), (presets.abstract_params(module), *inputs)


def test_the_network_at_full_size(monkeypatch):
  """SDXL's UNet: 6.76 TFLOP at 1024 pixels."""
  monkeypatch.setattr(attention, "MAX_LOGITS", 2**62)
  apply, args = unet_of(presets.SDXL.unet, 128, 1280)
  np.testing.assert_allclose(flops.count(apply, *args), 6.76e12, rtol=1e-3)


@pytest.mark.parametrize(
  ("config", "size", "pooled"),
  [(presets.SDXL_MINIATURE.unet, 32, 16), pytest.param(presets.SDXL.unet, 128, 1280, marks=pytest.mark.slow)],
  ids=["miniature", "full size"],
)
def test_a_gradient_takes_twice_the_operations_again(config, size, pooled, monkeypatch):
  """Whether or not stacks are scanned."""
  monkeypatch.setattr(attention, "MAX_LOGITS", 2**62)
  apply, args = unet_of(config, size, pooled)
  gradient = flops.count(jax.grad(lambda *a: jnp.sum(apply(*a) ** 2)), *args)
  np.testing.assert_allclose(gradient, 3 * flops.count(apply, *args), rtol=1e-2)


def products_of_mmdit(c, size, text):
  """Operations of a forward pass on one sample of size x size latents and `text` tokens, by hand."""
  image, d = (size // c.patch_size) ** 2, c.width
  total = 0
  for i in range(c.num_layers):
    dual, last = i in c.dual_attention_layers, i == c.num_layers - 1
    total += image * (4 * d * d + 8 * d * d)  # queries, keys, values, output; feed-forward
    total += text * (3 * d * d if last else 4 * d * d + 8 * d * d)
    total += 2 * (image + text) ** 2 * d  # logits and weighted values
    total += (9 if dual else 6) * d * d + (2 if last else 6) * d * d  # modulations
    total += image * 4 * d * d + 2 * image**2 * d if dual else 0
  patch = c.patch_size**2 * c.in_channels
  total += image * (patch * d + d * patch) + text * c.joint_attention_dim * d
  total += (256 + c.pooled_projection_dim) * d + 2 * d * d + 2 * d * d  # time and pooled text; the last modulation
  return 2 * total


@pytest.mark.parametrize(
  ("name", "size", "text", "tflop"),
  [
    ("sd35-medium", 32, 333, 0.91),
    ("sd35-medium", 64, 333, 2.44),
    ("sd35-medium", 128, 333, 11.25),
    ("sd35-large", 128, 333, 31.1),
    ("sd35-miniature", 8, 32, None),
  ],
)
def test_the_transformer_of_stable_diffusion_3_is_counted_as_by_hand(name, size, text, tflop, monkeypatch):
  monkeypatch.setattr(attention, "MAX_LOGITS", 2**62)
  c = SD3_PRESETS[name].transformer
  module = SD3Transformer2DModel(c)
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  inputs = shape(1, size, size, c.in_channels), shape(1), shape(1, text, c.joint_attention_dim)
  args = (presets.abstract_params(module), *inputs, shape(1, c.pooled_projection_dim))
  counted = flops.count(lambda p, *a: module.apply({"params": p}, *a), *args)
  assert counted == products_of_mmdit(c, size, text)
  if tflop is not None:
    np.testing.assert_allclose(counted, tflop * 1e12, rtol=6e-3)
