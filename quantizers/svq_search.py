"""The search of the scalar-vector quantizer: the nearest vector within a budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .compiling import compiled_form, opaque
from .counting import Lengths, inverse
from .functional import traced

SEARCHED = 4  # classes for each vector
FINER = 0.2  # octaves by which the best step is below that of the scale, on average
HALVINGS, BRACKET = 3, (-6.0, 2.5)  # of log2 of the Lagrange multiplier
SLACK = 0.4  # added to the log2 found, so that some of the budget is left for the fills
FILLS = 6  # steps that each raise one channel by 1, within what is left of the budget
OVERHEAD = 32  # added to the length of such a step in the choice of the channel
CHUNK = 4096  # vectors at a time, so that they stay in its cache
LARGEST = 2**20  # greater integers have no place in a budget


def log_scale(vectors: Tensor, std: Tensor, step: Tensor) -> Tensor:
    """log2 of the RMS of vectors (dim, N), whose channels have the standard deviations `std`.

    A channel counts as far as it is above the noise of quantization with this step::

        mean of (v_c / std_c)^2, weighted by std_c^2 / (std_c^2 + step^2 / 12)
    """
    total = std.square() + step.square() / 12
    energy = (vectors.square() / total.float()[:, None]).sum(0)
    return (energy / (std.square() / total).sum().float()).clamp(min=2**-20).log2() / 2


def suited(vectors: Tensor, std: Tensor, reference: Tensor, steps: Tensor) -> Tensor:
    """The classes (at most SEARCHED, N) whose steps are nearest to what vectors (dim, N) need.

    Args:
        reference: the step by which `log_scale` weighs channels.
    """
    best = log_scale(vectors, std, reference) - FINER
    octaves = best - (steps / reference).float().log2()[:, None]
    return octaves.abs().topk(min(SEARCHED, len(steps)), 0, largest=False).indices


def _fake_search(vectors, candidates, steps, lengths, budget, compiled):
    classes = budget.new_empty(vectors.shape[1])
    return classes, vectors.new_empty(vectors.shape, dtype=torch.int64)


@opaque(_fake_search)
def search(
    vectors: Tensor,
    candidates: Tensor,
    steps: Tensor,
    lengths: Tensor,
    budget: Tensor,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Class (N,) and integers (dim, N) of the code that is nearest to each of `vectors` (dim, N).

    In each class: rounding where it is within the budget, else the least squared error + multiplier
    * length, the multiplier by bisection. What is left of the budget goes to the channels that gain
    most for it.

    Args:
        vectors: without their mean, in the order of the channels in `lengths`.
        candidates: (any number, N), the classes that are searched for each vector.
        steps: (classes,), of a class.
        lengths: int64 (classes, dim, 4), see `Lengths`.
        budget: (classes,), the greatest length of a vector.
        compiled: search a class by compiled code (see `opaque`).
    """
    vectors = vectors.nan_to_num(0.0)
    tables = lengths.float()[..., None]  # (classes, dim, 4, 1)
    by_class = vectors.device.type == "cpu" and not traced()
    form = compiled_form(_in_class) if compiled else _in_class

    def in_class(some: Tensor, j: int) -> tuple[Tensor, Tensor]:
        return form(some, steps[j], tables[j], budget[j])

    every = _search_by_class if by_class else _search_all
    classes, integers = every(vectors, candidates, len(steps), in_class)
    # Zero is in every class, and equally near: not left to rounding.
    return classes.where(integers.any(0), candidates[0]), integers


def _search_all(
    vectors: Tensor, candidates: Tensor, classes: int, in_class: Callable
) -> tuple[Tensor, Tensor]:
    """`search` with every vector in every class: no size depends on values, and no GPU waits."""
    least = torch.full_like(vectors[0], torch.inf)
    best, integers = torch.zeros_like(least, dtype=torch.int64), torch.zeros_like(vectors)
    for j in range(classes):
        error, v = in_class(vectors, j)
        better = (candidates == j).any(0) & (error < least)
        least, best = torch.where(better, error, least), torch.where(better, j, best)
        integers = torch.where(better, v, integers)
    return best, integers.long()


def _search_by_class(
    vectors: Tensor, candidates: Tensor, classes: int, in_class: Callable
) -> tuple[Tensor, Tensor]:
    """`search` with each vector in its candidates alone."""
    # All pairs of a vector and a candidate, by class: (pairs, dim).
    number, count = candidates.shape
    members = [(candidates.flatten() == j).nonzero()[:, 0] for j in range(classes)]
    order = torch.cat(members)
    rows = vectors.t().contiguous()[order % count]
    integers, error = torch.empty_like(rows), torch.empty_like(rows[:, 0])
    sizes = [len(pairs) for pairs in members]
    for j, (part, out, cost) in enumerate(
        zip(rows.split(sizes), integers.split(sizes), error.split(sizes), strict=True)
    ):
        for x, v, e in zip(*(t.split(CHUNK) for t in (part, out, cost)), strict=True):
            if not len(x):
                continue
            error_of_part, nearest = in_class(x.t(), j)
            e.copy_(error_of_part)
            v.copy_(nearest.t())
    place = inverse(order).view(number, count)
    best = error[place].min(0, keepdim=True).indices
    integers = integers[place.gather(0, best)[0]].t().long()
    return candidates.gather(0, best)[0], integers.contiguous()


def _in_class(
    vectors: Tensor, step: Tensor, table: Tensor, budget: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error (N,) and integers (dim, N) for vectors (dim, N) in one class."""
    size = vectors.abs().clamp(max=LARGEST * step) / step
    v = _nearest(size, Lengths(*table.unbind(1)), budget)
    return (size - v).square().sum(0) * step.square(), v.copysign(vectors)


def _nearest(size: Tensor, table: Lengths, budget: Tensor) -> Tensor:
    """Magnitudes v (dim, N) within the budget, near to `size` (dim, N); `table` (dim, 1).

    The bisection uses first + step / run (v - 1) for the length of v > 0: at least the true length,
    and the minimum of (size - v)^2 + multiplier * length has a closed form.
    """
    slope = table.step / table.run
    jump = table.first - slope - table.zero  # v > 0 costs jump + slope v more than 0
    threshold = jump.clamp(min=0).sqrt()
    limit = budget - table.zero.sum()

    def shrunk(log_multiplier: Tensor) -> Tensor:
        root = (0.5 * log_multiplier).exp2()
        v = torch.addcmul(size, root.square(), slope, value=-0.5)
        above = (root * threshold).lt_(v)  # 0.0 or 1.0
        return v.round_().mul_(above)

    def fits(v: Tensor) -> Tensor:
        return (slope * v + jump * v.clamp(max=1)).sum(0, keepdim=True) <= limit

    low = torch.full_like(size[:1], BRACKET[0])
    high = torch.full_like(low, BRACKET[1])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = fits(shrunk(middle))
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    plain = size.round()
    v = torch.where(fits(plain), plain, shrunk(high + SLACK))
    v, left = _cut(v, table, limit)
    return _spend(v, size, table, left)


def _cut(v: Tensor, table: Lengths, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Cut vectors that no multiplier has brought within the budget; (v, what each has left).

    The first channel that is too long gets what is left of it, and the channels after it 0; such a
    vector has nothing left.
    """
    sums = v.new_ones(len(v), len(v)).tril() @ (table.of(v) - table.zero)
    fit = sums <= limit
    whole, cut = fit[-1:], fit.sum(0).clamp(max=len(v) - 1)
    left = limit - sums.mul_(fit).amax(0, keepdim=True)
    zero, first, step, run = (column[cut, 0] for column in table)
    most = run * (((left - first + zero) / step).floor() + 1).clamp(min=0)
    last = v.gather(0, cut[None])
    v = v.mul_(fit).scatter_(0, cut[None], torch.where(whole, last, last.minimum(most)))
    return v, left * whole


def _spend(v: Tensor, size: Tensor, table: Lengths, left: Tensor) -> Tensor:
    """Spend what is left: FILLS times 1 more in the channel that gains most for its length.

    OVERHEAD is added to the length, because a rest that is too short for anything is lost.
    """
    change = table.step - table.first + table.zero
    for _ in range(FILLS):
        more = torch.addcmul(table.first - table.zero, v.clamp(max=1), change)
        gain = (size - 0.5 - v).div_(more + OVERHEAD).mul_(more <= left)
        most, channel = gain.max(0, keepdim=True)
        gains = (most > 0).float()
        v.scatter_add_(0, channel, gains)
        left = left - gains * more.gather(0, channel)
    return v
