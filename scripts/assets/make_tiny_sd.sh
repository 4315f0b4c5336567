#!/usr/bin/env bash
# Makes the models that jaxpref ships from the embedded emoji, with the project's own recipes, and installs them.
#
#   bash scripts/assets/make_tiny_sd.sh [--config.FIELD=VALUE ...]     # the arguments go to every recipe
#
# Hours on two CPU cores, minutes on a GPU (JAX's for CUDA: pip install jaxpref[cuda] into .venv). Each stage writes to
# runs/NAME; the same command resumes an interrupted one and only re-evaluates those that are finished.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh

environment .venv .
train() {
  local name=$1 recipe=$2
  shift 2
  .venv/bin/python -m jaxpref.main --config="$recipe" --workdir="runs/$name" "$@"
}

train pretrain_tiny_vae configs/pretrain_tiny.py:vae "$@"
train pretrain_tiny_judge configs/pretrain_tiny.py:judge "$@"
# The judge only evaluates: it gives the caption accuracy of the base model.
train pretrain_tiny_unet configs/pretrain_tiny.py:unet --config.judge=runs/pretrain_tiny_judge/export "$@"
train pretrain_tiny_unet_restart configs/pretrain_tiny.py:unet_restart --config.judge=runs/pretrain_tiny_judge/export "$@"
train pretrain_tiny_clip configs/pretrain_tiny.py:clip "$@"
train spm_tiny configs/spm_tiny.py --config.model=runs/pretrain_tiny_unet_restart/export \
  --config.preference_model=runs/pretrain_tiny_clip/export "$@"
.venv/bin/python scripts/assets/install_assets.py
