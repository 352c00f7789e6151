"""Entropy coding of indices with the `constriction` package, an optional extra. Needs no torch.

The indices of a stage are split into digits, lowest first: the channels of an FSQ or LFQ, or bit
fields of at most 12 bits where the codes have no such structure. Each digit has a table of
frequencies for every context, and a context is made of what the decoder already has:

    lattice     positions come coarse to fine, so that nearly all have four decoded neighbours: the
                grid of every 16th row and column, then for s = 8, 4, 2, 1 the centres of its
                squares (neighbours (+-s, +-s)), then the midpoints of its edges ((+-s, 0) and
                (0, +-s)), horizontal edges first. The sum of the neighbours' digits, and their
                class (s = 1 by edge, s = 1 by corner, farther), are context.
    depth       the index of the stage before at the same position, or, where these are too many,
                its digit of the same channel; in the first stage, the digits of the same index that
                came before.

Where digits are places of one number a channel (geometric stages), these contexts are those of the
first stage alone. In each other stage the number so far is known at every position; the context is
where the neighbours' mean lies, their new digits included, in quarters of this position's cell and
of the cells beside it, and the number so far unless it has too many values.

Without channels there is one context, whose table is the code's frequency. Frequencies are
integers, counted over training images and stored in the checkpoint; no symbol has more than 63/64
of a table, so that each costs at least 0.0227 bits, and a small file cannot claim a large image.

The stream: for each stage, each digit, each pass of the lattice (rows from the top), the symbols.
It is constriction's ANS coder (32-bit words, 24-bit probabilities), started from the word 2^24, its
words little-endian, without the zero bytes at its end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from scripts.grid import Pass, lattice, whole_lattice

MAX_SYMBOLS, MAX_ENTRIES = 65536, 2**19
MAX_DEPTH_ENTRIES = 2**22  # of a table with the stage before as context
PLACES = 13  # of the neighbours' mean, four a cell, and one where there are no neighbours
MIN_BITS, SLACK_BITS = 0.02, 64  # a symbol costs at least this, but for the coder's first word
START = 2**24
CHUNK = 2**21  # probabilities held at a time
BACKOFF = 4.0  # observations that the table without depth counts for


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


class _Stage:
    """The contexts of one stage's digits.

    Args:
        digits: alphabet of each digit, lowest first.
        ordered: whether the digits are channels, whose values have an order.
        places: whether the stages are places of one number a channel, the highest first.
        earlier: numbers of codes of the stages before.
    """

    def __init__(self, digits: Sequence[int], ordered: bool, places: bool, earlier: Sequence[int]):
        self.digits, self.ordered, self.number = list(digits), ordered, len(earlier)
        self.places = places and self.number > 0
        self.widths, self.sums, self.chains = [], [], []
        self.by_index = False
        for place, size in enumerate(self.digits):
            first, width, sums, depth = place, 1, 1, 1
            if self.places:
                sums = 3 * PLACES
                values = size**self.number
                depth = values if sums * values * size <= MAX_ENTRIES else 1
            elif ordered and earlier:
                # With the stage before as context, sums in steps of a quarter of the alphabet's.
                width = max(1, size // 4)
                sums = 3 * ((4 * size - 4) // width + 1)
                depth = size
            else:
                sums = 3 * (4 * size - 3) if ordered else 1
                while first:
                    if sums * depth * self.digits[first - 1] * size > MAX_ENTRIES:
                        break
                    first -= 1
                    depth *= self.digits[first]
            self.widths.append(width)
            self.sums.append((sums, depth))
            self.chains.append(range(first, place))
        if ordered and earlier and not self.places:
            most = max(sums * size for (sums, _), size in zip(self.sums, digits, strict=True))
            self.by_index = earlier[-1] * most <= MAX_DEPTH_ENTRIES
            if self.by_index:
                self.sums = [(sums, earlier[-1]) for sums, _ in self.sums]

    def split(self, indices: np.ndarray) -> np.ndarray:
        """Indices (h, w) -> digits (digits, h, w), int32."""
        digits = np.empty((len(self.digits), *indices.shape), np.int32)
        for place, size in enumerate(self.digits):
            indices, digits[place] = np.divmod(indices, size)
        return digits

    def join(self, digits: np.ndarray) -> np.ndarray:
        """The inverse of `split`."""
        indices = np.zeros(digits.shape[1:], np.int64)
        for digit, size in zip(digits[::-1], self.digits[::-1], strict=True):
            indices = indices * size + digit
        return indices

    def known(self, earlier: np.ndarray) -> np.ndarray | None:
        """What `context` needs of the stages before, whose indices are (h, w, stages)."""
        if not self.ordered or not self.number:
            return None
        if self.by_index:
            return earlier[..., -1]
        if not self.places:
            return self.split(earlier[..., -1])
        value = np.zeros((len(self.digits), *earlier.shape[:2]), np.int64)
        for stage in range(self.number):
            value = value * np.array(self.digits)[:, None, None] + self.split(earlier[..., stage])
        return value

    def context(self, place: int, step: Pass, digits: np.ndarray, known: np.ndarray | None):
        """Contexts (n,), int64, of a digit in a pass, from the digits (digits, h, w) so far.

        `known` is what `known` gives.
        """
        rows, columns, neighbours, kind, alone = step
        size, (_, most) = self.digits[place], self.sums[place]
        total, depth = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        if self.places:
            own = known[place][rows, columns]
            for y, x in neighbours:
                total += (known[place][y, x] - own) * size + digits[place][y, x]
            # Quarters of this position's cell of the stage before, a cell's on either side as well.
            total = np.clip(total // size + 4, 0, PLACES - 2)
            total[:alone] = PLACES - 1
            return (total * 3 + kind) * most + (own if most > 1 else 0)
        if self.ordered:
            for y, x in neighbours:
                total += digits[place][y, x]
            total[:alone] = 2 * (size - 1)  # the middle
            total = total // self.widths[place] * 3 + kind
        if self.by_index:
            depth = known[rows, columns]
        elif known is not None:
            depth = known[place][rows, columns]
        for other in self.chains[place]:
            depth = depth * self.digits[other] + digits[other][rows, columns]
        return total * most + depth


class EntropyModel:
    """Tables of frequencies, and the coder that uses them.

    Args:
        digits: for each stage the alphabets of its digits, lowest first.
        ordered: whether digits are channels.
        places: whether stages are places of one number a channel.
        tables: for each stage and digit, integers (contexts, alphabet), each row with the sum
            `total(alphabet)`; None makes a model that can only `contexts`.

    Raises:
        ValueError: for tables of another shape, or with frequencies out of range.
    """

    def __init__(
        self,
        digits: list[list[int]],
        ordered: bool,
        places: bool,
        tables: list[list[np.ndarray]],
    ):
        self.digits, self.ordered, self.places, self.tables = digits, ordered, places, tables
        self.stages = _stages(digits, ordered, places)
        digest = hashlib.sha256(repr((digits, ordered, places)).encode())
        for stage, row in zip(self.stages, tables, strict=True):
            for size, (sums, depth), table in zip(stage.digits, stage.sums, row, strict=True):
                whole = total(size)
                if (
                    table.shape != (sums * depth, size)
                    or table.min() < 1
                    or table.max() > whole // 64 * 63
                    or (table.sum(1, dtype=np.int64) != whole).any()
                ):
                    raise ValueError("the checkpoint's entropy model does not fit: run fit again")
                digest.update(table.astype("<i4").tobytes())
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
            known = stage.known(indices[..., :k])
            for place in reversed(range(len(stage.digits))):
                symbols = digits[place][step.rows, step.columns]
                contexts = stage.context(place, step, digits, known)
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
            known = stage.known(indices[..., :k])
            for place, digit in enumerate(digits):
                # Where nothing depends on the neighbours, there is nothing to wait for.
                for step in lattice(*shape) if stage.ordered else [whole_lattice(*shape)]:
                    contexts = stage.context(place, step, digits, known)
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


def _stages(digits: list[list[int]], ordered: bool, places: bool) -> list[_Stage]:
    sizes = [math.prod(row) for row in digits]
    return [_Stage(row, ordered, places, sizes[:k]) for k, row in enumerate(digits)]


def total(size: int) -> int:
    """What the frequencies of a table of `size` symbols add up to: 15 bits fit half a word."""
    return 2**15 if size <= 512 else 2**22


class Counts:
    """Counts the digits of many images in their contexts.

    Args:
        sizes: number of codes of each stage.
        levels: levels of the channels that make up an index, lowest first; None if it has none.
        places: whether stages are places of one number a channel, the highest first.
    """

    def __init__(
        self, sizes: Sequence[int], levels: Sequence[int] | None = None, places: bool = False
    ):
        self.places = places
        self.ordered = levels is not None and all(math.prod(levels) == size for size in sizes)
        self.digits = [list(levels) if self.ordered else bit_fields(size) for size in sizes]
        self.stages = _stages(self.digits, self.ordered, places)
        self.counts = [
            [
                np.zeros((sums * depth, size), np.int64)
                for size, (sums, depth) in zip(stage.digits, stage.sums, strict=True)
            ]
            for stage in self.stages
        ]

    def add(self, indices: np.ndarray) -> None:
        """Count the indices (h, w, stages) of an image."""
        step = whole_lattice(*indices.shape[:2])
        for k, stage in enumerate(self.stages):
            digits, known = stage.split(indices[..., k]), stage.known(indices[..., :k])
            for place, counts in enumerate(self.counts[k]):
                contexts = stage.context(place, step, digits, known)
                symbols = digits[place][step.rows, step.columns]
                np.add.at(counts.reshape(-1), contexts * counts.shape[1] + symbols, 1)

    def entropy_model(self) -> EntropyModel:
        """The frequencies; rare contexts lean on those without depth, and these on the digit's."""
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
        return EntropyModel(self.digits, self.ordered, self.places, tables)


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
