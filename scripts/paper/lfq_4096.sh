#!/usr/bin/env bash
# LFQ with 12 bits, a baseline of the paper: 12.0 bits per position, 0.75 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --quantizer lfq --lfq-dim 12 "$@"
