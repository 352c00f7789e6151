#!/usr/bin/env bash
# f = 8 and, after `compress.py fit`, at most 22 bits per position, 0.344 bits per pixel.
# For entropy coding: more levels, in proportion to the spread of each channel.
exec "$(dirname "$0")/../paper.sh" --name "coded RFSQ 22 bits, f = 8" \
    --network dct --downsample 8 \
    --quantizer rfsq --rfsq-strategy geometric --rfsq-slope 0.2 --rfsq-stages 1 \
    --levels 71 21 17 17 9 9 9 9 5 5 5 5 5 5 3 3 3 3 3 3 3 3 "$@"
