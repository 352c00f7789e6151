"""The means over an interval of steps that training logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

import util
from checkpoint import NotFinite


class Meter:
    """Means of the loss terms over an interval of steps, and its duration.

    The sums stay on the device, because reading them would wait for it. A step whose loss or
    gradient is not finite counts as skipped and enters no mean.
    """

    def __init__(self, device: torch.device):
        # Row 0: sums of the terms of good steps, and the number of good steps; row 1: how often
        # each term was not finite. The first step sets the size.
        self.sums = torch.zeros((), device=device)
        self.skipped = torch.zeros(2, device=device)  # steps in all, and in a row
        self.count, self.names = 0, []
        self.start = time.perf_counter()

    def update(self, terms: dict[str, Tensor], bad: Tensor) -> None:
        """Add a step's terms (scalars by name); `bad` is 1 if the step was skipped, else 0."""
        self.names = list(terms)
        values = torch.stack([*terms.values(), torch.ones_like(bad)]).detach()
        if self.sums.dim() and self.sums.shape != (2, len(values)):
            raise ValueError("the checkpoint's sums for the log are not of these loss terms")
        good, infinite = torch.where(bad > 0, 0, values), (~values.isfinite()).float()
        self.sums = self.sums + torch.stack([good, infinite])
        self.skipped = torch.stack([self.skipped[0] + bad, (self.skipped[1] + bad) * bad])
        self.count += 1

    def seconds(self) -> float:
        """Seconds since the interval began, without evaluations."""
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within `with`."""
        self.skipped.cpu()  # waits for the steps that are queued on a GPU: their time counts
        before = self.seconds()
        yield
        self.start = time.perf_counter() - before

    def compute(self, max_skipped: int) -> tuple[dict, float]:
        """End the interval: the mean of each term over good steps and processes; steps a second.

        A collective. A mean is None if there was no good step. 'skipped_steps', the number of them
        in the run so far, is added to the means if there were any.

        Raises:
            NotFinite: the last `max_skipped` steps or more were all skipped.
        """
        if util.in_group():
            dist.all_reduce(self.sums)
        *totals, in_all, in_a_row = torch.cat([self.sums.flatten(), self.skipped]).tolist()
        speed = self.count / self.seconds()  # now that the device has done all its steps
        totals, infinite = totals[: len(self.names) + 1], totals[len(self.names) + 1 :]
        if in_a_row >= max_skipped:
            terms = ", ".join(n for n, count in zip(self.names, infinite, strict=False) if count)
            raise NotFinite(f"{in_a_row:.0f} steps in a row were not finite in {terms}")
        good = totals.pop()
        means = {
            name: total / good if good else None
            for name, total in zip(self.names, totals, strict=True)
        }
        self.sums, self.count = torch.zeros_like(self.sums), 0
        self.start = time.perf_counter()
        return means | ({"skipped_steps": int(in_all)} if in_all else {}), speed

    def gathered_sums(self) -> Tensor:
        """The sums of all processes on the CPU, one row per rank. A collective."""
        return torch.stack(util.from_all(self.sums.cpu()))

    def resume(self, sums: Tensor, count: int, seconds: float, skipped: Tensor) -> None:
        """Continue the interval of an interrupted run.

        Args:
            sums: one row per rank; if the process count changed, every rank uses their mean.
            count: how many steps are in the sums.
            seconds: how long these steps have taken.
            skipped: (2,), steps that were skipped: in all, and in a row.
        """
        own = sums[util.rank()] if len(sums) == util.world_size() else sums.mean(0)
        self.sums, self.skipped = own.to(self.skipped.device), skipped.to(self.skipped.device)
        self.count = count
        self.start = time.perf_counter() - seconds
