#!/usr/bin/env bash
# A baseline of the paper: 12.0 bits per position, 0.75 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --name "FSQ 12 bits" \
    --quantizer fsq --levels 8 8 8 8 "$@"
