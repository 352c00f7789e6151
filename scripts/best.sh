#!/usr/bin/env bash
# The best models here at 1.375, 2.5, 0.344 and 0.625 bits per pixel, from training to their files
# beside JPEG, WebP and AVIF of as many bytes:
#
#   ./scripts/best.sh --train-data-path DIR --val-data-path DIR
#
# Trains coded_22bit_f4, coded_40bit_f4, coded_22bit_f8 and coded_40bit_f8 by reproduce.sh, whose
# head says what the flags, JOBS and OUT (here runs/best) are; fits the entropy coder of each to
# training images (FIT=N: at most N of them, 3000), NAME-sSEED/coded.pt; and measures the files of
# validation images (LIMIT=N: at most N, 100): $OUT/rate_distortion.json and .png. The same command
# again does what is left. Packed images are for training alone: IMAGES_TRAIN and IMAGES_VAL name
# the folders of image files then.
set -euo pipefail
here=$(dirname "$0")
export OUT=${OUT:-runs/best}
train=./data/imagenet/train val=./data/imagenet/val flags=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --train-data-path) train=${2:-} ;;
        --train-data-path=*) train=${1#*=} ;;
        --val-data-path) val=${2:-} ;;
        --val-data-path=*) val=${1#*=} ;;
    esac
    shift
done
train=${IMAGES_TRAIN:-$train} val=${IMAGES_VAL:-$val}
source "$here/setup.sh"
# Better known before the training than after it.
PYTHONPATH=$ROOT python - "$train" "$val" << 'END' || exit 2
import sys
from pathlib import Path

from dataset import IMAGE_SUFFIXES, list_files

for folder in sys.argv[1:]:
    if not (Path(folder).is_dir() and list_files(Path(folder), IMAGE_SUFFIXES)[0]):
        sys.exit(f"best.sh: error: {folder} is no folder of image files: set IMAGES_TRAIN and IMAGES_VAL")
END
"$here/reproduce.sh" --only coded_{22,40}bit_f4 coded_{22,40}bit_f8 "${flags[@]}"
[[ " ${flags[*]} " != *" --dry-run "* ]] || exit 0
coded=()
for run in "$OUT"/coded_*; do
    [ -f "$run/results.json" ] || continue
    if [ ! "$run/coded.pt" -nt "$run/last.pt" ]; then
        python "$ROOT/scripts/compress.py" fit "$train" --limit "${FIT:-3000}" \
            --load "$run/last.pt" --out "$run/coded.pt" --force
    fi
    coded+=("$run/coded.pt")
done
python "$ROOT/scripts/rate_distortion.py" "$val" --load "${coded[@]}" --limit "${LIMIT:-100}" \
    --json "$OUT/rate_distortion.json" --figure "$OUT/rate_distortion.png"
