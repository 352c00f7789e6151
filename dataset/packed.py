"""Packed images: a folder of images decoded, resized and cropped once, as arrays of bytes.

    shard-00000.npy ...  uint8 (N, 3, S, S), which numpy.load reads
    names.txt            line i + 1 is the source of image i, relative to the folder packed
    index.json           size, count, the shards with their SHA-256, sources that were skipped

`scripts/pack_images.py` writes them. The index is called unfinished.json until the last image.
"""

import hashlib
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from dataset.base import ImageDataset
from files import parse_json, write_json, write_whole
from output import progress

PACK_FORMAT, PACK_VERSION = "rfsq packed images", 1
PACK_INDEX, PACK_UNFINISHED = "index.json", "unfinished.json"
PACK_SHARD, PACK_NAMES = "shard-{:05d}.npy", "names.txt"
PACK_DAMAGED = "copy the folder again, or remove '{}' and pack again"
MAX_OPEN = 512  # shards at a time: a process may often open 1,024 files


def is_packed(root: str | os.PathLike) -> bool:
    """Whether `scripts/pack_images.py` wrote into this folder: finished, cut off or damaged."""
    root = Path(root)
    if any((root / name).is_file() for name in (PACK_UNFINISHED, PACK_SHARD.format(0))):
        return True
    if not (root / PACK_INDEX).is_file():  # opening a pipe would wait for ever
        return False
    try:  # folders of images may have an index.json of their own
        return parse_json((root / PACK_INDEX).read_bytes()).get("format") == PACK_FORMAT
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
        index = parse_json(path.read_bytes())
        newer = index["format"] == PACK_FORMAT and index["version"] > PACK_VERSION
        sound = newer or _is_consistent(index, finished=name == PACK_INDEX)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


def _is_consistent(index: dict, finished: bool) -> bool:
    full, count, shards = index["images_per_shard"], index["count"], index["shards"]
    names = [PACK_SHARD.format(i) for i in range(len(shards))]  # of this folder, and no others
    numbers = [full, count, index["img_size"], *(shard["bytes"] for shard in shards)]
    numbers += [index["version"], index["sources"], index["sources_done"]]
    texts = [index["listing_sha256"], *(shard["sha256"] for shard in shards)]
    texts += [entry["name"] for entry in index["skipped"]]
    if finished:
        texts.append(index["names_sha256"])
    return (
        index["format"] == PACK_FORMAT
        and all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and index["version"] == PACK_VERSION
        and min(full, index["img_size"]) > 0
        and len(shards) == -(-count // full)  # before a list of as many numbers is made
        and [shard["count"] for shard in shards]
        == [min(full, count - first) for first in range(0, count, full)]
        and names == [shard["file"] for shard in shards]
        and count + len(index["skipped"]) == index["sources_done"] <= index["sources"]
        and (index["sources_done"] == index["sources"] or not finished)
    )


def new_index(img_size: int, images_per_shard: int, sources: int, files: dict) -> dict:
    """The index of a folder in which nothing is packed yet; `files`: their fingerprint."""
    return {
        "format": PACK_FORMAT,
        "version": PACK_VERSION,
        "img_size": img_size,
        "count": 0,
        "images_per_shard": images_per_shard,
        "sources": sources,
        "sources_done": 0,
        "listing_sha256": files["names"],
        "sizes_sha256": files["sizes"],
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
    lines = as_lines([name for name in names if name not in skipped])
    write_whole(out / PACK_NAMES, lambda file: file.write(lines))
    index["names_sha256"] = hashlib.sha256(lines).hexdigest()
    write_json(out / PACK_UNFINISHED, index)
    os.replace(out / PACK_UNFINISHED, out / PACK_INDEX)


def as_lines(names: Sequence[str]) -> bytes:
    """File names, one a line.

    Raises:
        ValueError: a name holds a line break.
    """
    for name in names:
        if "\n" in name or "\r" in name:
            where = f"{PACK_NAMES} has a line a name"
            raise ValueError(f"file name {name!r} holds a line break: rename it, {where}")
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
        for name in progress(digests, "verify", "files")
        if not (out / name).is_file() or sha256_of(out / name) != digests[name]
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"'{out}' is damaged, checksums differ: {', '.join(bad[:3])}{more}; "
            + PACK_DAMAGED.format(out)
        )
    print(f"'{out}' is intact: {len(digests)} files have the checksums of the index")


class PackedDataset(ImageDataset):
    """Images that `scripts/pack_images.py` has packed: those of a folder, in the same order.

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
        self._names_sha256 = index["names_sha256"]
        self._shards_sha256 = [shard["sha256"] for shard in index["shards"]]
        self._open: dict[int, tuple[BinaryIO, int]] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # each process opens the files itself

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the images' names, as of the folder that was packed, and of the pixels."""
        pixels = hashlib.sha256("".join(self._shards_sha256).encode()).hexdigest()
        return {"names": self._names_sha256, "pixels": pixels}

    def names(self) -> list[str]:
        """The sources of all items, relative to the folder that was packed.

        Raises:
            ValueError: the file of names is damaged.
        """
        lines = (self.root / PACK_NAMES).read_bytes()
        if hashlib.sha256(lines).hexdigest() != self._names_sha256:
            advice = PACK_DAMAGED.format(self.root)
            raise ValueError(f"{self.root / PACK_NAMES} is damaged: {advice}")
        return [os.fsdecode(line) for line in lines.splitlines()]

    def __len__(self) -> int:
        return self._count

    def _shard(self, number: int) -> tuple[BinaryIO, int]:
        """A shard's file, and where its pixels begin."""
        if number not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._open.clear()
            name, count = self._shards[number]
            try:
                file = open(self.root / name, "rb", buffering=0)  # noqa: SIM115
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if (dtype, shape) != (np.uint8, (count, 3, *2 * (self.img_size,))) or fortran:
                    raise ValueError(f"{dtype} {shape} is not what the index says")
            except Exception as error:  # a damaged header can raise nearly anything
                raise self._unreadable(name, " ".join(str(error).split())) from error
            self._open[number] = file, file.tell()
        return self._open[number]

    def _unreadable(self, name: str, reason: str) -> ValueError:
        path = self.root / name
        return ValueError(f"cannot read shard {path}: {reason}; {PACK_DAMAGED.format(self.root)}")

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
            file, start = self._shard(shard)
            # Not a memory map: reading one beyond the end of a truncated file kills the process.
            try:
                read = os.preadv(file.fileno(), [image], start + row * image.nbytes)
            except OSError as error:
                raise self._unreadable(self._shards[shard][0], str(error.strerror)) from error
            if read != image.nbytes:
                raise self._unreadable(self._shards[shard][0], "it ends too early")
        return torch.from_numpy(batch)
