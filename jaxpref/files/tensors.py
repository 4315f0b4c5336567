"""Parameter trees <-> safetensors files, under the names and layouts of diffusers and transformers.

The names in a file are the paths in the tree: `{"down_blocks.0": {"resnets.1": {"conv1":
{"kernel"}}}}` is `down_blocks.0.resnets.1.conv1.weight`. Convolution kernels are HWIO here and OIHW
in files, dense kernels [in, out] here and [out, in] there; `scale` of norms and `embedding` are
`weight` there. A scanned stack of equal layers is one module here, whose arrays have a leading axis
of layers: `{"transformer_blocks": {"norm1": {"scale": [depth, C]}}}` is
`transformer_blocks.0.norm1.weight`, `transformer_blocks.1.norm1.weight`, ... (see `models.stacks`).
Nothing else differs, so there are no tables. Tensors are read, converted, cast and placed one by
one, in small pieces and without mapping files into memory: the host holds one array (of all layers
of a stack), or the part of it that its devices take, never a whole model.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models.deduce import kind_of
from jaxpref.models.stacks import is_stacked, layer_path
from jaxpref.recipes.messages import SHOWN, listed, write_list

Path = str | os.PathLike[str]
Tree = dict[str, Any]
# One sharding for all arrays, or a function from the tree of ShapeDtypeStructs to one of shardings.
Sharding = jax.sharding.Sharding | Callable[[Tree], Any] | None

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
_STEMS = ("diffusion_pytorch_model", "model")
# Names that deprecated diffusers attention blocks (all published SD1.5 VAEs) use on disk, and
# buffers of old transformers files that are not parameters.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BUFFERS = re.compile(r"\.position_ids$")
# A second name of the same tensor, which some files hold instead or as well (T5's embedding).
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_PIECE = 2**20  # bytes to read at once
_SAMPLE = 256  # bytes of a fingerprint


@dataclasses.dataclass(frozen=True)
class Piece:
  """Where a tensor is in a file that has it under another name.

  Attributes:
    key: name of a tensor of the file.
    rows: begin and end of the rows to take; None: all.
    transposed: whether the tensor is the transpose of a matrix of the file.
  """

  key: str
  rows: tuple[int, int] | None = None
  transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
  """One network of a safetensors file, under the names of diffusers and transformers.

  Attributes:
    file: the file, which may hold more.
    what: name of the network, such as "its VAE".
    described: what gives the shapes of its tensors, for messages.
    remedy: what to do if they differ, for messages.
    pieces: pieces by name.
  """

  file: pathlib.Path
  what: str
  described: str
  remedy: str
  pieces: Mapping[str, Piece] = dataclasses.field(repr=False)

  def __str__(self) -> str:
    return f"{self.file} ({self.what})"


Source = pathlib.Path | Part


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One tensor of a file: the path of its array here, its name and shape there.

  Attributes:
    path: path of the array.
    layer: its row in the array of a stack; None outside stacks.
    key, shape: name and shape in the file.
  """

  path: tuple[str, ...]
  layer: int | None
  key: str
  shape: tuple[int, ...]

  def flax_shape(self) -> tuple[int, ...]:
    s = self.shape
    if self.path[-1] == "kernel":
      return (s[2], s[3], s[1], s[0]) if len(s) == 4 else s[::-1]
    return s

  def to_torch(self, array: np.ndarray) -> np.ndarray:
    if self.path[-1] == "kernel":
      return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


class MisfitError(ValueError):
  """Raised if files do not hold the expected tensors.

  Attributes:
    files: files of the network.
    problems: the cause if it is known, and the first names that do not fit.
    found: {name: shape} in the files.
  """

  def __init__(self, files: Sequence[Source], problems: str, found: Mapping[str, tuple[int, ...]]):
    described, remedy = "its config.json", "take weights and config.json from the same model"
    if isinstance(files[0], Part):
      described, remedy = files[0].described, files[0].remedy
    super().__init__(f"{_where(files)} does not hold the tensors that {described} describes: {problems}; {remedy}.")
    self.files, self.problems, self.found = files, problems, dict(found)


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, name))
    else:
      yield (*path, name), value


def _insert(tree: Tree, path: tuple[str, ...], value: Any) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def torch_name(path: Sequence[str]) -> str:
  """Returns the name in a safetensors file of the parameter at `path` (in a stack: see `layer_path`)."""
  leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(path[-1], path[-1])
  return ".".join((*path[:-1], leaf))


def _entries(shapes: Mapping[str, Any]) -> dict[str, _Entry]:
  """Returns the tensors by name in the file; the layers of a stack are neighbours, in order."""
  entries = {}
  for path, leaf in _leaves(shapes):
    shape = tuple(leaf.shape)
    layers: Sequence[int | None] = [None]
    if is_stacked(path):
      layers, shape = range(shape[0]), shape[1:]
    if path[-1] == "kernel":
      shape = (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
    for layer in layers:
      key = torch_name(path if layer is None else layer_path(path, layer))
      entries[key] = _Entry(path, layer, key, shape)
  return entries


def _modern_names(key: str) -> Iterator[str]:
  """Yields names that an expected parameter may have instead of `key` in files of other versions."""
  # transformers 5 writes CLIPTextModel and CLIPVisionModel without the tower's name.
  yield f"text_model.{key}"
  yield f"vision_model.{key}"
  # A step-aware preference model saved as an attribute of its trainer.
  yield key.removeprefix("model.")
  if key in _TIED:
    yield _TIED[key]
  *modules, name, leaf = f".{key}".split(".")
  if name in _OLD_ATTENTION:
    yield ".".join((*modules, _OLD_ATTENTION[name], leaf)).lstrip(".")


def _shards(index: pathlib.Path) -> list[str]:
  """Returns the names of the files that an index lists."""
  try:
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    outside = [shard for shard in shards if pathlib.PurePosixPath(shard).name != shard or not shard.strip(".")]
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(
      f"{index} is not an index of shards ({type(e).__name__}: {e}), expected JSON with a weight_map; "
      "download the folder again."
    ) from e
  if outside:
    raise ValueError(
      f"{index} names shards outside of its folder ({listed(outside)}), expected names of files beside it; "
      "do not use this folder."
    )
  return shards


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the safetensors files of one component folder: one file, or the shards of an index."""
  for stem in _STEMS:
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
      if (folder / name).is_file():
        return [folder / name]
      for index in (f"{name}.index.json", f"{stem}.safetensors.index.fp16.json"):
        if (".fp16." in name or "fp16" not in index) and (folder / index).is_file():
          shards = _shards(folder / index)
          missing = [shard for shard in shards if not (folder / shard).is_file()]
          if missing:
            raise FileNotFoundError(
              f"{folder / index} names shards that do not exist ({listed(missing)}); download the folder again."
            )
          return [folder / shard for shard in shards]
  pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
  if pickles:
    raise ValueError(
      f"{folder} has its weights only as {listed(pickles)}, expected "
      f"{_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors; pickles can run code and are not "
      "loaded: save the model again with safe_serialization=True."
    )
  raise FileNotFoundError(
    f"{folder} has no weights, expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors; download the folder again."
  )


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a file: where its bytes begin and their type (such as "F16")."""

  file: BinaryIO
  offset: int
  dtype: str
  shape: tuple[int, ...]
  transposed: bool = False

  @property
  def itemsize(self) -> int:
    return np.dtype(_DTYPES.get(self.dtype, np.uint8)).itemsize

  def piece(self, piece: Piece) -> "_Stored":
    """Returns rows of this tensor, or its transpose."""
    offset, shape = self.offset, self.shape
    if piece.rows is not None:
      offset += piece.rows[0] * int(np.prod(shape[1:])) * self.itemsize
      shape = (piece.rows[1] - piece.rows[0], *shape[1:])
    shape = shape[::-1] if piece.transposed else shape
    return dataclasses.replace(self, offset=offset, shape=shape, transposed=piece.transposed)

  def read(self, shape: tuple[int, ...], index: tuple[slice, ...], out: np.ndarray) -> None:
    """Reads self.reshape(shape)[index] into out, cast, by plain reads of the rows it needs.

    (Pages of a memory map would count as memory of this process until the file is closed.)

    Args:
      shape: its own, or one with the same rows: a dense layer's if the file has a 1x1 convolution's.
      index: a slice with start and stop for each axis.
      out: array of the result's shape.
    """
    if not shape:
      shape, index, out = (1,), (slice(0, 1),), out.reshape(1)
    if self.transposed:
      shape, index, out = shape[::-1], index[::-1], out.T
    dtype = np.dtype(_DTYPES[self.dtype])
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    step = max(1, _PIECE // max(1, row_bytes))
    for start in range(index[0].start, index[0].stop, step):
      stop = min(start + step, index[0].stop)
      self.file.seek(self.offset + start * row_bytes)
      rows = np.frombuffer(self.file.read((stop - start) * row_bytes), dtype).reshape(-1, *shape[1:])
      out[start - index[0].start : stop - index[0].start] = rows[:, *index[1:]]


@contextlib.contextmanager
def _open(files: Sequence[Source]) -> Iterator[dict[str, _Stored]]:
  """Opens files as {name: tensor}; reads headers only."""
  import safetensors

  with contextlib.ExitStack() as stack:
    tensors: dict[str, _Stored] = {}
    for source in files:
      file = source.file if isinstance(source, Part) else source
      if file.suffix != ".safetensors":
        raise ValueError(
          f"{file} is not a .safetensors file, the only supported format (pickles can run "
          "code); convert it with safetensors.torch.save_file."
        )
      try:
        with safetensors.safe_open(file, framework="numpy"):
          pass  # the library has checked the header against the file
      except safetensors.SafetensorError as e:
        raise ValueError(f"{file} is not a readable safetensors file ({e}); download or write it again.") from e
      handle = stack.enter_context(open(file, "rb"))
      start = 8 + int.from_bytes(handle.read(8), "little")
      held = {
        key: _Stored(handle, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for key, entry in json.loads(handle.read(start - 8)).items()
        if key != "__metadata__"
      }
      if isinstance(source, Part):
        held = {name: held[piece.key].piece(piece) for name, piece in source.pieces.items()}
      for key in held.keys() & tensors.keys():
        raise ValueError(
          f"{file} holds {key}, which {tensors[key].file.name} holds too, expected each tensor "
          "once; download the folder again."
        )
      tensors |= held
    yield tensors


def read_shapes(file: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors of a safetensors file by name; reads its header only.

  Raises:
    ValueError: it is not a safetensors file, or is cut off.
  """
  with _open([file]) as tensors:
    return {key: tensor.shape for key, tensor in tensors.items()}


def fingerprint(files: Sequence[Source]) -> str:
  """Returns a cheap fingerprint of the tensors of safetensors files: their names, types, shapes and some bytes of each.

  Training or converting a network changes it; splitting its files does not.

  Raises:
    ValueError: a file is not safetensors.
  """
  digest = hashlib.sha256()
  with _open(files) as tensors:
    for key in sorted(tensors):
      tensor = tensors[key]
      digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
      size = int(np.prod(tensor.shape)) * tensor.itemsize
      for place in (0, size // 2, size - _SAMPLE):
        tensor.file.seek(tensor.offset + max(0, place))
        digest.update(tensor.file.read(min(size, _SAMPLE)))
  return digest.hexdigest()[:16]


def _names(keys: Sequence[str]) -> str:
  return f"{len(keys)} ({listed(keys)})"


def _match(
  files: Sequence[Source], tensors: Mapping[str, _Stored], entries: Mapping[str, _Entry]
) -> dict[str, _Stored]:
  """Returns {expected name: tensor}; raises one ValueError on everything that does not fit, its cause first."""
  found = {key: tensor.shape for key, tensor in tensors.items()}
  names, unexpected = {key: key for key in found if key in entries}, []
  for key in found:
    if key not in entries and not _BUFFERS.search(f".{key}") and _TIED.get(key) not in names:
      modern = next((k for k in _modern_names(key) if k in entries and k not in names), None)
      if modern is None:
        unexpected.append(key)
      else:
        names[modern] = key
  missing = [key for key in entries if key not in names]

  def core(shape):  # a 1x1 convolution and a dense layer may replace each other
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape

  misshaped = [
    f"{key}: found {list(found[name])}, expected {list(entries[key].shape)}"
    for key, name in names.items()
    if core(found[name]) != core(entries[key].shape)
  ]
  lists = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
  problems = [f"{what} {_names(keys)}" for what, keys in lists.items() if keys]
  if problems:
    kind, expected = kind_of(found), kind_of(entries)
    cause = [f"they are those of {kind}, expected {expected}"] if kind and expected and kind != expected else []
    whole = [f"{write_list(lists)} lists them all"] if any(len(keys) > SHOWN for keys in lists.values()) else []
    raise MisfitError(files, "; ".join(cause + problems + whole), found)
  foreign = [f"{name} {tensors[name].dtype}" for name in names.values() if tensors[name].dtype not in _DTYPES]
  if foreign:
    raise ValueError(
      f"{_where(files)} holds numbers of types other than {', '.join(_DTYPES)}: {_names(foreign)}; use the model in "
      "half or single precision."
    )
  return {key: tensors[name] for key, name in names.items()}


def _read(
  index: tuple[slice, ...],
  layers: Sequence[_Entry],
  tensors: Mapping[str, _Stored],
  shape: tuple[int, ...],
  dtype: Any,
) -> np.ndarray:
  """Returns array[index] of the array of `shape` that `layers` (of a stack, or a single tensor) make up."""
  index = tuple(slice(*i.indices(size)[:2]) for i, size in zip(index, shape, strict=True))
  out = np.empty([i.stop - i.start for i in index], dtype)
  if layers[0].layer is None:
    parts = [(layers[0], out, index)]
  else:
    parts = list(zip(layers[index[0]], out, itertools.repeat(index[1:])))
  for entry, part, inner in parts:
    if entry.path[-1] == "kernel":  # as `to_torch`
      inner = (inner[3], inner[2], inner[0], inner[1]) if len(inner) == 4 else inner[::-1]
    tensors[entry.key].read(entry.shape, inner, entry.to_torch(part))
  return out


def check_tree(files: Sequence[Source], shapes: Mapping[str, Any]) -> None:
  """Raises what `load_tree` would raise about the tensors' names, shapes and types; reads headers only."""
  with _open(files) as found:
    _match(files, found, _entries(shapes))


def _where(files: Sequence[Source]) -> str:
  first = files[0]
  return str(first) if isinstance(first, Part) or len(files) == 1 else f"{first.parent} ({len(files)} shards)"


def load_tree(
  files: Path | Part | Sequence[Path | Part],
  shapes: Mapping[str, Any],
  *,
  param_dtype: Any = jnp.float32,
  sharding: Any = None,
) -> Tree:
  """Reads the parameters of one network, array by array.

  Each process reads only the parts of a spread array that its own devices take.

  Args:
    files: one safetensors file, all shards, or a part of a file.
    shapes: tree of arrays or ShapeDtypeStructs to fill, e.g. `presets.abstract_params(module)`.
    param_dtype: dtype of the arrays returned.
    sharding: None (default device), one Sharding, or a tree of them like `shapes`.

  Returns:
    A tree with the structure and shapes of `shapes`.

  Raises:
    MisfitError: the tensors do not match `shapes`; names what is missing, unexpected or mis-shaped, and the file with
      the whole list if it is long.
    ValueError: a file is not safetensors, or holds numbers that are not floating-point.
  """
  several = [files] if isinstance(files, str | os.PathLike | Part) else files
  paths = [f if isinstance(f, Part) else pathlib.Path(f) for f in several]
  entries = _entries(shapes)
  sharding = sharding(shapes) if callable(sharding) else sharding
  shardings = dict(_leaves(sharding)) if isinstance(sharding, Mapping) else None
  tree: Tree = {}
  with _open(paths) as found:
    tensors = _match(paths, found, entries)
    for path, group in itertools.groupby(entries.values(), key=lambda entry: entry.path):
      layers = list(group)
      stack = () if layers[0].layer is None else (len(layers),)
      shape = (*stack, *layers[0].flax_shape())
      pieces: dict[str, np.ndarray] = {}  # devices may share one

      def read(index, layers=layers, shape=shape, pieces=pieces):
        key = str(index)
        if key not in pieces:
          pieces[key] = _read(index, layers, tensors, shape, param_dtype if shape else np.float32)
        return pieces[key]

      target = shardings[path] if shardings is not None else sharding
      if target is None:
        array = jnp.asarray(read((slice(None),) * len(shape)))
      else:
        array = jax.make_array_from_callback(shape, target, read)
      # A pending transfer keeps the host's copy, so one array at a time.
      _insert(tree, path, array.block_until_ready())
  return tree


_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def save_tree(
  file: Path,
  params: Mapping[str, Any],
  *,
  dtype: Any = jnp.float32,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes the parameters of one network as safetensors, tensor by tensor.

  (safetensors' own save_file needs all tensors, and copies them once more.)

  Args:
    file: path to write; replaced at once when everything is on disk.
    params: nested dict of arrays that this process can read in full.
    dtype: dtype of the file: float32, float16 or bfloat16.
    metadata: more entries of the file's header.

  Raises:
    ValueError: a tensor holds NaN or infinity, or numbers too large for `dtype`.
  """
  file = pathlib.Path(file)
  dtype = np.dtype(dtype)
  if dtype.name not in _SAFETENSORS_DTYPES:
    raise ValueError(f"{file}: cannot be written as {dtype.name}, expected one of {', '.join(_SAFETENSORS_DTYPES)}.")
  entries = sorted(_entries(params).values(), key=lambda entry: entry.key)
  leaves = dict(_leaves(params))
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
  offset = 0
  for entry in entries:
    end = offset + int(np.prod(entry.shape)) * dtype.itemsize
    header[entry.key] = {
      "dtype": _SAFETENSORS_DTYPES[dtype.name],
      "shape": list(entry.shape),
      "data_offsets": [offset, end],
    }
    offset = end
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)
  partial = file.with_name(f".{file.name}.{os.getpid()}")
  try:
    with open(partial, "wb") as f:
      f.write(len(encoded).to_bytes(8, "little"))
      f.write(encoded)
      for entry in entries:
        leaf = leaves[entry.path]
        array = entry.to_torch(np.asarray(leaf if entry.layer is None else leaf[entry.layer]))
        with np.errstate(over="ignore"):
          cast = np.ascontiguousarray(array.astype(dtype))
        if not np.isfinite(cast.astype(np.float32)).all():
          finite = np.isfinite(array.astype(np.float32)).all()
          raise ValueError(
            f"{file}: {entry.key} holds "
            + (
              f"numbers too large for {dtype.name}; save as float32."
              if finite
              else "NaN or infinity, which is not saved; go back to an earlier checkpoint."
            )
          )
        f.write(cast.tobytes())
    os.replace(partial, file)
  finally:
    partial.unlink(missing_ok=True)
