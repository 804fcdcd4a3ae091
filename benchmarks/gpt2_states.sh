#!/bin/sh
# States and a window of 128 tokens in place of a cache, on the GPT-2 study model: without training, and after 5 M tokens of
# distillation; with windows spread over heads, and with the same one in every head. On a GPU.
#   sh benchmarks/gpt2_states.sh MODEL HELD_OUT_BOOKS OTHER_BOOKS OUTPUT
set -eu
model=$1 held_out=$2 other=$3 output=$4
mkdir -p "$output"
window="--block-size 32 --top-k 3 --selection recent"

study() { # name, learning rate, windows of a step, then options of the calibration
    name=$1 lr=$2 step=$3
    shift 3
    python3 -m bsbr.cli convert "$model" "$output/converted_$name" $window --dense-below 0 --calibrate "$other" \
        --calibration-tokens 65536 --calibration-length 1024 --calibration-queries 1024 --device cuda "$@"
    python3 -m bsbr.cli finetune "$output/converted_$name" "$output/finetuned_$name" --text "$other" --val "$held_out" \
        --scope all --precision float16 --length 1024 --batch-windows "$step" --accumulation 1 --distill-tokens 5000000 \
        --lr "$lr" --eval-interval 122 --eval-windows 12 --save-interval 1000000 --device cuda
    python3 -m benchmarks.fidelity --model "$model" --text "$held_out" --calibration-text "$other" --length 1024 --after 256 \
        $window --windows 40 --batch-tokens 20480 --calibration-tokens 65536 --calibration-queries 1024 --device cuda \
        --finetuned "$output/finetuned_$name" --output "$output/fidelity_gpt2-30m_$name.json" "$@"
}

study window 2e-5 8
study window_even 1e-4 4 --even-top-k
