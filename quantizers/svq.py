"""Scalar-vector quantization (Laroia and Farvardin, 1993) with classes of scale."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Quantized, Quantizer
from .checks import check_integer, check_momentum
from .counting import Counts, count, inverse, rank, unrank
from .functional import mean_over_processes, per_channel, showing_nan, straight_through
from .moments import next_batch, running_std, store_if, update_moments
from .svq_search import log_scale, search, suited

MAX_BITS_PER_CHANNEL = 16  # on average: with more, lengths of 1/8 bit are too coarse
UNITS = 8  # code lengths are whole numbers of 1/8 bit
BUDGET_MARGIN = 14  # bits that a budget may be above log2 of the number of vectors within it
# From the finest to the coarsest step, in standard deviations of log2 of the scale.
CLASS_SPREAD = (-25 / 14, 39 / 14)
PRIOR_WEIGHT = 0.02  # of a Laplacian in the statistics of the classes, all together
MAX_BITS_OF_STRONGEST = 14  # channel: more would be beyond the range of its integers
LAPLACIAN = 2**0.5 * math.e  # 2^h / std, h the differential entropy in bits


class SVQ(Quantizer):
    """Integer vectors of at most a budget of code length, numbered: a fixed rate, no codebook.

    A vector z of C channels is quantized in one of K classes, each with its own step::

        v = round((z - mean) / step_j)        quantized = mean + step_j v

    Class j contains the integer vectors v with::

        sum over channels of length_jc(v_c) <= budget_j

    The code lengths are those of an entropy coder for the vectors of the class (zero or not, a
    sign, and a geometric distribution of |v|), so that the class contains its most probable
    vectors, as many as fit 2^bits / K. A product of levels, as in FSQ, spends as many bits on an
    improbable vector as on a probable one; this is what is gained. Photographs are busy in one
    place and flat in another, which is what the classes are for.

    The index of a vector is j 2^bits / K + its number in its class, by counting (`counting.py`), in
    lexicographic order, the channel of the greatest variance first. It is cut into `stages` tokens,
    the most significant first, so that the first tokens alone are a coarse vector.

    Encoding looks for the nearest vector of the four classes whose steps suit the scale of z: in
    each, rounding where it is within the budget, else the least (z - quantized)^2 + multiplier *
    length, the multiplier by bisection; what is left of the budget then goes to the channels that
    gain most for it.

    Steps and code lengths follow running averages in training, the same in all processes. They are
    constants after training: code lengths are stored as integers and steps with 12 bits, so that no
    other machine's logarithm or rounding can change what an index means. The steps follow the
    variances, by reverse water-filling, and the spread of the vectors' scales, so that z may have
    any scale and any mixture of scales.

    The gradient is straight-through, but without its component along the error of the image::

        gradient of z = g - <g, e> / <e, e> e        g that of quantized, e = z - quantized

    Most losses would be lower at z than at quantized, so that g has such a component, which would
    drive z away from its codes without bound. Other quantizers prevent this with a commitment term,
    whose weight must be tuned. For single vectors this is the gradient of DiVeQ (Vali et al.,
    arXiv 2509.26469).

    Args:
        bits: of a vector, 8 to 60.
        dim: channels of `z`. Default: 12 + 2/5 of the bits.
        classes: K. Fewer than 4 cost much at 8 bits a channel and more: vectors beyond the budget
            of one class need another, wider one.
        stages: tokens of an index; bits are shared as evenly as possible, the first have more.
        momentum: weight of a new batch in the running averages. The first 1/momentum batches are
            averaged evenly.

    Raises:
        ValueError: for arguments out of range, or an input whose channels are not `dim`.

    Example:
        >>> svq = SVQ(bits=22, dim=20, stages=2)                          # 2 x 2048
        >>> quantized, indices = svq(torch.randn(2, 20, 32, 32))          # indices: (2, 32, 32, 2)
    """

    flags: ClassVar[dict[str, str]] = {
        "svq_bits": "bits",
        "svq_dim": "dim",
        "svq_classes": "classes",
        "svq_stages": "stages",
    }
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    class_moments: Tensor
    steps: Tensor
    log_scale: Tensor
    order: Tensor
    lengths: Tensor

    def __init__(
        self,
        bits: int = 22,
        dim: int | None = None,
        classes: int = 8,
        stages: int = 1,
        momentum: float = 0.01,
    ):
        super().__init__()
        bits = check_integer("bits", bits, 8, 60)
        classes = check_integer("classes", classes, 1, 1024)
        stages = check_integer("stages", stages)
        dim = 12 + 2 * bits // 5 if dim is None else check_integer("dim", dim)
        if bits > MAX_BITS_PER_CHANNEL * dim:
            raise ValueError(
                f"{bits} bits are too many for {dim} channels: at most {MAX_BITS_PER_CHANNEL} a "
                f"channel, so give at least {-(-bits // MAX_BITS_PER_CHANNEL)}"
            )
        if classes > 2 ** (bits - 4):
            raise ValueError(
                f"{classes} classes are too many for {bits} bits: at most {2 ** (bits - 4)}"
            )
        if stages > bits:
            raise ValueError(f"{bits} bits make at most {bits} tokens, not {stages}")
        self.dim, self.classes = dim, classes
        self.index_bits = bits
        self.token_bits = [(bits + stages - 1 - k) // stages for k in range(stages)]
        self.codebook_sizes = [2**n for n in self.token_bits]
        self.stage_axis = stages > 1
        self.name = f"svq-{bits}bit"
        self.momentum = check_momentum(momentum)
        self.class_size = 2**bits // classes
        self.register_buffer("running_mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(dim, dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float32))
        # Mean and variance of log2 of the RMS of a vector whose channels have a variance of 1.
        self.register_buffer("log_scale", torch.tensor([-0.5, 0.6], dtype=torch.float32))
        # Of all vectors, by class: the share, then the means of v_c != 0 and of |v_c|.
        moments = torch.zeros(classes, 1 + 2 * dim, dtype=torch.float32)
        self.register_buffer("class_moments", moments)
        self.register_buffer("steps", torch.ones(classes, dtype=torch.float32))
        self.register_buffer("order", torch.arange(dim))  # of the channels in vectors
        self.register_buffer("lengths", torch.ones(classes, dim, 4, dtype=torch.int64))
        self._design(torch.tensor(True))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, classes={self.classes}, stages={self.stages}"

    def flag_values(self) -> dict:
        """The values in use of flags whose default depends on other flags."""
        return {"svq_dim": self.dim}

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, dim, *positions): codes like it, indices (B, *positions[, stages])."""
        tracked = self._track(z) if self.training else None
        counts = self._counts()
        vectors = (z.detach() - per_channel(self.running_mean, z)).transpose(0, 1)
        vectors = vectors[self.order].flatten(1)  # (dim, N)
        std, reference = self._reference_step(self.running_var)
        candidates = suited(vectors, std[self.order], reference, self.steps)
        classes, integers = search(vectors, candidates, self.steps, self.lengths, counts.budget)
        if tracked is not None:
            self._track_classes(classes, integers, tracked)
        index = classes * self.class_size + rank(counts, self.lengths, classes, integers)
        positions = (z.shape[0], *z.shape[2:])
        codes = self._codes(classes, integers, positions)
        source = _without_gradient_along(z.detach() - codes, z)
        quantized = straight_through(source, showing_nan(codes, z))
        return Quantized(quantized, self._tokens(index.view(positions)))

    def dequantize(self, indices: Tensor) -> Tensor:
        """Decode `indices` (B, *positions[, first stages]) to codes (B, dim, *positions).

        The first stages leave a range of indices open. The channels that all of its vectors share
        are decoded as they are, the next one as in the middle of the range, and others as the mean.
        """
        tokens = indices.unbind(-1) if self.stage_axis else (indices,)
        index = torch.zeros_like(tokens[0])
        for token, bits in zip(tokens, self.token_bits, strict=False):
            index = (index << bits) + token
        open_bits = sum(self.token_bits[len(tokens) :])
        first = index.flatten() << open_bits
        counts = self._counts()
        classes, integers = self._vectors(counts, first + ((1 << open_bits) >> 1))
        if open_bits:
            lowest = self._vectors(counts, first)
            highest = self._vectors(counts, first + (1 << open_bits) - 1)
            known = (lowest[1] == highest[1]) & (lowest[0] == highest[0])
            integers = integers * F.pad(known.long().cumprod(0)[:-1], (0, 0, 1, 0), value=1)
        return self._codes(classes, integers, index.shape)

    def _vectors(self, counts: Counts, index: Tensor) -> tuple[Tensor, Tensor]:
        """Class (N,) and integers (dim, N) of each index (N,)."""
        classes = (index // self.class_size).clamp(max=self.classes - 1)
        number = index - classes * self.class_size
        return classes, unrank(counts, self.lengths, classes, number)

    def _tokens(self, index: Tensor) -> Tensor:
        if not self.stage_axis:
            return index
        low = [sum(self.token_bits[k + 1 :]) for k in range(self.stages)]
        sizes = zip(low, self.codebook_sizes, strict=True)
        return torch.stack([(index >> bits) % size for bits, size in sizes], -1)

    def _codes(self, classes: Tensor, integers: Tensor, positions: tuple[int, ...]) -> Tensor:
        """The codes (B, dim, *positions) of integers (dim, N).

        Steps have 12 bits, so that the product is exact where it matters, and a fused
        multiplication and addition gives the same.
        """
        scaled = integers[inverse(self.order)].float() * self.steps[classes]
        codes = scaled + self.running_mean[:, None]
        return codes.view(self.dim, *positions).transpose(0, 1)

    def _counts(self) -> Counts:
        return count(self.lengths, UNITS * (self.index_bits + BUDGET_MARGIN), self.class_size)

    @torch.no_grad()
    def _track(self, z: Tensor) -> Tensor:
        """Update mean, variance and scales by a batch, then the steps and code lengths.

        Returns the weight of the batch, 0 if it is not finite.
        """
        number, weight = next_batch(self.batches, self.momentum)
        mean, var = per_channel(self.running_mean, z), per_channel(self.running_var, z)
        mean, var = update_moments(mean, var, z, weight)
        vectors = (z - mean).transpose(0, 1).flatten(1)
        scale = log_scale(vectors, *self._reference_step(var.flatten())) - self.log_scale[0]
        shift, square = mean_over_processes(torch.stack([scale.mean(), scale.square().mean()]))
        new = torch.stack([self.log_scale[0] + shift, (square - shift.square()).clamp(min=0)])
        finite = new.isfinite().all()
        store_if(
            finite,
            (self.running_mean, mean.flatten()),
            (self.running_var, var.flatten()),
            (self.log_scale, self.log_scale.lerp(new, weight)),
            (self.batches, number),
        )
        self._design(finite)
        return weight * finite

    @torch.no_grad()
    def _track_classes(self, classes: Tensor, integers: Tensor, weight: Tensor) -> None:
        """Update the statistics of the classes by the vectors of a batch of this weight."""
        magnitude = integers[inverse(self.order)].abs().t().float()  # (N, dim)
        features = torch.cat([torch.ones_like(magnitude[:, :1]), magnitude.sign(), magnitude], 1)
        member = F.one_hot(classes, self.classes).float() / len(classes)
        moments = mean_over_processes(member.t() @ features)
        self.class_moments.lerp_(moments, weight)

    def _reference_step(self, var: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviations of channels with these variances, and the step for a class's bits.

        By reverse water-filling of a Laplacian.
        """
        std = running_std(var).double()
        rate = self.index_bits - math.log2(self.classes)
        entropy = (LAPLACIAN * std).log2().sort(descending=True).values
        # Of all numbers of channels above the water, the one that needs the greatest step.
        used = torch.arange(1, self.dim + 1, device=std.device)
        step = ((entropy.cumsum(0) - rate) / used).max()
        return std, step.maximum(entropy[0] - MAX_BITS_OF_STRONGEST).exp2()

    @torch.no_grad()
    def _design(self, good: Tensor) -> None:
        """Order of channels, steps and code lengths, from the running statistics, if `good`."""
        std, reference = self._reference_step(self.running_var)
        order = std.argsort(descending=True, stable=True)
        lengths = _code_lengths(*self._probabilities(std, reference))[:, order]
        steps = self._class_steps(reference)
        store_if(good, (self.order, order), (self.steps, steps), (self.lengths, lengths))

    def _class_steps(self, reference: Tensor) -> Tensor:
        """The steps (classes,), float32 with 12 bits: spread as the scales of the vectors are."""
        low, high = CLASS_SPREAD
        half = (high - low) / (2 * self.classes)  # of the part of a class: its middle is taken
        ends = (low + half, high - half)
        place = torch.linspace(*ends, self.classes, device=reference.device, dtype=torch.float64)
        mean, var = self.log_scale.double()
        steps = (reference * (mean + var.sqrt() * place).exp2()).float()
        return (steps.view(torch.int32) & ~0xFFF).view(torch.float32)

    def _probabilities(self, std: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """P(v != 0) and P(|v| > k + 1 : |v| > k >= 1) of each class and channel.

        What was counted, and a Laplacian with a small weight.
        """
        laplacian = (-(2**0.5) * reference / std).exp().clamp(max=0.999)  # its decay
        weight = PRIOR_WEIGHT / self.classes
        share, nonzero, magnitude = self.class_moments.double().split([1, self.dim, self.dim], 1)
        nonzero = (nonzero + weight * laplacian.sqrt()) / (share + weight)
        prior = weight * laplacian.sqrt() / (1 - laplacian)
        magnitude = (magnitude + prior) / (share + weight)
        nonzero = nonzero.clamp(2**-12, 1 - 2**-6)
        decay = (1 - nonzero / magnitude).clamp(2**-10, 1 - 2**-10)
        return nonzero, decay


def _code_lengths(nonzero: Tensor, decay: Tensor) -> Tensor:
    """The numbers of `Lengths` (..., 4), int64, of a geometric distribution of |v| > 0.

    Args:
        nonzero, decay: as from `SVQ._probabilities`.
    """
    slope = -UNITS * decay.log2()
    run = (4 / slope).round().clamp(min=1)  # equal lengths for strong channels
    step = (slope * run).round().clamp(min=1)
    first = (-UNITS * (nonzero * (1 - decay) / 2).log2()).round()
    # Less than the others, so that there is one shortest vector. Lengths are relative to it, so
    # that it is in every class: with many channels its own length can be above every budget.
    zero = (-UNITS * (1 - nonzero).log2()).round().minimum(first - 1)
    return torch.stack([torch.zeros_like(zero), first - zero, step, run], -1).long()


def _without_gradient_along(error: Tensor, z: Tensor) -> Tensor:
    """A tensor whose gradient becomes that of `z` without its component along `error`, by image."""
    axes = tuple(range(1, z.ndim))
    unit = error / error.square().sum(axes, keepdim=True).sqrt().clamp(min=2**-60)
    return z - unit * (unit * z).sum(axes, keepdim=True)
