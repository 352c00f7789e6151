"""Lookup-free quantization (Yu et al., arXiv 2310.05737)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Quantized, Quantizer
from .checks import check_integer, check_weight
from .functional import mean_over_processes, per_channel, showing_nan, straight_through

MAX_GROUP_BITS = 24


class LFQ(Quantizer):
    """Takes the sign of each of `dim` channels: 2^dim codes in {-1, 1}^dim, without a codebook.

    The loss is::

        entropy_loss_weight * (H_token - diversity_gamma * H_batch)
            + commitment_loss_weight * mean((z - quantized)^2)

    With p(c|z) proportional to exp(-|z - c|^2 / temperature), H_token is the mean over tokens of
    the entropy of p(c|z) and H_batch the entropy of the mean of p(c|z) over all tokens (of all
    processes, in training), both in nats and summed over codes. Given z the bits are independent,
    each 1 with probability sigmoid(4 z / temperature), so that both can be computed exactly without
    a tokens x codes matrix:

        - H_token is a sum of `dim` binary entropies;
        - with A and B the tokens' distributions over the first and the second half of the bits
          (N x 2^(dim/2) each), the mean of p(c|z) is A^T B / N.

    Args:
        dim: number of channels and bits, from 1 to 62.
        entropy_loss_weight, commitment_loss_weight, diversity_gamma, temperature: see above.
        entropy_groups: split the bits into this many groups, as equal as possible, and sum the
            entropies of the groups instead of the joint entropy. H_token stays the same; H_batch
            becomes an upper bound of the joint entropy, which ignores dependence between groups.
            A group has at most 24 bits, because its joint distribution is held in memory. Default:
            the smallest number of groups that allows this.

    Raises:
        ValueError: for arguments out of range, or an input whose channels are not `dim`.

    Example:
        >>> lfq = LFQ(dim=12)                                   # 4096 codes, 12.0 bits
        >>> quantized, indices, loss = lfq(torch.randn(2, 12, 32, 32))
    """

    flags: ClassVar[dict[str, str]] = {
        "lfq_dim": "dim",
        "entropy_loss_weight": "entropy_loss_weight",
        "commitment_weight": "commitment_loss_weight",
        "lfq_diversity_gamma": "diversity_gamma",
        "lfq_temperature": "temperature",
        "lfq_entropy_groups": "entropy_groups",
    }

    def __init__(
        self,
        dim: int = 12,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.25,
        diversity_gamma: float = 1.0,
        temperature: float = 1.0,
        entropy_groups: int | None = None,
    ):
        super().__init__()
        dim = check_integer("dim", dim, most=62)
        check_weight("entropy_loss_weight", entropy_loss_weight)
        check_weight("commitment_loss_weight", commitment_loss_weight)
        check_weight("diversity_gamma", diversity_gamma)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive number, not {temperature}")
        if entropy_groups is None:
            entropy_groups = math.ceil(dim / MAX_GROUP_BITS)
        entropy_groups = check_integer("entropy_groups", entropy_groups, most=dim)
        largest = math.ceil(dim / entropy_groups)
        if largest > MAX_GROUP_BITS:
            raise ValueError(
                f"entropy_groups={entropy_groups} leaves {largest} bits a group; "
                f"at most {MAX_GROUP_BITS} fit: give more groups"
            )
        self.dim = dim
        self.codebook_sizes = [2**dim]
        self.levels = [2] * dim
        self.name = f"lfq-{dim}"
        self.entropy_loss_weight = entropy_loss_weight
        self.commitment_loss_weight = commitment_loss_weight
        self.diversity_gamma = diversity_gamma
        self.temperature = temperature
        self.entropy_groups = entropy_groups

    def flag_values(self) -> dict:
        """The values in use of flags whose default depends on other flags."""
        return {"lfq_entropy_groups": self.entropy_groups}

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, dim, *positions) to codes like it, indices and a loss (a scalar)."""
        positive = z.detach() > 0
        codes = positive.float() * 2 - 1
        loss = self.commitment_loss_weight * F.mse_loss(z, codes)
        if self.entropy_loss_weight:
            token_entropy, batch_entropy = self.entropies(z)
            excess = token_entropy - self.diversity_gamma * batch_entropy
            loss = loss + self.entropy_loss_weight * excess
        codes = straight_through(z, showing_nan(codes, z))
        return Quantized(codes, self._pack(positive), loss)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """H_token and H_batch (scalars, nats) of `z` (B, dim, *positions): see the class."""
        logits = (4 / self.temperature) * z.movedim(1, -1).reshape(-1, self.dim)  # (N, dim)
        p = torch.sigmoid(logits)
        # -log p = softplus(-logit) and -log(1-p) = softplus(logit) = softplus(-logit) + logit.
        token_entropy = (F.softplus(-logits) + (1 - p) * logits).sum(1).mean()
        groups = (self._batch_entropy(group) for group in p.tensor_split(self.entropy_groups, 1))
        return token_entropy, sum(groups, start=z.new_zeros(()))

    def _batch_entropy(self, p: Tensor) -> Tensor:
        """Entropy of the mean over tokens of the distribution over 2^d codes; `p` (N, d)."""
        half = p.shape[1] // 2
        mean = _distribution(p[:, :half]).t() @ _distribution(p[:, half:]) / p.shape[0]
        # mean: (2^(d/2), 2^(d - d/2))
        if self.training:
            # The value is that of all processes. The gradient is that of this process's part,
            # because DistributedDataParallel averages gradients. Evaluation makes no such call,
            # because there the processes may have different numbers of batches.
            mean = straight_through(mean, mean_over_processes(mean))
        return -torch.xlogy(mean, mean.clamp(min=1e-30)).sum()

    @staticmethod
    def _pack(positive: Tensor) -> Tensor:
        """Index (B, *positions) of boolean `positive` (B, dim, *positions), channel i the bit i."""
        index = torch.zeros_like(positive[:, 0], dtype=torch.int64)
        for i, bit in enumerate(positive.unbind(1)):
            index = index | torch.bitwise_left_shift(bit.to(torch.int64), i)
        return index

    def dequantize(self, indices: Tensor) -> Tensor:
        """Decode `indices` (B, *positions) to codes (B, dim, *positions) in {-1, 1}."""
        indices = indices.unsqueeze(1)
        shifts = per_channel(torch.arange(self.dim, device=indices.device), indices)
        # As functions, because the operators >> and << have no counterpart in ONNX.
        return (torch.bitwise_right_shift(indices, shifts) & 1).float() * 2 - 1


def _distribution(p: Tensor) -> Tensor:
    """Joint distribution (N, 2^d) of d independent bits with probabilities `p` (N, d)."""
    joint = torch.ones_like(p[:, :1].sum(1, keepdim=True))
    for bit in p.unbind(1):
        joint = torch.cat([joint * (1 - bit[:, None]), joint * bit[:, None]], dim=1)
    return joint
