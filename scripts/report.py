"""Tables in Markdown from the `results.json` of finished runs, and from nothing else.

    python scripts/report.py runs/reproduce --out tables.md

A row is one configuration: runs with the same `--name` and the same flags of the quantizer. Runs
that differ in another flag than the seed (data, steps, network, ...) are in separate tables. With
--perceptual-weight 0, runs without LPIPS are in the table of those with it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
from arguments import Parser, get_args
from dataset import GENERATED
from files import write_whole
from tables.results import FLOORS, parts_of, read_results, without_flags
from tables.rows import Row, make_tables

DECIMALS = {name: decimals for name, (_, decimals) in output.METRICS.items()}
FIELD = tuple(output.METRICS)  # in the order of the first table
BASELINES = ("fsq", "ema")  # of all other quantizers
PAPER_METRICS = ("l1", "lpips", "psnr")  # in the order of the paper's columns


def comparable(row: Row, base: Row) -> bool:
    """RFSQ against None or image statistics, or any quantizer against a baseline of equal bits.

    Of the baselines, VQ-EMA is compared with FSQ.
    """
    a, b = row.args, base.args
    if b.quantizer in BASELINES and a.quantizer not in (b.quantizer, "fsq"):
        return abs(row.runs[0]["bits"] - base.runs[0]["bits"]) < 0.1
    same_codes = (a.rfsq_stages, a.levels) == (b.rfsq_stages, b.levels)
    if not (a.quantizer == b.quantizer == "rfsq" and same_codes):
        return False
    if a.rfsq_strategy == b.rfsq_strategy == "layernorm":
        return (a.rfsq_statistics, b.rfsq_statistics) == ("global", "image")
    return b.rfsq_strategy == "none" and a.rfsq_strategy != "none"


def show(runs: Sequence[dict], metric: str) -> str:
    """Mean and spread of a metric; results of older versions have no SSIM."""
    values = [run.get(metric) for run in runs]
    return "missing" if None in values else spread(values, DECIMALS[metric])


def spread(values: Sequence[float], decimals: int, sign: str = "") -> str:
    """Mean ± sample standard deviation; the mean alone of a single value."""
    mean = f"{statistics.fmean(values):{sign}.{decimals}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def references(rows: Sequence[Row]) -> tuple[dict[str, list[dict]], str]:
    """The references by label, and a sentence if they show that the rows saw different images."""
    runs, found, note = [run for row in rows for run in row.runs], {}, ""
    for name in FLOORS:
        label = f"bicubic x{runs[0]['f']}" if name == "bicubic" else name.replace("_", " ")
        found[label] = values = [run["floors"][name] for run in runs]
        psnr = [value["psnr"] for value in values]
        low, high = min(psnr), max(psnr)
        if high - low <= 1e-3:  # devices differ far less on the same images
            found[label] = [next((v for v in values if v.get("lpips") is not None), values[0])]
        else:
            note = (
                "**The validation images are not the same in all rows:** the PSNR of "
                f"{label} runs from {low:.2f} to {high:.2f} dB."
            )
    return found, note


def improvements(rows: Sequence[Row]) -> list[list[str]]:
    """Rows of the table of comparisons, each seed against the same seed; above 0 is better.

    Of each pair of rows: in how many seeds its PSNR is better, the gain in every metric, and the
    gain in the paper's units, with what the paper claims in brackets.
    """
    lines = []
    for row, base in itertools.product(rows, rows):
        pairs = [(a, b) for a in row.runs for b in base.runs if a["seed"] == b["seed"]]
        if not (pairs and comparable(row, base)):
            continue
        better = sum(a["psnr"] > b["psnr"] for a, b in pairs)
        line = [f"{row.label} against {base.label}", f"{better} of {len(pairs)}"]
        line += [gains(metric, pairs) for metric in FIELD]
        theirs = [each.paper for each in (row, base) if each.label == each.name]
        for i, metric in enumerate(PAPER_METRICS):
            cell = gains(metric, [(a["paper"], b["paper"]) for a, b in pairs])
            if len(theirs) == 2 and all(theirs):
                cell += f" ({gains(metric, [tuple({metric: each[i]} for each in theirs)])})"
            line.append(cell)
        lines.append(line)
    return lines


def gains(metric: str, pairs: Sequence[tuple[dict, dict]]) -> str:
    """Mean and spread of the gain of the first of each pair over the second."""
    values = [(a.get(metric), b.get(metric)) for a, b in pairs]
    lower = metric in output.LOWER_IS_BETTER
    if any(None in each or (lower and not each[1]) for each in values):
        return "–"
    if lower:
        return spread([100 * (old - new) / old for new, old in values], 1, "+")
    return spread([new - old for new, old in values], DECIMALS[metric], "+")


def origins(row: Row) -> str:
    """Where a row comes from: steps, images, seeds, commit, hardware and command of its runs."""
    parts: dict[str, list[int]] = {}
    for run in row.runs:
        ways: dict[str, int] = {}  # what differs between the parts of a run: its first step
        for part in parts_of(run):
            ways.setdefault(way(part), part["first_step"])
        texts = [
            f"from step {first}: {text}" if len(ways) > 1 else text for text, first in ways.items()
        ]
        parts.setdefault("; ".join(texts), []).append(run["seed"])
    seen = f"{row.runs[0]['steps']:,} steps, {row.runs[0]['images_seen']:,} images seen"
    if skipped := [run["skipped_steps"] for run in row.runs if run.get("skipped_steps")]:
        seen += f", {', '.join(map(str, skipped))} steps skipped (not finite)"
    ran = [
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, {text}"
        for text, seeds in parts.items()
    ]
    return f"- {row.label}: {seen}; {'; '.join(ran)}"


def way(part: dict) -> str:
    """Commit, machine and command of a part of a run, without what differs between seeds."""
    command = without_flags(part["command"], ("--seed", "--save", "--resume"))
    commit, _, changed = (part.get("commit") or "unknown").partition(" ")
    machine = part["device"]
    if part.get("torch"):
        machine += f", torch {part['torch']}"
    if part.get("processes", 1) > 1:
        machine += f", {part['processes']} processes"
    return f"commit {f'{commit[:10]} {changed}'.strip()}, {machine}: `{command}`"


def describe(c: dict, others: Sequence[dict]) -> list[str]:
    """The paragraphs about a setting `c`; `others` are the settings of the other tables."""
    images = f"{c['training images']:,} training images"
    if c["training data"] == GENERATED:
        images = "Generated training images"
    parts = [
        f"## {images}, {c['steps']:,} steps of {c['batch size']}",
        f"Trained on `{c['training data']}`, {c['images seen']:,} images seen; evaluated on "
        f"{c['validation images']:,} images of `{c['validation data']}`, {c['pixels']} pixels. "
        f"Width {c['--channel']}, f = {c['--downsample']}, {c['--res-blocks']} residual blocks, "
        f"{c['precision']}. LPIPS network: {c['LPIPS network']}.",
    ]
    known = {f"--{name.replace('_', '-')}": v for name, v in vars(get_args([])).items()}
    unlike = [f"`{k} {v}`" for k, v in c.items() if k[:2] == "--" and v != known.get(k, "unknown")]
    if unlike:
        parts.append(f"Flags unlike the defaults: {', '.join(unlike)}.")
    differ = [key for other in others for key in {**c, **other} if c.get(key) != other.get(key)]
    if differ:
        names = ", ".join(f"{key} (here {c.get(key)})" for key in dict.fromkeys(differ))
        parts.append(f"**Not to be compared with the other tables:** they differ in {names}.")
    return parts


def curves(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of PSNR / LPIPS in mid-training, seeds averaged, at about six steps.

    Without runs that were evaluated at their end alone, or by an older version.
    """
    found: list[tuple[str, dict[int, list[dict]]]] = []
    for row in rows:
        logs = [run["validations"] for run in row.runs if "validations" in run]
        by_step: dict[int, list[dict]] = {}
        for record in itertools.chain.from_iterable(logs):
            by_step.setdefault(record["step"], []).append(record)
        whole = {step: each for step, each in by_step.items() if len(each) == len(logs)}
        some = f", {len(logs)} of {len(row.runs)} seeds" if len(logs) < len(row.runs) else ""
        if len(whole) > 1:
            found.append((row.label + some, whole))
    steps = sorted({step for _, by_step in found for step in by_step})
    every = math.ceil(len(steps) / 6)  # counted from the last; the first is always there
    steps = sorted({*steps[:1], *steps[::-every]}) if steps else []

    def cell(records: Sequence[dict]) -> str:
        means = []
        for metric in ("psnr", "lpips"):
            values = [record.get(metric) for record in records]
            mean = "–" if None in values else f"{statistics.fmean(values):.{DECIMALS[metric]}f}"
            means.append(mean)
        return " / ".join(means)

    table = [
        [label, *(cell(by_step[step]) if step in by_step else "–" for step in steps)]
        for label, by_step in found
    ]
    return ["", *(f"{step:,}" for step in steps)], table


def section(common: dict, rows: Sequence[Row], others: Sequence[dict]) -> str:
    """Everything about one setting; `others` are the settings of the other sections."""
    network = common["LPIPS network"]
    lpips = "LPIPS" if network == "missing" else f"LPIPS-{network}"
    found, note = references(rows)
    table = []
    for row in rows:
        run, count = row.runs[0], len(row.runs)
        size = [f"{run['bits']:.2f}", run["f"], f"{run['bpp']:.3f}", f"{run['parameters']:,}"]
        table.append([row.label, count, *size, *(show(row.runs, m) for m in FIELD)])
    table += [[label, *"–––––", *(show(runs, m) for m in FIELD)] for label, runs in found.items()]
    header = ["configuration", "seeds", "bits", "f", "bpp", "parameters", "PSNR dB (peak 1)"]
    parts = [
        *describe(common, others),
        output.markdown_table([*header, "SSIM", "L1 [0,1]", lpips], table),
        note,
        "In the paper's units, beside its figures (ImageNet's 1.28 M images, 50 epochs, one seed, "
        "LPIPS-vgg):",
    ]

    header, table = ["configuration"], []
    for name in ("L1 normalised", f"{lpips} of [0,1] inputs", "PSNR dB (peak 2)"):
        header += [name, "the paper's"]
    lines = [(row.label, row.runs, row.paper) for row in rows]
    for label, runs, figures in (*lines, *((*reference, None) for reference in found.items())):
        theirs = [f"{x:.3f}" if x < 1 else f"{x:.1f}" for x in figures] if figures else "–––"
        ours = [show([run["paper"] for run in runs], metric) for metric in PAPER_METRICS]
        table.append([label, *(cell for pair in zip(ours, theirs, strict=True) for cell in pair)])
    parts.append(output.markdown_table(header, table))

    if table := improvements(rows):
        header = ["gain (above 0 is better)", "seeds with more PSNR", "PSNR dB", "SSIM", "L1 %"]
        header += ["LPIPS %", "L1 normalised, %", "LPIPS of [0,1] inputs, %", "PSNR dB (peak 2)"]
        intro = "Paired by seed; the last three in the paper's units (in brackets, its claims):"
        parts += [intro, output.markdown_table(header, table)]
    header, table = curves(rows)
    if table:
        parts += ["PSNR dB / LPIPS after steps:", output.markdown_table(header, table)]
    parts += ["Where the rows come from (`--seed`, `--save` and `--resume` left out):"]
    return "\n\n".join(filter(None, [*parts, "\n".join(map(origins, rows))]))


def main(argv: Sequence[str] | None = None) -> str:
    """Print the tables, or write them to `--out`; return them."""
    parser = Parser.of(__file__, __doc__)
    text = "run folders, folders of them or of kept results, results.json, globs"
    parser.add_argument("runs", nargs="+", metavar="RUNS", help=text)
    parser.add_argument("--out", metavar="FILE", help="write there in place of the screen")
    flags = parser.parse_args(argv)
    output.check_text("--out", flags.out, ".md", ".txt")
    results, faults = read_results(flags.runs)
    for fault in faults if results else faults[:-1]:
        print(f"report.py: warning: {output.printable(fault)}", file=sys.stderr)
    if not results:
        raise ValueError(faults[-1])
    tables = make_tables(results)
    intro = (
        "Mean ± sample standard deviation over the seeds. Bits are per latent position, side "
        "information included; parameters are those trained by gradient (the codebooks of VQ-EMA "
        "are moving averages)."
    )
    sections = []
    for common, rows in tables:
        others = [other for other, _ in tables if other is not common]
        sections.append(section(common, rows, others))
    text = "\n\n".join([intro, *sections]) + "\n"
    if flags.out:
        data = text.encode(errors="backslashreplace")
        write_whole(Path(flags.out), lambda file: file.write(data))
    else:
        print(text, end="")
    return text


if __name__ == "__main__":
    exits.run_script(main)
