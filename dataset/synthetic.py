"""Generated images with the statistics of photographs: training and tests without data."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator

import numpy as np
import torch

from dataset.base import ImageDataset

# fmt: off
_COLOURS = np.array((  # sRGB bytes: sky, leaves, earth, stone, skin, water, flowers
    (135, 178, 224), (38, 77, 133), (237, 237, 232), (77, 107, 41), (28, 46, 23), (143, 166, 64),
    (92, 64, 41), (209, 184, 138), (133, 130, 125), (26, 26, 28), (153, 71, 51), (217, 163, 133),
    (158, 112, 69), (224, 179, 56), (184, 31, 31), (56, 122, 128), (199, 212, 230), (179, 77, 133),
    (222, 120, 41), (245, 242, 237),
))
# fmt: on


@functools.lru_cache(maxsize=2)
def _textures(size: int) -> np.ndarray:
    """Surfaces to cut leaves from, float32 (15, 2 size, 2 size), mean 0, std 1; 0 is the smoothest.

    Noise with amplitudes 1/f^a, the same drawn out into fibres, and bent stripes.
    """
    rng = np.random.default_rng(0)
    side = 2 * size
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]

    def noise(exponent: float, angle: float = 0.0, stretch: float = 1.0) -> np.ndarray:
        along = fx * math.cos(angle) + fy * math.sin(angle)
        across = fy * math.cos(angle) - fx * math.sin(angle)
        frequency = np.hypot(along, stretch * across)
        frequency[0, 0] = np.inf  # no mean
        phase = np.exp(2j * math.pi * rng.random(frequency.shape))
        return np.fft.irfft2(phase * frequency**-exponent, s=(side, side))

    surfaces = [noise(a) for a in (2.0, 2.0, 1.4, 1.4, 1.1, 1.1, 0.9, 0.7)]
    surfaces += [noise(1.2, angle, 7) for angle in rng.uniform(0, math.pi, 5)]
    bend = 0.8 * surfaces[0] / surfaces[0].std()
    y, x = np.mgrid[:side, :side]
    for angle in rng.uniform(0, math.pi, 2):
        period = max(3.0, size * math.exp(rng.uniform(math.log(0.035), math.log(0.12))))
        phase = 2 * math.pi / period * (x * math.cos(angle) + y * math.sin(angle)) + bend
        surfaces.append(np.tanh(2 * np.sin(phase)))
    return np.stack([(s - s.mean()) / s.std() for s in surfaces]).astype(np.float32)


def _box_blur(canvas: np.ndarray, radius: int) -> np.ndarray:
    for axis in (1, 2, 1, 2):
        lines = np.moveaxis(canvas, axis, -1)
        padded = np.pad(lines, ((0, 0), (0, 0), (radius + 1, radius)), mode="edge")
        sums = np.cumsum(padded, axis=-1)
        means = (sums[..., 2 * radius + 1 :] - sums[..., : -2 * radius - 1]) / (2 * radius + 1)
        canvas = np.moveaxis(means, -1, axis)
    return np.ascontiguousarray(canvas)


def _draw(rng: np.random.Generator, size: int, textures: np.ndarray) -> list[tuple]:
    """The leaves of one image from back to front: box, geometry, colour, gloss, shape, surface.

    All at once, because Python code for each leaf would be slow.
    """
    smallest, largest = size * math.exp(rng.uniform(math.log(0.018), math.log(0.09))), 0.6 * size
    mean_area = 2 * math.pi * math.log(largest / smallest) / (smallest**-2 - largest**-2)
    count = int(min(75, max(14, 2 * size**2 / mean_area)))  # two layers, or what time allows
    u = iter(rng.random((12, count), dtype=np.float32))
    normal = iter(rng.standard_normal((8, count), dtype=np.float32))

    radius = (smallest**-2 - next(u) * (smallest**-2 - largest**-2)) ** -0.5
    # The ground, and a few large ones: so small a number of leaves would leave most of it bare.
    radius[:7] = size * np.array([3, *np.exp(rng.uniform(math.log(0.12), math.log(0.45), 6))])
    stretch = np.exp(0.3 * np.abs(next(normal)))
    long, short = radius * stretch, radius / stretch
    angle = math.pi * next(u) * rng.choice([1, 1, 0.12])  # some scenes are upright
    cos, sin = np.cos(angle), np.sin(angle)
    groups = rng.uniform(0, size, (2, 3))[:, (3 * next(u)).astype(int)]  # three heaps ...
    heap = groups + 0.15 * size * np.stack([next(normal), next(normal)])
    free = size * np.stack([next(u), next(u)])
    x, y = np.clip(np.where(next(u) < 0.55, heap, free), 0, size - 1)  # ... of half the leaves
    shadow = np.minimum(0.25 * radius + 1, 0.05 * size)
    shape = (next(u) * rng.choice([4, 5, 6])).astype(int)
    wobble = np.where(next(u) < 0.65, 0.2 * next(u) * short, 0)
    margin = 1 + (1.5 * shadow + 2.2 * wobble + 1) / short
    reach_x = np.hypot(long * cos, short * sin) * margin
    reach_y = np.hypot(long * sin, short * cos) * margin
    surface = (next(u) * len(textures)).astype(int)
    contrast = np.minimum(0.18 * np.exp(0.8 * next(normal)), 0.4) * rng.choice([0.3, 1, 1.5])
    shade = 0.25 * next(u) / radius

    # Five colours an image; a smooth map makes neighbours alike.
    five = _COLOURS[rng.permutation(len(_COLOURS))[:5]].T / 255
    mood = 1.5 * textures[1, y.astype(int), x.astype(int)] + 1.6 * (2 * next(u) - 1)
    colour = five[:, np.clip(2.5 + mood, 0, 4).astype(int)] * np.exp(0.4 * next(normal))
    colour += 0.03 * np.stack([next(normal), next(normal), next(normal)])
    grey = colour.mean(0)
    colour = grey + rng.uniform(0.25, 1.0) * (colour - grey)
    colour *= 1 + 0.04 * rng.standard_normal((3, 1))  # the colour of the light
    colour = np.clip(colour, 0.02, 0.95).astype(np.float32).T[:, :, None, None]
    gloss = 0.6 * colour + 0.15  # how much light and surface show

    lefts, rights = (np.clip(x + s * reach_x, 0, size).astype(int).tolist() for s in (-1, 1))
    tops, bottoms = (np.clip(y + s * reach_y, 0, size).astype(int).tolist() for s in (-1, 1))
    boxes = zip(map(slice, tops, bottoms), map(slice, lefts, rights), strict=True)
    geometry = np.stack([x, y, cos / long, sin / long, cos / short, sin / short, short, shadow])
    geometry = np.concatenate([geometry, np.stack([wobble, contrast, shade, 0.5 / long])]).T
    looks = (geometry.tolist(), colour, gloss, shape.tolist(), surface.tolist())
    return list(zip(boxes, *looks, strict=True))


def _paint(
    canvas: np.ndarray, leaf: tuple, textures: np.ndarray, light: tuple[float, float], ground: bool
) -> None:
    """Paint one leaf within its box over what is there, float32 (3, size, size); in place."""
    box, geometry, colour, gloss, shape, surface = leaf
    px, py, cos_a, sin_a, cos_b, sin_b, b, soft, wave, grain, slope, cast = geometry
    axis = np.arange(canvas.shape[-1], dtype=np.float32) + 0.5
    dx, dy = axis[box[1]] - px, (axis[box[0]] - py)[:, None]
    lit = dx * light[0] + dy * light[1]
    relief = textures[surface][box] * grain
    relief += lit * slope
    under = canvas[:, box[0], box[1]]
    layer = gloss * relief
    layer += colour
    if ground:
        under[:] = layer
        return
    p, q = dx * cos_a + dy * sin_a, dy * cos_b - dx * sin_b
    if shape < 2:  # a disc
        rim = np.sqrt(p * p + q * q)
    elif shape == 2:  # a rounded box
        p, q = p * p, q * q
        rim = 1.19 * np.sqrt(np.sqrt(p * p + q * q))
    elif shape == 3:  # a triangle
        rim = np.maximum(1.73 * np.abs(p) - q, 2 * q)
    else:  # a box
        rim = 1.41 * np.maximum(np.abs(p), np.abs(q))
    inside = b * (1 - rim)  # about the distance to the edge, in pixels
    if wave:
        inside += wave * textures[0][box]
    if soft > 3:  # small ones lie close to what is below
        dark = np.clip(1 + inside / soft + cast * lit, 0, 1)
        under *= 1 - 0.25 * dark * dark
    layer -= under
    layer *= np.clip(inside + 0.5, 0, 1)  # an edge one pixel wide: no aliasing
    under += layer


def _generate(rng: np.random.Generator, size: int) -> np.ndarray:
    """One generated image, uint8 (3, size, size).

    The dead leaves model of natural images (Lee, Mumford, Huang 2001): opaque shapes with radii of
    density r^-3, each over the ones before. Here they have surfaces, shading, shadows and colours
    that go together.
    """
    textures = _textures(size)
    leaves = _draw(rng, size, textures)
    angle = rng.uniform(0, 2 * math.pi)
    light = math.cos(angle), math.sin(angle)
    # In some images, what is behind is out of focus.
    focus = int(rng.integers(1, len(leaves) // 2)) if rng.random() < 0.3 else -1
    defocus = int(rng.integers(1, max(3, size // 40 + 1)))
    canvas = np.empty((3, size, size), np.float32)
    for i, (down, right) in enumerate(rng.integers(0, size, (len(leaves), 2)).tolist()):
        _paint(canvas, leaves[i], textures[:, down:, right:], light, ground=i == 0)
        if i == focus:
            canvas = _box_blur(canvas, defocus)

    # Light over the whole image, then the camera: optics and grain.
    fall_x, fall_y = (0.3 * rng.random() * direction / size for direction in light)
    offset = np.arange(size, dtype=np.float32) + 0.5 - size / 2
    sun = 1 + fall_x * offset + fall_y * offset[:, None]
    sun += 0.1 * rng.random() * textures[0, :size, -size:]
    canvas *= sun * math.exp(0.15 * rng.standard_normal() - 0.08)
    side = rng.uniform(0.02, 0.09)
    padded = np.pad(canvas, ((0, 0), (1, 1), (1, 1)), mode="edge")
    padded = (1 - 2 * side) * padded[:, 1:-1] + side * (padded[:, :-2] + padded[:, 2:])
    canvas = (1 - 2 * side) * padded[..., 1:-1] + side * (padded[..., :-2] + padded[..., 2:])
    canvas += 0.01 * rng.standard_normal((size, size), dtype=np.float32)
    return np.clip(255 * canvas + 0.5, 0, 255).astype(np.uint8)


class SyntheticDataset(ImageDataset):
    """Endless generated images with the statistics of photographs, to train and test without data.

    Item i, for any i >= 0, is uint8 (3, img_size, img_size) and a pure function of (img_size,
    seed, stream, i): the same in every process and order. Streams share no image. `length` is what
    `len` says and where iteration ends: the nominal epoch.
    """

    endless = True

    def __init__(self, img_size: int, seed: int, length: int, stream: int = 0) -> None:
        if img_size < 8:
            raise ValueError(f"img_size is {img_size}: generated images have at least 8 pixels")
        if min(seed, stream, length) < 0:
            raise ValueError(f"seed {seed}, stream {stream}, length {length}: none may be negative")
        self.img_size, self.seed, self.length, self.stream = img_size, seed, length, stream

    def fingerprint(self) -> dict[str, str]:
        """The seed and the stream, of which every image is a function."""
        return {"names": f"generated, seed {self.seed}, stream {self.stream}"}

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(self.length))

    def __getitem__(self, index: int) -> torch.Tensor:
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"index {index}: generated images are counted from 0, without an end")
        key = np.random.SeedSequence(self.seed, spawn_key=(self.stream, index))
        return torch.from_numpy(_generate(np.random.default_rng(key), self.img_size))
