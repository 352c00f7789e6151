"""The learning rate as a function of the step."""

from __future__ import annotations

import math

STYLES = ("constant", "linear", "cosine", "exponential")


def learning_rate(
    step: int, steps: int, peak: float, warmup: float, style: str, decay_ratio: float
) -> float:
    """Learning rate of `step` (from 0) in a run of `steps`: linear warm-up, then decay.

    The warm-up takes `warmup` (a share, 0 to 1) of the steps and reaches `peak` at its last one;
    the first step is already above 0. The decay runs to the end of this run, from `peak` towards
    `decay_ratio * peak`, which it meets one step after the last, so that the rate is positive in
    every step whatever the ratio. From there on it stays.

    Raises:
        ValueError: for an unknown style or a number out of range.
    """
    if style not in STYLES:
        raise ValueError(f"lr decay style {style!r} is unknown: choose from {', '.join(STYLES)}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is a share of the steps, from 0 to 1, not {warmup}")
    if not 0 <= decay_ratio <= 1 or (style == "exponential" and decay_ratio == 0):
        least = "above 0 (exponential)" if style == "exponential" else "0"
        raise ValueError(f"lr decay ratio must be from {least} to 1, not {decay_ratio}")
    warmup_steps = math.ceil(warmup * steps - 1e-9)  # 0.07 * 100 is 7.000000000000001
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if style == "constant":
        share = 1.0
    elif style == "linear":
        share = 1 - (1 - decay_ratio) * progress
    elif style == "cosine":
        share = decay_ratio + (1 - decay_ratio) * (1 + math.cos(math.pi * progress)) / 2
    else:
        share = decay_ratio**progress
    return peak * share
