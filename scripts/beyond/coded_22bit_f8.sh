#!/usr/bin/env bash
# Beyond the paper, for files that are entropy-coded: f = 8 and at most 22 bits per position after
# `compress.py fit`, 0.344 bits per pixel. Levels in proportion to how much a channel varies.
exec "$(dirname "$0")/../paper.sh" --network dct --downsample 8 \
    --quantizer rfsq --rfsq-strategy geometric --rfsq-slope 0.2 --rfsq-stages 1 \
    --levels 71 21 17 17 9 9 9 9 5 5 5 5 5 5 3 3 3 3 3 3 3 3 "$@"
