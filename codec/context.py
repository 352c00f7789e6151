"""The contexts of `entropy.py`: what the frequencies of a digit depend on.

A context is a function of what the decoder already has. Where the digits are channels, whose values
have an order, it is made of

    lattice     Positions are coded coarse to fine, so that nearly all of them have four decoded
                neighbours: first the grid of every 16th row and column; then, for s = 8, 4, 2, 1,
                the centres of its squares (neighbours (+-s, +-s)) and the midpoints of its edges
                (neighbours (+-s, 0) and (0, +-s)), horizontal edges first. The passes of a grid of
                5x5 positions:

                     1  9  6  9  3
                    10  8 10  8 10
                     7  9  5  9  7
                    10  8 10  8 10
                     4  9  6  9  2

                Positions have three classes: s = 1 by edge (here passes 9 and 10), s = 1 by corner
                (8), and farther (1 to 7).
    prediction  A linear regression of the digit, one for each class, on the digit at these four
                neighbours and on the digits of all earlier channels and stages, at the position
                and at the four positions around it; quantized to steps.
    activity    How much the digit differs between the four neighbours, and how much the last four
                known channels differ between the position and those around it; each in six steps.

Where the digits are bit fields, the context is the earlier digits of the same index. Predictions
are sums of integers in float64, which are exact and therefore the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_ENTRIES = 2**19  # in the table of a digit
CLASSES, STEPS = 3, 48  # classes of positions; most steps of a prediction
EDGES = (4, 10, 20, 40, 80)  # between the steps of an activity
LAPLACIANS = 4  # known channels that the activity is measured on
UNIT = 2**12  # the integer that stands for a regression weight of 1
AROUND = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # rows and columns
PART = 2**16  # positions
COARSEST = 16  # rows and columns between the positions of the first pass


class Pass(NamedTuple):
    """Positions of a grid that are coded together."""

    rows: np.ndarray  # (n,)
    columns: np.ndarray  # (n,)
    neighbours: np.ndarray  # (4, 2, n), their rows and columns
    kind: np.ndarray  # (n,), the class
    alone: int  # positions, at the front, that have no neighbours

    def parts(self) -> Iterator[Pass]:
        """The same positions in passes of at most PART: work on them needs little memory."""
        for start in range(0, len(self.rows), PART):
            part = slice(start, start + PART)
            alone = max(0, min(PART, self.alone - start))
            arrays = self.rows[part], self.columns[part], self.neighbours[..., part]
            yield Pass(*arrays, self.kind[part], alone)


@functools.lru_cache(maxsize=1)
def lattice(height: int, width: int) -> list[Pass]:
    """The passes of a grid. Every position is in exactly one, its neighbours in earlier ones.

    A neighbour outside the grid is replaced by the opposite one; if both are outside, by the other
    pair.
    """
    passes = []

    def reflect(x: np.ndarray, by: int, limit: int) -> np.ndarray:
        return np.where((x + by >= 0) & (x + by < limit), x + by, x - by)

    def add(top: int, left: int, step: int, moves: list[tuple[int, int]], kind: int) -> None:
        rows = np.arange(top, height, step, dtype=np.int32)
        columns = np.arange(left, width, step, dtype=np.int32)
        rows, columns = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
        pairs = [(reflect(rows, y, height), reflect(columns, x, width)) for y, x in moves]
        kinds, alone = np.full(len(rows), kind, np.int8), 0 if any(moves[0]) else len(rows)
        if len(rows):
            passes.append(Pass(rows, columns, np.array(pairs, np.int32), kinds, alone))

    add(0, 0, COARSEST, [(0, 0)] * 4, 2)
    half = COARSEST // 2
    while half:
        corners = [(y, x) for y in (-half, half) for x in (-half, half)]
        up_down, left_right = [(-half, 0), (half, 0)], [(0, -half), (0, half)]
        edges = up_down if height > half else left_right
        edges = edges + (left_right if width > half else up_down)
        edge, corner = (0, 1) if half == 1 else (2, 2)  # classes
        add(half, half, 2 * half, corners, corner)
        add(0, half, 2 * half, edges, edge)
        add(half, 0, 2 * half, edges, edge)
        half //= 2
    return passes


@functools.lru_cache(maxsize=1)
def whole_lattice(height: int, width: int) -> Pass:
    """All passes in one, in their order, for use where all indices are known."""
    *arrays, alone = zip(*lattice(height, width), strict=True)
    return Pass._make([*(np.concatenate(parts, axis=-1) for parts in arrays), sum(alone)])


class Stage:
    """How the index of one stage is split into digits.

    Args:
        digits: alphabet of each digit, lowest first.
        ordered: whether the digits are channels, whose values have an order.
        earlier: number of digits of all earlier stages together.

    For each digit, `contexts` has the number of coarse contexts and that of contexts in each of
    them; `tables` and `weights` have the shapes of its frequencies and of its regressions.
    """

    def __init__(self, digits: Sequence[int], ordered: bool, earlier: int):
        self.digits, self.ordered, self.earlier = list(digits), ordered, earlier
        self.contexts: list[tuple[int, int]] = []
        self.weights: list[tuple[int, ...]] = []  # classes, neighbours and known digits and 1
        self.chains: list[range] = []  # earlier digits that make up the context of a bit field
        add = self._add_channel if ordered else self._add_bit_field
        for place, size in enumerate(self.digits):
            add(place, size)
        self.tables = [
            (coarse * fine, size)
            for (coarse, fine), size in zip(self.contexts, self.digits, strict=True)
        ]

    def _add_channel(self, place: int, size: int) -> None:
        """Contexts by prediction and class (coarse), and by the two activities (fine)."""
        fine = (len(EDGES) + 1) ** 2
        steps = min(STEPS, MAX_ENTRIES // (CLASSES * fine * size))  # 9 for 512 levels, the most
        self.contexts.append((CLASSES * steps, fine))
        self.weights.append((CLASSES, 4 + len(AROUND) * (self.earlier + place) + 1))
        self.chains.append(range(0))

    def _add_bit_field(self, place: int, size: int) -> None:
        """Contexts by as many of the digits just before it as the table has room for."""
        first, fine = place, 1
        while first and fine * self.digits[first - 1] * size <= MAX_ENTRIES:
            first -= 1
            fine *= self.digits[first]
        self.contexts.append((1, fine))
        self.weights.append((0,))
        self.chains.append(range(first, place))


def stages_of(digits: Sequence[Sequence[int]], ordered: bool) -> list[Stage]:
    """The stages that have these digits."""
    earlier = [sum(map(len, digits[:k])) for k in range(len(digits))]
    return [Stage(row, ordered, before) for row, before in zip(digits, earlier, strict=True)]


def split(stages: Sequence[Stage], indices: np.ndarray) -> np.ndarray:
    """Indices (h, w, k) -> the digits of the first k stages (digits, h, w), int32."""
    planes = []
    for stage, rest in zip(stages, np.moveaxis(indices, 2, 0), strict=False):
        for size in stage.digits:
            rest, digit = np.divmod(rest, size)
            planes.append(digit.astype(np.int32))
    return np.stack(planes)


def join(stages: Sequence[Stage], planes: np.ndarray) -> np.ndarray:
    """The inverse of `split`, for the stages that have been split: indices (h, w, k), int64."""
    indices = np.zeros((*planes.shape[1:], len(stages)), np.int64)
    for k, stage in enumerate(stages):
        for place in reversed(range(len(stage.digits))):
            indices[..., k] = indices[..., k] * stage.digits[place] + planes[stage.earlier + place]
    return indices


class Digit(NamedTuple):
    """Digit `place` of stage `k` of an image, with all that is known before it."""

    stage: Stage
    k: int
    place: int
    digits: np.ndarray  # (digits, h, w) of the stage, known below `place`
    earlier: np.ndarray  # (n, h, w) of all earlier stages, empty for bit fields

    @property
    def plane(self) -> np.ndarray:
        """The digit itself (h, w), a view."""
        return self.digits[self.place]

    @property
    def known(self) -> list[np.ndarray]:
        """All digits (h, w) before it."""
        return [*self.earlier, *self.digits[: self.place]]

    def contexts(
        self, weights: np.ndarray, passes: Iterable[Pass]
    ) -> Iterator[tuple[Pass, np.ndarray]]:
        """Each pass and the contexts (n,), int64, of its positions.

        A pass is looked at when its turn comes, so that a decoder can fill in those before it.
        """
        if self.stage.ordered:
            return self._contexts_of_channel(weights, passes)
        return self._contexts_of_bit_field(passes)

    def _contexts_of_bit_field(self, passes: Iterable[Pass]) -> Iterator[tuple[Pass, np.ndarray]]:
        for scan in passes:
            index = np.zeros(len(scan.rows), np.int64)
            for other in self.stage.chains[self.place]:
                known = self.digits[other][scan.rows, scan.columns]
                index = index * self.stage.digits[other] + known
            yield scan, index

    def _contexts_of_channel(
        self, weights: np.ndarray, passes: Iterable[Pass]
    ) -> Iterator[tuple[Pass, np.ndarray]]:
        size, (coarse, fine) = self.stage.digits[self.place], self.stage.contexts[self.place]
        steps = coarse // CLASSES
        prediction, activity = self.around(weights)
        own = weights[:, [0, 1, 2, 3, -1]].astype(np.float64)
        for scan in passes:
            rows, columns, kind = scan.rows, scan.columns, scan.kind
            near, mine = self.neighbours(scan), own[kind].T  # (4, n), (5, n)
            guess = prediction[kind, rows, columns] + (mine[:4] * near).sum(0) + mine[4]
            guess = np.floor((guess + UNIT / 2) * steps / (size * UNIT)).clip(0, steps - 1)
            spread = np.abs(4 * near - near.sum(0)).sum(0)
            active = np.searchsorted(EDGES, spread, side="right") * (len(EDGES) + 1)
            active += activity[rows, columns]
            yield scan, (guess.astype(np.int64) * CLASSES + kind) * fine + active

    def around(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Part of the predictions (CLASSES, h, w) by known channels; second activity (h, w)."""
        prediction = np.zeros((CLASSES, self.plane.size))
        roughness = np.zeros(self.plane.shape)
        for number, plane in enumerate(self.known):
            near, start = surroundings(plane), 4 + len(AROUND) * number
            own = weights[:, start : start + len(AROUND)].astype(np.float64)
            prediction += own @ near.reshape(len(AROUND), -1)
            if number >= len(self.known) - LAPLACIANS:
                roughness += np.abs(4 * near[0] - near[1:].sum(0))
        activity = np.searchsorted(EDGES, roughness, side="right")
        return prediction.reshape(CLASSES, *self.plane.shape), activity

    def neighbours(self, scan: Pass) -> np.ndarray:
        """The digit at the four neighbours of a pass (4, n), float64; mid-range without them."""
        found = np.stack([self.plane[y, x] for y, x in scan.neighbours]).astype(np.float64)
        found[:, : scan.alone] = (self.stage.digits[self.place] - 1) / 2
        return found

    def features(self, scan: Pass) -> np.ndarray:
        """The inputs of the regressions, in the order of their weights (weights, n), float64."""
        height, width = self.plane.shape
        y, x = np.array(AROUND, np.int32).T[..., None]
        y, x = (scan.rows + y).clip(0, height - 1), (scan.columns + x).clip(0, width - 1)
        near = [plane[y, x] for plane in self.known]  # as `surroundings`, at these positions
        return np.concatenate([self.neighbours(scan), *near, np.ones((1, len(scan.rows)))])


def digits_of(stages: Sequence[Stage], planes: np.ndarray) -> Iterator[Digit]:
    """All digits of planes (digits, h, w) of the first stages, in the order of decoding.

    They are views: a decoder starts with zeros, and fills in a digit before it asks for the next.
    """
    for k, stage in enumerate(stages):
        digits = planes[stage.earlier :][: len(stage.digits)]
        for place in range(len(digits)):
            yield Digit(stage, k, place, digits, planes[: stage.earlier if stage.ordered else 0])


def surroundings(plane: np.ndarray) -> np.ndarray:
    """A plane (h, w) and its neighbours at distance 1 (5, h, w), float64, the edge repeated."""
    height, width = plane.shape
    padded = np.pad(plane.astype(np.float64), 1, mode="edge")
    return np.stack([padded[1 + y :, 1 + x :][:height, :width] for y, x in AROUND])
