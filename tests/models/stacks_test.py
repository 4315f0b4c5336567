"""Names of stacked layers."""

import pytest

from jaxpref.models.stacks import is_stacked, layer_path, stack_name


@pytest.mark.parametrize(
  ("path", "layer", "expected"),
  [
    (("mid", "transformer_blocks", "attn1"), 2, ("mid", "transformer_blocks.2", "attn1")),
    (("transformer_blocks.13-22", "attn"), 0, ("transformer_blocks.13", "attn")),
    (("transformer_blocks.13-22", "attn"), 9, ("transformer_blocks.22", "attn")),
    (("encoder", "block.0-0", "layer.0.SelfAttention"), 0, ("encoder", "block.0", "layer.0.SelfAttention")),
  ],
)
def test_a_layer_of_a_stack_has_its_number_in_the_name(path, layer, expected):
  assert is_stacked(path) and layer_path(path, layer) == expected


def test_other_modules_are_no_stacks():
  path = ("transformer_blocks.3", "ff", "net.0", "proj")
  assert not is_stacked(path) and layer_path(path, 1) == path
  assert is_stacked([stack_name("block", range(2, 5))])
