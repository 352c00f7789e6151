#!/usr/bin/env bash
# LFQ with the bits of RFSQ-2x2048: 22.0 bits per position, 1.375 bits per pixel.
# The entropy loss is a sum over 2 groups of 11 bits, as that of lfq_40bit.sh is over 4 of 10.
exec "$(dirname "$0")/../paper.sh" --name "LFQ 22 bits" \
    --quantizer lfq --lfq-dim 22 --lfq-entropy-groups 2 "$@"
