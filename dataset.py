"""Images in: folders, tars, packed and generated images, and the order that training sees them in.

    build_dataset(path) -> dataset[i]: uint8 (3, S, S)
                               |
    train_loader: one endless stream of shuffled epochs, any step of which can be resumed at
    val_loader:   every image once, in order        |
                                                    v
                               batches, uint8 (B, 3, S, S)

Datasets return bytes: a quarter of the traffic of float32 between workers, host and GPU.
"""

import dataclasses
import functools
import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import archive
from images import IMAGE_SUFFIXES, UnreadableImage, fit, list_files, read_image, some
from packed import PackedDataset, is_packed
from synthetic import SyntheticDataset
from util import StopSignals, from_all, printable, rank, stop_with_parent

SYNTHETIC_TRAIN, SYNTHETIC_VAL = 12_800, 256
LOADER_TIMEOUT = 600  # seconds without a batch after which a loading process is given up


class Images(Dataset):
    """Image files by name, in the order of their names.

    Item i is uint8 (3, img_size, img_size): `read_image`, then `fit`, which keeps the bytes of an
    image that has the size already.

    Raises:
        ValueError: an `img_size` below 1; for an item, `UnreadableImage`.
    """

    def __init__(self, names: list[str], img_size: int) -> None:
        self.img_size = img_size
        if img_size < 1:
            raise ValueError(f"img_size is {img_size}: it must be at least 1")
        # One block of bytes: a million Python strings would be copied into every worker, little by
        # little, as their reference counts are touched.
        self._names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path of item `index` below the folder."""
        return os.fsdecode(self._names[index])

    def names(self) -> list[str]:
        """The paths of all items below the folder."""
        return [os.fsdecode(name) for name in self._names.tolist()]

    def path(self, index: int) -> Path:
        """The file behind item `index`; in a tar, the tar's path with the name below it."""
        raise NotImplementedError

    def file_size(self, index: int) -> int:
        """The size in bytes of the file behind item `index`."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """Item `index` before `fit`."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the images' names, and of the sizes of up to 10,000 of the files."""
        names, sizes = hashlib.sha256(), hashlib.sha256()
        for name in self._names.tolist():
            names.update(name + b"\n")
        for index in some(range(len(self)), 10_000):
            sizes.update(b"%d\n" % self.file_size(index))
        return {"names": names.hexdigest(), "sizes": sizes.hexdigest()}

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = np.array(fit(self.read(index), self.img_size))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ImageFolderDataset(Images):
    """All images below a folder, nested in any way, in the order of their relative paths.

    Raises:
        ValueError: a folder without images.
    """

    def __init__(self, root: str | os.PathLike, img_size: int) -> None:
        self.root = Path(root)
        hint = f"give a folder with images ({' '.join(IMAGE_SUFFIXES)}) in it, or 'synthetic'"
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise ValueError(f"image folder '{root}' {what}: {hint}")
        paths, other = list_files(self.root, IMAGE_SUFFIXES)
        if not paths:
            what = f"holds no image (but, for example, '{other}')" if other else "is empty"
            raise ValueError(f"image folder '{root}' {what}: {hint}")
        super().__init__(paths, img_size)

    def path(self, index: int) -> Path:
        return self.root / self.name(index)

    def file_size(self, index: int) -> int:
        # A link to nothing, whose reading is an error of its own, has -1.
        path = self.path(index)
        return path.stat().st_size if path.exists() else -1

    def read(self, index: int) -> Image.Image:
        return read_image(self.path(index))


class TarDataset(Images):
    """All images in tars and in the tars within them: those of the folder they are unpacked into.

    Raises:
        ValueError: a tar that cannot be read, or no image in any of them.
    """

    def __init__(self, tars: Sequence[str], img_size: int) -> None:
        self.tars = list(tars)
        names, self._places, other = archive.list_archives(self.tars, IMAGE_SUFFIXES)
        if not names:
            what = f"no image (but, for example, '{printable(other)}')" if other else "no file"
            raise ValueError(
                f"tar '{self.tars[0]}' holds {what}: give tars with images "
                f"({' '.join(IMAGE_SUFFIXES)}) in them"
            )
        super().__init__(names, img_size)

    def path(self, index: int) -> Path:
        return Path(self.tars[self._places[index, 0]], self.name(index))

    def file_size(self, index: int) -> int:
        return int(self._places[index, 2])

    def read(self, index: int) -> Image.Image:
        tar, start, size = self._places[index].tolist()
        with archive.opened(self.tars[tar], self.name(index), start, size) as data:
            return read_image(self.path(index), data)


def image_files(paths: Sequence[str], img_size: int) -> Images:
    """The dataset of a folder, or of tars, whose names may have braces.

    Raises:
        ValueError: several paths that are not all tars.
    """
    if all(map(archive.is_tar, paths)):
        return TarDataset([tar for path in paths for tar in archive.expand(path)], img_size)
    if len(paths) > 1:
        raise ValueError(f"{', '.join(paths[:3])} are several paths: give one folder, or tars")
    return ImageFolderDataset(paths[0], img_size)


class SkipCorrupt(Dataset):
    """Images without those that cannot be read, which are counted.

    In training, the next readable image takes its place, so that batches stay whole; in validation
    it is None, which the loader leaves out.
    """

    def __init__(self, images: Images, train: bool) -> None:
        self.images, self.train = images, train
        self.bad = torch.zeros(len(images), dtype=torch.bool).share_memory_()  # set by workers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | None:
        for i in range(index, index + (len(self) if self.train else 1)):
            try:
                return self.images[i % len(self)]
            except UnreadableImage:
                self.bad[i % len(self)] = True
        if self.train:
            raise ValueError("none of the training images can be read: give another folder")
        return None

    def names(self) -> list[str]:
        """Those of all images, also of images that cannot be read."""
        return self.images.names()

    def fingerprint(self) -> dict[str, str]:
        """That of all images."""
        return self.images.fingerprint()

    def skipped(self) -> list[str]:
        """The files that could not be read so far."""
        return [str(self.images.path(i)) for i in self.bad.nonzero()[:, 0].tolist()]


def build_dataset(
    path: str | os.PathLike, img_size: int, seed: int, train: bool, skip_corrupt: bool = False
) -> Dataset:
    """The dataset that a path names: 'synthetic', a folder of images, packed or not, or tars.

    `seed` is for generated images alone, `skip_corrupt` for images that are not packed.
    """
    if os.fspath(path) == "synthetic":
        length = SYNTHETIC_TRAIN if train else SYNTHETIC_VAL
        # One validation set for all seeds: the spread over seeds is the training's.
        return SyntheticDataset(img_size, seed if train else 0, length, stream=0 if train else 1)
    if is_packed(path):
        return PackedDataset(path, img_size)
    images = image_files([os.fspath(path)], img_size)
    return SkipCorrupt(images, train) if skip_corrupt else images


# ---- order ---------------------------------------------------------------------------
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

    for number in StopSignals.SIGNALS:
        signal.signal(number, exit_unless_deferred)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignals.SIGNALS)


class _Loader(DataLoader):
    """Its processes start with the stop signals blocked, until `_start_worker` handles them.

    A signal to the whole group would end a process before that, and then the run by an error.
    """

    def __iter__(self) -> Iterator:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        timeout=LOADER_TIMEOUT if num_workers else 0,
        pin_memory=torch.device(device).type == "cuda",
        # A DataLoader draws a number whenever it is started: not from the global random state,
        # which a resumed run must find as it was.
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def train_loader(
    dataset: Dataset,
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
    endless = getattr(dataset, "endless", False)
    batches = StreamSampler(len(dataset), batch_size, seed, endless=endless, **order)
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


def skipped_images(*datasets: Dataset) -> list[str]:
    """The files that any process left out because they could not be read. A collective."""
    own = [name for images in datasets for name in getattr(images, "skipped", list)()]
    names = sorted(set().union(*from_all(own)))
    if names and rank() == 0:
        more = f" and {len(names) - 3} more, named in results.json" if len(names) > 3 else ""
        first = ", ".join(map(printable, names[:3]))
        print(f"{len(names)} images skipped: {first}{more}", flush=True)
    return names
