"""Tars of images, read where they are: nothing is unpacked.

    ILSVRC2012_img_val.tar       a tar of images
    ILSVRC2012_img_train.tar     a tar of tars; n01440764.tar stands for the folder n01440764
    shard-{000000..000146}.tar   several tars as one set, such as those of webdataset

The images have the names that they get where each tar is unpacked, all of them into one folder.
Only regular files are read. Links, devices and sparse files are passed over; names serve as text,
and never as places on the disk.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np

from files import reason_of
from output import printable, progress
from util import rank

SUFFIX = ".tar"
MAX_HEADER = 2**20  # bytes; of a name, say, that a tar spells out in a block of its own
MAX_TARS = 100_000


def is_tar(path: str | os.PathLike) -> bool:
    """Whether a path names a tar, or several with braces, and no folder."""
    return os.fspath(path).endswith(SUFFIX) and not os.path.isdir(path)


def expand(pattern: str) -> list[str]:
    """The paths that braces stand for, as in a shell: a-{000..146}.tar, {train,val}.tar.

    Raises:
        ValueError: they are too many.
    """
    if os.path.exists(pattern):
        return [pattern]
    parts = []
    for text in re.split(r"(\{\d+\.\.\d+\}|\{[^{}]*,[^{}]*\})", pattern):
        if span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text):
            first, last = span.groups()
            # As in bash: with a leading zero, all get the longer width.
            zeros = any(len(number) > 1 and number[0] == "0" for number in span.groups())
            width = max(len(first), len(last)) if zeros else 0
            if not 0 <= int(last) - int(first) < MAX_TARS:
                raise ValueError(f"{text} in {pattern} must count up, to at most {MAX_TARS:,} tars")
            parts.append([f"{i:0{width}}" for i in range(int(first), int(last) + 1)])
        else:
            parts.append(text[1:-1].split(",") if re.fullmatch(r"\{.*\}", text) else [text])
    paths = ["".join(path) for path in itertools.islice(itertools.product(*parts), MAX_TARS + 1)]
    if len(paths) > MAX_TARS:
        raise ValueError(f"{pattern} stands for more than {MAX_TARS:,} tars: give fewer")
    return paths


class Section(io.RawIOBase):
    """A part of a file that is read as if it were a file: `size` bytes from `start` on."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if origin + offset < 0:
            raise ValueError("a position before the beginning")
        self.position = origin + offset
        return self.position

    def readinto(self, buffer) -> int:
        length = max(0, min(len(buffer), self.size - self.position))
        part = memoryview(buffer)[:length]
        count = os.preadv(self.file.fileno(), [part], self.start + self.position)
        self.position += count
        return count


class _Headers(Section):
    """A file for `tarfile` in which a header that claims to be huge fills no memory."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        return super().read(size) or b""


def _members(tar: Section) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of each regular file in a tar, in its order.

    Raises:
        ValueError: it is no tar, damaged or cut off.
    """
    headers, offset = _Headers(tar.file, tar.start, tar.size), 0
    try:
        with tarfile.open(fileobj=headers, mode="r:") as reader:
            # Python 3.10 fails at the second `next` of a tar without members.
            for member in iter(reader.next, None) if reader.firstmember else ():
                reader.members.clear()  # a million of them would take a gigabyte
                end = member.offset_data + member.size
                if member.size < 0 or end > tar.size or reader.offset <= offset:
                    raise ValueError(f"the size of '{member.name:.80}' is wrong")
                offset = reader.offset
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            # `tarfile` ends without an error at a header that is damaged or missing. A tar that is
            # whole ends with zeros.
            headers.seek(reader.offset)
            if headers.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"it is damaged or cut off at byte {reader.offset:,}")
    except (tarfile.TarError, OverflowError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _name(member: str) -> str:
    """A member's name as that of a file in a folder: no / or . in front, nothing above it."""
    return "/".join(part for part in member.split("/") if part not in ("", ".", ".."))


def _files(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of each regular file in a tar and in the tars within it.

    Raises:
        ValueError: one line that names the tar.
    """
    name = path
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise ValueError("is a folder" if os.path.isdir(path) else "it does not exist")
        with open(path, "rb", buffering=0) as file:
            for member, start, size in _members(Section(file, 0, os.path.getsize(path))):
                name, inner = path, _name(member)
                if "/." in f"/{inner}":  # hidden, such as the ._NAME.tar of a Mac
                    continue
                if not inner.endswith(SUFFIX):
                    yield inner, start, size
                    continue
                name, folder = f"{path}/{inner}", inner.removesuffix(SUFFIX)
                for below, offset, length in _members(Section(file, start, size)):
                    yield f"{folder}/{_name(below)}", start + offset, length
                name = path
    except ValueError as error:
        raise ValueError(
            f"cannot read tar {printable(name)}: {printable(error)}; give plain tars (.tar, not "
            "compressed) that are whole"
        ) from error


def list_archives(
    paths: Sequence[str], suffixes: Sequence[str]
) -> tuple[list[str], np.ndarray, str | None]:
    """The files with these suffixes in tars, in the order of their names; hidden ones are skipped.

    Where a tar holds a name twice, the later file counts, as when it is unpacked.

    Returns:
        Names; int64 (N, 3), the number of the tar, start and size in bytes of each file; and the
        name of a file with another suffix, if there is one.

    Raises:
        ValueError: a tar cannot be read, or two tars hold the same name.
    """
    names, places, other = [], [], None
    shown = rank() == 0 and len(paths) > 1
    for number, path in enumerate(progress(paths, "list", "tars", shown)):
        for name, start, size in _files(path):
            if "/." in f"/{name}" or "\0" in name or not name:
                continue
            if name.lower().endswith(tuple(suffixes)):
                names.append(name)
                places.append((number, start, size))
            else:
                other = other or name
    order = sorted(range(len(names)), key=names.__getitem__)
    kept = []
    for i in order:
        if kept and names[kept[-1]] == names[i]:
            one, two = (paths[places[k][0]] for k in (kept.pop(), i))
            if one != two:
                name = printable(names[i])
                raise ValueError(f"{one} and {two} both hold '{name}': give them one at a time")
        kept.append(i)
    table = np.array([places[i] for i in kept], np.int64).reshape(-1, 3)
    return [names[i] for i in kept], table, other


class _Member(io.BufferedReader):
    """A buffered section; error messages name it as they name a file."""

    def __init__(self, section: Section, name: str) -> None:
        super().__init__(section)
        self.path = name

    def __repr__(self) -> str:
        return repr(self.path)


@contextlib.contextmanager
def opened(tar: str, name: str, start: int, size: int) -> Iterator[io.BufferedReader]:
    """A file within a tar, by its name and the place that `list_archives` gives.

    Raises:
        ValueError: one line; the tar cannot be opened any more.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(tar, "rb", buffering=0))
        except OSError as error:
            reason = f"cannot read tar {printable(tar)}: {reason_of(error)}; try again"
            raise ValueError(reason) from error
        yield _Member(Section(file, start, size), f"{tar}/{name}")
