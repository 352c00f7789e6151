"""Robust residual finite scalar quantization (Zhu et al., arXiv 2508.15860)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Quantized
from .fsq import Grid
from .functional import per_channel, straight_through
from .moments import next_batch, running_std, update_moments
from .residual import ResidualFSQ

LEAST_STD = 1e-3  # of an image


class RFSQ(ResidualFSQ):
    """Residual FSQ: each stage quantizes the residual of the stages before it.

    ::

        r_1 = z      q_k = A_k^-1( FSQ( A_k(r_k) ) )      r_{k+1} = r_k - q_k
        quantized = q_1 + ... + q_K

    A_k is an affine map per channel, `A_k(r) = a r + b`, so that the codes of a stage lie on a
    grid, `q = n / (a floor(L/2)) - b/a`, of the integers n = round(bound(A_k(r))). The decoder
    computes the same expression from the same integers.

    strategy:
        - `none`: a = 1, b = 0. The residual shrinks, and later stages use their codes unevenly.
        - `scale`: a is a learned positive number for each stage, stored as its logarithm.
        - `layernorm`: A(r) = (r - mean)/std * gain + bias, that is a = gain/std and
          b = bias - a mean, with gain (stored as its logarithm) and bias learned for each stage and
          channel. The name is the paper's: the statistics are of each channel, not of the channels
          of a position.

    statistics (of `layernorm`):
        - `global` (default): running averages of the mean and variance of each stage and channel,
          used in training and evaluation alike; constants of the model after training. The indices
          alone decode.
        - `image`: mean and std over the positions of each image, as in the paper's public code.
          The decoder needs these 2 * dim * stages numbers per image as well. `forward` returns
          them, rounded to half precision, as its fourth value, `indices_to_codes` takes them, and
          they are counted: `side_bits` = 32 * dim * stages bits per image.

    Rounding is straight-through in every stage, and the residual is subtracted with its gradient,
    so that d quantized / dz = 1 - prod_k (1 - d_k) <= 1, with d_k the slope of the bound of stage k
    in units of its codes. (With statistics of the image the gradient also goes through these.)

    Args:
        stages: number of stages K.
        strategy: `none`, `scale` or `layernorm`. (`geometric` is the class `GeometricRFSQ`.)
        levels: levels of each channel, the same in every stage. Default: [8, 8, 8, 4] for 2 stages
            (22.0 bits), [4, 4, 4, 4, 4] for 4 stages (40.0 bits), none for other numbers of stages.
        initial_scale: `scale`: a of every stage at the start. The default, log 2, is what the
            paper's implementation starts from.
        initial_gain: `layernorm`: gain of every stage and channel at the start, with a bias of 0;
            1 in the paper's implementation. Default: 1.1/sqrt(L), with a bias of -1/L for even L,
            within 0.5 dB of the least squared error of a unit Gaussian for L = 4 to 64 (0.8 dB for
            3). With a gain of 1 the tanh saturates, and the codes of an even L are around -1/L.
        statistics: `layernorm`: `global` or `image`.
        momentum, stage_dropout: see `ResidualFSQ`.

    Raises:
        ValueError: for an unknown strategy or statistics, levels or a scale out of range, or an
            input whose channels are not `len(levels)`.

    Example:
        >>> rfsq = RFSQ(stages=2, strategy="layernorm")             # 22.0 bits
        >>> quantized, indices = rfsq(torch.randn(2, 4, 32, 32))    # indices: (2, 32, 32, 2)
        >>> one_stage = rfsq.indices_to_codes(indices[..., :1])     # the first stage alone
    """

    STRATEGIES: ClassVar = ("none", "scale", "layernorm")
    flags: ClassVar[dict[str, str]] = {
        "rfsq_stages": "stages",
        "rfsq_strategy": "strategy",
        "levels": "levels",
        "rfsq_initial_scale": "initial_scale",
        "rfsq_initial_gain": "initial_gain",
        "rfsq_statistics": "statistics",
        "rfsq_stage_dropout": "stage_dropout",
    }

    def __init__(
        self,
        stages: int = 2,
        strategy: str = "layernorm",
        levels: Sequence[int] | None = None,
        initial_scale: float = 0.693147,
        initial_gain: float | None = None,
        statistics: str = "global",
        momentum: float = 0.01,
        stage_dropout: float = 0.0,
    ):
        if strategy not in self.STRATEGIES:
            raise ValueError(
                f"strategy {strategy!r} is unknown: choose from {', '.join(self.STRATEGIES)}; "
                "geometric stages are the class GeometricRFSQ"
            )
        if statistics not in ("global", "image"):
            raise ValueError(f"statistics {statistics!r} is unknown: choose from global, image")
        if statistics == "image" and strategy != "layernorm":
            raise ValueError(f"statistics 'image' needs strategy 'layernorm', not {strategy!r}")
        if not (math.isfinite(initial_scale) and initial_scale > 0):
            raise ValueError(f"initial_scale must be a positive number, not {initial_scale}")
        if initial_gain is not None and not (math.isfinite(initial_gain) and initial_gain > 0):
            raise ValueError(f"initial_gain must be a positive number, not {initial_gain}")
        super().__init__(strategy, stages, levels, momentum, stage_dropout)
        self.strategy = strategy
        self.statistics = statistics if strategy == "layernorm" else None
        if strategy == "scale":
            log_scale = torch.full((stages,), math.log(initial_scale), dtype=torch.float32)
            self.log_scale = nn.Parameter(log_scale)
        elif strategy == "layernorm":
            level = torch.tensor(self.levels, dtype=torch.float32)
            gain = 1.1 / level.sqrt()
            bias = torch.where(level % 2 == 0, -1 / level, 0.0)
            if initial_gain is not None:
                gain, bias = torch.full_like(gain, initial_gain), torch.zeros_like(bias)
            self.log_gain = nn.Parameter(gain.log().repeat(stages, 1))
            self.bias = nn.Parameter(bias.repeat(stages, 1))
        if self.statistics == "global":
            self._add_running_moments(rows=stages)
        elif self.statistics == "image":
            self.name += "-image"
            self.side_bits = 16.0 * 2 * self.dim * stages

    def read_flags(self) -> list[str]:
        """The flags of the command line that this quantizer reads."""
        of = {"rfsq_initial_scale": "scale"}
        of |= dict.fromkeys(("rfsq_initial_gain", "rfsq_statistics"), "layernorm")
        return [flag for flag in self.flags if of.get(flag, self.strategy) == self.strategy]

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, dim, *positions) to codes like it and indices (B, *positions, K).

        The statistics of an image, where they are sent, are (B, K, 2, dim): the mean and std of
        each stage and channel.
        """
        grid, kept, running = self.fsq.grid(z), self._stages_kept(z), self._running(z)
        updating = self.training and self.statistics == "global"
        batch = next_batch(self.batches, self.momentum) if updating else None
        # From 0.0, because rounding can give -0.0, which an index does not keep.
        residual, quantized = z, z.new_zeros(())
        indices, statistics = [], []
        for k, (gain, bias) in enumerate(self._gains_and_biases(z)):
            if batch is not None:
                mean, var = running[k]
                running[k] = update_moments(mean, var, residual, batch.weight)
            mean_std = self._statistics(residual, running[k])
            a, b = affine(gain, bias, *mean_std)
            rounded = self.fsq.round(a * residual + b, grid)  # FSQ(A_k(r_k)) floor(L/2)
            codes = denormalise(rounded, a, b, grid)  # q_k = A_k^-1(FSQ(A_k(r_k)))
            residual = residual - codes
            quantized = quantized + (codes if kept is None else torch.where(kept > k, codes, 0))
            indices.append(self.fsq.pack(rounded))
            statistics.append(mean_std)
        indices = torch.stack(indices, dim=-1)
        if batch is not None:
            self._store_moments(running, batch)
        if self.statistics == "image":
            # K pairs of (B, C, 1, ...) -> (B, K, 2, C)
            pairs = [torch.stack(pair, dim=1).flatten(2) for pair in statistics]
            return Quantized(quantized, indices, statistics=torch.stack(pairs, dim=1))
        return Quantized(quantized, indices)

    def dequantize(self, indices: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Decode `indices` (B, *positions, k) of the first k stages to (B, dim, *positions).

        Args:
            indices: integers, as `forward` returns them, or their first k stages.
            statistics: (B, >= k, 2, dim), as `forward` returns them with image statistics; required
                then.

        Raises:
            ValueError: for statistics that are missing or do not fit.
        """
        self._check_statistics(indices, statistics)
        like = indices[..., 0].unsqueeze(1)  # (B, 1, *positions)
        grid, running, maps = self.fsq.grid(like), self._running(like), self._gains_and_biases(like)
        quantized = torch.zeros((), device=indices.device)
        for k, index in enumerate(indices.unbind(-1)):
            if statistics is None:
                mean_std = self._statistics(like, running[k])
            else:
                mean_std = (per_channel(x, like) for x in statistics[:, k].float().unbind(1))
            a, b = affine(*maps[k], *mean_std)
            quantized = quantized + denormalise(self.fsq.unpack(index), a, b, grid)
        return quantized

    @torch.no_grad()
    def stage_input(self, stage: int, z: Tensor, quantized: Tensor | None = None) -> Tensor:
        """The input A_k(r_k) of the FSQ of a stage: see `Quantizer.stage_input`."""
        self._check_input(z)
        residual = z.float() if quantized is None else z.float() - quantized
        mean_std = self._statistics(residual, self._running(z)[stage])
        a, b = affine(*self._gains_and_biases(z)[stage], *mean_std)
        return a * residual + b

    def _gains_and_biases(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Gain and bias of each stage, (1, C or 1, 1, ...) each; scalars if they are constant."""
        one, zero = torch.ones((), device=like.device), torch.zeros((), device=like.device)
        if self.strategy == "none":
            return [(one, zero)] * self.stages
        if self.strategy == "scale":
            gains = by_stage(self._fixed_if_frozen(self.log_scale).exp(), like)
            return [(gain, zero) for gain in gains]
        log_gain, bias = map(self._fixed_if_frozen, (self.log_gain, self.bias))
        return list(zip(by_stage(log_gain.exp(), like), by_stage(bias, like), strict=True))

    def _fixed_if_frozen(self, parameter: Tensor) -> Tensor:
        """A parameter, without gradient if frozen, even if the enclosing model asks for one."""
        return parameter.detach() if self._frozen else parameter

    def _running(self, like: Tensor) -> list[tuple[Tensor, ...]]:
        """Running mean and variance of each stage; empty tuples without running statistics."""
        if self.statistics == "global":
            return self._running_moments(like)
        return [()] * self.stages

    def _statistics(self, residual: Tensor, running: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Mean and std that normalise the residual of a stage; empty where nothing does."""
        if self.statistics == "image":
            return image_statistics(residual)
        if self.statistics == "global":
            mean, var = running
            return mean, running_std(var)
        return ()

    def _check_statistics(self, indices: Tensor, statistics: Tensor | None) -> None:
        if self.statistics != "image":
            return
        k = indices.shape[-1]
        given = None if statistics is None else tuple(statistics.shape)
        fits = [(indices.shape[0], stages, 2, self.dim) for stages in range(k, self.stages + 1)]
        if given not in fits:
            raise ValueError(
                f"{self.name} decodes with the statistics {fits[-1]} that forward returned, "
                f"but {given or 'none'} were given"
            )


def affine(
    gain: Tensor, bias: Tensor, mean: Tensor | None = None, std: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(a, b)` with a r + b = (r - mean)/std * gain + bias; without statistics, as given."""
    if mean is None or std is None:
        return gain, bias
    a = gain / std
    return a, torch.addcmul(bias, a, mean, value=-1)  # bias - a mean


def denormalise(rounded: Tensor, a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """The codes `A^-1(n / floor(L/2))` of integers n, A(r) = a r + b: encoder and decoder alike."""
    return rounded / (a * grid.half_levels) - b / a


def by_stage(x: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Split `x` (K,) or (K, C) into K tensors that broadcast against `like` (B, C, *positions)."""
    return x.view(len(x), 1, -1, *[1] * (like.dim() - 2)).unbind()


def image_statistics(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (B, C, 1, ...) over the positions of each image, rounded to half precision.

    The decoder gets half-precision numbers, so the encoder uses the same. The rounding is
    straight-through.
    """
    flat = residual.reshape(*residual.shape[:2], -1)
    mean = flat.mean(2)
    # The gradient of the variance through its mean is zero. The clamp is before the root, whose
    # gradient at zero is infinite.
    var = (flat - mean.detach()[..., None]).square().mean(2)
    std = var.clamp(min=LEAST_STD**2).sqrt()
    most = torch.finfo(torch.float16).max  # more would be infinite
    rounded = (straight_through(x, x.clamp(-most, most).half().float()) for x in (mean, std))
    mean, std = (per_channel(x, residual) for x in rounded)
    return mean, std
