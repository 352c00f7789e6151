#!/usr/bin/env bash
# LFQ with the bits of RFSQ-4x1024: 40.0 bits per position, 2.5 bits per pixel. The distribution
# over 2^40 codes fits into no memory: the entropy loss is a sum over 4 groups of 10 bits, blind to
# what the groups have in common.
exec "$(dirname "$0")/../paper.sh" --quantizer lfq --lfq-dim 40 --lfq-entropy-groups 4 "$@"
