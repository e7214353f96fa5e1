#!/usr/bin/env bash
# The whole pipeline on a real model and real instructions, on a machine with Python 3.11+ and git:
# SmolLM2-135M learns to write instructions like a private data set's, with differential privacy.
#
#     ./quickstart.sh
#     ./quickstart.sh --annotate     # also label the synthetic instructions with the local model
#                                    # through the annotation script, and tune on that
#
# It takes about 17 minutes on two cores and 3 GB of disk (more where PyTorch comes with CUDA), and is
# a demonstration: a model this small, tuned in minutes, writes in the form of the private prompts,
# and seldom makes sense. Interrupted, it goes on where it was; finished, it shows its summary again.
set -euo pipefail
case "$*" in "" | --annotate) ;; *) echo "usage: ./quickstart.sh [--annotate]" >&2; exit 2 ;; esac
cd "$(dirname "$0")"
. utils/venv.sh
use_venv requirements.txt

say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

say "The whole pipeline on a small real model: about 17 minutes on two cores, 3 GB of disk"
say "1/8  base model and private data"
python data/prepare_quickstart.py

base="--model_name data/quickstart_model --max_seq_len 128 --perdevice_bs 16"
sampling="--top_p 0.95 --temperature 0.8"
# Two runs and a histogram read the same rows, so they share one budget: at these noise multipliers all
# of them together spend epsilon 7.89, where two runs calibrated for 8 each would spend more.
private="--eps 8 --delta 1e-5 --loss_normalization tokens --resume auto"

say "2/8  Type A: learn to write instructions, with differential privacy"
instructions="--dataset_name quickstart_instructions --job_sess quickstart_instructions
    --prompt_style uncond_generation --target_modules all-linear --noise banded --audit_canaries 500
    --reserve_histogram_sigma 10"
# What could be had for a quarter of an epoch at the 6.4 that leaves room for Type C, and the run that
# is marked. 500 made-up rows more, and a checkpoint of every step, to audit this very run by.
python generate_train_command.py --advise $instructions $base --eps 6.4 --delta 1e-5 --num_epochs 0.24 >&2
python generate_train_command.py --run $instructions $base $private \
    --total_bs 64 --num_epochs 0.239685 --clip 0.5 --lr_scheduler cosine --warmup_steps 1 --lr 0.02 \
    --bands 19 --noise_multiplier 0.577 \
    --max_eval_examples 128 --save_steps 1 --keep_checkpoints 100

say "3/8  Type B: sample synthetic instructions"
python generate_inference_command.py --run --instruction_file utils/syn_instruct.txt \
    --num_samples 96 --adapter_path outputs/quickstart_instructions/adapter \
    --job_sess quickstart_instructions --prompt_style uncond_generation $base $sampling
# What the base writes untuned, to read next to it.
python generate_inference_command.py --run --instruction_file utils/syn_instruct.txt \
    --num_samples 6 --job_sess quickstart_untuned --prompt_style uncond_generation $base $sampling

say "4/8  resample: select by a DP histogram of the private data"
[ -d resampling/quickstart/synthetic ] || python -m resample_with_dp_histogram.extract \
    --instructions inference_outputs/quickstart_instructions \
    --output resampling/quickstart/synthetic
python -m resample_with_dp_histogram.embed --synthetic --model data/quickstart_embedder \
    --instructions resampling/quickstart/synthetic/instructions.jsonl \
    --output resampling/quickstart/synthetic_embeddings
python -m resample_with_dp_histogram.embed --private --model data/quickstart_embedder \
    --instructions data/quickstart_instructions --split train \
    --output resampling/quickstart/private_data
[ -d resampling/quickstart/selected ] || python -m resample_with_dp_histogram.resample \
    --private_embeddings resampling/quickstart/private_data \
    --synthetic_embeddings resampling/quickstart/synthetic_embeddings \
    --synthetic_instructions resampling/quickstart/synthetic/instructions.jsonl \
    --output resampling/quickstart/selected --num_bins 6 --num_samples 12

say "5/8  Type C: learn to answer, with differential privacy"
# A small rank leaves the noise fewer numbers to be in, and so few steps need a high rate.
python generate_train_command.py --run --dataset_name labelled_quickstart \
    --job_sess quickstart_answers --prompt_style vicuna $base $private \
    --noise_multiplier 0.42 --clip 1.0 \
    --lora_r 2 --lr 4e-3 --total_bs 64 --num_epochs 0.075 --max_eval_examples 64

say "6/8  Type D: answer held-out questions"
python generate_inference_command.py --run --instruction_file data/quickstart_questions.txt \
    --adapter_path outputs/quickstart_answers/adapter \
    --job_sess quickstart_answers --prompt_style vicuna $base $sampling

if [ "$*" = --annotate ]; then
    say "more  annotate the synthetic instructions with the local model, and Type C on the answers"
    python -m pip install --quiet --disable-pip-version-check fastapi==0.165.0 uvicorn==0.54.0
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    mkdir -p outputs/hub_cache
    HF_HUB_CACHE=outputs/hub_cache HF_HUB_OFFLINE=1 transformers serve data/quickstart_model \
        --device cpu --port "$port" --continuous-batching --cb-num-blocks 32 \
        --cb-max-batch-tokens 256 > outputs/annotator.log 2>&1 &
    trap "kill $! 2> /dev/null || true" EXIT
    python -m query_gpt35_for_annotation.annotate --concurrency 16 \
        --instructions resampling/quickstart/selected/selected.jsonl \
        --output annotations/quickstart --base_url "http://127.0.0.1:$port/v1" \
        --model data/quickstart_model --max_tokens 160
    [ -d data/labelled_quickstart_synthetic ] ||
        python -m query_gpt35_for_annotation.build_dataset --answers annotations/quickstart \
            --output data/labelled_quickstart_synthetic
    python generate_train_command.py --run --dataset_name labelled_quickstart_synthetic \
        --job_sess quickstart_synthetic_answers --prompt_style vicuna $base --max_seq_len 384 \
        --eps -1 --total_bs 2 --num_epochs 1 --resume auto
fi

say "7/8  evaluate: how good, how close, what leaked"
results=evaluation_outputs/quickstart
[ -f $results/private/perplexity.json ] || python -m evaluation.perplexity \
    --dataset_name quickstart_instructions --split test \
    --adapter_path outputs/quickstart_instructions/adapter \
    --prompt_style uncond_generation --model_name data/quickstart_model --max_seq_len 128 \
    --output $results
[ -f $results/private/distribution.json ] || python -m evaluation.distribution \
    --real data/quickstart_instructions --split test --model data/quickstart_embedder \
    --synthetic resampling/quickstart/synthetic/instructions.jsonl --output $results
[ -f $results/private/memorisation.json ] || python -m evaluation.memorisation \
    --private data/quickstart_instructions --held_out data/quickstart_instructions \
    --synthetic resampling/quickstart/synthetic/instructions.jsonl \
    --embedding_model data/quickstart_embedder --max_embedded 1000 --output $results
audit=reports/quickstart/audit
[ -f $audit/audit_run.json ] || python -m privacy_checks.audit_run outputs/quickstart_instructions \
    --max_checkpoints 3 --output $audit >&2

say "8/8  report"
page="outputs/quickstart_instructions outputs/quickstart_answers --overwrite --output reports/quickstart
    --histogram resampling/quickstart/private_data/histogram_ledger.jsonl
    --samples inference_outputs/quickstart_instructions inference_outputs/quickstart_answers
    --extraction resampling/quickstart/synthetic --selection resampling/quickstart/selected
    --evaluations $results"
if [ "$*" = --annotate ]; then
    page="$page --annotations annotations/quickstart
        --synthetic_runs outputs/quickstart_synthetic_answers"
fi
python -m evaluation.report $page --internal --real data/quickstart_instructions --split test \
    > /dev/null
python -m evaluation.summary --run outputs/quickstart_instructions --num_shown 6 \
    --samples inference_outputs/quickstart_instructions --untuned inference_outputs/quickstart_untuned
echo
python -m evaluation.summary --run outputs/quickstart_answers \
    --samples inference_outputs/quickstart_answers --num_shown 3
if [ "$*" = --annotate ]; then
    echo
    python -m evaluation.summary --run outputs/quickstart_synthetic_answers
fi
echo
python -m evaluation.report $page
python -m privacy_checks.statement outputs/quickstart_instructions outputs/quickstart_answers \
    --histogram resampling/quickstart/private_data/histogram_ledger.jsonl \
    --audit $audit/audit_run.json --output reports/quickstart/statement --overwrite
echo "The page to show to anyone:    $PWD/reports/quickstart/report.html"
echo "The page for your own eyes:    $PWD/reports/quickstart/private/report-internal.html"
echo "A statement for a registry:   $PWD/reports/quickstart/statement/statement.html"
