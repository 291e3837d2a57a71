#!/bin/sh
# All GPU tests and benchmarks in under 8 minutes: run where there is a GPU, commit what appears in benchmarks/results/.
#
#   sh benchmarks/gpu.sh [python]        PEER=module:function adds an implementation to compare with
#
# A part that fails does not keep the others from running; the exit status tells whether all passed.
cd "$(dirname "$0")/.." || exit 2
python=${1:-python}
results=benchmarks/results
mkdir -p "$results"
status=0

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
name=$("$python" -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()[:3]))')
date=$(date -u +%Y-%m-%d)

timeout 180 "$python" -m pytest -q -m gpu tests > "$results/gpu-tests-$name-$date.txt" 2>&1 || status=1
tail -n 3 "$results/gpu-tests-$name-$date.txt"
timeout 280 "$python" -m benchmarks.ms_deform_attn --device cuda --dtype float32 bfloat16 --rounds 20 ${PEER:+--peer "$PEER"} || status=1
exit $status
