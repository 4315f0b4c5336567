#!/usr/bin/env bash
# Runs the tests marked slow, which take minutes each, and those that compile for devices that are not there, in an
# environment that also has libtpu and JAX's plug-in for CUDA. Fails if the latter tests cannot run.
#
#   bash scripts/test_slow.sh [PYTEST ARGUMENTS ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment .venv-test-slow '.[test,compile]'
.venv-test-slow/bin/python -m pytest -q -rs -m 'slow or compiler' --all-compilers --timeout=3600 "$@"
