"""`results.json` of finished runs: found, read, and kept without what belongs to one machine."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

# In every results.json.
RESULTS = {"paper", "floors", "steps", "images_seen", "environment", "args"}
PLACES = ("--train-data-path", "--val-data-path", "--save", "--resume", "--load")  # of a machine


def find_runs(names: Iterable[str], file: str) -> list[Path]:
    """The files named `file` in run folders, folders of them and patterns, each of them once.

    Raises:
        ValueError: a name without such a file.
    """
    found: dict[Path, Path] = {}
    for name in names:
        paths = [Path(match) for match in sorted(glob.glob(name))] or [Path(name)]
        files = [each for p in paths for each in ([p] if p.is_file() else p.rglob(file))]
        files = [each for each in files if each.is_file()]  # opening a pipe would wait for ever
        if not files:
            raise ValueError(f"{name} holds no {file}: give folders of runs, such as runs/NAME")
        found |= {each.resolve(): each for each in sorted(files)}
    return list(found.values())


def read_results(names: Iterable[str]) -> tuple[list[dict], list[str]]:
    """The `results.json` files that `find_runs` finds.

    Returns:
        The results, each with its file as `path`, and one line for each file that is damaged or
        not written by train.py.

    Raises:
        ValueError: a name without results.
    """
    results, faults = [], []
    for path in find_runs(names, "results.json"):
        try:
            run = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            faults.append(f"{path} is damaged ({str(error).splitlines()[0]}): remove it")
            continue
        missing = sorted(RESULTS - set(run)) if isinstance(run, dict) else sorted(RESULTS)
        if missing:
            faults.append(f"{path} lacks {', '.join(missing)}: give what train.py has written")
        else:
            results.append({**run, "path": path})
    return results, faults


def without_places(command: str) -> str:
    """A command of train.py without what is of no use on another machine."""
    every = shlex.split(command)
    kept, words = [Path(word).name for word in every[:2]], iter(every[2:])  # python and the script
    for word in words:
        flag, joined, _ = word.partition("=")
        if flag not in (*PLACES, "--overwrite"):
            kept.append(word)
        elif flag in PLACES and not joined:
            next(words, None)
    return shlex.join(kept)


def portable(run: dict) -> dict:
    """The results of a run without the folders of its machine: data by the names of their folders.

    Everything that was measured, the flags of the model and of the training stay.
    """
    data = {key: Path(run[key]).name for key in ("train_data", "val_data") if key in run}
    args = dict(run["args"])
    for flag in PLACES:
        key = flag.removeprefix("--").replace("-", "_")
        if args.get(key):
            args[key] = Path(args[key]).name
    parts = [run["environment"], *run.get("segments", [])]
    environment, *segments = [{**p, "command": without_places(p["command"])} for p in parts]
    kept = {key: value for key, value in run.items() if key != "path"}
    if segments:
        kept["segments"] = segments
    return {**kept, **data, "args": args, "environment": environment}
