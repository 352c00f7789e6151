#!/usr/bin/env bash
# The paper's nine configurations and six baselines with the bits of its RFSQ, for any seeds:
#
#   ./scripts/reproduce.sh --train-data-path DIR --val-data-path DIR --seeds 0 1 2
#   ./scripts/reproduce.sh --dry-run                          # print the commands, run nothing
#   ./scripts/reproduce.sh --only rfsq_2x2048_ln fsq_22bit    # these alone
#
# Every other flag goes to train.py. Run folders are $OUT/NAME-sSEED (OUT: runs/reproduce), with
# the output of each run beside it in NAME-sSEED.log. The same command again does what is left:
# a run with results.json is not run again, an unfinished one starts afresh, or continues if
# `--resume auto` is among the flags. A run that fails is listed at the end (exit code 1), and the
# others go on.
#
# One run at a time on each GPU, or on the CPU; JOBS=N for N at a time in all. SEEDS="0 1 2" is
# another way to write --seeds 0 1 2, and CUDA_VISIBLE_DEVICES chooses the GPUs.
set -euo pipefail
here=$(dirname "$0")
CONFIGURATIONS=(
    rfsq_2x2048_none rfsq_2x2048_scale rfsq_2x2048_ln
    rfsq_4x1024_none rfsq_4x1024_scale rfsq_4x1024_ln
    fsq_4096 lfq_4096 ema_4096
    fsq_22bit lfq_22bit ema_2x2048
    fsq_40bit lfq_40bit ema_4x1024
)
BEYOND=( # the paper; run by --only alone
    geometric_22bit geometric_40bit
    coded_22bit_f4 coded_40bit_f4 coded_22bit_f8 coded_40bit_f8
)

fail() {
    echo "reproduce.sh: error: $1" >&2
    exit 2
}

# ------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------
OUT=${OUT:-runs/reproduce}
read -ra seeds <<< "${SEEDS:-0}"
only=("${CONFIGURATIONS[@]}") flags=() dry_run=
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=1 && shift ;;
        --only | --seeds)
            flag=$1 values=() && shift
            while [ $# -gt 0 ] && [[ $1 != -* ]]; do values+=("$1") && shift; done
            [ ${#values[@]} -gt 0 ] || fail "$flag is empty: name at least one"
            if [ "$flag" = --only ]; then only=("${values[@]}"); else seeds=("${values[@]}"); fi
            ;;
        --seed | --seed=*) fail "--seed is chosen for each run: give --seeds 0 1 2" ;;
        --save | --save=*) fail "--save is chosen for each run: set OUT to the folder of all" ;;
        --overwrite) fail "--overwrite is not needed: remove the folders of runs to be run again" ;;
        *) flags+=("$1") && shift ;;
    esac
done
for name in "${only[@]}"; do
    [[ " ${CONFIGURATIONS[*]} ${BEYOND[*]} " == *" $name "* ]] ||
        fail "--only $name is unknown: choose from ${CONFIGURATIONS[*]} ${BEYOND[*]}"
done
for seed in "${seeds[@]}"; do
    [[ $seed =~ ^[0-9]+$ ]] || fail "seed $seed is no number: give integers, such as --seeds 0 1 2"
done
[[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || fail "JOBS=$JOBS is no number of runs: give 1 or more"

# ------------------------------------------------------------------------------------------
# What is to be run: NAME SEED, all configurations with the first seed, then with the second
# ------------------------------------------------------------------------------------------
make_command() { # NAME SEED -> the array `command`, and `shown`, the same to be read
    command=("$here/$1.sh" --seed "$2" --save "$OUT/$1-s$2" --overwrite "${flags[@]}")
    shown=$(printf ' %q' "${command[@]}")
    shown=${shown# }
}

jobs=()
declare -A listed
for seed in "${seeds[@]}"; do
    for name in "${only[@]}"; do
        folder=$OUT/$name-s$seed
        [ -z "${listed[$folder]:-}" ] || continue
        listed[$folder]=1
        make_command "$name" "$seed"
        if [ ! -f "$folder/results.json" ]; then
            jobs+=("$name $seed")
            [ -z "$dry_run" ] || echo "$shown"
            continue
        fi
        echo "# finished: $folder"
        # The first line of a log is its command: the flags may have been others then.
        if [ -f "$folder.log" ] && [ "$(head -n 1 "$folder.log")" != "$shown" ]; then
            echo "#   by another command: $(head -n 1 "$folder.log")"
        fi
    done
done
[ -z "$dry_run" ] || exit 0

source "$here/setup.sh"
# Wrong flags for train.py end it here, once, and not in every run.
found=$(PYTHONPATH=$ROOT python -c '
import torch, arguments, util
arguments.get_args()
print(torch.cuda.device_count(), util.cpu_cores())' "${flags[@]}")
read -r gpus cores <<< "$found"
JOBS=${JOBS:-$((gpus > 0 ? gpus : 1))}
if [ "$gpus" = 0 ] && [ "$JOBS" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
fi
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}"

mkdir -p "$OUT"
if command -v flock > /dev/null; then
    # Two at once would each take the other's runs for unfinished ones. The runs inherit the lock.
    exec 9> "$OUT/.lock"
    flock -n 9 || fail "$OUT is in use by another reproduce.sh: wait for it, or set another OUT"
fi

# ------------------------------------------------------------------------------------------
# Runs: each worker takes the next run that none has taken
# ------------------------------------------------------------------------------------------
claims=$(mktemp -d)
trap 'rm -rf "$claims"' EXIT

worker() { # NUMBER
    local i name seed log
    [ "$gpus" = 0 ] || export CUDA_VISIBLE_DEVICES=${devices[$1 % gpus]}
    export GPUS=1 # for paper.sh: a process for each run
    for i in "${!jobs[@]}"; do
        mkdir "$claims/$i" 2> /dev/null || continue # of all workers, one can make the folder
        read -r name seed <<< "${jobs[i]}"
        make_command "$name" "$seed"
        log=$OUT/$name-s$seed.log
        echo "$(date +%T)  $((i + 1))/${#jobs[@]}  $name, seed $seed"
        echo "$shown" > "$log"
        "${command[@]}" >> "$log" 2>&1 < /dev/null || {
            echo "exit code $?" >> "$log"
            echo "$(date +%T)  failed: $name, seed $seed"
        }
    done
}

set -m # a process group for each worker: Ctrl-C can end the runs with it
workers=()
trap 'kill -- "${workers[@]/#/-}" 2> /dev/null || true; exit 130' INT TERM
for ((number = 0; number < JOBS; number++)); do
    worker "$number" &
    workers+=($!)
done
wait

failed=0
for job in "${jobs[@]}"; do
    read -r name seed <<< "$job"
    run=$OUT/$name-s$seed
    [ ! -f "$run/results.json" ] || continue
    failed=$((failed + 1))
    # The last two lines of a log: the error, then the exit code.
    echo "failed: $name, seed $seed, see $run.log: $(tail -n 2 "$run.log" | tr '\n' ' ')" >&2
done
if [ "$failed" -gt 0 ]; then
    echo "$failed of ${#jobs[@]} runs failed; the same command tries them again" >&2
    exit 1
fi
echo "all runs are finished; their tables: python scripts/report.py $OUT"
