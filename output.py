"""What is printed and drawn: tables, text that a terminal can show, figures, progress bars."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from files import is_stream, write_whole

Item = TypeVar("Item")
SECONDS_A_LINE = 30  # between the progress lines in a log
# Files that other commands read: --json and --out refuse these names.
KEPT_NAMES = ("args.json", "environment.json", "results.json", "results.txt", "names.txt")
KEPT_NAMES += ("index.json", "unfinished.json", "config.json", "README.md")

# What the metrics of results.json are called in tables and pictures, and their decimals.
METRICS = {
    "psnr": ("PSNR dB", 2),
    "ssim": ("SSIM", 4),
    "l1": ("L1 [0,1]", 4),
    "lpips": ("LPIPS", 4),
}
LOWER_IS_BETTER = ("l1", "lpips")  # of these


def headings(columns: dict[str, tuple[str, int]], network: str | None) -> dict[str, str]:
    """The headings of columns like `METRICS`, with the network of LPIPS if there is one."""
    names = {column: heading for column, (heading, _) in columns.items()}
    return names | {"lpips": f"{names['lpips']}-{network}"} if network else names


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; the first column to the left, the others to the right."""
    cells = ([str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows))
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def check_outputs(*paths: str | None) -> None:
    """Raise, before the work, for a file that could not be written after it; None is skipped.

    Raises:
        ValueError: the folder of the file does not exist or cannot be written, or the path is a
            folder.
    """
    for path in filter(None, paths):
        folder = Path(path).absolute().parent
        to = path if is_stream(path) else folder
        if Path(path).is_dir() or not folder.is_dir() or not os.access(to, os.W_OK):
            raise ValueError(
                f"{path} cannot be written: give a file in a folder that exists and is writable"
            )


def check_json(path: str | None) -> None:
    """Raise, before the work, if --json could not be written after it, or names no JSON file.

    Raises:
        ValueError: it would replace a file of another kind, or as for `check_outputs`.
    """
    check_text("--json", path, ".json")


def check_text(flag: str, path: str | None, *suffixes: str) -> None:
    """Raise, before the work, if the file that `flag` names could not be written after it.

    Raises:
        ValueError: it has none of the `suffixes`, or the name of a file of a run, of packed images,
            of tokens or of an export, which it could replace; or as for `check_outputs`.
    """
    check_outputs(path)
    if not path or is_stream(path):
        return
    if Path(path).suffix.lower() not in suffixes:
        wanted = " or ".join(suffixes)
        raise ValueError(f"{flag} {path} is no {wanted} file: give a name that ends in {wanted}")
    if Path(path).name in KEPT_NAMES:
        raise ValueError(f"{flag} {path} has the name of a file of a run: give another name")


def check_picture(flag: str, out: str) -> Path:
    """The path that `flag` gives, after the checks that come before the work of drawing it.

    Raises:
        ValueError: it is no PNG or cannot be written, or matplotlib is not installed.
    """
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{flag} {path} is no PNG: give a name that ends in .png")
    check_outputs(out)
    load_figure()
    return path


def load_figure() -> type:
    """matplotlib's Figure class: the object-oriented interface needs no display.

    Raises:
        ValueError: matplotlib, an optional extra, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "figures need matplotlib: pip install '.[figures]', or leave them out"
        ) from error
    return Figure


def save_picture(figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all."""
    write_whole(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def literal(text: str) -> str:
    """A text for matplotlib, which would take what is between two `$` for a formula."""
    return text.replace("$", r"\$")


def distinct(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The names; if two are equal, such as those of several seeds, each with its path."""
    if len({*names}) == len(names):
        return list(names)
    return [f"{name} ({path})" for name, path in zip(names, paths, strict=True)]


class Progress:
    """A bar on a terminal; otherwise, as in a job's log, a line every 30 seconds.

    Args:
        what: what is done, such as 'pack'.
        total: how many units there are; None: that is not known.
        done: how many of them an interrupted run has done.
        unit: what is counted, in the plural.
        shown: False shows nothing.
    """

    def __init__(
        self, what: str, total: int | None, done: int = 0, unit: str = "images", shown: bool = True
    ):
        tty = sys.stderr.isatty()
        options = dict(initial=done, unit=unit, disable=not (tty and shown))
        self.bar = tqdm(desc=what, total=total, **options)
        self.what, self.done, self.in_a_log = what, done, shown and not tty
        self.of_all = unit if total is None else f"of {total:,} {unit}"
        self.last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, units: int) -> None:
        """Count units that are done."""
        self.bar.update(units)
        self.done += units
        if self.in_a_log and time.monotonic() - self.last >= SECONDS_A_LINE:
            self.last = time.monotonic()
            print(f"{self.what}: {self.done:,} {self.of_all}", file=sys.stderr, flush=True)


def progress(items: Iterable[Item], what: str, unit: str, shown: bool = True) -> Iterator[Item]:
    """`items`, one after the other, with a `Progress` on standard error."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(what, total, unit=unit, shown=shown) as done:
        for item in items:
            yield item
            done.add(1)


def printable(text: object) -> str:
    """A text in one line that every terminal can show: what is not printable is escaped."""
    characters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(characters)
