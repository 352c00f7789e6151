"""`results.json` of finished runs: found, read, and kept without what belongs to one machine."""

from __future__ import annotations

import glob
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType

from files import parse_json, walk
from flags import args_of
from output import printable
from segment import is_segment

FLOORS = ("bicubic", "mean_colour")  # the references, by their names in files
# In every results.json, of this type; `a.b` is entry b of entry a.
RESULTS: dict[str, type | UnionType] = {
    "args": dict,
    "image_size": list,
    **dict.fromkeys(("images", "f", "parameters", "steps", "batch_size", "seed"), int),
    **dict.fromkeys(("images_seen", "train_images"), int),
    **dict.fromkeys(("bits", "bpp", "l1", "psnr", "paper.l1", "paper.psnr"), int | float),
    **{
        f"floors.{floor}.{metric}": int | float
        for floor in FLOORS
        for metric in ("l1", "psnr", "paper.l1", "paper.psnr")
    },
    # None without a network, and in results of versions that did not have them.
    **{
        f"{whose}{metric}": int | float | None
        for whose in ("", *(f"floors.{floor}." for floor in FLOORS))
        for metric in ("ssim", "lpips", "paper.lpips")
    },
    **dict.fromkeys(("lpips_net", "precision"), str | None),
    **dict.fromkeys(("name", "train_data", "val_data", "environment.command"), str),
    "environment.device": str,
}
KEPT = "*-s[0-9]*.json"  # files of `scripts/keep_results.py`
PLACES = ("--train-data-path", "--val-data-path", "--save", "--resume", "--load")  # of a machine


def find_runs(names: Iterable[str], file: str) -> list[Path]:
    """The files named `file` in run folders, folders of them and patterns, each of them once.

    Kept results (`KEPT`) are found as well, in a folder or by name. Links to folders are
    followed. A name without either, such as a run that is not finished, is left out with a
    warning.

    Raises:
        ValueError: a name that does not exist, or nothing is found.
    """
    found: dict[Path, Path] = {}
    without, nowhere = [], []
    for name in names:
        files: list[Path] = []
        matches = [] if os.path.lexists(name) else sorted(glob.glob(name))
        paths = [Path(match) for match in matches] or [Path(name)]
        for path in paths:
            if path.is_dir():
                files += _below(path, file)
                files += path.glob(KEPT)
            elif path.suffix == Path(file).suffix or path.match(KEPT):
                files.append(path)
        files = [each for each in files if each.is_file()]  # opening a pipe would wait for ever
        if not files:
            (without if os.path.lexists(paths[0]) else nowhere).append(name)
        found |= {each.resolve(): each for each in sorted(files)}
    if nowhere or not found:
        name = (nowhere or without)[0]
        raise ValueError(f"{name} holds no {file}: give folders of runs, such as runs/NAME")
    for name in without:
        print(f"warning: {printable(name)} holds no {file}: left out", file=sys.stderr)
    return list(found.values())


def _below(folder: Path, file: str) -> list[Path]:
    """The files of this name in a folder, to any depth, through links to folders."""
    return [Path(place, file) for place, _, files in walk(folder) if file in files]


def read_results(names: Iterable[str]) -> tuple[list[dict], list[str]]:
    """The `results.json` files that `find_runs` finds.

    Returns:
        The results, each with its file as `path`, and one line for each file that is damaged, of
        flags that do not exist, or not written by train.py.

    Raises:
        ValueError: a name without results.
    """
    results, faults = [], []
    for path in find_runs(names, "results.json"):
        try:
            run = parse_json(path.read_text())
            missing = lacking(run)
            if not missing:
                args_of(run)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            faults.append(f"{path} is damaged, or no results of a run ({reason}): leave it out")
            continue
        if missing:
            faults.append(f"{path} lacks {', '.join(missing)}: give what train.py has written")
        else:
            results.append({**run, "path": path})
    # A kept copy beside the run that it was made of is the same run.
    runs = [run for run in results if run["path"].name == "results.json"]
    kept = [run for run in results if run["path"].name != "results.json"]
    if runs and kept:
        same = [portable(run) for run in runs]
        results = [*runs, *(run for run in kept if portable(run) not in same)]
    return results, faults


def lacking(run: object) -> list[str]:
    """The names of the entries of results that are missing in `run`, or of another type."""
    missing = [key for key, kind in RESULTS.items() if not _is_a(_entry(run, key), kind)]
    validations = run.get("validations", []) if isinstance(run, dict) else []  # not of older ones
    if not (isinstance(validations, list) and all(map(_is_validation, validations))):
        missing.append("validations")
    if "image_size" not in missing:
        size = _entry(run, "image_size")
        if len(size) != 2 or not all(_is_a(side, int) for side in size):
            missing.append("image_size")
    segments = run.get("segments", []) if isinstance(run, dict) else []
    if not (isinstance(segments, list) and all(map(_is_segment, segments))):
        missing.append("segments")
    if not _is_command(_entry(run, "environment.command")):
        missing.append("environment.command")
    if not is_segment(_entry(run, "environment")):
        missing.append("environment")
    return sorted({*missing})


def _is_a(value: object, kind: type | UnionType) -> bool:
    """Whether a value is of a type; NaN and numbers beyond 1e300 are of none."""
    number = isinstance(value, int | float)
    return isinstance(value, kind) and (not number or -1e300 < value < 1e300)


def _is_validation(record: object) -> bool:
    kinds = {"step": int, "psnr": int | float, "lpips": int | float | None}
    return all(_is_a(_entry(record, key), kind) for key, kind in kinds.items())


def _is_segment(part: object) -> bool:
    """Whether `part` is a segment whose command can be split into its words."""
    if not is_segment(part):
        return False
    first_step, command = part.get("first_step", 1), part.get("command")
    return _is_a(first_step, int) and (command is None or _is_command(command))


def _is_command(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(shlex.split(text))
    except ValueError:  # a quote that is not closed
        return False


def _entry(tree: object, key: str) -> object:
    """`tree[a][b]` for the key "a.b"; None if it is not there."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def without_places(command: str) -> str:
    """A command of train.py without what is of no use on another machine."""
    return without_flags(command, PLACES)


def without_flags(command: str, flags: Iterable[str]) -> str:
    """A command of train.py without its folder, --overwrite, and these flags and their values.

    A flag that is given again, after those of a configuration, counts the last time, and is
    there once.
    """
    every = shlex.split(command)
    given: dict[str, list[str]] = {}  # a flag: its words
    flag = ""
    for word in every[2:]:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            given.pop(flag, None)
        given.setdefault(flag, []).append(word)
    words = [Path(word).name for word in every[:2]]  # python and the script
    for flag, its_words in given.items():
        if flag not in (*flags, "--overwrite"):
            words += its_words
    return shlex.join(words)


def parts_of(run: dict) -> list[dict]:
    """How a run went on whenever it was resumed, each part with the entries of a `Segment`.

    One part for a run of an older version, which does not say.
    """
    known = {"first_step": 1, **run["environment"]}
    known["precision"] = run.get("precision") or run["args"].get("precision") or "fp32"
    parts = run.get("segments") or [{}]
    if len(parts) > 1:  # the environment is that of the last one
        known = {key: known[key] for key in known.keys() - {"torch", "processes"}}
    parts = [{**known, **part} for part in parts]
    return [{**part, "precision": part["precision"] or known["precision"]} for part in parts]


def portable(run: dict) -> dict:
    """The results of a run without the folders of its machine: data by the names of their folders.

    Everything that was measured, the flags of the model and of the training stay.
    """
    data = {key: Path(run[key]).name for key in ("train_data", "val_data") if key in run}
    args = dict(run["args"])
    for flag in PLACES:
        key = flag.removeprefix("--").replace("-", "_")
        if args.get(key):
            args[key] = "/".join(Path(args[key]).parts[-2 if flag == "--load" else -1 :])
    parts = [run["environment"], *run.get("segments", [])]
    environment, *segments = [{**p, "command": without_places(p["command"])} for p in parts]
    kept = {key: value for key, value in run.items() if key != "path"}
    if segments:
        kept["segments"] = segments
    return {**kept, **data, "args": args, "environment": environment}
