"""Finds the user's own code by package.module:Name, and reports its errors in one sentence."""

import contextlib
import difflib
import hashlib
import importlib
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_PACKAGE = str(pathlib.Path(__file__).parents[1]) + os.sep
_SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FIELD = re.compile(r"config\.\w|--\w|\w+=")  # what a sentence about a field begins with
# Errors of a device that is full or lost, which are not the code's fault.
_OF_DEVICES = ("JaxRuntimeError", "XlaRuntimeError")


class OwnCodeError(ValueError):
  """An error of the user's own code: a sentence that names the code and its place."""


def is_own(spec: str) -> bool:
  """Returns whether a text has the form package.module:Name.

  >>> is_own("mine.losses:focal"), is_own("tiny-clip:abc"), is_own("pickscore:1")
  (True, False, False)
  """
  return _SPEC.fullmatch(spec) is not None


def hint(name: str) -> str:
  """Returns how to write a name of one's own, if it has a dot where the colon belongs; else "".

  >>> hint("mine.losses.focal")
  ' (one of your own is package.module:NAME: mine.losses:focal)'
  """
  module, _, last = name.rpartition(".")
  spec = f"{module}:{last}"
  return f" (one of your own is package.module:NAME: {spec})" if is_own(spec) else ""


def import_module(name: str, given: str, what: str) -> ModuleType:
  """Imports a module.

  Args:
    given: the option that names it, for messages.
    what: the name expected in the module.

  Raises:
    OwnCodeError: it cannot be imported.
  """
  try:
    return importlib.import_module(name)
  except (Exception, SystemExit) as error:  # whatever the user's module raises
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_import(frame.filename)]
    where = f", {frames[0].filename}, line {frames[0].lineno}" if frames else ""
    raise OwnCodeError(
      f"{given}: the module {name} cannot be imported ({_raised(error)}{where}); expected package.module:{what} of a "
      "module that Python finds, e.g. by PYTHONPATH."
    ) from error


def _is_import(file: str) -> bool:
  return file.startswith((_PACKAGE, "<frozen importlib")) or file == importlib.__file__


def load_named(spec: str, field: str, what: str) -> Any:
  """Returns the object that package.module:Name names.

  Raises:
    OwnCodeError: the module cannot be imported, or it has no such name.
  """
  module_name, _, name = spec.partition(":")
  module = import_module(module_name, f"{field}={spec}", what)
  if not hasattr(module, name):
    near = difflib.get_close_matches(name, vars(module), n=1)
    near_to = f" (did you mean {near[0]}?)" if near else ""
    raise OwnCodeError(f"{field}={spec}: the module {module_name} has no {name}{near_to}.")
  return getattr(module, name)


def refuse_module_in(folder: pathlib.Path, spec: str, given: str) -> None:
  """Refuses a module that Python would find in a folder, which may be a stranger's.

  Args:
    folder: that of a model.
    spec: package.module:Name.
    given: where the folder says so, for messages.

  Raises:
    OwnCodeError: it lies there.
  """
  home, parts = folder.resolve(), spec.partition(":")[0].split(".")
  for entry in sys.path:
    for count in range(1, len(parts) + 1):
      place = pathlib.Path(entry, *parts[:count]).resolve()
      found = [*place.parent.glob(f"{place.name}.*"), *place.glob("__init__.*")]
      if count < len(parts) and place.is_dir():
        found.append(place)
      if any(file.is_relative_to(home) for file in found):
        raise OwnCodeError(
          f"{given} names {spec}, code in {home}; code in a model's folder is not run: if you trust it, move it out."
        )


def check_function(found: Any, given: str, expected: str, *arguments: Any, **named: Any) -> None:
  """Raises for an object that cannot be called with these arguments.

  Raises:
    OwnCodeError: one sentence.
  """
  if isinstance(found, type) or not callable(found):
    what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
    raise OwnCodeError(f"{given} is {what}; expected {expected}.")
  try:
    signature = inspect.signature(found)
  except ValueError:  # functions of C do not say
    return
  try:
    signature.bind(*arguments, **named)
  except TypeError as error:
    raise OwnCodeError(f"{given} takes {signature}{defined_at(found)}; expected {expected}.") from error


@contextlib.contextmanager
def calling(given: str, spec: str, expected: str, found: Any = None) -> Iterator[None]:
  """Reports what the user's own code raises in the block, in one sentence with the line of that code.

  Errors of the operating system and of devices pass, and so do sentences that begin with the field they are about.

  Args:
    given: what is called, for messages.
    spec: package.module:Name.
    expected: what the code should be or do.
    found: the object that is called; its definition is the place named if no line of it was reached.

  Raises:
    OwnCodeError: the block raised something.
  """
  try:
    yield
  except (Exception, SystemExit) as error:
    sentence = isinstance(error, OwnCodeError) or (isinstance(error, ValueError) and _FIELD.match(str(error)))
    if sentence or isinstance(error, OSError) or type(error).__name__ in _OF_DEVICES:
      raise
    place = raised_at(error, spec) or defined_at(found)
    raise OwnCodeError(f"{given} raised {_raised(error)}{place}; expected {expected}.") from error


def _raised(error: BaseException) -> str:
  """Returns type and first line of an error."""
  first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
  return f"{type(error).__name__}{': ' if first else ''}{first}"


def raised_at(error: BaseException, spec: str) -> str:
  """Returns " (FILE, line N)" of the last line in the package of `spec` that an error passed; "" if there is none."""
  module = sys.modules.get(spec.partition(":")[0])
  top = sys.modules.get(spec.partition(":")[0].partition(".")[0])
  places = [os.path.join(place, "") for place in getattr(top, "__path__", ())]
  places += [file] if (file := getattr(module, "__file__", None)) else []
  if places and ":" in spec:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(tuple(places))]
    if frames:
      return f" ({frames[-1].filename}, line {frames[-1].lineno})"
  return ""


def defined_at(found: Any) -> str:
  """Returns " (FILE, line N)" of a definition; "" if it is not known."""
  with contextlib.suppress(OSError, TypeError):
    if not inspect.isroutine(found) and not isinstance(found, type):
      found = type(found)
    found = inspect.unwrap(found)
    return f" ({inspect.getsourcefile(found)}, line {inspect.getsourcelines(found)[1]})"
  return ""


def described(value: Any) -> str:
  """Returns type and shape of a returned value, in words.

  >>> described(None), described((1, 2)), described(2.0)
  ('None', '2 values', 'a float')
  """
  if value is None:
    return "None"
  if isinstance(value, tuple | list):
    return f"{len(value)} values"
  if hasattr(value, "dtype") and hasattr(value, "shape"):
    return f"{value.dtype}{list(value.shape)}"
  return f"a {type(value).__name__}"


def version(spec: str) -> str:
  """Returns the first digits of the SHA-256 of a module's source; "" where it has none."""
  with contextlib.suppress(OSError, TypeError, ValueError):
    module = importlib.import_module(spec.partition(":")[0])
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16]
  return ""
