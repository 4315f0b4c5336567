"""Whole states come back bit by bit; damaged ones are seen and passed over; work folders belong to one config."""

import json
import logging
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpref.devices import sharding
from jaxpref.training import checkpoint
from tests import QUICK_FLAGS


def state_of(seed):
  rng = np.random.default_rng(seed)
  return {
    "step": jnp.asarray(seed, jnp.int32),
    "params": {"a.0": {"kernel": jnp.asarray(rng.standard_normal((256, 128)), jnp.float32)}},
    "empty": {},
    "half": jnp.asarray(rng.standard_normal(8), jnp.bfloat16),
  }


def shardings_of(spec, state):
  mesh = sharding.make_mesh(8, 1, 1)
  return jax.tree.map(lambda x: NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec()), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Three saves of which two are kept."""
  folder = tmp_path_factory.mktemp("run")
  saver = checkpoint.Checkpointer(folder, keep=2)
  assert saver.latest_step() is None
  for step in (1, 2, 3):
    saver.save(step, state_of(step), {"next_batch": 10 * step})
  saver.save(3, state_of(4), {})  # a second time: nothing
  saver.wait()
  assert saver.latest_step() == 3
  saver.close()
  return folder


def test_the_last_ones_are_kept(saved):
  assert sorted(p.name for p in (saved / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")])
def test_restores_bit_by_bit_onto_any_sharding(saved, spec):
  expected = state_of(3)
  saver = checkpoint.Checkpointer(saved, keep=2)
  shardings = shardings_of(spec, expected)
  step, state, data = saver.restore(checkpoint.abstract(expected, shardings))
  saver.close()
  assert step == 3
  assert data == {"next_batch": 30}
  assert checkpoint.digest(state) == checkpoint.digest(expected)
  assert state["params"]["a.0"]["kernel"].sharding.spec == spec
  assert state["half"].dtype == jnp.bfloat16


def test_a_state_of_another_shape_is_refused_by_name(saved):
  other = state_of(3)
  other["params"]["a.0"]["kernel"] = jnp.zeros((8, 5))
  del other["half"]
  saver = checkpoint.Checkpointer(saved, keep=2)
  message = (
    r"checkpoints/3 cannot be restored: params/a.0/kernel is float32\[256, 128\] there and float32\[8, 5\] now "
    r"\(and 1 more arrays differ\).*--workdir"
  )
  with pytest.raises(ValueError, match=message):
    saver.restore(checkpoint.abstract(other, shardings_of(PartitionSpec(), other)))
  saver.close()
  assert not (saved / "checkpoints_damaged").exists()  # nothing is wrong with it


def test_a_run_beyond_the_steps_that_are_asked_for_is_refused(saved):
  for enough in (3, 4):
    checkpoint.check_num_steps(saved, enough)
  checkpoint.check_num_steps(saved / "new", 1)
  with pytest.raises(ValueError) as error:
    checkpoint.check_num_steps(saved, 2)
  assert str(error.value) == (
    f"the run in {saved} is at step 3, and config.num_steps is 2; set --config.num_steps to at least 3, or choose "
    f"another --workdir (python -m jaxpref.export {saved} exports what is there)."
  )


def test_digest_sees_one_bit_and_every_name():
  one = state_of(1)
  assert checkpoint.digest(one) == checkpoint.digest(state_of(1))
  changed = state_of(1)
  kernel = np.array(changed["params"]["a.0"]["kernel"])
  kernel.view(np.uint32)[0, 0] ^= 1
  changed["params"]["a.0"]["kernel"] = jnp.asarray(kernel)
  renamed = state_of(1)
  renamed["quarter"] = renamed.pop("half")
  digests = {checkpoint.digest(s) for s in (one, changed, renamed)}
  assert len(digests) == 3


# ---------------------------------------------------------------------------------------------
# Fingerprints


def independent_fingerprint(x):
  """In numpy, one element after the other."""
  mask, total = 2**32 - 1, 0
  words = x.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
  last = words.shape[0] // x.size  # words of an element
  place0 = int(np.prod(x.shape)) * last
  for i, word in enumerate(words.tolist()):
    h = word ^ ((place0 + i) * 0x9E3779B1 & mask)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    total = total + (h ^ h >> 16) & mask
  return total


def fingerprint(x):
  return checkpoint._check({"x": x})[0]["x"][-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_a_fingerprint_sees_every_bit_and_order_but_not_the_sharding(dtype):
  rng = np.random.default_rng(0)
  whole = rng.integers(0, 2, (8, 16)) if dtype == "bool" else rng.standard_normal((8, 16)) * 50
  x = np.asarray(jnp.asarray(whole).astype(dtype))
  expected = independent_fingerprint(x)
  mesh = sharding.make_mesh(2, 2, 2)
  for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, ("fsdp", "tensor"))):
    assert fingerprint(jax.device_put(x, NamedSharding(mesh, spec))) == expected
  seen = {expected}
  first, other = (0, 0), tuple(np.argwhere(x != x[0, 0])[0])
  swapped = x.copy()
  swapped[first], swapped[other] = x[other], x[first]
  seen.add(fingerprint(swapped))
  bits = 1 if dtype == "bool" else 8 * x.dtype.itemsize
  for bit in range(bits):
    flipped = x.copy()
    flipped.reshape(-1).view(f"u{x.dtype.itemsize}")[37] ^= 1 << bit
    seen.add(fingerprint(flipped))
  assert len(seen) == bits + 2


def test_fingerprints_of_zeros_keys_and_numbers():
  kinds = [jnp.zeros(()), jnp.zeros(3), -jnp.zeros(3), jnp.zeros(4), jnp.zeros((2, 2)), jnp.ones((), jnp.int32)]
  kinds += [jax.random.key(0), jax.random.key(1), jax.random.split(jax.random.key(0), 2)]
  assert len({fingerprint(x) for x in kinds}) == len(kinds) - 1  # 4 zeros are 4 zeros; names and shapes stand beside


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, keep=1)
  for bad in (np.nan, np.inf):
    with pytest.raises(FloatingPointError, match="step 1 is not finite"):
      saver.save(1, {"a": jnp.ones(2), "b": jnp.asarray([1.0, bad], jnp.bfloat16)}, {})
  assert saver.latest_step() is None
  saver.close()


# ---------------------------------------------------------------------------------------------
# Damage


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  """One bit in the middle."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(bytes(content))


def largest(step):
  """The file of numbers."""
  return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def change_record(step):
  path = step / "data" / "metadata"
  record = json.loads(path.read_text())
  record["data"]["next_batch"] += 1
  path.write_text(json.dumps(record))


def empty(step):
  shutil.rmtree(step)
  step.mkdir()


DAMAGE = {
  "numbers, a bit": (lambda step: flip(largest(step)), "the numbers of params/a.0/kernel are not those that were"),
  "numbers, half": (lambda step: truncate(largest(step)), "its arrays cannot be read: Requested byte range"),
  "numbers, gone": (lambda step: largest(step).unlink(), "its arrays cannot be read"),
  "tree, half": (lambda step: truncate(step / "state" / "_METADATA"), "its arrays cannot be read"),
  "arrays, half": (lambda step: truncate(step / "state" / "manifest.ocdbt"), "its arrays cannot be read"),
  "arrays, a bit": (lambda step: flip(step / "state" / "manifest.ocdbt"), "its arrays cannot be read: .*checksum"),
  "arrays, gone": (lambda step: (step / "state" / "manifest.ocdbt").unlink(), "its arrays cannot be read: NOT_FOUND"),
  "names, half": (lambda step: truncate(step / "state" / "array_metadatas" / "process_0"), "its arrays cannot be read"),
  "state, gone": (lambda step: shutil.rmtree(step / "state"), "its arrays cannot be read"),
  "record, half": (lambda step: truncate(step / "data" / "metadata"), "its record cannot be read"),
  "record, gone": (lambda step: shutil.rmtree(step / "data"), "its record cannot be read: .*not found"),
  "record, changed": (change_record, "its record has another checksum"),
  "record, no JSON": (lambda step: (step / "data" / "metadata").write_bytes(b"\xff"), "its record cannot be read"),
  "record, a list": (lambda step: (step / "data" / "metadata").write_text("[1]"), "its record cannot be read"),
  "everything": (empty, "its record cannot be read"),
}


@pytest.fixture
def copy(saved, tmp_path):
  """A work folder with good checkpoints of steps 2 and 3."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def abstract_of(state):
  return checkpoint.abstract(state, shardings_of(PartitionSpec(), state))


def restore(folder):
  saver = checkpoint.Checkpointer(folder, keep=2)
  try:
    return saver.restore(abstract_of(state_of(0)))
  finally:
    saver.close()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(copy, capfd, kind):
  damage, reason = DAMAGE[kind]
  damage(copy / "checkpoints" / "3")
  (copy / "checkpoints_damaged" / "3").mkdir(parents=True)  # of an earlier time
  saver = checkpoint.Checkpointer(copy, keep=2)
  step, state, data = saver.restore(abstract_of(state_of(0)))
  assert step == 2 and data == {"next_batch": 20}
  assert checkpoint.digest(state) == checkpoint.digest(state_of(2))
  said = capfd.readouterr().err
  moved = f"moved to {copy}/checkpoints_damaged/3-2, and step 2 is used"
  (line,) = said.splitlines()  # no traceback
  assert re.match(rf"checkpoint {copy}/checkpoints/3 is damaged \({reason}.*{moved}", line), line
  assert (copy / "checkpoints_damaged" / "3-2").is_dir() and not (copy / "checkpoints" / "3").exists()
  saver.save(3, state_of(3), {"next_batch": 30})  # as training goes on
  saver.close()
  assert restore(copy)[0] == 3


def test_orbax_alone_does_not_see_a_flipped_bit(copy):
  flip(largest(copy / "checkpoints" / "3"))
  state = ocp.StandardCheckpointer().restore(copy / "checkpoints" / "3" / "state")
  found, expected = np.asarray(state["params"]["a.0"]["kernel"]), np.asarray(state_of(3)["params"]["a.0"]["kernel"])
  assert (found != expected).any()


def test_what_is_only_for_show_may_be_lost(copy):
  for path in ("_CHECKPOINT_METADATA", "state/_sharding", "commit_success.txt", "state/ocdbt.process_0/manifest.ocdbt"):
    (copy / "checkpoints" / "3" / path).unlink(missing_ok=True)
  step, state, _ = restore(copy)
  assert step == 3 and checkpoint.digest(state) == checkpoint.digest(state_of(3))


def files(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_when_none_is_good_nothing_is_touched(copy):
  flip(largest(copy / "checkpoints" / "3"))
  truncate(copy / "checkpoints" / "2" / "data" / "metadata")
  before = files(copy)
  message = r"no checkpoint in .*checkpoints can be used \(step 3: the numbers of .*; step 2: its record .*--workdir"
  for _ in range(2):
    with pytest.raises(ValueError, match=message):
      restore(copy)
  assert files(copy) == before and not (copy / "checkpoints_damaged").exists()


def test_storage_that_does_not_answer_is_not_damage(copy, monkeypatch):
  for error in (ValueError("UNAVAILABLE: no route"), PermissionError(13, "Permission denied")):

    def fail(*args, error=error, **kwargs):
      raise error

    with monkeypatch.context() as patch:
      patch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
      with pytest.raises(OSError, match="its arrays cannot be reached"):
        restore(copy)
  assert restore(copy)[0] == 3


def test_checkpoints_of_later_versions(copy, capfd):
  record = copy / "checkpoints" / "3" / "data" / "metadata"
  later = {"format": checkpoint.FORMAT + 1, "data": {}, "leaves": {}}
  record.write_text(json.dumps(later | {"checksum": checkpoint._checksum(later)}))
  with pytest.raises(ValueError, match=r"checkpoints/3 cannot be restored: its format is 2, .*use the version"):
    restore(copy)
  assert capfd.readouterr().err == ""


def test_half_written_checkpoints_are_none(copy):
  half = copy / "checkpoints" / "4.orbax-checkpoint-tmp"
  shutil.copytree(copy / "checkpoints" / "3", half)
  assert checkpoint.load_params(copy)[1] == 3
  saver = checkpoint.Checkpointer(copy, keep=2)
  assert saver.latest_step() == 3
  saver.save(4, state_of(4), {})
  saver.close()
  assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["3", "4"]


def test_parameters_of_a_damaged_checkpoint_are_refused(copy):
  expected = np.asarray(state_of(3)["params"]["a.0"]["kernel"])
  np.testing.assert_array_equal(checkpoint.load_params(copy)[0]["a.0"]["kernel"], expected)
  flip(largest(copy / "checkpoints" / "3"))
  message = r"checkpoints/3 cannot be read \(the numbers of params/a.0/kernel .*choose another step"
  with pytest.raises(ValueError, match=message):
    checkpoint.load_params(copy)
  assert checkpoint.load_params(copy, 2)[1] == 2


# ---------------------------------------------------------------------------------------------
# Disks


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capfd):
  """No file may be larger than 50 kB: small ones can be written, the numbers cannot."""
  saver = checkpoint.Checkpointer(tmp_path, keep=1)
  saver.save(1, state_of(1), {"next_batch": 10})
  saver.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
  try:
    saver.save(2, state_of(2), {"next_batch": 20})
    with pytest.raises(OSError, match=r"step 2 could not be saved in .*File too large.*last good one is step 1: free"):
      saver.wait()
    assert saver.latest_step() == 1
    saver.close()  # says it once
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert capfd.readouterr().err == ""  # no traceback
  step, state, _ = restore(tmp_path)
  assert step == 1 and checkpoint.digest(state) == checkpoint.digest(state_of(1))
  saver = checkpoint.Checkpointer(tmp_path, keep=1)
  saver.save(2, state_of(2), {"next_batch": 20})  # there is space again
  saver.close()
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, keep=1)
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "checkpoints").write_text("")  # as root may write to folders that are read-only
  with pytest.raises(OSError, match=r"step 1 could not be saved in .*no earlier one: free space or make the folder"):
    saver.save(1, state_of(1), {})
    saver.wait()
  saver.close()


# ---------------------------------------------------------------------------------------------
# Processes

PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxpref.devices import sharding
from jaxpref.training import checkpoint
mesh = sharding.make_mesh(2, 1, 1)
split = {"w": NamedSharding(mesh, PartitionSpec("data"))}
whole = np.arange(8, dtype=np.float32)
state = {"w": jax.make_array_from_callback((8,), split["w"], lambda index: whole[index])}
saver = checkpoint.Checkpointer(folder, keep=3)
for step in (1, 2, 3):
  saver.save(step, state, {"n": step})
saver.wait()
read = checkpoint._read_state
def read_some(path, *args, **kwargs):  # this part of the last one is damaged
  if index == "1" and path.name == "3":
    raise checkpoint.DamagedError("its arrays cannot be read: it is so")
  return read(path, *args, **kwargs)
checkpoint._read_state = read_some
step, state, data = saver.restore(checkpoint.abstract(state, split))
assert step == 2 and data == {"n": 2}, step
assert saver.latest_step() == 2
saver.save(3, state, {"n": 3})
saver.close()
"""


def test_processes_agree_on_the_step(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  root = str(pathlib.Path(checkpoint.__file__).parents[2])
  environment = dict(os.environ, XLA_FLAGS=QUICK_FLAGS, PYTHONPATH=root)
  arguments = [[sys.executable, "-c", PROCESS, str(port), str(i), str(tmp_path)] for i in range(2)]
  running = [subprocess.Popen(a, env=environment, stderr=subprocess.PIPE, text=True) for a in arguments]
  try:
    said = [process.communicate(timeout=200)[1] for process in running]
  finally:
    for process in running:
      process.kill()
  assert [process.returncode for process in running] == [0, 0], said
  assert "checkpoints/3 is damaged (process 1 cannot read its part); it was moved to" in said[0]
  assert "damaged" not in said[1]  # process 0 speaks and moves
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]
  assert [p.name for p in (tmp_path / "checkpoints_damaged").iterdir()] == ["3"]


# ---------------------------------------------------------------------------------------------
# Work folders

CONFIG = {"objective": "dpo", "num_steps": 10, "loss": {"beta": 1.0}, "logging": {"every": 1}}
MAY_CHANGE = ("num_steps", "logging.")


def test_a_new_folder_is_claimed_and_recognised(tmp_path):
  folder = tmp_path / "a" / "b"
  checkpoint.claim_workdir(folder, CONFIG, may_change=MAY_CHANGE)
  assert json.loads((folder / "config.json").read_text()) == CONFIG
  (folder / "checkpoints").mkdir()
  longer = CONFIG | {"num_steps": 20, "logging": {"every": 5}}
  checkpoint.claim_workdir(folder, longer, may_change=MAY_CHANGE)
  assert json.loads((folder / "config.json").read_text()) == longer


def test_a_folder_of_another_config_is_left_alone(tmp_path):
  checkpoint.claim_workdir(tmp_path, CONFIG, may_change=MAY_CHANGE)
  before = (tmp_path / "config.json").read_text()
  other = CONFIG | {"loss": {"beta": 2.0}, "objective": "tdpo"}
  with pytest.raises(ValueError, match=r"loss.beta is 1.0 there and 2.0 now \(and 1 more"):
    checkpoint.claim_workdir(tmp_path, other, may_change=MAY_CHANGE)
  assert (tmp_path / "config.json").read_text() == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match=r"is not empty and holds no config.json"):
    checkpoint.claim_workdir(tmp_path, CONFIG)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
  (tmp_path / "runs").write_text("")
  with pytest.raises(ValueError, match=r"runs is a file"):
    checkpoint.claim_workdir(tmp_path / "runs", CONFIG)


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
    checkpoint.claim_workdir(tmp_path, CONFIG)


def test_writes_of_orbax_that_nobody_waits_for_log_no_traceback(tmp_path, caplog):
  """Whether asyncio logs them depends on when their tasks are collected; other tasks are not Orbax's."""
  checkpoint.Checkpointer(tmp_path, keep=1).close()
  logger = logging.getLogger("asyncio")
  for path in ("orbax/checkpoint/_src/serialization/serialization.py", "mine.py"):
    logger.error("Task exception was never retrieved\nfuture: <Task finished coro=<write() defined at %s:188>>", path)
  assert [record.args[0] for record in caplog.records if record.name == "asyncio"] == ["mine.py"]
