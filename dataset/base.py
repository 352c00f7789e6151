"""What every dataset of images can be asked."""

from __future__ import annotations

from torch.utils.data import Dataset


class ImageDataset(Dataset):
    """Images by number: item i is uint8 (3, img_size, img_size)."""

    endless = False  # whether every i >= 0 is an image, also beyond the length

    def __len__(self) -> int:
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str]:
        """Hashes that identify the images: of the `names`, and of the file sizes or the pixels.

        A run that is resumed must find the same.
        """
        raise NotImplementedError

    def names(self) -> list[str] | None:
        """The source of each item, below the folder that was given; None for generated images."""
        return None

    def skipped(self) -> list[str]:
        """The files that were left out so far because they could not be read."""
        return []
