#!/usr/bin/env bash
# Beyond the paper, for files that are entropy-coded: f = 8 and at most 40 bits per position after
# `compress.py fit`, 0.625 bits per pixel. Levels in proportion to how much a channel varies; two
# stages, as one index of so many levels would not fit 62 bits.
exec "$(dirname "$0")/../paper.sh" --network dct --downsample 8 \
    --quantizer rfsq --rfsq-strategy geometric --rfsq-slope 0.1 --rfsq-stages 2 \
    --levels 14 8 7 7 5 5 5 5 4 4 4 4 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 "$@"
