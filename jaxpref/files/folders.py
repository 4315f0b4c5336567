"""Finds model folders, reads and writes their JSON files, and replaces an old folder by a new one."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import linen as nn

from jaxpref.files import hub
from jaxpref.files.tensors import PICKLES, MisfitError, Part, Path, Source, Tree, check_tree, load_tree, save_tree
from jaxpref.models.deduce import contradicted_fields
from jaxpref.recipes import places


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file of a model folder.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is not valid JSON, or no object.
  """
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"{file} is missing; point to a model folder in the layout of diffusers.") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"{file} is not valid JSON ({e}); download the folder again.") from e
  if not isinstance(found, dict):
    raise ValueError(f"{file} holds a {type(found).__name__}, expected a JSON object; download the folder again.")
  return found


def write_json(file: pathlib.Path, value: Any) -> None:
  """Writes a value as indented JSON."""
  file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def resolve_folder(name: Path, weights: str = "*.safetensors") -> pathlib.Path:
  """Returns a local model folder, downloaded if the name is one of the Hugging Face hub.

  Args:
    name: a folder, or "organisation/model" of the hub; see `hub.fetch`.
    weights: pattern of the weight files to fetch.

  Raises:
    FileNotFoundError: there is no such folder, and it cannot be downloaded.
  """
  folder = pathlib.Path(places.expand(os.fspath(name)))
  if folder.is_dir():
    return folder
  refuse_pickles(name)
  if folder.is_file():
    raise FileNotFoundError(
      f"{name} is a file, expected a model folder in the layout of diffusers; unpack or convert the checkpoint to one."
    )
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name)):
    raise FileNotFoundError(
      f"model folder {name} does not exist, expected a folder in the layout of diffusers or a "
      "hub name such as organisation/model; check the path."
    )
  return hub.fetch(str(name), weights)


def refuse_pickles(name: Path) -> None:
  """Raises for a name that is a pickle's, or that of a missing checkpoint file."""
  file = pathlib.Path(places.expand(os.fspath(name)))
  if file.suffix in (".safetensors", ".ckpt") and not file.exists():
    raise FileNotFoundError(f"there is no file {name}; check the path.")
  if file.suffix in PICKLES and file.is_file():
    raise ValueError(
      f"{name} is a pickle, which can run code and is never loaded; use the model as .safetensors, or convert one "
      "that you trust: diffusers' StableDiffusionPipeline.from_single_file, then save_pretrained."
    )


def check_network(module: nn.Module, files: Sequence[Source], shapes: Tree) -> None:
  """Raises what `load_network` would raise about the existing tensors; reads headers only."""
  with _naming_fields(module):
    check_tree(files, shapes)


@contextlib.contextmanager
def _naming_fields(module: nn.Module) -> Iterator[None]:
  """Adds to a MisfitError the fields of config.json that do not fit."""
  try:
    yield
  except MisfitError as e:
    fields = contradicted_fields(getattr(module, "config", None), e.found)
    if not fields:
      raise
    said = [f"{name} is {right} in the tensors, {wrong} in it" for name, (wrong, right) in fields.items()]
    raise MisfitError(e.files, f"{', '.join(said)}; {e.problems}", e.found) from None


def load_network(
  module: nn.Module, files: Sequence[Path | Part], shapes: Tree, param_dtype: Any, sharding: Any
) -> Tree:
  """Reads the parameters of a network with `load_tree`; an error names the fields of config.json that do not fit.

  Args:
    module: has a `config` read from config.json.
    files, shapes, param_dtype, sharding: see `load_tree`.

  Raises:
    MisfitError: the tensors do not match `shapes`.
  """
  with _naming_fields(module):
    return load_tree(files, shapes, param_dtype=param_dtype, sharding=sharding)


def save_network(folder: pathlib.Path, stem: str, config: Mapping[str, Any], params: Tree | None, dtype: Any) -> None:
  """Writes config.json and, unless the parameters are None, `stem`.safetensors into a new or empty folder."""
  folder.mkdir(exist_ok=True)
  write_json(folder / "config.json", config)
  if params is not None:
    save_tree(folder / f"{stem}.safetensors", params, dtype=dtype)


def check_replaceable(folder: Path, marker: str, known: Sequence[str]) -> None:
  """Raises FileExistsError for a folder that `replacing` would not replace."""
  folder = pathlib.Path(folder)
  if folder.exists():
    entries = {p.name for p in folder.iterdir()} if folder.is_dir() else {""}
    if marker not in entries and not entries <= set(known):
      raise FileExistsError(
        f"{folder} exists and is not a model folder (no {marker} in it), so it is not "
        "overwritten; choose a new folder or delete it."
      )


@contextlib.contextmanager
def replacing(folder: Path, marker: str, known: Sequence[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that replaces `folder` if the block succeeds.

  An existing `folder` must be empty, have `marker`, or hold only entries of `known`.
  """
  check_replaceable(folder, marker, known)
  folder = pathlib.Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    temporary.chmod(0o755)  # mkdtemp's 0700 is for secrets
    yield temporary
    if folder.exists():
      for entry in folder.iterdir():
        if entry.name not in known and not (temporary / entry.name).exists():
          copy = shutil.copytree if entry.is_dir() else shutil.copyfile
          copy(entry, temporary / entry.name)
      old = temporary.with_name(f"{temporary.name}.old")
      folder.rename(old)
      temporary.rename(folder)
      shutil.rmtree(old)
    else:
      temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
