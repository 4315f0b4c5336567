# Sourced by the other scripts: `environment FOLDER REQUIREMENT` makes a virtual environment once.

# Modules are compiled when they are first imported, rather than all of them at installation, which takes as long again.
unset PYTHONDONTWRITEBYTECODE

: "${NEWEST:=}"  # 1: the newest version of every library, rather than those of scripts/locks

# Prints the first Python that can make virtual environments: $PYTHON, else one that has a lock, else any from 3.11 on.
find_python() {
  local candidate wanted candidates=(python3 python3.12 python3.11 python3.13 python3.14 python)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for wanted in 'version[:2] in ((3, 11), (3, 12))' 'version >= (3, 11)'; do
    for candidate in "${candidates[@]}"; do
      if "$candidate" -c "import ensurepip, venv; from sys import version_info as version; assert $wanted" \
        >/dev/null 2>&1; then
        "$candidate" -c 'import sys; print(sys.executable)'
        return
      fi
    done
  done
  echo "error: found no Python of at least 3.11 with venv (tried ${PYTHON:-python3, python3.11 to python3.14});" \
    "install one (on Debian: python3 and python3-venv), or name it: PYTHON=/path/to/python bash $0" >&2
  return 1
}

# Prints the file with the versions that were tested together for the Python $1; nothing if there is none.
lock_of() {
  local lock
  lock=scripts/locks/python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
  if [ -f "$lock" ]; then echo "$lock"; fi
}

# Installs REQUIREMENT (such as `.` or `.[test]`) into FOLDER, unless that was done for this pyproject.toml and lock.
# The versions are those of the lock; with NEWEST=1 in the environment, or a Python without a lock, the newest.
environment() {
  local folder=$1 requirement=$2 python lock='' log started=$SECONDS
  local stamp="$folder/installed.txt" wanted
  python=$(find_python)
  if [ -z "$NEWEST" ]; then lock=$(lock_of "$python"); fi
  wanted="$requirement $PWD $(cat pyproject.toml ${lock:+"$lock"} | cksum) $("$python" --version)"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$folder/bin/python" -c '' 2>/dev/null; then
    return
  fi
  log="$folder/install.log"
  echo "installing jaxpref and its libraries into $folder with $("$python" --version); this takes a few minutes ..." >&2
  if [ -z "$lock$NEWEST" ]; then
    echo "warning: scripts/locks has no versions for this Python; the newest of all libraries may not work together" >&2
  fi
  "$python" -m venv --clear "$folder"
  # Older pips hold the environment that builds a package to PIP_CONSTRAINT, newer ones to PIP_BUILD_CONSTRAINT.
  if ! env ${lock:+PIP_CONSTRAINT="$lock${PIP_CONSTRAINT:+ $PIP_CONSTRAINT}" PIP_BUILD_CONSTRAINT="$lock"} \
    "$folder/bin/python" -m pip install --quiet --no-input --no-compile --disable-pip-version-check \
    --editable "$requirement" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "error: installing $requirement into $folder failed (all of pip's output: $log); is there a network?" >&2
    return 1
  fi
  echo "$wanted" >"$stamp"
  echo "installed in $((SECONDS - started)) s" >&2
}

# Runs the fast tests with the Python $1.
run_tests() {
  local python=$1
  shift
  # Compilation uses one core, so two processes help; a file's tests stay together and share what they compiled.
  # In the order of tests/conftest.py, in which the long files come first.
  # What was skipped is named at the end.
  "$python" -m pytest -q -rs --durations=20 --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
}
