#!/usr/bin/env bash
# Installs jaxpref and everything its tests need into .venv-test, in the versions of scripts/locks, then runs the linter,
# the type checker and the tests.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS ...]
#
# Needs Python 3.11 or later ($PYTHON chooses one). Tests marked slow are left out: scripts/test_slow.sh runs those.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment .venv-test '.[test]'
.venv-test/bin/python -m ruff check .
.venv-test/bin/python -m mypy
run_tests .venv-test/bin/python "$@"
