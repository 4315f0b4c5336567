#!/usr/bin/env bash
# Runs the tests marked slow, which take minutes each, and those that compile for devices that are not there, in an
# environment that also has libtpu and JAX's plug-in for CUDA. Fails if the latter tests cannot run. Installs Debian's
# chromium if it is missing, for the tests of `jaxpref vote` in a browser, and fails without it.
#
#   bash scripts/test_slow.sh [PYTEST ARGUMENTS ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment .venv-test-slow '.[test,compile,browser]'
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  as_root=()
  if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
  if ! { "${as_root[@]}" apt-get update && "${as_root[@]}" apt-get install --yes --no-install-recommends \
    chromium chromium-driver; } >.venv-test-slow/chromium.log 2>&1; then
    tail -n 5 .venv-test-slow/chromium.log >&2
    echo "error: the tests in a browser need chromium and chromedriver, which could not be installed; install Debian's" \
      "packages chromium and chromium-driver, or the like" >&2
    exit 1
  fi
fi
.venv-test-slow/bin/python -m pytest -q -rs -m 'slow or compiler' --all-compilers --timeout=3600 "$@"
