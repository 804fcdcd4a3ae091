#!/bin/sh
# The long rows of the Llama study model on a GPU, one after the other: fidelity at 8,192 and 16,384 tokens, fine-tuning at
# 8,192 with the fidelity of its result, sweeps, and the time of a calibration.
#   sh benchmarks/llama_28m.sh MODEL HELD_OUT_BOOKS OTHER_BOOKS OUTPUT
set -eu
model=$1 held_out=$2 other=$3 output=$4
mkdir -p "$output"

fidelity() { # length, first position, windows of a document, tokens of the calibration, then more options
    length=$1 after=$2 windows=$3 tokens=$4
    shift 4
    python3 -m benchmarks.fidelity --model "$model" --text "$held_out" --calibration-text "$other" --length "$length" \
        --after "$after" --windows "$windows" --batch-tokens 40960 --calibration-tokens "$tokens" \
        --calibration-queries 1024 --device cuda "$@"
}

fidelity 8192 2048 5 65536 --retrieval-block-size 32 --top-k 32 --output "$output/fidelity_llama-28m_32.json"
fidelity 16384 4096 3 131072 --retrieval-block-size 32 --top-k 32 --output "$output/fidelity_llama-28m_32_16k.json"

python3 -m bsbr.cli convert "$model" "$output/converted" --top-k 8 --dense-below 0 --calibrate "$other" \
    --calibration-tokens 65536 --calibration-length 8192 --calibration-queries 1024 --device cuda
python3 -m bsbr.cli finetune "$output/converted" "$output/finetuned" --text "$other" --val "$held_out" --scope all \
    --length 8192 --batch-windows 2 --accumulation 1 --distill-tokens 10000000 --lr 2e-5 --scalar-lr 1e-3 \
    --precision float16 --save-interval 150 --eval-interval 122 --eval-windows 6 --device cuda
fidelity 8192 2048 5 65536 --top-k 8 --finetuned "$output/finetuned" --output "$output/fidelity_llama-28m.json"

for length in 8192 16384; do
    python3 -m bsbr.cli evaluate "$model" --sweep --text "$held_out" --documents 8 --lengths $length \
        --budgets 512,1024,2048 --units 32,128 --calibrate "$other" --calibration-tokens 65536 \
        --calibration-queries 512 --batch-tokens 32768 --device cuda --time-device cpu --output "$output/sweep_$length"
done
python3 -m benchmarks.calibration_time --model "$model" --text "$other" --length 8192 --repeats 3 --device cuda \
    --output "$output/calibration_time_gpu.json"
