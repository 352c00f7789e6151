#!/usr/bin/env bash
# f = 8 and, after `compress.py fit`, at most 40 bits per position, 0.625 bits per pixel.
# For entropy coding: more levels, in proportion to the spread of each channel.
# Two stages: one index of so many levels would not fit 62 bits.
exec "$(dirname "$0")/../paper.sh" --name "coded RFSQ 40 bits, f = 8" \
    --network dct --downsample 8 \
    --quantizer rfsq --rfsq-strategy geometric --rfsq-slope 0.1 --rfsq-stages 2 \
    --levels 14 8 7 7 5 5 5 5 4 4 4 4 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 "$@"
