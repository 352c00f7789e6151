"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import Quantized, Quantizer
from .checks import check_levels
from .functional import HALF_PRECISION, per_channel, straight_through, traced

EPS = 1e-3


class Grid(NamedTuple):
    """The constants of an FSQ, each (1, C, 1, ...): see `FSQ`."""

    h: Tensor
    offset: Tensor
    shift: Tensor
    half_levels: Tensor  # floor(L/2)


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
            Default: [8, 8, 8, 8].

    Raises:
        ValueError: for levels out of range, or an input whose channels are not `len(levels)`.

    Example:
        >>> fsq = FSQ([8, 8, 8, 8])                       # 4096 codes, 12.0 bits
        >>> quantized, indices = fsq(torch.randn(2, 4, 32, 32))
        >>> torch.equal(fsq.indices_to_codes(indices), quantized)
        True
    """

    flags: ClassVar[dict[str, str]] = {"levels": "levels"}
    levels: list[int]

    def __init__(self, levels: Sequence[int] | None = None):
        super().__init__()
        self.levels = check_levels([8, 8, 8, 8] if levels is None else levels)
        self.dim = len(self.levels)
        self.codebook_sizes = [math.prod(self.levels)]
        self.name = "fsq-" + "x".join(str(level) for level in self.levels)
        half = [level // 2 for level in self.levels]
        basis = [math.prod(self.levels[:i]) for i in range(self.dim)]
        # The index of the code whose integers round(bound(z)) are all 0.
        self.zero_index = sum(x * b for x, b in zip(half, basis, strict=True))
        h = [(level - 1) * (1 - EPS) / 2 for level in self.levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in self.levels]
        shift = [math.tan(o / x) for o, x in zip(offset, h, strict=True)]
        grid = torch.tensor([h, offset, shift, half], dtype=torch.float32, device="cpu")
        dtype = torch.int64 if self.codebook_sizes[0] > 2**31 else torch.int32
        self._constants = grid, torch.tensor(basis, dtype=dtype, device="cpu")

    def grid(self, like: Tensor) -> Grid:
        """The constants, to broadcast against `like` (B, C, *positions)."""
        grid, _ = self.constants(like.device)
        return Grid(*grid.view(4, 1, self.dim, *[1] * (like.dim() - 2)).unbind())

    def bound(self, z: Tensor, grid: Grid) -> Tensor:
        """`h tanh(z + shift) - offset` of `z` (B, C, *positions)."""
        # h tanh(x) = 2h sigmoid(2x) - h: on a CPU the sigmoid takes a tenth of the time.
        share = (z + grid.shift).mul_(2).sigmoid_()
        return (share * (2 * grid.h)).sub_(grid.h + grid.offset)

    def round(self, z: Tensor, grid: Grid) -> Tensor:
        """The integers `round(bound(z))`, straight-through: with the gradient of the bound."""
        bounded = self.bound(z, grid)
        return straight_through(bounded, bounded.round())

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, C, *positions) to codes like it and indices (B, *positions)."""
        grid = self.grid(z)
        rounded = self.round(z, grid)
        # Rounding can give -0.0, which an index does not keep: adding 0.0 makes it 0.0.
        codes = rounded / grid.half_levels + 0.0
        return Quantized(codes, self.pack(rounded))

    def pack(self, rounded: Tensor) -> Tensor:
        """The index (B, *positions) of integers `round(bound(z))` (B, C, *positions).

        Where one of them is NaN, it is an arbitrary index in range.
        """
        _, basis = self.constants(rounded.device)
        digits = rounded.detach().to(basis.dtype)
        index = digits.mul_(per_channel(basis, digits)).sum(1, dtype=digits.dtype)
        return index.add_(self.zero_index).clamp_(0, self.codebook_sizes[0] - 1).to(torch.int64)

    def unpack(self, indices: Tensor) -> Tensor:
        """Inverse of `pack`: float32 integers (B, C, *positions) of int64 (B, *positions)."""
        digits = []
        for level in self.levels:
            digits.append(indices % level)
            indices = indices // level
        digits = torch.stack(digits, dim=1)
        return digits.float() - self.grid(digits).half_levels

    def dequantize(self, indices: Tensor) -> Tensor:
        """Decode `indices` (B, *positions) to codes (B, C, *positions) in [-1, 1]."""
        rounded = self.unpack(indices)
        return rounded / self.grid(rounded).half_levels

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Index (B, *positions) of `codes` (B, C, *positions) as `forward` returns them.

        Raises:
            ValueError: numbers that are no codes of this quantizer.
        """
        self._check_input(codes)
        scaled = codes.float() * self.grid(codes).half_levels
        indices = self.pack(scaled.round())
        # In steps. Half precision is coarse: bfloat16 rounds a code by up to 2^-9.
        coarse = max(0.25, max(self.levels) // 2 / 2**9 + 1e-3)
        near = coarse if codes.dtype in HALF_PRECISION else 1e-3
        known = not (traced() or codes.is_meta)
        if known and not ((self.unpack(indices) - scaled).abs() < near).all():
            raise ValueError(
                f"numbers from {codes.min():.3g} to {codes.max():.3g} are not all codes of "
                f"{self.name}: give what forward or indices_to_codes returned"
            )
        return indices
