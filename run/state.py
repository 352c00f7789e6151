"""The state of a run that its checkpoints hold, beside weights, optimizer and flags."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from torch import Tensor

from segment import is_segment


@dataclasses.dataclass
class RunState:
    """The state of a run after one of its steps.

    The names of the fields are the keys in a checkpoint, and `from_checkpoint` checks the types. A
    field with a default is one that checkpoints of older versions lack.

    Attributes:
        step: how many steps are done.
        best_psnr: the highest PSNR of the evaluations so far, in dB; -inf before the first one.
        seconds: how long the run has taken.
        interval_sums: the meter's sums since the last log line, one row per rank.
        interval_count: how many steps are in these sums.
        interval_seconds: how long these steps have taken.
        skipped: (2,), steps that were skipped: in all, and in a row.
        random: states of the random number generators.
        threads: compute threads; the rounding of sums depends on them.
        train_images: how many training images there are.
        train_fingerprint: hashes of the training images' names and sizes.
        validation: a hash of the validation images' names; empty: unknown.
        segments: where the steps were computed, see `segment.py`.
        skipped_images: files that could not be read.
    """

    step: int
    best_psnr: float
    seconds: float
    interval_sums: Tensor
    interval_count: int
    interval_seconds: float
    skipped: Tensor
    random: dict
    threads: int
    train_images: int
    train_fingerprint: dict = dataclasses.field(default_factory=dict)
    validation: str = ""
    segments: list = dataclasses.field(default_factory=list)
    skipped_images: list = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict:
        """The fields as entries of a checkpoint."""
        return dict(vars(self))

    @classmethod
    def from_checkpoint(cls, saved: dict) -> RunState:
        """The state in a checkpoint, which may come from anywhere.

        Raises:
            ValueError: an entry is missing, of another type, or out of range.
        """
        types, values = get_type_hints(cls), {}
        for field in dataclasses.fields(cls):
            required = field.default is field.default_factory is dataclasses.MISSING
            if required or field.name in saved:
                values[field.name] = saved.get(field.name)
                if type(values[field.name]) is not types[field.name]:
                    raise ValueError(f"{field.name} is missing, or of another type")
        state = cls(**values)
        state._check_values()
        return state

    def _check_values(self) -> None:
        if not (self.seconds >= 0 and self.interval_seconds >= 0):  # NaN is not
            raise ValueError("a time is negative")
        if self.skipped.shape != (2,) or not self.interval_sums.dim():
            raise ValueError("sums are of another shape")
        if not all(map(is_segment, self.segments)):
            raise ValueError("a segment is damaged")
        if not all(isinstance(name, str) for name in self.skipped_images):
            raise ValueError("a name is not text")
