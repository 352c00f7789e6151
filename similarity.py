"""Batches of images: their range, and two of them compared image by image: L1, PSNR, SSIM."""

import math

import torch
from torch import Tensor

PSNR_CAP = 100.0  # dB; what an exact reconstruction counts as, since a mean must stay finite
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels: side of the Gaussian window, its standard deviation
SSIM_K = (0.01, 0.03)  # K1 and K2
TOLERANCE = 0.02  # how far outside [0, 1] an image may lie


def check_range(images: Tensor) -> None:
    """Raises ValueError if images are not floats in [0, 1], such as normalised ones."""
    if not images.numel():
        return
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also true of NaN
        raise ValueError(
            f"images are floats in [0, 1], within {TOLERANCE}, but these range from {low:.3g} to "
            f"{high:.3g}: give them without normalisation"
        )


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each image: (B, 3, H, W) twice -> (B,), units of the inputs."""
    return (a - b).abs().flatten(1).mean(dim=1)


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, 3, H, W) twice -> (B,).

    10 log10(peak^2 / MSE), at most `PSNR_CAP`: equal images count as 100 dB, not as infinity.
    """
    mse = (a - b).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(peak**2 / mse)).clamp(max=PSNR_CAP)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image: (B, 3, H, W) twice, in [0, 1] -> (B,), 1 if equal.

    Of every 11x11 window with Gaussian weights (sigma 1.5), its means m, (co)variances s and
    C = (K L)^2 with K1 = 0.01, K2 = 0.03 and the data range L = 1:

        (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_aa + s_bb + C2))

    averaged over the windows that lie inside the image (no padding) and over the three channels.
    Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE
    Trans. Image Processing 2004. Equal to scikit-image's `structural_similarity` with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1; in float32 to
    about 1e-6 on photographs.

    Raises:
        ValueError: images with a side below 11 pixels.
    """
    height, width = a.shape[2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side; got {height}x{width}: "
            "use larger images"
        )
    c1, c2 = (k**2 for k in SSIM_K)
    # Each factor as 1 - (difference) / (sum), with d = a - b and so 2 s_ab = s_aa + s_bb - s_dd: in
    # float32 the covariance of flat areas is a rounding error, the variance of d is not.
    d = a - b
    maps = a, d, a.square() + b.square(), d.square()
    m_a, m_d, squares, differences = (_window_means(_window_means(x, 2), 3) for x in maps)
    m_2 = m_a.square() + (m_a - m_d).square()
    luminance = 1 - m_d.square() / (m_2 + c1)
    contrast_and_structure = 1 - (differences - m_d.square()) / (squares - m_2 + c2)
    return (luminance * contrast_and_structure).flatten(1).mean(dim=1)


def _window_means(x: Tensor, dim: int) -> Tensor:
    """Gaussian means of 11 neighbours along `dim`, which gets 10 shorter."""
    offsets = [i - SSIM_WINDOW // 2 for i in range(SSIM_WINDOW)]
    weights = [math.exp(-(i**2) / (2 * SSIM_SIGMA**2)) for i in offsets]
    size = x.shape[dim] - SSIM_WINDOW + 1
    total = torch.zeros_like(x.narrow(dim, 0, size))
    for i, weight in enumerate(weights):  # faster than a convolution on a CPU
        total.add_(x.narrow(dim, i, size), alpha=weight / sum(weights))
    return total
