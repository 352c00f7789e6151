#!/usr/bin/env bash
# Two tokens of 2048 codes, in pairs of positions: 22.0 bits per position, 1.375 bits per pixel.
# Residual VQ-EMA in the dct network, tuned: the stronger baseline of svq_22bit.sh.
exec "$(dirname "$0")/../paper.sh" --name "residual VQ-EMA 22 bits in pairs, dct network" \
    --network dct --quantizer ema --pairs --n-embed 2048 --ema-stages 4 --embed-dim 32 \
    --ema-decay 0.95 "$@"
