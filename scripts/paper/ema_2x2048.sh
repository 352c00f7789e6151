#!/usr/bin/env bash
# Residual VQ-EMA with the codebook sizes of RFSQ-2x2048: 22.0 bits per position, 1.375 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --name "residual VQ-EMA 2x2048" \
    --quantizer ema --n-embed 2048 --ema-stages 2 --embed-dim 256 "$@"
