r"""Compiles a recipe's training step for absent hardware: does it fit, what does it move between chips, what bounds it.

    pip install libtpu
    python -m jaxpref.compile --config=configs/spo_sdxl.py --config.batch_size=32 --topology=v5e:4x4
    python -m jaxpref.compile --config=configs/dpo_sdxl.py --topology=v5e:4x4 --search
    pip install 'jax[cuda12]'
    python -m jaxpref.compile --config=configs/dpo_sdxl.py --topology=h200:8

It needs no accelerator and no weights: it compiles the program that training runs, with the shapes of the published
models. Without --topology it compiles for the devices of this machine. For absent GPUs it times no kernels, does not
count cuDNN's work space, and computes long attention in pieces where training uses cuDNN's kernel.

All numbers are per chip. The compiler reports the memory. Operations are counted in the traced step
(`jaxpref.planning.flops`, recomputation included) and divided by the number of devices; bytes are counted in the
compiled program (`jaxpref.planning.hlo`). Times are what each resource takes at its peak, so a step takes at least the
longest of them. An SPO iteration is counted with the updates it makes if all pairs are valid. Rewards are counted by
name, without their weights. A reward that is a Python function runs between two programs: the memory is that of the
larger program, and what the function itself uses is not counted.
"""

import contextlib
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from jaxpref import arguments
from jaxpref.data import paths
from jaxpref.devices import chips, endings, sharding
from jaxpref.devices.chips import GIB
from jaxpref.objectives import catalog
from jaxpref.planning import flops as flops_lib
from jaxpref.planning import hlo, plan
from jaxpref.rewards.base import Weighted, scope
from jaxpref.training import host
from jaxpref.training import step as step_lib

AGAIN = "run the same command again"

# For programs that are only inspected: a TPU's compiler spends most of its time on the instructions of each
# convolution's tile. Small tiles (the default is 16 MiB and more) and less effort make it several times faster.
# What a step sends is the same; operands are read more often, and temporaries in HBM may be larger.
TILES = "xla_tpu_scoped_vmem_limit_kib"
_OF_PROGRAM = ("arguments", "temporaries", "output", "peak")
QUICK: dict[str, Any] = {TILES: "5120", "xla_optimization_level": "EFFORT_O1"}


def compile_step(
  config: ConfigDict, mesh: Mesh, *, compiler_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Compiles one training step for the devices of a mesh.

  Args:
    config: as `plan.without_weights` returns it.
    compiler_options: XLA's options.

  Returns:
    What one device holds and does: bytes of `arguments` by component, of `temporaries`, of `output` that does not reuse
    an argument's memory, and their sum `peak`; `flop`; `collectives`, see `hlo.collective_bytes`; `memory_bytes`, read
    and written. Also `lower_seconds`, `compile_seconds` and `compile_cpu_seconds` (of all threads). If the compiler
    refuses a program for lack of memory, the report has `refused` but no temporaries and nothing that is counted in
    compiled programs.

    An online method also has `rewards` by name: `parameters`, `bytes`, `flop`, or `host`. With a reward on the host,
    `programs` has these numbers of each program; the step's costs are sums, and its memory is the larger program's.
  """
  p = plan.planned(config, mesh)
  shardings = jax.tree.map(lambda s: s.sharding, p.state)
  inputs = (p.state, p.frozen, p.batch)
  arguments = plan.argument_bytes(*inputs)
  compiler = _Compiler(config, mesh.size, sum(arguments.values()), p.reward, dict(compiler_options or {}))
  if p.reward is not None and p.reward.host:
    with contextlib.suppress(_Refused):  # without it, what the first program leaves on the devices is unknown
      host.compile_halves(p.halves, p.reward.host, mesh, shardings, inputs, compiler)
    report = {"arguments": arguments} | _together(compiler.reports)
  else:
    step = sharding.on_mesh(mesh, step_lib.joined(*p.halves))
    with contextlib.suppress(_Refused):
      compiler("step", jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).trace(*inputs))
    report = {"arguments": arguments} | {k: v for k, v in compiler.reports["step"].items() if k != "arguments"}
  if p.reward is None:
    return report
  sizes = plan.reward_sizes(p.reward, p.frozen)
  in_graph = {name: sizes[name] | {"flop": flop} for name, flop in compiler.of_rewards.items()}
  return report | {"rewards": in_graph | {reward.name: {"host": True} for reward, _ in p.reward.host}}


class _Refused(Exception):
  """Raised when the compiler says that a program does not fit; its report says by how much."""


class _Compiler:
  """Compiles the programs of a step and keeps what there is to report of each.

  Attributes:
    reports: the report of each program, by its name.
    of_rewards: operations on one device in one step, by the name of a reward in the graph.
  """

  def __init__(
    self, config: ConfigDict, devices: int, arguments: int, reward: Weighted | None, options: dict[str, Any]
  ):
    """Takes in `arguments` the bytes that the first program is given on one device."""
    self.reports: dict[str, dict[str, Any]] = {}
    self.of_rewards = {} if reward is None else {r.name: 0.0 for r, _ in reward.graph}
    self._trips = catalog.method(config).updates(config).count
    self._devices, self._arguments, self._options = devices, arguments, options
    self._started = time.perf_counter()

  def _flop(self, traced: Any, scope: str | None = None) -> float:
    return flops_lib.of_jaxpr(traced.jaxpr.jaxpr, while_trips=self._trips, scope=scope) / self._devices

  def __call__(self, name: str, traced: Any) -> Any:
    """Returns the compiled program; raises `_Refused` if it does not fit."""
    lowered = traced.lower()
    report = self.reports[name] = {"flop": self._flop(traced)}
    for reward in self.of_rewards:
      self.of_rewards[reward] += self._flop(traced, scope(reward))
    report["lower_seconds"] = time.perf_counter() - self._started
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
      compiled = _compile(lowered, self._options)
    except jax.errors.JaxRuntimeError as error:
      peak = _refused_bytes(str(error), self._arguments)
      if peak is None:
        raise
      report |= {"refused": True, "peak": peak, "compile_seconds": time.perf_counter() - started}
      raise _Refused from error
    report["compile_seconds"] = time.perf_counter() - started
    report["compile_cpu_seconds"] = time.process_time() - cpu_started
    text = compiled.as_text()
    report |= chips.program_bytes(compiled) | {
      "collectives": hlo.collective_bytes(text, while_trips=self._trips),
      "memory_bytes": hlo.memory_bytes(text, while_trips=self._trips),
    }
    self._started = time.perf_counter()
    return compiled


def _together(programs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
  """Returns the sums of the costs of programs that run one after the other, and the memory of the largest."""
  largest = max(programs.values(), key=lambda report: report["peak"])
  found: dict[str, Any] = {k: largest[k] for k in _OF_PROGRAM[1:] if k in largest}
  for key in ("flop", "lower_seconds", "compile_seconds", "compile_cpu_seconds", "memory_bytes"):
    if all(key in report for report in programs.values()):
      found[key] = sum(report[key] for report in programs.values())
  if any(report.get("refused") for report in programs.values()):
    return found | {"refused": True, "programs": dict(programs)}
  collectives: dict[str, dict[str, float]] = {}
  for report in programs.values():
    for kind, of_kind in report["collectives"].items():
      before = collectives.get(kind, {"bytes": 0.0, "count": 0.0})
      collectives[kind] = {k: before[k] + of_kind[k] for k in before}
  return found | {"collectives": collectives, "programs": dict(programs)}


def _compile(lowered: Any, options: dict[str, Any]) -> Any:
  """Returns `lowered.compile`'s program, with larger tiles where some cannot be that small."""
  try:
    return lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if "ScopedVmemOom" not in str(error) or TILES not in options:
      raise
    larger = 2 * int(options[TILES])
    rest = {k: v for k, v in options.items() if k != TILES}
    return _compile(lowered, rest | ({TILES: str(larger)} if larger < 2**14 else {}))


def _refused_bytes(message: str, arguments: float) -> float | None:
  """Returns the bytes a program needs, from the compiler's message that they do not fit; None for other messages.

  Args:
    arguments: bytes of the program's arguments, which one of the two messages leaves out.
  """
  size = r"([\d.]+)([KMGT]?)"
  of_temporaries = re.search(rf"required for HLO temporaries \({size}\) exceeds available HBM", message)
  used = of_temporaries or re.search(rf"Used {size} of [\d.]+[KMGT]? hbm", message)
  if used is None:
    return None
  found = float(used[1]) * 2.0 ** (10 * " KMGT".index(used[2] or " "))
  return found + arguments if of_temporaries else found


def least_seconds(report: Mapping[str, Any], chip: chips.Chip) -> dict[str, float]:
  """Returns `chips.least_seconds` for a report of `compile_step`."""
  return chips.least_seconds(
    chip,
    flop=report["flop"],
    memory_bytes=report.get("memory_bytes", 0.0),
    collective_bytes=sum(c["bytes"] for c in report.get("collectives", {}).values()),
  )


def table(report: Mapping[str, Any], chip: chips.Chip | None = None) -> str:
  """Returns Markdown: memory, then operations and traffic with the least time they take on a chip."""
  rows = [(name, size) for name, size in report["arguments"].items() if size > 2**20]
  rows += [(name, report[name]) for name in ("temporaries", "output", "peak") if name in report]
  rows += [("of", chip.usable)] if chip else []
  lines = ["| on each device | GiB |", "|---|---|", *(f"| {n} | {s / GIB:.2f} |" for n, s in rows)]
  seconds = least_seconds(report, chip) if chip else {}
  time_of = lambda name: f"{seconds[name]:.3g}" if name in seconds else ""
  lines += ["", "| of each device and step | | seconds at its peak |", "|---|---|---|"]
  lines += [f"| operations | {report['flop'] / 1e12:.4g} TFLOP | {time_of('compute')} |"]
  if "collectives" in report:
    sent = sum(c["bytes"] for c in report["collectives"].values())
    lines += [f"| read and written | {report['memory_bytes'] / GIB:.4g} GiB | {time_of('memory')} |"]
    lines += [f"| sent to others | {sent / GIB:.4g} GiB | {time_of('interconnect')} |"]
    for kind, found in report["collectives"].items():
      lines += [f"| by {found['count']:.0f} {kind} | {found['bytes'] / GIB:.4g} GiB | |"]
  if "programs" in report:
    lines += ["", "| program | given GiB | temporaries | output | peak | TFLOP |", "|---|---|---|---|---|---|"]
    for name, program in report["programs"].items():
      sizes = [f"{program[k] / GIB:.2f}" if k in program else "" for k in _OF_PROGRAM]
      lines += [f"| {name} | {' | '.join(sizes)} | {program['flop'] / 1e12:.4g} |"]
  if "rewards" in report:
    lines += ["", "| reward | parameters | GiB on each device | TFLOP of each device and step |", "|---|---|---|---|"]
    for name, r in report["rewards"].items():
      in_graph = "host" not in r and f"{r['parameters']:,} | {r['bytes'] / GIB:.2f} | {r['flop'] / 1e12:.4g}"
      lines += [f"| {name} | {in_graph or 'on the host | | '} |"]
  return "\n".join(lines)


def fits(report: Mapping[str, Any], chip: chips.Chip) -> bool:
  """Returns whether the compiler accepted the program and it leaves some of the chip's memory free."""
  return not report.get("refused") and report["peak"] <= chip.usable


def advise(
  config: ConfigDict,
  devices: list[Any],
  report: Mapping[str, Any],
  chip: chips.Chip,
  *,
  search: bool,
  compiler_options: Mapping[str, Any],
) -> str:
  """Returns the nearest change that makes a step fit: estimated or, with `search`, found by compiling in turn."""
  for change, peak in plan.estimates(config, devices, report):
    if peak > chip.usable:
      continue
    added = change.flags(config)
    if not search:
      return (
        f"an estimate, without compiling, says it fits with {added} (about {peak / GIB:.1f} GiB); --search makes sure"
      )
    print(f"compiling with {added}, about {peak / GIB:.1f} GiB ...", file=sys.stderr)
    new = change.apply(config)
    found = compile_step(new, sharding.make_mesh(**new.mesh, devices=devices), compiler_options=compiler_options)
    if fits(found, chip):
      return f"it fits with {added}: {found['peak'] / GIB:.2f} GiB"
  return "no other accumulation, mesh.fsdp, remat or lora.rank makes it fit: use more chips or a smaller batch"


def topology_devices(name: str) -> list[Any]:
  """Returns the devices of a TPU topology such as v5e:4x4, or of a GPU server such as h200:8, without having them.

  Raises:
    ValueError: the compiler (libtpu, or JAX's plug-in for CUDA) is not installed or does not know the name.
  """
  kind, _, shape = name.partition(":")
  chip = chips.CHIPS.get(kind)
  if chip is None:
    raise ValueError(f"--topology={name}; expected one of {', '.join(chips.CHIPS)}, with a shape: v5e:4x4, or h200:8.")
  if chip.gpu is None:
    needs, shapes = "libtpu (pip install libtpu)", f"a shape like {', '.join(chip.shapes)}"
    # Two TensorCores of a chip are one device, as on Google's machines.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if set(shape.split("x")) == {"1"}:  # libtpu otherwise expects whole hosts of four chips
      options["chips_per_host_bounds"] = [1, 1, 1]
    platform, topology_name = "tpu", name
  else:
    needs, shapes = "JAX's plug-in for CUDA (pip install 'jax[cuda12]')", "a number of GPUs of one server, such as 8"
    if shape and not shape.isdecimal() or shape == "0":
      raise ValueError(f"--topology={name}; expected {kind} and {shapes}: {kind}:8.")
    platform, topology_name = "cuda", chip.gpu.name
    options = {"target_config": chip.gpu.target_config(chip), "topology": f"1x1x{shape or 1}"}
  try:
    return list(topologies.get_topology_desc(platform=platform, topology_name=topology_name, **options).devices)
  except Exception as error:  # the plug-in raises several types
    reason = str(error).splitlines()[0]
    raise ValueError(f"--topology={name}: {reason}; expected {shapes}, and {needs}.") from error


def compiler_options(chip: chips.Chip | None, *, quick: bool) -> dict[str, Any]:
  """Returns the compiler's options for an absent chip; {} for this machine's devices."""
  if chip is None:
    return {}
  if chip.gpu is not None:
    # Nothing can be timed; untimed, Triton would choose tiles for matrix products that do not fit every shape.
    return {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
  return dict(QUICK) if quick else {}


def main(argv: list[str]) -> None:
  """Compiles and prints; an expected error ends the program with one sentence."""
  del argv
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  with endings.one_sentence(ValueError, OSError, doing="compiling", again=AGAIN):
    _main()


def _main() -> None:
  topology, out = flags.FLAGS.topology, flags.FLAGS.out
  chip = chips.CHIPS.get((topology or "").partition(":")[0])
  if out:
    _check_out(pathlib.Path(out))
  config = plan.without_weights(flags.FLAGS.config)
  devices = topology_devices(topology) if topology else jax.devices()
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  config.mesh.update(dict(mesh.shape))  # replaces -1 by the number found
  online = catalog.method(config).facts.online
  sharding.check_batch_size(mesh, config.batch_size, 1 if online else config.accumulation)
  print(f"compiling a step of {config.objective} for {len(devices)} x {devices[0].device_kind} ...", file=sys.stderr)
  options = compiler_options(chip, quick=flags.FLAGS.quick)
  report = compile_step(config, mesh, compiler_options=options)
  print(table(report, chip))
  print(f"\nlowered in {report['lower_seconds']:.0f} s, compiled in {report['compile_seconds']:.0f} s")
  if chip:
    seconds = least_seconds(report, chip)
    where = chips.bound(seconds)
    print(f"a step takes at least {seconds[where]:.3g} s, bound by {where}")
    verdict = f"{report['peak'] / GIB:.2f} GiB of the {chip.usable / GIB:.4g} GiB of a chip"
    if fits(report, chip):
      print(f"fits: {verdict}")
    else:
      advice = advise(config, devices, report, chip, search=flags.FLAGS.search, compiler_options=options)
      print(f"does not fit: {verdict}; {advice}")
    report |= {
      "topology": topology,
      "compiler_options": options,
      "least_seconds": seconds,
      "bound": where,
      "fits": fits(report, chip),
    }
  if out:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--out")]
    report |= {"command": " ".join(["python -m jaxpref.compile", *arguments]), "jax": jax.__version__}
    pathlib.Path(out).write_text(json.dumps(report, indent=2) + "\n")


def _check_out(file: pathlib.Path) -> None:
  if file.is_dir() or not file.parent.is_dir():
    raise ValueError(f"--out={file}; expected a file in a folder that exists.")
  paths.check_writable(file, "--out")


def run() -> None:
  """Runs the command: the console entry point."""
  config_flags.DEFINE_config_file("config", None, "The recipe. Change a field with --config.NAME=VALUE.")
  flags.DEFINE_string(
    "topology", None, "What to compile for, e.g. v5e:4x4 or h200:8; default: the devices of this machine."
  )
  flags.DEFINE_bool("search", False, "If the step does not fit, compile changed recipes until one does.")
  flags.DEFINE_bool(
    "quick", True, "For TPUs: use small tiles, which compile in a fifth of the time to a slower program."
  )
  arguments.define_place("out", None, "JSON file to write the report to.")
  flags.mark_flag_as_required("config")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no process has a TPU, so several can compile
  if any(argument.startswith("--topology") for argument in sys.argv):
    jax.config.update("jax_platforms", "cpu")
    # libtpu asks its machine for these and complains on stderr if they are missing; only the topology counts.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  with endings.one_sentence(doing="compiling", again=AGAIN):
    app.run(main, flags_parser=arguments.parse_flags)


if __name__ == "__main__":
  run()
