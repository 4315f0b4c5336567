"""scripts/environment.sh and its locks: a new environment gets the versions that were tested together."""

import os
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import conftest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = ("3.11", "3.12")

# Stands for a Python: says that it is version $VERSION, makes "environments", and writes down how pip is called.
PYTHON = f"""#!/bin/bash
case "$*" in
  "--version") echo "Python $VERSION.7" ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip install "*) echo "$PIP_CONSTRAINT | $PIP_BUILD_CONSTRAINT | ${{@: -1}}" >>"$RECORD" ;;
  "-c import ensurepip"*)
    [[ "$2" == *"in ((3, 11), (3, 12))"* && ! "$VERSION" =~ ^3[.]1[12]$ ]] && exit 1
    exit 0 ;;
  "-c import sys; print(\\"%d.%d\\""*) echo "$VERSION" ;;
  "-c import sys; print(sys.executable)") echo "$0" ;;
  "-c ") ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def lock(version):
  lines = (ROOT / f"scripts/locks/python{version}.txt").read_text().splitlines()
  return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_lock_has_an_allowed_version_of_every_library_of_every_extra(version):
  locked = lock(version)
  extras = PROJECT["optional-dependencies"]
  assert set(extras) == {"browser", "compile", "cuda", "tpu", "wandb", "web", "test"}
  requirements = [Requirement(line) for line in sum(extras.values(), PROJECT["dependencies"])]
  environment = default_environment() | {"python_version": version, "python_full_version": f"{version}.0"}
  for requirement in requirements:
    if requirement.marker is None or requirement.marker.evaluate(environment):
      found = locked[canonicalize_name(requirement.name)]
      assert requirement.specifier.contains(found), f"{requirement} and {found}: run scripts/lock.sh"
  assert {"jax-cuda12-plugin", "libtpu", "jaxlib", "tokenizers"} <= set(locked)


def test_the_locks_name_no_registry():
  for version in VERSIONS:
    text = (ROOT / f"scripts/locks/python{version}.txt").read_text()
    assert "://" not in text and "index" not in text


def test_the_classifiers_are_the_locked_pythons():
  locked = {file.stem.removeprefix("python") for file in (ROOT / "scripts/locks").iterdir()}
  assert locked == set(VERSIONS)
  listed = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
  assert listed == locked


@pytest.fixture
def install(tmp_path):
  """Runs `environment` by the stub, in a copy of the scripts whose path has a space."""
  root = tmp_path / "a project"
  (root / "scripts").mkdir(parents=True)
  (root / "scripts" / "environment.sh").write_text((ROOT / "scripts" / "environment.sh").read_text())
  (root / "scripts" / "locks").symlink_to(ROOT / "scripts" / "locks")
  (root / "pyproject.toml").write_text("first")
  python, record = tmp_path / "python", tmp_path / "record"
  python.write_text(PYTHON)
  python.chmod(0o755)
  record.touch()

  def run(version="3.11", requirement=".[test]", **environment):
    before = len(record.read_text().splitlines())
    command = f"set -euo pipefail; source scripts/environment.sh; environment .venv '{requirement}'"
    variables = os.environ | {"PYTHON": str(python), "VERSION": version, "RECORD": str(record)}
    for name in ("NEWEST", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
      variables.pop(name, None)
    done = subprocess.run(
      ["bash", "-c", command], cwd=root, env=variables | environment, capture_output=True, text=True
    )
    return done, record.read_text().splitlines()[before:]

  return run


@pytest.mark.parametrize("version", VERSIONS)
def test_pip_is_held_to_the_lock_of_the_python(install, version):
  done, calls = install(version)
  file = f"scripts/locks/python{version}.txt"
  assert (done.returncode, calls) == (0, [f"{file} | {file} | .[test]"])
  assert "warning" not in done.stderr


def test_constraints_of_the_user_are_kept(install):
  _, (call,) = install(PIP_CONSTRAINT="mine.txt")
  assert call.startswith("scripts/locks/python3.11.txt mine.txt | ")


def test_newest_is_held_to_nothing(install):
  done, calls = install(NEWEST="1")
  assert (done.returncode, calls) == (0, [" |  | .[test]"]) and "warning" not in done.stderr


def test_a_python_without_a_lock_is_used_with_a_warning(install):
  done, calls = install("3.13")
  assert (done.returncode, calls) == (0, [" |  | .[test]"])
  assert "warning: scripts/locks has no versions for this Python" in done.stderr


def test_an_environment_is_made_again_only_when_what_it_is_made_of_changes(install):
  assert len(install()[1]) == 1
  assert len(install()[1]) == 0
  assert len(install(requirement=".")[1]) == 1
  assert len(install("3.12", requirement=".")[1]) == 1
  assert len(install("3.12", requirement=".", NEWEST="1")[1]) == 1


def test_the_files_of_tests_that_begin_first_are_there():
  assert [name for name in conftest.LONGEST if not (ROOT / "tests" / name).is_file()] == []


def test_a_named_python_that_does_not_exist_is_an_error(install):
  done, calls = install(PYTHON="/no/such/python")
  assert done.returncode == 1 and not calls
  assert "/no/such/python" in done.stderr and "name it: PYTHON=" in done.stderr
