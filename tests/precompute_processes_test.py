"""Two processes under jax.distributed precompute one folder: killed, continued, and with the bytes of a single one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxpref import precompute
from jaxpref.data import latents
from tests import QUICK_FLAGS

REPOSITORY = pathlib.Path(__file__).parents[1]
NUM_PAIRS, ROWS_PER_FILE = 22, 3
NUM_FILES = -(-NUM_PAIRS // ROWS_PER_FILE)

# The command, except that a process may kill itself.
COMMAND = """
import os, signal, sys
dies_in = int(sys.argv[1])
from jaxpref import precompute
from jaxpref.data import latents

write_file, calls = latents.write_file, []

def until_killed(folder, name, records, **kwargs):
  calls.append(name)
  if len(calls) == dies_in:
    records = (record if i < 2 else os.kill(os.getpid(), signal.SIGKILL) for i, record in enumerate(records))
  write_file(folder, name, records, **kwargs)

latents.write_file = until_killed
precompute.WAIT_SECONDS = 0.1
sys.argv[1:] = sys.argv[2:]
precompute.start()
"""


def write_pairs(folder):
  rng = np.random.default_rng(0)
  (folder / "images").mkdir(parents=True)
  rows = []
  for i in range(NUM_PAIRS):
    row = {"caption": ["red apple", "grinning cat", "volcano", f"number {i}"][i % 4], "label_0": i % 2}
    for side in (0, 1):
      row[f"image_{side}"] = f"images/{i}_{side}.png"
      Image.fromarray(rng.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(folder / row[f"image_{side}"])
    rows.append(row)
  (folder / "images" / "5_1.png").write_bytes(b"no image")
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return folder / "pairs.jsonl"


def start(pairs, out, *, address="", rank=0, dies_in=0):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": QUICK_FLAGS,
    "PYTHONPATH": str(REPOSITORY),
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
  }
  fields = {"data.source": "pairs_file", "data.path": pairs, "data.flip": True}
  return subprocess.Popen(
    [
      *(sys.executable, "-c", COMMAND, str(dies_in)),
      f"--config={REPOSITORY / 'configs' / 'dpo_sd15.py'}:smoke",
      *(f"--config.{name}={value}" for name, value in fields.items()),
      *(f"--out={out}", f"--rows_per_file={ROWS_PER_FILE}", "--batch_size=4"),
      *([f"--coordinator_address={address}", "--num_processes=2", f"--process_id={rank}"] if address else []),
    ],
    env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def start_two(pairs, out, **kwargs):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  return [start(pairs, out, address=address, rank=rank, **kwargs) for rank in (0, 1)]


def ended(processes):
  """Exit codes, and what was said."""
  said = [process.communicate(timeout=240)[1] for process in processes]
  return [process.returncode for process in processes], said


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow  # precompute_test.py kills one process and lets two share the work
def test_two_processes_that_are_killed_and_continue_make_the_bytes_of_one(tmp_path):
  pairs, one, two = write_pairs(tmp_path), tmp_path / "one", tmp_path / "two"
  single, killed = start(pairs, one), start_two(pairs, two, dies_in=3)
  codes, said = ended([single, *killed])
  assert codes[0] == 0, said[0]
  assert all(code < 0 for code in codes[1:]), said  # by the signal, or because the other one was gone
  names = [latents.file_name("rows", i, NUM_FILES) for i in range(NUM_FILES)]
  before = {name: (two / name).stat().st_mtime_ns for name in names if latents.finished(two, name)}
  assert 1 <= len(before) <= 4 and list(two.glob(".*.part")) and not (two / "manifest.json").exists()

  codes, said = ended(start_two(pairs, two))
  assert codes == [0, 0], said
  assert files(two) == files(one)
  assert {name: (two / name).stat().st_mtime_ns for name in before} == before  # what was whole was not made again
  assert precompute.verify(two) == [] and not any("Traceback" in text for text in said)
  manifest = latents.open_folder(two).manifest
  assert manifest["num_rows"] == NUM_PAIRS and manifest["skipped"] == ["'pairs.jsonl:6'"]
  assert sum(file["records"] for name, file in manifest["files"].items() if name in names) == NUM_PAIRS + NUM_FILES
