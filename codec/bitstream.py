"""The bits of a `.rfsq` file: its layout and its fixed-rate packing. Needs no torch.

Layout, version 1. Integers and half floats are little-endian; bits are packed from the high end.

    bytes   field
    0-3     magic, "RFSQ"
    4       version, 1
    5       flags: bit 0, the payload is entropy-coded; the others are 0
    6       k, stages kept: 1 to 255
    7-14    fingerprint of the model (codec/codec.py); of its entropy model too, with flag bit 0
    15-18   width in pixels, at least 1
    19-22   height in pixels, at least 1; width x height at most 178,956,970
    23-26   only with flag bit 0: length of the payload in bytes
    then    only for models with image statistics: k x 2 x C half floats, for each stage the means,
            then the standard deviations, of the C latent channels
    then    payload
    last 4  CRC-32 (zlib's) of all bytes before

so that a file is 27 bytes (31 entropy-coded) longer than statistics and payload. The image has
P = ceil(height/f) x ceil(width/f) positions, row by row, for the model's downsampling factor f.

Fixed-rate payload: all positions of stage 1, then of stage 2, to k. A stage of N codes takes

    - N a power of two: log2 N bits a position, the index with its highest bit first;
    - any other N: blocks of B = max(1, floor(32768 / log2 N)) positions, the last one shorter. A
      block of indices i_0 .. i_(n-1) is the integer sum of i_j N^j, written in ceil(n log2 N) bits:
      less than one bit a block is lost, below 0.004 % for N up to 65,536.

Stages and blocks follow each other without alignment; zero bits fill the last byte, once a file.
With powers of two this is exactly ceil(bits x P / 8) bytes.

Entropy-coded payload: one ANS stream of the `constriction` package, as `entropy.py` has it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAGIC, VERSION, CODED = b"RFSQ", 1, 1
MAX_PIXELS = 178_956_970  # the largest image that Pillow opens without a warning
_HEAD = struct.Struct("<4sBBB8sII")
HEAD_BYTES = _HEAD.size + 4  # of the longer of the two headers
BLOCK_BITS, CHUNK = 32768, 65536


# ---------------------------------------------------------------------------------------
# Header and checksum
# ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Header:
    """What stands before the statistics; `payload` is its length in bytes, None at fixed rate."""

    stages: int
    fingerprint: bytes
    width: int
    height: int
    payload: int | None = None
    flags: int = 0

    @property
    def size(self) -> int:
        """Bytes of the header in the file."""
        return _HEAD.size + (4 if self.flags & CODED else 0)


def check_size(width: int, height: int) -> None:
    """ValueError for an image that is empty, or larger than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise ValueError(f"{width}x{height} pixels are no image")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")


def write(header: Header, side: bytes, payload: bytes) -> bytes:
    """A whole file. The header's `payload` and `flags` say whether the payload is entropy-coded."""
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        header.flags,
        header.stages,
        header.fingerprint,
        header.width,
        header.height,
    )
    if header.flags & CODED:
        head += struct.pack("<I", header.payload)
    body = head + side + payload
    return body + struct.pack("<I", zlib.crc32(body))


def read_header(data: bytes) -> Header:
    """The header of a file, from its first 27 bytes or more; the checksum is not looked at.

    Raises:
        ValueError: no such file, a newer version, or cut off within the header.
    """
    if not data:
        raise ValueError("is empty (zero bytes)")
    if data[:4] != MAGIC[: len(data)]:
        raise ValueError(f"is no {MAGIC.decode()} file: it starts with {bytes(data[:4])!r}")
    if len(data) > 4 and data[4] != VERSION:
        newer = data[4] > VERSION
        what = "is of a newer version" if newer else "is of an unknown version"
        raise ValueError(f"{what}, {data[4]}: this program reads version {VERSION}")
    if len(data) < _HEAD.size + 4:
        raise ValueError(f"is truncated: it ends within the header, after {len(data)} bytes")
    _, _, flags, stages, fingerprint, width, height = _HEAD.unpack(data[: _HEAD.size])
    payload = struct.unpack_from("<I", data, _HEAD.size)[0] if flags & CODED else None
    return Header(stages, fingerprint, width, height, payload, flags)


def intact(data: bytes) -> bool:
    """Whether the checksum at the end of a file is right."""
    return len(data) > 4 and zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0]


# ---------------------------------------------------------------------------------------
# Fixed rate
# ---------------------------------------------------------------------------------------
def payload_bytes(positions: int, sizes: Sequence[int]) -> int:
    """Bytes of a fixed-rate payload, from the numbers of codes of the stages that are kept."""
    return -(-sum(_stage_bits(positions, size) for size in sizes) // 8)


def _stage_bits(positions: int, size: int) -> int:
    if _power_of_two(size):
        return positions * (size.bit_length() - 1)
    block = _block(size)
    whole, rest = divmod(positions, block)
    return whole * _integer_bits(size, block) + _integer_bits(size, rest)


def _power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


def _block(size: int) -> int:
    """Positions whose indices make one integer."""
    return max(1, int(BLOCK_BITS / math.log2(size)))


def _integer_bits(size: int, count: int) -> int:
    """Bits of `count` indices as one integer: ceil(count log2 size), exactly."""
    return (size**count - 1).bit_length()


def pack(indices: np.ndarray, sizes: Sequence[int]) -> bytes:
    """Indices (positions, stages) -> the fixed-rate payload.

    Raises:
        ValueError: for an index out of range.
    """
    out, rest = bytearray(), np.empty(0, np.uint8)
    for column, size in zip(indices.T, sizes, strict=True):
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
            raise ValueError(f"indices must be from 0 to {size - 1}")
        step = CHUNK if _power_of_two(size) else _block(size)
        for start in range(0, len(column), step):
            bits = _to_bits(column[start : start + step], size)
            bits = np.concatenate([rest, bits])
            whole = len(bits) // 8 * 8
            out += np.packbits(bits[:whole]).tobytes()
            rest = bits[whole:]
    return bytes(out + np.packbits(rest).tobytes())


def unpack(payload: bytes, positions: int, sizes: Sequence[int]) -> np.ndarray:
    """The inverse of `pack`: indices (positions, stages), int64.

    Raises:
        ValueError: if the length is wrong, a value out of range, or a padding bit set.
    """
    wanted = payload_bytes(positions, sizes)
    if len(payload) != wanted:
        raise ValueError(f"the payload has {len(payload)} bytes, not {wanted}")
    data = np.frombuffer(payload, np.uint8)
    indices = np.empty((positions, len(sizes)), np.int64)
    place = 0
    for stage, size in enumerate(sizes):
        step = CHUNK if _power_of_two(size) else _block(size)
        for start in range(0, positions, step):
            count = min(step, positions - start)
            length = _stage_bits(count, size)
            bits = np.unpackbits(data[place // 8 : -(-(place + length) // 8)])
            bits = bits[place % 8 : place % 8 + length]
            indices[start : start + count, stage] = _from_bits(bits, count, size)
            place += length
    if place % 8 and data[-1] & (0xFF >> place % 8):
        raise ValueError("a padding bit after the last index is set")
    return indices


def _to_bits(column: np.ndarray, size: int) -> np.ndarray:
    """The bits, 0 and 1, of a chunk or block of one stage."""
    if _power_of_two(size):
        width = size.bit_length() - 1
        octets = column.astype(">u8").view(np.uint8).reshape(len(column), 8)
        skip = 8 - -(-width // 8)  # octets that are zero
        bits = np.unpackbits(np.ascontiguousarray(octets[:, skip:]), axis=1)
        return bits[:, bits.shape[1] - width :].reshape(-1)
    # Groups that fit 62 bits at once in numpy, then neighbours pairwise: (a, b) -> a + b base.
    group = max(1, int(62 / math.log2(size)))
    padded = np.zeros(-(-len(column) // group) * group, np.int64)
    padded[: len(column)] = column
    digits = padded.reshape(-1, group)
    values = digits[:, -1].copy()
    for digit in digits[:, -2::-1].T:
        values = values * size + digit
    numbers, base = values.tolist(), size**group
    while len(numbers) > 1:
        odd = numbers[-1:] if len(numbers) % 2 else []
        pairs = zip(numbers[::2], numbers[1::2], strict=False)
        numbers = [a + b * base for a, b in pairs] + odd
        base *= base
    length = _integer_bits(size, len(column))
    octets = numbers[0].to_bytes(-(-length // 8), "big")
    return np.unpackbits(np.frombuffer(octets, np.uint8))[-length % 8 :]


def _from_bits(bits: np.ndarray, count: int, size: int) -> np.ndarray:
    """The inverse of `_to_bits`: `count` indices."""
    if _power_of_two(size):
        width = size.bit_length() - 1
        octets = -(-width // 8)
        padded = np.zeros((count, 8 * octets), np.uint8)
        padded[:, 8 * octets - width :] = bits.reshape(count, width)
        whole = np.zeros((count, 8), np.uint8)
        whole[:, 8 - octets :] = np.packbits(padded, axis=1)
        return whole.view(">u8")[:, 0].astype(np.int64)
    lead = np.zeros(-len(bits) % 8, np.uint8)
    number = int.from_bytes(np.packbits(np.concatenate([lead, bits])).tobytes(), "big")
    if number >= size**count:
        raise ValueError(f"a block of indices is out of range for {size} codes")
    group = max(1, int(62 / math.log2(size)))
    groups = -(-count // group)
    bases = [size**group]
    while 2 ** len(bases) < groups:
        bases.append(bases[-1] ** 2)
    # The tree that `_to_bits` climbed, downwards: (how many groups it holds, number).
    nodes = [(groups, number)]
    for level in range(len(bases) - 1, -1, -1):
        below = []
        for held, value in nodes:
            if held > 2**level:
                high, low = divmod(value, bases[level])
                below += [(2**level, low), (held - 2**level, high)]
            else:
                below.append((held, value))
        nodes = below
    values = np.array([value for _, value in nodes], np.int64)
    digits = np.empty((groups, group), np.int64)
    for j in range(group):
        values, digits[:, j] = np.divmod(values, size)
    return digits.reshape(-1)[:count]
