#!/usr/bin/env bash
# Two tokens of 2048 codes, as RFSQ-2x2048: 22.0 bits per position, 1.375 bits per pixel.
# The dct network, and more levels for the channels that vary more.
exec "$(dirname "$0")/../paper.sh" --name "geometric RFSQ 22 bits" \
    --network dct --quantizer rfsq --rfsq-strategy geometric --rfsq-stages 2 \
    --levels 8 4 4 2 2 2 2 "$@"
