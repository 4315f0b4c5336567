"""Checks an accelerator before it is timed: the packages, and every way of attention against float32.

    python scripts/check_gpu.py --out runs/check_gpu

Attention of the networks' sizes, in bfloat16, by each implementation of `jaxpref.models.attention` that the device has:
its error, of the result and of the gradients, against float32 at full precision, and its time. Writes OUT.json and
OUT.md; the status is 1 if a package is missing, or what jaxpref chooses differs by more than 2 % of the largest number.
On a machine without a GPU it takes small sizes and shows that the check itself works.
"""

import argparse
import importlib
import json
import pathlib
import sys
import time
from typing import Any

PACKAGES = ("ml_collections", "grain", "diffusers", "transformers", "peft", "torch", "orbax.checkpoint", "optax")
# Batch, positions, keys, heads and their size: the self-attention of SD1.5 and SDXL, and SD1.5's to 77 tokens.
SIZES = (
  (8, 4096, 4096, 8, 40),
  (8, 1024, 1024, 8, 80),
  (8, 4096, 77, 8, 40),
  (4, 4096, 4096, 10, 64),
  (4, 1024, 1024, 20, 64),
)
SMALL = ((1, 64, 64, 2, 8), (1, 64, 16, 2, 8))
BOUND = 0.02


def missing() -> list[str]:
  """Packages that cannot be imported, and why."""
  found = []
  for name in PACKAGES:
    try:
      importlib.import_module(name)
    except ImportError as error:
      found.append(f"{name} ({error})")
  return found


def measure(size: tuple[int, int, int, int, int], implementation: str | None) -> dict[str, Any]:
  """Error and seconds of one implementation; None is the one that jaxpref chooses."""
  import jax
  import jax.numpy as jnp

  from jaxpref.models.attention import attention

  b, l, s, h, d = size
  row: dict[str, Any] = {"size": list(size), "implementation": implementation or "chosen"}
  shapes = ((b, l, h, d), (b, s, h, d), (b, s, h, d), (b, l, h, d))
  q, k, v, out = (jax.random.normal(jax.random.key(i), x, jnp.bfloat16) for i, x in enumerate(shapes))

  def both(q: jax.Array, k: jax.Array, v: jax.Array, implementation: Any) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, implementation=implementation), q, k, v)
    return y, *pull(out.astype(y.dtype))

  with jax.default_matmul_precision("highest"):
    expected = jax.jit(lambda q, k, v: both(q, k, v, "chunked"))(*(x.astype(jnp.float32) for x in (q, k, v)))
  run = jax.jit(lambda q, k, v: both(q, k, v, implementation))
  try:
    found = jax.block_until_ready(run(q, k, v))
  except Exception as error:  # whatever the device's library raises is what is to be known
    return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
  relative = lambda a, b: float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
  row["difference"] = max(relative(a, b) for a, b in zip(found, expected, strict=True))
  seconds = []
  for _ in range(10):
    started = time.perf_counter()
    jax.block_until_ready(run(q, k, v))
    seconds.append(time.perf_counter() - started)
  return row | {"seconds": min(seconds)}


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown."""
  lines = ["| batch, positions, keys, heads, size | attention | difference | ms, forward and backward |"]
  lines.append("|---|---|---|---|")
  for r in rows:
    size = ", ".join(map(str, r["size"]))
    numbers = f"{r['error']} |" if "error" in r else f"{r['difference']:.2g} | {1e3 * r['seconds']:.3g}"
    lines.append(f"| {size} | {r['implementation']} | {numbers} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/check_gpu"), help="default: %(default)s")
  args = parser.parse_args()
  if found := missing():
    sys.exit(f"error: these packages cannot be imported: {'; '.join(found)}; install them first.")
  import jax

  from jaxpref.models.attention import cuda_capability

  gpu = jax.default_backend() != "cpu"
  ways = (None, "xla", "chunked", *(["cudnn"] if (cuda_capability() or 0.0) >= 8.0 else []))
  rows = [measure(size, way) for size in (SIZES if gpu else SMALL) for way in ways]
  where = f"On {jax.devices()[0].device_kind}, jax {jax.__version__}, by `python scripts/check_gpu.py`."
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.with_suffix(".json").write_text(json.dumps({"device": where, "rows": rows}, indent=1) + "\n")
  print(f"{table(rows)}\n\n{where}")
  # What jaxpref never takes by itself may fail.
  if wrong := [r for r in rows if r["implementation"] == "chosen" and r.get("difference", 1.0) > BOUND]:
    sys.exit(f"error: attention that jaxpref chooses is wrong or fails: {wrong}")
  args.out.with_suffix(".md").write_text(f"{table(rows)}\n\n{where}\n")


if __name__ == "__main__":
  main()
