"""Batches of a dataset's images, and the order that training sees them in.

train_loader: one endless stream of shuffled epochs, any step of which can be resumed at
val_loader:   every image once, in order
batch_loader: given batches                     -> uint8 (B, 3, S, S)
"""

import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dataset.base import ImageDataset
from exits import StopSignals
from util import stop_with_parent

LOADER_TIMEOUT = 600  # seconds without a batch after which a loading process is given up
WAITS = 10  # that they are spent in


@dataclasses.dataclass(eq=False)
class StreamSampler(Sampler[list[int]]):
    """Batches of indices for one process, cut from one stream of shuffled epochs.

        epoch 0: a permutation   epoch 1: another one
        |-----------------------|-----------------------|----
        | step 0  | step 1  | step 2  | step 3  | step 4  |        global batch
        | r0 | r1 | r0 | r1 | r0 | r1 | r0 | r1 | r0 | r1 |        batch_size each

    Every image comes once an epoch, no batch is short, and the stream depends on (size, seed)
    alone: not on the first step (`start_step`), nor on how many processes share a global batch.
    `steps` is the last step of the run. With `endless`, indices count up without end instead.

    Raises:
        ValueError: one global batch is larger than the set, unless `endless`.
    """

    size: int
    batch_size: int
    seed: int
    _: dataclasses.KW_ONLY
    steps: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1
    endless: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"batch_size {self.batch_size}, rank {self.rank}, world_size {self.world_size}: "
                "needed are batch_size >= 1 and 0 <= rank < world_size"
            )
        together = self.batch_size * self.world_size
        if together > self.size and not self.endless:
            raise ValueError(
                f"a global batch of {together} images ({self.batch_size} x {self.world_size} "
                f"processes) is larger than the training set of {self.size}: lower the batch size"
            )

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch, int64 (size,)."""
        # Hashed, as with seed + epoch the second epoch of seed 0 would be the first of seed 1.
        key = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(int(key))).numpy()

    def __iter__(self) -> Iterator[list[int]]:
        order = functools.lru_cache(maxsize=2)(self.permutation)  # a batch is of one epoch, or two
        for step in range(self.start_step, self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            last = first + self.batch_size
            if self.endless:
                yield list(range(first, last))
                continue
            starts = range(first - first % self.size, last, self.size)  # of the batch's epochs
            parts = [order(e // self.size)[max(first - e, 0) : last - e] for e in starts]
            yield np.concatenate(parts).tolist()


def _collate(batch: torch.Tensor | list) -> torch.Tensor | None:
    """Items to a batch, or None; a dataset with `__getitems__` has made the batch already."""
    if isinstance(batch, torch.Tensor):
        return batch
    batch = [image for image in batch if image is not None]
    return default_collate(batch) if batch else None


def _start_worker(deferred: torch.Tensor, worker: int) -> None:
    stop_with_parent(signal.SIGKILL)

    # A scheduler sends its signals to all processes; the training process finishes its step, for
    # which it needs its workers, and ends them itself.
    def exit_unless_deferred(number: int, frame: object) -> None:
        if not deferred:
            os._exit(0)  # PyTorch would report a worker that is killed as an error

    for number in StopSignals.heeded():
        signal.signal(number, exit_unless_deferred)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignals.SIGNALS)


class _Loader(DataLoader):
    """Its processes start with the stop signals blocked, until `_start_worker` handles them.

    A signal to the whole group would end a process before that, and then the run by an error.
    """

    def __iter__(self) -> Iterator:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.SIGNALS)
        try:
            return _Batches(super().__iter__())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclasses.dataclass
class _Batches:
    """The batches of a DataLoader, which waits for each of them `WAITS` times.

    A job that was suspended (SIGSTOP) while it waited finds its time over when it goes on, though
    its loading processes stood still as well: that costs it one wait, and not the run.
    """

    batches: Iterator

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> torch.Tensor | None:
        for _ in range(WAITS):
            try:
                return next(self.batches)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
        raise RuntimeError(f"DataLoader timed out after {LOADER_TIMEOUT} seconds")


def _loader(
    dataset: Dataset,
    num_workers: int,
    device: torch.device | str = "cpu",
    stop: StopSignals | None = None,
    **options: object,
) -> DataLoader:
    """A DataLoader for `device`; its processes ignore signals while `stop` defers them."""
    return _Loader(
        dataset,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=functools.partial(_start_worker, (stop or StopSignals()).deferred),
        timeout=LOADER_TIMEOUT / WAITS if num_workers else 0,
        # Not `forkserver`, the default from Python 3.14: a signal to the group ends its server.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        pin_memory=torch.device(device).type == "cuda",
        # A DataLoader draws a number whenever it is started: not from the global random state,
        # which a resumed run must find as it was.
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def train_loader(
    dataset: ImageDataset,
    batch_size: int,
    steps: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **loading: object,
) -> DataLoader:
    """This process's batches, uint8 (batch_size, 3, S, S), of steps start_step .. steps - 1.

    `loading` is the `device` that the batches are for, and the run's `stop` signals.
    """
    order = dict(steps=steps, start_step=start_step, rank=rank, world_size=world_size)
    batches = StreamSampler(len(dataset), batch_size, seed, endless=dataset.endless, **order)
    return _loader(dataset, num_workers, batch_sampler=batches, **loading)


def val_loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **loading: object,
) -> DataLoader:
    """This process's share, images rank, rank + world_size, ..., in order; it may be empty.

    The loading processes of the first iteration serve all later ones. Start them, by `iter`, before
    the first backward pass: a process that is forked beside autograd's threads can hang.
    """
    share = range(rank, len(dataset), world_size)
    options = dict(sampler=share, batch_size=batch_size, persistent_workers=num_workers > 0)
    return _loader(dataset, num_workers, **options, **loading)


def batch_loader(
    dataset: Dataset, batches: Sequence[list[int]], num_workers: int = 0, **loading: object
) -> DataLoader:
    """The given batches of indices, in their order; None for one of which nothing can be read."""
    return _loader(dataset, num_workers, batch_sampler=batches, **loading)
