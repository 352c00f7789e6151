"""Images in: folders, tars, packed and generated images.

    build_dataset(path) -> dataset[i]: uint8 (3, S, S) -> loaders: batches, in training's order

    images     files found, decoded, resized and cropped
    folders    image files in folders and in tars
    base       what all of them can be asked
    archive    tars, read in place
    packed     arrays that scripts/pack_images.py wrote
    synthetic  generated images

Datasets return bytes: a quarter of the traffic of float32 between workers, host and GPU.
"""

import os
from collections.abc import Sequence

from dataset.base import ImageDataset
from dataset.folders import ImageFolderDataset, Images, SkipCorrupt, TarDataset, image_files
from dataset.packed import PackedDataset, is_packed
from dataset.synthetic import SyntheticDataset
from output import printable
from util import from_all

__all__ = [
    "ImageFolderDataset",
    "Images",
    "PackedDataset",
    "SkipCorrupt",
    "SyntheticDataset",
    "TarDataset",
    "build_dataset",
    "image_files",
    "print_skipped",
    "skipped_images",
]

GENERATED = "synthetic"  # as a path
SYNTHETIC_TRAIN, SYNTHETIC_VAL = 12_800, 256


def build_dataset(
    path: str | os.PathLike, img_size: int, seed: int, train: bool, skip_corrupt: bool = False
) -> ImageDataset:
    """The dataset that a path names: 'synthetic', a folder of images, packed or not, or tars.

    `seed` is for generated images alone, `skip_corrupt` for images that are not packed.
    """
    if os.fspath(path) == GENERATED:
        length = SYNTHETIC_TRAIN if train else SYNTHETIC_VAL
        # One validation set for all seeds: the spread over seeds is the training's.
        return SyntheticDataset(img_size, seed if train else 0, length, stream=0 if train else 1)
    if is_packed(path):
        return PackedDataset(path, img_size)
    images = image_files([os.fspath(path)], img_size)
    return SkipCorrupt(images, train) if skip_corrupt else images


def skipped_images(*datasets: ImageDataset) -> set[str]:
    """The files that any process left out because they could not be read. A collective."""
    own = [name for images in datasets for name in images.skipped()]
    return set().union(*from_all(own))


def print_skipped(names: Sequence[str]) -> None:
    """Print how many images were skipped, and the first of them."""
    if names:
        more = f" and {len(names) - 3} more, named in results.json" if len(names) > 3 else ""
        first = ", ".join(map(printable, names[:3]))
        print(f"{len(names)} images skipped: {first}{more}", flush=True)
