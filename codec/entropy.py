"""Entropy coding of indices with the `constriction` package, an optional extra. Needs no torch.

The indices of a stage are split into digits, lowest first: the channels of an FSQ or LFQ, or bit
fields of at most 12 bits where the codes have no such structure. Each digit has a table of
frequencies for every context (`context.py`), which is made of what the decoder already has.
Frequencies and regressions are integers, counted and fitted over training images and stored in the
checkpoint; no symbol has more than 63/64 of a table, so that each costs at least 0.0227 bits, and a
small file cannot claim a large image.

The stream: for each stage, each digit, each pass of the lattice (rows from the top), the symbols.
It is constriction's ANS coder (32-bit words, 24-bit probabilities), started from the word 2^24, its
words little-endian, without the zero bytes at its end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from codec.context import (
    AROUND,
    CLASSES,
    UNIT,
    Stage,
    lattice,
    planes,
    surroundings,
    whole_lattice,
)

MAX_SYMBOLS = 65536
MIN_BITS, SLACK_BITS = 0.02, 64  # a symbol costs at least this, but for the coder's first word
START = 2**24
CHUNK = 2**21  # probabilities held at a time
BACKOFF = 4.0  # observations that the table without depth counts for
SAMPLE = 2**20  # positions that the regressions are fitted to


def load_constriction():
    """constriction's stream coders.

    Raises:
        ValueError: if the package is missing.
    """
    try:
        import constriction
    except ImportError as error:
        raise ValueError("entropy coding needs constriction: pip install '.[compress]'") from error
    return constriction.stream


def bit_fields(size: int) -> list[int]:
    """The alphabets of an index of `size` codes without channels, lowest digit first.

    Powers of two: the fewest bit fields of at most 12 bits, as even as can be. Others: one.

    Raises:
        ValueError: for more than 65,536 codes that are no power of two.
    """
    if size & (size - 1):
        if size > MAX_SYMBOLS:
            raise ValueError(
                f"a stage of {size} codes has no entropy model: above {MAX_SYMBOLS} codes the "
                "number must be a power of two"
            )
        return [size]
    bits = size.bit_length() - 1
    parts = -(-bits // 12)
    return [2 ** (bits // parts + (i < bits % parts)) for i in range(parts)]


class EntropyModel:
    """Tables of frequencies, and the coder that uses them.

    Args:
        digits: for each stage the alphabets of its digits, lowest first.
        ordered: whether digits are channels.
        tables: for each stage and digit, integers (contexts, alphabet), each row with the sum
            `total(alphabet)`.
        weights: for each stage and digit, the regressions, integers; without channels empty.

    Raises:
        ValueError: for tables of another shape, or with frequencies out of range.
    """

    def __init__(
        self,
        digits: list[list[int]],
        ordered: bool,
        tables: list[list[np.ndarray]],
        weights: list[list[np.ndarray]],
    ):
        self.digits, self.ordered, self.tables, self.weights = digits, ordered, tables, weights
        self.stages = _stages(digits, ordered)
        digest = hashlib.sha256(repr((digits, ordered)).encode())
        for stage, row, fitted in zip(self.stages, tables, weights, strict=True):
            for place, (table, weight) in enumerate(zip(row, fitted, strict=True)):
                (sums, depth), size = stage.sums[place], stage.digits[place]
                whole = total(size)
                if (
                    table.shape != (sums * depth, size)
                    or table.min() < 1
                    or table.max() > whole // 64 * 63
                    or (table.sum(1, dtype=np.int64) != whole).any()
                    or weight.shape != (stage.weights_shape(place) if ordered else (0,))
                ):
                    raise ValueError("the checkpoint's entropy model does not fit: run fit again")
                digest.update(table.astype("<i4").tobytes())
                digest.update(weight.astype("<i4").tobytes())
        self.digest = digest.digest()

    def check_length(self, payload: int, positions: int, stages: int) -> None:
        """ValueError if a payload of so many bytes is too short for the positions."""
        symbols = positions * sum(len(row) for row in self.digits[:stages])
        if symbols * MIN_BITS > 8 * payload + SLACK_BITS:
            raise ValueError(f"claims {positions} positions in a payload of {payload} bytes")

    def encode(self, indices: np.ndarray) -> bytes:
        """Indices (h, w, k) of the first k stages -> payload."""
        stream = load_constriction()
        coder = stream.stack.AnsCoder(np.array([START], np.uint32))
        step = whole_lattice(*indices.shape[:2])
        # A stack: what is decoded first is encoded last.
        for k in reversed(range(indices.shape[2])):
            stage, digits = self.stages[k], self.stages[k].split(indices[..., k])
            earlier = planes(self.stages[:k], indices[..., :k])
            for place in reversed(range(len(stage.digits))):
                symbols = digits[place][step.rows, step.columns]
                weights = self.weights[k][place]
                around = stage.around(place, digits, earlier, weights)
                contexts = stage.context(place, step, digits, around, weights)
                for part, model, rows in reversed(self._models(stream, k, place, contexts)):
                    coder.encode_reverse(symbols[part], model, *rows())
        return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")

    def decode(self, payload: bytes, shape: tuple[int, int], stages: int) -> np.ndarray:
        """The inverse of `encode`: indices (h, w, stages), int64.

        Raises:
            ValueError: if the payload is not what `encode` gives for any indices of this shape.
        """
        stream = load_constriction()
        if not payload or payload[-1] == 0:
            raise ValueError("the entropy-coded payload ends in a zero byte")
        words = np.frombuffer(payload + bytes(-len(payload) % 4), "<u4").astype(np.uint32)
        coder = stream.stack.AnsCoder(words)
        indices = np.empty((*shape, stages), np.int64)
        for k, stage in enumerate(self.stages[:stages]):
            digits = np.zeros((len(stage.digits), *shape), np.int32)
            earlier = planes(self.stages[:k], indices[..., :k])
            for place, digit in enumerate(digits):
                weights = self.weights[k][place]
                around = stage.around(place, digits, earlier, weights)
                # Where nothing depends on the neighbours, there is nothing to wait for.
                for step in lattice(*shape) if stage.ordered else [whole_lattice(*shape)]:
                    contexts = stage.context(place, step, digits, around, weights)
                    for part, model, rows in self._models(stream, k, place, contexts):
                        given = rows() or (part.stop - part.start,)
                        digit[step.rows[part], step.columns[part]] = coder.decode(model, *given)
            indices[..., k] = stage.join(digits)
        if coder.get_compressed().tolist() != [START]:
            raise ValueError("the entropy-coded payload does not end where its last index does")
        return indices

    def _models(self, stream, k: int, place: int, contexts: np.ndarray) -> list:
        """(slice of the symbols, constriction's model, its rows of probabilities) of each chunk."""
        table = self.tables[k][place]
        whole, size = np.float32(total(table.shape[1])), table.shape[1]
        categorical = stream.model.Categorical
        if len(table) == 1:
            model = categorical(table[0].astype(np.float32) / whole, perfect=False)
            return [(slice(0, len(contexts)), model, tuple)]
        family, step = categorical(perfect=False), max(1, CHUNK // size)
        return [
            (
                slice(start, min(start + step, len(contexts))),
                family,
                # Exact: integers of at most 22 bits over a power of two.
                lambda part=contexts[start : start + step]: (
                    table[part].astype(np.float32) / whole,
                ),
            )
            for start in range(0, len(contexts), step)
        ]


def _stages(digits: list[list[int]], ordered: bool) -> list[Stage]:
    earlier = [sum(map(len, digits[:k])) for k in range(len(digits))]
    return [Stage(row, ordered, before) for row, before in zip(digits, earlier, strict=True)]


def total(size: int) -> int:
    """What the frequencies of a table of `size` symbols add up to: 15 bits fit half a word."""
    return 2**15 if size <= 512 else 2**22


class Counts:
    """Counts the digits of many images in their contexts.

    The first images, of 2^20 positions together, are kept until the regressions are fitted to them.

    Args:
        sizes: number of codes of each stage.
        levels: levels of the channels that make up an index, lowest first; None if it has none.
    """

    def __init__(self, sizes: Sequence[int], levels: Sequence[int] | None = None):
        self.ordered = levels is not None and all(math.prod(levels) == size for size in sizes)
        self.digits = [list(levels) if self.ordered else bit_fields(size) for size in sizes]
        self.stages = _stages(self.digits, self.ordered)
        self.counts = [
            [
                np.zeros((sums * depth, size), np.int64)
                for size, (sums, depth) in zip(stage.digits, stage.sums, strict=True)
            ]
            for stage in self.stages
        ]
        self.kept: list[np.ndarray] = []
        self.weights: list[list[np.ndarray]] | None = None

    def add(self, indices: np.ndarray) -> None:
        """Count the indices (h, w, stages) of an image."""
        if self.weights is None:
            self.kept.append(indices)
            if sum(image[..., 0].size for image in self.kept) >= SAMPLE:
                self._fit()
            return
        step = whole_lattice(*indices.shape[:2])
        for k, stage in enumerate(self.stages):
            digits = stage.split(indices[..., k])
            earlier = planes(self.stages[:k], indices[..., :k])
            for place, counts in enumerate(self.counts[k]):
                weights = self.weights[k][place]
                around = stage.around(place, digits, earlier, weights)
                contexts = stage.context(place, step, digits, around, weights)
                symbols = digits[place][step.rows, step.columns]
                np.add.at(counts.reshape(-1), contexts * counts.shape[1] + symbols, 1)

    def _fit(self) -> None:
        """The regressions, by least squares over the images kept so far; then these are counted."""
        empty = np.zeros(0, np.int32)
        self.weights = [[empty for _ in stage.digits] for stage in self.stages]
        for k, stage in enumerate(self.stages if self.ordered else ()):
            shapes = [stage.weights_shape(place) for place in range(len(stage.digits))]
            squares = [np.zeros((classes, n, n)) for classes, n in shapes]
            products = [np.zeros(shape) for shape in shapes]
            for indices in self.kept:
                step = whole_lattice(*indices.shape[:2])
                digits = stage.split(indices[..., k])
                known = np.concatenate([planes(self.stages[:k], indices[..., :k]), digits])
                at = (slice(None), step.rows, step.columns)
                near = np.concatenate([surroundings(plane)[at] for plane in known])
                for place in range(len(stage.digits)):
                    width = len(AROUND) * (stage.earlier + place)
                    own, one = stage.neighbours(place, step, digits), np.ones((1, near.shape[1]))
                    features = np.concatenate([own, near[:width], one])
                    wanted = digits[place][step.rows, step.columns]
                    for kind in range(CLASSES):
                        some = features[:, step.kind == kind]
                        squares[place][kind] += some @ some.T
                        products[place][kind] += some @ wanted[step.kind == kind]
            for place, (square, product) in enumerate(zip(squares, products, strict=True)):
                # A little towards zero: what is constant, or seen once, has no solution of its own.
                ridge = 1e-6 * (np.trace(square, axis1=1, axis2=2) + 1)
                square += ridge[:, None, None] * np.eye(square.shape[1])
                solution = np.linalg.solve(square, product[..., None])[..., 0]
                limit = 2**31 // UNIT - 1
                self.weights[k][place] = np.rint(solution.clip(-limit, limit) * UNIT).astype(
                    np.int32
                )
        kept, self.kept = self.kept, []
        for indices in kept:
            self.add(indices)

    def entropy_model(self) -> EntropyModel:
        """The frequencies; rare contexts lean on those without depth, and these on the digit's."""
        if self.weights is None:
            self._fit()
        tables = []
        for stage, row in zip(self.stages, self.counts, strict=True):
            tables.append([])
            for (sums, depth), counts in zip(stage.sums, row, strict=True):
                base = counts.sum(0) + 0.5
                base /= base.sum()
                coarse = counts.reshape(sums, depth, -1).sum(1) + BACKOFF * base
                coarse /= coarse.sum(1, keepdims=True)
                fine = counts + BACKOFF * np.repeat(coarse, depth, axis=0)
                tables[-1].append(frequencies(fine / fine.sum(1, keepdims=True)))
        return EntropyModel(self.digits, self.ordered, tables, self.weights)


def frequencies(p: np.ndarray) -> np.ndarray:
    """Probabilities (contexts, alphabet) -> integers that add up to `total`, 1 to 63/64 of it."""
    size = p.shape[1]
    whole = total(size)
    counts = 1 + np.floor(p * (whole - size)).astype(np.int64)
    excess = counts.max(1) - whole // 64 * 63
    top = counts.argmax(1)
    rows = np.arange(len(p))
    counts[rows, top] -= np.maximum(excess, 0)
    # What is missing goes evenly to all symbols but the most frequent one.
    missing = whole - counts.sum(1)
    share, rest = np.divmod(missing, size - 1)
    counts += share[:, None]
    order = np.arange(size)[None] - (np.arange(size)[None] > top[:, None])
    counts += order < rest[:, None]
    counts[rows, top] -= share + (top < rest)
    return counts.astype(np.int16 if whole <= 2**15 else np.int32)
