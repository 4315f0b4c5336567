#!/usr/bin/env bash
# Times jaxpref's training steps and the same steps in PyTorch in turn, and prints the table of the two.
#
#   bash scripts/bench_vs_torch.sh [SIZE] [CASES ...]        # SIZE: smoke (default), tiny, sd15, sdxl
#   COMPILE=1 bash scripts/bench_vs_torch.sh sd15 dpo-lora   # PyTorch with torch.compile as well
#
# CASES: dpo-lora dpo-full spo-lora spo-full (default: all). First shows, on miniatures, that both compute the same, and
# stops if they do not. Then jaxpref and PyTorch take turns, ROUNDS times (default: 2), STEPS timed steps each (default:
# 20), BATCH pairs or prompts (default: scripts/bench.py's), in DTYPE (float32 or bfloat16; default: the recipes'). Writes
# OUT_*.json of each run and OUT.md, the table (OUT's default: runs/vs_torch_SIZE). One device: of several GPUs the
# first, unless $CUDA_VISIBLE_DEVICES names another. $PYTHON has jaxpref, torch, diffusers, transformers and peft; by
# default that of .venv-test, which scripts/test.sh makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

size=${1:-smoke}
if (($# > 1)); then cases=("${@:2}"); else cases=(dpo-lora dpo-full spo-lora spo-full); fi
out=${OUT:-runs/vs_torch_$size}
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv-test/bin/python ]; then python=.venv-test/bin/python; fi
fi
modes=(eager)
if [ "${COMPILE:-0}" != 0 ]; then modes+=(compile); fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" scripts/bench_torch.py --check --size "$size" --cases "${cases[@]}"

options=(--size "$size" --cases "${cases[@]}" --steps "${STEPS:-20}")
if [ -n "${BATCH:-}" ]; then options+=(--batch "$BATCH"); fi
if [ -n "${DTYPE:-}" ]; then options+=(--dtype "$DTYPE"); fi
files=()
for ((round = 1; round <= ${ROUNDS:-2}; round++)); do
  "$python" scripts/bench.py "${options[@]}" --out "${out}_jax_$round"
  files+=("${out}_jax_$round.json")
  for mode in "${modes[@]}"; do
    "$python" scripts/bench_torch.py "${options[@]}" --mode "$mode" --out "${out}_torch_${mode}_$round"
    files+=("${out}_torch_${mode}_$round.json")
  done
done
"$python" scripts/bench_torch.py --compare "${files[@]}" --out "$out"
