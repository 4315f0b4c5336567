"""Bytes counted in programs: by hand, and of what the compiler makes of known products on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpref.planning import hlo

# As a TPU's compiler writes: layouts with parentheses, memory spaces, pairs of start and done, a loop without a count.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64]{0})->f32[64]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (carry: (s32[], f32[64], f32[5,64])) -> (s32[], f32[64], f32[5,64]) {
  %carry = (s32[]{:T(128)}, f32[64]{0:T(128)}, f32[5,64]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = f32[64]{0:T(128)} get-tuple-element(%carry), index=1
  %stack = f32[5,64]{1,0:T(8,128)} get-tuple-element(%carry), index=2
  %reduced = f32[64]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %row = f32[64]{0:T(128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%take_row
  %y = f32[64]{0:T(128)} add(%reduced, %row)
  ROOT %out = (s32[]{:T(128)}, f32[64]{0:T(128)}, f32[5,64]{1,0:T(8,128)}) tuple(%i, %y, %stack)
}

%take_row (p0: f32[5,64], p1: s32[]) -> f32[64] {
  %p0 = f32[5,64]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,64]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
  ROOT %bits = f32[64]{0:T(128)S(1)} bitcast(%slice)
}

%condition (carry.1: (s32[], f32[64], f32[5,64])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, f32[64]{0:T(128)}, f32[5,64]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

ENTRY %main (p: f32[64], q: bf16[16], big: f32[5,64]) -> f32[64] {
  %p = f32[64]{0:T(128)} parameter(0)
  %q = bf16[16]{0:T(256)(128)(2,1)} parameter(1)
  %big = f32[5,64]{1,0:T(8,128)} parameter(2)
  %first = s32[]{:T(128)} constant(0)
  %gather-start = (bf16[16]{0}, bf16[128]{0}) all-gather-start(%q), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %gather-done = bf16[128]{0} all-gather-done(%gather-start)
  %swap = bf16[16]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
  %alone = f32[64]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %init = (s32[], f32[64]{0:T(128)}, f32[5,64]{1,0:T(8,128)}) tuple(%first, %alone, %big)
  %loop = (s32[], f32[64]{0:T(128)}, f32[5,64]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[64]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_collectives_by_hand():
  assert hlo.collective_bytes(TEXT) == {
    "all-gather": {"bytes": 32 * 7, "count": 1},
    "all-reduce": {"bytes": 5 * 256 * 2 * 3 / 4, "count": 5},
    "collective-permute": {"bytes": 32, "count": 1},
  }


def test_memory_by_hand():
  row = 64 * 4
  reduced, sliced, added = 2 * row, row + 4, 2 * row  # of the sum, the row is not in main memory
  entry = 2 * 32 + 2 * 32 + 2 * row  # gathered, swapped, and the sum over one device
  assert hlo.memory_bytes(TEXT) == 5 * (reduced + sliced + added) + entry


def test_a_count_that_is_written_down_wins():
  known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
  assert hlo.collective_bytes(known)["all-reduce"]["count"] == 3


def test_loops_until_something_happens_run_as_often_as_is_said():
  unknown = TEXT.replace("compare(%i.1, %five)", "compare(%i.1, %other)").replace(
    "%five = s32[]{:T(128)} constant(5)", ""
  )
  assert hlo.collective_bytes(unknown, while_trips=2.5)["all-reduce"]["count"] == 2.5


def test_branches_count_once():
  branches = """\
HloModule m, num_partitions=4

%one (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

%two (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8], i: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%one, %two}
}
"""
  assert hlo.collective_bytes(branches) == {"all-reduce": {"bytes": 32 * 2 * 3 / 4, "count": 1}}


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo.parse("HloModule nothing")


@pytest.mark.parametrize("rounds", [1, 7])
def test_a_compiled_product_over_eight_devices(rounds):
  """x [64, 128] @ w [128, 32], contracted over the devices: each round sums f32[64, 32] over all of them."""
  mesh = Mesh(np.asarray(jax.devices()[:8]), ("d",))
  place = lambda shape, *axes: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes))
  )

  def products(x, w):
    def once(total, scale):
      y = jax.lax.with_sharding_constraint((x * scale) @ w, NamedSharding(mesh, PartitionSpec()))
      return total + y, None

    return jax.lax.scan(once, jnp.zeros((64, 32)), jnp.arange(rounds, dtype=jnp.float32))[0]

  text = jax.jit(products).lower(place((64, 128), None, "d"), place((128, 32), "d", None)).compile().as_text()
  expected = {"all-reduce": {"bytes": rounds * 64 * 32 * 4 * 2 * 7 / 8, "count": rounds}}
  assert hlo.collective_bytes(text) == expected
  # At the least each round reads both operands and writes the product.
  least = 4 * (64 * 16 + 16 * 32 + 64 * 32)
  assert rounds * least <= hlo.memory_bytes(text) <= rounds * 12 * least + 10 * least


def test_parameters_split_over_devices_are_gathered():
  mesh = Mesh(np.asarray(jax.devices()[:8]), ("d",))
  x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("d")))
  w = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("d")))
  text = jax.jit(lambda x, w: x @ w).lower(x, w).compile().as_text()
  assert hlo.collective_bytes(text) == {"all-gather": {"bytes": 128 * 32 * 4 * 7 / 8, "count": 1}}


def test_a_collective_that_runs_beside_several_fusions_counts_once():
  """As a TPU's compiler writes it: begun in one fusion, carried on in another, ended in a third."""
  body = """\
%{name} (p.{name}: bf16[64,128]) -> bf16[1024,128] {{
  %p.{name} = bf16[64,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %gather.{name} = bf16[1024,128]{{1,0:T(8,128)(2,1)}} all-gather(%p.{name}), channel_id=5, \
replica_groups=mesh['data'=2,'fsdp'=16] {{'fsdp'}}, dimensions={{0}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"{flag}","flag_end":"8"}}}}
}}
"""
  fusions = "".join(body.format(name=name, flag=flag) for name, flag in (("begin", -1), ("go_on", 2), ("end", 2)))
  entry = "ENTRY %main (x: bf16[64,128]) -> bf16[1024,128] {\n  %x = bf16[64,128]{1,0} parameter(0)\n"
  for i, name in enumerate(("begin", "go_on", "end")):
    root = "ROOT " if name == "end" else ""
    entry += f"  {root}%f.{i} = bf16[1024,128]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}\n"
  text = f"HloModule m, num_partitions=32\n\n{fusions}\n{entry}}}\n"
  assert hlo.collective_bytes(text) == {"all-gather": {"bytes": 64 * 128 * 2 * 15, "count": 1}}


def test_work_space_of_gpu_libraries_is_not_written():
  text = """HloModule jit_f, num_partitions=1

ENTRY %main (x: bf16[8,16], k: bf16[16,4]) -> bf16[8,4] {
  %x = bf16[8,16]{1,0} parameter(0)
  %k = bf16[16,4]{1,0} parameter(1)
  %product = (bf16[8,4]{1,0}, s8[4194304]{0}) custom-call(%x, %k), custom_call_target="__cublas$gemm"
  ROOT %y = bf16[8,4]{1,0} get-tuple-element(%product), index=0
}
"""
  assert hlo.memory_bytes(text) == 2 * (8 * 16 + 16 * 4 + 8 * 4)
