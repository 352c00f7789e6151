"""Decode, resize and crop a folder of images once, into arrays that training reads directly.

    python scripts/pack_images.py SRC OUT
    python train.py --train-data-path OUT

OUT gets the very pixels that SRC gives, in the same order:

    shard-00000.npy ...  uint8 (N, 3, S, S); numpy.load(file, mmap_mode="r") maps it
    names.txt            line i + 1 is the source of image i, relative to SRC
    index.json           size, count, the shards with their SHA-256, sources that were skipped

Killed at any time, the same command continues at the first shard that is not whole; index.json is
written last. A source that cannot be decoded is listed and skipped; one that the disk does not give
(no permission, an input/output error) ends the run, since a set must not shrink for such a reason.
Files are compared by name: one that changes under its name is not packed again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, number
from checkpoint import write_json, write_whole
from dataset import (
    PACK_FORMAT,
    PACK_INDEX,
    PACK_SHARD,
    PACK_UNFINISHED,
    PACK_VERSION,
    ImageFolderDataset,
    UnreadableImage,
    is_packed,
    read_pack,
)

NAMES = "names.txt"
# Files that copy well, are few (ImageNet: 313), and fit into memory while they are filled.
SHARD_IMAGES, SHARD_BYTES = 4096, 2**30
SECONDS_A_LINE = 30


class Decoder(Dataset):
    """Item i is (image i, ""), or (black, the reason) where the file is no image."""

    def __init__(self, images: ImageFolderDataset) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        size = self.images.img_size
        try:
            return self.images[index], ""
        except UnreadableImage as error:
            cause, path = error.__cause__, self.images.path(index)
            # Pillow's own errors have no number, but for a seek to where a damaged file points.
            if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
                raise ValueError(
                    f"cannot read {path}: {cause.strerror}; mend that and run the same command "
                    "again, it continues where it was"
                ) from error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            black = torch.zeros(3, size, size, dtype=torch.uint8)
            return black, reason.replace(str(path), self.images.name(index))


class Progress:
    """A bar on a terminal; elsewhere, such as in the log of a job, a line now and then."""

    def __init__(self, done: int, total: int) -> None:
        tty = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc="pack", unit="image", disable=not tty)
        self.done, self.total, self.tty = done, total, tty
        self.last = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if not self.tty and time.monotonic() - self.last >= SECONDS_A_LINE:
            self.last = time.monotonic()
            print(f"pack: {self.done:,} of {self.total:,} images", file=sys.stderr, flush=True)


def write_shard(path: Path, images: np.ndarray) -> dict:
    """Write one .npy file and return its line in the index."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(images))
    parts = (header.getvalue(), images.data)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    write_whole(path, lambda file: [file.write(part) for part in parts])
    size = sum(memoryview(part).nbytes for part in parts)
    return {"file": path.name, "count": len(images), "bytes": size, "sha256": digest.hexdigest()}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    if not path.is_file():
        return "missing"
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def begin(source: str, out: Path, images: ImageFolderDataset, names: list[str]) -> dict:
    """The index so far: a new one, that of a run that was cut off, or that of a finished one."""
    here, there = out.resolve(), Path(source).resolve()
    if here == there or there in here.parents:
        raise ValueError(f"OUT '{out}' lies in SRC '{source}': give a folder outside of it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT '{out}' is a file: give a new folder")
    lined = next((name for name in names if "\n" in name or "\r" in name), None)
    if lined is not None:
        raise ValueError(f"file name {lined!r} holds a line break: rename it, {NAMES} has lines")
    listing = hashlib.sha256(b"".join(os.fsencode(name) + b"\n" for name in names)).hexdigest()
    size = images.img_size

    held = [name for name in (PACK_INDEX, PACK_UNFINISHED) if (out / name).is_file()]
    if held and is_packed(out):
        index = read_pack(out, held[0])
        other = f"give another OUT, or remove '{out}' first"
        if index["img_size"] != size:
            raise ValueError(
                f"'{out}' is packed at {index['img_size']}x{index['img_size']} pixels, asked is "
                f"{size}x{size}: {other}"
            )
        if index["listing_sha256"] != listing:
            raise ValueError(
                f"'{out}' is packed from {index['sources']:,} files, and '{source}' has "
                f"{len(names):,} files of other names: {other}"
            )
        return index
    # Hidden files are what a kill within the first write leaves behind.
    strange = sorted(p.name for p in out.iterdir() if p.name[0] != ".") if out.is_dir() else []
    if strange:
        raise ValueError(f"OUT '{out}' holds other files ('{strange[0]}'): give a new folder")
    return {
        "format": PACK_FORMAT,
        "version": PACK_VERSION,
        "img_size": size,
        "count": 0,
        "images_per_shard": max(1, min(SHARD_IMAGES, SHARD_BYTES // (3 * size * size))),
        "sources": len(names),
        "sources_done": 0,
        "listing_sha256": listing,
        "names_sha256": None,
        "shards": [],
        "skipped": [],
    }


def pack(source: str, out: Path, img_size: int, num_workers: int) -> dict:
    """Pack the folder `source` into `out`, or what is missing of it, and return the index.

    Raises:
        ValueError: for folders that cannot be read or written, and an `out` that holds other data.
    """
    images = ImageFolderDataset(source, img_size)
    names = [images.name(i) for i in range(len(images))]
    index = begin(source, out, images, names)
    if (out / PACK_INDEX).is_file():
        return index
    out.mkdir(parents=True, exist_ok=True)
    for name in ("shard-*.npy", PACK_UNFINISHED, NAMES):
        for leftover in out.glob(f".{name}.*"):  # of a run that was killed while writing
            leftover.unlink()
    done, total = index["sources_done"], index["sources"]
    need, free = (total - done) * 3 * img_size**2, shutil.disk_usage(out).free
    if need > free:
        raise ValueError(
            f"'{out}' needs {need / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB free: "
            "make room, or give a folder on another disk"
        )
    if done:
        print(f"'{out}': continues after {done:,} of {total:,} files", flush=True)
    else:
        write_json(out / PACK_UNFINISHED, index)

    shard = np.empty((index["images_per_shard"], 3, img_size, img_size), np.uint8)
    filled, skipped = 0, []

    def finish_shard() -> None:
        nonlocal filled
        if filled:
            path = out / PACK_SHARD.format(len(index["shards"]))
            index["shards"].append(write_shard(path, shard[:filled]))
        index["count"] += filled
        index["skipped"] += skipped
        index["sources_done"] = done
        skipped.clear()
        filled = 0
        write_json(out / PACK_UNFINISHED, index)

    progress = Progress(done, total)
    loader = DataLoader(
        Decoder(images), sampler=range(done, total), batch_size=32, num_workers=num_workers
    )
    for pixels, reasons in loader:
        for image, reason in zip(pixels.numpy(), reasons, strict=True):
            if reason:
                skipped.append({"name": names[done], "reason": reason})
            else:
                shard[filled] = image
                filled += 1
            done += 1
            if filled == len(shard):
                finish_shard()
        progress.add(len(reasons))
    progress.bar.close()
    if not index["count"] + filled:
        first = (index["skipped"] + skipped)[0]
        raise ValueError(
            f"none of the {total:,} files in '{source}' is an image, '{first['name']}' for example:"
            f" {first['reason']}; give a folder with images that can be read"
        )
    finish_shard()
    bad = {entry["name"] for entry in index["skipped"]}
    lines = b"".join(os.fsencode(name) + b"\n" for name in names if name not in bad)
    write_whole(out / NAMES, lambda file: file.write(lines))
    index["names_sha256"] = hashlib.sha256(lines).hexdigest()
    write_json(out / PACK_UNFINISHED, index)
    os.replace(out / PACK_UNFINISHED, out / PACK_INDEX)
    return index


def verify(out: Path, index: dict) -> None:
    """Read every file and compare its SHA-256 with the index.

    Raises:
        ValueError: one line that names what differs.
    """
    files = [(shard["file"], shard["sha256"]) for shard in index["shards"]]
    files.append((NAMES, index["names_sha256"]))
    bar = tqdm(files, desc="verify", unit="file", disable=not sys.stderr.isatty())
    bad = [name for name, digest in bar if sha256_of(out / name) != digest]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"'{out}' is damaged, checksums differ: {', '.join(bad[:3])}{more}; copy the "
            f"folder again, or remove '{out}' and pack again"
        )
    print(f"'{out}' is sound: {len(files)} files have the checksums of the index")


def main(argv: Sequence[str] | None = None) -> dict:
    """Pack or verify as the flags say and return the index.

    Raises:
        ValueError: for bad input.
    """
    parser = Parser(prog="pack_images.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", nargs="?", metavar="SRC", help="a folder of images, nested or flat"
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write, new or of a run cut off")
    parser.add_argument(
        "--img-size", type=number(int, 16), default=128, help="pixels a side, as in train.py"
    )
    parser.add_argument(
        "--num-workers", type=number(int, 0), default=util.cpu_cores(), help="decoding processes"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read OUT again and compare checksums; needs no SRC where OUT is finished",
    )
    flags = parser.parse_intermixed_args(argv)
    if flags.source is None and not flags.verify:
        parser.error("SRC and OUT are needed; OUT alone goes with --verify")
    out = Path(flags.out)
    try:
        if flags.source is None:
            index = read_pack(out)
        else:
            index = pack(flags.source, out, flags.img_size, flags.num_workers)
            size, gigabytes = index["img_size"], sum(s["bytes"] for s in index["shards"]) / 1e9
            print(
                f"'{out}' is complete: {index['count']:,} images of {size}x{size} pixels, "
                f"{gigabytes:.2f} GB in {len(index['shards'])} shards; "
                f"{len(index['skipped'])} files skipped"
                + (f", listed in {out / PACK_INDEX}" if index["skipped"] else "")
            )
        if flags.verify:
            verify(out, index)
    except OSError as error:
        raise ValueError(
            f"'{error.filename or out}': {error.strerror or error}; mend that and run the same "
            "command again, it continues where it was"
        ) from error
    return index


if __name__ == "__main__":
    util.run_script(main)
