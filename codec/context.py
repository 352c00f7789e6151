"""The contexts of `entropy.py`: what a digit's frequencies may depend on.

A context is made of what the decoder already has. For channels, whose digits have an order, that is

    lattice     positions come coarse to fine, so that nearly all have four decoded neighbours: the
                grid of every 16th row and column, then for s = 8, 4, 2, 1 the centres of its
                squares (neighbours (+-s, +-s)), then the midpoints of its edges ((+-s, 0) and
                (0, +-s)), horizontal edges first; in three classes (s = 1 by edge, s = 1 by
                corner, farther).
    prediction  the digit by a linear regression, one for each class, on these four neighbours and
                on the digits of all earlier channels and stages, at the position and at the four
                beside it; in steps.
    activity    how much the four neighbours differ, and how much the last four channels before
                differ between this position and those beside it; each in six steps.

For the digits of bit fields it is the digits of the same index that came before. Predictions are
sums of integers in float64: exact, and so the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_ENTRIES = 2**19  # of a digit's table
CLASSES, STEPS = 3, 48  # of positions; of a prediction, at most
EDGES = (4, 10, 20, 40, 80)  # between the steps of an activity
LAPLACIANS = 4  # channels before, that activity looks at
UNIT = 2**12  # of the regressions' integers
AROUND = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # rows and columns
COARSEST = 16  # rows and columns between the positions of the lattice's first pass


class Pass(NamedTuple):
    """Some positions of a grid: rows and columns (n,), the four neighbours of each (4, 2, n),
    their class (n,), and how many positions at the front have no neighbours."""

    rows: np.ndarray
    columns: np.ndarray
    neighbours: np.ndarray
    kind: np.ndarray
    alone: int


@functools.lru_cache(maxsize=1)
def lattice(height: int, width: int) -> list[Pass]:
    """The passes of a grid. Every position is in exactly one, its neighbours in earlier ones.

    A neighbour outside the grid is replaced by the one opposite; where both are, by the other pair.
    """

    def grid(top: int, left: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = (
            np.arange(*x, step, dtype=np.int32) for x in ((top, height), (left, width))
        )
        return np.repeat(rows, len(columns)), np.tile(columns, len(rows))

    def sides(x: np.ndarray, half: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.where(x >= half, x - half, x + half), x + half
        return low, np.where(high < limit, high, x - half)

    def one(rows, columns, pairs, kind: int) -> Pass:
        return Pass(rows, columns, np.array(pairs, np.int32), np.full(len(rows), kind, np.int8), 0)

    rows, columns = grid(0, 0, COARSEST)
    passes = [one(rows, columns, [(rows, columns)] * 4, 2)._replace(alone=len(rows))]
    half = COARSEST // 2
    while half:
        rows, columns = grid(half, half, 2 * half)
        up_down, left_right = sides(rows, half, height), sides(columns, half, width)
        pairs = [(y, x) for y in up_down for x in left_right]
        passes.append(one(rows, columns, pairs, 1 if half == 1 else 2))
        for top, left in ((0, half), (half, 0)):
            rows, columns = grid(top, left, 2 * half)
            up_down = [(y, columns) for y in sides(rows, half, height)]
            left_right = [(rows, x) for x in sides(columns, half, width)]
            if height <= half:  # then only the columns vary
                up_down = left_right
            if width <= half:
                left_right = up_down
            passes.append(one(rows, columns, [*up_down, *left_right], 0 if half == 1 else 2))
        half //= 2
    return [step for step in passes if len(step.rows)]


@functools.lru_cache(maxsize=1)
def whole_lattice(height: int, width: int) -> Pass:
    """All passes after each other, for one who knows all the indices."""
    rows, columns, neighbours, kind, alone = zip(*lattice(height, width), strict=True)
    joined = (np.concatenate(x, axis=-1) for x in (rows, columns, neighbours, kind))
    return Pass(*joined, sum(alone))


class Stage:
    """The contexts of one stage's digits.

    A context is made of two parts, (sums, depth): rare ones lean on those of the same first part.

    Args:
        digits: alphabet of each digit, lowest first.
        ordered: whether the digits are channels, whose values have an order.
        earlier: digits of all the stages before, together.
    """

    def __init__(self, digits: Sequence[int], ordered: bool, earlier: int):
        self.digits, self.ordered, self.earlier = list(digits), ordered, earlier
        self.sums, self.chains, self.steps = [], [], []
        for place, size in enumerate(self.digits):
            depth, first = 1, place
            if ordered:
                depth = (len(EDGES) + 1) ** 2
                self.steps.append(max(8, min(STEPS, MAX_ENTRIES // (CLASSES * depth * size))))
                self.sums.append((CLASSES * self.steps[-1], depth))
                continue
            while first and depth * self.digits[first - 1] * size <= MAX_ENTRIES:
                first -= 1
                depth *= self.digits[first]
            self.sums.append((1, depth))
            self.chains.append(range(first, place))

    def weights_shape(self, place: int) -> tuple[int, int]:
        """Of the regressions of a digit: classes, and its neighbours, what is around, and 1."""
        return CLASSES, 4 + len(AROUND) * (self.earlier + place) + 1

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

    def around(self, place: int, digits: np.ndarray, earlier: np.ndarray, weights: np.ndarray):
        """What the digits of earlier channels and stages say about a digit at every position.

        Returns:
            their part of the predictions (CLASSES, h, w), float64, and the second activity (h, w);
            None for bit fields.
        """
        if not self.ordered:
            return None
        known = [*earlier, *digits[:place]]
        height, width = digits.shape[1:]
        prediction = np.zeros((CLASSES, height * width))
        roughness = np.zeros((height, width))
        for number, plane in enumerate(known):
            near = surroundings(plane)
            start = 4 + len(AROUND) * number
            own = weights[:, start : start + len(AROUND)].astype(np.float64)
            prediction += own @ near.reshape(len(AROUND), -1)
            if number >= len(known) - LAPLACIANS:
                roughness += np.abs(4 * near[0] - near[1:].sum(0))
        activity = np.searchsorted(EDGES, roughness, side="right")
        return prediction.reshape(CLASSES, height, width), activity

    def neighbours(self, place: int, step: Pass, digits: np.ndarray) -> np.ndarray:
        """The digit at the four neighbours of a pass (4, n), float64; the middle for none."""
        found = np.stack([digits[place][y, x] for y, x in step.neighbours]).astype(np.float64)
        found[:, : step.alone] = (self.digits[place] - 1) / 2
        return found

    def context(self, place: int, step: Pass, digits: np.ndarray, around, weights: np.ndarray):
        """Contexts (n,), int64, of a digit in a pass, from the digits (digits, h, w) so far.

        `around` is what the method of this name gives.
        """
        rows, columns, kind = step.rows, step.columns, step.kind
        if not self.ordered:
            depth = np.zeros(len(rows), np.int64)
            for other in self.chains[place]:
                depth = depth * self.digits[other] + digits[other][rows, columns]
            return depth
        size, steps = self.digits[place], self.steps[place]
        found, (prediction, activity) = self.neighbours(place, step, digits), around
        mine = weights[:, [0, 1, 2, 3, -1]].astype(np.float64)[kind].T  # (5, n)
        guess = prediction[kind, rows, columns] + (mine[:4] * found).sum(0) + mine[4]
        guess = np.floor((guess + UNIT / 2) * steps / (size * UNIT)).clip(0, steps - 1)
        spread = np.abs(4 * found - found.sum(0)).sum(0)
        depth = np.searchsorted(EDGES, spread, side="right") * (len(EDGES) + 1)
        depth += activity[rows, columns]
        return (guess.astype(np.int64) * CLASSES + kind) * self.sums[place][1] + depth


def surroundings(plane: np.ndarray) -> np.ndarray:
    """A plane (h, w) and its neighbours at distance 1 (5, h, w), float64, the edge repeated."""
    height, width = plane.shape
    rows, columns = (np.arange(-1, n + 1).clip(0, n - 1) for n in (height, width))
    padded = plane[rows[:, None], columns].astype(np.float64)
    return np.stack([padded[1 + y :, 1 + x :][:height, :width] for y, x in AROUND])


def planes(stages: Sequence[Stage], indices: np.ndarray) -> np.ndarray:
    """All digits of the first stages (digits, h, w) of their indices (h, w, stages)."""
    if not indices.shape[2] or not stages[0].ordered:
        return np.empty((0, *indices.shape[:2]), np.int32)
    return np.concatenate([stage.split(indices[..., k]) for k, stage in enumerate(stages)])
