#!/bin/sh
# All GPU tests and benchmarks in under 8 minutes: run where there is a GPU, commit what appears in benchmarks/results/.
#
#   sh benchmarks/gpu.sh [python]        PEER=module:function adds an implementation to compare with
#
# Only the test files that have GPU tests are read: the others need more packages than these.
#
# A part that fails does not keep the others from running; the exit status tells whether all passed.
cd "$(dirname "$0")/.." || exit 2
python=${1:-python3}
results=benchmarks/results
mkdir -p "$results"
status=0

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
name=$("$python" -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()[:3]))')
date=$(date -u +%Y-%m-%d)

# run SECONDS COMMAND...: one part, given up when its time is over
run() {
    limit=$1
    shift
    echo "== $*"
    timeout "$limit" "$python" "$@" || status=1
}

timeout 130 "$python" -m pytest -q -m gpu $(grep -rl "mark\.gpu" tests --include="test_*.py") > "$results/gpu-tests-$name-$date.txt" 2>&1 || status=1
tail -n 3 "$results/gpu-tests-$name-$date.txt"
run 180 -m benchmarks.ms_deform_attn --device cuda --dtype float32 bfloat16 --rounds 20 ${PEER:+--peer "$PEER"}
run 40 -m benchmarks.inference --device cuda --rounds 10 --save "inference-dino-r50-$name"
run 40 -m benchmarks.inference --device cuda --rounds 10 --autocast bfloat16 --save "inference-dino-r50-bf16-$name"
run 60 -m benchmarks.inference --device cuda --rounds 5 --cfg configs/align_dino.yaml --train --batch 2 \
    model.backbone.pretrained=false model.backbone.norm=batch model.backbone.frozen_stages=0 \
    --autocast bfloat16 --save "step-align-dino-bf16-$name"
exit $status
