"""One stage of a residual FSQ as a single autograd function: the arithmetic of `rfsq.py`."""

from __future__ import annotations

import torch
from torch import Tensor


class Stage(torch.autograd.Function):
    """One stage: `q = A^-1(FSQ(A(r)))`, with its straight-through gradient written out.

    Takes the residual r, the sum of the codes so far (or None), gain, bias, mean and std of A (or
    None), a buffer like r to work in, whether the stage is the last, and the FSQ's `grid`. Returns
    the sum with q, the residual r - q (None after the last stage) and the integers n. With
    A(r) = a r + b and d = (1 - tanh^2) h / floor(L/2), the slope of the bound::

        dq/dr = d      dq/da = (d r - q) / a      dq/db = (d - 1) / a

    The same values and gradients as the composition of `FSQ.bound`, `straight_through` and the map,
    from a third of the passes over memory, which are all that a stage costs.
    """

    @staticmethod
    def forward(ctx, residual, total, gain, bias, mean, std, buffer, last, *grid):
        h2, h_offset, shift2, half_levels, steepest = grid
        a, b = affine(gain, bias, mean, std)
        # tanh(x) = 2 sigmoid(2 x) - 1, of which the sigmoid takes a tenth of the time on a CPU.
        shift2 = shift2 if b is None else torch.add(shift2, b, alpha=2)
        sigmoid = torch.mul(residual, 2 if a is None else 2 * a, out=buffer)
        sigmoid.add_(shift2).sigmoid_()
        rounded = (sigmoid * h2).sub_(h_offset).round_()
        codes = dequantize(rounded, a, b, half_levels)
        rest = None if last else residual - codes
        learned = gain is not None and any(ctx.needs_input_grad[2:6])
        maps = (a, b, mean, std, half_levels, residual, rounded)
        ctx.save_for_backward(sigmoid, steepest, *(maps if learned else ()))
        ctx.has_total = total is not None
        ctx.mark_non_differentiable(rounded)
        ctx.set_materialize_grads(False)
        # Rounding gives -0.0 as well, which the indices do not keep: adding 0.0 makes it 0.0.
        return codes.add_(0.0 if total is None else total), rest, rounded

    @staticmethod
    def backward(ctx, g_total, g_rest, _):
        sigmoid, steepest, *maps = ctx.saved_tensors
        if g_total is None:
            g_total = torch.zeros_like(sigmoid)  # a loss on the image statistics alone
        g_codes = g_total if g_rest is None else g_total - g_rest
        # d times g_codes; sigmoid_backward is g s (1 - s) in one pass.
        through = torch.ops.aten.sigmoid_backward(g_codes, sigmoid).mul_(steepest)
        g_maps = _map_gradients(g_codes, through, g_rest is not None, *maps) if maps else [None] * 4
        g_residual = through if g_rest is None else through.add_(g_rest)
        return g_residual, g_total if ctx.has_total else None, *g_maps, *[None] * 7


def _map_gradients(g_codes, through, own, a, b, mean, std, half_levels, residual, rounded):
    """Gradients of gain, bias, mean and std, given those of q and of A's input through the bound.

    `own`: whether `g_codes` may be overwritten.
    """
    shape = (len(a), *half_levels.shape[1:])  # (1 or B, C, 1, ...)
    g_sum = None if b is None else g_codes.sum_to_size(shape)
    product = g_codes.mul_(rounded) if own else g_codes * rounded
    g_q = product.sum_to_size(shape) / half_levels  # q = (n / floor(L/2) - b) / a
    g_scaled = torch.mul(through, residual, out=product).sum_to_size(shape)
    if b is None:
        return ((g_scaled - g_q / a) / a).sum_to_size(a.shape), None, None, None
    g_b = (through.sum_to_size(shape) - g_sum) / a
    # a = gain / std, b = bias - a mean
    g_a = (g_scaled - (g_q - b * g_sum) / a) / a - mean * g_b
    return g_a / std, g_b, -a * g_b, -a / std * g_a


def affine(gain, bias, mean, std) -> tuple[Tensor | None, Tensor | None]:
    """`(a, b)` of A(r) = a r + b = (r - mean)/std * gain + bias; None: no such part."""
    if mean is None:
        return gain, bias
    a = gain / std
    return a, bias - a * mean


def dequantize(rounded: Tensor, a: Tensor | None, b: Tensor | None, half_levels: Tensor) -> Tensor:
    """The codes A^-1(n / floor(L/2)) of integers n; what encoder and decoder have in common."""
    if a is None:
        return rounded / half_levels
    codes = rounded / (half_levels * a)
    return codes if b is None else codes.sub_(b / a)
