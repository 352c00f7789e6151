#!/usr/bin/env bash
# RFSQ-4x1024-Scale: 40.0 bits per position, 2.5 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --quantizer rfsq --rfsq-stages 4 --rfsq-strategy scale "$@"
