"""rFID: the Fréchet distance between a split's images and their reconstructions, as features.

    images, reconstruction      8 bits, the squares that are evaluated (as --img-size crops them)
        |  torch-fidelity's InceptionV3, which resizes to 299x299 as TensorFlow 1 does
        v  2048 features after the last pooling, weights of 2015-12-05
    mean m, covariance S        over all images of the split, float64
        v
    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

The reference is the very images that were reconstructed, so a perfect reconstruction has 0. The
distance of few images is too large (below 2048 the covariances are singular): compare at equal
numbers of images.
Paper: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500.
"""

import io
from collections.abc import Callable

import torch
from torch import Tensor

import util
from pretrained import WeightsMissing, build_in_all, load_pretrained

WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


class FrechetDistance:
    """The Fréchet distance between the features of images and of their reconstructions.

    Args:
        features: (B, 3, H, W) uint8 -> (B, D), on the device of the images.
    """

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self.features = features
        # Of images and reconstructions: sums of x x^T for x = (1, features), which hold the number
        # of images, the sums and the second moments. (2, 1 + D, 1 + D) from the first batch on.
        self.moments: Tensor | None = None

    @torch.no_grad()
    def update(self, images: Tensor, reconstruction: Tensor) -> None:
        """Add images (B, 3, H, W), uint8, and reconstructions in [0, 1], clamped and rounded."""
        rounded = (reconstruction.float().clamp(0, 1) * 255).round().byte()
        moments = []
        for batch in (images, rounded):
            x = self.features(batch).double()
            x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
            moments.append(x.mT @ x)
        added = torch.stack(moments)
        self.moments = added if self.moments is None else self.moments + added

    def compute(self) -> float:
        """The distance over the images of all processes (a collective).

        Raises:
            ValueError: fewer than two images have no covariance.
        """
        own = None if self.moments is None else self.moments.cpu()
        moments = [each for each in util.from_all(own) if each is not None]
        count = sum(each[0, 0, 0].item() for each in moments)
        if count < 2:
            raise ValueError(f"rFID needs two images or more, not {count:.0f}: leave out --fid")
        total = sum(moments)
        means = total[:, 0, 1:] / count
        covariances = total[:, 1:, 1:] - count * means.unsqueeze(2) * means.unsqueeze(1)
        return frechet_distance(*means, *(covariances / (count - 1)))


def frechet_distance(mean_a: Tensor, mean_b: Tensor, cov_a: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians with means (D,) and covariances (D, D)."""
    # With S_a = R R^T, the eigenvalues of S_a S_b are those of R^T S_b R, which is symmetric:
    # exact for singular covariances too, unlike a matrix root of the product.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()
    product = torch.linalg.eigvalsh(root.mT @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * product
    return distance.clamp(min=0).item()


def inception_distance(device: torch.device) -> FrechetDistance | None:
    """rFID with the Inception network on `device`, the same answer in all processes of a group.

    None if its weights are not available, which a printed line explains.

    Raises:
        ValueError: torch-fidelity, an optional extra, is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            "--fid needs torch-fidelity: pip install '.[fid]', or leave it out"
        ) from error

    def build(state: dict[str, Tensor]):
        file = io.BytesIO()  # of our own: it reads files that could run code
        torch.save(state, file)
        file.seek(0)
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=file
        )

    try:
        network = build_in_all(lambda: load_pretrained("rFID", WEIGHTS, build).to(device))
    except WeightsMissing as error:
        if util.rank() == 0:
            print(f"rFID will be missing from the evaluation: {error}", flush=True)
        return None
    return FrechetDistance(lambda images: network(images)[0])
