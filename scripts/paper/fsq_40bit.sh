#!/usr/bin/env bash
# FSQ with the bits of RFSQ-4x1024: 40.0 bits per position, 2.5 bits per pixel.
# Eight channels: the best of three allocations in a short trial.
exec "$(dirname "$0")/../paper.sh" --name "FSQ 40 bits" \
    --quantizer fsq --levels 32 32 32 32 32 32 32 32 "$@"
