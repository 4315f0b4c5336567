#!/usr/bin/env bash
# Runs the type checker and the fast tests with the newest version of every library that pyproject.toml allows, and prints
# what is newer than scripts/locks and what broke.
#
#   bash scripts/test_newest.sh [PYTEST ARGUMENTS ...]
#
# It makes .venv-newest from nothing each time. docs/contributing.md says when to run it, and what to do with the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NEWEST=1
source scripts/environment.sh

rm -rf .venv-newest
environment .venv-newest '.[test]'
python=.venv-newest/bin/python
lock=$(lock_of "$python")

compare() { # prints a line for each library that is not in the lock in this version
  if [ -z "$lock" ]; then
    echo "scripts/locks has no versions for $("$python" --version)"
    return
  fi
  "$python" -m pip list --format=freeze --disable-pip-version-check --exclude-editable --exclude pip |
    awk -F == 'function name(x) { gsub("[-_.]+", "-", x); return tolower(x) }
      { sub("[+].*", "", $2) }
      NR == FNR { locked[name($1)] = $2; next }
      !(name($1) in locked) { printf "%s %s is not in the lock\n", $1, $2; different = 1; next }
      $2 "" != locked[name($1)] "" { printf "%s %s, in the lock %s\n", $1, $2, locked[name($1)]; different = 1 }
      END { if (!different) print "every library has the version of the lock" }' <(grep == "$lock") -
}

broken=()
"$python" -m mypy || broken+=("the type checker")
run_tests "$python" -rfE "$@" || broken+=("tests (the lines FAILED and ERROR above)")
printf '\nCompared with %s:\n' "${lock:-the lock}"
compare | sed 's/^/  /'
if [ ${#broken[@]} -gt 0 ]; then
  printf 'Broken: %s\n' "${broken[@]}"
  exit 1
fi
echo "Nothing broke."
