#!/usr/bin/env bash
# f = 4 and, after `compress.py fit`, about 22 bits per position, 1.375 bits per pixel.
# For entropy coding: more levels, in proportion to the spread of each channel.
exec "$(dirname "$0")/../paper.sh" --name "coded RFSQ 22 bits, f = 4" \
    --network dct --downsample 4 \
    --quantizer rfsq --rfsq-strategy geometric --rfsq-slope 0.2 --rfsq-stages 1 \
    --levels 113 33 21 21 15 9 9 9 7 7 7 7 5 5 5 5 5 3 3 "$@"
