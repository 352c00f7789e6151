#!/usr/bin/env bash
# FSQ with the bits of RFSQ-2x2048: 22.0 bits per position, 1.375 bits per pixel.
# Six channels: the best of three allocations in a short trial.
exec "$(dirname "$0")/../paper.sh" --name "FSQ 22 bits" \
    --quantizer fsq --levels 16 16 16 16 8 8 "$@"
