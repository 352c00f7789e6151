"""The networks around the quantizer: strided convolutions, as in the paper, or a block transform.

All take normalised images (B, 3, H, W) to a latent (B, dim, H/f, W/f), or back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

DOWNSAMPLES = {4: 2, 8: 3, 16: 4}  # factor: number of strided convolutions
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalisation(nn.Module):
    """Images (B, 3, H, W) in [0, 1], minus ImageNet's mean, over its standard deviation.

    In float32, whatever the enclosing module is cast to.

    Attributes:
        mean, std: (3, 1, 1), not in the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._set(device=None)

    def _set(self, device: torch.device | None) -> None:
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            value = torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn, recurse=True):
        # A cast to half precision must not round them, and a module that was made on the meta
        # device must get them back.
        super()._apply(fn, recurse)
        self._set(self.mean.device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def inverse(self, normalised: Tensor) -> Tensor:
        """Normalised images to [0, 1]; values beyond are not clamped."""
        return normalised.float() * self.std + self.mean


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

    def __init__(self, dim: int, channel: int, downsample: int, res_blocks: int = 0):
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

    def __init__(self, dim: int, channel: int, downsample: int, res_blocks: int = 0):
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

    def __init__(self, dim: int, channel: int, downsample: int, res_blocks: int = 0):
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
    """The inverse transform, and two 3x3 convolutions beside it; arguments as in `DCTEncoder`."""

    def __init__(self, dim: int, channel: int, downsample: int, res_blocks: int = 0):
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
