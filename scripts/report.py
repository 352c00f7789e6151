"""Tables in Markdown from the `results.json` of finished runs, and from nothing else.

    python scripts/report.py runs/reproduce --out tables.md

Runs are told apart by the flags in them, whatever their folders are called. Those that differ in
the seed alone are one row: mean and sample standard deviation. Those that differ in anything but
the quantizer (data, steps, network, LPIPS network, ...) are in separate tables.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, get_args
from checkpoint import write_whole
from scripts.runs import Row, comparisons, find_results, make_tables

# The table of arXiv 2508.15860, in its units: L1 on normalised images, LPIPS, PSNR.
PAPER = {
    "VQ-EMA 4096": (0.355, 0.489, 12.7),
    "LFQ 12 bits": (0.241, 0.361, 16.0),
    "FSQ [8,8,8,8]": (0.143, 0.182, 20.3),
    "RFSQ-2x2048-None": (0.130, 0.159, 21.1),
    "RFSQ-2x2048-Scale": (0.122, 0.152, 21.5),
    "RFSQ-2x2048-LN": (0.124, 0.148, 21.3),
    "RFSQ-4x1024-None": (0.113, 0.121, 22.2),
    "RFSQ-4x1024-Scale": (0.103, 0.101, 22.9),
    "RFSQ-4x1024-LN": (0.102, 0.100, 22.9),
}
DECIMALS = {"l1": 4, "lpips": 4, "psnr": 2}  # metrics in the order of the paper's columns


def show(row: Row, metric: str, paper: bool) -> str:
    """Mean and spread of a metric, in the field's units or the paper's."""
    values = [(run["paper"] if paper else run)[metric] for run in row.runs]
    return "missing" if None in values else spread(values, DECIMALS[metric])


def spread(values: Sequence[float], decimals: int, sign: str = "") -> str:
    """Mean ± sample standard deviation; the mean alone of a single value."""
    mean = f"{statistics.fmean(values):{sign}.{decimals}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def floor_rows(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The floors as rows, and a sentence if they show that the rows saw different images."""
    runs, floors, note = [run for row in rows for run in row.runs], [], ""
    for name in runs[0]["floors"]:
        label = f"bicubic x{runs[0]['f']}" if name == "bicubic" else name.replace("_", " ")
        values = [run["floors"][name] for run in runs]
        low, high = (pick(value["psnr"] for value in values) for pick in (min, max))
        if high - low > 1e-3:  # far more than devices differ on the same images
            note = (
                "**The validation images are not the same in all rows:** the PSNR of the floor "
                f"{label} runs from {low:.2f} to {high:.2f} dB."
            )
        floors.append(Row(label, rows[0].args, values if high - low > 1e-3 else values[:1]))
    return floors, note


def improvements(rows: Sequence[Row]) -> list[list[str]]:
    """Rows of the table of comparisons, each seed against the same seed; above 0 is better."""

    def gain(metric: str, new: float, old: float) -> float:
        return new - old if metric == "psnr" else 100 * (old - new) / old

    lines = []
    for row, base in comparisons(rows):
        pairs = [(a, b) for a in row.runs for b in base.runs if a["seed"] == b["seed"]]
        theirs = PAPER.get(row.label), PAPER.get(base.label)
        for i, metric in enumerate(DECIMALS):
            if not pairs or None in [run[metric] for pair in pairs for run in pair]:
                continue
            decimals, unit = (2, "PSNR, dB") if metric == "psnr" else (1, f"{metric.upper()}, %")
            ours = [gain(metric, a[metric], b[metric]) for a, b in pairs]
            paper = [gain(metric, a["paper"][metric], b["paper"][metric]) for a, b in pairs]
            claim = f"{gain(metric, *(t[i] for t in theirs)):+.{decimals}f}" if all(theirs) else "–"
            line = [f"{row.label} against {base.label}", unit, spread(ours, decimals, "+")]
            better = f"{sum(value > 0 for value in ours)} of {len(ours)}"
            lines.append([*line, spread(paper, decimals, "+"), claim, better])
    return lines


def origins(row: Row) -> str:
    """Where a row comes from: steps, images, seeds, commit, hardware and command of its runs."""
    parts: dict[str, list[int]] = {}
    for run in row.runs:
        where, words = run["environment"], run["environment"]["command"].split()
        words = [
            Path(w).name if w.endswith("/train.py") else w for w in words if w != "--overwrite"
        ]
        for flag in ("--seed", "--save"):
            while flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        commit, _, changed = (where["commit"] or "unknown").partition(" ")
        text = (
            f"commit {f'{commit[:10]} {changed}'.strip()}, {where['device']}: `{' '.join(words)}`"
        )
        parts.setdefault(text, []).append(run["seed"])
    seen = f"{row.runs[0]['steps']:,} steps, {row.runs[0]['images_seen']:,} images seen"
    ran = [
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, {text}"
        for text, seeds in parts.items()
    ]
    return f"- {row.label}: {seen}; {'; '.join(ran)}"


def section(common: dict, rows: Sequence[Row], others: Sequence[dict]) -> str:
    """Everything about one setting; `others` are the settings of the other sections."""
    c, network = common, common["LPIPS network"]
    parts = [
        f"## {c['training images']:,} training images, {c['steps']:,} steps of {c['batch size']}",
        f"Trained on `{c['training data']}`, {c['images seen']:,} images seen; evaluated on "
        f"{c['validation images']:,} images of `{c['validation data']}`, {c['pixels']} pixels. "
        f"Width {c['--channel']}, f = {c['--downsample']}, {c['--res-blocks']} residual blocks, "
        f"{c['precision']}. LPIPS network: {network}.",
    ]
    known = {f"--{name.replace('_', '-')}": v for name, v in vars(get_args([])).items()}
    unlike = [f"`{k} {v}`" for k, v in c.items() if k[:2] == "--" and v != known.get(k, "unknown")]
    if unlike:
        parts.append(f"Flags unlike the defaults: {', '.join(unlike)}.")
    differ = [key for other in others for key in {**c, **other} if c.get(key) != other.get(key)]
    if differ:
        names = (f"{key} (here {c.get(key)})" for key in dict.fromkeys(differ))
        parts.append(
            f"**Not to be compared with the other tables:** they differ in {', '.join(names)}."
        )
    floors, note = floor_rows(rows)
    lpips = "LPIPS" if network == "missing" else f"LPIPS-{network}"
    lines = []
    for row in rows:
        run = row.runs[0]
        size = [f"{run['bits']:.2f}", run["f"], f"{run['bpp']:.3f}", f"{run['parameters']:,}"]
        lines.append([row, len(row.runs), *size])
    lines += [[floor, *"–––––"] for floor in floors]
    header = ["configuration", "seeds", "bits", "f", "bpp", "parameters", "PSNR dB (peak 1)"]
    field = [
        [row.label, *cells, *(show(row, metric, False) for metric in ("psnr", "l1", "lpips"))]
        for row, *cells in lines
    ]
    parts += [util.markdown_table([*header, "L1 [0,1]", lpips], field), note]
    header, paper = ["configuration"], []
    for name in ("L1 normalised", f"{lpips} of [0,1] inputs", "PSNR dB (peak 2)"):
        header += [name, "the paper's"]
    for row in (*rows, *floors):
        figures = PAPER.get(row.label.split(", ")[0])  # tuned weights are the same row
        theirs = [f"{x:.3f}" if x < 1 else f"{x:.1f}" for x in figures] if figures else "–––"
        cells = zip((show(row, metric, True) for metric in DECIMALS), theirs, strict=True)
        paper.append([row.label, *(cell for pair in cells for cell in pair)])
    parts.append(
        "In the paper's units, beside its figures (ImageNet's 1.28 M images, 50 epochs, one seed, "
        "LPIPS-vgg):"
    )
    parts += [util.markdown_table(header, paper)]
    lines = improvements(rows)
    if lines:
        header = ["improvement (above 0 is better)", "of", "ours", "ours, the paper's units"]
        parts += [
            "Paired by seed:",
            util.markdown_table([*header, "the paper's", "seeds better"], lines),
        ]
    parts += ["Where the rows come from (`--seed` and `--save` left out):"]
    return "\n\n".join(filter(None, [*parts, "\n".join(map(origins, rows))]))


def main(argv: Sequence[str] | None = None) -> str:
    """Print the tables, or write them to `--out`; return them."""
    parser = Parser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="run folders, folders of them, results.json, globs"
    )
    parser.add_argument("--out", metavar="FILE", help="write there in place of the screen")
    flags = parser.parse_args(argv)
    tables = make_tables(find_results(flags.runs))
    intro = (
        "Mean ± sample standard deviation over the seeds. Bits are per latent position, side "
        "information included; parameters are those trained by gradient (the codebooks of VQ-EMA "
        "are moving averages)."
    )
    settings = [common for common, _ in tables]
    sections = [
        section(common, rows, [other for other in settings if other is not common])
        for common, rows in tables
    ]
    text = "\n\n".join([intro, *sections]) + "\n"
    if flags.out:
        write_whole(Path(flags.out), lambda file: file.write(text.encode()))
    else:
        print(text, end="")
    return text


if __name__ == "__main__":
    util.run_script(main)
