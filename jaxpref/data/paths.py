"""Files and folders of this machine or of a bucket: gs://, s3://, az:// and hf://.

A local path is a pathlib.Path. A path in a bucket is an etils.epath.Path, which reaches it through fsspec (or
TensorFlow, if that is installed) and has the same methods, except those that the functions below replace. Any error of
a bucket is an OSError of one sentence.
"""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxpref.recipes import places

Path = str | os.PathLike
# Scheme -> the package through which fsspec reaches it.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
PART = ".part"  # ending of files that are being written


class CannotBeWritten(OSError):
  """Raised if a file cannot be written: no space, no permission, or no such folder."""


def open_path(path: Path) -> Any:
  """Returns the path as an object with the methods of pathlib.Path.

  Raises:
    ValueError: the path has another kind than those above, or a package for it is missing.
    OSError: the bucket cannot be reached.
  """
  text = os.fspath(path)
  scheme, separator, _ = text.partition("://")
  if not separator:
    return pathlib.Path(places.expand(text))
  if not isinstance(path, str):
    return path  # already etils'
  if scheme not in PACKAGES:
    raise ValueError(f"{text} is not a place for data; expected a path, or {'://, '.join(PACKAGES)}://.")
  from etils import epath

  place = epath.Path(text)
  with _one_sentence(place):
    place.exists()
  return place


def is_remote(path: Path) -> bool:
  """Returns whether a path lies in a bucket."""
  return "://" in os.fspath(path)


def check_array_record(folder: Path) -> None:
  """Raises for a folder of ArrayRecord files in a bucket that their reader does not support.

  Raises:
    ValueError: the folder is such a folder.
  """
  if is_remote(folder) and not os.fspath(folder).startswith("gs://"):
    raise ValueError(
      f"{folder}: ArrayRecord files can only be read from this machine and from gs://; copy the folder to this "
      "machine, or mount the bucket."
    )


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
  """Turns the errors that clients of buckets raise into an OSError, or a ValueError with the remedy."""
  try:
    yield
  except ImportError as error:
    package = PACKAGES.get(os.fspath(path).partition("://")[0], "fsspec")
    raise ValueError(
      f"{path} cannot be reached without the package {package} ({error}); pip install {package}, or copy the data to "
      "this machine."
    ) from error
  except OSError:
    raise
  except Exception as error:
    if not is_remote(path):
      raise
    raise OSError(
      f"{path} cannot be reached ({type(error).__name__}: {error}); check its name, the network and your permissions."
    ) from error


def read(path: Any) -> bytes:
  """Returns the content of a file."""
  with _one_sentence(path):
    return path.read_bytes()


def open_text(path: Any) -> io.TextIOWrapper:
  """Opens a UTF-8 file as its lines, with their line ends; skips a byte order mark."""
  stream: BinaryIO = io.BytesIO(read(path)) if is_remote(path) else path.open("rb")
  return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def lines(text: str) -> list[str]:
  r"""Returns the lines of a text without their ends, which are only \n, \r\n and \r.

  `str.splitlines` also cuts at U+2028, form feeds and others, which are characters of a prompt or of JSON.
  """
  return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def is_whole_text(text: str) -> bool:
  r"""Returns whether a text can be written as UTF-8: JSON's "\ud83d" alone is half of a character.

  >>> is_whole_text("caf\u00e9"), is_whole_text("\ud83d")
  (True, False)
  """
  return not any("\ud800" <= c <= "\udfff" for c in text)


def names(folder: Any) -> set[str]:
  """Returns the names of everything in a folder; empty if the folder does not exist."""
  try:
    with _one_sentence(folder):
      return {entry.name for entry in folder.iterdir()} if is_remote(folder) else set(os.listdir(folder))
  except (FileNotFoundError, NotADirectoryError):
    return set()


def identities(folder: Any) -> dict[str, int | None]:
  """Returns the names of everything in a folder, with a number for each local file.

  The number is equal for two names of one file: links of both kinds, or names in capitals if case makes no difference.
  No file is opened, and only symbolic links are asked for their targets. Dangling links are left out.
  """
  if is_remote(folder):
    return dict.fromkeys(names(folder))
  found: dict[str, int | None] = {}
  try:
    device = os.stat(folder).st_dev
    with os.scandir(folder) as entries:
      for entry in entries:
        if not entry.is_symlink():
          found[entry.name] = device << 64 | entry.inode()
        else:
          with contextlib.suppress(OSError):
            target = entry.stat()
            found[entry.name] = target.st_dev << 64 | target.st_ino
  except (FileNotFoundError, NotADirectoryError):
    return {}
  return found


def end_of(path: Any, length: int = 2**16) -> bytes:
  """Returns the last bytes of a file, where Parquet and ArrayRecord index the rest."""
  with _one_sentence(path), path.open("rb") as stream:
    stream.seek(max(0, (size(path) or 0) - length))
    return stream.read()


def size(path: Any) -> int | None:
  """Returns the bytes of a file; None if it does not exist."""
  try:
    with _one_sentence(path):
      found = path.stat()
      if is_remote(path):
        return None if found.is_directory else found.length
      return found.st_size
  except (FileNotFoundError, NotADirectoryError):
    return None


def write(path: Any, content: bytes, *, tag: object = None) -> None:
  """Writes a file; its place has the old one or the new one, never a part.

  Args:
    path: a path in an existing folder.
    content: content of the file.
    tag: see `part_of`.

  Raises:
    CannotBeWritten: the file cannot be written.
  """
  with cannot_be_written(path), _one_sentence(path):
    if is_remote(path):
      path.write_bytes(content)  # it appears as a whole
      return
    with part_of(path, tag=tag) as part:
      part.write_bytes(content)
      move(part, path)


@contextlib.contextmanager
def part_of(path: Any, *, tag: object = None) -> Iterator[pathlib.Path]:
  """Gives the path to write a file at before it is whole, for `move`: beside its place, or local for a bucket.

  Args:
    path: final path of the file.
    tag: part of the temporary name; no other process may have it. None: the process's id.
  """
  if not is_remote(path):
    yield path.with_name(f".{path.name}.{os.getpid() if tag is None else tag}{PART}")
    return
  with tempfile.TemporaryDirectory(prefix="jaxpref-") as temporary:
    yield pathlib.Path(temporary) / path.name


def move(part: pathlib.Path, path: Any) -> None:
  """Gives a finished local file its name, or its place in a bucket, once it is on the disk.

  Raises:
    CannotBeWritten: the file cannot be written.
  """
  with cannot_be_written(path), _one_sentence(path):
    if is_remote(path):
      from etils import epath

      epath.Path(part).copy(path, overwrite=True)
      if size(path) != part.stat().st_size:
        raise OSError(f"{size(path)} of its {part.stat().st_size} bytes arrived")
      return
    _sync(part)
    part.replace(path)
    with contextlib.suppress(OSError):  # some file systems do not support this
      _sync(path.parent)


@contextlib.contextmanager
def cannot_be_written(path: Path) -> Iterator[None]:
  """Names the file in errors of writing it; ArrayRecord's writer raises RuntimeError for all of them."""
  try:
    yield
  except CannotBeWritten:
    raise
  except (OSError, RuntimeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise CannotBeWritten(
      f"{path} cannot be written ({reason}); free some space or choose another folder, and run the same command again."
    ) from error


def check_writable(path: pathlib.Path, option: str) -> None:
  """Raises for a local place that cannot be written; leaves nothing there.

  Args:
    path: a folder or file that may have to be made, with its parents.
    option: the option that named it, for messages.

  Raises:
    CannotBeWritten: the place cannot be written.
  """
  nearest = path if path.is_dir() else next(p for p in path.absolute().parents if p.exists())
  try:
    with tempfile.TemporaryFile(dir=nearest):
      pass
  except OSError as error:
    raise CannotBeWritten(
      f"{option}={path} cannot be written ({error.strerror or error}); choose another place, or get permission for "
      "this one."
    ) from error


def _sync(path: pathlib.Path) -> None:
  """Returns once a file, or the names in a folder, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
