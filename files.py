"""Files written whole or not at all, and places that one process holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

TEMPORARY = ".rfsq-tmp"  # suffix of a file that is being written
STANDARD_OUTPUT = "/dev/stdout"


def write_whole(path: str | Path, write: Callable, before: Callable = lambda: None) -> None:
    """Write a file whole or not at all: `write(binary file)` to a temporary one, then rename.

    `before()` is called between the two: it may write a second file, so that neither is replaced
    before both have room.

    A symbolic link stays one: the file that it names is written. So do devices and pipes, which
    are written as they are, /dev/stdout after what has been printed.

    Raises:
        ValueError: one line, if there is no room or no permission.
    """
    target, temporary = Path(os.path.realpath(path)), None
    try:
        if is_stream(path):
            printed = str(path) == STANDARD_OUTPUT  # opened again, it would begin at its start
            with open(os.dup(sys.stdout.fileno()) if printed else path, "wb") as file:
                sys.stdout.flush()
                write(file)
            return
        # A part of the name: with a suffix, a long one may be longer than file systems allow.
        name = f".{target.name[:40]}.{secrets.token_hex(4)}{TEMPORARY}"
        temporary = target.with_name(name)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, target)
    except BaseException as error:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()
        # Where the disk is full, `torch.save` raises another error while it handles that one.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise ValueError(unwritable(path, cause)) from error
        raise


def is_stream(path: str | Path) -> bool:
    """Whether a path names a device, a pipe or standard output."""
    path = Path(path)
    other = path.exists() and not (path.is_file() or path.is_dir())
    return other or str(path) == STANDARD_OUTPUT


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed in `write_whole` has left in a folder."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink()


def make_folder(folder: str | Path, advice: str) -> None:
    """Make a folder and those above it, where they do not exist.

    Raises:
        ValueError: one line that ends with `advice`, if that is impossible.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be made ({error.strerror}): {advice}") from error


def walk(root: Path, onerror: Callable | None = None) -> Iterator[tuple[str, list, list]]:
    """`os.walk` through links to folders, each folder once: a link to where it has been ends."""
    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=onerror, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder, subfolders, files


def check_room(folder: Path, need: int) -> None:
    """Raises ValueError if the disk of a folder has less than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"'{folder}' needs {size_text(need)} more, and its disk has {size_text(free)} free: "
            "make room, or give a folder on another disk"
        )


def size_text(size: int) -> str:
    """A number of bytes in the unit that fits: '12.3 kB', '4.5 GB'."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:.1f} {name}"


def parse_json(data: str | bytes):
    """Parse JSON that need not be trusted; ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: str | Path, value) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def is_of_a_file(error: OSError) -> bool:
    """Whether an error is about a file or a full disk, and not about a connection."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    return error.filename is not None or error.errno in full


def is_of_the_disk(error: Exception) -> bool:
    """Whether an error in reading is of the disk, or a lack of memory, and not of what is read.

    EINVAL is a seek to where a damaged file says that something is.
    """
    number = getattr(error, "errno", None)
    return isinstance(error, MemoryError) or number not in (None, errno.EINVAL)


def reason_of(error: Exception) -> str:
    """The reason that the operating system gives for an error that `is_of_the_disk`."""
    return getattr(error, "strerror", None) or "out of memory"


def unwritable(
    path: str | Path,
    error: OSError,
    advice: str = "make room, or give another folder; what was there before is untouched",
) -> str:
    """The message for an error in writing `path`: the reason, and what to do."""
    return f"{path} cannot be written ({error.strerror or error}): {advice}"


@contextlib.contextmanager
def locked(path: Path, held: str) -> Iterator[None]:
    """Hold a folder or a file, until the end of `with` or until this process ends in any way.

    Where the file system has no locks, a warning is printed, and nothing is held.

    Args:
        path: a folder, or a file, which is made if it is missing.
        held: the message, if another process holds it.

    Raises:
        ValueError: another process holds it.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptors = [os.open(path, flags, 0o666)]

    def close() -> None:
        while descriptors:
            os.close(descriptors.pop())

    os.register_at_fork(after_in_child=close)  # else a forked process would go on to hold it
    try:
        fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            close()
            raise ValueError(held) from error
        print(
            f"warning: the file system of {path} has no locks ({error.strerror}): see to it that "
            "no second process writes there",
            flush=True,
        )
    try:
        yield
    finally:
        close()
