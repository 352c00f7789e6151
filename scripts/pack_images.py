"""Decode, resize and crop a folder of images once, into arrays that training reads directly.

    python scripts/pack_images.py SRC OUT
    python train.py --train-data-path OUT

OUT holds the same pixels that SRC gives, in the same order:

    shard-00000.npy ...  uint8 (N, 3, S, S); numpy.load(file, mmap_mode="r") maps it
    names.txt            line i + 1 is the source of image i, relative to SRC
    index.json           size, count, the shards with their SHA-256, sources that were skipped

After an interruption at any time, the same command continues at the first shard that is incomplete;
index.json is written last. A source that cannot be decoded is listed and skipped. A source that
cannot be read from the disk (no permission, an input/output error) ends the run, because it would
silently be missing from the set. Files are identified by name: a file whose content changes under
the same name is not packed again.
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
SHARD_IMAGES, SHARD_BYTES = 4096, 2**30  # limits: ImageNet makes 313 shards, each fits into memory
SECONDS_A_LINE = 30  # between progress lines in a log
AGAIN = "fix that and run the same command again: it continues where it stopped"


class Decoder(Dataset):
    """Item i is (image i, ""), or (a black image, the reason) if the file cannot be decoded.

    Raises ValueError if the file cannot be read from the disk.
    """

    def __init__(self, images: ImageFolderDataset) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        size = self.images.img_size
        try:
            return self.images[index], ""
        except UnreadableImage as error:
            cause, path = error.__cause__, self.images.path(index)
            # An error of the disk has a number. Pillow's own errors have none, except EINVAL for a
            # seek to an offset that a damaged file names.
            if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
                raise ValueError(f"cannot read {path}: {cause.strerror}; {AGAIN}") from error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            black = torch.zeros(3, size, size, dtype=torch.uint8)
            return black, reason.replace(str(path), self.images.name(index))


class Progress:
    """A progress bar on a terminal; otherwise, as in the log of a job, a line every 30 seconds."""

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
    """Write one .npy file, uint8 (N, 3, S, S), and return its entry of the index."""
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
    """The SHA-256 of a file, or 'missing'."""
    digest = hashlib.sha256()
    if not path.is_file():
        return "missing"
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def begin(source: str, out: Path, images: ImageFolderDataset, names: list[str]) -> dict:
    """The index to continue from: a new one, or that of an interrupted or a finished run.

    Raises:
        ValueError: `out` is inside `source` or holds other data, or a name holds a line break.
    """
    here, there = out.resolve(), Path(source).resolve()
    if here == there or there in here.parents:
        raise ValueError(f"OUT '{out}' is inside SRC '{source}': give a folder outside of it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT '{out}' is a file: give a new folder")
    lined = next((name for name in names if "\n" in name or "\r" in name), None)
    if lined is not None:
        raise ValueError(
            f"file name {lined!r} holds a line break: rename it, {NAMES} has a line a name"
        )
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
    # Hidden files are left behind if the process is killed during the first write.
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


class ShardWriter:
    """Collects images into shards and keeps the index on the disk up to date.

    Args:
        out: the packed folder.
        index: the index to continue.
    """

    def __init__(self, out: Path, index: dict) -> None:
        self.out, self.index, self.done = out, index, index["sources_done"]
        size = index["img_size"]
        self.shard = np.empty((index["images_per_shard"], 3, size, size), np.uint8)
        self.filled, self.skipped = 0, []  # not in the index yet

    def add(self, image: np.ndarray) -> None:
        """Take the image of the next source."""
        self.shard[self.filled] = image
        self.filled += 1
        self.done += 1
        if self.filled == len(self.shard):
            self.flush()

    def skip(self, name: str, reason: str) -> None:
        """Leave out the next source."""
        self.skipped.append({"name": name, "reason": reason})
        self.done += 1

    def flush(self) -> None:
        """Write the images so far as a shard, then the index."""
        if self.filled:
            path = self.out / PACK_SHARD.format(len(self.index["shards"]))
            self.index["shards"].append(write_shard(path, self.shard[: self.filled]))
        self.index["count"] += self.filled
        self.index["skipped"] += self.skipped
        self.index["sources_done"] = self.done
        self.filled, self.skipped = 0, []
        write_json(self.out / PACK_UNFINISHED, self.index)


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

    writer, progress = ShardWriter(out, index), Progress(done, total)
    loader = DataLoader(
        Decoder(images), sampler=range(done, total), batch_size=32, num_workers=num_workers
    )
    for pixels, reasons in loader:
        for image, reason in zip(pixels.numpy(), reasons, strict=True):
            if reason:
                writer.skip(names[writer.done], reason)
            else:
                writer.add(image)
        progress.add(len(reasons))
    progress.bar.close()
    if not index["count"] + writer.filled:
        first = (index["skipped"] + writer.skipped)[0]
        raise ValueError(
            f"none of the {total:,} files in '{source}' is an image, '{first['name']}' for example:"
            f" {first['reason']}; give a folder with images that can be read"
        )
    writer.flush()
    finish(out, index, names)
    return index


def finish(out: Path, index: dict, names: list[str]) -> None:
    """Write the names of the packed images, and give the index its final name."""
    skipped = {entry["name"] for entry in index["skipped"]}
    lines = b"".join(os.fsencode(name) + b"\n" for name in names if name not in skipped)
    write_whole(out / NAMES, lambda file: file.write(lines))
    index["names_sha256"] = hashlib.sha256(lines).hexdigest()
    write_json(out / PACK_UNFINISHED, index)
    os.replace(out / PACK_UNFINISHED, out / PACK_INDEX)


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
    print(f"'{out}' is intact: {len(files)} files have the checksums of the index")


def main(argv: Sequence[str] | None = None) -> dict:
    """Pack or verify as the flags say and return the index.

    Raises:
        ValueError: for bad input.
    """
    parser = Parser(prog="pack_images.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", nargs="?", metavar="SRC", help="a folder of images, nested or flat"
    )
    parser.add_argument(
        "out", metavar="OUT", help="the folder to write, new or of an interrupted run"
    )
    parser.add_argument(
        "--img-size", type=number(int, 16), default=128, help="pixels a side, as in train.py"
    )
    parser.add_argument(
        "--num-workers", type=number(int, 0), default=util.cpu_cores(), help="decoding processes"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read OUT again and compare checksums; without SRC, OUT must be complete",
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
            f"'{error.filename or out}': {error.strerror or error}; {AGAIN}"
        ) from error
    return index


if __name__ == "__main__":
    util.run_script(main)
