#!/usr/bin/env bash
# The best models at about 1.375, 2.5, 0.344 and 0.625 bits per pixel, from training to a comparison of
# their files with JPEG, WebP and AVIF files of the same size:
#
#   ./scripts/best.sh --train-data-path DIR --val-data-path DIR
#
# Trains the configurations beyond/coded_*.sh by reproduce.sh, which explains the flags, JOBS and
# OUT (here runs/best); fits the entropy coder of each to training images (at most FIT=3000 of
# them), NAME-sSEED/coded.pt; and compares the files of validation images (at most LIMIT=100):
# $OUT/rate_distortion.json and .png. The same command again runs what is left. Packed images
# are for training only: IMAGES_TRAIN and IMAGES_VAL are the folders of image files then.
set -euo pipefail
here=$(dirname "$0")
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
export OUT=${OUT:-runs/best}
NEEDS="constriction matplotlib" source "$here/setup.sh"
# Wrong flags, then folders without images, end the script here and not after the training.
folders=$(
    PYTHONPATH=$ROOT python - "$@" << 'END'
import os
import sys
from pathlib import Path

from arguments import Parser, get_args
from dataset.images import IMAGE_SUFFIXES, list_files

parser = Parser(prog="best.sh", add_help=False)  # the flags of reproduce.sh
parser.add_argument("--dry-run", action="store_true")
parser.add_argument("--only", nargs="+")
parser.add_argument("--seeds", nargs="+")
args = get_args(parser.parse_known_args()[1])
if args.skip_corrupt:
    print(
        "best.sh: error: files of the images are compared, so none can be left out: leave "
        "--skip-corrupt out, and repair or remove images that cannot be read",
        file=sys.stderr,
    )
    sys.exit(2)
for side, folder in (("TRAIN", args.train_data_path), ("VAL", args.val_data_path)):
    folder = os.environ.get(f"IMAGES_{side}") or folder
    if not (Path(folder).is_dir() and list_files(Path(folder), IMAGE_SUFFIXES)[0]):
        print(
            f"best.sh: error: {folder} is not a folder of image files: set IMAGES_{side}",
            file=sys.stderr,
        )
        sys.exit(2)
    print(folder)
END
)
{ read -r train && read -r val; } <<< "$folders"
configurations=("$here"/beyond/coded_*.sh)
names=("${configurations[@]##*/}")
"$here/reproduce.sh" --only "${names[@]%.sh}" "$@"
[[ " $* " != *" --dry-run "* ]] || exit 0
coded=()
for run in "$OUT"/coded_*; do
    [ -f "$run/results.json" ] || continue
    fit="$train ${FIT:-3000}"
    if [ ! "$run/coded.pt" -nt "$run/last.pt" ] || [ "$(cat "$run/coded.txt" 2> /dev/null)" != "$fit" ]; then
        python "$ROOT/scripts/compress.py" fit "$train" --limit "${FIT:-3000}" \
            --load "$run/last.pt" --out "$run/coded.pt" --force
        echo "$fit" > "$run/coded.txt"
    fi
    coded+=("$run/coded.pt")
done
python "$ROOT/scripts/rate_distortion.py" "$val" --load "${coded[@]}" --limit "${LIMIT:-100}" \
    --json "$OUT/rate_distortion.json" --figure "$OUT/rate_distortion.png"
