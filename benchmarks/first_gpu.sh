#!/usr/bin/env bash
# What only a GPU can tell, in ten minutes: no hub, no network, a table at the end.
#
#     benchmarks/first_gpu.sh              measure, with the Python of the active environment
#     benchmarks/first_gpu.sh --dry_run    list the steps, with the seconds that each may take
#
# Model and texts are made up on the spot: a random LLaMA of 1.2 billion parameters. A step that fails
# or takes too long leaves a gap in the table, and the others go on. Figures are kept in first_gpu/.
set -uo pipefail
cd "$(dirname "$0")/.."
[[ $# -eq 0 || $* == --dry_run ]] || { sed -n '2,8s/^# \?//p' "$0" >&2; exit 2; }
work=first_gpu
export HF_HUB_OFFLINE=1

step() { # seconds, what for, command
    echo "$2 (at most $1 s): ${*:3}"
    [[ ${dry_run:-} ]] || timeout "$1" "${@:3}" || echo "FAILED: $2" >&2
}
training=(python -m benchmarks.training --model_name "$work/model" --dtype bfloat16 --rounds 1
    --max_seq_len 1024 --perdevice_bs 4)
[[ $# -eq 0 ]] || dry_run=1
[[ ${dry_run:-} ]] || rm -rf "$work"

step 60 "model and texts" python -m benchmarks.first_gpu --prepare
step 95 "tests" python -m pytest -m gpu tests/test_gpu.py
for dtype in bfloat16 float32; do
    step 45 "exactness in $dtype" python -m privacy_checks.replay --device auto --dtype "$dtype" \
        --json "$work/exactness-$dtype.json"
done
step 120 "speed with and without privacy" "${training[@]}" --dataset_name "$work/mixed.jsonl" \
    --num_examples 1024 --engines ours-nondp ours-dp --json "$work/training.json"
for tokens in 16 128 1024; do
    step 45 "memory of rows of $tokens tokens" "${training[@]}" --num_examples 64 \
        --dataset_name "$work/rows-$tokens.jsonl" --engines ours-dp --json "$work/memory-$tokens.json"
done
step 90 "sampling" python -m benchmarks.sampling --model_name "$work/model" --num_samples 128 \
    --max_seq_len 128 --repeats 1 --json "$work/sampling.json"
step 10 "the table" python -m benchmarks.first_gpu
