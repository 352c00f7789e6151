#!/usr/bin/env bash
# Four tokens of 1024 codes, in pairs of positions: 40.0 bits per position, 2.5 bits per pixel.
# Residual VQ-EMA in the dct network, tuned: the stronger baseline of svq_40bit.sh.
exec "$(dirname "$0")/../paper.sh" --name "residual VQ-EMA 40 bits in pairs, dct network" \
    --network dct --quantizer ema --pairs --n-embed 1024 --ema-stages 8 --embed-dim 48 \
    --ema-decay 0.95 "$@"
