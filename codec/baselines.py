"""JPEG, WebP and AVIF by Pillow: what `scripts/rate_distortion.py` compares `.rfsq` files with.

What the bytes of a file are without its header:

    JPEG    the scans; not their headers, the tables, SOI and EOI. The Huffman tables are those of
            the image, and cost nothing where headers are left out
    WebP    data of the VP8 or VP8L chunk; not RIFF and chunk headers, padding, other chunks
    AVIF    data of the mdat box; not any other box

The settings are those with the best quality per byte: Huffman tables of the image, WebP's slowest
method, AVIF at speed 2 (0.6 to 1.0 dB above 6, the default; 0 takes three times as long for 0.1 dB
more), full chroma resolution where there is a choice, one channel for grey images where a format
has it; and, as they are better at some rates, progressive JPEG, JPEG 4:2:0, and AVIF tuned for PSNR
(by default it is tuned for perceptual quality).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFile

import exits
from codec.pixels import is_grey

SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7]")
QUALITIES = (0, 2, 4, 6, 8, 12, 16, 20, 26, 32, 40, 48, 56, 64, 72, 78, 84, 88, 92, 95, 98, 100)


def jpeg_header(data: bytes) -> int:
    """Bytes of a JPEG that are not the data of its scans."""
    place, scans = 2, 0
    while place < len(data) - 2:  # at the end is EOI
        marker, length = struct.unpack_from(">xBH", data, place)
        place += 2 + length
        if marker == 0xDA:  # a scan: its data end at the next marker but restarts
            after = SCAN_END.search(data, place)
            end = after.start() if after else len(data)
            place, scans = end, scans + end - place
    return len(data) - scans


def webp_header(data: bytes) -> int:
    """Bytes of a WebP that are not the data of its image chunk."""
    place, image = 12, 0
    while place < len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        image += length if name in (b"VP8 ", b"VP8L") else 0
        place += 8 + length + length % 2
    return len(data) - image


def avif_header(data: bytes) -> int:
    """Bytes of an AVIF that are not the data of mdat boxes."""
    place, image = 0, 0
    while place < len(data):
        (length, name), head = struct.unpack_from(">I4s", data, place), 8
        if length == 1:  # 64 bits follow
            (length,), head = struct.unpack_from(">Q", data, place + 8), 16
        length = length or len(data) - place  # 0: to the end of the file
        image += length - head if name == b"mdat" else 0
        place += length
    return len(data) - image


@dataclass(frozen=True)
class Baseline:
    """A codec of Pillow over the grid of qualities.

    `options` are those of `Image.save`, and `grey` the ones that differ for grey images; None: the
    format has three channels.
    """

    name: str
    format: str
    header: Callable[[bytes], int]
    options: dict
    grey: dict | None = field(default_factory=dict)

    def __call__(self, image: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(bytes without header, bytes of the file, decoded image) at each quality."""
        options = self.options
        if self.grey is not None and is_grey(image):
            image, options = image[..., 0], options | self.grey
        # From an array: the ICC profile and EXIF of the original are not written again.
        picture = Image.fromarray(np.ascontiguousarray(image))
        # Pillow's buffer for an optimised JPEG is too small for noise at high qualities.
        ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 2 * image.size)
        for quality in QUALITIES:
            file = io.BytesIO()
            picture.save(file, self.format, quality=quality, **options)
            data = file.getvalue()
            with Image.open(file) as decoded:
                yield len(data) - self.header(data), len(data), np.asarray(decoded.convert("RGB"))

    def problem(self) -> str | None:
        """Why this build of Pillow cannot encode it, or None."""
        try:
            next(self(np.zeros((16, 16, 3), np.uint8)))
        except Exception as error:  # no such format, no encoder, an unknown option
            return f"unavailable in this Pillow ({type(error).__name__}: {exits.one_line(error)})"
        return None


_JPEG = {"subsampling": "4:4:4", "optimize": True}
_AVIF = {"subsampling": "4:4:4", "speed": 2, "codec": "aom"}
_GREY = {"subsampling": "4:0:0"}
_PSNR = {**_AVIF, "advanced": {"tune": "psnr"}}
BASELINES = (
    Baseline("JPEG 4:4:4", "JPEG", jpeg_header, _JPEG),
    Baseline("JPEG 4:4:4, progressive", "JPEG", jpeg_header, {**_JPEG, "progressive": True}),
    Baseline("JPEG 4:2:0", "JPEG", jpeg_header, {**_JPEG, "subsampling": "4:2:0"}),
    Baseline("WebP", "WEBP", webp_header, {"method": 6}, grey=None),
    Baseline("AVIF 4:4:4", "AVIF", avif_header, _AVIF, _GREY),
    Baseline("AVIF 4:4:4, tune=psnr", "AVIF", avif_header, _PSNR, _GREY),
)
