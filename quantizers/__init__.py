"""Quantizers for neural compression. They depend on torch alone: take the folder along."""

from __future__ import annotations

from .base import Quantized, Quantizer, straight_through
from .ema import VectorQuantizeEMA
from .fsq import FSQ
from .lfq import LFQ
from .rfsq import RFSQ

# To add a quantizer: one file that keeps the contract of base.py, and one line here.
QUANTIZERS: dict[str, type[Quantizer]] = {
    "fsq": FSQ,
    "rfsq": RFSQ,
    "lfq": LFQ,
    "ema": VectorQuantizeEMA,
}


def build_quantizer(args) -> Quantizer:
    """The quantizer that the flags of `arguments.py` describe.

    Raises:
        ValueError: for a name that is not in `QUANTIZERS`, or flags that its class refuses.
    """
    if args.quantizer not in QUANTIZERS:
        raise ValueError(
            f"quantizer {args.quantizer!r} is unknown: choose from {', '.join(QUANTIZERS)}"
        )
    return QUANTIZERS[args.quantizer].from_args(args)


__all__ = [
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "RFSQ",
    "Quantized",
    "Quantizer",
    "VectorQuantizeEMA",
    "build_quantizer",
    "straight_through",
]
