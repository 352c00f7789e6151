#!/usr/bin/env bash
# Two tokens of 2^20 codes: 40.0 bits per position, 2.5 bits per pixel.
# The dct network, and more levels for the channels that vary more.
exec "$(dirname "$0")/../paper.sh" --name "geometric RFSQ 40 bits" \
    --network dct --quantizer rfsq --rfsq-strategy geometric --rfsq-stages 2 \
    --levels 8 8 4 4 4 4 4 2 2 2 2 "$@"
