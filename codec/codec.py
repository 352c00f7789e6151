"""Images to the bytes of a `.rfsq` file and back, with the model of a checkpoint.

    image (H,W,3) --tiles--> latent --quantizer--> indices (h,w,k) --format.py--> bytes
                                                     |
    image (H,W,3) <--tiles-- codes <--quantizer------+

The image is padded by reflection, on the right and at the bottom, to multiples of the model's f (in
width, of 2f with pairs). An image of at most one tile goes through the network in one piece: it
decodes to `model.decode(model.encode(image))`, clamped and rounded to 8 bits, bit for bit. A larger
one goes through in tiles that overlap by more than the network's reach, so that memory is bounded
and no seam is visible. A grey image is decoded to grey.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import util
from checkpoint import ENTROPY_MODEL
from codec import bitstream, entropy
from codec.format import Format, up_to
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

    Attributes:
        format: writes and reads the files.
        stages: the most stages that a file can hold: all of the quantizer's.
        seconds: the time that `encode` and `decode` have spent in the network and in packing.

    Raises:
        ValueError: the file is not a checkpoint, or its entropy model does not fit.
    """

    def __init__(
        self, checkpoint: str | Path, device: str | torch.device = "cpu", tile: int = 1024
    ):
        self.model, self.args, self.checkpoint = load_model(checkpoint)
        self.device = torch.device(device)
        self.model.to(self.device)
        quantizer, f = self.model.quantizer, self.model.f
        # In positions, of which the quantizer may take some together.
        self.tile = up_to(max(1, tile), f * quantizer.group) // f
        self.format = Format(
            sizes=quantizer.codebook_sizes,
            side_values=round(quantizer.side_bits / 16 / quantizer.stages),
            multiple=(f, f * quantizer.group),
            f=f,
            fingerprint=fingerprint(self.model, self.checkpoint["args"]),
        )
        self.stages = self.format.stages
        if ENTROPY_MODEL in self.checkpoint:
            self.format.entropy_model = self._read_entropy_model(self.checkpoint[ENTROPY_MODEL])
        self.seconds = {"network": 0.0, "packing": 0.0}

    def encode(
        self, image: np.ndarray, stages: int | None = None, entropy_coding: bool = False
    ) -> bytes:
        """uint8 (H, W, 3) -> the bytes of a file, of the first `stages` stages (default: all).

        Raises ValueError: the image or the number of stages is invalid, or no entropy model.
        """
        with self._timed("network"):
            tokens = self.encode_indices(image)
        with self._timed("packing"):
            return self.format.write(
                *tokens, image.shape[:2], stages, entropy_coding, grey=is_grey(image)
            )

    def decode(self, data: bytes, stages: int | None = None) -> np.ndarray:
        """The bytes of a file -> uint8 (H, W, 3), from the first `stages` stages (default: all).

        The channels of a file with the grey flag are equal.

        Raises ValueError: the file is damaged, or of another version or another model.
        """
        data = bytes(data)  # of any buffer, such as an array of bytes
        with self._timed("packing"):
            tokens = self.format.read(data, stages)
        with self._timed("network"):
            image = self.decode_indices(*tokens)
        return to_grey(image) if bitstream.read_header(data).grey else image

    def counts(self) -> entropy.Counts:
        """Empty counts for this model's indices."""
        return entropy.Counts(self.format.sizes, self.model.quantizer.levels)

    def _read_entropy_model(self, state) -> entropy.EntropyModel:
        """The entropy model that `compress.py fit` has put into the checkpoint.

        Raises:
            ValueError: it is damaged, or was fitted by another version or to another model.
        """
        problem = None
        digits, ordered = entropy.digits_and_order(self.format.sizes, self.model.quantizer.levels)
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
        model = self.format.entropy_model = counts.entropy_model()
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
        (height, width), model, f = image.shape[:2], self.model, self.model.f
        bitstream.check_size(width, height)
        shape = self.format.grid(height, width)
        missing = [(0, shape[0] * f - height), (0, shape[1] * f - width), (0, 0)]
        # numpy reflects as often as is needed, and repeats the edge of a single pixel.
        image = np.pad(image, missing, mode="reflect")
        latent = torch.empty(1, model.quantizer.dim, *shape, device=self.device)
        for core, outer, inner in tiles(shape, self.tile, reach(model.encoder)):
            # Copies, here and below: torch shares the memory, and warns if it is read-only.
            pixels = torch.from_numpy(image[in_pixels(outer, f)].copy()).to(self.device)
            z = model.to_latent(pixels.permute(2, 0, 1)[None].float() / 255)
            latent[(..., *core)] = z[(..., *inner)]
        indices, statistics = np.empty((*shape, len(self.format.sizes)), np.int64), None
        # In one piece if there are statistics, because these are the image's.
        for core, _, _ in tiles(shape, max(shape) if self.format.side_values else self.tile, 0):
            with util.in_evaluation_mode(model):  # whose statistics must not move
                quantized = Quantized(*model.quantizer(latent[(..., *core)]))
            indices[core] = quantized.indices[0].cpu().numpy().reshape(indices[core].shape)
            if quantized.statistics is not None:
                statistics = quantized.statistics[0].cpu().numpy()
        return indices, statistics

    @torch.inference_mode()
    @util.float32_precision("ieee")
    def decode_indices(
        self, indices: np.ndarray, statistics: np.ndarray | None, size: tuple[int, int]
    ) -> np.ndarray:
        """Indices (h, w, k) and statistics of the first k stages -> uint8 (*size, 3)."""
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
        return image[: size[0], : size[1]]

    def _codes(
        self, indices: np.ndarray, window: tuple[slice, slice], statistics: torch.Tensor | None
    ) -> torch.Tensor:
        """The codes (1, dim, h, w) of a window: those of a whole image would be many."""
        (rows, columns), quantizer = window, self.model.quantizer
        # Positions that share a vector are decoded together.
        first = columns.start // quantizer.group * quantizer.group
        part = indices[rows, first : up_to(columns.stop, quantizer.group)]
        tokens = torch.from_numpy(part.copy()).to(self.device)[None]
        codes = quantizer.indices_to_codes(tokens, statistics)
        return codes[..., columns.start - first : columns.stop - first]

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


def _arrays(rows) -> entropy.Rows:
    """The tensors in lists of lists as arrays; what is something else is left out."""
    rows = [row for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
    integers = (torch.int16, torch.int32)
    return [
        [x.numpy() for x in row if isinstance(x, torch.Tensor) and x.dtype in integers]
        for row in rows
    ]
