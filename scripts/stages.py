"""What each stage of a residual quantizer does, measured on a validation set.

    python scripts/stages.py --load A/last.pt B/last.pt --val-data-path DIR --figures DIR

For every stage: RMS of the residual before and after it, RMS of the input of its FSQ, share of its
codes that are used, perplexity and first-order entropy; and PSNR, SSIM, L1 and LPIPS of the images
that the first k stages decode to. Any other quantizer is one stage. The definitions are in
`evaluation.evaluate_stages`. `--figures` draws residuals.png and quality.png (matplotlib).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
import util
from arguments import LOAD_HELP, Parser, add_evaluation_flags
from evaluation import evaluate_stages, prepare
from files import make_folder, write_json
from metric import usage_note

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
    **output.METRICS,
}


def format_stages(rows: Sequence[dict], network: str | None) -> str:
    """What `evaluate_stages` returns as a table for the screen; `network`: that of LPIPS."""
    table = [[*output.headings(COLUMNS, network).values()]]
    for row in rows:
        cells = [(row[name], decimals) for name, (_, decimals) in COLUMNS.items()]
        table.append(["-" if x is None else f"{x:.{decimals}f}" for x, decimals in cells])
    return f"{output.text_table(table)}\n{usage_note(rows)}".rstrip()


def draw(path: Path, labels: Sequence[str], panels: dict[str, tuple], yscale: str) -> None:
    """Write a PNG with a panel for each title, and in it a line for each of the checkpoints.

    `panels`: title: (label of the x axis, its first value, the values of each checkpoint, of which
    those without values are left out).
    """
    figure = output.load_figure()(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        xlabel, first, lines = panel
        for label, y in zip(labels, lines, strict=True):
            if None not in y:
                axes.plot(range(first, first + len(y)), y, marker="o", label=output.literal(label))
        axes.set(title=title, xlabel=xlabel, yscale=yscale)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    output.save_picture(figure, path)
    print(path)


def draw_all(results: Sequence[dict], folder: Path) -> None:
    """Draw residuals.png and quality.png from the results of `main`."""
    names, paths = ([result[key] for result in results] for key in ("name", "checkpoint"))
    labels = output.distinct(names, paths)

    def column(name: str) -> list[list]:
        return [[row[name] for row in result["stages"]] for result in results]

    before, after = column("residual_rms_before"), column("residual_rms_after")
    residuals = [[x / a[0] for x in (a[0], *b)] for a, b in zip(before, after, strict=True)]
    panels = {
        "RMS of the residual / RMS of the latent": ("after stage", 0, residuals),
        "RMS of the input of the FSQ": ("stage", 1, column("fsq_input_rms")),
        "perplexity of the codes": ("stage", 1, column("perplexity")),
    }
    draw(folder / "residuals.png", labels, panels, "log")
    metrics = output.METRICS.items()
    panels = {title: ("stages decoded", 1, column(name)) for name, (title, _) in metrics}
    if None in panels["LPIPS"][2][0]:
        del panels["LPIPS"]
    draw(folder / "quality.png", labels, panels, "linear")


def main(argv: Sequence[str] | None = None) -> dict:
    """Return what `--json` writes: the stages of every checkpoint. ValueError for bad input."""
    parser = Parser.of(__file__, __doc__)
    text = f"each a {LOAD_HELP}"
    parser.add_argument("--load", required=True, nargs="+", metavar="MODEL", help=text)
    parser.add_argument("--figures", metavar="DIR", help="draw two figures there (matplotlib)")
    add_evaluation_flags(parser)
    flags = parser.parse_args(argv)
    output.check_json(flags.json)
    if flags.figures:
        output.load_figure()
        if Path(flags.figures).is_file():
            raise ValueError(f"--figures {flags.figures} is a file: give a folder")

    loading = flags.batch_size, flags.num_workers
    setup = prepare(flags.load, flags.val_data_path, flags.img_size, flags.lpips_net, *loading)
    if flags.figures:
        make_folder(flags.figures, "give another --figures")
    results, main_process = [], util.rank() == 0
    network = setup.perceptual and setup.perceptual.net
    for path, name, step, model in setup.checkpoints:
        batches = output.progress(setup.loader, "stages", "batches", shown=main_process)
        rows = evaluate_stages(model, batches, setup.perceptual, setup.device)
        results.append({"name": name, "checkpoint": path, "step": step, "stages": rows})
        if main_process:
            print(f"{name}, step {step}, {path}\n{format_stages(rows, network)}\n", flush=True)
    result = {
        "images": len(setup.images),
        "image_size": setup.img_size,
        "val_data": flags.val_data_path,
        "lpips_net": network,
        "checkpoints": results,
        "environment": util.environment(setup.device),
    }
    if flags.json and main_process:
        write_json(Path(flags.json), result)
    if flags.figures and main_process:
        draw_all(results, Path(flags.figures))
    return result


if __name__ == "__main__":
    exits.run_script(main)
