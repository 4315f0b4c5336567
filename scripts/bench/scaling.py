"""Compiles training steps for absent TPU slices, and writes what they take to docs/results/scaling.md.

    pip install libtpu
    python scripts/bench/scaling.py                    # all rows that docs/results/scaling.json does not have yet
    python scripts/bench/scaling.py --until 15:40      # stops at that time, also in the middle of a row
    python scripts/bench/scaling.py --arguments        # compiles nothing: only what each row is given
    python scripts/bench/scaling.py --report           # only writes docs/results/scaling.md again

Each row is one call of `python -m jaxpref.compile`, in its own process, and takes minutes. Existing rows are skipped,
so that the command can be stopped and repeated at any time. The batch of a chip is the same on all slices.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
GIB = 2.0**30
# Slice -> topology and chips. Google names v5p slices by TensorCores, two of a chip: v5p-8 is 2x2x1, four chips.
SLICES = {
  "v5e-16": ("v5e:4x4", 16),
  "v5e-256": ("v5e:16x16", 256),
  "v5p-8": ("v5p:2x2x1", 4),
  "v6e-16": ("v6e:4x4", 16),
}
CASES = ("dpo full", "dpo LoRA", "spo LoRA")
# Pairs (dpo) or prompts (spo) of a chip, and micro-batches of an update.
BATCH = {("dpo", "sd15"): (4, 4), ("dpo", "sdxl"): (4, 4), ("spo", "sd15"): (10, 1), ("spo", "sdxl"): (2, 2)}
# Transitions with a shared start in an update of spo, of a chip: about as published.
MINIBATCH = {"sd15": 9, "sdxl": 1}
NAMES = {"sd15": "SD1.5", "sdxl": "SDXL"}
# Rows that are worth most, where time is short.
FIRST = (
  ("dpo LoRA", "sd15", "v5e-16"),
  ("dpo LoRA", "sdxl", "v5e-16"),
  ("dpo full", "sd15", "v5e-16"),
  ("dpo LoRA", "sd15", "v5e-256"),
  ("dpo full", "sd15", "v5e-256"),
  ("dpo full", "sdxl", "v5e-256"),
  ("spo LoRA", "sdxl", "v6e-16"),
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One training step on one slice."""

  case: str
  size: str
  slice: str

  @property
  def key(self) -> str:
    """Returns the row's name in docs/results/scaling.json."""
    return f"{self.case} {self.size} {self.slice}"

  @property
  def fsdp(self) -> int:
    """Returns how many devices share parameters: all for full training, none for LoRA unless it needs them."""
    chips = SLICES[self.slice][1]
    if self.case.endswith("full"):
      # 64 divides the UNets' widths 320, 640 and 1280; 256 only the last, and what it does not divide stays whole.
      return min(chips, 64)
    # SDXL's networks with the preference model are 10 GiB, which 16 GiB of a v5e leave no room beside.
    return min(chips, 16) if (self.case, self.size, self.slice[:3]) == ("spo LoRA", "sdxl", "v5e") else 1

  def arguments(self) -> list[str]:
    """Returns the arguments of `python -m jaxpref.compile`."""
    objective, kind = self.case.split()
    topology, chips = SLICES[self.slice]
    batch, accumulation = BATCH[objective, self.size]
    found = [f"--config=configs/{objective}_{self.size}.py", f"--topology={topology}"]
    found += [f"--config.batch_size={batch * chips}", f"--config.accumulation={accumulation}"]
    found += [f"--config.mesh.fsdp={self.fsdp}", "--config.vae_slicing=1"]
    if objective == "spo":
      found.append(f"--config.spo.minibatch={MINIBATCH[self.size] * chips}")
    if self.case == "dpo LoRA":
      found += ["--config.lora.rank=64", "--config.optimizer.name=adamw"]
    return found


def rows() -> list[Row]:
  """Returns all rows, the most valuable first."""
  every = [Row(case, size, name) for size in NAMES for name in SLICES for case in CASES]
  first = [Row(*row) for row in FIRST]
  return sorted(every, key=lambda r: first.index(r) if r in first else len(first))


def compile_row(row: Row, *, deadline: float) -> dict[str, Any]:
  """Returns the report of a row, or its error.

  Raises:
    TimeoutError: the deadline came first.
  """
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "report.json"
    command = [sys.executable, "-m", "jaxpref.compile", *row.arguments()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.time()
    try:
      done = subprocess.run(
        [*command, f"--out={out}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=None if deadline == float("inf") else max(deadline - started, 1.0),
      )
    except subprocess.TimeoutExpired:
      raise TimeoutError(f"{row.key} was not ready in {time.time() - started:.0f} s") from None
    if done.returncode or not out.is_file():
      last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
      return {"error": last[0][:300], "command": " ".join(["python -m jaxpref.compile", *row.arguments()])}
    report = json.loads(out.read_text())
  advice = [line for line in done.stdout.splitlines() if line.startswith("does not fit")]
  return report | ({"advice": advice[0]} if advice else {})


def state_bytes(row: Row) -> dict[str, int]:
  """Returns what a row is given on one chip, in bytes by component; without the batch."""
  import importlib

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  sys.path.insert(0, str(ROOT))
  import jax

  from jaxpref import compile
  from jaxpref.devices import sharding
  from jaxpref.planning import plan

  jax.config.update("jax_platforms", "cpu")
  objective = row.case.split()[0]
  config = importlib.import_module(f"configs.{objective}_{row.size}").get_config()
  for argument in row.arguments():
    if argument.startswith("--config."):
      name, value = argument.removeprefix("--config.").split("=")
      *parents, last = name.split(".")
      node = functools.reduce(lambda c, key: c[key], parents, config)
      node[last] = type(node[last])(value)
  config = plan.without_weights(config)
  devices = compile.topology_devices(SLICES[row.slice][0])
  return plan.state_bytes(config, sharding.make_mesh(**config.mesh, devices=devices))


def markdown(reports: dict[str, Any]) -> str:
  """Returns the text of docs/results/scaling.md."""
  lines = [_HEAD, _table(reports), "", "## From 16 to 256 chips", "", _GROWTH, _growth(reports), "", _FULL]
  missing = [_title(r) for r in rows() if not _is_done(reports.get(r.key, {}))]
  if missing:
    lines += ["", f"Not compiled yet: {'; '.join(missing)}."]
  lines += [f"{_title(r)} failed: {reports[r.key]['error']}" for r in rows() if "error" in reports.get(r.key, {})]
  advice = [f"- {_title(r)}: {reports[r.key]['advice']}." for r in rows() if "advice" in reports.get(r.key, {})]
  if advice:
    lines += ["", "## What does not fit", "", *advice]
  example = next((reports[r.key] for r in rows() if "topology" in reports.get(r.key, {})), None)
  if example:
    lines += ["", "## Command", "", "A row is made by, for example:", "", f"```sh\n{example['command']}\n```"]
  return "\n".join(lines) + "\n"


def _is_done(report: dict[str, Any]) -> bool:
  return "compile_seconds" in report or "error" in report


def _title(row: Row) -> str:
  objective, kind = row.case.split()
  return f"{objective.upper()} {kind} {NAMES[row.size]} on {row.slice}"


def _table(reports: dict[str, Any]) -> str:
  lines = [
    "| step | slice | fsdp | arguments GiB | temporaries GiB | peak of HBM GiB | TFLOP | read, written GiB | sent GiB "
    "| at least s | bound by | compile s |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in sorted(rows(), key=lambda r: (r.size, CASES.index(r.case), list(SLICES).index(r.slice))):
    r = reports.get(row.key, {})
    name = f"{row.case.split()[0].upper()} {row.case.split()[1]} {NAMES[row.size]}"
    start = f"| {name} | {row.slice} | {row.fsdp} "
    if "compile_seconds" not in r:
      given = f"{sum(r['arguments'].values()) / GIB:.2f}" if "arguments" in r else ""
      lines.append(start + f"| {given} | {'failed' if 'error' in r else 'not compiled'} | | | | | | | |")
      continue
    peak = f"{r['peak'] / GIB:.2f}{'' if r['fits'] else ' (does not fit)'}"
    least = max(r["least_seconds"].values())
    cpu = f" ({r['compile_cpu_seconds']:.0f})" if "compile_cpu_seconds" in r else ""
    lines.append(
      start + f"| {sum(r['arguments'].values()) / GIB:.2f} | {_gib(r.get('temporaries'))} | {peak} "
      f"| {r['flop'] / 1e12:.4g} | {_gib(r.get('memory_bytes'))} | {_gib(_sent(r))} | {least:.3g} | {r['bound']} "
      f"| {r['compile_seconds']:.0f}{cpu} |"
    )
  return "\n".join(lines)


def _growth(reports: dict[str, Any]) -> str:
  kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
  lines = [
    f"| step | chips | {' | '.join(kinds)} | all GiB | s at the links' peak |",
    f"|---|---|{'---|' * (len(kinds) + 2)}",
  ]
  for size in NAMES:
    for case in CASES:
      for name in ("v5e-16", "v5e-256"):
        r = reports.get(Row(case, size, name).key, {})
        start = f"| {case.split()[0].upper()} {case.split()[1]} {NAMES[size]} | {SLICES[name][1]} "
        if "collectives" not in r:
          lines.append(start + "| not compiled |" + " |" * (len(kinds) + 1))
          continue
        sent = [r["collectives"].get(kind, {"bytes": 0})["bytes"] for kind in kinds]
        seconds = r["least_seconds"]["interconnect"]
        lines.append(start + f"| {' | '.join(map(_gib, sent))} | {_gib(sum(sent))} | {seconds:.3g} |")
  return "\n".join(lines)


def _sent(report: dict[str, Any]) -> float | None:
  return sum(c["bytes"] for c in report["collectives"].values()) if "collectives" in report else None


def _gib(size: float | None) -> str:
  return "" if size is None else "0" if size == 0 else f"{size / GIB:.3g}"


_HEAD = """# Scaling

What one chip holds, computes and moves in a training step on slices of TPUs, by the programs that the compiler makes
for them; none of it was run. Made by `python scripts/bench/scaling.py`; scaling.json has the numbers with all details.

- In bfloat16 with the recipes' `remat` block. Of a chip and step: DPO 4 pairs in four micro-batches; SPO 10 prompts on
  SD1.5, 2 on SDXL.
- Full training splits parameters over all chips, but at most 64 (`mesh.fsdp`): 64 divides the UNets' widths, 256 most
  of them not, and what it does not divide stays whole. With 256, SD1.5's step would be given 1.32 GiB, with 16 0.83.
- LoRA has rank 64 (SPO on SD1.5 4, as published) and whole copies of the networks on each chip where fsdp is 1.
- Arguments are exact also where a row is not compiled (there without the batch): they follow from the shardings.
- v5p-8 is four chips (topology 2x2x1): Google counts the TensorCores of v5p, two a chip. 2x2x2 would be v5p-16.
- TFLOP are those of the traced step, recomputation included, divided by the chips. For SPO they, and the traffic, are
  those of an iteration in which all pairs are valid.
- Read and written are the operands and results of each instruction of the compiled program, as often as it runs.
- Sent is what a chip has to send in the collectives, by ring algorithms: of n chips (n - 1) / n of the result of an
  all-gather, and twice that of an all-reduce.
- The least time is that of the resource which is busy longest at its published peak. A step takes longer: no program
  reaches the peak, and slices without wrap-around links have less than the links' sum.
- Compiled with small tiles and less effort, as `python -m jaxpref.compile` does unless --noquick is given: operands are
  read more often than in the program that training runs, and so "memory" bounds steps that may be bound otherwise (the
  options of each row are in scaling.json). Compile times are of two CPU cores that much other work shared; of the
  processors' time, in parentheses, the compiler takes the same on a quiet machine.
"""
_GROWTH = """Bytes that a chip sends in a step at the same batch of a chip, GiB. SPO's all-reduces grow with
the number of chips: an update takes valid transitions of any prompts in a random order, so that results do not depend
on the mesh, and the program sums each minibatch's latents over all devices, of which one has each row. On SD1.5 and
256 chips these are 17 updates of 2,304 transitions that share their start (three latents of 64 KiB) and 256 that do not
(four), 8.23 GiB, of which a ring sends twice as much: nearly all that the table has under
all-reduce. All collectives together are 0.13 % of the least time of that iteration.
"""

# Measured apart from the rows, with the same compiler.
_FULL = """## Full training with fsdp

Each layer's kernel is gathered, in bfloat16, where it is applied, again in the backward pass, and its gradient is
summed into the parts (`jaxpref.devices.sharding.apply_gathered`). Activations stay on their chip, but for at most what
the tables have under all-to-all and collective-permute. Left to itself, the compiler moves them instead, and sends more
than twice as much (tests/devices/sharding_test.py compares both on transformer blocks on virtual devices). For
TPUs it makes all-reduces of the gradients in the place of reduce-scatters, which would be half of that.

A step of SD1.5 with 8 pairs a chip in two micro-batches and fsdp 16 was refused on v5e-16 before, for 18.96 GiB of
temporaries; now it takes 4.05 ([scaling_fsdp.json](scaling_fsdp.json), 837 s to compile while other work ran):

```sh
python -m jaxpref.compile --config=configs/dpo_sd15.py --topology=v5e:4x4 --config.batch_size=128 \\
  --config.accumulation=2 --config.mesh.fsdp=16 --config.vae_slicing=1 --out=docs/results/scaling_fsdp.json
```"""


def write(reports: dict[str, Any], docs: pathlib.Path) -> None:
  """Writes both files, each replaced as a whole."""
  for name, text in (("scaling.json", json.dumps(reports, indent=1) + "\n"), ("scaling.md", markdown(reports))):
    temporary = docs / f".{name}"
    temporary.write_text(text)
    temporary.replace(docs / name)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--until", help="HH:MM of today, when to stop")
  parser.add_argument("--report", action="store_true", help="only write docs/results/scaling.md")
  parser.add_argument("--arguments", action="store_true", help="compile nothing, only find what each row is given")
  parser.add_argument("--only", default="", help="rows whose name contains this, such as 'dpo full sd15'")
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs" / "results", help="default: %(default)s")
  args = parser.parse_args(arguments)
  deadline = float("inf")
  if args.until:
    hour = datetime.datetime.strptime(args.until, "%H:%M").time()
    deadline = datetime.datetime.combine(datetime.date.today(), hour).timestamp()
  file = args.docs / "scaling.json"
  reports = json.loads(file.read_text()) if file.is_file() else {}
  write(reports, args.docs)
  for row in rows() if not args.report else ():
    if args.only not in row.key or _is_done(reports.get(row.key, {})):
      continue
    if args.arguments:
      reports[row.key] = {"arguments": state_bytes(row)}
      continue
    if time.time() >= deadline:
      break
    print(f"{datetime.datetime.now():%H:%M:%S} {row.key} ...", file=sys.stderr, flush=True)
    try:
      reports[row.key] = compile_row(row, deadline=deadline)
    except TimeoutError as error:
      print(f"stopped: {error}", file=sys.stderr)
      break
    write(reports, args.docs)
  if args.arguments:
    write(reports, args.docs)


if __name__ == "__main__":
  main()
