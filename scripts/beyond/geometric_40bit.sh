#!/usr/bin/env bash
# Beyond the paper: 40.0 bits per position from two geometric stages in eleven channels, with levels
# by how much a channel varies, and the dct network.
exec "$(dirname "$0")/../paper.sh" --network dct --quantizer rfsq --rfsq-strategy geometric \
    --rfsq-stages 2 --levels 8 8 4 4 4 4 4 2 2 2 2 "$@"
