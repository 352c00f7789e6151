#!/usr/bin/env bash
# A baseline of the paper: 12.0 bits per position, 0.75 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --name "LFQ 12 bits" \
    --quantizer lfq --lfq-dim 12 "$@"
