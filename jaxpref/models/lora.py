"""Low-rank adapters (LoRA, arXiv 2106.09685) by interception: no network knows about them.

An adapter is a nested dict that mirrors the parameters of the linear layers it attaches to, with
`{"lora_A": [in, r], "lora_B": [r, out]}` instead of `{"kernel", "bias"}`:

    adapter = lora.init_lora(key, unet_params, rank=4)
    pred = lora.apply(unet, unet_params, adapter, ..., scale=alpha / rank)  # each target: y + scale x A B
    merged = lora.merge_lora(unet_params, adapter, scale)                   # the same function without adapter

Linear layers are dense layers and 1x1 convolutions, such as `proj_in` and `proj_out` of SD1.5's transformers. The
factors have the leading axes of the kernel: [1, 1, in, r] and [1, 1, r, out] for a 1x1 convolution, [n, in, r] and
[n, r, out] for a scanned stack of n dense layers.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpref.models.resnet import flat_dot_general
from jaxpref.models.stacks import is_stacked, layer_path
from jaxpref.recipes.messages import listed

Tree = Mapping[str, Any]

# The attention projections of a diffusers UNet, which SPO, Diffusion-DPO with LoRA and PEFT adapt.
ATTENTION_TARGETS = r"(to_q|to_k|to_v|to_out\.0)$"
INITS = ("kaiming", "gaussian")


def linear_layers(params: Tree) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the path of each dense layer and 1x1 convolution in a parameter tree with the shape of its kernel.

  The shape is (in, out), (n, in, out) in a stack, or (1, 1, in, out).
  """
  found = {}

  def walk(tree: Tree, path: tuple[str, ...]) -> None:
    for name, value in tree.items():
      if isinstance(value, Mapping):
        walk(value, (*path, name))
      elif name == "kernel" and tuple(value.shape[is_stacked(path) : -2]) in ((), (1, 1)):
        found[path] = tuple(value.shape)

  walk(params, ())
  return found


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def _lookup(tree: Any, path: tuple[str, ...]) -> Any:
  for name in path:
    if not isinstance(tree, Mapping) or name not in tree:
      return None
    tree = tree[name]
  return tree


def adapted_paths(adapter: Tree) -> list[tuple[str, ...]]:
  """Returns the paths of the layers that an adapter changes."""
  found = []

  def walk(tree: Tree, path: tuple[str, ...]) -> None:
    if "lora_A" in tree:
      found.append(path)
    else:
      for name, value in tree.items():
        walk(value, (*path, name))

  walk(adapter, ())
  return found


def init_lora(
  key: jax.Array,
  params: Tree,
  *,
  rank: int,
  targets: str = ATTENTION_TARGETS,
  init: str = "kaiming",
  dtype: Any = jnp.float32,
) -> dict[str, Any]:
  """Returns a fresh adapter: A random as in PEFT, B zero, so A B = 0.

  Args:
    key: PRNG key; each layer folds in the hash of its own name, so its factor does not depend on
      which other layers are adapted.
    params: parameters (or their ShapeDtypeStructs) of the network, a nested dict.
    rank: r, at least 1.
    targets: regular expression searched in the dotted name of each linear layer, e.g.
      "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"; the layers of a stack share one name, without
      number or with a range ("transformer_blocks.0-12.attn.to_q"), and are adapted together.
    init: how A starts: "kaiming", uniform in +-1/sqrt(in) (PEFT's default, kaiming with a = sqrt 5); or "gaussian",
      normal with standard deviation 1/rank (its init_lora_weights="gaussian"), about ten times as large at rank 4.
    dtype: dtype of the factors.

  Returns:
    A nested dict with `lora_A` [..., in, r] and `lora_B` zeros [..., r, out].

  Raises:
    ValueError: `rank` is below 1 or above the smaller side of a layer, `init` is unknown, or no linear layer matches
      `targets`.
  """
  if rank < 1:
    raise ValueError(f"LoRA: rank is {rank}, expected at least 1; set e.g. rank=4.")
  if init not in INITS:
    raise ValueError(f"LoRA: init is {init!r}, expected one of {', '.join(INITS)}.")
  layers = linear_layers(params)
  adapted = {path: shape for path, shape in layers.items() if re.search(targets, ".".join(path))}
  check_rank(rank, adapted)
  adapter: dict[str, Any] = {}
  for path, (*leading, fan_in, fan_out) in adapted.items():
    bound = fan_in**-0.5

    def factor(path):
      layer_key = jax.random.fold_in(key, zlib.crc32(".".join(path).encode()))
      if init == "gaussian":
        return jax.random.normal(layer_key, (fan_in, rank), dtype) / rank  # noqa: B023 (called below)
      return jax.random.uniform(layer_key, (fan_in, rank), dtype, -bound, bound)  # noqa: B023

    a = jnp.stack([factor(layer_path(path, i)) for i in range(leading[0])]) if is_stacked(path) else factor(path)
    factors = {"lora_A": a.reshape(*leading, fan_in, rank), "lora_B": jnp.zeros((*leading, rank, fan_out), dtype)}
    _insert(adapter, path, factors)
  if not adapter:
    names = sorted({".".join(path[-2:]) for path in layers})
    raise ValueError(
      f"LoRA: targets {targets!r} matches none of the {len(layers)} linear layers; expected a "
      f"regular expression that finds names such as {', '.join(names[:8]) or '(there are none)'}."
    )
  return adapter


def check_rank(rank: int, layers: Mapping[tuple[str, ...], tuple[int, ...]]) -> None:
  """Raises `RankError` if the rank exceeds the smaller side of one of `linear_layers`."""
  narrow = {path: shape[-2:] for path, shape in layers.items() if min(shape[-2:]) < rank}
  if narrow:
    path, (fan_in, fan_out) = min(narrow.items(), key=lambda item: min(item[1]))
    raise RankError(
      f"LoRA: rank is {rank}, expected at most {min(fan_in, fan_out)}, the smaller side of {'.'.join(path)} "
      f"({fan_in} x {fan_out}): a higher rank only costs more; {len(narrow)} of the {len(layers)} adapted "
      "layers are narrower than the rank; set a lower rank."
    )


class RankError(ValueError):
  """Raised if a rank exceeds what a layer can have."""


def apply(
  module: nn.Module, params: Tree, adapter: Tree, *args: Any, scale: float | jax.Array = 1.0, **kwargs: Any
) -> Any:
  """Returns `module.apply` with `scale * x A B` added to the output of each adapted `nn.Dense` or 1x1 `nn.Conv`.

  Works under jit, grad, remat, scan and vmap.

  Args:
    module: the network.
    params: its parameters.
    adapter: adapter for these parameters, as `init_lora` returns it.
    *args: arguments of the network.
    scale: alpha / rank.
    **kwargs: keyword arguments of the network.

  Raises:
    ValueError: a layer of the adapter was never applied, and so had no effect.
  """
  pending = set(adapted_paths(adapter))

  def add_lora(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    layer = context.module
    linear = context.method_name == "__call__" and isinstance(layer, nn.Dense | nn.Conv)
    if not linear or not layer.has_variable("lora", "lora_A"):
      return y
    pending.discard(layer.path)
    a, b = (layer.get_variable("lora", name).astype(y.dtype) for name in ("lora_A", "lora_B"))
    a, b = a.reshape(a.shape[-2:]), b.reshape(b.shape[-2:])  # drops the axes of a 1x1 convolution
    merge = (((args[0].ndim - 1,), (0,)), ((), ()))
    x = flat_dot_general(flat_dot_general(args[0].astype(y.dtype), a, merge), b, merge)
    return y + jnp.asarray(scale, y.dtype) * x

  with nn.intercept_methods(add_lora):
    out = module.apply({"params": params, "lora": adapter}, *args, **kwargs)
  if pending:
    names = sorted(".".join(path) for path in pending)
    raise ValueError(
      f"LoRA: {len(names)} adapted layers were never applied ({listed(names)}), "
      "expected the network the adapter was made for."
    )
  return out


def merge_lora(params: Tree, adapter: Tree, scale: float | jax.Array = 1.0) -> dict[str, Any]:
  """Returns parameters with the adapter folded in: kernel + scale A B, summed in float32.

  Args:
    params: parameters of the network.
    adapter: as `init_lora` returns it.
    scale: alpha / rank, as for `apply`.

  Returns:
    A new tree with the structure and dtypes of `params`; leaves without an adapter are shared.

  Raises:
    ValueError: the adapter has a layer that `params` lacks, or one with other features.
  """
  layers = linear_layers(params)
  for path in adapted_paths(adapter):
    factors = _lookup(adapter, path)
    shape = (*factors["lora_A"].shape[:-1], factors["lora_B"].shape[-1])
    if layers.get(path) != shape:
      raise ValueError(
        f"LoRA: the adapter has a layer {'.'.join(path)} of shape {shape}, the network has "
        f"{layers.get(path) or 'none of this name'}; use the adapter with the network it was "
        "made for."
      )

  def merge(tree: Tree, factors: Any) -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
      if isinstance(value, Mapping):
        out[name] = merge(value, factors.get(name, {}))
      elif name == "kernel" and "lora_A" in factors:
        a, b = (factors[f].astype(jnp.float32) for f in ("lora_A", "lora_B"))
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        out[name] = (value.astype(jnp.float32) + scale * delta).astype(value.dtype)
      else:
        out[name] = value
    return out

  return merge(params, adapter)


def combine(adapters: Sequence[tuple[Tree, float]], params: Tree) -> dict[str, Any]:
  """Returns one adapter that does, with scale 1, what several do together: its product is the sum of scale A B.

  Its rank is the sum of theirs; factors stand side by side, with zeros where an adapter leaves a layer out.

  Args:
    adapters: (adapter, its scale alpha / rank), each with one rank.
    params: parameters (or their ShapeDtypeStructs) of the network that they adapt.

  Raises:
    ValueError: see `from_layers`.
  """
  layers: dict[str, tuple[jax.Array, jax.Array]] = {}
  found = [(to_layers(adapter), scale) for adapter, scale in adapters]
  ranks = [max((a.shape[-1] for a, _ in each.values()), default=0) for each, _ in found]
  for name in dict.fromkeys(name for each, _ in found for name in each):
    a, b = next(each[name] for each, _ in found if name in each)
    parts = [
      (each[name][0], scale * each[name][1])
      if name in each
      else (jnp.zeros((*a.shape[:-1], rank)), jnp.zeros((*b.shape[:-2], rank, b.shape[-1])))
      for (each, scale), rank in zip(found, ranks, strict=True)
    ]
    layers[name] = (jnp.concatenate([p[0] for p in parts], axis=-1), jnp.concatenate([p[1] for p in parts], axis=-2))
  return from_layers(layers, params)


def to_layers(adapter: Tree) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns an adapter as one entry per layer, under the layer's name in a diffusers folder.

  Returns:
    dotted name, such as "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" -> (lora_A [in, r],
    lora_B [r, out]), or (lora_A [1, 1, in, r], lora_B [1, 1, r, out]) for a 1x1 convolution.
  """
  layers: dict[str, tuple[jax.Array, jax.Array]] = {}
  for path in adapted_paths(adapter):
    factors = _lookup(adapter, path)
    a, b = factors["lora_A"], factors["lora_B"]
    if is_stacked(path):
      layers |= {".".join(layer_path(path, i)): (a[i], b[i]) for i in range(a.shape[0])}
    else:
      layers[".".join(path)] = (a, b)
  return layers


def from_layers(layers: Mapping[str, tuple[Any, Any]], params: Tree) -> dict[str, Any]:
  """Returns the inverse of `to_layers`.

  If only some layers of a stack are adapted, the others get lora_A = 0 and lora_B = 0. They keep their function, even
  in training, as each factor's gradient is a product with the other.

  Args:
    layers: dotted name -> (lora_A [in, r], lora_B [r, out]), with one rank within a stack; for a 1x1 convolution also
      with the leading axes [1, 1].
    params: parameters (or their ShapeDtypeStructs) of the network that the adapter is for.

  Raises:
    ValueError: lists layers that `params` lacks or that have other features.
  """
  adapter: dict[str, Any] = {}
  unknown, problems = dict(layers), []
  for path, (*leading, fan_in, fan_out) in linear_layers(params).items():
    names = [".".join(layer_path(path, i)) for i in range(leading[0])] if is_stacked(path) else [".".join(path)]
    found = {name: unknown.pop(name) for name in names if name in unknown}
    if not found:
      continue
    features = {(a.shape[-2], b.shape[-1]) for a, b in found.values()}
    ranks = {a.shape[-1] for a, _ in found.values()}
    if features != {(fan_in, fan_out)}:
      shapes = " or ".join(f"{i} x {o}" for i, o in sorted(features))
      problems.append(f"{next(iter(found))} has {shapes} features, expected {fan_in} x {fan_out}")
    elif len(ranks) > 1:
      problems.append(f"{'.'.join(path)} has layers of the ranks {sorted(ranks)}, expected one")
    else:
      zero = tuple(map(jnp.zeros_like, next(iter(found.values()))))
      a, b = (jnp.stack(f) for f in zip(*(found.get(name, zero) for name in names), strict=True))
      factors = {"lora_A": a.reshape(*leading, fan_in, *ranks), "lora_B": b.reshape(*leading, *ranks, fan_out)}
      _insert(adapter, path, factors)
  problems = [f"{name} is not a linear layer of the network" for name in unknown] + problems
  if problems:
    raise ValueError(f"LoRA for another network: {listed(problems)}; use the network it was made for.")
  return adapter
