#!/usr/bin/env bash
# FSQ [8,8,8,8], a baseline of the paper: 12.0 bits per position, 0.75 bits per pixel.
exec "$(dirname "$0")/../paper.sh" --quantizer fsq --levels 8 8 8 8 "$@"
