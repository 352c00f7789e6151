"""The progress of a run: all of its state but the weights and the optimizer."""

from __future__ import annotations

import math
import time

import torch

from checkpoint import random_states
from dataset import ImageDataset, skipped_images
from meter import Meter
from run.state import RunState
from segment import Segment, changes


class Progress:
    """The progress of a run, from the start of this process or from that of a checkpoint.

    Args:
        train_set: the training images.
        val_set: the validation images.
        train_fingerprint: hashes of the training images' names and sizes.
        validation: a hash of the validation images' names.
        device: where the model is trained.

    Attributes:
        meter: the log interval.
        best_psnr: the highest PSNR of the evaluations so far; -inf before the first one.
        segments: where the steps were computed.
    """

    def __init__(
        self,
        train_set: ImageDataset,
        val_set: ImageDataset,
        train_fingerprint: dict,
        validation: str,
        device: torch.device,
    ):
        self.train_set, self.val_set = train_set, val_set
        self.train_fingerprint, self.validation = train_fingerprint, validation
        self.meter = Meter(device)
        self.best_psnr = -math.inf
        self.segments: list[Segment] = []
        self.skipped_before: list[str] = []
        self.started = time.perf_counter()

    def restore(self, state: RunState, best_psnr: float) -> None:
        """Continue from the state in a checkpoint; see `run.resume.best_psnr`."""
        self.meter.resume(
            sums=state.interval_sums,
            count=state.interval_count,
            seconds=state.interval_seconds,
            skipped=state.skipped,
        )
        self.best_psnr = best_psnr
        self.segments = state.segments
        self.skipped_before = state.skipped_images
        self.started -= state.seconds  # as if there had been no interruption

    def begin_segment(
        self, first_step: int, environment: dict, precision: str, compiled: bool
    ) -> list[str]:
        """Note where the steps from `first_step` on are computed.

        Returns what has changed since the segment before: see `segment.changes`.
        """
        segment = Segment(
            first_step=first_step,
            command=environment["command"],
            commit=environment["commit"],
            device=environment["device"],
            precision=precision,
            compiled=compiled,
            torch=environment["torch"],
            processes=environment["processes"],
        )
        changed = changes(self.segments[-1], segment) if self.segments else []
        self.segments.append(segment)
        return changed

    def state(self, step: int) -> RunState:
        """The state after `step`, for a checkpoint. A collective."""
        return RunState(
            step=step,
            best_psnr=self.best_psnr,
            seconds=self.seconds(),
            interval_sums=self.meter.gathered_sums(),
            interval_count=self.meter.count,
            interval_seconds=self.meter.seconds(),
            skipped=self.meter.skipped,
            random=random_states(),
            threads=torch.get_num_threads(),
            train_images=len(self.train_set),
            train_fingerprint=self.train_fingerprint,
            validation=self.validation,
            segments=self.segments,
            skipped_images=self.skipped_images(),
        )

    def seconds(self) -> float:
        """How long the run has taken, without interruptions."""
        return time.perf_counter() - self.started

    def skipped_images(self) -> list[str]:
        """The files that could not be read since the run began. A collective."""
        return sorted({*self.skipped_before, *skipped_images(self.train_set, self.val_set)})
