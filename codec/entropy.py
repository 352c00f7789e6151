"""Entropy coding of indices with the `constriction` package, an optional extra. Needs no torch.

The index of a stage is split into digits, lowest first: the channels of an FSQ or LFQ, or bit
fields of at most 12 bits where the codes have no such structure. Each digit has one table of
frequencies for every context (`context.py`), which is a function of what the decoder already has.
Frequencies and regressions are integers, counted and fitted on training images and stored in the
checkpoint. No symbol has more than 63/64 of a table: each costs at least 0.0227 bits, so that a
small file cannot claim a large image.

The stream holds, for each stage, digit and pass of the lattice, the symbols in row-major order. It
is that of constriction's ANS coder (32-bit words, 24-bit probabilities), started from the word
2^24: its words in little-endian order, without the zero bytes at the end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from codec import context
from codec.context import CLASSES, UNIT, digits_of, whole_lattice

Rows = list[list[np.ndarray]]  # for each stage, for each of its digits, lowest first

MAX_SYMBOLS = 65536
MIN_BITS, SLACK_BITS = 0.02, 64  # least bits per symbol, but for the first word of the coder
START = 2**24
CHUNK = 2**21  # probabilities in memory at a time
BACKOFF = 4.0  # observations that the coarse context, or the digit's own frequency, counts for
SAMPLE = 2**20  # positions that the regressions are fitted on


def load_constriction():
    """constriction's stream coders; ValueError if the package is not installed."""
    try:
        from constriction import stream  # pyright: ignore  (optional; its stubs lack this)
    except ImportError as error:
        raise ValueError("entropy coding needs constriction: pip install '.[compress]'") from error
    return stream


def bit_fields(size: int) -> list[int]:
    """The alphabets of an index of `size` codes without channels, lowest digit first.

    Powers of two: the fewest bit fields of at most 12 bits, as even as possible. Others: one, and
    ValueError above 65,536 codes.
    """
    if size & (size - 1):
        if size > MAX_SYMBOLS:
            raise ValueError(
                f"a stage of {size} codes cannot be entropy-coded: above {MAX_SYMBOLS} codes the "
                "number must be a power of two"
            )
        return [size]
    bits = size.bit_length() - 1
    parts = -(-bits // 12)
    return [2 ** (bits // parts + (i < bits % parts)) for i in range(parts)]


def digits_and_order(
    sizes: Sequence[int], levels: Sequence[int] | None
) -> tuple[list[list[int]], bool]:
    """The alphabets of each stage's digits, lowest first, and whether they are channels.

    Args:
        sizes: number of codes of each stage.
        levels: levels of the channels that make up an index, lowest first; None if it has none.
    """
    channels = list(levels or ())
    if channels and all(math.prod(channels) == size for size in sizes):
        return [channels] * len(sizes), True
    return [bit_fields(size) for size in sizes], False


def total(size: int) -> int:
    """The sum of the frequencies in a row of `size` symbols; 15 bits fit an int16."""
    return 2**15 if size <= 512 else 2**22


class EntropyModel:
    """Tables of frequencies, and the coder that uses them.

    Args:
        digits: for each stage the alphabets of its digits, lowest first.
        ordered: whether the digits are channels.
        tables: integers (contexts, alphabet), each row with the sum `total(alphabet)`.
        weights: integer weights of the regressions (CLASSES, n); empty for bit fields.

    Raises ValueError: an array has another shape, or frequencies that are out of range.
    """

    def __init__(self, digits: list[list[int]], ordered: bool, tables: Rows, weights: Rows):
        self.digits, self.ordered, self.tables, self.weights = digits, ordered, tables, weights
        self.stages = context.stages_of(digits, ordered)
        digest = hashlib.sha256(repr((digits, ordered)).encode())
        counts = [len(stage.tables) for stage in self.stages]
        fits = all([len(row) for row in rows] == counts for rows in (tables, weights))
        if not fits or not all(map(self._fits, self.stages, tables, weights)):
            raise ValueError("the checkpoint's entropy model does not fit: run fit again")
        for row in zip(tables, weights, strict=True):
            for table, weight in zip(*row, strict=True):
                digest.update(table.astype("<i4").tobytes())
                digest.update(weight.astype("<i4").tobytes())
        self.digest = digest.digest()

    @staticmethod
    def _fits(
        stage: context.Stage, tables: Sequence[np.ndarray], weights: Sequence[np.ndarray]
    ) -> bool:
        """Whether the arrays of a stage are integers of the right shapes and sums."""
        for shape, regression, table, weight in zip(
            stage.tables, stage.weights, tables, weights, strict=True
        ):
            if (
                table.shape != shape
                or table.min() < 1
                or table.max() > total(shape[1]) // 64 * 63
                or (table.sum(1, dtype=np.int64) != total(shape[1])).any()
                or weight.dtype != np.int32
                or weight.shape != regression
            ):
                return False
        return True

    def check_length(self, payload: int, positions: int, stages: int) -> None:
        """Raises ValueError if a payload of so many bytes is too short for the positions."""
        symbols = positions * sum(len(row) for row in self.digits[:stages])
        if symbols * MIN_BITS > 8 * payload + SLACK_BITS:
            raise ValueError(
                f"the file claims {positions} positions in a payload of {payload} bytes"
            )

    def _parts(self, planes: np.ndarray, passes: Sequence[context.Pass], order: Callable):
        """Symbols that are coded together, from the first (order `iter`) or the last (`reversed`).

        Yields a digit's plane, rows and columns in it, and constriction's model of the symbols
        there with its parameters: their probabilities, or none where there is one context.
        """
        categorical = load_constriction().model.Categorical
        for digit in order([*digits_of(self.stages, planes)]):
            table = self.tables[digit.k][digit.place]
            # Exact in float32: integers of at most 22 bits, divided by a power of two.
            whole, alphabet = np.float32(total(table.shape[1])), table.shape[1]
            for scan, contexts in digit.contexts(self.weights[digit.k][digit.place], passes):
                step = len(contexts) if len(table) == 1 else max(1, CHUNK // alphabet)
                for start in order(range(0, len(contexts), step)):
                    part = slice(start, start + step)
                    rows, columns = scan.rows[part], scan.columns[part]
                    if len(table) == 1:
                        model = categorical(table[0].astype(np.float32) / whole, perfect=False)
                        yield digit.plane, rows, columns, model, ()
                    else:
                        p = table[contexts[part]].astype(np.float32) / whole
                        yield digit.plane, rows, columns, categorical(perfect=False), (p,)

    def encode(self, indices: np.ndarray) -> bytes:
        """Indices (h, w, k) of the first k stages -> payload."""
        coder = load_constriction().stack.AnsCoder(np.array([START], np.uint32))
        # ANS is a stack: what is decoded first is encoded last.
        planes, passes = context.split(self.stages, indices), [whole_lattice(*indices.shape[:2])]
        for plane, rows, columns, model, p in self._parts(planes, passes, reversed):
            coder.encode_reverse(plane[rows, columns], model, *p)
        return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")

    def decode(self, payload: bytes, shape: tuple[int, int], stages: int) -> np.ndarray:
        """The inverse of `encode`: indices (h, w, stages), int64.

        Raises ValueError: `encode` gives this payload for no indices of this shape.
        """
        if not payload or payload[-1] == 0:
            raise ValueError("the entropy-coded payload ends in a zero byte")
        words = np.frombuffer(payload + bytes(-len(payload) % 4), "<u4").astype(np.uint32)
        coder = load_constriction().stack.AnsCoder(words)
        planes = np.zeros((sum(map(len, self.digits[:stages])), *shape), np.int32)
        # Bit fields do not depend on neighbours: all positions can be decoded at once.
        passes = context.lattice(*shape) if self.ordered else [whole_lattice(*shape)]
        for plane, rows, columns, model, p in self._parts(planes, passes, iter):
            plane[rows, columns] = coder.decode(model, *(p or (len(rows),)))
        if coder.get_compressed().tolist() != [START]:
            raise ValueError("the entropy-coded payload does not end where its last index does")
        return context.join(self.stages[:stages], planes)


class Counts:
    """Counts the digits of many images in their contexts.

    The first images, of 2^20 positions together, are kept until the regressions are fitted on them.

    Args:
        sizes: number of codes of each stage.
        levels: levels of the channels that make up an index, lowest first; None if it has none.
    """

    def __init__(self, sizes: Sequence[int], levels: Sequence[int] | None = None):
        self.digits, self.ordered = digits_and_order(sizes, levels)
        self.stages = context.stages_of(self.digits, self.ordered)
        self.counts = [[np.zeros(x, np.int64) for x in stage.tables] for stage in self.stages]
        self.kept: list[np.ndarray] = []
        self.weights: Rows = []  # empty until they are fitted

    def add(self, indices: np.ndarray) -> None:
        """Count the indices (h, w, stages) of an image."""
        if not self.weights:
            self.kept.append(indices)
            if sum(image[..., 0].size for image in self.kept) >= SAMPLE:
                self._fit()
            return
        passes = [whole_lattice(*indices.shape[:2])]
        for digit in digits_of(self.stages, context.split(self.stages, indices)):
            counts = self.counts[digit.k][digit.place]
            for scan, contexts in digit.contexts(self.weights[digit.k][digit.place], passes):
                symbols = digit.plane[scan.rows, scan.columns]
                np.add.at(counts.reshape(-1), contexts * counts.shape[1] + symbols, 1)

    def _fit(self) -> None:
        """Fit the regressions on the images kept so far; then count these."""
        kept, self.kept = self.kept, []
        self.weights = [[] for _ in self.stages]
        scans = [whole_lattice(*indices.shape[:2]) for indices in kept]
        images = [digits_of(self.stages, context.split(self.stages, indices)) for indices in kept]
        for digits in zip(*images, strict=True):  # the same digit of all images
            self.weights[digits[0].k].append(_regression(digits, scans))
        for indices in kept:
            self.add(indices)

    def entropy_model(self) -> EntropyModel:
        """The model of these counts.

        Sparse contexts back off to their coarse context, and these to the digit's frequencies.
        """
        if not self.weights:
            self._fit()
        tables = []
        for stage, row in zip(self.stages, self.counts, strict=True):
            tables.append([])
            for (coarse, fine), counts in zip(stage.contexts, row, strict=True):
                base = counts.sum(0) + 0.5
                base /= base.sum()
                above = counts.reshape(coarse, fine, -1).sum(1) + BACKOFF * base
                above /= above.sum(1, keepdims=True)
                p = counts + BACKOFF * np.repeat(above, fine, axis=0)
                tables[-1].append(frequencies(p / p.sum(1, keepdims=True)))
        return EntropyModel(self.digits, self.ordered, tables, self.weights)


def _regression(digits: Sequence[context.Digit], scans: list[context.Pass]) -> np.ndarray:
    """Integer weights (CLASSES, n) of a digit that is known in several images: least squares."""
    shape = digits[0].stage.weights[digits[0].place]
    if not digits[0].stage.ordered:
        return np.zeros(shape, np.int32)
    squares, products = np.zeros((*shape, shape[1])), np.zeros(shape)
    for digit, scan in zip(digits, scans, strict=True):
        for part in scan.parts():  # sums of whole numbers and halves: exact in any order
            features, wanted = digit.features(part), digit.plane[part.rows, part.columns]
            for kind in range(CLASSES):
                chosen = features[:, part.kind == kind]
                squares[kind] += chosen @ chosen.T
                products[kind] += chosen @ wanted[part.kind == kind]
    # A small ridge: constant features, or too few positions, leave the solution undetermined.
    ridge = 1e-6 * (np.trace(squares, axis1=1, axis2=2) + 1)
    squares += ridge[:, None, None] * np.eye(shape[1])
    solution = np.linalg.solve(squares, products[..., None])[..., 0]
    limit = 2**31 // UNIT - 1
    return np.rint(solution.clip(-limit, limit) * UNIT).astype(np.int32)


def frequencies(p: np.ndarray) -> np.ndarray:
    """Probabilities (contexts, alphabet) -> integers of the sum `total`, from 1 to 63/64 of it."""
    size = p.shape[1]
    whole = total(size)
    counts = 1 + np.floor(p * (whole - size)).astype(np.int64)
    top, rows = counts.argmax(1), np.arange(len(p))
    counts[rows, top] = np.minimum(counts[rows, top], whole // 64 * 63)
    # What is missing goes evenly to all symbols but the most frequent one.
    share, rest = np.divmod(whole - counts.sum(1), size - 1)
    order = np.arange(size) - (np.arange(size) > top[:, None])  # among the others
    more = share[:, None] + (order < rest[:, None])
    more[rows, top] = 0
    counts += more
    return counts.astype(np.int16 if whole <= 2**15 else np.int32)
