"""Training loss and validation metrics of any runs against the step, as one picture.

    python scripts/plot.py runs/A runs/B --out curves.png

Reads metrics.jsonl alone, so runs that are still training can be drawn as well; of kept results
(`scripts/keep_results.py`), their validation metrics. Damaged lines of a log are skipped with a
warning. Needs matplotlib: pip install '.[figures]'.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
from arguments import Parser
from run import RunFolder
from tables.results import find_runs, read_results

PANELS = {  # a number of the log: kind of its records, title of its panel
    "loss": ("train", "training loss"),
    **{name: ("val", f"validation {title}") for name, (title, _) in output.METRICS.items()},
}
STYLES = ("-", "--", ":", "-.")
SIZE = (5, 4)  # inches of a panel
LARGEST = 1e30  # a number that is drawn


def curve(records: Sequence[dict], kind: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of the records of a kind that have a number under `key`."""
    rows = [(record["step"], record.get(key)) for record in records if record["kind"] == kind]
    numbers = [(step, value) for step, value in rows if isinstance(value, int | float)]
    return [point for point in numbers if all(abs(x) < LARGEST for x in point)]


def read_runs(names: Sequence[str]) -> dict[str, list[dict]]:
    """{label: records of its log} of runs, by the folders that differ, and of kept results.

    Raises:
        ValueError: a name without runs.
    """
    files = find_runs(names, "metrics.jsonl")
    folders = [file.parent.absolute() for file in files if file.suffix == ".jsonl"]
    root = os.path.commonpath([folder.parent for folder in folders]) if folders else ""
    labels = [os.path.relpath(folder, root) for folder in folders]
    logs = [RunFolder(folder).read_log() for folder in folders]
    kept, faults = [], []
    if len(folders) < len(files):
        # With the results of the runs, so that a kept copy of one of them is left out.
        known = [file.with_name("results.json") for file in files if file.suffix == ".jsonl"]
        given = [file for file in files if file.suffix != ".jsonl"]
        found, faults = read_results([str(file) for file in (*known, *given) if file.exists()])
        kept = [run for run in found if run["path"].name != "results.json"]
    for fault in faults:
        print(f"warning: {output.printable(fault)}", file=sys.stderr)
    labels += [output.printable(run["args"].get("name") or run["name"]) for run in kept]
    for run in kept:
        common = {"kind": "val", "lpips_net": run.get("lpips_net")}
        logs.append([{**common, **each} for each in run.get("validations", [])])
    paths = [*map(str, folders), *(run["path"].stem for run in kept)]
    return dict(zip(output.distinct(labels, paths), logs, strict=True))


def read_curves(names: Sequence[str], panels: Sequence[str]) -> dict[str, dict[str, list]]:
    """{title of a panel: {run: curve}}; LPIPS has a panel for each network.

    Raises:
        ValueError: a name without runs, or nothing to draw in any of them.
    """
    curves: dict[str, dict[str, list]] = {}
    runs = read_runs(names)
    for kind, key, title in ((PANELS[key][0], key, PANELS[key][1]) for key in panels):
        for label, records in runs.items():
            if points := curve(records, kind, key):
                nets = {record.get("lpips_net") for record in records} - {None}
                suffix = f"-{'/'.join(sorted(nets))}" if key == "lpips" and nets else ""
                curves.setdefault(title + suffix, {})[label] = points
    if not curves:
        raise ValueError(f"{', '.join(names)}: there is nothing to draw yet: give other runs")
    if without := [label for label, records in runs.items() if not records]:
        print(f"warning: nothing is logged of {', '.join(without)}: left out", file=sys.stderr)
    return curves


def draw(curves: dict[str, dict[str, list]]):
    """The picture, a matplotlib Figure: a panel for each title, a colour for each run."""
    labels = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    size = (SIZE[0] * len(curves), SIZE[1] + 0.2 * math.ceil(len(labels) / len(curves)))
    figure = output.load_figure()(figsize=size, layout="constrained")
    handles = {}
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, lines) in zip(panels, curves.items(), strict=True):
        for label, points in lines.items():
            x, y = zip(*points, strict=True)
            number = labels.index(label)
            style = dict(marker="." if len(points) < 50 else None, color=f"C{number}")
            style["linestyle"] = STYLES[number // 10 % len(STYLES)]  # there are ten colours
            (handles[label],) = axes.plot(x, y, linewidth=1, **style)
        positive = all(y > 0 for points in lines.values() for _, y in points)
        scale = "log" if title == PANELS["loss"][1] and positive else "linear"  # LFQ's: both
        axes.set(title=title, xlabel="step", yscale=scale)
        axes.grid(alpha=0.3)
    legend = dict(loc="outside lower left", ncols=len(curves))
    figure.legend(handles.values(), map(output.literal, handles), **legend)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw as the flags say and return the path of the picture. ValueError for bad input."""
    parser = Parser.of(__file__, __doc__)
    text = "run folders, folders of them or of kept results, metrics.jsonl, globs"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
    parser.add_argument("--out", default="curves.png", metavar="PNG", help="the picture")
    text = "what is drawn, in this order; default: all"
    parser.add_argument("--panels", nargs="+", choices=tuple(PANELS), help=text)
    flags = parser.parse_args(argv)
    out = output.check_picture("--out", flags.out)
    curves = read_curves(flags.runs, list(dict.fromkeys(flags.panels or PANELS)))
    figure = draw(curves)
    output.save_picture(figure, out)
    print(f"{len(curves)} panels: {out}")
    return out


if __name__ == "__main__":
    exits.run_script(main)
