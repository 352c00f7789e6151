#!/usr/bin/env bash
# RFSQ with 2 stages of 2048 codes: 22.0 bits per position, 1.375 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --name RFSQ-2x2048-LN \
    --quantizer rfsq --rfsq-stages 2 --rfsq-strategy layernorm "$@"
