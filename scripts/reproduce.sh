#!/usr/bin/env bash
# Runs the configurations of paper/, the six of the paper and its baselines, for any seeds:
#
#   ./scripts/reproduce.sh --train-data-path DIR --val-data-path DIR --seeds 0 1 2
#   ./scripts/reproduce.sh --dry-run                              # only print the commands
#   ./scripts/reproduce.sh --only fsq_22bit geometric_22bit       # files of paper/ or beyond/
#
# All other flags go to train.py. Run folders are $OUT/NAME-sSEED (OUT: runs/reproduce); the output
# of each run is beside its folder, in NAME-sSEED.log. The same command again runs what is left: a
# run with results.json is skipped, and an unfinished one continues from its last checkpoint. Runs
# that fail are listed at the end (exit code 1), after all others.
#
# One run at a time on each GPU, or on the CPU; JOBS=N sets the number of runs at a time.
# SEEDS="0 1 2" is the same as --seeds 0 1 2, and CUDA_VISIBLE_DEVICES chooses the GPUs.
set -euo pipefail
here=$(dirname "$0")

fail() {
    echo "reproduce.sh: error: $1" >&2
    exit 2
}

# ------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------
declare -A scripts # the file of each configuration, by name
shopt -s nullglob
paper=() beyond=()
for file in "$here"/{paper,beyond}/*.sh; do
    name=$(basename "$file" .sh)
    scripts[$name]=$file
    case $file in "$here"/paper/*) paper+=("$name") ;; *) beyond+=("$name") ;; esac
done

OUT=${OUT:-runs/reproduce}
read -ra seeds <<< "${SEEDS:-0}"
only=("${paper[@]}") flags=() dry_run=
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;;
        --dry-run) dry_run=1 && shift ;;
        --only | --seeds)
            flag=$1 values=() && shift
            while [ $# -gt 0 ] && [[ $1 != -* ]]; do values+=("$1") && shift; done
            [ ${#values[@]} -gt 0 ] || fail "$flag is empty: name at least one"
            if [ "$flag" = --only ]; then only=("${values[@]}"); else seeds=("${values[@]}"); fi
            ;;
        --seed | --seed=*) fail "--seed is set for each run: give --seeds 0 1 2" ;;
        --save | --save=*) fail "--save is set for each run: set OUT to the folder of all runs" ;;
        --resume | --resume=*) fail "--resume is not needed: unfinished runs continue" ;;
        --quantizer | --quantizer=* | --name | --name=*)
            fail "${1%%=*} is that of each configuration: give --only to choose configurations"
            ;;
        --overwrite) fail "--overwrite is not needed: remove the folders of runs to be run again" ;;
        *) flags+=("$1") && shift ;;
    esac
done
for name in "${only[@]}"; do
    [ -n "${scripts[$name]:-}" ] ||
        fail "--only $name is unknown: choose from ${paper[*]} ${beyond[*]}"
done
for seed in "${seeds[@]}"; do
    [[ $seed =~ ^[0-9]+$ ]] || fail "seed $seed is not an integer: give --seeds 0 1 2"
done
[[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || fail "JOBS=$JOBS is not a number of runs: give 1 or more"

# ------------------------------------------------------------------------------------------
# The runs that are left: all configurations with the first seed, then with the second
# ------------------------------------------------------------------------------------------
jobs=() # NAME-sSEED
declare -A shown # the command of each, quoted for a shell
for seed in "${seeds[@]}"; do
    for name in "${only[@]}"; do
        job=$name-s$seed run=$OUT/$name-s$seed
        [ -z "${shown[$job]:-}" ] || continue
        command=("${scripts[$name]}" --seed "$seed" --save "$run" --resume auto "${flags[@]}")
        shown[$job]=$(printf '%q ' "${command[@]}")
        shown[$job]=${shown[$job]% }
        if [ ! -f "$run/results.json" ]; then
            jobs+=("$job")
            [ -z "$dry_run" ] || echo "${shown[$job]}"
            continue
        fi
        echo "# finished: $run"
        # The first line of a log is the command of its run.
        if [ -f "$run.log" ] && [ "$(head -n 1 "$run.log")" != "${shown[$job]}" ]; then
            echo "#   by another command: $(head -n 1 "$run.log")"
        fi
    done
done
[ -z "$dry_run" ] || exit 0

source "$here/setup.sh"
# Wrong flags for train.py end the script here, once, and not in every run.
found=$(PYTHONPATH=$ROOT python -c '
import torch, arguments, util
arguments.get_args()
print(torch.cuda.device_count(), util.cpu_cores())' "${flags[@]}")
read -r gpus cores <<< "$found"
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}"
JOBS=${JOBS:-$((gpus > 0 ? ${#devices[@]} : 1))} # PyTorch counts the parts of one GPU (MIG) as one
if [ "$gpus" = 0 ] && [ "$JOBS" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
fi

mkdir -p "$OUT"
if command -v flock > /dev/null; then
    # A second reproduce.sh would start the runs that this one has not finished. The runs inherit
    # the lock.
    exec 9> "$OUT/.lock"
    flock -n 9 || fail "$OUT is in use by another reproduce.sh: wait for it, or set another OUT"
fi

# ------------------------------------------------------------------------------------------
# Workers: each takes the next run that no other has taken
# ------------------------------------------------------------------------------------------
claims=$(mktemp -d)
trap 'rm -rf "$claims"' EXIT

worker() { # NUMBER
    local i job run number
    [ "$gpus" = 0 ] || export CUDA_VISIBLE_DEVICES=${devices[$1 % ${#devices[@]}]}
    export GPUS=1 # paper.sh: one process a run
    for i in "${!jobs[@]}"; do
        mkdir "$claims/$i" 2> /dev/null || continue # only one worker can make the folder
        job=${jobs[i]} run=$OUT/${jobs[i]}
        echo "$(date +%T)  $((i + 1))/${#jobs[@]}  ${job%-s*}, seed ${job##*-s}"
        number=1
        while [ -e "$run.log.$number" ]; do number=$((number + 1)); done
        [ ! -e "$run.log" ] || mv "$run.log" "$run.log.$number" # of the run so far
        echo "${shown[$job]}" > "$run.log"
        eval "${shown[$job]}" >> "$run.log" 2>&1 < /dev/null || {
            echo "exit code $?" >> "$run.log"
            echo "$(date +%T)  failed: ${job%-s*}, seed ${job##*-s}"
        }
    done
}

set -m # a process group for each worker: Ctrl-C ends its run too
workers=()
trap 'kill -- "${workers[@]/#/-}" 2> /dev/null || true; exit 130' INT TERM HUP
for ((number = 0; number < JOBS; number++)); do
    worker "$number" &
    workers+=($!)
done
wait

failed=0
for job in "${jobs[@]}"; do
    run=$OUT/$job
    [ ! -f "$run/results.json" ] || continue
    failed=$((failed + 1))
    # The last two lines of a log: the error, then the exit code.
    echo "failed: ${job%-s*}, seed ${job##*-s}, see $run.log: $(tail -n 2 "$run.log" | tr '\n' ' ')" >&2
done
if [ "$failed" -gt 0 ]; then
    echo "$failed of ${#jobs[@]} runs failed; the same command runs them again" >&2
    exit 1
fi
echo "all runs are finished; their tables: python scripts/report.py $OUT"
