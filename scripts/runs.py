"""Finished runs, read from their `results.json`: which belong in one row, which in one table.

A run's configuration is its quantizer, with all the flags that the quantizer reads: runs that
differ in the seed alone make one row. A run's setting is everything else that its numbers depend
on (data, steps, network, optimisation, LPIPS network, ...): only rows of one setting compare.
"""

from __future__ import annotations

import glob
import json
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import util
from arguments import get_args, get_parser
from quantizers import QUANTIZERS
from quantizers.rfsq import PAPER_LEVELS

STRATEGY = {"none": "None", "scale": "Scale", "layernorm": "LN", "geometric": "Geometric"}
ORDER = ("ema", "lfq", "fsq", "rfsq")  # of rows with equal bits
# Who reads a flag whose name does not begin with its quantizer's.
READERS = {
    "levels": ("fsq", "rfsq"),
    "entropy_loss_weight": ("lfq",),
    "commitment_weight": ("lfq", "ema"),
    "n_embed": ("ema",),
    "embed_dim": ("ema",),
}
# Flags that a setting states by the run's results, and flags that do not touch the numbers.
STATED = {"train_data_path", "val_data_path", "img_size", "batch_size", "lpips_net", "precision"}
NO_EFFECT = {"num_workers", "compile", "max_train_epochs", "train_iters"}
WRITTEN = {"paper", "floors", "steps", "images_seen", "environment", "args"}  # by train.py


@dataclass
class Row:
    """One configuration in one setting: `runs` are its results, in the order of their seeds."""

    label: str
    args: Namespace
    runs: list[dict]


def find_results(names: Iterable[str]) -> list[dict]:
    """The results in files, folders, folders of folders and patterns, each file once.

    Raises ValueError for a name without results, and for a file that train.py did not write.
    """
    found: dict[Path, Path] = {}
    for name in names:
        paths = [Path(match) for match in sorted(glob.glob(name))] or [Path(name)]
        files = [file for p in paths for file in ([p] if p.is_file() else p.rglob("results.json"))]
        if not files:
            raise ValueError(f"{name} holds no results.json: give finished runs, such as runs/NAME")
        found |= {file.resolve(): file for file in sorted(files)}
    results = []
    for path in found.values():
        try:
            run = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({util.one_line(error)}): remove it") from error
        missing = sorted(WRITTEN - set(run)) if isinstance(run, dict) else sorted(WRITTEN)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: give what train.py has written")
        results.append({**run, "path": path})
    return results


# ---------------------------------------------------------------------------------------
# What a run is: its configuration (the row) and its setting (the table)
# ---------------------------------------------------------------------------------------
def group_flags(title: str) -> list[str]:
    """The flags of the group of arguments.py with this title."""
    group = next(group for group in get_parser()._action_groups if group.title == title)
    return [action.dest for action in group._group_actions]


def levels_of(args: Namespace) -> list[int]:
    """Levels of an FSQ, or of each stage of an RFSQ."""
    return args.levels or ([8] * 4 if args.quantizer == "fsq" else PAPER_LEVELS[args.rfsq_stages])


def commas(values: Iterable) -> str:
    return ",".join(map(str, values))


def configuration(args: Namespace) -> str:
    """The name of a run's quantizer, then every flag of it that is not at its default."""
    kind, label, named = args.quantizer, args.quantizer, {"quantizer", "levels"}
    defaults = get_args([])
    if kind == "fsq":
        levels = levels_of(args)
        many = len(levels) > 6 and len({*levels}) == 1
        label = f"FSQ [{levels[0]}]x{len(levels)}" if many else f"FSQ [{commas(levels)}]"
    elif kind == "rfsq":
        stages, strategy, levels = args.rfsq_stages, args.rfsq_strategy, levels_of(args)
        size = math.prod(levels)
        codes = size if size <= 2**20 else f"{math.log2(size):.1f} bits"
        label = f"RFSQ-{stages}x{codes}-{STRATEGY[strategy]}"
        if levels != PAPER_LEVELS.get(stages):
            label += f" [{commas(levels)}]"
        named |= {"rfsq_stages", "rfsq_strategy"}
        # A flag of another strategy has no effect.
        named |= {"rfsq_initial_scale"} if strategy != "scale" else set()
        named |= {"rfsq_statistics"} if strategy != "layernorm" else set()
    elif kind == "lfq":
        label, named = f"LFQ {args.lfq_dim} bits", named | {"lfq_dim"}
    elif kind == "ema":
        stages, named = args.ema_stages, named | {"n_embed", "ema_stages"}
        label = (
            f"residual VQ-EMA {stages}x{args.n_embed}" if stages > 1 else f"VQ-EMA {args.n_embed}"
        )
    for flag in group_flags("quantizer"):
        prefix = flag.split("_")[0]
        readers = READERS.get(flag, (prefix,) if prefix in QUANTIZERS else (kind,))
        value = getattr(args, flag)
        if flag not in named and kind in readers and value != getattr(defaults, flag):
            label += f", {flag.removeprefix(f'{kind}_').replace('_', ' ')} {value}"
    return label


def setting(run: dict, args: Namespace) -> dict:
    """All that the rows of one table have in common, by the names that the table prints."""
    common = {
        "training images": run["train_images"],
        "training data": str(Path(run["train_data"])),
        "steps": run["steps"],
        "batch size": run["batch_size"],
        "images seen": run["images_seen"],
        "validation images": run["images"],
        "validation data": str(Path(run["val_data"])),
        "pixels": "x".join(map(str, run["image_size"])),
        "LPIPS network": run["lpips_net"] or "missing",
        "precision": run.get("precision") or args.precision or "fp32",
    }
    apart = {*group_flags("quantizer"), *group_flags("run"), *STATED, *NO_EFFECT} - {"load"}
    # A flag that this version does not know is not among `apart`: it may make any difference.
    flags = {flag: value for flag, value in sorted(vars(args).items()) if flag not in apart}
    return common | {f"--{flag.replace('_', '-')}": value for flag, value in flags.items()}


def make_tables(results: Iterable[dict]) -> list[tuple[dict, list[Row]]]:
    """(setting, rows) of each table; rows by bits and quantizer, runs by seed.

    Raises ValueError if a configuration has two runs of one seed in one setting.
    """
    tables: dict[str, tuple[dict, dict[str, Row]]] = {}
    for run in sorted(results, key=lambda run: run["seed"]):
        # Flags that are younger than the run have their defaults.
        args = Namespace(**{**vars(get_args([])), **run["args"]})
        common, label = setting(run, args), configuration(args)
        rows = tables.setdefault(json.dumps(common), (common, {}))[1]
        row = rows.setdefault(label, Row(label, args, []))
        if row.runs and row.runs[-1]["seed"] == run["seed"]:
            raise ValueError(
                f"{row.runs[-1]['path']} and {run['path']} are both {label} with seed "
                f"{run['seed']}: leave one of them out"
            )
        row.runs.append(run)

    def place(row: Row) -> tuple:
        kind, strategy = row.args.quantizer, row.args.rfsq_strategy
        kind_place = ORDER.index(kind) if kind in ORDER else len(ORDER)
        return round(row.runs[0]["bits"]), kind_place, list(STRATEGY).index(strategy), row.label

    return [(common, sorted(rows.values(), key=place)) for common, rows in tables.values()]


def comparisons(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """(row, base): RFSQ against None, against image statistics, against FSQ of equal bits."""

    def codes(row: Row) -> tuple:
        return row.args.rfsq_stages, levels_of(row.args)

    for row in (row for row in rows if row.args.quantizer == "rfsq"):
        strategy, where = row.args.rfsq_strategy, row.args.rfsq_statistics
        for base in rows:
            if base.args.quantizer == "fsq":
                if abs(row.runs[0]["bits"] - base.runs[0]["bits"]) < 0.5:
                    yield row, base
            elif base.args.quantizer == "rfsq" and codes(row) == codes(base):
                plain = base.args.rfsq_strategy == "none" != strategy
                both = strategy == base.args.rfsq_strategy == "layernorm"
                if plain or (both and (where, base.args.rfsq_statistics) == ("global", "image")):
                    yield row, base
