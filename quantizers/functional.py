"""Functions that the quantizers share: straight-through, precision, tracing, processes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """Straight-through estimator (Bengio et al., arXiv 1308.3432).

    Returns exactly `value`, bit for bit; the gradient goes to `source` unchanged. The usual
    `source + (value - source).detach()` has a rounding error, so that a decoder, which starts from
    indices, would not return the same values as the forward.

    `source`, `value` and the result have the same shape and dtype.
    """
    value = value.detach()
    # The result has the gradient of `source`, and the shape in vmap and the strides of `value`. Its
    # values are then overwritten through `detach`, unseen by autograd, which saves none of them.
    out = torch.lerp(value, source, 1.0)
    out.detach().copy_(value)
    return out


def showing_nan(codes: Tensor, z: Tensor) -> Tensor:
    """`codes`, but NaN where `z` is: the NaN of a broken encoder would vanish in valid codes."""
    return codes.masked_fill(z.isnan(), math.nan)


def traced() -> bool:
    """Whether tensors have no values: in torch.compile, export, and transforms of torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._are_functorch_transforms_active()
    )


def exporting() -> bool:
    """Whether this is torch.export (torch 2.7 and later), whose sizes may be unknown too."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def output_dtype(z: Tensor) -> torch.dtype:
    """The dtype of codes: that of `z`; float32 under autocast and for integers."""
    autocast = not z.is_meta and torch.is_autocast_enabled(z.device.type)
    return z.dtype if z.is_floating_point() and not autocast else torch.float32


def in_group() -> bool:
    """Whether there is a default process group, also of a single process."""
    return dist.is_available() and dist.is_initialized()


def processes() -> int:
    """The number of processes of the default process group; 1 without one."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """The rank of this process in the default process group; 0 without one."""
    return dist.get_rank() if in_group() else 0


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes without gradient; `x` itself without a process group."""
    if in_group():
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of `x` over all processes without gradient; `x` itself without a process group."""
    return sum_over_processes(x) / processes() if in_group() else x


def per_channel(x: Tensor, like: Tensor) -> Tensor:
    """View `x` (C,) or (B, C) so that it broadcasts against `like` (B, C, *positions)."""
    lead = x.shape if x.dim() == 2 else (1, *x.shape)
    return x.view(*lead, *[1] * (like.dim() - 2))
