#!/usr/bin/env bash
# LFQ with the bits of RFSQ-4x1024: 40.0 bits per position, 2.5 bits per pixel.
# A distribution over 2^40 codes does not fit into memory: the entropy loss is a sum over 4 groups of
# 10 bits, and ignores the dependence between groups.
exec "$(dirname "$0")/../paper.sh" --name "LFQ 40 bits" \
    --quantizer lfq --lfq-dim 40 --lfq-entropy-groups 4 "$@"
