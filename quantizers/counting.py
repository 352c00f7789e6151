"""Integer vectors whose code lengths add up to at most a budget: how many, and which number.

The enumeration of Laroia and Farvardin (IEEE Trans. Inf. Theory 39, 1993). Everything is integer
arithmetic, and memory and time do not depend on the number of vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiling import compiled_form, opaque

# Larger counts become this one. Those that an index is made of are at most 2^60.
SATURATED = 2**61


def inverse(order: Tensor) -> Tensor:
    """The inverse of permutations on the last axis: `order.argsort()`, without sorting."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


class Lengths(NamedTuple):
    """Code lengths of integers v: `zero` for 0, else first + step * floor((|v| - 1) / run).

    Four tensors of whole numbers of one shape, int64 or float32. `step` and `run` are at least 1,
    and `zero` is at most `first`. `zero` is 0 except in models that were trained before lengths
    became relative to it.
    """

    zero: Tensor
    first: Tensor
    step: Tensor
    run: Tensor

    def of(self, magnitude: Tensor) -> Tensor:
        """Length of the integers v with these |v|, of the dtype of both."""
        # floor((|v| - 1) / run) as (2 |v| - 1) / (2 run), which is never an integer: in float32,
        # compiled code on a GPU may round an exact quotient down.
        whole = torch.div(2 * magnitude - 1, 2 * self.run, rounding_mode="trunc")
        return torch.where(magnitude > 0, self.first + self.step * whole, self.zero)


class Counts(NamedTuple):
    """Numbers of vectors, by class, first channel and greatest length t in 0 .. T-1.

    Attributes:
        within: (classes, dim + 1, T), [j, c, t]: vectors of the channels c, c + 1, ... of length
            at most t.
        strided: (classes, dim, T), [j, c, t]: the sum of within[j, c + 1] at t, t - step,
            t - 2 step, ..., with the step of channel c.
        budget: (classes,), the greatest t for which a class has at most `room` vectors.
    """

    within: Tensor
    strided: Tensor
    budget: Tensor

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Both tables (classes, T) of one channel: `within` of the channels after it, `strided`."""
        return self.within[:, channel + 1], self.strided[:, channel]


def count(lengths: Tensor, size: int, room: int) -> Counts:
    """The counts of vectors with these code lengths, from the last channel to the first.

    Args:
        lengths: int64 (classes, dim, 4), the four numbers of `Lengths`.
        size: T, the number of lengths t that are counted.
        room: how many vectors a class may have, at most 2^60.
    """
    return Counts(*_count(lengths, size, room))


def rank(counts: Counts, lengths: Tensor, classes: Tensor, integers: Tensor) -> Tensor:
    """The number (N,) of vectors among those of their class, in lexicographic order.

    Args:
        counts, lengths: as from `count`, and as given to it.
        classes: (N,), the class of each vector.
        integers: (dim, N), within the budget of their class.
    """
    return _rank(*counts, lengths, classes, integers)


def unrank(counts: Counts, lengths: Tensor, classes: Tensor, number: Tensor) -> Tensor:
    """The integers (dim, N) of vectors from their number (N,): the inverse of `rank`.

    A number that no vector has stands for the last vector of its class.
    """
    left = counts.budget[classes]
    total = counts.within[:, 0].gather(1, counts.budget[:, None])[:, 0]
    number = torch.minimum(number, total[classes] - 1)
    integers = []
    for c in range(lengths.shape[1]):
        channel = _Channel(*counts.of(c), lengths[:, c], classes, left)
        below, zeros = channel.one_side, channel.zeros()
        negative, positive = number < below, number >= below + zeros
        # Either side is counted from the smallest |v| on.
        side = torch.where(negative, below - 1 - number, number - below - zeros)
        magnitude, rest, each = channel.find(side.clamp(min=0))
        rest = torch.where(negative, each - 1 - rest, rest)
        nonzero = negative | positive
        magnitude = torch.where(nonzero, magnitude, 0)
        number = torch.where(nonzero, rest, number - below)
        left = left - channel.lengths.of(magnitude)
        integers.append(torch.where(negative, -magnitude, magnitude))
    return torch.stack(integers)


class _Channel:
    """Vectors (N,) from one channel on, of `classes` (N,), with `left` (N,) of their budgets.

    `within` and `strided` are the tables of the channel, as from `Counts.of`, and `lengths` its
    code lengths (classes, 4).
    """

    def __init__(
        self, within: Tensor, strided: Tensor, lengths: Tensor, classes: Tensor, left: Tensor
    ):
        self.within, self.strided = within, strided
        self.lengths, self.classes = Lengths(*lengths.t()[:, classes]), classes
        self.left = left
        self.one_side = self.runs(0)  # how many have v_c > 0

    def _at(self, table: Tensor, t: Tensor) -> Tensor:
        return torch.where(t < 0, 0, table[self.classes, t.clamp(min=0)])

    def zeros(self) -> Tensor:
        """Number of vectors with v_c = 0."""
        return self._at(self.within, self.left - self.lengths.zero)

    def each(self, whole: Tensor) -> Tensor:
        """Number of vectors with v_c = v, for one v > 0 after `whole` runs of equal lengths."""
        return self._at(self.within, self.left - self.lengths.first - whole * self.lengths.step)

    def runs(self, whole: Tensor | int) -> Tensor:
        """Number of vectors with v_c > 0 after `whole` runs of equal lengths."""
        t = self.left - self.lengths.first - whole * self.lengths.step
        return self.lengths.run * self._at(self.strided, t)

    def up_to(self, magnitude: Tensor) -> Tensor:
        """Number of vectors with v_c from 1 to `magnitude`."""
        whole, more = magnitude // self.lengths.run, magnitude % self.lengths.run
        return self.one_side - self.runs(whole) + more * self.each(whole)

    def find(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the vectors with v_c > 0, the one with this number.

        Returns v_c, its number among the vectors with this v_c, and how many those are.
        """
        whole = torch.zeros_like(number)
        for bit in reversed(range(self.within.shape[-1].bit_length())):
            trial = whole + 2**bit
            inside = trial * self.lengths.step <= self.left - self.lengths.first
            inside &= self.one_side - self.runs(trial) <= number
            whole = torch.where(inside, trial, whole)
        rest, each = number - (self.one_side - self.runs(whole)), self.each(whole).clamp(min=1)
        return whole * self.lengths.run + rest // each + 1, rest % each, each


def _fake_count(lengths, size, room, compiled):
    classes, dim, _ = lengths.shape
    shapes = (classes, dim + 1, size), (classes, dim, size), (classes,)
    return tuple(lengths.new_empty(shape) for shape in shapes)


@opaque(_fake_count)
def _count(
    lengths: Tensor, size: int, room: int, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.arange(size, device=lengths.device)
    step = lengths[..., 2:3]
    # Sums along t, t - step, ... are differences of one running sum in the order of t mod step.
    order = (t % step * size + t).argsort()
    phase = (t % step).gather(-1, order)
    starts = F.pad(phase[..., 1:] != phase[..., :-1], (1, 0))
    begin, place = torch.where(starts, t, 0).cummax(-1).values, inverse(order)

    def shifted(table: Tensor, by: Tensor) -> Tensor:
        at = t - by[:, None]
        return torch.where(at < 0, 0, table.gather(-1, at.clamp(min=0)))

    def strided_sums(x: Tensor, c: int) -> Tensor:
        sums = F.pad(x, (1, 0)).cumsum(-1)  # sums[i]: of the first i
        return sums[..., 1:] - sums.gather(-1, begin[:, c])

    def exact(counts: Tensor, about: Tensor) -> Tensor:
        # int64 overflows without notice; float64 tells where.
        return torch.where(about > SATURATED, SATURATED, counts)

    within, strided = [torch.ones_like(order[:, 0])], []
    for c in reversed(range(lengths.shape[1])):
        zero, first, _, run = lengths[:, c].unbind(-1)
        in_order = within[-1].gather(-1, order[:, c])
        sums = exact(strided_sums(in_order, c), strided_sums(in_order.double(), c))
        strided.append(sums.gather(-1, place[:, c]))
        zeros, one_side, both = shifted(within[-1], zero), shifted(strided[-1], first), 2 * run
        about = zeros.double() + both[:, None].double() * one_side.double()
        within.append(exact(zeros + both[:, None] * one_side, about))
    within, strided = torch.stack(within[::-1], 1), torch.stack(strided[::-1], 1)
    budget = (within[:, 0] <= room).long().cumprod(-1).sum(-1) - 1
    return within, strided, budget


def _fake_rank(within, strided, budget, lengths, classes, integers, compiled):
    return torch.empty_like(classes)


@opaque(_fake_rank)
def _rank(
    within: Tensor,
    strided: Tensor,
    budget: Tensor,
    lengths: Tensor,
    classes: Tensor,
    integers: Tensor,
    compiled: bool = False,
) -> Tensor:
    counts, left = Counts(within, strided, budget), budget[classes]
    number = torch.zeros_like(classes)
    add_channel = compiled_form(_rank_channel) if compiled else _rank_channel
    for c, value in enumerate(integers):
        (after, along), its_lengths = counts.of(c), lengths[:, c]
        if compiled:  # not views, for each of whose offsets the compiler would compile again
            after, along, its_lengths = after.clone(), along.clone(), its_lengths.clone()
        before, left = add_channel(after, along, its_lengths, classes, left, value)
        number = number + before
    return number


def _rank_channel(
    within: Tensor, strided: Tensor, lengths: Tensor, classes: Tensor, left: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Number of vectors that come first by their v_c, and the budget left by v_c = `value` (N,).

    The others are the arguments of `_Channel`.
    """
    channel, magnitude = _Channel(within, strided, lengths, classes, left), value.abs()
    smaller = channel.up_to(magnitude - (value > 0).long())
    # Those with a smaller v_c come first: of the negative v_c, the ones with a greater |v_c|.
    before = channel.one_side + torch.where(value > 0, channel.zeros() + smaller, 0)
    number = torch.where(value < 0, before - smaller, before)
    return number, left - channel.lengths.of(magnitude)
