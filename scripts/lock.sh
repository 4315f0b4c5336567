#!/usr/bin/env bash
# Writes scripts/locks/python3.11.txt and python3.12.txt: the versions that scripts/environment.sh installs.
#
#   bash scripts/lock.sh                                  keeps each version that pyproject.toml still allows
#   bash scripts/lock.sh --upgrade                        takes the newest of everything
#   bash scripts/lock.sh --upgrade-package transformers   takes the newest of one library
#
# One file holds the libraries of all extras, resolved together for Linux on x86-64, so that any extras can be installed
# side by side. It is used as pip constraints: it says which version, never what is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

uv=.venv-lock/bin/uv
if ! "$uv" --version >/dev/null 2>&1; then
  "$(find_python)" -m venv --clear .venv-lock
  .venv-lock/bin/python -m pip install --quiet --no-input --disable-pip-version-check uv
fi
for version in 3.11 3.12; do
  # manylinux_2_31: the oldest Linux that libtpu has wheels for.
  "$uv" pip compile --quiet --no-config --all-extras --no-annotate --no-emit-index-url \
    --custom-compile-command 'bash scripts/lock.sh' --python-version "$version" \
    --python-platform x86_64-manylinux_2_31 --output-file "scripts/locks/python$version.txt" "$@" pyproject.toml
  echo "scripts/locks/python$version.txt: $(grep -c == "scripts/locks/python$version.txt") libraries"
done
