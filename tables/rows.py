"""Finished runs as the rows of tables: one configuration each, its seeds together.

Runs that differ in another flag than the seed (data, steps, network, learning rate, ...) are in
separate tables; how a run was computed (commit, hardware, `--compile`) does not separate them, nor
does a run whose LPIPS is missing where no loss has LPIPS.
"""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import torch

import output
from arguments import get_args
from flags import args_of, may_change_flags, quantizer_flags, with_values_in_use
from quantizers import QUANTIZERS, STRATEGIES, build_quantizer
from tables.results import parts_of

# The table of arXiv 2508.15860 in its units (L1 on normalised images, LPIPS, PSNR), by `--name`.
PAPER = {
    "VQ-EMA 4096": (0.355, 0.489, 12.7),
    "LFQ 12 bits": (0.241, 0.361, 16.0),
    "FSQ 12 bits": (0.143, 0.182, 20.3),
    "RFSQ-2x2048-None": (0.130, 0.159, 21.1),
    "RFSQ-2x2048-Scale": (0.122, 0.152, 21.5),
    "RFSQ-2x2048-LN": (0.124, 0.148, 21.3),
    "RFSQ-4x1024-None": (0.113, 0.121, 22.2),
    "RFSQ-4x1024-Scale": (0.103, 0.101, 22.9),
    "RFSQ-4x1024-LN": (0.102, 0.100, 22.9),
}
ORDER = ("ema", "lfq", "fsq", "rfsq", "svq")  # of rows with equal bits, then all others
# Flags that the table states by the results of its runs, and the seed.
STATED = ("img_size", "batch_size", "lpips_net", "precision", "seed")


@dataclass
class Row:
    """One configuration in one setting."""

    name: str
    args: Namespace
    flags: dict  # that the quantizer reads
    kind: str  # what the paper's table tells apart: the quantizer without weights and statistics
    runs: list[dict] = field(default_factory=list)  # results, by seed
    label: str = ""  # the name, and the flags that are not those of the configuration
    paper: tuple[float, ...] | None = None  # the paper's figures


def configurations(folder: str) -> dict[str, Row]:
    """The configurations in scripts/`folder`, by name, as rows without runs."""
    rows = {}
    for file in sorted((Path(__file__).parent.parent / "scripts" / folder).glob("*.sh")):
        words = shlex.split(file.read_text().replace("\\\n", " "), comments=True)
        args = get_args(words[2:-1])  # exec .../paper.sh FLAGS "$@"
        rows[args.name] = make_row(args.name, args)
    return rows


def make_row(name: str, args: Namespace) -> Row:
    """A row without runs. Its flags have the values in use, also where none was given."""
    try:
        with torch.device("meta"):  # no memory for a codebook
            quantizer = build_quantizer(args)
    except ValueError:  # a quantizer that this version does not know: any flag may matter
        used, own = quantizer_flags(), name
    else:
        used = quantizer.read_flags()
        own = quantizer.name.removesuffix("-image")
        args = with_values_in_use(args, quantizer)
    flags = {flag: getattr(args, flag) for flag in ("quantizer", *used)}
    return Row(name, args, flags, f"{own} {args.levels}")


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
        "LPIPS network": run.get("lpips_net") or "missing",
        "precision": ", then ".join(dict.fromkeys(map(itemgetter("precision"), parts_of(run)))),
    }
    apart = {*quantizer_flags(), *may_change_flags(), *STATED} - {"load", "skip_corrupt"}
    others = tuple(f"{quantizer}_" for quantizer in QUANTIZERS if quantizer != args.quantizer)
    # A flag that this version does not know may make any difference, if not of another quantizer.
    kept = [f for f in sorted(vars(args)) if f not in apart and not f.startswith(others)]
    flags = {flag: getattr(args, flag) for flag in kept}
    return common | {f"--{flag.replace('_', '-')}": value for flag, value in flags.items()}


def settings(runs: Sequence[dict], rows: Sequence[Row]) -> list[dict]:
    """The `setting` of each run and its row.

    Where the loss has no LPIPS, a run without a network gets that of the runs which are like it
    otherwise, if they have one alone: those of two networks share no column.
    """
    found = [setting(run, row.args) for run, row in zip(runs, rows, strict=True)]
    keys = [json.dumps(common | {"LPIPS network": None}) for common in found]
    networks: dict[str, set[str]] = defaultdict(set)
    for key, common in zip(keys, found, strict=True):
        networks[key].add(common["LPIPS network"])
    for key, common in zip(keys, found, strict=True):
        others = [*networks[key] - {"missing"}]
        if len(others) == 1 and not common["--perceptual-weight"]:
            common["LPIPS network"] = others[0]
    return found


def make_tables(results: Iterable[dict]) -> list[tuple[dict, list[Row]]]:
    """(setting, rows) of each table; rows by bits and quantizer, runs by seed.

    A run without `--name` has that of the configuration with all its flags, else that of the
    configuration of its kind, else the quantizer's.

    Raises:
        ValueError: a configuration has two runs of one seed in one setting.
    """
    known = {**configurations("beyond"), **configurations("paper")}
    by_kind = {row.kind: name for name, row in known.items()}
    by_flags = {_model_flags(row): name for name, row in known.items()}
    tables: dict[str, tuple[dict, dict[str, Row]]] = {}
    runs = sorted(results, key=lambda run: run["seed"])
    new = [make_row(run["name"], args_of(run)) for run in runs]
    for run, row, common in zip(runs, new, settings(runs, new), strict=True):
        name = by_flags.get(_model_flags(row)) or by_kind.get(row.kind, row.name)
        row.name = output.printable(row.args.name or name)
        rows = tables.setdefault(json.dumps(common), (common, {}))[1]
        row = rows.setdefault(json.dumps([row.name, row.flags]), row)
        if row.runs and row.runs[-1]["seed"] == run["seed"]:
            raise ValueError(
                f"{row.runs[-1]['path']} and {run['path']} are both {row.name} with seed "
                f"{run['seed']}: leave one of them out"
            )
        row.runs.append(run)

    def place(row: Row) -> tuple:
        quantizer = row.args.quantizer
        strategy = [*STRATEGIES].index(row.args.rfsq_strategy)
        bits = round(row.runs[0]["bits"])
        return bits, (*ORDER, quantizer).index(quantizer), strategy, row.label

    for _, rows in tables.values():
        for row in rows.values():
            namesakes = [other for other in rows.values() if other.name == row.name]
            others = [known[row.name]] if row.name in known else namesakes
            row.label = row.name + differences(row, others)
            if by_kind.get(row.kind) == row.name and _is_of_the_paper(row, known[row.name]):
                row.paper = PAPER.get(row.name)
    return [(common, sorted(rows.values(), key=place)) for common, rows in tables.values()]


def _is_of_the_paper(row: Row, configuration: Row) -> bool:
    """Whether the paper's figures belong beside this row.

    The flags of its baselines are not known, so that only network and f count for them.
    """
    network = (row.args.network, row.args.downsample)
    same_network = network == (configuration.args.network, configuration.args.downsample)
    return same_network and (row.args.quantizer != "rfsq" or row.flags == configuration.flags)


def _model_flags(row: Row) -> str:
    """The flags of the model of a row but its width, as a key."""
    return json.dumps([row.flags, row.args.network, row.args.downsample])


def differences(row: Row, others: Iterable[Row]) -> str:
    """The flags of a row that differ from one of the others, with their values."""
    text = ""
    for flag in dict.fromkeys(flag for other in others for flag in (*row.flags, *other.flags)):
        value = getattr(row.args, flag)
        if any(getattr(other.args, flag) != value for other in others):
            words = value if isinstance(value, list) else [value]
            text += f", {flag.replace('_', ' ')} {' '.join(map(str, words))}"
    return text
