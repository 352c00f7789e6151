"""Decode, resize and crop images once, into arrays that training reads directly.

    python scripts/pack_images.py SRC OUT
    python scripts/pack_images.py ILSVRC2012_img_train.tar OUT
    python scripts/pack_images.py 'shard-{000000..000146}.tar' OUT
    python train.py --train-data-path OUT

OUT holds the same pixels that SRC gives, in the same order; dataset/packed.py describes its files.
A tar is read in place and gives what the folder gives that it is unpacked into.

After an interruption at any time, the same command continues at the first shard that is incomplete;
index.json is written last. A source that cannot be decoded is listed and skipped. A source that
cannot be read from the disk (no permission, an input/output error) ends the run, because it would
silently be missing from the set. Files are identified by name: a file whose content changes under
the same name is not packed again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import util
from arguments import MAX_SIDE, Parser, number
from dataset import Images, image_files, packed
from dataset.images import UnreadableImage
from dataset.packed import PACK_INDEX, PACK_UNFINISHED, read_pack
from files import check_room, locked, make_folder, remove_leftovers, size_text, write_json
from output import Progress

SHARD_IMAGES, SHARD_BYTES = 4096, 2**30  # limits: ImageNet makes 313 shards, each fits into memory
BATCH = 32  # images that a decoding process hands over at once
AGAIN = "fix that and run the same command again: it continues where it stopped"


class Decoder(Dataset):
    """Item i is (image i, ""), or (a black image, the reason) if the file cannot be decoded.

    Raises ValueError if the file cannot be read from the disk.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        size = self.images.img_size
        try:
            return self.images[index], ""
        except UnreadableImage as error:
            cause, path = error.__cause__, self.images.path(index)
            reason = " ".join(str(cause).split()) or type(cause).__name__
            black = torch.zeros(3, size, size, dtype=torch.uint8)
            return black, reason.replace(str(path), self.images.name(index))


def begin(sources: Sequence[str], out: Path, size: int, count: int, files: dict) -> dict:
    """The index to continue from: a new one, or that of an interrupted or a finished run.

    `files` is the `Images.fingerprint` of the `count` files.

    Raises:
        ValueError: `out` holds other data.
    """
    source = " ".join(sources[:3])  # for messages
    held = [name for name in (PACK_INDEX, PACK_UNFINISHED) if (out / name).is_file()]
    if held and packed.is_packed(out):
        index = read_pack(out, held[0])
        other = f"give another OUT, or remove '{out}' first"
        was = index["img_size"]
        if was != size:
            raise ValueError(
                f"'{out}' is packed at {was}x{was} pixels, asked is {size}x{size}: {other}"
            )
        if index["listing_sha256"] != files["names"] or index["sources"] != count:
            raise ValueError(
                f"'{out}' is packed from {index['sources']:,} files, and '{source}' has "
                f"{count:,} files of other names: {other}"
            )
        if index.get("sizes_sha256", files["sizes"]) != files["sizes"]:  # not in older ones
            raise ValueError(
                f"'{out}' is packed from files of other sizes than those in '{source}': {other}"
            )
        return index
    strange = sorted(p.name for p in out.glob("[!.]*"))  # a killed process leaves hidden files
    if strange:
        raise ValueError(f"OUT '{out}' holds other files ('{strange[0]}'): give a new folder")
    full = max(1, min(SHARD_IMAGES, SHARD_BYTES // (3 * size * size)))
    return packed.new_index(size, full, count, files)


def pack_rest(images: Images, out: Path, index: dict, workers: int) -> None:
    """Decode the sources that are not done yet into shards, and bring `index` up to date.

    Shows its progress.
    """
    done, total = index["sources_done"], index["sources"]
    full, size = index["images_per_shard"], index["img_size"]
    shard = np.empty((min(full, total), 3, size, size), np.uint8)
    remaining = range(done, total)
    workers = min(workers, math.ceil(len(remaining) / BATCH))
    loader = DataLoader(Decoder(images), sampler=remaining, batch_size=BATCH, num_workers=workers)
    with Progress("pack", total, done) as bar:
        for pixels, reasons in loader:
            for image, reason in zip(pixels.numpy(), reasons, strict=True):
                index["sources_done"] += 1
                if reason:
                    name = images.name(index["sources_done"] - 1)
                    index["skipped"].append({"name": name, "reason": reason})
                    continue
                shard[index["count"] % full] = image
                index["count"] += 1
                if index["count"] % full == 0:
                    packed.add_shard(out, index, shard)
            bar.add(len(reasons))
    # An interrupted run may have written the last shard already, which is not full.
    if index["count"] > full * len(index["shards"]):
        packed.add_shard(out, index, shard[: index["count"] % full])


def pack(sources: Sequence[str], out: Path, img_size: int, num_workers: int) -> dict:
    """Pack a folder or tars into `out`, or what is missing of it, and return the index.

    Raises:
        ValueError: for sources that cannot be read, and an `out` that cannot be written or holds
            other data.
    """
    images = image_files(sources, img_size)
    if out.resolve().is_relative_to(Path(sources[0]).resolve()):
        raise ValueError(f"OUT '{out}' is inside SRC '{sources[0]}': give a folder outside of it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT '{out}' is a file: give a new folder")
    names = images.names()
    packed.as_lines(names)  # refuses names with line breaks, before a folder is made
    make_folder(out, "give another OUT")
    with locked(out, f"another process is packing into '{out}': wait for it"):
        index = begin(sources, out, img_size, len(names), images.fingerprint())
        if not (out / PACK_INDEX).is_file():
            complete(images, names, sources[0], out, index, num_workers)
    return index


def complete(
    images: Images, names: list[str], source: str, out: Path, index: dict, num_workers: int
) -> None:
    """Pack what is missing of `out`, which this process holds, and bring `index` up to date."""
    remove_leftovers(out)  # of a run that was killed while writing
    img_size = index["img_size"]
    done, total = index["sources_done"], index["sources"]
    check_room(out, (total - done) * 3 * img_size**2)
    if done:
        print(f"'{out}': continues after {done:,} of {total:,} files", flush=True)
    else:
        write_json(out / PACK_UNFINISHED, index)
    pack_rest(images, out, index, num_workers)
    if not index["count"]:
        first = index["skipped"][0]
        raise ValueError(
            f"none of the {total:,} files in '{source}' is an image, '{first['name']}' for "
            f"example: {first['reason']}; give a folder with images that can be read"
        )
    packed.finish(out, index, names)


def main(argv: Sequence[str] | None = None) -> dict:
    """Pack or verify as the flags say and return the index.

    Raises:
        ValueError: for bad input.
    """
    parser = Parser.of(__file__, __doc__)
    add, side, workers = parser.add_argument, number(int, 16, MAX_SIDE), number(int, 0, 1024)
    add("source", nargs="*", metavar="SRC", help="a folder of images, nested too, or tars")
    add("out", metavar="OUT", help="the folder to write, or to continue")
    add("--img-size", type=side, default=128, help="pixels a side, as in train.py")
    add("--num-workers", type=workers, default=util.cpu_cores(), help="decoding processes")
    add(
        "--verify",
        action="store_true",
        help="read OUT again and compare checksums; without SRC, OUT must be complete",
    )
    flags = parser.parse_intermixed_args(argv)
    if not flags.source and not flags.verify:
        parser.error("SRC and OUT are needed; OUT alone goes with --verify")
    out = Path(flags.out)
    try:
        if not flags.source:
            index = read_pack(out)
        else:
            index = pack(flags.source, out, flags.img_size, flags.num_workers)
            size, written = index["img_size"], sum(shard["bytes"] for shard in index["shards"])
            print(
                f"'{out}' is complete: {index['count']:,} images of {size}x{size} pixels, "
                f"{size_text(written)} in {len(index['shards'])} shards; "
                f"{len(index['skipped'])} files skipped"
                + (f", listed in {out / PACK_INDEX}" if index["skipped"] else "")
            )
        if flags.verify:
            packed.verify(out, index)
    except OSError as error:
        if error.filename is None:  # standard output
            raise
        raise ValueError(f"'{error.filename}': {error.strerror or error}; {AGAIN}") from error
    return index


if __name__ == "__main__":
    exits.run_script(main, "to go on: the same command")
