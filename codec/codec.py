"""Images to the bytes of a `.rfsq` file and back, with the model of a checkpoint.

    image (H,W,3) --tiles--> latent --quantizer--> indices (h,w,k) --bitstream.py--> bytes
                                                     |
    image (H,W,3) <--tiles-- codes <--quantizer------+

The image is padded by reflection, at the right and the bottom, to multiples of the model's f. One
that is not larger than a tile goes through the network in one piece: what is decoded is
`model.decode(model.encode(image))`, bit for bit. A larger one goes through in tiles that overlap by
more than the network's reach, so that memory is bounded and no seam can be seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import util
from arguments import architecture_flags
from codec import bitstream, entropy
from model import load_model
from quantizers import Quantizer

ENTROPY_MODEL = "entropy_model"  # its key in a checkpoint


class Codec:
    """A checkpoint as a codec.

    Args:
        checkpoint: `last.pt`, `best.pt`, or what `compress.py fit` wrote.
        device: where the network runs, in plain float32.
        tile: pixels a side that go through the network at once, a multiple of f or rounded up.

    Attributes:
        model: the model, in evaluation mode.
        stages: how many stages the model has.
        bits: bits of a position, statistics of the image aside.
        fingerprint: 8 bytes, of the model's architecture and all that decoding depends on.
        entropy_model: the `EntropyModel` of the checkpoint, or None.
        seconds: time spent so far in the `network` (and quantizer) and in `packing`.

    Raises:
        ValueError: one line, if the file is no checkpoint.
    """

    def __init__(
        self, checkpoint: str | Path, device: str | torch.device = "cpu", tile: int = 1024
    ):
        self.model, self.args, self.checkpoint = load_model(checkpoint)
        self.device = torch.device(device)
        util.set_float32_precision("ieee")
        self.model.to(self.device)
        quantizer = self.model.quantizer
        self.sizes = quantizer.codebook_sizes
        self.stages, self.bits = quantizer.stages, quantizer.bits
        # 2 half floats for each channel and stage, where there are any.
        self.side_values = round(quantizer.side_bits / 16 / self.stages)
        self.tile = -(-max(1, tile) // self.model.f)  # in positions
        self.fingerprint = _fingerprint(self.model, self.checkpoint["args"])
        self.entropy_model = None
        if ENTROPY_MODEL in self.checkpoint:
            self.entropy_model = _load_entropy_model(self.checkpoint[ENTROPY_MODEL], self.sizes)
        self.seconds = {"network": 0.0, "packing": 0.0}

    # --- bytes ---------------------------------------------------------------------------
    def encode(
        self, image: np.ndarray, stages: int | None = None, entropy_coding: bool = False
    ) -> bytes:
        """uint8 (H, W, 3) -> the bytes of a file, of the first `stages` stages (default: all).

        Raises:
            ValueError: for an image or number of stages that cannot be, or no entropy model.
        """
        self.check_stages(stages)
        if entropy_coding:
            self.check_entropy_model()
        indices, statistics = self.encode_indices(image)
        return self.write(indices, statistics, image.shape[:2], stages, entropy_coding)

    def decode(self, data: bytes, stages: int | None = None) -> np.ndarray:
        """The bytes of a file -> uint8 (H, W, 3), from the first `stages` stages (default: all).

        Raises:
            ValueError: one line, without a name in front, that says what is wrong with the file.
        """
        indices, statistics, size = self.read(data, stages)
        return self.decode_indices(indices, statistics, size)

    def write(
        self,
        indices: np.ndarray,
        statistics: np.ndarray | None,
        size: tuple[int, int],
        stages: int | None = None,
        entropy_coding: bool = False,
    ) -> bytes:
        """What `encode_indices` gave, and the image's height and width, -> the bytes of a file."""
        start = time.perf_counter()
        k = self.check_stages(stages)
        kept = indices[..., :k]
        side = b"" if statistics is None else statistics[:k].astype("<f2").tobytes()
        if entropy_coding:
            payload = self.check_entropy_model().encode(kept)
            flags, length = bitstream.CODED, len(payload)
        else:
            payload = bitstream.pack(kept.reshape(-1, k), self.sizes[:k])
            flags, length = 0, None
        header = bitstream.Header(k, self._mark(flags), size[1], size[0], length, flags)
        data = bitstream.write(header, side, payload)
        self.seconds["packing"] += time.perf_counter() - start
        return data

    def read(
        self, data: bytes, stages: int | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
        """The bytes of a file -> indices (h, w, k), statistics (k, 2, C) or None, (height, width).

        Nothing is allocated before the header's claims are known to fit the length of the data.
        """
        start = time.perf_counter()
        header = self.check(data)
        k = _stages(stages, header.stages, "the file holds")
        f, kept = self.model.f, header.stages
        shape = (-(-header.height // f), -(-header.width // f))
        end = header.size + 2 * kept * self.side_values
        side, payload = data[header.size : end], data[end:-4]
        statistics = None
        if self.side_values:
            statistics = np.frombuffer(side, "<f2").reshape(kept, 2, -1)[:k]
            if not (np.isfinite(statistics).all() and (statistics[:, 1] > 0).all()):
                raise ValueError(
                    "is damaged: its image statistics are not positive, finite numbers"
                )
        try:
            if header.flags & bitstream.CODED:
                indices = self.entropy_model.decode(payload, shape, kept)
            else:
                indices = bitstream.unpack(payload, shape[0] * shape[1], self.sizes[:kept])
        except ValueError as error:
            raise ValueError(f"is damaged: {error}") from error
        self.seconds["packing"] += time.perf_counter() - start
        return indices.reshape(*shape, kept)[..., :k], statistics, (header.height, header.width)

    def check(self, data: bytes) -> bitstream.Header:
        """The header of a file of this model.

        Raises:
            ValueError: for anything that is wrong with it, its length or its checksum.
        """
        header = bitstream.read_header(data)
        known = header.fingerprint == self._mark(header.flags)
        if known:
            try:
                bitstream.check_size(header.width, header.height)
            except ValueError as error:
                raise ValueError(f"claims a size that cannot be: {error}") from error
        if not bitstream.intact(data):
            if known and len(data) < (wanted := self.length(header)):
                raise ValueError(
                    f"is truncated or damaged: {len(data)} bytes, of {wanted} that its header says"
                )
            raise ValueError("is damaged: its checksum is wrong")
        if header.flags & ~bitstream.CODED:
            raise ValueError(f"has the unknown flags {header.flags:#04x}: a newer version wrote it")
        if not known:
            raise ValueError(self._stranger(header))
        if not 1 <= header.stages <= self.stages:
            raise ValueError(f"claims {header.stages} stages: the model has {self.stages}")
        if len(data) != (wanted := self.length(header)):
            raise ValueError(f"has {len(data)} bytes, but its header says {wanted}")
        if header.flags & bitstream.CODED:
            self.entropy_model.check_length(header.payload, self.positions(header), header.stages)
        return header

    def positions(self, header: bitstream.Header) -> int:
        """Latent positions of the image that a header describes."""
        return -(-header.height // self.model.f) * -(-header.width // self.model.f)

    def length(self, header: bitstream.Header) -> int:
        """Bytes of the file that a header begins."""
        payload = header.payload
        if payload is None:
            sizes = self.sizes[: header.stages]
            payload = bitstream.payload_bytes(self.positions(header), sizes)
        return header.size + 2 * header.stages * self.side_values + payload + 4

    def check_claim(self, head: bytes, size: int) -> None:
        """ValueError if a file of `size` bytes that begins with `head` is not worth reading."""
        header = bitstream.read_header(head)
        known = header.fingerprint == self._mark(header.flags)
        limit = self.length(header) if known else bitstream.MAX_PIXELS
        if size > limit:
            raise ValueError(f"is damaged: it has {size} bytes, more than the {limit} it can have")

    def _mark(self, flags: int) -> bytes:
        """The fingerprint for a header: the model's, and its entropy model's where that is used."""
        if not flags & bitstream.CODED:
            return self.fingerprint
        if self.entropy_model is None:
            return b""
        return hashlib.sha256(self.fingerprint + self.entropy_model.digest).digest()[:8]

    def fit(self, counts: entropy.Counts) -> dict:
        """The checkpoint with an entropy model of these counts, which `decode` accepts from now."""
        model = counts.entropy_model()
        tables = [[torch.from_numpy(table) for table in row] for row in model.tables]
        weights = [[torch.from_numpy(weight) for weight in row] for row in model.weights]
        state = {"digits": model.digits, "ordered": model.ordered}
        state |= {"tables": tables, "weights": weights}
        self.checkpoint = {**self.checkpoint, ENTROPY_MODEL: state}
        self.entropy_model = model
        return self.checkpoint

    def counts(self) -> entropy.Counts:
        """Empty counts for this model's indices."""
        return entropy.Counts(self.sizes, channel_levels(self.model.quantizer))

    def _stranger(self, header: bitstream.Header) -> str:
        if not header.flags & bitstream.CODED:
            return "was written with another model: give the checkpoint that encoded it"
        if self.entropy_model is None:
            return (
                "is entropy-coded, and the checkpoint has no entropy model: give the one that "
                "encoded it (from `compress.py fit`)"
            )
        return (
            "was written with another model or entropy model: give the checkpoint that encoded it"
        )

    def check_entropy_model(self) -> entropy.EntropyModel:
        if self.entropy_model is None:
            raise ValueError(
                "the checkpoint has no entropy model: run `compress.py fit` on training images"
            )
        return self.entropy_model

    def check_stages(self, stages: int | None) -> int:
        """How many stages a file shall hold: all for None; ValueError for more than there are."""
        return _stages(stages, min(self.stages, 255), "the model has")

    # --- indices -------------------------------------------------------------------------
    @torch.inference_mode()
    def encode_indices(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 (H, W, 3) -> indices (h, w, stages), int64, and statistics (stages, 2, C) or None.

        A quantizer without side information works tile by tile; one with it sees the whole latent,
        as the statistics are of the image.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"images are uint8 (height, width, 3), not {image.dtype} {image.shape}"
            )
        start = time.perf_counter()
        height, width = image.shape[:2]
        bitstream.check_size(width, height)
        model, f = self.model, self.model.f
        padding = [(0, -height % f), (0, -width % f), (0, 0)]
        if -height % f or -width % f:
            # numpy reflects as often as is needed, and repeats the edge of a single pixel.
            image = np.pad(image, padding, mode="reflect")
        shape = (image.shape[0] // f, image.shape[1] // f)
        margin = _reach(model.encoder)
        whole = latent = None
        for (top, bottom, left, right), outer in tiles(shape, self.tile, margin):
            cut = image[outer[0] * f : outer[1] * f, outer[2] * f : outer[3] * f]
            pixels = torch.from_numpy(np.array(cut)).to(
                self.device
            )  # a copy: torch warns of read-only
            z = model.to_latent(pixels.permute(2, 0, 1)[None].float() / 255)
            z = z[..., top - outer[0] : bottom - outer[0], left - outer[2] : right - outer[2]]
            if self.side_values:
                if latent is None:
                    latent = z.new_empty(*z.shape[:2], *shape)
                latent[..., top:bottom, left:right] = z
            else:
                if whole is None:
                    whole = np.empty((*shape, self.stages), np.int64)
                whole[top:bottom, left:right] = self._indices(model.quantizer(z)[1])
        statistics = None
        if self.side_values:
            _, indices, _, side = model.quantizer(latent)
            whole, statistics = self._indices(indices), side[0].cpu().numpy()
        self.seconds["network"] += time.perf_counter() - start
        return whole, statistics

    def _indices(self, indices: Tensor) -> np.ndarray:
        """(1, h, w[, stages]) -> (h, w, stages)."""
        indices = indices[0].cpu().numpy()
        return indices if self.model.quantizer.stage_axis else indices[..., None]

    @torch.inference_mode()
    def decode_indices(
        self, indices: np.ndarray, statistics: np.ndarray | None, size: tuple[int, int]
    ) -> np.ndarray:
        """Indices (h, w, k) and statistics of the first k stages -> uint8 (*size, 3)."""
        start = time.perf_counter()
        model, f = self.model, self.model.f
        side = ()
        if statistics is not None:
            side = (torch.tensor(statistics.astype(np.float32), device=self.device)[None],)
        image = np.empty((*size, 3), np.uint8)
        margin = _reach(model.decoder)
        for (top, bottom, left, right), outer in tiles(indices.shape[:2], self.tile, margin):
            cut = indices[outer[0] : outer[1], outer[2] : outer[3]]
            cut = cut if model.quantizer.stage_axis else cut[..., 0]
            tokens = torch.from_numpy(np.array(cut)).to(self.device)[None]
            pixels = model.decode(tokens, *side)[0].clamp(0, 1).mul(255).round()
            pixels = pixels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            y, x = (top - outer[0]) * f, (left - outer[2]) * f
            part = image[top * f : bottom * f, left * f : right * f]
            part[:] = pixels[y : y + part.shape[0], x : x + part.shape[1]]
        self.seconds["network"] += time.perf_counter() - start
        return image


def _stages(stages: int | None, most: int, who: str) -> int:
    if stages is not None and not 1 <= stages <= most:
        raise ValueError(f"{stages} stages are not there: {who} {most}")
    return most if stages is None else stages


def _load_entropy_model(state: dict, sizes: list[int]) -> entropy.EntropyModel:
    """The entropy model of a checkpoint; ValueError if it is not of stages of these sizes."""
    if "weights" not in state:
        raise ValueError("the checkpoint's entropy model is of an older layout: run fit again")
    tables, weights = (
        [[x.numpy() for x in row] for row in state[name]] for name in ("tables", "weights")
    )
    model = entropy.EntropyModel(state["digits"], state["ordered"], tables, weights)
    if [math.prod(row) for row in model.digits] != list(sizes):
        raise ValueError("the checkpoint's entropy model is of other codebooks: run fit again")
    return model


def channel_levels(quantizer: Quantizer) -> list[int] | None:
    """Levels of the channels that an index of any stage is made of, lowest digit first, or None."""
    levels = getattr(quantizer, "levels", None)
    if levels is None and {*quantizer.codebook_sizes} == {2**quantizer.dim}:
        levels = [2] * quantizer.dim  # one bit a channel
    return levels


def _reach(network: nn.Module) -> int:
    """Positions beyond which a pixel of the network's input or output has no influence.

    Every convolution works at the latent's resolution or a finer one, so that it reaches at most
    (kernel - 1) x dilation positions.
    """
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    return sum(
        (max(layer.kernel_size) - 1) * max(layer.dilation)
        for layer in network.modules()
        if isinstance(layer, convolutions)
    )


def _fingerprint(model: nn.Module, flags: dict) -> bytes:
    """8 bytes of a SHA-256 over the flags of the architecture, the decoder and the quantizer."""
    digest = hashlib.sha256()
    shape = {name: flags[name] for name in sorted(architecture_flags()) if name in flags}
    digest.update(json.dumps(shape).encode())
    for part in (model.decoder, model.quantizer):
        for name, value in part.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.digest()[:8]


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
