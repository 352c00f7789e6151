"""The bits of a `.rfsq` file: its layout and its fixed-rate packing. Needs no torch.

Layout, version 1. Integers and half floats are little-endian; bits are packed from the high end.

    bytes   field
    0-3     magic, "RFSQ"
    4       version, 1
    5       flags: bit 0, the payload is entropy-coded; bit 1, the image is grey; the others are 0
    6       k, stages kept: 1 to 255
    7-14    fingerprint of the model (model.py); of its entropy model too, with flag bit 0
    15-18   width in pixels, at least 1
    19-22   height in pixels, at least 1; width x height at most 178,956,970
    23-26   only with flag bit 0: length of the payload in bytes
    then    only for models with image statistics: k x 2 x C half floats, for each stage the means,
            then the standard deviations, of the C latent channels
    then    payload
    last 4  CRC-32 (zlib's) of all bytes before

A file is thus 27 bytes (31 if entropy-coded) longer than its statistics and payload. An image has
P = ceil(height/f) x g ceil(width/(g f)) positions, in row-major order, for the model's downsampling
factor f; g is 2 for a model with pairs of positions, else 1.

Fixed-rate payload: all positions of stage 1, then of stage 2, to k. A stage of N codes takes

    - N a power of two: log2 N bits a position, the index with its highest bit first;
    - any other N: blocks of B = max(1, floor(32768 / log2 N)) positions, the last one shorter. A
      block of indices i_0 .. i_(n-1) is the integer sum of i_j N^j, written in ceil(n log2 N) bits:
      less than one bit per block is lost: of full blocks below 0.004 % for N up to 65,536.

Stages and blocks follow each other without alignment; zero bits fill the last byte of the payload.
With powers of two this is exactly ceil(bits x P / 8) bytes.

A grey image is one with equal channels. Its file decodes as any other does, to uint8; then each
pixel's channels all become their mean, (R + G + B + 1) // 3, the nearest integer.

Entropy-coded payload: one ANS stream of the `constriction` package, specified in `entropy.py`.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

MAGIC, VERSION = b"RFSQ", 1
CODED, GREY = 1, 2  # flags
MAX_PIXELS = 178_956_970  # of an image; image files of more than half of that are not read
_HEAD = struct.Struct("<4sBBB8sII")
HEAD_BYTES = _HEAD.size + 4  # of the longer of the two headers
BLOCK_BITS, CHUNK = 32768, 65536


@dataclass(frozen=True)
class Header:
    """The fields before the statistics."""

    stages: int
    fingerprint: bytes
    width: int  # in pixels
    height: int
    payload: int | None = None  # bytes, None at fixed rate
    flags: int = 0

    @property
    def coded(self) -> bool:
        """Whether the payload is entropy-coded."""
        return bool(self.flags & CODED)

    @property
    def grey(self) -> bool:
        """Whether the three channels of the image are equal."""
        return bool(self.flags & GREY)

    @property
    def size(self) -> int:
        """Bytes of the header in the file."""
        return _HEAD.size + (4 if self.coded else 0)


def check_size(width: int, height: int) -> None:
    """Raises ValueError for an image without pixels, or with more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")


def write(header: Header, side: bytes, payload: bytes) -> bytes:
    """The bytes of a file: header, statistics, payload, checksum."""
    h = header
    head = _HEAD.pack(MAGIC, VERSION, h.flags, h.stages, h.fingerprint, h.width, h.height)
    if h.coded:
        head += struct.pack("<I", h.payload)
    body = head + side + payload
    return body + struct.pack("<I", zlib.crc32(body))


def read_header(data: bytes) -> Header:
    """The header of a file, from its first 27 bytes or more; the checksum is not verified.

    Raises ValueError: another format or version, no valid size, or the end within the header.
    """
    if not data:
        raise ValueError("the file is empty (zero bytes)")
    if data[:4] != MAGIC[: len(data)]:
        raise ValueError(
            f"the file is not an {MAGIC.decode()} file: it starts with {bytes(data[:4])!r}"
        )
    if len(data) > 4 and data[4] != VERSION:
        kind = "a newer" if data[4] > VERSION else "an unknown"
        raise ValueError(
            f"the file has {kind} version, {data[4]}: this program reads version {VERSION}"
        )
    if len(data) < HEAD_BYTES:
        raise ValueError(
            f"the file is truncated: it ends within the header, after {len(data)} bytes"
        )
    _, _, flags, stages, fingerprint, width, height = _HEAD.unpack_from(data)
    try:
        check_size(width, height)
    except ValueError as error:
        raise ValueError(f"the file has an invalid size in its header: {error}") from error
    payload = struct.unpack_from("<I", data, _HEAD.size)[0] if flags & CODED else None
    return Header(stages, fingerprint, width, height, payload, flags)


def intact(data: bytes) -> bool:
    """Whether the checksum at the end of a file is right."""
    return len(data) > 4 and zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0]


def payload_bytes(positions: int, sizes: Sequence[int]) -> int:
    """Bytes of a fixed-rate payload, from the numbers of codes of its stages."""
    return -(-sum(bits for *_, bits in _blocks(positions, sizes)) // 8)


def _power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


@functools.lru_cache
def _bits(size: int, count: int) -> int:
    """Bits of a block of `count` indices: ceil(count log2 size), exactly."""
    return (size**count - 1).bit_length()


def _blocks(positions: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, slice, int]]:
    """(stage, number of its codes, positions, bits) of each block, in the order of the payload."""
    for stage, size in enumerate(sizes):
        step = CHUNK if _power_of_two(size) else max(1, int(BLOCK_BITS / math.log2(size)))
        for start in range(0, positions, step):
            end = min(start + step, positions)
            yield stage, size, slice(start, end), _bits(size, end - start)


def pack(indices: np.ndarray, sizes: Sequence[int]) -> bytes:
    """Indices (positions, stages) -> the fixed-rate payload; ValueError if one is out of range."""
    bits = []
    for stage, size, part, _ in _blocks(len(indices), sizes):
        block = indices[part, stage]
        if not 0 <= int(block.min()) <= int(block.max()) < size:
            raise ValueError(
                f"indices of stage {stage + 1} must be from 0 to {size - 1}, but run from "
                f"{block.min()} to {block.max()}"
            )
        bits.append(_to_bits(block, size))
    return np.packbits(np.concatenate(bits)).tobytes()


def unpack(payload: bytes, positions: int, sizes: Sequence[int]) -> np.ndarray:
    """The inverse of `pack`: indices (positions, stages), int64.

    Raises ValueError: the length is wrong, a value is out of range, or a padding bit is set.
    """
    wanted = payload_bytes(positions, sizes)
    if len(payload) != wanted:
        raise ValueError(f"the payload has {len(payload)} bytes, not {wanted}")
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    indices = np.empty((positions, len(sizes)), np.int64)
    for stage, size, part, count in _blocks(positions, sizes):
        indices[part, stage] = _from_bits(bits[:count], part.stop - part.start, size)
        bits = bits[count:]
    if bits.any():
        raise ValueError("a padding bit after the last index is set")
    return indices


def _to_bits(column: np.ndarray, size: int) -> np.ndarray:
    """The bits, 0 and 1, of a block of indices (count,) of one stage."""
    if _power_of_two(size):
        width = size.bit_length() - 1
        octets = column.astype(">u8").view(np.uint8).reshape(-1, 8)
        return np.unpackbits(octets, axis=1)[:, 64 - width :].reshape(-1)
    # Pairs of digits, pairs of pairs, ...: one by one, the time would be quadratic in their number.
    digits, base = column.tolist(), size
    while len(digits) > 1:
        pairs = zip_longest(digits[::2], digits[1::2], fillvalue=0)
        digits, base = [low + high * base for low, high in pairs], base * base
    length = _bits(size, len(column))
    octets = digits[0].to_bytes(-(-length // 8), "big")
    return np.unpackbits(np.frombuffer(octets, np.uint8))[-length % 8 :]


def _from_bits(bits: np.ndarray, count: int, size: int) -> np.ndarray:
    """The inverse of `_to_bits`: `count` indices."""
    if _power_of_two(size):
        padded = np.zeros((count, 64), np.uint8)
        padded[:, 64 - size.bit_length() + 1 :] = bits.reshape(count, -1)
        return np.packbits(padded, axis=1).view(">u8")[:, 0].astype(np.int64)
    number = int.from_bytes(np.packbits(np.pad(bits, (-len(bits) % 8, 0))).tobytes(), "big")
    if number >= size**count:
        raise ValueError(f"a block of indices is out of range for {size} codes")
    digits = [number]
    for level in reversed(range((count - 1).bit_length())):
        base = size**2**level
        digits = [part for number in digits for part in reversed(divmod(number, base))]
    return np.array(digits[:count], np.int64)
