"""Running means and variances over the batches of training, the same in all processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .functional import in_group, mean_over_processes

VAR_EPS = 1e-10


class Batch(NamedTuple):
    """The number of a batch of training, from 1, and its weight in the running moments."""

    number: Tensor
    weight: Tensor


def next_batch(batches: Tensor, momentum: float) -> Batch:
    """The batch after `batches` others.

    Its weight is 1/number, by which the moments are the mean over all batches, until that falls
    below `momentum`, and from there on `momentum`.
    """
    number = batches + 1
    return Batch(number, number.reciprocal().clamp(min=momentum))


@torch.no_grad()
def store_if(good: Tensor, *states: tuple[Tensor, Tensor]) -> None:
    """Copy the new value into each buffer, (buffer, new), if the batch is `good`.

    The training loop skips the step of a batch that is not finite, and so do the buffers.
    """
    for buffer, new in states:
        buffer.copy_(torch.where(good, new, buffer))


@torch.no_grad()
def update_moments(mean: Tensor, var: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Running mean and variance (1, C, 1, ...) after a batch `x` (B, C, *positions).

    Args:
        mean, var: the running moments before this batch.
        x: this process's part of the batch; all processes are averaged.
        weight: weight of the batch, a scalar.
    """
    share = torch.full_like(weight, mean.numel() / x.numel())
    # About the running mean, because a large mean would cancel most digits of the variance. Sums
    # instead of `torch.var_mean`, which is much slower on a CPU.
    centred = x - mean
    shift = centred.sum_to_size(mean.shape) * share
    square = centred.mul_(centred).sum_to_size(mean.shape) * share
    if in_group():
        shift, square = mean_over_processes(torch.stack([shift, square])).unbind()
    # Not below 0 by rounding, as of a constant channel; a NaN stays one.
    batch_var = torch.addcmul(square, shift, shift, value=-1).clamp(min=0)
    return torch.addcmul(mean, weight, shift), torch.lerp(var, batch_var, weight)


def running_std(var: Tensor) -> Tensor:
    """The standard deviation of a running variance."""
    return (var + VAR_EPS).sqrt()
