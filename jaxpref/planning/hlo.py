"""Counts what a compiled program moves, from its HLO text: bytes between devices, and bytes to and from memory.

The compiler's own analysis counts a loop's body once; here it counts as often as it runs. All functions take the text
of `compiled.as_text()` and return numbers for one device.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping

# What one of n devices in a group sends, as a multiple of its operands, with optimal algorithms.
COLLECTIVES: dict[str, Callable[[int], float]] = {
  "all-gather": lambda n: n - 1,  # the operand is one device's part
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}
# Instructions that move nothing themselves.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
  "opt-barrier", "add-dependency",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    shape: shape of the result as written: `f32[8,16]{1,0}`, or several in parentheses.
    operands: names of instructions of the same computation.
    text: the whole line.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  text: str
  is_root: bool

  def called(self, attribute: str) -> str | None:
    """Returns the computation that an attribute names, such as `body=%name`."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: its computations by name, the instructions of each by name in their order.

  Attributes:
    entry: the computation that is the program.
    devices: number of devices it runs on together.
  """

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str
  devices: int


def parse(text: str) -> Module:
  """Reads HLO text.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  current: dict[str, Instruction] | None = None
  entry, devices = "", 1
  for line in text.splitlines():
    if line.startswith("HloModule"):
      counts = [re.search(rf"\b{name}=(\d+)", line) for name in ("num_partitions", "replica_count")]
      devices = math.prod(int(found[1]) for found in counts if found)
    elif header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and (instruction := _instruction(line)):
      current[instruction.name] = instruction
  if entry not in computations:
    raise ValueError("HLO text has no ENTRY computation; expected the text of a compiled program.")
  return Module(computations, entry, devices)


def _instruction(line: str) -> Instruction | None:
  head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  rest = line[head.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end + 1 :]
  opening = rest.index("(")
  operands = re.findall(r"%([\w.\-]+)", rest[opening : _closing(rest, opening)])
  return Instruction(head[2], shape, rest[:opening], tuple(operands), line, bool(head[1]))


def _closing(text: str, opening: int) -> int:
  """Returns the place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for i in range(opening, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  return len(text) - 1


_ARRAY = re.compile(r"\b([a-z]+(\d*)[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


def shape_bytes(shape: str, *, memory: bool = False) -> int:
  """Returns the bytes of an array or of all arrays of a tuple; with `memory` only those in the main memory.

  >>> shape_bytes("f32[8,16]{1,0}"), shape_bytes("(bf16[4]{0:T(128)S(1)}, pred[])", memory=True)
  (512, 1)
  """
  total = 0
  for kind, bits, sizes, layout in _ARRAY.findall(shape):
    if memory and re.search(r"S\([1-9]", layout):  # another memory space: on a TPU the one next to the compute units
      continue
    count = math.prod(int(n) for n in sizes.split(",") if n)
    total += -(-count * (8 if kind == "pred" else int(bits or 0)) // 8)
  return total


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns how often the body of a `while` runs; None if that depends on data.

  If the compiler did not record it, the loop must count from 0 in ones up to a constant.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
  if known:
    return int(known[1])
  condition = module.computations.get(loop.called("condition") or "", {})
  root = next((i for i in condition.values() if i.is_root), None)
  if root is not None and root.opcode == "fusion":
    inner = module.computations.get(root.called("calls") or "", {})
    root = next((i for i in inner.values() if i.is_root), None)
  if root is None or root.opcode != "compare" or "direction=LT" not in root.text:
    return None
  constants = [i for i in condition.values() if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape)]
  if len(constants) != 1:
    return None
  found = re.search(r"constant\((\d+)\)", constants[0].text)
  return int(found[1]) if found else None


Cost = Callable[[Mapping[str, Instruction], Instruction], Mapping[str, float]]


def total(module: Module, cost: Cost, *, while_trips: float = 1.0, into_fusions: bool = False) -> Counter:
  """Returns the sum of a cost over all instructions, each as often as it runs; of branches the most expensive one.

  Args:
    cost: function of a computation and its instruction that returns costs by kind.
    while_trips: how often a loop's body runs if the number of rounds depends on data.
    into_fusions: whether `cost` counts the content of fusions, or fusions themselves.
  """

  @functools.cache
  def of(name: str) -> Counter:
    computation, found = module.computations[name], Counter[str]()
    for instruction in computation.values():
      opcode = instruction.opcode
      if opcode == "while":
        trips = trip_count(module, instruction)
        inner = of(instruction.called("body") or "")
        found.update({k: v * (while_trips if trips is None else trips) for k, v in inner.items()})
      elif opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
        names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        names += [c for k in ("true_computation", "false_computation") if (c := instruction.called(k))]
        found.update(max((of(n) for n in names), key=lambda c: sum(c.values()), default=Counter()))
      elif opcode in ("call", "async-start") or into_fusions and opcode == "fusion":
        callee = instruction.called("to_apply") or instruction.called("calls")
        found.update(of(callee) if callee in module.computations else {})
      else:
        found.update(cost(computation, instruction))
    return found

  return of(module.entry)


def collective_bytes(text: str, *, while_trips: float = 1.0) -> dict[str, dict[str, float]]:
  """Returns what one device sends to others, by kind of collective.

  Args:
    text: text of a compiled program.
    while_trips: see `total`.

  Returns:
    {kind: {"bytes": sent, "count": how often}} for the kinds that occur. Groups of one device send nothing.
  """
  module = parse(text)

  def cost(computation: Mapping[str, Instruction], instruction: Instruction) -> dict[str, float]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      return {}
    # A TPU may run one collective with several fusions, each of which repeats it; the first has no flag to wait for.
    if re.search(r'"flag_start":"\d', instruction.text):
      return {}
    size = group_size(instruction.text, module.devices)
    sent = sum(shape_bytes(computation[o].shape) for o in instruction.operands) * COLLECTIVES[kind](size)
    if size == 1 and kind != "collective-permute":
      return {}
    return {f"{kind} bytes": sent, f"{kind} count": 1}

  found = total(module, cost, while_trips=while_trips, into_fusions=True)
  return {
    kind: {"bytes": found[f"{kind} bytes"], "count": found[f"{kind} count"]}
    for kind in COLLECTIVES
    if found[f"{kind} count"]
  }


def group_size(text: str, devices: int) -> int:
  """Returns the devices in each group of a collective, from its line; `devices` if it names no groups.

  >>> group_size("replica_groups={{0,1},{2,3}}", 4), group_size("replica_groups=[4,2]<=[2,4]T(1,0)", 8)
  (2, 2)
  >>> group_size("replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}", 16), group_size("replica_groups={}", 16)
  (8, 16)
  """
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
    return int(found[2])
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=\S*mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    # A part of an axis is written 'axis':(before)size.
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return devices


def memory_bytes(text: str, *, while_trips: float = 1.0) -> float:
  """Returns the bytes that one device reads from its main memory and writes to it.

  What an instruction reads and writes as a whole counts once each, and a fusion is one instruction. Of arrays that are
  only sliced or updated in place, only the slices count.

  Args:
    text: text of a compiled program.
    while_trips: see `total`.
  """
  module = parse(text)
  hbm = functools.partial(shape_bytes, memory=True)

  def cost(computation: Mapping[str, Instruction], instruction: Instruction) -> dict[str, float]:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
      return {}
    shapes = [computation[o].shape for o in operands if o in computation]
    if opcode == "fusion":
      return {
        "bytes": _fusion_bytes(module.computations.get(instruction.called("calls") or "", {}), instruction, shapes)
      }
    if opcode in ("dynamic-slice", "slice", "gather"):
      return {"bytes": 2 * hbm(instruction.shape)}
    if opcode == "dynamic-update-slice":
      return {"bytes": 2 * hbm(shapes[1])}
    if opcode == "custom-call" and re.search('custom_call_target="__cu(blas|dnn)', instruction.text):
      result = _ARRAY.search(instruction.shape)  # the rest is work space
      return {"bytes": hbm(result[0] if result else "") + sum(map(hbm, shapes))}
    if opcode.endswith("-start"):  # its result repeats its operands
      return {"bytes": 2 * max(map(hbm, shapes), default=0) if opcode != "copy-start" else _copy_bytes(instruction)}
    return {"bytes": hbm(instruction.shape) + sum(map(hbm, shapes))}

  return total(module, cost, while_trips=while_trips)["bytes"]


def _copy_bytes(instruction: Instruction) -> int:
  """Returns the bytes of an asynchronous copy with the result (destination, source, state), in or between memories."""
  return sum(shape_bytes(part[0], memory=True) for part in list(_ARRAY.finditer(instruction.shape))[:2])


def _fusion_bytes(body: Mapping[str, Instruction], fusion: Instruction, shapes: list[str]) -> int:
  """Returns the bytes of one fusion: results and operands, but only the slices of those sliced or updated in place.

  Args:
    body: the computation that was fused.
    shapes: shapes of the operands.
  """

  def users(name: str) -> list[tuple[Instruction, str]]:
    """Returns the instructions that use a value, and the name each gives it."""
    found = []
    for i in body.values():
      if name in i.operands:
        found += users(i.name) if i.opcode in ("bitcast", "reshape") else [(i, name)]
    return found

  read = 0
  for i in body.values():
    number = re.search(r" parameter\((\d+)\)", i.text) if i.opcode == "parameter" else None
    if not number or int(number[1]) >= len(shapes) or not shape_bytes(shapes[int(number[1])], memory=True):
      continue
    partial = 0
    for user, name in users(i.name):
      if user.opcode == "dynamic-slice" and user.operands[0] == name:
        partial += shape_bytes(user.shape)
      elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:  # what stays is never read
        partial = shape_bytes(shapes[int(number[1])], memory=True)
        break
    read += min(partial, shape_bytes(shapes[int(number[1])], memory=True))
  return read + _written(body, fusion)


def _written(body: Mapping[str, Instruction], fusion: Instruction) -> int:
  """Returns the bytes of a fusion's results; for an array that is updated in place, those of the update."""

  def source(name: str) -> Instruction:
    i = body[name]
    return source(i.operands[0]) if i.opcode == "bitcast" and i.operands[0] in body else i

  root = next((i for i in body.values() if i.is_root), None)
  if root is None:
    return shape_bytes(fusion.shape, memory=True)
  roots = [source(o) for o in root.operands] if root.opcode == "tuple" else [source(root.name)]
  arrays = [found[0] for found in _ARRAY.finditer(fusion.shape)]
  if len(roots) != len(arrays):
    return shape_bytes(fusion.shape, memory=True)
  written = 0
  for result, array in zip(roots, arrays, strict=True):
    whole = shape_bytes(array, memory=True)
    updated = result.opcode == "dynamic-update-slice" and whole
    written += min(whole, shape_bytes(body[result.operands[1]].shape)) if updated else whole
  return written
