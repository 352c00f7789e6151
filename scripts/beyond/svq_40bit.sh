#!/usr/bin/env bash
# Four tokens of 1024 codes, as RFSQ-4x1024: 40.0 bits per position, 2.5 bits per pixel.
# Scalar-vector quantization: no codebook, the index is decoded by arithmetic.
exec "$(dirname "$0")/../paper.sh" --name "SVQ 40 bits" \
    --network dct --quantizer svq --svq-bits 40 --svq-stages 4 --svq-dim 28 "$@"
