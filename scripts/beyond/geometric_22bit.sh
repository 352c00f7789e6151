#!/usr/bin/env bash
# Beyond the paper: two tokens of 2048 codes, as RFSQ-2x2048, 22.0 bits per position, from geometric
# stages in seven channels, with levels by how much a channel varies, and the dct network.
exec "$(dirname "$0")/../paper.sh" --network dct --quantizer rfsq --rfsq-strategy geometric \
    --rfsq-stages 2 --levels 8 4 4 2 2 2 2 "$@"
