#!/usr/bin/env bash
# f = 8, one token of 65,536 codes: 16.0 bits per position, 0.25 bits per pixel.
# Scalar-vector quantization: no codebook, the index is decoded by arithmetic.
exec "$(dirname "$0")/../paper.sh" --name "SVQ 16 bits, f = 8" \
    --network dct --downsample 8 --quantizer svq --pairs --svq-bits 32 --svq-stages 2 --svq-dim 48 "$@"
