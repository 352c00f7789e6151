#!/usr/bin/env bash
# f = 8, 2 x 512 codes: 18.0 bits per position, 0.28125 bits per pixel.
# Residual VQ-EMA in the dct network, as tuned at f = 4: the baseline of svq_18bit_f8.sh.
exec "$(dirname "$0")/../paper.sh" --name "residual VQ-EMA 2x512, f = 8" \
    --network dct --downsample 8 --quantizer ema --n-embed 512 --ema-stages 2 --embed-dim 24 --ema-decay 0.95 "$@"
