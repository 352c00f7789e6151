"""What each stage of a residual quantizer does, measured on a validation set.

    python scripts/stages.py --load A/last.pt B/last.pt --val-data-path DIR --figures DIR

For every stage: RMS of the residual before and after it, RMS of the input of its FSQ, share of its
codes that are used, perplexity and first-order entropy; and PSNR, L1 and LPIPS of the images that
the first k stages decode to. The definitions are in `evaluation.evaluate_stages`. `--figures`
draws residuals.png and quality.png (matplotlib).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from arguments import Parser, add_evaluation_flags
from checkpoint import write_json, write_whole
from evaluation import evaluate_stages, prepare

COLUMNS = {  # column: (heading, decimals)
    "stage": ("stage", 0),
    "bits": ("bits so far", 2),
    "residual_rms_before": ("residual before", 4),
    "residual_rms_after": ("after", 4),
    "fsq_input_rms": ("into the FSQ", 4),
    "used": ("codes used", 0),
    "share": ("share", 4),
    "perplexity": ("perplexity", 1),
    "entropy_bits": ("entropy bits", 2),
    "psnr": ("PSNR dB", 2),
    "l1": ("L1 [0,1]", 4),
    "lpips": ("LPIPS", 4),
}


def format_stages(rows: Sequence[dict]) -> str:
    """What `evaluate_stages` returns as a table for the screen."""

    def text(value: float | None, decimals: int) -> str:
        return "-" if value is None else f"{value:.{decimals}f}"

    table = [[heading for heading, _ in COLUMNS.values()]]
    table += [[text(row[name], d) for name, (_, d) in COLUMNS.items()] for row in rows]
    return util.text_table(table)


def draw_residuals(results: Sequence[dict], path: Path) -> None:
    """Two panels: the RMS of the residual after each stage, and of the input of each FSQ."""
    figure = util.load_figure()(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result in results:
        rows = result["stages"]
        start = rows[0]["residual_rms_before"]
        after = [1.0, *(row["residual_rms_after"] / start for row in rows)]
        left.plot(range(len(rows) + 1), after, marker="o", label=result["label"])
        plot_column(right, result, "fsq_input_rms")
    left.set(title="RMS of the residual / RMS of the latent", xlabel="after stage", yscale="log")
    right.set(title="RMS of the input of the FSQ", xlabel="stage", yscale="log")
    save(figure, path)


def draw_quality(results: Sequence[dict], path: Path) -> None:
    """PSNR, L1 and, where there is one, LPIPS of the image that the first k stages decode to."""
    titles = {"psnr": "PSNR, dB", "l1": "L1 on [0, 1]", "lpips": "LPIPS"}
    if results[0]["stages"][0]["lpips"] is None:
        del titles["lpips"]
    figure = util.load_figure()(figsize=(5 * len(titles), 4), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for result in results:
            plot_column(axes, result, column)
        axes.set(title=title, xlabel="stages decoded")
    save(figure, path)


def plot_column(axes, result: dict, column: str) -> None:
    """A column of a checkpoint's stages against the stage, unless it has no values."""
    rows = result["stages"]
    values = [row[column] for row in rows]
    if None not in values:
        axes.plot([row["stage"] for row in rows], values, marker="o", label=result["label"])


def save(figure, path: Path) -> None:
    """Write a figure as PNG, with a grid in all panels and a legend in the first."""
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    write_whole(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    print(path)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure every checkpoint on the same images, and return what `--json` writes.

    Raises:
        ValueError: for bad input.
    """
    parser = Parser(prog="stages.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--load", required=True, nargs="+", metavar="FILE", help="checkpoints: last.pt, best.pt"
    )
    parser.add_argument("--figures", metavar="DIR", help="draw two figures there (matplotlib)")
    add_evaluation_flags(parser)
    flags = parser.parse_args(argv)
    folder = Path(flags.figures) if flags.figures else None
    util.check_outputs(flags.json)
    if folder:
        util.load_figure()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--figures {folder} is a file: give a folder")

    setup = prepare(
        flags.load,
        flags.val_data_path,
        flags.img_size,
        flags.lpips_net,
        flags.batch_size,
        flags.num_workers,
    )
    for model in setup.models:
        if not model.quantizer.stage_axis:
            raise ValueError(
                f"{model.quantizer.name} has no stages: give checkpoints of RFSQ, or of VQ-EMA "
                "with --ema-stages above 1"
            )
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    results, main_process = [], util.rank() == 0
    for path, name, step, model in zip(
        flags.load, setup.names, setup.steps, setup.models, strict=True
    ):
        rows = evaluate_stages(model, setup.loader, setup.perceptual, setup.device)
        results.append({"name": name, "checkpoint": path, "step": step, "stages": rows})
        if main_process:
            print(f"{name}, step {step}, {path}\n{format_stages(rows)}\n", flush=True)
    result = {
        "images": len(setup.images),
        "image_size": setup.img_size,
        "val_data": flags.val_data_path,
        "lpips_net": setup.perceptual and setup.perceptual.net,
        "checkpoints": results,
        "environment": util.environment(setup.device),
    }
    if flags.json and main_process:
        write_json(Path(flags.json), result)
    if folder and main_process:
        several = len({*setup.names}) < len(setup.names)  # of one name, such as several seeds
        labels = [f"{r['name']} ({r['checkpoint']})" if several else r["name"] for r in results]
        labelled = [{**r, "label": label} for r, label in zip(results, labels, strict=True)]
        draw_residuals(labelled, folder / "residuals.png")
        draw_quality(labelled, folder / "quality.png")
    return result


if __name__ == "__main__":
    util.run_script(main)
