#!/usr/bin/env bash
# Train RFSQ-2x2048-LN on generated images, evaluate it against bicubic scaling and the mean
# colour, and draw a picture: a few minutes on two CPU cores, full-size and longer on a GPU.
# Extra arguments go to train.py (python train.py --help).
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
source "$(dirname "$0")/setup.sh"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    size=(--channel 256 --batch-size 128 --train-iters 3000 --lr 0.0008)
else
    size=(--channel 64 --batch-size 16 --train-iters 700 --lr 0.002)
fi
exec python "$ROOT/train.py" --quantizer rfsq --rfsq-stages 2 --rfsq-strategy layernorm \
    --train-data-path synthetic --val-data-path synthetic \
    --perceptual-weight 0 --lpips-net squeeze "${size[@]}" --log-interval 100 "$@"
