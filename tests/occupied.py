"""A folder that another process of this machine writes, for tests of who is refused then."""

import contextlib
import dataclasses
import subprocess
from unittest import mock

from jaxpref.data import lease


@contextlib.contextmanager
def occupied(folder, name=lease.NAME):
  """Inside the block; gives the beginning of what is said to a second writer."""
  process = subprocess.Popen(["sleep", "600"])
  try:
    start = lease._process_start(process.pid)
    writer = dataclasses.replace(lease.Writer.here(), pid=process.pid, process_start=start)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(writer.encode())
    with mock.patch.object(lease, "GRACE_SECONDS", 0.0):
      yield f"{folder} is being written by process {process.pid} on host {writer.host}, which started {writer.since}; "
    assert (folder / name).read_bytes() == writer.encode()
  finally:
    process.kill()
    process.wait()
