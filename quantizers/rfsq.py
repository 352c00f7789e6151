"""Robust residual finite scalar quantization (Zhu et al., arXiv 2508.15860)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Quantizer, per_channel, processes, rank, straight_through
from .chain import Chain, affine, average, dequantize, image_moments, running_std, spread
from .fsq import FSQ

STRATEGIES = ("none", "scale", "layernorm", "geometric")
PAPER_LEVELS = {2: [8, 8, 8, 4], 4: [4, 4, 4, 4, 4]}
MAX_CELLS = 2**20  # of a channel, all stages together: float32 tells no more apart


class RFSQ(Quantizer):
    """Residual FSQ: each stage quantizes what the stages before it left over.

    ::

        r_1 = z      q_k = A_k^-1( FSQ( A_k(r_k) ) )      r_{k+1} = r_k - q_k
        quantized = q_1 + ... + q_K

    A_k is an affine map per channel, `A_k(r) = a r + b`, so that the codes of a stage lie on a
    grid, `q = n / (a floor(L/2)) - b/a`, of the integers n = round(bound(A_k(r))). The decoder
    computes the same expression from the same integers.

    strategy:
        - `none`: a = 1, b = 0. The residual shrinks, and later stages use few of their codes.
        - `scale`: a is a learned positive number for each stage, held as its logarithm.
        - `layernorm`: a = gain/std, b = bias - a mean, gain and bias learned for each stage and
          channel. At the start gain = 1.1/sqrt(L) and bias = -1/L for even L (0 for odd), close to
          the least squared error of a unit Gaussian for L = 3 to 64: with gain 1 the tanh
          saturates, and the codes of an even L lie around -1/L.
        - `geometric` (not in the paper): one map and one bound at the input in place of one in
          each stage, y = u/sqrt(1 + u^2), u = s (z - mean)/std, of which stage k takes the k-th
          digit in base L: its cells are 1/L as wide as those of the stage before, and the residual
          is a rounding error that shrinks by L from stage to stage. A cell decodes to the z of its
          middle. So the stages together are one quantizer of N = L^K cells a channel, narrow around
          the mean and wide in the tails, and mean and std are running averages, as below. This y is
          the best compander (Panter and Dite, 1951) of Student's t with 8 degrees of freedom, whose
          tails are between those of a Gaussian and a Laplacian, if s = 1/sqrt(6). With
          s = 1/sqrt(6) + 0.7/N, the default, all three lose little to their best s, from N = 2 to
          256. That is for indices of a fixed number of bits; entropy coding prefers a small s,
          which makes the cells around the mean equal, and more of them.

    statistics (of `layernorm`):
        - `global` (default): running averages of each stage and channel's mean and variance, used
          in training and evaluation alike; constants of the model once it is trained. The indices
          alone decode.
        - `image`: mean and std over the positions of each image, as in the paper's public code.
          The decoder needs these 2 * dim * stages numbers an image as well. `forward` returns
          them, rounded to half precision, as its fourth value, `indices_to_codes` takes them, and
          they are counted: `side_bits` = 32 * dim * stages bits an image.

    Both choices were measured on photographs (128x128, f = 4, width 64, L1, 1,000 steps of 16; PSNR
    of 490 others; two seeds, that differ by 0.1 to 0.25 dB). 2x2048: running averages and gain 1
    25.2 dB, with the gain above 25.9; batch statistics in training, as batch normalisation has
    them, 24.7 and 25.6; image statistics 24.6 and 25.5. 4x1024 (one seed): 25.3 and 26.6; 25.5 and
    26.3; 26.0 and 26.4.

    The gradient (straight-through in every stage, the residual taken with its gradient) is
    d quantized / dz = 1 - prod_k (1 - d_k), with d_k the slope of stage k's bound: at most 1. Of
    `geometric` it is the slope of the bound at z over that at the code: about 1, but falling beyond
    the outermost codes, without which the latent drifts away from them.

    Args:
        stages: number of stages K.
        strategy: one of `none`, `scale`, `layernorm`, `geometric`.
        levels: levels of each channel, the same in every stage. Default: [8, 8, 8, 4] for 2 stages
            (2 x 11 = 22.0 bits) and [4, 4, 4, 4, 4] for 4 stages (4 x 10 = 40.0 bits), the paper's
            two configurations; other numbers of stages have no default.
        initial_scale: `scale`: a of every stage at the start.
        slope: `geometric`: s. Default: by the number of cells, as above.
        statistics: `layernorm`: `global` or `image`.
        momentum: `global` and `geometric`: weight of a new batch in the running averages (the
            first 1/momentum batches are averaged evenly).
        stage_dropout: probability that an image in training is quantized by its first k stages
            alone, k from 1 to K-1 alike, so that one model decodes well at each of its rates (as
            the quantizer dropout of Zeghidour et al., arXiv 2107.03312). Indices and statistics
            are those of all stages.

    Raises:
        ValueError: for an unknown strategy or statistics, levels or a scale out of range, or an
            input whose channels are not `len(levels)`.

    Example:
        >>> rfsq = RFSQ(stages=2, strategy="layernorm")             # 22.0 bits
        >>> quantized, indices = rfsq(torch.randn(2, 4, 32, 32))    # indices: (2, 32, 32, 2)
        >>> one_stage = rfsq.indices_to_codes(indices[..., :1])     # the first stage alone
    """

    stage_axis = True

    def __init__(
        self,
        stages: int = 2,
        strategy: str = "layernorm",
        levels: Sequence[int] | None = None,
        initial_scale: float = 1.0,
        slope: float | None = None,
        statistics: str = "global",
        momentum: float = 0.01,
        stage_dropout: float = 0.0,
    ):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(
                f"strategy {strategy!r} is unknown: choose from {', '.join(STRATEGIES)}"
            )
        if statistics not in ("global", "image"):
            raise ValueError(f"statistics {statistics!r} is unknown: choose from global, image")
        if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
            raise ValueError(f"stages must be an integer of 1 or more, not {stages!r}")
        if levels is None and stages not in PAPER_LEVELS:
            raise ValueError(
                f"{stages} stages have no default levels (2 and 4 do): give levels, one number a "
                "channel, as in 8 8 8 4"
            )
        if not (math.isfinite(initial_scale) and initial_scale > 0):
            raise ValueError(f"initial_scale must be a positive number, not {initial_scale}")
        if slope is not None and not (math.isfinite(slope) and slope > 0):
            raise ValueError(f"slope must be a positive number, not {slope}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], not {momentum}")
        if not 0 <= stage_dropout <= 1:
            raise ValueError(f"stage_dropout must be in [0, 1], not {stage_dropout}")
        self.fsq = FSQ(PAPER_LEVELS[stages] if levels is None else levels)
        self.levels = self.fsq.levels
        self.dim = self.fsq.dim
        self.codebook_sizes = self.fsq.codebook_sizes * stages
        if strategy == "geometric" and max(self.levels) ** stages > MAX_CELLS:
            raise ValueError(
                f"{stages} geometric stages of {max(self.levels)} levels are more than 2^20 cells "
                "of a channel: give fewer stages or levels"
            )
        self.strategy = strategy
        self.statistics = statistics if strategy == "layernorm" else None
        self.momentum = momentum
        self.stage_dropout = stage_dropout if stages > 1 else 0.0
        size = self.codebook_sizes[0]
        codes = str(size) if size <= 2**20 else f"{math.log2(size):.4g}bit"
        self.name = f"rfsq-{stages}x{codes}-{strategy}"
        level = torch.tensor(self.levels, dtype=torch.float32)
        self.register_buffer("level", level, persistent=False)
        best = 6**-0.5 + 0.7 / level**stages
        slope = best if slope is None else torch.full_like(best, slope)
        self.register_buffer("slope", slope, persistent=False)
        if strategy == "scale":
            self.log_scale = nn.Parameter(torch.full((stages,), math.log(initial_scale)))
        elif strategy == "layernorm":
            gain = 1.1 / level.sqrt()
            bias = torch.where(level % 2 == 0, -1 / level, 0.0)
            self.log_gain = nn.Parameter(gain.log().repeat(stages, 1))
            self.bias = nn.Parameter(bias.repeat(stages, 1))
            if statistics == "image":
                self.name += "-image"
                self.side_bits = 16.0 * 2 * self.dim * stages
        if strategy == "geometric" or self.statistics == "global":
            maps = 1 if strategy == "geometric" else stages
            self.register_buffer("running_mean", torch.zeros(maps, self.dim))
            self.register_buffer("running_var", torch.ones(maps, self.dim))
            self.register_buffer("batches", torch.zeros(()))

    @classmethod
    def from_args(cls, args) -> RFSQ:
        return cls(
            stages=args.rfsq_stages,
            strategy=args.rfsq_strategy,
            levels=args.levels,
            initial_scale=args.rfsq_initial_scale,
            slope=args.rfsq_slope,
            statistics=args.rfsq_statistics,
            stage_dropout=args.rfsq_stage_dropout,
        )

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """Quantize `z` (B, dim, *positions) to `(quantized, indices)`, indices (B, *positions, K).

        With image statistics: `(quantized, indices, loss, statistics)`, the loss a zero and
        statistics (B, K, 2, dim) the mean and std of each image, stage and channel.
        """
        self._check_input(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.strategy == "geometric":
                return self._geometric(z)
            running, weight = None, None
            if self.statistics == "global":
                running = torch.stack([self.running_mean, self.running_var])
                if self.training:
                    batches, weight = self._next_batch()
            image, kept = self.statistics == "image", self._stages_kept(z)
            quantized, integers, moments = Chain.apply(
                z, *self._maps(), running, weight, image, kept, self.stages, self.fsq.grid
            )
            indices = self.fsq.pack(integers, self.stages)
            if weight is not None:
                self._keep(moments.view(2, self.stages, self.dim), batches)
            if image:
                statistics = moments.flatten(3).permute(2, 1, 0, 3)
                return quantized, indices, quantized.new_zeros(()), statistics
            return quantized, indices

    def indices_to_codes(self, indices: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Decode `indices` (B, *positions, k) of the first k stages to (B, dim, *positions).

        Args:
            indices: int64, as `forward` returns them, or their first k stages.
            statistics: (B, >= k, 2, dim), as `forward` returns them with image statistics; needed
                then, and refused otherwise.
        """
        self._check_indices(indices)
        k = indices.shape[-1]
        if self.statistics == "image":
            wanted = (len(indices), self.stages, 2, self.dim)
            given = "none" if statistics is None else tuple(statistics.shape)
            if (
                statistics is None
                or len(given) != 4
                or not k <= given[1] <= self.stages
                or ((given[0], *given[2:]) != (wanted[0], *wanted[2:]))
            ):
                raise ValueError(
                    f"{self.name} decodes with the statistics {wanted} that forward returned, "
                    f"but {given} were given"
                )
        elif statistics is not None:
            raise ValueError(f"{self.name} decodes from indices alone, but statistics were given")
        quantized = None
        for stage, index in enumerate(indices.unbind(-1)):
            rounded = self.fsq.unpack(index)
            if self.strategy == "geometric":
                codes = self._geometric_codes(rounded, stage)
            else:
                image = None if statistics is None else statistics[:, stage].float().unbind(1)
                a, b = self._affine(stage, rounded, image)
                codes = dequantize(rounded, a, b, per_channel(self.fsq.half_levels, rounded))
            quantized = codes if quantized is None else quantized + codes
        return self._unbounded(quantized) if self.strategy == "geometric" else quantized

    @torch.no_grad()
    def stage_input(self, stage: int, z: Tensor, quantized: Tensor | None = None) -> Tensor:
        """What enters the FSQ of `stage` (from 0), or is cut into L cells of [-1, 1] (`geometric`).

        For looking into a trained quantizer; changes nothing.

        Args:
            z: the latent (B, dim, *positions).
            quantized: what the stages before decode to; None for the first stage.
        """
        self._check_input(z)
        z = z.float()
        if self.strategy == "geometric":
            before = 0 if quantized is None else self._bounded(quantized)
            return (self._bounded(z) - before) * per_channel(self.level, z) ** stage
        residual = z if quantized is None else z - quantized
        image = image_moments(residual) if self.statistics == "image" else None
        a, b = self._affine(stage, residual, image)
        return residual * (1 if a is None else a) + (0 if b is None else b)

    def _geometric(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` of `geometric`."""
        if self.training:
            batches, weight = self._next_batch()
            share = torch.full_like(weight, self.dim / z.numel())
            moments = average(*self._input_moments(z), z.detach(), weight, share)
            self._keep(torch.stack(moments).view(2, 1, self.dim), batches)
        bounded, kept = self._bounded(z), self._stages_kept(z)
        with torch.no_grad():
            levels, half = (per_channel(x, z) for x in (self.level, self.fsq.half_levels))
            residual, total, indices = bounded, None, []
            for stage in range(self.stages):
                # Cell 0 to L-1 of the L cells of [-1, 1]; 1 itself belongs to the last.
                digit = ((residual * levels**stage + 1) * (levels / 2)).floor_()
                rounded = digit.clamp_(min=0).minimum(levels - 1).sub_(half)
                codes = self._geometric_codes(rounded, stage)
                residual = residual - codes
                if total is None:
                    total = codes
                elif kept is None:
                    total = total + codes
                else:
                    total = torch.where(kept > stage, total + codes, total)
                indices.append(self.fsq.pack(rounded))
        return self._unbounded(straight_through(bounded, total)), torch.stack(indices, dim=-1)

    def _geometric_codes(self, rounded: Tensor, stage: int) -> Tensor:
        """Middles of the cells of `stage`, of the integers digit - floor(L/2)."""
        levels = per_channel(self.level, rounded)
        digit = rounded + per_channel(self.fsq.half_levels, rounded)
        return ((2 * digit + 1) / levels - 1) / levels**stage

    def _bounded(self, z: Tensor) -> Tensor:
        """y = u/sqrt(1 + u^2), u = s (z - mean)/std, of `geometric`."""
        mean, var = self._input_moments(z)
        u = (z - mean) * (per_channel(self.slope, z) / running_std(var))
        u = u.clamp(-1e6, 1e6)  # lest the square overflow
        return u / (1 + u.square()).sqrt()

    def _unbounded(self, y: Tensor) -> Tensor:
        """The inverse of `_bounded`, of operations that every device rounds alike."""
        mean, var = self._input_moments(y)
        u = y / ((1 - y) * (1 + y)).sqrt()
        return u * (running_std(var) / per_channel(self.slope, y)) + mean

    def _input_moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance (1, dim, ...) of the input, `geometric`."""
        return per_channel(self.running_mean[0], like), per_channel(self.running_var[0], like)

    def _stages_kept(self, like: Tensor) -> Tensor | None:
        """How many stages each image of `like` keeps, (B, 1, ...); None without stage dropout.

        Drawn for the images of all processes by each of them, so that they do together what one
        does alone, as long as their random states are equal.
        """
        if not (self.training and self.stage_dropout):
            return None
        n, each = processes(), len(like)
        drop, k = torch.rand(2, n * each, device=like.device)
        kept = torch.where(
            drop < self.stage_dropout, 1 + (k * (self.stages - 1)).floor(), self.stages
        )
        return kept[rank() * each :][:each].view(-1, *[1] * (like.dim() - 1))

    def _maps(self) -> tuple[Tensor | None, Tensor | None]:
        """What is learned of the maps: the logarithm of the gain, and the bias; None: no such."""
        if self.strategy == "scale":
            return self.log_scale, None
        if self.strategy == "layernorm":
            return self.log_gain, self.bias
        return None, None

    def _affine(self, stage: int, like: Tensor, image: Sequence[Tensor] | None):
        """`(a, b)` of A_k in evaluation; `image`: mean and std (B, dim, ...), image statistics."""
        mean, std = None, None
        if image is not None:
            mean, std = (x.view(*x.shape[:2], *[1] * (like.dim() - 2)) for x in image)
        elif self.statistics == "global":
            mean = per_channel(self.running_mean[stage], like)
            std = running_std(per_channel(self.running_var[stage], like))
        log_gain, bias = self._maps()
        gain = None if log_gain is None else spread(log_gain.exp(), like)[stage]
        bias = None if bias is None else spread(bias, like)[stage]
        return affine(gain, bias, mean, std)

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """Number of this batch in training, and its weight in the running averages."""
        batches = self.batches + 1
        return batches, batches.reciprocal().clamp_(min=self.momentum)

    @torch.no_grad()
    def _keep(self, moments: Tensor, batches: Tensor) -> None:
        """Make means and variances (2, maps, dim) the running ones, unless one is not finite.

        The training loop skips the step of such a batch; it leaves no trace here either.
        """
        bad = (moments - moments).any()  # NaN counts as true
        mean, var = moments
        torch.where(bad, self.running_mean, mean, out=self.running_mean)
        torch.where(bad, self.running_var, var, out=self.running_var)
        torch.where(bad, self.batches, batches, out=self.batches)
