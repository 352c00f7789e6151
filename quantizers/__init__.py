"""Quantizers for neural compression. The package imports nothing but torch, so it can be copied."""

from __future__ import annotations

from argparse import Namespace

from .base import Quantized, Quantizer
from .ema import VectorQuantizeEMA
from .fsq import FSQ
from .functional import straight_through
from .geometric import GeometricRFSQ
from .lfq import LFQ
from .pairs import Pairs
from .rfsq import RFSQ
from .svq import SVQ

# The choices of --quantizer. To add one: a file with a class that keeps the contract of base.py,
# a line here, and its flags in arguments.py.
QUANTIZERS: dict[str, type[Quantizer]] = {
    "fsq": FSQ,
    "rfsq": RFSQ,
    "lfq": LFQ,
    "ema": VectorQuantizeEMA,
    "svq": SVQ,
}


# The choices of --rfsq-strategy: that of geometric stages is a class of its own.
STRATEGIES: dict[str, type[Quantizer]] = {
    **dict.fromkeys(RFSQ.STRATEGIES, RFSQ),
    "geometric": GeometricRFSQ,
}


def build_quantizer(args: Namespace) -> Quantizer:
    """The quantizer that parsed command-line arguments describe.

    Raises:
        ValueError: for a name that is not in `QUANTIZERS`, or arguments that its class refuses.
    """
    if args.quantizer not in QUANTIZERS:
        raise ValueError(
            f"quantizer {args.quantizer!r} is unknown: choose from {', '.join(QUANTIZERS)}"
        )
    kind = QUANTIZERS[args.quantizer]
    quantizer = (STRATEGIES[args.rfsq_strategy] if kind is RFSQ else kind).from_args(args)
    return Pairs(quantizer) if args.pairs else quantizer


__all__ = [
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "RFSQ",
    "STRATEGIES",
    "SVQ",
    "GeometricRFSQ",
    "Pairs",
    "Quantized",
    "Quantizer",
    "VectorQuantizeEMA",
    "build_quantizer",
    "straight_through",
]
