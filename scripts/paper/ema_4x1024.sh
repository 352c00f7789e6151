#!/usr/bin/env bash
# Residual VQ-EMA with the codebook sizes of RFSQ-4x1024: 40.0 bits per position, 2.5 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --name "residual VQ-EMA 4x1024" \
    --quantizer ema --n-embed 1024 --ema-stages 4 --embed-dim 256 "$@"
