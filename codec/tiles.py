"""Large images go through a network in tiles that overlap by more than its reach."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from torch import nn

Area = tuple[slice, slice]  # rows and columns


def tiles(shape: tuple[int, ...], tile: int, margin: int) -> Iterator[tuple[Area, Area, Area]]:
    """Cores that cover `shape` (h, w), at most `tile` a side: (core, outer, inner) of each.

    The outer area, larger than its core by `margin` inside the image, is what goes through the
    network; the inner one is the core within it. All are in positions.
    """

    def spans(length: int) -> Iterator[tuple[slice, slice, slice]]:
        for start in range(0, length, tile):
            end = min(start + tile, length)
            first, last = max(0, start - margin), min(length, end + margin)
            yield slice(start, end), slice(first, last), slice(start - first, end - first)

    for rows, columns in product(spans(shape[0]), spans(shape[1])):
        core, outer, inner = zip(rows, columns, strict=True)
        yield core, outer, inner


def in_pixels(area: Area, f: int) -> Area:
    """An area of positions, in pixels of a model with the factor f."""
    rows, columns = (slice(part.start * f, part.stop * f) for part in area)
    return rows, columns


def reach(network: nn.Module) -> int:
    """Positions beyond which a pixel of the network's input or output has no influence.

    Every convolution works at the latent's resolution or a finer one, so that it reaches at most
    (kernel - 1) x dilation positions.
    """
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    layers = [layer for layer in network.modules() if isinstance(layer, convolutions)]
    return sum((max(layer.kernel_size) - 1) * max(layer.dilation) for layer in layers)
