"""Turns published reward models that are pickles into folders that jaxpref.rewards.published reads.

    python scripts/assets/convert_scorer.py hpsv2 HPS_v2_compressed.pt ~/.cache/jaxpref/scorers/hpsv2
    python scripts/assets/convert_scorer.py hpsv2.1 HPS_v2.1_compressed.pt ~/.cache/jaxpref/scorers/hpsv2.1
    python scripts/assets/convert_scorer.py aesthetic sac+logos+ava1-l14-linearMSE.pth FOLDER
    python scripts/assets/convert_scorer.py imagereward ImageReward.pt ~/.cache/jaxpref/scorers/imagereward

The files are in the Hugging Face repositories xswu/HPSv2 and THUDM/ImageReward, and in the GitHub repository
christophschuhmann/improved-aesthetic-predictor. A process of its own reads them, with torch.load(weights_only=True),
which refuses everything but tensors and plain values; only that process imports torch.

What is written keeps the names and the number format of the file: open_clip_model.safetensors and open_clip_config.json
as open_clip publishes them (HPSv2 is its ViT-H-14), or model.safetensors and config.json. Tensors that the score does
not need (BLIP's contrastive projections, buffers) are left out and named.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = ("hpsv2", "hpsv2.1", "aesthetic", "imagereward")


def read_checkpoint(checkpoint: pathlib.Path, arrays: pathlib.Path) -> None:
  """Converts a torch file to safetensors, in the other process.

  Raises:
    ValueError: it holds no state dict.
  """
  import pickle

  import torch
  from safetensors.numpy import save_file

  try:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f"{checkpoint} is not a torch file of nothing but tensors ({reason[0]}); download the published file again."
    ) from error
  state = state.get("state_dict", state) if isinstance(state, dict) else {}
  tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
  if not tensors:
    raise ValueError(f"{checkpoint} holds no state dict, expected names and tensors; take the published file.")
  # To numpy, which has no bfloat16, since tensors may share their storage, which safetensors.torch does not write.
  plain = {k: (v.float() if v.dtype == torch.bfloat16 else v).contiguous().numpy() for k, v in tensors.items()}
  save_file(plain, str(arrays))


def _names(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
  """Yields the names in a file of the leaves of a tree."""
  from jaxpref.files.tensors import torch_name

  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _names(value, (*path, name))
    else:
      yield torch_name((*path, name))


def expected(name: str, config: Mapping[str, Any] | None, width: int) -> tuple[dict, dict]:
  """Returns the config to write and the tree of shapes that the file must fill.

  Args:
    config: content of `--config`; None: the published model's.
    width: number of features that the aesthetic predictor takes.
  """
  import jax
  import jax.numpy as jnp

  from jaxpref.models import blip, open_clip, presets
  from jaxpref.models.clip import CLIPModel

  if name.startswith("hpsv2"):
    written = dict(config or open_clip.VIT_H_14)
    clip = open_clip.config_from_dict(written)
    shapes = presets.abstract_params(CLIPModel(clip))
    return written, jax.eval_shape(lambda p: open_clip.from_clip(p, clip), shapes)
  key = jax.random.key(0)
  if name == "aesthetic":
    written = {"model_type": "aesthetic"}
    return written, jax.eval_shape(blip.RewardHead().init, key, jnp.zeros((1, width)))["params"]
  text_only = config is not None and "text_config" not in config  # med_config.json
  values = {"text_config": config} if text_only else dict(config or {})
  reward = blip.ImageRewardConfig.from_dict({**values, "model_type": "imagereward"})
  size, module = reward.vision_config.image_size, blip.ImageReward(reward)
  example = jnp.zeros((1, reward.text_length), jnp.int32), jnp.zeros((1, size, size, 3))
  return reward.to_dict(), jax.eval_shape(module.init, key, *example)["params"]


def _read_config(file: pathlib.Path | None) -> dict | None:
  if file is None:
    return None
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no file {file}; give a JSON file as --config, or leave it out.") from None
  except ValueError as error:
    raise ValueError(f"{file} is not valid JSON ({error}); download it again.") from error
  if not isinstance(config, dict):
    raise ValueError(f"{file} holds a {type(config).__name__}, expected a JSON object; download it again.")
  return config


def convert(
  name: str,
  checkpoint: pathlib.Path,
  folder: pathlib.Path,
  *,
  config: pathlib.Path | None = None,
  tokenizer: pathlib.Path | None = None,
  clip: str | None = None,
) -> list[str]:
  """Writes the folder; files of the same names in it are replaced.

  Args:
    name: one of NAMES.
    checkpoint: the published file.
    folder: to write.
    config: of another architecture: an open_clip_config.json, or a med_config.json.
    tokenizer: folder with the tokenizer's files, which are copied.
    clip: of the aesthetic predictor: folder or hub name of its CLIP-L.

  Returns:
    names of the tensors that are left out.

  Raises:
    FileNotFoundError: a file is not there.
    ValueError: the checkpoint is not that model's; missing and mis-shaped tensors are named.
  """
  from safetensors.numpy import load_file, save_file

  from jaxpref.files.tensors import load_tree

  if not checkpoint.is_file():
    raise FileNotFoundError(f"there is no file {checkpoint}; give the published file of {name}.")
  read_config = _read_config(config)
  vocabulary = ("vocab.txt",) if name == "imagereward" else ("vocab.json", "merges.txt")
  copied = [] if tokenizer is None else [tokenizer / file for file in vocabulary]
  for file in copied:
    if not file.is_file():
      raise FileNotFoundError(f"{file.parent} has no {file.name}; give the folder of the model's tokenizer.")
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".convert_scorer.", dir=folder) as scratch:
    arrays, weights_file = pathlib.Path(scratch) / "arrays.safetensors", pathlib.Path(scratch) / "model.safetensors"
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--read", name, str(checkpoint), str(arrays)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
      said = done.stderr.strip().splitlines() or [f"the process that read it ended with {done.returncode}"]
      if "No module named 'torch'" in said[-1]:
        said = ["the file is read by PyTorch, which is not installed; install it (pip install torch) and try again."]
      raise ValueError(said[-1].removeprefix("error: "))
    tensors = load_file(str(arrays))
    first = tensors.get("layers.0.weight")
    written, shapes = expected(name, read_config, 768 if first is None else first.shape[-1])
    if clip is not None:
      written["clip"] = str(pathlib.Path(clip).resolve()) if pathlib.Path(clip).is_dir() else clip
    names = set(_names(shapes))
    left_out = sorted(set(tensors) - names)
    kept = {k: v for k, v in tensors.items() if k in names}
    if not kept:
      raise ValueError(
        f"{checkpoint} holds none of the tensors of {name}, but {', '.join(left_out[:3])} ...; take the published file."
      )
    save_file(kept, str(weights_file), metadata={"format": "pt"})
    del tensors, kept
    try:
      load_tree(weights_file, shapes, param_dtype="float16")  # all are there and have the right shapes
    except ValueError as error:
      raise ValueError(str(error).replace(str(weights_file), str(checkpoint))) from None
    stem = "open_clip_" if name.startswith("hpsv2") else ""
    weights_file.replace(folder / f"{stem}model.safetensors")
    text = json.dumps(written, indent=2) + "\n"
    (folder / ("open_clip_config.json" if stem else "config.json")).write_text(text, encoding="utf-8")
    for file in copied:
      shutil.copyfile(file, folder / file.name)
  return left_out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("name", choices=NAMES)
  parser.add_argument("checkpoint", type=pathlib.Path, metavar="FILE")
  parser.add_argument("folder", type=pathlib.Path, metavar="OUT_FOLDER")
  parser.add_argument("--config", type=pathlib.Path, help="open_clip_config.json or med_config.json of another model")
  parser.add_argument("--tokenizer", type=pathlib.Path, metavar="FOLDER", help="whose vocabulary is copied beside")
  parser.add_argument("--clip", metavar="FOLDER_OR_HUB_NAME", help="the aesthetic predictor's CLIP-L")
  parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)  # in the process that imports torch
  args = parser.parse_args()
  try:
    if args.read:
      read_checkpoint(args.checkpoint, args.folder)
      return
    folder = args.folder.expanduser()
    options = dict(config=args.config, tokenizer=args.tokenizer, clip=args.clip)
    left_out = convert(args.name, args.checkpoint, folder, **options)
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error
  print(f"wrote {folder}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))


if __name__ == "__main__":
  main()
