"""Files of images: found, decoded to RGB, resized, cropped; the one way from files to pixels."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from files import is_of_the_disk, reason_of, walk
from output import printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
IMAGE_SUFFIXES += (".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
ADVICE = "; repair it, or leave it out by --skip-corrupt, where the command has that flag"


class UnreadableImage(ValueError):
    """A file with the suffix of an image that cannot be decoded (not an error of the disk).

    Takes one string: a DataLoader raises a worker's error again as `type(text of its traceback)`.
    """

    def without_advice(self) -> str:
        """The message for a command that leaves the image out."""
        return str(self).removesuffix(ADVICE)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; 16-bit grey is scaled to 8 bits, transparency is laid over white."""
    transparent = image.info.get("transparency")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("grey levels outside 0..65535; save it with 8 or 16 bits")
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        bits, white_is_zero = tags.get(BITS_PER_SAMPLE, (16,)), tags.get(PHOTOMETRIC) == 0
        if bits[0] != 16 or white_is_zero:
            what = "grey TIFF of 12 or 32 bits, or with white as 0"
            raise ValueError(f"{what}; save it with 8 or 16 bits")
        if isinstance(transparent, int):
            levels[levels == transparent] = 65535
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if isinstance(transparent, tuple) and max(transparent) > 255:  # Pillow has cut the pixels to 8
        raise ValueError("a transparent colour of 16 bits; save it with 8 bits, or with alpha")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _spread_transparency(png: Image.Image) -> None:
    """Grey PNGs of 1, 2 and 4 bits: Pillow spreads their pixels over 8, but not this level."""
    levels = {"1": 1, "L;2": 3, "L;4": 15}.get(png.tile[0][3] if png.tile else None)
    level = png.info.get("transparency")
    if png.format == "PNG" and levels and isinstance(level, int):
        png.info["transparency"] = level * 255 // levels


@functools.cache
def _formats() -> list[str]:
    """Pillow formats of `IMAGE_SUFFIXES` alone: others may start programs such as Ghostscript."""
    known = Image.registered_extensions()
    return sorted({known[suffix] for suffix in IMAGE_SUFFIXES if suffix in known})


def read_image(path: str | os.PathLike, data: BinaryIO | None = None) -> Image.Image:
    """An image file as RGB: upright, its first frame, transparency over white.

    `data`: an open binary file to read instead; `path` is then for error messages alone.

    Raises:
        UnreadableImage: one line that names the file; also for more than 89,478,485 pixels.
        ValueError: one line; the disk, or a lack of memory, keeps the file from being read.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at each reading of the several damaged EXIF blocks in ImageNet.
            warnings.simplefilter("ignore")
            if data is None and not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError("it is not a regular file")  # opening a pipe would wait for ever
            with Image.open(data or path, formats=_formats()) as file:
                if file.width * file.height > Image.MAX_IMAGE_PIXELS:
                    size, most = f"{file.width}x{file.height}", Image.MAX_IMAGE_PIXELS
                    raise ValueError(f"{size} pixels are more than Pillow's limit of {most:,}")
                _spread_transparency(file)
                file.load()  # outside the next block, which would hide its errors
                with contextlib.suppress(Exception):  # damage to EXIF is no damage to the pixels
                    ImageOps.exif_transpose(file, in_place=True)
                return _to_rgb(file)
    except Exception as error:  # on a damaged file, Pillow's decoders raise almost anything
        nowhere = getattr(error, "errno", None) in (errno.ENOENT, errno.ELOOP)  # as some links
        if is_of_the_disk(error) and not nowhere:
            reason = reason_of(error)
            raise ValueError(f"cannot read {printable(path)}: {reason}; try again") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read image {printable(path)}: {reason}{ADVICE}") from error


def fit(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` (bilinear, antialiased), then the centre square, as torchvision does."""
    (width, height), most = image.size, 64 * min(image.size)
    if max(image.size) > most:  # a strip: do not enlarge, at any cost, what is cut off
        left, top = max(0, width - most) // 2, max(0, height - most) // 2
        image = image.crop((left, top, left + min(width, most), top + min(height, most)))
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def list_files(root: Path, suffixes: Sequence[str]) -> tuple[list[str], str | None]:
    """Paths below a folder, to any depth, of the files with these suffixes, in order; one other.

    Links are followed, hidden files and folders are skipped.

    Raises:
        ValueError: for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot list folder '{error.filename}': {error.strerror}") from error

    paths = []
    for folder, subfolders, files in walk(root, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        below = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        paths += [(below + name).removeprefix("./") for name in files if name[0] != "."]
    wanted = sorted(path for path in paths if path.lower().endswith(tuple(suffixes)))
    return wanted, min(set(paths).difference(wanted), default=None)


def find(inputs: Sequence[str], suffixes: Sequence[str]) -> list[tuple[Path, Path]]:
    """(file, its path below the folder that was given) of every input, in order.

    Inputs are files, with any suffix, and folders, which `list_files` searches.

    Raises:
        ValueError: an input does not exist, or a folder holds no such file.
    """
    found = []
    for path in map(Path, inputs):
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


def some(items: Sequence, limit: int | None) -> list:
    """At most `limit` of the items, evenly over all of them; all for None."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]
