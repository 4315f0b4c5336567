#!/usr/bin/env bash
# Installs jaxpref and everything its tests need into .venv-test, in the versions of scripts/locks, then runs the linter,
# the type checker and the tests.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS ...]
#   bash scripts/test.sh fast [PYTEST ARGUMENTS ...]     # the linter, and tests of mathematics, methods, files and docs
#
# Needs Python 3.11 or later ($PYTHON chooses one). Tests marked slow are left out: scripts/test_slow.sh runs those.
# docs/contributing.md says what each holds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment .venv-test '.[test]'
.venv-test/bin/python -m ruff check .
.venv-test/bin/python -m ruff format --check .
types='' log=.venv-test/mypy.log
if [[ "${1:-}" == fast ]]; then
  shift
  set -- tests/{losses,reference,cost,layers,configs,commands,readme,docs,prose,doctest}_test.py \
    tests/{diffusion,objectives,files} tests/training/step_test.py "$@"
else  # the type checker takes one core, so it runs beside the tests
  .venv-test/bin/python -m mypy >"$log" 2>&1 &
  types=$!
fi
status=0
run_tests .venv-test/bin/python "$@" || status=$?
if [ -n "$types" ]; then
  wait "$types" || status=$?
  cat "$log"
fi
exit "$status"
