#!/usr/bin/env bash
# Installs jaxpref and everything its tests need into .venv-test, then runs the linter, the type checker and the tests.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS ...]
#
# Needs Python 3.11 or later ($PYTHON chooses one). Tests marked slow are left out: scripts/test_slow.sh runs those.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment .venv-test '.[test]'
python=.venv-test/bin/python
"$python" -m ruff check .
"$python" -m mypy
# Compilation uses one core, so two processes help; a file's tests stay together and share what they compiled.
# In the order of their names, so that the long files are not all among the last.
"$python" -m pytest -q --durations=20 --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
