"""What the residual FSQs share: an FSQ for the stages, running moments, stage dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Quantizer
from .checks import check_integer, check_momentum
from .fsq import FSQ
from .functional import processes, rank
from .moments import Batch, store_if

PAPER_LEVELS = {2: [8, 8, 8, 4], 4: [4, 4, 4, 4, 4]}


class ResidualFSQ(Quantizer):
    """Base class of the residual FSQs, whose stages all have the same levels.

    Args:
        kind: the last part of the name.
        stages: number of stages K.
        levels: levels of each channel. Default: [8, 8, 8, 4] for 2 stages (2 x 11 = 22.0 bits) and
            [4, 4, 4, 4, 4] for 4 stages (4 x 10 = 40.0 bits), the two configurations of the paper;
            other numbers of stages have no default.
        momentum: weight of a new batch in the running moments. The first 1/momentum batches are
            averaged evenly.
        stage_dropout: probability that an image in training is quantized by its first k stages
            alone, with k uniform in 1 .. K-1, so that one model decodes well at each of its rates
            (the quantizer dropout of Zeghidour et al., arXiv 2107.03312). Indices and statistics
            are those of all stages.

    Raises:
        ValueError: for arguments out of range.
    """

    stage_axis = True
    levels: list[int]
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(
        self,
        kind: str,
        stages: int,
        levels: Sequence[int] | None,
        momentum: float,
        stage_dropout: float,
    ):
        super().__init__()
        stages = check_integer("stages", stages)
        if levels is None and stages not in PAPER_LEVELS:
            raise ValueError(
                f"{stages} stages have no default levels (2 and 4 do): give levels, one number a "
                "channel, as in 8 8 8 4"
            )
        if not 0 <= stage_dropout <= 1:
            raise ValueError(f"stage_dropout must be in [0, 1], not {stage_dropout}")
        self.fsq = FSQ(PAPER_LEVELS[stages] if levels is None else levels)
        self.levels = self.fsq.levels
        self.dim = self.fsq.dim
        self.codebook_sizes = self.fsq.codebook_sizes * stages
        self.momentum = check_momentum(momentum)
        self.stage_dropout = stage_dropout if stages > 1 else 0.0
        size = self.codebook_sizes[0]
        codes = str(size) if size <= 2**20 else f"{math.log2(size):.4g}bit"
        self.name = f"rfsq-{stages}x{codes}-{kind}"

    def _add_running_moments(self, rows: int) -> None:
        """Register running means and variances (rows, dim), and the number of batches in them."""
        self.register_buffer("running_mean", torch.zeros(rows, self.dim, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(rows, self.dim, dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float32))

    def _running_moments(self, like: Tensor) -> list[tuple[Tensor, ...]]:
        """Running mean and variance (1, dim, 1, ...) of each row, to broadcast against `like`.

        Copies, so that a later update does not change what autograd has saved.
        """
        moments = torch.stack([self.running_mean, self.running_var])
        mean, var = moments.view(2, -1, 1, self.dim, *[1] * (like.dim() - 2)).unbind()
        return list(zip(mean.unbind(), var.unbind(), strict=True))

    @torch.no_grad()
    def _store_moments(self, moments: list[tuple[Tensor, ...]], batch: Batch) -> None:
        """Store means and variances of all rows as the running ones, unless one is not finite."""
        new = torch.stack([mean for mean, _ in moments] + [var for _, var in moments])
        mean, var = new.view(2, *self.running_mean.shape).unbind()
        good = ~(new - new).any()  # x - x is 0 or NaN, and NaN counts as true
        store_if(
            good,
            (self.running_mean, mean),
            (self.running_var, var),
            (self.batches, batch.number),
        )

    def _stages_kept(self, like: Tensor) -> Tensor | None:
        """Number of stages of each image of `like`, (B, 1, ...); None without stage dropout.

        Every process draws for the images of all processes and takes its part, so that with equal
        random states N processes do what one does.
        """
        if not (self.training and self.stage_dropout):
            return None
        n, each = processes(), len(like)
        drop, k = torch.rand(2, n * each, device=like.device, dtype=torch.float32)
        kept = torch.where(
            drop < self.stage_dropout, 1 + (k * (self.stages - 1)).floor(), self.stages
        )
        return kept[rank() * each :][:each].view(-1, *[1] * (like.dim() - 1))
