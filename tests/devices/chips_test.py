"""What XLA is told about this machine's devices; the tables of chips are tested with what reads them."""

import jax
import jax.numpy as jnp
import pytest

from jaxpref.devices import chips

determine = chips.compiler_options.__wrapped__


def test_networks_on_a_cpu_are_compiled_without_ynnpack():
  def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  lowered = jax.jit(convolved).lower(jnp.ones((8, 8, 8, 64)), jnp.ones((3, 3, 64, 64)))
  text = lambda options: lowered.compile(options).as_text()
  assert "ynn_fusion" in text(None)  # else the option has become needless
  assert "ynn_fusion" not in text(chips.compiler_options())


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_other_devices_get_the_options_of_xla(backend, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert determine() is None


def test_a_compiler_without_the_option_is_not_told(monkeypatch):
  compile_ = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered, "compile", lambda self, options: compile_(self, {"xla_cpu_of_another_version": ""})
  )
  assert determine() is None
