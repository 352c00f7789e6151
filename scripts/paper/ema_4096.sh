#!/usr/bin/env bash
# A baseline of the paper: 12.0 bits per position, 0.75 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --name "VQ-EMA 4096" \
    --quantizer ema --n-embed 4096 --embed-dim 256 "$@"
