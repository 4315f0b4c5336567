#!/usr/bin/env bash
# Installs jaxpref into .venv and aligns the small Stable Diffusion that it ships with SPO, on the CPU. With EXTRA=cuda or
# EXTRA=tpu in the environment it installs JAX for these devices and uses them.
#
#   bash scripts/quickstart.sh [--config.FIELD=VALUE ...]
#
# Run again, it reuses the environment, and resumes or repeats the evaluation of runs/spo_tiny; --workdir=FOLDER
# starts another run. Needs Python 3.11 or later ($PYTHON chooses one) and a network for the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment .venv ".${EXTRA:+[$EXTRA]}"
workdir=runs/spo_tiny
for argument in "$@"; do
  case $argument in -workdir=* | --workdir=*) workdir=${argument#*=} ;; esac
done
.venv/bin/python -m jaxpref.main --config=configs/spo_tiny.py --workdir="$workdir" "$@"

cat <<END

page of it all   $workdir/index.html
table            $workdir/table.md
before, after    $workdir/before_after.png
curves           $workdir/curves.png
exported model   $workdir/export  (torch: diffusers.StableDiffusionPipeline.from_pretrained opens it)
all numbers      $workdir/results.json, $workdir/metrics.jsonl

$(tail -n 1 "$workdir/table.md" 2>/dev/null || true)
END
