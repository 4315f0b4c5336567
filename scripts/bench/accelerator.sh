#!/usr/bin/env bash
# Proves on an accelerator what was only computed on CPUs so far, and times it, in minutes; see docs/results/benchmarks.md.
#
#   bash scripts/bench/accelerator.sh [PART ...]      # default: all, in this order, which is that of their value
#
#   proof           metrics of every objective and attention against a CPU's and float32, a picture, a save, a resume
#   dpo-lora-sdxl   ten steps of DPO with LoRA on SDXL: seconds, TFLOP/s, memory, time to compile
#   spo-lora-sdxl   the same for SPO
#   dpo-full-sd15   the same for full training on SD1.5
#   dpo-lora-sd35m  the same for DPO with LoRA on SD3.5 medium at 512 pixels, without T5
#   torch           the step of dpo-lora-sdxl in PyTorch, eager and then compiled, and the ratios
#
# Each part has its own limit in seconds, or LIMIT; if all of them share TOTAL seconds, a part gets at most what
# is left. A part that fails or runs out of time leaves the others and makes the status 1. Results are written as they
# come, to OUT/results.json and OUT/results.txt (default: runs/accelerator); the tables go to OUT/summary.md at the end.
# After an interruption the same command continues where it stopped. Compiled programs are kept in
# JAX_COMPILATION_CACHE_DIR (default: OUT/compiled). SIZE=smoke takes miniatures, for a rehearsal on a CPU. $PYTHON
# (default: python3) has jaxpref's requirements and, for torch, PyTorch, transformers, diffusers and peft.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

declare -A limits=([proof]=180 [dpo-lora-sdxl]=180 [spo-lora-sdxl]=270 [dpo-full-sd15]=120 [dpo-lora-sd35m]=150 [torch]=150)
all=(proof dpo-lora-sdxl spo-lora-sdxl dpo-full-sd15 dpo-lora-sd35m torch)
parts=("$@")
if (($# == 0)); then parts=("${all[@]}"); fi
for part in "${parts[@]}"; do
  if [ -z "${limits[$part]:-}" ]; then
    echo "error: there is no part $part; expected some of ${all[*]}." >&2
    exit 2
  fi
done
out=${OUT:-runs/accelerator}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(cd "$out" && pwd)/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

failed=()
for part in "${parts[@]}"; do
  limit=${LIMIT:-${limits[$part]}}
  if [ -n "${TOTAL:-}" ] && ((limit > TOTAL - SECONDS)); then limit=$((TOTAL - SECONDS)); fi
  if ((limit < 1)); then
    echo "$part: no time is left" >&2
    failed+=("$part")
    continue
  fi
  started=$SECONDS status=0
  timeout --kill-after=10 "$limit" "$python" scripts/bench/accelerator.py "$part" \
    --out "$out" --size "${SIZE:-full}" --limit "$limit" || status=$?
  if ((status)); then failed+=("$part"); fi
  if ((status == 124 || status == 137)); then echo "$part: stopped after $limit s" >&2; fi
  echo "$part: $((SECONDS - started)) s"
done

if [ -s "$out/results.json" ]; then "$python" scripts/bench/accelerator.py --summary --out "$out" || true; fi
if ((${#failed[@]})); then
  echo "error: ${failed[*]} failed or ran out of time; run the same command again to continue." >&2
  exit 1
fi
