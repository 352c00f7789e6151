"""What is minimised: L1, LPIPS and the quantizer's own loss, as named terms."""

import math

from torch import Tensor, nn

from loss.perceptual import Perceptual, lpips_if_available, lpips_network
from networks import Normalisation
from pretrained import WeightsMissing

__all__ = ["Perceptual", "TrainingLoss", "WeightsMissing", "lpips_if_available", "lpips_network"]


class TrainingLoss(nn.Module):
    """Weighted sum of the reconstruction, perceptual and quantizer losses.

    loss = l1_weight * l1 + perceptual_weight * perceptual + quantizer_weight * quantizer

    Args:
        l1_weight: weight of the mean absolute difference of ImageNet-normalised images.
        perceptual_weight: weight of LPIPS; 0 leaves the network out altogether.
        quantizer_weight: weight of the loss that the quantizer itself returns.
        perceptual: the LPIPS module; may be None if `perceptual_weight` is 0.

    Raises:
        ValueError: a weight that is negative or not finite, all three 0, or `perceptual_weight`
            above 0 without `perceptual`.
    """

    def __init__(
        self,
        l1_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        quantizer_weight: float = 1.0,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.weights = dict(l1=l1_weight, perceptual=perceptual_weight, quantizer=quantizer_weight)
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"{name} weight is {weight}; it must be finite and at least 0")
        if not any(self.weights.values()):
            raise ValueError("the weights of l1, perceptual and quantizer are all 0: nothing to do")
        if perceptual_weight > 0 and perceptual is None:
            raise ValueError(
                f"perceptual weight is {perceptual_weight} but there is no LPIPS network: "
                "pass one, or set the weight to 0"
            )
        self.perceptual = perceptual if perceptual_weight > 0 else None
        self.normalise = Normalisation()

    def forward(
        self, images: Tensor, reconstruction: Tensor, quantizer_loss: Tensor
    ) -> dict[str, Tensor]:
        """The loss and its unweighted terms, scalars by name.

        'loss' is the weighted total; 'perceptual' is absent if its weight is 0.

        Args:
            images: originals, (B, 3, H, W), floats in [0, 1].
            reconstruction: the model's output, same scale and shape, not clamped.
            quantizer_loss: the quantizer's own loss, a scalar; zero where it has none.

        Raises:
            ValueError: shapes that differ, which L1 would broadcast in silence, or integers.
        """
        if images.shape != reconstruction.shape:
            raise ValueError(
                f"reconstruction has shape {tuple(reconstruction.shape)}, the images "
                f"{tuple(images.shape)}; they must be equal"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floats in [0, 1], not {images.dtype}: give images.float() / 255"
            )
        # |(a - mean)/std - (b - mean)/std| = |a - b| / std
        difference = reconstruction.float() - images
        terms = {"l1": (difference.abs() / self.normalise.std).mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, reconstruction).mean()
        terms["quantizer"] = quantizer_loss
        # A weight of 0 leaves its term out, so that a term that overflows cannot turn it to NaN.
        loss = sum(self.weights[name] * term for name, term in terms.items() if self.weights[name])
        return {"loss": loss, **terms}
