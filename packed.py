"""Packed images: a folder of images decoded, resized and cropped once, as arrays to be mapped.

    shard-00000.npy ...  uint8 (N, 3, S, S); numpy.load(file, mmap_mode="r") maps it
    names.txt            line i + 1 is the source of image i, relative to the folder packed
    index.json           size, count, the shards with their SHA-256, sources that were skipped

`scripts/pack_images.py` writes them. The index is called unfinished.json until the last image.
"""

import hashlib
import json
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from checkpoint import write_json, write_whole
from util import progress

PACK_FORMAT, PACK_VERSION = "rfsq packed images", 1
PACK_INDEX, PACK_UNFINISHED = "index.json", "unfinished.json"
PACK_SHARD, PACK_NAMES = "shard-{:05d}.npy", "names.txt"
PACK_DAMAGED = "copy the folder again, or remove '{}' and pack again"
MAX_MAPPED = 512  # each mapped shard holds a file open, and a process may often open 1,024


def is_packed(root: str | os.PathLike) -> bool:
    """Whether `scripts/pack_images.py` wrote into this folder: finished, cut off or damaged."""
    root = Path(root)
    if any((root / name).is_file() for name in (PACK_UNFINISHED, PACK_SHARD.format(0))):
        return True
    try:  # folders of images may have an index.json of their own
        return json.loads((root / PACK_INDEX).read_bytes()).get("format") == PACK_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_pack(root: str | os.PathLike, name: str = PACK_INDEX) -> dict:
    """The index of a packed folder, after a check that all shards have the right sizes.

    Raises:
        ValueError: unfinished, damaged, or of a newer version of the format.
    """
    path, damaged = Path(root) / name, PACK_DAMAGED.format(root)
    if not is_packed(root):
        raise ValueError(f"'{root}' is no packed folder: scripts/pack_images.py SRC OUT makes one")
    if not path.is_file():
        raise ValueError(
            f"'{root}' is not packed to its end ({name} is missing): run the same "
            "scripts/pack_images.py command again, it continues where it was"
        )
    try:
        index = json.loads(path.read_bytes())
        newer = index["format"] == PACK_FORMAT and index["version"] > PACK_VERSION
        sound = newer or _is_consistent(index)
    except (OSError, ValueError, KeyError, TypeError):
        newer = sound = False
    if newer:
        raise ValueError(
            f"{path} has version {index['version']} of the format, this code reads up to "
            f"{PACK_VERSION}: use the version of the project that wrote it"
        )
    if not sound:
        raise ValueError(f"{path} is no index of packed images, or is damaged: {damaged}")
    for entry in index["shards"]:
        shard, size = path.parent / entry["file"], entry["bytes"]
        found = shard.stat().st_size if shard.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
            raise ValueError(f"shard {shard} {what}: {damaged}")
    return index


def _is_consistent(index: dict) -> bool:
    full, count = index["images_per_shard"], index["count"]
    counts = [min(full, count - first) for first in range(0, count, full)]
    return (
        index["format"] == PACK_FORMAT
        and isinstance(index["img_size"], int)
        and counts == [shard["count"] for shard in index["shards"]]
        and all({"file", "bytes"} <= shard.keys() for shard in index["shards"])
    )


def new_index(img_size: int, images_per_shard: int, sources: int, listing_sha256: str) -> dict:
    """The index of a folder in which nothing is packed yet."""
    return {
        "format": PACK_FORMAT,
        "version": PACK_VERSION,
        "img_size": img_size,
        "count": 0,
        "images_per_shard": images_per_shard,
        "sources": sources,
        "sources_done": 0,
        "listing_sha256": listing_sha256,
        "names_sha256": None,
        "shards": [],
        "skipped": [],
    }


def add_shard(out: Path, index: dict, images: np.ndarray) -> None:
    """Write the next shard, uint8 (N, 3, S, S), and then the unfinished index with its entry."""
    path = out / PACK_SHARD.format(len(index["shards"]))
    write_whole(path, lambda file: np.save(file, images))
    entry = {"file": path.name, "count": len(images), "bytes": path.stat().st_size}
    index["shards"].append({**entry, "sha256": sha256_of(path)})
    write_json(out / PACK_UNFINISHED, index)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def finish(out: Path, index: dict, names: list[str]) -> None:
    """Write the names of the packed images, and give the index its final name."""
    skipped = {entry["name"] for entry in index["skipped"]}
    lines = as_lines(name for name in names if name not in skipped)
    write_whole(out / PACK_NAMES, lambda file: file.write(lines))
    index["names_sha256"] = hashlib.sha256(lines).hexdigest()
    write_json(out / PACK_UNFINISHED, index)
    os.replace(out / PACK_UNFINISHED, out / PACK_INDEX)


def as_lines(names: Iterable[str]) -> bytes:
    """File names, one a line."""
    return b"".join(os.fsencode(name) + b"\n" for name in names)


def verify(out: Path, index: dict) -> None:
    """Read every file and compare its SHA-256 with the index.

    Raises:
        ValueError: one line that names what differs.
    """
    digests = {shard["file"]: shard["sha256"] for shard in index["shards"]}
    digests[PACK_NAMES] = index["names_sha256"]
    bad = [
        name
        for name in progress(list(digests), "file")
        if not (out / name).is_file() or sha256_of(out / name) != digests[name]
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"'{out}' is damaged, checksums differ: {', '.join(bad[:3])}{more}; "
            + PACK_DAMAGED.format(out)
        )
    print(f"'{out}' is intact: {len(digests)} files have the checksums of the index")


class PackedDataset(Dataset):
    """What `scripts/pack_images.py` made of a folder: the same images in the same order.

    Item i is uint8 (3, img_size, img_size), the same bytes that `ImageFolderDataset` returns.

    Raises:
        ValueError: another img_size than packed, and where `read_pack` raises it.
    """

    def __init__(self, root: str | os.PathLike, img_size: int) -> None:
        index = read_pack(root)
        packed = index["img_size"]
        if packed != img_size:
            raise ValueError(
                f"'{root}' holds images of {packed}x{packed} pixels, asked is {img_size}x"
                f"{img_size}: use --img-size {packed}, or pack again into another folder with "
                f"`scripts/pack_images.py --img-size {img_size}`"
            )
        self.root, self.img_size = Path(root), img_size
        self._full, self._count = index["images_per_shard"], index["count"]
        self._shards = [(shard["file"], shard["count"]) for shard in index["shards"]]
        self._mapped: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict:
        # Pickled, a map is a copy of its data: each process maps the files itself.
        return {**self.__dict__, "_mapped": {}}

    def __len__(self) -> int:
        return self._count

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            if len(self._mapped) >= MAX_MAPPED:
                self._mapped.clear()
            file, count = self._shards[number]
            try:
                shard = np.load(self.root / file, mmap_mode="r", allow_pickle=False)
                if shard.dtype != np.uint8 or shard.shape != (count, 3, *2 * (self.img_size,)):
                    raise ValueError(f"{shard.dtype} {shard.shape} is not what the index says")
            except Exception as error:  # a damaged header can raise nearly anything
                raise ValueError(
                    f"cannot read shard {self.root / file}: {' '.join(str(error).split())}; "
                    + PACK_DAMAGED.format(self.root)
                ) from error
            self._mapped[number] = np.asarray(shard)  # views of a np.memmap are slow to make
        return self._mapped[number]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """A batch, uint8 (B, 3, S, S), which a DataLoader takes in place of B single items."""
        batch = np.empty((len(indices), 3, self.img_size, self.img_size), np.uint8)
        for image, index in zip(batch, indices, strict=True):
            index = operator.index(index)
            if not -self._count <= index < self._count:
                raise IndexError(f"index {index}: '{self.root}' holds {self._count} images")
            shard, row = divmod(index % self._count, self._full)
            image[:] = self._shard(shard)[row]
        return torch.from_numpy(batch)
