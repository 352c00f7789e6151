#!/usr/bin/env bash
# RFSQ-2x2048-None: 22.0 bits per position, 1.375 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --quantizer rfsq --rfsq-stages 2 --rfsq-strategy none "$@"
