#!/usr/bin/env bash
# RFSQ with 4 stages of 1024 codes: 40.0 bits per position, 2.5 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --name RFSQ-4x1024-Scale \
    --quantizer rfsq --rfsq-stages 4 --rfsq-strategy scale "$@"
