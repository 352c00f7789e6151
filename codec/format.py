"""The files of one model: indices and image statistics to bytes and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codec import bitstream
from codec.entropy import EntropyModel

Tokens = tuple[np.ndarray, np.ndarray | None, tuple[int, int]]


@dataclass
class Format:
    """The file format of a model: from indices to the bytes of a file and back.

    Args:
        sizes: the numbers of codes, by stage.
        side_values: half floats of image statistics per stage; 0 without them.
        multiple: the image is padded to multiples of this (height, width), in pixels.
        f: pixels per position, on each side.
        fingerprint: 8 bytes that tell the model from others.
        entropy_model: of entropy-coded files, or None.
    """

    sizes: Sequence[int]
    side_values: int
    multiple: tuple[int, int]
    f: int
    fingerprint: bytes
    entropy_model: EntropyModel | None = None

    @property
    def stages(self) -> int:
        """The most stages that a file can hold."""
        return min(len(self.sizes), 255)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent positions (h, w) of an image."""
        down, across = self.multiple
        return up_to(height, down) // self.f, up_to(width, across) // self.f

    def write(
        self,
        indices: np.ndarray,
        statistics: np.ndarray | None,
        size: tuple[int, ...],
        stages: int | None = None,
        entropy_coding: bool = False,
        grey: bool = False,
    ) -> bytes:
        """Indices (h, w, stages), statistics (stages, 2, C) or None -> the bytes of a file.

        Args:
            size: (height, width) of the image.
            stages: how many to write; default: all.
            grey: whether the file decodes to a grey image, see `codec/pixels.py`.

        Raises ValueError: the indices or the number of stages is invalid, or no entropy model.
        """
        k = _stages(stages, self.stages, "the model has")
        side = b"" if statistics is None else statistics[:k].astype("<f2").tobytes()
        if entropy_coding:
            if self.entropy_model is None:
                raise ValueError(
                    "the checkpoint has no entropy model: run `compress.py fit` on training images"
                )
            payload = self.entropy_model.encode(indices[..., :k])
            flags, length = bitstream.CODED, len(payload)
        else:
            payload = bitstream.pack(indices[..., :k].reshape(-1, k), self.sizes[:k])
            flags, length = 0, None
        flags |= bitstream.GREY if grey else 0
        header = bitstream.Header(k, self._mark(entropy_coding), size[1], size[0], length, flags)
        return bitstream.write(header, side, payload)

    def read(self, data: bytes, stages: int | None = None) -> Tokens:
        """The bytes of a file -> indices (h, w, k), statistics (k, 2, C) or None, (height, width).

        Nothing is allocated before the length of the data is known to agree with the header.

        Raises ValueError: the file is damaged, or of another version or another model.
        """
        header = self.check(data)
        kept, k = header.stages, _stages(stages, header.stages, "the file holds")
        end = header.size + 2 * kept * self.side_values
        statistics = None
        if self.side_values:
            statistics = np.frombuffer(data[header.size : end], "<f2").reshape(kept, 2, -1)[:k]
            if not (np.isfinite(statistics).all() and (statistics[:, 1] > 0).all()):
                raise ValueError(
                    "the file is damaged: its image statistics are not positive, finite numbers"
                )
        payload, shape = data[end:-4], self.grid(header.height, header.width)
        try:
            if self.entropy_model and header.coded:
                indices = self.entropy_model.decode(payload, shape, kept)
            else:
                indices = bitstream.unpack(payload, math.prod(shape), self.sizes[:kept])
        except ValueError as error:
            raise ValueError(f"the file is damaged: {error}") from error
        return indices.reshape(*shape, kept)[..., :k], statistics, (header.height, header.width)

    def check(self, data: bytes) -> bitstream.Header:
        """The header of a file of this model; ValueError if it, the length or the CRC is wrong."""
        header = bitstream.read_header(data)
        known, wanted = header.fingerprint == self._mark(header.coded), self.length(header)
        if not bitstream.intact(data):
            if known and len(data) < wanted:
                raise ValueError(
                    f"the file is truncated or damaged: {len(data)} of the {wanted} bytes that its "
                    "header says"
                )
            raise ValueError("the file is damaged: its checksum is wrong")
        if header.flags & ~(bitstream.CODED | bitstream.GREY):
            raise ValueError(
                f"the file has the unknown flags {header.flags:#04x}: a newer version wrote it"
            )
        if header.coded and self.entropy_model is None:
            raise ValueError(
                "the file is entropy-coded, and the checkpoint has no entropy model: give the one "
                "that encoded it (from `compress.py fit`)"
            )
        if not known:
            model = "model or entropy model" if header.coded else "model"
            raise ValueError(
                f"the file was written with another {model}, or by a version of the project with "
                "other flags: give the checkpoint and the version that encoded it"
            )
        if not 1 <= header.stages <= self.stages:
            raise ValueError(f"the file claims {header.stages} stages: the model has {self.stages}")
        if len(data) != wanted:
            raise ValueError(f"the file has {len(data)} bytes, but its header says {wanted}")
        if self.entropy_model and header.payload is not None:
            positions = math.prod(self.grid(header.height, header.width))
            self.entropy_model.check_length(header.payload, positions, header.stages)
        return header

    def length(self, header: bitstream.Header) -> int:
        """Bytes of the file that a header begins."""
        payload = header.payload
        if payload is None:
            positions = math.prod(self.grid(header.height, header.width))
            payload = bitstream.payload_bytes(positions, self.sizes[: header.stages])
        return header.size + 2 * header.stages * self.side_values + payload + 4

    def check_claim(self, head: bytes, size: int) -> None:
        """Raises ValueError if a file that begins with `head` cannot have `size` bytes."""
        header = bitstream.read_header(head)
        known = header.fingerprint == self._mark(header.coded)
        limit = self.length(header) if known else bitstream.MAX_PIXELS
        if size > limit:
            raise ValueError(
                f"the file is damaged: it has {size} bytes, more than the {limit} it can have"
            )

    def _mark(self, coded: bool) -> bytes:
        """The fingerprint in a header; an entropy-coded file depends on the entropy model too."""
        if not coded:
            return self.fingerprint
        model = self.entropy_model
        return hashlib.sha256(self.fingerprint + model.digest).digest()[:8] if model else b""


def up_to(size: int, multiple: int) -> int:
    """The least multiple that is not less than `size`."""
    return -(-size // multiple) * multiple


def _stages(stages: int | None, most: int, who: str) -> int:
    if stages is not None and not 1 <= stages <= most:
        raise ValueError(f"{stages} stages were asked for, but {who} {most}: give 1 to {most}")
    return most if stages is None else stages
