"""The model: encoder and decoder around any quantizer with the interface of quantizers/base.py.

images (B,3,H,W) --Encoder--> z (B,C,H/f,W/f) --quantizer--> indices --decode--> codes
                                                                                   |
reconstruction (B,3,H,W) <--Decoder-- quantized (B,C,H/f,W/f) <--------------------+
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import load_checkpoint
from flags import architecture_flags, args_of, differing_flags
from networks import NETWORKS, Normalisation
from quantizers import Quantized, build_quantizer
from similarity import check_range
from util import in_evaluation_mode

MAX_MISSING = 2**20  # numbers; if a checkpoint lacks more, no memory is allocated for the model


class Tokens(NamedTuple):
    """All that a decoder needs.

    Attributes:
        indices: int64 (B, H/f, W/f[, stages]).
        statistics: (B, stages, 2, dim) of a quantizer with side information, else None.
    """

    indices: Tensor
    statistics: Tensor | None


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder, as the flags of `arguments.py` describe them.

    Takes and gives images as floats in [0, 1]; ImageNet's mean and std are subtracted and divided
    inside. The defaults are the network of the public implementation: 1,063,687 parameters in
    encoder and decoder with 4 latent channels.

    Attributes:
        quantizer: the quantizer; its `dim` is the number of latent channels.
        f: downsampling factor.

    Raises:
        ValueError: for flags out of range, integer images, or sides that are not multiples of f
            (the width: of 2 f with `Pairs`).
    """

    def __init__(self, args: Namespace):
        super().__init__()
        self.quantizer = build_quantizer(args)
        self.f = args.downsample
        shape = (self.quantizer.dim, args.channel, args.downsample, args.res_blocks)
        encoder, decoder = NETWORKS[args.network]
        self.encoder = encoder(*shape)
        self.decoder = decoder(*shape)
        self.normalise = Normalisation()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> (reconstruction, indices, loss).

        Indices are (B, H/f, W/f[, stages]), as of `encode`. The reconstruction has the same scale
        as the images; it is not clamped, so that its gradient is not cut off. The loss is the
        quantizer's own, a zero where it has none.
        """
        self._check(images, self.quantizer.group)
        quantized = Quantized(*self.quantizer(self.to_latent(images)))
        loss = quantized.loss
        if loss is None:
            loss = quantized.codes.new_zeros(())
        return self.to_images(quantized.codes), quantized.indices, loss

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> indices (B, H/f, W/f[, stages]), all `decode` needs.

        For a quantizer with side information: (indices, statistics), to be passed to `decode`
        together. The model's state does not change, whichever mode it is in. For several threads at
        once, put it into evaluation mode first.

        Raises:
            ValueError: also for values outside [0, 1], such as those of normalised images.
        """
        tokens = self.tokens(images)
        return tokens.indices if tokens.statistics is None else tuple(tokens)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tokens:
        """As `encode`, with names, for any quantizer: `decode(*tokens(images))`."""
        self._check(images, self.quantizer.group)
        check_range(images)
        with in_evaluation_mode(self):
            quantized = Quantized(*self.quantizer(self.to_latent(images)))
        return Tokens(quantized.indices, quantized.statistics)

    @torch.no_grad()
    def decode(self, indices: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Indices, all stages or the first k -> images (B, 3, H, W), as `forward` gives them.

        Values may lie a little outside [0, 1]: clamp them before they are shown or stored.
        """
        return self.to_images(self.quantizer.indices_to_codes(indices, statistics))

    def to_latent(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> what the quantizer gets, (B, dim, H/f, W/f)."""
        self._check(images, 1)
        return self.encoder(self.normalise(images).to(self._dtype(self.encoder)))

    def to_images(self, quantized: Tensor) -> Tensor:
        """Codes (B, dim, H/f, W/f) -> images (B, 3, H, W), [0, 1] but not clamped.

        float32, or the precision that the decoder has been cast to.
        """
        dtype = self._dtype(self.decoder)
        return self.normalise.inverse(self.decoder(quantized.to(dtype))).to(dtype)

    @staticmethod
    def _dtype(network: nn.Module) -> torch.dtype:
        return next(network.parameters()).dtype

    def _check(self, images: Tensor, group: int) -> None:
        """Raises ValueError for what are no images, or no whole groups of `group` positions."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (batch, 3, height, width), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floats in [0, 1], not {images.dtype}: give images.float() / 255"
            )
        if not images.numel():
            raise ValueError(f"there is no image in a batch of shape {tuple(images.shape)}")
        height, width = images.shape[2:]
        if height % self.f or width % (self.f * group):
            wanted = f"both sides must be multiples of {self.f}"
            if group > 1:
                wanted = f"the width must be a multiple of {self.f * group}, the height of {self.f}"
            raise ValueError(f"images of {height}x{width} do not fit: {wanted}")


class Loaded(NamedTuple):
    """A model that `load_model` has loaded, and what its file holds.

    Attributes:
        model: on the CPU, in evaluation mode.
        args: the flags that it was built with, under the names that they have today.
        checkpoint: all that the file holds, see `checkpoint.load_checkpoint`.
    """

    model: VQVAE
    args: Namespace
    checkpoint: dict


def load_model(path: str | Path) -> Loaded:
    """The model of a checkpoint, which knows its own architecture: (model, args, checkpoint).

    `path` is all that `load_checkpoint` reads: a checkpoint, a run folder, a folder of
    scripts/export.py, or the name of a Hugging Face repository.

    Raises:
        ValueError: one line, if there is no such model, or its weights are not of its flags.
    """
    saved = load_checkpoint(path)
    weights = saved["model"]
    try:
        args = args_of(saved)
    except ValueError as error:
        raise ValueError(f"{path} holds no model of this project: {error}") from error
    # Without memory first: flags of a small file could describe a model that fills all of it.
    with torch.device("meta"):
        wanted = VQVAE(args).state_dict()
    for name, value in wanted.items():
        if name in weights and weights[name].shape != value.shape:
            here, there = tuple(value.shape), tuple(weights[name].shape)
            raise ValueError(
                f"the weights in {path} do not fit the model: {name} is {there}, not {here}"
            )
    if sum(value.numel() for name, value in wanted.items() if name not in weights) > MAX_MISSING:
        raise ValueError(
            f"the weights in {path} do not fit the model of its flags: more than {MAX_MISSING:,} "
            "numbers are missing"
        )
    for name, value in wanted.items():
        if name in weights and weights[name].is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"the weights in {path} do not fit the model: {name} is {weights[name].dtype}, not "
                f"{value.dtype}"
            )
    model = VQVAE(args)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())[:200]
        raise ValueError(f"the weights in {path} do not fit the model: {reason}") from error
    return Loaded(model.eval(), args, saved)


def load_weights(model: VQVAE, args: Namespace, path: str | Path) -> None:
    """Put a checkpoint's weights into `model`, which `args` describe.

    Raises:
        ValueError: one line that names each flag of the architecture that differs.
    """
    other, flags, saved = load_model(path)
    if repr(other) != repr(model):
        differ = differing_flags(flags, args, {*vars(args)} - {*architecture_flags()})
        raise ValueError(f"checkpoint {path} is of another architecture: {'; '.join(differ)}")
    model.load_state_dict(saved["model"])


def fingerprint(
    model: VQVAE, flags: dict, parts: Sequence[str] = ("decoder", "quantizer")
) -> bytes:
    """8 bytes of a SHA-256 over the flags of the architecture and the weights of `parts`.

    The default is all that decoding depends on. A model that was cast to another precision has
    another fingerprint.
    """
    digest = hashlib.sha256()
    shape = {name: flags[name] for name in sorted(architecture_flags()) if name in flags}
    digest.update(json.dumps(shape).encode())
    for part in parts:
        for name, value in getattr(model, part).state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            flat = value.cpu().contiguous().reshape(-1)  # view: numpy has no bfloat16
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.digest()[:8]
