"""The chain of stages of a residual FSQ as one autograd function: the arithmetic of `rfsq.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import mean_over_processes, processes

VAR_EPS = 1e-10  # of a running variance
LEAST_STD = 1e-3  # of an image


class Chain(torch.autograd.Function):
    """`r_1 = z`, `q_k = A_k^-1(FSQ(A_k(r_k)))`, `r_{k+1} = r_k - q_k` for k = 1 to K.

    A_k(r) = a r + b, with a = gain/std and b = bias - a mean. Takes

    - z (B, C, *positions);
    - the logarithm of gain, (K, C) or (K,), and bias (K, C), learned, or None: no such part;
    - running, the mean and variance (2, K, C) before this batch, or None, and the weight of this
      batch in them, or None to leave them as they are;
    - whether mean and std are those of each image instead;
    - kept (B, 1, ...), how many stages each image is quantized by, or None for all;
    - K, and `FSQ.grid`.

    Returns the sum of the q_k; the integers n of all stages (K * B, C, *positions); and the running
    moments with this batch, or mean and std (2, K, B, C, ...) of each image, or nothing.

    The gradient is written out, straight-through in every stage, the residual taken with its
    gradient. With d = (1 - tanh^2) h / floor(L/2), the slope of the bound::

        dq/dr = d      dq/da = (d r - q) / a      dq/db = (d - 1) / a

    The same values and gradients as the composition of `FSQ.bound`, `straight_through` and the
    maps, from a third of the passes over memory and few calls, which are all that a chain costs.
    """

    @staticmethod
    def forward(ctx, z, log_gain, bias, running, weight, image, kept, stages, grid):
        h2, h_offset, shift2, half_levels, steepest = spread(grid, z).unbind()
        gain = None if log_gain is None else spread(log_gain.exp(), z)
        bias = None if bias is None else spread(bias, z)
        gains, biases = ([None] * stages if x is None else x.unbind() for x in (gain, bias))
        firsts, seconds = [], []
        if running is not None:
            moments = spread(running.flatten(0, 1), z).unbind()
            firsts, seconds = list(moments[:stages]), list(moments[stages:])
        if weight is not None:
            share = torch.full_like(weight, half_levels.numel() / z.numel())
        residual, total = z, z.new_zeros(())
        residuals, sigmoids, integers = [], [], []
        for stage in range(stages):
            mean, std = None, None
            if image:
                # In half precision, which is what the decoder gets.
                mean, std = (x.half().float() for x in image_moments(residual))
                firsts.append(mean)
                seconds.append(std)
            elif running is not None:
                if weight is not None:
                    firsts[stage], seconds[stage] = average(
                        firsts[stage], seconds[stage], residual, weight, share
                    )
                mean, std = firsts[stage], running_std(seconds[stage])
            a, b = affine(gains[stage], biases[stage], mean, std)
            # tanh(x) = 2 sigmoid(2 x) - 1, of which the sigmoid takes a tenth of the time on a CPU.
            # (A Python number as an operand costs a CPU a conversion in each call: hence r + r.)
            sigmoid = residual + residual if a is None else residual * (a + a)
            sigmoid.add_(shift2 if b is None else torch.add(shift2, b, alpha=2)).sigmoid_()
            rounded = (sigmoid * h2).sub_(h_offset).round_()
            codes = dequantize(rounded, a, b, half_levels)
            if gain is not None:
                residuals.append(residual)
            sigmoids.append(sigmoid)
            integers.append(rounded)
            if stage < stages - 1:
                residual = residual - codes
            # Rounding gives -0.0 as well, which the indices do not keep: 0.0 + -0.0 is 0.0.
            codes.add_(total)
            total = codes if kept is None or not stage else torch.where(kept > stage, codes, total)
        integers = torch.cat(integers)
        moments = torch.stack(firsts + seconds) if firsts else z.new_empty(0)
        moments = moments.view(2, -1, *moments.shape[1:])
        ctx.image, ctx.stages = image, stages
        ctx.shape = None if log_gain is None else log_gain.shape
        learned = () if gain is None else (integers, *residuals)
        ctx.save_for_backward(gain, bias, moments, kept, half_levels, steepest, *sigmoids, *learned)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((integers,) if image else (integers, moments)))
        return total, integers, moments

    @staticmethod
    def backward(ctx, g_total, _, g_moments):
        stages = ctx.stages
        gain, bias, moments, kept, half_levels, steepest, *saved = ctx.saved_tensors
        sigmoids, learned = saved[:stages], saved[stages:]
        mean, std = moments.unbind() if moments.numel() else (None, None)
        std = std if ctx.image or std is None else running_std(std)
        a, b = affine(gain, bias, mean, std)  # of all stages
        if g_total is None:
            g_total = torch.zeros_like(sigmoids[0])  # a loss on the image statistics alone
        integers = learned[0].chunk(stages) if learned else None
        g_rest, sums = None, []
        for stage in reversed(range(stages)):
            g_codes = g_total
            if kept is not None and stage:
                g_codes = torch.where(kept > stage, g_total, 0)
            if g_rest is not None:
                g_codes = g_codes - g_rest
            # d times g_codes; sigmoid_backward is g s (1 - s) in one pass.
            through = torch.ops.aten.sigmoid_backward(g_codes, sigmoids[stage]).mul_(steepest)
            if learned:
                residual = learned[1 + stage]
                shape = (a.shape[1], *half_levels.shape[1:])
                one = [(g_codes * integers[stage]).sum_to_size(shape)]
                one += [(through * residual).sum_to_size(shape)]
                if b is not None:
                    one += [g_codes.sum_to_size(shape), through.sum_to_size(shape)]
                sums = one + sums
            g_rest = through if g_rest is None else through.add_(g_rest)
            if ctx.image:
                at = [x[stage] for x in (a, b, mean, std)]
                g_gain, g_bias = _map_gradients(one, half_levels, *at)
                g_mean, g_std = -at[0] * g_bias, -at[0] * g_gain
                if g_moments is not None:
                    g_mean, g_std = g_mean + g_moments[0, stage], g_std + g_moments[1, stage]
                g_rest = g_rest + _image_gradient(residual, g_mean, g_std)
        g_gain, g_bias = None, None
        if learned:
            sums = torch.stack(sums).view(stages, -1, *shape).unbind(1)
            g_gain, g_bias = _map_gradients(sums, half_levels, a, b, mean, std)
            g_gain = g_gain.mul_(gain).sum_to_size(gain.shape).view(ctx.shape)
            g_bias = None if bias is None else g_bias.sum_to_size(bias.shape).view(ctx.shape)
        return g_rest, g_gain, g_bias, *[None] * 6


def _map_gradients(sums, half_levels, a, b, mean, std) -> tuple[Tensor, Tensor | None]:
    """Gradients of gain and bias, from sums over all that shares them.

    Of the gradient of q times n, that of A's input through the bound times r, and both alone.
    """
    g_product, g_scaled, *alone = sums
    g_q = g_product / half_levels  # q = (n / floor(L/2) - b) / a
    if b is None:
        return (g_scaled - g_q / a) / a, None
    g_codes, g_through = alone
    g_b = (g_through - g_codes) / a
    g_a = (g_scaled - (g_q - b * g_codes) / a) / a
    return (g_a - mean * g_b) / std, g_b


def spread(x: Tensor, like: Tensor) -> Tensor:
    """View `x` (n,) or (n, C) as (n, 1, 1 or C, 1, ...): n tensors to broadcast against `like`."""
    return x.view(len(x), 1, -1, *[1] * (like.dim() - 2))


def affine(gain, bias, mean, std) -> tuple[Tensor | None, Tensor | None]:
    """`(a, b)` of A(r) = a r + b = (r - mean)/std * gain + bias; None: no such part."""
    if mean is None:
        return gain, bias
    a = gain / std
    return a, torch.addcmul(bias, a, mean, value=-1)


def dequantize(rounded: Tensor, a: Tensor | None, b: Tensor | None, half_levels: Tensor) -> Tensor:
    """The codes A^-1(n / floor(L/2)) of integers n; what encoder and decoder have in common."""
    if a is None:
        return rounded / half_levels
    codes = rounded / (half_levels * a)
    return codes if b is None else codes.sub_(b / a)


def average(
    mean: Tensor, var: Tensor, residual: Tensor, weight: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Running mean and variance (1, C, ...) with the moments of a batch of all processes in them.

    `share` is 1 over the numbers of a channel.
    """
    # About the mean so far, lest a large mean drown the variance in rounding errors. One pass an
    # operation: `torch.var_mean` takes ten times as long on a CPU.
    centred = residual - mean
    shift = centred.sum_to_size(mean.shape) * share
    square = centred.mul_(centred).sum_to_size(mean.shape) * share
    if processes() > 1:
        shift, square = mean_over_processes(torch.stack([shift, square])).unbind()
    square = torch.addcmul(square, shift, shift, value=-1)
    return torch.addcmul(mean, weight, shift), torch.lerp(var, square, weight)


def running_std(var: Tensor) -> Tensor:
    """The std of a running variance."""
    return (var + VAR_EPS).sqrt_()


def image_moments(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (B, C, 1, ...) over the positions of `residual` (B, C, *positions)."""
    flat = residual.reshape(*residual.shape[:2], -1)
    mean = flat.mean(2)
    std = (flat - mean[..., None]).square().mean(2).sqrt().clamp(min=LEAST_STD)
    return tuple(x.view(*x.shape, *[1] * (residual.dim() - 2)) for x in (mean, std))


def _image_gradient(residual: Tensor, g_mean: Tensor, g_std: Tensor) -> Tensor:
    """The gradient of `residual` through its image's mean and std."""
    mean, std = image_moments(residual)
    slope = torch.where(std > LEAST_STD, g_std / std, 0)
    return (g_mean + (residual - mean) * slope) * (mean.numel() / residual.numel())
