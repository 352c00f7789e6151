#!/usr/bin/env bash
# VQ-EMA with 4096 codes, a baseline of the paper: 12.0 bits per position, 0.75 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --quantizer ema --n-embed 4096 --embed-dim 256 "$@"
