"""Image files by name: all of a folder, or of tars, which are read in place."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset import archive
from dataset.base import ImageDataset
from dataset.images import IMAGE_SUFFIXES, UnreadableImage, fit, list_files, read_image, some
from output import printable


class Images(ImageDataset):
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
        encoded = [os.fsencode(name) for name in names]
        self._names = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        """The path of item `index` below the folder."""
        index = range(len(self))[index]
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]].tobytes())

    def names(self) -> list[str]:
        """The paths of all items below the folder."""
        return [os.fsdecode(name) for name in self._encoded()]

    def _encoded(self) -> list[bytes]:
        text, ends = self._names.tobytes(), self._ends.tolist()
        return [text[start:end] for start, end in itertools.pairwise(ends)]

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
        for name in self._encoded():
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
        suffixes = " ".join(IMAGE_SUFFIXES)
        hint = f"give a folder with images ({suffixes}) in it, packed images, tars, or 'synthetic'"
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


class SkipCorrupt(ImageDataset):
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
        """Names of all images, unreadable ones included."""
        return self.images.names()

    def fingerprint(self) -> dict[str, str]:
        """Fingerprint of all images, unreadable ones included."""
        return self.images.fingerprint()

    def skipped(self) -> list[str]:
        return [str(self.images.path(i)) for i in self.bad.nonzero()[:, 0].tolist()]
