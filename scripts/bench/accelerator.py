"""Proves on an accelerator what was only computed on CPUs so far, and times it; accelerator.sh runs its parts.

    python scripts/bench/accelerator.py proof --out runs/accelerator
    python scripts/bench/accelerator.py dpo-lora-sdxl --out runs/accelerator
    python scripts/bench/accelerator.py --make    # scripts/bench/accelerator_cpu.json again, on a CPU

Every result goes to OUT/results.json as soon as it is there, and as a line of text to OUT/results.txt. An item that is
done is not done again; one that failed, or is wrong, is tried again by the next call. What `proof` compares is said at
the top of scripts/bench/accelerator_proof.py. The others time ten steps of scripts/bench/bench.py, or fewer where time
is short: on random weights that the device draws, in bfloat16; `torch` times the step of dpo-lora-sdxl in PyTorch. At
the size `smoke` all parts are miniatures that any CPU can run.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))

from scripts.bench import bench  # noqa: E402
from scripts.bench.accelerator_results import Results  # noqa: E402

SIZES = ("full", "smoke")
# Part -> (case and size of bench.py)
TIMINGS = {
  "dpo-lora-sdxl": ("dpo-lora", "sdxl"),
  "spo-lora-sdxl": ("spo-lora", "sdxl"),
  "dpo-full-sd15": ("dpo-full", "sd15"),
  "dpo-lora-sd35m": ("dpo-lora", "sd35m"),
}
PARTS = ("proof", *TIMINGS, "torch")


# ---- Times -----------------------------------------------------------------------------------------------------------

TIMED_STEPS = 10


def timing(results: Results, deadline: float) -> list[str]:
  """Runs a part of TIMINGS; what was timed when the part is stopped is kept."""
  case, size = TIMINGS[results.part]
  smoke = "smoke-sd35m" if size == "sd35m" else "smoke"
  size = size if results.size == "full" else smoke
  watch = functools.partial(keep_partial, results, "steps")
  with results.attempt("steps"):
    row = bench.measure(case, size, None, TIMED_STEPS, "bfloat16", drawn=True, watch=watch, deadline=deadline)
    results.add("steps", row, timing_said(row))
  return ["steps"]


def keep_partial(results: Results, name: str, row: Mapping[str, Any]) -> None:
  """Keeps a row that is not complete, unless more was timed before."""
  if len(row.get("seconds", [])) >= len(results.items.get(name, {}).get("seconds", [])):
    results.keep(name, {**row, "partial": True})


def timing_said(row: Mapping[str, Any]) -> str:
  """Returns a line on a row of bench.py."""
  compiled = "kept from before" if row["compile_seconds"] is None else f"{row['compile_seconds']:.0f} s"
  return (
    f"{len(row['seconds'])} steps, {row['seconds_a_step']:.4g} s each (spread {100 * row['spread']:.0f} %), "
    f"{row['tflop_per_second']:.4g} TFLOP/s, {100 * row['share_of_peak']:.0f} % of the "
    f"{row['matrix_peak_tflop_per_second']:.4g} of matrix products; "
    f"peak {row['peak_memory_gib']:.2f} GiB{bench.memory_note(row)}, after loading {row['loading_gib']:.2f}; "
    f"loaded in {row['start_seconds']:.0f} s, compiled: {compiled}"
  )


def torch(results: Results, deadline: float) -> list[str]:
  """Runs the part `torch`: the step of dpo-lora-sdxl in PyTorch, eager and then compiled, and the ratios."""
  from scripts.bench import bench_torch

  case, size = TIMINGS["dpo-lora-sdxl"]
  modes: tuple[str, ...] = bench_torch.MODES
  if results.size == "smoke":
    size, modes = "smoke", modes[:1]  # the compiler takes minutes on a CPU
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    bench_torch.prepare(folder, [case], size, None, "bfloat16", drawn=True)
    for mode in modes:
      if not results.done(mode):
        options: Any = {"mode": mode, "dtype": "bfloat16", "drawn": True, "deadline": deadline}
        options["watch"] = functools.partial(keep_partial, results, mode)
        with results.attempt(mode):
          row = bench_torch.measure(case, size, None, TIMED_STEPS, folder, **options)
          ours = results.of("dpo-lora-sdxl").get("steps", {}).get("seconds_a_step")
          results.add(mode, row, torch_said(row, ours))
  return list(modes)


def torch_said(row: Mapping[str, Any], ours: float | None) -> str:
  """Returns a line on a row of bench_torch.py, beside jaxpref's seconds, if there are any."""
  return (
    f"{len(row['seconds'])} steps, {row['seconds_a_step']:.4g} s each (spread {100 * row['spread']:.0f} %), "
    f"peak {row['peak_memory_gib']:.2f} GiB ({row['memory_is']}), warm-up {row['compile_seconds']:.0f} s"
    + (f"; PyTorch / jaxpref {row['seconds_a_step'] / ours:.2f}" if ours else "")
  )


def summary(folder: pathlib.Path) -> str:
  """Returns the tables of all that was timed, and writes them as OUT/summary.md."""
  from scripts.bench import bench_torch

  parts = json.loads((folder / "results.json").read_text())["parts"]
  rows = [item for part in TIMINGS for item in parts.get(part, {"items": {}})["items"].values()]
  rows = [row for row in rows if "share_of_peak" in row]
  others = [row for row in parts.get("torch", {"items": {}})["items"].values() if "seconds_a_step" in row]
  texts = [bench.table(rows)] if rows else []
  same = [row for row in rows if (row["case"], row["size"]) in {(r["case"], r["size"]) for r in others}]
  texts += [bench_torch.compare_rows([*same, *others])] if same else []
  text = "\n\n".join(texts)
  if text:
    (folder / "summary.md").write_text(text + "\n")
  return text


# ---- Command line ----------------------------------------------------------------------------------------------------


def prepare_process(part: str) -> None:
  """Sets what libraries read when they are first imported."""
  from jaxpref.devices import chips

  os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(chips.GPU_SHARE))  # as in training
  if part == "proof":
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # whatever precision cuBLAS and cuDNN are asked for
  if part == "torch":
    os.environ["JAX_PLATFORMS"] = "cpu"  # the device is PyTorch's


def run_part(results: Results, deadline: float) -> list[str]:
  """Runs a part; returns the names of its items."""
  if results.part == "proof":
    from scripts.bench import accelerator_proof

    return accelerator_proof.proof(results)
  return (torch if results.part == "torch" else timing)(results, deadline)


def main(arguments: list[str] | None = None) -> None:
  started = time.monotonic()
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("part", nargs="?", choices=PARTS)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/accelerator"), help="default: %(default)s")
  parser.add_argument("--size", choices=SIZES, default="full", help="default: %(default)s")
  parser.add_argument("--limit", type=float, default=math.inf, help="seconds; steps leave a sixth for the rest")
  parser.add_argument("--make", action="store_true", help="write scripts/bench/accelerator_cpu.json")
  parser.add_argument("--summary", action="store_true", help="print the tables of what OUT has")
  args = parser.parse_args(arguments)
  if args.make:
    from scripts.bench import accelerator_proof

    accelerator_proof.make()
    return
  if args.summary:
    if not (args.out / "results.json").is_file():
      parser.error(f"--summary: there is no {args.out / 'results.json'}; run a part first.")
    print(summary(args.out))
    return
  if not args.part:
    parser.error(f"name a part: {', '.join(PARTS)}.")
  args.out.mkdir(parents=True, exist_ok=True)
  results = Results(args.out, args.part, args.size)
  if results.complete:
    print(f"{args.part}: done before", flush=True)
    return
  prepare_process(args.part)
  results.finish(run_part(results, started + args.limit * 5 / 6))


if __name__ == "__main__":
  main()
