#!/usr/bin/env bash
# Two tokens of 2048 codes, as RFSQ-2x2048: 22.0 bits per position, 1.375 bits per pixel.
# Scalar-vector quantization: no codebook, the index is decoded by arithmetic.
exec "$(dirname "$0")/../paper.sh" --name "SVQ 22 bits" \
    --network dct --quantizer svq --pairs --svq-bits 44 --svq-stages 4 --svq-dim 32 "$@"
