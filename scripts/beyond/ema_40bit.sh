#!/usr/bin/env bash
# 4 x 1024 codes: 40.0 bits per position, 2.5 bits per pixel.
# Residual VQ-EMA in the dct network, tuned: a baseline of svq_40bit.sh.
exec "$(dirname "$0")/../paper.sh" --name "residual VQ-EMA 4x1024, dct network" \
    --network dct --quantizer ema --n-embed 1024 --ema-stages 4 --embed-dim 24 --ema-decay 0.95 "$@"
