#!/usr/bin/env bash
# Times jaxpref's training steps and the same steps in PyTorch in turn, and prints the table of the two.
#
#   bash scripts/bench/bench_vs_torch.sh [SIZE] [CASES ...]        # SIZE: smoke (default), tiny, sd15, sdxl
#   COMPILE=1 bash scripts/bench/bench_vs_torch.sh sd15 dpo-lora   # PyTorch with torch.compile as well
#
# CASES: dpo-lora dpo-full spo-lora spo-full (default: all). First shows, on miniatures, that both compute the same, and
# stops if they do not (CHECK=0 leaves that out). Then jaxpref and PyTorch take turns, ROUNDS times (default: 2), STEPS
# timed steps each (default: 20), BATCH pairs or prompts (default: scripts/bench/bench.py's), in DTYPE (float32 or bfloat16;
# default: the recipes'). Writes OUT_*.json of each run and OUT.md, the table (OUT's default: runs/vs_torch_SIZE). After an
# interruption or a failed run, the same command makes the missing runs; after that, it makes all of them again.
# One device: of several GPUs the first, unless $CUDA_VISIBLE_DEVICES names another. $PYTHON has jaxpref, torch,
# diffusers, transformers and peft; by default that of .venv-test, which scripts/test.sh makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

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
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1} # on a CPU, for both
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [ "${CHECK:-1}" != 0 ]; then "$python" scripts/parity/torch_check.py --size "$size" --cases "${cases[@]}"; fi

options=(--size "$size" --cases "${cases[@]}" --steps "${STEPS:-20}")
if [ -n "${BATCH:-}" ]; then options+=(--batch "$BATCH"); fi
if [ -n "${DTYPE:-}" ]; then options+=(--dtype "$DTYPE"); fi
if [ -s "$out.md" ]; then rm -f "$out.md" "$out"_{jax,torch}_*.json; fi
files=() failed=0
# timed FILE COMMAND ...: runs it, unless its file is there and says nothing of an error.
timed() {
  files+=("$1")
  if [ -s "$1" ] && ! grep -q '"error"' "$1"; then return; fi
  "${@:2}" || failed=1
}
for ((round = 1; round <= ${ROUNDS:-2}; round++)); do
  timed "${out}_jax_$round.json" "$python" scripts/bench/bench.py "${options[@]}" --out "${out}_jax_$round"
  for mode in "${modes[@]}"; do
    place=${out}_torch_${mode}_$round
    timed "$place.json" "$python" scripts/bench/bench_torch.py "${options[@]}" --mode "$mode" --out "$place"
  done
done
if ((failed)); then
  echo "error: not all runs ended, see above; the same command runs those that are missing." >&2
  exit 1
fi
"$python" scripts/bench/bench_torch.py --compare "${files[@]}" --out "$out"
