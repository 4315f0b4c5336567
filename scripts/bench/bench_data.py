"""Times the data loader against PyTorch's on the same cores: pairs a second, and milliseconds of CPU a pair.

    python scripts/bench/bench_data.py --out docs/results/data_loading
    python scripts/bench/bench_data.py --cases jpeg:768 --workers 8 --rounds 9

Both decode the same bytes, crop, resize (Lanczos), mirror half of the pairs and tokenize with the same tokenizer. Three
ways: `jaxpref` with threads and with worker processes; `torch`, a DataLoader over a dataset as training scripts for
diffusion models write it, which gives float32 tensors in [-1, 1]; `torch u8`, the same without the floats. They take
turns in one run (A B C D, D C B A, ...), each after its buffers were emptied and while the others' are full and idle,
so that other work on the machine affects all of them equally; medians and quartiles are over the rounds. On a shared
machine the milliseconds of CPU say more than the pairs a second.

A second table opens 10^3 to 10^6 records, of whose images nothing is read before its turn. Images are made here: noise
with the spectrum of photographs, which compresses as they do. Needs torch (pip install jaxpref[test]).
"""

import argparse
import io
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
IMAGE_SIZE = 512
DISTINCT = 48  # image files of a case
PAIRS_PER_CAPTION = 16  # about that of Pick-a-Pic
WORDS = "a an of in the red green castle dog robot portrait oil painting photo city night sky detailed lighting".split()

# ---------------------------------------------------------------------------------------------------------------------
# Data


def photograph(rng: np.random.Generator, size: int) -> np.ndarray:
  """Returns u8[size, size, 3] noise whose amplitudes fall with the frequency f as f^-1.5; channels are mostly equal."""
  frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) + 1 / size
  noise = rng.normal(size=(4, size, size))
  waves = np.fft.irfft2(np.fft.rfft2(noise) * frequency**-1.5, s=(size, size))
  waves /= waves.std(axis=(1, 2), keepdims=True)
  pixels = 128 + 50 * waves[0][..., None] + 15 * np.moveaxis(waves[1:], 0, -1)
  return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str) -> bytes:
  """Returns a file of kind jpeg (quality 90) or png."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "jpeg" else {}))
  return file.getvalue()


class Pairs:
  """Any number of pairs that share a few images, files or pixels."""

  def __init__(self, images: list[Any], num_records: int):
    self.images = images
    self.num_records = num_records

  def __len__(self) -> int:
    return self.num_records

  def __getitem__(self, i: int) -> dict[str, Any]:
    words = np.random.default_rng(i // PAIRS_PER_CAPTION).choice(WORDS, 12)
    return {
      "caption": f"{' '.join(words)} {i // PAIRS_PER_CAPTION}",
      "image_0": self.images[2 * i % len(self.images)],
      "image_1": self.images[(2 * i + 1) % len(self.images)],
      "label_0": 1.0,
    }


class TorchPairs:
  """The same as tensors, as a training script has them: a dataset of a DataLoader."""

  def __init__(self, pairs: Pairs, floats: bool):
    self.pairs = pairs
    self.floats = floats
    self.tokenizer: Any = None

  def __len__(self) -> int:
    return len(self.pairs)

  def pixels(self, image: bytes, mirrored: bool) -> Any:
    """Returns f32[3, S, S] in [-1, 1], or u8."""
    import torch

    picture = Image.open(io.BytesIO(image)).convert("RGB")
    scale = IMAGE_SIZE / min(picture.size)
    width, height = (max(IMAGE_SIZE, round(n * scale)) for n in picture.size)
    if picture.size != (width, height):
      picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - IMAGE_SIZE) // 2, (height - IMAGE_SIZE) // 2
    if (width, height) != (IMAGE_SIZE, IMAGE_SIZE):
      picture = picture.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    if mirrored:
      picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = torch.from_numpy(np.array(picture))
    if not self.floats:
      return tensor
    return tensor.permute(2, 0, 1).contiguous().to(torch.float32).div(255).clone().sub_(0.5).div_(0.5)

  def __getitem__(self, i: int) -> dict[str, Any]:
    import torch

    if self.tokenizer is None:
      self.tokenizer = tokenizer()
    pair = self.pairs[i]
    mirrored = bool(torch.rand(()) < 0.5)
    ids = self.tokenizer(
      pair["caption"], max_length=77, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids[0]
    pixels = {f"pixels_{n}": self.pixels(pair[f"image_{n}"], mirrored) for n in (0, 1)}
    return pixels | {"input_ids": ids, "label_0": pair["label_0"]}


def tokenizer() -> Any:
  """CLIP's kind of tokenizer, as shipped with the tiny model, at CLIP's length."""
  from jaxpref.files import tokenizers

  own = tokenizers.tiny_tokenizer()
  own.model_max_length = 77
  return own


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


def jaxpref_loader(pairs: Pairs, batch_size: int, *, num_threads: int = 0, num_workers: int = 0) -> Any:
  from jaxpref.data import pipeline
  from jaxpref.files import tokenizers

  own = tokenizer()
  return pipeline.pair_batches(
    pairs,
    batch_size=batch_size,
    image_size=IMAGE_SIZE,
    tokenize=lambda captions: tokenizers.tokenize(own, captions),
    seed=0,
    flip=True,
    labels=np.ones(len(pairs), np.float32),
    num_threads=num_threads,
    num_workers=num_workers,
  )


def torch_loader(pairs: Pairs, batch_size: int, *, num_workers: int, floats: bool) -> Iterator[Any]:
  import torch

  # Not forked: this process has threads. Each worker has two batches in store, which is the default.
  loader = torch.utils.data.DataLoader(
    TorchPairs(pairs, floats),
    batch_size=batch_size,
    shuffle=True,
    num_workers=num_workers,
    multiprocessing_context="spawn",
    drop_last=True,
  )
  return iter(loader)


def loaders(pairs: Pairs, batch_size: int, workers: int) -> dict[str, Iterator[Any]]:
  return {
    "jaxpref, threads": jaxpref_loader(pairs, batch_size, num_threads=workers),
    "jaxpref, processes": jaxpref_loader(pairs, batch_size, num_workers=workers),
    "torch": torch_loader(pairs, batch_size, num_workers=workers, floats=True),
    "torch u8": torch_loader(pairs, batch_size, num_workers=workers, floats=False),
  }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def cpu_seconds() -> float:
  """Returns the CPU seconds of this process and of all processes it started that still run."""
  ticks, parent = {}, {}
  for folder in pathlib.Path("/proc").iterdir():
    if folder.name.isdigit():
      try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
      except OSError:  # has ended
        continue
      parent[int(folder.name)] = int(fields[1])
      ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
  own = {os.getpid()}
  while more := {p for p, of in parent.items() if of in own} - own:
    own |= more
  return sum(ticks[p] for p in own) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(limit: float = 60.0) -> None:
  """Waits until the loaders have filled their buffers."""
  end = time.perf_counter() + limit
  while time.perf_counter() < end:
    before = cpu_seconds()
    time.sleep(0.3)
    if cpu_seconds() - before < 0.05:
      return


def quartiles(values: list[float]) -> list[float]:
  return [round(float(q), 3) for q in np.percentile(values, (25, 50, 75))]


def compare(case: str, *, workers: int, batch_size: int, batches: int, rounds: int) -> dict[str, Any]:
  """Speeds of the loaders on files of one kind and size, such as jpeg:768."""
  kind, size = case.split(":")
  rng = np.random.default_rng(0)
  files = [encode(photograph(rng, int(size)), kind) for _ in range(DISTINCT)]
  pairs = Pairs(files, 100_000)
  found = loaders(pairs, batch_size, workers)
  stored = 4 * workers  # batches that are ready at most
  wall: dict[str, list[float]] = {name: [] for name in found}
  cpu: dict[str, list[float]] = {name: [] for name in found}
  for loader in found.values():  # start
    next(loader)
  for number in range(rounds):
    for name in list(found)[:: 1 if number % 2 == 0 else -1]:
      wait_until_idle()
      for _ in range(stored):
        next(found[name])
      started, used = time.perf_counter(), cpu_seconds()
      for _ in range(batches):
        next(found[name])
      wall[name].append(batches * batch_size / (time.perf_counter() - started))
      cpu[name].append(1e3 * (cpu_seconds() - used) / (batches * batch_size))
    print(case, {name: round(values[-1], 1) for name, values in wall.items()}, file=sys.stderr)
  for loader in list(found.values())[:2]:
    loader.close()  # type: ignore[attr-defined]
  return {
    "case": case,
    "kilobytes_per_image": round(statistics.mean(map(len, files)) / 1e3),
    "workers": workers,
    "batch_size": batch_size,
    "rounds": rounds,
    "loaders": {
      name: {
        "pairs_per_second": quartiles(wall[name]),
        "cpu_ms_per_pair": quartiles(cpu[name]),
        # Of the same round, so that what slows down both falls out.
        "times_torch": quartiles([a / b for a, b in zip(wall[name], wall["torch"], strict=True)]),
        "times_torch_cpu": quartiles([b / a for a, b in zip(cpu[name], cpu["torch"], strict=True)]),
      }
      for name in found
    },
  }


def resident() -> int:
  """Returns the resident memory in bytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmRSS"):
      return int(line.split()[1]) * 1024
  raise RuntimeError("no VmRSS")


def scale(num_records: int, batch_size: int, batches: int) -> dict[str, Any]:
  """Measures what a source of so many records costs; images are pixels of the right size, so that all else shows."""
  from jaxpref.data import pipeline

  image = np.zeros((64, 64, 3), np.uint8)
  pairs = Pairs([image], num_records)
  labels = np.ones(num_records, np.float32)
  before, started = resident(), time.perf_counter()
  opened = pipeline.pair_batches(
    pairs,
    batch_size=batch_size,
    image_size=64,
    tokenize=lambda captions: np.zeros((len(captions), 77), np.int32),
    seed=0,
    labels=labels,
    num_threads=0,
  )
  seconds = time.perf_counter() - started
  next(opened)
  first = time.perf_counter() - started
  grown = resident() - before

  def per_row(draw: Callable[[], Any]) -> float:
    times = []
    for _ in range(batches):
      started = time.perf_counter()
      draw()
      times.append((time.perf_counter() - started) / batch_size)
    return statistics.median(times)

  row = per_row(lambda: next(opened))
  record = per_row(lambda: [pairs[i] for i in range(batch_size)])
  return {
    "records": num_records,
    "open_seconds": round(seconds, 4),
    "first_batch_seconds": round(first, 4),
    "megabytes": round(grown / 1e6, 1),
    "microseconds_per_pair": round(1e6 * (row - record)),
  }


def markdown(results: dict[str, Any]) -> str:
  """Returns both tables."""
  lines = [
    f"Pairs a second on {results['cpus']} cores (quartiles in brackets), and how many times as many as `torch` does:",
    "",
    "| files | | pairs a second | times torch | CPU ms a pair | times less CPU |",
    "|---|---|---|---|---|---|",
  ]
  for case in results["cases"]:
    kind, size = case["case"].split(":")
    for name, row in case["loaders"].items():
      rate, ratio, cpu, cpu_ratio = (
        row[key] for key in ("pairs_per_second", "times_torch", "cpu_ms_per_pair", "times_torch_cpu")
      )
      lines.append(
        f"| {kind} {size} px, {case['kilobytes_per_image']} kB | {name}, {case['workers']} | {rate[1]:.1f} "
        f"({rate[0]:.1f}-{rate[2]:.1f}) | {ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f}) | {cpu[1]:.1f} "
        f"| {cpu_ratio[1]:.2f} |"
      )
  lines += [
    "",
    "| records | seconds to open | to the first batch | MB more | microseconds a pair, without its images |",
    "|---|---|---|---|---|",
  ]
  for row in results["scale"]:
    lines.append(
      f"| {row['records']:,} | {row['open_seconds']:.3f} | {row['first_batch_seconds']:.3f} | {row['megabytes']:.0f} "
      f"| {row['microseconds_per_pair']} |"
    )
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", nargs="*", default=["jpeg:512", "jpeg:768", "jpeg:1024", "png:768"])
  parser.add_argument("--workers", type=int, nargs="+", default=[os.cpu_count() or 1])
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--batches", type=int, default=12, help="of one round")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--records", type=int, nargs="*", default=[10**3, 10**5, 10**6])
  parser.add_argument("--out", help="writes OUT.json, and prints the tables")
  args = parser.parse_args()
  results: dict[str, Any] = {"image_size": IMAGE_SIZE, "cpus": len(os.sched_getaffinity(0))}
  results["scale"] = [scale(n, 32, 30) for n in args.records]
  results["cases"] = []
  for case in args.cases:
    for workers in args.workers:
      options = {"workers": workers, "batch_size": args.batch_size, "batches": args.batches, "rounds": args.rounds}
      results["cases"].append(compare(case, **options))
      if args.out:  # after each case, so that an interruption costs one
        pathlib.Path(f"{args.out}.json").write_text(json.dumps(results, indent=1) + "\n")
  print(markdown(results))


if __name__ == "__main__":
  main()
