#!/usr/bin/env bash
# Beyond the paper, for files that are entropy-coded: at most 22 bits per position after
# `compress.py fit`, 1.375 bits per pixel. Levels in proportion to how much a channel varies.
exec "$(dirname "$0")/../paper.sh" --network dct --downsample 4 \
    --quantizer rfsq --rfsq-strategy geometric --rfsq-slope 0.2 --rfsq-stages 1 \
    --levels 113 33 21 21 15 9 9 9 7 7 7 7 5 5 5 5 5 3 3 "$@"
