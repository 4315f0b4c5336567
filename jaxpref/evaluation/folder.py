"""The folder of an evaluation: its record of pictures, prompts and weights, the pictures, and their scores."""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

import jaxpref
from jaxpref.data import lease, paths, prompt_sets
from jaxpref.evaluation.settings import model_folder
from jaxpref.files import adapters, loading, tensors
from jaxpref.files import family as families

MANIFEST = "manifest.json"
PACKAGES = ("jax", "flax", "numpy", "transformers", "pillow")
# The arguments that decide the pictures, and so must stay the same in a folder.
OF_PICTURES = (
  "seeds", "seed", "scheduler", "steps", "karras", "eta", "guidance_scale", "guidance_rescale", "negative_prompt",
  "clip_skip", "max_sequence_length", "height", "width", "vae_model", "dtype",
)  # fmt: skip


def image_file(folder: pathlib.Path, model: str, prompt: int, seed: int) -> pathlib.Path:
  """Returns the path of a picture."""
  return folder / "images" / model / f"{prompt:05d}_{seed}.png"


def make_manifest(
  args: argparse.Namespace,
  models: Mapping[str, tuple[str, Sequence[adapters.LoraFile]]],
  prompts: Sequence[prompt_sets.Prompt],
  sizes: dict[str, list[int]],
) -> dict[str, Any]:
  """Returns the record of what the pictures will be made from."""
  versions = {"jaxpref": jaxpref.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
  texts = "\n".join(p.text for p in prompts)
  settings = {name: getattr(args, name) for name in OF_PICTURES} | {
    "prompts": args.prompts,
    "num_prompts": len(prompts),
    "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
    "image_size": next(iter(sizes.values())),
  }
  if args.vae_model:
    settings["vae_weights"] = fingerprint_of_vae(args.vae_model)
  described = {
    name: {
      "model": source,
      "lora": " + ".join(map(str, loras)) or None,
      "weights": fingerprint(source, loras, args.family),
      "versions": versions,
    }
    for name, (source, loras) in models.items()
  }
  return {"settings": settings, "models": described, "versions": versions}


def _begun(folder: pathlib.Path, name: str = MANIFEST) -> dict[str, Any] | None:
  """Returns the manifest of a folder; None if it has none."""
  file = folder / name
  if not file.is_file():
    return None
  try:
    begun = json.loads(file.read_text(encoding="utf-8"))
    for entry in dict(begun["models"]).values():
      entry["weights"]
    return {**begun, "settings": dict(begun["settings"])}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{file} cannot be read ({error}); choose another --out.") from error


def _difference(folder: pathlib.Path, begun: dict[str, Any], asked: dict[str, Any]) -> str | None:
  """Returns a sentence on how a folder's pictures differ from what is asked for; None if they do not."""
  for name, value in asked["settings"].items():
    old = begun["settings"].get(name)
    if name != "prompts" and old != value:
      return f"{folder} was begun with {name}={old!r}, not {value!r}; choose another --out, or the same settings."
  for name, entry in asked["models"].items():
    if name in begun["models"] and begun["models"][name]["weights"] != entry["weights"]:
      return f"{folder} has pictures of other weights under the name {name}; choose another name, or another --out."
  return None


def set_aside(folder: pathlib.Path, asked: dict[str, Any], held: lease.Held) -> pathlib.Path | None:
  """Moves a folder of other settings or weights to FOLDER_1 or the next free name, and returns that; else None."""
  begun = _begun(folder)
  if begun is None or _difference(folder, begun, asked) is None:
    return None
  number = next(i for i in itertools.count(1) if not folder.with_name(f"{folder.name}_{i}").exists())
  held.move(target := folder.with_name(f"{folder.name}_{number}"))
  return target


def open_folder(folder: pathlib.Path, asked: dict[str, Any], file: str = MANIFEST) -> dict[str, Any]:
  """Starts the folder for a manifest of `make_manifest`, or continues it; returns its manifest, which is in `file`.

  A model's `versions` stay those of the first call with it.

  Raises:
    ValueError: it was begun with other settings, prompts or weights, or is not such a folder.
  """
  begun = _begun(folder, file)
  described = dict(asked["models"])
  if begun is not None:
    if (difference := _difference(folder, begun, asked)) is not None:
      raise ValueError(difference)
    for name in described.keys() & begun["models"].keys():
      drawn_with = begun["models"][name].get("versions", begun.get("versions"))
      described[name] = described[name] | {"versions": drawn_with}
    described = begun["models"] | described
  elif folder.is_dir() and not all(lease.is_lock(path.name) for path in folder.iterdir()):
    raise ValueError(f"--out={folder} is not empty and has no {file}; choose another folder.")
  elif folder.exists() and not folder.is_dir():
    raise ValueError(f"--out={folder} is a file; name a folder.")
  manifest = asked | {"models": described}
  if jax.process_index() == 0:
    with paths.cannot_be_written(folder):
      folder.mkdir(parents=True, exist_ok=True)
    paths.write(folder / file, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
  return manifest | {"models": {name: described[name] for name in asked["models"]}}


def read_image(file: pathlib.Path) -> np.ndarray:
  """Reads a picture as u8[H, W, 3].

  Raises:
    OSError: it is missing or damaged.
  """
  with Image.open(file) as picture:
    return np.asarray(picture.convert("RGB"))


def is_whole(file: pathlib.Path) -> bool:
  """Returns whether a picture exists and can be decoded."""
  try:
    read_image(file)
  except (OSError, SyntaxError):
    return False
  return True


def _scores_file(folder: pathlib.Path, model: str, scorer: str) -> pathlib.Path:
  return folder / "scores" / model / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', scorer)}.json"


def read_scores(folder: pathlib.Path, model: str, scorer: str, known: dict[str, str]) -> list[list[float]] | None:
  """Returns the scores of an earlier run by the same version of a scorer, on the same scale; None if there are none."""
  try:
    found = json.loads(_scores_file(folder, model, scorer).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  same = isinstance(found, dict) and all(found.get(key) == value for key, value in known.items())
  return found.get("scores") if same else None


def write_scores(
  folder: pathlib.Path, model: str, scorer: str, known: dict[str, str], scores: list[list[float]]
) -> None:
  """For `read_scores`."""
  file = _scores_file(folder, model, scorer)
  with paths.cannot_be_written(folder):
    file.parent.mkdir(parents=True, exist_ok=True)
  paths.write(file, json.dumps(known | {"scorer": scorer, "scores": scores}).encode())


def forget_scores(folder: pathlib.Path, model: str) -> None:
  """Removes the scores of a model that draws a picture again."""
  with paths.cannot_be_written(folder):
    for file in (folder / "scores" / model).glob("*.json"):
      file.unlink(missing_ok=True)


def fingerprint(source: str, loras: Sequence[adapters.LoraFile], family: str | None = None) -> str:
  """Returns a hash of the weights that a model of `parse_models` has."""
  plain = all(strength == 1.0 for _, strength in loras)
  strengths = "" if plain else "".join(f":{strength:g}" for _, strength in loras)
  if source.partition(":")[0] in ("random", "zeros") and not loading.split_unet(source)[1]:
    return source + "".join(f"+{_fingerprint([file])}" for file, _ in loras) + strengths
  of = families.get(families.of_run(source, family), "--family")
  opened = model_folder(source)
  files = [f for of_part in of.weight_files(opened).values() for f in of_part]
  strengths += opened[len(loading.split_t5(opened)[0]) :]  # the same weights, used otherwise
  drawn = loading.split_unet(source)[0] + "+" if source.partition(":")[0] in ("random", "zeros") else ""
  return drawn + _fingerprint([*files, *(file for file, _ in loras)]) + strengths


def fingerprint_of_vae(source: str) -> str:
  """Returns a hash of the weights of a separate VAE: a folder, a hub name or a file."""
  if source.partition(":")[0] in ("random", "zeros"):
    return source
  return _fingerprint(loading.vae_files(source))


def _fingerprint(files: Sequence[tensors.Source]) -> str:
  return hashlib.sha256(" ".join(tensors.fingerprint([file]) for file in files).encode()).hexdigest()[:16]
