"""Two neighbouring positions as one, for quantizers with an even number of stages."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Quantized, Quantizer


class Pairs(Quantizer):
    """A quantizer of 2 C channels for pairs of neighbouring positions of C channels each.

    Positions 2i and 2i+1 on the last axis are quantized as one vector, their sum and difference
    (the orthonormal Haar transform)::

        (z_2i + z_2i+1) / sqrt 2,   (z_2i - z_2i+1) / sqrt 2

    Neighbours are alike, so that the differences need few of the bits that they share; and where
    one is busier than the other, it gets more of them. The rate stays fixed: the bits of the
    quantizer for two positions. Its stages 2k and 2k+1 are stage k here, the even one at the left
    position and the odd one at the right.

    Args:
        quantizer: of an even number of channels, with an even number of stages, of which 2k and
            2k+1 have equal codebook sizes.

    Raises:
        ValueError: for another quantizer, or a last axis of odd length.

    Example:
        >>> pairs = Pairs(SVQ(bits=44, dim=32, stages=4))          # 2 x 2048 a position
        >>> quantized, indices = pairs(torch.randn(2, 16, 32, 32))   # (2, 32, 32, 2)
    """

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        if getattr(quantizer, "stage_dropout", 0):
            raise ValueError(
                "Pairs makes one stage of two, which cannot be dropped apart: give a quantizer "
                "with a stage_dropout of 0"
            )
        left, right = quantizer.codebook_sizes[::2], quantizer.codebook_sizes[1::2]
        if quantizer.dim % 2 or left != right or quantizer.side_bits:
            raise ValueError(
                "Pairs needs a quantizer with an even number of channels, stages in pairs of equal "
                f"size, and no image statistics, not {quantizer.name} with {quantizer.dim} "
                f"channels and codebook sizes {quantizer.codebook_sizes}"
            )
        self.quantizer = quantizer
        self.dim = quantizer.dim // 2
        self.codebook_sizes = left
        self.stage_axis = len(left) > 1
        self.group = 2 * quantizer.group
        self.name = f"{quantizer.name}-pairs"

    def read_flags(self) -> list[str]:
        """The flags of the command line that this quantizer reads."""
        return ["pairs", *self.quantizer.read_flags()]

    def flag_values(self) -> dict:
        """The values in use of flags whose default depends on other flags."""
        return self.quantizer.flag_values()

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, dim, *positions); the last position axis has an even length."""
        self._check_even(z, z.shape[2:])
        left, right = z.unflatten(-1, (-1, 2)).unbind(-1)
        joined = torch.cat([left + right, left - right], 1) * 0.5**0.5
        out = Quantized(*self.quantizer(joined))
        indices = out.indices.unflatten(-1, (-1, 2)).mT.flatten(-3, -2)  # (B, *positions, stages)
        if not self.stage_axis:
            indices = indices[..., 0]
        return Quantized(_split(out.codes), indices, out.loss)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Decode `indices` (B, *positions[, first stages]) to codes (B, dim, *positions)."""
        if not self.stage_axis:
            indices = indices[..., None]
        self._check_even(indices, indices.shape[1:-1])
        pairs = indices.unflatten(-2, (-1, 2)).mT.flatten(-2)
        return _split(self.quantizer.indices_to_codes(pairs))

    def _check_even(self, given: Tensor, positions: torch.Size) -> None:
        if not positions or positions[-1] % 2:
            raise ValueError(
                f"{self.name} quantizes pairs on the last axis, whose length must be even, but the "
                f"input is {tuple(given.shape)}"
            )


def _split(codes: Tensor) -> Tensor:
    """Sums and differences (B, 2 C, ..., W / 2) -> neighbours (B, C, ..., W)."""
    total, difference = codes.chunk(2, 1)
    return torch.stack([total + difference, total - difference], -1).flatten(-2) * 0.5**0.5
