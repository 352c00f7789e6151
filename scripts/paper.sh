#!/usr/bin/env bash
# The settings that all configurations share (arXiv 2508.15860). Each file in paper/ and beyond/
# calls this one with its name and what differs; flags given on the command line come last and win:
#   ./scripts/paper/rfsq_2x2048_ln.sh --train-data-path DIR --val-data-path DIR --seed 1
# All GPUs of the machine are used; GPUS=1 (or CUDA_VISIBLE_DEVICES) uses fewer. The flags are those
# of train.py (python train.py --help).
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
launch=(python)
if [ "$GPUS" -gt 1 ]; then
    launch=(torchrun --standalone --nproc-per-node "$GPUS")
fi
exec "${launch[@]}" "$ROOT/train.py" \
    --img-size 128 --channel 256 --downsample 4 --res-blocks 0 \
    --l1-weight 1 --perceptual-weight 1 --quantizer-loss-weight 1 --lpips-net vgg \
    --batch-size 128 --max-train-epochs 50 --lr 0.0008 --weight-decay 0.00005 \
    --warmup 0.01 --lr-decay-style linear --clip-grad 1.0 \
    "$@"
