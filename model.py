"""The model: a convolutional encoder and decoder around any quantizer that keeps the contract.

images (B,3,H,W) --Encoder--> z (B,C,H/f,W/f) --quantizer--> indices --decode--> codes
                                                                                   |
reconstruction (B,3,H,W) <--Decoder-- quantized (B,C,H/f,W/f) <--------------------+
"""

from __future__ import annotations

import contextlib
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from arguments import architecture_flags, args_of
from checkpoint import load_checkpoint
from images import IMAGENET_MEAN, IMAGENET_STD
from quantizers import Quantized, build_quantizer

DOWNSAMPLES = {4: 2, 8: 3, 16: 4}  # factor: number of strided convolutions
TOLERANCE = 0.02  # how far outside [0, 1] an image may lie
MAX_MISSING = 2**20  # numbers of a model that a checkpoint may lack, to be named in its error


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), as in van den Oord et al., arXiv 1711.00937."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _widths(channel: int, downsample: int) -> list[int]:
    """Channels after each strided convolution: doubling up to `channel`, the last one."""
    if downsample not in DOWNSAMPLES:
        raise ValueError(f"downsample must be one of {list(DOWNSAMPLES)}, not {downsample}")
    stages = DOWNSAMPLES[downsample]
    if channel < 2 ** (stages - 1):
        raise ValueError(f"channel must be {2 ** (stages - 1)} or more, not {channel}")
    return [channel // 2 ** (stages - 1 - i) for i in range(stages)]


class Encoder(nn.Module):
    """Strided 4x4 convolutions, residual blocks, and a 1x1 convolution to the latent channels.

    Args:
        dim: latent channels.
        channel: width of the last stage; each stage before it is half as wide as the next.
        downsample: factor f, one of 4, 8, 16.
        res_blocks: residual blocks at the lowest resolution.
    """

    def __init__(self, dim: int, channel: int = 256, downsample: int = 4, res_blocks: int = 0):
        super().__init__()
        layers, width = [], 3
        for out in _widths(channel, downsample):
            layers += [nn.Conv2d(width, out, 4, stride=2, padding=1), nn.ReLU()]
            width = out
        if res_blocks:
            layers[-1:] = [*(ResidualBlock(width) for _ in range(res_blocks)), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # (B, 3, H, W) -> (B, dim, H/f, W/f)


class Decoder(nn.Module):
    """The mirror image of `Encoder`, with transposed convolutions; same arguments."""

    def __init__(self, dim: int, channel: int = 256, downsample: int = 4, res_blocks: int = 0):
        super().__init__()
        widths = _widths(channel, downsample)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(dim, widths[0], 1)]
        layers += [ResidualBlock(widths[0]) for _ in range(res_blocks)]
        for width, out in zip(widths, [*widths[1:], 3], strict=True):
            layers += [nn.ReLU(), nn.ConvTranspose2d(width, out, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, quantized: Tensor) -> Tensor:
        return self.layers(quantized)  # (B, dim, H/f, W/f) -> (B, 3, H, W)


def dct_basis(dim: int, f: int) -> Tensor:
    """The first `dim` functions of the DCT of f x f pixels and 3 colours, (dim, 3 f^2).

    Orthonormal rows, each a function's values in the order of `torch.nn.PixelUnshuffle`: that of
    one of the colours (1, 1, 1), (1, 0, -1), (1, -2, 1), normalised, and one of the frequencies
    (u, v), from 0 to f - 1, of the DCT-II. They are sorted by w (1/4 + u + v)^(5/4), w = 1, 4 and 8
    for the three colours: the diagonals of JPEG, in about the order of their deviation in
    photographs, which falls with it.

    Raises:
        ValueError: if there are not so many.
    """
    if dim > 3 * f**2:
        raise ValueError(
            f"the dct network with f = {f} has at most {3 * f**2} latent channels, but the "
            f"quantizer has {dim}"
        )
    k = torch.arange(f, dtype=torch.float64)
    cosines = torch.cos(math.pi * (k + 0.5) * k[:, None] / f)  # (frequency, pixel)
    cosines /= cosines.norm(dim=1, keepdim=True)
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    basis = torch.einsum("kc,uy,vx->kuvcyx", colours, cosines, cosines)
    weight = torch.tensor([1, 4, 8], dtype=torch.float64)[:, None, None]
    order = (weight * (0.25 + k[:, None] + k) ** 1.25).flatten().argsort(stable=True)
    return basis.reshape(3 * f**2, -1)[order[:dim]].float()


class DCTEncoder(nn.Module):
    """A block transform, and a residual network beside it that corrects it.

    The f x f pixels of a position go to its channels (Shi et al., arXiv 1609.05158). From there,
    `linear` starts as a DCT, and `layers` as zero: training begins at a working transform codec
    and learns what it lacks. (A shortcut without parameters around the resampling, which has the
    same aim, is in Chen et al., arXiv 2410.10733.)

    Arguments as `Encoder`; `channel` is the width of `layers`.
    """

    def __init__(self, dim: int, channel: int = 256, downsample: int = 4, res_blocks: int = 0):
        super().__init__()
        self.to_channels = nn.PixelUnshuffle(downsample)
        self.linear = nn.Conv2d(3 * downsample**2, dim, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(3 * downsample**2, channel, 3, padding=1),
            *(ResidualBlock(channel) for _ in range(res_blocks)),
            nn.ReLU(),
            nn.Conv2d(channel, dim, 1),
        )
        _start(self.linear, dct_basis(dim, downsample))
        _start(self.layers[-1])

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.to_channels(images)  # (B, 3, H, W) -> (B, 3 f^2, H/f, W/f)
        return self.linear(pixels) + self.layers(pixels)  # -> (B, dim, H/f, W/f)


class DCTDecoder(nn.Module):
    """The mirror image of `DCTEncoder`; same arguments."""

    def __init__(self, dim: int, channel: int = 256, downsample: int = 4, res_blocks: int = 0):
        super().__init__()
        self.linear = nn.Conv2d(dim, 3 * downsample**2, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(dim, channel, 3, padding=1),
            *(ResidualBlock(channel) for _ in range(res_blocks)),
            nn.ReLU(),
            nn.Conv2d(channel, 3 * downsample**2, 3, padding=1),
        )
        self.to_pixels = nn.PixelShuffle(downsample)
        _start(self.linear, dct_basis(dim, downsample).T)
        _start(self.layers[-1])

    def forward(self, quantized: Tensor) -> Tensor:
        pixels = self.linear(quantized) + self.layers(quantized)  # -> (B, 3 f^2, H/f, W/f)
        return self.to_pixels(pixels)  # -> (B, 3, H, W)


@torch.no_grad()
def _start(layer: nn.Conv2d, matrix: Tensor | None = None) -> None:
    """Make a convolution start as a matrix (out, in), or as zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    if matrix is not None:
        layer.weight.copy_(matrix[:, :, None, None])


NETWORKS = {"conv": (Encoder, Decoder), "dct": (DCTEncoder, DCTDecoder)}


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder, as the flags of `arguments.py` describe them.

    Takes and gives images as floats in [0, 1]; ImageNet's mean and std are subtracted and divided
    inside. The defaults are the network of the public implementation: 1,063,687 parameters in
    encoder and decoder with 4 latent channels.

    Attributes:
        quantizer: the quantizer; its `dim` is the number of latent channels.
        f: downsampling factor.

    Raises:
        ValueError: for flags out of range, integer images, or sides that are no multiples of f.
    """

    def __init__(self, args: Namespace):
        super().__init__()
        self.quantizer = build_quantizer(args)
        self.f = args.downsample
        shape = (self.quantizer.dim, args.channel, args.downsample, args.res_blocks)
        encoder, decoder = NETWORKS[args.network]
        self.encoder = encoder(*shape)
        self.decoder = decoder(*shape)
        self._set_normalisation(device=None)

    def _set_normalisation(self, device: torch.device | None) -> None:
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            value = torch.tensor(value, device=device).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn, recurse=True):
        # A cast to half precision must not round ImageNet's mean and std, and a model that was
        # made on the meta device must get them back.
        super()._apply(fn, recurse)
        self._set_normalisation(self.mean.device)
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> (reconstruction, indices, loss).

        The reconstruction has the same scale; it is not clamped, so that its gradient is not cut
        off. The loss is the quantizer's own, a zero where it has none.
        """
        quantized = Quantized(*self.quantizer(self.to_latent(images)))
        loss = quantized.loss
        if loss is None:
            loss = quantized.codes.new_zeros(())
        return self.to_images(quantized.codes), quantized.indices, loss

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> indices (B, H/f, W/f[, stages]), all `decode` needs.

        For a quantizer with side information: (indices, statistics), to be passed to `decode`
        together. The model's state does not change, whichever mode it is in.

        Raises:
            ValueError: also for values outside [0, 1], such as those of normalised images.
        """
        self._check(images)
        if images.numel():
            low, high = (value.item() for value in images.aminmax())
            if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also true of NaN
                raise ValueError(
                    f"images are in [0, 1], but these range from {low:.3g} to {high:.3g}: the "
                    "model normalises them itself"
                )
        with in_evaluation_mode(self):
            quantized = Quantized(*self.quantizer(self.to_latent(images)))
        if quantized.statistics is None:
            return quantized.indices
        return quantized.indices, quantized.statistics

    @torch.no_grad()
    def decode(self, indices: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Indices, all stages or the first k -> images (B, 3, H, W), as `forward` gives them.

        Values may lie a little outside [0, 1]: clamp them before they are shown or stored.
        """
        side = () if statistics is None else (statistics,)
        return self.to_images(self.quantizer.indices_to_codes(indices, *side))

    def to_latent(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> what the quantizer gets, (B, dim, H/f, W/f)."""
        self._check(images)
        normalised = (images.float() - self.mean) / self.std
        return self.encoder(normalised.to(self._dtype(self.encoder)))

    def to_images(self, quantized: Tensor) -> Tensor:
        """Codes (B, dim, H/f, W/f) -> images (B, 3, H, W), [0, 1] but not clamped.

        float32, or the precision that the decoder has been cast to.
        """
        dtype = self._dtype(self.decoder)
        images = self.decoder(quantized.to(dtype)).float() * self.std + self.mean
        return images.to(dtype)

    @staticmethod
    def _dtype(network: nn.Module) -> torch.dtype:
        return next(network.parameters()).dtype

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (batch, 3, height, width), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floats in [0, 1], not {images.dtype}: give images.float() / 255"
            )
        (height, width), group = images.shape[2:], self.quantizer.group
        if height % self.f or width % (self.f * group):
            wanted = f"both sides must be multiples of {self.f}"
            if group > 1:
                wanted = f"the width must be a multiple of {self.f * group}, the height of {self.f}"
            raise ValueError(f"images of {height}x{width} do not fit: {wanted}")


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within `with`, all modules are in evaluation mode; afterwards each is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def load_model(path: str | Path) -> tuple[VQVAE, Namespace, dict]:
    """The model of a checkpoint, which knows its own architecture: (model, its flags, checkpoint).

    The model is on the CPU and in evaluation mode. `path` is all that `load_checkpoint` reads: a
    checkpoint, a folder of scripts/export.py, or the name of a Hugging Face repository.

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
        raise ValueError(f"the weights in {path} do not fit the model: most of them are missing")
    model = VQVAE(args)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())[:200]
        raise ValueError(f"the weights in {path} do not fit the model: {reason}") from error
    return model.eval(), args, saved


def load_weights(model: VQVAE, args: Namespace, path: str | Path) -> None:
    """Put a checkpoint's weights into `model`, which `args` describe.

    Raises:
        ValueError: one line that names each flag of the architecture that differs.
    """
    other, flags, saved = load_model(path)
    if repr(other) != repr(model):
        differ = [
            f"--{name.replace('_', '-')} {getattr(flags, name)} there, {getattr(args, name)} here"
            for name in architecture_flags()
            if getattr(flags, name) != getattr(args, name)
        ]
        raise ValueError(f"checkpoint {path} is of another architecture: {'; '.join(differ)}")
    model.load_state_dict(saved["model"])
