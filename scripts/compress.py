"""Images to `.rfsq` files and back, with the model of a checkpoint.

    python scripts/compress.py encode IMAGE... --load runs/NAME/last.pt --out DIR
    python scripts/compress.py decode FILE... --load runs/NAME/last.pt --out DIR
    python scripts/compress.py fit IMAGE... --load runs/NAME/last.pt --out runs/NAME/coded.pt

Images may have any size; inputs are files and folders. An output has the path of its input below
the given folder (see `outputs`). `fit` learns an entropy model from training images (a linear
prediction of each channel, and counts of the codes for each prediction), and writes a copy of the
checkpoint that contains it, for `encode --entropy-coding`. The layout of a file is documented in
`codec/bitstream.py`.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
import util
from arguments import LOAD_HELP, Parser, number
from checkpoint import save_checkpoint
from codec import bitstream
from codec.codec import Codec
from codec.pixels import is_grey, psnr
from dataset.images import IMAGE_SUFFIXES, UnreadableImage, find, read_image, some
from files import make_folder, write_json, write_whole
from similarity import PSNR_CAP

SUFFIX = ".rfsq"


def check_output(path: Path, flags: Namespace) -> None:
    """Raises ValueError if `path` exists and may not be replaced."""
    if path.is_dir() or (os.path.lexists(path) and not flags.force):
        keep = "" if flags.run is fit else ", --keep-existing to continue"
        advice = "" if path.is_dir() else f"{keep}, or --force to replace it"
        raise ValueError(f"{path} exists: give another --out{advice}")


def outputs(files: Sequence[tuple[Path, Path]], folder: Path, suffix: str) -> list[Path]:
    """The output of each (file, its path below the folder given), in `folder`.

    `suffix` replaces that of the file: a.png becomes a.rfsq. Only where outputs would be the same
    it is appended: a.jpg beside a.png become a.jpg.rfsq and a.png.rfsq.

    Raises:
        ValueError: two outputs are still the same.
    """
    paths = [folder / below.with_suffix(suffix) for _, below in files]
    longer = [folder / f"{below}{suffix}" for _, below in files]
    while True:  # a longer name may be that of another file: a.jpg.png becomes a.jpg.rfsq
        counts, before = Counter(paths), paths
        paths = [x if counts[out] > 1 else out for out, x in zip(paths, longer, strict=True)]
        if paths == before:
            break
    taken: dict[Path, Path] = {}
    for out, (file, _) in zip(paths, files, strict=True):
        if out in taken:
            raise ValueError(
                f"{taken[out]} and {file} would both become {out}: give them one at a time, with "
                "another --out"
            )
        taken[out] = file
    return paths


def prepare(
    flags: Namespace, suffixes: Sequence[str], suffix: str
) -> tuple[Codec, Iterable[tuple[Path, Path, Path]]]:
    """The codec, and (file, its path below the folder given, output) of every input.

    Raises:
        ValueError: two outputs would be the same, or one exists and may not be replaced.
    """
    files = find(flags.inputs, suffixes)
    paths = outputs(files, Path(flags.out), suffix)
    for out in paths:
        if not (flags.keep_existing and out.is_file()):
            check_output(out, flags)
    codec = Codec(flags.load, util.setup_processes())
    for out in paths if flags.run is encode else ():
        existing(codec, out, flags)  # refuse files of another model before anything is written
    work = [(*file, out) for file, out in zip(files, paths, strict=True)]
    return codec, output.progress(work, flags.command, "files")


def read_coded(codec: Codec, path: Path) -> bytes:
    """The bytes of a `.rfsq` file, read whole only if it is no larger than its header allows."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        head = file.read(bitstream.HEAD_BYTES)
        codec.format.check_claim(head, path.stat().st_size)
        return head + file.read()


def existing(
    codec: Codec, out: Path, flags: Namespace, image: np.ndarray | None = None
) -> bytes | None:
    """The output that `--keep-existing` keeps; None if there is none, or if it is to be replaced.

    By its header: another image of the same size is not noticed.

    Raises:
        ValueError: it is damaged, or was not written by this model with these flags, or not for
            this image: the size differs, or one is grey and the other is not. Not with `--force`.
    """
    if not (flags.keep_existing and out.is_file()):
        return None
    try:
        data = read_coded(codec, out)
        header = codec.format.check(data)
        stages = flags.stages or codec.stages
        if header.stages != stages:
            raise ValueError(f"the file has {header.stages} stages, not {stages}")
        if header.coded != flags.entropy_coding:
            raise ValueError(f"the file is {'' if header.coded else 'not '}entropy-coded")
        if image is not None:
            size = header.height, header.width
            if size != image.shape[:2] or header.grey != is_grey(image):
                raise ValueError(
                    "the file is of another image: its size, or whether it is grey, differs"
                )
    except ValueError as error:
        if flags.force:
            return None
        advice = "give another --out, or --force to replace it"
        raise ValueError(f"{out} cannot be kept: {error}; {advice}") from error
    return data


def say(line: str) -> None:
    """Print above the progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def readable(
    files: Iterable[tuple], skip: bool, skipped: list[tuple[str, str]]
) -> Iterator[tuple[np.ndarray, tuple]]:
    """(image, uint8 (H, W, 3), and entry) of each entry (file, its path below the folder, ...).

    With `skip`, images that cannot be read are left out: `skipped` gets their paths and the errors.

    Raises:
        ValueError: an image cannot be read and `skip` is false, or none can be read.
    """
    number = 0
    for entry in files:
        try:
            image = np.asarray(read_image(entry[0]))
        except UnreadableImage as error:
            if not skip:
                raise
            skipped.append((str(entry[1]), error.without_advice()))
            continue
        number += 1
        yield image, entry
    if not number:
        first = skipped[0][1]
        raise ValueError(
            f"no image is left of {len(skipped)}: give readable ones; the first: {first}"
        )


def say_skipped(skipped: list[tuple[str, str]]) -> None:
    """Print which images were left out, and why."""
    if skipped:
        errors = (output.printable(error) for _, error in skipped)
        say("\n".join([f"{len(skipped)} files skipped:", *errors]))


def encode(flags: Namespace) -> dict:
    """Encode images, decode what was written, and report bytes, bpp and PSNR."""
    codec, files = prepare(flags, IMAGE_SUFFIXES, SUFFIX)
    rows, kept, skipped = [], 0, []
    for image, (_, below, out) in readable(files, flags.skip_corrupt, skipped):
        old = existing(codec, out, flags, image)
        data = old or codec.encode(image, flags.stages, flags.entropy_coding)
        row = measure(codec, image, data)
        if old is None:
            make_folder(out.parent, "give another --out")
            write_whole(out, lambda file, data=data: file.write(data))
        say(
            f"{output.printable(below)}  {row['width']}x{row['height']}  {len(data):,} bytes  "
            f"{row['bpp']:.4f} bpp (without header {row['payload_bpp']:.4f})  {row['psnr']:.2f} dB"
            f"{saving(row, flags)}{'  kept' if old else ''}"
        )
        kept += old is not None
        rows.append({"name": str(below), **row, "output": str(out)})
    sums = {key: sum(row[key] for row in rows) for key in ("bytes", "fixed_bytes")}
    pixels = sum(row["width"] * row["height"] for row in rows)
    mean = sum(row["psnr"] for row in rows) / len(rows)
    seconds, total = codec.seconds, sum(codec.seconds.values())
    say(
        f"{len(rows)} images{f', {kept} of them kept' if kept else ''}  {sums['bytes']:,} bytes  "
        f"{8 * sums['bytes'] / pixels:.4f} bpp  mean {mean:.2f} dB{saving(sums, flags)}  (packing "
        f"and unpacking: {100 * seconds['packing'] / total:.1f} % of {total:.1f} s)"
    )
    say_skipped(skipped)
    result = {"images": rows, "kept": kept, "skipped": [path for path, _ in skipped]}
    return {**result, **sums, "psnr": mean, "seconds": seconds}


def measure(codec: Codec, image: np.ndarray, data: bytes) -> dict:
    """Sizes, rates and PSNR of an image's file; an exact one counts as `PSNR_CAP`, 100 dB."""
    header = bitstream.read_header(data)
    payload = len(data) - header.size - 4  # with image statistics
    pixels = header.width * header.height
    return {
        "width": header.width,
        "height": header.height,
        "bytes": len(data),
        "payload_bytes": payload,
        "bpp": 8 * len(data) / pixels,
        "payload_bpp": 8 * payload / pixels,
        "fixed_bytes": codec.format.length(replace(header, flags=0, payload=None)),
        "psnr": min(psnr(image, codec.decode(data)), PSNR_CAP),
    }


def saving(row: dict, flags: Namespace) -> str:
    """The saving of entropy coding, in words; empty at fixed rate."""
    if not flags.entropy_coding:
        return ""
    size, fixed = row["bytes"], row["fixed_bytes"]
    return f"  {100 * (1 - size / fixed):.1f} % less than {fixed:,} bytes at fixed rate"


def decode(flags: Namespace) -> dict:
    """Decode files to PNG images, grey ones with a single channel."""
    codec, files = prepare(flags, [SUFFIX], ".png")
    rows, kept, skipped = [], 0, []
    for path, below, out in files:
        if flags.keep_existing and out.is_file():
            kept += 1
            continue
        try:
            data = read_coded(codec, path)
            image = codec.decode(data, flags.stages)
        except ValueError as error:
            if not flags.skip_corrupt:
                raise ValueError(f"{path}: {error}") from error
            skipped.append((str(below), f"{path}: {error}"))
            continue
        make_folder(out.parent, "give another --out")
        grey = bitstream.read_header(data).grey
        png = Image.fromarray(image[..., 0] if grey else image)
        write_whole(out, lambda file, png=png: png.save(file, "PNG"))
        row = {"name": str(below), "width": image.shape[1], "height": image.shape[0]}
        say(f"{output.printable(below)}  {row['width']}x{row['height']}  {output.printable(out)}")
        rows.append({**row, "bytes": len(data), "output": str(out)})
    if skipped and not (rows or kept):
        raise ValueError(f"none of {len(skipped)} files can be decoded; the first: {skipped[0][1]}")
    say_skipped(skipped)
    paths = [path for path, _ in skipped]
    return {"files": rows, "kept": kept, "skipped": paths, "seconds": codec.seconds}


def fit(flags: Namespace) -> dict:
    """Count the codes of images, and write a checkpoint with an entropy model of them."""
    files, out = some(find(flags.inputs, IMAGE_SUFFIXES), flags.limit), Path(flags.out)
    check_output(out, flags)
    codec = Codec(flags.load, util.setup_processes())
    counts, skipped = codec.counts(), []
    for image, _ in readable(output.progress(files, "fit", "images"), flags.skip_corrupt, skipped):
        counts.add(codec.encode_indices(image)[0])
    make_folder(out.parent, "give another --out")
    save_checkpoint(out, codec.fit(counts))
    number = len(files) - len(skipped)
    say(f"counted the codes of {number} images\n{out}")
    say_skipped(skipped)
    paths = [path for path, _ in skipped]
    return {"images": number, "skipped": paths, "output": str(out)}


def get_parser() -> Parser:
    """The parser of the three commands."""
    parser = Parser.of(__file__, __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, inputs, where, out in (
        (encode, "IMAGE", "DIR", "folder for the files"),
        (decode, "FILE", "DIR", "folder for the images, PNG"),
        (fit, "IMAGE", "FILE", "checkpoint to write"),
    ):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run, keep_existing=False)
        add = command.add_argument
        add("inputs", nargs="+", metavar=inputs, help="files, and folders of them")
        add("--load", required=True, metavar="MODEL", help=LOAD_HELP)
        add("--out", required=True, metavar=where, help=out)
        add("--force", action="store_true", help="replace existing outputs")
        add("--json", metavar="FILE", help="write the results there as well")
        if run is fit:
            limit_help = "so many images, evenly over all; default: all"
            add("--limit", type=number(int, 1), metavar="N", help=limit_help)
        else:
            add("--stages", type=number(int, 1), help="first stages only; default: all")
            keep_help = "continue: keep the files of this model that are there"
            if run is decode:
                keep_help = "continue: keep the files that are there, whatever they show"
            add("--keep-existing", action="store_true", help=keep_help)
        add("--skip-corrupt", action="store_true", help="leave out and list unreadable files")
        if run is encode:
            add("--entropy-coding", action="store_true", help="with the tables of `fit`")
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    """Run a command, and return what `--json` writes; ValueError for bad input."""
    flags = get_parser().parse_args(argv)
    util.refuse_torchrun()
    output.check_json(flags.json)
    result = flags.run(flags)
    if flags.json:
        write_json(Path(flags.json), result)
    return result


if __name__ == "__main__":
    exits.run_script(main, "to go on with encode or decode: the same command with --keep-existing")
