"""Writes a run's model or adapter: `python -m jaxpref.export runs/dpo_sd15 --format=kohya --out=style.safetensors`.

RUN is the work folder of a text-to-image run (spo, grpo, dpo, tdpo, kto, denoise), finished or not. The command takes
its last checkpoint, or that of --step, and says on stderr which one. The formats:

  pipeline  a diffusers folder (`from_pretrained`): the trained model, with an adapter merged into it
  lora      the adapter alone, for diffusers (`load_lora_weights`): a file, or a folder with one file
  kohya     the adapter alone, for ComfyUI and AUTOMATIC1111: a file
"""

import json
import pathlib
import sys
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpref import arguments
from jaxpref import config as config_lib
from jaxpref.data import paths
from jaxpref.devices import endings
from jaxpref.files import adapters, loading
from jaxpref.files import family as families
from jaxpref.recipes import sections
from jaxpref.training import checkpoint, networks

TEXT_TO_IMAGE = tuple(name for name, facts in config_lib.FACTS.items() if facts.trains == "denoiser")


def main(argv: list[str] | None = None) -> None:
  """Parses the arguments and writes; an expected error ends the program with one sentence."""
  parser = arguments.Parser(prog="python -m jaxpref.export", description=__doc__)
  parser.add_argument("run", type=arguments.path, metavar="RUN", help="work folder: config.json and checkpoints/")
  parser.add_argument("--format", choices=("pipeline", "lora", "kohya"), required=True, help="see above")
  parser.add_argument(
    "--out", type=arguments.path, required=True, metavar="PATH", help="a new folder, or a new file NAME.safetensors"
  )
  parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the last one)")
  parser.add_argument(
    "--dtype",
    choices=("float32", "float16", "bfloat16"),
    help="precision of the files (default: float16 for a pipeline, float32 for an adapter)",
  )
  parser.add_argument(
    "--unet_model",
    type=arguments.place,
    metavar="UNET",
    help="where the run's config.unet_model is now: a folder, hub name or file",
  )
  args = parser.parse_args(argv)
  with endings.one_sentence(ValueError, OSError, doing=f"exporting to {args.out}", again="run the same command again"):
    print(export(args.run, args.format, args.out, step=args.step, dtype=args.dtype, unet_model=args.unet_model))


def export(
  run: pathlib.Path,
  form: str,
  out: pathlib.Path,
  *,
  step: int | None = None,
  dtype: str | None = None,
  unet_model: str | None = None,
) -> pathlib.Path:
  """Writes what `run` has trained; takes the arguments of the command.

  Returns:
    The folder or file written.
  Raises:
    ValueError, OSError: one sentence on what is missing or does not fit.
  """
  if step is not None:
    sections.check_count(step, "--step", least=0)
  config = read_config(run)
  if unet_model is not None:
    config.unet_model = unet_model
  name = loading.model_name(config)
  # The weights say what a user's own objective trains, so that its module need not be installed.
  if ":" not in config.objective and config_lib.facts(config).trains != "denoiser":
    raise ValueError(
      f"{run} trained config.objective={config.objective!r}, expected one of {', '.join(TEXT_TO_IMAGE)}; a finished "
      "run of another objective has its model in export/."
    )
  file = out
  if form != "pipeline" and out.suffix != ".safetensors":
    if form == "kohya":
      raise ValueError(f"--out={out}; expected a file name that ends in .safetensors for --format=kohya.")
    file = out / adapters.DIFFUSERS_FILE
  if any(out.iterdir()) if out.is_dir() else out.exists():
    raise FileExistsError(f"--out={out} exists and is not empty; choose another, or delete it.")
  paths.check_writable(out, "--out")

  of = families.get(config.family)
  if form == "pipeline":  # an adapter alone does not need its model
    families.look_for(of, name, vae_model=config.vae_model)
  params, step = checkpoint.load_params(run, step)
  end = "" if step == config.num_steps else f"; the run ends at step {config.num_steps}"
  print(f"exporting step {step} of {run}{end}", file=sys.stderr)
  if not {of.denoiser, f"{of.denoiser}_lora"} & set(params):
    raise ValueError(f"{run} trained {', '.join(params)}, expected {of.denoiser}; its model is in export/ at the end.")
  adapter = params.get(f"{of.denoiser}_lora")
  if adapter is None and form != "pipeline":
    raise ValueError(
      f"{run} trained all weights (config.lora.rank=0), so there is no adapter to write; use --format=pipeline."
    )
  scale = 1.0 if adapter is None else networks.adapter_scale(config, adapters.adapter_rank(adapter))
  text = {} if adapter is None else networks.text_adapters(config)
  if form == "pipeline":
    kept = [name for name in of.networks if name not in params]
    with families.opened(config.family):
      pipe = of.load(name, dtype=config.dtype, seed=config.seed, vae_model=config.vae_model, components=kept)
    pipe = families.with_text_adapters(pipe, text)
    of_files, size = jnp.dtype(dtype or "float16"), config.image_size
    with families.saving(config.family):
      families.save_trained(of, out, pipe, params, scale=scale, name=name, dtype=of_files, image_size=size, text=text)
    return out
  file.parent.mkdir(parents=True, exist_ok=True)
  beside: dict[str, Any] = {"text": text} if text else {}
  with families.saving(config.family):
    of.save_adapter(file, adapter, scale, name=name, form=form, dtype=jnp.dtype(dtype or "float32"), **beside)
  return file


def read_config(run: pathlib.Path) -> ConfigDict:
  """Returns the config of a work folder.

  Raises:
    ValueError, FileNotFoundError: there is no config, or it is not of this version.
  """
  path = run / "config.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"{run} is not the work folder of a run: it has no config.json; give the --workdir of a training."
    )
  config = config_lib.default().lock()
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
    options = values.pop("options", {})  # their fields may be those of a user's own objective
    config.update(values)
    with config.unlocked():
      config.options.update(options)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} is not a config of this version ({error}); export with the version that trained."
    ) from error
  return config


if __name__ == "__main__":
  main()
