"""Images to `.rfsq` files and back, with the model of a checkpoint.

    python scripts/compress.py encode IMAGE... --load runs/NAME/last.pt --out DIR
    python scripts/compress.py decode FILE... --load runs/NAME/last.pt --out DIR
    python scripts/compress.py fit IMAGE... --load runs/NAME/last.pt --out runs/NAME/coded.pt

Images of any size, and folders of them; an output has the path of its input below the folder that
was given. `fit` counts the codes of training images for `encode --entropy-coding`, and writes a
checkpoint with these counts. The layout of a file is the docstring of `bitstream.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, number
from checkpoint import save_checkpoint, write_json, write_whole
from codec import bitstream, entropy
from codec.codec import Codec
from dataset import IMAGE_SUFFIXES, list_files, read_image

SUFFIX = ".rfsq"


# ---------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------
def find(inputs: Sequence[str], suffixes: Sequence[str]) -> list[tuple[Path, Path]]:
    """(file, its path below the folder that was given) of every input, in order.

    Folders are searched as `dataset.list_files` does. A file that is named itself may have any
    suffix.

    Raises:
        ValueError: for an input that does not exist, or a folder without such files.
    """
    found = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            below, _ = list_files(path, suffixes)
            if not below:
                raise ValueError(f"folder {path} holds no file named {' '.join(suffixes)}")
            found += [(path / file, Path(file)) for file in below]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise ValueError(f"{path} does not exist: give files or folders")
    return found


def outputs(
    files: Sequence[tuple[Path, Path]], folder: Path, suffix: str, force: bool
) -> list[Path]:
    """The output of each file, `folder` / its path with another suffix.

    Raises:
        ValueError: if two would be the same, or one exists already and is not to be replaced.
    """
    taken: dict[Path, Path] = {}
    for file, below in files:
        out = folder / below.with_suffix(suffix)
        if out in taken:
            raise ValueError(
                f"{taken[out]} and {file} would both become {out}: give them one at a time, with "
                "another --out"
            )
        if out.is_dir() or (out.exists() and not force):
            mend = "" if out.is_dir() else ", or --force to replace it"
            raise ValueError(f"{out} exists: give another --out{mend}")
        taken[out] = file
    return list(taken)


def some(items: Sequence, limit: int | None) -> list:
    """At most `limit` of the items, evenly over all of them; all for None."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def make_folder(folder: Path) -> None:
    """Make a folder, unless it is there; ValueError in one line if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be made ({error.strerror})") from error


def read_file(path: Path, codec: Codec) -> bytes:
    """The bytes of a `.rfsq` file, of which no more are read than its header can stand for.

    Raises:
        ValueError: one line without the path.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(bitstream.HEAD_BYTES)
            size = path.stat().st_size
            codec.check_claim(head, size)
            return head + file.read(size)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 images (H, W, 3), peak 255; infinite for equal ones."""
    # Row by row: a large image as floats would take eight times its memory.
    square = sum(int(np.square(x.astype(np.int32) - y).sum()) for x, y in zip(a, b, strict=True))
    return 10 * math.log10(255**2 * a.size / square) if square else math.inf


def finite(value: float) -> float | None:
    """JSON has no infinity: None for it."""
    return value if math.isfinite(value) else None


def progress(items: Sequence, unit: str) -> Iterable:
    """`items` with a progress bar, on a terminal."""
    return tqdm(items, unit=unit, disable=not sys.stderr.isatty())


def say(line: str) -> None:
    """Print, without tearing the progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------
def encode(flags) -> dict:
    """Encode every image, decode what was written, and report: see `--json`."""
    files = find(flags.inputs, IMAGE_SUFFIXES)
    names = outputs(files, Path(flags.out), SUFFIX, flags.force)
    codec = Codec(flags.load, util.setup_processes())
    codec.check_stages(flags.stages)
    if flags.entropy_coding:
        codec.check_entropy_model()
        entropy.load_constriction()
    rows = []
    for (path, below), out in zip(progress(files, "image"), names, strict=True):
        image = np.asarray(read_image(path))
        indices, statistics = codec.encode_indices(image)
        size = image.shape[:2]
        data = codec.write(indices, statistics, size, flags.stages, flags.entropy_coding)
        row = {"name": str(below), "width": size[1], "height": size[0], "bytes": len(data)}
        header = bitstream.read_header(data)
        fixed = codec.length(replace(header, flags=0, payload=None))
        row["payload_bytes"] = len(data) - header.size - 4  # with image statistics
        row["bpp"] = 8 * len(data) / (size[0] * size[1])
        row["payload_bpp"] = 8 * row["payload_bytes"] / (size[0] * size[1])
        row["fixed_bytes"] = fixed
        del indices  # what is measured is what the file holds
        row["psnr"] = psnr(image, codec.decode(data))
        make_folder(out.parent)
        write_whole(out, lambda file, data=data: file.write(data))
        saving = f"  {saved(len(data), fixed)}" if flags.entropy_coding else ""
        say(
            f"{below}  {size[1]}x{size[0]}  {len(data):,} bytes  {row['bpp']:.4f} bpp "
            f"(payload {row['payload_bpp']:.4f})  {row['psnr']:.2f} dB{saving}"
        )
        rows.append(row)
    total, fixed = (sum(row[key] for row in rows) for key in ("bytes", "fixed_bytes"))
    pixels = sum(row["width"] * row["height"] for row in rows)
    mean = sum(row["psnr"] for row in rows) / len(rows)
    seconds = codec.seconds
    share = 100 * seconds["packing"] / sum(seconds.values())
    saving = f"  {saved(total, fixed)}" if flags.entropy_coding else ""
    say(
        f"{len(rows)} images  {total:,} bytes  {8 * total / pixels:.4f} bpp  mean {mean:.2f} dB"
        f"{saving}  (packing and unpacking: {share:.1f} % of {sum(seconds.values()):.1f} s)"
    )
    for row in rows:
        row["psnr"] = finite(row["psnr"])
    sums = {"bytes": total, "fixed_bytes": fixed, "psnr": finite(mean)}
    return {"images": rows, **sums, "seconds": seconds}


def saved(size: int, fixed: int) -> str:
    """The saving of entropy coding, in words."""
    return f"{100 * (1 - size / fixed):.1f} % less than {fixed:,} bytes at fixed rate"


def decode(flags) -> dict:
    """Decode every file to a PNG."""
    files = find(flags.inputs, [SUFFIX])
    names = outputs(files, Path(flags.out), ".png", flags.force)
    codec = Codec(flags.load, util.setup_processes())
    rows = []
    for (path, below), out in zip(progress(files, "file"), names, strict=True):
        try:
            data = read_file(path, codec)
            image = codec.decode(data, flags.stages)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
        make_folder(out.parent)
        write_whole(out, lambda file, image=image: Image.fromarray(image).save(file, "PNG"))
        row = {"name": str(below), "width": image.shape[1], "height": image.shape[0]}
        say(f"{below}  {row['width']}x{row['height']}  {out}")
        rows.append({**row, "bytes": len(data), "output": str(out)})
    return {"files": rows, "seconds": codec.seconds}


def fit(flags) -> dict:
    """Count the codes of images, and write a checkpoint that has an entropy model of them."""
    files, out = find(flags.inputs, IMAGE_SUFFIXES), Path(flags.out)
    if out.is_dir() or (out.exists() and not flags.force):
        mend = "" if out.is_dir() else ", or --force to replace it"
        raise ValueError(f"{out} exists: give another --out{mend}")
    codec = Codec(flags.load, util.setup_processes())
    counts = codec.counts()
    files = some(files, flags.limit)
    for path, _ in progress(files, "image"):
        counts.add(codec.encode_indices(np.asarray(read_image(path)))[0])
    make_folder(out.parent)
    save_checkpoint(out, codec.fit(counts))
    say(f"counted the codes of {len(files)} images\n{out}")
    return {"images": len(files), "output": str(out)}


def main(argv: Sequence[str] | None = None) -> dict:
    """Do as the flags say, and return what `--json` writes.

    Raises:
        ValueError: for bad input.
    """
    parser = Parser(prog="compress.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, inputs, out in (
        (encode, "IMAGE", "folder for the files"),
        (decode, "FILE", "folder for the images, PNG"),
        (fit, "IMAGE", "checkpoint to write"),
    ):
        command = commands.add_parser(run.__name__, help=run.__doc__.split("\n")[0])
        command.set_defaults(run=run)
        command.add_argument("inputs", nargs="+", metavar=inputs, help="files, and folders of them")
        command.add_argument("--load", required=True, metavar="FILE", help="checkpoint")
        where = "DIR" if run is not fit else "FILE"
        command.add_argument("--out", required=True, metavar=where, help=out)
        command.add_argument("--force", action="store_true", help="replace what exists already")
        command.add_argument("--json", metavar="FILE", help="write the results there as well")
        if run is fit:
            command.add_argument(
                "--limit",
                type=number(int, 1),
                metavar="N",
                help="so many images, evenly over all; default: all",
            )
        else:
            command.add_argument(
                "--stages", type=number(int, 1), help="first stages only; default: all there are"
            )
        if run is encode:
            command.add_argument(
                "--entropy-coding", action="store_true", help="with the tables of `fit`"
            )
    flags = parser.parse_args(argv)
    if util.world_size() > 1:
        raise ValueError("this script runs in one process: start it without torchrun")
    result = flags.run(flags)
    if flags.json:
        write_json(Path(flags.json), result)
    return result


if __name__ == "__main__":
    util.run_script(main)
