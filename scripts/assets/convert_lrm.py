"""Turns LPO's published latent reward models into folders that jaxpref loads.

    python scripts/assets/convert_lrm.py LRM_SD15 models/lrm_sd15

LRM_SD15 is a folder as the trainers of github.com/Kwai-Kolors/LPO write it, and as casiatao/LRM on the Hugging Face hub
has them: `unet/` and `text_encoder/` (of SDXL `text_encoder_2/`, too) with config.json and safetensors, and
`state_dict.pt`, a pickle of a dict with the projections' weights and the scale. A process of its own reads that, with
torch.load(weights_only=True), which refuses everything but tensors and numbers, and hands the arrays over as
safetensors; only that process imports torch.

What the reference implementation computes, and where it is here (`jaxpref.models.latent_reward`):

- UNet: diffusers' UNet2DConditionModel up to its middle; the way up is published, and dropped here.
- Features: the means over height and width of down_block_res_samples 2, 5, 8 (and 11 of Stable Diffusion 1.5), which
  are what the last layer of each level makes before it is halved, conditioned on the prompt; and of the middle, without
  + g (with - without) the prompt, g = 7.5. Side by side, times `visual_projection.weight`.
- Text: the pooled output of the model's own text encoder times `text_projection.weight`; of SDXL `text_embeds` of the
  second one, which has the projection in it. Without the prompt is the encoded empty one, for SDXL, too.
- SDXL's UNet is told 1024 x 1024 and no crop.
- Score: exp(logit_scale) cos(features, text).

The guidance scale is in none of the files: it is that of all published ones, or --guidance_scale.
"""

import argparse
import dataclasses
import math
import pathlib
import subprocess
import sys
import tempfile
from typing import Any


def read_projections(pickled: pathlib.Path, arrays: pathlib.Path) -> None:
  """Converts a torch file of the projections to safetensors, float32, in the other process.

  Raises:
    ValueError: it holds something else.
  """
  import torch
  from safetensors.numpy import save_file

  try:
    state = torch.load(pickled, map_location="cpu", weights_only=True)
  except OSError:
    raise
  except Exception as error:  # the bytes of another file may raise anything
    # Without PyTorch's advice to load it all the same.
    reason = ": ".join([type(error).__name__, *str(error).strip().partition(". ")[0].splitlines()])
    raise ValueError(
      f"{pickled} is not a torch file of nothing but tensors and numbers ({reason}); take the one that is published."
    ) from error
  found: dict[str, Any] = {}
  for name, value in state.items() if isinstance(state, dict) else ():
    inner = value.items() if isinstance(value, dict) else [("", value)]
    found |= {f"{name}.{key}".rstrip("."): part for key, part in inner}
  known = {"visual_projection.weight", "text_projection.weight", "logit_scale"}
  numbers = all(isinstance(v, torch.Tensor | float | int) for v in found.values())
  if not numbers or not known - {"text_projection.weight"} <= found.keys() <= known:
    raise ValueError(
      f"{pickled} does not hold the projections of a latent reward model (found {', '.join(found) or 'none'}); "
      f"expected {', '.join(sorted(known))}, of SDXL without the text's."
    )
  for name, value in found.items():
    tensor, axes = torch.as_tensor(value).detach(), 0 if name == "logit_scale" else 2
    whole = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_complex()
    if not whole or tensor.dim() != axes or not torch.isfinite(tensor).all():
      raise ValueError(
        f"{pickled}: {name} is not {'a finite number' if axes == 0 else 'a matrix of finite numbers'} (found "
        f"{tensor.dtype}{list(tensor.shape)}); take the one that is published."
      )
    found[name] = tensor.float().contiguous().numpy()
  save_file(found, str(arrays))


def convert(source: pathlib.Path, folder: pathlib.Path, *, guidance_scale: float = 7.5) -> pathlib.Path:
  """Writes config.json and model.safetensors, float32.

  Args:
    source: the published folder.
    folder: to write; an existing model folder is replaced.
    guidance_scale: of the middle's features.

  Returns:
    The folder.

  Raises:
    FileNotFoundError: a file is not there.
    ValueError: the files are not those of a latent reward model, or not of one; what does not fit is named.
  """
  from safetensors.numpy import load_file

  from jaxpref.files import tensors
  from jaxpref.files.folders import load_network, read_json
  from jaxpref.models import latent_reward, presets
  from jaxpref.models.clip import CLIPTextConfig, CLIPTextModel
  from jaxpref.models.unet import UNet2DConditionModel, UNetConfig, encoder_params
  from jaxpref.rewards.loading import check_out, save_latent_reward

  if not 0.0 <= guidance_scale < math.inf:
    raise ValueError(f"--guidance_scale={guidance_scale}; expected a number of at least 0, 7.5 for the published ones.")
  second = (source / "text_encoder_2").is_dir()
  for name in ("unet/config.json", "text_encoder/config.json", "state_dict.pt"):
    if not (source / name).is_file():
      raise FileNotFoundError(f"there is no file {source / name}; give the folder of a latent reward model.")
  check_out(folder)
  if folder.resolve() in {(source / name).resolve() for name in ("", "unet", "text_encoder", "text_encoder_2")}:
    raise ValueError(f"{folder} is a folder of the published model; choose a new one.")
  module = UNet2DConditionModel(UNetConfig.from_dict(read_json(source / "unet" / "config.json")))
  networks: dict[str, Any] = {"unet": module}
  for name in ("text_encoder", "text_encoder_2") if second else ("text_encoder",):
    of_text = CLIPTextConfig.from_dict(read_json(source / name / "config.json"))
    networks[name] = CLIPTextModel(of_text, name == "text_encoder_2")
  unet = module.config
  if not isinstance(unet.sample_size, int):
    raise ValueError(f"{source / 'unet' / 'config.json'}: sample_size={unet.sample_size!r}, expected one number.")
  config = latent_reward.of_networks(
    unet,
    networks["text_encoder"].config,
    networks["text_encoder_2"].config if second else None,
    image_size=8 * unet.sample_size,  # of the VAE of Stable Diffusion
    guidance_scale=guidance_scale,
  )
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".convert_lrm.", dir=folder.parent) as scratch:
    arrays = pathlib.Path(scratch) / "arrays.safetensors"
    _read_in_process(source / "state_dict.pt", arrays)  # which may fail, before gigabytes are read
    if not second:  # its config.json does not have to say it
      width = load_file(arrays)["visual_projection.weight"].shape[0]
      config = dataclasses.replace(config, projection_dim=width)
    scorer = latent_reward.LatentRewardModel(config)
    shapes = presets.abstract_params(scorer)
    own = {name: shapes[name] for name in shapes if name not in networks}
    try:
      params = tensors.load_tree(arrays, own)
    except ValueError as error:
      raise ValueError(str(error).replace(str(arrays), str(source / "state_dict.pt"))) from None
  for name, network in networks.items():
    files, whole = tensors.weight_files(source / name), presets.abstract_params(network)
    params[name] = load_network(network, files, whole, "float32", None)
  params["unet"] = encoder_params(params["unet"])
  return save_latent_reward(folder, scorer, params)


def _read_in_process(pickled: pathlib.Path, arrays: pathlib.Path) -> None:
  command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--read", str(pickled), str(arrays)]
  done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
  if done.returncode:
    said = done.stderr.strip().splitlines() or [f"the process that read it ended with {done.returncode}"]
    if "No module named 'torch'" in said[-1]:
      said = ["a .pt is read by PyTorch, which is not installed; install it (pip install torch) and run this again."]
    raise ValueError(said[-1].removeprefix("error: "))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", type=pathlib.Path, metavar="LRM_FOLDER")
  parser.add_argument("folder", type=pathlib.Path, metavar="OUT_FOLDER")
  parser.add_argument("--guidance_scale", type=float, default=7.5, help="of the middle's features; default: 7.5")
  parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)  # in the process that imports torch
  args = parser.parse_args()
  try:
    if args.read:
      read_projections(args.source, args.folder)
    else:
      print(f"wrote {convert(args.source, args.folder, guidance_scale=args.guidance_scale)}")
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
  main()
