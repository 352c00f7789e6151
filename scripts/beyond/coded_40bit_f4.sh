#!/usr/bin/env bash
# f = 4 and, after `compress.py fit`, at most 40 bits per position, 2.5 bits per pixel.
# For entropy coding: more levels, in proportion to the spread of each channel.
# Two stages: one index of so many levels would not fit 62 bits.
exec "$(dirname "$0")/../paper.sh" --name "coded RFSQ 40 bits, f = 4" \
    --network dct --downsample 4 \
    --quantizer rfsq --rfsq-strategy geometric --rfsq-slope 0.1 --rfsq-stages 2 \
    --levels 24 13 10 10 7 7 7 7 4 4 4 4 4 4 3 3 3 3 3 3 3 3 3 3 3 3 3 3 "$@"
