#!/usr/bin/env bash
# Makes the tables of docs/results/benchmarks.md that need an accelerator: each step's speed, PyTorch's, and memory.
#
#   bash scripts/bench/bench_gpu.sh [OUT]                           # OUT: runs/bench_gpu; hours
#   SIZES=sd15 CASES="dpo-lora sample" bash scripts/bench/bench_gpu.sh
#
# SIZES (default: sd15 sdxl; also smoke, tiny) times CASES (default: all of scripts/bench/bench.py). Of DPO and SPO, LoRA and
# full, PyTorch takes turns with jaxpref (scripts/bench/bench_vs_torch.sh, whose STEPS, ROUNDS, BATCH, DTYPE, CHECK and COMPILE
# hold; COMPILE is 1 by default). It begins with the part proof of scripts/bench/accelerator.sh, and stops where that fails.
# What is done is not measured again: after an interruption, the same command continues with the next run.
# One that fails leaves the others, is tried again by the next call, and makes the status 1. Writes OUT/bench.md and
# OUT/vs_torch.md, and the JSON of every run beside them. $PYTHON (default: python3) has jaxpref, JAX for the device,
# torch, diffusers, transformers and peft.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=${1:-runs/bench_gpu}
export PYTHON=${PYTHON:-python3} COMPILE=${COMPILE:-1}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
read -ra sizes <<<"${SIZES:-sd15 sdxl}"
read -ra cases <<<"${CASES:-dpo-lora spo-lora dpo-full spo-full tdpo-lora tdpo-full spm sample}"
mkdir -p "$out"
# A step that was compiled before an interruption is not compiled again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(cd "$out" && pwd)/compiled}
OUT=$out/proof LIMIT=1800 bash scripts/bench/accelerator.sh proof

failed=() speed=() both=()
for size in "${sizes[@]}"; do
  for case in "${cases[@]}"; do
    place=$out/${size}_$case
    case $case in
      dpo-* | spo-*)
        if [ ! -s "$place.md" ] && ! OUT=$place bash scripts/bench/bench_vs_torch.sh "$size" "$case"; then
          failed+=("$size $case")
          if [ -s "${place}_jax_1.json" ]; then speed+=("${place}_jax_1.json"); fi
          continue
        fi
        speed+=("${place}_jax_1.json")
        both+=("$place"_jax_*.json "$place"_torch_*.json)
        ;;
      *)
        options=(--size "$size" --cases "$case" --steps "${STEPS:-20}")
        if [ -n "${BATCH:-}" ]; then options+=(--batch "$BATCH"); fi
        if [ -n "${DTYPE:-}" ]; then options+=(--dtype "$DTYPE"); fi
        if [ ! -s "$place.md" ] && ! "$PYTHON" scripts/bench/bench.py "${options[@]}" --out "$place"; then
          rm -f "$place.md"
          failed+=("$size $case")
          continue
        fi
        speed+=("$place.json")
        ;;
    esac
  done
done

if ((${#speed[@]})); then "$PYTHON" scripts/bench/bench.py --table "${speed[@]}" --out "$out/bench"; fi
if ((${#both[@]})); then "$PYTHON" scripts/bench/bench_torch.py --compare "${both[@]}" --out "$out/vs_torch"; fi
if ((${#failed[@]})); then
  printf 'error: %s failed, see above; the same command tries again.\n' "$(IFS=,; echo "${failed[*]}")" >&2
  exit 1
fi
