"""Images to the bytes of a `.rfsq` file and back, with the model of a checkpoint.

    image (H,W,3) --tiles--> latent --quantizer--> indices (h,w,k) --bitstream.py--> bytes
                                                     |
    image (H,W,3) <--tiles-- codes <--quantizer------+

The image is padded by reflection, on the right and at the bottom, to multiples of the model's f. An
image of at most one tile goes through the network in one piece: it decodes to
`model.decode(model.encode(image))`, bit for bit. A larger one goes through in tiles that overlap by
more than the network's reach, so that memory is bounded and no seam is visible.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import numpy as np
import torch

import util
from checkpoint import ENTROPY_MODEL
from codec import bitstream, entropy
from codec.pixels import is_grey, to_grey
from codec.tiles import in_pixels, reach, tiles
from model import fingerprint, load_model
from quantizers import Quantized


class Codec:
    """A checkpoint as a codec.

    Args:
        checkpoint: `last.pt`, `best.pt`, or the output of `compress.py fit`.
        device: where the network runs, in float32 (no TF32).
        tile: side, in pixels, of what the network gets at once; rounded up to whole positions.

    `stages` is how many a file can hold, `bits` the rate per position without image statistics,
    `fingerprint` 8 bytes of the architecture and all that decoding depends on, `entropy_model` that
    of the checkpoint or None, `seconds` the time spent in the network and in packing.

    Raises ValueError: the file is not a checkpoint, or its entropy model does not fit.
    """

    def __init__(
        self, checkpoint: str | Path, device: str | torch.device = "cpu", tile: int = 1024
    ):
        self.model, self.args, self.checkpoint = load_model(checkpoint)
        self.device = torch.device(device)
        self.model.to(self.device)
        quantizer = self.model.quantizer
        self.sizes, self.bits = quantizer.codebook_sizes, quantizer.bits
        self.stages = min(quantizer.stages, 255)
        # Per stage; each is stored as a half float.
        self.side_values = round(quantizer.side_bits / 16 / quantizer.stages)
        # In positions, of which the quantizer may take some together.
        self.tile = _up_to(max(1, tile), self.model.f * quantizer.group) // self.model.f
        self.fingerprint = fingerprint(self.model, self.checkpoint["args"])
        self.entropy_model: entropy.EntropyModel | None = None
        if ENTROPY_MODEL in self.checkpoint:
            self.entropy_model = self._read_entropy_model(self.checkpoint[ENTROPY_MODEL])
        self.seconds = {"network": 0.0, "packing": 0.0}

    def encode(
        self, image: np.ndarray, stages: int | None = None, entropy_coding: bool = False
    ) -> bytes:
        """uint8 (H, W, 3) -> the bytes of a file, of the first `stages` stages (default: all).

        Raises ValueError: the image or the number of stages is invalid, or no entropy model.
        """
        tokens, grey = self.encode_indices(image), is_grey(image)
        return self.write(*tokens, image.shape[:2], stages, entropy_coding, grey)

    def decode(self, data: bytes, stages: int | None = None) -> np.ndarray:
        """The bytes of a file -> uint8 (H, W, 3), from the first `stages` stages (default: all).

        The channels of a file with the grey flag are equal.

        Raises ValueError: the file is damaged, or of another version or another model.
        """
        data = bytes(data)  # of any buffer, such as an array of bytes
        image = self.decode_indices(*self.read(data, stages))
        return to_grey(image) if bitstream.read_header(data).grey else image

    def write(
        self,
        indices: np.ndarray,
        statistics: np.ndarray | None,
        size: tuple[int, ...],
        stages: int | None = None,
        entropy_coding: bool = False,
        grey: bool = False,
    ) -> bytes:
        """The result of `encode_indices` and the image's (height, width) -> the bytes of a file.

        With `grey`, see `is_grey`, it decodes to a grey image.
        """
        start = time.perf_counter()
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
        data = bitstream.write(header, side, payload)
        self.seconds["packing"] += time.perf_counter() - start
        return data

    def read(
        self, data: bytes, stages: int | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
        """The bytes of a file -> indices (h, w, k), statistics (k, 2, C) or None, (height, width).

        Nothing is allocated before the length of the data is known to agree with the header.
        """
        start = time.perf_counter()
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
        self.seconds["packing"] += time.perf_counter() - start
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
                f"the file was written with another {model}: give the checkpoint that encoded it"
            )
        if not 1 <= header.stages <= self.stages:
            raise ValueError(f"the file claims {header.stages} stages: the model has {self.stages}")
        if len(data) != wanted:
            raise ValueError(f"the file has {len(data)} bytes, but its header says {wanted}")
        if self.entropy_model and header.payload is not None:
            positions = math.prod(self.grid(header.height, header.width))
            self.entropy_model.check_length(header.payload, positions, header.stages)
        return header

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent positions (h, w) of an image."""
        f, group = self.model.f, self.model.quantizer.group
        return _up_to(height, f) // f, _up_to(width, f * group) // f

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

    def counts(self) -> entropy.Counts:
        """Empty counts for this model's indices."""
        return entropy.Counts(self.sizes, self.model.quantizer.levels)

    def _read_entropy_model(self, state) -> entropy.EntropyModel:
        """What `fit` has put into the checkpoint.

        Raises:
            ValueError: it is damaged, or was fitted by another version or to another model.
        """
        problem = None
        digits, ordered = entropy.digits_and_order(self.sizes, self.model.quantizer.levels)
        if not isinstance(state, dict):
            problem = "is damaged"
        elif "weights" not in state:
            problem = "has an older layout"
        elif repr((state.get("digits"), state.get("ordered"))) != repr((digits, ordered)):
            problem = "has other codebooks"
        if problem:
            raise ValueError(f"the checkpoint's entropy model {problem}: run fit again")
        tables, weights = (_arrays(state.get(name)) for name in ("tables", "weights"))
        return entropy.EntropyModel(digits, ordered, tables, weights)

    def fit(self, counts: entropy.Counts) -> dict:
        """Use the entropy model of these counts. Returns the checkpoint that includes it."""
        model = self.entropy_model = counts.entropy_model()
        state = {"digits": model.digits, "ordered": model.ordered}
        for name, rows in (("tables", model.tables), ("weights", model.weights)):
            state[name] = [[torch.from_numpy(array) for array in row] for row in rows]
        self.checkpoint = {**self.checkpoint, ENTROPY_MODEL: state}
        return self.checkpoint

    @torch.inference_mode()
    @util.float32_precision("ieee")
    def encode_indices(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 (H, W, 3) -> indices (h, w, stages), int64, and statistics (stages, 2, C) or None.

        Raises ValueError: the image has another type or shape, no pixels, or too many.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"images are uint8 (height, width, 3), not {image.dtype} {image.shape}"
            )
        start = time.perf_counter()
        (height, width), model, f = image.shape[:2], self.model, self.model.f
        bitstream.check_size(width, height)
        shape = self.grid(height, width)
        missing = [(0, shape[0] * f - height), (0, shape[1] * f - width), (0, 0)]
        # numpy reflects as often as is needed, and repeats the edge of a single pixel.
        image = np.pad(image, missing, mode="reflect")
        latent = torch.empty(1, model.quantizer.dim, *shape, device=self.device)
        for core, outer, inner in tiles(shape, self.tile, reach(model.encoder)):
            # Copies, here and below: torch shares the memory, and warns if it is read-only.
            pixels = torch.from_numpy(image[in_pixels(outer, f)].copy()).to(self.device)
            z = model.to_latent(pixels.permute(2, 0, 1)[None].float() / 255)
            latent[(..., *core)] = z[(..., *inner)]
        indices, statistics = np.empty((*shape, len(self.sizes)), np.int64), None
        # In one piece if there are statistics, because these are the image's.
        for core, _, _ in tiles(shape, max(shape) if self.side_values else self.tile, 0):
            with util.in_evaluation_mode(model):  # whose statistics must not move
                quantized = Quantized(*model.quantizer(latent[(..., *core)]))
            indices[core] = quantized.indices[0].cpu().numpy().reshape(indices[core].shape)
            if quantized.statistics is not None:
                statistics = quantized.statistics[0].cpu().numpy()
        self.seconds["network"] += time.perf_counter() - start
        return indices, statistics

    @torch.inference_mode()
    @util.float32_precision("ieee")
    def decode_indices(
        self, indices: np.ndarray, statistics: np.ndarray | None, size: tuple[int, int]
    ) -> np.ndarray:
        """Indices (h, w, k) and statistics of the first k stages -> uint8 (*size, 3)."""
        start = time.perf_counter()
        model, f = self.model, self.model.f
        side = None
        if statistics is not None:
            side = torch.tensor(statistics.astype(np.float32), device=self.device)[None]
        if not model.quantizer.stage_axis:
            indices = indices[..., 0]
        shape = indices.shape[:2]
        image = np.empty((shape[0] * f, shape[1] * f, 3), np.uint8)
        for core, outer, inner in tiles(shape, self.tile, reach(model.decoder)):
            codes = self._codes(indices, outer, side)
            pixels = model.to_images(codes)[0].clamp(0, 1).mul(255).round()
            pixels = pixels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            image[in_pixels(core, f)] = pixels[in_pixels(inner, f)]
        self.seconds["network"] += time.perf_counter() - start
        return image[: size[0], : size[1]]

    def _codes(
        self, indices: np.ndarray, window: tuple[slice, slice], statistics: torch.Tensor | None
    ) -> torch.Tensor:
        """The codes (1, dim, h, w) of a window: those of a whole image would be many."""
        (rows, columns), quantizer = window, self.model.quantizer
        # Positions that share a vector are decoded together.
        first = columns.start // quantizer.group * quantizer.group
        part = indices[rows, first : _up_to(columns.stop, quantizer.group)]
        tokens = torch.from_numpy(part.copy()).to(self.device)[None]
        codes = quantizer.indices_to_codes(tokens, statistics)
        return codes[..., columns.start - first : columns.stop - first]


def _up_to(size: int, multiple: int) -> int:
    """The least multiple that is not less than `size`."""
    return -(-size // multiple) * multiple


def _arrays(rows) -> entropy.Rows:
    """The tensors in lists of lists as arrays; what is something else is left out."""
    rows = [row for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
    integers = (torch.int16, torch.int32)
    return [
        [x.numpy() for x in row if isinstance(x, torch.Tensor) and x.dtype in integers]
        for row in rows
    ]


def _stages(stages: int | None, most: int, who: str) -> int:
    if stages is not None and not 1 <= stages <= most:
        raise ValueError(f"{stages} stages were asked for, but {who} {most}: give 1 to {most}")
    return most if stages is None else stages
