#!/usr/bin/env bash
# f = 8, one token of 262,144 codes: 18.0 bits per position, 0.28125 bits per pixel.
# Scalar-vector quantization: no codebook, the index is decoded by arithmetic.
exec "$(dirname "$0")/../paper.sh" --name "SVQ 18 bits, f = 8" \
    --network dct --downsample 8 --quantizer svq --pairs --svq-bits 36 --svq-stages 2 --svq-dim 48 "$@"
