#!/bin/sh
# The GPU figures of README and docs/log.md, one file after the other, on an otherwise idle GPU; TRITON_CACHE_DIR keeps what was
# compiled. Most wanted first.
#   sh benchmarks/kernels_gpu.sh OUTPUT
set -u
output=$1
mkdir -p "$output"

attention() { # file, then options
    file=$1
    shift
    python3 -m benchmarks.attention_gpu --budget 0.3 "$@" --output "$output/$file.json"
}

attention attention_gpu --drop --passes forward forward+backward --lengths 32768 131072 8192 16384 4096 12288 65536
attention attention_gpu_long --budget 60 --lengths 524288 262144 131072 65536 32768 16384 1048576 --longest-peer 262144
python3 -m benchmarks.decode_gpu --output "$output/decode_gpu.json"
python3 -m benchmarks.stages_gpu --lengths 8192 32768 131072 --passes forward forward+backward --output "$output/stages_gpu.json"
python3 -m benchmarks.stages_gpu --lengths 524288 --passes forward --output "$output/stages_gpu_long.json"
attention attention_gpu_b64 --block-size 64 --top-k 16 --passes forward forward+backward --peers sdpa-cudnn \
    --lengths 131072 65536 32768 16384
attention attention_gpu_mha64 --heads 32 --key-heads 32 --width 64 --passes forward forward+backward --peers sdpa-cudnn \
    --lengths 131072 65536 32768 16384
# needs flash-linear-attention, whose kernels try dozens of settings first
attention attention_gpu_others --lengths 16384 65536 --peers sdpa-cudnn \
    --others "linear, fla" "Gated DeltaNet, fla" "additive BSBR"
attention attention_gpu_nsa --heads 32 --key-heads 2 --lengths 16384 65536 131072 --peers sdpa-cudnn --others "NSA, fla"
attention attention_gpu_million --lengths 1048576 --peers sdpa-flash --warm-until 524288
attention attention_gpu_flex --drop --flex-until 32768 --lengths 32768
python3 -m benchmarks.model_gpu --peers sdpa-cudnn --dense-below 8192 --output "$output/model_gpu.json"
