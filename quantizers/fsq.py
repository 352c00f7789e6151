"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Quantizer, check_levels, per_channel, straight_through

EPS = 1e-3


class FSQ(Quantizer):
    """Rounds each channel of `z` to one of `levels[c]` values; the codebook is their product.

    Appendix A.1 of the paper, for a channel with L levels::

        h = (L-1)(1-eps)/2     offset = 1/2 if L is even else 0     shift = tan(offset/h)
        bound(z) = h tanh(z + shift) - offset
        code  = round(bound(z)) / floor(L/2)          in [-1, 1]
        digit = round(bound(z)) + floor(L/2)          in 0 .. L-1
        index = sum of digit_i * prod_{j<i} L_j

    Args:
        levels: number of levels of each channel, each from 2 to 512, at most 2^62 codes together.

    Raises:
        ValueError: for levels out of range, or an input whose channels are not `len(levels)`.

    Example:
        >>> fsq = FSQ([8, 8, 8, 8])                       # 4096 codes, 12.0 bits
        >>> quantized, indices = fsq(torch.randn(2, 4, 32, 32))
        >>> torch.equal(fsq.indices_to_codes(indices), quantized)
        True
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = check_levels(levels)
        self.dim = len(self.levels)
        self.codebook_sizes = [math.prod(self.levels)]
        self.name = "fsq-" + "x".join(str(level) for level in self.levels)
        h = [(level - 1) * (1 - EPS) / 2 for level in self.levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in self.levels]
        shift = [math.tan(o / x) for o, x in zip(offset, h, strict=True)]
        half = [level // 2 for level in self.levels]
        basis = [math.prod(self.levels[:i]) for i in range(self.dim)]
        # The index of the code whose integers round(bound(z)) are all 0.
        self.zero_index = sum(x * b for x, b in zip(half, basis, strict=True))
        wide = self.codebook_sizes[0] > 2**31
        basis = torch.tensor(basis, dtype=torch.int64 if wide else torch.int32)
        self.register_buffer("basis", basis, persistent=False)
        for key, value in (("h", h), ("offset", offset), ("shift", shift), ("half_levels", half)):
            # Derived from `levels`, so no part of the saved weights.
            self.register_buffer(key, torch.tensor(value, dtype=torch.float32), persistent=False)
        # What a fused forward and backward need of them, one row each, the last one the steepest
        # slope of the bound by its sigmoid.
        h, offset, shift, half = self.h, self.offset, self.shift, self.half_levels
        grid = torch.stack([2 * h, h + offset, 2 * shift, half, 4 * h / half])
        self.register_buffer("grid", grid, persistent=False)

    @classmethod
    def from_args(cls, args) -> FSQ:
        return cls(args.levels or [8, 8, 8, 8])

    def bound(self, z: Tensor) -> Tensor:
        """Squash `z` (B, C, *positions) so that its rounding has `levels[c]` values a channel."""
        h, offset, shift = (per_channel(x, z) for x in (self.h, self.offset, self.shift))
        # tanh(x) = 2 sigmoid(2 x) - 1, of which the sigmoid takes a tenth of the time on a CPU.
        return torch.sigmoid(2 * z + 2 * shift) * (2 * h) - (h + offset)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize `z` (B, C, *positions) to `(quantized, indices)`, indices (B, *positions)."""
        self._check_input(z)
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z.float())
            # Rounding gives -0.0 as well, which the indices do not keep: adding 0.0 makes it 0.0.
            rounded = straight_through(bounded, bounded.round() + 0.0)
            return rounded / per_channel(self.half_levels, z), self.pack(rounded)

    def pack(self, rounded: Tensor, stages: int | None = None) -> Tensor:
        """The index (B, *positions) of integers `round(bound(z))` (B, C, *positions).

        Of those of several stages, one after another on the first axis: (B, *positions, stages).
        """
        digits = rounded.detach().to(self.basis.dtype)
        index = digits.mul_(per_channel(self.basis, digits)).sum(1, dtype=digits.dtype)
        index.add_(self.zero_index)
        if stages is not None:
            index = index.unflatten(0, (stages, -1)).movedim(0, -1)
        return index.to(torch.int64, memory_format=torch.contiguous_format)

    def unpack(self, indices: Tensor) -> Tensor:
        """Inverse of `pack`: float32 integers (B, C, *positions) of int64 (B, *positions)."""
        digits = []
        for level in self.levels:
            digits.append(indices % level)
            indices = indices // level
        digits = torch.stack(digits, dim=1)
        return digits.float() - per_channel(self.half_levels, digits)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Decode `indices` (B, *positions) to codes (B, C, *positions) in [-1, 1]."""
        self._check_indices(indices)
        rounded = self.unpack(indices)
        return rounded / per_channel(self.half_levels, rounded)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Index (B, *positions) of `codes` (B, C, *positions) as `forward` returns them."""
        self._check_input(codes)
        return self.pack((codes * per_channel(self.half_levels, codes)).round())
