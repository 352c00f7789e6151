"""Vector quantization, codebook by moving averages (van den Oord et al., arXiv 1711.00937)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Quantized, Quantizer
from .checks import check_integer, check_weight
from .functional import (
    exporting,
    processes,
    rank,
    showing_nan,
    straight_through,
    sum_over_processes,
)

# Largest part of the tokens x codes matrix of distances in memory, in elements: on a CPU what fits
# its cache, on a GPU 256 MiB.
CHUNK = {"cpu": 2**20, "cuda": 2**26}
BLOCK = 32  # codes, of which a CPU takes the least error first
EPS = 1e-5


class VectorQuantizeEMA(Quantizer):
    """Nearest code by Euclidean distance; the codes are moving averages of their vectors (A.1)::

        N_i <- decay N_i + (1-decay) n_i        n_i: vectors of the batch nearest to code i
        m_i <- decay m_i + (1-decay) sum of those vectors
        code_i <- m_i / N_i                     (N smoothed by Laplace's rule)

    Counts and sums are taken over all processes. A code whose N_i is below `restart_threshold`
    times the mean count (so far or of this batch, whichever is less) is dead: before the next
    assignment it moves to a vector of the batch. All codes are dead at the first batch, which
    therefore initialises the codebook. The new codes are evenly spaced vectors of the batch of all
    processes, chosen without random numbers: on a CPU a resumed run continues exactly, and two
    processes do what one does.

    With `stages` > 1 it is a residual VQ: each stage has its own codebook and quantizes the
    residual of the stages before it; `indices` then ends with an axis of stages.

    The loss is `commitment_loss_weight` times the mean of (r_k - q_k)^2, summed over stages.

    Args:
        codebook_size: codes of each stage.
        dim: channels of `z` and of a code.
        stages: number of stages.
        decay: of the moving averages.
        commitment_loss_weight: beta of the paper.
        restart_threshold: as above. With 0 no code is restarted, and the codebook starts at random.

    Raises:
        ValueError: for arguments out of range, or an input whose channels are not `dim`.

    Example:
        >>> vq = VectorQuantizeEMA(codebook_size=4096, dim=256)   # 12.0 bits
        >>> quantized, indices, loss = vq(torch.randn(2, 256, 32, 32))
    """

    flags: ClassVar[dict[str, str]] = {
        "n_embed": "codebook_size",
        "embed_dim": "dim",
        "ema_stages": "stages",
        "ema_decay": "decay",
        "commitment_weight": "commitment_loss_weight",
    }
    codebook: Tensor
    counts: Tensor
    sums: Tensor
    batches: Tensor

    def __init__(
        self,
        codebook_size: int = 4096,
        dim: int = 256,
        stages: int = 1,
        decay: float = 0.99,
        commitment_loss_weight: float = 0.25,
        restart_threshold: float = 0.3,
    ):
        super().__init__()
        codebook_size = check_integer("codebook_size", codebook_size, least=2)
        dim, stages = check_integer("dim", dim), check_integer("stages", stages)
        check_weight("commitment_loss_weight", commitment_loss_weight)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        if not 0 <= restart_threshold < 1:
            raise ValueError(f"restart_threshold must be in [0, 1), not {restart_threshold}")
        self.dim = dim
        self.codebook_sizes = [codebook_size] * stages
        self.stage_axis = stages > 1
        self.name = f"ema-{stages}x{codebook_size}" if stages > 1 else f"ema-{codebook_size}"
        self.decay = decay
        self.commitment_loss_weight = commitment_loss_weight
        self.restart_threshold = restart_threshold
        codebook = torch.randn(stages, codebook_size, dim, dtype=torch.float32)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.zeros_like(codebook[..., 0]))
        self.register_buffer("sums", torch.zeros_like(codebook))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, dim, *positions) to codes like it, indices and a loss (a scalar)."""
        z = z.movedim(1, -1)  # (B, *positions, dim)
        residual = z
        loss, codes_of_stages, indices = z.new_zeros(()), [], []
        restarts = self.training and self.restart_threshold > 0
        numbers = _tokens_of_processes(z[..., 0]) if restarts else None
        for stage in range(self.stages):
            tokens = residual.detach().reshape(-1, self.dim)  # (N, dim)
            if numbers is not None:
                self._restart(stage, tokens, numbers)
            index = self._nearest(stage, tokens)
            codes = F.embedding(index, self.codebook[stage]).view_as(z)
            loss = loss + self.commitment_loss_weight * F.mse_loss(residual, codes)
            residual = residual - codes
            codes_of_stages.append(codes)
            indices.append(index.view(z.shape[:-1]))
            if self.training:
                self._update(stage, tokens, index)
        if self.training:
            self.batches += 1
        total = sum(codes_of_stages[1:], start=codes_of_stages[0])
        codes = straight_through(z, showing_nan(total, z)).movedim(-1, 1)
        return Quantized(codes, torch.stack(indices, -1) if self.stage_axis else indices[0], loss)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Decode `indices` (B, *positions[, first stages]) to codes (B, dim, *positions)."""
        stages = indices.unbind(-1) if self.stage_axis else [indices]
        codes = [F.embedding(index, self.codebook[k]) for k, index in enumerate(stages)]
        return sum(codes[1:], start=codes[0]).movedim(-1, 1)

    @torch.no_grad()
    def _nearest(self, stage: int, tokens: Tensor) -> Tensor:
        """Index (N,) of the code nearest to each of `tokens` (N, dim), chunk by chunk."""
        # About the mean of the codes, because far from zero |c|^2 - 2 c t would cancel what tells
        # them apart.
        centre = self.codebook[stage].mean(0)
        codebook, tokens = self.codebook[stage] - centre, tokens - centre
        norms = codebook.square().sum(1)
        chunk = CHUNK.get(tokens.device.type, CHUNK["cuda"]) // len(codebook)
        # An exported or traced program with a loop over chunks would have a fixed number of tokens.
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        chunks = [tokens] if exporting() or tracing else tokens.split(max(1, chunk))
        # |t|^2 is the same for all codes, so it is omitted.
        errors = (torch.addmm(norms, part, codebook.t(), alpha=-2) for part in chunks)
        return torch.cat([_argmin(each) for each in errors])

    @torch.no_grad()
    def _update(self, stage: int, tokens: Tensor, index: Tensor) -> None:
        """Move counts, sums and codes of a stage towards `tokens` (N, dim), assigned by `index`."""
        counts = torch.zeros_like(self.counts[stage])
        counts.index_add_(0, index, torch.ones_like(tokens[:, 0]))
        sums = torch.zeros_like(self.sums[stage]).index_add_(0, index, tokens)
        counts, sums = sum_over_processes(counts), sum_over_processes(sums)
        # The training loop skips the step of a batch that is not finite, and so does the codebook.
        finite = sums.isfinite().all()
        weight = (1 - self.decay) * finite.float()
        self.counts[stage].lerp_(torch.where(finite, counts, 0.0), weight)
        self.sums[stage].lerp_(torch.where(finite, sums, 0.0), weight)
        counts, total = self.counts[stage], self.counts[stage].sum()
        smoothed = (counts + EPS) / (total + len(counts) * EPS) * total
        # A code without any token so far has no mean: it stays where it is.
        moved = torch.where(
            counts[:, None] > 0, self.sums[stage] / smoothed[:, None], self.codebook[stage]
        )
        self.codebook[stage].copy_(moved)

    @torch.no_grad()
    def _restart(self, stage: int, tokens: Tensor, numbers: Tensor) -> None:
        """Move the dead codes of a stage to tokens of the batch.

        `tokens` (N, dim), of this process; `numbers` (processes,), the N of each.
        """
        codes, n = len(self.codebook[stage]), len(tokens)
        total, before = numbers.sum(), numbers[: rank()].sum()
        # Evenly spaced rows of the batch of all processes. The first row differs by batch and by
        # stage, because a token that is a code of one stage has a residual of zero in the next.
        rows = torch.arange(codes, device=tokens.device) * total // codes
        rows = (rows + (self.batches * self.stages + stage) * 7919) % total - before
        mine = (rows >= 0) & (rows < n)
        candidates = torch.where(mine[:, None], tokens[rows.clamp(0, n - 1)], 0.0)
        # The last row tells whether the batch of all processes is finite, as `_update` asks it.
        candidates = sum_over_processes(torch.cat([candidates, tokens.abs().sum(0, keepdim=True)]))
        finite, candidates = candidates.isfinite().all(), candidates[:-1]
        # A batch that is larger than those so far makes no code dead.
        so_far, mean_count = self.counts[stage].mean(), total / codes
        mean_count = torch.where(so_far > 0, so_far.minimum(mean_count), mean_count)
        dead = self.counts[stage] < self.restart_threshold * mean_count
        dead = dead & finite
        self.codebook[stage].copy_(torch.where(dead[:, None], candidates, self.codebook[stage]))
        self.sums[stage].copy_(
            torch.where(dead[:, None], candidates * mean_count, self.sums[stage])
        )
        self.counts[stage].copy_(torch.where(dead, mean_count, self.counts[stage]))


def _tokens_of_processes(tokens: Tensor) -> Tensor:
    """Numbers of elements of `tokens` in each process, int64 (processes,)."""
    mine = torch.arange(processes(), device=tokens.device) == rank()
    return sum_over_processes(mine * tokens.numel())


def _argmin(x: Tensor) -> Tensor:
    """`x.argmin(1)` of (N, codes), the first of equal ones; on a CPU twice as fast."""
    if x.device.type != "cpu" or x.shape[1] % BLOCK:
        return x.min(1).indices  # faster than `argmin`
    # The CPU vectorises a minimum, but not its position: find the block of 32 codes first.
    blocks = x.unflatten(1, (-1, BLOCK))
    block = blocks.amin(2).argmin(1, keepdim=True)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).argmin(2)
    return (block * BLOCK + within)[:, 0]
