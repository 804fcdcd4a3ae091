#!/bin/bash
# What models learn from random weights, on one GPU. Every row is written once, so that the same command goes on where it
# was stopped; each call ends within its seconds and keeps all rows packed in WORK/rows.tgz, every half minute anew.
#   bash benchmarks/training_study.sh timed WORK 110                         speed of steps, with the GPU to itself
#   bash benchmarks/training_study.sh prepare WORK 120 TRAIN VAL TOKENIZER   tokens of the books
#   bash benchmarks/training_study.sh learn WORK 550                         language models, recall, then extension
#   bash benchmarks/training_study.sh gather WORK 60                         result files, in WORK/results
# TOKENS (16777216) are what language models read; NANOGPT is a checkout of nanoGPT to time beside.
set -u
part=$1 work=$2 limit=$3
python=${PYTHON:-python3} tokens=${TOKENS:-16777216}
export PYTHONPATH=src:. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=4
export TORCHINDUCTOR_CACHE_DIR=$work/compiled
mkdir -p "$work"/{speed,models,rates,recall,extension,kept,logs,results}

left() { echo $((limit - SECONDS - 8)); }
pack() { tar -C "$work" -czf "$work/rows.part" speed models rates recall extension logs results && mv "$work/rows.part" "$work/rows.tgz"; }
bench() { # log, benchmark, arguments: within what time is left
    local log=$work/logs/$1.log
    shift
    [ "$(left)" -gt 10 ] && timeout -k 3 "$(left)" "$python" -m "benchmarks.$@" >>"$log" 2>&1
}

timed() { # all compile side by side; the lock is held meanwhile, so that nothing is timed beside a compiler
    local turn=$work/turn
    (flock 9 && sleep "${COMPILING:-55}") 9>>"$turn" &
    sleep 0.3
    bench bsbr training_speed run "$work/speed" --turn "$turn" --parts steps --attention bsbr &
    bench flash training_speed run "$work/speed" --turn "$turn" --parts steps --attention full --kernels flash &
    bench cudnn training_speed run "$work/speed" --turn "$turn" --parts steps --attention full --kernels cudnn &
    bench muon training_speed run "$work/speed" --turn "$turn" --parts mfu --optimizers muon &
    bench adamw training_speed run "$work/speed" --turn "$turn" --parts mfu --optimizers adamw &
    [ -n "${NANOGPT:-}" ] && bench public training_speed run "$work/speed" --turn "$turn" --parts public --public "$NANOGPT" &
    wait
}

recall() { # task: the better of two rates by full attention, then everything with it
    bench "rates-$1" recall rates "$work/rates" --task "$1" --rates 1e-2 3e-3
    local recipe
    recipe=$(cat "$work/rates/$1.recipe" 2>/dev/null || echo '{}')
    bench "$1" recall run "$work/recall" --task "$1" --attention bsbr full --recipe "$recipe"
    bench "$1" recall run "$work/recall" --task "$1" --attention window linear --recipe "$recipe"
}

extension() { # once the language models that it continues are there
    local name
    while [ "$(ls -d "$work"/kept/{bsbr,full}-* 2>/dev/null | wc -l)" -lt 6 ] && [ "$(left)" -gt 60 ]; do sleep 2; done
    for name in {bsbr,full}-0 {bsbr,full}-1 {bsbr,full}-2; do
        [ -e "$work/kept/$name/config.json" ] && bench extension extension_trained run "$work/data" "$work/extension" \
            --model "$name=$work/kept/$name" --method dynamic
    done
}

learn() {
    local name
    for name in bsbr window full linear gated_delta; do
        bench "$name" from_scratch run "$work/data" "$work/models" --attention $name --tokens "$tokens" --compile \
            --keep "$work/kept" &
    done
    for name in passkey mqar needle_multikey; do recall $name & done
    extension &
    wait
}

gather() {
    bench gather training_speed gather "$work/speed" "$work/results/training_speed.json"
    bench gather from_scratch gather "$work/models" "$work/results/from_scratch.json"
    bench gather recall gather "$work/recall" "$work/results/recall.json"
    bench gather extension_trained gather "$work/extension" "$work/results/extension_trained.json"
    cat "$work/logs/gather.log"
}

case $part in
    prepare)
        TOKENIZERS_PARALLELISM=true RAYON_NUM_THREADS=8 bench prepare from_scratch prepare --text "$4" --val "$5" \
            --tokenizer "$6" --tokens "$tokens" "$work/data" ;;
    timed | learn | gather)
        (while sleep 30; do pack; done) >/dev/null 2>&1 &
        packer=$!
        $part & # its own wait must not wait for the packer
        wait $!
        kill $packer ;;
    *) echo "part $part: must be timed, prepare, learn or gather" >&2 && exit 2 ;;
esac
pack
tail -qn 1 "$work"/logs/*.log
