"""The quantizers that the tests build: one table for all test files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

import quantizers
from quantizers import QUANTIZERS, Quantized, Quantizer


@dataclass(frozen=True)
class Case:
    """A class of `quantizers`, its constructor arguments, and the bits that it must have."""

    kind: str
    bits: float
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type[Quantizer]:
        return getattr(quantizers, self.kind)

    def build(self, **changes: Any) -> Quantizer:
        """A new quantizer, with `changes` to its arguments."""
        return self.cls(**{**self.arguments, **changes})

    def argv(self) -> list[str]:
        """The command line that builds the same quantizer. Not every argument has a flag.

        Raises:
            KeyError: for an argument without a flag, such as `momentum`.
        """
        flag_of = {argument: flag for flag, argument in self.cls.flags.items()}
        geometric = self.kind == "GeometricRFSQ"
        kind = "RFSQ" if geometric else self.kind
        words = ["--quantizer", next(k for k, cls in QUANTIZERS.items() if cls.__name__ == kind)]
        words += ["--rfsq-strategy", "geometric"] if geometric else []
        for argument, value in self.arguments.items():
            values = value if isinstance(value, list) else [value]
            words += ["--" + flag_of[argument].replace("_", "-"), *map(str, values)]
        return words


ODD = [5, 3, 7, 2, 4]
BITS_2, BITS_4, BITS_ODD = 22.0, 40.0, 3 * math.log2(840)

CASES = {
    "fsq": Case("FSQ", 12.0, {"levels": [8, 8, 8, 8]}),
    "fsq-odd": Case("FSQ", math.log2(30), {"levels": [3, 5, 2]}),
    "fsq-40-bits": Case("FSQ", 40.0, {"levels": [4] * 20}),
    "rfsq-2-none": Case("RFSQ", BITS_2, {"stages": 2, "strategy": "none"}),
    "rfsq-4-none": Case("RFSQ", BITS_4, {"stages": 4, "strategy": "none"}),
    "rfsq-2-scale": Case("RFSQ", BITS_2, {"stages": 2, "strategy": "scale", "initial_scale": 0.7}),
    "rfsq-4-scale": Case("RFSQ", BITS_4, {"stages": 4, "strategy": "scale"}),
    "rfsq-2-layernorm": Case("RFSQ", BITS_2, {"stages": 2, "strategy": "layernorm"}),
    "rfsq-4-layernorm": Case("RFSQ", BITS_4, {"stages": 4, "strategy": "layernorm"}),
    "rfsq-odd": Case("RFSQ", BITS_ODD, {"stages": 3, "levels": ODD}),
    "rfsq-2-image": Case("RFSQ", BITS_2, {"stages": 2, "statistics": "image"}),
    "rfsq-4-image": Case("RFSQ", BITS_4, {"stages": 4, "statistics": "image"}),
    "rfsq-2-geometric": Case("GeometricRFSQ", BITS_2, {"stages": 2}),
    "rfsq-3-geometric": Case("GeometricRFSQ", BITS_ODD, {"stages": 3, "levels": ODD}),
    "lfq-12": Case("LFQ", 12.0, {"dim": 12}),
    "lfq-40": Case("LFQ", 40.0, {"dim": 40}),
    "ema": Case("VectorQuantizeEMA", 12.0, {"codebook_size": 4096, "dim": 8}),
    "ema-3": Case("VectorQuantizeEMA", 18.0, {"codebook_size": 64, "dim": 8, "stages": 3}),
    "svq-22": Case("SVQ", 22.0, {"bits": 22, "dim": 12, "classes": 4, "stages": 2}),
    "svq-37": Case("SVQ", 37.0, {"bits": 37, "dim": 6, "classes": 3, "stages": 3}),
    "svq-9": Case("SVQ", 9.0, {"bits": 9, "dim": 3, "classes": 1}),
}
# Of several stages.
RESIDUAL = [name for name, case in CASES.items() if case.arguments.get("stages", 1) > 1]
# Of those, the ones whose stages are a chain: each adds its own codes to those before it.
CHAINS = [name for name in RESIDUAL if not ("geometric" in name or "svq" in name)]
# With running statistics or codebooks, which training changes.
TRACKING = [
    *("rfsq-2-layernorm", "rfsq-4-layernorm", "rfsq-odd"),
    *("rfsq-2-geometric", "rfsq-3-geometric", "ema", "ema-3", "svq-22", "svq-37", "svq-9"),
]


def latent(module, batch=3, positions=(5, 4)):
    """Channels of different mean and spread, images of different spread."""
    like = [1] * len(positions)
    spread = torch.linspace(0.3, 2, module.dim).view(1, -1, *like)
    images = torch.linspace(0.7, 1.4, batch).view(-1, 1, *like)
    return torch.randn(batch, module.dim, *positions) * spread * images + spread.flip(1) - 1


def trained(name):
    """A quantizer in evaluation mode whose weights and statistics are not those of the start."""
    module = CASES[name].build()
    with torch.no_grad():
        for _ in range(3):
            module(latent(module, 4))
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def run(module, z):
    """`forward` as (quantized, indices, side), side the arguments that decoding needs as well."""
    out = Quantized(*module(z))
    return out.codes, out.indices, () if out.statistics is None else (out.statistics,)


def same_bits(a, b):
    """Equality that tells 0.0 from -0.0."""
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
