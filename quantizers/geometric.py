"""Residual FSQ with geometric stages: one bound at the input, a digit in base L from each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .base import Quantized
from .functional import per_channel, straight_through
from .moments import next_batch, running_std, update_moments
from .residual import ResidualFSQ

MAX_CELLS = 2**20  # of a channel, all stages together: float32 cannot resolve more


class GeometricRFSQ(ResidualFSQ):
    """Residual FSQ whose stages are the digits of one quantizer (not in the RFSQ paper).

    In place of a map and a bound in each stage there is one of each at the input::

        y = u / sqrt(1 + u^2)       u = s (z - mean) / std         in (-1, 1)

    Stage k takes the k-th digit of y in base L: its cells are 1/L as wide as those of the stage
    before, so that the residual is a rounding error that shrinks by L from stage to stage. All
    stages together are one quantizer of N = L^K equal cells of y. A cell decodes to the z of its
    middle, so that in z the cells are narrow around the mean and wide in the tails.

    This y is the optimal compander (Panter and Dite, 1951) of Student's t with 8 degrees of
    freedom, whose tails are between those of a Gaussian and a Laplacian, if s = 1/sqrt(6). The
    default s = 1/sqrt(6) + 0.7/N is within 0.6 dB of the best s for all three, for N from 2 to 256
    (1.1 dB for a Gaussian at N = 4, 0.8 dB for a Laplacian at N = 16). That holds for a fixed
    number of bits per index. Entropy coding prefers a small s with more cells, because the cells
    around the mean are then equal.

    `mean` and `std` are running averages per channel, used in training and evaluation alike, and
    constants after training: the indices alone decode.

    The rounding of y is straight-through, so d quantized / dz is the slope of the bound at z over
    its slope at the code: about 1, and less beyond the outermost codes, where a gradient of 1 would
    let the latent drift away from them.

    Args:
        stages: number of stages K.
        levels: levels of each channel, the same in every stage. Default: [8, 8, 8, 4] for 2 stages
            (22.0 bits), [4, 4, 4, 4, 4] for 4 stages (40.0 bits), none for other numbers of stages.
        slope: s. Default: by the number of cells, as above.
        momentum, stage_dropout: see `ResidualFSQ`.

    Raises:
        ValueError: for arguments out of range, more than 2^20 cells in a channel, or an input whose
            channels are not `len(levels)`.

    Example:
        >>> rfsq = GeometricRFSQ(stages=2, levels=[8, 8, 8, 4])     # 22.0 bits
        >>> quantized, indices = rfsq(torch.randn(2, 4, 32, 32))    # indices: (2, 32, 32, 2)
    """

    flags: ClassVar[dict[str, str]] = {
        "rfsq_stages": "stages",
        "levels": "levels",
        "rfsq_slope": "slope",
        "rfsq_stage_dropout": "stage_dropout",
    }

    def __init__(
        self,
        stages: int = 2,
        levels: Sequence[int] | None = None,
        slope: float | None = None,
        momentum: float = 0.01,
        stage_dropout: float = 0.0,
    ):
        if slope is not None and not (math.isfinite(slope) and slope > 0):
            raise ValueError(f"slope must be a positive number, not {slope}")
        super().__init__("geometric", stages, levels, momentum, stage_dropout)
        if max(self.levels) ** stages > MAX_CELLS:
            raise ValueError(
                f"{stages} geometric stages of {max(self.levels)} levels are more than 2^20 cells "
                "of a channel: give fewer stages or levels"
            )
        level = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
        best = 6**-0.5 + 0.7 / level**stages
        self._constants = level, best if slope is None else torch.full_like(best, slope)
        self._add_running_moments(rows=1)

    def read_flags(self) -> list[str]:
        """The flags of the command line that this quantizer reads."""
        return ["rfsq_strategy", *self.flags]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope.tolist()}"

    @property
    def slope(self) -> Tensor:
        """s of each channel (dim,), on the CPU."""
        _, slope = self._constants
        return slope

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, dim, *positions) to codes like it and indices (B, *positions, K)."""
        if self.training:
            batch = next_batch(self.batches, self.momentum)
            ((mean, var),) = self._running_moments(z)
            self._store_moments([update_moments(mean, var, z, batch.weight)], batch)
        bounded, kept = self._bound(z), self._stages_kept(z)
        residual, total = bounded.detach(), z.new_zeros(())
        (levels, _), half_levels = self._levels_and_slope(z), self.fsq.grid(z).half_levels
        indices = []
        with torch.no_grad():
            for k in range(self.stages):
                # Cell 0 to L-1 of the L cells of [-1, 1]; 1 itself belongs to the last.
                digit = ((residual * _power(levels, k) + 1) * (levels / 2)).floor_()
                rounded = digit.clamp_(min=0).minimum(levels - 1).sub_(half_levels)
                codes = self._denormalise(rounded, k)
                residual = residual - codes
                total = total + (codes if kept is None else torch.where(kept > k, codes, 0))
                indices.append(self.fsq.pack(rounded))
        codes = self._unbound(straight_through(bounded, total))
        return Quantized(codes, torch.stack(indices, dim=-1))

    def dequantize(self, indices: Tensor) -> Tensor:
        """Decode `indices` (B, *positions, k) of the first k stages to (B, dim, *positions)."""
        total = torch.zeros((), device=indices.device)
        for k, index in enumerate(indices.unbind(-1)):
            total = total + self._denormalise(self.fsq.unpack(index), k)
        return self._unbound(total)

    @torch.no_grad()
    def stage_input(self, stage: int, z: Tensor, quantized: Tensor | None = None) -> Tensor:
        """The number in [-1, 1] that a stage cuts into L cells: see `Quantizer.stage_input`."""
        self._check_input(z)
        before = 0 if quantized is None else self._bound(quantized)
        return (self._bound(z.float()) - before) * _power(self._levels_and_slope(z)[0], stage)

    def _levels_and_slope(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """L and s of each channel, to broadcast against `like` (B, dim, *positions)."""
        levels, slope = self.constants(like.device)
        return per_channel(levels, like), per_channel(slope, like)

    def _denormalise(self, rounded: Tensor, stage: int) -> Tensor:
        """The middle, in y, of the cell of a stage, given the integers digit - floor(L/2)."""
        levels, _ = self._levels_and_slope(rounded)
        digit = rounded + self.fsq.grid(rounded).half_levels
        return ((2 * digit + 1) / levels - 1) / _power(levels, stage)

    def _bound(self, z: Tensor) -> Tensor:
        """y = u/sqrt(1 + u^2), u = s (z - mean)/std."""
        ((mean, var),) = self._running_moments(z)
        _, slope = self._levels_and_slope(z)
        u = (z - mean) * (slope / running_std(var))
        u = u.clamp(-1e6, 1e6)  # otherwise the square overflows
        return u / (1 + u.square()).sqrt()

    def _unbound(self, y: Tensor) -> Tensor:
        """The inverse of `_bound`, of operations that every device rounds alike."""
        ((mean, var),) = self._running_moments(y)
        u = y / ((1 - y) * (1 + y)).sqrt()
        _, slope = self._levels_and_slope(y)
        return u * (running_std(var) / slope) + mean


def _power(levels: Tensor, exponent: int) -> Tensor:
    """levels^exponent by products, which are exact; `pow` is not, on every device."""
    power = torch.ones_like(levels)
    for _ in range(exponent):
        power = power * levels
    return power
