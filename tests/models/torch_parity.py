"""Compares a Flax network with its PyTorch original, forward and gradients, with the same weights.

The conversion is independent of `jaxpref.files.pipelines`: it walks the Flax tree and takes each tensor by
its name, so that a network whose names or shapes deviate cannot pass.
"""

import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from jaxpref.files.tensors import load_tree

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _to_flax_layout(leaf: str, tensor: np.ndarray) -> np.ndarray:
  if leaf == "kernel":
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
  return tensor


def to_flax(tensors: Mapping[str, np.ndarray], shapes: Any) -> dict[str, Any]:
  """The tree like `shapes` made of torch tensors; asserts that names and shapes agree."""
  left_over = set(tensors)

  def read(modules, leaf):
    name = ".".join([*modules, LEAF_NAMES[leaf]])
    assert name in left_over, f"torch has no {name}"
    left_over.discard(name)
    return _to_flax_layout(leaf, tensors[name])

  def convert(path, shape):
    *modules, leaf = (key.key for key in path)
    if "transformer_blocks" in modules:  # scanned: a leading axis of blocks
      at = modules.index("transformer_blocks")
      blocks = range(shape.shape[0])
      array = np.stack([read([*modules[:at], f"{modules[at]}.{i}", *modules[at + 1 :]], leaf) for i in blocks])
    else:
      array = read(modules, leaf)
    assert array.shape == shape.shape, f"{path}: {array.shape} in torch, {shape.shape} in flax"
    return array

  tree = jax.tree_util.tree_map_with_path(convert, shapes)
  assert not left_over, f"flax has no {sorted(left_over)}"
  return tree


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
  """Redraws every parameter, biases and norms included: at 0 and 1 they would hide errors.

  What the layers add to the residual stream is made small, so that a wrong epsilon in a
  normalisation shows.
  """
  writes_to_stream = ("conv", "proj_in", "proj_out", "to_out", "net.2")
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if "norm" in name and parameter.ndim == 1:
        parameter.add_(0.3 * noise)
        continue
      gain = 0.1 if any(part in name for part in writes_to_stream) else 1.0
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
      parameter.copy_(gain * noise / fan_in**0.5)


def through_files(tensors: Mapping[str, np.ndarray], shapes: Any) -> dict[str, Any]:
  """The tree like `shapes` that `jaxpref.files` reads from a file of these torch tensors."""
  import safetensors.numpy

  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "model.safetensors"
    safetensors.numpy.save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, file)
    return load_tree(file, shapes)


def _squares(array: Any) -> float:
  """The sum of squares, in float64."""
  return float(np.sum(np.square(np.asarray(array), dtype=np.float64)))


def relative_error(found: Any, expected: Any) -> float:
  """||found - expected|| / ||expected||, in float64."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape, f"{found.shape} against {expected.shape}"
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def compare(
  torch_model: torch.nn.Module,
  torch_apply: Callable[..., torch.Tensor],
  init: Callable[..., Any],
  apply: Callable[..., jax.Array],
  inputs: Mapping[str, np.ndarray],
  constants: Mapping[str, np.ndarray],
  carry: Callable[[Mapping[str, np.ndarray], Any], Any] = to_flax,
) -> dict[str, float]:
  """Runs both networks, NHWC, and the gradient of sum(output * random).

  Args:
    torch_model: the original, in any mode.
    torch_apply: (**inputs, **constants) -> its output, both in the layout of Flax.
    init: (**inputs, **constants) -> the Flax variables (only shapes are used).
    apply: (params, **inputs, **constants) -> output.
    inputs: float32 arrays, differentiated.
    constants: arrays that are not.
    carry: (torch tensors, shapes) -> the tree like `shapes` made of them.

  Returns:
    relative errors: "output", "d <input>" for each input, "d params" of all parameters as one
    vector, "d <path>" of the worst parameter array, relative to the larger of its norm and 1 % of
    the typical one (gradients that vanish in theory, as that of the bias of a key, are only noise).
  """
  randomise(torch_model)
  shapes = jax.eval_shape(lambda: init(**inputs, **constants))["params"]

  torch_inputs = {key: torch.tensor(value, requires_grad=True) for key, value in inputs.items()}
  torch_constants = {key: torch.tensor(value) for key, value in constants.items()}
  expected = torch_apply(**torch_inputs, **torch_constants)
  weight = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
  (expected * torch.tensor(weight)).sum().backward()
  named = dict(torch_model.named_parameters())
  assert all(p.grad is not None for p in named.values()), "a parameter has no gradient in torch"
  params = carry({key: p.detach().numpy() for key, p in named.items()}, shapes)
  expected_grads = carry({key: p.grad.numpy() for key, p in named.items()}, shapes)

  def scalar(params, inputs):
    output = apply(params, **inputs, **constants)
    return (output * weight).sum(), output

  step = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
  (_, output), (grads, input_grads) = step(params, dict(inputs))

  errors = {"output": relative_error(output, expected.detach())}
  for key, tensor in torch_inputs.items():
    errors[f"d {key}"] = relative_error(input_grads[key], tensor.grad)
  paths = [".".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(grads)]
  pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True))
  squares = [(_squares(found - expected), _squares(expected)) for found, expected in pairs]
  errors["d params"] = float(np.sqrt(sum(error for error, _ in squares) / sum(norm for _, norm in squares)))
  norms = [float(np.linalg.norm(expected)) for _, expected in pairs]
  floor = 1e-2 * float(np.median(norms))
  by_path = {
    path: float(np.linalg.norm(found - expected)) / max(norm, floor)
    for path, (found, expected), norm in zip(paths, pairs, norms, strict=True)
  }
  worst = max(by_path, key=by_path.get)
  errors[f"d {worst}"] = by_path[worst]
  return errors
