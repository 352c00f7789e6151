#!/usr/bin/env bash
# 2 x 2048 codes: 22.0 bits per position, 1.375 bits per pixel.
# Residual VQ-EMA in the dct network, tuned: a baseline of svq_22bit.sh.
exec "$(dirname "$0")/../paper.sh" --name "residual VQ-EMA 2x2048, dct network" \
    --network dct --quantizer ema --n-embed 2048 --ema-stages 2 --embed-dim 16 --ema-decay 0.95 "$@"
