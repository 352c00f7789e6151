"""LPIPS, the learned perceptual distance between two images.

    images, reconstruction      (B, 3, H, W), [0, 1]
        |  2x - 1               [-1, 1], what the networks were calibrated on
        |  ImageNet network     one feature map after each block, unit length per position
        |  sum_c w_c (a - b)^2  the weights that the `lpips` package ships
        v  mean over positions, sum over blocks
    distance                    (B,)

Paper: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric,
arXiv 1801.03924.
"""

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import util
from pretrained import LPIPS_NETS, WeightsMissing, build_in_all, load_pretrained


class Perceptual(nn.Module):
    """LPIPS distance per image, frozen.

    Always in evaluation mode; the gradient flows to `reconstruction` only.

    Args:
        net: backbone, 'vgg' (VGG16), 'alex' (AlexNet) or 'squeeze' (SqueezeNet 1.1). Distances of
            different networks are not comparable.
        pretrained: False: random weights, for measurements of speed.

    Raises:
        ValueError: unknown `net`; weights that are not available (WeightsMissing).
    """

    def __init__(self, net: str = "vgg", pretrained: bool = True) -> None:
        super().__init__()
        if net not in LPIPS_NETS:
            raise ValueError(f"perceptual network is {net!r}; allowed: {', '.join(LPIPS_NETS)}")
        import lpips  # here, because it takes seconds, and most commands do without LPIPS

        self.net = net
        name, _, self.smallest_side = LPIPS_NETS[net]
        backbone_class = getattr(lpips.pretrained_networks, name)

        # On the meta device nothing is allocated (VGG16's classifier has 120 million weights) and
        # no random number is drawn: a run must not depend on whether LPIPS is built.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # torchvision deprecates the argument lpips passes
            backbone = backbone_class(pretrained=False)
        state = _backbone_state(net, backbone) if pretrained else _random_state(backbone)
        backbone.load_state_dict(state, assign=True)
        self.blocks = nn.ModuleList(backbone.children())
        self.scaling = lpips.ScalingLayer()
        linear = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
        state = torch.load(linear, map_location="cpu", weights_only=True)
        for i in range(len(self.blocks)):
            self.register_buffer(f"linear{i}", state[f"lin{i}.model.1.weight"].float())
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, reconstruction: Tensor, paper_range: bool = False) -> Tensor:
        """Distance of each reconstruction from its image, (B,) float32; 0 for equal images.

        Args:
            images: the originals, (B, 3, H, W) floating point, [0, 1]; no gradient flows to them.
            reconstruction: same shape, [0, 1] scale; values outside are passed on as they are.
            paper_range: feed the network with [0, 1] inputs as the public code of
                arXiv 2508.15860 does, for numbers that are set beside that paper's.

        Raises:
            ValueError: shapes that differ or are not (B, 3, H, W), integers, images too small.
        """
        if images.shape != reconstruction.shape or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS takes two equal shapes (B, 3, H, W); got {tuple(images.shape)} and "
                f"{tuple(reconstruction.shape)}"
            )
        if not (images.is_floating_point() and reconstruction.is_floating_point()):
            raise ValueError(
                f"LPIPS takes floating point images in [0, 1]; got {images.dtype} and "
                f"{reconstruction.dtype}"
            )
        if min(images.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"LPIPS-{self.net} needs images of at least {self.smallest_side} pixels a side; "
                f"got {images.shape[2]}x{images.shape[3]}: use larger images or another network"
            )
        with torch.no_grad():
            targets = self._features(images, paper_range)
        distance = 0.0
        for i, feature in enumerate(self._features(reconstruction, paper_range)):
            weight = getattr(self, f"linear{i}").float()
            # Element by element rather than a convolution, which autocast would run in half
            # precision: these are small differences of large numbers.
            difference = (feature - targets[i]).square()
            distance = distance + (difference * weight).sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, images: Tensor, paper_range: bool) -> list[Tensor]:
        """Feature maps of [0, 1] images after each block, float32, unit length per position."""
        x = images.to(self.scaling.shift.dtype)
        x = self.scaling(x if paper_range else 2 * x - 1)
        features = []
        for block in self.blocks:
            x = block(x)
            feature = x.float()  # squares of half-precision activations overflow
            # Without the clamp, which changes no value, the gradient at an all-zero position is
            # 0 * inf = NaN: the ReLU before it hides that, but not from anomaly detection.
            length = feature.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt()
            features.append(feature / (length + 1e-10))
        return features


def _random_state(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: 0.03 * torch.randn(value.shape) for name, value in backbone.state_dict().items()}


def _backbone_state(net: str, backbone: nn.Module) -> dict[str, Tensor]:
    """The convolutional weights of `net`, under the names that lpips' `backbone` gives them.

    Raises:
        WeightsMissing: see `load_pretrained`.
    """

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, expected in backbone.state_dict().items():
            # torchvision's features.3.weight is slice2.3.weight here: lpips only cuts the list.
            renamed[name] = state[re.sub(r"^slice\d+", "features", name)].float()
            if renamed[name].shape != expected.shape:
                raise ValueError(f"{name} has shape {tuple(renamed[name].shape)}")
        return renamed

    try:
        return load_pretrained(f"LPIPS-{net}", LPIPS_NETS[net][1], rename)
    except WeightsMissing as error:
        raise WeightsMissing(
            f"{error}; --lpips-net none --perceptual-weight 0 does without it"
        ) from error


def lpips_network(net: str, device: torch.device, side: int | None = None) -> Perceptual | None:
    """The LPIPS network on `device` in all processes of a group; None for 'none'. A collective.

    Raises:
        ValueError: images of `side` pixels are too small for it, or its weights are not available
            (WeightsMissing).
    """
    if net == "none":
        return None
    smallest = LPIPS_NETS[net][2]
    if side is not None and side < smallest:
        raise ValueError(
            f"LPIPS-{net} needs images of {smallest} pixels a side, not {side}; give a larger "
            "--img-size, or --lpips-net vgg"
        )
    return build_in_all(lambda: Perceptual(net).to(device))


def lpips_if_available(
    net: str, device: torch.device, side: int | None = None
) -> Perceptual | None:
    """`lpips_network`; where that raises, None, which a printed line explains. A collective."""
    try:
        return lpips_network(net, device, side)
    except ValueError as error:
        if util.rank() == 0:
            print(f"LPIPS will be missing from the evaluation: {error}", flush=True)
        return None
