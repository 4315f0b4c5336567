"""Turns SPO's published step-aware preference models into folders that jaxpref loads.

    python scripts/assets/convert_spm.py sd-v1-5_step-aware_preference_model.bin models/spm_sd15
    python scripts/assets/convert_spm.py work_dirs/sdv15_spm/final_ckpt.bin models/spm --clip=PICKSCORE_FOLDER

The checkpoints are `sd-v1-5_step-aware_preference_model.bin` and `sdxl_step-aware_preference_model.bin` of
SPO-Diffusion-Models/Step-Aware_Preference_Models on the Hugging Face hub, and the `final_ckpt.bin` that SPO's trainer
writes (github.com/RockeyCoss/SPO): pickles of a flat state dict. A process of its own reads them, with
torch.load(weights_only=True), which refuses everything but tensors, and hands the arrays over as safetensors; only that
process imports torch.

What the reference implementation computes, and where it is here:

- It is transformers' CLIPModel (PickScore's, CLIP-H) under the attribute `model` of the trainer's module, so every name
  begins with `model.`; `t_embedder.mlp.{0,2}`, `vision_model.encoder.layers.N.adaLN_modulation.1` and
  `vision_model.adaLN_modulation.1` are added to it. The buffers `position_ids` are dropped.
- Time: cos, then sin, of t exp(-ln(10000) i / 128), i = 0 ... 127; Linear, SiLU, Linear. t is the timestep itself, 0 to
  999; clean images have 0. Then SiLU and one Linear for each block, six chunks: shift, scale, gate of attention, shift,
  scale, gate of the MLP; x (1 + scale) + shift after the layer norms, and the outputs of attention and MLP are times
  their gates. The pooled output gets x (1 + scale) + shift (chunks: shift, scale) after the post layer norm, before
  the projection. `StepAwareCLIPModel` has the same parametrisation (the identity at scale = shift = 0, gate = 1), so no
  number changes. (SPO's constructor fills the blocks' biases with ones, scale and shift included; its trainer then sets
  them to 0, 0, 1, and checkpoints overwrite them. One without them is refused here.)
- Text: CLIP's text tower without a padding mask, pooled at the first end-of-text token, projected. The tokenizer is
  CLIP-H's, which is that of Stable Diffusion except for padding, and a causal tower does not see what follows the end.
- Images: decoded pictures in [-1, 1]; bicubic (torch's interpolate, no antialiasing) so that the shorter side is 224,
  centre crop, clip to [0, 1], OpenAI's mean and standard deviation: `jaxpref.models.preference.preprocess`.
- Score: exp(logit_scale) cos(image, text).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile


def read_checkpoint(checkpoint: pathlib.Path, arrays: pathlib.Path) -> None:
  """Converts a torch file of tensors to safetensors, floats as float32, in the other process.

  Raises:
    ValueError: it holds something else than a flat dict of tensors.
  """
  import pickle

  import torch
  from safetensors.numpy import save_file

  try:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f"{checkpoint} is not a torch file of nothing but tensors ({reason[0]}); take the state dict that SPO publishes."
    ) from error
  others = [str(k) for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, dict) else ["all"]
  if others:
    raise ValueError(
      f"{checkpoint} is not a flat dict of tensors (something else at: {', '.join(others)}); save the state dict alone."
    )
  # To numpy, since tensors of one DeepSpeed checkpoint share their storage, which safetensors.torch does not write.
  plain = {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in state.items()}
  save_file(plain, str(arrays))


def clip_config(path: pathlib.Path | None) -> dict:
  """Returns the dict of a CLIP's config.json, given it or its folder; CLIP-H's without."""
  from jaxpref.models import presets

  if path is None:
    assert presets.SD15.preference is not None
    return presets.SD15.preference.to_dict()
  file = path / "config.json" if path.is_dir() else path
  if not file.is_file():
    raise FileNotFoundError(f"there is no file {file}; give the config.json of the CLIP, or a folder with it.")
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not valid JSON ({error}); download it again.") from error
  if not isinstance(config, dict) or "vision_config" not in config:
    raise ValueError(f"{file} describes no CLIP: it has no vision_config; give PickScore's or CLIP-H's config.json.")
  return config


def convert(checkpoint: pathlib.Path, folder: pathlib.Path, clip: pathlib.Path | None = None) -> pathlib.Path:
  """Writes config.json and model.safetensors, float32.

  Args:
    checkpoint: the .bin.
    folder: to write; an existing model folder is replaced.
    clip: config.json of the CLIP that the checkpoint extends, or a folder with it; None: CLIP-H.

  Returns:
    The folder.

  Raises:
    FileNotFoundError: a file is not there.
    ValueError: the checkpoint is no state dict of that model; missing, unexpected and mis-shaped tensors are named.
  """
  from jaxpref.files import tensors
  from jaxpref.models import presets
  from jaxpref.models.preference import StepAwareCLIPConfig, StepAwareCLIPModel
  from jaxpref.rewards.loading import check_out, save_preference_model

  if not checkpoint.is_file():
    raise FileNotFoundError(f"there is no file {checkpoint}; give the .bin of a step-aware preference model.")
  check_out(folder)
  module = StepAwareCLIPModel(StepAwareCLIPConfig.from_dict(clip_config(clip)))
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".convert_spm.", dir=folder.parent) as scratch:
    arrays = pathlib.Path(scratch) / "arrays.safetensors"
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--read", str(checkpoint), str(arrays)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
      said = done.stderr.strip().splitlines() or [f"the process that read it ended with {done.returncode}"]
      if "No module named 'torch'" in said[-1]:
        said = ["a .bin is read by PyTorch, which is not installed; install it (pip install torch) and run this again."]
      raise ValueError(said[-1].removeprefix("error: "))
    try:
      params = tensors.load_tree(arrays, presets.abstract_params(module))
    except ValueError as error:
      raise ValueError(str(error).replace(str(arrays), str(checkpoint))) from None
    return save_preference_model(folder, module, params)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("checkpoint", type=pathlib.Path, metavar="CHECKPOINT.bin")
  parser.add_argument("folder", type=pathlib.Path, metavar="OUT_FOLDER")
  parser.add_argument("--clip", type=pathlib.Path, metavar="FOLDER_OR_CONFIG", help="of the CLIP; default: CLIP-H")
  parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)  # in the process that imports torch
  args = parser.parse_args()
  try:
    if args.read:
      read_checkpoint(args.checkpoint, args.folder)
    else:
      print(f"wrote {convert(args.checkpoint, args.folder, args.clip)}")
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
  main()
