"""Tokens of a data set, as arrays that numpy maps: what a generative model trains on.

    tokens.npy              unsigned (N, h, w[, stages]), the smallest type that holds the codes
    tokens-flipped.npy      the same of the mirrored images (--flip)
    statistics.npy          float16 (N, stages, 2, C), of models whose decoder needs them
    statistics-flipped.npy
    labels.npy              unsigned (N,), numbers of the classes, if every image is in a folder
    names.txt               line i + 1 is the image of row i
    index.json              the model, its codes, image size, classes, images that were left out

`scripts/make_tokens.py` writes them. While it does, the arrays are called `.part`: each process
writes the rows of its images in place, and then marks them in done.part. A row is
marked when it is on the disk, so that a run which is killed at any time continues at the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset.packed import as_lines
from files import locked, make_folder, parse_json, unwritable, write_json, write_whole

HEAD = {"format": "rfsq tokens", "version": 1}
INDEX, NAMES, LABELS = "index.json", "names.txt", "labels.npy"
SETTINGS, DONE = "settings.part", "done.part"  # of an unfinished run
TO_DO, WRITTEN, LEFT_OUT = 0, 1, 2  # what done.part holds of each image
BLOCK = 2**24  # bytes that are copied at once


def smallest_unsigned(most: int) -> np.dtype:
    """The smallest unsigned type that holds `most`."""
    return np.min_scalar_type(most)


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The bytes of a `.npy` file before its values."""
    file, descr = io.BytesIO(), np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """The size of a `.npy` file."""
    return len(_header(dtype, shape)) + dtype.itemsize * math.prod(shape)


def _has_bytes(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Within `with`, an error of the disk becomes a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        advice = "make room and give the same command again, which continues"
        raise ValueError(unwritable(path, error, advice)) from error


def held(out: Path) -> AbstractContextManager[None]:
    """Make the folder, if it is missing, and hold it within `with`: one command writes there.

    Raises:
        ValueError: another process holds it, or it cannot be made.
    """
    make_folder(out, "give another --out")
    return locked(out, f"another process is writing to {out}: wait for it, or give another --out")


def begin(out: Path, settings: dict) -> dict | None:
    """Make the files of a new run, or check that those of an old one are of the same `settings`.

    Args:
        out: the folder, which is `held`.
        settings: plain types; 'sources', the number of images, and 'arrays', of each name its
            'dtype' and the 'shape' of a row.

    Returns:
        The index, if the folder is complete already.

    Raises:
        ValueError: the folder holds something else, or tokens of other settings.
    """
    if (out / INDEX).is_file():
        index = _read(out / INDEX, settings)
        kinds = {"count": int, "skipped": list, "classes": list | None}
        if not all(key in index and isinstance(index[key], kinds[key]) for key in kinds):
            raise ValueError(f"{out / INDEX} is damaged: give another --out, or remove {out} first")
        _check_sizes(out, index)
        _check_names(out, index)
        for left in (SETTINGS, DONE):  # by a kill
            (out / left).unlink(missing_ok=True)
        return index
    if (out / SETTINGS).is_file():
        _read(out / SETTINGS, settings)
        _check_unfinished(out, settings)
        return None
    # A run that is killed in here leaves files of zeros, and no settings.
    parts = {f"{name}.part" for name in settings["arrays"]} | {DONE}
    strange = sorted(path.name for path in out.glob("[!.]*") if path.name not in parts)
    if strange:
        raise ValueError(f"{out} holds other files ('{strange[0]}'): give a new folder as --out")
    for name, (dtype, shape) in _rows(settings).items():
        header = _header(dtype, (settings["sources"], *shape))
        path = out / f"{name}.part"
        with _writing(path), open(path, "wb") as file:
            file.write(header)
            file.truncate(_bytes(dtype, (settings["sources"], *shape)))
    with _writing(out / DONE):
        (out / DONE).write_bytes(bytes(settings["sources"]))
    write_json(out / SETTINGS, HEAD | settings)
    return None


def _read(path: Path, settings: dict) -> dict:
    """An index, or the settings of an unfinished run; ValueError if it is not of `settings`."""
    other = f"give another --out, or remove {path.parent} first"
    settings = json.loads(json.dumps(settings))  # a tuple is a list there
    try:
        found = parse_json(path.read_bytes())
        differ = [key for key in (*HEAD, *settings) if found.get(key) != (HEAD | settings)[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not of make_tokens.py, or is damaged: {other}") from error
    if differ:
        key = differ[0]
        was, now = found.get(key), (HEAD | settings)[key]
        if key == "arrays" and isinstance(was, dict) and was.keys() != now.keys():
            made, give = ("with", "give") if len(was) > len(now) else ("without", "leave out")
            raise ValueError(
                f"{path.parent} holds tokens made {made} --flip: {give} --flip, {other}"
            )
        raise ValueError(
            f"{path.parent} holds tokens of another {key.replace('_', ' ')} ({was!r:.80}, not "
            f"{now!r:.80}): {other}"
        )
    return found


def _check_sizes(out: Path, index: dict) -> None:
    """Raises ValueError if a finished array is missing or cut off."""
    count = index.get("count", 0)
    for name, (dtype, shape) in _rows(index).items():
        size = _bytes(dtype, (count, *shape))
        if not _has_bytes(out / name, size):
            raise ValueError(
                f"{out / name} is missing or has not the {size:,} bytes of {count:,} images: copy "
                f"the folder again, or remove {out} and make the tokens again"
            )


def _check_names(out: Path, index: dict) -> None:
    """Raises ValueError if the names or the labels of a finished run are not those of its index."""
    digest, wrong = index.get("names_sha256"), None
    if digest is not None:
        names = (out / NAMES).read_bytes() if (out / NAMES).is_file() else b""
        wrong = NAMES if hashlib.sha256(names).hexdigest() != digest else None
    if index["classes"] is not None:
        dtype = smallest_unsigned(max(0, len(index["classes"]) - 1))
        if not _has_bytes(out / LABELS, _bytes(dtype, (index["count"],))):
            wrong = LABELS
    if wrong:
        raise ValueError(
            f"{out / wrong} is missing or is not that of the index: copy the folder again, or "
            f"remove {out} and make the tokens again"
        )


def _check_unfinished(out: Path, settings: dict) -> None:
    """Raises ValueError if the files of an interrupted run are not as it left them."""
    marks = np.fromfile(out / DONE, np.uint8) if (out / DONE).is_file() else np.empty(0, np.uint8)
    sound = len(marks) == settings["sources"] and marks.max() <= LEFT_OUT
    kept = int(np.count_nonzero(marks == WRITTEN))
    for name, (dtype, shape) in _rows(settings).items():
        # A run that was killed in `finish` may have given an array its name already.
        part, count = out / f"{name}.part", settings["sources"]
        if not part.exists():
            part, count = out / name, kept
        sound = sound and _has_bytes(part, _bytes(dtype, (count, *shape)))
    if not sound:
        raise ValueError(
            f"the files of an interrupted run in {out} are missing or damaged: remove the folder "
            "and make the tokens again"
        )


def _rows(settings: dict) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """(type, shape of a row) of each array."""
    arrays = settings["arrays"].items()
    return {name: (np.dtype(row["dtype"]), tuple(row["shape"])) for name, row in arrays}


def to_do(out: Path) -> np.ndarray:
    """The images whose rows are not written yet, in order."""
    return np.flatnonzero(np.fromfile(out / DONE, np.uint8) == TO_DO)


class TokenWriter:
    """Writes rows of the arrays that `begin` has made; several processes write at the same time.

    Args:
        out: the folder.
        settings: those of `begin`.
    """

    def __init__(self, out: Path, settings: dict) -> None:
        self.sources, self.rows = settings["sources"], _rows(settings)
        self.files: dict[str, BinaryIO] = {
            name: open(out / f"{name}.part", "r+b")  # noqa: SIM115
            for name in self.rows
        }
        self.done = open(out / DONE, "r+b")  # noqa: SIM115
        self.pending: list[tuple[int, bytes]] = []  # (first image, marks), not on the disk yet

    def write(self, first: int, kept: np.ndarray, arrays: dict) -> None:
        """Write the rows of consecutive images.

        Args:
            first: number of the first image.
            kept: bool (images,), those that could be read.
            arrays: {name: values (kept.sum(), *row)}.

        Raises:
            ValueError: values that the type of the array does not hold, more rows than images, or a
                disk that is full.
        """
        if first < 0 or first + len(kept) > self.sources:
            raise ValueError(
                f"rows {first} to {first + len(kept) - 1} were given, of {self.sources} images"
            )
        for name, (dtype, shape) in self.rows.items():
            block = np.zeros((len(kept), *shape), dtype)
            if kept.any():
                values = np.asarray(arrays[name])
                most = np.iinfo(dtype).max if dtype.kind == "u" else np.inf
                if values.max() > most or (dtype.kind == "u" and values.min() < 0):
                    raise ValueError(
                        f"{name} holds {dtype}, but the values run from {values.min()} to "
                        f"{values.max()}: give `begin` the type of `smallest_unsigned`"
                    )
                block[kept] = values
            start, file = len(_header(dtype, (self.sources, *shape))), self.files[name]
            with _writing(file.name):
                file.seek(start + first * block[0].nbytes)
                file.write(block.tobytes())
        marks = np.where(kept, WRITTEN, LEFT_OUT).astype(np.uint8)
        self.pending.append((first, marks.tobytes()))

    def flush(self) -> None:
        """Bring all rows to the disk, and then mark them."""
        for file in self.files.values():
            with _writing(file.name):
                file.flush()
                os.fsync(file.fileno())
        with _writing(self.done.name):
            for first, marks in self.pending:
                self.done.seek(first)
                self.done.write(marks)
            self.done.flush()
            os.fsync(self.done.fileno())
        self.pending.clear()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_) -> None:
        try:
            self.flush()  # also when an image that cannot be read ends the run
        finally:
            for file in (*self.files.values(), self.done):
                with contextlib.suppress(OSError):  # `flush` has told it
                    file.close()


def finish(out: Path, settings: dict, names: Sequence[str] | None) -> dict:
    """Give the arrays their names, without the rows of images that were left out; the index last.

    Args:
        out: the folder; all its images are done.
        settings: those of `begin`.
        names: of all images; None where images have no names.

    Returns:
        The index: the settings, 'count' (rows), 'skipped' (names of unreadable images), 'classes'
        (names of the numbers in labels.npy, None without) and 'names_sha256'.

    Raises:
        ValueError: no image could be read, or some are not done.
    """
    marks = np.fromfile(out / DONE, np.uint8)
    if not marks.all():  # TO_DO is 0
        missing = np.count_nonzero(marks == TO_DO)
        raise ValueError(
            f"{out}: {missing:,} of {len(marks):,} images are not done: give the same command again"
        )
    kept = marks == WRITTEN
    if not kept.any():
        raise ValueError(f"none of the {len(kept):,} images can be read: give another folder")
    for name in settings["arrays"]:
        part = out / f"{name}.part"
        if part.exists():  # else a run was killed after this
            if not kept.all():
                write_whole(out / name, lambda file, part=part: _write_kept(file, part, kept))
                part.unlink()
            else:
                os.replace(part, out / name)
    index = {**HEAD, **settings, "count": int(kept.sum())}
    index |= {"skipped": [], "classes": None, "names_sha256": None}
    if names is not None:
        index["skipped"] = [names[i] for i in np.flatnonzero(~kept)]
        names = [names[i] for i in np.flatnonzero(kept)]
        lines = as_lines(names)
        write_whole(out / NAMES, lambda file: file.write(lines))
        index["names_sha256"] = hashlib.sha256(lines).hexdigest()
        if all("/" in name for name in names):
            folders = [name.split("/")[0] for name in names]
            classes, labels = np.unique(folders, return_inverse=True)
            labels = labels.astype(smallest_unsigned(len(classes) - 1))
            write_whole(out / LABELS, lambda file: np.save(file, labels))
            index["classes"] = classes.tolist()
    write_json(out / INDEX, index)
    for name in (SETTINGS, DONE):
        (out / name).unlink()
    return index


def _write_kept(file: BinaryIO, part: Path, kept: np.ndarray) -> None:
    """Write the array of `part` without the rows that are not kept."""
    array = np.load(part, mmap_mode="r", allow_pickle=False)
    file.write(_header(array.dtype, (int(kept.sum()), *array.shape[1:])))
    rows = max(1, BLOCK // array[0].nbytes)
    for first in range(0, len(array), rows):
        file.write(array[first : first + rows][kept[first : first + rows]].tobytes())
