"""Ways through the grid of latent positions: tiles for the network, a lattice for `entropy.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COARSEST = 16  # rows and columns between the positions of the lattice's first pass


def tiles(
    shape: tuple[int, int], tile: int, margin: int
) -> Iterator[tuple[tuple[int, int, int, int], tuple[int, int, int, int]]]:
    """Cores that cover `shape`, and what goes through the network for each of them.

    Both are (top, bottom, left, right), in positions; the second is larger by `margin` on each side
    that is not the image's own.
    """
    height, width = shape
    for top in range(0, height, tile):
        bottom = min(top + tile, height)
        for left in range(0, width, tile):
            right = min(left + tile, width)
            outer = (
                max(0, top - margin),
                min(height, bottom + margin),
                max(0, left - margin),
                min(width, right + margin),
            )
            yield (top, bottom, left, right), outer


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
