"""Measures memory and time of loading a model folder of full size: how much more than the parameters is ever held.

    python scripts/bench/measure_loading.py --preset sdxl --out docs/results/loading
    python scripts/bench/measure_loading.py --preset sd35-medium --devices 4 --out docs/results/loading_sd35 \\
      --components text_encoder text_encoder_2 text_encoder_3
    python scripts/bench/measure_loading.py --preset sdxl-miniature

writes a folder in the layout of diffusers (random half-precision numbers; 7 GB for SDXL, 11 GB for the text encoders of
SD3.5) in pieces of a megabyte, large networks in shards with an index as published. Then a fresh process opens it in
bfloat16. On a CPU the parameters themselves are host memory, so the overshoot is the peak minus what is resident when
all is loaded; it should stay below 1.2 times the largest array (a stack of transformer blocks is one array, of all its
layers). Resident memory counts pages of files that are mapped; "anonymous" does not. Beside it stands what is resident
in the end beyond baseline and parameters: what the allocator has not given back, mostly (a few per cent).

--folder keeps the folder, and measures an existing one; without it a temporary folder is removed in the end. To measure
a disk instead of the page cache, drop that first (as root: echo 3 > /proc/sys/vm/drop_caches). --devices spreads every
parameter over that many virtual CPU devices.
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
FACTOR = 1.2  # largest overshoot, in arrays of the largest size
SHARD = 2 * 10**9  # bytes
PIECE = 1 << 19  # numbers written at once

# ---------------------------------------------------------------------------------------------------------------------
# Writing


# Component -> library and class of the files, as model_index.json names them.
CLASSES = {
  "unet": ("diffusers", "UNet2DConditionModel"),
  "transformer": ("diffusers", "SD3Transformer2DModel"),
  "vae": ("diffusers", "AutoencoderKL"),
  "text_encoder": ("transformers", "CLIPTextModel"),
  "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
  "text_encoder_3": ("transformers", "T5EncoderModel"),
}
SHARDED = ("unet", "transformer", "text_encoder_3")  # as published


def tensor_shapes(class_name: str, config: Any) -> dict[str, tuple[int, ...]]:
  """Names and shapes as published files have them: those of torch's own network, without its numbers."""
  import diffusers
  import torch
  import transformers

  with torch.device("meta"):
    if hasattr(diffusers, class_name):
      model = getattr(diffusers, class_name).from_config(config.to_dict())
    else:
      of_config = transformers.T5Config if class_name.startswith("T5") else transformers.CLIPTextConfig
      model = getattr(transformers, class_name)(of_config(**config.to_dict()))
  shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
  if class_name == "SD3Transformer2DModel":
    shapes["pos_embed.pos_embed"] = tuple(model.pos_embed.pos_embed.shape)
  if class_name.startswith("CLIP"):  # transformers 5 drops a prefix that the published files have
    whole = ("text_model.", "text_projection.")
    shapes = {key if key.startswith(whole) else f"text_model.{key}": shape for key, shape in shapes.items()}
  return shapes


def write_tensors(file: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], block: np.ndarray) -> None:
  """Writes a safetensors file of half-precision tensors that repeat `block`, holding no more than that in memory."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for key, shape in shapes.items():
    start, end = end, end + 2 * math.prod(shape)
    header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
  encoded = json.dumps(header).encode()
  encoded += b" " * (-len(encoded) % 8)
  with open(file, "wb") as f:
    f.write(len(encoded).to_bytes(8, "little") + encoded)
    for shape in shapes.values():
      left = math.prod(shape)
      while left:
        f.write(block[:left].data)
        left -= min(left, block.size)


def split(shapes: Mapping[str, tuple[int, ...]], size: int) -> Iterator[dict[str, tuple[int, ...]]]:
  """Parts of at most `size` bytes each, in order."""
  part: dict[str, tuple[int, ...]] = {}
  used = 0
  for key, shape in shapes.items():
    if part and used + 2 * math.prod(shape) > size:
      yield part
      part, used = {}, 0
    part[key] = shape
    used += 2 * math.prod(shape)
  yield part


def write_folder(
  folder: pathlib.Path, preset_name: str, shard: int = SHARD, components: Sequence[str] = tuple(CLASSES)
) -> None:
  """Writes a pipeline folder of random numbers in the preset's architecture; of `components` alone their weights."""
  from jaxpref.files import tokenizers
  from jaxpref.models import presets
  from jaxpref.models.sd3 import presets as sd3_presets

  is_sd3 = preset_name in sd3_presets.PRESETS
  preset: Any = sd3_presets.PRESETS[preset_name] if is_sd3 else presets.get_preset(preset_name)
  classes = {name: of for name, of in CLASSES.items() if getattr(preset, name, None) is not None}
  if is_sd3:
    classes["text_encoder"], pipeline = CLASSES["text_encoder_2"], "StableDiffusion3Pipeline"
  else:
    pipeline = "StableDiffusionXLPipeline" if "text_encoder_2" in classes else "StableDiffusionPipeline"
  block = (0.02 * np.random.default_rng(0).standard_normal(PIECE, np.float32)).astype(np.float16)
  scheduler = preset.scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler")
  index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler]}
  (folder / "scheduler").mkdir(parents=True, exist_ok=True)
  (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(preset.scheduler))
  for name, (library, class_name) in classes.items():
    index[name] = [library, class_name]
    if name.startswith("text"):  # which tokenizer it is has no influence on the memory of a text encoder
      tokenizer = name.replace("text_encoder", "tokenizer")
      tokenizers.save_tokenizer(folder / tokenizer, tokenizers.tiny_tokenizer())
      index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(getattr(preset, name).to_dict()))
    if name not in components:
      continue
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    write_network(folder / name, stem, tensor_shapes(class_name, getattr(preset, name)), block, shard, name in SHARDED)
  (folder / "model_index.json").write_text(json.dumps(index))  # last: a folder without it is not complete


def write_network(
  folder: pathlib.Path, stem: str, shapes: Mapping[str, tuple[int, ...]], block: np.ndarray, shard: int, sharded: bool
) -> None:
  """Writes a network's tensors into one file, or into shards of at most `shard` bytes with their index."""
  if not sharded:
    write_tensors(folder / f"{stem}.safetensors", shapes, block)
    return
  parts = list(split(shapes, shard))
  names = [f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
  for part, file in zip(parts, names, strict=True):
    write_tensors(folder / file, part, block)
  weight_map = {key: file for part, file in zip(parts, names, strict=True) for key in part}
  total = sum(2 * math.prod(shape) for shape in shapes.values())
  (folder / f"{stem}.safetensors.index.json").write_text(
    json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
  )


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, in a process of its own


def status(*keys: str) -> dict[str, int]:
  """Lines of /proc/self/status, in bytes."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  values = dict(line.split(":", 1) for line in lines)
  return {key: 1024 * int(values[key].split()[0]) for key in keys}


class Peak(threading.Thread):
  """Watches memory from a thread: {"VmRSS": largest seen, "RssAnon": largest seen}, bytes."""

  def __init__(self, interval: float = 0.005):
    super().__init__(daemon=True)
    self.interval, self.values, self.done = interval, status("VmRSS", "RssAnon"), threading.Event()

  def run(self) -> None:
    while not self.done.wait(self.interval):
      self.values = {key: max(value, self.values[key]) for key, value in status(*self.values).items()}

  def stop(self) -> dict[str, int]:
    self.done.set()
    self.join()
    return self.values


def measure(
  folder: pathlib.Path, dtype: str, devices: int, components: Sequence[str] = tuple(CLASSES)
) -> dict[str, Any]:
  """Loads components of the folder; memory in bytes, seconds."""
  import jax
  import jax.numpy as jnp

  from jaxpref.files import pipelines, sd3

  sharding = None
  if devices > 1:
    mesh = jax.make_mesh((devices,), ("fsdp",))

    def spread(shape: Any) -> jax.sharding.NamedSharding:
      axes = [i for i in reversed(range(len(shape.shape))) if shape.shape[i] % devices == 0]
      spec = [None] * len(shape.shape)
      if axes:
        spec[axes[0]] = "fsdp"  # type: ignore[call-overload]
      return jax.sharding.NamedSharding(mesh, jax.P(*spec))

    sharding = lambda shapes: jax.tree.map(spread, shapes)
  options: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
  is_sd3 = "StableDiffusion3" in (folder / "model_index.json").read_text()
  load = functools.partial((sd3 if is_sd3 else pipelines).load_pipeline, components=components, **options)
  # Everything that loading imports, traces and allocates once, so that it is in the baseline.
  jax.block_until_ready(pipelines.load_pipeline(ROOT / "jaxpref/assets/tiny-sd", **options).params)

  class Enough(Exception):
    pass

  def stop(shapes: Any) -> Any:
    raise Enough  # all is known, nothing read

  with contextlib.suppress(Enough):
    load(folder, sharding=stop)
  gc.collect()

  before = status("VmRSS", "RssAnon")
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
    marked = True
  except OSError:
    marked = False
  watch = Peak()
  watch.start()
  started, cpu = time.perf_counter(), time.process_time()
  pipe = load(folder, sharding=sharding)
  jax.block_until_ready(pipe.params)
  seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
  peak, after = watch.stop(), status("VmRSS", "RssAnon")
  if marked:
    peak["VmRSS"] = max(peak["VmRSS"], status("VmHWM")["VmHWM"])

  leaves = jax.tree_util.tree_leaves_with_path(pipe.params)
  path, largest = max(leaves, key=lambda leaf: leaf[1].nbytes)
  files = [f for f in folder.rglob("*.safetensors") if f.is_file()]
  overshoot = peak["VmRSS"] - after["VmRSS"]
  # On other devices the parameters are not in this process's memory.
  kept = sum(leaf.nbytes for _, leaf in leaves) if jax.default_backend() == "cpu" else 0
  return {
    "files_bytes": sum(f.stat().st_size for f in files),
    "files": len(files),
    "dtype": dtype,
    "devices": devices,
    "parameters": sum(leaf.size for _, leaf in leaves),
    "parameters_bytes": sum(leaf.nbytes for _, leaf in leaves),
    "largest_array": ".".join(key.key for key in path),
    "largest_array_shape": list(largest.shape),
    "largest_array_bytes": largest.nbytes,
    "baseline_bytes": before["VmRSS"],
    "resident_bytes": after["VmRSS"],
    "peak_bytes": peak["VmRSS"],
    "overshoot_bytes": overshoot,
    "overshoot_anonymous_bytes": max(0, peak["RssAnon"] - after["RssAnon"]),
    "retained_bytes": after["VmRSS"] - before["VmRSS"] - kept,
    "overshoot_in_largest_arrays": overshoot / largest.nbytes,
    "bound": FACTOR,
    "within_bound": overshoot <= FACTOR * largest.nbytes,
    "seconds": seconds,
    "cpu_seconds": cpu,
    "gigabytes_per_second": sum(f.stat().st_size for f in files) / seconds / 1e9,
    "device": jax.devices()[0].device_kind,
  }


def report(row: Mapping[str, Any]) -> str:
  """Returns Markdown."""

  def mb(key: str) -> str:
    return f"{row[key] / 1e6:,.0f} MB"

  parts = f"{', '.join(row['components'])} of " if "components" in row else ""
  verdict = "within" if row["within_bound"] else "**beyond**"
  shape = ", ".join(map(str, row["largest_array_shape"]))
  lines = [
    f"Loading {parts}`{row['preset']}` ({row['parameters']:,} parameters, {row['files']} files, {mb('files_bytes')}) "
    f"as {row['dtype']} onto {row['devices']} device(s), {row['device']}:",
    "",
    "| | |",
    "|---|---|",
    f"| resident before loading | {mb('baseline_bytes')} |",
    f"| parameters | {mb('parameters_bytes')} |",
    f"| resident after loading | {mb('resident_bytes')} |",
    f"| of it neither baseline nor parameters | {mb('retained_bytes')} |",
    f"| peak | {mb('peak_bytes')} |",
    f"| overshoot: peak minus that | {mb('overshoot_bytes')} |",
    f"| of it anonymous memory | {mb('overshoot_anonymous_bytes')} |",
    f"| largest array, `{row['largest_array']}` [{shape}] | {mb('largest_array_bytes')} |",
    f"| overshoot in largest arrays | {row['overshoot_in_largest_arrays']:.2f}, {verdict} {row['bound']} |",
    f"| time | {row['seconds']:.1f} s, {row['gigabytes_per_second']:.2f} GB/s; {row['cpu_seconds']:.1f} s of CPU |",
  ]
  return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--preset", default="sdxl")
  parser.add_argument("--folder", type=pathlib.Path)
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--components", nargs="+", choices=CLASSES, default=list(CLASSES), help="default: all")
  parser.add_argument("--shard-bytes", type=int, default=SHARD, help="of UNet, transformer and T5")
  parser.add_argument("--out", type=pathlib.Path, help="writes OUT.json and OUT.md")
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.child:
    print(json.dumps(measure(args.folder, args.dtype, args.devices, args.components)))
    return
  with tempfile.TemporaryDirectory(prefix="measure_loading.") as temporary:
    folder = (args.folder or pathlib.Path(temporary)).resolve()
    if not (folder / "model_index.json").is_file():
      print(f"writing {args.preset} to {folder}", flush=True)
      subprocess.run(  # torch, which names the tensors, stays out of this process and the next
        [
          sys.executable, "-c",
          "import pathlib, sys; from scripts.bench import measure_loading as m; "
          "m.write_folder(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])",
          str(folder), args.preset, str(args.shard_bytes), *args.components,
        ],
        check=True, cwd=ROOT,
      )  # fmt: skip
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    done = subprocess.run(
      [
        sys.executable, "-m", "scripts.bench.measure_loading", "--child",
        "--folder", str(folder), "--dtype", args.dtype,
        "--devices", str(args.devices), "--components", *args.components,
      ],
      check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": flags.strip()},
    )  # fmt: skip
  told = {} if len(args.components) == len(CLASSES) else {"components": args.components}
  row = {"preset": args.preset} | told | json.loads(done.stdout.splitlines()[-1])
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(row, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(report(row))
  print(report(row))
  if not row["within_bound"]:
    raise SystemExit(
      f"error: loading held {row['overshoot_in_largest_arrays']:.2f} of the largest array more than it keeps, expected "
      f"at most {row['bound']}."
    )


if __name__ == "__main__":
  main()
