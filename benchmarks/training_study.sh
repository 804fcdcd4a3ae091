#!/bin/bash
# What models learn from random weights, on one GPU. Every row is written once, so that the same command goes on where it
# was stopped; each call ends within its seconds and keeps all rows packed in WORK/rows.tgz, every half minute anew.
#   bash benchmarks/training_study.sh timed WORK 110                         speed of steps, with the GPU to itself
#   bash benchmarks/training_study.sh prepare WORK 120 TRAIN VAL TOKENIZER   tokens of the books
#   bash benchmarks/training_study.sh learn WORK 1100                        language models, recall, then extension
#   bash benchmarks/training_study.sh gather WORK 60                         result files, in WORK/results
# TOKENS (16777216) are what language models read; NANOGPT is a checkout of nanoGPT to time beside; PROCESSES (12) learn at once.
# SMALLER_LM, SMALLER_RECALL and SMALLER_EXTENSION are options for a trial, with an empty COMPILE where nothing compiles.
set -u
part=$1 work=$2 limit=$3
python=${PYTHON:-python3} tokens=${TOKENS:-16777216}
export PYTHONPATH=src:. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=4
export TORCHINDUCTOR_CACHE_DIR=$work/compiled
mkdir -p "$work"/{speed,models,recall,extension,kept,logs,results}

left() { echo $((limit - SECONDS - 8)); }
pack() { tar -C "$work" -czf "$work/rows.part" speed models recall extension logs results && mv "$work/rows.part" "$work/rows.tgz"; }
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

# Jobs, the first first, each as soon as what it needs is there: at most PROCESSES at once, each on a core of its own, since most steps
# wait for launches. Where the time ends, what is missed is what comes last: recall of peers.
queue() {
    local task name seed
    printf 'lm %s\n' "bsbr 0 1 2" "full 0 1 2" "window 0 1 2" "linear 0 1 2"
    printf 'lm gated_delta %s\n' 0 1 2
    for seed in 0 1 2; do
        for task in passkey mqar needle_multikey; do printf "recall $task %s $seed\n" bsbr full; done
    done
    printf 'recall needle_multikey bsbr_units %s\n' 0 1 2
    for seed in 0 1 2; do printf "extension %s $seed\n" bsbr full; done
    for seed in 0 1 2; do
        for task in mqar needle_multikey passkey; do printf "recall $task %s $seed\n" window linear; done
    done
}

rows() { # the files that a job leaves
    local seed
    case $1 in
        lm) for seed in "${@:3}"; do echo "$work/models/$2-$seed.json"; done ;;
        recall) echo "$work/recall/$2-$3-$4.json" ;;
        extension) echo "$work/extension/$2-$3-dynamic.json" ;;
    esac
}

ready() {
    [ "$1" != extension ] || [ -e "$work/models/$2-$3.json" ]
}

job() {
    local log=$* compile=${COMPILE---compile}
    log=${log// /-}
    case $1 in
        lm)
            # as a whole it takes the compiler minutes
            [ "$2" = gated_delta ] && compile=${compile:+--compile-layer}
            bench "$log" from_scratch run "$work/data" "$work/models" --attention "$2" --seeds "${@:3}" --tokens "$tokens" \
                $compile --keep "$work/kept" ${SMALLER_LM:-} ;;
        recall)
            bench "$log" recall run "$work/recall" --task "$2" --attention "$3" --seeds "$4" ${SMALLER_RECALL:-} ;;
        extension)
            bench "$log" extension_trained run "$work/data" "$work/extension" --model "$2-$3=$work/kept/$2-$3" \
                --method dynamic ${SMALLER_EXTENSION:-} ;;
    esac
    echo "$SECONDS s: $* ended, $(ls $(rows "$@") 2>/dev/null | wc -l) of $(rows "$@" | wc -l) rows" | tee -a "$work/logs/jobs.log"
}

pool() { # PROCESSES jobs at a time
    local waiting started line i
    mapfile -t waiting < <(queue)
    while [ "$(left)" -gt 10 ]; do
        started=
        for i in "${!waiting[@]}"; do
            read -ra line <<<"${waiting[i]}"
            if ! ls $(rows "${line[@]}") >/dev/null 2>&1; then
                ready "${line[@]}" || continue
                [ "$(jobs -rp | wc -l)" -lt "${PROCESSES:-12}" ] || break
                echo "$SECONDS s: ${line[*]}" | tee -a "$work/logs/jobs.log"
                job "${line[@]}" &
                started=1
            fi
            unset "waiting[i]"
        done
        [ ${#waiting[@]} -gt 0 ] || break
        # nothing runs that could make ready what waits
        [ -n "$started" ] || [ "$(jobs -rp | wc -l)" -gt 0 ] || break
        sleep 1
    done
    wait
}

learn() {
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # many share one memory
    pool
    pool # what failed, as for want of memory beside the others, once more
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
tail -qn 1 "$work"/logs/*.log 2>/dev/null
