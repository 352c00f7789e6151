"""Checks of the arguments of quantizers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex


def check_integer(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Return `value` if it is an integer of `least` or more, and at most `most`.

    Raises:
        ValueError: naming the argument and what was given.
    """
    number = _integer(value)
    if number is None or not least <= number <= (number if most is None else most):
        span = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {span}, not {value!r}")
    return number


def _integer(value: object) -> int | None:
    """An integer of any kind, NumPy's too, as an int; None for anything else, and for a bool."""
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if boolean or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor or an array of other numbers, or of several
        return None


def check_weight(name: str, value: float) -> float:
    """Return `value`, the weight of a term of a loss, if it is a finite number of 0 or more.

    Raises:
        ValueError: otherwise.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number of 0 or more, not {value}")
    return value


def check_momentum(momentum: float) -> float:
    """Return `momentum`, the weight of a new batch in running averages, if it is in (0, 1].

    Raises:
        ValueError: otherwise.
    """
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must be in (0, 1], not {momentum}")
    return momentum


def check_levels(levels: Sequence[int]) -> list[int]:
    """Validate the levels of an FSQ: at least one channel, integers of 2 or more, an int64 index.

    Raises:
        ValueError: naming the level or the product that does not fit.
    """
    several = isinstance(levels, Iterable) and getattr(levels, "ndim", 1)
    if not several or not (given := list(levels)):
        raise ValueError(
            f"levels must be the number of levels of each channel, as in [8, 8, 8, 8], not {levels}"
        )
    levels = []
    for value in given:
        level = _integer(value)
        if level is None or level < 2:
            raise ValueError(
                f"every level must be an integer of 2 or more, but {value!r} is among {given}"
            )
        levels.append(level)
    for level in levels:
        if level > 512:
            # The bound h = (L-1)(1-eps)/2 with eps = 1e-3 reaches the outermost of the L levels
            # only if (L-1) eps / 2 is below one half: up to L = 1000, and 512 is a power of two.
            raise ValueError(f"a channel has at most 512 levels, but {level} is among {levels}")
    if math.prod(levels) > 2**62:
        raise ValueError(
            f"levels {levels} make 2^{math.log2(math.prod(levels)):.1f} codes; "
            "an int64 index holds 2^62: give fewer channels or levels"
        )
    return levels
