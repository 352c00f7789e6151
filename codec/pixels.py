"""uint8 images (H, W, 3) as arrays: grey ones, and PSNR. Needs no torch."""

from __future__ import annotations

import math

import numpy as np


def is_grey(image: np.ndarray) -> bool:
    """Whether the three channels of an image (H, W, 3) are equal."""
    return all(np.array_equal(image[..., 0], image[..., channel]) for channel in (1, 2))


def to_grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same shape; each channel is the mean of the three, rounded."""
    mean = (image.sum(axis=2, dtype=np.uint16) + 1) // 3
    return np.repeat(mean.astype(np.uint8)[..., None], 3, axis=2)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 images (H, W, 3), peak 255; infinite for equal ones."""
    # Row by row: a large image as integers would take four times its memory.
    square = sum(int(np.square(x.astype(np.int32) - y).sum()) for x, y in zip(a, b, strict=True))
    return 10 * math.log10(255**2 * a.size / square) if square else math.inf
