#!/bin/sh
# All GPU tests and benchmarks, those first that a first run has to show: run where there is a GPU, commit what appears in
# benchmarks/results/. Every part has its own limit, keeps its results as they come, and keeps no other from running.
#
#   sh benchmarks/gpu.sh [python [part ...]]    tests sanitizer benchmark metrics tuning models; all take up to 14 minutes
#   PEER=module:function                        adds an implementation to compare with, as the public kernel
#   PUBLIC_STEP="command ..."                   is run beside the whole models, as a step of the public DINO
#   DRY_RUN=1                                   only prints each command and its limit in seconds
#
# Only the test files that have GPU tests are read: the others need more packages than these. The exit status tells whether
# all parts passed.
cd "$(dirname "$0")/.." || exit 2
python=${1:-python3}
[ $# -gt 0 ] && shift
parts=${*:-tests sanitizer benchmark metrics tuning models}
results=${RESULTS:-benchmarks/results}
mkdir -p "$results"
status=0

if [ -z "$DRY_RUN" ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
    name=$("$python" -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()[:3]))')-$(date -u +%Y-%m-%d)
fi

# run SECONDS FILE COMMAND...: one command, given up when its time is over; FILE in the results keeps what it prints
run() {
    limit=$1 file=$2
    shift 2
    echo "== $limit s: $*"
    [ -n "$DRY_RUN" ] && return
    timeout -k 5 "$limit" "$@" > "$results/$file-$name.txt" 2>&1 || { status=1; echo "failed: $file ($?)"; }
    tail -n 20 "$results/$file-$name.txt"
}

# has TOOL: whether it is installed
has() {
    [ -n "$DRY_RUN" ] || command -v "$1" > /dev/null || { echo "== $1 is not installed"; return 1; }
}

one_test="tests/ops/test_ms_deform_attn_gpu.py::test_gpu_matches_the_reference[32-2-True-False-dtype0]"
metrics=l1tex__data_pipe_lsu_wavefronts.sum,l1tex__t_sector_hit_rate.pct,lts__t_sectors_op_read.sum,lts__t_sectors_op_red.sum
metrics=$metrics,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum
metrics=$metrics,launch__occupancy_per_shared_mem_size,gpu__time_duration.sum

for part in $parts; do
    case $part in
    tests)
        run 130 gpu-tests "$python" -m pytest -q -m gpu $(grep -rl "mark\.gpu" tests --include="test_*.py")
        ;;
    sanitizer)
        # cuda.bindings asks the driver for functions that it may not have; that is no error of ours.
        for tool in "memcheck --report-api-errors no" racecheck; do
            has compute-sanitizer && run 50 "gpu-${tool%% *}" compute-sanitizer --tool $tool --error-exitcode 1 \
                "$python" -m pytest -q "$one_test"
        done
        ;;
    benchmark)
        run 180 gpu-benchmark "$python" -m benchmarks.ms_deform_attn --device cuda --dtype float32 bfloat16 --rounds 20 \
            ${PEER:+--peer "$PEER"}
        ;;
    metrics)
        # The first two launches are forward and backward of the encoder's fused form; nothing is to be waited for then.
        for dtype in float32 bfloat16; do
            has ncu && run 40 "gpu-metrics-$dtype" ncu --csv --kernel-name regex:ms_deform_attn --launch-count 2 --kill yes \
                --metrics "$metrics" "$python" -m benchmarks.ms_deform_attn --device cuda --dtype $dtype --rounds 1 --no-save
        done
        ;;
    tuning)
        run 130 gpu-tuning "$python" -m benchmarks.tune_ms_deform_attn
        ;;
    models)  # each backend is built in a process of its own
        for dtype in float32 bfloat16; do
            run 45 "gpu-inference-$dtype" "$python" -m benchmarks.step --infer --size 800 1333 --batch 1 --rounds 10 \
                --dtype $dtype --backends reference cuda --save "inference-dino-r50-$dtype-$name"
            run 45 "gpu-step-$dtype" "$python" -m benchmarks.step --cfg configs/align_dino.yaml --rounds 10 \
                --dtype $dtype --backends reference cuda --save "step-align-dino-$dtype-$name"
        done
        [ -n "$PUBLIC_STEP" ] && run 40 gpu-public-step sh -c "$PUBLIC_STEP"
        ;;
    *)
        echo "no such part: $part" >&2
        status=2
        ;;
    esac
done
exit $status
